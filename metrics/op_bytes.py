"""Bytes that PyTorch's ops move, from their schemas: operands are read once, results written once, views are free."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from moesaic.kernels._accounting import is_known, moved

_FREE = frozenset({
    "empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "_unsafe_view",
    "resize_", "resize_as_", "set_", "is_same_size", "device",
})  # fmt: skip
"""Allocate or look, and move nothing; what the schema calls a view neither."""
_READ_NOTHING = frozenset({
    "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like", "new_zeros", "new_ones",
    "new_full",
})  # fmt: skip
"""Take a tensor for its shape."""
_OVERWRITE = frozenset({
    "copy_", "fill_", "zero_", "uniform_", "normal_", "bernoulli_", "random_", "exponential_", "log_normal_", "cauchy_",
    "geometric_", "_foreach_copy_", "_foreach_zero_",
})  # fmt: skip
"""Write in place what they do not read."""


def op_bytes(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: object) -> tuple[int, bool]:
    """Return the bytes of one call, and whether they are only the most that they can be."""
    name = func._schema.name.split("::")[1]
    if func.is_view or name in _FREE:
        return 0, False
    if func.namespace == "aten" and name in _RULES:
        arguments = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        return _RULES[name](arguments, out)
    return _plain(func, name, args, kwargs, out), False


def _plain(func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: object) -> int:
    read: dict[int, int] = {}
    written = 0
    schema = func._schema
    for place, argument in enumerate(schema.arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        writes = argument.alias_info is not None and argument.alias_info.is_write
        for tensor in _tensors(value):
            written += moved(tensor) if writes else 0
            if name not in _READ_NOTHING and not (writes and (argument.is_out or name in _OVERWRITE)):
                read[id(tensor)] = moved(tensor)
    results = out if len(schema.returns) != 1 and isinstance(out, (tuple, list)) else (out,)
    for returned, value in zip(schema.returns, results, strict=False):
        if returned.alias_info is None:
            written += moved(*_tensors(value))
    return sum(read.values()) + written


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _gather(arguments: dict[str, Any], out: Any) -> tuple[int, bool]:
    """What is selected is read and written, and the index read; not the whole table."""
    index = [arguments[name] for name in ("index", "indices", "mask") if name in arguments]
    return 2 * moved(out) + moved(*_tensors(index)), False


def _bag(arguments: dict[str, Any], out: Any) -> tuple[int, bool]:
    weight, indices = arguments["weight"], arguments["indices"]
    rows = indices.numel() * weight.shape[1] * weight.element_size()
    return rows + moved(indices, arguments["offsets"], *_tensors(list(out))), False


def _put(name: str) -> Callable[[dict[str, Any], Any], tuple[int, bool]]:
    adds = any(word in name for word in ("add", "reduce"))

    def rule(arguments: dict[str, Any], out: Any) -> tuple[int, bool]:
        """What is selected is written, and read too where something is added, beside index and source."""
        target, index = arguments["self"], arguments["index"]
        source = next((arguments[key] for key in ("source", "src", "value") if key in arguments), None)
        if name.startswith("scatter"):
            numbers = index.numel()
        else:
            dim = arguments["dim"]
            numbers = index.numel() * (target.numel() // max(1, target.shape[dim])) if target.ndim else 1
        given = 0
        if isinstance(source, Tensor):
            given = min(moved(source), numbers * source.element_size())
        return moved(index) + given + numbers * target.element_size() * (2 if adds else 1), False

    return rule


def _index_put(arguments: dict[str, Any], out: Any) -> tuple[int, bool]:
    target, indices, values = arguments["self"], arguments["indices"], arguments["values"]
    shapes, rest, dim, bound = [], 1, 0, False
    for index in indices:
        if index is None:
            rest, dim = rest * target.shape[dim], dim + 1
        elif index.dtype in (torch.bool, torch.uint8):
            known = is_known(index)
            bound |= not known
            shapes.append((int(index.count_nonzero()) if known else index.numel(),))
            dim += index.ndim
        else:
            shapes.append(tuple(index.shape))
            dim += 1
    selected = math.prod(torch.broadcast_shapes(*shapes)) * rest * math.prod(target.shape[dim:])
    times = 2 if arguments.get("accumulate", False) else 1
    return moved(*_tensors(list(indices)), values) + times * selected * target.element_size(), bound


_RULES: dict[str, Callable[[dict[str, Any], Any], tuple[int, bool]]] = {
    **dict.fromkeys(
        ("index_select", "gather", "take", "index", "_unsafe_index", "embedding", "masked_select"), _gather
    ),
    **dict.fromkeys(("_embedding_bag", "_embedding_bag_forward_only"), _bag),
    **{
        name: _put(name)
        for name in (
            "index_add_", "index_copy_", "index_fill_", "index_reduce_", "scatter_", "scatter_add_", "scatter_reduce_",
        )
    },
    **dict.fromkeys(("index_put_", "_index_put_impl_"), _index_put),
}  # fmt: skip
