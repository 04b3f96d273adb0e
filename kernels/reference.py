"""Oracles of the ops: the definitions, written out as loops over rows and experts, in the dtype of their inputs.

They share no code with the ops they judge. Call them in float64; torch differentiates them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from moesaic.kernels.features import sample_features_reference
from moesaic.kernels.philox import philox_uniform_reference
from moesaic.kernels.reference_toy import decode_loss as decode_loss
from moesaic.kernels.reference_toy import encode_features as encode_features
from moesaic.kernels.reference_toy import toy_loss as toy_loss

sample_features = sample_features_reference
philox_uniform = philox_uniform_reference


def _order(values: list[float], k: int) -> list[int]:
    return sorted(range(len(values)), key=lambda e: (-values[e], e))[:k]


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
) -> tuple[Tensor, Tensor]:
    """`moesaic.kernels.route_topk`, row by row with Python's sort; logits without NaN. Returns (weights, ids)."""
    n_experts = logits.shape[-1]
    weights, ids = [], []
    for row in logits.reshape(-1, n_experts):
        score = {"softmax": torch.softmax(row, 0), "softmax_topk": row, "sigmoid": 1 / (1 + torch.exp(-row))}[scoring]
        value = (score if bias is None else score + bias).tolist()
        allowed = list(range(n_experts))
        if n_groups is not None and top_k_groups is not None:
            size = n_experts // n_groups
            groups = [sorted(value[g * size : (g + 1) * size], reverse=True) for g in range(n_groups)]
            best = _order([g[0] + g[1] if group_score == "top2" else g[0] for g in groups], top_k_groups)
            allowed = [e for e in range(n_experts) if e // size in best]
        picked = [allowed[i] for i in _order([value[e] for e in allowed], top_k)]
        weight = torch.stack([score[e] for e in picked])
        if scoring == "softmax_topk":
            weight = torch.exp(weight - weight.max()) / torch.exp(weight - weight.max()).sum()
        if renormalize:
            weight = weight / weight.sum()
        weights.append(weight * scale)
        ids.append(picked)
    shape = (*logits.shape[:-1], top_k)
    chosen = torch.tensor(ids, dtype=torch.int64, device=logits.device).reshape(shape)
    return (torch.stack(weights).reshape(shape) if weights else logits.new_zeros(shape)), chosen


def group_by_expert(ids: Tensor, n_experts: int) -> tuple[list[int], list[int], list[int], list[int], int]:
    """`moesaic.kernels.group_by_expert` as Python lists: counts, offsets, permutation, inverse, n_skipped."""
    flat = ids.reshape(-1).tolist()
    members: list[list[int]] = [[] for _ in range(n_experts + 1)]
    for slot, expert in enumerate(flat):
        members[expert if 0 <= expert < n_experts else n_experts].append(slot)
    permutation = [slot for group in members for slot in group]
    inverse = [0] * len(flat)
    for position, slot in enumerate(permutation):
        inverse[slot] = position
    counts = [len(group) for group in members[:-1]]
    return counts, [sum(counts[:e]) for e in range(n_experts + 1)], permutation, inverse, len(members[-1])


def grouped_matmul(
    x: Tensor, weight: Tensor, offsets: Tensor, *, bias: Tensor | None = None, gather: Tensor | None = None
) -> Tensor:
    """`moesaic.kernels.grouped_matmul`: every row times every expert's matrix, masked to the row's expert."""
    rows = x if gather is None else x[gather]
    position = torch.arange(rows.shape[0], device=x.device)
    out = torch.zeros(rows.shape[0], weight.shape[2], dtype=x.dtype, device=x.device)
    for e in range(weight.shape[0]):
        mine = ((position >= offsets[e]) & (position < offsets[e + 1])).unsqueeze(1)
        product = (rows.unsqueeze(2) * weight[e]).sum(1)
        out = out + torch.where(mine, product if bias is None else product + bias[e], 0.0)
    return out


def _gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def _gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _positive(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.0)


_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _positive,
    "relu2": lambda x: _positive(x) ** 2,
}
_GATES = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}


def activate(h: Tensor, name: str, interleaved: bool = False) -> Tensor:
    """The named activation of a pre-activation h, from its formula."""
    if name in _UNARY:
        return _UNARY[name](h)
    half = h.shape[-1] // 2
    index = torch.arange(half, device=h.device)
    gate, up = (h[..., 2 * index], h[..., 2 * index + 1]) if interleaved else (h[..., :half], h[..., half:])
    if name == "gpt_oss" or name.startswith("clamped_swiglu"):
        limit, alpha, shift = (7.0, 1.702, 1.0) if name == "gpt_oss" else map(float, name[15:-1].split(","))
        gate = torch.where(gate > limit, limit, gate)
        up = torch.where(up > limit, limit, torch.where(up < -limit, -limit, up))
        return (up + shift) * gate / (1 + torch.exp(-alpha * gate))
    return _UNARY[_GATES[name]](gate) * up


def expert_mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    ids: Tensor,
    *,
    activation: str = "swiglu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    interleaved: bool = False,
) -> Tensor:
    """`moesaic.kernels.expert_mlp`, densely: every expert on every token, weighed by the gate weight or 0."""
    out = torch.zeros(*x.shape[:-1], down.shape[2], dtype=x.dtype, device=x.device)
    for e in range(gate_up.shape[0]):
        h = x @ gate_up[e] if gate_up_bias is None else x @ gate_up[e] + gate_up_bias[e]
        y = activate(h, activation, interleaved) @ down[e]
        y = y if down_bias is None else y + down_bias[e]
        out = out + y * torch.where(ids == e, weights, 0.0).sum(-1, keepdim=True)
    return out
