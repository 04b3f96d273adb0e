from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moesaic.bench import cli, kernel_bench, reproduce, sweep
from moesaic.bench.plan import Row
from moesaic.bench.store import RunStore, StoreError

SPEC = "seeds = 2\n[run]\nsteps = 4\nbatch_size = 4\nn_features = 6\n[grid]\nn_hidden = [1, 2]\n"


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(SPEC)
    return path


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replaces training, and the report; holds the sizes of the groups that were trained."""
    sizes: list[int] = []

    def trainer(group: Any, *, device: str, impl: str, progress: Any) -> list[Row]:
        sizes.append(len(group))
        print("a library that prints")
        return [{"run_key": item.run.key, "loss": 0.5, "device": device} for item in group]

    monkeypatch.setattr(sweep, "train_and_measure", trainer)
    monkeypatch.setattr("moesaic.bench.report.write_report", lambda folder: Path(folder) / "report.html")
    monkeypatch.setattr("moesaic.bench.report.result_table", lambda rows: f"table of {len(rows)}")
    return sizes


def call(capfd: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    capfd.readouterr()
    code = cli.main([str(part) for part in argv])
    captured = capfd.readouterr()
    return code, captured.out, captured.err


def test_sweep_ends_with_the_table_and_the_path_of_the_report(
    spec: Path, tmp_path: Path, fake: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capfd, "sweep", spec, "--out", tmp_path / "out", "--device", "cpu")
    assert code == 0
    assert out.splitlines()[-2:] == ["table of 4", str(tmp_path / "out" / "report.html")]
    assert "model-steps" in err
    assert (RunStore(tmp_path / "out").environment() or {})["argv"] == [
        "sweep", str(spec), "--out", str(tmp_path / "out"), "--device", "cpu",
    ]  # fmt: skip
    code, _, _ = call(capfd, "sweep", spec, "--out", tmp_path / "out", "--device", "cpu", "--resume")
    assert (code, fake) == (0, [2, 2])


def test_json_is_exactly_one_object_on_stdout(
    spec: Path, tmp_path: Path, fake: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    out_dir = tmp_path / "out"
    code, out, err = call(capfd, "sweep", spec, "--out", out_dir, "--seeds", 3, "--json")
    assert code == 0
    assert json.loads(out) == {
        "out": str(out_dir), "runs": 6, "failed": 0, "failures": [],
        "parquet": str(out_dir / "runs.parquet"), "report": str(out_dir / "report.html"),
    }  # fmt: skip
    assert "a library that prints" in err
    assert "model-steps" in err
    code, out, _ = call(capfd, "report", out_dir, "--json")
    assert (code, json.loads(out)["runs"]) == (0, 6)
    code, out, _ = call(capfd, "doctor", "--json")
    assert (code, json.loads(out)["device"]) in [(0, "cpu"), (0, "cuda")]


def test_failed_runs_are_counted_and_only_a_sweep_without_results_exits_1(
    spec: Path, tmp_path: Path, fake: list[int], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def some(group: Any, *, bad: tuple[int, ...], **others: Any) -> list[Row]:
        if any(item.run.seed in bad for item in group):
            raise FloatingPointError("loss is NaN at step 3")
        return [{"run_key": item.run.key} for item in group]

    monkeypatch.setattr(sweep, "train_and_measure", lambda group, **others: some(group, bad=(1,), **others))
    code, out, _ = call(capfd, "sweep", spec, "--out", tmp_path / "some")
    assert code == 0
    assert "2 of 4 runs failed; the first: FloatingPointError: loss is NaN at step 3" in out
    monkeypatch.setattr(sweep, "train_and_measure", lambda group, **others: some(group, bad=(0, 1), **others))
    code, out, _ = call(capfd, "sweep", spec, "--out", tmp_path / "all", "--json")
    assert code == 1
    assert [failure["error"][:18] for failure in json.loads(out)["failures"]] == ["FloatingPointError"] * 4


def test_a_full_disk_exits_1_with_one_line(
    spec: Path, tmp_path: Path, fake: list[int], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: RunStore, rows: object) -> list[Row]:
        raise StoreError("runs.jsonl: No space left on device; continue with --resume")

    monkeypatch.setattr(RunStore, "append", full)
    code, stdout, stderr = call(capfd, "sweep", spec, "--out", tmp_path / "out")
    assert (code, "error" in stdout, "Traceback" in stderr) == (1, False, False)
    assert stderr.endswith("error: runs.jsonl: No space left on device; continue with --resume\n")


def test_bad_input_exits_2_before_training_with_and_without_json(
    spec: Path, tmp_path: Path, fake: list[int], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    bad = tmp_path / "bad.toml"
    bad.write_text("[run]\ntop_k = 3\n")
    out = ["--out", tmp_path / "out"]
    cases = {
        ("sweep", "tradeof", *out): "no such preset - did you mean 'tradeoff'?; presets: tradeoff",
        ("sweep", "absent.toml", *out): "absent.toml",
        ("sweep", bad, *out): "top_k=3",
        ("sweep", spec, "--out", spec / "below"): "cannot be written: Not a directory",
        ("sweep", spec, *out, "--device", "cuda"): "finds no CUDA device",
        ("sweep", spec, *out, "--device", "gpu"): "must be one of auto, cpu, cuda",
        ("sweep", spec, *out, "--engine", "dask"): "must be one of local, ray",
        ("sweep", spec, *out, "--workers", "0"): "must be an integer >= 1",
        ("sweep", spec, *out, "--address", "auto"): "belongs to --engine ray",
        ("sweep", spec, *out, "--engine", "ray", "--gpus-per-task", "1.5"): "must be above 0 and at most 1",
        ("sweep", spec, *out, "--impl", "jax"): "must be one of auto, numba, triton, torch",
        ("sweep", spec, *out, "--seeds", "0"): "must be an integer >= 1",
        ("sweep", spec, *out, "--seeds", "x"): "--seeds",
        ("sweep", spec): "--out DIR",
        ("sweep", *out): "name a preset or a spec",
        ("sweep", spec, *out, "--calibrate"): "belongs to --plan",
        ("sweep", "--init", spec): "is there already",
        ("sweep", spec, "--init", tmp_path / "new.toml"): "leave the other arguments out",
        ("sweep", spec, "--plan", "--device", "gpu"): "must be one of auto, cpu, cuda",
        ("query", tmp_path / "absent", "SELECT 1"): "no runs.jsonl with rows",
        ("report", tmp_path / "absent", "--against", tmp_path): "no runs.jsonl with rows",
        ("sweep", spec, *out, "--fast"): "--fast",
        ("reproduce", "closed-from", *out): "did you mean 'closed-form'?; there are: closed-form, ",
        ("report", tmp_path / "absent"): "no runs.jsonl with rows",
        ("bench", "ensembel", *out): "did you mean 'ensemble'?; there are: ensemble",
        ("bench", "ensemble", *out, "--against", "vmap", "jax"): "'jax': no such peer; bench ensemble has vmap",
        ("bench", "ensemble", *out, "--device", "gpu"): "must be one of auto, cpu, cuda",
        ("bench", "ensemble"): "--out",
    }
    for argv, words in cases.items():
        code, stdout, stderr = call(capfd, *argv)
        assert (code, stdout, words in stderr) == (2, "", True), (argv, stderr)
        code, stdout, _ = call(capfd, *argv, "--json")
        assert (code, words in json.loads(stdout)["error"]) == (2, True), (argv, stdout)
    assert call(capfd, "swep")[0] == 2
    assert fake == []
    assert not (tmp_path / "out").exists()


def test_every_command_takes_quick_and_json_and_says_what_quick_does(
    spec: Path, tmp_path: Path, fake: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    for name in cli.COMMANDS:
        code, out, _ = call(capfd, name, "--help")
        assert (code, "--quick" in out, "--json" in out) == (0, True, True), name
        words = "nothing is left out" if name in ("doctor", "report", "query") else "fewer points"
        assert words in " ".join(out.translate(str.maketrans("│", " ")).split()), name
    assert call(capfd, "doctor", "--quick", "--json")[0] == 0
    assert call(capfd, "sweep", spec, "--out", tmp_path / "out", "--device", "cpu")[0] == 0
    code, out, _ = call(capfd, "report", tmp_path / "out", "--quick", "--json")
    assert (code, json.loads(out)["runs"]) == (0, 4)


def test_init_writes_a_spec_and_says_the_next_command_and_plan_trains_nothing(
    spec: Path, tmp_path: Path, fake: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.toml"
    code, out, _ = call(capfd, "sweep", "--init", path)
    assert (code, out) == (0, f"{path} is written; next: moesaic sweep {path} --out runs/mine\n")
    code, out, _ = call(capfd, "sweep", path, "--plan", "--device", "cpu", "--json")
    record = json.loads(out)
    assert (code, record["runs"], record["preset"]) == (0, 84, "mine")
    code, out, _ = call(capfd, "sweep", spec, "--plan", "--seeds", 3, "--device", "cpu")
    assert code == 0
    assert "6 runs in 2 stacks" in out
    assert fake == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.toml", "tiny.toml"]


def test_a_damaged_environment_file_exits_2_on_resume(
    spec: Path, tmp_path: Path, fake: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    argv = ["sweep", spec, "--out", tmp_path / "out", "--device", "cpu"]
    assert call(capfd, *argv)[0] == 0
    path = tmp_path / "out" / "environment.json"
    path.write_text('["a", "b"]')
    code, out, err = call(capfd, *argv, "--resume")
    assert (code, out, "Traceback" in err) == (2, "", False)
    assert f"{path} holds a JSON list" in err


def test_a_run_larger_than_the_memory_exits_2(
    tmp_path: Path, fake: list[int], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moesaic.bench.environment.memory_bytes", lambda: 2**34)
    large = tmp_path / "large.toml"
    large.write_text("[run]\nsteps = 400_000_000\n[grid]\nn_hidden = [1, 2]\n")
    code, out, err = call(capfd, "sweep", large, "--out", tmp_path / "out", "--device", "cpu")
    assert (code, out, fake) == (2, "", [])
    for words in ("n_hidden = 1", "steps = 400000000", "available are 17179869184 (16.0 GiB)", "lower steps"):
        assert words in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["numba", "matplotlib", "duckdb"])
def test_a_missing_package_is_said_before_training(
    package: str, spec: Path, tmp_path: Path, fake: list[int], capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = call(capfd, "sweep", spec, "--out", tmp_path / "out", "--device", "cpu")
    assert (code, fake) == (2, [])
    assert f'{package} not installed: pip install "moesaic[bench]"' in err


def test_torch_trains_where_numba_is_missing(
    spec: Path, tmp_path: Path, fake: list[int], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    argv = ["sweep", spec, "--out", tmp_path / "out", "--device", "cpu", "--impl", "torch"]
    assert (call(capfd, *argv)[0], fake) == (0, [2, 2])


def test_ctrl_c_exits_130_and_says_how_to_resume(
    spec: Path, tmp_path: Path, fake: list[int], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(group: Any, **others: Any) -> list[Row]:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "train_and_measure", interrupt)
    argv = ["sweep", spec, "--out", tmp_path / "out"]
    code, out, err = call(capfd, *argv)
    assert (code, out) == (130, "")
    assert f"continue with: moesaic sweep {spec} --out {tmp_path / 'out'} --resume" in err
    code, out, _ = call(capfd, *argv, "--json")
    assert code == 130
    assert json.loads(out)["resume"].endswith("--json --resume")


def test_an_error_of_ours_exits_1_with_its_traceback_on_stderr(
    spec: Path, tmp_path: Path, fake: list[int], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(folder: Path) -> Path:
        raise KeyError("column")

    monkeypatch.setattr("moesaic.bench.report.write_report", broken)
    code, out, err = call(capfd, "sweep", spec, "--out", tmp_path / "out", "--json")
    assert (code, json.loads(out)) == (1, {"error": "KeyError: 'column'"})
    assert "Traceback" in err
    assert len(RunStore(tmp_path / "out").rows()) == 4


@pytest.mark.parametrize("passed", [True, False])
def test_reproduce_exits_0_only_within_the_allowance(
    passed: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def fake(name: str, out: Path, **options: Any) -> reproduce.ReproductionResult:
        seen.update(options, name=name, out=out)
        return reproduce.ReproductionResult(name, [], passed, [out / "a.png"], "ours | published", [])

    monkeypatch.setattr(reproduce, "reproduce", fake)
    argv = ["reproduce", "closed-form", "--out", tmp_path, "--quick", "--seeds", "2", "--device", "cpu"]
    code, out, _ = call(capfd, *argv)
    assert (code, out) == (int(not passed), "ours | published\n")
    assert (seen["name"], seen["out"], seen["quick"], seen["seeds"], seen["device"]) == (
        "closed-form",
        tmp_path,
        True,
        2,
        "cpu",
    )
    code, out, _ = call(capfd, *argv, "--json")
    assert (code, json.loads(out)["passed"]) == (int(not passed), passed)


@pytest.mark.parametrize("failures", [[], ["vmap differs"]])
def test_bench_passes_its_options_on_and_exits_1_where_it_failed(
    failures: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[kernel_bench.Options] = []

    def run(options: kernel_bench.Options) -> kernel_bench.Findings:
        asked.append(options)
        return kernel_bench.Findings([], [kernel_bench.Table("fast")], lambda folder: [], failures=failures)

    monkeypatch.setitem(kernel_bench.BENCHES, "ensemble", replace(kernel_bench.BENCHES["ensemble"], run=run))
    argv = ["bench", "ensemble", "--out", tmp_path, "--device", "cpu", "--quick", "--against", "torch-stacked", "vmap"]
    code, out, _ = call(capfd, *argv)
    assert (code, out.splitlines()[0]) == (int(bool(failures)), "fast")
    assert (asked[0].against, asked[0].device, asked[0].quick) == (("torch-stacked", "vmap"), "cpu", True)
    code, out, _ = call(capfd, *argv, "--json")
    record = json.loads(out)
    assert (code, record["failures"]) == (int(bool(failures)), failures)
    assert record == json.loads((tmp_path / "bench-ensemble.json").read_text())


def test_help_needs_none_of_the_heavy_packages() -> None:
    program = (
        "import sys\nfrom moesaic.bench.cli import main\ncode = main(['sweep', '--help'])\n"
        "print(code, [m for m in ('torch', 'numpy', 'matplotlib', 'duckdb', 'numba', 'tqdm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "0 []"
    assert "--resume" in done.stdout


@pytest.mark.parametrize("as_json", [True, False])
def test_without_tyro_the_program_says_what_to_install(as_json: bool) -> None:
    program = (
        "import sys\nsys.modules['tyro'] = None\nsys.argv[1:] = sys.argv[1:]\nfrom moesaic.__main__ import main\nmain()"
    )
    argv = [sys.executable, "-c", program, "doctor", *(["--json"] if as_json else [])]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    text = json.loads(done.stdout)["error"] if as_json else done.stderr
    assert text.strip() == 'the command line needs tyro: pip install "moesaic[bench]"'
