"""Which named activation a transformers experts module has, found by trying it.

An architecture may override the interface's `_apply_gate`, and nothing says what it computes. So the module's own gate
runs on a probe, value and gradient, and where a named activation gives the same, that one fused op takes its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from moesaic.kernels.activations import GATED, GPT_OSS, PLAIN, activate, clamped_swiglu, halves

_ALLOWANCE = 1e-6
# Not at 0, nor at a limit: at a kink the slopes of equal functions may differ.
_SIZES = (0.003, 0.1, 0.4, 0.9, 1.3, 2.1, 3.7, 5.3, 9.1, 14.3, 31.0, 103.0, 1009.0, 10007.0)
_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj", "post_expert_norm", "parametrizations")
_recognised: WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], str | None]] = WeakKeyDictionary()


def _clamped(limit: float, alpha: float, shift: float) -> str | None:
    """Name `(min(max(u, −limit), limit) + shift) · min(g, limit) · σ(alpha · min(g, limit))`, if it clamps."""
    if (limit, alpha, shift) == GPT_OSS:
        return "gpt_oss"
    return clamped_swiglu(limit, alpha, shift) if 0 < limit < math.inf and math.isfinite(alpha) else None


def _numbers(module: object) -> tuple[float, ...]:
    return tuple(value for value in getattr(module, "__dict__", {}).values() if isinstance(value, int | float))


def _candidates(experts: nn.Module, has_gate: bool) -> list[str]:
    if not has_gate:
        return list(PLAIN)
    limits = [getattr(experts, name, None) for name in ("limit", "swiglu_limit")]
    alphas = [getattr(experts, name, None) for name in ("alpha", "swiglu_alpha")]
    clamped = [
        _clamped(float(limit), float(alpha), shift)
        for limit in limits
        for alpha in (*alphas, 1.0)
        for shift in (0.0, 1.0)
        if limit is not None and alpha is not None
    ]
    return [name for name in GATED if name != "gpt_oss"] + [name for name in clamped if name]


def _rows(values: Tensor, columns: int) -> Tensor:
    count = -(-values.numel() // columns) * columns
    return values[torch.arange(count, device=values.device) % values.numel()].view(-1, columns)


def _probe(experts: nn.Module, width: int, has_gate: bool, interleaved: bool) -> Tensor:
    """Return rows (R, width) of every pair of a small, a large or an excessive gate and up, of either sign."""
    limits = {abs(value) for value in _numbers(experts) if isinstance(value, float) and value}
    sizes = [*_SIZES, *(limit * near for limit in sorted(limits) for near in (0.99, 1.01, 1.5))]
    values = torch.tensor([sign * size for sign in (-1.0, 1.0) for size in sizes], dtype=torch.float32, device="cpu")
    if not has_gate:
        return _rows(values, width)
    gate, up = (_rows(half.flatten(), width // 2) for half in torch.meshgrid(values, values, indexing="ij"))
    return torch.stack([gate, up], dim=-1).flatten(1) if interleaved else torch.cat([gate, up], dim=-1)


def _value_and_gradient(function: Callable[[Tensor], Tensor], probe: Tensor) -> tuple[Tensor, Tensor]:
    h = probe.clone().requires_grad_()
    value = function(h)
    return value.detach(), torch.autograd.grad(value.sum(), h)[0]


def _agree(ours: Tensor, theirs: Tensor, scale: Tensor) -> bool:
    return ours.shape == theirs.shape and bool(((ours - theirs).abs() <= _ALLOWANCE * (theirs.abs() + scale)).all())


def _find(
    experts: nn.Module, gate: Callable[[Tensor], Tensor], width: int, has_gate: bool, interleaved: bool
) -> str | None:
    parameters = [name for name, _ in experts.named_parameters() if not name.startswith(_WEIGHTS)]
    if parameters or any(True for _ in experts.buffers()):
        return None  # what is learned, or kept, may change after the probe
    probe = _probe(experts, width, has_gate, interleaved)
    if gate(probe).requires_grad:
        return None
    value, gradient = _value_and_gradient(gate, probe)
    scale = slope_scale = probe.abs()
    if has_gate:
        gates, ups = halves(scale, interleaved)
        pair = torch.stack if interleaved else torch.cat
        scale, slope_scale = gates * ups, pair([gates + ups] * 2, dim=-1).flatten(1)
    for name in _candidates(experts, has_gate):
        ours, slope = _value_and_gradient(partial(activate, activation=name, interleaved=interleaved), probe)
        if _agree(ours, value, scale) and _agree(slope, gradient, slope_scale):
            return name
    return None


def _ask(experts: nn.Module, gate: Any, width: int, has_gate: bool, interleaved: bool) -> str | None:
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        try:
            return _find(experts, gate, width, has_gate, interleaved)
        except Exception:  # a gate of its own device or shape: no error of ours, it is called as it is
            return None


def _activation_name(experts: nn.Module, width: int, training: bool) -> str | None:
    has_gate, interleaved = bool(experts.has_gate), not experts.is_concatenated
    act: Any = getattr(experts, "act_fn", None)
    gate: Any = experts._apply_gate if has_gate else act
    if type(torch.empty(0)) is not Tensor:
        return None  # torch.export traces with tensors that hold no numbers
    state = (
        width,
        training,
        id(getattr(gate, "__func__", gate)),
        type(act),
        id(act),
        *_numbers(act),
        *_numbers(experts),
    )
    known = _recognised.get(experts)
    if known is None or known[0] != state:
        question = partial(_ask, experts, gate, width, has_gate, interleaved and has_gate)
        if torch.compiler.is_compiling():
            name = question()
        else:
            # A thread of its own has no mode on: activation checkpointing, for one, counts what is computed and saved.
            with ThreadPoolExecutor(1) as thread:
                name = thread.submit(question).result()
        known = _recognised[experts] = state, name
    return known[1]


activation_name: Callable[[nn.Module, int, bool], str | None] = torch.compiler.assume_constant_result(_activation_name)
"""Return the name of the activation that an experts module's gate equals, or None if it is none of them.

The module's numbers, its mode and its activation are remembered with the answer; when one changes, it is asked anew. A
gate that reads other parameters, or any buffer, has no name. Under `torch.compile` the answer is a constant.

Args:
    experts: a module under transformers' `use_experts_implementation`.
    width: of its pre-activation, 2F if it `has_gate`, else F.
    training: its mode, so that a compiled graph is made anew when that changes.
"""
