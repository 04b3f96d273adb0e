from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moesaic.bench import bench_million, million_peers
from moesaic.bench.bench_million import exponent, run, sampled_gap
from moesaic.bench.kernel_bench import Options, Table
from moesaic.bench.million_cases import LR, Model, Sizes, Stepper, draw_batches, sizes_of
from moesaic.bench.million_peers import TorchStep, disagreement
from moesaic.bench.plan import InputError
from moesaic.bench.roofline import Roof
from moesaic.metrics import count_flops
from moesaic.moe import ToyConfig

SIZES = Sizes(2000, 16, 32, 2e-3, 256, "ieee", (1, 4), (1000, 2000), sampler_batch=64, moe=4)


@pytest.fixture(autouse=True)
def briefly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short rounds on one thread: on a busy machine the others would only be waited for."""
    monkeypatch.setattr(bench_million, "ROUNDS", 2)
    monkeypatch.setattr(bench_million, "LEAST_S", 1e-3)
    monkeypatch.setattr(million_peers, "CHUNK", 768)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_sizes_are_those_of_the_report() -> None:
    full, quick = sizes_of("cpu", quick=False), sizes_of("cpu", quick=True)
    assert (full.n_features, full.n_hidden, full.batch, full.probability) == (1_000_000, 64, 256, 1e-4)
    assert (full.curve[0], full.curve[-1], quick.curve[-1]) == (10_000, 1_000_000, 100_000)
    assert full.mixture == Model(1_000_000, 4, 16)
    gpu = sizes_of("cuda", quick=False)
    assert (gpu.n_hidden, gpu.batch, gpu.precision) == (1024, 4096, "bf16")


@pytest.mark.parametrize("sparse", [False, True])
def test_a_torch_step_is_ours(sparse: bool) -> None:
    ours = Stepper.of(SIZES.dense, SIZES, "cpu")
    assert disagreement(ours, TorchStep(ours, sparse=sparse)) == ""
    fresh = Stepper.of(SIZES.dense, SIZES, "cpu")
    biased = TorchStep(fresh, sparse=sparse)
    biased.scale *= 1.01
    assert "losses differ" in disagreement(fresh, biased)
    fresh = Stepper.of(SIZES.dense, SIZES, "cpu")
    wrong = TorchStep(fresh, sparse=sparse)
    wrong.optimizer.param_groups[0]["lr"] = 2 * LR
    assert "updated weights differ" in disagreement(fresh, wrong)


def test_flops_are_those_of_the_library_and_bytes_are_counted_once() -> None:
    stepper = Stepper.of(SIZES.mixture, SIZES, "cpu")
    entries = round(sum(len(x.values()) for x in stepper.batches) / len(stepper.batches))
    counted = count_flops(
        ToyConfig(2000, 4, 4, 1, "switch"), samples=32, active_features=entries / 32
    ).training.active.sparse_total
    assert counted is not None
    assert stepper.active_flops() == round(counted)
    assert stepper.executed_flops() > stepper.active_flops()
    shape = SIZES.mixture.shape
    assert sum(stepper.section_bytes().values()) == 24 * 2000 * shape.stride
    assert stepper.least_bytes() > 24 * 2000 * shape.stride
    sampled = Stepper.of(SIZES.mixture, SIZES, "cpu", decode="sampled")
    assert sampled.active_flops() == 6 * 32 * 256 * 4 + 6 * entries * 4 + 4 * entries * (4 + 4)
    assert sampled.least_bytes() < stepper.least_bytes() / 2


def test_batches_have_the_features_asked_for() -> None:
    batches = draw_batches(2000, 500, 2e-3, "cpu", 2)
    assert all(x.shape == (500, 2000) for x in batches)
    assert not torch.equal(batches[0].col_indices()[:100], batches[1].col_indices()[:100])
    assert abs(len(batches[0].values()) / 2000 - 1) < 0.15


def test_a_sampled_steps_loss_is_near_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    near = sampled_gap(SIZES, "cpu")
    assert near < 0.25
    monkeypatch.setattr(Stepper, "first_loss", lambda self: torch.tensor(float(self.training.decode == "exact") + 1))
    assert sampled_gap(SIZES, "cpu") == 0.5


def test_the_exponent_is_that_of_a_power() -> None:
    assert exponent([(n, 3 * n**1.04) for n in (1e4, 1e5, 1e6)]) == pytest.approx(1.04)
    assert math.isnan(exponent([(1e4, 1.0)]))


def test_too_little_memory_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_million, "available_bytes", lambda device: 2**20)
    with pytest.raises(InputError, match=r"needs about .* GiB"):
        run(Options((), "cpu", True, lambda line: None))


def test_the_run_has_rows_tables_a_figure_and_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, roof: Roof
) -> None:
    monkeypatch.setattr(bench_million, "sizes_of", lambda device, quick: replace(SIZES, experts=(1, 2)))
    monkeypatch.setattr(bench_million, "compiled_kernels", lambda: (Table("compiler"), []))
    monkeypatch.setattr(bench_million, "SAMPLED_TOLERANCE", 1.0)
    said: list[str] = []
    found = run(Options(("torch", "torch-sparse"), "cpu", True, said.append))
    assert not found.failures
    cases = [row["case"] for row in found.rows]
    assert {case: cases.count(case) for case in set(cases)} == {
        "step": 6, "breakdown": 11, "curve": 4, "experts": 2, "sampler": 3,
    }  # fmt: skip
    steps = [row for row in found.rows if row["case"] == "step"]
    assert {row["side"] for row in steps} == {"exact", "sampled", "torch", "torch-sparse"}
    assert all((row["memory_bound_bytes"] is None) == (row["side"] != "exact") for row in steps)
    (even, halves) = [row for row in found.rows if row["case"] == "experts"]
    assert even["active_flops_ratio"] == even["speedup"]["median"] == 1  # type: ignore[index]
    assert 1.5 < halves["active_flops_ratio"] < 2  # type: ignore[operator]
    assert [(point.side, point.group) for point in found.points[-6:]] == [
        *[("exact", "exact steps against n")] * 4, *[("exact", "exact steps against E")] * 2
    ]  # fmt: skip
    drawn = [row for row in found.rows if row["case"] in ("step", "curve", "experts")]
    assert [row["of_the_roof"] for row in drawn] == [point.of(roof) for point in found.points]
    peers = [point for point in found.points if point.side.startswith("torch")]
    assert {point.flops for point in peers} == {found.points[0].flops}
    assert len(found.tables) == 7
    assert all(table.text() for table in found.tables)
    assert len(said) == 6 + 1 + 1 + 2
    paths = found.draw(tmp_path)
    assert [path.name for path in paths] == ["million.png", "million.svg"]
    assert paths[0].stat().st_size > 10_000
