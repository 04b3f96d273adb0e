"""Device functions of ``ensemble_registers`` on tuples of vectors: an entry per number, in it a lane per sample.

Loops over a tuple are unrolled, so that its entries are registers.
"""
# Triton's front end takes no starred tuples, hence the sums of tuples.
# ruff: noqa: RUF005
# And its tuples grow from one line to the next, which for Python's type checker are different types.
# mypy: disable-error-code="assignment,has-type,misc,var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def filled(VALUE: tl.constexpr, COUNT: tl.constexpr):
    """Return COUNT vectors of VALUE."""
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (tl.full([32], VALUE, tl.float32),)
    return out


@triton.jit
def broadcast(vectors, lane, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Return entries FIRST … FIRST + COUNT − 1 of the vectors' lanes, each in every lane."""
    out = ()
    for i in tl.static_range(FIRST, FIRST + COUNT):
        out = out + (tl.gather(vectors[i // 32], lane * 0 + i % 32, 0),)
    return out


@triton.jit
def lane_sums(values, lane):
    """Return vectors whose entry 32·g + l, in lane l of vector g, is the sum over all lanes of values[32·g + l].

    Each exchange with the lane that differs in one bit adds two values at once: about one shuffle per value, where a
    reduction of each takes five. Entries past the last value are not defined.
    """
    for bit in tl.static_range(5):
        upper = (lane >> bit) & 1 == 1
        partner = lane ^ (1 << bit)
        merged = ()
        for i in tl.static_range(len(values) // 2):
            a, b = values[2 * i], values[2 * i + 1]
            merged = merged + (tl.where(upper, b, a) + tl.gather(tl.where(upper, a, b), partner, 0),)
        if len(values) % 2 == 1:
            last = values[len(values) - 1]
            merged = merged + (last + tl.gather(last, partner, 0),)
        values = merged
    return values


@triton.jit
def philox(k0, k1, row, block, step):
    """Return the words of ``tl.philox`` for key (k0, k1) and counter (row, block, step, 0).

    It takes one wide product where that takes two, as long as the key is not cut out of 64-bit words: then LLVM does
    the rest of a round in 64 bits too.
    """
    c0, c1, c2, c3 = row, row * 0 + block, row * 0 + step, row * 0
    for _ in tl.static_range(10):
        a, b = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (b >> 32).to(tl.uint32) ^ c1 ^ k0, b.to(tl.uint32)
        c2, c3 = (a >> 32).to(tl.uint32) ^ c3 ^ k1, a.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def draw(k0, k1, row, step, probability, inverse, N: tl.constexpr):
    """Draw x: u/p where u < p, else 0, with the bits of ``kernels.features``."""
    x = ()
    for i in tl.static_range(N):
        if i % 4 == 0:
            words = philox(k0, k1, row, i // 4, step)
        word = words[i % 4].to(tl.int32, bitcast=True)
        u = (word ^ (word >> 31)).to(tl.float32) * 4.6566127342e-10
        # Markstein's division: with 1/p rounded to nearest, one fused correction rounds u/p to nearest.
        quotient = u * inverse[i]
        quotient = tl.fma(tl.fma(quotient, -probability[i], u), inverse[i], quotient)
        x = x + (tl.where(u < probability[i], quotient, 0.0),)
    return x


@triton.jit
def select(scores, lane, E: tl.constexpr, K: tl.constexpr):
    """Return E masks of the K largest scores, ties to the lowest id."""
    chosen = ()
    for _ in tl.static_range(E):
        chosen = chosen + (lane < (32 if K == E else 0),)
    if K < E:
        for _ in tl.static_range(K):
            found, top, best = lane < 0, scores[0], lane * 0
            for e in tl.static_range(E):
                better = (chosen[e] ^ True) & ((found ^ True) | (scores[e] > top))
                top, best, found = tl.where(better, scores[e], top), tl.where(better, e, best), found | better
            added = ()
            for e in tl.static_range(E):
                added = added + (chosen[e] | (best == e),)
            chosen = added
    return chosen


@triton.jit
def exponential(x):
    """Return e^x; ``tl.exp`` is the same two instructions, and five to keep results below 2⁻¹²⁶."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def reciprocal(x):
    """Return 1/x for x ≥ 1, to 2⁻²¹·⁹ of its value, in two instructions; a division takes nine."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def softmax(scores, chosen, E: tl.constexpr):
    """Return exp(s_e) / Σ over the chosen, 0 for the others."""
    if E == 1:
        out = filled(1.0, 1)
    elif E == 2:
        # One exponential: e^−|s_1 − s_0|.
        power = tl.exp2(tl.abs(scores[1] - scores[0]) * -LOG2_E)
        larger = reciprocal(1.0 + power)
        smaller, second = power * larger, scores[1] > scores[0]
        out = (tl.where(second, smaller, larger), tl.where(second, larger, smaller))
    else:
        top = scores[0]
        for e in tl.static_range(1, E):
            top = tl.maximum(top, scores[e], propagate_nan=tl.PropagateNan.ALL)
        powers = ()
        for e in tl.static_range(E):
            powers = powers + (tl.where(chosen[e], exponential(scores[e] - top), 0.0),)
        total = powers[0]
        for e in tl.static_range(1, E):
            total += powers[e]
        inverse = reciprocal(total)
        out = ()
        for e in tl.static_range(E):
            out = out + (powers[e] * inverse,)
    return out


@triton.jit
def dot(a, b, COUNT: tl.constexpr, FIRST: tl.constexpr, STRIDE: tl.constexpr):
    """Return Σ_i a_i b_{FIRST + i·STRIDE}."""
    total = a[0] * b[FIRST]
    for i in tl.static_range(1, COUNT):
        total += a[i] * b[FIRST + i * STRIDE]
    return total


@triton.jit
def part(values, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Return entries FIRST … FIRST + COUNT − 1."""
    out = ()
    for i in tl.static_range(FIRST, FIRST + COUNT):
        out = out + (values[i],)
    return out


@triton.jit
def chosen_part(values, chosen, E: tl.constexpr, COUNT: tl.constexpr):
    """Return per lane the ``COUNT`` values of the one expert that is chosen."""
    out = ()
    for i in tl.static_range(COUNT):
        value = values[i]
        for e in tl.static_range(1, E):
            value = tl.where(chosen[e], values[e * COUNT + i], value)
        out = out + (value,)
    return out


@triton.jit
def run_expert(x, weight, decoder, bias, N: tl.constexpr, M: tl.constexpr):
    """Return h = x W and y = ReLU(h Dᵀ + b)."""
    h = ()
    for j in tl.static_range(M):
        h = h + (dot(x, weight, N, j, M),)
    y = ()
    for i in tl.static_range(N):
        z = bias[i]
        for j in tl.static_range(M):
            z += h[j] * decoder[i * M + j]
        y = y + (tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL),)
    return h, y


@triton.jit
def through_relu(y, residual, weight, N: tl.constexpr):
    """Return dL/dz = w · residual where y > 0."""
    out = ()
    for i in tl.static_range(N):
        out = out + (tl.where(y[i] > 0, weight * residual[i], 0.0),)
    return out


@triton.jit
def add_expert(
    weight, decoder, bias, x, h, dz, slot_decoder, share,
    FIRST: tl.constexpr, N: tl.constexpr, M: tl.constexpr, TIED: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Return the sums of one expert's gradients, from FIRST·n·m and FIRST·n on, with this sample's added.

    With SHARED the sample belongs to the expert where ``share`` is 1, else ``dz`` is 0 where it does not.
    """
    dh = ()
    for j in tl.static_range(M):
        dh = dh + (dot(dz, slot_decoder, N, j, M),)
    new_weight, new_decoder, new_bias = (), (), ()
    for i in tl.static_range(N):
        for j in tl.static_range(M):
            old = weight[(FIRST * N + i) * M + j]
            if SHARED and TIED:
                new_weight = new_weight + (old + share * (h[j] * dz[i] + dh[j] * x[i]),)
            elif SHARED:
                new_weight = new_weight + (old + share * (dh[j] * x[i]),)
                new_decoder = new_decoder + (decoder[(FIRST * N + i) * M + j] + share * (h[j] * dz[i]),)
            elif TIED:
                new_weight = new_weight + (old + h[j] * dz[i] + dh[j] * x[i],)
            else:
                new_weight = new_weight + (old + dh[j] * x[i],)
                new_decoder = new_decoder + (decoder[(FIRST * N + i) * M + j] + h[j] * dz[i],)
        if SHARED:
            new_bias = new_bias + (bias[FIRST * N + i] + share * dz[i],)
        else:
            new_bias = new_bias + (bias[FIRST * N + i] + dz[i],)
    return new_weight, new_decoder, new_bias
