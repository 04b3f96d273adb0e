"""How fast an H200 could at most train a panel of the phase diagrams, by the compiler's report on the Triton kernel."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moesaic.bench.kernel_bench import Table
from moesaic.bench.plan import Row
from moesaic.bench.reproduce.phase_plan import MAX_MODELS, PANELS, SEEDS, panel_name
from moesaic.kernels import EnsembleShape

ARCH = 90
STEPS, BATCH = 5000, 512
MODELS = MAX_MODELS * SEEDS
LABEL = "limit from the compiler's report, not a measurement"
HEADER = ("(n,m,E)", "registers", "spills", "per 32 samples", "per step", "limit, s per panel")


@dataclass(frozen=True)
class PanelLimit:
    """What the compiler says of one panel's kernel.

    Args:
        shape: ``(n,m,E)``.
        registers: per thread.
        spills: 0 if and only if no register is spilled.
        instructions: that a warp issues per 32 samples.
        step_instructions: the same per step, beside those.
        seconds: issue-limited time of the whole panel: all cells, ten seeds, 5,000 steps.
    """

    shape: str
    registers: int
    spills: int
    instructions: int
    step_instructions: int
    seconds: float

    @property
    def model_steps_per_s(self) -> float:
        """Model-steps at the issue limit."""
        return MODELS * STEPS / self.seconds


@dataclass(frozen=True)
class IssueLimit:
    """The panels' limits, how they follow from the instructions, and why there are none, if so.

    ``achieved`` of both methods: measured model-steps per second by shape, where an H200 did them.
    """

    panels: Sequence[PanelLimit]
    formula: str = ""
    reason: str = ""

    def table(self, achieved: Mapping[str, float]) -> Table:
        """For people."""
        title = f"Triton kernel on sm_{ARCH}: {LABEL}"
        if self.reason:
            return Table(title, notes=(f"not available: {self.reason}",))
        header, lines = [*HEADER], []
        for p in self.panels:
            counts = (p.registers, p.spills, p.instructions, p.step_instructions)
            lines.append([p.shape, *map(str, counts), f"{p.seconds:.3f}"])
        if achieved:
            header.append("achieved")
            for line, panel in zip(lines, self.panels, strict=True):
                line.append(f"{achieved[panel.shape] / panel.model_steps_per_s:.0%}")
        return Table(title, header, lines, (self.formula,))

    def record(self, achieved: Mapping[str, float]) -> Row:
        """For JSON."""
        panels = []
        for p in self.panels:
            done = achieved.get(p.shape)
            panels.append({
                "shape": p.shape, "registers": p.registers, "spills": p.spills, "instructions": p.instructions,
                "step_instructions": p.step_instructions, "limit_s": p.seconds,
                "limit_model_steps_per_s": p.model_steps_per_s,
                "achieved": None if done is None else done / p.model_steps_per_s,
            })  # fmt: skip
        return {
            "what": LABEL, "arch": f"sm_{ARCH}", "formula": self.formula, "panels": panels,
            "not_available": self.reason,
        }  # fmt: skip


def issue_limit() -> IssueLimit:
    """Compile the kernel for each panel, which takes no GPU, and read what the compiler reports."""
    limits = []
    try:
        from moesaic.kernels.ensemble_compile import CLOCK_HZ, ISSUE_SLOTS, MULTIPROCESSORS, compile_report
        from moesaic.kernels.ensemble_compile import issue_limited_seconds as seconds

        for n, m, e in PANELS:
            report = compile_report(EnsembleShape(n, m, e, 1, 0, True, BATCH), ARCH)
            loop, step = report.instructions or 0, report.step_instructions or 0
            limit = seconds(report, MODELS, STEPS, BATCH)
            limits.append(PanelLimit(panel_name((n, m, e)), report.registers, report.spills, loop, step, limit))
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        return IssueLimit((), reason=f"{type(error).__name__}: {error}")
    formula = (
        f"Instructions that a warp issues per 32 samples, and per step beside those. Limit = {MODELS:,} models x "
        f"{STEPS:,} steps x ({BATCH // 32} x per 32 samples + per step) / ({MULTIPROCESSORS} SMs x {ISSUE_SLOTS} issue "
        f"slots x {CLOCK_HZ / 1e9:g} GHz)."
    )
    return IssueLimit(limits, formula)


def runs_on_the_chip(device: str) -> bool:
    """Whether ``device`` is the chip that the limit is for; a slice of one is not."""
    if device != "cuda":
        return False
    from moesaic.kernels.ensemble_compile import MULTIPROCESSORS

    chip = torch.cuda.get_device_properties(torch.cuda.current_device())
    return "H200" in chip.name and chip.multi_processor_count == MULTIPROCESSORS
