from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.bench import roofline
from moesaic.bench.interleave import Contender, Timing
from moesaic.bench.roofline import (
    COPY,
    Roof,
    RoofPoint,
    cache_file,
    device_name,
    measure_rates,
    measure_roof,
    measured_roof,
    with_precision,
)  # fmt: skip

ROOF = Roof({"float32": 100.0, "bfloat16": 400.0}, 10.0, "a device", "2026-01-01T00:00:00.000+00:00", {"torch": "2"})


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Measures little, keeps it below the test's folder, and says that nobody else is at work."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(roofline, "SQUARES", {"cpu": {"float32": 64}})
    monkeypatch.setattr(roofline, "COPY_BYTES", {"cpu": 2**16})
    monkeypatch.setattr(roofline, "LEAST_S", 0.001)
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    return tmp_path


def test_the_roof_is_the_lower_of_two_limits() -> None:
    assert ROOF.ridge("float32") == 10.0
    assert [ROOF.attainable(intensity, "float32") for intensity in (1.0, 10.0, 50.0)] == [10.0, 100.0, 100.0]
    assert ROOF.attainable(30.0, "bfloat16") == 300.0
    assert ROOF.least_seconds(1000.0, 10.0, "float32") == 10.0
    assert RoofPoint("a", "b", "c", 1000.0, 10.0, 40.0).of(ROOF) == 0.25
    assert RoofPoint("a", "b", "c", 1000.0, 10.0, 40.0, "bfloat16").of(ROOF) == 0.0625
    assert RoofPoint("a", "b", "c", 0.0, 10.0, 4.0).of(ROOF) == 0.25
    slow = Roof({"float32": 100.0, "bfloat16": 4.0, "float64": 50.0}, 10.0, "", "", {})
    assert [slow.rate(dtype) for dtype in ("float32", "bfloat16", "float64")] == [100.0, 100.0, 50.0]
    assert ROOF.least_seconds(1000.0, 500.0, "float32") == 50.0


def test_a_roof_is_measured_once_and_kept(small: Path) -> None:
    said: list[str] = []
    first = measured_roof("cpu", said.append)
    assert first.matrix_flops.keys() == {"float32"}
    assert first.matrix_flops["float32"] > 1e6
    assert first.copy_bytes_per_s > 1e6
    assert first.device == device_name("cpu")
    assert "threads" in first.device
    [path] = (small / "moesaic" / "roofline").iterdir()
    assert path == cache_file(first.device)
    assert measured_roof("cpu", said.append) == first
    assert said == [f"roofline: measuring {first.device}"]


@pytest.mark.parametrize(
    "change",
    [
        lambda kept: {**kept, "versions": {"torch": "1.0"}},
        lambda kept: {**kept, "device": "another"},
        lambda kept: {**kept, "copy_bytes_per_s": 0.0},
        lambda kept: {**kept, "matrix_flops": {}},
        lambda kept: {**kept, "matrix_flops": {"bfloat16": 1.0}},
        lambda kept: {**kept, "matrix_flops": {"float32": "fast"}},
        lambda kept: {"matrix_flops": {"float32": 1.0}},
        lambda kept: [],
        lambda kept: "half a f",
    ],
)
def test_what_is_kept_of_another_or_damaged_is_measured_again(small: Path, change: object) -> None:
    first = measured_roof("cpu", lambda line: None)
    path = cache_file(first.device)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))  # type: ignore[operator]
    again = measured_roof("cpu", lambda line: None)
    assert again.when > first.when
    assert json.loads(path.read_text())["when"] == again.when
    path.write_text('{"matrix_fl')
    assert measured_roof("cpu", lambda line: None).when > again.when


def test_a_roof_is_measured_anew_on_request_and_replaces_the_kept_one(small: Path) -> None:
    first = measured_roof("cpu", lambda line: None)
    anew = measure_roof("cpu", lambda line: None)
    assert anew.kept == cache_file(first.device)
    assert anew.roof.when > first.when
    assert measured_roof("cpu", lambda line: None) == anew.roof
    said: list[str] = []
    quick = measure_roof("cpu", said.append, quick=True)
    assert (quick.kept, len(quick.rates["float32", torch.get_num_threads()])) == (None, roofline.QUICK_ROUNDS)
    assert "not kept" in said[-1]
    assert measured_roof("cpu", lambda line: None) == anew.roof


@pytest.fixture
def threads() -> Iterator[None]:
    """Two threads, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_rates_are_work_over_the_time_of_each_round_and_the_fastest_is_the_roof(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roofline, "SQUARES", {"cpu": {"float32": 8, "float64": 4}})

    def interleave(contenders: dict[Any, Contender], *, rounds: int, least_s: float) -> dict[Any, Timing]:
        assert all(contender(1) > 0 for contender in contenders.values())
        return {key: Timing(1, (4.0, 2.0, 8.0) if key[1] == 2 else (16.0,)) for key in contenders}

    monkeypatch.setattr(roofline, "interleave", interleave)
    found = measure_roof("cpu", lambda line: None, one_thread=True)
    assert found.rates == {
        ("float32", 2): (256.0, 512.0, 128.0), ("float32", 1): (64.0,), ("float64", 2): (32.0, 64.0, 16.0),
        (COPY, 2): (2**15, 2**16, 2**14), (COPY, 1): (2**13,),
    }  # fmt: skip
    assert (found.roof.matrix_flops, found.roof.copy_bytes_per_s) == ({"float32": 512.0, "float64": 64.0}, 2**16)
    assert {count for _, count in measure_rates("cpu")} == {2}


@pytest.mark.parametrize(("device", "precision"), [("cuda", "tf32"), ("cuda", "ieee"), ("cpu", "ieee")])
def test_float32_products_have_their_precision_only_while_they_are_timed(device: str, precision: str) -> None:
    backend: Any = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
    products = backend.matmul
    before, seen = products.fp32_precision, []

    def timed(repetitions: int) -> float:
        seen.append(products.fp32_precision)
        raise MemoryError

    products.fp32_precision = other = "ieee" if precision == "tf32" else "tf32"
    try:
        with pytest.raises(MemoryError):
            with_precision(timed, device, precision)(1)
        assert (seen, products.fp32_precision) == ([precision], other)
    finally:
        products.fp32_precision = before


def test_every_dtype_of_a_gpu_has_its_own_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(roofline.SQUARES["cuda"]) >= {"float32", "tf32", "bfloat16", "float16"}
    asked: list[tuple[str, str]] = []

    def with_precision(contender: Contender, device: str, precision: str) -> Contender:
        asked.append((device, precision))
        return contender

    monkeypatch.setattr(roofline, "with_precision", with_precision)
    for dtype in ("float32", "tf32"):
        # Operands on a CPU do for the question.
        assert roofline._product("cpu", dtype, 4)[0] == 128
    assert asked == [("cpu", "ieee"), ("cpu", "tf32")]


def test_a_busy_machines_roof_is_not_kept(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (1000.0, 0.0, 0.0))
    said: list[str] = []
    roof = measured_roof("cpu", said.append)
    assert "busy" in said[-1]
    assert not cache_file(roof.device).exists()


def test_a_folder_that_cannot_be_written_is_told(small: Path) -> None:
    (small / "moesaic").write_text("a file where the folder should be")
    said: list[str] = []
    assert measured_roof("cpu", said.append).copy_bytes_per_s > 0
    assert "cannot be written" in said[-1]


def test_the_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for relative in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert cache_file("x").parent == tmp_path / ".cache" / "moesaic" / "roofline"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_file("x").parent == tmp_path / ".cache" / "moesaic" / "roofline"
    assert cache_file("A (R) 1") != cache_file("A R 1")
