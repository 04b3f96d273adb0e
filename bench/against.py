"""Two run folders side by side, ``moesaic report A --against B``: equal configurations, paired by seed.

A cell is a configuration without its seed. Of a cell that both folders have, loss and mean D_i are compared by the
t-interval of A minus B over the seeds that finished in both; a folder's own runs and machine never enter the other's.
Tuning runs are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from moesaic.bench.analysis import CONFIDENCE, DIMENSIONALITY, LOSS, Cell, Estimate, labelled, number, paired
from moesaic.bench.plan import InputError, Row
from moesaic.bench.report_page import Column, escape, page, table
from moesaic.bench.store import RunStore
from moesaic.bench.words import interval
from moesaic.moe.config import FeatureConfig, Run, ToyConfig, TrainConfig

PAGE = "report-against.html"
MOST_LINES = 200
"""Most cells in a table of the page; the JSON has all."""
_COLUMNS = tuple(f.name for kind in (ToyConfig, FeatureConfig, TrainConfig) for f in fields(kind))
_LATER = Run().flat()
"""What a row has that was written before a field existed."""
_NOT_THE_MACHINE = {"argv", "command", "started", "ended", "resumed", "plan_hash", "preset", "spec", "quick", "seeds"}


@dataclass(frozen=True)
class CellDifference:
    """One configuration in both folders; differences are A minus B.

    Args:
        dataset: its data in words.
        architecture: its model in words, with what else varies.
        seeds: that finished in both.
        loss: of the unexplained variance.
        dimensionality: of mean D_i.
        wall_ratio: seconds of A over seconds of B, means over these seeds; NaN where one was not measured.
        equal: whether loss and mean D_i are the same numbers for every seed.
    """

    dataset: str
    architecture: str
    seeds: int
    loss: Estimate
    dimensionality: Estimate
    wall_ratio: float
    equal: bool

    @property
    def verdict(self) -> str:
        """``A`` or ``B`` where its loss is lower beyond the interval, else ``equal`` or ``not resolved``."""
        if self.equal:
            return "equal"
        return ("A" if self.loss.mean < 0 else "B") if self.loss.excludes_zero else "not resolved"


@dataclass(frozen=True)
class Side:
    """What only one folder has."""

    cells: list[str]
    runs: int
    failed: int


@dataclass(frozen=True)
class Against:
    """What `compare_folders` found."""

    folders: tuple[Path, Path]
    cells: list[CellDifference]
    no_common_seed: list[str]
    only: tuple[Side, Side]
    environment: dict[str, tuple[object, object]]

    def record(self) -> dict[str, object]:
        """The comparison as one JSON object."""
        return {
            "a": self.folders[0], "b": self.folders[1], "cells": [
                {**asdict(cell), "verdict": cell.verdict} for cell in self.cells
            ],
            "no_common_seed": self.no_common_seed, "only_a": asdict(self.only[0]), "only_b": asdict(self.only[1]),
            "environment": {name: {"a": a, "b": b} for name, (a, b) in self.environment.items()},
        }  # fmt: skip

    def text(self) -> str:
        """The same in some lines."""
        lines = [f"A = {self.folders[0]}, B = {self.folders[1]}", self.summary()]
        if self.no_common_seed:
            lines.append(f"{_count(len(self.no_common_seed), 'configuration')} in both without a common seed")
        for name, side in zip("AB", self.only, strict=True):
            if side.runs:
                lines.append(f"only {name} has {_count(side.runs, 'run')}, {len(side.cells)} configurations among them")
        lines.append("environment: " + ("; ".join(self._differences()) or "no difference"))
        return "\n".join(lines)

    def summary(self) -> str:
        """How many cells both have, who has the lower loss, and the ratio of times."""
        if not self.cells:
            return "no configuration with a seed that finished in both"
        verdicts = [cell.verdict for cell in self.cells]
        ratios = [math.log(cell.wall_ratio) for cell in self.cells if cell.wall_ratio > 0]
        mean = f"; wall time A / B {math.exp(math.fsum(ratios) / len(ratios)):.3g}, geometric mean" if ratios else ""
        return (
            f"{_count(len(self.cells), 'configuration')} in both: {verdicts.count('equal')} equal to the last bit, "
            f"{verdicts.count('A')} with the lower loss in A, {verdicts.count('B')} in B, "
            f"{verdicts.count('not resolved')} not resolved{mean}"
        )

    def _differences(self) -> list[str]:
        return [f"{name}: {a!r} in A, {b!r} in B" for name, (a, b) in self.environment.items()]


def compare_folders(a: Path, b: Path) -> Against:
    """Compare the rows of two run folders.

    Raises:
        InputError: one holds no rows, a damaged file, or both are one folder.
    """
    stores = RunStore(a), RunStore(b)
    if stores[0].folder.resolve() == stores[1].folder.resolve():
        raise InputError(f"report {a}: --against takes another folder")
    rows = [store.rows() for store in stores]
    for store, found in zip(stores, rows, strict=True):
        if not found:
            raise InputError(f"report {store.folder}: no runs.jsonl with rows in it")
    # A tuning run is on a seed of its own: it is no repetition of a result, and its configuration is often no result.
    rows = [[row for row in found if row.get("stage") != "tune"] for found in rows]
    finished = [[row for row in found if row.get("status") == "ok"] for found in rows]
    # Named together, so that both folders give a configuration one name.
    named = labelled([{**row, "dataset": None, "architecture": None} for found in finished for row in found])
    first, second = (_cells(part) for part in (named[: len(finished[0])], named[len(finished[0]) :]))
    both = [_difference(first[key], second[key]) for key in first if key in second]
    environments = [store.environment() or {} for store in stores]
    return Against(
        (stores[0].folder, stores[1].folder),
        [cell for cell in both if cell.seeds],
        [f"{cell.architecture} on {cell.dataset}" for cell in both if not cell.seeds],
        (_only(first, second, rows[0], rows[1]), _only(second, first, rows[1], rows[0])),
        _environment(environments[0], environments[1]),
    )


def _cells(rows: Sequence[Row]) -> dict[tuple[object, ...], Cell]:
    found: dict[tuple[object, ...], dict[int, Row]] = {}
    for row in rows:
        key = tuple(row.get(name, _LATER[name]) for name in _COLUMNS)
        found.setdefault(key, {}).setdefault(int(number(row, "seed") or 0), row)
    return {
        key: Cell(str((rows := tuple(by_seed.values()))[0]["dataset"]), str(rows[0]["architecture"]), rows)
        for key, by_seed in found.items()
    }


def _difference(a: Cell, b: Cell) -> CellDifference:
    common = a.seeds(LOSS).keys() & b.seeds(LOSS).keys()
    walls = [math.fsum(s for seed, s in cell.seeds("wall_s").items() if seed in common) for cell in (a, b)]
    timed = all(common <= cell.seeds("wall_s").keys() for cell in (a, b)) and walls[1] > 0
    equal = all(
        {s: v for s, v in a.seeds(key).items() if s in common} == {s: v for s, v in b.seeds(key).items() if s in common}
        for key in (LOSS, DIMENSIONALITY)
    )
    return CellDifference(
        a.dataset, a.architecture, len(common), paired(a, b, LOSS), paired(a, b, DIMENSIONALITY),
        walls[0] / walls[1] if timed else math.nan, equal,
    )  # fmt: skip


def _only(
    mine: Mapping[Any, Cell], others: Mapping[Any, Cell], my_rows: Sequence[Row], other_rows: Sequence[Row]
) -> Side:
    there = {row.get("run_key") for row in other_rows}
    cells = [f"{cell.architecture} on {cell.dataset}" for key, cell in mine.items() if key not in others]
    here = [row for row in my_rows if row.get("run_key") not in there]
    return Side(cells, len(here), sum(row.get("status") != "ok" for row in here))


def _environment(a: Mapping[str, object], b: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    """What differs of machine, versions, device and commit, by name."""
    one, other = (_flat({k: v for k, v in e.items() if k not in _NOT_THE_MACHINE | {"calibration"}}) for e in (a, b))
    return {name: (one.get(name), other.get(name)) for name in {**one, **other} if one.get(name) != other.get(name)}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def write_against(found: Against) -> Path:
    """Write the comparison as a self-contained page into folder A and return its path."""
    a, b = found.folders
    parts = [
        f"<h1>{escape(a.name)} against {escape(b.name)}</h1>",
        f'<p class="soft">A is {escape(a)}, B is {escape(b)}. {escape(found.summary())}.</p>',
        _difference_section(found.cells),
        _list("In both, without a common seed", found.no_common_seed),
        *_only_sections(found.only), _environment_section(found.environment),
    ]  # fmt: skip
    path = a / PAGE
    try:
        path.write_text(page(f"{a.name} against {b.name}", [part for part in parts if part]), encoding="utf-8")
    except OSError as error:
        raise InputError(f"report {a}: {path} cannot be written: {error.strerror or error}") from error
    return path


def _difference_section(cells: Sequence[CellDifference]) -> str:
    if not cells:
        return ""
    columns = [
        Column("data", "text"), Column("architecture", "text"), Column("seeds"), Column("unexplained variance, A − B"),
        Column("lower loss", "text"), Column("mean D_i, A − B"), Column("wall time A / B"),
    ]  # fmt: skip
    lines = [
        (
            cell.dataset, cell.architecture, cell.seeds, interval(cell.loss, 4, signed=True), cell.verdict,
            interval(cell.dimensionality, signed=True),
            "n/a" if math.isnan(cell.wall_ratio) else f"{cell.wall_ratio:.2f}",
        )
        for cell in cells[:MOST_LINES]
    ]  # fmt: skip
    note = (
        f"Means of differences paired by seed ± half-width of the {100 * CONFIDENCE:.0f} % t-interval; one seed gives "
        "no interval. Wall times are as each folder has them, on its machine and under its load."
    )
    more = f" The first {MOST_LINES} of {len(cells)}." if len(cells) > MOST_LINES else ""
    return f"<h2>In both</h2><p>{note}{more}</p>{table(columns, lines)}"


def _only_sections(only: tuple[Side, Side]) -> list[str]:
    parts = []
    for name, side in zip("AB", only, strict=True):
        if not side.runs:
            continue
        text = f"{_count(side.runs, 'run')} ({side.failed} failed), {len(side.cells)} configurations among them."
        parts.append(f"<h2>Only in {name}</h2><p>{text}</p>")
        parts.append(_list(f"Configurations that only {name} has", side.cells))
    return parts


def _list(title: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    items = "".join(f"<li>{escape(name)}</li>\n" for name in names[:MOST_LINES])
    more = f"<li>and {len(names) - MOST_LINES} more</li>" if len(names) > MOST_LINES else ""
    return f"<h2>{escape(title)}</h2><ul>{items}{more}</ul>"


def _environment_section(differences: Mapping[str, tuple[object, object]]) -> str:
    if not differences:
        return "<h2>Environment</h2><p>Machine, device, versions and commit are the same.</p>"
    columns = [Column("key", "text"), Column("A", "long"), Column("B", "long")]
    lines = [(name, *("n/a" if v is None else v for v in pair)) for name, pair in differences.items()]
    return f"<h2>Environment</h2><p>What differs:</p>{table(columns, lines)}"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
