"""Top-k routing: logits to gate weights and expert ids, with a defined order among ties.

    s = softmax(l) | σ(l) | l                     score of every expert (l: logits)
    A = top-k of s + bias, lowest id first        (inside the best groups, if grouped)
    w = s_A, over its sum if renormalised, times scale

The bias picks but does not weigh (auxiliary-loss-free balancing, arXiv:2408.15664); groups as in DeepSeek-V2, V3.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Unpack, overload

import torch
from torch import Tensor

from moesaic.kernels import routing_eager
from moesaic.kernels.routing_op import MAX_EXPERTS, can_fuse, route_op
from moesaic.kernels.routing_options import RoutingKeywords, checked_options

IMPLS = ("auto", "fused", "torch")


class Routing(NamedTuple):
    """Where every token goes: gate weights (..., k) and expert ids (..., k) int64, best first."""

    weights: Tensor
    ids: Tensor


class RoutingStatistics(NamedTuple):
    """How a batch is shared out; the losses and ``mean_probs`` are differentiable in the logits.

    counts (E,) int64: choices of each expert; mean_probs (E,): P_e, mean over tokens of softmax(l)_e; load_balance_loss
    (): E Σ_e f_e P_e with f_e = counts_e/(T k) (Fedus et al. 2021, arXiv:2101.03961); z_loss (): mean over tokens of
    (log Σ_e e^l)² (Zoph et al. 2022, arXiv:2202.08906). No tokens give 0. Rows with a NaN count nowhere, and make the
    losses NaN.
    """

    counts: Tensor
    mean_probs: Tensor
    load_balance_loss: Tensor
    z_loss: Tensor


@overload
def route_topk(
    logits: Tensor,
    top_k: int,
    *,
    return_statistics: Literal[False] = ...,
    impl: str = ...,
    **options: Unpack[RoutingKeywords],
) -> Routing: ...


@overload
def route_topk(
    logits: Tensor,
    top_k: int,
    *,
    return_statistics: Literal[True],
    impl: str = ...,
    **options: Unpack[RoutingKeywords],
) -> tuple[Routing, RoutingStatistics]: ...


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
    tie_seed: int | None = None,
    return_statistics: bool = False,
    impl: str = "auto",
) -> Routing | tuple[Routing, RoutingStatistics]:
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
        tie_seed: among equal scores, take experts in an order of the row's own, drawn from this seed, in place of the
            order of ids; 0 to 2^63 − 1. The same seed and row give the same order on every device.
        return_statistics: also return `RoutingStatistics`.
        impl: `"fused"`: one pass over the logits and one for their gradient (Triton on a GPU, Numba on a CPU), float32
            or less; `"torch"`: plain PyTorch, differentiable twice; `"auto"`: fused where it can be had.

    Returns:
        `Routing(weights, ids)`: weights (..., k) float32 or float64, ids (..., k) int64, best first; with
        `return_statistics`, that and `RoutingStatistics`.

    Raises:
        ValueError: naming the argument, its value and what it takes.
    """
    if logits.ndim < 1 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating point (..., E), got {logits.dtype} {tuple(logits.shape)}")
    n_experts = logits.shape[-1]
    options = checked_options(
        n_experts, top_k, scoring=scoring, bias=bias, n_groups=n_groups, top_k_groups=top_k_groups,
        group_score=group_score, renormalize=renormalize, scale=scale, tie_seed=tie_seed, statistics=return_statistics,
    )  # fmt: skip
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    rows = logits.reshape(-1, n_experts)
    fuses = logits.dtype != torch.float64 and can_fuse(logits.device, n_experts, options)
    if impl == "fused" and not fuses:
        raise ValueError(
            "impl='fused' takes logits of at most 32 bits, on a CPU with Numba (pip install 'moesaic[bench]') or on a "
            f"GPU with at most {MAX_EXPERTS} experts or neither groups nor statistics, got {logits.dtype} "
            f"{tuple(logits.shape)} on {logits.device}"
        )
    if fuses and impl != "torch":
        weights, ids, lse, counts, prob_sums = route_op(rows, bias, options)
    else:
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        weights, ids = routing_eager.route(rows, bias, options)
        if return_statistics:
            lse, counts, prob_sums = routing_eager.statistics(rows, ids, weights)
    shape = (*logits.shape[:-1], top_k)
    routing = Routing(weights.view(shape), ids.view(shape))
    return (routing, statistics_of(rows.shape[0], top_k, lse, counts, prob_sums)) if return_statistics else routing


def statistics_of(n_rows: int, top_k: int, lse: Tensor, counts: Tensor, prob_sums: Tensor) -> RoutingStatistics:
    """Return the statistics of T rows from log-sum-exp (T), counts (E) and Σ_t softmax (E)."""
    mean_probs = prob_sums / max(n_rows, 1)
    share = counts.to(mean_probs.dtype) / max(n_rows * top_k, 1)
    balance = counts.shape[0] * (share * mean_probs).sum()
    return RoutingStatistics(counts, mean_probs, balance, lse.square().sum() / max(n_rows, 1))


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
