"""Top-k routing: logits to gate weights and expert ids, with a defined order among ties.

    s = softmax(l) | σ(l) | l                     score of every expert (l: logits)
    A = top-k of s + bias, lowest id first        (inside the best groups, if grouped)
    w = s_A, over its sum if renormalised, times scale

The bias picks but does not weigh (auxiliary-loss-free balancing, arXiv:2408.15664); groups as in DeepSeek-V2, V3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SCORINGS = ("softmax", "softmax_topk", "sigmoid")
GROUP_SCORES = ("top2", "max")


class Routing(NamedTuple):
    """Where every token goes: gate weights (..., k) and expert ids (..., k) int64, best first."""

    weights: Tensor
    ids: Tensor


def _check(
    logits: Tensor,
    top_k: int,
    scoring: str,
    bias: Tensor | None,
    n_groups: int | None,
    top_k_groups: int | None,
    group_score: str,
) -> None:
    if logits.ndim < 1 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating point (..., E), got {logits.dtype} {tuple(logits.shape)}")
    n_experts = logits.shape[-1]
    if not 1 <= n_experts < 2**31:
        raise ValueError(f"logits must have 1 to 2^31 - 1 experts in the last dimension, got {n_experts}")
    if not 1 <= top_k <= n_experts:
        raise ValueError(f"top_k must be between 1 and n_experts = {n_experts}, got {top_k}")
    if scoring not in SCORINGS:
        raise ValueError(f"scoring must be one of {', '.join(SCORINGS)}, got {scoring!r}")
    if bias is not None and bias.shape != (n_experts,):
        raise ValueError(f"bias must have shape ({n_experts},), got {tuple(bias.shape)}")
    if (n_groups is None) != (top_k_groups is None):
        raise ValueError(f"n_groups and top_k_groups go together, got n_groups={n_groups}, top_k_groups={top_k_groups}")
    if n_groups is None or top_k_groups is None:
        return
    if n_groups < 1 or n_experts % n_groups:
        raise ValueError(f"n_groups must divide n_experts = {n_experts}, got {n_groups}")
    if not 1 <= top_k_groups <= n_groups:
        raise ValueError(f"top_k_groups must be between 1 and n_groups = {n_groups}, got {top_k_groups}")
    size = n_experts // n_groups
    if top_k > top_k_groups * size:
        raise ValueError(f"top_k must be at most top_k_groups × group size = {top_k_groups * size}, got {top_k}")
    if group_score not in GROUP_SCORES:
        raise ValueError(f"group_score must be one of {', '.join(GROUP_SCORES)}, got {group_score!r}")
    if group_score == "top2" and size < 2:
        raise ValueError(f"group_score 'top2' takes groups of at least 2 experts, got groups of {size}")


def _first_topk(values: Tensor, k: int) -> Tensor:
    """Ids of the k largest along the last dimension, equal values in order of id (`torch.topk` promises no order)."""
    if values.dtype == torch.float64:
        return torch.sort(values, dim=-1, descending=True, stable=True).indices[..., :k]
    # One int64 key per entry: the float's bits in an order-keeping form above, the reversed id below. All keys differ,
    # so top-k has one answer. Adding 0 makes -0 equal to +0.
    bits = (values + 0.0).view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    last = values.shape[-1] - 1
    keys = (ordered << 32) | torch.arange(last, -1, -1, device=values.device)
    return last - (torch.topk(keys, k, dim=-1).values & 0xFFFFFFFF)


def _pick(values: Tensor, top_k: int, n_groups: int | None, top_k_groups: int | None, group_score: str) -> Tensor:
    if n_groups is None or top_k_groups is None or n_groups == top_k_groups:
        return _first_topk(values, top_k)
    grouped = values.view(*values.shape[:-1], n_groups, values.shape[-1] // n_groups)
    scores = grouped.topk(2, dim=-1).values.sum(-1) if group_score == "top2" else grouped.amax(-1)
    groups = _first_topk(scores, top_k_groups).sort(-1).values
    size = grouped.shape[-1]
    inside = torch.gather(grouped, -2, groups.unsqueeze(-1).expand(*groups.shape, size)).flatten(-2)
    local = _first_topk(inside, top_k)
    ids: Tensor = torch.gather(groups, -1, local // size) * size + local % size
    return ids


def route_topk(
    logits: Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    bias: Tensor | None = None,
    n_groups: int | None = None,
    top_k_groups: int | None = None,
    group_score: str = "top2",
    renormalize: bool = False,
    scale: float = 1.0,
) -> Routing:
    """Pick the k best experts of every token and weigh them: `A = topk(s + bias)`, `w = scale · s_A [/ Σ s_A]`.

    Among equal scores the lowest id wins and comes first, always. A row with a NaN (in its logits, or in the bias) gets
    NaN weights in all k places and ids 0…k−1: it is never sent quietly to an expert. −inf masks an expert; +inf under
    softmax gives NaN weights. Arithmetic is float32, or float64 for float64 logits. Differentiable in `logits`.

    Args:
        logits: (..., E) floating point; no rows are fine.
        top_k: k, experts per row, 1 to E.
        scoring: `"softmax"` over all E; `"softmax_topk"`, over the k picked; or `"sigmoid"`.
        bias: (E,) added to the scores (for `softmax_topk` to the logits) for picking only; it gets no gradient.
        n_groups: E is cut into this many equal groups in order of id, and only `top_k_groups` of them take part.
        top_k_groups: groups taken per row; among equal groups the lowest first.
        group_score: a group's score: `"top2"`, the sum of its best two (DeepSeek-V3), or `"max"` (DeepSeek-V2).
        renormalize: divide the k weights by their sum (plus 1e-20).
        scale: multiplies the weights.

    Returns:
        `Routing(weights, ids)`: weights (..., k) float32 or float64, ids (..., k) int64, best first.

    Raises:
        ValueError: naming the argument, its value and what it takes.
    """
    _check(logits, top_k, scoring, bias, n_groups, top_k_groups, group_score)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = _scores(logits, scoring)
    # Logits rank as their scores do and do not saturate; scores matter only where a bias or a sum of two is added.
    by_score = bias is not None or (n_groups is not None and group_score == "top2")
    values = (scores if by_score else logits).detach()
    if bias is not None:
        values = values + bias.detach()
    ids = _pick(values, top_k, n_groups, top_k_groups, group_score)
    is_nan = torch.isnan(values.amax(-1, keepdim=True))
    ids = torch.where(is_nan, torch.arange(top_k, device=ids.device), ids)
    weights = torch.gather(scores, -1, ids)
    if scoring == "softmax_topk":
        weights = torch.softmax(weights, dim=-1)
    if renormalize:
        # w/w is 1, and its gradient 0: computed, it would be rounding noise, which Adam blows up to full steps.
        weights = weights * 0 + 1 if top_k == 1 else weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return Routing(weights * scale * torch.where(is_nan, torch.nan, 1.0), ids)


def _scores(logits: Tensor, scoring: str) -> Tensor:
    if scoring == "softmax":
        return torch.softmax(logits, dim=-1)
    return torch.sigmoid(logits) if scoring == "sigmoid" else logits


def load_balance_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Switch load-balance loss `E · Σ_e f_e P_e`: 1 when balanced, E when one expert takes everything.

    f_e is the share of the T·k choices that went to expert e (no gradient), P_e the mean over tokens of
    softmax(logits)_e. Choices outside 0…E−1 are not counted in f. No tokens give 0. Fedus et al. 2021,
    arXiv:2101.03961, equation 4, with f over all k choices.

    Args:
        logits: (..., E).
        ids: (..., k) expert ids from `route_topk` on the same logits.

    Returns:
        A scalar, float32 or float64.
    """
    n_experts = logits.shape[-1]
    probs = torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1).reshape(-1, n_experts)
    chosen = ids.reshape(-1)
    inside = (chosen >= 0) & (chosen < n_experts)
    counts = torch.zeros(n_experts, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, chosen.clamp(0, n_experts - 1), inside.to(torch.int64))
    share = counts.to(probs.dtype) / max(chosen.numel(), 1)
    return n_experts * (share * probs.sum(0)).sum() / max(probs.shape[0], 1)
