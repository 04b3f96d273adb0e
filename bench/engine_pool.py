"""The local pool: processes started by spawn, each with a pipe to the driver, one group at a time each.

One process has one GPU, or its share of the CPU's threads. A death is seen as the end of its pipe and belongs to the
one group that the process had; nothing is shared that a killed process could leave locked.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, TypeVar

from moesaic.bench import environment
from moesaic.bench.engines import (
    RETRIES,
    Attempts,
    EngineError,
    Fault,
    Group,
    Results,
    Work,
    reason,
    sendable_rows,
)
from moesaic.bench.plan import InputError, Row
from moesaic.bench.progress import REDRAW_INTERVAL_S, Progress

if TYPE_CHECKING:
    from moesaic.bench.sweep import Trainer

T = TypeVar("T")

START_METHOD = "spawn"
"""A forked process could use neither CUDA nor the threads of torch and Numba that the driver has started."""
CLOSING_S = 5.0
"""How long a process may take to end before it is killed."""


def check_sendable(trainer: Trainer) -> None:
    """Raises `InputError` for a trainer that other processes cannot be sent."""
    try:
        pickle.dumps(trainer)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InputError(
            f"--workers: the trainer cannot be sent to other processes ({error}); define it at the top of a module"
        ) from error


@dataclass
class _Worker:
    process: BaseProcess
    pipe: connection.Connection
    group: Group | None = None
    ready: bool = False


class ProcessPool:
    """Trains on as many groups at once as there are workers; processes start with the first groups.

    Args:
        workers: processes.
        device: ``cpu`` or ``cuda``.

    Raises:
        InputError: more workers than GPUs.
    """

    shares_cache, why_not_alone = True, ""

    def __init__(self, workers: int, device: str) -> None:
        self.device = device
        self.memory = environment.device_memory_bytes(device)
        if device == "cpu" and self.memory is not None:
            self.memory //= workers
        self._variables = [_variables(number, workers, device) for number in range(workers)]
        self.facts: Mapping[str, object] = {"name": "local", "workers": workers, "variables": self._variables}
        self._workers: list[_Worker] = []
        self._stillborn = 0

    def train(self, groups: Sequence[Group], work: Work, bar: Progress) -> Results:
        """The groups as they end, in no fixed order.

        Raises:
            EngineError: processes end before they can begin, or cannot read what they are sent; a fault of the machine
                that other processes have too.
        """
        todo, attempts = deque(groups), Attempts("--workers")
        try:
            while self._assign(todo, work):
                for ready in connection.wait([worker.pipe for worker in self._workers]):
                    number = next((i for i, worker in enumerate(self._workers) if worker.pipe is ready), None)
                    if number is None:  # it died, and was replaced when it was to be given a group
                        continue
                    worker = self._workers[number]
                    try:
                        kind, content = worker.pipe.recv()
                    except (EOFError, OSError):
                        kind, content = "fault", Fault("death", self._replace(number))
                    else:
                        if kind == "fault":
                            self._replace(number)
                    if kind == "fault":
                        if worker.group is None:
                            continue
                        bar.group_failed(worker.group)
                        again, rows = [worker.group], list[Row]()
                        if worker.ready:
                            again, rows = attempts.after(content, worker.group, work)
                        todo.extendleft(reversed(again))
                        if rows:
                            yield worker.group, rows
                    elif kind == "ready":
                        worker.ready, self._stillborn = True, 0
                    elif kind == "error":
                        raise EngineError(f"--workers: a process cannot take up its work: {content}")
                    elif worker.group is not None:
                        if kind == "steps":
                            bar.add(worker.group, *content)
                        elif kind == "again":
                            bar.group_failed(worker.group)
                        else:
                            done, worker.group = worker.group, None
                            self._assign(todo, work)  # the worker trains on while the rows are written
                            yield done, content
        finally:
            if any(worker.group is not None for worker in self._workers):
                self.close()

    def alone(self, function: Callable[[], T]) -> T:
        """Ends the processes, then calls it."""
        self.close()
        return function()

    def close(self) -> None:
        """Ends the processes, whatever they are at."""
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            _end(worker)
        self._workers = []

    def _assign(self, todo: deque[Group], work: Work) -> bool:
        """Gives idle workers groups; whether anything is left to do."""
        for number in range(len(self._variables)):
            if todo and number == len(self._workers):
                self._workers.append(self._start(number))
            if todo and self._workers[number].group is None:
                self._give(number, todo, work)
        return bool(todo) or any(worker.group is not None for worker in self._workers)

    def _give(self, number: int, todo: deque[Group], work: Work) -> None:
        worker = self._workers[number]
        try:
            worker.pipe.send((work, todo[0]))
        except OSError:  # it died while it was idle
            self._replace(number)
        else:
            worker.group = todo.popleft()

    def _start(self, number: int) -> _Worker:
        context: Any = multiprocessing.get_context(START_METHOD)
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs,), daemon=True, name=f"sweep worker {number}")
        with _environment(self._variables[number]):
            process.start()
        theirs.close()  # else the end of the process would not be the end of the pipe
        return _Worker(process, ours)

    def _replace(self, number: int) -> str:
        """Starts another process in place of a dead one and says how that ended."""
        worker = self._workers[number]
        _end(worker)
        code = worker.process.exitcode
        cause = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"exited with code {code}"
        self._stillborn += not worker.ready
        if self._stillborn > RETRIES:
            raise EngineError(
                f"--workers: processes end before they can begin; the last one {cause}. A script that calls run_sweep "
                'must do so under if __name__ == "__main__":'
            )
        self._workers[number] = self._start(number)
        return cause


def serve(pipe: connection.Connection) -> None:
    """A process of the pool: trains the groups that come through ``pipe`` until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the driver ends us
    os.dup2(2, 1)  # with --json nothing but the object may reach stdout
    threading.Thread(target=_end_with_parent, daemon=True).start()
    pipe.send(("ready", None))
    while True:
        try:
            work, group = pipe.recv()
        except EOFError:
            return
        except Exception as error:
            pipe.send(("error", reason(error)))
            return
        found = sendable_rows(group, work, _Reporter(pipe))
        if isinstance(found, Fault):
            pipe.send(("fault", found))
            os._exit(1)  # whatever it has loaded, opened or lost; the driver starts another in its place
        pipe.send(("rows", found))


class _Reporter:
    """Tells the driver of steps, now and then."""

    def __init__(self, pipe: connection.Connection) -> None:
        self._pipe, self._steps, self._sent = pipe, 0, time.monotonic()

    def advance(self, group: Group) -> Callable[[int, float], None]:
        def on_progress(steps: int, loss: float) -> None:
            self._steps += steps * len(group)
            if time.monotonic() - self._sent >= REDRAW_INTERVAL_S:
                self._send("steps", (self._steps, loss))

        return on_progress

    def group_failed(self, *groups: Group) -> None:
        self._send("again", None)

    def _send(self, kind: str, content: object) -> None:
        self._steps, self._sent = 0, time.monotonic()
        try:
            self._pipe.send((kind, content))
        except OSError:
            os._exit(1)  # the driver is gone; as an exception this would count against the run


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _end(worker: _Worker) -> None:
    worker.pipe.close()
    worker.process.join(CLOSING_S)
    if worker.process.exitcode is None:
        worker.process.kill()
        worker.process.join()


def _variables(number: int, workers: int, device: str) -> dict[str, str]:
    """What the environment of a worker says: its GPU, or its share of the threads."""
    if device == "cpu":
        import torch

        threads = str(max(1, torch.get_num_threads() // workers))
        return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), threads)
    visible = visible_gpus()
    if workers > len(visible):
        raise InputError(f"--workers {workers}: one process per GPU, and torch finds {len(visible)} here")
    return {"CUDA_VISIBLE_DEVICES": visible[number]}


def visible_gpus() -> list[str]:
    """The GPUs of this process as ``CUDA_VISIBLE_DEVICES`` names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """``variables`` set for the processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
