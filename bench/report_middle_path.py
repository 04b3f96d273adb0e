"""What a report says of mixtures between two dense models: FLOPs saved, loss gap recovered, mean D_i beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moesaic.bench.analysis import DIMENSIONALITY, LOSS, Cell, Estimate, estimate
from moesaic.bench.middle_path import SLICE
from moesaic.bench.plan import Row
from moesaic.bench.report_page import Column, escape, table
from moesaic.bench.words import interval, si

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from moesaic.bench.figure_parts import Labelled
    from moesaic.bench.figures import Drawn

MOST = 0.5
"""What "most" means: more than half."""
LOWEST = -2.0
"""Recovered share below which a mixture is drawn at the edge."""
NOTE = (
    "Each mixture stands between two dense models of its own. Saved: active FLOPs of a training step, against the "
    "dense model of equal total width. Recovered: of the loss gap between the dense models of equal active FLOPs (0) "
    "and of equal total width (1), by seed; below 0 the mixture is worse than the dense model that costs the same. "
    "Mean D_i: 1 is a dimension of its own, less is shared. ± 95 % t-intervals over seeds."
)


@dataclass(frozen=True)
class Mixture:
    """A mixture on a data set with the dense models of equal active FLOPs and of equal total width."""

    cell: Cell
    equal_flops: Cell
    equal_width: Cell

    @property
    def share(self) -> float:
        """Of the active width, what the shared expert has."""
        shared, routed = (float(str(self.cell.value(name))) for name in ("shared_hidden", "n_hidden"))
        return shared / (shared + routed * float(str(self.cell.value("top_k"))))

    @property
    def routing(self) -> tuple[int, int]:
        """(E, k)."""
        return int(str(self.cell.value("n_experts"))), int(str(self.cell.value("top_k")))

    @property
    def saved(self) -> float:
        """1 − FLOPs / FLOPs of the dense model of equal total width."""
        return 1 - self.cell.mean("active_flops") / self.equal_width.mean("active_flops")

    @property
    def recovered_by_seed(self) -> dict[int, float]:
        """(L_equal FLOPs − L) / (L_equal FLOPs − L_equal width); no seed where that gap is not resolved."""
        narrow, wide, mine = (c.seeds(LOSS) for c in (self.equal_flops, self.equal_width, self.cell))
        gap = estimate(narrow[seed] - wide[seed] for seed in narrow.keys() & wide.keys())
        if not gap.low > 0:
            return {}
        seeds = sorted(narrow.keys() & wide.keys() & mine.keys())
        return {seed: (narrow[seed] - mine[seed]) / (narrow[seed] - wide[seed]) for seed in seeds}

    @property
    def recovered(self) -> Estimate:
        """Interval of the fraction over seeds; of no seed where there is no gap to recover."""
        return estimate(self.recovered_by_seed.values())

    @property
    def name(self) -> str:
        """``16×4 k=1 + 2``: experts × width, active ones, and the shared width."""
        return self.cell.architecture.removeprefix("MoE ")


def is_middle_path(rows: Sequence[Row]) -> bool:
    """Whether a folder's rows are those of the preset."""
    return any(row.get("slice") == SLICE for row in rows)


def mixtures(found: Sequence[Cell]) -> list[Mixture]:
    """Every mixture whose two dense models finished."""
    from moesaic.bench.middle_path import partners
    from moesaic.moe.config import ToyConfig

    dense = {(c.dataset, c.value("n_hidden")): c for c in found if not c.is_moe}
    result = []
    for cell in found:
        if not cell.is_moe:
            continue
        names = ("n_features", "n_hidden", "n_experts", "top_k", "gate", "shared_hidden", "tied")
        narrow, wide = partners(ToyConfig(**{name: cell.value(name) for name in names}))  # type: ignore[arg-type]
        sides = dense.get((cell.dataset, narrow)), dense.get((cell.dataset, wide))
        if sides[0] is not None and sides[1] is not None:
            result.append(Mixture(cell, sides[0], sides[1]))
    return result


def words(found: Sequence[Mixture]) -> str:
    """The answer in plain words, from the intervals alone: a paragraph for the question and one for each data set."""
    if not found:
        return ""
    paragraphs = [
        "Is there a mix of shared and routed capacity that keeps most of the FLOPs saved and most of the lower loss of "
        f"the dense model that is as wide? Most means more than {MOST:.0%}, of the recovered loss with its whole "
        "interval."
    ]
    for dataset in dict.fromkeys(one.cell.dataset for one in found):
        here = [one for one in found if one.cell.dataset == dataset and one.recovered.n > 0]
        paragraphs.append(f"{_answer(dataset, here)} {_shared_sentence(dataset, here)}".rstrip())
    return "\n".join(paragraphs)


def _answer(dataset: str, here: Sequence[Mixture]) -> str:
    """Yes where a whole interval says so, no where all do, else not resolved."""
    if not here:
        return f"On {dataset} there is no resolved gap to recover."
    able = [one for one in here if one.saved > MOST]
    both = [one for one in able if one.recovered.low > MOST]
    if both:
        listed = "; ".join(_numbers(one) for one in sorted(both, key=lambda one: -one.recovered.mean)[:4])
        more = f" and {len(both) - 4} more" if len(both) > 4 else ""
        return f"On {dataset}, yes: {listed}{more}."
    if not able:
        return f"On {dataset}, no: none saves more than {MOST:.0%}."
    # Without an interval, as of one seed, nothing is excluded.
    open_ = [one for one in able if not one.recovered.high <= MOST]
    nearest = max(able, key=lambda one: one.recovered.mean)
    verdict = "not resolved" if open_ else "no"
    count = f" ({len(open_)} of {len(able)} intervals reach beyond {MOST:.0%})" if open_ else ""
    return (
        f"On {dataset}, {verdict}{count}; of those that save more than {MOST:.0%}, nearest comes {_numbers(nearest)}."
    )


def _numbers(one: Mixture) -> str:
    d = [c.mean(DIMENSIONALITY) for c in (one.cell, one.equal_flops, one.equal_width)]
    shown = ", ".join("n/a" if math.isnan(value) else f"{value:.2f}" for value in d)
    return (
        f"{one.name}, which saves {one.saved:.0%} and recovers {interval(one.recovered, 2)} (mean D_i {shown}: its "
        "own, of the dense model of equal FLOPs, of equal width)"
    )


def _shared_sentence(dataset: str, here: Sequence[Mixture]) -> str:
    """Whether a share for all helps: against the mixture of the same E and k without one, paired by seed."""
    better: list[Mixture] = []
    worse: list[Mixture] = []
    open_: list[Mixture] = []
    for routing in dict.fromkeys(one.routing for one in here):
        members = [one for one in here if one.routing == routing]
        base = min(members, key=lambda one: one.share)
        for one in members:
            if one is base:
                continue
            ours, theirs = one.recovered_by_seed, base.recovered_by_seed
            difference = estimate(ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys())
            side = open_ if not difference.excludes_zero else better if difference.mean > 0 else worse
            side.append(one)
    if not better + worse + open_:
        return ""
    return (
        f"With more of its width shared, a mixture of the same E and k recovers more of its own gap on {dataset} in "
        f"{len(better)} of {len(better + worse + open_)} cases, less in {len(worse)}; {len(open_)} are not resolved."
    )


HEADINGS = (
    "data", "mixture", "shared", "total width", "FLOPs saved", "unexplained variance", "equal FLOPs", "equal width",
    "recovered", "mean D_i", "equal FLOPs", "equal width",
)  # fmt: skip


def section(found: Sequence[Mixture]) -> str:
    """The table of all mixtures."""
    columns = [Column(name, "text" if place < 2 else "number") for place, name in enumerate(HEADINGS)]
    lines = [
        (
            one.cell.dataset, one.name, f"{one.share:.0%}", si(one.cell.mean("total_width")), f"{one.saved:.0%}",
            *(interval(c.estimate(LOSS)) for c in (one.cell, one.equal_flops, one.equal_width)),
            interval(one.recovered, 2) if one.recovered.n else "no gap",
            *(interval(c.estimate(DIMENSIONALITY), 2) for c in (one.cell, one.equal_flops, one.equal_width)),
        )
        for one in found
    ]  # fmt: skip
    return f"<h2>Mixtures between two dense models</h2><p>{escape(NOTE)}</p>{table(columns, lines)}"


def figures(found: Sequence[Mixture], folder: Path) -> list[Drawn]:
    """Recovered loss gap, and mean D_i, against the FLOPs saved: one column per data set."""
    from moesaic.bench.figure_parts import heading, place_labels
    from moesaic.bench.figures import Drawn
    from moesaic.bench.plot_style import panels, save, style

    data: dict[str, list[Mixture]] = {}
    for one in found:
        data.setdefault(one.cell.dataset, []).append(one)
    if not data:
        return []
    with style():
        figure, grid = panels(2, len(data), width=3.5, height=3.0, sharex=True)
        labelled = []
        for column, (dataset, here) in enumerate(data.items()):
            labelled.append(_recovered(grid[0][column], here))
            _dimensionality(grid[1][column], here)
            grid[0][column].set_title(heading(dataset, here[0].cell))
            grid[1][column].set_xlabel("FLOPs saved against dense of equal width")
        grid[0][0].set_ylabel("recovered share of the loss gap\n(0: dense, equal FLOPs; 1: equal width)")
        grid[1][0].set_ylabel("mean $D_i$ of represented features")
        handles, names = grid[1][0].get_legend_handles_labels()
        unique = dict(zip(names, handles, strict=True))
        figure.legend(
            [*unique.values()],
            [*unique],
            loc="outside lower center",
            ncols=min(6, 3 * max(1, len(data) - 1)),
            frameon=False,
            fontsize=8,
        )
        place_labels(figure, labelled, size=7)
        svg = save(figure, folder, "middle_path")
    labels = (
        f"Triangles at the lower edge: below {LOWEST:g}. Mixtures without a resolved gap are in the table alone. "
        "Labels, where no other mixture saves and recovers as much: experts × width, k active, + shared width."
    )
    return [Drawn("middle_path", "The middle path", f"{NOTE} {labels}", svg)]


SHADES = {0.0: "#7a2f00", 0.25: "#c84e00", 0.5: "#e88d4d", 0.75: "#f3c9a8"}
"""Colour by the share that is nearest."""


def _shade(one: Mixture) -> float:
    return min(SHADES, key=lambda share: abs(share - one.share))


def _recovered(axes: Axes, here: Sequence[Mixture]) -> Labelled:
    from moesaic.bench.figure_parts import Label, Labelled
    from moesaic.bench.plot_style import DENSE, MUTED

    panel = Labelled(axes)
    for level in (0.0, 1.0):
        axes.axhline(level, color=DENSE, lw=1.0, ls=(0, (4, 3)), zorder=1)
    axes.axhline(MOST, color=MUTED, lw=0.7, ls=(0, (1, 2)), zorder=1)
    axes.axvline(MOST, color=MUTED, lw=0.7, ls=(0, (1, 2)), zorder=1)
    shown = [one for one in here if one.recovered.n]
    for one in shown:
        y = one.recovered
        _mark(axes, one, y)
        if not any(_beats(other, one) for other in shown):
            panel.add(Label(one.saved, y.mean, one.name), y)
        else:
            panel.covered.append((one.saved, y.mean))
    # A mixture far below the dense model of equal cost would press all others into a line: it is drawn at the edge.
    means = [one.recovered.mean for one in shown]
    low = max(min([0.0, *means]), LOWEST) - 0.15
    for one in shown:
        if one.recovered.mean < low:
            axes.plot([one.saved], [low + 0.05], "v", color=SHADES[_shade(one)], ms=5, clip_on=False, zorder=4)
    axes.set_ylim(low, max(1.12, 1.05 * max(means, default=1.0)))
    _percent(axes)
    return panel


def _beats(other: Mixture, one: Mixture) -> bool:
    """Whether ``other`` saves and recovers as much as ``one`` and more of either."""
    ours, theirs = ((m.saved, m.recovered.mean) for m in (one, other))
    return theirs != ours and theirs[0] >= ours[0] and theirs[1] >= ours[1]


def _mark(axes: Axes, one: Mixture, y: Estimate) -> None:
    color = SHADES[_shade(one)]
    if math.isfinite(y.low):
        axes.plot([one.saved] * 2, [y.low, y.high], color=color, lw=1.1, solid_capstyle="butt", zorder=3)
    marker = {1: "D", 2: "s"}.get(one.routing[1], "^")
    axes.plot([one.saved], [y.mean], marker, color=color, ms=5, mec="#7a2f00", mew=0.5, zorder=4)


def _dimensionality(axes: Axes, here: Sequence[Mixture]) -> None:
    from moesaic.bench.plot_style import DENSE, PAPER

    for one in here:
        y = one.cell.estimate(DIMENSIONALITY)
        if y.n:
            _mark(axes, one, y)
        for cell, filled in ((one.equal_flops, True), (one.equal_width, False)):
            axes.plot(
                [one.saved], [cell.mean(DIMENSIONALITY)], "o", color=DENSE, ms=3.5, mfc=DENSE if filled else PAPER,
                mew=0.8, zorder=2, alpha=0.8,
            )  # fmt: skip
    for share, color in SHADES.items():
        axes.plot([], [], "D", color=color, ms=5, mec="#7a2f00", mew=0.5, label=f"{share:.0%} shared")
    axes.plot([], [], "o", color=DENSE, ms=3.5, label="dense, equal FLOPs")
    axes.plot([], [], "o", color=DENSE, ms=3.5, mfc=PAPER, label="dense, equal width")
    # An interval of few seeds may leave the page; it would press the means into a line.
    means = [c.mean(DIMENSIONALITY) for one in here for c in (one.cell, one.equal_flops, one.equal_width)]
    axes.set_ylim(0, 1.15 * max([0.1, *(m for m in means if math.isfinite(m))]))
    _percent(axes)


def _percent(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def lines(found: Sequence[Mixture]) -> list[str]:
    """The table of a terminal."""
    rows = [("data", "mixture", "shared", "saved", "recovered", "mean D_i")]
    rows += [
        (
            one.cell.dataset, one.name, f"{one.share:.0%}", f"{one.saved:.0%}",
            interval(one.recovered, 2) if one.recovered.n else "no gap", interval(one.cell.estimate(DIMENSIONALITY), 2),
        )
        for one in found
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
