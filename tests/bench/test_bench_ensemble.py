from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.bench import bench_ensemble, ensemble_limit, ensemble_peers
from moesaic.bench.bench_ensemble import Measured, draw, measure, run
from moesaic.bench.ensemble_limit import issue_limit, runs_on_the_chip
from moesaic.bench.ensemble_peers import Case, Ensemble, Peer, cases, check_case, relative, vmap_error, vmap_trainer
from moesaic.bench.interleave import NotRunError, Timing
from moesaic.bench.kernel_bench import Options
from moesaic.bench.reproduce import phase_plan
from moesaic.bench.roofline import Roof
from moesaic.bench.vmap_baseline import VmapTrainer
from moesaic.kernels import EnsembleShape, sample_features
from moesaic.kernels.ensemble_compile import CompileReport
from moesaic.moe import FeatureConfig, Run, ToyConfig, TrainConfig, train_runs
from moesaic.moe.data import feature_table

# Worst element over the RMS of its tensor, after four steps. The worst seen over the shapes is 2e-6.
TOLERANCE = 1e-5
QUIET = Options(("vmap",), "cpu", True, lambda line: None)


def case(n: int = 3, m: int = 2, e: int = 3, k: int = 1, p: float = 0.97, models: int = 3, **training: Any) -> Case:
    """Models that differ in p and importance, with a weight decay and a load balance that leave a mark."""
    values: dict[str, Any] = {"batch_size": 48, "lr": 1e-2, "weight_decay": 0.5, "load_balance": 0.3} | training
    toy = ToyConfig(n, m, e, k)
    runs = [
        Run(toy, FeatureConfig("independent", p - 0.01 * s, importance="geometric", importance_base=0.8 + 0.1 * s),
            TrainConfig(**values), seed=5 + s)
        for s in range(models)
    ]  # fmt: skip
    return Case(tuple(runs), "cpu")


def train_both(one: Case, change: Callable[[VmapTrainer], object] = lambda trainer: None, steps: int = 4) -> float:
    """Largest difference of losses, moments and weights after steps on the samples that `train_ensemble` draws."""
    ours, theirs = Ensemble(one), vmap_trainer(one)
    change(theirs)
    found: list[Tensor] = []
    for step in range(steps):
        settings = ours.settings
        x = sample_features(settings.features, one.training.batch_size, seeds=settings.seeds, step=step)
        assert bool(x.any(-1).all()), "an all-zero sample ties the scores, and PyTorch leaves open who wins"
        expected = theirs.train_step(x)
        found += [relative(mine, loss[:, None]) for mine, loss in zip(ours.train(1), expected, strict=True)]
    for flat, tensors in (
        (ours.exp_avg, theirs.exp_avg), (ours.exp_avg_sq, theirs.exp_avg_sq), (ours.state, theirs.weights)
    ):  # fmt: skip
        for name, mine in ours.shape.split(flat).items():
            if one.toy.n_experts > 1 or name != "router" or flat is ours.state:
                found.append(relative(mine.flatten(1), tensors[name].flatten(1)))
    return float(torch.stack(found).max())


@pytest.mark.parametrize(("n", "m", "e", "k", "p"), [(3, 2, 3, 1, 0.97), (17, 3, 1, 1, 0.5), (9, 2, 4, 2, 0.8)])
def test_the_baseline_trains_as_train_ensemble_does(n: int, m: int, e: int, k: int, p: float) -> None:
    assert train_both(case(n, m, e, k, p)) < TOLERANCE


@pytest.mark.parametrize("impl", ["torch", "numba"])
def test_the_baseline_learns_the_model_of_moe_train(impl: str) -> None:
    one = case(steps=6)
    trained = train_runs(one.runs, impl=impl)
    theirs, settings = vmap_trainer(one), Ensemble(one).settings
    for step in range(one.training.steps):
        x = sample_features(feature_table(one.runs), one.training.batch_size, seeds=settings.seeds, step=step)
        for losses, expected in zip(theirs.train_step(x), (trained.losses, trained.load_balance_losses), strict=True):
            assert float(relative(losses[:, None], expected[:, step : step + 1])) < TOLERANCE
    for name, weight in theirs.weights.items():
        assert float(relative(weight.flatten(1), getattr(trained.model, name).detach().flatten(1))) < TOLERANCE


def _set(name: str, value: Any) -> Callable[[VmapTrainer], object]:
    return lambda trainer: setattr(trainer, name, value)


@pytest.mark.parametrize(
    "change",
    [
        _set("load_balance", 0.0),
        _set("weight_decay", 0.0),
        _set("lr", 1.01e-2),
        _set("top_k", 2),
        _set("step", 1),
        lambda trainer: trainer.importance.fill_(1.0),
        lambda trainer: trainer.weights["bias"].zero_(),
        lambda trainer: trainer.weights["weight"][:, 1].zero_(),
        lambda trainer: trainer.exp_avg_sq["router"].fill_(1e-6),
    ],
    ids=["balance", "decay", "rate", "k", "bias correction", "importance", "bias", "expert dropped", "second moment"],
)
def test_the_tolerance_can_fail(change: Callable[[VmapTrainer], object]) -> None:
    assert train_both(case(), change) > 100 * TOLERANCE


def test_the_baseline_draws_features_by_their_probability() -> None:
    torch.manual_seed(3)
    one = case(models=2, batch_size=20_000)
    x = vmap_trainer(one).draw()
    assert x.shape == (2, 20_000, 3)
    for s, p in enumerate((0.97, 0.96)):
        present = x[s] > 0
        # Six standard errors of 20,000 samples.
        assert torch.allclose(present.float().mean(0), torch.tensor(p), atol=0.018)
        values = x[s][present]
        assert float(values.max()) < 1
        assert float(values.mean()) == pytest.approx(0.5, abs=0.006)
        assert float(values.var()) == pytest.approx(1 / 12, abs=0.003)


def test_the_baseline_learns() -> None:
    torch.manual_seed(3)
    one = case(weight_decay=0.0, lr=5e-2)
    trainer = vmap_trainer(one)
    before = trainer.train_step(trainer.draw())[0]
    trainer.train(40)
    assert trainer.step == 41
    assert bool((trainer.train_step(trainer.draw())[0] < 0.7 * before).all())


def test_cases_are_the_panels_in_full_and_four_larger_shapes() -> None:
    full, quick = cases("cpu", False), cases("cpu", True)
    panels = ["(2,1,1)", "(2,1,2)", "(3,1,1)", "(3,1,2)", "(3,1,3)", "(3,2,1)", "(3,2,2)", "(3,2,3)"]
    larger = ["(100,20,1)", "(100,5,4)", "(100,2,10)", "(128,8,16)"]
    assert [one.shape for one in full] == [one.shape for one in quick] == panels + larger
    assert [len(one.runs) for one in full] == [2262] * 8 + [16] * 4
    assert [len(one.runs) for one in quick] == [227] * 8 + [4] * 4
    assert [len(one.runs) for one in cases("cuda", False)] == [2262] * 8 + [128] * 4
    for one in full:
        data = [run.features.feature_probability for run in one.runs]
        assert len({run.group for run in one.runs}) == 1
        assert [run.seed for run in one.runs] == list(range(len(one.runs)))
        assert (one.toy.top_k, one.toy.gate, one.training.load_balance) == (1, "paper", 0.01)
        assert one.training.batch_size == (512 if len(one.runs) == 2262 else 1024)
        ends = (0.025, 0.975) if len(one.runs) == 2262 else (0.1, 1.0)
        assert (min(data), max(data)) == pytest.approx(ends)
    importances = {run.features.importance_base for run in full[0].runs}
    assert (len(importances), min(importances), max(importances)) == (58, 0.1, 2.95)


def test_equal_numbers_do_not_differ_and_a_nan_does() -> None:
    zeros, one = torch.zeros(2, 3), torch.tensor([[0.0, 0.0, 0.0], [0.0, 1e-9, 0.0]])
    assert float(relative(zeros, zeros)) == 0.0
    assert math.isinf(float(relative(one, zeros)))
    assert float(relative(2 * one, one)) == pytest.approx(3**0.5)
    assert math.isnan(float(relative(torch.full((2, 3), math.nan), zeros)))


def test_the_check_is_small_dense_and_sees_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    one = case(models=11)
    small = check_case(one)
    assert [run.seed for run in small.runs] == [5, 8, 11, 14]
    assert {run.features.feature_probability for run in small.runs} == {1.0}
    assert [run.features.importance_base for run in small.runs] == [
        one.runs[i].features.importance_base for i in (0, 3, 6, 9)
    ]
    assert 0 < vmap_error(small) < TOLERANCE
    assert 0 <= ensemble_peers.stacked_error(small) < TOLERANCE

    differences = iter([1e-7, math.nan, *[1e-7] * 20])
    monkeypatch.setattr(ensemble_peers, "relative", lambda mine, other: torch.tensor(next(differences)))
    assert math.isnan(vmap_error(small))


def test_ensemble_continues_where_the_last_call_ended() -> None:
    one, two = Ensemble(case()), Ensemble(case())
    whole = one.train(5)[0]
    cut = torch.cat([two.train(2)[0], two.train(3)[0]], dim=1)
    assert torch.equal(whole, cut)
    assert torch.equal(one.state, two.state)


def test_executed_rows_are_masked_for_few_experts_and_whole_vectors_for_many() -> None:
    # Up to three experts: each computes every sample of three models.
    assert Ensemble(case(3, 2, 3)).executed_rows() == 3 * 3 * 48
    assert Ensemble(case(3, 2, 1)).executed_rows() == 3 * 48
    # From four on, 16 samples at a time. All go to expert 3, whose router alone is positive: 48 fill three vectors.
    for batch, rows in ((48, 48), (49, 64)):
        one = Ensemble(case(5, 2, 5, models=2, batch_size=batch))
        router = one.shape.split(one.state)["router"]
        router.fill_(-1.0)
        router[:, 3] = 1.0
        assert one.executed_rows() == 2 * rows


def fake_peer(error: float, contender: Callable[[Case], Any] | None = None) -> Peer:
    return Peer(contender or (lambda case: lambda steps: 1e-3 * steps), lambda case: error, dense=True)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_ensemble, "QUICK_LEAST_S", 1e-3)


@pytest.mark.usefixtures("short")
def test_peers_that_disagree_or_cannot_run_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(case: Case) -> Any:
        raise NotRunError("needs 900 GiB")

    def out_of_memory(case: Case) -> Any:
        def timed(steps: int) -> float:
            raise torch.OutOfMemoryError("CUDA out of memory")

        return timed

    peers = {
        "good": fake_peer(9e-4), "bad": fake_peer(2e-3), "nan": fake_peer(math.nan), "large": fake_peer(0.0, refuse),
        "full": fake_peer(0.0, out_of_memory),
    }  # fmt: skip
    monkeypatch.setattr(bench_ensemble, "PEERS", peers)
    monkeypatch.setattr(bench_ensemble, "cases", lambda device, quick: [case()])
    monkeypatch.setattr(bench_ensemble, "issue_limit", lambda: ensemble_limit.IssueLimit((), reason="no compiler"))
    said: list[str] = []
    found = run(replace(QUIET, against=tuple(peers), say=said.append))
    row: dict[str, Any] = found.rows[0]
    assert (list(row["sides"]), list(row["ratio"])) == (["moesaic", "good"], ["good"])
    assert list(row["disagrees"]) == ["bad", "nan"]
    assert row["not_run"] == {"large": "needs 900 GiB", "full": "CUDA out of memory"}
    assert row["largest_difference"]["bad"] == 2e-3
    assert list(found.failures) == [
        "(3,2,3): bad differs by 2.0e-03 on equal samples, more than 0.001",
        "(3,2,3): nan differs by nan on equal samples, more than 0.001",
    ]
    assert "(3,2,3): large not run: needs 900 GiB" in found.tables[0].notes
    assert [line[2:4] for line in found.tables[0].lines][2:] == [
        (name, "not run") for name in ("large", "full", "bad", "nan")
    ]
    assert found.tables[1].notes == ("not available: no compiler",)
    assert len(said) == 7
    assert [(point.label, point.side) for point in found.points] == [
        ("(3,2,3), 3 × 48", "moesaic"), ("(3,2,3), 3 × 48", "good")
    ]  # fmt: skip
    assert row["sides"]["good"]["ms_per_step"] == pytest.approx(1.0)


EXECUTED = 200  # (sample, expert) pairs, of 3 models' 48 samples and 3 experts


def measured(**seconds: float) -> Measured:
    timings = {name.replace("_", "-"): Timing(3, (0.9 * s, s, 1.2 * s)) for name, s in seconds.items()}
    return Measured(case(), EXECUTED, timings, {"moesaic": 2, "vmap": 1, "torch-stacked": 2}, {}, {}, {})


def test_a_row_has_rates_and_flops_of_both_sides(roof: Roof) -> None:
    row: dict[str, Any] = measured(moesaic=0.5, vmap=2.0, torch_stacked=1.0).row(roof)
    ours, vmap, stacked = (row["sides"][name] for name in ("moesaic", "vmap", "torch-stacked"))
    assert (ours["ms_per_step"], ours["ms_lowest"], ours["ms_highest"]) == pytest.approx((500, 450, 600))
    assert (ours["model_steps_per_s"], ours["samples_per_s"]) == (6.0, 288.0)
    # n = 3, m = 2, E = 3, k = 1: encode 2·2nm and decode 3·2nm of each computed expert, router 2·2nE.
    expert, router, samples = 5 * 2 * 3 * 2, 2 * 2 * 3 * 3, 3 * 48
    useful = samples * (expert + router)
    for side, seconds, executed in (
        (ours, 0.5, EXECUTED * expert + samples * router), (vmap, 2.0, samples * (3 * expert + router)),
        (stacked, 1.0, useful),
    ):  # fmt: skip
        assert (side["useful_flops_per_step"], side["executed_flops_per_step"]) == (useful, executed)
        assert side["of_the_roof"] == pytest.approx(useful / 1e11 / seconds)
        assert (side["useful_flops_per_s"], side["executed_flops_per_s"]) == (useful / seconds, executed / seconds)
    assert [row["sides"][name]["threads"] for name in row["sides"]] == [2, 1, 2]
    assert [line[2] for line in measured(moesaic=0.5, vmap=2.0, torch_stacked=1.0).lines(roof)] == [
        "moesaic", "vmap, 1 thread", "torch-stacked",
    ]  # fmt: skip
    # 36 parameters with two moments, in and out once in 5,000 steps; a rate and two losses in every step.
    assert row["least_bytes_per_step"] == pytest.approx(3 * (24 * (18 + 9 + 9) / 5000 + 16))
    assert row["ratio"]["vmap"] == pytest.approx({"median": 4.0, "low": 4.0, "high": 4.0})
    assert (row["models"], row["batch_size"], row["feature_probability"]) == (3, 48, pytest.approx([0.95, 0.97]))


def test_the_baseline_is_not_run_where_memory_would_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    large = cases("cpu", False)[-1]
    monkeypatch.setattr("moesaic.bench.environment.device_memory_bytes", lambda device: 2**30)
    with pytest.raises(NotRunError, match=r"needs about 0\.8 GiB of memory, of 1\.0 GiB in all"):
        ensemble_peers.vmap_contender(large)
    monkeypatch.setattr("moesaic.bench.environment.device_memory_bytes", lambda device: None)
    assert ensemble_peers.vmap_contender(case())(1) > 0


@pytest.mark.usefixtures("short")
def test_a_peer_is_timed_with_all_threads_and_with_one_and_the_faster_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def faster_with(best: int) -> Peer:
        return fake_peer(0.0, lambda case: lambda steps: steps * (1.0 if torch.get_num_threads() == best else 5.0))

    monkeypatch.setattr(bench_ensemble, "PEERS", {"one": faster_with(1), "all": faster_with(2)})
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = measure(case(), replace(QUIET, against=("one", "all")))
    finally:
        torch.set_num_threads(before)
    assert found.threads == {"moesaic": 2, "one": 1, "all": 2}
    assert (found.timings["one"].median, found.timings["all"].median) == (1.0, 1.0)


@pytest.mark.usefixtures("short")
def test_both_peers_are_measured_on_the_same_case() -> None:
    found = measure(case(batch_size=8), replace(QUIET, against=("vmap", "torch-stacked")))
    assert list(found.timings) == ["moesaic", "vmap", "torch-stacked"]
    assert all(len(timing.seconds) == bench_ensemble.QUICK_ROUNDS for timing in found.timings.values())
    assert all(timing.low > 0 for timing in found.timings.values())
    assert (found.not_run, found.disagrees) == ({}, {})


@pytest.mark.gpu
@pytest.mark.usefixtures("short")
def test_both_peers_are_measured_on_a_gpu() -> None:
    options = replace(QUIET, against=("vmap", "torch-stacked"), device="cuda")
    for one in (case(batch_size=64), case(20, 3, 5, p=0.8, batch_size=64)):
        found = measure(replace(one, device="cuda"), options)
        assert (found.not_run, found.disagrees) == ({}, {})
        assert list(found.timings) == ["moesaic", "vmap", "torch-stacked"]


def test_the_figure_shows_every_case_and_leaves_out_what_was_not_run(tmp_path: Path) -> None:
    found = [measured(moesaic=0.5, vmap=2.0, torch_stacked=1.0), measured(moesaic=0.5), measured(moesaic=0.1, vmap=123)]
    paths = draw(found, tmp_path / "figures")
    assert [path.name for path in paths] == ["bench-ensemble.png", "bench-ensemble.svg"]
    assert all(path.stat().st_size > 5000 for path in paths)
    svg = paths[1].read_text()
    assert svg.count("(3,2,3), 3 × 48") == 3
    assert all(words in svg for words in (">1230<", ">torch-stacked<", ">vmap<", ">moesaic<"))
    assert all(path.exists() for path in draw([measured(moesaic=0.5)], tmp_path / "alone"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replaces the compiler; holds (n, m, E, k, batch, arch) of what it was asked to compile."""
    seen: list[Any] = []

    def compile_report(shape: EnsembleShape, arch: int) -> CompileReport:
        seen.append((shape.n_features, shape.n_hidden, shape.n_experts, shape.top_k, shape.batch_size, arch))
        return CompileReport("registers", arch, 150, 0, 0, 0, 219, 300)

    monkeypatch.setattr("moesaic.kernels.ensemble_compile.compile_report", compile_report)
    return seen


def test_the_issue_limit_follows_from_the_instructions(asked: list[Any]) -> None:
    limit = issue_limit()
    assert asked == [(*panel, 1, 512, 90) for panel in phase_plan.PANELS]
    panels: Any = limit.record({})["panels"]
    assert [panel.pop("shape") for panel in panels] == [phase_plan.panel_name(panel) for panel in phase_plan.PANELS]
    # 22,620 models x 5,000 steps x (16 warps of samples x 219 + 300 instructions) over 132 x 4 x 1.98e9 per second.
    assert panels[0] == panels[-1] == {
        "registers": 150, "spills": 0, "instructions": 219, "step_instructions": 300,
        "limit_s": pytest.approx(0.4115324, rel=1e-6),
        "limit_model_steps_per_s": pytest.approx(22_620 * 5000 / 0.4115324, rel=1e-6), "achieved": None,
    }  # fmt: skip
    text = limit.table({}).text()
    for words in ("not a measurement", "22,620 models x 5,000 steps x (16 x per 32", "132 SMs x 4 issue", "1.98 GHz"):
        assert words in text
    assert "0.412" in text
    assert "achieved" not in text


def test_the_compiler_reports_a_panel_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ensemble_limit, "PANELS", ((2, 1, 1),))
    (panel,) = issue_limit().panels
    assert (panel.shape, panel.spills) == ("(2,1,1)", 0)
    assert 20 <= panel.registers <= 255
    # Drawing two numbers alone takes about 50 instructions; 200 per 32 samples would be a far larger panel's.
    assert 50 <= panel.instructions <= 200
    assert panel.seconds > 0.09


@pytest.mark.usefixtures("asked")
def test_what_an_h200_did_is_a_fraction_of_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = issue_limit()
    done = dict.fromkeys([panel.shape for panel in limit.panels], 0.25 * limit.panels[0].model_steps_per_s)
    panels: Any = limit.record(done)["panels"]
    assert [panel["achieved"] for panel in panels] == [0.25] * 8
    assert limit.table(done).lines[7] == ["(3,2,3)", "150", "0", "219", "300", "0.412", "25%"]

    chip = SimpleNamespace(name="NVIDIA H200", multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: chip)
    assert runs_on_the_chip("cuda")
    assert not runs_on_the_chip("cpu")
    chip.multi_processor_count = 16  # a slice of one
    assert not runs_on_the_chip("cuda")
    chip.name, chip.multi_processor_count = "NVIDIA H100", 132
    assert not runs_on_the_chip("cuda")


def test_without_the_compiler_the_limit_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_tool(shape: EnsembleShape, arch: int) -> CompileReport:
        raise FileNotFoundError("no cuobjdump")

    monkeypatch.setattr("moesaic.kernels.ensemble_compile.compile_report", no_tool)
    assert issue_limit().reason == "FileNotFoundError: no cuobjdump"
    monkeypatch.setitem(sys.modules, "moesaic.kernels.ensemble_compile", None)
    limit = issue_limit()
    assert limit.record({})["panels"] == []
    assert "not available: ModuleNotFoundError: import of moesaic.kernels.ensemble_compile" in limit.table({}).text()
