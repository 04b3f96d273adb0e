from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from moesaic.bench import cli
from moesaic.bench.against import PAGE, compare_folders, write_against
from moesaic.bench.plan import InputError, Row
from moesaic.bench.store import RunStore
from moesaic.moe.config import Run, ToyConfig, TrainConfig

HERE = {
    "device": "cpu",
    "cpu": "a <fast> one",
    "versions": {"torch": "2.13", "numpy": "2"},
    "git_commit": "aaa",
    "argv": ["1"],
}


def rows(width: int, losses: dict[int, float], *, wall: float = 1.0, lr: float = 0.1, status: str = "ok") -> list[Row]:
    found: list[Row] = []
    for seed, loss in losses.items():
        run = Run(ToyConfig(8, width), training=TrainConfig(lr=lr), seed=seed)
        measured: Row = {"unexplained_variance": loss, "mean_dimensionality": 1 - loss, "wall_s": wall}
        found.append({**run.flat(), "run_key": run.key, "status": status, "error": None, **measured})
    return found


def folder(path: Path, found: list[Row], **environment: Any) -> Path:
    path.mkdir()
    store = RunStore(path)
    store.append(found)
    store.write_environment({**HERE, **environment})
    return path


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path]:
    same = rows(3, {0: 0.5, 1: 0.25})
    a = [
        *same, *rows(2, {0: 0.10, 1: 0.21, 2: 0.29, 9: 0.9}), *rows(4, {0: 0.5, 1: 0.7}), *rows(5, {0: 0.3}),
        *rows(6, {0: 0.1}), *rows(2, {7: 0.5}, status="failed"), *rows(8, {0: 0.4}, lr=0.5),
    ]  # fmt: skip
    b = [
        *same, *rows(2, {0: 0.20, 1: 0.30, 2: 0.40}, wall=2.0), *rows(2, {8: 0.0}, wall=50.0),
        *rows(4, {0: 0.7, 1: 0.5}), *rows(5, {1: 0.3}),
        *rows(8, {0: 0.4}, lr=0.25),
    ]  # fmt: skip
    versions = {"torch": "2.14", "numpy": "2"}
    return folder(tmp_path / "a", a), folder(tmp_path / "b", b, git_commit="bbb", versions=versions, argv=["2"])


def test_equal_configurations_are_paired_by_seed(both: tuple[Path, Path]) -> None:
    found = compare_folders(*both)
    by_name = {cell.architecture.split(",")[0]: cell for cell in found.cells}
    assert list(by_name) == ["dense m=3", "dense m=2", "dense m=4"]
    cell = by_name["dense m=2"]
    # Seeds 9 and 8 are in one folder only, and would turn the sign.
    assert (cell.seeds, cell.verdict, cell.wall_ratio) == (3, "A", 0.5)
    assert math.isclose(cell.loss.mean, -0.1)
    # s = 0.01, t(df = 2) = 4.302653
    assert math.isclose(cell.loss.half_width, 4.302652729911275 * 0.01 / math.sqrt(3), rel_tol=1e-9)
    assert math.isclose(cell.dimensionality.mean, 0.1)
    assert [by_name[n].verdict for n in ("dense m=3", "dense m=4")] == ["equal", "not resolved"]
    assert [name.split(",")[0] for name in found.no_common_seed] == ["dense m=5"]
    reverse = compare_folders(both[1], both[0])
    assert {c.architecture: c.verdict for c in reverse.cells}[cell.architecture] == "B"


def test_what_only_one_has_and_what_differs_of_the_machines_is_said(both: tuple[Path, Path]) -> None:
    found = compare_folders(*both)
    assert [name.split(" on ")[0] for name in found.only[0].cells] == ["dense m=6, lr=0.1", "dense m=8, lr=0.5"]
    # Seed 9 and the failed seed 7 of m = 2, seed 0 of m = 5, and the two configurations.
    assert (found.only[0].runs, found.only[0].failed) == (5, 1)
    assert [name.split(" on ")[0] for name in found.only[1].cells] == ["dense m=8, lr=0.25"]
    assert found.environment == {"versions.torch": ("2.13", "2.14"), "git_commit": ("aaa", "bbb")}
    text = found.text()
    for words in (
        "3 configurations in both: 1 equal to the last bit, 1 with the lower loss in A, 0 in B, 1 not resolved",
        "wall time A / B 0.794", "1 configuration in both without a common seed", "only A has 5 runs, 2 configurations",
        "versions.torch: '2.13' in A, '2.14' in B",
    ):  # fmt: skip
        assert words in text


def test_the_page_goes_beside_the_report_and_the_other_folder_stays(
    both: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in both[1].iterdir())
    text = write_against(compare_folders(*both)).read_text(encoding="utf-8")
    for words in (
        "-0.1000 ± 0.0248",
        "not resolved",
        "Only in A",
        "dense m=6",
        "versions.torch",
        "without a common seed",
    ):
        assert words in text
    assert "<script" not in text
    assert sorted(path.name for path in both[1].iterdir()) == before
    assert cli.main(["report", str(both[0]), "--against", str(both[1]), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["report"] == str(both[0] / PAGE)
    assert [cell["verdict"] for cell in record["cells"]] == ["equal", "A", "not resolved"]
    assert not (both[0] / "report.html").exists()


def test_rows_from_before_a_field_existed_match_its_default(tmp_path: Path) -> None:
    old = [{k: v for k, v in row.items() if k not in ("decode", "moments")} for row in rows(2, {0: 0.5})]
    found = compare_folders(folder(tmp_path / "a", old), folder(tmp_path / "b", rows(2, {0: 0.5})))
    assert [cell.verdict for cell in found.cells] == ["equal"]
    assert (found.only[0].runs, found.environment) == (0, {})


def test_tuning_runs_are_no_results(tmp_path: Path) -> None:
    # A tuning run of the chosen rate is of the cell's configuration, and those of the other rates are of no cell.
    tuned = [{**row, "stage": "tune"} for lr in (0.1, 0.3) for row in rows(2, {9: 0.9}, lr=lr)]
    a = [{**row, "stage": "main"} for row in rows(2, {0: 0.5, 1: 0.6})]
    found = compare_folders(folder(tmp_path / "a", [*tuned, *a]), folder(tmp_path / "b", [*a, *tuned[:1]]))
    assert [(cell.seeds, cell.verdict) for cell in found.cells] == [(2, "equal")]
    assert (found.no_common_seed, found.only[0].runs) == ([], 0)


def test_folders_without_rows_and_one_folder_twice_are_refused(both: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent: no runs\.jsonl"):
        compare_folders(both[0], tmp_path / "absent")
    with pytest.raises(InputError, match="takes another folder"):
        compare_folders(both[0], tmp_path / "b" / ".." / "a")
