from __future__ import annotations

import errno
import json
import math
import os
import time
from pathlib import Path

import duckdb
import numpy as np
import pytest
import torch

from moesaic.bench.plan import InputError, Row
from moesaic.bench.store import RunStore, StoreError, columns, replace_file


def some_rows(count: int, first: int = 0) -> list[Row]:
    return [
        {"run_key": f"key-{i}", "status": "ok", "error": None, "loss": i / 7, "usage": [i / 3, 1.0], "dataset": "é\n"}
        for i in range(first, first + count)
    ]


def read_parquet(path: Path) -> tuple[list[tuple[str, str]], list[Row]]:
    relation = duckdb.read_parquet(str(path))
    names, types = relation.columns, [str(kind) for kind in relation.types]
    return list(zip(names, types, strict=True)), [dict(zip(names, row, strict=True)) for row in relation.fetchall()]


def test_rows_read_back_as_they_were_appended(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    assert store.append(some_rows(3)) == some_rows(3)
    store.append(some_rows(2, first=3))
    assert store.rows() == RunStore(tmp_path).rows() == some_rows(5)


def test_opening_and_reading_write_nothing(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "absent")
    assert store.rows() == []
    assert store.environment() is None
    assert not (tmp_path / "absent").exists()


def test_arrays_become_lists_and_non_finite_numbers_null(tmp_path: Path) -> None:
    row = {
        "run_key": "a", "loss": math.nan, "train_loss": np.float32(0.5), "superposition": torch.tensor(math.inf),
        "usage": torch.tensor([0.25, math.nan]), "dimensionality_histogram": np.arange(3),
    }  # fmt: skip
    (read,) = RunStore(tmp_path).append([row])
    assert read == {
        "run_key": "a", "loss": None, "train_loss": 0.5, "superposition": None, "usage": [0.25, None],
        "dimensionality_histogram": [0, 1, 2],
    }  # fmt: skip
    assert RunStore(tmp_path).rows() == [read]
    with pytest.raises(TypeError, match="set"):
        RunStore(tmp_path).append([{"run_key": "b", "loss": {1.0}}])
    assert RunStore(tmp_path).rows() == [read]


def test_known_run_keys_are_ignored(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.append(some_rows(2))
    assert [row["run_key"] for row in store.append(some_rows(4)[::-1] + some_rows(4))] == ["key-3", "key-2"]
    with store.path.open("a") as file:
        file.write(json.dumps({**some_rows(1)[0], "loss": -1.0}) + "\n")
    again = RunStore(tmp_path).rows()
    assert [row["run_key"] for row in again] == ["key-0", "key-1", "key-3", "key-2"]
    assert again[0] == some_rows(1)[0]


def test_a_kill_at_any_byte_of_an_append_loses_only_what_was_not_whole(tmp_path: Path) -> None:
    whole = RunStore(tmp_path)
    whole.append(some_rows(2))
    start = whole.path.stat().st_size
    whole.append(some_rows(3, first=2))
    data = whole.path.read_bytes()
    for cut in range(start, len(data)):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "runs.jsonl").write_bytes(data[:cut])
        store = RunStore(folder)
        kept = data[:cut].count(b"\n")
        assert store.rows() == some_rows(kept)
        assert [row["run_key"] for row in store.append(some_rows(5))] == [f"key-{i}" for i in range(kept, 5)]
        assert store.path.read_bytes() == data


@pytest.mark.parametrize("tail", [b"\0\0\0\0", b"\0\0\0\0\n", b'{"run_key": "key-9", "los\n', b"\xff\xfe"])
def test_a_torn_last_line_is_dropped_and_cut_off(tmp_path: Path, tail: bytes) -> None:
    RunStore(tmp_path).append(some_rows(2))
    path = tmp_path / "runs.jsonl"
    clean = path.read_bytes()
    path.write_bytes(clean + tail)
    store = RunStore(tmp_path)
    assert store.rows() == some_rows(2)
    assert path.read_bytes() == clean + tail
    store.append(some_rows(3))
    assert RunStore(tmp_path).rows() == some_rows(3)
    assert path.read_bytes().startswith(clean + b"{")


def test_damage_before_the_last_line_is_refused_by_number(tmp_path: Path) -> None:
    RunStore(tmp_path).append(some_rows(3))
    path = tmp_path / "runs.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], b"damage", *lines[2:]]))
    with pytest.raises(InputError, match="line 2 is not a row"):
        RunStore(tmp_path).rows()


def test_a_short_write_is_undone_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RunStore(tmp_path)
    store.append(some_rows(1))
    before = store.path.read_bytes()
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[: len(data) // 2]))
    with pytest.raises(OSError, match="only part of the rows"):
        store.append(some_rows(3))
    assert store.path.read_bytes() == before
    monkeypatch.setattr(os, "write", real)
    store.append(some_rows(3))
    assert store.rows() == RunStore(tmp_path).rows() == some_rows(3)


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_is_said_and_what_it_took_is_cut_off(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RunStore(tmp_path)
    store.append(some_rows(1))
    before = store.path.read_bytes()

    def full(descriptor: int, data: bytes = b"") -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(StoreError, match=r"runs\.jsonl: No space left on device; .*continue with --resume"):
            store.append(some_rows(3))
    assert store.path.read_bytes() == before
    store.append(some_rows(3))
    assert store.rows() == RunStore(tmp_path).rows() == some_rows(3)


def test_an_append_is_one_write_then_a_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    write, sync = os.write, os.fsync

    def counted_write(descriptor: int, data: bytes) -> int:
        calls.append(f"write {data.count(b'}')}")
        return write(descriptor, data)

    def counted_sync(descriptor: int) -> None:
        calls.append("fsync")
        sync(descriptor)

    monkeypatch.setattr(os, "write", counted_write)
    monkeypatch.setattr(os, "fsync", counted_sync)
    store = RunStore(tmp_path)
    store.append(some_rows(3))
    calls.clear()
    store.append(some_rows(5))
    assert calls == ["write 2", "fsync"]


def test_an_interrupt_in_the_middle_of_an_append_leaves_the_store_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    store = RunStore(tmp_path)
    store.append(some_rows(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.append(some_rows(2))
    assert store.rows() == some_rows(2)
    store.append(some_rows(3))
    assert store.path.read_bytes().count(b"\n") == 3


def test_a_second_writer_is_noticed_before_anything_is_cut_off(tmp_path: Path) -> None:
    one, other = RunStore(tmp_path), RunStore(tmp_path)
    one.append(some_rows(1))
    other.append(some_rows(2))
    with pytest.raises(InputError, match="second one writing"):
        one.append(some_rows(3))
    assert RunStore(tmp_path).rows() == some_rows(2)


def test_the_parquet_depends_on_the_rows_not_on_their_order(tmp_path: Path) -> None:
    parquets = []
    for name, rows in (("a", some_rows(6)), ("b", some_rows(6)[::-1])):
        store = RunStore(tmp_path / name)
        store.folder.mkdir()
        for row in rows:
            store.append([row])
        parquets.append(store.finish([f"key-{i}" for i in (3, 1, 5)]))
    assert parquets[0].read_bytes() == parquets[1].read_bytes()
    _, read = read_parquet(parquets[0])
    assert [row["run_key"] for row in read] == [f"key-{i}" for i in (3, 1, 5, 0, 2, 4)]
    (first,) = some_rows(1)
    assert read[3] == {**dict.fromkeys(read[3]), **first}
    assert sorted(path.name for path in parquets[0].parent.iterdir()) == ["runs.jsonl", "runs.parquet"]


def test_parquet_types_do_not_depend_on_the_values(tmp_path: Path) -> None:
    kinds = []
    for name, row in (("null", {}), ("whole", {"loss": 0, "usage": [1, 0]}), ("float", {"loss": 0.5, "usage": [0.5]})):
        store = RunStore(tmp_path / name)
        store.folder.mkdir()
        store.append([{"run_key": "a", **row}])
        kinds.append(read_parquet(store.finish())[0])
    assert kinds[0] == kinds[1] == kinds[2] == list(columns().items())
    assert dict(kinds[0])["usage"] == "DOUBLE[]"
    assert dict(kinds[0])["gpu_board_j"] == "DOUBLE"


def test_an_empty_folder_gives_an_empty_parquet(tmp_path: Path) -> None:
    kinds, rows = read_parquet(RunStore(tmp_path).finish())
    assert (kinds, rows) == (list(columns().items()), [])


def test_columns_beyond_the_stated_ones_follow_with_the_narrowest_type(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.append(
        [
            {"run_key": "a", "z": 1, "y": True, "x": [1], "w": "it's", "v": None, "u": [], "t": 2**70, "s": 1},
            {"run_key": "b", "z": 0.5, "y": False, "x": [0.5, None], "w": None, "v": None, "u": [], "t": 1, "s": "b"},
        ]
    )
    kinds, rows = read_parquet(store.finish())
    assert kinds[len(columns()) :] == [
        ("s", "JSON"), ("t", "DOUBLE"), ("u", "VARCHAR[]"), ("v", "VARCHAR"), ("w", "VARCHAR"), ("x", "DOUBLE[]"),
        ("y", "BOOLEAN"), ("z", "DOUBLE"),
    ]  # fmt: skip
    assert [rows[0][name] for name in "stuvwxyz"] == ["1", 2.0**70, [], None, "it's", [1.0], True, 1.0]
    assert rows[1]["x"] == [0.5, None]


def test_floats_keep_every_bit_in_the_parquet(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 5e-324, 1.7976931348623157e308, -0.0, float(np.float32(0.1))]
    store = RunStore(tmp_path)
    store.append([{"run_key": str(i), "loss": value} for i, value in enumerate(values)])
    _, rows = read_parquet(store.finish())
    assert [float.hex(float(str(row["loss"]))) for row in rows] == [value.hex() for value in values]


def test_a_failed_replacement_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(target, fail)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_environment_reads_back(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.write_environment({"preset": "é", "out": tmp_path, "argv": ("a", 1)})
    assert store.environment() == {"preset": "é", "out": str(tmp_path), "argv": ["a", 1]}
    store.environment_path.write_text("{")
    with pytest.raises(InputError, match=r"environment\.json is not JSON"):
        store.environment()


@pytest.mark.parametrize("text", ["[1, 2]", "3", "null"])
def test_an_environment_that_is_no_object_is_bad_input(text: str, tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text(text)
    with pytest.raises(InputError, match=r"environment\.json holds a JSON (list|int|NoneType)"):
        RunStore(tmp_path).environment()


def test_appending_takes_no_longer_however_many_rows_are_there(tmp_path: Path) -> None:
    store = RunStore(tmp_path)

    def seconds(first: int) -> float:
        """Of the fastest of some groups: the disk has slow moments."""
        taken = []
        for group in range(10):
            rows = [{"run_key": f"{first + group}-{i}", "loss": 0.5, "usage": [0.25] * 4} for i in range(8)]
            start = time.process_time()
            store.append(rows)
            taken.append(time.process_time() - start)
        return min(taken)

    few = seconds(0)
    store.append([{"run_key": f"many-{i}"} for i in range(20_000)])
    # What looked at every row would take some milliseconds, a hundred times as long.
    assert seconds(100) < 5 * few + 1e-3
    assert len(RunStore(tmp_path).keys()) == 20_160
