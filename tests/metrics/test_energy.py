"""The estimator on a simulated clock, and the meters on simulated counters."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moesaic.metrics import energy
from moesaic.metrics.energy import (
    EnergyMeter,
    EnergyResult,
    FakeMeter,
    NvmlMeter,
    RaplMeter,
    find_meter,
    fit_power,
    measure_energy,
)

BUSY_W, IDLE_W = 600.0, 100.0
PHASES = [i / 16 for i in range(16)]


def slope_and_difference(window_s: float, period_s: float, phase: float) -> tuple[float, float]:
    """Relative errors of fit_power and of E(end) - E(begin) for a load that starts with the window, after idling."""
    meter = FakeMeter(idle_w=IDLE_W, update_period_s=period_s, phase_s=phase * period_s)
    meter.sleep(3.0)
    with meter.record() as ticks:
        start, begin_j = meter.now(), meter.read_j()
        meter.work(window_s, BUSY_W)
        end, end_j = meter.now(), meter.read_j()
    # The first tick ends a step that began idle, but a slope only sees what was counted after it.
    slope = fit_power([tick for tick in ticks if start <= tick[0] <= end])
    return slope / BUSY_W - 1, (end_j - begin_j) / (BUSY_W * window_s) - 1


@pytest.mark.parametrize(("window_s", "period_s"), [(0.5, 0.0207), (1.0, 0.0207), (2.0, 0.1003), (5.0, 0.1003)])
def test_slope_is_unbiased_in_every_phase_of_the_counter(window_s: float, period_s: float) -> None:
    errors = [slope_and_difference(window_s, period_s, phase)[0] for phase in PHASES]
    assert max(map(abs, errors)) < 0.005
    assert abs(sum(errors) / len(errors)) < 0.001


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
    assert result.update_period_s == pytest.approx(0.1, rel=0.01)
    assert len(result.trial_joules) == 5
    assert result.ticks in (49, 50, 51)
    assert (result.valid, result.scope, result.reason) == (True, "simulated", None)
    assert result.environment == {"torch": torch.__version__, "before": {}, "after": {}}


def test_calls_longer_than_an_update_are_measured_too() -> None:
    meter = FakeMeter(idle_w=IDLE_W, update_period_s=0.1, phase_s=0.037)
    result = measure_energy(lambda: meter.work(0.73, BUSY_W), meter=meter)
    assert result.joules == pytest.approx(0.73 * BUSY_W, rel=0.005)


def test_each_trial_warms_up_and_cools_down() -> None:
    meter = FakeMeter(idle_w=IDLE_W)
    calls: list[float] = []

    def fn() -> None:
        calls.append(meter.now())
        meter.work(0.5, BUSY_W)

    measure_energy(fn, meter=meter, duration_s=2, trials=3, cooldown_s=4, warmup_s=1, idle_s=7)
    assert len(calls) == 3 * 6
    gaps = [b - a for a, b in itertools.pairwise(calls)]
    assert calls[0] == pytest.approx(7, abs=0.03)
    assert sorted(gaps)[-2:] == pytest.approx([4.5, 4.5])
    assert max(sorted(gaps)[:-2]) == pytest.approx(0.5)
    assert meter.now() == pytest.approx(7 + 3 * (1 + 2 + 4) + 7, abs=0.1)


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
        ({"duration_s": 0.5}, "duration_s=0.5: must be at least 1"),
        ({"idle_s": 0.0}, "idle_s=0.0: must be at least 1"),
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


def test_a_counter_slower_than_it_says_is_an_error_not_a_number() -> None:
    class Stalling(FakeMeter):
        @contextmanager
        def record(self) -> Iterator[list[energy.Tick]]:
            with super().record() as ticks:
                yield ticks
                ticks[:] = ticks[::10]

    meter = Stalling()
    with pytest.raises(RuntimeError, match="counter ticks in the window, 10 are needed"):
        measure_energy(lambda: meter.work(0.1, BUSY_W), meter=meter)


def test_no_meter_gives_null_and_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(energy, "RaplMeter", lambda: RaplMeter(tmp_path))
    result = measure_energy(lambda: pytest.fail("called"))
    reason = f"nvml: torch sees no CUDA device; rapl: no intel-rapl package under {tmp_path}"
    assert result == EnergyResult(reason=reason)
    assert result.joules is None
    assert not result.valid
    assert find_meter("nvml") == "nvml: torch sees no CUDA device"
    with pytest.raises(ValueError, match="meter='watt': must be one of auto, nvml, rapl"):
        find_meter("watt")


def write_zone(root: Path, zone: str, name: str, energy_uj: int, range_uj: int = 1_000_000) -> Path:
    folder = root / zone
    folder.mkdir(exist_ok=True)
    for file, value in (("name", name), ("max_energy_range_uj", range_uj), ("energy_uj", energy_uj)):
        (folder / file).write_text(f"{value}\n")
    return folder / "energy_uj"


def test_rapl_sums_packages_and_undoes_wraps(tmp_path: Path) -> None:
    first = write_zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    second = write_zone(tmp_path, "intel-rapl:1", "package-1", 0, 5_000_000)
    for zone, name in (("intel-rapl:0:0", "core"), ("intel-rapl:2", "psys")):
        write_zone(tmp_path, zone, name, 123)
    meter = RaplMeter(tmp_path)
    assert meter.read_j() == 0
    first.write_text("950000\n")
    assert meter.read_j() == pytest.approx(0.05)
    first.write_text("100000\n")
    second.write_text("2000000\n")
    for zone in ("intel-rapl:0:0", "intel-rapl:2"):
        (tmp_path / zone / "energy_uj").write_text("999999\n")
    assert meter.read_j() == pytest.approx(0.2 + 2.0)
    assert meter.scope == "cpu_package"


def test_unreadable_rapl_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write_zone(tmp_path, "intel-rapl:0", "package-0", 0)
    read_text = Path.read_text

    def deny(self: Path) -> str:
        if self == path:
            raise PermissionError(13, "Permission denied", str(self))
        return read_text(self)

    monkeypatch.setattr(Path, "read_text", deny)
    with pytest.raises(RuntimeError, match=f"rapl: cannot read {path}: Permission denied"):
        RaplMeter(tmp_path)


class FakeNvmlError(Exception):
    """What the simulated pynvml raises."""


def fake_nvml(monkeypatch: pytest.MonkeyPatch, handles: list[str], energy_mj: int | None) -> None:
    def total(_: object) -> int:
        if energy_mj is None:
            raise FakeNvmlError("Not Supported")
        return energy_mj

    def unsupported(*_: object) -> object:
        raise FakeNvmlError("Not Supported")

    module = SimpleNamespace(
        NVMLError=FakeNvmlError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: handles.append(uuid) or "handle",  # type: ignore[func-returns-value]
        nvmlDeviceGetTotalEnergyConsumption=total,
        nvmlDeviceGetName=lambda device: f"name of {device}",
        nvmlDeviceGetUUID=lambda _: "GPU-1",
        nvmlDeviceGetEnforcedPowerLimit=lambda _: 700_000,
        nvmlDeviceGetCurrentClocksEventReasons=lambda _: 4,
        nvmlDeviceGetMigMode=unsupported,
        nvmlDeviceGetTemperature=lambda _, sensor: 40 + sensor,
        nvmlDeviceGetClockInfo=lambda _, clock: 1000 + clock,
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"uuid-of-{index}"))


def test_nvml_reads_the_current_device_in_joules(monkeypatch: pytest.MonkeyPatch) -> None:
    handles: list[str] = []
    fake_nvml(monkeypatch, handles, energy_mj=1_234_500)
    meter = find_meter()
    assert isinstance(meter, NvmlMeter)
    assert handles == ["GPU-uuid-of-3"]
    assert meter.read_j() == 1234.5
    assert meter.describe() == {
        "Name": "name of handle",
        "UUID": "GPU-1",
        "EnforcedPowerLimit": 700_000,
        "CurrentClocksEventReasons": 4,
        "Temperature": 40,
        "ClockInfo": 1001,
    }


def test_nvml_without_counter_or_module_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml(monkeypatch, [], energy_mj=None)
    assert find_meter("nvml") == "nvml: Not Supported"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert find_meter("nvml") == "nvml: pynvml is missing, install moesaic[bench]"


def test_a_gpu_window_waits_for_launched_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Board(FakeMeter, NvmlMeter):
        describe = dict

    board = Board(idle_w=IDLE_W)
    queue: list[float] = []

    def synchronize() -> None:
        board.work(0.001 * len(queue), BUSY_W)
        queue.clear()

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)

    def launch() -> None:
        queue.append(0.0)
        board.work(1e-5, IDLE_W)

    result = measure_energy(launch, meter=board)
    assert result.joules == pytest.approx(0.001 * BUSY_W + 1e-5 * IDLE_W, rel=0.005)


class Counting(EnergyMeter):
    """A counter that changes at every second read, on the real clock."""

    scope = "simulated"
    update_period_s = 0.0

    def __init__(self, fail_at: float = float("inf")) -> None:
        self.reads, self.fail_at = 0, fail_at

    def read_j(self) -> float:
        self.reads += 1
        if self.reads > self.fail_at:
            raise OSError("gone")
        return float(self.reads // 2)


def test_the_polling_thread_keeps_changes_only() -> None:
    meter = Counting()
    with meter.record() as ticks:
        while meter.reads < 9:
            time.sleep(0.001)
    times, joules = zip(*ticks, strict=True)
    assert joules == tuple(range(1, meter.reads // 2 + 1))
    assert list(times) == sorted(times)


def test_a_meter_that_fails_while_polling_is_heard() -> None:
    meter = Counting(fail_at=3)

    def record() -> None:
        with meter.record():
            while meter.reads <= 3:
                time.sleep(0.001)

    with pytest.raises(OSError, match="gone"):
        record()
