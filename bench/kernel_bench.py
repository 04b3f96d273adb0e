"""What every ``moesaic bench NAME`` shares: the registry, the command's checks, tables, and the files it writes."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.bench import environment
from moesaic.bench.interleave import equal_threads
from moesaic.bench.plan import InputError, Row, closest
from moesaic.bench.store import jsonable, replace_file

if TYPE_CHECKING:
    from moesaic.bench.roofline import Roof, RoofPoint

BUSY = 0.25
"""Load average per core above which a report warns that others were at work."""


@dataclass(frozen=True)
class Options:
    """What a benchmark is asked for; ``device`` is ``cpu`` or ``cuda``, ``say`` takes a line about how far it is."""

    against: tuple[str, ...]
    device: str
    quick: bool
    say: Callable[[str], None]

    @cached_property
    def roof(self) -> Roof:
        """The device's, measured where none is kept: take it before anything else, whose load it would feel."""
        from moesaic.bench import roofline

        return roofline.measured_roof(self.device, self.say)


@dataclass(frozen=True)
class Table:
    """A table for people, as plain text or Markdown; ``notes`` stand below it."""

    title: str
    header: Sequence[str] = ()
    lines: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()

    def text(self) -> str:
        """The columns aligned: the first to the left, the others to the right."""
        cells = [self.header, *self.lines] if self.header else []
        widths = [max(len(line[column]) for line in cells) for column in range(len(self.header))]
        rows = [
            "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
            for line in cells
        ]
        return "\n".join([self.title, *(row.rstrip() for row in rows), *self.notes])

    def markdown(self) -> str:
        """A pipe table under a heading."""
        parts = [f"## {self.title}"]
        if self.header:
            rule = [":--", *["--:"] * (len(self.header) - 1)]
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in (self.header, rule, *self.lines)))
        return "\n\n".join([*parts, *self.notes])


@dataclass(frozen=True)
class Findings:
    """What a benchmark found.

    Args:
        rows: one per case, as JSON values.
        tables: the same for people.
        draw: writes the figure into a folder and returns its files.
        extra: further entries of the JSON object, by name.
        failures: why the benchmark failed; empty where it did not.
        points: timings to be drawn under the device's roof; no such figure without.
        points_key: what the points' labels say, such as ``T, E, k``.
    """

    rows: list[Row]
    tables: list[Table]
    draw: Callable[[Path], list[Path]]
    extra: Mapping[str, object] = field(default_factory=dict)
    failures: Sequence[str] = ()
    points: Sequence[RoofPoint] = ()
    points_key: str = "case"


@dataclass(frozen=True)
class Benchmark:
    """One name of ``moesaic bench``.

    Args:
        description: one sentence.
        peers: what it can be measured against, with a few words on each.
        against: the peers taken when none is asked for.
        run: measures.
    """

    description: str
    peers: Mapping[str, str]
    against: tuple[str, ...]
    run: Callable[[Options], Findings]


def _ensemble(options: Options) -> Findings:
    from moesaic.bench.bench_ensemble import run

    return run(options)


def _routing(options: Options) -> Findings:
    from moesaic.bench.bench_routing import run

    return run(options)


def _grouped_matmul(options: Options) -> Findings:
    from moesaic.bench.bench_grouped_matmul import run

    return run(options)


def _layer(options: Options) -> Findings:
    from moesaic.bench.bench_layer import run

    return run(options)


def _million(options: Options) -> Findings:
    from moesaic.bench.bench_million import run

    return run(options)


def _energy(options: Options) -> Findings:
    from moesaic.bench.bench_energy import run

    return run(options)


def _roofline(options: Options) -> Findings:
    from moesaic.bench.bench_roofline import run

    return run(options)


BENCHES: dict[str, Benchmark] = {
    "ensemble": Benchmark(
        "whole trainings of many small toy models, ours against PyTorch",
        {
            "vmap": "torch.func.vmap over one model's step, every expert computed densely",
            "torch-stacked": "this library's own trainer on stacked PyTorch tensors",
        },
        ("vmap",),
        _ensemble,
    ),
    "routing": Benchmark(
        "top-k routing and grouping by expert, ours against PyTorch",
        {"torch": "softmax, topk, renormalise, stable sort, bincount and cumsum"},
        ("torch",),
        _routing,
    ),
    "grouped-matmul": Benchmark(
        "the grouped matrix product of an expert layer's up-projection, ours against PyTorch",
        {
            "torch-grouped-mm": "gather, then torch.nn.functional.grouped_mm",
            "torch-loop": "a product per expert that has tokens",
        },
        ("torch-grouped-mm", "torch-loop"),
        _grouped_matmul,
    ),
    "layer": Benchmark(
        "mixture-of-experts layers, router included, forward and backward, ours against PyTorch and libraries",
        {
            "torch-grouped-mm": "gather, torch.nn.functional.grouped_mm, SiLU, grouped_mm, weighted sum",
            "torch-loop": "a loop over the experts that have tokens",
            "torch-bmm": "every choice's weights gathered, then batched products: few tokens, tiny experts",
            "transformers-eager": "transformers' Mixtral layer, eager",
            "transformers-batched-mm": "transformers' Mixtral layer, batched_mm",
            "transformers-grouped-mm": "transformers' Mixtral layer, grouped_mm",
            "liger": "Liger-Kernel's fused mixture of experts, on a GPU",
            "scattermoe": "ScatterMoE's linear operations, on a GPU",
        },
        ("torch-grouped-mm", "torch-loop"),
        _layer,
    ),
    "million": Benchmark(
        "training steps of toy models with up to a million features, ours against PyTorch",
        {
            "torch": "a dense step in chunks of 8,192 features: products with dense x, autograd, AdamW",
            "torch-sparse": "the same, but encoding multiplies a sparse x",
        },
        ("torch", "torch-sparse"),
        _million,
    ),
    "energy": Benchmark(
        "FLOPs, bytes, seconds and joules of sparse against dense layers, training steps and trainings to equal loss",
        {"dense": "dense models of equal width, parameters, active FLOPs and loss: always measured"},
        ("dense",),
        _energy,
    ),
    "roofline": Benchmark("what this device can do at most: products by dtype, and a copy", {}, (), _roofline),
}


@dataclass(frozen=True)
class BenchResult:
    """What `run_bench` returns: the JSON object that it wrote, the text for people, and why it failed, if it did."""

    record: dict[str, Any]
    text: str
    failures: Sequence[str]


def run_bench(
    name: str,
    out: Path,
    *,
    against: Sequence[str] = (),
    device: str = "auto",
    quick: bool = False,
    argv: Sequence[str] = (),
) -> BenchResult:
    """Run a benchmark and write ``bench-NAME.json``, ``bench-NAME.md`` and its figures into ``out``.

    Where it has points, ``figures/bench-NAME-roofline`` shows them under the device's roof.

    Args:
        name: a key of `BENCHES`.
        out: the folder; made if missing, files of the same name in it are replaced.
        against: peers; the benchmark's own choice where empty.
        device: ``auto``, ``cpu`` or ``cuda``.
        quick: fewer models and rounds, the same code.
        argv: the command line, for the record.

    Raises:
        InputError: before any work - an unknown name, peer or device, a missing package, a folder that cannot
            be written.
    """
    out = Path(out)
    benchmark, peers = _find(name, against)
    device = environment.resolve_device(device)
    environment.require("matplotlib", *(["numba"] if device == "cpu" else []))
    target = out / f"bench-{name}.json"
    try:
        for folder in (out, out / "figures"):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error.strerror or error}") from error

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    load = _load_average()
    warnings = _busy(load, environment.usable_cores())
    for warning in warnings:
        say(f"bench {name}: {warning}")
    with equal_threads() as threads:
        here = environment.environment(argv)
        asked = Options(peers, device, quick, say)
        found = benchmark.run(asked)
        # The name of a CPU's roof has the number of threads.
        roof = asked.roof if found.points else None
    here["ended"] = environment.now()
    options = {"against": list(peers), "device": device, "quick": quick, "threads": threads, "load_average": load}
    record: dict[str, Any] = {
        "benchmark": name, "description": benchmark.description, "options": options, "environment": here,
        "rows": found.rows, "roof": None if roof is None else asdict(roof), **found.extra,
        "failures": list(found.failures), "warnings": warnings, "figures": [],
    }  # fmt: skip
    _write(record, target)  # first of all: no figure that fails shall cost the results of an hour
    paths = found.draw(out / "figures")
    if roof is not None:
        from moesaic.bench.roof_figure import draw_points

        paths = [*paths, *draw_points(found.points, roof, found.points_key, out / "figures", f"bench-{name}-roofline")]
    record["figures"] = [path.relative_to(out).as_posix() for path in paths]
    _write(record, target)
    page = _page(name, benchmark, record, found)
    replace_file(out / f"bench-{name}.md", lambda path: path.write_text(page, encoding="utf-8"))
    said = [*(f"FAILED: {reason}" for reason in found.failures), *(f"warning: {warning}" for warning in warnings)]
    return BenchResult(
        record, "\n\n".join([*(table.text() for table in found.tables), *said, str(target)]), found.failures
    )


def _write(record: Mapping[str, Any], target: Path) -> None:
    text = json.dumps(jsonable(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    replace_file(target, lambda path: path.write_text(text, encoding="utf-8"))


def _load_average() -> float | None:
    """Processes that ran in the last minute, None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _busy(load: float | None, cores: int) -> list[str]:
    if load is None or load <= BUSY * cores:
        return []
    return [
        f"the machine was busy before the benchmark began (load average {load:.1f}, {cores} cores): do not quote these "
        "figures. What waits for all of its threads, as PyTorch does, then loses most."
    ]


def _find(name: str, against: Sequence[str]) -> tuple[Benchmark, tuple[str, ...]]:
    if name not in BENCHES:
        raise InputError(f"bench {name!r}: no such benchmark{closest(name, BENCHES)}; there are: {', '.join(BENCHES)}")
    benchmark = BENCHES[name]
    for peer in against:
        if not benchmark.peers:
            raise InputError(f"--against {peer!r}: bench {name} has no peers, it measures the device alone")
        if peer not in benchmark.peers:
            known = "; ".join(f"{key} ({words})" for key, words in benchmark.peers.items())
            raise InputError(
                f"--against {peer!r}: no such peer{closest(peer, benchmark.peers)}; bench {name} has {known}"
            )
    return benchmark, tuple(dict.fromkeys(against)) or benchmark.against


def _page(name: str, benchmark: Benchmark, record: Mapping[str, Any], found: Findings) -> str:
    here, options = record["environment"], record["options"]
    machine = [here["cpu"], f"{here['cores']} cores", f"threads: {options['threads']}", f"device {options['device']}"]
    versions = ", ".join(f"{key} {value}" for key, value in here["versions"].items() if value)
    lines = [
        f"# moesaic bench {name}: {benchmark.description}",
        f"{', '.join([*machine, *here['gpus']])}  \n{versions}  \n"
        f"commit {here['git_commit'] or 'not known'}, {here['started']}  \n`{here['command']}`",
        *(["Quick version: fewer models and rounds."] if options["quick"] else []),
        *(f"**Warning**: {warning}" for warning in record["warnings"]),
        *(table.markdown() for table in found.tables),
        *(f"**FAILED**: {reason}" for reason in found.failures),
        *(f"![{Path(path).stem}]({path})" for path in record["figures"] if path.endswith(".png")),
    ]
    return "\n\n".join(lines) + "\n"
