from __future__ import annotations

import json
from pathlib import Path

import pytest

from moesaic.bench.measure_large import compute, sparse_flops
from moesaic.bench.million import planned
from moesaic.bench.plan import PlannedRun, Row
from moesaic.bench.report import result_table, write_report
from moesaic.bench.report_million import fitted, is_million, points, speedup, words

SIZES = {1000: 2, 10_000: 2, 100_000: 1}


def measured(item: PlannedRun) -> Row:
    """A made-up result: loss rises with n, steps cost n·m, the mixtures' a quarter of that per FLOP more."""
    run, toy = item.run, item.run.toy
    n, moe = toy.n_features, toy.n_experts > 1
    least = 0.01 if n < 10_000 else 0.0
    return {
        **run.flat(), **item.labels, **compute(run), "run_key": run.key, "status": "ok", "error": None,
        "unexplained_variance": 0.2 * (n / 1000) ** 0.5 + 0.01 * run.seed, "untrained_unexplained_variance": 2.0,
        "features_per_dimension": 1.5, "untrained_features_per_dimension": 0.1 * n / 64,
        "effective_experts": 3.0 if moe else 1.0, "n_frequent": 40, "n_restricted": 7 if n < 10_000 else 0,
        "mean_dimensionality": 0.2, "mean_dimensionality_restricted": 0.3 if n < 10_000 else None,
        "superposition": 1.0, "superposition_restricted": 2.0 if n < 10_000 else None,
        "monosemantic_share": 0.1, "monosemantic_share_restricted": 0.4 if n < 10_000 else None,
        "step_s": 1e-8 * n * toy.n_hidden, "exact_step_s": max(least, 1e-8 * n * toy.n_hidden * (1.25 if moe else 1.0)),
        "sampled_step_s": None if n <= 4096 else 0.02 * (n / 10_000) ** 0.25, "peak_memory_bytes": 10_000_000,
        "wall_s": 1.0,
    }  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [measured(item) for item in planned(SIZES, 10)]


def test_lines_are_means_by_architecture_with_dense_first(rows: list[Row]) -> None:
    lines = points(list(reversed(rows)))
    assert next(iter(lines)) == "dense m=64"
    assert [p.n for p in lines["MoE 16×4 k=1"]] == [1000, 10_000, 100_000]
    first = lines["dense m=64"][0]
    assert len(first.rows) == 2
    assert first.mean("unexplained_variance") == pytest.approx(0.205)


def test_exponents_and_speed_ups_are_those_of_the_rows(rows: list[Row]) -> None:
    lines = points(rows)
    assert fitted(lines["dense m=64"], "exact_step_s") == pytest.approx(1.0)
    assert fitted(lines["dense m=64"], "sampled_step_s") == pytest.approx(0.25)
    ratios = speedup(lines, "exact_step_s")["MoE 16×4 k=1"]
    assert [n for n, _, _ in ratios] == [1000, 10_000, 100_000]
    assert ratios[-1][1] == pytest.approx(16 / 1.25)
    runs = [item.run for item in planned({100_000: 1}, 10)]
    assert ratios[-1][2] == pytest.approx(sparse_flops(runs[0], "exact") / sparse_flops(runs[1], "exact"))
    assert speedup({"MoE 16×4 k=1": lines["MoE 16×4 k=1"]}, "exact_step_s") == {}


def test_the_words_come_from_the_rows(rows: list[Row]) -> None:
    text = words(rows)
    assert "dense m=64: at n = 1,000 the unexplained variance is 0.205 (untrained 2)" in text
    assert "no better than predicting every feature's mean: dense m=64 at n = 100,000" in text
    assert "the time of an exact step grows as n to the power 1.00" in text
    assert "an exact step of MoE 16×4 k=1 takes 0.078 of the dense model's time, with 0.06" in text
    assert "on average over seeds: 0 to 7 of a model's" in text
    good = [row | {"unexplained_variance": 0.5} for row in rows]
    assert "no better than" not in words(good)


def test_the_report_has_figures_tables_and_failed_runs(
    rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = rows[-1] | {"status": "failed", "error": "loss is NaN <&>", "unexplained_variance": None}
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows[:-1], failed]))
    (tmp_path / "environment.json").write_text(json.dumps({"preset": "million"}))
    text = write_report(tmp_path).read_text()
    for name in ("unexplained", "features-per-dimension", "step-time", "speed-up"):
        assert (tmp_path / "figures" / f"{name}.png").stat().st_size > 10_000
    assert text.count("<svg") == 4
    assert "<h2>Features that were learned</h2>" in text
    assert "loss is NaN &lt;&amp;&gt;" in text
    assert "moesaic sweep million" in text
    assert "n/a" in text


def test_the_terminal_gets_the_table(rows: list[Row]) -> None:
    lines = result_table(rows).splitlines()
    assert "unexplained variance" in lines[0]
    assert len(lines) == 1 + 3 * len(SIZES) + 1


def test_other_rows_are_not_taken_for_these(rows: list[Row]) -> None:
    assert is_million(rows)
    assert not is_million([])
    plain = {"status": "ok", "loss": 0.1}
    assert not is_million([*rows, plain])
    assert is_million([*rows, {"status": "failed"}])


def test_rows_without_results_say_nothing() -> None:
    assert words([{"status": "failed", "n_features": 1000}]) == ""
