"""CPU twins of the grouped products, by group of rows, not by expert: what has no rows costs nothing but its zeros.

    rows                     y_r = x_g(r) W_e + b_e
    rows_activated           h_r = x_g(r) W_e + b_e,   a_r = s_r act(h_r)
    rows_activated_backward  d_r = g_g(r) W_e;   s_r a_r,   ⟨d_r, a_r⟩,   dh_r = act'(h_r) s_r d_r
    outer, column_sums       Σ_r x_g(r)ᵀ y_g(r),   Σ_r s_r y_g(r)
    combine                  y_t = Σ_j w_tj rows[inverse_tj]
    tiny_dot, tiny_spread, tiny_outer: the same for matrices with a side below 32, in order of tokens

Sums are float32 (float64 for float64) and, with Numba, their bits depend on neither threads nor addresses. Without
Numba every group is a product of torch's. ``precision`` is the GPU's choice; here it is always the best.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesaic.kernels._extras import numba_twin
from moesaic.kernels._threads import in_parts
from moesaic.kernels.activations import activate, activate_backward, clamp_of, is_gated

Integers = NDArray[np.int64]
Floats = NDArray[np.float32]

# Numba knows arrays of neither bfloat16 nor float16: these stand for their bits.
_TAGS: dict[torch.dtype, NDArray[Any]] = {
    torch.float32: np.empty(0, np.float32),
    torch.float64: np.empty(0, np.float64),
    torch.bfloat16: np.empty(0, np.uint16),
    torch.float16: np.empty(0, np.int16),
}
_NOWHERE = np.empty(0, np.int64)
# Handing work to another thread takes some 50 µs, in which one does about this many multiplications.
_ALONE = 1_000_000
# Bytes from which on NumPy asks for large pages.
_LARGE = 1 << 22


def groups(offsets: Tensor, n_rows: int) -> tuple[Integers, Integers, Integers]:
    """Return expert, first row and end of every group that has rows. Reads offsets on the host.

    Raises:
        ValueError: offsets do not rise from 0 to at most n_rows.
    """
    bounds = offsets.detach().cpu().numpy()
    counts = np.diff(bounds)
    if bounds[0] != 0 or bounds[-1] > n_rows or counts.min(initial=0) < 0:
        raise ValueError(f"offsets must rise from 0 to at most the {n_rows} rows, got {bounds[0]} … {bounds[-1]}")
    experts = counts.nonzero()[0]
    return experts, bounds[experts], bounds[experts + 1]


def _has_numba() -> bool:
    return find_spec("numba") is not None


def _wide(*tensors: Tensor | None) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    return dtype


def _inner(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a matrix whose rows are contiguous, in a dtype."""
    tensor = tensor.detach() if dtype is None else tensor.detach().to(dtype)
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _numbers(tensor: Tensor | None, dtype: torch.dtype) -> NDArray[Any]:
    """Return a contiguous array of a dtype; None is an empty one."""
    found: NDArray[Any] = _TAGS[dtype] if tensor is None else tensor.detach().to(dtype).contiguous().numpy()
    return found


def _indices(tensor: Tensor | None) -> Integers:
    return _NOWHERE if tensor is None else tensor.detach().to(torch.int64).contiguous().numpy()


def _from_numpy(make: Callable[..., NDArray[Any]], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(make(shape, np.int16 if dtype.itemsize == 2 else _TAGS[dtype].dtype)).view(dtype)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    # New memory costs most of its time page by page, and NumPy asks for pages of 2 MiB.
    if math.prod(shape) * dtype.itemsize >= _LARGE:
        return _from_numpy(np.empty, shape, dtype)
    return torch.empty(shape, dtype=dtype)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, n_written: int) -> Tensor:
    """Return zeros (E, …), or anything if all E parts will be written; of few parts, only those cost memory."""
    size = math.prod(shape) * dtype.itemsize
    if n_written == shape[0]:
        return _empty(shape, dtype)
    if size < _LARGE or 8 * n_written > shape[0]:
        return _from_numpy(np.zeros, shape, dtype)
    # Of what is mapped like this, only small pages that are written to take memory.
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def _run(part: Callable[[int, int], None], costs: NDArray[Any], threads: int) -> None:
    """Call part(begin, end) for ranges of tasks of about the same cost."""
    total = np.cumsum(costs)
    if len(costs) == 0:
        return
    n_parts = 1 if total[-1] < _ALONE or threads == 1 else 8 * threads
    inner = np.searchsorted(total, total[-1] * np.arange(1, n_parts) / n_parts)
    bounds = np.unique([0, *inner.tolist(), len(costs)]).tolist()
    in_parts(lambda i: part(bounds[i], bounds[i + 1]), len(bounds) - 1, threads)


def _tasks(starts: Integers, ends: Integers, most: int) -> tuple[Integers, Integers, Integers]:
    """Cut groups into equal tasks of at most ``most`` rows; return each one's group, first row and end."""
    pieces = -(-(ends - starts) // most)
    group = np.repeat(np.arange(len(starts)), pieces)
    number = np.arange(len(group)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    size, base, of = (ends - starts)[group], starts[group], pieces[group]
    return group, base + number * size // of, base + (number + 1) * size // of


def _product(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, gather: Tensor | None,
    then: Callable[[Tensor], Callable[[int, int], None]] | None = None,
) -> tuple[Tensor, int]:  # fmt: skip
    """Return the wide rows (R, N), whatever from the last group's end on, and that end.

    ``then(rows)`` gives what is done to a range of rows as soon as they are there.
    """
    twin = numba_twin("grouped_cpu")
    dtype = _wide(x, weight, bias)
    (_, depth, n_out), x = weight.shape, _inner(x, dtype)
    weight = weight.detach() if weight.dtype in (dtype, torch.bfloat16, torch.float16) else weight.detach().to(dtype)
    n_rows = x.shape[0] if gather is None else gather.shape[0]
    experts, first, last = groups(offsets, n_rows)
    out = _empty((n_rows, n_out), dtype)
    finish = None if then is None else then(out)
    group, starts, ends = _tasks(first, last, twin.CHUNK)
    task_experts = experts[group]
    picked = None if bias is None else bias.detach().index_select(0, torch.from_numpy(experts))
    # An empty bias means none, so one without groups is none.
    biases = _numbers(picked if len(experts) else None, dtype).reshape(-1, n_out)
    target, source, tag = out.numpy(), _indices(gather), _TAGS[weight.dtype]
    width = x.stride(0) * x.element_size()

    def part(begin: int, end: int) -> None:
        twin.multiply(
            begin, end, task_experts, starts, ends, group, x.data_ptr(), width, source, gather is not None, tag,
            weight.data_ptr(), *weight.stride(), biases, depth, target,
        )  # fmt: skip
        if finish is not None:
            finish(int(starts[begin]), int(ends[end - 1]))

    # Bringing a weight from memory takes about as long as multiplying four rows by it.
    _run(part, (ends - starts + 4.0) * depth * n_out, twin.get_num_threads())
    return out, int(last[-1]) if len(last) else 0


def _torch_product(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, gather: Tensor | None) -> Tensor:
    n_rows = x.shape[0] if gather is None else gather.shape[0]
    out = x.new_zeros(n_rows, weight.shape[2])
    for expert, start, end in zip(*(part.tolist() for part in groups(offsets, n_rows)), strict=True):
        rows = x[start:end] if gather is None else x.index_select(0, gather[start:end])
        if bias is None:
            torch.mm(rows, weight[expert], out=out[start:end])
        else:
            torch.addmm(bias[expert], rows, weight[expert], out=out[start:end])
    return out


def _in_numba(*tensors: Tensor) -> bool:
    return _has_numba() and all(tensor.device.type == "cpu" and tensor.numel() for tensor in tensors)


def rows(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, gather: Tensor | None, *, precision: str = "ieee"
) -> Tensor:
    """Return y (R, N), zeros from offsets[E] on."""
    if not _in_numba(x, weight):
        return _torch_product(x, weight, offsets, bias, gather)
    out, end = _product(x, weight, offsets, bias, gather)
    out[end:] = 0.0
    return out.to(x.dtype)


def rows_activated(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, gather: Tensor | None, row_weight: Tensor | None,
    activation: str, interleaved: bool, keep: bool, *, precision: str = "ieee",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return a (R, F) and, if ``keep``, h (R, N), else h of no rows; zeros from offsets[E] on."""
    dtype, n_out = _wide(x, weight, bias), weight.shape[2]
    gated, scale = is_gated(activation), None if row_weight is None else row_weight.to(dtype)
    code = _code(activation, dtype) if _in_numba(x, weight) else None
    if code is not None:
        twin, scales = numba_twin("activations_cpu"), _numbers(scale, dtype)
        n_rows = x.shape[0] if gather is None else gather.shape[0]
        a = _empty((n_rows, n_out // 2 if gated else n_out), dtype)
        target = a.numpy()

        def then(h: Tensor) -> Callable[[int, int], None]:
            source = h.numpy()
            return lambda begin, end: twin.forward(begin, end, *code, gated, interleaved, source, scales, target)

        h, end = _product(x, weight, offsets, bias, gather, then)
    else:
        if _in_numba(x, weight):
            h, end = _product(x, weight, offsets, bias, gather)
        else:
            h, end = _torch_product(x, weight, offsets, bias, gather), int(offsets[-1])
        a = activate(h.to(dtype), activation, interleaved)
        a = a if scale is None else a * scale.unsqueeze(1)
    a[end:] = 0.0
    if not keep:
        return a.to(x.dtype), x.new_empty(0, n_out)
    h[end:] = 0.0
    return a.to(x.dtype), h.to(x.dtype)


def _code(activation: str, dtype: torch.dtype) -> tuple[int, Floats] | None:
    """Return the number of an activation that the Numba kernels have, and limit, alpha and shift of a clamped one."""
    if dtype != torch.float32:
        return None
    twin, clamp = numba_twin("activations_cpu"), clamp_of(activation)
    code: int | None = twin.CODES.get(activation) if clamp is None else twin.CLAMPED
    return None if code is None else (code, np.array(clamp or (0.0, 0.0, 0.0), np.float32))


def rows_activated_backward(
    grad: Tensor, weight: Tensor, offsets: Tensor, gather: Tensor | None, h: Tensor, row_weight: Tensor | None,
    activation: str, interleaved: bool, *, precision: str = "ieee",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dh (R, N), s·a (R, F) and ⟨d, a⟩ (R,), d = grad_g W (E, ·, F); zeros from offsets[E]."""
    dtype = _wide(grad, weight, h)
    gated, scale = is_gated(activation), None if row_weight is None else row_weight.to(dtype)
    code = _code(activation, dtype) if _in_numba(grad, weight) else None
    if code is not None:
        twin, scales = numba_twin("activations_cpu"), _numbers(scale, dtype)
        source = _numbers(h, dtype)
        dh, ds = _empty(tuple(h.shape), dtype), torch.empty(h.shape[0], dtype=dtype)
        slopes, dots = dh.numpy(), ds.numpy()

        def then(d: Tensor) -> Callable[[int, int], None]:
            values = d.numpy()
            return lambda begin, end: twin.backward(
                begin, end, *code, gated, interleaved, source, scales, values, slopes, dots
            )

        a, end = _product(grad, weight, offsets, None, gather, then)
    else:
        if _in_numba(grad, weight):
            d, end = _product(grad, weight, offsets, None, gather)
        else:
            d, end = _torch_product(grad, weight, offsets, None, gather).to(dtype), int(offsets[-1])
        step = d if scale is None else d * scale.unsqueeze(1)
        a, dh = activate_backward(h, step, activation, interleaved)
        ds = (d * a).sum(1)
        a = a if scale is None else a * scale.unsqueeze(1)
    for tensor in (dh, a, ds):
        tensor[end:] = 0.0
    return dh.to(h.dtype), a.to(h.dtype), ds


def outer(
    x: Tensor | None, grad: Tensor, offsets: Tensor, gather: Tensor | None, grad_gather: Tensor | None,
    transposed: bool, *, precision: str = "ieee",
) -> Tensor:  # fmt: skip
    """Return dW (E, K, N), contiguous or, if ``transposed``, the transposed view of (E, N, K)."""
    if x is None:
        return column_sums(grad, offsets, grad_gather, None).unsqueeze(1)
    if transposed:
        return _outer(grad, x, offsets, grad_gather, gather, grad.dtype).mT
    return _outer(x, grad, offsets, gather, grad_gather, grad.dtype)


def _pair(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Widen a matrix only if the other is float64."""
    exact = torch.float64 in (left.dtype, right.dtype)
    return _inner(left, torch.float64 if exact else None), _inner(right, torch.float64 if exact else None)


def _outer(
    left: Tensor, right: Tensor, offsets: Tensor, left_gather: Tensor | None, right_gather: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    n_rows = left.shape[0] if left_gather is None else left_gather.shape[0]
    experts, first, last = groups(offsets, n_rows)
    n_experts, n_left, n_right = offsets.shape[0] - 1, left.shape[1], right.shape[1]
    if not _in_numba(left, right):
        out = left.new_zeros(n_experts, n_left, n_right, dtype=dtype)
        for expert, start, end in zip(experts.tolist(), first.tolist(), last.tolist(), strict=True):
            sides = [
                side[start:end] if gather is None else side.index_select(0, gather[start:end])
                for side, gather in ((left, left_gather), (right, right_gather))
            ]
            out[expert] = sides[0].t() @ sides[1]
        return out
    twin = numba_twin("grouped_cpu")
    left, right = _pair(left, right)
    out = _zeros((n_experts, n_left, n_right), dtype, len(experts))
    wide = _TAGS[_wide(left, right)]
    pieces = -(-n_left // twin.SIDE)
    group, block = np.repeat(np.arange(len(experts)), pieces), np.tile(np.arange(pieces), len(experts))
    arguments = (
        experts[group], first[group], last[group], block, wide,
        _TAGS[left.dtype], left.data_ptr(), left.stride(0), _indices(left_gather), left_gather is not None,
        _TAGS[right.dtype], right.data_ptr(), right.stride(0), _indices(right_gather), right_gather is not None,
        n_left, n_right, _TAGS[dtype], out.data_ptr(),
    )  # fmt: skip
    costs = ((last - first + 4.0) * min(twin.SIDE, n_left) * n_right)[group]
    _run(lambda begin, end: twin.outer(begin, end, *arguments), costs, twin.get_num_threads())
    return out


def column_sums(grad: Tensor, offsets: Tensor, gather: Tensor | None, scale: Tensor | None) -> Tensor:
    """Return Σ_r s_r grad_g(r) over each expert's rows: (E, N); scale (R,) or None for ones."""
    n_rows = grad.shape[0] if gather is None else gather.shape[0]
    experts, first, last = groups(offsets, n_rows)
    n_experts, n_out = offsets.shape[0] - 1, grad.shape[1]
    dtype = _wide(grad)
    if not _in_numba(grad):
        out = grad.new_zeros(n_experts, n_out)
        for expert, start, end in zip(experts.tolist(), first.tolist(), last.tolist(), strict=True):
            picked = (grad[start:end] if gather is None else grad.index_select(0, gather[start:end])).to(dtype)
            picked = picked if scale is None else picked * scale[start:end].unsqueeze(1).to(dtype)
            out[expert] = picked.sum(0).to(grad.dtype)
        return out
    twin, grad = numba_twin("grouped_cpu"), _inner(grad)
    out = _zeros((n_experts, n_out), grad.dtype, len(experts))
    arguments = (
        experts, first, last, _TAGS[grad.dtype], grad.data_ptr(), grad.stride(0), _indices(gather), gather is not None,
        _numbers(scale, dtype), _TAGS[dtype], n_out, _TAGS[grad.dtype], out.data_ptr(),
    )  # fmt: skip
    _run(lambda begin, end: twin.sums(begin, end, *arguments), (last - first) * n_out, twin.get_num_threads())
    return out


def combine(rows: Tensor, weights: Tensor | None, inverse: Tensor, n_kept: Tensor, k: int) -> Tensor:
    """Return y (T, N): y_t = Σ_j w_tj rows[inverse_tj], without those with inverse_tj ≥ n_kept; None is ones."""
    dtype, n_tokens, kept = _wide(rows, weights), inverse.shape[0] // k if k else 0, int(n_kept)
    if not _in_numba(rows, inverse):
        out = rows.new_zeros(n_tokens, rows.shape[1], dtype=dtype)
        for j in range(k):
            here = inverse[j::k]
            inside = (here < kept).unsqueeze(1)
            picked = rows.index_select(0, here).to(dtype)
            picked = picked if weights is None else picked * weights[j::k].to(dtype).unsqueeze(1)
            out += torch.where(inside, picked, 0.0)
        return out.to(rows.dtype)
    twin = numba_twin("grouped_cpu")
    source = _inner(rows, torch.float64 if dtype == torch.float64 else None)
    out = _empty((n_tokens, rows.shape[1]), dtype)
    arguments = (
        _TAGS[source.dtype], source.data_ptr(), source.stride(0), _numbers(weights, dtype), _indices(inverse), kept, k,
        out.numpy(),
    )  # fmt: skip
    costs = np.full(n_tokens, k * rows.shape[1])
    _run(lambda begin, end: twin.combine(begin, end, *arguments), costs, twin.get_num_threads())
    return out.to(rows.dtype)


def _picked(tensor: Tensor, ids: Tensor) -> Tensor:
    return tensor.index_select(0, ids).to(_wide(tensor))


def _inside(ids: Tensor, n_experts: int) -> Tensor:
    """Return the slots whose expert exists."""
    return ((ids >= 0) & (ids < n_experts)).nonzero().squeeze(1)


def tiny_dot(
    x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, k: int, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Return h (T·k, N), N < 32, in ``dtype`` or x's: h_s = x_{s // k} W_{ids_s} + b, zeros for ids outside 0…E−1."""
    given, dtype, (n_experts, _, n_out) = dtype or x.dtype, _wide(x, weight), weight.shape
    if not _in_numba(x, weight, ids):
        out = x.new_zeros(ids.numel(), n_out, dtype=given)
        for slots in _inside(ids, n_experts).split(4096):
            chosen = ids[slots]
            part = torch.bmm(_picked(x, slots // k).unsqueeze(1), _picked(weight, chosen)).squeeze(1)
            out[slots] = (part if bias is None else part + _picked(bias, chosen)).to(given)
        return out
    twin, wide = numba_twin("tiny_cpu"), torch.empty(ids.numel(), n_out, dtype=dtype)
    weight, bias = _matching(weight, dtype), None if bias is None else _matching(bias, weight.dtype).contiguous()
    arguments = (
        _numbers(x, dtype), k, _indices(ids), n_experts, _TAGS[weight.dtype], weight.data_ptr(), *weight.stride(),
        0 if bias is None else bias.data_ptr(), bias is not None, wide.numpy(),
    )  # fmt: skip
    costs = np.full(ids.numel(), weight.shape[1] * n_out)
    _run(lambda begin, end: twin.dot(begin, end, *arguments), costs, twin.get_num_threads())
    return wide.to(given)


def _matching(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor that the kernels can widen to a dtype."""
    return tensor.detach() if dtype == torch.float32 else tensor.detach().to(dtype)


def tiny_spread(
    a: Tensor, weight: Tensor, bias: Tensor | None, row_weight: Tensor | None, ids: Tensor, k: int
) -> Tensor:
    """Return y (T, N), a (T·k, K), K < 32: y_t = Σ_j w_s (a_s W_{ids_s} + b), without ids outside 0…E−1."""
    dtype, (n_experts, _, n_out) = _wide(a, weight, row_weight), weight.shape
    n_tokens = ids.numel() // k if k else 0
    if not _in_numba(a, weight, ids):
        out = a.new_zeros(n_tokens, n_out, dtype=dtype)
        for j in range(k):
            tokens = _inside(ids[j::k], n_experts)
            for token in tokens.split(4096):
                slots = token * k + j
                chosen = ids[slots]
                part = torch.bmm(_picked(a, slots).unsqueeze(1), _picked(weight, chosen)).squeeze(1)
                part = part if bias is None else part + _picked(bias, chosen)
                part = part if row_weight is None else part * row_weight[slots].to(dtype).unsqueeze(1)
                out[token] += part
        return out.to(a.dtype)
    twin, wide = numba_twin("tiny_cpu"), torch.empty(n_tokens, n_out, dtype=dtype)
    weight, bias = _matching(weight, dtype), None if bias is None else _matching(bias, weight.dtype).contiguous()
    arguments = (
        _numbers(a, dtype), k, _numbers(row_weight, dtype), _indices(ids), n_experts, _TAGS[weight.dtype],
        weight.data_ptr(), *weight.stride(), 0 if bias is None else bias.data_ptr(), bias is not None, wide.numpy(),
    )  # fmt: skip
    costs = np.full(n_tokens, k * weight.shape[1] * n_out)
    _run(lambda begin, end: twin.spread(begin, end, *arguments), costs, twin.get_num_threads())
    return wide.to(a.dtype)


def tiny_outer(
    x: Tensor | None, grad: Tensor, offsets: Tensor, x_rows: Tensor | None, grad_rows: Tensor | None, transposed: bool
) -> Tensor:
    """Return dW (E, K, N), min(K, N) < 32, as `outer` does; it costs what touched experts do, and their zeros."""
    if x is None or not _in_numba(x, grad):
        return outer(x, grad, offsets, x_rows, grad_rows, transposed)
    n_rows = grad.shape[0] if grad_rows is None else grad_rows.shape[0]
    experts, first, last = groups(offsets, n_rows)
    n_experts, n_features, n_out = offsets.shape[0] - 1, x.shape[1], grad.shape[1]
    shape = (n_experts, n_out, n_features) if transposed else (n_experts, n_features, n_out)
    out = _zeros(shape, grad.dtype, len(experts))
    sides = [(_inner(x, grad.dtype), x_rows), (_inner(grad), grad_rows)]
    # The longer side goes by lines; it is stored innermost unless that is the other one.
    swapped = n_features > n_out
    (left, left_rows), (right, right_rows) = reversed(sides) if swapped else sides
    twin = numba_twin("tiny_cpu")
    arguments = (
        experts, first, last, _TAGS[_wide(grad)], _TAGS[grad.dtype],
        left.data_ptr(), left.stride(0), _indices(left_rows), left_rows is not None,
        right.data_ptr(), right.stride(0), _indices(right_rows), right_rows is not None,
        left.shape[1], right.shape[1], swapped != transposed, out.data_ptr(),
    )  # fmt: skip
    costs = (last - first) * n_features * n_out
    _run(lambda begin, end: twin.outer(begin, end, *arguments), costs, twin.get_num_threads())
    return out.transpose(1, 2) if transposed else out
