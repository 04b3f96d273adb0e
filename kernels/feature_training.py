"""A toy model with very many features in training: how it is trained, and its state between steps."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moesaic.kernels.feature_state import FeatureShape
from moesaic.kernels.lazy_adamw import LazySchedule

FROZEN_GATES = ("random", "oracle")


@dataclass(frozen=True)
class FeatureTraining:
    """How a model is trained.

    Attributes:
        gate: of `moesaic.moe.ToyConfig`.
        importance: (n,) float32, I.
        scale: of the loss: 1/B for a sum over features, 1/(B·n) for a mean.
        lr: (steps,) float64.
        beta1, beta2, eps, weight_decay: AdamW's.
        load_balance: coefficient of the balance term.
        decode: ``exact`` or ``sampled``.
        n_negatives: R, features drawn per step when sampled.
        precision: of products, `stripes.PRECISIONS`.
        stripe: features at a time on a GPU.
        seed: key of the negatives and of stochastic rounding.
    """

    gate: str
    importance: Tensor
    scale: float
    lr: Tensor
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    load_balance: float = 0.0
    decode: str = "exact"
    n_negatives: int = 0
    precision: str = "ieee"
    stripe: int = 4096
    seed: int = 0


@dataclass
class FeatureState:
    """A model in training: its table and moments (n, P), the step each row has seen, and the steps done.

    Attributes:
        shape: of the model.
        table: (n, P) float32.
        exp_avg, exp_avg_sq: (n, P), float32 or bfloat16.
        seen: (n,) int32, the step up to which a row is up to date; of no elements where all always are.
        step: steps done.
    """

    shape: FeatureShape
    table: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    seen: Tensor
    step: int = 0
    _schedule: tuple[FeatureTraining, LazySchedule] | None = field(default=None, repr=False)

    @classmethod
    def zeros(
        cls, shape: FeatureShape, *, device: torch.device | str = "cpu", decode: str = "exact",
        moments: torch.dtype = torch.float32,
    ) -> FeatureState:  # fmt: skip
        """Return a state of zeros."""
        size = (shape.n_features, shape.stride)
        return cls(
            shape, torch.zeros(size, device=device), torch.zeros(size, device=device, dtype=moments),
            torch.zeros(size, device=device, dtype=moments),
            torch.zeros(shape.n_features if decode == "sampled" else 0, dtype=torch.int32, device=device),
        )  # fmt: skip

    def schedule(self, training: FeatureTraining) -> LazySchedule:
        """Return the tables of the training's learning rates, made once for one training."""
        if self._schedule is None or self._schedule[0] is not training:
            schedule = LazySchedule.of(
                training.lr, beta1=training.beta1, beta2=training.beta2, eps=training.eps,
                weight_decay=training.weight_decay,
            )  # fmt: skip
            self._schedule = (training, schedule)
        return self._schedule[1]

    def settle(self, training: FeatureTraining) -> None:
        """Bring all rows up to date, some 64 MiB of the table at a time."""
        if self.seen.shape[0] == 0:
            return
        rows = max(1, 2**24 // self.shape.stride)
        for first in range(0, self.shape.n_features, rows):
            part = slice(first, first + rows)
            self.catch_up(self.table[part], self.exp_avg[part], self.exp_avg_sq[part], self.seen[part], training)
        self.seen.fill_(self.step)

    def catch_up(
        self, table: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, seen: Tensor, training: FeatureTraining
    ) -> None:
        """Bring rows up to date in place; a frozen router stays."""
        router = self.shape.rows(table)["router"] if self.frozen(training) else None
        kept = None if router is None else router.clone()
        self.schedule(training).catch_up(table, exp_avg, exp_avg_sq, seen.long(), self.step)
        if router is not None and kept is not None:
            router.copy_(kept)

    def frozen(self, training: FeatureTraining) -> bool:
        """Whether there is a router that is not trained."""
        return self.shape.routed and training.gate in FROZEN_GATES


@dataclass(frozen=True)
class StepLosses:
    """Reconstruction loss and load-balance term of a batch before its update, float64 scalars."""

    loss: Tensor
    load_balance: Tensor
