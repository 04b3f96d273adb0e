"""expert_mlp against its dense float64 oracle: every activation, gradient subset, edge shape, and what is saved."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moesaic.kernels import reference
from moesaic.kernels.expert_mlp import ACTIVATIONS, GATED, expert_mlp

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

    width = 2 * d_ff if activation in GATED else d_ff
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


def test_the_clamps_of_gpt_oss_bite() -> None:
    inputs = problem(40, activation="gpt_oss", d_model=16)
    h = inputs["x"].unsqueeze(1) @ inputs["gate_up"][0]
    assert h[..., :6].max() > 7
    assert h[..., 6:].abs().max() > 7
    check(inputs)


@pytest.mark.parametrize("n_tokens", [0, 1, 63])
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

    assert torch.equal(expert_mlp(**{**inputs, "activation": swiglu}), named)
    doubled = expert_mlp(**inputs, post_norm=lambda rows: rows * 2.0)
    assert torch.equal(doubled, named * 2.0)


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


def test_compiles_without_a_graph_break() -> None:
    inputs = problem()
    compiled = torch.compile(expert_mlp, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(run(compiled, inputs, LEAVES), run(expert_mlp, inputs, LEAVES), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


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
        ("activation must be one of swiglu, .*, got 'tanh'", {"activation": "tanh"}),
        ("interleaved takes one of the gated activations", {"activation": "relu", "interleaved": True}),
        (r"gate_up must have shape \(E, D, 2F\)", {"gate_up": torch.zeros(3, 4)}),
        ("gate_up must have an even last dimension for 'swiglu', got 5", {"gate_up": torch.zeros(5, 7, 5)}),
        (r"x must have shape \(..., 7\) to match gate_up, got \(13, 8\)", {"x": torch.zeros(13, 8)}),
        (r"down must have shape \(5, 6, N\), got \(5, 12, 7\)", {"down": torch.zeros(5, 12, 7)}),
        (r"weights and ids must have shape \(13, k\)", {"weights": torch.zeros(13, 3)}),
        ("weights and ids must have shape", {"weights": torch.zeros(12, 2), "ids": torch.zeros(12, 2).long()}),
        ("ids must be integers", {"ids": torch.zeros(13, 2)}),
        (r"bias must be torch.float32 \(5, 12\)", {"gate_up_bias": torch.zeros(5, 6)}),
    ],
)
def test_bad_arguments_are_named(message: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        expert_mlp(**{**problem(), **change})
