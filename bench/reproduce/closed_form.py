"""Closed forms of the smallest toy model: n = 2, m = 1, tied, importance (1, r), density s.

The losses, summed over features, of three hand-made solutions (arXiv 2510.23671):

    keep i, drop j, b_j = s/2:   I_j (s/3 − s²/4)        (b_j = 0:  I_j s/3)
    antipodal W = (1, −1), b=0:  (1 + r) s²/6

so antipodal beats dropping the second feature above r = 2s/(4 − 5s), and dropping the first below r = 2/s − 5/2; the
two curves meet at s = 4/7, r = 1. Checked here: the forms by quadrature, the optimum over (W, b), and trained models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from moesaic.bench.reproduce.quadrature import Array, expected_loss, optimum
from moesaic.bench.reproduce.result import Check, Outcome, Reproduction, shown, within

if TYPE_CHECKING:
    from moesaic.bench.plan import Row
    from moesaic.moe import Run, TrainResult

DENSITIES = (0.1, 0.3, 0.5, 0.7, 0.9)
IMPORTANCES = (0.2, 0.6, 1.0, 1.5, 2.5)
QUICK_DENSITIES = (0.1, 0.5, 0.9)
QUICK_IMPORTANCES = (0.2, 1.0, 2.5)


def drop_loss(density: ArrayLike) -> Array:
    """Loss per unit importance of a feature replaced by its mean s/2: s/3 − s²/4."""
    s = np.asarray(density, dtype=np.float64)
    return s / 3 - s**2 / 4


def antipodal_loss(density: ArrayLike, importance: ArrayLike) -> Array:
    """Loss of W = (1, −1), b = 0: (1 + r) s²/6."""
    s = np.asarray(density, dtype=np.float64)
    return np.asarray((1 + np.asarray(importance, dtype=np.float64)) * s**2 / 6)


def best_form(density: ArrayLike, importance: ArrayLike) -> Array:
    """Smallest of the three closed forms at (s, r)."""
    dropped = np.minimum(1.0, np.asarray(importance, dtype=np.float64)) * drop_loss(density)
    return np.minimum(dropped, antipodal_loss(density, importance))


def lower_boundary(density: ArrayLike) -> Array:
    """Importance r = 2s/(4 − 5s) where antipodal and dropping the second feature cost the same."""
    s = np.asarray(density, dtype=np.float64)
    return 2 * s / (4 - 5 * s)


def upper_boundary(density: ArrayLike) -> Array:
    """Importance r = 2/s − 5/2 where antipodal and dropping the first feature cost the same."""
    return 2 / np.asarray(density, dtype=np.float64) - 2.5


def optimum_boundary(density: ArrayLike, *, steps: int = 12) -> Array:
    """Largest r ≤ 1 at each s where no (W, b) beats dropping the second feature, by bisection.

    The optimum is concave in r and the dropped loss is linear, so their gap is zero up to one r and grows beyond it.
    The boundary towards dropping the first feature is the reciprocal: exchanging the features takes r to 1/r.
    """
    s = np.asarray(density, dtype=np.float64)
    low, high = np.zeros_like(s), np.ones_like(s)
    for _ in range(steps):
        middle = 0.5 * (low + high)
        dropped = middle * drop_loss(s)
        beaten = optimum(s, middle, n_random=0).loss < dropped * (1 - 1e-7)
        low, high = np.where(beaten, low, middle), np.where(beaten, middle, high)
    return 0.5 * (low + high)


def formula_checks(allowance: float) -> list[Check]:
    """Largest |quadrature − formula| over a grid of (s, r) at the weights of each closed form."""
    s, r = np.meshgrid(np.linspace(0.025, 1.0, 40), np.linspace(0.1, 2.95, 20), indexing="ij")
    zero, half = np.zeros_like(s), s / 2
    drop_first, drop_second = np.stack([half, zero], axis=-1), np.stack([zero, half], axis=-1)
    cases: dict[str, tuple[ArrayLike, ArrayLike, Array]] = {
        "drop second, b = s/2": ((1.0, 0.0), drop_second, r * drop_loss(s)),
        "drop first, b = s/2": ((0.0, 1.0), drop_first, drop_loss(s)),
        "drop second, b = 0": ((1.0, 0.0), (0.0, 0.0), r * s / 3),
        "drop first, b = 0": ((0.0, 1.0), (0.0, 0.0), s / 3),
        "antipodal, b = 0": ((1.0, -1.0), (0.0, 0.0), antipodal_loss(s, r)),
    }
    return [
        within(f"|quadrature - formula|, {name}", _largest(expected_loss(w, b, s, r), form), 0.0, allowance)
        for name, (w, b, form) in cases.items()
    ]


def _largest(ours: Array, theirs: Array) -> float:
    return float(np.max(np.abs(ours - theirs)))


def _plan(quick: bool, seeds: int) -> list[Run]:
    from moesaic.moe import FeatureConfig, Run, ToyConfig, TrainConfig

    toy = ToyConfig(n_features=2, n_hidden=1, parametrization="tms")
    # Steps and batch of the source's phase diagrams, which train this model.
    training = TrainConfig(steps=5000, batch_size=512, reduction="sum")
    return [
        Run(toy, FeatureConfig(feature_probability=s, importance="last", importance_base=r), training, seed)
        for s in (QUICK_DENSITIES if quick else DENSITIES)
        for r in (QUICK_IMPORTANCES if quick else IMPORTANCES)
        for seed in range(seeds)
    ]


def _columns(result: TrainResult, runs: Sequence[Run]) -> list[dict[str, object]]:
    weight = result.model.weight.detach().double().cpu().numpy()[:, 0, :, 0]
    bias = result.model.bias.detach().double().cpu().numpy()[:, 0]
    losses = expected_loss(
        weight,
        bias,
        [run.features.feature_probability for run in runs],
        [run.features.importance_base for run in runs],
    )
    return [
        {"quadrature_loss": float(loss), "weight": [float(v) for v in w], "bias": [float(v) for v in b]}
        for loss, w, b in zip(losses, weight, bias, strict=True)
    ]


@dataclass(frozen=True)
class Cell:
    """Best seed of one (s, r): ``loss`` is the expected loss at its trained weights."""

    density: float
    importance: float
    loss: float
    weight: tuple[float, float]

    @property
    def represented(self) -> str:
        """Which features the model stores: |W_i| > 0.1."""
        first, second = (abs(value) > 0.1 for value in self.weight)
        if first:
            return "both features" if second else "first only"
        return "second only" if second else "neither"


def best_per_cell(rows: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """The seed with the smallest expected loss at each (s, r), sorted by (s, r)."""
    best: dict[tuple[float, float], Cell] = {}
    for row in rows:
        s, r, loss = float(row["feature_probability"]), float(row["importance_base"]), float(row["quadrature_loss"])
        if (s, r) not in best or loss < best[s, r].loss:
            best[s, r] = Cell(s, r, loss, (float(row["weight"][0]), float(row["weight"][1])))
    return [best[cell] for cell in sorted(best)]


def _trained_checks(cells: Sequence[Cell], targets: dict[str, Any]) -> list[Check]:
    s, r = np.array([cell.density for cell in cells]), np.array([cell.importance for cell in cells])
    losses = np.array([cell.loss for cell in cells])
    to_optimum, to_form = losses / optimum(s, r).loss, losses / best_form(s, r)
    far, high = int(np.argmax(np.abs(to_optimum - 1))), int(np.argmax(to_form))
    limit, ratio = targets["form_relative_allowance"], float(to_form[high])
    return [
        within(
            f"best seed / quadrature optimum, farthest of {len(cells)} cells (s={s[far]:g}, r={r[far]:g})",
            float(to_optimum[far]),
            1.0,
            targets["optimum_relative_allowance"],
        ),
        Check(
            f"best seed / best closed form, highest of {len(cells)} cells (s={s[high]:g}, r={r[high]:g})",
            ratio,
            1.0,
            f"+{limit:g}",
            ratio <= 1 + limit,
        ),
    ]


def _boundary_checks(s: Array, boundary: Array, allowance: float) -> list[Check]:
    """The curves are where the quadrature losses at the forms' weights cross; the optimum's own are only shown."""
    meet = 4 / 7
    density = np.linspace(0.05, meet, 12)
    bias = np.stack([np.zeros_like(density), density / 2], axis=-1)
    # Dropping the second costs r·d and antipodal a0 + r·a1, both linear in r: they cross at r = a0 / (d − a1).
    dropped = expected_loss((1.0, 0.0), bias, density, 1.0)
    a0 = expected_loss((1.0, -1.0), (0.0, 0.0), density, 0.0)
    a1 = expected_loss((1.0, -1.0), (0.0, 0.0), density, 1.0) - a0
    first = expected_loss((0.0, 1.0), bias[:, ::-1], density, 1.0)
    low, high = a0 / (dropped - a1), (first - a0) / a1
    checks = [
        within("boundary r = 2s/(4-5s), largest deviation", _largest(low, lower_boundary(density)), 0.0, allowance),
        within("boundary r = 2/s-5/2, largest deviation", _largest(high, upper_boundary(density)), 0.0, allowance),
        within("boundaries meet at s = 4/7, r", float(low[-1]), float(high[-1]), allowance),
    ]
    for wanted in (0.3, 0.5):
        here = float(np.interp(wanted, s, boundary))
        checks.append(shown(f"optimum's own lower boundary at s={wanted:g}", here, float(lower_boundary(wanted))))
    return checks


def _antipodal_excess() -> Check:
    """How far the antipodal form lies above the optimum where it is the best of the closed forms."""
    s, r = np.meshgrid(np.linspace(0.05, 0.6, 23), np.linspace(0.25, 1.0, 16), indexing="ij")
    form = antipodal_loss(s, r)
    excess = np.where(form <= best_form(s, r), form / optimum(s, r, n_random=0).loss - 1, 0.0)
    at = np.unravel_index(int(np.argmax(excess)), excess.shape)
    return shown(f"antipodal form above the optimum, largest (s={s[at]:.3g}, r={r[at]:.3g})", float(excess[at]))


def draw(s: Array, boundary: Array, cells: Sequence[Cell], folder: Path) -> list[Path]:
    """Boundaries of the closed forms and the optimum (lower ``boundary`` at density ``s``), and the trained cells."""
    from moesaic.bench.palette import DENSE, INK, MOE, MUTED, THIRD
    from moesaic.bench.plot_style import panels, save, style

    meet = 4 / 7
    formula = np.linspace(0.02, meet, 200)
    kinds = {
        "both features": (THIRD, "s"), "first only": (DENSE, "o"), "second only": (MOE, "D"), "neither": (MUTED, "x"),
    }  # fmt: skip
    with style():
        figure, ((axes,),) = panels(1, 1, width=5.6, height=4.2)
        axes.plot(formula, lower_boundary(formula), color=INK, label="closed forms: r = 2s/(4−5s), r = 2/s−5/2, r = 1")
        axes.plot(formula, upper_boundary(formula), color=INK)
        axes.plot((meet, 1.0), (1.0, 1.0), color=INK)
        axes.plot(s, boundary, color=MOE, ls="--", label="optimum over (W, b), by quadrature")
        axes.plot(s, 1 / boundary, color=MOE, ls="--")
        for kind, (colour, marker) in kinds.items():
            here = [(cell.density, cell.importance) for cell in cells if cell.represented == kind]
            if here:
                x, y = zip(*here, strict=True)
                axes.scatter(x, y, 26, color=colour, marker=marker, zorder=3, label=f"trained, best seed: {kind}")
        axes.set(xlabel="density s", ylabel="importance r of the second feature", yscale="log")
        axes.set(xlim=(0, 1), ylim=(0.04, 25))
        axes.set_yticks([0.1, 0.2, 0.5, 1, 2, 5, 10], ["0.1", "0.2", "0.5", "1", "2", "5", "10"])
        axes.set_title("n = 2, m = 1: which features are worth storing")
        axes.text(0.19, 1.3, "both", color=MUTED)
        axes.text(0.72, 0.12, "first only", color=MUTED)
        axes.text(0.72, 7.0, "second only", color=MUTED)
        axes.legend(fontsize=7.5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
        save(figure, folder, "closed-form")
    return [folder / f"closed-form.{kind}" for kind in ("png", "svg")]


def _conclude(rows: list[Row], targets: dict[str, Any], quick: bool, folder: Path) -> Outcome:
    cells = best_per_cell(rows)
    s = np.linspace(0.02, 0.98, 49)
    boundary = optimum_boundary(s)
    checks = formula_checks(targets["formula_allowance"])
    checks += _boundary_checks(s, boundary, targets["boundary_allowance"])
    if cells:
        checks += _trained_checks(cells, targets)
    checks.append(_antipodal_excess())
    return Outcome(checks, draw(s, boundary, cells, folder))


REPRODUCTION = Reproduction(
    name="closed-form",
    description="n = 2, m = 1: closed-form losses and phase boundaries against quadrature and training",
    seeds=8,
    quick_seeds=8,
    max_models=64,
    plan=_plan,
    columns=_columns,
    conclude=_conclude,
)
