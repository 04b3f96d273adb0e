"""The report of a run folder, and the small table a sweep prints last."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.bench import report_middle_path
from moesaic.bench.analysis import LOSS, Cell, cells, comparisons
from moesaic.bench.plan import InputError, Row
from moesaic.bench.report_energy import energy_figures, energy_section
from moesaic.bench.report_million import is_million, million_figures, million_section, million_table
from moesaic.bench.report_million import words as million_words
from moesaic.bench.report_page import escape, figure, page
from moesaic.bench.report_phase import panel_figures, panels_section, panels_table
from moesaic.bench.report_sections import (
    comparison_section,
    definitions_section,
    environment_section,
    failed_section,
    published_section,
    rates_section,
    results_section,
    slowest_section,
    summary_line,
    words_section,
)
from moesaic.bench.reproduce.phase_plan import is_phase
from moesaic.bench.store import RunStore, StoreError, replace_file
from moesaic.bench.words import interval, plain_words, result_lines, si

if TYPE_CHECKING:
    from moesaic.bench.figures import Drawn

MAX_TABLE_LINES = 30
"""Most architectures in the table that is printed to a terminal."""
MAX_COSTLY = 12
"""Most architectures of a middle path in the figures of measured costs."""
MAX_TABLE_DATASETS = 4
"""Most data sets in it."""


def write_report(run_dir: Path) -> Path:
    """Draw ``figures/`` of a run folder and write its self-contained ``report.html``; return the latter's path.

    Works for every sweep, finished or not. Wants matplotlib. A reproduction keeps the figures that it drew itself; its
    report shows them and the table of ``reproduction.json``.

    Raises:
        InputError: ``runs.jsonl``, ``environment.json`` or ``reproduction.json`` is damaged.
        FileNotFoundError: the folder holds no rows.
        StoreError: the disk is full; an older ``report.html`` stays as it was.
    """
    store = RunStore(run_dir)
    rows = store.rows()
    if not rows:
        raise FileNotFoundError(f"{store.path}: no rows to report on")
    try:
        return _draw(store, rows)
    except OSError as error:
        again = f"make room, then: moesaic report {shlex.quote(str(run_dir))}"
        words = error.strerror or error
        raise StoreError(f"{error.filename or store.folder}: {words}; the rows are safe: {again}") from error


def _draw(store: RunStore, rows: Sequence[Row]) -> Path:
    from moesaic.bench.figures import INSIDE, draw_figures

    environment = store.environment() or {}
    phase = is_phase(rows)
    # Cells of a phase diagram are points of its maps, those of many sizes points of lines against n: neither are
    # architectures to be listed and compared one by one.
    million = is_million(rows)
    found = [] if phase or million else cells(rows)
    compared = comparisons(found)
    middle = report_middle_path.mixtures(found) if report_middle_path.is_middle_path(rows) else []
    preset = str(environment.get("preset") or "")
    reproduces = preset.startswith(_REPRODUCE) and not environment.get("spec")
    record = _reproduction(store.folder) if reproduces else None
    if phase and not record:
        drawn = panel_figures(rows, store.folder / "figures")
    elif reproduces:
        drawn = _own_figures(store.folder, record)
    elif million:
        drawn = million_figures(rows, store.folder / "figures")
    elif middle:
        drawn = report_middle_path.figures(middle, store.folder / "figures")
        drawn += draw_figures(found, store.folder / "figures", INSIDE)
    else:
        drawn = draw_figures(found, store.folder / "figures")
    if found and not reproduces:
        from moesaic.bench.figures_models import model_figures

        drawn += model_figures(found, compared, store.folder, store.folder / "figures")
    measured = store.energy() if found else None
    if measured:
        from moesaic.bench.figure_parts import few_architectures

        # A line per mixture and match would make a figure of two metres; the section below has them all.
        costly = few_architectures(found, MAX_COSTLY) if middle else found
        drawn += energy_figures(costly, measured, store.folder / "figures")
    shown = [f"<h2>{escape(d.title)}</h2>{figure(d.svg, d.caption, d.title)}" for d in drawn]
    first = [part for part, d in zip(shown, drawn, strict=True) if d.name in _FIRST]
    title = f"moesaic {preset}" if reproduces else f"moesaic sweep {preset}".strip()
    parts = [
        f'<h1>{escape(title)}</h1>\n<p class="soft">{escape(summary_line(rows, environment))}</p>',
        published_section(record) if record else _UNFINISHED if reproduces else "",
        words_section(
            million_words(rows)
            if million
            else report_middle_path.words(middle)
            if middle
            else plain_words(found, compared)
        ),
        *first,
        energy_section(found, measured) if measured else "",
        report_middle_path.section(middle) if middle else comparison_section(compared),
        *(part for part in shown if part not in first),
        rates_section(rows),
        panels_section(rows) if phase else million_section(rows) if million else results_section(found),
        failed_section(rows),
        "" if phase or million else slowest_section(rows) + definitions_section(found),
        environment_section(environment),
    ]
    path = store.folder / "report.html"
    text = page(title, [part for part in parts if part])
    replace_file(path, lambda new: new.write_text(text, encoding="utf-8"))
    return path


_FIRST = ("tradeoff", "middle_path", "sweep", "cost", "efficiency_gap")
_REPRODUCE = "reproduce "
_UNFINISHED = "<p>The reproduction did not end, so there is no comparison with the published numbers yet.</p>"


def _reproduction(folder: Path) -> dict[str, Any] | None:
    """What ``reproduction.json`` holds, None where the reproduction has not ended."""
    path = folder / "reproduction.json"
    if not path.exists():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    return record


def _own_figures(folder: Path, record: Mapping[str, Any] | None) -> list[Drawn]:
    """The SVG figures that a reproduction drew, as far as they are still there."""
    from moesaic.bench.figures import Drawn
    from moesaic.bench.reproduce import absolute_value_figures, geometry_figures, phase_figures

    words = phase_figures.WORDS | geometry_figures.WORDS | absolute_value_figures.WORDS

    paths = [folder / name for name in (record["figures"] if record else ()) if name.endswith(".svg")]
    drawn = []
    for path in paths:
        if path.is_file():
            title, caption = words.get(path.stem, (path.stem.replace("-", " ").capitalize(), path.name))
            drawn.append(Drawn(path.stem, title, caption, path.read_text(encoding="utf-8")))
    return drawn


def result_table(rows: Sequence[Row]) -> str:
    """A small plain-text table, an architecture per line: active FLOPs, and unexplained variance on each data set.

    Below it, one line per kind of comparison and what was left out. Of phase diagrams, the panels instead.
    """
    if is_phase(rows):
        return panels_table(rows)
    if is_million(rows):
        return million_table(rows)
    found = cells(rows)
    if report_middle_path.is_middle_path(rows) and (middle := report_middle_path.mixtures(found)):
        return "\n".join([*report_middle_path.lines(middle), report_middle_path.words(middle)])
    failed = sum(r.get("status") != "ok" for r in rows)
    if not found:
        return f"no finished runs, {failed} failed"
    datasets = list(dict.fromkeys(c.dataset for c in found))
    shown = datasets[:MAX_TABLE_DATASETS]
    by_name: dict[str, dict[str, Cell]] = {}
    for cell in found:
        by_name.setdefault(cell.architecture, {})[cell.dataset] = cell
    lines = [["architecture", "active FLOPs", *(_cut(d, 24) for d in shown)]]
    for name, here in list(by_name.items())[:MAX_TABLE_LINES]:
        flops = next((f for c in here.values() if math.isfinite(f := c.mean("active_flops"))), math.nan)
        losses = [interval(here[d].estimate(LOSS)) if d in here else "" for d in shown]
        lines.append([_cut(name, 60), si(flops) if math.isfinite(flops) else "n/a", *losses])
    text = aligned(lines)
    text.append(
        "unexplained variance of held-out data, ± 95 % t-interval over seeds; FLOPs per sample, forward + backward"
    )
    text += result_lines(found, comparisons(found))
    left_out = [
        f"{count} more {what}"
        for count, what in (
            (len(by_name) - MAX_TABLE_LINES, "architectures"),
            (len(datasets) - len(shown), "data sets"),
        )
        if count > 0
    ]
    if left_out:
        text.append(f"{' and '.join(left_out)} in runs.parquet and report.html")
    if failed:
        text.append(f"{failed} failed: report.html says why")
    return "\n".join(text)


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """The first column flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
