"""Gradients of grouped weights in Triton: sums over an expert's rows, whose number only the device knows.

    dW_e = Σ_r x_g(r)ᵀ grad_q(r)          offsets[e] ≤ r < offsets[e+1]
    db_e = Σ_r grad_q(r)

A program takes every P-th (expert, block of K, block of N) and goes through the expert's rows in order: no atomics, and
zeros for experts without rows. With more experts than rows only those that have rows are visited.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.dispatch_triton import tile_list
from moesaic.kernels.grouped_matmul_triton import _dot
from moesaic.kernels.tiles import Shape, Tile, choose, multiprocessors
from moesaic.kernels.weights_triton import aligned


@triton.jit
def _rows_at(Gather, row, end, HAS_GATHER: tl.constexpr, BLOCK: tl.constexpr):
    rows = row + tl.arange(0, BLOCK)
    inside = rows < end
    at = tl.load(Gather + rows, mask=inside, other=0) if HAS_GATHER else rows
    return at.to(tl.int64), inside


@triton.jit(do_not_specialize=["n_rows", "n_experts"])
def _outer_kernel(A, B, GatherA, GatherB, Out, Experts, Offsets, Count, n_rows, n_experts, M, N, stride_am, stride_bm,
                  stride_oe, stride_om, HAS_GATHER_A: tl.constexpr, HAS_GATHER_B: tl.constexpr, LISTED: tl.constexpr,
                  EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """Write Out[e, m, n] = Σ_r A[r, m] B[r, n], n contiguous."""
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    visited = tl.load(Count).to(tl.int32) if LISTED else n_experts
    for item in range(tl.program_id(0), visited * blocks_m * blocks_n, tl.num_programs(0)):
        place, within = item // (blocks_m * blocks_n), item % (blocks_m * blocks_n)
        expert = tl.load(Experts + place) if LISTED else place
        ms = within // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
        ns = within % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
        if expert < n_experts:
            start, end = tl.load(Offsets + expert), tl.minimum(tl.load(Offsets + expert + 1), n_rows)
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for row in range(start, end, BLOCK_K):
                rows_a, inside = _rows_at(GatherA, row, end, HAS_GATHER_A, BLOCK_K)
                rows_b, _ = _rows_at(GatherB, row, end, HAS_GATHER_B, BLOCK_K)
                inside_a, inside_b = inside[None, :], inside[:, None]
                if not EVEN:
                    inside_a, inside_b = inside_a & (ms < M)[:, None], inside_b & (ns < N)[None, :]
                a = tl.load(A + rows_a[None, :] * stride_am + ms[:, None], mask=inside_a, other=0.0)
                b = tl.load(B + rows_b[:, None] * stride_bm + ns[None, :], mask=inside_b, other=0.0)
                acc = _dot(a, b, acc, PRECISION)
            at = Out + expert.to(tl.int64) * stride_oe + ms[:, None].to(tl.int64) * stride_om + ns[None, :]
            tl.store(at, acc.to(Out.dtype.element_ty), mask=(ms < M)[:, None] & (ns < N)[None, :])


@triton.jit(do_not_specialize=["n_rows", "n_experts"])
def _sum_kernel(B, GatherB, Scale, Out, Experts, Offsets, Count, n_rows, n_experts, N, stride_bm, stride_oe,
                HAS_GATHER_B: tl.constexpr, HAS_SCALE: tl.constexpr, LISTED: tl.constexpr, BLOCK_N: tl.constexpr,
                BLOCK_K: tl.constexpr):  # fmt: skip
    """Write Out[e, n] = Σ_r s_r B[r, n]."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    visited = tl.load(Count).to(tl.int32) if LISTED else n_experts
    for item in range(tl.program_id(0), visited * blocks_n, tl.num_programs(0)):
        expert = tl.load(Experts + item // blocks_n) if LISTED else item // blocks_n
        ns = item % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
        if expert < n_experts:
            start, end = tl.load(Offsets + expert), tl.minimum(tl.load(Offsets + expert + 1), n_rows)
            acc = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
            for row in range(start, end, BLOCK_K):
                rows, inside = _rows_at(GatherB, row, end, HAS_GATHER_B, BLOCK_K)
                mask = inside[:, None] & (ns < N)[None, :]
                b = tl.load(B + rows[:, None] * stride_bm + ns[None, :], mask=mask, other=0.0).to(tl.float32)
                if HAS_SCALE:
                    b *= tl.load(Scale + row + tl.arange(0, BLOCK_K), mask=inside, other=0.0)[:, None]
                acc += b
            at = Out + expert.to(tl.int64) * stride_oe + ns
            tl.store(at, tl.sum(acc, 0).to(Out.dtype.element_ty), mask=ns < N)


def _visited(offsets: Tensor, n_rows: int, shape: tuple[int, ...], like: Tensor) -> tuple[Tensor, Any, Any, int]:
    """Return the output, and the experts to visit, their number and a bound: the list only where it is the shorter."""
    n_experts = offsets.shape[0] - 1
    if n_experts <= n_rows:
        return like.new_empty(shape), None, None, n_experts
    experts, _, count, most = tile_list(offsets, n_rows, max(n_rows, 1))
    return like.new_zeros(shape), experts, count, most


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def outer(
    x: Tensor | None, grad: Tensor, offsets: Tensor, gather: Tensor | None, grad_gather: Tensor | None,
    transposed: bool, *, precision: str = "ieee", tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """Return dW (E, K, N), contiguous or, if ``transposed``, the transposed view of (E, N, K)."""
    if x is None:
        return column_sums(grad, offsets, grad_gather, None).unsqueeze(1)
    x, grad = (tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in (x, grad))
    offsets, gather, grad_gather = offsets.contiguous(), _contiguous(gather), _contiguous(grad_gather)
    if transposed:
        return _outer(grad, x, offsets, grad_gather, gather, precision, tile).mT
    return _outer(x, grad, offsets, gather, grad_gather, precision, tile)


def _outer(
    a: Tensor, b: Tensor, offsets: Tensor, gather_a: Tensor | None, gather_b: Tensor | None, precision: str,
    tile: Tile | None,
) -> Tensor:  # fmt: skip
    n_experts, m, n = offsets.shape[0] - 1, a.shape[1], b.shape[1]
    n_rows = a.shape[0] if gather_a is None else gather_a.shape[0]
    out, experts, count, visited = _visited(offsets, n_rows, (n_experts, m, n), a)
    if not visited or not m or not n:
        return out
    if tile is None:

        def again(tile: Tile) -> object:
            return _outer(a, b, offsets, gather_a, gather_b, precision, tile)

        shape = Shape("outer", n_rows, m, n, n_experts, a.dtype, precision, aligned(a) and aligned(b))
        tile = choose(shape, a.device, again)
    items = visited * triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)
    _outer_kernel[(min(items, multiprocessors(a.device) * tile.programs),)](
        a, b, gather_a, gather_b, out, experts, offsets, count, n_rows, n_experts, m, n, a.stride(0), b.stride(0),
        out.stride(0), out.stride(1), HAS_GATHER_A=gather_a is not None, HAS_GATHER_B=gather_b is not None,
        LISTED=experts is not None, EVEN=m % tile.block_m == 0 and n % tile.block_n == 0, BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, PRECISION=precision, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def column_sums(grad: Tensor, offsets: Tensor, gather: Tensor | None, scale: Tensor | None) -> Tensor:
    """Return Σ_r s_r grad_g(r) over each expert's rows: (E, N); scale (R,) float32 or None for ones."""
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    offsets, gather, scale = offsets.contiguous(), _contiguous(gather), _contiguous(scale)
    n_experts, n = offsets.shape[0] - 1, grad.shape[1]
    n_rows = grad.shape[0] if gather is None else gather.shape[0]
    out, experts, count, visited = _visited(offsets, n_rows, (n_experts, n), grad)
    if not visited or not n:
        return out
    block_n = min(128, triton.next_power_of_2(n))
    items = visited * triton.cdiv(n, block_n)
    _sum_kernel[(min(items, 8 * multiprocessors(grad.device)),)](
        grad, gather, scale, out, experts, offsets, count, n_rows, n_experts, n, grad.stride(0), out.stride(0),
        HAS_GATHER_B=gather is not None, HAS_SCALE=scale is not None, LISTED=experts is not None, BLOCK_N=block_n,
        BLOCK_K=16, num_warps=4,
    )  # fmt: skip
    return out
