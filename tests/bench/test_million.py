from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moesaic.bench import measure_large
from moesaic.bench.measure import measure
from moesaic.bench.measure_large import LARGE_METRICS, compute, restricted, sparse_flops, train_and_measure_large
from moesaic.bench.million import ACTIVE, ARCHITECTURES, MILLION, clean, planned
from moesaic.bench.plan import InputError, PlannedRun, Row, check_memory, is_large, training_groups, unique
from moesaic.bench.sweep import compiled_alike, run_sweep
from moesaic.kernels.feature_training import FeatureState
from moesaic.metrics import count_flops
from moesaic.moe import Run, ToyModel, TrainResult, evaluate_large, feature_probabilities
from moesaic.moe.large import held_out_sparse

TINY = 300


def silent(steps: int, loss: float) -> None:
    pass


def tiny(architecture: int = 1, *, decode: str = "exact", steps: int = 30, **more: object) -> PlannedRun:
    """A run of the plan's kind on 300 features."""
    (item,) = planned({TINY: 1}, steps, architectures=ARCHITECTURES[architecture : architecture + 1])
    values = {**item.run.flat(), "feature_probability": 4 / TINY, "n_negatives": 100 if decode == "sampled" else 0}
    run = Run.from_flat({**values, "decode": decode, **more})
    return PlannedRun(run, item.labels)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def row() -> Row:
    return train_and_measure_large(tiny(), device="cpu", progress=silent)


@pytest.mark.parametrize("quick", [False, True])
def test_the_plan_spans_the_sizes_and_equals_what_it_says(quick: bool) -> None:
    (main,) = MILLION.stages(quick, None)
    plan = main([])
    assert unique(plan) == plan
    sizes = Counter(item.run.toy.n_features for item in plan)
    assert (min(sizes), max(sizes)) == (1000, 100_000 if quick else 1_000_000)
    assert [count for _, count in sorted(sizes.items())] == ([3, 3, 3] if quick else [6, 6, 6, 6, 6, 3, 3])
    for item in plan:
        p = feature_probabilities(item.run.features, item.run.toy.n_features).double()
        assert float(p.sum()) == pytest.approx(ACTIVE, rel=1e-4)
        assert float(p.max()) <= 1
        assert item.run.training.decode == "exact"
    dense, width, flops = (item.toy(1000) for item in ARCHITECTURES)
    assert width.n_experts * width.n_hidden == dense.n_hidden
    assert flops.top_k * flops.n_hidden == dense.n_hidden
    encode = [count_flops(toy, active_features=ACTIVE).training.active for toy in (dense, flops)]
    assert encode[0].decode == encode[1].decode
    assert encode[1].sparse_router == 4 * ACTIVE * 4
    assert count_flops(flops).training.active.total == 1.025 * (count_flops(dense).training.active.total or 0)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_metrics_are_those_of_the_dense_path(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights and samples, measured by `moesaic.bench.measure`."""
    item = tiny(2, parametrization="large_n", gate="switch")  # unit rows, of which some stay represented
    held: list[FeatureState] = []
    evaluate = evaluate_large

    def keep(run: Run, state: FeatureState, *, n_samples: int) -> object:
        held.append(state)
        return evaluate(run, state, n_samples=n_samples)

    monkeypatch.setattr(measure_large, "evaluate_large", keep)
    monkeypatch.setattr(measure_large, "HELD_OUT", 8192)
    large = train_and_measure_large(item, device="cpu", progress=silent)
    model = ToyModel.from_runs([item.run])
    views = held[-1].shape.named(held[-1].table)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(views[name][None])
    x = held_out_sparse(item.run, 8192).to_dense()
    monkeypatch.setattr("moesaic.bench.evaluation.held_out", lambda run, n: x)
    nothing = torch.zeros(1, item.run.training.steps)
    result = TrainResult(
        model=model, runs=[item.run], losses=nothing, load_balance_losses=nothing, failed=[None], wall_s=0.0,
        impl="torch",
    )  # fmt: skip
    (dense,) = measure(result, [item])
    for name in (
        "loss", "unexplained_variance", "features_per_dimension", "features_per_dimension_gate",
        "features_per_dimension_folded", "mean_dimensionality", "represented_share", "superposition",
        "monosemantic_share", "dead_features", "usage", "effective_experts", "load_imbalance",
    ):  # fmt: skip
        assert dense[name] is not None, name
        assert large[name] == pytest.approx(dense[name], rel=1e-4), name
    assert {name for name in dense if name not in large} == set()
    assert set(LARGE_METRICS) <= set(large)


def test_a_row_is_whole_and_training_helped(row: Row) -> None:
    assert (row["status"], row["trained_by"], row["device"]) == ("ok", "stripes", "cpu")
    numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
    assert numbers["loss"] < numbers["untrained_loss"]
    assert numbers["unexplained_variance"] < numbers["untrained_unexplained_variance"]
    assert numbers["step_s"] > 0
    assert numbers["exact_step_s"] > 0
    assert 0 <= numbers["n_restricted"] <= numbers["n_frequent"] <= TINY


def test_timing_exact_steps_changes_nothing_and_sampled_rows_say_so() -> None:
    item = tiny(0, decode="sampled", steps=3)
    found = train_and_measure_large(item, device="cpu", progress=silent)
    assert (found["status"], found["trained_by"]) == ("ok", "sampled")
    again = train_and_measure_large(item, device="cpu", progress=silent)
    assert found["loss"] == again["loss"]


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
def test_a_diverged_run_is_a_failed_row() -> None:
    found = train_and_measure_large(tiny(0, lr=1e30, steps=4), device="cpu", progress=silent)
    assert found["status"] == "failed"
    assert found["error"]
    assert found["loss"] is found["n_restricted"] is None


def test_restriction_wants_enough_activations_and_a_small_error() -> None:
    run = tiny(0, steps=2000).run
    expected = 2000 * 256 * feature_probabilities(run.features, TINY).double()
    ones = torch.ones(TINY, dtype=torch.float64)
    half = torch.where(torch.arange(TINY) % 2 == 0, 0.49, 0.51).double()
    held = type("Held", (), {"squared_error": half, "variance": ones})()
    learned, frequent = restricted(run, held)
    assert torch.equal(frequent, expected >= 1000)
    assert torch.equal(learned, frequent & (torch.arange(TINY) % 2 == 0))
    few, _ = restricted(replace(run, training=replace(run.training, steps=1)), held)
    assert not few.any()


def test_compute_is_counted_by_hand() -> None:
    (item,) = planned({100_000: 1}, 10, architectures=ARCHITECTURES[:1])
    run, n = item.run, 100_000
    assert sparse_flops(run, "exact") == compute(run)["sparse_flops"] == 6 * 64 * n + 4 * 8 * 64
    assert sparse_flops(run, "sampled") == 6 * 64 * (4096 + 8) + 4 * 8 * 64
    sampled = compute(replace(run, training=replace(run.training, decode="sampled", n_negatives=4096)))
    assert sampled["executed_flops"] == sampled["sparse_flops"] == sparse_flops(run, "sampled")
    exact = compute(tiny(1).run)
    assert isinstance(exact["bytes"], int)
    assert exact["bytes"] >= 24 * TINY * 96 / 256


def test_large_runs_are_known_counted_and_grouped_alone() -> None:
    small, large = tiny(0).run, planned({1_000_000: 2}, 10, architectures=ARCHITECTURES[2:])
    assert not is_large(small)
    assert is_large(tiny(0, decode="sampled").run)
    assert is_large(large[0].run)
    assert compiled_alike(large) == {}
    assert [len(group) for group in training_groups(large)] == [1, 1]
    check_memory(large, 2**33)
    with pytest.raises(
        InputError, match=r"needs about \d+ bytes .*available are 2147483648 .*lower n_features"
    ) as said:
        check_memory(large, 2**31)
    assert "n_features = 1000000" in str(said.value)


def test_the_sweep_resumes_and_removes_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = [tiny(0, steps=2), tiny(0, steps=2, seed=1)]
    preset = replace(MILLION, stages=lambda quick, seeds: [lambda rows: plan])
    asked: list[Path | None] = []

    def fake(item: PlannedRun, *, device: str, progress: Callable[[int, float], None], checkpoint: Path | None) -> Row:
        asked.append(checkpoint)
        if checkpoint is not None:
            checkpoint.parent.mkdir(exist_ok=True)
            checkpoint.write_text("state")
        if len(asked) == 2:
            raise KeyboardInterrupt
        return {"run_key": item.run.key, "untrained_features_per_dimension": 1.0}

    monkeypatch.setattr("moesaic.bench.million.CHECKPOINT_EVERY", 1)
    monkeypatch.setattr(measure_large, "train_and_measure_large", fake)
    first = run_sweep(preset, tmp_path, device="cpu", progress=False)
    assert first.interrupted
    second_file = tmp_path / "checkpoints" / f"{plan[1].run.key}.safetensors"
    assert [path.name for path in second_file.parent.iterdir()] == [second_file.name]
    rows = run_sweep(preset, tmp_path, device="cpu", progress=False, resume=True).rows
    assert asked == [second_file.with_name(f"{plan[0].run.key}.safetensors"), second_file, second_file]
    assert [r["run_key"] for r in rows] == [item.run.key for item in plan]
    assert not second_file.parent.exists()


def test_cleaning_leaves_other_files(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.safetensors").write_text("")
    clean(tmp_path, [{"run_key": "a"}])
    assert [path.name for path in folder.iterdir()] == ["b.safetensors"]
