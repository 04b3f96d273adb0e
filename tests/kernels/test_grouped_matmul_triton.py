"""The Triton grouped products, run by the interpreter, against the float64 oracle.

Triton decides between compiler and interpreter on import, so this file is also a program.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import cycle, product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moesaic.kernels import combine_triton, dispatch_triton, grouped_matmul_triton, grouped_outer_triton, reference
from moesaic.kernels.activations import ACTIVATIONS, GATED, activate_backward, clamped_swiglu, is_gated
from moesaic.kernels.tiles import Tile

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1.2e-2}
"""Worst error over the reference's RMS. float16 rounds h, then a or dh, by 2⁻¹¹ of values up to 16 times the RMS."""
COUNTS = {"empty experts": [0, 3, 0, 7, 1, 0], "one takes most": [70, 0, 20], "prime": [2, 5, 1, 0, 33, 17, 4]}


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def offsets_of(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


def scaled_error(got: Tensor, truth: Tensor) -> float:
    if got.shape != truth.shape or got.isnan().any():
        return float("inf")
    if truth.numel() == 0 or not truth.any():
        return float(got.abs().sum())
    return float((got.double() - truth).abs().max() / truth.square().mean().sqrt())


def poisoned() -> None:
    """Make uninitialised memory NaN, so that an element which no program wrote shows."""
    for name in ("new_empty", "empty_like", "empty"):
        owner = torch if name.startswith("empty") else Tensor
        true = getattr(owner, name)

        def filled(*args: Any, true: Any = true, **kwargs: Any) -> Tensor:
            out: Tensor = true(*args, **kwargs)
            return out.fill_(torch.nan) if out.is_floating_point() else out.fill_(2**30)

        setattr(owner, name, filled)


def laid_out(weight: Tensor, layout: str) -> Tensor:
    """The same weights with N or K contiguous, as a descriptor can read them or (odd strides) only pointers can."""
    if layout in ("k", "odd k"):
        return laid_out(weight.mT, layout.replace("k", "n")).mT
    if layout == "n":
        return weight.contiguous()
    n_experts, depth, width = weight.shape
    step = 2 if layout == "neither" else 1
    room = weight.new_full((n_experts, depth, step * width + 1), torch.nan)
    room[:, :, : step * width : step] = weight
    return room[:, :, : step * width : step]


def tiles() -> Iterator[Tile]:
    for swap in (False, True):
        yield Tile(16, 32, 16, swap=swap, group=2)


def check_rows(counts: list[int], depth: int, n_out: int, activation: str, interleaved: bool, layout: str, tile: Tile,
               dtype: torch.dtype, *, gathered: bool = True, skipped: int = 3) -> list[str]:  # fmt: skip
    """Forward and backward of one shape; what differs from the oracle."""
    offsets, factor = offsets_of(counts), 2 if is_gated(activation) else 1
    n_rows = sum(counts) + skipped
    n_tokens = n_rows // 2 + 1 if gathered else n_rows
    gather = torch.randint(0, n_tokens, (n_rows,), generator=torch.Generator().manual_seed(9)) if gathered else None
    x, scale = draw(n_tokens, depth, seed=0, dtype=dtype), draw(n_rows, seed=4).abs()
    weight = laid_out(draw(len(counts), depth, factor * n_out, seed=1, dtype=dtype) * 0.3, layout)
    bias = draw(len(counts), factor * n_out, seed=2, dtype=dtype)
    a, h = grouped_matmul_triton.rows_activated(x, weight, offsets, bias, gather, scale, activation, interleaved, True,
                                                tile=tile)  # fmt: skip
    true_h = reference.grouped_matmul(x.double(), weight.double(), offsets, bias=bias.double(), gather=gather)
    true_a = true_h if activation == "none" else reference.activate(true_h, activation, interleaved)
    kept = (torch.arange(n_rows) < offsets[-1]).unsqueeze(1)
    found = {"h": scaled_error(h, true_h), "a": scaled_error(a, true_a * scale[:, None] * kept)}
    plain = grouped_matmul_triton.rows(x, weight, offsets, None, gather, tile=tile)
    found["y"] = scaled_error(plain, reference.grouped_matmul(x.double(), weight.double(), offsets, gather=gather))
    if activation != "none":
        down = laid_out(draw(len(counts), n_out, depth, seed=5, dtype=dtype) * 0.3, layout)
        upstream = draw(n_tokens, depth, seed=6, dtype=dtype)
        dh, scaled, ds = grouped_matmul_triton.rows_activated_backward(
            upstream, down.mT, offsets, gather, h, scale, activation, interleaved, tile=tile
        )
        d = reference.grouped_matmul(upstream.double(), down.mT.double(), offsets, gather=gather)
        true_a, true_dh = activate_backward(h.double(), d * scale[:, None], activation, interleaved)
        found["dh"] = scaled_error(dh, true_dh * kept)
        found["scaled"] = scaled_error(scaled, true_a * scale[:, None] * kept)
        found["ds"] = scaled_error(ds, (true_a * d).sum(1) * kept[:, 0])
    shape = (counts, depth, n_out, activation, interleaved, layout, tile.swap, dtype)
    return [f"{shape}: {name} {error:.2g}" for name, error in found.items() if not error < TOLERANCE[dtype]]


def activations() -> list[str]:
    poisoned()
    names = [(name, kind) for name in ("none", *ACTIVATIONS) for kind in (False, True) if name in GATED or not kind]
    return [
        text
        for (name, interleaved), tile in zip(names, cycle([*tiles(), *reversed([*tiles()])]), strict=False)
        for text in check_rows(COUNTS["empty experts"], 40, 24, name, interleaved, "n", tile, torch.float32)
    ]


def layouts() -> list[str]:
    poisoned()
    return [
        text
        for layout, tile, (name, interleaved), dtype in product(
            ("n", "k", "odd n", "odd k", "neither"), tiles(), (("relu2", False), ("swiglu", True)),
            (torch.float32, torch.float16),
        )
        if dtype == torch.float32 or (layout in ("n", "odd k") and interleaved)
        for text in check_rows([3, 0, 20], 48, 24, name, interleaved, layout, tile, dtype)
    ]  # fmt: skip


def wide() -> list[str]:
    """Several blocks of columns, each of which the epilogues take in several parts."""
    poisoned()
    assert grouped_matmul_triton.PART_N < 64
    return [
        text
        for tile in (Tile(16, 64, 32), Tile(16, 128, 32, swap=True, group=2))
        for name, interleaved in (("gelu", False), ("swiglu", False), ("reglu", True))
        for text in check_rows([9, 0, 20], 40, 150, name, interleaved, "k", tile, torch.float32)
    ]


def edges() -> list[str]:
    poisoned()
    found = []
    tile = Tile(16, 32, 64, swap=True)
    for counts, skipped, (depth, n_out) in (
        ([0], 0, (47, 97)), ([1], 0, (577, 3)), ([0, 0, 0], 4, (5, 9)), ([1] * 31, 0, (47, 97)),
        ([63, 0, 0, 0, 0, 0, 0], 1, (577, 3)), ([27, 281, 5, 1013, 1, 139, 587, 0], 0, (5, 3)),
    ):  # fmt: skip
        many = sum(counts) > 1000
        found += check_rows(counts, depth, n_out, "swiglu", False, "n", Tile(128, 16, 16) if many else tile,
                            torch.float32, gathered=many, skipped=skipped)  # fmt: skip
        found += check_outer(counts, depth, n_out, Tile(16, 16, 512) if many else Tile(16, 64, 16), gathered=not many,
                             skipped=skipped)  # fmt: skip
    return found


def check_outer(counts: list[int], depth: int, n_out: int, tile: Tile, *, gathered: bool, skipped: int,
                dtype: torch.dtype = torch.float32) -> list[str]:  # fmt: skip
    offsets, n_rows = offsets_of(counts), sum(counts) + skipped
    n_tokens = n_rows // 2 + 1 if gathered else n_rows
    gather = torch.randint(0, n_tokens, (n_rows,), generator=torch.Generator().manual_seed(9)) if gathered else None
    x, grad = draw(n_tokens, depth, seed=0, dtype=dtype), draw(n_tokens, n_out, seed=1, dtype=dtype)
    scale = draw(n_rows, seed=2)
    left, right = ((x, grad) if gather is None else (x[gather], grad[gather])) if n_rows else (x, grad)
    spans = [slice(a, b) for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
    left, right = left.double(), right.double()
    truth = torch.stack([left[span].T @ right[span] for span in spans])
    found = {}
    for transposed in (False, True):
        got = grouped_outer_triton.outer(x, grad, offsets, gather, gather, transposed, tile=tile)
        found[f"dW {transposed}"] = scaled_error(got, truth)
        if got.stride()[1:] != ((1, depth) if transposed else (n_out, 1)) and min(depth, n_out) > 1:
            found[f"layout {transposed}"] = float("inf")
    sums = grouped_outer_triton.column_sums(grad, offsets, gather, scale)
    weighed = right * scale.double()[:, None]
    found["db"] = scaled_error(sums, torch.stack([weighed[span].sum(0) for span in spans]))
    return [
        f"{counts, depth, n_out}: {name} {error:.2g}" for name, error in found.items() if not error < TOLERANCE[dtype]
    ]


def outers() -> list[str]:
    poisoned()
    tile = Tile(64, 32, 16)
    return [
        text
        for counts, gathered, dtype in product(
            (*COUNTS.values(), [0] * 20 + [3] + [0] * 20 + [1]), (False, True), (torch.float32, torch.float16)
        )
        for text in check_outer(counts, 40, 72, tile, gathered=gathered, skipped=3, dtype=dtype)
    ]


def combines() -> list[str]:
    poisoned()
    found = []
    for tokens, k, width in ((0, 2, 5), (1, 1, 1), (7, 3, 70), (5, 19, 33), (3, 2, 1500)):
        rows, weights = draw(tokens * k, width, seed=0), draw(tokens * k, seed=1)
        inverse = torch.randperm(tokens * k, generator=torch.Generator().manual_seed(2))
        kept = torch.tensor(tokens * k * 2 // 3)
        rows[int(kept) :] = torch.nan
        weights = weights.masked_fill(inverse >= kept, torch.nan)
        for given in (weights, None):
            got = combine_triton.combine(rows, given, inverse, kept, k)
            share = torch.ones(tokens * k) if given is None else given
            share, used = share.masked_fill(inverse >= kept, 0.0).double(), rows.nan_to_num(0.0).double()
            truth = (used[inverse] * share[:, None]).view(tokens, k, width).sum(1)
            if not scaled_error(got, truth) < 1e-6:
                found.append(f"{tokens, k, width, given is None}: {scaled_error(got, truth)}")
    return found


def tile_lists() -> list[str]:
    found = []
    for counts, skipped, block in (
        ([0, 3, 0, 7, 1, 0], 5, 4), ([0, 0, 0], 2, 4), ([5], 0, 16), ([33] * 7, 3, 16), ([1] * 9000, 1, 16),
        ([0] * 5000 + [40], 0, 16), ([0, 20] * 20_000, 3, 16),
    ):  # fmt: skip
        offsets, n_rows = offsets_of(counts), sum(counts) + skipped
        experts, first, count, most = dispatch_triton.tile_list(offsets, n_rows, block)
        starts = offsets.tolist()
        wanted = [(e, starts[e] + i) for e, size in enumerate([*counts, skipped]) for i in range(0, size, block)]
        got = list(zip(experts.tolist(), first.tolist(), strict=True))[: int(count)]
        if got != wanted or len(experts) != most or most != -(-n_rows // block) + min(len(counts) + 1, n_rows):
            found.append(f"{counts[:6]}, {block}")
    return found


def far_apart() -> list[str]:
    """Rows, experts and depth whose offsets pass 2³¹, in memory that is never touched in between."""
    from triton.runtime.interpreter import GridExecutor

    # After each launch the interpreter copies every storage, here onto itself, which would touch it all.
    GridExecutor._restore_args_dev = lambda *_: None
    found = []
    far = 2**31
    x = torch.empty(far + 64, dtype=torch.float16).as_strided((2, 48), (far, 1))
    weight = torch.empty(far + 48 * 32, dtype=torch.float16).as_strided((2, 48, 32), (far, 32, 1))
    deep = torch.empty(48 * 2**26 + 32, dtype=torch.float16).as_strided((1, 48, 32), (1, 2**26, 1))
    for tensor, seed in ((x, 0), (weight, 1), (deep, 2)):
        tensor.copy_(draw(*tensor.shape, seed=seed))
    offsets, gather = torch.tensor([0, 1, 3]), torch.tensor([1, 0, 1])
    for tile in tiles():
        got = grouped_matmul_triton.rows(x, weight, offsets, None, gather, tile=tile)
        truth = reference.grouped_matmul(x.double(), weight.double(), offsets, gather=gather)
        found += [] if scaled_error(got, truth) < 4e-3 else [f"x and experts {tile.swap}"]
        got = grouped_matmul_triton.rows(x, deep, torch.tensor([0, 2]), None, None, tile=tile)
        found += [] if scaled_error(got, x.double() @ deep[0].double()) < 4e-3 else [f"depth {tile.swap}"]
    n_experts = far // 1024**2 + 2
    offsets = torch.zeros(n_experts + 1, dtype=torch.int64)
    offsets[1:], offsets[-1] = 1, 3
    left, right = draw(3, 1024, seed=3), draw(3, 1024, seed=4)
    # PyTorch writes its zeros, NumPy takes untouched pages for them.
    Tensor.new_zeros = lambda self, size: torch.from_numpy(np.zeros(size, np.float32))  # type: ignore[assignment, method-assign]
    got = grouped_outer_triton.outer(left, right, offsets, None, None, False, tile=Tile(256, 256, 16))
    truth = left[1:].double().T @ right[1:].double()
    return found + ([] if scaled_error(got[-1], truth) < 1e-5 and not got[1:3].any() else ["dW"])


def mutants_are_seen() -> list[str]:
    """Each fault in a kernel's inputs must fail the comparison that the other programs make."""
    found = []
    counts, tile = [2, 5, 1, 9], Tile(16, 16, 32)
    for name in ("rows_activated", "rows_activated_backward"):
        true = getattr(grouped_matmul_triton, name)
        for fault in ("zeros", "rows off by one", "shifted groups", "dropped expert"):

            def mutant(x: Tensor, weight: Tensor, offsets: Tensor, *rest: Any, fault: str = fault, true: Any = true,
                       **options: Any) -> Any:  # fmt: skip
                if fault == "shifted groups":
                    offsets = offsets.clone()
                    offsets[1:-1] += 1
                if fault == "dropped expert":
                    weight = weight * (torch.arange(weight.shape[0]) != 1).view(-1, 1, 1)
                out = true(x, weight, offsets, *rest, **options)
                if fault == "zeros":
                    return tuple(torch.zeros_like(tensor) for tensor in out)
                return tuple(tensor.roll(1, 0) for tensor in out) if fault == "rows off by one" else out

            setattr(grouped_matmul_triton, name, mutant)
            if not check_rows(counts, 24, 16, "relu2", False, "n", tile, torch.float32):
                found.append(f"{name}: {fault}")
            setattr(grouped_matmul_triton, name, true)
    return found


def whole_mlp() -> list[str]:
    """The op with Triton in all its places: output and all six gradients, wide experts and tiny ones."""
    from moesaic.kernels import expert_mlp

    os.environ["MOESAIC_BACKEND"] = "triton"
    found = []
    for n_tokens, n_experts, k, d_model, d_ff, activation in (
        (13, 5, 2, 40, 24, "swiglu"), (9, 7, 3, 47, 33, clamped_swiglu(2.5, 0.5, -0.25)),
        (5, 3, 3, 24, 17, "gelu"),
        (0, 3, 1, 8, 16, "relu"), (1, 3, 1, 8, 16, "relu"), (3, 101, 9, 37, 1, "relu2"), (5, 11, 2, 33, 9, "swiglu"),
    ):  # fmt: skip
        width = (2 if is_gated(activation) else 1) * d_ff
        leaves = {
            "x": draw(n_tokens, d_model, seed=0), "gate_up": draw(n_experts, width, d_model, seed=1).mT,
            "down": draw(n_experts, d_ff, d_model, seed=2), "weights": draw(n_tokens, k, seed=3),
            "gate_up_bias": draw(n_experts, width, seed=4), "down_bias": draw(n_experts, d_model, seed=5),
        }  # fmt: skip
        ids = torch.randint(-1, n_experts + 1, (n_tokens, k), generator=torch.Generator().manual_seed(6))
        upstream = draw(n_tokens, d_model, seed=7)
        options = {"ids": ids, "activation": activation}
        ours = with_gradients(expert_mlp, leaves, upstream, torch.float32, options)
        truths = with_gradients(reference.expert_mlp, leaves, upstream, torch.float64, options)
        for name, got, truth in zip(("y", *leaves), ours, truths, strict=True):
            if not scaled_error(got, truth) < 3e-5:
                found.append(f"{n_tokens, d_ff, activation}: {name} {scaled_error(got, truth):.2g}")
    return found


def with_gradients(function: Callable[..., Tensor], leaves: dict[str, Tensor], upstream: Tensor, dtype: torch.dtype,
                   options: dict[str, Any]) -> list[Tensor]:  # fmt: skip
    given = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in leaves.items()}
    y = function(**given, **options)
    return [y.detach(), *torch.autograd.grad(y, list(given.values()), upstream.to(dtype))]


def strided() -> list[str]:
    """Index and weight arguments that are views, and sizes of zero."""
    from moesaic.kernels import expert_mlp, grouped_matmul

    os.environ["MOESAIC_BACKEND"] = "triton"
    found = []
    n_rows, counts = 30, [5, 0, 20]
    x, weight, offsets = draw(12, 24, seed=0), draw(3, 24, 16, seed=1), offsets_of(counts)
    gather = torch.randint(0, 12, (n_rows,), generator=torch.Generator().manual_seed(2))
    scale, bias = draw(n_rows, seed=3), draw(3, 16, seed=4)
    plain: dict[str, Any] = {"offsets": offsets, "bias": bias, "gather": gather, "row_weight": scale}
    views = {name: torch.stack([value, value * 0 + 1], -1)[..., 0] for name, value in plain.items()}
    for name, view in views.items():
        if view.is_contiguous() or not torch.equal(
            grouped_matmul(x, weight, **(plain | {name: view})), grouped_matmul(x, weight, **plain)
        ):
            found.append(name)
    ids, gates = torch.randint(0, 3, (12, 1), generator=torch.Generator().manual_seed(5)), draw(12, 4, seed=6)
    up, down = draw(3, 24, 2 * 18, seed=7), draw(3, 18, 24, seed=8)
    for given in (gates[:, :1], gates[:1, :1].expand(12, 1)):
        if not torch.equal(expert_mlp(x, up, down, given, ids), expert_mlp(x, up, down, given.contiguous(), ids)):
            found.append(f"gate weights of strides {given.stride()}")
    for tokens, width, d_ff, k in ((12, 24, 18, 0), (12, 0, 18, 1), (12, 24, 0, 1), (0, 24, 18, 0)):
        shapes = {"x": (tokens, width), "gate_up": (3, width, 2 * d_ff), "down": (3, d_ff, 5), "weights": (tokens, k)}
        for dtype in (torch.float32, torch.float16)[: 2 if k == 0 and tokens else 1]:
            leaves = {name: draw(*size, seed=0, dtype=dtype) for name, size in shapes.items()}
            options = {"ids": torch.zeros(tokens, k, dtype=torch.int64)}
            y, *grads = with_gradients(expert_mlp, leaves, torch.ones(tokens, 5), dtype, options)
            if (
                y.any()
                or y.shape != (tokens, 5)
                or [g.shape for g in grads] != [leaf.shape for leaf in leaves.values()]
            ):
                found.append(f"{tokens, width, d_ff, k, dtype}")
    return found


def repeats() -> list[str]:
    def bits() -> list[Tensor]:
        x, weight, offsets = draw(90, 40, seed=0), draw(3, 40, 48, seed=1), offsets_of([70, 0, 20])
        a, h = grouped_matmul_triton.rows_activated(x, weight, offsets, None, None, None, "swiglu", False, True)
        down = draw(3, 40, 24, seed=2)
        back = grouped_matmul_triton.rows_activated_backward(x, down, offsets, None, h, None, "swiglu", False)
        return [a, h, *back, grouped_outer_triton.outer(x, h, offsets, None, None, True)]

    return [str(place) for place, (a, b) in enumerate(zip(bits(), bits(), strict=True)) if not torch.equal(a, b)]


PROGRAMS: dict[str, Callable[[], list[str]]] = {
    part.__name__: part
    for part in (
        activations, layouts, wide, edges, strided, outers, combines, tile_lists, far_apart, mutants_are_seen,
        whole_mlp, repeats,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_interpreted(name: str, interpret: Callable[[str], None]) -> None:
    interpret(name)


SHAPES = [(4096, 512, 256, 16, 2, "swiglu"), (1000, 577, 97, 31, 3, "gelu"), (64, 256, 1, 100_000, 128, "relu2"),
          (512, 256, 128, 128, 8, "gpt_oss")]  # fmt: skip
"""T, d, n, E, k: wide tiles, odd sizes, tiny experts, swapped operands."""


def cuda_problem(shape: tuple[Any, ...], dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    n_tokens, d_model, d_ff, n_experts, k, activation = shape
    width = (2 if is_gated(activation) else 1) * d_ff
    leaves = {
        "x": draw(n_tokens, d_model, seed=0), "gate_up": draw(n_experts, width, d_model, seed=1).mT / d_model**0.5,
        "down": draw(n_experts, d_ff, d_model, seed=2) / d_ff**0.5, "weights": draw(n_tokens, k, seed=3),
    }  # fmt: skip
    ids = torch.randint(-1, n_experts + 1, (n_tokens, k), generator=torch.Generator().manual_seed(6))
    return {name: leaf.to(dtype) for name, leaf in leaves.items()}, ids, draw(n_tokens, d_model, seed=7).to(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "precision", "most"),
    [
        (torch.float32, "ieee", 1e-5),
        (torch.float32, "tf32x3", 1e-5),
        (torch.float32, "tf32", 3e-3),
        (torch.bfloat16, "ieee", 1e-2),
        (torch.float16, "ieee", 2e-3),
    ],
)
def test_cuda_equals_float64(shape: tuple[Any, ...], dtype: torch.dtype, precision: str, most: float) -> None:
    from moesaic.kernels import expert_mlp

    leaves, ids, upstream = cuda_problem(shape, dtype)
    options: dict[str, Any] = {"ids": ids, "activation": shape[5]}
    truths = with_gradients(expert_mlp, leaves, upstream, torch.float64, options)
    on_gpu = {name: leaf.cuda() for name, leaf in leaves.items()}
    options |= {"ids": ids.cuda(), "precision": precision}
    ours = with_gradients(expert_mlp, on_gpu, upstream.cuda(), dtype, options)
    for name, got, truth in zip(("y", *leaves), ours, truths, strict=True):
        error = (got.cpu().double() - truth).square().mean().sqrt() / truth.square().mean().sqrt()
        assert error < most, name


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cuda_repeats_its_bits_and_never_waits(shape: tuple[Any, ...]) -> None:
    from moesaic.kernels import expert_mlp

    leaves, ids, upstream = cuda_problem(shape, torch.bfloat16)
    on_gpu, upstream = {name: leaf.cuda() for name, leaf in leaves.items()}, upstream.cuda()
    options = {"ids": ids.cuda(), "activation": shape[5]}
    first = with_gradients(expert_mlp, on_gpu, upstream, torch.bfloat16, options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        runs = [with_gradients(expert_mlp, on_gpu, upstream, torch.bfloat16, options) for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for again in runs for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
def test_the_layer_is_captured_by_a_cuda_graph() -> None:
    from moesaic.kernels import expert_mlp

    leaves, ids, upstream = cuda_problem(SHAPES[3], torch.bfloat16)
    on_gpu, upstream = {name: leaf.cuda() for name, leaf in leaves.items()}, upstream.cuda()
    options: dict[str, Any] = {"ids": ids.cuda(), "activation": "gpt_oss"}
    with_gradients(expert_mlp, on_gpu, upstream, torch.bfloat16, options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = with_gradients(expert_mlp, on_gpu, upstream, torch.bfloat16, options)
    on_gpu["x"].copy_(draw(*on_gpu["x"].shape, seed=11))
    options["ids"].copy_(options["ids"].roll(1, 0))
    graph.replay()
    again = with_gradients(expert_mlp, on_gpu, upstream, torch.bfloat16, options)
    assert all(torch.equal(a, b) for a, b in zip(captured, again, strict=True))
