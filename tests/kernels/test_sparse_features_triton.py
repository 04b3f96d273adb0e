"""Bits of sparse features: the Triton kernels against the CPU twin, threads and batches, and what the compiler makes.

Triton decides between compiler and interpreter on import, so this file is also a program.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from moesaic.kernels import FeatureTable, sample_features, sparse_features_triton
from moesaic.kernels._extras import numba_twin
from moesaic.kernels.ahead_of_time import compile_ahead, disassemble
from moesaic.kernels.features import ANTICORRELATED, CLUSTERED, CORRELATED, EXACTLY_K, INDEPENDENT
from moesaic.kernels.sparse_features import Cells

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:.*dense sampling:UserWarning"),
]

Array = NDArray[Any]


def table(kind: int, p: Tensor | float, size: int = 1, n: int = 600) -> FeatureTable:
    p = torch.full((n,), p) if isinstance(p, float) else p
    return FeatureTable(torch.tensor([kind]), p[None].float(), torch.tensor([size]))


def power_law(n: int, p_first: float, exponent: float = 1.0) -> Tensor:
    return p_first * torch.arange(1, n + 1, dtype=torch.float64) ** -exponent


def shuffled(p: Tensor) -> Tensor:
    return p[torch.randperm(len(p), generator=torch.Generator().manual_seed(3))]


def sample(t: FeatureTable, batch: int, seed: int = 5, step: int = 0, stream: int = 0, device: str = "cpu") -> Tensor:
    seeds = torch.tensor([seed], device=device)
    return sample_features(t, batch, seeds=seeds, step=step, stream=stream, layout=torch.sparse_csr)


def same(a: Tensor, b: Tensor) -> bool:
    parts: list[Callable[[Tensor], Tensor]] = [Tensor.crow_indices, Tensor.col_indices, Tensor.values]
    return all(part(a).dtype == part(b).dtype and torch.equal(part(a).cpu(), part(b).cpu()) for part in parts)


TABLES = {
    "uniform": table(INDEPENDENT, 0.03, n=5000),
    "sparse": table(INDEPENDENT, 1e-3),
    "certain": table(INDEPENDENT, 1.0, n=7),
    "power law": table(INDEPENDENT, power_law(6000, 1.0)),
    "shuffled": table(INDEPENDENT, shuffled(power_law(6000, 0.9, 1.4))),
    "correlated": table(CORRELATED, 0.05, 5),
    "correlated alone": table(CORRELATED, 0.05, 1),
    "correlated power law": table(CORRELATED, power_law(600, 0.9), 6),
    "anticorrelated": table(ANTICORRELATED, 0.1, 10),
    "anticorrelated power law": table(ANTICORRELATED, power_law(600, 0.1), 10),
    "clustered": table(CLUSTERED, 0.3, 100),
    "clustered power law": table(CLUSTERED, power_law(600, 1.0).flip(0), 100),
    "exactly 1": table(EXACTLY_K, 0.1, 1),
    "exactly 13": table(EXACTLY_K, 0.1, 13),
    "exactly n": table(EXACTLY_K, 0.1, 16, n=16),
    "exactly 1025": table(EXACTLY_K, 0.1, 1025, n=2000),
}
COUNTERS = [(7, 0, 0), (2**63 - 1, 2**32 - 1, 2**32 - 2)]


@triton.jit  # type: ignore[untyped-decorator]
def _gaps_kernel(Words: Tensor, Out: Tensor, count: Tensor, N: tl.constexpr) -> None:
    i = tl.arange(0, N)
    word0, word1 = tl.load(Words + i).to(tl.uint32), tl.load(Words + N + i).to(tl.uint32)
    tl.store(Out + i, sparse_features_triton._gap(word0, word1))
    tl.store(Out + N + i, sparse_features_triton._scaled(word0, word1, count.to(tl.int64)))


COUNT = 2**31 - 1


def words() -> Tensor:
    drawn = torch.randint(0, 2**32, (2, 2**16), generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([0, 1, 2**12 - 1, 2**12, 2**31 - 1, 2**31, 2**32 - 2**12, 2**32 - 1])
    drawn[:, :64] = torch.cartesian_prod(ends, ends).T
    drawn[0, 64:512] >>= torch.arange(448) % 32  # small u
    drawn[0, 512:1024] |= 2**32 - 2 ** (torch.arange(512) % 32)  # u near 1
    return drawn


def twin_gaps(drawn: Tensor) -> Array:
    from numba import njit

    twin = numba_twin("sparse_features_cpu")
    gap, scaled = twin.gap, twin.scaled

    @njit(error_model="numpy")
    def fill(first: Array, second: Array, out: Array) -> None:
        for i in range(out.shape[1]):
            out[0, i] = gap(first[i], second[i])
            out[1, i] = scaled(first[i], second[i], COUNT)

    out = np.empty(drawn.shape, np.int64)
    first, second = drawn.numpy().view(np.uint64)
    fill(first, second, out)
    return out


def gaps(device: str = "cpu") -> list[str]:
    """Low bits of gaps hardly ever show in the features, so they are compared themselves."""
    drawn, ours = words(), torch.empty(2, 2**16, dtype=torch.int64, device=device)
    _gaps_kernel[(1,)](drawn.to(device), ours, COUNT, N=2**16, enable_fp_fusion=False)
    return [] if np.array_equal(ours.cpu().numpy(), twin_gaps(drawn)) else ["gaps"]


def differences(device: str = "cpu") -> list[str]:
    wrong = []
    for number, (name, t) in enumerate(TABLES.items()):
        seed, step, stream = COUNTERS[number % 2]
        for batch in (0, 3):
            with pytest.MonkeyPatch.context() as patch:
                ours = sample(t, batch, seed, step, stream)
                patch.setenv("MOESAIC_BACKEND", "triton")
                if not same(ours, sample(t, batch, seed, step, stream, device)):
                    wrong.append(f"{name}, batch {batch}")
    return wrong


def long_indices() -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOESAIC_BACKEND", "triton")
        t = TABLES["correlated"]
        short = sample(t, 3)
        patch.setattr(Cells, "index_dtype", lambda *_: torch.int64)
        long = sample(t, 3)
    wrong = [] if long.col_indices().dtype == long.crow_indices().dtype == torch.int64 else ["dtype"]
    return wrong if torch.equal(long.to_dense(), short.to_dense()) else [*wrong, "values"]


def a_wrong_rounding_is_seen() -> list[str]:
    """One unit more in one gap of 65,536."""
    true = sparse_features_triton._gap
    sparse_features_triton._gap = lambda first, second: (
        true(first, second) + (second == int(words()[1, 2000])).to(tl.int64)
    )
    return [] if gaps() else ["not seen"]


PROGRAMS: dict[str, Callable[[], list[str]]] = {
    part.__name__: part for part in (gaps, differences, long_indices, a_wrong_rounding_is_seen)
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_interpreted(name: str, interpret: Callable[[str], None]) -> None:
    interpret(name)


@pytest.mark.gpu
def test_cuda_equals_the_cpu() -> None:
    assert gaps("cuda") == []
    assert differences("cuda") == []


def test_gaps_are_the_logarithm_and_indices_in_proportion() -> None:
    drawn = words()
    k = (drawn[0] << 20 | drawn[1] >> 12) * 2 + 1
    # Near 1 from the distance to it, which log(u) would have lost.
    exact = np.array([53 * math.log(2) - math.log(i) if i < 2**52 else -math.log1p(i / 2**53 - 1) for i in k.tolist()])
    # ⌊ ⌋ takes up to a unit of 2⁻⁴⁴; the reference's own rounding is below 2⁻⁴⁷.
    gap, index = twin_gaps(drawn)
    error = exact * 2.0**44 - gap
    assert error.min() > -0.2
    assert error.max() < 1.2
    assert int(gap.max()) < 37 * 2**44
    assert index.tolist() == [((high << 32 | low) * COUNT) >> 64 for high, low in drawn.T.tolist()]


@pytest.mark.parametrize("name", ["power law", "shuffled", "correlated power law"])
def test_every_place_of_the_line_is_found_in_its_cell(name: str) -> None:
    cells = TABLES[name].cells
    bounds = cells.bounds.numpy()
    near = np.unique(np.concatenate([bounds - 1, bounds, bounds + 1]))
    ends = near[(near >= 0) & (near < bounds[-1])]
    found, starts = np.empty_like(ends), np.empty_like(ends)
    numba_twin("sparse_features_cpu")._find(
        ends, len(ends), 0, bounds, cells.guide.numpy(), cells.shift, cells.halvings, found, starts
    )
    assert np.array_equal(found, np.searchsorted(bounds, ends, side="right") - 1)
    assert np.array_equal(starts, bounds[found])


@pytest.mark.parametrize("name", TABLES)
def test_rows_depend_on_neither_threads_nor_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    twin, t = numba_twin("sparse_features_cpu"), TABLES[name]
    drawn = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(twin, "get_num_threads", lambda threads=threads: threads)
        drawn.append(sample(t, 67))
    assert same(drawn[0], drawn[1])
    assert same(drawn[0], drawn[2])
    assert torch.equal(sample(t, 9).to_dense(), drawn[0].to_dense()[:9])


def test_scratch_memory_grows() -> None:
    wrong = []
    for name, t in TABLES.items():
        stingy = FeatureTable(t.kind, t.probability, t.size)
        stingy.__dict__["cells"] = dataclasses.replace(t.cells, expected=0.0)
        if not same(sample(stingy, 20), sample(t, 20)):
            wrong.append(name)
    assert wrong == []


def test_nothing_at_all() -> None:
    for t in (table(INDEPENDENT, 1e-30), table(INDEPENDENT, power_law(600, 1e-20)), table(CORRELATED, 1e-30, 6)):
        assert sample(t, 4).to_dense().count_nonzero() == 0
    for t in TABLES.values():
        x = sample(t, 0)
        assert x.shape == (0, t.probability.shape[1])
        assert x.crow_indices().tolist() == [0]


def test_column_ids_rise() -> None:
    for t in TABLES.values():
        x = sample(t, 30)
        torch.sparse_csr_tensor(x.crow_indices(), x.col_indices(), x.values(), x.shape, check_invariants=True)
        assert x.values().dtype == torch.float32


COUNTERS_OF = {"Seeds": "*i64", "step": "i64", "stream": "i64"}
EVENTS = {
    "Counts": "*i64", "Starts": "*i64", "Cols": "*i32", "Rows": "*i64", "Values": "*fp32", **COUNTERS_OF,
    "Bounds": "*i64", "Guide": "*i32", "n_cells": "i32", "size": "i32", "width": "i64", "shift": "i32",
    "halvings": "i32",
}  # fmt: skip
ENTRIES = {"Cols": "*i32", "Values": "*fp32", **COUNTERS_OF}


def events(kind: int, uniform: bool, fill: bool) -> tuple[Any, dict[str, str], dict[str, Any], int]:
    values = {"KIND": kind, "UNIFORM": uniform, "FILL": fill, "CHUNK": sparse_features_triton.CHUNK}
    return sparse_features_triton._events_kernel, EVENTS, values, 1


MEMBERS = (
    sparse_features_triton._members_kernel,
    {"Groups": "*i64", "Rows": "*i64", **ENTRIES, "size": "i32", "n_entries": "i64"},
    {"BLOCK": 256},
    4,
)
SUBSET = sparse_features_triton._subset_kernel, ENTRIES | {"n": "i32", "k": "i32"}, {"BLOCK": 1024}, 4
COMPILED = [
    *((arch, events(ANTICORRELATED, uniform, True)) for arch in (80, 90, 100) for uniform in (False, True)),
    *((90, what) for what in (events(CLUSTERED, False, False), events(CORRELATED, False, True), MEMBERS, SUBSET)),
]


@pytest.mark.parametrize(("arch", "what"), COMPILED)
def test_compiles_without_spills(arch: int, what: tuple[Any, dict[str, str], dict[str, Any], int]) -> None:
    kernel, signature, values, warps = what
    compiled = compile_ahead(
        kernel, signature | dict.fromkeys(values, "constexpr"), values, warps, arch, fp_fusion=False
    )
    usage, code = disassemble(compiled)
    assert usage["STACK"] == 0
    assert usage["REG"] <= 80
    assert not [text for _, text in code if "LDL" in text or "STL" in text]
    # Roundings are the CPU twin's: no fused operations, exact quotients, constants in float64.
    ptx = compiled.asm["ptx"]
    assert "fma" not in ptx
    if kernel is sparse_features_triton._events_kernel:
        assert set(re.findall(r"div\.\w+\.f64|div\.\w+\.f32", ptx)) == {"div.rn.f64"}
        for constant in (-math.log(2), 1.479819860511658591e-01, 0.9999999999999999, 2.0**44):
            bits = np.float64(constant).view(np.uint64)
            assert {f"0d{bits:016X}", f"0d{bits ^ np.uint64(2**63):016X}"} & set(re.findall(r"0d[0-9A-F]{16}", ptx))
