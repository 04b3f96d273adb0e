"""The cases of ``moesaic bench layer`` and ``grouped-matmul``: sizes, what they cost at least, and what is checked.

    l_t = x_t Rᵀ,  A_t the top k of l_t,  w_t = softmax of l_t over A_t       router R (E, d)
    y_t = Σ_j w_tj swiglu(x_t U_eᵀ) V_eᵀ,  e = A_tj       gate_up U: (E, 2n, d), down V: (E, d, n), as transformers
                                                           keeps them

Without a router A and w are drawn, equal for all sides: every token chooses k different experts, all equally likely.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

ROTATED_BYTES, MOST_TURNS = 2**27, 64
CPU_BYTES, CPU_FLOPS = 6e9, 1.2e11
"""Most of a case on a CPU: weights with their gradients, and FLOPs of a forward and backward pass of the experts."""
SAMPLED_CHOICES = 2048
FEWEST_EXPERTS, MOST_EXPERTS = 8, 512
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


@dataclass(frozen=True)
class Case:
    """T tokens of width d through k of E gated experts of width n; ``group`` says what the case stands for.

    ``router``: whether scores and choice of experts are part of the layer.
    """

    n_tokens: int
    d_model: int
    d_ff: int
    n_experts: int
    top_k: int
    dtype: str = "bfloat16"
    group: str = ""
    router: bool = True

    @property
    def name(self) -> str:
        """T, d, n, E, k and the dtype."""
        sizes = (self.n_tokens, self.d_model, self.d_ff, self.n_experts, self.top_k)
        return f"{', '.join(map(str, sizes))}, {SHORT[self.dtype]}{'' if self.router else ', experts alone'}"

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
        """Useful FLOPs: 6·T·k·d·n + 2·T·d·E (router) forward, twice as many more for the gradients."""
        router = self.n_tokens * self.d_model * self.n_experts if self.router else 0
        return (3 if backward else 1) * (6 * self.n_rows * self.d_model * self.d_ff + 2 * router)

    def least_bytes(self, touched: float, *, backward: bool) -> float:
        """Bytes that have to move, each tensor once per pass that needs it, nothing but h kept between the passes.

        forward   touched·3nd (weights) + 2Td (x in, y out) + Tk (gate weights), times the element's size, + 8Tk (ids)
        backward  touched·3nd + 3Td (x, dy in, dx out) + 2Tk (gate weights, their gradient) + 2·2nTk (h, written in the
                  forward pass and read again) + E·3nd (gradients of all weights, zeros included), times that, + 8Tk
        router    E·d each time, and E·d for its gradient, times that; gate weights and ids are then made inside: kept
                  for the gradient, Tk and 8Tk of each pass, and not even that without one

        ``touched``: experts that a token has chosen. Experts' rows of outputs (Tk, d) and activations (Tk, n), and
        logits (T, E), which most implementations write and read, are not counted: a fused layer need not have them.
        """
        size, width = self.torch_dtype.itemsize, 3 * self.d_ff * self.d_model
        router = self.n_experts * self.d_model if self.router else 0
        chosen = 0 if self.router and not backward else size * self.n_rows + 8 * self.n_rows
        forward = size * (touched * width + 2 * self.n_tokens * self.d_model + router) + chosen
        if not backward:
            return forward
        gates = (1 if self.router else 2) * self.n_rows
        again = touched * width + 3 * self.n_tokens * self.d_model + gates + 4 * self.d_ff * self.n_rows
        return forward + size * (again + self.n_experts * width + 2 * router) + 8 * self.n_rows


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
        Case(1024, 512, 1, 65536, 32, group="tiny", router=False),
    ),
    "cpu": (
        Case(512, 256, 128, 16, 2, "float32"), Case(4, 256, 128, 32, 4, "float32", "decode"),
        Case(32, 128, 1, 4096, 16, group="tiny", router=False),
    ),
}  # fmt: skip


def cases(device: str, quick: bool) -> list[Case]:
    """Training shapes, the same layer at many T and E, decoding (forward only), and many tiny experts.

    On a CPU they are smaller, most of them in float32. A million experts are measured without a router: scores of all
    of them would be most of the work.
    """
    if quick:
        return list(QUICK[device])
    if device == "cuda":
        return [
            *TWELVE,
            *(Case(n_tokens, 2048, 768, 128, 8, group="decode") for n_tokens in (1, 8, 64, 256)),
            *(Case(n_tokens, 2048, 768, 128, 8, group="Qwen3-30B") for n_tokens in (1024, 4096, 32768)),
            *(Case(32768, 2048, 768, n_experts, 8, group="over E") for n_experts in (8, 32, 512)),
            Case(32768, 2048, 64, 1024, 64, group="tiny"),
            Case(8192, 2048, 16, 4096, 128, group="tiny"),
            Case(4096, 1024, 1, 10**6, 128, group="tiny", router=False),
        ]
    return [
        *(Case(n_tokens, 512, 256, 16, 2, "float32", "over T") for n_tokens in (32, 128, 512, 2048, 8192)),
        *(Case(1024, 256, 128, n_experts, 8, "float32", "over E") for n_experts in (8, 32, 128, 512, 1024)),
        Case(2048, 512, 256, 128, 8, "float32"),
        *(Case(n_tokens, 512, 256, 64, 4, "float32", "decode") for n_tokens in (1, 16, 256)),
        Case(64, 256, 1, 10**6, 128, group="tiny", router=False),
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


def draw_sample(ids: Tensor, n_experts: int, clear: Tensor | None = None) -> Sample:
    """All tokens and experts where they are few; else evenly spaced tokens, and an idle expert, the busiest and others.

    A token's check costs a product per expert that it chose, so there are `SAMPLED_CHOICES` of these in all; as many
    experts as have that many tokens between them. ``clear`` (T,) leaves out tokens.

    Raises:
        ValueError: ``clear`` leaves out all of them.
    """
    n_tokens, top_k = ids.shape
    able = torch.arange(n_tokens, device=ids.device) if clear is None else clear.nonzero().flatten()
    if not len(able):
        raise ValueError("rounding may change every token's choice of experts: nothing can be checked")
    count = min(len(able), max(8, SAMPLED_CHOICES // top_k))
    tokens = able[torch.arange(count, device=ids.device) * len(able) // count]
    counts = torch.bincount(ids.flatten(), minlength=n_experts)
    busiest = torch.argsort(counts, descending=True, stable=True)
    n_busy = int((counts > 0).sum())
    wanted = max(FEWEST_EXPERTS, min(MOST_EXPERTS, SAMPLED_CHOICES * n_busy // ids.numel()))
    places = torch.arange(wanted - 1) * n_busy // (wanted - 1)
    experts = torch.cat([busiest[places.to(ids.device)], busiest[-1:]])
    if n_experts <= wanted:
        experts = torch.arange(n_experts, device=ids.device)
    return Sample(tokens, experts.unique())


def slots_by_expert(ids: Tensor, sample: Sample | None = None) -> Iterator[tuple[int, Tensor]]:
    """Yield (expert, its slots t·k + j); of a sample all slots of its experts, of other experts those of its tokens."""
    flat, top_k = ids.flatten(), ids.shape[1]
    slots = torch.arange(flat.numel(), device=ids.device)
    if sample is not None:
        mine = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        mine[sample.tokens] = True
        slots = slots[mine.repeat_interleave(top_k) | torch.isin(flat, sample.experts)]
    slots = slots[torch.argsort(flat[slots], stable=True)]
    experts, counts = flat[slots].unique_consecutive(return_counts=True)
    yield from zip(experts.tolist(), slots.split(counts.tolist()), strict=True)


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


def n_turns(n_bytes: float) -> int:
    """How many inputs of ``n_bytes`` to take turns on, so that a cache of the usual size does not hold them all."""
    return max(1, min(MOST_TURNS, math.ceil(ROTATED_BYTES / n_bytes)))
