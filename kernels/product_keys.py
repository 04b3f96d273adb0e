"""Product-key routing: the k best of E = √E · √E experts from two small top-k searches, without a row of E scores.

    s_{(a, b)} = q¹ · K¹_a + q² · K²_b,   A = top-k of s,   w = softmax(s_A) [or sigmoid], expert id = a √E + b

The k best sums lie among the k best of each half (Lample et al. 2019, arXiv:1907.05242; He 2024, arXiv:2407.04153).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.kernels._autocast import linear
from moesaic.kernels.routing import Routing, route_topk


def route_product_keys(
    query: Tensor,
    first_keys: Tensor,
    second_keys: Tensor,
    top_k: int,
    *,
    scoring: str = "softmax_topk",
    renormalize: bool = False,
    scale: float = 1.0,
) -> Routing:
    """Pick the k best of the pairs of keys by the sum of their scores, and weigh them.

    The choice is that of `route_topk` on all E sums, ties to the lowest id included; of halves so different in size
    that rounding makes unequal sums equal, the better pair wins. Work per token √E · d + k², memory O(T (√E + k²)).
    Scores are float32, under autocast too. Differentiable in all three tensors. A NaN in a token's scores gives NaN
    weights and ids 0…k−1.

    Args:
        query: (..., d), d even: the halves q¹, q².
        first_keys: K¹ (R, d/2).
        second_keys: K² (C, d/2); E = R·C, and expert (a, b) has id a·C + b.
        top_k: k, at most R·C.
        scoring: `"softmax_topk"`, over the k picked, or `"sigmoid"`.
        renormalize: divide the k weights by their sum.
        scale: multiplies the weights.

    Returns:
        `Routing(weights, ids)` (..., k), best first.

    Raises:
        ValueError: naming the argument, its value and what it takes.
    """
    if query.ndim < 1 or query.shape[-1] % 2 or not query.is_floating_point():
        raise ValueError(f"query must be floating point (..., even d), got {query.dtype} {tuple(query.shape)}")
    half = query.shape[-1] // 2
    for name, keys in (("first_keys", first_keys), ("second_keys", second_keys)):
        if keys.ndim != 2 or keys.shape[1] != half or keys.dtype != query.dtype or not len(keys):
            raise ValueError(
                f"{name} must have shape (at least 1, {half}) and dtype {query.dtype}, "
                f"got {tuple(keys.shape)} {keys.dtype}"
            )
    n_experts = len(first_keys) * len(second_keys)
    if not 1 <= top_k <= n_experts:
        raise ValueError(f"top_k must be between 1 and n_experts = {n_experts}, got {top_k}")
    if scoring not in ("softmax_topk", "sigmoid"):
        raise ValueError(f"scoring must be one of softmax_topk, sigmoid, got {scoring!r}")
    dtype = torch.promote_types(query.dtype, torch.float32)
    rows = query.reshape(-1, query.shape[-1]).to(dtype)
    (first, a), (second, b) = (
        _best(linear(part, keys.to(dtype)), top_k)
        for part, keys in ((rows[:, :half], first_keys), (rows[:, half:], second_keys))
    )
    sums = (first[:, :, None] + second[:, None, :]).flatten(1)
    found = route_topk(sums, top_k, scoring=scoring, renormalize=renormalize, scale=scale)
    width = second.shape[1]
    ids = a.gather(1, found.ids // width) * len(second_keys) + b.gather(1, found.ids % width)
    ids = torch.where(found.weights.isnan(), torch.arange(top_k, device=ids.device), ids)
    shape = (*query.shape[:-1], top_k)
    return Routing(found.weights.view(shape), ids.view(shape))


def _best(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the best scores and their ids in order of id, so that candidates, too, lie in order of id."""
    ids = route_topk(scores.detach(), min(top_k, scores.shape[1]), scoring="softmax_topk").ids.sort(-1).values
    # A NaN that is not among the first k would be lost.
    return scores.gather(1, ids).masked_fill(scores.isnan().any(-1, keepdim=True), torch.nan), ids
