"""``moesaic bench million``: training steps of toy models with up to a million features, against plain PyTorch.

    step       exact and sampled steps of a dense model, in turn with PyTorch's dense step (`million_peers`)
    breakdown  where an exact step's time goes, dense and with E = 16 at equal total width
    curve      an exact step's time against n, with the exponent that fits
    experts    an exact step's time against E at equal total width, next to the ratios of FLOPs and bytes
    sampler    batches of sparse features

Features are independent and equally probable: these are timings of steps, the models are not worth training. FLOPs and
bytes are counted by hand in `million_cases`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from moesaic.bench.interleave import Timing, clock, interleave, ratio, with_threads
from moesaic.bench.kernel_bench import Findings, Options, Table
from moesaic.bench.memory import peak_bytes
from moesaic.bench.million_breakdown import breakdown
from moesaic.bench.million_cases import Model, Sizes, Stepper, draw_batches, sizes_of
from moesaic.bench.million_figure import draw
from moesaic.bench.million_limit import compiled_kernels, step_limits
from moesaic.bench.million_peers import CHUNK, TorchStep, disagreement
from moesaic.bench.plan import InputError, Row
from moesaic.bench.roofline import Roof, RoofPoint
from moesaic.kernels.feature_step import scratch_bytes
from moesaic.moe.large import available_bytes

ROUNDS, LEAST_S = 3, 0.2
DTYPES = {"ieee": "float32", "tf32x3": "float32", "tf32": "tf32", "bf16": "bfloat16"}
"""Of the roof over a step's products, by its precision."""
SAMPLED_TOLERANCE = 0.05
"""Of a sampled loss from the exact one: some ten standard deviations at R = 4096."""
STEP_HEADER = (
    "model, side", "ms", "active GFLOP", "executed", "GFLOP/s", "GB", "of a copy", "of the roof", "peak MiB",
    "bound", "ratio",
)  # fmt: skip
STEP_NOTES = (
    "ms: median of the rounds [fastest-slowest]. FLOPs and GB are counted by hand (million_cases.py), GFLOP/s are "
    "active FLOPs over the time; of a copy: GB over the time, over what a copy moves here. of the roof: least time "
    "that matrix rate and copy bandwidth allow active FLOPs and GB (PyTorch's are the exact step's), over the time.",
    "ratio: time of the line over the exact dense step's, of the medians [lowest-highest within one round].",
    "peak: memory of a step beyond parameters, moments and the batch; PyTorch's with its gradient of all weights, "
    "which stays allocated. bound: scratch_bytes, the bound that an exact step on a CPU promises.",
    "PyTorch is only timed if its loss and some updated weights agree; on a CPU with all threads and with one, and the "
    "faster counts. A sampled step does other work than an exact one "
    f"and is an unbiased estimate of it: its first loss is checked to lie within {SAMPLED_TOLERANCE:.0%}.",
)


@dataclass(frozen=True)
class Step:
    """A side's step: its timing, counts, and peak memory with the bound that holds for it."""

    name: str
    side: str
    timing: Timing
    counts: Mapping[str, int]
    memory: int | None
    bound: int | None
    times: Mapping[str, float]
    point: RoofPoint

    def row(self, sizes: Sizes, roof: Roof) -> Row:
        """As JSON values."""
        seconds = self.timing.median
        return {
            "case": "step", "model": self.name, "side": self.side, "n_features": sizes.n_features,
            "batch_size": sizes.batch, "feature_probability": sizes.probability, **milliseconds(self.timing),
            **self.counts, "gflops": self.counts["active_flops"] / seconds / 1e9 if self.counts else None,
            "of_a_copy": self.counts["bytes"] / seconds / roof.copy_bytes_per_s if self.counts else None,
            "of_the_roof": self.point.of(roof),
            "peak_memory_bytes": self.memory, "memory_bound_bytes": self.bound, "ratio": dict(self.times),
        }  # fmt: skip

    def line(self, roof: Roof) -> tuple[str, ...]:
        """Of the table."""
        counts = ("-",) * 5
        if self.counts:
            active, executed, moved = (self.counts[name] for name in ("active_flops", "executed_flops", "bytes"))
            seconds = self.timing.median
            counts = (
                f"{active / 1e9:.3g}", f"{executed / 1e9:.3g}", f"{active / seconds / 1e9:.3g}", f"{moved / 1e9:.3g}",
                f"{100 * moved / seconds / roof.copy_bytes_per_s:.0f} %",
            )  # fmt: skip
        memory = ["-" if value is None else f"{value / 2**20:.3g}" for value in (self.memory, self.bound)]
        times = f"{self.times['median']:.3g} [{self.times['low']:.3g}-{self.times['high']:.3g}]"
        share = f"{100 * self.point.of(roof):.3g} %"
        return (f"{self.name}, {self.side}", spread_ms(self.timing), *counts, share, *memory, times)


def point_of(stepper: Stepper, side: str, group: str, timing: Timing) -> RoofPoint:
    """A step of ``stepper``'s work, whoever took it, to be drawn under a roof."""
    model = stepper.model
    return RoofPoint(
        f"{model.n_features:,}; {model.n_experts}, {model.n_hidden}", side, group, stepper.active_flops(),
        stepper.least_bytes(), timing.median, DTYPES[stepper.training.precision],
    )  # fmt: skip


def milliseconds(timing: Timing) -> dict[str, float]:
    """Median, fastest and slowest round."""
    return {"ms": 1e3 * timing.median, "ms_lowest": 1e3 * timing.low, "ms_highest": 1e3 * timing.high}


def spread_ms(timing: Timing) -> str:
    """The same for people."""
    return f"{1e3 * timing.median:.3g} [{1e3 * timing.low:.3g}-{1e3 * timing.high:.3g}]"


def counts_of(stepper: Stepper) -> dict[str, int]:
    """What a step computes and moves."""
    return {
        "active_flops": stepper.active_flops(), "executed_flops": stepper.executed_flops(),
        "bytes": stepper.least_bytes(),
    }  # fmt: skip


def steps(sizes: Sizes, options: Options) -> tuple[list[Step], dict[str, str], dict[str, str]]:
    """Time exact, sampled and PyTorch's steps in turn; return them, why sides are missing, and PyTorch's settings."""
    device = options.device
    ours = {
        (sizes.dense, "exact"): Stepper.of(sizes.dense, sizes, device),
        (sizes.dense, "sampled"): Stepper.of(sizes.dense, sizes, device, decode="sampled"),
        (sizes.mixture, "exact"): Stepper.of(sizes.mixture, sizes, device),
        (sizes.mixture, "sampled"): Stepper.of(sizes.mixture, sizes, device, decode="sampled"),
    }
    exact = ours[sizes.dense, "exact"]
    peers = {name: TorchStep(exact, sparse=name == "torch-sparse") for name in options.against}
    not_run: dict[str, str] = {}
    for name in list(peers):
        fresh = exact if name == next(iter(peers)) else Stepper.of(sizes.dense, sizes, device)
        if why := disagreement(fresh, peers[name]):
            not_run[name] = f"disagrees: {why}"
            del peers[name]
    chosen = {name: peer.choose(device) for name, peer in peers.items()}
    work: dict[tuple[str, str], Callable[[int], object]] = {
        (model.name, side): stepper.repeat for (model, side), stepper in ours.items()
    }
    work |= {(sizes.dense.name, name): peer.repeat for name, peer in peers.items()}
    contenders = {
        key: with_threads(clock(value, device), chosen[key[1]][1] if key[1] in chosen else torch.get_num_threads())
        for key, value in work.items()
    }
    timings = interleave(contenders, rounds=ROUNDS, least_s=LEAST_S)
    memory = {key: peak_bytes(partial(value, 1), device) for key, value in work.items()}
    base = timings[sizes.dense.name, "exact"]
    found = []
    for (model, side), stepper in ours.items():
        entries = max(x.values().shape[0] for x in stepper.batches)
        bound = scratch_bytes(model.shape, sizes.batch, entries) if side == "exact" and device == "cpu" else None
        timing = timings[model.name, side]
        found.append(
            Step(
                model.name, side, timing, counts_of(stepper), memory[model.name, side], bound, ratio(timing, base),
                point_of(stepper, side, f"a step at n = {sizes.n_features:,}", timing),
            )
        )  # fmt: skip
    for name, peer in peers.items():
        key = (sizes.dense.name, name)
        peak = None if memory[key] is None else (memory[key] or 0) + peer.held_bytes
        point = replace(found[0].point, side=name, seconds=timings[key].median)
        found.append(Step(*key, timings[key], {}, peak, None, ratio(timings[key], base), point))
    return found, not_run, {name: f"AdamW {kind}, threads {count}" for name, (kind, count) in chosen.items()}


def sampled_gap(sizes: Sizes, device: str) -> float:
    """How far a sampled step's loss lies from the exact one of the same model and batch, as a share of it."""
    model = Model(min(sizes.n_features, 100_000), sizes.n_hidden)
    losses = []
    for decode in ("exact", "sampled"):
        stepper = Stepper.of(model, sizes, device, decode=decode)
        losses.append(float(stepper.first_loss()))
    return abs(losses[1] / losses[0] - 1)


@dataclass(frozen=True)
class Point:
    """An exact step of a model: seconds, and how many times as long the dense model's takes, by round."""

    model: Model
    timing: Timing
    counts: Mapping[str, int]
    speedup: Mapping[str, float]
    point: RoofPoint

    def row(self, case: str, roof: Roof, **more: object) -> Row:
        """As JSON values."""
        model = self.model
        return {
            "case": case, "model": model.name, "n_features": model.n_features, "n_hidden": model.n_hidden,
            "n_experts": model.n_experts, "top_k": 1, "decode": "exact", **milliseconds(self.timing), **self.counts,
            "speedup": dict(self.speedup), "of_the_roof": self.point.of(roof), **more,
        }  # fmt: skip


def pair(models: Sequence[Model], sizes: Sizes, device: str, across: str) -> list[Point]:
    """Time exact steps of models in turn; the first is what others are compared with; ``across``: what is varied."""
    steppers = [Stepper.of(model, sizes, device) for model in models]
    work = {number: clock(stepper.repeat, device) for number, stepper in enumerate(steppers)}
    timings = interleave(work, rounds=ROUNDS, least_s=LEAST_S)
    return [
        Point(
            stepper.model, timings[number], counts_of(stepper), ratio(timings[0], timings[number]),
            point_of(stepper, "exact", f"exact steps against {across}", timings[number]),
        )
        for number, stepper in enumerate(steppers)
    ]  # fmt: skip


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """The a of seconds ∝ nᵃ that fits (n, seconds) best, by least squares on logarithms; NaN for one point."""
    logs = [(math.log(n), math.log(s)) for n, s in points]
    x0, y0 = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    spread = sum((x - x0) ** 2 for x, _ in logs)
    return sum((x - x0) * (y - y0) for x, y in logs) / spread if spread else math.nan


def sampler_rows(sizes: Sizes, device: str) -> list[Row]:
    """Time drawing sparse batches; the small one by PyTorch too, from uniform numbers of all features in chunks."""
    n, p = sizes.n_features, sizes.probability

    def ours(batch: int, count: int) -> None:
        draw_batches(n, batch, p, device, count)

    def theirs(batch: int, count: int) -> None:
        for _ in range(count):
            for first in range(0, n, 8 * CHUNK):
                u = torch.rand(batch, min(8 * CHUNK, n - first), device=device)
                u[(u < p).nonzero(as_tuple=True)].div_(p)

    small, large = 256, sizes.sampler_batch
    work = {("moesaic", small): partial(ours, small), ("torch", small): partial(theirs, small)}
    work |= {("moesaic", large): partial(ours, large)}
    timings = interleave({key: clock(value, device) for key, value in work.items()}, rounds=ROUNDS, least_s=LEAST_S)
    return [
        {
            "case": "sampler", "side": side, "n_features": n, "batch_size": batch, "feature_probability": p,
            **milliseconds(timing), "expected_entries": n * p * batch,
            "ns_per_entry": 1e9 * timing.median / (n * p * batch),
        }
        for (side, batch), timing in timings.items()
    ]  # fmt: skip


def run(options: Options) -> Findings:
    """Measure everything, and say what came out as it comes."""
    sizes, device = sizes_of(options.device, quick=options.quick), options.device
    check_room(sizes, device)
    roof = options.roof
    bandwidth = roof.copy_bytes_per_s
    found, not_run, peers = steps(sizes, options)
    for step in found:
        options.say("bench million, step: {0}: {1} ms, ratio {10}".format(*step.line(roof)))
    rows = [step.row(sizes, roof) for step in found]
    failures = [f"{name} not run: {why}" for name, why in not_run.items()]
    gap = sampled_gap(sizes, device)
    if not gap <= SAMPLED_TOLERANCE:
        failures.append(f"a sampled step's loss is {gap:.1%} from the exact one's")
    where, parts = breakdown(sizes, device, bandwidth, rounds=ROUNDS, least_s=LEAST_S)
    options.say(where.text())
    rows += parts
    pairs = [[Model(n, sizes.n_hidden), Model(n, sizes.n_hidden // sizes.moe, sizes.moe)] for n in sizes.curve]
    curve = [pair(models, sizes, device, "n") for models in pairs]
    fits = {
        curve[0][side].model.name: exponent([(p[side].model.n_features, p[side].timing.median) for p in curve])
        for side in (0, 1)
    }
    options.say("bench million, exponents: " + ", ".join(f"{name}: {value:.3f}" for name, value in fits.items()))
    rows += [point.row("curve", roof, exponent=fits[point.model.name]) for points in curve for point in points]
    experts = []
    for n_experts in sizes.experts:
        moe = Model(sizes.n_features, sizes.n_hidden // n_experts, n_experts)
        points = pair([sizes.dense] if moe == sizes.dense else [sizes.dense, moe], sizes, device, "E")
        experts.append((points[0], points[-1]))
        options.say(f"bench million, E = {n_experts}: dense / MoE = {experts[-1][1].speedup['median']:.3g}")
    rows += [moe.row("experts", roof, **ratios(dense, moe)) for dense, moe in experts]
    samplers = sampler_rows(sizes, device)
    limits, roofline = step_limits()
    kernels, compiled = compiled_kernels()
    tables = [
        Table(
            f"A training step at n = {sizes.n_features:,}, B = {sizes.batch}, p = {sizes.probability:g}; a copy moves "
            f"{bandwidth / 1e9:.3g} GB/s here", STEP_HEADER, [step.line(roof) for step in found],
            (*STEP_NOTES, *(f"{name}: {how}, the faster here." for name, how in peers.items()), *failures),
        ),
        where, curve_table(curve, fits), experts_table(experts), sampler_table(samplers),
        limits, kernels,
    ]  # fmt: skip
    extra = {
        "exponents": fits,
        "peers": peers,
        "roofline": roofline,
        "compiler": compiled,
        "sampled_gap": gap,
    }
    drawn = [
        *(step.point for step in found), *(one.point for points in curve for one in points),
        *(moe.point for _, moe in experts),
    ]  # fmt: skip
    return Findings(rows + samplers, tables, partial(draw, rows, fits), extra, failures, drawn, "n; E, m, with k = 1")


def ratios(dense: Point, moe: Point) -> dict[str, float]:
    """Active FLOPs and bytes of the dense model over the mixture's."""
    return {f"{name}_ratio": dense.counts[name] / moe.counts[name] for name in ("active_flops", "bytes")}


def check_room(sizes: Sizes, device: str) -> None:
    """Raise `InputError` if what is measured at a time, four models and two of PyTorch's, does not fit."""
    n, dense = sizes.n_features, sizes.dense.shape
    needed = 24 * n * (dense.stride + sizes.mixture.shape.stride) + 2 * 16 * n * (sizes.n_hidden + 1)
    available = available_bytes(device)
    if available is not None and needed > available:
        raise InputError(
            f"bench million: needs about {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free; take --quick"
        )


def curve_table(curve: Sequence[Sequence[Point]], fits: Mapping[str, float]) -> Table:
    """Cost of a step against n."""
    header = ("n", *(name + ", ms" for name in fits), "dense / MoE")
    lines = [
        (f"{dense.model.n_features:,}", spread_ms(dense.timing), spread_ms(moe.timing), f"{moe.speedup['median']:.3g}")
        for dense, moe in curve
    ]
    said = ", ".join(f"{name}: {value:.3f}" for name, value in fits.items())
    return Table(
        "Time of an exact step against n", header, lines,
        (f"Exponent of n, least squares on logarithms: {said}. p is fixed: entries grow as n does.",),
    )  # fmt: skip


def experts_table(experts: Sequence[tuple[Point, Point]]) -> Table:
    """Speed-up against E."""
    lines = []
    for dense, moe in experts:
        times, found = moe.speedup, ratios(dense, moe)
        lines.append((
            f"{moe.model.n_experts}", moe.model.name, spread_ms(moe.timing),
            f"{times['median']:.3g} [{times['low']:.3g}-{times['high']:.3g}]", f"{found['active_flops_ratio']:.3g}",
            f"{found['bytes_ratio']:.3g}",
        ))  # fmt: skip
    return Table(
        f"Speed-up at equal total width, n = {experts[0][0].model.n_features:,}",
        ("E/k", "model", "ms", "dense / MoE, time", "active FLOPs", "bytes"), lines,
        (
            "All columns of ratios are dense over MoE. Every expert's weights, biases and router columns are read and "
            "updated in every step, so bytes do not fall with E: they rise by 2E numbers per feature.",
        ),
    )  # fmt: skip


def sampler_table(rows: Sequence[Row]) -> Table:
    """Time of drawing a batch."""
    lines = [
        (f"B = {row['batch_size']}, {row['side']}", f"{row['ms']:.4g}", f"{row['expected_entries']:,.0f}",
         f"{row['ns_per_entry']:.3g}")
        for row in rows
    ]  # fmt: skip
    note = (
        f"torch: uniform numbers for every feature in chunks of {8 * CHUNK:,}, compared with p; not the same samples."
    )
    return Table(
        f"Drawing sparse features, n = {rows[0]['n_features']:,}, p = {rows[0]['feature_probability']:g}",
        ("batch, side", "ms", "expected entries", "ns per entry"), lines, (note,),
    )  # fmt: skip
