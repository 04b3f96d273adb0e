"""``moesaic query``: SQL over a run folder by DuckDB, in memory and without a way to the disk or the network.

The table ``runs`` is ``runs.parquet``, or the rows of ``runs.jsonl`` where the parquet is not there yet or older.
``energy`` has a line per cell of ``energy.json``, where a sweep was measured.
"""

from __future__ import annotations

import csv
import datetime
import decimal
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moesaic.bench.plan import InputError, Row
from moesaic.bench.store import RunStore, column_types, jsonable

if TYPE_CHECKING:
    import duckdb

MOST_WIDE = 48
"""Most characters of a value in the printed table; JSON and CSV have all of them."""


@dataclass(frozen=True)
class Answered:
    """What a query gave: names and types of its columns, and its rows as JSON values."""

    columns: list[str]
    types: list[str]
    rows: list[list[object]]

    def records(self) -> list[Row]:
        """A dict per row; of columns with one name the later ones get a number."""
        names: list[str] = []
        for name in self.columns:
            tried = (name, *(f"{name}_{i}" for i in range(1, len(self.columns) + 1)))
            names.append(next(one for one in tried if one not in names))
        return [dict(zip(names, row, strict=True)) for row in self.rows]

    def text(self) -> str:
        """An aligned table: numbers flush right in six digits, a line below it that counts the rows."""
        lines = [[_cut(name) for name in self.columns], *([_cut(_shown(v)) for v in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        right = [kind.split("(")[0] in _NUMBERS for kind in self.types]
        aligned = [
            "  ".join(v.rjust(w) if r else v.ljust(w) for v, w, r in zip(line, widths, right, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join([*aligned, f"({len(self.rows)} row{'' if len(self.rows) == 1 else 's'})"])

    def csv(self) -> str:
        """The same as CSV, every digit of it; null is empty, lists are JSON."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([json.dumps(v) if isinstance(v, list | dict) else v for v in row] for row in self.rows)
        return file.getvalue().rstrip("\n")


_NUMBERS = {
    "TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT", "UHUGEINT",
    "FLOAT", "DOUBLE", "DECIMAL",
}  # fmt: skip


def query(folder: Path, sql: str) -> Answered:
    """Ask the rows of a run folder.

    Raises:
        InputError: no rows in the folder, or DuckDB refuses the query, with its own words.
    """
    import duckdb

    with connect(folder) as connection:
        try:
            asked = connection.execute(sql)
            described = asked.description or []
            rows = asked.fetchall() if described else []
        except duckdb.Error as error:
            raise InputError(f"query: {error}") from error
    columns, types = [str(d[0]) for d in described], [str(d[1]) for d in described]
    return Answered(columns, types, [[plain(value) for value in row] for row in rows])


def connect(folder: Path) -> duckdb.DuckDBPyConnection:
    """A DuckDB in memory with the folder's tables, shut off from files, the network and Python's variables.

    Raises:
        InputError: the folder holds no rows, or a damaged file.
    """
    store = RunStore(folder)
    connection = _open()
    if _is_current(store):
        connection.execute("CREATE TABLE runs AS SELECT * FROM read_parquet(?)", [str(store.parquet)])
    else:
        rows = store.rows()
        if not rows:
            raise InputError(f"query {folder}: no runs.jsonl with rows in it")
        _create(connection, "runs", rows, column_types(rows))
    energy = store.energy()
    if energy and energy["cells"]:
        cells = [{"meter": energy.get("meter"), "device": energy.get("device"), **cell} for cell in energy["cells"]]
        _create(connection, "energy", cells, column_types(cells, stated={}))
    connection.execute("SET enable_external_access = false; SET lock_configuration = true")
    return connection


def table_of(rows: Sequence[Row]) -> duckdb.DuckDBPyRelation:
    """Rows as a relation ``runs`` of a database in memory, with the types of ``runs.parquet``."""
    connection = _open()
    _create(connection, "runs", rows, column_types(rows))
    return connection.table("runs")


def _open() -> duckdb.DuckDBPyConnection:
    import duckdb

    connection = duckdb.connect()
    # Without a place to spill to, a query that is too large fails, where it would write beside the user's files.
    connection.execute("SET temp_directory = ''; SET autoinstall_known_extensions = false")
    connection.execute("SET python_enable_replacements = false")
    return connection


def _create(connection: duckdb.DuckDBPyConnection, name: str, rows: Sequence[Row], types: dict[str, str]) -> None:
    import numpy as np

    lines = np.array([json.dumps(jsonable(row)) for row in rows], dtype=object)
    connection.register("lines", {"line": lines})
    structure = json.dumps(types)
    connection.execute(f"CREATE TABLE {name} AS SELECT unnest(from_json(line, ?)) FROM lines", [structure])
    connection.unregister("lines")


def _is_current(store: RunStore) -> bool:
    """Whether the parquet has every row of ``runs.jsonl``: no older than what it is made from, and as many rows."""
    import duckdb

    sources = [path for path in (store.path, store.energy_path) if path.exists()]
    if not store.parquet.exists() or any(p.stat().st_mtime_ns > store.parquet.stat().st_mtime_ns for p in sources):
        return False
    try:
        # Not the default connection, which belongs to whoever calls.
        with duckdb.connect() as connection:
            [found] = connection.execute("SELECT count(*) FROM read_parquet(?)", [str(store.parquet)]).fetchall()
    except duckdb.Error:
        return False
    if not store.path.exists():
        return True
    with store.path.open("rb") as file:
        lines = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    return int(found[0]) == lines


def plain(value: object) -> object:
    """A value of DuckDB's as JSON has it."""
    if isinstance(value, decimal.Decimal):
        return float(value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, datetime.date | datetime.time | datetime.datetime):
        return value.isoformat()
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)


def _shown(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value) if isinstance(value, list | dict) else str(value)


def _cut(text: str) -> str:
    line = " ".join(text.splitlines())
    return line if len(line) <= MOST_WIDE else line[: MOST_WIDE - 1] + "…"
