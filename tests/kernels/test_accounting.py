"""Executed FLOPs against the list of tiles, bytes against sums by hand, and no compute function that counts 0."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import flop_registry

import moesaic.kernels
from moesaic.kernels import (
    EnsembleSettings,
    EnsembleShape,
    FeatureState,
    FeatureTable,
    FeatureTraining,
    _padding,
    ensemble_cpu,
    evaluate,
    expert_mlp,
    feature_step,
    group_by_expert,
    grouped_matmul,
    route,
    stripes,
    tile_map,
    train_ensemble,
    vectors_cpu,
)
from moesaic.kernels._accounting import Call, Groups, Work, moved, work_registry
from moesaic.kernels.ensemble import GATES
from moesaic.kernels.feature_state import FeatureShape
from moesaic.kernels.routing_options import RoutingOptions
from moesaic.kernels.routing_triton import constants
from moesaic.kernels.tiles import Shape, closed_form
from moesaic.kernels.tiny_triton import dot_arguments, outer_constants, spread_arguments
from moesaic.metrics import count_flops
from moesaic.moe import ToyConfig

T, E, K, D, F = 90, 6, 2, 48, 40
ROUTINGS = ["even", "one takes all", "some empty", "skipped", "random"]


def routed(name: str, n_tokens: int = T, n_experts: int = E, top_k: int = K) -> Tensor:
    slots = torch.arange(n_tokens * top_k).view(n_tokens, top_k)
    if name == "even":
        return slots % n_experts
    if name == "one takes all":
        return slots * 0 + n_experts - 1
    if name == "some empty":
        return slots % 2 * 3
    ids = torch.randint(n_experts, slots.shape, generator=torch.Generator().manual_seed(len(name)))
    return torch.where(slots % 5 == 0, n_experts, ids) if name == "skipped" else ids


def problem(ids: Tensor, dtype: torch.dtype = torch.float32, d_ff: int = F) -> tuple[Any, ...]:
    n_tokens, top_k = ids.shape
    return (
        torch.randn(n_tokens, D, dtype=dtype), torch.randn(E, D, 2 * d_ff, dtype=dtype),
        torch.randn(E, d_ff, D, dtype=dtype), torch.rand(n_tokens, top_k), ids,
    )  # fmt: skip


def work_of(name: str, arguments: tuple[Any, ...], on_gpu: bool) -> Work:
    """What the op's formula says, without running the op: as Triton's kernels would or as the CPU twin."""
    with pytest.MonkeyPatch.context() as patch:
        if on_gpu:
            patch.setenv("MOESAIC_BACKEND", "triton")
            patch.setenv("TRITON_INTERPRET", "1")
        return work_registry[getattr(torch.ops.moesaic, name)](Call(0, 0), *arguments)


def forward_work(given: tuple[Any, ...], keep: bool = False, on_gpu: bool = False) -> Work:
    return work_of("expert_mlp", (*given, None, None, "swiglu", False, keep, "ieee", False), on_gpu)


def backward_work(given: tuple[Any, ...], wanted: list[bool], on_gpu: bool = False) -> Work:
    x, up, down, weights, ids = given
    offsets, permutation, inverse = group_by_expert(ids, E)[1:4]
    h, dy = torch.empty(ids.numel(), up.shape[2], dtype=x.dtype), torch.empty(len(x), down.shape[2], dtype=x.dtype)
    rest = (None, h, offsets, permutation, inverse, offsets, "swiglu", False, "ieee", wanted)
    return work_of("expert_mlp_backward", (dy, x, up, down, weights, ids, *rest), on_gpu)


def tiled(ids: Tensor, block: int) -> int:
    """Rows of all tiles, from the list that a kernel would go through."""
    return int(tile_map(group_by_expert(ids, E), block).n_tiles) * block


def ceil(size: int, block: int) -> int:
    return (size + block - 1) // block * block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROUTINGS)
def test_a_gpu_executes_the_tiles_of_the_list(name: str, dtype: torch.dtype) -> None:
    ids = routed(name)
    given = problem(ids, dtype)
    rows = T * K
    up = closed_form(Shape("up", rows, D, F, E, dtype), 90)
    down = closed_form(Shape("rows", rows, F, D, E, dtype), 90)
    expected = 2 * tiled(ids, up.block_m) * ceil(D, up.block_k) * 2 * ceil(F, up.block_n)
    expected += 2 * tiled(ids, down.block_m) * ceil(F, down.block_k) * ceil(D, down.block_n)
    assert forward_work(given, on_gpu=True).executed == expected
    slopes = closed_form(Shape("backward", rows, D, F, E, dtype), 90)
    dx = closed_form(Shape("rows", rows, 2 * F, D, E, dtype), 90)
    first, second = (closed_form(Shape("outer", rows, *sides, E, dtype), 90) for sides in ((D, 2 * F), (F, D)))
    expected = 2 * tiled(ids, slopes.block_m) * ceil(D, slopes.block_k) * ceil(F, slopes.block_n)
    expected += 2 * tiled(ids, dx.block_m) * ceil(2 * F, dx.block_k) * ceil(D, dx.block_n)
    expected += 2 * tiled(ids, first.block_k) * ceil(D, first.block_m) * ceil(2 * F, first.block_n)
    expected += 2 * tiled(ids, second.block_k) * ceil(F, second.block_m) * ceil(D, second.block_n)
    assert backward_work(given, [True] * 4 + [False] * 2, on_gpu=True).executed == expected


def test_a_gpu_executes_tiny_experts_by_vectors() -> None:
    ids = routed("skipped")
    x, up, down, weights, _ = given = problem(ids, d_ff=5)
    dot, spread = dot_arguments(up, None, K)[0], spread_arguments(down, None, weights, K)[0]
    depth = ceil(D, dot["STEP"] * dot["UNROLL"])
    expected = 2 * ceil(T * K, dot["SLOTS"]) * depth * ceil(10, dot["BLOCK_S"])
    expected += 2 * T * ceil(K, spread["CHOICES"]) * ceil(5, spread["BLOCK_S"]) * ceil(D, spread["STEP"])
    assert forward_work(given, on_gpu=True).executed == expected
    outer = outer_constants(x, 10, long_fastest=False, ones=False)
    expected = 2 * tiled(ids, outer["UNROLL"]) * ceil(D, outer["STEP"]) * outer["BLOCK_S"]
    back = dot_arguments(down.mT, None, K)[0]
    expected += 2 * ceil(T * K, back["SLOTS"]) * ceil(D, back["STEP"] * back["UNROLL"]) * ceil(5, back["BLOCK_S"])
    assert backward_work(given, [False, True] + [False] * 4, on_gpu=True).executed == expected


@pytest.mark.parametrize(("dtype", "lanes"), [(torch.float32, 16), (torch.float64, 8), (torch.bfloat16, 16)])
@pytest.mark.parametrize("name", ROUTINGS)
def test_a_cpu_pads_columns_and_no_rows(name: str, dtype: torch.dtype, lanes: int) -> None:
    assert _padding._LINE == vectors_cpu.LINE
    ids = routed(name)
    rows, d_ff = int((ids < E).sum()), 19
    given = problem(ids, dtype, d_ff)
    assert forward_work(given).executed == 2 * rows * (D * ceil(2 * d_ff, lanes) + d_ff * ceil(D, lanes))
    expected = D * (ceil(d_ff, lanes) + ceil(2 * d_ff, lanes)) + (2 * d_ff + d_ff) * ceil(D, lanes)
    assert backward_work(given, [True] * 4 + [False] * 2).executed == 2 * rows * expected
    tiny = problem(ids, dtype, 5)
    assert forward_work(tiny).executed == 2 * rows * 3 * D * 5
    assert backward_work(tiny, [True] * 4 + [False] * 2).executed == 2 * rows * (1 + 2 + 2 + 1) * D * 5


@pytest.mark.parametrize(("rows", "experts", "block"), [(7, 3, 4), (180, 6, 16), (5, 64, 16), (12, 12, 8), (0, 4, 8)])
def test_the_bound_of_unknown_routing_is_the_most_there_is(rows: int, experts: int, block: int) -> None:
    with FakeTensorMode():
        unknown = Groups.of_ids(torch.empty(rows, dtype=torch.int64), experts)
    assert unknown.bound
    groups = min(rows, experts)
    worst = torch.arange(rows).clamp(max=max(0, groups - 1))
    assert Groups.of_ids(worst, experts).padded(block) == unknown.padded(block)
    assert Groups.of_ids(worst, experts).touched == unknown.touched
    for seed in range(20):
        ids = torch.randint(experts + 1, (rows,), generator=torch.Generator().manual_seed(seed))
        known = Groups.of_ids(ids, experts)
        assert not known.bound
        assert known.padded(block) <= unknown.padded(block)
        again = Groups.of_offsets(group_by_expert(ids, experts).offsets, rows)
        assert (again.rows, again.touched, again.padded(block)) == (known.rows, known.touched, known.padded(block))


def test_bytes_of_an_expert_mlp_by_hand() -> None:
    ids = torch.tensor([[0, 3], [3, 6], [0, 3]])  # one choice is skipped, four of six experts have no rows
    given = problem(ids, torch.bfloat16)
    n, v, t = 6, 5, 2
    grouping = 8 * n + 8 * (E + 1) + 2 * 8 * n
    up = 16 * n + 8 * n + 8 * (E + 1) + 2 * (v * D + t * D * 2 * F + n * F)
    down = 8 * (E + 1) + 2 * (v * F + t * F * D + n * D)
    combine = 2 * v * D + 4 * n + 8 * n + 2 * 3 * D
    assert forward_work(given).bytes == grouping + up + down + combine
    assert forward_work(given, keep=True).bytes == grouping + up + down + combine + 2 * n * 2 * F
    scale = 16 * n + 8 * n + 4 * n + 4 * n
    slopes = 2 * (v * D + t * D * F + v * 2 * F) + n * (8 + 4) + 8 * (E + 1) + n * 3 * F * 2 + 4 * n
    dx = 8 * (E + 1) + 2 * (v * 2 * F + t * D * 2 * F + n * D) + 2 * v * D + 8 * n + 2 * 3 * D
    assert backward_work(given, [True] + [False] * 5).bytes == scale + slopes + dx
    d_up = 8 * (E + 1) + 8 * n + 2 * (v * (D + 2 * F) + E * D * 2 * F)
    assert backward_work(given, [False, True] + [False] * 4).bytes == scale + slopes + d_up
    d_weights = n * (4 + 8) + 4 * n
    assert backward_work(given, [False] * 3 + [True] + [False] * 2).bytes == scale + slopes + d_weights


def test_bytes_and_tiles_of_grouped_products() -> None:
    ids = routed("skipped")
    x, up = problem(ids)[:2]
    grouping = group_by_expert(ids, E)
    gather = grouping.permutation // K
    flops = count_flops(lambda: grouped_matmul(x, up, grouping.offsets, gather=gather)).forward
    valid, rows, n_out = int((ids < E).sum()), T * K, 2 * F
    assert flops.bytes is not None
    assert flops.bytes.total == 4 * (valid * D + E * D * n_out + rows * n_out) + 8 * (E + 1) + 8 * rows
    assert flops.active.total == 2 * rows * D * n_out
    assert flops.executed.total == 2 * valid * D * n_out
    assert flops.dense_equivalent.total == 2 * T * E * D * n_out
    rows_of_no_tokens = torch.randn(rows, D)
    unknown = count_flops(lambda: grouped_matmul(rows_of_no_tokens, up, grouping.offsets)).forward
    assert unknown.dense_equivalent.total is None
    assert unknown.executed.total == flops.executed.total


def test_moved_counts_every_number_once() -> None:
    x = torch.zeros(3, 4, dtype=torch.float64)
    assert moved(x, None, x[:, :1]) == 8 * (12 + 3)
    assert moved(x[0].expand(100, 4)) == 8 * 4
    assert moved(torch.zeros(10).unfold(0, 3, 1)) == 4 * 10
    assert moved(x[:0]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that sparse layouts are new, once per process
        sparse = torch.eye(3).to_sparse_csr()
    assert moved(sparse) == 8 * (4 + 3) + 4 * 3


def test_every_op_has_a_flop_formula() -> None:
    for module in pkgutil.iter_modules(moesaic.kernels.__path__):
        importlib.import_module(f"moesaic.kernels.{module.name}")
    names = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "moesaic::" in name}
    assert {"expert_mlp", "grouped_mm", "route", "encode_features", "permute_rows", "scatter_rows"} <= names
    assert not {name for name in names if getattr(torch.ops.moesaic, name) not in flop_registry}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("n", "m", "e", "k", "m0"), [(6, 2, 1, 1, 0), (20, 3, 4, 2, 0), (12, 3, 8, 2, 2)])
def test_whole_trainings_count_as_their_configuration(
    gate: str, n: int, m: int, e: int, k: int, m0: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is counted is known before anything runs, and compiling it would take a minute.
    monkeypatch.setattr(ensemble_cpu, "launch", lambda *_: None)
    monkeypatch.setattr(evaluate, "in_parts", lambda *_: None)
    batch, steps, models = 40, 3, 2
    shape = EnsembleShape(n, m, e, k, m0, True, batch)
    ones = torch.ones(models, dtype=torch.float64)
    table = FeatureTable(torch.zeros(models, dtype=torch.int64), torch.full((models, n), 0.3), ones.long())
    settings = EnsembleSettings(
        table, torch.ones(models, n), torch.full((models,), GATES.index(gate)), torch.arange(models), 0 * ones,
        0.9 * ones, 0.99 * ones, 1e-8 * ones, 0 * ones, ones.float(),
    )  # fmt: skip
    state = torch.randn(models, shape.n_parameters)
    avg, sq, lr = torch.zeros_like(state), torch.zeros_like(state), torch.full((models, steps), 1e-3).double()
    flops = count_flops(lambda: train_ensemble(shape, settings, state, avg, sq, lr))
    config = count_flops(ToyConfig(n, m, e, k, gate=gate, shared_hidden=m0), samples=batch).training
    assert flops.forward.active.total == models * steps * (config.active.total or 0)
    assert flops.forward.dense_equivalent.total == models * steps * (config.dense_equivalent.total or 0)
    assert flops.bound
    assert flops.forward.active.total <= (flops.forward.executed.total or 0)
    assert flops.forward.bytes is not None
    assert flops.forward.bytes.total >= 6 * 4 * state.numel()
    samples = torch.rand(2, batch, n)
    norms = torch.ones(models, e + (m0 > 0), n, dtype=torch.float64)
    own = torch.zeros(models, dtype=torch.int64)
    found = count_flops(lambda: evaluate.evaluate_ensemble(shape, settings.gate, state, samples, own, norms))
    config = count_flops(ToyConfig(n, m, e, k, gate=gate, shared_hidden=m0), samples=batch).forward
    assert found.forward.active.total == models * (config.active.total or 0)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_steps_with_many_features_count_their_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stripes, "in_parts", lambda *_: None)
    n, m, e, k, m0, batch = 150, 4, 5, 2, 3, 24
    x = torch.rand(batch, n, generator=torch.Generator().manual_seed(1))
    x = (x * (x > 0.9)).to_sparse_csr()
    entries = x.values().numel()
    lr = torch.full((4,), 1e-3, dtype=torch.float64)
    training = FeatureTraining("switch", torch.ones(n), 1 / batch, lr)
    state = FeatureState.zeros(FeatureShape(n, m, e, k, m0), decode="exact")
    flops = count_flops(lambda: feature_step(state, x, training)).forward
    sparse = 2 * entries * (k * m + m0 + e)
    assert flops.active.total == 2 * sparse + 6 * n * batch * (k * m + m0)
    assert flops.executed.total is None
    assert flops.dense_equivalent.total == 4 * entries * (e * m + m0 + e) + 6 * n * batch * (e * m + m0)
    sampled = FeatureTraining("switch", torch.ones(n), 1 / batch, lr, decode="sampled", n_negatives=10)
    state = FeatureState.zeros(FeatureShape(n, m, e, k, m0), decode="sampled")
    # Encoding, decoding of the negatives with its two gradients, dh and dD of the entries, dW and the router's.
    known = sparse + 6 * 10 * batch * (k * m + m0) + 2 * 2 * entries * (k * m + m0) + sparse
    # Sums by segment of gates (k + 1 columns) and of biases (k and 1 rows of one number).
    known += 2 * entries * (k + 1) + 2 * entries * (k + 1)
    flops = count_flops(lambda: feature_step(state, x, sampled)).forward
    assert flops.active.total == known
    assert flops.dense_equivalent.total is None


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("density", [0.004, 0.3])
def test_encoding_reads_the_rows_of_entries(density: float) -> None:
    n, m, e, k, batch = 500, 5, 4, 2, 16
    generator = torch.Generator().manual_seed(3)
    x = (torch.rand(batch, n, generator=generator) < density).float().to_sparse_csr()
    weight, ids = torch.randn(e, n, m, requires_grad=True), routed("even", batch, e, k)
    flops = count_flops(lambda: moesaic.kernels.encode_features(x, weight, ids))
    entries = x.values().numel()
    assert flops.forward.active.total == 2 * entries * k * m
    assert flops.training.active.total == 4 * entries * k * m
    assert flops.forward.dense_equivalent.total == 2 * entries * e * m
    executed = batch * n if density > 0.007 else entries
    assert flops.forward.executed.total == 2 * executed * k * m
    assert flops.training.executed.total == 4 * executed * k * m
    given = 8 * (batch + 1 + entries + batch * k) + 4 * entries
    read = entries * k * m if density < 0.007 else e * n * m + (1 + 3 * k) * batch * n
    assert flops.forward.bytes is not None
    assert flops.forward.bytes.total == given + 4 * (read + batch * k * m)


def test_routing_counts_its_projection() -> None:
    x, weight = torch.randn(50, 24, requires_grad=True), torch.randn(9, 24, requires_grad=True)
    one = 2 * 50 * 9 * 24
    dense, chosen = (count_flops(lambda r=r: route(x, weight, 2, renormalize=r).weights) for r in (False, True))
    assert dense.training.active.total == dense.training.executed.total == 4 * one
    assert chosen.training.active.total == chosen.training.executed.total == one + 3 * 2 * 50 * 2 * 24
    assert chosen.training.dense_equivalent.total == 4 * one
    with FakeTensorMode(), torch.no_grad():
        given = torch.empty(50, 24, device="cuda"), torch.empty(9, 24, device="cuda")
        fake = count_flops(lambda: route(*given, 2).weights).forward
    options = RoutingOptions(2, 0, 0, 0, 0, False, 1.0, -1, False)
    sizes = constants(torch.empty(50, 24), options, router=weight, biased=False)
    padded = ceil(50, sizes["BLOCK_T"]) * ceil(9, sizes["BLOCK_E"]) * ceil(24, sizes["BLOCK_D"])
    assert (fake.active.total, fake.executed.total) == (one, 2 * padded)


def test_fake_tensors_on_a_gpu_count_as_its_tiles() -> None:
    shapes = [(T, D), (E, D, 2 * F), (E, F, D)]
    with FakeTensorMode(), torch.no_grad():
        x, up, down = (torch.empty(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
        weights, ids = torch.empty(T, K, device="cuda"), torch.empty(T, K, device="cuda", dtype=torch.int64)
        flops = count_flops(lambda: expert_mlp(x, up, down, weights, ids))
    assert flops.bound
    tile_up = closed_form(Shape("up", T * K, D, F, E, torch.bfloat16), 90)
    tile_down = closed_form(Shape("rows", T * K, F, D, E, torch.bfloat16), 90)
    worst = torch.arange(T * K).clamp(max=E - 1).view(T, K)
    expected = 2 * tiled(worst, tile_up.block_m) * ceil(D, tile_up.block_k) * 2 * ceil(F, tile_up.block_n)
    expected += 2 * tiled(worst, tile_down.block_m) * ceil(F, tile_down.block_k) * ceil(D, tile_down.block_n)
    assert flops.forward.executed.total == expected
    assert flops.forward.active.total == 2 * T * K * 3 * D * F
