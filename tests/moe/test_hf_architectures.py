"""Every architecture of the installed transformers that uses its experts interface; skipped without transformers."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.bench import architectures, tiny_models
from moesaic.bench.interleave import equal_threads
from moesaic.bench.tiny_models import Architecture, find_architectures, find_others

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers"),
    pytest.mark.filterwarnings("default"),
]
ROOT = Path(__file__).resolve().parents[2]
PAGE, PINS = ROOT / "docs" / "transformers.md", ROOT / "constraints.txt"
FOUND = find_architectures() if importlib.util.find_spec("transformers") else []


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with equal_threads():
        yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("architecture", FOUND, ids=lambda found: f"{found.model_type}-{found.experts}")
def test_logits_gradients_training_and_generation_equal_eager(architecture: Architecture) -> None:
    assert architectures.compare(architecture).wrong() == []


def named(model_type: str) -> Architecture:
    return next(architecture for architecture in FOUND if architecture.model_type == model_type)


def no_weights(real: Any, x: Any, up: Any, down: Any, weights: Any, ids: Any, **options: Any) -> Any:
    return real(x, up, down, weights * 0.0 + 1.0, ids, **options)


def next_expert(real: Any, x: Any, up: Any, down: Any, weights: Any, ids: Any, **options: Any) -> Any:
    return real(x, up, down, weights, (ids + 1) % up.shape[0], **options)


def another_gate(real: Any, *arguments: Any, activation: Any, **options: Any) -> Any:
    assert activation in ("swiglu", "geglu_tanh", "gpt_oss")
    return real(*arguments, activation="geglu" if activation == "swiglu" else "swiglu", **options)


def halves_swapped(real: Any, x: Any, up: Any, *arguments: Any, **options: Any) -> Any:
    return real(x, up.roll(up.shape[2] // 2, dims=2), *arguments, **options)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "gemma4"])
@pytest.mark.parametrize(
    "mutant", [architectures.drop_an_expert, no_weights, next_expert, another_gate, halves_swapped]
)
def test_the_comparison_can_fail(model_type: str, mutant: Any) -> None:
    with architectures.replaced(mutant):
        wrong = architectures.compare(named(model_type)).wrong()
    assert wrong
    assert "error of logits" in wrong[0]


def test_a_model_whose_experts_stay_eager_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers: Any = importlib.import_module("transformers")
    monkeypatch.setattr(transformers.PreTrainedModel, "set_experts_implementation", lambda model, name: None)
    with pytest.raises(RuntimeError, match=r"0 of \d+ calls of 2 experts"):
        architectures.compare(named("mixtral"))


def test_an_architecture_that_cannot_be_built_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny_models.SHAPES, "OlmoeConfig", {"num_experts_per_tok": 9})
    with pytest.raises(LookupError, match="no tiny olmoe with OlmoeExperts: OlmoeForCausalLM"):
        architectures.compare(named("olmoe"))


def test_the_page_lists_what_the_pinned_version_has() -> None:
    page = PAGE.read_text(encoding="utf-8")
    [pinned] = re.findall(r"^transformers==(.*)$", PINS.read_text(encoding="utf-8"), re.MULTILINE)
    assert f"in transformers {pinned}," in page
    if importlib.import_module("transformers").__version__ != pinned:
        pytest.skip(f"the page is of transformers {pinned}")
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| `")]
    listed = [(cells[1].strip(" `"), cells[3].strip(" `")) for cells in rows]
    assert listed == [(found.model_type, found.experts) for found in FOUND]
    assert "\n" + ", ".join(f"`{name}`" for name in find_others()) + ". " in page
