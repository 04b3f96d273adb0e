"""Launcher of the ensembles' CPU twins: which compiled trainer takes which models, and the threads over models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from moesaic.kernels import toy_unrolled
from moesaic.kernels._extras import numba_twin
from moesaic.kernels._threads import in_parts
from moesaic.kernels.ensemble import GATES, EnsembleSettings, EnsembleShape
from moesaic.kernels.features import INDEPENDENT

_PARTS_PER_THREAD = 8  # so that parts of unequal cost even out


def launch(
    shape: EnsembleShape,
    settings: EnsembleSettings,
    state: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: Tensor,
    first_step: int,
) -> tuple[Tensor, Tensor]:
    """Do what `train_ensemble` says, on checked CPU tensors; ImportError without Numba."""
    twin = numba_twin("toy_grouped")
    losses, load_losses = torch.empty(lr.shape), torch.empty(lr.shape)
    kind, probability, size = settings.features.numpy()
    inputs = (
        state, exp_avg, exp_avg_sq, kind, settings.seeds, probability, size, settings.importance, settings.gate, lr,
        settings.weight_decay, settings.beta1, settings.beta2, settings.eps, settings.load_balance, settings.scale,
    )  # fmt: skip
    arrays = [array.numpy() if isinstance(array, Tensor) else array for array in inputs]
    arrays[4] = arrays[4].view(np.uint64)
    outputs = losses.numpy(), load_losses.numpy()
    threads = numba_twin("toy_cpu").get_num_threads()

    def train(trainer: Callable[..., None], sizes: tuple[int, ...], models: slice) -> None:
        trainer(*sizes, *(array[models] for array in arrays), first_step, *(array[models] for array in outputs))

    # Compiled code holds no lock; Numba's own parallel loops would double the compilation.
    jobs = []
    for trainer, sizes, first, last in _trainers(shape, settings, twin.train_models):
        part = -(-(last - first) // (_PARTS_PER_THREAD * threads))
        jobs += [(trainer, sizes, slice(at, min(last, at + part))) for at in range(first, last, part)]
    in_parts(lambda number: train(*jobs[number]), len(jobs), threads)
    return losses, load_losses


def _trainers(
    shape: EnsembleShape, settings: EnsembleSettings, general: Callable[..., None]
) -> Iterator[tuple[Callable[..., None], tuple[int, ...], int, int]]:
    """Give (trainer, its sizes, first model, last model + 1) of each run of neighbours that one trainer takes."""
    n, m, n_experts, k = shape.n_features, shape.n_hidden, shape.n_experts, shape.top_k
    sizes = (n, m, n_experts, k, shape.shared_hidden, shape.tied, shape.batch_size)
    small = toy_unrolled.fits(n, m, n_experts, shape.shared_hidden, shape.tied)
    kinds, balances = settings.features.kind.tolist(), (settings.load_balance != 0).tolist()
    gates = [GATES[gate] for gate in settings.gate.tolist()]
    keys = [
        ("frozen" if gate in ("random", "oracle") else gate, balanced) if small and kind == INDEPENDENT else None
        for kind, gate, balanced in zip(kinds, gates, balances, strict=True)
    ]
    first = 0
    for key, group in groupby(keys):
        last = first + len(list(group))
        if key is None:
            yield general, sizes, first, last
        else:
            yield toy_unrolled.unrolled_trainer(n, m, n_experts, k, *key), sizes[-1:], first, last
        first = last
