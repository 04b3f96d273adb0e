"""Activations of an expert's hidden layer, by name, and their derivatives.

    gated:  a = f(g) · u of the two halves of h (interleaved: g the even columns, u the odd ones)
            swiglu, geglu, geglu_tanh, reglu: f is SiLU, GELU, GELU by tanh, ReLU
            gpt_oss: a = (min(max(u, −7), 7) + 1) · min(g, 7) · σ(1.702 min(g, 7))
    plain:  a = f(h): silu, gelu, gelu_tanh, relu, relu2 (ReLU squared)

At the kink of a ReLU the slope is 0, at the ends of a clamp it is 1, as in PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_GPT_OSS_LIMIT, _GPT_OSS_ALPHA = 7.0, 1.702
_TANH_SCALE, _TANH_CUBE = math.sqrt(2.0 / math.pi), 0.044715


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _gpt_oss(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=_GPT_OSS_LIMIT), up.clamp(-_GPT_OSS_LIMIT, _GPT_OSS_LIMIT)
    return (up + 1.0) * gate * torch.sigmoid(_GPT_OSS_ALPHA * gate)


def _gated(act: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda gate, up: act(gate) * up


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
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
NO_ACTIVATION = "none"
"""The identity, for an op that has to be told of an activation."""
_CURVES = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}


def activate(h: Tensor, activation: str, interleaved: bool = False) -> Tensor:
    """Apply an activation by name: (..., 2F) → (..., F) for the gated ones (gate first), (..., F) kept for the others.

    `gpt_oss` is `(up + 1) · gate · σ(1.702 gate)` with gate at most 7 and up within ±7; `relu2` is ReLU squared.
    """
    if activation in PLAIN:
        return PLAIN[activation](h)
    if activation == NO_ACTIVATION:
        return h
    return GATED[activation](*halves(h, interleaved))


def halves(h: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Return views of gate and up of h (..., 2F)."""
    if interleaved:
        return h[..., 0::2], h[..., 1::2]
    gate, up = h.chunk(2, dim=-1)
    return gate, up


def _curve(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return a plain activation's value and slope; the slope of a ReLU at 0 is 0."""
    if name == "silu":
        sigmoid = torch.sigmoid(x)
        value = x * sigmoid
        return value, sigmoid + value * (1.0 - sigmoid)
    if name == "gelu":
        below = 0.5 * (1.0 + torch.erf(x * math.sqrt(0.5)))
        return x * below, below + x * torch.exp(-0.5 * x * x) * (1.0 / math.sqrt(2.0 * math.pi))
    if name == "gelu_tanh":
        tanh = torch.tanh(_TANH_SCALE * (x + _TANH_CUBE * x**3))
        slope = 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * _TANH_SCALE * (1.0 + 3.0 * _TANH_CUBE * x * x)
        return 0.5 * x * (1.0 + tanh), slope
    positive = x.clamp(min=0.0)
    return (positive, (x > 0).to(x.dtype)) if name == "relu" else (positive * positive, 2.0 * positive)


def activate_backward(h: Tensor, grad: Tensor, activation: str, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Return `a = act(h)` and `dh = act'(h) · grad`, both float32 (float64 where h or grad is).

    Args:
        h: (R, 2F) for the gated activations, else (R, F).
        grad: (R, F).
        activation: one of `ACTIVATIONS`.
        interleaved: gate and up columns alternate; dh has the same order.
    """
    wide = torch.promote_types(torch.promote_types(h.dtype, grad.dtype), torch.float32)
    h, grad = h.to(wide), grad.to(wide)
    if activation == NO_ACTIVATION:
        return h, grad
    if activation in PLAIN:
        a, slope = _curve(h, activation)
        return a, slope * grad
    gate, up = halves(h, interleaved)
    dh = torch.empty_like(h)
    dgate, dup = halves(dh, interleaved)
    if activation == "gpt_oss":
        low = gate.clamp(max=_GPT_OSS_LIMIT)
        shifted = up.clamp(-_GPT_OSS_LIMIT, _GPT_OSS_LIMIT) + 1.0
        sigmoid = torch.sigmoid(_GPT_OSS_ALPHA * low)
        value = low * sigmoid
        slope = sigmoid * (1.0 + _GPT_OSS_ALPHA * low * (1.0 - sigmoid))
        dgate.copy_(torch.where(gate <= _GPT_OSS_LIMIT, grad * shifted * slope, 0.0))
        dup.copy_(torch.where(up.abs() <= _GPT_OSS_LIMIT, grad * value, 0.0))
        return shifted * value, dh
    value, slope = _curve(gate, _CURVES[activation])
    dgate.copy_(grad * up * slope)
    dup.copy_(grad * value)
    return value * up, dh
