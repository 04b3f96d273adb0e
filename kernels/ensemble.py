"""Whole training of many small, independent toy models of one shape, in one call.

For each model and step: draw x, route, x' = [y_0] + Σ_e w_e ReLU(x W_e D_eᵀ + b_e), then AdamW on

    L = scale · Σ_b Σ_f I_f (x_bf − x'_bf)² + load_balance · E Σ_e f_e P_e

A model's state is one row of a flat (S, P) tensor, in the order of ``EnsembleShape.sections``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.kernels._accounting import Groups, Work, moved, record
from moesaic.kernels.features import INDEPENDENT, FeatureTable

_CPU = torch.device("cpu")
GATES = ("paper", "switch", "sigmoid", "straight_through", "random", "oracle")
FROZEN = ("random", "oracle")


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
    count. fp32 throughout. On a CPU samples lie along SIMD lanes and models are spread over threads; the smallest
    shapes have a compiled step of their own. On a GPU a model is a program: with its state in registers if it is small
    enough, else in memory, for at most ``ensemble_memory.LIMIT_BYTES`` bytes of state per model.

    Args:
        shape: the common sizes.
        settings: the per-model settings.
        state: (S, P) float32, contiguous, updated in place; its device is where the training runs.
        exp_avg: (S, P) float32, Adam's first moment, updated in place.
        exp_avg_sq: (S, P) float32, Adam's second moment, updated in place.
        lr: (S, steps) float64, learning rate of each step; on the CPU, like the settings.
        first_step: index of the first step, counted from 0: drives the samples and Adam's bias correction.

    Returns:
        (S, steps) float32 reconstruction losses and (S, steps) load-balance losses, on the device of ``state``.

    Raises:
        ValueError: naming the tensor whose shape, type or device does not fit, or the size that no kernel takes.
        ImportError: without Numba.
    """
    s, p, n = state.shape[0], shape.n_parameters, shape.n_features
    trained = {"state": state, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    expected = {
        **{name: (tensor, (s, p), torch.float32, state.device) for name, tensor in trained.items()},
        "lr": (lr, (s, lr.shape[-1]), torch.float64, _CPU),
        "importance": (settings.importance, (s, n), torch.float32, _CPU),
        "features.probability": (settings.features.probability, (s, n), torch.float32, _CPU),
        "gate": (settings.gate, (s,), torch.int64, _CPU),
        "seeds": (settings.seeds, (s,), torch.int64, _CPU),
        "scale": (settings.scale, (s,), torch.float32, _CPU),
        **{
            name: (getattr(settings, name), (s,), torch.float64, _CPU)
            for name in ("weight_decay", "beta1", "beta2", "eps", "load_balance")
        },
    }
    for name, (tensor, size, dtype, device) in expected.items():
        if (
            tuple(tensor.shape) != size
            or tensor.dtype != dtype
            or tensor.device != device
            or not tensor.is_contiguous()
        ):
            raise ValueError(
                f"{name}: takes a contiguous tensor {size} {dtype} on {device}, "
                f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
    _check_values(shape, settings)
    if not 0 <= first_step <= 2**32 - lr.shape[1]:
        raise ValueError(f"first_step={first_step}: takes an integer from 0 to 2**32 - steps")
    record("train_ensemble", lambda: _work(shape, settings, state, lr))
    args = (shape, settings, state, exp_avg, exp_avg_sq, lr, first_step)
    if state.device.type == "cpu":
        from moesaic.kernels import ensemble_cpu

        return ensemble_cpu.launch(*args)
    from moesaic.kernels import ensemble_memory, ensemble_registers

    with torch.cuda.device_of(state):  # Triton launches on the current device
        if ensemble_registers.fits(shape, settings):
            return ensemble_registers.launch(*args)
        ensemble_memory.check(shape, settings)
        return ensemble_memory.launch(*args)


def _work(shape: EnsembleShape, settings: EnsembleSettings, state: Tensor, lr: Tensor) -> tuple[int, Work]:
    """Encoding twice, decoding three times, a router once and once more if it is trained; executed at most.

    Bytes: state and moments are read and written once, or in every step where a GPU keeps them in memory; losses.
    """
    from moesaic.kernels import ensemble_registers

    steps, batch = lr.shape[1], shape.batch_size
    routed = [int(shape.n_experts > 1 or GATES[gate] == "sigmoid") for gate in settings.gate.tolist()]
    trained = [has and GATES[gate] not in FROZEN for has, gate in zip(routed, settings.gate.tolist(), strict=True)]
    router = 2 * steps * shape.n_features * batch * shape.n_experts * (sum(routed) + sum(trained))

    def flops(samples: int) -> int:
        width = samples * shape.n_hidden + batch * shape.shared_hidden
        return 10 * steps * len(routed) * shape.n_features * width + router

    worst = Groups(batch * shape.top_k, min(shape.n_experts, batch * shape.top_k))
    counts = [1] * (worst.touched - 1) + [worst.rows - worst.touched + 1]
    independent = bool((settings.features.kind == INDEPENDENT).all())
    trained_by = "triton" if state.is_cuda else "numba"
    executed = executed_samples(shape, counts, trained_by, independent=independent)
    passes = steps if state.is_cuda and not ensemble_registers.fits(shape, settings) else 1
    moves = 6 * passes * moved(state) + moved(settings.importance, settings.features.probability, lr) + 8 * lr.numel()
    return flops(batch * shape.top_k), Work(flops(executed), flops(batch * shape.n_experts), moves, bound=True)


def _check_values(shape: EnsembleShape, settings: EnsembleSettings) -> None:
    for name, least in (("n_features", 1), ("n_hidden", 1), ("n_experts", 1), ("batch_size", 1), ("shared_hidden", 0)):
        if getattr(shape, name) < least:
            raise ValueError(f"{name}={getattr(shape, name)!r}: takes an integer >= {least}")
    if not 1 <= shape.top_k <= shape.n_experts:
        raise ValueError(f"top_k={shape.top_k!r}: takes an integer from 1 to n_experts={shape.n_experts}")
    if bool(((settings.gate < 0) | (settings.gate >= len(GATES))).any()):
        raise ValueError(f"gate={settings.gate.tolist()}: takes indices into {GATES}")
    size = settings.gate.shape
    for name in ("kind", "size"):
        tensor = getattr(settings.features, name)
        if tensor.shape != size or tensor.dtype != torch.int64 or tensor.device != _CPU:
            raise ValueError(
                f"features.{name}: takes a tensor {tuple(size)} torch.int64 on cpu, "
                f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )


def has_gpu_kernel(shape: EnsembleShape, settings: EnsembleSettings) -> bool:
    """Whether `train_ensemble` takes these models on a GPU."""
    from moesaic.kernels import ensemble_memory, ensemble_registers

    return ensemble_registers.fits(shape, settings) or ensemble_memory.fits(shape, settings)


def executed_samples(
    shape: EnsembleShape, counts: Sequence[float], trained_by: str, *, independent: bool = True
) -> int:
    """Return the samples that the routed experts compute in one step, those masked and those that pad included.

    Up to three experts may be masked: each then computes every sample (on a GPU at most: with k = 1 it shares most of
    the work). Otherwise an expert computes its own samples in whole SIMD vectors (``numba``) or tiles (``triton``), or
    exactly its own (``torch``).

    Args:
        shape: the common sizes.
        counts: samples assigned to each expert, E of them, adding up to k·B.
        trained_by: ``numba``, ``triton`` or ``torch``.
        independent: whether features are independent; kernels that mask take only such.

    Raises:
        ValueError: for another name.
    """
    sizes = (shape.n_features, shape.n_hidden, shape.n_experts, shape.shared_hidden, shape.tied)
    if trained_by == "torch":
        return round(sum(counts))
    if trained_by == "numba":
        from moesaic.kernels import toy_unrolled

        masked, block = toy_unrolled.fits(*sizes), 16
    elif trained_by == "triton":
        from moesaic.kernels import ensemble_memory, ensemble_registers

        masked, block = ensemble_registers.fits_shape(shape), ensemble_memory.tiles(shape).samples
    else:
        raise ValueError(f"trained_by={trained_by!r}: takes numba, triton or torch")
    if masked and independent:
        return shape.n_experts * shape.batch_size
    return sum(math.ceil(count / block) * block for count in counts)
