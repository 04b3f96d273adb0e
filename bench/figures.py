"""Figures of a run folder, each a function of its cells; `draw_figures` draws those that the rows allow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moesaic.bench.analysis import DIMENSIONALITY, LOSS, Cell, in_grid, on_front
from moesaic.bench.figure_parts import (
    Label,
    Labelled,
    by_dataset,
    family_key,
    few_architectures,
    few_datasets,
    heading,
    left_out,
    place_labels,
    point,
    short,
)
from moesaic.bench.figures_detail import (
    MAX_LINES,
    against_sparsity,
    dimensionality_histogram,
    expert_usage,
    features_per_dimension,
    gate_slice,
    routed,
    swept_column,
    with_features_per_dimension,
    with_histogram,
)
from moesaic.bench.plot_style import DENSE, MOE, MUTED, log_axis, panels, save, style
from moesaic.bench.words import si


@dataclass(frozen=True)
class Drawn:
    """A figure that was drawn: its file name without suffix, its heading, what it shows, and the SVG."""

    name: str
    title: str
    caption: str
    svg: str


def tradeoff(found: Sequence[Cell]) -> Figure | None:
    """Unexplained variance, and mean D_i, against active FLOPs: one column per data set."""
    data = by_dataset(in_grid(found))
    if not any(c.is_moe for c in found) or len({c.mean("active_flops") for c in found}) < 3:
        return None
    figure, grid = panels(2, len(data), sharex=True)
    labelled = []
    for line, metric in zip(grid, (LOSS, DIMENSIONALITY), strict=True):
        line[0].set_ylabel(_NAMES[metric])
        for axes, (dataset, here) in zip(line, data.items(), strict=True):
            labelled.append(_against_flops(axes, here, metric))
            _from_zero(axes, metric, found)
            if metric == LOSS:
                axes.set_title(heading(dataset, here[0]))
            else:
                axes.set_xlabel("active FLOPs per sample (forward + backward)")
    family_key(figure, "label: width m", "label: experts × width, k active")
    place_labels(figure, labelled)
    return figure


_NAMES = {
    LOSS: "unexplained variance\n(held-out; lower is better)",
    DIMENSIONALITY: "mean $D_i$ of represented features\n(1: own dimension; ½: antipodal pairs)",
    "superposition": "superposition score\n$\\Sigma_{j\\neq i}(\\hat{W}_i\\cdot W_j)^2$, mean",
}


def _from_zero(axes: Axes, metric: str, found: Sequence[Cell]) -> None:
    """A y axis from 0; that of mean D_i, which is comparable between data sets, is the same for all."""
    axes.set_ylim(bottom=0)
    if metric == DIMENSIONALITY:
        axes.set_ylim(top=_dimensionality_end(found))
        axes.axhline(0.5, color=MUTED, linewidth=0.8, linestyle=(0, (3, 2)), zorder=1)


def _dimensionality_end(found: Sequence[Cell]) -> float:
    """Where an axis of mean D_i ends: above every mean, not above 1."""
    means = [m for c in found if math.isfinite(m := c.mean(DIMENSIONALITY))]
    return min(1.06, 1.2 * max([0.5, *means]))


def _against_flops(axes: Axes, here: Sequence[Cell], metric: str) -> Labelled:
    panel = Labelled(axes)
    log_axis(axes, [c.mean("active_flops") for c in here], "")
    dense = sorted((c for c in here if not c.is_moe), key=lambda c: c.mean("active_flops"))
    points = [(c.mean("active_flops"), c.mean(metric)) for c in dense if math.isfinite(c.mean(metric))]
    axes.plot([x for x, _ in points], [y for _, y in points], color=DENSE, linewidth=1.0, alpha=0.55)
    panel.add_line(points)
    for cell in sorted(here, key=lambda c: c.is_moe):
        y, x, color = cell.estimate(metric), cell.mean("active_flops"), MOE if cell.is_moe else DENSE
        if math.isfinite(y.mean) and math.isfinite(x):
            point(axes, x, y, color)
            panel.add(Label(x, y.mean, short(cell), color, optional=not cell.is_moe), y)
    return panel


def superposition(found: Sequence[Cell]) -> Figure | None:
    """Mean D_i and superposition score against network sparsity k/E, at one total width."""
    grid_cells = in_grid(found)
    widths = {c.value("total_width") for c in grid_cells if c.is_moe}
    shown = [c for c in grid_cells if c.value("total_width") in widths]
    if len(widths) != 1 or len({_sparsity(c) for c in shown}) < 2:
        return None
    data = by_dataset(shown)
    figure, grid = panels(2, len(data), sharex=True, height=2.4)
    labelled = []
    for line, metric in zip(grid, (DIMENSIONALITY, "superposition"), strict=True):
        line[0].set_ylabel(_NAMES[metric])
        for axes, (dataset, here) in zip(line, data.items(), strict=True):
            panel = Labelled(axes)
            for cell in here:
                y, color = cell.estimate(metric), MOE if cell.is_moe else DENSE
                if math.isfinite(y.mean):
                    point(axes, _sparsity(cell), y, color)
                    panel.add(Label(_sparsity(cell), y.mean, short(cell), color), y)
            log_axis(
                axes, [_sparsity(c) for c in here], "network sparsity k/E" if metric != DIMENSIONALITY else "", base=2.0
            )
            if metric == DIMENSIONALITY:
                axes.set_title(heading(dataset, here[0]))
            _from_zero(axes, metric, found)
            labelled.append(panel)
    family_key(figure, f"width {widths.pop()}", "the same total width; label: experts × width, k active")
    place_labels(figure, labelled)
    return figure


def _sparsity(cell: Cell) -> float:
    return float(str(cell.value("top_k"))) / float(str(cell.value("n_experts")))


def pareto(found: Sequence[Cell]) -> Figure | None:
    """Unexplained variance against mean D_i, the marker's area growing with active FLOPs; filled: on the front."""
    shown = [
        c for c in in_grid(found) if math.isfinite(c.mean(DIMENSIONALITY)) and math.isfinite(c.mean("active_flops"))
    ]
    if len(shown) < 3:
        return None
    front = on_front(shown)
    data = {dataset: [c for c in here if c in shown] for dataset, here in by_dataset(found).items()}
    smallest = min(c.mean("active_flops") for c in shown)
    figure, (line,) = panels(1, len(data), height=3.3)
    labelled = []
    for axes, (dataset, here) in zip(line, data.items(), strict=True):
        panel = Labelled(axes)
        for cell in here:
            x, y = cell.mean(DIMENSIONALITY), cell.estimate(LOSS)
            color, kept = MOE if cell.is_moe else DENSE, cell in front
            point(axes, x, y, color, filled=kept, size=4 * (cell.mean("active_flops") / smallest) ** 0.25)
            text = f"{short(cell)} · {si(cell.mean('active_flops'))}"
            panel.add(Label(x, y.mean, text, color if kept else MUTED, optional=not kept or not cell.is_moe), y)
        axes.set_title(heading(dataset, by_dataset(found)[dataset][0]))
        axes.set_xlabel("mean $D_i$ (higher: less sharing)")
        axes.set_xlim(0, _dimensionality_end(found))
        axes.set_ylim(bottom=0)
        labelled.append(panel)
    line[0].set_ylabel(_NAMES[LOSS])
    family_key(figure, "label: width m · active FLOPs", "label: experts × width, k active · active FLOPs")
    place_labels(figure, labelled, size=7)
    return figure


@dataclass(frozen=True)
class _Entry:
    """A figure: ``draw`` gets at most ``most`` architectures of what ``shows`` picks of the cells.

    ``every`` is set where data sets are no panels, so that no choice among them is wanted.
    """

    name: str
    title: str
    draw: Callable[[Sequence[Cell]], Figure | None]
    caption: str
    shows: Callable[[Sequence[Cell]], Sequence[Cell]] = list
    most: int | None = None
    every: bool = False


MAX_POINTS = 48
"""Most architectures whose points a panel can tell apart."""
_CATALOGUE = (
    _Entry(
        "tradeoff",
        "Loss and superposition against active compute",
        tradeoff,
        "Unexplained variance (top) and mean dimensionality of represented features (bottom) against active FLOPs. "
        "Bars: 95 % t-intervals over seeds. A point is missing where a model represents no feature. Of more than 24 "
        "points in a panel, eight at the rim are labelled.",
        most=MAX_POINTS,
    ),
    _Entry(
        "superposition",
        "Superposition against network sparsity",
        superposition,
        "All models have the same total width; the dense one has k/E = 1. Bars: 95 % t-intervals over seeds.",
        most=MAX_POINTS,
    ),
    _Entry(
        "pareto",
        "Pareto front: loss × active compute × mean D_i",
        pareto,
        "Filled markers are on the front: no other that was trained with equal settings has loss and active FLOPs as "
        "low and mean D_i as high. The number after the dot is active FLOPs per sample; the marker's area grows with "
        "it. Of more than 24 points in a panel, eight at the rim are labelled.",
        most=MAX_POINTS,
    ),
    _Entry(
        "usage",
        "Expert usage",
        expert_usage,
        "Share of the assignments that each expert takes, in units of an equal share (dashed); experts are sorted "
        "by it in "
        "every seed, then averaged over seeds.",
        routed,
        MAX_LINES,
    ),
    _Entry(
        "gates",
        "Gates and a shared expert",
        gate_slice,
        "The same experts under different gates, each at its own best learning rate. The shared expert's width is "
        "taken from the routed ones, so the total width is the same. At k = 1 the router of `paper` gets no "
        "gradient, which makes it `random`.",
        every=True,
    ),
    _Entry(
        "dimensionality",
        "Feature dimensionality D_i",
        dimensionality_histogram,
        "Distribution of D_i over the occurrences of represented features, all seeds together. Dashed: 2/5 "
        "(pentagon), 1/2 "
        "(antipodal pair), 2/3 (triangle).",
        with_histogram,
        MAX_LINES,
    ),
    _Entry(
        "features_per_dimension",
        "Features per dimension, with experts weighted in three ways",
        features_per_dimension,
        "‖W‖²/m. Only the folded one is comparable across gates; for a dense model the three are the same.",
        with_features_per_dimension,
        3 * MAX_LINES,
    ),
    _Entry(
        "sparsity",
        "Features per dimension against sparsity",
        against_sparsity,
        "‖W‖²/m with the gate folded into W, and mean D_i, of the six architectures of lowest loss at most, for the "
        "first four kinds of data with three densities at least. 1 − S is the probability that a feature is present, "
        "mean over features. Dashed: dense. Bars: 95 % t-intervals over seeds.",
        every=True,
    ),
    _Entry(
        "sweep",
        "Along the swept column",
        swept_column,
        "Held-out loss and mean D_i along the configuration column that takes most values. Bars: 95 % t-intervals "
        "over seeds.",
        every=True,
    ),
)


INSIDE = ("usage", "dimensionality", "features_per_dimension")
"""The figures that look inside the models, whatever question the sweep asks."""


def draw_figures(found: Sequence[Cell], folder: Path, names: Sequence[str] = ()) -> list[Drawn]:
    """Draw every figure that applies, or those of ``names``, as PNG and SVG; a caption says what it leaves out."""
    drawn = []
    for entry in _CATALOGUE:
        if names and entry.name not in names:
            continue
        able = entry.shows(found)
        shown = able if entry.every else few_datasets(able)
        shown = few_architectures(shown, entry.most) if entry.most else shown
        with style():
            figure = entry.draw(shown) if shown else None
        if figure is not None:
            caption = entry.caption + left_out(shown, able)
            drawn.append(Drawn(entry.name, entry.title, caption, save(figure, folder, entry.name)))
    return drawn
