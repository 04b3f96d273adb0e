"""The second figure of ``moesaic bench layer``: times of the peers over ours, against tokens and against experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.axes import Axes

from moesaic.bench.bench_layer import GIVEN, Measured, three
from moesaic.bench.interleave import ratio
from moesaic.bench.layer_cases import SHORT, Case
from moesaic.bench.layer_figure import looks
from moesaic.bench.layer_peers import OURS
from moesaic.bench.palette import MUTED
from moesaic.bench.plot_style import log_axis, panels, save, style

LEAST_POINTS = 3


def sweeps(found: Sequence[Measured], varied: Callable[[Case], Case]) -> list[list[Measured]]:
    """Cases that differ only in what ``varied`` sets to 0, `LEAST_POINTS` or more of them; the longest list first."""
    groups: dict[Case, list[Measured]] = {}
    for one in found:
        groups.setdefault(replace(varied(one.case), group=""), []).append(one)
    return sorted((group for group in groups.values() if len(group) >= LEAST_POINTS), key=len, reverse=True)


def draw_sweeps(found: Sequence[Measured], name: str, folder: Path) -> list[Path]:
    """Ratios against T (left) and against E (right), forward above, forward and backward below; [] without a sweep."""
    over_tokens = sweeps(found, lambda case: replace(case, n_tokens=0))[:1]
    over_experts = sweeps(found, lambda case: replace(case, n_experts=0))[:1]
    columns = [(chosen, key) for group, key in ((over_tokens, "T"), (over_experts, "E")) for chosen in group]
    if not columns:
        return []
    with style():
        figure, axes = panels(2, len(columns), width=4.4, height=2.6)
        for column, (group, key) in enumerate(columns):
            for row, (backward, which) in enumerate(GIVEN.items()):
                _draw_sweep(axes[row][column], group, looks(found), key, backward)
                axes[row][column].set_title(which.capitalize())
                axes[row][column].set_ylabel("peer's time over ours" if column == 0 else "")
        handles = {
            label: handle
            for line in axes
            for one in line
            for handle, label in zip(*one.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            [*handles.values()], [*handles], loc="outside lower center", ncols=min(4, len(handles)), frameon=False,
            fontsize=8,
        )  # fmt: skip
        save(figure, folder, f"bench-{name}-sweeps")
    return [folder / f"bench-{name}-sweeps.{kind}" for kind in ("png", "svg")]


def _fixed(case: Case, key: str) -> str:
    first = f"E = {case.n_experts}" if key == "T" else f"T = {case.n_tokens}"
    return f"{first}, d = {case.d_model}, n = {case.d_ff}, k = {case.top_k}, {SHORT[case.dtype]}"


def _draw_sweep(
    axes: Axes, group: Sequence[Measured], marks: dict[str, tuple[str, str]], key: str, backward: bool
) -> None:
    def place(one: Measured) -> int:
        return one.case.n_tokens if key == "T" else one.case.n_experts

    here = sorted((one for one in group if backward in one.timings), key=place)
    axes.axhline(1.0, color=MUTED, lw=1.0)
    ends = [1.0]
    for name, (colour, marker) in marks.items():
        points = [(place(one), ratio(one.timings[backward][name], one.timings[backward][OURS])) for one in here
                  if name != OURS and name in one.timings[backward]]  # fmt: skip
        if not points:
            continue
        x, times = [x for x, _ in points], [times for _, times in points]
        middle = [one["median"] for one in times]
        axes.fill_between(
            x, [one["low"] for one in times], [one["high"] for one in times], color=colour, alpha=0.15, lw=0
        )
        axes.plot(x, middle, color=colour, marker=marker, ms=4.5, mew=0, lw=1.3, label=name)
        axes.annotate(three(middle[-1]), (x[-1], middle[-1]), (5, 0), textcoords="offset points", va="center",
                      fontsize=7, color=colour)  # fmt: skip
        ends += middle
    label = f"{'tokens T' if key == 'T' else 'experts E'}  ({_fixed(group[0].case, key)})"
    log_axis(axes, [place(one) for one in here], label, base=2.0)
    axes.set_yscale("log")
    low, high = min(ends) / 1.3, max(ends) * 1.3
    steps = [s * 10.0**e for e in range(-2, 4) for s in (1, 2, 5) if low <= s * 10.0**e <= high]
    axes.set_yticks(steps, [f"{step:g}" for step in steps])
    axes.set_yticks([], minor=True)
    axes.set_ylim(low, high)
