"""The Ray engine: a task of Ray Core per group, on a running cluster or on one of the sweep's own.

Ray places the tasks and runs those again whose process or node died; here at most twice as many are handed in as can
run at once, so that a sweep of many thousands does not fill the cluster's memory. The nodes need this version of
moesaic, with what it trains with, and no shared folder: rows come back to the driver, which alone writes.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from moesaic._version import __version__
from moesaic.bench import environment
from moesaic.bench.engine_pool import visible_gpus
from moesaic.bench.engines import (
    RETRIES,
    Attempts,
    EngineChoice,
    EngineError,
    Fault,
    Group,
    Results,
    Work,
    after_last,
    reason,
    sendable_rows,
)
from moesaic.bench.plan import InputError, Row
from moesaic.bench.progress import Progress, model_steps

if TYPE_CHECKING:
    from moesaic.bench.sweep import Trainer

T = TypeVar("T")

SLOTS_INTERVAL_S = 5.0
"""Seconds between looks at how many tasks the cluster can run: nodes come and go."""
STEPS_INTERVAL_S = 5.0
"""Seconds between what a task tells of its steps, and between the driver's questions."""
CONNECT_S = 5.0
OUR_GPU = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"


@contextmanager
def start_ray(choice: EngineChoice, device: str, trainer: Trainer) -> Iterator[RayEngine]:
    """Connects to the cluster of ``choice``, of the caller's ``ray.init``, or to a new one, and leaves it at the end.

    Raises:
        InputError: Ray is not installed, no cluster answers, it has not what ``device`` asks for, its nodes run another
            version of moesaic, or the trainer cannot be sent.
    """
    if device not in environment.DEVICES:
        raise InputError(f"--device {device!r}: must be one of {', '.join(environment.DEVICES)}")
    environment.require("ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a sweep reports to nobody
    import ray

    ours = not ray.is_initialized()
    if not ours and choice.address is not None:
        raise InputError(f"--address {choice.address}: this process is connected to a Ray cluster already")
    own_cluster = ours and _connect(ray, choice)
    try:
        yield RayEngine(ray, choice, device, trainer, own_cluster)
    finally:
        if ours:
            ray.shutdown()


def _connect(ray: Any, choice: EngineChoice) -> bool:
    """Starts or joins a cluster; whether it is a new one."""
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = choice.address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        ray.init(address="local", num_cpus=choice.workers, include_dashboard=False, **quiet)
        return True
    if choice.workers is not None:
        raise InputError(
            f"--workers {choice.workers}: the cluster at RAY_ADDRESS={address} says how many; leave it out"
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if port.isdecimal():  # Ray itself tries for two minutes and then ends the process
            socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
        ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"--address {address}: no Ray cluster answers there: {str(error).splitlines()[0]}") from error
    return False


class RayEngine:
    """Trains by tasks of a cluster that this process is connected to; see `start_ray`."""

    def __init__(self, ray: Any, choice: EngineChoice, device: str, trainer: Trainer, own_cluster: bool) -> None:
        self._ray = ray
        self.shares_cache = own_cluster
        total = ray.cluster_resources()
        if device == "auto":
            device = "cuda" if total.get("GPU") else "cpu"
        if device == "cuda" and not total.get("GPU"):
            raise InputError("--device cuda: the Ray cluster has no GPU; start its nodes first, or use cpu or auto")
        if device == "cpu" and choice.gpus_per_task is not None:
            raise InputError(f"--gpus-per-task {choice.gpus_per_task}: the device is cpu")
        self.device = device
        self._gpus = (1.0 if choice.gpus_per_task is None else choice.gpus_per_task) if device == "cuda" else 0.0
        try:
            ray.cloudpickle.dumps(trainer)
        except Exception as error:
            raise InputError(f"--engine ray: the trainer cannot be sent to other processes ({error})") from error
        # Where the sweep starts the cluster it may have fewer slots than cores; elsewhere a slot is a core.
        self._threads = max(1, environment.usable_cores() // int(total["CPU"])) if own_cluster else 1
        self._slots, self._looked = 0, -SLOTS_INTERVAL_S
        nodes = self._look_at_nodes()
        known = [node["memory_per_task"] for node in nodes if node["memory_per_task"] is not None]
        self.memory = min(known, default=None)
        self.facts: Mapping[str, object] = {
            "name": "ray", "version": ray.__version__, "nodes": nodes, "resources": total, "gpus_per_task": self._gpus,
        }  # fmt: skip
        self._board = ray.remote(num_cpus=0, max_restarts=RETRIES)(_Board).remote()

    def train(self, groups: Sequence[Group], work: Work, bar: Progress) -> Results:
        """The groups as they end, in no fixed order.

        Raises:
            EngineError: a task cannot take up its work, as on a node with another version of moesaic or without Numba,
                or meets a fault of the machine wherever it is tried.
        """
        ray, todo, pending, attempts = self._ray, deque(groups), dict[Any, Group](), Attempts("--engine ray")
        task, steps = self._task(_train, self._gpus), _Steps(ray, self._board, bar)
        told = self._board, STEPS_INTERVAL_S
        try:
            while todo or pending:
                while todo and len(pending) < 2 * self._slots_now():
                    group = todo.popleft()
                    pending[task.remote(__version__, self._threads, list(group), work, told)] = group
                ready, _ = ray.wait(list(pending), num_returns=1, timeout=min(SLOTS_INTERVAL_S, STEPS_INTERVAL_S))
                steps.look(pending.values())
                for reference in ready:
                    group = pending.pop(reference)
                    steps.ended(group)
                    again: list[Group] = []
                    try:
                        found = ray.get(reference)
                    except ray.exceptions.RayTaskError as error:
                        last = str(error).strip().splitlines()[-1]
                        raise EngineError(f"--engine ray: a task cannot take up its work: {last}") from error
                    except ray.exceptions.RayError as error:
                        first = str(error).strip().splitlines()[0]
                        death = Fault("death", f"with {type(error).__name__}: {first}")
                        again, rows = after_last(death, group, work)  # Ray has tried it as often as we would
                    else:
                        rows = found
                        if isinstance(found, Fault):
                            again, rows = attempts.after(found, group, work)
                    todo.extendleft(reversed(again))
                    if rows:
                        losses = [loss for row in rows if isinstance(loss := row.get("loss"), float)]
                        bar.add(group, model_steps(group), sum(losses) / len(losses) if losses else float("nan"))
                        yield group, rows
        finally:
            for reference in pending:
                with contextlib.suppress(Exception):
                    ray.cancel(reference, force=True)

    @property
    def why_not_alone(self) -> str:
        """A CPU's joules are those of a machine that other tasks may use."""
        return "" if self.device == "cuda" else "takes --engine local on a CPU, whose joules are the whole machine's"

    def alone(self, function: Callable[[], T]) -> T:
        """Calls ``function`` in a task that has a whole GPU, so that its joules are its own."""
        result: T = self._ray.get(self._task(_call, 1.0).remote(function))
        return result

    def _task(self, function: Callable[..., object], gpus: float) -> Any:
        options: dict[str, Any] = {"num_cpus": 1, "num_gpus": gpus, "max_retries": RETRIES}
        if gpus:
            # By default Ray starts a process per GPU task, as one that has used a GPU cannot change to another. Here
            # processes stay, see all GPUs of the node and take the one that Ray assigned.
            options |= {"max_calls": 0, "runtime_env": {"env_vars": {OUR_GPU: "1"}}}
        return self._ray.remote(**options)(function)

    def _slots_now(self) -> int:
        if time.monotonic() - self._looked >= SLOTS_INTERVAL_S:
            total = self._ray.cluster_resources()
            gpus = int(total.get("GPU", 0) / self._gpus) if self._gpus else int(total.get("CPU", 0))
            self._slots, self._looked = max(1, min(gpus, int(total.get("CPU", 0)))), time.monotonic()
        return self._slots

    def _look_at_nodes(self) -> list[dict[str, Any]]:
        """What ``environment.json`` says of every node that can run tasks; refuses those with another moesaic."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        ray, looks = self._ray, dict[Any, tuple[str, int]]()
        for node in ray.nodes():
            has = node["Resources"]
            slots = min(has.get("CPU", 0), has.get("GPU", 0) / self._gpus if self._gpus else math.inf)
            if node["Alive"] and slots >= 1:
                # It asks for nothing that other tasks could hold for hours.
                there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                task = self._task(_look, self._gpus).options(num_cpus=0, num_gpus=0, scheduling_strategy=there)
                looks[task.remote(self.device)] = node["NodeManagerHostname"], int(slots)
        if not looks:
            raise InputError(f"--engine ray: no node of the cluster has a core{' and a GPU' if self._gpus else ''}")
        nodes = []
        for reference, (host, slots) in looks.items():
            try:
                memory, facts = ray.get(reference)
            except ray.exceptions.RayError as error:
                last = str(error).strip().splitlines()[-1]
                raise InputError(
                    f"--engine ray: {host} cannot train; it needs moesaic {__version__}: {last}"
                ) from error
            version = facts["versions"]["moesaic"]
            if version != __version__:
                raise InputError(f"--engine ray: {host} has moesaic {version}, this process has {__version__}")
            if memory is not None:  # tasks at once share a node's memory, or a GPU's
                memory = int(memory * self._gpus) if self._gpus else memory // slots
            nodes.append({"host": host, "tasks": slots, "memory_per_task": memory, **facts})
        return nodes


_spent = False
"""Whether this process has met a `Fault` and is to be replaced."""


def _train(
    version: str, threads: int, group: Group, work: Work, told: tuple[Any, float] | None = None
) -> list[Row] | Fault:
    global _spent
    if _spent:
        os._exit(1)  # Ray runs the task again, in another process
    host = socket.gethostname()
    if version != __version__:
        raise RuntimeError(f"{host} has moesaic {__version__}, the driver has {version}")
    needed = {"cpu": "numba", "cuda": "triton"}[work.device]
    if work.impl != "torch" and environment.missing_extras({"bench": [needed]}):
        raise RuntimeError(f"{host} lacks {needed}; there: {environment.install_command('bench,ray')}")
    try:
        _take_gpu()
        _set_threads(threads)
    except Exception as error:
        found: list[Row] | Fault = Fault("machine", reason(error))
    else:
        found = sendable_rows(group, work, _Reporter(group, *told) if told else _Unwatched())
    if isinstance(found, Fault):
        _spent = True
        found = replace(found, words=f"on {host}: {found.words}")
    return found


def _look(device: str) -> tuple[int | None, dict[str, Any]]:
    """The memory that bounds a run on ``device`` (the smallest of several GPUs), and what this node is."""
    import torch

    machine, memory = environment.machine(), environment.memory_bytes()
    if device == "cuda":
        sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
        memory = min((size for size in (memory, *sizes) if size), default=None)
    kept = {name: machine[name] for name in ("cpu", "cores", "memory_bytes", "gpus")}
    return memory, {**kept, "versions": environment.versions()}


def _call(function: Callable[[], T]) -> T:
    _take_gpu()
    return function()


def _take_gpu() -> None:
    """Makes the GPU that Ray assigned to this task the current one."""
    import ray
    import torch

    assigned = ray.get_gpu_ids()
    if assigned:
        torch.cuda.set_device(visible_gpus().index(str(assigned[0])))


def _set_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)
    with contextlib.suppress(ImportError):
        import numba

        numba.set_num_threads(min(count, environment.usable_cores()))


class _Board:
    """An actor on which tasks leave how far they are; nothing but the bar depends on it."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[int, float]] = {}

    def tell(self, key: str, steps: int, loss: float) -> None:
        self._told[key] = steps, loss

    def read(self) -> dict[str, tuple[int, float]]:
        told, self._told = self._told, {}
        return told


class _Reporter:
    """Tells the board of the model-steps of a task so far, now and then."""

    def __init__(self, group: Group, board: Any, interval_s: float) -> None:
        self._key, self._board, self._interval_s = group[0].run.key, board, interval_s
        self._steps, self._sent = 0, time.monotonic()

    def advance(self, group: Group) -> Callable[[int, float], None]:
        def on_progress(steps: int, loss: float) -> None:
            self._steps += steps * len(group)
            if time.monotonic() - self._sent >= self._interval_s:
                self._sent = time.monotonic()
                with contextlib.suppress(Exception):
                    self._board.tell.remote(self._key, self._steps, loss)

        return on_progress

    def group_failed(self, *groups: Group) -> None:
        self._steps = 0


class _Unwatched:
    """For a task that nobody asks."""

    def advance(self, group: Group) -> Callable[[int, float], None]:
        return lambda steps, loss: None

    def group_failed(self, *groups: Group) -> None:
        pass


class _Steps:
    """Brings what the board says into the driver's bar, without ever waiting for it."""

    def __init__(self, ray: Any, board: Any, bar: Progress) -> None:
        self._ray, self._board, self._bar = ray, board, bar
        self._asked: Any = None
        self._next = time.monotonic()
        self._shown: dict[str, int] = {}

    def look(self, pending: Iterable[Group]) -> None:
        """Shows the last answer, where it has come, and asks again."""
        if time.monotonic() < self._next:
            return
        with contextlib.suppress(Exception):
            if self._asked is None:
                self._asked = self._board.read.remote()
            if not self._ray.wait([self._asked], timeout=0)[0]:
                return
            answer, self._asked = self._asked, None
            self._next = time.monotonic() + STEPS_INTERVAL_S
            told: dict[str, tuple[int, float]] = self._ray.get(answer)
            for group in pending:
                if group[0].run.key in told:
                    self._show(group, *told[group[0].run.key])

    def _show(self, group: Group, steps: int, loss: float) -> None:
        key = group[0].run.key
        if steps < self._shown.get(key, 0):  # Ray began it again
            self.ended(group)
        self._bar.add(group, steps - self._shown.get(key, 0), loss)
        self._shown[key] = steps

    def ended(self, group: Group) -> None:
        """Takes back what was shown of a task."""
        if self._shown.pop(group[0].run.key, None) is not None:
            self._bar.group_failed(group)
