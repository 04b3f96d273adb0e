"""Sampling of sparse feature vectors from named distributions, the same samples on every device.

A present feature's value is U(0, 1); in dense samples one random word serves both decisions where presence is a
feature's own (present iff u < p, value u/p). Features use ``stream``; structure (clusters, groups, subsets) uses
``stream + 1``. `sparse_features` draws the sparse ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moesaic.kernels._extras import numba_twin
from moesaic.kernels.philox import philox_uniform

if TYPE_CHECKING:
    from moesaic.kernels.sparse_features import Cells

INDEPENDENT, CORRELATED, ANTICORRELATED, CLUSTERED, EXACTLY_K = range(5)


@dataclass(frozen=True)
class FeatureTable:
    """Distributions of S stacked models over n features.

    Attributes:
        kind: (S,) int64, one of ``INDEPENDENT``, ``CORRELATED``, ``ANTICORRELATED``, ``CLUSTERED``, ``EXACTLY_K``.
        probability: (S, n) float32, p of each feature (for ``CLUSTERED``, inside the active cluster).
        size: (S,) int64, features per group or cluster, or the number of active features; unused for ``INDEPENDENT``.
    """

    kind: Tensor
    probability: Tensor
    size: Tensor

    def __post_init__(self) -> None:
        s, n = self.probability.shape
        if self.kind.shape != (s,) or self.size.shape != (s,):
            raise ValueError(
                f"kind, size: take shape ({s},), got {tuple(self.kind.shape)} and {tuple(self.size.shape)}"
            )
        if s and not bool(((self.probability > 0) & (self.probability <= 1)).all()):
            raise ValueError("probability: takes numbers in (0, 1]")
        structured = self.kind != INDEPENDENT
        grouped = structured & (self.kind != EXACTLY_K)
        if bool((structured & ((self.size < 1) | (self.size > n))).any()) or bool(
            (grouped & (n % self.size.clamp(min=1) != 0)).any()
        ):
            raise ValueError(f"size={self.size.tolist()}: takes divisors of n={n} (for exactly-k data, 1 to n)")

    def numpy(self) -> tuple[Any, Any, Any]:
        """Return kind, probability and size as NumPy arrays."""
        return self.kind.cpu().numpy(), self.probability.cpu().numpy(), self.size.cpu().numpy()

    @cached_property
    def cells(self) -> Cells:
        """What sparse sampling knows of a table of one model."""
        from moesaic.kernels.sparse_features import Cells  # which needs this class

        return Cells.of(self)


def sample_features(
    table: FeatureTable,
    batch_size: int,
    *,
    seeds: Tensor,
    step: int = 0,
    stream: int = 0,
    layout: torch.layout = torch.strided,
) -> Tensor:
    """Draw features x ≥ 0 as ``table`` says: model s's batch is a pure function of (seeds[s], step, stream).

    Dense, x is (S, B, n) float32. With ``layout=torch.sparse_csr`` it is the (B, n) CSR tensor of a single model
    (S = 1), drawn in time proportional to its entries and with the same bits on every device, but with other numbers
    than the dense one: feature i is present iff one of the points

        T_j = Σ_{l ≤ j} −log u_l    lies in    [Λ_i, Λ_i + λ_i),   λ_i = −log(1 − p_i),   Λ_i = Σ_{j < i} λ_j

    of a Poisson process. λ is rounded to a multiple of 2⁻⁴⁴ and p departs from the table's by as much at most (p = 1
    is present but for once in e⁴⁰ samples); given that, samples are exact up to the uniform numbers' 52 bits. Values
    are float32, column ids rise within a row and are int32 while n and the number of entries are below 2³¹, else
    int64. A row does not depend on B. Exactly-k data are Floyd's subsets; on a GPU, those of more than 1,024 features
    are drawn by the CPU and copied.

    Args:
        table: the distributions.
        batch_size: B, samples per model.
        seeds: (S,) int64 keys; its device is the result's.
        step: training step, below 2³².
        stream: an even number below 2³² − 1: 0 for training samples, 2 for held-out samples.
        layout: ``torch.strided`` or ``torch.sparse_csr``.

    Raises:
        ValueError: for shapes that do not match; for a layout, or in the sparse one a batch size, step, stream or
            sum of probabilities, out of range; for sparse features of other than one model.

    Warns:
        UserWarning: once per table, sparse features of which more than a tenth is present: dense ones are cheaper.

    Source: exponential gaps, Devroye, "Non-Uniform Random Variate Generation" (1986), chapters VI.1 and X; subsets,
    Floyd in Bentley, "Programming Pearls: a sample of brilliance" (CACM 30, 1987).
    """
    if seeds.shape != table.kind.shape:
        raise ValueError(
            f"seeds: takes shape {tuple(table.kind.shape)}, one per model of the table, got {tuple(seeds.shape)}"
        )
    if layout == torch.sparse_csr:
        from moesaic.kernels.sparse_features import sample_csr

        return sample_csr(table, batch_size, seeds=seeds, step=step, stream=stream)
    if layout != torch.strided:
        raise ValueError(f"layout={layout}: takes torch.strided or torch.sparse_csr")
    if seeds.device.type == "cpu":
        out = torch.empty(seeds.shape[0], batch_size, table.probability.shape[1], dtype=torch.float32)
        kind, probability, size = table.numpy()
        numba_twin("toy_cpu").sample_dense(
            kind, seeds.numpy().view("uint64"), step, stream, probability, size, out.numpy()
        )
        return out
    return sample_features_reference(table, batch_size, seeds=seeds, step=step, stream=stream)


def sample_features_reference(
    table: FeatureTable, batch_size: int, *, seeds: Tensor, step: int = 0, stream: int = 0
) -> Tensor:
    """Compute ``sample_features`` in plain PyTorch on any device."""
    n, probability = table.probability.shape[1], table.probability.to(seeds.device)
    return torch.stack([
        _sample_one(int(kind), p, int(size), batch_size, n, seeds[s : s + 1], step, stream)
        for s, (kind, p, size) in enumerate(zip(table.kind, probability, table.size, strict=True))
    ])  # fmt: skip


def _sample_one(kind: int, p: Tensor, size: int, batch: int, n: int, seed: Tensor, step: int, stream: int) -> Tensor:
    u = philox_uniform(seed, batch, n, step=step, stream=stream)[0]
    zero = torch.zeros((), device=u.device)
    if kind == INDEPENDENT:
        return torch.where(u < p, u / p, zero)
    words = {CLUSTERED: 1, EXACTLY_K: size}.get(kind, n // size)
    v = philox_uniform(seed, batch, words, step=step, stream=stream + 1)[0]
    if kind == CLUSTERED:
        cluster = (v * (n // size)).long().clamp(max=n // size - 1)
        inside = torch.arange(n, device=u.device) // size == cluster
        return torch.where(inside & (u < p), u / p, zero)
    if kind == EXACTLY_K:
        order = torch.arange(n, device=u.device).repeat(batch, 1)
        for j in range(size):
            other = j + (v[:, j : j + 1] * (n - j)).long().clamp(max=n - j - 1)
            chosen = order.gather(1, other)
            order.scatter_(1, other, order[:, j : j + 1].clone())
            order[:, j : j + 1] = chosen
        x = torch.zeros_like(u)
        return x.scatter(1, order[:, :size], u.gather(1, order[:, :size]))
    first = p[::size]
    if kind == CORRELATED:
        return torch.where((v < first).repeat_interleave(size, 1), u, zero)
    total = first * size
    member = (v / total * size).long().clamp(max=size - 1).repeat_interleave(size, 1)
    present = (v < total).repeat_interleave(size, 1) & (member == torch.arange(n, device=u.device) % size)
    return torch.where(present, u, zero)
