"""What the compiler's report for sm_90 says of the routing kernel: registers, bytes and instructions per row."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass

import torch

from moesaic.bench.kernel_bench import Table
from moesaic.bench.plan import Row
from moesaic.kernels.routing_options import checked_options

ARCH, WARPS, WARP = 90, 4, 32
MULTIPROCESSORS, ISSUE_SLOTS, CLOCK_HZ, BYTES_PER_S = 132, 4, 1.98e9, 4.8e12
"""An H200: at its boost clock a scheduler issues a warp instruction per cycle; the bandwidth is its data sheet's."""
TOKENS = 32768
HEADER = (
    "E, k", "logits", "registers", "spills", "bytes per row", "of the least", "instructions", "floor, us", "copy, us",
)  # fmt: skip
_JUMP = re.compile(r"\bBRA\b.*\b0x([0-9a-f]+)$")
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


@dataclass(frozen=True)
class RoutingLimit:
    """One compiled kernel; bytes and warp instructions are those of a row, bounds of time those of 32,768 rows."""

    n_experts: int
    top_k: int
    dtype: str
    registers: int
    spills: int
    bytes_per_row: float
    least_bytes: int
    instructions: float

    @property
    def issue_s(self) -> float:
        """Seconds below which no routing of 32,768 rows can be, if every issue slot is used in every cycle."""
        return TOKENS * self.instructions / (MULTIPROCESSORS * ISSUE_SLOTS * CLOCK_HZ)

    @property
    def memory_s(self) -> float:
        """Seconds that the least bytes of 32,768 rows take at the memory's full rate."""
        return TOKENS * self.least_bytes / BYTES_PER_S

    def line(self) -> tuple[str, ...]:
        """For the table."""
        return (
            f"{self.n_experts}, {self.top_k}", self.dtype, str(self.registers), str(self.spills),
            f"{self.bytes_per_row:.0f}", f"{self.bytes_per_row / self.least_bytes:.2f}", f"{self.instructions:.0f}",
            f"{1e6 * self.issue_s:.1f}", f"{1e6 * self.memory_s:.1f}",
        )  # fmt: skip


def routing_limits() -> tuple[Table, list[Row]]:
    """Compile the kernel for the benchmark's sizes that fit into a tile, and say what came out."""
    title = f"Triton kernel on sm_{ARCH}: from the compiler's report, not a measurement"
    notes = (
        "bytes per row: global loads and stores in the code times the threads that take part, over the rows of a "
        "program; of the least: over logits read once, weights (4 bytes) and ids (8 bytes) written once.",
        f"instructions: that warps issue per row. floor: of {TOKENS} rows on an H200 ({MULTIPROCESSORS} processors "
        f"x {ISSUE_SLOTS} issue slots, {CLOCK_HZ / 1e9:g} GHz). copy: the least bytes at {BYTES_PER_S / 1e12:g} TB/s.",
    )
    try:
        found = [
            _limit(n_experts, top_k, dtype)
            for n_experts, top_k in ((8, 2), (64, 8), (128, 8), (256, 8), (1024, 64))
            for dtype in (torch.bfloat16, torch.float32)
        ]
    except (ImportError, OSError, subprocess.CalledProcessError, RuntimeError) as error:
        return Table(title, notes=(f"not available: {error}",)), []
    rows: list[Row] = [vars(one) | {"issue_s": one.issue_s, "memory_s": one.memory_s} for one in found]
    return Table(title, HEADER, [one.line() for one in found], notes), rows


def _limit(n_experts: int, top_k: int, dtype: torch.dtype) -> RoutingLimit:
    from moesaic.kernels import routing_triton
    from moesaic.kernels.ahead_of_time import compile_ahead, disassemble

    options = checked_options(n_experts, top_k, renormalize=True)
    logits = torch.empty(1, n_experts, dtype=dtype)
    values = routing_triton.constants(logits, options, biased=False)
    name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    signature = dict.fromkeys(("Logits", "Router", "Bias"), f"*{name}")
    signature |= {"Weights": "*fp32", "Ids": "*i64", "Lse": "*fp32", "Counts": "*i32", "Probs": "*fp32"}
    signature |= dict.fromkeys(("n_rows", "per_program", "first_row", "seed_low", "seed_high"), "i32")
    signature |= {"scale": "fp32"} | dict.fromkeys(values, "constexpr")
    usage, code = disassemble(compile_ahead(routing_triton._route_kernel, signature, values, WARPS, ARCH))
    rows = values["BLOCK_T"]
    moved = 0
    for _, text in code:
        if text.split()[0].startswith("@"):
            text = text.split(None, 1)[1]
        if text.startswith(("LDG", "STG")):
            moved += WARP * WARPS * next((size for key, size in _BYTES.items() if f".{key}" in text.split()[0]), 4)
    return RoutingLimit(
        n_experts, top_k, name, usage["REG"],
        usage["STACK"] + sum(bool(re.search(r"\b(LDL|STL)\b", text)) for _, text in code),
        moved / rows, n_experts * dtype.itemsize + 12 * top_k, WARPS * _issued(code, top_k) / rows,
    )  # fmt: skip


def _issued(code: list[tuple[int, str]], top_k: int) -> int:
    """Return the instructions of one tile: the loop over the k best, where it is not unrolled, counts k times."""
    loops = []
    for address, text in code:
        jump = _JUMP.search(text)
        if jump and int(jump[1], 16) < address:
            loops.append((int(jump[1], 16), address))
    total = sum(not text.startswith("NOP") for _, text in code)
    loops.sort(key=lambda ends: ends[1] - ends[0])
    if len(loops) > 1:  # the longest is the loop over tiles
        first, last = loops[0]
        total += (top_k - 1) * sum(first <= address <= last for address, _ in code)
    return total
