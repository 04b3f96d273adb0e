"""Train a small mixture-of-experts language model twice, on transformers' own experts and on moesaic's, side by side.

    python examples/train_lm.py            # about 10 M parameters on the CPU; runs/train_lm has the results

The model is transformers' Qwen3-MoE, scaled down, on bytes. Its text is the documentation that `help()` prints, which
ships with Python; paragraphs that stand in several topics are kept once, so that nothing held out was trained on.

Both models start from equal weights and see equal batches, one step in turn, so that a slow minute of the machine meets
both. The curves must agree: within 1e-5 (relative) over the first steps, before training amplifies rounding, and within
`ALLOWANCE` over the whole curve. Otherwise the exit code is 1. `--control` measures what the allowance has to bear: it
trains a third model, on eager experts, whose embedding starts one unit in the last place higher.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib
import importlib.util
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.bench.environment import DEVICES, machine, missing_extras, resolve_device, versions
from moesaic.bench.interleave import equal_threads
from moesaic.kernels import load_balance_loss
from moesaic.metrics import effective_experts, expert_usage, load_imbalance
from moesaic.moe import register_with_transformers

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH, which this repository asks for, leaves it out
from train_lm_figures import draw_curves, draw_usage

EARLY_STEPS, EARLY_ALLOWANCE = 10, 1e-5
ALLOWANCE = 0.05
"""Nats per byte: the most by which the curves may differ at any step."""
WARM_UP = 5
"""Steps left out of timings: compilation and the first touch of memory."""
HELD_OUT = 0.1
IMPLEMENTATIONS = ("eager", "moesaic", "grouped_mm", "batched_mm")
EAGER, CONTROL, DENSE = "eager", "eager + 1 ulp", "dense"


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


def parse(argv: Sequence[str] | None) -> Options:
    """Options from the command line; exits with code 2 and the argument's name where one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    counts = {
        "d-model": (256, "width of the model, a multiple of 32"),
        "layers": (4, "number of layers"),
        "experts": (32, "experts per layer"),
        "top-k": (2, "experts per token"),
        "d-ff": (96, "width of an expert"),
        "batch": (8, "sequences per step"),
        "length": (128, "bytes per sequence"),
        "steps": (250, "training steps"),
        "threads": (torch.get_num_threads(), "threads of the CPU; fewer than cores are faster on a busy machine"),
    }
    for name, (default, words) in counts.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{words} ({default})")
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
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(options.seed)
    return transformers.Qwen3MoeForCausalLM(config)


@dataclass
class Side:
    """A model in training, its loss and seconds of each step."""

    name: str
    model: Any
    options: Options
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    held_out: float = math.nan

    def __post_init__(self) -> None:
        """Make the optimiser."""
        self.model.to(self.options.device).train()
        parameters = self.model.parameters()
        self.optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(self, ids: Tensor, lr: float) -> None:
        """One step on sequences ids (batch, length), timed."""
        wait(self.options.device)
        start = time.perf_counter()
        balance = 0.0 if self.name == DENSE else self.options.balance
        out = self.model(input_ids=ids, use_cache=False, output_router_logits=balance > 0)
        loss = next_byte_loss(out.logits, ids)
        if balance:
            # Layer by layer: transformers' own sums the layers first, where one's favourites hide another's.
            k = self.model.config.num_experts_per_tok
            each = [load_balance_loss(logits, logits.topk(k, dim=-1).indices) for logits in out.router_logits]
            total = loss + balance * torch.stack(each).mean()
        (total if balance else loss).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(float(loss.detach()))
        wait(self.options.device)
        self.seconds.append(time.perf_counter() - start)


def wait(device: str) -> None:
    """Until the device has done what it was asked to."""
    if device == "cuda":
        torch.cuda.synchronize()


def next_byte_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross entropy of the next byte, in nats."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def learning_rate(step: int, options: Options) -> float:
    """Linear warm-up over the first twentieth, then a cosine to a tenth."""
    rise = max(1, options.steps // 20)
    fall = max(0.0, (step - rise) / max(1, options.steps - rise))
    return options.lr * min(1.0, (step + 1) / rise) * (0.55 + 0.45 * math.cos(math.pi * fall))


@torch.no_grad()
def evaluate(model: Any, windows: Tensor, *, routed: bool) -> tuple[float, Tensor]:
    """Held-out loss over windows (N, length) in nats per byte, and the usage of experts (layers, experts)."""
    model.eval()
    losses, ids = [], []
    for part in windows.split(32):
        out = model(input_ids=part, use_cache=False, output_router_logits=routed)
        losses.append(next_byte_loss(out.logits, part) * len(part))
        if routed:
            k = model.config.num_experts_per_tok
            ids.append(torch.stack([logits.topk(k, dim=-1).indices for logits in out.router_logits]))
    model.train()
    usage = expert_usage(torch.cat(ids, dim=1).cpu(), model.config.num_experts) if routed else torch.zeros(0)
    return float(torch.stack(losses).sum()) / len(windows), usage


def train(options: Options, text: bytes, say: Callable[[str], None]) -> tuple[list[Side], dict[str, Any]]:
    """Train all sides in turn; eager is the first, the one it is compared with the second."""
    data = torch.tensor(list(text), dtype=torch.int64)
    training = data[: round((1 - HELD_OUT) * len(data))]
    held_out = data[len(training) :]
    windows = held_out[: len(held_out) // options.length * options.length].view(-1, options.length).to(options.device)
    first = build(options)
    sides = [Side(EAGER, copy.deepcopy(first), options), Side(options.impl, copy.deepcopy(first), options)]
    if options.control:
        changed = copy.deepcopy(first)
        with torch.no_grad():
            weight = changed.get_input_embeddings().weight
            weight.copy_(torch.nextafter(weight, torch.full_like(weight, math.inf)))
        sides.append(Side(CONTROL, changed, options))
    if options.dense:
        sides.append(Side(DENSE, build(options, dense=True), options))
    for side in sides:
        side.model.set_experts_implementation(options.impl if side is sides[1] else EAGER)
    first.save_pretrained(options.out / "initial")
    before, usage_before = evaluate(sides[1].model, windows, routed=True)
    say(f"held out before training: {before:.3f} nats per byte")
    generator = torch.Generator().manual_seed(options.seed)
    for step in range(options.steps):
        starts = torch.randint(len(training) - options.length, (options.batch, 1), generator=generator)
        ids = training[starts + torch.arange(options.length)].to(options.device)
        for side in sides if step % 2 else reversed(sides):
            side.step(ids, learning_rate(step, options))
        if step % max(1, options.steps // 10) == 0 or step == options.steps - 1:
            losses = ", ".join(f"{side.name} {side.losses[-1]:.4f}" for side in sides)
            say(f"step {step + 1:4d} of {options.steps}: {losses}")
    usage = usage_before
    for side in sides:
        side.held_out, found = evaluate(side.model, windows, routed=side.name != DENSE)
        usage = found if side is sides[1] else usage
    return sides, {"before": before, "usage_before": usage_before, "usage": usage, "train_bytes": len(training)}


def compare(sides: Sequence[Side]) -> tuple[dict[str, float], bool]:
    """How far the second side's curve is from eager's, and whether that is within the allowances."""
    pairs = list(zip(sides[0].losses, sides[1].losses, strict=True))
    found = {
        "early_relative": max(abs(b - a) / abs(a) for a, b in pairs[:EARLY_STEPS]),
        "largest": max(abs(b - a) for a, b in pairs),
        "mean": statistics.fmean(abs(b - a) for a, b in pairs),
    }
    finite = all(math.isfinite(value) for pair in pairs for value in pair)
    return found, finite and found["early_relative"] <= EARLY_ALLOWANCE and found["largest"] <= ALLOWANCE


def timing(sides: Sequence[Side]) -> dict[str, Any]:
    """Median milliseconds per step, and how many times as long eager takes: median and tenths of the steps."""
    rows = {side.name: side.seconds[WARM_UP:] or side.seconds for side in sides}
    eager = rows[EAGER]
    ratios = sorted(a / b for a, b in zip(eager, rows[sides[1].name], strict=True))
    tenth = len(ratios) // 10
    return {
        "ms_per_step": {name: 1e3 * statistics.median(values) for name, values in rows.items()},
        "eager_over_ours": {"median": statistics.median(ratios), "low": ratios[tenth], "high": ratios[-1 - tenth]},
        "load_average": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
    }


def sample(model: Any, options: Options, prompt: str = "The ") -> str:
    """What the model writes after a prompt, drawn with the seed."""
    model.eval()
    ids = torch.tensor([list(prompt.encode())], device=options.device)
    torch.manual_seed(options.seed)
    drawn = model.generate(ids, max_new_tokens=160, do_sample=True, temperature=0.7, top_k=0)
    return bytes(drawn[0].tolist()).decode(errors="replace")


def main(argv: Sequence[str] | None = None) -> int:
    """Train, compare, save; 0 where the curves agree, 1 where they do not."""
    options = parse(argv)
    options = Options(**(asdict(options) | {"device": resolve_device(options.device)}))
    importlib.import_module("transformers").utils.logging.disable_progress_bar()
    text = read_text()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "text.txt").write_bytes(text)
    start = time.perf_counter()

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - start:5.0f} s] {line}", file=sys.stderr, flush=True)

    torch.set_num_threads(options.threads)
    with equal_threads():
        sides, found = train(options, text, say)
        times = timing(sides)
        written = sample(sides[1].model, options)
    difference, agree = compare(sides)
    parameters = {side.name: sum(p.numel() for p in side.model.parameters()) for side in sides}
    result = {
        "options": asdict(options) | {"out": str(options.out)},
        "parameters": parameters,
        "text": {"bytes": len(text), "train_bytes": found["train_bytes"], "sha256": hashlib.sha256(text).hexdigest()},
        "held_out_nats": {"before": found["before"]} | {side.name: side.held_out for side in sides},
        "difference": difference | {"early_allowance": EARLY_ALLOWANCE, "allowance": ALLOWANCE, "agree": agree},
        "timing": times,
        "usage": {"before": found["usage_before"].tolist(), "after": found["usage"].tolist()},
        "sample": written,
        "seconds_in_all": time.perf_counter() - start,
        "machine": machine(),
        "versions": versions() | {"transformers": importlib.metadata.version("transformers")},
        "losses": {side.name: side.losses for side in sides},
        "step_seconds": {side.name: side.seconds for side in sides},
    }
    (options.out / "curve.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    sides[1].model.save_pretrained(options.out / "model")
    if options.dense:
        sides[-1].model.save_pretrained(options.out / "dense")
    draw_curves(result, options.out)
    draw_usage(found["usage_before"], found["usage"], options.out)
    print(report(result, sides, found))
    return 0 if agree else 1


def report(result: dict[str, Any], sides: Sequence[Side], found: dict[str, Any]) -> str:
    """What a reader wants to know, as text."""
    options, times, ours = sides[0].options, result["timing"], sides[1].name
    tokens = options.batch * options.length
    lines = [f"{'':16}parameters  ms/step  tokens/s  train loss  held out, nats  bits per byte"]
    for side in sides:
        ms, tail = times["ms_per_step"][side.name], statistics.fmean(side.losses[-20:])
        lines.append(
            f"{side.name:16}{result['parameters'][side.name]:10,}{ms:9.0f}{1e3 * tokens / ms:10,.0f}{tail:12.3f}"
            f"{side.held_out:16.3f}{side.held_out / math.log(2):15.3f}"
        )
    ratio, off = times["eager_over_ours"], result["difference"]
    lines += [
        f"eager takes {ratio['median']:.2f} times as long as {ours} per step, "
        f"{ratio['low']:.2f} to {ratio['high']:.2f} in the middle 80 % of steps; load average {times['load_average']:.1f}",
        f"|{ours} - eager| of the loss: at most {off['early_relative']:.1e} relative over the first {EARLY_STEPS} steps "
        f"(allowed {EARLY_ALLOWANCE:.0e}), at most {off['largest']:.1e} nats over {options.steps} steps "
        f"(allowed {ALLOWANCE:g}): {'equal' if off['agree'] else 'NOT EQUAL'}",
    ]
    if options.control:
        control = max(abs(a - b) for a, b in zip(sides[0].losses, sides[2].losses, strict=True))
        lines.append(f"|{CONTROL} - eager|: at most {control:.1e} nats")
    for name, usage in (("before", found["usage_before"]), ("after", found["usage"])):
        effective = ", ".join(f"{v:.1f}" for v in effective_experts(usage).tolist())
        most = ", ".join(f"{v:.1f}" for v in load_imbalance(usage).tolist())
        lines.append(f"{name + ' training,':17}by layer: effective experts {effective}; busiest over mean {most}")
    return "\n".join([*lines, f"sample: {result['sample']!r}", f"results: {options.out}"])


if __name__ == "__main__":
    sys.exit(main())
