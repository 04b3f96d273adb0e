from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import pytest

from moesaic._version import __version__
from moesaic.bench import engine_ray, engines
from moesaic.bench.plan import InputError, PlannedRun, Row
from moesaic.bench.spec import spec_preset
from moesaic.bench.store import TIME_COLUMNS, RunStore
from moesaic.bench.sweep import SweepResult, run_sweep

ray: Any = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("default")  # Ray's own are not ours to mend

SPEC = {"seeds": 5, "run": {"steps": 4, "batch_size": 2}, "grid": {"n_hidden": [1, 2], "lr": [0.1, 1e30]}}
ON_RAY: dict[str, Any] = {"engine": "ray", "device": "cpu", "max_models": 2, "progress": False, "impl": "torch"}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Two slots that all sweeps join, so that their processes import torch once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the nodes do not have the tests
        yield
        ray.shutdown()


def faulty(
    group: Sequence[PlannedRun], *, device: str, impl: str, progress: Callable[[int, float], None], once: Path
) -> list[Row]:
    """Trains, but is killed at one group the first time, and raises at one run."""
    from moesaic.bench.sweep import train_and_measure

    for item in group:
        if (item.run.toy.n_hidden, item.run.seed) == (2, 2) and once.is_dir() and not (once / "done").exists():
            (once / "done").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if (item.run.toy.n_hidden, item.run.seed) == (1, 3):
            raise FloatingPointError("gone")
    return train_and_measure(group, device=device, impl=impl, progress=progress)


def deadly(group: Sequence[PlannedRun], **others: Any) -> list[Row]:
    """Ends its process on one run."""
    if any(item.run.seed == 1 for item in group):
        os._exit(7)
    return [{"run_key": item.run.key, "loss": 0.5} for item in group]


def parquet(out: Path) -> list[tuple[object, ...]]:
    found = duckdb.read_parquet(str(out / "runs.parquet")).project(f"* EXCLUDE ({', '.join(TIME_COLUMNS)})")
    return [tuple(found.columns), tuple(map(str, found.types)), *found.fetchall()]


def sweep(out: Path, spec: Mapping[str, object] = SPEC, **others: Any) -> SweepResult:
    return run_sweep(spec_preset(spec), out, **{**ON_RAY, **others})


def test_a_killed_worker_and_an_interrupted_driver_give_the_rows_of_the_local_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "once").mkdir()
    append, appended = RunStore.append, list[int]()

    def interrupted(self: RunStore, rows: Sequence[Mapping[str, object]]) -> list[Row]:
        appended.append(len(rows))
        if len(appended) == 4:
            raise KeyboardInterrupt
        return append(self, rows)

    most, wait = [0], ray.wait

    def counted(pending: list[Any], **others: Any) -> Any:
        most[0] = max(most[0], len(pending))
        return wait(pending, **others)

    trainer = partial(faulty, once=tmp_path / "once")
    monkeypatch.setattr(RunStore, "append", interrupted)
    monkeypatch.setattr(ray, "wait", counted)
    first = sweep(tmp_path / "ray", trainer=trainer)
    assert first.interrupted
    assert len(first.rows) < 20
    result = sweep(tmp_path / "ray", trainer=trainer, resume=True)
    assert (tmp_path / "once" / "done").exists()
    assert most == [4]  # twice as many tasks as slots
    assert len((tmp_path / "ray" / "runs.jsonl").read_text().splitlines()) == len(result.rows) == 20
    errors = {(row["n_hidden"], row["seed"], row["lr"]): str(row["error"]) for row in result.failed}
    assert errors[1, 3, 0.1].startswith("FloatingPointError: gone (test_engine_ray.py:")
    assert " at step " in errors[2, 4, 1e30]
    assert len(errors) == 11
    sweep(tmp_path / "local", engine="local", trainer=partial(faulty, once=tmp_path / "no folder"))
    assert parquet(tmp_path / "ray") == parquet(tmp_path / "local")
    environment: Any = RunStore(tmp_path / "ray").environment()
    assert environment["engine"]["version"] == ray.__version__
    (node,) = environment["engine"]["nodes"]
    assert (node["host"], node["tasks"], node["cpu"]) == (socket.gethostname(), 2, environment["cpu"])
    assert node["memory_per_task"] == environment["memory_bytes"] // 2  # of two tasks at once
    assert node["versions"] == environment["versions"]


def test_kept_models_come_back_from_the_nodes(tmp_path: Path) -> None:
    spec = {"seeds": 2, "run": {"steps": 4, "batch_size": 2}, "grid": {"n_hidden": [1, 2]}}
    found = []
    for engine in ("ray", "local"):
        sweep(tmp_path / engine, spec, engine=engine)
        found.append({path.name: path.read_bytes() for path in (tmp_path / engine / "models").iterdir()})
    assert len(found[0]) == 2
    assert found[0] == found[1]


def slow(group: Sequence[PlannedRun], *, device: str, impl: str, progress: Callable[[int, float], None]) -> list[Row]:
    """Takes a second and a half for four steps."""
    for _ in range(4):
        time.sleep(0.375)
        progress(1, 0.25)
    return [{"run_key": item.run.key, "loss": 0.5} for item in group]


def test_the_bar_moves_while_a_task_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine_ray, "STEPS_INTERVAL_S", 0.1)
    monkeypatch.setattr("moesaic.bench.progress.LOG_INTERVAL_S", 0.01)
    sweep(tmp_path, {"seeds": 2, "run": {"steps": 4}}, trainer=slow, progress=True)
    lines = capfd.readouterr().err
    assert re.search(r" (2|4|6)\.00/8\.00 .*loss 0\.25", lines)
    assert " 8.00/8.00 " in lines
    assert "loss 0.5" in lines


def test_steps_of_a_task_that_ray_began_again_count_once() -> None:
    class Bar:
        n = 0

        def add(self, group: Any, steps: int, loss: float) -> None:
            self.n += steps

        def group_failed(self, *groups: Any) -> None:
            self.n = 0

    bar: Any = Bar()
    (group,) = [[item] for item in spec_preset({"run": {"steps": 9}}).stages(False, 1)[0]([])]
    steps = engine_ray._Steps(ray, None, bar)
    for told, shown in ((3, 3), (5, 5), (2, 2), (4, 4)):
        steps._show(group, told, 0.5)
        assert bar.n == shown
    steps.ended(group)
    assert bar.n == 0
    steps.look([group])  # no actor: nothing is shown and nothing raised
    assert bar.n == 0


def test_a_run_that_always_ends_its_process_is_a_failed_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine_ray, "RETRIES", 0)
    monkeypatch.setattr(engines, "RETRIES", 0)
    result = sweep(tmp_path, {"seeds": 2, "run": {"steps": 4}}, trainer=deadly, progress=True)
    assert [row["status"] for row in result.rows] == ["ok", "failed"]
    error = str(result.rows[1]["error"])
    assert error.startswith("the process that trained this run died 1 times; the last one with WorkerCrashedError")
    assert "8.00/8.00" in capfd.readouterr().err


def test_what_cannot_run_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="the Ray cluster has no GPU"):
        sweep(out, device="cuda")
    with pytest.raises(InputError, match="--device 'gpu': must be one of"):
        sweep(out, device="gpu")
    with pytest.raises(InputError, match=r"--gpus-per-task 0\.5: the device is cpu"):
        sweep(out, gpus_per_task=0.5)
    with pytest.raises(InputError, match="--energy: takes --engine local on a CPU"):
        sweep(out, energy=True)
    with pytest.raises(InputError, match="this process is connected to a Ray cluster already"):
        sweep(out, address="auto")
    with socket.socket() as unsendable, pytest.raises(InputError, match="the trainer cannot be sent"):
        sweep(out, trainer=partial(deadly, socket=unsendable))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(InputError, match=f"--address {address}: no Ray cluster answers there: .*refused"):
            engine_ray._connect(ray, engines.EngineChoice(name="ray", address=address))
    monkeypatch.setattr(engine_ray, "__version__", "0.0.0")
    with pytest.raises(InputError, match=rf"{socket.gethostname()} has moesaic \S+, this process has 0\.0\.0"):
        sweep(out)
    with pytest.raises(RuntimeError, match=r"\S+ has moesaic 0\.0\.0, the driver has 9"):
        engine_ray._train("9", 1, [], engines.Work(deadly, "cpu", "torch"))
    assert not out.exists()


def poisoned(
    group: Sequence[PlannedRun], *, device: str, impl: str, progress: Callable[[int, float], None], folder: Path
) -> list[Row]:
    """Fails as on a GPU once, and then always in that process; one run meets a disk that fails."""
    import moesaic.bench

    if any(item.run.seed == 1 for item in group) and not (folder / "done").exists():
        (folder / "done").touch()
        moesaic.bench.poison = True  # type: ignore[attr-defined]
    if hasattr(moesaic.bench, "poison"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if (folder / "disk").exists() and any(item.run.seed == 3 for item in group):
        raise OSError(28, "No space left on device")
    return [{"run_key": item.run.key, "loss": 0.5} for item in group]


def test_a_fault_of_a_node_is_no_failed_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = {"seeds": 8, "run": {"steps": 4}}
    trainer = partial(poisoned, folder=tmp_path)
    monkeypatch.setattr(engines, "RETRIES", 1)
    (tmp_path / "disk").touch()
    with pytest.raises(
        engines.EngineError, match=rf"no run is at fault: on {socket.gethostname()}: OSError: .*No space"
    ):
        sweep(tmp_path / "out", spec, trainer=trainer)
    assert (tmp_path / "done").exists()
    (tmp_path / "disk").unlink()
    result = sweep(tmp_path / "out", spec, trainer=trainer, resume=True)
    assert [row["status"] for row in result.rows] == ["ok"] * 8
    monkeypatch.setitem(sys.modules, "numba", None)
    work = engines.Work(deadly, "cpu", "auto")
    with pytest.raises(RuntimeError, match=r'lacks numba; there: pip install "moesaic\[bench,ray\]"'):
        engine_ray._train(__version__, 1, [], work)
