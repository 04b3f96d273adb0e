from __future__ import annotations

import re
from pathlib import Path

import pytest

from moesaic.bench import roof_figure
from moesaic.bench.palette import MOE
from moesaic.bench.plot_style import panels
from moesaic.bench.roof_figure import draw_line, draw_points, draw_roofs, looks
from moesaic.bench.roofline import Roof, RoofPoint


def point(label: str, side: str, group: str = "forward", flops: float = 1e6, seconds: float = 1e-3) -> RoofPoint:
    return RoofPoint(label, side, group, flops, 1e5, seconds)


def texts(path: Path) -> list[str]:
    """As written: numbers of points have a space on both sides, ticks have none."""
    return re.findall(r"<text[^>]*>([^<]+)</text>", path.read_text())


def test_a_line_is_the_lower_of_two_limits() -> None:
    _, ((axes,),) = panels(1, 1)
    found = draw_line(axes, 100.0, 10.0, (1.0, 1000.0))
    assert axes.get_lines()[0].get_xydata().tolist() == [[1.0, 10.0], [10.0, 100.0], [1000.0, 100.0]]  # type: ignore[union-attr]
    assert found[0] == pytest.approx((1.0, 10.0))
    assert found[-1] == pytest.approx((1000.0, 100.0))
    assert all(y == pytest.approx(min(100.0, 10.0 * x)) for x, y in found)


def test_work_with_and_without_products_has_panels_of_its_own(tmp_path: Path, roof: Roof) -> None:
    points = [
        point(label, side, group, flops)
        for label, flops in (("512, 8", 0.0), ("4096, 8", 0.0), ("512, 9", 1e6))
        for group in ("forward", "backward")
        for side in ("moesaic", "torch")
    ]
    paths = draw_points(points, roof, "T, E", tmp_path, "bench-fake-roofline")
    assert [path.name for path in paths] == ["bench-fake-roofline.png", "bench-fake-roofline.svg"]
    assert paths[0].stat().st_size > 10_000
    found = texts(paths[1])
    assert found.count("useful FLOPs per byte that has to move") == 2
    assert found.count("bytes that have to move") == 2
    assert [found.count(title) for title in ("Forward", "Backward")] == [2, 2]
    # Sides of a case share a number, once in each panel.
    assert [found.count(f" {number} ") for number in "1234"] == [2, 2, 2, 0]
    for words in ("numbers: T, E", "roof, float32: 100 GFLOP/s, 10 GB/s", "a copy: 10 GB/s", "moesaic", "torch"):
        assert found.count(words) == 1
    assert [words for words in found if words.endswith("512, 9")] == ["\u2007\u20073   512, 9"]


def test_a_side_whose_work_moves_other_bytes_has_a_number_of_its_own(tmp_path: Path, roof: Roof) -> None:
    paths = draw_points(
        [point("a", "exact"), point("a", "torch", seconds=2e-3), point("a", "sampled", flops=1e5)], roof, "case",
        tmp_path, "x",
    )  # fmt: skip
    assert texts(paths[1]).count(" 1 ") == 2


def test_points_lie_where_their_flops_bytes_and_seconds_put_them() -> None:
    assert roof_figure._place(point("a", "b")) == pytest.approx((10.0, 1e9))
    assert roof_figure._place(point("a", "b", flops=0.0)) == pytest.approx((1e5, 1e8))


def test_dtypes_with_equal_rates_share_a_line(tmp_path: Path) -> None:
    both = Roof({"float32": 1e11, "bfloat16": 1e9, "float64": 5e10}, 1e10, "", "", {})
    points = [RoofPoint("a", "b", "c", 1e6, 1e5, 1.0, dtype) for dtype in ("float32", "bfloat16", "float64")]
    found = texts(draw_points(points, both, "case", tmp_path, "x")[1])
    assert "roof, float32 and bfloat16: 100 GFLOP/s, 10 GB/s" in found
    assert "roof, float64: 50 GFLOP/s, 10 GB/s" in found


def test_sides_differ_in_colour_and_marker_and_the_first_is_ours() -> None:
    found = looks([f"side {i}" for i in range(9)])
    assert len({*found.values()}) == 9
    assert found["side 0"] == (MOE, "o")


def test_the_key_has_as_many_columns_as_there_is_room_for() -> None:
    words = ["a" * 10] * 7
    assert roof_figure._columns(words, 2, 36) == [12, 12, 12]
    assert roof_figure._columns(words, 2, 35) == [12, 12]
    assert roof_figure._columns(words, 2, 5) == [12]
    assert roof_figure._columns(["aa", "b", "c", "d"], 1, 100) == [3, 2, 2, 2]


def test_a_gpus_roof_has_a_line_and_a_ridge_per_dtype(tmp_path: Path) -> None:
    gpu = Roof({"float32": 5e13, "tf32": 4e14, "bfloat16": 8e14, "float16": 7.9e14}, 4e12, "a GPU", "", {})
    found = texts(draw_roofs({"16 threads": gpu}, tmp_path, "x")[1])
    for words in ("float32: 50 TFLOP/s", "tf32: 400 TFLOP/s", "12.5", "100", "200", "198", "a copy moves 4 TB/s"):
        assert words in found
    assert not any("threads" in words for words in found)
