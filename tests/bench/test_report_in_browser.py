"""The report of a real sweep in headless Chromium: on a phone and a desk, light and dark, and printed."""

from __future__ import annotations

import re
import shutil
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from numpy.typing import NDArray

from moesaic.bench.middle_path import DATASETS, QUICK, architectures
from moesaic.bench.models import MODEL
from moesaic.bench.plan import Row
from moesaic.bench.report import write_report
from moesaic.bench.spec import SweepSpec
from moesaic.bench.store import RunStore
from moesaic.bench.sweep import run_sweep
from moesaic.metrics import count_flops
from moesaic.moe import Run, TrainConfig

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DARK = "--blink-settings=preferredColorScheme=0"
PHONE, DESK = 390, 1280
FIGURES = {
    "tradeoff",
    "superposition",
    "pareto",
    "usage",
    "dimensionality",
    "features_per_dimension",
    "losses",
    "weights-1",
}
_MEASURE = """<script>
const out = [...document.querySelectorAll("body *")].filter(
  e => !e.closest(".scroll") && e.getBoundingClientRect().right > innerWidth + 1);
const figures = [...document.querySelectorAll("figure svg")];
document.title = [innerWidth, document.documentElement.scrollWidth, out.length, figures.length,
  figures.filter(s => s.getBoundingClientRect().height < 80).length,
  [...document.querySelectorAll("figure svg image")].filter(i => i.getBBox().width < 10).length].join(" ");
</script>"""


class Browser:
    """Runs Chromium once per call, with a profile that is thrown away."""

    def __init__(self, program: str, folder: Path) -> None:
        self.program, self.folder, self.calls = program, folder, 0

    def run(self, page: Path, width: int, height: int, *options: str) -> str:
        self.calls += 1
        command = [
            self.program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={self.folder / f'profile{self.calls}'}", f"--window-size={width},{height}", *options,
            page.as_uri(),
        ]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    def picture(self, page: Path, width: int, *options: str) -> NDArray[np.float32]:
        """RGB of the page in a window of that width, (4000, width, 3), 0 to 1."""
        path = self.folder / f"{page.stem}-{self.calls}.png"
        self.run(page, width, 4000, f"--screenshot={path}", *options)
        return np.asarray(imread(path), dtype=np.float32)[..., :3]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser: takes one of {', '.join(NAMES)}")
    return Browser(program, tmp_path_factory.mktemp("browser"))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep")
    spec = SweepSpec(
        run={
            "n_features": 24,
            "gate": "sigmoid",
            "parametrization": "small",
            "steps": 60,
            "batch_size": 64,
            "lr": 0.01,
        },
        grid={"n_experts": [1, 4], "n_hidden": [2, 8], "feature_probability": [0.1]},
        where=["n_experts * n_hidden == 8"],
        match=["active_flops"],
        seeds=[0, 1],
    )
    run_sweep(spec, out, progress=False)
    return write_report(out)


def test_every_figure_that_applies_is_drawn(report: Path) -> None:
    # Those of the models are images in an SVG, which the widths below count: a lost one would not be missed there.
    assert {path.stem for path in (report.parent / "figures").glob("*.svg")} >= FIGURES


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_nothing_sticks_out_of_the_page(report: Path, browser: Browser, width: int) -> None:
    fits(report, browser, width)


def test_nothing_sticks_out_of_the_page_of_a_middle_path(browser: Browser, tmp_path: Path) -> None:
    RunStore(tmp_path).append(middle_path())
    fits(write_report(tmp_path), browser, PHONE)
    drawn = {path.stem for path in (tmp_path / "figures").glob("*.svg")}
    assert drawn == {"middle_path", "usage", "dimensionality", "features_per_dimension", "losses", "weights-1"}


def middle_path() -> list[Row]:
    """Made-up rows of the brief preset on one data set."""
    found: list[Row] = []
    training = TrainConfig(steps=9)
    for item in architectures(QUICK):
        toy, flops = item.toy, count_flops(item.toy)
        for seed in (0, 1):
            run = Run(toy, DATASETS["S"], training, seed)
            loss = 1 / (toy.n_experts * toy.n_hidden + toy.shared_hidden) + 0.001 * seed
            row: Row = {
                **run.flat(), "run_key": run.key, "status": "ok", "stage": "main", "dataset": "S", "slice": item.slice,
                "architecture": item.label, "unexplained_variance": loss, "loss": loss, "mean_dimensionality": 0.25,
                "active_flops": flops.training.active.total, "total_width": flops.total_width, "wall_s": 1.0,
                "usage": [1 / toy.n_experts] * toy.n_experts, "effective_experts": toy.n_experts,
                "dimensionality_histogram": [1] * 50, "features_per_dimension": 2.0,
            }  # fmt: skip
            if seed == 0:
                weight = np.ones((toy.n_experts, toy.n_features, toy.n_hidden), np.float32)
                row[MODEL] = {"losses": np.ones(9, np.float32), "weight": weight}
            found.append(row)
    return found


def fits(report: Path, browser: Browser, width: int) -> None:
    """Measures the page in a window of that width: nothing is wider, no figure is lost or flat."""
    copy = browser.folder / "measured.html"
    copy.write_text(report.read_text().replace("</body>", _MEASURE + "</body>"))
    found = re.search(r"<title>([\d ]+)</title>", browser.run(copy, width, 800, "--dump-dom"))
    assert found is not None
    window, page, out, figures, flat, images_without_width = map(int, found[1].split())
    assert (window, page) == (width, width)
    assert (out, flat, images_without_width) == (0, 0, 0)
    assert figures == len(list((report.parent / "figures").glob("*.svg")))


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_it_is_readable_light_and_dark(report: Path, browser: Browser, width: int) -> None:
    light, dark = browser.picture(report, width), browser.picture(report, width, DARK)
    for picture, paper in ((light, 1.0), (dark, 0.09)):
        page = np.median(picture, axis=(0, 1))
        assert page == pytest.approx(paper, abs=0.02)
        # Text and lines: enough of the page differs strongly from its paper.
        assert 0.01 < np.mean(np.abs(picture - page).max(-1) > 0.5) < 0.5
    # What is drawn in one theme is drawn in the other, at the same place.
    marks = [np.abs(p - np.median(p, axis=(0, 1))).max(-1) > 0.35 for p in (light, dark)]
    assert np.mean(marks[0] == marks[1]) > 0.97


def test_it_prints_in_the_colours_of_paper(report: Path, browser: Browser) -> None:
    path = browser.folder / "printed.pdf"
    browser.run(report, 800, 800, f"--print-to-pdf={path}", "--no-pdf-header-footer")
    data = path.read_bytes()
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", data)) <= 20
    streams = [s for s in re.findall(rb"stream\r?\n(.*?)endstream", data, re.DOTALL) if s[:1] == b"x"]
    fills = set(re.findall(rb"[\d.]+ [\d.]+ [\d.]+ rg", b"".join(map(_inflated, streams))))
    assert b".2667 .2667 .2667 rg" in fills  # #444444, in which captions are on paper alone


def _inflated(stream: bytes) -> bytes:
    return zlib.decompressobj().decompress(stream)
