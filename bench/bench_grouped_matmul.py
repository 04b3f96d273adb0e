"""``moesaic bench grouped-matmul``: `grouped_matmul` on the shape of an expert layer's up-projection, against PyTorch.

    y_r = x_g(r) W_e    x (T, d), W (E, d, 2n) as a transposed view of (E, 2n, d), rows r in order of expert, R = T·k

Forward without gradients; forward and backward in one go, with the gradients of x (gathered back to tokens) and W. The
cases, and how they are checked and timed, are those of ``bench layer``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.bench.bench_layer import Subject, run_subject
from moesaic.bench.kernel_bench import Findings, Options, Table
from moesaic.bench.layer_cases import ROTATED_BYTES, Case, Sample, cases, draw_ids, n_turns, slots_by_expert
from moesaic.bench.layer_peers import OURS, Build, Side, matrices, need_groups, need_products, need_room
from moesaic.bench.plan import Row
from moesaic.kernels import Grouping, group_by_expert, grouped_matmul

NOTES = (
    "TFLOP/s: 2·R·d·2n forward, R = T·k, twice that more for both gradients. GB/s: weights of the experts that were "
    "chosen, x and y once per pass that needs them, and all weights' gradients written. For n below 64 read GB/s.",
    "Forward: no gradients. Forward + backward: in one go, gradients of x and the weights; not of decoding. Grouping "
    "is done beforehand, gathering the rows is part of the work.",
)


@dataclass(frozen=True, eq=False)
class ProductTurn:
    """One repetition's inputs: x (T, d), weight (E, 2n, d), ids (T, k) and their grouping, gather (R,), dy (R, 2n)."""

    x: Tensor
    weight: Tensor
    ids: Tensor
    grouping: Grouping
    gather: Tensor
    ends: Tensor
    grad: Tensor
    clear: None = None

    @property
    def checked(self) -> Tensor:
        """Dy of the check: the same."""
        return self.grad

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What gets a gradient."""
        return self.x, self.weight

    def picked(self, y: Tensor, grads: Sequence[Tensor], sample: Sample) -> dict[str, Tensor]:
        """The sampled part of results: y by slot and, where there are gradients, dx and dW."""
        found = {"y": y[self.grouping.inverse.view_as(self.ids)[sample.tokens].flatten()]}
        if grads:
            found |= {"dx": grads[0][sample.tokens], "dW": grads[1][sample.experts]}
        return found

    def reference(self, sample: Sample, dtype: torch.dtype) -> dict[str, Tensor]:
        """The same, expert by expert by torch's products in ``dtype``, everything rounded to it."""
        top_k, device, count = self.ids.shape[1], self.x.device, len(sample.tokens)
        place = torch.full((len(self.x),), -1, device=device)
        place[sample.tokens] = torch.arange(count, device=device)
        y = torch.zeros(count * top_k, self.weight.shape[1], dtype=dtype, device=device)
        dx = torch.zeros(count, self.x.shape[1], dtype=dtype, device=device)
        dweight = torch.zeros_like(self.weight[sample.experts], dtype=dtype)
        index = {expert: i for i, expert in enumerate(sample.experts.tolist())}
        for expert, slots in slots_by_expert(self.ids, sample):
            rows, matrix = self.x.detach()[slots // top_k].to(dtype), self.weight.detach()[expert].to(dtype)
            grad = self.grad[self.grouping.inverse[slots]].to(dtype)
            tokens = place[slots // top_k]
            inside = tokens >= 0
            y[tokens[inside] * top_k + slots[inside] % top_k] = rows[inside] @ matrix.T
            dx.index_add_(0, tokens[inside], grad[inside] @ matrix)
            if expert in index:
                dweight[index[expert]] = grad.T @ rows
        return {"y": y, "dx": dx, "dW": dweight}


def product_turns(case: Case, device: str) -> list[ProductTurn]:
    """Inputs to take turns on: tokens and ids of their own, and copies of the weights as far as they are small."""
    generator = torch.Generator(device).manual_seed(case.n_experts)
    dtype, width = case.torch_dtype, 2 * case.d_ff

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    weight_bytes = case.n_experts * case.d_model * width * dtype.itemsize
    moved = min(1.0, case.n_rows / case.n_experts) * weight_bytes
    count = n_turns(moved + (case.n_tokens * case.d_model + case.n_rows * width) * dtype.itemsize)
    stacks = [
        torch.nn.Parameter(draw(case.n_experts, width, case.d_model).mul_(case.d_model**-0.5))
        for _ in range(max(1, min(count, ROTATED_BYTES // weight_bytes)))
    ]
    found = []
    for turn in range(count):
        ids = draw_ids(case.n_tokens, case.n_experts, case.top_k, generator)
        grouping = group_by_expert(ids, case.n_experts)
        found.append(
            ProductTurn(
                draw(case.n_tokens, case.d_model).requires_grad_(), stacks[turn % len(stacks)], ids, grouping,
                grouping.permutation // case.top_k, grouping.offsets[1:].to(torch.int32), draw(case.n_rows, width),
            )
        )  # fmt: skip
    return found


def cost(case: Case, touched: float, backward: bool) -> tuple[float, float]:
    """Useful FLOPs, and bytes that have to move, each tensor once per pass that needs it.

    forward   touched·2nd (weights) + Td (x) + 2nR (y), times the element's size, + 8R (gather) + 8(E + 1) (offsets)
    backward  touched·2nd + 2Td (x in, dx out) + 2nR (dy) + E·2nd (gradients of all weights), times that, + the same
    """
    rows, width, size = case.n_rows, 2 * case.d_ff, case.torch_dtype.itemsize
    matrix, tokens, indices = width * case.d_model, case.n_tokens * case.d_model, 8 * (rows + case.n_experts + 1)
    flops = 2 * rows * matrix
    forward = size * (touched * matrix + tokens + width * rows) + indices
    if not backward:
        return flops, forward
    again = size * (touched * matrix + 2 * tokens + width * rows + case.n_experts * matrix) + indices
    return 3 * flops, forward + again


def ours(case: Case, device: str) -> Side:
    """`grouped_matmul`."""
    return lambda turn: grouped_matmul(
        turn.x, turn.weight.transpose(1, 2), turn.grouping.offsets, gather=turn.gather
    )  # fmt: skip


def _need_room(case: Case, device: str) -> None:
    rows = 2 * case.n_rows * (case.d_model + 2 * case.d_ff)
    need_room(3 * case.weight_bytes + rows * case.torch_dtype.itemsize, device)


def torch_grouped_mm(case: Case, device: str) -> Side:
    """Gather, then torch's grouped product."""
    _need_room(case, device)
    need_groups(case, device)
    return lambda turn: F.grouped_mm(
        turn.x.index_select(0, turn.gather), turn.weight.transpose(1, 2), offs=turn.ends
    )  # fmt: skip


def torch_loop(case: Case, device: str) -> Side:
    """A product per expert that has tokens."""
    _need_room(case, device)
    need_products(case)

    def side(turn: ProductTurn) -> Tensor:
        counts = turn.grouping.counts.tolist()
        experts = [expert for expert, count in enumerate(counts) if count]
        parts = turn.x.index_select(0, turn.gather).split([counts[expert] for expert in experts])
        stack = matrices(turn.weight, experts)
        return torch.cat([F.linear(rows, matrix) for rows, matrix in zip(parts, stack, strict=True)])

    return side


SIDES: Mapping[str, Build] = {OURS: ours, "torch-grouped-mm": torch_grouped_mm, "torch-loop": torch_loop}
PRODUCT = Subject(
    "grouped-matmul", "Grouped matrix product, d to 2n", SIDES, product_turns, cost, lambda case, name, count: count
)


def run(options: Options) -> Findings:
    """Measure all cases of the product, and add what the compiler's report says of its kernels."""
    products = [replace(case, router=True) for case in cases(options.device, options.quick)]
    found = run_subject(PRODUCT, products, options, NOTES)
    options.say("bench grouped-matmul: compiling the Triton kernels for the compiler's report")
    limits, compiled = _limits()
    return replace(found, tables=[*found.tables, limits], extra={**found.extra, "compiler": compiled})


def _limits() -> tuple[Table, list[Row]]:
    try:
        found: tuple[Table, list[Row]] = importlib.import_module("moesaic.bench.grouped_limit").grouped_limits()
        return found
    except ImportError as error:
        return Table("Triton kernels: from the compiler's report", notes=(f"not available: {error}",)), []
