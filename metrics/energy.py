"""Measured energy: the protocol that turns the staircase counter of a meter into joules per call, and ratios of them.

Power is the least-squares slope through the counter's changes ("ticks") in a window of steady load. The difference of
two reads is biased instead (-4 % at 1 s of a 100 ms counter): the first lags in idle time, the last lacks its tail.
"""

from __future__ import annotations

import importlib.metadata
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch

from moesaic.metrics.meters import BoardState as BoardState
from moesaic.metrics.meters import EnergyMeter as EnergyMeter
from moesaic.metrics.meters import FakeMeter as FakeMeter
from moesaic.metrics.meters import Mark as Mark
from moesaic.metrics.meters import NvmlMeter as NvmlMeter
from moesaic.metrics.meters import RaplMeter as RaplMeter
from moesaic.metrics.meters import Recording as Recording
from moesaic.metrics.meters import Tick as Tick
from moesaic.metrics.meters import ZeusMeter as ZeusMeter
from moesaic.metrics.meters import find_meter as find_meter
from moesaic.metrics.meters import throttle_reasons as throttle_reasons

ESTIMATOR = "least-squares slope over counter ticks"
MIN_TICKS, MAX_CV, WINDOW_TOLERANCE = 10, 0.02, 0.05
CHUNK_S = 0.02
COOL_WITHIN_C, COOL_LIMIT, COOL_LOOK_S = 2.0, 3.0, 0.5


@dataclass(frozen=True)
class EnergyResult:
    """Energy per call of a workload; every number is None, with a ``reason``, where no meter exists.

    ``joules`` is gross, power x ``seconds`` per call, the mean over trials; ``valid`` iff ``cv`` (sd/mean) < 2 %.
    ``net_joules`` has ``idle_w`` x seconds taken off: never show it alone. ``ticks`` is the fewest of a trial,
    ``window_s`` the mean of ``trial_window_s``, and ``board`` the UUID or name of what was counted. ``environment``
    has the board, versions, settings, temperatures, and clocks and throttle reasons seen in this side's windows.
    """

    joules: float | None = None
    joules_sd: float | None = None
    cv: float | None = None
    net_joules: float | None = None
    trial_joules: tuple[float, ...] = ()
    seconds: float | None = None
    power_w: float | None = None
    idle_w: float | None = None
    idle_before_w: float | None = None
    idle_after_w: float | None = None
    ticks: int | None = None
    update_period_s: float | None = None
    window_s: float | None = None
    trial_window_s: tuple[float, ...] = ()
    trial_calls: tuple[int, ...] = ()
    estimator: str | None = None
    valid: bool = False
    scope: str | None = None
    board: str | None = None
    reason: str | None = None
    environment: Mapping[str, object] = field(default_factory=dict)

    def as_row(self) -> dict[str, object]:
        """The fields for a row of JSON, joules named by their scope: ``gpu_board_j`` is joules per call, gross.

        With it come ``gpu_board_j_sd``, ``gpu_board_j_net`` and ``gpu_board_j_trials``; without a meter none of them.
        """
        row = asdict(self)
        row |= {name: list(value) for name, value in row.items() if isinstance(value, tuple)}
        of_scope = {"": "joules", "_sd": "joules_sd", "_net": "net_joules", "_trials": "trial_joules"}
        joules = {f"{self.scope}_j{end}": row.pop(name) for end, name in of_scope.items()}
        return row if self.scope is None else joules | row


@dataclass(frozen=True)
class EnergyRatio:
    """Joules per call of one workload over another's: of the means, and its ``low`` and ``high`` trial by trial."""

    ratio: float
    low: float
    high: float
    trials: tuple[float, ...]


@dataclass(frozen=True)
class _Window:
    """Steady load from ``start`` to ``end`` on the meter's clock; ``seconds`` is what its ``calls`` took."""

    start: float
    end: float
    seconds: float
    calls: int = 0


def least_squares_slope(ticks: Sequence[Tick]) -> float:
    """Watts, Σ(t - t̄)(E - Ē)/Σ(t - t̄)² of (s, J) ticks; statistics.StatisticsError for fewer than 2."""
    times, joules = zip(*ticks, strict=True)
    return statistics.linear_regression(times, joules).slope


def fit_power(ticks: Sequence[Tick]) -> float:
    """Watts, the `least_squares_slope` of (s, J) ticks; RuntimeError for fewer than 10."""
    if len(ticks) < MIN_TICKS:
        raise RuntimeError(f"{len(ticks)} counter ticks in the window, {MIN_TICKS} are needed: measure longer")
    return least_squares_slope(ticks)


def measure_energy(
    fn: Callable[[], object],
    *,
    meter: str | EnergyMeter = "auto",
    device: str | torch.device | None = None,
    duration_s: float = 5.0,
    trials: int = 5,
    cooldown_s: float = 5.0,
    warmup_s: float = 2.0,
    idle_s: float = 10.0,
) -> EnergyResult:
    """Joules per call of ``fn``: `compare_energy` with one workload. Compare two by that, not by two calls of this."""
    found = compare_energy(
        {"fn": fn},
        meter=meter,
        device=device,
        duration_s=duration_s,
        trials=trials,
        cooldown_s=cooldown_s,
        warmup_s=warmup_s,
        idle_s=idle_s,
    )
    return found["fn"]


def compare_energy(
    workloads: Mapping[str, Callable[[], object]],
    *,
    meter: str | EnergyMeter = "auto",
    device: str | torch.device | None = None,
    duration_s: float = 5.0,
    trials: int = 5,
    cooldown_s: float = 5.0,
    warmup_s: float = 2.0,
    idle_s: float = 10.0,
) -> dict[str, EnergyResult]:
    """Joules per call of each workload, in trials that alternate (A B A B ...) in windows of equal duration.

    One call of each (compilation is no load), ``idle_s`` of idling, then by turns ``trials`` times for each: warm-up, a
    window of back-to-back calls, cool-down; ``idle_s`` again. Power is `fit_power` of the ticks strictly inside a
    window, J/call = power x seconds/calls. ``meter`` and ``device``, where the workloads run, are those of `find_meter`
    (a meter made by the caller knows its own device). Without a meter no workload is called.

    On a GPU calls are launched in chunks of 20 to 40 ms, sized in warm-up, the next before the last is waited for, so
    that the GPU never idles; seconds are those of CUDA events, and a window begins and ends with a chunk's end. The
    events are on the current stream: work on others must be joined to it. Where a call is shorter than its launch the
    GPU starves all the same: capture it in a CUDA graph and pass the graph's ``replay``. Pass all sides the same random
    data (power depends on operand bits), say whether caches are warm, and have nothing else on the device.

    A cool-down is ``cooldown_s`` at least; where the meter tells the temperature it goes on until that is at most 2 °C
    above that of the idle board before the first trial, for 3·``cooldown_s`` at most in all.

    Raises:
        ValueError: before any call for an unknown meter or device, no workload, fewer than 2 trials or a time too short
            (11 updates, of which 10 are surely inside); after a round of trials for windows that differ by more than
            5 % between workloads, as a bias that depends on the window would be taken for a difference.
        RuntimeError: after idling or a round of trials, for fewer than 10 ticks in a window.
    """
    source = find_meter(meter, device) if isinstance(meter, str) else meter
    window_s = 0.0 if isinstance(source, str) else (MIN_TICKS + 1) * source.update_period_s
    limits = {"trials": (trials, 2), "duration_s": (duration_s, window_s), "idle_s": (idle_s, window_s)}
    limits |= {"cooldown_s": (cooldown_s, 0), "warmup_s": (warmup_s, 0)}
    for name, (value, least) in limits.items():
        if not value >= least:
            raise ValueError(f"{name}={value!r}: must be at least {least:g}")
    if not workloads:
        raise ValueError("workloads={}: must name at least one")
    if isinstance(source, str):
        return {name: EnergyResult(reason=source) for name in workloads}
    settings: dict[str, object] = {
        "trials": trials,
        "duration_s": duration_s,
        "warmup_s": warmup_s,
        "cooldown_s": cooldown_s,
    }
    settings |= {"idle_s": idle_s, "workloads": list(workloads), "meter": type(source).__name__}
    loads = {name: _Load(source, fn) for name, fn in workloads.items()}
    windows: dict[str, list[_Window]] = {name: [] for name in workloads}
    with source.record() as recording:
        for fn in workloads.values():
            fn()
        source.finish()
        before = source.describe()
        idle = [_idle(source, idle_s)]
        fit_power(_inside(recording, idle[0]))  # a counter that stands still is refused before the long part
        start_c = source.state().temperature_c
        for _ in range(trials):
            for name, load in loads.items():
                windows[name].append(load.trial(warmup_s, duration_s))
                _cool(source, cooldown_s, start_c)
            for done in windows.values():
                fit_power(_inside(recording, done[-1]))
            _refuse_unequal({name: [w.seconds for w in seen] for name, seen in windows.items()}, duration_s)
        idle.append(_idle(source, idle_s))
        after = source.describe()
        temperatures = {"temperature_before_c": start_c, "temperature_after_c": source.state().temperature_c}
    others = [seen for facts in (before, after) if isinstance(seen := facts.get("other_processes"), int)]
    common = _versions() | before | temperatures | settings
    common |= {"other_processes": max(others, default=None)}
    return {name: _result(source, recording, idle, seen, common) for name, seen in windows.items()}


def energy_ratio(a: EnergyResult, b: EnergyResult) -> EnergyRatio:
    """Joules per call of ``a`` over ``b``, with the lowest and highest ratio of trials of the same round.

    Raises ValueError where the ratio would mean nothing: a result without joules or not ``valid``, different scopes,
    boards or counts of trials, or windows that differ by more than 5 %.
    """
    for name, result in (("a", a), ("b", b)):
        if result.joules is None:
            raise ValueError(f"{name}: has no joules ({result.reason})")
        if not result.valid:
            raise ValueError(f"{name}: is not valid, its trials vary by {result.cv or 0:.1%}, less than 2 % is")
    assert a.joules is not None
    assert b.joules is not None
    for what in ("scope", "board"):
        if getattr(a, what) != getattr(b, what):
            raise ValueError(f"a and b: {what} {getattr(a, what)} and {getattr(b, what)}, must be the same")
    if len(a.trial_joules) != len(b.trial_joules):
        raise ValueError(f"a and b: {len(a.trial_joules)} and {len(b.trial_joules)} trials, must be as many")
    _refuse_unequal({"a": a.trial_window_s, "b": b.trial_window_s})
    trials = tuple(x / y for x, y in zip(a.trial_joules, b.trial_joules, strict=True))
    return EnergyRatio(a.joules / b.joules, min(trials), max(trials), trials)


class _Load:
    """Back-to-back calls in chunks of at least `CHUNK_S`, one in flight while the last is waited for."""

    def __init__(self, meter: EnergyMeter, fn: Callable[[], object]) -> None:
        self._meter, self._fn, self._size, self._long = meter, fn, 1, 0

    def _launch(self) -> tuple[Mark, int]:
        for _ in range(self._size):
            self._fn()
        return self._meter.mark(), self._size

    def _chunks(self) -> Iterator[tuple[Mark, int]]:
        """Chunks that are done: their marks and numbers of calls."""
        ahead = None
        while True:
            mark, calls = ahead or self._launch()
            ahead = None if mark.immediate else self._launch()
            mark.wait()
            yield mark, calls

    def trial(self, warmup_s: float, duration_s: float) -> _Window:
        """Warm up, at least until chunks are long enough, and go on into the window without a gap."""
        chunks, first = self._chunks(), self._meter.mark()
        first.wait()
        last = first
        for mark, calls in chunks:
            if calls == self._size:  # else it was launched before the last doubling
                self._long += 1
                if mark.since(last) < CHUNK_S:
                    self._size, self._long = 2 * self._size, 0
            last = mark
            if self._long >= 2 and mark.since(first) >= warmup_s:  # one may be long by a late compilation
                break
        start, total = self._meter.now(), 0
        for mark, calls in chunks:
            total += calls
            if (seconds := mark.since(last)) >= duration_s:
                break
        end = self._meter.now()
        self._meter.finish()
        return _Window(start, end, seconds, total)


def _idle(meter: EnergyMeter, seconds: float) -> _Window:
    start = meter.now()
    meter.sleep(seconds)
    return _Window(start, meter.now(), seconds)


def _cool(meter: EnergyMeter, cooldown_s: float, start_c: float | None) -> None:
    limit = meter.now() + COOL_LIMIT * cooldown_s
    meter.sleep(cooldown_s)
    while start_c is not None and (left := limit - meter.now()) > 0:
        now_c = meter.state().temperature_c
        if now_c is None or now_c - start_c <= COOL_WITHIN_C:
            return
        meter.sleep(min(COOL_LOOK_S, left))


def _inside(recording: Recording, window: _Window) -> list[Tick]:
    return [tick for tick in recording.ticks if window.start < tick[0] < window.end]


def _refuse_unequal(windows: Mapping[str, Sequence[float]], duration_s: float | None = None) -> None:
    """ValueError unless the windows of several sides agree within 5 %."""
    seconds = [s for side in windows.values() for s in side]
    if len(windows) > 1 and max(seconds) > (1 + WINDOW_TOLERANCE) * min(seconds):
        took = ", ".join(f"{name} {min(side):.3g} to {max(side):.3g} s" for name, side in windows.items())
        asked = "windows" if duration_s is None else f"duration_s={duration_s:g}"
        raise ValueError(f"{asked}: windows differ by more than {WINDOW_TOLERANCE:.0%} ({took}); raise duration_s")


def _versions() -> dict[str, object]:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {"torch": torch.__version__, "triton": triton, "cuda": torch.version.cuda, "rocm": torch.version.hip}


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    return {"min": min(known), "median": statistics.median(known), "max": max(known)} if known else None


def _seen(recording: Recording, windows: Sequence[_Window]) -> dict[str, object]:
    """Clocks, temperature and throttle reasons over the states inside the windows; None where none is told."""
    states = [state for when, state in recording.states if any(w.start < when < w.end for w in windows)]
    masks = [state.throttle_mask for state in states if state.throttle_mask is not None]
    mask = 0
    for seen in masks:
        mask |= seen
    return {
        "sm_clock_mhz": _spread([state.sm_clock_mhz for state in states]),
        "memory_clock_mhz": _spread([state.memory_clock_mhz for state in states]),
        "temperature_c": _spread([state.temperature_c for state in states]),
        "throttle_mask": mask if masks else None,
        "throttle_reasons": throttle_reasons(mask) if masks else None,
    }


def _result(
    meter: EnergyMeter,
    recording: Recording,
    idle: Sequence[_Window],
    windows: Sequence[_Window],
    environment: Mapping[str, object],
) -> EnergyResult:
    seen = [_inside(recording, window) for window in windows]
    watts = [fit_power(ticks) for ticks in seen]
    idle_before_w, idle_after_w = (fit_power(_inside(recording, window)) for window in idle)
    per_call = [window.seconds / window.calls for window in windows]
    joules = [w * s for w, s in zip(watts, per_call, strict=True)]
    mean, sd, seconds = statistics.mean(joules), statistics.stdev(joules), statistics.mean(per_call)
    idle_w, ticks = (idle_before_w + idle_after_w) / 2, recording.ticks
    return EnergyResult(
        joules=mean,
        joules_sd=sd,
        cv=sd / mean,
        net_joules=mean - idle_w * seconds,
        trial_joules=tuple(joules),
        seconds=seconds,
        power_w=statistics.mean(watts),
        idle_w=idle_w,
        idle_before_w=idle_before_w,
        idle_after_w=idle_after_w,
        ticks=min(map(len, seen)),
        update_period_s=(ticks[-1][0] - ticks[0][0]) / (len(ticks) - 1),
        window_s=statistics.mean(window.seconds for window in windows),
        trial_window_s=tuple(window.seconds for window in windows),
        trial_calls=tuple(window.calls for window in windows),
        estimator=ESTIMATOR,
        valid=sd / mean < MAX_CV,
        scope=meter.scope,
        board=meter.board,
        environment={**environment, **_seen(recording, windows)},
    )
