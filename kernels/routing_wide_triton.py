"""Top-k routing of rows of many experts in Triton: a program per row, which streams past in tiles.

The program keeps the k largest keys so far. A tile is searched only while it has a key above the least of them: of the
E keys of a random row some k (1 + ln(E / k)) are ever taken.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.routing_options import RoutingOptions
from moesaic.kernels.routing_triton import (
    _EPS,
    _SIGMOID,
    _SOFTMAX,
    _keys,
    _ranked_value,
    _shuffle,
    _sigmoid,
    _weigh,
    seed_words,
)

BLOCK_E = 1024
_LEAST = tl.constexpr(-(2**63))
_MOST = tl.constexpr(2**63 - 1)


@triton.jit
def _exp_sum(Row, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return the largest logit of a row and Σ e^(l − that)."""
    top, total = tl.full([1], float("-inf"), tl.float32), tl.zeros([1], tl.float32)
    for start in range(0, E, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        logits = tl.load(Row + e, mask=e < E, other=float("-inf")).to(tl.float32)
        most = tl.maximum(top, tl.max(logits, 0))
        shift = tl.where(most == float("-inf"), 0.0, most)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(logits - shift), 0)
        top = most
    # A row of −inf has no softmax.
    return top, tl.where(top == float("-inf"), float("nan"), total)


@triton.jit(do_not_specialize=["first_row", "seed_low", "seed_high"])
def _route_row_kernel(
    Logits, Bias, Weights, Ids, first_row, seed_low, seed_high, scale,
    E: tl.constexpr, K: tl.constexpr, SCORING: tl.constexpr, HAS_BIAS: tl.constexpr, RENORMALIZE: tl.constexpr,
    SHUFFLE: tl.constexpr, MASK: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    Row = Logits + row * E
    j = tl.arange(0, BLOCK_K)
    top, total = tl.zeros([1], tl.float32), tl.zeros([1], tl.float32) + 1.0
    if SCORING == _SOFTMAX:
        top, total = _exp_sum(Row, E, BLOCK_E)
    a, inverse, c = _shuffle(tl.zeros([1], tl.int64) + row + first_row, seed_low, seed_high)
    best = tl.where(j < K, _LEAST, _MOST)
    nan = 0
    for start in range(0, E, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        logits = tl.load(Row + e, mask=e < E, other=0.0).to(tl.float32)
        values = logits
        if HAS_BIAS:
            if SCORING == _SOFTMAX:
                values = tl.exp(logits - top) / total
            elif SCORING == _SIGMOID:
                values = _sigmoid(logits)
            values += tl.load(Bias + e, mask=e < E, other=0.0).to(tl.float32)
        nan = tl.maximum(nan, tl.max(tl.where((e < E) & (values != values), 1, 0), 0))
        rank = e
        if SHUFFLE:
            rank = tl.add(tl.mul(e.to(tl.uint32), a, sanitize_overflow=False), c, sanitize_overflow=False)
            rank = (rank & MASK).to(tl.int32)
        keys = tl.where(e < E, _keys(values, rank, MASK, 0), _LEAST)
        most, least = tl.max(keys, 0), tl.min(best, 0)
        while most > least:
            slot = tl.min(tl.where(best == least, j, BLOCK_K), 0)
            best = tl.where(j == slot, most, best)
            keys = tl.where(keys == most, _LEAST, keys)
            most, least = tl.max(keys, 0), tl.min(best, 0)
    best = tl.where(j < K, best, _LEAST)
    fallen = best
    for i in range(K):
        most = tl.max(best, 0)
        fallen = tl.where(j == i, most, fallen)
        best = tl.where(best == most, _LEAST, best)
    ranks = MASK - (fallen & MASK).to(tl.int32)
    ids = ranks
    if SHUFFLE:
        ids = tl.mul(tl.sub(ranks.to(tl.uint32), c, sanitize_overflow=False), inverse, sanitize_overflow=False)
        ids = (ids & MASK).to(tl.int32)
    ids = tl.where(nan > 0, j, ids)
    chosen = tl.load(Row + ids, mask=j < K, other=0.0).to(tl.float32) if HAS_BIAS else _ranked_value(fallen, 0)
    poisoned = tl.zeros([1], tl.int32) + nan > 0
    weights = _weigh(chosen[None, :], top, total, (j < K)[None, :], poisoned, scale, SCORING, RENORMALIZE, K)
    tl.store(Weights + row * K + j[None, :], weights, mask=(j < K)[None, :])
    tl.store(Ids + row * K + j, ids.to(tl.int64), mask=j < K)


@triton.jit
def _route_row_backward_kernel(
    Logits, Weights, Ids, GradWeights, GradLogits, scale,
    E: tl.constexpr, K: tl.constexpr, SCORING: tl.constexpr, RENORMALIZE: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write dL/dl of a row, then the chosen ones' over it."""
    DENSE: tl.constexpr = SCORING == _SOFTMAX and not RENORMALIZE
    row = tl.program_id(0).to(tl.int64)
    Row, Out, j = Logits + row * E, GradLogits + row * E, tl.arange(0, BLOCK_K)
    weights = tl.load(Weights + row * K + j, mask=j < K, other=0.0)
    grads = tl.load(GradWeights + row * K + j, mask=j < K, other=0.0)
    ids = tl.load(Ids + row * K + j, mask=j < K, other=0)
    chosen = tl.load(Row + ids, mask=j < K, other=0.0).to(tl.float32)
    mean = tl.sum(weights * grads, 0)
    nan = tl.max(tl.where((j < K) & (weights != weights), 1, 0), 0) > 0
    top, total = tl.zeros([1], tl.float32), tl.zeros([1], tl.float32) + 1.0
    if DENSE:
        top, total = _exp_sum(Row, E, BLOCK_E)
    for start in range(0, E, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        out = tl.zeros([BLOCK_E], tl.float32)
        if DENSE:
            logits = tl.load(Row + e, mask=e < E, other=float("-inf")).to(tl.float32)
            out = -(tl.exp(logits - top) / total) * mean
        tl.store(Out + e, tl.where(nan, float("nan"), out), mask=e < E)
    part = tl.zeros([BLOCK_K], tl.float32)
    if DENSE:
        part = weights * grads - tl.exp(chosen - top) / total * mean
    elif not (RENORMALIZE and K == 1):
        if SCORING == _SIGMOID:
            s = _sigmoid(chosen)
            part = grads * scale
            if RENORMALIZE:
                part = (part - mean) / (tl.sum(tl.where(j < K, s, 0.0), 0) + _EPS)
            small = tl.exp(-tl.abs(chosen))
            part *= small / ((1.0 + small) * (1.0 + small))  # s (1 − s), also near s = 1
        else:
            # Renormalised, a softmax over all is one over the chosen.
            part = tl.where(scale == 0, 0.0, weights * (grads - mean / scale))
    # Other threads of the program have written these places.
    tl.debug_barrier()
    tl.store(Out + ids, part, mask=(j < K) & (nan == 0))


def route(
    logits: Tensor, bias: Tensor | None, options: RoutingOptions, *, first_row: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return weights and ids of contiguous logits (T, E), any E; the three others stand for no statistics."""
    (n_rows, n_experts), k, device = logits.shape, options.top_k, logits.device
    weights = torch.empty(n_rows, k, device=device)
    ids = torch.empty(n_rows, k, dtype=torch.int64, device=device)
    if n_rows:
        _route_row_kernel[(n_rows,)](
            logits, logits if bias is None else bias, weights, ids, first_row, *seed_words(options), options.scale,
            **constants(n_experts, options), HAS_BIAS=bias is not None, SHUFFLE=options.tie_seed >= 0,
            MASK=triton.next_power_of_2(n_experts) - 1, num_warps=4,
        )  # fmt: skip
    counts = torch.zeros(n_experts, dtype=torch.int64, device=device)
    return weights, ids, torch.empty(0, device=device), counts, torch.zeros(n_experts, device=device)


def constants(n_experts: int, options: RoutingOptions) -> dict[str, int | bool]:
    """Return the compile-time arguments that both kernels take."""
    return {
        "E": n_experts, "K": options.top_k, "SCORING": options.scoring, "RENORMALIZE": options.renormalize,
        "BLOCK_E": BLOCK_E, "BLOCK_K": max(2, triton.next_power_of_2(options.top_k)),
    }  # fmt: skip


def route_backward(logits: Tensor, weights: Tensor, ids: Tensor, grads: Tensor, options: RoutingOptions) -> Tensor:
    """Return dL/dlogits (T, E), in the dtype of the logits, from the gradient of the weights."""
    out = torch.empty_like(logits)
    if len(logits):
        _route_row_backward_kernel[(len(logits),)](
            logits, weights, ids, grads, out, options.scale, **constants(logits.shape[1], options), num_warps=4
        )
    return out
