"""The figures of the phase diagrams: maps in the paper's colours, box plots of losses, and cells against the published.

`draw` draws those that the rows allow. Colours: y = ‖W_n‖, x = superposition score, see `phase_maps.colour`; both are
scaled by their 99th percentile over the panel, so that a few outlying cells do not fade the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure

from moesaic.bench.figures import Drawn
from moesaic.bench.plot_style import DENSE, INK, MOE, MUTED, PAPER, THIRD, panels, save, style
from moesaic.bench.reproduce.closed_form import lower_boundary, optimum_boundary, upper_boundary
from moesaic.bench.reproduce.phase_maps import STORED, PhaseGrid, PhaseSeeds, box, colour, published
from moesaic.bench.reproduce.phase_plan import SEEDS, Array, Panel, panel_name

MISSING = "#c9ced4"
_SPARSITY, _IMPORTANCE = "feature sparsity S = 1 − p", "importance $I_{last}$"
_PERCENTILE = 99.0
LEAST_LOSS = 3e-4
"""Where the axis of losses ends: of cells that lose next to nothing, a logarithm tells nothing."""


WORDS = {
    "phase-maps": (
        "Phase maps of the last feature",
        "The last feature in every expert of the best seed of each cell by held-out loss. White: ignored; blue: stored "
        "alone; red: stored in superposition. Experts of a cell in falling order of usage, whose mean over cells is "
        "given; norm and score are scaled by their 99th percentile over the panel. On (2,1,1): boundaries of the "
        "closed forms (solid) and of the optimum by quadrature (dashed).",
    ),
    "phase-losses": (
        "Losses of all cells",
        "Boxes: quartiles and extremes over cells, on a logarithmic axis; whiskers may pass its lower end. Above, the "
        "loss of the final training batch with the load-balance term, best seed by that loss, as published. Below, "
        "held-out losses of the best seed by held-out loss, the load-balance term apart: with one expert it is the "
        "constant 0.01.",
    ),
    "phase-published-maps": (
        "The published maps beside ours",
        "By the paper's rule, experts of a cell in falling order of ‖W_last‖ (the published grids have no usage); norm "
        "and score scaled by the published 99th percentiles of the panel.",
    ),
    "phase-cells": (
        "Cell by cell against the published losses",
        "Losses of the final training batch with the load-balance term, best seed by that loss, in the cells of both "
        "grids.",
    ),
}
"""Title and caption of each figure."""


def draw(found: Mapping[Panel, PhaseSeeds], targets: Mapping[str, Any], folder: Path) -> list[Drawn]:
    """Draw the figures as PNG and SVG into ``folder`` and return them."""
    make: dict[str, Callable[[], Figure]] = {
        "phase-maps": lambda: maps(found),
        "phase-losses": lambda: boxes(found, targets),
    }
    pairs = [(published(panel), found[panel].best("last_batch")) for panel in STORED if panel in found]
    if pairs:
        make |= {"phase-published-maps": lambda: published_maps(pairs), "phase-cells": lambda: cells(pairs)}
    drawn = []
    for name, figure in make.items():
        with style():
            made = figure()
        drawn.append(Drawn(name, *WORDS[name], save(made, folder, name)))
    return drawn


@dataclass(frozen=True)
class _Scale:
    norm: float
    score: float

    @classmethod
    def of(cls, grid: PhaseGrid) -> _Scale:
        top = [float(np.nanpercentile(values, _PERCENTILE)) for values in (grid.norm, grid.score)]
        return cls(*(value if value > 0 else 1.0 for value in top))


def _map(axes: Axes, grid: PhaseGrid, expert: int, scale: _Scale) -> None:
    """One expert's map; cells without a model are grey."""
    image = colour(grid.norm[..., expert] / scale.norm, grid.score[..., expert] / scale.score)
    image[np.isnan(image).any(-1)] = to_rgb(MISSING)
    axes.imshow(
        image.transpose(1, 0, 2), origin="lower", aspect="auto", interpolation="none",
        extent=(*_edges(grid.sparsity), *_edges(grid.importance)),
    )  # fmt: skip
    axes.grid(False)
    axes.set_xticks([0.25, 0.5, 0.75])
    axes.set_yticks([1, 2])


def _edges(centres: Array) -> tuple[float, float]:
    half = (centres[-1] - centres[0]) / (len(centres) - 1) / 2 if len(centres) > 1 else 0.05
    return float(centres[0] - half), float(centres[-1] + half)


def maps(found: Mapping[Panel, PhaseSeeds]) -> Figure:
    """Every expert of every panel, a line per (n, m); boundaries over (2,1,1); the colours' key."""
    lines: dict[tuple[int, int], list[Panel]] = {}
    for panel in found:
        lines.setdefault(panel[:2], []).append(panel)
    width = max(3, *(sum(p[2] for p in line) for line in lines.values()))
    figure, grid = panels(len(lines), width, width=1.95, height=1.95)
    unused = []
    for axes_line, line in zip(grid, lines.values(), strict=True):
        slots = iter(axes_line)
        for panel in line:
            best = found[panel].best("held_out").sorted_by("usage")
            usage, scale = np.nanmean(best.usage, axis=(0, 1)), _Scale.of(best)
            for e in range(panel[2]):
                axes = next(slots)
                _map(axes, best, e, scale)
                axes.set_title(
                    panel_name(panel) if panel[2] == 1 else f"{panel_name(panel)}  expert {e + 1}, {usage[e]:.0%}"
                )
                if panel == (2, 1, 1):
                    _boundaries(axes)
        unused += list(slots)
        axes_line[0].set_ylabel(_IMPORTANCE)
    for axes in grid[-1]:
        axes.set_xlabel(_SPARSITY)
    for axes in unused:
        axes.axis("off")
    # The keys stand in the free places of the first line, the one of the colours last, where nothing is to its right.
    free = [axes for axes in unused if axes in grid[0]]
    if free:
        _key(free[-1])
    if len(free) > 1 and (2, 1, 1) in found:
        free[0].legend(*grid[0][0].get_legend_handles_labels(), fontsize=7.5, frameon=False, loc="upper left")
    return figure


def _boundaries(axes: Axes) -> None:
    """The closed forms' boundaries and the optimum's own, in the coordinates of a map, which keep its limits."""
    from matplotlib.patheffects import withStroke

    meet = 4 / 7
    formula, s = np.linspace(0.02, meet, 200), np.linspace(0.02, 0.98, 49)
    boundary = optimum_boundary(s)
    limits = axes.get_xlim(), axes.get_ylim()
    halo: dict[str, Any] = {"color": INK, "lw": 1.0, "path_effects": [withStroke(linewidth=2.4, foreground=PAPER)]}
    axes.plot(1 - formula, lower_boundary(formula), **halo, label="boundaries of\nthe closed forms")
    axes.plot(1 - formula, upper_boundary(formula), **halo)
    axes.plot((1 - meet, 0), (1, 1), **halo)
    axes.plot(1 - s, boundary, ls=(0, (3, 2)), **halo, label="boundaries of\nthe optimum,\nby quadrature")
    axes.plot(1 - s, 1 / boundary, ls=(0, (3, 2)), **halo)
    axes.set(xlim=limits[0], ylim=limits[1])


def _key(axes: Axes) -> None:
    """The colours over score (x) and norm (y)."""
    y, x = np.meshgrid(np.linspace(0, 1, 41), np.linspace(0, 1, 41), indexing="ij")
    axes.axis("on")
    axes.imshow(colour(y, x), origin="lower", aspect="auto", interpolation="none", extent=(0, 1, 0, 1))
    axes.grid(False)
    axes.set(xlabel="superposition score, scaled", ylabel="$\\|W_{last}\\|$, scaled", title="colours")
    axes.set_xticks([0, 1])
    axes.set_yticks([0, 1])
    # Nothing is to the right of the key, and a label on its left would widen a gap through all lines.
    axes.yaxis.set_label_position("right")
    axes.yaxis.tick_right()
    axes.spines["right"].set_visible(True)
    axes.spines["left"].set_visible(False)


def boxes(found: Mapping[Panel, PhaseSeeds], targets: Mapping[str, Any]) -> Figure:
    """Published next to ours by the paper's rule; held-out reconstruction and load-balance term below."""
    figure, ((upper,), (lower,)) = panels(2, 1, width=7.2, height=2.6, sharex=True)
    for axes in (upper, lower):
        axes.set_yscale("log")
    names, count = [panel_name(panel) for panel in found], max(seeds.count for seeds in found.values())
    for i, (panel, seeds) in enumerate(found.items()):
        theirs = targets["panels"].get("".join(map(str, panel)))
        last, held_out = seeds.best("last_batch"), seeds.best("held_out")
        if theirs:
            _box(upper, i - 0.19, theirs["loss_box_min_q1_med_q3_max"], MUTED)
        else:
            upper.text(
                i - 0.19, 0.04, "none published", color=MUTED, fontsize=7.5, rotation=90, ha="center", va="bottom",
                transform=upper.get_xaxis_transform(),
            )  # fmt: skip
        _box(upper, i + 0.19, box(last.last_batch), MOE if panel[2] > 1 else DENSE)
        _box(lower, i - 0.19, box(held_out.held_out), MOE if panel[2] > 1 else DENSE)
        _box(lower, i + 0.19, box(held_out.load_balance), THIRD)
    upper.set(
        ylabel="loss of the last batch\nwith load-balance term",
        title=f"as published: best of {SEEDS} seeds of each cell by its last batch; ours: best of {count}",
    )
    lower.set(
        ylabel="held-out loss",
        xlabel="panel (n, m, E)",
        title=f"held out: best of {count} by held-out loss, its two terms apart",
    )
    lower.set_xticks(range(len(names)), names)
    for axes, entries in (
        (upper, (("published", MUTED), ("ours, dense", DENSE), ("ours, MoE", MOE))),
        (lower, (("reconstruction, dense", DENSE), ("reconstruction, MoE", MOE), ("load-balance term", THIRD))),
    ):
        _log_ticks(axes)
        for name, shade in entries:
            axes.plot([], [], color=shade, lw=6, alpha=0.6, label=name)
        axes.legend(fontsize=7.5, frameon=False, loc="upper right", ncols=3, borderaxespad=0.1)
    return figure


def _log_ticks(axes: Axes) -> None:
    """Ticks in plain numbers, the floor at `LEAST_LOSS`, and room for a legend at the top."""
    low, high = axes.get_ylim()
    low = max(low, LEAST_LOSS)
    high = low * (high / low) ** 1.2
    ticks = [t for power in range(-5, 2) for t in (10.0**power, 3 * 10.0**power) if low <= t <= high]
    axes.set_ylim(low, high)
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_yticks([], minor=True)


def _box(axes: Axes, at: float, numbers: Sequence[float], shade: str) -> None:
    names = ("whislo", "q1", "med", "q3", "whishi")
    line = {"color": shade, "linewidth": 1.1}
    axes.bxp(
        [{**dict(zip(names, numbers, strict=True)), "fliers": []}], positions=[at], widths=0.32, showfliers=False,
        patch_artist=True, boxprops={"facecolor": (*to_rgb(shade), 0.25), "edgecolor": shade},
        medianprops={**line, "linewidth": 2.0}, whiskerprops=line, capprops=line, manage_ticks=False,
    )  # fmt: skip


def published_maps(pairs: Sequence[tuple[PhaseGrid, PhaseGrid]]) -> Figure:
    """The stored grids above, ours below, experts of a cell in falling order of norm."""
    figure, grid = panels(2, sum(theirs.panel[2] for theirs, _ in pairs), width=1.95, height=1.95)
    for line, words in zip(grid, ("published", "ours"), strict=True):
        line[0].set_ylabel(f"{words}\n{_IMPORTANCE}")
    column = 0
    for theirs, ours in pairs:
        scale = _Scale.of(theirs)
        for e in range(theirs.panel[2]):
            for row, one in enumerate((theirs, ours)):
                _map(grid[row][column], one.sorted_by("norm"), e, scale)
            name = panel_name(theirs.panel)
            grid[0][column].set_title(name if theirs.panel[2] == 1 else f"{name}  norm rank {e + 1}")
            grid[1][column].set_xlabel(_SPARSITY)
            column += 1
    return figure


def cells(pairs: Sequence[tuple[PhaseGrid, PhaseGrid]]) -> Figure:
    """Ours over published, a point per cell, and the relative difference on the grid."""
    figure, (upper, lower) = panels(2, len(pairs), width=2.7, height=2.4)
    shades = LinearSegmentedColormap.from_list("difference", [DENSE, PAPER, MOE])
    image = None
    for i, (theirs, ours) in enumerate(pairs):
        same = theirs.at(ours.sparsity, ours.importance)
        x, y = same.last_batch, ours.last_batch
        low, _, _, _, high = box(np.concatenate([x.ravel(), y.ravel()]))
        low, high = low / 1.1, high * 1.1
        axes = upper[i]
        axes.plot((low, high), (low, high), color=INK, lw=0.8)
        axes.scatter(x, y, 5, color=MOE if ours.panel[2] > 1 else DENSE, alpha=0.35, linewidths=0, rasterized=True)
        axes.set(
            xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), xlabel="published loss",
            title=panel_name(ours.panel),
        )  # fmt: skip
        ticks = [t for t in ((0.01, 0.03, 0.1, 0.3) if high > 12 * low else (0.01, 0.02, 0.05)) if low <= t <= high]
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks(ticks, [f"{t:g}" for t in ticks])
            axis.set_ticks([], minor=True)
        image = lower[i].imshow(
            100 * (y / x - 1).T, origin="lower", aspect="auto", interpolation="none", cmap=shades, vmin=-30, vmax=30,
            extent=(*_edges(ours.sparsity), *_edges(ours.importance)),
        )  # fmt: skip
        lower[i].grid(False)
        lower[i].set(xlabel=_SPARSITY)
    upper[0].set_ylabel("our loss")
    lower[0].set_ylabel(_IMPORTANCE)
    if image is not None:
        bar = figure.colorbar(image, ax=lower, extend="both", shrink=0.9, pad=0.02)
        bar.set_label("ours − published, %")
        bar.outline.set_visible(False)
    return figure
