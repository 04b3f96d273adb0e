"""Sampling of a tile of feature vectors inside a Triton kernel, the bits of ``features.sample_features``.

    x_bi = u_bi / p_i if u_bi < p_i else 0,   u_bi = unit(word i mod 4 of Philox(key, (row_b, i div 4, step, stream)))

and the correlated, anticorrelated and clustered kinds. A kernel that redraws its tile needs no B × n memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moesaic.kernels import features

CORRELATED = tl.constexpr(features.CORRELATED)
ANTICORRELATED = tl.constexpr(features.ANTICORRELATED)
CLUSTERED = tl.constexpr(features.CLUSTERED)
INDEPENDENT = tl.constexpr(features.INDEPENDENT)


@triton.jit
def divide_exactly(u, p, inverse):
    """Return the correctly rounded u / p, given inverse = RN(1 / p); p in [1e-30, 1], u = 0 or 2⁻³² < u < p.

    Two corrections by the exact remainder: the first leaves less than an ulp, and from there Markstein's theorem (IBM
    J. Res. Dev. 34, 1990) gives the rounded quotient. Five instructions without a branch; ``div.rn`` takes a call.
    """
    q = u * inverse
    q = tl.fma(tl.fma(-q, p, u), inverse, q)
    return tl.fma(tl.fma(-q, p, u), inverse, q)


@triton.jit
def draw_features(data, rows, first, N: tl.constexpr, BLOCK_N: tl.constexpr, KIND: tl.constexpr):
    """Return features ``first`` … first + BLOCK_N − 1 of samples ``rows``, (BLOCK_B, BLOCK_N); from N on they are 0.

    ``first`` is a multiple of 4. ``data`` is (key, step, Probability, Inverse, size): ``Inverse`` points at RN(1/p),
    and ``size`` is the group's or cluster's length, which only structured kinds read.
    """
    key, step, Probability, Inverse, size = data
    # One call of the generator serves four neighbouring features.
    row = rows.to(tl.uint32)[:, None] + tl.zeros([1, BLOCK_N // 4], tl.uint32)
    block = row * 0 + (first // 4 + tl.arange(0, BLOCK_N // 4)).to(tl.uint32)[None, :]
    w0, w1, w2, w3 = tl.philox(key, row, block, row * 0 + step, row * 0)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(rows.shape[0], BLOCK_N)
    u = tl.random.uint_to_uniform_float(words)
    column = first + tl.arange(0, BLOCK_N)
    if (KIND == INDEPENDENT) or (KIND == CLUSTERED):  # noqa: SIM109 (Triton's front end has no `in`)
        p = tl.load(Probability + column, mask=column < N, other=0.0)[None, :]
        inverse = tl.load(Inverse + column, mask=column < N, other=0.0)[None, :]
        x = tl.where(u < p, divide_exactly(u, p, inverse), 0.0)
        if KIND == CLUSTERED:
            row = rows.to(tl.uint32)
            v = tl.random.uint_to_uniform_float(tl.philox(key, row, row * 0, row * 0 + step, row * 0 + 1)[0])
            clusters = N // size
            cluster = tl.minimum((v * clusters.to(tl.float32)).to(tl.int32), clusters - 1)
            x = tl.where((column // size)[None, :] == cluster[:, None], x, 0.0)
        return x
    group = column // size
    row = rows.to(tl.uint32)[:, None] + tl.zeros([1, BLOCK_N], tl.uint32)
    v0, v1, v2, v3 = tl.philox(key, row, row * 0 + (group // 4).to(tl.uint32)[None, :], row * 0 + step, row * 0 + 1)
    word = (group % 4)[None, :]
    v = tl.random.uint_to_uniform_float(
        tl.where(word < 2, tl.where(word == 0, v0, v1), tl.where(word == 2, v2, v3))
    )  # fmt: skip
    # A group's rate is its first member's.
    p = tl.load(Probability + group * size, mask=column < N, other=0.0)[None, :]
    if KIND == CORRELATED:
        return tl.where(v < p, u, 0.0)
    total = p * size.to(tl.float32)
    member = tl.minimum((tl.div_rn(v, tl.where(total > 0, total, 1.0)) * size.to(tl.float32)).to(tl.int32), size - 1)
    return tl.where((v < total) & (member == (column % size)[None, :]), u, 0.0)
