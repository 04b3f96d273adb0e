"""The figures of the geometry reproduction: D* and D_i over sparsity, and pictures of small models' features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moesaic.bench.palette import GRID
from moesaic.bench.plan import Row
from moesaic.bench.plot_style import DENSE, FOURTH, INK, MOE, MUTED, PALE_MOE, THIRD, panels, save, style
from moesaic.bench.reproduce.geometry import (
    curve,
    nearest_sets_of,
    number,
    represented,
    small_rows,
    sweep_rows,
)
from moesaic.bench.reproduce.polytopes import FRACTIONS, Array, hull_edges
from moesaic.bench.reproduce.result import mean

WORDS = {
    "geometry-dimensionality": (
        "Dimensions per feature, and of each feature",
        "Left: D* = m/‖W‖² of each seed (dots) and their mean, n = 200, m = 20. Middle: D_i of every represented "
        "feature (‖W_i‖ at least 1/2) of all seeds, moved sideways a little where points would hide each other, over "
        "the curve of the left panel. A feature's colour says how many features its set has that is orthogonal to all "
        "others (|cos| at most 0.2): two make an antipodal pair, three a triangle, and so on. Right: the same D_i, "
        "counted. Dashed: the fractions of the paper. At 1 − S = 1 no feature has a direction of its own, so none is "
        "represented.",
    ),
    "geometry-small-models": (
        "Feature directions of small models",
        "W_i of the seed with the lowest held-out loss at 1 − S = 0.05, turned for the picture; dotted: norm 1. In 3-D "
        "edges are those of the convex hull and what lies behind is pale. Last column: the three, or four, features of "
        "the large models' sweep that come nearest to the polytope while orthogonal to all others.",
    ),
}
"""Title and caption of each figure."""

_SIZES = {2: ("2", MOE), 3: ("3", DENSE), 4: ("4", FOURTH), 5: ("5", THIRD), 8: ("8", PALE_MOE)}
_OTHER = ("other", "#b4bbc2")
_PICTURES: tuple[tuple[int, int, str], ...] = (
    (3, 2, "digon and a dimension"), (4, 2, "two digons"), (5, 2, "pentagon"), (0, 2, "triangle"),
    (6, 3, "octahedron"), (7, 3, "seven features"), (8, 3, "square antiprism"), (0, 3, "tetrahedron"),
)  # fmt: skip
"""(n, m, name) of each picture; n = 0: the set of a large model that is nearest to the polytope."""


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw both figures as PNG and SVG; those without rows are left out."""
    made: dict[str, Figure] = {}
    large = sweep_rows(rows)
    with style():
        if large:
            made["geometry-dimensionality"] = dimensionality(large)
        if any(small_rows(rows, n, m) for n, m, _ in _PICTURES):
            made["geometry-small-models"] = small_models(rows)
    for name, figure in made.items():
        save(figure, folder, name)
    return [folder / f"{name}.{kind}" for name in made for kind in ("png", "svg")]


def dimensionality(rows: Sequence[Row]) -> Figure:
    """D* of the sweep, D_i of its represented features by density, and their histogram."""
    figure, ((left, middle, right),) = panels(1, 3, width=3.6, height=3.6, sharey=True)
    found = curve(rows)
    averages = [mean(values) for values in found.values()]
    seeds = [(inverse, value) for inverse, values in found.items() for value in values]
    left.plot(*zip(*seeds, strict=True), "o", ms=3, color=MUTED)
    left.plot(list(found), averages, color=INK, lw=1.3)
    middle.plot(list(found), averages, color=MUTED, lw=1)
    _scatter(middle, rows)
    values = np.concatenate([represented(row)[0] for row in rows])
    right.hist(values, bins=np.linspace(0, 1, 201).tolist(), orientation="horizontal", color=MUTED)
    left.set(title="dimensions per feature D*", ylabel="dimensions")
    middle.set(title="dimensionality D_i of each feature")
    right.set(title="D_i of all densities", xlabel="features")
    for axes in (left, middle):
        axes.set(xscale="log", xlabel="1 / (1 − S)")
        axes.set_xticks([1, 2, 3, 5, 10, 20], ["1", "2", "3", "5", "10", "20"])
        axes.set_xticks([], minor=True)
    left.set_ylim(0, 1.05)
    for axes in (left, middle, right):
        axes.grid(visible=False)
        for fraction in (1.0, *FRACTIONS.values()):
            axes.axhline(fraction, color=GRID, lw=0.8, ls="--", zorder=0)
    for name, fraction in {"own dimension": 1.0, **FRACTIONS}.items():
        lower = name == "square antiprism"
        right.annotate(
            f"{name} {_FRACTION_TEXT.get(name, '1')}", (1, fraction), xycoords=("axes fraction", "data"),
            xytext=(-2, -2 if lower else 1), textcoords="offset points", ha="right", va="top" if lower else "bottom",
            fontsize=7.5, color=MUTED,
        )  # fmt: skip
    return figure


_FRACTION_TEXT = {
    "tetrahedron": "3/4", "triangle": "2/3", "digon": "1/2", "pentagon": "2/5", "square antiprism": "3/8",
}  # fmt: skip


def _scatter(axes: Axes, rows: Sequence[Row]) -> None:
    """Points at (1/(1 − S), D_i), spread sideways by their rank in D_i, so that equal data give equal pictures."""
    points: dict[str, list[tuple[float, float]]] = {}
    for inverse in curve(rows):
        here = [row for row in rows if 1 / number(row, "feature_probability") == inverse]
        pairs = sorted(pair for row in here for pair in zip(*represented(row), strict=True))
        for rank, (d, size) in enumerate(pairs):
            label = _SIZES.get(size, _OTHER)[0]
            points.setdefault(label, []).append((inverse * 1.07 ** ((rank * 0.618) % 1 - 0.5), d))
    for label, colour in [_OTHER, *_SIZES.values()]:
        if label in points:
            x, y = zip(*points[label], strict=True)
            axes.scatter(x, y, 5, color=colour, linewidths=0, label=label, zorder=2 if label == "other" else 3)
    axes.legend(title="features in set", fontsize=7, title_fontsize=7, frameon=False, loc="upper right", markerscale=2)


def small_models(rows: Sequence[Row]) -> Figure:
    """Pictures of the small models, two-dimensional ones above."""
    columns = len(_PICTURES) // 2
    figure, grid = panels(2, columns, width=1.9, height=2.1)
    large = sweep_rows(rows)
    for axes, (n, m, name) in zip([a for line in grid for a in line], _PICTURES, strict=True):
        axes.set(aspect="equal", xlim=(-1.3, 1.3), ylim=(-1.3, 1.3))
        axes.axis("off")
        found = nearest_sets_of(large, name) if n == 0 else []
        weights: list[Any] = [found[0][1]] if found else [row["weight"] for row in small_rows(rows, n, m)[:1]]
        origin = f"n = {n}, m = {m}" if n else "in the large model" if found else "in no large model"
        axes.set_title(f"{name}\n{origin}", fontsize=7.5, fontweight="normal")
        for weight in weights:
            w = np.asarray(weight, dtype=np.float64)
            axes.add_artist(_circle())
            if m == 2:
                _plane(axes, w)
            else:
                _space(axes, w)
    return figure


def _circle() -> Any:
    from matplotlib.patches import Circle

    return Circle((0, 0), 1, fill=False, color=MUTED, lw=0.6, ls=":")


def _plane(axes: Axes, w: Array) -> None:
    first = np.arctan2(w[0, 1], w[0, 0])
    turn = np.pi / 2 - first
    x, y = np.cos(turn) * w[:, 0] - np.sin(turn) * w[:, 1], np.sin(turn) * w[:, 0] + np.cos(turn) * w[:, 1]
    order = np.argsort(np.arctan2(y, x))
    axes.fill(x[order], y[order], facecolor="none", edgecolor=MUTED, lw=0.8)
    for i in range(len(w)):
        axes.annotate("", (x[i], y[i]), (0, 0), arrowprops={"arrowstyle": "-|>", "color": DENSE, "lw": 1.4})


def _space(axes: Axes, w: Array) -> None:
    p = w @ _view(w)
    depth = p[:, 2]
    shade = 0.3 + 0.7 * (depth - depth.min()) / max(float(np.ptp(depth)), 1e-9)
    for i, j in hull_edges(w):
        axes.plot(p[[i, j], 0], p[[i, j], 1], color=INK, lw=1, alpha=float(shade[[i, j]].mean()), zorder=2)
    for i in np.argsort(depth):
        axes.plot([0, p[i, 0]], [0, p[i, 1]], color=DENSE, lw=1, alpha=0.5 * float(shade[i]), zorder=1)
        axes.plot(*p[i, :2], "o", ms=5.5, color=DENSE, alpha=float(shade[i]), zorder=3 + float(depth[i]))


def _view(w: Array) -> Array:
    """Columns are the picture's right, up and towards the reader: slightly above the axis of least inertia.

    The axis that the polytope is most or least extended along is drawn upright, or a vertex where all are alike.
    """
    moments, axis = np.linalg.eigh(w.T @ w)
    odd = 0 if moments[1] - moments[0] > moments[2] - moments[1] else 2
    alike = moments[2] < 1.1 * moments[0]
    up = w[0] / np.linalg.norm(w[0]) if alike else axis[:, odd]
    across = w - np.outer(w @ up, up)
    forward = across[int(np.argmax(np.linalg.norm(across, axis=1)))]
    forward = forward / np.linalg.norm(forward)
    right = np.cross(up, forward)
    turn, tilt = np.deg2rad(20), np.deg2rad(18)
    ahead = np.cos(turn) * forward + np.sin(turn) * right
    right = np.cross(up, ahead)
    return np.stack([right, np.cos(tilt) * up - np.sin(tilt) * ahead, np.cos(tilt) * ahead + np.sin(tilt) * up], axis=1)
