"""``moesaic sweep million``: toy models of a thousand to a million features, dense and mixtures, each trained alone.

**Data.** Power-law features, p_i ∝ i^−0.9, with Σ_i p_i = 8 active features per sample at every n, an eighth of the
dense width; the exponent is the largest round one with p_1 ≤ 1 at n = 1,000. Growing n adds rare features.

**Architectures.** dense m = 64; E = 16, k = 1, m = 4, which has the dense model's total width E·m; E = 4, k = 1,
m = 64, which has its active width k·m, so that encoding and decoding cost the same FLOPs, 384·n + 2,048 per sample.
Its router's, 4·E per active feature, come on top: 128 per sample, or 2.5 % where encoding multiplies absent features
too, as ``active_flops`` counts. Its weights are four times as many.

**Training.** Small initial values: unit rows of a million features add up to hundreds of times the data's variance, and
shrinking them would take most of such a run. The loss is summed over features, AdamW has eps 1e-15; cosine, batch 256.
Every feature is decoded: a sampled step costs a tenth of an exact one at n = 10⁶, but reaches the drawn and the present
rows only, and in so few steps most would stay as they began. Steps are the same for all n: the rarest features are
never seen. The restricted metrics say how many were seen often enough, and learned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moesaic.bench.analysis import EQUAL_FLOPS, EQUAL_WIDTH
from moesaic.bench.plan import PlannedRun, Row, Stage
from moesaic.bench.sweep import Trainer, TrainerPreset
from moesaic.moe.config import FeatureConfig, Run, ToyConfig, TrainConfig

SIZES = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
QUICK_SIZES = (1_000, 10_000, 100_000)
ACTIVE, EXPONENT = 8.0, 0.9
BATCH = 256
STEPS, QUICK_STEPS = 200, 100
SEEDS, SEEDS_OF_LARGEST, LARGEST = 2, 1, 100_000
"""Seeds; beyond so many features, one."""
LOAD_BALANCE = 0.1
"""At 0.01 a third of 16 experts is used at n = 10,000, at 0.1 nearly all are."""
CHECKPOINT_EVERY = 1000
"""Steps; shorter runs are sooner done again than their state is written."""


@dataclass(frozen=True)
class Architecture:
    """A model of the plan; ``lr`` had the least held-out error of 0.003, 0.01, 0.03 and 0.1.

    At n = 10,000 after 200 steps, with a seed that no run has.
    """

    label: str
    n_hidden: int
    n_experts: int
    lr: float
    comparison: str = ""

    def toy(self, n_features: int) -> ToyConfig:
        """Its configuration with so many features."""
        gate = "switch" if self.n_experts > 1 else "paper"
        return ToyConfig(n_features, self.n_hidden, self.n_experts, 1, gate, parametrization="small")


ARCHITECTURES = (
    Architecture("dense m=64", 64, 1, 0.01),
    Architecture("MoE 16×4 k=1", 4, 16, 0.03, EQUAL_WIDTH),
    Architecture("MoE 4×64 k=1", 64, 4, 0.03, EQUAL_FLOPS),
)


def features(n: int) -> FeatureConfig:
    """Eight active features per sample, whatever n is."""
    return FeatureConfig(features="power_law", feature_probability=ACTIVE / n, power_law_exponent=EXPONENT)


def planned(
    sizes: Mapping[int, int], steps: int, *, architectures: Sequence[Architecture] = ARCHITECTURES
) -> list[PlannedRun]:
    """Every architecture at every n of ``sizes``, with so many seeds."""
    found = []
    for n, seeds in sizes.items():
        for item in architectures:
            training = TrainConfig(
                steps=steps, batch_size=BATCH, lr=item.lr, schedule="cosine", eps=1e-15, reduction="sum",
                load_balance=LOAD_BALANCE if item.n_experts > 1 else 0.0,
            )  # fmt: skip
            labels = {"stage": "main", "dataset": f"n = {n:,}", "architecture": item.label}
            if item.comparison:
                labels["comparison"] = item.comparison
            found += [PlannedRun(Run(item.toy(n), features(n), training, seed), labels) for seed in range(seeds)]
    return found


def trainer(out: Path) -> Trainer:
    """A trainer whose long runs continue from checkpoints in the run folder, which go when their row is there."""
    return partial(_train, out)


def _train(
    out: Path, group: Sequence[PlannedRun], *, device: str, impl: str, progress: Callable[[int, float], None]
) -> list[Row]:
    from moesaic.bench.measure_large import train_and_measure_large

    rows = []
    for item in group:
        long = item.run.training.steps > CHECKPOINT_EVERY
        checkpoint = out / "checkpoints" / f"{item.run.key}.safetensors" if long else None
        rows.append(train_and_measure_large(item, device=device, progress=progress, checkpoint=checkpoint))
    return rows


def clean(out: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Remove the checkpoints of runs that have a row, and their folder when it is empty."""
    folder = out / "checkpoints"
    for row in rows:
        (folder / f"{row['run_key']}.safetensors").unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _stages(quick: bool, seeds: int | None) -> list[Stage]:
    def count(n: int) -> int:
        return seeds if seeds is not None else SEEDS_OF_LARGEST if quick or n > LARGEST else SEEDS

    def main(_: list[Row]) -> list[PlannedRun]:
        sizes = {n: count(n) for n in (QUICK_SIZES if quick else SIZES)}
        return planned(sizes, QUICK_STEPS if quick else STEPS)

    return [main]


MILLION = TrainerPreset(
    "million",
    "toy models of 1,000 to 1,000,000 features: dense, and mixtures of equal total width and of equal active FLOPs",
    _stages,
    trainer=trainer,
    appended=clean,
    max_models=1,
)
