"""CPU twins of the toy-model ops in Numba: Philox, feature sampling, AdamW. Imported on first CPU use."""

from __future__ import annotations

import numpy as np
from numba import get_num_threads as get_num_threads
from numba import njit, prange

PAPER, SWITCH, SIGMOID, STRAIGHT_THROUGH, RANDOM, ORACLE = range(6)
INDEPENDENT, CORRELATED, ANTICORRELATED, CLUSTERED, EXACTLY_K = range(5)

LANES = 16
# Reassociation and contraction let LLVM use SIMD; NaN and infinity keep their meaning, so a diverged run is seen.
# An index that might be negative, which Numba would wrap around, is no address LLVM can vectorise: hence max(0, at).
# A loop that sums must not also store: LLVM would choose between a SIMD and a scalar version by the arrays' addresses,
# and the sum's bits with it.
MATH = {"contract", "reassoc", "nsz"}

# The generator is Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC11): multipliers, then Weyl key
# increments.
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
LOW = np.uint64(0xFFFFFFFF)
SHIFT = np.uint64(32)
# Triton's scale: the largest float32 for which 2³¹ − 1 maps below 1.
_TO_UNIT = np.float32(4.6566127342e-10)


@njit(inline="always")
def unit(word):
    """Return a 32-bit word as a float32 in [0, 1)."""
    # The sign bit folded as in Triton's uint_to_uniform_float: x >= 0 ? x : -x - 1 on the word read as int32.
    x = np.int32(word)
    return np.float32(x ^ (x >> np.int32(31))) * _TO_UNIT


@njit(inline="always")
def philox(low, high, row, block, step, stream):
    """Return the four words of a counter as uint64, for the key's two halves."""
    c0, c1, c2, c3 = np.uint64(row), np.uint64(block), np.uint64(step), np.uint64(stream)
    k0, k1 = low, high
    for _ in range(10):
        p0 = _M0 * c0
        p1 = _M1 * c2
        c0 = (p1 >> SHIFT) ^ c1 ^ k0
        c1 = p1 & LOW
        c2 = (p0 >> SHIFT) ^ c3 ^ k1
        c3 = p0 & LOW
        k0 = (k0 + _W0) & LOW
        k1 = (k1 + _W1) & LOW
    return c0, c1, c2, c3


@njit(nogil=True, error_model="numpy")
def philox_words(key, rows, block, step, stream, words):
    """Write Philox4x32-10 of counters (row, block, step, stream), row < ``rows``, to words[:, row] (4, rows) uint32.

    With the four words of a counter apart, the rounds vectorise over rows.
    """
    low, high = key & LOW, key >> SHIFT
    for row in range(rows):
        words[0, row], words[1, row], words[2, row], words[3, row] = philox(low, high, row, block, step, stream)


@njit(nogil=True, error_model="numpy")
def uniform_row(key, row, step, stream, words, out, n):
    """Fill out[:n] with U[0, 1): element 4·block + w is word w of counter (row, block, step, stream).

    ``words`` (4, blocks) uint32 is scratch, as in `philox_words`; here the rounds vectorise over blocks.
    """
    blocks = (n + 3) // 4
    low, high = key & LOW, key >> SHIFT
    for block in range(blocks):
        words[0, block], words[1, block], words[2, block], words[3, block] = philox(low, high, row, block, step, stream)
    for block in range(n // 4):
        for w in range(4):
            out[4 * block + w] = unit(words[w, block])
    for w in range(n % 4):
        out[n // 4 * 4 + w] = unit(words[w, blocks - 1])


@njit(error_model="numpy", nogil=True)
def feature_rows(kind, key, step, stream, p, size, first_row, last_row, x):
    """Write samples first_row … last_row − 1 of one model into x[:, :n], n the length of p."""
    n = p.shape[0]
    words, order = np.empty((4, (n + 3) // 4), np.uint32), np.empty(n, np.int64)
    u, v = np.empty(n, np.float32), np.empty(n, np.float32)
    for row in range(first_row, last_row):
        uniform_row(key, row, step, stream, words, u, n)
        if kind == INDEPENDENT:
            # Two loops: with the division under the condition, LLVM keeps a branch, which is mispredicted all the time.
            for i in range(n):
                v[i] = u[i] / p[i]
            for i in range(n):
                x[row, i] = v[i] if u[i] < p[i] else np.float32(0.0)
            continue
        for i in range(n):
            x[row, i] = 0.0
        if kind == EXACTLY_K:
            uniform_row(key, row, step, stream + 1, words, v, size)
            for i in range(n):
                order[i] = i
            for j in range(size):  # the first steps of a Fisher–Yates shuffle
                other = j + min(np.int64(v[j] * np.float32(n - j)), n - j - 1)
                i = order[other]
                order[other] = order[j]
                x[row, i] = u[i]
        elif kind == CLUSTERED:
            uniform_row(key, row, step, stream + 1, words, v, 1)
            clusters = n // size
            first = min(np.int64(v[0] * np.float32(clusters)), clusters - 1) * size
            for i in range(first, first + size):
                v[i] = u[i] / p[i]
            for i in range(first, first + size):
                x[row, i] = v[i] if u[i] < p[i] else np.float32(0.0)
        else:
            groups = n // size
            uniform_row(key, row, step, stream + 1, words, v, groups)
            for g in range(groups):
                first = g * size
                if kind == CORRELATED:
                    for i in range(first, first + size):
                        x[row, i] = u[i] if v[g] < p[first] else np.float32(0.0)
                    continue
                total = p[first] * np.float32(size)
                if v[g] < total:
                    i = first + min(np.int64(v[g] / total * np.float32(size)), size - 1)
                    x[row, i] = u[i]


@njit(error_model="numpy", parallel=True, cache=True)
def sample_dense(kind, seeds, step, stream, p, size, out):
    """Fill out (S, B, n): model s draws from key seeds[s]."""
    n_models, batch, _ = out.shape
    per_task = 64
    tasks = (batch + per_task - 1) // per_task
    for task in prange(n_models * tasks):
        s, first = task // tasks, task % tasks * per_task
        feature_rows(kind[s], seeds[s], step, stream, p[s], size[s], first, min(batch, first + per_task), out[s])


@njit(inline="always")
def exp32(x):
    """e^x for x ≤ 0 in float32, to 1e-7 relative: NumPy's own does not vectorise in compiled code.

    x = k ln 2 + r with ln 2 in two parts, then a polynomial for e^r (coefficients of Cephes' expf). Callers must not
    allow reassociation, which would join the two parts.
    """
    k = np.floor(max(x, np.float32(-87.0)) * np.float32(1.4426950408889634) + np.float32(0.5))
    r = max(x, np.float32(-87.0)) - k * np.float32(0.693359375) + k * np.float32(2.12194440e-4)
    y = np.float32(1.9875691500e-4) * r + np.float32(1.3981999507e-3)
    y = y * r + np.float32(8.3334519073e-3)
    y = y * r + np.float32(4.1665795894e-2)
    y = y * r + np.float32(1.6666665459e-1)
    y = y * r + np.float32(0.5)
    scale = np.int32((np.int32(k) + np.int32(127)) << np.int32(23)).view(np.float32)
    # max() drops a NaN; the last term keeps it.
    return (y * r * r + r + np.float32(1.0)) * scale + np.float32(0.0) * x


@njit(nogil=True, error_model="numpy")
def aligned(rows, columns):
    """Zeros (rows, columns) that start on a cache line: a 64-byte load across two lines takes twice as long."""
    raw = np.zeros(rows * columns + LANES, np.float32)
    first = (-(raw.ctypes.data // 4)) % LANES
    return raw[first : first + rows * columns].reshape(rows, columns)


@njit(nogil=True, error_model="numpy")
def draw_columns(kind, key, step, stream, p, size, batch, words, rows, x):
    """Write samples 0 … batch − 1 of one model into x[:, :batch], one feature a row.

    ``words`` (4, batch) uint32 and, but for independent features, ``rows`` (batch, n) float32 are scratch.
    """
    n = p.shape[0]
    if kind != INDEPENDENT:
        feature_rows(kind, key, step, stream, p, size, 0, batch, rows)
        for i in range(n):
            for b in range(batch):
                x[i, b] = rows[b, i]
        return
    for block in range((n + 3) // 4):
        philox_words(key, batch, block, step, stream, words)
        for w in range(min(4, n - 4 * block)):
            i, q = 4 * block + w, p[4 * block + w]
            for b in range(batch):
                u = unit(words[w, b])
                v = u / q
                x[i, b] = v if u < q else np.float32(0.0)


@njit(nogil=True, error_model="numpy", fastmath=MATH)
def adamw(theta, grad, exp_avg, exp_avg_sq, lr, decay, beta1, beta2, eps, step):
    """Loshchilov and Hutter's AdamW, in the order of operations of torch.optim.AdamW."""
    step_size = np.float32(lr / (1.0 - beta1 ** (step + 1)))
    root = np.float32(1.0 / np.sqrt(1.0 - beta2 ** (step + 1)))
    keep, small = np.float32(1.0 - lr * decay), np.float32(eps)
    one1, b2, one2 = np.float32(1.0 - beta1), np.float32(beta2), np.float32(1.0 - beta2)
    for i in range(theta.shape[0]):
        g = grad[i]
        exp_avg[i] += one1 * (g - exp_avg[i])
        exp_avg_sq[i] = b2 * exp_avg_sq[i] + one2 * g * g
        theta[i] = theta[i] * keep - step_size * exp_avg[i] / (np.sqrt(exp_avg_sq[i]) * root + small)
