"""What ``sweep --energy`` adds to a report: loss and monosemanticity against measured cost, and the efficiency gap."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.bench.analysis import (
    DIMENSIONALITY,
    EQUAL_FLOPS,
    EQUAL_WIDTH,
    LOSS,
    Cell,
    comparable,
    comparisons,
    in_grid,
)
from moesaic.bench.efficiency import (
    QUANTITIES,
    YARDSTICK_WORDS,
    Cost,
    Gap,
    efficiency_gap,
    gap,
    gap_words,
    heading,
    spread,
)
from moesaic.bench.report_page import Column, escape, table
from moesaic.bench.words import si

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from moesaic.bench.figure_parts import Labelled
    from moesaic.bench.figures import Drawn

EQUAL_LOSS = "equal loss"
"""Of the dense models of the sweep that are as good, the narrowest."""


def costs(found: Sequence[Cell], record: Mapping[str, Any]) -> dict[tuple[str, str], Cost]:
    """Cost of one whole training by (dataset, architecture): counted per sample times the samples, or measured."""
    measured = {(one["dataset"], one["architecture"]): one for one in record["cells"]}
    result = {}
    for cell in found:
        one = measured.get((cell.dataset, cell.architecture))
        if one is None:
            continue
        samples = float(str(cell.value("steps"))) * float(str(cell.value("batch_size")))
        counted = {key: value * samples for key in ("active_flops", "bytes") if _known(value := cell.mean(key))}
        result[cell.dataset, cell.architecture] = Cost(
            counted.get("active_flops"), counted.get("bytes"), tuple(one["seconds_per_run"]),
            tuple(one["joules_per_run"]) if one["valid"] else (),
        )  # fmt: skip
    return result


def _known(value: float) -> bool:
    return math.isfinite(value) and value > 0


def gaps(found: Sequence[Cell], record: Mapping[str, Any]) -> list[Gap]:
    """Every MoE of the main grid against the dense model of equal width, of equal loss, and of equal active FLOPs.

    Of equal loss is the narrowest comparable dense model whose mean held-out loss is at most the MoE's; an MoE that no
    dense model of the sweep equals has no such gap.
    """
    known = costs(found, record)
    pairs = [(c.matched_by, c.moe, c.dense) for c in comparisons(found)]
    equal_loss = [(EQUAL_LOSS, moe, dense) for moe in in_grid(found) if (dense := _as_good(moe, found)) is not None]
    by_kind = {
        kind: [p for p in [*pairs, *equal_loss] if p[0] == kind] for kind in (EQUAL_WIDTH, EQUAL_LOSS, EQUAL_FLOPS)
    }
    return [
        gap(kind, (f"{_name(moe)} on {moe.dataset}", _name(dense)), known[_key(moe)], known[_key(dense)])
        for kind, members in by_kind.items()
        for _, moe, dense in members
        if _key(moe) in known and _key(dense) in known
    ]


def _key(cell: Cell) -> tuple[str, str]:
    return cell.dataset, cell.architecture


def _name(cell: Cell) -> str:
    return cell.architecture.removeprefix("MoE ").replace("dense m=", "m=")


def _as_good(moe: Cell, found: Sequence[Cell]) -> Cell | None:
    if not moe.is_moe:
        return None
    able = [c for c in found if not c.is_moe and comparable(moe, c) and c.mean(LOSS) <= moe.mean(LOSS)]
    return min(able, key=lambda c: float(str(c.value("total_width"))), default=None)


def energy_figures(found: Sequence[Cell], record: Mapping[str, Any], folder: Path) -> list[Drawn]:
    """Draw both figures that the rows allow."""
    from moesaic.bench.figures import Drawn
    from moesaic.bench.plot_style import save, style

    drawn = []
    with style():
        figures = {
            "cost": (cost_figure(found, record), "Loss, monosemanticity and active compute against measured cost",
                     _COST_CAPTION.format(_unit(record)[1])),
            "efficiency_gap": (efficiency_gap(gaps(found, record)), "The efficiency gap",
                               f"{_GAP_CAPTION} {YARDSTICK_WORDS}"),
        }  # fmt: skip
    for name, (figure, title, caption) in figures.items():
        if figure is not None:
            drawn.append(Drawn(name, title, caption, save(figure, folder, name)))
    return drawn


_COST_CAPTION = (
    "Against the {} of one whole training, measured: unexplained variance, mean dimensionality of represented "
    "features, the share of (expert, feature) pairs that are monosemantic, and the FLOPs counted for the same "
    "training. Were FLOPs all that a training costs, the points at the bottom would lie on one line of slope 1 "
    "(dashed: the dense models' median)."
)
_GAP_CAPTION = (
    "Cost of a dense training over that of an MoE, matched in three ways; at equal loss, with the narrowest dense "
    "model of the sweep that is as good. FLOPs and bytes are counted from shapes, time and joules measured, all "
    "trainings in turn; where the four disagree, FLOPs do not tell what sparsity buys."
)


def _unit(record: Mapping[str, Any]) -> tuple[str, str]:
    """What cost is measured in: joules where every cell has them, else seconds."""
    whole = all(cell["valid"] for cell in record["cells"])
    return ("joules", "joules") if whole and record["cells"] else ("seconds", "seconds")


FLOPS = "active_flops"
_ROWS = {
    LOSS: "unexplained variance\n(held-out; lower is better)",
    DIMENSIONALITY: "mean $D_i$ of\nrepresented features",
    "monosemantic_share": "monosemantic share of\n(expert, feature) pairs",
    FLOPS: "active FLOPs of the\ntraining, counted",
}
"""Rows of the figure of costs: column and label."""


def cost_figure(found: Sequence[Cell], record: Mapping[str, Any]) -> Figure | None:
    """Unexplained variance, monosemantic share and counted FLOPs against joules, or seconds without a meter."""
    from moesaic.bench.figure_parts import by_dataset, family_key, heading, place_labels
    from moesaic.bench.plot_style import log_axis, panels

    known = costs(found, record)
    data = by_dataset([c for c in in_grid(found) if _key(c) in known])
    if sum(map(len, data.values())) < 3:
        return None
    quantity, words = _unit(record)
    figure, grid = panels(len(_ROWS), len(data), height=2.0)
    labelled = []
    for line, name in zip(grid, _ROWS.values(), strict=True):
        line[0].set_ylabel(name)
    for column, (dataset, here) in enumerate(data.items()):
        spent = {c.architecture: known[_key(c)].median(quantity) or math.nan for c in here}
        for line, metric in zip(grid, _ROWS, strict=True):
            axes = line[column]
            log_axis(axes, list(spent.values()), f"{words} per training, measured" if metric == FLOPS else "")
            labelled.append(_panel(axes, here, spent, metric, known))
        grid[0][column].set_title(heading(dataset, here[0]))
    family_key(figure, "label: width m", "label: experts × width, k active")
    place_labels(figure, labelled, size=7)
    return figure


def _panel(
    axes: Axes, here: Sequence[Cell], spent: Mapping[str, float], metric: str, known: Mapping[tuple[str, str], Cost]
) -> Labelled:
    from moesaic.bench.analysis import Estimate
    from moesaic.bench.figure_parts import Label, Labelled, point, short
    from moesaic.bench.plot_style import DENSE, MOE, MUTED

    panel = Labelled(axes)
    flops = {c.architecture: known[_key(c)].flops or math.nan for c in here}
    heights = []
    for cell in sorted(here, key=lambda c: c.is_moe):
        y = Estimate(flops[cell.architecture], math.nan, math.nan, 1) if metric == FLOPS else cell.estimate(metric)
        x, color = spent[cell.architecture], MOE if cell.is_moe else DENSE
        if math.isfinite(x) and math.isfinite(y.mean):
            point(axes, x, y, color)
            panel.add(Label(x, y.mean, short(cell), color, optional=not cell.is_moe), y)
            heights.append(y.mean)
    if metric == FLOPS:
        rate = statistics.median([flops[c.architecture] / spent[c.architecture] for c in here if not c.is_moe] or [1])
        ends = [min(spent.values()), max(spent.values())]
        axes.plot(ends, [rate * end for end in ends], color=MUTED, lw=0.9, ls=(0, (4, 3)), zorder=1)
        axes.set_yscale("log")
        low, high = min(flops.values()), max(flops.values())
        ticks = [d * 10.0**e for e in range(20) for d in (1, 2, 5) if low / 1.5 <= d * 10.0**e <= high * 1.5]
        axes.set_yticks(ticks, [si(tick) for tick in ticks])
        axes.set_yticks([], minor=True)
    else:
        top = 1.15 * max([0.05, *heights])
        axes.set_ylim(-0.04 * top, top)
    return panel


def energy_section(found: Sequence[Cell], record: Mapping[str, Any]) -> str:
    """Plain words and the table of the four factors side by side."""
    compared = gaps(found, record)
    where = f"{record['device']}, {record['threads']} threads, measured {str(record['measured'])[:19]} UTC"
    busy = record.get("load_average")
    note = (
        f"Whole trainings of each cell's seeds as one stack, again and again, all cells in turn ({where}"
        + (f", load average {busy:.2f} before" if busy is not None else "")
        + "). Each entry: cost of the dense model over that of the MoE, median [lowest to highest round]."
    )
    columns = [Column("MoE", "text"), Column("dense", "text"), *(Column(name) for name in QUANTITIES.values())]
    parts = [f"<h2>Efficiency: counted and measured</h2><p>{escape(gap_words(compared, record['reason']))}</p>"]
    parts.append(f"<p>{escape(note)}</p>")
    for kind in dict.fromkeys(one.matched_by for one in compared):
        lines = [
            (one.sparse, one.dense, *(spread(one.factors[quantity]) for quantity in QUANTITIES))
            for one in compared
            if one.matched_by == kind
        ]
        parts.append(f"<h3>{escape(heading(kind))}</h3>{table(columns, lines)}")
    return "\n".join(parts)
