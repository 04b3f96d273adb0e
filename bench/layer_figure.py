"""The figure of ``moesaic bench layer`` and ``grouped-matmul``: speed under the roof, and times against ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from moesaic.bench.bench_layer import GIVEN, Measured, three
from moesaic.bench.interleave import ratio
from moesaic.bench.layer_cases import SHORT
from moesaic.bench.layer_peers import OURS
from moesaic.bench.palette import DENSE, FOURTH, INK, MOE, MUTED, THIRD
from moesaic.bench.plot_style import log_axis, panels, save, style
from moesaic.bench.roofline import Roof


def draw(found: Sequence[Measured], roof: Roof, name: str, folder: Path) -> list[Path]:
    """FLOP/s against intensity under the roof, forward and with the gradient; below, times of the peers over ours."""
    if not found:
        return []
    with style():
        figure, axes = panels(2, 2, width=4.4, height=1.0)
        height = 0.9 + max(0.25, 0.13 * (len(looks(found)) - 1)) * len(found)
        figure.set_size_inches(9.2, 3.6 + height)
        if (grid := axes[0][0].get_gridspec()) is not None:
            grid.set_height_ratios([3.6, height])
        for column, (backward, which) in enumerate(GIVEN.items()):
            above, below = axes[0][column], axes[1][column]
            above.sharey(axes[0][0])
            _draw_roof(above, found, roof, backward)
            _draw_ratios(below, found, backward)
            above.set_title(which.capitalize())
            below.set_title(f"{which.capitalize()}: peer's time over ours")
        axes[0][0].set_ylabel(f"useful {_unit(roof)[1]}")
        axes[1][0].set_ylabel("T, d, n, E, k")
        axes[1][1].tick_params(labelleft=False)
        handles = {
            label: handle for line in axes[0] for handle, label in zip(*line.get_legend_handles_labels(), strict=True)
        }
        given = list(handles.values())
        columns = min(5, len(given))
        figure.legend(given, [*handles], loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
        save(figure, folder, f"bench-{name}")
    return [folder / f"bench-{name}.{kind}" for kind in ("png", "svg")]


def looks(found: Sequence[Measured]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each side."""
    shown = (MUTED, "v"), (INK, "P"), (DENSE, "X"), (THIRD, "<"), (FOURTH, ">")
    given = [(DENSE, "s"), (THIRD, "D"), (FOURTH, "^"), *shown]
    names = dict.fromkeys(name for one in found for timings in one.timings.values() for name in timings)
    peers = [name for name in names if name != OURS]
    return {OURS: (MOE, "o"), **dict(zip(peers, given, strict=False))}


def _draw_roof(axes: Axes, found: Sequence[Measured], roof: Roof, backward: bool) -> None:
    unit, unit_name = _unit(roof)
    reach = [one.intensity(given) for one in found for given in one.timings]
    low, high = min(reach) / 2, max(reach) * 2
    by_rate = {roof.rate(dtype): dtype for dtype in reversed([*dict.fromkeys(one.case.dtype for one in found)])}
    for (rate, dtype), dashes in zip(by_rate.items(), ("-", "--", ":"), strict=False):
        ends = sorted({low, high, min(max(roof.ridge(dtype), low), high)})
        label = "measured roof" if len(by_rate) == 1 else f"roof, {SHORT[dtype]}"
        axes.plot(
            ends, [roof.attainable(end, dtype) for end in ends], dashes, color=MUTED, lw=1.2, label=label, zorder=1
        )
        beside: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "fontsize": 7, "color": MUTED}
        words = f"{three(rate / unit)} {unit_name}"
        axes.annotate(words, (high, roof.attainable(high, dtype)), (-2, 3), **beside)
    here = [(number, one) for number, one in enumerate(found, 1) if backward in one.timings]
    for name, (colour, marker) in looks(found).items():
        marks = [
            (one.intensity(backward), one.rate(backward, name)) for _, one in here if name in one.timings[backward]
        ]
        # Ours is drawn last.
        size, order = (5.5, 4) if name == OURS else (4.0, 3)
        x, y = [x for x, _ in marks], [y for _, y in marks]
        axes.plot(x, y, marker, color=colour, ms=size, mew=0, label=name, zorder=order, alpha=0.9)
    free: list[tuple[float, float]] = []
    for number, one in here:
        at = (one.intensity(backward), one.rate(backward, OURS))
        # Numbers on top of one another say nothing; the first of a cluster stands for it.
        if all(abs(math.log(at[0] / x)) > 0.2 or abs(math.log(at[1] / y)) > 0.4 for x, y in free):
            free.append(at)
            axes.annotate(str(number), at, (-5, 0), textcoords="offset points", ha="right", va="center", fontsize=7)
    axes.set(xscale="log", yscale="log", xlabel="useful FLOPs per byte that has to move", xlim=(low, high))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value / unit:g}")


def _unit(roof: Roof) -> tuple[float, str]:
    """What a figure's FLOP/s are counted in."""
    return (1e12, "TFLOP/s") if max(roof.matrix_flops.values()) > 1e13 else (1e9, "GFLOP/s")


def _draw_ratios(axes: Axes, found: Sequence[Measured], backward: bool) -> None:
    marks = looks(found)
    peers = [name for name in marks if name != OURS]
    ends = [1.0]
    axes.axvline(1.0, color=MUTED, lw=1.0)
    for place, name in enumerate(peers):
        shift = 0.7 * ((place + 0.5) / len(peers) - 0.5)
        for y, one in enumerate(found):
            timings = one.timings.get(backward, {})
            if name not in timings:
                continue
            times = ratio(timings[name], timings[OURS])
            bars = [[times["median"] - times["low"]], [times["high"] - times["median"]]]
            colour, marker = marks[name]
            axes.errorbar(times["median"], y + shift, xerr=bars, fmt=marker, color=colour, ms=4, mew=0, elinewidth=1)
            axes.annotate(
                three(times["median"]), (times["high"], y + shift), (4, 0), textcoords="offset points", va="center",
                fontsize=6.5,
            )  # fmt: skip
            ends += [times["low"], times["high"]]
    axes.set_yticks(range(len(found)), [f"{number}:  {one.case.name}" for number, one in enumerate(found, 1)])
    axes.set_ylim(len(found) - 0.4, -0.6)
    log_axis(axes, [*ends, 1.5 * max(ends)], "ratio (bars: lowest to highest round)")
