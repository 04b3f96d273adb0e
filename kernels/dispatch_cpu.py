"""CPU twin of ``group_by_expert`` in Numba: a stable counting sort."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(nogil=True, error_model="numpy", cache=True)
def group(ids, n_experts, offsets, permutation, inverse):
    """Write expert e's first position to offsets[e] (E + 2, zeros so far); skipped slots come last."""
    for slot in range(ids.shape[0]):
        e = ids[slot]
        offsets[(e if 0 <= e < n_experts else n_experts) + 1] += 1
    for e in range(n_experts + 1):
        offsets[e + 1] += offsets[e]
    next_free = offsets[: n_experts + 1].copy()
    for slot in range(ids.shape[0]):
        e = ids[slot]
        e = e if 0 <= e < n_experts else np.int64(n_experts)
        at = next_free[e]
        next_free[e] = at + 1
        permutation[at] = slot
        inverse[slot] = at
