"""Statistics of a run folder's rows: t-intervals over seeds, differences paired by seed, the Pareto front.

A *cell* is one architecture on one data set, its seeds the repetitions. Every comparison is between two cells that
saw the same data streams, so it is judged on the differences seed by seed: the interval of a paired difference is the
honest one when both sides share their noise, and "not resolved" means that this interval contains zero.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache, partial

from moesaic.bench.plan import Row
from moesaic.bench.spec_match import COLUMN, MATCHES
from moesaic.moe.config import FeatureConfig, ToyConfig, TrainConfig

CONFIDENCE = 0.95
"""Level of every interval of the report."""
FLOPS_TOLERANCE = 0.10
"""Largest relative difference in active FLOPs of cells that are called equal: rounding m = 10.4 to 10 is 4 % off."""
LOSS = "unexplained_variance"
DIMENSIONALITY = "mean_dimensionality"


def coverage(t: float, df: int) -> float:
    """Probability that |T| <= t for Student's T with ``df`` degrees of freedom.

    With θ = atan(t/√df) the finite sums of Abramowitz & Stegun 26.7.3 (odd df) and 26.7.4 (even df), which are exact.
    """
    if df < 1:
        raise ValueError(f"df must be an integer >= 1, got {df!r}")
    theta = math.atan(t / math.sqrt(df))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = df % 2
    term = cosine if odd else 1.0
    total = 0.0 if df == 1 else term
    for j in range(2 if odd else 1, df - 2, 2):
        term *= j / (j + 1) * cosine * cosine
        total += term
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


@cache
def t_quantile(df: int, level: float = CONFIDENCE) -> float:
    """Half-width factor t of the two-sided interval: P(|T| <= t) = ``level``, by bisection to the last bit."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level!r}")
    low, high = 0.0, 1.0
    while coverage(high, df) < level:
        high *= 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if coverage(middle, df) < level else (low, middle)
    return high


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` seeds and its 95 % t-interval, whose ends are NaN where n < 2 allows none."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def half_width(self) -> float:
        """Distance from the mean to either end, NaN for n < 2."""
        return (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero; False for n < 2."""
        return self.low > 0 or self.high < 0


def estimate(values: Iterable[float]) -> Estimate:
    """Mean ± t_{df=n-1} · s/√n of independent values; NaN mean for no value, NaN ends for a single one."""
    sample = list(values)
    n = len(sample)
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    mean = math.fsum(sample) / n
    if n == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in sample) / (n - 1))
    half = t_quantile(n - 1) * deviation / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def number(row: Mapping[str, object], key: str) -> float | None:
    """The finite number in a row's column, None where it is missing, null, NaN or not a number."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


@dataclass(frozen=True)
class Cell:
    """The finished seeds of one architecture on one data set; ``lr_tuned`` where tuning runs chose its rate."""

    dataset: str
    architecture: str
    rows: tuple[Row, ...]
    lr_tuned: bool = False

    @property
    def is_moe(self) -> bool:
        """Whether the model routes (E > 1); a dense model has one expert."""
        return (number(self.rows[0], "n_experts") or 1) > 1

    def value(self, key: str) -> object:
        """A column that is the same for every seed, such as a configuration field."""
        return self.rows[0].get(key)

    def seeds(self, key: str) -> dict[int, float]:
        """The column by seed, finite values only."""
        found = ((int(number(r, "seed") or 0), number(r, key)) for r in self.rows)
        return {seed: v for seed, v in found if v is not None}

    def estimate(self, key: str) -> Estimate:
        """Mean and t-interval of a column over the seeds."""
        return estimate(self.seeds(key).values())

    def mean(self, key: str) -> float:
        """Mean of a column over the seeds, NaN where it was never measured."""
        return self.estimate(key).mean


def _architecture(row: Row) -> str:
    if (number(row, "n_experts") or 1) <= 1:
        # One expert has weight 1 under every gate but this one, so the others are no part of a dense model's name.
        gate = ", sigmoid" if row.get("gate") == "sigmoid" else ""
        name = f"dense m={row.get('n_hidden')}{gate}"
    else:
        name = f"MoE {row.get('n_experts')}×{row.get('n_hidden')} k={row.get('top_k')}, {row.get('gate')}"
    return name + (f" + shared {row['shared_hidden']}" if row.get("shared_hidden") else "")


def dataset_title(row: Row) -> str:
    """What the data are, from the feature columns: ``independent, p = 0.03``, ``16 clusters × 8, p = 0.5``."""
    kind, p = row.get("features", "?"), row.get("feature_probability")
    if kind == "clustered" and (clusters := number(row, "n_clusters")):
        size = round((number(row, "n_features") or 0) / clusters)
        return f"{clusters:.0f} clusters × {size}, p = {p}"
    if kind == "exactly_k":
        return f"exactly {row.get('n_active')} active"
    return f"{kind}, p = {p}".replace("_", " ")


_DATA = ("n_features", *(f.name for f in fields(FeatureConfig)))
_MODEL = tuple(f.name for f in (*fields(ToyConfig), *fields(TrainConfig)) if f.name not in _DATA)
_SETTINGS = (*(f.name for f in fields(TrainConfig)), "tied", "parametrization", "router_init")
_IN_LABELS = {"n_experts", "n_hidden", "top_k", "gate", "shared_hidden", "features", "feature_probability"}


def labelled(rows: Sequence[Row]) -> list[Row]:
    """Rows with ``dataset`` and ``architecture``: the plan's labels, else names made from the configuration.

    A made name carries every other configuration column that varies (``lr=0.01``), so no cell mixes configurations.
    """
    varying = {c for c in (*_DATA, *_MODEL) if len({repr(r.get(c)) for r in rows}) > 1}

    def extra(row: Row, columns: Iterable[str]) -> str:
        # The title of exactly_k data leaves the probability out.
        named = _IN_LABELS - ({"feature_probability"} if row.get("features") == "exactly_k" else set())
        return "".join(f", {c}={row.get(c)}" for c in columns if c in varying - named)

    return [
        {
            **row,
            "dataset": row.get("dataset") or dataset_title(row) + extra(row, _DATA),
            "architecture": row.get("architecture") or _architecture(row) + extra(row, _MODEL),
        }
        for row in rows
    ]


def cells(rows: Sequence[Row]) -> list[Cell]:
    """Cells of the finished runs, tuning runs left out, in order of first appearance.

    Of dense runs that differ in nothing but a gate without effect, the first of each seed is taken.

    Raises:
        ValueError: two runs of a cell have one seed, so its names do not tell configurations apart.
    """
    tuned = any(r.get("stage") == "tune" for r in rows)
    grouped: dict[tuple[str, str], dict[int, Row]] = defaultdict(dict)
    for row in labelled([r for r in rows if r.get("stage") != "tune"]):
        if row.get("status") != "ok":
            continue
        dataset, architecture, seed = str(row["dataset"]), str(row["architecture"]), int(number(row, "seed") or 0)
        first = grouped[dataset, architecture].setdefault(seed, row)
        if first is not row and not _same_but_for_gate(first, row):
            raise ValueError(f"seed={seed} of {architecture!r} on {dataset!r}: takes one run of each seed, got two")
    return [
        Cell(dataset, architecture, members, tuned and members[0].get("stage") == "main")
        for (dataset, architecture), by_seed in grouped.items()
        if (members := tuple(by_seed.values()))
    ]


def _same_but_for_gate(one: Row, other: Row) -> bool:
    """Whether two dense rows differ in the gate, which changes nothing there, and in no other configuration column."""
    columns = [c for c in (*_DATA, *_MODEL) if c != "gate"]
    gates = {one.get("gate"), other.get("gate")}
    dense = (number(one, "n_experts") or 1) <= 1
    return dense and len(gates) == 2 and "sigmoid" not in gates and all(one.get(c) == other.get(c) for c in columns)


def paired(one: Cell, other: Cell, key: str) -> Estimate:
    """Interval of ``one - other`` over the seeds that both finished."""
    a, b = one.seeds(key), other.seeds(key)
    return estimate(a[seed] - b[seed] for seed in sorted(a.keys() & b.keys()))


@dataclass(frozen=True)
class Comparison:
    """An MoE against the dense model that is matched to it, on one data set. Differences are MoE minus dense."""

    matched_by: str
    moe: Cell
    dense: Cell
    loss: Estimate
    dimensionality: Estimate

    @property
    def winner(self) -> str:
        """``MoE``, ``dense``, or ``not resolved`` where the paired interval of the loss contains zero."""
        return _winner(self.loss, lower_is_better=True)

    @property
    def less_superposed(self) -> str:
        """The side with the higher mean D_i (less sharing of dimensions), or ``not resolved``."""
        return _winner(self.dimensionality, lower_is_better=False)


def _winner(difference: Estimate, *, lower_is_better: bool) -> str:
    if not difference.excludes_zero:
        return "not resolved"
    return "MoE" if (difference.mean < 0) == lower_is_better else "dense"


EQUAL_WIDTH, EQUAL_FLOPS = MATCHES["total_width"], MATCHES["active_flops"]
PLANNED = {text: COLUMN.format(name) for name, text in MATCHES.items() if text not in (EQUAL_WIDTH, EQUAL_FLOPS)}
"""Comparisons of mixtures with the dense runs that a spec's ``[match]`` planned for them, and the columns of widths."""
KINDS = (EQUAL_WIDTH, EQUAL_FLOPS, *PLANNED)


def in_grid(found: Sequence[Cell]) -> list[Cell]:
    """The cells of the main grid: without the slice that varies the gate."""
    return [c for c in found if c.value("slice") != "gates"]


def comparable(one: Cell, other: Cell) -> bool:
    """Whether two cells are of one data set and were trained alike: every `TrainConfig` field, initial values, tying.

    The learning rate may differ where tuning runs chose it for both.
    """
    free = {"lr"} if one.lr_tuned and other.lr_tuned else set()
    columns = [c for c in (*_DATA, *_SETTINGS) if c not in free]
    return one.dataset == other.dataset and all(one.value(c) == other.value(c) for c in columns)


def comparisons(found: Sequence[Cell]) -> list[Comparison]:
    """Every MoE cell of the main grid against the dense cells of equal total width and of equal active FLOPs.

    A partner must be `comparable`; that at equal active FLOPs is the nearest dense width within `FLOPS_TOLERANCE`.
    Where several are as wide, one without a gate of its own goes first. Without a partner there is no pair.
    """
    dense_cells: dict[str, list[Cell]] = {}
    for cell in sorted((c for c in found if not c.is_moe), key=lambda c: c.value("gate") == "sigmoid"):
        dense_cells.setdefault(cell.dataset, []).append(cell)
    datasets = {name: place for place, name in enumerate(dict.fromkeys(c.dataset for c in found))}
    pairs = [
        (moe, [c for c in dense_cells.get(moe.dataset, ()) if comparable(moe, c)])
        for moe in sorted((c for c in in_grid(found) if c.is_moe), key=lambda c: datasets[c.dataset])
    ]
    return [
        Comparison(name, moe, dense, paired(moe, dense, LOSS), paired(moe, dense, DIMENSIONALITY))
        for name, partner in _PARTNERS.items()
        for moe, alike in pairs
        if (dense := partner(moe, alike)) is not None
    ]


def _equal_width(moe: Cell, dense: Sequence[Cell]) -> Cell | None:
    return next((c for c in dense if c.value("total_width") == moe.value("total_width")), None)


def _equal_flops(moe: Cell, dense: Sequence[Cell]) -> Cell | None:
    target = moe.mean("active_flops")

    def off(cell: Cell) -> float:
        return abs(cell.mean("active_flops") / target - 1)

    near = [c for c in dense if off(c) <= FLOPS_TOLERANCE]
    return min(near, key=off, default=None)


def _planned(column: str, moe: Cell, dense: Sequence[Cell]) -> Cell | None:
    width = moe.value(column)
    return next((c for c in dense if width is not None and c.value("n_hidden") == width), None)


_PARTNERS: dict[str, Callable[[Cell, Sequence[Cell]], Cell | None]] = {
    EQUAL_WIDTH: _equal_width,
    EQUAL_FLOPS: _equal_flops,
    **{kind: partial(_planned, column) for kind, column in PLANNED.items()},
}


def pareto_front(points: Sequence[Sequence[float]]) -> list[bool]:
    """Which points no other point dominates, every coordinate being a cost.

    q dominates p iff q <= p in every coordinate and q < p in one. A point with a NaN is not on the front and dominates
    nothing.
    """

    def dominates(q: Sequence[float], p: Sequence[float]) -> bool:
        return all(a <= b for a, b in zip(q, p, strict=True)) and any(a < b for a, b in zip(q, p, strict=True))

    known = [not any(map(math.isnan, p)) for p in points]
    return [
        ok and not any(dominates(q, p) for q, good in zip(points, known, strict=True) if good)
        for p, ok in zip(points, known, strict=True)
    ]


def on_front(found: Sequence[Cell]) -> list[Cell]:
    """Cells of the main grid that no `comparable` one dominates in loss, active FLOPs and mean D_i (seed means)."""
    left, front = in_grid(found), []
    while left:
        here = [c for c in left if comparable(left[0], c)]
        left = [c for c in left if c not in here]
        costs = [(c.mean(LOSS), c.mean("active_flops"), -c.mean(DIMENSIONALITY)) for c in here]
        front += [c for c, keep in zip(here, pareto_front(costs), strict=True) if keep]
    return [c for c in found if c in front]


@dataclass(frozen=True)
class ChosenRate:
    """The learning rate of one architecture on one data set, from the tuning runs."""

    lr: float
    loss: float
    grid: tuple[float, ...]

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the first or last of the grid, so that a better one may lie outside."""
        return self.lr in (self.grid[0], self.grid[-1])


def chosen_rates(rows: Sequence[Row]) -> dict[tuple[str, str], ChosenRate]:
    """Best rate per (dataset, architecture): lowest mean held-out unexplained variance over the tuning seeds.

    A rate of which a seed failed is not chosen while another finished all of its seeds. The grid is every rate tried.
    """
    tried: dict[tuple[str, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.get("stage") != "tune" or (lr := number(row, "lr")) is None:
            continue
        values = tried[str(row["dataset"]), str(row["architecture"])][lr]
        if row.get("status") == "ok" and (loss := number(row, LOSS)) is not None:
            values.append(loss)
    chosen = {}
    for key, by_rate in tried.items():
        most = max(map(len, by_rate.values()))
        complete = {lr: math.fsum(v) / most for lr, v in by_rate.items() if len(v) == most > 0}
        if complete:
            lr = min(complete, key=complete.__getitem__)
            chosen[key] = ChosenRate(lr, complete[lr], tuple(sorted(by_rate)))
    return chosen
