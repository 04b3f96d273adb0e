"""The figure of ``moesaic bench layer`` and ``grouped-matmul``: times of the peers over ours, case by case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from moesaic.bench import roof_figure
from moesaic.bench.bench_layer import GIVEN, Measured, three
from moesaic.bench.interleave import ratio
from moesaic.bench.layer_peers import OURS
from moesaic.bench.palette import MUTED
from moesaic.bench.plot_style import log_axis, panels, save, style


def draw(found: Sequence[Measured], name: str, folder: Path) -> list[Path]:
    """Ratios forward (left) and with the gradient (right), bars from the lowest to the highest round; [] of nothing."""
    if not found:
        return []
    height = 0.6 + max(0.3, 0.13 * (len(looks(found)) - 1)) * len(found)
    with style():
        figure, (axes,) = panels(1, 2, width=4.4, height=height)
        for one, (backward, which) in zip(axes, GIVEN.items(), strict=True):
            _draw_ratios(one, found, backward)
            one.set_title(f"{which.capitalize()}: peer's time over ours")
        axes[0].set_ylabel("T, d, n, E, k")
        axes[1].tick_params(labelleft=False)
        handles = {
            label: handle for one in axes for handle, label in zip(*one.get_legend_handles_labels(), strict=True)
        }
        if handles:
            figure.legend(
                [*handles.values()], [*handles], loc="outside lower center", ncols=min(4, len(handles)), frameon=False,
                fontsize=8,
            )  # fmt: skip
        save(figure, folder, f"bench-{name}")
    return [folder / f"bench-{name}.{kind}" for kind in ("png", "svg")]


def looks(found: Sequence[Measured]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each side."""
    names = dict.fromkeys(name for one in found for timings in one.timings.values() for name in timings)
    return roof_figure.looks([*dict.fromkeys([OURS, *names])])


def _draw_ratios(axes: Axes, found: Sequence[Measured], backward: bool) -> None:
    marks = looks(found)
    peers = [name for name in marks if name != OURS]
    ends = [1.0]
    axes.axvline(1.0, color=MUTED, lw=1.0)
    for place, name in enumerate(peers):
        shift = 0.7 * ((place + 0.5) / len(peers) - 0.5)
        colour, marker = marks[name]
        label = name
        for y, one in enumerate(found):
            timings = one.timings.get(backward, {})
            if name not in timings:
                continue
            times = ratio(timings[name], timings[OURS])
            bars = [[times["median"] - times["low"]], [times["high"] - times["median"]]]
            axes.errorbar(
                times["median"], y + shift, xerr=bars, fmt=marker, color=colour, ms=4, mew=0, elinewidth=1, label=label
            )
            label = "_"
            axes.annotate(
                three(times["median"]), (times["high"], y + shift), (4, 0), textcoords="offset points", va="center",
                fontsize=6.5,
            )  # fmt: skip
            ends += [times["low"], times["high"]]
    axes.set_yticks(range(len(found)), [one.case.name for one in found])
    axes.set_ylim(len(found) - 0.4, -0.6)
    log_axis(axes, [*ends, 1.5 * max(ends)], "ratio (bars: lowest to highest round)")
