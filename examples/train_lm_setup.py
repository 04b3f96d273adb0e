"""What `train_lm.py` trains, and on what: its options, the text, the model."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moesaic.bench.environment import DEVICES, missing_extras
from moesaic.moe import register_with_transformers

IMPLEMENTATIONS = ("eager", "moesaic", "grouped_mm", "batched_mm")
LONGEST = 1024


@dataclass(frozen=True)
class Options:
    """Model, training and what to compare; `parse` checks them."""

    d_model: int
    layers: int
    experts: int
    top_k: int
    d_ff: int
    batch: int
    length: int
    steps: int
    lr: float
    balance: float
    seed: int
    impl: str
    device: str
    threads: int
    out: Path
    control: bool
    dense: bool


def parse(argv: Sequence[str] | None, words: str | None = None) -> Options:
    """Options from the command line, ``words`` atop their help; exits with code 2 and the name of a wrong argument."""
    parser = argparse.ArgumentParser(description=words, formatter_class=argparse.RawDescriptionHelpFormatter)
    counts = {
        "d-model": (256, "width of the model, a multiple of 32"),
        "layers": (4, "number of layers"),
        "experts": (32, "experts per layer"),
        "top-k": (2, "experts per token"),
        "d-ff": (96, "width of an expert"),
        "batch": (8, "sequences per step"),
        "length": (128, "bytes per sequence"),
        "steps": (200, "training steps"),
        "threads": (torch.get_num_threads(), "threads of the CPU; fewer than cores are faster on a busy machine"),
    }
    for name, (default, what) in counts.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what} ({default})")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="highest learning rate of AdamW (0.0015)")
    parser.add_argument("--balance", type=float, default=0.01, help="coefficient of the load-balance loss (0.01)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (0)")
    parser.add_argument("--impl", default="moesaic", choices=IMPLEMENTATIONS, help="what is compared with eager")
    parser.add_argument("--device", default="auto", choices=DEVICES)
    parser.add_argument("--out", type=Path, default=Path("runs/train_lm"), metavar="DIR", help="results' folder")
    parser.add_argument("--control", action="store_true", help="train eager also from weights changed by rounding")
    parser.add_argument(
        "--dense", action=argparse.BooleanOptionalAction, default=True,
        help="train a dense model of equal active width, too: k · d_ff",
    )  # fmt: skip
    options = Options(**vars(parser.parse_args(argv)))
    for name in counts:
        if (value := getattr(options, name.replace("-", "_"))) < 1:
            parser.error(f"argument --{name}: must be at least 1, got {value}")
    if options.d_model % 32:
        parser.error(f"argument --d-model: must be a multiple of 32, got {options.d_model}")
    if options.top_k > options.experts:
        parser.error(f"argument --top-k: must be at most --experts = {options.experts}, got {options.top_k}")
    if options.length < 2:
        parser.error(f"argument --length: must be at least 2, got {options.length}")
    if options.length > LONGEST:
        parser.error(f"argument --length: must be at most {LONGEST}, got {options.length}")
    if not 0 < options.lr < math.inf:
        parser.error(f"argument --lr: must be positive, got {options.lr}")
    if not 0 <= options.balance < math.inf:
        parser.error(f"argument --balance: must be at least 0, got {options.balance}")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"argument --out: {options.out} is a file")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"argument --device: torch {torch.__version__} finds no CUDA device here")
    if missing_extras() or importlib.util.find_spec("transformers") is None:
        parser.error("needs transformers and what draws figures: pip install 'moesaic[bench,transformers]'")
    return options


def read_text() -> bytes:
    """The text of Python's `help()` topics, every paragraph once, in order of topics.

    Raises:
        SystemExit: this Python comes without them.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError as error:
        raise SystemExit("this Python lacks pydoc_data.topics (Debian: python3-full, Fedora: python3-libs)") from error
    paragraphs = (p.strip("\n") for name in sorted(topics) for p in topics[name].split("\n\n"))
    return "\n\n".join(dict.fromkeys(paragraphs)).encode()


def build(options: Options, *, dense: bool = False) -> Any:
    """A new model, initialised as transformers does it; ``dense`` has one MLP of width k · d_ff in each layer."""
    transformers: Any = importlib.import_module("transformers")
    register_with_transformers()
    config = transformers.Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=options.d_model,
        intermediate_size=options.top_k * options.d_ff,
        moe_intermediate_size=options.d_ff,
        num_experts=options.experts,
        num_experts_per_tok=options.top_k,
        norm_topk_prob=True,
        mlp_only_layers=list(range(options.layers)) if dense else [],
        router_aux_loss_coef=options.balance,
        num_hidden_layers=options.layers,
        num_attention_heads=options.d_model // 32,
        num_key_value_heads=max(1, options.d_model // 128),
        head_dim=32,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(options.seed)
    return transformers.Qwen3MoeForCausalLM(config)
