"""Peak memory of a call, as the system sees it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def peak_bytes(work: Callable[[], object], device: str) -> int | None:
    """Most memory that ``work`` held beyond what was held before; None on a CPU whose system does not say.

    Called twice, and measured the second time: the first compiles and fills caches. On a CPU it is the process's
    resident set, results included, and an upper bound: of blocks below 32 MiB the allocator may keep some that were
    freed. On a GPU it is what PyTorch allocated.
    """
    work()
    return peak_while(work, device)[1]


T = TypeVar("T")


def peak_while(work: Callable[[], T], device: str) -> tuple[T, int | None]:
    """Return what ``work`` gives, called once, and the most memory held meanwhile beyond what was held before.

    As `peak_bytes` counts it, with what is compiled and cached on the way.
    """
    try:
        before = _begin(device)
    except (OSError, KeyError, AttributeError):
        return work(), None
    result = work()
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        return result, int(torch.cuda.max_memory_allocated() - before)
    return result, max(0, _status("VmHWM") - before)


def _begin(device: str) -> int:
    """Forget earlier peaks; return what is held now."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # What the allocator keeps of earlier work would hide what this work takes.
    ctypes.CDLL(None).malloc_trim(0)
    _RESET.write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    values = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(values[name].split()[0]) * 1024
