"""The whole layer with its Triton kernels, in the interpreter: equal to the CPU's, and nothing is read by the host."""

from __future__ import annotations

import copy
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from moesaic import kernels
from moesaic.moe import MoE, layer

LAYERS: list[dict[str, Any]] = [
    {"top_k": 2},
    {"top_k": 2, "gate": "sigmoid", "bias": True, "n_shared_experts": 1, "balance": "bias", "activation": "gpt_oss"},
    {"top_k": 3, "gate": "switch", "balance": "aux", "capacity_factor": 0.7, "activation": "relu2"},
    {"top_k": 1, "gate": "switch", "d_ff": 3},
]


def problem(**options: Any) -> tuple[MoE, Tensor, Tensor]:
    torch.manual_seed(0)
    moe = MoE(**{"d_model": 24, "d_ff": 17, "n_experts": 5, **options})
    return moe, torch.randn(2, 4, 24), torch.randn(2, 4, 24)


def run(moe: MoE, x: Tensor, upstream: Tensor) -> list[Tensor]:
    """The layer's output and all gradients, the balance loss among what is differentiated."""
    x = x.clone().requires_grad_()
    y = moe(x)
    losses = [y] if moe.last_routing is None else [y, moe.last_routing.load_balance_loss]
    grads = torch.autograd.grad(
        losses, [x, *moe.parameters()], [upstream, torch.tensor(3.0)][: len(losses)], materialize_grads=True
    )
    return [y.detach(), *grads]


READS = ("item", "tolist", "nonzero", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__iter__")
"""How a value of a tensor gets to the host, where it is asked for by code of this library."""


@contextmanager
def reads() -> Iterator[list[str]]:
    """Record who of moesaic asks a tensor for its values; the interpreter itself may."""
    seen: list[str] = []
    ours = [str(Path(inspect.getfile(module)).parent) for module in (kernels, layer)]

    def guarded(name: str, true: Callable[..., Any]) -> Callable[..., Any]:
        def method(*args: Any, **keywords: Any) -> Any:
            if str(Path(sys._getframe(1).f_code.co_filename).parent) in ours:
                seen.append(f"{sys._getframe(1).f_code.co_qualname}: {name}")
            return true(*args, **keywords)

        return method

    with ExitStack() as stack:
        for name in READS:
            stack.enter_context(patch.object(Tensor, name, guarded(name, getattr(Tensor, name))))
        yield seen


def equals_the_cpu_and_reads_nothing() -> list[str]:
    """Output, gradients and load of every kind of layer; no tensor is asked for its values: nothing waits for a GPU."""
    found = []
    for options in LAYERS:
        moe, x, upstream = problem(**options)
        other = copy.deepcopy(moe)
        os.environ["MOESAIC_BACKEND"] = "cpu"
        truth = run(moe, x, upstream)
        os.environ["MOESAIC_BACKEND"] = "triton"
        with reads() as seen:
            got = run(other, x, upstream)
            loads = [one.balance_load.clone() for one in (moe, other) if one.balance_load is not None]
            if loads:
                other.update_balance()
        found += [f"{options}: {who}" for who in sorted(set(seen))]
        names = ["y", "x", *dict(moe.named_parameters())]
        for name, mine, theirs in zip(names, got, truth, strict=True):
            size = theirs.square().mean().sqrt().clamp_min(1e-12)
            if not (mine - theirs).abs().max() / size < 2e-5:
                found.append(f"{options}: {name}")
        if loads and not torch.equal(*loads):
            found.append(f"{options}: load")
    return found


def a_read_is_seen() -> list[str]:
    """The same finds what a CPU's twin reads, and one value read in the layer."""
    found = []
    moe, x, upstream = problem(**LAYERS[0])
    with reads() as seen:
        run(moe, x, upstream)
    if not any("numpy" in who for who in seen):
        found.append("the CPU's twin is not seen")
    os.environ["MOESAIC_BACKEND"] = "triton"
    true = kernels.group_by_expert

    def asking(*args: Any) -> Any:
        grouping = true(*args)
        exec(compile("grouping.counts.max().item()", layer.__file__, "exec"))
        return grouping

    moe, x, upstream = problem(top_k=1, balance="bias", d_ff=3)
    with patch.object(layer, "group_by_expert", asking), reads() as seen:
        run(moe, x, upstream)
    if not any(who.endswith(": item") for who in seen):
        found.append("an item() of the layer is not seen")
    return found


PROGRAMS = {function.__name__: function for function in (equals_the_cpu_and_reads_nothing, a_read_is_seen)}


@pytest.mark.parametrize("name", PROGRAMS)
def test_interpreted(name: str, interpret: Callable[[str], None]) -> None:
    interpret(name)
