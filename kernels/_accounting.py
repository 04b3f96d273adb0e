"""What counting needs to know of an op beyond its FLOP formula, registered beside that formula.

    useful             the FLOP formula's                    executed   with padding, as multiplied by what runs
    dense_equivalent   every token through every expert      bytes      read from and written to memory

Whoever counts (`moesaic.metrics.count_flops`) sees ops when PyTorch dispatches them; what is no op calls `record`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

F = TypeVar("F", bound=Callable[..., "Work"])


class Work(NamedTuple):
    """Work of one call; None where it is not known. bound: executed and bytes are the most that they can be."""

    executed: int | None
    dense_equivalent: int | None
    bytes: int
    bound: bool = False


class Tokens:
    """How many tokens the rows of a grouping came from, told by a product that gathers to those that do not."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, int]] = {}

    def of(self, offsets: Tensor, gathered: int | None) -> int | None:
        """Return the number of tokens, ``gathered`` where it is known here, of all products with these offsets."""
        key = offsets.untyped_storage()._cdata
        if gathered is not None:
            # The tensor is kept, so that no other one can get its address.
            self._known[key] = (offsets, gathered)
        return self._known[key][1] if key in self._known else None


@dataclass(frozen=True)
class Call:
    """A call of an op: useful FLOPs by its formula, and bytes if it reads its operands and writes its results once."""

    useful: int
    bytes: int
    tokens: Tokens = field(default_factory=Tokens)


work_registry: dict[Any, Callable[..., Work]] = {}
"""Op packet → formula of (call, *args, **kwargs) with the op's own arguments."""
_listener: ContextVar[Callable[[str, int, Work], None] | None] = ContextVar("moesaic_accounting", default=None)


def register_work(*targets: Any) -> Callable[[F], F]:
    """Register the formula of an op's work beside its FLOP formula."""

    def register(formula: F) -> F:
        work_registry.update(dict.fromkeys(targets, formula))
        return formula

    return register


def record(name: str, formula: Callable[[], tuple[int, Work]]) -> None:
    """Tell whoever counts the useful FLOPs and the work of a call that is no op; nothing where nobody does."""
    listener = _listener.get()
    if listener is not None:
        listener(name, *formula())


@contextmanager
def listening(listener: Callable[[str, int, Work], None] | None) -> Iterator[None]:
    """Give what is recorded inside to a listener, or to none: inside an op that is counted itself."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def is_known(tensor: Tensor) -> bool:
    """Return whether a tensor has values that can be read."""
    return not isinstance(tensor, FakeTensor) and tensor.device.type != "meta" and type(tensor) in _PLAIN


_PLAIN = (Tensor, torch.nn.Parameter)


def moved(*tensors: Tensor | None) -> int:
    """Return the bytes of tensors, each number once however often a dimension of stride 0 or an overlap repeats it."""
    return sum(_bytes(tensor) for tensor in tensors if tensor is not None)


def _bytes(tensor: Tensor) -> int:
    if tensor.layout != torch.strided:
        if tensor.layout == torch.sparse_coo:
            return moved(tensor._indices(), tensor._values())
        rows = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
        first, second = (
            (tensor.crow_indices(), tensor.col_indices()) if rows else (tensor.ccol_indices(), tensor.row_indices())
        )
        return moved(first, second, tensor.values())
    steps = [(size, step) for size, step in zip(tensor.shape, tensor.stride(), strict=True) if step]
    reached = 1 + sum((size - 1) * step for size, step in steps)
    return min(math.prod(size for size, _ in steps), reached) * tensor.element_size() if tensor.numel() else 0


@dataclass(frozen=True)
class Groups:
    """Rows by expert: their number, the experts that have any, and each one's rows, or None where nobody can know.

    Then there are as many rows and experts with rows as can be.
    """

    rows: int
    touched: int
    counts: NDArray[np.int64] | None = None

    @classmethod
    def of_ids(cls, ids: Tensor, n_experts: int) -> Groups:
        """Group choices by expert id; ids outside 0…E−1 are skipped."""
        if not is_known(ids):
            return cls(ids.numel(), min(ids.numel(), n_experts))
        flat = ids.detach().cpu().numpy().reshape(-1)
        return cls._of(np.unique(flat[(flat >= 0) & (flat < n_experts)], return_counts=True)[1])

    @classmethod
    def of_offsets(cls, offsets: Tensor, n_rows: int) -> Groups:
        """Group rows offsets[e] … offsets[e + 1] by expert e."""
        if not is_known(offsets):
            return cls(n_rows, min(n_rows, offsets.shape[0] - 1))
        counts = np.diff(offsets.detach().cpu().numpy())
        return cls._of(counts[counts > 0])

    @classmethod
    def _of(cls, counts: NDArray[np.int64]) -> Groups:
        return cls(int(counts.sum()), len(counts), counts)

    @property
    def bound(self) -> bool:
        """Whether the numbers are the most that they can be."""
        return self.counts is None

    def padded(self, block: int) -> int:
        """Return the rows of all tiles of ``block`` rows, none across two experts.

        Unknown, the most there can be: one row in each expert but one.
        """
        if self.counts is None:
            return (self.touched + (self.rows - self.touched) // block) * block if self.touched else 0
        return int((-(-self.counts // block)).sum()) * block


def up_to(size: int, block: int) -> int:
    """Return a size padded to a multiple of a block."""
    return -(-size // block) * block
