"""Tile sizes of the grouped products: a closed form of rows per expert, and a table of shapes measured on a chip.

    rows per expert   < 24   < 64   < 256   else
    BLOCK_M             16     32      64    128

A tile of fewer than 64 rows swaps the operands. Under random routing with m rows per expert at most 2.1 times the
useful rows are computed at m = 8, 1.5 times at 32 and 64, 1.25 times from 256 on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
import triton

KINDS = ("rows", "up", "interleaved", "backward", "outer")
"""Products without a gated activation, with one of either order, with its gradient, and of rows with rows."""
SHARED_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}
"""Shared memory that one program may take: of an A100, an H200 and a B200."""
INTERPRETED = 90
_RESERVED_BYTES = 8_192
"""For barriers and for what an epilogue moves between threads."""
_TABLE = Path(__file__).with_name("tiles.json")


@dataclass(frozen=True)
class Tile:
    """Sizes of a grouped product's blocks.

    block_m × block_n outputs per program and step of block_k; swap: the weights are the left operand; group: tiles of
    rows that go through all columns together; programs: per multiprocessor. For ``outer`` the outputs are block_m ×
    block_n of an expert's gradient, and block_k its rows.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int = 4
    stages: int = 3
    swap: bool = False
    group: int = 8
    programs: int = 1


@dataclass(frozen=True)
class Shape:
    """What a tile is chosen by.

    kind: of `KINDS`; R rows (n_rows) of n_experts experts, depth K, n_out columns N (of a gated activation's output;
    for ``outer`` K and N are the gradient's); aligned: whether rows of all operands begin at multiples of 16 bytes.
    """

    kind: str
    n_rows: int
    depth: int
    n_out: int
    n_experts: int
    dtype: torch.dtype
    precision: str = "ieee"
    aligned: bool = True

    @property
    def per_expert(self) -> float:
        """Rows per expert, of those that can have any."""
        return self.n_rows / max(1, min(self.n_experts, self.n_rows))

    @property
    def key(self) -> str:
        """What shapes with one entry in a table have in common: rows per expert count by powers of two."""
        rows = _power(math.ceil(self.per_expert), 1, 1 << 20)
        number = str(self.dtype).removeprefix("torch.")
        edge = "" if self.aligned else " unaligned"
        return f"{self.kind} {number} {self.precision} m{rows} k{self.depth} n{self.n_out}{edge}"


def choose(shape: Shape, device: torch.device, launch: Callable[[Tile], object]) -> Tile:
    """Return the tile for a shape on a device.

    A shape in the chip's table has that tile; every other has the closed form's, without any measuring, unless tuning
    was asked for: then ``launch`` is timed with a few.
    """
    if device.type != "cuda":
        return planned(shape, device)
    from moesaic.kernels import tuning

    tile, known = closed_form(shape, architecture(device), shared_bytes(device)), table(chip(device))
    if shape.key not in known and tuning.enabled():

        def measure(tile: Tile) -> float:
            return 1e-3 * float(triton.testing.do_bench(lambda: launch(tile), warmup=10, rep=40, return_mode="median"))

        known[shape.key] = tuning.tune(chip(device), shape.key, tile, measure, budget_s=tuning.seconds())
    return known.get(shape.key, tile)


def planned(shape: Shape, device: torch.device) -> Tile:
    """Return the tile that `choose` gives without tuning; for a GPU that this machine does not have, an H100's."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return closed_form(shape, INTERPRETED)
    tile = closed_form(shape, architecture(device), shared_bytes(device))
    return table(chip(device)).get(shape.key, tile)


def exact(dtype: torch.dtype, precision: str) -> bool:
    """Return whether products are float32's own, which no tensor core computes."""
    return dtype == torch.float32 and precision == "ieee"


def closed_form(shape: Shape, architecture: int, shared: int | None = None) -> Tile:
    """Return the tile that follows from a shape alone, for compute capability 80, 90 or 100.

    ``shared``: bytes of shared memory that a program may take, by default those of `SHARED_BYTES`. A chip that has less
    gets fewer stages, and narrower blocks where two do not fit.
    Widths are the largest at which the compiler spills no register, stages and programs those that shared memory holds.
    """
    kind, narrow = shape.kind, shape.dtype.itemsize == 2
    room = (shared or SHARED_BYTES[architecture]) - _RESERVED_BYTES
    if kind == "outer":
        return _outer(shape, narrow, room)
    block_m = next((block for block, below in ((16, 24), (32, 64), (64, 256)) if shape.per_expert < below), 128)
    double = kind in ("up", "interleaved")
    if exact(shape.dtype, shape.precision):
        block_k, warps = 16 if double or block_m == 32 else 32, 2 if block_m == 16 else 4
        return Tile(min(block_m, 64), _power(shape.n_out, 16, 64), block_k, warps, 2, programs=2)
    # Numbers that are loaded one by one need an address each: shorter steps, and more threads to hold them.
    block_k = _power(shape.depth, 16, (64 if narrow else 32) // (1 if shape.aligned else 2))
    if block_m < 64:
        block_n, warps = 64 if kind in ("backward", "interleaved") else 128, 4 if shape.aligned else 8
        return _filled(Tile(block_m, block_n, block_k, warps, 3, swap=True), shape, double, room, most=4)
    if kind == "backward" and not shape.aligned:
        block_m = 64
    wide = 256 if kind == "rows" else 128
    if (architecture < 90 and double) or (architecture >= 100 and kind == "interleaved") or not shape.aligned:
        wide //= 2
    block_n = _power(shape.n_out, 16, wide if narrow else wide // 2)
    outputs = block_m * block_n * (2 if double else 1)
    few = (block_m == 64 and architecture >= 90) or outputs <= 64 * (128 if narrow else 64)
    warps = 4 if few and shape.aligned else 8
    return _filled(Tile(block_m, block_n, block_k, warps, 4), shape, double, room, most=128 // block_m)


def _outer(shape: Shape, narrow: bool, room: int) -> Tile:
    if exact(shape.dtype, shape.precision):
        return Tile(_power(shape.depth, 16, 64), _power(shape.n_out, 16, 64), 32, 4, 2, programs=2)
    block_m = _power(shape.depth, 64, 128)
    block_n = _power(shape.n_out, 16, 256 if narrow and shape.aligned else 128)
    block_k = (64 if narrow else 32) // (1 if shape.aligned else 2)
    tile = Tile(block_m, block_n, block_k, 8 if block_m * block_n > 64 * 128 else 4, 4)
    return _filled(tile, shape, False, room, most=1)


def _filled(tile: Tile, shape: Shape, double: bool, room: int, most: int) -> Tile:
    """Return the tile with as many stages, at most its own, and programs, at most ``most``, as shared memory holds."""
    stage = (tile.block_m + tile.block_n * (2 if double else 1)) * tile.block_k * shape.dtype.itemsize
    while 2 * stage > room and tile.block_n > 16:
        tile = replace(tile, block_n=tile.block_n // 2)
        stage = (tile.block_m + tile.block_n * (2 if double else 1)) * tile.block_k * shape.dtype.itemsize
    stages = max(2, min(tile.stages, room // stage))
    return replace(tile, stages=stages, programs=max(1, min(most, room // (stages * stage + _RESERVED_BYTES))))


def _power(size: int, least: int, most: int) -> int:
    """Return the power of two that covers a size, between two others."""
    return min(most, max(least, 1 << (max(size, 1) - 1).bit_length()))


@cache
def table(name: str) -> dict[str, Tile]:
    """Return a chip's measured tiles by `key`: those shipped, and over them those that were tuned here."""
    from moesaic.kernels import tuning

    shipped = json.loads(_TABLE.read_text(encoding="utf-8")).get(name, {})
    return {shape: Tile(**sizes) for shape, sizes in (shipped | tuning.stored(name)).items()}


@cache
def chip(device: torch.device) -> str:
    """Return a GPU's name in the tables, ``none`` for the interpreter."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "none"


@cache
def architecture(device: torch.device) -> int:
    """Return the key of `SHARED_BYTES` that a GPU's compute capability falls under."""
    major, _ = torch.cuda.get_device_capability(device)
    return 80 if major < 9 else 90 if major < 10 else 100


@cache
def shared_bytes(device: torch.device) -> int:
    """Return the bytes of shared memory that one program may take on a GPU; where PyTorch does not say, an A100's."""
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", SHARED_BYTES[80]))


@cache
def multiprocessors(device: torch.device) -> int:
    """Return how many programs run side by side, at one per multiprocessor; the interpreter has a few."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 5
