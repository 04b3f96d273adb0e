"""What a report and the terminal say of models with very many features: how they fare against n, and what steps cost.

Everything is computed from the rows; a line is an architecture, a point the mean over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.bench.analysis import labelled, number
from moesaic.bench.plan import Row
from moesaic.bench.report_page import Column, escape, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from moesaic.bench.figures import Drawn

UNEXPLAINED = "unexplained_variance"
PER_DIMENSION = "features_per_dimension"
FIT_FROM = 10_000
"""Features from which on exponents are fitted: below, what a step costs however small the model is counts."""
STEPS = (("exact_step_s", "exact step"), ("sampled_step_s", "sampled step"))
HEADINGS = (
    "n", "architecture", "seeds", "decoding", "unexplained variance", "untrained", "features/dim", "untrained",
    "effective experts", "step, s", "exact step, s", "sampled step, s", "peak, MB",
)  # fmt: skip
RESTRICTED_HEADINGS = (
    "n", "architecture", "seeds", "frequent", "learned", "mean D_i, learned", "mean D_i, all represented",
    "superposition, learned", "superposition, all", "monosemantic, learned", "monosemantic, all",
)  # fmt: skip
NOTE = (
    "Means over seeds. Unexplained variance: held-out squared error over the variance of the data; 1 is what "
    "predicting every feature's mean gives, and a model above 1 is worse than that. Untrained: before the first step. "
    "Steps: median seconds, on the machine of this folder. Peak: memory while training beyond what was held before."
)
RESTRICTED_NOTE = (
    "Frequent: features with at least 1,000 expected activations in training. Learned: frequent ones whose held-out "
    "error is below half of their variance. All other features have seen too few samples, or lost, and their metrics "
    "say more of where they began than of what was learned; n/a: no learned feature. D_i and superposition are means "
    "over represented presences (gate-folded squared norm above 1/2), monosemantic over (expert, feature) pairs."
)


@dataclass(frozen=True)
class Point:
    """An architecture at one n: the finished rows of its seeds."""

    n: int
    architecture: str
    rows: Sequence[Mapping[str, Any]]

    def mean(self, key: str) -> float:
        """Mean over the seeds that have the column; NaN where none has."""
        values = [value for row in self.rows if (value := number(row, key)) is not None]
        return math.fsum(values) / len(values) if values else math.nan


def is_million(rows: Sequence[Row]) -> bool:
    """Whether a folder's rows are all of models with very many features, some of them finished."""
    named = "untrained_features_per_dimension"
    return any(named in row for row in rows) and all(named in row or row.get("status") != "ok" for row in rows)


def points(rows: Sequence[Row]) -> dict[str, list[Point]]:
    """Finished rows by architecture, each by rising n."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in labelled(rows):
        if row.get("status") == "ok":
            found.setdefault((str(row["architecture"]), int(number(row, "n_features") or 0)), []).append(row)
    lines: dict[str, list[Point]] = {}
    for (name, n), members in sorted(found.items(), key=lambda item: item[0][1]):
        lines.setdefault(name, []).append(Point(n, name, members))
    return dict(sorted(lines.items(), key=lambda item: (number(item[1][0].rows[0], "n_experts") or 0) > 1))


def fitted(line: Sequence[Point], key: str) -> float:
    """The exponent a of key ∝ nᵃ from n = 10,000 on, least squares on logarithms; NaN for fewer than two sizes."""
    logs = [(math.log(p.n), math.log(v)) for p in line if p.n >= FIT_FROM and (v := p.mean(key)) > 0]
    if len({x for x, _ in logs}) < 2:
        return math.nan
    x0, y0 = (math.fsum(values) / len(logs) for values in zip(*logs, strict=True))
    return math.fsum((x - x0) * (y - y0) for x, y in logs) / math.fsum((x - x0) ** 2 for x, _ in logs)


def speedup(lines: Mapping[str, Sequence[Point]], key: str) -> dict[str, list[tuple[int, float, float]]]:
    """For each other architecture, (n, first architecture's ``key`` over its own, the same of FLOPs) by rising n.

    FLOPs are ``sparse_flops`` of such steps: encoding counts active features only.
    """
    names = list(lines)
    if len(names) < 2 or (number(lines[names[0]][0].rows[0], "n_experts") or 0) != 1:
        return {}
    dense = {point.n: point for point in lines[names[0]]}
    found = {}
    for name in names[1:]:
        ratios = [
            (p.n, dense[p.n].mean(key) / p.mean(key), _flops(dense[p.n], key) / _flops(p, key))
            for p in lines[name] if p.n in dense and p.mean(key) > 0
        ]  # fmt: skip
        if ratios:
            found[name] = ratios
    return found


def _flops(point: Point, key: str) -> float:
    """Useful FLOPs per sample of an exact or of a sampled step."""
    from moesaic.bench.measure_large import sparse_flops
    from moesaic.moe import Run

    row = point.rows[0]
    run = Run.from_flat({name: row[name] for name in Run().flat() if name in row})
    return float(sparse_flops(run, "sampled" if key == "sampled_step_s" else "exact"))


def words(rows: Sequence[Row]) -> str:
    """A paragraph in plain words, from the rows alone."""
    lines = points(rows)
    if not lines:
        return ""
    sentences = []
    for name, line in lines.items():
        first, last = line[0], line[-1]
        text = f"{name}: at n = {first.n:,} the unexplained variance is {_short(first.mean(UNEXPLAINED))}"
        text += f" (untrained {_short(first.mean('untrained_unexplained_variance'))})"
        if last.n != first.n:
            text += f", at n = {last.n:,} it is {_short(last.mean(UNEXPLAINED))}"
            text += f" (untrained {_short(last.mean('untrained_unexplained_variance'))})"
        sentences.append(text + ".")
    worse = [f"{p.architecture} at n = {p.n:,}" for line in lines.values() for p in line if p.mean(UNEXPLAINED) >= 1]
    if worse:
        sentences.append(
            f"After {_range([r.get('steps') for r in rows])} steps no better than predicting every feature's mean: "
            f"{', '.join(worse)}. What is said of their features below is not said of trained representations."
        )
    for name, line in lines.items():
        for key, what in STEPS:
            timed = [p for p in line if p.n >= FIT_FROM and p.mean(key) > 0]
            if not math.isnan(a := fitted(timed, key)):
                sentences.append(
                    f"{name}: the time of {'an' if what[0] in 'aeiou' else 'a'} {what} grows as n to the power {a:.2f} "
                    f"from n = {timed[0].n:,} to {timed[-1].n:,}, where it takes {_short(timed[-1].mean(key))} s."
                )
    for name, ratios in speedup(lines, "exact_step_s").items():
        n, measured, counted = ratios[-1]
        sentences.append(
            f"At n = {n:,} an exact step of {name} takes {1 / measured:.2g} of the dense model's time, with "
            f"{1 / counted:.2g} of its FLOPs."
        )
    counts = [(p, p.mean("n_restricted")) for line in lines.values() for p in line]
    sentences.append(
        f"Features that were learned, on average over seeds: {_count(min(c for _, c in counts))} to "
        f"{_count(max(c for _, c in counts))} of a model's; metrics restricted to them are in the last table."
    )
    return " ".join(sentences)


def _short(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _count(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:,.4g}"


def _range(values: Sequence[object]) -> str:
    known = sorted({value for value in values if isinstance(value, int)})
    return "" if not known else f"{known[0]:,}" if len(known) == 1 else f"{known[0]:,} to {known[-1]:,}"


def main_lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """A line of text for each architecture at each n."""
    return [
        (
            f"{p.n:,}", p.architecture, str(len(p.rows)), str(p.rows[0].get("decode")), _short(p.mean(UNEXPLAINED)),
            _short(p.mean("untrained_unexplained_variance")), _short(p.mean(PER_DIMENSION)),
            _short(p.mean(f"untrained_{PER_DIMENSION}")), _short(p.mean("effective_experts")),
            _short(p.mean("step_s")), _short(p.mean("exact_step_s")), _short(p.mean("sampled_step_s")),
            _short(p.mean("peak_memory_bytes") / 1e6),
        )
        for p in sorted((p for line in points(rows).values() for p in line), key=lambda p: p.n)
    ]  # fmt: skip


def restricted_lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The metrics of learned features next to those of all represented ones."""
    metrics = ("mean_dimensionality", "superposition", "monosemantic_share")
    return [
        (
            f"{p.n:,}", p.architecture, str(len(p.rows)), _count(p.mean("n_frequent")), _count(p.mean("n_restricted")),
            *(_short(p.mean(name + suffix)) for name in metrics for suffix in ("_restricted", "")),
        )
        for p in sorted((p for line in points(rows).values() for p in line), key=lambda p: p.n)
    ]  # fmt: skip


def million_section(rows: Sequence[Row]) -> str:
    """Both tables."""
    parts = []
    for title, note, headings, lines in (
        ("Results", NOTE, HEADINGS, main_lines(rows)),
        ("Features that were learned", RESTRICTED_NOTE, RESTRICTED_HEADINGS, restricted_lines(rows)),
    ):
        columns = [Column(name, "text" if name in ("architecture", "decoding") else "number") for name in headings]
        parts.append(f"<h2>{escape(title)}</h2><p>{escape(note)}</p>{table(columns, lines)}")
    return "\n".join(parts)


def million_table(rows: Sequence[Row]) -> str:
    """The main table as plain text."""
    lines = [HEADINGS, *main_lines(rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(["  ".join(map(str.rjust, line, widths)) for line in lines] + [NOTE])


def million_figures(rows: Sequence[Row], folder: Path) -> list[Drawn]:
    """Draw the figures of the rows that finished; none where none did."""
    from moesaic.bench.figures import Drawn
    from moesaic.bench.plot_style import DENSE, FOURTH, MOE, THIRD, save, style

    lines = points(rows)
    if not lines:
        return []
    looks = dict(zip(lines, ((DENSE, "s"), (MOE, "o"), (THIRD, "^"), (FOURTH, "v")), strict=False))
    lines = {name: line for name, line in lines.items() if name in looks}
    drawn = []
    with style():
        for name, title, caption, draw in (
            ("unexplained", "Unexplained variance against n", _LOSS_CAPTION, _loss),
            ("features-per-dimension", "Features per dimension against n", _DIMENSION_CAPTION, _dimension),
            ("step-time", "Time of a step against n", _TIME_CAPTION, _time),
            ("speed-up", "Speed-up against what is saved", _SPEED_CAPTION, _speed),
        ):
            figure = draw(lines, looks)
            if figure is not None:
                drawn.append(Drawn(name, title, caption, save(figure, folder, name)))
    return drawn


_LOSS_CAPTION = (
    "Held-out squared error over the variance of the data, mean over seeds, small marks the seeds; dashed the same "
    "models before their first step. Above the line at 1 a model is worse than predicting every feature's mean."
)
_DIMENSION_CAPTION = (
    "‖W‖_F²/m, experts weighted by the share of samples they get; dashed before the first step. That number grows with "
    "n by itself: all initial rows are alike, and where training did not reach the rare features theirs still count."
)
_TIME_CAPTION = (
    "Median seconds of a step on the trained model, exact, and with 4,096 drawn features besides the present ones, "
    "which most training here does not use. In the legend, the exponent of n that fits best from n = 10,000 on."
)
_SPEED_CAPTION = "Time of the dense model's step over the mixture's; dashed the same ratio of useful FLOPs."

Looks = Mapping[str, tuple[str, str]]
Lines = Mapping[str, Sequence[Point]]


def _loss(lines: Lines, looks: Looks) -> Any:
    from moesaic.bench.plot_style import MUTED

    figure, axes = _against_n(lines, looks, UNEXPLAINED, "untrained_unexplained_variance", "unexplained variance")
    axes.axhline(1.0, color=MUTED, lw=0.8)
    return figure


def _dimension(lines: Lines, looks: Looks) -> Any:
    return _against_n(lines, looks, PER_DIMENSION, f"untrained_{PER_DIMENSION}", "features per dimension")[0]


def _against_n(lines: Lines, looks: Looks, key: str, untrained: str, label: str) -> tuple[Any, Axes]:
    from moesaic.bench.plot_style import panels

    figure, grid = panels(1, 1, width=5.2, height=3.2)
    axes = grid[0][0]
    for name, line in lines.items():
        colour, marker = looks[name]
        axes.plot([p.n for p in line], [p.mean(key) for p in line], marker + "-", color=colour, ms=5, label=name)
        axes.plot([p.n for p in line], [p.mean(untrained) for p in line], "--", color=colour, lw=1.0)
        each = [(p.n, value) for p in line for row in p.rows if (value := number(row, key)) is not None]
        axes.plot([n for n, _ in each], [v for _, v in each], ".", color=colour, ms=3, alpha=0.6)
    axes.plot([], [], "--", color="#5c646d", lw=1.0, label="untrained")
    _finish(axes, lines, label)
    return figure, axes


def _time(lines: Lines, looks: Looks) -> Any:
    from moesaic.bench.plot_style import panels

    figure, grid = panels(1, 2, width=3.9, height=3.1, sharey=True)
    for axes, (key, what) in zip(grid[0], STEPS, strict=True):
        for name, line in lines.items():
            colour, marker = looks[name]
            a = fitted(line, key)
            label = name if math.isnan(a) else f"{name}: $n^{{{a:.2f}}}$"
            axes.plot([p.n for p in line], [p.mean(key) for p in line], marker + "-", color=colour, ms=5, label=label)
        axes.set_title(f"{what[0].upper()}{what[1:]}")
        _finish(axes, lines, "seconds per step" if key == STEPS[0][0] else "")
    return figure


def _speed(lines: Lines, looks: Looks) -> Any:
    from moesaic.bench.plot_style import panels

    found = [(key, what, ratios) for key, what in STEPS if (ratios := speedup(lines, key))]
    if not found:
        return None
    figure, grid = panels(1, len(found), width=3.9, height=3.1, sharey=True)
    for place, (axes, (_, what, ratios)) in enumerate(zip(grid[0], found, strict=True)):
        for name, values in ratios.items():
            colour, marker = looks[name]
            across = [n for n, _, _ in values]
            axes.plot(across, [m for _, m, _ in values], marker + "-", color=colour, ms=5, label=name)
            axes.plot(across, [c for _, _, c in values], "--", color=colour, lw=1.0)
        axes.plot([], [], "--", color="#5c646d", lw=1.0, label="useful FLOPs")
        axes.set_title(f"{what[0].upper()}{what[1:]}")
        _finish(axes, lines, "dense over MoE" if place == 0 else "")
        ticks = [2.0**power for power in range(-6, 7)]
        low, high = axes.get_ylim()
        axes.set_yticks([t for t in ticks if low <= t <= high], [f"{t:g}×" for t in ticks if low <= t <= high])
        axes.set_yticks([], minor=True)
    return figure


def _finish(axes: Axes, lines: Lines, label: str) -> None:
    from moesaic.bench.plot_style import log_axis

    sizes = sorted({float(p.n) for line in lines.values() for p in line})
    log_axis(axes, sizes, "features n")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(
        lambda value, _: f"{value:g}" if _few_decades(axes) and f"{value:.0e}"[0] in "2357" else ""
    )
    if label:
        axes.set_ylabel(label)
    axes.legend(fontsize=8)


def _few_decades(axes: Axes) -> bool:
    low, high = axes.get_ylim()
    return high < 50 * low
