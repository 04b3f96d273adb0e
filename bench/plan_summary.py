"""What ``moesaic sweep --plan`` says: runs, stacks, FLOPs, memory, measured time and what does not fit, untrained.

Counts and bytes follow from the plan alone. Seconds are steps times a measured rate of that very kind of stack, or they
are not known: nothing is scaled from one kind to another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from moesaic.bench import environment
from moesaic.bench.engines import EngineChoice
from moesaic.bench.plan import PlannedRun, Preset, is_large, needed_bytes, training_groups, unique
from moesaic.bench.rates import Rate, StepSeconds, calibrate, kept_rates, stack_class, step_seconds
from moesaic.bench.store import RunStore
from moesaic.bench.sweep import MAX_MODELS, StackPreset, TrainerPreset, check_impl
from moesaic.bench.words import si, si_unit

MOST_LINES = 20
"""Most kinds of stacks in the printed table: those with the most FLOPs. JSON has all."""
MOST_TOO_LARGE = 5


@dataclass(frozen=True)
class StackKind:
    """Stacks of one kind: equal shapes, batch and number of models.

    Args:
        architecture: in words.
        stacks: how many there are.
        models: in each of them.
        steps: of all of these stacks together.
        flops: useful ones of their training, all models and samples.
        memory_bytes: that one of them needs, about, while it trains.
        seconds: of training them all, at the measured rate; None where it was not measured.
        measured: when that was.
    """

    architecture: str
    stacks: int
    models: int
    steps: int
    flops: int
    memory_bytes: int
    seconds: float | None
    measured: str | None


@dataclass(frozen=True)
class TooLarge:
    """Runs that need more memory than there is."""

    architecture: str
    runs: int
    needed_bytes: int


@dataclass(frozen=True)
class PlanSummary:
    """A plan in numbers.

    Args:
        preset: its name.
        device: what the seconds and the memory are those of.
        runs: in all.
        kinds: the stacks they train as, the most FLOPs first.
        available_bytes: memory of the device, None where unknown.
        too_large: what would not fit.
        later_stages: stages whose runs follow from results; they are counted as if there were none yet.
        not_planned: what is missing in the plan, in words; empty where it is whole.
        workers: processes that share the memory of a CPU, as they share its cores.
        finished: runs that the run folder holds already; the other numbers include them.
        notes: what else to know, a line each.
    """

    preset: str
    device: str
    runs: int
    kinds: Sequence[StackKind]
    available_bytes: int | None
    too_large: Sequence[TooLarge]
    later_stages: int
    not_planned: str
    workers: int = 1
    finished: int = 0
    notes: Sequence[str] = ()

    @property
    def flops(self) -> int:
        """Useful FLOPs of all trainings."""
        return sum(kind.flops for kind in self.kinds)

    @property
    def seconds(self) -> float | None:
        """Seconds of all trainings, None while a kind is not measured."""
        known = [kind.seconds for kind in self.kinds]
        return None if None in known else math.fsum(s for s in known if s is not None)

    def record(self) -> dict[str, object]:
        """The plan as one JSON object; ``seconds`` is null unless every stack's rate was measured."""
        measured = [kind for kind in self.kinds if kind.seconds is not None]
        return {
            "preset": self.preset, "device": self.device, "runs": self.runs,
            "stacks": sum(kind.stacks for kind in self.kinds), "flops": self.flops,
            "largest_stack_bytes": max((kind.memory_bytes for kind in self.kinds), default=0),
            "available_bytes": self.available_bytes, "seconds": self.seconds,
            "measured_seconds": math.fsum(kind.seconds or 0.0 for kind in measured),
            "kinds_not_measured": len(self.kinds) - len(measured),
            "too_large": [asdict(one) for one in self.too_large], "later_stages": self.later_stages,
            "not_planned": self.not_planned or None, "workers": self.workers, "finished": self.finished,
            "notes": list(self.notes), "kinds": [asdict(kind) for kind in self.kinds],
        }  # fmt: skip

    def text(self) -> str:
        """The same for people."""
        stacks = sum(kind.stacks for kind in self.kinds)
        largest = max((kind.memory_bytes for kind in self.kinds), default=0)
        lines = _table(self.kinds[:MOST_LINES])
        if len(self.kinds) > MOST_LINES:
            lines.append(f"{len(self.kinds) - MOST_LINES} more kinds of stacks: --json has them")
        each = f" for each of {self.workers} workers" if self.workers > 1 else ""
        has = "" if self.available_bytes is None else f" of {_gib(self.available_bytes)}{each}"
        lines += [
            f"{self.runs} runs in {stacks} stacks, {si_unit(self.flops, 'FLOP')} of useful products",
            f"memory: at most {_gib(largest)} for a stack{has}",
            f"time on {self.device}: {self._time()}",
        ]
        if self.later_stages:
            lines.append(f"{self.later_stages} later stages follow from results: counted as far as can be known now")
        if self.not_planned:
            lines.append(self.not_planned)
        if self.finished:
            lines.append(f"{self.finished} of the runs are in the folder already; --resume trains the others")
        lines += self.notes
        count = sum(one.runs for one in self.too_large)
        if count:
            lines.append(f"{count} runs do not fit into memory, so the sweep would be refused:")
            lines += [
                f"  {one.architecture}: {one.runs} runs, each needs about {_gib(one.needed_bytes)}"
                for one in self.too_large[:MOST_TOO_LARGE]
            ]
            if len(self.too_large) > MOST_TOO_LARGE:
                lines.append(f"  and {len(self.too_large) - MOST_TOO_LARGE} more architectures")
        return "\n".join(lines)

    def _time(self) -> str:
        missing = [kind for kind in self.kinds if kind.seconds is None]
        if len(missing) == len(self.kinds):
            return "not measured; --calibrate measures it, with a few steps of every kind of stack"
        known = math.fsum(kind.seconds or 0.0 for kind in self.kinds)
        latest = max(kind.measured or "" for kind in self.kinds)[:16].replace("T", " ")
        words = f"{_duration(known)} of training, at rates measured until {latest} UTC"
        if missing:
            share = sum(kind.flops for kind in missing) / max(1, self.flops)
            return f"{words}, and {len(missing)} kinds of stacks ({100 * share:.0f} % of the FLOPs) not measured"
        return f"{words}; compiling and measuring the models come on top"


def summarize(
    preset: Preset, *, quick: bool = False, seeds: int | None = None, device: str = "auto", impl: str = "auto",
    calibrate_rates: bool = False, say: Callable[[str], None] = lambda line: None,
    measure: StepSeconds = step_seconds, engine: EngineChoice | None = None, out: Path | None = None,
) -> PlanSummary:  # fmt: skip
    """What a sweep of ``preset`` would train and what that takes; trains nothing but what ``calibrate_rates`` asks for.

    Args:
        preset: the sweep.
        quick: its small version.
        seeds: seeds in place of its own number.
        device: ``auto``, ``cpu`` or ``cuda``.
        impl: what would train.
        calibrate_rates: measure a few steps of each kind of stack whose rate is not kept, for a minute at most.
        say: takes a line about how far that is.
        measure: what times a step of each stack.
        engine: how it would be trained: the workers of a local pool share the CPU's memory. Of a Ray cluster nothing is
            known here, and a note says so.
        out: the run folder, of which finished runs are counted; nothing is written.

    Raises:
        InputError: a device or an implementation that is not here, or a plan that cannot be made.
    """
    engine = engine or EngineChoice()
    device = environment.resolve_device(device)
    check_impl(impl, device)
    stages = preset.stages(quick, seeds)
    largest = preset.max_models if isinstance(preset, StackPreset | TrainerPreset) else MAX_MODELS
    planned: list[PlannedRun] = []
    by_class: dict[str, list[list[PlannedRun]]] = {}
    for stage in stages:
        earlier = len(planned)
        planned = unique([*planned, *stage([])])
        for group in training_groups(planned[earlier:], max_models=largest):
            by_class.setdefault(stack_class(group, impl), []).append(group)
    order = sorted(by_class, key=lambda name: -sum(map(_flops, by_class[name])))
    available = environment.device_memory_bytes(device)
    workers = engine.workers or 1
    if available is not None and device == "cpu":
        available //= workers
    rates = kept_rates(device)
    if calibrate_rates:
        fitting = (n for n in order if available is None or needed_bytes(by_class[n][0][0].run) <= available)
        missing = {name: by_class[name][0] for name in fitting if name not in rates}
        rates = rates | calibrate(missing, device=device, impl=impl, say=say, measure=measure)
    wall = bool(getattr(preset, "mixtures", lambda quick, seeds: [])(quick, seeds))
    return PlanSummary(
        preset.name, device, len(planned), [_kind(by_class[name], rates.get(name)) for name in order], available,
        _too_large(planned, available), len(stages) - 1,
        "the dense runs of match 'wall' are not counted: their widths are measured when the sweep begins" * wall,
        workers, _finished(planned, out), _notes(engine),
    )  # fmt: skip


def _finished(planned: Sequence[PlannedRun], out: Path | None) -> int:
    held = RunStore(out).keys() if out is not None else set()
    return sum(item.run.key in held for item in planned) if held else 0


def _notes(engine: EngineChoice) -> list[str]:
    if engine.name == "ray":
        return ["memory and time are those of this machine: a cluster's nodes are asked when the sweep begins"]
    if engine.workers is not None and engine.workers > 1:
        return ["the time is that of one process after the other"]
    return []


def _kind(groups: Sequence[Sequence[PlannedRun]], rate: Rate | None) -> StackKind:
    first = groups[0]
    steps = sum(group[0].run.training.steps for group in groups)
    # The held-out batch is the stack's; what trains is each model's.
    shared = needed_bytes(first[0].run, "held_out")
    memory = shared + len(first) * (needed_bytes(first[0].run) - shared)
    return StackKind(
        _words(first[0]), len(groups), len(first), steps, sum(map(_flops, groups)), memory,
        None if rate is None else rate.seconds * steps, None if rate is None else rate.when,
    )  # fmt: skip


def _flops(group: Sequence[PlannedRun]) -> int:
    training = group[0].run.training
    return sum(_flops_of(item.run.toy) for item in group) * training.batch_size * training.steps


@lru_cache(maxsize=1 << 14)
def _flops_of(toy: object) -> int:
    from moesaic.metrics.flops import count_flops

    return count_flops(toy).training.active.total or 0  # type: ignore[arg-type]


def _too_large(planned: Sequence[PlannedRun], available: int | None) -> list[TooLarge]:
    found: dict[str, list[int]] = {}
    if available is not None:
        for item in planned:
            if (needed := needed_bytes(item.run)) > available:
                found.setdefault(_words(item), []).append(needed)
    return sorted((TooLarge(name, len(n), max(n)) for name, n in found.items()), key=lambda one: -one.needed_bytes)


def _words(item: PlannedRun) -> str:
    toy, training = item.run.toy, item.run.training
    size = f"dense m={toy.n_hidden}" if toy.n_experts == 1 else f"MoE {toy.n_experts}×{toy.n_hidden} k={toy.top_k}"
    shared = f" + shared {toy.shared_hidden}" if toy.shared_hidden else ""
    untied = "" if toy.tied else ", untied"
    decode = f", {training.decode}" if is_large(item.run) else ""
    return f"{size}{shared}, n={toy.n_features}{untied}, batch {training.batch_size}{decode}"


def _table(kinds: Sequence[StackKind]) -> list[str]:
    from moesaic.bench.report import aligned

    head = ["", "stacks", "models", "steps", "FLOPs", "memory of a stack", "training"]
    return aligned(
        [
            head,
            *(
                [
                    kind.architecture, str(kind.stacks), str(kind.models), si(kind.steps), si(kind.flops),
                    _gib(kind.memory_bytes), "not measured" if kind.seconds is None else _duration(kind.seconds),
                ]
                for kind in kinds
            ),
        ]
    )  # fmt: skip


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
