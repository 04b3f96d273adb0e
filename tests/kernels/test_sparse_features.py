"""Sparse features: statistics that a biased sampler fails, the structures, and what is refused."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesaic.kernels import FeatureTable, philox_uniform, sample_features, sparse_features
from moesaic.kernels.features import ANTICORRELATED, CLUSTERED, CORRELATED, EXACTLY_K, INDEPENDENT

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:.*dense sampling:UserWarning"),
]

Array = NDArray[Any]
Draw = Callable[[Array, int, int, int], tuple[Array, Array, Array]]
"""p, batch, seed, step → row, column and value of the entries in order."""

LIMIT = 4.0  # standard scores: passed by chance once in 16,000


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


TABLE = table(INDEPENDENT, 0.03)


def chi_score(chi_square: float, freedom: int) -> float:
    """Standard score of a chi-square, by Wilson and Hilferty's cube root."""
    spread = 2 / (9 * freedom)
    return float(((chi_square / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread))


def histogram_score(observed: Array, expected: Array | float) -> float:
    return chi_score(float(((observed - expected) ** 2 / expected).sum()), len(observed) - 1)


def correlation_score(a: Array, b: Array) -> float:
    """Standard score of the correlation of a and b."""
    return float(np.corrcoef(a, b)[0, 1] * math.sqrt(len(a)))


def ours(p: Array, batch: int, seed: int, step: int) -> tuple[Array, Array, Array]:
    x = sample(table(INDEPENDENT, torch.from_numpy(p)), batch, seed, step)
    return np.repeat(np.arange(batch), x.crow_indices().diff().numpy()), x.col_indices().numpy(), x.values().numpy()


def model(
    p: Array, batch: int, seed: int, step: int, *, rate: float = 1.0, repeats: bool = False, first: int = 0,
    ignores: str = "", value_of_gap: bool = False, pairs: bool = False, shift: int = 0,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """The sampler in NumPy; the options are mistakes."""
    random = np.random.default_rng([0 if ignores == "seeds" else seed, 0 if ignores == "steps" else step])
    bounds = np.concatenate([[0], np.cumsum(-np.log1p(-p))])
    gaps = random.exponential(size=(batch, int(bounds[-1] + 12 * math.sqrt(bounds[-1]) + 30)))
    if pairs:
        gaps[:, 1::2] = gaps[:, ::2]
    if ignores == "rows":
        gaps = gaps[np.arange(batch) // 2]
    values = 1 - np.exp(-gaps) if value_of_gap else random.random(gaps.shape)
    ends = np.cumsum(gaps / rate, 1)
    cells = np.searchsorted(bounds, ends, side="right") - 1
    kept = np.concatenate([np.ones((batch, 1), bool), cells[:, 1:] != cells[:, :-1]], 1) | repeats
    kept &= ends < bounds[-1]
    kept[:, :first] = False
    return np.nonzero(kept)[0], (cells[kept] + shift) % len(p), values[kept]


N, BATCH = 300, 12_000
CASES = {
    "uniform": np.full(N, np.float32(0.05)).astype(np.float64),
    "power law": power_law(N, 0.9, 0.6).float().double().numpy(),
    "shuffled": shuffled(power_law(N, 0.6, 0.5)).float().double().numpy(),
}


def scores(draw: Draw, p: Array) -> dict[str, float]:
    """Standard scores of what a sampler of independent features must hold to."""
    variance = p * (1 - p)

    def standardised(seed: int, step: int) -> tuple[tuple[Array, Array, Array], Array]:
        entries = draw(p, BATCH, seed, step)
        present = np.zeros((BATCH, N))
        np.add.at(present, entries[:2], 1)
        return entries, (present - p) / np.sqrt(variance)

    (row, col, value), x = standardised(1, 0)
    pairs = {"rows": x[1:], "neighbours": x[:, 1:], "seeds": standardised(2, 0)[1], "steps": standardised(1, 1)[1]}
    found = {
        name: float((x[: len(y), : y.shape[1]] * y).sum() / math.sqrt(y.size)) for name, y in pairs.items()
    }  # fmt: skip
    found["rates"] = chi_score(float((x.sum(0) ** 2).sum() / BATCH), N)
    surplus = (x * np.sqrt(variance)).sum(1)
    found["total"] = float(surplus.sum() / math.sqrt(BATCH * variance.sum()))
    # The fourth cumulant of a sum of Bernoulli variables is the sum of theirs.
    fourth = (variance * (1 - 6 * variance)).sum()
    spread = math.sqrt((2 * variance.sum() ** 2 + fourth) / BATCH)
    found["spread"] = float(((surplus**2).mean() - variance.sum()) / spread)
    found["values"] = histogram_score(np.histogram(value, 64, (0, 1))[0], len(value) / 64)
    found["successive values"] = correlation_score(value[1:], value[:-1])
    begins = row != np.roll(row, 1)
    gap = np.where(begins, col + 1, col - np.roll(col, 1))
    found["value and gap"] = correlation_score(value, gap)
    if p.min() == p.max():
        longest = 60
        after = np.where(np.roll(begins, -1), longest, np.roll(gap, -1)).clip(max=longest)
        seen = np.concatenate([gap[begins].clip(max=longest), after[col < N - longest]])
        law = p[0] * (1 - p[0]) ** np.arange(longest - 1)
        expected = np.append(law, 1 - law.sum()) * len(seen)
        found["gaps"] = histogram_score(np.bincount(seen, minlength=longest + 1)[1:], expected)
        both = np.nonzero((col < N - 2 * longest) & (after < longest))[0]
        found["successive gaps"] = correlation_score(after[both], after[both + 1])
    return found


def biased(draw: Draw, p: Array) -> dict[str, float]:
    return {name: score for name, score in scores(draw, p).items() if abs(score) > LIMIT}


@pytest.mark.parametrize("name", CASES)
def test_independent_features(name: str) -> None:
    assert biased(ours, CASES[name]) == {}


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "repeated entries": ({"repeats": True}, "total spread rates"),
    "rates 2 % high": ({"rate": 1 / 1.02}, "total"),
    "rates 2 % low": ({"rate": 1.02}, "total"),
    "first event lost": ({"first": 1}, "total gaps"),
    "one feature off": ({"shift": 1}, "rates"),
    "rows in pairs": ({"ignores": "rows"}, "rows"),
    "steps alike": ({"ignores": "steps"}, "steps"),
    "seeds alike": ({"ignores": "seeds"}, "seeds"),
    "values of gaps": ({"value_of_gap": True}, "value and gap"),
    "gaps in pairs": ({"pairs": True}, "successive gaps"),
}


def test_a_true_sampler_in_numpy_passes() -> None:
    assert {name: found for name, p in CASES.items() if (found := biased(model, p))} == {}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistaken_sampler_is_caught(mistake: str) -> None:
    options, seen_by = MISTAKES[mistake]
    p = CASES["power law" if mistake in ("repeated entries", "one feature off") else "uniform"]

    def mistaken(p: Array, batch: int, seed: int, step: int) -> tuple[Array, Array, Array]:
        return model(p, batch, seed, step, **options)

    assert biased(mistaken, p).keys() & set(re.findall(r"value and gap|successive gaps|\w+", seen_by))


def present(t: FeatureTable, batch: int = BATCH) -> tuple[Array, Array]:
    """Return where x (B, n) has entries, and x."""
    x = sample(t, batch, step=9)
    there = np.zeros(x.shape)
    np.add.at(there, (np.repeat(np.arange(batch), x.crow_indices().diff().numpy()), x.col_indices().numpy()), 1)
    return there, x.to_dense().numpy()


def rate_score(hits: Array, rate: float) -> float:
    return float((hits.sum() - hits.size * rate) / math.sqrt(hits.size * rate * (1 - rate)))


def is_uniform(values: Array) -> bool:
    return abs(histogram_score(np.histogram(values, 64, (0, 1))[0], len(values) / 64)) < LIMIT


def test_correlated_groups() -> None:
    p = power_law(120, 0.3, 0.3).repeat_interleave(5)
    there, x = present(table(CORRELATED, p, 5))
    groups = there.reshape(BATCH, 120, 5)
    assert np.array_equal(groups.all(2), groups.any(2))
    z = np.array([rate_score(groups[:, g, 0], float(p[5 * g].float())) for g in range(120)])
    assert abs(chi_score(float((z**2).sum()), 120)) < LIMIT
    assert is_uniform(x[there > 0])
    # Values are those of their features, not of groups: the dense layout's words.
    u = philox_uniform(torch.tensor([5]), 40, 600, step=9)[0].numpy()
    assert np.array_equal(x[:40], there[:40] * u)


def test_anticorrelated_groups() -> None:
    there, x = present(table(ANTICORRELATED, 0.05, 12))
    groups = there.reshape(BATCH, 50, 12)
    assert groups.sum(2).max() == 1
    assert abs(rate_score(groups.sum(2), 0.05 * 12)) < LIMIT
    assert abs(histogram_score(groups.sum((0, 1)), groups.sum() / 12)) < LIMIT
    member, value = groups.argmax(2)[groups.any(2)], x[there > 0]
    assert abs(correlation_score(member, value)) < LIMIT
    assert is_uniform(value)
    full = present(table(ANTICORRELATED, 0.1, 10), 50)[0].reshape(50, 60, 10)
    assert np.array_equal(full.sum(2), np.ones((50, 60)))


def test_clusters() -> None:
    p = power_law(600, 0.9, 0.3)
    there, x = present(table(CLUSTERED, p, 60))
    clusters = there.reshape(BATCH, 10, 60)
    assert clusters.any(2).sum(1).max() == 1
    drawn = clusters.any(2).argmax(1)[clusters.any((1, 2))]
    assert abs(histogram_score(np.bincount(drawn, minlength=10), len(drawn) / 10)) < LIMIT
    z = np.array([rate_score(there[:, i], float(p[i].float()) / 10) for i in range(600)])
    assert abs(chi_score(float((z**2).sum()), 600)) < LIMIT
    assert is_uniform(x[there > 0])


def test_subsets() -> None:
    there, x = present(table(EXACTLY_K, 0.5, 3, n=6))
    assert np.array_equal(there.sum(1), np.full(BATCH, 3))
    counts = np.unique(there @ 2 ** np.arange(6), return_counts=True)[1]
    assert len(counts) == math.comb(6, 3)
    assert abs(histogram_score(counts, BATCH / 20)) < LIMIT
    assert is_uniform(x[there > 0])
    there, _ = present(table(EXACTLY_K, 0.1, 37, n=400))
    assert np.array_equal(there.sum(1), np.full(BATCH, 37))
    z = (there.sum(0) - BATCH * 37 / 400) / math.sqrt(BATCH * 37 / 400 * (1 - 37 / 400))
    assert abs(chi_score(float((z**2).sum()), 400)) < LIMIT


@pytest.mark.parametrize("mistake", ["short range", "twice the first"])
def test_a_mistaken_subset_is_caught(mistake: str) -> None:
    random, counts = np.random.default_rng(0), np.zeros(64)
    for _ in range(BATCH):
        chosen: set[int] = set()
        for j in range(3, 6):
            pick = int(random.integers(0, j if mistake == "short range" else j + 1))
            chosen.add((j if mistake == "short range" else j - 1) if pick in chosen else pick)
        counts[sum(2**i for i in chosen)] += 1
    sizes = np.array([i.bit_count() for i in range(64)])
    assert histogram_score(counts[sizes == 3], BATCH / 20) > 10


def test_cell_widths_are_the_logarithm() -> None:
    p = np.concatenate(
        [np.geomspace(1e-30, 1, 500, dtype=np.float32), 1 - np.geomspace(2.0**-24, 0.5, 99, dtype=np.float32)]
    )
    p = p[(p > 0) & (p < 1)].astype(np.float64)
    ours = sparse_features._cell_widths(p)
    np.testing.assert_allclose(ours, [-math.log1p(-x) for x in p], rtol=1e-15, atol=0)
    assert sparse_features._cell_widths(np.ones(1))[0] == 40


def test_indices_are_as_long_as_needed() -> None:
    cells = TABLE.cells
    assert sample(TABLE, 3).crow_indices().dtype == torch.int32
    assert [cells.index_dtype(count) for count in (0, 2**31 - 1, 2**31)] == [torch.int32, torch.int32, torch.int64]
    assert dataclasses.replace(cells, n=2**31).index_dtype(5) == torch.int64


def test_dense_data_warn_once() -> None:
    for t in (table(INDEPENDENT, 0.11), table(CORRELATED, 0.11, 3), table(EXACTLY_K, 0.5, 70)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sample(t, 1)
            sample(t, 1)
        assert ["dense sampling" in str(record.message) for record in caught] == [True]
        assert [Path(record.filename).name for record in caught] == [Path(__file__).name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for t in (table(INDEPENDENT, 0.099), table(CLUSTERED, 0.4, 60), table(EXACTLY_K, 0.5, 59)):
            sample(t, 1)


@pytest.mark.parametrize(
    ("named", "options"),
    [
        ("batch_size", {"batch_size": -1}),
        ("batch_size", {"batch_size": 2**31}),
        ("seeds", {"seeds": torch.tensor([1, 2])}),
        ("seeds", {"seeds": torch.tensor([1.0])}),
        ("step", {"step": -1}),
        ("step", {"step": 2**32}),
        ("stream", {"stream": 1}),
        ("stream", {"stream": 2**32}),
        ("layout", {"layout": torch.sparse_coo}),
        ("layout", {"table": FeatureTable(torch.zeros(2).long(), torch.ones(2, 3), torch.ones(2).long()),
                    "seeds": torch.tensor([1, 2])}),
        ("probability: its sum is 13000", {"table": table(INDEPENDENT, 1.0, n=13_000)}),
        ("probability: takes at most 1/size", {"table": table(ANTICORRELATED, 0.2, 6)}),
    ],
)  # fmt: skip
def test_refuses(named: str, options: dict[str, Any]) -> None:
    good: dict[str, Any] = {
        "table": TABLE,
        "batch_size": 4,
        "seeds": torch.tensor([1]),
        "layout": torch.sparse_csr,
    }
    with pytest.raises(ValueError, match=f"^{named}"):
        sample_features(**(good | options))
