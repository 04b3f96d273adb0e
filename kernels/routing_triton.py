"""Fused top-k routing in Triton, of logits or of tokens and their projection, a tile of whole rows at a time.

A value becomes an integer key: the float's bits in an order-keeping form above, the reversed rank of its id below, so
that all keys differ and the largest is the definition's first. 16-bit logits that rank by themselves pack into 32 bits,
all others into 64. The k largest are taken one after the other. Sums over rows are per program and are added in order
outside: no float atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.routing_options import RoutingOptions

_SOFTMAX, _SOFTMAX_TOPK, _SIGMOID = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_NO_GROUPS, _BY_TOP2, _BY_MAX = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_EPS = tl.constexpr(1e-20)
_TILE_ELEMENTS = 4096
"""Logits of a tile, 32 a thread with 32-bit keys; 64-bit keys or sums over rows take half, or registers spill."""
MAX_PROJECTED_EXPERTS = 256
"""Experts of a row whose projection is part of the kernel."""
_PROGRAMS = 1024
"""Programs that keep sums over rows: a constant, so that sums do not depend on the device."""


@triton.jit
def _mix(x):
    """MurmurHash3's finalizer."""
    x = tl.mul(x ^ (x >> 16), tl.full([], 0x85EBCA6B, tl.uint32), sanitize_overflow=False)
    x = tl.mul(x ^ (x >> 13), tl.full([], 0xC2B2AE35, tl.uint32), sanitize_overflow=False)
    return x ^ (x >> 16)


@triton.jit
def _shuffle(rows, seed_low, seed_high):
    """Return odd a, its inverse, and c of each row's order of ids, as the CPU twin does: rank(e) = a e + c."""
    low = (rows & 0xFFFFFFFF).to(tl.uint32)
    high = (rows >> 32).to(tl.uint32)
    first = _mix(seed_low.to(tl.uint32))
    low = _mix(first ^ low ^ seed_high.to(tl.uint32))
    a = low | 1
    c = _mix(low ^ high ^ tl.full([], 0x9E3779B9, tl.uint32))
    two = tl.full([], 2, tl.uint32)
    inverse = tl.mul(a, tl.full([], 3, tl.uint32), sanitize_overflow=False) ^ two
    for _ in tl.static_range(3):
        error = tl.sub(two, tl.mul(a, inverse, sanitize_overflow=False), sanitize_overflow=False)
        inverse = tl.mul(inverse, error, sanitize_overflow=False)
    return a, inverse, c


@triton.jit
def _ordered(values):
    """Return int32 that order like the floats; adding 0 makes −0 equal to +0."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(ordered):
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _keys(values, rank, MASK: tl.constexpr, PACKED: tl.constexpr):
    """Return keys (…) of values and ranks of ids; packed ones keep 16 bits of the value, exact for half floats."""
    if PACKED == 1:  # bfloat16: the high half of its float32
        keys = (_ordered(values) & -65536) | (MASK - rank)
    elif PACKED == 2:
        bits = (values + 0.0).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        keys = ((bits ^ ((bits >> 15) & 0x7FFF)) << 16) | (MASK - rank)
    else:
        keys = (_ordered(values).to(tl.int64) << 32) | (MASK - rank).to(tl.int64)
    return keys


@triton.jit
def _ranked_value(keys, PACKED: tl.constexpr):
    """Return the values that `_keys` made keys of."""
    if PACKED == 1:  # the low half is that of a bfloat16 again: 0, which for negative ones is kept complemented
        value = _value((keys & -65536) | tl.where(keys < 0, 0xFFFF, 0))
    elif PACKED == 2:
        high = keys >> 16
        value = (high ^ ((high >> 15) & 0x7FFF)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        value = _value((keys >> 32).to(tl.int32))
    return value


@triton.jit
def _sigmoid(x):
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def _mask_groups(keys, values, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, LEAST: tl.constexpr, E: tl.constexpr,
                 N_GROUPS: tl.constexpr, K_GROUPS: tl.constexpr, BY: tl.constexpr):  # fmt: skip
    """Return the keys with the least in place of those outside the best groups, equal groups by lowest number."""
    SIZE: tl.constexpr = E // N_GROUPS
    group = tl.arange(0, BLOCK_E)[None, :] // SIZE
    outside = tl.full([BLOCK_T, BLOCK_E], 1, tl.int32)
    # Every expert carries its group's score; a group is ahead of another if its score is larger, or equal and earlier.
    score = tl.full([BLOCK_T, BLOCK_E], float("-inf"), tl.float32)
    for g in tl.static_range(N_GROUPS):
        inside = group == g
        member = tl.where(inside, values, float("-inf"))
        best = tl.max(member, 1)
        if BY == _BY_TOP2:
            at = tl.min(tl.where(inside & (member == best[:, None]), tl.arange(0, BLOCK_E)[None, :], BLOCK_E), 1)
            rest = tl.where(tl.arange(0, BLOCK_E)[None, :] == at[:, None], float("-inf"), member)
            best = tl.where(best == float("inf"), best, best + tl.max(rest, 1))
        score = tl.where(inside, best[:, None], score)
    left = tl.where(group < N_GROUPS, _ordered(score).to(tl.int64) * 65536 + (65535 - group), -(2**62))
    for _ in tl.static_range(K_GROUPS):
        best = tl.max(left, 1)
        chosen = left == best[:, None]
        outside = tl.where(chosen, 0, outside)
        left = tl.where(chosen, -(2**62), left)
    return tl.where(outside == 1, LEAST, keys)


@triton.jit
def _choose(logits, values, rank, E: tl.constexpr, K: tl.constexpr,
            N_GROUPS: tl.constexpr, K_GROUPS: tl.constexpr, BY: tl.constexpr, BY_SCORE: tl.constexpr,
            PACKED: tl.constexpr, MASK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
            BLOCK_K: tl.constexpr):  # fmt: skip
    """Return ranks and logits of the k best (BLOCK_T, BLOCK_K), best first, and which experts they are."""
    LEAST: tl.constexpr = -(2**31) if PACKED else -(2**63)
    e, j = tl.arange(0, BLOCK_E)[None, :], tl.arange(0, BLOCK_K)[None, :]
    keys = tl.where(e < E, _keys(values, rank, MASK, PACKED), LEAST)
    if BY != _NO_GROUPS:
        keys = _mask_groups(keys, values, BLOCK_T, BLOCK_E, LEAST, E, N_GROUPS, K_GROUPS, BY)
    ranks, chosen = tl.zeros([BLOCK_T, BLOCK_K], tl.int32), tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    picked = tl.zeros([BLOCK_T, BLOCK_E], tl.int1)
    for i in range(K):
        best = tl.max(keys, 1)
        hit = keys == best[:, None]
        logit = tl.sum(tl.where(hit, logits, 0.0), 1) if BY_SCORE else _ranked_value(best, PACKED)
        keys, picked = tl.where(hit, LEAST, keys), picked | hit
        ranks = tl.where(j == i, (MASK - (best & MASK).to(tl.int32))[:, None], ranks)
        chosen = tl.where(j == i, logit[:, None], chosen)
    return ranks, chosen, picked


@triton.jit
def _weigh(chosen, top, total, inside, nan, scale, SCORING: tl.constexpr, RENORMALIZE: tl.constexpr, K: tl.constexpr):
    """Return the gate weights (BLOCK_T, BLOCK_K) of the chosen logits."""
    if SCORING == _SOFTMAX:
        weights = tl.exp(chosen - top[:, None]) / total[:, None]
    elif SCORING == _SOFTMAX_TOPK:
        most = tl.max(tl.where(inside, chosen, float("-inf")), 1)
        weights = tl.exp(chosen - most[:, None])
    else:
        weights = _sigmoid(chosen)
    weights = tl.where(inside, weights, 0.0)
    if RENORMALIZE and K == 1:
        weights = weights * 0.0 + 1.0
    elif RENORMALIZE or SCORING == _SOFTMAX_TOPK:
        weights = weights / (tl.sum(weights, 1)[:, None] + _EPS)
    return tl.where(nan[:, None], float("nan"), weights * scale)


@triton.jit
def _project(X, Router, rows, valid, E: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
             BLOCK_D: tl.constexpr):  # fmt: skip
    """Return logits x Wᵀ (BLOCK_T, BLOCK_E) in float32."""
    e, logits = tl.arange(0, BLOCK_E), tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        x = tl.load(X + rows[:, None] * D + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0)
        at = e[None, :].to(tl.int64) * D + d[:, None]
        w = tl.load(Router + at, mask=(e < E)[None, :] & (d < D)[:, None], other=0.0)
        logits = tl.dot(x, w, logits, input_precision="ieee")
    return logits


@triton.jit(do_not_specialize=["n_rows", "per_program", "first_row", "seed_low", "seed_high"])
def _route_kernel(
    Logits, Router, Bias, Weights, Ids, Lse, Counts, Probs, n_rows, per_program, first_row, seed_low, seed_high, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, E: tl.constexpr, K: tl.constexpr, SCORING: tl.constexpr,
    HAS_BIAS: tl.constexpr, N_GROUPS: tl.constexpr, K_GROUPS: tl.constexpr, BY: tl.constexpr,
    RENORMALIZE: tl.constexpr, SHUFFLE: tl.constexpr, STATISTICS: tl.constexpr, PACKED: tl.constexpr,
    MASK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Route rows of logits (T, E), or with D > 0 of their projection from tokens (T, D), which then stand in Logits."""
    BY_SCORE: tl.constexpr = HAS_BIAS or BY == _BY_TOP2
    first = tl.program_id(0).to(tl.int64) * per_program
    e, j = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)[None, :]
    counts, probs_sum = tl.zeros([BLOCK_E], tl.int32), tl.zeros([BLOCK_E], tl.float32)
    if HAS_BIAS:
        bias = tl.load(Bias + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    for start in range(first, tl.minimum(first + per_program, n_rows), BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T).to(tl.int64)
        valid = rows < n_rows
        there = valid[:, None] & (e < E)[None, :]
        if D > 0:
            logits = _project(Logits, Router, rows, valid, E, D, BLOCK_T, BLOCK_E, BLOCK_D)
        else:
            logits = tl.load(Logits + rows[:, None] * E + e[None, :], mask=there, other=0.0).to(tl.float32)
        nan = tl.max(tl.where(there & (logits != logits), 1, 0), 1) > 0
        top = tl.max(tl.where((e < E)[None, :], logits, float("-inf")), 1)
        total = top * 0.0 + 1.0
        probs = logits
        if SCORING == _SOFTMAX or STATISTICS:
            probs = tl.where((e < E)[None, :], tl.exp(logits - top[:, None]), 0.0)
            total = tl.sum(probs, 1)
        values = logits
        if BY_SCORE:
            if SCORING == _SOFTMAX:
                values = probs / total[:, None]
            elif SCORING == _SIGMOID:
                values = _sigmoid(logits)
            if HAS_BIAS:
                values += bias
            nan |= tl.max(tl.where(there & (values != values), 1, 0), 1) > 0
        if SHUFFLE:
            a, inverse, c = _shuffle(rows + first_row, seed_low, seed_high)
            rank = tl.mul(e[None, :].to(tl.uint32), a[:, None], sanitize_overflow=False)
            rank = (tl.add(rank, c[:, None], sanitize_overflow=False) & MASK).to(tl.int32)
        else:
            rank = e[None, :]
        ranks, chosen, picked = _choose(
            logits, values, rank, E, K, N_GROUPS, K_GROUPS, BY, BY_SCORE, PACKED, MASK, BLOCK_T,
            BLOCK_E, BLOCK_K,
        )  # fmt: skip
        ids = ranks
        if SHUFFLE:
            ids = tl.sub(ranks.to(tl.uint32), c[:, None], sanitize_overflow=False)
            ids = (tl.mul(ids, inverse[:, None], sanitize_overflow=False) & MASK).to(tl.int32)
        ids = tl.where(nan[:, None], j, ids)
        inside = valid[:, None] & (j < K)
        weights = _weigh(chosen, top, total, j < K, nan, scale, SCORING, RENORMALIZE, K)
        tl.store(Weights + rows[:, None] * K + j, weights, mask=inside)
        tl.store(Ids + rows[:, None] * K + j, ids.to(tl.int64), mask=inside)
        if STATISTICS:
            tl.store(Lse + rows, top + tl.log(total), mask=valid)
            lost = tl.max(tl.where(weights != weights, 1, 0), 1)
            counts += tl.sum(tl.where(picked & there & (lost[:, None] == 0), 1, 0), 0)
            probs_sum += tl.sum(tl.where(valid[:, None], probs / total[:, None], 0.0), 0)
    if STATISTICS:
        program = tl.program_id(0).to(tl.int64)
        tl.store(Counts + program * E + e, counts, mask=e < E)
        tl.store(Probs + program * E + e, probs_sum, mask=e < E)


@triton.jit(do_not_specialize=["n_rows"])
def _route_backward_kernel(
    Logits, Weights, Ids, GradWeights, GradProbs, GradLse, GradLogits, n_rows, scale,
    E: tl.constexpr, K: tl.constexpr, SCORING: tl.constexpr, RENORMALIZE: tl.constexpr, THROUGH_PROBS: tl.constexpr,
    THROUGH_LSE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write dL/dl of a tile of rows, then the chosen ones' over it.

    Terms that cancel are subtracted before others join them: with one expert, for one, they leave exactly 0.
    """
    DENSE: tl.constexpr = SCORING == _SOFTMAX and not RENORMALIZE
    ALL: tl.constexpr = DENSE or THROUGH_PROBS or THROUGH_LSE
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    valid, j, e = rows < n_rows, tl.arange(0, BLOCK_K)[None, :], tl.arange(0, BLOCK_E)
    inside, there = valid[:, None] & (j < K), valid[:, None] & (e < E)[None, :]
    at_k = rows[:, None] * K + j
    weights = tl.load(Weights + at_k, mask=inside, other=0.0)
    grads = tl.load(GradWeights + at_k, mask=inside, other=0.0)
    ids = tl.load(Ids + at_k, mask=inside, other=0)
    chosen = tl.load(Logits + rows[:, None] * E + ids, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(weights * grads, 1)
    nan = tl.max(tl.where(inside & (weights != weights), 1, 0), 1) > 0
    out = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    part = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    if ALL:
        logits = tl.load(Logits + rows[:, None] * E + e[None, :], mask=there, other=0.0).to(tl.float32)
        logits = tl.where((e < E)[None, :], logits, float("-inf"))
        top = tl.max(logits, 1)
        probs = tl.exp(logits - top[:, None])
        total = tl.sum(probs, 1)
        probs = probs / total[:, None]
        chosen_probs = tl.exp(chosen - top[:, None]) / total[:, None]
        towards, chosen_towards = out, part
        if THROUGH_PROBS:
            every = tl.load(GradProbs + e, mask=e < E, other=0.0)[None, :]
            pull = tl.sum(probs * every, 1)
            towards = every - pull[:, None] + towards
            chosen_towards += tl.load(GradProbs + ids, mask=inside, other=0.0) - pull[:, None]
        if THROUGH_LSE:
            extra = tl.load(GradLse + rows, mask=valid, other=0.0)
            towards += extra[:, None]
            chosen_towards += extra[:, None]
        out, part = probs * towards, chosen_probs * chosen_towards
        if DENSE:
            out -= probs * mean[:, None]
            part += weights * grads - chosen_probs * mean[:, None]
    if not (RENORMALIZE and K == 1) and not DENSE:
        if SCORING == _SIGMOID:
            s = _sigmoid(chosen)
            towards = grads * scale
            if RENORMALIZE:
                found = tl.sum(tl.where(inside, s, 0.0), 1) + _EPS
                towards = (towards - mean[:, None]) / found[:, None]
            small = tl.exp(-tl.abs(chosen))
            part += towards * small / ((1.0 + small) * (1.0 + small))  # s (1 − s), also near s = 1
        else:
            # Renormalised, a softmax over all is one over the chosen.
            part += tl.where(scale == 0, 0.0, weights * (grads - mean[:, None] / scale))
    tl.store(GradLogits + rows[:, None] * E + e[None, :], tl.where(nan[:, None], float("nan"), out), mask=there)
    # Other threads of the program have written these places.
    tl.debug_barrier()
    tl.store(GradLogits + rows[:, None] * E + ids, part, mask=inside & (nan[:, None] == 0))


def packing(logits: Tensor, options: RoutingOptions, *, biased: bool) -> int:
    """Return how a key is packed into 32 bits: 1 for bfloat16, 2 for float16, 0 if it takes 64."""
    if biased or options.group_score == 1 or logits.shape[1] > 2**16:
        return 0
    return {torch.bfloat16: 1, torch.float16: 2}.get(logits.dtype, 0)


def tile(n_experts: int, *, light: bool) -> tuple[int, int]:
    """Return rows and experts per tile; ``light``: with 32-bit keys and without sums over rows."""
    block_e = max(2, triton.next_power_of_2(n_experts))
    return max(1, (_TILE_ELEMENTS if light else _TILE_ELEMENTS // 2) // block_e), block_e


def route(
    given: Tensor,
    bias: Tensor | None,
    options: RoutingOptions,
    *,
    router: Tensor | None = None,
    first_row: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return weights, ids, log-sum-exp (T), counts (E) and Σ_t softmax (E); E ≤ 1,024, or 256 with a router.

    The last three mean nothing unless ``options.statistics``.

    Args:
        given: contiguous logits (T, E), or tokens (T, d) if there is a router.
        bias: (E,) or None.
        options: the options.
        router: contiguous weight (E, d) of the projection, of the dtype of the tokens.
        first_row: number of the first row, for the rows' orders among equals.
    """
    n_rows, k, device = len(given), options.top_k, given.device
    n_experts = given.shape[1] if router is None else len(router)
    chosen = constants(given, options, router=router, biased=bias is not None)
    weights = torch.empty(n_rows, k, device=device)
    ids = torch.empty(n_rows, k, dtype=torch.int64, device=device)
    lse = torch.empty(n_rows if options.statistics else 0, device=device)
    block_t = chosen["BLOCK_T"]
    blocks = triton.cdiv(n_rows, block_t)
    per_program = triton.cdiv(blocks, _PROGRAMS) if options.statistics else 1
    programs = triton.cdiv(blocks, per_program) if blocks else 0
    sums = (programs, n_experts) if options.statistics else (0, n_experts)
    counts, probs = torch.empty(sums, dtype=torch.int32, device=device), torch.empty(sums, device=device)
    if programs:
        _route_kernel[(programs,)](
            given, given if router is None else router, given if bias is None else bias, weights, ids, lse, counts,
            probs, n_rows, per_program * block_t, first_row, *seed_words(options), options.scale, **chosen,
            num_warps=warps(n_experts, projects=router is not None),
        )  # fmt: skip
    return weights, ids, lse, counts.sum(0), probs.sum(0)


def warps(n_experts: int, *, projects: bool) -> int:
    """Return the warps of a program of the forward kernel."""
    return 8 if projects and n_experts > 128 else 4


def constants(given: Tensor, options: RoutingOptions, *, router: Tensor | None = None, biased: bool) -> dict[str, Any]:
    """Return the compile-time arguments of the forward kernel."""
    n_experts, d = (given.shape[1], 0) if router is None else (len(router), given.shape[1])
    packed = 0 if d else packing(given, options, biased=biased)
    block_t, block_e = tile(n_experts, light=packed > 0 and not options.statistics)
    block_t = min(block_t, 256)
    if d:  # tl.dot takes no fewer rows and columns than 16
        block_t, block_e = min(max(block_t, 16), 64), max(block_e, 16)
    return {
        "D": d, "BLOCK_D": min(64, max(16, triton.next_power_of_2(max(d, 1)))), "E": n_experts, "K": options.top_k,
        "SCORING": options.scoring, "HAS_BIAS": biased,
        "N_GROUPS": options.n_groups, "K_GROUPS": options.top_k_groups, "BY": options.group_score,
        "RENORMALIZE": options.renormalize, "SHUFFLE": options.tie_seed >= 0, "STATISTICS": options.statistics,
        "PACKED": packed, "MASK": triton.next_power_of_2(n_experts) - 1,
        "BLOCK_T": block_t, "BLOCK_E": block_e, "BLOCK_K": max(2, triton.next_power_of_2(options.top_k)),
    }  # fmt: skip


def route_backward(
    logits: Tensor,
    weights: Tensor,
    ids: Tensor,
    grad_weights: Tensor,
    grad_probs: Tensor | None,
    grad_lse: Tensor | None,
    options: RoutingOptions,
) -> Tensor:
    """Return dL/dlogits (T, E), in the dtype of the logits, from gradients of weights, Σ_t softmax and log-sum-exp."""
    n_rows, n_experts = logits.shape
    out = torch.empty_like(logits)
    block_t, block_e = tile(n_experts, light=False)
    block_t = min(block_t, 256)
    if n_rows:
        _route_backward_kernel[(triton.cdiv(n_rows, block_t),)](
            logits, weights, ids, grad_weights, grad_probs if grad_probs is not None else weights,
            grad_lse if grad_lse is not None else weights, out, n_rows, options.scale,
            E=n_experts, K=options.top_k, SCORING=options.scoring, RENORMALIZE=options.renormalize,
            THROUGH_PROBS=grad_probs is not None, THROUGH_LSE=grad_lse is not None,
            BLOCK_T=block_t, BLOCK_E=block_e, BLOCK_K=max(2, triton.next_power_of_2(options.top_k)), num_warps=4,
        )  # fmt: skip
    return out


def seed_words(options: RoutingOptions) -> list[int]:
    """Return the low and the high half of the seed of ties as int32."""
    words = (max(options.tie_seed, 0) & 0xFFFFFFFF, max(options.tie_seed, 0) >> 32)
    return [word - 2**32 if word >= 2**31 else word for word in words]
