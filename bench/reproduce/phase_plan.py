"""What `moesaic reproduce phase` and `moesaic sweep phase` train, and the columns they add to a row.

The eight panels of arXiv 2510.23671, figure 4: models (n, m, E) with k = 1 on 39 feature sparsities S = 1 − p times 58
importances of the last feature; the other features have importance 1. Ten seeds make 8 · 2,262 · 10 = 180,960 models.

Every cell has seeds of its own, as published: there, cells that did not find the best optimum lie scattered. With
seeds common to all cells they are whole regions of the map, and statistics over the cells are those of ten draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moesaic.bench.plan import PlannedRun, Row, Stage
from moesaic.bench.sweep import StackPreset

if TYPE_CHECKING:
    from moesaic.moe import Run, TrainResult

Array = npt.NDArray[np.float64]
Panel = tuple[int, int, int]

PANELS: tuple[Panel, ...] = (
    (2, 1, 1), (2, 1, 2), (3, 1, 1), (3, 1, 2), (3, 1, 3), (3, 2, 1), (3, 2, 2), (3, 2, 3),
)  # fmt: skip
"""(n, m, E) of each panel."""
SPARSITIES = tuple(round(0.025 * (i + 1), 3) for i in range(39))
IMPORTANCES = tuple(round(0.1 + 0.05 * j, 2) for j in range(58))
SEEDS, QUICK_SEEDS = 10, 1
QUICK_STRIDE = {"sparsity": slice(1, None, 3), "importance": slice(0, None, 4)}
"""``--quick`` takes 13 of the 39 sparsities, 0.05 … 0.95, and 15 of the 58 importances, 0.1 … 2.9."""
MAX_MODELS = len(SPARSITIES) * len(IMPORTANCES)
"""One stack is one panel with one seed per cell."""


def panel_name(panel: Panel) -> str:
    """``(2,1,1)``, as tables and labels have it."""
    return f"({','.join(map(str, panel))})"


def grid(quick: bool) -> list[tuple[int, float, float]]:
    """(place in the full grid, sparsity, importance) of every cell, sparsity by sparsity."""
    every = slice(None)
    rows, columns = (QUICK_STRIDE[axis] if quick else every for axis in ("sparsity", "importance"))
    width = len(IMPORTANCES)
    return [
        (i * width + j, SPARSITIES[i], IMPORTANCES[j])
        for i in range(len(SPARSITIES))[rows]
        for j in range(width)[columns]
    ]


def plan(quick: bool, seeds: int) -> list[Run]:
    """Every run; all panels with one seed per cell come before the next seed of any.

    The i-th seed of a cell is i · 2,262 + its place in the full grid, so the runs of ``quick`` are runs of the full
    plan.
    """
    from moesaic.moe import FeatureConfig, Run, ToyConfig, TrainConfig

    training = TrainConfig(steps=5000, batch_size=512, load_balance=0.01)
    toys = [ToyConfig(n, m, n_experts=n_experts) for n, m, n_experts in PANELS]
    cells = [
        # 1 − S, rounded, so that equal cells have equal keys whichever way S was written.
        (place, FeatureConfig(feature_probability=round(1 - s, 3), importance="last", importance_base=importance))
        for place, s, importance in grid(quick)
    ]
    return [
        Run(toy, cell, training, i * MAX_MODELS + place) for i in range(seeds) for toy in toys for place, cell in cells
    ]


def last_feature(weight: npt.ArrayLike) -> tuple[Array, Array, Array]:
    """‖W_n‖, Σ_{j<n} (Ŵ_n·W_j)² and ‖W‖_F²/m of each expert, n the last feature, from weights (…, E, n, m).

    The score of a zero row is 0. Each of the three is (…, E).
    """
    w = np.asarray(weight, dtype=np.float64)
    last, others = w[..., -1, :], w[..., :-1, :]
    norm = np.linalg.norm(last, axis=-1)
    unit = last / np.where(norm > 0, norm, 1.0)[..., None]
    score = np.square(np.einsum("...m,...jm->...j", unit, others)).sum(-1)
    return norm, score, np.square(w).sum((-1, -2)) / w.shape[-1]


def columns(result: TrainResult, runs: Sequence[Run]) -> list[Row]:
    """Extra columns of a stack: three lists over experts in stored order, and the two losses of the final batch.

    ``last_batch_loss`` is the reconstruction loss of the last training batch, before its update, and
    ``last_batch_load_balance`` its load-balance term, coefficient included.
    """
    geometry = last_feature(result.model.weight.detach().cpu().numpy())
    final = [losses[:, -1].tolist() for losses in (result.losses, result.load_balance_losses)]
    names = (
        "last_feature_norm", "last_feature_superposition", "fro2_over_m", "last_batch_loss", "last_batch_load_balance",
    )  # fmt: skip
    values = zip(*(part.tolist() for part in geometry), *final, strict=True)
    return [dict(zip(names, row, strict=True)) for row in values]


def _stages(quick: bool, seeds: int | None) -> list[Stage]:
    count = seeds if seeds is not None else QUICK_SEEDS if quick else SEEDS
    labels = {panel: {"stage": "main", "panel": panel_name(panel)} for panel in PANELS}

    def main(_: list[Row]) -> list[PlannedRun]:
        found = plan(quick, count)
        return [PlannedRun(run, labels[run.toy.n_features, run.toy.n_hidden, run.toy.n_experts]) for run in found]

    return [main]


PHASE = StackPreset(
    "phase",
    "phase diagrams of the last feature: eight panels (n, m, E), 39 sparsities × 58 importances",
    _stages,
    columns=columns,
    max_models=MAX_MODELS,
)


def is_phase(rows: Sequence[Row]) -> bool:
    """Whether a folder's rows are those of a phase diagram, of a sweep or of a reproduction."""
    return any("last_feature_norm" in row for row in rows)


def panel_of(row: dict[str, Any]) -> Panel:
    """(n, m, E) of a row."""
    return row["n_features"], row["n_hidden"], row["n_experts"]
