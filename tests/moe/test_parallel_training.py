"""Training with expert parallelism in 2 processes against one process, and its checkpoints with the optimiser's state.

Functions named `check_…` run on every rank, and compute by themselves what one process gets of all ranks' tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from moesaic.moe.layer import EXPERTS, MoE
from moesaic.moe.parallel_training import clip_gradients, parameter_groups, reduce_gradients

TOKENS = (13, 29)
"""Of every rank."""
FULL = StateDictOptions(full_state_dict=True)


class Model(nn.Module):
    """A layer between two others, with more parameters than its own."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 6)
        self.last = nn.Linear(6, 6)
        self.moe = MoE(6, 5, 8, 2, bias=True, n_shared_experts=1, process_group=group)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out: Tensor = self.last(x + self.moe(x))
        return out


def tokens(rank: int) -> Tensor:
    return torch.randn(TOKENS[rank], 6, generator=torch.Generator().manual_seed(1 + rank))


def error(mine: Tensor, truth: Tensor) -> float:
    truth = truth.detach().double()
    assert mine.shape == truth.shape
    return float((mine.detach().double() - truth).abs().max() / truth.square().mean().sqrt())


def own(group: dist.ProcessGroup, full: Tensor) -> Tensor:
    return full.chunk(group.size())[group.rank()]


def local(tensor: Any) -> Tensor:
    here: Tensor = tensor.to_local()
    return here


def check_mean_and_sum_of_losses(group: dist.ProcessGroup, folder: Path) -> float:
    worst = 0.0
    for mean in (True, False):
        model, one = Model(group), Model(None).double()
        model(tokens(group.rank())).square().sum().backward()
        reduce_gradients(model, mean=mean)
        one(torch.cat([tokens(0), tokens(1)]).double()).square().sum().div(2 if mean else 1).backward()
        for name, parameter in one.named_parameters():
            mine, truth = model.get_parameter(name).grad, parameter.grad
            assert mine is not None
            assert truth is not None
            if name.removeprefix("moe.") in EXPERTS:
                mine, truth = local(mine), own(group, truth)
            worst = max(worst, error(mine, truth))
    assert worst <= 1e-5
    return worst


def check_trains_as_one_process(group: dist.ProcessGroup, folder: Path) -> float:
    total, batch = sum(TOKENS), torch.cat([tokens(0), tokens(1)])
    for foreach in (None, False, True):
        model, one = Model(group), Model(None)
        optimizers = [
            torch.optim.AdamW(parameter_groups(model), lr=0.02, foreach=foreach),
            torch.optim.AdamW(one.parameters(), lr=0.02),
        ]
        for step in range(3):
            for optimizer in optimizers:
                optimizer.zero_grad()
            (model(tokens(group.rank())).square().sum() / total).backward()
            reduce_gradients(model, mean=False)
            (one(batch).square().sum() / total).backward()
            norm, truth = clip_gradients(model, 0.1), nn.utils.clip_grad_norm_(one.parameters(), 0.1)
            assert type(norm) is Tensor
            assert truth > 0.1, step
            torch.testing.assert_close(norm, truth, rtol=1e-5, atol=0)
            for optimizer in optimizers:
                optimizer.step()
        full: dict[str, Any] = get_model_state_dict(model, options=FULL)
        errors = {name: error(full[name], value) for name, value in one.state_dict().items()}
        assert max(errors.values()) < 1e-4, errors
    path = folder / "trained"
    state: dict[str, Any] = dict(zip(("model", "optimizer"), get_state_dict(model, optimizers[0]), strict=True))
    save(state, checkpoint_id=path, process_group=group)
    fresh = Model(group)
    optimizer = torch.optim.AdamW(parameter_groups(fresh), lr=0.02)
    state = dict(zip(("model", "optimizer"), get_state_dict(fresh, optimizer), strict=True))
    load(state, checkpoint_id=path, process_group=group)
    set_state_dict(fresh, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    mine, theirs = optimizer.state[fresh.moe.up], optimizers[0].state[model.moe.up]
    assert torch.equal(local(mine["exp_avg"]), local(theirs["exp_avg"]))
    assert local(mine["exp_avg"]).any()
    assert torch.equal(local(fresh.moe.up), local(model.moe.up))
    return max(errors.values())


def check_a_gradient_that_one_rank_lacks(group: dist.ProcessGroup, folder: Path) -> None:
    model = Model(group)
    model(tokens(group.rank())).sum().backward()
    model.last.bias.grad = None
    model.first.bias.grad = torch.ones(6) if group.rank() == 1 else None
    reduce_gradients(model, mean=False)
    assert model.last.bias.grad is None
    assert model.first.bias.grad is not None
    assert torch.equal(model.first.bias.grad, torch.ones(6))


CHECKS = [name for name in globals() if name.startswith("check_")]


@pytest.mark.parametrize("name", CHECKS)
def test_2_ranks(run_ranks: Callable[..., Any], name: str) -> None:
    run_ranks(2, CHECKS).values(name)


def test_a_group_of_this_process_alone(alone: dist.ProcessGroup) -> None:
    model, one = Model(alone), Model(None)
    for each in (model, one):
        each(tokens(0)).square().mean().backward()
    model.last.bias.grad = None
    reduce_gradients(model)
    assert one.last.bias.grad is not None
    one.last.bias.grad = None
    truth = nn.utils.clip_grad_norm_(one.parameters(), 0.1)
    torch.testing.assert_close(clip_gradients(model, 0.1), truth)
    torch.testing.assert_close(local(model.moe.up.grad), one.moe.up.grad)
    assert [len(group["params"]) for group in parameter_groups(model)] == [9, 4]
    model.extra = nn.Parameter(model.moe.up.detach())
    with pytest.raises(ValueError, match=r"beside experts; got a DTensor of shape \(8, 10, 6\)"):
        reduce_gradients(model)


def test_helpers_ask_for_expert_parallelism() -> None:
    for helper in (parameter_groups, reduce_gradients, lambda module: clip_gradients(module, 1.0)):
        with pytest.raises(ValueError, match=r"module must have MoE layers with process_group, .* got 0 groups"):
            helper(Model(None))
