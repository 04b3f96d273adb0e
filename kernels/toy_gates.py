"""The gates of the toy mixture of experts, from the router's scores."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.kernels.routing import route_topk


class Gates(NamedTuple):
    """Expert ids (..., k) by falling score, softmax of all scores (..., E), and the chosen experts' weights by gate."""

    ids: Tensor
    probs: Tensor
    weights: dict[str, Tensor]


def toy_gates(logits: Tensor, top_k: int) -> Gates:
    """Choose the k largest scores (ties: lowest id first) and weigh them, differentiably, by every gate of a toy model.

    With g = softmax(s) and S the chosen: ``paper``, ``random``, ``oracle`` g_e / Σ_{j ∈ S} g_j, ``switch`` g_e,
    ``sigmoid`` 1 / (1 + exp(−s_e)), ``straight_through`` the value of ``paper`` with the gradient of ``switch``.

    Args:
        logits: s, (..., E).
        top_k: k.

    Raises:
        ValueError: as `route_topk`.
    """
    probs = torch.softmax(logits, dim=-1)
    renormalised, ids = route_topk(logits, top_k, scoring="softmax_topk")
    picked = probs.gather(-1, ids)
    weights = {
        "paper": renormalised,
        "switch": picked,
        "sigmoid": torch.sigmoid(logits.gather(-1, ids)),
        "straight_through": renormalised.detach() + (picked - picked.detach()),
        "random": renormalised,
        "oracle": renormalised,
    }
    return Gates(ids, probs, weights)
