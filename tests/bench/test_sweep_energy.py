"""``sweep --energy``: seconds always, joules where a meter is, in the rows that belong to them and nowhere else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moesaic.bench import sweep_energy
from moesaic.bench.analysis import cells
from moesaic.bench.interleave import Timing
from moesaic.bench.plan import InputError, Preset, Row
from moesaic.bench.presets import PRESETS
from moesaic.bench.report import write_report
from moesaic.bench.report_energy import EQUAL_LOSS, costs, gaps
from moesaic.bench.spec import spec_preset
from moesaic.bench.store import RunStore
from moesaic.bench.sweep import run_sweep
from moesaic.metrics import energy
from moesaic.metrics.energy import EnergyResult

REASON = "nvml: no such thing here"
SPEC: dict[str, Any] = {
    "seeds": 2,
    "run": {"n_features": 12, "steps": 20, "batch_size": 16, "parametrization": "small"},
    "zip": {"n_hidden": [2, 8, 10, 4], "n_experts": [1, 1, 1, 2]},
}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("swept")
    run_sweep(spec_preset(SPEC), out, device="cpu", impl="torch", progress=False)
    return out


@pytest.fixture(autouse=True)
def one_training_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_energy, "LEAST_S", 0.0)
    monkeypatch.setattr(sweep_energy, "steps_per_call", lambda steps, seconds, windows: steps)


@pytest.fixture
def folder(swept: Path, tmp_path: Path) -> Path:
    for name in ("runs.jsonl", "environment.json"):
        (tmp_path / name).write_bytes((swept / name).read_bytes())
    return tmp_path


def no_meter(kind: str = "auto", *, device: str | None = None) -> str:
    return REASON


def measure(folder: Path, say: Callable[[str], None] = print, **options: Any) -> RunStore:
    store = RunStore(folder)
    sweep_energy.measure_sweep(store, device="cpu", impl="torch", quick=True, say=say, **options)
    return store


def metered(results: Callable[[str], EnergyResult]) -> Any:
    """What stands in for `compare_energy`: a result by name, after calling each workload once."""

    def compare(works: Mapping[str, Callable[[], object]], *, meter: Any, **_: float) -> dict[str, EnergyResult]:
        for work in works.values():
            work()
        return {name: results(name) for name in works}

    return compare


METER = SimpleNamespace(scope="cpu_package")


def result(joules: float, *, valid: bool = True) -> EnergyResult:
    return EnergyResult(joules=joules, trial_joules=(joules - 1, joules + 1), valid=valid, scope="cpu_package")


def test_without_a_meter_joules_are_null_and_the_reason_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "find_meter", no_meter)
    said: list[str] = []
    store = measure(folder, said.append)
    record = store.energy()
    assert record is not None
    assert (record["meter"], record["reason"]) == (None, REASON)
    assert any(f"null: {REASON}" in line for line in said)
    assert len(record["cells"]) == 4
    assert all(len(cell["seconds_per_run"]) == 3 and min(cell["seconds_per_run"]) > 0 for cell in record["cells"])
    assert all(cell["joules_per_run"] == [] and not cell["valid"] for cell in record["cells"])
    assert {row["gpu_board_j"] for row in store.rows()} | {row["cpu_package_j"] for row in store.rows()} == {None}


def test_joules_of_a_stack_are_shared_by_its_models(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "compare_energy", metered(lambda name: result(10.0 if "m=10" in name else 4.0)))
    rows = measure(folder, meter=METER).rows()
    assert len(rows) == 8
    assert {row["cpu_package_j"] for row in rows if row["n_hidden"] == 10} == {5.0}
    assert {row["cpu_package_j"] for row in rows if row["n_hidden"] != 10} == {2.0}
    assert {row["gpu_board_j"] for row in rows} == {None}


def test_a_training_too_long_for_a_window_is_metered_in_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_energy, "steps_per_call", lambda steps, seconds, windows: steps // 4)
    monkeypatch.setattr(energy, "compare_energy", metered(lambda _: result(4.0)))
    store = measure(folder, meter=METER)
    assert {row["cpu_package_j"] for row in store.rows()} == {8.0}
    record = store.energy()
    assert record is not None
    assert {cell["steps_per_metered_call"] for cell in record["cells"]} == {5}


def test_trials_that_spread_leave_null(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "compare_energy", metered(lambda name: result(4.0, valid="m=10" not in name)))
    rows = measure(folder, meter=METER).rows()
    assert {row["cpu_package_j"] for row in rows if row["n_hidden"] == 10} == {None}
    assert {row["cpu_package_j"] for row in rows if row["n_hidden"] != 10} == {2.0}


def test_a_counter_that_stalls_is_a_reason_and_no_number(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stalls(*_: object, **__: object) -> None:
        raise RuntimeError("3 counter ticks in the window, 10 are needed")

    monkeypatch.setattr(energy, "compare_energy", stalls)
    record = measure(folder, meter=METER).energy()
    assert record is not None
    assert record["reason"] == "3 counter ticks in the window, 10 are needed"
    assert not any(cell["valid"] for cell in record["cells"])


def test_what_is_measured_is_not_measured_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "find_meter", no_meter)
    measure(folder)
    before = (folder / "energy.json").read_bytes()
    measure(folder, lambda line: pytest.fail(line))
    assert (folder / "energy.json").read_bytes() == before


@pytest.mark.parametrize("change", ["a meter", "impl", "quick"])
def test_a_meter_that_came_later_or_other_settings_are_measured_again(
    change: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "find_meter", no_meter)
    monkeypatch.setattr(energy, "compare_energy", lambda works, **_: {name: result(4.0) for name in works})
    monkeypatch.setattr(sweep_energy, "interleave", lambda works, **_: {name: Timing(1, (1.0,)) for name in works})
    if change == "a meter":
        measure(folder)
        rows = measure(folder, meter=METER).rows()
        assert {row["cpu_package_j"] for row in rows} == {2.0}
        measure(folder, lambda line: pytest.fail(line), meter=METER)
        return
    store = measure(folder, meter=METER)
    record = store.energy()
    assert record is not None
    (folder / "energy.json").write_text(json.dumps({**record, change: "another"}))
    said: list[str] = []
    again = measure(folder, said.append, meter=METER).energy()
    assert said
    assert again is not None
    assert again[change] == record[change]


def test_a_sweep_measures_after_training_and_its_parquet_has_the_joules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import duckdb

    monkeypatch.setattr(energy, "find_meter", lambda kind="auto", *, device=None: METER)
    monkeypatch.setattr(energy, "compare_energy", metered(lambda _: result(4.0)))
    spec = {**SPEC, "zip": {"n_hidden": [2, 4], "n_experts": [1, 2]}}
    found = run_sweep(spec_preset(spec), tmp_path, device="cpu", impl="torch", progress=False, energy=True)
    assert [row["cpu_package_j"] for row in found.rows] == [2.0] * 4
    query = f"SELECT cpu_package_j, gpu_board_j FROM '{tmp_path / 'runs.parquet'}'"
    assert duckdb.connect().execute(query).fetchall() == [(2.0, None)] * 4


@pytest.mark.parametrize(
    ("preset", "message"),
    [(PRESETS["phase"], "phase has 18096 architectures"), (PRESETS["million"], "trains n_features = ")],
)
def test_sweeps_that_cannot_be_measured_are_refused_before_any_work(
    preset: Preset, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"--energy: .*{re.escape(message.split()[0])}") as caught:
        run_sweep(preset, tmp_path / "out", device="cpu", energy=True)
    assert message.split("has")[0].strip() in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_is_named(folder: Path) -> None:
    (folder / "energy.json").write_text('{"cells": [{}]}')
    with pytest.raises(InputError, match=r"energy\.json is damaged; remove it and measure again"):
        RunStore(folder).rows()


def test_the_dense_model_of_equal_loss_is_the_narrowest_that_is_as_good(folder: Path) -> None:
    losses = {("1", 2): 0.9, ("1", 8): 0.4, ("1", 10): 0.2, ("2", 4): 0.5}
    rows: list[Row] = [
        {**row, "unexplained_variance": losses[str(row["n_experts"]), int(str(row["n_hidden"]))]}
        for row in RunStore(folder).rows()
    ]
    found = cells(rows)
    record = {
        "reason": None, "meter": "cpu_package",
        "cells": [
            {"dataset": one.dataset, "architecture": one.architecture, "seconds_per_run": [1.0 + number, 2.0 + number],
             "joules_per_run": [3.0, 3.0], "valid": number != 0, "run_keys": []}
            for number, one in enumerate(found)
        ],
    }  # fmt: skip
    pairs = [(one.sparse, one.dense) for one in gaps(found, record) if one.matched_by == EQUAL_LOSS]
    (moe,) = [one for one in found if one.is_moe]
    assert [dense for _, dense in pairs] == ["m=8"]
    cost = costs(found, record)
    assert cost[moe.dataset, moe.architecture].flops == moe.mean("active_flops") * 20 * 16
    assert cost[found[0].dataset, found[0].architecture].joules == ()
    assert cost[moe.dataset, moe.architecture].joules == (3.0, 3.0)


def test_the_report_shows_costs_gap_and_reason(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "find_meter", no_meter)
    measure(folder)
    page = write_report(folder).read_text()
    assert "Efficiency: counted and measured" in page
    assert f"Joules were not measured: {REASON}." in page
    assert {"cost.png", "cost.svg", "efficiency_gap.png", "efficiency_gap.svg"} <= {
        path.name for path in (folder / "figures").iterdir()
    }
    assert "At equal total width" in page
    json.loads((folder / "energy.json").read_text())
