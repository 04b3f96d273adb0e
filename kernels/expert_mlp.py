"""The expert MLP: every token through its k experts only, and their outputs summed by gate weight.

    h = x U_e + b_e        U_e: (D, F), or (D, 2F) for gated activations
    a = act(h)             gated: act(gate, up) of the two halves of h (interleaved: of even and odd columns)
    y = Σ_j w_j (a V_e + c_e),  e = ids_j

E experts, model width D, expert width F. Only the k chosen experts of a token are computed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.kernels.dispatch import combine, group_by_expert
from moesaic.kernels.grouped_matmul import grouped_matmul

Activation = Callable[[Tensor], Tensor]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _gpt_oss(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1.0) * gate * torch.sigmoid(1.702 * gate)


def _gated(act: Activation) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda gate, up: act(gate) * up


PLAIN: dict[str, Activation] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "relu2": _relu2,
}
GATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "swiglu": _gated(F.silu),
    "geglu": _gated(F.gelu),
    "geglu_tanh": _gated(_gelu_tanh),
    "reglu": _gated(F.relu),
    "gpt_oss": _gpt_oss,
}
ACTIVATIONS = (*GATED, *PLAIN)


def activate(h: Tensor, activation: str, interleaved: bool = False) -> Tensor:
    """Apply an activation by name: (..., 2F) → (..., F) for the gated ones (gate first), (..., F) kept for the others.

    `gpt_oss` is `(up + 1) · gate · σ(1.702 gate)` with gate at most 7 and up within ±7; `relu2` is ReLU squared.
    """
    if activation in PLAIN:
        return PLAIN[activation](h)
    gate, up = (h[..., 0::2], h[..., 1::2]) if interleaved else h.chunk(2, dim=-1)
    return GATED[activation](gate, up)


def _check(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    ids: Tensor,
    activation: str | Activation,
    interleaved: bool,
) -> None:
    if gate_up.ndim != 3:
        raise ValueError(f"gate_up must have shape (E, D, 2F) or (E, D, F), got {tuple(gate_up.shape)}")
    n_experts, d_model, width = gate_up.shape
    if x.ndim < 1 or x.shape[-1] != d_model:
        raise ValueError(f"x must have shape (..., {d_model}) to match gate_up, got {tuple(x.shape)}")
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, or a function, got {activation!r}")
        if activation in GATED and width % 2:
            raise ValueError(f"gate_up must have an even last dimension for {activation!r}, got {width}")
    if interleaved and activation not in GATED:
        raise ValueError(f"interleaved takes one of the gated activations {', '.join(GATED)}, got {activation!r}")
    d_ff = width // 2 if activation in GATED else width
    fits = down.ndim == 3 and down.shape[0] == n_experts and (not isinstance(activation, str) or down.shape[1] == d_ff)
    if not fits:
        raise ValueError(f"down must have shape ({n_experts}, {d_ff}, N), got {tuple(down.shape)}")
    if ids.shape != weights.shape or ids.ndim < 1 or ids.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"weights and ids must have shape ({', '.join(map(str, (*x.shape[:-1], 'k')))}), "
            f"got {tuple(weights.shape)} and {tuple(ids.shape)}"
        )


def expert_mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    ids: Tensor,
    *,
    activation: str | Activation = "swiglu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    interleaved: bool = False,
    post_norm: Activation | None = None,
) -> Tensor:
    """Send every token through its k experts: `y = Σ_j w_j (act(x U_e + b_e) V_e + c_e)` with `e = ids_j`.

    Only the k chosen experts are computed; ids outside 0…E−1 are skipped, whatever their weight. The sum over j is
    float32 (float64 for float64). Differentiable in everything but ids; same inputs give the same bits.

    Args:
        x: (..., D).
        gate_up: (E, D, 2F) for gated activations (gate, then up; alternating columns if `interleaved`), else (E, D, F).
            Any strides: pass `w.transpose(1, 2)` for weights stored as (E, 2F, D).
        down: (E, F, N).
        weights: (..., k) gate weights.
        ids: (..., k) expert ids.
        activation: `swiglu`, `geglu` (exact GELU), `geglu_tanh`, `reglu`, `gpt_oss`; `silu`, `gelu`, `gelu_tanh`,
            `relu`, `relu2`; or a function of the whole pre-activation, row by row.
        gate_up_bias: (E, 2F) or (E, F).
        down_bias: (E, N).
        interleaved: gate and up columns alternate.
        post_norm: a function of every expert's output rows (R, N), before the gate weights.

    Returns:
        (..., N) in the dtype of the matrix products.

    Raises:
        ValueError: naming the argument, its value and what it takes.
    """
    _check(x, gate_up, down, weights, ids, activation, interleaved)
    grouping = group_by_expert(ids, gate_up.shape[0])
    gather = grouping.permutation // ids.shape[-1] if ids.shape[-1] else grouping.permutation
    tokens = x.reshape(-1, x.shape[-1])
    h = grouped_matmul(tokens, gate_up, grouping.offsets, bias=gate_up_bias, gather=gather)
    a = activate(h, activation, interleaved) if isinstance(activation, str) else activation(h)
    rows = grouped_matmul(a, down, grouping.offsets, bias=down_bias)
    if post_norm is not None:
        rows = post_norm(rows)
    return combine(rows, weights, grouping)
