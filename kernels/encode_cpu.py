"""CPU twin of sparse encoding in Numba: weighted sums of rows."""

from __future__ import annotations

from numba import get_num_threads as get_num_threads
from numba import njit


@njit(nogil=True, error_model="numpy", fastmath={"contract"}, cache=True)
def gather(begin, end, starts, entries, values, source, ids, out):
    """For rows begin … end − 1: out[s, j] = Σ values_a · source[ids_sj, entries_a]."""
    for row in range(begin, end):
        for slot in range(out.shape[1]):
            target, expert = out[row, slot], ids[row, slot]
            for c in range(target.shape[0]):
                target[c] = 0.0
            for a in range(starts[row], starts[row + 1]):
                value, line = values[a], source[expert, entries[a]]
                for c in range(target.shape[0]):
                    target[c] += value * line[c]
