"""Features per dimension and loss against feature probability, n = 100 (arXiv 2510.23671, figure 3).

Dense m = 20 and a mixture of four experts of m = 5 with one active: equal total width. Importance 1, mean loss, no
load-balance term, AdamW at 1e-3, batch 1024, 10,000 steps. Features per dimension is the paper's

    Σ_e p_e ‖W^e‖_F² / m,   p_e = (mean gate weight of e)/k,

which for the dense model is ‖W‖_F²/m. Losses are held-out, without the load-balance term.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.bench.reproduce.result import Check, Outcome, Reproduction, load_targets, mean, shown, within

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from moesaic.bench.plan import Row
    from moesaic.moe import Run, TrainResult

N_FEATURES, DENSE_WIDTH = 100, 20
TITLES = {"dense": "dense, m = 20", "moe": "MoE, E = 4, k = 1, m = 5"}
QUICK_PROBABILITIES = (1.0, 0.53, 0.1)
AFFINE = "affine optimum (1 - m/n)/12"
AFFINE_LN_LOSS = math.log((1 - DENSE_WIDTH / N_FEATURES) / 12)


def probabilities() -> tuple[float, ...]:
    """The published feature probabilities, 1 to 0.1."""
    return tuple(load_targets()["features-per-dimension"]["feature_probability"])


def _plan(quick: bool, seeds: int) -> list[Run]:
    from moesaic.moe import FeatureConfig, Run, ToyConfig, TrainConfig

    models = (ToyConfig(N_FEATURES, DENSE_WIDTH), ToyConfig(N_FEATURES, DENSE_WIDTH // 4, n_experts=4, top_k=1))
    return [
        Run(toy, FeatureConfig(feature_probability=p), TrainConfig(), seed)
        for toy in models
        for p in (QUICK_PROBABILITIES if quick else probabilities())
        for seed in range(seeds)
    ]


def _columns(result: TrainResult, runs: Sequence[Run]) -> list[dict[str, object]]:
    return [{} for _ in runs]


def curves(rows: Sequence[Row]) -> dict[str, dict[float, list[Row]]]:
    """Rows by model (``dense``, ``moe``) and feature probability, largest first."""
    found: dict[str, dict[float, list[Row]]] = {"dense": {}, "moe": {}}
    for row in rows:
        model = "dense" if row["n_experts"] == 1 else "moe"
        found[model].setdefault(_float(row, "feature_probability"), []).append(row)
    return {model: dict(sorted(cells.items(), reverse=True)) for model, cells in found.items()}


def _float(row: Row, column: str) -> float:
    value = row[column]
    return float(value) if isinstance(value, int | float) else math.nan


def features(row: Row) -> float:
    """The paper's features per dimension of a row."""
    return _float(row, "features_per_dimension_gate")


def ln_loss(row: Row) -> float:
    """Natural logarithm of the held-out loss of a row."""
    return math.log(_float(row, "loss"))


def _features_checks(found: dict[str, dict[float, list[Row]]], targets: dict[str, Any], quick: bool) -> list[Check]:
    checks = []
    for target in targets["judged"]:
        model, p = target["model"], target["feature_probability"]
        rows = found[model].get(p, [])
        name = f"features/dim, {TITLES[model]}, p={p:g}, mean of {len(rows)} seeds"
        allowance = target["quick_allowance" if quick else "allowance"]
        checks.append(within(name, mean([features(row) for row in rows]), target["value"], allowance))
    published = dict(zip(targets["feature_probability"], targets["moe"]["features_per_dimension"], strict=True))
    for p in (1.0, 0.53, 0.1):
        if p in found["moe"]:
            ours = mean([features(row) for row in found["moe"][p]])
            checks.append(shown(f"features/dim, {TITLES['moe']}, p={p:g}, one published run", ours, published[p]))
    return checks


def _loss_checks(found: dict[str, dict[float, list[Row]]], targets: dict[str, Any], quick: bool) -> list[Check]:
    allowance = targets["quick_ln_loss_allowance" if quick else "ln_loss_allowance"]
    checks = []
    for model, cells in found.items():
        published = dict(zip(targets["feature_probability"], targets[model]["ln_loss"], strict=True))
        for p, rows in cells.items():
            name = f"ln(loss), {TITLES[model]}, p={p:g}, mean of {len(rows)} seeds"
            checks.append(within(name, mean([ln_loss(row) for row in rows]), published[p], allowance))
    full = found["dense"].get(1.0, [])
    name = f"ln(loss), dense, p=1, against the {AFFINE}"
    checks.append(within(name, mean([ln_loss(row) for row in full]), AFFINE_LN_LOSS, allowance))
    return checks


def _curve(axes: Axes, cells: dict[float, list[Row]], value: Callable[[Row], float], colour: str, label: str) -> None:
    values = {p: [value(row) for row in rows] for p, rows in cells.items()}
    middle = [mean(v) for v in values.values()]
    reach = [[m - min(v) for m, v in zip(middle, values.values(), strict=True)]]
    reach += [[max(v) - m for m, v in zip(middle, values.values(), strict=True)]]
    # A line through the three points of a quick run would draw a curve that nobody measured.
    line = "-" if len(values) >= 10 else "none"
    look: dict[str, Any] = {
        "color": colour,
        "marker": "o",
        "ms": 3.5,
        "lw": 1.2,
        "ls": line,
        "elinewidth": 1,
        "capsize": 2,
    }
    axes.errorbar(list(values), middle, reach, label=label, **look)


def draw(found: dict[str, dict[float, list[Row]]], targets: dict[str, Any], folder: Path) -> list[Path]:
    """Our curves (mean over seeds, bars from the lowest to the highest seed) over the published ones."""
    from moesaic.bench.palette import DENSE, INK, MOE, MUTED
    from moesaic.bench.plot_style import panels, save, style

    p = targets["feature_probability"]
    with style():
        figure, ((left, right),) = panels(1, 2, width=3.9, height=3.3)
        for model, colour in (("dense", DENSE), ("moe", MOE)):
            line = "--" if model == "dense" else ":"
            for axes, key, value in ((left, "features_per_dimension", features), (right, "ln_loss", ln_loss)):
                axes.plot(p, targets[model][key], color=INK, lw=1, ls=line, label=f"published: {TITLES[model]}")
                _curve(axes, found[model], value, colour, f"ours: {TITLES[model]}")
        right.plot(1.0, AFFINE_LN_LOSS, "x", color=MUTED, ms=7, label=f"p = 1: {AFFINE}")
        left.set(title="Features per dimension", ylabel=r"$\sum_e\, p_e \Vert W^e\Vert_F^2\, /\, m$")
        right.set(title="ln(held-out mean loss)", ylabel="ln(loss)")
        for axes in (left, right):
            axes.set_xlabel("feature probability p")
            axes.invert_xaxis()
        handles, labels = right.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
        save(figure, folder, "features-per-dimension")
    return [folder / f"features-per-dimension.{kind}" for kind in ("png", "svg")]


def _conclude(rows: list[Row], targets: dict[str, Any], quick: bool, folder: Path) -> Outcome:
    found = curves(rows)
    checks = _features_checks(found, targets, quick) + _loss_checks(found, targets, quick)
    notes = ["published curves: single runs; the published ln(loss) was read off a plot to about 0.02"]
    return Outcome(checks, draw(found, targets, folder), notes)


REPRODUCTION = Reproduction(
    name="features-per-dimension",
    description="n = 100: features per dimension and loss against feature probability, dense and E = 4",
    seeds=5,
    quick_seeds=2,
    max_models=16,
    plan=_plan,
    columns=_columns,
    conclude=_conclude,
)
