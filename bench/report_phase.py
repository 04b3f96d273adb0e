"""What a report and the terminal say of a folder of phase diagrams: a line per panel instead of one per run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.bench.plan import Row
from moesaic.bench.report_page import Column, escape, table
from moesaic.bench.reproduce.phase import Statistics
from moesaic.bench.reproduce.phase_maps import box, gather
from moesaic.bench.reproduce.phase_plan import PANELS, panel_name, panel_of
from moesaic.bench.reproduce.result import load_targets, mean

if TYPE_CHECKING:
    from moesaic.bench.figures import Drawn

_HEADINGS = (
    "panel (n,m,E)", "models", "failed", "seeds", "loss", "published", "reconstruction", "load balance", "ignored",
    "published", "superposed", "published", "s in all",
)  # fmt: skip
_NOTE = (
    "Losses are medians over the cells; first that of the final training batch with the load-balance term, best seed "
    "of each cell by that very loss, as published; then the two held-out terms of the best seed by held-out loss. "
    "Ignored, superposed: shares of the cells with ‖W_last‖ below 1/2, or not and a superposition score above 1/4, "
    "mean over experts. The published numbers are of the full grid and ten seeds."
)


def panel_lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """A line of text for every panel that has rows, in the order of `PANELS`; "" where nothing finished."""
    targets, found = load_targets()["phase"], gather(rows)
    seconds: dict[Any, list[float]] = {panel: [] for panel in PANELS}
    failed = dict.fromkeys(PANELS, 0)
    for row in rows:
        if (panel := panel_of(row)) in seconds:
            wall = row.get("wall_s")
            seconds[panel].append(float(wall) if isinstance(wall, int | float) else 0.0)
            failed[panel] += row.get("status") != "ok"
    lines = []
    for panel in PANELS:
        if not seconds[panel]:
            continue
        counts = (panel_name(panel), str(len(seconds[panel])), str(failed[panel]))
        total = f"{math.fsum(seconds[panel]):.1f}"
        if panel not in found:
            lines.append((*counts, *[""] * 9, total))
            continue
        seeds, theirs = found[panel], Statistics.of_targets(panel, targets)
        mine, held_out = Statistics.of(seeds.best("last_batch")), seeds.best("held_out")
        published = ["not available"] * 3
        if theirs is not None:
            published = [f"{theirs.box[2]:.4f}", f"{mean(theirs.ignored):.3f}", f"{mean(theirs.superposed):.3f}"]
        lines.append(
            (
                *counts, str(seeds.count), f"{mine.box[2]:.4f}", published[0], f"{box(held_out.held_out)[2]:.4f}",
                f"{box(held_out.load_balance)[2]:.4f}", f"{mean(mine.ignored):.3f}", published[1],
                f"{mean(mine.superposed):.3f}", published[2], total,
            )
        )  # fmt: skip
    return lines


def panels_section(rows: Sequence[Row]) -> str:
    """The table of panels, and what its columns mean."""
    columns = [Column(_HEADINGS[0], "text"), *map(Column, _HEADINGS[1:])]
    return f"<h2>Panels</h2><p>{escape(_NOTE)}</p>{table(columns, panel_lines(rows))}"


def panels_table(rows: Sequence[Row]) -> str:
    """The same as plain text."""
    lines = [_HEADINGS, *panel_lines(rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
    return "\n".join([*text, _NOTE])


def panel_figures(rows: Sequence[Row], folder: Path) -> list[Drawn]:
    """The figures of the rows that finished; none where none did."""
    from moesaic.bench.reproduce.phase_figures import draw

    found = gather(rows)
    return draw(found, load_targets()["phase"], folder) if found else []
