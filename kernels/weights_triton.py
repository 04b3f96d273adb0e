"""How a kernel reads (E, K, N) weights: by descriptors where chip and strides allow, else by pointers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_ALIGNED_BYTES = 16


@dataclass(frozen=True)
class Weights:
    """What a kernel is given, and as what: ``tma_n`` or ``tma_k`` a descriptor, ``n``, ``k`` or ``any`` a pointer.

    The letter is the contiguous dimension.
    """

    operand: Any
    layout: str


def weights(weight: Tensor, block_k: int, block_n: int, *, exact: bool) -> Weights:
    """Describe weights (E, K, N) of any strides, without a copy.

    A descriptor is of all three dimensions: one of (E·K, N) would read the next expert's rows after the last of K, and
    an infinity there times 0 is NaN. Products without tensor cores (``exact``) take pointers: the layout that a
    descriptor leaves in shared memory costs them registers.
    """
    strides = weight.stride()
    contiguous = next((name for name, d in (("n", 2), ("k", 1)) if strides[d] == 1 or weight.shape[d] == 1), "any")
    if contiguous == "any" or exact or not weight.numel() or not _copies_tiles(weight.device) or not aligned(weight):
        return Weights(weight, contiguous)
    view, block = (weight, (1, block_k, block_n)) if contiguous == "n" else (weight.mT, (1, block_n, block_k))
    if view.stride(2) != 1 or min(view.stride()) < 1:
        return Weights(weight, contiguous)
    described = TensorDescriptor(view, list(view.shape), list(view.stride()), list(block))
    return Weights(described, f"tma_{contiguous}")


def aligned(tensor: Tensor) -> bool:
    """Return whether every row along the contiguous dimension begins at a multiple of 16 bytes."""
    steps = list(tensor.stride())
    if 1 not in steps:
        return False
    steps.remove(1)
    return tensor.data_ptr() % _ALIGNED_BYTES == 0 and all(
        step * tensor.element_size() % _ALIGNED_BYTES == 0 for step in steps
    )


def _copies_tiles(device: torch.device) -> bool:
    if device.type == "cpu":  # the interpreter
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9
