from __future__ import annotations

import json
import pickle
import resource
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pytest

from moesaic.bench.engines import EngineChoice, EngineError, Fault, Work, fault_of, sendable_rows, train_group
from moesaic.bench.million import MILLION
from moesaic.bench.plan import InputError, PlannedRun, Row
from moesaic.bench.progress import Progress
from moesaic.bench.report import write_report
from moesaic.bench.reproduce import REPRODUCTIONS
from moesaic.bench.spec import spec_preset
from moesaic.bench.store import TIME_COLUMNS, RunStore, StoreError
from moesaic.bench.sweep import SweepResult, run_sweep, trainer_with

FAULTS = Path(__file__).with_name("faults.py")
SPEC = {"seeds": 3, "run": {"steps": 4, "batch_size": 2}, "grid": {"n_hidden": [1, 2, 3], "lr": [0.1, 0.2]}}


def rows_of(
    group: Sequence[PlannedRun], *, device: str, impl: str, progress: Callable[[int, float], None]
) -> list[Row]:
    progress(group[0].run.training.steps, 0.5)
    return [{"run_key": p.run.key, "loss": p.run.seed / 7, "usage": [p.run.training.lr] * 1000} for p in group]


def parquet(out: Path) -> list[tuple[object, ...]]:
    found = duckdb.read_parquet(str(out / "runs.parquet")).project(f"* EXCLUDE ({', '.join(TIME_COLUMNS)})")
    return [tuple(found.columns), tuple(map(str, found.types)), *found.fetchall()]


def keys_written(out: Path) -> list[str]:
    return [json.loads(line)["run_key"] for line in (out / "runs.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("faults")
    done = subprocess.run([sys.executable, FAULTS, folder], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout), done.stderr


def test_fifty_kills_lose_and_double_nothing(faults: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    folder, found, _ = faults
    assert found["killed"].pop("status") == 0
    assert sum(found["killed"].values()) >= 50
    assert min(found["killed"].values()) >= 10
    spec = {**SPEC, "seeds": 32}
    (stage,) = spec_preset(spec).stages(False, None)
    keys = [item.run.key for item in stage([])]
    assert sorted(keys_written(folder / "killed")) == sorted(keys)
    # A kill can cost the groups that were being trained, two in a pool, never one whose rows were written.
    assert len((folder / "log").read_text().splitlines()) <= len(keys) + 4 * sum(found["killed"].values())
    run_sweep(spec_preset(spec), tmp_path, device="cpu", progress=False, max_models=2, trainer=rows_of)
    assert parquet(folder / "killed") == parquet(tmp_path)


def test_a_driver_killed_between_a_model_and_its_row_costs_neither(faults: tuple[Path, dict[str, Any], str]) -> None:
    folder, found, _ = faults
    assert found["models"] == [1, 2]
    killed, whole = (
        {path.name: path.read_bytes() for path in (folder / name / "models").iterdir()}
        for name in ("models killed", "models")
    )
    assert len(whole) == 4
    assert killed == whole
    assert len(keys_written(folder / "models killed")) == 8
    assert parquet(folder / "models killed") == parquet(folder / "models")


def test_only_the_run_that_kills_its_process_fails(faults: tuple[Path, dict[str, Any], str]) -> None:
    _, found, stderr = faults
    failed = {(n_hidden, seed): error for n_hidden, seed, status, error in found["lethal"] if status == "failed"}
    assert len(found["lethal"]) == 8
    assert failed.keys() == {(1, 1), (2, 0)}
    assert failed[1, 1].startswith("FloatingPointError: gone (faults.py:")
    assert failed[2, 0] == "the process that trained this run died 4 times; the last one exited with code 7"
    assert "spec: 100%" in stderr
    assert "32.0/32.0" in stderr
    assert stderr.count("failed: run ") == 2 + 1  # of `machine_faults`


def test_faults_of_the_machine_end_a_process_and_no_run(faults: tuple[Path, dict[str, Any], str]) -> None:
    missing, disk = faults[1]["machine"]["words"]
    assert missing.startswith("--workers: no run is at fault: ModuleNotFoundError: No module named 'numba' (faults.py:")
    assert "no run is at fault: OSError: [Errno 28] No space left on device" in disk
    assert disk.endswith("continue with --resume")
    rows = {(n_hidden, seed): error for n_hidden, seed, _, error in faults[1]["machine"]["rows"]}
    error = rows.pop((1, 0))
    assert error.startswith("this run made its GPU fail 4 times; the last one RuntimeError: CUDA error: an illegal")
    assert list(rows.values()) == [None] * 7


def test_an_exception_is_the_runs_fault_or_the_machines() -> None:
    import torch

    assert fault_of(ModuleNotFoundError("no numba")) == Fault("missing", "ModuleNotFoundError: no numba")
    for error in (OSError(28, "full"), RuntimeError("Failed to find C compiler. Please specify")):
        assert fault_of(error).kind == "machine"  # type: ignore[union-attr]
    for error in (
        torch.AcceleratorError("an illegal memory access"), RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
        RuntimeError("Triton Error [CUDA]: unspecified launch failure"),
    ):  # fmt: skip
        assert fault_of(error).kind == "device"  # type: ignore[union-attr]
    for own in (
        torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("CUDA error: out of memory"), MemoryError(),
        FloatingPointError(), ValueError("CUDA error"), RuntimeError("shapes"),
    ):  # fmt: skip
        assert fault_of(own) is None


def test_a_fault_of_the_machine_ends_a_sweep_without_workers_and_resumes(tmp_path: Path) -> None:
    import torch

    def sweep(fault: Exception | None = None, after: int = 2) -> SweepResult:
        called = []

        def trainer(group: Sequence[PlannedRun], **others: Any) -> list[Row]:
            called.append(group)
            if fault is not None and len(called) > after:
                raise fault
            return rows_of(group, **others)

        return run_sweep(
            spec_preset(SPEC), tmp_path, device="cpu", progress=False, max_models=2, trainer=trainer, resume=True
        )

    for number, (fault, words) in enumerate({
        ModuleNotFoundError("No module named 'numba'"): r"no run is at fault: ModuleNotFoundError: .* --resume$",
        OSError(28, "No space"): "no run is at fault: OSError: .*No space",
        torch.AcceleratorError("CUDA error: unspecified"): "AcceleratorError: .*--workers 1 trains in a process that",
    }.items(), 1):  # fmt: skip
        with pytest.raises(EngineError, match=words):
            sweep(fault)
        assert [row["status"] for row in RunStore(tmp_path).rows()] == ["ok"] * 4 * number
    assert sweep().failed == []
    assert len(sweep().rows) == 18


def test_a_gpu_that_fails_whatever_is_asked_of_it_is_no_runs_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    (stage,) = spec_preset({**SPEC, "seeds": 1, "grid": {}}).stages(False, None)
    work = Work(rows_of, "cuda", "torch")

    def answer(error: Exception) -> Any:
        def zeros(*shape: int, **others: Any) -> None:
            raise error

        monkeypatch.setattr("torch.zeros", zeros)
        return sendable_rows(stage([]), work, Progress(enabled=False))

    found = answer(RuntimeError("CUDA error: no kernel image is available"))
    assert found.kind == "machine"
    assert found.words.startswith("the GPU does not answer: RuntimeError: CUDA error: no kernel image")
    # Memory that others have now says nothing of the GPU; the run may fit.
    assert [row["status"] for row in answer(torch.OutOfMemoryError("CUDA out of memory"))] == ["ok"]


def test_runs_are_trained_alone_without_the_memory_of_their_group() -> None:
    (stage,) = spec_preset({**SPEC, "grid": {}}).stages(False, None)
    held: list[weakref.ref[set[int]]] = []

    def trainer(group: Sequence[PlannedRun], **others: Any) -> list[Row]:
        if len(group) > 1:
            big = {1}
            held.append(weakref.ref(big))
            raise MemoryError
        assert held[0]() is None
        return rows_of(group, **others)

    rows = train_group(stage([]), Work(trainer, "cpu", "torch"), Progress(enabled=False))
    assert [row["error"] for row in rows] == [None] * 3


def test_processes_that_cannot_begin_end_the_sweep(faults: tuple[Path, dict[str, Any], str]) -> None:
    folder, found, _ = faults
    assert "processes end before they can begin; the last one exited with code 3" in found["stillborn"]
    assert 'if __name__ == "__main__":' in found["stillborn"]
    assert RunStore(folder / "stillborn").rows() == []


def test_spawned_workers_give_the_same_rows_and_name_the_step_of_a_divergence(tmp_path: Path) -> None:
    spec = {
        "seeds": 2,
        "run": {"steps": 8, "batch_size": 4, "n_features": 6, "n_experts": 2},
        "grid": {"n_hidden": [1, 2], "lr": [0.01, 1e30]},
    }
    options: dict[str, Any] = {"device": "cpu", "impl": "torch", "progress": False}
    run_sweep(spec_preset(spec), tmp_path / "here", **options)
    result = run_sweep(spec_preset(spec), tmp_path / "pool", workers=2, **options)
    assert parquet(tmp_path / "here") == parquet(tmp_path / "pool")
    assert [row["lr"] for row in result.failed] == [1e30] * 4
    assert all(" at step " in str(row["error"]) for row in result.failed)
    environment = RunStore(tmp_path / "pool").environment() or {}
    assert environment["engine"]["workers"] == 2  # type: ignore[index]


def test_a_full_disk_is_said_leaves_whole_rows_and_resumes(tmp_path: Path) -> None:
    def sweep(name: str, resume: bool = False) -> SweepResult:
        return run_sweep(
            spec_preset(SPEC), tmp_path / name, device="cpu", progress=False, max_models=2, trainer=rows_of,
            resume=resume,
        )  # fmt: skip

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Nine groups of two rows of six kilobytes: the limit cuts one of them in the middle.
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(StoreError, match=r"runs\.jsonl: .*the rows before are safe: make room.*--resume"):
            sweep("a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    data = (tmp_path / "a" / "runs.jsonl").read_bytes()
    assert data.endswith(b"}\n")
    assert 0 < len(keys_written(tmp_path / "a")) < 18
    assert len(sweep("a", resume=True).rows) == len(keys_written(tmp_path / "a")) == 18
    sweep("b")
    assert parquet(tmp_path / "a") == parquet(tmp_path / "b")


def test_a_disk_that_is_full_at_the_end_is_said_and_leaves_the_older_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sweep(**others: Any) -> SweepResult:
        return run_sweep(spec_preset(SPEC), tmp_path, device="cpu", progress=False, trainer=rows_of, **others)

    write, written = RunStore.write_environment, list[object]()

    def full_at_the_end(self: RunStore, environment: Mapping[str, object]) -> None:
        if environment["ended"] is not None:
            raise OSError(28, "No space left on device")
        written.append(environment)
        write(self, environment)

    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "write_environment", full_at_the_end)
        with pytest.raises(StoreError, match=r"environment\.json: No space left on device; all rows are safe"):
            sweep()
    assert len(sweep(resume=True).rows) == 18
    before = write_report(tmp_path).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr("moesaic.bench.report.page", lambda title, parts: "a" * 2_000_001)  # no figure is so large
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limits[1]))
    try:
        with pytest.raises(StoreError, match=rf"File too large; the rows are safe: .*moesaic report {tmp_path}"):
            write_report(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "report.html").read_bytes() == before
    assert list(tmp_path.glob(".report*")) == []


def test_a_second_sweep_is_refused_while_the_first_one_writes(tmp_path: Path) -> None:
    def second(group: Sequence[PlannedRun], **others: Any) -> list[Row]:
        with pytest.raises(InputError, match=r"another sweep is writing there \(host .*, process \d+, since 20"):
            run_sweep(spec_preset(SPEC), tmp_path, device="cpu", progress=False, resume=True, trainer=rows_of)
        return rows_of(group, **others)

    assert run_sweep(spec_preset(SPEC), tmp_path, device="cpu", progress=False, trainer=second).failed == []
    assert run_sweep(spec_preset(SPEC), tmp_path, device="cpu", progress=False, resume=True).rows


def test_bad_choices_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases: dict[str, dict[str, Any]] = {
        "--engine 'dask': must be one of local, ray": {"name": "dask"},
        "--workers 0: must be an integer >= 1": {"workers": 0},
        "--address auto: belongs to --engine ray": {"address": "auto"},
        "--gpus-per-task 0.5: belongs to --engine ray": {"gpus_per_task": 0.5},
        "--gpus-per-task nan: must be above 0 and at most 1": {"name": "ray", "gpus_per_task": float("nan")},
        "--gpus-per-task 2: must be above 0 and at most 1": {"name": "ray", "gpus_per_task": 2},
        "--workers 2: the cluster at --address says": {"name": "ray", "workers": 2, "address": "a:1"},
    }
    for words, arguments in cases.items():
        with pytest.raises(InputError) as caught:
            EngineChoice(**arguments)
        assert words in str(caught.value)
    out, preset = tmp_path / "out", spec_preset(SPEC)
    with pytest.raises(InputError, match="the trainer cannot be sent to other processes"):
        run_sweep(preset, out, device="cpu", workers=2, trainer=lambda group, **others: [])
    with pytest.raises(InputError, match="--engine ray: million keeps checkpoints in the run folder"):
        run_sweep(MILLION, out, engine="ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r'ray not installed: pip install "moesaic\[ray\]"'):
        run_sweep(preset, out, engine="ray")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("moesaic.bench.environment.device_memory_bytes", lambda device: None)
    with pytest.raises(InputError, match="--workers 3: one process per GPU, and torch finds 2 here"):
        run_sweep(preset, out, device="cuda", workers=3)
    assert not out.exists()


def test_a_worker_has_a_gpu_of_its_own_or_its_share_of_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    from moesaic.bench.engine_pool import ProcessPool

    monkeypatch.setattr("torch.get_num_threads", lambda: 7)
    assert {row["NUMBA_NUM_THREADS"] for row in ProcessPool(3, "cpu").facts["variables"]} == {"2"}  # type: ignore[attr-defined]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("moesaic.bench.environment.device_memory_bytes", lambda device: None)
    for visible, expected in (("", ["0", "1"]), ("3,5", ["3", "5"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        variables: Any = ProcessPool(2, "cuda").facts["variables"]
        assert variables == [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in expected]


def test_the_trainers_of_presets_and_reproductions_can_be_sent(tmp_path: Path) -> None:
    trainers = [trainer_with(item.columns) for item in REPRODUCTIONS.values()]
    for trainer in (*trainers, MILLION.trainer(tmp_path)):
        assert pickle.loads(pickle.dumps(trainer)) is not None
