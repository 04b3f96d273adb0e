"""expert_mlp against its dense float64 oracle: every activation, gradient subset, edge shape, and what is saved."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moesaic.kernels import reference
from moesaic.kernels.activations import is_gated
from moesaic.kernels.expert_mlp import ACTIVATIONS, GATED, clamped_swiglu, expert_mlp

# Worst error over the reference's RMS: float32 rounding stays under 5e-6 at these sizes, each mutation is above 0.1.
TOLERANCE = 2e-5
LEAVES = ("x", "gate_up", "down", "weights", "gate_up_bias", "down_bias")


def scaled_error(got: Tensor, truth: Tensor) -> float:
    assert got.shape == truth.shape
    assert not got.isnan().any()
    if truth.numel() == 0 or not truth.any():
        return float(got.detach().abs().sum())
    got, truth = got.detach().double(), truth.detach()
    return float((got - truth).abs().max() / truth.square().mean().sqrt())


def rms_error(got: Tensor, truth: Tensor) -> float:
    got, truth = got.detach().double(), truth.detach()
    return float((got - truth).square().mean().sqrt() / truth.square().mean().sqrt())


def problem(
    n_tokens: int = 13,
    n_experts: int = 5,
    top_k: int = 2,
    activation: str = "swiglu",
    *,
    d_model: int = 7,
    d_ff: int = 6,
    bias: bool = True,
    low: int = 0,
    high: int | None = None,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    width = 2 * d_ff if is_gated(activation) else d_ff
    ids = torch.randint(low, n_experts if high is None else high, (n_tokens, top_k), generator=generator)
    return {
        "x": draw(n_tokens, d_model) * 2,
        "gate_up": draw(n_experts, d_model, width),
        "down": draw(n_experts, d_ff, d_model),
        "weights": draw(n_tokens, top_k),
        "ids": ids,
        "activation": activation,
        "gate_up_bias": draw(n_experts, width) if bias else None,
        "down_bias": draw(n_experts, d_model) if bias else None,
    }


def run(
    function: Callable[..., Tensor], inputs: dict[str, Any], wanted: tuple[str, ...] = (), dtype: Any = torch.float32
) -> list[Tensor]:
    arguments = dict(inputs)
    for name in LEAVES:
        if arguments[name] is not None:
            arguments[name] = arguments[name].detach().to(dtype).requires_grad_(name in wanted)
    leaves = [arguments[name] for name in wanted]
    out = function(**arguments)
    assert out.requires_grad == bool(wanted)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype)
    return [out, *(torch.autograd.grad(out, leaves, upstream) if leaves else ())]


def check(inputs: dict[str, Any], wanted: tuple[str, ...] = LEAVES) -> None:
    wanted = tuple(name for name in wanted if inputs[name] is not None)
    got, truth = run(expert_mlp, inputs, wanted), run(reference.expert_mlp, inputs, wanted, torch.float64)
    for name, mine, theirs in zip(("out", *wanted), got, truth, strict=True):
        assert mine.dtype == torch.float32
        assert scaled_error(mine, theirs) < TOLERANCE, name


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("activation", "interleaved"), [*((name, False) for name in ACTIVATIONS), *((name, True) for name in GATED)]
)
def test_every_activation(activation: str, interleaved: bool, bias: bool) -> None:
    check({**problem(activation=activation, bias=bias, d_model=16), "interleaved": interleaved})


@pytest.mark.parametrize("activation", ["gpt_oss", clamped_swiglu(5.0), clamped_swiglu(6.0, 0.5, -2.0)])
def test_clamps_bite(activation: str) -> None:
    inputs = problem(40, activation=activation, d_model=16)
    h = inputs["x"].unsqueeze(1) @ inputs["gate_up"][0]
    assert h[..., :6].max() > 7
    assert h[..., 6:].abs().max() > 7
    check(inputs)
    check({**inputs, "interleaved": True})


@pytest.mark.parametrize("n_tokens", [0, 1, 63, 1000])
@pytest.mark.parametrize(("n_experts", "top_k"), [(1, 1), (7, 1), (7, 7), (31, 3)])
def test_edge_shapes(n_tokens: int, n_experts: int, top_k: int) -> None:
    check(problem(n_tokens, n_experts, top_k, d_model=47, d_ff=9))


def test_one_expert_takes_all_and_the_others_get_zero_gradients() -> None:
    inputs = problem(20, 6, 2, low=3, high=4)
    check(inputs)
    _, grad = run(expert_mlp, inputs, ("gate_up",))
    assert not grad[[0, 1, 2, 4, 5]].any()


def test_sentinels_are_skipped_whatever_their_weight() -> None:
    inputs = problem(17, 5, 3, low=-2, high=8)
    check(inputs)
    outside = (inputs["ids"] < 0) | (inputs["ids"] >= 5)
    poisoned = {**inputs, "weights": inputs["weights"].masked_fill(outside, torch.nan)}
    for mine, theirs in zip(run(expert_mlp, poisoned, LEAVES), run(expert_mlp, inputs, LEAVES), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("wanted", [subset for size in range(7) for subset in combinations(LEAVES, size)])
def test_every_subset_of_gradients(wanted: tuple[str, ...]) -> None:
    check(problem(), wanted)


@pytest.mark.parametrize("activation", ["swiglu", "geglu_tanh", "gelu"])
def test_gradcheck(activation: str) -> None:
    inputs = problem(4, 3, 2, activation, d_model=3, d_ff=2, high=4)
    leaves = tuple(inputs[name].double().requires_grad_() for name in LEAVES)

    def function(*leaves: Tensor) -> Tensor:
        return expert_mlp(**{**inputs, **dict(zip(LEAVES, leaves, strict=True))})

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_leading_dimensions_and_transposed_weights() -> None:
    inputs = problem(12)
    flat = expert_mlp(**inputs)
    shaped = {name: inputs[name].view(3, 4, -1) for name in ("x", "weights", "ids")}
    stored = {name: inputs[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("gate_up", "down")}
    assert scaled_error(expert_mlp(**{**inputs, **shaped, **stored}).view(12, -1), flat.double()) < TOLERANCE


def test_functions_as_activation_and_norm_of_the_outputs() -> None:
    inputs = problem(bias=False)
    named = expert_mlp(**inputs)

    def swiglu(h: Tensor) -> Tensor:
        gate, up = h.chunk(2, -1)
        return F.silu(gate) * up

    # A function is called on the whole pre-activation, by the ops that the fused one stands for.
    assert scaled_error(expert_mlp(**{**inputs, "activation": swiglu}), named.double()) < TOLERANCE
    doubled = expert_mlp(**inputs, post_norm=lambda rows: rows * 2.0)
    assert scaled_error(doubled, named.double() * 2.0) < TOLERANCE
    skipping = {**inputs, "ids": inputs["ids"].clone().fill_diagonal_(-1)}
    normed = expert_mlp(**skipping, post_norm=lambda rows: rows / rows.norm(dim=1, keepdim=True))
    assert not normed.isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_torch(dtype: torch.dtype) -> None:
    """The budget is the error of the dense composition in the same dtype."""
    inputs = problem(32, 4, 2, d_model=32, d_ff=24)
    for name in LEAVES:
        inputs[name] = (inputs[name] * 0.3).to(dtype).float()
    truth = run(reference.expert_mlp, inputs, LEAVES, torch.float64)
    got, budget = run(expert_mlp, inputs, LEAVES, dtype), run(reference.expert_mlp, inputs, LEAVES, dtype)
    for name, mine, theirs, exact in zip(("out", *LEAVES), got, budget, truth, strict=True):
        assert mine.dtype == dtype
        assert rms_error(mine, exact) <= 1.1 * rms_error(theirs, exact) < 0.01, name
        assert scaled_error(mine, exact) <= 3.0 * scaled_error(theirs, exact), name


def test_only_the_chosen_experts_are_computed() -> None:
    n_tokens, n_experts, top_k, d_model, d_ff = 10, 50, 2, 8, 4
    inputs = problem(n_tokens, n_experts, top_k, d_model=d_model, d_ff=d_ff)
    forward = 2 * n_tokens * top_k * 3 * d_model * d_ff
    with FlopCounterMode(display=False) as counter:
        run(expert_mlp, inputs)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        run(expert_mlp, inputs, LEAVES)
    assert counter.get_total_flops() == 3 * forward


def test_needs_nothing_on_the_host() -> None:
    """On the meta device no value exists, so reading one (a size, a count, a non-zero entry) would fail."""
    inputs: dict[str, Any] = {name: v.to("meta") if isinstance(v, Tensor) else v for name, v in problem().items()}
    leaves = [inputs[name].requires_grad_() for name in LEAVES]
    grads = torch.autograd.grad(expert_mlp(**inputs).sum(), leaves)
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves]


def test_same_inputs_same_bits() -> None:
    inputs = problem(64, 7, 3)
    for first, second in zip(run(expert_mlp, inputs, LEAVES), run(expert_mlp, inputs, LEAVES), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("activation", ["swiglu", clamped_swiglu(5.0)])
def test_compiles_without_a_graph_break(activation: str) -> None:
    inputs = problem(activation=activation)
    compiled = torch.compile(expert_mlp, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(run(compiled, inputs, LEAVES), run(expert_mlp, inputs, LEAVES), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("d_ff", [24, 3])
def test_keeps_what_the_docstring_says(d_ff: int) -> None:
    n_tokens, n_experts, top_k = 11, 5, 3
    inputs = problem(n_tokens, n_experts, top_k, d_ff=d_ff)
    given = {name: inputs[name].requires_grad_() for name in LEAVES}
    known = {tensor.untyped_storage().data_ptr() for tensor in (*given.values(), inputs["ids"])}
    kept: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        expert_mlp(**{**inputs, **given})
    assert sum(kept.values()) == n_tokens * top_k * (2 * d_ff * 4 + 16) + 8 * (n_experts + 1)


def test_the_ops_are_well_registered() -> None:
    for d_ff in (20, 3):
        inputs = problem(6, 4, 2, d_ff=d_ff)
        x, gate_up, down, weights, gate_up_bias, down_bias = (inputs[name].requires_grad_() for name in LEAVES)
        arguments = (
            x,
            gate_up,
            down,
            weights,
            inputs["ids"],
            gate_up_bias,
            down_bias,
            "swiglu",
            False,
            True,
            "ieee",
            False,
        )
        torch.library.opcheck(torch.ops.moesaic.expert_mlp.default, arguments)
        with torch.no_grad():
            _, h, offsets, permutation, inverse = torch.ops.moesaic.expert_mlp(*arguments)
            backward = (torch.ones(6, 7), x, gate_up, down, weights, inputs["ids"], down_bias, h, offsets, permutation,
                        inverse, offsets, "swiglu", False, "ieee", [True] * 6)  # fmt: skip
            torch.library.opcheck(torch.ops.moesaic.expert_mlp_backward.default, backward)


@pytest.mark.parametrize("d_ff", [20, 3])
def test_sparse_gradients_are_those_of_the_experts_with_tokens(d_ff: int) -> None:
    inputs = problem(6, 50, 2, d_ff=d_ff, low=3, high=9)
    dense, sparse = run(expert_mlp, inputs, LEAVES), run(expert_mlp, {**inputs, "sparse_grad": True}, LEAVES)
    for name, full, thin in zip(("out", *LEAVES), dense, sparse, strict=True):
        assert thin.is_sparse == (name in ("gate_up", "down"))
        assert torch.equal(thin.to_dense() if thin.is_sparse else thin, full)
    touched = inputs["ids"].unique()
    assert torch.equal(sparse[2].coalesce().indices()[0], touched)
    with pytest.raises(ValueError, match="sparse_grad takes an activation by name and no post_norm"):
        expert_mlp(**{**inputs, "post_norm": lambda rows: rows, "sparse_grad": True})


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.SparseAdam])
def test_optimisers_that_take_sparse_gradients(optimizer: Any) -> None:
    inputs = problem(6, 50, 2, low=3, high=9)
    weights = [torch.nn.Parameter(inputs[name].clone()) for name in ("gate_up", "down")]
    before = [weight.detach().clone() for weight in weights]
    expert_mlp(**{**inputs, "gate_up": weights[0], "down": weights[1], "sparse_grad": True}).square().sum().backward()
    with torch.sparse.check_sparse_tensor_invariants():
        optimizer(weights, lr=0.01).step()
    idle = torch.ones(50, dtype=torch.bool)
    idle[inputs["ids"].unique()] = False
    for weight, old in zip(weights, before, strict=True):
        assert torch.equal(weight[idle], old[idle])
        assert not torch.equal(weight[~idle], old[~idle])


MILLION = """
import resource, sys, torch
from moesaic.kernels import expert_mlp
E, k, T, d = 1_000_000, 128, 64, 256
torch.manual_seed(0)
gate_up = torch.empty(E, 2, d, dtype=torch.bfloat16).uniform_(-0.1, 0.1).transpose(1, 2).requires_grad_()
down = torch.empty(E, 1, d, dtype=torch.bfloat16).uniform_(-0.1, 0.1).requires_grad_()
x = torch.randn(T, d, dtype=torch.bfloat16).requires_grad_()
ids, weights = torch.randint(0, E, (T, k)), torch.rand(T, k).requires_grad_()
y = expert_mlp(x, gate_up, down, weights, ids)
y.backward(torch.randn_like(y))
assert y.isfinite().all() and x.grad.isfinite().all() and weights.grad.isfinite().all()
assert int((down.grad[ids[0, 0]] != 0).sum()) > 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_a_million_experts_of_one_neuron_fit_into_four_gigabytes() -> None:
    done = subprocess.run([sys.executable, "-c", MILLION], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 4e9


def dropped_expert(**inputs: Any) -> Tensor:
    return expert_mlp(**{**inputs, "ids": inputs["ids"].masked_fill(inputs["ids"] == 1, -1)})


@pytest.mark.parametrize(
    "mutant",
    [
        lambda **inputs: expert_mlp(**inputs) * 0.0,
        dropped_expert,
        lambda **inputs: expert_mlp(**{**inputs, "weights": inputs["weights"] * 0 + 1}),
        lambda **inputs: expert_mlp(**inputs).roll(1, 0),
        lambda **inputs: expert_mlp(**{**inputs, "ids": (inputs["ids"] + 1) % 5}),
        lambda **inputs: expert_mlp(**inputs, interleaved=True),
    ],
    ids=["zeros", "dropped expert", "no gate weights", "rows off by one", "experts off by one", "interleaved"],
)
def test_the_tolerance_can_fail(mutant: Callable[..., Tensor]) -> None:
    inputs = problem()
    truth = run(reference.expert_mlp, inputs, LEAVES, torch.float64)
    errors = [scaled_error(a, b) for a, b in zip(run(mutant, inputs, LEAVES), truth, strict=True)]
    assert errors[0] > 1e3 * TOLERANCE


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("activation must be a function or one of swiglu, .*, got 'tanh'", {"activation": "tanh"}),
        ("interleaved takes one of the gated activations", {"activation": "relu", "interleaved": True}),
        (r"gate_up must have shape \(E, D, 2F\)", {"gate_up": torch.zeros(3, 4)}),
        ("gate_up must have an even last dimension for 'swiglu', got 5", {"gate_up": torch.zeros(5, 7, 5)}),
        (r"x must have shape \(..., 7\) to match gate_up, got \(13, 8\)", {"x": torch.zeros(13, 8)}),
        (r"down must have shape \(5, 6, N\), got \(5, 12, 7\)", {"down": torch.zeros(5, 12, 7)}),
        (r"weights and ids must have shape \(13, k\)", {"weights": torch.zeros(13, 3)}),
        ("weights and ids must have shape", {"weights": torch.zeros(12, 2), "ids": torch.zeros(12, 2).long()}),
        ("ids must be integers", {"ids": torch.zeros(13, 2)}),
        ("precision must be one of ieee, tf32x3, tf32, got 'exact'", {"precision": "exact"}),
        ("x and gate_up must have one floating-point dtype", {"x": torch.zeros(13, 7).double()}),
        ("x and down must have one floating-point dtype", {"down": torch.zeros(5, 6, 7).double()}),
        (r"bias must be torch.float32 \(5, 12\)", {"gate_up_bias": torch.zeros(5, 6)}),
    ],
)
def test_bad_arguments_are_named(message: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        expert_mlp(**{**problem(), **change})
