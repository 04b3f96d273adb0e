"""Meters, counters of joules: NVIDIA boards (NVML), AMD and other boards (Zeus), CPU packages (RAPL), a simulated one.

A meter also knows how to wait for the work it measures, and what else its board says: clocks, temperature, throttling.
"""

from __future__ import annotations

import importlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

Tick = tuple[float, float]
POLL_S, STATE_S = 0.002, 0.25
THROTTLE_REASONS = (
    "gpu_idle",
    "applications_clocks_setting",
    "sw_power_cap",
    "hw_slowdown",
    "sync_boost",
    "sw_thermal_slowdown",
    "hw_thermal_slowdown",
    "hw_power_brake_slowdown",
    "display_clock_setting",
    "board_limit",
    "reliability",
)
"""NVML's names of the bits of a mask of reasons, lowest bit first; the last two are of old drivers."""


@dataclass(frozen=True)
class BoardState:
    """What a board says of itself at one moment; None where it does not say."""

    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    throttle_mask: int | None = None
    temperature_c: float | None = None


@dataclass
class Recording:
    """Changes of a counter, (seconds, joules), and states of its board by second, at most four a second."""

    ticks: list[Tick] = field(default_factory=list)
    states: list[tuple[float, BoardState]] = field(default_factory=list)


class Mark(Protocol):
    """The end of what was launched so far; ``immediate`` where launching is doing, as on a CPU."""

    immediate: bool

    def wait(self) -> None:
        """Return once the work launched before this mark is done."""

    def since(self, earlier: Any) -> float:
        """Seconds from the end of the work before ``earlier``, a mark of the same meter, to the end of this one's."""
        raise NotImplementedError


@dataclass
class HostMark(Mark):
    """The mark of work that is done when its call returns."""

    time_s: float
    immediate = True

    def wait(self) -> None:
        """The work is done already."""

    def since(self, earlier: HostMark) -> float:
        """Seconds between the two moments on the meter's clock."""
        return self.time_s - earlier.time_s


class CudaMark(Mark):
    """An event on the device's current stream: it sees work of other streams only where this stream waits for them."""

    immediate = False

    def __init__(self, device: torch.device) -> None:
        # A blocking event sleeps where others spin, and one chunk is always in flight meanwhile.
        self._event = torch.cuda.Event(enable_timing=True, blocking=True)
        self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Sleep until the event has happened."""
        self._event.synchronize()

    def since(self, earlier: CudaMark) -> float:
        """Seconds between the two events on the device's own clock."""
        return float(earlier._event.elapsed_time(self._event)) / 1e3


class EnergyMeter(Protocol):
    """A counter of joules, and its clock; ``scope`` names what it covers, as in the column ``gpu_board_j``.

    ``board`` tells one board from another of its kind, and ``device`` is where the workload runs: on ``cuda`` marks are
    events, elsewhere a call that returned is done. What is not a counter (the other methods) has a default.
    """

    scope: str
    update_period_s: float
    board: str | None = None
    device: torch.device | None = None

    def read_j(self) -> float:
        """Joules counted so far, as of the counter's last update."""
        raise NotImplementedError

    def now(self) -> float:
        """Seconds since some fixed moment."""
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        """Wait, idle."""
        time.sleep(seconds)

    def mark(self) -> Mark:
        """Mark the end of the work launched so far, without waiting for it."""
        device = self.device
        return HostMark(self.now()) if device is None or device.type != "cuda" else CudaMark(device)

    def finish(self) -> None:
        """Wait for all launched work, on every stream of the device."""
        if self.device is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def describe(self) -> dict[str, object]:
        """What is recorded of the board once: names, limits, who else runs there."""
        return {}

    def state(self) -> BoardState:
        """What the board says of itself now."""
        return BoardState()

    @contextmanager
    def record(self) -> Iterator[Recording]:
        """A `Recording` that grows by each change of the counter; a thread looks every 2 ms.

        The board's state is read right after a change, so that reading it makes no change seem late. RuntimeError at
        the end where the meter failed meanwhile, whatever its library raises.
        """
        recording = Recording()
        stop = threading.Event()

        def poll() -> None:
            last, asked = self.read_j(), -math.inf
            while not stop.wait(POLL_S):
                if (value := self.read_j()) != last:
                    recording.ticks.append((now := self.now(), value))
                    last = value
                    if now - asked >= STATE_S:
                        recording.states.append((now, self.state()))
                        asked = now

        with ThreadPoolExecutor(1) as pool:
            polling = pool.submit(poll)
            try:
                yield recording
            finally:
                stop.set()
                # Here: a meter that failed is why there are too few ticks.
                if (error := polling.exception()) is not None:
                    words = f"{error or type(error).__name__}"
                    raise RuntimeError(f"{type(self).__name__} failed while it was read: {words}") from error


class NvmlMeter(EnergyMeter):
    """NVIDIA board energy, ``nvmlDeviceGetTotalEnergyConsumption`` (mJ since driver load, Volta and newer).

    Counts the board alone (no CPU, host memory or power supply; on Grace Hopper the whole module, CPU included), steps
    about every 100 ms, and carries about 5 % systematic error per card (arXiv 2312.02741): compare on one card. The
    device is ``device`` or torch's current one, found by UUID because NVML ignores CUDA_VISIBLE_DEVICES. Only reads:
    no clock, limit or mode is set. Raises RuntimeError with the reason where there is no such counter.
    """

    scope = "gpu_board"
    update_period_s = 0.1

    def __init__(self, device: str | torch.device | None = None) -> None:
        self.device = _cuda_device("nvml", device)
        if torch.version.hip:
            raise RuntimeError("nvml: torch runs on ROCm, NVML knows NVIDIA boards")
        try:
            self._nvml: Any = importlib.import_module("pynvml")
        except ImportError as error:
            raise RuntimeError("nvml: pynvml is missing, install moesaic[bench]") from error
        self.board = f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"
        try:
            self._nvml.nvmlInit()
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(self.board)
            self.read_j()
        except self._nvml.NVMLError as error:
            raise RuntimeError(f"nvml: {error} ({self.board})") from error

    def read_j(self) -> float:
        """Joules since the driver was loaded."""
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3

    def describe(self) -> dict[str, object]:
        """Board, driver, enforced limit in W, MIG mode, and compute processes besides this one; None where unknown.

        A process in a container may have another number on the host, and counts itself then.
        """
        limit_mw = self._ask("nvmlDeviceGetEnforcedPowerLimit")
        mig, processes = self._ask("nvmlDeviceGetMigMode"), self._ask("nvmlDeviceGetComputeRunningProcesses")
        return {
            "name": self._ask("nvmlDeviceGetName"),
            "uuid": self.board,
            "driver": self._ask("nvmlSystemGetDriverVersion", of_board=False),
            "power_limit_w": None if limit_mw is None else limit_mw / 1e3,
            "mig": None if mig is None else bool(mig[0]),
            "other_processes": None if processes is None else sum(p.pid != os.getpid() for p in processes),
        }

    def state(self) -> BoardState:
        """Clocks of multiprocessors and memory, throttle reasons (older drivers know their old name only), °C."""
        mask = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        if mask is None:
            mask = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        return BoardState(
            sm_clock_mhz=self._ask("nvmlDeviceGetClockInfo", 1),
            memory_clock_mhz=self._ask("nvmlDeviceGetClockInfo", 2),
            throttle_mask=mask,
            temperature_c=self._ask("nvmlDeviceGetTemperature", 0),
        )

    def _ask(self, query: str, *which: int, of_board: bool = True) -> Any:
        try:
            return getattr(self._nvml, query)(*[self._handle] * of_board, *which)
        except (self._nvml.NVMLError, AttributeError):
            return None


class ZeusMeter(EnergyMeter):
    """Board energy through Zeus (ml.energy/zeus, the extra ``zeus``): AMD boards of ROCm, and whatever else it knows.

    Zeus numbers the boards that CUDA_VISIBLE_DEVICES or HIP_VISIBLE_DEVICES leave, as torch does; another count than
    torch's is refused, as no number would be sure. Unlike NVIDIA boards may still come in another order: take
    `NvmlMeter`, which goes by UUID. An even die of an MI250 counts both dies. Raises RuntimeError with the reason where
    there is no such counter.
    """

    scope = "gpu_board"
    update_period_s = 0.1

    def __init__(self, device: str | torch.device | None = None) -> None:
        self.device = _cuda_device("zeus", device)
        try:
            self._version = getattr(importlib.import_module("zeus"), "__version__", None)
            boards = importlib.import_module("zeus.device").get_gpus().gpus
            if len(boards) != torch.cuda.device_count():
                raise RuntimeError(f"it sees {len(boards)} boards and torch {torch.cuda.device_count()}")
            self._gpu: Any = boards[self.device.index]
            if not self._call("supports_get_total_energy_consumption"):
                raise RuntimeError("no energy counter of this board that it trusts")
            self._name = str(self._call("get_name"))
            uuid = getattr(torch.cuda.get_device_properties(self.device), "uuid", f"index {self.device.index}")
            self.board = f"{self._name} {uuid}"
            self.read_j()
        except ModuleNotFoundError as error:
            raise RuntimeError(f"zeus: {error.name} is missing, install moesaic[zeus]") from error
        except Exception as error:  # Zeus wraps several libraries, each with errors of its own
            raise RuntimeError(f"zeus: {error or type(error).__name__}") from error

    def _call(self, name: str) -> Any:
        """Older versions of Zeus (0.12) call ``get_name`` getName; newer ones warn at that."""
        if not hasattr(self._gpu, name):
            first, *rest = name.split("_")
            name = first + "".join(word.title() for word in rest)
        return getattr(self._gpu, name)()

    def read_j(self) -> float:
        """Joules since the driver was loaded."""
        return float(self._call("get_total_energy_consumption")) / 1e3

    def describe(self) -> dict[str, object]:
        """The board's name and Zeus's version."""
        return {"name": self._name, "uuid": self.board, "zeus": self._version}

    def state(self) -> BoardState:
        """The temperature, where this version of Zeus and the board tell it."""
        try:
            return BoardState(temperature_c=float(self._call("get_gpu_temperature")))
        except Exception:  # as above: whatever the board's library raises for what it does not support
            return BoardState()


class RaplMeter(EnergyMeter):
    """CPU package energy, the sum of ``energy_uj`` over zones named ``package-*`` in Linux powercap (Intel and AMD).

    Zones inside a package (core, uncore, dram) and the platform's (psys) are not added, and ``intel-rapl-mmio``, which
    counts the same packages again, is read only where ``intel-rapl`` has none. A counter wraps at
    ``max_energy_range_uj``; one wrap between two reads is undone (it takes minutes at full load). Covers cores and
    caches, not DRAM or the board. Raises RuntimeError with the reason where it cannot be read.
    """

    scope = "cpu_package"
    update_period_s = 0.001

    def __init__(self, root: Path = Path("/sys/class/powercap"), *, device: str | torch.device | None = None) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            for kind in ("intel-rapl", "intel-rapl-mmio"):
                names = {path.parent: path.read_text().strip() for path in sorted(root.glob(f"{kind}:*/name"))}
                self._zones = [zone for zone, name in names.items() if name.startswith("package")]
                if self._zones:
                    break
            self._span_uj = [int((zone / "max_energy_range_uj").read_text()) for zone in self._zones]
            self._last_uj = self._raw_uj()
        except PermissionError as error:
            why = "energy_uj is for root alone since Linux 5.10: run as root or change the file's mode"
            raise RuntimeError(f"rapl: cannot read {error.filename}: {error.strerror}; {why}") from error
        except OSError as error:
            raise RuntimeError(f"rapl: cannot read {error.filename}: {error.strerror}") from error
        if not self._zones:
            raise RuntimeError(f"rapl: no intel-rapl package under {root}")
        self._total_uj = 0
        self._packages = [names[zone] for zone in self._zones]
        self.board = f"{_cpu_name()}: {', '.join(self._packages)}"

    def _raw_uj(self) -> list[int]:
        return [int((zone / "energy_uj").read_text()) for zone in self._zones]

    def read_j(self) -> float:
        """Joules since this meter was made."""
        now = self._raw_uj()
        for new, old, span in zip(now, self._last_uj, self._span_uj, strict=True):
            self._total_uj += new - old if new >= old else new - old + span
        self._last_uj = now
        return self._total_uj / 1e6

    def describe(self) -> dict[str, object]:
        """The processor and its packages."""
        return {"name": _cpu_name(), "packages": self._packages}


class FakeMeter(EnergyMeter):
    """An exact counter on a simulated clock, seen as of its last update (at phase_s + i·update_period_s) and poll."""

    scope = "simulated"

    def __init__(self, *, idle_w: float = 100.0, update_period_s: float = 0.1, phase_s: float = 0.0) -> None:
        self.idle_w, self.update_period_s, self._update_s = idle_w, update_period_s, phase_s
        self._time_s = self._true_j = self._shown_j = 0.0
        self._asked_s = -math.inf
        self._recording = Recording()

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
                seen = math.ceil(until / POLL_S) * POLL_S
                self._recording.ticks.append((seen, self._shown_j))
                if seen - self._asked_s >= STATE_S:
                    self._recording.states.append((seen, self.state()))
                    self._asked_s = seen

    def sleep(self, seconds: float) -> None:
        """Advance the clock at ``idle_w``."""
        self.work(seconds)

    @contextmanager
    def record(self) -> Iterator[Recording]:
        """A `Recording` that grows by each update of the counter."""
        self._recording, self._asked_s = Recording(), -math.inf
        yield self._recording


def find_meter(kind: str = "auto", device: str | torch.device | None = None) -> EnergyMeter | str:
    """Meter of this machine for a workload on ``device``; if there is none, the reason.

    ``kind`` is ``nvml``, ``zeus``, ``rapl`` or ``auto``, the first of these that counts where the workload runs: on a
    ``cpu`` that is rapl, on ``cuda`` (a name of ROCm's devices too) nvml or zeus. Without a ``device`` all three are
    tried, so that a machine with a GPU gives its board. ``rapl`` counts the host's packages for any device.

    Raises ValueError for another kind, or a device that is neither.
    """
    meters: dict[str, Callable[..., EnergyMeter]] = {"nvml": NvmlMeter, "zeus": ZeusMeter, "rapl": RaplMeter}
    if kind not in ("auto", *meters):
        raise ValueError(f"meter={kind!r}: must be one of auto, {', '.join(meters)}")
    where = None if device is None else torch.device(device).type
    if where not in (None, "cpu", "cuda"):
        raise ValueError(f"device={str(device)!r}: must be cpu or cuda")
    kinds = [kind] if kind != "auto" else [name for name in meters if where != "cuda" or name != "rapl"]
    reasons = []
    for name in kinds:
        try:
            return meters[name](device=device)
        except RuntimeError as error:
            reasons.append(str(error))
    return "; ".join(reasons)


def throttle_reasons(mask: int) -> list[str]:
    """NVML's words for a mask of reasons why clocks are held below their highest; bits without a name as a number."""
    words = [word for bit, word in enumerate(THROTTLE_REASONS) if mask >> bit & 1]
    unknown = mask >> len(THROTTLE_REASONS) << len(THROTTLE_REASONS)
    return [*words, f"unknown {unknown:#x}"] if unknown else words


def _cuda_device(meter: str, device: str | torch.device | None) -> torch.device:
    """The CUDA or ROCm device, with its index, whose board ``meter`` counts; RuntimeError where there is none."""
    asked = torch.device("cuda" if device is None else device)
    if asked.type != "cuda":
        raise RuntimeError(f"{meter}: counts the board of a GPU, the workload runs on {asked}")
    if not torch.cuda.is_available():
        raise RuntimeError(f"{meter}: torch sees no CUDA device")
    index = torch.cuda.current_device() if asked.index is None else asked.index
    if index >= torch.cuda.device_count():
        raise RuntimeError(f"{meter}: no cuda:{index}, torch sees {torch.cuda.device_count()} of them")
    return torch.device("cuda", index)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
