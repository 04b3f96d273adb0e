"""``moesaic sweep middle-path``: is there a mix of shared and routed capacity that keeps what both are good for?

Every mixture has the active FLOPs of dense m = 12, router included: of the active width w = 12 − 2E/5, a share s is in
a shared expert that always computes, the rest in k routed ones of E. So its total width is s·w + E·(1−s)·w/k, and it
stands between two dense models of its own: that of equal active FLOPs and that of equal total width.

    FLOPs saved      1 − FLOPs of the mixture / FLOPs of the dense model of equal total width
    recovered        (L_equal FLOPs − L_mixture) / (L_equal FLOPs − L_equal width), by seed, L the unexplained variance

There is no third number made of these two. The gate is ``sigmoid``, whose router learns at k = 1 too.
Learning rates are tuned as in `tradeoff`: one grid for all, per architecture and data set, on a seed of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.bench.plan import PlannedRun, Preset, Row, Stage
from moesaic.bench.tradeoff import TUNING_SEED, Architecture, chosen_or_middle, planned
from moesaic.metrics.flops import dense_width_at_equal_flops
from moesaic.moe.config import FeatureConfig, ToyConfig, TrainConfig

N_FEATURES, DENSE_WIDTH, GATE, SLICE = 128, 12, "sigmoid", "middle"
DATASETS = {
    "C": FeatureConfig(features="clustered", n_clusters=16, feature_probability=0.5),
    "G": FeatureConfig(features="correlated", group_size=8, feature_probability=0.03),
    "S": FeatureConfig(feature_probability=0.03),
}
"""Structure that routing can find, structure within a sample, and none."""


@dataclass(frozen=True)
class Scale:
    """How much of the job is run: the full one or ``--quick``'s."""

    experts: tuple[int, ...]
    active: tuple[int, ...]
    shares: tuple[float, ...]
    datasets: tuple[str, ...]
    seeds: int
    steps: int
    rates: tuple[float, ...]


FULL = Scale((4, 8, 16), (1, 2), (0.0, 0.25, 0.5, 0.75), ("C", "G", "S"), 5, 2000, (0.001, 0.003, 0.01, 0.03))
QUICK = Scale((4, 16), (1,), (0.0, 0.5), ("C", "S"), 5, 300, (0.003, 0.01, 0.03))


def mixture(n_experts: int, top_k: int, share: float) -> ToyConfig:
    """The mixture of E experts, k active, with about this share of its active width in a shared expert.

    Widths are integers: m = max(1, round((1 − share)·w / k)), and the shared expert has what is left of w.
    """
    width = max(top_k, round(DENSE_WIDTH - 2 * n_experts / 5))
    m = max(1, round((1 - share) * width / top_k))
    shared = max(0, width - top_k * m)
    return ToyConfig(N_FEATURES, m, n_experts, top_k, GATE, shared_hidden=shared, parametrization="small")


def architectures(scale: Scale) -> list[Architecture]:
    """The mixtures, and the dense models that each is placed between; rounding may make two mixtures one."""
    mixtures = {mixture(e, k, s): None for e in scale.experts for k in scale.active for s in scale.shares}
    widths = sorted({width for toy in mixtures for width in partners(toy)})
    dense = [ToyConfig(N_FEATURES, m, parametrization="small") for m in widths]
    return [Architecture(_name(toy), toy, scale.datasets, SLICE) for toy in [*dense, *mixtures]]


def partners(toy: ToyConfig) -> tuple[int, int]:
    """Widths of the dense models of equal active FLOPs and of equal total width."""
    return dense_width_at_equal_flops(toy), toy.n_experts * toy.n_hidden + toy.shared_hidden


def _name(toy: ToyConfig) -> str:
    if toy.n_experts == 1:
        return f"dense m={toy.n_hidden}"
    shared = f" + {toy.shared_hidden}" if toy.shared_hidden else ""
    return f"MoE {toy.n_experts}×{toy.n_hidden} k={toy.top_k}{shared}"


def stages(quick: bool, seeds: int | None) -> list[Stage]:
    """``tune`` on its own seed, then ``main`` on seeds 0 … N−1 at the rates that won."""
    scale = QUICK if quick else FULL
    found = architectures(scale)
    training = TrainConfig(steps=scale.steps, batch_size=256, schedule="cosine", reduction="sum", load_balance=0.01)
    every = [(dataset, item.label) for item in found for dataset in item.datasets]

    def tune(_: list[Row]) -> list[PlannedRun]:
        return planned(found, training, dict.fromkeys(every, scale.rates), [TUNING_SEED], "tune", DATASETS)

    def main(rows: list[Row]) -> list[PlannedRun]:
        rates = chosen_or_middle(rows, every, scale.rates)
        wanted = range(scale.seeds if seeds is None else seeds)
        return planned(found, training, rates, wanted, "main", DATASETS)

    return [tune, main]


MIDDLE_PATH = Preset(
    "middle-path", "mixtures of shared and routed capacity between two dense models, n = 128, three data sets", stages
)
