"""Runs a preset into a run folder: stage by stage, group by group, resumable at any point.

Every group of the plan is trained in one call and its rows are appended in one write. On ``--resume`` a group with a
missing run is trained again whole and only the missing rows are added; the bits of a run do not depend on its group.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moesaic._version import __version__
from moesaic.bench import environment
from moesaic.bench.engines import Engine, EngineChoice, Work, run_groups, start_engine
from moesaic.bench.lock import RunLock
from moesaic.bench.models import MODEL, kept_of, mark_kept
from moesaic.bench.plan import (
    InputError,
    PlannedRun,
    Preset,
    Row,
    check_memory,
    is_large,
    plan_digest,
    training_groups,
    unique,
)
from moesaic.bench.progress import Progress
from moesaic.bench.rates import with_timings
from moesaic.bench.spec import SweepSpec
from moesaic.bench.spec_toml import spec_text
from moesaic.bench.store import SPEC_FILE, RunStore, StoreError
from moesaic.bench.sweep_energy import check_cells, measure_sweep

if TYPE_CHECKING:
    import duckdb

    from moesaic.moe import Run, TrainResult

MAX_MODELS = 64
"""Most models that a preset without a number of its own trains as one stack."""


class Trainer(Protocol):
    """Trains and measures one group; gives a row per planned run, in order, with at least its ``run_key``.

    ``progress`` wants the steps done since its last call and the mean loss, as `moesaic.moe.train_runs` gives them.
    """

    def __call__(
        self, group: Sequence[PlannedRun], *, device: str, impl: str, progress: Callable[[int, float], None]
    ) -> list[Row]:
        """Trains ``group`` on ``device`` with ``impl``."""
        ...


Columns = Callable[["TrainResult", Sequence["Run"]], list[Row]]
"""Extra columns of the rows of a trained stack: a dict per run, in the order of the stack."""


@dataclass(frozen=True, kw_only=True)
class StackPreset(Preset):
    """A preset whose rows carry more than `moesaic.bench.measure` gives, from stacks of a size of its own.

    Args:
        columns: (trained stack, its runs) → extra columns of each run's row.
        max_models: most models trained as one stack.
    """

    columns: Columns
    max_models: int


@dataclass(frozen=True, kw_only=True)
class TrainerPreset(Preset):
    """A preset that trains and measures by itself.

    Args:
        trainer: run folder → what trains and measures a group.
        appended: (run folder, rows) called when the rows of a group are safe on disk.
        max_models: most models of a group.
    """

    trainer: Callable[[Path], Trainer]
    appended: Callable[[Path, Sequence[Row]], None]
    max_models: int


@dataclass(frozen=True)
class SweepResult:
    """The rows of a run folder in plan order, and whether Ctrl-C ended the sweep before all of them existed."""

    rows: list[Row]
    out: Path
    interrupted: bool = False

    def table(self) -> duckdb.DuckDBPyRelation:
        """The rows as a DuckDB relation named ``runs``, with the types that they have in ``runs.parquet``.

        ``.filter("status = 'ok'").aggregate("n_experts, avg(loss)")`` asks it, ``.fetchnumpy()`` gives a dict of
        columns, ``.fetchall()`` tuples, and ``.df()``, ``.pl()`` and ``.arrow()`` what pandas, Polars and PyArrow make
        of it where they are installed. It is a copy: it stays as it is when the folder changes.
        """
        from moesaic.bench.query import table_of

        return table_of(self.rows)

    @property
    def failed(self) -> list[Row]:
        """Rows of the runs that have no result; ``error`` says why."""
        return [row for row in self.rows if row["status"] == "failed"]


def run_sweep(
    preset: Preset | SweepSpec,
    out: Path | str,
    *,
    quick: bool = False,
    seeds: int | None = None,
    device: str = "auto",
    impl: str = "auto",
    resume: bool = False,
    progress: bool = True,
    max_models: int | None = None,
    trainer: Trainer | None = None,
    energy: bool = False,
    argv: Sequence[str] = (),
    engine: str = "local",
    workers: int | None = None,
    address: str | None = None,
    gpus_per_task: float | None = None,
) -> SweepResult:
    """Trains every run of ``preset`` that ``out`` does not hold yet and writes ``runs.parquet``.

    A group that raises is trained again run by run, so only the runs at fault become ``failed`` rows, and the sweep
    goes on; a failed run counts as done when the sweep is resumed.
    Ctrl-C ends it in order: what is finished stays and ``resume=True`` continues.

    Args:
        preset: what to run: a preset, or a `SweepSpec`.
        out: the run folder; made if missing.
        quick: the preset's small version.
        seeds: seeds per configuration in place of the preset's own number.
        device: ``auto``, ``cpu`` or ``cuda``.
        impl: ``auto``, ``numba``, ``triton`` or ``torch``: what trains, as in `moesaic.moe.train_runs`.
        resume: continue the sweep that ``out`` holds.
        progress: draw a progress bar on stderr (lines, where that is a file).
        max_models: most models trained as one group; by default the preset's own number, or `MAX_MODELS`.
        trainer: trains and measures a group; by default `train_and_measure`, with the preset's own columns if it has
            such.
        energy: when all are trained, measure seconds and joules of every cell's training, as
            `moesaic.bench.sweep_energy` says.
        argv: the command line, for ``environment.json``.
        engine: ``local`` or ``ray``: where groups are trained; rows are the same.
        workers: as in `moesaic.bench.engines.EngineChoice`, like what follows.
        address: of a running Ray cluster.
        gpus_per_task: share of a GPU that a Ray task asks for.

    Raises:
        InputError: before any training - an argument out of range, a missing package, a folder that cannot be
            written, that another sweep is writing to, that holds rows without ``resume``, or that holds the rows of
            another plan or version; a run that does not fit into memory (in a later stage: before the training of that
            stage).
        StoreError: the disk is full.
        EngineError: processes or tasks cannot take up their work, or a fault of the machine that no other try mends.
    """
    choice = EngineChoice(name=engine, workers=workers, address=address, gpus_per_task=gpus_per_task)
    environment.require("duckdb", "tqdm")
    if seeds is not None and seeds < 1:
        raise InputError(f"seeds = {seeds}: must be an integer >= 1")
    out = Path(out)
    preset = preset.preset() if isinstance(preset, SweepSpec) else preset
    if isinstance(preset, StackPreset):
        trainer, max_models = trainer or trainer_with(preset.columns), max_models or preset.max_models
    elif isinstance(preset, TrainerPreset):
        if choice.name == "ray":
            raise InputError(
                f"--engine ray: {preset.name} keeps checkpoints in the run folder, which the nodes of a cluster do not "
                "have; takes --engine local, with --workers N for several at once"
            )
        trainer, max_models = trainer or preset.trainer(out), max_models or preset.max_models
    trainer, max_models = trainer or train_and_measure, max_models or MAX_MODELS
    with RunLock(out) as lock:
        try:
            lock.acquire()  # before a cluster is started or anything timed for a folder that another sweep has
        except OSError as error:
            raise InputError(f"--out {out}: cannot be written: {error.strerror or error}") from error
        with start_engine(choice, device, trainer) as started:
            return _sweep(
                preset, out, started, lock, Work(trainer, started.device, impl), quick=quick, seeds=seeds,
                resume=resume, progress=progress, max_models=max_models, energy=energy, argv=argv,
            )  # fmt: skip


def _sweep(
    preset: Preset, out: Path, engine: Engine, lock: RunLock, work: Work, *, quick: bool, seeds: int | None,
    resume: bool, progress: bool, max_models: int, energy: bool, argv: Sequence[str],
) -> SweepResult:  # fmt: skip
    device, impl, memory = work.device, work.impl, engine.memory
    check_impl(impl, device)
    say = _say if progress else _silent
    preset, measured = with_timings(preset, out, quick, seeds, device, impl, max_models, say)
    if energy:
        check_cells(preset, quick, seeds)
        if engine.why_not_alone:
            raise InputError(f"--energy: {engine.why_not_alone}")
    stages = preset.stages(quick, seeds)
    first = unique(stages[0]([]))
    check_memory(first, memory)
    request = {
        "moesaic": __version__, "preset": preset.name,
        "spec": preset.spec, "quick": quick, "seeds": seeds, "device": device, "impl": impl, **measured,
    }  # fmt: skip
    request["plan_hash"] = _plan_hash(preset, request, first)
    argv = argv or _command(preset, out, quick, seeds, device, impl)
    store = open_store(out, request, resume, {**environment.environment(argv), "engine": engine.facts})
    lock.keep()
    if preset.spec is not None:
        store.write_spec(spec_text(preset.spec))

    planned: list[PlannedRun] = []
    rows: list[Row] = []
    interrupted = False
    appended: Callable[[Sequence[Row]], None] = _nothing
    compiles, compiled = impl != "torch" and device == "cpu" and engine.shares_cache, set[object]()
    if isinstance(preset, TrainerPreset):
        compiles, appended = False, partial(preset.appended, out)
    compiles = compiles and _is_ours(work.trainer)
    with Progress(enabled=progress) as bar:
        try:
            for number, stage in enumerate(stages, 1):
                earlier = len(planned)
                planned = unique([*planned, *stage(list(rows))])
                check_memory(planned[earlier:], memory)
                bar.stage(f"stage {number}/{len(stages)}" if len(stages) > 1 else preset.name)
                new_runs = planned[earlier:]
                if work.trainer is train_and_measure:
                    new_runs = mark_kept(new_runs)
                groups = training_groups(new_runs, max_models=max_models)
                if compiles:
                    held = store.keys()
                    kinds = compiled_alike(item for item in planned[earlier:] if item.run.key not in held)
                    new = [item for kind, item in kinds.items() if kind not in compiled]
                    compiled |= kinds.keys()
                    if new:
                        bar.prepare("compiling (first time only)", partial(compile_cpu_trainer, new))
                run_groups(groups, store, bar, engine, work, appended)
                by_key = {row["run_key"]: row for row in store.rows()}
                rows = [by_key[item.run.key] for item in planned]
        except KeyboardInterrupt:
            interrupted = True
    if energy and not interrupted:
        try:
            measure_sweep(store, device=device, impl=impl, quick=quick, say=say, alone=engine.alone)
            by_key = {row["run_key"]: row for row in store.rows()}
            rows = [by_key[item.run.key] for item in planned]
        except KeyboardInterrupt:
            interrupted = True
    store.finish([item.run.key for item in planned])
    if interrupted:
        rows = store.rows()
    else:
        _write_end(store)
    return SweepResult(rows, out, interrupted)


def _write_end(store: RunStore) -> None:
    try:
        store.write_environment({**(store.environment() or {}), "ended": environment.now()})
    except OSError as error:
        raise StoreError(
            f"{store.environment_path}: {error.strerror or error}; all rows are safe: make room, then --resume"
        ) from error


def train_and_measure(
    group: Sequence[PlannedRun], *, device: str, impl: str, progress: Callable[[int, float], None]
) -> list[Row]:
    """Trains a group with `moesaic.moe.train_runs` and measures it; large runs one by one with `train_large`."""
    if is_large(group[0].run):
        from moesaic.bench.measure_large import train_and_measure_large

        return [train_and_measure_large(item, device=device, progress=progress) for item in group]
    from moesaic.bench.measure import measure
    from moesaic.moe import train_runs

    result = train_runs([item.run for item in group], device=device, impl=impl, progress=progress)
    rows = measure(result, group, device=device)
    for i, (item, row) in enumerate(zip(group, rows, strict=True)):
        if item.keep:
            row[MODEL] = kept_of(result, i, finished=row["status"] == "ok")
    return rows


@dataclass(frozen=True)
class _StackTrainer:
    columns: Columns

    def __call__(
        self, group: Sequence[PlannedRun], *, device: str, impl: str, progress: Callable[[int, float], None]
    ) -> list[Row]:
        from moesaic.bench.measure import measure
        from moesaic.moe import train_runs

        runs = [item.run for item in group]
        result = train_runs(runs, device=device, impl=impl, progress=progress)
        rows, extra = measure(result, group, device=device), self.columns(result, runs)
        return [{**row, **more} for row, more in zip(rows, extra, strict=True)]


def trainer_with(columns: Columns) -> Trainer:
    """`train_and_measure` whose rows also have ``columns`` of the trained stack."""
    return _StackTrainer(columns)


def compiled_alike(planned: Iterable[PlannedRun]) -> dict[object, PlannedRun]:
    """Return a run of each kind that the CPU trainers compile apart; large runs compile in their first step."""
    return {
        (item.run.toy, item.run.features.features, item.run.training.load_balance != 0): item
        for item in planned
        if not is_large(item.run)
    }


def compile_cpu_trainer(planned: Iterable[PlannedRun]) -> None:
    """Trains and measures one step of each run, after which what they need is compiled, or loaded from its cache."""
    for item in planned:
        training = dataclasses.replace(item.run.training, steps=1, batch_size=4)
        tiny = dataclasses.replace(item, run=dataclasses.replace(item.run, training=training))
        with contextlib.suppress(Exception):  # a run that cannot be trained is reported with its group
            train_and_measure([tiny], device="cpu", impl="numba", progress=lambda steps, loss: None)


def _nothing(rows: Sequence[Row]) -> None:
    pass


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _silent(line: str) -> None:
    pass


def _is_ours(trainer: Trainer) -> bool:
    # The trainers of this package, the reproductions' too, are wrapped around `train_runs`; a caller's may be anything.
    return str(getattr(trainer, "__module__", "")).partition(".")[0] == "moesaic"


def check_impl(impl: str, device: str) -> None:
    """Raises `InputError` unless ``impl`` is known and can run here."""
    from moesaic.moe.trainer import IMPLS

    if impl not in IMPLS:
        raise InputError(f"--impl {impl!r}: must be one of {', '.join(IMPLS)}")
    if impl in ("numba", "triton") and (impl == "numba") != (device == "cpu"):
        raise InputError(f"--impl {impl}: runs on {'cpu' if impl == 'numba' else 'cuda'} only, the device is {device}")
    if impl != "torch" and device == "cpu":
        environment.require("numba")


def open_store(out: Path, request: Mapping[str, object], resume: bool, here: Mapping[str, object]) -> RunStore:
    """The run folder, proved writable and with its ``environment.json`` written.

    Raises:
        InputError: the folder cannot be written, it has rows and ``resume`` is false, or it has the rows of another
            plan.
    """
    store = RunStore(out)
    try:
        store.path.open("ab").close()
        store.write_environment(_history(store, request, resume, here))
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error.strerror or error}") from error
    return store


def _history(
    store: RunStore, request: Mapping[str, object], resume: bool, here: Mapping[str, object]
) -> dict[str, object]:
    """What ``environment.json`` says from now on: this start, or this resumption of an earlier start."""
    held, out = len(store.keys()), store.folder
    if not held:
        return {**request, **here, "resumed": []}
    if not resume:
        raise InputError(
            f"--out {out}: holds {held} rows of an earlier sweep; add --resume to continue it, or name another folder"
        )
    before = store.environment()
    if before is None:
        raise InputError(
            f"--out {out}: holds {held} rows but no environment.json to say of which plan; name another folder"
        )
    if before.get("plan_hash") != request["plan_hash"]:
        raise InputError(
            f"--out {out}: holds rows of another plan ({_difference(before, request)}); name another folder"
        )
    resumed = before.get("resumed")
    return {**before, "ended": None, "resumed": [*(resumed if isinstance(resumed, list) else []), here]}


def _command(preset: Preset, out: Path, quick: bool, seeds: int | None, device: str, impl: str) -> list[str]:
    """The command line that says what a call from Python said; nothing for a preset that only Python knows."""
    from moesaic.bench.presets import PRESETS

    if preset.spec is None and PRESETS.get(preset.name) is not preset:
        return []
    what = preset.name if preset.spec is None else str(out / SPEC_FILE)
    options = ["--device", device, "--impl", impl, *(["--seeds", str(seeds)] if seeds is not None else [])]
    return ["sweep", what, "--out", str(out), *options, *(["--quick"] if quick else [])]


def _plan_hash(preset: Preset, request: Mapping[str, object], first: Sequence[PlannedRun]) -> str:
    # Later stages follow from the first stage's rows and the request; a spec has one stage, and may move or be renamed.
    named = ["moesaic", "device", "impl", *([] if preset.spec is not None else ["preset", "quick", "seeds"])]
    text = json.dumps([[request[name] for name in named], plan_digest(unique(first))])
    return hashlib.sha256(text.encode()).hexdigest()


def _difference(before: Mapping[str, object], request: Mapping[str, object]) -> str:
    old, new = (_flatten({k: d.get(k) for k in request if k != "plan_hash"}) for d in (before, request))
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if not keys:
        return "the same request, planned by other code of the same version"
    named = {key: "moesaic version" if key == "moesaic" else key for key in keys}
    return "; ".join(f"{named[key]}: {old.get(key)!r} there, {new.get(key)!r} now" for key in keys)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
