"""Sampled decoding: unbiased in loss and gradient, and lazy rows equal rows that never wait."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from moesaic.kernels.feature_state import FeatureShape
from moesaic.kernels.feature_step import feature_step
from moesaic.kernels.feature_training import FeatureState, FeatureTraining

pytestmark = pytest.mark.filterwarnings("ignore:Sparse")

N, B, R, DRAWS = 20_000, 16, 400, 120
SHAPES = {"dense": FeatureShape(N, 6, routed=False), "k = 2, shared": FeatureShape(N, 3, 4, 2, 2)}


def batch(seed: int, n: int = N, active: int = 10) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    columns = torch.stack([torch.randperm(n, generator=generator)[:active].sort().values for _ in range(B)])
    values = torch.rand(B * active, generator=generator)
    return torch.sparse_csr_tensor(
        torch.arange(B + 1) * active, columns.reshape(-1), values, size=(B, n), check_invariants=False
    )


def started(shape: FeatureShape, decode: str) -> FeatureState:
    state = FeatureState.zeros(shape, decode=decode)
    state.table[:, : shape.n_columns] = 0.4 * torch.randn(
        shape.n_features, shape.n_columns, generator=torch.Generator().manual_seed(8)
    )
    return state


def training(shape: FeatureShape, decode: str, seed: int = 0, steps: int = 1) -> FeatureTraining:
    importance = 0.5 + torch.rand(shape.n_features, generator=torch.Generator().manual_seed(3))
    # No decay, and a rate of nothing: what is left of a first step is its gradient, in the moments.
    return FeatureTraining(
        "switch", importance, 1 / B, torch.zeros(steps).double(), weight_decay=0.0, load_balance=0.01, decode=decode,
        n_negatives=R if decode == "sampled" else 0, seed=seed, eps=1e-15,
    )  # fmt: skip


@pytest.fixture(scope="module", params=SHAPES)
def estimates(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and projections of the gradient: exact (1 + J,), sampled (DRAWS, 1 + J), and a scale of the exact."""
    shape = SHAPES[request.param]
    x, generator = batch(1), torch.Generator().manual_seed(4)
    signs = torch.randint(0, 2, (4, *started(shape, "exact").table.shape), generator=generator).mul_(2).sub_(1).float()

    def seen(decode: str, seed: int) -> Tensor:
        state = started(shape, decode)
        losses = feature_step(state, x, training(shape, decode, seed))
        projected = torch.einsum("jnp,np->j", signs, 10 * state.exp_avg)
        by_section = torch.stack([view.sum() for view in shape.rows(10 * state.exp_avg).values()])
        return torch.cat([losses.loss.float()[None], projected, by_section])

    exact = seen("exact", 0).double()
    return exact, torch.stack([seen("sampled", seed) for seed in range(DRAWS)]).double(), exact.abs()


def z_scores(exact: Tensor, sampled: Tensor) -> Tensor:
    """Standard scores of the samples' mean; what never varies has to be equal."""
    spread = sampled.std(0) / DRAWS**0.5
    scores: Tensor = (sampled.mean(0) - exact).abs() / spread.clamp(min=1e-5 * exact.abs() + 1e-7)
    return scores


def test_loss_and_gradient_are_unbiased(estimates: tuple[Tensor, Tensor, Tensor]) -> None:
    exact, sampled, _ = estimates
    assert float(z_scores(exact, sampled).max()) < 4.5
    assert float(sampled[:, 0].std() / exact[0]) < 0.1


def test_a_weight_that_is_off_is_seen(estimates: tuple[Tensor, Tensor, Tensor]) -> None:
    exact, sampled, _ = estimates
    assert float(z_scores(exact, 1.05 * sampled)[0]) > 5


def test_rows_that_wait_equal_rows_that_never_do() -> None:
    shape = dataclasses.replace(SHAPES["k = 2, shared"], n_features=900)
    rates = torch.linspace(3e-3, 1e-3, 30, dtype=torch.float64)
    states = [started(shape, "sampled"), started(shape, "sampled")]
    how = dataclasses.replace(training(shape, "sampled"), lr=rates, weight_decay=0.1, n_negatives=40)
    for step in range(30):
        x = batch(step, 900, 3)
        for number, state in enumerate(states):
            feature_step(state, x, how)
            if number:
                state.settle(how)
    states[0].settle(how)
    moved = (states[1].table - started(shape, "sampled").table).abs().max()
    assert float((states[0].table - states[1].table).abs().max() / moved) < 2e-4
    assert torch.equal(states[0].seen, states[1].seen)


def test_a_step_leaves_other_rows_alone() -> None:
    shape = SHAPES["dense"]
    state = started(shape, "sampled")
    before = state.table.clone()
    how = dataclasses.replace(training(shape, "sampled"), lr=torch.full((1,), 1e-2).double())
    feature_step(state, batch(1), how)
    changed = (state.table != before).any(1)
    assert int(changed.sum()) <= R + B * 10
    assert not (changed & (state.seen == 0)).any()
    assert int(changed.sum()) > R / 2


def test_refusals() -> None:
    shape, x = SHAPES["dense"], batch(1)
    state, how = started(shape, "sampled"), training(shape, "sampled")
    for changes, message in (
        ({"decode": "guessed"}, "decode='guessed': takes one of exact, sampled"),
        ({"n_negatives": 0}, "n_negatives=0: takes 1 to n_features=20000"),
        ({"n_negatives": N + 1}, "n_negatives=20001: takes 1 to"),
        ({"precision": "fp8"}, "precision='fp8': takes one of ieee"),
        ({"precision": "bf16"}, "precision='bf16': takes 'ieee' when decode='sampled'"),
        ({"precision": "tf32x3"}, "precision='tf32x3': takes a state on a GPU"),
        ({"importance": how.importance.double()}, r"importance: takes float32 \(20000,\) on cpu, got torch.float64"),
        (
            {"importance": how.importance[1:]},
            r"importance: takes .* got torch.float32 \(19999,",
        ),
        ({"decode": "exact", "n_negatives": 0}, "seen: takes a state made with decode='exact'"),
    ):
        with pytest.raises(ValueError, match=message):
            feature_step(state, x, dataclasses.replace(how, **changes))
    with pytest.raises(ValueError, match="seen: takes a state made with decode='sampled'"):
        feature_step(started(shape, "exact"), x, how)
    with pytest.raises(ValueError, match=r"exp_avg, exp_avg_sq: take float32 or bfloat16, both, got torch.float16"):
        feature_step(dataclasses.replace(state, exp_avg=state.exp_avg.half()), x, how)
    with pytest.raises(ValueError, match="routed=False: takes n_experts = 1, got 2"):
        FeatureShape(N, 4, 2, routed=False)
    with pytest.raises(ValueError, match="x: takes float32 sparse_csr"):
        feature_step(state, torch.zeros(B, N), how)
    with pytest.raises(ValueError, match="lr: has 1 steps, all done"):
        feature_step(dataclasses.replace(state, step=1), x, how)
