"""Encoding of sparse feature vectors, by the experts that each is routed to.

    h_b = Σ_i x_bi W_i,   or   h_bj = Σ_i x_bi W_(e_bj, i)     x (B, n), W (n, m) or (E, n, m), h (B, m) or (B, k, m)

A sparse x is a gather of the rows whose features are present, O(nnz · k · m): router scores are the same with W (n, E).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moesaic.kernels._accounting import Call, Groups, Work, moved, record, register_work, up_to
from moesaic.kernels._backend import uses_triton
from moesaic.kernels._extras import numba_twin
from moesaic.kernels._threads import in_parts

CROSSOVER = 0.007
"""Density from which on products of dense stripes are faster than gathers."""
_STRIPE_BYTES = 1 << 26
_ALONE = 100_000


@triton.jit
def _gather_kernel(
    Starts, Entries, Values, Ids, Source, Out, stride_e, stride_n, m, k,
    HAS_IDS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    row = place // k
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(Ids + place).to(tl.int64) if HAS_IDS else place * 0
    base = Source + expert * stride_e + column
    total = tl.zeros((BLOCK,), WIDE)
    at = tl.load(Starts + row).to(tl.int64)
    end = tl.load(Starts + row + 1).to(tl.int64)
    while at < end:
        entry = tl.load(Entries + at).to(tl.int64)
        line = tl.load(base + entry * stride_n, mask=column < m, other=0.0).to(WIDE)
        total += tl.load(Values + at).to(WIDE) * line
        at += 1
    tl.store(Out + place * m + column, total.to(Out.dtype.element_ty), mask=column < m)


def gather_rows(starts: Tensor, entries: Tensor, values: Tensor, source: Tensor, ids: Tensor | None) -> Tensor:
    """Return out[s, j] = Σ_{a in starts[s] … starts[s + 1]} values_a · source[ids_sj, entries_a], (S, k, m).

    Sums run in the order of entries, in float32 (float64 for float64).

    Args:
        starts: (S + 1,) integers.
        entries: (A,) integers, rows of the source.
        values: (A,).
        source: (E, n, m), the last axis contiguous.
        ids: (S, k) integers; None for k = 1 and E = 1.
    """
    (_, _, m), (stride_e, stride_n, _) = source.shape, source.stride()
    n_rows, k = starts.shape[0] - 1, 1 if ids is None else ids.shape[1]
    out = source.new_empty(n_rows, k, m)
    record("gather_rows", lambda: (2 * entries.shape[0] * k * m, _gather_work(starts, entries, values, source, ids)))
    if out.numel() == 0:
        return out
    if uses_triton(source):
        block = _block(m)
        with torch.cuda.device_of(source):
            _gather_kernel[(n_rows * k, triton.cdiv(m, block))](
                starts, entries, values, values if ids is None else ids.contiguous(), source, out, stride_e, stride_n,
                m, k, HAS_IDS=ids is not None, WIDE=tl.float64 if source.dtype == torch.float64 else tl.float32,
                BLOCK=block,
            )  # fmt: skip
        return out
    if source.dtype not in (torch.float32, torch.float64) or source.is_cuda:
        return _gather_torch(starts, entries, values, source, ids)
    twin = numba_twin("encode_cpu")
    chosen = torch.zeros(n_rows, 1, dtype=torch.int64) if ids is None else ids.long()
    arrays = (starts.numpy(), entries.numpy(), values.numpy(), source.numpy(), chosen.contiguous().numpy(), out.numpy())
    n_parts = 1 if entries.shape[0] * k * m < _ALONE else 16
    bounds = [n_rows * part // n_parts for part in range(n_parts + 1)]
    in_parts(lambda part: twin.gather(bounds[part], bounds[part + 1], *arrays), n_parts, twin.get_num_threads())
    return out


def _block(m: int) -> int:
    return min(512, int(triton.next_power_of_2(m)))


def _gather_work(starts: Tensor, entries: Tensor, values: Tensor, source: Tensor, ids: Tensor | None) -> Work:
    """A row of the source is read for every entry and choice; whose entries these are, only the caller knows."""
    m = source.shape[2]
    n_rows, k = starts.shape[0] - 1, 1 if ids is None else ids.shape[1]
    rows = entries.shape[0] * k
    moves = moved(starts, entries, values, ids) + (rows + n_rows * k) * m * source.element_size()
    executed = 2 * rows * (up_to(m, _block(m)) if uses_triton(source) else m)
    return Work(executed, None, moves)


def _gather_torch(starts: Tensor, entries: Tensor, values: Tensor, source: Tensor, ids: Tensor | None) -> Tensor:
    wide = torch.promote_types(source.dtype, torch.float32)
    n_rows, k = starts.shape[0] - 1, 1 if ids is None else ids.shape[1]
    owner = torch.repeat_interleave(torch.arange(n_rows, device=source.device), starts.diff())
    experts = torch.zeros_like(owner)[:, None] if ids is None else ids[owner].long()
    rows = source[experts, entries.long()[:, None]].to(wide) * values.to(wide)[:, None, None]
    out = torch.zeros(n_rows, k, source.shape[2], dtype=wide, device=source.device)
    return out.index_add_(0, owner, rows).to(source.dtype)


@torch.library.custom_op("moesaic::encode_features", mutates_args=())
def _encode(starts: Tensor, entries: Tensor, values: Tensor, weight: Tensor, ids: Tensor | None) -> Tensor:
    """Rows of (E, n, m) gathered and summed, (B, k, m), or products of dense stripes."""
    if _is_dense(starts, entries, weight.shape[1]):
        out = weight.new_zeros(starts.shape[0] - 1, 1 if ids is None else ids.shape[1], weight.shape[2])
        for first, x in _stripes(starts, entries, values, weight.shape[1]):
            part = weight[:, first : first + x.shape[1]]
            for expert, rows, slots in _chosen(ids, weight.shape[0], x.shape[0], x.device):
                out.index_put_((rows, slots), x[rows] @ part[expert], accumulate=True)
        return out
    weight = weight if weight.stride(2) == 1 else weight.contiguous()
    return gather_rows(starts, entries, values, weight, ids)


def _is_dense(starts: Tensor, entries: Tensor, n_features: int) -> bool:
    return entries.shape[0] > CROSSOVER * (starts.shape[0] - 1) * n_features


def _stripes(starts: Tensor, entries: Tensor, values: Tensor, n_features: int) -> Iterator[tuple[int, Tensor]]:
    """Yield first column and dense stripes of a sparse batch."""
    n_rows = starts.shape[0] - 1
    width = max(1, _STRIPE_BYTES // (values.element_size() * n_rows))
    owner = torch.repeat_interleave(torch.arange(n_rows, device=values.device), starts.diff().long())
    ordered, order = entries.long().sort(stable=True)
    firsts = torch.arange(0, n_features + width, width, device=values.device)
    bounds = torch.searchsorted(ordered, firsts).tolist()
    for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
        first = number * width
        x = values.new_zeros(n_rows, min(width, n_features - first))
        x[owner[order[begin:end]], ordered[begin:end] - first] = values[order[begin:end]]
        yield first, x


def _chosen(
    ids: Tensor | None, n_experts: int, n_rows: int, device: torch.device
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each expert with the rows and slots that chose it."""
    if ids is None:
        rows = torch.arange(n_rows, device=device)
        yield 0, rows, torch.zeros_like(rows)
        return
    for expert in range(n_experts):
        rows, slots = (ids == expert).nonzero(as_tuple=True)
        yield expert, rows, slots


@_encode.register_fake
def _(starts: Tensor, entries: Tensor, values: Tensor, weight: Tensor, ids: Tensor | None) -> Tensor:
    return weight.new_empty(starts.shape[0] - 1, 1 if ids is None else ids.shape[1], weight.shape[2])


@torch.library.custom_op("moesaic::encode_features_backward", mutates_args=())
def _encode_backward(
    starts: Tensor, entries: Tensor, values: Tensor, grad: Tensor, ids: Tensor | None, n_experts: int, n_features: int
) -> Tensor:
    """Gradient (E, n, m) of the weight: in column order, every present row's terms in the order of samples."""
    n_rows, k, m = grad.shape
    device = grad.device
    if _is_dense(starts, entries, n_features):
        dense = grad.new_zeros(n_experts, n_features, m)
        for first, x in _stripes(starts, entries, values, n_features):
            for expert, rows, slots in _chosen(ids, n_experts, n_rows, device):
                dense[expert, first : first + x.shape[1]] = x[rows].T @ grad[rows, slots]
        return dense
    owner = torch.repeat_interleave(torch.arange(n_rows, device=device), starts.diff().long())
    # One entry per slot of a sample, keyed by (expert, feature).
    slots = (owner[:, None] * k + torch.arange(k, device=device)).reshape(-1)
    experts = torch.zeros_like(slots) if ids is None else ids.reshape(-1)[slots].long()
    key = experts * n_features + entries.long().repeat_interleave(k)
    ordered, order = torch.sort(key, stable=True)
    present, counts = torch.unique_consecutive(ordered, return_counts=True)
    bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    sums = gather_rows(
        bounds, slots[order], values.repeat_interleave(k)[order], grad.contiguous().view(1, n_rows * k, m), None
    )
    out = grad.new_zeros(n_experts * n_features, m)
    out[present] = sums[:, 0]
    return out.view(n_experts, n_features, m)


@_encode_backward.register_fake
def _(
    starts: Tensor, entries: Tensor, values: Tensor, grad: Tensor, ids: Tensor | None, n_experts: int, n_features: int
) -> Tensor:
    return grad.new_empty(n_experts, n_features, grad.shape[2])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    starts, entries, values, weight, ids = inputs
    ctx.save_for_backward(starts, entries, values, ids)
    ctx.sizes = weight.shape[:2]


def _backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, Tensor, None]:
    starts, entries, values, ids = ctx.saved_tensors
    return None, None, None, _encode_backward(starts, entries, values, grad, ids, *ctx.sizes), None


_encode.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.moesaic.encode_features)
def _flops(starts: Any, entries: Any, values: Any, weight: Any, ids: Any, *args: object, **kwargs: object) -> int:
    return 2 * int(entries[0]) * (1 if ids is None else int(ids[1])) * int(weight[2])


@register_flop_formula(torch.ops.moesaic.encode_features_backward)
def _flops_backward(
    starts: Any, entries: Any, values: Any, grad: Any, ids: Any, *args: object, **kwargs: object
) -> int:
    return 2 * int(entries[0]) * int(grad[1]) * int(grad[2])


@register_work(torch.ops.moesaic.encode_features)
def _work(call: Call, starts: Tensor, entries: Tensor, values: Tensor, weight: Tensor, ids: Tensor | None) -> Work:
    """A dense batch is written out once, in stripes, and its rows copied and read for every choice."""
    n_experts, n, m = weight.shape
    every = 2 * entries.shape[0] * m * (1 if ids is None else n_experts)
    if not _is_dense(starts, entries, n):
        return _gather_work(starts, entries, values, weight, ids)._replace(dense_equivalent=every)
    n_rows, k = starts.shape[0] - 1, 1 if ids is None else ids.shape[1]
    groups = Groups(n_rows, 1) if ids is None else Groups.of_ids(ids, n_experts)
    moves = moved(starts, entries, values, ids) + (1 + 3 * k) * n_rows * n * values.element_size()
    moves += (groups.touched * n * m + n_rows * k * m) * weight.element_size()
    return Work(2 * n_rows * k * n * m, every, moves, ids is not None and groups.bound)


@register_work(torch.ops.moesaic.encode_features_backward)
def _work_backward(
    call: Call, starts: Tensor, entries: Tensor, values: Tensor, grad: Tensor, ids: Tensor | None, n_experts: int,
    n_features: int,
) -> Work:  # fmt: skip
    """A row of the gradient is read for every entry and choice, or every choice's if the batch is written out."""
    n_rows, k, m = grad.shape
    every = 2 * entries.shape[0] * m * (1 if ids is None else n_experts)
    moves = moved(starts, entries, values, ids) + n_experts * n_features * m * grad.element_size()
    if _is_dense(starts, entries, n_features):
        moves += (1 + 3 * k) * n_rows * n_features * values.element_size() + moved(grad)
        return Work(2 * n_rows * k * n_features * m, every, moves)
    rows = entries.shape[0] * k
    executed = 2 * rows * (up_to(m, _block(m)) if uses_triton(grad) else m)
    return Work(executed, every, moves + rows * m * grad.element_size())


def encode_features(x: Tensor, weight: Tensor, ids: Tensor | None = None) -> Tensor:
    """Return h_b = Σ_i x_bi W_i (B, m), or of the experts of each sample, h_bj = Σ_i x_bi W_(ids_bj, i) (B, k, m).

    Of a sparse x only the rows of W whose features are present are read; above a density of `CROSSOVER`, stripes of it
    are multiplied densely instead. Differentiable in ``weight``, and in a dense x.

    Args:
        x: (B, n), dense or ``torch.sparse_csr`` without a column twice in a row.
        weight: (n, m), or (E, n, m) with ``ids``; of the type of x.
        ids: (B, k) integers in 0 … E − 1.

    Raises:
        ValueError: for shapes, layouts or types that do not match.
    """
    check_features(x, weight if ids is None else weight[0] if weight.dim() == 3 else weight)
    if ids is not None and (weight.dim() != 3 or ids.dim() != 2 or ids.shape[0] != x.shape[0]):
        raise ValueError(f"weight, ids: take (E, n, m) and (B, k), got {tuple(weight.shape)} and {tuple(ids.shape)}")
    if x.layout == torch.sparse_csr:
        source = weight if ids is not None else weight.unsqueeze(0)
        h: Tensor = _encode(x.crow_indices(), x.col_indices(), x.values(), source, ids)
        return h if ids is not None else h[:, 0]
    if ids is None:
        return x @ weight
    # Every expert of every sample, then the chosen: few use this, and a gradient of x needs no kernel.
    out = torch.stack([x @ expert for expert in weight], 1)
    return out.gather(1, ids.long().unsqueeze(2).expand(-1, -1, weight.shape[2]))


def check_features(x: Tensor, weight: Tensor) -> None:
    """Raise ValueError unless x (B, n) is dense or CSR and fits weight (n, m)."""
    if x.layout not in (torch.strided, torch.sparse_csr):
        raise ValueError(f"x: takes a dense or sparse_csr tensor, got layout {x.layout}")
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[0]:
        raise ValueError(f"x, weight: take (B, n) and (n, m), got {tuple(x.shape)} and {tuple(weight.shape)}")
    if x.dtype != weight.dtype:
        raise ValueError(f"weight: takes the type of x, {x.dtype}, got {weight.dtype}")
