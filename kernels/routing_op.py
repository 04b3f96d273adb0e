"""``moesaic::route_topk`` and its gradient as registered ops: the CPU twin or the Triton kernels, by device."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moesaic.kernels._backend import uses_triton
from moesaic.kernels._extras import numba_twin
from moesaic.kernels._threads import in_parts
from moesaic.kernels.routing_options import RoutingOptions

MAX_EXPERTS = 1024
"""Experts of a row that a Triton kernel holds at once; longer rows stream, without groups and statistics."""
_LEAST_LOGITS, _MOST_PARTS = 2**16, 32
"""Logits of a part, some 100 µs of work, and parts, which keep sums over their rows: independent of the threads."""
_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("moesaic::route_topk", mutates_args=())
def _route(
    logits: Tensor, bias: Tensor | None, top_k: int, scoring: int, n_groups: int, top_k_groups: int, group_score: int,
    renormalize: bool, scale: float, tie_seed: int, statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Weights, ids, log-sum-exp, counts and Σ_t softmax of logits (T, E)."""
    options = RoutingOptions(
        top_k, scoring, n_groups, top_k_groups, group_score, renormalize, scale, tie_seed, statistics
    )
    return route_rows(logits.contiguous(), bias, options)


@_route.register_fake
def _(
    logits: Tensor, bias: Tensor | None, top_k: int, scoring: int, n_groups: int, top_k_groups: int, group_score: int,
    renormalize: bool, scale: float, tie_seed: int, statistics: bool,
) -> _Outputs:  # fmt: skip
    n_rows, n_experts = logits.shape
    weights = logits.new_empty(n_rows, top_k, dtype=torch.float32)
    return (
        weights,
        logits.new_empty(n_rows, top_k, dtype=torch.int64),
        weights.new_empty(n_rows if statistics else 0),
        logits.new_empty(n_experts, dtype=torch.int64),
        weights.new_empty(n_experts),
    )


@torch.library.custom_op("moesaic::route_topk_backward", mutates_args=())
def _route_backward(
    logits: Tensor, weights: Tensor, ids: Tensor, grad_weights: Tensor, grad_probs: Tensor | None,
    grad_lse: Tensor | None, scoring: int, renormalize: bool, scale: float,
) -> Tensor:  # fmt: skip
    """dL/dlogits (T, E) in the dtype of the logits."""
    options = RoutingOptions(ids.shape[1], scoring, 0, 0, 0, renormalize, scale, -1, False)
    return route_rows_backward(
        logits.contiguous(), weights, ids, grad_weights.contiguous(), grad_probs, grad_lse, options
    )


@_route_backward.register_fake
def _(logits: Tensor, *args: object) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: _Outputs) -> None:
    weights, ids = output[:2]
    ctx.save_for_backward(inputs[0], weights, ids)
    ctx.options = inputs[3], inputs[7], inputs[8]
    ctx.mark_non_differentiable(ids, output[3])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_weights: Tensor | None, _ids: None, grad_lse: Tensor | None, _counts: None,
              grad_probs: Tensor | None) -> tuple[Tensor | None, ...]:  # fmt: skip
    logits, weights, ids = ctx.saved_tensors
    nothing = (None,) * 10
    if grad_weights is None and grad_lse is None and grad_probs is None:
        return (None, *nothing)
    grad_weights = torch.zeros_like(weights) if grad_weights is None else grad_weights
    return (_route_backward(logits, weights, ids, grad_weights, grad_probs, grad_lse, *ctx.options), *nothing)


_route.register_autograd(_backward, setup_context=_setup)


@register_flop_formula([torch.ops.moesaic.route_topk, torch.ops.moesaic.route_topk_backward])
def _flops(*args: object, **kwargs: object) -> int:
    """By the counter's convention only matrix products are FLOPs."""
    return 0


def can_fuse(device: torch.device, n_experts: int, options: RoutingOptions) -> bool:
    """Return whether the op takes rows of this many experts on this device."""
    if device.type == "cpu":
        return find_spec("numba") is not None
    return device.type == "cuda" and (n_experts <= MAX_EXPERTS or not (options.n_groups or options.statistics))


def route_rows(logits: Tensor, bias: Tensor | None, options: RoutingOptions, *, first_row: int = 0) -> _Outputs:
    """Route contiguous logits (T, E) by the kernels of their device; ``first_row`` numbers the rows for ties."""
    bias = None if bias is None else bias.contiguous()
    if logits.device.type == "cpu" and not uses_triton(logits):
        return on_cpu(logits, bias, options, first_row=first_row)
    from moesaic.kernels import routing_triton, routing_wide_triton

    with torch.cuda.device_of(logits):  # Triton launches on the current device
        if logits.shape[1] <= MAX_EXPERTS:
            return routing_triton.route(logits, bias, options, first_row=first_row)
        return routing_wide_triton.route(logits, bias, options, first_row=first_row)


def route_rows_backward(
    logits: Tensor, weights: Tensor, ids: Tensor, grad_weights: Tensor, grad_probs: Tensor | None,
    grad_lse: Tensor | None, options: RoutingOptions,
) -> Tensor:  # fmt: skip
    """Return dL/dlogits by the kernels of their device."""
    grad_probs = None if grad_probs is None else grad_probs.float().contiguous()
    grad_lse = None if grad_lse is None else grad_lse.float().contiguous()
    if logits.device.type == "cpu" and not uses_triton(logits):
        return backward_on_cpu(logits, weights, ids, grad_weights, grad_probs, grad_lse, options)
    from moesaic.kernels import routing_triton, routing_wide_triton

    with torch.cuda.device_of(logits):
        if logits.shape[1] <= MAX_EXPERTS:
            return routing_triton.route_backward(logits, weights, ids, grad_weights, grad_probs, grad_lse, options)
        return routing_wide_triton.route_backward(logits, weights, ids, grad_weights, options)


def route_op(logits: Tensor, bias: Tensor | None, options: RoutingOptions) -> _Outputs:
    """Call the op; logits (T, E) of 32 or 16 bits."""
    outputs: _Outputs = _route(logits, None if bias is None else bias.detach(), *options)
    return outputs


def parts(n_rows: int, n_experts: int) -> list[tuple[int, int]]:
    """Return first and last row + 1 of each part; what the parts are depends on the sizes alone."""
    size = max(_LEAST_LOGITS // n_experts, -(-n_rows // _MOST_PARTS), 1)
    return [(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]


def on_cpu(logits: Tensor, bias: Tensor | None, options: RoutingOptions, *, first_row: int = 0) -> _Outputs:
    """Route with the CPU twin; the rows' orders among equals are those from number ``first_row`` on."""
    twin = numba_twin("routing_cpu")
    (n_rows, n_experts), k, pieces = logits.shape, options.top_k, parts(*logits.shape)
    weights, ids = torch.empty(n_rows, k), torch.empty(n_rows, k, dtype=torch.int64)
    lse = torch.empty(n_rows if options.statistics else 0)
    kept = len(pieces) if options.statistics else 0
    counts = torch.zeros(max(kept, 1), n_experts, dtype=torch.int64)
    probs = torch.zeros(max(kept, 1), n_experts, dtype=torch.float64)
    biases = torch.zeros(0) if bias is None else bias.float().contiguous()
    x = logits.float().numpy()

    def part(number: int) -> None:
        own = number if options.statistics else 0
        twin.route_rows(
            *pieces[number], x, biases.numpy(), bias is not None, options.scoring, options.n_groups,
            options.top_k_groups, options.group_score, options.renormalize, np.float32(options.scale),
            options.tie_seed, first_row, options.statistics, weights.numpy(), ids.numpy(), lse.numpy(),
            counts[own].numpy(), probs[own].numpy(),
        )  # fmt: skip

    in_parts(part, len(pieces), twin.get_num_threads())
    return weights, ids, lse, counts.sum(0), probs.sum(0).float()


def backward_on_cpu(
    logits: Tensor, weights: Tensor, ids: Tensor, grad_weights: Tensor, grad_probs: Tensor | None,
    grad_lse: Tensor | None, options: RoutingOptions,
) -> Tensor:  # fmt: skip
    """Return dL/dlogits by the CPU twin."""
    twin = numba_twin("routing_cpu")
    out = torch.empty(logits.shape)
    empty = torch.zeros(0)
    towards = [empty if grad is None else grad for grad in (grad_probs, grad_lse)]
    arrays = [tensor.numpy() for tensor in (logits.float(), weights, ids, grad_weights, *towards)]
    pieces = parts(*logits.shape)

    def part(number: int) -> None:
        twin.route_rows_backward(
            *pieces[number], *arrays, grad_probs is not None, grad_lse is not None, options.scoring,
            options.renormalize, np.float32(options.scale), out.numpy(),
        )  # fmt: skip

    in_parts(part, len(pieces), twin.get_num_threads())
    return out.to(logits.dtype)
