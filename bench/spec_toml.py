"""A parsed spec as the text of a TOML file: what a run folder keeps, so that its command can be typed again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence


def spec_text(spec: Mapping[str, object]) -> str:
    """TOML that `tomllib` parses to ``spec``: keys of values first, then tables of values, ranges inline.

    Raises:
        TypeError: a value that TOML has no word for.
    """
    plain = {key: value for key, value in spec.items() if not isinstance(value, Mapping)}
    parts = ["".join(f"{_key(key)} = {_value(value)}\n" for key, value in plain.items())]
    for name, table in spec.items():
        if isinstance(table, Mapping):
            lines = "".join(f"{_key(key)} = {_value(value)}\n" for key, value in table.items())
            parts.append(f"[{_key(name)}]\n{lines}")
    return "\n".join(part for part in parts if part)


def _key(name: str) -> str:
    bare = name.replace("_", "").replace("-", "")
    return name if bare.isascii() and bare.isalnum() else _text(name)


def _value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, Sequence):
        return "[" + ", ".join(map(_value, value)) + "]"
    raise TypeError(f"TOML has no word for a {type(value).__name__}: {value!r}")


def _text(value: str) -> str:
    # JSON's escapes are TOML's too, but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
