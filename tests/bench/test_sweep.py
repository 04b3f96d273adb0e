from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import pytest

from moesaic.bench.engines import reason
from moesaic.bench.lock import RunLock
from moesaic.bench.plan import InputError, PlannedRun, Preset, Row, Stage
from moesaic.bench.rates import calibrate_wall
from moesaic.bench.spec import SweepSpec, spec_preset
from moesaic.bench.store import TIME_COLUMNS, RunStore
from moesaic.bench.sweep import SweepResult, compile_cpu_trainer, compiled_alike, run_sweep
from moesaic.moe.config import FeatureConfig, Run, ToyConfig, TrainConfig

SPEC = {"seeds": 3, "run": {"steps": 4, "batch_size": 2}, "grid": {"n_hidden": [1, 2, 3], "lr": [0.1, 0.2]}}


class Fake:
    """Trains nothing; gives a row per run and remembers what it was asked for."""

    def __init__(self, fault: Callable[[Sequence[PlannedRun]], None] = lambda group: None) -> None:
        self.groups: list[list[PlannedRun]] = []
        self.fault = fault

    def __call__(
        self, group: Sequence[PlannedRun], *, device: str, impl: str, progress: Callable[[int, float], None]
    ) -> list[Row]:
        self.groups.append(list(group))
        self.fault(group)
        progress(group[0].run.training.steps, 0.5)
        return [{"run_key": p.run.key, "loss": p.run.seed / 7, "trained_by": "fake", "device": device} for p in group]

    @property
    def trained(self) -> list[str]:
        return [item.run.key for group in self.groups for item in group]


def sweep(
    out: Path,
    trainer: Fake | None = None,
    *,
    spec: Preset | Mapping[str, object] = SPEC,
    resume: bool = False,
    progress: bool = False,
) -> SweepResult:
    preset = spec if isinstance(spec, Preset) else spec_preset(spec)
    return run_sweep(
        preset, out, device="cpu", resume=resume, progress=progress, max_models=2, trainer=trainer or Fake()
    )


def parquet(out: Path) -> list[tuple[object, ...]]:
    found = duckdb.read_parquet(str(out / "runs.parquet")).project(f"* EXCLUDE ({', '.join(TIME_COLUMNS)})")
    return [tuple(found.columns), tuple(map(str, found.types)), *found.fetchall()]


WALL: dict[str, object] = {
    "seeds": 2, "run": {"steps": 4, "batch_size": 2, "gate": "switch"}, "grid": {"n_experts": [2, 4]},
    "match": {"to": ["wall"]},
}  # fmt: skip


def test_widths_of_equal_wall_time_are_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def seconds(stacks: Any, device: str, impl: str) -> dict[Any, float]:
        measured.append(len(stacks))
        # Another clock every time, so that timing again would plan other widths.
        return {n: len(measured) * r[0].toy.n_experts + r[0].toy.n_hidden / 2 for n, r in stacks.items()}

    monkeypatch.setattr("moesaic.bench.rates.calibrate_wall", partial(calibrate_wall, measure=seconds))
    faulty = Fake()

    def interrupt(group: Sequence[PlannedRun]) -> None:
        if len(faulty.groups) == 2:
            raise KeyboardInterrupt

    faulty.fault = interrupt
    assert sweep(tmp_path, faulty, spec=WALL).interrupted
    assert len(measured) == 1
    held = (RunStore(tmp_path).environment() or {})["calibration"]
    rows = sweep(tmp_path, spec=WALL, resume=True).rows
    assert len(measured) == 1
    assert (RunStore(tmp_path).environment() or {})["calibration"] == held
    widths = {(r["n_experts"], r["match_wall"]) for r in rows if "match_wall" in r}
    # E + 1 = 1 + m/2: every stack's seconds are divided by its models alike.
    assert widths == {(2, 4), (4, 8)}
    assert {r["n_hidden"] for r in rows if r.get("comparison") == "equal wall time"} == {4, 8}
    with pytest.raises(InputError, match="no timings for this spec"):
        sweep(tmp_path, spec={**WALL, "grid": {"n_experts": [2, 3]}}, resume=True)
    assert len(measured) == 1


def test_a_spec_of_python_is_swept_and_its_rows_are_a_table(tmp_path: Path) -> None:
    spec = SweepSpec(run={"steps": 4, "batch_size": 2}, grid={"n_hidden": range(1, 4)}, seeds=2)
    result = run_sweep(spec, str(tmp_path / "out"), device="cpu", progress=False, trainer=Fake())
    assert result.table().aggregate("n_hidden, count(*) AS n", "n_hidden").order("n_hidden").fetchall() == [
        (1, 2), (2, 2), (3, 2),
    ]  # fmt: skip
    assert (RunStore(tmp_path / "out").environment() or {})["spec"] == spec.mapping()


def test_every_planned_run_becomes_one_row_in_plan_order(tmp_path: Path) -> None:
    trainer = Fake()
    result = sweep(tmp_path, trainer)
    (stage,) = spec_preset(SPEC).stages(False, None)
    keys = [item.run.key for item in stage([])]
    assert [row["run_key"] for row in result.rows] == keys
    assert len(keys) == len(set(keys)) == 18
    assert sorted(trainer.trained) == sorted(keys)
    assert {len(group) for group in trainer.groups} == {2}
    assert all(len({item.run.group for item in group}) == 1 for group in trainer.groups)
    names, _, *rows = parquet(tmp_path)
    assert [dict(zip(names, row, strict=True))["run_key"] for row in rows] == keys
    row = result.rows[4]
    expected = {
        "status": "ok", "error": None, "stage": "main", "loss": 1 / 7, "seed": 1, "n_hidden": 1, "lr": 0.2,
        "trained_by": "fake", "device": "cpu",
    }  # fmt: skip
    assert row == {**row, **expected}
    assert isinstance(row["wall_s"], float)
    assert str(row["started_at"]).endswith("+00:00")
    assert result.failed == []


def test_the_environment_says_what_ran_where(tmp_path: Path) -> None:
    run_sweep(spec_preset(SPEC), tmp_path, device="cpu", progress=False, trainer=Fake(), argv=["sweep", "a b.toml"])
    found = RunStore(tmp_path).environment()
    assert found is not None
    assert found["command"] == "moesaic sweep 'a b.toml'"
    assert found["argv"] == ["sweep", "a b.toml"]
    assert found["spec"] == SPEC
    assert found["versions"]["python"] == sys.version.split()[0]  # type: ignore[index]
    assert str(found["started"]) <= str(found["ended"])
    assert {"cpu", "torch_threads", "git_commit", "plan_hash", "preset", "quick", "seeds"} <= found.keys()


def test_a_stage_sees_the_rows_of_the_earlier_ones(tmp_path: Path) -> None:
    seen: list[list[object]] = []

    def stage(seeds: Sequence[int]) -> Stage:
        def plan(rows: list[Row]) -> list[PlannedRun]:
            seen.append([row["seed"] for row in rows])
            return [PlannedRun(p.run, {"part": str(len(rows))}) for p in _planned(seeds)]

        return plan

    preset = Preset("two", "", lambda quick, seeds: [stage([5, 3]), stage([1])])
    result = sweep(tmp_path, spec=preset)
    assert seen[-2:] == [[], [5, 3]]
    assert [(row["seed"], row["part"]) for row in result.rows] == [(5, "0"), (3, "0"), (1, "2")]
    trainer = Fake()
    assert sweep(tmp_path, trainer, spec=preset, resume=True).rows == result.rows
    assert trainer.groups == []


def _planned(seeds: Sequence[int]) -> list[PlannedRun]:
    (stage,) = spec_preset({"seeds": list(seeds)}).stages(False, None)
    return stage([])


def test_only_the_run_at_fault_fails_and_the_sweep_goes_on(tmp_path: Path) -> None:
    def fault(group: Sequence[PlannedRun]) -> None:
        if any(p.run.seed == 2 and p.run.toy.n_hidden == 2 for p in group):
            raise FloatingPointError("the loss\nis gone")

    result = sweep(tmp_path, Fake(fault))
    assert len(result.rows) == 18
    assert [(row["n_hidden"], row["seed"]) for row in result.failed] == [(2, 2), (2, 2)]
    for row in result.failed:
        assert str(row["error"]).startswith("FloatingPointError: the loss is gone (test_sweep.py:")
        assert row["device"] == "cpu"
        assert row["stage"] == "main"
    assert {row["loss"] for row in result.rows if row["status"] == "ok"} == {0.0, 1 / 7, 2 / 7}
    trainer = Fake()
    assert len(sweep(tmp_path, trainer, resume=True).failed) == 2
    assert trainer.groups == []


def test_rows_of_a_trainer_that_mixes_them_up_are_not_believed(tmp_path: Path) -> None:
    class Swapped(Fake):
        def __call__(self, group: Sequence[PlannedRun], **others: Any) -> list[Row]:
            return super().__call__(group, **others)[::-1]

    trainer = Swapped()
    assert sweep(tmp_path, trainer).failed == []
    assert [len(group) for group in trainer.groups] == [2, 1, 1] * 9


def test_ctrl_c_keeps_what_is_done_and_resume_finishes_it(tmp_path: Path) -> None:
    def fault(group: Sequence[PlannedRun]) -> None:
        if len(interrupted.groups) == 4:
            raise KeyboardInterrupt

    interrupted = Fake(fault)
    result = sweep(tmp_path / "a", interrupted)
    assert result.interrupted
    assert len(result.rows) == 6
    assert (RunStore(tmp_path / "a").environment() or {})["ended"] is None
    rest = Fake()
    resumed = sweep(tmp_path / "a", rest, resume=True)
    assert not resumed.interrupted
    assert len(rest.trained) == 12
    assert not set(rest.trained) & {str(row["run_key"]) for row in result.rows}
    sweep(tmp_path / "b")
    assert parquet(tmp_path / "a") == parquet(tmp_path / "b")
    environment = RunStore(tmp_path / "a").environment() or {}
    assert len(environment["resumed"]) == 1  # type: ignore[arg-type]
    assert environment["ended"] is not None


def test_a_half_written_group_is_trained_again_and_completed(tmp_path: Path) -> None:
    sweep(tmp_path / "a")
    path = tmp_path / "a" / "runs.jsonl"
    data = path.read_bytes()
    start = sum(len(line) for line in data.splitlines(keepends=True)[:15])
    path.write_bytes(data[: start + 40])
    trainer = Fake()
    sweep(tmp_path / "a", trainer, resume=True)
    assert [len(group) for group in trainer.groups] == [2, 2]
    sweep(tmp_path / "b")
    assert parquet(tmp_path / "a") == parquet(tmp_path / "b")


def test_a_real_sweep_interrupted_and_resumed_gives_the_same_parquet(tmp_path: Path) -> None:
    from moesaic.bench.sweep import train_and_measure

    spec = {
        "seeds": 2,
        "run": {"steps": 8, "batch_size": 4, "n_features": 6, "n_experts": 2},
        "grid": {"n_hidden": [1, 2]},
    }
    calls = 0

    def interrupted(group: Sequence[PlannedRun], **others: Any) -> list[Row]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return train_and_measure(group, **others)

    preset = spec_preset(spec)
    first = run_sweep(preset, tmp_path / "a", device="cpu", impl="torch", progress=False, trainer=interrupted)
    assert first.interrupted
    resumed = run_sweep(preset, tmp_path / "a", device="cpu", impl="torch", progress=False, resume=True)
    # Other groups on purpose: the bits of a run do not depend on what it was trained with.
    whole = run_sweep(preset, tmp_path / "b", device="cpu", impl="torch", progress=False, max_models=1)
    assert len(resumed.rows) == len(whole.rows) == 4
    assert resumed.failed == []
    assert parquet(tmp_path / "a") == parquet(tmp_path / "b")


def test_a_folder_with_rows_is_refused_without_resume(tmp_path: Path) -> None:
    sweep(tmp_path)
    before = (tmp_path / "runs.jsonl").read_bytes()
    trainer = Fake()
    with pytest.raises(InputError, match=f"--out {tmp_path}.*18 rows.*--resume"):
        sweep(tmp_path, trainer)
    assert trainer.groups == []
    assert (tmp_path / "runs.jsonl").read_bytes() == before


def test_resume_of_another_plan_is_refused_saying_what_differs(tmp_path: Path) -> None:
    sweep(tmp_path)
    trainer = Fake()
    other = {**SPEC, "grid": {"n_hidden": [1, 2, 4], "lr": [0.1, 0.2]}}
    with pytest.raises(InputError, match=r"spec.grid.n_hidden: \[1, 2, 3\] there, \[1, 2, 4\] now"):
        sweep(tmp_path, trainer, spec=other, resume=True)
    with pytest.raises(InputError, match="quick: False there, True now"):
        run_sweep(spec_preset(SPEC), tmp_path, quick=True, device="cpu", resume=True, trainer=trainer)
    with pytest.raises(InputError, match="impl: 'auto' there, 'torch' now"):
        run_sweep(spec_preset(SPEC), tmp_path, impl="torch", device="cpu", resume=True, trainer=trainer)
    with pytest.raises(InputError, match="preset: 'spec' there, 'other' now"):
        sweep(tmp_path, trainer, spec=Preset("other", "", lambda quick, seeds: [lambda rows: []]), resume=True)
    (tmp_path / "environment.json").unlink()
    with pytest.raises(InputError, match=r"no environment\.json"):
        sweep(tmp_path, trainer, resume=True)
    assert trainer.groups == []


def test_resume_by_another_version_is_refused_naming_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesaic.bench.sweep.__version__", "0.0.1")
    sweep(tmp_path)
    monkeypatch.setattr("moesaic.bench.sweep.__version__", "0.0.2")
    trainer = Fake()
    with pytest.raises(InputError, match=r"another plan \(moesaic version: '0.0.1' there, '0.0.2' now\)"):
        sweep(tmp_path, trainer, resume=True)
    assert trainer.groups == []
    monkeypatch.setattr("moesaic.bench.sweep.__version__", "0.0.1")
    assert len(sweep(tmp_path, trainer, resume=True).rows) == 18


def test_a_later_stage_too_large_for_memory_is_refused_before_its_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moesaic.bench.environment.memory_bytes", lambda: 2**30)
    small = PlannedRun(Run(training=TrainConfig(steps=1)))
    large = PlannedRun(Run(training=TrainConfig(steps=1, batch_size=10**9)))

    def stages(quick: bool, seeds: int | None) -> list[Stage]:
        return [lambda rows: [small], lambda rows: [large]]

    trainer = Fake()
    with pytest.raises(InputError, match=r"batch_size = 1000000000.*lower batch_size"):
        sweep(tmp_path, trainer, spec=Preset("staged", "", stages))
    assert trainer.trained == [small.run.key]
    assert len(RunStore(tmp_path).rows()) == 1


def test_a_spec_that_only_changed_its_name_resumes(tmp_path: Path) -> None:
    rows = sweep(tmp_path, spec=spec_preset(SPEC, "one")).rows
    assert sweep(tmp_path, spec=spec_preset(SPEC, "other"), resume=True).rows == rows


def test_resume_of_a_new_folder_starts_it(tmp_path: Path) -> None:
    assert len(sweep(tmp_path / "new" / "deep", resume=True).rows) == 18


def test_an_unwritable_folder_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "a" / "runs.jsonl").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "runs.jsonl").symlink_to(tmp_path / "nowhere" / "runs.jsonl")
    trainer = Fake()
    for out in (tmp_path / "file" / "below", tmp_path / "file", tmp_path / "a", tmp_path / "b"):
        with pytest.raises(InputError, match=f"--out {out}: cannot be written: "):
            sweep(out, trainer)
    assert trainer.groups == []


def test_a_second_sweep_times_nothing_and_starts_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    monkeypatch.setattr("moesaic.bench.rates.calibrate_wall", lambda *a, **b: begun.append("timings"))
    monkeypatch.setattr("moesaic.bench.sweep.start_engine", lambda *a: begun.append("engine"))
    with RunLock(tmp_path) as lock:
        lock.acquire()
        with pytest.raises(InputError, match="another sweep is writing there"):
            sweep(tmp_path, spec=WALL)
    assert begun == []


def test_bad_arguments_are_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="--device 'gpu': must be one of auto, cpu, cuda"):
        run_sweep(spec_preset(SPEC), out, device="gpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match=r"--device cuda: torch .* finds no CUDA device"):
        run_sweep(spec_preset(SPEC), out, device="cuda")
    with pytest.raises(InputError, match="--impl 'jax': must be one of auto, numba, triton, torch"):
        run_sweep(spec_preset(SPEC), out, impl="jax")
    with pytest.raises(InputError, match="seeds = 0: must be an integer >= 1"):
        run_sweep(spec_preset(SPEC), out, seeds=0)
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(InputError, match=r'duckdb not installed: pip install "moesaic\[bench\]"'):
        run_sweep(spec_preset(SPEC), out)
    assert not out.exists()


def test_progress_in_a_log_is_whole_lines_with_rate_eta_and_loss(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def fault(group: Sequence[PlannedRun]) -> None:
        if group[0].run.seed == 0 and len(group) == 1:
            raise ValueError("bad luck")
        if len(group) == 2 and group[0].run.toy.n_hidden == 3:
            raise ValueError("bad luck")

    sweep(tmp_path, Fake(fault), progress=True)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "\r" not in captured.err
    lines = captured.err.splitlines()
    assert all(line.strip() == line != "" for line in lines)
    assert "0.00/72.0" in lines[0]
    failed = [line for line in lines if line.startswith("failed: run ")]
    assert len(failed) == 2
    assert all("ValueError: bad luck" in line for line in failed)
    assert lines[-1].startswith("spec: 100%")
    assert "72.0/72.0" in lines[-1]
    assert "model-steps/s" in lines[-1]
    assert "loss 0.5" in lines[-1]


def test_compiling_happens_before_the_bar_and_outside_its_rate(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, order = FakeClock(), []
    fake = Fake(lambda group: clock.pass_time(11.0))

    def ours(group: Sequence[PlannedRun], **others: Any) -> list[Row]:
        order.append("train")
        return fake(group, **others)

    def compile_it(planned: list[PlannedRun]) -> None:
        order.append("compile")
        clock.pass_time(3600.0)

    ours.__module__ = "moesaic.bench.sweep"
    monkeypatch.setattr("time.time", clock)
    monkeypatch.setattr("tqdm.std.time", clock)
    monkeypatch.setattr("moesaic.bench.sweep.train_and_measure", ours)
    monkeypatch.setattr("moesaic.bench.sweep.compile_cpu_trainer", compile_it)
    run_sweep(spec_preset(SPEC), tmp_path / "a", device="cpu", max_models=2)
    assert order == ["compile", *["train"] * 9]
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "compiling (first time only)"
    assert "0.00/72.0 [00:00<" in lines[1]
    assert "8.00/72.0 [00:11<01:28," in lines[2]
    assert "[01:39<00:00" in lines[-1]
    order.clear()
    run_sweep(spec_preset(SPEC), tmp_path / "a", device="cpu", max_models=2, resume=True)
    run_sweep(spec_preset(SPEC), tmp_path / "b", device="cpu", impl="torch")
    assert "compile" not in order
    assert "compiling" not in capfd.readouterr().err
    plans = [[PlannedRun(Run(training=TrainConfig(steps=1), seed=seed))] for seed in (0, 1)]
    run_sweep(
        Preset("staged", "", lambda quick, seeds: [lambda rows: plans[0], lambda rows: plans[1]]),
        tmp_path / "c",
        device="cpu",
    )
    assert order.count("compile") == 1


def test_a_tiny_run_of_each_kind_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [
        Run(ToyConfig(4, 2, gate=gate), features, TrainConfig(steps=50, batch_size=64, load_balance=balance), seed=seed)
        for gate in ("paper", "switch")
        for features in (
            FeatureConfig(),
            FeatureConfig(feature_probability=0.5),
            FeatureConfig("clustered", n_clusters=2),
        )
        for balance in (0.0, 0.1, 0.2)
        for seed in (0, 1)
    ]
    kinds = list(compiled_alike(map(PlannedRun, runs)).values())
    assert len(kinds) == 2 * 2 * 2
    seen: list[Any] = []

    def train(group: Sequence[PlannedRun], **options: Any) -> list[Row]:
        seen.append((group[0].run, options))
        raise RuntimeError("this run cannot be trained")

    monkeypatch.setattr("moesaic.bench.sweep.train_and_measure", train)
    compile_cpu_trainer(kinds)
    assert [run.toy for run, _ in seen] == [item.run.toy for item in kinds]
    assert {(run.training.steps, run.training.batch_size) for run, _ in seen} == {(1, 4)}
    assert all((options["device"], options["impl"]) == ("cpu", "numba") for _, options in seen)


def test_the_rate_follows_the_groups_that_run_now(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    monkeypatch.setattr("time.time", clock)
    monkeypatch.setattr("tqdm.std.time", clock)
    # 48 runs of 100 steps: the first half takes a second each, the second ten.
    spec = {"seeds": 24, "run": {"steps": 100, "batch_size": 2}, "grid": {"n_hidden": [1, 2]}}
    slow = Fake(lambda group: clock.pass_time(1.0 if group[0].run.toy.n_hidden == 1 else 10.0))
    preset = spec_preset(spec)
    run_sweep(preset, tmp_path, device="cpu", max_models=1, trainer=slow)
    middle = next(line for line in capfd.readouterr().err.splitlines() if " 3.40k/4.80k " in line)
    # 14 runs left at 10 s are 140 s; by the mean since the start (124 s for 34 runs) it would say 51 s.
    assert "<02:" in middle


class FakeClock:
    """A clock that only the trainer moves."""

    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now

    def pass_time(self, seconds: float) -> None:
        self.now += seconds


def test_a_reason_is_one_line_with_its_place() -> None:
    with pytest.raises(ValueError, match="two") as caught:
        raise ValueError("two\nlines")
    assert reason(caught.value).startswith("ValueError: two lines (test_sweep.py:")
    assert reason(ValueError("no place")) == "ValueError: no place"
