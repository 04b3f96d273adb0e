"""The quickened interpreter computes what the kernel says, and refuses signed integers out of range."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# Triton compiles a function whose parameters are pointers of any type.

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import xor

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _scaled(x, factor):
    return tl.sum(x * factor, axis=1)


@triton.jit
def _kernel(Out, X, Whole, Mixed, by, N: tl.constexpr, OPERATION: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    x = tl.load(X + at)
    pair = (_scaled(x[:, None] + tl.zeros([N, 4], tl.float32), 0.5), x.to(tl.float16))
    tl.store(Out + at, pair[0] + pair[1])
    hash = at.to(tl.uint32) * 0x85EBCA6B
    tl.store(Mixed + tl.program_id(0), tl.xor_sum(hash, axis=0).to(tl.int64))
    whole = tl.load(Whole + at)
    if OPERATION == "add":
        whole = whole + by
    elif OPERATION == "sub":
        whole = whole - by
    else:
        whole = whole * by
    tl.store(Whole + at, whole)


def run(operation: str, whole: int, by: int, dtype: torch.dtype = torch.int32) -> tuple[torch.Tensor, torch.Tensor]:
    x, out, integers = torch.arange(8).float(), torch.full((8,), torch.nan), torch.full((8,), whole, dtype=dtype)
    mixed = torch.zeros(2, dtype=torch.int64)
    _kernel[(2,)](out, x, integers, mixed, by, N=4, OPERATION=operation)
    assert torch.equal(out, 3 * x)
    hashes = [at * 0x85EBCA6B % 2**32 for at in range(8)]  # unsigned integers wrap around
    assert mixed.tolist() == [reduce(xor, hashes[:4]), reduce(xor, hashes[4:])]
    return out, integers


def within() -> list[str]:
    expected = {"add": 2**31 - 1, "sub": 2**31 - 5, "mul": 2 * (2**31 - 3)}
    found = {
        "add": run("add", 2**31 - 3, 2)[1],
        "sub": run("sub", 2**31 - 3, 2)[1],
        "mul": run("mul", 2**31 - 3, 2, torch.int64)[1],
    }
    return [name for name, values in found.items() if values.tolist() != [expected[name]] * 8]


def beyond() -> list[str]:
    missed = []
    for operation, whole, by in (("add", 2**31 - 3, 3), ("sub", -(2**31), 1), ("mul", 2**16, 2**15)):
        try:
            run(operation, whole, by)
        except Exception as error:
            if f"int32 overflow detected for operation {operation}" in str(error):
                continue
            raise
        missed.append(operation)
    return missed


PROGRAMS = {program.__name__: program for program in (within, beyond)}


@pytest.mark.parametrize("name", PROGRAMS)
def test_interpreted(name: str, interpret: Callable[[str], None]) -> None:
    interpret(name)
