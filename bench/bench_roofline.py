"""``moesaic bench roofline``: what this device can do at most, which every other benchmark is drawn under.

    matrix rate   2·w³ FLOPs of a w×w product over its time, by dtype; float32 is IEEE's, tf32 an entry of its own
    bandwidth     bytes read and written by a copy, over its time
    ridge         matrix rate over bandwidth: FLOPs per byte above which products bind, below which bytes do

All are timed in turn. The roof is the fastest round of each (`roofline` says why), the median and the spread stand next
to it. It is always measured anew and replaces the kept one, unless the machine was busy or the version is quick.
"""

from __future__ import annotations

import statistics
from functools import partial

import torch

from moesaic.bench.kernel_bench import Findings, Options, Table
from moesaic.bench.plan import Row
from moesaic.bench.roofline import COPY, COPY_BYTES, SQUARES, Measurement, measure_roof, roof_of
from moesaic.bench.words import si, si_unit

HEADER = ("dtype", "median [lowest-highest]", "roof: the fastest", "ridge, FLOP/byte")


def run(options: Options) -> Findings:
    """Measure the roof, keep it, and show it."""
    from moesaic.bench.roof_figure import draw_roofs

    found = measure_roof(options.device, options.say, quick=options.quick, one_thread=True)
    counts = [*dict.fromkeys(count for _, count in found.rates)]
    roofs = {_threads(count): roof_of(found.rates, found.roof.device, count) for count in counts}
    lines = table(found, options.device)
    for line in lines.lines:
        options.say(f"bench roofline {line[0]}: {line[1]}")
    return Findings(
        rows(found, options.device),
        [lines],
        partial(draw_roofs, roofs, name="bench-roofline"),
        {"roof": vars(found.roof), "kept": None if found.kept is None else str(found.kept)},
    )


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def rows(found: Measurement, device: str) -> list[Row]:
    """One per dtype and number of threads, and one per number of threads for the copy, as JSON values."""
    return [
        {
            "what": what, "threads": count if device == "cpu" else None, "unit": "B/s" if what == COPY else "FLOP/s",
            "fastest": max(rounds), "median": statistics.median(rounds), "lowest": min(rounds), "rounds": list(rounds),
            "ridge_flops_per_byte": None if what == COPY else max(rounds) / max(found.rates[COPY, count]),
        }
        for (what, count), rounds in found.rates.items()
    ]  # fmt: skip


def table(found: Measurement, device: str) -> Table:
    """The same for people."""
    most = torch.get_num_threads()
    lines = []
    for (what, count), rounds in found.rates.items():
        copied, unit = what == COPY, "B/s" if what == COPY else "FLOP/s"
        lines.append((
            what if count == most else f"{what}, {_threads(count)}",
            f"{si_unit(statistics.median(rounds), unit)} [{si(min(rounds))}-{si(max(rounds))}]",
            si_unit(max(rounds), unit), "" if copied else si(max(rounds) / max(found.rates[COPY, count])),
        ))  # fmt: skip
    kept = "This roof was not kept." if found.kept is None else f"Kept in {found.kept} for the other benchmarks."
    widths = ", ".join(f"{width} in {dtype}" for dtype, width in SQUARES[device].items())
    notes = (
        "Median over the rounds [lowest-highest]; all were timed in turn. The roof is the fastest round: what else the "
        "machine does only slows one down. Other benchmarks hold a 16-bit dtype and tf32 to float32's rate where that "
        "is higher, as whoever likes may convert.",
        f"Products of square matrices as wide as {widths}; the copy, of {COPY_BYTES[device] / 2**20:.0f} MiB, counts "
        "what it reads and what it writes. float32 is IEEE's.",
        kept,
    )
    return Table(f"The roof of {found.roof.device}", HEADER, lines, notes)
