"""Load of the experts: measures of it, a selection bias that evens it out without a loss, and capacity."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.kernels.dispatch import group_by_expert


class LoadMetrics(NamedTuple):
    """How evenly choices are spread, scalars float64: all are best when every expert has the same count.

    max_violation: max_e counts_e / mean − 1 (arXiv:2408.15664); variation: standard deviation over mean;
    effective_experts: e^entropy of the shares, 1 … E; idle_experts: experts without a choice. Without choices the first
    two are 0 and effective_experts 0.
    """

    max_violation: Tensor
    variation: Tensor
    effective_experts: Tensor
    idle_experts: Tensor


def load_metrics(counts: Tensor) -> LoadMetrics:
    """Measure the load (E,) of the experts, on its device.

    Raises:
        ValueError: unless counts is one-dimensional with at least one expert.
    """
    if counts.ndim != 1 or not counts.numel():
        raise ValueError(f"counts must have shape (E,) with E >= 1, got {tuple(counts.shape)}")
    load = counts.to(torch.float64)
    mean = load.mean()
    some = mean > 0
    share = load / torch.where(some, load.sum(), 1.0)
    entropy = -torch.xlogy(share, share).sum()
    relative = torch.where(some, load / torch.where(some, mean, 1.0), 1.0)
    return LoadMetrics(
        relative.max() - 1,
        (relative - 1).square().mean().sqrt(),
        torch.where(some, entropy.exp(), 0.0),
        (counts == 0).sum().to(torch.float64),
    )


@torch.no_grad()
def update_selection_bias(bias: Tensor, counts: Tensor, rate: float = 1e-3) -> None:
    """Move the selection bias towards balance in place: `b_e += rate · sign(mean load − load_e)` (arXiv:2408.15664).

    Args:
        bias: (E,) floating point, as `route_topk` takes it.
        counts: (E,) choices since the last update.
        rate: the step.

    Raises:
        ValueError: naming the argument, its value and what it takes.
    """
    if bias.ndim != 1 or not bias.is_floating_point() or counts.shape != bias.shape:
        raise ValueError(
            f"bias and counts must have one shape (E,) and bias be floating point, "
            f"got {tuple(bias.shape)} {bias.dtype} and {tuple(counts.shape)}"
        )
    load = counts.to(torch.float64)
    bias += (rate * torch.sign(load.mean() - load)).to(bias.dtype)


class Capacity(NamedTuple):
    """Choices within capacity: ids (..., k) with E, which is skipped, in place of a dropped one; n_dropped (E,)."""

    ids: Tensor
    n_dropped: Tensor


def drop_over_capacity(ids: Tensor, n_experts: int, capacity_factor: float) -> Capacity:
    """Keep each expert's first ⌈capacity_factor · T·k / E⌉ choices, in order of slot, and say how many were dropped.

    Stays on the device. Ids outside 0…E−1 stay as they are and count nowhere.

    Raises:
        ValueError: naming the argument, its value and what it takes.
    """
    if not 0 < capacity_factor < math.inf:  # isfinite cannot be traced with a symbolic number
        raise ValueError(f"capacity_factor must be a finite number > 0, got {capacity_factor!r}")
    grouping, ids = group_by_expert(ids, n_experts), ids.to(torch.int64)
    # Less a rounding error: 1.1 · 100 / 10 is more than 11 in floating point.
    capacity = math.ceil(capacity_factor * ids.numel() / n_experts * (1 - 1e-12))
    inside = (ids >= 0) & (ids < n_experts)
    rank = grouping.inverse.view(ids.shape) - grouping.offsets[ids.clamp(0, n_experts - 1)]
    kept = torch.where(inside & (rank >= capacity), n_experts, ids)
    return Capacity(kept, (grouping.counts - capacity).clamp(min=0))
