"""Products with tiny experts (fewer than 32 columns or rows) in Triton: each choice reads its own expert, unsorted.

    dot     h_s = x_{s // k} W_{ids_s} + b        spread   y_t = Σ_j w_s (a_s W_{ids_s} + b),   s = t·k + j
    outer   dW_e = Σ_r x_{x_rows[r]}ᵀ grad_{grad_rows[r]} over the rows r of e

A matrix has a long axis l and a short axis s. Almost all traffic is the weights', read once per choice, so a program is
one warp that reads 512 bytes of a matrix at a time, 16 a thread, with the loads of several choices under way. Sums are
float32, without atomics, in an order that depends on k and on the shape, the layout and the dtype of a matrix: a
token's result does not depend on T.
"""

from __future__ import annotations

from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_WARP = 32
_VECTOR_BYTES = 16
# How a matrix lies in memory: l contiguous; all of it one run, s fastest; rows of s; any strides.
_LANES, _RUN, _ROWS, _STRIDED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_PART = 8
"""Choices of a token that add up before they join the token's total."""
_FEW_PROGRAMS = 2048
"""With fewer programs than this for whole tokens (16 warps on each of 128 SMs), every part of a sum has its own."""


@triton.jit
def _tile(Weight, base, valid, first, n_long, s, stride_l, stride_s, S: tl.constexpr, COUNT: tl.constexpr,
          STEP: tl.constexpr, MODE: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    """Return (COUNT, STEP, len(s)) of the matrices at ``base``, from ``first`` on along l, in float32; else 0."""
    if MODE == _RUN:
        at = first * S + tl.arange(0, STEP * S)
        inside = valid[:, None] & (at < n_long * S)[None, :]
        tile = tl.load(Weight + base[:, None] + at[None, :], mask=inside, other=0.0)
        tile = tl.reshape(tile.to(tl.float32), [COUNT, STEP, S])
    else:
        at = first + tl.arange(0, STEP)
        inside = valid[:, None, None] & (at < n_long)[None, :, None] & (s < S)[None, None, :]
        along = at if MODE == _LANES else at.to(tl.int64) * (stride_l.to(tl.int64) * UNIT)
        if MODE == _LANES:
            across = s.to(tl.int64) * (stride_s.to(tl.int64) * UNIT)
        elif MODE == _ROWS:
            across = s
        else:
            across = s.to(tl.int64) * stride_s.to(tl.int64)
        start = Weight + (base[:, None, None] + across[None, None, :])
        tile = tl.load(start + along[None, :, None], mask=inside, other=0.0).to(tl.float32)
    return tile


@triton.jit(do_not_specialize=["n_slots", "n_experts", "top_k", "long_units", "stride_e", "stride_l", "stride_s",
                               "bias_e", "bias_n"])  # fmt: skip
def _dot_kernel(
    X, Weight, Bias, Ids, Out, n_slots, n_experts, top_k, long_units, stride_e, stride_l, stride_s, bias_e, bias_n,
    S: tl.constexpr, BLOCK_S: tl.constexpr, STEP: tl.constexpr, MODE: tl.constexpr, UNIT: tl.constexpr,
    LONG_UNIT: tl.constexpr, GROUP: tl.constexpr, SLOTS: tl.constexpr, UNROLL: tl.constexpr, SHARED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Write h of SLOTS choices; SHARED: all of one token, whose x is then read once."""
    n_long = long_units * LONG_UNIT
    slots = tl.program_id(0).to(tl.int64) * SLOTS + tl.arange(0, SLOTS)
    ids = tl.load(Ids + slots, mask=slots < n_slots, other=-1).to(tl.int64)
    valid = ids.to(tl.uint64, bitcast=True) < n_experts.to(tl.uint64)
    base = ids * (stride_e.to(tl.int64) * UNIT)
    s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    total = tl.zeros([SLOTS, STEP // GROUP, BLOCK_S], tl.float32)
    for start in range(0, n_long, STEP * UNROLL):
        for u in tl.static_range(UNROLL):
            first = start + u * STEP
            along = first + tl.arange(0, STEP)
            if SHARED:
                token = tl.program_id(0).to(tl.int64) * SLOTS // top_k
                x = tl.load(X + token * n_long + along, mask=along < n_long, other=0.0).to(tl.float32)[None, :, None]
            else:
                at = (slots // top_k)[:, None] * n_long + along[None, :]
                inside = valid[:, None] & (along < n_long)[None, :]
                x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)[:, :, None]
            tile = _tile(Weight, base, valid, first, n_long, s, stride_l, stride_s, S, SLOTS, STEP, MODE, UNIT)
            # GROUP neighbours along l are one thread's: it adds them up without the others.
            total += tl.sum(tl.reshape(tile * x, [SLOTS, STEP // GROUP, GROUP, BLOCK_S]), 2)
    h = tl.sum(total, 1)
    inside = (slots < n_slots)[:, None] & (s < S)[None, :]
    if HAS_BIAS:
        at = ids[:, None] * bias_e + s.to(tl.int64)[None, :] * bias_n
        h += tl.load(Bias + at, mask=valid[:, None] & (s < S)[None, :], other=0.0).to(tl.float32)
    # A skipped choice's weights were read as 0, but 0 times an infinite x is not.
    h = tl.where(valid[:, None], h, 0.0)
    tl.store(Out + slots[:, None] * S + s[None, :], h.to(Out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_experts", "top_k", "per_program", "long_units", "stride_e", "stride_l", "stride_s",
                               "bias_e", "bias_n"])  # fmt: skip
def _spread_kernel(
    A, Weight, Bias, RowWeight, Ids, Out, n_experts, top_k, per_program, long_units, stride_e, stride_l, stride_s,
    bias_e, bias_n, S: tl.constexpr, BLOCK_S: tl.constexpr, STEP: tl.constexpr, MODE: tl.constexpr,
    UNIT: tl.constexpr, LONG_UNIT: tl.constexpr, CHOICES: tl.constexpr, PART: tl.constexpr, EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Write STEP columns of Σ over per_program choices of a token, in parts of PART, CHOICES at a time.

    EVEN: CHOICES divides k. per_program is a multiple of PART.
    """
    n_long = long_units * LONG_UNIT
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * STEP
    along = first + tl.arange(0, STEP)
    place = tl.arange(0, CHOICES)
    total = tl.zeros([STEP], tl.float32)
    begin = tl.program_id(2) * per_program
    for start in range(begin, tl.minimum(begin + per_program, top_k), PART):
        part, across = tl.zeros([STEP], tl.float32), tl.zeros([STEP, BLOCK_S], tl.float32)
        for behind in range(start, tl.minimum(start + PART, top_k), CHOICES):
            at = token * top_k + behind
            if EVEN:
                ids = tl.load(Ids + at + place).to(tl.int64)
            else:
                ids = tl.load(Ids + at + place, mask=place < top_k - behind, other=-1).to(tl.int64)
            valid = ids.to(tl.uint64, bitcast=True) < n_experts.to(tl.uint64)
            base = ids * (stride_e.to(tl.int64) * UNIT)
            gate = tl.where(valid, 1.0, 0.0)
            if WEIGHTED:
                gate = tl.load(RowWeight + at + place, mask=valid, other=0.0).to(tl.float32)
            for block in tl.range(0, S, BLOCK_S, loop_unroll_factor=1):
                s = block + tl.arange(0, BLOCK_S)
                there = valid[:, None] & (s < S)[None, :]
                a = tl.load(A + at * S + place[:, None] * S + s[None, :], mask=there, other=0.0).to(tl.float32)
                tile = _tile(Weight, base, valid, first, n_long, s, stride_l, stride_s, S, CHOICES, STEP, MODE, UNIT)
                products = tl.sum(tile * (a * gate[:, None])[:, None, :], 0)
                if MODE <= _RUN:
                    part += tl.sum(products, 1)
                else:  # the places of s are different threads': they add up once a part
                    across += products
            if HAS_BIAS:
                bias_at = ids[:, None] * bias_e + along.to(tl.int64)[None, :] * bias_n
                inside = valid[:, None] & (along < n_long)[None, :]
                bias = tl.load(Bias + bias_at, mask=inside, other=0.0).to(tl.float32)
                part += tl.sum(bias * gate[:, None], 0)
        if MODE > _RUN:
            part += tl.sum(across, 1)
        total += part
    row = token * tl.num_programs(2) + tl.program_id(2)
    tl.store(Out + row * n_long + along, total.to(Out.dtype.element_ty), mask=along < n_long)


@triton.jit(do_not_specialize=["n_parts", "n_long"])
def _add_parts_kernel(Parts, Out, n_parts, n_long, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    along = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(n_parts):
        total += tl.load(Parts + (token * n_parts + part) * n_long + along, mask=along < n_long, other=0.0)
    tl.store(Out + token * n_long + along, total.to(Out.dtype.element_ty), mask=along < n_long)


@triton.jit(do_not_specialize=["long_units"])
def _outer_kernel(
    Long, Short, LongRows, ShortRows, Experts, Starts, Ends, Out, long_units, S: tl.constexpr, BLOCK_S: tl.constexpr,
    STEP: tl.constexpr, MODE: tl.constexpr, LONG_UNIT: tl.constexpr, UNROLL: tl.constexpr, ONES: tl.constexpr,
):  # fmt: skip
    """Write STEP places along l of one expert's sum over its rows, in their order; ONES: Short is a column of ones."""
    n_long = long_units * LONG_UNIT
    start, end = tl.load(Starts + tl.program_id(0)), tl.load(Ends + tl.program_id(0))
    if start < end:
        first = tl.program_id(1) * STEP
        along, s = first + tl.arange(0, STEP), tl.arange(0, BLOCK_S)
        total = tl.zeros([STEP, BLOCK_S], tl.float32)
        for row in range(start, end, UNROLL):
            for i in tl.static_range(UNROLL):
                there = row + i < end
                at = tl.load(LongRows + row + i, mask=there, other=0).to(tl.int64) * n_long
                # A column from the start: its threads are then those of `total`, and no layout is converted.
                long = tl.load(Long + at + along[:, None], mask=there & (along < n_long)[:, None], other=0.0)
                if ONES:
                    total += long.to(tl.float32)
                else:
                    at = tl.load(ShortRows + row + i, mask=there, other=0).to(tl.int64) * S
                    short = tl.load(Short + at + s[None, :], mask=there & (s < S)[None, :], other=0.0)
                    total += long.to(tl.float32) * short.to(tl.float32)
        base = Out + tl.load(Experts + tl.program_id(0)) * (n_long.to(tl.int64) * S)
        sums = total.to(Out.dtype.element_ty)
        if MODE == _RUN:
            run = first * S + tl.arange(0, STEP * S)
            tl.store(base + run, tl.reshape(sums, [STEP * S]), mask=run < n_long * S)
        else:
            at = s[None, :] * n_long + along[:, None] if MODE == _LANES else along[:, None] * S + s[None, :]
            tl.store(base + at, sums, mask=(along < n_long)[:, None] & (s < S)[None, :])


class _Matrices(NamedTuple):
    """Where the matrices of a weight lie: compile-time arguments, and strides as the kernels take them."""

    constants: dict[str, Any]
    sizes: tuple[int, int, int, int]
    """n_long, then the strides of e and l, in the units of the constants, and of s (in units if l is contiguous)."""


def _matrices(weight: Tensor, long_axis: int) -> _Matrices:
    n_long, n_short = weight.shape[long_axis], weight.shape[3 - long_axis]
    stride_e, stride_l, stride_s = (weight.stride(axis) for axis in (0, long_axis, 3 - long_axis))
    vector = _VECTOR_BYTES // weight.element_size()
    run = (stride_s == 1 or n_short == 1) and stride_l == n_short and n_short & (n_short - 1) == 0
    if stride_l == 1:
        mode, unit = _LANES, gcd(vector, stride_e, stride_s if n_short > 1 else 0)
    elif run:
        mode, unit = _RUN, gcd(vector, stride_e)
    else:
        mode, unit = _ROWS if stride_s == 1 else _STRIDED, gcd(vector, stride_e, stride_l)
    long_unit = gcd(vector, n_long)
    # Strides in units, multiplied out again by a constant, tell the compiler what a vector load is aligned to.
    stride_s = stride_s // unit if mode == _LANES else stride_s
    constants = {"S": n_short, "MODE": mode.value, "UNIT": unit, "LONG_UNIT": long_unit}
    return _Matrices(constants, (n_long // long_unit, stride_e // unit, stride_l // unit, stride_s))


def dot_arguments(weight: Tensor, bias: Tensor | None, k: int) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Return the compile-time arguments of the dot's kernel, and (long units, strides of weight and bias)."""
    constants, sizes = _matrices(weight, 1)
    vector = _VECTOR_BYTES // weight.element_size()
    padded = triton.next_power_of_2(constants["S"])
    if constants["MODE"] == _LANES.value:
        block_s = min(padded, 8)
        slots, unroll, step, group = 8 // block_s, 1, _WARP * vector, vector
    else:
        block_s, slots, step = padded, 4, _WARP * vector // padded
        unroll, group = (2, max(1, vector // padded)) if constants["MODE"] == _RUN.value else (1, 1)
    constants |= {
        "BLOCK_S": block_s, "STEP": step, "GROUP": group, "SLOTS": slots, "UNROLL": unroll, "SHARED": k % slots == 0,
        "HAS_BIAS": bias is not None,
    }  # fmt: skip
    return constants, (*sizes, *(bias.stride() if bias is not None else (0, 0)))


def tiny_dot(
    x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, k: int, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Every choice's product with its expert: `h_s = x_{s // k} W_{ids_s} + b`, zeros where ids is outside 0…E−1.

    Args:
        x: (T, K).
        weight: (E, K, N) of the dtype of x, N < 32; fastest if K, or K and N together, are contiguous.
        bias: (E, N) or None.
        ids: (T·k,) integers.
        k: choices of a token.
        dtype: of the result; None is that of x.

    Returns:
        (T·k, N).
    """
    x, ids = x.contiguous(), ids.contiguous()
    n_slots, n_out = ids.numel(), weight.shape[2]
    out = x.new_empty(n_slots, n_out, dtype=dtype or x.dtype)
    if out.numel():
        constants, sizes = dot_arguments(weight, bias, k)
        grid = (triton.cdiv(n_slots, constants["SLOTS"]), triton.cdiv(n_out, constants["BLOCK_S"]))
        _dot_kernel[grid](
            x, weight, x if bias is None else bias, ids, out, n_slots, weight.shape[0], k, *sizes, **constants,
            num_warps=1, num_stages=1,
        )  # fmt: skip
    return out


def spread_arguments(
    weight: Tensor, bias: Tensor | None, row_weight: Tensor | None, k: int
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Return the compile-time arguments of the spread's kernel, and (long units, strides of weight and bias)."""
    constants, sizes = _matrices(weight, 2)
    vector = _VECTOR_BYTES // weight.element_size()
    padded = triton.next_power_of_2(constants["S"])
    if constants["MODE"] == _LANES.value:
        # Eight loads of a thread at a time, here and for runs; with sixteen, some of the chips' compilers spill.
        block_s, choices = min(padded, 8), max(1, 4 // padded)
        step = _WARP * vector * (8 // (block_s * choices))
    elif constants["MODE"] == _RUN.value:
        block_s, choices, step = padded, 4, 2 * _WARP * vector // padded
    else:
        block_s, choices, step = padded, 2, 2 * _WARP * vector // padded
    constants |= {
        "BLOCK_S": block_s, "STEP": step, "CHOICES": choices, "PART": _PART, "EVEN": k % choices == 0,
        "HAS_BIAS": bias is not None, "WEIGHTED": row_weight is not None,
    }  # fmt: skip
    return constants, (*sizes, *(bias.stride() if bias is not None else (0, 0)))


def tiny_spread(
    a: Tensor, weight: Tensor, bias: Tensor | None, row_weight: Tensor | None, ids: Tensor, k: int
) -> Tensor:
    """Every token's weighted sum over its choices: `y_t = Σ_j w_s (a_s W_{ids_s} + b)`, s = t·k + j.

    A choice with ids outside 0…E−1 is left out; its a and weight are not read.

    Args:
        a: (T·k, K), K < 32.
        weight: (E, K, N) of the dtype of a; fastest if N, or N and K together, are contiguous.
        bias: (E, N) or None.
        row_weight: (T·k,) or None for ones.
        ids: (T·k,) integers.
        k: choices of a token.

    Returns:
        (T, N) in the dtype of a.
    """
    a, ids = a.contiguous(), ids.contiguous()
    gates = row_weight if row_weight is None else row_weight.contiguous()
    n_tokens, n_out = ids.numel() // k, weight.shape[2]
    out = a.new_empty(n_tokens, n_out)
    if not out.numel():
        return out
    constants, sizes = spread_arguments(weight, bias, gates, k)
    blocks, n_parts = triton.cdiv(n_out, constants["STEP"]), triton.cdiv(k, _PART)
    split = n_parts > 1 and n_tokens * blocks < _FEW_PROGRAMS
    target = a.new_empty(n_tokens, n_parts, n_out, dtype=torch.float32) if split else out
    _spread_kernel[(n_tokens, blocks, n_parts if split else 1)](
        a, weight, a if bias is None else bias, a if gates is None else gates, ids, target, weight.shape[0], k,
        _PART if split else n_parts * _PART, *sizes, **constants, num_warps=1, num_stages=1,
    )  # fmt: skip
    if split:
        block = min(512, triton.next_power_of_2(n_out))
        _add_parts_kernel[(n_tokens, triton.cdiv(n_out, block))](target, out, n_parts, n_out, BLOCK=block, num_warps=4)
    return out


def outer_constants(long: Tensor, n_short: int, *, long_fastest: bool, ones: bool) -> dict[str, Any]:
    """Return the compile-time arguments of the outer product's kernel."""
    padded = triton.next_power_of_2(n_short)
    mode = _LANES if long_fastest or n_short == 1 else _RUN if padded == n_short else _ROWS
    # 64 sums a thread at most.
    step = min(max(16, triton.next_power_of_2(long.shape[1])), 64 * _WARP // padded, 1024)
    return {
        "S": n_short, "BLOCK_S": padded, "STEP": step, "MODE": mode.value,
        "LONG_UNIT": gcd(_VECTOR_BYTES // long.element_size(), long.shape[1]), "UNROLL": 2, "ONES": ones,
    }  # fmt: skip


def _groups(offsets: Tensor, n_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return expert, first row and end of min(E, R) groups, among them all that have rows; the rest are empty."""
    n_experts = offsets.shape[0] - 1
    if n_experts <= n_rows:
        return torch.arange(n_experts, device=offsets.device), offsets[:-1], offsets[1:]
    # Row r stands for the expert whose first row it is, if there is one.
    rows = torch.arange(n_rows, device=offsets.device)
    experts = torch.searchsorted(offsets[1:], rows, right=True).clamp_(max=n_experts - 1)
    return experts, rows, torch.where(offsets[experts] == rows, offsets[experts + 1], rows)


def tiny_outer(
    x: Tensor | None, grad: Tensor, offsets: Tensor, x_rows: Tensor | None, grad_rows: Tensor, transposed: bool
) -> Tensor:
    """Every expert's sum of outer products: `dW_e = Σ_r x_{x_rows[r]}ᵀ grad_{grad_rows[r]}`, zeros without rows.

    Apart from the zeros it costs what the rows, and the experts that have some, do.

    Args:
        x: (·, K), or None for a column of ones (K = 1); its rows are then not read.
        grad: (·, N) of the dtype of x; min(K, N) < 32.
        offsets: (E + 1,) int64: expert e has the rows offsets[e]…offsets[e+1]; no expert has those from offsets[E] on.
        x_rows: (R,) integers.
        grad_rows: (R,) integers.
        transposed: whether memory is to hold (E, N, K).

    Returns:
        (E, K, N) in the dtype of grad, a view of (E, N, K) if transposed.
    """
    n_experts, n_features, n_out = offsets.shape[0] - 1, 1 if x is None else x.shape[1], grad.shape[1]
    shape = (n_experts, n_out, n_features) if transposed else (n_experts, n_features, n_out)
    out = torch.zeros(shape, dtype=grad.dtype, device=grad.device)
    experts, starts, ends = _groups(offsets, grad_rows.shape[0])
    if out.numel() and experts.numel():
        sides = [(grad.contiguous(), grad_rows)] * 2
        if x is not None and x_rows is not None:
            sides[int(n_features < n_out)] = (x.contiguous(), x_rows)
        (long, long_rows), (short, short_rows) = sides
        constants = outer_constants(
            long, min(n_features, n_out), long_fastest=(n_features < n_out) != transposed, ones=x is None
        )
        _outer_kernel[(experts.numel(), triton.cdiv(long.shape[1], constants["STEP"]))](
            long, short, long_rows.contiguous(), short_rows.contiguous(), experts, starts, ends, out,
            long.shape[1] // constants["LONG_UNIT"], **constants, num_warps=1, num_stages=1,
        )  # fmt: skip
    return out.transpose(1, 2) if transposed else out
