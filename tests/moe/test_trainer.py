from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from moesaic.moe import FeatureConfig, Run, ToyConfig, TrainConfig, TrainStep, train, train_runs, trainer
from moesaic.moe.config import GATES
from moesaic.moe.trainer import _Trainer

SHAPES = [
    ToyConfig(20, 3),
    ToyConfig(16, 3, 4, 1),
    ToyConfig(12, 2, 3, 2, shared_hidden=2),
    ToyConfig(12, 2, 3, 3, tied=False),
    ToyConfig(24, 4, 8, 2),
    # Small enough for the CPU's unrolled step.
    ToyConfig(3, 2, 2),
]
FAST = TrainConfig(steps=200, batch_size=64, lr=3e-3, schedule="cosine", reduction="sum", load_balance=0.01)


def disagreement(shape: ToyConfig, changed: TrainConfig = FAST) -> dict[str, float]:
    """Train a stack of all gates, thin and dense data both ways, and say how far the two ways are apart."""
    configs = [dataclasses.replace(shape, gate=gate, parametrization="tms") for gate in GATES]
    data = [FeatureConfig(feature_probability=p) for p in (0.2, 0.6)]
    ours, theirs = (
        train_runs([Run(c, d, training, seed) for seed, d in enumerate(data) for c in configs], impl=impl)
        for impl, training in (("numba", FAST), ("torch", changed))
    )
    assert (ours.impl, theirs.impl) == ("numba", "torch")
    losses = (ours.losses - theirs.losses).abs() / theirs.losses.mean()
    balances = (ours.load_balance_losses - theirs.load_balance_losses).abs()
    pairs = zip(ours.model.parameters(), theirs.model.parameters(), strict=True)
    weights = torch.cat([(a - b).detach().abs().flatten() for a, b in pairs])
    return {
        "typical loss": float(losses.median()),
        "worst loss": float(losses.max()),
        "worst balance": float(balances.max()),
        "typical weight": float(weights.quantile(0.9)),
        "worst weight": float(weights.max()),
    }


# Two fp32 trajectories stay at rounding distance until a sample falls on the two sides of a ReLU's kink, which one in
# some twenty models meets within 200 steps; hence a tight bound on what is typical, and a wide one (a few steps of
# Adam) on the worst.
ALLOWED = {
    "typical loss": 2e-6,
    "worst loss": 5e-3,
    "worst balance": 1e-4,
    "typical weight": 1e-5,
    "worst weight": 2e-2,
}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda c: f"{c.n_features}-{c.n_hidden}-{c.n_experts}-{c.top_k}")
def test_numba_and_torch_agree_over_200_steps(shape: ToyConfig) -> None:
    assert {name: value for name, value in disagreement(shape).items() if not value < ALLOWED[name]} == {}


@pytest.mark.parametrize(
    "change", [{"weight_decay": 0.0}, {"beta2": 0.998}, {"load_balance": 0.0}, {"schedule": "linear"}]
)
def test_the_agreement_can_fail(change: dict[str, Any]) -> None:
    found = disagreement(SHAPES[1], dataclasses.replace(FAST, **change))
    assert found["typical weight"] > 10 * ALLOWED["typical weight"]


@pytest.mark.parametrize("impl", ["numba", "torch"])
def test_training_learns_and_repeats_bit_for_bit(impl: str) -> None:
    training = dataclasses.replace(FAST, steps=300, lr=1e-2)
    first = train(ToyConfig(12, 4, parametrization="tms"), training=training, seeds=(0, 1), impl=impl)
    again = train(ToyConfig(12, 4, parametrization="tms"), training=training, seeds=(0, 1), impl=impl)
    assert torch.equal(first.losses, again.losses)
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    assert bool((first.losses[:, -50:].mean(1) < 0.6 * first.losses[:, :10].mean(1)).all())
    assert not torch.equal(first.losses[0], first.losses[1])


@pytest.mark.parametrize("impl", ["numba", "torch"])
def test_resumes_from_a_checkpoint_bit_for_bit(impl: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [Run(SHAPES[2], training=dataclasses.replace(FAST, steps=40), seed=seed) for seed in range(2)]
    whole = train_runs(runs, impl=impl)
    advance = _Trainer.advance

    def dies(self: _Trainer, n_steps: int) -> float:
        if self.step >= 25:
            raise KeyboardInterrupt
        return advance(self, n_steps)

    file = tmp_path / "run.safetensors"
    monkeypatch.setattr(_Trainer, "advance", dies)
    with pytest.raises(KeyboardInterrupt):
        train_runs(runs, impl=impl, checkpoint=file, checkpoint_every=10)
    monkeypatch.setattr(_Trainer, "advance", advance)
    steps: list[int] = []
    resumed = train_runs(
        runs, impl=impl, checkpoint=file, checkpoint_every=10, callback=lambda step: steps.append(step.step)
    )
    assert steps[0] in (20, 30)
    assert torch.equal(resumed.losses, whole.losses)
    assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True))
    other = "torch" if impl == "numba" else "numba"
    with pytest.raises(ValueError, match="impl="):
        train_runs(runs, impl=other, checkpoint=file)
    with pytest.raises(ValueError, match="holds other runs"):
        train_runs(runs[:1], impl=impl, checkpoint=file)


def test_a_torn_checkpoint_is_refused_and_none_is_left_behind(tmp_path: Path) -> None:
    file = tmp_path / "run.safetensors"
    runs = [Run(training=dataclasses.replace(FAST, steps=3))]
    train_runs(runs, checkpoint=file)
    assert [path.name for path in tmp_path.iterdir()] == ["run.safetensors"]
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        train_runs(runs, checkpoint=file)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        train_runs(runs, checkpoint=tmp_path)


def test_callback_sees_every_step_and_the_models_of_then() -> None:
    runs = [Run(SHAPES[0], training=dataclasses.replace(FAST, steps=5))]
    seen: list[tuple[int, float, torch.Tensor]] = []

    def look(step: TrainStep) -> None:
        seen.append((step.step, float(step.losses[0]), step.model.weight.detach().clone()))

    result = train_runs(runs, callback=look)
    assert [step for step, _, _ in seen] == [0, 1, 2, 3, 4]
    assert [loss for _, loss, _ in seen] == result.losses[0].tolist()
    assert torch.equal(seen[-1][2], result.model.weight)
    assert not torch.equal(seen[0][2], seen[1][2])
    plain = train_runs(runs)
    assert torch.equal(plain.model.weight, result.model.weight)


def test_frozen_routers_stay_and_are_not_decayed() -> None:
    runs = [
        Run(ToyConfig(8, 2, 4, gate=gate), training=dataclasses.replace(FAST, steps=10))
        for gate in ("random", "oracle", "switch")
    ]
    for impl in ("numba", "torch"):
        before = _Trainer(runs, "cpu", impl).model.router.detach().clone()
        moved = (train_runs(runs, impl=impl).model.router - before).abs().amax((1, 2))
        assert (moved == 0).tolist() == [True, True, False]


def test_a_diverging_run_is_named_and_spares_the_others() -> None:
    runs = [
        Run(training=dataclasses.replace(FAST, steps=20, lr=lr, schedule="constant", weight_decay=0.0))
        for lr in (1e-3, 1e30)
    ]
    result = train_runs(runs)
    assert result.failed[0] is None
    assert result.failed[1] is not None
    assert "at step" in result.failed[1]


def test_progress_adds_up() -> None:
    done: list[int] = []
    train_runs([Run(training=dataclasses.replace(FAST, steps=37))], progress=lambda steps, loss: done.append(steps))
    assert sum(done) == 37


def test_no_steps_give_the_untrained_model() -> None:
    result = train_runs([Run(training=TrainConfig(steps=0))])
    assert result.losses.shape == (1, 0)
    assert result.failed == [None]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least one"):
        train_runs([])
    with pytest.raises(ValueError, match="one shape"):
        train_runs([Run(), Run(ToyConfig(6, 2))])
    with pytest.raises(ValueError, match="impl='jax'"):
        train_runs([Run()], impl="jax")
    with pytest.raises(ValueError, match="impl='numba': takes a CPU, got device='meta'"):
        train_runs([Run()], impl="numba", device="meta")
    with pytest.raises(ValueError, match="impl='triton': takes a CUDA device, got device='cpu'"):
        train_runs([Run()], impl="triton")
    with pytest.raises(ValueError, match="device='gpu'"):
        train_runs([Run()], device="gpu")
    with pytest.raises(ValueError, match="seeds=3: takes a sequence"):
        train(ToyConfig(), seeds=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="checkpoint_every=0"):
        train_runs([Run()], checkpoint_every=0)


@pytest.mark.parametrize("impl", ["numba", "torch"])
def test_a_part_trains_the_next_steps_and_begins_again_after_the_last(impl: str) -> None:
    run = Run(SHAPES[0], training=dataclasses.replace(FAST, steps=5))
    with patch.object(trainer._Trainer, "advance", autospec=True) as advance:

        def count(self: trainer._Trainer, n_steps: int) -> float:
            self.step += n_steps
            return 0.0

        advance.side_effect = count
        part = trainer.training_part([run], 2, impl=impl)
        begun = []
        for _ in range(5):
            part()
            begun.append(advance.call_args.args[0].step - 2)
    assert begun == [0, 2, 0, 2, 0]
    for steps in (0, 6):
        with pytest.raises(ValueError, match=rf"steps={steps}: takes 1 to the steps of the runs \(5\)"):
            trainer.training_part([run], steps, impl=impl)
