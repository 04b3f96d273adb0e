"""Products in the dtype of their operands, whatever autocast says."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor


def no_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """Return a context without autocast for a device, also for one that knows none."""
    if not torch.amp.is_autocast_available(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x Wᵀ in the dtype of its operands."""
    with no_autocast(x.device.type):
        return F.linear(x, weight)
