"""Timing of several sides in turn, in one process, with as many threads each."""

from __future__ import annotations

import contextlib
import importlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar


class NotRunError(Exception):
    """A peer cannot be measured here; the message says why, and the others are measured all the same."""


Contender = Callable[[int], float]
"""Does so many repetitions of its work, waits for the device, and returns the seconds that they took."""


def clock(work: Callable[[int], object], device: str) -> Contender:
    """``work``, timed by the wall clock between two synchronisations of the device."""

    def timed(repetitions: int) -> float:
        _synchronise(device)
        start = time.perf_counter()
        work(repetitions)
        _synchronise(device)
        return time.perf_counter() - start

    return timed


def _synchronise(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


@dataclass(frozen=True)
class Timing:
    """Seconds per repetition: one number per round, each the mean over ``repetitions``."""

    repetitions: int
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median over rounds."""
        return statistics.median(self.seconds)

    @property
    def low(self) -> float:
        """The fastest round."""
        return min(self.seconds)

    @property
    def high(self) -> float:
        """The slowest round."""
        return max(self.seconds)


Side = TypeVar("Side")


def interleave(contenders: Mapping[Side, Contender], *, rounds: int, least_s: float) -> dict[Side, Timing]:
    """Time all contenders in turn, A B A B …, so that a slow minute of the machine meets each of them.

    First each is warmed up: called once, for compilation and allocation, then with more and more repetitions until one
    call takes ``least_s`` seconds. With that many it goes into ``rounds`` rounds; one repetition is the least.
    """
    repetitions = {name: _repetitions(contender, least_s) for name, contender in contenders.items()}
    seconds: dict[Side, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            seconds[name].append(contender(repetitions[name]) / repetitions[name])
    return {name: Timing(repetitions[name], tuple(values)) for name, values in seconds.items()}


def fastest(
    contenders: Mapping[tuple[str, int], Contender], *, rounds: int, least_s: float
) -> tuple[dict[str, Timing], dict[str, int]]:
    """`interleave` sides with several numbers of threads, by (side, threads); the fastest number of each side counts.

    Returns:
        Timing and number of threads, by side.
    """
    timings: dict[str, Timing] = {}
    threads: dict[str, int] = {}
    for (name, count), timing in interleave(contenders, rounds=rounds, least_s=least_s).items():
        if name not in timings or timing.median < timings[name].median:
            timings[name], threads[name] = timing, count
    return timings, threads


def _repetitions(contender: Contender, least_s: float) -> int:
    contender(1)
    count = 1
    while (taken := contender(count)) < least_s:
        # Overshoot a little, or noise asks for one more doubling; a call of 0 s says nothing yet.
        wanted = 1.1 * count * least_s / taken if taken > 0 else math.inf
        count = max(count + 1, math.ceil(min(wanted, 8 * count)))
    return count


def ratio(slower: Timing, faster: Timing) -> dict[str, float]:
    """How many times as long ``slower`` takes: ratio of the medians, lowest and highest ratio within one round.

    The ratio of the medians lies between those two always: were every round's above it, so were that of the medians.
    """
    rounds = [a / b for a, b in zip(slower.seconds, faster.seconds, strict=True)]
    return {"median": slower.median / faster.median, "low": min(rounds), "high": max(rounds)}


def with_threads(contender: Contender, count: int) -> Contender:
    """The contender with ``count`` threads of PyTorch's, which has as many as before when it is done."""
    import torch

    def timed(repetitions: int) -> float:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            return contender(repetitions)
        finally:
            torch.set_num_threads(before)

    return timed


@contextlib.contextmanager
def equal_threads() -> Iterator[int]:
    """Give PyTorch and, where it is installed, Numba the same number of threads: the smaller of their two settings."""
    import torch

    before, numba = torch.get_num_threads(), None
    count = before
    with contextlib.suppress(ModuleNotFoundError):
        numba = importlib.import_module("numba")
        numba_before = numba.get_num_threads()
        count = min(before, numba_before)
        numba.set_num_threads(count)
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(before)
        if numba is not None:
            numba.set_num_threads(numba_before)
