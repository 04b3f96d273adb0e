"""experts_implementation="moesaic" against transformers' eager experts; needs transformers, skipped without it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from moesaic.kernels import reference
from moesaic.kernels.expert_mlp import expert_mlp
from moesaic.moe import hf
from moesaic.moe.hf import register_with_transformers

needs_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "head_dim": 8,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": None,
}
MODELS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 5},
    "Qwen3Moe": {"num_experts": 5, "moe_intermediate_size": 16, "norm_topk_prob": True},
    "GptOss": {"num_local_experts": 5, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
}


def model_of(name: str) -> Any:
    transformers: Any = importlib.import_module("transformers")
    register_with_transformers()
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL, **MODELS[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():  # some are left at 0 or uninitialised by construction alone
            parameter.normal_(std=0.2)
    return model


def logits_and_gradients(model: Any, implementation: str) -> dict[str, torch.Tensor]:
    model.set_experts_implementation(implementation)
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    logits = model(torch.randint(0, 61, (3, 17), generator=generator)).logits
    logits.backward(torch.randn(logits.shape, generator=generator))
    return {"logits": logits.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


@needs_transformers
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_every_gradient_equal_eager(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(name)
    eager = logits_and_gradients(model, "eager")
    spy = Mock(wraps=expert_mlp)
    monkeypatch.setattr(hf, "expert_mlp", spy)
    ours = logits_and_gradients(model, "moesaic")
    assert spy.call_count == SMALL["num_hidden_layers"]
    assert ours.keys() == eager.keys()
    for key, truth in eager.items():
        error = (ours[key] - truth).abs().max() / truth.square().mean().sqrt().clamp_min(1e-30)
        assert error < 1e-4, key


@needs_transformers
@pytest.mark.filterwarnings("default")
def test_the_comparison_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("Mixtral")
    eager = logits_and_gradients(model, "eager")["logits"]
    real = expert_mlp
    for mutant in (
        lambda x, up, down, w, ids, **k: real(x, up, down, w * 0.0, ids, **k),
        lambda x, up, down, w, ids, **k: real(x, up, down, w * 0.0 + 1.0, ids, **k),
        lambda x, up, down, w, ids, **k: real(x, up, down, w, (ids + 1) % 5, **k),
        lambda x, up, down, w, ids, **k: real(x, up, down, w, ids.masked_fill(ids == 1, 5), **k),
    ):
        monkeypatch.setattr(hf, "expert_mlp", mutant)
        broken = logits_and_gradients(model, "moesaic")["logits"]
        assert (broken - eager).abs().max() / eager.square().mean().sqrt() > 1e-2


@needs_transformers
@pytest.mark.filterwarnings("default")
def test_from_config_trains_generates_and_autocasts() -> None:
    transformers: Any = importlib.import_module("transformers")
    register_with_transformers()
    config = transformers.Qwen3MoeConfig(**SMALL, **MODELS["Qwen3Moe"])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="moesaic")
    assert model.config._experts_implementation == "moesaic"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[0]
    assert model.generate(ids[:, :4], max_new_tokens=3, do_sample=False).shape == (2, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(ids).logits
    assert (half.float() - model(ids).logits).abs().max() < 0.1


@needs_transformers
@pytest.mark.filterwarnings("default")
def test_sentinel_ids_are_skipped_and_what_cannot_be_honoured_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = model_of("Mixtral").model.layers[0].mlp.experts
    x, weights = torch.randn(6, 32), torch.rand(6, 2)
    ids = torch.tensor([[0, 5], [5, 5], [1, 2], [3, 5], [4, 0], [2, 7]])
    out = hf.experts_forward(experts, x, ids, weights)
    assert not out[1].any()
    inside = ids.clamp(max=4)
    torch.testing.assert_close(out, hf.experts_forward(experts, x, inside, weights.masked_fill(ids > 4, 0.0)))
    with pytest.raises(ValueError, match=r"MixtralExperts passes routing weights \(6, 5\) for ids \(6, 2\)"):
        hf.experts_forward(experts, x, ids, torch.rand(6, 5))
    monkeypatch.setitem(hf._unknown_flags, "has_input_scaling", False)
    hf.experts_forward(experts, x, ids, weights)
    experts.has_input_scaling = True
    with pytest.raises(NotImplementedError, match="MixtralExperts sets has_input_scaling=True"):
        hf.experts_forward(experts, x, ids, weights)
    del experts.has_input_scaling
    experts.down_proj = torch.nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"MixtralExperts.down_proj is torch.float8_e4m3fn"):
        hf.experts_forward(experts, x, ids, weights)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_gate", [False, True])
@pytest.mark.parametrize("has_post_expert_norm", [False, True])
def test_every_flag_of_the_interface(
    is_transposed: bool, has_bias: bool, has_gate: bool, has_post_expert_norm: bool
) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    up, down = draw(4, 6, 10 if has_gate else 5), draw(4, 5, 6)
    up_bias, down_bias = draw(4, up.shape[2]), draw(4, 6)
    name = "gate_up_proj" if has_gate else "up_proj"
    layout = {name: up, "down_proj": down} if is_transposed else {name: up.mT.contiguous(), "down_proj": down.mT}
    experts = SimpleNamespace(
        **layout,
        **{f"{name}_bias": up_bias, "down_proj_bias": down_bias},
        is_transposed=is_transposed,
        has_bias=has_bias,
        has_gate=has_gate,
        has_post_expert_norm=has_post_expert_norm,
        post_expert_norm=lambda rows: rows * 3.0,
        act_fn=torch.relu,
        _apply_gate=lambda h: torch.relu(h[..., :5]) * h[..., 5:],
    )
    x, weights, ids = draw(9, 6), draw(9, 2), torch.randint(0, 5, (9, 2), generator=generator)
    truth = reference.expert_mlp(
        x,
        up,
        down,
        weights,
        ids,
        activation="reglu" if has_gate else "relu",
        gate_up_bias=up_bias if has_bias else None,
        down_bias=down_bias if has_bias else None,
    )
    out = hf.experts_forward(experts, x, ids, weights)
    torch.testing.assert_close(out, truth * 3.0 if has_post_expert_norm else truth, rtol=1e-12, atol=1e-12)


def test_registers_in_both_registries_and_refuses_a_fixed_list(monkeypatch: pytest.MonkeyPatch) -> None:
    public, closed_over = Mock(), Mock()

    def use_experts_implementation(
        experts_class: type, *, experts_interface: Any = closed_over, has_novelty: int = 0
    ) -> None: ...

    moe: Any = ModuleType("transformers.integrations.moe")
    moe.ALL_EXPERTS_FUNCTIONS, moe.use_experts_implementation = public, use_experts_implementation
    package: Any = ModuleType("transformers")
    package.__version__, package.PreTrainedModel = "5.1", Mock()
    monkeypatch.setitem(sys.modules, "transformers", package)
    monkeypatch.setitem(sys.modules, "transformers.integrations", ModuleType("transformers.integrations"))
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", moe)
    monkeypatch.setattr(hf, "_unknown_flags", {})
    register_with_transformers()
    public.register.assert_called_once_with("moesaic", hf.experts_forward)
    closed_over.register.assert_called_once_with("moesaic", hf.experts_forward)
    assert hf._unknown_flags == {"has_novelty": 0}
    package.PreTrainedModel.get_correct_experts_implementation.side_effect = ValueError("only eager")
    with pytest.raises(ImportError, match=r"transformers 5\.1 takes no outside experts implementation"):
        register_with_transformers()


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"moesaic\[transformers\]"):
        register_with_transformers()
