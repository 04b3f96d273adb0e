"""Data parallelism around a layer without process_group: DistributedDataParallel and fully_shard in 2 processes.

Functions named `check_…` run on every rank, and compute by themselves what one process gets of all ranks' tokens.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from moesaic.moe.layer import MoE

FULL = StateDictOptions(full_state_dict=True)
N_TOKENS = 24
"""Of every rank: the mean over ranks of their means is the mean of all."""


class Model(nn.Module):
    """A layer of every kind of parameter, between two others; 7 experts do not divide by 2 ranks."""

    def __init__(self, balance: str = "bias", seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(6, 6)
        self.moe = MoE(6, 5, 7, 2, gate="sigmoid", bias=True, n_shared_experts=1, balance=balance)
        self.last = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out: Tensor = self.last(x + self.moe(x))
        return out


def tokens(rank: int, step: int = 0) -> Tensor:
    return torch.randn(N_TOKENS, 6, generator=torch.Generator().manual_seed(1 + rank + 10 * step))


def everyone(size: int, step: int = 0) -> Tensor:
    return torch.cat([tokens(rank, step) for rank in range(size)])


def error(mine: Tensor, truth: Tensor) -> float:
    truth = truth.detach().double()
    assert mine.shape == truth.shape
    return float((mine.detach().double() - truth).abs().max() / truth.square().mean().sqrt().clamp(min=1e-30))


def sharded(group: dist.ProcessGroup, model: Model) -> Model:
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("data",))
    fully_shard(model.moe, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def full(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def parallel(group: dist.ProcessGroup, how: str, model: Model) -> tuple[nn.Module, Model]:
    """The module to call, and the one inside it."""
    if how == "ddp":
        return DistributedDataParallel(model, process_group=group), model
    return sharded(group, model), model


def equals_one_process(group: dist.ProcessGroup, how: str) -> float:
    rank, size = group.rank(), group.size()
    outer, model = parallel(group, how, Model())
    worst = 0.0
    for dtype in (torch.float64, torch.float32):
        one = Model().to(dtype)
        truth = one(everyone(size).to(dtype))
        truth.square().mean().backward()
        outer.zero_grad()
        y = outer(tokens(rank))
        y.square().mean().backward()
        errors = {"y": error(y, truth.chunk(size)[rank])}
        for name, parameter in one.named_parameters():
            mine = model.get_parameter(name).grad
            assert mine is not None
            assert parameter.grad is not None
            errors[name] = error(full(mine), parameter.grad)
        assert max(errors.values()) <= 1e-5, errors
        worst = max(worst, *errors.values())
    return worst


def check_ddp_equals_one_process(group: dist.ProcessGroup, folder: Path) -> float:
    return equals_one_process(group, "ddp")


def check_fully_shard_equals_one_process(group: dist.ProcessGroup, folder: Path) -> float:
    return equals_one_process(group, "fsdp")


def trains_as_one_process(group: dist.ProcessGroup, how: str) -> float:
    rank, size = group.rank(), group.size()
    (outer, model), one = parallel(group, how, Model()), Model()
    mine, theirs = (torch.optim.AdamW(each.parameters(), lr=0.02) for each in (model, one))
    for step in range(3):
        for optimizer, module, x in ((mine, outer, tokens(rank, step)), (theirs, one, everyone(size, step))):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
        assert model.moe.balance_load is not None
        assert model.moe.balance_load.sum() == 2 * N_TOKENS
        model.moe.update_balance(rate=0.1, group=group)
        one.moe.update_balance(rate=0.1)
        assert torch.equal(full(model.moe.balance_bias), full(one.moe.balance_bias))
    assert one.moe.balance_bias is not None
    assert one.moe.balance_bias.any()
    state: dict[str, Any] = get_model_state_dict(model, options=FULL)
    errors = {name: error(state[name], value) for name, value in one.state_dict().items()}
    assert max(errors.values()) < 1e-4, errors
    return max(errors.values())


def check_ddp_trains_as_one_process(group: dist.ProcessGroup, folder: Path) -> float:
    return trains_as_one_process(group, "ddp")


def check_fully_shard_trains_as_one_process(group: dist.ProcessGroup, folder: Path) -> float:
    return trains_as_one_process(group, "fsdp")


def check_every_rank_counts_its_own_load(group: dist.ProcessGroup, folder: Path) -> None:
    """DDP sends the first rank's buffers to all at every forward."""
    (outer, model), one = parallel(group, "ddp", Model()), Model()
    for step in range(3):
        outer(tokens(group.rank(), step))
        one(tokens(group.rank(), step))
    assert model.moe.balance_load is not None
    assert one.moe.balance_load is not None
    assert torch.equal(model.moe.balance_load, one.moe.balance_load)
    other = Model()
    for step in range(3):
        other(tokens(1 - group.rank(), step))
    assert other.moe.balance_load is not None
    assert not torch.equal(model.moe.balance_load, other.moe.balance_load)


def check_the_auxiliary_loss_passes_through_ddp(group: dist.ProcessGroup, folder: Path) -> None:
    (outer, model), one = parallel(group, "ddp", Model("aux")), Model("aux")

    def loss(module: nn.Module, moe: MoE, x: Tensor) -> Tensor:
        y: Tensor = module(x)
        assert moe.last_routing is not None
        return y.square().mean() + 0.1 * moe.last_routing.load_balance_loss

    loss(outer, model.moe, tokens(group.rank())).backward()
    torch.stack([loss(one, one.moe, tokens(rank)) for rank in range(group.size())]).mean().backward()
    assert model.moe.router.grad is not None
    assert one.moe.router.grad is not None
    assert error(model.moe.router.grad, one.moe.router.grad) <= 1e-5


def check_sharded_state_dicts(group: dist.ProcessGroup, folder: Path) -> None:
    model, other = sharded(group, Model()), Model(seed=1)
    model.moe.update_balance(group=group)
    wanted = Model()(tokens(0))
    state = get_model_state_dict(model, options=FULL)
    assert list(state) == list(other.state_dict())
    assert error(other(tokens(0)), wanted) > 0.1
    other.load_state_dict(state)
    assert torch.equal(other(tokens(0)), wanted)
    again = sharded(group, Model(seed=1))
    set_model_state_dict(again, copy.deepcopy(state), options=FULL)
    assert error(again(tokens(0)), wanted) <= 1e-6
    save(model.state_dict(), checkpoint_id=folder / "dcp", process_group=group)
    third = sharded(group, Model(seed=1))
    loaded = third.state_dict()
    load(loaded, checkpoint_id=folder / "dcp", process_group=group)
    third.load_state_dict(loaded)
    assert error(third(tokens(0)), wanted) <= 1e-6


def check_fully_shard_of_an_empty_layer(group: dist.ProcessGroup, folder: Path) -> None:
    """As large models start: no memory until sharded, then `reset_parameters`."""
    with torch.device("meta"):
        model = Model()
    sharded(group, model).to_empty(device="cpu")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "DTensor random operators may not have complete support on cpu")
        model.moe.reset_parameters()
    up, router = full(model.moe.up), full(model.moe.router)
    assert up.abs().max() <= 6**-0.5
    assert abs(up.std().item() * 6**0.5 - 3**-0.5) < 0.1
    assert router.any()
    assert model.moe.balance_load is not None
    assert not model.moe.balance_load.any()
    assert model.moe.balance_load.device.type == "cpu"


CHECKS = [name for name in globals() if name.startswith("check_")]


@pytest.mark.parametrize("name", CHECKS)
def test_2_ranks(run_ranks: Callable[..., Any], name: str) -> None:
    run_ranks(2, CHECKS).values(name)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_one_process_loads_what_fully_shard_saved(run_ranks: Callable[..., Any]) -> None:
    model = Model(seed=1)
    state = model.state_dict()
    load(state, checkpoint_id=run_ranks(2, CHECKS).folder / "dcp", no_dist=True)
    model.load_state_dict(state)
    assert torch.equal(model(tokens(0)), Model()(tokens(0)))
