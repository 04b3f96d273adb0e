"""The examples, end to end on models that train in a second; skipped without transformers."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.kernels.expert_mlp import expert_mlp
from moesaic.moe import hf

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TINY = [
    "--d-model=32", "--layers=2", "--experts=6", "--top-k=2", "--d-ff=12", "--batch=2", "--length=64", "--steps=8",
    "--device=cpu", "--threads=1",
]  # fmt: skip

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers"),
    pytest.mark.filterwarnings("default"),  # transformers' own
]


@pytest.fixture(scope="module")
def examples() -> Iterator[Any]:
    """Imports an example by name as running it as a script would, and restores path and threads."""
    path, threads = [*sys.path], torch.get_num_threads()
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module
    sys.path[:] = path
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, examples: Any) -> Path:
    """What a tiny `train_lm.py` left behind."""
    out = tmp_path_factory.mktemp("train_lm")
    assert examples("train_lm").main([*TINY, "--control", f"--out={out}"]) == 0
    return out


def test_train_lm_leaves_curves_that_agree_figures_and_models(folder: Path) -> None:
    found = json.loads((folder / "curve.json").read_text())
    assert {*found["losses"]} == {"eager", "moesaic", "eager + 1 ulp", "dense"}
    assert all(len(losses) == 8 and losses[-1] < losses[0] - 0.2 for losses in found["losses"].values())
    assert not found["difference"]["beyond"]
    assert found["difference"]["early_relative"] <= 1e-5
    assert len(found["difference"]["same_weights"]) == 8
    held_out = found["held_out_nats"]
    assert math.isclose(held_out["eager"], held_out["moesaic"], rel_tol=1e-4)
    assert held_out["moesaic"] < held_out["before"]
    usage = torch.tensor(found["usage"]["after"])
    assert usage.shape == (2, 6)
    torch.testing.assert_close(usage.sum(-1), torch.ones(2))
    assert {*found["timing"]["ms_per_step"]} == {*found["losses"]}
    for name in ("curve.png", "usage.png", "initial/model.safetensors", "model/model.safetensors", "dense/config.json"):
        assert (folder / name).stat().st_size > 0, name


def test_the_text_has_no_paragraph_twice(examples: Any) -> None:
    paragraphs = examples("train_lm_setup").read_text().decode().split("\n\n")
    kept = [p for p in paragraphs if p]
    assert len(kept) == len({*kept})
    assert len("".join(kept)) > 300_000


@pytest.mark.parametrize("mutant", ["dropped expert", "no gate weights"])
def test_the_comparison_of_curves_can_fail(
    mutant: str, tmp_path: Path, examples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(x: Any, up: Any, down: Any, weights: Any, ids: Any, **options: Any) -> Any:
        if mutant == "dropped expert":
            return expert_mlp(x, up, down, weights, ids.masked_fill(ids == 1, 6), **options)
        return expert_mlp(x, up, down, weights * 0 + 1, ids, **options)

    monkeypatch.setattr(hf, "expert_mlp", broken)
    assert examples("train_lm").main([*TINY, "--steps=3", "--no-dense", f"--out={tmp_path}"]) == 1
    beyond = json.loads((tmp_path / "curve.json").read_text())["difference"]["beyond"]
    assert {"early_relative", "same_weights_loss", "same_weights_gradient"} <= {*beyond}


def test_a_late_difference_fails_too(examples: Any) -> None:
    module = examples("train_lm")
    sides = [type("Side", (), {"losses": [2.0] * 20})() for _ in range(2)]
    same = [{"loss": 0.0, "gradient": 0.0}]
    assert not module.compare(sides, same)[1]
    sides[1].losses = [2.0] * 19 + [2.2]
    assert module.compare(sides, same)[1] == ["largest"]
    sides[1].losses = [2.0] * 10 + [2.1] * 10
    assert module.compare(sides, same)[1] == ["mean"]
    sides[1].losses = [2.0] * 19 + [math.nan]
    assert "finite" in module.compare(sides, same)[1]


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--experts=0", "--experts: must be at least 1, got 0"),
        ("--top-k=7", "--top-k: must be at most --experts = 6, got 7"),
        ("--d-model=40", "--d-model: must be a multiple of 32, got 40"),
        ("--lr=nan", "--lr: must be positive, got nan"),
        ("--balance=-1", "--balance: must be at least 0, got -1"),
        ("--length=1", "--length: must be at least 2, got 1"),
        ("--length=100000", "--length: must be at most"),
        ("--impl=fast", "--impl: invalid choice"),
        ("--device=tpu", "--device: invalid choice"),
    ],
)
def test_a_wrong_argument_is_named_before_any_work(
    argument: str, words: str, tmp_path: Path, examples: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "none"
    with pytest.raises(SystemExit) as stopped:
        examples("train_lm").main([*TINY, argument, f"--out={out}"])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
    assert not out.exists()


def test_superposition_measures_what_was_trained(
    folder: Path, examples: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert examples("superposition_of_a_real_moe").main([str(folder), "--windows=64", "--least=20"]) == 0
    printed = capsys.readouterr().out
    found = json.loads((folder / "superposition.json").read_text())
    assert (folder / "superposition.png").stat().st_size > 0
    assert {*found["models"]} == {"trained", "initial", "dense"}
    for name, layers in found["models"].items():
        assert len(layers) == 2
        assert name in printed
        for layer in layers:
            for kind in ("byte", "pair"):
                values = torch.tensor(layer[kind]["dimensionality"])
                assert values.shape == (found["features"][kind],)
                assert bool(((values > 0) & (values <= 1)).all())
            assert layer["bits"]["byte"] >= layer["bits"]["class"] >= 0
            assert layer["bits"]["class"] <= found["class_entropy_bits"]
    assert all(layer["bits"]["byte"] == 0 for layer in found["models"]["dense"])
    assert found["models"]["initial"][0]["bits"]["byte"] > 3 * found["models"]["initial"][0]["bits_shuffled"]["byte"]


def test_information_and_geometry_of_known_answers(examples: Any) -> None:
    module = examples("superposition_of_a_real_moe")
    label = torch.arange(4).repeat(100)
    assert module.information(label, label[:, None], 4) == pytest.approx(2.0)
    assert module.information(label, label[:, None] // 2, 4) == pytest.approx(1.0)
    assert module.information(label, torch.zeros(400, 1, dtype=torch.int64), 4) == pytest.approx(0.0)
    # Four orthogonal features, each in a dimension of its own; then antipodal pairs, two to a dimension.
    alone, pairs = torch.eye(4).double(), torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]).double()
    uniform = torch.ones(1, dtype=torch.float64)
    everywhere = torch.ones(1, 4, dtype=torch.float64)
    found = module.geometry(alone, torch.eye(4).double()[None], everywhere, uniform)
    assert found["dimensionality"] == pytest.approx([1.0] * 4)
    assert found["features_per_dimension"] == pytest.approx(1.0)
    found = module.geometry(pairs, torch.eye(2).double()[None], everywhere, uniform)
    assert found["dimensionality"] == pytest.approx([0.5] * 4)
    assert found["features_per_dimension"] == pytest.approx(2.0)
    # Sorted into an expert of one sign each, no feature meets its opposite.
    both, sorted_ = torch.eye(2).double().repeat(2, 1, 1), torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1]]).double()
    found = module.geometry(pairs, both, sorted_, torch.tensor([0.5, 0.5]))
    assert found["dimensionality"] == pytest.approx([0.5] * 4)
    assert found["dimensionality_as_routed"] == pytest.approx([1.0] * 4)


def test_a_missing_model_is_answered_with_the_command_that_makes_it(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "superposition_of_a_real_moe.py"), str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONSAFEPATH": "1"}, check=False
    )
    assert done.returncode == 2
    assert f"python examples/train_lm.py --out {tmp_path}" in done.stderr
