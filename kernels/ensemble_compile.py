"""What the compiler says of the ensembles' Triton kernels, without a GPU, and the time that follows from it.

    limit = models · steps · (⌈batch / 32⌉ · loop + step) / (multiprocessors · issue slots · clock)

with the instructions that one warp issues per 32 samples (loop) and per step outside of the samples' loop (step).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from moesaic.kernels import ensemble_memory, ensemble_registers
from moesaic.kernels.ahead_of_time import compile_ahead, disassemble
from moesaic.kernels.ensemble import GATES, EnsembleShape

MULTIPROCESSORS, ISSUE_SLOTS, CLOCK_HZ = 132, 4, 1.98e9
"""An H200 at its boost clock; each of the four schedulers of a multiprocessor issues one warp instruction per cycle."""
_WARP = 32
_JUMP = re.compile(r"\bBRA\b.*\b0x([0-9a-f]+)$")


@dataclass(frozen=True)
class CompileReport:
    """What the compiler made of one kernel.

    Attributes:
        kernel: ``registers`` or ``memory``, as `train_ensemble` chooses on a GPU.
        arch: compute capability, 90 for sm_90.
        registers: per thread.
        stack_bytes: per thread.
        local_accesses: instructions that read or write local memory, where spilled registers go.
        shared_bytes: shared memory of one program.
        instructions: of the loop over samples, per 32 samples; None for the memory kernel, which has more than one.
        step_instructions: of the loop over steps, without that loop's; None for the memory kernel.
    """

    kernel: str
    arch: int
    registers: int
    stack_bytes: int
    local_accesses: int
    shared_bytes: int
    instructions: int | None
    step_instructions: int | None

    @property
    def spills(self) -> int:
        """Bytes of stack and accesses to local memory: 0 if and only if no register is spilled."""
        return self.stack_bytes + self.local_accesses


def compile_report(shape: EnsembleShape, arch: int = 90, *, gate: str = "paper", balance: bool = True) -> CompileReport:
    """Compile the kernel that `train_ensemble` launches on a GPU for models with independent features.

    Args:
        shape: the common sizes.
        arch: compute capability of the GPU, such as 80, 90 or 100.
        gate: one of ``GATES``.
        balance: with a load-balance loss.

    Raises:
        ValueError: for another gate.
    """
    if gate not in GATES:
        raise ValueError(f"gate={gate!r}: takes one of {', '.join(GATES)}")
    if ensemble_registers.fits_shape(shape):
        name, kernel = "registers", ensemble_registers._train_kernel
        plan = ensemble_registers.signature_and_constants(shape, GATES.index(gate), balance=balance)
    else:
        name, kernel = "memory", ensemble_memory._train_kernel
        plan = ensemble_memory.signature_and_constants(shape)
    compiled = compile_ahead(kernel, *plan, arch)
    usage, code = disassemble(compiled)
    loop, step = _sample_loop(code) if name == "registers" else (None, None)
    return CompileReport(
        name, arch, usage["REG"], usage["STACK"], sum(bool(re.search(r"\b(LDL|STL)\b", text)) for _, text in code),
        compiled.metadata.shared, loop, step,
    )  # fmt: skip


def _sample_loop(code: list[tuple[int, str]]) -> tuple[int, int]:
    """Return the instructions of the inner and, without it, of the outer loop of the registers kernel."""
    loops = []
    for address, text in code:
        jump = _JUMP.search(text)
        if jump and int(jump[1], 16) < address:
            loops.append((int(jump[1], 16), address))
    if len(loops) != 2 or not loops[1][0] < loops[0][0] < loops[0][1] < loops[1][1]:
        raise RuntimeError(f"expected a loop over samples inside a loop over steps, found loops at {loops}")
    inner, outer = (sum(first <= address <= last for address, _ in code) for first, last in loops)
    return inner, outer - inner


def issue_limited_seconds(
    report: CompileReport,
    models: int,
    steps: int,
    batch: int,
    sms: int = MULTIPROCESSORS,
    clock_hz: float = CLOCK_HZ,
) -> float:
    """Return the seconds below which no training can be, if every issue slot is used in every cycle.

        models · steps · (⌈batch / 32⌉ · loop + step) / (sms · 4 · clock)

    Args:
        report: of the registers kernel.
        models: trained at the same time, enough to fill the GPU.
        steps: of each.
        batch: samples per step.
        sms: multiprocessors; the default is an H200's.
        clock_hz: the default is an H200's boost clock, 1.98 GHz; under load it may run slower.

    Raises:
        ValueError: for a report of the memory kernel.
    """
    if report.instructions is None or report.step_instructions is None:
        raise ValueError(f"report.kernel={report.kernel!r}: takes a report of the registers kernel")
    per_step = math.ceil(batch / _WARP) * report.instructions + report.step_instructions
    return models * steps * per_step / (sms * ISSUE_SLOTS * clock_hz)
