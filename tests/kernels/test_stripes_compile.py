"""The step in stripes compiled ahead of time as shipped, for n = 1e6, m = 1024, B = 4096: no spills, tensor cores."""

from __future__ import annotations

import re
from functools import cache

import pytest

from moesaic.kernels.stripes_compile import HEADER, PARTS, PRODUCTS, Compiled, compile_kernel
from moesaic.kernels.tiles import SHARED_BYTES, Tile

WIDE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
_JUMP = re.compile(r"\bBRA\b.*\b0x([0-9a-f]+)$")


@cache
def compiled(name: str, chip: int, *, narrow: bool = False) -> Compiled:
    return compile_kernel(name, chip, narrow=narrow)


def check(found: list[Compiled]) -> None:
    table = [HEADER, *(one.line() for one in found)]
    widths = [max(len(line[column]) for line in table) for column in range(len(HEADER))]
    print("\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table))
    for one in found:
        assert one.spills == 0, one.name
        assert one.shared <= SHARED_BYTES[one.chip], one.name
        assert one.programs >= 1, one.name
        assert not [text for _, text in one.code if re.search(r"\b(ATOM|ATOMG|RED|REDG)\b", text)], one.name


def in_a_loop(one: Compiled, instruction: str) -> bool:
    """Whether an instruction stands between a backward jump and where it goes."""
    ends = [(int(jump[1], 16), at) for at, text in one.code if (jump := _JUMP.search(text)) and int(jump[1], 16) < at]
    places = [at for at, text in one.code if re.search(rf"\b{instruction}\b", text)]
    return any(first <= at <= last for first, last in ends for at in places)


@pytest.mark.parametrize("chip", [80, 90, 100])
def test_bf16_products_use_the_widest_matrix_instructions_in_their_loops(chip: int) -> None:
    found = [compiled(name, chip) for name in (PRODUCTS if chip == 90 else ("decode", "outer"))]
    check(found)
    for one in found:
        assert in_a_loop(one, WIDE[chip]), one.name


def test_ieee_products_use_no_tensor_cores() -> None:
    found = [compile_kernel("outer", 90, "ieee")]
    check(found)
    for one in found:
        assert ".tf32" not in one.ptx
        assert "HGMMA" not in one.matrix
        assert "HMMA" not in one.matrix
        assert one.matrix["FFMA"] >= one.tile.block_k


def test_tf32x3_is_three_products() -> None:
    one = compile_kernel("backward", 90, "tf32x3")
    check([one])
    # Each step is 32 deep and an instruction 8.
    assert one.matrix["HGMMA"] == 3 * 32 // 8


@pytest.mark.parametrize(("chip", "names"), [(80, ("update",)), (90, PARTS), (100, ("encoder",))])
def test_parts(chip: int, names: tuple[str, ...]) -> None:
    check([compiled(name, chip, narrow=chip == 90) for name in names])


def test_a_spill_is_seen() -> None:
    assert compile_kernel("backward", 90, tile=Tile(128, 256, 64, 4, 3)).spills > 0


def test_relu_keeps_nan() -> None:
    for name in ("decode", "residual"):
        ptx = compiled(name, 90, narrow=name not in PRODUCTS).ptx
        assert "max.NaN.f32" in ptx
        assert "max.f32" not in ptx
