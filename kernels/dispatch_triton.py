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
