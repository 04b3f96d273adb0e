"""Phase diagrams of the last feature, eight panels (n, m, E) (arXiv 2510.23671, figure 4), against the published ones.

Published are, for six panels, statistics of the 2,262 losses, the mean norm, score and ‖W‖_F²/m of each expert and the
shares of cells in which the last feature is ignored or superposed; for three of them the grids themselves. A published
loss is that of the final training batch with the load-balance term, the best of ten seeds by that very loss, so ours is
taken by the same rule. Judged are the medians. Fewer seeds or a part of the grid have no published medians: then the
stored grids judge the same cells, by a quantile that allows for the number of seeds (`comparable_quantile`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.bench.plan import Row
from moesaic.bench.reproduce.phase_maps import STORED, PhaseGrid, PhaseSeeds, box, gather, published
from moesaic.bench.reproduce.phase_plan import (
    MAX_MODELS,
    QUICK_SEEDS,
    SEEDS,
    Array,
    Panel,
    columns,
    panel_name,
    plan,
)
from moesaic.bench.reproduce.result import Check, Outcome, Reproduction, mean, relative, shown

_BOX = ("minimum", "lower quartile", "median", "upper quartile", "maximum")
_GEOMETRY = {
    "norm": "norm", "score": "superposition score", "fro2": "‖W‖²/m", "ignored": "ignored", "superposed": "superposed",
}  # fmt: skip
CLOSE = 0.05
"""Cells whose losses differ by less than this share are counted as close."""


def comparable_quantile(seeds: int) -> float:
    """The quantile q = s/(s + 10) of ours ÷ published over cells, which is 1 if ours are like the published runs.

    Of s + 10 equally distributed runs of a cell, the best is one of our s, and not one of the ten published, with
    probability q, whatever the distribution: 9.1 % for one seed, the median for ten.
    """
    return seeds / (seeds + SEEDS)


@dataclass(frozen=True)
class Statistics:
    """What is published of a panel: five numbers and mean of its losses, and a list over stored experts of the rest."""

    box: tuple[float, ...]
    mean: float
    norm: list[float]
    score: list[float]
    fro2: list[float]
    ignored: list[float]
    superposed: list[float]

    @classmethod
    def of(cls, grid: PhaseGrid) -> Statistics:
        """The statistics of a grid, by its losses of the final batch."""
        norm, score, fro2 = (
            [_mean(values[..., e]) for e in range(grid.panel[2])] for values in (grid.norm, grid.score, grid.fro2)
        )
        return cls(
            box(grid.last_batch), _mean(grid.last_batch), norm, score, fro2, grid.ignored.tolist(),
            grid.superposed.tolist(),
        )  # fmt: skip

    @classmethod
    def of_targets(cls, panel: Panel, targets: Mapping[str, Any]) -> Statistics | None:
        """The published statistics, None where the panel has none."""
        found = targets["panels"].get("".join(map(str, panel)))
        if found is None:
            return None
        return cls(
            tuple(found["loss_box_min_q1_med_q3_max"]), found["loss_mean"], found["last_feature_norm_mean_per_expert"],
            found["last_feature_offdiag_superposition_mean"], found["fro2_over_m_mean"], found["ignored_frac"],
            found["superposed_frac"],
        )  # fmt: skip


def _mean(values: Array) -> float:
    return mean(values[np.isfinite(values)].tolist())


def checks(found: Mapping[Panel, PhaseSeeds], targets: Mapping[str, Any], quick: bool) -> list[Check]:
    """What is judged first, then the other medians and every other statistic by panel, then cell by cell.

    Without all cells and ten seeds, only panels whose published grids are stored are judged, on the cells of ours.
    """
    judged, medians, others, cell_by_cell = [], [], [], []
    for panel, seeds in found.items():
        ours, name = seeds.best("last_batch"), panel_name(panel)
        theirs = Statistics.of_targets(panel, targets)
        same = published(panel).at(ours.sparsity, ours.importance) if panel in STORED else None
        if quick and same is not None:
            theirs = Statistics.of(same)
        mine = Statistics.of(ours)
        what = f"{name} loss" + (", published on the full grid" if quick and theirs and same is None else "")
        if theirs is not None and not quick and seeds.count == SEEDS:
            allowance = targets["median_allowance"]["dense" if panel[2] == 1 else "moe"]
            judged.append(relative(f"{what}, median", mine.box[2], theirs.box[2], allowance))
        else:
            medians.append(shown(f"{what}, median", mine.box[2], theirs.box[2] if theirs else None))
            if same is not None:
                judged.append(_by_quantile(name, ours, same, seeds.count, targets["quantile_allowance"]))
        others += _statistics(what, mine, theirs)
        others += _experts(panel, mine, theirs, coarse=quick and same is None)
        others += _held_out(name, seeds.best("held_out"))
        if same is not None:
            cell_by_cell += _cells(name, ours, same, seeds.count)
    return judged + medians + others + cell_by_cell


def _by_quantile(name: str, ours: PhaseGrid, theirs: PhaseGrid, seeds: int, allowance: float) -> Check:
    ratio, q = ours.last_batch / theirs.last_batch, comparable_quantile(seeds)
    found = float(np.quantile(ratio[np.isfinite(ratio)], q)) if np.isfinite(ratio).any() else np.nan
    return relative(f"{name} ours / published loss cell by cell, {100 * q:.3g} % quantile", found, 1.0, allowance)


def _statistics(what: str, mine: Statistics, theirs: Statistics | None) -> list[Check]:
    lines = [
        shown(f"{what}, {word}", mine.box[i], theirs.box[i] if theirs else None)
        for i, word in enumerate(_BOX)
        if word != "median"
    ]
    return [*lines, shown(f"{what}, mean", mine.mean, theirs.mean if theirs else None)]


def _held_out(name: str, best: PhaseGrid) -> list[Check]:
    terms = {"reconstruction": best.held_out, "load-balance term": best.load_balance}
    terms["sum"] = best.held_out + best.load_balance
    return [shown(f"{name} held-out {word}, best by reconstruction, median", box(v)[2]) for word, v in terms.items()]


def _experts(panel: Panel, mine: Statistics, theirs: Statistics | None, *, coarse: bool) -> list[Check]:
    """Means over experts, which no order changes; the two shares also by expert, as both programs store them."""
    lines, name = [], panel_name(panel)
    where = ", published on the full grid" if coarse and theirs else ""
    for key, word in _GEOMETRY.items():
        values: list[float] = getattr(mine, key)
        reference: list[float] | None = getattr(theirs, key) if theirs else None
        what = f"{name} last feature, {word}" if key != "fro2" else f"{name} {word}"
        lines.append(shown(what + where, mean(values), mean(reference) if reference else None))
        if key in ("ignored", "superposed") and panel[2] > 1:
            lines += [
                shown(f"{what} by expert {e}{where}", value, reference[e] if reference else None)
                for e, value in enumerate(values)
            ]
    return lines


def _cells(name: str, ours: PhaseGrid, theirs: PhaseGrid, seeds: int) -> list[Check]:
    ratio = (ours.last_batch / theirs.last_batch).ravel()
    ratio = ratio[np.isfinite(ratio)]
    off, below = np.abs(ratio - 1), _mean((ratio < 1).astype(np.float64))
    mine, stored = ours.sorted_by("norm"), theirs.sorted_by("norm")
    return [
        shown(f"{name} cell by cell, share below the published", below, comparable_quantile(seeds)),
        shown(f"{name} cell by cell, |difference| / loss, median", box(off)[2]),
        shown(f"{name} cell by cell, |difference| / loss, largest", box(off)[4]),
        shown(f"{name} cell by cell, share within {CLOSE:.0%}", _mean((off <= CLOSE).astype(np.float64))),
        shown(f"{name} cell by cell, correlation of ln loss", log_correlation(ours.last_batch, theirs.last_batch)),
        shown(f"{name} cell by cell, correlation of norms, experts by norm", _correlation(mine.norm, stored.norm)),
        shown(f"{name} cell by cell, share alike (ignored, alone, superposed)", _alike(mine, stored)),
    ]


def log_correlation(one: Array, other: Array) -> float:
    """Correlation of the logarithms over the cells that both have; NaN where one of them is constant."""
    return _correlation(np.log(one), np.log(other))


def _correlation(one: Array, other: Array) -> float:
    both = np.isfinite(one) & np.isfinite(other)
    x, y = one[both], other[both]
    return float(np.corrcoef(x, y)[0, 1]) if x.size and np.ptp(x) and np.ptp(y) else np.nan


def _alike(one: PhaseGrid, other: PhaseGrid) -> float:
    known = np.isfinite(one.norm) & np.isfinite(other.norm)
    return _mean((one.phase == other.phase)[known].astype(np.float64))


def notes(found: Mapping[Panel, PhaseSeeds], quick: bool) -> list[str]:
    """What a reader must know of the rule, of the load-balance term, of ties and of the spread over seeds."""
    count = max(seeds.count for seeds in found.values())
    judged_by_quantile = quick or count != SEEDS
    lines = [
        f"best of {count} seeds per cell; losses are means over features and, where not called held-out, those of the "
        "final training batch with the load-balance term"
    ]
    if judged_by_quantile:
        lines.append(
            f"{'--quick: a coarser grid; ' if quick else ''}published medians are of the best of {SEEDS} seeds on the "
            "full grid; medians of other numbers of seeds or cells are shown, not judged. Instead, the stored grids "
            f"judge the same cells: of equal runs, the best of s seeds is below the best of {SEEDS} others in a share "
            f"s/(s+{SEEDS}) of the cells, so that quantile of ours / published should be 1"
        )
    dense = [box(seeds.grid.load_balance) for panel, seeds in found.items() if panel[2] == 1]
    if dense:
        low, high = min(b[0] for b in dense), max(b[4] for b in dense)
        lines.append(f"with one expert the load-balance term is a constant, {low:.4f} to {high:.4f} of every loss here")
    lines.append(
        "selection on noise, how far the chosen seed's last batch is below its held-out loss, median over cells: "
        + ", ".join(f"{panel_name(panel)} {_noise(seeds):.1%}" for panel, seeds in found.items())
    )
    if any(panel[2] > 1 for panel in found):
        lines.append(
            "all-zero inputs, a share (1-p)^n of all, tie every expert and go to expert 0: experts are compared by "
            "their mean, by id as stored, and cell by cell in falling order of norm (published grids have no usage)"
        )
    if count > 1:
        lines.append(
            f"range of the median over cells as each of its {count} seeds is left out (of medians of one seed per "
            "cell): " + ", ".join(f"{panel_name(panel)} {_spread(seeds)}" for panel, seeds in found.items())
        )
    return lines


def _noise(seeds: PhaseSeeds) -> float:
    chosen = seeds.best("last_batch")
    return 1 - box(chosen.last_batch / (chosen.held_out + chosen.load_balance))[2]


def _spread(seeds: PhaseSeeds) -> str:
    best = [box(seeds.best("last_batch", without=i).last_batch)[2] for i in range(seeds.count)]
    single = [box(seeds.one(i).last_batch)[2] for i in range(seeds.count)]
    return f"{min(best):.4f}-{max(best):.4f} ({min(single):.4f}-{max(single):.4f})"


def _conclude(rows: list[Row], targets: dict[str, Any], quick: bool, folder: Path) -> Outcome:
    from moesaic.bench.reproduce.phase_figures import draw

    found = gather(rows)
    if not found:
        return Outcome([], [], ["no training finished"])
    drawn = draw(found, targets, folder)
    figures = [folder / f"{figure.name}.{kind}" for figure in drawn for kind in ("png", "svg")]
    return Outcome(checks(found, targets, quick), figures, notes(found, quick))


REPRODUCTION = Reproduction(
    name="phase",
    description="eight phase diagrams of the last feature: losses, ignored and superposed cells, dense and MoE",
    seeds=SEEDS,
    quick_seeds=QUICK_SEEDS,
    max_models=MAX_MODELS,
    plan=plan,
    columns=columns,
    conclude=_conclude,
)
