"""Feature distributions, importances and held-out batches of runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moesaic.kernels.features import (
    ANTICORRELATED,
    CLUSTERED,
    CORRELATED,
    EXACTLY_K,
    INDEPENDENT,
    FeatureTable,
    sample_features,
)
from moesaic.moe.config import FeatureConfig, Run

_KINDS = {
    "independent": INDEPENDENT,
    "power_law": INDEPENDENT,
    "correlated": CORRELATED,
    "anticorrelated": ANTICORRELATED,
    "clustered": CLUSTERED,
    "exactly_k": EXACTLY_K,
}
# Keys that belong to the data and not to a run: every seed and architecture is judged on the same samples.
_HELD_OUT_KEY = 0x686F6C646F7574
_PERMUTATION_KEY = 0x7065726D
_HELD_OUT_STREAM = 2


def feature_probabilities(features: FeatureConfig, n_features: int) -> Tensor:
    """Return p_i (n,) float32; for ``power_law``, p_i = p · n (i+1)^(−a) / Σ_j (j+1)^(−a)."""
    if features.features != "power_law":
        return torch.full((n_features,), features.feature_probability, dtype=torch.float32)
    law = torch.arange(1, n_features + 1, dtype=torch.float64) ** -features.power_law_exponent
    return (law * (features.feature_probability / law.mean())).to(torch.float32)


def importance(features: FeatureConfig, n_features: int) -> Tensor:
    """Return I (n,) float32, by the equations of ``FeatureConfig``; the permutation is the same for every run."""
    i = torch.arange(n_features, dtype=torch.float64)
    base = features.importance_base
    if features.importance == "uniform":
        values = torch.ones_like(i)
    elif features.importance == "log":
        values = base ** (-i / max(1, n_features - 1))
    elif features.importance == "last":
        values = torch.where(i == n_features - 1, base, 1.0)
    else:
        if features.importance == "permuted":
            order = np.random.Generator(np.random.Philox(key=_PERMUTATION_KEY)).permutation(n_features)
            i = torch.from_numpy(order).to(torch.float64)
        values = base**i
    return values.to(torch.float32)


def feature_table(runs: Sequence[Run]) -> FeatureTable:
    """Return the distributions of stacked runs, which share n."""
    n = runs[0].toy.n_features
    sizes = [
        run.features.group_size
        or run.features.n_active
        or (n // run.features.n_clusters if run.features.n_clusters else 1)
        for run in runs
    ]
    return FeatureTable(
        kind=torch.tensor([_KINDS[run.features.features] for run in runs]),
        probability=torch.stack([feature_probabilities(run.features, n) for run in runs]),
        size=torch.tensor(sizes),
    )


def held_out(run: Run, n_samples: int = 8192) -> Tensor:
    """Return the run's evaluation batch (n_samples, n): a function of its data and n alone, apart from all training."""
    if n_samples < 1:
        raise ValueError(f"n_samples={n_samples}: takes an integer >= 1")
    return sample_features(
        feature_table([run]), n_samples, seeds=torch.tensor([_HELD_OUT_KEY]), step=0, stream=_HELD_OUT_STREAM
    )[0]
