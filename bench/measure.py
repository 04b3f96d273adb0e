"""The row of a trained model: every metric of it, on the held-out batch of its data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moesaic.bench.evaluation import Array, Evaluation, evaluate
from moesaic.bench.plan import PlannedRun, Row
from moesaic.kernels.ensemble import executed_samples
from moesaic.metrics import count_flops, dimensionality_histogram
from moesaic.metrics.superposition import MONOSEMANTIC_BELOW, POLYSEMANTICITY_EPS
from moesaic.moe import Run, ToyConfig, TrainResult, importance
from moesaic.moe.toy import ensemble_shape

LAST_BATCHES = 100
"""Training batches whose mean is ``train_loss``."""

METRICS = (
    "loss",
    "load_balance_loss",
    "train_loss",
    "unexplained_variance",
    "features_per_dimension",
    "features_per_dimension_gate",
    "features_per_dimension_folded",
    "mean_dimensionality",
    "represented_share",
    "superposition",
    "monosemantic_share",
    "dead_features",
    "dimensionality_histogram",
    "usage",
    "effective_experts",
    "dead_experts",
    "load_imbalance",
)
"""Columns that need a trained model; all None in a failed row."""


def measure(result: TrainResult, planned: Sequence[PlannedRun], *, device: str = "cpu") -> list[Row]:
    """Return a row for every model of a stack, in order: configuration, labels, metrics, compute; None where undefined.

    On the 8,192 samples of the run's held-out batch, with sums in float64:
      ``loss``  Σ_f I_f mean_b (x_bf − x'_bf)², over n where training took the mean; without the load-balance term.
      ``load_balance_loss``  coefficient · E Σ_e f_e P_e.
      ``unexplained_variance``  Σ_f I_f mean_b (x_bf − x'_bf)² / Σ_f I_f Var_b(x_bf).
      ``usage``, ``effective_experts``, ``dead_experts``, ``load_imbalance``  of the routed experts, by assignments.
      ``represented_share``, ``dead_features``  of the presences, as `represented_features` defines them.
      ``mean_dimensionality``, ``superposition``  means of D_i and of w̄_e Σ_{j≠i} (Ŵ_i·W_j)² (the score with the gate
      folded into W) over represented presences; ``dimensionality_histogram`` counts those presences by D_i.
      ``monosemantic_share``  of the (expert, feature) pairs with ‖W_i‖ ≥ 1e-5, in experts that are used.
    ``train_loss`` is the mean over the last 100 training batches; FLOPs and bytes are those of training, per sample;
    ``executed_flops`` counts what ``trained_by`` multiplies beyond ``active_flops``, masked experts and padding, when a
    batch is shared out among the experts like the held-out one.

    A shared expert counts as one more expert, always active with weight 1, of its own width m_0. Features per dimension
    are then (‖W⁰‖_F² + c·Σ_e u_e ‖W^e‖_F²)/(m_0 + c·m) with the three u of `features_per_dimension`, and c = k for the
    count- and gate-weighted ones (active dimensions), c = E for the folded one (all dimensions). Untied experts are
    measured by their `balanced_weight`.

    A model whose training failed, or whose held-out loss is not finite, gives a ``failed`` row without metrics. No bit
    of a row depends on what else is in the stack. Small models are evaluated on the CPU wherever they were trained
    (see `moesaic.bench.evaluation.evaluate`).

    Args:
        result: the trained stack.
        planned: its runs and their labels, in the order of the stack.
        device: where it was trained, and is measured.

    Raises:
        ValueError: if ``planned`` are not the runs of ``result``.
    """
    if [item.run for item in planned] != list(result.runs):
        raise ValueError(
            f"planned has {len(planned)} runs: takes the {len(result.runs)} runs of result, in their order"
        )
    trained = [i for i, error in enumerate(result.failed) if error is None]
    metrics = dict(zip(trained, _metrics(result, trained, device), strict=True))
    compute: dict[tuple[object, int], Row] = {}
    rows: list[Row] = []
    for i, item in enumerate(planned):
        run = item.run
        error, measured = metrics.get(i, (result.failed[i], dict.fromkeys(METRICS)))
        key = (run.toy, run.training.batch_size)
        if key not in compute:
            compute[key] = _compute(run)
        executed = _executed_flops(run, measured["usage"], result.impl)
        rows.append(
            {
                "run_key": run.key,
                "status": "ok" if error is None else "failed",
                "error": error,
                **run.flat(),
                **item.labels,
                "trained_by": result.impl,
                "device": device,
                **measured,
                **compute[key],
                "executed_flops": executed,
                "wall_s": result.wall_s / len(planned),
                "gpu_board_j": None,
                "cpu_package_j": None,
            }
        )
    return rows


def _metrics(result: TrainResult, trained: Sequence[int], device: str) -> list[tuple[str | None, Row]]:
    """Return what failed, or None, and the metrics of each of the ``trained`` models of the stack."""
    if not trained:
        return []
    runs = [result.runs[i] for i in trained]
    held = evaluate(result.model, trained, runs, device)
    last = result.losses[list(trained), -LAST_BATCHES:].double().numpy()
    with np.errstate(all="ignore"):  # what is undefined is NaN here and None in the row
        columns = _losses(held, runs) | _usage(held, runs[0]) | _geometry(held, runs[0])
        columns["train_loss"] = (last.sum(-1) / np.float64(last.shape[-1])).tolist()
    found: list[tuple[str | None, Row]] = []
    for values in zip(*(columns[name] for name in METRICS), strict=True):
        row = dict(zip(METRICS, map(_finite, values), strict=True))
        failed = row["loss"] is None
        found.append((f"held-out loss is {values[0]}", dict.fromkeys(METRICS)) if failed else (None, row))
    return found


def _losses(held: Evaluation, runs: Sequence[Run]) -> dict[str, list[object]]:
    n_experts, n = runs[0].toy.n_experts, runs[0].toy.n_features
    known: dict[tuple[str, float], Array] = {}
    for run in runs:
        key = (run.features.importance, run.features.importance_base)
        if key not in known:
            known[key] = importance(run.features, n).double().numpy()
    weigh = np.stack([known[run.features.importance, run.features.importance_base] for run in runs])
    divisor = np.array([n if run.training.reduction == "mean" else 1 for run in runs])
    coefficient = np.array([run.training.load_balance for run in runs])
    loss = (weigh * held.squared_error).sum(-1) / held.n_samples
    balance = n_experts * (_shares(held, runs[0]) * held.prob_sums).sum(-1) / held.n_samples
    return {
        "loss": (loss / divisor).tolist(),
        "load_balance_loss": (coefficient * balance).tolist(),
        "unexplained_variance": (loss / (weigh * held.variance).sum(-1)).tolist(),
    }


def _shares(held: Evaluation, run: Run) -> Array:
    """Return the share of the B·k assignments that each expert gets, (S, E)."""
    return held.assignments / (held.n_samples * run.toy.top_k)


def _usage(held: Evaluation, run: Run) -> dict[str, list[object]]:
    usage = _shares(held, run)
    shares = usage.tolist()
    return {
        "usage": shares,
        # math.log and math.exp: the bits of NumPy's and PyTorch's may depend on the place in the array.
        "effective_experts": [math.exp(-sum(u * math.log(u) for u in row if u > 0)) for row in shares],
        "dead_experts": (usage == 0).sum(-1).tolist(),
        "load_imbalance": (usage.max(-1) * run.toy.n_experts).tolist(),
    }


def _geometry(held: Evaluation, run: Run) -> dict[str, list[object]]:
    n_experts, k, m, m0 = run.toy.n_experts, run.toy.top_k, run.toy.n_hidden, run.toy.shared_hidden
    folded = held.gate_sums / np.maximum(held.assignments, 1)
    live = held.assignments > 0
    if m0:
        one = np.ones_like(folded[:, :1])
        live, folded = np.concatenate([live, one > 0], axis=1), np.concatenate([folded, one], axis=1)
    strength = np.square(held.norm).sum(-1)
    exists = live[..., None] & (held.norm >= POLYSEMANTICITY_EPS)
    monosemantic = exists & (held.polysemanticity < MONOSEMANTIC_BELOW)

    def per_dimension(weights: Array, n_counted: int) -> list[object]:
        total = n_counted * (weights * strength[:, :n_experts]).sum(-1) + (strength[:, n_experts] if m0 else 0.0)
        return list((total / (n_counted * m + m0)).tolist())

    def mean(values: Array) -> list[object]:
        carried = np.where(held.carried > 0, held.carried * values, 0.0)
        return list((_per_model(carried).sum(-1) / _per_model(held.carried).sum(-1)).tolist())

    dimensionality, carried = torch.from_numpy(held.dimensionality), torch.from_numpy(held.carried)
    histogram = dimensionality_histogram(dimensionality.flatten(1), carried.flatten(1))
    return {
        "features_per_dimension": per_dimension(_shares(held, run), k),
        "features_per_dimension_gate": per_dimension(held.gate_sums / (held.n_samples * k), k),
        "features_per_dimension_folded": per_dimension(folded[:, :n_experts] / n_experts, n_experts),
        "mean_dimensionality": mean(held.dimensionality),
        "represented_share": (held.represented.sum(-1) / held.present.sum(-1)).tolist(),
        "superposition": mean(folded[..., None] * held.superposition),
        "monosemantic_share": (_per_model(monosemantic).sum(-1) / _per_model(exists).sum(-1)).tolist(),
        "dead_features": ((held.present > 0) & (held.represented == 0)).sum(-1).tolist(),
        "dimensionality_histogram": histogram.round().long().tolist(),
    }


def _executed_flops(run: Run, usage: Sequence[float] | None, trained_by: str) -> int | None:
    """Return the FLOPs per sample of a training step whose batch is shared out among the experts like the held-out."""
    if usage is None:
        return None
    toy, batch = run.toy, run.training.batch_size
    independent = run.features.features in ("independent", "power_law")
    counts = [share * batch * toy.top_k for share in usage]
    return _flops_of(
        toy, batch, executed_samples(ensemble_shape(toy, batch), counts, trained_by, independent=independent)
    )


@lru_cache(maxsize=1024)
def _flops_of(toy: ToyConfig, batch: int, rows: int) -> int:
    work = count_flops(toy, samples=batch, executed_rows=rows).training
    return round((work.executed.total or 0) / batch)


def _per_model(values: NDArray[Any]) -> NDArray[Any]:
    return values.reshape(len(values), -1)


def _compute(run: Run) -> Row:
    flops = count_flops(run.toy, batch_size=run.training.batch_size)
    work = flops.training
    return {
        "active_flops": work.active.total,
        "dense_flops": work.dense_equivalent.total,
        "bytes": None if work.bytes is None else round(work.bytes.total),
        "parameters": flops.parameters,
        "active_parameters": flops.active_parameters,
        "total_width": flops.total_width,
        "active_width": flops.active_width,
    }


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
