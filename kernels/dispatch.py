"""Grouping tokens by expert, and bringing their results back.

    counts_e = #{(t, j): ids_tj = e},   offsets = [0, cumsum(counts)]
    permutation: position in expert order → slot t·k + j (stable);   inverse: slot → position
    combine:  y_t = Σ_j w_tj · rows[inverse_tj]

Everything stays on the device of the ids: no size or count is read back.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moesaic.kernels._accounting import Call, Work, moved, register_work
from moesaic.kernels._backend import uses_triton
from moesaic.kernels._extras import numba_twin


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
    offsets, permutation, inverse = _group(ids.detach().reshape(-1), n_experts)
    counts = offsets[1:] - offsets[:-1]
    return Grouping(counts[:-1], offsets[:-1], permutation, inverse, counts[-1])


@torch.library.custom_op("moesaic::group_by_expert", mutates_args=())
def _group(ids: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets (E + 2), of which the last group are the skipped, permutation and inverse of ids (T·k)."""
    if ids.is_cuda or uses_triton(ids):
        from moesaic.kernels import dispatch_triton

        with torch.cuda.device_of(ids):
            return dispatch_triton.group(ids.contiguous(), n_experts)
    if ids.device.type == "cpu" and find_spec("numba") is not None:
        ids = ids.to(torch.int64).contiguous()
        offsets = torch.zeros(n_experts + 2, dtype=torch.int64)
        permutation, inverse = torch.empty_like(ids), torch.empty_like(ids)
        arrays = [tensor.numpy() for tensor in (offsets, permutation, inverse)]
        numba_twin("dispatch_cpu").group(ids.numpy(), n_experts, *arrays)
        return offsets, permutation, inverse
    flat = ids.to(torch.int64)
    key = torch.where((flat < 0) | (flat >= n_experts), n_experts, flat)
    permutation = torch.sort(key, stable=True).indices
    slots = torch.arange(flat.numel(), device=ids.device)
    inverse = torch.empty_like(permutation).scatter_(0, permutation, slots)
    # Integer adds commute, so the scatter is deterministic; bincount would wait for the device.
    counts = torch.zeros(n_experts + 1, dtype=torch.int64, device=ids.device).scatter_add_(0, key, torch.ones_like(key))
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]), permutation, inverse


@_group.register_fake
def _(ids: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    slots = ids.new_empty(ids.numel(), dtype=torch.int64)
    return slots.new_empty(n_experts + 2), slots, torch.empty_like(slots)


@register_flop_formula(torch.ops.moesaic.group_by_expert)
def _flops(*args: object, **kwargs: object) -> int:
    return 0


class TileMap(NamedTuple):
    """Tiles of at most ``block`` rows, none across two experts, in order of expert; for grids of a known size.

    expert (N,) and first_row (N,) int64 with N = ⌈T·k/block⌉ + min(E, T·k), which is enough for every routing; places
    from n_tiles () on have expert E and first_row offsets[E].
    """

    expert: Tensor
    first_row: Tensor
    n_tiles: Tensor


def tile_map(grouping: Grouping, block: int) -> TileMap:
    """Cut each expert's rows into tiles of ``block``, without reading anything back to the host.

    Raises:
        ValueError: for a block below 1.
    """
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    counts, offsets = grouping.counts, grouping.offsets
    n_experts, n_slots = counts.shape[0], grouping.permutation.shape[0]
    ends = ((counts + block - 1) // block).cumsum(0)
    tiles = torch.arange(-(-n_slots // block) + min(n_experts, n_slots), device=counts.device)
    expert = torch.searchsorted(ends, tiles, right=True)
    before = torch.cat([ends.new_zeros(1), ends])[expert]
    first_row = torch.where(expert < n_experts, offsets[expert] + (tiles - before) * block, offsets[-1])
    return TileMap(expert, first_row, ends[-1])


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


@register_flop_formula(torch.ops.moesaic.permute_rows)
def _permute_flops(*args: object, **kwargs: object) -> int:
    return 0


@register_work(torch.ops.moesaic.permute_rows)
def _permute_work(call: Call, rows: Tensor, order: Tensor, inverse: Tensor) -> Work:
    return Work(0, 0, 2 * order.shape[0] * rows.shape[1] * rows.element_size() + moved(order))


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
