"""Expert parallelism in 2 and 4 processes against one process, in values, gradients and checkpoints; and dying ranks.

Functions named `check_…` run on every rank. Each makes all ranks' tokens, so that it can compute the truth by itself.
"""

from __future__ import annotations

import copy
import os
import pickle
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from moesaic.moe import parallel
from moesaic.moe.layer import EXPERTS, MoE
from moesaic.moe.parallel_training import reduce_gradients

TOKENS = (13, 0, 37, 5)
"""Of every rank: the second has none."""
OPTIONS: list[dict[str, Any]] = [
    {"bias": True, "n_shared_experts": 1},
    {"activation": "relu2", "gate": "switch", "top_k": 1},
    {"top_k": 8, "gate": "sigmoid"},
    {"d_model": 16, "d_ff": 24, "top_k": 3, "bias": True},
]
FULL = StateDictOptions(full_state_dict=True)


def layer(group: dist.ProcessGroup | None = None, seed: int = 0, **options: Any) -> MoE:
    arguments: dict[str, Any] = {"d_model": 6, "d_ff": 5, "n_experts": 8, "top_k": 2, **options}
    torch.manual_seed(seed)
    moe = MoE(**arguments, process_group=group)
    one = moe if group is None else layer(seed=seed, **options)
    if group is None:
        with torch.no_grad():
            for name, parameter in moe.named_parameters():
                if name.endswith("_bias"):
                    parameter.normal_()
    moe.load_state_dict(one.state_dict())
    return moe


def tokens(rank: int, width: int = 6) -> Tensor:
    return torch.randn(TOKENS[rank], width, generator=torch.Generator().manual_seed(1 + rank))


def upstream(rank: int, width: int = 6) -> Tensor:
    return torch.randn(TOKENS[rank], width, generator=torch.Generator().manual_seed(11 + rank))


def error(mine: Tensor, truth: Tensor) -> float:
    """Largest difference over the truth's RMS."""
    truth = truth.detach().double()
    assert mine.shape == truth.shape
    if not truth.numel():
        return 0.0
    return float((mine.detach().double() - truth).abs().max() / truth.square().mean().sqrt().clamp(min=1e-30))


def own(group: dist.ProcessGroup, full: Tensor) -> Tensor:
    return full.chunk(group.size())[group.rank()]


def local(tensor: Any) -> Tensor:
    here: Tensor = tensor.to_local()
    return here


def gradients_of(one: MoE, size: int, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of x for every rank's tokens in one process; parameters keep theirs, of the sum."""
    one.to(dtype)
    one.zero_grad()
    xs = [tokens(rank, one.d_model).to(dtype).requires_grad_() for rank in range(size)]
    y = one(torch.cat(xs))
    y.backward(torch.cat([upstream(rank, one.d_model) for rank in range(size)]).to(dtype))
    return list(y.split([len(x) for x in xs])), [x.grad for x in xs if x.grad is not None]


def compare(group: dist.ProcessGroup, moe: MoE, one: MoE) -> dict[str, float]:
    """Errors of all gradients of parameters, of which `one` has those of the sum."""
    reduce_gradients(moe, mean=False)
    errors = {}
    for name, parameter in one.named_parameters():
        mine, truth = moe.get_parameter(name).grad, parameter.grad
        assert (mine is None) == (truth is None)
        if mine is not None and truth is not None and name in EXPERTS:
            here = slice(group.rank() * len(truth) // group.size(), (group.rank() + 1) * len(truth) // group.size())
            whole = truth.to(local(mine).dtype, copy=True)
            whole[here] = local(mine)
            errors[name] = error(whole, truth)
        elif mine is not None and truth is not None:
            errors[name] = error(mine, truth)
    return errors


def check_equals_one_process(group: dist.ProcessGroup, folder: Path) -> float:
    worst = 0.0
    for options in OPTIONS[:: group.size() // 2]:  # four ranks on few cores take turns
        moe, one = layer(group, **options), layer(**options)
        for dtype in (torch.float64, torch.float32):
            ys, dxs = gradients_of(one, group.size(), dtype)
            moe.zero_grad()
            x = tokens(group.rank(), moe.d_model).requires_grad_()
            y = moe(x)
            assert y.dtype == torch.float32
            y.backward(upstream(group.rank(), moe.d_model))
            assert x.grad is not None
            errors = {"y": error(y, ys[group.rank()]), "x": error(x.grad, dxs[group.rank()])}
            errors |= compare(group, moe, one)
            assert max(errors.values()) <= 1e-5, (options, dtype, errors)
            worst = max(worst, *errors.values())
    return worst


def check_one_expert_takes_all(group: dist.ProcessGroup, folder: Path) -> float:
    moe, one = layer(group, balance="bias", top_k=1), layer(balance="bias", top_k=1)
    for each in (moe, one):
        assert each.balance_bias is not None
        each.balance_bias[7] = 100.0
    ys, _ = gradients_of(one, group.size())
    y = moe(tokens(group.rank()))
    y.backward(upstream(group.rank()))
    errors = {"y": error(y, ys[group.rank()]), **compare(group, moe, one)}
    assert max(errors.values()) <= 1e-5, errors
    return max(errors.values())


def check_capacity_counts_a_rank_s_own_tokens(group: dist.ProcessGroup, folder: Path) -> None:
    moe, one = layer(group, capacity_factor=0.5), layer(capacity_factor=0.5).double()
    moe.keep_routing = True
    y = moe(tokens(group.rank()))
    assert error(y, one(tokens(group.rank()).double())) <= 1e-5
    for rank in range(group.size()):
        one(tokens(rank).double()).backward(upstream(rank).double())
    y.backward(upstream(group.rank()))
    assert max(compare(group, moe, one).values()) <= 1e-5
    assert moe.last_routing is not None
    assert bool(moe.last_routing.n_dropped > 0) == (TOKENS[group.rank()] > 0)


def check_tokens_without_gradients_on_some_ranks(group: dist.ProcessGroup, folder: Path) -> None:
    one = layer(bias=True)
    _, dxs = gradients_of(one, group.size())
    for silent in (0, 1):
        for frozen in (False, True):
            moe = layer(group, bias=True).requires_grad_(not frozen)
            x = tokens(group.rank()).requires_grad_(group.rank() != silent)
            moe(x).backward(upstream(group.rank()))
            if group.rank() == silent:
                assert x.grad is None
            else:
                assert x.grad is not None
                assert error(x.grad, dxs[group.rank()]) <= 1e-5
            if not frozen:
                assert max(compare(group, moe, one).values()) <= 1e-5


def check_gradients_of_gradients(group: dist.ProcessGroup, folder: Path) -> None:
    moe, one = layer(group, capacity_factor=1.0).double(), layer(capacity_factor=1.0).double()
    for rank in range(group.size()):
        x = tokens(rank).double().requires_grad_()
        (dx,) = torch.autograd.grad((one(x) * upstream(rank)).sum(), x, create_graph=True)
        dx.square().sum().backward()
        if rank == group.rank():
            truth = x.grad
    x = tokens(group.rank()).double().requires_grad_()
    (dx,) = torch.autograd.grad((moe(x) * upstream(group.rank())).sum(), x, create_graph=True)
    dx.square().sum().backward()
    assert x.grad is not None
    assert truth is not None
    assert error(x.grad, truth) <= 1e-10
    assert max(compare(group, moe, one).values()) <= 1e-10


def check_the_same_bits_twice(group: dist.ProcessGroup, folder: Path) -> None:
    found = []
    for _ in range(2):
        moe = layer(group)
        x = tokens(group.rank()).requires_grad_()
        y = moe(x)
        y.backward(upstream(group.rank()))
        found.append([y, x.grad, moe.router.grad, local(moe.up.grad), local(moe.down.grad)])
    for a, b in zip(*found, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


def check_autocast_sends_narrow_rows(group: dist.ProcessGroup, folder: Path) -> None:
    moe, one = layer(group, d_model=16), layer(d_model=16)
    sent, send = [], dist.all_to_all_single

    def listening(output: Tensor, input: Tensor, *args: Any, **options: Any) -> object:
        sent.append(input.dtype)
        return send(output, input, *args, **options)

    with mock.patch.object(dist, "all_to_all_single", listening):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, truth = moe(tokens(group.rank(), 16)), one(tokens(group.rank(), 16))
        y.backward(upstream(group.rank(), 16).to(y.dtype))
    assert sent == [torch.int64, torch.bfloat16, torch.bfloat16, torch.bfloat16]
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, truth, rtol=1e-2, atol=1e-3)
    assert local(moe.up.grad).dtype == torch.float32


def check_starts_as_one_process_does(group: dist.ProcessGroup, folder: Path) -> None:
    def new(seed: int, group: dist.ProcessGroup | None, device: str | None = None) -> MoE:
        torch.manual_seed(seed)
        return MoE(6, 5, 8, 2, bias=True, n_shared_experts=1, device=device, process_group=group)

    one, after = new(3, None), torch.get_rng_state()
    moe = new(3, group)
    assert torch.equal(torch.get_rng_state(), after)
    empty = new(0, group, "meta").to_empty(device="cpu")
    torch.manual_seed(3)
    empty.reset_parameters()
    for each in (moe, empty):
        full: dict[str, Any] = get_model_state_dict(each, options=FULL)
        assert all(torch.equal(full[name], value) for name, value in one.state_dict().items())
        assert list(full) == list(one.state_dict())
    other = new(group.rank(), group)
    assert torch.equal(other.router, new(0, None).router)
    assert torch.equal(local(other.up), own(group, new(group.rank(), None).up))


def check_state_dicts_load_in_either(group: dist.ProcessGroup, folder: Path) -> None:
    options: dict[str, Any] = {"bias": True, "n_shared_experts": 1, "balance": "bias"}
    moe, one = nn.Sequential(layer(group, seed=5, **options)), nn.Sequential(layer(seed=6, **options))
    x, wanted = tokens(group.rank()), one[0](tokens(group.rank()))
    for take in (
        lambda plain: moe.load_state_dict(plain),
        lambda plain: moe.load_state_dict(plain, assign=True),
        lambda plain: set_model_state_dict(moe, dict(plain), options=FULL),
    ):
        moe[0].load_state_dict(layer(seed=5, **options).state_dict())
        assert error(moe(x), wanted) > (1e-2 if len(x) else -1)
        plain = copy.deepcopy(one.state_dict())
        take(plain)
        assert error(moe(x), wanted) <= 1e-5
        assert list(plain) == list(one.state_dict()) == list(moe.state_dict())
        assert type(plain["0.up"]) is Tensor
    for name in EXPERTS:
        assert isinstance(moe[0].get_parameter(name), nn.Parameter)
        assert local(moe[0].get_parameter(name)).shape[0] == 8 // group.size()
    again = nn.Sequential(layer(group, seed=7, **options))
    again.load_state_dict(moe.state_dict())
    assert error(again(x), wanted) <= 1e-5
    file = folder / f"full{group.rank()}.pt"
    torch.save(get_model_state_dict(again, options=FULL), file)
    back = nn.Sequential(layer(seed=8, **options))
    back.load_state_dict(torch.load(file))
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), one.parameters(), strict=True))
    with pytest.raises(RuntimeError, match="size mismatch for up"):
        layer(group).load_state_dict(layer(n_experts=4).state_dict())


def check_distributed_checkpoints_change_ranks(group: dist.ProcessGroup, folder: Path) -> None:
    saved, path = layer(group, seed=5, bias=True), folder / f"dcp{group.size()}"
    save({"moe": saved.state_dict()}, checkpoint_id=path, process_group=group)
    truth = layer(seed=5, bias=True)
    # Ranks of a group of two that are not the first of all.
    pair = dist.new_group([group.size() - 2, group.size() - 1])
    if group.rank() >= group.size() - 2:
        moe = layer(pair, seed=6, bias=True)
        state = {"moe": moe.state_dict()}
        load(state, checkpoint_id=path, process_group=pair)
        moe.load_state_dict(state["moe"])
        assert torch.equal(local(moe.up), own(pair, truth.up))
        assert torch.equal(local(moe.down_bias), own(pair, truth.get_parameter("down_bias")))
        assert error(moe(tokens(0)), truth(tokens(0))) <= 1e-5
    if group.rank() == 0:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            save({"moe": truth.state_dict()}, checkpoint_id=folder / f"one{group.size()}", no_dist=True)
    dist.barrier(group)
    moe = layer(group, seed=6, bias=True)
    state = {"moe": moe.state_dict()}
    load(state, checkpoint_id=folder / f"one{group.size()}", process_group=group)
    assert torch.equal(local(moe.up), own(group, truth.up))
    assert torch.equal(moe.router, truth.router)


def check_loads_are_added_up(group: dist.ProcessGroup, folder: Path) -> None:
    moe, one = layer(group, balance="bias"), layer(balance="bias")
    for _ in range(3):
        moe(tokens(group.rank()))
        one(torch.cat([tokens(rank) for rank in range(group.size())]))
        for each in (moe, one):
            each.update_balance(rate=0.1)
            assert each.balance_load is not None
            assert not each.balance_load.any()
        assert moe.balance_bias is not None
        assert one.balance_bias is not None
        assert torch.equal(moe.balance_bias, one.balance_bias)
    alone = layer(balance="bias")
    alone(tokens(0))
    alone.update_balance(rate=0.1)
    assert alone.balance_bias is not None
    assert one.balance_bias is not None
    assert not torch.equal(alone.balance_bias.sign(), one.balance_bias.sign())


def check_copies_pickles_and_repr(group: dist.ProcessGroup, folder: Path) -> None:
    moe = layer(group)
    other, x = copy.deepcopy(moe), tokens(group.rank())
    assert torch.equal(other(x), moe(x))
    assert other.process_group is group
    with torch.no_grad():
        local(other.up).zero_()
    assert local(moe.up).any()
    other.load_state_dict(moe.state_dict())
    assert torch.equal(other(x), moe(x))
    with pytest.raises(TypeError, match="MoE with process_group cannot be pickled: save its state dict"):
        pickle.dumps(moe)
    assert repr(moe).endswith(f"capacity_factor=None, process_group={group.size()} ranks)")


def compiles_and_reruns(group: dist.ProcessGroup, folder: Path) -> None:
    truth = layer(group, n_shared_experts=1)
    y = truth(tokens(group.rank()))
    y.backward(upstream(group.rank()))
    wraps: list[Callable[[MoE], Callable[[Tensor], Tensor]]] = [
        lambda moe: torch.compile(moe, backend="aot_eager"),
        lambda moe: lambda x: torch.utils.checkpoint.checkpoint(moe, x, use_reentrant=False),
    ]
    for wrap in wraps:
        moe = layer(group, n_shared_experts=1)
        with warnings.catch_warnings():
            # Dynamo asks y for its gradient where it goes on after the exchange.
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            mine = wrap(moe)(tokens(group.rank()))
        assert error(mine, y) <= 1e-6
        mine.backward(upstream(group.rank()))
        assert error(local(moe.up.grad), local(truth.up.grad)) <= 1e-6
    with torch.inference_mode():
        assert error(truth(tokens(group.rank())), y) <= 1e-6


def check_wrong_arguments_are_named(group: dist.ProcessGroup, folder: Path) -> None:
    first, size = group.rank() == 0, group.size()
    with pytest.raises(ValueError, match=f"n_experts must be divisible by the {size} ranks of process_group, got 7"):
        layer(group, n_experts=7)
    with pytest.raises(ValueError, match=r"process_group must be a torch\.distributed\.ProcessGroup"):
        MoE(6, 5, 8, 2, process_group="gloo")  # type: ignore[arg-type]
    for name, ours, theirs in (("d_model", 6, 4), ("n_experts", 8, 16), ("top_k", 2, 1), ("gate", "softmax", "switch")):
        options: dict[str, Any] = {"d_model": 6, "d_ff": 5, "n_experts": 8, "top_k": 2, "process_group": group}
        with pytest.raises(ValueError, match=rf"{name} must be the same on all ranks of process_group, got \['?{ours}"):
            MoE(**{**options, name: ours if first else theirs})
    with pytest.raises(ValueError, match=r"dtype must be the same on all ranks .* got \[torch.float32, torch.float64"):
        MoE(6, 5, 8, 2, dtype=torch.float32 if first else torch.float64, process_group=group)
    with pytest.raises(ValueError, match=r"x must have the same dtype on all ranks .* got \[torch.float32, torch.bf"):
        layer(group)(tokens(0).to(torch.float32 if first else torch.bfloat16))
    with pytest.raises(ValueError, match="x must be on cpu, where process_group sends from, got meta"):
        layer(group).to("meta")(torch.empty(3, 6, device="meta"))


def check_ddp_refuses_sharded_experts(group: dist.ProcessGroup, folder: Path) -> None:
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        nn.parallel.DistributedDataParallel(layer(group), process_group=group)


@pytest.mark.parametrize(
    "options", [{"bias": True}, {"capacity_factor": 0.5, "balance": "bias"}], ids=["bias", "capacity"]
)
def test_a_group_of_this_process_alone(alone: dist.ProcessGroup, options: dict[str, Any]) -> None:
    moe, one = layer(alone, **options).double(), layer(**options).double()
    found: list[list[Any]] = []
    for each in (moe, one, copy.deepcopy(moe)):
        x = tokens(2).double().requires_grad_()
        y = each(x)
        (dx,) = torch.autograd.grad(y, x, upstream(2).double(), create_graph=True)
        dx.square().sum().backward()
        found.append([y, dx, x.grad, each.router.grad, *(p.grad for p in each.parameters() if p is not each.router)])
        if "balance" in options:
            each.update_balance()
            assert each.balance_bias is not None
            found[-1].append(each.balance_bias)
    for got in found:
        for mine, truth in zip(got, found[1], strict=True):
            mine = local(mine) if hasattr(mine, "to_local") else mine
            torch.testing.assert_close(mine, truth, rtol=1e-10, atol=1e-12)
    with pytest.raises(TypeError, match="MoE with process_group cannot be pickled"):
        pickle.dumps(moe)
    assert repr(moe).endswith("process_group=1 ranks)")


def die(*args: Any, **options: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def three_of_four_ranks_fail(group: dist.ProcessGroup, folder: Path) -> list[list[str]]:
    """The last rank dies in forward; of three the last in backward; of two one does not come."""
    rank, seen = group.rank(), []
    # All of them now, while all ranks live.
    groups = {size: dist.new_group(list(range(size)), timeout=timedelta(seconds=30)) for size in (4, 3)}
    groups[2] = dist.new_group([0, 1], timeout=timedelta(seconds=10))

    @contextmanager
    def an_error() -> Iterator[None]:
        with pytest.raises(RuntimeError) as caught:
            yield
        seen.append([str(caught.value), str(caught.value.__cause__)])

    moe = layer(groups[4], n_experts=12)
    # Where it would compute the rows that it got.
    with mock.patch.object(parallel, "expert_mlp", die if rank == 3 else parallel.__dict__["expert_mlp"]), an_error():
        moe(tokens(0))
    moe = layer(groups[3], n_experts=12)
    if rank == 2:
        moe.up.register_hook(die)
    y = moe(tokens(0).requires_grad_())
    with an_error():
        y.backward(upstream(0))
    moe = layer(groups[2], n_experts=12)
    if rank == 0:
        with an_error():
            moe(tokens(0))
        (folder / "seen").touch()
    while not (folder / "seen").exists():
        time.sleep(0.1)
    return seen


CHECKS = [name for name in globals() if name.startswith("check_")]
IN_2 = [*CHECKS, "compiles_and_reruns"]
IN_4 = [*CHECKS, "three_of_four_ranks_fail"]


@pytest.mark.parametrize("name", IN_2)
def test_2_ranks(run_ranks: Callable[..., Any], name: str) -> None:
    run_ranks(2, IN_2).values(name)


@pytest.mark.parametrize("name", CHECKS)
def test_4_ranks(run_ranks: Callable[..., Any], name: str) -> None:
    run_ranks(4, IN_4).values(name)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(("size", "names"), [(2, IN_2), (4, IN_4)])
def test_one_process_loads_what_ranks_saved(run_ranks: Callable[..., Any], size: int, names: list[str]) -> None:
    moe, truth = layer(seed=6, bias=True), layer(seed=5, bias=True)
    state = {"moe": moe.state_dict()}
    load(state, checkpoint_id=run_ranks(size, names).folder / f"dcp{size}", no_dist=True)
    moe.load_state_dict(state["moe"])
    assert all(torch.equal(a, b) for a, b in zip(moe.parameters(), truth.parameters(), strict=True))


def test_the_others_end_with_an_error(run_ranks: Callable[..., Any]) -> None:
    ranks = run_ranks(4, IN_4)
    assert ranks.statuses == [0, 0, -signal.SIGKILL, -signal.SIGKILL]
    first, second = (ranks.outcomes[rank]["three_of_four_ranks_fail"] for rank in (0, 1))
    for rank, outcome, sizes in ((0, first, (4, 3, 2)), (1, second, (4, 3))):
        assert outcome["error"] is None, outcome["error"]
        for size, (message, cause) in zip(sizes, outcome["value"], strict=True):
            assert message.startswith("expert-parallel all-to-all")
            assert f"failed on rank {rank} of {size}: another rank has died, or did not come" in message
            assert "start all of them again from a checkpoint" in message
            assert ("imed out" if size == 2 else "onnection") in cause
