"""Sparse feature sampling in Triton: a program is a row, and takes CHUNK of its events at a time.

The rows' entries are counted, then drawn again and written: no scratch memory of unknown size. All float64 arithmetic
needs launches without fused multiply-adds, so that every machine rounds alike (``EXACT``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from moesaic.kernels.sparse_features import Cells

EXACT = {"enable_fp_fusion": False}
CHUNK = 128
MOST_SUBSET = 1024
"""The largest exactly-k subsets that a program draws."""
_CORRELATED, _ANTICORRELATED, _CLUSTERED = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_NEVER = tl.constexpr(2**62)


@triton.jit
def _gap(word0, word1):
    """Return ⌊−log(u)·2⁴⁴⌋ for each pair of words: `gap` of the CPU twin, operation by operation."""
    bits = (word0.to(tl.uint64) << 20) | (word1.to(tl.uint64) >> 12) | 0x3FF0000000000000
    u = bits.to(tl.float64, bitcast=True) - 0.9999999999999999
    bits = u.to(tl.int64, bitcast=True)
    exponent = ((bits + 0x00095F6200000000) >> 52) - 1023
    m = (bits - (exponent << 52)).to(tl.float64, bitcast=True)
    f = m - 1.0
    s = f / (2.0 + f)
    z = s * s
    r = 1.531383769920937332e-01 + z * 1.479819860511658591e-01
    r = 2.222219843214978396e-01 + z * (1.818357216161805012e-01 + z * r)
    r = 6.666666666666735130e-01 + z * (3.999999999940941908e-01 + z * (2.857142874366239149e-01 + z * r))
    y = (exponent.to(tl.float64) * -0.6931471805599453 - s * (2.0 + z * r)) * 17592186044416.0
    return y.to(tl.int64)


@triton.jit
def _scaled(high, low, count):
    """Return ⌊x·count⌋ for x = the words' 64 bits in [0, 1); count < 2³¹."""
    n = count.to(tl.uint64)
    return ((high.to(tl.uint64) * n + ((low.to(tl.uint64) * n) >> 32)) >> 32).to(tl.int64)


@triton.jit
def _own_unit(seed, row, i, step, stream):
    """Return the uniform number of feature i, which `philox_uniform` has at i."""
    zero = (i * 0).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        seed, zero + row.to(tl.uint32), (i >> 2).to(tl.uint32), zero + step.to(tl.uint32), zero + stream.to(tl.uint32)
    )
    w = i & 3
    return tl.random.uint_to_uniform_float(tl.where(w < 2, tl.where(w == 0, w0, w1), tl.where(w == 2, w2, w3)))


@triton.jit(do_not_specialize=["step", "stream", "n_cells", "size", "width", "shift", "halvings"])
def _events_kernel(
    Counts, Starts, Cols, Rows, Values, Seeds, Bounds, Guide, step, stream, n_cells, size, width, shift, halvings,
    KIND: tl.constexpr, UNIFORM: tl.constexpr, FILL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Count a row's active cells, or, with FILL, write them from Starts[row] on; of CORRELATED data, with their row."""
    row = tl.program_id(0)
    seed = tl.load(Seeds)
    lane = tl.arange(0, CHUNK)
    zero = (lane * 0).to(tl.uint32)
    t = tl.full([], 0, tl.int64)
    if KIND == _CLUSTERED:
        nothing = row.to(tl.uint32) * 0
        drawn = tl.philox(
            seed, row.to(tl.uint32), nothing, nothing + step.to(tl.uint32), nothing + (stream + 1).to(tl.uint32)
        )
        first = _scaled(drawn[0], drawn[1], n_cells // size) * size
        t = first * width if UNIFORM else tl.load(Bounds + first)
        end = (first + size) * width if UNIFORM else tl.load(Bounds + first + size)
    else:
        end = n_cells.to(tl.int64) * width if UNIFORM else tl.load(Bounds + n_cells)
    of_events = stream + 1 if KIND == _CORRELATED else stream
    at = tl.load(Starts + row) if FILL else tl.full([], 0, tl.int64)
    event = tl.full([], 0, tl.int64)
    while t < end:
        w0, w1, w2, w3 = tl.philox(
            seed, zero + row.to(tl.uint32), (event + lane).to(tl.uint32), zero + step.to(tl.uint32),
            zero + of_events.to(tl.uint32),
        )  # fmt: skip
        gap = _gap(w0, w1)
        ends = t + tl.cumsum(gap, 0)
        t += tl.sum(gap, 0)
        inside = ends < end
        if UNIFORM:
            cell = ends // width
            start = cell * width
        else:
            place = tl.where(inside, ends, 0) >> shift
            cell = tl.load(Guide + place).to(tl.int64)
            last = tl.load(Guide + place + 1).to(tl.int64)
            for _ in range(halvings):
                middle = (cell + last + 1) >> 1
                below = tl.load(Bounds + middle) <= ends
                cell = tl.where(below, middle, cell)
                last = tl.where(below, last, middle - 1)
            start = tl.load(Bounds + cell)
        # The first event of its cell: the event before it, if there is one, ended before the cell.
        fresh = inside & ((ends - gap < start) | (event + lane == 0))
        if FILL:
            to = at + tl.cumsum(fresh.to(tl.int64), 0) - 1
            col = cell
            if KIND == _ANTICORRELATED:
                col = cell * size + _scaled(w3, w1 << 20, size)
            tl.store(Cols + to, col.to(Cols.dtype.element_ty), mask=fresh)
            if KIND == _CORRELATED:
                tl.store(Rows + to, tl.full([CHUNK], 0, tl.int64) + row, mask=fresh)
            else:
                tl.store(Values + to, tl.random.uint_to_uniform_float(w2), mask=fresh)
        at += tl.sum(fresh.to(tl.int64), 0)
        event += CHUNK
    if not FILL:
        tl.store(Counts + row, at)


@triton.jit(do_not_specialize=["step", "stream", "size", "n_entries"])
def _members_kernel(Groups, Rows, Cols, Values, Seeds, step, stream, size, n_entries, BLOCK: tl.constexpr):
    """Write the features of active groups and their values."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = index < n_entries
    col = tl.load(Groups + index // size, mask=there, other=0).to(tl.int64) * size + index % size
    row = tl.load(Rows + index // size, mask=there, other=0)
    tl.store(Cols + index, col.to(Cols.dtype.element_ty), mask=there)
    tl.store(Values + index, _own_unit(tl.load(Seeds), row, col, step, stream), mask=there)


@triton.jit(do_not_specialize=["step", "stream", "n", "k"])
def _subset_kernel(Cols, Values, Seeds, step, stream, n, k, BLOCK: tl.constexpr):
    """Write k distinct features of a row: Floyd's algorithm; BLOCK ≥ k."""
    row = tl.program_id(0)
    seed = tl.load(Seeds)
    j = tl.arange(0, BLOCK)
    zero = (j * 0).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        seed, zero + row.to(tl.uint32), (j >> 1).to(tl.uint32), zero + step.to(tl.uint32),
        zero + (stream + 1).to(tl.uint32),
    )  # fmt: skip
    odd = (j & 1) == 1
    picks = _scaled(tl.where(odd, w2, w0), tl.where(odd, w3, w1), (n - k + j + 1).to(tl.int64))
    chosen = tl.full([BLOCK], _NEVER, tl.int64)
    for turn in range(k):
        pick = tl.sum(tl.where(j == turn, picks, 0), 0)
        taken = tl.max((chosen == pick).to(tl.int32), 0)
        chosen = tl.where(j == turn, tl.where(taken > 0, n - k + turn, pick), chosen)
    col = tl.sort(chosen)
    to = row.to(tl.int64) * k + j
    tl.store(Cols + to, col.to(Cols.dtype.element_ty), mask=j < k)
    tl.store(Values + to, _own_unit(seed, row, col, step, stream), mask=j < k)


def sample_events(cells: Cells, batch: int, seeds: Tensor, step: int, stream: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return crow_indices, col_indices and values of any data but exactly-k; waits for the number of entries."""
    device = seeds.device
    bounds, guide = cells.on(device)
    crow = torch.zeros(batch + 1, dtype=torch.int64, device=device)
    counts = torch.empty(batch, dtype=torch.int64, device=device)
    empty = torch.empty(0, dtype=torch.int64, device=device)
    numbers = (step, stream, cells.n_cells, cells.size, cells.width, cells.shift, cells.halvings)
    options = {"KIND": cells.kind, "UNIFORM": cells.width > 0, "CHUNK": CHUNK, "num_warps": 1, **EXACT}
    with torch.cuda.device_of(seeds):
        if batch:
            _events_kernel[(batch,)](
                counts, crow, empty, empty, empty, seeds, bounds, guide, *numbers, FILL=False, **options
            )
        torch.cumsum(counts, 0, out=crow[1:])
        n_cells = int(crow[-1])
        n_entries = n_cells * cells.per_cell
        index = cells.index_dtype(n_entries)
        cols = torch.empty(n_entries, dtype=index, device=device)
        values = torch.empty(n_entries, dtype=torch.float32, device=device)
        if n_entries == 0:
            return crow.to(index), cols, values
        grouped = cells.kind == _CORRELATED.value
        groups, rows = cols, empty
        if grouped:
            groups, rows = (torch.empty(n_cells, dtype=torch.int64, device=device) for _ in range(2))
        _events_kernel[(batch,)](
            counts, crow, groups, rows, values, seeds, bounds, guide, *numbers, FILL=True, **options
        )
        if grouped:
            _members_kernel[(triton.cdiv(n_entries, 256),)](
                groups, rows, cols, values, seeds, step, stream, cells.size, n_entries, BLOCK=256
            )
    return (crow * cells.per_cell).to(index), cols, values


def sample_subsets(cells: Cells, batch: int, seeds: Tensor, step: int, stream: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return crow_indices, col_indices and values of exactly-k data, k ≤ MOST_SUBSET."""
    n, k = cells.n, cells.size
    index = cells.index_dtype(batch * k)
    cols = torch.empty(batch * k, dtype=index, device=seeds.device)
    values = torch.empty(batch * k, dtype=torch.float32, device=seeds.device)
    block = triton.next_power_of_2(k)
    with torch.cuda.device_of(seeds):
        if batch:
            _subset_kernel[(batch,)](
                cols, values, seeds, step, stream, n, k, BLOCK=block, num_warps=4 if block >= 256 else 1
            )
    return torch.arange(0, batch * k + 1, k, dtype=index, device=seeds.device), cols, values
