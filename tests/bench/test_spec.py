from __future__ import annotations

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest

from moesaic.bench.plan import InputError, PlannedRun, check_memory, training_groups, unique
from moesaic.bench.spec import SweepSpec, load_spec, planned_runs
from moesaic.bench.spec_example import write_example
from moesaic.moe.config import Run, ToyConfig, TrainConfig

GOOD = """
seeds = 2
[run]
steps = 10
n_features = 8
[grid]
n_experts = [1, 2, 4]
feature_probability = [0.1, 0.5, 1]
[zip]
n_hidden = [2, 3, 4]
lr = [0.1, 0.01, 0.001]
"""


def parse(text: str) -> list[PlannedRun]:
    return planned_runs(tomllib.loads(text))


def test_a_spec_is_grid_times_zip_times_seeds_in_file_order() -> None:
    got = [
        (p.run.toy.n_experts, p.run.features.feature_probability, p.run.toy.n_hidden, p.run.training.lr, p.run.seed)
        for p in parse(GOOD)
    ]
    assert got == [
        (e, p, m, lr, seed)
        for e in (1, 2, 4)
        for p in (0.1, 0.5, 1.0)
        for m, lr in ((2, 0.1), (3, 0.01), (4, 0.001))
        for seed in (0, 1)
    ]
    assert all(p.run.training.steps == 10 and p.run.toy.n_features == 8 for p in parse(GOOD))


def test_seeds_are_a_number_a_list_or_a_field() -> None:
    assert [p.run.seed for p in parse("seeds = [7, 3]")] == [7, 3]
    assert [p.run.seed for p in parse("[grid]\nseed = [7, 3]")] == [7, 3]
    assert [p.run.seed for p in parse("[run]\nseed = 7")] == [7]
    assert [p.run for p in parse("")] == [Run()]
    assert [p.run.seed for p in planned_runs({"seeds": [7, 3]}, seeds=3)] == [0, 1, 2]


def test_quick_keeps_the_ends_of_every_list_and_the_first_seed(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(GOOD)
    (stage,) = load_spec(tmp_path / "a.toml").stages(True, None)
    quick = stage([])
    assert {p.run.seed for p in quick} == {0}
    assert [(p.run.toy.n_experts, p.run.features.feature_probability, p.run.toy.n_hidden) for p in quick] == [
        (e, p, m) for e in (1, 4) for p in (0.1, 1.0) for m in (2, 4)
    ]


BAD = {
    "misspelt key": (
        "[run]\nn_hiden = 3", [r"\[run\]", "'n_hiden'", "3", "did you mean 'n_hidden'", "allowed:", "batch_size"],
    ),
    "misspelt grid key": ("[grid]\ntopk = [1]", [r"\[grid\]", "'topk'", "did you mean 'top_k'", "allowed:"]),
    "unknown section": (
        "[girds]\nn_hidden = [1]", ["line 1", "'girds'", "did you mean 'grid'", "seeds, where, run, grid, zip, match"],
    ),
    "key at the top": ("n_hidden = 3", ["line 1", "'n_hidden'", "3", "allowed: seeds, where, run"]),
    "section that is no table": ("run = 3", ["run = 3", "table"]),
    "grid without list": ("[grid]\nn_hidden = 3", ["grid.n_hidden = 3", "list"]),
    "empty list": ("[grid]\nn_hidden = []", [r"grid.n_hidden = \[\]", "list of one value or more"]),
    "value twice": ("[grid]\nn_hidden = [2, 3, 2]", ["grid.n_hidden", "2 is in the list twice"]),
    "unequal zip": ("[zip]\nn_hidden = [2, 3]\nlr = [0.1]", ["zip", "one length", "n_hidden = 2", "lr = 1"]),
    "key in two sections": ("[run]\nlr = 0.1\n[grid]\nlr = [0.1]", ["lr is given in \\[run\\] and in \\[grid\\]"]),
    "top_k above n_experts": ("[run]\nn_experts = 2\ntop_k = 3", ["top_k=3", "n_experts=2"]),
    "top_k above n_experts in one grid point": (
        "[grid]\nn_experts = [4, 2]\ntop_k = [1, 3]",
        ["top_k=3", "n_experts=2", "in the run with n_experts = 2, top_k = 3"],
    ),
    "p = 0": ("[run]\nfeature_probability = 0.0", ["feature_probability=0.0", r"\(0, 1\]"]),
    "p > 1": ("[grid]\nfeature_probability = [0.1, 1.5]", ["feature_probability=1.5", r"\(0, 1\]"]),
    "p = nan": ("[run]\nfeature_probability = nan", ["feature_probability=nan", r"\(0, 1\]"]),
    "n < 1": ("[run]\nn_features = 0", ["n_features=0", ">= 1"]),
    "negative lr": ("[run]\nlr = -1.0", ["lr=-1.0", ">= 0"]),
    "unknown gate": ("[run]\ngate = 'papper'", ["gate='papper'", "paper, switch"]),
    "text for a number": ("[run]\nn_hidden = '3'", ["n_hidden='3'", "int"]),
    "float for a whole number": ("[run]\nn_hidden = 2.5", ["n_hidden=2.5", "int"]),
    "bool for a number": ("[run]\nn_hidden = true", ["n_hidden=True", "int"]),
    "no seeds": ("seeds = 0", ["seeds = 0", ">= 1"]),
    "negative seed": ("seeds = [0, -1]", [r"seeds = \[0, -1\]", ">= 0"]),
    "seed twice": ("seeds = [1, 1]", [r"seeds = \[1, 1\]", "different"]),
    "bool seeds": ("seeds = true", ["seeds = True", "integer"]),
    "seed and seeds": ("seeds = 2\n[run]\nseed = 1", ["seed", "not both"]),
    "not TOML": ("[run\n", ["line 1"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_spec_names_file_key_value_and_what_is_allowed(name: str, tmp_path: Path) -> None:
    text, expected = BAD[name]
    path = tmp_path / "bad.toml"
    path.write_text(text)
    for pattern in ["bad.toml", *expected]:
        with pytest.raises(InputError, match=pattern):
            load_spec(path)


LINES = {
    "[run]\nsteps = 3\nn_hiden = 3": (3, "n_hiden"),
    "seeds = 2\n# lr = 3\n[run]\nsteps = 2\n[grid]\nlr = [-1.0]": (6, "lr=-1.0"),
    "[run]\nn_experts = 2\n[zip]\n top_k=[1, 3]": (4, "top_k=3"),
    "[run]\n'lr' = 0.1\n[grid] # all\n \"lr\" = [0.1]": (4, "lr is given in"),
    "run.steps = 3\ngrid.lr = [0.1, 0.1]": (2, "in the list twice"),
    "seeds = 3\nrun = { lr = 0.1, top_k = 0 }": (2, "top_k=0"),
    "[grid]\nlr = { log = [0.1], n = 3 }": (2, "grid.lr: log = "),
    "[grid]\nseeds = 3": (2, "belongs above the first"),
    "[match]\nto = ['width']": (2, "'width' is unknown"),
    "[match]\nat = ['wall']": (2, "did you mean|allowed: to"),
    "[match]\nto = ['wall']": (2, "no run has n_experts > 1"),
    "\nwhere = ['n_hiden == 2']": (2, "did you mean 'n_hidden'"),
    "\nwhere = ['n_hidden']": (2, "gives 2; takes what is true or false"),
    "\nwhere = ['n_hidden > 2']": (2, "leaves no run"),
    "\nwhere = 3": (2, "must be a list of conditions"),
    "[zip]\nlr = [0.1]\nn_hidden = [1, 2]": (1, "one length"),
    "\n[girds]\nlr = [1]": (2, "'girds'"),
}


@pytest.mark.parametrize("text", LINES)
def test_a_bad_spec_names_the_line(text: str, tmp_path: Path) -> None:
    line, words = LINES[text]
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=rf"bad\.toml, line {line}: .*({words})"):
        load_spec(path)


def test_where_is_asked_before_a_run_is_made_and_of_every_field() -> None:
    text = "where = ['top_k <= n_experts', 'seed != n_hidden']\nseeds = 3\n[grid]\nn_experts = [1, 2]\ntop_k = [1, 2]"
    assert [(p.run.toy.n_experts, p.run.toy.top_k, p.run.seed) for p in parse(text)] == [
        (1, 1, 0), (1, 1, 1), (2, 1, 0), (2, 1, 1), (2, 2, 0), (2, 2, 1),
    ]  # fmt: skip


def test_ranges_stand_for_lists_in_grid_and_zip() -> None:
    text = (
        "[grid]\nlr = { log = [1e-4, 1e-1], n = 7 }\n[zip]\nn_hidden = { linear = [1, 2], n = 5 }\neps = [1e-8, 1e-9]"
    )
    plan = parse(text)
    assert [p.run.training.lr for p in plan[::2]] == [
        1e-4, 0.000316227766017, 1e-3, 0.00316227766017, 1e-2, 0.0316227766017, 1e-1,
    ]  # fmt: skip
    assert [(p.run.toy.n_hidden, p.run.training.eps) for p in plan[:2]] == [(1, 1e-8), (2, 1e-9)]


def test_runs_share_their_parts_and_equal_the_runs_made_one_by_one() -> None:
    plan = parse(GOOD)
    assert len({id(p.run.training) for p in plan}) == 3
    assert all(p.run == Run.from_flat(p.run.flat()) and p.run.key == Run.from_flat(p.run.flat()).key for p in plan)


def test_python_says_what_a_file_says(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(GOOD + "[match]\nto = ['parameters']\n")
    spec = SweepSpec(
        run={"steps": np.int64(10), "n_features": 8},
        grid={"n_experts": (1, 2, 4), "feature_probability": np.array([0.1, 0.5, 1])},
        zip={"n_hidden": range(2, 5), "lr": [0.1, 0.01, 0.001]},
        seeds=2,
        match=["parameters"],
        name="a",
    )
    file = load_spec(tmp_path / "a.toml")
    assert spec.mapping() == file.spec
    assert json.loads(json.dumps(spec.mapping())) == spec.mapping()
    (stage,) = file.stages(False, None)
    assert spec.planned() == stage([])
    with pytest.raises(InputError, match="n_hiden"):
        SweepSpec(run={"n_hiden": 3}).preset()


def test_the_example_runs_as_it_is_and_is_not_written_over_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    write_example(path)
    (stage,) = load_spec(path).stages(False, None)
    shapes = {(p.run.toy.n_experts, p.run.toy.n_hidden) for p in stage([])}
    assert {(1, 32), (4, 8), (16, 2)} < shapes
    assert len({p.run.toy.n_hidden for p in stage([]) if "comparison" in p.labels}) == 4
    with pytest.raises(InputError, match="is there already"):
        write_example(path)
    with pytest.raises(InputError, match="cannot be written"):
        write_example(tmp_path / "absent" / "mine.toml")


def test_a_missing_spec_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.toml.*No such file"):
        load_spec(tmp_path / "absent.toml")


def test_one_run_cannot_carry_two_sets_of_labels() -> None:
    a, b = PlannedRun(Run(seed=1), {"stage": "tune"}), PlannedRun(Run(seed=2))
    assert unique([a, b, a]) == [a, b]
    with pytest.raises(ValueError, match=r"tune.*main"):
        unique([a, PlannedRun(Run(seed=1), {"stage": "main"})])


def test_groups_hold_equal_shapes_in_plan_order_within_bounds() -> None:
    plan = [
        PlannedRun(Run(ToyConfig(n_hidden=m), training=TrainConfig(steps=5, batch_size=4), seed=seed))
        for seed in range(5)
        for m in (1, 2)
    ]
    groups = training_groups(plan, max_models=2)
    assert [[(p.run.toy.n_hidden, p.run.seed) for p in group] for group in groups] == [
        [(1, 0), (1, 1)], [(1, 2), (1, 3)], [(1, 4)], [(2, 0), (2, 1)], [(2, 2), (2, 3)], [(2, 4)],
    ]  # fmt: skip
    assert [len(group) for group in training_groups(plan, max_bytes=1)] == [1] * 10
    assert [len(group) for group in training_groups(plan)] == [5, 5]


@pytest.mark.parametrize(
    ("field", "value", "least"),
    [
        ("steps", 2**31, 2**31 * 16),
        ("batch_size", 2**40, 2**40 * 4 * 5),
        ("n_features", 2**40, 2**40 * 4 * 3 * 8),
        ("n_hidden", 2**50, 2**50 * 16 * 5),
        ("shared_hidden", 2**50, 2**50 * 16 * 5),
    ],
)
def test_a_run_larger_than_the_memory_is_refused_by_arithmetic(field: str, value: int, least: int) -> None:
    planned = [PlannedRun(Run()), PlannedRun(Run.from_flat({field: value}))]
    with pytest.raises(InputError, match=rf"{field} = {value}.*; lower .*{field}"):
        check_memory(planned, least)
    check_memory(planned, None)
    check_memory(planned[:1], 2**26)
