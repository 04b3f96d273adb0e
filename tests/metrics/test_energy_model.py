"""The fit of modelled energy: what it recovers, and which runs it refuses."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest

from moesaic.metrics.energy import EnergyResult
from moesaic.metrics.energy_model import EnergyPoint, fit_energy_model

TRUE = np.array([0.7e-12, 30e-12, 90.0])


def points(noise: float = 0.0, n: int = 12, truth: np.ndarray = TRUE) -> list[EnergyPoint]:
    """Runs of intensities from 1 to 1,000 FLOP/byte, over four orders of magnitude of joules."""
    generator = np.random.default_rng(1)
    found = []
    for _ in range(n):
        flops = 10 ** generator.uniform(9, 13)
        moved = flops / 10 ** generator.uniform(0, 3)
        seconds = max(flops / 5e14, moved / 3e12) * generator.uniform(1, 2)
        joules = float(truth @ (flops, moved, seconds)) * (1 + noise * generator.uniform(-1, 1))
        found.append(EnergyPoint(joules, flops, moved, seconds, "board 0"))
    return found


def test_exact_runs_give_their_coefficients() -> None:
    model = fit_energy_model(points())
    assert (model.joules_per_flop, model.joules_per_byte, model.watts) == pytest.approx(tuple(TRUE), rel=1e-6)
    assert max(map(abs, model.residuals)) < 1e-9
    assert model.joules(1e12, 1e10, 0.01) == pytest.approx(0.7 + 0.3 + 0.9)
    assert model.kind == asdict(model)["kind"] == "modelled"
    assert model.source.startswith("modelled: non-negative least squares over 12 measured runs on board 0, relative")


def test_noise_of_2_percent_moves_predictions_by_less() -> None:
    model = fit_energy_model(points(noise=0.02))
    assert model.joules(1e12, 1e10, 0.01) == pytest.approx(1.9, rel=0.02)
    assert 0.005 < max(map(abs, model.residuals)) < 0.03
    assert f"up to {max(map(abs, model.residuals)):.2%}" in model.source


def test_no_coefficient_is_negative_and_the_rest_is_the_constrained_optimum() -> None:
    runs = points(truth=np.array([-0.1e-12, 30e-12, 300.0]), noise=0.05)
    model = fit_energy_model(runs)
    rows = np.array([(p.flops, p.bytes, p.seconds) for p in runs]) / np.array([[p.joules] for p in runs])
    found = np.array([model.joules_per_flop, model.joules_per_byte, model.watts])
    slope = rows.T @ (rows @ found - 1) * np.array(TRUE)
    assert np.linalg.lstsq(rows * TRUE, np.ones(12), rcond=None)[0].min() < 0
    assert model.joules_per_flop == 0
    assert slope[0] > 1e-3
    assert slope[1:] == pytest.approx(0, abs=1e-9)


def test_runs_that_cannot_tell_are_refused() -> None:
    runs = points()
    with pytest.raises(ValueError, match="points: 3 measured runs, at least 4 are needed"):
        fit_energy_model(runs[:3])
    with pytest.raises(ValueError, match=r"points: from 2 boards \(board 0, other\), must be from one"):
        fit_energy_model([*runs, replace(runs[0], board="other")])
    with pytest.raises(ValueError, match="points: FLOPs, bytes and seconds go together in them"):
        fit_energy_model([runs[0]] * 5)
    with pytest.raises(ValueError, match="points: FLOPs, bytes and seconds go together in them"):
        fit_energy_model([replace(run, seconds=run.flops / 4e14) for run in runs])
    with pytest.raises(ValueError, match="points: bytes is 0 in all of them"):
        fit_energy_model([replace(run, bytes=0.0) for run in runs])
    with pytest.raises(ValueError, match=r"points\[1\].seconds=0.0: must be finite and above 0"):
        fit_energy_model([runs[0], replace(runs[1], seconds=0.0), *runs])
    with pytest.raises(ValueError, match=r"points\[0\].flops=nan: must be finite and at least 0"):
        fit_energy_model([replace(runs[0], flops=float("nan")), *runs])
    with pytest.raises(ValueError, match="bytes=-1: must be finite and at least 0"):
        fit_energy_model(runs).joules(1, -1, 1)


def test_a_point_is_of_a_valid_measurement() -> None:
    result = EnergyResult(joules=2.0, seconds=0.01, valid=True, scope="gpu_board", board="GPU-1")
    assert EnergyPoint.of(result, flops=5, bytes=6) == EnergyPoint(2.0, 5, 6, 0.01, "gpu_board GPU-1")
    with pytest.raises(ValueError, match=r"result: must be valid \(its trials vary by 5.0%\)"):
        EnergyPoint.of(replace(result, valid=False, cv=0.05), flops=5, bytes=6)
    with pytest.raises(ValueError, match=r"result: must be valid \(nvml: no\)"):
        EnergyPoint.of(EnergyResult(reason="nvml: no"), flops=5, bytes=6)
