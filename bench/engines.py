"""Where the groups of a sweep are trained: in this process, in a pool of processes, or on a Ray cluster.

An engine takes groups and gives their rows in the order in which they end; only the driver, the process of `run_sweep`,
writes. All engines train the same groups, and the bits of a run depend on neither the process nor its threads.
An exception while training is a ``failed`` row. A process that dies is no result: its group is trained again, `RETRIES`
times whole and then run by run as often, before the run at fault becomes a ``failed`` row that says so.
"""

from __future__ import annotations

import math
import multiprocessing
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

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


class EngineError(Exception):
    """An engine cannot go on for a reason that is no run's fault; what is written stays."""


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
        """The groups in order."""
        for group in groups:
            yield group, train_group(group, work, bar)

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
    """The rows of a group; where it raises, each of its runs alone, and a ``failed`` row for each that still does."""
    started_at, clock = environment.now(), time.perf_counter()
    try:
        rows = work.trainer(group, device=work.device, impl=work.impl, progress=watcher.advance(group))
        found = [str(row.get("run_key")) for row in rows]
        if found != [item.run.key for item in group]:
            raise RuntimeError(f"the trainer gave rows for {found}")
    except Exception as error:
        watcher.group_failed(group)
        if len(group) > 1:
            return [row for item in group for row in train_group([item], work, watcher)]
        rows = [{"status": "failed", "error": reason(error), "device": work.device}]
    wall_s = (time.perf_counter() - clock) / len(group)
    return [
        {"status": "ok", "error": None, "wall_s": wall_s, "started_at": started_at}
        | {**row, **item.run.flat(), **item.labels, "run_key": item.run.key}
        for item, row in zip(group, rows, strict=True)
    ]


def sendable_rows(group: Group, work: Work, watcher: Watcher) -> list[Row]:
    """`train_group` for another process: JSON values and NumPy's arrays travel, no tensors."""
    return [
        {name: value if name == MODEL else jsonable(value) for name, value in row.items()}
        for row in train_group(group, work, watcher)
    ]


def after_death(group: Group, work: Work, cause: str) -> tuple[list[list[PlannedRun]], list[Row]]:
    """What follows when every attempt at ``group`` ended in the death of its process: groups to train, or its row."""
    if len(group) > 1:
        return [[item] for item in group], []
    (item,) = group
    error = f"the process that trained this run died {RETRIES + 1} times; the last one {cause}"
    failed: Row = {"status": "failed", "error": error.replace("\n", " "), "device": work.device}
    return [], [{**failed, **item.run.flat(), **item.labels, "run_key": item.run.key}]


def reason(error: BaseException) -> str:
    """An exception in one line: type, message and the place that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}".replace("\n", " ")
