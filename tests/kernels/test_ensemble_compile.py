from __future__ import annotations

from dataclasses import replace

import pytest

from moesaic.kernels import EnsembleShape
from moesaic.kernels.ahead_of_time import compile_ahead, disassemble
from moesaic.kernels.ensemble_compile import CompileReport, compile_report, issue_limited_seconds
from moesaic.kernels.ensemble_registers import _train_kernel, signature_and_constants

PANELS = [(2, 1, 1), (2, 1, 2), (3, 1, 1), (3, 1, 2), (3, 1, 3), (3, 2, 1), (3, 2, 2), (3, 2, 3)]
H200_MODELS = 39 * 58 * 10


def panel(n: int, m: int, e: int) -> EnsembleShape:
    return EnsembleShape(n, m, e, 1, 0, True, 512)


@pytest.fixture(scope="module")
def reports() -> dict[tuple[int, int, int], CompileReport]:
    return {sizes: compile_report(panel(*sizes)) for sizes in PANELS}


def test_phase_panels_stay_in_registers_on_sm_90(reports: dict[tuple[int, int, int], CompileReport]) -> None:
    for sizes, report in reports.items():
        assert (report.kernel, report.arch, report.spills, report.shared_bytes) == ("registers", 90, 0, 0), sizes
        assert report.registers <= 160, sizes


def test_phase_panels_take_few_instructions(reports: dict[tuple[int, int, int], CompileReport]) -> None:
    # The generator alone multiplies twice in each of ten rounds; the bounds are a tenth above what the compiler gave.
    most = {(2, 1, 1): 100, (2, 1, 2): 133, (3, 2, 2): 202, (3, 2, 3): 254}
    for sizes, bound in most.items():
        assert 40 < (reports[sizes].instructions or 0) <= bound, sizes
    assert sum(issue_limited_seconds(report, H200_MODELS, 5000, 512) for report in reports.values()) < 2.6


@pytest.mark.parametrize("arch", [80, 100])
@pytest.mark.parametrize("sizes", PANELS[-2:])
def test_the_largest_panels_do_not_spill_on_other_chips(sizes: tuple[int, int, int], arch: int) -> None:
    report = compile_report(panel(*sizes), arch)
    assert (report.arch, report.spills) == (arch, 0)
    assert report.registers <= 160


def test_the_report_sees_a_spill_and_fits_states_its_size() -> None:
    # Every lane keeps all parameters and sums of gradients; many features and few hidden units take the most besides.
    assert compile_report(EnsembleShape(10, 1, 2, 2, 0, True, 512), gate="switch").spills == 0
    full = compile_report(EnsembleShape(11, 1, 3, 2, 0, True, 512), gate="switch")
    assert 0 < full.stack_bytes <= 400
    assert full.local_accesses > 0


def test_steps_from_2_to_the_31_on_compile_too() -> None:
    signature, constants, warps = signature_and_constants(panel(2, 1, 1), 0, balance=True)
    assert signature["first_step"] == "i32"
    compiled = compile_ahead(_train_kernel, signature | {"first_step": "i64"}, constants, warps, 90)
    assert disassemble(compiled)[0]["STACK"] == 0


def test_relu_and_softmax_keep_nan() -> None:
    # The interpreter's maximum keeps it in any case.
    signature, constants, warps = signature_and_constants(panel(3, 1, 3), 0, balance=True)
    ptx = compile_ahead(_train_kernel, signature, constants, warps, 90).asm["ptx"]
    assert "max.NaN.f32" in ptx
    assert "max.f32" not in ptx


def test_reports_what_gate_and_balance_cost(reports: dict[tuple[int, int, int], CompileReport]) -> None:
    paper = reports[3, 2, 3].instructions or 0
    assert (compile_report(panel(3, 2, 3), balance=False).instructions or 0) < paper
    assert (compile_report(panel(3, 2, 3), gate="switch").instructions or 0) > paper


def test_larger_shapes_are_the_memory_kernels() -> None:
    report = compile_report(EnsembleShape(20, 2, 5, 1, 0, True, 64))
    assert (report.kernel, report.instructions, report.step_instructions) == ("memory", None, None)
    assert report.registers > 0
    with pytest.raises(ValueError, match="memory"):
        issue_limited_seconds(report, 1, 1, 1)


def test_issue_limit() -> None:
    report = CompileReport("registers", 90, 52, 0, 0, 0, 100, 40)
    # 3 blocks of 32 samples: 340 instructions per model and step.
    assert issue_limited_seconds(report, 10, 7, 65, sms=2, clock_hz=1000) == pytest.approx(10 * 7 * 340 / 8000)
    twice = replace(report, instructions=200, step_instructions=80)
    assert issue_limited_seconds(twice, 5, 7, 512) == issue_limited_seconds(report, 10, 7, 512)


def test_refuses_an_unknown_gate() -> None:
    with pytest.raises(ValueError, match="gate='soft'"):
        compile_report(panel(2, 1, 1), gate="soft")
