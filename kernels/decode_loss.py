"""Decoding and its loss, without a batch × features tensor.

    z = h Wᵀ + b,   L = (1/B) Σ_b Σ_i I_i (x_bi − ReLU(z_bi))²          h (B, m), W (n, m), b (n), x (B, n)

    G = (2/B) I (ReLU(z) − x) 1[z > 0],   dh = G W,   dW = Gᵀ h,   db = Σ_b G_b

Features are taken in stripes; a stripe is decoded again in the backward pass instead of being kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moesaic.kernels.encode_features import check_features


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


class _DecodeLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, x: Tensor, weight: Tensor, bias: Tensor, importance: Tensor, stripe: int
    ) -> Tensor:
        target, loss = _stripes(x), h.new_zeros((), dtype=torch.float64)
        for start in range(0, weight.shape[0], stripe):
            at = slice(start, start + stripe)
            y = torch.relu(torch.addmm(bias[at], h, weight[at].T))
            error = (y - target(start, start + y.shape[1])).square_().sum(0, dtype=torch.float64)
            loss += (error * importance[at]).sum()
        ctx.save_for_backward(h, x, weight, bias, importance)
        ctx.stripe = stripe
        return (loss / max(1, h.shape[0])).to(h.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None, None]:
        h, x, weight, bias, importance = ctx.saved_tensors
        need_h, _, need_weight, need_bias, *_ = ctx.needs_input_grad
        target, scale = _stripes(x), 2 * grad / max(1, h.shape[0])
        dh = torch.zeros_like(h) if need_h else None
        dw = torch.empty_like(weight) if need_weight else None
        db = torch.empty_like(bias) if need_bias else None
        for start in range(0, weight.shape[0], ctx.stripe):
            at = slice(start, start + ctx.stripe)
            y = torch.relu(torch.addmm(bias[at], h, weight[at].T))
            g = (y - target(start, start + y.shape[1])) * (y > 0) * (scale * importance[at])
            if dh is not None:
                dh.addmm_(g, weight[at])
            if dw is not None:
                torch.mm(g.T, h, out=dw[at])
            if db is not None:
                torch.sum(g, 0, out=db[at])
        return dh, None, dw, db, None, None


def decode_loss(
    h: Tensor, x: Tensor, weight: Tensor, bias: Tensor, importance: Tensor | None = None, *, stripe: int = 4096
) -> Tensor:
    """Return L = (1/B) Σ_b Σ_i I_i (x_bi − ReLU(h_b · W_i + b_i))², a scalar of h's type, accumulated in float64.

    Differentiable in h, weight and bias; for a tied model, the encoder's part of weight's gradient comes through h.
    Memory beyond inputs and gradients is O(B · stripe + nnz).

    Args:
        h: (B, m).
        x: (B, n), dense or ``torch.sparse_csr``; no gradient.
        weight: (n, m).
        bias: (n,).
        importance: (n,), all ones if left out; no gradient.
        stripe: features decoded at a time.

    Raises:
        ValueError: for shapes, types or a stripe that do not fit.
    """
    check_features(x, weight)
    importance = torch.ones_like(bias) if importance is None else importance
    n, m = weight.shape
    wanted = {"h": (h, (x.shape[0], m)), "bias": (bias, (n,)), "importance": (importance, (n,))}
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape or tensor.dtype != weight.dtype:
            raise ValueError(f"{name}: takes {shape} {weight.dtype}, got {tuple(tensor.shape)} {tensor.dtype}")
    if stripe < 1:
        raise ValueError(f"stripe={stripe}: takes an integer >= 1")
    loss: Tensor = _DecodeLoss.apply(h, x, weight, bias, importance, stripe)
    return loss
