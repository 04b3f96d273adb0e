"""``bench energy``: matched widths, whole trainings to equal loss, rows with joules and rows without."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moesaic.bench import bench_energy, energy_cases
from moesaic.bench.bench_energy import Measured, gaps
from moesaic.bench.energy_cases import (
    EQUAL_FLOPS,
    EQUAL_PARAMETERS,
    EQUAL_WIDTH,
    MASKED,
    MULTIPLE,
    STEPS,
    TOYS,
    LayerCase,
    Masked,
    Work,
    layer_works,
    step_works,
)
from moesaic.bench.energy_training import EQUAL_LOSS, Budget, to_equal_loss, training_works
from moesaic.bench.energy_windows import long_enough, steps_per_call
from moesaic.bench.interleave import Timing
from moesaic.bench.kernel_bench import Options, run_bench
from moesaic.bench.plan import PlannedRun, Row
from moesaic.metrics import count_flops, energy
from moesaic.metrics.energy import EnergyResult
from moesaic.moe import MoE

TOY = TOYS[1]
METER: Any = SimpleNamespace(scope="gpu_board")
CASE = LayerCase(64, 32, 48, 6, 2, "float32")


def test_a_dense_layer_is_matched_to_half_a_multiple() -> None:
    widths = CASE.widths()
    moe = MoE(CASE.d_model, CASE.d_ff, CASE.n_experts, CASE.top_k)
    parameters = sum(p.numel() for p in moe.parameters())
    active = 2 * CASE.d_model * (3 * CASE.top_k * CASE.d_ff + CASE.n_experts)
    half = MULTIPLE / 2
    assert widths[EQUAL_WIDTH] == CASE.n_experts * CASE.d_ff
    assert abs(3 * CASE.d_model * widths[EQUAL_PARAMETERS] - parameters) <= 3 * CASE.d_model * half
    assert abs(6 * CASE.d_model * widths[EQUAL_FLOPS] - active) <= 6 * CASE.d_model * half


def test_a_toy_model_is_matched_to_the_nearest_width() -> None:
    widths = TOY.widths()
    wanted = count_flops(TOY.toy).parameters or 0

    def off(width: int) -> int:
        return abs((count_flops(TOY.dense(width)).parameters or 0) - wanted)

    width = widths[EQUAL_PARAMETERS]
    assert off(width) < min(off(width - 1), off(width + 1))
    assert widths[EQUAL_WIDTH] == TOY.toy.n_experts * TOY.toy.n_hidden
    assert TOY.dense(3).shared_hidden == 0


def test_all_sides_of_a_layer_get_the_same_data_and_the_masked_one_is_the_moe() -> None:
    forward, both = layer_works(CASE, "cpu")
    assert [work.is_sparse for work in forward] == [True, *[False] * (len(forward) - 1)]
    assert {kind for work in forward for kind in work.matched_by.split("; ")} == {
        "", EQUAL_WIDTH, EQUAL_PARAMETERS, EQUAL_FLOPS, MASKED,
    }  # fmt: skip
    by_name = {work.name: work for work in forward}
    sparse = by_name["MoE 6×48 k=2"].call()
    masked = by_name["masked 288"].call()
    assert isinstance(sparse, torch.Tensor)
    assert isinstance(masked, torch.Tensor)
    torch.testing.assert_close(sparse, masked, rtol=1e-4, atol=1e-5)
    for one, other in zip(forward, both, strict=True):
        assert other.flops == 3 * (one.flops or math.nan)
        assert other.bytes is not None
        assert one.bytes is not None
        assert other.bytes > one.bytes
    moe = by_name["MoE 6×48 k=2"]
    assert moe.flops == 2 * CASE.d_model * (3 * CASE.top_k * CASE.d_ff + CASE.n_experts)
    assert moe.dense_equivalent_flops == 2 * CASE.d_model * CASE.n_experts * (3 * CASE.d_ff + 1)
    assert moe.executed_flops is not None
    assert moe.executed_flops >= moe.flops
    dense = by_name["dense 288"]
    assert dense.flops == dense.executed_flops == dense.dense_equivalent_flops


def test_a_step_has_useful_executed_and_dense_equivalent_flops() -> None:
    sparse, *dense = step_works(TOY, "cpu", quick=True)
    toy = TOY.toy
    losses = sparse.call()
    assert isinstance(losses, tuple)
    assert losses[0].numel() == sparse.units == 4 * STEPS["cpu"]
    assert sparse.flops is not None
    assert sparse.executed_flops is not None
    assert sparse.dense_equivalent_flops == count_flops(toy, samples=256).training.dense_equivalent.total
    assert sparse.flops <= sparse.executed_flops
    for one in dense:
        assert one.executed_flops is not None
        assert one.flops == one.dense_equivalent_flops
        assert one.executed_flops >= (one.flops or math.inf)


def test_a_wrong_masked_layer_stops_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Masked.forward
    monkeypatch.setattr(Masked, "forward", lambda self, x: 1.01 * right(self, x))
    with pytest.raises(RuntimeError, match="masked dense products differ by 1"):
        next(layer_works(CASE, "cpu"))


BUDGET = Budget((100, 200, 400), (0.1, 0.2, 0.3), (2, 40, 50), 2)


def trainer(losses: Mapping[int, float], fails: int = -1) -> Any:
    """A fake trainer: losses fall as 1 / steps and are lowest at a rate of .2; one seed of ``fails`` has none."""

    def train(group: Sequence[PlannedRun]) -> list[Row]:
        rows: list[Row] = []
        for item in group:
            toy, training = item.run.toy, item.run.training
            scale = 100.0 if toy.n_experts > 1 else losses.get(toy.n_hidden, 1e9)
            loss: float | None = scale / training.steps * (1 + abs(training.lr - 0.2))
            if toy.n_hidden == fails and item.run.seed == 1:
                loss = None
            rows.append({"run_key": item.run.key, "unexplained_variance": loss})
        return rows

    return train


def test_steps_to_the_target_are_the_fewest_whole_training_that_gets_there() -> None:
    widths = TOY.widths()
    losses = {widths[EQUAL_WIDTH]: 25.0, widths[EQUAL_FLOPS]: 101.0, 50: 25.0, 40: 100.0, 2: 1000.0}
    found = to_equal_loss(TOY, BUDGET, trainer(losses))
    assert found.target == pytest.approx(100 / 400)
    steps = {toy.n_hidden: one.steps if one else None for toy, one in found.reached.items()}
    assert steps[widths[EQUAL_WIDTH]] == 100
    assert steps[50] == 100
    assert steps[40] == 400  # narrower than the one above, and costs more
    assert steps[2] is None
    assert steps[widths[EQUAL_FLOPS]] is None
    assert found.matched_by[TOY.dense(50)] == EQUAL_LOSS
    assert found.matched_by[TOY.dense(2)] == ""
    assert {one.lr for one in found.attempts} == {0.2}
    assert not any(one.at_edge for one in found.attempts)
    names = [work.name for work in training_works(TOY, found, BUDGET, "cpu")]
    assert names == [
        f"MoE 16×{TOY.toy.n_hidden} k=2, 400 steps",
        f"dense m={widths[EQUAL_WIDTH]}, 100 steps",
        "dense m=50, 100 steps",
    ]
    (null,) = [row for row in bench_energy.null_rows(TOY, found) if row["matched_by"] == EQUAL_FLOPS]
    assert null["j_to_target_loss"] is None
    assert null["not_measured"] == "the target loss was not reached"


def test_a_failed_seed_does_not_reach_the_target() -> None:
    width = TOY.widths()[EQUAL_WIDTH]
    found = to_equal_loss(TOY, BUDGET, trainer({width: 25.0, 50: 50.0}, fails=width))
    assert found.reached[TOY.dense(width)] is None


def work(name: str, kind: str, flops: float) -> Work:
    return Work("layer", "case", name, kind, "token", 10.0, lambda: None, flops, 7.0)


def metered(joules: float, *, valid: bool = True) -> EnergyResult:
    return EnergyResult(
        joules=joules, trial_joules=(joules, joules), cv=0.01, power_w=300.0, idle_w=70.0,
        valid=valid, scope="gpu_board",
    )  # fmt: skip


def test_rows_hold_joules_per_unit_and_null_where_not_valid() -> None:
    timing = Timing(1, (1.0, 2.0, 3.0))
    row = Measured(work("MoE", "", 20.0), timing, metered(5.0), 10.0).row()
    assert (row["j_per_token"], row["j_per_step"], row["j_to_target_loss"]) == (0.5, None, None)
    assert (row["seconds"], row["flops"], row["useful_flops_per_s"], row["useful_flops_per_j"]) == (
        0.2,
        20.0,
        100.0,
        40.0,
    )
    assert (row["power_w"], row["idle_w"], row["valid"]) == (300.0, 70.0, True)
    spread = Measured(work("MoE", "", 20.0), timing, metered(5.0, valid=False), 10.0).row()
    assert (spread["j_per_token"], spread["useful_flops_per_j"], spread["valid"]) == (None, None, False)
    assert (spread["scope"], row["not_measured"]) == ("gpu_board", None)
    assert spread["not_measured"] == "not valid: trials vary by 1.0%, less than 2 % is"
    none = Measured(work("MoE", "", 20.0), timing, None, 10.0, "no meter").row()
    assert (none["j_per_token"], none["power_w"], none["not_measured"]) == (None, None, "no meter")
    json.dumps(row)


def test_a_training_too_long_for_a_window_is_metered_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    called: dict[str, list[int]] = {"long": [], "short": []}

    def side(name: str, seconds: float) -> Work:
        return Work(
            "toy model, training to equal loss", "case", name, "" if name == "long" else EQUAL_LOSS, "training", 3.0,
            lambda: called[name].append(400), 1.0, 1.0, steps=400,
            part=lambda steps: lambda: called[name].append(steps),
        )  # fmt: skip

    def compare(works: Mapping[str, Any], *, meter: object, duration_s: float, **_: float) -> dict[str, EnergyResult]:
        assert duration_s == 2.0
        for one in works.values():
            one()
        return {name: metered(6.0) for name in works}

    timings = {"long": Timing(1, (4.0, 4.0)), "short": Timing(1, (0.04, 0.04))}
    monkeypatch.setattr(bench_energy, "interleave", lambda *_, **__: timings)
    monkeypatch.setattr(energy, "compare_energy", compare)
    options = Options((), "cpu", True, print)
    long, short = bench_energy.measure([side("long", 4.0), side("short", 0.04)], options, METER)
    assert called == {"long": [5], "short": [400]}
    assert long.joules == pytest.approx((6.0 / 3 * 400 / 5,) * 2)
    assert short.joules == pytest.approx((6.0 / 3,) * 2)
    assert long.row()["seconds"] == 4.0 / 3


def test_a_meter_that_refuses_is_a_reason_and_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise ValueError("windows differ")

    monkeypatch.setattr(bench_energy, "interleave", lambda *_, **__: {"MoE": Timing(1, (1.0,))})
    monkeypatch.setattr(energy, "compare_energy", refuses)
    (one,) = bench_energy.measure([work("MoE", "", 20.0)], Options((), "cpu", True, print), METER)
    assert one.row()["not_measured"] == "windows differ"
    assert one.row()["j_per_token"] is None


def test_windows_grow_with_a_layer_that_takes_long() -> None:
    windows = {"duration_s": 2.0, "trials": 3}
    assert long_enough(windows, 0.01) == windows
    assert long_enough(windows, 0.5) == {"duration_s": 20.0, "trials": 3}
    assert steps_per_call(400, 1e6, windows) == 1


def test_a_dense_side_matched_in_two_ways_is_compared_twice() -> None:
    timing = Timing(1, (1.0, 2.0, 3.0))
    found = [
        Measured(work("MoE", "", 20.0), timing, metered(5.0), 10.0),
        Measured(work("dense", f"{EQUAL_WIDTH}; {EQUAL_PARAMETERS}", 80.0), timing, metered(15.0), 10.0),
    ]
    compared = gaps(found)
    assert [one.matched_by for one in compared] == [EQUAL_WIDTH, EQUAL_PARAMETERS]
    for one in compared:
        assert {name: value and value.median for name, value in one.factors.items()} == {
            "flops": 4.0, "bytes": 1.0, "seconds": 1.0, "joules": 3.0,
        }  # fmt: skip


def test_the_command_writes_rows_tables_and_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy_cases, "QUICK_LAYERS", {"cpu": (CASE,)})
    monkeypatch.setattr(bench_energy, "QUICK_LAYERS", {"cpu": (CASE,)})
    monkeypatch.setattr(bench_energy, "QUICK", Budget((3,), (0.01, 0.03), (), 2))
    monkeypatch.setattr(bench_energy, "QUICK_LEAST_S", 0.0)
    monkeypatch.setattr(energy, "find_meter", lambda kind="auto", *, device=None: SimpleNamespace(scope="gpu_board"))
    monkeypatch.setattr(
        energy, "compare_energy", lambda works, *, meter, **_: {name: metered(i + 1.0) for i, name in enumerate(works)}
    )
    result = run_bench("energy", tmp_path, quick=True, device="cpu")
    rows = result.record["rows"]
    assert {row["subject"] for row in rows} == {
        "layer, forward", "layer, forward + backward", "toy model, training step", "toy model, training to equal loss",
    }  # fmt: skip
    assert {row["j_per_token"] for row in rows if row["unit"] == "token"} > {1 / 64, 2 / 64}
    assert result.record["not_measured"] is None
    assert {row["unit"] for row in rows if row["of_the_roof"]} == {"token"}
    assert (tmp_path / "figures" / "bench-energy-roofline.svg").exists()
    assert (tmp_path / "figures" / "bench-energy.png").stat().st_size > 10_000
    assert "| matched by | sparse / dense |" in (tmp_path / "bench-energy.md").read_text()
    assert "held-out unexplained variance" in result.text
