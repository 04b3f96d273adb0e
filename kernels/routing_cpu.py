"""CPU twin of ``route_topk`` in Numba: one pass per row forward, one backward, blocks of rows over threads.

A row's values become 64-bit keys, the float's bits in an order-keeping form above and the rank of its id below, so that
all keys differ and their order is that of the definition. The k largest are found by k maxima over the row, or, where
that is more work, in one pass that inserts what passes the k-th best so far.
"""

from __future__ import annotations

import numpy as np
from numba import get_num_threads as get_num_threads
from numba import njit

from moesaic.kernels._extras import LIBRARY
from moesaic.kernels.toy_cpu import exp32

SOFTMAX, SOFTMAX_TOPK, SIGMOID = range(3)
NO_GROUPS, BY_TOP2, BY_MAX = range(3)
_LEAST = np.int64(-(2**63))
_LOW = np.int64(0xFFFFFFFF)
_CHUNK = 64  # keys between two looks at whether any of them passes the k-th best
_MANY = 4096  # keys of a row for which 25 passes take longer than insertions
_SUMS = {"contract", "reassoc", "nsz"}


@njit(inline="always")
def _exp(x):
    """Return e^x for x ≤ 0; 0 below −87, for a masked expert has no probability at all."""
    return np.float32(0.0) if x < np.float32(-87.0) else exp32(x)


@njit(inline="always")
def _sigmoid(x):
    small = _exp(-abs(x))
    return (np.float32(1.0) if x >= 0 else small) / (np.float32(1.0) + small)


@njit(inline="always")
def _mix(x):
    """MurmurHash3's finalizer on 32 bits, in 64."""
    x = ((x ^ (x >> np.uint64(16))) * np.uint64(0x85EBCA6B)) & np.uint64(0xFFFFFFFF)
    x = ((x ^ (x >> np.uint64(13))) * np.uint64(0xC2B2AE35)) & np.uint64(0xFFFFFFFF)
    return x ^ (x >> np.uint64(16))


@njit(nogil=True, error_model="numpy")
def _shuffle(seed, row):
    """Return odd a, its inverse, and c of the row's order of ids: rank(e) = a e + c, modulo a power of two ≥ E.

    A negative seed keeps the order of ids.
    """
    if seed < 0:
        return np.int64(1), np.int64(1), np.int64(0)
    first = _mix(np.uint64(seed) & np.uint64(0xFFFFFFFF))
    low = _mix(first ^ (np.uint64(row) & np.uint64(0xFFFFFFFF)) ^ (np.uint64(seed) >> np.uint64(32)))
    a = np.int64(low | np.uint64(1))
    c = np.int64(_mix(low ^ (np.uint64(row) >> np.uint64(32)) ^ np.uint64(0x9E3779B9)))
    inverse = a * 3 ^ 2  # right to five bits; each step of Newton's doubles them
    for _ in range(3):
        inverse = (inverse * (2 - a * inverse)) & _LOW
    return a, inverse, c


@njit(inline="always")
def _ordered(value):
    """Return an int32 that orders like the float; adding 0 makes −0 equal to +0."""
    bits = np.int32(np.float32(value + np.float32(0.0)).view(np.int32))
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@njit(nogil=True, error_model="numpy")
def _keys(values, first, count, a, c, mask, keys):
    """Write the order-keeping key of values[first : first + count] to keys[first : first + count]."""
    for e in range(max(0, first), max(0, first + count)):
        keys[e] = (np.int64(_ordered(values[e])) << 32) | (mask - ((e * a + c) & mask))


@njit(nogil=True, error_model="numpy")
def _largest(keys, first, count, below):
    """Return the largest key under ``below``."""
    best = _LEAST
    for e in range(max(0, first), max(0, first + count)):
        key = keys[e] if keys[e] < below else _LEAST
        best = max(best, key)
    return best


@njit(nogil=True, error_model="numpy")
def _insert(keys, first, count, best, k):
    """Merge keys[first : first + count] into ``best``, k keys that fall."""
    for start in range(first, first + count, _CHUNK):
        size = min(_CHUNK, first + count - start)
        if _largest(keys, start, size, np.int64(2**63 - 1)) <= best[k - 1]:
            continue
        for e in range(start, start + size):
            key = keys[e]
            if key > best[k - 1]:
                at = k - 1
                while at > 0 and best[at - 1] < key:
                    best[at] = best[at - 1]
                    at -= 1
                best[at] = key


@njit(nogil=True, error_model="numpy")
def _at_least(keys, count, bound):
    found = np.int64(0)
    for e in range(count):
        found += np.int64(keys[e] >= bound)
    return found


@njit(nogil=True, error_model="numpy")
def _bound(keys, count, k):
    """Return a bound that at least k keys reach, and if keys are not too close together, at most k + 8."""
    low, high = keys[0], keys[0]
    for e in range(count):
        low, high = min(low, keys[e]), max(high, keys[e])
    while True:
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        if middle <= low:
            return low
        found = _at_least(keys, count, middle)
        if found >= k:
            low = middle
            if found <= k + 8:
                return low
        else:
            high = middle


@njit(nogil=True, error_model="numpy")
def _best(keys, n_experts, k, best):
    """Write the k largest keys to ``best``, falling."""
    # A maximum costs a compare per key; an insertion, of some k (1 + ln(E/k)), a mispredicted branch and k/2 moves; a
    # bound some 25 passes of one compare per key, after which little more than k keys are inserted.
    if k * n_experts <= 4096:
        below = np.int64(2**63 - 1)
        for j in range(k):
            below = best[j] = _largest(keys, 0, n_experts, below)
        return
    for j in range(k):
        best[j] = _LEAST
    if n_experts > _MANY:
        _insert(keys, 0, n_experts, best, k)
        return
    bound, found = _bound(keys, n_experts, k), 0
    for e in range(n_experts):  # to the front, in place: found ≤ e
        key = keys[e]
        keys[found] = key
        found += key >= bound
    _insert(keys, 0, found, best, k)


@njit(nogil=True, error_model="numpy")
def _keep_groups(values, keys, n_groups, k_groups, by, group_keys, best):
    """Set the keys of all experts outside the best groups to the least; equal groups by lowest number."""
    size = values.shape[0] // n_groups
    for g in range(n_groups):
        top, second = np.float32(-np.inf), np.float32(-np.inf)
        for e in range(g * size, (g + 1) * size):
            v = values[e]
            second = max(second, min(v, top))
            top = max(top, v)
        score = top + second if by == BY_TOP2 and top < np.inf else top
        group_keys[g] = (np.int64(_ordered(score)) << 32) | (n_groups - 1 - g)
    below = np.int64(2**63 - 1)
    for _ in range(k_groups):
        below = _largest(group_keys, 0, n_groups, below)
    for g in range(n_groups):
        if group_keys[g] < below:
            for e in range(g * size, (g + 1) * size):
                keys[e] = _LEAST


@njit(nogil=True, error_model="numpy", fastmath=_SUMS)
def _total(values, count):
    total = np.float32(0.0)
    for e in range(count):
        total += values[e]
    return total


@njit(nogil=True, error_model="numpy")
def _powers(row, top, powers):
    for e in range(row.shape[0]):
        powers[e] = _exp(row[e] - top)


@njit(nogil=True, error_model="numpy")
def _top(row):
    """Return the largest entry, and whether there is a NaN, which as an integer lies beyond an infinity."""
    most, least = _ordered(np.float32(-np.inf)), _ordered(np.float32(np.inf))
    for e in range(row.shape[0]):
        value = _ordered(row[e])
        most, least = max(most, value), min(least, value)
    nan = most > _ordered(np.float32(np.inf)) or least < _ordered(np.float32(-np.inf))
    return np.int32(most ^ ((most >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32), nan


@njit(nogil=True, error_model="numpy", cache=True)
def route_rows(
    begin, end, logits, bias, has_bias, scoring, n_groups, k_groups, by, renormalize, scale, seed, first_row,
    statistics, weights, ids, lse, counts, prob_sums, library=LIBRARY,
):  # fmt: skip
    """Route rows begin … end − 1; with ``statistics``, write log Σ e^l to ``lse`` and add to counts and Σ softmax."""
    n_experts, k = logits.shape[1], ids.shape[1]
    mask = np.int64(1)
    while mask < n_experts:
        mask *= 2
    mask -= 1
    keys, best = np.empty(n_experts, np.int64), np.empty(k, np.int64)
    values, powers = np.empty(n_experts, np.float32), np.empty(n_experts, np.float32)
    group_keys = np.empty(max(1, n_groups), np.int64)
    by_score = has_bias or by == BY_TOP2
    for t in range(begin, end):
        row = logits[t]
        top, nan = _top(row)
        total = np.float32(1.0)
        if scoring == SOFTMAX or statistics:
            _powers(row, top, powers)
            total = _total(powers, n_experts)
        ranked = row
        if by_score:
            ranked = values
            for e in range(n_experts):
                if scoring == SOFTMAX:
                    values[e] = powers[e] / total
                elif scoring == SIGMOID:
                    values[e] = _sigmoid(row[e])
                else:
                    values[e] = row[e]
            if has_bias:
                for e in range(n_experts):
                    values[e] += bias[e]
            nan = _top(values)[1]
        a, inverse, c = _shuffle(seed, first_row + t)
        _keys(ranked, 0, n_experts, a, c, mask, keys)
        if by != NO_GROUPS:
            _keep_groups(ranked, keys, n_groups, k_groups, by, group_keys, best)
        _best(keys, n_experts, k, best)
        found = np.float32(0.0)
        first = top if scoring == SOFTMAX else np.float32(-np.inf)
        for j in range(k):
            e = j if nan else (((mask - (best[j] & _LOW)) - c) * inverse) & mask
            ids[t, j] = e
            if scoring == SOFTMAX_TOPK and row[e] > first:
                first = row[e]
        for j in range(k):
            logit = row[ids[t, j]]
            if scoring == SOFTMAX:
                w = powers[ids[t, j]] / total
            elif scoring == SOFTMAX_TOPK:
                w = _exp(logit - first)
            else:
                w = _sigmoid(logit)
            weights[t, j] = w
            found += w
        for j in range(k):
            if nan:
                weights[t, j] = np.nan
            elif renormalize and k == 1:
                weights[t, j] = (weights[t, j] * np.float32(0.0) + np.float32(1.0)) * scale
            elif renormalize or scoring == SOFTMAX_TOPK:
                weights[t, j] = weights[t, j] / (found + np.float32(1e-20)) * scale
            else:
                weights[t, j] *= scale
        if statistics:
            lse[t] = top + np.log(total)
            for j in range(k):
                counts[ids[t, j]] += 1 if weights[t, j] == weights[t, j] else 0
            inverse_total = np.float32(1.0) / total
            for e in range(n_experts):
                prob_sums[e] += np.float64(powers[e] * inverse_total)


@njit(nogil=True, error_model="numpy", fastmath=_SUMS)
def _dot(a, b, count):
    total = np.float32(0.0)
    for e in range(count):
        total += a[e] * b[e]
    return total


@njit(nogil=True, error_model="numpy", cache=True)
def route_rows_backward(
    begin, end, logits, weights, ids, grad_weights, grad_probs, grad_lse, through_probs, through_lse, scoring,
    renormalize, scale, grad_logits, library=LIBRARY,
):  # fmt: skip
    """Write dL/dl of rows begin … end − 1 from gradients of weights (T, k), Σ_t softmax (E) and lse (T).

    Terms that cancel are subtracted before others join them: with one expert, for one, they leave exactly 0.
    """
    n_experts, k = logits.shape[1], ids.shape[1]
    probs, zero = np.empty(n_experts, np.float32), np.float32(0.0)
    dense = scoring == SOFTMAX and not renormalize
    for t in range(begin, end):
        row, out, g, w = logits[t], grad_logits[t], grad_weights[t], weights[t]
        mean, pull, extra = zero, zero, zero
        for j in range(k):
            mean += g[j] * w[j]
        if w[0] != w[0]:
            for e in range(n_experts):
                out[e] = np.nan
            continue
        if dense or through_probs or through_lse:
            _powers(row, _top(row)[0], probs)
            inverse = np.float32(1.0) / _total(probs, n_experts)
            for e in range(n_experts):
                probs[e] *= inverse
            if through_probs:
                pull = _dot(probs, grad_probs, n_experts)
            if through_lse:
                extra = grad_lse[t]
        if through_probs:
            for e in range(n_experts):
                out[e] = probs[e] * ((grad_probs[e] - pull) + extra)
        elif through_lse:
            for e in range(n_experts):
                out[e] = probs[e] * extra
        else:
            for e in range(n_experts):
                out[e] = zero
        if (renormalize and k == 1) or scale == 0:
            continue
        if dense:
            for j in range(k):
                e = ids[t, j]
                out[e] += w[j] * g[j] - probs[e] * mean
                probs[e] = zero
            for e in range(n_experts):
                out[e] -= probs[e] * mean
        elif scoring == SIGMOID:
            found = np.float32(1.0)
            if renormalize:
                found = np.float32(1e-20)
                for j in range(k):
                    found += _sigmoid(row[ids[t, j]])
            for j in range(k):
                small = _exp(-abs(row[ids[t, j]]))
                towards = (g[j] * scale - mean) / found if renormalize else g[j] * scale
                # s (1 − s) without the loss of digits near s = 1.
                out[ids[t, j]] += towards * small / ((np.float32(1.0) + small) * (np.float32(1.0) + small))
        else:
            # Renormalised, a softmax over all is one over the chosen.
            for j in range(k):
                out[ids[t, j]] += w[j] * (g[j] - mean / scale)


@njit(nogil=True, error_model="numpy", cache=True)
def stream_rows(
    begin, end, tile, first, mask, bias, has_bias, sigmoid, sums, seed, first_row, best, tops, totals, nans,
    library=LIBRARY,
):  # fmt: skip
    """Take experts first … first + tile.shape[1] − 1 of rows begin … end − 1 into the rows' running state.

    State of a row: its k best keys, falling; with ``sums``, the largest logit so far and Σ e^(l − that); whether a NaN
    was seen.
    """
    n_tile, k = tile.shape[1], best.shape[1]
    keys, values = np.empty(n_tile, np.int64), np.empty(n_tile, np.float32)
    for t in range(begin, end):
        row = tile[t]
        top, nan = _top(row)
        if sums and top > np.float32(-np.inf):
            most = max(top, tops[t])
            _powers(row, most, values)
            totals[t] = totals[t] * _exp(tops[t] - most) + _total(values, n_tile)
            tops[t] = most
        ranked = row
        if has_bias:
            for e in range(n_tile):
                values[e] = (_sigmoid(row[e]) if sigmoid else row[e]) + bias[first + e]
            nan = _top(values)[1]
            ranked = values
        nans[t] |= nan
        a, _, c = _shuffle(seed, first_row + t)
        _keys(ranked, 0, n_tile, a, c + first * a, mask, keys)
        _insert(keys, 0, n_tile, best[t], k)


@njit(nogil=True, error_model="numpy", cache=True)
def finish_rows(begin, end, best, mask, seed, nans, ids, values):
    """Write ids and ranked values of the k best keys; ids 0 … k − 1 where there was a NaN."""
    for t in range(begin, end):
        _, inverse, c = _shuffle(seed, t)
        for j in range(best.shape[1]):
            key = best[t, j]
            ordered = np.int32(key >> 32)
            values[t, j] = np.int32(ordered ^ ((ordered >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)
            ids[t, j] = j if nans[t] else (((mask - (key & _LOW)) - c) * inverse) & mask


@njit(nogil=True, error_model="numpy", fastmath=_SUMS, cache=True)
def chosen_logits(begin, end, x, weight, ids, out):
    """Write x_t · W_e of the chosen experts."""
    for t in range(begin, end):
        for j in range(ids.shape[1]):
            total, row = np.float32(0.0), weight[ids[t, j]]
            for i in range(x.shape[1]):
                total += x[t, i] * row[i]
            out[t, j] = total


@njit(nogil=True, error_model="numpy", cache=True)
def gather_sum(begin, end, grads, weight, ids, out):
    """Write Σ_j g_tj W_{e_tj} to rows begin … end − 1 of ``out``."""
    for t in range(begin, end):
        for i in range(out.shape[1]):
            out[t, i] = np.float32(0.0)
        for j in range(ids.shape[1]):
            g, row = grads[t, j], weight[ids[t, j]]
            for i in range(out.shape[1]):
                out[t, i] += g * row[i]


@njit(nogil=True, error_model="numpy", cache=True)
def outer_sum(begin, end, offsets, permutation, k, grads, x, out):
    """Add Σ_t g_te x_t of experts begin … end − 1, in order of t, to rows of ``out``; grads (T·k)."""
    for e in range(begin, end):
        for at in range(offsets[e], offsets[e + 1]):
            slot = permutation[at]
            g, row = grads[slot], x[slot // k]
            for i in range(out.shape[1]):
                out[e, i] += g * row[i]
