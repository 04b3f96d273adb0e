from __future__ import annotations

import math

import pytest
import torch

from moesaic.kernels import drop_over_capacity, load_metrics, update_selection_bias


def test_load_metrics_are_their_definitions() -> None:
    even = load_metrics(torch.full((8,), 5))
    assert [float(value) for value in even] == pytest.approx([0.0, 0.0, 8.0, 0.0])
    skewed = load_metrics(torch.tensor([6, 2, 0, 0]))
    assert float(skewed.max_violation) == 2.0
    assert float(skewed.variation) == pytest.approx(math.sqrt((16 + 0 + 4 + 4) / 4) / 2)
    assert float(skewed.effective_experts) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    assert float(skewed.idle_experts) == 2.0
    assert [float(value) for value in load_metrics(torch.zeros(3, dtype=torch.int64))] == [0.0, 0.0, 0.0, 3.0]
    assert load_metrics(torch.empty(5, device="meta")).variation.shape == ()


def test_the_bias_moves_against_the_load() -> None:
    bias = torch.tensor([0.0, 0.5, 0.0, -1.0])
    update_selection_bias(bias, torch.tensor([10, 0, 4, 2]), rate=0.25)
    assert bias.tolist() == [-0.25, 0.75, 0.0, -0.75]


def test_a_biased_router_becomes_balanced() -> None:
    from moesaic.kernels import route_topk

    logits = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0)) + torch.linspace(-1.5, 1.5, 8)
    bias, violations = torch.zeros(8), []
    for _ in range(300):
        _, statistics = route_topk(logits, 2, scoring="sigmoid", bias=bias, return_statistics=True)
        violations.append(float(load_metrics(statistics.counts).max_violation))
        update_selection_bias(bias, statistics.counts, rate=5e-3)
    assert violations[0] > 1.0
    assert violations[-1] < 0.1


def test_capacity_keeps_the_first_choices() -> None:
    ids = torch.tensor([[0, 1], [0, 2], [0, 1], [-1, 0], [5, 2]])
    kept, dropped = drop_over_capacity(ids, 5, 1.0)  # ⌈10 / 5⌉ = 2 each
    assert kept.tolist() == [[0, 1], [0, 2], [5, 1], [-1, 5], [5, 2]]
    assert dropped.tolist() == [2, 0, 0, 0, 0]
    small = drop_over_capacity(ids.to(torch.int8), 5, 1.0)
    assert torch.equal(small.ids, kept)
    # ⌈1.1 · 100 / 10⌉ is 11, though 1.1 · 100 is more than 110 in floating point.
    assert int(drop_over_capacity(torch.zeros(100, 1).long(), 10, 1.1).n_dropped[0]) == 89
    kept, dropped = drop_over_capacity(ids, 5, 10.0)
    assert torch.equal(kept, ids)
    assert not dropped.any()
    assert drop_over_capacity(ids[:0], 5, 1.0).ids.shape == (0, 2)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"counts must have shape \(E,\)"):
        load_metrics(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="bias and counts must have one shape"):
        update_selection_bias(torch.zeros(3), torch.zeros(4))
    for factor in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="capacity_factor must be a finite number > 0"):
            drop_over_capacity(torch.zeros(2, 1, dtype=torch.int64), 3, factor)
