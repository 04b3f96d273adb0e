from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from moesaic.bench import cli
from moesaic.bench.plan import InputError, Row
from moesaic.bench.query import query, table_of
from moesaic.bench.store import ENERGY_FILE, RunStore

ROWS: list[Row] = [
    {"run_key": f"k{i}", "status": "ok", "n_experts": e, "loss": i / 3, "usage": [0.5] * e, "match_wall": wall}
    for i, (e, wall) in enumerate(((1, None), (4, 7), (4, 7)))
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    store = RunStore(tmp_path / "runs")
    store.folder.mkdir()
    store.append(ROWS)
    return store.folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


SQL = "SELECT n_experts, count(*) AS n, sum(loss) AS loss, max(match_wall) AS wall FROM runs GROUP BY 1 ORDER BY 1"


@pytest.mark.parametrize("parquet", [True, False])
def test_rows_are_asked_from_parquet_and_from_lines_alike(parquet: bool, folder: Path) -> None:
    if parquet:
        RunStore(folder).finish()
    before = files(folder)
    found = query(folder, SQL)
    assert found.records() == [
        {"n_experts": 1, "n": 1, "loss": 0.0, "wall": None}, {"n_experts": 4, "n": 2, "loss": 1 / 3 + 2 / 3, "wall": 7},
    ]  # fmt: skip
    assert found.types[0] == "BIGINT"
    assert query(folder, "SELECT usage, lr FROM runs").rows[1] == [[0.5] * 4, None]
    assert files(folder) == before


def test_an_old_or_incomplete_parquet_is_not_asked(folder: Path) -> None:
    store = RunStore(folder)
    store.finish()
    store.append([{**ROWS[0], "run_key": "new"}])
    # A copy may have lost its times, so rows are counted too.
    for offset in (-1, 1):
        now = store.path.stat().st_mtime + offset
        os.utime(store.parquet, (now, now))
        assert query(folder, "SELECT count(*) FROM runs").rows == [[4]]
    with store.path.open("a") as file:
        file.write('{"torn')
    assert query(folder, "SELECT count(*) FROM runs").rows == [[4]]


def test_measured_joules_are_in_the_rows_and_cells_are_a_table(folder: Path) -> None:
    store = RunStore(folder)
    store.finish()
    cell = {
        "dataset": "S",
        "run_keys": ["k1", "k2"],
        "joules_per_run": [1.0, 3.0],
        "valid": True,
        "seconds_per_run": [2.0],
    }
    record = {"meter": "cpu_package", "device": "cpu", "cells": [cell]}
    (folder / ENERGY_FILE).write_text(json.dumps(record))
    later = store.parquet.stat().st_mtime + 1
    os.utime(folder / ENERGY_FILE, (later, later))
    assert query(folder, "SELECT cpu_package_j FROM runs ORDER BY run_key").rows == [[None], [2.0], [2.0]]
    assert query(folder, "SELECT meter, valid, joules_per_run FROM energy").rows == [["cpu_package", True, [1.0, 3.0]]]


REFUSED = {
    "SELEC 1": "Parser Error",
    "SELECT * FROM walks": "walks does not exist",
    "COPY runs TO '{path}'": "disabled by configuration",
    "SELECT * FROM read_text('{spec}')": "disabled by configuration",
    "ATTACH '{path}'": "disabled by configuration",
    "SET enable_external_access = true": "locked",
    "SELECT * FROM store": "does not exist",
    "EXPORT DATABASE '{path}'": "disabled by configuration",
}


@pytest.mark.parametrize("sql", REFUSED)
def test_errors_are_duckdbs_words_and_nothing_is_read_or_written_outside(
    sql: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("secret")
    before = files(tmp_path)
    with pytest.raises(InputError) as error:
        query(folder, sql.format(path=tmp_path / "out", spec=tmp_path / "secret"))
    assert REFUSED[sql] in str(error.value)
    assert files(tmp_path) == before


def test_the_command_prints_a_table_json_or_csv(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*argv: object) -> tuple[int, str, str]:
        code = cli.main(["query", str(folder), *map(str, argv)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    code, out, _ = call("SELECT n_experts AS e, loss, status, usage FROM runs ORDER BY run_key LIMIT 2")
    assert (code, out.splitlines()) == (0, [
        "e      loss  status  usage",
        "1         0  ok      [0.5]",
        "4  0.333333  ok      [0.5, 0.5, 0.5, 0.5]",
        "(2 rows)",
    ])  # fmt: skip
    code, out, _ = call("SELECT 1 a, 2 a, 0.5 b, DATE '2020-01-02' d, NULL x", "--json")
    record: Any = json.loads(out)
    assert (code, record["rows"]) == (0, [{"a": 1, "a_1": 2, "b": 0.5, "d": "2020-01-02", "x": None}])
    code, out, _ = call("SELECT loss, usage, 'a,b' AS t, NULL AS x FROM runs ORDER BY run_key LIMIT 2", "--csv")
    assert (code, out) == (0, f'loss,usage,t,x\n0.0,[0.5],"a,b",\n{1 / 3!r},"[0.5, 0.5, 0.5, 0.5]","a,b",\n')
    assert call("SELECT 1", "--csv", "--json")[0] == 2
    code, out, err = call("SELEC")
    assert (code, out, "Parser Error" in err, "Traceback" in err) == (2, "", True, False)
    assert cli.main(["query", str(folder.parent), "SELECT 1"]) == 2


def test_rows_become_a_relation_with_the_types_of_the_parquet() -> None:
    table = table_of(ROWS)
    assert table.filter("n_experts > 1").aggregate("sum(loss)").fetchall() == [(1.0,)]
    assert list(table.project("loss").fetchnumpy()["loss"]) == [0.0, 1 / 3, 2 / 3]
    assert dict(zip(table.columns, map(str, table.types), strict=True))["steps"] == "BIGINT"
