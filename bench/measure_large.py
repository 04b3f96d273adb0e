"""The row of a model with very many features: it trains here, is measured, and its steps are timed.

No tensor of batch × features exists: errors are summed in stripes, and what belongs to presences is taken over the
entries of the sparse held-out batch.
"""

from __future__ import annotations

import itertools
import math
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from moesaic.bench.interleave import clock
from moesaic.bench.measure import LAST_BATCHES, METRICS
from moesaic.bench.memory import peak_while
from moesaic.bench.plan import PlannedRun, Row
from moesaic.kernels.encode_features import encode_features
from moesaic.kernels.feature_route import Route
from moesaic.kernels.feature_step import feature_step
from moesaic.kernels.feature_training import FeatureState
from moesaic.metrics import balanced_weight, count_flops, dimensionality_histogram, feature_geometry
from moesaic.metrics.superposition import POLYSEMANTICITY_EPS, FeatureGeometry
from moesaic.metrics.usage import REPRESENTED_ABOVE
from moesaic.moe import (
    LargeEvaluation,
    LargeResult,
    Run,
    evaluate_large,
    feature_probabilities,
    importance,
    train_large,
)
from moesaic.moe.large import expected_active, held_out_sparse, large_shape, settings, sparse_batch, untrained_large

HELD_OUT = 1024
"""Samples of the held-out batch."""
ENOUGH = 1000
"""Expected activations in training from which on a feature can have been learned."""
LEARNED_BELOW = 0.5
"""Share of its variance that a feature's held-out error stays below if it was learned."""
TIMED_STEPS, MOST_TIMED_STEPS, TIMED_S = 3, 21, 1.0
"""Steps that are timed: at least so many, at most so many, and none more after a second."""
NEGATIVES = 4096
"""Features drawn by the sampled steps that are timed."""
GEOMETRY = ("mean_dimensionality", "superposition", "monosemantic_share")
LARGE_METRICS = (
    "null_loss", "untrained_loss", "untrained_unexplained_variance", "untrained_features_per_dimension", "step_s",
    "exact_step_s", "sampled_step_s", "n_frequent", "n_restricted", *(f"{name}_restricted" for name in GEOMETRY),
)  # fmt: skip
"""Columns besides `moesaic.bench.measure.METRICS`; all None in a failed row."""


def train_and_measure_large(
    item: PlannedRun, *, device: str, progress: Callable[[int, float], None], checkpoint: Path | None = None
) -> Row:
    """Train a planned run by `train_large` and return its row.

    Columns are those of `moesaic.bench.measure.measure`, on 1,024 held-out samples, without ``load_balance_loss``, and:

    ``null_loss``  that of predicting every feature's mean, from the distribution. (``unexplained_variance`` is over the
      same on the held-out samples, as everywhere: noise that both share cancels.)
    ``active_flops``  as everywhere: encoding multiplies all features. ``sparse_flops``: only the active ones, which is
      what the machine does; ``executed_flops`` are those with what is computed twice, ``bytes`` those that a step has
      to move, per sample.
    ``untrained_*``  of the model before its first step.
    ``step_s``  median seconds of a training step; ``exact_step_s`` and ``sampled_step_s`` the medians of three steps or
      more on the trained model, after it was measured and no part of its training; sampled with 4,096 negatives, None
      up to that many features and for moments in bfloat16.
    ``peak_memory_bytes``  most memory held while training beyond what was held before; None if the system does not say.
    ``n_frequent``  features with at least 1,000 expected activations in training, steps·B·p; ``n_restricted`` those of
      them whose held-out squared error is below half of their variance. ``*_restricted`` are the metrics over them.
    ``trained_by``  ``stripes`` (exact) or ``sampled``.

    Args:
        item: the run and its labels.
        device: where it is trained and measured.
        progress: as `train_large` wants it.
        checkpoint: as `train_large` wants it; removed by the caller.
    """
    with warnings.catch_warnings():
        # Advice on speed, said of every run.
        warnings.filterwarnings("ignore", ".*encoding multiplies dense stripes")
        return _train_and_measure(item, device, progress, checkpoint)


def _train_and_measure(
    item: PlannedRun, device: str, progress: Callable[[int, float], None], checkpoint: Path | None
) -> Row:
    run = item.run
    first = untrained_large(run, device)
    before = evaluate_large(run, first, n_samples=HELD_OUT)
    untrained = {
        "untrained_loss": before.loss / _divisor(run),
        "untrained_unexplained_variance": before.loss / _null(run, before),
        "untrained_features_per_dimension": _per_dimension(run, first, before)["features_per_dimension"],
    }
    del first
    result, peak = peak_while(
        partial(train_large, run, device=device, progress=progress, checkpoint=checkpoint), device
    )
    error, found = result.failed, dict.fromkeys((*METRICS, *LARGE_METRICS))
    if error is None:
        held = evaluate_large(run, result.state, n_samples=HELD_OUT)
        metrics = _metrics(result, held) | untrained
        metrics |= {f"{decode}_step_s": timed_step_s(result, device, decode) for decode in ("exact", "sampled")}
        found |= {name: _finite(value) for name, value in metrics.items()}
        if found["loss"] is None:
            error, found = f"held-out loss is {held.loss}", dict.fromkeys(found)
    return {
        "run_key": run.key, "status": "ok" if error is None else "failed", "error": error, **run.flat(), **item.labels,
        "trained_by": "sampled" if run.training.decode == "sampled" else "stripes", "device": device, **found,
        **compute(run), "peak_memory_bytes": peak, "wall_s": result.wall_s, "gpu_board_j": None, "cpu_package_j": None,
    }  # fmt: skip


@dataclass(frozen=True)
class Entries:
    """Presences of a held-out batch, and what the choices of their samples carry of each; (N, k') float64 but features.

    A shared expert is one more choice. features (N,) int64; carried: shares by contribution of represented presences.
    """

    features: Tensor
    dimensionality: Tensor
    superposition: Tensor
    carried: Tensor
    represented: Tensor

    def mean(self, values: Tensor, chosen: Tensor | None = None) -> float:
        """Return the mean over represented presences, of the ``chosen`` features (n,) only if given; NaN for none."""
        carried = self.carried if chosen is None else self.carried * chosen[self.features, None]
        total = float(carried.sum())
        return float(torch.where(carried > 0, carried * values, 0.0).sum()) / total if total else math.nan


def _metrics(result: LargeResult, held: LargeEvaluation) -> Row:
    run, state = result.run, result.state
    geometry = _geometry(state)
    entries = _entries(run, state, held, geometry)
    learned, frequent = restricted(run, held)
    features, seen = entries.features, entries.represented
    ever = torch.zeros(run.toy.n_features, dtype=torch.bool)
    ever[features[seen]] = True
    usage = held.usage.tolist()
    n, divisor = run.toy.n_features, _divisor(run)
    live = torch.cat([(held.usage > 0).cpu(), torch.ones(geometry.norm.shape[0] - run.toy.n_experts, dtype=torch.bool)])
    histogram = dimensionality_histogram(entries.dimensionality.flatten(), entries.carried.flatten())
    return {
        "loss": held.loss / divisor, "null_loss": held.null_loss / divisor,
        "unexplained_variance": held.loss / _null(run, held),
        "load_balance_loss": None,
        "train_loss": float(result.losses[-LAST_BATCHES:].mean()) if run.training.steps else None,
        **_per_dimension(run, state, held),
        "mean_dimensionality": entries.mean(entries.dimensionality),
        "superposition": entries.mean(entries.superposition),
        "monosemantic_share": _monosemantic(geometry, live, torch.ones(n, dtype=torch.bool)),
        "represented_share": float(seen.double().mean()) if len(seen) else math.nan,
        "dead_features": int(((held.present > 0) & ~ever).sum()),
        "dimensionality_histogram": histogram.round().long().tolist(),
        "usage": usage,
        "effective_experts": math.exp(-sum(u * math.log(u) for u in usage if u > 0)),
        "dead_experts": sum(u == 0 for u in usage),
        "load_imbalance": max(usage) * run.toy.n_experts,
        "step_s": result.median_step_s,
        "n_frequent": int(frequent.sum()), "n_restricted": int(learned.sum()),
        "mean_dimensionality_restricted": entries.mean(entries.dimensionality, learned),
        "superposition_restricted": entries.mean(entries.superposition, learned),
        "monosemantic_share_restricted": _monosemantic(geometry, live, learned),
    }  # fmt: skip


def restricted(run: Run, held: LargeEvaluation) -> tuple[Tensor, Tensor]:
    """Return which features were learned (n,) bool, and which were frequent enough in training for that."""
    expected = run.training.steps * run.training.batch_size * feature_probabilities(run.features, run.toy.n_features)
    frequent = expected.double() >= ENOUGH
    return frequent & (held.squared_error < LEARNED_BELOW * held.variance), frequent


def _divisor(run: Run) -> int:
    """What a loss is divided by where training takes the mean over features."""
    return run.toy.n_features if run.training.reduction == "mean" else 1


def _null(run: Run, held: LargeEvaluation) -> float:
    """What predicting every feature's mean loses on the held-out samples."""
    return float((importance(run.features, run.toy.n_features).double() * held.variance).sum())


def _per_dimension(run: Run, state: FeatureState, held: LargeEvaluation) -> dict[str, object]:
    """The three `features_per_dimension` columns, from norms alone."""
    toy, views = run.toy, state.shape.named(state.table)
    weights = [balanced(views["weight"], views.get("decoder"))]
    if toy.shared_hidden:
        weights.append(balanced(views["shared_weight"][None], _stacked(views.get("shared_decoder"))))
    strength = [weight.square().sum((1, 2), dtype=torch.float64).cpu() for weight in weights]
    shared = float(strength[1].sum()) if toy.shared_hidden else 0.0
    mean_gate = held.gate_sums / (held.usage * held.n_samples * toy.top_k).clamp(min=1)

    def counted(weigh: Tensor, count: int) -> float:
        return (count * float((weigh * strength[0]).sum()) + shared) / (count * toy.n_hidden + toy.shared_hidden)

    return {
        "features_per_dimension": counted(held.usage, toy.top_k),
        "features_per_dimension_gate": counted(held.gate_sums / (held.n_samples * toy.top_k), toy.top_k),
        "features_per_dimension_folded": counted(mean_gate / toy.n_experts, toy.n_experts),
    }


def balanced(weight: Tensor, decoder: Tensor | None) -> Tensor:
    """Return the weight by which an expert is measured; see `balanced_weight`."""
    return weight if decoder is None else balanced_weight(weight, decoder)


def _stacked(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor[None]


def _geometry(state: FeatureState) -> FeatureGeometry:
    """Return the geometry (E', n) of the experts, a shared one last, on the CPU."""
    views = state.shape.named(state.table)
    found = [feature_geometry(balanced(views["weight"], views.get("decoder")))]
    if state.shape.shared_hidden:
        found.append(feature_geometry(balanced(views["shared_weight"][None], _stacked(views.get("shared_decoder")))))
    return FeatureGeometry(
        *(torch.cat([value.cpu() for value in part]) for part in zip(*map(_values, found), strict=True))
    )


def _values(geometry: FeatureGeometry) -> tuple[Tensor, ...]:
    return geometry.norm, geometry.superposition, geometry.polysemanticity, geometry.dimensionality


def _entries(run: Run, state: FeatureState, held: LargeEvaluation, geometry: FeatureGeometry) -> Entries:
    device = str(state.table.device)
    x = held_out_sparse(run, held.n_samples, device)
    shape, views = state.shape, state.shape.named(state.table)
    logits = encode_features(x, views["router"].T) if shape.routed else None
    route = Route.of(logits, x.shape[0], shape, settings(run, device))
    ids, gates = route.ids.cpu(), route.assignment.gates[route.assignment.places].double().cpu()
    if shape.shared_hidden:
        ids = torch.cat([ids, torch.full_like(ids[:, :1], shape.n_experts)], 1)
        gates = torch.cat([gates, torch.ones_like(gates[:, :1])], 1)
    owner = torch.repeat_interleave(torch.arange(x.shape[0]), x.crow_indices().diff().cpu())
    features = x.col_indices().long().cpu()
    experts, gate = ids[owner], gates[owner]
    assigned = (held.usage * held.n_samples * shape.top_k).clamp(min=1)
    folded = torch.cat([held.gate_sums / assigned, torch.ones(geometry.norm.shape[0] - shape.n_experts)])
    at = (experts, features[:, None])
    part = gate * geometry.norm[at].square()
    gain = part.sum(1, keepdim=True)
    seen = gain[:, 0] > REPRESENTED_ABOVE
    carried = torch.where(seen[:, None], part / gain.clamp(min=REPRESENTED_ABOVE), 0.0)
    return Entries(features, geometry.dimensionality[at], folded[experts] * geometry.superposition[at], carried, seen)


def _monosemantic(geometry: FeatureGeometry, live: Tensor, chosen: Tensor) -> float:
    """Return the share of monosemantic ones of the (expert, feature) pairs that exist; NaN where none does."""
    exists = live[:, None] & (geometry.norm >= POLYSEMANTICITY_EPS) & chosen
    count = int(exists.sum())
    return int((exists & geometry.monosemantic()).sum()) / count if count else math.nan


def timed_step_s(result: LargeResult, device: str, decode: str) -> float | None:
    """Median seconds of a few steps on the trained model, whose learning rate is 0: it stays what it is."""
    run, trained = result.run, result.state
    n, sampled = run.toy.n_features, decode == "sampled"
    if sampled and (n <= NEGATIVES or trained.exp_avg.dtype != torch.float32):
        return None
    training = replace(
        settings(run, device), decode=decode, n_negatives=NEGATIVES if sampled else 0,
        lr=torch.zeros(MOST_TIMED_STEPS + 1, dtype=torch.float64),
    )  # fmt: skip
    seen = torch.zeros(n if sampled else 0, dtype=torch.int32, device=trained.table.device)
    state = FeatureState(trained.shape, trained.table, trained.exp_avg, trained.exp_avg_sq, seen)
    batches = [sparse_batch(run, run.training.steps + step, device=device) for step in range(TIMED_STEPS)]
    waiting = itertools.cycle(batches)
    step = clock(lambda _: feature_step(state, next(waiting), training), device)
    step(1)
    seconds: list[float] = []
    while len(seconds) < TIMED_STEPS or (sum(seconds) < TIMED_S and len(seconds) < MOST_TIMED_STEPS):
        seconds.append(step(1))
    return statistics.median(seconds)


def compute(run: Run) -> Row:
    """FLOPs and bytes of training, per sample, and sizes.

    With s active features per sample, C the features present in a batch of B, P columns of the table::

        sparse    exact 6·k·n·m + 4·s·(k·m + E)       sampled 6·k·(R + s)·m + 4·s·(k·m + E)
        executed  exact sparse + 4·k·C·m              sampled the same
        bytes     exact (24·n + 4·C)·P/B + 4·s·(k·m + E)       sampled 24·(R + C)·P/B + 4·s·(k·m + E)

    A shared expert's width m_0 is added to k·m; E is left out without a router.
    """
    toy, training = run.toy, run.training
    shape, batch, active = large_shape(toy), training.batch_size, expected_active(run)
    work = count_flops(toy, active_features=min(active, toy.n_features), batch_size=batch)
    present = present_features(run)
    width = toy.top_k * toy.n_hidden + toy.shared_hidden
    encode = (work.training.active.sparse_encode or 0.0) + (work.training.active.sparse_router or 0.0)
    gathered = 4 * active * (width + (toy.n_experts if shape.routed else 0))
    if training.decode == "sampled":
        sparse = executed = encode + 6 * width * (training.n_negatives + active)
        moved = 24 * min(toy.n_features, training.n_negatives + present) * shape.stride / batch + gathered
    else:
        sparse = encode + 6 * width * toy.n_features
        executed = sparse + 4 * width * present
        moved = (24 * toy.n_features + 4 * present) * shape.stride / batch + gathered
    return {
        "active_flops": work.training.active.total, "sparse_flops": round(sparse), "executed_flops": round(executed),
        "dense_flops": work.training.dense_equivalent.total, "bytes": round(moved), "parameters": work.parameters,
        "active_parameters": work.active_parameters, "total_width": work.total_width,
        "active_width": work.active_width,
    }  # fmt: skip


def sparse_flops(run: Run, decode: str) -> int:
    """``sparse_flops`` of an exact or a sampled step, whatever the run's own decoding."""
    training = replace(run.training, decode=decode, n_negatives=NEGATIVES if decode == "sampled" else 0, moments="fp32")
    flops = compute(replace(run, training=training))["sparse_flops"]
    assert isinstance(flops, int)
    return flops


def present_features(run: Run) -> float:
    """Expected number of distinct features in a batch, if samples have features independently; at most B·s."""
    p = feature_probabilities(run.features, run.toy.n_features).double()
    if run.features.features not in ("independent", "power_law"):
        return min(float(run.toy.n_features), run.training.batch_size * expected_active(run))
    return float(-torch.expm1(run.training.batch_size * torch.log1p(-p.clamp(max=1 - 1e-12))).sum())


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
