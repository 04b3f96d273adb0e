"""``moesaic bench ensemble``: `train_ensemble` against PyTorch trainers of the same models, in one process, in turn.

Shapes (n, m, E): the eight panels of the phase diagrams of arXiv 2510.23671 with their 2,262 cells and batch 512, and
four larger ones at batch 1024; k = 1, ``paper`` gate, load balance 0.01. Before anything is timed, each peer has to
agree with `train_ensemble` on the losses and gradients of equal samples. On a CPU a peer is timed with as many threads
as we have and with one, and the faster counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moesaic.bench.ensemble_limit import STEPS, issue_limit, runs_on_the_chip
from moesaic.bench.ensemble_peers import PEERS, Case, Ensemble, cases, check_case
from moesaic.bench.interleave import Contender, NotRunError, Timing, clock, fastest, ratio, with_threads
from moesaic.bench.kernel_bench import Findings, Options, Table
from moesaic.bench.plan import Row
from moesaic.bench.roofline import Roof, RoofPoint
from moesaic.bench.words import si
from moesaic.metrics import count_flops
from moesaic.metrics.flops import Pass
from moesaic.moe.toy import ensemble_shape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS = "moesaic"
ROUNDS, LEAST_S = 7, 0.3
QUICK_ROUNDS, QUICK_LEAST_S = 3, 0.1
AGREEMENT = 1e-3
"""Most that a peer may differ. Rounding makes 5e-6; room is left for a sample that rounding sends to another expert."""

HEADER = (
    "(n,m,E)", "models x batch", "side", "ms/step", "model-steps/s", "samples/s", "useful FLOP/s", "executed FLOP/s",
    "of the roof", "ratio",
)  # fmt: skip
NOTES = (
    "ms/step: median of the rounds [fastest-slowest]; one step trains every model once.",
    "On a CPU a peer is timed with all threads and with one; shown is the faster, and whether it is the one.",
    f"ratio: time of a peer's step over {OURS}'s, of the medians [lowest-highest within one round].",
    "FLOP/s: products of forward and backward pass; useful ones are the routed expert's and the router's (E = 1 has no "
    "router), executed ones include what is computed and masked, and padding.",
    "of the roof: least time that the measured float32 matrix rate allows the useful products, or a copy's bandwidth "
    f"what has to move, over the time. That is little: weights and moments in and out once in a training of {STEPS:,} "
    "steps, and in every step a model's rate (8 bytes) and its two losses (4 each). Drawing samples, ReLU and Adam, "
    "which take most of a small model's time, are no products.",
    f"Every side draws its samples within its step: {OURS} and torch-stacked from Philox, vmap from torch.rand, one "
    "number per feature each. Philox is counter-based: its samples are those of every other backend.",
    f"Only peers are timed that agree with {OURS} to {AGREEMENT:g} on losses and gradients of equal samples.",
)


@dataclass(frozen=True)
class Measured:
    """One case: timings and CPU threads by side; per peer how far it is from us, why it was not run, how it disagrees.

    ``executed_rows``: (sample, expert) pairs that our step computes, of all models.
    """

    case: Case
    executed_rows: int
    timings: dict[str, Timing]
    threads: dict[str, int]
    errors: dict[str, float]
    not_run: dict[str, str]
    disagrees: dict[str, str]

    def row(self, roof: Roof) -> Row:
        """The case as JSON values."""
        toy, training, runs = self.case.toy, self.case.training, self.case.runs
        probabilities = [run.features.feature_probability for run in runs]
        return {
            "shape": self.case.shape, "n_features": toy.n_features, "n_hidden": toy.n_hidden,
            "n_experts": toy.n_experts, "top_k": toy.top_k, "gate": toy.gate, "models": len(runs),
            "batch_size": training.batch_size, "load_balance": training.load_balance, "device": self.case.device,
            "feature_probability": [min(probabilities), max(probabilities)],
            "least_bytes_per_step": self.least_bytes(),
            "sides": {name: self._side(roof, name, timing) for name, timing in self.timings.items()},
            "ratio": {name: ratio(timing, self.timings[OURS]) for name, timing in self.peers()},
            "largest_difference": self.errors, "not_run": self.not_run, "disagrees": self.disagrees,
        }  # fmt: skip

    def peers(self) -> Iterator[tuple[str, Timing]]:
        """The timings of the peers that were measured."""
        return ((name, timing) for name, timing in self.timings.items() if name != OURS)

    def model_steps_per_s(self, name: str) -> float:
        """Models that a side takes one step further per second."""
        return len(self.case.runs) / self.timings[name].median

    def samples_per_s(self, name: str) -> float:
        """Samples of all models that a side trains on per second."""
        return self.model_steps_per_s(name) * self.case.training.batch_size

    def useful_flops(self) -> int:
        """Products of a step of all models by the routed expert and the router, forward and backward."""
        return self._flops().active.total or 0

    def executed_flops(self, name: str) -> int:
        """The same with what a side computes beyond that: masked experts, rows of padding."""
        if name == OURS:
            return self._flops(self.executed_rows).executed.total or 0
        work = self._flops()
        return (work.dense_equivalent if PEERS[name].dense else work.executed).total or 0

    def _flops(self, executed_rows: int | None = None) -> Pass:
        samples = len(self.case.runs) * self.case.training.batch_size
        return count_flops(self.case.toy, samples=samples, executed_rows=executed_rows).training

    def least_bytes(self) -> float:
        """Bytes of a step of all models that have to move, where trainings stay on the chip and draw their own samples.

        24·P / `STEPS` + 16 of each model: P parameters and both moments read and written once in a training, a rate
        read and two losses written in every step.
        """
        parameters = ensemble_shape(self.case.toy, self.case.training.batch_size).n_parameters
        return len(self.case.runs) * (24 * parameters / STEPS + 16)

    def point(self, name: str) -> RoofPoint:
        """A side's step, to be drawn under a roof."""
        seconds = self.timings[name].median
        label = f"{self.case.shape}, {len(self.case.runs)} × {self.case.training.batch_size}"
        return RoofPoint(label, name, "a training step", self.useful_flops(), self.least_bytes(), seconds)

    def _side(self, roof: Roof, name: str, timing: Timing) -> Row:
        return {
            "threads": self.threads[name],
            "ms_per_step": 1e3 * timing.median, "ms_lowest": 1e3 * timing.low, "ms_highest": 1e3 * timing.high,
            "ms_rounds": [1e3 * seconds for seconds in timing.seconds], "steps_per_round": timing.repetitions,
            "model_steps_per_s": self.model_steps_per_s(name), "samples_per_s": self.samples_per_s(name),
            "useful_flops_per_step": self.useful_flops(), "executed_flops_per_step": self.executed_flops(name),
            "useful_flops_per_s": self.useful_flops() / timing.median,
            "executed_flops_per_s": self.executed_flops(name) / timing.median,
            "of_the_roof": self.point(name).of(roof),
        }  # fmt: skip

    def lines(self, roof: Roof) -> list[tuple[str, ...]]:
        """The case's lines of the table, one per side."""
        size = f"{len(self.case.runs)} x {self.case.training.batch_size}"
        lines = []
        for name, timing in self.timings.items():
            ms = _spread(1e3 * timing.median, 1e3 * timing.low, 1e3 * timing.high)
            times = "1" if name == OURS else _spread(**ratio(timing, self.timings[OURS]))
            rates = (
                self.model_steps_per_s(name), self.samples_per_s(name), self.useful_flops() / timing.median,
                self.executed_flops(name) / timing.median,
            )  # fmt: skip
            fewer = self.threads[name] < self.threads[OURS]
            share = f"{100 * self.point(name).of(roof):.3g} %"
            side = f"{name}, 1 thread" * fewer or name
            lines.append((self.case.shape, size, side, ms, *map(si, rates), share, times))
        return lines + [(self.case.shape, size, name, "not run", *[""] * 6) for name in self.reasons()]

    def reasons(self) -> dict[str, str]:
        """Why peers have no timing, by name."""
        return {**self.not_run, **self.disagrees}


def _spread(median: float, low: float, high: float) -> str:
    return f"{_three(median)} [{_three(low)}-{_three(high)}]"


def _three(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def measure(case: Case, options: Options) -> Measured:
    """Check, then time one case; a peer that cannot run here, or disagrees, is left out and has a reason instead."""
    ours, most = Ensemble(case), torch.get_num_threads()
    # PyTorch splits every operation and waits for all parts: on small tensors that may cost more than it brings.
    choices = sorted({most, 1}, reverse=True) if case.device == "cpu" else [most]
    contenders: dict[tuple[str, int], Contender] = {(OURS, most): clock(ours.train, case.device)}
    errors: dict[str, float] = {}
    not_run: dict[str, str] = {}
    disagrees: dict[str, str] = {}
    for name in options.against:
        try:
            errors[name] = PEERS[name].error(check_case(case))
            # Not `> AGREEMENT`: NaN has to disagree.
            if not errors[name] <= AGREEMENT:
                disagrees[name] = f"differs by {errors[name]:.1e} on equal samples, more than {AGREEMENT:g}"
                continue
            contender = PEERS[name].contender(case)
            contender(1)
        except (NotRunError, ImportError, MemoryError, torch.OutOfMemoryError) as reason:
            not_run[name] = str(reason) or type(reason).__name__
            continue
        contenders |= {(name, count): with_threads(contender, count) for count in choices}
    rounds, least_s = (QUICK_ROUNDS, QUICK_LEAST_S) if options.quick else (ROUNDS, LEAST_S)
    timings, threads = fastest(contenders, rounds=rounds, least_s=least_s)
    return Measured(case, ours.executed_rows(), timings, threads, errors, not_run, disagrees)


def run(options: Options) -> Findings:
    """Measure every case against the peers asked for, and add what the compiler's report allows at most."""
    roof = options.roof
    options.say("bench ensemble: compiling the Triton kernel for the compiler's report")
    limit = issue_limit()
    found = []
    for case in cases(options.device, options.quick):
        found.append(measure(case, options))
        for line in found[-1].lines(roof):
            options.say(f"bench ensemble {line[0]}, {line[1]}: {line[2]} {line[3]} ms/step, ratio {line[-1] or '-'}")
    reasons = [f"{one.case.shape}: {peer} not run: {why}" for one in found for peer, why in one.reasons().items()]
    failures = [f"{one.case.shape}: {peer} {why}" for one in found for peer, why in one.disagrees.items()]
    lines = [line for one in found for line in one.lines(roof)]
    on_the_chip = found if runs_on_the_chip(options.device) else []
    achieved = {one.case.shape: one.model_steps_per_s(OURS) for one in on_the_chip}
    tables = [Table("Training steps of stacked toy models", HEADER, lines, (*NOTES, *reasons)), limit.table(achieved)]
    extra = {"compiler": limit.record(achieved)}
    return Findings(
        [one.row(roof) for one in found], tables, partial(draw, found), extra, failures,
        [one.point(name) for one in found for name in one.timings], ", ".join(HEADER[:2]),
    )  # fmt: skip


def draw(found: Sequence[Measured], folder: Path) -> list[Path]:
    """Samples per second of each side, and the ratio of each peer's time to ours; one row of marks per case."""
    from moesaic.bench.palette import DENSE, MOE, THIRD
    from moesaic.bench.plot_style import log_axis, panels, save, style

    looks = {OURS: (MOE, "o"), "vmap": (DENSE, "s"), "torch-stacked": (THIRD, "D")}
    peers = [name for name in PEERS if any(name in one.timings for one in found)]
    with style():
        figure, ((left, right),) = panels(1, 2, width=4.0, height=0.9 + 0.28 * len(found), sharey=True)
        for name in (OURS, *peers):
            # Peers side by side, or the bars of one would cross the numbers of the other.
            shift = 0.36 * (peers.index(name) - (len(peers) - 1) / 2) if name != OURS else 0.0
            here = [(one, y + shift) for y, one in enumerate(found) if name in one.timings]
            ys, (colour, marker) = [y for _, y in here], looks[name]
            left.plot([one.samples_per_s(name) for one, _ in here], ys, marker, color=colour, ms=4.5, label=name)
            if name != OURS:
                _draw_ratios(
                    right, [ratio(one.timings[name], one.timings[OURS]) for one, _ in here], ys, colour, marker
                )
        ends = [t[end] for one in found for _, p in one.peers() for t in [ratio(p, one.timings[OURS])] for end in t]
        log_axis(right, [*ends, *(1.4 * end for end in ends)], "ratio (bars: lowest to highest round)")
        left.set_yticks(
            range(len(found)),
            [f"{one.case.shape}, {len(one.case.runs)} × {one.case.training.batch_size}" for one in found],
        )
        left.set_ylim(len(found) - 0.4, -0.6)
        left.set_ylabel("(n, m, E), models × batch")
        left.set(title=f"Training throughput, fp32, {found[0].case.device}", xscale="log", xlabel="samples per second")
        right.set_title(f"Time of a step, peer over {OURS}")
        handles, names = left.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
        save(figure, folder, "bench-ensemble")
    return [folder / f"bench-ensemble.{kind}" for kind in ("png", "svg")]


def _draw_ratios(
    axes: Axes, times: Sequence[Mapping[str, float]], ys: Sequence[float], colour: str, marker: str
) -> None:
    median = [t["median"] for t in times]
    reach = [[t["median"] - t["low"] for t in times], [t["high"] - t["median"] for t in times]]
    axes.errorbar(median, ys, xerr=reach, fmt=marker, color=colour, ms=4.5, elinewidth=1, capsize=2)
    for t, y in zip(times, ys, strict=True):
        beside: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 7}
        axes.annotate(_three(t["median"]), (t["high"], y), (4, 0), **beside)
