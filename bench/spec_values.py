"""The values of one field in a spec: a list, or a range of numbers, even or even in the logarithm.

``lr = { log = [1e-4, 1e-1], n = 7 }`` takes seven, a factor of √10 apart, with both ends, and
``n_hidden = { linear = [4, 64], n = 5 }`` takes 4, 19, 34, 49, 64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from moesaic.bench.plan import InputError

DIGITS = 12
"""Significant digits of the numbers inside a range, so that 0.001 is 0.001 and keys do not hang on a last bit."""
_FORM = "{ log = [low, high], n = how many } or { linear = [low, high], n = how many }"


def field_values(name: str, value: object, kind: type, *, repeats: bool) -> list[object]:
    """The values that a grid or a zip takes for one field.

    Args:
        name: as a message should call it, such as ``grid.lr``.
        value: a list, or a table that describes a range; whole numbers, rounded and each once, where ``kind`` is int.
        kind: type of the field.
        repeats: whether a list may have a value twice.

    Raises:
        InputError: neither a list nor a range, an empty list, a repeated value, or ends that no range has.
    """
    if isinstance(value, Mapping):
        return _range(name, value, kind)
    if not isinstance(value, list) or not value:
        raise InputError(
            f"{name} = {value!r}: must be a list of one value or more, or a range {_FORM}; a single fixed value goes "
            "to [run]"
        )
    if not repeats:
        for i, item in enumerate(value):
            if item in value[:i]:
                raise InputError(f"{name} = {value!r}: {item!r} is in the list twice")
    return value


def _range(name: str, value: Mapping[str, object], kind: type) -> list[object]:
    scale = next((scale for scale in ("log", "linear") if value.keys() == {scale, "n"}), None)
    if scale is None:
        raise InputError(f"{name} = {dict(value)!r}: takes {_FORM}")
    if kind not in (int, float):
        raise InputError(f"{name} = {dict(value)!r}: takes a list, as the field holds a {kind.__name__}, not a number")
    ends, n = value[scale], value["n"]
    if not isinstance(n, int) or isinstance(n, bool) or n < 2:
        raise InputError(f"{name}: n = {n!r}: takes an integer >= 2, the ends included")
    if not isinstance(ends, list) or len(ends) != 2 or not all(map(_is_number, ends)) or not ends[0] < ends[1]:
        raise InputError(f"{name}: {scale} = {ends!r}: takes two finite numbers, the smaller first")
    low, high = map(float, ends)
    if scale == "log" and low <= 0:
        raise InputError(f"{name}: log = {ends!r}: takes numbers > 0")
    inside = [_between(low, high, i / (n - 1), scale) for i in range(1, n - 1)]
    numbers = [low, *inside, high]
    return list(dict.fromkeys(map(round, numbers))) if kind is int else list(numbers)


def _between(low: float, high: float, share: float, scale: str) -> float:
    if scale == "linear":
        value = low + share * (high - low)
    else:
        value = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return float(f"{value:.{DIGITS}g}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
