"""CPU twin of whole training for any shape: samples along SIMD lanes, grouped by expert."""

from __future__ import annotations

import numpy as np
from numba import njit

from moesaic.kernels._extras import LIBRARY
from moesaic.kernels.toy_cpu import (
    LANES,
    MATH,
    ORACLE,
    RANDOM,
    SIGMOID,
    STRAIGHT_THROUGH,
    SWITCH,
    adamw,
    aligned,
    draw_columns,
    exp32,
)

# Samples of an expert that pass through forward and backward together: x, y and r of them stay in a core's cache.
_CHUNK = 512
# An array's element, because Numba compiles a function anew for every literal it is called with.
_UNIT_STRIDE = np.ones(1, np.int64)


@njit(nogil=True, error_model="numpy", fastmath=MATH)
def _matmul(theta, first, by_in, by_out, x, x_at, n_in, out, out_at, n_out, width):
    """Add Σ_i theta[first + i·by_in + o·by_out] x[i, x_at + s] to out[o, out_at + s] for s < width."""
    x_at, out_at = max(0, x_at), max(0, out_at)
    for o in range(0, n_out - 3, 4):
        for i in range(0, n_in - 3, 4):
            t = first + i * by_in + o * by_out
            a0, a1, a2, a3 = theta[t], theta[t + by_in], theta[t + 2 * by_in], theta[t + 3 * by_in]
            t += by_out
            b0, b1, b2, b3 = theta[t], theta[t + by_in], theta[t + 2 * by_in], theta[t + 3 * by_in]
            t += by_out
            c0, c1, c2, c3 = theta[t], theta[t + by_in], theta[t + 2 * by_in], theta[t + 3 * by_in]
            t += by_out
            d0, d1, d2, d3 = theta[t], theta[t + by_in], theta[t + 2 * by_in], theta[t + 3 * by_in]
            for s in range(width):
                x0, x1, x2, x3 = x[i, x_at + s], x[i + 1, x_at + s], x[i + 2, x_at + s], x[i + 3, x_at + s]
                out[o, out_at + s] += a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3
                out[o + 1, out_at + s] += b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3
                out[o + 2, out_at + s] += c0 * x0 + c1 * x1 + c2 * x2 + c3 * x3
                out[o + 3, out_at + s] += d0 * x0 + d1 * x1 + d2 * x2 + d3 * x3
        for i in range(n_in // 4 * 4, n_in):
            t = first + i * by_in + o * by_out
            a0, b0, c0, d0 = theta[t], theta[t + by_out], theta[t + 2 * by_out], theta[t + 3 * by_out]
            for s in range(width):
                x0 = x[i, x_at + s]
                out[o, out_at + s] += a0 * x0
                out[o + 1, out_at + s] += b0 * x0
                out[o + 2, out_at + s] += c0 * x0
                out[o + 3, out_at + s] += d0 * x0
    for o in range(n_out // 4 * 4, n_out):
        for i in range(0, n_in - 3, 4):
            t = first + i * by_in + o * by_out
            a0, a1, a2, a3 = theta[t], theta[t + by_in], theta[t + 2 * by_in], theta[t + 3 * by_in]
            for s in range(width):
                two = a0 * x[i, x_at + s] + a1 * x[i + 1, x_at + s]
                out[o, out_at + s] += two + a2 * x[i + 2, x_at + s] + a3 * x[i + 3, x_at + s]
        for i in range(n_in // 4 * 4, n_in):
            a0 = theta[first + i * by_in + o * by_out]
            for s in range(width):
                out[o, out_at + s] += a0 * x[i, x_at + s]


@njit(nogil=True, error_model="numpy", fastmath=MATH)
def _outer(a, a_at, n_a, b, b_at, n_b, width, grad, first, by_a, by_b):
    """Add Σ_{s < width} a[i, a_at + s] b[j, b_at + s] to grad[first + i·by_a + j·by_b]: one reduction over samples."""
    a_at, b_at = max(0, a_at), max(0, b_at)
    for i in range(0, n_a - 3, 4):
        for j in range(0, n_b - 3, 4):
            g00 = g01 = g02 = g03 = g10 = g11 = g12 = g13 = np.float32(0.0)
            g20 = g21 = g22 = g23 = g30 = g31 = g32 = g33 = np.float32(0.0)
            for s in range(width):
                a0, a1, a2, a3 = a[i, a_at + s], a[i + 1, a_at + s], a[i + 2, a_at + s], a[i + 3, a_at + s]
                b0, b1, b2, b3 = b[j, b_at + s], b[j + 1, b_at + s], b[j + 2, b_at + s], b[j + 3, b_at + s]
                g00, g01, g02, g03 = g00 + a0 * b0, g01 + a0 * b1, g02 + a0 * b2, g03 + a0 * b3
                g10, g11, g12, g13 = g10 + a1 * b0, g11 + a1 * b1, g12 + a1 * b2, g13 + a1 * b3
                g20, g21, g22, g23 = g20 + a2 * b0, g21 + a2 * b1, g22 + a2 * b2, g23 + a2 * b3
                g30, g31, g32, g33 = g30 + a3 * b0, g31 + a3 * b1, g32 + a3 * b2, g33 + a3 * b3
            rows = ((g00, g01, g02, g03), (g10, g11, g12, g13), (g20, g21, g22, g23), (g30, g31, g32, g33))
            for u in range(4):
                t = first + (i + u) * by_a + j * by_b
                for v in range(4):
                    grad[t + v * by_b] += rows[u][v]
        for j in range(n_b // 4 * 4, n_b):
            g0 = g1 = g2 = g3 = np.float32(0.0)
            for s in range(width):
                b0 = b[j, b_at + s]
                g0 += a[i, a_at + s] * b0
                g1 += a[i + 1, a_at + s] * b0
                g2 += a[i + 2, a_at + s] * b0
                g3 += a[i + 3, a_at + s] * b0
            t = first + i * by_a + j * by_b
            grad[t] += g0
            grad[t + by_a] += g1
            grad[t + 2 * by_a] += g2
            grad[t + 3 * by_a] += g3
    for i in range(n_a // 4 * 4, n_a):
        for j in range(n_b):
            g0 = np.float32(0.0)
            for s in range(width):
                g0 += a[i, a_at + s] * b[j, b_at + s]
            grad[first + i * by_a + j * by_b] += g0


@njit(nogil=True, error_model="numpy", fastmath={"contract", "nsz"})
def _route(gate, scores, batch, probs, rest, top, weights, ids):
    """Fill probs = softmax(s) (E, B), ids (k, B) = the top-k of s, lowest id first, and the gates (k, B)."""
    n_experts, k = scores.shape[0], ids.shape[0]
    for j in range(k):
        source = scores if j == 0 else rest
        for b in range(batch):
            top[b] = source[0, b]
            ids[j, b] = 0
        for e in range(1, n_experts):
            for b in range(batch):
                better = source[e, b] > top[b]
                ids[j, b] = e if better else ids[j, b]
                top[b] = source[e, b] if better else top[b]
        if j == 0:
            for e in range(n_experts):
                for b in range(batch):
                    probs[e, b] = exp32(scores[e, b] - top[b])
            for b in range(batch):
                top[b] = probs[0, b]
            for e in range(1, n_experts):
                for b in range(batch):
                    top[b] += probs[e, b]
            for e in range(n_experts):
                for b in range(batch):
                    probs[e, b] /= top[b]
            if k > 1:
                for e in range(n_experts):
                    for b in range(batch):
                        rest[e, b] = scores[e, b]
        if k > 1:
            for b in range(batch):
                rest[ids[j, b], b] = -np.inf
    for j in range(k):
        for b in range(batch):
            weights[j, b] = scores[ids[j, b], b] if gate == SIGMOID else probs[ids[j, b], b]
    if gate == SIGMOID:
        for j in range(k):
            for b in range(batch):
                small = exp32(-abs(weights[j, b]))
                weights[j, b] = (np.float32(1.0) if weights[j, b] >= 0 else small) / (np.float32(1.0) + small)
    elif gate != SWITCH:
        # The largest probability is at least 1/E, so nothing here divides by zero.
        for b in range(batch):
            top[b] = weights[0, b]
        for j in range(1, k):
            for b in range(batch):
                top[b] += weights[j, b]
        for j in range(k):
            for b in range(batch):
                weights[j, b] /= top[b]


@njit(nogil=True, error_model="numpy")
def _group(ids, weights, batch, counts, start, source, position, sorted_weights):
    """Place every (sample, slot) among those of its expert, stably: expert e owns start[e] … start[e + 1] − 1.

    Shares are padded to whole vectors with sample number ``batch``, which is zero, and weight 0.
    """
    n_experts, k = counts.shape[0], ids.shape[0]
    counts[:] = 0
    for j in range(k):
        for b in range(batch):
            counts[ids[j, b]] += 1
    start[0] = 0
    for e in range(n_experts):
        start[e + 1] = start[e] + (counts[e] + LANES - 1) // LANES * LANES
        for at in range(start[e] + counts[e], start[e + 1]):
            source[at], sorted_weights[at] = batch, 0.0
        counts[e] = start[e]
    for b in range(batch):
        for j in range(k):
            e = ids[j, b]
            at = counts[e]
            counts[e] = at + 1
            source[at], position[j, b], sorted_weights[at] = b, at, weights[j, b]
    for e in range(n_experts):
        counts[e] -= start[e]


@njit(nogil=True, error_model="numpy")
def _take(x, n, source, width, out):
    """Copy out[i, s] = x[i, source[s]]."""
    for i in range(n):
        for s in range(width):
            out[i, s] = x[i, source[s]]


@njit(nogil=True, error_model="numpy", fastmath=MATH)
def _forward(theta, encoder, decoder, bias, n, m, x, x_at, h, y, at, width):
    """Compute h = x W and y = ReLU(h Dᵀ + b) of one expert for ``width`` samples."""
    at = max(0, at)
    for j in range(m):
        for s in range(width):
            h[j, at + s] = 0.0
    _matmul(theta, encoder, m, _UNIT_STRIDE[0], x, x_at, n, h, at, m, width)
    for i in range(n):
        b = theta[bias + i]
        for s in range(width):
            y[i, at + s] = b
    _matmul(theta, decoder, _UNIT_STRIDE[0], m, h, at, m, y, at, n, width)
    for i in range(n):
        for s in range(width):
            y[i, at + s] = np.float32(0.0) if y[i, at + s] <= 0 else y[i, at + s]


@njit(nogil=True, error_model="numpy", fastmath=MATH)
def _backward(theta, grad, encoder, decoder, bias, n, m, x, x_at, w, w_at, r, h, y, dh, at, width):
    """Add one expert's gradients, given its residual r = dL/dx'; r becomes dL/d(h Dᵀ + b)."""
    w_at, at = max(0, w_at), max(0, at)
    for i in range(n):
        for s in range(width):
            r[i, at + s] = w[w_at + s] * r[i, at + s] if y[i, at + s] > 0 else np.float32(0.0)
    for i in range(n):
        total = np.float32(0.0)
        for s in range(width):
            total += r[i, at + s]
        grad[bias + i] += total
    for j in range(m):
        for s in range(width):
            dh[j, at + s] = 0.0
    _matmul(theta, decoder, m, _UNIT_STRIDE[0], r, at, n, dh, at, m, width)
    _outer(r, at, n, h, at, m, width, grad, decoder, m, _UNIT_STRIDE[0])
    _outer(x, x_at, n, dh, at, m, width, grad, encoder, m, _UNIT_STRIDE[0])


@njit(nogil=True, error_model="numpy", fastmath=MATH)
def _residual(x, x_at, w, w_at, y, at, n, width, importance, scale, r):
    """Write r = 2·scale·I_i (w y − x) where one expert gives the whole output; returns Σ_i I_i Σ_s (w y − x)²."""
    x_at, w_at, at = max(0, x_at), max(0, w_at), max(0, at)
    loss = np.float64(0.0)
    for i in range(n):
        c = np.float32(2.0) * scale * importance[i]
        for s in range(width):
            r[i, at + s] = c * (w[w_at + s] * y[i, at + s] - x[i, x_at + s])
        total = np.float32(0.0)
        for s in range(width):
            error = w[w_at + s] * y[i, at + s] - x[i, x_at + s]
            total += error * error
        loss += importance[i] * total
    return loss


@njit(nogil=True, error_model="numpy", fastmath=MATH)
def _combine(x, y, position, weights, n, batch, shared, has_shared, importance, scale, r):
    """Write r = 2·scale·I_i (x' − x), x' = [y_0] + Σ_j w_j y_j in slot order; returns Σ_i I_i Σ_b (x' − x)²."""
    loss = np.float64(0.0)
    for i in range(n):
        for b in range(batch):
            r[i, b] = shared[i, b] - x[i, b] if has_shared else -x[i, b]
        for j in range(weights.shape[0]):
            for b in range(batch):
                r[i, b] += weights[j, b] * y[i, position[j, b]]
        total = np.float32(0.0)
        for b in range(batch):
            total += r[i, b] * r[i, b]
        loss += importance[i] * total
        c = np.float32(2.0) * scale * importance[i]
        for b in range(batch):
            r[i, b] *= c
    return loss


@njit(nogil=True, error_model="numpy", fastmath=MATH)
def _score_gradient(gate, probs, weights, ids, d_weights, load, load_scale, batch, mean, out):
    """Write out (E, B) = dL/ds through the gates and the load-balance loss."""
    n_experts, k = probs.shape[0], ids.shape[0]
    out[:, :batch] = 0.0
    through_softmax = gate in (SWITCH, STRAIGHT_THROUGH)
    if through_softmax or (gate != SIGMOID and k > 1):
        mean[:batch] = 0.0
        for j in range(k):
            for b in range(batch):
                mean[b] += d_weights[j, b] * (probs[ids[j, b], b] if through_softmax else weights[j, b])
        for j in range(k):
            for b in range(batch):
                w = probs[ids[j, b], b] if through_softmax else weights[j, b]
                out[ids[j, b], b] += w * (d_weights[j, b] if through_softmax else d_weights[j, b] - mean[b])
        if through_softmax:
            for e in range(n_experts):
                for b in range(batch):
                    out[e, b] -= probs[e, b] * mean[b]
    elif gate == SIGMOID:
        for j in range(k):
            for b in range(batch):
                w = weights[j, b]
                out[ids[j, b], b] += d_weights[j, b] * w * (np.float32(1.0) - w)
    if load_scale != 0:
        mean[:batch] = 0.0
        for e in range(n_experts):
            for b in range(batch):
                mean[b] += load[e] * probs[e, b]
        for e in range(n_experts):
            for b in range(batch):
                out[e, b] += load_scale * probs[e, b] * (load[e] - mean[b])


@njit(inline="always")
def _offsets(n, m, n_experts, tied):
    """Where the decoders and the biases begin in a flat section of experts."""
    return (0 if tied else n_experts * n * m), (1 if tied else 2) * n_experts * n * m


@njit(nogil=True, error_model="numpy", fastmath=MATH, cache=True)
def train_models(
    n, m, n_experts, k, m0, tied, batch, thetas, exp_avgs, exp_avg_sqs, kinds, keys, ps, sizes, importances, gates, lrs,
    decays, beta1s, beta2s, epss, load_balances, scales, first_step, losses, load_losses, library=LIBRARY,
):  # fmt: skip
    """Run ``losses.shape[1]`` steps of each model, its flat state updated in place.

    Samples lie along SIMD lanes, grouped by expert: an expert computes its own samples, padded to whole vectors. The
    shared expert is one more, number E, of width m0, that every sample takes with weight 1.
    """
    at_decoder, at_bias = _offsets(n, m, n_experts, tied)
    at_router = at_bias + n_experts * n
    at_shared = at_router + n_experts * n
    at_shared_decoder, at_shared_bias = _offsets(n, m0, 1, tied)
    at_shared_decoder, at_shared_bias = at_shared + at_shared_decoder, at_shared + at_shared_bias
    single, routed, origin = k == 1 and m0 == 0, n_experts > 1, np.int64(0)
    # One column after the batch stays zero: what pads an expert's share.
    columns = (batch // LANES + 1) * LANES
    total = columns if not routed else (batch * k // LANES + n_experts + 1) * LANES
    span = min(total, _CHUNK) if single else total
    x, scores, probs = aligned(n, columns), aligned(n_experts, columns), aligned(n_experts, columns)
    rest, d_scores = aligned(n_experts if k > 1 else 1, columns), aligned(n_experts, columns)
    words, rows = np.empty((4, batch), np.uint32), np.empty((batch, n), np.float32)
    scratch, weights, d_weights = np.zeros(columns, np.float32), aligned(k, columns), aligned(k, columns)
    ids, position = np.zeros((k, columns), np.int32), np.zeros((k, columns), np.int32)
    counts, start = np.zeros(n_experts, np.int64), np.zeros(n_experts + 1, np.int64)
    source, w, d_w = np.zeros(total, np.int32), np.zeros(total, np.float32), np.zeros(total, np.float32)
    xs = aligned(n, total) if routed else x
    h, dh, y, r = aligned(m, span), aligned(m, span), aligned(n, span), aligned(n, span)
    wide = columns if m0 else LANES
    h0, dh0, y0, ones = aligned(m0, wide), aligned(m0, wide), aligned(n, wide), np.ones(wide, np.float32)
    out = aligned(n, columns) if not single else x
    load, grad = np.zeros(n_experts, np.float32), np.zeros(thetas.shape[1], np.float32)
    if not routed:
        counts[0], start[1], load[0] = batch, (batch + LANES - 1) // LANES * LANES, 1.0
        for b in range(total):
            source[b] = min(b, batch)
            position[0, min(b, columns - 1)] = b

    for model in range(thetas.shape[0]):
        theta, gate, scale, importance = thetas[model], gates[model], scales[model], importances[model]
        # What the last model left would reach this one where its gate writes no weights, or takes no gradient of them.
        d_w[:] = 0.0
        if not routed:
            weights[0, :batch], probs[:] = 1.0, 1.0
        frozen = gate in (RANDOM, ORACLE)
        learned = not frozen and (gate in (SWITCH, SIGMOID, STRAIGHT_THROUGH) or k > 1)
        load_scale = np.float32(0.0 if frozen else load_balances[model] * n_experts / batch)
        for local in range(losses.shape[1]):
            step = first_step + local
            grad[:] = 0.0
            draw_columns(kinds[model], keys[model], step, 0, ps[model], sizes[model], batch, words, rows, x)
            if routed or gate in (SWITCH, SIGMOID, STRAIGHT_THROUGH):
                scores[:] = 0.0
                _matmul(theta, at_router, _UNIT_STRIDE[0], n, x, origin, n, scores, origin, n_experts, columns)
                _route(gate, scores, batch, probs, rest, scratch, weights, ids)
            if routed:
                _group(ids, weights, batch, counts, start, source, position, w)
                _take(x, n, source, start[n_experts], xs)
                for e in range(n_experts):
                    load[e] = np.float32(counts[e]) / np.float32(batch * k)
            else:
                for b in range(batch):
                    w[b] = weights[0, b]
            balance = 0.0
            for e in range(n_experts):
                mean = np.float32(0.0)
                for b in range(batch):
                    mean += probs[e, b]
                balance += load[e] * np.float64(mean) / batch
            load_losses[model, local] = np.float32(load_balances[model] * n_experts * balance)

            loss = 0.0
            if not single:
                for e in range(n_experts):
                    _forward(theta, e * n * m, at_decoder + e * n * m, at_bias + e * n, n, m, xs, start[e], h, y,
                             start[e], start[e + 1] - start[e])  # fmt: skip
                if m0:
                    _forward(
                        theta, at_shared, at_shared_decoder, at_shared_bias, n, m0, x, origin, h0, y0, origin, columns
                    )
                loss = _combine(x, y, position, weights, n, batch, y0, m0 > 0, importance, scale, out)
                _take(out, n, source, start[n_experts], r)
            for e in range(n_experts):
                at_e, at_d, at_b = e * n * m, at_decoder + e * n * m, at_bias + e * n
                for lo in range(start[e], start[e + 1], _CHUNK):
                    width, at = min(_CHUNK, start[e + 1] - lo), origin if single else lo
                    if single:
                        _forward(theta, at_e, at_d, at_b, n, m, xs, lo, h, y, at, width)
                        loss += _residual(xs, lo, w, lo, y, at, n, width, importance, scale, r)
                    if learned:
                        d_w[lo : lo + width] = 0.0
                        for i in range(n):
                            for s in range(width):
                                d_w[lo + s] += r[i, at + s] * y[i, at + s]
                    _backward(theta, grad, at_e, at_d, at_b, n, m, xs, lo, w, lo, r, h, y, dh, at, width)
            if m0:
                _backward(theta, grad, at_shared, at_shared_decoder, at_shared_bias, n, m0, x, origin, ones, origin,
                          out, h0, y0, dh0, origin, columns)  # fmt: skip
            losses[model, local] = np.float32(loss * scale)
            if learned or (load_scale != 0 and routed):
                for j in range(k):
                    for b in range(batch):
                        d_weights[j, b] = d_w[position[j, b]]
                _score_gradient(gate, probs, weights, ids, d_weights, load, load_scale, batch, scratch, d_scores)
                _outer(d_scores, origin, n_experts, x, origin, n, columns, grad, at_router, n, _UNIT_STRIDE[0])
            args = (lrs[model, local], decays[model], beta1s[model], beta2s[model], epss[model], step)
            end = thetas.shape[1]
            first, last = (at_router, at_shared) if frozen else (end, end)
            exp_avg, exp_avg_sq = exp_avgs[model], exp_avg_sqs[model]
            adamw(theta[:first], grad[:first], exp_avg[:first], exp_avg_sq[:first], *args)
            adamw(theta[last:], grad[last:], exp_avg[last:], exp_avg_sq[last:], *args)
