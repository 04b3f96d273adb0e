"""The geometry reproduction: its plan, its columns, what it judges, and its figures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesaic.bench.report import write_report
from moesaic.bench.report_page import escape
from moesaic.bench.reproduce import REPRODUCTIONS, geometry, geometry_figures, reproduce
from moesaic.bench.reproduce.polytopes import FRACTIONS, VERTICES, shape
from moesaic.bench.reproduce.result import Check, format_table, load_targets
from moesaic.moe import FeatureConfig, Run, ToyConfig, TrainConfig, train_runs

TARGETS = load_targets()["geometry"]
HALF = 10
"""Place of the density at which the made-up D* is 1/2."""


def large_rows(**changes: Any) -> list[dict[str, Any]]:
    """Rows as the paper says they are: D* with a plateau at 1/2, D_i at the fractions."""
    rows = []
    rng = np.random.default_rng(0)
    for place, p in enumerate(geometry.DENSITIES):
        d_star = 1.0 if place < 4 else np.interp(place, [4, 8, 12, 29], [0.9, 0.52, 0.48, 0.1])
        digons = [0.5] * 36 if 8 <= place <= 12 else []
        others = [fraction for fraction in FRACTIONS.values() for _ in range(4)] if place in (6, 14) else []
        spread = rng.uniform(0.3, 0.8, 8).tolist() if place in (6, 14) else []
        values = digons + others + spread
        sets = {
            name: {"distance": 0.01, "coordinates": shape(name).tolist()} for name in FRACTIONS
        }  # fmt: skip
        row = {
            "n_features": 200, "n_hidden": 20, "feature_probability": p, "seed": 0, "loss": 0.1,
            "dimensions_per_feature": 0.5 if place == HALF else float(d_star), "dimensionality": values,
            "norm": [1.0] * len(values), "set_size": [2] * len(values), "nearest_sets": sets, "weight": None,
        }  # fmt: skip
        rows.append(row | changes.get(str(place), {}))
    return rows


def small_rows() -> list[dict[str, Any]]:
    rows = []
    names = {**geometry.SHAPES, geometry.SHOWN: None}
    for (n, m), name in names.items():
        w = shape(name) if name else np.random.default_rng(n).normal(size=(n, m))
        for seed, loss in enumerate((2e-3, 1e-3)):
            # The worse seed has another geometry, which must not be judged.
            weight = w if seed else np.ones((n, m))
            rows.append(
                {
                    "n_features": n, "n_hidden": m, "feature_probability": 0.05, "seed": seed, "loss": loss,
                    "dimensionality": [0.4] * n, "norm": [1.0] * n, "set_size": [n] * n, "weight": weight.tolist(),
                }
            )  # fmt: skip
    return rows


def failures(rows: list[dict[str, Any]], tmp_path: Path, *, quick: bool = False) -> list[Check]:
    outcome = geometry.REPRODUCTION.conclude(rows, TARGETS, quick, tmp_path)
    assert any(check.passed for check in outcome.checks)
    return [check for check in outcome.checks if check.passed is False]


@pytest.fixture
def _without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry_figures, "draw", lambda rows, folder: [])


@pytest.mark.usefixtures("_without_figures")
def test_what_the_paper_says_passes(tmp_path: Path) -> None:
    found = failures(large_rows() + small_rows(), tmp_path)
    assert not found, format_table(found)


@pytest.mark.usefixtures("_without_figures")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"0": {"dimensions_per_feature": 0.96}}, "farthest from 1"),
        ({str(i): {"dimensions_per_feature": 0.93**i} for i in range(10)}, "10 % of 1,"),
        ({str(HALF): {"dimensionality": [0.5] * 20 + [0.45] * 16}}, "within 0.02 of 1/2"),
        ({str(i): {"dimensions_per_feature": 0.9 * 0.9**i} for i in range(4, 30)}, "log 1/(1-S)"),
        ({key: {"dimensionality": [0.7], "norm": [1.0], "set_size": [1]} for key in ("6", "14")}, "D = 0.75"),
        ({str(i): {"nearest_sets": {}} for i in range(30)}, "pentagon: pair cosines"),
    ],
)
def test_each_line_can_miss(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    found = failures(large_rows(**changes) + small_rows(), tmp_path)
    assert any(words in check.quantity for check in found), format_table(found)


@pytest.mark.usefixtures("_without_figures")
@pytest.mark.parametrize("size", geometry.SHAPES)
def test_a_small_model_of_another_shape_misses(tmp_path: Path, size: tuple[int, int]) -> None:
    rows = small_rows()
    for row in rows:
        if (row["n_features"], row["n_hidden"]) == size:
            row["weight"] = np.ones(size).tolist()
    assert len(failures(large_rows() + rows, tmp_path)) == 1


def test_figures_and_captions(tmp_path: Path) -> None:
    made = geometry_figures.draw([*large_rows(), *small_rows()], tmp_path)
    assert {path.stem for path in made} == set(geometry_figures.WORDS)
    assert all(path.stat().st_size > 10_000 for path in made)
    assert "square antiprism" in (tmp_path / "geometry-small-models.svg").read_text(encoding="utf-8")


def test_the_plan_is_the_stated_one() -> None:
    runs = geometry.REPRODUCTION.plan(False, 2)
    large = [run for run in runs if run.toy.n_features == 200]
    assert len(large) == 60
    assert large[0].features.feature_probability == 1.0
    assert large[29].features.feature_probability == 0.05
    assert {run.toy.n_hidden for run in large} == {20}
    small = {(run.toy.n_features, run.toy.n_hidden, run.features.feature_probability) for run in runs} - {
        (200, 20, run.features.feature_probability) for run in large
    }
    assert small == {(n, m, 0.05) for n, m in (*geometry.SHAPES, geometry.SHOWN)}
    quick = geometry.REPRODUCTION.plan(True, 1)
    densities = {run.features.feature_probability for run in quick if run.toy.n_features == 200}
    assert densities == set(geometry.QUICK_DENSITIES)


def test_columns_of_known_weights() -> None:
    run = Run(ToyConfig(5, 2), FeatureConfig(feature_probability=0.05), TrainConfig(steps=1, batch_size=4), 0)
    result = train_runs([run], impl="torch")
    weight = torch.from_numpy(np.concatenate([2 * shape("two digons"), np.full((1, 2), 1e-3)])).float()
    result.model.weight.data[0, 0] = weight
    (row,) = geometry.REPRODUCTION.columns(result, [run])
    values: Any = row["dimensionality"]
    assert row["dimensions_per_feature"] == pytest.approx(2 / 16, rel=1e-5)
    assert values[:4] == pytest.approx([0.5] * 4, rel=1e-5)
    assert row["set_size"] == [2, 2, 2, 2, 0]
    assert row["nearest_sets"] is None
    assert row["weight"] == weight.double().tolist()


def test_nearest_sets_are_those_of_the_right_size() -> None:
    w = np.zeros((6, 5))
    w[:3, :2], w[3:5, 2:3] = shape("triangle"), shape("digon")
    found: Any = geometry.nearest_sets(w, [[0, 1, 2], [3, 4]])
    assert set(found) == {"triangle", "digon"}
    assert found["triangle"]["distance"] < 1e-12
    assert np.shape(found["triangle"]["coordinates"]) == (VERTICES["triangle"], 2)


def test_a_tiny_reproduction_reports_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = TrainConfig(steps=3, batch_size=8)
    runs = [
        Run(ToyConfig(n, m, parametrization="large_n"), FeatureConfig(feature_probability=p), training, 0)
        for n, m, p in ((5, 2, 0.05), (200, 20, 1.0), (200, 20, 0.3))
    ]
    tiny = dataclasses.replace(REPRODUCTIONS["geometry"], plan=lambda quick, seeds: runs)
    monkeypatch.setitem(REPRODUCTIONS, "geometry", tiny)
    result = reproduce("geometry", tmp_path, quick=True, device="cpu", impl="torch", progress=False)
    assert [row["status"] for row in result.rows] == ["ok"] * 3, result.rows
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert all(escape(caption) in text for _, caption in geometry_figures.WORDS.values())
    assert json.loads((tmp_path / "reproduction.json").read_text())["name"] == "geometry"
