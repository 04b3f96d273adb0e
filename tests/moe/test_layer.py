"""The MoE layer against its definition in float64, its options, and what a training loop does to a module."""

from __future__ import annotations

import copy
import importlib
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.kernels import reference
from moesaic.kernels.expert_mlp import ACTIVATIONS, clamped_swiglu
from moesaic.moe.layer import MoE

GATES = {"softmax": ("softmax", True), "switch": ("softmax", False), "sigmoid": ("sigmoid", False)}


def layer(**options: Any) -> MoE:
    arguments: dict[str, Any] = {"d_model": 6, "d_ff": 5, "n_experts": 7, "top_k": 2, **options}
    torch.manual_seed(0)
    moe = MoE(**arguments)
    with torch.no_grad():
        for name, parameter in moe.named_parameters():
            if name.endswith("_bias"):
                parameter.normal_()
    return moe


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def by_definition(moe: MoE, x: Tensor) -> Tensor:
    """The layer's equation from its state dict, densely; differentiable in the parameters of `moe`."""
    p = dict(moe.named_parameters())
    scoring, renormalize = GATES[moe.gate]
    weights, ids = reference.route_topk(
        x @ p["router"].T, moe.top_k, scoring=scoring, renormalize=renormalize, bias=moe.balance_bias
    )
    y = reference.expert_mlp(
        x,
        p["up"].transpose(1, 2),
        p["down"].transpose(1, 2),
        weights,
        ids,
        activation=moe.activation,
        gate_up_bias=p.get("up_bias"),
        down_bias=p.get("down_bias"),
    )
    if "shared_up" in p:
        h = x @ p["shared_up"].T + p.get("shared_up_bias", torch.zeros(()))
        y = y + reference.activate(h, moe.activation) @ p["shared_down"].T + p.get("shared_down_bias", torch.zeros(()))
    return y


def outputs_and_gradients(function: Callable[[Tensor], Tensor], x: Tensor, moe: MoE) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    y = function(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    # At top_k = 1 the softmax gate's weight does not depend on the router.
    return [y, *torch.autograd.grad(y, [x, *moe.parameters()], upstream, materialize_grads=True, allow_unused=True)]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n_shared_experts", [0, 2])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_equals_its_definition(gate: str, bias: bool, n_shared_experts: int, activation: str) -> None:
    moe = layer(gate=gate, bias=bias, n_shared_experts=n_shared_experts, activation=activation)
    exact = copy.deepcopy(moe).double()
    x = tokens(3, 11, 6)
    got = outputs_and_gradients(moe, x, moe)
    truth = outputs_and_gradients(lambda x: by_definition(exact, x), x.double(), exact)
    for mine, theirs in zip(got, truth, strict=True):
        assert mine.dtype == torch.float32
        error = (mine.double() - theirs).detach().abs().max() / theirs.detach().square().mean().sqrt()
        assert error < 1e-5


@pytest.mark.parametrize("activation", [*ACTIVATIONS, clamped_swiglu(1.0, 1.5, 0.5)])
@pytest.mark.parametrize(("n_experts", "top_k"), [(1, 1), (7, 1), (7, 7)])
def test_every_activation_and_edge_count(activation: str, n_experts: int, top_k: int) -> None:
    moe = layer(activation=activation, n_experts=n_experts, top_k=top_k, dtype=torch.float64)
    for n_tokens in (0, 1, 13):
        x = tokens(n_tokens, 6, dtype=torch.float64)
        torch.testing.assert_close(moe(x), by_definition(moe, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda moe: moe.down.zero_(),
        lambda moe: moe.down[1].zero_(),
        lambda moe: moe.router.copy_(moe.router.roll(1, 0)),
        lambda moe: moe.up.copy_(moe.up.roll(5, 1)),
    ],
    ids=["zeros", "dropped expert", "router rows off by one", "gate and up swapped"],
)
def test_the_comparison_can_fail(break_it: Callable[[MoE], None]) -> None:
    moe = layer()
    x = tokens(33, 6)
    truth = by_definition(copy.deepcopy(moe).double(), x.double()).detach()
    with torch.no_grad():
        break_it(moe)
        error = (moe(x).double() - truth).abs().max() / truth.square().mean().sqrt()
    assert error > 0.1


def test_the_softmax_gate_teaches_no_router_at_top_1_and_switch_does() -> None:
    x = tokens(20, 6)
    for gate, learns in (("softmax", False), ("switch", True), ("sigmoid", True)):
        moe = layer(gate=gate, top_k=1)
        (grad,) = torch.autograd.grad(moe(x).square().sum(), moe.router, materialize_grads=True, allow_unused=True)
        assert bool(grad.abs().max() > 1e-4) == learns
        assert bool((grad == 0).all()) != learns


def test_initialisation() -> None:
    torch.manual_seed(0)
    moe = MoE(64, 256, 8, 2, bias=True, n_shared_experts=1)
    for name, fan_in in (("router", 64), ("up", 64), ("down", 256), ("shared_up", 64), ("shared_down", 256)):
        weight = moe.get_parameter(name)
        bound = fan_in**-0.5
        assert weight.abs().max() <= bound
        assert abs(weight.std().item() / bound - 3**-0.5) < 0.05
    assert not any(p.any() for name, p in moe.named_parameters() if name.endswith("_bias"))
    torch.manual_seed(0)
    again = MoE(64, 256, 8, 2, bias=True, n_shared_experts=1)
    assert all(torch.equal(a, b) for a, b in zip(moe.parameters(), again.parameters(), strict=True))


def test_state_dict_names_and_shapes() -> None:
    moe = layer(bias=True, n_shared_experts=3, balance="bias")
    assert {name: tuple(value.shape) for name, value in moe.state_dict().items()} == {
        "router": (7, 6),
        "up": (7, 10, 6),
        "down": (7, 6, 5),
        "up_bias": (7, 10),
        "down_bias": (7, 6),
        "shared_up": (30, 6),
        "shared_down": (6, 15),
        "shared_up_bias": (30,),
        "shared_down_bias": (6,),
        "balance_bias": (7,),
    }
    assert list(layer(activation="relu").state_dict()) == ["router", "up", "down"]


def test_routing_on_request() -> None:
    moe = layer()
    x = tokens(4, 5, 6)
    moe(x)
    assert moe.last_routing is None
    moe.keep_routing = True
    moe(x)
    assert moe.last_routing is not None
    weights, ids, counts, n_dropped, loss = moe.last_routing
    truth_weights, truth_ids = reference.route_topk(x @ moe.router.T, 2, renormalize=True)
    assert torch.equal(ids, truth_ids)
    torch.testing.assert_close(weights, truth_weights)
    assert counts.tolist() == [int((ids == e).sum()) for e in range(7)]
    assert n_dropped == 0
    share = counts / counts.sum()
    mean = torch.softmax(x @ moe.router.T, -1).mean((0, 1))
    torch.testing.assert_close(loss, 7 * (share * mean).sum())


def test_the_auxiliary_loss_balances() -> None:
    moe = layer(balance="aux", gate="switch", top_k=1)
    with torch.no_grad():
        moe.router[0] += 2.0
    x = tokens(256, 6) + 1.0
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.3)
    losses = []
    for _ in range(120):
        moe(x)
        assert moe.last_routing is not None
        losses.append(moe.last_routing.load_balance_loss)
        optimizer.zero_grad()
        torch.autograd.backward(losses[-1])
        optimizer.step()
    assert losses[0] > 5.0
    assert losses[-1] < 1.6


def test_the_bias_balances_without_a_gradient() -> None:
    moe = layer(balance="bias", top_k=1)
    with torch.no_grad():
        moe.router[0] += 0.5
    moe.keep_routing = True
    x = tokens(256, 6) + 0.5
    largest = []
    for _ in range(200):
        moe(x)
        assert moe.last_routing is not None
        largest.append(int(moe.last_routing.counts.max()))
        moe.update_balance(rate=0.01)
    assert largest[0] > 150
    assert largest[-1] < 80
    assert moe.balance_load is not None
    moe.eval()
    moe(x)
    assert moe.balance_load.sum() == 0
    with pytest.raises(
        ValueError, match="update_balance takes a layer with balance='bias', this one has balance='none'"
    ):
        layer().update_balance()


@pytest.mark.parametrize("n_shared_experts", [0, 1])
def test_capacity_drops_the_last_tokens_and_says_how_many(n_shared_experts: int) -> None:
    moe = layer(capacity_factor=0.5, n_shared_experts=n_shared_experts, dtype=torch.float64)
    moe.keep_routing = True
    x = tokens(40, 6, dtype=torch.float64)
    y = moe(x)
    assert moe.last_routing is not None
    capacity = 6  # ⌈0.5 · 40 · 2 / 7⌉
    weights, ids = reference.route_topk(x @ moe.router.T, 2, renormalize=True)
    kept, load = ids.clone(), [0] * 7
    for t, j in itertools.product(range(40), range(2)):
        load[int(ids[t, j])] += 1
        if load[int(ids[t, j])] > capacity:
            kept[t, j] = 7
    assert torch.equal(moe.last_routing.ids, kept)
    assert moe.last_routing.n_dropped == (kept == 7).sum() > 0
    assert moe.last_routing.counts.max() == capacity
    expected = reference.expert_mlp(x, moe.up.transpose(1, 2), moe.down.transpose(1, 2), weights, kept)
    if moe.shared_up is not None and moe.shared_down is not None:
        expected = expected + reference.activate(x @ moe.shared_up.T, "swiglu") @ moe.shared_down.T
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_copies_pickles_and_functional_calls() -> None:
    moe = layer(balance="aux", bias=True)
    x = tokens(9, 6)
    y = moe(x)
    assert moe.last_routing is not None
    for other in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
        assert other.last_routing is None
        assert torch.equal(other(x), y)
    assert moe.last_routing is not None
    zeroed = {name: torch.zeros_like(p) for name, p in moe.named_parameters()}
    assert not torch.func.functional_call(moe, zeroed, (x,)).any()


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_without_a_graph_break(dynamic: bool | None) -> None:
    moe = layer(balance="bias", bias=True, n_shared_experts=1, capacity_factor=1.0, activation=clamped_swiglu(2.0))
    x = tokens(12, 6)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert moe.balance_load is not None
    mine, load = outputs_and_gradients(compiled, x, moe), moe.balance_load.clone()
    for a, b in zip(mine, outputs_and_gradients(moe, x, moe), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert load.sum() == 12 * 2
    assert torch.equal(moe.balance_load, 2 * load)


def test_autocast_keeps_the_router_in_float32() -> None:
    moe = layer(d_model=16)
    moe.keep_routing = True
    x = tokens(30, 16)
    truth, _ = reference.route_topk(x @ moe.router.T, 2, renormalize=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = moe(x)
    assert y.dtype == torch.bfloat16
    assert moe.last_routing is not None
    torch.testing.assert_close(moe.last_routing.weights, truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(y.float(), moe(x), rtol=0.05, atol=0.01)


def test_gradient_checkpointing_changes_nothing() -> None:
    moe = layer(balance="aux")
    x = tokens(12, 6)
    plain = outputs_and_gradients(moe, x, moe)
    rerun = outputs_and_gradients(
        lambda x: torch.utils.checkpoint.checkpoint(moe, x, use_reentrant=False),
        x,
        moe,
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, rerun, strict=True))


def test_needs_nothing_on_the_host() -> None:
    """On the meta device no value exists, so `.item()`, `.tolist()` or `nonzero` anywhere would fail."""
    moe = layer(balance="bias", capacity_factor=1.0, bias=True, n_shared_experts=1).to("meta")
    moe.keep_routing = True
    torch.autograd.backward(moe(torch.randn(12, 6, device="meta")).sum())
    moe.update_balance()
    assert all(p.grad is not None for p in moe.parameters())


def test_half_precision_layers() -> None:
    moe = layer(dtype=torch.bfloat16)
    x = tokens(20, 6, dtype=torch.bfloat16)
    truth = by_definition(copy.deepcopy(moe).double(), x.double())
    y = moe(x)
    assert y.dtype == torch.bfloat16
    assert (y.double() - truth).detach().abs().max() < 0.03 * truth.detach().square().mean().sqrt()


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("d_ff must be at least 1, got 0", {"d_ff": 0}),
        ("top_k must be between 1 and n_experts = 7, got 8", {"top_k": 8}),
        ("activation must be one of swiglu, .*, got 'tanh'", {"activation": "tanh"}),
        ("gate must be one of softmax, switch, sigmoid, got 'paper'", {"gate": "paper"}),
        ("balance must be one of none, aux, bias, got 'loss'", {"balance": "loss"}),
        ("n_shared_experts must be at least 0, got -1", {"n_shared_experts": -1}),
        ("capacity_factor must be None or positive, got 0", {"capacity_factor": 0.0}),
    ],
)
def test_bad_arguments_are_named(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        layer(**options)


def test_repr_names_the_constructors_arguments() -> None:
    assert "n_experts=7, top_k=2, activation='swiglu', gate='softmax'" in repr(layer())


def test_a_wrong_input_width_is_named() -> None:
    with pytest.raises(ValueError, match=r"x must have shape \(..., 6\), got \(3, 5\)"):
        layer()(torch.zeros(3, 5))


def test_compiled_functions_are_found_without_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba tells defaults apart by type alone: two numbers as defaults would be looked up in Python at every call."""
    dispatcher: Any = importlib.import_module("numba.core.dispatcher")
    wide, narrow, x = layer(d_ff=40), layer(d_ff=3), tokens(40, 6)
    for moe in (wide, narrow):
        outputs_and_gradients(moe, x, moe)
    searched: list[str] = []
    true = dispatcher._DispatcherBase._compile_for_args

    def search(self: Any, *args: Any, **keywords: Any) -> Any:
        searched.append(self.py_func.__name__)
        return true(self, *args, **keywords)

    monkeypatch.setattr(dispatcher._DispatcherBase, "_compile_for_args", search)
    for moe in (wide, narrow):
        outputs_and_gradients(moe, x, moe)
    assert searched == []
