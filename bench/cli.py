"""The command line: one frozen dataclass per subcommand, one `Answer` from each.

Exit codes: 0 done; 1 a reproduction outside its allowance, a sweep in which no run succeeded, or an error that is ours;
2 bad input, before any work; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import tyro

from moesaic.bench.engines import EngineError
from moesaic.bench.plan import InputError, Row
from moesaic.bench.store import StoreError

INTERRUPTED = 130


@dataclass(frozen=True)
class Answer:
    """What a command has to say: exit code, JSON object, and the text for people."""

    code: int
    data: dict[str, object]
    text: str


class Command(Protocol):
    """A parsed subcommand."""

    json: bool

    def run(self, argv: Sequence[str]) -> Answer:
        """Does what was asked; ``argv`` is the command line, for the record."""
        ...


Json = Annotated[bool, tyro.conf.arg(help="Print exactly one JSON object on stdout; progress stays on stderr.")]
Out = Annotated[Path, tyro.conf.arg(metavar="DIR", help="Run folder; made if missing.")]
Device = Annotated[str, tyro.conf.arg(metavar="NAME", help="auto, cpu or cuda.")]
Impl = Annotated[str, tyro.conf.arg(metavar="NAME", help="What trains: auto, numba (CPU), triton (GPU) or torch.")]
Seeds = Annotated[int | None, tyro.conf.arg(help="Seeds 0 … N-1 in place of the default number.", metavar="N")]
Quick = Annotated[bool, tyro.conf.arg(help="A small version: the same code, fewer points.")]
QuickAlready = Annotated[bool, tyro.conf.arg(help="Accepted by every command; here nothing is left out.")]
Resume = Annotated[bool, tyro.conf.arg(help="Continue the runs that the folder holds.")]
"""Options that several subcommands share."""


@dataclass(frozen=True)
class Doctor:
    """What this machine can do: device, backend per op, versions, energy meters."""

    quick: QuickAlready = False
    json: Json = False

    def run(self, argv: Sequence[str]) -> Answer:
        """Looks and tells."""
        from moesaic.bench.doctor import diagnose

        found = diagnose()
        return Answer(0, asdict(found), str(found))


@dataclass(frozen=True)
class Sweep:
    """Train and measure every run of a preset or of a TOML spec into a run folder, and draw its report."""

    preset: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(metavar="PRESET|SPEC.toml", help="Preset: tradeoff, phase, million or middle-path; or a file."),
    ] = ""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help="Run folder; made if missing.")] = None
    init: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help="Write a commented spec to begin with.")] = None
    plan: Annotated[bool, tyro.conf.arg(help="Say what would be trained and what it takes; train nothing.")] = False
    calibrate: Annotated[bool, tyro.conf.arg(help="With --plan: measure the seconds that are not known yet.")] = False
    device: Device = "auto"
    engine: Annotated[str, tyro.conf.arg(metavar="NAME", help="Where runs are computed: local or ray.")] = "local"
    workers: Annotated[
        int | None,
        tyro.conf.arg(metavar="N", help="Processes here: on GPUs one each, else sharing the CPU."),
    ] = None
    address: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT", help="Ray cluster to join, or auto.")] = None
    gpus_per_task: Annotated[
        float | None, tyro.conf.arg(metavar="SHARE", help="Of a GPU for one task of Ray, such as 0.25; 1 by default.")
    ] = None
    seeds: Seeds = None
    resume: Resume = False
    energy: Annotated[bool, tyro.conf.arg(help="Then measure seconds and joules of every training, all in turn.")] = (
        False
    )
    quick: Quick = False
    json: Json = False
    impl: Impl = "auto"

    def run(self, argv: Sequence[str]) -> Answer:
        """Sweeps, then reports; or plans, or writes a spec."""
        if self.init is not None:
            return self._init(self.init)
        if not self.preset:
            raise InputError(
                "sweep: name a preset or a spec, PRESET|SPEC.toml; --init FILE writes a spec to begin with"
            )
        if self.plan:
            return self._plan()
        if self.calibrate:
            raise InputError("--calibrate: belongs to --plan")
        if self.out is None:
            raise InputError("sweep: name the run folder, --out DIR")
        return self._sweep(self.out, argv)

    def _init(self, path: Path) -> Answer:
        from moesaic.bench.spec_example import write_example

        if self.preset or self.out is not None or self.plan:
            raise InputError("--init: writes a file and does nothing else; leave the other arguments out")
        write_example(path)
        following = shlex.join(["moesaic", "sweep", str(path), "--out", str(Path("runs") / path.stem)])
        return Answer(0, {"spec": path, "next": following}, f"{path} is written; next: {following}")

    def _plan(self) -> Answer:
        from moesaic.bench.engines import EngineChoice
        from moesaic.bench.plan_summary import summarize
        from moesaic.bench.presets import find_preset

        engine = EngineChoice(
            name=self.engine, workers=self.workers, address=self.address, gpus_per_task=self.gpus_per_task
        )
        summary = summarize(
            find_preset(self.preset), quick=self.quick, seeds=self.seeds, device=self.device, impl=self.impl,
            calibrate_rates=self.calibrate, say=lambda line: print(line, file=sys.stderr, flush=True), engine=engine,
            out=self.out,
        )  # fmt: skip
        return Answer(0, summary.record(), summary.text())

    def _sweep(self, out: Path, argv: Sequence[str]) -> Answer:
        from moesaic.bench import environment

        environment.require("matplotlib")  # only the report needs it, but nobody wants to hear that after the training
        from moesaic.bench.presets import find_preset
        from moesaic.bench.report import result_table, write_report
        from moesaic.bench.sweep import run_sweep

        result = run_sweep(
            find_preset(self.preset), out, quick=self.quick, seeds=self.seeds, device=self.device, impl=self.impl,
            resume=self.resume, energy=self.energy, argv=argv, engine=self.engine, workers=self.workers,
            address=self.address, gpus_per_task=self.gpus_per_task,
        )  # fmt: skip
        if result.interrupted:
            return _interrupted(result.out, result.rows, argv)
        report = write_report(result.out)
        data = {
            "out": result.out, "runs": len(result.rows), "failed": len(result.failed),
            "failures": _failures(result.failed), "parquet": result.out / "runs.parquet", "report": report,
        }  # fmt: skip
        lines = [result_table(result.rows)]
        if result.failed:
            share = f"{len(result.failed)} of {len(result.rows)} runs"
            lines.append(f"{share} failed; the first: {result.failed[0]['error']}")
        return Answer(int(len(result.failed) == len(result.rows)), data, "\n".join([*lines, str(report)]))


@dataclass(frozen=True)
class Reproduce:
    """Train a published result again and compare; exit code 0 only within its stated allowance."""

    name: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(
            metavar="NAME",
            help="closed-form, features-per-dimension, specialization, phase, geometry or absolute-value.",
        ),
    ]
    out: Out
    device: Device = "auto"
    seeds: Seeds = None
    resume: Resume = False
    quick: Quick = False
    json: Json = False
    impl: Impl = "auto"

    def run(self, argv: Sequence[str]) -> Answer:
        """Reproduces and compares."""
        from moesaic.bench.plan import closest
        from moesaic.bench.reproduce import REPRODUCTIONS, reproduce

        if self.name not in REPRODUCTIONS:
            near, names = closest(self.name, REPRODUCTIONS), ", ".join(REPRODUCTIONS)
            raise InputError(f"reproduce {self.name!r}: no such reproduction{near}; there are: {names}")
        result = reproduce(
            self.name, self.out, quick=self.quick, seeds=self.seeds, device=self.device, impl=self.impl,
            resume=self.resume, argv=argv,
        )  # fmt: skip
        if result.interrupted:
            return _interrupted(self.out, result.rows, argv)
        data = {
            "name": self.name, "passed": result.passed, "checks": [asdict(check) for check in result.checks],
            "runs": len(result.rows), "figures": result.figures, "out": self.out,
        }  # fmt: skip
        return Answer(int(not result.passed), data, result.table)


@dataclass(frozen=True)
class Bench:
    """Time kernels and whole trainings against peers, in turn in one process."""

    name: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(metavar="NAME", help="ensemble, routing, grouped-matmul, layer, million, energy or roofline."),
    ]
    out: Out
    against: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="PEER …", help="What to measure against; a wrong name gets the list.")
    ] = ()
    device: Device = "auto"
    quick: Quick = False
    json: Json = False

    def run(self, argv: Sequence[str]) -> Answer:
        """Measures, and writes JSON, Markdown and a figure."""
        from moesaic.bench.kernel_bench import run_bench

        result = run_bench(self.name, self.out, against=self.against, device=self.device, quick=self.quick, argv=argv)
        return Answer(int(bool(result.failures)), result.record, result.text)


@dataclass(frozen=True)
class Query:
    """Ask the rows of a run folder in SQL, by DuckDB; nothing is written."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR", help="A folder that sweep wrote.")]
    sql: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(metavar="SQL", help="From the table runs, and energy where a sweep was measured."),
    ]
    csv: Annotated[bool, tyro.conf.arg(help="Print CSV in place of a table.")] = False
    quick: QuickAlready = False
    json: Json = False

    def run(self, argv: Sequence[str]) -> Answer:
        """Asks."""
        from moesaic.bench import environment

        if self.csv and self.json:
            raise InputError("query: takes --csv or --json, not both")
        environment.require("duckdb")
        from moesaic.bench.query import query

        found = query(self.folder, self.sql)
        data: dict[str, object] = {"columns": found.columns, "types": found.types, "rows": found.records()}
        return Answer(0, data, found.csv() if self.csv else found.text())


@dataclass(frozen=True)
class Report:
    """Draw the figures and report.html of a run folder again, or compare it with another one."""

    folder: Annotated[
        tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR", help="A folder that sweep or reproduce wrote.")
    ]
    against: Annotated[
        Path | None, tyro.conf.arg(metavar="DIR", help="Compare with this folder, seed by seed, and write only that.")
    ] = None
    quick: QuickAlready = False
    json: Json = False

    def run(self, argv: Sequence[str]) -> Answer:
        """Draws."""
        from moesaic.bench import environment
        from moesaic.bench.store import RunStore

        if self.against is not None:
            from moesaic.bench.against import compare_folders, write_against

            found = compare_folders(self.folder, self.against)
            path = write_against(found)
            return Answer(0, {**found.record(), "report": path}, f"{found.text()}\n{path}")
        environment.require("matplotlib")
        rows = RunStore(self.folder).rows()
        if not rows:
            raise InputError(f"report {self.folder}: no runs.jsonl with rows in it")
        from moesaic.bench.report import write_report

        report = write_report(self.folder)
        return Answer(0, {"out": self.folder, "runs": len(rows), "report": report}, str(report))


COMMANDS: dict[str, Any] = {
    "doctor": Doctor,
    "sweep": Sweep,
    "reproduce": Reproduce,
    "bench": Bench,
    "report": Report,
    "query": Query,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line, without the program's name, and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in argv
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages) if as_json else contextlib.nullcontext():
            command: Command = tyro.extras.subcommand_cli_from_dict(
                COMMANDS,
                prog="moesaic",
                description="What sparse expert compute buys, and what it costs.",
                args=argv,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 2
        if as_json and code:
            # tyro draws its messages in boxes, which a JSON string is better without.
            words = messages.getvalue().translate(str.maketrans("╭╮╰╯│─", "      ")).split()
            print(json.dumps({"error": " ".join(words)}, ensure_ascii=False))
        return code
    answer = _run(command, argv)
    if not as_json:
        print(answer.text, file=sys.stderr if "error" in answer.data else sys.stdout)
        return answer.code
    from moesaic.bench.store import jsonable

    print(json.dumps(jsonable(answer.data), ensure_ascii=False))
    return answer.code


def _run(command: Command, argv: Sequence[str]) -> Answer:
    try:
        # With --json nothing but the object may reach stdout, whatever a library prints.
        with contextlib.redirect_stdout(sys.stderr) if command.json else contextlib.nullcontext():
            return command.run(argv)
    except InputError as error:
        return Answer(2, {"error": str(error)}, f"error: {error}")
    except (StoreError, EngineError) as error:
        return Answer(1, {"error": str(error)}, f"error: {error}")
    except KeyboardInterrupt:
        return Answer(INTERRUPTED, {"error": "interrupted"}, "interrupted")
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}"
        return Answer(1, {"error": message}, f"error: {message}")


def _interrupted(out: Path, rows: Sequence[Row], argv: Sequence[str]) -> Answer:
    again = shlex.join(["moesaic", *argv, *([] if "--resume" in argv else ["--resume"])])
    message = f"interrupted; {len(rows)} finished runs are in {out}; continue with: {again}"
    return Answer(INTERRUPTED, {"error": message, "out": out, "runs": len(rows), "resume": again}, message)


def _failures(rows: Sequence[Row]) -> list[Row]:
    return [{"run_key": row["run_key"], "error": row["error"]} for row in rows]
