"""Tuning of tiles on the GPU at hand: opt-in, bounded, and remembered at every step.

With ``MOESAIC_TUNE=1`` a shape that no table has is tried with a few tiles around the closed form's before its first
launch, for at most ``MOESAIC_TUNE_SECONDS`` (20). Each time taken is on disk before the next tile is tried, in one file
per shape, so a run that is killed goes on where it was and processes do not wait for each other. Without it nothing is
measured, ever.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.errors import TritonError

from moesaic.kernels.tiles import Tile

MOST_TILES = 12


def enabled() -> bool:
    """Return whether ``MOESAIC_TUNE=1`` asks for tuning and a launch may be timed now, outside a CUDA graph's capture.

    Raises:
        ValueError: ``MOESAIC_TUNE`` is neither 0 nor 1.
    """
    asked = os.environ.get("MOESAIC_TUNE", "0")
    if asked not in ("0", "1", ""):
        raise ValueError(f"MOESAIC_TUNE must be 0 or 1, got {asked!r}")
    return asked == "1" and torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing()


def seconds() -> float:
    """Return how long the tiles of one shape may take to compile and time.

    Raises:
        ValueError: ``MOESAIC_TUNE_SECONDS`` is not a positive number.
    """
    asked = os.environ.get("MOESAIC_TUNE_SECONDS", "20")
    try:
        found = float(asked)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise ValueError(f"MOESAIC_TUNE_SECONDS must be a positive number, got {asked!r}")
    return found


def folder(chip: str) -> Path:
    """Return where a chip's times lie: in ``$XDG_CACHE_HOME`` or ``~/.cache``, by versions of Triton and kernels."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    return root / "moesaic" / "tiles" / f"{chip.replace(' ', '-')}-triton-{triton.__version__}-{_digest()}"


@cache
def _digest() -> str:
    """Return a hash of the kernels' sources: an old measurement says nothing about a changed kernel."""
    here = Path(__file__).parent
    names = ("grouped_matmul_triton.py", "grouped_outer_triton.py", "activations_triton.py", "weights_triton.py")
    return hashlib.sha256(b"".join((here / name).read_bytes() for name in names)).hexdigest()[:12]


def stored(chip: str) -> dict[str, dict[str, Any]]:
    """Return the best tile of every shape that was tuned to the end on a chip; broken files are left out."""
    found = {}
    try:
        paths = sorted(folder(chip).glob("*.json"))
    except (RuntimeError, OSError):  # no home folder, or one that cannot be read
        return {}
    for path in paths:
        record = _read(path)
        if record.get("done") and record.get("times"):
            shape, tile = _best(record)
            if tile is not None:
                found[shape] = asdict(tile)
    return found


def tune(
    chip: str, shape: str, first: Tile, measure: Callable[[Tile], float], *, budget_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> Tile:  # fmt: skip
    """Time tiles for a shape and return the fastest; what an earlier, killed run has timed is not timed again.

    Args:
        chip: the GPU's name.
        shape: the shape's key in the tables.
        first: the closed form's tile, which is timed in any case.
        measure: seconds of one launch; raises where a tile does not fit the chip.
        budget_s: no tile is begun after so many seconds.
        clock: seconds.
    """
    path = folder(chip) / f"{hashlib.sha256(shape.encode()).hexdigest()[:16]}.json"
    record = _read(path)
    if record.get("shape") != shape:
        record = {"shape": shape, "done": False, "times": []}
    tried = [Tile(**sizes) for sizes, _ in record["times"]]
    end = clock() + budget_s
    for tile in candidates(first):
        if tile in tried or (tried and clock() >= end):
            continue
        try:
            taken: float | None = measure(tile)
        except TritonError as error:
            # The compiler's or the launcher's refusal; another error says nothing about the tile, and ends the tuning.
            if tile == first:
                raise
            taken = None
            record.setdefault("refused", []).append(f"{tile}: {str(error)[:200]}")
        tried.append(tile)
        record["times"].append([asdict(tile), taken])
        _write(path, record)
    record["done"] = True
    _write(path, record)
    return _best(record)[1] or first


def _best(record: dict[str, Any]) -> tuple[str, Tile | None]:
    timed = [(taken, place) for place, (_, taken) in enumerate(record["times"]) if taken is not None]
    return record["shape"], Tile(**record["times"][min(timed)[1]][0]) if timed else None


def candidates(first: Tile) -> Sequence[Tile]:
    """Return at most `MOST_TILES` tiles, ``first`` in front: one size changed at a time, then pairs that trade off."""

    def around() -> Iterable[Tile]:
        yield first
        for stages in (first.stages + 1, first.stages - 1):
            yield replace(first, stages=stages)
        for block_n in (first.block_n * 2, first.block_n // 2):
            yield replace(first, block_n=block_n, warps=8 if first.block_m * block_n > 64 * 128 else 4)
        yield replace(first, block_n=first.block_n // 2, warps=4, programs=2)
        for group in (first.group * 2, 1):
            yield replace(first, group=group)
        if not first.swap and first.block_m > 64:
            yield replace(first, block_m=first.block_m // 2, warps=4)
        yield replace(first, block_k=first.block_k // 2, stages=first.stages + 1)
        yield replace(first, block_k=first.block_k * 2, stages=2)

    found = [tile for tile in around() if tile.stages >= 2 and 16 <= tile.block_n <= 256 and 16 <= tile.block_k <= 128]
    return list(dict.fromkeys(found))[:MOST_TILES]


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        _ = record["shape"], [Tile(**sizes) for sizes, _ in record["times"]]
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    return dict(record)


def _write(path: Path, record: dict[str, Any]) -> None:
    """Write a whole file beside the old one and put it in its place: a kill leaves the one or the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    Path(temporary).replace(path)
