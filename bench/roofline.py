"""The machine's own limits, measured: products per second of a large matrix product, and bytes per second of a copy.

    least seconds = max(FLOPs / matrix rate, bytes / bandwidth)
    attainable FLOP/s = min(matrix rate, intensity · bandwidth),   intensity = FLOPs / bytes

A roof is measured once per device, number of threads and version of torch, and kept in a file. Each of its numbers is
the fastest round's: what else a machine does can only slow a round down, so that one is nearest to what it can do, and
a roof of the median would be passed by whatever met a quieter moment.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moesaic.bench import environment
from moesaic.bench.interleave import Contender, clock, interleave, with_threads
from moesaic.bench.store import replace_file

SQUARES = {
    "cuda": {"float32": 8192, "tf32": 8192, "bfloat16": 8192, "float16": 8192, "float64": 4096},
    "cpu": {"float32": 2048, "bfloat16": 512, "float16": 256, "float64": 1024},
}
"""Width of the square matrices by dtype: wide enough to be bound by products, few seconds at most. ``tf32`` is float32
whose products a GPU may round to 10 bits of fraction; ``float32`` is IEEE's."""
COPY = "copy"
COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}
ROUNDS, LEAST_S = 5, 0.2
QUICK_ROUNDS, QUICK_LEAST_S = 3, 0.05
ONE_THREAD = ("float32", COPY)
"""What is measured on one thread of a CPU too."""
IDLE = 0.25
"""Load average per core above which a CPU's roof is used but not kept: others were at work."""


@dataclass(frozen=True)
class Roof:
    """What a device can do at most.

    Args:
        matrix_flops: FLOP/s of a large square product, by dtype (`float32`, `bfloat16`, …; `tf32` on a GPU).
        copy_bytes_per_s: bytes read plus bytes written per second by a copy.
        device: its name and, for a CPU, how many threads.
        when: ISO 8601, UTC.
        versions: of the packages that were measured with.
    """

    matrix_flops: Mapping[str, float]
    copy_bytes_per_s: float
    device: str
    when: str
    versions: Mapping[str, str | None]

    def rate(self, dtype: str) -> float:
        """FLOP/s of the products: never below float32's for a narrower dtype, as whoever likes may convert it."""
        narrow = dtype in ("bfloat16", "float16", "tf32")
        return max(self.matrix_flops[dtype], self.matrix_flops.get("float32", 0.0) if narrow else 0.0)

    def attainable(self, intensity: float, dtype: str) -> float:
        """FLOP/s that an ``intensity`` of FLOPs per byte allows: `min(matrix rate, intensity · bandwidth)`."""
        return min(self.rate(dtype), intensity * self.copy_bytes_per_s)

    def least_seconds(self, flops: float, n_bytes: float, dtype: str) -> float:
        """Seconds below which the roof lets no work be: `max(FLOPs / matrix rate, bytes / bandwidth)`."""
        return max(flops / self.rate(dtype), n_bytes / self.copy_bytes_per_s)

    def ridge(self, dtype: str) -> float:
        """FLOPs per byte above which products bind and below which bytes do."""
        return self.rate(dtype) / self.copy_bytes_per_s


@dataclass(frozen=True)
class RoofPoint:
    """One timing, to be drawn under a roof.

    Args:
        label: the case; points of one case share a number in the figure.
        side: who took the time; the first side of a list is the one that the others are compared with.
        group: the panel that it belongs to, such as a pass.
        flops: useful ones; 0 where the work is no product, and then the bandwidth alone is its roof.
        n_bytes: that have to move at least.
        seconds: that it took.
        dtype: of the products.
    """

    label: str
    side: str
    group: str
    flops: float
    n_bytes: float
    seconds: float
    dtype: str = "float32"

    def of(self, roof: Roof) -> float:
        """Share of the roof: least seconds over those it took. What mostly reads can pass 1, as a copy also writes."""
        return roof.least_seconds(self.flops, self.n_bytes, self.dtype) / self.seconds


Rates = Mapping[tuple[str, int], Sequence[float]]
"""FLOP/s by (dtype, threads), and bytes/s by (`COPY`, threads), one number per round."""


@dataclass(frozen=True)
class Measurement:
    """What `measure_roof` returns: the roof, all rounds behind it, and the file that keeps it, None if none does."""

    roof: Roof
    rates: Rates
    kept: Path | None


def measured_roof(device: str, say: Callable[[str], None]) -> Roof:
    """The roof of ``cpu`` or ``cuda``: the kept one if device, threads and torch are the same, else measured and kept.

    It lies below `$XDG_CACHE_HOME` or `~/.cache`, in `moesaic/roofline/`. ``moesaic bench roofline`` measures again, as
    does deleting the file. What a busy CPU gives is not kept, nor can it be where the folder cannot be written: ``say``
    hears of both.
    """
    name = device_name(device)
    kept = _read(cache_file(name))
    if (
        kept is not None
        and kept.device == name
        and kept.versions.get("torch") == environment.versions()["torch"]
        and SQUARES[device].keys() <= kept.matrix_flops.keys()
    ):
        return kept
    return measure_roof(device, say).roof


def measure_roof(
    device: str, say: Callable[[str], None], *, quick: bool = False, one_thread: bool = False
) -> Measurement:
    """Measure the roof of ``cpu`` or ``cuda`` and keep it in place of the one that was kept.

    Args:
        device: ``cpu`` or ``cuda``.
        say: takes a line about how far it is, and why the roof was not kept.
        quick: fewer and shorter rounds; not kept, as they more often miss the fastest.
        one_thread: measure what `ONE_THREAD` names on one thread of a CPU too.
    """
    name = device_name(device)
    say(f"roofline: measuring {name}")
    # Measuring makes a load of its own, so the question comes first.
    busy = device == "cpu" and hasattr(os, "getloadavg") and os.getloadavg()[0] > IDLE * environment.usable_cores()
    rates = measure_rates(device, quick=quick, one_thread=one_thread)
    roof = roof_of(rates, name, torch.get_num_threads())
    if busy:
        say("roofline: the machine was busy, so this roof may be too low; it is not kept")
        return Measurement(roof, rates, None)
    if quick:
        say("roofline: the quick version is not kept")
        return Measurement(roof, rates, None)
    path = cache_file(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(roof), indent=2, allow_nan=False) + "\n"
        replace_file(path, lambda target: target.write_text(text, encoding="utf-8"))
    except OSError as error:
        say(f"roofline: not kept, {path} cannot be written: {error.strerror or error}")
        return Measurement(roof, rates, None)
    return Measurement(roof, rates, path)


def roof_of(rates: Rates, name: str, threads: int) -> Roof:
    """The fastest rounds with so many threads."""
    best = {what: max(rounds) for (what, count), rounds in rates.items() if count == threads}
    copied = best.pop(COPY)
    return Roof(best, copied, name, environment.now(), environment.versions())


def measure_rates(device: str, *, quick: bool = False, one_thread: bool = False) -> Rates:
    """Time a product of each dtype and a copy in turn, on all threads and, where asked, some on one too."""
    most = torch.get_num_threads()
    work = {dtype: _product(device, dtype, width) for dtype, width in SQUARES[device].items()}
    work[COPY] = _copy(device)
    contenders: dict[tuple[str, int], Contender] = {}
    for what, (_, contender) in work.items():
        counts = {most, 1} if one_thread and device == "cpu" and what in ONE_THREAD else {most}
        contenders |= {(what, count): with_threads(contender, count) for count in sorted(counts, reverse=True)}
    rounds, least_s = (QUICK_ROUNDS, QUICK_LEAST_S) if quick else (ROUNDS, LEAST_S)
    timings = interleave(contenders, rounds=rounds, least_s=least_s)
    return {key: tuple(work[key[0]][0] / taken for taken in timing.seconds) for key, timing in timings.items()}


def device_name(device: str) -> str:
    """What a roof belongs to: the GPU, or the processor and how many threads torch uses."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{environment.cpu_model()}, {torch.get_num_threads()} threads"


def cache_file(name: str) -> Path:
    """Where the roof of a device is kept."""
    # The specification of XDG_CACHE_HOME wants a relative path ignored.
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    base = given if given.is_absolute() else Path.home() / ".cache"
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    # Two names may differ only in what a file name leaves out.
    return base / "moesaic" / "roofline" / f"{words[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}.json"


def _read(path: Path) -> Roof | None:
    """Return the roof in a file; None where there is none, or nothing that could be one."""
    try:
        roof = Roof(**json.loads(path.read_text(encoding="utf-8")))
        rates = [*roof.matrix_flops.values(), roof.copy_bytes_per_s]
        whole = len(rates) > 1 and all(math.isfinite(rate) and rate > 0 for rate in rates)
        return roof if whole and isinstance(roof.versions, dict) else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _product(device: str, dtype: str, width: int) -> tuple[float, Contender]:
    """FLOPs of a square product, and what times it."""
    stored = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    # Random operands: zeros draw less power, and a GPU then runs at a clock that no real product reaches.
    a, b = (torch.randn(width, width, device=device).to(stored) for _ in range(2))
    contender = _timed(partial(torch.mm, a, b, out=torch.empty_like(a)), device)
    return 2 * width**3, with_precision(contender, device, "tf32" if dtype == "tf32" else "ieee")


def _copy(device: str) -> tuple[float, Contender]:
    """Bytes that a copy moves, and what times it."""
    source = torch.ones(COPY_BYTES[device] // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes, _timed(partial(target.copy_, source), device)


def _timed(work: Callable[[], object], device: str) -> Contender:
    def repeat(count: int) -> None:
        for _ in range(count):
            work()

    return clock(repeat, device)


def with_precision(contender: Contender, device: str, precision: str) -> Contender:
    """The contender with ``ieee`` or ``tf32`` for PyTorch's float32 products; they are as before when it is done."""
    backend: Any = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
    products = backend.matmul

    def timed(repetitions: int) -> float:
        before = products.fp32_precision
        products.fp32_precision = precision
        try:
            return contender(repetitions)
        finally:
            products.fp32_precision = before

    return timed
