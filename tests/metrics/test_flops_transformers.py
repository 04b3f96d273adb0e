"""count_flops of transformers' models, dense and MoE, by each experts implementation, against counts by hand."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moesaic.metrics import Flops, count_flops
from moesaic.metrics.op_accounting import FURTHER
from moesaic.moe import register_with_transformers

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers"),
    pytest.mark.filterwarnings("default"),
]
B, L, D, M, E, K, LAYERS, VOCABULARY, HEADS = 2, 8, 32, 48, 4, 2, 2, 64, 4
SIZES: dict[str, Any] = {
    "hidden_size": D, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY, "num_attention_heads": HEADS,
    "num_key_value_heads": 2, "head_dim": D // HEADS, "max_position_embeddings": 32, "tie_word_embeddings": False,
}  # fmt: skip


def counted(name: str, experts: str | None = None, **sizes: Any) -> tuple[Flops, int]:
    """FLOPs of a model on B·L tokens by our count, and by PyTorch's counter with our further formulas."""
    import transformers

    torch.manual_seed(0)
    model_class, config = getattr(transformers, f"{name}ForCausalLM"), getattr(transformers, f"{name}Config")
    given = {"attn_implementation": "eager"} | ({} if experts is None else {"experts_implementation": experts})
    model = model_class._from_config(config(**SIZES, **sizes), **given)
    ids = torch.arange(3, 3 + B * L).view(B, L)

    def logits() -> torch.Tensor:
        out: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        return out

    flops = count_flops(logits)
    ops = {name: name.split(".") for name in FURTHER if "grouped" in name}
    mapping = {getattr(getattr(torch.ops, space), op): FURTHER[name] for name, (space, op) in ops.items()}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        logits().square().sum().backward()
    return flops, counter.get_total_flops()


def attention() -> int:
    """q, k, v, output projections and the two products of attention, of all layers, forward."""
    tokens = B * L
    return LAYERS * (2 * tokens * D * (D + 2 * D // 2 + D) + 2 * 2 * B * HEADS * L * L * (D // HEADS))


def test_transformers_llama_dense() -> None:
    flops, theirs = counted("Llama", intermediate_size=M)
    products = attention() + LAYERS * 2 * B * L * 3 * D * M + 2 * B * L * D * VOCABULARY
    assert flops.forward.active.total == products
    assert flops.training.active.total == theirs == 3 * products
    assert flops.training.active == flops.training.executed == flops.training.dense_equivalent


@pytest.mark.parametrize("experts", ["moesaic", "eager", "grouped_mm"])
@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
def test_transformers_mixture(name: str, experts: str) -> None:
    register_with_transformers()
    mixtral = {"num_local_experts": E, "intermediate_size": M}
    qwen = {"num_experts": E, "moe_intermediate_size": M, "intermediate_size": M, "decoder_sparse_step": 1}
    flops, theirs = counted(name, experts, num_experts_per_tok=K, **(mixtral if name == "Mixtral" else qwen))
    head, router, expert = 2 * B * L * D * VOCABULARY, LAYERS * 2 * B * L * D * E, LAYERS * 2 * B * L * 3 * D * M
    products = attention() + head + router + K * expert
    assert flops.forward.active.total == flops.forward.executed.total == products
    assert flops.training.active.total == theirs == 3 * products
    dense = {"moesaic": products + (E - K) * expert, "eager": products, "grouped_mm": None}
    assert flops.forward.dense_equivalent.total == dense[experts]
    assert not flops.bound
    assert flops.training.bytes is not None
    assert flops.forward.bytes is not None
    assert flops.training.bytes.total > 2 * flops.forward.bytes.total > 0
