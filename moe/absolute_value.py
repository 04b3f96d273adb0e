"""The absolute-value model of *Toy Models of Superposition*: computation in superposition, stacked over models."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moesaic.kernels.features import FeatureTable, sample_features
from moesaic.moe.config import Run
from moesaic.moe.data import feature_table, held_out, importance
from moesaic.moe.init import initial_parameters
from moesaic.moe.trainer import device_kind

PROGRESS_S = 0.5
"""Seconds between calls of ``progress``."""
_BLOCK = 16_384


class AbsoluteValueModel(nn.Module):
    """S independent models h = ReLU(x W), y' = ReLU(h Dᵀ + b), which are to compute y = |x|.

    Without superposition a feature takes two neurons, |x_i| = ReLU(x_i) + ReLU(−x_i). Source: Elhage et al. 2022, *Toy
    Models of Superposition*, "Computation in Superposition"; there W₁ = Wᵀ, W₂ = D.

    Parameters: ``weight`` (S, n, m), ``decoder`` (S, n, m), ``bias`` (S, n). W and b start as the parametrisation of
    the runs says, and D as |W|: an output whose neurons sum to less than 0 on one side of its input gets no gradient
    there through its ReLU, and with rare features half of all sides would stay so for good.

    Args:
        runs: dense and untied (E = 1, ``tied=False``, no shared expert), of one n and m.

    Raises:
        ValueError: for no runs, or runs that are not so.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        super().__init__()
        if not runs:
            raise ValueError("runs: takes at least one")
        shapes = {(run.toy.n_features, run.toy.n_hidden) for run in runs}
        if len(shapes) != 1:
            raise ValueError(f"runs: stacked models take one n_features and n_hidden, got {sorted(shapes)}")
        for run in runs:
            if run.toy.tied or run.toy.n_experts != 1 or run.toy.shared_hidden:
                raise ValueError(f"runs: take tied=False, n_experts=1 and shared_hidden=0, got {run.toy}")
        initial = initial_parameters([run.toy for run in runs], [run.seed for run in runs], [0] * len(runs))
        self.weight = nn.Parameter(initial["weight"][:, 0])
        self.decoder = nn.Parameter(initial["decoder"][:, 0].abs())
        self.bias = nn.Parameter(initial["bias"][:, 0])

    def forward(self, x: Tensor) -> Tensor:
        """Compute y' (S, B, n) of x (S, B, n)."""
        h = torch.relu(x @ self.weight)
        return torch.relu(torch.baddbmm(self.bias[:, None], h, self.decoder.mT))


@dataclass(frozen=True)
class AbsoluteValueResult:
    """Trained stacked models.

    Attributes:
        runs: the runs, in the order of the stack.
        model: the trained models, S of them.
        losses: (S, steps) float32, loss of each training batch, before its update.
        wall_s: seconds of training of the whole stack.
    """

    runs: list[Run]
    model: AbsoluteValueModel
    losses: Tensor
    wall_s: float


def train_absolute_value(
    runs: Sequence[Run], *, device: str = "cpu", progress: Callable[[int, float], None] | None = None
) -> AbsoluteValueResult:
    """Train stacked absolute-value models by AdamW on fresh samples.

        L = Σ_f I_f mean_b (|x_bf| − y'_bf)²   [/ n when reduction is ``mean``]

    A feature is present as the run's data say, and then x_f ~ U(−1, 1).

    Args:
        runs: of one n, m and training configuration; they may differ in data, importance and seed.
        device: ``cpu`` or a CUDA device.
        progress: called now and then with the number of steps done since the last call and the stack's mean loss.

    Raises:
        ValueError: for runs that `AbsoluteValueModel` does not take or that differ in training, for a load-balance
            term, or for a device that is not there.
    """
    device_kind(device)
    model = AbsoluteValueModel(runs).to(device)
    first = runs[0].training
    if any((run.training.steps, run.training.batch_size) != (first.steps, first.batch_size) for run in runs):
        raise ValueError("runs: stacked models take one number of steps and one batch size")
    if any(run.training.load_balance for run in runs):
        raise ValueError("load_balance: takes 0, there is no router")
    n = runs[0].toy.n_features
    table, seeds = feature_table(runs), torch.tensor([run.seed for run in runs], device=device)
    counts = [first.batch_size * (n if run.training.reduction == "mean" else 1) for run in runs]
    weights = torch.stack([importance(run.features, n) / count for run, count in zip(runs, counts, strict=True)])
    weights, optimiser = weights.to(device), _AdamW(model, runs)
    losses = torch.full((len(runs), first.steps), torch.nan)
    start = told = time.perf_counter()
    reported = 0
    for step in range(first.steps):
        x = signed_features(table, first.batch_size, seeds=seeds, step=step)
        losses[:, step] = loss_and_gradients(model, x, weights)
        optimiser.step(step)
        now = time.perf_counter()
        if progress and (now - told > PROGRESS_S or step == first.steps - 1):
            progress(step + 1 - reported, float(losses[:, step].mean()))
            told, reported = now, step + 1
    return AbsoluteValueResult(list(runs), model, losses, time.perf_counter() - start)


class _AdamW:
    """AdamW whose settings are those of each model of the stack."""

    def __init__(self, model: AbsoluteValueModel, runs: Sequence[Run]) -> None:
        self.parameters, self.training = list(model.parameters()), [run.training for run in runs]
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]
        self.beta1, self.beta2, self.eps = (self._column(name) for name in ("beta1", "beta2", "eps"))
        self.decay = self._column("weight_decay")

    def _column(self, name: str) -> Tensor:
        return torch.tensor([getattr(training, name) for training in self.training], dtype=torch.float64)

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Update every parameter from its ``.grad``."""
        lr = torch.tensor([training.lr_at(step) for training in self.training], dtype=torch.float64)
        # p ← p (1 − lr·λ) − rate · m / (√v + ε'), with both bias corrections moved into rate and ε'.
        correction = (1 - self.beta2 ** (step + 1)).sqrt()
        rate, eps = lr * correction / (1 - self.beta1 ** (step + 1)), self.eps * correction
        for parameter, (mean, square) in zip(self.parameters, self.moments, strict=True):
            gradient = parameter.grad
            if gradient is None:
                continue
            column = [
                value.to(gradient).view(-1, *[1] * (gradient.dim() - 1))
                for value in (1 - self.beta1, self.beta2, 1 - self.beta2, rate, eps, 1 - lr * self.decay)
            ]
            mean += column[0] * (gradient - mean)
            square.mul_(column[1]).addcmul_(column[2] * gradient, gradient)
            parameter.mul_(column[5]).sub_(column[3] * mean / square.sqrt().add_(column[4]))


@torch.no_grad()
def loss_and_gradients(model: AbsoluteValueModel, x: Tensor, weights: Tensor) -> Tensor:
    """Return L = Σ_f w_f Σ_b (|x_bf| − y'_bf)² of each model, (S,), and leave its gradients in ``.grad``.

    Written out, because autograd copies (S, B, n) tensors that these few products can share.

    Args:
        model: S models.
        x: (S, B, n).
        weights: w, (S, n).
    """
    h = torch.bmm(x, model.weight).clamp_(min=0.0)
    y = torch.baddbmm(model.bias[:, None], h, model.decoder.mT).clamp_(min=0.0)
    error = y - x.abs()
    slope = torch.where(y > 0, error, 0.0).mul_(2 * weights[:, None])
    model.bias.grad = slope.sum(1)
    model.decoder.grad = torch.bmm(slope.mT, h)
    behind = torch.where(h > 0, torch.bmm(slope, model.decoder), 0.0)
    model.weight.grad = torch.bmm(x.mT, behind)
    return (error.square_().sum(1) * weights).sum(-1)


def signed_features(table: FeatureTable, batch_size: int, *, seeds: Tensor, step: int) -> Tensor:
    """Draw x (S, B, n): the features of `sample_features`, with the values of present ones taken from (0, 1) to ±1."""
    return _signed(sample_features(table, batch_size, seeds=seeds, step=step))


def held_out_signed(run: Run, n_samples: int) -> Tensor:
    """Return the evaluation batch x (n_samples, n) of a run's data."""
    return _signed(held_out(run, n_samples))


def _signed(values: Tensor) -> Tensor:
    return torch.where(values > 0, 2 * values - 1, values)


@torch.no_grad()
def evaluate_absolute_value(result: AbsoluteValueResult, n_samples: int) -> tuple[Tensor, Tensor]:
    """Return mean_b (|x_bf| − y'_bf)² and Var_b |x_bf| of every model and feature, (S, n) float64, on held-out samples.

    Args:
        result: trained models.
        n_samples: B.
    """
    model = result.model
    losses, variances = [], []
    for s, run in enumerate(result.runs):
        weight, decoder, bias = (p[s].double().cpu() for p in (model.weight, model.decoder, model.bias))
        sums = torch.zeros(3, run.toy.n_features, dtype=torch.float64)
        for x in held_out_signed(run, n_samples).split(_BLOCK):
            target = x.double().abs()
            error = torch.relu(torch.relu(x.double() @ weight) @ decoder.T + bias) - target
            sums += torch.stack([error.square().sum(0), target.square().sum(0), target.sum(0)])
        loss, square, mean = sums / n_samples
        losses.append(loss)
        variances.append(square - mean.square())
    return torch.stack(losses), torch.stack(variances)
