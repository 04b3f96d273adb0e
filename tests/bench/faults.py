"""Sweeps under fire, as a program: what a sweep imports is imported once, and every sweep is a forked child of it.

Its pools fork too, where a sweep's own start by spawn: a process that first imports torch takes seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import duckdb  # noqa: F401
import torch
import torch._dynamo
import tqdm  # noqa: F401

import moesaic.bench.measure
import moesaic.kernels.toy_cpu
import moesaic.moe  # noqa: F401
from moesaic.bench import engine_pool, environment
from moesaic.bench.engines import EngineError
from moesaic.bench.plan import PlannedRun, Row
from moesaic.bench.spec import spec_preset
from moesaic.bench.store import RunStore
from moesaic.bench.sweep import run_sweep

KILLS = 50
SPEC = {
    "seeds": 32,
    "run": {"steps": 4, "batch_size": 2},
    "grid": {"n_hidden": [1, 2, 3], "lr": [0.1, 0.2]},
}


def row(item: PlannedRun) -> Row:
    """What the trainers of this program find."""
    return {"run_key": item.run.key, "loss": item.run.seed / 7, "usage": [item.run.training.lr] * 1000}


def logging(
    log: Path, group: Sequence[PlannedRun], *, device: str, impl: str, progress: Callable[[int, float], None]
) -> list[Row]:
    """Says in ``log`` who trains how many runs, then takes a moment."""
    with log.open("a") as file:
        file.write(f"{os.getpid()}\n" * len(group))
    time.sleep(0.004)
    progress(group[0].run.training.steps, 0.5)
    return [row(item) for item in group]


def lethal(
    group: Sequence[PlannedRun], *, device: str, impl: str, progress: Callable[[int, float], None], once: Path
) -> list[Row]:
    """Ends the process on one run always, on one the first time, and raises on a third."""
    for item in group:
        where = (item.run.toy.n_hidden, item.run.seed)
        if where == (2, 0):
            os._exit(7)
        if where == (2, 3) and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if where == (1, 1):
            raise FloatingPointError("gone")
    return [row(item) for item in group]


_poison: list[str] = []


def broken(
    group: Sequence[PlannedRun], *, device: str, impl: str, progress: Callable[[int, float], None], folder: Path
) -> list[Row]:
    """Fails as on a GPU at one run once and at one always, and then always in that process; maybe as a machine does."""
    where = {(item.run.toy.n_hidden, item.run.seed) for item in group}
    if (1, 0) in where or ((1, 3) in where and not (folder / "once").exists()):
        (folder / "once").touch()
        _poison.append("CUDA error: an illegal memory access was encountered")
    if _poison:
        raise RuntimeError(_poison[0])
    if (2, 2) in where and (folder / "import").exists():
        raise ModuleNotFoundError("No module named 'numba'")
    if (2, 2) in where and (folder / "disk").exists():
        raise OSError(28, "No space left on device")
    return [row(item) for item in group]


def machine_faults(folder: Path) -> dict[str, object]:
    """What the sweep of a machine with faults says: two that end it, then its rows."""
    spec, out = spec_preset({**SPEC, "seeds": 4, "grid": {"n_hidden": [1, 2]}}), folder / "broken"
    out.mkdir()
    words = []
    for name in ("import", "disk"):
        (out / name).touch()
        try:
            run_sweep(
                spec, out, device="cpu", progress=False, max_models=2, trainer=partial(broken, folder=out), workers=2,
                resume=True,
            )  # fmt: skip
        except EngineError as error:
            words.append(str(error))
        (out / name).unlink()
    result = run_sweep(
        spec, out, device="cpu", progress=False, max_models=2, trainer=partial(broken, folder=out), workers=2,
        resume=True,
    )  # fmt: skip
    rows = [[row["n_hidden"], row["seed"], row["status"], row["error"]] for row in result.rows]
    return {"words": words, "rows": rows}


def kill_sweeps(out: Path, log: Path) -> dict[str, object]:
    """Starts one sweep again and again and kills drivers, in the middle of appends too, and workers of pools."""
    kinds = dict.fromkeys(("driver", "append", "pool driver", "worker"), 0)
    while sum(kinds.values()) < KILLS:
        kind = min(kinds, key=lambda name: (kinds[name], random.random()))
        workers = 2 if kind in ("pool driver", "worker") else None
        begun = _lines(log)
        child = os.fork()
        if child == 0:
            if kind == "append":
                _die_in_an_append(after=random.choice([0, 1, 2]))
            _sweep(out, partial(logging, log), workers)
        wanted = begun + 2 * random.choice([0, 1, 1, 2])
        ended = 0
        while not ended and (kind == "append" or _lines(log) < wanted):
            ended, _ = os.waitpid(child, os.WNOHANG)
            time.sleep(0.0005)
        if ended and kind != "append":
            break
        if not ended:
            time.sleep(random.uniform(0, 0.012))
            if kind == "worker":
                for _ in range(2):
                    kinds[kind] += _kill_a_worker(child)
                    time.sleep(random.uniform(0, 0.012))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        kinds[kind] += kind != "worker"
    child = os.fork()
    if child == 0:
        _sweep(out, partial(logging, log), 2)
    _, status = os.waitpid(child, 0)
    return {**kinds, "status": status}


def kill_between_model_and_row(folder: Path) -> list[int]:
    """Trains for real, in a pool whose driver dies after it wrote models and before their rows, and undisturbed.

    Gives the numbers of models without a row and of rows that the death left.
    """
    run = {"steps": 4, "batch_size": 2, "n_features": 6, "n_experts": 2}
    spec = spec_preset({"seeds": 2, "run": run, "grid": {"n_hidden": [1, 2], "lr": [0.1, 0.2]}})

    def sweep(name: str, workers: int | None, writes: int | None) -> None:
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            return
        if writes is not None:
            _die_before_a_write(writes)
        run_sweep(
            spec, folder / name, device="cpu", impl="torch", resume=True, progress=False, max_models=2, workers=workers
        )
        os._exit(0)

    sweep("models killed", 2, 1)
    keys = RunStore(folder / "models killed").keys()
    models = {path.stem for path in (folder / "models killed" / "models").glob("*.safetensors")}
    sweep("models killed", 2, None)
    sweep("models", None, None)
    return [len(models - keys), len(keys)]


def _die_before_a_write(after: int) -> None:
    write, left = RunStore._write, [after]

    def last(self: RunStore, lines: bytes) -> None:
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        write(self, lines)

    RunStore._write = last  # type: ignore[method-assign]


def _sweep(out: Path, trainer: Callable[..., list[Row]], workers: int | None) -> None:
    run_sweep(
        spec_preset(SPEC), out, device="cpu", resume=True, progress=False, max_models=2, trainer=trainer,
        workers=workers,
    )  # fmt: skip
    os._exit(0)


def _lines(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


def _die_in_an_append(after: int) -> None:
    write, left = os.write, [after]

    def part(descriptor: int, data: bytes) -> int:
        if not left[0]:
            write(descriptor, data[: random.randrange(len(data))])
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return write(descriptor, data)

    os.write = part  # type: ignore[assignment]


def _kill_a_worker(driver: int) -> bool:
    children = Path(f"/proc/{driver}/task/{driver}/children").read_text().split()
    if not children:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(random.choice(children)), signal.SIGKILL)
    return True


def main(folder: Path) -> None:
    """Prints what happened as JSON."""
    random.seed(0)
    engine_pool.START_METHOD = "fork"
    torch.set_num_threads(1)  # a forked child could not use the threads of another process
    facts = environment.environment([])
    environment.environment = lambda argv: dict(facts)  # asking git takes longer than these sweeps
    started = time.perf_counter()
    killed = kill_sweeps(folder / "killed", folder / "log")
    seconds = time.perf_counter() - started
    spec = {**SPEC, "seeds": 4, "grid": {"n_hidden": [1, 2]}}
    trainer = partial(lethal, once=folder / "once")
    result = run_sweep(
        spec_preset(spec), folder / "lethal", device="cpu", progress=True, max_models=2, trainer=trainer, workers=2
    )
    machine = machine_faults(folder)
    models = kill_between_model_and_row(folder)
    engine_pool.serve = lambda pipe: os._exit(3)
    try:
        run_sweep(spec_preset(spec), folder / "stillborn", device="cpu", progress=False, trainer=trainer, workers=1)
        stillborn = ""
    except EngineError as error:
        stillborn = str(error)
    rows = [[row["n_hidden"], row["seed"], row["status"], row["error"]] for row in result.rows]
    print(
        json.dumps(
            {
                "killed": killed,
                "seconds": seconds,
                "lethal": rows,
                "machine": machine,
                "models": models,
                "stillborn": stillborn,
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
