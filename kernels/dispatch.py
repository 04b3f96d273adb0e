"""Grouping tokens by expert, and bringing their results back.

    counts_e = #{(t, j): ids_tj = e},   offsets = [0, cumsum(counts)]
    permutation: position in expert order → slot t·k + j (stable);   inverse: slot → position
    combine:  y_t = Σ_j w_tj · rows[inverse_tj]

Everything stays on the device of the ids: no size or count is read back.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Grouping(NamedTuple):
    """The T·k choices in order of expert; a slot is t·k + j. All on the device of the ids, int64.

    counts (E,), offsets (E+1,): expert e has rows offsets[e]…offsets[e+1]; permutation (T·k,) position → slot, skipped
    slots last; inverse (T·k,) slot → position; n_skipped (): choices outside 0…E−1.
    """

    counts: Tensor
    offsets: Tensor
    permutation: Tensor
    inverse: Tensor
    n_skipped: Tensor


def group_by_expert(ids: Tensor, n_experts: int) -> Grouping:
    """Sort the choices by expert, stably, without reading anything back to the host.

    An id outside 0…E−1 (a sentinel of expert parallelism) is skipped and counted: its slot sorts last, at positions
    from offsets[E] on. Memory O(T·k + E).

    Args:
        ids: (..., k), any integer type.
        n_experts: E ≥ 1.

    Returns:
        `Grouping(counts, offsets, permutation, inverse, n_skipped)`.

    Raises:
        ValueError: naming the argument, its value and what it takes.
    """
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"ids must be integers, got {ids.dtype}")
    if n_experts < 1:
        raise ValueError(f"n_experts must be at least 1, got {n_experts}")
    flat = ids.detach().reshape(-1).to(torch.int64)
    key = torch.where((flat < 0) | (flat >= n_experts), n_experts, flat)
    permutation = torch.sort(key, stable=True).indices
    slots = torch.arange(flat.numel(), device=ids.device)
    inverse = torch.empty_like(permutation).scatter_(0, permutation, slots)
    # Integer adds commute, so the scatter is deterministic; bincount would wait for the device.
    counts = torch.zeros(n_experts + 1, dtype=torch.int64, device=ids.device).scatter_add_(0, key, torch.ones_like(key))
    offsets = torch.cat([counts.new_zeros(1), counts[:-1].cumsum(0)])
    return Grouping(counts[:-1], offsets, permutation, inverse, counts[-1])


@torch.library.custom_op("moesaic::permute_rows", mutates_args=())
def _permute_rows(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """rows[order] for a permutation; knowing its inverse, the gradient is a gather too: no atomics."""
    return rows.index_select(0, order)


@_permute_rows.register_fake
def _(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    return rows.new_empty(order.shape[0], rows.shape[1])


def _permute_setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _permute_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    order, inverse = ctx.saved_tensors
    return _permute_rows(grad, inverse, order), None, None


_permute_rows.register_autograd(_permute_backward, setup_context=_permute_setup)


def combine(rows: Tensor, weights: Tensor, grouping: Grouping) -> Tensor:
    """Weighted sum of every token's expert outputs: `y_t = Σ_j w_tj · rows[inverse_tj]`, skipped choices left out.

    Products and sums are float32 (float64 if either input is), in a fixed order; the result has the dtype of `rows`.
    Differentiable in `rows` and `weights`; a skipped choice's weight is not read and gets gradient 0.

    Args:
        rows: (T·k, N) in expert order; rows from offsets[E] on must be finite.
        weights: (..., k) with T·k elements.
        grouping: from `group_by_expert` on ids of the shape of `weights`.

    Returns:
        (..., N).

    Raises:
        ValueError: naming the argument, its shape and what it takes.
    """
    n_slots = grouping.permutation.numel()
    if rows.ndim != 2 or rows.shape[0] != n_slots:
        raise ValueError(f"rows must have shape ({n_slots}, N), got {tuple(rows.shape)}")
    if weights.ndim < 1 or weights.numel() != n_slots:
        raise ValueError(f"weights must have the {n_slots} elements of the grouped ids, got {tuple(weights.shape)}")
    dtype = torch.promote_types(torch.promote_types(rows.dtype, weights.dtype), torch.float32)
    skipped = (grouping.inverse >= grouping.offsets[-1]).view(weights.shape)
    gates = weights.to(dtype).masked_fill(skipped, 0.0)
    picked = _permute_rows(rows, grouping.inverse, grouping.permutation).view(*weights.shape, rows.shape[1])
    out: Tensor = (picked * gates.unsqueeze(-1)).sum(-2).to(rows.dtype)
    return out
