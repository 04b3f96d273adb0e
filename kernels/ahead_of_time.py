"""Compilation of Triton kernels for a GPU that need not be there, and what the compiler made of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_WARP = 32
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)


def compile_ahead(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], warps: int, arch: int, *, stages: int = 1,
    aligned: Sequence[str] = (), fp_fusion: bool = True,
) -> Any:  # fmt: skip
    """Compile for sm_``arch`` what a launch on aligned tensors would; it needs no GPU.

    Args:
        kernel: a Triton function.
        signature: name → type of each argument, ``constexpr`` for those in ``constants``.
        constants: the compile-time arguments.
        warps: of a program.
        arch: compute capability.
        stages: of software pipelines.
        aligned: integers that are multiples of 16, which a launch would find out.
        fp_fusion: whether products and sums may become one rounding.
    """
    known = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in aligned
    }
    source = ASTSource(kernel, signature, constants, known)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": fp_fusion}
    return triton.compile(source, target=GPUTarget("cuda", arch, _WARP), options=options)


def disassemble(compiled: Any) -> tuple[dict[str, int], list[tuple[int, str]]]:
    """Return the resources that a compiled kernel takes (``REG``, ``STACK``, …), and (address, text) of its code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", "-sass", path], capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text[text.index(" REG:") :])}
    return usage, [(int(address, 16), instruction) for address, instruction in _INSTRUCTION.findall(text)]
