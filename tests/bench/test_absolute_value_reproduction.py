"""The absolute-value reproduction: its bound, its columns, what it judges, and a tiny training."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesaic.bench.plan import InputError
from moesaic.bench.report import write_report
from moesaic.bench.report_page import escape
from moesaic.bench.reproduce import REPRODUCTIONS, absolute_value_figures, reproduce
from moesaic.bench.reproduce import absolute_value as task
from moesaic.bench.reproduce.result import Check, format_table, load_targets
from moesaic.moe import FeatureConfig, Run, ToyConfig, TrainConfig

TARGETS = load_targets()["absolute-value"]


@pytest.mark.parametrize("density", [1.0, 0.3, 0.01])
def test_variances_by_quadrature(density: float) -> None:
    x = (np.arange(200_000) + 0.5) / 100_000 - 1
    weight = np.append(np.full(len(x), density / len(x)), 1 - density)
    x = np.append(x, 0.0)
    y, h = np.abs(x), np.maximum(x, 0)
    assert task.density_variance(density) == pytest.approx(np.sum(weight * (y - np.sum(weight * y)) ** 2), rel=1e-6)
    design = np.stack([np.ones_like(h), h], axis=1)
    fit = np.linalg.solve(design.T @ (weight[:, None] * design), design.T @ (weight * y))
    left = np.sum(weight * (y - design @ fit) ** 2)
    assert task.one_neuron_variance(density) == pytest.approx(left, rel=1e-5)


@pytest.mark.parametrize("density", [1.0, 0.3, 0.001])
def test_the_bound_is_the_best_of_all_ways_to_give_neurons_to_features(density: float) -> None:
    left = [float(task.density_variance(density)), float(task.one_neuron_variance(density)), 0.0]
    importance = 0.8 ** np.arange(6)
    ways = [way for way in itertools.product(range(3), repeat=6) if sum(way) == 4]
    best = min(sum(weight * left[k] for weight, k in zip(importance, way, strict=True)) for way in ways)
    bound = task.monosemantic_bound(np.full(6, left[0]), importance, 4)
    assert bound == pytest.approx(best, rel=1e-12)
    assert bound < min(sum(w * left[k] for w, k in zip(importance, way, strict=True)) for way in ways if 1 in way)


def test_columns_of_known_neurons() -> None:
    # A pair of neurons for feature 0, of which one is scaled, and one that reads features 1 and 2.
    encoder = np.array([[2.0, -1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, -0.5]])
    decoder = np.array([[0.5, 1.0, 0.0], [0.0, 0.0, 0.8], [0.0, 0.0, 2.0]])
    row: Any = task.neurons(encoder, decoder)
    assert row["input_weight"] == [[1, 0, 0], [-1, 0, 0], [0, 1, -0.5]]
    assert row["output_weight"] == [[1, 0, 0], [1, 0, 0], [0, 0.8, 2]]
    assert row["second_weight"] == [0, 0, 0.5]
    assert row["features_per_neuron"] == pytest.approx([1, 1, 1.25**2 / (1 + 0.5**4)], abs=1e-5)
    assert row["gain"] == [[1, 1], [0.8, 0], [0, 1]]
    assert task.polysemantic(row) == pytest.approx(1 / 3)
    assert task.farthest_gain(row) == 0


def made_up(density: float, ratio: float, n_computed: int, mixed: float, *, seed: int = 0) -> dict[str, Any]:
    left = [0.01] * n_computed + [1.0] * (100 - n_computed)
    second = [0.5] * round(40 * mixed) + [0.0] * (40 - round(40 * mixed))
    rng = np.random.default_rng(seed)
    return {
        "n_features": 100, "feature_probability": density, "seed": seed, "loss": 0.1 * ratio, "bound": 0.1,
        "feature_unexplained": left, "second_weight": second, "unexplained_variance": 0.1,
        "input_weight": (rng.uniform(-1, 1, (40, 100)) ** 9).tolist(),
        "features_per_neuron": rng.uniform(1, 8, 40).tolist(),
    }  # fmt: skip


def small(unexplained: float, slope: float) -> dict[str, Any]:
    weight = np.kron(np.eye(3), [[1.0], [-1.0]])
    return {
        "n_features": 3, "feature_probability": 1.0, "loss": unexplained / 12, "unexplained_variance": unexplained,
        "gain": [[1.0, 1.0], [1.0, slope], [1.0, 1.0]], "second_weight": [0.0] * 6,
        "input_weight": weight.tolist(), "output_weight": np.abs(weight).tolist(),
    }  # fmt: skip


def rows(**changes: Any) -> list[dict[str, Any]]:
    cells = {
        "dense": (1.0, 1.1, 20, 0.0), "middle": (0.1, 0.9, 21, 0.3), "sparse": (0.001, 0.8, 24, 1.0),
    }  # fmt: skip
    found = [made_up(*changes.get(name, cell)) for name, cell in cells.items()]
    worse = [made_up(cell[0], 9.0, 3, 0.5, seed=1) for cell in cells.values()]
    return [*worse, *found, small(0.4, 0.0), small(*changes.get("small", (1e-6, 1.0)))]


def judged(found: list[dict[str, Any]], folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Check]:
    monkeypatch.setattr(absolute_value_figures, "draw", lambda rows, folder: [])
    return [c for c in task.REPRODUCTION.conclude(found, TARGETS, False, folder).checks if c.passed is not None]


def test_what_the_paper_says_passes_by_the_best_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = judged(rows(), tmp_path, monkeypatch)
    assert len(found) == 8
    assert all(check.passed for check in found), format_table(found)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dense": (1.0, 1.26, 20, 0.0)}, "bound, 1-S=1,"),
        ({"dense": (1.0, 0.7, 20, 0.0)}, "bound, 1-S=1,"),
        ({"dense": (1.0, 1.1, 20, 0.2)}, "polysemantic neurons, 1-S=1,"),
        ({"sparse": (0.001, 1.05, 24, 1.0)}, "bound, 1-S=0.001"),
        ({"sparse": (0.001, math.nan, 24, 1.0)}, "bound, 1-S=0.001"),
        ({"sparse": (0.001, 0.8, 20, 1.0)}, "computed, 1-S=0.001"),
        ({"sparse": (0.001, 0.8, 24, 0.8)}, "polysemantic neurons, 1-S=0.001"),
        ({"small": (2e-3, 1.0)}, "n=3, m=6, S=0"),
        ({"small": (1e-6, 0.95)}, "n=3, m=6: slope"),
    ],
)
def test_each_line_can_miss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    made = rows(**changes)
    if "sparse" in changes and math.isnan(changes["sparse"][1]):
        made = [row for row in made if row.get("seed") != 1]
    missed = [check.quantity for check in judged(made, tmp_path, monkeypatch) if not check.passed]
    assert len(missed) == 1
    assert words in missed[0]


def test_figures(tmp_path: Path) -> None:
    made = absolute_value_figures.draw(rows(), tmp_path)
    assert {path.stem for path in made} == set(absolute_value_figures.WORDS)
    assert all(path.stat().st_size > 10_000 for path in made)


def test_the_plan_is_the_stated_one() -> None:
    runs = task.REPRODUCTION.plan(False, 3)
    large = [run for run in runs if run.toy.n_features == 100]
    assert [run.features.feature_probability for run in large[:7]] == [1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001]
    assert {(run.toy.n_hidden, run.features.importance_base, run.toy.tied) for run in large} == {(40, 0.8, False)}
    assert len(large) == 21
    assert len(runs) - len(large) == task.SMALL_SEEDS
    assert large[4].training.lr == pytest.approx(0.003)


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    def toy(n: int, m: int) -> ToyConfig:
        return ToyConfig(n, m, tied=False, parametrization="small")

    training = TrainConfig(steps=4, batch_size=16, reduction="sum")
    runs = [
        Run(toy(3, 6), FeatureConfig(feature_probability=1.0), training, 0),
        *(
            Run(toy(100, 40), FeatureConfig(feature_probability=p, importance="geometric"), training, 0)
            for p in (0.3, 0.01)
        ),
    ]
    small = dataclasses.replace(REPRODUCTIONS["absolute-value"], plan=lambda quick, seeds: runs)
    monkeypatch.setitem(REPRODUCTIONS, "absolute-value", small)
    monkeypatch.setattr(task, "SAMPLES", 500)
    # Of untrained neurons nearly all weights would be drawn, thousands of them.
    monkeypatch.setattr(absolute_value_figures, "LEAST_WEIGHT", 0.7)


@pytest.mark.usefixtures("_tiny")
def test_a_tiny_reproduction_reports_itself_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = reproduce("absolute-value", tmp_path, quick=True, device="cpu", progress=False)
    assert [row["status"] for row in first.rows] == ["ok"] * 3, first.rows
    assert {row["task"] for row in first.rows} == {"absolute-value"}
    assert {row["trained_by"] for row in first.rows} == {"torch"}
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert all(escape(caption) in text for _, caption in absolute_value_figures.WORDS.values())

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("trained twice")

    monkeypatch.setattr(task, "train_and_measure", refuse)
    again = reproduce("absolute-value", tmp_path, quick=True, device="cpu", progress=False)
    assert again.rows == first.rows
    assert again.table == first.table


def test_only_torch_trains_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="auto or torch"):
        reproduce("absolute-value", tmp_path / "out", impl="numba", device="cpu")
    assert not (tmp_path / "out").exists()
