"""count_flops of callables and modules against counts by hand: ==, forward and training."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moesaic.kernels import expert_mlp
from moesaic.metrics import Flops, count_flops
from moesaic.metrics.flops import Traffic
from moesaic.moe import MoE, ToyConfig, ToyModel

T, D, M = 40, 32, 48
"""Tokens and widths of which 64 bytes are a divisor: the CPU pads nothing."""


def totals(flops: Flops, kind: str = "active") -> tuple[int | None, int | None]:
    return getattr(flops.forward, kind).total, getattr(flops.training, kind).total


def mib(flops: Flops) -> tuple[float, float]:
    assert flops.forward.bytes is not None
    assert flops.training.bytes is not None
    return flops.forward.bytes.total, flops.training.bytes.total


@pytest.mark.parametrize("input_gradient", [False, True])
def test_a_dense_mlp(input_gradient: bool) -> None:
    model = nn.Sequential(nn.Linear(D, M, bias=False), nn.ReLU(), nn.Linear(M, D, bias=False))
    x = torch.randn(T, D, requires_grad=input_gradient)
    flops, one = count_flops(model, x), 2 * T * D * M
    assert totals(flops) == totals(flops, "executed") == totals(flops, "dense_equivalent")
    assert totals(flops) == (2 * one, 2 * one + (3 + input_gradient) * one)
    forward = 4 * (T * D + D * M + T * M) + 8 * T * M + 4 * (T * M + M * D + T * D)
    # dy h → dV, dy V → dh, threshold of dh by ReLU's output, x dh → dU (and dh U → dx).
    backward = 4 * (2 * T * D + 2 * T * M + 2 * M * D) + 3 * 4 * T * M + 4 * (T * D + T * M + D * M)
    backward += input_gradient * 4 * (T * M + M * D + T * D)
    assert mib(flops) == (forward, forward + backward)
    assert flops.forward.bytes == Traffic(unsplit=forward)
    assert (flops.parameters, flops.active_parameters, flops.bound) == (2 * D * M, None, False)


def test_a_dense_attention_block() -> None:
    heads, batch, length = 4, 2, 10

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).view(batch, length, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, D)
            out: Tensor = self.out(y)
            return out

    flops = count_flops(Attention(), torch.randn(batch, length, D))
    projections, attention = 2 * batch * length * D * 3 * D, 2 * batch * length * length * D
    output = 2 * batch * length * D * D
    assert flops.forward.active.total == projections + output + 2 * attention
    # No dx; the scores are made again.
    assert flops.training.active.total == 2 * projections + 3 * output + 7 * attention
    assert totals(flops) == totals(flops, "dense_equivalent")


@pytest.mark.parametrize(
    ("n_experts", "top_k", "shared", "gate", "balance"),
    [
        (8, 2, 0, "softmax", "none"), (8, 1, 0, "switch", "none"), (4, 4, 0, "softmax", "none"),
        (1, 1, 0, "softmax", "none"), (64, 2, 0, "softmax", "aux"), (8, 3, 2, "sigmoid", "bias"),
        (8, 2, 1, "softmax", "none"),
    ],
)  # fmt: skip
def test_a_moe_layer(n_experts: int, top_k: int, shared: int, gate: str, balance: str) -> None:
    layer = MoE(D, M, n_experts, top_k, gate=gate, n_shared_experts=shared, balance=balance)
    flops = count_flops(layer, torch.randn(T, D, requires_grad=True))
    router, expert = 2 * T * D * n_experts, 2 * T * 3 * D * M
    for kind, experts in (("active", top_k), ("executed", top_k), ("dense_equivalent", n_experts)):
        forward = router + (experts + shared) * expert
        assert totals(flops, kind) == (forward, 3 * forward), kind
    numbers = n_experts * D + shared * 3 * D * M
    assert flops.parameters == numbers + n_experts * 3 * D * M
    assert flops.active_parameters == numbers + top_k * 3 * D * M
    assert not flops.bound


def test_only_experts_with_rows_move_their_weights() -> None:
    up, down = torch.randn(6, D, 2 * M), torch.randn(6, M, D)
    x, weights = torch.randn(T, D), torch.rand(T, 2)
    by_experts = []
    for n_touched in (1, 2, 5):
        ids = torch.arange(2 * T).view(T, 2) % n_touched
        flops = count_flops(lambda ids=ids: expert_mlp(x, up, down, weights, ids))
        assert flops.forward.executed.total == flops.forward.active.total == 2 * T * 2 * 3 * D * M
        assert flops.forward.bytes is not None
        by_experts.append(flops.forward.bytes.total)
    assert by_experts[1] - by_experts[0] == 4 * 3 * D * M
    assert by_experts[2] - by_experts[0] == 4 * 4 * 3 * D * M


def test_skipped_choices_are_useful_by_shape_and_not_executed() -> None:
    up, down, x = torch.randn(4, D, M), torch.randn(4, M, D), torch.randn(T, D)
    ids = torch.arange(T)[:, None] % 8
    flops = count_flops(lambda: expert_mlp(x, up, down, torch.ones(T, 1), ids, activation="relu")).forward
    assert flops.active.total == 2 * T * 2 * D * M
    assert flops.executed.total == 2 * (T // 2) * 2 * D * M


@pytest.mark.parametrize(
    "config",
    [
        ToyConfig(12, 3, 4, 2), ToyConfig(12, 3, 4, 2, tied=False), ToyConfig(12, 3, 4, 1, shared_hidden=5),
        ToyConfig(12, 3, 8, 4, gate="switch", shared_hidden=2, tied=False), ToyConfig(12, 3, 4, 4, gate="sigmoid"),
        ToyConfig(12, 3, 1, 1, gate="sigmoid"),
    ],
    ids=str,
)  # fmt: skip
def test_toy_models_count_as_their_configuration(config: ToyConfig) -> None:
    batch = 10
    counted, formula = count_flops(ToyModel(config), torch.rand(batch, 12)), count_flops(config, samples=batch)
    assert totals(counted) == totals(formula)
    assert totals(counted, "dense_equivalent") == totals(formula, "dense_equivalent")
    assert counted.parameters == formula.parameters
    # Columns are padded to 16: m and n here, E of gradients by rows not.
    lanes, rows, m0 = 16, batch * config.top_k, config.shared_hidden
    router = formula.forward.active.router or 0
    forward = 2 * rows * (12 * lanes + config.n_hidden * lanes) + router + 4 * batch * 12 * m0
    assert counted.forward.executed.total == forward


def test_a_toy_model_of_one_expert_routes_where_a_configuration_does_not() -> None:
    config, batch = ToyConfig(12, 3), 10
    counted, formula = count_flops(ToyModel(config), torch.rand(batch, 12)), count_flops(config, samples=batch)
    assert counted.forward.active.total == (formula.forward.active.total or 0) + 2 * batch * 12


def test_a_convolution() -> None:
    model = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    flops = count_flops(model, torch.randn(2, 3, 10, 10))
    one = 2 * 2 * 100 * 8 * 3 * 9
    assert totals(flops) == totals(flops, "executed") == (one, 2 * one)
    assert mib(flops)[0] == 4 * (2 * 300 + 8 * 27 + 2 * 800)


def test_a_layer_of_teraflops_is_counted_without_memory() -> None:
    tokens, n_experts, top_k, d_model, d_ff = 8192, 64, 2, 4096, 14336
    with FakeTensorMode():
        layer = MoE(d_model, d_ff, n_experts, top_k)
        start = time.perf_counter()
        flops = count_flops(layer, torch.empty(tokens, d_model))
        assert time.perf_counter() - start < 2
    router, expert = 2 * tokens * d_model * n_experts, 2 * tokens * 3 * d_model * d_ff
    # No dx: of the up product only dU, which is two thirds of an expert.
    assert totals(flops) == (router + 2 * expert, 2 * router + 2 * expert + 2 * 4 * expert // 3)
    assert (flops.forward.active.total or 0) > 5e12
    assert flops.forward.dense_equivalent.total == router + 64 * expert
    assert flops.bound
    assert flops.forward.bytes is not None
    assert flops.forward.bytes.total > 4 * 3 * n_experts * d_model * d_ff


def test_fake_and_real_tensors_count_alike_but_for_routing() -> None:
    def one(fake: bool) -> Flops:
        layer = MoE(D, M, 8, 2)
        return count_flops(layer, torch.randn(T, D))

    real = one(False)
    with FakeTensorMode():
        fake = one(True)
    assert totals(fake) == totals(real)
    assert totals(fake, "dense_equivalent") == totals(real, "dense_equivalent")
    assert fake.bound
    assert not real.bound
    assert mib(fake)[0] >= mib(real)[0]


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="a PyTorch with CUDA differentiates these")
def test_a_gradient_on_cuda_that_would_end_the_process_is_refused() -> None:
    with FakeTensorMode():
        weight = torch.empty(3, 3, device="cuda", requires_grad=True)
        with pytest.raises(ValueError, match=r"args: .* under torch.no_grad\(\)"):
            count_flops(lambda w: w @ w, weight)
        with torch.no_grad():
            assert count_flops(lambda w: w @ w, weight).forward.active.total == 54
