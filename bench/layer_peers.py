"""What ``moesaic bench layer`` computes, who computes it, and what is right: cases, inputs, sides, reference.

    y_t = Σ_j w_tj swiglu(x_t U_eᵀ) V_eᵀ,  e = ids_tj       gate_up U: (E, 2n, d), down V: (E, d, n), as transformers
                                                             keeps them

No router: ids and gate weights are drawn, equal for all sides. Every token chooses k different experts, all equally
likely.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.bench.environment import device_memory_bytes
from moesaic.bench.interleave import NotRunError
from moesaic.kernels import expert_mlp

OURS = "moesaic"
ROTATED_BYTES, MOST_TURNS = 2**27, 64
CPU_BYTES, CPU_FLOPS = 6e9, 1.2e11
"""Most of a case on a CPU: weights with their gradients, and FLOPs of a forward and backward pass."""
TORCH_GROUPS, MOST_PRODUCTS = 1024, 2**14
SAMPLED_CHOICES = 2048
FEWEST_EXPERTS, MOST_EXPERTS = 8, 512
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


@dataclass(frozen=True)
class Case:
    """T tokens of width d through k of E gated experts of width n; ``group`` says what the case stands for."""

    n_tokens: int
    d_model: int
    d_ff: int
    n_experts: int
    top_k: int
    dtype: str = "bfloat16"
    group: str = ""

    @property
    def name(self) -> str:
        """T, d, n, E, k and the dtype."""
        sizes = (self.n_tokens, self.d_model, self.d_ff, self.n_experts, self.top_k)
        return f"{', '.join(map(str, sizes))}, {SHORT[self.dtype]}"

    @property
    def n_rows(self) -> int:
        """Choices, T·k."""
        return self.n_tokens * self.top_k

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of everything but ids."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def weight_bytes(self) -> int:
        """Of all experts' two matrices, 3·n·d·E elements."""
        return 3 * self.d_ff * self.d_model * self.n_experts * self.torch_dtype.itemsize

    def flops(self, *, backward: bool) -> int:
        """Useful FLOPs: 6·T·k·d·n forward (three products), 12·T·k·d·n more for the gradients: 18 in all."""
        return (18 if backward else 6) * self.n_rows * self.d_model * self.d_ff

    def least_bytes(self, touched: float, *, backward: bool) -> float:
        """Bytes that have to move, each tensor once per pass that needs it, nothing but h kept between the passes.

        forward   touched·3nd (weights) + 2Td (x in, y out) + Tk (gate weights), times the element's size, + 8Tk (ids)
        backward  touched·3nd + 3Td (x, dy in, dx out) + 2Tk (gate weights, their gradient) + 2·2nTk (h, written in the
                  forward pass and read again) + E·3nd (gradients of all weights, zeros included), times that, + 8Tk

        ``touched``: experts that a token has chosen. Experts' rows of outputs (Tk, d) and activations (Tk, n), which
        most implementations write and read, are not counted: a fused layer need not have them.
        """
        size, width = self.torch_dtype.itemsize, 3 * self.d_ff * self.d_model
        forward = size * (touched * width + 2 * self.n_tokens * self.d_model + self.n_rows) + 8 * self.n_rows
        if not backward:
            return forward
        again = touched * width + 3 * self.n_tokens * self.d_model + 2 * self.n_rows + 4 * self.d_ff * self.n_rows
        return forward + size * (again + self.n_experts * width) + 8 * self.n_rows


TWELVE = tuple(
    Case(n_tokens, d_model, *sizes, group="twelve")
    for n_tokens, d_model, experts in (
        (40960, 768, ((256, 128, 8), (512, 64, 4), (1024, 32, 2))),
        (24576, 1536, ((256, 128, 8), (512, 64, 4), (1024, 32, 2))),
        (32768, 4096, ((256, 256, 16), (512, 128, 8), (1024, 64, 4))),
        (32768, 4096, ((512, 256, 16), (1024, 128, 8), (2048, 64, 4))),
    )
    for sizes in experts
)
"""Published training shapes, from many narrow experts to few wide ones."""
QUICK = {
    "cuda": (
        Case(4096, 1024, 512, 32, 4), Case(16, 2048, 768, 128, 8, group="decode"),
        Case(1024, 512, 1, 65536, 32, group="tiny"),
    ),
    "cpu": (
        Case(512, 256, 128, 16, 2, "float32"), Case(4, 256, 128, 32, 4, "float32", "decode"),
        Case(32, 128, 1, 4096, 16, group="tiny"),
    ),
}  # fmt: skip


def cases(device: str, quick: bool) -> list[Case]:
    """Training shapes, decoding (forward only), and many tiny experts; on a CPU smaller, most of them in float32."""
    if quick:
        return list(QUICK[device])
    if device == "cuda":
        return [
            *TWELVE,
            Case(32768, 2048, 768, 128, 8, group="Qwen3-30B"),
            *(Case(n_tokens, 2048, 768, 128, 8, group="decode") for n_tokens in (1, 8, 64, 256)),
            Case(32768, 2048, 64, 1024, 64, group="tiny"),
            Case(8192, 2048, 16, 4096, 128, group="tiny"),
            Case(4096, 1024, 1, 10**6, 128, group="tiny"),
        ]
    return [
        Case(2048, 512, 256, 16, 2, "float32"),
        Case(1024, 256, 128, 1024, 8, "float32", "8 tokens each"),
        *(Case(n_tokens, 512, 256, 64, 4, "float32", "decode") for n_tokens in (1, 16, 256)),
        Case(64, 256, 1, 10**6, 128, group="tiny"),
        *reduced(),
    ]


def reduced() -> list[Case]:
    """Those of the twelve whose weights and gradients a CPU has room for, with as many tokens as it has time for."""
    found = [replace(case, dtype="float32") for case in TWELVE]
    return [
        replace(case, n_tokens=2 ** int(math.log2(CPU_FLOPS * case.n_tokens / case.flops(backward=True))))
        for case in found
        if 2 * case.weight_bytes <= CPU_BYTES
    ]


class Sample(NamedTuple):
    """Tokens and experts on which results are checked, int64, each in rising order."""

    tokens: Tensor
    experts: Tensor


def draw_sample(ids: Tensor, n_experts: int) -> Sample:
    """All tokens and experts where they are few; else evenly spaced tokens, and an idle expert, the busiest and others.

    A token's check costs a product per expert that it chose, so there are `SAMPLED_CHOICES` of these in all; as many
    experts as have that many tokens between them.
    """
    n_tokens, top_k = ids.shape
    count = min(n_tokens, max(8, SAMPLED_CHOICES // top_k))
    tokens = torch.arange(count, device=ids.device) * n_tokens // count
    counts = torch.bincount(ids.flatten(), minlength=n_experts)
    busiest = torch.argsort(counts, descending=True, stable=True)
    n_busy = int((counts > 0).sum())
    wanted = max(FEWEST_EXPERTS, min(MOST_EXPERTS, SAMPLED_CHOICES * n_busy // ids.numel()))
    places = torch.arange(wanted - 1) * n_busy // (wanted - 1)
    experts = torch.cat([busiest[places.to(ids.device)], busiest[-1:]])
    if n_experts <= wanted:
        experts = torch.arange(n_experts, device=ids.device)
    return Sample(tokens, experts.unique())


def slots_by_expert(ids: Tensor, sample: Sample) -> Iterator[tuple[int, Tensor]]:
    """Yield (expert, slots t·k + j) that the sample needs: all of its experts, of others those of its tokens."""
    flat, top_k = ids.flatten(), ids.shape[1]
    places = torch.arange(top_k, device=ids.device)
    mine = (sample.tokens.unsqueeze(1) * top_k + places).flatten()
    mine = mine[torch.argsort(flat[mine], stable=True)]
    experts, counts = flat[mine].unique_consecutive(return_counts=True)
    groups = dict(zip(experts.tolist(), mine.split(counts.tolist()), strict=True))
    groups |= {expert: (flat == expert).nonzero().flatten() for expert in sample.experts.tolist()}
    yield from groups.items()


def draw_ids(n_tokens: int, n_experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """Draw k different experts per token, all equally likely, (T, k) int64 on the generator's device."""
    device = generator.device
    if top_k * top_k > 4 * n_experts:
        return torch.rand(n_tokens, n_experts, generator=generator, device=device).topk(top_k).indices
    # Drawn with replacement, and again where an expert came twice: nothing of size (T, E) for many experts.
    ids = torch.randint(n_experts, (n_tokens, top_k), generator=generator, device=device)
    while True:
        ordered = ids.sort(1).values
        again = (ordered[:, 1:] == ordered[:, :-1]).any(1).nonzero().flatten()
        if not again.numel():
            return ids
        ids[again] = torch.randint(n_experts, (again.numel(), top_k), generator=generator, device=device)


@dataclass(frozen=True, eq=False)
class LayerTurn:
    """One repetition's inputs: x (T, d), gate_up (E, 2n, d), down (E, d, n), gate weights and ids (T, k), dy (T, d)."""

    x: Tensor
    gate_up: Tensor
    down: Tensor
    weights: Tensor
    ids: Tensor
    grad: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What gets a gradient."""
        return self.x, self.gate_up, self.down, self.weights

    def picked(self, y: Tensor, grads: Sequence[Tensor], sample: Sample) -> dict[str, Tensor]:
        """The sampled part of results: y and, where there are gradients, those of `leaves`."""
        found = {"y": y[sample.tokens]}
        if grads:
            dx, dup, ddown, dweights = grads
            found |= {"dx": dx[sample.tokens], "d weights": dweights[sample.tokens]}
            found |= {"d gate_up": dup[sample.experts], "d down": ddown[sample.experts]}
        return found

    def reference(self, sample: Sample, dtype: torch.dtype) -> dict[str, Tensor]:
        """The same, expert by expert by torch's products and autograd in ``dtype``, everything rounded to it."""
        top_k, device = self.ids.shape[1], self.x.device
        count, d_model = len(sample.tokens), self.x.shape[1]
        place = torch.full((len(self.x),), -1, device=device)
        place[sample.tokens] = torch.arange(count, device=device)
        y, dx = (torch.zeros(count, d_model, dtype=dtype, device=device) for _ in range(2))
        dweights = torch.zeros(count, top_k, dtype=dtype, device=device)
        dup, ddown = (torch.zeros_like(w[sample.experts], dtype=dtype) for w in (self.gate_up, self.down))
        index = {expert: i for i, expert in enumerate(sample.experts.tolist())}
        for expert, slots in slots_by_expert(self.ids, sample):
            rows = slots // top_k
            given = (self.x[rows], self.gate_up[expert], self.down[expert], self.weights.flatten()[slots])
            leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in given]
            gate, up = (leaves[0] @ leaves[1].T).chunk(2, dim=-1)
            out = ((F.silu(gate) * up) @ leaves[2].T) * leaves[3].unsqueeze(1)
            grads = torch.autograd.grad(out, leaves, self.grad[rows].to(dtype))
            inside = place[rows] >= 0
            here = place[rows][inside]
            y.index_add_(0, here, out.detach()[inside])
            dx.index_add_(0, here, grads[0][inside])
            dweights[here, slots[inside] % top_k] = grads[3][inside]
            if expert in index:
                dup[index[expert]], ddown[index[expert]] = grads[1], grads[2]
        return {"y": y, "dx": dx, "d weights": dweights, "d gate_up": dup, "d down": ddown}


def n_turns(n_bytes: float) -> int:
    """How many inputs of ``n_bytes`` to take turns on, so that a cache of the usual size does not hold them all."""
    return max(1, min(MOST_TURNS, math.ceil(ROTATED_BYTES / n_bytes)))


def layer_turns(case: Case, device: str) -> list[LayerTurn]:
    """Inputs to take turns on: tokens and ids of their own, and copies of the weights as far as they are small."""
    generator = torch.Generator(device).manual_seed(case.n_experts)
    dtype = case.torch_dtype

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    share = min(1.0, case.n_rows / case.n_experts)
    count = n_turns(share * case.weight_bytes + 3 * case.n_tokens * case.d_model * dtype.itemsize)
    width, hidden, n_experts = case.d_model, case.d_ff, case.n_experts
    stacks = [
        (
            torch.nn.Parameter(draw(n_experts, 2 * hidden, width).mul_(width**-0.5)),
            torch.nn.Parameter(draw(n_experts, width, hidden).mul_(hidden**-0.5)),
        )
        for _ in range(max(1, min(count, ROTATED_BYTES // case.weight_bytes)))
    ]
    found = []
    for turn in range(count):
        logits = draw(case.n_tokens, case.top_k)
        ids = draw_ids(case.n_tokens, n_experts, case.top_k, generator)
        x, weights = draw(case.n_tokens, width).requires_grad_(), torch.softmax(logits, -1).requires_grad_()
        found.append(LayerTurn(x, *stacks[turn % len(stacks)], weights, ids, draw(case.n_tokens, width)))
    return found


Side = Callable[[Any], Tensor]
Build = Callable[[Case, str], Side]
"""Makes a side for a case and a device, or raises NotRunError."""


def need_room(n_bytes: float, device: str) -> None:
    """Raise NotRunError for what takes more than half of the device's memory: a CPU would rather end the process."""
    available = device_memory_bytes(device)
    if available and n_bytes > available / 2:
        raise NotRunError(f"takes about {n_bytes / 2**30:.0f} GiB")


def ours(case: Case, device: str) -> Side:
    """`expert_mlp`."""
    return lambda turn: expert_mlp(
        turn.x, turn.gate_up.transpose(1, 2), turn.down.transpose(1, 2), turn.weights, turn.ids
    )


def torch_grouped_mm(case: Case, device: str) -> Side:
    """Sort, gather, `grouped_mm`, SiLU · up, `grouped_mm`, gate weights, back to tokens, and a sum over k."""
    need_room(
        2 * case.weight_bytes + case.n_rows * (6 * case.d_model + 8 * case.d_ff) * case.torch_dtype.itemsize, device
    )
    need_groups(case, device)

    def side(turn: LayerTurn) -> Tensor:
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
        if implementation == "grouped_mm":
            need_groups(case, device)
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
                    made[turn] = mixtral.MixtralExperts(config)
                made[turn].gate_up_proj, made[turn].down_proj = turn.gate_up, turn.down
            y: Tensor = made[turn](turn.x, turn.ids, turn.weights)
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
        y: Tensor = function.apply(turn.x, turn.gate_up, turn.down, turn.ids.to(torch.int32), turn.weights)
        return y

    return side


def scattermoe(case: Case, device: str) -> Side:
    """ScatterMoE's two linear operations, SiLU · up between them."""
    _need_cuda(device)
    theirs = _module("scattermoe.parallel_experts", "scattermoe")

    def side(turn: LayerTurn) -> Tensor:
        routed = theirs.flatten_sort_count(turn.ids, case.n_experts)
        h = theirs.parallel_linear(turn.x, turn.gate_up.transpose(1, 2), case.top_k, *routed, grouped_out=True)
        gate, up = h.chunk(2, dim=-1)
        y: Tensor = theirs.parallel_linear(
            F.silu(gate) * up, turn.down.transpose(1, 2), 1, *routed, grouped_in=True, gates=turn.weights
        )
        return y

    return side


SIDES: Mapping[str, Build] = {
    OURS: ours,
    "torch-grouped-mm": torch_grouped_mm,
    "torch-loop": torch_loop,
    "torch-bmm": torch_bmm,
    "transformers-eager": _transformers("eager"),
    "transformers-grouped-mm": _transformers("grouped_mm"),
    "liger": liger,
    "scattermoe": scattermoe,
}
"""Who computes a layer, by the name that ``--against`` takes."""
