"""Modules that are loaded on first use because they need more than torch, triton and numpy."""

from __future__ import annotations

import importlib
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
