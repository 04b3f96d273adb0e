"""``sweep middle-path``: mixtures at equal active FLOPs between two dense models, and what is said of them."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moesaic.bench import report_middle_path
from moesaic.bench.analysis import cells
from moesaic.bench.middle_path import (
    DATASETS,
    DENSE_WIDTH,
    FULL,
    MIDDLE_PATH,
    QUICK,
    SLICE,
    architectures,
    mixture,
    partners,
)
from moesaic.bench.models import MODEL
from moesaic.bench.plan import PlannedRun, Row
from moesaic.bench.report import result_table, write_report
from moesaic.bench.store import RunStore
from moesaic.metrics import count_flops
from moesaic.moe import FeatureConfig, Run, ToyConfig, TrainConfig


def flops(toy: ToyConfig) -> int:
    total = count_flops(toy).training.active.total
    assert total is not None
    return total


def test_every_mixture_has_the_active_flops_of_one_dense_model() -> None:
    goal = flops(ToyConfig(128, DENSE_WIDTH))
    found = [item.toy for item in architectures(FULL) if item.toy.n_experts > 1]
    assert {(toy.n_experts, toy.top_k) for toy in found} == {(e, k) for e in FULL.experts for k in FULL.active}
    for toy in found:
        # A width of half a unit is what rounding may cost.
        assert abs(flops(toy) / goal - 1) < 0.5 / DENSE_WIDTH
        assert partners(toy)[0] == DENSE_WIDTH
    for e in FULL.experts:
        shared = [mixture(e, 1, share).shared_hidden for share in FULL.shares]
        assert shared == sorted(set(shared))
        assert shared[0] == 0


def test_both_dense_models_of_every_mixture_are_in_the_plan() -> None:
    for scale in (FULL, QUICK):
        found = architectures(scale)
        dense = {item.toy.n_hidden for item in found if item.toy.n_experts == 1}
        assert dense == {width for item in found if item.toy.n_experts > 1 for width in partners(item.toy)}
        assert {item.slice for item in found} == {SLICE}
        assert scale.seeds >= 5


def test_stages_tune_on_a_seed_that_no_result_uses() -> None:
    tune, main = MIDDLE_PATH.stages(True, None)
    first = tune([])
    rows: list[Row] = [
        {**item.run.flat(), **item.labels, "status": "ok", "unexplained_variance": item.run.training.lr}
        for item in first
    ]
    second = main(rows)
    assert {item.run.seed for item in second} == set(range(5))
    assert not {item.run.seed for item in first} & {item.run.seed for item in second}
    assert {item.run.training.lr for item in second} == {min(QUICK.rates)}
    assert {item.run.features for item in second} == {DATASETS[name] for name in QUICK.datasets}


TOY = replace(mixture(4, 1, 0.5), n_features=128)
NARROW, WIDE = partners(TOY)


def rows(losses: dict[int, list[float]], mine: list[float]) -> list[Row]:
    """Rows of the two dense models and the mixture, a loss per seed."""
    toys = {width: ToyConfig(128, width, parametrization="small") for width in losses}
    found: list[Row] = []
    for toy, values in [*((toys[width], losses[width]) for width in losses), (TOY, mine)]:
        name = f"dense m={toy.n_hidden}" if toy.n_experts == 1 else "MoE mixture"
        for seed, loss in enumerate(values):
            item = PlannedRun(Run(toy, FeatureConfig(), TrainConfig(), seed))
            labels: Row = {"dataset": "S", "architecture": name, "slice": SLICE, "stage": "main", "status": "ok"}
            found.append({
                **item.run.flat(), **labels, "run_key": item.run.key, "unexplained_variance": loss, "loss": loss,
                "mean_dimensionality": 0.25, "active_flops": flops(toy), "total_width": count_flops(toy).total_width,
                "usage": [1 / toy.n_experts] * toy.n_experts, "effective_experts": toy.n_experts,
                "dimensionality_histogram": [1] * 50, "features_per_dimension": 2.0, "wall_s": 1.0,
            })  # fmt: skip
    return found


def only(found: list[Row]) -> report_middle_path.Mixture:
    (one,) = report_middle_path.mixtures(cells(found))
    return one


def test_recovered_is_the_fraction_of_the_gap_by_seed() -> None:
    one = only(rows({NARROW: [0.9, 1.0, 1.1], WIDE: [0.1, 0.2, 0.3]}, [0.5, 0.4, 0.7]))
    assert one.recovered_by_seed == pytest.approx({0: 0.5, 1: 0.75, 2: 0.5})
    assert one.recovered.mean == pytest.approx(7 / 12)
    assert one.saved == pytest.approx(1 - flops(TOY) / flops(ToyConfig(128, WIDE)))
    assert one.share == pytest.approx(TOY.shared_hidden / (TOY.shared_hidden + TOY.n_hidden))


def test_a_gap_that_is_not_resolved_has_no_fraction() -> None:
    one = only(rows({NARROW: [0.9, 0.1, 0.5], WIDE: [0.1, 0.9, 0.5]}, [0.5, 0.5, 0.5]))
    assert one.recovered_by_seed == {}
    assert one.recovered.n == 0
    assert "no gap" in report_middle_path.section([one])
    assert "no gap" in "\n".join(report_middle_path.lines([one]))


@pytest.mark.parametrize(
    ("mine", "answer"),
    [
        ([0.2, 0.21, 0.2], "yes"),
        ([0.8, 0.8, 0.81], "no;"),
        ([0.1, 0.9, 0.3], "not resolved (1 of 1 intervals reach beyond 50%)"),
    ],
)
def test_the_answer_needs_most_of_both_with_the_whole_interval(mine: list[float], answer: str) -> None:
    one = only(rows({NARROW: [1.0, 1.0, 1.0], WIDE: [0.1, 0.1, 0.1]}, mine))
    text = report_middle_path.words([one])
    assert one.saved > 0.5
    assert f"On S, {answer}" in text
    assert "mean D_i 0.25, 0.25, 0.25" in text


def test_without_a_gap_or_an_interval_there_is_no_verdict() -> None:
    unresolved = only(rows({NARROW: [0.9, 0.1, 0.5], WIDE: [0.1, 0.9, 0.5]}, [0.5, 0.5, 0.5]))
    one_seed = only(rows({NARROW: [1.0], WIDE: [0.1]}, [0.8]))
    for one in (unresolved, one_seed):
        assert "On S there is no resolved gap to recover." in report_middle_path.words([one])


def test_the_figure_shows_what_beats_the_wide_model_and_what_is_far_below(tmp_path: Path) -> None:
    above = rows({NARROW: [1.0, 1.0, 1.01], WIDE: [0.5, 0.5, 0.51]}, [0.1, 0.1, 0.11])
    below = [
        {**row, "dataset": "C"} for row in rows({NARROW: [1.0, 1.0, 1.01], WIDE: [0.5, 0.5, 0.51]}, [9.0, 9.1, 9.0])
    ]
    (drawn,) = report_middle_path.figures(report_middle_path.mixtures(cells([*above, *below])), tmp_path)
    assert "1.75" in drawn.svg  # of an axis that reaches the mixture at 1.8, which it would not up to 1.12
    assert drawn.svg.count("Triangles") == 0
    assert "Triangles at the lower edge: below -2" in drawn.caption


def test_the_report_has_figure_table_and_words(tmp_path: Path) -> None:
    found = rows({NARROW: [1.0, 1.0, 1.1], WIDE: [0.1, 0.1, 0.15]}, [0.5, 0.4, 0.45])
    for i in (0, 3, 6):
        found[i][MODEL] = {"losses": np.ones(9, np.float32), "weight": np.ones((1, 128, 2), np.float32)}
    RunStore(tmp_path).append(found)
    page = write_report(tmp_path).read_text()
    assert "Mixtures between two dense models" in page
    assert "Is there a mix of shared and routed capacity" in page
    assert (tmp_path / "figures" / "middle_path.png").stat().st_size > 10_000
    inside = {"usage", "dimensionality", "features_per_dimension", "losses", "weights-1"}
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"middle_path"} | inside
    assert re.search(r"MoE mixture</td>.*<td[^>]*>yes</td></tr>", page)
    assert "MoE against dense at" not in page
    assert "mixture" in result_table(found)
    assert not math.isnan(only(found).saved)
