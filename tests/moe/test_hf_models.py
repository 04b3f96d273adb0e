"""Whole models of transformers with moesaic's experts: composite, saved, checkpointed, compiled, copied, 16 bits."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.bench.architectures import logits_and_gradients, logits_of, scaled_error, watched
from moesaic.bench.interleave import equal_threads
from moesaic.bench.tiny_models import Architecture, build, experts_of, find_architectures, shrunk
from moesaic.moe import hf

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers"),
    pytest.mark.filterwarnings("default"),
]
FOUND = find_architectures() if importlib.util.find_spec("transformers") else []


@pytest.fixture(autouse=True)
def _registered_with_one_thread() -> Iterator[None]:
    hf.register_with_transformers()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with equal_threads():
        yield
    torch.set_num_threads(before)


def named(model_type: str) -> Architecture:
    found = [architecture for architecture in FOUND if architecture.model_type == model_type]
    return found[0] if found else pytest.skip(f"this version of transformers has no {model_type}")


def calls(model: Any, architecture: Architecture, inputs: Any) -> tuple[int, torch.Tensor]:
    with watched(model, architecture) as (ran, activations):
        logits = logits_of(model, inputs)
    assert len(ran) >= len(experts_of(model, architecture))
    return len(activations), logits


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "glm4v_moe", "qwen3_5_moe"])
def test_a_composite_model_takes_it_whole_by_part_and_from_its_config(model_type: str) -> None:
    architecture = named(model_type)
    module = importlib.import_module(architecture.module)
    model_class = next(value for name, value in vars(module).items() if name.endswith("ForConditionalGeneration"))
    config = model_class.config_class(**shrunk(model_class.config_class))
    model = model_class._from_config(config, experts_implementation="moesaic").eval()
    assert model.config._experts_implementation == model.config.text_config._experts_implementation == "moesaic"
    inputs = {"input_ids": torch.arange(3, 21).view(2, 9)}
    n_layers = len(experts_of(model, architecture))
    count, first = calls(model, architecture, inputs)
    assert count == n_layers
    model.set_experts_implementation("eager")
    count, eager = calls(model, architecture, inputs)
    assert count == 0
    assert scaled_error(first, eager) < 1e-4
    for whole in ("moesaic", {"": "eager", "text_config": "moesaic"}):
        model.set_experts_implementation(whole)
        assert calls(model, architecture, inputs)[0] == n_layers
    model.set_experts_implementation({"text_config": "eager"})
    assert calls(model, architecture, inputs)[0] == 0


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "qwen3_vl_moe"])
def test_saved_and_loaded_with_it(model_type: str, tmp_path: Path) -> None:
    architecture = named(model_type)
    model, inputs = build(architecture)
    truth = logits_of(model, inputs)
    model.set_experts_implementation("moesaic")
    logits_of(model, inputs)
    model.save_pretrained(tmp_path)
    assert "moesaic" not in (tmp_path / "config.json").read_text()
    loaded = type(model).from_pretrained(tmp_path, experts_implementation="moesaic").eval()
    count, logits = calls(loaded, architecture, inputs)
    assert count == len(experts_of(model, architecture))
    assert scaled_error(logits, truth) < 1e-4


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v4"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(model_type: str, use_reentrant: bool) -> None:
    architecture = named(model_type)
    model, inputs = build(architecture)
    eager_logits, eager = logits_and_gradients(model, inputs)
    model.set_experts_implementation("moesaic")
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    model.train()
    with watched(model, architecture) as (_, activations):
        logits, gradients = logits_and_gradients(model, inputs)
    assert len(activations) == 2 * len(experts_of(model, architecture))
    assert scaled_error(logits, eager_logits) < 1e-4
    assert gradients.keys() == eager.keys()
    assert max(scaled_error(gradients[name], eager[name]) for name in eager) < 1e-4


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "gemma4"])
def test_compiled_whole_it_is_one_graph_with_eagers_gradients(model_type: str) -> None:
    torch.compiler.reset()
    architecture = named(model_type)
    model, inputs = build(architecture)
    model.config.use_cache = False
    logits, gradients = logits_and_gradients(model, inputs)
    model.set_experts_implementation("moesaic")
    torch.manual_seed(0)
    compiled = torch.compile(lambda **options: model(**options).logits, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    ours = compiled(**inputs)
    ours.backward(torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)))
    assert scaled_error(ours.detach(), logits) < 1e-4
    assert max(scaled_error(dict(model.named_parameters())[n].grad, g) for n, g in gradients.items()) < 1e-4
    torch.compiler.reset()


def test_copied_and_pickled_after_a_forward() -> None:
    model, inputs = build(named("gpt_oss"))
    model.set_experts_implementation("moesaic")
    truth = logits_of(model, inputs)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(logits_of(twin, inputs), truth)


@pytest.mark.parametrize(
    "model_type", ["mixtral", "gpt_oss", "nemotron_h", "deepseek_v4", "muse_spark", "openai_privacy_filter"]
)
def test_in_16_bits_it_is_as_exact_as_eager(model_type: str) -> None:
    architecture = named(model_type)
    model, inputs = build(architecture)
    truth = logits_of(model, inputs).detach()
    model.bfloat16()
    errors = []
    for implementation in ("eager", "moesaic"):
        model.set_experts_implementation(implementation)
        logits = logits_of(model, inputs)
        logits.sum().backward()
        errors.append(float((logits.detach().float() - truth).square().mean().sqrt() / truth.square().mean().sqrt()))
    assert errors[1] < 2.0 * errors[0] + 1e-3
