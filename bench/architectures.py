"""Every architecture on transformers' experts interface: moesaic's experts against eager's, in a tiny random model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.bench.tiny_models import Architecture, build, experts_of, generation_options
from moesaic.moe import hf

STEPS, LEARNING_RATE, NEW_TOKENS = 2, 0.1, 3


@dataclass(frozen=True)
class Comparison:
    """What one architecture's tiny model computes with moesaic's experts, against the same model with eager's.

    Errors are the largest difference over the RMS of eager's tensor.
    """

    architecture: Architecture
    model: str
    activation: str
    layout: str
    path: str
    logits_error: float
    gradient_error: float
    worst_parameter: str
    loss_error: float
    trained: float
    generated: bool | None
    autocast_error: float


def scaled_error(value: Tensor, truth: Tensor) -> float:
    """Return the largest difference over the truth's RMS."""
    if not truth.numel():
        return 0.0
    return float((value - truth).abs().max() / truth.square().mean().sqrt().clamp_min(1e-30))


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
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=logits.dtype)
    logits.backward(upstream)
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@contextlib.contextmanager
def watched(model: Any, architecture: Architecture) -> Iterator[tuple[list[Any], list[Any]]]:
    """Record the experts modules that run, and the activation of every call of moesaic's `expert_mlp`."""
    ran: list[Any] = []
    activations: list[Any] = []
    real = hf.expert_mlp

    def spy(*args: Any, **options: Any) -> Tensor:
        activations.append(options["activation"])
        return real(*args, **options)

    hooks = [m.register_forward_pre_hook(lambda module, _: ran.append(module)) for m in experts_of(model, architecture)]
    hf.expert_mlp = spy
    try:
        yield ran, activations
    finally:
        hf.expert_mlp = real
        for hook in hooks:
            hook.remove()


def train(model: Any, inputs: dict[str, Tensor]) -> list[float]:
    """Take two SGD steps on random targets; return the losses before, between and after, and leave the model as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for step in range(STEPS + 1):
        logits = logits_of(model, inputs)
        rows = logits.flatten(0, -2)
        targets = torch.randint(0, rows.shape[1], (rows.shape[0],), generator=torch.Generator().manual_seed(2))
        loss = F.cross_entropy(rows.float(), targets)
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
    if not getattr(model, "can_generate", lambda: False)():
        return None
    torch.manual_seed(0)  # of the parts that sample all the same
    out = model.generate(**inputs, **options, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    tokens: Tensor = getattr(out, "sequences", out)
    return tokens


def compare(architecture: Architecture) -> Comparison:
    """Run a tiny model of an architecture with eager's experts, then with moesaic's.

    Raises:
        LookupError: no tiny model of it can be built.
        AssertionError: an experts module did not run through moesaic, or other parameters got a gradient.
    """
    hf.register_with_transformers()
    model, inputs = build(architecture)

    def run() -> tuple[Any, ...]:
        logits, gradients = logits_and_gradients(model, inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            half = logits_of(model, inputs)
        return logits, gradients, train(model, inputs), generate(model, inputs, generation_options(architecture)), half

    model.set_experts_implementation("eager")
    logits, gradients, losses, tokens, half = run()
    model.set_experts_implementation(hf.NAME)
    with watched(model, architecture) as (ran, activations):
        ours, our_gradients, our_losses, our_tokens, our_half = run()
    experts = experts_of(model, architecture)
    if {id(module) for module in ran} != {id(module) for module in experts} or len(ran) != len(activations):
        raise AssertionError(f"{len(activations)} of {len(ran)} calls of {len(experts)} experts modules went through moesaic")
    if our_gradients.keys() != gradients.keys():
        raise AssertionError(f"gradients of different parameters: {our_gradients.keys() ^ gradients.keys()}")
    errors = {name: scaled_error(our_gradients[name], gradient) for name, gradient in gradients.items()}
    worst = max(errors, key=lambda name: errors[name])
    paths = {activation if isinstance(activation, str) else "fallback" for activation in activations}
    return Comparison(
        architecture=architecture,
        model=type(model).__name__,
        activation="",
        layout="",
        path=", ".join(sorted(paths)),
        logits_error=scaled_error(ours, logits),
        gradient_error=errors[worst],
        worst_parameter=worst,
        loss_error=max(abs(a - b) / abs(b) for a, b in zip(our_losses, losses, strict=True)),
        trained=losses[-1] - losses[0],
        generated=None if tokens is None else torch.equal(tokens, our_tokens),
        autocast_error=scaled_error(our_half.float(), half.float()),
    )
