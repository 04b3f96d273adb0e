from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from moesaic.bench import evaluation
from moesaic.bench.measure import METRICS, measure
from moesaic.bench.plan import PlannedRun, Row
from moesaic.bench.store import RESULT_COLUMNS
from moesaic.moe import FeatureConfig, Run, ToyConfig, ToyModel, TrainConfig, TrainResult, held_out, importance

TRAINING = TrainConfig(steps=3, batch_size=16)


def stack(runs: Sequence[Run], *, scale: float = 1.0, failed: Sequence[str | None] | None = None) -> TrainResult:
    """Return models with random weights of ordinary size, as if training had ended there."""
    model = ToyModel.from_runs(runs)
    for s, run in enumerate(runs):
        generator = torch.Generator().manual_seed(run.seed)
        for parameter in model.parameters():
            parameter.data[s] = scale * torch.randn(parameter.shape[1:], generator=generator) / 2
    return TrainResult(
        runs=list(runs),
        model=model,
        losses=torch.arange(3.0 * len(runs)).reshape(len(runs), 3),
        load_balance_losses=torch.zeros(len(runs), 3),
        wall_s=8.0,
        impl="torch",
        failed=list(failed or [None] * len(runs)),
    )


def row_of(run: Run) -> Row:
    return measure(stack([run]), [PlannedRun(run)])[0]


def number(row: Row, column: str) -> float:
    value = row[column]
    assert isinstance(value, float | int), column
    return float(value)


def geometry_by_definition(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ‖W_i‖, D_i, score and polysemanticity of one (n, m) weight through the n×n matrix."""
    w = weight.detach().double()
    norm = w.norm(dim=1)
    overlap = ((w / norm[:, None]) @ w.T).square()
    score = overlap.sum(1) - overlap.diagonal()
    return norm, norm.square() / overlap.sum(1), score, score.sqrt() * norm / (1e-5 + norm)


def expected_row(run: Run) -> dict[str, float]:
    """Every metric of the run's random model, input by input and expert by expert."""
    toy, x, model = run.toy, held_out(run), stack([run]).model
    routing = model.route(x)
    weights, ids = routing.weights[0].detach().double(), routing.ids[0]
    n_experts, k = toy.n_experts, toy.top_k
    parameters = dict(model.named_parameters())
    experts = list(parameters["weight"][0])
    gates = torch.zeros(len(x), n_experts, dtype=torch.float64)
    for slot in range(k):
        gates[torch.arange(len(x)), ids[:, slot]] += weights[:, slot]
    active = torch.stack([(ids == e).any(1) for e in range(n_experts)], dim=1)
    if toy.shared_hidden:
        experts.append(parameters["shared_weight"][0])
        gates = torch.cat([gates, torch.ones(len(x), 1)], dim=1)
        active = torch.cat([active, torch.ones(len(x), 1, dtype=torch.bool)], dim=1)

    out = torch.zeros_like(x, dtype=torch.float64)
    biases = [*parameters["bias"][0], *([parameters["shared_bias"][0]] if toy.shared_hidden else [])]
    for e, (weight, bias) in enumerate(zip(experts, biases, strict=True)):
        w = weight.detach().double()
        out += gates[:, e, None] * torch.relu(x.double() @ w @ w.T + bias.detach().double())
    weigh = importance(run.features, toy.n_features).double()
    error = (weigh * (out - x).square()).sum(1).mean()
    variance = (weigh * (x.double() - x.double().mean(0)).square()).sum(1).mean()

    norm, dim, score, poly = (torch.stack(parts) for parts in zip(*map(geometry_by_definition, experts), strict=True))
    mean_gate = gates.sum(0) / active.sum(0).clamp(min=1)
    gain = gates @ norm.square()
    represented = (x != 0) & (gain > 0.5)
    dim_here = (gates @ (norm.square() * dim)) / gain
    score_here = (gates @ (norm.square() * score * mean_gate[:, None])) / gain
    count = active[:, :n_experts].sum(0) / (len(x) * k)
    frobenius = norm.square().sum(1)
    shared = float(frobenius[n_experts]) if toy.shared_hidden else 0.0

    def per_dimension(u: Tensor, counted: int) -> float:
        routed = counted * float((u * frobenius[:n_experts]).sum())
        return (routed + shared) / (counted * toy.n_hidden + toy.shared_hidden)

    in_use = active.any(0)
    return {
        "loss": float(error) / (toy.n_features if run.training.reduction == "mean" else 1),
        "load_balance_loss": run.training.load_balance
        * n_experts
        * float((count * routing.probs[0].detach().double().mean(0)).sum()),
        "unexplained_variance": float(error / variance),
        "features_per_dimension": per_dimension(count, k),
        "features_per_dimension_gate": per_dimension(gates[:, :n_experts].mean(0) / k, k),
        "features_per_dimension_folded": per_dimension(mean_gate[:n_experts] / n_experts, n_experts),
        "mean_dimensionality": float(dim_here[represented].mean()),
        "represented_share": float(represented.sum() / (x != 0).sum()),
        "superposition": float(score_here[represented].mean()),
        "monosemantic_share": float((poly[in_use] < 0.2).double().mean()),
        "dead_features": float((~represented.any(0)).sum()),
        "effective_experts": math.exp(-sum(float(u) * math.log(u) for u in count if u > 0)),
        "dead_experts": float((count == 0).sum()),
        "load_imbalance": float(count.max() * n_experts),
    }


SPARSE = FeatureConfig(feature_probability=0.3, importance="geometric")
RUNS = {
    "dense": Run(ToyConfig(12, 3), SPARSE, TRAINING),
    "paper, k = 1": Run(ToyConfig(12, 3, 4), SPARSE, dataclasses.replace(TRAINING, reduction="sum", load_balance=0.1)),
    "paper, k = 2": Run(ToyConfig(12, 3, 4, 2), SPARSE, TRAINING),
    "switch": Run(ToyConfig(12, 3, 4, 2, gate="switch"), SPARSE, TRAINING),
    "sigmoid and shared": Run(ToyConfig(12, 3, 4, 2, gate="sigmoid", shared_hidden=2), SPARSE, TRAINING),
    "dead experts": Run(ToyConfig(12, 2, 6, 1), FeatureConfig(feature_probability=1.0), TRAINING, seed=3),
}


@pytest.mark.parametrize("case", RUNS)
def test_every_metric_equals_its_definition(case: str) -> None:
    run = RUNS[case]
    row, expected = row_of(run), expected_row(run)
    assert row["status"] == "ok"
    assert row["error"] is None
    got = {name: number(row, name) for name in expected}
    assert got == {name: pytest.approx(value, rel=2e-6, abs=1e-9) for name, value in expected.items()}


def test_the_cases_above_tell_the_variants_apart() -> None:
    row = row_of(RUNS["sigmoid and shared"])
    variants = {number(row, f"features_per_dimension{suffix}") for suffix in ("", "_gate", "_folded")}
    assert len(variants) == 3
    assert 0 < number(row, "represented_share") < 1
    assert number(row_of(RUNS["dead experts"]), "dead_experts") > 0


@pytest.mark.parametrize("case", RUNS)
def test_rows_are_json_with_the_columns_and_types_of_the_run_folder(case: str) -> None:
    run = RUNS[case]
    planned = PlannedRun(run, {"stage": "main", "dataset": "D"})
    row = measure(stack([run]), [planned])[0]
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert set(RESULT_COLUMNS) - set(row) == {"started_at"}
    assert set(METRICS) <= set(RESULT_COLUMNS)
    assert row.items() >= {**run.flat(), "stage": "main", "dataset": "D", "run_key": run.key, "wall_s": 8.0}.items()
    for column, kind in RESULT_COLUMNS.items():
        value = row.get(column)
        python = {"BIGINT": int, "DOUBLE": float, "VARCHAR": str}[kind.removesuffix("[]")]
        for item in value if isinstance(value, list) else [value]:
            assert item is None or type(item) is python, column
    assert row["gpu_board_j"] is row["cpu_package_j"] is None


def test_histogram_counts_the_represented_presences() -> None:
    run = RUNS["paper, k = 2"]
    row = row_of(run)
    counts = row["dimensionality_histogram"]
    assert isinstance(counts, list)
    assert len(counts) == 49
    represented = number(row, "represented_share") * float((held_out(run) != 0).sum())
    assert sum(counts) == pytest.approx(represented, abs=25)
    mean = sum((b + 0.5) / 49 * count for b, count in enumerate(counts)) / sum(counts)
    assert mean == pytest.approx(number(row, "mean_dimensionality"), abs=0.01)


def test_train_loss_is_the_mean_of_the_last_hundred_batches() -> None:
    run = RUNS["dense"]
    result = dataclasses.replace(
        stack([run]), losses=torch.cat([torch.full((1, 50), 9.0), torch.arange(100.0)[None]], 1)
    )
    assert measure(result, [PlannedRun(run)])[0]["train_loss"] == 49.5
    untrained = dataclasses.replace(stack([run]), losses=torch.zeros(1, 0))
    row = measure(untrained, [PlannedRun(run)])[0]
    assert row["train_loss"] is None
    assert row["status"] == "ok"


def test_monosemantic_share_leaves_out_absent_features_and_unused_experts() -> None:
    run = Run(ToyConfig(4, 2, 2), SPARSE, TRAINING)
    result = stack([run], scale=0.0)
    result.model.weight.data[0, 0] = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    result.model.weight.data[0, 1, :2] = torch.eye(2)
    row = measure(result, [PlannedRun(run)])[0]
    assert row["usage"] == [1.0, 0.0]
    assert row["monosemantic_share"] == 1 / 3


def test_a_row_does_not_depend_on_its_stack() -> None:
    runs = [dataclasses.replace(RUNS[case], training=TRAINING) for case in ("paper, k = 2", "switch")]
    runs.append(dataclasses.replace(runs[0], features=FeatureConfig(feature_probability=0.7), seed=5))
    together = measure(stack(runs), [PlannedRun(run) for run in runs])
    assert [row["train_loss"] for row in together] == [1.0, 4.0, 7.0]
    for run, row in zip(runs, together, strict=True):
        alone = row_of(run)
        skip = ("train_loss", "wall_s")  # both are this test's own inputs
        assert {k: v for k, v in row.items() if k not in skip} == {k: v for k, v in alone.items() if k not in skip}
        assert row["wall_s"] == pytest.approx(8.0 / 3)


STACKS = {
    "tiny dense": (ToyConfig(2, 1), 300),
    "tiny": (ToyConfig(3, 2, 3), 300),
    "pairs of features": (ToyConfig(16, 5, 3, 2, shared_hidden=2), 20),
    "Gram matrices": (ToyConfig(20, 4, 2, 1), 12),
    "untied": (ToyConfig(5, 3, 2, 2, shared_hidden=1, tied=False), 6),
}


@pytest.mark.parametrize("case", STACKS)
def test_no_bit_of_a_row_depends_on_its_stack(case: str) -> None:
    toy, count = STACKS[case]
    runs = [
        Run(
            dataclasses.replace(toy, gate=("paper", "switch", "sigmoid")[s % 3]),
            FeatureConfig(feature_probability=(s % 7 + 1) / 7, importance="last", importance_base=1 + s / 10),
            TRAINING,
            seed=s,
        )
        for s in range(count)
    ]
    result = stack(runs)
    # Features that are alone and features that are not, models of great and of small norms.
    result.model.weight.data *= torch.linspace(0, 2, count)[:, None, None, None]
    result.model.weight.data[::2, :, 0, 1:] = 0
    result.model.weight.data[::2, :, 1:, 0] = 0
    together = measure(result, [PlannedRun(run) for run in runs])
    for i in [*range(0, count, max(1, count // 30)), count - 1]:
        alone = dataclasses.replace(
            result, runs=[runs[i]], model=result.model.select(i), losses=result.losses[i : i + 1], failed=[None],
            wall_s=result.wall_s / count,
        )  # fmt: skip
        assert measure(alone, [PlannedRun(runs[i])]) == [together[i]]


def close(value: object) -> object:
    """``value``, floats up to rounding in fp32."""
    if isinstance(value, list):
        return [close(item) for item in value]
    return pytest.approx(value, rel=1e-6, abs=1e-9) if isinstance(value, float) else value


@pytest.mark.parametrize("case", RUNS)
def test_the_twin_and_pytorch_give_one_row(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [dataclasses.replace(RUNS[case], seed=seed) for seed in range(3)]
    twin = measure(stack(runs), [PlannedRun(run) for run in runs])
    monkeypatch.setattr(evaluation, "_TWIN_PRODUCTS", {"cpu": 0})
    rows = measure(stack(runs), [PlannedRun(run) for run in runs])
    for ours, theirs in zip(twin, rows, strict=True):
        assert {name: ours[name] for name in METRICS} == {name: close(theirs[name]) for name in METRICS}
        assert ours.keys() == theirs.keys()


def test_models_of_equal_data_share_their_held_out_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float] = []

    def counted(run: Run, n_samples: int) -> Tensor:
        drawn.append(run.features.feature_probability)
        return held_out(run, n_samples)

    monkeypatch.setattr(evaluation, "held_out", counted)
    runs = [
        Run(ToyConfig(3, 1), FeatureConfig(feature_probability=p, importance="last", importance_base=base), TRAINING)
        for base in (0.5, 1.0, 2.0)
        for p in (0.2, 0.7)
    ]
    whole = measure(stack(runs), [PlannedRun(run) for run in runs])
    assert sorted(drawn) == [0.2, 0.7]
    monkeypatch.setattr(evaluation, "_BATCH_BYTES", 1)  # one batch at a time
    assert measure(stack(runs), [PlannedRun(run) for run in runs]) == whole


def test_an_untied_model_is_measured_without_regard_to_its_hidden_basis() -> None:
    run = Run(ToyConfig(12, 3, 2, shared_hidden=2, tied=False), SPARSE, TRAINING)
    result = stack([run])
    before = measure(result, [PlannedRun(run)])[0]
    parameters = dict(result.model.named_parameters())
    routed, shared = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0], [1.0, 0.0, 1.0]]), torch.tensor([[3.0, 1], [0, 1]])
    for prefix, change in (("", routed), ("shared_", shared)):
        parameters[f"{prefix}weight"].data.copy_(parameters[f"{prefix}weight"].data @ change)
        parameters[f"{prefix}decoder"].data.copy_(parameters[f"{prefix}decoder"].data @ torch.linalg.inv(change).T)
    after = measure(result, [PlannedRun(run)])[0]
    for name in ("loss", "features_per_dimension", "mean_dimensionality", "superposition", "represented_share"):
        assert number(after, name) == pytest.approx(number(before, name), rel=1e-4)


def test_a_tied_and_an_equal_untied_model_have_equal_metrics() -> None:
    tied = Run(ToyConfig(12, 3, 2, shared_hidden=2), SPARSE, TRAINING)
    untied = dataclasses.replace(tied, toy=dataclasses.replace(tied.toy, tied=False))
    results = {run: stack([run]) for run in (tied, untied)}
    weights = dict(results[tied].model.named_parameters())
    for name, parameter in results[untied].model.named_parameters():
        parameter.data = weights[name.replace("shared_decoder", "shared_weight").replace("decoder", "weight")].data
    first, second = (measure(results[run], [PlannedRun(run)])[0] for run in (tied, untied))
    for name in set(METRICS) - {"usage", "dimensionality_histogram"}:
        assert number(second, name) == pytest.approx(number(first, name), rel=1e-6), name


def test_compute_columns_are_per_sample_of_training() -> None:
    row = row_of(RUNS["sigmoid and shared"])
    n, m, n_experts, k, m0 = 12, 3, 4, 2, 2
    routed = 2 * 2 * n * n_experts
    assert row["active_flops"] == 5 * 2 * n * (k * m + m0) + routed
    assert row["dense_flops"] == 5 * 2 * n * (n_experts * m + m0) + routed
    assert row["total_width"] == n_experts * m + m0
    assert row["active_width"] == k * m + m0
    assert row["parameters"] == n * (n_experts * (m + 1) + m0 + 1 + n_experts)
    smaller_batch = dataclasses.replace(TRAINING, batch_size=2)
    moved = row_of(dataclasses.replace(RUNS["sigmoid and shared"], training=smaller_batch))["bytes"]
    assert isinstance(moved, int)
    assert moved > number(row, "bytes") > 0


@pytest.mark.parametrize("impl", ["numba", "torch"])
def test_executed_flops_count_masked_experts_and_padding(impl: str) -> None:
    batch = 100

    def flops_and_usage(run: Run) -> tuple[int, list[float]]:
        row = measure(dataclasses.replace(stack([run]), impl=impl), [PlannedRun(run)])[0]
        assert row["executed_flops"] == row["active_flops"] or impl == "numba"
        usage = row["usage"]
        assert isinstance(usage, list)
        return int(number(row, "executed_flops")), usage

    training = TrainConfig(steps=1, batch_size=batch)
    masked, _ = flops_and_usage(Run(ToyConfig(3, 2, 3), SPARSE, training))
    assert masked == 5 * 2 * 3 * (3 if impl == "numba" else 1) * 2 + 2 * 2 * 3 * 3
    for run in (
        Run(ToyConfig(3, 2, 3), FeatureConfig("clustered", n_clusters=3), training),
        Run(ToyConfig(12, 3, 4, 2, shared_hidden=2), SPARSE, training),
    ):
        toy = run.toy
        grouped, usage = flops_and_usage(run)
        rows = sum(math.ceil(round(share * batch * toy.top_k, 9) / 16) * 16 for share in usage)
        rows = rows if impl == "numba" else batch * toy.top_k
        width = rows * toy.n_hidden + batch * toy.shared_hidden
        assert grouped == round(5 * 2 * toy.n_features * width / batch) + 2 * 2 * toy.n_features * toy.n_experts


def test_a_failed_run_gives_its_reason_and_no_metrics() -> None:
    runs = [RUNS["dense"], dataclasses.replace(RUNS["dense"], seed=1)]
    result = stack(runs, failed=[None, "loss is nan at step 2"])
    for parameter in result.model.parameters():
        parameter.data[1] = math.nan
    good, bad = measure(result, [PlannedRun(run) for run in runs])
    assert (good["status"], good["error"]) == ("ok", None)
    assert (bad["status"], bad["error"]) == ("failed", "loss is nan at step 2")
    assert {bad[name] for name in METRICS} == {None}
    assert bad["seed"] == 1
    assert bad["active_flops"] == good["active_flops"]


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_model_that_the_last_update_broke_is_a_failed_run(value: float) -> None:
    run = RUNS["paper, k = 1"]
    result = stack([run])
    result.model.weight.data[:] = value
    row = measure(result, [PlannedRun(run)])[0]
    assert row["status"] == "failed"
    assert str(row["error"]).startswith("held-out loss is ")
    assert {row[name] for name in METRICS} == {None}


def test_undefined_metrics_are_null() -> None:
    run = RUNS["dense"]
    row = measure(stack([run], scale=0.0), [PlannedRun(run)])[0]
    assert row["status"] == "ok"
    assert row["represented_share"] == row["features_per_dimension"] == 0.0
    assert row["mean_dimensionality"] is row["superposition"] is row["monosemantic_share"] is None
    assert row["dead_features"] == 12


def test_other_runs_than_those_trained_are_refused() -> None:
    run = RUNS["dense"]
    with pytest.raises(ValueError, match=r"planned has 1 runs: takes the 1 runs of result"):
        measure(stack([run]), [PlannedRun(dataclasses.replace(run, seed=1))])
