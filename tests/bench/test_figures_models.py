"""Figures of kept models: windows of a loss curve, which models are mapped, and what the maps are made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from moesaic.bench.analysis import cells, comparisons
from moesaic.bench.figures_models import (
    MAX_CURVES,
    MAX_FEATURES,
    Model,
    chosen,
    load_models,
    loss_curves,
    maps,
    model_figures,
    smoothed,
)
from moesaic.bench.models import MODEL
from moesaic.bench.plan import Row
from moesaic.bench.report import write_report
from moesaic.bench.spec import SweepSpec
from moesaic.bench.store import RunStore
from moesaic.bench.sweep import run_sweep
from moesaic.metrics import count_flops
from moesaic.moe import FeatureConfig, Run, ToyConfig, ToyModel, TrainConfig

STEPS = 300
TOYS = {
    "wide": ToyConfig(20, 10),
    "narrow": ToyConfig(20, 4),
    "mixture": ToyConfig(20, 2, n_experts=5, top_k=1, gate="sigmoid"),
    "shared": ToyConfig(20, 2, n_experts=3, top_k=1, gate="sigmoid", shared_hidden=2, tied=False),
}


def kept_rows() -> list[Row]:
    rows: list[Row] = []
    for place, (name, toy) in enumerate(TOYS.items()):
        run, flops = Run(toy, FeatureConfig(), TrainConfig(steps=STEPS), 0), count_flops(toy)
        model = {key: value[0].detach().numpy() for key, value in ToyModel(toy).named_parameters()}
        rows.append({
            **run.flat(), "run_key": run.key, "status": "ok", "dataset": "S", "architecture": name, "wall_s": 0.1,
            "unexplained_variance": 0.1 * (place + 1), "loss": 0.2, "usage": [1 / toy.n_experts] * toy.n_experts,
            "active_flops": flops.training.active.total, "total_width": flops.total_width,
            MODEL: model | {"losses": np.geomspace(1, 0.01, STEPS).astype(np.float32)},
        })  # fmt: skip
    return rows


def test_windows_of_a_curve_hold_every_step_once() -> None:
    losses = np.arange(1, 1001, dtype=np.float32)
    steps, means = smoothed(losses)
    # The losses are their own steps, so every mean is the mean step of its window.
    assert means == pytest.approx(steps)
    assert steps[0] == 1
    assert np.all(np.diff(steps) > 0)
    assert len(steps) <= 120
    assert smoothed(losses[:1])[1] == pytest.approx([1.0])


def test_the_best_mixture_is_mapped_with_the_dense_models_it_is_compared_with() -> None:
    found = cells(kept_rows())
    models = {("S", name): Model({}, {"weight": np.zeros((1, 1, 1), np.float32)}) for name in TOYS}
    (members,) = chosen(found, comparisons(found), models).values()
    assert [c.architecture for c in members] == ["wide", "narrow", "mixture"]
    without = {key: kept for key, kept in models.items() if key[1] not in ("wide", "mixture")}
    (members,) = chosen(found, comparisons(found), without).values()
    assert members[-1].architecture == "shared"
    assert chosen(found, comparisons(found), {}) == {}


def test_maps_show_weights_and_what_one_feature_adds_to_another() -> None:
    found = {c.architecture: c for c in cells(kept_rows())}
    weight = np.zeros((5, 20, 2), np.float32)
    weight[2, 5] = [3.0, 0.0]
    weight[2, 7] = [-1.0, 0.0]
    figure = maps([found["mixture"]], {("S", "mixture"): Model({}, {"weight": weight})})
    images = [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]
    stacked, interference = images[0], images[3]
    assert len(images) == 4
    assert stacked.shape == (10, 20, 4)
    assert stacked[4, 5, 3] == 1.0
    assert stacked[4, 7, 3] == pytest.approx(1 / 3)
    # Expert 2, third where no usage is known: W W^T has 9 on the diagonal of 5, -3 where 5 and 7 meet.
    assert interference[5, 5, 3] == 1.0
    assert interference[5, 7, 3] == pytest.approx(1 / 3)
    assert tuple(interference[5, 7, :3]) != tuple(interference[5, 5, :3])


def titles(figure: Figure) -> list[str]:
    return [title for axes in figure.axes if (title := axes.get_title())]


def test_a_shared_expert_and_an_untied_decoder_are_named() -> None:
    row = next(row for row in kept_rows() if row["architecture"] == "shared")
    figure = maps(cells([row]), {("S", "shared"): Model(row, row[MODEL])})  # type: ignore[arg-type]
    assert titles(figure)[1:] == ["shared: D Wᵀ", "expert 1: D Wᵀ", "expert 2: D Wᵀ"]
    row = next(row for row in kept_rows() if row["architecture"] == "wide")
    figure = maps(cells([row]), {("S", "wide"): Model(row, row[MODEL])})  # type: ignore[arg-type]
    assert titles(figure)[1:] == ["W Wᵀ"]


def test_experts_are_in_the_order_of_use_of_the_run_that_was_kept(tmp_path: Path) -> None:
    kept = next(row for row in kept_rows() if row["architecture"] == "mixture")
    weight = np.zeros((5, 20, 2), np.float32)
    weight[3, 5, 0] = 1.0
    kept |= {"seed": 1, "run_key": "kept", "usage": [0.1, 0.1, 0.1, 0.6, 0.1], MODEL: {"weight": weight}}
    first = {key: value for key, value in kept.items() if key != MODEL}
    first |= {"seed": 0, "run_key": "not kept", "usage": [0.6, 0.1, 0.1, 0.1, 0.1]}
    RunStore(tmp_path).append([first, kept])
    found = cells(RunStore(tmp_path).rows())
    models = load_models(found, tmp_path)
    assert models["S", "mixture"].row["seed"] == 1
    stacked = np.asarray(maps(found, models).axes[0].images[0].get_array())
    assert np.argwhere(stacked[..., 3]).tolist() == [[0, 5]]


def test_of_many_features_the_largest_are_mapped() -> None:
    row = kept_rows()[0] | {"n_features": 2 * MAX_FEATURES}
    weight = np.ones((1, 2 * MAX_FEATURES, 3), np.float32)
    weight[0, ::2] = -0.5
    figure = maps(cells([row]), {("S", "wide"): Model({}, {"weight": weight})})
    image = np.asarray(figure.axes[0].images[0].get_array())
    assert image.shape[1] == MAX_FEATURES
    assert np.ptp(image.reshape(-1, 4), axis=0).max() == 0.0
    blue, orange = image[0, 0, 2], image[0, 0, 0]
    assert blue > orange


def test_a_folder_with_kept_models_gets_curves_and_maps(tmp_path: Path) -> None:
    RunStore(tmp_path).append(kept_rows())
    found = cells(RunStore(tmp_path).rows())
    drawn = model_figures(found, comparisons(found), tmp_path, tmp_path / "figures")
    assert [one.name for one in drawn] == ["losses", "weights-1"]
    assert all((tmp_path / "figures" / f"{one.name}.png").stat().st_size > 5_000 for one in drawn)
    assert model_figures(found, [], tmp_path / "elsewhere", tmp_path / "figures") == []
    assert "data sets" not in drawn[1].caption
    more = cells([{**row, "dataset": str(d), "run_key": f"{d}"} for d in range(7) for row in kept_rows()[:1]])
    found += more
    captions = [one.caption for one in model_figures(found, comparisons(found), tmp_path, tmp_path / "figures")]
    assert ["6 of 8 data sets" in captions[0], "1 of 8 data sets" in captions[1]] == [True, True]


def test_curves_need_a_kept_model() -> None:
    assert loss_curves(cells(kept_rows()), {}) is None


def test_of_many_models_the_curve_of_the_best_mixture_is_drawn() -> None:
    rows = kept_rows()
    mixture = next(row for row in rows if row["architecture"] == "mixture")
    found = cells([*({**rows[0], "architecture": f"dense {i}", "total_width": 90 + i} for i in range(8)), mixture])
    losses = np.geomspace(1, 0.01, STEPS).astype(np.float32)
    figure = loss_curves(found, {("S", c.architecture): Model(c.rows[0], {"losses": losses}) for c in found})
    assert figure is not None
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert len(labels) == MAX_CURVES
    assert "mixture" in labels


def test_losses_without_a_logarithm_are_left_out_of_the_curves() -> None:
    found = cells(kept_rows())
    losses = {
        "wide": np.array([4, 3, 0, 2]), "narrow": np.array([4, np.nan, np.inf, 1]), "mixture": np.zeros(4),
        "shared": np.zeros(0),
    }  # fmt: skip
    models = {("S", name): Model({}, {"losses": values.astype(np.float32)}) for name, values in losses.items()}
    figure = loss_curves(found, models)
    assert figure is not None
    drawn = {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in figure.axes[0].lines}
    assert drawn == {"wide": [4.0, 3.0, 2.0], "narrow": [4.0, 1.0]}
    assert loss_curves(found, {key: models[key] for key in (("S", "mixture"), ("S", "shared"))}) is None


def test_an_untrained_control_has_a_report(tmp_path: Path) -> None:
    run = {"n_features": 6, "n_hidden": 2, "batch_size": 8}
    run_sweep(
        SweepSpec(run=run, grid={"steps": [0], "n_experts": [1, 3]}, seeds=[0]), tmp_path, impl="torch", progress=False
    )
    assert "Weights and interference" in write_report(tmp_path).read_text(encoding="utf-8")
    assert not (tmp_path / "figures" / "losses.png").exists()
