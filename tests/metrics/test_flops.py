"""count_flops: the formulas are integers, so every comparison here is ==."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moesaic.metrics.flops import Parts, Traffic, count_flops, dense_width_at_equal_flops


@dataclass(frozen=True)
class Shape:
    n_features: int = 12
    n_hidden: int = 3
    n_experts: int = 1
    top_k: int = 1
    gate: str = "paper"
    shared_hidden: int = 0
    tied: bool = True


class PlainToy(nn.Module):
    """The toy model in plain PyTorch; `masked` runs every expert on every row and masks, as the paper's code does."""

    def __init__(self, shape: Shape, masked: bool = False, sparse: int = 0) -> None:
        super().__init__()
        self.shape, self.masked, self.sparse = shape, masked, sparse
        n, m, e, m0 = shape.n_features, shape.n_hidden, shape.n_experts, shape.shared_hidden
        self.weight = nn.Parameter(torch.randn(e, n, m))
        self.bias = nn.Parameter(torch.zeros(e, n))
        self.decoder = self.weight if shape.tied else nn.Parameter(torch.randn(e, n, m))
        if e > 1:
            self.router = nn.Parameter(torch.randn(e, n), requires_grad=shape.gate not in ("random", "oracle"))
        if m0:
            self.shared = nn.Parameter(torch.randn(n, m0))
            self.shared_bias = nn.Parameter(torch.zeros(n))
            self.shared_decoder = self.shared if shape.tied else nn.Parameter(torch.randn(n, m0))

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """X W for W (n, m): all of it, or only the first `sparse` features of each row, gathered."""
        if not self.sparse:
            return x @ weight
        ids = x.argsort(dim=1, descending=True)[:, : self.sparse]
        return torch.bmm(x.gather(1, ids)[:, None], weight[ids])[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        shape = self.shape
        out = torch.zeros_like(x)
        if shape.shared_hidden:
            out = out + torch.relu(self.product(x, self.shared) @ self.shared_decoder.T + self.shared_bias)
        if shape.n_experts == 1:
            return out + torch.relu(self.product(x, self.weight[0]) @ self.decoder[0].T + self.bias[0])
        gates = self.product(x, self.router.T).softmax(dim=1)
        top, ids = gates.topk(shape.top_k, dim=1)
        top = top / top.sum(dim=1, keepdim=True)
        for e in range(shape.n_experts):
            weight = (top * (ids == e)).sum(dim=1)
            rows = torch.arange(len(x)) if self.masked else (ids == e).any(dim=1).nonzero()[:, 0]
            h = self.product(x[rows], self.weight[e])
            y = torch.relu(h @ self.decoder[e].T + self.bias[e])
            out = out.index_add(0, rows, weight[rows, None] * y)
        return out


SHAPES = [
    Shape(),
    Shape(tied=False),
    Shape(shared_hidden=2),
    Shape(n_experts=4),
    Shape(n_experts=4, top_k=2),
    Shape(n_experts=4, top_k=4),
    Shape(n_experts=4, top_k=2, tied=False),
    Shape(n_experts=4, top_k=2, shared_hidden=5),
    Shape(n_experts=4, top_k=1, shared_hidden=5, tied=False),
    Shape(n_experts=4, top_k=2, gate="random"),
    Shape(n_features=7, n_hidden=1, n_experts=5, top_k=3, gate="oracle", shared_hidden=1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formula_equals_the_flop_counter(shape: Shape) -> None:
    torch.manual_seed(0)
    batch = 10
    x = torch.rand(batch, shape.n_features)
    model = PlainToy(shape)
    counted, formula = count_flops(model, x), count_flops(shape, samples=batch)
    assert formula.forward.active.total == formula.forward.executed.total == counted.forward.executed.total
    assert formula.training.active.total == formula.training.executed.total == counted.training.executed.total
    assert formula.parameters == counted.parameters
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.n_experts > 1], ids=str)
def test_masking_executes_the_dense_equivalent(shape: Shape) -> None:
    torch.manual_seed(0)
    batch = 10
    counted = count_flops(PlainToy(shape, masked=True), torch.rand(batch, shape.n_features))
    formula = count_flops(shape, samples=batch, executed_rows=batch * shape.n_experts)
    for kind in ("forward", "training"):
        ours, theirs = getattr(formula, kind), getattr(counted, kind)
        assert ours.executed == ours.dense_equivalent
        assert ours.executed.total == theirs.executed.total
        assert ours.active == getattr(count_flops(shape, samples=batch), kind).active


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sparse_counts_equal_a_gathered_product(shape: Shape) -> None:
    torch.manual_seed(0)
    batch, active = 10, 2
    counted = count_flops(PlainToy(shape, sparse=active), torch.rand(batch, shape.n_features))
    formula = count_flops(shape, samples=batch, active_features=active)
    assert formula.forward.active.sparse_total == counted.forward.executed.total
    assert formula.training.active.sparse_total == counted.training.executed.total


def test_parts_of_a_hand_count() -> None:
    flops = count_flops(Shape(10, 3, 4, 2, shared_hidden=1), samples=5, feature_probability=0.25)
    assert flops.forward.active == Parts(1800, 700, 400, 700, 975.0, 175.0, 100.0)
    assert flops.training.active == Parts(4300, 1400, 800, 2100, 2650.0, 350.0, 200.0)
    assert flops.forward.dense_equivalent.encode == 2 * 10 * 5 * 13
    assert (flops.total_width, flops.active_width) == (13, 7)
    assert flops.parameters == 10 * (4 * 3 + 1) + 10 * 4 + 10 + 10 * 4
    assert flops.active_parameters == 10 * (2 * 3 + 1) + 10 * 2 + 10 + 10 * 4
    assert count_flops(Shape()).forward.active.sparse_total is None


def test_bytes_of_a_hand_count() -> None:
    dense = count_flops(Shape(10, 3), samples=8)
    assert dense.forward.bytes == Traffic(4 * 70, 4 * (160 + 48))
    assert dense.training.bytes == Traffic(4 * 100, 4 * (160 + 48 + 80 + 24), 4 * (240 + 48 + 40 + 60), 4 * 7 * 40)
    moe = count_flops(Shape(10, 3, 4, 2, "paper", 1, False), samples=8, itemsize=2).training.bytes
    assert moe is not None
    outer, inner, weight, parameters = 8 * 3 * 10, 8 * 7, 10 * 13, 2 * 130 + 40 + 10 + 40
    assert moe.weights == 2 * (3 * weight + 50 + 40)
    assert moe.activations == 2 * (3 * outer + 3 * inner + 8 * (10 + 4) + 8 * 10)
    assert moe.gradients == 2 * (3 * outer + 2 * inner + 8 * 4 + parameters)
    assert moe.optimizer == 2 * 7 * parameters
    assert moe.total == moe.weights + moe.activations + moe.gradients + moe.optimizer


def test_bytes_amortise_weights_over_the_batch_and_only_touched_experts_move() -> None:
    shape = Shape(100, 4, n_experts=64)
    step, sample = count_flops(shape, samples=16).training.bytes, count_flops(shape, batch_size=16).training.bytes
    assert step is not None
    assert sample is not None
    assert sample.total * 16 == step.total
    few, many = count_flops(shape, samples=2).forward.bytes, count_flops(shape, samples=64).forward.bytes
    assert few is not None
    assert many is not None
    assert (few.weights, many.weights) == (4 * (100 * 2 * (8 + 1) + 6400), 4 * (100 * 64 * (8 + 1) + 6400))


def test_frozen_routers_train_nothing() -> None:
    trained, frozen = (count_flops(Shape(n_experts=4, gate=gate)) for gate in ("switch", "random"))
    assert trained.training.active.router == 2 * (trained.forward.active.router or 0)
    assert frozen.training.active.router == frozen.forward.active.router
    assert frozen.parameters == trained.parameters
    assert trained.training.bytes is not None
    assert frozen.training.bytes is not None
    assert trained.training.bytes.optimizer - frozen.training.bytes.optimizer == 4 * 7 * 4 * 12


def test_sigmoid_has_a_router_for_one_expert() -> None:
    assert count_flops(Shape(gate="sigmoid")).forward.active.router == 2 * 12
    assert count_flops(Shape()).forward.active.router == 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("p", [None, 0.03, 1.0])
@pytest.mark.parametrize("shape", [*SHAPES, Shape(128, 16, 4), Shape(128, 4, 16, 4), Shape(128, 1, 64, 4)], ids=str)
def test_dense_width_is_the_nearest(shape: Shape, p: float | None, training: bool) -> None:
    def cost(config: Shape) -> float:
        flops = count_flops(config, feature_probability=p)
        parts = (flops.training if training else flops.forward).active
        cost = parts.total if p is None else parts.sparse_total
        assert cost is not None
        return cost

    width = dense_width_at_equal_flops(shape, training=training, feature_probability=p)
    goal = cost(shape)
    misses = {m: abs(cost(Shape(shape.n_features, m)) - goal) for m in range(1, 120)}
    assert misses[width] == min(misses.values())
    assert width == next(m for m, miss in misses.items() if miss == misses[width])


def test_dense_width_of_the_tradeoff_architectures() -> None:
    shapes = [Shape(128, 16, 4), Shape(128, 4, 16, 1), Shape(128, 4, 16, 4), Shape(128, 1, 64, 4)]
    assert [dense_width_at_equal_flops(s, training=False) for s in shapes] == [18, 12, 24, 36]
    assert [dense_width_at_equal_flops(s) for s in shapes] == [18, 10, 22, 30]


def test_a_layer_too_large_for_memory_is_counted_on_fake_tensors() -> None:
    tokens, experts, d, f = 2**20, 64, 1024, 4096
    with FakeTensorMode():
        x = torch.empty(experts, tokens // experts, d)
        up = torch.empty(experts, d, f, requires_grad=True)
        down = torch.empty(experts, f, d, requires_grad=True)

        def layer(x: Tensor) -> Tensor:
            return torch.bmm(torch.bmm(x, up).relu(), down)

        flops = count_flops(layer, x)
        assert up.grad is None
    assert flops.forward.executed.total == 2 * 2 * tokens * d * f
    assert flops.training.executed.total == (2 + 3) * 2 * tokens * d * f
    assert flops.forward.active == flops.forward.executed == flops.forward.dense_equivalent
    assert flops.parameters is None


def test_a_callable_without_gradient_has_no_training_count() -> None:
    model = nn.Linear(3, 4)
    with torch.no_grad():
        flops = count_flops(model, torch.rand(5, 3))
    assert flops.forward.executed.total == 2 * 5 * 3 * 4
    assert flops.training.executed.total is None
    assert flops.parameters == 16


@pytest.mark.parametrize(
    ("shape", "keywords", "message"),
    [
        (Shape(n_experts=2, top_k=3), {}, r"top_k=3: must be between 1 and n_experts = 2"),
        (Shape(n_features=0), {}, r"n_features=0: must be at least 1"),
        (Shape(shared_hidden=-1), {}, r"shared_hidden=-1"),
        (Shape(), {"samples": 0}, r"samples=0: must be at least 1"),
        (Shape(), {"batch_size": 0}, r"batch_size=0"),
        (Shape(), {"executed_rows": 3, "samples": 4}, r"executed_rows=3: must be at least samples·top_k = 4"),
        (Shape(), {"feature_probability": 0.0}, r"feature_probability=0.0: must be in \(0, 1\]"),
        (Shape(), {"active_features": 13}, r"active_features=13: must be between 0 and n_features = 12"),
        (Shape(), {"active_features": 1, "feature_probability": 0.1}, r"give either"),
    ],
)
def test_impossible_values_are_named(shape: Shape, keywords: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count_flops(shape, **keywords)  # type: ignore[arg-type]


def test_a_configuration_takes_no_positional_arguments() -> None:
    with pytest.raises(ValueError, match="args="):
        count_flops(replace(Shape(), tied=False), torch.zeros(1))
