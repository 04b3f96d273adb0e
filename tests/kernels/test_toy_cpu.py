from __future__ import annotations

import numpy as np
import pytest
import torch

from moesaic.kernels import FeatureTable, sample_features
from moesaic.kernels.toy_cpu import aligned, draw_columns, exp32


@pytest.mark.parametrize("n", [1, 3, 4, 7, 128])
@pytest.mark.parametrize("seed", [0, 5, -3, 2**62 + 1])
def test_features_by_rows_and_by_columns_are_the_same_bits(n: int, seed: int) -> None:
    batch, step = 37, 2**31 + 11
    p = torch.rand(1, n, generator=torch.Generator().manual_seed(n)) * 0.9 + 0.05
    for kind in range(5) if n == 128 else [0]:
        p, size = p.clamp(max=1 / 8) if kind else p, 8
        expected = sample_features(
            FeatureTable(torch.tensor([kind]), p, torch.tensor([size])), batch, seeds=torch.tensor([seed]), step=step
        )[0]
        x = aligned(n, 48)
        key = np.int64(seed).view(np.uint64)
        words, rows = np.empty((4, batch), np.uint32), np.empty((batch, n), np.float32)
        draw_columns(kind, key, step, 0, p[0].numpy(), size, batch, words, rows, x)
        assert np.array_equal(x[:, :batch], expected.numpy().T)
        assert not x[:, batch:].any()


def test_the_exponential_is_accurate_and_keeps_nan() -> None:
    x = -np.concatenate([np.linspace(0, 20, 2001), np.linspace(20, 87, 500)]).astype(np.float32)
    ours = np.array([exp32(value) for value in x])
    assert np.abs(ours / np.exp(x.astype(np.float64)) - 1).max() < 1.5e-7
    assert np.isnan(exp32(np.float32("nan")))
    assert 0 < exp32(np.float32(-1e4)) < 1e-37


def test_arrays_start_on_a_cache_line() -> None:
    for rows in range(1, 20):
        assert aligned(rows, 16).ctypes.data % 64 == 0
