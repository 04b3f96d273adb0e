"""Router projection and top-k routing as one op that never holds the (T, E) logits.

    l = x Wᵀ,   (w, A) = route_topk(l)

Tokens are taken in blocks. A row of few experts is routed as soon as its logits are there; many experts stream past in
tiles, and a row keeps its k best keys so far and the running log-sum-exp. The backward pass makes logits again, block
by block; where only the chosen experts have a gradient (all but softmax over all experts without renormalising, and the
statistics' losses), on a CPU it touches only those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, Unpack, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moesaic.kernels import routing_eager, routing_op
from moesaic.kernels._accounting import Call, Work, register_work, up_to
from moesaic.kernels._autocast import linear, no_autocast
from moesaic.kernels._extras import numba_twin
from moesaic.kernels._threads import in_parts
from moesaic.kernels.dispatch import group_by_expert
from moesaic.kernels.routing import Routing, RoutingStatistics, statistics_of
from moesaic.kernels.routing_options import SCORINGS, RoutingKeywords, RoutingOptions, checked_options

BLOCK_BYTES, GPU_BLOCK_BYTES = 2**23, 2**28
"""Logits that exist at once."""
TILE_EXPERTS = 2048
"""Experts of a tile; a row of no more does not stream."""
_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@overload
def route(
    x: Tensor,
    router_weight: Tensor,
    top_k: int,
    *,
    return_statistics: Literal[False] = ...,
    **keywords: Unpack[RoutingKeywords],
) -> Routing: ...


@overload
def route(
    x: Tensor,
    router_weight: Tensor,
    top_k: int,
    *,
    return_statistics: Literal[True],
    **keywords: Unpack[RoutingKeywords],
) -> tuple[Routing, RoutingStatistics]: ...


def route(
    x: Tensor,
    router_weight: Tensor,
    top_k: int,
    *,
    return_statistics: bool = False,
    **keywords: Unpack[RoutingKeywords],
) -> Routing | tuple[Routing, RoutingStatistics]:
    """Return `route_topk(x Wᵀ, top_k, …)` without the (T, E) logits; differentiable in `x` and `router_weight`.

    Logits are float32, under autocast too. Beyond inputs and results, memory is a block of logits, and in the backward
    pass one of their gradients, on a CPU at most 8 MiB each, on a GPU 256 MiB, or one token's row; and some 50 bytes
    for each of the T·k choices. 16-bit inputs are copied to float32. On a GPU, up to 256 experts are projected and
    routed by one kernel, which writes no logits. For float64, without Numba, and on a GPU for groups or statistics of
    more than 1,024 experts, logits are made whole.

    Args:
        x: (..., d) floating point.
        router_weight: W, (E, d), of the dtype of `x`.
        top_k: k, experts per token.
        return_statistics: also return `RoutingStatistics`.
        keywords: ``scoring``, ``bias``, ``n_groups``, ``top_k_groups``, ``group_score``, ``renormalize``, ``scale`` and
            ``tie_seed`` of `route_topk`.

    Raises:
        ValueError: naming the argument, its value and what it takes.
    """
    if x.ndim < 1 or not x.is_floating_point():
        raise ValueError(f"x must be floating point (..., d), got {x.dtype} {tuple(x.shape)}")
    if router_weight.ndim != 2 or router_weight.shape[1] != x.shape[-1] or router_weight.dtype != x.dtype:
        raise ValueError(
            f"router_weight must have shape (E, {x.shape[-1]}) and dtype {x.dtype}, "
            f"got {tuple(router_weight.shape)} {router_weight.dtype}"
        )
    options = checked_options(router_weight.shape[0], top_k, statistics=return_statistics, **keywords)
    bias = keywords.get("bias")
    rows = x.reshape(-1, x.shape[-1])
    if x.dtype != torch.float64 and routing_op.can_fuse(x.device, router_weight.shape[0], options):
        weights, ids, lse, counts, prob_sums = _route(rows, router_weight, _detached(bias), *options)
        statistics = statistics_of(rows.shape[0], top_k, lse, counts, prob_sums) if return_statistics else None
    else:
        dtype = torch.promote_types(x.dtype, torch.float32)
        logits = linear(rows.to(dtype), router_weight.to(dtype))
        weights, ids = routing_eager.route(logits, bias, options)
        sums = routing_eager.statistics(logits, ids, weights) if return_statistics else None
        statistics = None if sums is None else statistics_of(rows.shape[0], top_k, *sums)
    shape = (*x.shape[:-1], top_k)
    routing = Routing(weights.view(shape), ids.view(shape))
    return routing if statistics is None else (routing, statistics)


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


@torch.library.custom_op("moesaic::route", mutates_args=())
def _route(
    x: Tensor, weight: Tensor, bias: Tensor | None, top_k: int, scoring: int, n_groups: int, top_k_groups: int,
    group_score: int, renormalize: bool, scale: float, tie_seed: int, statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Weights, ids, log-sum-exp, counts and Σ_t softmax of the logits x Wᵀ."""
    options = RoutingOptions(
        top_k, scoring, n_groups, top_k_groups, group_score, renormalize, scale, tie_seed, statistics
    )
    with no_autocast(x.device.type):
        return _routed(x, weight, None if bias is None else bias.contiguous(), options)


@_route.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, top_k: int, *options: Any) -> _Outputs:
    weights = x.new_empty(x.shape[0], top_k, dtype=torch.float32)
    counts = x.new_empty(weight.shape[0], dtype=torch.int64)
    lse = weights.new_empty(x.shape[0] if options[-1] else 0)
    return weights, x.new_empty(x.shape[0], top_k, dtype=torch.int64), lse, counts, weights.new_empty(weight.shape[0])


def _routed(x: Tensor, weight: Tensor, bias: Tensor | None, options: RoutingOptions) -> _Outputs:
    statistics, top_k = options.statistics, options.top_k
    n_experts, device = weight.shape[0], x.device
    if device.type == "cuda":
        from moesaic.kernels import routing_triton

        if n_experts <= routing_triton.MAX_PROJECTED_EXPERTS:
            with torch.cuda.device_of(x):
                return routing_triton.route(x.contiguous(), bias, options, router=weight.contiguous())
    x, weight = x.float().contiguous(), weight.float().contiguous()
    if device.type == "cpu" and n_experts > TILE_EXPERTS and not _is_whole(bias, options):
        return _streamed(x, weight, bias, options)
    outputs: _Outputs = (
        torch.empty(len(x), top_k, device=device),
        torch.empty(len(x), top_k, dtype=torch.int64, device=device),
        torch.empty(len(x) if statistics else 0, device=device),
        torch.zeros(n_experts, dtype=torch.int64, device=device),
        torch.zeros(n_experts, dtype=torch.float64, device=device),
    )
    for block in _blocks(len(x), n_experts, device):
        found = routing_op.route_rows(x[block] @ weight.T, bias, options, first_row=block.start)
        for whole_part, part in zip(outputs[: 3 if statistics else 2], found, strict=False):
            whole_part[block] = part
        outputs[3].add_(found[3])
        outputs[4].add_(found[4])
    return (*outputs[:4], outputs[4].float())


def _is_whole(bias: Tensor | None, options: RoutingOptions) -> bool:
    """Whether a row is needed whole: to rank by probabilities or by groups, and for sums of probabilities."""
    by_probability = bias is not None and SCORINGS[options.scoring] == "softmax"
    return options.statistics or options.n_groups > 0 or by_probability


def _blocks(n_rows: int, n_experts: int, device: torch.device) -> Iterator[slice]:
    size = max(1, (BLOCK_BYTES if device.type == "cpu" else GPU_BLOCK_BYTES) // (4 * n_experts))
    for start in range(0, n_rows, size):
        yield slice(start, min(start + size, n_rows))


def _streamed(x: Tensor, weight: Tensor, bias: Tensor | None, options: RoutingOptions) -> _Outputs:
    twin, (n_rows, n_experts), k = numba_twin("routing_cpu"), (len(x), len(weight)), options.top_k
    values = torch.empty(n_rows, k)
    mask, softmax = (1 << (n_experts - 1).bit_length()) - 1, SCORINGS[options.scoring] == "softmax"
    biases = np.zeros(0, np.float32) if bias is None else bias.float().numpy()
    best = torch.full((n_rows, k), -(2**63), dtype=torch.int64)
    tops, totals = torch.full((n_rows,), -torch.inf), torch.zeros(n_rows)
    nans = torch.zeros(n_rows, dtype=torch.bool)
    for block in _blocks(n_rows, TILE_EXPERTS, x.device):
        part = x[block]
        for first in range(0, n_experts, TILE_EXPERTS):
            tile = (part @ weight[first : first + TILE_EXPERTS].T).numpy()
            state = [tensor[block].numpy() for tensor in (best, tops, totals, nans)]
            given = (
                tile, first, mask, biases, bias is not None, SCORINGS[options.scoring] == "sigmoid", softmax,
                options.tie_seed, block.start, *state,
            )  # fmt: skip
            _over_rows(partial(_with_rows, twin.stream_rows, given), len(part))
    ids, chosen = best.numpy(), values.numpy()  # an id takes the place of its key
    twin.finish_rows(0, n_rows, ids, mask, options.tie_seed, nans.numpy(), ids, chosen)
    if bias is not None:
        _over_rows(partial(_with_rows, twin.chosen_logits, (x.numpy(), weight.numpy(), ids, chosen)), n_rows)
    weights = _weigh(values, tops, totals, options).masked_fill_(nans[:, None], torch.nan)
    return weights, best, torch.empty(0), torch.zeros(n_experts, dtype=torch.int64), torch.zeros(n_experts)


def _with_rows(function: Callable[..., None], given: tuple[Any, ...], begin: int, end: int) -> None:
    function(begin, end, *given)


def _weigh(chosen: Tensor, tops: Tensor, totals: Tensor, options: RoutingOptions) -> Tensor:
    """Turn the chosen logits (T, k) into gate weights, in place."""
    scoring = SCORINGS[options.scoring]
    if scoring == "softmax_topk":
        return torch.softmax(chosen, -1).mul_(options.scale)
    scores = chosen.sigmoid_() if scoring == "sigmoid" else chosen.sub_(tops[:, None]).exp_().div_(totals[:, None])
    if options.renormalize and options.top_k == 1:
        scores.mul_(0).add_(1)
    elif options.renormalize:
        scores.div_(scores.sum(-1, keepdim=True) + 1e-20)
    return scores.mul_(options.scale)


def _over_rows(part: Callable[[int, int], None], n_rows: int) -> None:
    """Call ``part`` with ranges of rows, whose results do not depend on where they are cut."""
    threads = numba_twin("routing_cpu").get_num_threads()
    size = max(32, -(-n_rows // (4 * threads)))
    pieces = [(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]
    in_parts(lambda number: part(*pieces[number]), len(pieces), threads)


@torch.library.custom_op("moesaic::route_backward", mutates_args=())
def _route_backward(
    x: Tensor, weight: Tensor, weights: Tensor, ids: Tensor, grad_weights: Tensor, grad_probs: Tensor | None,
    grad_lse: Tensor | None, scoring: int, renormalize: bool, scale: float, for_x: bool, for_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dL/dx and dL/dW; what is not wanted is empty."""
    options = RoutingOptions(ids.shape[1], scoring, 0, 0, 0, renormalize, scale, -1, False)
    with no_autocast(x.device.type):
        return _gradients(x, weight, weights, ids, grad_weights, grad_probs, grad_lse, options, for_x, for_weight)


def _gradients(
    x: Tensor, weight: Tensor, weights: Tensor, ids: Tensor, grad_weights: Tensor, grad_probs: Tensor | None,
    grad_lse: Tensor | None, options: RoutingOptions, for_x: bool, for_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows, matrix, grad_weights = x.float().contiguous(), weight.float().contiguous(), grad_weights.contiguous()
    if x.device.type != "cpu" or _is_dense(options, grad_probs, grad_lse):
        grad_x = torch.empty_like(rows) if for_x else rows.new_empty(0)
        grad_weight = torch.zeros_like(matrix) if for_weight else rows.new_empty(0)
        for block in _blocks(len(rows), len(matrix), x.device):
            logits = rows[block] @ matrix.T
            towards = None if grad_lse is None else grad_lse[block].contiguous()
            grads = routing_op.route_rows_backward(
                logits, weights[block], ids[block], grad_weights[block], grad_probs, towards, options
            )
            if for_x:
                torch.mm(grads, matrix, out=grad_x[block])
            if for_weight:
                grad_weight.addmm_(grads.T, rows[block])
    else:
        grad_x, grad_weight = _sparse_backward(rows, matrix, weights, ids, grad_weights, options, for_x, for_weight)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


@_route_backward.register_fake
def _(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if rest[-2] else (0,)), weight.new_empty(weight.shape if rest[-1] else (0,))


def _is_dense(options: RoutingOptions, grad_probs: Tensor | None, grad_lse: Tensor | None) -> bool:
    dense = SCORINGS[options.scoring] == "softmax" and not options.renormalize
    return dense or grad_probs is not None or grad_lse is not None


def _sparse_backward(
    x: Tensor, weight: Tensor, weights: Tensor, ids: Tensor, grads: Tensor, options: RoutingOptions, for_x: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    twin, (n_rows, k), n_experts = numba_twin("routing_cpu"), ids.shape, len(weight)
    chosen, grad_x, grad_weight = torch.empty(n_rows, k), torch.empty(0), torch.empty(0)
    given, matrix, who = x.numpy(), weight.numpy(), ids.numpy()
    _over_rows(lambda begin, end: twin.chosen_logits(begin, end, given, matrix, who, chosen.numpy()), n_rows)
    if options.renormalize and k == 1:
        inner = torch.zeros_like(chosen)
    elif SCORINGS[options.scoring] == "sigmoid":
        s = torch.sigmoid(chosen)
        inner = grads * options.scale
        if options.renormalize:
            inner = (inner - (weights * grads).sum(-1, keepdim=True)) / (s.sum(-1, keepdim=True) + 1e-20)
        small = (-chosen.abs()).exp()
        inner = inner * small / (1 + small).square()  # s (1 − s) without the loss of digits near s = 1
    else:
        # Renormalised, a softmax over all is one over the chosen.
        mean = (weights * grads).sum(-1, keepdim=True) / (options.scale or 1.0)
        inner = weights * (grads - mean)
    inner = inner.masked_fill(weights.isnan(), torch.nan)
    if for_x:
        grad_x = torch.empty_like(x)
        _over_rows(partial(_with_rows, twin.gather_sum, (inner.numpy(), matrix, who, grad_x.numpy())), n_rows)
    if for_weight:
        grad_weight = torch.zeros_like(weight)
        grouping = group_by_expert(ids, n_experts)
        order = grouping.offsets.numpy(), grouping.permutation.numpy(), k, inner.reshape(-1).numpy(), given
        _over_rows(partial(_with_rows, twin.outer_sum, (*order, grad_weight.numpy())), n_experts)
    return grad_x, grad_weight


def _setup(ctx: Any, inputs: tuple[Any, ...], output: _Outputs) -> None:
    weights, ids = output[:2]
    ctx.save_for_backward(inputs[0], inputs[1], weights, ids)
    ctx.options = inputs[4], inputs[8], inputs[9]
    ctx.mark_non_differentiable(ids, output[3])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_weights: Tensor | None, _ids: None, grad_lse: Tensor | None, _counts: None,
              grad_probs: Tensor | None) -> tuple[Tensor | None, ...]:  # fmt: skip
    x, weight, weights, ids = ctx.saved_tensors
    nothing = (None,) * 10
    if grad_weights is None and grad_lse is None and grad_probs is None:
        return (None, None, *nothing)
    grad_weights = torch.zeros_like(weights) if grad_weights is None else grad_weights
    wanted = ctx.needs_input_grad[:2]
    grads = _route_backward(x, weight, weights, ids, grad_weights, grad_probs, grad_lse, *ctx.options, *wanted)
    return (*(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *nothing)


_route.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.moesaic.route)
def _flops(x_shape: tuple[int, ...], weight_shape: tuple[int, ...], *args: object, **kwargs: object) -> int:
    return 2 * x_shape[0] * weight_shape[0] * weight_shape[1]


@register_flop_formula(torch.ops.moesaic.route_backward)
def _backward_flops(
    x_shape: tuple[int, ...], weight_shape: tuple[int, ...], weights_shape: tuple[int, ...], ids_shape: object,
    grads_shape: object, probs_shape: object, lse_shape: object, scoring: int, renormalize: bool, *args: object,
    **kwargs: object,
) -> int:  # fmt: skip
    """Logits made again, dx and dW if wanted, of all experts or of the chosen ones."""
    products = 1 + sum(bool(wanted) for wanted in args[-2:])
    dense = (SCORINGS[scoring] == "softmax" and not renormalize) or probs_shape is not None or lse_shape is not None
    return 2 * products * x_shape[0] * (weight_shape[0] if dense else weights_shape[1]) * weight_shape[1]


@register_work(torch.ops.moesaic.route)
def _work(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, top_k: int, *options: Any) -> Work:
    """Executed: one kernel's tiles on a GPU; where a CPU streams with a bias, the chosen logits once more."""
    from moesaic.kernels import routing_triton

    (n_tokens, depth), n_experts, given = x.shape, weight.shape[0], RoutingOptions(top_k, *options)
    executed = call.useful
    if x.device.type == "cuda" and n_experts <= routing_triton.MAX_PROJECTED_EXPERTS:
        sizes = routing_triton.constants(x, given, router=weight, biased=bias is not None)
        tokens = up_to(n_tokens, sizes["BLOCK_T"])
        executed = 2 * tokens * up_to(depth, sizes["BLOCK_D"]) * up_to(n_experts, sizes["BLOCK_E"])
    elif x.device.type == "cpu" and n_experts > TILE_EXPERTS and bias is not None and not _is_whole(bias, given):
        executed += 2 * n_tokens * top_k * depth
    return Work(executed, call.useful, call.bytes)


@register_work(torch.ops.moesaic.route_backward)
def _backward_work(
    call: Call, x: Tensor, weight: Tensor, weights: Tensor, ids: Tensor, grad_weights: Tensor,
    grad_probs: Tensor | None, grad_lse: Tensor | None, scoring: int, renormalize: bool, scale: float, for_x: bool,
    for_weight: bool,
) -> Work:  # fmt: skip
    """With every expert on, all have a gradient; a GPU multiplies as if they had in any case."""
    every = 2 * (1 + for_x + for_weight) * x.shape[0] * weight.numel()
    return Work(call.useful if x.device.type == "cpu" else every, every, call.bytes)
