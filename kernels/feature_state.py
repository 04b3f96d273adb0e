"""One toy model of very many features: its shape, its state in memory, and the batch in column order.

All parameters of a feature lie in one row of a table (n, P), so that what a step touches of a feature is consecutive:
its weights in every expert, then its decoder's if untied, the shared expert's, its biases, its part of the router.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_MULTIPLE = 8


@dataclass(frozen=True)
class FeatureShape:
    """Sizes of a toy model: n, m, E, k, the shared expert's width m_0 (0: none), whether tied, whether it has a router.

    x' = [y_0] + Σ_{e ∈ top-k} w_e ReLU(x W_e D_eᵀ + b_e), as in `moesaic.moe.ToyConfig`.
    """

    n_features: int
    n_hidden: int
    n_experts: int = 1
    top_k: int = 1
    shared_hidden: int = 0
    tied: bool = True
    routed: bool = True

    def __post_init__(self) -> None:
        if self.n_experts > 1 and not self.routed:
            raise ValueError(f"routed=False: takes n_experts = 1, got {self.n_experts}")

    @cached_property
    def sections(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Name → first column and shape of each parameter's part in a feature's row."""
        e, m, m0 = self.n_experts, self.n_hidden, self.shared_hidden
        shapes: dict[str, tuple[int, ...]] = {"weight": (e, m)}
        if not self.tied:
            shapes["decoder"] = (e, m)
        if m0:
            shapes["shared_weight"] = (m0,)
            if not self.tied:
                shapes["shared_decoder"] = (m0,)
        shapes["bias"] = (e,)
        if m0:
            shapes["shared_bias"] = (1,)
        if self.routed:
            shapes["router"] = (e,)
        placed, first = {}, 0
        for name, shape in shapes.items():
            placed[name] = (first, shape)
            first += torch.Size(shape).numel()
        return placed

    @property
    def n_columns(self) -> int:
        """Parameters of a feature."""
        first, shape = list(self.sections.values())[-1]
        return first + torch.Size(shape).numel()

    @property
    def stride(self) -> int:
        """P, the columns of the table: parameters of a feature and padding to a multiple of 32 bytes."""
        return -(-self.n_columns // _MULTIPLE) * _MULTIPLE

    def rows(self, table: Tensor) -> dict[str, Tensor]:
        """Return views (rows, …) of the sections of a table (rows, P)."""
        return {
            name: table[:, first : first + torch.Size(shape).numel()].unflatten(1, shape)
            for name, (first, shape) in self.sections.items()
        }

    def named(self, table: Tensor) -> dict[str, Tensor]:
        """Return views of a table (n, P) as a `ToyModel` has them: weight (E, n, m), bias (E, n), shared_bias (n,)."""
        views = self.rows(table)
        for name in ("weight", "decoder", "bias", "router"):
            if name in views:
                views[name] = views[name].movedim(1, 0)
        if "shared_bias" in views:
            views["shared_bias"] = views["shared_bias"][:, 0]
        return views


@dataclass(frozen=True)
class Columns:
    """A sparse batch x (B, n) in column order: its distinct features, and the samples that have each.

    Attributes:
        features: (C,) int64, rising; those that are present in the batch.
        starts: (C + 1,) int64, where the entries of each begin.
        samples: (nnz,) int64, rising within a feature.
        values: (nnz,) float32.
    """

    features: Tensor
    starts: Tensor
    samples: Tensor
    values: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Columns:
        """Turn ``x``, sparse CSR (B, n); entries keep the order of samples within a feature."""
        counts = x.crow_indices().diff()
        samples = torch.repeat_interleave(torch.arange(x.shape[0], device=x.device), counts)
        ordered, order = torch.sort(x.col_indices().long(), stable=True)
        features, sizes = torch.unique_consecutive(ordered, return_counts=True)
        starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        return cls(features, starts, samples[order], x.values()[order].float())


@dataclass(frozen=True)
class Assignment:
    """Rows of a batch sorted by expert: A = B·k places, expert e has those from offsets[e] to offsets[e + 1].

    Attributes:
        offsets: (E + 1,) int64.
        samples: (A,) int64, whose row it is; rising within an expert.
        gates: (A,) float32, w_e.
        places: (B, k) int64, where the rows of a sample are.
    """

    offsets: Tensor
    samples: Tensor
    gates: Tensor
    places: Tensor


@dataclass(frozen=True)
class AdamStep:
    """The factors of one step t of AdamW (1-based), in float64.

    θ ← keep·θ − step_size·m / (√v·root + eps),   m ← m + (1 − β₁)(g − m),   v ← β₂ v + (1 − β₂) g²
    with keep = 1 − lr·weight_decay, step_size = lr/(1 − β₁ᵗ), root = 1/√(1 − β₂ᵗ): `torch.optim.AdamW`'s order.
    """

    beta1: float
    beta2: float
    eps: float
    keep: float
    step_size: float
    root: float

    @classmethod
    def at(
        cls,
        step: int,
        *,
        lr: float,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> AdamStep:
        """Return the factors of step t = ``step`` + 1."""
        return cls(
            beta1, beta2, eps, 1 - lr * weight_decay, lr / (1 - beta1 ** (step + 1)), (1 - beta2 ** (step + 1)) ** -0.5
        )


@dataclass(frozen=True)
class Swept:
    """What a sweep gives: the loss (float64 scalar), dh (A, m), dw (A,), and dh⁰ (B, m_0) or None; all of L."""

    loss: Tensor
    dh: Tensor
    dgates: Tensor
    shared_dh: Tensor | None
