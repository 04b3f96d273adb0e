from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.bench import roof_figure, roofline
from moesaic.bench.kernel_bench import BENCHES, run_bench
from moesaic.bench.roofline import COPY, Rates, cache_file, device_name


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[tuple[str, int], tuple[float, ...]]:
    """Replaces the measurement, on an idle machine of two threads."""
    found: dict[tuple[str, int], tuple[float, ...]] = {
        ("float32", 2): (8e10, 1e11, 6e10), ("float32", 1): (4e10, 5e10, 3e10), ("bfloat16", 2): (1e9, 2e9, 1e9),
        (COPY, 2): (1e10, 8e9, 9e9), (COPY, 1): (5e9, 4e9, 4e9),
    }  # fmt: skip

    def measure_rates(device: str, *, quick: bool = False, one_thread: bool = False) -> Rates:
        assert one_thread
        return found

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(roofline, "measure_rates", measure_rates)
    return found


def test_the_roof_is_the_fastest_round_with_the_spread_beside_it_and_is_kept(
    rates: dict[tuple[str, int], tuple[float, ...]], tmp_path: Path, roofs_asked: list[str]
) -> None:
    result = run_bench("roofline", tmp_path, device="cpu")
    # Measured anew, never taken from what is kept.
    assert roofs_asked == []
    record = result.record
    row: dict[str, Any] = record["rows"][0]
    assert (row["what"], row["threads"], row["unit"]) == ("float32", 2, "FLOP/s")
    assert (row["fastest"], row["median"], row["lowest"], row["ridge_flops_per_byte"]) == (1e11, 8e10, 6e10, 10.0)
    assert [row["ridge_flops_per_byte"] for row in record["rows"]] == [10.0, 10.0, 0.2, None, None]
    assert record["roof"]["matrix_flops"] == {"float32": 1e11, "bfloat16": 2e9}
    assert record["kept"] == str(cache_file(device_name("cpu")))
    assert json.loads(Path(record["kept"]).read_text()) == record["roof"]
    page = (tmp_path / "bench-roofline.md").read_text()
    for words in (
        "| float32 | 80 GFLOP/s [60G-100G] | 100 GFLOP/s | 10 |", "| float32, 1 thread | 40 GFLOP/s [30G-50G] |",
        "| copy, 1 thread | 4 GB/s [4G-5G] | 5 GB/s |  |", "The roof is the fastest round", "Kept in",
        "![bench-roofline](figures/bench-roofline.png)",
    ):  # fmt: skip
        assert words in page
    svg = (tmp_path / "figures" / "bench-roofline.svg").read_text()
    for words in (">float32, 2 threads: 100 GFLOP/s<", ">float32, 1 thread: 50 GFLOP/s<", ">10<", ">0.2<"):
        assert words in svg


def test_a_quick_or_a_busy_roof_is_shown_but_not_kept(
    rates: dict[tuple[str, int], tuple[float, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roof_figure, "draw_roofs", lambda roofs, folder, name: [])
    kept = Path(str(run_bench("roofline", tmp_path, device="cpu").record["kept"]))
    before = kept.read_text()
    rates["float32", 2] = (7e10, 7e10, 7e10)
    quick = run_bench("roofline", tmp_path, device="cpu", quick=True)
    assert (quick.record["kept"], quick.record["roof"]["matrix_flops"]["float32"]) == (None, 7e10)
    assert "This roof was not kept." in quick.text
    monkeypatch.setattr("os.getloadavg", lambda: (100.0, 0.0, 0.0))
    assert run_bench("roofline", tmp_path, device="cpu").record["kept"] is None
    assert kept.read_text() == before


def test_the_benchmark_has_no_peers() -> None:
    assert (BENCHES["roofline"].peers, BENCHES["roofline"].against) == ({}, ())
