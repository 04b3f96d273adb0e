from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from moesaic.bench.analysis import cells
from moesaic.bench.figures_detail import against_sparsity, density
from moesaic.bench.palette import DARK
from moesaic.bench.plan import InputError, PlannedRun, Row
from moesaic.bench.report import result_table, write_report
from moesaic.bench.tradeoff import TRADEOFF
from moesaic.metrics.flops import count_flops
from moesaic.moe import FeatureConfig, Run, ToyConfig, held_out

REASON = "loss is NaN at step 17 <&>"


class Page(HTMLParser):
    """Collects the tags of a page and fails on one that is not closed in order."""

    VOID = frozenset({"meta", "br", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def measured(item: PlannedRun) -> Row:
    """A made-up result: loss falls with active width, MoE is better on C alone, one MoE run on D fails."""
    toy, dataset = item.run.toy, item.labels["dataset"]
    flops = count_flops(toy)
    width, is_moe = toy.top_k * toy.n_hidden + toy.shared_hidden, toy.n_experts > 1
    wiggle = math.sin(int(item.run.key[:6], 16))
    loss = math.exp(-width / 20) * (0.5 if is_moe and dataset == "C" else 1.0) * (1 + 0.02 * wiggle)
    failed = is_moe and dataset == "D" and item.run.seed == 1
    usage = [(1 + e) / sum(range(1, toy.n_experts + 1)) for e in range(toy.n_experts)]
    return {
        **item.run.flat(), **item.labels, "run_key": item.run.key, "status": "failed" if failed else "ok",
        "error": REASON if failed else None, "loss": None if failed else loss, "wall_s": 0.25,
        "unexplained_variance": None if failed else loss, "mean_dimensionality": 0.6 + 0.01 * wiggle,
        "superposition": 0.4, "represented_share": 0.8, "dead_features": 3, "features_per_dimension": 1.5,
        "features_per_dimension_gate": 1.2, "features_per_dimension_folded": 1.1, "usage": usage,
        "effective_experts": math.exp(-sum(u * math.log(u) for u in usage)),
        "dimensionality_histogram": [1] * 24 + [20] + [1] * 25, "active_flops": flops.training.active.total,
        "total_width": flops.total_width, "active_width": flops.active_width,
    }  # fmt: skip


def written(folder: Path, rows: list[Row], **environment: object) -> tuple[str, Page]:
    (folder / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "environment.json").write_text(json.dumps(environment))
    text = write_report(folder).read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    return text, page


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    tune, main = TRADEOFF.stages(True, 2)
    tuned = [measured(item) for item in tune([])]
    return tuned + [measured(item) for item in main(tuned)]


@pytest.fixture(scope="module")
def report(rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Page]:
    folder = tmp_path_factory.mktemp("tradeoff")
    environment = {
        "preset": "tradeoff", "command": "moesaic sweep tradeoff --out 'my runs'", "cpu": "A CPU", "device": "cpu",
        "versions": {"torch": "2.13.0", "triton": None},
    }  # fmt: skip
    return folder, *written(folder, rows, **environment)


def test_figures_are_drawn_as_png_and_svg(report: tuple[Path, str, Page]) -> None:
    names = {"tradeoff", "superposition", "pareto", "usage", "gates", "dimensionality", "features_per_dimension"}
    files = {path.name for path in (report[0] / "figures").iterdir()}
    assert files == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}


def test_report_is_self_contained_and_fits_theme_phone_and_paper(report: tuple[Path, str, Page]) -> None:
    _, text, page = report
    tags = [tag for tag, _ in page.seen]
    assert tags.count("svg") == 7
    assert not {"script", "link", "img", "iframe"} & set(tags)
    for _, attributes in page.seen:
        assert all(not (v or "").startswith(("http", "//", "data:")) for k, v in attributes.items() if "xmlns" not in k)
    assert "url(http" not in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.seen


def test_every_colour_of_the_figures_follows_the_theme(report: tuple[Path, str, Page]) -> None:
    bodies = re.findall(r"<svg.*?</svg>", report[1], flags=re.DOTALL)
    literal = {c for body in bodies for c in re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", body)}
    assert literal == set()
    for color, dark in DARK.items():
        assert f"--c{color[1:]}: {color};" in report[1]
        assert f"--c{color[1:]}: {dark};" in report[1]


def test_report_says_who_wins_and_where_moe_loses(report: tuple[Path, str, Page]) -> None:
    text = report[1]
    assert "At equal active FLOPs" in text
    assert re.search(r"On C, MoE wins with all 2: from 16×4 k=1 \(0\.\d+ against 0\.\d+ of dense m=10\)", text)
    assert "On S, MoE loses with all 2" in text
    assert "not resolved" in text


def test_report_lists_failures_rates_time_machine_and_command(report: tuple[Path, str, Page], rows: list[Row]) -> None:
    text = report[1]
    failed = [r for r in rows if r["status"] == "failed"]
    assert len(failed) == 2
    assert text.count("loss is NaN at step 17 &lt;&amp;&gt;") == 2
    assert f"2 of {len(rows)}; they enter no mean above" in text
    assert "Learning rates" in text
    assert "0.003, 0.01, 0.03" in text
    assert "first or last of the grid" in text
    assert "Slowest runs" in text
    assert "moesaic sweep tradeoff --out &#x27;my runs&#x27;" in text
    assert "versions.torch" in text


def test_result_table_is_small_and_ends_with_the_verdicts(rows: list[Row]) -> None:
    lines = result_table(rows).splitlines()
    assert lines[0].split() == ["architecture", "active", "FLOPs", "C", "S", "D"]
    assert lines[1].startswith("dense m=4 ")
    assert len(lines[1].split("±")) == 4
    assert any(line.startswith("equal active FLOPs: MoE has the lower loss in") for line in lines)
    assert lines[-1].startswith("2 failed")
    assert max(map(len, lines)) <= 120
    assert len(lines) <= 36


def test_result_table_of_nothing(rows: list[Row]) -> None:
    assert result_table([]) == "no finished runs, 0 failed"
    assert result_table([{**rows[-1], "status": "failed"}]) == "no finished runs, 1 failed"


def generic(status: str = "ok") -> list[Row]:
    tune, _ = TRADEOFF.stages(True, 1)
    base = {k: v for k, v in measured(tune([])[0]).items() if k not in ("stage", "dataset", "architecture", "slice")}
    return [
        {**base, "run_key": f"{p}-{m}-{s}", "status": status, "features": "independent", "n_clusters": 0,
         "feature_probability": p, "n_hidden": m, "seed": s, "unexplained_variance": p / m}
        for p in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7) for m in (4, 8) for s in (0, 1)
    ]  # fmt: skip


def test_report_of_any_other_sweep(tmp_path: Path) -> None:
    text, _ = written(tmp_path, generic(), preset="density", spec={"run": {"n_features": 64}})
    names = ("pareto", "dimensionality", "features_per_dimension", "sparsity", "sweep")
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        f"{name}.{kind}" for name in names for kind in ("png", "svg")
    }
    # A panel per data set: of seven some are left out and said to be; the others have all on one axis.
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text, flags=re.DOTALL)
    assert ["6 of 7 data sets" in caption for caption in captions].count(True) == 3
    assert "independent, p = 0.7" in text
    assert "In plain words" not in text
    assert "[run]\nn_features = 64" in text
    table = result_table(generic())
    assert "3 more data sets" in table


def test_features_per_dimension_are_drawn_against_sparsity() -> None:
    rows: list[Row] = [
        {
            **row, "run_key": f"{row['run_key']}-{lr}", "lr": lr, "unexplained_variance": lr,
            "features_per_dimension_folded": 1 / float(str(row["feature_probability"])),
        }
        for row in generic() for lr in (0.1, 0.2, 0.3, 0.4)
    ]  # fmt: skip
    figure = against_sparsity(cells(rows))
    assert figure is not None
    lines = [line for line in figure.axes[0].lines if np.size(line.get_xdata()) > 2]
    assert [line.get_label() for line in lines] == [f"dense m={m}, lr={lr}" for lr in (0.1, 0.2, 0.3) for m in (4, 8)]
    for line in lines:
        assert line.get_xdata() == pytest.approx(1 / np.array([0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]))
        assert line.get_ydata() == pytest.approx(line.get_xdata())
    two = [row for row in rows if row["feature_probability"] in (0.1, 0.2)]
    assert against_sparsity(cells(two)) is None


def test_every_kind_of_data_has_a_column_against_sparsity() -> None:
    clustered = [{**row, "features": "clustered", "n_clusters": 16} for row in generic()]
    alone = [{**row, "n_features": 64, "run_key": "alone"} for row in generic()[:2]]
    figure = against_sparsity(cells([*generic(), *clustered, *alone]))
    assert figure is not None
    # One data set of 64 features is no line; 16 clusters show a sixteenth of the features.
    assert [axes.get_title() for axes in figure.axes[:2]] == [
        "independent, n = 128", "clustered, 16 clusters, n = 128"
    ]  # fmt: skip
    ends = []
    for axes in figure.axes:
        (line, *_) = (line for line in axes.lines if np.size(line.get_xdata()) > 2)
        ends.append([float(x) for x in np.asarray(line.get_xdata())[[0, -1]]])
    assert ends == [pytest.approx([1 / 0.7, 10]), pytest.approx([16 / 0.7, 160])] * 2


@pytest.mark.parametrize(
    "features",
    [
        FeatureConfig("independent", 0.2),
        FeatureConfig("power_law", 0.1, power_law_exponent=0.5),
        FeatureConfig("correlated", 0.1, group_size=4),
        FeatureConfig("anticorrelated", 0.1, group_size=4),
        FeatureConfig("clustered", 0.5, n_clusters=8),
        FeatureConfig("exactly_k", n_active=3),
    ],
    ids=lambda features: features.features,
)
def test_density_is_the_share_of_the_features_that_samples_show(features: FeatureConfig) -> None:
    run = Run(ToyConfig(64, 2), features)
    shown = float((held_out(run) > 0).double().mean())
    # 8,192 samples; of the kinds, groups that are present together scatter most: sd of the mean about 0.001.
    assert density(run.flat()) == pytest.approx(shown, abs=0.004)
    assert density({"features": features.features}) == 0.0


def small() -> list[Row]:
    """Two MoE cells whose made names are long: every varying column is part of them."""
    tune, _ = TRADEOFF.stages(True, 1)
    item = next(i for i in tune([]) if i.run.toy.n_experts > 1)
    base = {k: v for k, v in measured(item).items() if k not in ("stage", "dataset", "architecture", "slice")}
    alike: Row = {"features": "independent", "n_clusters": 0, "status": "ok"}
    varied: list[Row] = [
        {"lr": 0.001, "steps": 100, "batch_size": 64, "schedule": "cosine", "weight_decay": 0.1, "n_hidden": 2},
        {"lr": 0.01, "steps": 200, "batch_size": 128, "schedule": "constant", "weight_decay": 0.01, "n_hidden": 4},
    ]
    return [{**base, **alike, **v, "run_key": f"{i}-{s}", "seed": s} for i, v in enumerate(varied) for s in (0, 1)]


def test_figures_of_a_small_sweep_have_room_for_their_labels(tmp_path: Path) -> None:
    text, _ = written(tmp_path, small(), preset="small")  # a layout without a solution warns, and warnings are errors
    drawn = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert {"usage", "dimensionality", "features_per_dimension"} <= drawn
    assert text.count("<svg") == len(drawn)


RECORD = {
    "name": "closed-form", "quick": True, "seeds": 2, "passed": False, "notes": ["1 of 28 trainings failed <&>"],
    "checks": [
        {"quantity": "agreement", "ours": 0.91234, "published": 0.95, "allowed": "±0.05", "passed": True,
         "difference": -0.03766},
        {"quantity": "loss", "ours": 0.00012, "published": None, "allowed": "> 1", "passed": False, "difference": None},
        {"quantity": "shown", "ours": None, "published": None, "allowed": "", "passed": None, "difference": None},
    ],
    "figures": ["figures/closed-form.png", "figures/closed-form.svg", "figures/gone.svg"],
}  # fmt: skip


def test_report_of_a_reproduction_has_its_title_table_and_figures(tmp_path: Path) -> None:
    (tmp_path / "reproduction.json").write_text(json.dumps(RECORD))
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "closed-form.svg").write_text('<svg width="72pt" viewBox="0 0 9 9"><path d="M0 0"/></svg>')
    text, page = written(tmp_path, generic(), preset="reproduce closed-form")
    assert "<h1>moesaic reproduce closed-form</h1>" in text
    assert "<title>moesaic reproduce closed-form</title>" in text
    entries = [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in text.split("<tr>") if "<td" in line][:3]
    assert entries == [
        ["agreement", "0.9123", "0.9500", "-0.0377", "±0.05", "ok"],
        ["loss", "1.20e-04", "not available", "-", "&gt; 1", "OUTSIDE"],
        ["shown", "nan", "not available", "-", "-", ""],
    ]
    assert "Not reproduced." in text
    assert "1 of 28 trainings failed &lt;&amp;&gt;" in text
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"closed-form.svg"}
    assert [tag for tag, _ in page.seen].count("svg") == 1


def test_report_of_a_reproduction_that_did_not_end_or_is_damaged(tmp_path: Path) -> None:
    text, _ = written(tmp_path, generic(), preset="reproduce closed-form")
    assert "did not end" in text
    assert not (tmp_path / "figures").exists()
    (tmp_path / "reproduction.json").write_text("{")
    with pytest.raises(InputError, match=r"reproduction\.json"):
        write_report(tmp_path)


def test_report_of_a_sweep_in_which_everything_failed(tmp_path: Path) -> None:
    text, _ = written(tmp_path, generic("failed"))
    assert "28 of 28" in text
    assert not (tmp_path / "figures").exists()


def test_report_of_one_seed_gives_no_intervals(tmp_path: Path, rows: list[Row]) -> None:
    text, _ = written(tmp_path, [r for r in rows if r["seed"] == 0 and r["dataset"] == "C"])
    assert "±" not in re.sub(r"<p>Mean ±[^<]*", "", text)
    assert "MoE wins" not in text


def test_no_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"runs\.jsonl"):
        write_report(tmp_path)


def test_reports_of_equal_rows_are_equal(tmp_path: Path) -> None:
    texts = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        texts.append(written(tmp_path / name, [r for r in generic()[:12] if r["n_hidden"] == 4])[0])
    assert texts[0] == texts[1]
    for kind in ("png", "svg"):
        one, other = ((tmp_path / name / "figures" / f"sweep.{kind}").read_bytes() for name in ("a", "b"))
        assert one == other
