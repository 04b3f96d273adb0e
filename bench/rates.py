"""Measured seconds of a training step, for plans: of the stacks a sweep would train, and of matched widths.

A step's seconds are timed as a sweep spends them: a whole stack trains for as many steps as take `LEAST_S`, all sides
in turn, and the median of the rounds counts. Compilation, initial values and measuring finished models are not in it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from moesaic.bench import environment
from moesaic.bench.interleave import interleave
from moesaic.bench.plan import InputError, PlannedRun, Preset, Row, is_large
from moesaic.bench.spec import SpecPreset
from moesaic.bench.spec_match import architecture, dense_run, family
from moesaic.bench.store import RunStore, replace_file

if TYPE_CHECKING:
    from moesaic.moe.config import Run

ROUNDS, LEAST_S = 3, 0.05
WIDTHS = 6
"""Dense widths that are timed at first, from 1 to twice the widest mixture's, evenly in the logarithm."""
MOST_DOUBLINGS = 6
"""How often the widest may double where mixtures are slower than it."""
CALIBRATE_S = 60.0
"""Seconds after which a calibration begins no further stack."""

Key = TypeVar("Key", bound=Hashable)
StepSeconds = Callable[[Mapping[Any, Sequence["Run"]], str, str], dict[Any, float]]
"""(stacks by name, device, impl) → seconds of a step of each whole stack."""


def step_seconds(stacks: Mapping[Key, Sequence[Run]], device: str, impl: str) -> dict[Key, float]:
    """Seconds of a training step of each stack, timed in turn; a large run is a stack of its own."""

    def contender(runs: Sequence[Run]) -> Callable[[int], float]:
        return lambda steps: _train(runs, steps, device, impl)

    timings = interleave({name: contender(runs) for name, runs in stacks.items()}, rounds=ROUNDS, least_s=LEAST_S)
    return {name: timing.median for name, timing in timings.items()}


def _train(runs: Sequence[Run], steps: int, device: str, impl: str) -> float:
    """Seconds that so many steps take."""
    from moesaic.moe import train_large, train_runs

    short = [dataclasses.replace(run, training=dataclasses.replace(run.training, steps=steps)) for run in runs]
    if is_large(short[0]):
        return train_large(short[0], device=device).wall_s
    return train_runs(short, device=device, impl=impl).wall_s


def calibrate_wall(
    mixtures: Sequence[Run], *, device: str, impl: str, max_models: int, say: Callable[[str], None],
    measure: StepSeconds = step_seconds,
) -> dict[str, object]:  # fmt: skip
    """Time every architecture among ``mixtures`` and dense widths around it, for `moesaic.bench.spec_match.wall_width`.

    Both sides train as stacks of one size, that of the sweep's groups.

    Returns:
        What goes into ``environment.json``: ``seconds_per_step`` by family, of ``moe`` by architecture and of ``dense``
        by width, per model; and where, when and at which load they were measured.

    Raises:
        InputError: a mixture is slower than a dense model 64 times as wide as the widest that should be needed.
    """
    families: dict[str, dict[str, Run]] = {}
    sizes: Counter[str] = Counter()
    for run in mixtures:
        families.setdefault(family(run), {}).setdefault(architecture(run), run)
        sizes[family(run) + architecture(run)] += 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    seconds: dict[str, object] = {}
    for number, (name, members) in enumerate(families.items(), 1):
        say(f"match: timing {len(members)} mixtures and dense widths ({number} of {len(families)})")
        most = max(sizes[name + one] for one in members)
        count = 1 if any(map(is_large, members.values())) else min(max_models, most)
        moe, dense = _time_family(members, count, device, impl, measure)
        seconds[name] = {"models": count, "moe": moe, "dense": dense}
    return {
        "device": device, "impl": impl, "measured": environment.now(), "load_average": load,
        "seconds_per_step": seconds,
    }  # fmt: skip


def _time_family(
    members: Mapping[str, Run], count: int, device: str, impl: str, measure: StepSeconds
) -> tuple[dict[str, float], dict[str, float]]:
    def stack(run: Run) -> list[Run]:
        return [dataclasses.replace(run, seed=seed) for seed in range(count)]

    first = next(iter(members.values()))
    widest = 2 * max(run.toy.n_experts * run.toy.n_hidden + run.toy.shared_hidden for run in members.values())
    widths = sorted({round(widest ** (i / (WIDTHS - 1))) for i in range(WIDTHS)})
    stacks: dict[tuple[str, str], list[Run]] = {("moe", name): stack(run) for name, run in members.items()}
    stacks |= {("dense", str(width)): stack(dense_run(first, width)) for width in widths}
    found = measure(stacks, device, impl)
    slowest = max(seconds for (side, _), seconds in found.items() if side == "moe")
    for _ in range(MOST_DOUBLINGS):
        if max(seconds for (side, _), seconds in found.items() if side == "dense") >= slowest:
            break
        widths.append(2 * widths[-1])
        found |= measure({("dense", str(widths[-1])): stack(dense_run(first, widths[-1]))}, device, impl)
    else:
        raise InputError(f"match: a mixture's step takes longer than a dense one of width {widths[-1]}; leave wall out")
    moe, dense = (
        {name: seconds / count for (side, name), seconds in found.items() if side == kind} for kind in ("moe", "dense")
    )
    return moe, dense


def covers(calibration: object, mixtures: Sequence[Run], device: str, impl: str) -> bool:
    """Whether stored timings have every one of ``mixtures``, on this device and with what trains now."""
    try:
        held: Any = calibration
        same = (held["device"], held["impl"]) == (device, impl)
        return same and all(architecture(run) in held["seconds_per_step"][family(run)]["moe"] for run in mixtures)
    except (KeyError, TypeError):
        return False


def with_timings(
    preset: Preset, out: Path, quick: bool, seeds: int | None, device: str, impl: str, max_models: int,
    say: Callable[[str], None],
) -> tuple[Preset, Row]:  # fmt: skip
    """The preset with all of its runs known, and what ``environment.json`` keeps of the timings that took, if any.

    A folder's own timings are taken where it has them, so that a resumed sweep plans the same widths.

    Raises:
        InputError: the folder has rows but not these timings.
    """
    if not isinstance(preset, SpecPreset) or preset.calibrated is None:
        return preset, {}
    mixtures = preset.mixtures(quick, seeds)
    if not mixtures:
        return preset, {}
    store = RunStore(out)
    held = (store.environment() or {}).get("calibration")
    if isinstance(held, dict) and covers(held, mixtures, device, impl):
        return preset.calibrated(held), {"calibration": held}
    if store.keys():
        raise InputError(f"--out {out}: holds rows, but no timings for this spec's match 'wall': name another")
    timings = calibrate_wall(mixtures, device=device, impl=impl, max_models=max_models, say=say)
    return preset.calibrated(timings), {"calibration": timings}


@dataclass(frozen=True)
class Rate:
    """Measured seconds of a step of a whole stack, and when that was."""

    seconds: float
    when: str


def stack_class(group: Sequence[PlannedRun], impl: str) -> str:
    """What has to be equal for one stack's seconds per step to stand for another's, as a key of JSON."""
    run = group[0].run
    toy = run.toy
    shape = (toy.n_features, toy.n_hidden, toy.n_experts, toy.top_k, toy.shared_hidden, toy.tied)
    # Of many features those that are present make the work; of few all are drawn and multiplied.
    data = (run.features, run.training.decode, run.training.n_negatives) if is_large(run) else ()
    varied = {(item.run.toy.gate, item.run.features.features, item.run.training.load_balance != 0) for item in group}
    precision = (run.training.precision, run.training.moments)
    return repr((impl, *shape, run.training.batch_size, len(group), *precision, *data, *sorted(varied)))


def rates_file(device: str) -> Path:
    """Where measured rates are kept: by device, number of threads and versions, beside the rooflines."""
    from moesaic.bench.roofline import cache_file, device_name

    versions = environment.versions()
    of = ", ".join(f"{name} {versions[name]}" for name in ("moesaic", "torch", "numba", "triton"))
    path = cache_file(f"{device_name(device)}, {of}")
    return path.parent.with_name("rates") / path.name


def kept_rates(device: str) -> dict[str, Rate]:
    """The rates of earlier calibrations, by `stack_class`; none where the file is missing or no such file."""
    try:
        held = json.loads(rates_file(device).read_text(encoding="utf-8"))
        rates = {name: Rate(float(seconds), str(when)) for name, (seconds, when) in held.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    return {name: rate for name, rate in rates.items() if math.isfinite(rate.seconds) and rate.seconds > 0}


def calibrate(
    groups: Mapping[str, Sequence[PlannedRun]], *, device: str, impl: str, say: Callable[[str], None],
    measure: StepSeconds = step_seconds,
) -> dict[str, Rate]:  # fmt: skip
    """Measure the stacks, by class and in their order, until `CALIBRATE_S` seconds have passed, and keep the rates.

    What a busy CPU gives is not kept, as with rooflines.
    """
    from moesaic.bench.roofline import IDLE

    busy = device == "cpu" and hasattr(os, "getloadavg") and os.getloadavg()[0] > IDLE * environment.usable_cores()
    found: dict[str, Rate] = {}
    start = time.perf_counter()
    for number, (name, group) in enumerate(groups.items(), 1):
        if time.perf_counter() - start > CALIBRATE_S:
            say(f"plan: {CALIBRATE_S:.0f} s are over, {len(groups) - number + 1} kinds of stacks are not measured")
            break
        say(f"plan: timing stack {number} of {len(groups)}")
        seconds = measure({name: [item.run for item in group]}, device, impl)[name]
        found[name] = Rate(seconds, environment.now())
    if busy:
        say("plan: the machine was busy, so these times may be too long; they are not kept")
        return found
    _keep(device, kept_rates(device) | found, say)
    return found


def _keep(device: str, rates: Mapping[str, Rate], say: Callable[[str], None]) -> None:
    path = rates_file(device)
    record: Row = {name: [rate.seconds, rate.when] for name, rate in rates.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, indent=1, allow_nan=False) + "\n"
        replace_file(path, lambda target: target.write_text(text, encoding="utf-8"))
    except OSError as error:
        say(f"plan: not kept, {path} cannot be written: {error.strerror or error}")
