"""The experts of the memory kernel: forward, backward and AdamW of one expert's samples, tile by tile.

    h = x W_e,  z = h D_eᵀ + b_e,  r = [y_0] + Σ_e w_e ReLU(z_e) − x
    dz = w 2·scale·I r 1[z > 0],  dh = dz D_e,  dD_e = Σ dzᵀ h,  db_e = Σ dz,  dW_e = Σ xᵀ dh

The shared expert is number E, of width m_0; all samples take it with weight 1. ``data`` is (key, step, Probability,
Inverse, size), what ``draw_features`` draws from; ``routing`` is (Rows, Gates, counts, routed).
"""

from __future__ import annotations

import triton
import triton.language as tl

from moesaic.kernels.ensemble_memory_features import draw_features
from moesaic.kernels.ensemble_memory_math import BLOCK_N, adamw, add_outer, unknown_zero


@triton.jit
def _section(e, counts, batch, N: tl.constexpr, M: tl.constexpr, E: tl.constexpr, M0: tl.constexpr,
             TIED: tl.constexpr, BLOCK_E: tl.constexpr):  # fmt: skip
    """Return expert e's number of samples, its width, and where its encoder, decoder and bias start."""
    decoders: tl.constexpr = E * N * M
    biases: tl.constexpr = decoders if TIED else 2 * decoders
    shared: tl.constexpr = biases + 2 * E * N
    size: tl.constexpr = N * M0
    is_shared = e >= E
    count = tl.where(is_shared, batch, tl.sum(tl.where(tl.arange(0, BLOCK_E) == e, counts, 0)))
    width = tl.where(is_shared, M0, M)
    at_w = tl.where(is_shared, shared, e * N * M)
    at_d = tl.where(is_shared, shared + (0 if TIED else size), e * N * M + (0 if TIED else decoders))
    at_b = tl.where(is_shared, shared + (size if TIED else 2 * size), biases + e * N)
    return count, width, at_w, at_d, at_b


@triton.jit
def _encode(data, routing, nil, Encoder, Tile, Hidden, e, start, count, batch, width, N: tl.constexpr, E: tl.constexpr,
            KIND: tl.constexpr, KEEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr):  # fmt: skip
    """Write h of expert e's samples from number ``start`` on to Hidden (BLOCK_B, BLOCK_M).

    Returns rows, which slots hold a sample, and gate weights. The other slots repeat row 0 with weight 0. With KEEP, x
    is left in Tile (BLOCK_B, N).
    """
    Rows, Gates, _, routed = routing
    slot, m = nil + tl.arange(0, BLOCK_B), nil + tl.arange(0, BLOCK_M)
    valid = start + slot < count
    rows = tl.where(valid, start + slot, 0)
    if E > 1:  # the shared expert has no list
        rows = tl.load(Rows + e * batch + start + slot, mask=valid & (e < E), other=0) + tl.where(e < E, 0, rows)
    h = tl.zeros([BLOCK_B, BLOCK_M], tl.float32)
    for first in range(0, N, BLOCK_N):
        n = nil + first + tl.arange(0, BLOCK_N)
        x = draw_features(data, rows, nil + first, N, BLOCK_N, KIND)
        if KEEP:
            tl.store(Tile + slot[:, None] * N + n[None, :], x, mask=(n < N)[None, :])
        there = (n < N)[:, None] & (m < width)[None, :]
        w = tl.load(Encoder + n[:, None] * width + m[None, :], mask=there, other=0.0)
        h = tl.dot(x, w, h, input_precision="ieee")
    tl.store(Hidden + slot[:, None] * BLOCK_M + m[None, :], h)
    weight = tl.load(Gates + rows * E + e, mask=valid & routed & (e < E), other=1.0)
    return rows, valid, tl.where(valid, weight, 0.0)


@triton.jit
def _decode(nil, Decoder, Bias, h, first, width, N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return D (16, BLOCK_M) and z = h Dᵀ + b (BLOCK_B, 16) of 16 features."""
    n, m = nil + first + tl.arange(0, BLOCK_N), nil + tl.arange(0, BLOCK_M)
    there = (n < N)[:, None] & (m < width)[None, :]
    d = tl.load(Decoder + n[:, None] * width + m[None, :], mask=there, other=0.0)
    if BLOCK_M < 16:  # tl.dot would sum over 16
        z = tl.sum(tl.trans(h)[:, :, None] * tl.trans(d)[:, None, :], axis=0)
    else:
        z = tl.dot(h, tl.trans(d), input_precision="ieee")
    return d, z + tl.load(Bias + n, mask=n < N, other=0.0)[None, :]


@triton.jit
def add_experts(data, routing, Zero, State, Importance, Tile, Hidden, Residual, batch, N: tl.constexpr,
                M: tl.constexpr, E: tl.constexpr, M0: tl.constexpr, TIED: tl.constexpr, KIND: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_B: tl.constexpr):  # fmt: skip
    """Add every expert's w ReLU(z) to Residual (B, N), which holds −x; return Σ I r², summed over tiles (BLOCK_B,)."""
    for e in range(E + (1 if M0 > 0 else 0)):
        count, width, at_w, at_d, at_b = _section(e, routing[2], batch, N, M, E, M0, TIED, BLOCK_E)
        start = count * 0
        while start < count:
            nil = unknown_zero(Zero)
            rows, valid, weight = _encode(
                data, routing, nil, State + at_w, Tile, Hidden, e, start, count, batch, width, N, E, KIND, False,
                BLOCK_M, BLOCK_B,
            )  # fmt: skip
            tl.debug_barrier()
            nil = unknown_zero(Zero)
            slot, m = nil + tl.arange(0, BLOCK_B), nil + tl.arange(0, BLOCK_M)
            at_h = slot[:, None] * BLOCK_M + m[None, :]
            for first in range(0, N, BLOCK_N):
                n = nil + first + tl.arange(0, BLOCK_N)
                z = _decode(nil, State + at_d, State + at_b, tl.load(Hidden + at_h), first, width, N, BLOCK_M)[1]
                at, there = rows[:, None] * N + n[None, :], valid[:, None] & (n < N)[None, :]
                out = tl.load(Residual + at, mask=there, other=0.0)
                out += weight[:, None] * tl.where(z <= 0, 0.0, z)
                tl.store(Residual + at, out, mask=there)
            start += BLOCK_B
            # The next tile overwrites h, and the next expert meets the same samples in other threads.
            tl.debug_barrier()
    loss = tl.zeros([BLOCK_B], tl.float32)
    for start in range(0, batch, BLOCK_B):
        nil = unknown_zero(Zero)
        rows = nil + start + tl.arange(0, BLOCK_B)
        for first in range(0, N, BLOCK_N):
            n = nil + first + tl.arange(0, BLOCK_N)
            there = (rows < batch)[:, None] & (n < N)[None, :]
            out = tl.load(Residual + rows[:, None] * N + n[None, :], mask=there, other=0.0)
            importance = tl.load(Importance + n, mask=n < N, other=0.0)
            loss += tl.sum(importance[None, :] * out * out, 1)
    return loss


@triton.jit
def step_experts(data, routing, adam, Zero, State, ExpAvg, ExpAvgSq, Importance, Tile, Hidden, DHidden, SumsB, SumsW,
                 SumsD, DGates, Residual, scale, by_weight, batch, N: tl.constexpr, M: tl.constexpr, E: tl.constexpr,
                 M0: tl.constexpr, FUSED: tl.constexpr, TIED: tl.constexpr, KIND: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_E: tl.constexpr, BLOCK_B: tl.constexpr):  # fmt: skip
    """Step every expert and write dL/dw to DGates; return Σ I r², summed over tiles (BLOCK_B,), with FUSED, else 0.

    With FUSED an expert's own output is x'; else r is read from Residual.
    """
    loss = tl.zeros([BLOCK_B], tl.float32)
    for e in range(E + (1 if M0 > 0 else 0)):
        count, width, at_w, at_d, at_b = _section(e, routing[2], batch, N, M, E, M0, TIED, BLOCK_E)
        start = count * 0
        while start < count:
            nil = unknown_zero(Zero)
            rows, valid, weight = _encode(
                data, routing, nil, State + at_w, Tile, Hidden, e, start, count, batch, width, N, E, KIND, True,
                BLOCK_M, BLOCK_B,
            )  # fmt: skip
            tl.debug_barrier()
            nil = unknown_zero(Zero)
            slot, m = nil + tl.arange(0, BLOCK_B), nil + tl.arange(0, BLOCK_M)
            at_h = slot[:, None] * BLOCK_M + m[None, :]
            dh, d_weight = tl.zeros([BLOCK_B, BLOCK_M], tl.float32), tl.zeros([BLOCK_B], tl.float32)
            for first in range(0, N, BLOCK_N):
                n = nil + first + tl.arange(0, BLOCK_N)
                h = tl.load(Hidden + at_h)
                d, z = _decode(nil, State + at_d, State + at_b, h, first, width, N, BLOCK_M)
                y = tl.where(z <= 0, 0.0, z)
                there = valid[:, None] & (n < N)[None, :]
                importance = tl.load(Importance + n, mask=n < N, other=0.0)[None, :]
                if FUSED:
                    x = tl.load(Tile + slot[:, None] * N + n[None, :], mask=there, other=0.0)
                    out = tl.where(there, weight[:, None] * y - x, 0.0)
                    loss += tl.sum(importance * out * out, 1)
                else:
                    out = tl.load(Residual + rows[:, None] * N + n[None, :], mask=there, other=0.0)
                out *= 2.0 * scale * importance
                d_weight += tl.sum(out * y, 1)
                dz = tl.where(z > 0, weight[:, None] * out, 0.0)
                dh = tl.dot(dz, d, dh, input_precision="ieee")
                add_outer(SumsD, n[:, None] * BLOCK_M + m[None, :], (n < N)[:, None], start == 0, dz, h)
                more = (n < N) & (start > 0)
                tl.store(SumsB + n, tl.sum(dz, 0) + tl.load(SumsB + n, mask=more, other=0.0), mask=n < N)
            tl.store(DHidden + at_h, dh)
            if by_weight:
                tl.store(DGates + rows * E + e, d_weight, mask=valid & (e < E))
            tl.debug_barrier()
            nil = unknown_zero(Zero)
            slot, m = nil + tl.arange(0, BLOCK_B), nil + tl.arange(0, BLOCK_M)
            at_h = slot[:, None] * BLOCK_M + m[None, :]
            for first in range(0, N, BLOCK_N):
                n = nil + first + tl.arange(0, BLOCK_N)
                there = valid[:, None] & (n < N)[None, :]
                x = tl.load(Tile + slot[:, None] * N + n[None, :], mask=there, other=0.0)
                at = n[:, None] * BLOCK_M + m[None, :]
                add_outer(SumsW, at, (n < N)[:, None], (start == 0) & (not TIED), x, tl.load(DHidden + at_h))
            # The next tile overwrites x, and other threads read the sums.
            tl.debug_barrier()
            start += BLOCK_B
        nil = unknown_zero(Zero)
        m = nil + tl.arange(0, BLOCK_M)
        for first in range(0, N, BLOCK_N):
            n = nil + first + tl.arange(0, BLOCK_N)
            at, in_sums = n[:, None] * width + m[None, :], n[:, None] * BLOCK_M + m[None, :]
            there = (n < N)[:, None] & (m < width)[None, :]
            # An expert without samples has no sums, only moments that decay.
            summed = there & (count > 0)
            grad = tl.load(SumsW + in_sums, mask=summed, other=0.0)
            adamw(State, ExpAvg, ExpAvgSq, at_w + at, there, grad, adam)
            if not TIED:
                grad = tl.load(SumsD + in_sums, mask=summed, other=0.0)
                adamw(State, ExpAvg, ExpAvgSq, at_d + at, there, grad, adam)
            grad = tl.load(SumsB + n, mask=(n < N) & (count > 0), other=0.0)
            adamw(State, ExpAvg, ExpAvgSq, at_b + n, n < N, grad, adam)
        # The next expert overwrites the sums.
        tl.debug_barrier()
    return loss
