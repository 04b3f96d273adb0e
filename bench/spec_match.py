"""Dense runs that match the mixtures of a spec: as wide, as many parameters, as many FLOPs, bytes or seconds.

Each mixture with n features, E experts of width m, k of them active and a shared expert of width m_0 gets the dense run
(E = 1, no shared expert, the plain gate) whose width makes one quantity q nearest: |q(dense) − q(mixture)| is least,
the narrower of two equally near. Data, optimisation, initial values and seed are the mixture's.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from moesaic.bench.plan import InputError, PlannedRun, closest

if TYPE_CHECKING:
    from moesaic.moe.config import FeatureConfig, Run, ToyConfig

MATCHES = {
    "total_width": "equal total width",
    "active_width": "equal active width",
    "parameters": "equal parameters",
    "active_flops": "equal active FLOPs",
    "bytes": "equal bytes",
    "wall": "equal wall time",
}
"""What `[match]` takes, and what the report calls it. FLOPs and bytes are those of training, as in the columns."""
COLUMN = "match_{}"
"""Column of a mixture's row: the width of its dense run."""
MOST_WIDTH = 2**40

WallWidth = Callable[["Run"], int]
"""Mixture → width of the dense model whose step takes as long."""


def match_names(value: object) -> list[str]:
    """The names that a spec matches: one, or a list.

    Raises:
        InputError: not different names from `MATCHES`.
    """
    allowed = f"takes one or a list of {', '.join(MATCHES)}"
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not value or len(value) != len(set(map(str, value))):
        raise InputError(f"match.to = {value!r}: {allowed}, each once")
    for name in value:
        if name not in MATCHES:
            raise InputError(f"match.to: {name!r} is unknown{closest(str(name), MATCHES)}; {allowed}")
    return value


def with_dense(planned: Sequence[PlannedRun], to: Sequence[str], wall: WallWidth | None) -> list[PlannedRun]:
    """``planned`` and, after it, the dense runs that match its mixtures, each once.

    A mixture's labels get ``match_…``, the width of each of its dense runs; a dense run's label ``comparison`` says
    what it is equal in, also where it was planned anyhow.

    Args:
        planned: runs of a spec, no two equal.
        to: names from `MATCHES`.
        wall: what solves ``wall``; None leaves it out.
    """
    labels = {item.run.key: dict(item.labels) for item in planned}
    runs = {item.run.key: item.run for item in planned}
    # A dense model is the same under every gate but one, so one that is planned with another gate will do.
    same = {dense_run(r, r.toy.n_hidden).key: key for key, r in runs.items() if _is_plain_dense(r)}
    equal: dict[str, dict[str, None]] = {}
    for item in planned:
        if item.run.toy.n_experts == 1:
            continue
        for name in to:
            if name == "wall" and wall is None:
                continue
            width = wall(item.run) if name == "wall" and wall is not None else width_at_equal(item.run, name)
            dense = dense_run(item.run, width)
            key = same.setdefault(dense.key, dense.key)
            if key not in runs:
                runs[key], labels[key] = dense, {"stage": "main"}
            labels[item.run.key][COLUMN.format(name)] = width
            equal.setdefault(key, {})[MATCHES[name]] = None
    for key, kinds in equal.items():
        labels[key]["comparison"] = "; ".join(kinds)
    return [PlannedRun(run, labels[key]) for key, run in runs.items()]


def _is_plain_dense(run: Run) -> bool:
    return run.toy.n_experts == 1 and not run.toy.shared_hidden and run.toy.gate != "sigmoid"


def dense_run(run: Run, width: int) -> Run:
    """The dense run of so many hidden units with everything else a mixture's."""
    from moesaic.moe.config import Run

    return Run(dense_toy(run.toy, width), run.features, run.training, run.seed)


@lru_cache(maxsize=1 << 14)
def dense_toy(toy: ToyConfig, width: int) -> ToyConfig:
    """The same of the architecture alone."""
    return dataclasses.replace(toy, n_hidden=width, n_experts=1, top_k=1, gate="paper", shared_hidden=0)


def width_at_equal(run: Run, name: str) -> int:
    """Width of the dense model nearest to a mixture in a quantity that is counted."""
    return _counted_width(run.toy, run.training.batch_size, name)


@lru_cache(maxsize=1 << 14)
def _counted_width(toy: ToyConfig, batch_size: int, name: str) -> int:
    def dense(width: int) -> float:
        return quantity(dense_toy(toy, width), batch_size, name)

    return nearest_width(dense, quantity(toy, batch_size, name))


def quantity(toy: ToyConfig, batch_size: int, name: str) -> float:
    """A counted quantity of `MATCHES`: per sample, of training, where it is work."""
    from moesaic.metrics.flops import count_flops

    counted = count_flops(toy, batch_size=batch_size)
    found = {
        "total_width": counted.total_width,
        "active_width": counted.active_width,
        "parameters": counted.parameters,
        "active_flops": counted.training.active.total,
        "bytes": None if counted.training.bytes is None else counted.training.bytes.total,
    }[name]
    if found is None:
        raise ValueError(f"{name}: not counted of a configuration")
    return found


def nearest_width(of_width: Callable[[int], float], wanted: float) -> int:
    """The m >= 1 whose ``of_width(m)``, which grows with m, is nearest to ``wanted``; of two the smaller."""
    high = 1
    while of_width(high) < wanted and high < MOST_WIDTH:
        high *= 2
    at = bisect.bisect_left(range(1, high + 1), wanted, key=of_width) + 1
    candidates = [m for m in (at - 1, at) if 1 <= m <= high]
    return min(candidates, key=lambda m: (abs(of_width(m) - wanted), m))


def wall_width(calibration: Mapping[str, object]) -> WallWidth:
    """What solves ``wall`` from measured steps: `moesaic.bench.rates.calibrate_wall` says what they hold.

    Between two measured widths the seconds of a step are on the straight line through both, beyond the widest on the
    last one; a width that was slower than a wider one counts as slow as that, so that seconds grow with the width.
    """
    seconds = calibration["seconds_per_step"]
    if not isinstance(seconds, Mapping):
        raise InputError("calibration: holds no seconds_per_step; start in another folder")
    cached: dict[tuple[ToyConfig, FeatureConfig, int], int] = {}

    def width(run: Run) -> int:
        shape = (run.toy, run.features, run.training.batch_size)
        if shape not in cached:
            widths = seconds[family(run)]["dense"]
            measured = sorted((int(m), float(s)) for m, s in widths.items())
            cached[shape] = nearest_width(_line(measured), float(seconds[family(run)]["moe"][architecture(run)]))
        return cached[shape]

    return width


def _line(measured: Sequence[tuple[int, float]]) -> Callable[[int], float]:
    widths = [m for m, _ in measured]
    rising: list[float] = []
    for _, seconds in measured:
        rising.append(max(seconds, rising[-1] if rising else 0.0))

    def at(width: int) -> float:
        right = min(max(bisect.bisect_left(widths, width), 1), len(widths) - 1)
        (a, b), (low, high) = (widths[right - 1], widths[right]), (rising[right - 1], rising[right])
        return low + (width - a) * (high - low) / (b - a)

    return at


def family(run: Run) -> str:
    """What mixtures that share their dense widths' timings have in common, as a key of JSON."""
    toy, data = run.toy, run.features
    size = data.group_size or data.n_clusters or data.n_active
    parts = {
        "n": toy.n_features, "tied": int(toy.tied), "batch": run.training.batch_size,
        "features": data.features, "p": data.feature_probability, "size": size, "decode": run.training.decode,
        "precision": run.training.precision, "moments": run.training.moments,
    }  # fmt: skip
    return ",".join(f"{name}={value}" for name, value in parts.items())


def architecture(run: Run) -> str:
    """What tells the mixtures of one `family` apart, as a key of JSON."""
    toy = run.toy
    return f"E={toy.n_experts},m={toy.n_hidden},k={toy.top_k},shared={toy.shared_hidden},gate={toy.gate}"
