"""Grouped matrix product: rows in order of expert, each group times its expert's matrix, no padding.

    y_r = x_g(r) · W_e + b_e      for offsets[e] ≤ r < offsets[e+1];   y_r = 0 for r ≥ offsets[E]
    dx_r = dy_r · W_eᵀ            dW_e = Σ_r x_g(r)ᵀ dy_r              db_e = Σ_r dy_r

Two registered ops: `moesaic::grouped_mm` (also gives dx, on transposed weights) and `moesaic::grouped_outer` (dW and
db). Each is the other's derivative, so second derivatives exist.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def _groups(offsets: Tensor, n_rows: int) -> Iterator[tuple[int, int, int]]:
    """Yield (expert, start, end) of every non-empty group. Reads offsets on the host: a device synchronises here."""
    bounds = offsets.cpu().numpy()
    counts = bounds[1:] - bounds[:-1]
    if bounds[0] != 0 or bounds[-1] > n_rows or counts.min() < 0:
        raise ValueError(f"offsets must rise from 0 to at most the {n_rows} rows, got {bounds[0]} … {bounds[-1]}")
    for expert in counts.nonzero()[0].tolist():
        yield expert, int(bounds[expert]), int(bounds[expert + 1])


def _rows(x: Tensor, gather: Tensor | None, start: int, end: int) -> Tensor:
    return x[start:end] if gather is None else x.index_select(0, gather[start:end])


def _can_use_torch(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's own grouped product serves: CUDA, bf16, under 1,024 experts, every row 16-byte aligned."""
    aligned = all(n % 8 == 0 for n in weight.shape[1:]) and x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    dense = weight.is_contiguous() or weight.transpose(1, 2).is_contiguous()
    return x.is_cuda and x.dtype == torch.bfloat16 and weight.shape[0] < 1024 and aligned and dense


def _torch_grouped(rows: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    position = torch.arange(rows.shape[0], device=rows.device)
    out = torch.nn.functional.grouped_mm(rows, weight, offs=offsets[1:].to(torch.int32))
    if bias is not None:
        expert = torch.searchsorted(offsets[1:], position, right=True).clamp_(max=weight.shape[0] - 1)
        out = out + bias[expert]
    # It leaves the rows after the last group unwritten.
    return out.masked_fill((position >= offsets[-1]).unsqueeze(1), 0.0)


@torch.library.custom_op("moesaic::grouped_mm", mutates_args=())
def _grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, gather: Tensor | None) -> Tensor:
    n_rows = x.shape[0] if gather is None else gather.shape[0]
    if _can_use_torch(x, weight):
        rows = x.contiguous() if gather is None else x.index_select(0, gather)
        return _torch_grouped(rows, weight, offsets, bias)
    out = x.new_empty(n_rows, weight.shape[2])
    end = 0
    for expert, start, end in _groups(offsets, n_rows):
        rows, target = _rows(x, gather, start, end), out[start:end]
        if bias is None:
            torch.mm(rows, weight[expert], out=target)
        else:
            torch.addmm(bias[expert], rows, weight[expert], out=target)
    out[end:] = 0.0
    return out


@torch.library.custom_op("moesaic::grouped_outer", mutates_args=())
def _grouped_outer(
    x: Tensor | None, grad: Tensor, offsets: Tensor, gather: Tensor | None, n_features: int, transposed: bool
) -> Tensor:
    """Σ over each group's rows of xᵀ·grad: (E, K, N), stored as (E, N, K) if transposed; x None is a column of ones."""
    n_experts, n_out = offsets.shape[0] - 1, grad.shape[1]
    shape = (n_experts, n_out, n_features) if transposed else (n_experts, n_features, n_out)
    out = grad.new_zeros(shape)
    for expert, start, end in _groups(offsets, grad.shape[0]):
        rows = grad[start:end]
        if x is None:
            torch.sum(rows, 0, keepdim=True, out=out[expert])
        elif transposed:
            torch.mm(rows.t(), _rows(x, gather, start, end), out=out[expert])
        else:
            torch.mm(_rows(x, gather, start, end).t(), rows, out=out[expert])
    return out.transpose(1, 2) if transposed else out


@_grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, gather: Tensor | None) -> Tensor:
    return x.new_empty((x if gather is None else gather).shape[0], weight.shape[2])


@_grouped_outer.register_fake
def _(
    x: Tensor | None, grad: Tensor, offsets: Tensor, gather: Tensor | None, n_features: int, transposed: bool
) -> Tensor:
    n_experts, n_out = offsets.shape[0] - 1, grad.shape[1]
    if transposed:
        return grad.new_empty(n_experts, n_out, n_features).transpose(1, 2)
    return grad.new_empty(n_experts, n_features, n_out)


def _scatter_rows(rows: Tensor, gather: Tensor | None, n_rows: int) -> Tensor:
    """Add rows up where they were gathered from; index_put is deterministic on every device, index_add is not."""
    if gather is None:
        return rows
    wide = torch.promote_types(rows.dtype, torch.float32)
    return rows.new_zeros(n_rows, rows.shape[1], dtype=wide).index_put((gather,), rows.to(wide), True).to(rows.dtype)


def _mm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, offsets, _, gather = inputs
    ctx.save_for_backward(x, weight, offsets, gather)


def _mm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, Tensor | None, None]:
    x, weight, offsets, gather = ctx.saved_tensors
    dx = dw = db = None
    if ctx.needs_input_grad[0]:
        dx = _scatter_rows(_grouped_mm(grad, weight.transpose(1, 2), offsets, None, None), gather, x.shape[0])
    if ctx.needs_input_grad[1]:
        transposed = weight.stride(1) == 1 and weight.stride(2) != 1
        dw = _grouped_outer(x, grad, offsets, gather, x.shape[1], transposed)
    if ctx.needs_input_grad[3]:
        db = _grouped_outer(None, grad, offsets, None, 1, False).squeeze(1)
    return dx, dw, None, db, None


def _outer_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, grad, offsets, gather, _, _ = inputs
    ctx.save_for_backward(x, grad, offsets, gather)


def _outer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
    x, rows, offsets, gather = ctx.saved_tensors
    dx = drows = None
    if x is not None and ctx.needs_input_grad[0]:
        dx = _scatter_rows(_grouped_mm(rows, grad.transpose(1, 2), offsets, None, None), gather, x.shape[0])
    if ctx.needs_input_grad[1]:
        left = rows.new_ones(rows.shape[0], 1) if x is None else x
        drows = _grouped_mm(left, grad, offsets, None, gather)
    return dx, drows, None, None, None, None


_grouped_mm.register_autograd(_mm_backward, setup_context=_mm_setup)
_grouped_outer.register_autograd(_outer_backward, setup_context=_outer_setup)


@register_flop_formula(torch.ops.moesaic.grouped_mm)
def _grouped_mm_flops(
    x: Sequence[int], weight: Sequence[int], offsets: object, bias: object, gather: Sequence[int] | None, **_: object
) -> int:
    return 2 * (x if gather is None else gather)[0] * weight[1] * weight[2]


@register_flop_formula(torch.ops.moesaic.grouped_outer)
def _grouped_outer_flops(x: Sequence[int] | None, grad: Sequence[int], *_: object, **__: object) -> int:
    return 0 if x is None else 2 * grad[0] * x[1] * grad[1]


def _check(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, gather: Tensor | None) -> None:
    if weight.ndim != 3:
        raise ValueError(f"weight must have shape (E, K, N), got {tuple(weight.shape)}")
    n_experts, n_features, n_out = weight.shape
    if x.ndim != 2 or x.shape[1] != n_features:
        raise ValueError(f"x must have shape (rows, {n_features}) to match weight, got {tuple(x.shape)}")
    if not x.is_floating_point() or x.dtype != weight.dtype:
        raise ValueError(f"x and weight must have one floating-point dtype, got {x.dtype} and {weight.dtype}")
    if n_experts < 1 or offsets.shape != (n_experts + 1,) or offsets.dtype != torch.int64:
        raise ValueError(f"offsets must be int64 ({n_experts + 1},), got {offsets.dtype} {tuple(offsets.shape)}")
    if bias is not None and (bias.shape != (n_experts, n_out) or bias.dtype != x.dtype):
        raise ValueError(f"bias must be {x.dtype} ({n_experts}, {n_out}), got {bias.dtype} {tuple(bias.shape)}")
    if gather is not None and (gather.ndim != 1 or gather.dtype != torch.int64):
        raise ValueError(f"gather must be int64 (rows,), got {gather.dtype} {tuple(gather.shape)}")


def grouped_matmul(
    x: Tensor, weight: Tensor, offsets: Tensor, *, bias: Tensor | None = None, gather: Tensor | None = None
) -> Tensor:
    """Multiply every expert's rows by its matrix: `y_r = x_g(r) · W_e [+ b_e]` for `offsets[e] ≤ r < offsets[e+1]`.

    Rows from offsets[E] on are zero. Nothing is padded and only experts with rows are visited; `weight` may be any
    strided view (a transposed one is not copied, and gets its gradient in the same layout). Differentiable, twice too,
    in x, weight and bias; same inputs give the same bits. Under autocast the inputs are cast as for `torch.mm`.
    `torch.utils.flop_counter` counts 2·R·K·N forward and as much again for each of dx and dW, zero rows included.

    On a CUDA device bf16 products use torch's grouped product where shapes allow; every other case, and dW and db, loop
    over the groups and read `offsets` on the host, a synchronisation.

    Args:
        x: (R, K) in expert order, or with `gather` (T, K) in any order.
        weight: (E, K, N), same dtype as x.
        offsets: (E+1,) int64 from `group_by_expert`.
        bias: (E, N).
        gather: (R,) int64 in 0…T−1: row r uses x[gather[r]].

    Returns:
        (R, N), contiguous.

    Raises:
        ValueError: naming the argument, its value and what it takes.
    """
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if autocast and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    _check(x, weight, offsets, bias, gather)
    out: Tensor = _grouped_mm(x, weight, offsets, bias, gather)
    return out
