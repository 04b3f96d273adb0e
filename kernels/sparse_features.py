"""Sparse features of one model straight into CSR, in time proportional to their number.

Feature i is present iff a Poisson process of rate 1 has an event in its cell [Λ_i, Λ_i + λ_i):

    λ_i = −log(1 − p_i),   Λ_i = Σ_{j < i} λ_j,   P(present) = 1 − e^(−λ_i) = p_i,   events at T_j = Σ_{l ≤ j} −log u_l

All in integers, units of 2⁻⁴⁴: with gaps ⌊−log(u)·2⁴⁴⌋, whether a unit has an event is exactly a Bernoulli trial of its
own, so that rounding λ is the only departure from p, 2⁻⁴⁵ at most; and the sums are the same in any order.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesaic.kernels._backend import uses_triton
from moesaic.kernels._extras import numba_twin
from moesaic.kernels._threads import in_parts
from moesaic.kernels.features import ANTICORRELATED, CLUSTERED, CORRELATED, EXACTLY_K, FeatureTable

UNIT = 2.0**44
_CERTAIN = 40.0  # λ of p = 1: absent once in e⁴⁰ = 2·10¹⁷ samples
# The events drawn together, 128 at most and of less than 37 each, must not pass 2⁶³ units.
_MOST = 2.0**19 - 128 * 44
_DENSE = 0.1
_INT32_END = 2**31
_SPARE = 6  # standard deviations of scratch memory above the expected number of entries


def _cell_widths(p: NDArray[Any]) -> NDArray[Any]:
    """Return −log(1 − p) in float64, from operations that every machine rounds alike; λ = 40 for p = 1."""
    x = 1.0 - p
    mantissa, exponent = np.frexp(np.where(x > 0, x, 1.0))
    low = mantissa < math.sqrt(0.5)
    f = np.where(low, 2 * mantissa, mantissa) - 1.0
    s = f / (2.0 + f)
    z, series = s * s, np.zeros_like(s)
    for power in range(21, 0, -2):  # 2 artanh s, |s| < 0.172
        series = series * z + 1.0 / power
    log = (exponent - low) * math.log(2.0) + 2.0 * s * series
    # 1 − p is rounded where p has bits below 2⁻⁵³.
    return np.where(p < 2.0**-26, p + 0.5 * p * p, np.where(x > 0, -log, _CERTAIN))


@dataclass(frozen=True)
class Cells:
    """A table's cells on the line, whose events are the features, or the groups, of a sample.

    Attributes:
        kind, n, size: of the table.
        n_cells: features or groups.
        width: of each cell in units of 2⁻⁴⁴, if all have the same, and some; else 0.
        bounds: (n_cells + 1,) int64, where cells begin; one number if all have the same width.
        guide: place T >> shift has the cell of the first T there; the next one, the last cell that T can lie in.
        halvings: of the search between these two.
        expected: entries per sample.
        events: per sample.
    """

    kind: int
    n: int
    size: int
    n_cells: int
    width: int
    bounds: Tensor
    guide: Tensor
    shift: int
    halvings: int
    expected: float
    events: float
    _copies: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, table: FeatureTable) -> Cells:
        """Make the cells of a table of one model.

        Raises:
            ValueError: naming probability, where its sum is too large or an anticorrelated group's passes 1.
        """
        kind, size, n = int(table.kind[0]), int(table.size[0]), table.probability.shape[1]
        p = table.probability[0].double().cpu().numpy()
        grouped = kind in (CORRELATED, ANTICORRELATED)
        p = p[::size] if grouped else p
        if kind == ANTICORRELATED:
            p = p * size
            if p.max() > 1 + 1e-6:
                raise ValueError(f"probability: takes at most 1/size = {1 / size:g} in anticorrelated data")
            p = np.minimum(p, 1.0)
        expected = float(p.sum()) * {CORRELATED: size, CLUSTERED: size / n}.get(kind, 1)
        if kind == EXACTLY_K:
            p, expected = p[:0], float(size)
        if expected > _DENSE * n:
            warnings.warn(
                f"{expected / n:.0%} of the features are present: dense sampling (layout=torch.strided) is cheaper "
                f"above {_DENSE:.0%}",
                UserWarning,
                stacklevel=6,
            )
        uniform = len(p) > 0 and bool((p == p[0]).all())
        widths = np.repeat(_cell_widths(p[:1]), len(p)) if uniform else _cell_widths(p)
        if widths.sum() > _MOST:
            raise ValueError(
                f"probability: its sum is {p.sum():.6g}, and the sum of −log(1 − p) is {widths.sum():.6g}, where p = 1 "
                f"counts {_CERTAIN:g}; sparse sampling takes at most {_MOST:.0f}, dense sampling any"
            )
        units = np.rint(widths * UNIT).astype(np.int64)
        events = float(widths.sum()) * (size / n if kind == CLUSTERED else 1.0)
        if uniform and units[0] > 0:
            width, none = int(units[0]), torch.zeros(1, dtype=torch.int64)
            return cls(kind, n, size, len(p), width, none, none, 0, 0, expected, events)
        bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(units)])
        shift, guide, halvings = _guide(bounds)
        places = torch.from_numpy(bounds), torch.from_numpy(guide)
        return cls(kind, n, size, len(p), 0, *places, shift, halvings, expected, events)

    @property
    def per_cell(self) -> int:
        """Entries of an active cell."""
        return self.size if self.kind == CORRELATED else 1

    def index_dtype(self, n_entries: int) -> torch.dtype:
        """Return the type of the indices of so many entries."""
        return torch.int32 if max(n_entries, self.n) < _INT32_END else torch.int64

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return bounds and guide on a device, copied once."""
        if device not in self._copies:
            self._copies[device] = (self.bounds.to(device), self.guide.to(device))
        return self._copies[device]


def _guide(bounds: NDArray[Any]) -> tuple[int, NDArray[Any], int]:
    """Return shift, guide and halvings of a search for the cell of T in [0, bounds[-1])."""
    n_cells, total = len(bounds) - 1, int(bounds[-1])
    shift = max(0, (total // max(1, n_cells)).bit_length() - 1)
    starts = np.arange((total >> shift) + 2, dtype=np.int64) << shift
    last = max(0, n_cells - 1)
    guide = np.clip(np.searchsorted(bounds, starts, side="right") - 1, 0, last)
    halvings = int(np.diff(guide).max()).bit_length()
    return shift, guide.astype(np.int32 if n_cells < _INT32_END else np.int64), halvings


def sample_csr(table: FeatureTable, batch_size: int, *, seeds: Tensor, step: int, stream: int) -> Tensor:
    """Compute ``sample_features`` in the layout torch.sparse_csr."""
    if tuple(table.kind.shape) != (1,):
        raise ValueError(f"layout=torch.sparse_csr: takes a table of one model, got {table.kind.shape[0]}")
    if not 0 <= batch_size < _INT32_END:
        raise ValueError(f"batch_size={batch_size}: takes an integer from 0 to 2**31 - 1")
    if seeds.dtype != torch.int64:
        raise ValueError(f"seeds: takes int64, got {seeds.dtype}")
    if not 0 <= step < 2**32:
        raise ValueError(f"step={step}: takes an integer from 0 to 2**32 - 1")
    if not 0 <= stream < 2**32 or stream % 2:
        raise ValueError(f"stream={stream}: takes an even number from 0 to 2**32 - 2")
    cells = table.cells
    triton = uses_triton(seeds)
    if triton:
        from moesaic.kernels import sparse_features_triton as kernels

        triton = cells.kind != EXACTLY_K or cells.size <= kernels.MOST_SUBSET
    if not triton:
        crow, cols, values = (part.to(seeds.device) for part in _on_cpu(cells, batch_size, seeds, step, stream))
    elif cells.kind == EXACTLY_K:
        crow, cols, values = kernels.sample_subsets(cells, batch_size, seeds, step, stream)
    else:
        crow, cols, values = kernels.sample_events(cells, batch_size, seeds, step, stream)
    hear_that_csr_is_in_beta()
    return torch.sparse_csr_tensor(crow, cols, values, size=(batch_size, cells.n), check_invariants=False)


@cache
def hear_that_csr_is_in_beta() -> None:
    """Make torch say what it says once per process of CSR tensors, to nobody."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], size=(1, 1), check_invariants=False)


def _on_cpu(cells: Cells, batch: int, seeds: Tensor, step: int, stream: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return crow_indices, col_indices and values on the CPU."""
    twin = numba_twin("sparse_features_cpu")
    threads = twin.get_num_threads()
    key = seeds.cpu().numpy().view("uint64")[0]
    n_parts = min(batch, 4 * threads)
    cuts = [batch * part // max(1, n_parts) for part in range(n_parts + 1)]
    if cells.kind == EXACTLY_K:
        k = cells.size
        index = cells.index_dtype(batch * k)
        cols = torch.empty(batch, k, dtype=index)
        values = torch.empty(batch, k, dtype=torch.float32)
        given = cols.numpy(), values.numpy()
        in_parts(
            lambda i: twin.sample_subsets(key, step, stream, cuts[i], cuts[i + 1], cells.n, k, *given), n_parts, threads
        )
        return torch.arange(0, batch * k + 1, k, dtype=index), cols.view(-1), values.view(-1)

    counts = np.zeros(batch + 1, np.int64)
    found: list[tuple[NDArray[Any], NDArray[Any]]] = [(np.empty(0), np.empty(0))] * n_parts
    search = (cells.width, cells.bounds.numpy(), cells.guide.numpy(), cells.shift, cells.halvings, cells.n_cells)
    active = cells.expected / cells.per_cell
    # The last chunk of a row is in vain by half; the events of a long one are drawn in SIMD.
    chunk = min(128, max(8, 4 * math.ceil(cells.events / 16)))

    def sample(i: int) -> None:
        mean = active * (cuts[i + 1] - cuts[i])
        room = int(mean + _SPARE * math.sqrt(mean) + chunk) * cells.per_cell
        scratch = np.empty(room, np.int32 if cells.n < _INT32_END else np.int64), np.empty(room, np.float32)
        found[i] = twin.sample_rows(
            cells.kind, key, step, stream, cuts[i], cuts[i + 1], cells.size, *search, chunk, counts[1:], *scratch
        )

    in_parts(sample, n_parts, threads)
    crow = np.cumsum(counts)
    index = cells.index_dtype(int(crow[-1]))
    cols, values = torch.empty(int(crow[-1]), dtype=index), torch.empty(int(crow[-1]), dtype=torch.float32)

    def join(i: int) -> None:
        begin, end = int(crow[cuts[i]]), int(crow[cuts[i + 1]])
        for to, part in zip((cols.numpy(), values.numpy()), found[i], strict=True):
            to[begin:end] = part[: end - begin]

    in_parts(join, n_parts, threads)
    return torch.from_numpy(crow).to(index), cols, values
