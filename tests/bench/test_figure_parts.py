"""Which cells a figure shows where it cannot show all, and what its caption says of the others."""

from __future__ import annotations

import math

from moesaic.bench.analysis import Cell
from moesaic.bench.figure_parts import (
    MAX_DATASETS,
    MAX_LABELS,
    Label,
    Labelled,
    few_architectures,
    few_datasets,
    left_out,
    place_labels,
)
from moesaic.bench.plan import Row
from moesaic.bench.plot_style import panels


def cell(name: str, loss: float = 0.5, dataset: str = "S", width: int = 8, flops: int = 100) -> Cell:
    row: Row = {
        "unexplained_variance": loss, "n_experts": 4 if name.startswith("MoE") else 1, "total_width": width,
        "active_flops": flops, "seed": 0,
    }  # fmt: skip
    return Cell(dataset, name, (row,))


def test_of_many_data_sets_some_are_shown_evenly_with_both_ends() -> None:
    found = [cell(name, dataset=str(d)) for d in range(16) for name in ("a", "b")]
    shown = few_datasets(found)
    assert [c.dataset for c in shown[::2]] == ["0", "3", "6", "9", "12", "15"]
    assert left_out(shown, found) == " 6 of 16 data sets."
    for count in range(1, MAX_DATASETS + 5):
        some = few_datasets(found[: 2 * count])
        assert len({c.dataset for c in some}) == min(count, MAX_DATASETS)
    assert few_datasets(found[: 2 * MAX_DATASETS]) == found[: 2 * MAX_DATASETS]
    assert left_out(found, found) == ""


def test_of_many_architectures_the_best_mixtures_are_shown_with_their_partners() -> None:
    found = [
        cell("dense 1", 0.9, width=99), cell("dense 2", 0.8, width=8, flops=500),
        cell("dense 3", 0.1, width=20, flops=900), cell("dense 4", 0.7, width=16, flops=900),
        cell("MoE 1", 0.5, width=16, flops=100), cell("MoE 2", 0.2, width=8, flops=100), cell("MoE 3", 0.4, width=8),
    ]  # fmt: skip
    # MoE 2 is the best: dense 2 is as wide as it and dense 1 costs as much; those of MoE 3 are then shown already.
    shown = few_architectures(found, 4)
    assert [c.architecture for c in shown] == ["dense 1", "dense 2", "MoE 2", "MoE 3"]
    assert left_out(shown, found) == " 4 of 7 architectures: those of lowest loss, and dense models to compare with."
    # For MoE 1 with its own two there is one place too few, and it is not shown without them.
    assert few_architectures(found, 5) == shown
    assert [c.architecture for c in few_architectures(found, 2)] == ["dense 2", "MoE 2"]
    assert few_architectures(found, 7) == found
    assert [c.architecture for c in few_architectures(found[:4], 2)] == ["dense 3", "dense 4"]


def test_architectures_are_ranked_within_each_data_set() -> None:
    # By the sum of losses "MoE x" would be second: the level of T would decide it.
    losses = {"S": (0.01, 0.02, 0.03), "T": (7.0, 9.0, 8.0), "U": (0.01, 0.02, 0.03)}
    found = [
        cell(name, loss, dataset)
        for dataset, values in losses.items()
        for name, loss in zip(("MoE w", "MoE y", "MoE x"), values, strict=True)
    ]
    assert {c.architecture for c in few_architectures(found, 2)} == {"MoE w", "MoE y"}
    unmeasured = [cell("MoE z", float("nan"), d) for d in losses]
    assert "MoE z" not in {c.architecture for c in few_architectures([*unmeasured, *found], 3)}


def test_of_many_points_the_rim_is_labelled() -> None:
    ring = [(1 + 0.9 * math.cos(a), 1 + 0.9 * math.sin(a)) for a in (0.1, 1.7, 3.3, 4.9)]
    inside = [(1 + 0.001 * i, 1 - 0.001 * i) for i in range(MAX_LABELS)]
    for points, expected in ((inside, range(MAX_LABELS)), (inside + ring, range(MAX_LABELS, MAX_LABELS + 4))):
        figure, ((axes,),) = panels(1, 1)
        axes.plot(*zip(*points, strict=True))
        labels = [Label(x, y, f"{i}") for i, (x, y) in enumerate(points)]
        place_labels(figure, [Labelled(axes, labels)])
        shown = {text.get_text() for text in axes.texts}
        assert shown == {str(i) for i in expected}
