from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.bench import bench_routing, routing_limit
from moesaic.bench.bench_routing import Case, cases, composition, draw, measure, run
from moesaic.bench.kernel_bench import Options, Table
from moesaic.bench.roofline import Roof
from moesaic.kernels import group_by_expert, route_topk

SMALL = [Case(33, 8, 2), Case(33, 64, 4, width=8)]


def options(quick: bool = True) -> Options:
    return Options(("torch",), "cpu", quick, lambda line: None)


def test_the_cases_are_those_of_the_report() -> None:
    full = cases(quick=False)
    assert {case.n_tokens for case in full} == {512, 4096, 32768}
    sizes = {(case.n_experts, case.top_k) for case in full}
    assert sizes == {(8, 2), (64, 8), (128, 8), (256, 8), (1024, 64), (65536, 32)}
    assert all((case.width > 0) == (case.n_experts == 65536) for case in full)
    assert {case.n_tokens for case in cases(quick=True)} == {512}


def test_flops_and_bytes_are_counted_once() -> None:
    case = Case(10, 6, 2)
    assert case.least_bytes(backward=False) == 10 * 6 * 4 + 10 * 2 * 12
    assert case.least_bytes(backward=True) == 3 * 10 * 6 * 4 + 2 * 10 * 2 * 12
    projected = Case(10, 6, 2, width=5)
    assert projected.least_bytes(backward=False) == 4 * 5 * (10 + 6) + 10 * 2 * 12
    assert projected.name == "10, 6, 2, d = 5"
    assert [one.flops(backward=False) for one in (case, projected)] == [0, 2 * 10 * 6 * 5]
    assert [one.flops(backward=True) for one in (case, projected)] == [0, 2 * 10 * 6 * 5 + 4 * 10 * 2 * 5]


def test_the_composition_is_routing_and_grouping() -> None:
    logits = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    weights, ids, order, counts, ends = composition(logits, 3)
    ours = route_topk(logits, 3, renormalize=True)
    grouping = group_by_expert(ours.ids, 16)
    assert torch.equal(ids, ours.ids)
    torch.testing.assert_close(weights, ours.weights)
    assert torch.equal(order, grouping.permutation)
    assert torch.equal(counts, grouping.counts)
    assert torch.equal(ends, grouping.offsets[1:])


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_both_sides_are_timed(case: Case, backward: bool, roof: Roof) -> None:
    found = measure(case, options(quick=False), backward=backward)
    assert set(found.timings) == {"moesaic", "torch"}
    row = found.row(roof)
    side = row["sides"]["moesaic"]  # type: ignore[index]
    assert side["bytes_per_s"] > 0
    least = max(case.flops(backward=backward) / 1e11, case.least_bytes(backward=backward) / 1e10)
    assert side["of_the_roof"] == pytest.approx(1e3 * least / side["ms"])
    assert row["ratio"]["median"] > 0  # type: ignore[index]
    assert len(found.lines(roof)) == 2


def test_a_side_that_disagrees_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(logits: Tensor, k: int) -> tuple[Tensor, ...]:
        weights, *rest = composition(logits, k)
        return (weights.roll(1, 0), *rest)

    monkeypatch.setattr(bench_routing, "composition", shifted)
    for backward in (False, True):
        found = measure(SMALL[0], options(), backward=backward)
        assert found.not_run == {"torch": "disagrees on weights or gradients"}
        assert set(found.timings) == {"moesaic"}


def test_the_run_has_rows_tables_memory_and_a_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_routing, "cases", lambda quick: SMALL)
    monkeypatch.setattr(bench_routing, "routing_limits", lambda: (Table("compiler"), []))
    said: list[str] = []
    found = run(Options(("torch",), "cpu", True, said.append))
    assert [row["pass"] for row in found.rows] == ["forward", "forward and backward"] * 2
    assert not found.failures
    text = found.tables[0].text()
    assert "33, 64, 4, d = 8, forward: torch not run: left out by --quick" in text
    assert len(said) == 2 * 2 + 2 * 2
    assert [(point.label, point.side, point.flops > 0) for point in found.points[::2]] == [
        ("33, 8, 2", "moesaic", False), ("33, 8, 2", "moesaic", False), ("33, 64, 4, d = 8", "moesaic", True)
    ]  # fmt: skip
    assert [path.name for path in draw([*map(_measured, SMALL)], tmp_path)] == ["routing.png", "routing.svg"]
    assert (tmp_path / "routing.png").stat().st_size > 10_000


def _measured(case: Case) -> Any:
    return measure(case, options(), backward=case.width == 0)


def test_the_compilers_report_has_bytes_and_instructions() -> None:
    found = routing_limit._limit(64, 8, torch.bfloat16)
    assert (found.spills, found.least_bytes) == (0, 64 * 2 + 8 * 12)
    assert 1.0 <= found.bytes_per_row / found.least_bytes <= 1.2
    assert 50 < found.instructions < 400
    assert found.issue_s == pytest.approx(32768 * found.instructions / (132 * 4 * 1.98e9))


def test_a_loop_over_the_best_counts_k_times() -> None:
    code = [(16 * i, "IADD3 R0, R0, R1") for i in range(10)]
    assert routing_limit._issued(code, 8) == 10
    code[5] = (80, "@P0 BRA 0x30")
    code[8] = (128, "BRA 0x10")
    code[9] = (144, "NOP")
    assert routing_limit._issued(code, 8) == 9 + 7 * 3
