"""Routing and encoding of a sparse batch by a toy model with very many features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.kernels.dispatch import group_by_expert
from moesaic.kernels.encode_features import encode_features
from moesaic.kernels.feature_state import Assignment, FeatureShape
from moesaic.kernels.feature_training import FeatureTraining
from moesaic.kernels.toy_gates import toy_gates


def encode(shape: FeatureShape, views: dict[str, Tensor], x: Tensor, route: Route) -> tuple[Tensor, Tensor | None]:
    """Return h (A, m) in the order of the assignment, and the shared expert's (B, m_0) or None."""
    ids = route.ids if shape.n_experts > 1 else torch.zeros(x.shape[0], 1, dtype=torch.int64, device=x.device)
    h = encode_features(x, views["weight"], ids)
    # Places run through experts; slot b·k + j of a sample lies at the place of its choice.
    order = torch.empty_like(route.assignment.samples)
    order[route.assignment.places.reshape(-1)] = torch.arange(order.shape[0], device=x.device)
    shared = encode_features(x, views["shared_weight"]) if shape.shared_hidden else None
    return h.reshape(-1, shape.n_hidden)[order].contiguous(), shared


@dataclass(frozen=True)
class Route:
    """Where the samples of a batch go, and what the router's scores owe to the loss.

    ids (B, k); balance: the load-balance term; logits (B, E) and weights (B, k), linked for gradients, or None.
    """

    ids: Tensor
    assignment: Assignment
    balance: Tensor
    logits: Tensor | None
    weights: Tensor | None

    @classmethod
    def of(cls, logits: Tensor | None, batch: int, shape: FeatureShape, training: FeatureTraining) -> Route:
        """Route by scores (B, E) that ask for a gradient, or all samples to the one expert."""
        device = training.importance.device
        if logits is None:
            line = torch.arange(batch, device=device)
            one = Assignment(
                torch.tensor([0, batch], device=device), line, torch.ones(batch, device=device), line[:, None]
            )
            return cls(torch.zeros_like(line)[:, None], one, torch.zeros((), device=device), None, None)
        gates = toy_gates(logits, shape.top_k)
        weights = gates.weights[training.gate]
        grouping = group_by_expert(gates.ids, shape.n_experts)
        samples = grouping.permutation // shape.top_k
        values = weights.detach().reshape(-1)[grouping.permutation].float()
        balance = logits.new_zeros(())
        if training.load_balance:
            load = grouping.counts.to(logits.dtype) / max(1, batch * shape.top_k)
            balance = training.load_balance * shape.n_experts * (load * gates.probs.mean(0)).sum()
        assignment = Assignment(grouping.offsets, samples, values, grouping.inverse.view(batch, shape.top_k))
        return cls(gates.ids, assignment, balance, logits, weights)

    def backward(self, dgates: Tensor) -> Tensor | None:
        """Return the gradient (B, E) of the scores from that of the weights, by place; None for no router."""
        if self.logits is None or self.weights is None:
            return None
        upstream = dgates[self.assignment.places].to(self.weights.dtype)
        total = (self.weights * upstream).sum() + self.balance
        if not total.requires_grad:
            return torch.zeros_like(self.logits)
        (grad,) = torch.autograd.grad(total, self.logits)
        return grad
