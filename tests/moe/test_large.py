"""Training of one toy model with very many features: its data, checkpoints, refusals and evaluation."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.bench.memory import peak_bytes
from moesaic.kernels.feature_step import feature_step, scratch_bytes
from moesaic.moe import FeatureConfig, Run, ToyConfig, ToyModel, TrainConfig, evaluate_large, large, train_large
from moesaic.moe.checkpoint import load_checkpoint
from moesaic.moe.large import large_shape, required_bytes, settings, sparse_batch, untrained_large
from moesaic.moe.large_evaluation import feature_variance

pytestmark = pytest.mark.filterwarnings("ignore:Sparse")

N = 3000
TOY = ToyConfig(
    n_features=N, n_hidden=4, n_experts=4, top_k=2, shared_hidden=3, gate="switch", parametrization="large_n"
)
DATA = FeatureConfig("power_law", 6 / N)
TRAINING = TrainConfig(
    steps=24, batch_size=32, lr=2e-2, schedule="cosine", reduction="sum", eps=1e-15, load_balance=0.01
)
EXACT = Run(TOY, DATA, TRAINING, seed=3)
SAMPLED = dataclasses.replace(EXACT, training=dataclasses.replace(TRAINING, decode="sampled", n_negatives=200))
RUNS = {"exact": EXACT, "sampled": SAMPLED}


def as_toy_model(run: Run, parameters: dict[str, Tensor]) -> ToyModel:
    model = ToyModel(run.toy)
    with torch.no_grad():
        for name, value in parameters.items():
            getattr(model, name).copy_(value.unsqueeze(0))
    return model


def test_initial_values_are_those_of_the_toy_model() -> None:
    for toy in (TOY, dataclasses.replace(TOY, tied=False, router_init="k_hot")):
        run = dataclasses.replace(EXACT, toy=toy)
        named = large_shape(toy).named(untrained_large(run).table)
        model = ToyModel.from_runs([run])
        assert named.keys() == dict(model.named_parameters()).keys()
        assert all(torch.equal(value, getattr(model, name)[0]) for name, value in named.items())


@pytest.mark.parametrize("name", RUNS)
def test_training_learns_and_resumes_bit_for_bit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, seen = RUNS[name], list[int]()
    whole = train_large(run, progress=lambda steps, loss: seen.append(steps))
    assert whole.failed is None
    assert sum(seen) == 24
    before, after = (evaluate_large(run, state, n_samples=64) for state in (untrained_large(run), whole.state))
    assert after.loss < 0.8 * before.loss

    path, calls = tmp_path / "model.safetensors", 0

    def stops(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls > 17:
            raise KeyboardInterrupt
        return feature_step(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(large, "feature_step", stops)
    with pytest.raises(KeyboardInterrupt):
        train_large(run, checkpoint=path, checkpoint_every=5)
    monkeypatch.undo()
    assert load_checkpoint(path)[1]["step"] == "15"
    resumed = train_large(run, checkpoint=path, checkpoint_every=5)
    assert torch.equal(resumed.state.table, whole.state.table)
    assert torch.equal(resumed.losses, whole.losses)
    assert resumed.step_s[:15].isnan().all()
    again = train_large(run, checkpoint=path)
    assert torch.equal(again.state.table, whole.state.table)


def test_bits_do_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    from moesaic.kernels import encode_cpu, stripes_cpu

    two = [train_large(run).state.table for run in RUNS.values()]
    for twin in (encode_cpu, stripes_cpu):
        monkeypatch.setattr(twin, "get_num_threads", lambda: 1)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = [train_large(run).state.table for run in RUNS.values()]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


def test_a_kill_in_mid_write_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """A process that only saves is killed at odd moments; what lies there loads every time."""
    path = tmp_path / "model.safetensors"
    program = (
        "import sys; from pathlib import Path; import torch\n"
        "from moesaic.moe.checkpoint import save_checkpoint\n"
        "table = torch.zeros(300_000, 16)\n"
        "for step in range(10_000):\n"
        "    table.fill_(step); save_checkpoint(Path(sys.argv[1]), {'table': table}, {'step': str(step)})\n"
    )
    for extra in (0.0, 0.021):
        process = subprocess.Popen([sys.executable, "-c", program, str(path)])
        first = path.stat().st_mtime_ns if path.exists() else 0
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and (not path.exists() or path.stat().st_mtime_ns == first):
            time.sleep(0.005)
        time.sleep(0.05 + extra)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        tensors, metadata = load_checkpoint(path)
        assert bool((tensors["table"] == float(metadata["step"])).all())


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    short = dataclasses.replace(EXACT, training=dataclasses.replace(TRAINING, steps=1))
    train_large(short, checkpoint=path)
    with pytest.raises(ValueError, match="holds another run"):
        train_large(EXACT, checkpoint=path)


@pytest.mark.parametrize("name", RUNS)
def test_evaluation_equals_the_dense_model(name: str) -> None:
    run = RUNS[name]
    result = train_large(run)
    held = evaluate_large(run, result.state, n_samples=150, batch=64, stripe=700)
    x = large.held_out_sparse(run, 150).to_dense().double()
    model = as_toy_model(run, result.named()).double()
    routing = model.route(x.unsqueeze(0))
    with torch.no_grad():
        squares = (model.reconstruct(x.unsqueeze(0), routing)[0] - x).square().mean(0)
    torch.testing.assert_close(held.squared_error, squares, rtol=1e-4, atol=1e-7)
    assert held.loss == pytest.approx(float(squares.sum()), rel=1e-5)
    torch.testing.assert_close(held.variance, x.var(0, correction=0), rtol=1e-4, atol=1e-7)
    assert torch.equal(held.present, (x > 0).sum(0).double())
    usage = torch.bincount(routing.ids.flatten(), minlength=4) / 300
    torch.testing.assert_close(held.usage, usage.double())
    gates = torch.zeros(4).double().index_add_(0, routing.ids.flatten(), routing.weights.detach().flatten().double())
    torch.testing.assert_close(held.gate_sums, gates, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "data",
    [
        DATA,
        FeatureConfig("clustered", 0.01, n_clusters=10),
        FeatureConfig("exactly_k", n_active=5),
        FeatureConfig("correlated", 0.002, group_size=4),
        FeatureConfig("anticorrelated", 0.002, group_size=4),
    ],
    ids=lambda data: data.features,
)
def test_every_kind_of_data_trains_and_its_variance_is_known(data: FeatureConfig) -> None:
    run = dataclasses.replace(EXACT, features=data, training=dataclasses.replace(TRAINING, steps=2))
    assert train_large(run).failed is None
    x = sparse_batch(run, 0, 20_000)
    assert float(feature_variance(run).sum()) == pytest.approx(
        float(x.values().square().sum() / 20_000 - (x.to_dense().mean(0).square()).sum()), rel=0.05
    )
    assert x.values().shape[0] / 20_000 == pytest.approx(large.expected_active(run), rel=0.03)


def test_dense_data_are_drawn_one_by_one_with_a_warning() -> None:
    toy = dataclasses.replace(TOY, n_features=60)
    run = Run(toy, FeatureConfig(feature_probability=0.3), dataclasses.replace(TRAINING, steps=3))
    with pytest.warns(UserWarning, match=r"0.3 of the features are present in a sample, more than 0.007"):
        result = train_large(run)
    assert result.failed is None
    assert evaluate_large(run, result.state, n_samples=64).loss > 0


def test_refusals_come_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(**training: Any) -> Run:
        return dataclasses.replace(EXACT, training=dataclasses.replace(TRAINING, **training))

    monkeypatch.setattr(large, "available_bytes", lambda device: 24 * 2**30)
    huge = Run(dataclasses.replace(TOY, n_features=10**6, n_hidden=4096), FeatureConfig(feature_probability=1e-4))
    needed = sum(required_bytes(huge).values())
    with pytest.raises(ValueError, match=rf"need about {needed} bytes .* lower n_features, n_experts or n_hidden"):
        train_large(huge)
    with pytest.raises(ValueError, match=r"lower batch_size, top_k or n_negatives"):
        train_large(changed(batch_size=2**24))
    with pytest.raises(ValueError, match=r"feature_probability=0.0002: gives 0.6 features per sample"):
        train_large(dataclasses.replace(EXACT, features=FeatureConfig("independent", 2e-4)))
    with pytest.raises(ValueError, match=r"n_negatives=3001: takes 1 to n_features=3000"):
        train_large(changed(decode="sampled", n_negatives=3001))
    with pytest.raises(ValueError, match=r"precision='tf32x3': takes a CUDA device"):
        train_large(changed(precision="tf32x3"))
    with pytest.raises(ValueError, match=r"checkpoint_every=0"):
        train_large(EXACT, checkpoint_every=0)
    with pytest.raises(ValueError, match=r"device='tpu'"):
        train_large(EXACT, device="tpu")


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"moments": "bf16"}], ids=["products", "moments"])
def test_bfloat16_learns_alike_and_differs(changes: dict[str, Any]) -> None:
    run = dataclasses.replace(EXACT, training=dataclasses.replace(TRAINING, **changes))
    plain, rounded = train_large(EXACT), train_large(run)
    assert not torch.equal(plain.state.table, rounded.state.table)
    torch.testing.assert_close(rounded.losses, plain.losses, rtol=0.02, atol=0.0)


def test_the_second_moment_does_not_stall_in_bfloat16() -> None:
    """Rounded to nearest, v would stop at 2⁻⁸ of its increments; drawn, its mean follows float32's."""
    training = dataclasses.replace(TRAINING, steps=60, beta2=0.999, lr=0.0)
    runs = [dataclasses.replace(EXACT, training=dataclasses.replace(training, moments=m)) for m in ("fp32", "bf16")]
    wide, narrow = (train_large(run).state.exp_avg_sq.double().mean() for run in runs)
    assert float(narrow / wide) == pytest.approx(1.0, abs=0.01)


def test_memory_of_an_exact_step_is_within_its_formula() -> None:
    toy = ToyConfig(n_features=400_000, n_hidden=8, parametrization="large_n")
    run = Run(toy, FeatureConfig("independent", 1e-4), TrainConfig(steps=8, batch_size=64, reduction="sum"))
    state, training, x = untrained_large(run), settings(run), sparse_batch(run, 0)
    peak = peak_bytes(lambda: feature_step(state, x, training), "cpu")
    if peak is None:
        pytest.skip("this system does not say how much memory a process holds")
    bound = scratch_bytes(state.shape, 64, x.values().shape[0])
    assert peak < bound < 64 * 400_000 * 4 / 5  # a fifth of B × n numbers
