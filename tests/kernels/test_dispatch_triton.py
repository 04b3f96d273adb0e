"""The Triton grouping kernels, run by the interpreter and compiled ahead of time, against the CPU twin.

Triton decides between compiler and interpreter on import, so this file is also a program.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moesaic.kernels import dispatch_triton
from moesaic.kernels.ahead_of_time import compile_ahead, disassemble
from moesaic.kernels.dispatch import _group

SIZES = [(1, 5), (2, 0), (16, 1024), (2047, 1025), (2048, 70), (1_000_000, 40)]


def differences(n_experts: int, n_slots: int) -> list[str]:
    ids = torch.randint(-2, n_experts + 3, (n_slots,), generator=torch.Generator().manual_seed(n_slots))
    ids = ids.to(torch.int32) if n_slots % 2 else ids
    pairs = zip(
        ("offsets", "order", "inverse"), dispatch_triton.group(ids, n_experts), _group(ids, n_experts), strict=True
    )
    return [f"{n_experts, n_slots}: {name}" for name, ours, theirs in pairs if not torch.equal(ours, theirs)]


def sizes() -> list[str]:
    return [text for size in SIZES for text in differences(*size)]


def many_tiles() -> list[str]:
    """More tiles than the scan takes at a time, of 16 slots."""
    dispatch_triton.TILE = 16
    return differences(9, 16 * 70 + 3) + differences(3000, 16 * 66)


def strided() -> list[str]:
    ids = torch.randint(0, 9, (40, 3), generator=torch.Generator().manual_seed(0))[:, 0]
    pairs = zip(dispatch_triton.group(ids.contiguous(), 9), _group(ids, 9), strict=True)
    return [] if all(torch.equal(ours, theirs) for ours, theirs in pairs) else ["strided ids"]


def a_lost_stability_is_seen() -> list[str]:
    true = dispatch_triton.group

    def swapped(ids: torch.Tensor, n_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        offsets, order, inverse = true(ids, n_experts)
        order[[0, 1]] = order[[1, 0]]
        return offsets, order, inverse

    dispatch_triton.group = swapped
    return [] if differences(1, 40) else ["not seen"]


PROGRAMS: dict[str, Callable[[], list[str]]] = {
    part.__name__: part for part in (sizes, many_tiles, strided, a_lost_stability_is_seen)
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_interpreted(name: str, interpret: Callable[[str], None]) -> None:
    interpret(name)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles_without_spills(arch: int) -> None:
    slots = {"n_slots": "i32", "n_experts": "i32", "shift": "i32"}
    ids, order, histogram = {"Ids": "*i64"}, {"Order": "*i64"}, {"Histogram": "*i32"}
    for n_experts in (128, 2047):
        bins = 2 ** dispatch_triton.digits(n_experts)[1]
        kernels = (
            (dispatch_triton._histogram_kernel, ids | order | histogram | slots, {"FIRST": True}),
            (
                dispatch_triton._scatter_kernel,
                ids | order | histogram | {"Start": "*i64", "Sorted": "*i64", "Inverse": "*i64"} | slots,
                {"FIRST": False, "LAST": True},
            ),
        )
        for kernel, signature, values in kernels:
            values = {"BINS": bins, "TILE": 1024} | values
            usage, code = disassemble(
                compile_ahead(kernel, signature | dict.fromkeys(values, "constexpr"), values, 4, arch)
            )
            assert usage["STACK"] == 0
            assert not [text for _, text in code if "LDL" in text or "STL" in text]


@pytest.mark.gpu
@pytest.mark.parametrize("n_experts", [1, 128, 2047, 2048, 1_000_000])
def test_cuda_equals_the_cpu(n_experts: int) -> None:
    ids = torch.randint(-1, n_experts + 1, (50_000, 8), generator=torch.Generator().manual_seed(0))
    ours = dispatch_triton.group(ids.flatten().cuda(), n_experts)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, _group(ids.flatten(), n_experts), strict=True))
