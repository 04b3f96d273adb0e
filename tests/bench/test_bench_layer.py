from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.bench import bench_layer, layer_cases, layer_peers
from moesaic.bench.bench_layer import LAYER, PEER_BUDGET, Measured, geomeans, judge, measure, results, run_subject
from moesaic.bench.interleave import NotRunError, Timing
from moesaic.bench.kernel_bench import BENCHES, Options
from moesaic.bench.layer_cases import TWELVE, Case, Sample, cases, draw_ids, draw_sample, n_turns
from moesaic.bench.layer_figure import draw, looks
from moesaic.bench.layer_peers import OURS, SIDES
from moesaic.bench.layer_sweeps import draw_sweeps, sweeps
from moesaic.bench.layer_turns import LayerTurn, best, layer_turns
from moesaic.bench.roofline import Roof
from moesaic.kernels import expert_mlp, reference

SMALL = Case(24, 16, 8, 5, 2, "float32")
NARROW = Case(10, 16, 1, 64, 3, "bfloat16", "tiny")
DECODE = Case(2, 16, 8, 12, 2, "float32", "decode")
ALONE, NARROW_ALONE = replace(SMALL, router=False), replace(NARROW, router=False)
CPU_PEERS = ("torch-grouped-mm", "torch-loop", "torch-bmm")


pytestmark = pytest.mark.usefixtures("briefly")


def options(*against: str) -> Options:
    return Options(against, "cpu", True, lambda line: None)


def everything(case: Case) -> Sample:
    return Sample(torch.arange(case.n_tokens), torch.arange(case.n_experts))


def oracle(turn: LayerTurn) -> dict[str, Tensor]:
    """Every expert on every token in float64, differentiated by torch."""
    x, up, down, last = (tensor.detach().double().requires_grad_() for tensor in turn.leaves)
    weights, ids = last, turn.ids
    if turn.router is not None:
        weights, ids = reference.route_topk(x @ last.T, turn.ids.shape[1], renormalize=True)
    y = reference.expert_mlp(x, up.mT, down.mT, weights, ids)
    dx, dup, ddown, dlast = torch.autograd.grad(y, (x, up, down, last), turn.checked.double())
    name = "d weights" if turn.router is None else "d router"
    return {"y": y.detach(), "dx": dx, "d gate_up": dup, "d down": ddown, name: dlast}


def test_the_cases_are_those_of_the_report() -> None:
    full = cases("cuda", quick=False)
    assert full[:12] == list(TWELVE)
    assert {case.n_tokens * case.d_model for case in TWELVE} == {40960 * 768, 24576 * 1536, 32768 * 4096}
    assert all(case.top_k * case.d_ff in (2048, 4096, 8192) for case in TWELVE)
    assert {case.n_tokens for case in full if case.group == "decode"} == {1, 8, 64, 256}
    assert [case.n_experts for device in ("cpu", "cuda") for case in cases(device, quick=False) if not case.router] == [
        10**6,
        10**6,
    ]
    assert {(case.d_ff, case.n_experts, case.top_k) for case in full if case.group == "tiny"} == {
        (64, 1024, 64),
        (16, 4096, 128),
        (1, 1000000, 128),
    }
    small = cases("cpu", quick=False)
    shapes = [(case.d_model, case.d_ff, case.n_experts, case.top_k) for case in small if case.group == "twelve"]
    assert shapes == [(case.d_model, case.d_ff, case.n_experts, case.top_k) for case in TWELVE[:6]]
    assert all(case.flops(backward=True) <= 1.2e11 and 2 * case.weight_bytes <= 6e9 for case in small)
    assert {case.dtype for case in small if case.n_experts < 10**6} == {"float32"}
    for device in ("cpu", "cuda"):
        assert len(cases(device, quick=True)) == 3


def test_flops_and_bytes_are_counted_once() -> None:
    case = Case(10, 6, 4, 7, 2, "float32", router=False)
    assert case.flops(backward=False) == 6 * 10 * 2 * 6 * 4
    assert case.flops(backward=True) == 18 * 10 * 2 * 6 * 4
    forward = 4 * (5 * 72 + 2 * 60 + 20) + 8 * 20
    assert case.least_bytes(5, backward=False) == forward
    backward = 4 * (5 * 72 + 3 * 60 + 2 * 20 + 2 * 8 * 20 + 7 * 72) + 8 * 20
    assert case.least_bytes(5, backward=True) == forward + backward
    assert case.weight_bytes == 4 * 7 * 72
    assert case.name == "10, 6, 4, 7, 2, fp32, experts alone"
    whole = replace(case, router=True)
    assert whole.name == "10, 6, 4, 7, 2, fp32"
    assert whole.flops(backward=False) - case.flops(backward=False) == 2 * 10 * 6 * 7
    assert whole.flops(backward=True) == 3 * whole.flops(backward=False)
    assert whole.least_bytes(5, backward=False) == forward + 4 * 7 * 6 - (4 + 8) * 20
    assert whole.least_bytes(5, backward=True) == forward + backward + 4 * 3 * 7 * 6 - 4 * 20


@pytest.mark.parametrize(("n_experts", "top_k"), [(6, 6), (7, 5), (16, 2), (400, 20)])
def test_every_token_draws_different_experts_all_equally_likely(n_experts: int, top_k: int) -> None:
    ids = draw_ids(2000, n_experts, top_k, torch.Generator().manual_seed(0))
    assert ids.shape == (2000, top_k)
    assert all(len(set(row)) == top_k for row in ids.tolist())
    counts = torch.bincount(ids.flatten(), minlength=n_experts).double()
    expected = 2000 * top_k / n_experts
    assert counts.numel() == n_experts
    assert (counts - expected).abs().max() <= 5 * math.sqrt(expected)


def test_turns_are_inputs_of_their_own_on_as_many_weights_as_a_cache_holds() -> None:
    assert [n_turns(size) for size in (1.0, 2**26, 2**27, 2**40)] == [64, 2, 1, 1]
    turns = layer_turns(DECODE, "cpu")
    assert len({turn.gate_up.data_ptr() for turn in turns}) == len(turns) == 64
    assert len({tuple(turn.ids.flatten().tolist()) for turn in turns}) > 32
    assert not torch.equal(turns[0].x, turns[1].x)
    few = layer_turns(Case(2, 64, 64, 2000, 2, "float32"), "cpu")
    assert len(few) == 64
    assert len({turn.gate_up.data_ptr() for turn in few}) == 1


def test_a_sample_has_all_where_it_is_few_else_busy_and_idle_experts() -> None:
    ids = torch.randint(40, (5000, 4), generator=torch.Generator().manual_seed(0))
    ids[:3000, 0] = 17
    sample = draw_sample(ids, 50)
    assert 17 in sample.experts
    assert sample.experts[-1] >= 40
    assert sample.experts.numel() == 8
    assert draw_sample(ids % 50, 10**6).experts.numel() == 8
    wide = draw_sample(torch.randint(10**6, (64, 128), generator=torch.Generator().manual_seed(0)), 10**6)
    assert (wide.tokens.numel(), wide.experts.numel()) == (16, 512)
    assert (sample.tokens.numel(), int(sample.tokens[0])) == (512, 0)
    assert sample.tokens.unique().numel() == 512
    small = draw_sample(ids[:20], 5)
    assert small.tokens.tolist() == [*range(20)]
    assert small.experts.tolist() == [*range(5)]


def test_a_choice_that_rounding_may_change_is_not_checked() -> None:
    router = torch.eye(4)
    x = torch.tensor([[3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 2.0 - 2.0**-20, 0.0], [3.0, 3.0, 1.0, 0.0]])
    ids, clear = best(x, router, 2)
    assert ids.sort(1).values.tolist() == [[0, 1]] * 3
    assert clear.tolist() == [True, False, True]
    assert best(x, router, 4)[1].all()
    assert best(x.bfloat16(), router.bfloat16(), 3)[1].tolist() == [True] * 3
    turn = layer_turns(Case(64, 64, 4, 512, 64, "bfloat16"), "cpu")[0]
    sure = turn.clear
    assert sure is not None
    assert 0.1 < sure.double().mean() < 1.0
    assert turn.grad.any(1).all()
    assert torch.equal(turn.checked.any(1), sure)
    assert sure[draw_sample(turn.ids, 512, sure).tokens].all()
    with pytest.raises(ValueError, match="nothing can be checked"):
        draw_sample(turn.ids, 512, torch.zeros_like(sure))
    few = layer_turns(Case(1000, 64, 4, 64, 4, "bfloat16"), "cpu")[0].clear
    assert few is not None
    assert few.double().mean() > 0.999


@pytest.mark.parametrize("case", [SMALL, DECODE, ALONE], ids=lambda case: case.name)
def test_the_reference_is_the_definition_and_a_sample_is_part_of_it(case: Case) -> None:
    turn = layer_turns(case, "cpu")[0]
    truth = oracle(turn)
    found = turn.reference(everything(case), torch.float64)
    assert found.keys() == truth.keys()
    for name, one in found.items():
        torch.testing.assert_close(one, truth[name], rtol=1e-10, atol=1e-12, msg=name)
    sample = Sample(torch.arange(0, case.n_tokens, 2), torch.tensor([1, 3, 4]))
    part = turn.reference(sample, torch.float64)
    last = "d router" if case.router else "d weights"
    whole = turn.picked(truth["y"], [truth[name] for name in ("dx", "d gate_up", "d down", last)], sample)
    for name, one in part.items():
        torch.testing.assert_close(one, whole[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (case, name)
        for case in (SMALL, NARROW, DECODE, ALONE, NARROW_ALONE)
        for name in (OURS, *CPU_PEERS)
        # torch's grouped product wants rows of 16 bytes
        if (case.d_ff, name) != (1, "torch-grouped-mm")
    ],
    ids=lambda value: value.name if isinstance(value, Case) else value,
)
def test_every_side_computes_the_layer(case: Case, name: str) -> None:
    turn = layer_turns(case, "cpu")[0]
    truth = oracle(turn)
    naive = turn.reference(everything(case), case.torch_dtype)
    rounding = {key: bench_layer.relative_error(naive[key], truth[key]) for key in truth}
    found = results(SIDES[name](case, "cpu"), turn, everything(case))
    assert judge(found, truth, rounding | {"y alone": rounding["y"]}, PEER_BUDGET)[1] == ""


def test_few_independent_roundings_leave_room_for_chance() -> None:
    assert bench_layer.layer_roundings(NARROW, "y", 10 * 16) == 10
    assert bench_layer.layer_roundings(NARROW, "d weights", 30) == 30
    assert bench_layer.layer_roundings(SMALL, "d router", 5 * 16) == 5 * 9
    assert bench_layer.layer_roundings(NARROW, "d router", 64 * 16) == 1
    assert bench_layer.layer_roundings(TWELVE[0], "dx", 256 * 768) == 256 * 256
    wide = Case(4, 16, 32, 2, 2)
    assert bench_layer.layer_roundings(wide, "y", 64) == 64


def _poisoned(turn: LayerTurn) -> Tensor:
    """Right but for one gradient, infinite, of an expert that is not in the sample."""
    sampled = draw_sample(turn.ids, 64).experts
    assert sampled.numel() < 64
    other = turn.down[next(e for e in range(64) if e not in sampled), 0, 0]
    return SIDES[OURS](NARROW_ALONE, "cpu")(turn) + (other - other.detach()).sqrt()


def _with(**changed: Callable[[LayerTurn], Tensor]) -> Callable[[LayerTurn], Tensor]:
    def side(turn: LayerTurn) -> Tensor:
        other = replace(turn, **{name: change(turn) for name, change in changed.items()})
        return SIDES[OURS](ALONE, "cpu")(other)

    return side


def _whole(turn: LayerTurn) -> Tensor:
    """The layer with a router that need not be a parameter."""
    assert turn.router is not None
    return SIDES["torch-loop"](SMALL, "cpu")(turn)


@pytest.mark.parametrize(
    ("case", "side"),
    [
        (ALONE, lambda turn: 0.0 * _with()(turn)),
        (ALONE, lambda turn: 1.0001 * _with()(turn)),
        (ALONE, _with(ids=lambda turn: (turn.ids + 1) % 5)),
        (ALONE, _with(weights=lambda turn: turn.weights * (turn.ids != 2))),
        (ALONE, _with(weights=lambda turn: turn.weights.detach() + 0.0 * turn.weights)),
        (ALONE, lambda turn: _with()(turn) if torch.is_grad_enabled() else _with()(turn).roll(1, 0)),
        (NARROW_ALONE, _poisoned),
        (NARROW_ALONE, _with(x=lambda turn: (turn.x * 1.02).to(torch.bfloat16))),
        (SMALL, lambda turn: 1.0001 * _whole(turn)),
        (SMALL, lambda turn: _whole(replace(turn, router=turn.router.roll(1, 0)))),
        (SMALL, lambda turn: _whole(replace(turn, router=turn.router.detach() + 0.0 * turn.router))),
    ],
)
def test_a_wrong_side_of_ours_has_no_speed_and_fails_the_benchmark(
    case: Case, side: Callable[[LayerTurn], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_cases, "MOST_EXPERTS", 8)
    wrong = replace(LAYER, sides={**SIDES, OURS: lambda case, device: side})
    found = run_subject(wrong, [case, DECODE], options("torch-loop"), ())
    [failure] = [one for one in found.failures if case.name in one]
    assert "moesaic is wrong: error of" in failure
    row = next(row for row in found.rows if row["n_tokens"] == case.n_tokens)
    assert (row["pass"], row["sides"]) == (None, {})
    assert "allowed" in str(row["failure"])
    [line] = [line for line in found.tables[0].lines if line[0] == case.name]
    assert line[2:4] == (OURS, "not run")


def test_a_wrong_slow_or_broken_peer_has_a_reason_and_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(case: Case, device: str) -> layer_peers.Side:
        raise RuntimeError("\n  too odd a shape\nat line 7")

    sides = {**SIDES, "wrong": lambda case, device: _with(x=lambda turn: 1.1 * turn.x), "broken": broken}
    found = measure(replace(LAYER, sides=sides), ALONE, options("wrong", "broken", "liger", "torch-loop"))
    assert found.not_run["broken"] == "RuntimeError: too odd a shape"
    assert found.not_run["liger"] == "takes a CUDA device"
    assert found.not_run["wrong"].startswith("error of y alone")
    assert not found.failure
    assert [*found.timings[False]] == [*found.timings[True]] == [OURS, "torch-loop"]
    monkeypatch.setattr(bench_layer, "SLOWEST_S", 0.0)
    slow = measure(LAYER, SMALL, options("torch-loop"))
    assert "pass take 0 s" in slow.not_run["torch-loop"]


def _built(side: layer_peers.Side, case: Case, device: str) -> layer_peers.Side:
    return side


def test_an_error_of_ours_fails_the_benchmark_and_one_of_memory_does_not() -> None:
    def side(error: Exception) -> layer_peers.Side:
        def fail(turn: LayerTurn) -> Tensor:
            raise error

        return fail

    cases_of: list[tuple[Exception, str, dict[str, str]]] = [
        (IndexError("out of range"), "IndexError: out of range", {}),
        (torch.OutOfMemoryError("80 GiB"), "", {OURS: "OutOfMemoryError: 80 GiB"}),
    ]
    for error, failure, not_run in cases_of:
        found = measure(replace(LAYER, sides={OURS: partial(_built, side(error))}), SMALL, options())
        assert (found.failure, found.not_run, found.timings) == (failure, not_run, {})


def test_what_does_not_fit_is_not_run(monkeypatch: pytest.MonkeyPatch, roof: Roof) -> None:
    monkeypatch.setattr(bench_layer, "device_memory_bytes", lambda device: 2**30)
    monkeypatch.setattr(layer_peers, "device_memory_bytes", lambda device: 2**30)
    for name in ("torch-grouped-mm", "torch-loop", "torch-bmm", "transformers-eager"):
        with pytest.raises(NotRunError, match=r"takes about \d+ GiB"):
            SIDES[name](TWELVE[11], "cpu")
    with pytest.raises(NotRunError, match="fewer than 1024 experts"):
        layer_peers.need_groups(replace(SMALL, n_experts=1024), "cuda")
    with pytest.raises(NotRunError, match="more than 16384 products"):
        SIDES["torch-loop"](Case(4096, 8, 1, 10**6, 128), "cpu")
    found = measure(LAYER, TWELVE[11], options())
    assert found.not_run == {OURS: "takes about 11 GiB"}
    assert found.lines(roof)[0][:4] == (TWELVE[11].name, "", OURS, "not run")
    assert found.rows(roof)[0]["sides"] == {}


def test_libraries_are_called_as_they_want_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    turn = layer_turns(SMALL, "cpu")[0]
    seen: list[Any] = []

    def fused(x: Tensor, up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        seen.append(ids.dtype)
        return expert_mlp(x, up.mT, down.mT, weights, ids)

    def parallel_linear(
        x: Tensor, weight: Tensor, k: int, slots: Tensor, order: Tensor, ends: Tensor, **given: Any
    ) -> Tensor:
        seen.append((k, sorted(given)))
        rows = x if given.get("grouped_in") else x[order // k]
        out = torch.stack([row @ weight[expert] for row, expert in zip(rows, slots, strict=True)])
        if given.get("grouped_out"):
            return out
        back = torch.empty_like(out).index_copy(0, order, out).view(*given["gates"].shape, -1)
        y: Tensor = (back * given["gates"].unsqueeze(-1)).sum(1)
        return y

    def flatten_sort_count(ids: Tensor, n_experts: int) -> Sequence[Tensor]:
        return *torch.sort(ids.flatten()), torch.bincount(ids.flatten(), minlength=n_experts).cumsum(0)

    liger = SimpleNamespace(LigerFusedMoEFunction=SimpleNamespace(apply=fused))
    scattermoe = SimpleNamespace(parallel_linear=parallel_linear, flatten_sort_count=flatten_sort_count)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.fused_moe", liger)
    monkeypatch.setitem(sys.modules, "scattermoe.parallel_experts", scattermoe)
    monkeypatch.setattr(layer_peers, "need_room", lambda n_bytes, device: None)
    truth = oracle(turn)
    for name in ("liger", "scattermoe"):
        found = results(SIDES[name](SMALL, "cuda"), turn, everything(SMALL))
        assert judge(found, truth, dict.fromkeys(found, 0.0), PEER_BUDGET)[1] == ""
    assert seen == [torch.int32] * 2 + [(2, ["grouped_out"]), (1, ["gates", "grouped_in"])] * 2
    for name in ("liger_kernel.ops.fused_moe", "scattermoe.parallel_experts"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(NotRunError, match="cannot be imported"):
            SIDES[name.split("_")[0].split(".")[0]](SMALL, "cuda")


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("case", [SMALL, ALONE], ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["transformers-eager", "transformers-batched-mm", "transformers-grouped-mm"])
def test_transformers_computes_the_layer(name: str, case: Case) -> None:
    turn = layer_turns(case, "cpu")[0]
    found = results(SIDES[name](case, "cpu"), turn, everything(case))
    assert judge(found, oracle(turn), dict.fromkeys(found, 0.0), PEER_BUDGET)[1] == ""


def test_without_transformers_its_peers_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("transformers", "transformers.models.mixtral.modeling_mixtral"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("transformers-eager", "transformers-grouped-mm"):
        with pytest.raises(NotRunError, match="transformers cannot be imported"):
            SIDES[name](SMALL, "cpu")
    with pytest.raises(NotRunError, match="one-hot"):
        SIDES["transformers-eager"](replace(SMALL, n_experts=2000), "cpu")
    with pytest.raises(NotRunError, match=r"103 GB of zeros"):
        SIDES["transformers-eager"](Case(1024, 256, 128, 512, 8, "float32"), "cpu")


def test_a_run_has_rows_a_table_a_figure_and_points(tmp_path: Path, roof: Roof) -> None:
    said: list[str] = []
    asked = Options(("torch-grouped-mm", "torch-loop"), "cpu", True, said.append)
    found = run_subject(LAYER, [SMALL, DECODE, NARROW], asked, ("a note",))
    assert not found.failures
    assert [row["pass"] for row in found.rows] == [
        "forward",
        "forward + backward",
        "forward",
        *["forward", "forward + backward"],
    ]
    row: Any = found.rows[1]
    assert row["flops"] == SMALL.flops(backward=True)
    side = row["sides"][OURS]
    assert side["flops_per_s"] == pytest.approx(row["flops"] / side["ms"] * 1e3)
    assert side["of_the_roof"] == pytest.approx(max(row["flops"] / 1e11, row["least_bytes"] / 1e10) / side["ms"] * 1e3)
    assert row["ratio"]["torch-loop"]["median"] == pytest.approx(row["sides"]["torch-loop"]["ms"] / side["ms"])
    assert row["errors"][OURS]["dx"] < 1e-6
    assert row["error_limits"]["dx"] == 1e-5
    assert row["checked_on"] == "24 of 24 tokens, 5 of 5 experts"
    assert found.rows[-1]["error_limits"]["dx"] > 1e-4  # type: ignore[index]
    text = found.tables[0].text()
    assert f"{NARROW.name}: torch-grouped-mm not run: RuntimeError" in text
    assert "No geometric mean: 0 of the 12" in text
    assert "a note" in text
    assert any("torch-loop" in line and "ratio" in line for line in said)
    paths = found.draw(tmp_path)
    assert [path.name for path in paths] == ["bench-layer.png", "bench-layer.svg"]
    assert all(path.stat().st_size > 10_000 for path in paths)
    assert draw([], "layer", tmp_path) == []
    assert [point.dtype for point in found.points][::6] == ["float32", "float32", "bfloat16"]
    assert [point.of(roof) for point in found.points] == [
        side["of_the_roof"]
        for row in found.rows
        for side in row["sides"].values()  # type: ignore[attr-defined]
    ]


def _timed(case: Case, seconds: float, peer: float | None) -> Measured:
    timings = {OURS: Timing(1, (seconds,))} | ({} if peer is None else {"torch-loop": Timing(1, (peer,))})
    return Measured(case, {False: (1e12, 1e9), True: (3e12, 3e9)}, {False: timings, True: timings})


def test_ratios_are_drawn_against_tokens_and_against_experts(tmp_path: Path) -> None:
    over_t = [_timed(replace(SMALL, n_tokens=size), 1.0, size / 8) for size in (4, 8, 16, 64)]
    over_e = [_timed(replace(SMALL, n_experts=size), 1.0, 1.0 + size / 8) for size in (8, 16, 32)]
    apart = [_timed(replace(SMALL, d_ff=size), 1.0, 2.0) for size in (9, 10)]
    everything_timed = [*over_t, *over_e, *apart]
    assert sweeps(everything_timed, lambda case: replace(case, n_tokens=0)) == [over_t]
    assert sweeps(everything_timed, lambda case: replace(case, n_experts=0)) == [over_e]
    assert sweeps(apart, lambda case: replace(case, n_tokens=0)) == []
    paths = draw_sweeps(everything_timed, "layer", tmp_path)
    assert [path.name for path in paths] == ["bench-layer-sweeps.png", "bench-layer-sweeps.svg"]
    text = paths[1].read_text()
    assert "tokens T" in text
    assert "experts E" in text
    assert text.count("torch-loop") == 1
    assert ">5</text>" in text.replace("\n", "")
    assert draw_sweeps(apart, "layer", tmp_path) == []
    for device in ("cpu", "cuda"):
        timed = [_timed(case, 1.0, 2.0) for case in cases(device, quick=False)]
        assert sweeps(timed, lambda case: replace(case, n_tokens=0))
        assert sweeps(timed, lambda case: replace(case, n_experts=0))


def test_every_peer_has_a_look_of_its_own() -> None:
    one = _timed(SMALL, 1.0, 2.0)
    timings = dict.fromkeys(SIDES, Timing(1, (1.0,)))
    found = looks([replace(one, timings={False: timings, True: timings})])
    assert found.keys() == SIDES.keys()
    assert len({*found.values()}) == len(SIDES)


def test_geometric_means_are_of_all_twelve_or_not_given() -> None:
    found = [_timed(case, 1.0 if i % 2 else 4.0, 8.0) for i, case in enumerate(TWELVE)]
    said, rows = geomeans(found)
    assert rows[0]["flops_per_s"] == pytest.approx(0.5e12)
    assert [rows[1]["side"], rows[1]["ratio"]] == ["torch-loop", pytest.approx(4.0)]
    assert said[0] == "Geometric mean of the twelve, forward: moesaic 0.5 TFLOP/s, ratio 1."
    assert [row["pass"] for row in rows] == ["forward"] * 2 + ["forward + backward"] * 2
    assert [row["side"] for row in geomeans([*found[:-1], _timed(TWELVE[-1], 1.0, None)])[1]] == [OURS, OURS]
    assert geomeans(found[:-1]) == (["No geometric mean: 11 of the 12 training shapes were measured."], [])


def test_the_command_knows_the_benchmark_and_its_peers() -> None:
    benchmark = BENCHES["layer"]
    assert {OURS, *benchmark.peers} == {*SIDES}
    assert benchmark.against == ("torch-grouped-mm", "torch-loop")
