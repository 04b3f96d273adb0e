"""Rows that catch up against `torch.optim.AdamW` with gradients of zero."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moesaic.kernels.lazy_adamw import LazySchedule

ROWS, WIDTH, STEPS = 6, 5, 400
RATES = {
    "constant": [3e-3] * STEPS,
    "cosine": [3e-3 * 0.5 * (1 + math.cos(math.pi * t / STEPS)) for t in range(STEPS)],
    "warm-up": [3e-3 * min(1.0, (t + 1) / 50) for t in range(STEPS)],
}


def drawn(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    theta, avg = (torch.randn(ROWS, WIDTH, generator=generator) for _ in range(2))
    return [theta, 0.1 * avg, 0.05 * torch.rand(ROWS, WIDTH, generator=generator) + 1e-4]


def plain(
    state: list[Tensor], rates: list[float], first: int, last: int, eps: float, decay: float = 0.05
) -> list[Tensor]:
    """Steps first … last − 1 of AdamW in float64 without a gradient."""
    theta, avg, sq = (part.double().clone() for part in state)
    parameter = torch.nn.Parameter(theta)
    adamw = torch.optim.AdamW([parameter], lr=1.0, betas=(0.9, 0.999), eps=eps, weight_decay=decay)
    adamw.state[parameter] = {"step": torch.tensor(float(first)), "exp_avg": avg, "exp_avg_sq": sq}
    for step in range(first, last):
        adamw.param_groups[0]["lr"] = rates[step]
        parameter.grad = torch.zeros_like(parameter)
        adamw.step()
    return [parameter.detach(), avg, sq]


def caught_up(state: list[Tensor], schedule: LazySchedule, first: int, last: int) -> list[Tensor]:
    mine = [part.clone() for part in state]
    schedule.catch_up(mine[0], mine[1], mine[2], torch.full((ROWS,), first), last)
    return mine


def schedule_of(name: str, eps: float = 1e-15) -> LazySchedule:
    rates = torch.tensor(RATES[name], dtype=torch.float64)
    return LazySchedule.of(rates, beta1=0.9, beta2=0.999, eps=eps, weight_decay=0.05)


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize(("first", "last"), [(1, 2), (1, 30), (7, 7), (50, 51), (50, 399), (200, 400)])
def test_equals_steps_without_a_gradient(name: str, first: int, last: int) -> None:
    state = drawn()
    mine, truth = caught_up(state, schedule_of(name), first, last), plain(state, RATES[name], first, last, 1e-15)
    moved = float((truth[0] - state[0]).abs().max())
    assert float((mine[0] - truth[0]).abs().max()) <= 2e-6 * max(moved, 1.0)
    for ours, theirs in zip(mine[1:], truth[1:], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-12)


def test_the_drift_is_not_small_and_decay_not_either() -> None:
    state = drawn()
    truth = plain(state, RATES["constant"], 50, 100, 1e-15)
    decayed = state[0] * (1 - 3e-3 * 0.05) ** 50
    assert float((truth[0] - decayed).abs().max()) > 1e-3
    assert float((truth[0] - state[0] - (truth[0] - decayed)).abs().max()) > 1e-3


def test_the_error_of_a_large_eps_is_of_the_order_of_eps_over_the_root() -> None:
    state = drawn()
    state[2].fill_(1e-2)
    for eps in (1e-6, 1e-4):
        truth = plain(state, RATES["constant"], 50, 100, eps)
        mine = caught_up(state, schedule_of("constant", eps), 50, 100)
        drift = (truth[0] - plain([state[0], state[1] * 0, state[2]], RATES["constant"], 50, 100, eps)[0]).abs().max()
        assert float((mine[0] - truth[0]).abs().max()) < float(drift) * (eps / 0.1 + 1e-5)


def test_two_catches_are_one_and_rows_may_differ() -> None:
    schedule, state = schedule_of("cosine"), drawn(3)
    once = caught_up(state, schedule, 20, 300)
    twice = caught_up(caught_up(state, schedule, 20, 90), schedule, 90, 300)
    torch.testing.assert_close(once[0], twice[0], rtol=1e-6, atol=1e-6)
    last = torch.tensor([1, 20, 20, 150, 299, 300])
    mixed = [part.clone() for part in state]
    schedule.catch_up(mixed[0], mixed[1], mixed[2], last, 300)
    for row, first in enumerate(last.tolist()):
        assert torch.equal(mixed[0][row], caught_up(state, schedule, first, 300)[0][row])


def test_a_row_never_touched_only_decays() -> None:
    theta = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    mine = [theta.clone(), torch.zeros(3, 4), torch.zeros(3, 4)]
    schedule_of("constant").catch_up(mine[0], mine[1], mine[2], torch.zeros(3, dtype=torch.int64), 400)
    torch.testing.assert_close(mine[0], theta * (1 - 3e-3 * 0.05) ** 400)


def test_a_decay_below_the_smallest_number_is_no_error() -> None:
    schedule = LazySchedule.of(torch.full((90_000,), 1e-2).double(), beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1.0)
    state = drawn()
    late = caught_up(state, schedule, 89_000, 89_010)
    torch.testing.assert_close(late[0].double(), plain(state, [1e-2] * 90_000, 89_000, 89_010, 1e-8, 1.0)[0])
    assert not caught_up([state[0], state[1] * 0, state[2]], schedule, 10, 89_000)[0].abs().max() > 1e-30


def test_a_step_that_decays_to_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight_decay=2.0: takes less than 1/lr = 2"):
        LazySchedule.of(torch.tensor([0.5]).double(), beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=2.0)


def test_momentum_that_outlives_its_scale_is_refused() -> None:
    with pytest.raises(ValueError, match=r"beta1=0.95: takes less than the root of beta2, 0.9487"):
        LazySchedule.of(torch.ones(3).double(), beta1=0.95, beta2=0.9, eps=1e-8, weight_decay=0.0)
