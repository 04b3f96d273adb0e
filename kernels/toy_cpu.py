"""CPU twins of the toy-model ops in Numba: Philox, feature sampling, and whole training. Imported on first CPU use.

One module, because Numba's on-disk cache notices a change only in the file that holds the cached function.
"""

from __future__ import annotations

import numpy as np
from numba import get_num_threads as get_num_threads
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


@njit(inline="always")
def uniform_row(key, row, step, stream, words, out, n):
    """Fill out[:n] with U[0, 1): element 4·block + w is word w of counter (row, block, step, stream).

    ``words`` (4, blocks) uint32 is scratch: with the four words of a counter apart, the rounds vectorise over blocks.
    """
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


@njit(nogil=True, error_model="numpy", fastmath=_MATH)
def _route(x, n, active, n_active, router, router_t, gate, probs, weights, ids):
    """List each row's present features; fill probs = softmax(s), ids = the top-k of s (lowest id first) and the gates.

    ``router`` (E, padded) serves rows where most features are present, its transpose ``router_t`` (n, E) the others.
    """
    batch, padded = x.shape
    n_experts, k = probs.shape[1], ids.shape[1]
    scores, taken = np.empty(n_experts, np.float32), np.empty(n_experts, np.bool_)
    for b in range(batch):
        count = 0
        for i in range(n):
            active[b, count] = i
            count += x[b, i] != 0
        n_active[b] = count
        if count * (n_experts // _LANES + n_experts % _LANES) < n_experts * (padded // _LANES + 4):
            for e in range(n_experts):
                scores[e] = 0.0
            for a in range(count):
                i = active[b, a]
                for e in range(n_experts):
                    scores[e] += x[b, i] * router_t[i, e]
        else:
            for e in range(n_experts):
                total = np.float32(0.0)
                for i in range(padded):
                    total += x[b, i] * router[e, i]
                scores[e] = total
        top = scores[0]
        for e in range(1, n_experts):
            top = max(top, scores[e])
        for e in range(n_experts):
            probs[b, e] = np.exp(scores[e] - top)
        total = np.float32(0.0)
        for e in range(n_experts):
            total += probs[b, e]
        for e in range(n_experts):
            probs[b, e] /= total
            taken[e] = False
        for j in range(k):
            best = -1
            for e in range(n_experts):
                if not taken[e] and (best < 0 or scores[e] > scores[best]):
                    best = e
            taken[best] = True
            ids[b, j] = best
        first = scores[ids[b, 0]]
        total = np.float32(0.0)
        for j in range(k):
            total += np.exp(scores[ids[b, j]] - first)
        for j in range(k):
            score = scores[ids[b, j]]
            if gate == SWITCH:
                weights[b, j] = probs[b, ids[b, j]]
            elif gate == SIGMOID:
                weights[b, j] = np.float32(1.0) / (np.float32(1.0) + np.exp(-score))
            else:
                weights[b, j] = np.exp(score - first) / total


@njit(nogil=True, error_model="numpy", fastmath=_MATH)
def _loss_and_gradients(
    x, active, n_active, ids, weights, width, scale, importance, enc, enc_t, dec_t, bias, g_enc, g_enc_t, g_dec_t,
    g_bias, d_weights, tied,
):  # fmt: skip
    """Add the gradients of scale · Σ_b Σ_f I_f (x_bf − x'_bf)² and return Σ_b Σ_f I_f (x_bf − x'_bf)².

    Expert e has ``width[e]`` hidden units; ``enc`` is (E, n, m), ``enc_t`` and ``dec_t`` are (E, m, padded). Where most
    features are present, products run over all of them, and a tied encoder's gradient goes into ``g_dec_t`` with the
    decoder's; elsewhere rows of ``enc`` are gathered. Everything is indexed in place: a view costs two atomic counts.
    """
    batch, n = x.shape
    slots = ids.shape[1]
    h, dh = np.empty((slots, enc.shape[2]), np.float32), np.empty(enc.shape[2], np.float32)
    y, dz = np.empty((slots, n), np.float32), np.empty(n, np.float32)
    out, residual = np.empty(n, np.float32), np.empty(n, np.float32)
    loss = np.float64(0.0)
    for b in range(batch):
        dense = n_active[b] * 8 > n
        both = dense and tied
        for i in range(n):
            out[i] = -x[b, i]
        for slot in range(slots):
            e, w = ids[b, slot], weights[b, slot]
            m = width[e]
            if dense:
                for j in range(m):
                    total = np.float32(0.0)
                    for i in range(n):
                        total += x[b, i] * enc_t[e, j, i]
                    h[slot, j] = total
            else:
                for j in range(m):
                    h[slot, j] = 0.0
                for a in range(n_active[b]):
                    f = active[b, a]
                    for j in range(m):
                        h[slot, j] += x[b, f] * enc[e, f, j]
            for i in range(n):
                y[slot, i] = bias[e, i]
            for j in range(0, m - 3, 4):
                h0, h1, h2, h3 = h[slot, j], h[slot, j + 1], h[slot, j + 2], h[slot, j + 3]
                for i in range(n):
                    two = h0 * dec_t[e, j, i] + h1 * dec_t[e, j + 1, i]
                    y[slot, i] += two + h2 * dec_t[e, j + 2, i] + h3 * dec_t[e, j + 3, i]
            for j in range(m // 4 * 4, m):
                h0 = h[slot, j]
                for i in range(n):
                    y[slot, i] += h0 * dec_t[e, j, i]
            for i in range(n):
                y[slot, i] = np.float32(0.0) if y[slot, i] <= 0 else y[slot, i]
                out[i] += w * y[slot, i]
        for i in range(n):
            residual[i] = np.float32(2.0) * scale * importance[i] * out[i]
        error = np.float32(0.0)
        for i in range(n):
            error += importance[i] * out[i] * out[i]
        loss += error

        for slot in range(slots):
            e, w = ids[b, slot], weights[b, slot]
            m = width[e]
            total = np.float32(0.0)
            for i in range(n):
                total += residual[i] * y[slot, i]
            d_weights[b, slot] = total
            for i in range(n):
                d = w * residual[i] if y[slot, i] > 0 else np.float32(0.0)
                dz[i] = d
                g_bias[e, i] += d
            for j in range(0, m - 3, 4):
                h0, h1, h2, h3 = h[slot, j], h[slot, j + 1], h[slot, j + 2], h[slot, j + 3]
                a0 = a1 = a2 = a3 = np.float32(0.0)
                for i in range(n):
                    d = dz[i]
                    a0 += d * dec_t[e, j, i]
                    a1 += d * dec_t[e, j + 1, i]
                    a2 += d * dec_t[e, j + 2, i]
                    a3 += d * dec_t[e, j + 3, i]
                if both:
                    for i in range(n):
                        d, v = dz[i], x[b, i]
                        g_dec_t[e, j, i] += h0 * d + a0 * v
                        g_dec_t[e, j + 1, i] += h1 * d + a1 * v
                        g_dec_t[e, j + 2, i] += h2 * d + a2 * v
                        g_dec_t[e, j + 3, i] += h3 * d + a3 * v
                else:
                    for i in range(n):
                        d = dz[i]
                        g_dec_t[e, j, i] += h0 * d
                        g_dec_t[e, j + 1, i] += h1 * d
                        g_dec_t[e, j + 2, i] += h2 * d
                        g_dec_t[e, j + 3, i] += h3 * d
                dh[j], dh[j + 1], dh[j + 2], dh[j + 3] = a0, a1, a2, a3
            for j in range(m // 4 * 4, m):
                a0, h0 = np.float32(0.0), h[slot, j]
                for i in range(n):
                    a0 += dz[i] * dec_t[e, j, i]
                a1 = a0 if both else np.float32(0.0)
                for i in range(n):
                    g_dec_t[e, j, i] += h0 * dz[i] + a1 * x[b, i]
                dh[j] = a0
            if dense and not tied:
                for j in range(m):
                    a0 = dh[j]
                    for i in range(n):
                        g_enc_t[e, j, i] += a0 * x[b, i]
            elif not dense:
                for a in range(n_active[b]):
                    f = active[b, a]
                    for j in range(m):
                        g_enc[e, f, j] += x[b, f] * dh[j]
    return loss


@njit(nogil=True, error_model="numpy", fastmath=_MATH)
def _router_gradient(gate, x, active, n_active, probs, weights, ids, d_weights, load, load_scale, g_router_t):
    """Add Σ_b x_b ⊗ dL/ds_b, through the gate weights and the load-balance loss, into ``g_router_t`` (n, E)."""
    batch, n_experts = probs.shape
    k = ids.shape[1]
    d_scores = np.empty(n_experts, np.float32)
    for b in range(batch):
        for e in range(n_experts):
            d_scores[e] = 0.0
        mean = np.float32(0.0)
        if gate in (SWITCH, STRAIGHT_THROUGH):
            for j in range(k):
                mean += probs[b, ids[b, j]] * d_weights[b, j]
            for e in range(n_experts):
                d_scores[e] = -probs[b, e] * mean
            for j in range(k):
                d_scores[ids[b, j]] += probs[b, ids[b, j]] * d_weights[b, j]
        elif gate == SIGMOID:
            for j in range(k):
                d_scores[ids[b, j]] = d_weights[b, j] * weights[b, j] * (np.float32(1.0) - weights[b, j])
        elif k > 1:
            for j in range(k):
                mean += weights[b, j] * d_weights[b, j]
            for j in range(k):
                d_scores[ids[b, j]] = weights[b, j] * (d_weights[b, j] - mean)
        if load_scale != 0:
            mean = np.float32(0.0)
            for e in range(n_experts):
                mean += load[e] * probs[b, e]
            for e in range(n_experts):
                d_scores[e] += load_scale * probs[b, e] * (load[e] - mean)
        for a in range(n_active[b]):
            i = active[b, a]
            for e in range(n_experts):
                g_router_t[i, e] += x[b, i] * d_scores[e]


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


@njit(nogil=True, error_model="numpy")
def _load(weight, rows, rows_t, first):
    """Copy weight (E, n, m) to rows[first:] (·, n, ≥ m), and transposed to rows_t[first:] (·, ≥ m, ≥ n)."""
    for e in range(weight.shape[0]):
        for i in range(weight.shape[1]):
            for j in range(weight.shape[2]):
                rows[first + e, i, j] = weight[e, i, j]
                rows_t[first + e, j, i] = weight[e, i, j]


@njit(nogil=True, error_model="numpy")
def _gather(grad, rows, rows_t, first):
    """Write rows[first:] + transposed rows_t[first:] into grad (E, n, m)."""
    for e in range(grad.shape[0]):
        for i in range(grad.shape[1]):
            for j in range(grad.shape[2]):
                grad[e, i, j] = rows[first + e, i, j] + rows_t[first + e, j, i]


@njit(nogil=True, error_model="numpy", fastmath=_MATH, cache=True)
def train_model(
    n, m, n_experts, k, m0, tied, batch, theta, exp_avg, exp_avg_sq, kind, key, p, size, importance, gate, lr, decay,
    beta1, beta2, eps, load_balance, scale, first_step, losses, load_losses,
):  # fmt: skip
    """Run ``losses.shape[0]`` steps of one model, its flat state updated in place.

    The shared expert is one more expert, number E, of width m0, that every sample takes last and with weight 1.
    """
    padded = (n + _LANES - 1) // _LANES * _LANES
    experts, shared_size = n_experts * n * m, n * m0
    at_decoder = experts
    at_bias = experts if tied else 2 * experts
    at_router = at_bias + n_experts * n
    at_shared = at_router + n_experts * n
    at_shared_decoder = at_shared + shared_size
    at_shared_bias = at_shared_decoder if tied else at_shared_decoder + shared_size
    end = at_shared_bias + (n if m0 else 0)
    grad = np.zeros(theta.shape[0], np.float32)

    stack, wide, slots = n_experts + (1 if m0 else 0), max(m, m0), k + (1 if m0 else 0)
    width = np.full(stack, m)
    enc, g_enc = np.zeros((stack, n, wide), np.float32), np.zeros((stack, n, wide), np.float32)
    enc_t, g_enc_t = np.zeros((stack, wide, padded), np.float32), np.zeros((stack, wide, padded), np.float32)
    dec, no_rows, dec_t, g_dec_t = enc, enc, enc_t, np.zeros((stack, wide, padded), np.float32)
    if not tied:
        dec, no_rows, dec_t = np.zeros_like(enc), np.zeros_like(enc), np.zeros_like(enc_t)
    bias, g_bias = np.zeros((stack, padded), np.float32), np.zeros((stack, padded), np.float32)
    router, router_t = np.zeros((1, n_experts, padded), np.float32), np.zeros((1, n, n_experts), np.float32)
    g_router_t = np.zeros((n, n_experts), np.float32)
    importance_row = np.zeros(padded, np.float32)
    importance_row[:n] = importance
    x = np.zeros((batch, padded), np.float32)
    active, n_active = np.empty((batch, n), np.int32), np.empty(batch, np.int64)
    probs, load = np.empty((batch, n_experts), np.float32), np.empty(n_experts, np.float32)
    weights, d_weights = np.ones((batch, slots), np.float32), np.empty((batch, slots), np.float32)
    ids = np.full((batch, slots), n_experts)
    if m0:
        width[n_experts] = m0
    frozen = gate in (RANDOM, ORACLE)
    load_scale = np.float32(0.0 if frozen else load_balance * n_experts / batch)

    for local in range(losses.shape[0]):
        step = first_step + local
        _load(theta[:experts].reshape(n_experts, n, m), enc, enc_t, 0)
        bias[:n_experts, :n] = theta[at_bias:at_router].reshape(n_experts, n)
        _load(theta[at_router:at_shared].reshape(1, n_experts, n), router, router_t, 0)
        if m0:
            _load(theta[at_shared:at_shared_decoder].reshape(1, n, m0), enc, enc_t, n_experts)
            bias[n_experts, :n] = theta[at_shared_bias:end]
        if not tied:
            _load(theta[at_decoder:at_bias].reshape(n_experts, n, m), dec, dec_t, 0)
            if m0:
                _load(theta[at_shared_decoder:at_shared_bias].reshape(1, n, m0), dec, dec_t, n_experts)
        for buffer in (g_enc, g_enc_t, g_dec_t):
            buffer[:] = 0.0
        g_bias[:] = 0.0
        g_router_t[:] = 0.0

        feature_rows(kind, key, step, 0, p, size, 0, batch, x)
        _route(x, n, active, n_active, router[0], router_t[0], gate, probs, weights[:, :k], ids[:, :k])
        load[:] = 0.0
        for b in range(batch):
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

        loss = _loss_and_gradients(
            x, active, n_active, ids, weights, width, scale, importance_row, enc, enc_t, dec_t, bias, g_enc, g_enc_t,
            g_dec_t, g_bias, d_weights, tied,
        )  # fmt: skip
        losses[local] = np.float32(loss * scale)
        if not frozen:
            _router_gradient(gate, x, active, n_active, probs, weights[:, :k], ids[:, :k], d_weights[:, :k], load,
                             load_scale, g_router_t)  # fmt: skip

        if tied:
            _gather(grad[:experts].reshape(n_experts, n, m), g_enc, g_dec_t, 0)
            if m0:
                _gather(grad[at_shared:at_shared_decoder].reshape(1, n, m0), g_enc, g_dec_t, n_experts)
        else:
            _gather(grad[:experts].reshape(n_experts, n, m), g_enc, g_enc_t, 0)
            _gather(grad[at_decoder:at_bias].reshape(n_experts, n, m), no_rows, g_dec_t, 0)
            if m0:
                _gather(grad[at_shared:at_shared_decoder].reshape(1, n, m0), g_enc, g_enc_t, n_experts)
                _gather(grad[at_shared_decoder:at_shared_bias].reshape(1, n, m0), no_rows, g_dec_t, n_experts)
        grad[at_bias:at_router].reshape(n_experts, n)[:] = g_bias[:n_experts, :n]
        grad[at_router:at_shared].reshape(n_experts, n)[:] = g_router_t.T
        if m0:
            grad[at_shared_bias:end] = g_bias[n_experts, :n]
        args = (lr[local], decay, beta1, beta2, eps, step)
        first, last = (at_router, at_shared) if frozen else (end, end)
        _adamw(theta[:first], grad[:first], exp_avg[:first], exp_avg_sq[:first], *args)
        _adamw(theta[last:end], grad[last:end], exp_avg[last:end], exp_avg_sq[last:end], *args)
