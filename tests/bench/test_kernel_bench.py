from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numba
import pytest
import torch

from moesaic.bench import interleave as timing
from moesaic.bench import kernel_bench
from moesaic.bench.interleave import Timing, clock, equal_threads, interleave, ratio, with_threads
from moesaic.bench.kernel_bench import Benchmark, Findings, Options, Table, run_bench
from moesaic.bench.plan import InputError
from moesaic.bench.roofline import Roof, RoofPoint


def contender(calls: list[tuple[str, int]], name: str, seconds: float) -> Callable[[int], float]:
    """One that says it takes ``seconds`` per repetition."""

    def timed(repetitions: int) -> float:
        calls.append((name, repetitions))
        return repetitions * seconds

    return timed


def test_sides_take_turns_after_both_are_warm() -> None:
    calls: list[tuple[str, int]] = []
    sides = {"a": contender(calls, "a", 0.01), "b": contender(calls, "b", 0.5)}
    found = interleave(sides, rounds=3, least_s=0.3)
    enough = found["a"].repetitions
    assert calls[-6:] == [("a", enough), ("b", 1)] * 3
    assert [call for call in calls[:-6] if call[0] == "b"] == [("b", 1), ("b", 1)]
    assert 30 <= enough <= 40
    assert found["b"] == Timing(1, (0.5, 0.5, 0.5))
    assert found["a"].median == pytest.approx(0.01)


def test_repetitions_grow_where_the_clock_shows_nothing() -> None:
    asked: list[int] = []

    def coarse(count: int) -> float:
        asked.append(count)
        return 0.0 if count < 64 else 1.0

    assert interleave({"a": coarse}, rounds=1, least_s=0.3)["a"].repetitions == 64
    assert asked == [1, 1, 8, 64, 64]


def test_timing_and_ratio_are_medians_with_the_spread_of_the_rounds() -> None:
    ours, peer = Timing(4, (1.0, 2.0, 4.0)), Timing(1, (8.0, 6.0, 10.0))
    assert (peer.median, peer.low, peer.high) == (8.0, 6.0, 10.0)
    assert ratio(peer, ours) == {"median": 4.0, "low": 2.5, "high": 8.0}


def test_the_clock_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))

    def now() -> float:
        order.append("clock")
        return float(len(order))

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=now))
    assert clock(lambda count: order.append("work"), "cuda")(1) == 3.0
    assert order == ["wait", "clock", "work", "wait", "clock"]
    order.clear()
    clock(lambda count: order.append("work"), "cpu")(1)
    assert order == ["clock", "work", "clock"]


@pytest.mark.parametrize(("ours", "theirs"), [(1, 4), (4, 2), (3, 3)])
def test_torch_and_numba_get_equal_threads_and_their_own_back(
    ours: int, theirs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = {"torch": ours, "numba": theirs}
    for name, module in (("torch", torch), ("numba", numba)):
        monkeypatch.setattr(module, "get_num_threads", partial(threads.__getitem__, name))
        monkeypatch.setattr(module, "set_num_threads", partial(threads.__setitem__, name))
    with equal_threads() as count:
        assert [count, *threads.values()] == [min(ours, theirs)] * 3
    assert threads == {"torch": ours, "numba": theirs}


def test_threads_are_those_of_torch_where_numba_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    with equal_threads() as count:
        assert count == torch.get_num_threads()


def test_a_contender_has_its_threads_and_leaves_the_others_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = [3]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    assert with_threads(lambda repetitions: repetitions * threads[-1], 2)(5) == 10
    assert threads == [3, 2, 3]

    def broken(repetitions: int) -> float:
        raise MemoryError

    with pytest.raises(MemoryError):
        with_threads(broken, 1)(5)
    assert threads == [3, 2, 3, 1, 3]


def test_a_table_aligns_and_is_a_pipe_table_in_markdown() -> None:
    table = Table("sizes", ("name", "bytes"), [("a", "1"), ("long name", "200")], ("a note",))
    assert table.text() == "sizes\nname       bytes\na              1\nlong name    200\na note"
    assert table.markdown() == ("## sizes\n\n| name | bytes |\n| :-- | --: |\n| a | 1 |\n| long name | 200 |\n\na note")
    assert Table("none", notes=("not available",)).text() == "none\nnot available"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """Adds the benchmark ``fake``; holds the options of its calls."""
    seen: list[Options] = []

    def run(options: Options) -> Findings:
        seen.append(options)
        options.say("half way")
        failures = ["a disagrees"] if "a" in options.against else []
        return Findings(
            [{"ms": 1.5, "nothing": float("nan")}], [Table("found", ("x",), [("1",)])], draw, {"more": 7}, failures
        )

    def draw(folder: Path) -> list[Path]:
        folder.mkdir(exist_ok=True)
        (folder / "fake.png").write_bytes(b"png")
        return [folder / "fake.png"]

    monkeypatch.setitem(kernel_bench.BENCHES, "fake", Benchmark("a fake", {"a": "one", "b": "two"}, ("b",), run))
    return seen


def test_a_benchmark_writes_json_markdown_and_its_figure(
    asked: list[Options], tmp_path: Path, capfd: pytest.CaptureFixture[str], roofs_asked: list[str]
) -> None:
    out = tmp_path / "new" / "folder"
    result = run_bench("fake", out, device="cpu", quick=True, argv=["bench", "fake"])
    assert (asked[0].against, asked[0].device, asked[0].quick) == (("b",), "cpu", True)
    assert capfd.readouterr().err.splitlines()[-1] == "half way"
    record: dict[str, Any] = json.loads((out / "bench-fake.json").read_text())
    assert record["rows"] == [{"ms": 1.5, "nothing": None}]
    assert (record["more"], record["failures"], record["figures"]) == (7, [], ["figures/fake.png"])
    assert (record["roof"], roofs_asked) == (None, [])
    assert record["options"]["threads"] == record["environment"]["torch_threads"] >= 1
    assert record["environment"]["command"] == "moesaic bench fake"
    assert record["environment"]["ended"] >= record["environment"]["started"]
    page = (out / "bench-fake.md").read_text()
    for words in ("# moesaic bench fake: a fake", "| 1 |", "Quick version", "![fake](figures/fake.png)", "torch 2."):
        assert words in page
    assert sorted(path.name for path in out.iterdir()) == ["bench-fake.json", "bench-fake.md", "figures"]
    assert result.text.startswith("found\nx\n1\n\n")
    assert result.text.endswith(f"\n\n{out / 'bench-fake.json'}")
    again = run_bench("fake", out, against=["a", "b", "a"], device="cpu")
    assert asked[1].against == ("a", "b")
    assert list(again.failures) == ["a disagrees"]
    assert "FAILED: a disagrees" in again.text
    assert "**FAILED**: a disagrees" in (out / "bench-fake.md").read_text()


def test_a_figure_that_fails_costs_no_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(folder: Path) -> list[Path]:
        raise ValueError("nothing to draw")

    found = Findings([{"ms": 1.5}], [Table("found")], draw)
    monkeypatch.setitem(kernel_bench.BENCHES, "fake", Benchmark("a fake", {}, (), lambda options: found))
    with pytest.raises(ValueError, match="nothing to draw"):
        run_bench("fake", tmp_path, device="cpu")
    assert json.loads((tmp_path / "bench-fake.json").read_text())["rows"] == [{"ms": 1.5}]


def test_points_are_drawn_under_a_roof_that_is_asked_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, roofs_asked: list[str], roof: Roof
) -> None:
    def run(options: Options) -> Findings:
        point = RoofPoint("512, 8", "moesaic", "forward", 1e6, 1e6, 1e-3)
        row: dict[str, object] = {"of_the_roof": point.of(options.roof)}
        return Findings([row], [Table("found")], lambda folder: [], points=[point], points_key="T, E")

    monkeypatch.setitem(kernel_bench.BENCHES, "fake", Benchmark("a fake", {}, (), run))
    record = run_bench("fake", tmp_path, device="cpu").record
    assert roofs_asked == ["cpu"]
    assert (record["roof"], record["rows"]) == (asdict(roof), [{"of_the_roof": pytest.approx(0.1)}])
    assert record["figures"] == ["figures/bench-fake-roofline.png", "figures/bench-fake-roofline.svg"]
    assert "![bench-fake-roofline](figures/bench-fake-roofline.png)" in (tmp_path / "bench-fake.md").read_text()
    assert "numbers: T, E" in (tmp_path / "figures" / "bench-fake-roofline.svg").read_text()


def test_wrong_names_peers_devices_and_folders_are_refused_before_any_work(
    asked: list[Options], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, file = tmp_path / "out", tmp_path / "file"
    file.touch()
    there = "ensemble, routing, grouped-matmul, layer, million, energy, roofline, fake"
    with pytest.raises(InputError, match=rf"did you mean 'fake'.*there are: {there}"):
        run_bench("fakes", out)
    with pytest.raises(InputError, match=r"--against 'c': no such peer; bench fake has a \(one\); b \(two\)"):
        run_bench("fake", out, against=["a", "c"])
    with pytest.raises(InputError, match=r"--against 'torch': bench roofline has no peers, it measures the device"):
        run_bench("roofline", out, against=["torch"])
    with pytest.raises(InputError, match="--device 'gpu'"):
        run_bench("fake", out, device="gpu")
    monkeypatch.setattr("moesaic.bench.environment.missing_extras", lambda *_: {"bench": ["numba"]})
    with pytest.raises(InputError, match="numba not installed"):
        run_bench("fake", out, device="cpu")
    monkeypatch.undo()
    assert not out.exists()


def test_a_folder_that_cannot_be_written_is_refused(asked: list[Options], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--out .*file/below: cannot be written: Not a directory"):
        run_bench("fake", tmp_path / "file" / "below", device="cpu")
    (tmp_path / "figures").touch()
    with pytest.raises(InputError, match=r"--out .*: cannot be written: File exists"):
        run_bench("fake", tmp_path, device="cpu")
    assert asked == []


def test_a_busy_machine_is_told_in_every_report(
    asked: list[Options], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("moesaic.bench.environment.usable_cores", lambda: 4)
    words = "busy before the benchmark began (load average 1.1, 4 cores): do not quote"
    for load, busy in (((1.1, 9.0, 9.0), True), ((1.0, 9.0, 9.0), False)):
        monkeypatch.setattr("os.getloadavg", lambda load=load: load)
        result = run_bench("fake", tmp_path, device="cpu")
        reports = [capfd.readouterr().err, result.text, (tmp_path / "bench-fake.md").read_text()]
        assert [words in report for report in reports] == [busy] * 3
        assert len(result.record["warnings"]) == busy
        assert result.record["options"]["load_average"] == load[0]
