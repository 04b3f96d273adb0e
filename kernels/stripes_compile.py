"""The step in stripes over features compiled ahead of time for a chip, and what the compiler says of it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from moesaic.kernels import stripes_parts_triton as parts
from moesaic.kernels import stripes_products_triton as products
from moesaic.kernels.ahead_of_time import compile_ahead, disassemble
from moesaic.kernels.grouped_compile import (
    _MATRIX,
    PROGRAMS,
    REGISTERS,
    SHARED_PER_PROCESSOR,
    THREADS,
    _granular,
    _tensor_cores,
)
from moesaic.kernels.stripes_triton import BIAS_SUMS, ENCODER, ENTRIES, RESIDUAL, ROW_SUMS, STAGE, UPDATE
from moesaic.kernels.tiles import SHARED_BYTES, Tile

PRODUCTS = ("decode", "decode z", "backward", "outer")
PARTS = ("stage", "residual", "entries", "entries z", "row sums", "bias sums", "encoder", "encoder of one", "update")
_FLOATS = ("twice", "keep", "fresh1", "beta2", "fresh2", "eps", "step_size", "root")
_LONG = ("Rows", "Places", "Columns", "Samples", "Starts", "Bounds", "Order")
_ALIGNED = ("first", "width", "depth", "n_features")


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a kernel for a chip.

    tile: of a product; shared in bytes; spills: bytes of stack and loads and stores of it; matrix: instructions by
    name; programs: resident on a multiprocessor at once; code: the instructions with their addresses.
    """

    name: str
    chip: int
    tile: Tile
    registers: int
    shared: int
    spills: int
    matrix: dict[str, int]
    programs: int
    ptx: str
    code: list[tuple[int, str]]

    def line(self) -> tuple[str, ...]:
        """For a table; see `HEADER`."""
        tile = self.tile
        matrix = ", ".join(f"{count} {name}" for name, count in self.matrix.items())
        blocks = f"{tile.block_m}x{tile.block_n}x{tile.block_k}" if tile.block_m else ""
        return (
            self.name, f"sm_{self.chip}", blocks, str(tile.stages), str(self.registers), f"{self.shared / 1024:.0f}",
            f"{self.programs} x {tile.warps}", str(self.spills), matrix,
        )  # fmt: skip


HEADER = (
    "kernel",
    "chip",
    "tile",
    "stages",
    "registers",
    "shared KiB",
    "warps resident",
    "spills",
    "matrix instructions",
)


def compile_kernel(
    name: str, chip: int, precision: str = "bf16", *, width: int = 1024, per_expert: float = 4096, stripe: int = 4096,
    narrow: bool = False, tile: Tile | None = None,
) -> Compiled:  # fmt: skip
    """Compile one of `PRODUCTS` or `PARTS` for sm_``chip`` as a launch would; it needs no GPU.

    Args:
        name: of the kernel.
        chip: compute capability, 80, 90 or 100.
        precision: ``ieee``, ``tf32x3`` or ``bf16``.
        width: m.
        per_expert: rows per expert.
        stripe: features of a stripe.
        narrow: whether moments are bfloat16.
        tile: another than the shipped one.
    """
    chosen = products.tiles(precision, per_expert, width, stripe, SHARED_BYTES[chip])
    kernel, constants, tile = _kernel(name, chosen, precision, chip, narrow, tile)
    signature = {argument: _type(argument, name, precision, narrow, constants) for argument in kernel.arg_names}
    aligned = [size for size in _ALIGNED if size in signature and size not in kernel.do_not_specialize]
    compiled = compile_ahead(kernel, signature, constants, tile.warps, chip, stages=tile.stages, aligned=aligned)
    usage, code = disassemble(compiled)
    matrix = Counter(label for _, text in code for label, pattern in _MATRIX.items() if re.search(pattern, text))
    programs = min(
        PROGRAMS, THREADS // (32 * tile.warps), REGISTERS // (_granular(usage["REG"]) * 32 * tile.warps),
        SHARED_PER_PROCESSOR[chip] // (compiled.metadata.shared + 1024),
    )  # fmt: skip
    return Compiled(
        name, chip, tile, usage["REG"], compiled.metadata.shared,
        usage["STACK"] + sum(bool(re.search(r"\b(LDL|STL)\b", text)) for _, text in code),
        dict(matrix) if precision == "ieee" else _tensor_cores(matrix), programs, compiled.asm["ptx"], code,
    )  # fmt: skip


def _kernel(
    name: str, chosen: products.Tiles, precision: str, chip: int, narrow: bool, given: Tile | None
) -> tuple[Any, dict[str, Any], Tile]:  # fmt: skip
    """Return a kernel, its compile-time arguments and its tile, of which parts have but warps and stages."""
    kind = name.removesuffix(" z").removesuffix(" of one")
    tile = given or (getattr(chosen, kind) if name in PRODUCTS else Tile(0, 0, 0))
    kernel = getattr(products if name in PRODUCTS else parts, f"_{kind.replace(' ', '_')}_kernel")
    blocks: dict[str, dict[str, int]] = {
        "stage": {"BLOCK_F": STAGE[0], "BLOCK_N": STAGE[1]},
        "residual": {"BLOCK_B": RESIDUAL[0], "BLOCK_N": RESIDUAL[1]},
        "entries": {"BLOCK": ENTRIES, "BLOCK_M": chosen.decode.block_m, "BLOCK_K": chosen.decode.block_k},
        "row sums": {"BLOCK": ROW_SUMS}, "bias sums": {"BLOCK_N": BIAS_SUMS, "BLOCK_K": chosen.outer.block_k},
        "encoder": {"BLOCK_E": ENCODER[0], "BLOCK": ENCODER[1]}, "update": {"BLOCK_F": UPDATE[0], "BLOCK_N": UPDATE[1]},
    }  # fmt: skip
    values = {
        "FUSED": name in ("decode", "entries"), "KEEP": True, "HAS_SHARED": True, "ONE": name == "encoder of one",
        "DIRECT": False, "NARROW": narrow, "EVEN": True, "PART_N": products.PART_N, "PRECISION": precision,
        "TMA": precision != "ieee" and chip >= 90, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
    } | blocks.get(kind, {})  # fmt: skip
    return kernel, {key: value for key, value in values.items() if key in kernel.arg_names}, tile


def _type(argument: str, name: str, precision: str, narrow: bool, values: dict[str, Any]) -> str:
    """Return the type of a kernel's argument as the compiler writes it."""
    if argument in values:
        return "constexpr"
    number = "bf16" if precision == "bf16" else "fp32"
    if argument in ("G", "G0", "H", "W"):
        if not values.get("TMA"):
            return f"*{number}"
        block_m, block_n, block_k = (values[block] for block in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        first, second = {
            "decode": ((block_m, block_k), (block_n, block_k)), "backward": ((block_m, block_k), (block_k, block_n)),
            "outer": ((block_k, block_m), (block_k, block_n)),
        }[name.split()[0]]  # fmt: skip
        # A product's operands are its first two arguments.
        rows, columns = first if argument == {"decode": "H"}.get(name.split()[0], "G") else second
        return f"tensordesc<{number}[{rows},{columns}]>"
    if argument == "Out" and values.get("FUSED"):
        return f"*{number}"
    if argument in _LONG or (argument == "Experts" and name.startswith("encoder")):
        return "*i64"
    if argument in ("Experts", "Ends"):
        return "*i32"
    if argument in ("Avg", "Sq") and narrow:
        return "*i16"
    if argument[0].isupper():
        return "*fp32"
    return "fp32" if argument in _FLOATS else "i32"
