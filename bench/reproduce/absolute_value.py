"""Computation in superposition: |x| by ReLU neurons (Elhage et al. 2022, *Toy Models of Superposition*).

h = ReLU(W₁ x), y' = ReLU(W₂ h + b), target y = |x|; x_i = 0 with probability S, else U(−1, 1); n = 100 features of
importance 0.8^i, m = 40 neurons, densities 1 − S as published, and n = 3, m = 6 of equal importance at S = 0.

The paper shows weights, and that neurons are monosemantic at S = 0 and all polysemantic at 1 − S = 0.001; it gives no
numbers, because losses at different S belong to different tasks. Here each loss is compared with the least one without
superposition at the same S (`monosemantic_bound`): neurons that read one feature each and outputs that read only their
own feature's neurons. That takes two neurons for each of the m/2 most important features and leaves the others at their
mean. A loss below it, with more than m/2 features computed, is computation in superposition.

Densities differ in the learning rate, 0.03 √(1 − S), found by the loss of short runs: with rare features a faster one
kills outputs early, a slower one is slow where features are dense. Batch 512, no decay, the rate falls to zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moesaic.bench.reproduce.result import Check, Outcome, Reproduction, above, below, mean, shown, within

if TYPE_CHECKING:
    from moesaic.bench.plan import PlannedRun, Row
    from moesaic.moe import Run

Array = npt.NDArray[np.float64]
N_FEATURES, N_NEURONS = 100, 40
DENSITIES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
QUICK_DENSITIES = (1.0, 0.01)
SMALL, SMALL_SEEDS = (3, 6), 8
BASE = 0.8
STEPS, QUICK_STEPS = 20_000, 1_500
SAMPLES = 2**17
COMPUTED_BELOW = 0.25
"""Unexplained variance of a computed feature. One side of |x| alone leaves 1/2 when features are rare."""
SECOND_ABOVE = 0.2
"""A neuron is polysemantic whose second largest input weight has at least this share of the largest."""


def density_variance(density: npt.ArrayLike) -> Array:
    """Variance p/3 − p²/4 of |x_i|: the loss of a feature that is left at its mean."""
    p = np.asarray(density, dtype=np.float64)
    return p / 3 - p**2 / 4


def one_neuron_variance(density: npt.ArrayLike) -> Array:
    """What is left of `density_variance` by the best affine function of ReLU(x_i), one of the two neurons.

    Var y − Cov(h, y)²/Var h with Cov = p/6 − p²/8, Var h = p/6 − p²/16. The first neuron of a feature always explains
    less than the second, so pairs for the most important features are best.
    """
    p = np.asarray(density, dtype=np.float64)
    return density_variance(p) - np.square(p / 6 - p**2 / 8) / (p / 6 - p**2 / 16)


def monosemantic_bound(variance: npt.ArrayLike, importance: npt.ArrayLike, n_neurons: int) -> float:
    """Least loss Σ_i I_i v_i without superposition: the n_neurons/2 features of largest I_i v_i are exact."""
    left = np.sort(np.asarray(variance, dtype=np.float64) * np.asarray(importance, dtype=np.float64))
    return float(left[: max(0, len(left) - n_neurons // 2)].sum())


def _plan(quick: bool, seeds: int) -> list[Run]:
    from moesaic.moe import FeatureConfig, Run, ToyConfig, TrainConfig

    steps = QUICK_STEPS if quick else STEPS

    def training(density: float) -> TrainConfig:
        return TrainConfig(
            steps=steps, batch_size=512, lr=round(0.03 * math.sqrt(density), 5), schedule="cosine", reduction="sum",
            weight_decay=0.0,
        )  # fmt: skip

    def toy(n: int, m: int) -> ToyConfig:
        return ToyConfig(n, m, tied=False, parametrization="small")

    small = [Run(toy(*SMALL), FeatureConfig(feature_probability=1.0), training(1.0), s) for s in range(SMALL_SEEDS)]
    return small + [
        Run(
            toy(N_FEATURES, N_NEURONS),
            FeatureConfig(feature_probability=p, importance="geometric", importance_base=BASE),
            training(p),
            seed,
        )
        for seed in range(seeds)
        for p in (QUICK_DENSITIES if quick else DENSITIES)
    ]


def train_and_measure(
    group: Sequence[PlannedRun], *, device: str, impl: str, progress: Callable[[int, float], None]
) -> list[Row]:
    """Train a stack of absolute-value models and return their rows; ``impl`` is ``auto`` or ``torch``."""
    from moesaic.moe import importance
    from moesaic.moe.absolute_value import evaluate_absolute_value, train_absolute_value

    runs = [item.run for item in group]
    result = train_absolute_value(runs, device=device, progress=progress)
    losses, variances = (value.numpy() for value in evaluate_absolute_value(result, SAMPLES))
    rows: list[Row] = []
    for i, item in enumerate(group):
        run = item.run
        weigh = importance(run.features, run.toy.n_features).double().numpy()
        divisor = run.toy.n_features if run.training.reduction == "mean" else 1
        loss, bound = float(losses[i] @ weigh), monosemantic_bound(variances[i], weigh, run.toy.n_hidden)
        encoder, decoder = (
            p[i].detach().double().cpu().numpy() for p in (result.model.weight, result.model.decoder)
        )  # fmt: skip
        trained = bool(result.losses[i].isfinite().all()) and math.isfinite(loss)
        rows.append(
            {
                "run_key": run.key,
                "status": "ok" if trained else "failed",
                "error": None if trained else "a loss is not finite",
                **run.flat(), **item.labels,
                "trained_by": "torch",
                "device": device,
                "loss": loss / divisor,
                "train_loss": float(result.losses[i, -100:].double().mean()),
                "unexplained_variance": loss / float(variances[i] @ weigh),
                "bound": bound / divisor,
                "feature_unexplained": [round(float(v), 6) for v in losses[i] / variances[i]],
                "parameters": sum(p[i].numel() for p in result.model.parameters()),
                **neurons(encoder, decoder),
            }
        )  # fmt: skip
    return rows


def neurons(encoder: Array, decoder: Array) -> Row:
    """Columns on the neurons of one model, W₁ᵀ and W₂ (n, m): what they read and how strongly they are read.

    ``input_weight`` (m, n): each neuron's input weights over the largest of them in magnitude, as published;
    ``output_weight`` (m, n): its output weights times that magnitude, so the function is the same;
    ``strength`` (m,): the largest of these; ``features_per_neuron`` (m,): (Σ w²)²/Σ w⁴ of the input weights, 1 for a
    monosemantic neuron; ``second_weight`` (m,): the second largest |w|; ``gain`` (n, 2): slope of an output to its own
    positive and negative input alone, 1 where |x| is computed exactly.
    """
    largest = np.abs(encoder).max(axis=0)
    weight = encoder / np.where(largest > 0, largest, 1.0)
    readout = decoder * largest
    square = np.square(weight)
    total = np.square(square.sum(0))
    spread = total / np.where(total > 0, np.square(square).sum(0), 1.0)
    second = np.sort(np.abs(weight), axis=0)[-2] if len(weight) > 1 else np.zeros_like(largest)
    gains = [(readout * np.maximum(sign * weight, 0)).sum(1) for sign in (1, -1)]
    columns = {
        "input_weight": weight.T, "output_weight": readout.T, "strength": np.abs(readout).max(0),
        "features_per_neuron": spread, "second_weight": second, "gain": np.stack(gains, axis=1),
    }  # fmt: skip
    return {name: np.round(value, 5).tolist() for name, value in columns.items()}


def _float(row: Row, column: str) -> float:
    value = row.get(column)
    return float(value) if isinstance(value, int | float) else math.nan


def by_density(rows: Sequence[Row]) -> dict[float, list[Row]]:
    """Rows of the large models by density, densest first, those of one density by rising held-out loss."""
    found: dict[float, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (-_float(row, "feature_probability"), _float(row, "loss"))):
        if row["n_features"] == N_FEATURES:
            found.setdefault(_float(row, "feature_probability"), []).append(row)
    return found


def small_rows(rows: Sequence[Row]) -> list[Row]:
    """Rows of n = 3, m = 6, lowest held-out loss first."""
    return sorted((row for row in rows if row["n_features"] == SMALL[0]), key=lambda row: _float(row, "loss"))


def over_bound(row: Row) -> float:
    """Held-out loss over that of the best monosemantic model on the same samples."""
    return _float(row, "loss") / _float(row, "bound")


def computed(row: Row) -> int:
    """Number of features whose output leaves less than a quarter of the variance unexplained."""
    left: Any = row["feature_unexplained"]
    return sum(value < COMPUTED_BELOW for value in left)


def polysemantic(row: Row) -> float:
    """Share of the neurons that are polysemantic."""
    second: Any = row["second_weight"]
    return mean([float(value >= SECOND_ABOVE) for value in second])


def farthest_gain(row: Row) -> float:
    """The gain of a model that is farthest from 1."""
    gains: Any = row["gain"]
    return max((float(gain) for pair in gains for gain in pair), key=lambda gain: abs(gain - 1))


def _spread(values: Sequence[float]) -> str:
    return f"{len(values)} seeds: {min(values):.3g} to {max(values):.3g}"


def _checks(rows: Sequence[Row], targets: dict[str, Any], quick: bool) -> list[Check]:
    checks: list[Check] = []
    small, found = small_rows(rows), by_density(rows)
    if small:
        exact = sum(_float(row, "unexplained_variance") <= targets["exact_unexplained"] for row in small)
        name = f"n=3, m=6, S=0: unexplained variance, best of {len(small)} seeds ({exact} within)"
        checks.append(within(name, _float(small[0], "unexplained_variance"), 0.0, targets["exact_unexplained"]))
        name = "n=3, m=6: slope of each output to each side of its own input, farthest from 1"
        checks.append(within(name, farthest_gain(small[0]), 1.0, targets["gain_allowance"]))
        checks.append(below("n=3, m=6: share of polysemantic neurons", polysemantic(small[0]), targets["mixed_dense"]))
    for density, members in found.items():
        best, ratios = members[0], [over_bound(row) for row in members]
        where = f"1-S={density:g}"
        name = f"loss / monosemantic bound, {where}, best of {_spread(ratios)}"
        count = f"features computed, {where}, best seed by loss of {_spread([computed(row) for row in members])}"
        share = f"share of polysemantic neurons, {where}, same seed"
        if density == 1.0 and not quick:
            checks.append(within(name, ratios[0], 1.0, targets["dense_allowance"]))
            checks.append(shown(count, computed(best), N_NEURONS / 2))
            checks.append(below(share, polysemantic(best), targets["mixed_dense"]))
        elif density <= targets["sparse_below"] and not quick:
            checks.append(below(name, ratios[0], targets["sparse_ratio"]))
            checks.append(above(count, computed(best), N_NEURONS / 2))
            checks.append(above(share, polysemantic(best), targets["mixed_sparse"]))
        else:
            checks.append(shown(name, ratios[0], 1.0))
            checks.append(shown(count, computed(best), N_NEURONS / 2))
            checks.append(shown(share, polysemantic(best)))
    return checks


def _no_columns(result: object, runs: Sequence[Run]) -> list[Row]:
    """The trainer gives all columns itself."""
    return [{} for _ in runs]


def _conclude(rows: list[Row], targets: dict[str, Any], quick: bool, folder: Path) -> Outcome:
    from moesaic.bench.reproduce.absolute_value_figures import draw

    notes = [
        "published: pictures of weights, no numbers; the bound of models without superposition is the yardstick here",
        f"computed: less than {COMPUTED_BELOW:g} of the variance of |x_i| unexplained, on {SAMPLES:,} held-out samples",
    ]
    return Outcome(_checks(rows, targets, quick), draw(rows, folder), notes)


REPRODUCTION = Reproduction(
    name="absolute-value",
    description="n = 100, m = 40: |x| computed by ReLU neurons in superposition, over sparsities",
    seeds=3,
    quick_seeds=1,
    max_models=7,
    plan=_plan,
    columns=_no_columns,
    conclude=_conclude,
    trainer=train_and_measure,
)
