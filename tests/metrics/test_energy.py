"""The protocol on a simulated clock: what it estimates, in which order, and what it refuses."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moesaic.metrics import meters
from moesaic.metrics.energy import (
    BoardState,
    EnergyMeter,
    EnergyResult,
    FakeMeter,
    Mark,
    RaplMeter,
    Recording,
    Tick,
    compare_energy,
    energy_ratio,
    fit_power,
    least_squares_slope,
    measure_energy,
)

BUSY_W, IDLE_W = 600.0, 100.0
PHASES = [i / 16 for i in range(16)]


def slope_and_difference(
    window_s: float, period_s: float, phase: float, jitter: np.random.Generator | None = None
) -> tuple[float, float]:
    """Relative errors of the slope and of E(end) - E(begin) for a load that starts with the window, after idling.

    The meter sees an update at the next poll, every 2 ms; with ``jitter`` at a random moment up to 2 ms after it.
    """
    meter = FakeMeter(idle_w=IDLE_W, update_period_s=period_s, phase_s=phase * period_s)
    meter.sleep(3.0)
    with meter.record() as recording:
        start, begin_j = meter.now(), meter.read_j()
        meter.work(window_s, BUSY_W)
        end, end_j = meter.now(), meter.read_j()
    ticks = recording.ticks
    if jitter is not None:
        ticks = [(t + jitter.uniform(0, 0.002), joules) for t, joules in ticks]
    # The first tick ends a step that began idle, but a slope only sees what was counted after it.
    slope = least_squares_slope([tick for tick in ticks if start < tick[0] < end])
    return slope / BUSY_W - 1, (end_j - begin_j) / (BUSY_W * window_s) - 1


@pytest.mark.parametrize("period_s", [0.0207, 0.0503, 0.1003])
@pytest.mark.parametrize("window_s", [0.5, 0.7, 1.0, 2.0, 5.0])
def test_slope_is_unbiased_in_every_phase_of_the_counter(window_s: float, period_s: float) -> None:
    errors = [slope_and_difference(window_s, period_s, phase)[0] for phase in PHASES]
    assert max(map(abs, errors)) < 0.005
    assert abs(sum(errors) / len(errors)) < 0.001


@pytest.mark.parametrize("window_s", [0.5, 1.0, 5.0])
def test_slope_is_unbiased_when_polls_come_2_ms_late(window_s: float) -> None:
    generator = np.random.default_rng(0)
    phases = [i / 64 for i in range(64)]
    errors = [slope_and_difference(window_s, 0.1, phase, generator)[0] for phase in phases]
    assert abs(sum(errors) / len(errors)) < 0.002
    assert max(map(abs, errors)) < (0.015 if window_s < 1 else 0.005)


def test_difference_of_two_reads_is_biased_by_4_percent_at_1_s() -> None:
    errors = [slope_and_difference(1.05, 0.1, phase)[1] for phase in PHASES]
    assert sum(errors) / len(errors) == pytest.approx(-0.05 * (1 - IDLE_W / BUSY_W) / 1.05, abs=0.003)


def test_fit_power_is_the_least_squares_slope() -> None:
    ticks = [(50.0 + 0.1 * i, 1e6 + 30.0 * i + (i % 3) ** 2) for i in range(20)]
    times, joules = np.array(ticks).T
    assert fit_power(ticks) == pytest.approx(np.polyfit(times - 50, joules - 1e6, 1)[0], rel=1e-9)
    assert fit_power(ticks) != pytest.approx((joules[-1] - joules[0]) / (times[-1] - times[0]), rel=1e-3)


def test_fit_power_refuses_nine_ticks() -> None:
    ticks = [(0.1 * i, 3.0 * i) for i in range(10)]
    assert fit_power(ticks) == pytest.approx(30.0)
    with pytest.raises(RuntimeError, match="9 counter ticks in the window, 10 are needed"):
        fit_power(ticks[1:])


def test_measure_gives_gross_and_net_joules_per_call() -> None:
    meter = FakeMeter(idle_w=IDLE_W, update_period_s=0.1, phase_s=0.037)
    result = measure_energy(lambda: meter.work(0.0031, BUSY_W), meter=meter)
    assert result.joules == pytest.approx(0.0031 * BUSY_W, rel=0.005)
    assert result.net_joules == pytest.approx(0.0031 * (BUSY_W - IDLE_W), rel=0.005)
    assert result.seconds == pytest.approx(0.0031)
    assert result.power_w == pytest.approx(BUSY_W, rel=0.005)
    assert result.idle_before_w == pytest.approx(IDLE_W, rel=0.005)
    assert result.idle_after_w == pytest.approx(IDLE_W, rel=0.005)
    assert result.idle_w == pytest.approx(IDLE_W, rel=0.005)
    assert result.update_period_s == pytest.approx(0.1, rel=0.01)
    assert len(result.trial_joules) == 5
    assert result.ticks in (49, 50, 51)
    assert result.window_s == pytest.approx(5, abs=0.025)
    assert result.trial_window_s == pytest.approx([calls * 0.0031 for calls in result.trial_calls])
    assert result.estimator == "least-squares slope over counter ticks"
    assert (result.valid, result.scope, result.reason) == (True, "simulated", None)


def test_calls_longer_than_an_update_are_measured_too() -> None:
    meter = FakeMeter(idle_w=IDLE_W, update_period_s=0.1, phase_s=0.037)
    result = measure_energy(lambda: meter.work(0.73, BUSY_W), meter=meter)
    assert result.joules == pytest.approx(0.73 * BUSY_W, rel=0.005)
    assert result.trial_calls == (7, 7, 7, 7, 7)


def test_each_trial_warms_up_and_cools_down_after_one_call_that_compiles() -> None:
    meter = FakeMeter(idle_w=IDLE_W)
    calls: list[float] = []

    def fn() -> None:
        meter.work(0.5 if calls else 30.0, BUSY_W)
        calls.append(meter.now())

    result = measure_energy(fn, meter=meter, duration_s=2, trials=3, cooldown_s=4, warmup_s=1, idle_s=7)
    assert len(calls) == 1 + 3 * 6
    gaps = [b - a for a, b in itertools.pairwise(calls)]
    assert calls[0] == 30
    assert sorted(gaps)[-3:] == pytest.approx([4.5, 4.5, 7.5])
    assert max(sorted(gaps)[:-3]) == pytest.approx(0.5)
    assert meter.now() == pytest.approx(30 + 7 + 3 * (1 + 2 + 4) + 7)
    assert result.trial_window_s == pytest.approx([2, 2, 2])


def test_trials_alternate_and_a_drift_hits_both_sides() -> None:
    meter = FakeMeter(idle_w=IDLE_W)
    order: list[str] = []

    def workload(name: str, seconds: float) -> None:
        order.append(name)
        meter.work(seconds, BUSY_W * (1 + 0.04 * meter.now() / 120))

    sides = {"a": lambda: workload("a", 0.004), "b": lambda: workload("b", 0.004)}
    found = compare_energy(sides, meter=meter)
    assert [name for name, _ in itertools.groupby(order)] == ["a", "b"] * 6
    assert list(found) == ["a", "b"]
    ratio = energy_ratio(found["b"], found["a"])
    assert found["a"].cv == pytest.approx(0.0125, abs=0.002)
    # One side after the other, b would have come 60 s after a and 2 % dearer; by turns it is 12 s and 0.4 %.
    assert ratio.ratio == pytest.approx(1.004, abs=0.001)
    assert ratio.trials == pytest.approx([1.004] * 5, abs=0.001)
    assert (ratio.low, ratio.high) == (min(ratio.trials), max(ratio.trials))


def test_unequal_windows_are_refused_after_the_first_round() -> None:
    meter = FakeMeter()
    sides = {"dense": lambda: meter.work(1.75, BUSY_W), "moe": lambda: meter.work(1 / 32, BUSY_W)}
    message = r"duration_s=2: windows differ by more than 5% \(dense 3.5 to 3.5 s, moe 2 to 2 s\); raise duration_s"
    with pytest.raises(ValueError, match=message):
        compare_energy(sides, meter=meter, duration_s=2, idle_s=1.25)
    assert meter.now() == 1.75 + 1 / 32 + 1.25 + (3.5 + 3.5 + 5) + (2 + 2 + 5)
    windows = [found.window_s for found in compare_energy(sides, meter=meter, duration_s=17.5).values()]
    assert windows == pytest.approx([17.5, 17.5])


RESULT = EnergyResult(
    joules=3.0,
    trial_joules=(2.97, 3.03),
    trial_window_s=(5.0, 5.1),
    valid=True,
    scope="gpu_board",
    board="GPU-1",
)


def test_ratio_of_results_with_its_spread() -> None:
    ratio = energy_ratio(RESULT, replace(RESULT, joules=2.0, trial_joules=(2.0, 2.0)))
    assert asdict(ratio) == {"ratio": 1.5, "low": 2.97 / 2, "high": 3.03 / 2, "trials": (2.97 / 2, 3.03 / 2)}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (EnergyResult(reason="nvml: no"), r"b: has no joules \(nvml: no\)"),
        (replace(RESULT, valid=False, cv=0.031), "b: is not valid, its trials vary by 3.1%"),
        (replace(RESULT, scope="cpu_package"), "a and b: scope gpu_board and cpu_package"),
        (replace(RESULT, board="GPU-2"), "a and b: board GPU-1 and GPU-2"),
        (replace(RESULT, trial_joules=(3.0,) * 3), "a and b: 2 and 3 trials"),
        (replace(RESULT, trial_window_s=(5.0, 5.3)), r"windows differ by more than 5% \(a 5 to 5.1 s, b 5 to 5.3 s\)"),
    ],
)
def test_ratios_without_meaning_are_refused(other: EnergyResult, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        energy_ratio(RESULT, other)


@pytest.mark.parametrize(("step", "valid"), [(0.002, True), (0.02, False)])
def test_validity_needs_trials_within_2_percent(step: float, valid: bool) -> None:
    meter = FakeMeter(idle_w=IDLE_W)

    def fn() -> None:
        meter.work(0.01, BUSY_W * (1 + step * (meter.now() // 20)))

    result = measure_energy(fn, meter=meter, duration_s=10, cooldown_s=8, trials=4)
    joules = torch.tensor(result.trial_joules, dtype=torch.float64)
    assert result.valid is valid
    assert result.joules == pytest.approx(joules.mean().item())
    assert result.joules_sd == pytest.approx(joules.std().item())
    assert result.cv == pytest.approx((joules.std() / joules.mean()).item())


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"duration_s": 1.0}, "duration_s=1.0: must be at least 1.1"),
        ({"idle_s": 0.0}, "idle_s=0.0: must be at least 1.1"),
        ({"trials": 1}, "trials=1: must be at least 2"),
        ({"cooldown_s": -1.0}, "cooldown_s=-1.0: must be at least 0"),
        ({"warmup_s": float("nan")}, "warmup_s=nan: must be at least 0"),
    ],
)
def test_impossible_values_are_named_before_any_call(keywords: dict[str, float], message: str) -> None:
    meter = FakeMeter()
    with pytest.raises(ValueError, match=message):
        measure_energy(lambda: pytest.fail("called"), meter=meter, **keywords)  # type: ignore[arg-type]
    assert meter.now() == 0
    with pytest.raises(ValueError, match=r"workloads=\{\}: must name at least one"):
        compare_energy({}, meter=meter)


@pytest.mark.parametrize(("after_s", "refused_s"), [(0.0, 10.1), (12.5, 22.1), (24.5, 34.1)])
def test_a_counter_that_stops_is_an_error_after_the_round_not_a_number(after_s: float, refused_s: float) -> None:
    class Stalling(FakeMeter):
        @contextmanager
        def record(self) -> Iterator[Recording]:
            with super().record() as recording:
                self.kept = recording
                yield recording

        def work(self, seconds: float, watts: float | None = None) -> None:
            super().work(seconds, watts)
            if self.now() > after_s and hasattr(self, "kept"):
                self.kept.ticks[:] = [tick for tick in self.kept.ticks if tick[0] < after_s]

    meter = Stalling()
    with pytest.raises(RuntimeError, match=r"\d counter ticks in the window, 10 are needed"):
        measure_energy(lambda: meter.work(0.1, BUSY_W), meter=meter)
    assert meter.now() == pytest.approx(refused_s, abs=0.21)  # two calls longer at most


def test_no_meter_gives_null_and_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(meters, "RaplMeter", lambda device: RaplMeter(tmp_path, device=device))
    result = measure_energy(lambda: pytest.fail("called"), device="cpu")
    reason = "; ".join(f"{kind}: counts the board of a GPU, the workload runs on cpu" for kind in ("nvml", "zeus"))
    assert result == EnergyResult(reason=f"{reason}; rapl: no intel-rapl package under {tmp_path}")
    assert result.joules is None
    assert not result.valid
    assert result.as_row()["reason"] == result.reason
    assert [name for name in result.as_row() if "joules" in name or "_j" in name] == []


class Gpu(FakeMeter):
    """A queue of launched work, each launch ``launch_s`` of the host's time; ``gaps`` is how long it stood empty."""

    def __init__(self, launch_s: float) -> None:
        super().__init__(idle_w=IDLE_W)
        self.launch_s, self.done_s = launch_s, 0.0
        self.gaps: list[float] = []
        self.marks = [0.0]

    def until(self, moment: float) -> None:
        """Let the clock run, busy while there is work."""
        for end, watts in ((min(moment, self.done_s), BUSY_W), (moment, IDLE_W)):
            self.work(max(0.0, end - self.now()), watts)

    def launch(self, seconds: float) -> None:
        self.until(self.now() + self.launch_s)
        if self.now() > self.done_s:
            self.gaps.append(self.now() - self.done_s)
        self.done_s = max(self.now(), self.done_s) + seconds

    def sleep(self, seconds: float) -> None:
        self.until(self.now() + seconds)

    def mark(self) -> Mark:
        self.marks.append(max(self.now(), self.done_s))
        return GpuMark(self)

    def finish(self) -> None:
        self.until(self.done_s)


class GpuMark(Mark):
    immediate = False

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.done_s = gpu, gpu.marks[-1]

    def wait(self) -> None:
        self.gpu.until(self.done_s)

    def since(self, earlier: GpuMark) -> float:
        return self.done_s - earlier.done_s


@pytest.mark.parametrize("call_s", [2e-5, 1e-4, 0.3])
def test_a_gpu_never_runs_out_of_launched_work_inside_a_trial(call_s: float) -> None:
    gpu = Gpu(launch_s=1e-5)
    result = measure_energy(lambda: gpu.launch(call_s), meter=gpu, duration_s=1.1, trials=2, idle_s=2)
    assert gpu.gaps == pytest.approx([1e-5, 2 + 1e-5, 5 + 1e-5])  # before the first call, in idling, in cool-down
    assert result.joules == pytest.approx(call_s * BUSY_W, rel=2e-3)
    assert result.seconds == pytest.approx(call_s, rel=1e-6)
    assert result.idle_after_w == pytest.approx(IDLE_W, rel=5e-3)
    assert result.trial_window_s == pytest.approx([1.12 if call_s < 0.3 else 1.2] * 2, abs=0.021)


@pytest.mark.parametrize("warmup_s", [0.0, 1.0])
def test_chunks_are_20_to_40_ms_long_in_every_window_though_the_second_call_compiles(warmup_s: float) -> None:
    gpu, calls = Gpu(launch_s=1e-6), itertools.count()

    def fn() -> None:
        gpu.launch(1.7 if next(calls) == 1 else 3e-5)

    measure_energy(fn, meter=gpu, duration_s=1.1, trials=2, idle_s=1.1, warmup_s=warmup_s)
    chunks = [b - a for a, b in itertools.pairwise(gpu.marks)]
    assert len([chunk for chunk in chunks if 0.02 <= chunk <= 0.04]) > 2 * 1.1 / 0.04
    assert len([chunk for chunk in chunks if 0 < chunk < 0.02]) <= 2 * 10  # twice each size: one was in flight
    assert max(chunk for chunk in chunks if chunk < 1) <= 0.04


class Warm(FakeMeter):
    """A board that heats by 0.05 °C/W above 20 °C with time constant ``tau_s``, and slows down as it does."""

    def __init__(self, tau_s: float) -> None:
        super().__init__(idle_w=IDLE_W)
        self.tau_s, self.celsius, self.watts = tau_s, 25.0, IDLE_W

    def work(self, seconds: float, watts: float | None = None) -> None:
        self.watts = self.idle_w if watts is None else watts
        self.celsius += (20 + 0.05 * self.watts - self.celsius) * -math.expm1(-seconds / self.tau_s)
        super().work(seconds, watts)

    def state(self) -> BoardState:
        if self.watts == IDLE_W:
            return BoardState(sm_clock_mhz=300, memory_clock_mhz=100, throttle_mask=1, temperature_c=self.celsius)
        clock = 2 * self.watts - self.celsius
        return BoardState(sm_clock_mhz=clock, memory_clock_mhz=2619, throttle_mask=4, temperature_c=self.celsius)


@pytest.mark.parametrize(("tau_s", "rests_s"), [(1000.0, 5.0), (4.0, 9.5), (30.0, 15.0)])
def test_cool_down_waits_for_the_temperature_but_not_for_ever(tau_s: float, rests_s: float) -> None:
    meter, calls = Warm(tau_s), [0.0]

    def fn() -> None:
        calls.append(meter.now())
        meter.work(0.05, BUSY_W)

    measure_energy(fn, meter=meter, trials=2)
    assert max(b - a for a, b in itertools.pairwise(calls[2:])) - 0.05 == pytest.approx(rests_s)


def test_the_environment_is_that_of_a_side_s_windows() -> None:
    meter = Warm(tau_s=4)
    sides = {"a": lambda: meter.work(0.03, 600.0), "b": lambda: meter.work(0.03, 800.0)}
    found = compare_energy(sides, meter=meter)
    for result, watts in zip(found.values(), (600, 800), strict=True):
        facts = result.environment
        celsius, clock = facts["temperature_c"], facts["sm_clock_mhz"]
        assert isinstance(celsius, dict)
        assert isinstance(clock, dict)
        assert 30 < celsius["min"] < celsius["median"] < celsius["max"] < 20 + 0.05 * watts
        assert clock == pytest.approx({"min": 2 * watts - celsius["max"], "median": 2 * watts - celsius["median"],
                                       "max": 2 * watts - celsius["min"]})  # fmt: skip
        assert facts["memory_clock_mhz"] == {"min": 2619, "median": 2619, "max": 2619}
        assert (facts["throttle_mask"], facts["throttle_reasons"]) == (4, ["sw_power_cap"])
        assert facts["temperature_before_c"] == pytest.approx(25, abs=0.2)
        assert facts["temperature_after_c"] == pytest.approx(25, abs=0.2)
        assert facts["torch"] == torch.__version__
        assert (facts["trials"], facts["duration_s"], facts["workloads"]) == (5, 5.0, ["a", "b"])
    assert found["a"].as_row()["trial_calls"] == list(found["a"].trial_calls)
    row = json.loads(json.dumps(found["a"].as_row()))
    assert row["simulated_j"] == found["a"].joules
    assert row["simulated_j_net"] == found["a"].net_joules
    assert row["simulated_j_sd"] == found["a"].joules_sd
    assert tuple(row["simulated_j_trials"]) == found["a"].trial_joules
    assert row["environment"]["throttle_reasons"] == ["sw_power_cap"]
    assert json.loads(json.dumps(asdict(found["a"])))["joules"] == found["a"].joules


def test_other_processes_are_those_seen_before_or_after() -> None:
    class Shared(FakeMeter):
        def describe(self) -> dict[str, object]:
            return {"other_processes": 0 if self.now() < 5 else 2, "name": "board"}

    meter = Shared()
    facts = measure_energy(lambda: meter.work(0.1, BUSY_W), meter=meter).environment
    assert (facts["other_processes"], facts["name"]) == (2, "board")
    assert facts["throttle_mask"] is facts["throttle_reasons"] is facts["sm_clock_mhz"] is None


class Clock(EnergyMeter):
    """A counter of 50 W on the real clock, in steps of 4 ms."""

    scope = "simulated"
    update_period_s = 0.004

    def read_j(self) -> float:
        return 0.2 * (time.perf_counter() // 0.004)


def test_on_the_real_clock_with_the_polling_thread() -> None:
    meter = Clock()
    result = measure_energy(
        lambda: time.sleep(0.001), meter=meter, duration_s=0.4, trials=2, cooldown_s=0, warmup_s=0.05, idle_s=0.3
    )
    assert result.power_w == pytest.approx(50, rel=0.05)
    assert result.joules == pytest.approx(50 * (result.seconds or 0), rel=0.05)
    assert 0.001 < (result.seconds or 0) < 0.01


def test_ticks_count_strictly_inside_a_window() -> None:
    from moesaic.metrics import energy

    ticks: list[Tick] = [(float(i), 5.0 * i) for i in range(12)]
    window = energy._Window(start=0.0, end=11.0, seconds=11.0)
    assert energy._inside(Recording(ticks), window) == ticks[1:-1]
