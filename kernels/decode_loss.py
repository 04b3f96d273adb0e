"""Decoding and its loss, without a batch × features tensor.

    x'_b = [ReLU(h⁰_b D_0ᵀ + b_0)] + Σ_j w_bj ReLU(h_bj D_eᵀ + b_e),  e = ids_bj     h (B, k, m), D (E, n, m), b (E, n)
    L = (1/B) Σ_b Σ_i I_i (x_bi − x'_bi)²

Features are taken in stripes; a stripe is decoded again in the backward pass instead of being kept. Whole training
steps, with AdamW and without a gradient of D, are `moesaic.kernels.feature_step`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moesaic.kernels.dispatch import combine, group_by_expert
from moesaic.kernels.encode_features import check_features
from moesaic.kernels.grouped_matmul import grouped_matmul


def _stripes(x: Tensor) -> Callable[[int, int], Tensor]:
    """Return a function from a range of features to that stripe of x, dense (B, stop − start)."""
    if x.layout == torch.strided:
        return lambda start, stop: x[:, start:stop]
    counts = x.crow_indices().diff()
    rows = torch.repeat_interleave(torch.arange(x.shape[0], device=x.device), counts)
    columns, order = x.col_indices().sort(stable=True)
    rows, values = rows[order], x.values()[order]

    def stripe(start: int, stop: int) -> Tensor:
        first, last = torch.searchsorted(columns, torch.tensor([start, stop], device=x.device)).tolist()
        out = values.new_zeros(x.shape[0], stop - start)
        out[rows[first:last], columns[first:last] - start] = values[first:last]
        return out

    return stripe


def _reconstruct(parts: list[Tensor | None], ids: Tensor | None) -> Tensor:
    """Return x' of a stripe from h, gates, D, b, h⁰, D_0, b_0, the matrices cut to the stripe."""
    h, gates, weight, bias, shared_h, shared_weight, shared_bias = parts
    assert h is not None
    assert weight is not None
    assert bias is not None
    if ids is None:
        out = torch.relu(torch.addmm(bias, h, weight.T))
    else:
        assert gates is not None
        grouping = group_by_expert(ids, weight.shape[0])
        rows = h.reshape(-1, h.shape[2])
        z = grouped_matmul(rows, weight.mT, grouping.offsets, bias=bias.contiguous(), gather=grouping.permutation)
        out = combine(torch.relu(z), gates, grouping)
    if shared_h is not None and shared_weight is not None and shared_bias is not None:
        out = out + torch.relu(torch.addmm(shared_bias, shared_h, shared_weight.T))
    return out


_FEATURE_AXIS = (None, None, -2, -1, None, 0, 0)
"""Where h, gates, D, b, h⁰, D_0 and b_0 have their features."""


def _cut(parts: list[Tensor | None], start: int, stop: int) -> list[Tensor | None]:
    return [
        part if axis is None or part is None else part.narrow(axis, start, stop - start)
        for part, axis in zip(parts, _FEATURE_AXIS, strict=True)
    ]


def _ranges(n_features: int, stripe: int) -> Iterator[tuple[int, int]]:
    for start in range(0, n_features, stripe):
        yield start, min(start + stripe, n_features)


class _DecodeLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, importance: Tensor, ids: Tensor | None, stripe: int, *parts: Tensor | None
    ) -> Tensor:
        target, given = _stripes(x), list(parts)
        loss = torch.zeros((), dtype=torch.float64, device=x.device)
        for start, stop in _ranges(x.shape[1], stripe):
            error = (_reconstruct(_cut(given, start, stop), ids) - target(start, stop)).square_()
            loss += (error.sum(0, dtype=torch.float64) * importance[start:stop]).sum()
        ctx.save_for_backward(x, importance, ids, *parts)
        ctx.stripe = stripe
        return (loss / max(1, x.shape[0])).to(importance.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, importance, ids, *parts = ctx.saved_tensors
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[4:]) if needed]
        target, scale = _stripes(x), 2 * grad / max(1, x.shape[0])
        gradients: list[Tensor | None] = [torch.zeros_like(p) if i in wanted else None for i, p in enumerate(parts)]
        for start, stop in _ranges(x.shape[1], ctx.stripe):
            leaves = [None if part is None else part.detach() for part in _cut(parts, start, stop)]
            asked = [leaf.requires_grad_() for i, leaf in enumerate(leaves) if i in wanted and leaf is not None]
            with torch.enable_grad():
                out = _reconstruct(leaves, ids)
            residual = (out.detach() - target(start, stop)).mul_(scale * importance[start:stop])
            found = torch.autograd.grad(out, asked, residual)
            cut = [part for part in _cut(gradients, start, stop) if part is not None]
            for total, one in zip(cut, found, strict=True):
                total += one
        return None, None, None, None, *gradients


def decode_loss(
    h: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    importance: Tensor | None = None,
    *,
    ids: Tensor | None = None,
    gates: Tensor | None = None,
    shared: tuple[Tensor, Tensor, Tensor] | None = None,
    stripe: int = 4096,
) -> Tensor:
    """Return L = (1/B) Σ_b Σ_i I_i (x_bi − x'_bi)², a scalar of the weight's type, accumulated in float64.

    x' = ReLU(h Dᵀ + b), or with ``ids`` the gated sum over each sample's experts, added before the square; and the
    shared expert's output. Differentiable in h, gates, weight, bias and the shared expert's three; for a tied model,
    the encoder's part of weight's gradient comes through h. Memory beyond inputs and gradients is O(B·k·stripe + nnz).

    Args:
        h: (B, m), or (B, k, m) with ``ids``.
        x: (B, n), dense or ``torch.sparse_csr`` without a column twice in a row; no gradient.
        weight: D (n, m), or (E, n, m) with ``ids``.
        bias: (n,), or (E, n) with ``ids``.
        importance: (n,), all ones if left out; no gradient.
        ids: (B, k) integers in 0 … E − 1.
        gates: (B, k), w; all ones if left out; only with ``ids``.
        shared: h⁰ (B, m_0), D_0 (n, m_0) and b_0 (n,) of an expert of every sample.
        stripe: features decoded at a time.

    Raises:
        ValueError: for shapes, types or a stripe that do not fit.
    """
    routed = ids is not None
    if weight.dim() != (3 if routed else 2):
        raise ValueError(f"weight: takes {'(E, n, m)' if routed else '(n, m)'}, got {tuple(weight.shape)}")
    check_features(x, weight[0] if routed else weight)
    n, m = weight.shape[-2:]
    batch = x.shape[0]
    if gates is not None and ids is None:
        raise ValueError("gates: takes None without ids")
    k = 0 if ids is None else ids.shape[-1]
    if ids is not None and gates is None:
        gates = torch.ones(ids.shape, dtype=weight.dtype, device=weight.device)
    importance = torch.ones(n, dtype=weight.dtype, device=weight.device) if importance is None else importance
    wanted: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "h": (h, (batch, k, m) if routed else (batch, m)),
        "bias": (bias, (weight.shape[0], n) if routed else (n,)),
        "importance": (importance, (n,)),
    }
    if ids is not None and gates is not None:
        if tuple(ids.shape) != (batch, k):
            raise ValueError(f"ids: takes ({batch}, k), got {tuple(ids.shape)}")
        wanted["gates"] = (gates, (batch, k))
    shared_h, shared_weight, shared_bias = shared or (None, None, None)
    if shared_h is not None and shared_weight is not None and shared_bias is not None:
        m0 = shared_h.shape[-1]
        wanted |= {
            "shared[0]": (shared_h, (batch, m0)),
            "shared[1]": (shared_weight, (n, m0)),
            "shared[2]": (shared_bias, (n,)),
        }
    for name, (tensor, size) in wanted.items():
        if tuple(tensor.shape) != size or tensor.dtype != weight.dtype:
            raise ValueError(f"{name}: takes {size} {weight.dtype}, got {tuple(tensor.shape)} {tensor.dtype}")
    if stripe < 1:
        raise ValueError(f"stripe={stripe}: takes an integer >= 1")
    loss: Tensor = _DecodeLoss.apply(
        x, importance, ids, stripe, h, gates, weight, bias, shared_h, shared_weight, shared_bias
    )
    return loss
