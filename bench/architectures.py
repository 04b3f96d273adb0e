"""Every architecture on transformers' experts interface: moesaic's experts against eager's, in a tiny random model.

python -m moesaic.bench.architectures --out docs/transformers.md
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.bench.interleave import equal_threads
from moesaic.bench.tiny_models import (
    Architecture,
    build,
    experts_of,
    find_architectures,
    find_others,
    generation_options,
)
from moesaic.moe import hf

STEPS, LEARNING_RATE, NEW_TOKENS = 2, 0.1, 3
ALLOWANCE = 1e-4
"""Largest error of float32 logits and gradients, over the RMS of eager's tensor."""
FELT = 100 * ALLOWANCE
"""What one dropped expert must move the logits by at least, for an error below the allowance to mean anything."""


@dataclass(frozen=True)
class Comparison:
    """What one architecture's tiny model computes with moesaic's experts, against the same model with eager's.

    Errors of logits and gradients are the largest difference over the RMS of eager's tensor. `dropped_error` is that of
    logits without one of the experts, `loss_error` that of the losses of two training steps. The two `bf16` errors are
    RMS, under autocast, against the float32 logits: of moesaic's experts, and of eager's.
    """

    architecture: Architecture
    model: str
    gate: str
    layout: str
    path: str
    logits_error: float
    gradient_error: float
    worst_parameter: str
    dropped_error: float
    losses: list[float]
    loss_error: float
    generates: bool | None
    bf16: float
    bf16_eager: float

    def wrong(self) -> list[str]:
        """Return what is outside its allowance, nothing if all is well."""
        found = []
        if not max(self.logits_error, self.gradient_error, self.loss_error) < ALLOWANCE:
            found.append(
                f"error of logits {self.logits_error:.1e}, of the gradient of {self.worst_parameter} "
                f"{self.gradient_error:.1e}, of losses {self.loss_error:.1e}: more than {ALLOWANCE:.0e}"
            )
        if not self.dropped_error > FELT:
            found.append(f"a dropped expert moves the logits by no more than {self.dropped_error:.1e}")
        if not (all(map(math.isfinite, self.losses)) and self.losses[-1] < self.losses[0]):
            found.append(f"losses {self.losses}")
        if self.generates is False:
            found.append("other greedy tokens than eager's")
        if not self.bf16 < 2.0 * self.bf16_eager + 1e-3:
            found.append(f"error under autocast {self.bf16:.1e}, eager's {self.bf16_eager:.1e}")
        return found


def scaled_error(value: Tensor, truth: Tensor) -> float:
    """Return the largest difference over the truth's RMS."""
    if not truth.numel():
        return 0.0
    value, truth = value.detach(), truth.detach()
    return float((value - truth).abs().max() / truth.square().mean().sqrt().clamp_min(1e-30))


def _rms_error(value: Tensor, truth: Tensor) -> float:
    return float((value - truth).square().mean().sqrt() / truth.square().mean().sqrt())


def logits_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return the model's logits, or the last hidden states of one without a head."""
    torch.manual_seed(0)  # dropout, a router's noise, a canvas to denoise
    outputs = model(**inputs)
    logits: Tensor = outputs.logits if "logits" in outputs else outputs.last_hidden_state
    return logits


def logits_and_gradients(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits, and every parameter's gradient for a random upstream gradient."""
    model.zero_grad()
    logits = logits_of(model, inputs)
    logits.backward(torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)))
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@contextlib.contextmanager
def replaced(wrapper: Any) -> Iterator[None]:
    """Let moesaic's experts call `wrapper(expert_mlp, …)` in place of `expert_mlp(…)`."""
    with mock.patch.object(hf, "expert_mlp", functools.partial(wrapper, vars(hf)["expert_mlp"])):
        yield


@contextlib.contextmanager
def watched(model: Any, architecture: Architecture) -> Iterator[tuple[list[Any], list[Any]]]:
    """Record the experts modules that run, and the activation of every call of moesaic's `expert_mlp`."""
    ran: list[Any] = []
    activations: list[Any] = []

    def spy(real: Any, *arguments: Any, **options: Any) -> Tensor:
        activations.append(options["activation"])
        result: Tensor = real(*arguments, **options)
        return result

    hooks = [m.register_forward_pre_hook(lambda module, _: ran.append(module)) for m in experts_of(model, architecture)]
    try:
        with replaced(spy):
            yield ran, activations
    finally:
        for hook in hooks:
            hook.remove()


def drop_an_expert(real: Any, x: Tensor, up: Tensor, down: Tensor, weights: Tensor, ids: Tensor, **options: Any) -> Any:
    """Skip the expert that the first token chose first."""
    return real(x, up, down, weights, ids.masked_fill(ids == ids[0, 0], up.shape[0]), **options)


def train(model: Any, inputs: dict[str, Tensor]) -> list[float]:
    """Take two SGD steps on random targets; return the losses before, between and after, and undo the steps."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for step in range(STEPS + 1):
        rows = logits_of(model, inputs).flatten(0, -2).float()
        targets = torch.randint(0, rows.shape[1], (rows.shape[0],), generator=torch.Generator().manual_seed(2))
        loss = F.cross_entropy(rows, targets)
        losses.append(float(loss.detach()))
        if step < STEPS:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    model.load_state_dict(before)
    return losses


def generate(model: Any, inputs: dict[str, Tensor], options: dict[str, Any]) -> Tensor | None:
    """Return greedily chosen tokens, or None for a class that cannot generate."""
    if not model.can_generate():
        return None
    torch.manual_seed(0)  # of the parts that sample all the same
    out = model.generate(**inputs, **options, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    tokens: Tensor = getattr(out, "sequences", out)
    return tokens


def compare(architecture: Architecture) -> Comparison:
    """Run a tiny model of an architecture with eager's experts, then with moesaic's.

    Raises:
        LookupError: no tiny model of it can be built.
        RuntimeError: an experts module did not run through moesaic, or other parameters got a gradient.
    """
    hf.register_with_transformers()
    model, inputs = build(architecture)

    def run() -> tuple[Any, ...]:
        logits, gradients = logits_and_gradients(model, inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            half = logits_of(model, inputs).float()
        tokens = generate(model, inputs, generation_options(architecture))
        return logits, gradients, train(model, inputs), tokens, half

    model.set_experts_implementation("eager")
    logits, gradients, losses, tokens, half = run()
    model.set_experts_implementation(hf.NAME)
    with watched(model, architecture) as (ran, activations):
        our_logits, our_gradients, our_losses, our_tokens, our_half = run()
    with replaced(drop_an_expert), torch.no_grad():
        without_one = logits_of(model, inputs)

    experts = experts_of(model, architecture)
    if {id(module) for module in ran} != {id(module) for module in experts} or len(ran) != len(activations):
        raise RuntimeError(f"{len(activations)} of {len(ran)} calls of {len(experts)} experts went through moesaic")
    if our_gradients.keys() != gradients.keys():
        raise RuntimeError(f"gradients of other parameters than eager's: {our_gradients.keys() ^ gradients.keys()}")
    errors = {name: scaled_error(our_gradients[name], gradient) for name, gradient in gradients.items()}
    worst = max(errors, key=lambda name: errors[name])
    paths = {activation if isinstance(activation, str) else None for activation in activations}
    fused = "per step" if getattr(experts[0], "has_post_expert_norm", False) else "fused"
    return Comparison(
        architecture=architecture,
        model=type(model).__name__,
        gate=gate_of(experts[0]),
        layout=layout_of(experts[0]),
        path=", ".join(sorted(f"{fused}: `{path}`" if path else "per step: its own gate" for path in paths)),
        logits_error=scaled_error(our_logits, logits),
        gradient_error=errors[worst],
        worst_parameter=worst,
        dropped_error=scaled_error(without_one, logits),
        losses=our_losses,
        loss_error=max(abs(ours - theirs) / abs(theirs) for ours, theirs in zip(our_losses, losses, strict=True)),
        generates=None if tokens is None else torch.equal(tokens, our_tokens),
        bf16=_rms_error(our_half, logits),
        bf16_eager=_rms_error(half, logits),
    )


def gate_of(experts: Any) -> str:
    """Name the activation of an experts module, and whether it overrides the interface's gate."""
    act = f"`{type(experts.act_fn).__name__}`" if hasattr(experts, "act_fn") else ""
    own = experts.has_gate and type(experts)._apply_gate.__module__ == type(experts).__module__
    return " in ".join(filter(None, [act, "its own `_apply_gate`" if own else ""]))


def layout_of(experts: Any) -> str:
    """Name the flags of the interface that an experts module sets."""
    flags = {
        "transposed": experts.is_transposed,
        "interleaved": not experts.is_concatenated,
        "bias": experts.has_bias,
        "no gate": not experts.has_gate,
        "post norm": getattr(experts, "has_post_expert_norm", False),
    }
    return ", ".join(name for name, is_set in flags.items() if is_set)


def document(comparisons: Sequence[Comparison], others: Sequence[str]) -> str:
    """Return the page of the documentation that lists the architectures."""
    version = importlib.import_module("transformers").__version__
    rows = [
        (
            f"`{c.architecture.model_type}`", f"`{c.model}`", f"`{c.architecture.experts}`", c.gate, c.layout, c.path,
            f"{c.logits_error:.0e}", f"{c.gradient_error:.0e}", f"{c.losses[0] - c.losses[-1]:.1e}",
            {True: "yes", False: "no", None: "has no `generate`"}[c.generates],
            f"{c.bf16:.0e} / {c.bf16_eager:.0e}",
        )
        for c in comparisons
    ]  # fmt: skip
    header = ("model type", "model", "experts", "gate", "layout", "path", "logits", "gradients", "trains", "generates")
    table = [(*header, "bf16"), (":--",) * (len(header) + 1), *rows]
    lines = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    return PAGE.format(
        version=version,
        torch=torch.__version__,
        count=len(comparisons),
        types=len({c.architecture.model_type for c in comparisons}),
        allowance=ALLOWANCE,
        logits=max(c.logits_error for c in comparisons),
        gradients=max(c.gradient_error for c in comparisons),
        table=lines,
        others=", ".join(f"`{name}`" for name in others),
    )


PAGE = """# Architectures of transformers

`experts_implementation="moesaic"` in transformers {version}, with PyTorch {torch} on a CPU: {count} experts classes of
{types} model types, which are all that the experts interface has. `make architectures` finds them, runs them and writes
this page; `tests/moe/test_hf_architectures.py` does the same and holds the page to the list.

Each is a tiny model with random weights. The same model runs with eager's experts and with moesaic's, in float32:

- **path**: the fused op with a named activation, or one op per step where each expert's output has a norm, or no named
  activation equals the module's gate, which then runs itself.
- **logits**, **gradients**: the largest difference over the RMS of eager's tensor, of all parameters the worst. Up to
  {allowance:.0e} is allowed; the largest are {logits:.1e} and {gradients:.1e}. A dropped expert moves every model's
  logits by more than a hundred times the allowance.
- **trains**: how much the loss falls in two steps of SGD, the same as with eager's experts.
- **generates**: three greedy tokens, the same as with eager's experts.
- **bf16**: RMS error of the logits under bfloat16 autocast against float32's, of moesaic's experts / of eager's.

{table}

## What is refused, by name

- A flag of the interface that this version of moesaic does not know, set to anything but its default.
- Weights that are not float64, float32, bfloat16 or float16: quantised experts have registries of their own.
- Routing weights that are not one per chosen expert.

`laguna` with `moe_apply_router_weight_on_input=True` is refused by transformers itself.

## What is not on the interface

These have experts of their own making, which `set_experts_implementation` leaves as they are without a word:
{others}. Of these, `llama4` multiplies what goes into an expert by the routing weight, not what comes out of it.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Compare every architecture, write the page, and return 1 if one is outside its allowance."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the page here")
    options = parser.parse_args(argv)
    comparisons, failed = [], False
    torch.set_num_threads(1)
    with equal_threads():
        for architecture in find_architectures():
            comparison = compare(architecture)
            wrong = comparison.wrong()
            failed |= bool(wrong)
            print(architecture.model_type, architecture.experts, "; ".join(wrong) or "ok", flush=True)
            comparisons.append(comparison)
    if options.out and not failed:
        options.out.write_text(document(comparisons, find_others()), encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
