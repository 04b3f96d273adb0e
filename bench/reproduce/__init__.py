"""Published results, trained again and put next to the published numbers: ``moesaic reproduce NAME --out DIR``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from moesaic.bench import environment
from moesaic.bench.plan import InputError, PlannedRun, Preset, Row
from moesaic.bench.reproduce import (
    absolute_value,
    closed_form,
    features_per_dimension,
    geometry,
    phase,
    specialization,
)
from moesaic.bench.reproduce.result import Check, Reproduction, format_table, load_targets
from moesaic.bench.store import jsonable, replace_file
from moesaic.bench.sweep import run_sweep, trainer_with

REPRODUCTIONS: dict[str, Reproduction] = {
    module.REPRODUCTION.name: module.REPRODUCTION
    for module in (closed_form, features_per_dimension, specialization, phase, geometry, absolute_value)
}


@dataclass(frozen=True)
class ReproductionResult:
    """Outcome of `reproduce`.

    Args:
        name: the reproduction.
        rows: every trained model of every seed, failed ones included, in plan order.
        passed: every judged check is within its allowance, no run failed and none is missing.
        figures: PNG and SVG files.
        table: ours | published | difference | allowed, as plain text.
        checks: the lines of the table.
        interrupted: Ctrl-C ended it early; the folder can be resumed.
    """

    name: str
    rows: list[Row]
    passed: bool
    figures: list[Path]
    table: str
    checks: list[Check]
    interrupted: bool = False


def reproduce(
    name: str,
    out: Path,
    *,
    quick: bool = False,
    seeds: int | None = None,
    device: str = "auto",
    impl: str = "auto",
    resume: bool = True,
    progress: bool = True,
    argv: Sequence[str] = (),
) -> ReproductionResult:
    """Train the models of a published result, compare, and write rows, figures and ``reproduction.json`` to ``out``.

    Trainings that ``out`` holds already are not repeated. The published numbers and allowances come from
    ``targets.json`` in this package; `quick` uses the same code with fewer points, fewer seeds and its own allowances.

    Args:
        name: a key of `REPRODUCTIONS`.
        out: the run folder; made if missing.
        quick: the small version.
        seeds: trainings of each configuration from different seeds, in place of the reproduction's own number.
        device: ``auto``, ``cpu`` or ``cuda``.
        impl: ``auto``, ``numba``, ``triton`` or ``torch``: what trains, as in `moesaic.moe.train_runs`.
        resume: continue what ``out`` holds; if false, a folder with rows is refused.
        progress: draw a progress bar on stderr.
        argv: the command line, for ``environment.json``.

    Raises:
        InputError: before any training - an unknown name, seeds < 1, a missing package, a folder that cannot be used.
    """
    if name not in REPRODUCTIONS:
        raise InputError(f"reproduce {name!r}: takes one of {', '.join(REPRODUCTIONS)}")
    environment.require("matplotlib")
    reproduction = REPRODUCTIONS[name]
    standard = reproduction.quick_seeds if quick else reproduction.seeds
    count = standard if seeds is None else seeds
    if count < 1:
        raise InputError(f"seeds={seeds!r}: takes an integer >= 1")
    if reproduction.trainer and impl not in ("auto", "torch"):
        raise InputError(f"--impl {impl}: {name} takes auto or torch")
    labels = {"task": name} if reproduction.trainer else {}
    planned = [PlannedRun(run, labels) for run in reproduction.plan(quick, count)]
    preset = Preset(f"reproduce {name}", reproduction.description, lambda quick, seeds: [lambda earlier: planned])
    swept = run_sweep(
        preset, out, quick=quick, seeds=count, device=device, impl=impl, resume=resume, progress=progress,
        max_models=reproduction.max_models, trainer=reproduction.trainer or trainer_with(reproduction.columns),
        argv=argv,
    )  # fmt: skip
    if swept.interrupted:
        return ReproductionResult(name, swept.rows, False, [], "", [], interrupted=True)
    usable = [row for row in swept.rows if row["status"] == "ok"]
    outcome = reproduction.conclude(usable, load_targets()[name], quick, Path(out) / "figures")
    passed = not swept.failed and all(check.passed is not False for check in outcome.checks)
    notes = list(outcome.notes)
    if swept.failed:
        first = swept.failed[0]["error"]
        notes.append(f"{len(swept.failed)} of {len(swept.rows)} trainings failed; the first: {first}")
    table = "\n".join([format_table(outcome.checks), *notes])
    record = {
        "name": name, "quick": quick, "seeds": count, "passed": passed, "notes": notes,
        "checks": [asdict(check) | {"difference": check.difference} for check in outcome.checks],
        "figures": [path.relative_to(out).as_posix() for path in outcome.figures],
    }  # fmt: skip
    text = json.dumps(jsonable(record), indent=2, ensure_ascii=False) + "\n"
    replace_file(Path(out) / "reproduction.json", lambda path: path.write_text(text, encoding="utf-8"))
    return ReproductionResult(name, swept.rows, passed, outcome.figures, table, outcome.checks)
