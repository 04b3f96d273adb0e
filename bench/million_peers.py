"""A training step of a dense toy model with very many features in plain PyTorch, in chunks over the features.

    torch         x made dense chunk by chunk: h = Σ x_c W_c, its gradient x_cᵀ dh
    torch-sparse  the same products with x sparse: h = x W (CSR), x_aᵀ dh added to the rows of the active features

Both decode a chunk of features at a time, r = ReLU(h W_cᵀ + b_c) − x_c, by autograd, into a gradient of all weights
that `torch.optim.AdamW` then takes; it is the fused or the foreach one, whichever is faster here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.bench.interleave import clock, with_threads
from moesaic.bench.million_cases import LR, Stepper

CHUNK = 8192


class TorchStep:
    """A dense model on the parameters of a `Stepper`; ``sparse`` of x where it encodes."""

    def __init__(self, like: Stepper, *, sparse: bool, fused: bool = False) -> None:
        views = like.model.shape.named(like.state.table)
        self.weight = views["weight"][0].clone().contiguous()
        self.bias = views["bias"][0].clone().contiguous()
        self.weight.grad, self.bias.grad = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        self.sparse, self.batches, self.turn = sparse, like.batches, 0
        self.scale, self.dtype = like.training.scale, torch.bfloat16 if like.training.precision == "bf16" else None
        self.parts = like.training.importance.split(CHUNK)
        self.optimizer = self._adamw(fused)

    def _adamw(self, fused: bool) -> torch.optim.AdamW:
        self.weight.requires_grad_()
        self.bias.requires_grad_()
        return torch.optim.AdamW(
            [self.weight, self.bias], lr=LR, weight_decay=0.01, fused=fused, foreach=None if fused else True
        )

    def choose(self, device: str) -> tuple[str, int]:
        """Keep the faster kind of AdamW; return its name, and with how many threads a step is faster, all or one."""
        taken: dict[bool, float] = {}
        for fused in (False, True):
            self.optimizer = self._adamw(fused)
            self.optimizer.step()
            taken[fused] = clock(lambda _: self.optimizer.step(), device)(1)
        best = min(taken, key=lambda fused: taken[fused])
        self.optimizer = self._adamw(best)
        most = torch.get_num_threads()
        counts = {most, 1} if device == "cpu" else {most}
        step = clock(self.repeat, device)
        seconds = {count: with_threads(step, count)(1) for count in sorted(counts, reverse=True)}
        return "fused" if best else "foreach", min(seconds, key=lambda count: seconds[count])

    @property
    def held_bytes(self) -> int:
        """Of the gradient, which stays allocated between steps."""
        return 4 * (self.weight.numel() + self.bias.numel())

    def repeat(self, count: int) -> None:
        """Train ``count`` steps."""
        for _ in range(count):
            self.step(self.batches[self.turn % len(self.batches)])
            self.turn += 1

    def step(self, x: Tensor) -> Tensor:
        """Train one step and return its loss, a float64 scalar."""
        weight, bias = self.weight.detach(), self.bias.detach()
        assert self.weight.grad is not None
        assert self.bias.grad is not None
        columns = _Chunks(x)
        if self.sparse:
            h = x @ weight
        else:
            h = torch.zeros(x.shape[0], weight.shape[1], device=x.device)
            for at, rows in enumerate(weight.split(CHUNK)):
                h.addmm_(columns.dense(at), rows)
        dh = torch.zeros_like(h)
        loss = torch.zeros((), dtype=torch.float64, device=x.device)
        grads = zip(self.weight.grad.split(CHUNK), self.bias.grad.split(CHUNK), strict=True)
        for at, (rows, offset, (drows, doffset)) in enumerate(
            zip(weight.split(CHUNK), bias.split(CHUNK), grads, strict=True)
        ):
            leaves = (h.detach().requires_grad_(), rows.detach().requires_grad_(), offset.detach().requires_grad_())
            part = self._loss(*leaves, columns.dense(at), self.parts[at])
            found = torch.autograd.grad(part, leaves)
            dh += found[0]
            drows.copy_(found[1])
            doffset.copy_(found[2])
            loss += part.detach()
        if self.sparse:
            owner = torch.repeat_interleave(torch.arange(x.shape[0], device=x.device), x.crow_indices().diff())
            self.weight.grad.index_add_(0, x.col_indices(), x.values()[:, None] * dh[owner])
        else:
            for at, drows in enumerate(self.weight.grad.split(CHUNK)):
                drows.addmm_(columns.dense(at).T, dh)
        self.optimizer.step()
        return loss

    def _loss(self, h: Tensor, weight: Tensor, bias: Tensor, x: Tensor, importance: Tensor) -> Tensor:
        if self.dtype is not None:
            z = (h.to(self.dtype) @ weight.to(self.dtype).T).float() + bias
        else:
            z = torch.addmm(bias, h, weight.T)
        return self.scale * (F.relu(z) - x).square().mul_(importance).sum()


class _Chunks:
    """A sparse batch whose columns are made dense a chunk at a time."""

    def __init__(self, x: Tensor) -> None:
        self.batch, n = x.shape
        owner = torch.repeat_interleave(torch.arange(self.batch, device=x.device), x.crow_indices().diff())
        columns, order = torch.sort(x.col_indices().long())
        self.columns, self.owner, self.values = columns, owner[order], x.values()[order]
        edges = torch.arange(0, n + CHUNK, CHUNK, device=x.device)
        self.bounds: Sequence[int] = torch.searchsorted(columns, edges).tolist()
        self.n = n

    def dense(self, at: int) -> Tensor:
        """Return the columns of chunk ``at`` (B, up to CHUNK)."""
        first, part = at * CHUNK, slice(self.bounds[at], self.bounds[at + 1])
        out = torch.zeros(self.batch, min(CHUNK, self.n - first), device=self.values.device)
        out[self.owner[part], self.columns[part] - first] = self.values[part]
        return out


def disagreement(ours: Stepper, peer: TorchStep, *, n_rows: int = 64) -> str:
    """Train both by a step on the same batch; why they disagree, or an empty string.

    Losses may differ by 1e-4 of themselves (1e-2 in bfloat16); of the updated weights of some present and some absent
    features, one in a thousand (bfloat16: one in ten) by more than a hundredth of the learning rate: where a gradient
    is rounding error, AdamW's first step has its sign and a size of its own.
    """
    narrow = peer.dtype is not None
    x = ours.batches[0]
    present = x.col_indices().long().unique()[:n_rows]
    rows = torch.cat([present, torch.arange(0, x.shape[1], -(-x.shape[1] // n_rows), device=x.device)])
    theirs = peer.step(x)
    loss = ours.first_loss()
    apart = float((loss - theirs).abs() / loss.abs())
    if not apart <= (1e-2 if narrow else 1e-4):
        return f"losses differ by {apart:.1g} of themselves"
    mine = ours.model.shape.named(ours.state.table)["weight"][0][rows]
    share = float(((mine - peer.weight.detach()[rows]).abs() > 0.01 * LR).float().mean())
    return "" if share <= (0.1 if narrow else 1e-3) else f"{share:.1%} of the updated weights differ"
