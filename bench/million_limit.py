"""What bounds a step at n = 1,000,000 features on an H200: the compiler's report for sm_90, and FLOPs and bytes.

    absent feature    copy, decode, backward, outer, update                           6·B·k·m FLOP
    present feature   copy, decode, backward; copy, decode, outer, encoder, update    8·B·k·m FLOP

A kernel takes the longest of: its products at the chip's peak; its bytes at the memory's rate; what kernels hand to
each other at L2's; what tiles of products read at the rate at which processors take it from L2. The roofline is the
longest of the sums over all kernels; one after the other, as they are launched, they take the sum of the longest.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moesaic.bench.kernel_bench import Table
from moesaic.bench.plan import Row

ARCH = 90
FLOPS = {"bf16": 989e12, "tf32x3": 495e12 / 3, "ieee": 67e12}
BYTES_PER_S, CACHE_BYTES_PER_S, OPERAND_BYTES_PER_S = 4.8e12, 5.5e12, 132 * 64 * 1.755e9
"""Of an H200: peaks and bandwidth are its data sheet's; L2's rate is what is reported of an H100. Many processors read
the same operands, at 64 bytes per cycle each."""
N_FEATURES, BATCH, STRIPE, PROBABILITY = 1_000_000, 4096, 4096, 1e-4
RESOURCES = ("products", "memory", "L2", "operands")
HEADER = (
    "model", "products in", "TFLOP", "executed", "memory, GB", "L2, GB", "products, ms", "memory, ms", "L2, ms",
    "operands, ms", "roofline, ms", "bound by", "one after the other, ms",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A tied model of E experts of width m, k of them for each sample."""

    n_experts: int
    n_hidden: int
    top_k: int = 1
    precision: str = "bf16"

    @property
    def name(self) -> str:
        """What the table calls it."""
        if self.n_experts == 1:
            return f"dense, m = {self.n_hidden}"
        return f"E = {self.n_experts}, k = {self.top_k}, m = {self.n_hidden}"

    @property
    def useful_flops(self) -> float:
        """FLOPs of the products, without padding."""
        return N_FEATURES * BATCH * self.top_k * self.n_hidden * (6 + 2 * present())


CASES = (Case(1, 1024), Case(1, 1024, precision="ieee"), Case(8, 128), Case(64, 16), Case(4, 1024))


def present() -> float:
    """Return the share of features that a batch has."""
    return 1 - (1 - PROBABILITY) ** BATCH


@dataclass(frozen=True)
class Cost:
    """Of a kernel over all features: FLOPs executed, bytes of memory, of L2, and of a product's operands."""

    flops: float
    memory: float
    cache: float
    operands: float = 0.0

    def seconds(self, precision: str) -> dict[str, float]:
        """What each resource takes alone."""
        times = (
            self.flops / FLOPS[precision], self.memory / BYTES_PER_S, self.cache / CACHE_BYTES_PER_S,
            self.operands / OPERAND_BYTES_PER_S,
        )  # fmt: skip
        return dict(zip(RESOURCES, times, strict=True))


def costs(case: Case) -> dict[str, Cost]:
    """Count what the kernels of a step compute and move, with balanced routing.

    What a stripe writes and the next kernel reads is taken to stay in L2, the table and moments to come from memory
    each time.
    """
    from moesaic.kernels.feature_state import FeatureShape
    from moesaic.kernels.stripes_products_triton import tiles
    from moesaic.kernels.tiles import Tile

    e, k, m = case.n_experts, case.top_k, case.n_hidden
    shape = FeatureShape(N_FEATURES, m, e, k, routed=e > 1)
    per_expert = BATCH * k / e
    blocks = tiles(case.precision, per_expert, m, STRIPE)
    block, depth = blocks.decode.block_m, blocks.depth
    rows = e * -(-per_expert // block) * block
    number = 2 if case.precision == "bf16" else 4
    n, row, width = N_FEATURES, 4 * shape.stride, number * e * depth
    twice, stripes = 1 + present(), N_FEATURES / STRIPE
    product, g = 2 * n * rows * depth, n * rows * number

    entries = PROBABILITY * n * BATCH * k

    def read(tile: Tile) -> float:
        return product / 2 * number * (1 / tile.block_m + 1 / tile.block_n)

    return {
        "copies": Cost(0, twice * n * row, twice * n * (row + width)),
        "decode": Cost(twice * product, 0, twice * (g + n * width), twice * read(blocks.decode)),
        "backward": Cost(product, 0, g + n * width + stripes * 8 * rows * depth, read(blocks.backward)),
        "outer": Cost(product, 0, g + n * row, read(blocks.outer)),
        "biases": Cost(0, 0, g),
        "entries": Cost(0, 0, 2 * entries * 2 * number * depth),
        "encoder": Cost(0, 0, entries * 4 * m + present() * n * 3 * row),
        "update": Cost(0, 6 * n * row, 7 * n * row),
    }  # fmt: skip


def step_limits() -> tuple[Table, list[Row]]:
    """Say what bounds a step of each of `CASES`."""
    rows: list[Row] = []
    for case in CASES:
        found = costs(case)
        seconds = {name: cost.seconds(case.precision) for name, cost in found.items()}
        total = {resource: sum(times[resource] for times in seconds.values()) for resource in RESOURCES}
        bound = max(total, key=lambda resource: total[resource])
        rows.append(
            {
                "model": case.name, "precision": case.precision, "useful_flops": case.useful_flops,
                "executed_flops": sum(cost.flops for cost in found.values()),
                "memory_bytes": sum(cost.memory for cost in found.values()),
                "cache_bytes": sum(cost.cache for cost in found.values()), "seconds": total, "by_kernel": seconds,
                "roofline_s": total[bound], "bound_by": bound,
                "in_turn_s": sum(max(times.values()) for times in seconds.values()),
            }
        )  # fmt: skip
    notes = (
        f"n = {N_FEATURES:,}, B = {BATCH}, p = {PROBABILITY:g}: {100 * present():.0f} % of the features are in a batch "
        f"and are decoded twice. Peaks: {FLOPS['bf16'] / 1e12:.0f} TFLOP/s in bf16, {FLOPS['ieee'] / 1e12:.0f} in "
        f"float32, {BYTES_PER_S / 1e12:g} TB/s of memory, {CACHE_BYTES_PER_S / 1e12:g} TB/s of L2.",
        "executed: FLOPs with the padding of rows and hidden units. Memory: table and moments in float32, read and "
        "written once, and the table again for every copy of a stripe. L2: those, and once for every kernel copies, G, "
        "dh and a stripe's gradients, which are taken to stay there. Operands: what every tile of a product reads, at "
        f"{OPERAND_BYTES_PER_S / 1e12:.1f} TB/s. Epilogues, latencies and launches are not in it.",
    )
    title = "A step with a million features on an H200: counted, not measured"
    return Table(title, HEADER, [_line(row) for row in rows], notes), rows


def _line(row: Mapping[str, Any]) -> tuple[str, ...]:
    seconds = row["seconds"]
    return (
        row["model"], row["precision"], f"{row['useful_flops'] / 1e12:.1f}", f"{row['executed_flops'] / 1e12:.1f}",
        f"{row['memory_bytes'] / 1e9:.0f}", f"{row['cache_bytes'] / 1e9:.0f}",
        *(f"{1e3 * seconds[resource]:.1f}" for resource in RESOURCES), f"{1e3 * row['roofline_s']:.1f}",
        row["bound_by"], f"{1e3 * row['in_turn_s']:.1f}",
    )  # fmt: skip


def compiled_kernels() -> tuple[Table, list[Row]]:
    """Compile every kernel of the dense step for sm_90, m = 1024, and say what came out."""
    title = f"Kernels of a step with a million features on sm_{ARCH}: from the compiler's report, not a measurement"
    lines: list[tuple[str, ...]] = []
    rows: list[Row] = []
    header: tuple[str, ...] = ()
    try:
        from moesaic.kernels.stripes_compile import HEADER as header
        from moesaic.kernels.stripes_compile import PARTS, PRODUCTS, compile_kernel

        for precision in ("bf16", "ieee"):
            for name in (*PRODUCTS, *PARTS) if precision == "bf16" else PRODUCTS:
                one = compile_kernel(name, ARCH, precision)
                first, *rest = one.line()
                lines.append((f"{first}, {precision}" if name in PRODUCTS else first, *rest))
                rows.append(
                    {
                        "kernel": name, "precision": precision, "registers": one.registers, "shared_bytes": one.shared,
                        "spills": one.spills, "matrix": one.matrix, "programs": one.programs, "warps": one.tile.warps,
                        "instructions": sum(not text.startswith("NOP") for _, text in one.code),
                    }
                )  # fmt: skip
    except (ImportError, OSError, subprocess.CalledProcessError, RuntimeError) as error:
        return Table(title, notes=(f"not available: {error}",)), []
    return Table(title, header, lines), rows
