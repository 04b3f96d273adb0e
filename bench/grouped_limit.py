"""What the compiler's report for sm_90 says of the grouped products: resources, the main loop's mix, a speed limit."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from moesaic.bench.kernel_bench import Table
from moesaic.bench.plan import Row
from moesaic.kernels.tiles import Tile

ARCH = 90
MULTIPROCESSORS, CLOCK_HZ, BYTES_PER_S = 132, 1.755e9, 4.8e12
"""An H200 under matrix load; the bandwidth is its data sheet's."""
MATRIX_PER_CYCLE = 4096
"""16-bit multiply-adds of a multiprocessor's tensor cores in a cycle, times two."""
SHARED_PER_CYCLE = 128
"""Bytes that a multiprocessor's shared memory hands over in a cycle."""
CASES = ((40960, 768, 256, 128, 8), (32768, 2048, 768, 128, 8), (32768, 4096, 1024, 64, 4))
"""(T, d, n, E, k)."""
HEADER = (
    "T, d, n, E, k", "kernel", "registers", "shared KiB", "warps", "spills", "loop: wgmma", "copies", "other",
    "outside", "bound, TFLOP/s", "by",
)  # fmt: skip
_JUMP = re.compile(r"\bBRA\b.*\b0x([0-9a-f]+)$")
_COPIES = re.compile(r"\b(LDGSTS|UTMALDG|LDG|STS)\b|\b(LDGSTS|UTMALDG|LDG|STS)\.")


def grouped_limits() -> tuple[Table, list[Row]]:
    """Compile every product of an expert MLP at three shapes, and say what came out."""
    title = f"Grouped products on sm_{ARCH}: from the compiler's report, not a measurement"
    notes = (
        "loop: instructions per pass of the loop over K (for outer, over an expert's rows); other: issued beside wgmma "
        "and copies, which run on their own. outside: instructions per tile that are not in the loop.",
        "bound: useful FLOPs over the longest of: tensor cores at their peak on every row that is computed, the loop's "
        "instructions at 4 per cycle, operands that wgmma reads from shared memory at 128 bytes per cycle; where one "
        "program fills a processor, plus the instructions outside the loop, while its tensor cores rest. Or over the "
        f"bytes that must move at {BYTES_PER_S / 1e12:g} TB/s, if that is longer. {MULTIPROCESSORS} processors at "
        f"{CLOCK_HZ / 1e9:g} GHz, balanced routing. Latencies and waits are not in it.",
    )
    rows: list[Row] = []
    try:
        for case in CASES:
            rows += _rows(case)
    except (ImportError, OSError, subprocess.CalledProcessError, RuntimeError) as error:
        return Table(title, notes=(f"not available: {error}",)), []
    return Table(title, HEADER, [_line(row) for row in rows], notes), rows


def _line(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        row["case"], row["kernel"], str(row["registers"]), f"{row['shared_bytes'] / 1024:.0f}", row["warps"],
        str(row["spills"]), str(row["loop"]["wgmma"]), str(row["loop"]["copies"]), str(row["loop"]["other"]),
        str(row["outside"]), f"{row['bound_tflops']:.0f}", row["bound_by"],
    )  # fmt: skip


def _rows(case: tuple[int, int, int, int, int]) -> list[Row]:
    from moesaic.kernels.grouped_compile import Product, compile_product
    from moesaic.kernels.tiles import Shape, closed_form

    tokens, d, n, n_experts, k = case
    choices = tokens * k
    # kind, K, N, bytes that must move: inputs and weights once, outputs once
    weights = 2 * n_experts * d * n
    products = {
        "up": ("up", d, n, 2 * weights + 2 * tokens * d + 2 * choices * 3 * n),
        "down": ("rows", n, d, weights + 2 * choices * (n + d)),
        "d activation": ("backward", d, n, weights + 2 * tokens * d + 2 * choices * (2 * n + n + 2 * n)),
        "d x": ("rows", 2 * n, d, 2 * weights + 2 * choices * (2 * n + d)),
        "d up": ("outer", 2 * n, d, 2 * weights + 2 * tokens * d + 2 * choices * 2 * n),
        "d down": ("outer", d, n, weights + 2 * tokens * d + 2 * choices * n),
    }
    found: list[Row] = []
    for name, (kind, depth, n_out, moved) in products.items():
        shape = Shape(kind, choices, depth, n_out, n_experts, torch.bfloat16)
        tile = closed_form(shape, ARCH)
        compiled = compile_product(Product(kind, tile, torch.bfloat16, halves=kind in ("up", "backward")), ARCH)
        loop = _loop(compiled.code)
        double = kind == "up"
        flops = 2 * choices * depth * n_out * (2 if double else 1)
        per_step = 2 * tile.block_m * tile.block_n * tile.block_k * (2 if double else 1)
        per_expert = -(-choices // n_experts)
        blocks_m, length = (depth, per_expert) if kind == "outer" else (per_expert, depth)
        tiles = n_experts * -(-blocks_m // tile.block_m) * -(-n_out // tile.block_n)
        steps = tiles * -(-length // tile.block_k)
        cycles = {
            "tensor cores": per_step / MATRIX_PER_CYCLE,
            "instructions": tile.warps * sum(loop.values()) / 4,
            "shared memory": _operand_bytes(tile, double) / SHARED_PER_CYCLE,
        }
        seconds = {part: steps * value / (MULTIPROCESSORS * CLOCK_HZ) for part, value in cycles.items()}
        longest = max(seconds, key=lambda part: seconds[part])
        outside = sum(not text.startswith("NOP") for _, text in compiled.code) - sum(loop.values())
        seconds["outside"] = tiles * tile.warps * outside / 4 / (MULTIPROCESSORS * CLOCK_HZ)
        seconds["memory"] = moved / BYTES_PER_S
        taken = seconds[longest] + (seconds["outside"] if compiled.programs == 1 else 0.0)
        if seconds["memory"] > taken:
            longest, taken = "memory", seconds["memory"]
        found.append(
            {
                "case": ", ".join(map(str, case)), "kernel": f"{name}: {compiled.product.name}",
                "registers": compiled.registers, "shared_bytes": compiled.shared,
                "warps": f"{compiled.programs} x {tile.warps}", "spills": compiled.spills, "loop": dict(loop),
                "least_bytes": moved, "flops": flops, "seconds": seconds,
                "outside": outside, "bound_tflops": flops / taken / 1e12, "bound_by": longest,
            }
        )  # fmt: skip
    return found


def _operand_bytes(tile: Tile, double: bool) -> int:
    """Bytes of shared memory that a step's wgmma read: 64 rows of A each, and B again for every warp group."""
    groups = max(1, min(tile.warps // 4, tile.block_m // 64))
    return 2 * tile.block_k * (tile.block_m + tile.block_n * (2 if double else 1) * groups)


def _loop(code: list[tuple[int, str]]) -> Counter[str]:
    """Count the instructions of the innermost loop that has wgmma."""
    loops = []
    for address, text in code:
        jump = _JUMP.search(text)
        if jump and int(jump[1], 16) < address:
            loops.append((int(jump[1], 16), address))
    for first, last in sorted(loops, key=lambda ends: ends[1] - ends[0]):
        body = [text for address, text in code if first <= address <= last]
        if any("HGMMA" in text for text in body):
            return Counter(
                "wgmma" if "HGMMA" in text else "copies" if _COPIES.search(text) else "other"
                for text in body
                if not text.startswith("NOP")
            )
    raise RuntimeError("the compiler left no loop with wgmma")
