"""A tiny random model of any architecture whose experts go through transformers' experts interface.

Which architectures there are is found by looking: every modeling file of the installed transformers is parsed for
classes under the decorator. A configuration is shrunk by the names of its sizes; what an architecture needs beside
that is in `SHAPES`.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import torch

DECORATOR = "use_experts_implementation"
N_EXPERTS, TOP_K, VOCABULARY, SEEDS = 4, 2, 64, 20

SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "embed_dim", "thinker_hidden_size", "text_hidden_size"), 32),
    **dict.fromkeys(("moe_hidden_size", "router_hidden_size"), 32),
    **dict.fromkeys(("out_hidden_size", "output_dim", "projector_hidden_size", "projection_hidden_dim"), 32),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("mlp_dim", "encoder_ffn_dim", "dense_intermediate_size", "shared_intermediate_size"), 24),
    **dict.fromkeys(("num_hidden_layers", "encoder_layers", "depth"), 2),
    **dict.fromkeys(("num_attention_heads", "encoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("head_dim", "linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), N_EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token"), TOP_K),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "codebook_size"), VOCABULARY),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("qk_head_dim", "q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("n_group", "num_expert_group", "topk_group", "n_groups"), 2),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads", "index_n_heads"), 4),
    **dict.fromkeys(("index_head_dim", "index_topk", "hc_lowrank", "gated_norm_rank", "rotary_dim"), 8),
    "max_position_embeddings": 64,
    "first_k_dense_replace": 0,
    "moe_layer_start_index": 0,
    "num_dense_layers": 0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""What attributes of these names become, in a configuration that has them, and in its parts."""

_SPECIAL = re.compile(r"_token_(id|index)$")

SHAPES: dict[str, dict[str, Any]] = {
    "Dots3NoteTextConfig": {
        "head_dim": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "DiffusionGemmaConfig": {"canvas_length": 8},
    "DiffusionGemmaTextConfig": {"global_head_dim": 8, "moe_intermediate_size": 24},
    "Gemma4TextConfig": {
        "global_head_dim": 8,
        "moe_intermediate_size": 24,
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 8,
    },
    "DeepseekOcr2TextConfig": {"moe_intermediate_size": 24, "mlp_layer_types": ["sparse", "sparse"]},
    "Dots1Config": {"n_shared_experts": 1},
    "Ernie4_5_VLMoeTextConfig": {
        "moe_intermediate_size": [24, 24],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "FlintConfig": {"mlp_only_layers": []},
    "Glm5NextTextConfig": {"index_kpool": 4, "qk_rope_head_dim": 0, "qk_nope_head_dim": 8},
    "GraniteMoeHybridConfig": {
        "mamba_n_heads": 8,
        "mamba_d_state": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "HunYuanMoEV1Config": {"head_dim": 8},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0},
    "DeepseekV4Config": {"mlp_layer_types": ["hash_moe", "moe"]},
    "Glm4vMoeTextConfig": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "MuseSparkAudioConfig": {"num_hidden_layers": 4},
    "NemotronHConfig": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "num_hidden_layers": 4,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "moe_latent_size": 16,
        "moe_shared_expert_intermediate_size": 24,
    },
    "Qwen3OmniMoeTalkerConfig": {"spatial_merge_size": 2},
    "Qwen3OmniMoeThinkerConfig": {"vision_start_token_id": VOCABULARY - 1},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": 24},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "ZayaConfig": {"num_experts_per_tok": 1},
}
"""What else a configuration class needs for its shapes to fit, or for its experts to be used at all."""

TALKER = "Qwen3OmniMoeTalkerTextExperts"
"""Experts of a model that takes embeddings of what another model said, not tokens."""

TOKEN_TO_EXPERTS = "tid2eid"
"""A buffer in which a router without scores keeps every token's experts; zeros until a checkpoint fills it."""

STD = {"inkling": 0.4, "zaya": 0.5}
"""Standard deviations of parameters where the usual one leaves the router, or the logits, without an opinion."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An experts class of transformers under the interface's decorator, and the module that holds it."""

    model_type: str
    experts: str
    module: str


def find_architectures() -> list[Architecture]:
    """Return every experts class of the installed transformers that uses the experts interface.

    Raises:
        ImportError: transformers is not installed.
    """
    package = importlib.import_module("transformers")
    found = []
    for path in sorted((Path(str(package.__file__)).parent / "models").glob("*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        if DECORATOR not in source:
            continue
        classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
        decorated = [c.name for c in classes if any(DECORATOR in ast.unparse(d) for d in c.decorator_list)]
        if not decorated:
            raise LookupError(f"{path} mentions {DECORATOR} and decorates no class with it")
        module = f"transformers.models.{path.parent.name}.{path.stem}"
        found += [Architecture(path.parent.name, name, module) for name in decorated]
    return found


def find_others() -> list[str]:
    """Return the model types of the installed transformers that have experts and do not use the experts interface."""
    package = importlib.import_module("transformers")
    files = sorted((Path(str(package.__file__)).parent / "models").glob("*/modeling_*.py"))
    sources = {path.parent.name: path.read_text(encoding="utf-8") for path in files}
    return [name for name, source in sources.items() if "self.experts" in source and DECORATOR not in source]


def shrunk(config_class: Any) -> dict[str, Any]:
    """Return the arguments that make a configuration class's default small."""
    default: Any = config_class()
    # The fields as declared: what a constructor derives from others must not be set, nor even read where layers differ.
    fields = {field.name: field.default for field in dataclasses.fields(config_class)}
    arguments: dict[str, Any] = {}
    for name, value in fields.items():
        if name in SIZES and (isinstance(value, int) or (value is None and "expert" in name)):
            arguments[name] = SIZES[name]
        elif _SPECIAL.search(name) and isinstance(value, int):
            arguments[name] = VOCABULARY - 1
    if "kv_lora_rank" in arguments:
        arguments["num_key_value_heads"] = arguments["num_attention_heads"]
    if "layer_types" in fields:
        kinds = list(dict.fromkeys(default.layer_types or ()))
        if kinds:
            arguments["layer_types"] = kinds if len(kinds) > 1 else kinds * 2
            arguments["num_hidden_layers"] = len(arguments["layer_types"])
    if "mlp_layer_types" in fields:
        arguments["mlp_layer_types"] = ["sparse"] * arguments["num_hidden_layers"]
    for name in getattr(config_class, "sub_configs", {}):
        part = getattr(default, name, None)
        if part is not None:
            arguments[name] = type(part)(**shrunk(type(part)))
    return arguments | SHAPES.get(config_class.__name__, {})


def _rank(model_class: Any) -> int:
    heads = ("ForCausalLM", "ForConditionalGeneration", "ForTokenClassification", "For")
    return next((place for place, head in enumerate(heads) if head in model_class.__name__), len(heads))


def model_classes(architecture: Architecture) -> list[Any]:
    """Return the module's model classes, those with logits of tokens first."""
    transformers = importlib.import_module("transformers")
    module = importlib.import_module(architecture.module)
    classes: list[Any] = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, transformers.PreTrainedModel)
        and value.__module__ == module.__name__
        and inspect.isclass(getattr(value, "config_class", None))
        and not value.__name__.endswith("PreTrainedModel")
    ]
    return sorted(classes, key=_rank)


def build(architecture: Architecture) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return a tiny model of an architecture, all its parameters normally distributed, and a forward's arguments.

    Raises:
        LookupError: no model class of the module contains the experts class, or its router sends everything to the
            same few experts whatever the seed; the architecture is named.
    """
    failures = []
    for model_class in model_classes(architecture):
        try:
            model = model_class(model_class.config_class(**shrunk(model_class.config_class))).eval()
            if not experts_of(model, architecture):
                failures.append(f"{model_class.__name__} has no {architecture.experts}")
                continue
            for seed in range(SEEDS):
                draw_parameters(model, architecture, seed)
                inputs = draw_inputs(model, architecture)
                if experts_used(model, inputs, architecture) > TOP_K:
                    return model, inputs
            failures.append(f"{model_class.__name__} leaves experts unused with {SEEDS} seeds")
        except Exception as error:  # whatever it is, the architecture's name has to be beside it
            failures.append(f"{model_class.__name__}: {type(error).__name__}: {error}")
    raise LookupError(f"no tiny {architecture.model_type} with {architecture.experts}: " + "; ".join(failures))


def draw_parameters(model: Any, architecture: Architecture, seed: int) -> None:
    """Fill all parameters: some are left at 0 or uninitialised by construction alone."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=STD.get(architecture.model_type, 0.2))
        for name, buffer in model.named_buffers():
            if name.endswith(TOKEN_TO_EXPERTS):
                buffer.random_(N_EXPERTS)


def experts_used(model: Any, inputs: dict[str, torch.Tensor], architecture: Architecture) -> int:
    """Return how many experts a forward uses, in the experts module that uses the fewest."""
    used: list[int] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, arguments: used.append(arguments[1].unique().numel()))
        for module in experts_of(model, architecture)
    ]
    model.set_experts_implementation("eager")
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return min(used)


def experts_of(model: Any, architecture: Architecture) -> list[Any]:
    """Return the model's experts modules of the architecture's class."""
    return [module for module in model.modules() if type(module).__name__ == architecture.experts]


def draw_inputs(model: Any, architecture: Architecture, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return the arguments of a forward of two texts of nine random tokens, none of them special."""
    ids = torch.randint(3, VOCABULARY - 4, (2, 9), generator=torch.Generator().manual_seed(seed))
    if architecture.experts == TALKER:
        return {"inputs_embeds": model.get_input_embeddings()(ids).detach()}
    if architecture.model_type == "ernie4_5_vl_moe":  # experts of its own for what is no text
        return {"input_ids": ids, "moe_mm_token_type_ids": (torch.arange(9) < 4).int().expand(2, 9)}
    return {"input_ids": ids}


def generation_options(architecture: Architecture) -> dict[str, Any]:
    """Return what an architecture's `generate` needs to know beside its inputs."""
    if architecture.experts == TALKER:
        return {
            "trailing_text_hidden": torch.zeros(2, 1, 32),
            "tts_pad_embed": torch.zeros(1, 1, 32),
            "output_hidden_states": True,
            "return_dict_in_generate": True,
        }
    return {"max_denoising_steps": 3} if architecture.model_type == "diffusion_gemma" else {}
