from __future__ import annotations

import sys
from typing import Any

import pytest

from moesaic.bench import million_limit
from moesaic.bench.million_limit import BATCH, N_FEATURES, Case, costs, present, step_limits
from moesaic.kernels import stripes_compile


def found() -> tuple[Any, list[Any]]:
    table, rows = step_limits()
    return table, list(rows)


def test_a_dense_step_is_bound_by_its_products() -> None:
    table, rows = found()
    dense = rows[0]
    # 6 B n m FLOP, and 8 for the third of the features that are present.
    assert dense["useful_flops"] == pytest.approx(6.672 * BATCH * N_FEATURES * 1024, rel=1e-3)
    assert dense["useful_flops"] == pytest.approx(dense["executed_flops"])
    # Moments and table: 24 bytes of a parameter, and 4 for every copy.
    assert dense["memory_bytes"] == pytest.approx((28 + 4 * present()) * N_FEATURES * 1032)
    assert (dense["bound_by"], rows[1]["bound_by"]) == ("products", "products")
    assert dense["roofline_s"] == pytest.approx(dense["useful_flops"] / 989e12)
    assert dense["roofline_s"] < dense["in_turn_s"] < 2 * dense["roofline_s"]
    assert "34 % of the features" in table.text()


def test_many_small_experts_are_bound_by_bytes() -> None:
    rows = {row["model"]: row for row in found()[1]}
    small = rows["E = 64, k = 1, m = 16"]
    assert small["bound_by"] in ("memory", "L2")
    assert small["useful_flops"] == pytest.approx(rows["dense, m = 1024"]["useful_flops"] / 64)
    # Every parameter is read and written with two moments.
    assert small["roofline_s"] > 24 * N_FEATURES * (64 * 16 + 128) / 4.8e12


def test_padding_is_executed() -> None:
    # 10 rows of an expert fill tiles of 16, 5 hidden units 16 columns.
    case = Case(BATCH // 10, 5)
    executed = sum(cost.flops for cost in costs(case).values())
    assert executed / case.useful_flops == pytest.approx(16 / 10 * 16 / 5, rel=0.01)


def test_the_compilers_report_has_a_line_for_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    one, asked = stripes_compile.compile_kernel("bias sums", 90), []

    def once(name: str, chip: int, precision: str = "bf16") -> Any:
        asked.append((name, chip, precision))
        return one

    monkeypatch.setattr(stripes_compile, "compile_kernel", once)
    table, rows = million_limit.compiled_kernels()
    assert len(table.lines) == len(rows) == len(asked) == 2 * len(stripes_compile.PRODUCTS) + len(stripes_compile.PARTS)
    assert {chip for _, chip, _ in asked} == {90}
    assert {len(line) for line in table.lines} == {len(table.header)}
    assert all(row["spills"] == 0 for row in rows)


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "moesaic.kernels.stripes_compile", None)
    table, rows = million_limit.compiled_kernels()
    assert not rows
    assert "not available" in table.notes[0]
