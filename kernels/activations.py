"""Activations of an expert's hidden layer, by name, and their derivatives.

    gated:  a = f(g) · u of the two halves of h (interleaved: g the even columns, u the odd ones)
            swiglu, geglu, geglu_tanh, reglu: f is SiLU, GELU, GELU by tanh, ReLU
            clamped_swiglu(L, α, s): a = (min(max(u, −L), L) + s) · min(g, L) · σ(α min(g, L))
            gpt_oss: clamped_swiglu(7, 1.702, 1)
    plain:  a = f(h): silu, gelu, gelu_tanh, relu, relu2 (ReLU squared)

At the kink of a ReLU the slope is 0, at the ends of a clamp it is 1, as in PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CLAMPED = "clamped_swiglu"
_TANH_SCALE, _TANH_CUBE = math.sqrt(2.0 / math.pi), 0.044715


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


class Clamp(NamedTuple):
    """The constants of a clamped SwiGLU."""

    limit: float
    alpha: float
    shift: float


GPT_OSS = Clamp(7.0, 1.702, 1.0)


def clamped_swiglu(limit: float, alpha: float = 1.0, shift: float = 0.0) -> str:
    """Return the name of the activation `a = (min(max(u, −L), L) + s) · min(g, L) · σ(α min(g, L))`.

    Args:
        limit: L, positive.
        alpha: α; 1 for SiLU, 1.702 for GPT-OSS.
        shift: s; 0, or 1 for GPT-OSS.

    Raises:
        ValueError: for a limit that is not positive, and constants that are not finite.
    """
    constants = Clamp(float(limit), float(alpha), float(shift))
    if not all(map(math.isfinite, constants)) or constants.limit <= 0:
        raise ValueError(f"clamped_swiglu takes a positive limit and finite constants, got {tuple(constants)}")
    return f"{CLAMPED}({','.join(map(repr, constants))})"


def clamp_of(activation: str) -> Clamp | None:
    """Return the constants of a clamped SwiGLU's name, `gpt_oss` among them; None for every other name."""
    if activation == "gpt_oss":
        return GPT_OSS
    if not activation.startswith(CLAMPED):
        return None
    try:
        constants = Clamp(*(float(part) for part in activation[len(CLAMPED) + 1 : -1].split(",")))
        return constants if clamped_swiglu(*constants) == activation else None
    except (TypeError, ValueError):
        return None


def is_gated(activation: str) -> bool:
    """Return whether the name is that of a gated activation."""
    return activation in GATED or clamp_of(activation) is not None


def check_activation(activation: str, others: str = "") -> None:
    """Raise ValueError unless an activation has this name; ``others``: what else it may be, as ``"None or "``."""
    if activation not in ACTIVATIONS and clamp_of(activation) is None:
        known = ", ".join((*ACTIVATIONS, "or what clamped_swiglu returns"))
        raise ValueError(f"activation must be {others}one of {known}, got {activation!r}")


def check_interleaved(interleaved: bool, gated: bool, activation: object) -> None:
    """Raise ValueError where columns of gate and up would alternate of an activation that has no gate."""
    if interleaved and not gated:
        known = ", ".join((*GATED, "or what clamped_swiglu returns"))
        raise ValueError(f"interleaved takes one of the gated activations {known}, got {activation!r}")


def _clamped(gate: Tensor, up: Tensor, clamp: Clamp) -> Tensor:
    gate, up = gate.clamp(max=clamp.limit), up.clamp(-clamp.limit, clamp.limit)
    return (up + clamp.shift) * gate * torch.sigmoid(clamp.alpha * gate)


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
    "gpt_oss": lambda gate, up: _clamped(gate, up, GPT_OSS),
}
ACTIVATIONS = (*GATED, *PLAIN)
NO_ACTIVATION = "none"
"""The identity, for an op that has to be told of an activation."""
_CURVES = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}


def activate(h: Tensor, activation: str, interleaved: bool = False) -> Tensor:
    """Apply an activation by name: (..., 2F) → (..., F) for the gated ones (gate first), (..., F) kept for the others.

    `clamped_swiglu` names are made by the function of that name, `gpt_oss` is one of them; `relu2` is ReLU squared.
    """
    if activation in PLAIN:
        return PLAIN[activation](h)
    if activation == NO_ACTIVATION:
        return h
    gate, up = halves(h, interleaved)
    clamp = clamp_of(activation)
    return GATED[activation](gate, up) if clamp is None else _clamped(gate, up, clamp)


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
        activation: one of `ACTIVATIONS`, or a name that `clamped_swiglu` made.
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
    clamp = clamp_of(activation)
    if clamp is not None:
        low = gate.clamp(max=clamp.limit)
        shifted = up.clamp(-clamp.limit, clamp.limit) + clamp.shift
        sigmoid = torch.sigmoid(clamp.alpha * low)
        value = low * sigmoid
        slope = sigmoid * (1.0 + clamp.alpha * low * (1.0 - sigmoid))
        dgate.copy_(torch.where(gate <= clamp.limit, grad * shifted * slope, 0.0))
        dup.copy_(torch.where(up.abs() <= clamp.limit, grad * value, 0.0))
        return shifted * value, dh
    value, slope = _curve(gate, _CURVES[activation])
    dgate.copy_(grad * up * slope)
    dup.copy_(grad * value)
    return value * up, dh
