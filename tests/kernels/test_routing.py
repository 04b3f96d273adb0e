"""route_topk against its float64 oracle: values, order, gradients, ties, groups, non-finite logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.kernels import reference
from moesaic.kernels.routing import Routing, load_balance_loss, route_topk

VARIANTS: list[dict[str, Any]] = [
    {"scoring": scoring, "renormalize": renormalize, "scale": scale, "biased": biased, **groups}
    for scoring in ("softmax", "softmax_topk", "sigmoid")
    for renormalize, scale in ((False, 1.0), (True, 2.5))
    for biased in (False, True)
    for groups in (
        {},
        {"n_groups": 4, "top_k_groups": 2, "group_score": "top2"},
        {"n_groups": 4, "top_k_groups": 3, "group_score": "max"},
    )
]


def scaled_error(got: Tensor, truth: Tensor) -> float:
    assert got.shape == truth.shape
    if truth.numel() == 0:
        return 0.0
    got, truth = got.detach().double(), truth.detach()
    return float((got - truth).abs().max() / truth.square().mean().sqrt().clamp_min(1e-300))


def draw(n_tokens: int, n_experts: int, seed: int = 0) -> Tensor:
    return torch.randn(n_tokens, n_experts, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("impl", ["fused", "torch"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_values_and_gradient_match_the_oracle(variant: dict[str, Any], impl: str) -> None:
    options = dict(variant)
    logits = draw(63, 16).requires_grad_()
    bias = draw(1, 16, seed=1)[0] if options.pop("biased") else None
    truth_in = logits.detach().double().requires_grad_()
    weights, ids = route_topk(logits, 3, bias=bias, impl=impl, **options)
    truth, truth_ids = reference.route_topk(truth_in, 3, bias=bias, **options)
    assert torch.equal(ids, truth_ids)
    assert scaled_error(weights, truth) < 1e-6
    upstream = draw(63, 3, seed=2)
    (grad,) = torch.autograd.grad(weights, logits, upstream)
    (truth_grad,) = torch.autograd.grad(truth, truth_in, upstream.double())
    assert scaled_error(grad, truth_grad) < 3e-6


@pytest.mark.parametrize("n_tokens", [0, 1, 7, 63])
@pytest.mark.parametrize(("n_experts", "top_k"), [(1, 1), (2, 1), (7, 7), (64, 8), (65, 2), (1000, 128)])
def test_sizes(n_tokens: int, n_experts: int, top_k: int) -> None:
    logits = draw(n_tokens, n_experts).double()
    weights, ids = route_topk(logits, top_k, scoring="sigmoid", renormalize=True)
    truth, truth_ids = reference.route_topk(logits, top_k, scoring="sigmoid", renormalize=True)
    assert torch.equal(ids, truth_ids)
    assert ids.dtype == torch.int64
    assert scaled_error(weights, truth) < 1e-14


@pytest.mark.parametrize("n_tokens", [0, 1, 7, 1000])
@pytest.mark.parametrize("n_experts", [1, 2, 7, 64, 65, 1000, 4096])
@pytest.mark.parametrize("top_k", [1, 2, 7, 8, -1])
def test_the_fused_pass_and_pytorch_agree(n_tokens: int, n_experts: int, top_k: int) -> None:
    k = min(n_experts, top_k) if top_k > 0 else min(n_experts, 128)
    logits = draw(min(n_tokens, 200_000 // n_experts), n_experts, seed=3).requires_grad_()
    upstream, found = draw(logits.shape[0], k, seed=4), []
    for impl, values in (("fused", logits), ("torch", logits), ("torch", logits.detach().double().requires_grad_())):
        (weights, ids), statistics = route_topk(values, k, return_statistics=True, impl=impl)
        total = (weights * upstream).sum() + 3.0 * statistics.load_balance_loss + statistics.z_loss
        found.append((ids, statistics.counts, weights, *statistics[1:], torch.autograd.grad(total, values)[0]))
    fused, plain, truth = found
    assert torch.equal(fused[0], plain[0])
    assert torch.equal(fused[1], plain[1])
    for ours, theirs, exact in zip(fused[2:], plain[2:], truth[2:], strict=True):
        assert scaled_error(ours, exact) < max(1e-6, 3 * scaled_error(theirs, exact))


def test_the_statistics_are_their_definitions() -> None:
    logits = draw(50, 6).double().requires_grad_()
    for impl, values in (("torch", logits), ("fused", logits.float())):
        (_, ids), found = route_topk(values, 2, return_statistics=True, impl=impl)
        allowed = 1e-6 if impl == "fused" else 1e-13
        assert found.counts.tolist() == [int((ids == e).sum()) for e in range(6)]
        expected = load_balance_loss(logits, ids)
        assert float((found.load_balance_loss - expected).detach().abs()) < allowed
        assert float((found.z_loss - torch.logsumexp(logits, -1).square().mean()).detach().abs()) < 5 * allowed
        assert float((found.mean_probs - torch.softmax(logits, -1).mean(0)).detach().abs().max()) < allowed
    logits = draw(50, 6)
    logits[3, 2] = torch.nan
    (_, ids), found = route_topk(logits, 2, return_statistics=True)
    assert int(found.counts.sum()) == 49 * 2
    assert found.z_loss.isnan()
    empty = route_topk(logits[:0], 2, return_statistics=True)[1]
    assert (empty.counts.tolist(), float(empty.load_balance_loss), float(empty.z_loss)) == ([0] * 6, 0.0, 0.0)


def test_rows_without_weights_count_nowhere() -> None:
    logits = draw(4, 6)
    logits[1, 2], logits[2] = torch.inf, -torch.inf
    for impl in ("fused", "torch"):
        (weights, _), found = route_topk(logits, 2, return_statistics=True, impl=impl)
        assert weights.isnan().any(1).tolist() == [False, True, True, False]
        assert int(found.counts.sum()) == 4


@pytest.mark.parametrize("impl", ["fused", "torch"])
def test_an_infinite_score_makes_its_group_the_first(impl: str) -> None:
    logits = draw(1, 6)
    logits[0, 2], logits[0, 3] = torch.inf, -torch.inf
    options: dict[str, Any] = {"scoring": "softmax_topk", "n_groups": 3, "top_k_groups": 1, "impl": impl}
    assert route_topk(logits, 2, **options).ids.tolist() == [[2, 3]]


@pytest.mark.parametrize("impl", ["fused", "torch"])
def test_ties_can_be_broken_by_row(impl: str) -> None:
    level = torch.zeros(4000, 24)
    level[:, 20:] = -1.0
    ids = route_topk(level, 4, tie_seed=7, impl=impl).ids
    assert torch.equal(ids, route_topk(level, 4, tie_seed=7, impl="torch").ids)
    assert not torch.equal(ids, route_topk(level, 4, tie_seed=8, impl=impl).ids)
    counts = torch.bincount(ids.flatten(), minlength=24)
    assert counts[20:].sum() == 0
    # 800 each if every order were equally likely; lowest id first gives 4000 to four and 0 to the rest.
    assert 600 < int(counts[:20].min()) <= int(counts[:20].max()) < 1000
    distinct = draw(100, 24)
    assert torch.equal(route_topk(distinct, 4, tie_seed=7, impl=impl).ids, route_topk(distinct, 4, impl=impl).ids)
    grouped = route_topk(level, 4, tie_seed=7, n_groups=6, top_k_groups=2, impl=impl).ids
    assert int(grouped.max()) == 7  # equal groups go by number; experts inside them by the row's order
    assert len(grouped.unique(dim=0)) > 50


def test_bits_repeat_whatever_the_threads() -> None:
    import numba

    logits, threads = draw(5000, 40).requires_grad_(), numba.get_num_threads()

    def bits() -> list[Tensor]:
        routing, statistics = route_topk(logits, 3, return_statistics=True, impl="fused")
        total = routing.weights.square().sum() + statistics.z_loss + statistics.load_balance_loss
        return [*routing, *statistics, *torch.autograd.grad(total, logits)]

    first = bits()
    numba.set_num_threads(1)
    try:
        assert all(torch.equal(a, b) for a, b in zip(first, bits(), strict=True))
    finally:
        numba.set_num_threads(threads)


def test_the_op_is_well_registered() -> None:
    logits, bias = draw(9, 8).requires_grad_(), draw(1, 8)[0]
    for options in ((2, 0, 0, 0, 0, False, 1.0, -1, True), (3, 2, 4, 2, 1, True, 2.0, 5, False)):
        torch.library.opcheck(torch.ops.moesaic.route_topk.default, (logits, bias, *options))


def test_leading_dimensions_and_large_expert_counts() -> None:
    logits = draw(6, 100_000)
    flat = route_topk(logits, 8)
    shaped = route_topk(logits.view(2, 3, -1), 8)
    assert torch.equal(shaped.ids, flat.ids.view(2, 3, 8))
    assert torch.equal(shaped.weights, flat.weights.view(2, 3, 8))
    truth = torch.softmax(logits.double(), -1).topk(8).values.float()
    torch.testing.assert_close(flat.weights, truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scoring", ["softmax", "softmax_topk", "sigmoid"])
def test_ties_go_to_the_lowest_id(dtype: torch.dtype, scoring: str) -> None:
    levels = torch.randint(-2, 3, (200, 40), generator=torch.Generator().manual_seed(0)).to(dtype)
    levels[0] = 0.0
    levels[0, ::2] = -0.0
    levels[1] = -torch.inf
    levels[1, 5] = 1.0
    ids = route_topk(levels, 9, scoring=scoring).ids
    assert ids[0].tolist() == list(range(9))
    assert ids[1].tolist() == [5, 0, 1, 2, 3, 4, 6, 7, 8]
    expected = [sorted(range(40), key=lambda e: (-row[e], e))[:9] for row in levels.double().tolist()]
    assert ids.tolist() == expected


def test_ties_among_groups_go_to_the_lowest_group_and_excluded_experts_stay_out() -> None:
    logits = torch.full((1, 8), -torch.inf)
    logits[0, 6:] = 1.0
    ids = route_topk(logits, 4, scoring="sigmoid", n_groups=4, top_k_groups=2, group_score="max").ids
    assert ids.tolist() == [[6, 7, 0, 1]]


@pytest.mark.parametrize("group_score", ["top2", "max"])
def test_ties_across_groups_go_to_the_lowest_id(group_score: str) -> None:
    levels = torch.randint(-2, 3, (200, 24), generator=torch.Generator().manual_seed(0)).float()
    options: dict[str, Any] = {"n_groups": 6, "top_k_groups": 3, "group_score": group_score, "scoring": "softmax_topk"}
    ids = route_topk(levels, 5, bias=torch.zeros(24), **options).ids
    assert torch.equal(ids, reference.route_topk(levels, 5, **options)[1])


@pytest.mark.parametrize("scoring", ["softmax", "softmax_topk", "sigmoid"])
@pytest.mark.parametrize("where", [0, 5])
@pytest.mark.parametrize("biased", [False, True])
def test_a_nan_poisons_its_row_and_no_other(scoring: str, where: int, biased: bool) -> None:
    logits = draw(4, 6)
    clean = route_topk(logits, 2, scoring=scoring, bias=torch.zeros(6) if biased else None)
    logits[2, where] = torch.nan
    logits.requires_grad_()
    weights, ids = route_topk(logits, 2, scoring=scoring, bias=torch.zeros(6) if biased else None)
    assert weights[2].isnan().all()
    assert ids[2].tolist() == [0, 1]
    others = [0, 1, 3]
    assert torch.equal(ids[others], clean.ids[others])
    assert torch.equal(weights[others], clean.weights[others])
    (grad,) = torch.autograd.grad(weights[others].sum() * 2.0, logits)
    assert not grad[others].isnan().any()


def test_infinities() -> None:
    logits = torch.tensor([[torch.inf, 0.0, 1.0], [-torch.inf, 0.0, 1.0]])
    softmax = route_topk(logits, 2)
    assert softmax.weights[0].isnan().all()
    assert softmax.ids[1].tolist() == [2, 1]
    sigmoid = route_topk(logits, 2, scoring="sigmoid")
    assert sigmoid.ids.tolist() == [[0, 2], [2, 1]]
    assert sigmoid.weights[0, 0] == 1.0


def test_saturated_sigmoids_still_rank_by_logit() -> None:
    logits = torch.tensor([[20.0, 30.0, 40.0]])
    assert route_topk(logits, 2, scoring="sigmoid").ids.tolist() == [[2, 1]]


def test_the_bias_picks_but_neither_weighs_nor_learns() -> None:
    logits = draw(32, 8).requires_grad_()
    bias = torch.tensor([100.0, *[0.0] * 7], requires_grad=True)
    weights, ids = route_topk(logits, 1, bias=bias)
    assert ids.eq(0).all()
    torch.testing.assert_close(weights[:, 0], torch.softmax(logits, -1)[:, 0], rtol=1e-6, atol=0)
    assert torch.autograd.grad(weights.sum(), bias, allow_unused=True)[0] is None


@pytest.mark.parametrize("scoring", ["softmax", "softmax_topk", "sigmoid"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_gradcheck(scoring: str, renormalize: bool) -> None:
    logits = draw(5, 7).double().requires_grad_()

    def weights(logits: Tensor) -> Tensor:
        return route_topk(logits, 3, scoring=scoring, renormalize=renormalize, scale=1.5).weights

    assert torch.autograd.gradcheck(weights, (logits,))
    assert torch.autograd.gradgradcheck(weights, (logits,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_give_float32_weights(dtype: torch.dtype) -> None:
    logits = draw(50, 12).to(dtype).requires_grad_()
    weights, _ = route_topk(logits, 2)
    assert weights.dtype == torch.float32
    assert scaled_error(weights.detach(), reference.route_topk(logits.detach().double(), 2)[0]) < 1e-6
    assert torch.autograd.grad(weights.sum(), logits)[0].dtype == dtype


def test_compiles_without_a_graph_break() -> None:
    def route(logits: Tensor, bias: Tensor) -> Routing:
        return route_topk(logits, 3, scoring="sigmoid", bias=bias, n_groups=4, top_k_groups=2, renormalize=True)

    logits, bias = draw(9, 16), draw(1, 16)[0]
    compiled = torch.compile(route, fullgraph=True, backend="aot_eager")(logits, bias)
    assert torch.equal(compiled.ids, route(logits, bias).ids)
    assert torch.equal(compiled.weights, route(logits, bias).weights)


def test_load_balance_loss() -> None:
    n_experts = 4
    one = torch.zeros(10, 1, dtype=torch.int64)
    assert load_balance_loss(torch.zeros(10, n_experts), one) == 1.0
    extreme = torch.full((10, n_experts), -100.0)
    extreme[:, 0] = 100.0
    assert load_balance_loss(extreme, one) == n_experts
    logits = draw(50, n_experts).double().requires_grad_()
    ids = route_topk(logits, 2).ids
    share = torch.stack([(ids == e).double().mean() for e in range(n_experts)])
    expected = n_experts * (share * torch.softmax(logits, -1).mean(0)).sum()
    torch.testing.assert_close(load_balance_loss(logits, ids), expected, rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(lambda x: load_balance_loss(x, ids), (logits,))
    assert load_balance_loss(torch.zeros(0, n_experts), one[:0]) == 0.0
    sentinel = torch.full((10, 1), n_experts)
    assert load_balance_loss(torch.zeros(10, n_experts), sentinel) == 0.0


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("top_k must be between 1 and n_experts = 4, got 5", lambda x: route_topk(x, 5)),
        ("top_k must be between 1 and n_experts = 4, got 0", lambda x: route_topk(x, 0)),
        ("scoring must be one of softmax, softmax_topk, sigmoid, got 'max'", lambda x: route_topk(x, 1, scoring="max")),
        (r"bias must have shape \(4,\), got \(3,\)", lambda x: route_topk(x, 1, bias=torch.zeros(3))),
        ("n_groups and top_k_groups go together", lambda x: route_topk(x, 1, n_groups=2)),
        ("n_groups must divide n_experts = 4, got 3", lambda x: route_topk(x, 1, n_groups=3, top_k_groups=1)),
        ("top_k_groups must be between 1 and n_groups = 2", lambda x: route_topk(x, 1, n_groups=2, top_k_groups=3)),
        ("top_k must be at most .* = 2, got 3", lambda x: route_topk(x, 3, n_groups=2, top_k_groups=1)),
        (
            "group_score must be one of top2, max, got 'sum'",
            lambda x: route_topk(x, 1, n_groups=2, top_k_groups=1, group_score="sum"),
        ),
        ("'top2' takes groups of at least 2 experts", lambda x: route_topk(x, 1, n_groups=4, top_k_groups=1)),
        ("tie_seed must be None or an integer from 0", lambda x: route_topk(x, 1, tie_seed=-1)),
        ("tie_seed must be None or an integer from 0", lambda x: route_topk(x, 1, tie_seed=1.5)),  # type: ignore[call-overload]
        ("top_k must be an integer, got 1.0", lambda x: route_topk(x, 1.0)),  # type: ignore[call-overload]
        ("scale must be a finite number, got nan", lambda x: route_topk(x, 1, scale=float("nan"))),
        ("impl must be one of auto, fused, torch, got 'cuda'", lambda x: route_topk(x, 1, impl="cuda")),
        (
            "impl='fused' takes logits of at most 32 bits, .* got torch.float64",
            lambda x: route_topk(x.double(), 1, impl="fused"),
        ),
        ("logits must be floating point", lambda x: route_topk(x.long(), 1)),
        ("logits must have 1 to", lambda x: route_topk(x[:, :0], 1)),
    ],
)
def test_bad_arguments_are_named(message: str, call: Callable[[Tensor], Routing]) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 4))
