"""Which line of a TOML file a key is on: `tomllib` gives values without their places."""

from __future__ import annotations

import re

_HEADER = re.compile(r"\s*\[\[?\s*([^\]]*?)\s*\]\]?\s*(#.*)?$")
_PAIR = re.compile(r"""\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*=""")


def line_of(text: str, table: str, key: str = "") -> int | None:
    """The line, from 1, of ``key`` in ``[table]``; of the table itself where the key has no line of its own.

    Args:
        text: the whole file.
        table: name of the table, "" for what stands above the first one.
        key: name of the key, "" for the table's header.
    """
    lines = _pairs(text)
    wanted = ".".join(filter(None, (table, key)))
    of_key = [number for number, header, path in lines if ".".join(filter(None, (header, path))) == wanted]
    # An inline table, `run = { lr = 1 }`, has its keys on the line of its name.
    of_table = [number for number, header, path in lines if table and table in (header, path.partition(".")[0])]
    return next(iter(of_key or of_table), None)


def _pairs(text: str) -> list[tuple[int, str, str]]:
    """(line, header above it, key) of every key, and of every header with an empty key."""
    found, header = [], ""
    for number, line in enumerate(text.splitlines(), 1):
        if match := _HEADER.match(line):
            header = _plain(match.group(1))
            found.append((number, header, ""))
        elif match := _PAIR.match(line):
            found.append((number, header, _plain(match.group(1))))
    return found


def _plain(path: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in path.split("."))
