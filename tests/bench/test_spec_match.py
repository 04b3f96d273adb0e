from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moesaic.bench.analysis import KINDS, cells, comparisons
from moesaic.bench.plan import InputError, PlannedRun, Row
from moesaic.bench.rates import calibrate_wall, covers
from moesaic.bench.spec import SweepSpec, load_spec, planned_runs
from moesaic.bench.spec_match import MATCHES, dense_toy, nearest_width, quantity, wall_width, width_at_equal
from moesaic.metrics.flops import dense_width_at_equal_flops
from moesaic.moe.config import GATES, Run, ToyConfig, TrainConfig

SPEC: dict[str, Any] = {
    "seeds": 2,
    "run": {"n_features": 64, "gate": "switch", "steps": 5, "batch_size": 32},
    "zip": {"n_experts": [4, 16, 1], "n_hidden": [8, 2, 32]},
    "grid": {"lr": [0.1, 0.2]},
}


def seconds(stacks: dict[Any, list[Run]], device: str, impl: str) -> dict[Any, float]:
    """As if a step took 1 ms per model and 0.1 ms per active hidden unit, and per expert as much as per unit."""
    return {
        name: len(runs) * (1e-3 + 1e-4 * (runs[0].toy.top_k * runs[0].toy.n_hidden + runs[0].toy.n_experts))
        for name, runs in stacks.items()
    }


@pytest.mark.parametrize("name", ["total_width", "active_width", "parameters", "active_flops", "bytes"])
@pytest.mark.parametrize(
    "toy",
    [ToyConfig(64, 8, 4), ToyConfig(64, 2, 16, 4, "oracle"), ToyConfig(20, 3, 5, 2, tied=False, shared_hidden=4)],
)
def test_no_other_width_is_nearer_than_the_matched_one(name: str, toy: ToyConfig) -> None:
    found = width_at_equal(Run(toy, training=TrainConfig(batch_size=32)), name)
    wanted = quantity(toy, 32, name)
    off = {m: abs(quantity(dense_toy(toy, m), 32, name) - wanted) for m in range(1, 200)}
    assert found == min(off, key=lambda m: (off[m], m))


@pytest.mark.parametrize("gate", GATES)
def test_widths_at_equal_flops_are_those_of_the_presets(gate: str) -> None:
    for k in (1, 3):
        toy = ToyConfig(30, 7, 8, k, gate)
        assert width_at_equal(Run(toy), "active_flops") == dense_width_at_equal_flops(toy)


def test_the_nearest_width_is_never_below_one_and_the_smaller_of_two() -> None:
    assert nearest_width(lambda m: 10.0 * m, 1.0) == 1
    assert nearest_width(lambda m: 10.0 * m, 25.0) == 2
    assert nearest_width(lambda m: 10.0 * m, 25.1) == 3
    assert nearest_width(lambda m: float(m), 7.0) == 7


def test_every_mixture_gets_its_dense_run_once_and_planned_ones_are_labelled() -> None:
    plan = planned_runs({**SPEC, "match": {"to": ["total_width", "parameters"]}})
    own, dense = plan[:12], plan[12:]
    assert [p.run for p in own] == [p.run for p in planned_runs(SPEC)]
    moe = [p for p in own if p.run.toy.n_experts > 1]
    assert {(p.run.toy.n_experts, p.labels["match_total_width"], p.labels["match_parameters"]) for p in moe} == {
        (4, 32, 39), (16, 32, 63),
    }  # fmt: skip
    # Dense m = 32 is planned anyhow, for both mixtures; seeds and rates are those of the mixtures.
    assert {p.labels.get("comparison") for p in own if p.run.toy.n_experts == 1} == {"equal total width"}
    assert sorted((p.run.toy.n_hidden, p.run.training.lr, p.run.seed) for p in dense) == [
        (m, lr, seed) for m in (39, 63) for lr in (0.1, 0.2) for seed in (0, 1)
    ]
    assert all(p.labels == {"stage": "main", "comparison": "equal parameters"} for p in dense)
    assert len({p.run.key for p in plan}) == len(plan)


def test_a_dense_run_with_a_gate_that_does_something_is_not_taken_for_the_plain_one() -> None:
    spec = {**SPEC, "run": {**SPEC["run"], "gate": "sigmoid"}, "match": {"to": ["total_width"]}}
    plan = planned_runs(spec)
    assert {p.run.toy.gate for p in plan if "comparison" in p.labels} == {"paper"}


@pytest.mark.parametrize(
    "match", ["total_width", ["total_width"], {"to": "total_width"}, {"to": ["total_width"]}], ids=repr
)
def test_a_match_is_a_name_a_list_or_a_table(match: object) -> None:
    expected = planned_runs({**SPEC, "match": {"to": ["total_width"]}})
    assert planned_runs({**SPEC, "match": match}) == expected
    if not isinstance(match, dict):
        made = SweepSpec(grid={"n_experts": [1, 4]}, match=match).planned()  # type: ignore[arg-type]
        assert made == planned_runs({"grid": {"n_experts": [1, 4]}, "match": {"to": ["total_width"]}})


@pytest.mark.parametrize(("match", "line"), [("width", "match: 'width' is unknown"), (3, "match = 3: must be a name")])
def test_a_wrong_match_names_its_line(match: object, line: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.toml"
    path.write_text(f"seeds = 2\nmatch = {match!r}\n[grid]\nn_experts = [1, 4]\n")
    with pytest.raises(InputError, match=f"spec.toml, line 2: .*{line.split(':')[0]}"):
        load_spec(path)


def test_the_report_compares_what_was_matched() -> None:
    plan = planned_runs({**SPEC, "match": {"to": list(MATCHES)}}, calibration=timings())
    rows: list[Row] = [
        {
            **p.run.flat(), **p.labels, "status": "ok", "unexplained_variance": 0.5 + p.run.seed / 8,
            "total_width": quantity(p.run.toy, 32, "total_width"),
            "active_flops": quantity(p.run.toy, 32, "active_flops"),
        }
        for p in plan
        if p.run.training.lr == 0.1
    ]  # fmt: skip
    found = comparisons(cells(rows))
    widths = {(c.matched_by, c.moe.value("n_experts")): c.dense.value("n_hidden") for c in found}
    assert list(dict.fromkeys(kind for kind, _ in widths)) == list(KINDS)
    assert set(KINDS) == set(MATCHES.values())
    assert (widths["equal parameters", 4], widths["equal active width", 16], widths["equal wall time", 16]) == (
        39,
        2,
        17,
    )


def timings(spec: dict[str, Any] = SPEC) -> dict[str, object]:
    mixtures = [p.run for p in planned_runs(spec) if p.run.toy.n_experts > 1]
    return calibrate_wall(
        mixtures,
        device="cpu",
        impl="auto",
        max_models=64,
        say=lambda line: None,
        measure=seconds,  # type: ignore[arg-type]
    )


def test_widths_of_equal_wall_time_follow_from_stored_timings_alone() -> None:
    stored = timings()
    runs = {p.run.toy.n_experts: p.run for p in planned_runs(SPEC)}
    # k·m + E = m' + 1 in the made-up clock, and lines between its points are exact.
    assert [wall_width(stored)(runs[e]) for e in (4, 16)] == [11, 17]
    assert covers(stored, [runs[4], runs[16]], "cpu", "auto")
    assert not covers(stored, [runs[4]], "cuda", "auto")
    assert not covers(stored, [Run()], "cpu", "auto")
    damaged: list[object] = [None, {}, [], {"device": "cpu"}]
    assert not any(covers(one, [runs[4]], "cpu", "auto") for one in damaged)


def test_stacks_of_the_calibration_are_those_of_the_sweep_and_widths_go_on_until_one_is_slower() -> None:
    asked: list[tuple[str, int, int]] = []

    def slow(stacks: dict[Any, list[Run]], device: str, impl: str) -> dict[Any, float]:
        asked.extend((name[0], runs[0].toy.n_hidden, len(runs)) for name, runs in stacks.items())
        return {n: 5.0 if n[0] == "moe" else runs[0].toy.n_hidden / 100 for n, runs in stacks.items()}

    mixtures = [p.run for p in planned_runs(SPEC) if p.run.toy.n_experts > 1]
    arguments: dict[str, Any] = {"device": "cpu", "impl": "auto", "say": lambda line: None}
    stored: Any = calibrate_wall(mixtures, max_models=3, measure=slow, **arguments)  # type: ignore[arg-type]
    assert {count for _, _, count in asked} == {3}
    assert max(m for side, m, _ in asked if side == "dense") == 512
    (family,) = stored["seconds_per_step"].values()
    assert family["moe"] == dict.fromkeys(family["moe"], 5.0 / 3)
    assert wall_width(stored)(mixtures[0]) == 500
    with pytest.raises(InputError, match="leave wall out"):
        calibrate_wall(
            mixtures, max_models=3, measure=lambda s, d, i: {n: float(n[0] == "moe") for n in s}, **arguments
        )


def test_a_slower_narrow_width_does_not_make_seconds_fall() -> None:
    stored: Any = timings()
    (family,) = stored["seconds_per_step"].values()
    family["dense"] = {"1": 0.5, "8": 5.0, "16": 2.0, "32": 10.0}
    family["moe"] = dict.fromkeys(family["moe"], 7.5)
    # Width 16 counts as 5 s, so that half the way from there to 10 s is half the way to width 32.
    assert wall_width(stored)(planned_runs(SPEC)[0].run) == 24


def test_without_timings_wall_is_left_out() -> None:
    plan: list[PlannedRun] = planned_runs({**SPEC, "match": {"to": ["wall"]}})
    assert [p.run for p in plan] == [p.run for p in planned_runs(SPEC)]
