"""Whole training of many small, independent toy models of one shape, in one call.

For each model and step: draw x, route, x' = [y_0] + Σ_e w_e ReLU(x W_e D_eᵀ + b_e), then AdamW on

    L = scale · Σ_b Σ_f I_f (x_bf − x'_bf)² + load_balance · E Σ_e f_e P_e

A model's state is one row of a flat (S, P) tensor, in the order of ``EnsembleShape.sections``.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.kernels._extras import numba_twin
from moesaic.kernels.features import FeatureTable

GATES = ("paper", "switch", "sigmoid", "straight_through", "random", "oracle")


@dataclass(frozen=True)
class EnsembleShape:
    """Sizes that all models of a stack share: n, m, E, k, the shared expert's width m_0 (0: none), tied, batch."""

    n_features: int
    n_hidden: int
    n_experts: int
    top_k: int
    shared_hidden: int
    tied: bool
    batch_size: int

    def sections(self) -> dict[str, tuple[int, ...]]:
        """Return name → shape of each parameter tensor in the flat state, in order."""
        n, m, e, m0 = self.n_features, self.n_hidden, self.n_experts, self.shared_hidden
        shapes: dict[str, tuple[int, ...]] = {"weight": (e, n, m)}
        if not self.tied:
            shapes["decoder"] = (e, n, m)
        shapes |= {"bias": (e, n), "router": (e, n)}
        if m0:
            shapes["shared_weight"] = (n, m0)
            if not self.tied:
                shapes["shared_decoder"] = (n, m0)
            shapes["shared_bias"] = (n,)
        return shapes

    @property
    def n_parameters(self) -> int:
        """P, the length of one model's flat state."""
        return sum(torch.Size(shape).numel() for shape in self.sections().values())

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Return views (S, …) of the flat state (S, P), by section name."""
        views, start = {}, 0
        for name, shape in self.sections().items():
            size = torch.Size(shape).numel()
            views[name] = flat[:, start : start + size].view(flat.shape[0], *shape)
            start += size
        return views


@dataclass(frozen=True)
class EnsembleSettings:
    """Per-model settings of S models; each tensor has S as its first axis.

    Attributes:
        features: distributions of x.
        importance: (S, n) float32, I.
        gate: (S,) int64, index into ``GATES``.
        seeds: (S,) int64, keys of the training samples.
        weight_decay, beta1, beta2, eps, load_balance: (S,) float64.
        scale: (S,) float32, factor of the summed squared error: 1/B for a sum over features, 1/(B·n) for a mean.
    """

    features: FeatureTable
    importance: Tensor
    gate: Tensor
    seeds: Tensor
    weight_decay: Tensor
    beta1: Tensor
    beta2: Tensor
    eps: Tensor
    load_balance: Tensor
    scale: Tensor


def train_ensemble(
    shape: EnsembleShape,
    settings: EnsembleSettings,
    state: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: Tensor,
    *,
    first_step: int = 0,
) -> tuple[Tensor, Tensor]:
    """Train S models for lr.shape[1] steps in place, each from its own samples, and return the training losses.

    The result of a model depends neither on the other models, nor on how many steps one call covers, nor on the thread
    count. CPU only so far, fp32, one thread per model at a time; memory beyond the state is about 6·P + B·(n + E)
    floats per thread.

    Args:
        shape: the common sizes.
        settings: the per-model settings.
        state: (S, P) float32, contiguous, updated in place.
        exp_avg: (S, P) float32, Adam's first moment, updated in place.
        exp_avg_sq: (S, P) float32, Adam's second moment, updated in place.
        lr: (S, steps) float64, learning rate of each step.
        first_step: index of the first step, counted from 0: drives the samples and Adam's bias correction.

    Returns:
        (S, steps) float32 reconstruction losses and (S, steps) load-balance losses.

    Raises:
        ValueError: naming the tensor whose shape, type or device does not fit.
        ImportError: without Numba.
    """
    s, p, n = state.shape[0], shape.n_parameters, shape.n_features
    expected = {
        "state": (state, (s, p), torch.float32),
        "exp_avg": (exp_avg, (s, p), torch.float32),
        "exp_avg_sq": (exp_avg_sq, (s, p), torch.float32),
        "lr": (lr, (s, lr.shape[-1]), torch.float64),
        "importance": (settings.importance, (s, n), torch.float32),
        "features.probability": (settings.features.probability, (s, n), torch.float32),
        "gate": (settings.gate, (s,), torch.int64),
        "seeds": (settings.seeds, (s,), torch.int64),
        "scale": (settings.scale, (s,), torch.float32),
        **{
            name: (getattr(settings, name), (s,), torch.float64)
            for name in ("weight_decay", "beta1", "beta2", "eps", "load_balance")
        },
    }
    for name, (tensor, size, dtype) in expected.items():
        if (
            tuple(tensor.shape) != size
            or tensor.dtype != dtype
            or tensor.device.type != "cpu"
            or not tensor.is_contiguous()
        ):
            raise ValueError(
                f"{name}: takes a contiguous CPU tensor {size} {dtype}, "
                f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
    if not 0 <= first_step <= 2**32 - lr.shape[1]:
        raise ValueError(f"first_step={first_step}: takes an integer from 0 to 2**32 - steps")
    losses, load_losses = torch.empty(s, lr.shape[1]), torch.empty(s, lr.shape[1])
    kind, probability, size = settings.features.numpy()
    twin = numba_twin("toy_cpu")
    sizes = (n, shape.n_hidden, shape.n_experts, shape.top_k, shape.shared_hidden, shape.tied, shape.batch_size)
    seeds = settings.seeds.numpy().view("uint64")
    numbers = (
        settings.weight_decay,
        settings.beta1,
        settings.beta2,
        settings.eps,
        settings.load_balance,
        settings.scale,
    )
    per_model = [
        *(tensor.numpy() for tensor in (state, exp_avg, exp_avg_sq)), kind, seeds, probability, size,
        *(tensor.numpy() for tensor in (settings.importance, settings.gate, lr, *numbers)),
    ]  # fmt: skip
    outputs = losses.numpy(), load_losses.numpy()

    def train(model: int) -> None:
        twin.train_model(
            *sizes, *(array[model] for array in per_model), first_step, *(array[model] for array in outputs)
        )

    # Compiled code holds no lock; Numba's own parallel loops would double the compilation.
    with ThreadPoolExecutor(max(1, min(s, twin.get_num_threads()))) as pool:
        for done in [pool.submit(train, model) for model in range(s)]:
            done.result()
    return losses, load_losses
