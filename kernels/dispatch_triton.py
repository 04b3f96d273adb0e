"""Stable grouping by expert in Triton: radix passes over digits of the expert's id, the lowest first.

    histogram   h[t, d] = slots of tile t with digit d
    scan        before[t, d] = Σ_{t' < t} h[t', d],   total[d] = Σ_t h[t, d]
    scatter     a tile sorts its (digit, place) pairs; slot → start[d] + before[t, d] + rank among its digit in the tile

One pass serves up to 2,047 experts, two up to 2²² − 1. No atomics, no size read back.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024
_DIGIT_BITS = 11
_MOST_SUMMED = 32_768
"""Experts whose tiles one launch adds up, each program all before its own; more take a scan, of several launches."""


@triton.jit
def _digits(Ids, Order, first, n_slots, n_experts, shift, MASK: tl.constexpr, FIRST: tl.constexpr, TILE: tl.constexpr):
    """Return the slots of a tile in the order so far, and their digits; an id outside 0…E−1 counts as E."""
    at = first + tl.arange(0, TILE)
    inside = at < n_slots
    slots = at if FIRST else tl.load(Order + at, mask=inside, other=0)
    ids = tl.load(Ids + slots, mask=inside, other=0).to(tl.int64)
    ids = tl.where((ids < 0) | (ids >= n_experts), n_experts, ids)
    return slots, tl.where(inside, ((ids >> shift) & MASK).to(tl.int32), MASK), inside


@triton.jit(do_not_specialize=["n_slots", "n_experts", "shift"])
def _histogram_kernel(Ids, Order, Histogram, n_slots, n_experts, shift, BINS: tl.constexpr, FIRST: tl.constexpr,
                      TILE: tl.constexpr):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    _, digits, inside = _digits(Ids, Order, tile * TILE, n_slots, n_experts, shift, BINS - 1, FIRST, TILE)
    counts = tl.histogram(digits, BINS)
    bins = tl.arange(0, BINS)
    # Places past the last slot were counted as the last digit.
    counts -= tl.where(bins == BINS - 1, TILE - tl.sum(inside.to(tl.int32), 0), 0)
    tl.store(Histogram + tile * BINS + bins, counts)


@triton.jit(do_not_specialize=["n_tiles"])
def _scan_kernel(Histogram, Total, n_tiles, BINS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Replace a digit's counts by the counts of earlier tiles, and write their sum."""
    bins = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int32)
    for first in range(0, n_tiles, ROWS):
        tiles = first + tl.arange(0, ROWS).to(tl.int64)
        at = Histogram + tiles[:, None] * BINS + bins[None, :]
        inside = (tiles < n_tiles)[:, None] & (bins >= 0)[None, :]
        counts = tl.load(at, mask=inside, other=0)
        tl.store(at, before[None, :] + tl.cumsum(counts, 0) - counts, mask=inside)
        before += tl.sum(counts, 0)
    tl.store(Total + bins, before)


@triton.jit(do_not_specialize=["n_slots", "n_experts", "shift"])
def _scatter_kernel(Ids, Order, Histogram, Start, Sorted, Inverse, n_slots, n_experts, shift, BINS: tl.constexpr,
                    FIRST: tl.constexpr, LAST: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    _, digits, _ = _digits(Ids, Order, tile * TILE, n_slots, n_experts, shift, BINS - 1, FIRST, TILE)
    place = tl.arange(0, TILE)
    # Places past the last slot sort behind all others: they have the last digit and the last places.
    pairs = tl.sort(digits * TILE + place)
    digit, place = pairs // TILE, pairs % TILE
    first_of_digit = tl.cumsum(tl.histogram(digits, BINS), 0) - tl.histogram(digits, BINS)
    rank = tl.arange(0, TILE) - tl.gather(first_of_digit, digit, 0)
    inside = tile * TILE + place < n_slots
    to = tl.load(Start + digit, mask=inside, other=0).to(tl.int64) + rank
    to += tl.load(Histogram + tile * BINS + digit, mask=inside, other=0)
    slots = tile * TILE + place if FIRST else tl.load(Order + tile * TILE + place, mask=inside, other=0)
    tl.store(Sorted + to, slots, mask=inside)
    if LAST:
        tl.store(Inverse + slots, to, mask=inside)


def group(ids: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return offsets (E + 2), permutation and inverse (T·k) int64 of ids (T·k); the last group are the skipped."""
    n_slots, device = ids.numel(), ids.device
    inverse, order = (torch.empty(n_slots, dtype=torch.int64, device=device) for _ in range(2))
    if not n_slots:
        return torch.zeros(n_experts + 2, dtype=torch.int64, device=device), order, inverse
    passes, digit_bits = digits(n_experts)
    bins, tiles = 2**digit_bits, triton.cdiv(n_slots, TILE)
    histogram = torch.empty(tiles, bins, dtype=torch.int32, device=device)
    total = torch.empty(bins, dtype=torch.int32, device=device)
    block = min(bins, 32)
    for number in range(passes):
        first, last, given, order = number == 0, number == passes - 1, order, torch.empty_like(order)
        size = (n_slots, n_experts, number * digit_bits)
        _histogram_kernel[(tiles,)](ids, given, histogram, *size, BINS=bins, FIRST=first, TILE=TILE)
        _scan_kernel[(bins // block,)](histogram, total, tiles, BINS=bins, BLOCK=block, ROWS=64)
        start = total.cumsum(0) - total
        _scatter_kernel[(tiles,)](
            ids, given, histogram, start, order, inverse, *size, BINS=bins, FIRST=first, LAST=last, TILE=TILE
        )
    if passes == 1:
        return torch.cat([start[: n_experts + 1], start.new_full((1,), n_slots)]), order, inverse
    kept = torch.where((ids < 0) | (ids >= n_experts), n_experts, ids.to(torch.int64))[order]
    return torch.searchsorted(kept, torch.arange(n_experts + 2, device=device)), order, inverse


def digits(n_experts: int) -> tuple[int, int]:
    """Return the number of radix passes and the bits of a digit; E itself is a digit too, that of skipped slots."""
    bits = n_experts.bit_length()
    passes = triton.cdiv(bits, _DIGIT_BITS)
    return passes, max(4, triton.cdiv(bits, passes))


@triton.jit(do_not_specialize=["n_experts", "n_rows", "block_m"])
def _ends_kernel(Offsets, Ends, n_experts, n_rows, block_m, BLOCK: tl.constexpr):
    """Write each expert's end in the list of tiles, that of the skipped rows (expert E) last."""
    total = tl.zeros([], tl.int64)
    # Programs do not wait for each other: each sums up the experts before its own.
    for first in range(0, tl.program_id(0) * BLOCK, BLOCK):
        total += tl.sum(_tile_counts(Offsets, first, n_experts, n_rows, block_m, BLOCK), 0)
    first = tl.program_id(0) * BLOCK
    counts = _tile_counts(Offsets, first, n_experts, n_rows, block_m, BLOCK)
    experts = first + tl.arange(0, BLOCK)
    tl.store(Ends + experts, total + tl.cumsum(counts, 0), mask=experts <= n_experts)


@triton.jit
def _tile_counts(Offsets, first, n_experts, n_rows, block_m, BLOCK: tl.constexpr):
    experts = first + tl.arange(0, BLOCK)
    start = tl.load(Offsets + experts, mask=experts <= n_experts, other=n_rows)
    end = tl.load(Offsets + experts + 1, mask=experts < n_experts, other=n_rows)
    return (end - start + block_m - 1) // block_m


@triton.jit(do_not_specialize=["n_experts", "block_m", "most"])
def _tiles_kernel(Offsets, Ends, Experts, First, n_experts, block_m, most, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """Find every tile's expert, the first whose end is behind it, by bisection."""
    tiles = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros([BLOCK], tl.int32)
    high = tl.zeros([BLOCK], tl.int32) + n_experts
    for _ in range(STEPS):
        middle = (low + high) // 2
        behind = tl.load(Ends + middle) <= tiles
        low = tl.where(behind, tl.minimum(middle + 1, n_experts), low)
        high = tl.where(behind, high, middle)
    before = tl.load(Ends + low - 1, mask=low > 0, other=0)
    tl.store(Experts + tiles, low, mask=tiles < most)
    tl.store(First + tiles, tl.load(Offsets + low) + (tiles - before) * block_m, mask=tiles < most)


def tile_list(offsets: Tensor, n_rows: int, block_m: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Cut every expert's rows, and those behind the last expert's, into tiles of at most ``block_m`` rows.

    Returns:
        expert (int32) and first row (int64) of the tiles, in order; their number (), int64; and the length of the list,
        ⌈R/block⌉ + min(E + 1, R), which no routing passes. Rows from offsets[E] on are expert E's. Entries behind the
        last tile mean nothing.
    """
    n_experts, device = offsets.shape[0] - 1, offsets.device
    most = triton.cdiv(n_rows, block_m) + min(n_experts + 1, n_rows)
    experts = torch.empty(most, dtype=torch.int32, device=device)
    first = torch.empty(most, dtype=torch.int64, device=device)
    if n_experts < _MOST_SUMMED:
        ends = torch.empty(n_experts + 1, dtype=torch.int64, device=device)
        block = min(4096, triton.next_power_of_2(n_experts + 1))
        _ends_kernel[(triton.cdiv(n_experts + 1, block),)](offsets, ends, n_experts, n_rows, block_m, BLOCK=block)
    else:
        sizes = torch.cat([offsets, offsets.new_full((1,), n_rows)]).diff()
        ends = ((sizes + block_m - 1) // block_m).cumsum(0)
    steps = n_experts.bit_length() + 1
    _tiles_kernel[(triton.cdiv(most, 256),)](
        offsets, ends, experts, first, n_experts, block_m, most, STEPS=steps, BLOCK=256
    )
    return experts, first, ends[-1], most
