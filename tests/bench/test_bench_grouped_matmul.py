from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor

from moesaic.bench import bench_grouped_matmul
from moesaic.bench.bench_grouped_matmul import PRODUCT, SIDES, ProductTurn, cost, product_turns, run
from moesaic.bench.bench_layer import judge, measure, results
from moesaic.bench.kernel_bench import BENCHES, Options, Table
from moesaic.bench.layer_cases import Case, Sample
from moesaic.bench.layer_peers import OURS
from moesaic.kernels import grouped_matmul, reference

SMALL = Case(24, 16, 8, 5, 2, "float32")
SPARSE = Case(6, 16, 4, 40, 2, "float32")


pytestmark = pytest.mark.usefixtures("briefly")


def options(*against: str) -> Options:
    return Options(against, "cpu", True, lambda line: None)


def everything(case: Case) -> Sample:
    return Sample(torch.arange(case.n_tokens), torch.arange(case.n_experts))


def oracle(turn: ProductTurn, sample: Sample) -> dict[str, Tensor]:
    """Every row times every expert's matrix in float64, differentiated by torch."""
    x, weight = (tensor.detach().double().requires_grad_() for tensor in turn.leaves)
    y = reference.grouped_matmul(x, weight.mT, turn.grouping.offsets, gather=turn.gather)
    return turn.picked(y.detach(), torch.autograd.grad(y, (x, weight), turn.grad.double()), sample)


def test_flops_and_bytes_are_counted_once() -> None:
    case = Case(10, 6, 4, 7, 2, "bfloat16")
    indices = 8 * (20 + 8)
    forward = 2 * (5 * 48 + 60 + 8 * 20) + indices
    assert cost(case, 5, False) == (2 * 20 * 6 * 8, forward)
    assert cost(case, 5, True) == (3 * 2 * 20 * 6 * 8, forward + 2 * (5 * 48 + 120 + 8 * 20 + 7 * 48) + indices)


@pytest.mark.parametrize("case", [SMALL, SPARSE], ids=lambda case: case.name)
def test_the_reference_is_the_definition_and_a_sample_is_part_of_it(case: Case) -> None:
    turn = product_turns(case, "cpu")[0]
    for sample in (everything(case), Sample(torch.arange(0, case.n_tokens, 2), torch.tensor([0, 3]))):
        truth, found = oracle(turn, sample), turn.reference(sample, torch.float64)
        assert found.keys() == truth.keys()
        for name, one in found.items():
            torch.testing.assert_close(one, truth[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", SIDES)
@pytest.mark.parametrize("case", [SMALL, SPARSE], ids=lambda case: case.name)
def test_every_side_computes_the_product(case: Case, name: str) -> None:
    turn, sample = product_turns(case, "cpu")[0], everything(case)
    found = results(SIDES[name](case, "cpu"), turn, sample)
    assert judge(found, oracle(turn, sample), dict.fromkeys(found, 0.0), 1.0)[1] == ""


@pytest.mark.parametrize(
    "side",
    [
        lambda turn, weight: 0.0 * grouped_matmul(turn.x, weight, turn.grouping.offsets, gather=turn.gather),
        lambda turn, weight: grouped_matmul(turn.x, weight.roll(1, 0), turn.grouping.offsets, gather=turn.gather),
        lambda turn, weight: grouped_matmul(turn.x, weight, turn.grouping.offsets, gather=turn.gather.roll(1)),
        lambda turn, weight: (
            grouped_matmul(turn.x.detach(), weight, turn.grouping.offsets, gather=turn.gather) + 0.0 * turn.x.sum()
        ),
        lambda turn, weight: (
            grouped_matmul(turn.x, weight, turn.grouping.offsets, gather=turn.gather) / math.inf * math.inf
        ),
    ],
)
def test_a_wrong_product_has_no_speed(side: Callable[[ProductTurn, Tensor], Tensor]) -> None:
    wrong = replace(PRODUCT, sides={**SIDES, OURS: lambda case, device: lambda turn: side(turn, turn.weight.mT)})
    found = measure(wrong, SMALL, options("torch-loop"))
    assert "allowed" in found.failure
    assert not found.timings


def test_a_run_has_rows_both_tables_and_a_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_grouped_matmul, "cases", lambda device, quick: [SMALL, SPARSE])
    limits = SimpleNamespace(grouped_limits=lambda: (Table("compiler", notes=("as told",)), [{"registers": 7}]))
    monkeypatch.setitem(sys.modules, "moesaic.bench.grouped_limit", limits)
    found = run(options("torch-grouped-mm", "torch-loop"))
    assert [row["pass"] for row in found.rows] == ["forward", "forward + backward"] * 2
    assert not found.failures
    for row in found.rows:
        assert list(cast("dict[str, object]", row["sides"])) == list(SIDES)
    assert found.tables[1].notes == ("as told",)
    assert found.extra["compiler"] == [{"registers": 7}]
    assert "the roof: 0.1 TFLOP/s in float32" in found.tables[0].title
    assert len(found.points) == 2 * 2 * len(SIDES)
    assert [path.name for path in found.draw(tmp_path)] == [f"bench-grouped-matmul.{kind}" for kind in ("png", "svg")]


def test_a_missing_report_of_the_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "moesaic.bench.grouped_limit", None)
    table, rows = bench_grouped_matmul._limits()
    assert "not available" in table.notes[0]
    assert rows == []


def test_the_command_knows_the_benchmark_and_its_peers() -> None:
    benchmark = BENCHES["grouped-matmul"]
    assert {OURS, *benchmark.peers} == {*SIDES}
    assert benchmark.against == ("torch-grouped-mm", "torch-loop")
