"""Peak memory of a call, as the system sees it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def peak_bytes(work: Callable[[], object], device: str) -> int | None:
    """Most memory that ``work`` held beyond what was held before; None on a CPU whose system does not say.

    Called twice, and measured the second time: the first compiles and fills caches. On a CPU it is the process's
    resident set, results included, and an upper bound: of blocks below 32 MiB the allocator may keep some that were
    freed. On a GPU it is what PyTorch allocated.
    """
    work()
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    try:
        # What the allocator keeps of earlier work would hide what this work takes.
        ctypes.CDLL(None).malloc_trim(0)
        _RESET.write_text("5")
        before = _status("VmRSS")
        work()
        return max(0, _status("VmHWM") - before)
    except (OSError, KeyError, AttributeError):
        return None


def _status(name: str) -> int:
    values = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(values[name].split()[0]) * 1024
