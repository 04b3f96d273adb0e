"""Phase diagrams: plan and columns, best of seeds, verdicts, figures, report, command line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from moesaic.bench import cli
from moesaic.bench.plan import Row, plan_digest, training_groups
from moesaic.bench.presets import find_preset
from moesaic.bench.report import result_table, write_report
from moesaic.bench.report_page import escape
from moesaic.bench.report_sections import MAX_FAILED, failed_section
from moesaic.bench.reproduce import REPRODUCTIONS, phase, phase_figures, phase_plan
from moesaic.bench.reproduce.phase_maps import STORED, PhaseGrid, PhaseSeeds, box, gather, published
from moesaic.bench.reproduce.phase_plan import PANELS, PHASE, Array, Panel, last_feature
from moesaic.bench.reproduce.result import Check, load_targets, relative
from moesaic.bench.store import RunStore
from moesaic.moe import FeatureConfig, Run, ToyConfig, ToyModel, TrainConfig, TrainResult

TARGETS = load_targets()["phase"]


def row(panel: Panel, p: float, importance: float, seed: int = 0, **values: object) -> Row:
    n, m, n_experts = panel
    middling: Row = {
        "status": "ok", "n_features": n, "n_hidden": m, "n_experts": n_experts, "feature_probability": p,
        "importance_base": importance, "seed": seed, "loss": 0.02, "load_balance_loss": 0.01, "last_batch_loss": 0.02,
        "last_batch_load_balance": 0.01, "last_feature_norm": [1.0] * n_experts,
        "last_feature_superposition": [0.0] * n_experts, "fro2_over_m": [1.0] * n_experts,
        "usage": [1 / n_experts] * n_experts, "wall_s": 0.5, "run_key": f"{panel} {p} {importance} {seed}",
    }  # fmt: skip
    return middling | values


def published_rows(factor: Callable[[Panel], float] = lambda panel: 1.0) -> list[Row]:
    """Rows whose losses are the published ones times a factor: the grids, or five cells with the published box."""
    rows = []
    for panel in PANELS:
        if panel in STORED:
            grid = published(panel)
            cells = [
                (s, r, grid.last_batch[i, j], grid.norm[i, j], grid.score[i, j], grid.fro2[i, j])
                for i, s in enumerate(grid.sparsity)
                for j, r in enumerate(grid.importance)
            ]
        else:
            targets = TARGETS["panels"].get("".join(map(str, panel)))
            losses = targets["loss_box_min_q1_med_q3_max"] if targets else [0.02] * 5
            ones = np.ones(panel[2])
            cells = [
                (s, 0.1, loss, ones, 0 * ones, ones) for s, loss in zip((0.1, 0.2, 0.3, 0.4, 0.5), losses, strict=True)
            ]
        rows += [
            row(
                panel, round(1 - s, 3), round(float(r), 2), last_batch_loss=factor(panel) * float(loss) - 0.01,
                last_feature_norm=norm.tolist(), last_feature_superposition=score.tolist(), fro2_over_m=fro2.tolist(),
            )
            for s, r, loss, norm, score, fro2 in cells
        ]  # fmt: skip
    return rows


def repeated(rows: list[Row], seeds: int = 10) -> dict[Panel, PhaseSeeds]:
    """The grids of rows of one seed, as if every seed had given the same."""

    def repeat(values: Array) -> Array:
        return np.repeat(values, seeds, axis=0)

    return {panel: PhaseSeeds(one.grid.map(repeat), seeds) for panel, one in gather(rows).items()}


def judged(checks: list[Check]) -> list[Check]:
    return [check for check in checks if check.passed is not None]


@pytest.fixture
def fast_boundary(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quadrature boundary takes a second, and test_reproduce.py tests it."""
    monkeypatch.setattr(phase_figures, "optimum_boundary", lambda s: np.minimum(1.0, 0.9 * s))


def test_the_full_plan_is_the_published_grid_seed_by_seed() -> None:
    assert (REPRODUCTIONS["phase"].seeds, REPRODUCTIONS["phase"].max_models, len(PANELS)) == (10, 2262, 8)
    runs = phase_plan.plan(False, 2)
    assert len(runs) == 8 * 2262 * 2
    assert {run.training for run in runs} == {
        TrainConfig(
            steps=5000, batch_size=512, lr=1e-3, weight_decay=0.01, schedule="constant", reduction="mean",
            load_balance=0.01,
        )
    }  # fmt: skip
    assert {run.toy for run in runs} == {
        ToyConfig(n, m, n_experts=e, top_k=1, gate="paper", tied=True, parametrization="paper") for n, m, e in PANELS
    }
    blocks = [runs[i : i + 2262] for i in range(0, len(runs), 2262)]
    assert [(block[0].toy.n_features, block[0].toy.n_hidden, block[0].toy.n_experts) for block in blocks] == [
        *PANELS
    ] * 2
    assert [[run.seed for run in block] for block in blocks] == [list(range(2262))] * 8 + [[*range(2262, 4524)]] * 8
    grid = published((2, 1, 1))
    cells = [(round(1 - run.features.feature_probability, 3), run.features.importance_base) for run in blocks[3]]
    assert cells == [(round(s, 3), round(r, 2)) for s in grid.sparsity.tolist() for r in grid.importance.tolist()]
    assert {run.features.importance for run in runs} == {"last"}


def test_a_stack_is_a_whole_panel_with_one_seed_per_cell() -> None:
    groups = training_groups(PHASE.stages(False, 2)[0]([]), max_models=PHASE.max_models)
    assert [len(group) for group in groups] == [2262] * 16
    assert all(len({(item.run.seed // 2262, item.labels["panel"]) for item in group}) == 1 for group in groups)
    assert all(len({item.run.features for item in group}) == 2262 for group in groups)


def test_quick_takes_every_panel_on_cells_of_the_full_grid_at_full_length() -> None:
    quick = phase_plan.plan(True, 1)
    assert len(quick) == 8 * 13 * 15
    assert {run.key for run in quick} <= {run.key for run in phase_plan.plan(False, 1)}


def test_the_preset_plans_the_same_runs_with_a_label_for_the_panel() -> None:
    assert find_preset("phase") is PHASE
    planned = PHASE.stages(True, 3)[0]([])
    assert [item.run for item in planned] == phase_plan.plan(True, 3)
    assert {tuple(item.labels.items()) for item in planned} == {
        (("stage", "main"), ("panel", f"({n},{m},{e})")) for n, m, e in PANELS
    }
    assert len(PHASE.stages(True, None)[0]([])) == len(planned) / 3
    assert plan_digest(planned) == plan_digest(PHASE.stages(True, 3)[0]([]))


def test_columns_are_the_stated_sums_over_experts_and_features() -> None:
    runs = [Run(ToyConfig(3, 2, n_experts=2), FeatureConfig(), TrainConfig(steps=3), seed) for seed in range(4)]
    model = ToyModel.from_runs(runs)
    with torch.no_grad():
        model.weight[1, 1, -1] = 0.0
    losses = torch.arange(12.0).view(4, 3)
    result = TrainResult(runs, model, losses, losses / 16, 0.0, "torch", [None] * 4)
    found = phase_plan.columns(result, runs)
    weight = model.weight.detach().double().numpy()
    for s, columns in enumerate(found):
        assert columns["last_batch_loss"] == 3.0 * s + 2
        assert columns["last_batch_load_balance"] == (3.0 * s + 2) / 16
        for e in range(2):
            w = weight[s, e]
            norm = float(np.sqrt((w[2] ** 2).sum()))
            score = sum(float(w[2] @ w[j] / norm) ** 2 for j in (0, 1)) if norm else 0.0
            values = [columns[name][e] for name in ("last_feature_norm", "last_feature_superposition", "fro2_over_m")]  # type: ignore[index]
            assert values == pytest.approx([norm, score, float((w**2).sum()) / 2], rel=1e-12)


def two_by_two() -> list[Row]:
    """Four cells of (2,1,2) with three seeds; held-out loss and last batch disagree on the best; a row failed."""
    panel = (2, 1, 2)
    rows = [
        row(panel, p, r, seed, loss=held_out, last_batch_loss=last, last_feature_norm=[seed, 0.0], usage=[0.3, 0.7])
        for p in (0.9, 0.4)
        for r in (0.5, 1.0)
        for seed, (held_out, last) in enumerate([(0.05, 0.01), (0.02, 0.03), (0.04, 0.02)])
    ]
    failed = row(panel, 0.4, 1.0, 3, status="failed", loss=None, last_batch_loss=-1.0)
    return [*rows[::-1], failed]


def test_the_best_seed_is_taken_by_either_rule_and_failed_rows_are_left_out() -> None:
    seeds = gather(two_by_two())[2, 1, 2]
    assert seeds.count == 3
    np.testing.assert_array_equal(seeds.grid.sparsity, [0.1, 0.6])
    held_out, last = seeds.best("held_out"), seeds.best("last_batch")
    np.testing.assert_array_equal(held_out.held_out, np.full((2, 2), 0.02))
    np.testing.assert_array_equal(held_out.norm[..., 0], np.full((2, 2), 1.0))
    np.testing.assert_allclose(last.last_batch, np.full((2, 2), 0.02))
    np.testing.assert_array_equal(last.norm[..., 0], np.zeros((2, 2)))
    np.testing.assert_allclose(seeds.best("last_batch", without=0).last_batch, np.full((2, 2), 0.03))
    np.testing.assert_allclose(seeds.one(1).last_batch, np.full((2, 2), 0.04))


def test_the_load_balance_term_counts_in_the_papers_rule() -> None:
    rows = [
        row((2, 1, 2), 0.5, 1.0, 0, last_batch_loss=0.010, last_batch_load_balance=0.012, loss=0.5),
        row((2, 1, 2), 0.5, 1.0, 1, last_batch_loss=0.011, last_batch_load_balance=0.010, loss=0.6),
    ]
    seeds = gather(rows)[2, 1, 2]
    assert seeds.best("last_batch").last_batch.item() == pytest.approx(0.021)
    assert seeds.best("held_out").held_out.item() == 0.5


def test_a_cell_without_a_model_is_nan_and_enters_no_statistic() -> None:
    rows = [r for r in two_by_two() if (r["feature_probability"], r["importance_base"]) != (0.9, 0.5)]
    grid = gather(rows)[2, 1, 2].best("held_out")
    assert np.isnan(grid.last_batch[0, 0])
    assert np.isnan(grid.norm[0, 0]).all()
    assert np.isfinite(grid.norm).sum() == 6
    np.testing.assert_array_equal(grid.ignored, [0.0, 1.0])
    assert box(grid.held_out) == (0.02,) * 5
    assert np.isnan(gather(rows[:1])[2, 1, 2].best("last_batch", without=0).norm).all()
    assert np.isnan(box(np.full(3, np.nan))).all()


def test_experts_are_sorted_within_each_cell_and_columns_stay_together() -> None:
    rows = [
        row((2, 1, 2), 0.5, 0.5, usage=[0.2, 0.8], last_feature_norm=[1.0, 2.0], last_feature_superposition=[3.0, 4.0]),
        row((2, 1, 2), 0.5, 1.0, usage=[0.6, 0.4], last_feature_norm=[1.0, 2.0], last_feature_superposition=[3.0, 4.0]),
    ]
    grid = gather(rows)[2, 1, 2].best("held_out")
    by_usage, by_norm = grid.sorted_by("usage"), grid.sorted_by("norm")
    assert by_usage.usage.tolist() == [[[0.8, 0.2], [0.6, 0.4]]]
    assert by_usage.norm.tolist() == [[[2.0, 1.0], [1.0, 2.0]]]
    assert by_usage.score.tolist() == [[[4.0, 3.0], [3.0, 4.0]]]
    assert by_norm.norm.tolist() == [[[2.0, 1.0]] * 2]
    assert by_norm.usage.tolist() == [[[0.8, 0.2], [0.4, 0.6]]]


@pytest.mark.parametrize(
    ("panel", "factor", "failures"),
    [
        ((2, 1, 1), 1.0, 0),
        ((2, 1, 1), 1.049, 0),
        ((2, 1, 1), 1.051, 1),
        ((3, 1, 1), 0.949, 1),
        ((2, 1, 2), 1.099, 0),
        ((2, 1, 2), 1.101, 1),
        ((3, 1, 3), 0.899, 1),
        ((3, 2, 1), 0.949, 1),
        ((3, 2, 2), 0.901, 0),
        ((3, 2, 2), float("nan"), 1),
        ((3, 1, 2), 3.0, 0),
    ],
)
def test_the_median_of_every_published_panel_is_judged(panel: Panel, factor: float, failures: int) -> None:
    rows = published_rows(lambda one: factor if one == panel else 1.0)
    verdicts = judged(phase.checks(repeated(rows), TARGETS, quick=False))
    assert len(verdicts) == 6
    assert [check.passed for check in verdicts].count(False) == failures, verdicts


def test_equal_grids_agree_cell_by_cell_whatever_the_order_of_experts() -> None:
    rows = published_rows()
    names = ("last_feature_norm", "last_feature_superposition", "fro2_over_m")
    for item in rows[::2]:
        item |= {name: item[name][::-1] for name in names}  # type: ignore[index]
    values = {check.quantity: check.ours for check in phase.checks(gather(rows), TARGETS, quick=False)}
    for name in ("(2,1,1)", "(2,1,2)", "(3,2,2)"):
        assert values[f"{name} cell by cell, |difference| / loss, largest"] < 1e-9
        assert values[f"{name} cell by cell, share within 5%"] == 1
        assert values[f"{name} cell by cell, correlation of ln loss"] == pytest.approx(1)
        assert values[f"{name} cell by cell, correlation of norms, experts by norm"] == pytest.approx(1)
        assert values[f"{name} cell by cell, share alike (ignored, alone, superposed)"] == 1
    scaled = published_rows(lambda panel: 1.06)
    values = {check.quantity: check.ours for check in phase.checks(gather(scaled), TARGETS, quick=False)}
    assert values["(3,2,2) cell by cell, |difference| / loss, median"] == pytest.approx(0.06)
    assert values["(3,2,2) cell by cell, share within 5%"] == 0


def test_every_statistic_is_shown_and_what_is_not_published_is_not_available() -> None:
    checks = {check.quantity: check for check in phase.checks(repeated(published_rows()), TARGETS, quick=False)}
    assert checks["(2,1,2) last feature, ignored"].published == pytest.approx((0.295 + 0.128) / 2)
    assert checks["(2,1,2) last feature, superposed by expert 1"].published == 0.645
    assert abs(checks["(2,1,2) last feature, superposed by expert 1"].difference or 1) < 6e-4
    assert checks["(3,1,1) loss, lower quartile"].difference == pytest.approx(0)
    assert all(check.published is None for name, check in checks.items() if name.startswith(("(3,1,2)", "(3,2,3)")))
    assert "(3,1,2) loss, median" in checks


@pytest.mark.parametrize(("factor", "failures"), [(1.0, 0), (0.91, 0), (1.09, 0), (0.89, 3), (1.11, 3), (np.nan, 3)])
def test_quick_is_judged_against_the_same_cells_of_the_stored_grids(factor: float, failures: int) -> None:
    wanted = {(round(1 - s, 3), r) for _, s, r in phase_plan.grid(True)}
    rows = [
        r
        for r in published_rows(lambda panel: factor)
        if (r["n_features"], r["n_hidden"], r["n_experts"]) not in STORED
        or (r["feature_probability"], r["importance_base"]) in wanted
    ]
    checks = phase.checks(gather(rows), TARGETS, quick=True)
    verdicts = judged(checks)
    names = [f"({a},{b},{c}) ours / published loss cell by cell, 9.09 % quantile" for a, b, c in STORED]
    assert [check.quantity for check in verdicts] == names
    assert [check.passed for check in verdicts].count(False) == failures
    assert verdicts[0].ours == pytest.approx(factor, nan_ok=True)
    lower = next(check for check in checks if check.quantity == "(2,1,2) loss, lower quartile")
    assert lower.ours == pytest.approx(factor * (lower.published or 0), nan_ok=True)
    assert any(check.quantity == "(3,1,1) loss, published on the full grid, median" for check in checks)


@pytest.mark.parametrize("seeds", [1, 3, 10])
def test_best_of_some_seeds_against_best_of_ten_is_one_at_its_quantile(seeds: int) -> None:
    # Lognormal losses whose spread and scale differ from cell to cell: the quantile is free of the distribution.
    rng = np.random.default_rng(0)
    scale, spread = rng.uniform(0.01, 1, 4000), rng.uniform(0.01, 1, 4000)
    runs = scale * np.exp(spread * rng.standard_normal((seeds + 10, 4000)))
    ratio = runs[:seeds].min(0) / runs[seeds:].min(0)
    assert np.quantile(ratio, phase.comparable_quantile(seeds)) == pytest.approx(1, abs=0.02)
    assert np.quantile(ratio, phase.comparable_quantile(seeds) + 0.05) > 1.025


def test_the_full_grid_with_other_than_ten_seeds_is_judged_like_quick() -> None:
    def names(seeds: int) -> list[str]:
        found = repeated(published_rows(), seeds)
        return [check.quantity for check in judged(phase.checks(found, TARGETS, quick=False))]

    medians = "(2,1,1)", "(2,1,2)", "(3,1,1)", "(3,1,3)", "(3,2,1)", "(3,2,2)"
    assert names(10) == [f"{panel} loss, median" for panel in medians]
    assert names(9)[0] == "(2,1,1) ours / published loss cell by cell, 47.4 % quantile"
    assert len(names(9)) == len(STORED)


def test_relative_allowance_is_a_share_of_the_published_value() -> None:
    assert relative("a", 1.05, 1.0, 0.051).passed is True
    assert relative("a", 0.94, 1.0, 0.05).passed is False
    assert relative("a", float("nan"), 1.0, 9.0).passed is False
    assert relative("a", 1.0, 1.0, 0.05).allowed == "±5%"


def test_notes_say_floor_noise_ties_and_spread() -> None:
    rows = [
        row(panel, 0.5, 1.0, seed, loss=0.03, last_batch_loss=0.02 + 0.01 * seed) for panel in PANELS for seed in (0, 1)
    ]
    text = "\n".join(phase.notes(gather(rows), True))
    assert "best of 2 seeds" in text
    assert "--quick" in text
    assert "0.0100 to 0.0100" in text
    assert "(2,1,1) 25.0%" in text
    assert "go to expert 0" in text
    assert "(2,1,1) 0.0300-0.0400 (0.0300-0.0400)" in text
    single = "\n".join(phase.notes(gather([r for r in rows if r["seed"] == 0]), False))
    assert "--quick" not in single
    assert "left out" not in single


def grid_rows() -> list[Row]:
    """Every panel on 4 × 5 cells of the stored grids, one of them missing."""
    rng = np.random.default_rng(0)

    def spread(count: int) -> list[float]:
        values: list[float] = rng.uniform(0, 1, count).tolist()
        return values

    rows = [
        row(
            panel, p, r, loss=0.02 + 0.02 * rng.uniform(), last_feature_norm=spread(panel[2]),
            last_feature_superposition=spread(panel[2]), last_batch_loss=0.02 * (1 + rng.uniform()),
        )
        for panel in PANELS
        for p in (0.95, 0.65, 0.35, 0.05)
        for r in (0.1, 0.5, 0.9, 1.3, 1.7)
    ]  # fmt: skip
    return rows[1:]


@pytest.mark.usefixtures("fast_boundary")
def test_figures_are_written_and_a_missing_cell_is_grey(tmp_path: Path) -> None:
    found = gather(grid_rows())
    drawn = phase_figures.draw(found, TARGETS, tmp_path)
    assert [figure.name for figure in drawn] == ["phase-maps", "phase-losses", "phase-published-maps", "phase-cells"]
    for figure in drawn:
        assert (tmp_path / f"{figure.name}.png").stat().st_size > 10_000
        assert (tmp_path / f"{figure.name}.svg").read_text(encoding="utf-8") == figure.svg
    assert "(3,2,3)  expert 3, 33%" in drawn[0].svg
    assert "by quadrature" in drawn[0].svg
    assert drawn[1].svg.count(">none published<") == 2
    first = phase_figures.maps(found).axes[0].images[0].get_array()
    assert first is not None
    assert first.shape == (5, 4, 3), "importance along y, sparsity along x"
    assert to_hex(first[0, 0]) == phase_figures.MISSING
    assert len(np.unique(np.asarray(first).reshape(-1, 3), axis=0)) == 20


@pytest.mark.usefixtures("fast_boundary")
def test_a_sweeps_report_has_maps_and_a_line_per_panel_not_per_run(tmp_path: Path) -> None:
    rows = [item | {"panel": phase_plan.panel_name(phase_plan.panel_of(item)), "stage": "main"} for item in grid_rows()]
    rows.append(row((2, 1, 1), 0.95, 0.1, 0, status="failed", error="out of memory"))
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(item) + "\n" for item in rows))
    (tmp_path / "environment.json").write_text(json.dumps({"preset": "phase", "quick": True}))
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert text.count("<figure>") == 4
    assert "--quick" in text
    assert "out of memory" in text
    assert text.count("<td") < 250
    table = result_table(rows).splitlines()
    assert len(table) == 1 + 8 + 1
    assert table[1].split()[:6] == ["(2,1,1)", "20", "1", "1", *table[1].split()[4:5], "0.0383"]
    assert "not available" in table[4]


def test_a_report_lists_no_more_failures_than_a_reader_reads() -> None:
    failed = [row((2, 1, 1), 0.5, 1.0, seed, status="failed", error="nan") for seed in range(3 * MAX_FAILED)]
    text = failed_section(failed)
    assert text.count("<tr>") == 1 + MAX_FAILED
    assert f"{3 * MAX_FAILED} of {3 * MAX_FAILED}" in text


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, fast_boundary: None) -> Iterator[None]:
    """Every panel on 2 × 2 cells, trained for three steps, in place of the plan."""
    asked: list[tuple[bool, int]] = []
    training = TrainConfig(steps=3, batch_size=16, load_balance=0.01)

    def plan(quick: bool, seeds: int) -> list[Run]:
        asked.append((quick, seeds))
        return [
            Run(
                ToyConfig(n, m, n_experts=e),
                FeatureConfig(feature_probability=p, importance="last", importance_base=r),
                training,
                seed,
            )
            for seed in range(seeds)
            for n, m, e in PANELS
            for p in (0.95, 0.35)
            for r in (0.1, 0.9)
        ]

    monkeypatch.setitem(REPRODUCTIONS, "phase", dataclasses.replace(REPRODUCTIONS["phase"], plan=plan))
    monkeypatch.setattr(phase_plan, "plan", plan)
    yield
    assert set(asked) == {(True, 1)}, asked


@pytest.mark.usefixtures("tiny")
def test_reproduce_phase_runs_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    code = cli.main(["reproduce", "phase", "--quick", "--out", str(out), "--device", "cpu", "--impl", "torch"])
    printed = capsys.readouterr().out
    record = json.loads((out / "reproduction.json").read_text(encoding="utf-8"))
    assert (code, record["passed"]) == (1, False), "three steps do not reproduce anything"
    assert "OUTSIDE" in printed
    assert "(3,1,2) loss, median" in printed
    assert len(record["figures"]) == 8
    assert all((out / name).is_file() for name in record["figures"])
    rows = RunStore(out).rows()
    assert len(rows) == 8 * 4
    assert all(len(r["last_feature_norm"]) == r["n_experts"] for r in rows)  # type: ignore[arg-type]
    assert gather(rows).keys() == set(PANELS)
    assert cli.main(["report", str(out)]) == 0
    text = (out / "report.html").read_text(encoding="utf-8")
    assert "Not reproduced." in text
    assert all(escape(caption) in text for _, caption in phase_figures.WORDS.values())
    assert text.count("<figure>") == 4


@pytest.mark.usefixtures("tiny")
def test_sweep_phase_runs_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The report's own test draws them.
    monkeypatch.setattr("moesaic.bench.report.panel_figures", lambda rows, folder: [])
    out = tmp_path / "out"
    code = cli.main(["sweep", "phase", "--quick", "--out", str(out), "--device", "cpu", "--impl", "torch"])
    printed = capsys.readouterr().out
    assert code == 0
    assert printed.splitlines()[-1] == str(out / "report.html")
    rows = RunStore(out).rows()
    assert {r["panel"] for r in rows} == {phase_plan.panel_name(panel) for panel in PANELS}
    assert gather(rows).keys() == set(PANELS)
    assert cli.main(["report", str(out)]) == 0
    assert "(3,2,3)" in (out / "report.html").read_text(encoding="utf-8")


def test_a_zero_row_has_score_zero() -> None:
    norm, score, fro2 = last_feature(np.array([[[1.0], [2.0], [0.0]]]))
    assert (norm.tolist(), score.tolist(), fro2.tolist()) == ([0.0], [0.0], [5.0])


def test_grids_of_no_rows_are_none() -> None:
    assert gather([row((5, 2, 1), 0.5, 1.0)]) == {}
    assert isinstance(published((2, 1, 1)), PhaseGrid)
