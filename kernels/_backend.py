"""Which implementation of an op runs: Triton on a GPU, the CPU twin elsewhere, or what ``MOESAIC_BACKEND`` says."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from moesaic.kernels._autocast import no_autocast

BACKENDS = ("triton", "cpu")


def uses_triton(tensor: Tensor) -> bool:
    """Return whether Triton computes with a tensor: on a GPU, but for float64; ``MOESAIC_BACKEND`` overrides.

    Routing heeds ``triton``, for the interpreter, and not ``cpu``: its CPU twin takes no tensors of a GPU.

    Raises:
        ValueError: ``MOESAIC_BACKEND`` is neither ``triton`` nor ``cpu``, or is ``triton`` for a tensor on another
            device than a GPU and without ``TRITON_INTERPRET=1``.
    """
    asked = os.environ.get("MOESAIC_BACKEND") or ("triton" if tensor.is_cuda else "cpu")
    if asked not in BACKENDS:
        raise ValueError(f"MOESAIC_BACKEND must be {' or '.join(BACKENDS)}, got {asked!r}")
    if asked == "triton" and not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"MOESAIC_BACKEND=triton takes tensors on a GPU, or TRITON_INTERPRET=1, got one on {tensor.device}"
        )
    return asked == "triton" and tensor.dtype != torch.float64


@contextmanager
def grouped(tensor: Tensor) -> Iterator[ModuleType]:
    """Give the module of the grouped products for a tensor, with its device the current one and without autocast."""
    name = "grouped_triton" if uses_triton(tensor) else "grouped_matmul_cpu"
    with torch.cuda.device_of(tensor), no_autocast(tensor.device.type):
        yield importlib.import_module(f"moesaic.kernels.{name}")
