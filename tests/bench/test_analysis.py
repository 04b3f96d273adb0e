from __future__ import annotations

import math

import pytest

from moesaic.bench.analysis import (
    EQUAL_FLOPS,
    EQUAL_WIDTH,
    Cell,
    cells,
    chosen_rates,
    comparisons,
    coverage,
    estimate,
    on_front,
    paired,
    pareto_front,
    t_quantile,
)
from moesaic.bench.plan import Row
from moesaic.bench.words import interval, plain_words, si

NOISE = (0.0, 0.2, 0.4)


def row(architecture: str, seed: int, loss: float, **columns: object) -> Row:
    moe = architecture.startswith("MoE")
    shape: Row = {"n_experts": 4, "n_hidden": 16} if moe else {"n_experts": 1, "n_hidden": 64}
    return {
        "status": "ok", "stage": "main", "dataset": "C", "architecture": architecture, "slice": "grid", "seed": seed,
        "top_k": 1, "gate": "switch" if moe else "paper", "unexplained_variance": loss, "mean_dimensionality": 0.5,
        "active_flops": 100, "total_width": 64, **shape, **columns,
    }  # fmt: skip


def seeds(architecture: str, losses: list[float], **columns: object) -> list[Row]:
    return [row(architecture, seed, loss, **columns) for seed, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("df", "level", "expected"),
    [
        (1, 0.95, 12.7062047362),
        (2, 0.95, 4.3026527297),
        (3, 0.95, 3.1824463053),
        (4, 0.95, 2.7764451052),
        (9, 0.95, 2.2621571628),
        (30, 0.95, 2.0422724563),
        (200, 0.95, 1.9718962236),
        (1, 0.5, 1.0),
        (2, 0.99, 9.9248432009),
        (7, 0.99, 3.4994832974),
    ],
)
def test_t_quantile_equals_the_tables(df: int, level: float, expected: float) -> None:
    assert t_quantile(df, level) == pytest.approx(expected, rel=2e-11)


def test_coverage_of_one_degree_of_freedom_is_that_of_cauchy() -> None:
    assert coverage(1.0, 1) == pytest.approx(0.5, abs=1e-15)
    assert coverage(0.0, 5) == 0.0


@pytest.mark.parametrize("df", [0, -1])
def test_coverage_names_a_bad_df(df: int) -> None:
    with pytest.raises(ValueError, match=f"df.*{df}"):
        coverage(1.0, df)


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0])
def test_t_quantile_names_a_bad_level(level: float) -> None:
    with pytest.raises(ValueError, match="level"):
        t_quantile(2, level)


def test_estimate_is_the_t_interval() -> None:
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half_width == pytest.approx(4.302652729749464 / math.sqrt(3), rel=2e-11)
    assert found.low + found.high == pytest.approx(4.0)
    assert found.excludes_zero is False
    assert estimate([1.0, 1.01, 0.99]).excludes_zero
    assert estimate([-1.0, -1.01, -0.99]).excludes_zero


def test_one_seed_allows_no_verdict() -> None:
    one = estimate([5.0])
    assert math.isnan(one.low)
    assert not one.excludes_zero
    assert interval(one) == "5.000"
    assert interval(estimate([])) == "n/a"


def test_pairing_by_seed_resolves_what_overlapping_intervals_do_not() -> None:
    dense = seeds("dense m=64", [0.5 + e for e in NOISE])
    moe = seeds("MoE 4×16 k=1", [0.4 + e + d for e, d in zip(NOISE, (0.0, 0.01, -0.01), strict=True)])
    (one, other) = cells(moe + dense)
    assert one.estimate("unexplained_variance").high > other.estimate("unexplained_variance").low
    difference = paired(one, other, "unexplained_variance")
    assert difference.mean == pytest.approx(-0.1)
    assert difference.excludes_zero
    assert [c.winner for c in comparisons([one, other])] == ["MoE", "MoE"]


def test_pairing_uses_only_seeds_that_both_finished() -> None:
    moe = seeds("MoE 4×16 k=1", [0.4, 0.5, 0.6])
    dense = [row("dense m=64", 2, 0.5), row("dense m=64", 1, 0.3), {**row("dense m=64", 0, 9.0), "status": "failed"}]
    one, other = cells(moe + dense)
    found = paired(one, other, "unexplained_variance")
    assert found.n == 2
    assert found.mean == pytest.approx(0.15)


def test_cells_leave_out_tuning_and_failed_runs_and_null_columns() -> None:
    rows = [
        row("dense m=64", 0, 0.5),
        row("dense m=64", 1, 0.7, stage="tune"),
        row("dense m=64", 2, 0.9, status="failed"),
        row("dense m=64", 3, 0.7, mean_dimensionality=None),
    ]
    (cell,) = cells(rows)
    assert cell.seeds("unexplained_variance") == {0: 0.5, 3: 0.7}
    assert cell.seeds("mean_dimensionality") == {0: 0.5}
    assert math.isnan(cell.mean("no_such_column"))


def test_unlabelled_rows_are_named_by_everything_that_varies() -> None:
    base = {"status": "ok", "n_experts": 4, "n_hidden": 2, "top_k": 1, "gate": "paper", "features": "independent"}
    rows: list[Row] = [
        {**base, "seed": s, "lr": lr, "feature_probability": p} for s in (0, 1) for lr in (0.1, 0.2) for p in (0.5, 0.9)
    ]
    found = cells(rows)
    assert [(c.dataset, c.architecture, len(c.rows)) for c in found] == [
        ("independent, p = 0.5", "MoE 4×2 k=1, paper, lr=0.1", 2),
        ("independent, p = 0.9", "MoE 4×2 k=1, paper, lr=0.1", 2),
        ("independent, p = 0.5", "MoE 4×2 k=1, paper, lr=0.2", 2),
        ("independent, p = 0.9", "MoE 4×2 k=1, paper, lr=0.2", 2),
    ]


def grid(moe: list[float], near: list[float], wide: list[float]) -> list[Cell]:
    return cells(
        seeds("MoE 4×16 k=1", moe, active_flops=100)
        + seeds("MoE 4×16 k=1, paper", moe, active_flops=100, slice="gates", gate="paper")
        + seeds("dense m=17", near, active_flops=104, total_width=17, n_hidden=17)
        + seeds("dense m=18", near, active_flops=107, total_width=18, n_hidden=18)
        + seeds("dense m=64", wide, active_flops=400)
    )


def test_partners_are_of_equal_width_and_of_nearest_flops() -> None:
    found = comparisons(grid([0.2, 0.21], [0.4, 0.41], [0.1, 0.11]))
    assert [(c.matched_by, c.moe.architecture, c.dense.architecture, c.winner) for c in found] == [
        (EQUAL_WIDTH, "MoE 4×16 k=1", "dense m=64", "dense"),
        (EQUAL_FLOPS, "MoE 4×16 k=1", "dense m=17", "MoE"),
    ]


def test_no_comparison_without_a_partner_within_tolerance() -> None:
    rows = seeds("MoE 4×16 k=1", [0.1, 0.2], active_flops=100) + seeds(
        "dense m=20", [0.1, 0.2], active_flops=111, total_width=20
    )
    assert comparisons(cells(rows)) == []


def test_words_say_wins_losses_and_not_resolved() -> None:
    found = grid([0.2, 0.21], [0.4, 0.41], [0.1, 0.11])
    text = plain_words(found, comparisons(found))
    assert "At equal total width, dense has the lower loss in the one pair." in text
    assert "On C, MoE loses with 4×16 k=1 (0.205 against 0.105 of dense m=64)." in text
    assert "On C, MoE wins with 4×16 k=1 (0.205 against 0.405 of dense m=17)." in text
    assert "not resolved for paper" in text
    noisy = grid([0.2, 0.6], [0.5, 0.3], [0.4, 0.3])
    text = plain_words(noisy, comparisons(noisy))
    assert "On C, not resolved: 4×16 k=1." in text
    assert "wins" not in text
    assert "loses" not in text
    assert plain_words([], []) == ""


def test_words_give_the_other_gates_by_paired_loss() -> None:
    rows = seeds("MoE 4×16 k=1", [0.2, 0.4]) + seeds("dense m=64", [0.2, 0.4])
    rows += seeds("MoE 4×16 k=1, oracle", [0.1, 0.301], slice="gates", gate="oracle")
    rows += seeds("MoE 4×16 k=1, random", [0.3, 0.501], slice="gates", gate="random")
    found = cells(rows)
    assert "lower with oracle; higher with random" in plain_words(found, comparisons(found))


def test_pareto_front_keeps_what_nothing_dominates() -> None:
    points = [(1.0, 3.0), (2.0, 2.0), (3.0, 1.0), (3.0, 3.0), (2.0, 2.0), (0.0, math.nan)]
    assert pareto_front(points) == [True, True, True, False, True, False]
    assert pareto_front([]) == []


def test_front_wants_high_dimensionality_and_is_per_data_set() -> None:
    rows = [
        row("dense m=4", 0, 0.5, active_flops=10, mean_dimensionality=0.2),
        row("dense m=8", 0, 0.5, active_flops=10, mean_dimensionality=0.9),
        row("dense m=16", 0, 0.4, active_flops=20, mean_dimensionality=0.1),
        row("dense m=4", 0, 0.5, active_flops=10, mean_dimensionality=0.2, dataset="D"),
    ]
    found = [(c.dataset, c.architecture) for c in on_front(cells(rows))]
    assert found == [("C", "dense m=8"), ("C", "dense m=16"), ("D", "dense m=4")]


TOY: Row = {
    "status": "ok", "stage": "main", "n_features": 32, "n_experts": 1, "n_hidden": 8, "top_k": 1, "gate": "paper",
    "tied": True, "parametrization": "paper", "router_init": "default", "features": "independent",
    "feature_probability": 0.1, "steps": 10, "batch_size": 64, "lr": 0.01, "active_flops": 100, "total_width": 8,
    "mean_dimensionality": 0.5,
}  # fmt: skip


def toys(loss: float, **columns: object) -> list[Row]:
    return [{**TOY, "unexplained_variance": loss + seed / 100, "seed": seed, **columns} for seed in (0, 1)]


DIFFERENT = [("n_features", 64), ("lr", 0.02), ("steps", 20), ("batch_size", 128), ("tied", False),
             ("parametrization", "tms"), ("router_init", "k_hot")]  # fmt: skip


@pytest.mark.parametrize(("column", "other"), DIFFERENT)
def test_partners_are_of_equal_data_and_settings(column: str, other: object) -> None:
    moe = {"n_experts": 4, "n_hidden": 2}
    rows = toys(0.4, **{column: other}) + toys(0.3, **moe)
    assert comparisons(cells(rows)) == []
    rows += toys(0.2) + toys(0.1, **moe, **{column: other})
    found = comparisons(cells(rows))
    assert len(found) == 4
    assert all(c.moe.value(column) == c.dense.value(column) for c in found)
    assert all(c.moe.dataset == c.dense.dataset for c in found)


@pytest.mark.parametrize(("column", "other"), DIFFERENT)
def test_front_is_of_cells_of_equal_data_and_settings(column: str, other: object) -> None:
    rows = toys(0.4, **{column: other}) + toys(0.3) + toys(0.35, n_experts=4, n_hidden=2)
    assert [c.mean("unexplained_variance") for c in on_front(cells(rows))] == pytest.approx([0.405, 0.305])


def test_learning_rates_may_differ_where_they_were_tuned() -> None:
    rows = toys(0.4) + toys(0.3, n_experts=4, n_hidden=2, lr=0.02)
    rows = [{**r, "dataset": "S", "architecture": "MoE" if r["n_experts"] == 4 else "dense"} for r in rows]
    assert comparisons(cells(rows)) == []
    assert len(on_front(cells(rows))) == 2
    rows += [{**rows[0], "stage": "tune", "seed": 9}]
    assert [c.matched_by for c in comparisons(cells(rows))] == [EQUAL_WIDTH, EQUAL_FLOPS]
    assert [c.architecture for c in on_front(cells(rows))] == ["MoE"]
    steps = [{**r, "steps": 20} if r["architecture"] == "MoE" else r for r in rows]
    assert comparisons(cells(steps)) == []


def test_data_sets_of_different_n_features_are_two() -> None:
    found = cells(toys(0.4) + toys(0.4, n_features=64))
    assert [(c.dataset, c.architecture) for c in found] == [
        ("independent, p = 0.1, n_features=32", "dense m=8"),
        ("independent, p = 0.1, n_features=64", "dense m=8"),
    ]


def test_a_dense_cell_has_one_run_per_seed_whatever_the_gates() -> None:
    gates = ("sigmoid", "switch", "paper")
    rows = [r for gate in gates for e in (1, 4) for r in toys(0.1 * e, gate=gate, n_experts=e, n_hidden=8 // e)]
    found = {c.architecture: c for c in cells(rows)}
    assert list(found) == [
        "dense m=8, sigmoid", "MoE 4×2 k=1, sigmoid", "dense m=8", "MoE 4×2 k=1, switch", "MoE 4×2 k=1, paper",
    ]  # fmt: skip
    assert [r["gate"] for r in found["dense m=8"].rows] == ["switch", "switch"]
    assert {c.dense.architecture for c in comparisons(list(found.values()))} == {"dense m=8"}


@pytest.mark.parametrize(
    "columns", [{}, {"gate": "switch", "lr": 0.5}, {"gate": "sigmoid"}, {"gate": "switch", "n_experts": 4}]
)
def test_two_runs_of_one_seed_in_a_cell_are_an_error(columns: Row) -> None:
    names = {"dataset": "S", "architecture": "A"}
    with pytest.raises(ValueError, match="seed=0 of 'A' on 'S'"):
        cells(toys(0.1, **names, n_experts=columns.get("n_experts", 1)) + toys(0.2, **{**names, **columns}))


def test_exactly_k_data_are_told_apart_by_a_varying_probability() -> None:
    kind = {"features": "exactly_k", "n_active": 3}
    found = cells(toys(0.1, **kind) + toys(0.2, **kind, feature_probability=0.2))
    assert [c.dataset for c in found] == [f"exactly 3 active, feature_probability={p}" for p in (0.1, 0.2)]


def tuned(lr: float, loss: float, seed: int = 0, **columns: object) -> Row:
    return row("dense m=4", seed, loss, stage="tune", lr=lr, **columns)


def test_best_rate_is_the_lowest_mean_over_tuning_seeds() -> None:
    losses = {0.01: (0.5, 0.1), 0.03: (0.2, 0.3), 0.1: (0.15, 0.9)}
    rows = [tuned(lr, v, seed) for lr, values in losses.items() for seed, v in enumerate(values)]
    rows += seeds("dense m=4", [0.0], lr=0.1)
    chosen = chosen_rates(rows)
    assert set(chosen) == {("C", "dense m=4")}
    assert chosen["C", "dense m=4"].lr == 0.03
    assert chosen["C", "dense m=4"].loss == pytest.approx(0.25)
    assert not chosen["C", "dense m=4"].at_edge


def test_a_rate_with_a_failed_seed_is_not_chosen_and_the_grid_keeps_it() -> None:
    rows = [tuned(lr, loss, seed) for lr, loss in ((0.01, 0.5), (0.03, 0.4), (0.1, 0.1)) for seed in (0, 1)]
    rows[-1] = tuned(0.1, 0.1, 1, status="failed")
    chosen = chosen_rates(rows)["C", "dense m=4"]
    assert (chosen.lr, chosen.grid, chosen.at_edge) == (0.03, (0.01, 0.03, 0.1), False)
    assert chosen_rates([tuned(0.01, 0.5)])["C", "dense m=4"].at_edge
    assert chosen_rates([tuned(0.01, 0.5, status="failed")]) == {}


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "0.5"), (999.0, "999"), (999.6, "1k"), (20480, "20.5k"), (1e6, "1M"), (3.2e12, "3.2T")]
)
def test_si_prefixes(value: float, text: str) -> None:
    assert si(value) == text
