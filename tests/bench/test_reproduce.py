"""Reproductions: quadrature and its optimum, checks against the targets, and the resumable driver."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moesaic.moe
from moesaic.bench.plan import InputError
from moesaic.bench.reproduce import REPRODUCTIONS, closed_form, features_per_dimension, reproduce, specialization
from moesaic.bench.reproduce.quadrature import Array, expected_loss, loss_and_gradient, optimum
from moesaic.bench.reproduce.result import Check, above, format_table, load_targets, within
from moesaic.moe import FeatureConfig, Run, ToyConfig, TrainConfig

TARGETS = load_targets()


def random_params(count: int) -> tuple[Array, Array, Array]:
    """Weights of at least 0.2, because antiderivatives divide by slopes and would lose digits."""
    rng = np.random.default_rng(3)
    weight = rng.uniform(0.2, 1.5, (count, 2)) * rng.choice([-1.0, 1.0], (count, 2))
    params = np.concatenate([weight, rng.normal(0.0, 0.5, (count, 2))], axis=1)
    return params, rng.uniform(0.05, 1.0, count), rng.uniform(0.1, 3.0, count)


def antiderivative_loss(w: Array, b: Array, s: float, r: float) -> float:
    """The same expectation from antiderivatives of powers of z₊, which need no nodes and no kinks."""

    def power(z: float, degree: int) -> float:
        return max(z, 0.0) ** degree

    total = 0.0
    for i, scale in enumerate((1.0, r)):
        a = w[i] * w
        own, other, c = a[i], a[1 - i], b[i]
        square = {"off": power(c, 2)}  # E z₊² with no feature on, either one, both
        cross = {"own": (power(own + c, 2)) / (2 * own) - (power(own + c, 3) - power(c, 3)) / (6 * own**2)}
        for name, slope in (("own", own), ("other", other)):
            square[name] = (power(slope + c, 3) - power(c, 3)) / (3 * slope)
        corners = power(own + other + c, 4) - power(own + c, 4) - power(other + c, 4) + power(c, 4)
        square["both"] = corners / (12 * own * other)
        by_parts = (power(own + other + c, 3) - power(own + c, 3)) / (3 * own) - corners / (12 * own**2)
        cross["both"] = by_parts / (2 * other)
        present = {name: 1 / 3 - 2 * cross[name] + square[name] for name in ("own", "both")}
        one = s * (1 - s)
        total += scale * (
            (1 - s) ** 2 * square["off"] + one * (present["own"] + square["other"]) + s**2 * present["both"]
        )
    return total


def test_quadrature_equals_the_antiderivatives() -> None:
    params, s, r = random_params(60)
    exact = [antiderivative_loss(p[:2], p[2:], si, ri) for p, si, ri in zip(params, s, r, strict=True)]
    np.testing.assert_allclose(expected_loss(params[:, :2], params[:, 2:], s, r), exact, rtol=1e-10)


def test_quadrature_takes_zero_weights_and_zero_bias() -> None:
    assert expected_loss((0.0, 0.0), (0.0, 0.0), 0.3, 2.0) == pytest.approx(3.0 * 0.1, rel=1e-14)
    assert expected_loss((1.0, 0.0), (0.0, 0.0), 1.0, 2.0) == pytest.approx(2.0 / 3, rel=1e-14)


def test_gradient_equals_finite_differences() -> None:
    params, s, r = random_params(60)
    gradient = loss_and_gradient(params, s, r)[1]
    for k, step in enumerate(1e-6 * np.eye(4)):
        slope = (loss_and_gradient(params + step, s, r)[0] - loss_and_gradient(params - step, s, r)[0]) / 2e-6
        np.testing.assert_allclose(gradient[:, k], slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1])
def test_density_outside_its_range_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match="density must be in"):
        expected_loss((1.0, 0.0), (0.0, 0.0), density, 1.0)


def test_formulas_hold_at_their_weights() -> None:
    checks = closed_form.formula_checks(1e-12)
    assert len(checks) == 5
    assert all(check.passed for check in checks), format_table(checks)


def test_formula_check_fails_on_a_wrong_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed_form, "drop_loss", lambda s: np.asarray(s) / 3 - np.asarray(s) ** 2 / 4.1)
    assert sum(check.passed is False for check in closed_form.formula_checks(1e-6)) == 2


def test_optimum_is_a_minimum_and_respects_the_exchange_of_features() -> None:
    s, r = np.meshgrid([0.1, 0.4, 0.55, 0.7, 0.95], [0.15, 0.6, 0.9, 1.0], indexing="ij")
    found = optimum(s, r)
    assert np.all(found.loss <= closed_form.best_form(s, r) * (1 + 1e-12))
    assert np.any(found.loss < 0.93 * closed_form.best_form(s, r))
    np.testing.assert_allclose(expected_loss(found.weight, found.bias, s, r), found.loss, rtol=1e-12)
    np.testing.assert_allclose(optimum(s, 1 / r).loss * r, found.loss, rtol=1e-8)
    np.testing.assert_allclose(optimum(s, r, n_random=24).loss, found.loss, rtol=1e-8)
    rng = np.random.default_rng(0)
    for scale in (1e-3, 1e-1, 1.0):
        w, b = (value + scale * rng.normal(size=(40, *value.shape)) for value in (found.weight, found.bias))
        assert np.all(expected_loss(w, b, s, r) >= found.loss * (1 - 1e-9))


def test_boundary_of_the_optimum_lies_where_dropping_stops_being_best() -> None:
    s = np.array([0.2, 0.5, 0.8])
    boundary = closed_form.optimum_boundary(s)
    dropped = closed_form.drop_loss(s)
    np.testing.assert_allclose(optimum(s, 0.97 * boundary).loss, 0.97 * boundary * dropped, rtol=1e-6)
    assert np.all(optimum(s, np.minimum(1.03 * boundary, 1.0)).loss < 1.03 * boundary * dropped * (1 - 1e-6))
    assert np.all(boundary[:2] < closed_form.lower_boundary(s[:2]))


def closed_form_rows(factor: float) -> list[dict[str, Any]]:
    rows = []
    for s, r in ((0.1, 1.0), (0.5, 0.2)):
        best = optimum(s, r)
        cell = {"feature_probability": s, "importance_base": r, "weight": [float(v) for v in best.weight]}
        rows += [cell | {"quadrature_loss": times * float(best.loss)} for times in (3.0, factor, 2.0)]
    return rows


@pytest.mark.parametrize(("factor", "failures"), [(1.005, 0), (1.02, 2)])
def test_closed_form_judges_the_best_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float, failures: int
) -> None:
    # These two take seconds; the boundary has its own test.
    monkeypatch.setattr(closed_form, "optimum_boundary", lambda s: 0.9 * s)
    monkeypatch.setattr(closed_form, "_antipodal_excess", lambda: above("excess", 1.0, 0.0))
    outcome = REPRODUCTIONS["closed-form"].conclude(closed_form_rows(factor), TARGETS["closed-form"], True, tmp_path)
    assert [check.passed for check in outcome.checks].count(False) == failures, format_table(outcome.checks)
    assert {path.suffix for path in outcome.figures} == {".png", ".svg"}
    assert all(path.stat().st_size > 10_000 for path in outcome.figures)


def figure_rows(shift: Callable[[str, float], tuple[float, float]]) -> list[dict[str, Any]]:
    """Rows at the published numbers (the judged ones where there are), shifted."""
    targets, rows = TARGETS["features-per-dimension"], []
    judged = {(t["model"], t["feature_probability"]): t["value"] for t in targets["judged"]}
    for model, experts in (("dense", 1), ("moe", 4)):
        curves = (targets[model]["features_per_dimension"], targets[model]["ln_loss"])
        for p, features, ln_loss in zip(targets["feature_probability"], *curves, strict=True):
            more_features, more_loss = shift(model, p)
            for seed, spread in enumerate((-0.1, 0.1)):
                rows.append(
                    {
                        "n_experts": experts,
                        "feature_probability": p,
                        "seed": seed,
                        "features_per_dimension_gate": judged.get((model, p), features) + more_features + spread,
                        "loss": math.exp(ln_loss + more_loss),
                    }
                )
    return rows


@pytest.mark.parametrize(
    ("at", "shift", "failures"),
    [
        (("dense", 1.0), (0.004, 0.0), 0),
        (("dense", 1.0), (0.006, 0.0), 1),
        (("dense", 0.53), (-0.021, 0.0), 1),
        (("dense", 0.1), (0.16, 0.0), 1),
        (("moe", 0.1), (-0.16, 0.0), 1),
        (("moe", 0.1), (-0.14, 0.0), 0),
        (("moe", 0.38), (0.0, 0.049), 0),
        (("moe", 0.38), (0.0, -0.051), 1),
        (("dense", 0.22), (0.0, math.nan), 1),
    ],
)
def test_features_per_dimension_judges_every_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: tuple[str, float], shift: tuple[float, float], failures: int
) -> None:
    monkeypatch.setattr(features_per_dimension, "draw", lambda found, targets, folder: [])
    rows = figure_rows(lambda model, p: shift if (model, p) == at else (0.0, 0.0))
    targets = TARGETS["features-per-dimension"]
    outcome = REPRODUCTIONS["features-per-dimension"].conclude(rows, targets, False, tmp_path)
    assert len(outcome.checks) == 4 + 3 + 60 + 1
    assert [check.passed for check in outcome.checks].count(False) == failures, format_table(outcome.checks)


def test_features_per_dimension_draws_ours_over_the_published_curve(tmp_path: Path) -> None:
    found = features_per_dimension.curves(figure_rows(lambda model, p: (0.0, 0.0)))
    assert [len(cells) for cells in found.values()] == [30, 30]
    png, svg = features_per_dimension.draw(found, TARGETS["features-per-dimension"], tmp_path)
    assert png.stat().st_size > 10_000
    assert all(f"{whose}: dense, m = 20" in svg.read_text(encoding="utf-8") for whose in ("ours", "published"))


def specialization_rows(xavier: Sequence[float], k_hot: Sequence[float]) -> list[dict[str, Any]]:
    columns = [f"share_{stage}" for stage in specialization.STAGES]
    return [
        {"router_init": router, "monosemantic_features": [2, 0], "seed": seed}
        | {column: [share, None] for column, share in zip(columns, shares, strict=True)}
        for router, shares in (("default", xavier), ("k_hot", k_hot))
        for seed in range(2)
    ]


@pytest.mark.parametrize(
    ("xavier", "k_hot", "failures"),
    [
        ((0.1, 0.4, 0.7), (0.1, 0.8, 1.0), 0),
        ((0.1, 0.4, 0.4), (0.1, 0.8, 1.0), 1),
        ((0.1, 0.1, 0.7), (0.1, 0.8, 1.0), 1),
        ((0.1, 0.8, 0.9), (0.1, 0.4, 1.0), 1),
        ((0.1, math.nan, 0.9), (0.1, 0.4, 1.0), 3),
    ],
)
def test_specialization_judges_the_direction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, xavier: Sequence[float], k_hot: Sequence[float], failures: int
) -> None:
    monkeypatch.setattr(specialization, "draw", lambda rows, folder: [])
    rows = specialization_rows(xavier, k_hot)
    outcome = REPRODUCTIONS["specialization"].conclude(rows, TARGETS["specialization"], False, tmp_path)
    assert [check.passed for check in outcome.checks].count(False) == failures, format_table(outcome.checks)
    assert "not available" in format_table(outcome.checks)


def test_plans_are_the_stated_ones() -> None:
    runs = REPRODUCTIONS["features-per-dimension"].plan(False, 5)
    assert len(runs) == 2 * 30 * 5
    assert {run.seed for run in runs} == {0, 1, 2, 3, 4}
    assert {(run.toy.n_hidden, run.toy.n_experts, run.toy.top_k) for run in runs} == {(20, 1, 1), (5, 4, 1)}
    assert {run.training for run in runs} == {TrainConfig(steps=10_000, batch_size=1024, lr=1e-3, load_balance=0.0)}
    quick = REPRODUCTIONS["features-per-dimension"].plan(True, 2)
    assert {run.features.feature_probability for run in quick} == {1.0, 0.53, 0.1}
    assert {run.training for run in quick} == {run.training for run in runs}
    cells = {run.features for run in REPRODUCTIONS["closed-form"].plan(False, 8)}
    assert len(cells) == 25


def test_targets_are_complete() -> None:
    targets = TARGETS["features-per-dimension"]
    for model in ("dense", "moe"):
        assert all(len(values) == 30 for values in targets[model].values())
    assert targets["feature_probability"] == list(features_per_dimension.probabilities())
    assert set(TARGETS) == set(REPRODUCTIONS)
    assert all("source" in part for part in TARGETS.values())


def test_table_shows_all_columns() -> None:
    checks = [within("a", 1.0, 1.2, 0.1), above("b", 0.5, 0.0), Check("c", 2.0, 2.5, "", None)]
    lines = format_table(checks).splitlines()
    assert lines[0].split() == ["quantity", "ours", "published", "difference", "allowed"]
    assert lines[1].split() == ["a", "1.0000", "1.2000", "-0.2000", "±0.1", "OUTSIDE"]
    assert lines[2].split() == ["b", "0.5000", "not", "available", "-", ">", "0", "ok"]
    assert lines[3].split() == ["c", "2.0000", "2.5000", "-0.5000", "-"]
    assert within("nan", math.nan, 1.0, 9.0).passed is False
    assert above("nan", math.nan, 0.0).passed is False


@pytest.fixture
def tiny_specialization(monkeypatch: pytest.MonkeyPatch) -> None:
    """The specialisation reproduction with four small trainings."""
    data = FeatureConfig(feature_probability=0.3, importance="permuted")
    runs = [
        Run(ToyConfig(8, 2, n_experts=2, router_init=router), data, TrainConfig(steps=5, batch_size=16), seed)
        for router in specialization.ROUTERS
        for seed in range(2)
    ]
    small = dataclasses.replace(REPRODUCTIONS["specialization"], plan=lambda quick, seeds: runs)
    monkeypatch.setitem(REPRODUCTIONS, "specialization", small)
    monkeypatch.setattr(specialization, "N_INPUTS", 64)


def run_tiny(out: Path) -> Any:
    return reproduce("specialization", out, quick=True, seeds=2, device="cpu", impl="torch", progress=False)


@pytest.mark.usefixtures("tiny_specialization")
def test_reproduction_reports_every_seed_and_does_not_train_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_tiny(tmp_path)
    assert [(row["router_init"], row["seed"]) for row in first.rows] == [
        ("default", 0), ("default", 1), ("k_hot", 0), ("k_hot", 1),
    ]  # fmt: skip
    assert all(row["status"] == "ok" for row in first.rows), first.rows
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 4
    record = json.loads((tmp_path / "reproduction.json").read_text())
    assert record["passed"] is first.passed
    assert all((tmp_path / name).exists() for name in record["figures"])

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("trained twice")

    monkeypatch.setattr(moesaic.moe, "train_runs", refuse)
    again = run_tiny(tmp_path)
    assert again.rows == first.rows
    assert again.table == first.table


@pytest.mark.usefixtures("tiny_specialization")
def test_a_failed_training_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = moesaic.moe.train_runs

    def fail_one(runs: Sequence[Run], **kwargs: Any) -> Any:
        if any(run.seed == 1 and run.toy.router_init == "k_hot" for run in runs):
            raise RuntimeError("no more memory")
        return original(runs, **kwargs)

    monkeypatch.setattr(moesaic.moe, "train_runs", fail_one)
    monkeypatch.setattr(specialization, "_checks", lambda rows, limit: [within("agrees", 1.0, 1.0, 0.1)])
    result = run_tiny(tmp_path)
    assert not result.passed
    assert "1 of 4 trainings failed" in result.table
    assert "no more memory" in result.table


@pytest.mark.parametrize(
    ("name", "seeds", "message"), [("fig-3", None, "features-per-dimension"), ("closed-form", 0, "seeds=0")]
)
def test_bad_input_is_refused_before_any_work(tmp_path: Path, name: str, seeds: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        reproduce(name, tmp_path / "out", seeds=seeds)
    assert not (tmp_path / "out").exists()
