"""The run folder: an append-only ``runs.jsonl`` that survives a kill at any byte, and the parquet made from it.

``runs.jsonl`` holds one JSON row per trained model. Rows arrive in one ``write`` of whole lines on a descriptor opened
with ``O_APPEND``, followed by ``fsync``; what a kill leaves behind is therefore whole lines and at most one torn one at
the end, which reading ignores and the next append cuts off. ``runs.parquet`` and ``environment.json`` are replaced
whole. ``energy.json``, where a sweep was measured, fills the joule columns of the rows whenever they are read.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from moesaic.bench.models import path_of, take_out
from moesaic.bench.plan import InputError, Row

TIME_COLUMNS = ("wall_s", "started_at", "gpu_board_j", "cpu_package_j")
"""The measured columns: the only ones in which an interrupted and resumed sweep may differ from an undisturbed one."""
ENERGY_FILE = "energy.json"
SPEC_FILE = "spec.toml"

RESULT_COLUMNS: dict[str, str] = {
    **dict.fromkeys(("trained_by", "device"), "VARCHAR"),
    **dict.fromkeys(("loss", "load_balance_loss", "train_loss", "unexplained_variance"), "DOUBLE"),
    **dict.fromkeys(
        ("features_per_dimension", "features_per_dimension_gate", "features_per_dimension_folded"), "DOUBLE"
    ),
    **dict.fromkeys(("mean_dimensionality", "represented_share", "superposition", "monosemantic_share"), "DOUBLE"),
    "dead_features": "BIGINT",
    "usage": "DOUBLE[]",
    "effective_experts": "DOUBLE",
    "dead_experts": "BIGINT",
    "load_imbalance": "DOUBLE",
    "dimensionality_histogram": "BIGINT[]",
    **dict.fromkeys(("active_flops", "executed_flops", "dense_flops", "bytes"), "BIGINT"),
    **dict.fromkeys(("parameters", "active_parameters", "total_width", "active_width"), "BIGINT"),
    **dict.fromkeys(("wall_s", "gpu_board_j", "cpu_package_j"), "DOUBLE"),
    "started_at": "VARCHAR",
}
"""Measured columns and their DuckDB types."""


def columns() -> dict[str, str]:
    """The columns of every parquet, in order, with their DuckDB types; other keys of rows follow alphabetically.

    Stating the types keeps a column that happens to be null, or whole, in one sweep of the same type as in the next.
    """
    from moesaic.moe.config import FeatureConfig, ToyConfig, TrainConfig

    types = {"int": "BIGINT", "float": "DOUBLE", "str": "VARCHAR", "bool": "BOOLEAN"}
    configuration = {
        f.name: types[str(f.type)] for part in (ToyConfig, FeatureConfig, TrainConfig) for f in fields(part)
    }
    return {
        **dict.fromkeys(("run_key", "status", "error", "stage"), "VARCHAR"),
        **configuration,
        "seed": "BIGINT",
        **RESULT_COLUMNS,
    }


class StoreError(OSError):
    """The run folder takes no more rows, because the disk is full, say; what was written before is whole."""


_AS_THEY_ARE = (str, bool, int)


class RunStore:
    """Reads and appends the rows of one run folder; opening one writes nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / "runs.jsonl"
        self.parquet = self.folder / "runs.parquet"
        self.environment_path = self.folder / "environment.json"
        self.energy_path = self.folder / ENERGY_FILE
        self._known: dict[str, Row] | None = None
        self._whole = 0  # bytes of whole rows
        self._size = 0  # bytes in all, a torn last line included

    def rows(self) -> list[Row]:
        """Every row once, in the order they were appended, with the joules that were measured after the sweep.

        Raises:
            InputError: a line before the last is no JSON row, so the file was damaged by something else than a kill.
        """
        rows, record = self._load(), self.energy()
        if record is None:
            return list(rows.values())
        joules = _energy_columns(record)
        return [{**row, **joules[key]} if key in joules else row for key, row in rows.items()]

    def energy(self) -> dict[str, Any] | None:
        """What ``energy.json`` holds (see `moesaic.bench.sweep_energy`), None where nothing was measured.

        Raises:
            InputError: the file is damaged.
        """
        path = self.energy_path
        if not path.exists():
            return None
        try:
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            _energy_columns(record)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged; remove it and measure again: {error}") from error
        return record

    def keys(self) -> set[str]:
        """The ``run_key`` of every row."""
        return set(self._load())

    def append(self, rows: Iterable[Mapping[str, object]]) -> list[Row]:
        """Writes the rows whose ``run_key`` is new, all or none of them, and returns them as they read back.

        Non-finite numbers become null; tensors and arrays become lists. A model that is to be kept goes into a file of
        its own, before its row.

        Raises:
            KeyError: a row has no ``run_key``.
            StoreError: the disk did not take all of the lines; what it took is cut off again.
        """
        known = self._load()
        new: dict[str, Row] = {}
        for row in rows:
            key = str(row["run_key"])
            if key not in known and key not in new:
                row = self._without_model(row)
                new[key] = {name: jsonable(value) for name, value in row.items()}
        if not new:
            return []
        lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in new.values()).encode()
        # An interrupt between the write and the bookkeeping below must not leave memory behind the disk: forget first.
        self._known = None
        self._write(lines)
        known.update(new)
        self._known = known
        return list(new.values())

    def finish(self, order: Sequence[str] = ()) -> Path:
        """Writes ``runs.parquet`` from the rows and returns its path.

        Rows come in the order of the run keys in ``order``, then the others by run key, so the file does not depend on
        the order in which the runs happened to finish.

        Raises:
            StoreError: the disk did not take the file; an older one stays as it was.
        """
        rank = {key: i for i, key in enumerate(order)}
        rows = sorted(self.rows(), key=lambda row: (rank.get(str(row["run_key"]), len(rank)), str(row["run_key"])))
        import duckdb

        try:
            write_parquet(rows, self.parquet)
        except (OSError, duckdb.IOException) as error:
            raise self._full(self.parquet, error) from error
        return self.parquet

    def environment(self) -> dict[str, object] | None:
        """What `write_environment` wrote, or None.

        Raises:
            InputError: the file is not a JSON object, so it was damaged or written by something else.
        """
        if not self.environment_path.exists():
            return None
        try:
            loaded = json.loads(self.environment_path.read_text())
        except ValueError as error:
            raise InputError(f"{self.environment_path} is not JSON: {error}") from error
        if not isinstance(loaded, dict):
            kind = type(loaded).__name__
            raise InputError(f"{self.environment_path} holds a JSON {kind} where a sweep writes an object")
        return loaded

    def write_environment(self, environment: Mapping[str, object]) -> None:
        """Replaces ``environment.json`` whole."""
        text = json.dumps(jsonable(dict(environment)), indent=2, ensure_ascii=False) + "\n"
        replace_file(self.environment_path, lambda path: path.write_text(text))

    def write_spec(self, text: str) -> None:
        """Writes ``spec.toml``, what the runs were planned from.

        Raises:
            StoreError: the disk did not take it.
        """
        path = self.folder / SPEC_FILE
        try:
            replace_file(path, lambda new: new.write_text(text, encoding="utf-8"))
        except OSError as error:
            raise self._full(path, error) from error

    def _load(self) -> dict[str, Row]:
        if self._known is None:
            self._known, self._whole, self._size = read_rows(self.path)
        return self._known

    def _without_model(self, row: Mapping[str, object]) -> Row:
        plain, model = take_out(row)
        if model is not None:
            path = path_of(self.folder, str(row["run_key"]))
            try:
                path.parent.mkdir(exist_ok=True)
                replace_file(path, lambda new: new.write_bytes(model))
            except OSError as error:
                raise self._full(path, error) from error
        return plain

    def _write(self, lines: bytes) -> None:
        created = not self.path.exists()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            if os.fstat(descriptor).st_size != self._size:
                raise InputError(f"{self.path} changed while this sweep was running: is a second one writing to it?")
            if self._size > self._whole:
                os.ftruncate(descriptor, self._whole)
            written = os.write(descriptor, lines)
            if written != len(lines):
                raise OSError(errno.ENOSPC, "only part of the rows could be written")
            os.fsync(descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):  # else the next one to append cuts a torn line off
                os.ftruncate(descriptor, self._whole)
            raise self._full(self.path, error) from error
        finally:
            os.close(descriptor)
        if created:
            sync_folder(self.folder)
        self._whole = self._size = self._whole + len(lines)

    def _full(self, path: Path, error: Exception) -> StoreError:
        words = getattr(error, "strerror", None) or error
        return StoreError(f"{path}: {words}; the rows before are safe: make room, then continue with --resume")


def _energy_columns(record: Mapping[str, Any]) -> dict[str, Row]:
    """By run key, the joule column that ``energy.json`` fills: the mean over trials, of valid cells alone."""
    return {
        key: {f"{record['meter']}_j": math.fsum(cell["joules_per_run"]) / len(cell["joules_per_run"])}
        for cell in record["cells"]
        if cell["valid"]
        for key in cell["run_keys"]
    }


def read_rows(path: Path) -> tuple[dict[str, Row], int, int]:
    """The rows of a ``runs.jsonl`` by run key (the first of each), the bytes of whole rows, and the bytes in all.

    Raises:
        InputError: a line before the last is no JSON row.
    """
    rows: dict[str, Row] = {}
    whole = 0
    if not path.exists():
        return rows, 0, 0
    size = path.stat().st_size
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
                # Interned, as each row would otherwise hold column names of its own, half of its memory.
                rows.setdefault(row["run_key"], {sys.intern(name): value for name, value in row.items()})
            except (ValueError, KeyError, TypeError) as error:
                # A crash of the whole machine can leave the last line with its newline but without its content.
                if whole + len(line) == size:
                    break
                raise InputError(f"{path}: line {number} is not a row; repair or remove that line") from error
            whole += len(line)
    return rows, whole, size


def jsonable(value: object) -> object:
    """``value`` as JSON can hold it: arrays and tensors as lists, NaN and infinities as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, _AS_THEY_ARE):
        return value
    if isinstance(value, list) and set(map(type, value)) == {int}:  # a histogram, longer than all other columns
        return value.copy()
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    to_list = getattr(value, "tolist", None)
    if to_list is None:
        raise TypeError(f"a row cannot hold a {type(value).__name__}: {value!r}")
    return jsonable(to_list())


def column_types(rows: Sequence[Row], stated: Mapping[str, str] | None = None) -> dict[str, str]:
    """DuckDB's type of every column of ``rows``: the ``stated`` ones first, by default `columns`, then by name."""
    stated = columns() if stated is None else stated
    types = dict(stated)
    for row in rows:
        for name, value in row.items():
            kind = _type_of(value)
            if types.get(name) != kind:
                types[name] = _join(types.get(name, ""), kind)
    return {name: _settled(types[name]) for name in [*stated, *sorted(types.keys() - stated.keys())]}


def write_parquet(rows: Sequence[Row], target: Path) -> None:
    """Writes ``rows`` in the given order to ``target`` with `columns` first; replaces the file whole."""
    import duckdb

    struct = ", ".join(f"{_quote(name)}: {_quote(kind)}" for name, kind in column_types(rows).items())
    source = target.with_name(f".{target.name}.rows")

    def write_lines() -> int:
        """Writes the rows to ``source`` and returns the bytes of the longest line."""
        longest = 0
        with source.open("w") as file:
            for row in rows:
                longest = max(longest, file.write(json.dumps(row) + "\n"))
        return longest

    def copy(path: Path) -> None:
        # One thread: the bytes of the file must depend on the rows alone.
        with duckdb.connect(config={"threads": 1, "autoinstall_known_extensions": False}) as connection:
            connection.execute(
                f"COPY (SELECT * FROM read_json({_quote(str(source))}, format='newline_delimited', "
                f"maximum_object_size={longest + 1024}, columns={{{struct}}})) TO {_quote(str(path))} (FORMAT parquet)"
            )

    try:
        longest = write_lines()
        replace_file(target, copy)
    finally:
        source.unlink(missing_ok=True)


def replace_file(target: Path, write: Callable[[Path], object]) -> None:
    """Lets ``write`` make a new file beside ``target`` and puts it in its place: readers see the old one or the new.

    The temporary name is fixed, so that what a kill leaves behind is taken over by the next writer.
    """
    temporary = target.with_name(f".{target.name}.new")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Makes a new or renamed entry of ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _type_of(value: object) -> str:
    """The DuckDB type of a JSON value; "" where it is not known yet (null, or the items of an empty list)."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "BOOLEAN"
    if isinstance(value, int):
        return "BIGINT" if -(2**63) <= value < 2**63 else "DOUBLE"
    if isinstance(value, float):
        return "DOUBLE"
    if isinstance(value, str):
        return "VARCHAR"
    if isinstance(value, list):
        if set(map(type, value)) == {int}:
            return _join(_type_of(min(value)), _type_of(max(value))) + "[]"
        inner = ""
        for item in value:
            inner = _join(inner, _type_of(item))
        return inner + "[]"
    return "JSON"


def _join(a: str, b: str) -> str:
    """The narrowest type that holds values of both."""
    if a == b or not b:
        return a
    if not a:
        return b
    if {a, b} == {"BIGINT", "DOUBLE"}:
        return "DOUBLE"
    if a.endswith("[]") and b.endswith("[]"):
        return _join(a[:-2], b[:-2]) + "[]"
    return "JSON"


def _settled(kind: str) -> str:
    """A type with its unknown part, if any, read as text."""
    return kind if kind.rstrip("[]") else "VARCHAR" + kind


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
