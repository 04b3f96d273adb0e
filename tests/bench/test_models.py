"""Models that a sweep keeps: which, in what files, and what becomes of them when something goes wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from moesaic.bench import store as store_module
from moesaic.bench.middle_path import MIDDLE_PATH
from moesaic.bench.models import FOLDER, MAX_KEPT, MODEL, load_kept, mark_kept, path_of
from moesaic.bench.plan import InputError, PlannedRun, Preset
from moesaic.bench.store import RunStore, StoreError
from moesaic.bench.sweep import run_sweep
from moesaic.moe import FeatureConfig, Run, ToyConfig, TrainConfig, train_runs

STEPS = 5
DENSE, MIXTURE = ToyConfig(6, 2), ToyConfig(6, 2, n_experts=3, top_k=1)


def run(toy: ToyConfig = DENSE, seed: int = 0, lr: float = 0.01) -> Run:
    return Run(toy, FeatureConfig(), TrainConfig(steps=STEPS, batch_size=8, lr=lr), seed)


def test_the_first_seed_of_every_configuration_is_kept_and_no_tuning_run() -> None:
    planned = [
        PlannedRun(run(seed=7), {"stage": "tune"}),
        *(PlannedRun(run(toy, seed)) for toy in (DENSE, MIXTURE) for seed in (3, 4)),
    ]
    marked = mark_kept(planned)
    assert [item.keep for item in marked] == [False, True, False, True, False]
    assert [item.run for item in marked] == [item.run for item in planned]
    assert mark_kept([]) == []


def test_of_many_configurations_some_are_kept_evenly() -> None:
    marked = mark_kept([PlannedRun(run(lr=0.001 * (i + 1))) for i in range(4 * MAX_KEPT)])
    assert [i for i, item in enumerate(marked) if item.keep] == list(range(0, 4 * MAX_KEPT, 4))


def test_every_configuration_of_the_full_middle_path_is_kept() -> None:
    planned = MIDDLE_PATH.stages(False, None)[1]([])
    kept = [item for item in mark_kept(planned) if item.keep]
    assert len(kept) == len({(item.run.toy, item.run.features) for item in planned}) == 132
    assert {item.run.seed for item in kept} == {0}


def test_of_a_run_that_diverges_the_losses_alone_are_kept(tmp_path: Path) -> None:
    wild = run(lr=1e30)
    result = run_sweep(
        Preset("one", "", lambda quick, seeds: [lambda rows: [PlannedRun(wild)]]), tmp_path, progress=False
    )
    assert [row["status"] for row in result.rows] == ["failed"]
    kept = load_kept(tmp_path, wild.key)
    assert kept is not None
    assert kept.keys() == {"losses"}
    assert kept["losses"].shape == (STEPS,)
    assert np.isfinite(kept["losses"][0])


def test_large_runs_are_not_kept() -> None:
    assert not mark_kept([PlannedRun(Run(ToyConfig(20_000, 4), FeatureConfig(), TrainConfig(steps=1), 0))])[0].keep


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep")
    runs = [PlannedRun(run(toy, seed)) for toy in (DENSE, MIXTURE) for seed in (0, 1)]
    run_sweep(Preset("two", "two shapes", lambda quick, seeds: [lambda rows: runs]), out, progress=False)
    return out


def test_a_sweep_keeps_weights_and_losses_bit_for_bit(folder: Path) -> None:
    for toy in (DENSE, MIXTURE):
        trained = train_runs([run(toy)])
        kept = load_kept(folder, run(toy).key)
        assert kept is not None
        assert np.array_equal(kept.pop("losses"), trained.losses[0].numpy())
        assert kept.keys() == dict(trained.model.named_parameters()).keys()
        for name, value in trained.model.named_parameters():
            assert np.array_equal(kept[name], value[0].detach().numpy())
        assert load_kept(folder, run(toy, 1).key) is None
    assert len(list((folder / FOLDER).iterdir())) == 2


def test_rows_do_not_show_that_a_model_was_kept(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert {tuple(row) for row in rows} == {tuple(rows[0])}
    assert MODEL not in rows[0]


def test_of_a_wide_model_the_losses_alone_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesaic.bench.models.MAX_NUMBERS", 11)
    run_sweep(Preset("one", "", lambda quick, seeds: [lambda rows: [PlannedRun(run())]]), tmp_path, progress=False)
    kept = load_kept(tmp_path, run().key)
    assert kept is not None
    assert kept.keys() == {"losses"}


def test_a_full_disk_leaves_no_row_whose_model_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module, "replace_file", full)
    store = RunStore(tmp_path)
    with pytest.raises(StoreError, match=r"models.*No space left on device.*--resume"):
        store.append([{"run_key": "k", MODEL: {"losses": np.zeros(2, np.float32)}}])
    assert RunStore(tmp_path).rows() == []


def test_a_damaged_model_is_named(folder: Path, tmp_path: Path) -> None:
    path = path_of(tmp_path, "k")
    path.parent.mkdir()
    path.write_bytes(b"no tensors")
    with pytest.raises(InputError, match=r"k\.safetensors is damaged; remove it"):
        load_kept(tmp_path, "k")


def test_keeping_is_no_part_of_a_run() -> None:
    item = PlannedRun(run())
    kept = dataclasses.replace(item, keep=True)
    assert kept.run.key == item.run.key
