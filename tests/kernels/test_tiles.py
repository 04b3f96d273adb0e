"""Tile choice: the closed form's bounds on waste and sizes, the shipped tables, tuning that survives a kill."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch
import triton

from moesaic.kernels import tiles, tuning
from moesaic.kernels.tiles import KINDS, SHARED_BYTES, Shape, Tile, closed_form

BF16 = torch.bfloat16


def shape(kind: str, n_rows: int, n_experts: int, depth: int = 2048, n_out: int = 768, **given: object) -> Shape:
    return Shape(kind, n_rows, depth, n_out, n_experts, **({"dtype": BF16} | given))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("per_expert", "most"), [(8, 2.1), (16, 1.6), (32, 1.6), (64, 1.6), (128, 1.3), (256, 1.3), (2048, 1.1)]
)
def test_waste_under_random_routing(per_expert: int, most: float) -> None:
    """Rows that are computed over rows there are, E = 256 experts that tokens choose at random."""
    n_experts = 256
    ids = torch.randint(0, n_experts, (per_expert * n_experts,), generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(ids, minlength=n_experts)
    block = closed_form(shape("rows", len(ids), n_experts), 90).block_m
    assert float((-(-counts // block) * block).sum()) / len(ids) <= most


@pytest.mark.parametrize("architecture", SHARED_BYTES)
def test_every_size_has_a_tile_within_the_chip(architecture: int) -> None:
    numbers = [(BF16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32"), (torch.float32, "tf32x3")]
    for kind, (dtype, precision), n_rows, n_experts, depth, n_out, aligned in product(
        KINDS, numbers, (1, 64, 4096, 10**6), (1, 128, 10**6), (1, 47, 4096), (1, 97, 10**5), (True, False)
    ):
        tile = closed_form(Shape(kind, n_rows, depth, n_out, n_experts, dtype, precision, aligned), architecture)
        for size in (tile.block_m, tile.block_n, tile.block_k):
            assert size >= 16
            assert size & (size - 1) == 0
        columns = tile.block_n * (2 if kind in ("up", "interleaved") else 1)
        room = tile.stages * (tile.block_m + columns) * tile.block_k * dtype.itemsize
        assert tile.programs * room <= SHARED_BYTES[architecture]
        assert tile.stages >= 2
        assert tile.warps in (2, 4, 8)


def test_a_chip_with_little_shared_memory_gets_tiles_that_fit() -> None:
    for kind, n_rows in product(KINDS, (64 * 8, 64 * 1000)):
        tile = closed_form(shape(kind, n_rows, 64, n_out=4096), 80, 101_376)
        columns = tile.block_n * (2 if kind in ("up", "interleaved") else 1)
        assert tile.stages * (tile.block_m + columns) * tile.block_k * 2 <= 101_376


def test_the_shipped_table_is_readable() -> None:
    table = json.loads(tiles._TABLE.read_text(encoding="utf-8"))
    for chip in table.values():
        for sizes in chip.values():
            Tile(**sizes)


def test_shapes_share_an_entry_by_powers_of_two() -> None:
    keys = {shape("rows", rows, 64).key for rows in range(64 * 65, 64 * 129, 64)}
    assert len(keys) == 1
    assert shape("rows", 64 * 64, 64).key not in keys
    assert shape("rows", 64 * 100, 64, aligned=False).key not in keys


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


FIRST = Tile(128, 128, 64, 8, 3)


def seconds_of(tile: Tile) -> float:
    return 1.0 + abs(tile.block_n - 64) / 64 + abs(tile.stages - 4) / 8


def test_tuning_takes_the_fastest_and_remembers_it(cache: Path) -> None:
    best = tuning.tune("chip", "a shape", FIRST, seconds_of, budget_s=1e9)
    timed = tuning.candidates(FIRST)
    assert 3 <= len(timed) <= tuning.MOST_TILES
    assert timed[0] == FIRST
    assert seconds_of(best) == min(seconds_of(tile) for tile in timed)
    assert {key: Tile(**sizes) for key, sizes in tuning.stored("chip").items()} == {"a shape": best}
    assert tuning.stored("another chip") == {}


def test_a_killed_tuning_goes_on_where_it_was(cache: Path) -> None:
    timed: list[Tile] = []

    def until_killed(tile: Tile) -> float:
        if len(timed) == 4:
            raise KeyboardInterrupt
        timed.append(tile)
        return seconds_of(tile)

    with pytest.raises(KeyboardInterrupt):
        tuning.tune("chip", "a shape", FIRST, until_killed, budget_s=1e9)
    assert tuning.stored("chip") == {}
    later: list[Tile] = []

    def again(tile: Tile) -> float:
        later.append(tile)
        return seconds_of(tile)

    best = tuning.tune("chip", "a shape", FIRST, again, budget_s=1e9)
    assert [*timed, *later] == list(tuning.candidates(FIRST))
    assert best == tuning.tune("other chip", "a shape", FIRST, seconds_of, budget_s=1e9)


def test_tuning_ends_with_its_budget(cache: Path) -> None:
    now = [0.0]

    def slow(tile: Tile) -> float:
        now[0] += 7.0
        return 1.0

    tuning.tune("chip", "a shape", FIRST, slow, budget_s=20.0, clock=lambda: now[0])
    assert now[0] == 21.0
    now[0] = 0.0
    tuning.tune("chip", "another shape", FIRST, slow, budget_s=0.5, clock=lambda: now[0])
    assert now[0] == 7.0  # the closed form's tile, always


def test_a_tile_that_does_not_fit_is_left_out(cache: Path) -> None:
    def refuses(tile: Tile) -> float:
        if tile != FIRST:
            raise triton.OutOfResources(300_000, 232_448, "shared memory")
        return 1.0

    assert tuning.tune("chip", "a shape", FIRST, refuses, budget_s=1e9) == FIRST

    def breaks(tile: Tile) -> float:
        raise torch.OutOfMemoryError("not the tile's fault")

    with pytest.raises(torch.OutOfMemoryError):
        tuning.tune("chip", "b", FIRST, breaks, budget_s=1.0)
    assert set(tuning.stored("chip")) == {"a shape"}


def test_broken_files_are_left_out(cache: Path) -> None:
    tuning.tune("chip", "a shape", FIRST, seconds_of, budget_s=1e9)
    (path,) = tuning.folder("chip").glob("*.json")
    path.write_text(path.read_text(encoding="utf-8")[:40], encoding="utf-8")
    assert tuning.stored("chip") == {}
    tuning.tune("chip", "a shape", FIRST, seconds_of, budget_s=1e9)
    assert len(tuning.stored("chip")) == 1


def test_nothing_is_tuned_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOESAIC_TUNE", raising=False)
    assert not tuning.enabled()
    monkeypatch.setenv("MOESAIC_TUNE", "yes")
    with pytest.raises(ValueError, match="MOESAIC_TUNE must be 0 or 1, got 'yes'"):
        tuning.enabled()
    for bad in ("0", "-1", "nan", "soon"):
        monkeypatch.setenv("MOESAIC_TUNE_SECONDS", bad)
        with pytest.raises(ValueError, match="MOESAIC_TUNE_SECONDS must be a positive number"):
            tuning.seconds()


def test_a_new_shape_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without tuning the launcher is never called to choose: the first launch is the only compilation."""
    launched: list[Tile] = []
    monkeypatch.setattr(tiles, "architecture", lambda _: 90)
    monkeypatch.setattr(tiles, "shared_bytes", lambda _: SHARED_BYTES[90])
    monkeypatch.setattr(tiles, "chip", lambda _: "a chip without a table")
    monkeypatch.delenv("MOESAIC_TUNE", raising=False)
    tile = tiles.choose(shape("rows", 4096, 8), torch.device("cuda"), launched.append)
    assert tile == closed_form(shape("rows", 4096, 8), 90)
    assert not launched
