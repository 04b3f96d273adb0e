"""Windows for `moesaic.metrics.compare_energy`: long enough for the longest call, or calls short enough for the window.

A window ends with the end of a call, and windows that differ by more than 5 % are refused, as a bias that depends on
the window would be taken for a difference. So no call may take more than a fortieth of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHARE = 1 / 40
"""Most of a window that a call may take."""
FULL: dict[str, Any] = {"duration_s": 5.0, "trials": 5, "cooldown_s": 5.0, "warmup_s": 2.0, "idle_s": 10.0}
"""The protocol's own."""
SHORT: dict[str, Any] = {"duration_s": 2.0, "trials": 5, "cooldown_s": 1.0, "warmup_s": 1.0, "idle_s": 10.0}
"""For sweeps, which have dozens of sides."""
QUICK: dict[str, Any] = {**SHORT, "trials": 3}


def steps_per_call(steps: int, seconds: float, windows: Mapping[str, Any]) -> int:
    """Return how many steps of a training of so many ``steps`` and ``seconds`` fit into a call, at least one."""
    return max(1, min(steps, int(steps * SHARE * windows["duration_s"] / seconds)))


def long_enough(windows: Mapping[str, Any], call_s: float) -> dict[str, Any]:
    """``windows``, lengthened where the longest call takes ``call_s`` seconds."""
    return {**windows, "duration_s": max(windows["duration_s"], call_s / SHARE)}
