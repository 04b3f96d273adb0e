"""The MoE layer: a router, k of E expert MLPs per token, and shared experts that every token takes.

    l = x Rᵀ,   (w, A) = route_topk(l),   y = Σ_{j} w_j MLP_{A_j}(x)  [+ MLP_shared(x)]

The router and its softmax run in float32 (float64 for float64), under autocast too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.kernels._autocast import linear
from moesaic.kernels.activations import check_activation, is_gated
from moesaic.kernels.balancing import drop_over_capacity, update_selection_bias
from moesaic.kernels.dispatch import group_by_expert
from moesaic.kernels.expert_mlp import activate, expert_mlp
from moesaic.kernels.routing import Routing, load_balance_loss, route_topk
from moesaic.moe.parallel import ExpertRanks, check_same, collective, draw_experts

# gate -> (scoring, renormalize)
GATES = {"softmax": ("softmax", True), "switch": ("softmax", False), "sigmoid": ("sigmoid", False)}
BALANCES = ("none", "aux", "bias")
EXPERTS = ("up", "down", "up_bias", "down_bias")
_ARGUMENTS = (
    "d_model", "d_ff", "n_experts", "top_k", "activation", "gate", "bias", "n_shared_experts", "balance",
    "capacity_factor",
)  # fmt: skip


class LayerRouting(NamedTuple):
    """Where the last batch went.

    weights (..., k); ids (..., k) int64, n_experts where capacity dropped the choice; counts (E,) choices computed per
    expert; n_dropped () choices over capacity; load_balance_loss () E·Σ f_e P_e before dropping, differentiable. All of
    this process's tokens alone, whatever the other ranks have.
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

    Expert parallelism, with `process_group`: every rank of the group has its own tokens (none is fine) and E/W experts,
    rank r those from r·E/W on; router, shared experts and `balance_bias` are on every rank. Construction, forward,
    backward, `reset_parameters` and `update_balance` are collective: all ranks make the same calls in the same order. y
    is the one process's; so are the experts' gradients where the loss is the sum of the ranks' losses, while those of
    the other parameters are of this rank's tokens, until `reduce_gradients` adds them up. The host waits for the device
    once per forward, for the sizes, which `torch.compile` leaves to Python; without `process_group` it never does.
    `up`, `down` and their biases are DTensors of the full shape, sharded over experts, which
    torch.distributed.checkpoint reshards; `load_state_dict` also takes one process's full tensors, and keeps its own
    experts. With equal seeds, all ranks together start as one process does; router and shared experts are the first
    rank's in any case. If a rank dies, on gloo the others raise RuntimeError at once, and if it hangs, after the
    `timeout` of `init_process_group`; on NCCL, PyTorch's watchdog ends them after that time. DDP and FSDP around a
    layer with `process_group` are not supported.

    Attributes:
        keep_routing: keep `last_routing` after each forward; True for balance `aux`, else False unless you set it. Its
            balance loss has no gradient under reentrant checkpointing, whose forward has none.
        last_routing: `LayerRouting` of the last forward, or None. Copies and pickles of the layer leave it out.

    Args:
        d_model: width of the tokens.
        d_ff: width of one expert.
        n_experts: E.
        top_k: k, 1 to E.
        activation: one of `moesaic.kernels.expert_mlp.ACTIVATIONS`, or what `clamped_swiglu` there returns.
        gate: `softmax`, `switch` or `sigmoid`.
        bias: whether the MLPs have biases; the router has none.
        n_shared_experts: shared experts, each of width d_ff.
        balance: `none`, `aux` or `bias`.
        capacity_factor: None, or at most ⌈capacity_factor · T·k / E⌉ choices per expert are computed, in order of
            tokens; the others are dropped (they add nothing to y) and counted in `last_routing.n_dropped`. Tokens are
            this process's own, as T is.
        dtype: of parameters.
        device: of parameters.
        process_group: None, or the ranks that share the experts; E must be divisible by their number.

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
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("d_ff", d_ff), ("n_experts", n_experts)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 1 <= top_k <= n_experts:
            raise ValueError(f"top_k must be between 1 and n_experts = {n_experts}, got {top_k}")
        check_activation(activation)
        if n_shared_experts < 0:
            raise ValueError(f"n_shared_experts must be at least 0, got {n_shared_experts}")
        for name, choice, allowed in (
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

        router = torch.empty(n_experts, d_model, dtype=dtype, device=device)
        self._ranks = None if process_group is None else ExpertRanks(process_group, n_experts, router.device)
        if process_group is not None:
            names = (*_ARGUMENTS, "dtype")
            check_same(process_group, {**{name: getattr(self, name, None) for name in names}, "dtype": router.dtype})

        def parameter(*shape: int, wanted: bool = True) -> nn.Parameter | None:
            return nn.Parameter(router.new_empty(shape)) if wanted else None

        def experts(*shape: int) -> nn.Parameter:
            if self._ranks is None:
                return nn.Parameter(router.new_empty(n_experts, *shape))
            return nn.Parameter(self._ranks.shard(router.new_empty(self._ranks.n_local, *shape)))

        factor, shared = (2 if is_gated(activation) else 1), n_shared_experts * d_ff
        self.router = nn.Parameter(router)
        self.up, self.down = experts(factor * d_ff, d_model), experts(d_model, d_ff)
        self.up_bias = experts(factor * d_ff) if bias else None
        self.down_bias = experts(d_model) if bias else None
        self.shared_up = parameter(factor * shared, d_model, wanted=shared > 0)
        self.shared_down = parameter(d_model, shared, wanted=shared > 0)
        self.shared_up_bias = parameter(factor * shared, wanted=bias and shared > 0)
        self.shared_down_bias = parameter(d_model, wanted=bias and shared > 0)
        load = router.new_zeros(n_experts, dtype=torch.int64) if balance == "bias" else None
        self.balance_bias: Tensor | None
        self.register_buffer("balance_bias", None if load is None else load.to(torch.float32))
        # No buffer: DistributedDataParallel gives all ranks the first one's buffers at every forward.
        self.balance_load = load
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights uniformly in ±1/√fan_in and set the biases to 0."""
        for name, tensor in self.named_parameters(recurse=False):
            bound = 1.0 / math.sqrt(tensor.shape[-1])
            if name.endswith("_bias"):
                tensor.zero_()
            elif name in EXPERTS and self._ranks is not None:
                self._ranks.draw(tensor, bound)
            elif name in EXPERTS and type(tensor) is nn.Parameter:
                draw_experts(tensor, bound)
            else:  # as a whole where fully_shard has made DTensors of experts
                tensor.uniform_(-bound, bound)
            if name not in EXPERTS and self._ranks is not None:
                self._ranks.copy_from_first(tensor)
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
            if self.balance_load.device != ids.device:  # fully_shard moves parameters and buffers only
                self.balance_load = self.balance_load.to(ids.device)
            self.balance_load.add_(group_by_expert(ids, self.n_experts).counts)
        factor = self.capacity_factor
        kept = ids if factor is None else drop_over_capacity(ids, self.n_experts, factor).ids
        if self._ranks is not None:
            y = self._ranks.expert_mlp(
                x, self.up, self.down, weights, kept,
                activation=self.activation, up_bias=self.up_bias, down_bias=self.down_bias,
            )  # fmt: skip
        else:
            y = expert_mlp(
                x, self.up.transpose(1, 2), self.down.transpose(1, 2), weights, kept,
                activation=self.activation, gate_up_bias=self.up_bias, down_bias=self.down_bias,
            )  # fmt: skip
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

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks that share the experts."""
        return None if self._ranks is None else self._ranks.group

    @property
    def active_parameters(self) -> int:
        """Parameters that a token meets: router, shared experts, and top_k of the n_experts experts."""
        numbers = {name: tensor.numel() for name, tensor in self.named_parameters(recurse=False)}
        experts = sum(number for name, number in numbers.items() if name in EXPERTS)
        return sum(numbers.values()) - experts + experts // self.n_experts * self.top_k

    @torch.no_grad()
    def update_balance(self, rate: float = 1e-3, group: dist.ProcessGroup | None = None) -> None:
        """Move the selection bias towards balance, `b_e += rate · sign(mean load − load_e)`, and restart the count.

        The load counts the choices of all training forwards since the last call, on all ranks of `group`.

        Args:
            rate: the step.
            group: whose loads are added up, a collective; None is `process_group`, and without one this process alone.
                Under data parallelism pass its ranks (`torch.distributed.group.WORLD`), or their biases drift apart.

        Raises:
            ValueError: unless `balance="bias"`.
            RuntimeError: a rank died or did not come in time.
        """
        if self.balance_bias is None or self.balance_load is None:
            raise ValueError(f"update_balance takes a layer with balance='bias', this one has balance={self.balance!r}")
        group = self.process_group if group is None else group
        if group is not None:
            with collective("all-reduce of loads", group):
                dist.all_reduce(self.balance_load, group=group)
        update_selection_bias(self.balance_bias, self.balance_load, rate)
        self.balance_load.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoE:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.balance_load is not None:
            self.balance_load = fn(self.balance_load)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take this rank's experts of a full state dict, as one process has it; others are loaded as they are."""
        if self._ranks is not None:
            for key in (prefix + name for name in EXPERTS):
                full: Any = state_dict.get(key)
                if type(full) in (Tensor, nn.Parameter) and full.shape[:1] == (self.n_experts,):
                    state_dict[key] = self._ranks.own(full.detach())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the last routing out: it holds the graph of a forward, which can be neither copied nor stored."""
        return {**self.__dict__, "last_routing": None}

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        arguments = ", ".join(f"{name}={getattr(self, name)!r}" for name in _ARGUMENTS)
        return arguments if self._ranks is None else f"{arguments}, process_group={self._ranks.group.size()} ranks"
