"""``moesaic bench energy``: FLOPs, bytes, seconds and joules of sparse against dense work, on the same random data.

Layers, training steps of toy models, and whole toy trainings to equal held-out loss. Times come from interleaved
rounds; joules from windows of equal duration, the sides in turn (`moesaic.metrics.compare_energy`), where the machine
has a meter. Where it has none they are null, and the reason is part of the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moesaic.bench.efficiency import YARDSTICK_WORDS, Cost, Gap, efficiency_gap, gap, gap_words, spread, three
from moesaic.bench.energy_cases import LAYERS, QUICK_LAYERS, TOYS, ToyCase, Work, layer_works, step_works
from moesaic.bench.energy_training import FULL, QUICK, EqualLoss, to_equal_loss, training_works
from moesaic.bench.energy_windows import FULL as FULL_WINDOWS
from moesaic.bench.energy_windows import QUICK as QUICK_WINDOWS
from moesaic.bench.energy_windows import long_enough, steps_per_call
from moesaic.bench.interleave import Timing, clock, interleave
from moesaic.bench.kernel_bench import Findings, Options, Table
from moesaic.bench.plan import PlannedRun, Row
from moesaic.bench.roofline import Roof, RoofPoint
from moesaic.bench.words import si
from moesaic.metrics.energy import EnergyMeter

ROUNDS, LEAST_S = 7, 0.2
QUICK_ROUNDS, QUICK_LEAST_S = 3, 0.05

HEADER = ("what", "matched by", "ms", "FLOPs", "bytes", "GFLOP/s", "J", "CV", "W", "idle W", "GFLOP/J")
NOTES = (
    "Everything per unit: a token, a step of one model, a whole training of one model. ms: median of the rounds "
    "[fastest-slowest], all sides in turn. FLOPs: useful products; bytes: every operation reads its operands and "
    "writes its result once.",
    "J: gross, of the `scope` in the JSON, board or package alone; CV: spread over trials, of which 2 % or more make a "
    "figure invalid (it is null here and in the JSON's `valid`). Never estimated from a data sheet.",
    "Dense layers are PyTorch's products, with SiLU and the gate's product as operations of their own that read and "
    "write the hidden layer again; the MoE's kernels fuse them. That is part of their bytes, time and joules.",
    "Masked: the MoE's own function by dense products, all experts for all tokens. It is no dense baseline: most of "
    "the operands of its second product are zeros, which draw less power.",
)
RATIOS = ("matched by", "sparse / dense", "FLOPs", "bytes", "time", "joules")


@dataclass(frozen=True)
class Measured:
    """A workload, its timing per call, and what its meter said (an `EnergyResult`), None where there is none.

    ``metered_units``: units of a metered call, which are fewer where a whole training is long for a window;
    ``reason``: why nobody measured joules.
    """

    work: Work
    timing: Timing
    energy: Any
    metered_units: float
    reason: str | None = None

    @property
    def not_measured(self) -> str | None:
        """Why joules are null: nobody measured, or trials spread too far."""
        if self.energy is None or self.energy.valid:
            return self.reason
        return f"not valid: trials vary by {self.energy.cv or 0:.1%}, less than 2 % is"

    @property
    def joules(self) -> tuple[float, ...]:
        """Joules per unit by trial; empty where not measured or not valid."""
        if self.energy is None or not self.energy.valid:
            return ()
        return tuple(value / self.metered_units for value in self.energy.trial_joules)

    @property
    def cost(self) -> Cost:
        """Of one unit."""
        seconds = tuple(value / self.work.units for value in self.timing.seconds)
        return Cost(self.work.flops, self.work.bytes, seconds, self.joules)

    def row(self) -> Row:
        """The workload as JSON values; joules in the column of the unit."""
        work, cost, energy = self.work, self.cost, self.energy
        joules = cost.median("joules")
        seconds = self.timing.median / work.units
        names = {"token": "j_per_token", "step": "j_per_step", "training": "j_to_target_loss"}
        return {
            "subject": work.subject, "case": work.case, "name": work.name, "matched_by": work.matched_by,
            "dtype": work.dtype, "unit": work.unit, "units_per_call": work.units,
            "units_per_metered_call": self.metered_units,
            "seconds": seconds, "seconds_rounds": list(cost.seconds), "flops": work.flops, "bytes": work.bytes,
            "executed_flops": work.executed_flops, "dense_equivalent_flops": work.dense_equivalent_flops,
            "useful_flops_per_s": None if work.flops is None else work.flops / seconds,
            **dict.fromkeys(names.values()), names[work.unit]: joules,
            "useful_flops_per_j": None if joules is None or work.flops is None else work.flops / joules,
            "power_w": energy and energy.power_w,
            "idle_w": energy and energy.idle_w,
            "cv": energy and energy.cv, "valid": bool(energy and energy.valid), "scope": energy and energy.scope,
            "not_measured": self.not_measured,
            "energy": None if energy is None else dataclasses.asdict(energy),
        }  # fmt: skip

    def points(self) -> list[RoofPoint]:
        """The workload under the roof, where it is known what has to move."""
        work = self.work
        if work.flops is None or work.least_bytes is None:
            return []
        seconds = self.timing.median / work.units
        # By what is equal, not by width, which is another one in every case.
        side = f"dense of {work.matched_by.split('; ')[0]}" if work.matched_by.startswith("equal") else work.matched_by
        return [RoofPoint(work.case, side or "MoE", work.subject, work.flops, work.least_bytes, seconds, work.dtype)]

    def line(self) -> tuple[str, ...]:
        """The workload's line of the table."""
        work, row = self.work, self.row()
        per_ms = 1e3 / work.units
        timing = self.timing
        return (
            work.name, work.matched_by or "(sparse)",
            f"{_ms(timing.median * per_ms)} [{_ms(timing.low * per_ms)}-{_ms(timing.high * per_ms)}]",
            *(si(value) if value is not None else "-" for value in (work.flops, work.bytes)),
            "-" if work.flops is None else three(work.flops / (timing.median / work.units) / 1e9),
            "-" if not self.joules else f"{self.cost.median('joules'):.3g}",
            "-" if row["cv"] is None else f"{100 * float(str(row['cv'])):.1f} %",
            *("-" if row[name] is None else f"{row[name]:.0f}" for name in ("power_w", "idle_w")),
            "-" if row["useful_flops_per_j"] is None else three(float(str(row["useful_flops_per_j"])) / 1e9),
        )  # fmt: skip


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def measure(works: Sequence[Work], options: Options, meter: EnergyMeter | str) -> list[Measured]:
    """Time the workloads of a group in turn and measure their joules in turn, or say why not.

    ``meter`` is the reason where there is none. So is the error of a counter that moved fewer than ten times in a
    window, and of windows that differ.
    """
    contenders = {work.name: clock(partial(_repeat, work), options.device) for work in works}
    rounds, least_s = (QUICK_ROUNDS, QUICK_LEAST_S) if options.quick else (ROUNDS, LEAST_S)
    timings = interleave(contenders, rounds=rounds, least_s=least_s)
    reason, results = meter if isinstance(meter, str) else None, dict[str, Any]()
    metered = {work.name: work for work in works}
    if not isinstance(meter, str):
        from moesaic.metrics.energy import compare_energy

        windows = QUICK_WINDOWS if options.quick else FULL_WINDOWS
        metered = {work.name: _cut(work, timings[work.name].high, windows) for work in works}
        longest = max((timings[work.name].high for work in works if work.part is None), default=0.0)
        calls = {name: work.call for name, work in metered.items()}
        try:
            results = compare_energy(calls, meter=meter, **long_enough(windows, longest))
        except (RuntimeError, ValueError) as error:
            reason = str(error)
    return [
        Measured(work, timings[name], results.get(name), metered[name].units, reason)
        for name, work in ((work.name, work) for work in works)
    ]


def _cut(work: Work, seconds: float, windows: Mapping[str, Any]) -> Work:
    """Return the workload, a whole training cut to as many steps as a window has room for."""
    if work.part is None:
        return work
    steps = steps_per_call(work.steps, seconds, windows)
    return replace(work, call=work.part(steps), units=work.units * steps / work.steps)


def _repeat(work: Work, count: int) -> None:
    for _ in range(count):
        work.call()


def gaps(found: Sequence[Measured]) -> list[Gap]:
    """Every dense workload against the sparse one of its subject and case, once per way of matching."""
    result = []
    for one in found:
        work = one.work
        base = next(m for m in found if m.work.is_sparse and _same(m.work, work))
        for kind in work.matched_by.split("; ") if work.matched_by else ():
            names = (f"{work.subject}: {base.work.name}", work.name)
            result.append(gap(kind, names, base.cost, one.cost))
    kinds = list(dict.fromkeys(one.matched_by for one in result))
    return sorted(result, key=lambda one: kinds.index(one.matched_by))


def _same(one: Work, other: Work) -> bool:
    return (one.subject, one.case) == (other.subject, other.case)


def run(options: Options) -> Findings:
    """Measure layers, steps and trainings, sparse against dense."""
    from moesaic.metrics.energy import find_meter

    meter = find_meter("auto", device=options.device)
    what = f"joules not measured, so null: {meter}" if isinstance(meter, str) else f"joules of {meter.scope}"
    options.say(f"bench energy: {what}")
    roof = options.roof
    found: list[Measured] = []
    not_run: list[str] = []
    layers = (QUICK_LAYERS if options.quick else LAYERS)[options.device]
    for case in layers:
        try:
            for works in layer_works(case, options.device):
                found += _told(measure(works, options, meter), options)
        except (MemoryError, torch.OutOfMemoryError) as error:
            not_run.append(f"layer {case.name} not run: {type(error).__name__}")
    budget = QUICK if options.quick else FULL
    equal: dict[ToyCase, EqualLoss] = {}
    for toy in TOYS[:1] if options.quick else TOYS:
        found += _told(measure(step_works(toy, options.device, options.quick), options, meter), options)
        options.say(f"bench energy: tuning and training toy models to equal loss, {toy.name}")
        equal[toy] = to_equal_loss(toy, budget, partial(_train, device=options.device))
        trainings = training_works(toy, equal[toy], budget, options.device)
        found += _told(measure(trainings, options, meter), options)
    return _findings(found, equal, roof, not_run)


def _train(group: Sequence[PlannedRun], device: str) -> list[Row]:
    from moesaic.bench.sweep import train_and_measure

    return train_and_measure(group, device=device, impl="auto", progress=lambda steps, loss: None)


def _told(found: list[Measured], options: Options) -> list[Measured]:
    for one in found:
        line = one.line()
        options.say(f"bench energy {one.work.subject}, {one.work.case}: {line[0]} {line[2]} ms, {line[6]} J")
    return found


def _findings(
    found: list[Measured], equal: Mapping[ToyCase, EqualLoss], roof: Roof, not_run: Sequence[str]
) -> Findings:
    compared = gaps(found)
    reason = "; ".join(dict.fromkeys(one.reason for one in found if one.reason)) or None
    tables = []
    for subject, case in dict.fromkeys((one.work.subject, one.work.case) for one in found):
        members = [one for one in found if (one.work.subject, one.work.case) == (subject, case)]
        tables.append(Table(f"{subject}, per {members[0].work.unit}: {case}", HEADER, [m.line() for m in members]))
    lines = [
        (
            one.matched_by,
            f"{one.sparse} / {one.dense}",
            *(spread(one.factors[q]) for q in ("flops", "bytes", "seconds", "joules")),
        )
        for one in compared
    ]
    words = [
        gap_words(compared, reason),
        *NOTES,
        *(_equal_loss_words(*one) for one in equal.items()),
        YARDSTICK_WORDS,
        *not_run,
    ]
    tables.append(Table("Dense over sparse: cost of the dense side over the sparse one's", RATIOS, lines, words))
    rows = [{**one.row(), "of_the_roof": next((point.of(roof) for point in one.points()), None)} for one in found]
    rows += [row for one in equal.items() for row in null_rows(*one)]
    return Findings(
        rows,
        tables,
        partial(_draw, compared),
        {"equal_loss": {toy.name: _record(one) for toy, one in equal.items()}, "not_measured": reason},
        points=[point for one in found for point in one.points()],
        points_key="T, d, n, E, k",
    )


def _equal_loss_words(case: ToyCase, equal: EqualLoss) -> str:
    from moesaic.bench.energy_cases import toy_name

    missed = [toy_name(toy) for toy, attempt in equal.reached.items() if attempt is None]
    text = (
        f"Target of {case.name}: held-out unexplained variance {equal.target:.4f}, the MoE's mean over seeds for all "
        "of the steps. At equal loss stands the dense model that reaches it with the fewest FLOPs."
    )
    return f"{text} Not reached by {', '.join(missed)}: null." if missed else text


def null_rows(case: ToyCase, equal: EqualLoss) -> list[Row]:
    """Models that were to be compared and never reached the target: all of their costs are null."""
    from moesaic.bench.energy_cases import toy_name

    return [
        {
            "subject": "toy model, training to equal loss", "case": case.name, "name": toy_name(toy),
            "matched_by": equal.matched_by[toy], "unit": "training", "j_to_target_loss": None, "seconds": None,
            "flops": None, "bytes": None, "valid": False, "not_measured": "the target loss was not reached",
        }
        for toy, attempt in equal.reached.items()
        if attempt is None and equal.matched_by[toy]
    ]  # fmt: skip


def _record(equal: EqualLoss) -> dict[str, object]:
    return {
        "target": equal.target,
        "attempts": [
            {"n_hidden": one.toy.n_hidden, "n_experts": one.toy.n_experts, "top_k": one.toy.top_k, "steps": one.steps,
             "lr": one.lr, "lr_at_edge_of_grid": one.at_edge, "losses": one.losses, "reached": one.mean <= equal.target}
            for one in equal.attempts
        ],
    }  # fmt: skip


def _draw(compared: Sequence[Gap], folder: Path) -> list[Path]:
    from moesaic.bench.plot_style import save, style

    with style():
        figure = efficiency_gap(compared)
        if figure is None:
            return []
        save(figure, folder, "bench-energy")
    return [folder / f"bench-energy.{kind}" for kind in ("png", "svg")]
