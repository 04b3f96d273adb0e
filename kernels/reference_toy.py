"""Plain-PyTorch oracles of the toy-model ops, any float dtype: every expert is computed everywhere, then masked."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def encode_features(x: Tensor, weight: Tensor) -> Tensor:
    """Return h = x W."""
    return x @ weight


def decode_loss(h: Tensor, x: Tensor, weight: Tensor, bias: Tensor, importance: Tensor | None = None) -> Tensor:
    """Return L = (1/B) Σ_b Σ_i I_i (x_bi − ReLU(h_b · W_i + b_i))²."""
    error = (x - torch.relu(h @ weight.T + bias)).square()
    return (error if importance is None else error * importance).sum() / x.shape[0]


def toy_loss(
    parameters: Mapping[str, Tensor],
    x: Tensor,
    *,
    top_k: int,
    gate: str = "paper",
    importance: Tensor | None = None,
    load_balance: float = 0.0,
    mean: bool = False,
) -> tuple[Tensor, Tensor]:
    """Reconstruction and load-balance loss of one toy model, by the equations of ``ToyConfig`` and ``TrainConfig``.

    Args:
        parameters: sections of one model: weight (E, n, m), bias (E, n), router (E, n), and decoder, shared_* where it
            has them.
        x: (B, n).
        top_k: k.
        gate: the gate's name.
        importance: (n,).
        load_balance: the coefficient.
        mean: divide by n as well as by B.
    """
    weight = parameters["weight"]
    scores = x @ parameters["router"].T
    probs = torch.softmax(scores, -1)
    chosen = torch.zeros_like(probs)
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :top_k]
    chosen.scatter_(1, order, 1.0)
    renormalised = probs * chosen / (probs * chosen).sum(-1, keepdim=True)
    straight = renormalised.detach() + (probs - probs.detach()) * chosen
    weights = {"switch": probs * chosen, "sigmoid": torch.sigmoid(scores) * chosen, "straight_through": straight}.get(
        gate, renormalised
    )
    out = torch.zeros_like(x)
    for e in range(weight.shape[0]):
        decoder = parameters.get("decoder", weight)[e]
        out = out + weights[:, e : e + 1] * torch.relu(x @ weight[e] @ decoder.T + parameters["bias"][e])
    if "shared_weight" in parameters:
        decoder = parameters.get("shared_decoder", parameters["shared_weight"])
        out = out + torch.relu(x @ parameters["shared_weight"] @ decoder.T + parameters["shared_bias"])
    error = (x - out).square() * (1.0 if importance is None else importance)
    load = chosen.sum(0) / (x.shape[0] * top_k)
    balance = load_balance * weight.shape[0] * (load * probs.mean(0)).sum()
    return error.sum() / (x.numel() if mean else x.shape[0]), balance
