from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moesaic.kernels import FeatureTable, sample_features
from moesaic.kernels.features import (
    ANTICORRELATED,
    CLUSTERED,
    CORRELATED,
    EXACTLY_K,
    INDEPENDENT,
    sample_features_reference,
)

N = 24
SEEDS = torch.tensor([1, 2**40 + 3, 2**62 + 5, 7, 2**63 - 1])
TABLE = FeatureTable(
    torch.tensor([INDEPENDENT, CORRELATED, ANTICORRELATED, CLUSTERED, EXACTLY_K]),
    torch.full((5, N), 0.1),
    torch.tensor([1, 4, 6, 8, 5]),
)


def table(kind: int, p: float, size: int, n: int = N, models: int = 1) -> FeatureTable:
    return FeatureTable(torch.full((models,), kind), torch.full((models, n), p), torch.full((models,), size))


def z_of_rate(hits: Tensor, rate: float) -> float:
    """Standard score of the number of hits under a Bernoulli rate."""
    return float((hits.double().sum() - hits.numel() * rate) / math.sqrt(hits.numel() * rate * (1 - rate)))


def worst_correlation_z(a: Tensor, b: Tensor) -> float:
    """Largest standard score of the correlation between matching columns of a and b."""
    a, b = a.double() - a.double().mean(0), b.double() - b.double().mean(0)
    r = (a * b).mean(0) / (a.square().mean(0) * b.square().mean(0)).sqrt()
    return float(r.abs().max() * math.sqrt(a.shape[0]))


@pytest.mark.parametrize(("step", "stream"), [(0, 0), (77, 2)])
@pytest.mark.parametrize("batch", [0, 1, 333])
def test_numba_equals_reference_bit_for_bit(batch: int, step: int, stream: int) -> None:
    ours = sample_features(TABLE, batch, seeds=SEEDS, step=step, stream=stream)
    assert torch.equal(ours, sample_features_reference(TABLE, batch, seeds=SEEDS, step=step, stream=stream))


def test_a_model_does_not_see_its_neighbours() -> None:
    alone = FeatureTable(TABLE.kind[2:3], TABLE.probability[2:3], TABLE.size[2:3])
    assert torch.equal(
        sample_features(TABLE, 50, seeds=SEEDS, step=3)[2], sample_features(alone, 50, seeds=SEEDS[2:3], step=3)[0]
    )


@pytest.mark.parametrize("p", [0.01, 0.3, 1.0])
def test_independent_rates_and_values(p: float) -> None:
    x = sample_features(table(INDEPENDENT, p, 1), 20_000, seeds=SEEDS[:1])[0]
    assert p == 1.0 or abs(z_of_rate(x > 0, p)) < 5
    values = x[x > 0]
    counts = torch.histc(values, 50, 0.0, 1.0)
    chi2 = float(((counts - len(values) / 50) ** 2 / (len(values) / 50)).sum())
    assert abs(chi2 - 49) < 5 * math.sqrt(2 * 49)
    assert float(values.max()) <= 1.0


def test_power_law_like_probabilities_are_per_feature() -> None:
    p = torch.linspace(0.05, 0.9, N)[None]
    x = sample_features(FeatureTable(torch.tensor([INDEPENDENT]), p, torch.tensor([1])), 20_000, seeds=SEEDS[:1])[0]
    assert max(abs(z_of_rate(x[:, i] > 0, float(p[0, i]))) for i in range(N)) < 5


def test_structures() -> None:
    x = sample_features(TABLE, 20_000, seeds=SEEDS, step=9) > 0
    together = x[1].view(-1, N // 4, 4)
    assert bool((together.all(-1) == together.any(-1)).all())
    assert abs(z_of_rate(together.any(-1), 0.1)) < 5
    apart = x[2].view(-1, N // 6, 6).sum(-1)
    assert int(apart.max()) == 1
    assert abs(z_of_rate(apart > 0, 0.6)) < 5
    assert max(abs(z_of_rate(x[2][:, i], 0.1)) for i in range(N)) < 5
    clusters = x[3].view(-1, N // 8, 8).any(-1)
    assert int(clusters.sum(-1).max()) == 1
    assert abs(z_of_rate(x[3], 0.1 / 3)) < 5
    assert bool((x[4].sum(-1) == 5).all())
    assert max(abs(z_of_rate(x[4][:, i], 5 / N)) for i in range(N)) < 5


def neighbours(draw: object) -> dict[str, tuple[Tensor, Tensor]]:
    def x(seed: int, step: int, stream: int = 0) -> Tensor:
        return draw(table(INDEPENDENT, 1.0, 1), 20_000, seeds=torch.tensor([seed]), step=step, stream=stream)[0]  # type: ignore[operator, no-any-return]

    base = x(5, 10)
    return {
        "seeds": (base, x(6, 10)),
        "steps": (base, x(5, 11)),
        "streams": (base, x(5, 10, 2)),
        "rows": (base[:-1], base[1:]),
        "features": (base[:, :-1], base[:, 1:]),
        "blocks": (base[:, :-4], base[:, 4:]),
    }


def test_streams_are_independent() -> None:
    assert {
        name: z for name, pair in neighbours(sample_features).items() if (z := worst_correlation_z(*pair)) > 5
    } == {}


@pytest.mark.parametrize("forgotten", ["seeds", "steps", "streams", "rows", "blocks"])
def test_the_independence_test_sees_a_broken_counter(forgotten: str) -> None:
    def forgets(t: FeatureTable, batch: int, *, seeds: Tensor, step: int, stream: int) -> Tensor:
        if forgotten == "seeds":
            seeds = seeds * 0
        step, stream = (0 if forgotten == name else value for name, value in (("steps", step), ("streams", stream)))
        x = sample_features(t, batch, seeds=seeds, step=step, stream=stream)
        if forgotten == "rows":  # a counter that steps every other row
            x = x[:, torch.arange(batch) // 2]
        return x[..., torch.arange(x.shape[-1]) % 4] if forgotten == "blocks" else x

    assert worst_correlation_z(*neighbours(forgets)[forgotten]) > 5


def test_values_are_uniform() -> None:
    x = sample_features(table(INDEPENDENT, 1.0, 1), 100_000, seeds=SEEDS[:1])[0].double()
    counts = torch.stack([torch.histc(column, 64, 0.0, 1.0) for column in x.T])
    expected = x.shape[0] / 64
    chi_square = ((counts - expected) ** 2 / expected).sum(-1)
    # 63 degrees of freedom: mean 63, standard deviation √126; 115 is passed by one in 10,000 columns of a true uniform.
    assert float(chi_square.max()) < 115
    squared = torch.stack([torch.histc(column, 64, 0.0, 1.0) for column in x.T.square()])
    assert float(((squared - expected) ** 2 / expected).sum(-1).min()) > 1000


@pytest.mark.parametrize("first_step", [0, 2**32 - 5])
def test_models_of_a_stack_and_many_steps_are_independent(first_step: int) -> None:
    seeds = torch.arange(40) + 1000
    many = FeatureTable(torch.full((40,), INDEPENDENT), torch.full((40, 3), 0.5), torch.ones(40).long())
    x = torch.stack([sample_features(many, 512, seeds=seeds, step=first_step + t) for t in range(4)])
    values = x.double().permute(1, 0, 3, 2).reshape(40 * 4 * 3, 512)
    values = (values - values.mean(1, keepdim=True)) / values.std(1, keepdim=True)
    correlation = (values @ values.T / 512).fill_diagonal_(0.0)
    # 115,000 pairs, each N(0, 1/512): the largest lies near 4.5 standard deviations.
    assert float(correlation.abs().max()) < 6 / 512**0.5
    assert abs(float((x > 0).double().mean()) - 0.5) < 5 * 0.5 / x.numel() ** 0.5


def test_refuses_bad_tables() -> None:
    with pytest.raises(ValueError, match="probability"):
        table(INDEPENDENT, 0.0, 1)
    with pytest.raises(ValueError, match="size"):
        table(CLUSTERED, 0.5, 5)
    with pytest.raises(ValueError, match="size"):
        table(EXACTLY_K, 0.5, N + 1)
    with pytest.raises(ValueError, match="kind, size"):
        FeatureTable(torch.tensor([0]), torch.ones(2, N), torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="seeds"):
        sample_features(TABLE, 4, seeds=SEEDS[:2])
