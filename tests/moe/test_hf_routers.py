"""route_topk and route against the routers of transformers' models; needs transformers, skipped without it.

Nine models, each with the options of docs/routers.md: the same experts, weights and gradients as the model's own router
module with random weights.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from moesaic.kernels import route, route_topk

needs_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "routers.md"


class Field(str):
    """An option that a checkpoint decides, by where its model keeps it: in `config` or in the router, `gate`."""

    __slots__ = ()


class Model(NamedTuple):
    """A model's router in transformers, and the options of `route_topk` that equal it."""

    module: str
    router: str
    config: str
    n_experts: str  # the config's name for E
    options: dict[str, Any]


NORMALIZED = {"renormalize": Field("config.norm_topk_prob")}
SCALED = {"scale": Field("config.routed_scaling_factor")}
GROUPED = {"n_groups": Field("config.n_group"), "top_k_groups": Field("config.topk_group")}
BIASED = {
    "scoring": "sigmoid",
    "bias": Field("gate.e_score_correction_bias"),
    **GROUPED,
    "group_score": "top2",
    **NORMALIZED,
    **SCALED,
}
DEEPSEEK_V2 = ("deepseek_v2", "DeepseekV2TopkRouter", "DeepseekV2Config", "n_routed_experts")
MODELS = {
    "Mixtral": Model("mixtral", "MixtralTopKRouter", "MixtralConfig", "num_local_experts", {"renormalize": True}),
    "Qwen2-MoE": Model("qwen2_moe", "Qwen2MoeTopKRouter", "Qwen2MoeConfig", "num_experts", NORMALIZED),
    "Qwen3-MoE": Model("qwen3_moe", "Qwen3MoeTopKRouter", "Qwen3MoeConfig", "num_experts", NORMALIZED),
    "OLMoE": Model("olmoe", "OlmoeTopKRouter", "OlmoeConfig", "num_experts", NORMALIZED),
    "DeepSeek-V2, greedy": Model(*DEEPSEEK_V2, SCALED),
    "DeepSeek-V2, group_limited_greedy": Model(*DEEPSEEK_V2, {**GROUPED, "group_score": "max", **SCALED}),
    "DeepSeek-V3": Model("deepseek_v3", "DeepseekV3TopkRouter", "DeepseekV3Config", "n_routed_experts", BIASED),
    "GLM-4-MoE": Model("glm4_moe", "Glm4MoeTopkRouter", "Glm4MoeConfig", "n_routed_experts", BIASED),
    "GPT-OSS": Model("gpt_oss", "GptOssTopKRouter", "GptOssConfig", "num_local_experts", {"scoring": "softmax_topk"}),
    "Llama-4": Model("llama4", "Llama4Router", "Llama4TextConfig", "num_local_experts", {"scoring": "sigmoid"}),
}

# Groups of E/4 ≥ 4, so that the best ones hold k. Experts of the others get the score −inf from DeepSeek-V3 and
# GLM-4-MoE, and 0 from DeepSeek-V2, which a softmax of these logits stays above.
GROUPS = {"n_group": 4, "topk_group": 2}
NORMALIZING = [{"norm_topk_prob": False}, {"norm_topk_prob": True}]
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "Mixtral": [{}],
    "Qwen2-MoE": NORMALIZING,
    "Qwen3-MoE": NORMALIZING,
    "OLMoE": [{"norm_topk_prob": False, "num_experts_per_tok": 1}, *NORMALIZING],
    # This router never renormalises, whatever norm_topk_prob says.
    "DeepSeek-V2, greedy": [{"routed_scaling_factor": 1.0, "norm_topk_prob": True}, {"routed_scaling_factor": 16.0}],
    "DeepSeek-V2, group_limited_greedy": [
        {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0, **GROUPS, **given}
        for given in NORMALIZING
    ],
    "DeepSeek-V3": [{"routed_scaling_factor": 2.5, **GROUPS, **given} for given in NORMALIZING],
    "GLM-4-MoE": [
        {"n_group": 1, "topk_group": 1},
        *({"routed_scaling_factor": 1.5, **GROUPS, **given} for given in NORMALIZING),
    ],
    "GPT-OSS": [{}],
    "Llama-4": [{"num_experts_per_tok": 1}, {}],
}
CASES = [(name, settings) for name in MODELS for settings in SETTINGS[name]]


class Case(NamedTuple):
    gate: Any
    x: Tensor  # (T, d)
    k: int
    options: dict[str, Any]


class Routed(NamedTuple):
    """What a router of transformers returns: weights (T, k) of ids (T, k), and all logits (T, E)."""

    logits: Tensor
    weights: Tensor
    ids: Tensor


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def scaled_error(got: Tensor, truth: Tensor) -> float:
    """Return the largest difference over the RMS of what is not 0: k of E logits have a gradient, however large E."""
    assert got.shape == truth.shape
    got, truth = got.detach().double(), truth.detach().double()
    return float((got - truth).abs().max() / truth[truth != 0].square().mean().sqrt())


def case_of(
    name: str, settings: dict[str, Any], n_experts: int, k: int, n_tokens: int = 61, dtype: torch.dtype = torch.float32
) -> Case:
    transformers: Any = importlib.import_module("transformers")
    model = MODELS[name]
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, model.n_experts: n_experts}
    config = getattr(transformers, model.config)(**{**sizes, "num_experts_per_tok": k, **settings})
    modeling = importlib.import_module(f"transformers.models.{model.module}.modeling_{model.module}")
    gate = getattr(modeling, model.router)(config)
    with torch.no_grad():
        # Small, because theirs forms the derivative s (1 − s) from s in float32, which loses digits where s is near 1.
        for seed, parameter in enumerate(gate.parameters()):
            parameter.copy_(0.1 * draw(*parameter.shape, seed=seed + 1))
            parameter.data = parameter.data.to(dtype)
        for buffer in gate.buffers():  # the bias, which the models keep in float32
            buffer.copy_(0.1 * draw(*buffer.shape, seed=9))
    owners = {"config": config, "gate": gate}
    options = {}
    for option, value in model.options.items():
        if isinstance(value, Field):
            owner, _, field = value.partition(".")
            value = getattr(owners[owner], field)
        options[option] = value
    return Case(gate, draw(n_tokens, 32).to(dtype).requires_grad_(), config.num_experts_per_tok, options)


def routed_by_theirs(case: Case) -> Routed:
    found = case.gate(case.x)
    if len(found) == 3:
        return Routed(*found)
    scores, logits = found  # Llama-4: (T, E), 0 for what is not chosen
    weights, ids = scores.topk(case.k)
    return Routed(logits, weights, ids)


def by_id(weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    ids, order = ids.sort(-1)
    return weights.gather(-1, order), ids


def errors(case: Case, **changed: Any) -> tuple[float, float]:
    """Worst scaled errors of weights and of gradients; infinite where other experts are chosen."""
    options = {**case.options, **changed}
    theirs = routed_by_theirs(case)
    truth, truth_ids = by_id(theirs.weights, theirs.ids)
    upstream, parameters = draw(*truth.shape, seed=3), list(case.gate.parameters())
    truth_grads = torch.autograd.grad(truth, [theirs.logits, case.x, *parameters], upstream)
    logits = theirs.logits.detach().requires_grad_()
    found = [(route_topk(logits, case.k, **options), [logits], truth_grads[:1])]
    if len(parameters) == 1:  # GPT-OSS adds a bias to its projection
        inputs = [case.x.detach().requires_grad_(), parameters[0].detach().requires_grad_()]
        found.append((route(inputs[0], inputs[1], case.k, **options), inputs, truth_grads[1:]))
    weight_errors, grad_errors = [], []
    for routing, inputs, expected in found:
        weights, ids = by_id(*routing)
        if not torch.equal(ids, truth_ids):
            return torch.inf, torch.inf
        weight_errors.append(scaled_error(weights, truth))
        grads = torch.autograd.grad(weights, inputs, upstream)
        grad_errors += [scaled_error(ours, exact) for ours, exact in zip(grads, expected, strict=True)]
    return max(weight_errors), max(grad_errors)


@needs_transformers
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("n_experts", "k"), [(16, 3), (128, 8)])
@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
def test_experts_weights_and_gradients(name: str, settings: dict[str, Any], n_experts: int, k: int) -> None:
    of_weights, of_gradients = errors(case_of(name, settings, n_experts, k))
    assert of_weights < 1e-6
    assert of_gradients < 5e-6


@needs_transformers
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
def test_half_precision(name: str, settings: dict[str, Any]) -> None:
    case = case_of(name, settings, 128, 8, n_tokens=500, dtype=torch.bfloat16)
    with torch.no_grad():
        theirs = routed_by_theirs(case)
        found = [route_topk(theirs.logits, case.k, **case.options)]
        if theirs.logits.dtype == torch.bfloat16:
            # Equal logits on both sides of the cut, where transformers promises no order: ids cannot be compared.
            best = theirs.logits.sort(-1, descending=True).values
            assert (best[:, case.k - 1] == best[:, case.k]).any()
        else:  # DeepSeek and GLM-4-MoE project in float32, as `route` does
            found.append(route(case.x, case.gate.weight, case.k, **case.options))
    # Our weights are float32; most of these models round theirs to the logits' dtype.
    rounding = max(1e-6, 1.001 * torch.finfo(theirs.weights.dtype).eps / 2)
    expected = theirs.weights.float().sort(-1).values
    for weights, ids in found:
        assert torch.equal(*(theirs.logits.gather(-1, chosen).sort(-1).values for chosen in (ids, theirs.ids)))
        assert ((weights.sort(-1).values - expected).abs() <= rounding * expected).all()


def other_options(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield one change for each option given."""
    for option, value in options.items():
        if option == "scoring":
            yield {option: "softmax"}
        elif option == "bias":
            yield {option: None}
        elif option == "n_groups":
            yield {option: None, "top_k_groups": None}
        elif option == "top_k_groups":
            yield {option: value + 1}
        elif option == "group_score":
            yield {option: "max" if value == "top2" else "top2"}
        elif option == "renormalize":
            yield {option: not value}
        else:
            assert option == "scale"
            yield {option: value * (1 + 2e-6)}


@needs_transformers
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", MODELS)
def test_every_option_is_needed(name: str) -> None:
    case = case_of(name, SETTINGS[name][-1], 16, 3)
    changes = list(other_options(case.options))
    assert changes
    for changed in changes:
        assert errors(case, **changed)[0] > 1e-6, changed


@needs_transformers
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", MODELS)
def test_wrong_gradients_are_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = route_topk

    def steeper(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        weights, ids = right(*args, **options)
        return weights + 1e-5 * (weights - weights.detach()), ids

    monkeypatch.setitem(globals(), "route_topk", steeper)
    of_weights, of_gradients = errors(case_of(name, SETTINGS[name][-1], 16, 3))
    assert of_weights < 1e-6
    assert of_gradients > 5e-6


def rows_of_the_table() -> Iterator[str]:
    for name, model in MODELS.items():
        options = ", ".join(
            f'{option}="{value}"' if isinstance(value, str) and not isinstance(value, Field) else f"{option}={value}"
            for option, value in model.options.items()
        )
        yield f"| {name} | `{model.router}` | `{options}` |"


def test_the_documented_table_is_the_tested_one() -> None:
    table = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert table[1:] == list(rows_of_the_table())
