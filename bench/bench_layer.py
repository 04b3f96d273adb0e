"""``moesaic bench layer``: `MoE` against PyTorch and libraries on equal inputs, in one process, in turn.

The whole layer, router included; for a million experts `expert_mlp` alone. Forward without gradients; forward and
backward in one go, with the gradients of x and all weights (of the gate weights, where there is no router):
a difference of the two timings would be that of two states of the caches. First every side is judged against float64,
and one whose error is too large gets no speed; where that is ours, nobody does and the benchmark fails.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from typing import Protocol

import torch
from torch import Tensor

from moesaic.bench.environment import device_memory_bytes
from moesaic.bench.interleave import Contender, NotRunError, Timing, clock, fastest, ratio, with_threads
from moesaic.bench.kernel_bench import Findings, Options, Table
from moesaic.bench.layer_cases import TWELVE, Case, Sample, cases, draw_sample
from moesaic.bench.layer_peers import OURS, SIDES, Build, Side
from moesaic.bench.layer_turns import layer_turns
from moesaic.bench.memory import peak_bytes
from moesaic.bench.plan import Row
from moesaic.bench.roofline import Roof, RoofPoint

ROUNDS, LEAST_S = 7, 0.2
QUICK_ROUNDS, QUICK_LEAST_S = 3, 0.05
FLOAT32_ERROR, OURS_BUDGET, PEER_BUDGET = 1e-5, 1.1, 2.0
"""Errors allowed: of all in float32; in other dtypes of ours and of a peer, in those of the naive composition."""
SLOWEST_S = 12.0
FEW_FLOPS = 1e9
"""Below this a peer is timed on a CPU with one thread too: waiting for the others may cost more than they bring."""
HEADER = ("T, d, n, E, k", "pass", "side", "ms", "TFLOP/s", "GB/s", "of the roof", "peak MiB", "ratio")
GIVEN = {False: "forward", True: "forward + backward"}


class Turn(Protocol):
    """One repetition's inputs."""

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What gets a gradient."""

    @property
    def grad(self) -> Tensor:
        """The gradient of the result, when it is timed."""

    @property
    def checked(self) -> Tensor:
        """The same, when it is checked."""

    @property
    def ids(self) -> Tensor:
        """The experts chosen, (T, k)."""

    @property
    def clear(self) -> Tensor | None:
        """Which tokens can be checked, (T,); None: all of them."""

    def picked(self, y: Tensor, grads: Sequence[Tensor], sample: Sample) -> dict[str, Tensor]:
        """The sampled part of results, by name."""

    def reference(self, sample: Sample, dtype: torch.dtype) -> dict[str, Tensor]:
        """The same, computed plainly in ``dtype``."""


@dataclass(frozen=True)
class Subject:
    """What a benchmark of this kind measures.

    Args:
        name: of the benchmark.
        title: of its table.
        sides: ours and the peers.
        turns: draws a case's inputs.
        cost: (case, touched experts, backward) → useful FLOPs, bytes that have to move.
        roundings: (case, name, numbers of that result) → how many of their errors are independent.
    """

    name: str
    title: str
    sides: Mapping[str, Build]
    turns: Callable[[Case, str], Sequence[Turn]]
    cost: Callable[[Case, float, bool], tuple[float, float]]
    roundings: Callable[[Case, str, int], int]


def layer_roundings(case: Case, name: str, count: int) -> int:
    """Independent roundings in ``count`` numbers of a result: as many as hidden numbers, where those are fewer.

    A router's gradient has those of its choices: one for each token of an expert.
    """
    if name == "d weights":
        return count
    if name == "d router":
        return max(1, count // case.d_model * min(case.d_model, case.n_rows // case.n_experts))
    return min(count, count // case.d_model * case.d_ff)


LAYER = Subject(
    "layer", "Mixture-of-experts layers", SIDES, layer_turns,
    lambda case, touched, backward: (case.flops(backward=backward), case.least_bytes(touched, backward=backward)),
    layer_roundings,
)  # fmt: skip
NOTES = (
    "TFLOP/s: useful products, 6·T·k·d·n and the router's 2·T·d·E forward, twice as many more backward. GB/s: weights "
    "of the experts that were chosen and of the router, x and y once per pass that needs them, h written and read, and "
    "all weights' gradients written. For n below 64 read GB/s.",
    "Forward: no gradients. Forward + backward: in one go, gradients of x and all weights; not of decoding. The router "
    "is a linear layer and softmax over the chosen; peers without one get torch's linear, softmax and topk.",
    "Tokens whose k-th and next score lie as close as rounding are drawn anew; what stays so is not checked.",
    '"Experts alone": expert_mlp on given choices, gradients of x, weights and gate weights.',
)
COMMON_NOTES = (
    "ms: median of the rounds [fastest-slowest]. of the roof: least time that the measured matrix rate and copy "
    "bandwidth allow, over the time; a side that mostly reads can pass 100 %, as a copy also writes.",
    f"ratio: time of a peer over {OURS}'s, of the medians [lowest-highest within one round].",
    "peak: memory beyond the inputs, results included; on a CPU an upper bound. Repetitions take turns on inputs of "
    "their own, 128 MiB in all or more. Tokens and weights are random, and so is who is chosen.",
    "On a CPU a peer with less than 1 GFLOP to do is timed with all threads and with one, and the faster counts.",
    f"Errors are RMS over RMS, against float64: at most {FLOAT32_ERROR:g} in float32; in other dtypes at most "
    f"{OURS_BUDGET:g} (a peer: {PEER_BUDGET:g}) times that of the composition rounded after every "
    "step, and for N independent roundings 3/√N more by chance.",
)


@dataclass(frozen=True)
class Measured:
    """One case: what was checked and how, and by pass the timings, threads and peak memory of each side."""

    case: Case
    cost: Mapping[bool, tuple[float, float]]
    timings: Mapping[bool, Mapping[str, Timing]] = field(default_factory=dict)
    threads: Mapping[bool, Mapping[str, int]] = field(default_factory=dict)
    memory: Mapping[bool, Mapping[str, int | None]] = field(default_factory=dict)
    errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)
    checked_on: str = ""
    not_run: Mapping[str, str] = field(default_factory=dict)
    failure: str = ""

    def rows(self, roof: Roof) -> list[Row]:
        """The case as JSON values, one row per pass; without a pass where none was timed."""
        case = self.case
        known: Row = {
            "n_tokens": case.n_tokens, "d_model": case.d_model, "d_ff": case.d_ff, "n_experts": case.n_experts,
            "top_k": case.top_k, "dtype": case.dtype, "group": case.group or None, "checked_on": self.checked_on,
            "errors": {name: dict(errors) for name, errors in self.errors.items()}, "error_limits": dict(self.limits),
            "not_run": dict(self.not_run), "failure": self.failure or None,
        }  # fmt: skip
        if not self.timings:
            return [{**known, "pass": None, "sides": {}}]
        return [
            {
                **known, "pass": GIVEN[backward],
                "flops": self.cost[backward][0], "least_bytes": self.cost[backward][1],
                "sides": {name: self._side(roof, backward, name, timing) for name, timing in timings.items()},
                "ratio": {name: ratio(t, timings[OURS]) for name, t in timings.items() if name != OURS},
            }
            for backward, timings in self.timings.items()
        ]  # fmt: skip

    def rate(self, backward: bool, name: str) -> float:
        """Useful FLOP/s of a side."""
        return self.cost[backward][0] / self.timings[backward][name].median

    def points(self) -> list[RoofPoint]:
        """All timings, to be drawn under a roof."""
        return [self._point(backward, name) for backward, timings in self.timings.items() for name in timings]

    def _point(self, backward: bool, name: str) -> RoofPoint:
        seconds = self.timings[backward][name].median
        return RoofPoint(self.case.name, name, GIVEN[backward], *self.cost[backward], seconds, self.case.dtype)

    def _side(self, roof: Roof, backward: bool, name: str, timing: Timing) -> Row:
        flops, moved = self.cost[backward]
        return {
            "threads": self.threads[backward][name], "ms": 1e3 * timing.median,
            "ms_lowest": 1e3 * timing.low, "ms_highest": 1e3 * timing.high,
            "ms_rounds": [1e3 * seconds for seconds in timing.seconds], "repetitions_per_round": timing.repetitions,
            "flops_per_s": flops / timing.median, "bytes_per_s": moved / timing.median,
            "of_the_roof": self._point(backward, name).of(roof),
            "peak_memory_bytes": self.memory[backward].get(name),
        }  # fmt: skip

    def lines(self, roof: Roof) -> list[tuple[str, ...]]:
        """The case's lines of the table."""
        found: list[tuple[str, ...]] = []
        for backward, timings in self.timings.items():
            flops, moved = self.cost[backward]
            for name, timing in timings.items():
                one = self.threads[backward][name] < self.threads[backward][OURS]
                peak = self.memory[backward].get(name)
                share = self._point(backward, name).of(roof)
                found.append((
                    self.case.name, GIVEN[backward], f"{name}, 1 thread" if one else name,
                    _spread(1e3 * timing.median, 1e3 * timing.low, 1e3 * timing.high),
                    three(flops / timing.median / 1e12), three(moved / timing.median / 1e9),
                    f"{100 * share:.3g} %", "" if peak is None else f"{peak / 2**20:.0f}",
                    "1" if name == OURS else _spread(**ratio(timing, timings[OURS])),
                ))  # fmt: skip
        missing = {OURS: self.failure, **self.not_run} if self.failure else self.not_run
        return found + [(self.case.name, "", name, "not run", *[""] * 5) for name in missing]


def _spread(median: float, low: float, high: float) -> str:
    return f"{three(median)} [{three(low)}-{three(high)}]"


def three(value: float) -> str:
    """Three significant digits, without an exponent in the range of these tables."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def relative_error(found: Tensor, truth: Tensor) -> float:
    """RMS of the difference over RMS of the truth; of a truth that is 0 everywhere, 0 or infinity."""
    size = float(truth.square().mean().sqrt())
    error = float((found.to(truth.dtype) - truth).square().mean().sqrt())
    return error / size if size else (math.inf if error else error)


def results(side: Side, turn: Turn, sample: Sample) -> dict[str, Tensor]:
    """The sampled part of what a side gives, without and with gradients; NaN where all of a result is not finite."""
    with torch.no_grad():
        alone = side(turn)
    y = side(turn)
    grads = torch.autograd.grad(y, turn.leaves, turn.checked)
    found = {"y alone": turn.picked(alone, (), sample)["y"], **turn.picked(y.detach(), grads, sample)}
    finite = all(bool(one.sum(dtype=torch.float32).isfinite()) for one in (alone, y.detach(), *grads))
    return found if finite else {name: torch.full_like(one, math.nan) for name, one in found.items()}


def judge(
    found: Mapping[str, Tensor], truth: Mapping[str, Tensor], limits: Mapping[str, float], budget: float
) -> tuple[dict[str, float], str]:
    """Errors by name, and in words what is wrong with the first that is too large; empty where nothing is."""
    errors = {
        name: relative_error(one, truth[name.split()[0] if name == "y alone" else name]) for name, one in found.items()
    }
    wrong = ""
    for name, error in errors.items():
        limit = max(FLOAT32_ERROR, budget * limits[name])
        # Not `> limit`: NaN has to fail.
        if not error <= limit and not wrong:
            wrong = f"error of {name} {error:.1e}, allowed {limit:.1e}"
    return errors, wrong


def measure(subject: Subject, case: Case, options: Options) -> Measured:
    """Judge, then time one case; a peer that cannot run here, or is wrong, is left out and has a reason instead."""
    device = options.device
    room = device_memory_bytes(device)
    rows = 2 * case.n_rows * (case.d_model + 3 * case.d_ff) * case.torch_dtype.itemsize
    needed = 2 * case.weight_bytes + rows
    if room and needed > 0.8 * room:
        return Measured(case, {}, not_run={OURS: f"takes about {needed / 2**30:.0f} GiB"})
    try:
        inputs = subject.turns(case, device)
        sample = draw_sample(inputs[0].ids, case.n_experts, inputs[0].clear)
        side = subject.sides[OURS](case, device)
        truth = inputs[0].reference(sample, torch.float64)
        naive = truth if case.dtype == "float32" else inputs[0].reference(sample, case.torch_dtype)
        found = results(side, inputs[0], sample)
    except (MemoryError, torch.OutOfMemoryError) as error:
        return Measured(case, {}, not_run={OURS: _words(error)})
    # Whatever ours does wrong fails the benchmark, which goes on to say how the other cases do.
    except Exception as error:
        return Measured(case, {}, failure=_words(error))
    rounding = {name: relative_error(naive[name], truth[name]) for name in truth}
    # Two errors of equal size lie apart by chance; 3 / sqrt(N) are three standard deviations of the ratio of two RMS.
    chance = {name: 3.0 / math.sqrt(subject.roundings(case, name, one.numel())) for name, one in truth.items()}
    rounding = {name: error * (1.0 + chance[name]) for name, error in rounding.items()}
    rounding["y alone"] = rounding["y"]
    del naive
    where = f"{len(sample.tokens)} of {case.n_tokens} tokens, {len(sample.experts)} of {case.n_experts} experts"
    if inputs[0].clear is not None and not inputs[0].clear.all():
        where += f", gradients of {int(inputs[0].clear.sum())} tokens"
    errors: dict[str, Mapping[str, float]] = {}
    errors[OURS], wrong = judge(found, truth, rounding, OURS_BUDGET)
    limits = {name: max(FLOAT32_ERROR, OURS_BUDGET * error) for name, error in rounding.items()}
    if wrong:
        return Measured(case, {}, errors=errors, limits=limits, checked_on=where, failure=wrong)
    sides: dict[str, Side] = {OURS: side}
    not_run: dict[str, str] = {}
    for name in options.against:
        try:
            peer = subject.sides[name](case, device)
            began = time.perf_counter()
            errors[name], wrong = judge(results(peer, inputs[0], sample), truth, rounding, PEER_BUDGET)
            took = time.perf_counter() - began
        # Whatever goes wrong inside of a peer is no reason to lose the others.
        except Exception as error:
            not_run[name] = _words(error)
            continue
        # On a GPU the first call compiles.
        if device == "cpu" and took > SLOWEST_S and not wrong:
            wrong = f"a forward, and a forward and backward pass take {took:.0f} s"
        if wrong:
            not_run[name] = wrong
        else:
            sides[name] = peer
    del found, truth
    touched = sum(turn.ids.unique().numel() for turn in inputs) / len(inputs)
    passes = (False,) if case.group == "decode" else (False, True)
    measured = {backward: _time(sides, inputs, case, options, backward) for backward in passes}
    return Measured(
        case, {backward: subject.cost(case, touched, backward) for backward in passes},
        {backward: one[0] for backward, one in measured.items()},
        {backward: one[1] for backward, one in measured.items()},
        {backward: one[2] for backward, one in measured.items()}, errors, limits, where, not_run,
    )  # fmt: skip


def _words(error: BaseException) -> str:
    """An error in one line."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    kind = "" if isinstance(error, NotRunError) else type(error).__name__
    return ": ".join(part for part in (kind, text[:160]) if part)


def _time(
    sides: Mapping[str, Side], inputs: Sequence[Turn], case: Case, options: Options, backward: bool
) -> tuple[dict[str, Timing], dict[str, int], dict[str, int | None]]:
    """Timings, threads and peak memory of one pass."""
    most = torch.get_num_threads()
    few = options.device == "cpu" and case.flops(backward=False) < FEW_FLOPS
    contenders: dict[tuple[str, int], Contender] = {}
    memory: dict[str, int | None] = {}
    for name, side in sides.items():
        work = _work(side, cycle(inputs), backward)
        memory[name] = peak_bytes(work, options.device)
        contender = clock(partial(_repeat, work), options.device)
        choices = {most, 1} if few and name != OURS else {most}
        contenders |= {(name, count): with_threads(contender, count) for count in sorted(choices, reverse=True)}
    rounds, least_s = (QUICK_ROUNDS, QUICK_LEAST_S) if options.quick else (ROUNDS, LEAST_S)
    timings, threads = fastest(contenders, rounds=rounds, least_s=least_s)
    return timings, threads, memory


def _work(side: Side, inputs: Iterator[Turn], backward: bool) -> Callable[[], object]:
    def forward() -> Tensor:
        with torch.no_grad():
            return side(next(inputs))

    def both() -> tuple[Tensor, ...]:
        turn = next(inputs)
        return torch.autograd.grad(side(turn), turn.leaves, turn.grad)

    return both if backward else forward


def _repeat(work: Callable[[], object], count: int) -> None:
    for _ in range(count):
        work()


def geomeans(found: Sequence[Measured]) -> tuple[list[str], list[Row]]:
    """Geometric means over the twelve training shapes, of each side that ran all of them, in words and as rows."""
    twelve = [one for one in found if one.case.group == "twelve" and one.timings]
    if len(twelve) < len(TWELVE):
        return [f"No geometric mean: {len(twelve)} of the {len(TWELVE)} training shapes were measured."], []
    said: list[str] = []
    rows: list[Row] = []
    for backward, which in GIVEN.items():
        for name in twelve[0].timings[backward]:
            if all(name in one.timings[backward] for one in twelve):
                rate = math.exp(sum(math.log(one.rate(backward, name)) for one in twelve) / len(twelve))
                times = math.exp(sum(math.log(one.rate(backward, OURS)) for one in twelve) / len(twelve)) / rate
                said.append(
                    f"Geometric mean of the twelve, {which}: {name} {three(rate / 1e12)} TFLOP/s, ratio {times:.3g}."
                )
                rows.append({"pass": which, "side": name, "flops_per_s": rate, "ratio": times})
    return said, rows


def run(options: Options) -> Findings:
    """Measure all cases of the layer."""
    return run_subject(LAYER, cases(options.device, options.quick), options, NOTES)


def run_subject(subject: Subject, chosen: Sequence[Case], options: Options, notes: Sequence[str]) -> Findings:
    """Measure all cases of a subject under the roof of this machine."""
    from moesaic.bench.layer_figure import draw
    from moesaic.bench.layer_sweeps import draw_sweeps

    roof = options.roof
    found = []
    for case in chosen:
        found.append(measure(subject, case, options))
        for line in found[-1].lines(roof):
            what = (
                f"{line[0]}, {line[1]}: {line[2]} {line[3]} ms, ratio {line[8]}"
                if line[1]
                else f"{line[0]}: {line[2]} not run"
            )
            options.say(f"bench {subject.name} {what}")
        if options.device == "cuda":
            torch.cuda.empty_cache()
    reasons = [f"{one.case.name}: {peer} not run: {why}" for one in found for peer, why in one.not_run.items()]
    failures = [f"{one.case.name}: {OURS} is wrong: {one.failure}" for one in found if one.failure]
    said, means = geomeans(found)
    if options.device == "cpu" and not options.quick:
        said.append("The training shapes are reduced: fewer tokens, and only those whose weights fit.")
    dtypes = dict.fromkeys(case.dtype for case in chosen)
    rates = ", ".join(f"{three(roof.rate(dtype) / 1e12)} TFLOP/s in {dtype}" for dtype in dtypes)
    title = f"{subject.title}; the roof: {rates}, {three(roof.copy_bytes_per_s / 1e9)} GB/s"
    checked = [f"{one.case.name}: checked on {one.checked_on}" for one in found if one.checked_on]
    lines = [line for one in found for line in one.lines(roof)]
    timed = [one for one in found if one.timings]
    return Findings(
        [row for one in found for row in one.rows(roof)],
        [Table(title, HEADER, lines, (*said, *notes, *COMMON_NOTES, *checked, *reasons))],
        lambda folder: [*draw(timed, subject.name, folder), *draw_sweeps(timed, subject.name, folder)],
        {"geometric_means": means}, failures, [point for one in timed for point in one.points()], HEADER[0] + ", dtype",
    )  # fmt: skip
