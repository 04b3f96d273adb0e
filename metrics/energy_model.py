"""Modelled energy: coefficients of FLOPs, bytes and seconds fitted to measured runs of one board. Never a measurement.

There are no built-in coefficients: those of data sheets are peak figures of another workload.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesaic.metrics.energy import EnergyResult

MIN_POINTS, LEAST_SPREAD = 4, 0.01


@dataclass(frozen=True)
class EnergyPoint:
    """A measured run: joules of ``flops`` FLOPs and ``bytes`` moved to and from memory in ``seconds`` on ``board``."""

    joules: float
    flops: float
    bytes: float
    seconds: float
    board: str

    @classmethod
    def of(cls, result: EnergyResult, *, flops: float, bytes: float) -> EnergyPoint:
        """The point of a measured call that does ``flops`` and moves ``bytes``; ValueError unless it is ``valid``."""
        if result.joules is None or result.seconds is None or not result.valid:
            raise ValueError(f"result: must be valid ({result.reason or f'its trials vary by {result.cv or 0:.1%}'})")
        return cls(result.joules, flops, bytes, result.seconds, f"{result.scope} {result.board}")


@dataclass(frozen=True)
class EnergyModel:
    """E = a·FLOPs + b·bytes + c·seconds, fitted: a in J/FLOP, b in J/byte, c in W; ``kind`` is always ``modelled``.

    ``residuals`` are (modelled - measured)/measured by point; ``source`` says what it was fitted to.
    """

    joules_per_flop: float
    joules_per_byte: float
    watts: float
    residuals: tuple[float, ...]
    board: str
    source: str
    kind: str = "modelled"

    def joules(self, flops: float, bytes: float, seconds: float) -> float:
        """Modelled joules of a run on the same board; ValueError for a negative or infinite quantity."""
        for name, value in (("flops", flops), ("bytes", bytes), ("seconds", seconds)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value!r}: must be finite and at least 0")
        return self.joules_per_flop * flops + self.joules_per_byte * bytes + self.watts * seconds


def fit_energy_model(points: Sequence[EnergyPoint]) -> EnergyModel:
    """Non-negative coefficients of least Σ((a·FLOPs + b·bytes + c·seconds)/joules - 1)², from runs on one board.

    Errors are relative, so that short runs count as much as long ones. The least squares over every subset of the three
    terms are compared, of which the best without a negative coefficient is the constrained optimum.

    Raises ValueError for fewer than 4 points, several boards, a quantity that is not finite and positive (FLOPs and
    bytes may be 0), or points that do not tell the terms apart: with columns per joule scaled to length 1, the least
    singular value must be 1 % of the largest.
    """
    if len(points) < MIN_POINTS:
        raise ValueError(f"points: {len(points)} measured runs, at least {MIN_POINTS} are needed")
    if len(boards := sorted({point.board for point in points})) > 1:
        raise ValueError(f"points: from {len(boards)} boards ({', '.join(boards)}), must be from one")
    for i, point in enumerate(points):
        for name in ("joules", "flops", "bytes", "seconds"):
            value, positive = getattr(point, name), name in ("joules", "seconds")
            if not (0 <= value < math.inf) or (positive and value == 0):
                raise ValueError(
                    f"points[{i}].{name}={value!r}: must be finite and {'above' if positive else 'at least'} 0"
                )
    terms = np.array([(p.flops / p.joules, p.bytes / p.joules, p.seconds / p.joules) for p in points])
    lengths = np.linalg.norm(terms, axis=0)
    for name, length in zip(("flops", "bytes"), lengths[:2], strict=True):
        if length == 0:
            raise ValueError(f"points: {name} is 0 in all of them, its coefficient cannot be told")
    terms /= lengths
    singular = np.linalg.svd(terms, compute_uv=False)
    if (spread := singular[-1] / singular[0]) < LEAST_SPREAD:
        raise ValueError(
            f"points: FLOPs, bytes and seconds go together in them (least singular value {spread:.2g} of the largest, "
            f"{LEAST_SPREAD:g} is needed): measure runs of other intensities"
        )
    best, least = np.zeros(3), math.inf
    for size in (1, 2, 3):
        for chosen in itertools.combinations(range(3), size):
            trial = np.zeros(3)
            trial[list(chosen)] = np.linalg.lstsq(terms[:, chosen], np.ones(len(points)), rcond=None)[0]
            error = float(np.square(terms @ trial - 1).sum())
            if trial.min() >= 0 and error < least:
                best, least = trial, error
    residuals = tuple(map(float, terms @ best - 1))
    per_flop, per_byte, watts = map(float, best / lengths)
    source = (
        f"modelled: non-negative least squares over {len(points)} measured runs on {boards[0]}, "
        f"relative residuals up to {max(map(abs, residuals)):.2%}"
    )
    return EnergyModel(per_flop, per_byte, watts, residuals, boards[0], source)
