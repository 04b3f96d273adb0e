"""The figure of ``moesaic bench million``: time of a step against n, and speed-up against E."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw(rows: Sequence[Mapping[str, Any]], fits: Mapping[str, float], folder: Path) -> list[Path]:
    """Draw it into ``folder``; rows are the benchmark's, fits the exponents by model."""
    from moesaic.bench.palette import DENSE, MOE, MUTED
    from moesaic.bench.plot_style import log_axis, panels, save, style

    looks = {name: look for name, look in zip(fits, ((DENSE, "s"), (MOE, "o")), strict=True)}
    with style():
        figure, axes = panels(1, 2, width=3.7, height=2.9)
        left, right = axes[0]
        curve = [row for row in rows if row["case"] == "curve"]
        for name, (colour, marker) in looks.items():
            points = [(row["n_features"], row["ms"]) for row in curve if row["model"] == name]
            left.plot(
                [n for n, _ in points], [ms for _, ms in points], marker + "-", color=colour, ms=4.5,
                label=f"{name}: $n^{{{fits[name]:.2f}}}$",
            )  # fmt: skip
        log_axis(left, [float(row["n_features"]) for row in curve], "features n")
        left.set_yscale("log")
        left.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        left.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
        left.set_ylabel("ms per exact step")
        left.set_title("Time of a step against n")
        left.legend()
        experts = [row for row in rows if row["case"] == "experts"]
        across = [float(row["n_experts"]) for row in experts]
        lines = (
            ("active FLOPs", [row["active_flops_ratio"] for row in experts], MUTED, "^", "--"),
            ("bytes", [row["bytes_ratio"] for row in experts], MUTED, "v", ":"),
            ("measured time", [row["speedup"]["median"] for row in experts], MOE, "o", "-"),
        )
        for label, values, colour, marker, dash in lines:
            right.plot(across, values, marker, ls=dash, color=colour, ms=4.5, label=label)
        right.set_xscale("log", base=2)
        right.set_yscale("log", base=2)
        right.set_xticks(across, [f"{value:.0f}" for value in across])
        ticks = [2.0**power for power in range(-1, 6) if 2.0**power <= 1.2 * max(map(max, (v for _, v, *_ in lines)))]
        right.set_yticks(ticks, [f"{tick:g}×" for tick in ticks])
        for axis in (right.xaxis, right.yaxis):
            axis.set_ticks([], minor=True)
        right.set_xlabel("E/k at equal total width")
        right.set_ylabel("dense over MoE")
        right.set_title("Speed-up against what is saved")
        right.legend()
        save(figure, folder, "million")
    return [folder / "million.png", folder / "million.svg"]
