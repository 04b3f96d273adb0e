"""The gather-dot kernels of tiny experts, run by the interpreter and compiled ahead of time, against loops in float64.

Triton decides between compiler and interpreter on import, so this file is also a program; `report` prints what the
compiler made of each kernel.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.kernels import tiny_triton
from moesaic.kernels.ahead_of_time import compile_ahead, disassemble

# Worst error over the RMS of the reference where it is not 0: float32 sums of 577 products stay under it (float16: one
# rounding of the largest output), every mutation is above 0.1.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}
OPERATIONS = ("dot", "spread", "outer", "outer of slots")

# T, k, E, long axis, short axis, dtype
SHAPES = [
    (0, 4, 3, 16, 2, torch.float32),
    (63, 1, 1, 47, 1, torch.float32),  # one expert takes all, one choice
    (3, 3, 7, 577, 2, torch.float16),
    (1, 128, 31, 40, 3, torch.float32),
    (2, 9, 5, 64, 16, torch.float16),
    (2, 4, 11, 50, 15, torch.float32),
    (1, 6, 2, 130, 30, torch.float16),
    (4, 4, 6, 1, 1, torch.float32),
    (3, 4, 1_000_000, 3, 2, torch.float16),
]


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def scaled_error(got: Tensor, truth: Tensor) -> float:
    if got.shape != truth.shape or got.isnan().any():
        return float("inf")
    if truth.numel() == 0 or not truth.any():
        return float(got.double().abs().sum())
    return float((got.double() - truth).abs().max() / truth[truth != 0].square().mean().sqrt())


def strided(values: Tensor, layout: str) -> Tensor:
    """The (E, K, N) values with N fastest, with K fastest, or neither and at odd distances."""
    if layout == "transposed":
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "apart":
        e, k, n = values.shape
        return torch.full((e, 2 * k + 1, 3 * n), torch.nan, dtype=values.dtype)[:, 1::2, ::3].copy_(values)
    return values.contiguous()


class Problem:
    """Random inputs, ids among them that are skipped; experts that nobody chose are NaN."""

    def __init__(self, t: int, k: int, e: int, long: int, short: int, dtype: torch.dtype, layout: str = "plain"):
        self.t, self.k, self.e = t, k, e
        skipped = 0 if e == 1 else 2
        self.ids = torch.randint(-skipped, e + skipped, (t * k,), generator=torch.Generator().manual_seed(4))
        self.x, self.a = draw(t, long, seed=0, dtype=dtype), draw(t * k, short, seed=1, dtype=dtype)
        values = draw(e, long, short, seed=2, dtype=dtype)
        idle = torch.ones(e, dtype=torch.bool).scatter_(0, self.ids[self.kept], False)
        values[idle] = torch.nan
        self.weight = strided(values, layout)
        self.bias, self.long_bias = draw(e, short, seed=3, dtype=dtype), draw(e, long, seed=5, dtype=dtype)
        self.row_weight = torch.rand(t * k, generator=torch.Generator().manual_seed(6))
        self.row_weight[~self.kept] = torch.nan
        self.transposed, self.biased = layout == "transposed", True

    @property
    def kept(self) -> Tensor:
        return (self.ids >= 0) & (self.ids < self.e)

    def choices(self) -> Iterator[tuple[int, int, int]]:
        """Token, slot and expert of each choice that counts."""
        for slot, expert in enumerate(self.ids.tolist()):
            if 0 <= expert < self.e:
                yield slot // self.k, slot, expert

    def rows(self) -> tuple[Tensor, Tensor]:
        """Offsets and the slots in order of expert, the skipped last."""
        key = torch.where(self.kept, self.ids, self.e)
        counts = torch.bincount(key, minlength=self.e + 1)[: self.e]
        return torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]), torch.sort(key, stable=True).indices


def run(operation: str, p: Problem) -> Tensor:
    if operation == "dot":
        return tiny_triton.tiny_dot(p.x, p.weight, p.bias if p.biased else None, p.ids, p.k)
    if operation == "spread":
        bias, gates = (p.long_bias, p.row_weight) if p.biased else (None, None)
        return tiny_triton.tiny_spread(p.a, p.weight.transpose(1, 2), bias, gates, p.ids, p.k)
    offsets, slots = p.rows()
    if operation == "outer":
        return tiny_triton.tiny_outer(p.x, p.a, offsets, slots // p.k, slots, p.transposed)
    return tiny_triton.tiny_outer(p.a, p.x, offsets, slots, slots // p.k, not p.transposed)


def truth(operation: str, p: Problem) -> Tensor:
    x, a, weight = p.x.double(), p.a.double(), p.weight.double()
    long, short = x.shape[1], a.shape[1]
    shape = {"dot": (p.t * p.k, short), "spread": (p.t, long), "outer": (p.e, long, short)}
    out = torch.zeros(shape.get(operation, (p.e, short, long)), dtype=torch.float64)
    for token, slot, e in p.choices():
        if operation == "dot":
            out[slot] = (x[token].unsqueeze(1) * weight[e]).sum(0) + (p.bias[e] if p.biased else 0.0)
        elif operation == "spread":
            y = (weight[e] * a[slot]).sum(1) + (p.long_bias[e] if p.biased else 0.0)
            out[token] += y * (p.row_weight[slot].double() if p.biased else 1.0)
        else:
            product = x[token].unsqueeze(1) * a[slot]
            out[e] += product if operation == "outer" else product.t()
    return out


def compare(name: str, operation: str, p: Problem) -> list[str]:
    got = run(operation, p)
    error = scaled_error(got, truth(operation, p))
    wrong = got.dtype != p.x.dtype or error > TOLERANCE[p.x.dtype]
    return [f"{name} {operation}: {error:.1e}"] if wrong else []


def plain() -> list[str]:
    problems = ((shape, Problem(*shape)) for shape in SHAPES)
    return [text for shape, p in problems for o in OPERATIONS for text in compare(f"{shape}", o, p)]


def transposed() -> list[str]:
    problems = ((shape, Problem(*shape, "transposed")) for shape in SHAPES[:-1])
    return [text for shape, p in problems for o in OPERATIONS for text in compare(f"{shape}", o, p)]


def any_strides() -> list[str]:
    problems = (Problem(2, 5, 4, 33, short, torch.float16, "apart") for short in (1, 2, 5))
    return [text for p in problems for o in ("dot", "spread") for text in compare("apart", o, p)]


def without_bias_and_weights() -> list[str]:
    p = Problem(3, 4, 5, 40, 2, torch.float32)
    p.biased = False
    return [text for o in ("dot", "spread") for text in compare("bare", o, p)]


def everything_skipped() -> list[str]:
    p = Problem(3, 4, 5, 40, 2, torch.float32)
    p.ids = torch.tensor([-1, 5, 2**40, -(2**40)] * 3)
    p.x[0, 0], p.a[0, 0] = torch.inf, torch.nan
    return [text for o in OPERATIONS for text in compare("skipped", o, p)]


def ones() -> list[str]:
    """A column of ones for x: the bias's gradient, for few rows and for many."""
    wrong = []
    for shape in SHAPES[1:4]:
        p = Problem(*shape)
        offsets, slots = p.rows()
        expected = torch.zeros(p.e, 1, p.x.shape[1], dtype=torch.float64)
        for token, _, e in p.choices():
            expected[e, 0] += p.x[token].double()
        got = tiny_triton.tiny_outer(None, p.x, offsets, None, slots // p.k, False)
        if scaled_error(got, expected) > TOLERANCE[p.x.dtype]:
            wrong.append(f"ones {shape}")
    return wrong


def half_sixteen_bits() -> list[str]:
    """bfloat16 inputs; the interpreter cuts its results where a GPU rounds, so one place of them is allowed."""
    wrong = []
    for operation in OPERATIONS:
        p = Problem(2, 4, 5, 40, 2, torch.bfloat16)
        got, expected = run(operation, p).double(), truth(operation, p)
        if not bool(((got - expected).abs() <= expected.abs() * 2**-7 + 1e-5).all()):
            wrong.append(operation)
    return wrong


def two_billion_weights() -> list[str]:
    """More than 2³¹ weights, of which only the chosen experts' memory is touched."""
    from triton.runtime.interpreter import GridExecutor

    # After each launch the interpreter copies every storage, here onto itself, which would touch it all.
    GridExecutor._restore_args_dev = lambda *_: None
    e, long, half = 1_000_000, 1100, torch.float16
    small = Problem(2, 3, 4, long, 2, half)
    small.ids, small.biased = torch.tensor([0, 1, -1, 4, 0, 2]), False
    small.weight = draw(4, long, 2, seed=2, dtype=half)
    experts, chosen = torch.tensor([3, 999_999, 976_001]), torch.tensor([3, 999_999, -1, 1_000_000, 3, 976_001])
    memory = torch.empty(e * long * 2, dtype=half)
    wrong = []
    for weight in (memory.view(e, long, 2), memory.view(e, 2, long).transpose(1, 2)):
        weight[experts] = small.weight[:3]
        got = {
            "dot": tiny_triton.tiny_dot(small.x, weight, None, chosen, 3),
            "spread": tiny_triton.tiny_spread(small.a, weight.transpose(1, 2), None, None, chosen, 3),
        }
        wrong += [o for o, values in got.items() if scaled_error(values, truth(o, small)) > TOLERANCE[half]]
    expected = truth("outer", small)[:3]
    offsets = torch.bincount(torch.tensor([4, 4, 976_002, 1_000_000]), minlength=e + 1).cumsum(0)
    slots = torch.tensor([0, 4, 5, 1, 2, 3])
    torch.zeros = torch.empty  # zeros are touched
    for turned in (False, True):
        dw = tiny_triton.tiny_outer(small.x, small.a, offsets, slots // 3, slots, turned)
        wrong += ["outer"] if scaled_error(dw[experts], expected) > TOLERANCE[half] else []
    return wrong


def same_bits() -> list[str]:
    """Twice, with and without a program for every part of a sum, and for a token alone."""
    p = Problem(3, 20, 7, 70, 2, torch.float32)
    wrong = [o for o in OPERATIONS if not torch.equal(run(o, p), run(o, p))]
    h, y = run("dot", p), run("spread", p)
    tiny_triton._FEW_PROGRAMS = 0
    if not torch.equal(run("spread", p), y):
        wrong.append("spread without parts")
    p.t, p.ids, p.x, p.a, p.row_weight = 1, p.ids[20:40], p.x[1:2], p.a[20:40], p.row_weight[20:40]
    if not torch.equal(run("dot", p), h[20:40]) or not torch.equal(run("spread", p), y[1:2]):
        wrong.append("one token of three")
    return wrong


def mutations_are_seen() -> list[str]:
    def shifted(p: Problem) -> None:
        p.x, p.a = p.x.roll(1, 0), p.a.roll(1, 0)

    def dropped(p: Problem) -> None:
        p.ids = p.ids.clone()
        p.ids[p.kept.nonzero()[0, 0]] = -1

    def neighbour(p: Problem) -> None:
        p.weight = p.weight.roll(1, 1)

    def ungated(p: Problem) -> None:
        p.row_weight = p.kept * 1.0

    unseen = []
    for mutate, operations in (
        (shifted, OPERATIONS),
        (dropped, OPERATIONS),
        (neighbour, ("dot", "spread")),
        (ungated, ("spread",)),
    ):
        for operation in operations:
            p = Problem(3, 4, 5, 40, 2, torch.float32)
            expected = truth(operation, p)
            mutate(p)
            if not scaled_error(run(operation, p), expected) > 0.1:
                unseen.append(f"{mutate.__name__} {operation}")
    return unseen


def edges() -> list[str]:
    return any_strides() + without_bias_and_weights() + everything_skipped() + ones() + half_sixteen_bits()


PROGRAMS: dict[str, Callable[[], list[str]]] = {
    part.__name__: part for part in (plain, transposed, edges, two_billion_weights, same_bits, mutations_are_seen)
}


def poison() -> None:
    """Let uninitialised memory be NaN, so that an output that nothing wrote shows."""
    true = Tensor.new_empty

    def new_empty(self: Tensor, *size: int, **options: Any) -> Tensor:
        out = true(self, *size, **options)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    Tensor.new_empty = new_empty  # type: ignore[assignment, method-assign]


def _poisoned(program: Callable[[], list[str]]) -> Callable[[], list[str]]:
    def run() -> list[str]:
        poison()
        return program()

    return run


PROGRAMS = {name: _poisoned(program) for name, program in PROGRAMS.items()}


@pytest.mark.parametrize("name", PROGRAMS)
def test_interpreted(name: str, interpret: Callable[[str], None]) -> None:
    interpret(name)


def signature(kernel: Any, dtype: torch.dtype, constants: dict[str, Any]) -> dict[str, str]:
    floats = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    indices = ("Ids", "LongRows", "ShortRows", "Experts", "Starts", "Ends")
    kinds = {}
    for name in kernel.arg_names:
        pointer = "*i64" if name in indices else "*fp32" if name == "RowWeight" else floats[dtype]
        kinds[name] = "constexpr" if name in constants else pointer if name[0].isupper() else "i32"
    return kinds


def compiled(arch: int, n: int, dtype: torch.dtype, turned: bool) -> Iterator[tuple[str, dict[str, int], list[str]]]:
    """Compile the kernels of experts of width n in a model of width 1024, as the launchers would for 128 choices."""
    up = torch.empty(4, 2 * n, 1024, dtype=dtype, device="meta").transpose(1, 2)
    down = torch.empty(4, n, 1024, dtype=dtype, device="meta")
    up, down = (up, down) if turned else (up.contiguous(), down.transpose(1, 2).contiguous().transpose(1, 2))
    for kernel, constants in (
        (tiny_triton._dot_kernel, tiny_triton.dot_arguments(up, None, 128)[0]),
        (tiny_triton._spread_kernel, tiny_triton.spread_arguments(down, None, down, 128)[0]),
        (tiny_triton._outer_kernel, tiny_triton.outer_constants(up[0].t(), 2 * n, long_fastest=turned, ones=False)),
    ):
        usage, code = disassemble(compile_ahead(kernel, signature(kernel, dtype, constants), constants, 1, arch))
        vectors = constants["STEP"] * constants["BLOCK_S"] * dtype.itemsize // 512
        usage["WEIGHT_VECTORS"] = vectors * constants.get("SLOTS", 1) * constants.get("CHOICES", 1)
        usage["WEIGHT_VECTORS"] *= constants.get("UNROLL", 1) if "SLOTS" in constants else 1
        yield kernel.__name__, usage, [text for _, text in code]


def widths(code: list[str], memory: str) -> Counter[str]:
    found = (re.search(rf"\b{memory}\.E(?:\.\w+)*", text) for text in code)
    return Counter(match.group() for match in found if match)


CASES = [(1, torch.bfloat16, False), (1, torch.bfloat16, True), (8, torch.bfloat16, False), (8, torch.bfloat16, True)]
CASES += [(1, torch.float32, False), (8, torch.float32, False)]
# On other chips than sm_90 a case of each type, so that each kernel, turned or not, is compiled.
FEWER = [(1, torch.bfloat16, True), (8, torch.float32, False)]


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles_without_spills_to_vectors(arch: int) -> None:
    for n, dtype, turned in CASES if arch == 90 or os.environ.get("MOESAIC_ALL_TILES") else FEWER:
        for name, usage, code in compiled(arch, n, dtype, turned):
            assert usage["STACK"] == 0, name
            assert not [text for text in code if "LDL" in text or "STL" in text], name
            memory = "STG" if name == "_outer_kernel" else "LDG"
            assert widths(code, memory)[f"{memory}.E.128"] >= usage["WEIGHT_VECTORS"], (name, n, dtype, turned)
            # With more, fewer than fifteen warps share an SM.
            assert usage["REG"] <= 136, name


def test_no_size_is_compiled_in() -> None:
    for kernel in (
        tiny_triton._dot_kernel,
        tiny_triton._spread_kernel,
        tiny_triton._outer_kernel,
        tiny_triton._add_parts_kernel,
    ):
        loose = [p.name for p in kernel.params if not p.is_constexpr and not p.do_not_specialize]
        assert all(name[0].isupper() for name in loose), loose


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["plain", "transposed"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_cuda(operation: str, layout: str, dtype: torch.dtype) -> None:
    for t, k, e, long, short in ((40, 128, 31, 577, 3), (3, 8, 1000, 1024, 2), (9, 128, 200, 1024, 16)):
        p = Problem(t, k, e, long, short, dtype, layout)
        expected = truth(operation, p)
        for name, value in vars(p).items():
            if isinstance(value, Tensor):
                setattr(p, name, value.cuda())
        got = run(operation, p)
        assert torch.equal(got, run(operation, p))
        limit = (
            1e-5 if dtype == torch.float32 else 2**-8 * float(expected.abs().max() / expected.square().mean().sqrt())
        )
        assert scaled_error(got.cpu(), expected) <= limit


def report() -> list[str]:
    """What the compiler made of the kernels."""
    lines = []
    for arch in (80, 90, 100):
        for n, dtype, turned in CASES:
            for name, usage, code in compiled(arch, n, dtype, turned):
                layout = "l fastest" if turned else "s fastest"
                lines.append(
                    f"sm_{arch} {name[1:-7]:6} n = {n} {str(dtype)[6:]:8} {layout if 'spread' not in name else '':9} "
                    f"{usage['REG']} registers, {512 * usage['WEIGHT_VECTORS']} bytes of weights at a time, "
                    f"{dict(widths(code, 'LDG'))} {dict(widths(code, 'STG'))}"
                )
    return [*lines, ""]


if __name__ == "__main__":
    print("\n".join(report()))
