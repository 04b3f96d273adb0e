"""What surrounds the products of a step in stripes: copies of weights, residuals, entries of the batch, sums, AdamW.

Kernels know a stripe's features by their number in it; ``Rows`` gives the table's row of each, −1 where there is none.
Rows of samples stand in tiles of one expert, filled up with zeros, so that no product masks any.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def relu(z):
    """Return max(z, 0); NaN stays NaN."""
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def fmix32(h):
    """Return Murmur3's finaliser of a uint32."""
    h ^= h >> 16
    h *= 0x85EBCA6B
    h ^= h >> 13
    h *= 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _widened(bits):
    """Return the bfloat16 numbers whose bits are given (int16) as float32."""
    return (bits.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _narrowed(value, hash):
    """Return the bits (int16) of float32 numbers rounded to bfloat16: up where the hash's low half carries over."""
    bits = value.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    bits = tl.where(finite, bits + (hash & 0xFFFF), bits)
    return (bits >> 16).to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit(do_not_specialize=["n_experts", "first_bias"])
def _stage_kernel(Table, Rows, Importance, W, Bias, Factor, eighths, first, first_bias, width, depth, n_experts,
                  n_features, twice, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Copy the decoders of a stripe to W (features, E·depth), zeros behind each; biases (E, features); 2 scale I."""
    features = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    rows = tl.load(Rows + features)
    known = rows >= 0
    rows *= eighths * 8
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert, hidden = columns // depth, columns % depth
    source = Table + rows[:, None] + (first + expert * width + hidden)[None, :]
    inside = columns < n_experts * depth
    value = tl.load(source, mask=known[:, None] & (inside & (hidden < width))[None, :], other=0.0)
    to = W + features.to(tl.int64)[:, None] * (n_experts * depth) + columns[None, :]
    tl.store(to, value.to(W.dtype.element_ty), mask=inside[None, :])
    if tl.program_id(1) == 0:
        tl.store(Factor + features, twice * tl.load(Importance + tl.load(Rows + features), mask=known, other=0.0))
        for e in range(n_experts):
            bias = tl.load(Table + rows + first_bias + e, mask=known, other=0.0)
            tl.store(Bias + e * n_features + features, bias)


@triton.jit(do_not_specialize=["n_samples", "top_k"])
def _residual_kernel(Z, G, Z0, G0, Places, Gates, Factor, Sums, Losses, n_samples, top_k, n_features, n_rows,
                     HAS_SHARED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Turn z of all experts into G, as if x = 0; add Σ_i r ReLU(z) to a place's sum, and Σ_i scale I x'² to a sample's.

    Sums (blocks, n_rows) and Losses (blocks, n_samples) have a row for every block of features.
    """
    samples = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    known = samples < n_samples
    inside = known[:, None] & (columns >= 0)[None, :]
    own = samples[:, None] * n_features + columns[None, :]
    out = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    if HAS_SHARED:
        out = relu(tl.load(Z0 + own, mask=inside, other=0.0))
    for j in range(top_k):
        places = tl.load(Places + samples * top_k + j, mask=known, other=0)
        z = tl.load(Z + places[:, None] * n_features + columns[None, :], mask=inside, other=0.0)
        out += tl.load(Gates + places, mask=known, other=0.0)[:, None] * relu(z)
    r = tl.load(Factor + columns)[None, :] * out
    loss = Losses + block * n_samples + samples
    tl.store(loss, tl.load(loss, mask=known, other=0.0) + 0.5 * tl.sum(r * out, 1), mask=known)
    if HAS_SHARED:
        slope = tl.where(tl.load(Z0 + own, mask=inside, other=0.0) > 0, r, 0.0)
        tl.store(G0 + own, slope.to(G0.dtype.element_ty), mask=inside)
    for j in range(top_k):
        places = tl.load(Places + samples * top_k + j, mask=known, other=0)
        at = places[:, None] * n_features + columns[None, :]
        z = tl.load(Z + at, mask=inside, other=0.0)
        gates = tl.load(Gates + places, mask=known, other=0.0)
        tl.store(G + at, tl.where(z > 0, r * gates[:, None], 0.0).to(G.dtype.element_ty), mask=inside)
        total = Sums + block * n_rows + places
        tl.store(total, tl.load(total, mask=known, other=0.0) + tl.sum(r * relu(z), 1), mask=known)


@triton.jit(do_not_specialize=["number", "first", "top_k", "n_experts"])
def _entries_kernel(H, W, Bias, Z, Z0, G, G0, Places, Gates, Experts, Factor, Columns, Samples, Values, Bounds, Deltas,
                    Losses, number, first, top_k, depth, n_experts, n_features, FUSED: tl.constexpr,
                    HAS_SHARED: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_K: tl.constexpr):  # fmt: skip
    """Correct G where x ≠ 0; if KEEP, write what an entry changes of a sample's sums and loss.

    FUSED: one expert per sample, whose z is computed again from what its product saw; else z is read.
    """
    start, end = tl.load(Bounds + number), tl.load(Bounds + number + 1)
    for at in range(start + tl.program_id(0) * BLOCK, end, tl.num_programs(0) * BLOCK):
        entries = at + tl.arange(0, BLOCK)
        inside = entries < end
        columns = tl.load(Columns + entries, mask=inside, other=first) - first
        samples = tl.load(Samples + entries, mask=inside, other=0)
        x = tl.load(Values + entries, mask=inside, other=0.0)
        factor = tl.load(Factor + columns, mask=inside, other=0.0)
        if FUSED:
            places = tl.load(Places + samples, mask=inside, other=0)
            expert = tl.load(Experts + places // BLOCK_M, mask=inside, other=0).to(tl.int64)
            acc = tl.zeros([BLOCK, BLOCK_K], tl.float32)
            for k in range(0, depth, BLOCK_K):
                ks = k + tl.arange(0, BLOCK_K)
                h = tl.load(H + places[:, None] * depth + ks[None, :], mask=inside[:, None], other=0.0)
                row = columns * (n_experts * depth) + expert * depth
                w = tl.load(W + row[:, None] + ks[None, :], mask=inside[:, None], other=0.0)
                acc += h.to(tl.float32) * w.to(tl.float32)
            z = tl.sum(acc, 1) + tl.load(Bias + expert * n_features + columns, mask=inside, other=0.0)
            gates = tl.load(Gates + places, mask=inside, other=0.0)
            out = gates * relu(z)
            slope = tl.where(z > 0, factor * (out - x) * gates, 0.0)
            tl.store(G + places * n_features + columns, slope.to(G.dtype.element_ty), mask=inside)
            if KEEP:
                tl.store(Deltas + entries, -factor * x * relu(z), mask=inside)
        else:
            out = tl.zeros([BLOCK], tl.float32)
            own = samples * n_features + columns
            if HAS_SHARED:
                out = relu(tl.load(Z0 + own, mask=inside, other=0.0))
            for j in range(top_k):
                places = tl.load(Places + samples * top_k + j, mask=inside, other=0)
                z = tl.load(Z + places * n_features + columns, mask=inside, other=0.0)
                out += tl.load(Gates + places, mask=inside, other=0.0) * relu(z)
            r = factor * (out - x)
            if HAS_SHARED:
                slope = tl.where(tl.load(Z0 + own, mask=inside, other=0.0) > 0, r, 0.0)
                tl.store(G0 + own, slope.to(G0.dtype.element_ty), mask=inside)
            for j in range(top_k):
                places = tl.load(Places + samples * top_k + j, mask=inside, other=0)
                z = tl.load(Z + places * n_features + columns, mask=inside, other=0.0)
                slope = tl.where(z > 0, r * tl.load(Gates + places, mask=inside, other=0.0), 0.0)
                tl.store(G + places * n_features + columns, slope.to(G.dtype.element_ty), mask=inside)
                if KEEP:
                    tl.store(Deltas + entries * top_k + j, -factor * x * relu(z), mask=inside)
        if KEEP:
            tl.store(Losses + entries, 0.5 * factor * x * (x - 2 * out), mask=inside)


@triton.jit(do_not_specialize=["top_k"])
def _row_sums_kernel(Deltas, Order, Starts, Out, top_k, BLOCK: tl.constexpr):
    """Write a sample's Σ of its entries' deltas, one program for each (sample, choice)."""
    sample, choice = tl.program_id(0).to(tl.int64), tl.program_id(1)
    total = tl.zeros([BLOCK], tl.float32)
    end = tl.load(Starts + sample + 1)
    for at in range(tl.load(Starts + sample), end, BLOCK):
        entries = at + tl.arange(0, BLOCK)
        inside = entries < end
        order = tl.load(Order + entries, mask=inside, other=0)
        total += tl.load(Deltas + order * top_k + choice, mask=inside, other=0.0)
    tl.store(Out + sample * top_k + choice, tl.sum(total, 0))


@triton.jit
def _bias_sums_kernel(G, Ends, Out, n_features, stride_out, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Write Σ of an expert's rows of G: Out[feature, expert]."""
    columns, expert = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1)
    start, end = tl.load(Ends + expert), tl.load(Ends + expert + 1)
    total = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    for row in range(start, end, BLOCK_K):
        rows = (row + tl.arange(0, BLOCK_K)).to(tl.int64)
        total += tl.load(G + rows[:, None] * n_features + columns[None, :]).to(tl.float32)
    tl.store(Out + columns.to(tl.int64) * stride_out + expert, tl.sum(total, 0))


@triton.jit(do_not_specialize=["first", "width", "top_k"])
def _encoder_kernel(Dh, Places, Experts, Starts, Samples, Values, Grad, first, width, top_k, stride,
                    ONE: tl.constexpr, DIRECT: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Add Σ_{b ∋ i} x_bi dh_b to columns e · width … of a feature's row of Grad, one program for each block of them.

    ONE: there is but one row of dh for each sample; DIRECT: in the order of samples, not of places.
    """
    feature = tl.program_id(0).to(tl.int64)
    hidden = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = hidden < width
    start, end = tl.load(Starts + first + feature), tl.load(Starts + first + feature + 1)
    to = Grad + feature * stride + hidden
    if ONE:
        total = tl.zeros([BLOCK_E, BLOCK], tl.float32)
        for at in range(start, end, BLOCK_E):
            entries = at + tl.arange(0, BLOCK_E)
            known = entries < end
            rows = tl.load(Samples + entries, mask=known, other=0)
            if not DIRECT:
                rows = tl.load(Places + rows, mask=known, other=0)
            source = Dh + rows[:, None] * width + hidden[None, :]
            part = tl.load(source, mask=known[:, None] & inside[None, :], other=0.0)
            total += tl.load(Values + entries, mask=known, other=0.0)[:, None] * part
        tl.store(to, tl.load(to, mask=inside, other=0.0) + tl.sum(total, 0), mask=inside)
    else:
        for entry in range(start, end):
            sample, x = tl.load(Samples + entry), tl.load(Values + entry)
            for j in range(top_k):
                place = tl.load(Places + sample * top_k + j)
                at = to + tl.load(Experts + place) * width
                part = x * tl.load(Dh + place * width + hidden, mask=inside, other=0.0)
                tl.store(at, tl.load(at, mask=inside, other=0.0) + part, mask=inside)
                # The next entry may add to the same elements from other threads.
                tl.debug_barrier()


@triton.jit(do_not_specialize=["key"])
def _update_kernel(Table, Avg, Sq, Rows, Grad, eighths, n_columns, keep, fresh1, beta2, fresh2, eps, step_size, root,
                   key, NARROW: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """One step of AdamW (`AdamStep`) for a stripe's rows, each of 8 · ``eighths`` columns: so wide loads are aligned.

    fresh1, fresh2: 1 − β₁, 1 − β₂; NARROW: moments are bfloat16, given as int16, rounded stochastically by ``key``.
    """
    features = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, stride = tl.load(Rows + features), eighths * 8
    # Padding is read and written as it is, so that whole lines are.
    inside, real = (rows >= 0)[:, None] & (columns < stride)[None, :], (columns < n_columns)[None, :]
    grad = tl.load(Grad + features[:, None] * stride + columns[None, :], mask=inside, other=0.0)
    at = rows[:, None] * stride + columns[None, :]
    theta = tl.load(Table + at, mask=inside, other=0.0)
    old_avg, old_sq = tl.load(Avg + at, mask=inside, other=0), tl.load(Sq + at, mask=inside, other=0)
    avg, sq = (_widened(old_avg), _widened(old_sq)) if NARROW else (old_avg, old_sq)
    avg += fresh1 * (grad - avg)
    sq = beta2 * sq + fresh2 * grad * grad
    tl.store(
        Table + at, tl.where(real, theta * keep - step_size * avg / (tl.sqrt(sq) * root + eps), theta), mask=inside
    )
    if NARROW:
        hash = (at >> 32).to(tl.uint32) ^ key.to(tl.uint32, bitcast=True)
        hash = fmix32(at.to(tl.uint32) ^ fmix32(hash))
        avg, sq = _narrowed(avg, fmix32(hash)), _narrowed(sq, fmix32(hash ^ 0x9E3779B9))
    tl.store(Avg + at, tl.where(real, avg, old_avg), mask=inside)
    tl.store(Sq + at, tl.where(real, sq, old_sq), mask=inside)
