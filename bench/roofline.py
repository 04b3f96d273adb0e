"""The machine's own limits, measured: products per second of a large matrix product, and bytes per second of a copy.

    least seconds = max(FLOPs / matrix rate, bytes / bandwidth)
    attainable FLOP/s = min(matrix rate, intensity · bandwidth),   intensity = FLOPs / bytes

A roof is measured once per device, number of threads and version of torch, and kept in a file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from moesaic.bench import environment
from moesaic.bench.interleave import clock, interleave
from moesaic.bench.store import replace_file

SQUARES = {
    "cuda": {"bfloat16": 8192, "float16": 8192, "float32": 8192},
    "cpu": {"float32": 2048, "bfloat16": 512},
}
"""Width of the square matrices by dtype: wide enough to be bound by products, few seconds at most."""
COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}
ROUNDS, LEAST_S = 5, 0.2
IDLE = 0.25
"""Load average per core above which a CPU's roof is used but not kept: others were at work."""


@dataclass(frozen=True)
class Roof:
    """What a device can do at most.

    Args:
        matrix_flops: FLOP/s of a large square product, by dtype (`float32`, `bfloat16`, …).
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
        narrow = dtype in ("bfloat16", "float16")
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


def measured_roof(device: str, say: Callable[[str], None]) -> Roof:
    """The roof of ``cpu`` or ``cuda``: the kept one if device, threads and torch are the same, else measured and kept.

    It lies below `$XDG_CACHE_HOME` or `~/.cache`, in `moesaic/roofline/`. Delete the file to measure again. What a busy
    CPU gives is not kept, nor can it be where the folder cannot be written: ``say`` hears of both.
    """
    name, versions = device_name(device), environment.versions()
    path = cache_file(name)
    kept = _read(path)
    if kept is not None and kept.device == name and kept.versions.get("torch") == versions["torch"]:
        return kept
    say(f"roofline: measuring {name}")
    # Measuring makes a load of its own, so the question comes first.
    busy = device == "cpu" and hasattr(os, "getloadavg") and os.getloadavg()[0] > IDLE * environment.usable_cores()
    roof = Roof(
        {dtype: _matrix_flops(device, dtype, width) for dtype, width in SQUARES[device].items()},
        _copy_bytes_per_s(device), name, environment.now(), versions,
    )  # fmt: skip
    if busy:
        say("roofline: the machine was busy, so this roof may be too low; it is not kept")
        return roof
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(roof), indent=2, allow_nan=False) + "\n"
        replace_file(path, lambda target: target.write_text(text, encoding="utf-8"))
    except OSError as error:
        say(f"roofline: not kept, {path} cannot be written: {error.strerror or error}")
    return roof


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


def _fastest(work: Callable[[], object], device: str) -> float:
    def repeat(count: int) -> None:
        for _ in range(count):
            work()

    return interleave({"work": clock(repeat, device)}, rounds=ROUNDS, least_s=LEAST_S)["work"].low


def _matrix_flops(device: str, dtype: str, width: int) -> float:
    # Random operands: zeros draw less power, and a GPU then runs at a clock that no real product reaches.
    a, b = (torch.randn(width, width, device=device).to(getattr(torch, dtype)) for _ in range(2))
    return 2 * width**3 / _fastest(partial(torch.mm, a, b, out=torch.empty_like(a)), device)


def _copy_bytes_per_s(device: str) -> float:
    source = torch.ones(COPY_BYTES[device] // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _fastest(partial(target.copy_, source), device)
