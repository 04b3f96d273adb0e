"""The grouped products compiled ahead of time for a chip, and what the compiler says of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from moesaic.kernels import grouped_matmul_triton, grouped_outer_triton
from moesaic.kernels.ahead_of_time import compile_ahead, disassemble
from moesaic.kernels.tiles import KINDS, Shape, Tile, closed_form, exact

CHIPS = (80, 90, 100)
REGISTERS, SHARED_PER_PROCESSOR, THREADS, PROGRAMS = 65_536, {80: 167_936, 90: 233_472, 100: 233_472}, 2048, 32
"""Of a multiprocessor, alike on the three chips but for the shared memory."""
_MATRIX = {"HMMA": r"\bHMMA\.", "HGMMA": r"\bHGMMA\.", "UTCHMMA": r"\bUTCHMMA\b", "FFMA": r"\bFFMA2?\b"}
_HALVES = {"up": 1, "interleaved": 2, "backward": 1}
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Product:
    """One kernel as it is launched.

    kind: of `tiles.KINDS`; halves: 0 plain, 1 gate beside up, 2 in turn; layout: of the weights (`weights_triton`);
    activation: where there is one, SwiGLU or GELU unless it is named.
    """

    kind: str
    tile: Tile
    dtype: torch.dtype
    precision: str = "ieee"
    halves: int = 0
    layout: str = "tma_k"
    even: bool = True
    activation: str = ""

    @property
    def name(self) -> str:
        """What a table calls it."""
        t = self.tile
        number = _TYPES[self.dtype] if self.precision == "ieee" else self.precision
        swapped = " swapped" if t.swap else ""
        return f"{self.kind} {number} {t.block_m}x{t.block_n}x{t.block_k}{swapped}"


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a product for a chip.

    shared in bytes; spills: bytes of stack and loads and stores of it; matrix: instructions by name; programs:
    resident on a multiprocessor at once; code: the instructions with their addresses.
    """

    product: Product
    chip: int
    registers: int
    shared: int
    spills: int
    matrix: dict[str, int]
    programs: int
    ptx: str
    code: list[tuple[int, str]]

    def line(self) -> tuple[str, ...]:
        """For a table: kernel, chip, registers, shared memory, warps, spills, matrix instructions."""
        matrix = ", ".join(f"{count} {name}" for name, count in self.matrix.items())
        return (
            self.product.name, f"sm_{self.chip}", str(self.registers), f"{self.shared / 1024:.0f}",
            f"{self.programs} x {self.product.tile.warps}", str(self.spills), matrix,
        )  # fmt: skip


HEADER = ("kernel", "chip", "registers", "shared KiB", "warps resident", "spills", "matrix instructions")


def compile_product(product: Product, chip: int) -> Compiled:
    """Compile a product for sm_``chip``; it needs no GPU."""
    tile = product.tile
    kernel, constants = _outer(product) if product.kind == "outer" else _rows(product)
    signature = {name: _kind_of(name, product) for name in kernel.arg_names}
    sizes = ["K", "M", "N", "n_out", *(name for name in signature if name.startswith("stride"))]
    compiled = compile_ahead(
        kernel, signature, constants, tile.warps, chip, stages=tile.stages, aligned=sizes if product.even else ()
    )
    usage, code = disassemble(compiled)
    matrix = Counter(
        name for _, text in code for name, pattern in _MATRIX.items() if re.search(pattern, text)
    )  # fmt: skip
    spills = usage["STACK"] + sum(bool(re.search(r"\b(LDL|STL)\b", text)) for _, text in code)
    programs = min(
        PROGRAMS, THREADS // (32 * tile.warps), REGISTERS // (_granular(usage["REG"]) * 32 * tile.warps),
        SHARED_PER_PROCESSOR[chip] // (compiled.metadata.shared + 1024),
    )  # fmt: skip
    return Compiled(
        product, chip, usage["REG"], compiled.metadata.shared, spills,
        dict(matrix) if product.dtype == torch.float32 and product.precision == "ieee" else _tensor_cores(matrix),
        programs, compiled.asm["ptx"], code,
    )  # fmt: skip


def _granular(registers: int) -> int:
    return -(-registers // 8) * 8


def _tensor_cores(matrix: Counter[str]) -> dict[str, int]:
    return {name: count for name, count in matrix.items() if name != "FFMA"}


def _rows(product: Product) -> tuple[Any, dict[str, Any]]:
    tile, backward = product.tile, product.kind == "backward"
    kernel = grouped_matmul_triton._backward_kernel if backward else grouped_matmul_triton._rows_kernel
    values = {
        "HAS_BIAS": False, "HAS_GATHER": product.kind != "rows", "HAS_SCALE": backward,
        "KEEP": product.kind in ("up", "interleaved"),
        "ACT": "none" if product.kind == "rows" else product.activation or ("swiglu" if product.halves else "gelu"),
        "HALVES": product.halves,
        "LAYOUT": product.layout, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        "PART_N": grouped_matmul_triton.PART_N, "GROUP": tile.group, "SWAP": tile.swap, "EVEN_K": product.even,
        "PRECISION": product.precision,
    }  # fmt: skip
    return kernel, {name: value for name, value in values.items() if name in kernel.arg_names}


def _outer(product: Product) -> tuple[Any, dict[str, Any]]:
    tile = product.tile
    return grouped_outer_triton._outer_kernel, {
        "HAS_GATHER_A": True, "HAS_GATHER_B": False, "LISTED": False, "EVEN": product.even, "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "PRECISION": product.precision,
    }  # fmt: skip


def _kind_of(name: str, product: Product) -> str:
    """Return the type of a kernel's argument as the compiler writes it."""
    number = _TYPES[product.dtype]
    if name in ("X", "G", "A", "B", "Out", "H", "Dh", "Scaled", "Bias"):
        return f"*{number}"
    if name == "W":
        tile = product.tile
        columns = tile.block_n * (2 if product.kind == "interleaved" else 1)
        blocks = {"tma_k": (columns, tile.block_k), "tma_n": (tile.block_k, columns)}
        if product.layout not in blocks:
            return f"*{number}"
        return f"tensordesc<{number}[1,{blocks[product.layout][0]},{blocks[product.layout][1]}]>"
    if name in ("Scale", "Partial"):
        return "*fp32"
    if name in ("Gather", "GatherA", "GatherB", "First", "Offsets", "Count"):
        return "*i64"
    if name == "Experts":
        return "*i32"
    return "i32" if name.startswith(("n_", "stride")) or name in ("K", "M", "N", "most") else "constexpr"


def shipped(chip: int, dtype: torch.dtype, precision: str = "ieee", *, aligned: bool = True) -> Iterator[Product]:
    """Yield every product that the closed form leads to at wide layers: all kinds, 8 to 1,000 rows per expert."""
    plain = exact(dtype, precision)
    for kind in KINDS:
        for per_expert in (8, 40, 100, 1000) if kind != "outer" else (1000,):
            tile = closed_form(Shape(kind, 64 * per_expert, 4096, 4096, 64, dtype, precision, aligned), chip)
            layout = "tma_k" if aligned and chip >= 90 and not plain else "k"
            if not (plain and per_expert == 1000 and kind != "outer"):  # the tile of 100
                yield Product(kind, tile, dtype, precision, _HALVES.get(kind, 0), layout, aligned)
