"""Evaluation of a toy model with very many features on held-out sparse samples, in stripes over features."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.kernels.encode_features import encode_features
from moesaic.kernels.feature_route import Route, encode
from moesaic.kernels.feature_state import Assignment, Columns
from moesaic.kernels.feature_training import FeatureState
from moesaic.kernels.features import EXACTLY_K
from moesaic.kernels.grouped_matmul import grouped_matmul
from moesaic.moe.config import Run
from moesaic.moe.data import feature_table, importance
from moesaic.moe.large import held_out_sparse, settings


@dataclass(frozen=True)
class LargeEvaluation:
    """A model on its data's held-out batch, float64 on the CPU.

    Attributes:
        loss: Σ_i I_i mean_b (x_bi − x'_bi)².
        null_loss: Σ_i I_i Var x_i, what predicting every feature's mean would lose, from the distribution.
        squared_error: (n,) mean_b (x_bi − x'_bi)².
        variance: (n,) of the samples about their mean.
        present: (n,) samples that have the feature.
        usage: (E,) share of the assignments.
        gate_sums: (E,) Σ_b w_be.
        n_samples: B.
    """

    loss: float
    null_loss: float
    squared_error: Tensor
    variance: Tensor
    present: Tensor
    usage: Tensor
    gate_sums: Tensor
    n_samples: int

    @property
    def unexplained(self) -> float:
        """Held-out loss over what predicting every feature's mean would lose on average."""
        return self.loss / self.null_loss


@torch.no_grad()
def evaluate_large(
    run: Run, state: FeatureState, *, n_samples: int = 4096, batch: int = 1024, stripe: int = 8192
) -> LargeEvaluation:
    """Decode the held-out batch of the run's data exactly, ``batch`` samples and ``stripe`` features at a time.

    Args:
        run: whose data and gate; ``state`` must have caught up (`FeatureState.settle`), as `train_large` leaves it.
        state: the model.
        n_samples: of the held-out batch.
        batch: samples at a time.
        stripe: features at a time.
    """
    shape, device = state.shape, str(state.table.device)
    x = held_out_sparse(run, n_samples, device)
    squares, sums, values, present = (torch.zeros(shape.n_features, dtype=torch.float64) for _ in range(4))
    usage, gate_sums = (torch.zeros(shape.n_experts, dtype=torch.float64) for _ in range(2))
    training = settings(run, device)
    for first in range(0, n_samples, batch):
        part = _rows(x, first, min(first + batch, n_samples))
        views = shape.named(state.table)
        logits = encode_features(part, views["router"].T) if shape.routed else None
        route = Route.of(logits, part.shape[0], shape, training)
        h, shared_h = encode(shape, views, part, route)
        columns = Columns.of(part)
        _add_squares(squares, state, h, shared_h, route.assignment, columns, stripe)
        counts = columns.starts.diff().double().cpu()
        at = columns.features.cpu()
        present[at] += counts
        summed = torch.zeros(at.shape[0], 2, dtype=torch.float64)
        owner = torch.repeat_interleave(torch.arange(at.shape[0]), counts.long())
        entries = columns.values.double().cpu()
        summed.index_add_(0, owner, torch.stack([entries, entries.square()], 1))
        values[at] += summed[:, 0]
        sums[at] += summed[:, 1]
        bounds = route.assignment.offsets
        usage += bounds.diff().double().cpu()
        gates = torch.zeros_like(gate_sums)
        experts = torch.repeat_interleave(torch.arange(shape.n_experts), bounds.diff().cpu())
        gate_sums += gates.index_add_(0, experts, route.assignment.gates.double().cpu())
    weights, mean = importance(run.features, shape.n_features).double(), values / n_samples
    return LargeEvaluation(
        loss=float((weights * squares).sum() / n_samples),
        null_loss=float((weights * feature_variance(run)).sum()),
        squared_error=squares / n_samples,
        variance=sums / n_samples - mean.square(),
        present=present,
        usage=usage / (n_samples * shape.top_k),
        gate_sums=gate_sums,
        n_samples=n_samples,
    )


def feature_variance(run: Run) -> Tensor:
    """Return Var x_i = q/3 − q²/4 (n,) float64, with q the probability that feature i is present."""
    table = feature_table([run])
    p = table.probability[0].double()
    if int(table.kind[0]) == EXACTLY_K:
        p = torch.full_like(p, run.features.n_active / run.toy.n_features)
    elif run.features.n_clusters:
        p = p / run.features.n_clusters
    return p / 3 - p.square() / 4


def _rows(x: Tensor, first: int, last: int) -> Tensor:
    starts = x.crow_indices()
    begin, end = int(starts[first]), int(starts[last])
    return torch.sparse_csr_tensor(
        starts[first : last + 1] - begin, x.col_indices()[begin:end], x.values()[begin:end],
        size=(last - first, x.shape[1]), check_invariants=False,
    )  # fmt: skip


def _add_squares(
    squares: Tensor, state: FeatureState, h: Tensor, shared_h: Tensor | None, assignment: Assignment, columns: Columns,
    stripe: int,
) -> None:  # fmt: skip
    """Add Σ_b (x_bi − x'_bi)² to ``squares`` (n,)."""
    shape = state.shape
    views = shape.named(state.table)
    decoder = views.get("decoder", views["weight"])
    firsts = torch.arange(0, shape.n_features + stripe, stripe, device=columns.features.device)
    bounds = columns.starts[torch.searchsorted(columns.features, firsts)].tolist()
    of_entry = torch.repeat_interleave(columns.features, columns.starts.diff())
    for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
        first = number * stripe
        part = slice(first, min(first + stripe, shape.n_features))
        if part.start >= part.stop:
            continue
        weight, bias = decoder[:, part], views["bias"][:, part].contiguous()
        if shape.n_experts == 1:
            z = torch.addmm(bias[0], h, weight[0].T)
        else:
            z = grouped_matmul(h, weight.mT, assignment.offsets, bias=bias)
        y = torch.relu(z) * assignment.gates[:, None]
        out = y[assignment.places[:, 0]]
        for slot in range(1, shape.top_k):
            out += y[assignment.places[:, slot]]
        if shared_h is not None:
            shared = views.get("shared_decoder", views["shared_weight"])[part]
            out += torch.relu(torch.addmm(views["shared_bias"][part], shared_h, shared.T))
        # Each entry is its own place of the stripe.
        out[columns.samples[begin:end], of_entry[begin:end] - first] -= columns.values[begin:end]
        squares[part] += out.square().sum(0, dtype=torch.float64).cpu()
