"""Measured energy: meters that count joules, and the estimator that turns a staircase counter into joules per call.

Power is the least-squares slope through the counter's changes ("ticks") in a window of steady load. The difference of
two reads is biased instead (-4 % at 1 s of a 100 ms counter): the first lags in idle time, the last lacks its tail.
"""

from __future__ import annotations

import importlib
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

Tick = tuple[float, float]
MIN_TICKS, MAX_CV = 10, 0.02
POLL_S, CHUNK_S = 0.002, 0.02


class EnergyMeter(Protocol):
    """A counter of joules, and its clock; ``scope`` names what it covers, as in the column ``gpu_board_j``."""

    scope: str
    update_period_s: float

    def read_j(self) -> float:
        """Joules counted so far, as of the counter's last update."""
        raise NotImplementedError

    def now(self) -> float:
        """Seconds since some fixed moment."""
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        """Wait, idle."""
        time.sleep(seconds)

    @contextmanager
    def record(self) -> Iterator[list[Tick]]:
        """List of (seconds, joules) that grows by each change of the counter; a thread looks every 2 ms."""
        ticks: list[Tick] = []
        stop = threading.Event()

        def poll() -> None:
            last = self.read_j()
            while not stop.wait(POLL_S):
                if (value := self.read_j()) != last:
                    ticks.append((self.now(), value))
                    last = value

        with ThreadPoolExecutor(1) as pool:
            polling = pool.submit(poll)
            try:
                yield ticks
            finally:
                stop.set()
            polling.result()


class NvmlMeter(EnergyMeter):
    """NVIDIA board energy, ``nvmlDeviceGetTotalEnergyConsumption`` (mJ since driver load, Volta and newer).

    Counts the board alone (no CPU, host memory or power supply), steps about every 100 ms, and carries about 5 %
    systematic error per card (arXiv 2312.02741): compare on one card. The device is torch's current one, found by UUID
    because NVML ignores CUDA_VISIBLE_DEVICES. Raises RuntimeError with the reason where there is no such counter.
    """

    scope = "gpu_board"
    update_period_s = 0.1

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("nvml: torch sees no CUDA device")
        try:
            self._nvml: Any = importlib.import_module("pynvml")
        except ImportError as error:
            raise RuntimeError("nvml: pynvml is missing, install moesaic[bench]") from error
        try:
            self._nvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
            self._device = self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            self.read_j()
        except self._nvml.NVMLError as error:
            raise RuntimeError(f"nvml: {error}") from error

    def read_j(self) -> float:
        """Joules since the driver was loaded."""
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device)) / 1e3

    def describe(self) -> dict[str, object]:
        """NVML's answers, in its units (mW, °C, SM clock in MHz, bit mask of throttle reasons), where supported."""
        facts: dict[str, object] = {}
        queries = "Name UUID EnforcedPowerLimit CurrentClocksEventReasons MigMode Temperature:0 ClockInfo:1"
        for query, *which in (words.split(":") for words in queries.split()):
            with suppress(self._nvml.NVMLError):
                facts[query] = getattr(self._nvml, f"nvmlDeviceGet{query}")(self._device, *map(int, which))
        return facts


class RaplMeter(EnergyMeter):
    """CPU package energy, the sum of ``intel-rapl:*/energy_uj`` named ``package-*`` in Linux powercap (Intel and AMD).

    A counter wraps at ``max_energy_range_uj``; one wrap between two reads is undone (it takes minutes at full load).
    Covers cores and caches, not DRAM or the board. Raises RuntimeError with the reason where it cannot be read.
    """

    scope = "cpu_package"
    update_period_s = 0.001

    def __init__(self, root: Path = Path("/sys/class/powercap")) -> None:
        try:
            names = sorted(root.glob("intel-rapl:*/name"))
            self._zones = [name.parent for name in names if name.read_text().startswith("package")]
            self._span_uj = [int((zone / "max_energy_range_uj").read_text()) for zone in self._zones]
            self._last_uj = self._raw_uj()
        except OSError as error:
            raise RuntimeError(f"rapl: cannot read {error.filename}: {error.strerror}") from error
        if not self._zones:
            raise RuntimeError(f"rapl: no intel-rapl package under {root}")
        self._total_uj = 0

    def _raw_uj(self) -> list[int]:
        return [int((zone / "energy_uj").read_text()) for zone in self._zones]

    def read_j(self) -> float:
        """Joules since this meter was made."""
        now = self._raw_uj()
        for new, old, span in zip(now, self._last_uj, self._span_uj, strict=True):
            self._total_uj += new - old if new >= old else new - old + span
        self._last_uj = now
        return self._total_uj / 1e6


class FakeMeter(EnergyMeter):
    """An exact counter on a simulated clock, seen as of its last update (at phase_s + i·update_period_s) and poll."""

    scope = "simulated"

    def __init__(self, *, idle_w: float = 100.0, update_period_s: float = 0.1, phase_s: float = 0.0) -> None:
        self.idle_w, self.update_period_s, self._update_s = idle_w, update_period_s, phase_s
        self._time_s = self._true_j = self._shown_j = 0.0
        self._ticks: list[Tick] = []

    def read_j(self) -> float:
        """Joules as of the last update."""
        return self._shown_j

    def now(self) -> float:
        """Simulated seconds."""
        return self._time_s

    def work(self, seconds: float, watts: float | None = None) -> None:
        """Advance the clock at ``watts``, or at ``idle_w``."""
        watts, end = self.idle_w if watts is None else watts, self._time_s + seconds
        while self._time_s < end:
            until = min(end, self._update_s)
            self._true_j += watts * (until - self._time_s)
            self._time_s = until
            if until == self._update_s:
                self._update_s += self.update_period_s
                self._shown_j = self._true_j
                self._ticks.append((math.ceil(until / POLL_S) * POLL_S, self._shown_j))

    sleep = work

    @contextmanager
    def record(self) -> Iterator[list[Tick]]:
        """List of (seconds, joules) that grows by each update of the counter."""
        self._ticks = []
        yield self._ticks


@dataclass(frozen=True)
class EnergyResult:
    """Energy per call of a workload; every number is None, with a ``reason``, where no meter exists.

    ``joules`` is gross, power x ``seconds`` per call, the mean over trials; ``valid`` iff ``cv`` (sd/mean) < 2 %.
    ``net_joules`` has idle power x seconds taken off: never show it alone. ``ticks`` is the fewest of a trial.
    """

    joules: float | None = None
    joules_sd: float | None = None
    cv: float | None = None
    net_joules: float | None = None
    trial_joules: tuple[float, ...] = ()
    seconds: float | None = None
    power_w: float | None = None
    idle_before_w: float | None = None
    idle_after_w: float | None = None
    ticks: int | None = None
    update_period_s: float | None = None
    valid: bool = False
    scope: str | None = None
    reason: str | None = None
    environment: Mapping[str, object] = field(default_factory=dict)


def find_meter(kind: str = "auto") -> EnergyMeter | str:
    """Meter of this machine: ``nvml``, ``rapl`` or the first of these (``auto``); if there is none, the reason."""
    meters: dict[str, Callable[[], EnergyMeter]] = {"nvml": NvmlMeter, "rapl": RaplMeter}
    if kind not in ("auto", *meters):
        raise ValueError(f"meter={kind!r}: must be one of auto, {', '.join(meters)}")
    reasons = []
    for make in meters.values() if kind == "auto" else [meters[kind]]:
        try:
            return make()
        except RuntimeError as error:
            reasons.append(str(error))
    return "; ".join(reasons)


def fit_power(ticks: Sequence[Tick]) -> float:
    """Watts, the least-squares slope Σ(t - t̄)(E - Ē)/Σ(t - t̄)² of (s, J) ticks; RuntimeError for fewer than 10."""
    if len(ticks) < MIN_TICKS:
        raise RuntimeError(f"{len(ticks)} counter ticks in the window, {MIN_TICKS} are needed: measure longer")
    times, joules = zip(*ticks, strict=True)
    return statistics.linear_regression(times, joules).slope


def measure_energy(
    fn: Callable[[], object],
    *,
    meter: str | EnergyMeter = "auto",
    duration_s: float = 5.0,
    trials: int = 5,
    cooldown_s: float = 5.0,
    warmup_s: float = 2.0,
    idle_s: float = 10.0,
) -> EnergyResult:
    """Joules per call of ``fn``: idle, then per trial warm-up, a window of back-to-back calls, cool-down, then idle.

    Power is `fit_power` of the ticks wholly inside a window, J/call = power x window/calls. On an NVIDIA board calls
    are launched about 20 ms at a time and waited for: a window is the time of finished work. Without a meter ``fn`` is
    never called. Compare workloads at equal ``duration_s``, on the same data, with nothing else on the device.

    Raises ValueError before any call for an unknown meter, fewer than 2 trials or a time too short (a window takes 10
    updates), and RuntimeError for fewer than 10 ticks in a window.
    """
    source = find_meter(meter) if isinstance(meter, str) else meter
    window_s = 0.0 if isinstance(source, str) else MIN_TICKS * source.update_period_s
    limits = {"trials": (trials, 2), "duration_s": (duration_s, window_s), "idle_s": (idle_s, window_s)}
    limits |= {"cooldown_s": (cooldown_s, 0), "warmup_s": (warmup_s, 0)}
    for name, (value, least) in limits.items():
        if not value >= least:
            raise ValueError(f"{name}={value!r}: must be at least {least:g}")
    if isinstance(source, str):
        return EnergyResult(reason=source)
    wait: Callable[[], object] = torch.cuda.synchronize if isinstance(source, NvmlMeter) else dict
    state: Callable[[], object] = source.describe if isinstance(source, NvmlMeter) else dict
    before, now = state(), source.now

    def run(seconds: float, call: Callable[[], object]) -> tuple[float, float, int]:
        start, calls, chunk = now(), 0, 1
        while (begin := now()) < start + seconds:
            for _ in range(chunk):
                call()
            wait()
            calls += chunk
            chunk *= 2 if now() - begin < CHUNK_S else 1
        return start, begin, calls

    rest = partial(run, idle_s, partial(source.sleep, CHUNK_S))
    with source.record() as ticks:
        windows = [rest()]
        for _ in range(trials):
            run(warmup_s, fn)
            windows.append(run(duration_s, fn))
            source.sleep(cooldown_s)
        windows.append(rest())
    seen = [[tick for tick in ticks if start <= tick[0] <= end] for start, end, _ in windows]
    idle_before_w, *watts, idle_after_w = map(fit_power, seen)
    seconds = [(end - start) / calls for start, end, calls in windows[1:-1]]
    joules = [w * s for w, s in zip(watts, seconds, strict=True)]
    mean, sd = statistics.mean(joules), statistics.stdev(joules)
    return EnergyResult(
        joules=mean,
        joules_sd=sd,
        cv=sd / mean,
        net_joules=mean - (idle_before_w + idle_after_w) / 2 * statistics.mean(seconds),
        trial_joules=tuple(joules),
        seconds=statistics.mean(seconds),
        power_w=statistics.mean(watts),
        idle_before_w=idle_before_w,
        idle_after_w=idle_after_w,
        ticks=min(map(len, seen[1:-1])),
        update_period_s=(ticks[-1][0] - ticks[0][0]) / (len(ticks) - 1),
        valid=sd / mean < MAX_CV,
        scope=source.scope,
        environment={"torch": torch.__version__, "before": before, "after": state()},
    )
