"""Who computes the layers of ``moesaic bench layer``: ours and its peers, by the name that ``--against`` takes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.bench.environment import device_memory_bytes
from moesaic.bench.interleave import NotRunError
from moesaic.bench.layer_cases import Case
from moesaic.bench.layer_turns import LayerTurn
from moesaic.kernels import expert_mlp
from moesaic.moe import MoE

OURS = "moesaic"
TORCH_GROUPS, MOST_PRODUCTS, EAGER_BYTES = 1024, 2**14, 5e10

Side = Callable[[Any], Tensor]
Build = Callable[[Case, str], Side]
"""Makes a side for a case and a device, or raises NotRunError."""


def need_room(n_bytes: float, device: str) -> None:
    """Raise NotRunError for what takes more than half of the device's memory: a CPU would rather end the process."""
    available = device_memory_bytes(device)
    if available and n_bytes > available / 2:
        raise NotRunError(f"takes about {n_bytes / 2**30:.0f} GiB")


def ours(case: Case, device: str) -> Side:
    """`MoE`; without a router `expert_mlp`."""
    made: dict[LayerTurn, MoE] = {}

    def side(turn: LayerTurn) -> Tensor:
        if turn.router is None:
            return expert_mlp(
                turn.x, turn.gate_up.transpose(1, 2), turn.down.transpose(1, 2), turn.weights, turn.ids
            )  # fmt: skip
        if turn not in made:
            layer: Any = MoE(case.d_model, case.d_ff, case.n_experts, case.top_k, device="meta")
            layer.router, layer.up, layer.down = turn.router, turn.gate_up, turn.down
            made[turn] = layer
        y: Tensor = made[turn](turn.x)
        return y

    return side


def routed(turn: LayerTurn) -> LayerTurn:
    """The turn with gate weights and ids found by a linear layer, softmax and topk, as peers without a router need."""
    if turn.router is None:
        return turn
    probabilities = torch.softmax(F.linear(turn.x, turn.router), -1, dtype=torch.float32)
    weights, ids = probabilities.topk(turn.ids.shape[1])
    return replace(turn, weights=(weights / weights.sum(-1, keepdim=True)).to(turn.x.dtype), ids=ids)


def torch_grouped_mm(case: Case, device: str) -> Side:
    """Sort, gather, `grouped_mm`, SiLU · up, `grouped_mm`, gate weights, back to tokens, and a sum over k."""
    need_room(
        2 * case.weight_bytes + case.n_rows * (6 * case.d_model + 8 * case.d_ff) * case.torch_dtype.itemsize, device
    )
    need_groups(case, device)

    def side(turn: LayerTurn) -> Tensor:
        turn = routed(turn)
        order = torch.argsort(turn.ids.flatten(), stable=True)
        offsets = ends(turn.ids, case.n_experts)
        rows = turn.x.index_select(0, order // case.top_k)
        gate, up = F.grouped_mm(rows, turn.gate_up.transpose(1, 2), offs=offsets).chunk(2, dim=-1)
        out = F.grouped_mm(F.silu(gate) * up, turn.down.transpose(1, 2), offs=offsets)
        out = out * turn.weights.flatten()[order].unsqueeze(1)
        return out[torch.argsort(order)].view(*turn.ids.shape, -1).sum(1)

    return side


def need_groups(case: Case, device: str) -> None:
    """Raise NotRunError for more experts than torch's grouped product takes on a GPU."""
    if device == "cuda" and case.n_experts >= TORCH_GROUPS:
        raise NotRunError(f"torch's grouped product takes fewer than {TORCH_GROUPS} experts")


def ends(ids: Tensor, n_experts: int) -> Tensor:
    """Where each expert's rows end, (E,) int32; nothing is read back to the host."""
    flat = ids.flatten()
    counts = torch.zeros(n_experts, dtype=torch.int32, device=ids.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32)).cumsum(0, dtype=torch.int32)


def matrices(stack: Tensor, experts: Sequence[int]) -> Sequence[Tensor]:
    """One matrix per expert. With a gradient from `unbind` (of a copy, if there are many others): one stack, not E."""
    if not torch.is_grad_enabled():
        return [stack[expert] for expert in experts]
    if len(stack) <= 4 * len(experts):
        every = stack.unbind(0)
        return [every[expert] for expert in experts]
    return stack[torch.tensor(experts, device=stack.device)].unbind(0)


def need_products(case: Case) -> None:
    """Raise NotRunError where a loop over experts is bound by nothing but its own steps."""
    if min(case.n_experts, case.n_rows) > MOST_PRODUCTS:
        raise NotRunError(f"a loop of more than {MOST_PRODUCTS} products")


def torch_loop(case: Case, device: str) -> Side:
    """A loop over the experts that have tokens: gather, two products, gate weights, `index_add_`."""
    need_room(
        3 * case.weight_bytes + case.n_rows * (4 * case.d_model + 8 * case.d_ff) * case.torch_dtype.itemsize, device
    )
    need_products(case)

    def side(turn: LayerTurn) -> Tensor:
        turn = routed(turn)
        ordered, order = torch.sort(turn.ids.flatten(), stable=True)
        experts, counts = (tensor.tolist() for tensor in ordered.unique_consecutive(return_counts=True))
        y, gates = torch.zeros_like(turn.x, requires_grad=False), turn.weights.flatten()
        parts = zip(matrices(turn.gate_up, experts), matrices(turn.down, experts), order.split(counts), strict=True)
        for gate_up, down, slots in parts:
            tokens = slots // case.top_k
            gate, up = F.linear(turn.x[tokens], gate_up).chunk(2, dim=-1)
            y.index_add_(0, tokens, F.linear(F.silu(gate) * up, down) * gates[slots].unsqueeze(1))
        return y

    return side


def torch_bmm(case: Case, device: str) -> Side:
    """Every choice's matrices gathered, then batched matrix-vector products: for few tokens or tiny experts."""
    size = case.torch_dtype.itemsize
    need_room(2 * case.weight_bytes + 3 * case.n_rows * 3 * case.d_ff * case.d_model * size, device)

    def side(turn: LayerTurn) -> Tensor:
        turn = routed(turn)
        ids = turn.ids.flatten()
        rows = turn.x.repeat_interleave(case.top_k, 0).unsqueeze(2)
        gate, up = torch.bmm(turn.gate_up[ids], rows).chunk(2, dim=1)
        out = torch.bmm(turn.down[ids], F.silu(gate) * up).view(*turn.ids.shape, -1)
        return (out * turn.weights.unsqueeze(-1)).sum(1)

    return side


def _module(name: str, needed: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotRunError(f"{needed} cannot be imported: {error}") from error


def _transformers(implementation: str) -> Build:
    def build(case: Case, device: str) -> Side:
        size = case.torch_dtype.itemsize
        need_room(4 * case.weight_bytes + case.n_rows * (8 * case.d_model + 8 * case.d_ff) * size, device)
        if implementation == "eager" and case.n_experts > TORCH_GROUPS:
            raise NotRunError(f"one-hot ids (T, k, E), and a gradient of all weights per expert: E > {TORCH_GROUPS}")
        filled = case.n_experts * case.weight_bytes
        if implementation == "eager" and device == "cpu" and filled > EAGER_BYTES:
            raise NotRunError(f"a gradient of all weights per expert: {filled / 1e9:.0f} GB of zeros, takes minutes")
        if implementation == "grouped_mm":
            need_groups(case, device)
        if implementation == "batched_mm":
            need_room(2 * case.weight_bytes + 3 * case.n_rows * 3 * case.d_ff * case.d_model * size, device)
        mixtral = _module("transformers.models.mixtral.modeling_mixtral", "transformers")
        config = mixtral.MixtralConfig(
            hidden_size=case.d_model, intermediate_size=case.d_ff, num_local_experts=case.n_experts,
            num_experts_per_tok=case.top_k, hidden_act="silu",
        )  # fmt: skip
        config._experts_implementation = implementation
        made: dict[LayerTurn, Any] = {}

        def side(turn: LayerTurn) -> Tensor:
            if turn not in made:
                with torch.device("meta"):
                    made[turn] = mixtral.MixtralSparseMoeBlock(config)
                experts = made[turn].experts
                experts.gate_up_proj, experts.down_proj = turn.gate_up, turn.down
                if turn.router is not None:
                    made[turn].gate.weight = turn.router
            y: Tensor
            if turn.router is None:
                y = made[turn].experts(turn.x, turn.ids, turn.weights)
            else:
                y = made[turn](turn.x.unsqueeze(0)).squeeze(0)
            return y

        return side

    return build


def _need_cuda(device: str) -> None:
    if device != "cuda":
        raise NotRunError("takes a CUDA device")


def liger(case: Case, device: str) -> Side:
    """Liger's fused mixture of experts."""
    _need_cuda(device)
    function = _module("liger_kernel.ops.fused_moe", "liger_kernel").LigerFusedMoEFunction

    def side(turn: LayerTurn) -> Tensor:
        turn = routed(turn)
        y: Tensor = function.apply(turn.x, turn.gate_up, turn.down, turn.ids.to(torch.int32), turn.weights)
        return y

    return side


def scattermoe(case: Case, device: str) -> Side:
    """ScatterMoE's two linear operations, SiLU · up between them."""
    _need_cuda(device)
    theirs = _module("scattermoe.parallel_experts", "scattermoe")

    def side(turn: LayerTurn) -> Tensor:
        turn = routed(turn)
        order = theirs.flatten_sort_count(turn.ids, case.n_experts)
        h = theirs.parallel_linear(turn.x, turn.gate_up.transpose(1, 2), case.top_k, *order, grouped_out=True)
        gate, up = h.chunk(2, dim=-1)
        y: Tensor = theirs.parallel_linear(
            F.silu(gate) * up, turn.down.transpose(1, 2), 1, *order, grouped_in=True, gates=turn.weights
        )
        return y

    return side


SIDES: Mapping[str, Build] = {
    OURS: ours,
    "torch-grouped-mm": torch_grouped_mm,
    "torch-loop": torch_loop,
    "torch-bmm": torch_bmm,
    "transformers-eager": _transformers("eager"),
    "transformers-batched-mm": _transformers("batched_mm"),
    "transformers-grouped-mm": _transformers("grouped_mm"),
    "liger": liger,
    "scattermoe": scattermoe,
}
"""Who computes a layer, by the name that ``--against`` takes."""
