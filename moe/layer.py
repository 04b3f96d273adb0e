"""The MoE layer: a router, k of E expert MLPs per token, and shared experts that every token takes.

    l = x Rᵀ,   (w, A) = route_topk(l),   y = Σ_{j} w_j MLP_{A_j}(x)  [+ MLP_shared(x)]

The router and its softmax run in float32 (float64 for float64), under autocast too.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.kernels._autocast import linear
from moesaic.kernels.balancing import drop_over_capacity, update_selection_bias
from moesaic.kernels.dispatch import group_by_expert
from moesaic.kernels.expert_mlp import ACTIVATIONS, GATED, activate, expert_mlp
from moesaic.kernels.routing import Routing, load_balance_loss, route_topk

# gate -> (scoring, renormalize)
GATES = {"softmax": ("softmax", True), "switch": ("softmax", False), "sigmoid": ("sigmoid", False)}
BALANCES = ("none", "aux", "bias")


class LayerRouting(NamedTuple):
    """Where the last batch went.

    weights (..., k); ids (..., k) int64, n_experts where capacity dropped the choice; counts (E,) choices computed per
    expert; n_dropped () choices over capacity; load_balance_loss () E·Σ f_e P_e before dropping, differentiable.
    """

    weights: Tensor
    ids: Tensor
    counts: Tensor
    n_dropped: Tensor
    load_balance_loss: Tensor


class MoE(nn.Module):
    """Mixture-of-experts feed-forward layer: `y = Σ_j w_j MLP_{A_j}(x) [+ MLP_shared(x)]`, A the top k experts of x Rᵀ.

    Gates: `softmax`, w = p_A / Σ p_A with p the softmax over all experts (Mixtral; at top_k = 1 the weight is 1 and the
    router gets no gradient from the output); `switch`, w = p_A (arXiv:2101.03961); `sigmoid`, w = σ(l_A) (Llama 4).

    Balance: `none`; `aux`, add `last_routing.load_balance_loss` times a coefficient to the loss; `bias`, call
    `update_balance()` after each optimiser step: it moves a bias that picks experts but does not weigh them
    (arXiv:2408.15664).

    State: `router` (E, d_model), `up` (E, 2·d_ff or d_ff, d_model; the gate's rows first), `down` (E, d_model, d_ff);
    with `bias` `up_bias`, `down_bias` (E, ·); with shared experts, one MLP of width n_shared_experts·d_ff: `shared_up`,
    `shared_down` and biases; with balance `bias` the buffer `balance_bias` (E,). Weights start uniform in
    ±1/√fan_in, as `nn.Linear`'s do, biases at 0.

    Attributes:
        keep_routing: keep `last_routing` after each forward; True for balance `aux`, else False unless you set it.
        last_routing: `LayerRouting` of the last forward, or None. Copies and pickles of the layer leave it out.

    Args:
        d_model: width of the tokens.
        d_ff: width of one expert.
        n_experts: E.
        top_k: k, 1 to E.
        activation: one of `moesaic.kernels.expert_mlp.ACTIVATIONS`.
        gate: `softmax`, `switch` or `sigmoid`.
        bias: whether the MLPs have biases; the router has none.
        n_shared_experts: shared experts, each of width d_ff.
        balance: `none`, `aux` or `bias`.
        capacity_factor: None, or at most ⌈capacity_factor · T·k / E⌉ choices per expert are computed, in order of
            tokens; the others are dropped (they add nothing to y) and counted in `last_routing.n_dropped`.
        dtype: of parameters.
        device: of parameters.

    Raises:
        ValueError: naming the argument, its value and what it takes.
    """

    last_routing: LayerRouting | None

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        n_experts: int,
        top_k: int,
        activation: str = "swiglu",
        gate: str = "softmax",
        bias: bool = False,
        n_shared_experts: int = 0,
        balance: str = "none",
        capacity_factor: float | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("d_ff", d_ff), ("n_experts", n_experts)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 1 <= top_k <= n_experts:
            raise ValueError(f"top_k must be between 1 and n_experts = {n_experts}, got {top_k}")
        if n_shared_experts < 0:
            raise ValueError(f"n_shared_experts must be at least 0, got {n_shared_experts}")
        for name, choice, allowed in (
            ("activation", activation, ACTIVATIONS),
            ("gate", gate, GATES),
            ("balance", balance, BALANCES),
        ):
            if choice not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {choice!r}")
        if capacity_factor is not None and not 0 < capacity_factor < math.inf:
            raise ValueError(f"capacity_factor must be None or positive, got {capacity_factor}")
        self.d_model, self.d_ff, self.n_experts, self.top_k = d_model, d_ff, n_experts, top_k
        self.activation, self.gate, self.bias, self.n_shared_experts = activation, gate, bias, n_shared_experts
        self.balance, self.capacity_factor = balance, capacity_factor
        self.keep_routing = balance == "aux"
        self.last_routing = None

        def parameter(*shape: int, wanted: bool = True) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device)) if wanted else None

        factor, shared = (2 if activation in GATED else 1), n_shared_experts * d_ff
        self.router = nn.Parameter(torch.empty(n_experts, d_model, dtype=dtype, device=device))
        self.up = nn.Parameter(torch.empty(n_experts, factor * d_ff, d_model, dtype=dtype, device=device))
        self.down = nn.Parameter(torch.empty(n_experts, d_model, d_ff, dtype=dtype, device=device))
        self.up_bias = parameter(n_experts, factor * d_ff, wanted=bias)
        self.down_bias = parameter(n_experts, d_model, wanted=bias)
        self.shared_up = parameter(factor * shared, d_model, wanted=shared > 0)
        self.shared_down = parameter(d_model, shared, wanted=shared > 0)
        self.shared_up_bias = parameter(factor * shared, wanted=bias and shared > 0)
        self.shared_down_bias = parameter(d_model, wanted=bias and shared > 0)
        self.balance_bias: Tensor | None
        self.balance_load: Tensor | None
        load = torch.zeros(n_experts, dtype=torch.int64, device=device) if balance == "bias" else None
        self.register_buffer("balance_bias", None if load is None else load.to(torch.float32))
        self.register_buffer("balance_load", load, persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights uniformly in ±1/√fan_in and set the biases to 0."""
        for name, tensor in self.named_parameters(recurse=False):
            if name.endswith("_bias"):
                tensor.zero_()
            else:
                bound = 1.0 / math.sqrt(tensor.shape[-1])
                tensor.uniform_(-bound, bound)
        for buffer in (self.balance_bias, self.balance_load):
            if buffer is not None:
                buffer.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., d_model) to the same shape."""
        if x.ndim < 1 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must have shape (..., {self.d_model}), got {tuple(x.shape)}")
        logits = self._logits(x)
        scoring, renormalize = GATES[self.gate]
        weights, ids = route_topk(logits, self.top_k, scoring=scoring, bias=self.balance_bias, renormalize=renormalize)
        if self.balance_load is not None and self.training:
            with torch.no_grad():
                self.balance_load += group_by_expert(ids, self.n_experts).counts
        factor = self.capacity_factor
        kept = ids if factor is None else drop_over_capacity(ids, self.n_experts, factor).ids
        y = expert_mlp(
            x,
            self.up.transpose(1, 2),
            self.down.transpose(1, 2),
            weights,
            kept,
            activation=self.activation,
            gate_up_bias=self.up_bias,
            down_bias=self.down_bias,
        )
        if self.shared_up is not None and self.shared_down is not None:
            h = activate(F.linear(x, self.shared_up, self.shared_up_bias), self.activation)
            y = y + F.linear(h, self.shared_down, self.shared_down_bias)
        self.last_routing = self._record(logits, Routing(weights, ids), kept) if self.keep_routing else None
        return y

    def _logits(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return linear(x.to(dtype), self.router.to(dtype))

    def _record(self, logits: Tensor, routing: Routing, kept: Tensor) -> LayerRouting:
        grouping = group_by_expert(kept, self.n_experts)
        loss = load_balance_loss(logits, routing.ids)
        return LayerRouting(routing.weights, kept, grouping.counts, grouping.n_skipped, loss)

    @torch.no_grad()
    def update_balance(self, rate: float = 1e-3) -> None:
        """Move the selection bias towards balance, `b_e += rate · sign(mean load − load_e)`, and restart the count.

        The load counts the choices of all training forwards since the last call, on this process.

        Raises:
            ValueError: unless `balance="bias"`.
        """
        if self.balance_bias is None or self.balance_load is None:
            raise ValueError(f"update_balance takes a layer with balance='bias', this one has balance={self.balance!r}")
        update_selection_bias(self.balance_bias, self.balance_load, rate)
        self.balance_load.zero_()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the last routing out: it holds the graph of a forward, which can be neither copied nor stored."""
        return {**self.__dict__, "last_routing": None}

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        names = ("d_model", "d_ff", "n_experts", "top_k", "activation", "gate", "bias", "n_shared_experts", "balance")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in (*names, "capacity_factor"))
