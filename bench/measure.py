"""The row of a trained model: every metric of it, on the held-out batch of its data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.bench.plan import PlannedRun, Row
from moesaic.metrics import (
    balanced_weight,
    count_flops,
    dead_experts,
    dense_gates,
    dimensionality_histogram,
    effective_experts,
    expert_usage,
    feature_geometry,
    features_per_dimension,
    gate_usage,
    load_imbalance,
    mean_active_gate,
    represented_features,
)
from moesaic.metrics.superposition import POLYSEMANTICITY_EPS
from moesaic.moe import FeatureConfig, Run, ToyModel, TrainResult, held_out, importance

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

_BLOCK_ELEMENTS = 2**24  # of the (samples, k, n) outputs of the experts that exist at once


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
    ``train_loss`` is the mean over the last 100 training batches; FLOPs and bytes are those of training, per sample.

    A shared expert counts as one more expert, always active with weight 1, of its own width m_0. Features per dimension
    are then (‖W⁰‖_F² + c·Σ_e u_e ‖W^e‖_F²)/(m_0 + c·m) with the three u of `features_per_dimension`, and c = k for the
    count- and gate-weighted ones (active dimensions), c = E for the folded one (all dimensions). Untied experts are
    measured by their `balanced_weight`.

    A model whose training failed, or whose held-out loss is not finite, gives a ``failed`` row without metrics.

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
    batches: dict[tuple[FeatureConfig, int], Tensor] = {}
    rows: list[Row] = []
    for i, item in enumerate(planned):
        run, error = item.run, result.failed[i]
        metrics: Row = dict.fromkeys(METRICS)
        if error is None:
            key = (run.features, run.toy.n_features)
            if key not in batches:
                batches[key] = held_out(run).to(device)
            # One model at a time, so that no bit depends on what else was in the stack.
            held = _Evaluation.of(result.model.select(i).to(device), run, batches[key])
            if math.isfinite(held.loss):
                metrics |= held.losses(run) | _usage(held, run) | _geometry(held, run)
                metrics["train_loss"] = float(result.losses[i, -LAST_BATCHES:].double().mean())
            else:
                error = f"held-out loss is {held.loss}"
        rows.append(
            {
                "run_key": run.key,
                "status": "ok" if error is None else "failed",
                "error": error,
                **run.flat(),
                **item.labels,
                "trained_by": result.impl,
                "device": device,
                **{name: _finite(value) for name, value in metrics.items()},
                **_compute(run),
                "wall_s": result.wall_s / len(planned),
                "gpu_board_j": None,
                "cpu_package_j": None,
            }
        )
    return rows


@dataclass(frozen=True)
class _Evaluation:
    """One model on its held-out batch: x (B, n), gates and ids (B, k), probs (B, E), Σ_b (x − x')² (n,), weights."""

    x: Tensor
    gates: Tensor
    ids: Tensor
    probs: Tensor
    squared_error: Tensor
    importance: Tensor
    weight: Tensor
    shared: Tensor | None

    @classmethod
    @torch.no_grad()
    def of(cls, model: ToyModel, run: Run, x: Tensor) -> _Evaluation:
        """Evaluate a stack of one."""
        toy = run.toy
        squared = torch.zeros(toy.n_features, dtype=torch.float64, device=x.device)
        routings = []
        size = max(1, _BLOCK_ELEMENTS // (toy.top_k * toy.n_features))
        for start in range(0, len(x), size):
            part = x[start : start + size]
            routing = model.route(part)
            squared += (model.reconstruct(part[None], routing)[0] - part).double().square().sum(0)
            routings.append(routing)
        gates, ids, probs = (torch.cat(parts, dim=1)[0] for parts in zip(*routings, strict=True))
        weights = dict(model.named_parameters())
        return cls(
            x=x,
            gates=gates,
            ids=ids,
            probs=probs,
            squared_error=squared,
            importance=importance(run.features, toy.n_features).to(x.device).double(),
            weight=_measured(weights["weight"][0], weights.get("decoder")),
            shared=_measured(weights["shared_weight"][0], weights.get("shared_decoder")) if toy.shared_hidden else None,
        )

    @property
    def loss(self) -> float:
        """Σ_f I_f mean_b (x_bf − x'_bf)²."""
        return float(self.importance @ self.squared_error) / len(self.x)

    def losses(self, run: Run) -> Row:
        """Return the columns of losses."""
        n_experts, n = run.toy.n_experts, run.toy.n_features
        balance = n_experts * float(expert_usage(self.ids, n_experts) @ self.probs.double().mean(0))
        variance = float(self.importance @ self.x.double().var(0, correction=0))
        return {
            "loss": self.loss / (n if run.training.reduction == "mean" else 1),
            "load_balance_loss": run.training.load_balance * balance,
            "unexplained_variance": self.loss / variance if variance else None,
        }


def _measured(weight: Tensor, decoder: Tensor | None) -> Tensor:
    return weight.detach() if decoder is None else balanced_weight(weight, decoder[0])


def _usage(held: _Evaluation, run: Run) -> Row:
    usage = expert_usage(held.ids, run.toy.n_experts)
    return {
        "usage": usage.tolist(),
        "effective_experts": float(effective_experts(usage)),
        "dead_experts": int(dead_experts(usage)),
        "load_imbalance": float(load_imbalance(usage)),
    }


def _geometry(held: _Evaluation, run: Run) -> Row:
    n_experts, k, m, m0 = run.toy.n_experts, run.toy.top_k, run.toy.n_hidden, run.toy.shared_hidden
    usage = expert_usage(held.ids, n_experts)
    folded = mean_active_gate(held.gates, held.ids, n_experts)
    gates = dense_gates(held.gates, held.ids, n_experts)
    experts = [feature_geometry(held.weight)]
    live = usage > 0
    always_on = 0.0
    if held.shared is not None:
        experts.append(feature_geometry(held.shared[None]))
        always_on = float(features_per_dimension(held.shared))
        one = torch.ones_like(usage[:1])
        live, folded = torch.cat([live, one > 0]), torch.cat([folded, one])
        gates = torch.cat([gates, torch.ones_like(gates[:, :1])], dim=1)
    norm, score, dimensionality = (
        torch.cat([getattr(part, name) for part in experts]) for name in ("norm", "superposition", "dimensionality")
    )
    monosemantic = torch.cat([part.monosemantic() for part in experts])[live]
    exists = (norm >= POLYSEMANTICITY_EPS)[live]
    found = represented_features(norm, gates, held.x)

    def per_dimension(weights: Tensor, n_counted: int) -> float:
        mixture = float(features_per_dimension(held.weight, weights))
        return (n_counted * m * mixture + m0 * always_on) / (n_counted * m + m0)

    return {
        "features_per_dimension": per_dimension(usage, k),
        "features_per_dimension_gate": per_dimension(gate_usage(held.gates, held.ids, n_experts), k),
        "features_per_dimension_folded": per_dimension(folded[:n_experts] / n_experts, n_experts),
        "mean_dimensionality": float(found.mean(dimensionality)),
        "represented_share": float(found.share),
        "superposition": float(found.mean(folded[:, None] * score)),
        "monosemantic_share": float(monosemantic.sum() / exists.sum().double()),
        "dead_features": int(found.dead_features),
        "dimensionality_histogram": dimensionality_histogram(dimensionality, found.carried)
        .sum(0)
        .round()
        .long()
        .tolist(),
    }


def _compute(run: Run) -> Row:
    flops = count_flops(run.toy, batch_size=run.training.batch_size)
    work = flops.training
    return {
        "active_flops": work.active.total,
        "executed_flops": work.executed.total,
        "dense_flops": work.dense_equivalent.total,
        "bytes": None if work.bytes is None else round(work.bytes.total),
        "parameters": flops.parameters,
        "active_parameters": flops.active_parameters,
        "total_width": flops.total_width,
        "active_width": flops.active_width,
    }


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
