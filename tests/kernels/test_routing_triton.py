"""The Triton routing kernels, run by the interpreter and compiled ahead of time, against the CPU twin.

Triton decides between compiler and interpreter on import, so this file is also a program.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.kernels import group_by_expert, route, route_topk, routing_op, routing_triton, routing_wide_triton
from moesaic.kernels.ahead_of_time import compile_ahead, disassemble
from moesaic.kernels.routing_options import RoutingOptions, checked_options

GROUPS: tuple[dict[str, Any], ...] = (
    {},
    {"n_groups": 4, "top_k_groups": 2},
    {"n_groups": 4, "top_k_groups": 3, "group_score": "max"},
)
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3}


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def options(n_experts: int, top_k: int, bias: Tensor | None = None, **given: Any) -> RoutingOptions:
    return checked_options(n_experts, top_k, **{"bias": bias, "scale": 1.7} | given)


def differences(logits: Tensor, bias: Tensor | None, chosen: RoutingOptions) -> list[str]:
    """Route forward and backward with both, and say what differs."""
    n_rows, n_experts = logits.shape
    ours, theirs = routing_triton.route(logits, bias, chosen), routing_op.on_cpu(logits, bias, chosen)
    found = []
    for name, a, b in zip(("weights", "ids", "lse", "counts", "probs"), ours, theirs, strict=True):
        allowed = 0.0 if name in ("ids", "counts") else 3e-6 * max(1, n_rows)
        if not torch.equal(a.isnan(), b.isnan()):
            found.append(f"{name}: NaN in other places")
        elif a.numel() and float((a.double() - b.double()).abs().nan_to_num(0.0).max()) > allowed:
            found.append(f"{name}: {(a.double() - b.double()).abs().max()}")
    upstream = draw(n_rows, chosen.top_k, seed=1), draw(n_experts, seed=2), draw(n_rows, seed=3)
    weights, ids = theirs[:2]
    probs, per_row = (upstream[1], upstream[2]) if chosen.statistics else (None, None)
    a, b = (
        backward(logits, weights, ids, upstream[0], probs, per_row, chosen).double()
        for backward in (routing_triton.route_backward, routing_op.backward_on_cpu)
    )
    apart = (a - b).abs().nan_to_num(0.0)
    if n_rows and (not torch.equal(a.isnan(), b.isnan()) or float(apart.max()) > TOLERANCE[logits.dtype]):
        found.append(f"gradient: {apart.max()}")
    return found


def variants() -> list[str]:
    found = []
    for scoring in ("softmax", "softmax_topk", "sigmoid"):
        for renormalize in (False, True):
            for seed in (None, 2**40 + 5):
                for groups in GROUPS:
                    for bias in (None, draw(24, seed=4) / 10):
                        given = {"scoring": scoring, "renormalize": renormalize, "tie_seed": seed, **groups}
                        logits = draw(37, 24) if seed is None else draw(37, 24).mul(2).round()
                        chosen = options(24, 3, bias, statistics=bias is None, **given)
                        found += [f"{given}, {bias is not None}: {text}" for text in differences(logits, bias, chosen)]
    return found


def sizes() -> list[str]:
    found = []
    for n_experts, top_k in ((1, 1), (2, 1), (7, 7), (64, 8), (65, 2), (1000, 13), (1024, 3)):
        for n_rows in (0, 1, 7):
            for dtype in (torch.float32, torch.float16):
                logits = draw(n_rows, n_experts).to(dtype)
                chosen = options(n_experts, top_k, renormalize=dtype == torch.float16, statistics=True)
                found += [f"{n_rows, n_experts, top_k, dtype}: {text}" for text in differences(logits, None, chosen)]
    return found


def projected() -> list[str]:
    found = []
    for n_experts, top_k, d in ((5, 2, 3), (64, 8, 70), (130, 4, 33)):
        x, router, bias = draw(19, d), draw(n_experts, d, seed=1), draw(n_experts, seed=2) / 10
        for chosen, given in (
            (options(n_experts, top_k, statistics=True), None),
            (options(n_experts, top_k, bias, scoring="sigmoid", renormalize=True, tie_seed=3), bias),
        ):
            ours = routing_triton.route(x, given, chosen, router=router)
            theirs = routing_op.on_cpu(x @ router.T, given, chosen)
            for name, a, b in zip(("weights", "ids", "lse", "counts", "probs"), ours, theirs, strict=True):
                if (chosen.statistics or name in ("weights", "ids")) and not torch.allclose(
                    a.double(), b.double(), rtol=1e-4, atol=1e-5
                ):
                    found.append(f"{n_experts, d}: {name}")
    return found


def wide() -> list[str]:
    """Rows in several tiles."""
    routing_wide_triton.BLOCK_E = 32
    found = []
    for scoring in ("softmax", "softmax_topk", "sigmoid"):
        for renormalize, seed, bias in ((False, None, None), (True, 2**40 + 5, None), (True, None, draw(100, seed=4))):
            logits = draw(6, 100) if seed is None else draw(6, 100).mul(2).round()
            logits[1, 3], logits[2], logits[2, 7] = -torch.inf, -torch.inf, 1.0
            logits[4, 60] = torch.nan
            chosen = options(100, 5, bias, scoring=scoring, renormalize=renormalize, tie_seed=seed)
            ours = routing_wide_triton.route(logits, bias, chosen, first_row=2)
            theirs = routing_op.on_cpu(logits, bias, chosen, first_row=2)
            upstream = draw(6, 5, seed=1)
            a = routing_wide_triton.route_backward(logits, *theirs[:2], upstream, chosen)
            b = routing_op.backward_on_cpu(logits, *theirs[:2], upstream, None, None, chosen)
            pairs = {"weights": (ours[0], theirs[0]), "ids": (ours[1], theirs[1]), "gradient": (a, b)}
            for name, (mine, other) in pairs.items():
                if not torch.allclose(mine.double(), other.double(), rtol=1e-5, atol=2e-6, equal_nan=True):
                    found.append(f"{scoring, renormalize, seed}: {name}")
    return found


def awkward() -> list[str]:
    logits = draw(20, 24)
    logits[3, 5] = torch.nan
    logits[4], logits[4, 2] = -torch.inf, 0.0
    logits[5, 3], logits[6], logits[7, ::2] = -torch.inf, 0.0, -0.0
    found = differences(logits, None, options(24, 3))
    found += differences(logits, None, options(24, 3, scoring="sigmoid", renormalize=True))
    logits[3, 5] = 0.0
    found += differences(logits, None, options(24, 3, scoring="softmax_topk", statistics=True))
    return found + differences(logits.half(), None, options(24, 3, scoring="softmax_topk"))


def many_rows() -> list[str]:
    """More tiles than programs that keep sums."""
    routing_triton._PROGRAMS = 3
    return differences(draw(300, 64), None, options(64, 4, statistics=True))


def repeats() -> list[str]:
    first, second = (routing_triton.route(draw(50, 16), None, options(16, 2, statistics=True)) for _ in range(2))
    return [str(i) for i, (a, b) in enumerate(zip(first, second, strict=True)) if not torch.equal(a, b)]


def a_shifted_row_is_seen() -> list[str]:
    true = routing_op.on_cpu
    routing_op.on_cpu = lambda logits, *rest: true(logits.roll(1, 0), *rest)
    return [] if differences(draw(9, 16), None, options(16, 2)) else ["not seen"]


def a_flipped_tie_is_seen() -> list[str]:
    level = torch.zeros(9, 16)
    ours = routing_triton.route(level, None, options(16, 2, tie_seed=1))[1]
    return ["the seed does nothing"] if torch.equal(ours, routing_triton.route(level, None, options(16, 2))[1]) else []


PROGRAMS: dict[str, Callable[[], list[str]]] = {
    part.__name__: part
    for part in (
        variants,
        sizes,
        projected,
        wide,
        awkward,
        many_rows,
        repeats,
        a_shifted_row_is_seen,
        a_flipped_tie_is_seen,
    )
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_interpreted(name: str, interpret: Callable[[str], None]) -> None:
    interpret(name)


@pytest.mark.parametrize(
    ("arch", "n_experts", "top_k", "dtype", "statistics"),
    [
        (90, 8, 2, "bf16", True),
        (90, 128, 8, "bf16", False),
        (90, 128, 8, "fp32", True),
        (90, 256, 8, "fp16", False),
        (90, 1024, 64, "bf16", True),
        (80, 128, 8, "bf16", True),
        (100, 128, 8, "bf16", True),
    ],
)
def test_compiles_without_spills(arch: int, n_experts: int, top_k: int, dtype: str, statistics: bool) -> None:
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    logits = torch.empty(1, n_experts, dtype=kinds[dtype])
    chosen = options(n_experts, top_k, renormalize=True, statistics=statistics)
    values = routing_triton.constants(logits, chosen, biased=False)
    pointers = {
        "Logits": f"*{dtype}",
        "Router": f"*{dtype}",
        "Bias": f"*{dtype}",
        "Weights": "*fp32",
        "Ids": "*i64",
        "Lse": "*fp32",
    }
    pointers |= {"Counts": "*i32", "Probs": "*fp32"}
    numbers = dict.fromkeys(("n_rows", "per_program", "first_row", "seed_low", "seed_high"), "i32") | {"scale": "fp32"}
    signature = pointers | numbers | dict.fromkeys(values, "constexpr")
    usage, code = disassemble(compile_ahead(routing_triton._route_kernel, signature, values, 4, arch))
    assert usage["STACK"] == 0
    assert not [text for _, text in code if "LDL" in text or "STL" in text]
    assert usage["REG"] <= 220


@pytest.mark.parametrize("n_experts", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_projection_compiles_without_spills(n_experts: int, dtype: str) -> None:
    kinds = {"bf16": torch.bfloat16, "fp32": torch.float32}
    x, router = torch.empty(1, 2048, dtype=kinds[dtype]), torch.empty(n_experts, 2048, dtype=kinds[dtype])
    chosen = options(n_experts, 8, renormalize=True)
    values = routing_triton.constants(x, chosen, router=router, biased=False)
    pointers = dict.fromkeys(("Logits", "Router", "Bias"), f"*{dtype}")
    pointers |= {"Weights": "*fp32", "Ids": "*i64", "Lse": "*fp32", "Counts": "*i32", "Probs": "*fp32"}
    numbers = dict.fromkeys(("n_rows", "per_program", "first_row", "seed_low", "seed_high"), "i32") | {"scale": "fp32"}
    signature = pointers | numbers | dict.fromkeys(values, "constexpr")
    warps = routing_triton.warps(n_experts, projects=True)
    usage, code = disassemble(compile_ahead(routing_triton._route_kernel, signature, values, warps, 90))
    assert usage["STACK"] == 0
    assert not [text for _, text in code if "LDL" in text or "STL" in text]
    assert dtype == "fp32" or any("HMMA" in text or "HGMMA" in text for _, text in code)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_wide_rows_compile_without_spills(dtype: str) -> None:
    values = routing_wide_triton.constants(65536, options(65536, 32, renormalize=True))
    values |= {"HAS_BIAS": False, "SHUFFLE": False, "MASK": 65535}
    signature = {"Logits": f"*{dtype}", "Bias": "*fp32", "Weights": "*fp32", "Ids": "*i64"}
    signature |= dict.fromkeys(("first_row", "seed_low", "seed_high"), "i32") | {"scale": "fp32"}
    signature |= dict.fromkeys(values, "constexpr")
    usage, code = disassemble(compile_ahead(routing_wide_triton._route_row_kernel, signature, values, 4, 90))
    assert usage["STACK"] == 0
    assert not [text for _, text in code if "LDL" in text or "STL" in text]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n_experts", "top_k"), [(8, 2), (128, 8), (1000, 13), (5000, 32)])
def test_cuda_equals_the_cpu(n_experts: int, top_k: int, dtype: torch.dtype) -> None:
    logits, upstream = draw(1000, n_experts).to(dtype), draw(1000, top_k, seed=1)
    found = []
    for device in ("cpu", "cuda"):
        given = logits.to(device).requires_grad_()
        weights, ids = route_topk(given, top_k, tie_seed=5)
        (grad,) = torch.autograd.grad(weights, given, upstream.to(device))
        found.append((ids.cpu(), weights.detach().cpu(), grad.cpu().float()))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=3e-6, atol=1e-7)
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(("n_experts", "d"), [(64, 128), (256, 200), (700, 64), (3000, 64)])
def test_the_projection_on_cuda_equals_the_cpu(n_experts: int, d: int) -> None:
    x, weight = draw(300, d), draw(n_experts, d, seed=1) / d**0.5
    found = []
    for device in ("cpu", "cuda"):
        given = [tensor.to(device).requires_grad_() for tensor in (x, weight)]
        weights, _ = route(given[0], given[1], 4, renormalize=True)
        grads = torch.autograd.grad(weights, given, draw(300, 4, seed=2).to(device))
        found.append([tensor.detach().cpu() for tensor in (weights, *grads)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_routing_is_captured_by_a_cuda_graph() -> None:
    logits = draw(512, 64).cuda()

    def work() -> tuple[Tensor, Tensor, Tensor]:
        weights, ids = route_topk(logits, 4)
        return weights, ids, group_by_expert(ids, 64).permutation

    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    logits.copy_(draw(512, 64, seed=9))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, work(), strict=True))
