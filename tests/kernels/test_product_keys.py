from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.kernels import route_product_keys, route_topk


def make(n_tokens: int, rows: int, columns: int, d: int, levels: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    draw = [torch.randn(size, d // 2 * (2 if i == 0 else 1), generator=generator).double()
            for i, size in enumerate((n_tokens, rows, columns))]  # fmt: skip
    first, second, third = (part.round().clamp(-1, 1) if levels else part for part in draw)
    return first, second, third


def all_scores(query: Tensor, first: Tensor, second: Tensor) -> Tensor:
    half = query.shape[-1] // 2
    return ((query[..., :half] @ first.T)[..., :, None] + (query[..., half:] @ second.T)[..., None, :]).flatten(-2)


@pytest.mark.parametrize("levels", [False, True])
@pytest.mark.parametrize("scoring", ["softmax_topk", "sigmoid"])
@pytest.mark.parametrize(("rows", "columns", "k"), [(1, 1, 1), (1, 9, 4), (7, 5, 8), (12, 12, 30), (3, 3, 9)])
def test_it_is_the_top_k_of_all_sums(rows: int, columns: int, k: int, scoring: str, levels: bool) -> None:
    query, first, second = (part.requires_grad_() for part in make(40, rows, columns, 6, levels))
    options: dict[str, Any] = {"scoring": scoring, "renormalize": scoring == "sigmoid", "scale": 1.5}
    weights, ids = route_product_keys(query, first, second, k, **options)
    truth = route_topk(all_scores(query, first, second), k, **options)
    assert torch.equal(ids, truth.ids)
    torch.testing.assert_close(weights, truth.weights, rtol=1e-12, atol=1e-14)
    upstream = torch.randn(weights.shape, generator=torch.Generator().manual_seed(1)).double()
    ours, theirs = (torch.autograd.grad(value, (query, first, second), upstream) for value in (weights, truth.weights))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_million_experts_in_float32() -> None:
    query, first, second = (part.float() for part in make(3, 1000, 1000, 8))
    weights, ids = route_product_keys(query.view(1, 3, 8), first, second, 16)
    scores = all_scores(query, first, second)
    assert ids.shape == (1, 3, 16)
    torch.testing.assert_close(scores.gather(1, ids[0]), scores.topk(16).values)
    torch.testing.assert_close(weights[0], torch.softmax(scores.topk(16).values, -1))


def test_a_nan_poisons_its_token_and_no_other() -> None:
    query, first, second = (part.float() for part in make(4, 5, 5, 6))
    clean = route_product_keys(query, first, second, 3)
    query[1, 0] = torch.nan
    weights, ids = route_product_keys(query, first, second, 3)
    assert weights[1].isnan().all()
    assert ids[1].tolist() == [0, 1, 2]
    assert torch.equal(ids[[0, 2, 3]], clean.ids[[0, 2, 3]])


def test_a_nan_among_the_worst_keys_is_not_lost() -> None:
    query, first, second = (part.float() for part in make(4, 50, 50, 6))
    first[40, 0] = torch.nan
    weights, ids = route_product_keys(query, first, second, 3)
    assert weights.isnan().all()
    assert ids.tolist() == [[0, 1, 2]] * 4


def test_scores_are_float32_under_autocast() -> None:
    query, first, second = (part.float() for part in make(30, 20, 20, 6))
    plain = route_product_keys(query, first, second, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = route_product_keys(query, first, second, 3)
    assert torch.equal(cast.ids, plain.ids)
    assert torch.equal(cast.weights, plain.weights)


def test_bad_arguments_are_named() -> None:
    query, first, second = make(2, 3, 4, 6)
    with pytest.raises(ValueError, match="query must be floating point"):
        route_product_keys(query[:, :5], first, second, 1)
    with pytest.raises(ValueError, match=r"second_keys must have shape \(at least 1, 3\)"):
        route_product_keys(query, first, second[:, :2], 1)
    with pytest.raises(ValueError, match="top_k must be between 1 and n_experts = 12, got 13"):
        route_product_keys(query, first, second, 13)
    with pytest.raises(ValueError, match="scoring must be one of softmax_topk, sigmoid"):
        route_product_keys(query, first, second, 1, scoring="softmax")
