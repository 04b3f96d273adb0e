"""One repetition's inputs of ``moesaic bench layer``, and what is right: results in float64 for a sample of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.bench.layer_cases import ROTATED_BYTES, Case, Sample, draw_ids, n_turns, slots_by_expert

SCORE_BYTES = 2**28
"""Scores in float64 that exist at once."""
REDRAWN = 8
"""Times that tokens are drawn anew whose choice rounding may change."""
TIE = {torch.float32: 2.0**-17, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float64: 2.0**-40}
"""Scores that differ by less, in the largest of their row, may change places by rounding: some four roundings."""


@dataclass(frozen=True, eq=False)
class LayerTurn:
    """x (T, d), router (E, d) or none, gate_up (E, 2n, d), down (E, d, n), gate weights and ids (T, k), dy (T, d).

    With a router weights and ids are what it should find. ``clear`` (T,): tokens whose choice no rounding changes.
    """

    x: Tensor
    router: Tensor | None
    gate_up: Tensor
    down: Tensor
    weights: Tensor
    ids: Tensor
    grad: Tensor
    clear: Tensor | None = None

    @property
    def checked(self) -> Tensor:
        """Dy of the check: 0 for tokens that are not clear, so that they change nothing that is checked."""
        return self.grad if self.clear is None else self.grad * self.clear.unsqueeze(1)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What gets a gradient."""
        return self.x, self.gate_up, self.down, self.weights if self.router is None else self.router

    def picked(self, y: Tensor, grads: Sequence[Tensor], sample: Sample) -> dict[str, Tensor]:
        """The sampled part of results: y and, where there are gradients, those of `leaves`."""
        found = {"y": y[sample.tokens]}
        if grads:
            dx, dup, ddown, last = grads
            found |= {"dx": dx[sample.tokens], "d gate_up": dup[sample.experts], "d down": ddown[sample.experts]}
            if self.router is None:
                found["d weights"] = last[sample.tokens]
            else:
                found["d router"] = last[sample.experts]
        return found

    def reference(self, sample: Sample, dtype: torch.dtype) -> dict[str, Tensor]:
        """The same, expert by expert by torch's products and autograd in ``dtype``, everything rounded to it."""
        (n_tokens, top_k), device, dy = self.ids.shape, self.x.device, self.checked
        count, d_model = len(sample.tokens), self.x.shape[1]
        place = torch.full((n_tokens,), -1, device=device)
        place[sample.tokens] = torch.arange(count, device=device)
        y, dx = (torch.zeros(count, d_model, dtype=dtype, device=device) for _ in range(2))
        weights = (self.weights if self.router is None else self._gates(dtype)).detach().to(dtype).flatten()
        dweights = torch.zeros_like(weights)
        dup, ddown = (torch.zeros_like(w[sample.experts], dtype=dtype) for w in (self.gate_up, self.down))
        index = {expert: i for i, expert in enumerate(sample.experts.tolist())}
        for expert, every in slots_by_expert(self.ids, sample if self.router is None else None):
            if self.router is not None:
                # The router's gradient takes those of all weights.
                out, _ = self._expert(expert, every, dtype)
                dweights[every] = (out.detach() * dy[every // top_k].to(dtype)).sum(1)
            slots = every if expert in index else every[place[every // top_k] >= 0]
            if not slots.numel():
                continue
            out, leaves = self._expert(expert, slots, dtype)
            leaves = [*leaves, weights[slots].requires_grad_()]
            out = out * leaves[3].unsqueeze(1)
            grads = torch.autograd.grad(out, leaves, dy[slots // top_k].to(dtype))
            inside = place[slots // top_k] >= 0
            here = place[slots // top_k][inside]
            y.index_add_(0, here, out.detach()[inside])
            dx.index_add_(0, here, grads[0][inside])
            dweights[slots] = grads[3]
            if expert in index:
                dup[index[expert]], ddown[index[expert]] = grads[1], grads[2]
        found = {"y": y, "dx": dx, "d gate_up": dup, "d down": ddown}
        dweights, weights = dweights.view(n_tokens, top_k), weights.view(n_tokens, top_k)
        if self.router is None:
            return {**found, "d weights": dweights[sample.tokens]}
        dlogits = weights * (dweights - (weights * dweights).sum(1, keepdim=True))
        router, mine = self.router.detach(), dlogits[sample.tokens]
        for j, experts in enumerate(self.ids[sample.tokens].unbind(1)):
            dx += mine[:, j : j + 1] * router[experts].to(dtype)
        drouter = torch.zeros(len(sample.experts), d_model, dtype=dtype, device=device)
        for expert, i in index.items():
            tokens, j = (self.ids == expert).nonzero(as_tuple=True)
            drouter[i] = dlogits[tokens, j] @ self.x.detach()[tokens].to(dtype)
        return {**found, "d router": drouter}

    def _expert(self, expert: int, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """An expert's output before the gate weights, and its leaves: rows of x, gate_up, down."""
        given = (self.x[slots // self.ids.shape[1]], self.gate_up[expert], self.down[expert])
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in given]
        gate, up = (leaves[0] @ leaves[1].T).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ leaves[2].T, leaves

    def _gates(self, dtype: torch.dtype) -> Tensor:
        """Gate weights from scores in ``dtype`` of the experts that are right, (T, k)."""
        assert self.router is not None
        found = [
            torch.softmax((x @ self.router.detach().to(dtype).T).gather(1, ids).to(torch.float64), -1).to(dtype)
            for x, ids in zip(*(_blocks(part, len(self.router)) for part in (self.x.detach().to(dtype), self.ids)),
                              strict=True)
        ]  # fmt: skip
        return torch.cat(found)


def _blocks(rows: Tensor, n_experts: int) -> Sequence[Tensor]:
    blocks: Sequence[Tensor] = rows.split(max(1, SCORE_BYTES // (8 * n_experts)))
    return blocks


def best(x: Tensor, router: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the k best experts of every token by scores in float64, (T, k), and whether no rounding changes them."""
    ids, clear = [], []
    for rows in _blocks(x, len(router)):
        scores = rows.to(torch.float64) @ router.to(torch.float64).T
        top = scores.topk(min(top_k + 1, len(router)))
        ids.append(top.indices[:, :top_k])
        gap = torch.inf if top_k == len(router) else top.values[:, top_k - 1] - top.values[:, top_k]
        clear.append(gap > TIE[x.dtype] * scores.abs().amax(1))
    return torch.cat(ids), torch.cat(clear)


def layer_turns(case: Case, device: str) -> list[LayerTurn]:
    """Inputs to take turns on: tokens of their own, and copies of the weights as far as they are small."""
    generator = torch.Generator(device).manual_seed(case.n_experts)
    dtype = case.torch_dtype

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    share = min(1.0, case.n_rows / case.n_experts)
    count = n_turns(share * case.weight_bytes + 3 * case.n_tokens * case.d_model * dtype.itemsize)
    width, hidden, n_experts = case.d_model, case.d_ff, case.n_experts
    stacks = [
        (
            torch.nn.Parameter(draw(n_experts, width).mul_(width**-0.5)) if case.router else None,
            torch.nn.Parameter(draw(n_experts, 2 * hidden, width).mul_(width**-0.5)),
            torch.nn.Parameter(draw(n_experts, width, hidden).mul_(hidden**-0.5)),
        )
        for _ in range(max(1, min(count, ROTATED_BYTES // case.weight_bytes)))
    ]
    found = []
    for turn in range(count):
        router, gate_up, down = stacks[turn % len(stacks)]
        x, grad = draw(case.n_tokens, width), draw(case.n_tokens, width)
        if router is None:
            ids, clear = draw_ids(case.n_tokens, n_experts, case.top_k, generator), None
            weights = torch.softmax(draw(case.n_tokens, case.top_k), -1)
        else:
            ids, clear = best(x, router.detach(), case.top_k)
            for _ in range(REDRAWN):
                if clear.all():
                    break
                x[~clear] = draw(int((~clear).sum()), width)
                ids[~clear], clear[~clear] = best(x[~clear], router.detach(), case.top_k)
            weights = torch.empty_like(ids, dtype=dtype).fill_(math.nan)
        leaves = x.requires_grad_(), router, gate_up, down, weights.requires_grad_(router is None)
        found.append(LayerTurn(*leaves, ids, grad, clear))
    return found
