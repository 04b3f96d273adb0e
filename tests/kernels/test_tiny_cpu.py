"""The CPU twins of the products with narrow experts against float64 sums over the choices."""

from __future__ import annotations

import resource
import time
from typing import Any

import numba
import pytest
import torch
from torch import Tensor

from moesaic.kernels import grouped_matmul_cpu as cpu

TOLERANCE = 1e-5
HALF = {torch.bfloat16: 4e-2, torch.float16: 5e-3}
LAYOUTS = ["contiguous", "transposed", "expert last"]
E, T, CHOICES = 6, 9, 3


@pytest.fixture(params=[True, False], ids=["numba", "torch"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(cpu, "find_spec", lambda name: None)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def scaled_error(got: Tensor, truth: Tensor) -> float:
    assert got.shape == truth.shape
    assert not got.isnan().any()
    return float((got.double() - truth).abs().max() / truth.square().mean().sqrt())


def stored(weight: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return weight.mT.contiguous().mT
    return weight.permute(1, 2, 0).contiguous().permute(2, 0, 1) if layout == "expert last" else weight


def choices() -> Tensor:
    """Ids of which some are no expert's, before the first and after the last."""
    ids = torch.randint(-1, E + 1, (T * CHOICES,), generator=torch.Generator().manual_seed(0))
    ids[:2] = torch.tensor([-1, E])
    return ids


def products(rows: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
    """Σ over rows' own experts in float64, zeros where there is none."""
    inside, safe = ((ids >= 0) & (ids < E)).unsqueeze(1), ids.clamp(0, E - 1)
    out = torch.einsum("rk,rkn->rn", rows.double(), weight.double()[safe])
    return torch.where(inside, out if bias is None else out + bias.double()[safe], 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("long", "short"), [(37, 1), (16, 2), (70, 15)])
def test_dot_and_spread(long: int, short: int, layout: str, dtype: torch.dtype, either: None) -> None:
    ids, tolerance = choices(), HALF.get(dtype, TOLERANCE)
    x, bias = draw(T, long, seed=1, dtype=dtype), draw(E, short, seed=2, dtype=dtype)
    weight = stored(draw(E, long, short, seed=3, dtype=dtype), layout)
    a, scale = draw(T * CHOICES, short, seed=4, dtype=dtype), draw(T * CHOICES, seed=5)
    scale[(ids < 0) | (ids >= E)] = torch.nan
    wide_bias = draw(E, long, seed=6, dtype=dtype)
    for given, factor, shift in ((bias, scale, wide_bias), (None, None, None)):
        got = cpu.tiny_dot(x, weight, given, ids, CHOICES)
        assert got.dtype == dtype
        assert scaled_error(got, products(x.repeat_interleave(CHOICES, 0), weight, given, ids)) < tolerance
        got = cpu.tiny_spread(a, weight.mT, shift, factor, ids, CHOICES)
        terms = products(a, weight.mT, shift, ids)
        terms = terms if factor is None else terms * factor.nan_to_num(0.0).double().unsqueeze(1)
        assert scaled_error(got, terms.view(T, CHOICES, long).sum(1)) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("k", "n"), [(37, 1), (1, 37), (16, 2), (15, 70)])
def test_outer(k: int, n: int, transposed: bool, dtype: torch.dtype, either: None) -> None:
    offsets, order = (
        torch.tensor([0, 4, 4, 9, 10, 20, 25]),
        torch.randperm(27, generator=torch.Generator().manual_seed(4)),
    )
    x, grad = draw(T, k, seed=1, dtype=dtype), draw(T * CHOICES, n, seed=2, dtype=dtype)
    token = order // CHOICES
    pairs = [(token[a:b], order[a:b]) for a, b in ((0, 4), (4, 4), (4, 9), (9, 10), (10, 20), (20, 25))]
    truth = torch.stack([x[left].double().mT @ grad[right].double() for left, right in pairs])
    got = cpu.tiny_outer(x, grad, offsets, token, order, transposed)
    assert scaled_error(got, truth) < HALF.get(dtype, TOLERANCE)
    assert (got.mT if transposed else got).is_contiguous()
    ones = torch.stack([grad[right].double().sum(0, keepdim=True) for _, right in pairs])
    assert scaled_error(cpu.tiny_outer(None, grad, offsets, None, order, False), ones) < HALF.get(dtype, TOLERANCE)


def test_bits_do_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_ALONE", 0)
    ids = torch.randint(0, E, (300,), generator=torch.Generator().manual_seed(0))
    x, weight, a = draw(100, 70, seed=1), draw(E, 70, 5, seed=2), draw(300, 5, seed=3)
    offsets = torch.tensor([0, 40, 90, 100, 200, 250, 300])

    def run() -> list[Tensor]:
        return [
            cpu.tiny_dot(x, weight, None, ids, 3),
            cpu.tiny_spread(a, weight.mT, None, None, ids, 3),
            cpu.tiny_outer(x, a, offsets, torch.arange(300) // 3, None, True),
        ]

    many, before = run(), numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        assert all(torch.equal(first, second) for first, second in zip(run(), many, strict=True))
    finally:
        numba.set_num_threads(before)


def test_a_nan_stays_with_its_expert(either: None) -> None:
    ids, weight = torch.arange(T * CHOICES) % E, draw(E, 20, 2, seed=1)
    weight[2, 19] = torch.nan
    got = cpu.tiny_dot(draw(T, 20, seed=0), weight, None, ids, CHOICES)
    assert torch.equal(got.isnan().all(1), ids == 2)
    assert torch.equal(got.isnan().any(1), ids == 2)


def test_a_million_experts_cost_what_their_rows_do() -> None:
    n_experts, tokens, k, d = 1_000_000, 8, 128, 64
    rows = tokens * k
    weight = cpu._zeros((n_experts, d, 1), torch.bfloat16, 0)
    ids = torch.randint(0, n_experts, (rows,), generator=torch.Generator().manual_seed(0))
    weight[ids] = draw(rows, d, 1, seed=1, dtype=torch.bfloat16)
    x, order = draw(tokens, d, seed=2, dtype=torch.bfloat16), ids.argsort(stable=True)
    counts = torch.bincount(ids, minlength=n_experts)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    peak = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]

    def run() -> list[Any]:
        h = cpu.tiny_dot(x, weight, None, ids, k)
        y = cpu.tiny_spread(h, weight.mT, None, None, ids, k)
        return [h, y, cpu.tiny_outer(x, h, offsets, order // k, order, False)]

    run()
    begin = time.perf_counter()
    h, y, dw = run()
    assert time.perf_counter() - begin < 2.0
    peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    # dW alone would take 128 MB.
    assert peak[1] - peak[0] < 50_000
    chosen = weight[ids].double().squeeze(2)
    truth = (x.double().repeat_interleave(k, 0) * chosen).sum(1)
    assert scaled_error(h.squeeze(1), truth) < HALF[torch.bfloat16]
    truth = (h.double() * chosen).view(tokens, k, d).sum(1)
    assert scaled_error(y, truth) < HALF[torch.bfloat16]
    once = counts[ids] == 1
    outer = x.double().repeat_interleave(k, 0) * h.double()
    assert scaled_error(dw[ids[once]].squeeze(2), outer[once]) < HALF[torch.bfloat16]


@pytest.mark.parametrize("mutant", ["bias", "ids", "scale"])
def test_the_tolerance_can_fail(mutant: str) -> None:
    ids, a, weight = choices(), draw(T * CHOICES, 3, seed=1), draw(E, 3, 40, seed=2)
    bias, scale = draw(E, 40, seed=3), draw(T * CHOICES, seed=4)
    terms = products(a, weight, bias, ids) * scale.double().unsqueeze(1)
    wrong: dict[str, Any] = {"bias": None, "ids": ids.roll(1), "scale": None}
    given = {"bias": bias, "ids": ids, "scale": scale} | {mutant: wrong[mutant]}
    got = cpu.tiny_spread(a, weight, given["bias"], given["scale"], given["ids"], CHOICES)
    assert scaled_error(got, terms.view(T, CHOICES, 40).sum(1)) > 1e4 * TOLERANCE
