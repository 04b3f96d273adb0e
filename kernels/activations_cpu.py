"""CPU twin of the activations in Numba, row by row: those that need no more than an exponential.

σ(x) is taken from e^−|x|, and GELU by tanh as x σ(2u), u = √(2/π)(x + 0.044715 x³), which ½(1 + tanh u) equals.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from moesaic.kernels._extras import LIBRARY
from moesaic.kernels.toy_cpu import exp32

SILU, GELU_TANH, RELU, RELU2, CLAMPED = range(5)
CODES = {
    "silu": SILU, "swiglu": SILU, "gelu_tanh": GELU_TANH, "geglu_tanh": GELU_TANH, "relu": RELU, "reglu": RELU,
    "relu2": RELU2,
}  # fmt: skip
_ZERO, _ONE, _TWO = np.float32(0.0), np.float32(1.0), np.float32(2.0)
_SCALE, _CUBE = np.float32(2.0 * math.sqrt(2.0 / math.pi)), np.float32(0.044715)
_SLOPE = np.float32(3.0 * 0.044715)


@njit(inline="always")
def _sigmoid(x):
    """Return σ(x) and 1 − σ(x), both to the last digits."""
    low = -abs(x)
    small = _ZERO if low < np.float32(-87.0) else exp32(low)
    large = _ONE / (_ONE + small)
    small = small * large
    return (large, small) if x >= _ZERO else (small, large) if x < _ZERO else (x, x)


@njit(inline="always")
def _clip(x, low, high):
    # A NaN fails both comparisons and stays.
    return low if x < low else high if x > high else x


@njit(nogil=True, error_model="numpy")
def _curve(code, clamp, x, value, slope):
    """Write the value and the slope of f(x); of a clamped SwiGLU those of g σ(αg), g = min(x, L)."""
    n = x.shape[0]
    if code == SILU:
        for i in range(n):
            s, rest = _sigmoid(x[i])
            value[i] = x[i] * s
            slope[i] = s + x[i] * s * rest
    elif code == GELU_TANH:
        for i in range(n):
            square = x[i] * x[i]
            s, rest = _sigmoid(_SCALE * x[i] * (_ONE + _CUBE * square))
            value[i] = x[i] * s
            slope[i] = s + x[i] * s * rest * _SCALE * (_ONE + _SLOPE * square)
    elif code == CLAMPED:
        limit, alpha = clamp[0], clamp[1]
        for i in range(n):
            low = limit if x[i] > limit else x[i]
            s, rest = _sigmoid(alpha * low)
            value[i] = low * s
            slope[i] = _ZERO if x[i] > limit else s + alpha * low * s * rest
    else:
        for i in range(n):
            positive = _ZERO if x[i] < _ZERO else x[i]
            step = _ONE if x[i] > _ZERO else _ZERO
            value[i] = positive if code == RELU else positive * positive
            slope[i] = step if code == RELU else _TWO * positive


@njit(nogil=True, error_model="numpy")
def _halves(row, interleaved, gate, up):
    n = gate.shape[0]
    if interleaved:
        for i in range(n):
            gate[i] = row[2 * i]
            up[i] = row[2 * i + 1]
    else:
        for i in range(n):
            gate[i] = row[i]
        for i in range(n):
            up[i] = row[n + i]


@njit(nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})
def _dot(a, b):
    total = _ZERO
    for i in range(a.shape[0]):
        total += a[i] * b[i]
    return total


@njit(nogil=True, error_model="numpy", cache=True)
def forward(begin, end, code, clamp, gated, interleaved, h, scale, a, library=LIBRARY):
    """Write a_r = s_r act(h_r) of rows begin … end − 1; an empty ``scale`` stands for ones."""
    n = a.shape[1]
    scratch = np.empty((4, n), np.float32)
    gate, up, value, slope = scratch[0], scratch[1], scratch[2], scratch[3]
    for r in range(begin, end):
        s = scale[r] if scale.shape[0] > 0 else _ONE
        out = a[r]
        if not gated:
            _curve(code, clamp, h[r], value, slope)
            for i in range(n):
                out[i] = s * value[i]
            continue
        _halves(h[r], interleaved, gate, up)
        _curve(code, clamp, gate, value, slope)
        if code == CLAMPED:
            for i in range(n):
                up[i] = _clip(up[i], -clamp[0], clamp[0]) + clamp[2]
        for i in range(n):
            out[i] = s * (value[i] * up[i])


@njit(nogil=True, error_model="numpy", cache=True)
def backward(begin, end, code, clamp, gated, interleaved, h, scale, d, dh, ds, library=LIBRARY):
    """Write ds_r = ⟨d_r, a_r⟩ and dh_r = act'(h_r) s_r d_r, and s_r a_r in place of d_r."""
    n = d.shape[1]
    scratch = np.empty((5, n), np.float32)
    gate, up, value, slope, a = scratch[0], scratch[1], scratch[2], scratch[3], scratch[4]
    for r in range(begin, end):
        s = scale[r] if scale.shape[0] > 0 else _ONE
        grad, out = d[r], dh[r]
        if not gated:
            _curve(code, clamp, h[r], a, slope)
            ds[r] = _dot(grad, a)
            for i in range(n):
                out[i] = slope[i] * (s * grad[i])
            for i in range(n):
                grad[i] = s * a[i]
            continue
        _halves(h[r], interleaved, gate, up)
        _curve(code, clamp, gate, value, slope)
        if code == CLAMPED:
            # The gate's place takes the slope of the clipped half.
            for i in range(n):
                gate[i] = _ONE if abs(up[i]) <= clamp[0] else _ZERO
                up[i] = _clip(up[i], -clamp[0], clamp[0]) + clamp[2]
        else:
            for i in range(n):
                gate[i] = _ONE
        for i in range(n):
            a[i] = value[i] * up[i]
        ds[r] = _dot(grad, a)
        for i in range(n):
            step = s * grad[i]
            slope[i] = step * up[i] * slope[i]
            value[i] = step * value[i] * gate[i]
        if interleaved:
            for i in range(n):
                out[2 * i] = slope[i]
                out[2 * i + 1] = value[i]
        else:
            for i in range(n):
                out[i] = slope[i]
            for i in range(n):
                out[n + i] = value[i]
        for i in range(n):
            grad[i] = s * a[i]
