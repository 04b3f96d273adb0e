from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moesaic.bench import rates
from moesaic.bench.engines import EngineChoice
from moesaic.bench.plan import InputError, check_memory, plan_digest, training_groups, unique
from moesaic.bench.plan_summary import PlanSummary, summarize
from moesaic.bench.presets import PRESETS
from moesaic.bench.spec import planned_runs, spec_preset
from moesaic.bench.store import RunStore
from moesaic.metrics import count_flops
from moesaic.moe.config import FeatureConfig, Run, ToyConfig

SPEC: dict[str, Any] = {
    "seeds": 70,
    "run": {"n_features": 8, "steps": 50, "batch_size": 4},
    "grid": {"n_experts": [1, 4]},
}


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A cache of its own, a machine without load, a known memory, and a clock that counts what it was asked."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr("moesaic.bench.environment.memory_bytes", lambda: 2**34)
    return []


def clocked(asked: list[int]) -> rates.StepSeconds:
    def measure(stacks: Any, device: str, impl: str) -> dict[Any, float]:
        asked.extend(map(len, stacks.values()))
        return {name: 0.25 * runs[0].toy.n_experts for name, runs in stacks.items()}

    return measure


def plan(spec: dict[str, Any] = SPEC, **options: Any) -> PlanSummary:
    return summarize(spec_preset(spec), device="cpu", **options)


def test_a_plan_counts_runs_stacks_flops_and_bytes() -> None:
    found = plan()
    record = found.record()
    assert (record["runs"], record["stacks"]) == (140, 4)
    assert [(k.stacks, k.models, k.steps) for k in found.kinds] == [(1, 64, 50), (1, 64, 50), (1, 6, 50), (1, 6, 50)]
    flops = [count_flops(ToyConfig(8, 2, e)).training.active.total or 0 for e in (1, 4)]
    assert record["flops"] == sum(flops) * 70 * 50 * 4
    one, most = (max(k.memory_bytes for k in found.kinds if k.models == m) for m in (6, 64))
    assert one < most < 64 / 6 * one
    assert json.loads(json.dumps(record)) == record


def test_seconds_are_measured_or_unknown_and_never_scaled() -> None:
    asked: list[int] = []
    before = plan()
    assert (before.seconds, before.record()["kinds_not_measured"]) == (None, 4)
    assert "not measured; --calibrate" in before.text()
    found = plan(calibrate_rates=True, measure=clocked(asked))
    assert sorted(asked) == [6, 6, 64, 64]
    assert found.seconds == 2 * 50 * 0.25 * (1 + 4)
    assert "2 min of training, at rates measured until 20" in found.text()
    # The rates are kept: for this shape at other steps, for no other shape.
    again = plan({**SPEC, "run": {**SPEC["run"], "steps": 100}})
    assert again.seconds == 250.0
    other = plan({**SPEC, "grid": {"n_experts": [1, 2]}})
    assert (other.seconds, other.record()["measured_seconds"]) == (None, 2 * 50 * 0.25)
    assert "2 kinds of stacks" in other.text()
    assert plan(calibrate_rates=True, measure=clocked([])).seconds == found.seconds
    assert len(asked) == 4


def test_rates_of_a_busy_machine_or_of_another_version_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 0.0, 0.0))
    assert plan(calibrate_rates=True, measure=clocked([]), say=said.append).seconds is not None
    assert "the machine was busy" in said[-1]
    assert plan().seconds is None
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    plan(calibrate_rates=True, measure=clocked([]))
    assert plan().seconds is not None
    monkeypatch.setattr(
        "moesaic.bench.environment.versions", lambda: dict.fromkeys(("moesaic", "torch", "numba", "triton"))
    )
    assert plan().seconds is None


def test_a_calibration_stops_when_its_time_is_over_and_damaged_rates_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "CALIBRATE_S", -1.0)
    said: list[str] = []
    found = plan(calibrate_rates=True, measure=clocked([]), say=said.append)
    assert found.record()["kinds_not_measured"] == 4
    assert "4 kinds of stacks are not measured" in said[0]
    rates.rates_file("cpu").write_text('{"a": 3}')
    assert rates.kept_rates("cpu") == {}


def test_what_does_not_fit_is_said_and_not_measured() -> None:
    asked: list[int] = []
    spec = {**SPEC, "grid": {"n_experts": [1], "n_hidden": [2, 2**28]}}
    found = plan(spec, calibrate_rates=True, measure=clocked(asked))
    assert [(one.architecture, one.runs) for one in found.too_large] == [(f"dense m={2**28}, n=8, batch 4", 70)]
    assert "70 runs do not fit into memory" in found.text()
    assert sorted(asked) == [6, 64]


def test_later_stages_and_walls_are_said() -> None:
    found = summarize(PRESETS["tradeoff"], quick=True, device="cpu")
    tune, main = PRESETS["tradeoff"].stages(True, None)
    assert (found.runs, found.later_stages) == (len(tune([])) + len(main([])), 1)
    assert "1 later stages follow" in found.text()
    wall = plan({**SPEC, "match": {"to": ["wall"]}})
    assert "dense runs of match 'wall' are not counted" in wall.text()
    with pytest.raises(InputError, match="must be one of"):
        summarize(PRESETS["tradeoff"], device="gpu")


def test_workers_share_the_memory_and_finished_runs_are_counted(tmp_path: Path) -> None:
    planned = planned_runs(SPEC)
    RunStore(tmp_path).append({"run_key": item.run.key} for item in planned[:3])
    found = summarize(spec_preset(SPEC), device="cpu", impl="torch", engine=EngineChoice(workers=4), out=tmp_path)
    assert (found.available_bytes, found.workers, found.finished, found.runs) == (2**32, 4, 3, len(planned))
    assert "of 4.00 GiB for each of 4 workers" in found.text()
    assert "3 of the runs are in the folder already" in found.text()
    assert found.record()["finished"] == 3
    alone = summarize(spec_preset(SPEC), device="cpu", impl="torch", out=tmp_path / "new")
    assert (alone.available_bytes, alone.finished) == (2**34, 0)
    assert not (tmp_path / "new").exists()
    ray = summarize(spec_preset(SPEC), device="cpu", impl="torch", engine=EngineChoice(name="ray"))
    assert "a cluster's nodes are asked when the sweep begins" in ray.text()


def test_steps_are_timed_by_training_the_stack_for_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def train(runs: Sequence[Run], **options: str) -> SimpleNamespace:
        assert options == {"device": "cpu", "impl": "numba"}
        asked.append((len(runs), runs[0].training.steps))
        return SimpleNamespace(wall_s=0.001 * len(runs) * runs[0].training.steps)

    monkeypatch.setattr("moesaic.moe.train_runs", train)
    monkeypatch.setattr("moesaic.moe.train_large", lambda run, device: SimpleNamespace(wall_s=0.5 * run.training.steps))
    runs = [p.run for p in planned_runs({**SPEC, "seeds": 2, "grid": {}})]
    large = Run(ToyConfig(20_000, 2), FeatureConfig(feature_probability=0.001))
    found = rates.step_seconds({"a": runs, "b": runs[:1], "large": [large]}, "cpu", "numba")
    assert [round(found[name], 9) for name in ("a", "b", "large")] == [0.002, 0.001, 0.5]
    assert asked[0] == (2, 1)
    assert max(steps for count, steps in asked if count == 2) * 0.002 >= rates.LEAST_S


def test_a_hundred_thousand_runs_are_planned_in_seconds() -> None:
    spec = {
        "seeds": 10, "run": {"n_features": 64, "steps": 100}, "where": ["top_k <= n_experts"],
        "grid": {"n_experts": [1, 4], "n_hidden": [2, 4, 8], "lr": {"log": [1e-4, 1e-1], "n": 20},
                 "feature_probability": {"log": [0.01, 1.0], "n": 16}},
    }  # fmt: skip
    start = time.process_time()
    planned = unique(planned_runs(spec))
    check_memory(planned, 2**34)
    training_groups(planned)
    plan_digest(planned)
    taken = time.process_time() - start
    assert len(planned) == 19_200
    # 5 s for 100,000; the factor is for machines that do other things.
    assert taken < 3 * 5 * len(planned) / 100_000
