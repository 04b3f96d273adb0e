"""CPU twin of sparse feature sampling in Numba: one pass over rows, bit for bit what the Triton kernels write."""

from __future__ import annotations

import numpy as np
from numba import get_num_threads as get_num_threads
from numba import njit

from moesaic.kernels._extras import LIBRARY
from moesaic.kernels.toy_cpu import LOW, SHIFT, philox, unit

CORRELATED, ANTICORRELATED, CLUSTERED = 1, 2, 3

# Bits of 1.0, of 2⁵², and of √½ below 1.0's.
_ONE, _MAGIC = np.uint64(0x3FF0000000000000), np.uint64(0x4330000000000000)
_ROOT = np.uint64(0x3FF0000000000000 - 0x3FE6A09E00000000)
_BIAS = np.uint64(1023)
_MANTISSA = np.uint64(52)
_12, _20 = np.uint64(12), np.uint64(20)


@njit(inline="always")
def gap(word0, word1):
    """Return ⌊−log(u)·2⁴⁴⌋ with u = (2 (first 52 bits of the words) + 1)·2⁻⁵³, as Triton's does to the last bit.

    Additions, products and quotients in float64 only, which every machine rounds alike: no library's log does. Callers
    must not allow contraction. The polynomial is that of fdlibm's e_log.c.
    """
    u = np.uint64((word0 << _20) | (word1 >> _12) | _ONE).view(np.float64) - 0.9999999999999999
    bits = np.float64(u).view(np.uint64)
    exponent = (bits + _ROOT) >> _MANTISSA
    m = np.uint64(bits - ((exponent - _BIAS) << _MANTISSA)).view(np.float64)  # in [√½, √2)
    f = m - 1.0
    s = f / (2.0 + f)
    z = s * s
    r = 1.531383769920937332e-01 + z * 1.479819860511658591e-01
    r = 2.222219843214978396e-01 + z * (1.818357216161805012e-01 + z * r)
    r = 6.666666666666735130e-01 + z * (3.999999999940941908e-01 + z * (2.857142874366239149e-01 + z * r))
    # 2⁵² | e is the bits of 2⁵² + e: AVX2 has no conversion of 64-bit integers.
    e = np.uint64(exponent | _MAGIC).view(np.float64) - 4503599627371519.0
    y = (e * -0.6931471805599453 - s * (2.0 + z * r)) * 17592186044416.0
    nearest = (y + 4503599627370496.0) - 4503599627370496.0
    floor = nearest - (1.0 if nearest > y else 0.0)
    return np.int64(np.float64(floor + 4503599627370496.0).view(np.uint64) - _MAGIC)


@njit(inline="always")
def scaled(high, low, count):
    """Return ⌊x·count⌋ for x = the words' 64 bits in [0, 1): uniform on 0 … count − 1 to count·2⁻⁶⁴; count < 2³¹."""
    n = np.uint64(count)
    return np.int64((high * n + ((low * n) >> SHIFT)) >> SHIFT)


@njit(inline="always")
def own_unit(low, high, row, i, step, stream):
    """Return the uniform number of feature i, which `uniform_row` has at i."""
    w0, w1, w2, w3 = philox(low, high, row, i >> 2, step, stream)
    w = i & 3
    return unit((w0 if w == 0 else w1) if w < 2 else (w2 if w == 2 else w3))


@njit(nogil=True, error_model="numpy")
def _events(low, high, row, first, step, stream, gaps, values, picks):
    """Write the gap, the value and the 44 spare bits of events first, first + 1, … of a row."""
    for i in range(gaps.shape[0]):
        w0, w1, w2, w3 = philox(low, high, row, first + i, step, stream)
        gaps[i] = gap(w0, w1)
        values[i] = unit(w2)
        picks[i] = (w3 << SHIFT) | ((w1 << _20) & LOW)


@njit(nogil=True, error_model="numpy")
def _find(ends, count, width, bounds, guide, shift, halvings, cells, starts):
    """Write the cell that each of the first ``count`` ends lies in, and where that begins."""
    if width:
        w = np.uint64(width)
        for i in range(count):
            cells[i] = np.int64(np.uint64(ends[i]) // w)
            starts[i] = cells[i] * width
        return
    # A step of all searches before the next step of any: their loads do not wait for each other.
    for i in range(count):
        cells[i] = guide[ends[i] >> shift]
        starts[i] = guide[(ends[i] >> shift) + 1]
    for _ in range(halvings):
        for i in range(count):
            middle = (cells[i] + starts[i] + 1) >> 1
            below = bounds[max(0, middle)] <= ends[i]
            cells[i] = middle if below else cells[i]
            starts[i] = starts[i] if below else middle - 1
    for i in range(count):
        starts[i] = bounds[cells[i]]


@njit(nogil=True, error_model="numpy")
def _room(old, used, needed):
    if needed <= old.shape[0]:
        return old
    new = np.empty(max(needed, 2 * old.shape[0]), old.dtype)
    new[:used] = old[:used]
    return new


@njit(nogil=True, error_model="numpy", cache=True)
def sample_rows(
    kind, key, step, stream, first_row, last_row, size, width, bounds, guide, shift, halvings, n_cells, chunk, counts,
    cols, values, library=LIBRARY,
):  # fmt: skip
    """Append rows first_row … last_row − 1 to cols and values, each row's number of entries to counts[row].

    Returns cols and values, which are others than the given ones where those were too short. The result does not
    depend on ``chunk``, the events drawn at a time.
    """
    low, high = key & LOW, key >> SHIFT
    ends, cells, starts = np.empty(chunk, np.int64), np.empty(chunk, np.int64), np.empty(chunk, np.int64)
    words, picks = np.empty(chunk, np.float32), np.empty(chunk, np.uint64)
    per_event = size if kind == CORRELATED else 1
    event_stream = stream + 1 if kind == CORRELATED else stream
    begin, end = np.int64(0), n_cells * width if width else bounds[n_cells]
    used = 0
    for row in range(first_row, last_row):
        before = used
        if kind == CLUSTERED:
            w0, w1, _, _ = philox(low, high, row, 0, step, stream + 1)
            first = scaled(w0, w1, n_cells // size) * size
            begin = first * width if width else bounds[first]
            end = (first + size) * width if width else bounds[first + size]
        t, previous, event, inside = begin, np.int64(-1), 0, chunk
        while inside == chunk:
            _events(low, high, row, event, step, event_stream, ends, words, picks)
            inside = 0
            for i in range(chunk):
                t += ends[i]
                ends[i] = t
                inside += t < end
            _find(ends, inside, width, bounds, guide, shift, halvings, cells, starts)
            cols = _room(cols, used, used + chunk * per_event)
            values = _room(values, used, used + chunk * per_event)
            for i in range(inside):
                fresh = previous < starts[i]  # the first event of its cell
                previous = ends[i]
                if kind == CORRELATED:
                    if fresh:
                        for j in range(size):
                            col = cells[i] * size + j
                            cols[used + j] = col
                            values[used + j] = own_unit(low, high, row, col, step, stream)
                        used += size
                    continue
                col = cells[i]
                if kind == ANTICORRELATED:
                    col = col * size + scaled(picks[i] >> SHIFT, picks[i] & LOW, size)
                # Written in any case, and kept or not: a branch would be mispredicted where cells are wide.
                cols[used] = col
                values[used] = words[i]
                used += fresh
            event += chunk
        counts[row] = used - before
    return cols, values


@njit(nogil=True, error_model="numpy", cache=True)
def sample_subsets(key, step, stream, first_row, last_row, n, k, cols, values, library=LIBRARY):
    """Write k distinct features of each row and their values to cols and values (rows, k): Floyd's algorithm."""
    low, high = key & LOW, key >> SHIFT
    taken = np.zeros(n, np.bool_)
    chosen = np.empty(k, np.int64)
    for row in range(first_row, last_row):
        for j in range(k):
            w0, w1, w2, w3 = philox(low, high, row, j >> 1, step, stream + 1)
            odd = (j & 1) == 1
            pick = scaled(w2 if odd else w0, w3 if odd else w1, n - k + j + 1)
            pick = n - k + j if taken[pick] else pick
            taken[pick] = True
            chosen[j] = pick
        chosen.sort()
        for j in range(k):
            taken[chosen[j]] = False
            cols[row, j] = chosen[j]
            values[row, j] = own_unit(low, high, row, chosen[j], step, stream)
