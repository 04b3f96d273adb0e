"""The absolute-value model: its function, its gradients, its optimiser, its data and its training."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moesaic.moe import FeatureConfig, Run, ToyConfig, TrainConfig, held_out, importance
from moesaic.moe.absolute_value import (
    AbsoluteValueModel,
    evaluate_absolute_value,
    loss_and_gradients,
    signed_features,
    train_absolute_value,
)
from moesaic.moe.data import feature_table

TRAINING = TrainConfig(steps=30, batch_size=32, lr=3e-3, reduction="sum", weight_decay=0.1, schedule="cosine")


def runs(n: int = 6, m: int = 4, *, count: int = 2, training: TrainConfig = TRAINING) -> list[Run]:
    toy = ToyConfig(n, m, tied=False, parametrization="tms")
    return [
        Run(toy, FeatureConfig(feature_probability=0.3 + 0.5 * s, importance="geometric"), training, s)
        for s in range(count)
    ]


def test_two_neurons_compute_an_absolute_value() -> None:
    model = AbsoluteValueModel(runs(1, 2, count=1))
    model.weight.data[:] = torch.tensor([[[1.0, -2.0]]])
    model.decoder.data[:] = torch.tensor([[[1.0, 0.5]]])
    model.bias.data[:] = 0.0
    x = torch.linspace(-1, 1, 9).view(1, 9, 1)
    torch.testing.assert_close(model(x), x.abs())


def test_the_decoder_starts_as_the_magnitude_of_the_weights() -> None:
    model = AbsoluteValueModel(runs())
    assert torch.equal(model.decoder, model.weight.abs())
    assert bool((model.weight < 0).any())
    assert not torch.equal(model.weight[0], model.weight[1])


def test_gradients_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    model = AbsoluteValueModel(runs()).double()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    x, weights = torch.rand(2, 40, 6, dtype=torch.float64) * 2 - 1, torch.rand(2, 6, dtype=torch.float64)
    loss = loss_and_gradients(model, x, weights)
    ours = [parameter.grad for parameter in model.parameters()]
    expected = ((model(x) - x.abs()).square() * weights[:, None]).sum((1, 2))
    theirs = torch.autograd.grad(expected.sum(), list(model.parameters()))
    torch.testing.assert_close(loss, expected.detach())
    for mine, other in zip(ours, theirs, strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, other)
        assert bool(other.abs().max() > 0)


def test_a_stack_is_trained_as_by_autograd_and_adamw() -> None:
    members = runs()
    members[1] = dataclasses.replace(members[1], training=dataclasses.replace(TRAINING, lr=1e-2, beta2=0.99))
    result = train_absolute_value(members)
    for s, run in enumerate(members):
        model = AbsoluteValueModel([run])
        settings = run.training
        optimiser = torch.optim.AdamW(
            model.parameters(), betas=(settings.beta1, settings.beta2), eps=settings.eps, weight_decay=0.1
        )
        weigh = importance(run.features, 6)
        for step in range(settings.steps):
            x = signed_features(feature_table([run]), 32, seeds=torch.tensor([run.seed]), step=step)
            loss = (((model(x) - x.abs()) ** 2).mean(1) * weigh).sum()
            torch.testing.assert_close(result.losses[s, step], loss.detach(), rtol=1e-4, atol=1e-6)
            optimiser.zero_grad()
            loss.backward()
            optimiser.param_groups[0]["lr"] = settings.lr_at(step)
            optimiser.step()
        for ours, theirs in zip(result.model.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(ours[s], theirs[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(train_absolute_value(members).model.weight, result.model.weight)


def test_features_are_present_as_asked_and_symmetric() -> None:
    (run,) = runs(50, 2, count=1)
    x = signed_features(feature_table([run]), 4000, seeds=torch.tensor([7]), step=3)
    present = x[x != 0]
    assert len(present) / x.numel() == pytest.approx(0.3, abs=0.01)
    assert float(present.mean()) == pytest.approx(0, abs=0.02)
    assert float(present.square().mean()) == pytest.approx(1 / 3, abs=0.01)
    assert float(present.min()) < -0.99
    assert float(present.max()) > 0.99


def test_the_evaluation_is_that_of_the_held_out_samples() -> None:
    result = train_absolute_value(runs())
    losses, variances = evaluate_absolute_value(result, 40_000)  # in three blocks
    for s, run in enumerate(result.runs):
        values = held_out(run, 40_000)
        x = torch.where(values > 0, 2 * values - 1, values)
        with torch.no_grad():
            y = result.model(x.expand(2, -1, -1))[s]
        torch.testing.assert_close(losses[s].float(), (y - x.abs()).square().mean(0), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(variances[s].float(), x.abs().var(0, correction=0), rtol=1e-4, atol=1e-7)


def test_progress_tells_every_step_once() -> None:
    told: list[int] = []
    train_absolute_value(runs(), progress=lambda steps, loss: told.append(steps))
    assert sum(told) == 30


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "at least one"),
        ([*runs(), *runs(7)], "one n_features"),
        ([Run(ToyConfig(6, 4))], "tied=False"),
        ([Run(ToyConfig(6, 4, n_experts=2, tied=False))], "n_experts=1"),
        ([*runs(), *runs(training=dataclasses.replace(TRAINING, steps=3))], "one number of steps"),
        (runs(training=dataclasses.replace(TRAINING, load_balance=0.1)), "load_balance"),
    ],
)
def test_what_it_does_not_take(members: list[Run], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_absolute_value(members)
    with pytest.raises(ValueError, match="device"):
        train_absolute_value(runs(), device="nowhere")
