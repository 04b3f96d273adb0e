"""Train a small mixture-of-experts language model twice, on transformers' own experts and on moesaic's, side by side.

    python examples/train_lm.py            # about 10 M parameters on the CPU; runs/train_lm has the results

The model is transformers' Qwen3-MoE, scaled down, on bytes. Its text is the documentation that `help()` prints, which
ships with Python; paragraphs that stand in several topics are kept once, so that nothing held out was trained on.

Both models start from equal weights and see equal batches, one step in turn, so that a slow minute of the machine meets
both. Three checks decide the exit code, 1 where one fails:

- on equal weights, eager's at eleven moments of its training, both compute the same loss and gradient;
- the first ten steps of the two curves are equal, within 1e-5 (relative). In both, the median counts: a tie between two
  experts that rounding decides otherwise for one token is no error, and would be the largest difference;
- the whole curves stay together. Training amplifies rounding: a gradient's last bit changes a weight, that a choice of
  expert, that the next gradient. How far that goes, `--control` measures: it trains a third model, on eager experts,
  whose embedding starts one unit in the last place higher. The allowance is a little over twice what this one needed.
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

EARLY_STEPS = 10
ALLOWED = {
    "early_relative": 1e-5,
    "largest": 0.15,
    "mean": 0.04,
    "same_weights_loss": 1e-5,
    "same_weights_gradient": 1e-4,
}
"""What the two may differ by: relative loss in the first steps (median); nats at any step, and on average over the
steps; on equal weights, relative loss and the norm of the gradients' difference over eager's (medians). Two runs of the
control, of 200 and 250 steps, needed 0.063 nats at a step and 0.015 on average."""
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
    same: list[dict[str, float]] = []
    for step in range(options.steps):
        starts = torch.randint(len(training) - options.length, (options.batch, 1), generator=generator)
        ids = training[starts + torch.arange(options.length)].to(options.device)
        for side in sides if step % 2 else reversed(sides):
            side.step(ids, learning_rate(step, options))
        if step % max(1, options.steps // 10) == 0 or step == options.steps - 1:
            same.append(on_equal_weights(sides[0], options.impl, ids) | {"step": step + 1})
            losses = ", ".join(f"{side.name} {side.losses[-1]:.4f}" for side in sides)
            say(f"step {step + 1:4d} of {options.steps}: {losses}")
    usage = usage_before
    for side in sides:
        side.held_out, found = evaluate(side.model, windows, routed=side.name != DENSE)
        usage = found if side is sides[1] else usage
    return sides, {
        "before": before,
        "usage_before": usage_before,
        "usage": usage,
        "train_bytes": len(training),
        "same": same,
    }


def on_equal_weights(eager: Side, impl: str, ids: Tensor) -> dict[str, float]:
    """How far ``impl`` is from eager on eager's weights: relative loss, and norm of the gradients' difference."""
    found = []
    for name in (EAGER, impl):
        eager.model.set_experts_implementation(name)
        loss = next_byte_loss(eager.model(input_ids=ids, use_cache=False).logits, ids)
        gradients = torch.autograd.grad(loss, [*eager.model.parameters()], allow_unused=True)
        found.append((float(loss.detach()), torch.cat([g.flatten() for g in gradients if g is not None])))
    eager.model.set_experts_implementation(EAGER)
    (loss_a, gradient_a), (loss_b, gradient_b) = found
    return {
        "loss": abs(loss_b - loss_a) / loss_a,
        "gradient": float((gradient_b - gradient_a).norm() / gradient_a.norm()),
    }


def compare(sides: Sequence[Side], same: Sequence[dict[str, float]]) -> tuple[dict[str, float], list[str]]:
    """How far the second side is from eager, by the names of `ALLOWED`, and which of these are more than allowed."""
    pairs = list(zip(sides[0].losses, sides[1].losses, strict=True))
    found = {
        "early_relative": statistics.median(abs(b - a) / abs(a) for a, b in pairs[:EARLY_STEPS]),
        "largest": max(abs(b - a) for a, b in pairs),
        "mean": statistics.fmean(abs(b - a) for a, b in pairs),
        "same_weights_loss": statistics.median(one["loss"] for one in same),
        "same_weights_gradient": statistics.median(one["gradient"] for one in same),
    }
    finite = all(math.isfinite(value) for pair in pairs for value in pair)
    wrong = [name for name, value in found.items() if not value <= ALLOWED[name]]
    return found, wrong if finite else [*wrong, "finite"]


def timing(sides: Sequence[Side]) -> dict[str, Any]:
    """Median milliseconds per step, and how many times as long eager takes: median and tenths of the steps."""
    rows = {side.name: side.seconds[WARM_UP:] or side.seconds for side in sides}
    eager = rows[EAGER]
    ratios = sorted(a / b for a, b in zip(eager, rows[sides[1].name], strict=True))
    tenth = len(ratios) // 10
    return {
        "ms_per_step": {name: 1e3 * statistics.median(values) for name, values in rows.items()},
        "eager_over_ours": {"median": statistics.median(ratios), "low": ratios[tenth], "high": ratios[-1 - tenth]},
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
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
    difference, wrong = compare(sides, found["same"])
    parameters = {side.name: sum(p.numel() for p in side.model.parameters()) for side in sides}
    result = {
        "options": asdict(options) | {"out": str(options.out)},
        "parameters": parameters,
        "text": {"bytes": len(text), "train_bytes": found["train_bytes"], "sha256": hashlib.sha256(text).hexdigest()},
        "held_out_nats": {"before": found["before"]} | {side.name: side.held_out for side in sides},
        "difference": difference | {"allowed": ALLOWED, "beyond": wrong, "same_weights": found["same"]},
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
    return 1 if wrong else 0


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

    def words(name: str) -> str:
        return f"{off[name]:.1e} ({ALLOWED[name]:g})"

    lines += [
        f"eager takes {ratio['median']:.2f} times as long as {ours} per step, "
        f"{ratio['low']:.2f} to {ratio['high']:.2f} in the middle 80 % of steps; "
        f"load average {times['load_average']:.1f}",
        f"{ours} against eager, found (allowed):",
        f"  on equal weights, {len(found['same'])} times:     loss {words('same_weights_loss')}, gradient "
        f"{words('same_weights_gradient')}, relative, median",
        f"  first {EARLY_STEPS} steps of the curve:   {words('early_relative')} relative, median",
        f"  all {options.steps} steps of the curve:    at most {words('largest')} nats, on average {words('mean')}",
    ]
    if options.control:
        control = max(abs(a - b) for a, b in zip(sides[0].losses, sides[2].losses, strict=True))
        lines.append(f"  {CONTROL} against eager: at most {control:.1e} nats")
    lines.append(
        f"BEYOND WHAT IS ALLOWED: {', '.join(off['beyond'])}" if off["beyond"] else "all within what is allowed"
    )
    for name, usage in (("before", found["usage_before"]), ("after", found["usage"])):
        effective = ", ".join(f"{v:.1f}" for v in effective_experts(usage).tolist())
        most = ", ".join(f"{v:.1f}" for v in load_imbalance(usage).tolist())
        lines.append(f"{name + ' training,':17}by layer: effective experts {effective}; busiest over mean {most}")
    return "\n".join([*lines, f"sample: {result['sample']!r}", f"results: {options.out}"])


if __name__ == "__main__":
    sys.exit(main())
