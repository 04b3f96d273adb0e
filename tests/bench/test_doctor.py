from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from moesaic import kernels
from moesaic.bench import environment
from moesaic.bench.doctor import FEATURE_OPS, GROUPED_OPS, ROUTING_OPS, diagnose, energy_meters, op_backends


def test_the_diagnosis_describes_this_machine() -> None:
    found = diagnose()
    assert found.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert found.versions["torch"] == torch.__version__
    assert found.versions["python"] == sys.version.split()[0]
    assert found.machine["torch_threads"] == torch.get_num_threads()
    assert found.machine["cores"] == environment.usable_cores() >= 1
    assert found.free_disk_bytes > 0
    assert json.loads(json.dumps(asdict(found)))["ops"][0]["op"] == "route_topk"
    text = str(found)
    for op in found.ops:
        assert f"{op.op:17}{op.runs}" in text
    for meter in found.energy:
        assert f"{meter.column:17}{meter.meter or 'none'}" in text
    assert f"torch {torch.__version__}" in text
    assert str(found.machine["cpu"]) in text


def test_every_op_it_names_exists() -> None:
    named = [*ROUTING_OPS, *GROUPED_OPS, *FEATURE_OPS, "train_ensemble"]
    assert [op for op in named if not callable(getattr(kernels, op, None))] == []
    assert [op.op for op in op_backends("cpu")] == named


def test_the_implementation_follows_device_and_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOESAIC_BACKEND", raising=False)
    assert [op.runs for op in op_backends("cpu")] == ["numba"] * 8
    assert [op.runs for op in op_backends("cuda")] == ["triton"] * 8
    monkeypatch.setitem(sys.modules, "numba", None)
    assert [op.runs for op in op_backends("cpu")[:4]] == ["torch"] * 4
    for missing in op_backends("cpu")[4:]:
        assert (missing.runs, "Numba is missing" in missing.why) == ("none", True)


@pytest.mark.parametrize(
    ("value", "device", "runs", "why"),
    [
        ("triton", "cpu", "none", "takes a GPU, or TRITON_INTERPRET=1"),
        ("triton", "cuda", "triton", "MOESAIC_BACKEND=triton"),
        ("cpu", "cuda", "numba", "MOESAIC_BACKEND=cpu"),
        ("gpu", "cpu", "none", "takes triton or cpu"),
    ],
)
def test_the_backend_that_was_asked_for(
    value: str, device: str, runs: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("MOESAIC_BACKEND", value)
    for op in op_backends(device):
        if op.op in GROUPED_OPS or (device == "cpu" and op.op in ROUTING_OPS):
            assert op.runs == runs
            assert why in op.why
        elif op.op in FEATURE_OPS:
            assert op.runs == ("none" if value == "cpu" else runs)
            assert "MOESAIC_BACKEND" in op.why
        else:
            assert f"MOESAIC_BACKEND={value} is for grouped_matmul and expert_mlp" in op.why
    assert f"MOESAIC_BACKEND  {value}" in str(diagnose())


def test_the_ops_heed_the_backend_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, offsets = torch.zeros(2, 3), torch.zeros(1, 3, 4), torch.tensor([0, 2])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for value, message in (("triton", "takes tensors on a GPU, or TRITON_INTERPRET=1"), ("gpu", "triton or cpu")):
        monkeypatch.setenv("MOESAIC_BACKEND", value)
        with pytest.raises(ValueError, match=message):
            kernels.grouped_matmul(x, weight, offsets)


def test_a_missing_extra_is_named_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert diagnose().missing == {}
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = diagnose()
    assert found.missing == {"bench": ["matplotlib"]}
    assert 'missing: matplotlib; pip install "moesaic[bench]" brings them' in str(found)
    with pytest.raises(
        environment.MissingExtraError, match=r'matplotlib not installed: pip install "moesaic\[bench\]"'
    ):
        environment.require("duckdb", "matplotlib")
    environment.require("duckdb")


def test_a_meter_that_cannot_be_read_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from moesaic.metrics import meters

    def refuse(self: object) -> None:
        raise RuntimeError("no counter here")

    monkeypatch.setattr(meters.NvmlMeter, "__init__", refuse)
    monkeypatch.setattr(meters.ZeusMeter, "__init__", lambda self: None)
    monkeypatch.setattr(meters.RaplMeter, "__init__", lambda self: None)
    nvidia, other, cpu = energy_meters()
    assert (nvidia.column, nvidia.meter, nvidia.why) == ("gpu_board_j", None, "no counter here")
    assert (other.column, other.meter) == ("gpu_board_j", "ZeusMeter")
    assert (cpu.column, cpu.meter) == ("cpu_package_j", "RaplMeter")


def test_auto_takes_cuda_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr("torch.cuda.is_available", lambda available=available: available)
        assert environment.resolve_device("auto") == device
        assert environment.resolve_device("cpu") == "cpu"


def test_the_commit_is_that_of_the_checkout_and_of_no_other_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    code = tmp_path / "environment.py"
    code.write_text("")
    monkeypatch.setattr(environment, "__file__", str(code))
    assert environment.git_commit() is None
    git("init", "-q")
    (tmp_path / "other").write_text("")
    git("add", "other")
    git("commit", "-qm", "other")
    assert environment.git_commit() is None
    git("add", "environment.py")
    git("commit", "-qm", "ours")
    assert environment.git_commit() == git("rev-parse", "HEAD")
    code.write_text("changed")
    assert environment.git_commit() == git("rev-parse", "HEAD") + "+"
