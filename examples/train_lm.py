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

import copy
import hashlib
import importlib
import importlib.metadata
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

from moesaic.bench.environment import machine, resolve_device, versions
from moesaic.bench.interleave import equal_threads
from moesaic.kernels import load_balance_loss
from moesaic.metrics import effective_experts, expert_usage, load_imbalance

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH, which this repository asks for, leaves it out
from train_lm_figures import draw_curves, draw_usage
from train_lm_setup import Options, build, parse, read_text

EARLY_STEPS, EARLY_ALLOWANCE = 10, 1e-5
ALLOWANCE = 0.05
"""Nats per byte: the most by which the curves may differ at any step."""
WARM_UP = 5
"""Steps left out of timings: compilation and the first touch of memory."""
HELD_OUT = 0.1
EAGER, CONTROL, DENSE = "eager", "eager + 1 ulp", "dense"


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
    options = parse(argv, __doc__)
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
        f"{ratio['low']:.2f} to {ratio['high']:.2f} in the middle 80 % of steps; "
        f"load average {times['load_average']:.1f}",
        f"|{ours} - eager| of the loss: at most {off['early_relative']:.1e} relative over the first "
        f"{EARLY_STEPS} steps (allowed {EARLY_ALLOWANCE:.0e}), at most {off['largest']:.1e} nats over "
        f"{options.steps} steps (allowed {ALLOWANCE:g}): {'equal' if off['agree'] else 'NOT EQUAL'}",
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
