"""FLOPs and bytes of every op that PyTorch dispatches, by the formulas that are registered for it.

Useful FLOPs are those of `torch.utils.flop_counter`, to the integer, and of `FURTHER`: matrix products that it has no
formula for. The ops of `moesaic` have further formulas (`moesaic.kernels._accounting`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from moesaic.kernels._accounting import Call, Tokens, Work, listening, work_registry
from moesaic.metrics.op_bytes import op_bytes


@dataclass
class Totals:
    """Sums over ops: FLOPs and bytes; None once one op's are not known. bound: some are the most that they can be."""

    useful: int = 0
    executed: int | None = 0
    dense_equivalent: int | None = 0
    bytes: int = 0
    bound: bool = False

    def add(self, useful: int, work: Work) -> None:
        """Count one more call."""
        self.useful += useful
        self.executed = _sum(self.executed, work.executed)
        self.dense_equivalent = _sum(self.dense_equivalent, work.dense_equivalent)
        self.bytes += work.bytes
        self.bound |= work.bound

    def __add__(self, other: Totals) -> Totals:
        total = Totals(self.useful, self.executed, self.dense_equivalent, self.bytes, self.bound)
        total.add(other.useful, Work(other.executed, other.dense_equivalent, other.bytes, other.bound))
        return total


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    batch, heads, length, depth = query
    return 2 * int(batch * heads * length * key[2] * (depth + value[3]))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Scores made again, and two gradients of each product."""
    batch, heads, length, depth = query
    return 2 * int(batch * heads * length * key[2] * (3 * depth + 2 * value[3]))


def _grouped(left: Any, right: Any, *_: Any, **__: Any) -> int:
    """Rows by group times a matrix each; columns by group times rows by group; or matrices times matrices."""
    groups = left[0] if len(left) == len(right) == 3 else 1
    return 2 * int(groups * left[-2] * left[-1] * right[-1])


def _grouped_backward(left: Any, right: Any, *_: Any, **__: Any) -> int:
    return 2 * _grouped(left, right)


FURTHER: dict[str, Callable[..., int]] = {
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "aten._grouped_mm": _grouped,
    "aten._scaled_grouped_mm": _grouped,
    "transformers.grouped_mm_fallback": _grouped,
    "transformers.grouped_mm_fallback_backward": _grouped_backward,
}
"""Op → FLOP formula of shapes, where `torch.utils.flop_counter` has none; its ``custom_mapping`` takes these."""
_OF_EXPERTS = tuple(name for name in FURTHER if "grouped" in name)
"""Products by expert of which nobody says how many tokens there are."""


class OpAccounting(TorchDispatchMode):
    """Count everything that is dispatched inside: ``total``, and by op ``by_op``.

    Composite ops are taken apart as `torch.utils.flop_counter.FlopCounterMode` does.
    """

    supports_higher_order_operators = True

    def __init__(self, tokens: Tokens | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = Totals()
        self.by_op: dict[str, Totals] = {}
        self.tokens = tokens or Tokens()
        self._listening: list[Any] = []

    def __enter__(self) -> OpAccounting:
        context = listening(self._count)
        context.__enter__()
        self._listening.append(context)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._listening.pop().__exit__(*exception)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _QUERIES or isinstance(func, HigherOrderOperator):
            return NotImplemented
        if func is not torch.ops.prim.device.default:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        with listening(None):
            out = func(*args, **kwargs)
        self._count_op(func, args, kwargs, out)
        return out

    def _count_op(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: object) -> None:
        packet, name = func._overloadpacket, str(func._overloadpacket)
        useful = 0
        if packet in flop_registry:
            useful = int(flop_registry[packet](*args, **kwargs, out_val=out))
        elif name in FURTHER:
            useful = FURTHER[name](*(arg.shape if isinstance(arg, Tensor) else arg for arg in args))
        moves, bound = op_bytes(func, args, kwargs, out)
        work = Work(useful, None if name in _OF_EXPERTS else useful, moves, bound)
        if packet in work_registry:
            work = work_registry[packet](Call(useful, moves, self.tokens), *args, **kwargs)
        self._count(name, useful, work)

    def _count(self, name: str, useful: int, work: Work) -> None:
        self.total.add(useful, work)
        self.by_op.setdefault(name, Totals()).add(useful, work)


_ATEN = torch.ops.aten
_QUERIES = frozenset({
    _ATEN.sym_is_contiguous.default, _ATEN.is_contiguous.default, _ATEN.is_contiguous.memory_format,
    _ATEN.is_strides_like_format.default, _ATEN.is_non_overlapping_and_dense.default, _ATEN.size.default,
    _ATEN.sym_size.default, _ATEN.stride.default, _ATEN.sym_stride.default, _ATEN.storage_offset.default,
    _ATEN.sym_storage_offset.default, _ATEN.numel.default, _ATEN.sym_numel.default, _ATEN.dim.default,
    torch.ops.prim.layout.default,
})  # fmt: skip
"""What subclasses of tensors ask of themselves."""
