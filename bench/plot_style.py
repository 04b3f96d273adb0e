"""One look for every figure: type, panels, axes, saving as PNG and SVG."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from moesaic.bench.palette import DENSE as DENSE
from moesaic.bench.palette import FOURTH as FOURTH
from moesaic.bench.palette import GRID
from moesaic.bench.palette import INK as INK
from moesaic.bench.palette import MOE as MOE
from moesaic.bench.palette import MUTED as MUTED
from moesaic.bench.palette import PALE_MOE as PALE_MOE
from moesaic.bench.palette import PAPER as PAPER
from moesaic.bench.palette import THIRD as THIRD
from moesaic.bench.words import si

_RC: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "savefig.facecolor": PAPER,
    "svg.fonttype": "none",
    "svg.hashsalt": "moesaic",
}


_PAD = 0.06


@contextmanager
def style() -> Iterator[None]:
    """Draw in the house style; matplotlib's global settings are as before afterwards."""
    with mpl.rc_context(_RC):
        yield


def panels(
    rows: int, columns: int, *, width: float = 3.3, height: float = 2.7, sharex: bool = False, sharey: bool = False
) -> tuple[Figure, list[list[Axes]]]:
    """A figure of ``rows`` × ``columns`` axes, ``width`` × ``height`` inches each, drawn off-screen."""
    figure = Figure(figsize=(width * columns + 0.4, height * rows + 0.3))
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey)
    return figure, [list(line) for line in grid]


LEAST_PANEL = (1.5, 0.5)
"""Inches of width and of height that every panel keeps between its labels."""


def _make_room(figure: Figure) -> None:
    """Enlarge a figure whose labels leave a panel less than `LEAST_PANEL`: such a layout has no solution."""
    inches = figure.dpi
    columns: dict[int, float] = {}
    rows: dict[int, float] = {}
    for axes in figure.axes:
        spec = axes.get_subplotspec()
        around = axes.get_tightbbox(for_layout_only=True)
        if spec is None or around is None:
            continue
        inside = axes.get_window_extent()
        column, row = spec.colspan.start, spec.rowspan.start
        columns[column] = max(columns.get(column, 0.0), (around.width - inside.width) / inches)
        rows[row] = max(rows.get(row, 0.0), (around.height - inside.height) / inches)
    titles = [t.get_window_extent() for t in figure.texts if t.get_in_layout()]
    width, height = figure.get_size_inches()
    beside = max((b.width for b in titles if b.height > b.width), default=0.0) / inches
    above = max((b.height for b in titles if b.width >= b.height), default=0.0) / inches
    least_width = sum(columns.values()) + beside + len(columns) * (LEAST_PANEL[0] + 2 * _PAD)
    least_height = sum(rows.values()) + above + len(rows) * (LEAST_PANEL[1] + 2 * _PAD)
    figure.set_size_inches(max(width, least_width), max(height, least_height))


def settle(figure: Figure) -> None:
    """Lay the panels out, once and not at every drawing: it is slow, and positions in pixels stay true."""
    _make_room(figure)
    ConstrainedLayoutEngine(w_pad=_PAD, h_pad=_PAD).execute(figure)


def save(figure: Figure, folder: Path, name: str) -> str:
    """Write ``name.png`` and ``name.svg`` (equal bytes for equal data) and return the SVG's text."""
    folder.mkdir(parents=True, exist_ok=True)
    with style():
        settle(figure)
        figure.savefig(folder / f"{name}.png", dpi=160, metadata={"Software": None})
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    (folder / f"{name}.svg").write_text(buffer.getvalue(), encoding="utf-8")
    return buffer.getvalue()


def log_axis(axes: Axes, values: Sequence[float], label: str, *, base: float = 10.0) -> None:
    """A logarithmic x axis with ticks in 1-2-5 steps; for ``base=2`` at powers of two, written as fractions.

    Over more than three decades the steps are decades.
    """
    axes.set_xlabel(label)
    known = [v for v in values if math.isfinite(v) and v > 0]
    if not known:
        return
    axes.set_xscale("log", base=base)
    low, high = min(known), max(known)
    steps = (1,) if base == 2.0 or high > 1e3 * low else (1, 2, 5)
    powers = range(math.floor(math.log(low, base)) - 1, math.ceil(math.log(high, base)) + 2)
    ticks = [s * base**e for e in powers for s in steps if low / 1.6 <= s * base**e <= high * 1.6]
    axes.set_xticks(ticks, [_fraction(t) if base == 2.0 else si(t) for t in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(low / 1.45, high * 1.45)


def _fraction(value: float) -> str:
    return f"1/{1 / value:.0f}" if value < 1 else f"{value:.0f}"
