"""Where the groups of a sweep are trained: in this process, in a pool of processes, or on a Ray cluster.

An engine takes groups and gives their rows in the order in which they end; only the driver, the process of `run_sweep`,
writes. All engines train the same groups, and the bits of a run depend on neither the process nor its threads.
An exception while training is a ``failed`` row, unless it is the machine's `Fault`. Such a one and a process that dies
are no result: the group is trained again by another process, `RETRIES` times whole and then run by run as often, before
the run at fault becomes a ``failed`` row that says so, or, where no run can be, the sweep ends with `EngineError`.
"""

from __future__ import annotations

import math
import multiprocessing
import time
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from moesaic.bench import environment
from moesaic.bench.models import MODEL
from moesaic.bench.plan import InputError, PlannedRun, Row
from moesaic.bench.progress import Progress, model_steps
from moesaic.bench.store import RunStore, jsonable

if TYPE_CHECKING:
    from moesaic.bench.sweep import Trainer

T = TypeVar("T")
Group = Sequence[PlannedRun]
Results = Generator[tuple[Group, list[Row]], None, None]
"""Groups with their rows, as they end; closing it ends what is under way."""

ENGINES = ("local", "ray")
RETRIES = 3
"""How often a group whose process died is trained again."""
CUDA_FAULTS = ("CUDA error", "CUDA driver error", "Triton Error [CUDA]", "CUBLAS_STATUS", "cuDNN error")
"""Words of a `RuntimeError` after which a process cannot use its GPU any more."""
BUILD_FAULTS = ("Failed to find C compiler",)
"""Words of a `RuntimeError` where Triton lacks what it builds with."""
OUT_OF_MEMORY = "out of memory"
RESUME = "What is written is safe: mend that, then continue with --resume"


class EngineError(Exception):
    """An engine cannot go on for a reason that is no run's fault; what is written stays."""


@dataclass(frozen=True)
class Fault:
    """Why a training gave no rows without a run being to blame for sure.

    Args:
        kind: ``missing`` where a package is not installed, ``machine`` where a file, disk or GPU fails whatever is
            trained, ``device`` where the GPU failed while training, which a run may have caused, ``death`` where the
            process ended.
        words: in one line.
    """

    kind: Literal["missing", "machine", "device", "death"]
    words: str


class MachineFault(Exception):
    """What `train_group` raises for a `Fault`."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.words)
        self.fault = fault


@dataclass(frozen=True)
class Work:
    """How groups are trained."""

    trainer: Trainer
    device: str
    impl: str


class Watcher(Protocol):
    """What follows a training: `moesaic.bench.progress.Progress`, or what stands for it in another process."""

    def advance(self, group: Group) -> Callable[[int, float], None]:
        """What a trainer of ``group`` calls with its steps since the last call and their mean loss."""
        ...

    def group_failed(self, *groups: Group) -> None:
        """Takes back what was counted of groups that are trained again."""
        ...


class Engine(Protocol):
    """Trains groups on ``device``.

    Attributes:
        device: ``cpu`` or ``cuda``.
        memory: bytes that bound a run, or None.
        facts: what ``environment.json`` says of it.
        shares_cache: whether what this process compiles, the trainings load.
    """

    device: str
    memory: int | None
    facts: Mapping[str, object]
    shares_cache: bool

    @property
    def why_not_alone(self) -> str:
        """Why `alone` cannot be had, or ""."""
        ...

    def train(self, groups: Sequence[Group], work: Work, bar: Progress) -> Results:
        """Groups, or single runs of them, with their rows, as they end."""
        ...

    def alone(self, function: Callable[[], T]) -> T:
        """Calls ``function`` where trainings run, with a device to itself."""
        ...


@dataclass(frozen=True, kw_only=True)
class EngineChoice:
    """Which engine, and how many trainings at once.

    Args:
        name: ``local`` or ``ray``.
        workers: processes of a local pool, or tasks at once of a Ray cluster that the sweep starts itself; None for
            training in the driver's process, or as many tasks as there are cores or GPUs.
        address: of a running Ray cluster; None for ``RAY_ADDRESS``, and without that for one of its own.
        gpus_per_task: share of a GPU that a Ray task asks for.

    Raises:
        InputError: an unknown name, a number out of range, or an option of another engine.
    """

    name: str = "local"
    workers: int | None = None
    address: str | None = None
    gpus_per_task: float | None = None

    def __post_init__(self) -> None:
        if self.name not in ENGINES:
            raise InputError(f"--engine {self.name!r}: must be one of {', '.join(ENGINES)}")
        if self.workers is not None and self.workers < 1:
            raise InputError(f"--workers {self.workers}: must be an integer >= 1")
        for option, value in (("--address", self.address), ("--gpus-per-task", self.gpus_per_task)):
            if self.name != "ray" and value is not None:
                raise InputError(f"{option} {value}: belongs to --engine ray")
        if self.gpus_per_task is not None and not (math.isfinite(self.gpus_per_task) and 0 < self.gpus_per_task <= 1):
            raise InputError(f"--gpus-per-task {self.gpus_per_task}: must be above 0 and at most 1")
        if self.address is not None and self.workers is not None:
            raise InputError(f"--workers {self.workers}: the cluster at --address says how many; leave it out")


@contextmanager
def start_engine(choice: EngineChoice, device: str, trainer: Trainer) -> Iterator[Engine]:
    """The engine of ``choice`` on a ``--device`` value, closed at the end of the block.

    Raises:
        InputError: a device that is not there, a missing package, a trainer that cannot be sent to other processes, no
            cluster at the address, or a call from a script that other processes would run again.
    """
    if choice.name == "ray":
        from moesaic.bench.engine_ray import start_ray

        with start_ray(choice, device, trainer) as engine:
            yield engine
        return
    device = environment.resolve_device(device)
    if choice.workers is None:
        yield InProcess(device)
        return
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise InputError(
            "run_sweep(workers=...) starts processes that run this script again; call it under "
            'if __name__ == "__main__":'
        )
    from moesaic.bench.engine_pool import ProcessPool, check_sendable

    check_sendable(trainer)
    with closing(ProcessPool(choice.workers, device)) as pool:
        yield pool


class InProcess:
    """Trains one group after the other in this process."""

    shares_cache, why_not_alone = True, ""

    def __init__(self, device: str) -> None:
        self.device = device
        self.memory = environment.device_memory_bytes(device)
        self.facts: Mapping[str, object] = {"name": "local"}

    def train(self, groups: Sequence[Group], work: Work, bar: Progress) -> Results:
        """The groups in order.

        Raises:
            EngineError: a fault of the machine; this process cannot be replaced by another.
        """
        for group in groups:
            try:
                rows = train_group(group, work, bar)
            except MachineFault as error:
                lost = error.fault.kind == "device"
                more = "; --workers 1 trains in a process that is replaced after such an error" if lost else ""
                raise EngineError(f"no run is at fault: {error}. {RESUME}{more}") from error
            yield group, rows

    def alone(self, function: Callable[[], T]) -> T:
        """Calls it."""
        return function()


def run_groups(
    groups: Sequence[Group], store: RunStore, bar: Progress, engine: Engine, work: Work,
    appended: Callable[[Sequence[Row]], None],
) -> None:  # fmt: skip
    """Trains every group with a run that ``store`` does not hold and appends its rows as it ends."""
    held = store.keys()
    missing = [group for group in groups if any(item.run.key not in held for item in group)]
    total = sum(map(model_steps, groups))
    bar.extend(total, total - sum(map(model_steps, missing)))
    with closing(engine.train(missing, work, bar)) as results:
        for group, found in results:
            rows = store.append(found)  # only what is missing is written
            appended(rows)
            bar.group_done(group, [row for row in rows if row["status"] == "failed"])


def train_group(group: Group, work: Work, watcher: Watcher) -> list[Row]:
    """The rows of a group; where it raises, each of its runs alone, and a ``failed`` row for each that still does.

    Raises:
        MachineFault: an exception that says nothing of a run.
    """
    started_at, clock = environment.now(), time.perf_counter()
    try:
        rows = work.trainer(group, device=work.device, impl=work.impl, progress=watcher.advance(group))
        found = [str(row.get("run_key")) for row in rows]
        if found != [item.run.key for item in group]:
            raise RuntimeError(f"the trainer gave rows for {found}")
    except Exception as error:
        watcher.group_failed(group)
        fault = fault_of(error)
        if fault is not None:
            raise MachineFault(fault) from error
        rows = [{"status": "failed", "error": reason(error), "device": work.device}]
        alone = len(group) > 1
    else:
        alone = False
    if alone:  # here, where no traceback holds the memory of the group any more
        return [row for item in group for row in train_group([item], work, watcher)]
    wall_s = (time.perf_counter() - clock) / len(group)
    return [
        {"status": "ok", "error": None, "wall_s": wall_s, "started_at": started_at}
        | {**row, **item.run.flat(), **item.labels, "run_key": item.run.key}
        for item, row in zip(group, rows, strict=True)
    ]


def sendable_rows(group: Group, work: Work, watcher: Watcher) -> list[Row] | Fault:
    """`train_group` for another process, which is to end after a `Fault`: no tensors and no exceptions travel."""
    fault = _gpu_fault() if work.device == "cuda" else None
    if fault is not None:
        return fault
    try:
        rows = train_group(group, work, watcher)
    except MachineFault as error:
        return error.fault
    return [{name: value if name == MODEL else jsonable(value) for name, value in row.items()} for row in rows]


def fault_of(error: Exception) -> Fault | None:
    """The `Fault` that an exception of a training means, None where the run is to blame, as for want of memory."""
    words, text = reason(error), str(error)
    if isinstance(error, ImportError):
        return Fault("missing", words)
    if isinstance(error, OSError) or (isinstance(error, RuntimeError) and any(w in text for w in BUILD_FAULTS)):
        return Fault("machine", words)
    if not isinstance(error, RuntimeError) or OUT_OF_MEMORY in text:
        return None
    accelerator = any(kind.__name__ == "AcceleratorError" for kind in type(error).__mro__)
    return Fault("device", words) if accelerator or any(w in text for w in CUDA_FAULTS) else None


def _gpu_fault() -> Fault | None:
    """Tells a GPU that fails whatever is asked of it from one that a run makes fail."""
    import torch

    try:
        torch.zeros(1, device="cuda").item()
    except Exception as error:
        if OUT_OF_MEMORY not in str(error):
            return Fault("machine", f"the GPU does not answer: {reason(error)}")
    return None


class Attempts:
    """Counts the attempts of a sweep that gave no rows; ``engine`` is the option that messages name."""

    def __init__(self, engine: str) -> None:
        self._engine, self._lost = engine, Counter[str]()

    def after(self, fault: Fault, group: Group, work: Work) -> tuple[list[Group], list[Row]]:
        """What follows from ``fault``: groups to train, or the row of the run at fault.

        Raises:
            EngineError: a fault that no other attempt mends and no run can have.
        """
        key = group[0].run.key
        self._lost[key] += 1
        if fault.kind != "missing" and self._lost[key] <= RETRIES:
            return [group], []
        del self._lost[key]
        if fault.kind in ("missing", "machine"):
            raise EngineError(f"{self._engine}: no run is at fault: {fault.words}. {RESUME}")
        return after_last(fault, group, work)


def after_last(fault: Fault, group: Group, work: Work) -> tuple[list[Group], list[Row]]:
    """What follows when every attempt at ``group`` ended like the last one: its runs alone, or its row."""
    if len(group) > 1:
        return [[item] for item in group], []
    (item,) = group
    what = "the process that trained this run died" if fault.kind == "death" else "this run made its GPU fail"
    error = f"{what} {RETRIES + 1} times; the last one {fault.words}"
    failed: Row = {"status": "failed", "error": error.replace("\n", " "), "device": work.device}
    return [], [{**failed, **item.run.flat(), **item.labels, "run_key": item.run.key}]


def reason(error: BaseException) -> str:
    """An exception in one line: type, message and the place that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}".replace("\n", " ")
