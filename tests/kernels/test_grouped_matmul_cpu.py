"""The CPU twins of the grouped products against the float64 oracle: dtypes, layouts, groups, threads, without Numba."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numba
import pytest
import torch
from torch import Tensor

from moesaic.kernels import grouped_matmul_cpu as cpu
from moesaic.kernels import reference
from moesaic.kernels._extras import numba_twin
from moesaic.kernels.activations import ACTIVATIONS, GATED, activate_backward

# Worst error over the reference's RMS: a float32 sum of 8,103 products stays under it, each mutation is above 0.1.
TOLERANCE = 1e-5
# Sizes about every edge: of a line of 16, a tile of 6 rows, the few rows of a task, the terms and columns of a pass.
COUNTS = [0, 5, 1, 70, 0, 49, 6, 0]
ROWS = sum(COUNTS) + 3
SHAPES = [(1, 1), (7, 3), (16, 16), (47, 97), (300, 20), (3, 530)]


@pytest.fixture(autouse=True, scope="module")
def _oracle_alone() -> Iterator[None]:
    """The oracle's many small products take longer with two threads than with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory is NaN, so an output element that nothing wrote shows."""
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        out = empty(*size, **options)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(params=[True, False], ids=["numba", "torch"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(cpu, "find_spec", lambda name: None)


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = numba.get_num_threads()
    numba.set_num_threads(number)
    try:
        yield
    finally:
        numba.set_num_threads(before)


def scaled_error(got: Tensor, truth: Tensor) -> float:
    assert got.shape == truth.shape
    assert not got.isnan().any()
    if truth.numel() == 0 or not truth.any():
        return float(got.abs().sum())
    return float((got.double() - truth).abs().max() / truth.square().mean().sqrt())


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def stored(weight: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return weight.mT.contiguous().mT
    if layout == "strided":
        return torch.stack([weight, weight.roll(1, 0)], -1).flatten(-2)[..., ::2]
    if layout == "expert last":
        return weight.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return weight


def problem(
    counts: list[int], k: int, n: int, *, gather: bool = False, skipped: int = 3, dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
) -> dict[str, Any]:  # fmt: skip
    n_rows = sum(counts) + skipped
    n_tokens = n_rows // 2 + 1 if gather else n_rows
    pick = torch.randint(0, n_tokens, (n_rows,), generator=torch.Generator().manual_seed(9)) if gather else None
    return {
        "x": draw(n_tokens, k, seed=0, dtype=dtype),
        "weight": stored(draw(len(counts), k, n, seed=1, dtype=dtype), layout),
        "offsets": torch.tensor([0, *counts]).cumsum(0),
        "bias": draw(len(counts), n, seed=2, dtype=dtype),
        "gather": pick,
    }


def true_rows(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, gather: Tensor | None) -> Tensor:
    given = None if bias is None else bias.double()
    return reference.grouped_matmul(x.double(), weight.double(), offsets, bias=given, gather=gather)


def true_outer(x: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    bounds = offsets.tolist()
    return torch.stack([x[a:b].double().mT @ grad[a:b].double() for a, b in pairwise(bounds)])


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "expert last"])
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_rows(k: int, n: int, gather: bool, layout: str) -> None:
    inputs = problem(COUNTS, k, n, gather=gather, layout=layout)
    for bias in (inputs["bias"], None):
        given = {**inputs, "bias": bias}
        got = cpu.rows(**given)
        assert got.dtype == torch.float32
        assert scaled_error(got, true_rows(**given)) < TOLERANCE
        assert not got[-3:].any()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gather", ["none", "left", "right", "both"])
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_outer(k: int, n: int, gather: str, transposed: bool) -> None:
    offsets = torch.tensor([0, *COUNTS]).cumsum(0)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(3))
    left, right = (order if gather in (side, "both") else None for side in ("left", "right"))
    x, grad = draw(ROWS, k + 2, seed=4)[:, 1:-1], draw(n, ROWS, seed=5).t()
    truth = true_outer(x if left is None else x[left], grad if right is None else grad[right], offsets)
    got = cpu.outer(x, grad, offsets, left, right, transposed)
    assert scaled_error(got, truth) < TOLERANCE
    assert (got.mT if transposed else got).is_contiguous()
    ones = torch.ones(ROWS, 1)
    sums = cpu.outer(None, grad, offsets, None, right, transposed)
    assert scaled_error(sums, true_outer(ones, grad if right is None else grad[right], offsets)) < TOLERANCE
    scale = draw(ROWS, seed=6)
    got = cpu.column_sums(grad, offsets, right, scale)
    truth = true_outer(scale.unsqueeze(1), grad if right is None else grad[right], offsets)
    assert scaled_error(got, truth.squeeze(1)) < TOLERANCE


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "find_spec", lambda name: None)
    monkeypatch.setattr(cpu, "numba_twin", None)
    for layout in ("contiguous", "transposed"):
        test_rows(7, 3, True, layout)
        test_rows(16, 16, False, layout)
    for gather in ("none", "left", "right", "both"):
        test_outer(7, 3, gather, gather == "left")


@pytest.mark.parametrize(
    ("activation", "interleaved"), [(name, turned) for name in ACTIVATIONS for turned in sorted({False, name in GATED})]
)
def test_activated(activation: str, interleaved: bool, either: None) -> None:
    width = 37 * (1 + (activation in GATED))
    inputs = problem(COUNTS, 21, width, gather=True)
    # Some are clipped.
    inputs["x"] *= 2.0
    scale = draw(ROWS, seed=7)
    scale[-3:] = torch.nan
    a, h = cpu.rows_activated(**inputs, row_weight=scale, activation=activation, interleaved=interleaved, keep=True)
    true_h, kept = true_rows(**inputs), scale[:-3].double().unsqueeze(1)
    true_a = reference.activate(true_h[:-3], activation, interleaved) * kept
    assert scaled_error(h, true_h) < TOLERANCE
    assert scaled_error(a[:-3], true_a) < TOLERANCE
    assert not torch.cat([a[-3:], h[-3:, :37]], 1).any()
    other, nothing = cpu.rows_activated(
        **inputs, row_weight=None, activation=activation, interleaved=interleaved, keep=False
    )
    assert nothing.shape == (0, width)
    assert scaled_error(other[:-3], true_a / kept) < TOLERANCE
    grad, down = draw(200, 19, seed=10), draw(len(COUNTS), 37, 19, seed=11).mT
    given = {"gather": inputs["gather"], "h": h, "activation": activation, "interleaved": interleaved}
    for weights in (scale, None):
        dh, scaled, ds = cpu.rows_activated_backward(grad, down, inputs["offsets"], row_weight=weights, **given)
        d = true_rows(grad, down, inputs["offsets"], None, inputs["gather"])[:-3]
        factor = torch.ones_like(kept) if weights is None else kept
        exact, true_dh = activate_backward(h[:-3].double(), d * factor, activation, interleaved)
        pairs = ((dh, true_dh), (scaled, exact * factor), (ds, (d * exact).sum(1)))
        for got, truth in pairs:
            assert scaled_error(got[:-3], truth) < TOLERANCE
            assert not got[-3:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 3])
def test_combine(k: int, dtype: torch.dtype, either: None) -> None:
    n_tokens, n, kept = 21, 35, 21 * k - 4
    rows, weights = draw(n_tokens * k, n, seed=0, dtype=dtype), draw(n_tokens * k, seed=1)
    inverse = torch.randperm(n_tokens * k, generator=torch.Generator().manual_seed(2))
    rows[kept:], weights[inverse >= kept] = torch.nan, torch.nan
    for given in (weights, None):
        factor = torch.ones(n_tokens * k) if given is None else given
        terms = torch.where((inverse < kept).unsqueeze(1), rows[inverse].double() * factor.double().unsqueeze(1), 0.0)
        got = cpu.combine(rows, given, inverse, torch.tensor(kept), k)
        assert got.dtype == dtype
        truth = terms.view(n_tokens, k, n).sum(1)
        assert scaled_error(got, truth) < {torch.bfloat16: 2e-2, torch.float16: 3e-3}.get(dtype, TOLERANCE)


def test_float64_is_exact(either: None) -> None:
    for layout in ("contiguous", "transposed"):
        inputs = problem(COUNTS, 47, 97, gather=True, dtype=torch.float64, layout=layout)
        assert scaled_error(cpu.rows(**inputs), true_rows(**inputs)) < 1e-14
    x, grad = draw(ROWS, 70, seed=4).double(), draw(ROWS, 33, seed=5).double()
    got = cpu.outer(x, grad, inputs["offsets"], None, None, False)
    assert scaled_error(got, true_outer(x, grad, inputs["offsets"])) < 1e-14
    given: dict[str, Any] = {
        "bias": None,
        "gather": None,
        "row_weight": None,
        "activation": "swiglu",
        "interleaved": False,
    }
    weight = draw(len(COUNTS), 70, 8, seed=6).double()
    a, h = cpu.rows_activated(x, weight, inputs["offsets"], keep=True, **given)
    assert a.dtype == h.dtype == torch.float64
    assert scaled_error(a, reference.activate(h, "swiglu")) < 1e-14


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_torch(dtype: torch.dtype, layout: str) -> None:
    """Torch's product of the same dtype, expert by expert, is the budget, in the worst and in the mean."""
    counts = [70, 0, 5, 58]
    inputs = problem(counts, 64, 48, skipped=0, dtype=dtype, layout=layout) | {"bias": None}
    bounds = inputs["offsets"].tolist()
    parts = [(e, slice(bounds[e], bounds[e + 1])) for e in range(len(counts))]
    grad = draw(133, 48, seed=3, dtype=dtype)
    naive_rows = torch.cat([inputs["x"][part] @ inputs["weight"][e] for e, part in parts])
    naive_outer = torch.stack([inputs["x"][part].t() @ grad[part] for _, part in parts])
    outer = cpu.outer(inputs["x"], grad, inputs["offsets"], None, None, layout == "transposed")
    for got, naive, truth in (
        (cpu.rows(**inputs), naive_rows, true_rows(**inputs)),
        (outer, naive_outer, true_outer(inputs["x"], grad, inputs["offsets"])),
    ):
        assert got.dtype == dtype
        mine, theirs = got.double() - truth, naive.double() - truth
        assert mine.abs().max() <= 1.01 * theirs.abs().max()
        assert mine.square().mean().sqrt() <= 1.01 * theirs.square().mean().sqrt()
        assert theirs.abs().max() < 0.1 * truth.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_converts_exactly(dtype: torch.dtype) -> None:
    """All 65,536 numbers, subnormal ones, infinities and NaN too, through a product with 1 and through a sum of one."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    one, offsets = torch.ones(1, 1, dtype=dtype), torch.tensor([0, 1])
    for weight in (numbers.view(1, 1, -1), numbers.view(1, -1, 1).mT):
        got = cpu.rows(one, weight, offsets, None, None)[0]
        assert torch.equal(got.isnan(), numbers.isnan())
        assert torch.equal(got.nan_to_num(7.0), numbers.nan_to_num(7.0))
    wide = draw(1 << 16, seed=0) * draw(1 << 16, seed=1).mul(8).exp()
    wide[:4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 65519.9])
    # Halves of a step, which tie, and a NaN that one more bit would make a zero.
    wide[4:68] = (
        (torch.arange(64) * (0x8000 if dtype == torch.bfloat16 else 0x1000) + 0x3F800000).int().view(torch.float32)
    )
    wide[68] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    sums = cpu._zeros((1, 1 << 16), dtype, 1)
    twin = numba_twin("grouped_cpu")
    twin.sums(0, 1, *(torch.tensor([e]).numpy() for e in (0, 0, 1)), cpu._TAGS[torch.float32], wide.data_ptr(), 0,
              cpu._NOWHERE, False, cpu._TAGS[torch.float32], cpu._TAGS[torch.float32], 1 << 16, cpu._TAGS[dtype],
              sums.data_ptr())  # fmt: skip
    assert torch.equal(sums[0].nan_to_num(7.0), wide.to(dtype).nan_to_num(7.0))


def test_nan_and_infinity_reach_their_rows_only(either: None) -> None:
    inputs = problem([3, 0, 60], 40, 33, skipped=0)
    inputs["x"][1, 39], inputs["x"][5, 0], inputs["weight"][1] = torch.nan, torch.inf, torch.nan
    inputs["weight"][2, 0].abs_()
    got = cpu.rows(**inputs)
    assert got[1].isnan().all()
    assert torch.equal(got[5], torch.full((33,), torch.inf))
    assert got[[0, *range(2, 5), *range(6, 63)]].isfinite().all()
    a, _ = cpu.rows_activated(
        **(inputs | {"weight": inputs["weight"][..., :32], "bias": None}), row_weight=None, activation="swiglu",
        interleaved=False, keep=False,
    )  # fmt: skip
    assert a[1].isnan().all()
    assert a[6:].isfinite().all()


def test_uneven_groups(either: None) -> None:
    counts = [219, 2246, 5, 8103, 1, 1117, 4693, 0]
    inputs = problem(counts, 10, 12, skipped=0)
    bounds, x, grad = inputs["offsets"].tolist(), inputs["x"], draw(sum(counts), 12, seed=3)
    truth = torch.cat([x[bounds[e] : bounds[e + 1]].double() @ inputs["weight"][e].double() for e in range(8)])
    assert scaled_error(cpu.rows(**(inputs | {"bias": None})), truth) < TOLERANCE
    got = cpu.outer(x, grad, inputs["offsets"], None, None, False)
    assert scaled_error(got, true_outer(x, grad, inputs["offsets"])) < TOLERANCE
    sums = cpu.column_sums(grad, inputs["offsets"], None, None).unsqueeze(1)
    assert scaled_error(sums, true_outer(torch.ones(len(x), 1), grad, inputs["offsets"])) < TOLERANCE


def everything(shift: int = 0) -> list[Tensor]:
    """All functions' outputs; ``shift`` moves the inputs in memory by so many bytes."""

    def moved(tensor: Tensor) -> Tensor:
        raw = torch.zeros(tensor.numel() * 4 + 64, dtype=torch.uint8)
        target = raw[shift : shift + tensor.numel() * 4].view(torch.float32).view(tensor.shape)
        return target.copy_(tensor)

    found = []
    for transposed in (False, True):
        stored_weight = draw(8, 310, 100, seed=1).mT if transposed else draw(8, 100, 310, seed=1).contiguous()
        weight = moved(stored_weight.mT.contiguous()).mT if transposed else moved(stored_weight)
        offsets, gather = torch.tensor([0, *COUNTS]).cumsum(0), torch.arange(ROWS - 3) // 2
        x, down = moved(draw(200, 100, seed=0)), moved(draw(8, 77, 155, seed=2))
        a, h = cpu.rows_activated(x, weight, offsets, None, gather, None, "swiglu", False, True)
        grad = moved(draw(ROWS - 3, 77, seed=3))
        found += [a, h, *cpu.rows_activated_backward(grad, down, offsets, None, h, None, "swiglu", False)]
        rows = cpu.rows(a, down.mT, offsets, None, None)
        found += [rows, cpu.outer(x, h, offsets, gather, None, transposed)]
        found.append(cpu.column_sums(moved(draw(ROWS - 3, 77, seed=4)), offsets, None, moved(draw(ROWS - 3, seed=5))))
        found.append(
            cpu.combine(rows, moved(draw(ROWS - 3, seed=6)), torch.arange(ROWS - 3).flip(0), torch.tensor(ROWS - 3), 19)
        )
    return found


def test_bits_depend_on_neither_threads_nor_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_ALONE", 0)
    with threads(1):
        alone = everything()
    for shift in (0, 4, 20):
        assert all(torch.equal(a, b) for a, b in zip(everything(shift), alone, strict=True))


def test_a_million_experts_cost_what_their_rows_do(either: None) -> None:
    n_experts, busy = 1_000_000, torch.tensor([0, 17, 500_000, 999_999])
    counts = torch.zeros(n_experts, dtype=torch.int64)
    counts[busy] = torch.tensor([3, 1, 2, 4])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    few = torch.tensor([0, 3, 4, 6, 10])
    x, weight, small = draw(10, 5, seed=0), torch.zeros(n_experts, 5, 3), draw(4, 5, 3, seed=1)
    weight[busy] = small
    assert scaled_error(cpu.rows(x, weight, offsets, None, None), true_rows(x, small, few, None, None)) < TOLERANCE
    grad, begin = draw(10, 3, seed=2), time.perf_counter()
    got = cpu.outer(x, grad, offsets, None, None, False)
    assert time.perf_counter() - begin < 5.0
    assert scaled_error(got[busy], true_outer(x, grad, few)) < TOLERANCE
    assert got.count_nonzero() == got[busy].count_nonzero()


def test_nothing_to_do(either: None) -> None:
    for counts, k, n, skipped in (([0, 0], 3, 4, 0), ([0, 0], 3, 4, 2), ([2, 1], 0, 4, 0), ([2, 1], 3, 0, 0)):
        inputs = problem(counts, k, n, skipped=skipped)
        assert scaled_error(cpu.rows(**inputs), true_rows(**inputs)) == 0.0 or k == 0
        grad = draw(sum(counts) + skipped, n, seed=1)
        assert not cpu.outer(inputs["x"], grad, inputs["offsets"], None, None, False)[counts == [0, 0] :].any()
        a, h = cpu.rows_activated(**inputs, row_weight=None, activation="relu", interleaved=False, keep=True)
        assert a.shape == h.shape == (len(inputs["x"]), n)
        dh, scaled, ds = cpu.rows_activated_backward(
            inputs["x"], inputs["weight"], inputs["offsets"], None, h, None, "relu", False
        )
        assert (dh.shape, scaled.shape, ds.shape) == (h.shape, a.shape, a.shape[:1])
    assert cpu.combine(torch.zeros(0, 3), None, torch.zeros(0, dtype=torch.int64), torch.tensor(0), 2).shape == (0, 3)


def test_groups_checks_offsets() -> None:
    experts, starts, ends = cpu.groups(torch.tensor([0, 0, 2, 2, 5]), 6)
    assert (experts.tolist(), starts.tolist(), ends.tolist()) == ([1, 3], [0, 2], [2, 5])
    for bad in ([0, 2, 6], [0, 3, 2], [1, 2, 3]):
        with pytest.raises(ValueError, match=f"at most the 5 rows, got {bad[0]} … {bad[-1]}"):
            cpu.groups(torch.tensor(bad), 5)


@pytest.mark.parametrize(
    "mutant",
    [
        lambda inputs: inputs | {"offsets": torch.tensor([0, 10, 14, 19])},
        lambda inputs: inputs | {"weight": inputs["weight"] * torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1)},
        lambda inputs: inputs | {"bias": None},
        lambda inputs: inputs | {"gather": inputs["gather"].roll(1)},
    ],
    ids=["shifted groups", "dropped expert", "no bias", "rows off by one"],
)
def test_the_tolerance_can_fail(mutant: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    inputs = problem([9, 4, 6], 7, 5, skipped=0, gather=True)
    assert scaled_error(cpu.rows(**mutant(inputs)), true_rows(**inputs)) > 1e4 * TOLERANCE
