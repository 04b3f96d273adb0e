"""Grouped products in Triton: a persistent schedule over tiles of rows of one expert, rows gathered on load.

    rows                     y_r = x_g(r) W_e + b_e
    rows_activated           a_r = s_r act(x_g(r) W_e + b_e)
    rows_activated_backward  d_r = g_g(r) W_e;   s_r a_r,   ⟨d_r, a_r⟩,   dh_r = s_r act'(h_r) d_r

A program takes every P-th of the (tile of rows, block of columns) pairs, of which only the device knows how many there
are; columns of one tile and a few neighbouring tiles come in a row, so that their operands stay in L2. Tiles of few
rows swap the operands, W_eᵀ xᵀ, because the tensor cores' wide instructions take 64 rows or more. Skipped rows are the
tiles of expert E, and are set to zero.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.activations import is_gated
from moesaic.kernels.activations_triton import activation_slopes, activation_value
from moesaic.kernels.dispatch_triton import tile_list
from moesaic.kernels.tiles import Shape, Tile, choose, exact, multiprocessors
from moesaic.kernels.weights_triton import Weights, aligned, weights

PLAIN_H, CONCATENATED, INTERLEAVED = 0, 1, 2
"""Of the columns of h: all alike; gate in the first half and up in the second; gate and up in turn."""

PART_N = 32
"""Columns that an epilogue takes at a time."""


@triton.jit
def _place(item, n_tiles, n_blocks, GROUP: tl.constexpr):
    """Return tile and block of an item: GROUP tiles go through all blocks before the next GROUP begins."""
    first = item // (GROUP * n_blocks) * GROUP
    size = tl.minimum(n_tiles - first, GROUP)
    within = item - first * n_blocks
    return first + within % size, within // size


@triton.jit
def _rows_of(tile, Experts, First, Offsets, n_experts, n_rows, BLOCK_M: tl.constexpr):
    """Return a tile's expert, its rows and which of them are its own; others are clamped to rows that exist."""
    expert = tl.load(Experts + tile)
    first = tl.load(First + tile)
    end = tl.minimum(tl.load(Offsets + expert + 1, mask=expert < n_experts, other=n_rows), n_rows)
    rows = first + tl.arange(0, BLOCK_M)
    return expert, tl.minimum(rows, n_rows - 1), rows < end


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision=PRECISION)
    return tl.dot(a, b, acc)


@triton.jit
def _load_w(W, expert, k, column, K, n_columns, stride_we, stride_wk, stride_wn, LAYOUT: tl.constexpr,
            BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr, EVEN_K: tl.constexpr):  # fmt: skip
    """Return W[e, k : k + BLOCK_K, column : column + BLOCK_N], transposed if SWAP."""
    if LAYOUT == "tma_n":
        w = W.load([expert.to(tl.int32), k, column]).reshape(BLOCK_K, BLOCK_N)
        if SWAP:
            w = w.T
    elif LAYOUT == "tma_k":
        w = W.load([expert.to(tl.int32), column, k]).reshape(BLOCK_N, BLOCK_K)
        if not SWAP:
            w = w.T
    else:
        step_k = 1 if LAYOUT == "k" else stride_wk
        step_n = 1 if LAYOUT == "n" else stride_wn
        ks, columns = k + tl.arange(0, BLOCK_K), column + tl.arange(0, BLOCK_N)
        base = W + expert.to(tl.int64) * stride_we
        if SWAP:
            at = base + columns[:, None].to(tl.int64) * step_n + ks[None, :].to(tl.int64) * step_k
            inside = (columns < n_columns)[:, None] if EVEN_K else (columns < n_columns)[:, None] & (ks < K)[None, :]
        else:
            at = base + ks[:, None].to(tl.int64) * step_k + columns[None, :].to(tl.int64) * step_n
            inside = (columns < n_columns)[None, :] if EVEN_K else (ks < K)[:, None] & (columns < n_columns)[None, :]
        w = tl.load(at, mask=inside, other=0.0)
    return w


@triton.jit
def _product(X, W, rows, expert, first, second, K, n_columns, stride_xm, stride_we, stride_wk, stride_wn,
             LAYOUT: tl.constexpr, TWO: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
             BLOCK_K: tl.constexpr, SWAP: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Return x_rows · W_e for BLOCK_N columns from ``first``, and if TWO for those from ``second``: (BLOCK_M, BLOCK_N).

    The second is the first's where there is but one.
    """
    acc = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], tl.float32)
    acc2 = acc
    start = rows.to(tl.int64) * stride_xm
    for k in range(0, K, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        if SWAP:
            at, inside = X + start[None, :] + ks[:, None], (ks < K)[:, None]
        else:
            at, inside = X + start[:, None] + ks[None, :], (ks < K)[None, :]
        x = tl.load(at) if EVEN_K else tl.load(at, mask=inside, other=0.0)
        w = _load_w(W, expert, k, first, K, n_columns, stride_we, stride_wk, stride_wn, LAYOUT, BLOCK_N, BLOCK_K, SWAP,
                    EVEN_K)  # fmt: skip
        acc = _dot(w, x, acc, PRECISION) if SWAP else _dot(x, w, acc, PRECISION)
        if TWO:
            w = _load_w(W, expert, k, second, K, n_columns + second - first, stride_we, stride_wk, stride_wn, LAYOUT,
                        BLOCK_N, BLOCK_K, SWAP, EVEN_K)  # fmt: skip
            acc2 = _dot(w, x, acc2, PRECISION) if SWAP else _dot(x, w, acc2, PRECISION)
    if SWAP:
        acc, acc2 = acc.T, acc2.T
    return acc, acc2


@triton.jit
def _store_values(gate, up, Bias, Scale, Out, H, expert, rows, mine, column, n_experts, n_out, HAS_BIAS: tl.constexpr,
                  HAS_SCALE: tl.constexpr, KEEP: tl.constexpr, ACT: tl.constexpr, HALVES: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Write a and, if KEEP, h of BLOCK_N columns of a from ``column``.

    Skipped rows come with zeros, of which every activation makes zeros.
    """
    WIDTH: tl.constexpr = 2 * BLOCK_N if HALVES == 2 else BLOCK_N
    width_h = n_out if HALVES == 0 else 2 * n_out
    columns = column + tl.arange(0, BLOCK_N)
    wide = (2 * column if HALVES == 2 else column) + tl.arange(0, WIDTH)
    wide_columns = wide < (width_h if HALVES == 2 else n_out)
    wide_inside = mine[:, None] & wide_columns[None, :]
    if HAS_BIAS:
        bias_at, known = Bias + expert.to(tl.int64) * width_h + wide, wide_columns & (expert < n_experts)
        gate += tl.load(bias_at, mask=known, other=0.0)[None, :].to(tl.float32)
        if HALVES == 1:
            up += tl.load(bias_at + n_out, mask=known, other=0.0)[None, :].to(tl.float32)
    if KEEP:
        h_at = H + rows[:, None] * width_h + wide[None, :]
        tl.store(h_at, gate.to(H.dtype.element_ty), mask=wide_inside)
        if HALVES == 1:
            tl.store(h_at + n_out, up.to(H.dtype.element_ty), mask=wide_inside)
    if HALVES == 2:
        gate, up = gate.reshape(BLOCK_M, BLOCK_N, 2).split()
    a = activation_value(gate, up, HALVES != 0, ACT)
    if HAS_SCALE:
        a *= tl.load(Scale + rows, mask=mine & (expert < n_experts), other=0.0)[:, None]
    inside = mine[:, None] & (columns < n_out)[None, :]
    tl.store(Out + rows[:, None] * n_out + columns[None, :], a.to(Out.dtype.element_ty), mask=inside)


@triton.jit
def _store_values_in_parts(gate, up, Bias, Scale, Out, H, expert, rows, mine, column, n_experts, n_out,
                           HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, KEEP: tl.constexpr, ACT: tl.constexpr,
                           HALVES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                           PART_N: tl.constexpr):  # fmt: skip
    """``_store_values``, PART_N columns at a time, whose temporaries fit into registers beside the products."""
    if BLOCK_N <= PART_N:
        _store_values(gate, up, Bias, Scale, Out, H, expert, rows, mine, column, n_experts, n_out, HAS_BIAS, HAS_SCALE,
                      KEEP, ACT, HALVES, BLOCK_M, BLOCK_N)  # fmt: skip
    else:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = _split(gate)
        left_up, right_up = _split(up) if HALVES == 1 else (left, right)
        _store_values_in_parts(left, left_up, Bias, Scale, Out, H, expert, rows, mine, column, n_experts, n_out,
                               HAS_BIAS, HAS_SCALE, KEEP, ACT, HALVES, BLOCK_M, HALF, PART_N)  # fmt: skip
        _store_values_in_parts(right, right_up, Bias, Scale, Out, H, expert, rows, mine, column + HALF, n_experts,
                               n_out, HAS_BIAS, HAS_SCALE, KEEP, ACT, HALVES, BLOCK_M, HALF, PART_N)  # fmt: skip


@triton.jit
def _split(tile):
    """Return the left and the right half of a tile's columns."""
    return tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit(do_not_specialize=["n_rows", "n_experts", "most"])
def _rows_kernel(X, W, Bias, Gather, Scale, Out, H, Experts, First, Offsets, Count, most, n_rows, n_experts, K,
                 n_out, stride_xm, stride_we, stride_wk, stride_wn,
                 HAS_BIAS: tl.constexpr, HAS_GATHER: tl.constexpr, HAS_SCALE: tl.constexpr, KEEP: tl.constexpr,
                 ACT: tl.constexpr, HALVES: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PART_N: tl.constexpr, GROUP: tl.constexpr,
                 SWAP: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Write a (R, n_out) and, if KEEP, h (R, n_out or 2 n_out)."""
    WIDTH: tl.constexpr = 2 * BLOCK_N if HALVES == 2 else BLOCK_N
    # Offsets that do not rise to R at most could name more tiles than there is room for.
    n_tiles = tl.minimum(tl.load(Count), most).to(tl.int32)
    n_blocks = tl.cdiv(n_out, BLOCK_N)
    n_columns = 2 * n_out if HALVES == 2 else n_out
    for item in range(tl.program_id(0), n_tiles * n_blocks, tl.num_programs(0)):
        tile, block = _place(item, n_tiles, n_blocks, GROUP)
        expert, rows, mine = _rows_of(tile, Experts, First, Offsets, n_experts, n_rows, BLOCK_M)
        gate = tl.zeros([BLOCK_M, WIDTH], tl.float32)
        up = gate
        if expert < n_experts:
            source = tl.load(Gather + rows) if HAS_GATHER else rows
            gate, up = _product(X, W, source, expert, block * WIDTH, n_out + block * WIDTH, K, n_columns, stride_xm,
                                stride_we, stride_wk, stride_wn, LAYOUT, HALVES == 1, BLOCK_M, WIDTH, BLOCK_K, SWAP,
                                EVEN_K, PRECISION)  # fmt: skip
        _store_values_in_parts(gate, up, Bias, Scale, Out, H, expert, rows, mine, block * BLOCK_N, n_experts, n_out,
                               HAS_BIAS, HAS_SCALE, KEEP, ACT, HALVES, BLOCK_M, BLOCK_N, PART_N)  # fmt: skip


@triton.jit
def _store_slopes(d, H, Dh, Scaled, rows, mine, scale, column, n_out, ACT: tl.constexpr, HALVES: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Write dh and s·a of BLOCK_N columns from ``column``, and return ⟨d, a⟩ of each row."""
    WIDTH: tl.constexpr = 2 * BLOCK_N if HALVES == 2 else BLOCK_N
    width_h = n_out if HALVES == 0 else 2 * n_out
    columns = column + tl.arange(0, BLOCK_N)
    inside = mine[:, None] & (columns < n_out)[None, :]
    wide = (2 * column if HALVES == 2 else column) + tl.arange(0, WIDTH)
    wide_inside = mine[:, None] & (wide < (width_h if HALVES == 2 else n_out))[None, :]
    h_at = rows[:, None] * width_h + wide[None, :]
    gate = tl.load(H + h_at, mask=wide_inside, other=0.0).to(tl.float32)
    up = gate
    if HALVES == 1:
        up = tl.load(H + h_at + n_out, mask=wide_inside, other=0.0).to(tl.float32)
    if HALVES == 2:
        gate, up = gate.reshape(BLOCK_M, BLOCK_N, 2).split()
    a, dgate, dup = activation_slopes(gate, up, d * scale[:, None], HALVES != 0, ACT)
    scaled_at = Scaled + rows[:, None] * n_out + columns[None, :]
    tl.store(scaled_at, (a * scale[:, None]).to(Scaled.dtype.element_ty), mask=inside)
    if HALVES == 2:
        dgate = tl.join(dgate, dup).reshape(BLOCK_M, WIDTH)
    tl.store(Dh + h_at, dgate.to(Dh.dtype.element_ty), mask=wide_inside)
    if HALVES == 1:
        tl.store(Dh + h_at + n_out, dup.to(Dh.dtype.element_ty), mask=wide_inside)
    return tl.sum(tl.where(inside, d * a, 0.0), 1)


@triton.jit
def _store_slopes_in_parts(d, H, Dh, Scaled, rows, mine, scale, column, n_out, ACT: tl.constexpr,
                           HALVES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                           PART_N: tl.constexpr):  # fmt: skip
    """``_store_slopes``, PART_N columns at a time, whose h and slopes fit into registers beside d."""
    if BLOCK_N <= PART_N:
        return _store_slopes(d, H, Dh, Scaled, rows, mine, scale, column, n_out, ACT, HALVES, BLOCK_M, BLOCK_N)
    else:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = _split(d)
        sums = _store_slopes_in_parts(left, H, Dh, Scaled, rows, mine, scale, column, n_out, ACT, HALVES, BLOCK_M, HALF,
                                      PART_N)  # fmt: skip
        return sums + _store_slopes_in_parts(right, H, Dh, Scaled, rows, mine, scale, column + HALF, n_out, ACT, HALVES,
                                             BLOCK_M, HALF, PART_N)  # fmt: skip


@triton.jit(do_not_specialize=["n_rows", "n_experts", "most"])
def _backward_kernel(G, W, Gather, Scale, H, Dh, Scaled, Partial, Experts, First, Offsets, Count, most, n_rows,
                     n_experts, K, n_out, stride_xm, stride_we, stride_wk, stride_wn,
                     HAS_GATHER: tl.constexpr, HAS_SCALE: tl.constexpr, ACT: tl.constexpr, HALVES: tl.constexpr,
                     LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                     PART_N: tl.constexpr, GROUP: tl.constexpr, SWAP: tl.constexpr, EVEN_K: tl.constexpr,
                     PRECISION: tl.constexpr):  # fmt: skip
    """Write dh (R, n_out or 2 n_out), s·a (R, n_out), and ⟨d, a⟩ of every block of columns (R, blocks)."""
    # Offsets that do not rise to R at most could name more tiles than there is room for.
    n_tiles = tl.minimum(tl.load(Count), most).to(tl.int32)
    n_blocks = tl.cdiv(n_out, BLOCK_N)
    for item in range(tl.program_id(0), n_tiles * n_blocks, tl.num_programs(0)):
        tile, block = _place(item, n_tiles, n_blocks, GROUP)
        expert, rows, mine = _rows_of(tile, Experts, First, Offsets, n_experts, n_rows, BLOCK_M)
        column = block * BLOCK_N
        d = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        scale = tl.zeros([BLOCK_M], tl.float32)
        if expert < n_experts:
            source = tl.load(Gather + rows) if HAS_GATHER else rows
            d, _ = _product(G, W, source, expert, column, 0, K, n_out, stride_xm, stride_we, stride_wk, stride_wn,
                            LAYOUT, False, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, EVEN_K, PRECISION)  # fmt: skip
            scale = tl.load(Scale + rows) if HAS_SCALE else tl.full([BLOCK_M], 1.0, tl.float32)
        sums = _store_slopes_in_parts(d, H, Dh, Scaled, rows, mine, scale, column, n_out, ACT, HALVES, BLOCK_M, BLOCK_N,
                                      PART_N)  # fmt: skip
        tl.store(Partial + rows * n_blocks + block, sums, mask=mine)


def _halves(activation: str, interleaved: bool) -> int:
    if not is_gated(activation):
        return PLAIN_H
    return INTERLEAVED if interleaved else CONCATENATED


def constants(tile: Tile, w: Weights, activation: str, interleaved: bool, depth: int, precision: str) -> dict[str, Any]:
    """Return the compile-time arguments that both kernels take."""
    return {
        "ACT": activation, "HALVES": _halves(activation, interleaved), "LAYOUT": w.layout, "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "PART_N": PART_N, "GROUP": tile.group, "SWAP": tile.swap,
        "EVEN_K": depth % tile.block_k == 0, "PRECISION": precision,
    }  # fmt: skip


def _readable(x: Tensor, *others: Tensor | None) -> list[Any]:
    """Return x with contiguous rows, and all others contiguous: kernels take no strides of theirs."""
    rows = x if x.stride(1) == 1 else x.contiguous()
    return [rows, *(None if other is None else other.contiguous() for other in others)]


def rows(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, gather: Tensor | None, *, precision: str = "ieee",
    tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """Return y (R, N), zeros from offsets[E] on."""
    return rows_activated(
        x, weight, offsets, bias, gather, None, "none", False, False, precision=precision, tile=tile
    )[0]  # fmt: skip


def rows_activated(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, gather: Tensor | None, row_weight: Tensor | None,
    activation: str, interleaved: bool, keep: bool, *, precision: str = "ieee", tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return a (R, F) and, if ``keep``, h (R, N), else h of no rows; zeros from offsets[E] on."""
    x, offsets, bias, gather, row_weight = _readable(x, offsets, bias, gather, row_weight)
    n_experts, depth, width = weight.shape
    n_rows = x.shape[0] if gather is None else gather.shape[0]
    halves = _halves(activation, interleaved)
    n_out = width // 2 if halves else width
    out, h = x.new_empty(n_rows, n_out), x.new_empty(n_rows if keep else 0, width)
    if not n_rows or not n_out:
        return out, h
    if tile is None:

        def again(tile: Tile) -> object:
            return rows_activated(
                x, weight, offsets, bias, gather, row_weight, activation, interleaved, keep, precision=precision,
                tile=tile,
            )  # fmt: skip

        kind = ("rows", "up", "interleaved")[halves]
        fits = aligned(x) and aligned(weight)
        tile = choose(Shape(kind, n_rows, depth, n_out, n_experts, x.dtype, precision, fits), x.device, again)
    columns = tile.block_n * (2 if halves == INTERLEAVED else 1)
    w = weights(weight, tile.block_k, columns, exact=exact(x.dtype, precision))
    experts, first, count, most = tile_list(offsets, n_rows, tile.block_m)
    grid = (min(most * triton.cdiv(n_out, tile.block_n), multiprocessors(x.device) * tile.programs),)
    _rows_kernel[grid](
        x, w.operand, bias, gather, row_weight, out, h, experts, first, offsets,
        count, most, n_rows, n_experts, depth, n_out, x.stride(0), *weight.stride(), HAS_BIAS=bias is not None,
        HAS_GATHER=gather is not None, HAS_SCALE=row_weight is not None, KEEP=keep,
        **constants(tile, w, activation, interleaved, depth, precision), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, h


def rows_activated_backward(
    grad: Tensor, weight: Tensor, offsets: Tensor, gather: Tensor | None, h: Tensor, row_weight: Tensor | None,
    activation: str, interleaved: bool, *, precision: str = "ieee", tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dh (R, N), s·a (R, F) and ⟨d, a⟩ (R,), d = grad rows times weight (E, ·, F); zeros from offsets[E]."""
    grad, offsets, gather, row_weight = _readable(grad, offsets, gather, row_weight)
    h = h.contiguous()
    n_experts, depth, n_out = weight.shape
    n_rows = h.shape[0]
    dh, scaled = torch.empty_like(h), h.new_empty(n_rows, n_out)
    if not n_rows or not n_out:
        return dh, scaled, h.new_zeros(n_rows, dtype=torch.float32)
    if tile is None:

        def again(tile: Tile) -> object:
            return rows_activated_backward(
                grad, weight, offsets, gather, h, row_weight, activation, interleaved, precision=precision, tile=tile
            )

        fits = aligned(grad) and aligned(weight)
        tile = choose(Shape("backward", n_rows, depth, n_out, n_experts, h.dtype, precision, fits), h.device, again)
    w = weights(weight, tile.block_k, tile.block_n, exact=exact(h.dtype, precision))
    blocks = triton.cdiv(n_out, tile.block_n)
    partial = h.new_empty(n_rows, blocks, dtype=torch.float32)
    experts, first, count, most = tile_list(offsets, n_rows, tile.block_m)
    grid = (min(most * blocks, multiprocessors(h.device) * tile.programs),)
    _backward_kernel[grid](
        grad, w.operand, gather, row_weight, h, dh, scaled, partial, experts, first, offsets, count, most, n_rows,
        n_experts, depth, n_out, grad.stride(0), *weight.stride(), HAS_GATHER=gather is not None,
        HAS_SCALE=row_weight is not None,
        **constants(tile, w, activation, interleaved, depth, precision), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return dh, scaled, partial.sum(1)
