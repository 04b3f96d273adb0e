"""Grouped matrix product: rows in order of expert, each group times its expert's matrix, no padding.

    y_r = s_r act(x_g(r) · W_e + b_e)   for offsets[e] ≤ r < offsets[e+1];   y_r = 0 for r ≥ offsets[E]
    dx_r = dh_r · W_eᵀ,   dW_e = Σ_r x_g(r)ᵀ dh_r,   db_e = Σ_r dh_r,   h the argument of act

Registered ops: `moesaic::grouped_mm` (also gives dx, on transposed weights) and `moesaic::grouped_outer` (dW and db),
each the other's derivative, so second derivatives exist; and `moesaic::grouped_mm_activated`, with act and s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moesaic.kernels import _padding
from moesaic.kernels._accounting import Call, Groups, Work, moved, register_work
from moesaic.kernels._backend import grouped
from moesaic.kernels.activations import NO_ACTIVATION, activate_backward, check_activation, check_interleaved, is_gated

PRECISIONS = ("ieee", "tf32x3", "tf32")


@torch.library.custom_op("moesaic::grouped_mm", mutates_args=())
def _grouped_mm(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, gather: Tensor | None, precision: str = "ieee"
) -> Tensor:
    with grouped(x) as kernels:
        y: Tensor = kernels.rows(x, weight, offsets, bias, gather, precision=precision)
    return y


@torch.library.custom_op("moesaic::grouped_outer", mutates_args=())
def _grouped_outer(
    x: Tensor | None, grad: Tensor, offsets: Tensor, gather: Tensor | None, n_features: int, transposed: bool,
    precision: str = "ieee",
) -> Tensor:  # fmt: skip
    """Σ over each group's rows of xᵀ·grad: (E, K, N), stored as (E, N, K) if transposed; x None is a column of ones."""
    out: Tensor
    with grouped(grad) as kernels:
        if x is None:
            out = kernels.column_sums(grad, offsets, None, None).unsqueeze(1)
        else:
            out = kernels.outer(x, grad, offsets, gather, None, transposed, precision=precision)
    return out


@torch.library.custom_op("moesaic::grouped_mm_activated", mutates_args=())
def _activated(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, gather: Tensor | None, row_weight: Tensor | None,
    activation: str, interleaved: bool, keep: bool, precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Y (R, F) and, if kept, h (R, N), else h of no rows."""
    scale = None if row_weight is None else row_weight.to(torch.promote_types(x.dtype, torch.float32))
    with grouped(x) as kernels:
        y, h = kernels.rows_activated(
            x, weight, offsets, bias, gather, scale, activation, interleaved, keep, precision=precision
        )
    return y, h


@_grouped_mm.register_fake
def _(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, gather: Tensor | None, precision: str = "ieee"
) -> Tensor:
    return x.new_empty((x if gather is None else gather).shape[0], weight.shape[2])


@_grouped_outer.register_fake
def _(
    x: Tensor | None, grad: Tensor, offsets: Tensor, gather: Tensor | None, n_features: int, transposed: bool,
    precision: str = "ieee",
) -> Tensor:  # fmt: skip
    n_experts, n_out = offsets.shape[0] - 1, grad.shape[1]
    if transposed:
        return grad.new_empty(n_experts, n_out, n_features).transpose(1, 2)
    return grad.new_empty(n_experts, n_features, n_out)


@torch.library.custom_op("moesaic::scatter_rows", mutates_args=())
def _scatter(rows: Tensor, gather: Tensor, n_rows: int) -> Tensor:
    """Add rows (R, N) up where they were gathered from: (n_rows, N), in float32 and a fixed order.

    An op, because a compiler would make atomic additions of it; index_put as it stands sorts first.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    return rows.new_zeros(n_rows, rows.shape[1], dtype=wide).index_put((gather,), rows.to(wide), True).to(rows.dtype)


@_scatter.register_fake
def _(rows: Tensor, gather: Tensor, n_rows: int) -> Tensor:
    return rows.new_empty(n_rows, rows.shape[1])


def _scatter_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return grad.index_select(0, ctx.saved_tensors[0]), None, None


_scatter.register_autograd(_scatter_backward, setup_context=_scatter_setup)


def _scatter_rows(rows: Tensor, gather: Tensor | None, n_rows: int) -> Tensor:
    if gather is None:
        return rows
    out: Tensor = _scatter(rows, gather, n_rows)
    return out


def is_transposed(weight: Tensor) -> bool:
    """Return whether K is the contiguous dimension of weights (E, K, N), and so of their gradient."""
    return weight.stride(1) == 1 and weight.stride(2) != 1


def _mm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, offsets, _, gather, ctx.precision = inputs
    ctx.save_for_backward(x, weight, offsets, gather)


def _mm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, offsets, gather = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    dx, dw, db = _product_gradients(grad, x, weight, offsets, gather, ctx.precision, needs)
    return dx, dw, None, db, None, None


def _product_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, gather: Tensor | None, precision: str,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, weight and bias, where needed."""
    dx = dw = db = None
    if needs[0]:
        dx = _scatter_rows(
            _grouped_mm(grad, weight.transpose(1, 2), offsets, None, None, precision), gather, x.shape[0]
        )
    if needs[1]:
        dw = _grouped_outer(x, grad, offsets, gather, x.shape[1], is_transposed(weight), precision)
    if needs[2]:
        db = _grouped_outer(None, grad, offsets, None, 1, False, precision).squeeze(1)
    return dx, dw, db


def _outer_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, grad, offsets, gather, _, _, ctx.precision = inputs
    ctx.save_for_backward(x, grad, offsets, gather)


def _outer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, rows, offsets, gather = ctx.saved_tensors
    dx = drows = None
    if x is not None and ctx.needs_input_grad[0]:
        dx = _scatter_rows(
            _grouped_mm(rows, grad.transpose(1, 2), offsets, None, None, ctx.precision), gather, x.shape[0]
        )
    if ctx.needs_input_grad[1]:
        left = rows.new_ones(rows.shape[0], 1) if x is None else x
        drows = _grouped_mm(left, grad, offsets, None, gather, ctx.precision)
    return dx, drows, None, None, None, None, None


@_activated.register_fake
def _(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, gather: Tensor | None, row_weight: Tensor | None,
    activation: str, interleaved: bool, keep: bool, precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n_rows, width = (x if gather is None else gather).shape[0], weight.shape[2]
    out = x.new_empty(n_rows, width // 2 if is_gated(activation) else width)
    return out, x.new_empty(n_rows if keep else 0, width)


def _activated_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, offsets, _, gather, row_weight, ctx.activation, ctx.interleaved, _, ctx.precision = inputs
    ctx.save_for_backward(x, weight, offsets, gather, row_weight, output[1])
    ctx.set_materialize_grads(False)


def _activated_backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    if torch.is_grad_enabled():
        raise RuntimeError("grouped_matmul with an activation or row_weight can be differentiated once")
    x, weight, offsets, gather, row_weight, h = ctx.saved_tensors
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    kept = torch.arange(h.shape[0], device=h.device) < offsets[-1]
    scaled = wide if row_weight is None else wide * row_weight.to(wide.dtype).masked_fill(~kept, 0.0).unsqueeze(1)
    a, dh = activate_backward(h, scaled, ctx.activation, ctx.interleaved)
    ds = None
    if row_weight is not None and ctx.needs_input_grad[5]:
        ds = (wide * a).sum(1).masked_fill(~kept, 0.0).to(row_weight.dtype)
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    dx, dw, db = _product_gradients(dh.to(h.dtype), x, weight, offsets, gather, ctx.precision, needs)
    return dx, dw, None, db, None, ds, None, None, None, None


_grouped_mm.register_autograd(_mm_backward, setup_context=_mm_setup)
_grouped_outer.register_autograd(_outer_backward, setup_context=_outer_setup)
_activated.register_autograd(_activated_backward, setup_context=_activated_setup)


@register_flop_formula([torch.ops.moesaic.grouped_mm, torch.ops.moesaic.grouped_mm_activated])
def _grouped_mm_flops(
    x: Sequence[int], weight: Sequence[int], offsets: object, bias: object, gather: Sequence[int] | None, *_: object,
    **__: object,
) -> int:  # fmt: skip
    return 2 * (x if gather is None else gather)[0] * weight[1] * weight[2]


@register_flop_formula(torch.ops.moesaic.grouped_outer)
def _grouped_outer_flops(x: Sequence[int] | None, grad: Sequence[int], *_: object, **__: object) -> int:
    return 0 if x is None else 2 * grad[0] * x[1] * grad[1]


@register_flop_formula(torch.ops.moesaic.scatter_rows)
def _scatter_flops(*args: object, **kwargs: object) -> int:
    return 0


def product_bytes(groups: Groups, weight: Tensor, bias: Tensor | None, offsets: Tensor | None, row_item: int) -> int:
    """Bytes that a grouped product reads: its rows, offsets, and weights and biases of experts with rows."""
    _, depth, width = weight.shape
    own = depth * width * weight.element_size() + (0 if bias is None else width * bias.element_size())
    return groups.rows * depth * row_item + groups.touched * own + moved(offsets)


@register_work(torch.ops.moesaic.grouped_mm)
def _mm_work(
    call: Call, x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, gather: Tensor | None,
    precision: str = "ieee",
) -> Work:  # fmt: skip
    n_rows = (x if gather is None else gather).shape[0]
    groups = Groups.of_offsets(offsets, n_rows)
    executed = _padding.rows(
        x, weight, groups, n_rows, precision=precision, x_fits=_padding.fits(x), bias=bias
    )  # fmt: skip
    read = product_bytes(groups, weight, bias, offsets, x.element_size()) + moved(gather)
    return Work(
        executed, _every(call, x, weight, offsets, gather), read + n_rows * weight.shape[2] * x.element_size(),
        groups.bound,
    )  # fmt: skip


def _every(call: Call, x: Tensor, weight: Tensor, offsets: Tensor, gather: Tensor | None) -> int | None:
    """FLOPs of every token through every expert."""
    n_tokens = call.tokens.of(offsets, None if gather is None else x.shape[0])
    return None if n_tokens is None else 2 * n_tokens * weight.numel()


@register_work(torch.ops.moesaic.grouped_mm_activated)
def _activated_work(
    call: Call, x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, gather: Tensor | None,
    row_weight: Tensor | None, activation: str, interleaved: bool, keep: bool, precision: str,
) -> Work:  # fmt: skip
    n_rows, width = (x if gather is None else gather).shape[0], weight.shape[2]
    groups = Groups.of_offsets(offsets, n_rows)
    executed = _padding.rows(
        x, weight, groups, n_rows, kind=product_kind(activation, interleaved), precision=precision,
        x_fits=_padding.fits(x), bias=bias,
    )  # fmt: skip
    written = n_rows * (width // 2 if is_gated(activation) else width) + (n_rows * width if keep else 0)
    read = product_bytes(groups, weight, bias, offsets, x.element_size()) + moved(gather, row_weight)
    every = _every(call, x, weight, offsets, gather)
    return Work(executed, every, read + written * x.element_size(), groups.bound)


def product_kind(activation: str, interleaved: bool) -> str:
    """Return which of `moesaic.kernels.tiles.KINDS` a product with an activation is."""
    if not is_gated(activation):
        return "rows"
    return "interleaved" if interleaved else "up"


@register_work(torch.ops.moesaic.grouped_outer)
def _outer_work(
    call: Call, x: Tensor | None, grad: Tensor, offsets: Tensor, gather: Tensor | None, n_features: int,
    transposed: bool, precision: str = "ieee",
) -> Work:  # fmt: skip
    n_rows, n_experts, item = grad.shape[0], offsets.shape[0] - 1, grad.element_size()
    groups = Groups.of_offsets(offsets, n_rows)
    written = n_experts * grad.shape[1] * n_features * item
    moves = groups.rows * grad.shape[1] * item + moved(offsets) + written
    if x is None:
        return Work(0, 0, moves, groups.bound)
    sides = x.shape[1], grad.shape[1]
    executed = _padding.outer(
        grad, groups, n_rows, n_experts, sides, transposed=transposed, precision=precision,
        sides_fit=_padding.fits(x) and _padding.fits(grad),
    )  # fmt: skip
    n_tokens = call.tokens.of(offsets, None if gather is None else x.shape[0])
    every = None if n_tokens is None else 2 * n_tokens * n_experts * sides[0] * sides[1]
    return Work(executed, every, moves + groups.rows * sides[0] * item + moved(gather), groups.bound)


def check_product(x: Tensor, weight: Tensor, bias: Tensor | None, name: str = "weight") -> None:
    """Check what a product with weights (E, K, N) takes of dtypes, devices and its bias.

    Raises:
        ValueError: naming the argument, its value and what it takes.
    """
    if not x.is_floating_point() or x.dtype != weight.dtype:
        raise ValueError(f"x and {name} must have one floating-point dtype, got {x.dtype} and {weight.dtype}")
    shape = (weight.shape[0], weight.shape[2])
    if bias is not None and (bias.shape != shape or bias.dtype != x.dtype):
        owner = "bias" if name == "weight" else f"{name}_bias"
        raise ValueError(f"{owner} must be {x.dtype} {shape}, got {bias.dtype} {tuple(bias.shape)}")


def check_devices(x: Tensor, **others: Tensor | None) -> None:
    """Raise a ValueError for an argument on another device than x."""
    for name, other in others.items():
        if other is not None and other.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {other.device}")


def check_precision(precision: str) -> None:
    """Raise a ValueError unless it is one of `PRECISIONS`."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


def _check(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, gather: Tensor | None, row_weight: Tensor | None,
    activation: str | None, interleaved: bool,
) -> None:  # fmt: skip
    if weight.ndim != 3:
        raise ValueError(f"weight must have shape (E, K, N), got {tuple(weight.shape)}")
    n_experts, n_features, width = weight.shape
    if x.ndim != 2 or x.shape[1] != n_features:
        raise ValueError(f"x must have shape (rows, {n_features}) to match weight, got {tuple(x.shape)}")
    check_product(x, weight, bias)
    check_devices(x, weight=weight, offsets=offsets, bias=bias, gather=gather, row_weight=row_weight)
    if n_experts < 1 or offsets.shape != (n_experts + 1,) or offsets.dtype != torch.int64:
        raise ValueError(f"offsets must be int64 ({n_experts + 1},), got {offsets.dtype} {tuple(offsets.shape)}")
    if gather is not None and (gather.ndim != 1 or gather.dtype != torch.int64):
        raise ValueError(f"gather must be int64 (rows,), got {gather.dtype} {tuple(gather.shape)}")
    n_rows = x.shape[0] if gather is None else gather.shape[0]
    if row_weight is not None and (row_weight.shape != (n_rows,) or not row_weight.is_floating_point()):
        raise ValueError(
            f"row_weight must be floating point ({n_rows},), got {row_weight.dtype} {tuple(row_weight.shape)}"
        )
    gated = False
    if activation is not None:
        check_activation(activation, "None or ")
        gated = is_gated(activation)
    if gated and width % 2:
        raise ValueError(f"weight must have an even last dimension for {activation!r}, got {width}")
    check_interleaved(interleaved, gated, activation)


def autocast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Return all in autocast's dtype where it is on for the device of x, as `torch.mm` takes them; float64 stays."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, *others
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), *(None if other is None else other.to(dtype) for other in others)


def grouped_matmul(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    *,
    bias: Tensor | None = None,
    gather: Tensor | None = None,
    activation: str | None = None,
    interleaved: bool = False,
    row_weight: Tensor | None = None,
    precision: str = "ieee",
) -> Tensor:
    """Multiply every expert's rows by its matrix: `y_r = [s_r ·] [act](x_g(r) W_e [+ b_e])`.

    Expert e has the rows offsets[e] ≤ r < offsets[e+1]; rows from offsets[E] on are zero. Nothing is padded and only
    experts with rows are visited; `weight` may be any strided view (a transposed one is not copied, and gets its
    gradient in the same layout). Differentiable in x, weight, bias and row_weight, and twice without an activation and
    row_weight; same inputs give the same bits, forward and backward. Sums are float32 (float64 for float64), rounded
    once. Under autocast the inputs are cast as for `torch.mm`. `torch.utils.flop_counter` counts 2·R·K·N forward and as
    much again for each of dx and dW, zero rows included.

    On a GPU Triton kernels read `offsets` on the device; nothing waits for the host. A CPU, and float64 on any device,
    takes PyTorch's products and Numba.

    Args:
        x: (R, K) in expert order, or with `gather` (T, K) in any order.
        weight: (E, K, N), same dtype as x.
        offsets: (E+1,) int64 from `group_by_expert`, rising from 0 to at most R.
        bias: (E, N).
        gather: (R,) int64 in 0…T−1: row r uses x[gather[r]].
        activation: by name, as in `expert_mlp`; the gated ones make (R, N/2).
        interleaved: gate and up columns alternate.
        row_weight: (R,) s, applied in float32 after the activation; not read from offsets[E] on.
        precision: of float32 products on a GPU, as in `expert_mlp`.

    Returns:
        (R, N) or (R, N/2), contiguous.

    Raises:
        ValueError: naming the argument, its value and what it takes. Offsets are checked where they can be read without
            waiting for a GPU.
    """
    x, weight, bias = autocast(x, weight, bias)
    check_precision(precision)
    _check(x, weight, offsets, bias, gather, row_weight, activation, interleaved)
    out: Tensor
    if activation is None and row_weight is None:
        out = _grouped_mm(x, weight, offsets, bias, gather, precision)
    else:
        leaves = (x, weight, bias, row_weight)
        keep = torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves)
        name = activation or NO_ACTIVATION
        out = _activated(x, weight, offsets, bias, gather, row_weight, name, interleaved, keep, precision)[0]
    return out
