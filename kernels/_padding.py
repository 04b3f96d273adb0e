"""FLOPs that the grouped products execute, padding included, by what runs on the tensors' device.

Triton kernels multiply whole tiles (`moesaic.kernels.tiles`); the Numba twin pads columns to 64 bytes and no rows, and
multiplies exactly where a side is tiny; PyTorch's products, of float64 on a GPU and without Numba, are taken as exact.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from moesaic.kernels._accounting import Groups, is_known, up_to
from moesaic.kernels._backend import uses_triton

_LINE = 64
"""Bytes of columns that the Numba twin pads to: ``vectors_cpu.LINE``, which cannot be imported without Numba."""


def _lanes(*tensors: Tensor | None) -> int:
    """Return the columns that the CPU pads to, 1 where PyTorch multiplies."""
    given = [tensor for tensor in tensors if tensor is not None]
    if find_spec("numba") is None or given[0].is_cuda:
        return 1
    return _LINE // (8 if any(tensor.dtype == torch.float64 for tensor in given) else 4)


def fits(tensor: Tensor) -> bool:
    """Return whether rows begin at multiples of 16 bytes, as a kernel is given them: copied unless contiguous."""
    from moesaic.kernels.weights_triton import aligned

    if tensor.ndim == 2 and tensor.stride(1) != 1:
        return row_fits(tensor.shape[1], tensor)
    if is_known(tensor):
        return aligned(tensor)
    steps = [tensor.storage_offset(), *tensor.stride()]
    return 1 in steps[1:] and all(step * tensor.element_size() % 16 == 0 for step in steps if step != 1)


def row_fits(width: int, like: Tensor) -> bool:
    """Return whether rows of this many numbers in new memory begin at multiples of 16 bytes."""
    return width * like.element_size() % 16 == 0


def rows(
    like: Tensor, weight: Tensor, groups: Groups, n_rows: int, *, kind: str = "rows", precision: str = "ieee",
    x_fits: bool, bias: Tensor | None = None,
) -> int:  # fmt: skip
    """FLOPs of rows times their experts' weights (E, K, N); ``like`` has the rows' dtype and device."""
    n_experts, depth, width = weight.shape
    if not groups.rows or not width or not depth:
        return 0
    if not uses_triton(like):
        return 2 * groups.rows * depth * up_to(width, _lanes(like, weight, bias))
    from moesaic.kernels.tiles import Shape, planned

    halves = 2 if kind in ("up", "interleaved") else 1
    n_out = width // halves
    shape = Shape(kind, n_rows, depth, n_out, n_experts, like.dtype, precision, x_fits and fits(weight))
    tile = planned(shape, like.device)
    return (
        2 * halves * groups.padded(tile.block_m) * up_to(depth, tile.block_k) * up_to(n_out, tile.block_n)
    )  # fmt: skip


def outer(
    like: Tensor, groups: Groups, n_rows: int, n_experts: int, sides: tuple[int, int], *, transposed: bool,
    precision: str = "ieee", sides_fit: bool,
) -> int:  # fmt: skip
    """FLOPs of every expert's sum of rows (K) times rows (N), stored transposed or not."""
    left, right = reversed(sides) if transposed else sides
    if not groups.rows or not left or not right:
        return 0
    if not uses_triton(like):
        return 2 * groups.rows * left * up_to(right, _lanes(like))
    from moesaic.kernels.tiles import Shape, planned

    tile = planned(Shape("outer", n_rows, left, right, n_experts, like.dtype, precision, sides_fit), like.device)
    return 2 * groups.padded(tile.block_k) * up_to(left, tile.block_m) * up_to(right, tile.block_n)


def tiny_dot(like: Tensor, weight: Tensor, bias: Tensor | None, groups: Groups, n_slots: int, k: int) -> int:
    """FLOPs of every choice's row (K) times its expert (K, N); on a GPU of skipped choices too."""
    if not uses_triton(like):
        return 2 * groups.rows * weight.shape[1] * weight.shape[2]
    from moesaic.kernels.tiny_triton import dot_arguments

    sizes = dot_arguments(weight, bias, k)[0]
    depth = up_to(weight.shape[1], sizes["STEP"] * sizes["UNROLL"])
    return 2 * up_to(n_slots, sizes["SLOTS"]) * depth * up_to(weight.shape[2], sizes["BLOCK_S"])


def tiny_spread(
    like: Tensor, weight: Tensor, bias: Tensor | None, row_weight: Tensor | None, groups: Groups, n_tokens: int, k: int
) -> int:
    """FLOPs of every token's sum over k choices of rows (K) times experts (K, N); on a GPU of skipped ones too."""
    if not uses_triton(like):
        return 2 * groups.rows * weight.shape[1] * weight.shape[2]
    from moesaic.kernels.tiny_triton import spread_arguments

    sizes = spread_arguments(weight, bias, row_weight, k)[0]
    depth = up_to(weight.shape[1], sizes["BLOCK_S"])
    return 2 * n_tokens * up_to(k, sizes["CHOICES"]) * depth * up_to(weight.shape[2], sizes["STEP"])


def tiny_outer(like: Tensor, groups: Groups, sides: tuple[int, int], *, transposed: bool) -> int:
    """FLOPs of every expert's sum of rows (K) times rows (N), the shorter below 32."""
    if not uses_triton(like):
        return 2 * groups.rows * sides[0] * sides[1]
    from moesaic.kernels.tiny_triton import outer_constants

    long, short = max(sides), min(sides)
    column = like.new_empty(0, long)
    sizes = outer_constants(column, short, long_fastest=(sides[0] < sides[1]) != transposed, ones=False)
    return 2 * groups.padded(sizes["UNROLL"]) * up_to(long, sizes["STEP"]) * int(sizes["BLOCK_S"])
