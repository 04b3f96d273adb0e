"""The meters on simulated counters and libraries, and which of them is taken for which device."""

from __future__ import annotations

import importlib
import os
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moesaic.metrics import energy, meters
from moesaic.metrics.meters import (
    BoardState,
    CudaMark,
    EnergyMeter,
    FakeMeter,
    NvmlMeter,
    RaplMeter,
    ZeusMeter,
    find_meter,
    throttle_reasons,
)


def write_zone(root: Path, zone: str, name: str, energy_uj: int, range_uj: int = 1_000_000) -> Path:
    folder = root / zone
    folder.mkdir(exist_ok=True, parents=True)
    for file, value in (("name", name), ("max_energy_range_uj", range_uj), ("energy_uj", energy_uj)):
        (folder / file).write_text(f"{value}\n")
    return folder / "energy_uj"


def test_rapl_sums_packages_and_undoes_wraps(tmp_path: Path) -> None:
    first = write_zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    second = write_zone(tmp_path, "intel-rapl:1", "package-1", 0, 5_000_000)
    others = ["intel-rapl:0:0", "intel-rapl:2", "intel-rapl-mmio:0", "intel-rapl:0/intel-rapl:0:0", "dtpm:0"]
    for zone, name in zip(others, ("core", "psys", "package-0", "core", "package-0"), strict=True):
        write_zone(tmp_path, zone, name, 123)
    (tmp_path / "intel-rapl").mkdir()
    meter = RaplMeter(tmp_path)
    assert meter.read_j() == 0
    first.write_text("950000\n")
    assert meter.read_j() == pytest.approx(0.05)
    first.write_text("100000\n")
    second.write_text("2000000\n")
    for zone in others:
        (tmp_path / zone / "energy_uj").write_text("999999\n")
    assert meter.read_j() == pytest.approx(0.2 + 2.0)
    assert meter.scope == "cpu_package"
    assert meter.describe()["packages"] == ["package-0", "package-1"]
    assert str(meter.board).endswith(": package-0, package-1")


def test_rapl_counts_dies_and_takes_mmio_where_there_is_nothing_else(tmp_path: Path) -> None:
    for die in (0, 1):
        write_zone(tmp_path / "dies", f"intel-rapl:{die}", f"package-0-die-{die}", 0)
    meter = RaplMeter(tmp_path / "dies")
    for die in (0, 1):
        write_zone(tmp_path / "dies", f"intel-rapl:{die}", f"package-0-die-{die}", 400_000)
    assert meter.read_j() == pytest.approx(0.8)
    write_zone(tmp_path / "mmio", "intel-rapl:0", "psys", 0)
    counter = write_zone(tmp_path / "mmio", "intel-rapl-mmio:0", "package-0", 0)
    meter = RaplMeter(tmp_path / "mmio")
    counter.write_text("300000\n")
    assert meter.read_j() == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(13, "Permission denied"), "Permission denied; energy_uj is for root alone since Linux 5.10"),
        (OSError(61, "No data available"), "No data available"),
    ],
)
def test_unreadable_rapl_says_why(error: OSError, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write_zone(tmp_path, "intel-rapl:0", "package-0", 0)
    read_text = Path.read_text

    def deny(self: Path, **keywords: Any) -> str:
        if self == path:
            raise type(error)(error.errno, error.strerror, str(self))
        return read_text(self, **keywords)

    monkeypatch.setattr(Path, "read_text", deny)
    with pytest.raises(RuntimeError, match=f"rapl: cannot read {path}: {reason}"):
        RaplMeter(tmp_path)


class FakeNvmlError(Exception):
    """What the simulated pynvml raises."""


def unsupported(*_: object) -> Any:
    raise FakeNvmlError("Not Supported")


def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    properties = lambda device: SimpleNamespace(uuid=f"uuid-of-{device.index}")  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)


def fake_nvml(monkeypatch: pytest.MonkeyPatch, **replaced: Any) -> list[str]:
    """Put a simulated pynvml in place; the list is of the boards that were asked for."""
    fake_cuda(monkeypatch)
    handles: list[str] = []
    queries = {
        "NVMLError": FakeNvmlError,
        "nvmlInit": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "580.1",
        "nvmlDeviceGetHandleByUUID": lambda uuid: handles.append(uuid) or "handle",  # type: ignore[func-returns-value]
        "nvmlDeviceGetTotalEnergyConsumption": lambda _: 1_234_500,
        "nvmlDeviceGetName": lambda device: f"name of {device}",
        "nvmlDeviceGetEnforcedPowerLimit": lambda _: 700_000,
        "nvmlDeviceGetCurrentClocksEventReasons": lambda _: 4,
        "nvmlDeviceGetMigMode": lambda _: [1, 0],
        "nvmlDeviceGetComputeRunningProcesses": lambda _: [SimpleNamespace(pid=os.getpid()), SimpleNamespace(pid=-7)],
        "nvmlDeviceGetTemperature": lambda _, sensor: 40 + sensor,
        "nvmlDeviceGetClockInfo": lambda _, clock: 1000 + clock,
    }
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(**(queries | replaced)))
    return handles


def test_nvml_reads_the_current_device_in_joules(monkeypatch: pytest.MonkeyPatch) -> None:
    handles = fake_nvml(monkeypatch)
    meter = find_meter()
    assert isinstance(meter, NvmlMeter)
    assert handles == ["GPU-uuid-of-3"]
    assert meter.device == torch.device("cuda:3")
    assert meter.read_j() == 1234.5
    assert meter.describe() == {
        "name": "name of handle",
        "uuid": "GPU-uuid-of-3",
        "driver": "580.1",
        "power_limit_w": 700.0,
        "mig": True,
        "other_processes": 1,
    }
    assert meter.state() == BoardState(1001, 1002, 4, 40)
    assert NvmlMeter("cuda:1").board == "GPU-uuid-of-1"


def test_nvml_of_an_old_driver_or_board_leaves_out_what_it_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {
        "nvmlDeviceGetCurrentClocksEventReasons": unsupported,
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda _: 8,
    }
    silent = dict.fromkeys(("nvmlDeviceGetMigMode", "nvmlDeviceGetTemperature", "nvmlDeviceGetClockInfo"), unsupported)
    fake_nvml(monkeypatch, **asked, **silent, nvmlDeviceGetComputeRunningProcesses=unsupported)
    meter = NvmlMeter()
    assert meter.state() == BoardState(throttle_mask=8)
    assert meter.describe()["mig"] is meter.describe()["other_processes"] is None
    del sys.modules["pynvml"].nvmlDeviceGetCurrentClocksEventReasons
    assert meter.state().throttle_mask == 8


def test_nvml_without_counter_or_module_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml(monkeypatch, nvmlDeviceGetTotalEnergyConsumption=unsupported)
    assert find_meter("nvml") == "nvml: Not Supported (GPU-uuid-of-3)"
    assert find_meter("nvml", "cuda:4") == "nvml: no cuda:4, torch sees 4 of them"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert find_meter("nvml") == "nvml: torch runs on ROCm, NVML knows NVIDIA boards"
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert find_meter("nvml") == "nvml: pynvml is missing, install moesaic[bench]"


def test_masks_are_told_in_words() -> None:
    pynvml = importlib.import_module("pynvml")
    assert throttle_reasons(0) == []
    assert throttle_reasons(4 | 64) == ["sw_power_cap", "hw_thermal_slowdown"]
    assert throttle_reasons(1 | 1 << 12) == ["gpu_idle", "unknown 0x1000"]
    names = {name for name in vars(pynvml) if re.match("nvmlClocks(Event|Throttle)Reason[A-Z]", name)}
    for name in names:
        word = re.sub("(?<=[a-z])(?=[A-Z])", "_", re.sub("nvmlClocks(Event|Throttle)Reason", "", name)).lower()
        if word not in ("all", "none", "user_defined_clocks"):
            assert throttle_reasons(getattr(pynvml, name)) == [word]


class ZeusGpu:
    """A board as Zeus 0.16 shows it."""

    def __init__(self, *, supported: bool = True) -> None:
        self.supported = supported

    def get_name(self) -> str:
        return "AMD Instinct MI300X"

    def supports_get_total_energy_consumption(self) -> bool:
        return self.supported

    def get_total_energy_consumption(self) -> int:
        return 2_500

    def get_gpu_temperature(self) -> int:
        return 41


class OldZeusGpu:
    """A board as Zeus 0.12 shows it."""

    def getName(self) -> str:
        return "AMD Instinct MI210"

    def supportsGetTotalEnergyConsumption(self) -> bool:
        return True

    def getTotalEnergyConsumption(self) -> int:
        return 3_500


def fake_zeus(monkeypatch: pytest.MonkeyPatch, *boards: object) -> None:
    fake_cuda(monkeypatch)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setitem(sys.modules, "zeus", SimpleNamespace(__version__="0"))
    module = SimpleNamespace(get_gpus=lambda: SimpleNamespace(gpus=boards))
    monkeypatch.setitem(sys.modules, "zeus.device", module)


def test_zeus_counts_where_nvml_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_zeus(monkeypatch, *[ZeusGpu(supported=False)] * 3, ZeusGpu())
    meter = find_meter()
    assert isinstance(meter, ZeusMeter)
    assert (meter.scope, meter.read_j(), meter.state().temperature_c) == ("gpu_board", 2.5, 41)
    assert meter.board == "AMD Instinct MI300X uuid-of-3"
    assert meter.describe() == {"name": "AMD Instinct MI300X", "uuid": meter.board, "zeus": "0"}


def test_an_older_zeus_has_other_names_and_no_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_zeus(monkeypatch, *[OldZeusGpu()] * 4)
    meter = ZeusMeter("cuda:2")
    assert (meter.read_j(), meter.state(), meter.board) == (3.5, BoardState(), "AMD Instinct MI210 uuid-of-2")


def test_zeus_that_cannot_count_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_zeus(monkeypatch, *[ZeusGpu(supported=False)] * 4)
    assert find_meter("zeus") == "zeus: no energy counter of this board that it trusts"
    fake_zeus(monkeypatch, ZeusGpu())
    assert find_meter("zeus") == "zeus: it sees 1 boards and torch 4"

    def fail() -> None:
        raise Exception("NVML and AMDSMI unavailable")

    monkeypatch.setattr(sys.modules["zeus.device"], "get_gpus", fail)
    assert find_meter("zeus") == "zeus: NVML and AMDSMI unavailable"
    monkeypatch.delitem(sys.modules, "zeus.device")
    monkeypatch.setitem(sys.modules, "zeus", None)
    assert re.fullmatch(r"zeus: zeus\S* is missing, install moesaic\[zeus\]", str(find_meter("zeus")))


def test_the_meter_is_one_of_where_the_workload_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_zone(tmp_path, "intel-rapl:0", "package-0", 0)
    fake_nvml(monkeypatch)
    monkeypatch.setattr(meters, "RaplMeter", lambda device: RaplMeter(tmp_path, device=device))
    assert isinstance(find_meter(), NvmlMeter)
    assert isinstance(find_meter(device="cuda"), NvmlMeter)
    on_cpu = find_meter(device="cpu")
    assert isinstance(on_cpu, RaplMeter)
    assert on_cpu.mark().immediate
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setitem(sys.modules, "zeus", None)
    monkeypatch.setitem(sys.modules, "zeus.device", None)
    unsure = find_meter()
    assert isinstance(unsure, RaplMeter)
    assert unsure.device == torch.device("cuda")
    # A GPU's work is not what the host's packages count, unless they are asked for.
    assert str(find_meter(device="cuda")).startswith("nvml: pynvml is missing, install moesaic[bench]; zeus: ")
    asked = find_meter("rapl", "cuda")
    assert isinstance(asked, RaplMeter)
    assert asked.device == torch.device("cuda")
    assert find_meter("nvml", "cpu") == "nvml: counts the board of a GPU, the workload runs on cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_meter("nvml") == "nvml: torch sees no CUDA device"
    assert find_meter("zeus") == "zeus: torch sees no CUDA device"
    with pytest.raises(ValueError, match="meter='watt': must be one of auto, nvml, zeus, rapl"):
        find_meter("watt")
    with pytest.raises(ValueError, match="device='mps': must be cpu or cuda"):
        find_meter(device="mps")


def test_marks_of_a_gpu_are_events_of_its_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[object] = []

    class Event:
        def __init__(self, *, enable_timing: bool, blocking: bool) -> None:
            assert enable_timing
            assert blocking
            self.number = len(log)

        def record(self, stream: object) -> None:
            log.append(("record", stream))

        def synchronize(self) -> None:
            log.append(("synchronize", self.number))

        def elapsed_time(self, later: Event) -> float:
            return 250.0 * (later.number - self.number)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append(("finish", str(device))))
    meter = FakeMeter()
    assert meter.mark().immediate
    meter.finish()
    meter.device = torch.device("cuda:1")
    first, second = meter.mark(), meter.mark()
    assert isinstance(first, CudaMark)
    assert not first.immediate
    second.wait()
    meter.finish()
    assert log == [("record", "stream of cuda:1")] * 2 + [("synchronize", 1), ("finish", "cuda:1")]
    assert second.since(first) == 0.25


class Counting(EnergyMeter):
    """A counter that changes at every second read, on the real clock."""

    scope = "simulated"
    update_period_s = 0.0

    def __init__(self, fail_at: float = float("inf")) -> None:
        self.reads, self.fail_at, self.asked = 0, fail_at, 0

    def read_j(self) -> float:
        self.reads += 1
        if self.reads > self.fail_at:
            raise OSError("gone")
        return float(self.reads // 2)

    def state(self) -> BoardState:
        self.asked += 1
        return BoardState(sm_clock_mhz=self.asked)


def test_the_polling_thread_keeps_changes_and_few_states() -> None:
    meter = Counting()
    with meter.record() as recording:
        while not (meter.reads >= 9 and meter.asked >= 2):
            time.sleep(0.001)
    times, joules = zip(*recording.ticks, strict=True)
    assert joules == tuple(range(1, meter.reads // 2 + 1))
    assert list(times) == sorted(times)
    (first, one), (second, two) = recording.states[:2]
    assert second - first >= meters.STATE_S
    assert {first, second} < set(times)
    assert (one.sm_clock_mhz, two.sm_clock_mhz) == (1, 2)


def test_a_meter_that_fails_while_polling_is_heard_over_what_follows_from_it() -> None:
    meter = Counting(fail_at=3)

    def record(then: str) -> None:
        with meter.record():
            while meter.reads <= 3:
                time.sleep(0.001)
            if then:
                raise RuntimeError(then)

    for then in ("", "too few ticks"):
        meter.reads = 0
        with pytest.raises(RuntimeError, match=r"Counting failed while it was read: .*gone") as caught:
            record(then)
        assert isinstance(caught.value.__cause__, OSError)


def test_names_stay_where_they_were() -> None:
    for name in ("EnergyMeter", "FakeMeter", "NvmlMeter", "RaplMeter", "ZeusMeter", "Tick", "find_meter"):
        assert getattr(energy, name) is getattr(meters, name)
