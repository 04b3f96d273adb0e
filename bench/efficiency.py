"""What a unit of work costs in FLOPs, bytes, seconds and joules, and how many times less than a dense model's.

    factor(q) = cost of the dense side in q / cost of the sparse side in q

FLOPs and bytes are counted, seconds and joules measured in rounds that both sides take in turn; a quantity that nobody
measured has no factor.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moesaic.bench.words import si

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUANTITIES = {"flops": "FLOPs", "bytes": "bytes", "seconds": "time", "joules": "joules"}
"""What is compared, and its name in figures and tables."""
MEASURED = ("seconds", "joules")
YARDSTICK = 1e4
YARDSTICK_WORDS = (
    "A literature estimate of something else, for scale: a human brain draws about 20 W, some 5 MWh in 28 years; "
    "training a frontier language model is put at some 50 GWh (unofficial; 1.3 GWh for GPT-3, arXiv:2104.10350). "
    "Nothing here was measured on either, and no figure of ours is divided by it."
)


@dataclass(frozen=True)
class Cost:
    """Cost of one unit of work: counts, and a number per round of what was measured; empty where nothing was."""

    flops: float | None = None
    bytes: float | None = None
    seconds: Sequence[float] = ()
    joules: Sequence[float] = ()

    def of(self, quantity: str) -> Sequence[float]:
        """The quantity by round; one number where it is counted, none where it is not known."""
        value = getattr(self, quantity)
        if quantity in MEASURED:
            return tuple(value)
        return () if value is None else (value,)

    def median(self, quantity: str) -> float | None:
        """The median over rounds, None where the quantity is not known."""
        values = self.of(quantity)
        return statistics.median(values) if values else None


@dataclass(frozen=True)
class Factor:
    """How many times less the sparse side costs: ratio of the medians, lowest and highest ratio within one round."""

    median: float
    low: float
    high: float


def factor(dense: Cost, sparse: Cost, quantity: str) -> Factor | None:
    """`Factor` of one quantity; None where one side does not know it."""
    above, below = dense.of(quantity), sparse.of(quantity)
    if not above or not below:
        return None
    rounds = [a / b for a, b in zip(above, below, strict=True)]
    return Factor(statistics.median(above) / statistics.median(below), min(rounds), max(rounds))


@dataclass(frozen=True)
class Gap:
    """A sparse model against the dense one it is matched with; factors by quantity, None where not known."""

    matched_by: str
    sparse: str
    dense: str
    factors: Mapping[str, Factor | None] = field(default_factory=dict)


def gap(matched_by: str, names: tuple[str, str], sparse: Cost, dense: Cost) -> Gap:
    """`Gap` of the sparse and dense model of ``names``."""
    return Gap(matched_by, *names, {quantity: factor(dense, sparse, quantity) for quantity in QUANTITIES})


def ranges(gaps: Iterable[Gap]) -> dict[str, tuple[float, float]]:
    """Smallest and largest factor over ``gaps`` by quantity, of those that are known."""
    found: dict[str, list[float]] = {}
    for one in gaps:
        for quantity, value in one.factors.items():
            if value is not None:
                found.setdefault(quantity, []).append(value.median)
    return {quantity: (min(values), max(values)) for quantity, values in found.items()}


def gap_words(gaps: Sequence[Gap], reason: str | None) -> str:
    """Per way of matching one sentence that puts the four factors side by side, and where they disagree."""
    sentences = []
    for kind in dict.fromkeys(one.matched_by for one in gaps):
        members = [one for one in gaps if one.matched_by == kind]
        here = ranges(members)
        said = [f"{QUANTITIES[q]} {_span(*here[q])}" for q in QUANTITIES if q in here]
        text = f"{heading(kind)}, dense over sparse: {', '.join(said)}"
        slower = sum(_below_one(one, "seconds") and _at_least_one(one, "flops") for one in members)
        if slower:
            text += f"; in {slower} of {len(members)} pairs the sparse model has no more FLOPs and yet takes longer"
        sentences.append(text + ".")
    without = sum(one.factors.get("joules") is None for one in gaps)
    if reason and without == len(gaps):
        sentences.append(f"Joules were not measured: {reason}.")
    elif without:
        sentences.append(f"In {without} of {len(gaps)} pairs a side has no valid joules{f': {reason}' * bool(reason)}.")
    return " ".join(sentences)


def heading(matched_by: str) -> str:
    """``At equal total width``, ``Against dense products on masked data``."""
    return f"{'At' if matched_by.startswith('equal') else 'Against'} {matched_by}"


def _below_one(one: Gap, quantity: str) -> bool:
    value = one.factors.get(quantity)
    return value is not None and value.median < 1


def _at_least_one(one: Gap, quantity: str) -> bool:
    value = one.factors.get(quantity)
    return value is not None and value.median >= 1


def _span(low: float, high: float) -> str:
    return three(low) if f"{low:.2g}" == f"{high:.2g}" else f"{three(low)} to {three(high)}"


def three(value: float) -> str:
    """Three significant digits, two below 10."""
    return f"{value:.2g}" if value < 9.95 else f"{value:.3g}" if value < 999.5 else si(value)


def spread(value: Factor | None) -> str:
    """``3.1 [2.9-3.3]``; a count without its range, ``-`` where nothing is known."""
    if value is None:
        return "-"
    middle = three(value.median)
    return middle if value.low == value.high else f"{middle} [{three(value.low)}-{three(value.high)}]"


def efficiency_gap(gaps: Sequence[Gap]) -> Figure | None:
    """Dense = 1, each sparse model's factors, and the yardstick of the literature in a field of its own, on a log axis.

    None where there is nothing to compare.
    """
    if not gaps:
        return None
    from moesaic.bench.palette import DENSE, FOURTH, MOE, MUTED, THIRD
    from moesaic.bench.plot_style import panels

    looks = {"flops": (DENSE, "o"), "bytes": (THIRD, "s"), "seconds": (MOE, "D"), "joules": (FOURTH, "^")}
    kinds = list(dict.fromkeys(one.matched_by for one in gaps))
    sizes = [sum(one.matched_by == kind for one in gaps) for kind in kinds]
    figure, grid = panels(len(kinds), 1, width=7.4, height=1.0, sharex=True)
    figure.set_size_inches(
        8.6, 1.6 + 0.5 * len(kinds) + (0.36 if any(": " in one.sparse for one in gaps) else 0.27) * sum(sizes)
    )
    axes = [line[0] for line in grid]
    if (spec := axes[0].get_gridspec()) is not None:
        spec.set_height_ratios([size + 1.0 for size in sizes])
    known = [end for one in gaps for value in one.factors.values() if value for end in (value.low, value.high)]
    low = min([1.0, *known]) / 1.5
    for kind, panel in zip(kinds, axes, strict=True):
        _draw_gaps(panel, [one for one in gaps if one.matched_by == kind], looks, low)
        panel.set_title(heading(kind))
    axes[0].text(
        YARDSTICK, 1.04, "literature estimate, not measured:\nbrain and training a language model", fontsize=7,
        color=MUTED, ha="right", va="bottom", transform=axes[0].get_xaxis_transform(),
    )  # fmt: skip
    axes[-1].set_xlabel("times less than dense (dense = 1); bars: lowest to highest round")
    handles = [
        axes[-1].plot([], [], marker, color=colour, ms=5, mfc=colour if q in MEASURED else "none", label=_key(q, gaps))
        for q, (colour, marker) in looks.items()
    ]
    figure.legend(handles=[h[0] for h in handles], loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def _key(quantity: str, gaps: Sequence[Gap]) -> str:
    if quantity not in MEASURED:
        return f"{QUANTITIES[quantity]}, counted"
    if all(one.factors.get(quantity) is None for one in gaps):
        return f"{QUANTITIES[quantity]}: not measured"
    return f"{QUANTITIES[quantity]}, measured"


def _draw_gaps(axes: Axes, gaps: Sequence[Gap], looks: Mapping[str, tuple[str, str]], low: float) -> None:
    from moesaic.bench.palette import GRID, INK, MUTED, PAPER

    axes.set_xscale("log")
    axes.axvline(1.0, color=INK, lw=1.0, zorder=1)
    for place, (quantity, (colour, marker)) in enumerate(looks.items()):
        shift = 0.16 * (place - 1.5)
        for y, one in enumerate(gaps):
            value = one.factors.get(quantity)
            if value is None:
                continue
            bars = [[value.median - value.low], [value.high - value.median]]
            axes.errorbar(
                value.median, y + shift, xerr=bars, fmt=marker, color=colour, ms=4.2, elinewidth=1, zorder=3,
                mfc=colour if quantity in MEASURED else PAPER,
            )  # fmt: skip
    axes.set_yticks(range(len(gaps)), [f"{one.sparse} / {one.dense}".replace(": ", "\n") for one in gaps])
    axes.set_ylim(len(gaps) - 0.45, -0.55)
    ticks = [10.0**e for e in range(math.floor(math.log10(low)), 5) if low <= 10.0**e]
    axes.set_xlim(low, 3e4)
    axes.set_xticks([*ticks, *([0.5] if low < 0.5 else []), 2, 5], minor=False)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    axes.set_xticks([], minor=True)
    # What is not ours stands on grey, apart.
    axes.axvspan(2.5e3, 3e4, color=GRID, alpha=0.7, lw=0, zorder=0)
    axes.axvline(YARDSTICK, color=MUTED, lw=1.4, ls=(0, (4, 3)), zorder=2)
