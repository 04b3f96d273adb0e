"""What the parts of the memory kernel share: offsets, sums of outer products, softmax, AdamW.

A value in memory that one thread writes and another reads needs a barrier between, also in a program of one warp: a
warp's lanes need not run in step, and only a barrier orders their memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK_N = tl.constexpr(16)  # features per product, the least that tl.dot sums over


@triton.jit
def unknown_zero(Zero):
    """Return a 0 that the compiler does not know, so that offsets that start from it are computed where they are used.

    All loops lie within the loop over steps; offsets of every one of them, kept from the first step on, would spill.
    """
    return tl.multiple_of(tl.load(Zero, volatile=True) * 16, 16)


@triton.jit
def add_outer(Sums, at, mask, is_first, a, b):
    """Add aᵀ b, or store it if it is the first, to the sums at offsets ``at``; a (B, 16), b (B, M).

    The sum over samples, too, is taken 16 at a time, the parts beside each other.
    """
    parts: tl.constexpr = a.shape[0] // 16
    a = tl.permute(tl.trans(a).reshape(a.shape[1], parts, 16), 1, 0, 2)
    total = tl.sum(tl.dot(a, b.reshape(parts, 16, b.shape[1]), input_precision="ieee"), 0)
    tl.store(Sums + at, total + tl.load(Sums + at, mask=mask & (not is_first), other=0.0), mask=mask)


@triton.jit
def probabilities(scores):
    """Return the softmax of each row; a row with a NaN, or with an infinite maximum, is NaN."""
    weight = tl.exp(scores - tl.max(scores, 1)[:, None])
    return weight / tl.sum(weight, 1)[:, None]


@triton.jit
def adamw(State, ExpAvg, ExpAvgSq, at, mask, grad, adam):
    """Step the parameters at offsets ``at`` in the order of operations of torch.optim.AdamW."""
    one1, b2, one2, eps, step_size, keep, root = adam
    m = tl.load(ExpAvg + at, mask=mask, other=0.0)
    v = tl.load(ExpAvgSq + at, mask=mask, other=0.0)
    theta = tl.load(State + at, mask=mask, other=0.0)
    m += one1 * (grad - m)
    v = b2 * v + one2 * grad * grad
    theta = theta * keep - step_size * m / (tl.sqrt(v) * root + eps)
    tl.store(ExpAvg + at, m, mask=mask)
    tl.store(ExpAvgSq + at, v, mask=mask)
    tl.store(State + at, theta, mask=mask)
