"""What defines a routing besides its logits, checked and in the form that kernels and ops take."""

from __future__ import annotations

import math
from typing import NamedTuple, TypedDict

from torch import Tensor

SCORINGS = ("softmax", "softmax_topk", "sigmoid")
GROUP_SCORES = ("top2", "max")


class RoutingOptions(NamedTuple):
    """Options of a checked routing.

    Attributes:
        top_k: k.
        scoring: index into ``SCORINGS``.
        n_groups: number of groups, 0 without.
        top_k_groups: groups taken per row, 0 without.
        group_score: 0 without groups, else 1 + the index into ``GROUP_SCORES``.
        renormalize: whether the k weights are divided by their sum.
        scale: factor of the weights.
        tie_seed: −1 if the lowest id wins a tie, else the seed of each row's order.
        statistics: whether log-sum-exp, counts and mean probabilities are wanted.
    """

    top_k: int
    scoring: int
    n_groups: int
    top_k_groups: int
    group_score: int
    renormalize: bool
    scale: float
    tie_seed: int
    statistics: bool


class RoutingKeywords(TypedDict, total=False):
    """Keywords that every routing takes; `moesaic.kernels.route_topk` says what they mean."""

    scoring: str
    bias: Tensor | None
    n_groups: int | None
    top_k_groups: int | None
    group_score: str
    renormalize: bool
    scale: float
    tie_seed: int | None


def checked_options(
    n_experts: int,
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
    statistics: bool = False,
) -> RoutingOptions:
    """Return the options, or raise ValueError naming the argument, its value and what it takes."""
    if not 1 <= n_experts < 2**31:
        raise ValueError(f"logits must have 1 to 2^31 - 1 experts in the last dimension, got {n_experts}")
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise ValueError(f"top_k must be an integer, got {top_k!r}")
    if not 1 <= top_k <= n_experts:
        raise ValueError(f"top_k must be between 1 and n_experts = {n_experts}, got {top_k}")
    if scoring not in SCORINGS:
        raise ValueError(f"scoring must be one of {', '.join(SCORINGS)}, got {scoring!r}")
    if bias is not None and bias.shape != (n_experts,):
        raise ValueError(f"bias must have shape ({n_experts},), got {tuple(bias.shape)}")
    if not -math.inf < scale < math.inf:  # isfinite cannot be traced with a symbolic number
        raise ValueError(f"scale must be a finite number, got {scale!r}")
    if tie_seed is not None and not (isinstance(tie_seed, int) and 0 <= tie_seed < 2**63):
        raise ValueError(f"tie_seed must be None or an integer from 0 to 2^63 - 1, got {tie_seed!r}")
    if (n_groups is None) != (top_k_groups is None):
        raise ValueError(f"n_groups and top_k_groups go together, got n_groups={n_groups}, top_k_groups={top_k_groups}")
    groups = (0, 0, 0)
    if n_groups is not None and top_k_groups is not None:
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
        if top_k_groups < n_groups:
            groups = (n_groups, top_k_groups, 1 + GROUP_SCORES.index(group_score))
    seed = -1 if tie_seed is None else int(tie_seed)
    return RoutingOptions(
        int(top_k), SCORINGS.index(scoring), *groups, bool(renormalize), float(scale), seed, bool(statistics)
    )
