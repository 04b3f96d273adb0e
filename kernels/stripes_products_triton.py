"""The three products of a step in stripes over features, S at a time.

    decode     z = H_e W_sᵀ + b,  and where a sample has one expert   G = 2 scale I w² ReLU(z)      (rows, S)
    backward   dH_e += G W_s                                                                       (rows, depth)
    outer      dW_s = G_eᵀ H_e                                                                     (S, m)

Rows are padded with zeros to tiles of one expert, and hidden units to whole blocks: nothing in a loop is masked. Widths
below 16 are 16 wide. One program per tile of outputs goes through its whole sum: no atomics.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import triton
import triton.language as tl

from moesaic.kernels.grouped_matmul_triton import _dot, _split
from moesaic.kernels.stripes_parts_triton import relu
from moesaic.kernels.tiles import SHARED_BYTES, Tile

PART_N = 32
"""Columns that an epilogue takes at a time."""
FEATURES = 128
"""A stripe is a multiple of it."""
_RESERVED_BYTES = 8_192


@triton.jit
def _tile(X, row, column, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """Return X[row : row + ROWS, column : column + COLUMNS]; TMA: X is a descriptor of such tiles."""
    if TMA:
        tile = X.load([row, column])
    else:
        rows = (row + tl.arange(0, ROWS)).to(tl.int64)
        tile = tl.load(X + rows[:, None] * stride + (column + tl.arange(0, COLUMNS))[None, :])
    return tile


@triton.jit
def _store_slopes(z, Bias, Factor, Out, squares, rows, column, n_features, BLOCK_M: tl.constexpr,
                  BLOCK_N: tl.constexpr, PART_N: tl.constexpr):  # fmt: skip
    """Write G = 2 scale I w² ReLU(z + b), PART_N columns at a time; return Σ 2 scale I ReLU(z + b)² of each row."""
    if BLOCK_N <= PART_N:
        columns = column + tl.arange(0, BLOCK_N)
        y = relu(z + tl.load(Bias + columns)[None, :])
        r = tl.load(Factor + columns)[None, :] * y
        slope = r * squares[:, None]
        tl.store(Out + rows[:, None] * n_features + columns[None, :], slope.to(Out.dtype.element_ty))
        return tl.sum(r * y, 1)
    else:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = _split(z)
        sums = _store_slopes(left, Bias, Factor, Out, squares, rows, column, n_features, BLOCK_M, HALF, PART_N)
        return sums + _store_slopes(right, Bias, Factor, Out, squares, rows, column + HALF, n_features, BLOCK_M, HALF,
                                    PART_N)  # fmt: skip


@triton.jit
def _store(acc, Bias, Out, rows, column, stride, ADD: tl.constexpr, BLOCK_N: tl.constexpr, PART_N: tl.constexpr):
    """Write acc + b, or if ADD add to Out, PART_N columns at a time."""
    if BLOCK_N <= PART_N:
        columns = column + tl.arange(0, BLOCK_N)
        at = Out + rows[:, None] * stride + columns[None, :]
        if ADD:
            acc += tl.load(at)
        else:
            acc += tl.load(Bias + columns)[None, :]
        tl.store(at, acc)
    else:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = _split(acc)
        _store(left, Bias, Out, rows, column, stride, ADD, HALF, PART_N)
        _store(right, Bias, Out, rows, column + HALF, stride, ADD, HALF, PART_N)


@triton.jit(do_not_specialize=["n_experts", "n_rows"])
def _decode_kernel(H, W, Bias, Factor, Gates, Experts, Out, Sums, depth, n_features, n_rows, n_experts,
                   FUSED: tl.constexpr, KEEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_K: tl.constexpr, PART_N: tl.constexpr, TMA: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """Write z (n_rows, features), or if FUSED G for x = 0, and if KEEP add Σ r ReLU(z) to Sums (blocks, n_rows)."""
    tile, block = tl.program_id(0), tl.program_id(1)
    expert = tl.load(Experts + tile)
    if expert < n_experts:
        row, column = tile * BLOCK_M, block * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, depth, BLOCK_K):
            h = _tile(H, row, k, depth, BLOCK_M, BLOCK_K, TMA)
            w = _tile(W, column, expert * depth + k, n_experts * depth, BLOCK_N, BLOCK_K, TMA)
            acc = _dot(h, w.T, acc, PRECISION)
        rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
        bias = Bias + expert * n_features
        if FUSED:
            gates = tl.load(Gates + rows)
            sums = _store_slopes(acc, bias, Factor, Out, gates * gates, rows, column, n_features, BLOCK_M, BLOCK_N,
                                 PART_N)  # fmt: skip
            if KEEP:
                at = Sums + block * n_rows.to(tl.int64) + rows
                tl.store(at, tl.load(at) + gates * sums)
        else:
            _store(acc, bias, Out, rows, column, n_features, False, BLOCK_N, PART_N)


@triton.jit(do_not_specialize=["n_experts"])
def _backward_kernel(G, W, Dh, Experts, depth, n_features, n_experts, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                     BLOCK_K: tl.constexpr, PART_N: tl.constexpr, TMA: tl.constexpr,
                     PRECISION: tl.constexpr):  # fmt: skip
    """Add G W to Dh (rows, depth)."""
    tile, column = tl.program_id(0), tl.program_id(1) * BLOCK_N
    expert = tl.load(Experts + tile)
    if expert < n_experts:
        row = tile * BLOCK_M
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for feature in range(0, n_features, BLOCK_K):
            g = _tile(G, row, feature, n_features, BLOCK_M, BLOCK_K, TMA)
            w = _tile(W, feature, expert * depth + column, n_experts * depth, BLOCK_K, BLOCK_N, TMA)
            acc = _dot(g, w, acc, PRECISION)
        rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
        _store(acc, Dh, Dh, rows, column, depth, True, BLOCK_N, PART_N)


@triton.jit
def _outer_kernel(G, H, Ends, Grad, eighths, first, width, depth, n_features, EVEN: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """Write Gᵀ H of an expert's rows to columns first + e · width … of Grad, whose rows have 8 · eighths.

    EVEN: blocks divide the width.
    """
    feature, column, expert = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N, tl.program_id(2)
    start, end = tl.load(Ends + expert), tl.load(Ends + expert + 1)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for row in range(start, end, BLOCK_K):
        g = _tile(G, row, feature, n_features, BLOCK_K, BLOCK_M, TMA)
        h = _tile(H, row, column, depth, BLOCK_K, BLOCK_N, TMA)
        acc = _dot(g.T, h, acc, PRECISION)
    features, hidden = (feature + tl.arange(0, BLOCK_M)).to(tl.int64), column + tl.arange(0, BLOCK_N)
    to = Grad + features[:, None] * (eighths * 8) + (first + expert * width + hidden)[None, :]
    if EVEN:
        tl.store(to, acc)
    else:
        tl.store(to, acc, mask=(hidden < width)[None, :])


@dataclass(frozen=True)
class Tiles:
    """Blocks of the products, and hidden units in whole blocks (``depth``).

    decode is rows × features × hidden units, backward rows × hidden units × features, outer features × hidden × rows.
    """

    decode: Tile
    backward: Tile
    outer: Tile
    depth: int


def tiles(precision: str, per_expert: float, width: int, stripe: int, room: int = SHARED_BYTES[90]) -> Tiles:
    """Return the blocks for rows per expert, hidden units, features of a stripe and bytes of shared memory.

    Rows of an expert are padded to tiles of 16, 32, 64 or 128; tiles are as wide as the compiler spills nothing.
    """
    narrow = precision == "bf16"
    rows = next((block for block, below in ((16, 24), (32, 48), (64, 192)) if per_expert < below), 128)
    least = 64 if narrow else 32
    if width <= least:
        depth = block_n = max(16, triton.next_power_of_2(width))
    else:
        fits = (wide for wide in (256, 128, 64) if -(-width // wide) * wide <= 1.125 * width)
        block_n = next(fits, least)
        depth = -(-width // block_n) * block_n
    block_k = min(depth, least)
    if not narrow:
        # Three products of tf32 parts have room for wide tiles in the registers of a chip whose products read shared
        # memory; float32's own have none.
        wide = precision == "tf32x3" and room >= SHARED_BYTES[90]
        most, warps, stages = (128, 8, 3) if wide else (64, 4, 2)
        rows, block_n = min(rows, most), min(block_n, most)
        decode = Tile(rows, most, block_k, warps, stages)
        backward = Tile(rows, block_n, least, warps, stages)
        return Tiles(decode, backward, Tile(most, block_n, min(rows, least), warps, stages), depth)
    decode = Tile(rows, 256 if stripe % 256 == 0 else 128, block_k, 8, 4)
    backward = Tile(rows, block_n, 64, 8, 4)
    outer = Tile(FEATURES, block_n, min(rows, 64), 8, 4)
    decode, backward, outer = (_filled(tile, room - _RESERVED_BYTES) for tile in (decode, backward, outer))
    return Tiles(decode, backward, outer, depth)


def _filled(tile: Tile, room: int) -> Tile:
    """Return a bfloat16 tile with the stages that shared memory holds, and four warps where its outputs are few."""
    stages = min(tile.stages, room // (2 * (tile.block_m + tile.block_n) * tile.block_k))
    return replace(tile, stages=stages, warps=8 if tile.block_m * tile.block_n > 64 * 128 else 4)
