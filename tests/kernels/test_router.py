"""route: projection and top-k in one, against route_topk on the whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from moesaic.kernels import route, route_topk, router

OPTIONS: list[dict[str, Any]] = [
    {},
    {"renormalize": True, "scale": 2.5},
    {"scoring": "sigmoid"},
    {"scoring": "sigmoid", "renormalize": True, "bias": True},
    {"scoring": "softmax_topk", "tie_seed": 3},
    {"scoring": "softmax_topk", "bias": True},
    {"bias": True},
    {"scoring": "sigmoid", "n_groups": 5, "top_k_groups": 2, "renormalize": True},
]


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def scaled_error(got: Tensor, truth: Tensor) -> float:
    truth = truth.detach().double()
    return float((got.detach().double() - truth).abs().max() / truth.square().mean().sqrt().clamp_min(1e-300))


def both(x: Tensor, weight: Tensor, k: int, statistics: bool, **options: Any) -> list[list[Tensor]]:
    found: list[list[Tensor]] = []
    upstream = draw(x.shape[0], k, seed=5)
    for dtype in (torch.float32, torch.float64):
        given = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, weight)]
        found_here: Any
        if dtype == torch.float64:
            found_here = route_topk(F.linear(given[0], given[1]), k, return_statistics=True, **options)
        elif statistics:
            found_here = route(given[0], given[1], k, return_statistics=True, **options)
        else:
            found_here = route(given[0], given[1], k, **options), None
        (weights, ids), more = found_here
        total = (weights * upstream.to(dtype)).sum()
        rest: list[Tensor] = []
        if statistics:
            total, rest = total + 5 * more.load_balance_loss + more.z_loss, list(more)
        found.append([ids, weights, *torch.autograd.grad(total, given), *rest])
    return found


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("n_tokens", "n_experts", "k", "tile"), [(57, 20, 3, 2048), (57, 200, 7, 32), (1, 35, 4, 8)])
def test_it_is_route_topk_of_the_projection(
    n_tokens: int, n_experts: int, k: int, tile: int, options: dict[str, Any], statistics: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(router, "TILE_EXPERTS", tile)
    monkeypatch.setattr(router, "BLOCK_BYTES", 4 * 20 * n_experts)
    x, weight = draw(n_tokens, 12), draw(n_experts, 12, seed=1)
    given = dict(options)
    if given.pop("bias", False):
        given["bias"] = draw(n_experts, seed=2) / 10
    ours, truth = both(x, weight, k, statistics, **given)
    assert torch.equal(ours[0], truth[0])
    for a, b in zip(ours[1:], truth[1:], strict=True):
        assert scaled_error(a, b) < 2e-5


@pytest.mark.parametrize("options", [{"scoring": "sigmoid"}, {"renormalize": True, "tie_seed": 4}], ids=str)
def test_a_million_experts(options: dict[str, Any]) -> None:
    x, weight = draw(3, 4).requires_grad_(), draw(1_000_000, 4, seed=1).requires_grad_()
    weights, ids = route(x, weight, 16, **options)
    expected = route_topk((x @ weight.T).detach(), 16, **options)
    assert torch.equal(ids, expected.ids)
    torch.testing.assert_close(weights, expected.weights, rtol=1e-5, atol=1e-7)
    grad_x, grad_weight = torch.autograd.grad(weights.square().sum(), (x, weight))
    assert int((grad_weight != 0).any(1).sum()) == len(ids.unique())
    assert float(grad_x.abs().max()) > 0


def test_the_tolerance_can_fail() -> None:
    x, weight = draw(57, 12), draw(200, 12, seed=1)
    ours, _ = both(x, weight, 7, True)
    _, truth = both(x.roll(1, 0), weight, 7, True)
    assert all(scaled_error(a, b) > 1e-2 for a, b in zip(ours[1:4], truth[1:4], strict=True))


def test_ties_and_nan_stream_as_they_do_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randint(-1, 2, (200, 3), generator=torch.Generator().manual_seed(0)).float()
    weight = torch.randint(-1, 2, (100, 3), generator=torch.Generator().manual_seed(1)).float()
    x[7, 1] = torch.nan
    for seed in (None, 9):
        whole = route_topk(x @ weight.T, 9, scoring="sigmoid", tie_seed=seed)
        with monkeypatch.context() as patch:
            patch.setattr(router, "TILE_EXPERTS", 16)
            patch.setattr(router, "BLOCK_BYTES", 4 * 16 * 30)
            streamed = route(x, weight, 9, scoring="sigmoid", tie_seed=seed)
        assert torch.equal(streamed.ids, whole.ids)
        assert torch.equal(streamed.weights.isnan(), whole.weights.isnan())
        assert bool(streamed.weights[7].isnan().all())


def test_many_experts_never_make_the_logits() -> None:
    n_tokens, n_experts, k = 3000, 20_000, 32
    x, weight = draw(n_tokens, 8).requires_grad_(), draw(n_experts, 8, seed=1).requires_grad_()
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return out

    with Largest():  # type: ignore[no-untyped-call]
        routing = route(x, weight, k, renormalize=True)
        routing.weights.square().sum().backward()
    logits_bytes = 4 * n_tokens * n_experts
    assert largest <= router.BLOCK_BYTES < logits_bytes / 20
    expected = route_topk(x.detach() @ weight.detach().T, k, renormalize=True)
    assert torch.equal(routing.ids, expected.ids)


@pytest.mark.parametrize("options", [{}, {"renormalize": True}], ids=str)
def test_each_gradient_alone_is_that_of_both(options: dict[str, Any]) -> None:
    x, weight = draw(9, 4), draw(8, 4, seed=1)
    found = []
    for wanted in ((True, True), (True, False), (False, True)):
        given = [tensor.clone().requires_grad_(want) for tensor, want in zip((x, weight), wanted, strict=True)]
        route(given[0], given[1], 2, **options).weights.square().sum().backward()
        found.append([tensor.grad for tensor in given])
    (both_x, both_weight), (only_x, nothing), (nothing_either, only_weight) = found
    assert nothing is nothing_either is None
    for a, b in ((both_x, only_x), (both_weight, only_weight)):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


@pytest.mark.parametrize("tile", [2048, 16])
def test_autocast_changes_nothing(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "TILE_EXPERTS", tile)
    found = []
    for enabled in (False, True):
        x, weight = draw(40, 6).requires_grad_(), draw(50, 6, seed=1).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            weights, ids = route(x, weight, 3)
            found.append([ids, weights, *torch.autograd.grad(weights.square().sum(), (x, weight))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_leading_dimensions_half_precision_and_no_tokens() -> None:
    x, weight = draw(2, 3, 8).bfloat16().requires_grad_(), draw(6, 8, seed=1).bfloat16().requires_grad_()
    weights, ids = route(x, weight, 2, renormalize=True)
    assert (weights.shape, weights.dtype, ids.shape) == ((2, 3, 2), torch.float32, (2, 3, 2))
    assert torch.equal(ids, route_topk(x.float() @ weight.float().T, 2).ids)
    assert torch.autograd.grad(weights.square().sum(), x)[0].dtype == torch.bfloat16
    assert route(x[:0], weight, 2).ids.shape == (0, 3, 2)


def test_registered_counted_and_compiled() -> None:
    x, weight = draw(9, 4).requires_grad_(), draw(8, 4, seed=1).requires_grad_()
    options = (2, 0, 0, 0, 0, False, 1.0, -1, True)
    torch.library.opcheck(torch.ops.moesaic.route.default, (x, weight, None, *options))
    with FlopCounterMode(display=False) as counter:
        routing = route(x, weight, 2)
        assert counter.get_total_flops() == 2 * 9 * 8 * 4
        routing.weights.sum().backward()
    assert counter.get_total_flops() == (2 + 6) * 9 * 8 * 4
    with FlopCounterMode(display=False) as counter:
        route(x, weight, 2, renormalize=True).weights.sum().backward()
    assert counter.get_total_flops() == 2 * 9 * 8 * 4 + 6 * 9 * 2 * 4
    compiled = torch.compile(lambda x: route(x, weight, 2, scoring="sigmoid"), fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(compiled.ids, route(x, weight, 2, scoring="sigmoid").ids)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="x must be floating point"):
        route(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(4, 3), 1)
    with pytest.raises(ValueError, match=r"router_weight must have shape \(E, 3\) and dtype torch.float32"):
        route(torch.zeros(2, 3), torch.zeros(3, 4), 1)
    with pytest.raises(ValueError, match="top_k must be between 1 and n_experts = 4, got 5"):
        route(torch.zeros(2, 3), torch.zeros(4, 3), 5)
