from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from moesaic.bench.plan import PlannedRun, Row, unique
from moesaic.bench.tradeoff import DATASETS, FULL, QUICK, TRADEOFF, TUNING_SEED, architectures
from moesaic.metrics.flops import count_flops
from moesaic.moe import ToyConfig


def width(toy: ToyConfig) -> int:
    return toy.n_experts * toy.n_hidden + toy.shared_hidden


def flops(toy: ToyConfig) -> int:
    total = count_flops(toy).training.active.total
    assert total is not None
    return total


def result(item: PlannedRun, loss: float | None) -> Row:
    return {
        **item.run.flat(), **item.labels,
        "status": "failed" if loss is None else "ok", "unexplained_variance": loss,
    }  # fmt: skip


@pytest.mark.parametrize("quick", [False, True])
def test_stages_have_equal_architectures_and_disjoint_seeds(quick: bool) -> None:
    tune, main = TRADEOFF.stages(quick, None)
    first = tune([])
    second = main([result(item, 0.5) for item in first])
    for plan in (first, second):
        assert unique(plan) == plan
        assert {item.run.training.reduction for item in plan} == {"sum"}
        assert {item.run.training.schedule for item in plan} == {"cosine"}
        assert {item.run.training.batch_size for item in plan} == {256}
        assert {(item.run.toy.n_features, item.run.toy.parametrization) for item in plan} == {(128, "small")}
        assert all(item.run.features == DATASETS[str(item.labels["dataset"])] for item in plan)
    names = [(item.labels["dataset"], item.labels["architecture"]) for item in second]
    assert set(names) == {(item.labels["dataset"], item.labels["architecture"]) for item in first}
    assert set(Counter(names).values()) == {3}
    assert {item.run.seed for item in first} == {TUNING_SEED}
    assert {item.run.seed for item in second} == {0, 1, 2}
    assert {item.run.training.steps for item in second} == {400 if quick else 2000}


def test_the_full_grid_is_the_issues() -> None:
    found = architectures(FULL)
    grid = [item.toy for item in found if item.slice == "grid"]
    dense = {toy.n_hidden for toy in grid if toy.n_experts == 1}
    moe = {(toy.n_experts, toy.n_hidden, toy.top_k) for toy in grid if toy.n_experts > 1}
    assert dense >= {4, 8, 12, 16, 24, 64}
    assert moe == {(4, 16, 1), (16, 4, 1), (16, 4, 2), (16, 4, 4), (64, 1, 4)}
    sliced = [item for item in found if item.slice == "gates"]
    assert {item.datasets for item in sliced} == {("C",)}
    assert {item.toy.gate for item in sliced} | {toy.gate for toy in grid if toy.n_experts > 1} == {
        "paper", "switch", "sigmoid", "straight_through", "random", "oracle",
    }  # fmt: skip
    assert any(item.toy.shared_hidden for item in sliced)


@pytest.mark.parametrize("scale", [FULL, QUICK])
def test_every_moe_has_total_width_64_and_a_dense_partner_of_equal_flops(scale: object) -> None:
    found = architectures(FULL if scale is FULL else QUICK)
    dense = [item.toy for item in found if item.toy.n_experts == 1]
    for item in found:
        if item.toy.n_experts > 1:
            assert width(item.toy) == 64
        if item.toy.n_experts > 1 and item.slice == "grid":
            off = [abs(flops(toy) / flops(item.toy) - 1) for toy in dense]
            step = flops(replace(dense[0], n_hidden=1)) / flops(item.toy)
            assert min(off) <= step / 2


def test_partners_are_labelled_with_what_they_match() -> None:
    labels = {item.label: item.comparison for item in architectures(FULL)}
    assert labels["dense m=64"] == "equal total width"
    assert labels["dense m=18"] == "equal active FLOPs as MoE 4×16 k=1"
    assert labels["dense m=4"] == ""


def test_the_main_stage_takes_each_architectures_best_rate_on_each_data_set() -> None:
    tune, main = TRADEOFF.stages(False, 1)
    best = {("C", "dense m=8"): 0.03, ("D", "dense m=8"): 0.003}
    rows = []
    for item in tune([]):
        key = (str(item.labels["dataset"]), str(item.labels["architecture"]))
        rows.append(result(item, 0.1 if item.run.training.lr == best.get(key, 0.01) else 0.2))
    chosen = {(item.labels["dataset"], item.labels["architecture"]): item.run.training.lr for item in main(rows)}
    assert chosen.pop(("C", "dense m=8")) == 0.03
    assert chosen.pop(("D", "dense m=8")) == 0.003
    assert set(chosen.values()) == {0.01}


def test_an_architecture_whose_tuning_failed_is_still_run() -> None:
    tune, main = TRADEOFF.stages(True, 2)
    plan = main([result(item, None) for item in tune([])])
    assert {item.run.training.lr for item in plan} == {0.01}
    assert {item.run.seed for item in plan} == {0, 1}


def test_the_grid_is_the_published_model() -> None:
    assert {item.toy.gate for item in architectures(FULL) if item.toy.n_experts > 1 and item.slice == "grid"} == {
        "paper"
    }
