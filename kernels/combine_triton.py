"""Weighted sums of rows that were computed in expert order, back in the order of tokens, in Triton.

    y_t = Σ_j w_tj rows[inverse_tj]

Rows were stored one after the other, and are gathered here: no two programs write to one place.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _combine_kernel(Rows, W, Inverse, Kept, Out, k, N, stride_rm, HAS_WEIGHTS: tl.constexpr, BLOCK_J: tl.constexpr,
                    BLOCK_N: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    kept = tl.load(Kept)
    acc = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, k, BLOCK_J):
        js = first + tl.arange(0, BLOCK_J)
        at = tl.load(Inverse + token * k + js, mask=js < k, other=kept)
        chosen = (at < kept) & (js < k)
        inside = chosen[:, None] & (columns < N)[None, :]
        rows = tl.load(Rows + at[:, None] * stride_rm + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            rows *= tl.load(W + token * k + js, mask=chosen, other=0.0).to(tl.float32)[:, None]
        acc += tl.sum(rows, 0)
    tl.store(Out + token * N + columns, acc.to(Out.dtype.element_ty), mask=columns < N)


def combine(rows: Tensor, weights: Tensor | None, inverse: Tensor, n_kept: Tensor, k: int) -> Tensor:
    """Return y (T, N) of rows (T·k, N), weights (T·k,) or None for ones; positions from n_kept () on are left out."""
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    weights, inverse = None if weights is None else weights.contiguous(), inverse.contiguous()
    tokens, n = inverse.shape[0] // k if k else 0, rows.shape[1]
    out = rows.new_empty(tokens, n)
    if tokens and n:
        block_n = min(1024, triton.next_power_of_2(n))
        block_j = min(8, triton.next_power_of_2(k))
        _combine_kernel[(tokens, triton.cdiv(n, block_n))](
            rows, weights, inverse, n_kept, out, k, n, rows.stride(0), HAS_WEIGHTS=weights is not None,
            BLOCK_J=block_j, BLOCK_N=block_n, num_warps=4,
        )  # fmt: skip
    return out
