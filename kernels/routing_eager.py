"""Top-k routing in plain PyTorch, for any device and float64: what the fused ops fall back to."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.kernels.routing_options import GROUP_SCORES, SCORINGS, RoutingOptions


def first_topk(values: Tensor, k: int, low: Tensor | None = None) -> Tensor:
    """Ids of the k largest along the last dimension, equal values by lowest ``low``, by default in order of id.

    `torch.topk` promises no order among equals.
    """
    if values.dtype == torch.float64:
        if low is None:
            return torch.sort(values, dim=-1, descending=True, stable=True).indices[..., :k]
        order = torch.sort(low.expand(values.shape), dim=-1, stable=True).indices
        sorted_values = torch.gather(values, -1, order)
        return torch.gather(order, -1, torch.sort(sorted_values, dim=-1, descending=True, stable=True).indices[..., :k])
    # One int64 key per entry: the float's bits in an order-keeping form above, the reversed rank below. All keys
    # differ, so top-k has one answer. Adding 0 makes -0 equal to +0.
    bits = (values + 0.0).view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    last = 2**32 - 1
    low = torch.arange(values.shape[-1], device=values.device) if low is None else low
    return torch.topk((ordered << 32) | (last - low), k, dim=-1).indices


def tie_ranks(n_rows: int, n_experts: int, seed: int, device: torch.device) -> Tensor:
    """Return rank(e) = a e + c modulo the power of two ≥ E, (T, E) int64, with a and c of the seed and the row."""
    rows = torch.arange(n_rows, device=device)
    low = _mix(_mix(torch.tensor(seed & 0xFFFFFFFF, device=device)) ^ (rows & 0xFFFFFFFF) ^ (seed >> 32))
    c = _mix(low ^ (rows >> 32) ^ 0x9E3779B9)
    mask = (1 << (n_experts - 1).bit_length()) - 1
    experts = torch.arange(n_experts, device=device)
    return (((low | 1) & mask)[:, None] * experts + (c & mask)[:, None]) & mask


def _mix(x: Tensor) -> Tensor:
    """MurmurHash3's finalizer, whose 32-bit products are taken in two halves to stay inside 63 bits."""

    def times(x: Tensor, factor: int) -> Tensor:
        return (x * (factor & 0xFFFF) + (((x * (factor >> 16)) & 0xFFFF) << 16)) & 0xFFFFFFFF

    x = times(x ^ (x >> 16), 0x85EBCA6B)
    x = times(x ^ (x >> 13), 0xC2B2AE35)
    return x ^ (x >> 16)


def _pick(values: Tensor, low: Tensor | None, options: RoutingOptions) -> Tensor:
    if not options.n_groups:
        return first_topk(values, options.top_k, low)
    grouped = values.view(*values.shape[:-1], options.n_groups, values.shape[-1] // options.n_groups)
    by_two = GROUP_SCORES[options.group_score - 1] == "top2"
    scores = grouped.amax(-1)
    if by_two:  # an infinite best is enough, also beside −inf
        scores = torch.where(scores == torch.inf, scores, grouped.topk(2, dim=-1).values.sum(-1))
    groups = first_topk(scores, options.top_k_groups).sort(-1).values
    size = grouped.shape[-1]
    ids = (groups.unsqueeze(-1) * size + torch.arange(size, device=values.device)).flatten(-2)
    inside = torch.gather(values, -1, ids)
    if low is not None:
        low = torch.gather(low.expand(values.shape), -1, ids)
    chosen: Tensor = torch.gather(ids, -1, first_topk(inside, options.top_k, low))
    return chosen


def route(logits: Tensor, bias: Tensor | None, options: RoutingOptions) -> tuple[Tensor, Tensor]:
    """Return weights and ids (T, k) of logits (T, E) in float32 or float64; differentiable, twice too."""
    scoring, k = SCORINGS[options.scoring], options.top_k
    scores = _scores(logits, scoring)
    # Logits rank as their scores do and do not saturate; scores matter only where a bias or a sum of two is added.
    by_score = bias is not None or options.group_score == 1
    values = (scores if by_score else logits).detach()
    if bias is not None:
        values = values + bias.detach()
    low = (
        tie_ranks(values.shape[0], values.shape[1], options.tie_seed, values.device) if options.tie_seed >= 0 else None
    )
    ids = _pick(values, low, options)
    is_nan = torch.isnan(values.amax(-1, keepdim=True))
    ids = torch.where(is_nan, torch.arange(k, device=ids.device), ids)
    weights = torch.gather(scores, -1, ids)
    if scoring == "softmax_topk":
        weights = torch.softmax(weights, dim=-1)
    if options.renormalize:
        # w/w is 1, and its gradient 0: computed, it would be rounding noise, which Adam blows up to full steps.
        weights = weights * 0 + 1 if k == 1 else weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * options.scale * torch.where(is_nan, torch.nan, 1.0), ids


def statistics(logits: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-sum-exp (T), counts (E) int64 and Σ_t softmax (E); rows of NaN count nowhere."""
    lse = torch.logsumexp(logits, -1)
    counted = ~weights.detach().isnan()
    counts = torch.zeros(logits.shape[-1], dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, ids.flatten(), counted.flatten().to(torch.int64))
    return lse, counts, torch.softmax(logits, -1).sum(0)


def _scores(logits: Tensor, scoring: str) -> Tensor:
    if scoring == "softmax":
        return torch.softmax(logits, dim=-1)
    return torch.sigmoid(logits) if scoring == "sigmoid" else logits
