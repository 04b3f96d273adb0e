"""Whole toy trainings to equal held-out loss: which learning rate, how many steps, which dense models get there at all.

    target   the MoE's mean held-out unexplained variance over the seeds, trained for the whole budget of N steps
    steps    of a model: the smallest of N/8, N/4, N/2, N whose own whole training reaches the target; null if none does

Every (model, number of steps) is a training of its own, with its own schedule, at the rate that does best for it on a
seed no result uses; sparse and dense models get the same rates to choose from.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from moesaic.bench.energy_cases import ToyCase, Work, toy_name
from moesaic.bench.plan import PlannedRun, Row, training_groups
from moesaic.metrics import count_flops
from moesaic.moe import Run, ToyConfig

EQUAL_LOSS = "equal loss"
"""Of the dense models that reach the target, the one that gets there with the fewest FLOPs."""
LOSS = "unexplained_variance"
TUNING_SEED = 1_000_000


@dataclass(frozen=True)
class Budget:
    """Numbers of steps and learning rates that are tried, dense widths beside the matched ones, and seeds."""

    steps: tuple[int, ...]
    rates: tuple[float, ...]
    widths: tuple[int, ...]
    seeds: int


FULL = Budget((250, 500, 1000, 2000), (0.001, 0.003, 0.01, 0.03), (4, 8, 12, 16, 24, 32, 48), 3)
QUICK = Budget((100, 400), (0.003, 0.01, 0.03), (16,), 3)


@dataclass(frozen=True)
class Attempt:
    """A model trained for some number of steps at its best rate: held-out loss by seed, None where one failed."""

    toy: ToyConfig
    steps: int
    lr: float
    at_edge: bool
    losses: tuple[float, ...] | None

    @property
    def mean(self) -> float:
        """Mean loss over the seeds, infinite where one failed."""
        return statistics.mean(self.losses) if self.losses else float("inf")


@dataclass(frozen=True)
class EqualLoss:
    """The target, every attempt, and by model the first attempt that reaches the target, or None."""

    target: float
    attempts: Sequence[Attempt]
    reached: Mapping[ToyConfig, Attempt | None]
    matched_by: Mapping[ToyConfig, str]


Trainer = Callable[[Sequence[PlannedRun]], list[Row]]


def to_equal_loss(case: ToyCase, budget: Budget, train: Trainer) -> EqualLoss:
    """Tune, train and compare; ``train`` gives a row per planned run, in order."""
    labels: dict[ToyConfig, list[str]] = {case.toy: []}
    for kind, width in case.widths().items():
        labels.setdefault(case.dense(width), []).append(kind)
    for width in budget.widths:
        labels.setdefault(case.dense(width), [])
    tuned = _tune(case, list(labels), budget, train)
    attempts = _attempts(case, tuned, budget, train)
    full = next(one for one in attempts if one.toy == case.toy and one.steps == max(budget.steps))
    target = full.mean
    reached: dict[ToyConfig, Attempt | None] = {}
    for toy in labels:
        able = [one for one in attempts if one.toy == toy and one.mean <= target]
        reached[toy] = min(able, key=lambda one: one.steps, default=None)
    good = [toy for toy, attempt in reached.items() if attempt is not None and toy != case.toy]
    if good:
        labels[min(good, key=lambda toy: _flops(toy, reached[toy]))].append(EQUAL_LOSS)
    return EqualLoss(target, attempts, reached, {toy: "; ".join(kinds) for toy, kinds in labels.items()})


def _flops(toy: ToyConfig, attempt: Attempt | None) -> float:
    """Of a training, per sample of a batch."""
    return (count_flops(toy).training.active.total or 0) * (attempt.steps if attempt else 0)


def _runs(case: ToyCase, toy: ToyConfig, steps: int, lr: float, seeds: Sequence[int]) -> list[PlannedRun]:
    training = replace(case.training, steps=steps, lr=lr)
    return [PlannedRun(Run(toy, case.features, training, seed)) for seed in seeds]


def _tune(
    case: ToyCase, toys: Sequence[ToyConfig], budget: Budget, train: Trainer
) -> dict[tuple[ToyConfig, int], tuple[float, bool]]:
    """The best rate of each model and number of steps, and whether it is the first or last of the rates."""
    grid = [(toy, steps, lr) for toy in toys for steps in budget.steps for lr in budget.rates]
    planned = [_runs(case, *point, [TUNING_SEED])[0] for point in grid]
    found: dict[tuple[ToyConfig, int], dict[float, float]] = {}
    for (toy, steps, lr), row in zip(grid, _in_order(planned, train), strict=True):
        found.setdefault((toy, steps), {})[lr] = _loss(row)
    best = {key: min(by_rate, key=by_rate.__getitem__) for key, by_rate in found.items()}
    return {key: (lr, lr in (budget.rates[0], budget.rates[-1])) for key, lr in best.items()}


def _attempts(
    case: ToyCase, tuned: Mapping[tuple[ToyConfig, int], tuple[float, bool]], budget: Budget, train: Trainer
) -> list[Attempt]:
    seeds = range(budget.seeds)
    planned = [run for (toy, steps), (lr, _) in tuned.items() for run in _runs(case, toy, steps, lr, seeds)]
    rows = iter(_in_order(planned, train))
    attempts = []
    for (toy, steps), (lr, at_edge) in tuned.items():
        losses = tuple(_loss(next(rows)) for _ in seeds)
        attempts.append(Attempt(toy, steps, lr, at_edge, losses if max(losses) < float("inf") else None))
    return attempts


def _in_order(planned: Sequence[PlannedRun], train: Trainer) -> list[Row]:
    """Rows of the runs, trained in stacks of one shape."""
    rows: dict[object, Row] = {}
    for group in training_groups(planned):
        rows |= {row["run_key"]: row for row in train(group)}
    return [rows[item.run.key] for item in planned]


def _loss(row: Row) -> float:
    value = row.get(LOSS)
    return float(value) if isinstance(value, float | int) else float("inf")


def training_works(case: ToyCase, found: EqualLoss, budget: Budget, device: str) -> list[Work]:
    """The trainings that reach the target, to be measured: each a stack of all seeds."""
    from moesaic.moe import train_runs
    from moesaic.moe.trainer import training_part

    works = []
    for toy, attempt in found.reached.items():
        if attempt is None or (toy != case.toy and not found.matched_by[toy]):
            continue
        runs = [item.run for item in _runs(case, toy, attempt.steps, attempt.lr, range(budget.seeds))]
        counted = count_flops(toy, batch_size=case.training.batch_size).training
        samples = attempt.steps * case.training.batch_size
        works.append(
            Work(
                "toy model, training to equal loss",
                case.name,
                f"{toy_name(toy)}, {attempt.steps} steps",
                found.matched_by[toy],
                "training",
                len(runs),
                partial(train_runs, runs, device=device),
                (counted.active.total or 0) * samples,
                (counted.bytes.total if counted.bytes else 0) * samples,
                part=partial(training_part, runs, device=device),
                steps=attempt.steps,
                dense_equivalent_flops=(counted.dense_equivalent.total or 0) * samples,
            )
        )
    return works
