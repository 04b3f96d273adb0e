from __future__ import annotations

import json
from pathlib import Path

import pytest

from moesaic.bench import roofline
from moesaic.bench.roofline import Roof, cache_file, device_name, measured_roof

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
