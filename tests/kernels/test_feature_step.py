"""Steps of toy models with very many features, exact and sampled, against dense autograd in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.kernels import reference_toy
from moesaic.kernels.feature_state import FeatureShape
from moesaic.kernels.feature_step import feature_step
from moesaic.kernels.feature_training import FeatureState, FeatureTraining

# torch says once per process that its CSR tensors are in beta.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse")

N, B = 150, 24
GATES = ("paper", "switch", "sigmoid", "straight_through", "random", "oracle")
SHAPES = {
    "dense": FeatureShape(N, 6, routed=False),
    "wide": FeatureShape(N, 20, routed=False),
    "k = 1": FeatureShape(N, 4, 5),
    "k = 2": FeatureShape(N, 3, 5, 2),
    "k = E": FeatureShape(N, 8, 3, 3),
    "untied": FeatureShape(N, 5, 4, 1, tied=False),
    "shared": FeatureShape(N, 2, 4, 1, 7),
    "shared, untied, k = 2": FeatureShape(N, 4, 4, 2, 3, tied=False),
    "one feature beyond a panel": FeatureShape(N - 5, 1, 2),
}


CASES = [(name, gate) for name, shape in SHAPES.items() for gate in GATES if shape.routed or gate == "paper"]


def batch(n: int, seed: int, density: float = 0.05, size: int = B) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(size, n, generator=generator) * (torch.rand(size, n, generator=generator) < density)
    x[1] = 0.0  # a sample without features
    return x


def started(shape: FeatureShape, decode: str = "exact", moments: torch.dtype = torch.float32) -> FeatureState:
    state = FeatureState.zeros(shape, decode=decode, moments=moments)
    generator = torch.Generator().manual_seed(5)
    for name, view in shape.rows(state.table).items():
        spread = 0.1 if "bias" in name else 1.0 if name == "router" else 0.7
        view.copy_(spread * torch.randn(view.shape, generator=generator))
    return state


def settings(shape: FeatureShape, gate: str = "paper", steps: int = 50, **changes: Any) -> FeatureTraining:
    importance = 0.5 + torch.rand(shape.n_features, generator=torch.Generator().manual_seed(3))
    lr = torch.full((steps,), 3e-3, dtype=torch.float64)
    return dataclasses.replace(
        FeatureTraining(gate, importance, 1 / B, lr, eps=1e-6, weight_decay=0.05, load_balance=0.03), **changes
    )


class Dense:
    """The dense model in float64, by autograd on all features, with torch's AdamW."""

    def __init__(self, state: FeatureState, training: FeatureTraining) -> None:
        named = state.shape.named(state.table)
        self.shape, self.training = state.shape, training
        self.parts = {name: view.double().clone().requires_grad_() for name, view in named.items()}
        trained = [p for name, p in self.parts.items() if not (name == "router" and state.frozen(training))]
        self.adamw = torch.optim.AdamW(
            trained, lr=float(training.lr[0]), betas=(training.beta1, training.beta2), eps=training.eps,
            weight_decay=training.weight_decay,
        )  # fmt: skip

    def step(self, x: Tensor) -> tuple[float, float, dict[str, Tensor]]:
        parts = dict(self.parts)
        if not self.shape.routed:
            parts["router"] = torch.zeros(1, x.shape[1], dtype=torch.float64)
        training = self.training
        loss, balance = reference_toy.toy_loss(
            parts, x.double(), top_k=self.shape.top_k, gate=training.gate, importance=training.importance.double(),
            load_balance=training.load_balance if self.shape.routed else 0.0,
        )  # fmt: skip
        loss = loss * training.scale * x.shape[0]
        self.adamw.zero_grad()
        (loss + balance).backward()
        frozen = training.gate in ("random", "oracle")
        gradients = {
            name: torch.zeros_like(p) if p.grad is None or (frozen and name == "router") else p.grad.clone()
            for name, p in self.parts.items()
        }
        for group in self.adamw.param_groups:
            group["lr"] = float(training.lr[self.count])
        self.count += 1
        self.adamw.step()
        return loss.item(), balance.item(), gradients

    count = 0


def error(got: Tensor, truth: Tensor) -> float:
    size = float(truth.square().mean().sqrt())
    return float((got.double() - truth).abs().max()) / size if size else float(got.abs().max())


def first_step_errors(shape: FeatureShape, gate: str, x: Tensor, seen: Tensor | None = None) -> dict[str, float]:
    """Loss and every gradient of one exact step on ``seen``, against the dense model's on x."""
    state, training = started(shape), settings(shape, gate)
    dense = Dense(state, training)
    ours = feature_step(state, (x if seen is None else seen).to_sparse_csr(), training)
    loss, balance, gradients = dense.step(x)
    moments = shape.named(state.exp_avg)
    found = {"loss": abs(float(ours.loss) / loss - 1), "balance": abs(float(ours.load_balance) - balance)}
    for name, gradient in gradients.items():
        if not (name == "router" and state.frozen(training)):
            found[name] = error(moments[name] / (1 - training.beta1), gradient)
    return found


@pytest.mark.parametrize(("name", "gate"), CASES)
def test_loss_and_every_gradient(name: str, gate: str) -> None:
    shape = SHAPES[name]
    found = first_step_errors(shape, gate, batch(shape.n_features, 1))
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize(("name", "gate"), CASES)
def test_fifty_steps(name: str, gate: str) -> None:
    shape = SHAPES[name]
    state, training = started(shape), settings(shape, gate)
    dense = Dense(state, training)
    for step in range(50):
        x = batch(shape.n_features, 100 + step)
        ours = feature_step(state, x.to_sparse_csr(), training)
        loss, _, _ = dense.step(x)
        assert abs(float(ours.loss) / loss - 1) < 1e-5
    named = shape.named(state.table)
    assert max(error(named[part], value.detach()) for part, value in dense.parts.items()) < 2e-4


@pytest.mark.parametrize("shape", [FeatureShape(20_000, 6, routed=False), FeatureShape(20_000, 4, 8, 2, 3)])
def test_twenty_thousand_features_on_random_slices(shape: FeatureShape) -> None:
    state, training, x = started(shape), settings(shape, "switch"), batch(20_000, 1, 5e-4)
    dense = Dense(state, training)
    ours = feature_step(state, x.to_sparse_csr(), training)
    loss, _, gradients = dense.step(x)
    assert abs(float(ours.loss) / loss - 1) < 1e-5
    some = torch.randperm(20_000, generator=torch.Generator().manual_seed(9))[:500]
    some = torch.cat([some, x.any(0).nonzero()[:50, 0]])
    moments = shape.named(state.exp_avg)
    for name, gradient in gradients.items():
        axis = 0 if name.startswith("shared") else 1
        mine = moments[name].index_select(axis, some) / (1 - training.beta1)
        # The encoder's gradient is of dh, a sum of 20,000 terms in float32.
        assert error(mine, gradient.index_select(axis, some)) < 5e-5, name


@pytest.mark.parametrize("name", ["k = 2", "shared"])
def test_the_tolerance_can_fail(name: str) -> None:
    shape, x = SHAPES[name], batch(N, 1)
    assert first_step_errors(shape, "switch", x, x.roll(1, 1))["weight"] > 1e-2
    assert first_step_errors(shape, "switch", x, x * 1.001)["loss"] > 1e-5


@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
def test_nothing_present_and_everything(density: float) -> None:
    shape = SHAPES["shared"]
    found = first_step_errors(shape, "switch", batch(N, 2, density))
    assert max(found.values()) < 1e-5, found


def sampled_training(shape: FeatureShape, gate: str, r: int, **changes: Any) -> FeatureTraining:
    return settings(shape, gate, decode="sampled", n_negatives=r, **changes)


@pytest.mark.parametrize("name", ["dense", "k = 1", "k = 2", "untied", "shared", "shared, untied, k = 2"])
def test_with_all_features_drawn_a_sampled_step_is_exact(name: str) -> None:
    shape = SHAPES[name]
    state, training = started(shape, "sampled"), sampled_training(shape, "switch", N)
    dense = Dense(state, training)
    for step in range(20):
        x = batch(N, 100 + step)
        ours = feature_step(state, x.to_sparse_csr(), training)
        loss, balance, _ = dense.step(x)
        assert abs(float(ours.loss) / loss - 1) < 1e-5
        assert abs(float(ours.load_balance) - balance) < 1e-6
    named = shape.named(state.table)
    assert max(error(named[part], value.detach()) for part, value in dense.parts.items()) < 1e-4
