"""Whether features pull inputs to the expert that stores them (arXiv 2510.23671, table 1).

n = 100, ten experts of m = 10, one active, p = 0.1, I_i = 0.9^perm(i), no load-balance term; the router starts Xavier
or k-hot (the features split evenly over the experts). For each expert with monosemantic features: the share of 8,192
held-out inputs routed to it (a) as they are, (b) with those features active (clamped to 1), (c) with only those
active. The published values are not available; tested is the direction, (a) < (b) < (c) and k-hot above Xavier, each as
the mean over those experts and then over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.bench.reproduce.result import Check, Outcome, Reproduction, above, mean, shown

if TYPE_CHECKING:
    from moesaic.bench.plan import Row
    from moesaic.moe import Run, TrainResult

ROUTERS = {"default": "xavier router", "k_hot": "k-hot router"}
STAGES = {"unchanged": "inputs unchanged", "active": "its features active", "only": "only its features"}
N_INPUTS = 8192


def _plan(quick: bool, seeds: int) -> list[Run]:
    from moesaic.moe import FeatureConfig, Run, ToyConfig, TrainConfig

    data = FeatureConfig(feature_probability=0.1, importance="permuted", importance_base=0.9)
    return [
        Run(ToyConfig(100, 10, n_experts=10, top_k=1, router_init=router), data, TrainConfig(), seed)
        for router in ROUTERS
        for seed in range(seeds)
    ]


def _columns(result: TrainResult, runs: Sequence[Run]) -> list[dict[str, object]]:
    from moesaic.metrics import expert_specialization, monosemantic
    from moesaic.moe import held_out

    model = result.model
    x = held_out(runs[0], N_INPUTS).to(model.weight.device)
    own = monosemantic(model.weight.detach())
    shares = expert_specialization(lambda inputs: model.route(inputs).ids, x, own)
    return [
        {
            "share_unchanged": shares.unchanged[i].tolist(),
            "share_active": shares.clamped[i].tolist(),
            "share_only": shares.only[i].tolist(),
            "monosemantic_features": own[i].sum(-1).tolist(),
        }
        for i in range(len(runs))
    ]


def expert_shares(row: Row, stage: str) -> list[float]:
    """Shares of a row's experts in a stage, of the experts that have monosemantic features."""
    shares, counts = row[f"share_{stage}"], row["monosemantic_features"]
    if not isinstance(shares, list) or not isinstance(counts, list):
        return []
    return [float(share) for share, count in zip(shares, counts, strict=True) if count]


def summary(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Mean share by router and stage: over experts with monosemantic features, then over seeds that have one."""
    table: dict[str, dict[str, float]] = {}
    for router in ROUTERS:
        mine = [row for row in rows if row["router_init"] == router]
        per_seed = {stage: [mean(expert_shares(row, stage)) for row in mine] for stage in STAGES}
        table[router] = {stage: mean([v for v in values if not math.isnan(v)]) for stage, values in per_seed.items()}
    return table


def _checks(rows: Sequence[Row], limit: float) -> list[Check]:
    table = summary(rows)
    checks = [
        shown(f"share of inputs, {name}, {stage}", table[router][key])
        for router, name in ROUTERS.items()
        for key, stage in STAGES.items()
    ]
    for router, name in ROUTERS.items():
        shares = table[router]
        checks.append(above(f"{name}: active minus unchanged", shares["active"] - shares["unchanged"], limit))
        checks.append(above(f"{name}: only minus active", shares["only"] - shares["active"], limit))
    k_hot, xavier = table["k_hot"], table["default"]
    checks.append(above("k-hot minus xavier, its features active", k_hot["active"] - xavier["active"], limit))
    checks.append(shown("k-hot minus xavier, only its features", k_hot["only"] - xavier["only"]))
    return checks


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Share of inputs of every expert of every seed in the three stages, with the means, one panel per router."""
    from moesaic.bench.palette import INK, MOE, MUTED
    from moesaic.bench.plot_style import panels, save, style

    table = summary(rows)
    with style():
        figure, (axes_row,) = panels(1, 2, width=3.4, height=3.0, sharey=True)
        for axes, (router, name) in zip(axes_row, ROUTERS.items(), strict=True):
            for row in rows:
                if row["router_init"] == router:
                    lines = zip(*(expert_shares(row, stage) for stage in STAGES), strict=True)
                    for shares in lines:
                        axes.plot(range(3), shares, color=MUTED, lw=0.6, alpha=0.4, marker="o", ms=2.5)
            means = [table[router][stage] for stage in STAGES]
            axes.plot(range(3), means, color=MOE, lw=2, marker="D", ms=6, label="mean")
            axes.axhline(0.1, color=INK, lw=0.8, ls=":", label="balanced, 1/E")
            axes.set(title=name, ylim=(-0.03, 1.03))
            axes.set_xticks(range(3), ["unchanged", "its features\nactive", "only its\nfeatures"])
        axes_row[0].set_ylabel("share of inputs routed to the expert")
        axes_row[0].legend(fontsize=8, frameon=False, loc="upper left")
        save(figure, folder, "specialization")
    return [folder / f"specialization.{kind}" for kind in ("png", "svg")]


def _conclude(rows: list[Row], targets: dict[str, Any], quick: bool, folder: Path) -> Outcome:
    have = ", ".join(str(len(expert_shares(row, "unchanged"))) for row in rows)
    notes = [
        "published: not available; only its direction is tested",
        f"experts with monosemantic features, of 10, in each of {len(rows)} models: {have}",
    ]
    return Outcome(_checks(rows, targets["direction_limit"]), draw(rows, folder), notes)


REPRODUCTION = Reproduction(
    name="specialization",
    description="n = 100, E = 10: do an expert's own features route inputs to it? Xavier against k-hot router",
    seeds=5,
    quick_seeds=2,
    max_models=16,
    plan=_plan,
    columns=_columns,
    conclude=_conclude,
)
