from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moesaic.metrics import expert_specialization


def linear_route(router: Tensor, top_k: int = 1) -> Callable[[Tensor], Tensor]:
    return lambda x: (x @ router.mT).topk(top_k, dim=-1).indices


def sparse_inputs(n_inputs: int, n: int, p: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(n_inputs, n, generator=generator) * (torch.rand(n_inputs, n, generator=generator) < p)


def test_triple_counted_by_hand() -> None:
    router = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    x = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.1, 0.7, 0.8], [0.9, 0.0, 0.5]])
    own = torch.tensor([[True, False, False], [False, True, False]])
    got = expert_specialization(linear_route(router), x, own)
    assert got.unchanged.tolist() == [0.5, 0.5]
    assert got.clamped.tolist() == [0.75, 1.0]
    assert got.only.tolist() == [1.0, 1.0]


def test_experts_with_their_own_features_specialise() -> None:
    n, n_experts = 24, 4
    own = torch.arange(n).reshape(n_experts, 6)[:, :, None].eq(torch.arange(n)).any(1)
    weakly_pulled = own & (torch.arange(n) % 6 < 2)
    got = expert_specialization(linear_route(own.float()), sparse_inputs(2000, n, p=0.5), weakly_pulled)
    assert bool((got.unchanged < got.clamped).all())
    assert bool((got.clamped < got.only).all())
    assert got.only.tolist() == [1.0] * n_experts


def test_a_router_that_ignores_the_features_shows_no_specialisation() -> None:
    own = torch.ones(2, 5, dtype=torch.bool)
    got = expert_specialization(lambda x: torch.zeros(*x.shape[:-1], 1, dtype=torch.int64), sparse_inputs(50, 5), own)
    assert got.unchanged.tolist() == got.clamped.tolist() == got.only.tolist() == [1.0, 0.0]


def test_an_expert_without_monosemantic_features_is_undefined() -> None:
    own = torch.tensor([[False, False], [False, True]])
    got = expert_specialization(linear_route(torch.eye(2)), sparse_inputs(20, 2), own)
    assert [math.isnan(v) for v in got.clamped.tolist()] == [math.isnan(v) for v in got.only.tolist()] == [True, False]
    assert not bool(got.unchanged.isnan().any())


@pytest.mark.parametrize("own_inputs", [False, True])
def test_stacked_models_are_measured_apart(own_inputs: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    routers = torch.randn(3, 4, 8, generator=generator)
    own = torch.rand(3, 4, 8, generator=generator) < 0.3
    x = sparse_inputs(200, 8)
    stacked = expert_specialization(linear_route(routers, 2), x.expand(3, 200, 8) if own_inputs else x, own)
    for i in range(3):
        alone = expert_specialization(linear_route(routers[i], 2), x, own[i])
        for part in ("unchanged", "clamped", "only"):
            torch.testing.assert_close(getattr(stacked, part)[i], getattr(alone, part), rtol=0, atol=0, equal_nan=True)


def test_with_k_active_experts_the_unchanged_shares_sum_to_k() -> None:
    router = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    got = expert_specialization(linear_route(router, 2), sparse_inputs(100, 8), torch.ones(5, 8, dtype=torch.bool))
    assert float(got.unchanged.sum()) == pytest.approx(2.0, rel=1e-12)


@pytest.mark.parametrize(
    ("x", "own", "route", "message"),
    [
        (torch.ones(0, 3), torch.ones(2, 3).bool(), None, r"x has shape \(0, 3\)"),
        (torch.ones(4, 3), torch.ones(2, 3), None, r"dtype torch\.float32: takes bool"),
        (torch.ones(4, 3), torch.ones(2, 5).bool(), None, r"monosemantic has shape \(2, 5\).*n = 3"),
        (torch.ones(5, 4, 3), torch.ones(2, 3).bool(), None, r"x has shape \(5, 4, 3\)"),
        (torch.ones(4, 3), torch.ones(2, 3).bool(), lambda x: (x, x), r"route returned tuple"),
        (torch.ones(4, 3), torch.ones(2, 3).bool(), lambda x: x, r"route returned \(\(4, 3\), torch\.float32\)"),
        (torch.ones(4, 3), torch.ones(2, 3).bool(), lambda x: x[:1].long(), r"route returned \(\(1, 3\)"),
    ],
)
def test_bad_arguments_are_named(
    x: Tensor, own: Tensor, route: Callable[[Tensor], Tensor] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        expert_specialization(route or linear_route(torch.eye(3)), x, own)
