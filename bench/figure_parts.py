"""What the figures share: which cells they show, how a point and its label look, and where labels go."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from moesaic.bench.analysis import LOSS, Cell, Estimate, comparisons, dataset_title
from moesaic.bench.plot_style import DENSE, INK, MOE, MUTED, PAPER, settle

MAX_DATASETS = 6
"""Most data sets that a figure with a panel for each shows."""
Boxes = NDArray[np.float64]


def by_dataset(found: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Cells by data set, in order of first appearance."""
    return {d: [c for c in found if c.dataset == d] for d in dict.fromkeys(c.dataset for c in found)}


def few_datasets(found: Sequence[Cell]) -> list[Cell]:
    """The cells of at most `MAX_DATASETS` data sets: of more, that many at equal distances, both ends among them."""
    names = list(by_dataset(found))
    if len(names) > MAX_DATASETS:
        names = [names[i * (len(names) - 1) // (MAX_DATASETS - 1)] for i in range(MAX_DATASETS)]
    return [c for c in found if c.dataset in names]


def few_architectures(found: Sequence[Cell], most: int) -> list[Cell]:
    """The cells of at most ``most`` architectures: of more, the MoE of lowest loss that fit with their dense partners.

    The loss is judged by the mean over data sets of the place within one, because its level differs between them.
    """
    places: dict[str, list[float]] = {}
    for cells in by_dataset(found).values():
        losses = {c.architecture: loss if math.isfinite(loss := c.mean(LOSS)) else math.inf for c in cells}
        for place, name in enumerate(sorted(losses, key=losses.__getitem__)):
            places.setdefault(name, []).append(place / len(losses))
    if len(places) <= most:
        return list(found)
    ranked = sorted(places, key=lambda name: math.fsum(places[name]) / len(places[name]))
    mixtures = {c.architecture for c in found if c.is_moe}
    best = [name for name in ranked if name in mixtures][:most]
    compared = comparisons([c for c in found if not c.is_moe or c.architecture in best])
    names: dict[str, None] = {}
    for moe in best:
        partners = [c.dense.architecture for c in compared if c.moe.architecture == moe]
        together = names | dict.fromkeys([moe, *partners])
        names = together if not names or len(together) <= most else names
    if names.keys() <= mixtures:
        names |= dict.fromkeys(name for name in ranked if name not in mixtures)
    names = dict.fromkeys([*names][:most])
    return [c for c in found if c.architecture in names]


def left_out(shown: Sequence[Cell], found: Sequence[Cell]) -> str:
    """What to add to a caption where ``shown`` is a part of ``found``; nothing where it is all."""
    parts = []
    counts = [len({c.dataset for c in cells}) for cells in (shown, found)]
    if counts[0] < counts[1]:
        parts.append(f" {counts[0]} of {counts[1]} data sets.")
    here = {c.dataset for c in shown}
    counts = [len({c.architecture for c in cells if c.dataset in here}) for cells in (shown, found)]
    if counts[0] < counts[1]:
        dense = ", and dense models to compare with" if len({c.is_moe for c in shown}) > 1 else ""
        parts.append(f" {counts[0]} of {counts[1]} architectures: those of lowest loss{dense}.")
    return "".join(parts)


def short(cell: Cell) -> str:
    """The label of a point: ``16`` of dense m = 16, ``16×4 k=1`` of an MoE, other names as they are."""
    return cell.architecture.removeprefix("dense m=").removeprefix("MoE ")


def point(axes: Axes, x: float, y: Estimate, color: str, *, filled: bool = True, size: float = 5.5) -> None:
    """A marker with its vertical interval."""
    if math.isfinite(y.low):
        axes.plot([x, x], [y.low, y.high], color=color, linewidth=1.1, solid_capstyle="butt", zorder=3)
    axes.plot(
        [x], [y.mean], marker="D" if color == MOE else "o", markersize=size * (0.88 if color == MOE else 1),
        color=color, markerfacecolor=color if filled else PAPER, zorder=4, linestyle="none",
    )  # fmt: skip


def family_key(figure: Figure, dense: str, moe: str) -> None:
    """The one legend: a line above the panels that names the two families in their colours."""
    figure.suptitle(" ", fontsize=8)
    figure.text(0.012, 0.993, f"● dense ({dense})", color=DENSE, fontsize=9, va="top", fontweight="bold")
    figure.text(0.988, 0.993, f"◆ MoE ({moe})", color=MOE, fontsize=9, va="top", ha="right", fontweight="bold")


def heading(dataset: str, cell: Cell) -> str:
    """The title of a data set's panel, in lines that fit it."""
    title = dataset_title(cell.rows[0])
    return textwrap.fill(dataset if dataset.startswith(title) else f"{dataset}: {title}", 46)


@dataclass(frozen=True)
class Label:
    """A text that belongs to the data point (x, y); an ``optional`` one is left out where there is no room for it."""

    x: float
    y: float
    text: str
    color: str = INK
    optional: bool = False


@dataclass
class Labelled:
    """A panel with the labels it wants and, in data coordinates, what they should not cover."""

    axes: Axes
    labels: list[Label] = field(default_factory=list)
    covered: list[tuple[float, float]] = field(default_factory=list)

    def add(self, label: Label, interval: Estimate) -> None:
        """Want a label at a point whose vertical interval is to stay visible."""
        self.labels.append(label)
        if math.isfinite(interval.low):
            self.covered += [(label.x, interval.low + t * (interval.high - interval.low)) for t in (0, 0.25, 0.75, 1)]

    def add_line(self, points: Sequence[tuple[float, float]]) -> None:
        """Keep labels off the straight lines between ``points``."""
        for (x0, y0), (x1, y1) in pairwise(points):
            self.covered += [(x0 ** (1 - t) * x1**t, y0 + (y1 - y0) * t) for t in (0.2, 0.4, 0.6, 0.8)]


MAX_LABELS = 24
"""Most labels of a panel; of a fuller one `MAX_RIM` points at the rim of the cloud are labelled."""
MAX_RIM = 8
_RADII = (6.0, 9.0, 14.0, 20.0, 28.0)
_ANGLES = np.arange(16) * math.pi / 8
_LINE_FROM = 12.0


def place_labels(figure: Figure, panels: Sequence[Labelled], *, size: float = 7.5) -> None:
    """Write each label next to its point, where it overlaps points, lines, earlier labels and the frame least.

    Call it last: it settles the layout, because the choice is made in pixels.
    """
    settle(figure)
    for panel in panels:
        _place(panel, figure.dpi / 72, size)


def _place(panel: Labelled, pixels: float, size: float) -> None:
    axes = panel.axes
    frame = np.array([axes.get_window_extent().extents])

    def squares(points: Sequence[tuple[float, float]], half: float) -> Boxes:
        centres = np.asarray(axes.transData.transform(np.reshape(np.asarray(points, dtype=float), (-1, 2))))
        return np.concatenate([centres - half * pixels, centres + half * pixels], axis=1)

    taken = np.concatenate([squares([(label.x, label.y) for label in panel.labels], 4), squares(panel.covered, 2)])
    for label in sorted(_labelled(panel.labels), key=lambda item: item.optional):
        x, y = axes.transData.transform((label.x, label.y))
        width, height = _extent(axes, label.text, size)
        boxes, radii = _candidates(x, y, width, height, pixels, _RADII[: 2 if label.optional else None])
        hidden = _overlap(boxes, taken).sum(1) + 2 * (width * height - _overlap(boxes, frame)[:, 0])
        best = int(np.argmin(hidden + 2 * radii * pixels**2))
        if label.optional and hidden[best] > 0.12 * width * height:
            continue
        taken = np.concatenate([taken, boxes[best : best + 1]])
        line = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
        axes.annotate(
            label.text, (label.x, label.y),
            xytext=((boxes[best, 0] - x) / pixels, (boxes[best, 1] - y) / pixels), textcoords="offset points",
            ha="left", va="bottom", fontsize=size, color=label.color, in_layout=False, zorder=5,
            arrowprops=line if radii[best] > _LINE_FROM else None,
        )  # fmt: skip


def _labelled(labels: Sequence[Label]) -> Sequence[Label]:
    """All of few labels; of many, some of the points than which none is further in both of two directions."""
    if len(labels) <= MAX_LABELS:
        return labels
    corners = [(right, up) for right in (-1, 1) for up in (-1, 1)]
    rim = [one for one in labels if any(not any(_beyond(o, one, *c) for o in labels) for c in corners)]
    return rim if len(rim) <= MAX_RIM else [rim[i * len(rim) // MAX_RIM] for i in range(MAX_RIM)]


def _beyond(other: Label, label: Label, right: int, up: int) -> bool:
    x, y = right * (other.x - label.x), up * (other.y - label.y)
    return x >= 0 and y >= 0 and (x > 0 or y > 0)


def _candidates(
    x: float, y: float, width: float, height: float, pixels: float, radii: Sequence[float]
) -> tuple[Boxes, Boxes]:
    """Boxes (c, 4) around the point (x, y) in every direction at every radius, and their radii (c,) in points."""
    radius, angle = (a.ravel() for a in np.meshgrid(radii, _ANGLES, indexing="ij"))
    dx, dy = np.cos(angle), np.sin(angle)
    left = x + radius * dx * pixels - width * (0.5 - np.clip(0.8 * dx, -0.5, 0.5))
    bottom = y + radius * dy * pixels - height * (0.5 - np.clip(0.8 * dy, -0.5, 0.5))
    return np.stack([left, bottom, left + width, bottom + height], axis=1), radius


def _extent(axes: Axes, text: str, size: float) -> tuple[float, float]:
    probe = axes.text(0, 0, text, fontsize=size)
    extent = probe.get_window_extent()
    probe.remove()
    return float(extent.width), float(extent.height)


def _overlap(boxes: Boxes, others: Boxes) -> Boxes:
    """Areas (a, b) that the boxes (a, 4) share with the boxes (b, 4), each x0, y0, x1, y1."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return np.asarray(np.clip(high - low, 0, None).prod(axis=2))
