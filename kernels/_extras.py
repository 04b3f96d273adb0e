"""Modules that are loaded on first use because they need more than torch, triton and numpy."""

from __future__ import annotations

import hashlib
import importlib
import inspect
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


def source_digest(module: ModuleType) -> int:
    """Return a number of a module's source, as a default argument of cached functions that compile parts of it in.

    Numba's disk cache notices changes in a function's own file and in its signature, to which defaults belong.
    """
    return int(hashlib.sha256(inspect.getsource(module).encode()).hexdigest()[:8], 16)
