"""Figures under a measured roof: that of every benchmark with points, and the roof itself.

products   useful FLOP/s against FLOPs per byte that has to move, under min(matrix rate, intensity · bandwidth)
bytes      bytes/s against bytes that have to move, under the bandwidth: for work without products
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moesaic.bench.figure_parts import Label, Labelled, place_labels
from moesaic.bench.palette import DENSE, FOURTH, INK, MOE, MUTED, THIRD
from moesaic.bench.plot_style import panels, save, style
from moesaic.bench.roofline import Roof, RoofPoint
from moesaic.bench.words import si, si_unit

Kind = Literal["products", "bytes"]
Ends = tuple[float, float]
UNIT: Mapping[Kind, str] = {"products": "FLOP/s", "bytes": "B/s"}
ACROSS: Mapping[Kind, str] = {
    "products": "useful FLOPs per byte that has to move", "bytes": "bytes that have to move"
}  # fmt: skip
PANEL_HEIGHT, KEY_LINE = 3.1, 0.155
KEY_LETTERS, KEY_BESIDE, LEGEND_LETTERS, LEGEND_BESIDE = 170, 5, 135, 9
"""Letters of the key and of the legend that a line of 9 inches has room for, and those that stay free in a column."""


def looks(sides: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each side, the first being the one that the others are compared with."""
    shown = (MUTED, "v"), (INK, "P"), (DENSE, "X"), (THIRD, "<"), (FOURTH, ">")
    return dict(zip(sides, [(MOE, "o"), (DENSE, "s"), (THIRD, "D"), (FOURTH, "^"), *shown], strict=False))


def draw_points(points: Sequence[RoofPoint], roof: Roof, key: str, folder: Path, name: str) -> list[Path]:
    """Draw a panel per group and kind of work into ``name.png`` and ``name.svg``, with a key to the points' numbers.

    Args:
        points: one or more; equal labels share a number, sides have colours in order of first appearance.
        roof: the device's.
        key: what the labels say.
        folder: where to.
        name: of the files.
    """
    numbers = {label: number for number, label in enumerate(dict.fromkeys(point.label for point in points), 1)}
    marks = looks([*dict.fromkeys(point.side for point in points)])
    kinds = {kind: [point for point in points if _kind(point) == kind] for kind in UNIT}
    groups = [(kind, group) for kind, here in kinds.items() for group in dict.fromkeys(point.group for point in here)]
    columns = min(2, len(groups))
    lines = -(-len(groups) // columns)
    # A figure space is as wide as a digit.
    texts = [f"{number:\u2007>3}   {label}" for label, number in numbers.items()]
    key_lines = -(-len(texts) // len(_columns(texts, KEY_BESIDE, KEY_LETTERS)))
    # Numbers that find no room next to their points go above the roof.
    height = PANEL_HEIGHT + 0.06 * max(0, len(numbers) - 8)
    with style():
        figure, axes = panels(lines + 1, columns, width=4.4, height=1.0)
        heights = [height] * lines + [KEY_LINE * (key_lines + 1)]
        figure.set_size_inches(9.2, sum(heights) + 0.5)
        cells = [axis for line in axes for axis in line]
        grid = cells[0].get_gridspec()
        assert grid is not None
        grid.set_height_ratios(heights)
        for axis in cells[len(groups) :]:
            axis.remove()
        labelled = []
        for axis, (kind, group) in zip(cells, groups, strict=False):
            ends = _ends(kinds[kind], kind, roof)
            here = [point for point in kinds[kind] if point.group == group]
            dtypes = [*dict.fromkeys(point.dtype for point in kinds[kind])]
            labelled.append(_draw_panel(axis, here, kind, roof, dtypes, ends, numbers, marks))
            axis.set_title(group[:1].upper() + group[1:])
            axis.set_ylabel(UNIT[kind] if kind == "bytes" else f"useful {UNIT[kind]}")
        _draw_key(figure.add_subplot(grid[-1, :]), texts, key)
        _legend(figure, cells[: len(groups)], marks)
        place_labels(figure, labelled, size=7)
        save(figure, folder, name)
    return [folder / f"{name}.{ending}" for ending in ("png", "svg")]


def _kind(point: RoofPoint) -> Kind:
    return "products" if point.flops else "bytes"


def _place(point: RoofPoint) -> tuple[float, float]:
    """Where a point lies: across, and its speed."""
    if point.flops:
        return point.flops / point.n_bytes, point.flops / point.seconds
    return point.n_bytes, point.n_bytes / point.seconds


def _ends(points: Sequence[RoofPoint], kind: Kind, roof: Roof) -> tuple[Ends, Ends]:
    """The range of both axes, equal for all panels of a kind: all points, the roof with its ridge, room for numbers."""
    across, speeds = ([values[i] for values in map(_place, points)] for i in (0, 1))
    if kind == "bytes":
        speeds.append(roof.copy_bytes_per_s)
    else:
        dtypes = {point.dtype for point in points}
        # Left of the ridge some of the slope.
        across += [roof.ridge(dtype) / 2 for dtype in dtypes]
        speeds += [roof.rate(dtype) for dtype in dtypes]
    low, high = min(speeds) / 2, max(speeds)
    above = (high / low) ** (0.1 + len({point.label for point in points}) / 150)
    return (min(across) / 2, 2 * max(across)), (low, high * above)


def _draw_panel(
    axes: Axes, points: Sequence[RoofPoint], kind: Kind, roof: Roof, dtypes: Sequence[str], ends: tuple[Ends, Ends],
    numbers: Mapping[str, int], marks: Mapping[str, tuple[str, str]],
) -> Labelled:  # fmt: skip
    """A roof, the points below it, and the numbers that they want."""
    (low, high), _ = ends
    panel = Labelled(axes)
    copied = si_unit(roof.copy_bytes_per_s, "B/s")
    if kind == "bytes":
        axes.axhline(roof.copy_bytes_per_s, color=MUTED, lw=1.2, label=f"a copy: {copied}", zorder=1)
        panel.covered += [(_between(low, high, t / 48), roof.copy_bytes_per_s) for t in range(49)]
    else:
        rates: dict[float, list[str]] = {}
        for dtype in dtypes:
            rates.setdefault(roof.rate(dtype), []).append(dtype)
        for (rate, those), dash in zip(rates.items(), ("-", "--", ":", "-."), strict=False):
            label = f"roof, {' and '.join(those)}: {si_unit(rate, 'FLOP/s')}, {copied}"
            line = draw_line(axes, rate, roof.copy_bytes_per_s, (low, high), color=MUTED, ls=dash, label=label)
            panel.covered += line
    for name, (colour, marker) in marks.items():
        places = [_place(point) for point in points if point.side == name]
        if not places:
            continue
        # The first side is drawn last.
        first = name == next(iter(marks))
        size, order = (5.5, 4) if first else (4.0, 3)
        axes.plot(
            [x for x, _ in places],
            [y for _, y in places],
            marker,
            color=colour,
            ms=size,
            mew=0,
            label=name,
            zorder=order,
            alpha=0.9,
        )
        panel.covered += places
    numbered: set[tuple[str, float]] = set()
    for point in sorted(points, key=lambda point: [*marks].index(point.side)):
        x, y = _place(point)
        # Sides of one case lie above one another; one number stands for all.
        if (point.label, x) not in numbered:
            numbered.add((point.label, x))
            # Spaces keep two numbers side by side from reading as one.
            panel.labels.append(Label(x, y, f" {numbers[point.label]} "))
    _scale(axes, ends)
    axes.set_xlabel(ACROSS[kind])
    return panel


def _between(low: float, high: float, share: float) -> float:
    return math.exp((1 - share) * math.log(low) + share * math.log(high))


def draw_line(axes: Axes, rate: float, bandwidth: float, ends: Ends, **look: Any) -> list[tuple[float, float]]:
    """Draw min(rate, x · bandwidth) between two intensities, and return some of its points."""
    ridge = min(max(rate / bandwidth, ends[0]), ends[1])
    corners = [ends[0], ridge, ends[1]]
    axes.plot(corners, [min(rate, x * bandwidth) for x in corners], **{"lw": 1.2, "zorder": 1, **look})
    across = [_between(*ends, t / 48) for t in range(49)]
    return [(x, min(rate, x * bandwidth)) for x in across]


def _scale(axes: Axes, ends: tuple[Ends, Ends]) -> None:
    """Logarithmic axes with ticks at decades, or in 1-2-5 steps over two decades or less."""
    axes.set(xscale="log", yscale="log", xlim=ends[0], ylim=ends[1])
    for axis, (low, high) in ((axes.xaxis, ends[0]), (axes.yaxis, ends[1])):
        steps = (1, 2, 5) if high <= 100 * low else (1,)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
        axis.set_ticks(ticks, [si(tick) for tick in ticks])
        axis.set_ticks([], minor=True)


def _columns(words: Sequence[str], beside: int, room: int) -> list[int]:
    """Letters that each column takes, ``beside`` of them next to its longest word: as many columns as ``room`` has."""
    found: list[int] = []
    for count in range(1, len(words) + 1):
        lines = -(-len(words) // count)
        widths = [max(map(len, words[i : i + lines])) + beside for i in range(0, len(words), lines)]
        if not found or sum(widths) <= room:
            found = widths
    return found


def _draw_key(axes: Axes, texts: Sequence[str], key: str) -> None:
    axes.axis("off")
    widths = _columns(texts, KEY_BESIDE, KEY_LETTERS)
    lines = -(-len(texts) // len(widths))
    where: dict[str, Any] = {"transform": axes.transAxes, "va": "top", "fontsize": 7, "in_layout": False}
    axes.text(0, 1, f"numbers: {key}", color=MUTED, **where)
    for i, text in enumerate(texts):
        column, line = divmod(i, lines)
        axes.text(sum(widths[:column]) / KEY_LETTERS, 1 - (line + 1) / (lines + 1), text, **where)


def _legend(figure: Figure, axes: Sequence[Axes], sides: Container[str]) -> None:
    """Below all panels, the roofs first."""
    found = {label: handle for one in axes for handle, label in zip(*one.get_legend_handles_labels(), strict=True)}
    names = sorted(found, key=lambda name: name in sides)
    columns = len(_columns(names, LEGEND_BESIDE, LEGEND_LETTERS))
    handles = [found[name] for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def draw_roofs(roofs: Mapping[str, Roof], folder: Path, name: str) -> list[Path]:
    """Draw the lines of each dtype with their ridges into ``name.png`` and ``name.svg``.

    ``roofs``: by what to call them, such as ``2 threads``; the first in full lines, further ones dashed.
    """
    first = next(iter(roofs.values()))
    colours = dict(zip(first.matrix_flops, (MOE, DENSE, THIRD, FOURTH, INK), strict=False))
    ridges = [rate / roof.copy_bytes_per_s for roof in roofs.values() for rate in roof.matrix_flops.values()]
    low, high = min(ridges) / 6, max(ridges) * 12
    speeds = [rate for roof in roofs.values() for rate in (*roof.matrix_flops.values(), low * roof.copy_bytes_per_s)]
    with style():
        figure, ((axes,),) = panels(1, 1, width=7.4, height=4.2)
        panel = Labelled(axes)
        names: list[tuple[float, str, str]] = []
        for (title, roof), dash in zip(roofs.items(), ("-", "--"), strict=False):
            bandwidth = roof.copy_bytes_per_s
            for dtype, rate in roof.matrix_flops.items():
                ridge = rate / bandwidth
                line = {"color": colours[dtype], "ls": dash, "lw": 1.6}
                panel.covered += draw_line(axes, rate, bandwidth, (ridge, high), **line)
                axes.plot([ridge], [rate], "o", color=colours[dtype], ms=5, mew=0, zorder=3)
                panel.labels.append(Label(ridge, rate, f"{si(ridge)}", colours[dtype]))
                words = f"{dtype}{f', {title}' if len(roofs) > 1 else ''}: {si_unit(rate, 'FLOP/s')}"
                names.append((rate, words, colours[dtype]))
            top = max(roof.matrix_flops.values())
            panel.covered += draw_line(axes, top, bandwidth, (low, top / bandwidth), color=MUTED, ls=dash)
            copied = f"{f'{title}: ' if len(roofs) > 1 else ''}a copy moves {si_unit(bandwidth, 'B/s')}"
            axes.plot([], [], dash, color=MUTED, label=copied)
        _scale(axes, ((low, high), (min(speeds), 1.8 * max(speeds))))
        axes.set(xlabel="FLOPs per byte", ylabel="FLOP/s at most")
        axes.set_title(f"{first.device}: products and a copy, with the ridge in FLOPs per byte")
        axes.legend(loc="lower right", frameon=False, fontsize=8)
        _name_lines(axes, names, (min(speeds), 1.8 * max(speeds)))
        place_labels(figure, [panel])
        save(figure, folder, name)
    return [folder / f"{name}.{ending}" for ending in ("png", "svg")]


def _name_lines(axes: Axes, names: Sequence[tuple[float, str, str]], ends: Ends) -> None:
    """Write (rate, words, colour) to the right of the lines' ends, moved apart where they would overlap."""
    gap, reach = 0.05, math.log(ends[1] / ends[0])
    below = -math.inf
    for rate, words, colour in sorted(names):
        at = math.log(rate / ends[0]) / reach
        below = max(at, below + gap)
        line = {"arrowstyle": "-", "color": colour, "lw": 0.6, "shrinkA": 1, "shrinkB": 0, "relpos": (0, 0.5)}
        axes.annotate(
            words, (1.0, at), xytext=(1.03, below), xycoords="axes fraction", textcoords="axes fraction", color=colour,
            va="center", fontsize=8, arrowprops=line,
        )  # fmt: skip
