"""``moesaic::expert_mlp`` and its gradient as registered ops.

Forward keeps x and the pre-activation h, and the order of the choices; backward makes the activations anew:

    d_r = dy_t V_eᵀ,   a_r = act(h_r),   dw_r = ⟨d_r, a_r⟩ + ⟨dy_t, c_e⟩,   dh_r = act'(h_r) w_r d_r
    dx_t = Σ_j dh_r U_eᵀ,   dU_e = Σ_r x_tᵀ dh_r,   dV_e = Σ_r (w_r a_r)ᵀ dy_t,   db_e = Σ_r dh_r,   dc_e = Σ_r w_r dy_t

Experts narrower than 16 with few choices each take kernels without tiles, which read the choices in order of tokens: no
row is moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moesaic.kernels import _padding
from moesaic.kernels._accounting import Call, Groups, Work, moved, register_work
from moesaic.kernels._backend import grouped
from moesaic.kernels.activations import activate, activate_backward
from moesaic.kernels.dispatch import _group
from moesaic.kernels.grouped_matmul import is_transposed, product_bytes, product_kind

TINY, TINY_ROWS = 16, 64
"""Experts narrower than this have no matrix product worth a tile, unless each has more choices than that."""
_LEAVES = ("x", "gate_up", "down", "weights", "gate_up_bias", "down_bias")


def _is_tiny(down: Tensor, ids: Tensor) -> bool:
    return 0 < down.shape[1] < TINY and ids.numel() <= TINY_ROWS * down.shape[0]


class _Order(NamedTuple):
    offsets: Tensor
    permutation: Tensor
    inverse: Tensor


def _order(ids: Tensor, n_experts: int) -> _Order:
    offsets, permutation, inverse = _group(ids.reshape(-1), n_experts)
    # A view would keep the skipped choices' end alive, and may not leave an op.
    return _Order(offsets[:-1].clone(), permutation, inverse)


@torch.library.custom_op("moesaic::expert_mlp", mutates_args=())
def _forward(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor, gate_up_bias: Tensor | None,
    down_bias: Tensor | None, activation: str, interleaved: bool, keep: bool, precision: str, sparse_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Y (T, N), h (T·k, width), offsets (E + 1), permutation and inverse (T·k); the last four empty unless kept."""
    k, n_experts = ids.shape[1], gate_up.shape[0]
    nothing = ids.new_empty(0, dtype=torch.int64)
    order = (nothing, nothing.clone(), nothing.clone())
    if not ids.numel() or not down.shape[2]:
        y, h = x.new_zeros(x.shape[0], down.shape[2]), x.new_zeros(ids.numel() if keep else 0, gate_up.shape[2])
        return y, h, *(_order(ids, n_experts) if keep else order)
    with grouped(x) as kernels:
        if _is_tiny(down, ids):
            flat = ids.reshape(-1).to(torch.int64)
            h = kernels.tiny_dot(x, gate_up, gate_up_bias, flat, k)
            a = activate(h.to(torch.promote_types(h.dtype, torch.float32)), activation, interleaved).to(x.dtype)
            y = kernels.tiny_spread(a, down, down_bias, weights.reshape(-1), flat, k)
            if keep:
                return y, h, *_order(ids, n_experts)
        else:
            order = _order(ids, n_experts)
            a, h = kernels.rows_activated(
                x, gate_up, order[0], gate_up_bias, order[1] // k, None, activation, interleaved, keep,
                precision=precision,
            )  # fmt: skip
            rows = kernels.rows(a, down, order[0], down_bias, None, precision=precision)
            y = kernels.combine(rows, weights.reshape(-1), order[2], order[0][-1], k)
            if keep:
                return y, h, *order
    return y, h.new_empty(0, h.shape[1]), nothing, nothing.clone(), nothing.clone()


@_forward.register_fake
def _(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor, gate_up_bias: Tensor | None,
    down_bias: Tensor | None, activation: str, interleaved: bool, keep: bool, precision: str, sparse_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows = ids.numel() if keep else 0
    order = [ids.new_empty(size, dtype=torch.int64) for size in (gate_up.shape[0] + 1 if keep else 0, rows, rows)]
    return x.new_empty(x.shape[0], down.shape[2]), x.new_empty(rows, gate_up.shape[2]), order[0], order[1], order[2]


@torch.library.custom_op("moesaic::expert_mlp_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor, down_bias: Tensor | None,
    h: Tensor, offsets: Tensor, permutation: Tensor, inverse: Tensor, weight_offsets: Tensor, activation: str,
    interleaved: bool, precision: str, wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, gate_up, down, weights and both biases; empty where not wanted.

    The matrices' gradients are those of the groups that ``weight_offsets`` begin: all experts, or those with rows.
    """
    dx, dgate_up, ddown, dweights, dgate_up_bias, ddown_bias = [dy.new_empty(0) for _ in _LEAVES]
    k, dy = ids.shape[1], dy if dy.stride(1) == 1 else dy.contiguous()
    if not k:
        return (
            torch.zeros_like(x), torch.zeros_like(gate_up), torch.zeros_like(down), weights.clone(),
            dy.new_zeros(gate_up.shape[0], gate_up.shape[2]), dy.new_zeros(down.shape[0], down.shape[2]),
        )  # fmt: skip
    token = permutation // k
    kept = torch.arange(permutation.shape[0], device=ids.device) < offsets[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    # A skipped choice's weight may be anything, NaN too.
    scale = weights.reshape(-1)[permutation].to(wide).masked_fill(~kept, 0.0)
    tiny = _is_tiny(down, ids)
    slots = permutation if tiny else None
    with grouped(x) as kernels:
        if any(wanted[:5]):
            if tiny:
                dh, scaled, ds = _tiny_slopes(kernels, dy, down, ids, h, scale[inverse], activation, interleaved)
            else:
                dh, scaled, ds = kernels.rows_activated_backward(
                    dy, down.mT, offsets, token, h, scale, activation, interleaved, precision=precision
                )
            if wanted[0]:
                dx = _input_gradient(kernels, dh, gate_up, offsets, inverse, ids, precision, tiny)
            if wanted[1]:
                dgate_up = _matrix_gradient(kernels, x, dh, weight_offsets, token, slots, gate_up, precision, tiny)
            if wanted[2]:
                ddown = _matrix_gradient(kernels, scaled, dy, weight_offsets, slots, token, down, precision, tiny)
            if wanted[3]:
                if down_bias is not None:
                    extra = kernels.rows(dy.to(wide), down_bias.to(wide).unsqueeze(2), offsets, None, token).squeeze(1)
                    ds = ds + (extra[inverse] if tiny else extra)
                dweights = (ds if tiny else ds[inverse]).to(weights.dtype).view(weights.shape)
            if wanted[4]:
                dgate_up_bias = kernels.column_sums(dh, offsets, slots, None)
        if wanted[5]:
            ddown_bias = kernels.column_sums(dy, offsets, token, scale)
    return dx, dgate_up, ddown, dweights, dgate_up_bias, ddown_bias


def _tiny_slopes(
    kernels: Any, dy: Tensor, down: Tensor, ids: Tensor, h: Tensor, scale: Tensor, activation: str, interleaved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dh, w·a and ⟨d, a⟩ of all choices, in order of tokens."""
    d = kernels.tiny_dot(dy, down.mT, None, ids.reshape(-1).to(torch.int64), ids.shape[1], dtype=scale.dtype)
    a, dh = activate_backward(h, d * scale.unsqueeze(1), activation, interleaved)
    return dh.to(h.dtype), (a * scale.unsqueeze(1)).to(h.dtype), (d * a).sum(1)


def _input_gradient(
    kernels: Any, dh: Tensor, gate_up: Tensor, offsets: Tensor, inverse: Tensor, ids: Tensor, precision: str, tiny: bool
) -> Tensor:
    if tiny:
        out: Tensor = kernels.tiny_spread(dh, gate_up.mT, None, None, ids.reshape(-1).to(torch.int64), ids.shape[1])
        return out
    rows = kernels.rows(dh, gate_up.mT, offsets, None, None, precision=precision)
    out = kernels.combine(rows, None, inverse, offsets[-1], ids.shape[1])
    return out


def _matrix_gradient(
    kernels: Any, left: Tensor, right: Tensor, offsets: Tensor, left_rows: Tensor | None, right_rows: Tensor | None,
    weight: Tensor, precision: str, tiny: bool,
) -> Tensor:  # fmt: skip
    transposed = is_transposed(weight)
    if tiny:
        out: Tensor = kernels.tiny_outer(left, right, offsets, left_rows, right_rows, transposed)
        return out
    out = kernels.outer(left, right, offsets, left_rows, right_rows, transposed, precision=precision)
    return out


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor, down_bias: Tensor | None,
    h: Tensor, offsets: Tensor, permutation: Tensor, inverse: Tensor, weight_offsets: Tensor, activation: str,
    interleaved: bool, precision: str, wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    groups, (n_experts, _, width) = weight_offsets.shape[0] - 1, gate_up.shape

    def like(weight: Tensor) -> Tensor:
        if is_transposed(weight):
            return dy.new_empty(groups, weight.shape[2], weight.shape[1]).mT
        return dy.new_empty(groups, weight.shape[1], weight.shape[2])

    nothing = [dy.new_empty(0) for _ in _LEAVES]
    return (
        dy.new_empty(x.shape) if wanted[0] else nothing[0],
        like(gate_up) if wanted[1] else nothing[1],
        like(down) if wanted[2] else nothing[2],
        weights.new_empty(weights.shape) if wanted[3] else nothing[3],
        dy.new_empty(n_experts, width) if wanted[4] else nothing[4],
        dy.new_empty(n_experts, down.shape[2]) if wanted[5] else nothing[5],
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, gate_up, down, weights, ids, gate_up_bias, down_bias = inputs[:7]
    ctx.activation, ctx.interleaved, _, ctx.precision, ctx.sparse_grad = inputs[7:]
    ctx.save_for_backward(x, gate_up, down, weights, ids, gate_up_bias, down_bias, *output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    x, gate_up, down, weights, ids, _, down_bias, h, offsets, permutation, inverse = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 3, 5, 6)]
    if dy is None:
        return (None,) * 12
    if torch.is_grad_enabled():
        if ctx.sparse_grad:
            raise RuntimeError("expert_mlp with sparse_grad can be differentiated once")
        found = _differentiable(ctx, dy, needs)
    else:
        touched = (offsets[1:] > offsets[:-1]).nonzero().squeeze(1) if ctx.sparse_grad else None
        weight_offsets = offsets if touched is None else torch.cat([offsets[touched], offsets[-1:]])
        grads = _backward(
            dy, x, gate_up, down, weights, ids, down_bias, h, offsets, permutation, inverse, weight_offsets,
            ctx.activation, ctx.interleaved, ctx.precision, needs,
        )  # fmt: skip
        found = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        if touched is not None:
            for place, weight in ((1, gate_up), (2, down)):
                if needs[place]:
                    found[place] = torch.sparse_coo_tensor(
                        touched.unsqueeze(0), grads[place], weight.shape, is_coalesced=True, check_invariants=False
                    )
    return (*found[:4], None, *found[4:], None, None, None, None, None)


def _differentiable(ctx: Any, dy: Tensor, needs: list[bool]) -> list[Tensor | None]:
    """Gradients that can be differentiated again, through the ops that this one fuses."""
    from moesaic.kernels.expert_mlp import composed

    # A view of each, so that the graph of this gradient ends here and not at the caller's leaves.
    views: list[Any] = [None if saved is None else saved.view_as(saved) for saved in ctx.saved_tensors[:7]]
    x, gate_up, down, weights, ids, gate_up_bias, down_bias = views
    y = composed(
        x, gate_up, down, weights, ids, activation=ctx.activation, gate_up_bias=gate_up_bias, down_bias=down_bias,
        interleaved=ctx.interleaved, precision=ctx.precision,
    )  # fmt: skip
    leaves = (x, gate_up, down, weights, gate_up_bias, down_bias)
    asked = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
    grads = iter(torch.autograd.grad(y, asked, dy, create_graph=True))
    return [next(grads) if need else None for need in needs]


_forward.register_autograd(_autograd, setup_context=_setup)


@register_flop_formula(torch.ops.moesaic.expert_mlp)
def _forward_flops(
    x: Sequence[int], gate_up: Sequence[int], down: Sequence[int], weights: object, ids: Sequence[int], *_: object,
    **__: object,
) -> int:  # fmt: skip
    rows = ids[0] * ids[1]
    return 2 * rows * (gate_up[1] * gate_up[2] + down[1] * down[2])


@register_flop_formula(torch.ops.moesaic.expert_mlp_backward)
def _backward_flops(
    dy: object, x: object, gate_up: Sequence[int], down: Sequence[int], weights: object, ids: Sequence[int],
    *rest: Any, **__: object,
) -> int:  # fmt: skip
    rows, wanted = ids[0] * ids[1], rest[-1]
    up, back = 2 * rows * gate_up[1] * gate_up[2], 2 * rows * down[1] * down[2]
    total: int = back * (any(wanted[:5]) + wanted[2]) + up * (wanted[0] + wanted[1])
    return total


@register_work(torch.ops.moesaic.expert_mlp)
def _forward_work(
    call: Call, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor, gate_up_bias: Tensor | None,
    down_bias: Tensor | None, activation: str, interleaved: bool, keep: bool, precision: str, sparse_grad: bool,
) -> Work:  # fmt: skip
    """Bytes: grouping, x's rows, touched weights; h if kept, a and the experts' outputs written, the two read again."""
    (n_tokens, k), (n_experts, _, width), item = ids.shape, gate_up.shape, x.element_size()
    every = _forward_flops(x.shape, gate_up.shape, down.shape, weights, (n_tokens, n_experts))
    n_rows, (_, d_ff, n_out) = n_tokens * k, down.shape
    if not n_rows or not n_out:
        return Work(0, every, n_tokens * n_out * item)
    groups = Groups.of_ids(ids, n_experts)
    order = moved(ids) + 8 * (n_experts + 1 + 2 * n_rows)
    result = n_tokens * n_out * item
    if _is_tiny(down, ids):
        executed = _padding.tiny_dot(x, gate_up, gate_up_bias, groups, n_rows, k)
        executed += _padding.tiny_spread(x, down, down_bias, weights, groups, n_tokens, k)
        read = _product_reads(groups, gate_up, gate_up_bias, item) + _product_reads(groups, down, down_bias, item)
        # h is written and read, a is written; both products read all ids.
        between = n_rows * (2 * width + d_ff) * item + 2 * moved(ids)
        moves = read + between + moved(weights) + result + (order if keep else 0)
        return Work(executed, every, moves, groups.bound)
    kind = product_kind(activation, interleaved)
    executed = _padding.rows(
        x, gate_up, groups, n_rows, kind=kind, precision=precision, x_fits=_padding.fits(x), bias=gate_up_bias
    )
    executed += _padding.rows(
        x, down, groups, n_rows, precision=precision, x_fits=_padding.row_fits(d_ff, x), bias=down_bias
    )
    first = _token_bytes(n_rows) + 8 * n_rows + _product_reads(groups, gate_up, gate_up_bias, item)
    first += 8 * (n_experts + 1) + n_rows * (d_ff + width * keep) * item
    second = 8 * (n_experts + 1) + _product_reads(groups, down, down_bias, item) + n_rows * n_out * item
    combined = groups.rows * n_out * item + moved(weights) + 8 * n_rows + result
    return Work(executed, every, order + first + second + combined, groups.bound)


def _product_reads(groups: Groups, weight: Tensor, bias: Tensor | None, item: int) -> int:
    return product_bytes(groups, weight, bias, None, item)


def _token_bytes(n_rows: int) -> int:
    """Bytes of dividing the permutation by k."""
    return 16 * n_rows


@register_work(torch.ops.moesaic.expert_mlp_backward)
def _backward_work(
    call: Call, dy: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor,
    down_bias: Tensor | None, h: Tensor, offsets: Tensor, permutation: Tensor, inverse: Tensor, weight_offsets: Tensor,
    activation: str, interleaved: bool, precision: str, wanted: Sequence[bool],
) -> Work:  # fmt: skip
    """Bytes: of each gradient that is wanted, what its product reads and writes; dh, w·a and ⟨d, a⟩ between them."""
    (n_tokens, k), (n_experts, depth, width), (_, d_ff, n_out) = ids.shape, gate_up.shape, down.shape
    n_rows, item, listed = n_tokens * k, x.element_size(), weight_offsets.shape[0] - 1
    every = _backward_flops(dy, x, gate_up.shape, down.shape, weights, (n_tokens, n_experts), wanted)
    if not n_rows:
        return Work(0, every, call.bytes)
    groups = Groups.of_offsets(offsets, n_rows)
    edges, wide = 8 * (n_experts + 1), max(4, item)
    executed, fits, tiny = 0, _padding.fits(dy), _is_tiny(down, ids)
    moves = _token_bytes(n_rows) + 8 * n_rows + moved(weights) + n_rows * wide  # tokens, and weights by row
    if any(wanted[:5]):
        if tiny:
            executed += _padding.tiny_dot(h, down.mT, None, groups, n_rows, k)
        else:
            executed += _padding.rows(
                h, down.mT, groups, n_rows, kind="backward", precision=precision, x_fits=fits
            )  # fmt: skip
        read = _product_reads(groups, down.mT, None, item) + groups.rows * width * item + n_rows * (8 + wide) + edges
        moves += read + n_rows * (width + d_ff) * item + n_rows * wide
    if wanted[0]:
        moves += edges + _product_reads(groups, gate_up.mT, None, item)
        moves += 8 * n_rows + n_tokens * depth * item
        if tiny:
            executed += _padding.tiny_spread(h, gate_up.mT, None, None, groups, n_tokens, k)
        else:
            executed += _padding.rows(
                h, gate_up.mT, groups, n_rows, precision=precision, x_fits=_padding.row_fits(width, h)
            )
            moves += (n_rows + groups.rows) * depth * item
    matrices = (
        (wanted[1], gate_up, (depth, width), _padding.fits(x) and _padding.row_fits(width, h)),
        (wanted[2], down, (d_ff, n_out), _padding.row_fits(d_ff, h) and fits),
    )
    for asked, weight, sides, aligned in matrices:
        if asked:
            moves += 8 * (listed + 1 + n_rows) + (groups.rows * sum(sides) + listed * sides[0] * sides[1]) * item
            transposed = is_transposed(weight)
            if tiny:
                executed += _padding.tiny_outer(h, groups, sides, transposed=transposed)
            else:
                executed += _padding.outer(
                    h, groups, n_rows, listed, sides, transposed=transposed, precision=precision, sides_fit=aligned
                )
    if wanted[3]:
        moves += n_rows * (wide + 8) + moved(weights)
        if down_bias is not None:
            moves += edges + (groups.rows + groups.touched) * n_out * wide + n_rows * (8 + wide)
    if wanted[4]:
        moves += edges + groups.rows * width * item + n_experts * width * item
    if wanted[5]:
        moves += edges + groups.rows * n_out * item + n_rows * (8 + wide) + n_experts * n_out * item
    return Work(executed, every, moves, groups.bound)


def expert_mlp_op(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor, gate_up_bias: Tensor | None,
    down_bias: Tensor | None, activation: str, interleaved: bool, precision: str, sparse_grad: bool,
) -> Tensor:  # fmt: skip
    """Return y (T, N) of x (T, D), weights and ids (T, k)."""
    leaves = (x, gate_up, down, weights, gate_up_bias, down_bias)
    keep = torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves)
    y: Tensor = _forward(
        x, gate_up, down, weights, ids, gate_up_bias, down_bias, activation, interleaved, keep, precision, sparse_grad
    )[0]
    return y
