from __future__ import annotations

import pytest
import torch

from moesaic.moe import FeatureConfig, Run, ToyConfig, feature_probabilities, held_out, importance

N = 8


def test_importances() -> None:
    def of(kind: str, base: float = 0.5) -> list[float]:
        return importance(FeatureConfig(importance=kind, importance_base=base), N).tolist()

    assert of("uniform", 0.9) == [1.0] * N
    assert of("geometric") == [0.5**i for i in range(N)]
    assert sorted(of("permuted"), reverse=True) == of("geometric")
    assert of("permuted") != of("geometric")
    assert of("log", 100.0) == pytest.approx([100 ** (-i / 7) for i in range(N)])
    assert of("last", 1.7) == pytest.approx([1.0] * 7 + [1.7])


def test_power_law_has_its_mean_and_exponent() -> None:
    p = feature_probabilities(FeatureConfig("power_law", 0.1, power_law_exponent=0.5), N).double()
    assert float(p.mean()) == pytest.approx(0.1, abs=1e-7)
    assert (p[0] / p[3]).item() == pytest.approx(2.0, rel=1e-6)


def test_held_out_belongs_to_the_data_alone() -> None:
    data = FeatureConfig("clustered", 0.5, n_clusters=4)
    batch = held_out(Run(ToyConfig(N, 2), data, seed=0), 100)
    assert batch.shape == (100, N)
    assert torch.equal(batch, held_out(Run(ToyConfig(N, 3, 4), data, seed=9), 100))
    assert torch.equal(batch[:10], held_out(Run(ToyConfig(N, 2), data), 10))
    assert not torch.equal(batch, held_out(Run(ToyConfig(N, 2), FeatureConfig("clustered", 0.6, n_clusters=4)), 100))
    with pytest.raises(ValueError, match="n_samples=0"):
        held_out(Run(), 0)
