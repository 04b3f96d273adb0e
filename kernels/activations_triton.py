"""The activations of ``activations.py`` and their slopes, for the epilogues of Triton kernels; all float32.

A plain activation takes its argument as ``gate`` and does not read ``up``. ``ACT`` is the activation's name, which the
constants of a clamped SwiGLU are part of; ``none`` is the identity. Constants stand right of tensors: the interpreter
makes constants of products that begin with one.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

_ROOT_HALF = tl.constexpr(math.sqrt(0.5))
_NORMAL = tl.constexpr(1.0 / math.sqrt(2.0 * math.pi))
_TANH_SCALE = tl.constexpr(math.sqrt(2.0 / math.pi))
_TANH_CUBE = tl.constexpr(0.044715)


@triton.constexpr_function
def _constant(act: str, place: int) -> float:
    """Return limit, alpha or shift of a clamped SwiGLU; 0 for other activations, which have no limit."""
    # As `activations.clamp_of`: what is called from a kernel may call no other function of Python's.
    if act == "gpt_oss":
        return (7.0, 1.702, 1.0)[place]
    return float(act[15:-1].split(",")[place]) if act.startswith("clamped_swiglu") else 0.0


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _curve(x, ACT: tl.constexpr):
    """Return a curve's value and slope; the compiler drops what is not used."""
    if ACT == "swiglu" or ACT == "silu":
        sigmoid = _sigmoid(x)
        value = x * sigmoid
        slope = sigmoid + value * (1.0 - sigmoid)
    elif ACT == "geglu" or ACT == "gelu":
        below = 0.5 * (1.0 + tl.erf(x * _ROOT_HALF))
        value = x * below
        slope = below + x * tl.exp(-0.5 * x * x) * _NORMAL
    elif ACT == "geglu_tanh" or ACT == "gelu_tanh":
        # tanh(z) = 2 σ(2z) − 1
        half = _sigmoid((x + x * x * x * _TANH_CUBE) * (2.0 * _TANH_SCALE))
        value = x * half
        slope = half + 2.0 * x * half * (1.0 - half) * _TANH_SCALE * (1.0 + x * x * (3.0 * _TANH_CUBE))
    elif ACT == "reglu" or ACT == "relu":
        value = tl.where(x < 0.0, 0.0, x)
        slope = tl.where(x > 0.0, 1.0, 0.0)
    elif ACT == "relu2":
        positive = tl.where(x < 0.0, 0.0, x)
        value = positive * positive
        slope = 2.0 * positive
    else:
        tl.static_assert(ACT == "none")
        value = x
        slope = tl.full(x.shape, 1.0, tl.float32)
    return value, slope


@triton.jit
def activation_value(gate, up, GATED: tl.constexpr, ACT: tl.constexpr):
    """Return a = act(gate, up)."""
    LIMIT: tl.constexpr = _constant(ACT, 0)
    if LIMIT > 0.0:
        low = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        value = (_clamped(up, LIMIT) + _constant(ACT, 2)) * low * _sigmoid(low * _constant(ACT, 1))
    else:
        value, _ = _curve(gate, ACT)
        if GATED:
            value *= up
    return value


@triton.jit
def _clamped(x, LIMIT: tl.constexpr):
    return tl.where(x > LIMIT, LIMIT, tl.where(x < -LIMIT, -LIMIT, x))


@triton.jit
def activation_slopes(gate, up, grad, GATED: tl.constexpr, ACT: tl.constexpr):
    """Return a, grad · ∂a/∂gate and grad · ∂a/∂up (the last is 0 for plain activations)."""
    LIMIT: tl.constexpr = _constant(ACT, 0)
    if LIMIT > 0.0:
        ALPHA: tl.constexpr = _constant(ACT, 1)
        low = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        shifted = _clamped(up, LIMIT) + _constant(ACT, 2)
        sigmoid = _sigmoid(low * ALPHA)
        curve = low * sigmoid
        slope = sigmoid * (1.0 + low * ALPHA * (1.0 - sigmoid))
        value = shifted * curve
        dgate = tl.where(gate > LIMIT, 0.0, grad * shifted * slope)
        dup = tl.where(tl.abs(up) > LIMIT, 0.0, grad * curve)
    else:
        value, slope = _curve(gate, ACT)
        if GATED:
            dgate = grad * up * slope
            dup = grad * value
            value *= up
        else:
            dgate = grad * slope
            dup = tl.zeros_like(grad)
    return value, dgate, dup
