"""One training step of a toy model with very many features, on a sparse batch: encode, route, decode, AdamW.

    L = scale · Σ_b Σ_i I_i (x'_bi − x_bi)² + load_balance · E Σ_e f_e P_e

``exact``    every feature is decoded: `stripes.sweep` and `stripes.finish`.
``sampled``  Σ_i I_i ReLU(z_i)² + Σ_{i active} I_i (x_i² − 2 x_i ReLU(z_i)) is L; the first sum is over R features, one
             drawn from each of R equal strata and weighted by its stratum's size; the active ones are exact. Unbiased,
             loss and gradient. Only the rows touched are updated; the others catch up later (`lazy_adamw`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moesaic.kernels._backend import uses_triton
from moesaic.kernels.encode_features import encode_features
from moesaic.kernels.feature_route import Route, encode
from moesaic.kernels.feature_state import AdamStep, Columns, FeatureShape
from moesaic.kernels.feature_training import FeatureState, FeatureTraining, StepLosses
from moesaic.kernels.philox import philox_uniform
from moesaic.kernels.sampled import sampled_step
from moesaic.kernels.stripes import PRECISIONS, finish, sweep

DECODES = ("exact", "sampled")
NEGATIVES_STREAM = 4
_ANYHOW = 8 << 20


def scratch_bytes(shape: FeatureShape, batch_size: int, n_entries: int, *, parts: int = 16, panel: int = 16) -> int:
    """Return a bound, in bytes, of what an exact step on a sparse batch takes on a CPU beyond state and batch.

    O(B·(m + E + 16) + nnz), with A = B·k places: 4·parts·(A·(m' + panel) + [m_0]·B·(m_0' + panel)) for sums to be
    joined, m' = m to a multiple of 16, about 4·parts·(B + 2 A + 8 P)·panel for the panels, 64 bytes per entry, 40·B·E
    for the router's scores, and 8 MiB for what PyTorch and its allocator keep anyhow. Not in it: the copy of a frozen
    router, and 64 MiB stripes of batches denser than `encode_features.CROSSOVER`.
    """
    wide, wide0 = (-(-width // panel) * panel for width in (shape.n_hidden, shape.shared_hidden))
    places, shared = batch_size * shape.top_k, batch_size * int(shape.shared_hidden > 0)
    sums = 4 * parts * (places * (wide + panel) + shared * (wide0 + panel))
    panels = 4 * parts * panel * (places + shared + batch_size + 8 * shape.stride)
    joined = 8 * 3 * (places * (wide + panel) + shared * (wide0 + panel))
    routing = 40 * batch_size * shape.n_experts
    return sums + panels + joined + routing + 64 * n_entries + 4 * places * shape.n_hidden + _ANYHOW


def feature_step(state: FeatureState, x: Tensor, training: FeatureTraining) -> StepLosses:
    """Train one step on a batch, in place.

    Exact steps on sparse batches have the same bits whatever the threads; where PyTorch multiplies, in sampled steps of
    one expert and above `encode_features.CROSSOVER`, as far as its products have.

    Args:
        state: the model; its step t is the next.
        x: (B, n) sparse CSR float32, B ≥ 1, no column twice in a row.
        training: the optimisation.

    Raises:
        ValueError: naming the argument, what it got and what it takes.
    """
    _check(state, x, training)
    shape = state.shape
    if training.decode == "sampled":
        losses = sampled_step(state, x, training, *_negatives(shape.n_features, training, state.step, x.device))
        state.step += 1
        return StepLosses(*losses)
    views = shape.named(state.table)
    logits = encode_features(x, views["router"].T).requires_grad_() if shape.routed else None
    route = Route.of(logits, x.shape[0], shape, training)
    h, shared_h = encode(shape, views, x, route)
    adam = AdamStep.at(
        state.step, lr=float(training.lr[state.step]), beta1=training.beta1, beta2=training.beta2, eps=training.eps,
        weight_decay=training.weight_decay,
    )  # fmt: skip
    columns = Columns.of(x)
    key = rounding_key(training.seed, state.step)
    options: Any = {"precision": training.precision, "stripe": training.stripe, "key": key}
    common = (
        shape, state.table, state.exp_avg, state.exp_avg_sq, h, shared_h, route.assignment, columns,
        training.importance, training.scale,
    )  # fmt: skip
    frozen = views["router"].clone() if state.frozen(training) else None
    swept = sweep(*common, adam, **options)
    dlogits = route.backward(swept.dgates)
    finish(*common, adam, swept.dh, swept.shared_dh, dlogits, **options)
    if frozen is not None:
        views["router"].copy_(frozen)
    state.step += 1
    return StepLosses(swept.loss, route.balance.detach().double())


def rounding_key(seed: int, step: int) -> int:
    """Return a 32-bit key that differs from step to step."""
    return (seed * 0x9E3779B1 + (step + 1) * 0x85EBCA77) & 0xFFFFFFFF


def _negatives(n: int, training: FeatureTraining, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return R features, one of each stratum, rising, and their strata's sizes."""
    edges = torch.arange(training.n_negatives + 1, device=device) * n // training.n_negatives
    sizes = edges.diff()
    seed = torch.tensor([training.seed], device=device)
    u = philox_uniform(seed, 1, training.n_negatives, step=step, stream=NEGATIVES_STREAM)[0, 0].double()
    return edges[:-1] + (u * sizes).long().clamp(max=sizes - 1), sizes.float()


def _check(state: FeatureState, x: Tensor, training: FeatureTraining) -> None:
    n = state.shape.n_features
    if x.layout != torch.sparse_csr or x.dim() != 2 or x.shape[1] != n or x.dtype != torch.float32:
        raise ValueError(f"x: takes float32 sparse_csr (B, {n}), got {x.layout} {x.dtype} {tuple(x.shape)}")
    if training.decode not in DECODES:
        raise ValueError(f"decode={training.decode!r}: takes one of {', '.join(DECODES)}")
    if training.precision not in PRECISIONS:
        raise ValueError(f"precision={training.precision!r}: takes one of {', '.join(PRECISIONS)}")
    if not uses_triton(state.table) and state.table.device.type != "cpu":
        raise ValueError(f"MOESAIC_BACKEND=cpu: takes a state on a CPU, got one on {state.table.device}")
    if state.step >= training.lr.shape[0]:
        raise ValueError(f"lr: has {training.lr.shape[0]} steps, all done; got step {state.step}")
    importance = training.importance
    if tuple(importance.shape) != (n,) or importance.dtype != torch.float32 or importance.device != state.table.device:
        raise ValueError(
            f"importance: takes float32 ({n},) on {state.table.device}, got {importance.dtype} "
            f"{tuple(importance.shape)} on {importance.device}"
        )
    if state.exp_avg.dtype not in (torch.float32, torch.bfloat16) or state.exp_avg_sq.dtype != state.exp_avg.dtype:
        raise ValueError(
            f"exp_avg, exp_avg_sq: take float32 or bfloat16, both, got {state.exp_avg.dtype}, {state.exp_avg_sq.dtype}"
        )
    if training.precision == "tf32x3" and state.table.device.type == "cpu":
        raise ValueError("precision='tf32x3': takes a state on a GPU; on a CPU, 'ieee' or 'bf16'")
    if x.shape[0] < 1:
        raise ValueError("x: takes at least one sample, got 0")
    if training.decode != "sampled":
        if state.seen.shape[0]:
            raise ValueError("seen: takes a state made with decode='exact', whose rows never wait")
        return
    if training.precision != "ieee":
        raise ValueError(f"precision={training.precision!r}: takes 'ieee' when decode='sampled'")
    if not 1 <= training.n_negatives <= n:
        raise ValueError(f"n_negatives={training.n_negatives}: takes 1 to n_features={n} when decode='sampled'")
    if state.exp_avg.dtype != torch.float32:
        raise ValueError(f"exp_avg: takes float32 when decode='sampled', got {state.exp_avg.dtype}")
    if state.seen.shape[0] != n:
        raise ValueError("seen: takes a state made with decode='sampled'")
