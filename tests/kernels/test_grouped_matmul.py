"""grouped_matmul against its float64 oracle: values, every gradient subset, layouts, edges, registration, FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch.utils.flop_counter import FlopCounterMode

from moesaic.kernels import reference
from moesaic.kernels.grouped_matmul import _activated, _grouped_mm, _grouped_outer, _scatter, grouped_matmul

# Worst error over the reference's RMS: a float32 sum of 577 products stays well under it, each mutation is above 0.1.
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory is NaN, so an output element that nothing wrote shows."""
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *size, **kw: self.new_full(_flat(size), torch.nan, **kw))


def _flat(size: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size


def scaled_error(got: Tensor, truth: Tensor) -> float:
    assert got.shape == truth.shape
    assert not got.isnan().any()
    if truth.numel() == 0 or not truth.any():
        return float(got.detach().abs().sum())
    got, truth = got.detach().double(), truth.detach()
    return float((got - truth).abs().max() / truth.square().mean().sqrt())


def offsets_of(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(counts: list[int], k: int, n: int, *, skipped: int = 0, gather: bool = False) -> dict[str, Any]:
    n_rows = sum(counts) + skipped
    n_tokens = n_rows // 2 + 1 if gather else n_rows
    pick = torch.randint(0, n_tokens, (n_rows,), generator=torch.Generator().manual_seed(9)) if gather else None
    return {
        "x": draw(n_tokens, k, seed=0),
        "weight": draw(len(counts), k, n, seed=1),
        "bias": draw(len(counts), n, seed=2),
        "offsets": offsets_of(counts),
        "gather": pick,
    }


def run(
    function: Callable[..., Tensor], inputs: dict[str, Any], wanted: tuple[str, ...] = (), dtype: Any = torch.float32
) -> list[Tensor]:
    """The output and the gradients of the wanted inputs for a random upstream."""
    arguments = dict(inputs)
    for name in ("x", "weight", "bias"):
        if arguments[name] is not None:
            arguments[name] = arguments[name].detach().to(dtype).requires_grad_(name in wanted)
    leaves = [arguments[name] for name in wanted]
    out = function(**arguments)
    assert out.requires_grad == bool(wanted)
    upstream = draw(*out.shape, seed=3, dtype=torch.float32).to(dtype)
    return [out, *(torch.autograd.grad(out, leaves, upstream) if leaves else ())]


def check(inputs: dict[str, Any], wanted: tuple[str, ...] = ("x", "weight", "bias")) -> None:
    got = run(grouped_matmul, inputs, wanted)
    truth = run(reference.grouped_matmul, inputs, wanted, torch.float64)
    for name, mine, theirs in zip(("out", *wanted), got, truth, strict=True):
        assert mine.dtype == torch.float32
        assert scaled_error(mine, theirs) < TOLERANCE, name


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("skipped", [0, 5])
@pytest.mark.parametrize(
    ("counts", "k", "n"),
    [
        ([0, 3, 0, 7, 1, 0], 5, 4),  # empty experts first, between and last
        ([0, 0, 0], 3, 2),  # nobody
        ([1], 1, 1),  # a single number
        ([63, 0, 0, 0, 0, 0, 0], 47, 97),  # prime E, odd sizes, one expert takes all
        ([21, 22, 5, 8, 1, 11, 46, 0], 577, 3),
        ([1] * 31, 2, 16),  # decode: one row each
    ],
)
def test_values_and_gradients(counts: list[int], k: int, n: int, skipped: int, gather: bool) -> None:
    check(problem(counts, k, n, skipped=skipped, gather=gather))


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize(
    "wanted", [subset for size in range(4) for subset in combinations(("x", "weight", "bias"), size)]
)
def test_every_subset_of_gradients(wanted: tuple[str, ...], gather: bool) -> None:
    check(problem([4, 0, 9, 2], 6, 5, gather=gather), wanted)
    if "bias" not in wanted:
        check({**problem([4, 0, 9, 2], 6, 5, gather=gather), "bias": None}, wanted)


def test_gradcheck_twice() -> None:
    inputs = problem([2, 0, 3], 3, 2, skipped=1, gather=True)
    offsets, gather = inputs["offsets"], inputs["gather"]
    leaves = tuple(inputs[name].double().requires_grad_() for name in ("x", "weight", "bias"))

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return grouped_matmul(x, weight, offsets, bias=bias, gather=gather)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_any_strides_and_the_gradient_keeps_the_layout() -> None:
    counts, offsets = [3, 0, 4], offsets_of([3, 0, 4])
    stored = draw(3, 6, 5, seed=1).requires_grad_()
    x = draw(10, 14, seed=0)[::1, ::2][:7, 1:6]
    assert not x.is_contiguous()
    got = grouped_matmul(x, stored.transpose(1, 2), offsets)
    truth = reference.grouped_matmul(x.double(), stored.detach().double().transpose(1, 2), offsets)
    assert scaled_error(got, truth) < TOLERANCE
    (view_grad,) = torch.autograd.grad(grouped_matmul(x, view := stored.transpose(1, 2), offsets).sum(), view)
    assert view_grad.stride() == view.stride()
    broadcast = draw(1, 5, 6, seed=4).expand(len(counts), 5, 6)
    assert scaled_error(grouped_matmul(x, broadcast, offsets), (x.double() @ broadcast[0].double())) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_torch(dtype: torch.dtype) -> None:
    """The error of torch's own product in the same dtype, expert by expert, is the budget."""
    inputs = problem([40, 0, 30, 58], 64, 48)
    inputs["bias"] = None
    wanted = ("x", "weight")

    def naive(x: Tensor, weight: Tensor, offsets: Tensor, **_: object) -> Tensor:
        return torch.cat([x[offsets[e] : offsets[e + 1]] @ weight[e] for e in range(weight.shape[0])])

    rounded = {**inputs, "x": inputs["x"].to(dtype).float(), "weight": inputs["weight"].to(dtype).float()}
    truth = run(reference.grouped_matmul, rounded, wanted, torch.float64)
    got, budget = run(grouped_matmul, rounded, wanted, dtype), run(naive, rounded, wanted, dtype)
    upstream_rounding = 1e-2  # the upstream gradient is rounded too, alike for both
    for mine, theirs, exact in zip(got, budget, truth, strict=True):
        assert mine.dtype == dtype
        assert scaled_error(mine, exact) <= 1.01 * scaled_error(theirs, exact) < upstream_rounding * 8


def test_a_million_experts_cost_what_their_rows_do() -> None:
    n_experts, counts = 1_000_000, torch.zeros(1_000_000, dtype=torch.int64)
    busy = torch.tensor([0, 17, 500_000, 999_999])
    counts[busy] = torch.tensor([3, 1, 2, 4])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    x = draw(10, 4, seed=0)
    weight = torch.zeros(n_experts, 4, 1)
    weight[busy] = draw(4, 4, 1, seed=1)
    small = reference.grouped_matmul(x.double(), weight[busy].double(), offsets_of([3, 1, 2, 4]))
    assert scaled_error(grouped_matmul(x, weight, offsets), small) < TOLERANCE


def test_same_inputs_same_bits() -> None:
    inputs = problem([30, 0, 50, 20], 33, 17, gather=True)
    first, second = (run(grouped_matmul, inputs, ("x", "weight", "bias")) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize(
    ("activation", "interleaved"), [(None, False), ("relu2", False), ("swiglu", False), ("gpt_oss", True)]
)
def test_activation_and_row_weights(activation: str | None, interleaved: bool, gather: bool) -> None:
    inputs = problem([4, 0, 9, 2], 6, 8, skipped=2, gather=gather)
    scale = draw(17, seed=7)
    scale[15:] = torch.nan  # weights of skipped rows are not read
    kept = (torch.arange(17) < 15).unsqueeze(1)
    names = ("x", "weight", "bias", "scale")

    def oracle(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        h = reference.grouped_matmul(x, weight, inputs["offsets"], bias=bias, gather=inputs["gather"])
        a = h if activation is None else reference.activate(h, activation, interleaved)
        return torch.where(kept, a, 0.0) * scale.where(kept[:, 0], 0.0).unsqueeze(1)

    def ours(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        return grouped_matmul(
            x, weight, inputs["offsets"], bias=bias, gather=inputs["gather"], activation=activation,
            interleaved=interleaved, row_weight=scale,
        )  # fmt: skip

    for wanted in [subset for size in range(5) for subset in combinations(names, size)]:
        results = []
        for function, dtype in ((ours, torch.float32), (oracle, torch.float64)):
            values = {**inputs, "scale": scale}
            given = {name: values[name].detach().to(dtype).requires_grad_(name in wanted) for name in names}
            out = function(**given)
            assert out.requires_grad == bool(wanted)
            upstream = draw(*out.shape, seed=3).to(dtype)
            leaves = [given[name] for name in wanted]
            results.append([out, *(torch.autograd.grad(out, leaves, upstream) if leaves else ())])
        for name, mine, truth in zip(("out", *wanted), *results, strict=True):
            assert scaled_error(mine, truth) < TOLERANCE, (name, wanted)


def test_an_activation_can_be_differentiated_once_and_says_so() -> None:
    inputs = problem([2, 3], 3, 4)
    x = inputs["x"].requires_grad_()
    out = grouped_matmul(x, inputs["weight"], inputs["offsets"], activation="silu")
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


def test_opcheck_with_an_activation() -> None:
    inputs = problem([2, 0, 3], 4, 6, skipped=1)
    x, weight, bias = (inputs[name].requires_grad_() for name in ("x", "weight", "bias"))
    scale = draw(6, seed=1).requires_grad_()
    rest = (inputs["offsets"], bias, None, scale, "swiglu", False, True, "ieee")
    torch.library.opcheck(_activated, (x, weight, *rest))


def shifted(x: Tensor, weight: Tensor, offsets: Tensor, **options: Any) -> Tensor:
    moved = offsets.clone()
    moved[1:-1] += 1
    return grouped_matmul(x, weight, moved, **options)


def without_one_expert(x: Tensor, weight: Tensor, offsets: Tensor, **options: Any) -> Tensor:
    keep = torch.ones(weight.shape[0], 1, 1)
    keep[1] = 0.0
    return grouped_matmul(x, weight * keep, offsets, **options)


@pytest.mark.parametrize(
    "mutant",
    [
        lambda **inputs: grouped_matmul(**inputs) * 0.0,
        without_one_expert,
        shifted,
        lambda **inputs: grouped_matmul(**{**inputs, "bias": None}) + 0.0 * inputs["bias"].sum(),
        lambda **inputs: grouped_matmul(**inputs).roll(1, 0),
    ],
    ids=["zeros", "dropped expert", "shifted groups", "no bias", "rows off by one"],
)
def test_the_tolerance_can_fail(mutant: Callable[..., Tensor]) -> None:
    inputs = problem([9, 4, 6], 7, 5)
    wanted = ("x", "weight", "bias")
    truth = run(reference.grouped_matmul, inputs, wanted, torch.float64)
    errors = [scaled_error(a, b) for a, b in zip(run(mutant, inputs, wanted), truth, strict=True)]
    assert max(errors) > 1e4 * TOLERANCE
    assert errors[0] > 1e4 * TOLERANCE


def test_flops_forward_and_backward() -> None:
    rows, k, n = 13, 6, 5
    for gather in (False, True):
        inputs = problem([4, 0, 9], k, n, gather=gather)
        with FlopCounterMode(display=False) as counter:
            run(grouped_matmul, inputs)
        assert counter.get_total_flops() == 2 * rows * k * n
        for wanted, factor in ((("x",), 2), (("weight",), 2), (("bias",), 1), (("x", "weight", "bias"), 3)):
            with FlopCounterMode(display=False) as counter:
                run(grouped_matmul, inputs, wanted)
            assert counter.get_total_flops() == factor * 2 * rows * k * n


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gather", [False, True])
def test_opcheck(transposed: bool, gather: bool) -> None:
    inputs = problem([2, 0, 3], 4, 3, skipped=1, gather=gather)
    x, weight, bias = (inputs[name].requires_grad_() for name in ("x", "weight", "bias"))
    if transposed:
        weight = weight.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    grad = draw(6, 3, seed=5).requires_grad_()
    torch.library.opcheck(_grouped_mm, (x, weight, inputs["offsets"], bias, inputs["gather"]))
    torch.library.opcheck(_grouped_outer, (x, grad, inputs["offsets"], inputs["gather"], 4, transposed))
    torch.library.opcheck(_grouped_outer, (None, grad, inputs["offsets"], None, 1, False))


def test_rows_are_added_up_by_an_op_that_no_compiler_takes_apart() -> None:
    """Inductor makes atomic additions of an accumulating index_put: other bits in each run."""
    rows, gather = draw(6, 3, seed=0).requires_grad_(), torch.tensor([1, 0, 1, 1, 3, 0])
    torch.library.opcheck(_scatter, (rows, gather, 4))
    truth = torch.zeros(4, 3, dtype=torch.float64).index_add(0, gather, rows.detach().double())
    assert scaled_error(_scatter(rows, gather, 4), truth) < TOLERANCE
    inputs = problem([2, 0, 3], 4, 3, gather=True)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return make_boxed_func(graph.forward)

    run(torch.compile(grouped_matmul, fullgraph=True, backend=aot_autograd(fw_compiler=backend)), inputs, ("x",))
    assert any("moesaic.scatter_rows" in code for code in graphs)
    assert not any("index_put" in code or "index_add" in code for code in graphs)


def test_compiles_without_a_graph_break() -> None:
    inputs = problem([2, 0, 3], 4, 3, gather=True)
    wanted = ("x", "weight", "bias")
    compiled = torch.compile(grouped_matmul, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(run(compiled, inputs, wanted), run(grouped_matmul, inputs, wanted), strict=True):
        assert torch.equal(mine, theirs)


def test_autocast_casts_as_mm_does() -> None:
    inputs = problem([2, 0, 3], 8, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = grouped_matmul(**inputs)
    assert out.dtype == torch.bfloat16
    halves = {name: value.bfloat16() if name in ("x", "weight", "bias") else value for name, value in inputs.items()}
    assert torch.equal(out, grouped_matmul(**halves))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"weight must have shape \(E, K, N\), got \(4, 3\)", {"weight": torch.zeros(4, 3)}),
        (r"x must have shape \(rows, 4\) to match weight, got \(5, 3\)", {"x": torch.zeros(5, 3)}),
        ("one floating-point dtype, got torch.float64 and torch.float32", {"x": torch.zeros(5, 4).double()}),
        (r"offsets must be int64 \(4,\), got torch.int64 \(3,\)", {"offsets": torch.tensor([0, 2, 5])}),
        (r"offsets must be int64 \(4,\), got torch.int32", {"offsets": torch.tensor([0, 2, 2, 5]).int()}),
        ("offsets must rise from 0 to at most the 5 rows, got 0 … 6", {"offsets": torch.tensor([0, 2, 2, 6])}),
        ("offsets must rise", {"offsets": torch.tensor([0, 3, 2, 5])}),
        ("offsets must rise", {"offsets": torch.tensor([1, 2, 2, 5])}),
        (r"bias must be torch.float32 \(3, 3\), got torch.float32 \(3,\)", {"bias": torch.zeros(3)}),
        (r"gather must be int64 \(rows,\), got torch.int32", {"gather": torch.zeros(5, dtype=torch.int32)}),
        ("activation must be None or one of swiglu, .*, got 'tanh'", {"activation": "tanh"}),
        ("weight must have an even last dimension for 'swiglu', got 3", {"activation": "swiglu", "bias": None}),
        ("interleaved takes one of the gated activations", {"interleaved": True}),
        (r"row_weight must be floating point \(5,\), got torch.float32 \(4,\)", {"row_weight": torch.zeros(4)}),
        ("precision must be one of ieee, tf32x3, tf32, got 'half'", {"precision": "half"}),
    ],
)
def test_bad_arguments_are_named(message: str, change: dict[str, Any]) -> None:
    inputs = problem([2, 0, 3], 4, 3) | change
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**inputs)
