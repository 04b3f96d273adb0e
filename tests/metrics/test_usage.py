from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moesaic.metrics import features_per_dimension
from moesaic.metrics import usage as us

IDS = torch.tensor([[0, 1], [0, 2], [0, 1], [2, 0]])
WEIGHTS = torch.tensor([[0.75, 0.25], [0.5, 0.5], [1.0, 0.0], [0.25, 0.75]])


def random_routing(*batch: int, n_experts: int, top_k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    scores = torch.rand(*batch, n_experts, generator=torch.Generator().manual_seed(seed))
    top = scores.topk(top_k, dim=-1)
    return top.values, top.indices


def test_usage_of_a_routing_counted_by_hand() -> None:
    assert us.expert_usage(IDS, 4).tolist() == [4 / 8, 2 / 8, 2 / 8, 0.0]
    assert us.gate_usage(WEIGHTS, IDS, 4).tolist() == [3.0 / 8, 0.25 / 8, 0.75 / 8, 0.0]
    assert us.mean_active_gate(WEIGHTS, IDS, 4).tolist() == [3.0 / 4, 0.125, 0.375, 0.0]
    assert us.dense_gates(WEIGHTS, IDS, 4)[3].tolist() == [0.75, 0.0, 0.25, 0.0]


def test_stacked_models_are_counted_apart() -> None:
    weights, ids = random_routing(2, 3, 50, n_experts=5, top_k=2)
    for i in range(2):
        for j in range(3):
            assert torch.equal(us.expert_usage(ids, 5)[i, j], us.expert_usage(ids[i, j], 5))
            assert torch.equal(us.gate_usage(weights, ids, 5)[i, j], us.gate_usage(weights[i, j], ids[i, j], 5))
            dense = us.dense_gates(weights[i, j], ids[i, j], 5)
            torch.testing.assert_close(us.gate_usage(weights, ids, 5)[i, j], dense.mean(0) / 2, rtol=1e-12, atol=0)


def test_folding_and_counting_gives_the_gate_weighted_features_per_dimension() -> None:
    weights, ids = random_routing(300, n_experts=4, top_k=2)
    weight = torch.randn(4, 9, 3, generator=torch.Generator().manual_seed(1))
    folded = us.mean_active_gate(weights, ids, 4).sqrt()[:, None, None] * weight
    counted = features_per_dimension(folded, us.expert_usage(ids, 4))
    torch.testing.assert_close(
        counted, features_per_dimension(weight, us.gate_usage(weights, ids, 4)), rtol=1e-12, atol=0
    )


def test_effective_experts_between_collapse_and_balance() -> None:
    usage = torch.tensor([[1.0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0, 0]])
    torch.testing.assert_close(us.effective_experts(usage), torch.tensor([1.0, 4.0, 2.0]).double(), rtol=1e-12, atol=0)
    assert us.dead_experts(usage).tolist() == [3, 0, 2]
    assert us.load_imbalance(usage).tolist() == [4.0, 1.0, 2.0]
    skewed = us.effective_experts(torch.tensor([0.9, 0.1]))
    assert float(skewed) == pytest.approx(math.exp(-0.9 * math.log(0.9) - 0.1 * math.log(0.1)), rel=1e-6)


def test_counts_serve_as_usage_and_one_expert_is_one() -> None:
    assert torch.equal(us.effective_experts(torch.tensor([3, 1])), us.effective_experts(torch.tensor([0.75, 0.25])))
    one = us.expert_usage(torch.zeros(7, 1, dtype=torch.int64), 1)
    assert one.tolist() == [1.0]
    assert float(us.effective_experts(one)) == float(us.load_imbalance(one)) == 1.0
    assert int(us.dead_experts(one)) == 0


def test_expert_presence_counts_only_inputs_with_the_feature() -> None:
    x = torch.tensor([[0.5, 0.0, 0.0], [0.1, 0.2, 0.0], [0.0, 0.3, 0.0], [0.2, 0.0, 0.0]])
    presence = us.expert_presence(x, torch.tensor([[0], [0], [1], [1]]), 2)
    torch.testing.assert_close(presence[:, :2], torch.tensor([[2 / 3, 1 / 2], [1 / 3, 1 / 2]]).double())
    assert bool(presence[:, 2].isnan().all())
    both = us.expert_presence(x, torch.tensor([[0, 1]]).expand(4, 2), 2)
    assert both[:, :2].tolist() == [[1.0, 1.0], [1.0, 1.0]]


def represented_by_loops(norms: Tensor, gates: Tensor, x: Tensor) -> tuple[float, int, float, Tensor]:
    """Return share, dead features, mean over represented presences of v[e, i] = 10·e + i, and carried, by loops."""
    n_experts, n = norms.shape
    values = 10.0 * torch.arange(n_experts)[:, None] + torch.arange(n)
    present = represented = 0
    total = 0.0
    carried = torch.zeros(n_experts, n, dtype=torch.float64)
    for b in range(len(x)):
        for i in range(n):
            if x[b, i] == 0:
                continue
            present += 1
            parts = [float(gates[b, e]) * float(norms[e, i]) ** 2 for e in range(n_experts)]
            if sum(parts) > 0.5:
                represented += 1
                for e in range(n_experts):
                    carried[e, i] += parts[e] / sum(parts)
                    total += parts[e] / sum(parts) * float(values[e, i])
    dead = sum(bool((x[:, i] != 0).any()) and float(carried[:, i].sum()) == 0 for i in range(n))
    return represented / present, dead, total / represented, carried


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("block", [2**21, 40])
def test_represented_features_as_defined(top_k: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(us, "_BLOCK_ELEMENTS", block)
    generator = torch.Generator().manual_seed(3)
    weights, ids = random_routing(60, n_experts=4, top_k=top_k)
    gates = us.dense_gates(weights, ids, 4)
    norms = 1.5 * torch.rand(4, 12, generator=generator).double() / math.sqrt(top_k)
    norms[:, 5] = 0.1
    x = torch.rand(60, 12, generator=generator) * (torch.rand(60, 12, generator=generator) < 0.3)
    x[:, 7] = 0
    share, dead, mean, carried = represented_by_loops(norms, gates, x)
    got = us.represented_features(norms, gates, x)
    assert 0.1 < share < 0.9
    assert dead >= 1
    assert float(got.share) == pytest.approx(share, rel=1e-12)
    assert int(got.dead_features) == dead
    torch.testing.assert_close(got.carried, carried, rtol=1e-12, atol=1e-15)
    values = 10.0 * torch.arange(4)[:, None] + torch.arange(12)
    assert float(got.mean(values)) == pytest.approx(mean, rel=1e-12)


def test_experts_that_represent_a_feature_together_represent_it() -> None:
    norms = torch.ones(4, 1)
    alone = us.represented_features(norms, torch.tensor([[0.25, 0, 0, 0]]), torch.ones(1, 1))
    together = us.represented_features(norms, torch.full((1, 4), 0.25), torch.ones(1, 1))
    assert float(alone.share) == 0.0
    assert float(together.share) == 1.0
    assert together.carried.flatten().tolist() == [0.25] * 4


def test_nothing_represented_or_present_is_undefined() -> None:
    empty = us.represented_features(torch.zeros(1, 3), torch.ones(5, 1), torch.ones(5, 3))
    assert float(empty.share) == 0.0
    assert math.isnan(float(empty.mean(torch.ones(1, 3))))
    assert int(empty.dead_features) == 3
    absent = us.represented_features(torch.ones(1, 3), torch.ones(5, 1), torch.zeros(5, 3))
    assert math.isnan(float(absent.share))
    assert int(absent.dead_features) == 0


def test_undefined_values_of_features_that_nobody_carries_do_not_spread() -> None:
    got = us.represented_features(torch.tensor([[1.0, 0.0]]), torch.ones(4, 1), torch.ones(4, 2))
    assert float(got.mean(torch.tensor([[0.5, math.nan]]))) == 0.5


def test_stacked_models_share_or_own_their_inputs() -> None:
    generator = torch.Generator().manual_seed(5)
    norms = torch.rand(2, 3, 6, generator=generator) * 2
    weights, ids = random_routing(2, 20, n_experts=3, top_k=1)
    gates = us.dense_gates(weights, ids, 3)
    x = torch.rand(20, 6, generator=generator)
    shared = us.represented_features(norms, gates, x)
    owned = us.represented_features(norms, gates, torch.stack([x, x]))
    for i in range(2):
        alone = us.represented_features(norms[i], gates[i], x)
        torch.testing.assert_close(shared.carried[i], alone.carried, rtol=1e-12, atol=0)
        torch.testing.assert_close(owned.carried[i], alone.carried, rtol=1e-12, atol=0)
    assert shared.share.shape == shared.dead_features.shape == (2,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: us.expert_usage(torch.zeros(0, 1, dtype=torch.int64), 2), r"ids has shape \(0, 1\)"),
        (lambda: us.expert_usage(torch.zeros(3, dtype=torch.int64), 2), r"ids has shape \(3,\)"),
        (lambda: us.expert_usage(torch.zeros(3, 1), 2), r"dtype torch\.float32"),
        (lambda: us.expert_usage(torch.tensor([[2]]), 2), r"values from 2 to 2: takes 0 to n_experts - 1 = 1"),
        (lambda: us.expert_usage(torch.tensor([[-1]]), 2), r"values from -1 to -1"),
        (lambda: us.gate_usage(torch.ones(4, 1), IDS, 4), r"weights has shape \(4, 1\).*\(4, 2\)"),
        (lambda: us.dense_gates(torch.ones(4, 1), IDS, 4), r"weights has shape \(4, 1\)"),
        (lambda: us.effective_experts(torch.zeros(0)), r"usage has shape \(0,\).*non-empty"),
        (lambda: us.effective_experts(torch.zeros(3)), r"usage=\[0\.0, 0\.0, 0\.0\].*sum > 0"),
        (lambda: us.dead_experts(torch.tensor([1.0, -1.0])), r"usage=\[1\.0, -1\.0\].*>= 0"),
        (lambda: us.load_imbalance(torch.tensor([1.0, math.nan])), r"usage=\[1\.0, nan\].*finite"),
        (lambda: us.expert_presence(torch.ones(3, 2), IDS, 4), r"x has shape \(3, 2\).*\(4,\)"),
        (
            lambda: us.represented_features(torch.ones(2, 3), torch.ones(4, 3), torch.ones(4, 3)),
            r"gates has shape \(4, 3\)",
        ),
        (
            lambda: us.represented_features(torch.ones(2, 3), torch.ones(4, 2), torch.ones(4, 5)),
            r"x has shape \(4, 5\).*n = 3",
        ),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
