"""The main job, ``moesaic sweep tradeoff``: dense and MoE toy models of n = 128 features on three data sets.

**Widths.** Every MoE has total width 64. Its partner at equal total width is dense m = 64; its partner at equal
active FLOPs is the dense width solved from encode + router + decode, forward and backward, and added to the plan.

**Learning rate.** Stage ``tune`` trains every architecture on every data set at each rate of one grid, on a seed that
no result uses and for all of the steps: where a router learns, a longer run can end worse (16×4 k=4 on S at 0.003:
.12 after 1,000 steps, .50 after 2,000), and shorter tuning picks such rates. Stage ``main`` takes for each
(architecture, data set) the rate with the lowest held-out loss. Per data set, because every comparison of the
report lies within one: a rate shared by the three would be set by the one with the largest losses, and the gates, which
run on one data set, would be tuned unlike what they are compared with.

**Gate.** The grid uses ``paper``, the published model. Its weights sum to 1, so no metric needs correcting for the
gate. At k = 1 its router has no gradient: those rows are fixed random routing, which the report says. The six gates and
a shared expert are a slice of their own, at E = 16 on C, where routing has something to find; ``straight_through``,
whose forward pass is the same model, shows there what a router that learns changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from moesaic.bench.analysis import EQUAL_FLOPS, EQUAL_WIDTH, chosen_rates
from moesaic.bench.plan import PlannedRun, Preset, Row, Stage
from moesaic.metrics.flops import dense_width_at_equal_flops
from moesaic.moe.config import FeatureConfig, Run, ToyConfig, TrainConfig

N_FEATURES, TOTAL_WIDTH = 128, 64
GRID_GATE = "paper"
DATASETS = {
    "C": FeatureConfig(features="clustered", n_clusters=16, feature_probability=0.5),
    "S": FeatureConfig(feature_probability=0.03),
    "D": FeatureConfig(feature_probability=0.3),
}
TUNING_SEED = 1_000_000
"""First seed of the tuning stage; results use 0, 1, 2, …"""


@dataclass(frozen=True)
class Scale:
    """How much of the job is run: the full one or ``--quick``'s."""

    dense: tuple[int, ...]
    moe: tuple[tuple[int, int, int], ...]
    seeds: int
    steps: int
    rates: tuple[float, ...]


FULL = Scale(
    dense=(4, 8, 12, 16, 24, 64), moe=((4, 16, 1), (16, 4, 1), (16, 4, 2), (16, 4, 4), (64, 1, 4)), seeds=3,
    steps=2000, rates=(0.001, 0.003, 0.01, 0.03),
)  # fmt: skip
QUICK = Scale(
    dense=(4, 16, 64), moe=((4, 16, 1), (16, 4, 1)), seeds=3, steps=400, rates=(0.003, 0.01, 0.03),
)  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A model of the plan, the data sets it runs on, and what its rows are labelled with."""

    label: str
    toy: ToyConfig
    datasets: tuple[str, ...]
    slice: str = "grid"
    comparison: str = ""


def architectures(scale: Scale) -> list[Architecture]:
    """The dense widths, those of equal active FLOPs among them, the MoE grid, and the gates at E = 16 on C."""
    grid = [_moe(*shape) for shape in scale.moe]
    partners: dict[int, list[str]] = {TOTAL_WIDTH: [EQUAL_WIDTH]}
    for moe in grid:
        partners.setdefault(dense_width_at_equal_flops(moe.toy), []).append(f"{EQUAL_FLOPS} as {moe.label}")
    dense = [
        Architecture(f"dense m={m}", _toy(m), tuple(DATASETS), comparison="; ".join(partners.get(m, ())))
        for m in sorted({*scale.dense, *partners})
    ]
    return dense + grid + _gates()


def _toy(m: int, n_experts: int = 1, top_k: int = 1, gate: str = "paper", shared: int = 0) -> ToyConfig:
    return ToyConfig(N_FEATURES, m, n_experts, top_k, gate, shared_hidden=shared, parametrization="small")


def _moe(n_experts: int, m: int, top_k: int) -> Architecture:
    return Architecture(f"MoE {n_experts}×{m} k={top_k}", _toy(m, n_experts, top_k, GRID_GATE), tuple(DATASETS))


def _gates() -> list[Architecture]:
    """The other five gates at E = 16, k = 1; a shared expert of width 16, for which each routed one gives up a unit."""
    gates = ("switch", "sigmoid", "straight_through", "random", "oracle")
    sliced = [Architecture(f"MoE 16×4 k=1, {gate}", _toy(4, 16, 1, gate), ("C",), "gates") for gate in gates]
    shared = _toy(3, 16, 1, GRID_GATE, shared=16)
    return [*sliced, Architecture("MoE 16×3 k=1 + shared 16", shared, ("C",), "gates")]


def planned(
    found: Iterable[Architecture],
    training: TrainConfig,
    rates: Mapping[tuple[str, str], tuple[float, ...]],
    seeds: Iterable[int],
    stage: str,
    data: Mapping[str, FeatureConfig] = DATASETS,
) -> list[PlannedRun]:
    """Every architecture on each of its data sets, at each rate of (data set, architecture) and each seed."""
    wanted = list(seeds)
    plan = []
    for item in found:
        for dataset in item.datasets:
            labels = {"stage": stage, "dataset": dataset, "architecture": item.label, "slice": item.slice}
            if item.comparison:
                labels["comparison"] = item.comparison
            for lr in rates[dataset, item.label]:
                config = replace(training, lr=lr)
                plan += [PlannedRun(Run(item.toy, data[dataset], config, seed), labels) for seed in wanted]
    return plan


def chosen_or_middle(
    rows: list[Row], every: Iterable[tuple[str, str]], grid: tuple[float, ...]
) -> dict[tuple[str, str], tuple[float]]:
    """The best rate of each (data set, architecture); the middle one where every rate failed.

    That is tried again at full length, so the failure shows in the results.
    """
    best, middle = chosen_rates(rows), grid[len(grid) // 2]
    return {key: (best[key].lr if key in best else middle,) for key in every}


def stages(quick: bool, seeds: int | None) -> list[Stage]:
    """The two stages: ``tune`` on its own seed, then ``main`` on seeds 0 … N−1 at the rates that won."""
    scale = QUICK if quick else FULL
    found = architectures(scale)
    training = TrainConfig(steps=scale.steps, batch_size=256, schedule="cosine", reduction="sum")
    every = [(dataset, item.label) for item in found for dataset in item.datasets]

    def tune(_: list[Row]) -> list[PlannedRun]:
        grid = dict.fromkeys(every, scale.rates)
        return planned(found, training, grid, [TUNING_SEED], "tune")

    def main(rows: list[Row]) -> list[PlannedRun]:
        rates = chosen_or_middle(rows, every, scale.rates)
        return planned(found, training, rates, range(scale.seeds if seeds is None else seeds), "main")

    return [tune, main]


TRADEOFF = Preset(
    "tradeoff", "dense against MoE at equal total width and at equal active FLOPs, n = 128, three data sets", stages
)
