"""Hugging Face transformers: `experts_implementation="moesaic"`, through its experts interface.

The interface hands over an experts module: gate_up_proj (E, 2I, H), or (E, H, 2I) if `is_transposed`; up_proj if not
`has_gate`; down_proj (E, H, I) or (E, I, H); biases if `has_bias`; a norm of every expert's output if
`has_post_expert_norm`. Where the module's gate equals a named activation, all of it is one fused op; else the module's
own `_apply_gate` or `act_fn` is called between the two products. Either way an architecture's gate is honoured.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.kernels.expert_mlp import expert_mlp
from moesaic.moe.hf_gate import activation_name

NAME = "moesaic"
_KNOWN_FLAGS = {"is_concatenated", "is_transposed", "has_bias", "has_gate", "has_post_expert_norm"}
_unknown_flags: dict[str, Any] = {}


def _projection(experts: Any, name: str) -> tuple[Tensor, Tensor | None]:
    weight = getattr(experts, name)
    if weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{type(experts).__name__}.{name} is {weight.dtype}: moesaic takes unquantised floating point")
    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    return weight if experts.is_transposed else weight.transpose(1, 2), bias


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute a transformers experts module with `moesaic.kernels.expert_mlp`: `Σ_j w_j MLP_{ids_j}(x)`.

    Args:
        self: the experts module (the interface's calling convention).
        hidden_states: (T, H).
        top_k_index: (T, k); ids from num_experts on are skipped.
        top_k_weights: (T, k).

    Returns:
        (T, H) in the dtype of hidden_states.

    Raises:
        NotImplementedError: the module sets a flag of the interface that this version of moesaic does not know.
        ValueError: its weights are quantised, or shapes do not fit.
    """
    for flag, default in _unknown_flags.items():
        if getattr(self, flag, default) != default:
            raise NotImplementedError(
                f"{type(self).__name__} sets {flag}={getattr(self, flag)!r}, which moesaic cannot honour; "
                'use model.set_experts_implementation("eager")'
            )
    gate_up, gate_up_bias = _projection(self, "gate_up_proj" if self.has_gate else "up_proj")
    down, down_bias = _projection(self, "down_proj")
    if top_k_index.shape != top_k_weights.shape:
        raise ValueError(
            f"{type(self).__name__} passes routing weights {tuple(top_k_weights.shape)} for ids "
            f"{tuple(top_k_index.shape)}; moesaic takes one weight per chosen expert"
        )
    name = activation_name(self, gate_up.shape[2], self.training) if isinstance(self, nn.Module) else None
    own_gate = self._apply_gate if self.has_gate else self.act_fn
    out = expert_mlp(
        hidden_states,
        gate_up,
        down,
        top_k_weights,
        top_k_index,
        # A gate may compute in float32 whatever it is given.
        activation=name or (lambda h: own_gate(h).to(h.dtype)),
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        interleaved=name is not None and self.has_gate and not self.is_concatenated,
        post_norm=self.post_expert_norm if getattr(self, "has_post_expert_norm", False) else None,
    )
    return out.to(hidden_states.dtype)


def register_with_transformers() -> None:
    """Make `experts_implementation="moesaic"` and `model.set_experts_implementation("moesaic")` work.

    Safe to call again. An architecture that sets an option of the interface unknown to this version is refused by name
    at its first forward.

    Raises:
        ImportError: transformers is not installed, or too old for implementations from outside.
    """
    try:
        transformers = importlib.import_module("transformers")
        moe = importlib.import_module("transformers.integrations.moe")
    except ImportError as error:
        raise ImportError(
            "register_with_transformers needs transformers 5.17 or newer: pip install 'moesaic[transformers]'"
        ) from error
    parameters = inspect.signature(moe.use_experts_implementation).parameters
    # Lazy imports can leave two registries: the module's, and the one the decorator closed over.
    for registry in (moe.ALL_EXPERTS_FUNCTIONS, parameters["experts_interface"].default):
        registry.register(NAME, experts_forward)
    known = _KNOWN_FLAGS | {"experts_class", "experts_interface"}
    _unknown_flags.update({name: p.default for name, p in parameters.items() if name not in known})
    try:
        # Early 5.x releases compare with a fixed list of names here; the call reads nothing of the model for ours.
        transformers.PreTrainedModel.get_correct_experts_implementation(None, NAME)
    except ValueError as error:
        version = transformers.__version__
        raise ImportError(f"transformers {version} takes no outside experts implementation; 5.17 does") from error
