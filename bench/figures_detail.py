"""Figures that look inside the models: expert usage, gates, dimensionality, features per dimension, a swept column."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moesaic.bench.analysis import DIMENSIONALITY, LOSS, Cell, in_grid, number
from moesaic.bench.figure_parts import by_dataset, heading, point
from moesaic.bench.plan import Row
from moesaic.bench.plot_style import DENSE, FOURTH, INK, MOE, MUTED, THIRD, log_axis, panels
from moesaic.moe.config import FeatureConfig, ToyConfig, TrainConfig

MAX_LINES = 6
_LINES = (DENSE, MOE, THIRD, FOURTH, INK, MUTED)
NAMED_DIMENSIONALITIES = ((2 / 5, "2/5"), (1 / 2, "1/2"), (2 / 3, "2/3"))


def _vector(cell: Cell, key: str, *, descending: bool = False) -> list[float]:
    """Mean over seeds of a list column, each seed's list sorted first where entries are exchangeable."""
    lists = [[float(v) for v in found] for row in cell.rows if isinstance(found := row.get(key), list)]
    lists = [sorted(values, reverse=True) if descending else values for values in lists]
    return [math.fsum(column) / len(lists) for column in zip(*lists, strict=True)]


def routed(found: Sequence[Cell]) -> list[Cell]:
    """What `expert_usage` can show: the MoE whose usage was measured."""
    return [c for c in in_grid(found) if c.is_moe and _vector(c, "usage")]


def expert_usage(shown: Sequence[Cell]) -> Figure:
    """Share of the assignments that each expert takes, most used first."""
    names = list(dict.fromkeys(c.architecture for c in shown))
    data = by_dataset(shown)
    figure, grid = panels(len(names), len(data), height=1.15 + 0.9 / len(names))
    for line, name in zip(grid, names, strict=True):
        for axes, (dataset, here) in zip(line, data.items(), strict=True):
            axes.set_xticks([])
            axes.grid(visible=False)
            axes.margins(x=0)
            axes.axhline(1.0, color=MUTED, linewidth=0.8, linestyle=(0, (3, 2)), zorder=4)
            for cell in (c for c in here if c.architecture == name):
                usage = _vector(cell, "usage", descending=True)
                heights = [u * len(usage) / math.fsum(usage) for u in usage]
                axes.stairs(heights, range(len(usage) + 1), fill=True, color=MOE)
                effective = cell.estimate("effective_experts").mean
                axes.text(
                    0.99,
                    0.9,
                    f"effective experts {effective:.1f} of {len(usage)}",
                    transform=axes.transAxes,
                    ha="right",
                    va="top",
                    fontsize=8,
                )
            if line is grid[0]:
                axes.set_title(heading(dataset, here[0]))
            if line is grid[-1]:
                axes.set_xlabel("experts, most used first")
        line[0].set_ylabel(name.removeprefix("MoE "), rotation=0, ha="right", va="center", color=MOE, fontweight="bold")
        top = max(axes.get_ylim()[1] for axes in line)
        for axes in line:
            axes.set_ylim(0, 1.3 * top)
    figure.supylabel("share of assignments ÷ equal share", fontsize=9, color=INK)
    return figure


def gate_slice(found: Sequence[Cell]) -> Figure | None:
    """Loss, effective experts and mean D_i of the same experts under different gates and with a shared expert."""
    sliced = [c for c in found if c.value("slice") == "gates"]
    kin = {(c.dataset, c.value("n_experts"), c.value("top_k")) for c in sliced}
    shown = [c for c in found if c.is_moe and (c.dataset, c.value("n_experts"), c.value("top_k")) in kin]
    shown.sort(key=lambda c: (int(str(c.value("top_k"))), c.mean(LOSS)))
    if not sliced or len({c.dataset for c in shown}) > 1 or len(shown) > 3 * MAX_LINES:
        return None
    columns = (
        (LOSS, "unexplained variance (held-out)"),
        ("effective_experts", f"effective experts of {shown[0].value('n_experts')}"),
        (DIMENSIONALITY, "mean $D_i$ of represented features"),
    )
    figure, (line,) = panels(1, 3, height=0.9 + 0.27 * len(shown), sharey=True)
    positions, labels, y, last = [], [], 0.0, shown[0].value("top_k")
    for cell in shown:
        y += 1.0 if cell.value("top_k") == last else 1.8
        last = cell.value("top_k")
        positions.append(y)
        shared = f" + shared {cell.value('shared_hidden')}" if cell.value("shared_hidden") else ""
        labels.append(
            f"{cell.value('n_experts')}×{cell.value('n_hidden')} k={last}{shared}, {cell.value('gate')}".replace(
                "_", "-"
            )
        )
    for axes, (metric, label) in zip(line, columns, strict=True):
        for cell, where in zip(shown, positions, strict=True):
            value = cell.estimate(metric)
            if not math.isfinite(value.mean):
                continue
            color = MOE if cell.value("slice") == "gates" else THIRD
            axes.plot([value.low, value.high], [where, where], color=color, linewidth=1.2, zorder=3)
            axes.plot([value.mean], [where], marker="D" if color == MOE else "s", markersize=5, color=color, zorder=4)
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
    line[0].set_yticks(positions, labels, color=INK)
    line[0].invert_yaxis()
    line[0].set_title(heading(shown[0].dataset, shown[0]))
    line[2].set_title("■ the gate of the main grid", color=THIRD, loc="right")
    return figure


def with_histogram(found: Sequence[Cell]) -> list[Cell]:
    """What `dimensionality_histogram` can show: where a dense model is as wide as an MoE, such models alone."""
    shown = [c for c in in_grid(found) if sum(_vector(c, "dimensionality_histogram")) > 0]
    widths = {c.value("total_width") for c in shown if c.is_moe}
    alike = [c for c in shown if c.value("total_width") in widths]
    return shown if all(c.is_moe for c in alike) else alike


def dimensionality_histogram(shown: Sequence[Cell]) -> Figure:
    """Distribution of D_i over the occurrences of represented features, all seeds together."""
    names = list(dict.fromkeys(c.architecture for c in sorted(shown, key=lambda c: c.is_moe)))
    data = by_dataset(shown)
    figure, grid = panels(len(names), len(data), height=1.2, sharex=True)
    for line, name in zip(grid, names, strict=True):
        for axes, (dataset, here) in zip(line, data.items(), strict=True):
            for cell in (c for c in here if c.architecture == name):
                _histogram(axes, cell)
            if line is grid[0]:
                axes.set_title(heading(dataset, here[0]), pad=16)
            if line is grid[-1]:
                axes.set_xlabel("$D_i$ (share of a dimension that a feature has)")
        color = MOE if any(c.is_moe for c in shown if c.architecture == name) else DENSE
        line[0].set_ylabel(
            name.replace(" ", "\n", 1), rotation=0, ha="right", va="center", color=color, fontweight="bold"
        )
    for axes in grid[0]:
        for where, text in NAMED_DIMENSIONALITIES:
            axes.text(
                where,
                1.02,
                text,
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="bottom",
                fontsize=7.5,
                color=MUTED,
            )
    return figure


def _histogram(axes: Axes, cell: Cell) -> None:
    counts = _vector(cell, "dimensionality_histogram")
    total = math.fsum(counts)
    color = MOE if cell.is_moe else DENSE
    edges = [i / len(counts) for i in range(len(counts) + 1)]
    axes.stairs([c / total for c in counts], edges, fill=True, color=color)
    for where, _ in NAMED_DIMENSIONALITIES:
        axes.axvline(where, color=MUTED, linewidth=0.7, linestyle=(0, (3, 2)), zorder=0.5)
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.set_xlim(0, 1.0)


_WAYS = (
    ("features_per_dimension", "● by how often an expert is used", 0.0, "o"),
    ("features_per_dimension_gate", "◆ by its mean gate weight (the paper's)", 0.22, "D"),
    ("features_per_dimension_folded", "■ gate weight folded into W", 0.44, "s"),
)


def with_features_per_dimension(found: Sequence[Cell]) -> list[Cell]:
    """What `features_per_dimension` can show."""
    return [c for c in in_grid(found) if math.isfinite(c.mean("features_per_dimension"))]


def features_per_dimension(shown: Sequence[Cell]) -> Figure:
    """Features per dimension with experts weighted in three ways."""
    data = by_dataset(shown)
    names = list(dict.fromkeys(c.architecture for c in sorted(shown, key=lambda c: c.is_moe)))
    figure, (line,) = panels(1, len(data), height=0.8 + 0.27 * len(names), sharey=True)
    for axes, (dataset, here) in zip(line, data.items(), strict=True):
        for cell in here:
            for (key, _, shift, marker), moe_color in zip(_WAYS, (MOE, FOURTH, THIRD), strict=True):
                value = cell.estimate(key)
                if math.isfinite(value.mean) and (cell.is_moe or key == _WAYS[0][0]):
                    y = names.index(cell.architecture) + (shift - 0.22) * cell.is_moe
                    color = moe_color if cell.is_moe else DENSE
                    axes.plot([value.low, value.high], [y, y], color=color, linewidth=1.1)
                    axes.plot([value.mean], [y], marker=marker, markersize=4.5, color=color)
        axes.set_title(heading(dataset, here[0]))
        axes.set_xlabel("features per dimension")
        axes.set_xlim(left=0)
    line[0].set_yticks(range(len(names)), names, color=INK)
    line[0].set_ylim(len(names) - 0.4, -0.6)
    # Over fewer than three panels the key has no room in one line.
    apart = len(data) < len(_WAYS)
    figure.suptitle("\n" * (len(_WAYS) - 1) + " " if apart else " ", fontsize=9)
    height = 9 * 1.35 / 72 / figure.get_figheight()
    for line_number, ((_, text, _, _), color, x, side) in enumerate(
        zip(_WAYS, (MOE, FOURTH, THIRD), (0.012, 0.5, 0.988), ("left", "center", "right"), strict=True)
    ):
        place = (0.012, 0.993 - line_number * height, "left") if apart else (x, 0.993, side)
        figure.text(*place[:2], text, color=color, fontsize=9, va="top", ha=place[2], fontweight="bold")
    return figure


def swept_column(found: Sequence[Cell]) -> Figure | None:
    """Loss and mean D_i along the configuration column that takes most values, a line per remaining configuration."""
    names = [f.name for kind in (ToyConfig, FeatureConfig, TrainConfig) for f in fields(kind)]
    values = {name: {v for c in found if (v := number(c.rows[0], name)) is not None} for name in names}
    column = max(names, key=lambda name: len(values[name]))
    if len(values[column]) < 3 or any(c.value("slice") for c in found):
        return None
    varying = [name for name in names if name != column and len({repr(c.value(name)) for c in found}) > 1]
    lines: dict[str, list[Cell]] = {}
    for cell in sorted(found, key=lambda c: number(c.rows[0], column) or 0.0):
        lines.setdefault(", ".join(f"{name}={cell.value(name)}" for name in varying), []).append(cell)
    if len(lines) > MAX_LINES:
        return None
    figure, (pair,) = panels(1, 2, width=4.4)
    for axes, (metric, label) in zip(
        pair,
        ((LOSS, "unexplained variance (held-out)"), (DIMENSIONALITY, "mean $D_i$ of represented features")),
        strict=True,
    ):
        for (name, members), color in zip(lines.items(), _LINES, strict=False):
            xs = [number(c.rows[0], column) or 0.0 for c in members]
            for x, cell in zip(xs, members, strict=True):
                point(axes, x, cell.estimate(metric), color, size=4)
            means = [c.mean(metric) for c in members]
            axes.plot(xs, means, color=color, linewidth=1.1, label=name or None)
        if min(values[column]) > 0:
            log_axis(axes, sorted(values[column]), column)
        axes.set_xlabel(column)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    if len(lines) > 1:
        pair[1].legend(fontsize=7, frameon=False)
    return figure


def density(row: Row) -> float:
    """Probability that a feature is present, mean over the features: 1 − S; 0 for a row that does not say.

    It is p, which for ``power_law`` is that mean; for ``clustered`` data, of which a sample shows one cluster,
    p / n_clusters; for ``exactly_k`` n_active / n.
    """
    if row.get("features") == "exactly_k":
        return (number(row, "n_active") or 0.0) / (number(row, "n_features") or math.inf)
    return (number(row, "feature_probability") or 0.0) / (number(row, "n_clusters") or 1.0)


MAX_KINDS = 4
"""Most kinds of data beside each other in `against_sparsity`."""


def against_sparsity(found: Sequence[Cell]) -> Figure | None:
    """Features per dimension and mean D_i against 1/(1 − S), a line for each of the architectures of lowest loss.

    A column for each of at most `MAX_KINDS` kinds of data, which differ in more than how many features are present.
    """
    alike = ["n_features", *(f.name for f in fields(FeatureConfig) if f.name not in _DENSITIES)]
    kinds: dict[tuple[object, ...], dict[str, dict[float, Cell]]] = {}
    for cell in in_grid(found):
        if (share := density(cell.rows[0])) > 0:
            lines = kinds.setdefault(tuple(cell.value(name) for name in alike), {})
            lines.setdefault(cell.architecture, {})[share] = cell
    shown = [lines for lines in kinds.values() if max(map(len, lines.values())) >= 3][:MAX_KINDS]
    if not shown:
        return None
    if len(shown) == 1:
        figure, columns = panels(1, 2, width=4.4)
    else:
        figure, grid = panels(2, len(shown), width=3.8)
        columns = [list(column) for column in zip(*grid, strict=True)]
    for pair, lines in zip(columns, shown, strict=True):
        _kind_against_sparsity(pair, lines)
        if len(shown) > 1:
            pair[0].set_title(_kind(next(iter(next(iter(lines.values())).values()))))
    return figure


_DENSITIES = ("feature_probability", "n_active")
_SPARSITY_METRICS = (
    ("features_per_dimension_folded", "features per dimension"),
    (DIMENSIONALITY, "mean $D_i$ of represented features"),
)


def _kind(cell: Cell) -> str:
    """The data of a cell in words, without what says how many features are present."""
    clusters, group = number(cell.rows[0], "n_clusters"), number(cell.rows[0], "group_size")
    parts = [str(cell.value("features")).replace("_", " ")]
    parts += [f"{clusters:.0f} clusters"] if clusters else []
    parts += [f"groups of {group:.0f}"] if group else []
    parts += [f"exponent {cell.value('power_law_exponent')}"] if cell.value("features") == "power_law" else []
    importance, base = cell.value("importance"), cell.value("importance_base")
    parts += [f"importance {importance} {base}"] if importance not in (None, "uniform") else []
    return ", ".join([*parts, f"n = {cell.value('n_features')}"])


def _kind_against_sparsity(pair: Sequence[Axes], lines: Mapping[str, Mapping[float, Cell]]) -> None:
    most = max(map(len, lines.values()))
    whole = [name for name, by_density in lines.items() if len(by_density) == most]
    best = sorted(whole, key=lambda name: math.fsum(c.mean(LOSS) for c in lines[name].values()))[:MAX_LINES]
    for axes, (metric, label) in zip(pair, _SPARSITY_METRICS, strict=True):
        for name, color in zip(best, _LINES, strict=False):
            members = sorted(((1 / share, cell) for share, cell in lines[name].items()), key=lambda pair: pair[0])
            for x, cell in members:
                point(axes, x, cell.estimate(metric), color, size=4)
            style = "-" if members[0][1].is_moe else (0, (4, 1.5))
            axes.plot(
                [x for x, _ in members], [c.mean(metric) for _, c in members], color=color, linewidth=1.1,
                linestyle=style, label=name,
            )  # fmt: skip
        log_axis(axes, [x for x, _ in members], "1 / (1 − S), S the share of absent features")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    # Above the points, in a part of the panel of its own.
    pair[0].set_ylim(0, pair[0].get_ylim()[1] * (1.02 + 0.075 * len(best)))
    pair[0].legend(fontsize=7, frameon=False, loc="upper left")
