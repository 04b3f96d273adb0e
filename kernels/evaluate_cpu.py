"""CPU twin of ``evaluate_ensemble`` in Numba: samples along SIMD lanes, a chunk of them at a time.

Self-contained, because Numba's on-disk cache notices a change only in the file that holds the cached function.
"""

from __future__ import annotations

import math

import numpy as np
from numba import get_num_threads as get_num_threads
from numba import njit

SWITCH, SIGMOID = 1, 2

# A loop that sums must not also store: LLVM would choose between a SIMD and a scalar version by the arrays' addresses,
# and the sum's bits with it. So only sums may be reassociated; everything stored keeps its order of operations.
_STORES = {"contract", "nsz"}
_SUMS = {"contract", "nsz", "reassoc"}

_LOWEST = np.float32(-87.0)  # just above the logarithm of the smallest normal number
_LOG2E = np.float32(1 / math.log(2))
_LN2_HIGH = np.float32(round(math.log(2) * 2**15) / 2**15)  # short enough for exact products
_LN2_LOW = np.float32(math.log(2) - round(math.log(2) * 2**15) / 2**15)
_ROUND = np.float32(1.5 * 2**23)  # adding it rounds to an integer, held in the low bits


@njit(inline="always")
def _exp(x):
    """e^x for x ≤ 0, to about 1 ulp; below −87 as at −87; NaN stays NaN. Numba has no SIMD form of np.exp."""
    x = _LOWEST if x < _LOWEST else x
    shifted = x * _LOG2E + _ROUND
    whole = shifted - _ROUND
    r = (x - whole * _LN2_HIGH) - whole * _LN2_LOW
    # Taylor's series: |r| ≤ ln(2)/2, so the first term left out is r⁸/8! < 6e-9.
    y = r * np.float32(1 / 5040) + np.float32(1 / 720)
    y = y * r + np.float32(1 / 120)
    y = y * r + np.float32(1 / 24)
    y = y * r + np.float32(1 / 6)
    y = y * r + np.float32(0.5)
    y = y * r + np.float32(1.0)
    y = y * r + np.float32(1.0)
    power = np.int32((np.float32(shifted).view(np.int32) + np.int32(127)) << np.int32(23))
    return y * np.int32(power).view(np.float32)


@njit(nogil=True, error_model="numpy", fastmath=_STORES)
def _affine(out, row, start, size, constant, theta, at, stride, rows, first_row, first, count):
    """out[row, start + c] = constant + Σ theta[at + r·stride] · rows[first_row + r, first + c]; c < size, r < count."""
    # Unsigned: Numba lets a negative index count from the end, a choice at every element that LLVM does not vectorise.
    start, first = np.uint64(start), np.uint64(first)
    head = count % 4
    if head == 0:
        for c in range(np.uint64(size)):
            out[row, start + c] = constant
    elif head == 1:
        a = theta[at]
        for c in range(np.uint64(size)):
            out[row, start + c] = constant + a * rows[first_row, first + c]
    elif head == 2:
        a, b = theta[at], theta[at + stride]
        for c in range(np.uint64(size)):
            out[row, start + c] = (constant + a * rows[first_row, first + c]) + b * rows[first_row + 1, first + c]
    else:
        a, b, d = theta[at], theta[at + stride], theta[at + 2 * stride]
        for c in range(np.uint64(size)):
            two = (constant + a * rows[first_row, first + c]) + b * rows[first_row + 1, first + c]
            out[row, start + c] = two + d * rows[first_row + 2, first + c]
    for r in range(head, count, 4):
        q, i = at + r * stride, first_row + r
        a, b, d, f = theta[q], theta[q + stride], theta[q + 2 * stride], theta[q + 3 * stride]
        for c in range(np.uint64(size)):
            two = (out[row, start + c] + a * rows[i, first + c]) + b * rows[i + 1, first + c]
            out[row, start + c] = (two + d * rows[i + 2, first + c]) + f * rows[i + 3, first + c]


@njit(nogil=True, error_model="numpy", fastmath=_STORES)
def _gates(gate, k, n_experts, size, scores, powers, total, best, last, value, place, weights):
    """Write e^(s − max s) to ``powers``, its sum over experts to ``total``, and w_e, or −1 if not chosen, to weights.

    An expert is in the top k if none of the k passes' maxima comes before it in the order of falling score and rising
    id. A NaN score makes ``total`` NaN, which the caller hands on.
    """
    for c in range(size):
        best[c] = scores[0, c]
        total[c] = 0.0
    for e in range(1, n_experts):
        for c in range(size):
            best[c] = scores[e, c] if scores[e, c] > best[c] else best[c]
    for e in range(n_experts):
        for c in range(size):
            powers[e, c] = _exp(scores[e, c] - best[c])
        for c in range(size):
            total[c] += powers[e, c]
    if k < n_experts:
        for c in range(size):
            value[c] = np.inf
            last[c] = -1
        for _ in range(k):
            for c in range(size):
                best[c] = -np.inf
                place[c] = n_experts
            for e in range(n_experts):
                here = np.int32(e)
                for c in range(size):
                    s = scores[e, c]
                    left = (s < value[c]) | ((s == value[c]) & (here > last[c]))
                    wins = left & (s > best[c])
                    best[c] = s if wins else best[c]
                    place[c] = here if wins else place[c]
            for c in range(size):
                value[c] = best[c]
                last[c] = place[c]
    else:
        for c in range(size):
            value[c] = -np.inf
            last[c] = n_experts
    for c in range(size):
        best[c] = 0.0
    for e in range(n_experts):
        here = np.int32(e)
        for c in range(size):
            s = scores[e, c]
            chosen = (s > value[c]) | ((s == value[c]) & (here <= last[c]))
            if gate == SIGMOID:
                small = _exp(-abs(s))
                w = (np.float32(1.0) if s >= 0 else small) / (np.float32(1.0) + small)
            elif gate == SWITCH:
                w = powers[e, c] / total[c]
            else:
                w = powers[e, c]
            weights[e, c] = w if chosen else np.float32(-1.0)
    if gate != SIGMOID and gate != SWITCH:
        for e in range(n_experts):
            for c in range(size):
                best[c] += weights[e, c] if weights[e, c] >= 0 else np.float32(0.0)
        for e in range(n_experts):
            for c in range(size):
                w = weights[e, c]
                weights[e, c] = w / best[c] if w >= 0 else w


@njit(nogil=True, error_model="numpy", fastmath=_SUMS)
def _count_routing(size, powers, total, weights, assignments, gate_sums, prob_sums):
    for e in range(powers.shape[0]):
        count, gates, probs = np.int64(0), 0.0, 0.0
        for c in range(size):
            w = weights[e, c]
            count += np.int64(w >= 0)
            gates += np.float64(w if w >= 0 else np.float32(0.0))
            probs += np.float64(powers[e, c] / total[c])
        assignments[e] += count
        gate_sums[e] += gates
        prob_sums[e] += probs


@njit(nogil=True, error_model="numpy", fastmath=_SUMS)
def _squares(size, out, x, row, first):
    total, first = 0.0, np.uint64(first)
    for c in range(np.uint64(size)):
        d = np.float64(out[0, c] - x[row, first + c])
        total += d * d
    return total


@njit(nogil=True, error_model="numpy", fastmath=_SUMS)
def _positive(size, inverse):
    count = np.int64(0)
    for c in range(size):
        count += np.int64(inverse[c] > 0)
    return count


@njit(nogil=True, error_model="numpy", fastmath=_SUMS)
def _carried(size, weights, row, inverse):
    total = 0.0
    for c in range(size):
        w = weights[row, c]
        total += np.float64(w if w >= 0 else np.float32(0.0)) * inverse[c]
    return total


@njit(nogil=True, error_model="numpy", fastmath=_SUMS)
def _carried_by(start, end, members, weights, row, inverse):
    total = 0.0
    for a in range(start, end):
        total += np.float64(weights[row, members[a]]) * inverse[members[a]]
    return total


@njit(nogil=True, error_model="numpy", fastmath=_SUMS)
def _sum(size, values):
    total = 0.0
    for c in range(size):
        total += values[c]
    return total


@njit(nogil=True, error_model="numpy", fastmath=_STORES)
def _hidden(n, m, m0, at_shared, theta, x, first, size, masked, weights, members, offsets, gathered, hidden, shared):
    """Write h_e = x W_e of the chunk: of all experts one below the other, or grouped, of each expert's samples."""
    zero, n_experts = np.int64(0), weights.shape[0]
    none, found = np.float32(0.0), np.int64(0)
    for e in range(n_experts):
        if masked:
            for j in range(m):
                _affine(hidden, e * m + j, zero, size, none, theta, e * n * m + j, m, x, zero, first, n)
            continue
        start = found
        for c in range(size):
            if weights[e, c] >= 0:
                members[found] = c
                found += 1
        offsets[e], offsets[e + 1] = start, found
        for i in range(n):
            for a in range(start, found):
                gathered[i, a - start] = x[i, np.uint64(first) + members[a]]
        for j in range(m):
            _affine(hidden, j, start, found - start, none, theta, e * n * m + j, m, gathered, zero, zero, n)
    for j in range(m0):
        _affine(shared, j, zero, size, none, theta, at_shared + j, m0, x, zero, first, n)


@njit(nogil=True, error_model="numpy", fastmath=_STORES)
def _reconstruct(
    i, m, m0, tied, at_decoder, at_bias, at_shared, at_shared_decoder, at_shared_bias, theta, square, n, size, masked,
    total, weights, members, offsets, hidden, shared, out, y, gain,
):  # fmt: skip
    """Write x'_i to ``out`` and N_i = Σ_e w_e q_ei to ``gain``, of each sample of the chunk."""
    zero, one, n_experts = np.int64(0), np.int64(1), weights.shape[0]
    for c in range(size):
        out[0, c] = total[c] - total[c]  # 0, or NaN where a score is not finite
        gain[c] = square[n_experts, i] if m0 else 0.0
    for e in range(n_experts):
        bias, at = theta[at_bias + e * n + i], at_decoder + (e * n + i) * m
        start = zero if masked else np.int64(offsets[e])
        count = size if masked else np.int64(offsets[e + 1]) - start
        _affine(y, zero, zero, count, bias, theta, at, one, hidden, e * m if masked else zero, start, m)
        if masked:
            for c in range(size):
                w = weights[e, c]
                v = np.float32(0.0) if y[0, c] <= 0 else y[0, c]
                out[0, c] += np.float32(0.0) if w < 0 else w * v
            for c in range(size):
                w = weights[e, c]
                gain[c] += square[e, i] * np.float64(np.float32(0.0) if w < 0 else w)
        else:
            for a in range(start, start + count):
                w, v = weights[e, members[a]], y[0, a - start]
                out[0, members[a]] += w * (np.float32(0.0) if v <= 0 else v)
                gain[members[a]] += square[e, i] * np.float64(w)
    if m0:
        bias, at = theta[at_shared_bias + i], at_shared_decoder + i * m0
        _affine(y, zero, zero, size, bias, theta, at, one, shared, zero, zero, m0)
        for c in range(size):
            out[0, c] += np.float32(0.0) if y[0, c] <= 0 else y[0, c]


@njit(nogil=True, error_model="numpy", fastmath=_STORES)
def _invert(x, i, first, size, above, gain, inverse):
    """Write 1/N where x_i is present and represented, else 0."""
    for c in range(np.uint64(size)):
        seen = (x[i, np.uint64(first) + c] != 0) & (gain[c] > above)
        inverse[c] = 1.0 / gain[c] if seen else 0.0


@njit(nogil=True, error_model="numpy", cache=True)
def evaluate_models(
    begin, end, n, m, n_experts, k, m0, tied, gate, states, squares, above, batches, which, chunk, masked,
    squared_error, assignments, gate_sums, prob_sums, represented, carried,
):  # fmt: skip
    """Add the statistics of models begin … end − 1 on their batches[which] (n, B) to zeroed outputs."""
    zero, one = np.int64(0), np.int64(1)
    experts = n_experts * n * m
    at_decoder = 0 if tied else experts
    at_bias = experts + at_decoder
    at_router = at_bias + n_experts * n
    at_shared = at_router + n_experts * n
    at_shared_decoder = at_shared if tied else at_shared + n * m0
    at_shared_bias = at_shared_decoder + n * m0

    scores, powers = np.empty((n_experts, chunk), np.float32), np.empty((n_experts, chunk), np.float32)
    weights = np.empty((n_experts, chunk), np.float32)
    total, best, value = np.empty(chunk, np.float32), np.empty(chunk, np.float32), np.empty(chunk, np.float32)
    last, place = np.empty(chunk, np.int32), np.empty(chunk, np.int32)
    members, offsets = np.empty(k * chunk, np.uint32), np.empty(n_experts + 1, np.uint32)
    gathered = np.empty((1 if masked else n, chunk), np.float32)
    hidden = np.empty((n_experts * m, chunk) if masked else (m, k * chunk), np.float32)
    shared = np.empty((max(1, m0), chunk), np.float32)
    out, y = np.empty((1, chunk), np.float32), np.empty((1, chunk), np.float32)
    gain, inverse = np.empty(chunk, np.float64), np.empty(chunk, np.float64)
    samples = batches.shape[2]
    for s in range(begin, end):
        theta, square, x = states[s], squares[s], batches[which[s]]
        for first in range(0, samples, chunk):
            size = min(chunk, samples - first)
            for e in range(n_experts):
                _affine(scores, e, zero, size, np.float32(0.0), theta, at_router + e * n, one, x, zero, first, n)
            _gates(gate[s], k, n_experts, size, scores, powers, total, best, last, value, place, weights)
            _count_routing(size, powers, total, weights, assignments[s], gate_sums[s], prob_sums[s])
            _hidden(
                n, m, m0, at_shared, theta, x, first, size, masked, weights, members, offsets, gathered, hidden, shared
            )
            for i in range(n):
                _reconstruct(
                    i, m, m0, tied, at_decoder, at_bias, at_shared, at_shared_decoder, at_shared_bias, theta, square,
                    n, size, masked, total, weights, members, offsets, hidden, shared, out, y, gain,
                )  # fmt: skip
                _invert(x, i, first, size, above, gain, inverse)
                squared_error[s, i] += _squares(size, out, x, i, first)
                represented[s, i] += _positive(size, inverse)
                for e in range(n_experts):
                    if masked:
                        mass = _carried(size, weights, e, inverse)
                    else:
                        mass = _carried_by(offsets[e], offsets[e + 1], members, weights, e, inverse)
                    carried[s, e, i] += square[e, i] * mass
                if m0:
                    carried[s, n_experts, i] += square[n_experts, i] * _sum(size, inverse)
