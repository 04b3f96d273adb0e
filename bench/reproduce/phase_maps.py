"""Phase grids: ours gathered from rows, best seed per cell by two rules, the published ones, and the paper's colours.

A feature counts as ignored in an expert where ‖W_n‖ < 1/2 and as superposed where ‖W_n‖ ≥ 1/2 and its score passes
1/4: with these, the three stored grids give every published fraction to its last digit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt

from moesaic.bench.plan import Row
from moesaic.bench.reproduce.phase_plan import PANELS, Array, Panel, last_feature, panel_of

IGNORED_NORM, SUPERPOSED_SCORE = 0.5, 0.25
STORED = tuple(panel for panel in PANELS if panel in ((2, 1, 1), (2, 1, 2), (3, 2, 2)))
"""Panels whose published grids ship with the package."""
RULES = ("held_out", "last_batch")
"""Best seed by held-out reconstruction loss, or the paper's way: by the final training batch, load balance included."""


@dataclass(frozen=True)
class PhaseGrid:
    """One panel on A sparsities × B importances, a model per cell; NaN where there is none.

    Args:
        panel: (n, m, E).
        sparsity: (A,) S = 1 − p.
        importance: (B,) of the last feature.
        last_batch: (A, B) loss of the final training batch, load-balance term included.
        norm: (A, B, E) ‖W_n‖.
        score: (A, B, E) Σ_{j<n} (Ŵ_n·W_j)².
        fro2: (A, B, E) ‖W‖_F²/m.
        held_out: (A, B) reconstruction loss on held-out samples; NaN in the published grids, like the next two.
        load_balance: (A, B) load-balance term on held-out samples.
        usage: (A, B, E) share of held-out samples.
    """

    panel: Panel
    sparsity: Array
    importance: Array
    last_batch: Array
    norm: Array
    score: Array
    fro2: Array
    held_out: Array
    load_balance: Array
    usage: Array

    @property
    def ignored(self) -> Array:
        """(E,) share of cells in which the last feature is ignored by the expert."""
        return _share(self.phase == 0, self.norm)

    @property
    def superposed(self) -> Array:
        """(E,) share of cells in which the expert stores the last feature in superposition."""
        return _share(self.phase == 2, self.norm)

    @property
    def phase(self) -> npt.NDArray[np.int64]:
        """(A, B, E): 0 ignored, 1 stored alone, 2 stored in superposition."""
        stored = self.norm >= IGNORED_NORM
        return stored.astype(np.int64) + (stored & (self.score > SUPERPOSED_SCORE))

    def sorted_by(self, key: str) -> PhaseGrid:
        """The experts of each cell in falling order of a column; equal ones stay as they are."""
        order = np.argsort(-getattr(self, key), axis=-1, kind="stable")
        columns = ("norm", "score", "fro2", "usage")
        moved: dict[str, Any] = {name: np.take_along_axis(getattr(self, name), order, axis=-1) for name in columns}
        return replace(self, **moved)

    def at(self, sparsity: Array, importance: Array) -> PhaseGrid:
        """The same cells as another grid.

        Raises:
            ValueError: a value that this grid does not have.
        """
        rows, columns = _index(self.sparsity, sparsity), _index(self.importance, importance)
        cut = self.map(lambda values: values[np.ix_(rows, columns)])
        return replace(cut, sparsity=self.sparsity[rows], importance=self.importance[columns])

    def map(self, change: Callable[[Array], Array]) -> PhaseGrid:
        """The same panel and axes with every other array changed by one function."""
        names = (f.name for f in fields(self) if f.name not in ("panel", *_AXES))
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in names}
        return replace(self, **changed)


_AXES = ("sparsity", "importance")


def _index(have: Array, wanted: Array) -> list[int]:
    where = {round(float(value), 6): i for i, value in enumerate(have)}
    missing = [float(value) for value in wanted if round(float(value), 6) not in where]
    if missing:
        raise ValueError(f"cells at {missing}: takes values of the stored grid, {have[0]:g} to {have[-1]:g}")
    return [where[round(float(value), 6)] for value in wanted]


def _share(hit: Any, known: Array) -> Array:
    cells = np.isfinite(known)
    return np.asarray((hit & cells).sum((0, 1)) / np.maximum(cells.sum((0, 1)), 1), dtype=np.float64)


def box(values: Array) -> tuple[float, float, float, float, float]:
    """Minimum, quartiles and maximum (linear interpolation, as published) of the finite values; NaN of none."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return (np.nan,) * 5
    low, q1, median, q3, high = np.quantile(finite, (0, 0.25, 0.5, 0.75, 1)).tolist()
    return low, q1, median, q3, high


@dataclass(frozen=True)
class PhaseSeeds:
    """The same as `PhaseGrid` before a seed is chosen: every array has an axis of ``count`` seeds in front."""

    grid: PhaseGrid
    count: int

    def best(self, rule: str, without: int | None = None) -> PhaseGrid:
        """The seed with the lowest loss in each cell, by one of `RULES`; ``without`` leaves the i-th seed out."""
        judged = np.where(np.isfinite(loss := getattr(self.grid, rule)), loss, np.inf)
        if without is not None:
            judged[without] = np.inf
        chosen = judged.argmin(0)[None]
        absent = ~np.isfinite(np.take_along_axis(judged, chosen, 0)[0])

        def take(values: Array) -> Array:
            index = chosen if values.ndim == 3 else chosen[..., None]
            taken: Array = np.take_along_axis(values, index, 0)[0]
            return np.where(absent if taken.ndim == 2 else absent[..., None], np.nan, taken)

        return self.grid.map(take)

    def one(self, index: int) -> PhaseGrid:
        """The i-th seed alone."""
        return self.grid.map(lambda values: values[index])


def gather(rows: Sequence[Row]) -> dict[Panel, PhaseSeeds]:
    """The finished rows by panel, in the order of `PANELS`; the axes are the values that any row has."""
    by_panel: dict[Panel, list[Mapping[str, Any]]] = {panel: [] for panel in PANELS}
    for row in rows:
        if row.get("status") == "ok" and (panel := panel_of(row)) in by_panel:
            by_panel[panel].append(row)
    return {panel: _gather(panel, mine) for panel, mine in by_panel.items() if mine}


def _gather(panel: Panel, rows: Sequence[Mapping[str, Any]]) -> PhaseSeeds:
    def axis(name: str) -> tuple[Any, Any]:
        return np.unique([row[name] for row in rows], return_inverse=True)

    rows = sorted(rows, key=lambda row: row["seed"])
    (p, i), (importance, j) = map(axis, ("feature_probability", "importance_base"))
    taken = np.zeros((len(p), len(importance)), dtype=np.int64)
    s = np.empty(len(rows), dtype=np.int64)
    for at, cell in enumerate(zip(i, j, strict=True)):
        s[at] = taken[cell]
        taken[cell] += 1
    shape = (int(taken.max()), *taken.shape)

    def cells(name: str, *experts: int) -> Array:
        values = np.full((*shape, *experts), np.nan)
        values[s, len(p) - 1 - i, j] = np.array([row[name] for row in rows], dtype=np.float64)
        return values

    n_experts = panel[2]
    grid = PhaseGrid(
        panel=panel,
        sparsity=np.round(1 - p[::-1], 6),
        importance=importance,
        last_batch=cells("last_batch_loss") + cells("last_batch_load_balance"),
        norm=cells("last_feature_norm", n_experts),
        score=cells("last_feature_superposition", n_experts),
        fro2=cells("fro2_over_m", n_experts),
        held_out=cells("loss"),
        load_balance=cells("load_balance_loss"),
        usage=cells("usage", n_experts),
    )
    return PhaseSeeds(grid, shape[0])


def published(panel: Panel) -> PhaseGrid:
    """The published grid of one of the panels `STORED`, experts in their stored order.

    Raises:
        ValueError: a panel that is not stored.
    """
    if panel not in STORED:
        raise ValueError(f"panel={panel!r}: takes one of {', '.join(map(str, STORED))}")
    name = "".join(map(str, panel))
    with resources.files(__package__).joinpath("phase_grids.npz").open("rb") as file, np.load(file) as stored:
        sparsity, importance = (stored[axis].astype(np.float64) for axis in _AXES)
        losses, weights = (stored[f"{kind}_{name}"].astype(np.float64) for kind in ("losses", "weights"))
    norm, score, fro2 = last_feature(weights)
    unknown = np.full_like(losses, np.nan)
    return PhaseGrid(
        panel, sparsity, importance, losses, norm, score, fro2, unknown, unknown, np.full_like(norm, np.nan)
    )  # fmt: skip


def colour(norm: Array, score: Array) -> Array:
    """The paper's colour (…, 3) of y = norm and x = score, both scaled to 0 … 1: r = yx+1−y, g = 1−y, b = y(1−x)+1−y.

    White is ignored, blue stored alone, red stored in superposition. Values above 1 count as 1; NaN stays NaN.
    """
    y, x = np.clip(norm, 0, 1), np.clip(score, 0, 1)
    return np.stack([y * x + 1 - y, 1 - y, y * (1 - x) + 1 - y], axis=-1)
