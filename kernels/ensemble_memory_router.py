"""The router of the memory kernel: which experts a sample takes, and the gradient of the choice's weights.

    s = x routerᵀ,  top-k of s with ties to the lowest id,  P = softmax(s)
    w = P / Σ_chosen P (paper, straight_through, random, oracle),  P (switch),  σ(s) (sigmoid)
    dL/ds through w, for straight_through as if it were P, and through the load-balance loss

``data`` is (key, step, Probability, Inverse, size), what ``draw_features`` draws from.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moesaic.kernels.ensemble import GATES
from moesaic.kernels.ensemble_memory_features import draw_features
from moesaic.kernels.ensemble_memory_math import BLOCK_N, add_outer, probabilities, unknown_zero

SWITCH = tl.constexpr(GATES.index("switch"))
SIGMOID = tl.constexpr(GATES.index("sigmoid"))
STRAIGHT_THROUGH = tl.constexpr(GATES.index("straight_through"))


@triton.jit
def route(data, Zero, Router, Logits, Gates, Rows, Residual, gate, batch, trains, N: tl.constexpr, E: tl.constexpr,
          K: tl.constexpr, FUSED: tl.constexpr, KIND: tl.constexpr, BLOCK_E: tl.constexpr,
          BLOCK_R: tl.constexpr):  # fmt: skip
    """Choose experts: write gate weights (−1 where not chosen), logits and each expert's rows; return counts, Σ_b P.

    Each sample takes exactly K experts, whatever its scores, so that no list of rows outgrows the batch. Unless FUSED,
    Residual becomes −x.
    """
    counts, mass = tl.zeros([BLOCK_E], tl.int32), tl.zeros([BLOCK_E], tl.float32)
    for start in range(0, batch, BLOCK_R):
        nil = unknown_zero(Zero)
        rows = nil + start + tl.arange(0, BLOCK_R)
        valid, e = rows < batch, nil + tl.arange(0, BLOCK_E)
        scores = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
        for first in range(0, N, BLOCK_N):
            n = nil + first + tl.arange(0, BLOCK_N)
            x = draw_features(data, rows, nil + first, N, BLOCK_N, KIND)
            if not FUSED:
                tl.store(Residual + rows[:, None] * N + n[None, :], -x, mask=valid[:, None] & (n < N)[None, :])
            router = tl.load(Router + e[None, :] * N + n[:, None], mask=(e < E)[None, :] & (n < N)[:, None], other=0.0)
            scores = tl.dot(x, router, scores, input_precision="ieee")
        scores = tl.where((e < E)[None, :], scores, float("-inf"))
        probs = probabilities(scores)
        # A NaN is chosen first, so that a diverged model's loss shows it.
        order = tl.where(scores == scores, scores, float("inf"))
        taken = tl.broadcast_to((e >= E)[None, :], [BLOCK_R, BLOCK_E])
        for _ in range(K):
            left = tl.where(taken, float("-inf"), order)
            highest = (left == tl.max(left, 1)[:, None]) & (taken == 0)
            best = tl.min(tl.where(highest, e[None, :], BLOCK_E), 1)
            taken = taken | (e[None, :] == best[:, None])
        chosen = taken & (e < E)[None, :]
        kept = tl.where(chosen, probs, 0.0)
        weight = kept / tl.sum(kept, 1)[:, None]
        weight = tl.where(gate == SWITCH, probs, weight)
        weight = tl.where(gate == SIGMOID, 1.0 / (1.0 + tl.exp(-scores)), weight)
        inside = valid[:, None] & (e < E)[None, :]
        at = rows[:, None] * E + e[None, :]
        tl.store(Gates + at, tl.where(chosen, weight, -1.0), mask=inside)
        if trains:
            tl.store(Logits + at, scores, mask=inside)
        picked = (chosen & inside).to(tl.int32)
        if E > 1:  # one expert takes all in order, and needs no list
            place = counts[None, :] + tl.cumsum(picked, 0) - picked
            tl.store(Rows + e[None, :] * batch + place, rows[:, None] + tl.zeros_like(place), mask=picked != 0)
        counts += tl.sum(picked, 0)
        mass += tl.sum(tl.where(valid[:, None], probs, 0.0), 0)
    return counts, mass


@triton.jit
def router_gradient(data, Zero, Logits, Gates, DGates, Sums, counts, gate, batch, load_scale, by_weight,
                    N: tl.constexpr, E: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, BLOCK_E: tl.constexpr,
                    BLOCK_R: tl.constexpr):  # fmt: skip
    """Write Σ_b x_b ⊗ dL/ds_b into Sums (N, E): through the gate weights and through the load-balance loss."""
    load = counts.to(tl.float32) / (batch * K)
    for start in range(0, batch, BLOCK_R):
        nil = unknown_zero(Zero)
        rows, e = nil + start + tl.arange(0, BLOCK_R), nil + tl.arange(0, BLOCK_E)
        at = rows[:, None] * E + e[None, :]
        inside = (rows < batch)[:, None] & (e < E)[None, :]
        scores = tl.load(Logits + at, mask=inside, other=0.0)
        probs = probabilities(tl.where((e < E)[None, :], scores, float("-inf")))
        weight = tl.load(Gates + at, mask=inside, other=-1.0)
        chosen = weight >= 0
        d_weight = tl.load(DGates + at, mask=chosen & by_weight, other=0.0)
        probs_d = tl.where(chosen, probs * d_weight, 0.0)
        weight_d = tl.where(chosen, weight * d_weight, 0.0)
        d_scores = tl.zeros_like(probs)
        if K > 1:  # at k = 1 the paper's weight is the constant 1
            d_scores = weight_d - tl.where(chosen, weight, 0.0) * tl.sum(weight_d, 1)[:, None]
        through_softmax = (gate == SWITCH) | (gate == STRAIGHT_THROUGH)
        d_scores = tl.where(through_softmax, probs_d - probs * tl.sum(probs_d, 1)[:, None], d_scores)
        d_scores = tl.where(gate == SIGMOID, weight_d * (1.0 - weight), d_scores)
        d_scores += load_scale * probs * (load[None, :] - tl.sum(load[None, :] * probs, 1)[:, None])
        d_scores = tl.where(inside, d_scores, 0.0)
        for first in range(0, N, BLOCK_N):
            n = nil + first + tl.arange(0, BLOCK_N)
            x = draw_features(data, rows, nil + first, N, BLOCK_N, KIND)
            there = (n < N)[:, None] & (e < E)[None, :]
            add_outer(Sums, n[:, None] * E + e[None, :], there, start == 0, x, d_scores)
        # The next samples' sums, and the step, are read by other threads.
        tl.debug_barrier()
