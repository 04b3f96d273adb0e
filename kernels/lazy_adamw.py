"""AdamW on the rows that a step touches, the others brought up to date when they are touched next.

A row without gradient still moves under `torch.optim.AdamW`: at steps s = t₀+1 … t with g = 0,

    m ← β₁ᵍ m,   v ← β₂ᵍ v,   g = t − t₀                                             (exact)
    θ ← θ·D_t/D_t₀ − m/√v · (D_t/D_t₀ F_t₀ − ρᵍ F_t),   ρ = β₁/√β₂                    (exact as eps → 0)

    D_t = Π_{s ≤ t} (1 − lr_s·decay),   F_t = Σ_{s > t} lr_s ρ^(s−t) √(1 − β₂ˢ)/(1 − β₁ˢ) · D_t/D_s

because m/√v falls by ρ a step: the drift along the old momentum is a geometric sum with weights that only depend on the
step, and those are tabulated once, for any schedule of the learning rate. With eps > 0 the drift's denominator is taken
as √v + eps·√(1 − β₂^(t₀+1)), which is wrong by a share of the order of eps over √v.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def check_lazy(lr: float, beta1: float, beta2: float, weight_decay: float) -> None:
    """Raise ValueError for what `LazySchedule.of` does not take; ``lr`` is the largest rate."""
    if beta1 >= math.sqrt(beta2):
        raise ValueError(f"beta1={beta1!r}: takes less than the root of beta2, {math.sqrt(beta2):.4g}")
    if lr * weight_decay >= 1:
        raise ValueError(f"weight_decay={weight_decay!r}: takes less than 1/lr = {1 / lr:.4g}")


@dataclass(frozen=True)
class LazySchedule:
    """The tables of a whole training, float64 (steps + 1,): ln D and F; index t is after t steps.

    Attributes:
        log_decay: ln D.
        drift: F.
        beta1, beta2, eps: Adam's.
    """

    log_decay: Tensor
    drift: Tensor
    beta1: float
    beta2: float
    eps: float

    @classmethod
    def of(cls, lr: Tensor, *, beta1: float, beta2: float, eps: float, weight_decay: float) -> LazySchedule:
        """Tabulate the learning rates ``lr`` (steps,) float64.

        Raises:
            ValueError: β₁ ≥ √β₂, where old momentum would outlive its scale, or a step that decays weights to nothing.
        """
        check_lazy(float(lr.max()) if lr.numel() else 0.0, beta1, beta2, weight_decay)
        rho = beta1 / math.sqrt(beta2)
        logs, drift = [0.0], [0.0] * (len(lr) + 1)
        rates = lr.tolist()
        for rate in rates:
            logs.append(logs[-1] + math.log1p(-rate * weight_decay))
        for step in range(len(rates), 0, -1):
            moved = rates[step - 1] * math.sqrt(1 - beta2**step) / (1 - beta1**step)
            drift[step - 1] = rho * (moved + drift[step]) / (1 - rates[step - 1] * weight_decay)
        return cls(torch.tensor(logs, dtype=torch.float64), torch.tensor(drift, dtype=torch.float64), beta1, beta2, eps)

    def catch_up(self, theta: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, last: Tensor, step: int) -> None:
        """Bring rows (R, P), up to date after ``last`` (R,) int64 steps each, to after ``step`` steps, in place."""
        gap = (step - last).double()
        at = last.to(self.drift.device)
        shrink = torch.exp(self.log_decay[step] - self.log_decay[at])
        rho = (self.beta1 / math.sqrt(self.beta2)) ** gap
        drift = shrink * self.drift[at] - rho.to(at.device) * self.drift[step]
        # The root is that of the first skipped step, from which the drift begins.
        small = self.eps * (1 - self.beta2 ** (last.double() + 1)).sqrt()
        columns = [
            value.to(theta.device, torch.float32).unsqueeze(1)
            for value in (shrink, drift, small, self.beta1**gap, self.beta2**gap)
        ]
        theta.mul_(columns[0]).sub_(exp_avg / exp_avg_sq.sqrt().add_(columns[2]) * columns[1])
        exp_avg.mul_(columns[3])
        exp_avg_sq.mul_(columns[4])
