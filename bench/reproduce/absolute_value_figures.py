"""The figures of the absolute-value reproduction: losses and features over sparsity, and the weights of the neurons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from moesaic.bench.plan import Row
from moesaic.bench.plot_style import DENSE, INK, MOE, MUTED, PALE_MOE, PAPER, panels, save, style
from moesaic.bench.reproduce.absolute_value import (
    COMPUTED_BELOW,
    N_FEATURES,
    N_NEURONS,
    SECOND_ABOVE,
    SMALL,
    by_density,
    computed,
    over_bound,
    polysemantic,
    small_rows,
)

WORDS = {
    "absolute-value-sparsity": (
        "Computation in superposition, over sparsity",
        "n = 100, m = 40, importance 0.8^i. Dots: every seed; lines: the seed with the lowest held-out loss of each "
        "density. The bound is the least loss without superposition at the same density, two neurons for each of the "
        f"20 most important features. Computed: less than {COMPUTED_BELOW:g} of the variance of |x_i| unexplained. A "
        f"neuron is polysemantic if its second largest input weight is at least {SECOND_ABOVE:g} of its largest; "
        "features per neuron: (Σ w²)²/Σ w⁴ of its input weights, quartiles and extremes over the 40 neurons.",
    ),
    "absolute-value-neurons": (
        "What the neurons read",
        "Input weights |W₁| of each neuron over its largest, stacked and coloured by feature (dark: important), in the "
        "order of the neuron's largest feature; weights below 0.05 are summed in grey. Pale ground: polysemantic "
        "neurons. Best seed by held-out loss of each density.",
    ),
    "absolute-value-small": (
        "Three features, six neurons",
        "Best seed of n = 3, m = 6: input weights over the largest of each neuron, and output weights times it. Each "
        "feature has a neuron for its positive side and one for its negative, and adds the two.",
    ),
}
"""Title and caption of each figure."""

LEAST_WEIGHT = 0.05
"""Smallest weight that is drawn by itself."""
_REST = "#c9ced4"


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw the figures that the rows allow as PNG and SVG."""
    made: dict[str, Figure] = {}
    found, small = by_density(rows), small_rows(rows)
    with style():
        if found:
            made["absolute-value-sparsity"] = sparsity(found)
            made["absolute-value-neurons"] = neuron_stacks(found)
        if small:
            made["absolute-value-small"] = three_features(small[0])
    for name, figure in made.items():
        save(figure, folder, name)
    return [folder / f"{name}.{kind}" for name in made for kind in ("png", "svg")]


def sparsity(found: Mapping[float, Sequence[Row]]) -> Figure:
    """Loss over the bound, features computed, what is left of each feature, and features per neuron."""
    figure, ((loss, count), (left, spread)) = panels(2, 2, width=4.1, height=2.9)
    densities = list(found)
    for axes, value in ((loss, over_bound), (count, computed)):
        dots = [(p, value(row)) for p, rows in found.items() for row in rows]
        axes.plot(*zip(*dots, strict=True), "o", ms=3.5, color=MUTED, alpha=0.7)
        axes.plot(densities, [value(rows[0]) for rows in found.values()], color=DENSE, lw=1.4)
    loss.axhline(1, color=INK, lw=0.9, ls="--")
    loss.set(title="loss / monosemantic bound", yscale="log")
    lowest = min(over_bound(row) for rows in found.values() for row in rows)
    highest = max(over_bound(row) for rows in found.values() for row in rows)
    ticks = [
        t
        for t in (0.1, 0.2, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100)
        if lowest / 1.5 <= t <= highest * 1.5 or t == 1
    ]
    loss.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    loss.set_yticks([], minor=True)
    count.axhline(N_NEURONS / 2, color=INK, lw=0.9, ls="--")
    count.annotate(
        "m/2", (0.01, N_NEURONS / 2), xycoords=("axes fraction", "data"), xytext=(0, 2), textcoords="offset points",
        fontsize=8, color=MUTED,
    )  # fmt: skip
    count.set(title="features computed")
    count.set_ylim(bottom=0)
    shades = colormaps["viridis"](np.linspace(0, 0.9, len(found)))
    for shade, (p, rows) in zip(shades, found.items(), strict=True):
        values: Any = rows[0]["feature_unexplained"]
        left.plot(values, color=shade, lw=1.2, label=f"{p:g}")
    left.axhline(COMPUTED_BELOW, color=INK, lw=0.9, ls="--")
    left.axvline(N_NEURONS / 2 - 0.5, color=MUTED, lw=0.8, ls=":")
    left.set(title="unexplained variance of each feature", xlabel="feature i, by falling importance", ylim=(0, 1.15))
    left.set_xlim(0, min(60, N_FEATURES))
    left.legend(title="1 − S", fontsize=7, title_fontsize=7, frameon=False, loc="lower right")
    boxes: list[Any] = [rows[0]["features_per_neuron"] for rows in found.values()]
    spread.boxplot(
        boxes, positions=densities, widths=[0.35 * p for p in densities], whis=(0, 100), manage_ticks=False,
        patch_artist=True, boxprops={"facecolor": PALE_MOE, "color": MOE}, medianprops={"color": MOE},
        whiskerprops={"color": MOE}, capprops={"color": MOE},
    )  # fmt: skip
    spread.set(title="features per neuron", yscale="log")
    spread.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    spread.set_yticks([], minor=True)
    for axes in (loss, count, spread):
        axes.set(xscale="log", xlabel="density 1 − S, sparser to the right", xlim=(1.6, min(densities) / 1.6))
        axes.set_xticks(densities, [f"{p:g}" for p in densities])
        axes.set_xticks([], minor=True)
    return figure


def neuron_stacks(found: Mapping[float, Sequence[Row]]) -> Figure:
    """One row of stacked input weights per density."""
    figure, grid = panels(len(found), 1, width=7.6, height=1.15, sharex=True)
    for (axes,), (p, rows) in zip(grid, found.items(), strict=True):
        weight: Any = rows[0]["input_weight"]
        _stack(axes, np.abs(np.asarray(weight, dtype=np.float64)))
        axes.set_title(
            f"1 − S = {p:g}: {100 * polysemantic(rows[0]):.0f} % of neurons polysemantic", fontsize=8,
            fontweight="normal",
        )  # fmt: skip
        axes.set(xlim=(-0.6, N_NEURONS - 0.4), ylabel="Σ |w|")
        axes.set_xticks([])
    grid[-1][0].set_xlabel("neurons, by the importance of their largest feature")
    return figure


def _stack(axes: Axes, weight: np.ndarray[Any, np.dtype[np.float64]]) -> None:
    """Bars of one model's neurons, from |W₁| (m, n), all pieces in one collection."""
    ordered = weight[np.argsort(weight.argmax(1), kind="stable")]
    shade = colormaps["viridis"](np.minimum(np.arange(weight.shape[1]) / N_NEURONS, 1.0))
    corners, colours = [], []
    for k, row in enumerate(ordered):
        features = [i for i in np.argsort(-row, kind="stable") if row[i] >= LEAST_WEIGHT]
        heights = [*row[features], row.sum() - row[features].sum()]
        ends = np.cumsum([0.0, *heights])
        left, right = k - 0.4, k + 0.4
        for low, high in pairwise(ends):
            corners.append([(left, low), (right, low), (right, high), (left, high)])
        colours += [*shade[features], to_rgba(_REST)]
        if np.sort(row)[-2] >= SECOND_ABOVE:
            axes.axvspan(k - 0.5, k + 0.5, color=PALE_MOE, alpha=0.45, linewidth=0, zorder=0)
    axes.add_collection(PolyCollection(corners, facecolors=colours, edgecolors=PAPER, linewidths=0.25))
    axes.set_ylim(0, 1.05 * float(weight.sum(1).max()))
    axes.grid(visible=False, axis="x")


def three_features(row: Row) -> Figure:
    """Signed input and output weights of the six neurons."""
    figure, (line,) = panels(1, 2, width=3.4, height=2.3, sharey=True)
    inputs: Any = row["input_weight"]
    order = np.lexsort((-np.sum(inputs, axis=1), np.abs(inputs).argmax(1)))
    columns = {"input_weight": "input weights", "output_weight": "output weights"}
    for axes, (column, title) in zip(line, columns.items(), strict=True):
        values: Any = row[column]
        weight = np.asarray(values, dtype=np.float64)[order]
        for i, colour in enumerate((DENSE, MOE, INK)):
            axes.bar(np.arange(SMALL[1]) + 0.26 * (i - 1), weight[:, i], 0.24, color=colour, label=f"feature {i}")
        axes.axhline(0, color=MUTED, lw=0.8)
        axes.set(title=title, xlabel="neuron")
        axes.set_xticks(range(SMALL[1]), [str(k) for k in range(SMALL[1])])
    line[1].legend(fontsize=7, frameon=False, loc="lower left")
    return figure
