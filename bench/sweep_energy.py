"""Seconds and joules of a sweep's trainings, measured after it: each cell's runs are trained again, all in turn.

A cell is an architecture on a data set. Its seeds train as one stack, as they did in the sweep, again and again:
first whole by the clock, in interleaved rounds; then, where a meter is, in windows of equal duration (see
`moesaic.metrics.compare_energy`), where a call does as many steps as are short for a window. Joules and seconds of a
run are those of its stack over the number of its models; the set-up of a training is in its seconds, not its joules.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from moesaic.bench import environment
from moesaic.bench.energy_windows import QUICK, SHORT, steps_per_call
from moesaic.bench.interleave import clock, equal_threads, interleave
from moesaic.bench.plan import InputError, PlannedRun, Preset, Row, is_large
from moesaic.bench.store import ENERGY_FILE, RunStore, jsonable, replace_file

if TYPE_CHECKING:
    from moesaic.moe import Run

ROUNDS, QUICK_ROUNDS, LEAST_S = 5, 3, 0.05
MOST_CELLS = 200


@dataclass(frozen=True)
class Stack:
    """The finished seeds of a cell."""

    dataset: str
    architecture: str
    rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        """Architecture and data set."""
        return f"{self.architecture} on {self.dataset}"

    @property
    def steps(self) -> int:
        """Of each training."""
        return int(str(self.rows[0]["steps"]))


def check_cells(preset: Preset, quick: bool, seeds: int | None) -> None:
    """Refuses a sweep that cannot be measured, before any work.

    Raises:
        InputError: a run of many features, or more than 200 cells, which would take hours.
    """
    first = preset.stages(quick, seeds)[0]([])
    count = len({(item.run.toy, item.run.features) for item in first})
    large: PlannedRun | None = next((item for item in first if is_large(item.run)), None)
    if large is not None:
        raise InputError(
            f"--energy: {preset.name} trains n_features = {large.run.toy.n_features} on sparse batches, one run at a "
            "time; takes a sweep of stacked models"
        )
    if count > MOST_CELLS:
        raise InputError(
            f"--energy: {preset.name} has {count} architectures on their data; takes at most {MOST_CELLS}, as each is "
            "trained again many times"
        )


def stacks(rows: Sequence[Row]) -> list[Stack]:
    """The cells of a sweep's finished runs, tuning runs left out."""
    from moesaic.bench.analysis import cells

    return [Stack(cell.dataset, cell.architecture, cell.rows) for cell in cells(rows)]


def measure_sweep(
    store: RunStore, *, device: str, impl: str, quick: bool, say: Callable[[str], None], meter: Any = "auto",
    alone: Callable[[Callable[[], Row]], Row] = lambda measure: measure(),
) -> None:  # fmt: skip
    """Measure every cell and write ``energy.json`` into the run folder, unless it holds these cells already.

    The columns ``gpu_board_j`` or ``cpu_package_j`` of the rows follow from it: null without a meter, and where trials
    spread by 2 % or more. Nothing is written before all cells are measured, because they are measured in turn.
    ``alone`` calls what measures where nothing else runs, in another process if need be.
    """
    from moesaic.metrics.energy import find_meter

    found = stacks(store.rows())
    if not found:
        return
    held = store.energy()
    source = find_meter(meter, device=device) if isinstance(meter, str) else meter
    # What a meter refused, or nobody could read then, is tried again where there is a meter now.
    settled = held is not None and (held["reason"] is None or isinstance(source, str))
    if held is not None and settled and _covers(held, found, (device, impl, quick)):
        return
    record = alone(partial(_measure, found, device=device, impl=impl, quick=quick, say=say, meter=meter))
    text = json.dumps(jsonable(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    replace_file(store.folder / ENERGY_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def _measure(
    found: Sequence[Stack], *, device: str, impl: str, quick: bool, say: Callable[[str], None], meter: Any
) -> Row:
    """What ``energy.json`` holds."""
    from moesaic.metrics.energy import find_meter

    works = {one.name: _training(one, device, impl) for one in found}
    steps: dict[str, int] = {}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    say(f"measuring the time of {len(found)} trainings, in turn")
    with equal_threads() as threads:
        timings = interleave(
            {name: clock(partial(_repeat, work), device) for name, work in works.items()},
            rounds=QUICK_ROUNDS if quick else ROUNDS, least_s=LEAST_S,
        )  # fmt: skip
        source = find_meter(meter, device=device) if isinstance(meter, str) else meter
        results: Mapping[str, Any] = {}
        reason = None
        if isinstance(source, str):
            reason = source
            say(f"joules not measured, so null: {reason}")
        else:
            say(f"measuring joules with the meter of {source.scope}")
            try:
                from moesaic.metrics.energy import compare_energy
                from moesaic.moe.trainer import training_part

                windows = QUICK if quick else SHORT
                steps = {one.name: steps_per_call(one.steps, timings[one.name].high, windows) for one in found}
                parts = {
                    one.name: training_part(_runs(one), steps[one.name], device=device, impl=impl) for one in found
                }
                results = compare_energy(parts, meter=source, **windows)
            except (RuntimeError, ValueError) as error:
                reason = str(error)
                say(f"joules not measured, so null: {reason}")
    cells = [_cell(one, timings[one.name], results.get(one.name), steps.get(one.name)) for one in found]
    return {
        "device": device, "impl": impl, "quick": quick, "threads": threads, "load_average": load,
        "measured": environment.now(), "meter": None if isinstance(source, str) else source.scope, "reason": reason,
        "cells": cells,
    }  # fmt: skip


def _runs(stack: Stack) -> list[Run]:
    from moesaic.moe.config import Run

    names = list(Run().flat())
    return [Run.from_flat({name: row[name] for name in names}) for row in stack.rows]


def _training(stack: Stack, device: str, impl: str) -> Callable[[], object]:
    """Trains the whole stack once."""
    from moesaic.moe import train_runs

    return partial(train_runs, _runs(stack), device=device, impl=impl)


def _repeat(work: Callable[[], object], count: int) -> None:
    for _ in range(count):
        work()


def _cell(stack: Stack, timing: Any, result: Any, steps: int | None) -> Row:
    models, times = len(stack.rows), stack.steps / (steps or stack.steps)
    energy = None if result is None else dataclasses.asdict(result)
    joules = [] if result is None else [times * one / models for one in result.trial_joules]
    return {
        "dataset": stack.dataset, "architecture": stack.architecture, "models": models,
        "run_keys": [row["run_key"] for row in stack.rows], "steps": stack.steps,
        "steps_per_metered_call": steps,
        "seconds_per_run": [one / models for one in timing.seconds], "joules_per_run": joules,
        "valid": bool(result is not None and result.valid), "energy_of_the_stack": energy,
    }  # fmt: skip


def _covers(held: Mapping[str, Any], found: Sequence[Stack], how: tuple[str, str, bool]) -> bool:
    keys = {tuple(cell["run_keys"]) for cell in held["cells"]}
    same = tuple(held.get(name) for name in ("device", "impl", "quick")) == how
    return same and keys == {tuple(row["run_key"] for row in one.rows) for one in found}
