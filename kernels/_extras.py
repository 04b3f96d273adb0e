"""Modules that are loaded on first use because they need more than torch, triton and numpy."""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from types import ModuleType


def numba_twin(name: str) -> ModuleType:
    """Import ``kernels/<name>.py``, which needs Numba.

    Raises:
        ImportError: naming the extra that brings Numba.
    """
    try:
        return importlib.import_module(f"moesaic.kernels.{name}")
    except ModuleNotFoundError as error:
        if error.name != "numba":
            raise
        raise ImportError("the CPU twin of this op needs Numba: pip install 'moesaic[bench]'") from error


def _digest(*names: str) -> int:
    sources = b"".join((Path(__file__).parent / name).read_bytes() for name in names)
    return int(hashlib.sha256(sources).hexdigest()[:8], 16)


LIBRARY = _digest("toy_cpu.py", "vectors_cpu.py", "grouped_cpu.py", "panel_cpu.py")
"""A number of the sources that other files' compiled functions take parts from, as a default argument of these.

Numba's disk cache notices changes in a function's own file and in its signature, to which defaults belong. One number
for all, because its dispatcher tells defaults apart by their type alone: after a function with one number, calls of a
function with another find nothing, and look for what to call in Python, some 0.2 ms each time.
"""
