"""What the metrics of trained models are made of: sums over the held-out batch of their data, and feature geometry.

Everything is computed so that no bit of a model depends on what else is in its stack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import reduce

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesaic.bench.plan import FLOAT32_BYTES, HELD_OUT_SAMPLES
from moesaic.kernels import evaluate_ensemble
from moesaic.kernels.ensemble import GATES
from moesaic.metrics import balanced_weight, dense_gates, feature_geometry, represented_features
from moesaic.metrics.superposition import POLYSEMANTICITY_EPS, FeatureGeometry
from moesaic.metrics.usage import REPRESENTED_ABOVE
from moesaic.moe import FeatureConfig, Run, ToyModel, held_out
from moesaic.moe.toy import ensemble_shape

Array = NDArray[np.float64]

_TWIN_PRODUCTS = {"cpu": 2**18, "cuda": 2**14}
"""Most multiplications of a model per sample and pass for which the CPU twin is used: beyond, BLAS or the GPU wins."""
_BATCH_BYTES = 2**27  # of the held-out batches that exist at once
_BLOCK_ELEMENTS = 2**24  # of the (samples, k, n) outputs of the experts that exist at once
_FEW_FEATURES = 16  # up to this n, all pairs of features of a stack are cheaper than one Gram matrix at a time


@dataclass(frozen=True)
class Evaluation:
    """S models on their held-out batches of B samples; float64. A shared expert, if any, is the last of E' experts.

    Attributes:
        n_samples: B.
        present: #(x_bi ≠ 0), (S, n).
        variance: Var_b(x_bi), (S, n).
        squared_error, assignments, gate_sums, prob_sums, represented, carried: as in `EnsembleEvaluation`, with the
            presences that `represented_features` calls represented.
        norm, superposition, polysemanticity, dimensionality: as in `FeatureGeometry`, (S, E', n).
    """

    n_samples: int
    present: Array
    variance: Array
    squared_error: Array
    assignments: Array
    gate_sums: Array
    prob_sums: Array
    represented: Array
    carried: Array
    norm: Array
    superposition: Array
    polysemanticity: Array
    dimensionality: Array


@torch.no_grad()
def evaluate(model: ToyModel, chosen: Sequence[int], runs: Sequence[Run], device: str) -> Evaluation:
    """Evaluate the ``chosen`` models of a stack, at least one, which belong to ``runs``.

    Small models, also those trained on a GPU, are evaluated together by the CPU twin of ``evaluate_ensemble``; of more
    than 2¹⁸ multiplications per sample (2¹⁴ on a GPU), one after the other by PyTorch on ``device``.
    """
    toy = runs[0].toy
    products = toy.n_features * (toy.top_k * toy.n_hidden + toy.shared_hidden + toy.n_experts)
    if products > _TWIN_PRODUCTS["cpu" if torch.device(device).type == "cpu" else "cuda"]:
        return _joined([_by_torch(model.select(i).to(device), run) for i, run in zip(chosen, runs, strict=True)])
    return _by_twin(model, chosen, runs)


def _by_twin(model: ToyModel, chosen: Sequence[int], runs: Sequence[Run]) -> Evaluation:
    shape = ensemble_shape(runs[0].toy, runs[0].training.batch_size)
    parameters = {name: getattr(model, name).detach()[list(chosen)].cpu() for name in shape.sections()}
    state = torch.cat([value.flatten(1) for value in parameters.values()], dim=1)
    gate = torch.tensor([GATES.index(run.toy.gate) for run in runs])
    geometry = _geometry(parameters)
    found: dict[str, Array] = {}
    for models, which, data, x in _batches(runs):
        sums = evaluate_ensemble(
            shape, gate[models], state[models], x, which, geometry.norm[models].square(),
            represented_above=REPRESENTED_ABOVE,
        )  # fmt: skip
        part = {name: value.double().numpy() for name, value in vars(sums).items()}
        part |= {name: np.stack([one[name] for one in data])[which.numpy()] for name in data[0]}
        for name, value in part.items():
            found.setdefault(name, np.empty((len(runs), *value.shape[1:])))[models.numpy()] = value
    return Evaluation(
        n_samples=HELD_OUT_SAMPLES, **found, **{name: value.numpy() for name, value in vars(geometry).items()}
    )


def _batches(runs: Sequence[Run]) -> Iterator[tuple[Tensor, Tensor, list[dict[str, Array]], Tensor]]:
    """Yield models, which batch each of them has, sums of each batch, and batches (U, B, n); equal data share one."""
    members: dict[tuple[object, ...], list[int]] = {}
    for s, run in enumerate(runs):
        members.setdefault(_data_key(run.features), []).append(s)
    groups, n = list(members.values()), runs[0].toy.n_features
    size = max(1, _BATCH_BYTES // (FLOAT32_BYTES * HELD_OUT_SAMPLES * n))
    for start in range(0, len(groups), size):
        block = groups[start : start + size]
        # Stored as the CPU twin reads them, (U, n, B), which spares its copy.
        stored = torch.empty(len(block), n, HELD_OUT_SAMPLES)
        data = []
        for target, group in zip(stored, block, strict=True):
            x = held_out(runs[group[0]], HELD_OUT_SAMPLES)
            data.append(_of_data(x))
            target.copy_(x.T)
        which = torch.repeat_interleave(torch.arange(len(block)), torch.tensor([len(group) for group in block]))
        yield torch.tensor([s for group in block for s in group]), which, data, stored.transpose(1, 2)


def _data_key(features: FeatureConfig) -> tuple[object, ...]:
    """Everything that the samples depend on: importance only weighs their errors."""
    return tuple(value for name, value in vars(features).items() if not name.startswith("importance"))


def _of_data(x: Tensor) -> dict[str, Array]:
    variance = x.double().var(0, correction=0)
    return {"present": (x != 0).sum(0).double().cpu().numpy(), "variance": variance.cpu().numpy()}


def _by_torch(model: ToyModel, run: Run) -> Evaluation:
    """Evaluate a stack of one."""
    toy = run.toy
    x = held_out(run, HELD_OUT_SAMPLES).to(model.weight.device)
    squared = torch.zeros(toy.n_features, dtype=torch.float64, device=x.device)
    routings = []
    size = max(1, _BLOCK_ELEMENTS // (toy.top_k * toy.n_features))
    for start in range(0, len(x), size):
        part = x[start : start + size]
        routing = model.route(part)
        squared += (model.reconstruct(part[None], routing)[0] - part).double().square().sum(0)
        routings.append(routing)
    weights, ids, probs = (torch.cat(parts, dim=1)[0] for parts in zip(*routings, strict=True))
    gates = dense_gates(weights, ids, toy.n_experts)
    sums = {
        "squared_error": squared,
        "assignments": torch.bincount(ids.flatten(), minlength=toy.n_experts),
        "gate_sums": gates.sum(0),
        "prob_sums": probs.double().sum(0),
    }
    if toy.shared_hidden:
        gates = torch.cat([gates, torch.ones_like(gates[:, :1])], dim=1)
    geometry = _geometry({name: value.detach() for name, value in model.named_parameters()})
    found = represented_features(geometry.norm[0], gates, x)
    sums |= {"represented": found.represented, "carried": found.carried}
    return Evaluation(
        n_samples=len(x),
        **{name: value[None] for name, value in _of_data(x).items()},
        **{name: value.double().cpu().numpy()[None] for name, value in sums.items()},
        **{name: value.cpu().numpy() for name, value in vars(geometry).items()},
    )


def _joined(parts: Sequence[Evaluation]) -> Evaluation:
    names = [field.name for field in fields(Evaluation) if field.name != "n_samples"]
    return Evaluation(parts[0].n_samples, *(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def _geometry(parameters: dict[str, Tensor]) -> FeatureGeometry:
    """Return the geometry (S, E', n) of a stack's experts."""
    parts = [_geometry_of(parameters["weight"], parameters.get("decoder"))]
    if "shared_weight" in parameters:
        decoder = parameters.get("shared_decoder")
        parts.append(_geometry_of(parameters["shared_weight"][:, None], None if decoder is None else decoder[:, None]))
    return FeatureGeometry(
        *(torch.cat([getattr(part, field.name) for part in parts], dim=1) for field in fields(FeatureGeometry))
    )


def _geometry_of(weight: Tensor, decoder: Tensor | None) -> FeatureGeometry:
    if decoder is not None:
        weight = torch.stack([_balanced(*pair) for pair in zip(weight, decoder, strict=True)])
    if weight.shape[-2] <= _FEW_FEATURES:
        return _geometry_by_pairs(weight.double())
    # One model at a time: a batched product may round with the size of the batch, and `feature_geometry` sums directly
    # for as many features of every matrix as any matrix of the stack needs.
    each = [feature_geometry(one) for one in weight]
    return FeatureGeometry(
        *(torch.stack([getattr(one, field.name) for one in each]) for field in fields(FeatureGeometry))
    )


def _balanced(weight: Tensor, decoder: Tensor) -> Tensor:
    if not bool(weight.isfinite().all() and decoder.isfinite().all()):  # no singular values
        return torch.full_like(weight, torch.nan, dtype=torch.float64)
    return balanced_weight(weight, decoder)


def _geometry_by_pairs(weight: Tensor) -> FeatureGeometry:
    """Compute `feature_geometry` of a stack (S, E, n, m) by its definition: elementwise, sums term by term in order."""
    n = weight.shape[-2]
    square = reduce(torch.add, weight.square().unbind(-1))
    dot = reduce(torch.add, (column[..., :, None] * column[..., None, :] for column in weight.unbind(-1)))
    pairs = dot.square().masked_fill_(torch.eye(n, dtype=torch.bool, device=weight.device), 0.0)
    others = reduce(torch.add, pairs.unbind(-1)) / torch.where(square == 0, 1.0, square)
    norm = square.sqrt()
    return FeatureGeometry(
        norm=norm,
        superposition=others,
        polysemanticity=others.sqrt() * norm / (POLYSEMANTICITY_EPS + norm),
        dimensionality=square / (square + others),
    )
