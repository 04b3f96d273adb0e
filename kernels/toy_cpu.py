"""CPU twins of the toy-model ops in Numba: Philox, feature sampling, and whole training. Imported on first CPU use.

One module, because Numba's on-disk cache notices a change only in the file that holds the cached function.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

PAPER, SWITCH, SIGMOID, STRAIGHT_THROUGH, RANDOM, ORACLE = range(6)
INDEPENDENT, CORRELATED, ANTICORRELATED, CLUSTERED, EXACTLY_K = range(5)

_LANES = 16
# Reassociation and contraction let LLVM use SIMD; NaN and infinity keep their meaning, so a diverged run is seen.
# A loop that sums must not also store: LLVM would choose between a SIMD and a scalar version by the arrays' addresses,
# and the sum's bits with it.
_MATH = {"contract", "reassoc", "nsz"}

# The generator is Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC11): multipliers, then Weyl key
# increments.
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
# Triton's scale: the largest float32 for which 2³¹ − 1 maps below 1.
_TO_UNIT = np.float32(4.6566127342e-10)


@njit(inline="always")
def _unit(word):
    # The sign bit folded as in Triton's uint_to_uniform_float: x >= 0 ? x : -x - 1 on the word read as int32.
    x = np.int32(word)
    return np.float32(x ^ (x >> np.int32(31))) * _TO_UNIT


@njit(error_model="numpy", nogil=True)
def uniform_row(key, row, step, stream, words, out):
    """Fill ``out`` with U[0, 1): element 4·block + w is word w of counter (row, block, step, stream).

    ``words`` (4, blocks) uint32 is scratch: with the four words of a counter apart, the rounds vectorise over blocks.
    """
    n = out.shape[0]
    blocks = (n + 3) // 4
    low, high = key & _LOW, key >> _SHIFT
    for block in range(blocks):
        c0, c1, c2, c3 = np.uint64(row), np.uint64(block), np.uint64(step), np.uint64(stream)
        k0, k1 = low, high
        for _ in range(10):
            p0 = _M0 * c0
            p1 = _M1 * c2
            c0 = (p1 >> _SHIFT) ^ c1 ^ k0
            c1 = p1 & _LOW
            c2 = (p0 >> _SHIFT) ^ c3 ^ k1
            c3 = p0 & _LOW
            k0 = (k0 + _W0) & _LOW
            k1 = (k1 + _W1) & _LOW
        words[0, block] = c0
        words[1, block] = c1
        words[2, block] = c2
        words[3, block] = c3
    for block in range(n // 4):
        for w in range(4):
            out[4 * block + w] = _unit(words[w, block])
    for w in range(n % 4):
        out[n // 4 * 4 + w] = _unit(words[w, blocks - 1])


@njit(error_model="numpy", nogil=True)
def _thin(u, p, x):
    # Two loops: with the division under the condition, LLVM keeps a branch that is mispredicted at every other feature.
    for i in range(x.shape[0]):
        x[i] = u[i] / p[i]
    for i in range(x.shape[0]):
        x[i] = x[i] if u[i] < p[i] else np.float32(0.0)


@njit(error_model="numpy", nogil=True)
def feature_row(kind, key, row, step, stream, p, size, words, u, v, order, x):
    """Write one sample into x (n); words (4, ⌈n/4⌉), u, v and order (n) are scratch."""
    n = x.shape[0]
    if kind == EXACTLY_K:
        uniform_row(key, row, step, stream, words, u)
        uniform_row(key, row, step, stream + 1, words, v[:size])
        for i in range(n):
            x[i] = 0.0
            order[i] = i
        for j in range(size):  # the first steps of a Fisher–Yates shuffle
            other = j + min(np.int64(v[j] * np.float32(n - j)), n - j - 1)
            i = order[other]
            order[other] = order[j]
            x[i] = u[i]
        return
    if kind == CLUSTERED:
        uniform_row(key, row, step, stream + 1, words, v[:1])
        clusters = n // size
        first = min(np.int64(v[0] * np.float32(clusters)), clusters - 1) * size
        uniform_row(key, row, step, stream, words, u)
        for i in range(n):
            x[i] = 0.0
        _thin(u[first : first + size], p[first : first + size], x[first : first + size])
        return
    uniform_row(key, row, step, stream, words, u)
    if kind == INDEPENDENT:
        _thin(u, p, x)
        return
    groups = n // size
    uniform_row(key, row, step, stream + 1, words, v[:groups])
    for g in range(groups):
        first = g * size
        if kind == CORRELATED:
            present = v[g] < p[first]
            for i in range(first, first + size):
                x[i] = u[i] if present else np.float32(0.0)
        else:
            total = p[first] * np.float32(size)
            for i in range(first, first + size):
                x[i] = 0.0
            if v[g] < total:
                i = first + min(np.int64(v[g] / total * np.float32(size)), size - 1)
                x[i] = u[i]


@njit(error_model="numpy", parallel=True, cache=True)
def sample_dense(kind, seeds, step, stream, p, size, out):
    """Fill out (S, B, n): model s draws from key seeds[s]."""
    n_models, batch, n = out.shape
    per_task = 64
    tasks = (batch + per_task - 1) // per_task
    for task in prange(n_models * tasks):
        s, first = task // tasks, task % tasks * per_task
        words = np.empty((4, (n + 3) // 4), np.uint32)
        u, v, order = np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.int64)
        for row in range(first, min(batch, first + per_task)):
            feature_row(kind[s], seeds[s], row, step, stream, p[s], size[s], words, u, v, order, out[s, row])


@njit(nogil=True, error_model="numpy", fastmath=_MATH)
def _encode(x, active, n_active, weight, weight_t, h):
    """Compute h = x W, through the transpose where x is dense (n_active < 0), else by gathering the active rows."""
    m = h.shape[0]
    if n_active < 0:
        for j in range(m):
            total = np.float32(0.0)
            for i in range(x.shape[0]):
                total += x[i] * weight_t[j, i]
            h[j] = total
    else:
        for j in range(m):
            h[j] = 0.0
        for a in range(n_active):
            i = active[a]
            for j in range(m):
                h[j] += x[i] * weight[i, j]


@njit(nogil=True, error_model="numpy", fastmath=_MATH)
def _decode(h, decoder_t, bias, y):
    """Compute y = ReLU(h Dᵀ + b), four hidden units per sweep over the features."""
    m, n = h.shape[0], y.shape[0]
    for i in range(n):
        y[i] = bias[i]
    for j in range(0, m - 3, 4):
        h0, h1, h2, h3 = h[j], h[j + 1], h[j + 2], h[j + 3]
        for i in range(n):
            y[i] += (
                h0 * decoder_t[j, i] + h1 * decoder_t[j + 1, i] + h2 * decoder_t[j + 2, i] + h3 * decoder_t[j + 3, i]
            )
    for j in range(m // 4 * 4, m):
        for i in range(n):
            y[i] += h[j] * decoder_t[j, i]
    for i in range(n):
        y[i] = np.float32(0.0) if y[i] <= 0 else y[i]


@njit(nogil=True, error_model="numpy", fastmath=_MATH)
def _expert_backward(
    x, active, n_active, gate, residual, y, h, decoder_t, dz, dh, g_bias, g_decoder_t, g_weight, g_weight_t
):
    """Add one expert's gradients for one sample, given dL/dx' in ``residual``; the gate weight is ``gate``."""
    m, n = h.shape[0], y.shape[0]
    for i in range(n):
        d = gate * residual[i] if y[i] > 0 else np.float32(0.0)
        dz[i] = d
        g_bias[i] += d
    for j in range(0, m - 3, 4):
        h0, h1, h2, h3 = h[j], h[j + 1], h[j + 2], h[j + 3]
        a0 = a1 = a2 = a3 = np.float32(0.0)
        for i in range(n):
            d = dz[i]
            a0 += d * decoder_t[j, i]
            a1 += d * decoder_t[j + 1, i]
            a2 += d * decoder_t[j + 2, i]
            a3 += d * decoder_t[j + 3, i]
        for i in range(n):
            d = dz[i]
            g_decoder_t[j, i] += h0 * d
            g_decoder_t[j + 1, i] += h1 * d
            g_decoder_t[j + 2, i] += h2 * d
            g_decoder_t[j + 3, i] += h3 * d
        dh[j], dh[j + 1], dh[j + 2], dh[j + 3] = a0, a1, a2, a3
    for j in range(m // 4 * 4, m):
        a0 = np.float32(0.0)
        for i in range(n):
            a0 += dz[i] * decoder_t[j, i]
        for i in range(n):
            g_decoder_t[j, i] += h[j] * dz[i]
        dh[j] = a0
    if n_active < 0:
        for j in range(m):
            d = dh[j]
            for i in range(n):
                g_weight_t[j, i] += d * x[i]
    else:
        for a in range(n_active):
            i = active[a]
            for j in range(m):
                g_weight[i, j] += x[i] * dh[j]


@njit(nogil=True, error_model="numpy", fastmath=_MATH)
def _route(x, router, gate, scores, probs, weights, ids):
    """Fill probs = softmax(s), ids = the top-k of s (ties: lowest id first) and their gate weights."""
    n_experts, k = scores.shape[0], ids.shape[0]
    for e in range(n_experts):
        total = np.float32(0.0)
        for i in range(x.shape[0]):
            total += x[i] * router[e, i]
        scores[e] = total
    top = scores[0]
    for e in range(1, n_experts):
        top = max(top, scores[e])
    total = np.float32(0.0)
    for e in range(n_experts):
        probs[e] = np.exp(scores[e] - top)
    for e in range(n_experts):
        total += probs[e]
    for e in range(n_experts):
        probs[e] /= total
    for j in range(k):
        best = -1
        for e in range(n_experts):
            taken = False
            for other in range(j):
                taken |= ids[other] == e
            if not taken and (best < 0 or scores[e] > scores[best]):
                best = e
        ids[j] = best
    total = np.float32(0.0)
    for j in range(k):
        total += np.exp(scores[ids[j]] - scores[ids[0]])
    for j in range(k):
        if gate == SWITCH:
            weights[j] = probs[ids[j]]
        elif gate == SIGMOID:
            weights[j] = np.float32(1.0) / (np.float32(1.0) + np.exp(-scores[ids[j]]))
        else:
            weights[j] = np.exp(scores[ids[j]] - scores[ids[0]]) / total


@njit(nogil=True, error_model="numpy", fastmath=_MATH)
def _router_backward(gate, probs, weights, ids, d_weights, load, load_scale, d_scores):
    """d_scores = dL/ds of one sample; returns whether only the selected entries can be nonzero."""
    n_experts, k = probs.shape[0], ids.shape[0]
    for e in range(n_experts):
        d_scores[e] = 0.0
    if gate in (SWITCH, STRAIGHT_THROUGH):
        mean = np.float32(0.0)
        for j in range(k):
            mean += probs[ids[j]] * d_weights[j]
        for e in range(n_experts):
            d_scores[e] = -probs[e] * mean
        for j in range(k):
            d_scores[ids[j]] += probs[ids[j]] * d_weights[j]
    elif gate == SIGMOID:
        for j in range(k):
            d_scores[ids[j]] = d_weights[j] * weights[j] * (np.float32(1.0) - weights[j])
    elif k > 1:
        mean = np.float32(0.0)
        for j in range(k):
            mean += weights[j] * d_weights[j]
        for j in range(k):
            d_scores[ids[j]] = weights[j] * (d_weights[j] - mean)
    if load_scale != 0:
        mean = np.float32(0.0)
        for e in range(n_experts):
            mean += load[e] * probs[e]
        for e in range(n_experts):
            d_scores[e] += load_scale * probs[e] * (load[e] - mean)


@njit(nogil=True, error_model="numpy")
def _transpose(source, target):
    for e in range(source.shape[0]):
        for i in range(source.shape[1]):
            for j in range(source.shape[2]):
                target[e, j, i] = source[e, i, j]


@njit(nogil=True, error_model="numpy")
def _add_transpose(source, target):
    for e in range(target.shape[0]):
        for i in range(target.shape[1]):
            for j in range(target.shape[2]):
                target[e, i, j] += source[e, j, i]


@njit(nogil=True, error_model="numpy", fastmath=_MATH)
def _adamw(theta, grad, exp_avg, exp_avg_sq, lr, decay, beta1, beta2, eps, step):
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


@njit(nogil=True, error_model="numpy", fastmath=_MATH)
def _train_model(
    n, m, n_experts, k, m0, tied, batch, theta, exp_avg, exp_avg_sq, kind, key, p, size, importance, gate, lr, decay,
    beta1, beta2, eps, load_balance, scale, first_step, losses, load_losses,
):  # fmt: skip
    """Run ``losses.shape[0]`` steps of one model, its flat state updated in place."""
    padded = (n + _LANES - 1) // _LANES * _LANES
    experts = n_experts * n * m
    grad = np.zeros(theta.shape[0], np.float32)
    at_decoder = experts
    at_bias = experts if tied else 2 * experts
    at_router = at_bias + n_experts * n
    at_shared = at_router + n_experts * n
    at_shared_decoder = at_shared + n * m0
    at_shared_bias = at_shared_decoder if tied else at_shared_decoder + n * m0
    end = at_shared_bias + (n if m0 else 0)

    weight, g_weight = theta[:experts].reshape(n_experts, n, m), grad[:experts].reshape(n_experts, n, m)
    bias, g_bias = theta[at_bias:at_router].reshape(n_experts, n), grad[at_bias:at_router].reshape(n_experts, n)
    router, g_router = theta[at_router:at_shared].reshape(n_experts, n), grad[at_router:at_shared].reshape(n_experts, n)
    shared = theta[at_shared:at_shared_decoder].reshape(1, n, m0)
    g_shared = grad[at_shared:at_shared_decoder].reshape(1, n, m0)
    decoder, g_decoder, shared_decoder, g_shared_decoder = weight, g_weight, shared, g_shared
    if not tied:
        decoder = theta[at_decoder:at_bias].reshape(n_experts, n, m)
        g_decoder = grad[at_decoder:at_bias].reshape(n_experts, n, m)
        shared_decoder = theta[at_shared_decoder:at_shared_bias].reshape(1, n, m0)
        g_shared_decoder = grad[at_shared_decoder:at_shared_bias].reshape(1, n, m0)

    weight_t, decoder_t = np.zeros((n_experts, m, padded), np.float32), np.zeros((n_experts, m, padded), np.float32)
    g_weight_t, g_decoder_t = np.zeros_like(weight_t), np.zeros_like(weight_t)
    shared_t, shared_decoder_t = np.zeros((1, m0, padded), np.float32), np.zeros((1, m0, padded), np.float32)
    g_shared_t, g_shared_decoder_t = np.zeros_like(shared_t), np.zeros_like(shared_t)
    bias_row, g_bias_row = np.zeros((n_experts + 1, padded), np.float32), np.zeros((n_experts + 1, padded), np.float32)
    router_row, g_router_row = np.zeros((n_experts, padded), np.float32), np.zeros((n_experts, padded), np.float32)
    importance_row = np.zeros(padded, np.float32)
    importance_row[:n] = importance

    x = np.zeros((batch, padded), np.float32)
    words, u, v = np.empty((4, (n + 3) // 4), np.uint32), np.empty(n, np.float32), np.empty(n, np.float32)
    order, active = np.empty(n, np.int64), np.empty(n, np.int64)
    scores, d_scores = np.empty(n_experts, np.float32), np.empty(n_experts, np.float32)
    probs, weights = np.empty((batch, n_experts), np.float32), np.empty((batch, k), np.float32)
    ids, d_weights = np.empty((batch, k), np.int64), np.empty(k, np.float32)
    load = np.empty(n_experts, np.float32)
    h, y = np.empty((k, m), np.float32), np.empty((k, padded), np.float32)
    h0, y0 = np.empty(m0, np.float32), np.empty(padded, np.float32)
    dh, dh0 = np.empty(m, np.float32), np.empty(m0, np.float32)
    out, residual, dz = np.empty(padded, np.float32), np.empty(padded, np.float32), np.empty(padded, np.float32)
    frozen = gate in (RANDOM, ORACLE)
    load_scale = np.float32(0.0 if frozen else load_balance * n_experts / batch)

    for local in range(losses.shape[0]):
        step = first_step + local
        _transpose(weight, weight_t)
        _transpose(decoder, decoder_t)
        _transpose(shared, shared_t)
        _transpose(shared_decoder, shared_decoder_t)
        bias_row[:n_experts, :n] = bias
        router_row[:, :n] = router
        if m0:
            bias_row[n_experts, :n] = theta[at_shared_bias:end]
        for buffer in (grad, g_weight_t.reshape(-1), g_decoder_t.reshape(-1), g_shared_t.reshape(-1),
                       g_shared_decoder_t.reshape(-1), g_bias_row.reshape(-1), g_router_row.reshape(-1)):  # fmt: skip
            buffer[:] = 0.0

        load[:] = 0.0
        for b in range(batch):
            feature_row(kind, key, b, step, 0, p, size, words, u, v, order, x[b, :n])
            _route(x[b], router_row, gate, scores, probs[b], weights[b], ids[b])
            for j in range(k):
                load[ids[b, j]] += np.float32(1.0)
        load /= np.float32(batch * k)
        balance = 0.0
        for e in range(n_experts):
            mean = 0.0
            for b in range(batch):
                mean += probs[b, e]
            balance += load[e] * mean / batch
        load_losses[local] = np.float32(load_balance * n_experts * balance)

        loss = np.float64(0.0)
        for b in range(batch):
            row = x[b]
            n_active = 0
            for i in range(n):
                active[n_active] = i
                n_active += row[i] != 0
            if n_active * 8 > n:
                n_active = -1  # dense products are cheaper than gathers from here on
            for i in range(padded):
                out[i] = 0.0
            if m0:
                _encode(row, active, n_active, shared[0], shared_t[0], h0)
                _decode(h0, shared_decoder_t[0], bias_row[n_experts], y0)
                for i in range(padded):
                    out[i] = y0[i]
            for j in range(k):
                e = ids[b, j]
                _encode(row, active, n_active, weight[e], weight_t[e], h[j])
                _decode(h[j], decoder_t[e], bias_row[e], y[j])
                w = weights[b, j]
                for i in range(padded):
                    out[i] += w * y[j, i]
            for i in range(padded):
                out[i] -= row[i]
                residual[i] = np.float32(2.0) * scale * importance_row[i] * out[i]
            error = np.float32(0.0)
            for i in range(padded):
                error += importance_row[i] * out[i] * out[i]
            loss += error
            for j in range(k):
                e = ids[b, j]
                dot = np.float32(0.0)
                for i in range(padded):
                    dot += residual[i] * y[j, i]
                d_weights[j] = dot
                _expert_backward(
                    row, active, n_active, weights[b, j], residual, y[j], h[j], decoder_t[e], dz, dh,
                    g_bias_row[e], g_decoder_t[e], g_weight[e], g_weight_t[e],
                )  # fmt: skip
            if m0:
                _expert_backward(
                    row, active, n_active, np.float32(1.0), residual, y0, h0, shared_decoder_t[0], dz, dh0,
                    g_bias_row[n_experts], g_shared_decoder_t[0], g_shared[0], g_shared_t[0],
                )  # fmt: skip
            if not frozen:
                _router_backward(gate, probs[b], weights[b], ids[b], d_weights, load, load_scale, d_scores)
                for e in range(n_experts):
                    d = d_scores[e]
                    if d != 0:
                        for i in range(padded):
                            g_router_row[e, i] += d * row[i]
        losses[local] = np.float32(loss * scale)

        _add_transpose(g_weight_t, g_weight)
        _add_transpose(g_decoder_t, g_decoder)
        _add_transpose(g_shared_t, g_shared)
        _add_transpose(g_shared_decoder_t, g_shared_decoder)
        g_bias[:] = g_bias_row[:n_experts, :n]
        g_router[:] = g_router_row[:, :n]
        if m0:
            grad[at_shared_bias:end] = g_bias_row[n_experts, :n]
        args = (lr[local], decay, beta1, beta2, eps, step)
        first, last = (at_router, at_shared) if frozen else (end, end)
        _adamw(theta[:first], grad[:first], exp_avg[:first], exp_avg_sq[:first], *args)
        _adamw(theta[last:end], grad[last:end], exp_avg[last:end], exp_avg_sq[last:end], *args)


@njit(nogil=True, error_model="numpy", parallel=True, cache=True)
def train_models(
    n, m, n_experts, k, m0, tied, batch, theta, exp_avg, exp_avg_sq, kind, seeds, p, size, importance, gate, lr, decay,
    beta1, beta2, eps, load_balance, scale, first_step, losses, load_losses,
):  # fmt: skip
    """Train S models: the first axis of every per-model argument. A model's bits do not depend on the others."""
    for s in prange(theta.shape[0]):
        _train_model(
            n, m, n_experts, k, m0, tied, batch, theta[s], exp_avg[s], exp_avg_sq[s], kind[s], seeds[s], p[s], size[s],
            importance[s], gate[s], lr[s], decay[s], beta1[s], beta2[s], eps[s], load_balance[s], scale[s], first_step,
            losses[s], load_losses[s],
        )  # fmt: skip
