"""The grouped products compiled ahead of time at shipped tiles: no spills, tensor cores, no atomics.

Every tile of sm_90 in bfloat16, and every third elsewhere; all of them where MOESAIC_ALL_TILES is set.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from functools import cache

import pytest
import torch

from moesaic.kernels.activations import clamped_swiglu
from moesaic.kernels.grouped_compile import CHIPS, HEADER, Compiled, compile_product, shipped
from moesaic.kernels.tiles import SHARED_BYTES

NUMBERS = {
    "bf16": (torch.bfloat16, "ieee"), "ieee": (torch.float32, "ieee"), "tf32": (torch.float32, "tf32"),
}  # fmt: skip
WIDE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
"""The chip's widest matrix instruction; from sm_90 on it takes 64 rows or more."""
CASES = [(chip, "bf16", True) for chip in CHIPS] + [(chip, "ieee", True) for chip in CHIPS]
CASES += [(90, "tf32", True), (90, "bf16", False)]


@cache
def compiled(chip: int, number: str, aligned: bool) -> list[Compiled]:
    products = list(shipped(chip, *NUMBERS[number], aligned=aligned))
    if (chip, number, aligned) != (90, "bf16", True) and not os.environ.get("MOESAIC_ALL_TILES"):
        products = products[chip // 10 % 3 :: 3]
    return [compile_product(product, chip) for product in products]


@pytest.mark.parametrize(("chip", "number", "aligned"), CASES)
def test_every_shipped_tile(chip: int, number: str, aligned: bool) -> None:
    found = compiled(chip, number, aligned)
    table = [HEADER, *(one.line() for one in found)]
    widths = [max(len(line[column]) for line in table) for column in range(len(HEADER))]
    print("\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table))
    for one in found:
        assert one.spills == 0, one.product.name
        assert one.shared <= SHARED_BYTES[chip], one.product.name
        assert one.programs >= 1, one.product.name
        assert not [text for _, text in one.code if re.search(r"\b(ATOM|ATOMG|RED|REDG)\b", text)], one.product.name
        if number == "ieee":
            assert ".tf32" not in one.ptx
            assert one.matrix["FFMA"] >= one.product.tile.block_k
        else:
            assert one.matrix.get(WIDE[chip], 0) > 0, one.product.name
            assert (".tf32" in one.ptx) == number.startswith("tf32")


def test_a_clamped_swiglu_spills_nothing_either() -> None:
    for kind in ("up", "backward"):
        widest = max(
            (one.product for one in compiled(90, "bf16", True) if one.product.kind == kind and one.product.halves),
            key=lambda product: product.tile.block_m * product.tile.block_n,
        )
        found = compile_product(replace(widest, activation=clamped_swiglu(7.0, 1.702, 1.0)), 90)
        assert found.spills == 0
        assert found.registers < 255


def test_rows_of_few_tokens_swap_the_operands() -> None:
    for one in compiled(90, "bf16", True):
        tile = one.product.tile
        assert tile.swap == (tile.block_m < 64)
        assert (tile.block_n if tile.swap else tile.block_m) >= 64
