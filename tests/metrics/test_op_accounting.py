"""Our sums over ops equal FlopCounterMode's to the integer, and bytes are those of a sum by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from moesaic.kernels import grouped_matmul
from moesaic.metrics.op_accounting import FURTHER, OpAccounting
from moesaic.moe import MoE


def convolutions() -> Tensor:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2, groups=2), nn.ConvTranspose2d(8, 4, 2)
    )
    out: Tensor = model(torch.randn(2, 3, 9, 9, requires_grad=True))
    return out


def attention(where: str) -> Callable[[], Tensor]:
    def run() -> Tensor:
        q, k, v = (torch.randn(2, 4, length, 16, requires_grad=True) for length in (7, 9, 9))
        if where == "math":
            with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
                return F.scaled_dot_product_attention(q, k, v)
        return F.scaled_dot_product_attention(q, k, v)

    return run


def encoder() -> Tensor:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    out: Tensor = layer(torch.randn(2, 5, 16, requires_grad=True))
    return out


def recurrent() -> Tensor:
    out: Tensor = nn.GRU(8, 6, 2, bidirectional=True)(torch.randn(5, 3, 8, requires_grad=True))[0]
    return out


def mixture() -> Tensor:
    layer = MoE(16, 12, 4, 2, n_shared_experts=1, gate="sigmoid", balance="bias", bias=True)
    out: Tensor = layer(torch.randn(9, 16))
    return out


def recomputed() -> Tensor:
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    out: Tensor = checkpoint(model, torch.randn(4, 5, requires_grad=True), use_reentrant=False)
    return out


def products() -> Tensor:
    a, b = torch.randn(3, 4, 5, requires_grad=True), torch.randn(5, 6)
    out = torch.einsum("bij,jk,bkl->bil", a, b, torch.randn(3, 6, 2)) + torch.addmm(torch.zeros(2), b, b.T[:, :2])[:4]
    return out + torch.baddbmm(torch.zeros(3, 4, 2), a, torch.randn(3, 5, 2)) + F.bilinear(a, a, torch.randn(2, 5, 5))


@pytest.mark.parametrize(
    "run", [convolutions, attention("math"), attention("fused"), encoder, recurrent, mixture, recomputed, products]
)
def test_equals_the_flop_counter_to_the_integer(run: Callable[[], Tensor]) -> None:
    torch.manual_seed(0)
    with FlopCounterMode(display=False) as theirs:
        run().sum().backward()
    with OpAccounting() as ours:
        run().sum().backward()
    known = {name: total.useful for name, total in ours.by_op.items() if total.useful and name not in FURTHER}
    assert known == {str(op): flops for op, flops in theirs.get_flop_counts().get("Global", {}).items() if flops}
    further = sum(total.useful for name, total in ours.by_op.items() if name in FURTHER)
    assert ours.total.useful == theirs.get_total_flops() + further > 0


def test_what_the_flop_counter_has_no_formula_for_equals_its_formulas() -> None:
    assert not {str(op) for op in flop_registry} & set(FURTHER)
    q, k = (torch.randn(2, 4, length, 16, requires_grad=True) for length in (7, 9))
    counts = []
    for backend in (nn.attention.SDPBackend.MATH, nn.attention.SDPBackend.FLASH_ATTENTION):
        with OpAccounting() as forward, nn.attention.sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, k)
        with OpAccounting() as backward:
            out.sum().backward()
        counts.append((forward.total.useful, backward.total.useful))
    one = 2 * 2 * 4 * 7 * 9 * 16
    # The fused backward makes the scores again, which PyTorch's own formula counts too.
    assert counts == [(2 * one, 4 * one), (2 * one, 5 * one)]


@pytest.mark.parametrize("step", [4, 2])
def test_grouped_products_of_pytorch(step: int) -> None:
    x, weight = torch.randn(8, 16, requires_grad=True), torch.randn(8 // step, 16, 32, requires_grad=True)
    offsets = torch.arange(step, 9, step, dtype=torch.int32)
    with OpAccounting() as ours:
        F.grouped_mm(x, weight, offs=offsets).square().sum().backward()
    assert ours.total.useful == ours.total.executed == 3 * 2 * 8 * 16 * 32
    assert ours.total.dense_equivalent is None


def test_ops_inside_an_op_do_not_count_twice() -> None:
    x, weight, offsets = torch.randn(6, 4), torch.randn(2, 4, 3), torch.tensor([0, 2, 6])
    with OpAccounting() as ours:
        grouped_matmul(x.double(), weight.double(), offsets)
    assert ours.total.useful == 2 * 6 * 4 * 3
    assert set(ours.by_op) == {"aten._to_copy", "moesaic.grouped_mm"}


TABLE = torch.zeros(1000, 8)
IDS = torch.tensor([5, 5, 7])
X = torch.zeros(6, 8)
MASK = torch.tensor([True, False, True, False, False, True])


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda: X + 1.0, 2 * 192),
        (lambda: X * X, 2 * 192),
        (lambda: X + X[0].expand(6, 8), 192 + 32 + 192),
        (lambda: X.t().reshape(-1), 2 * 192),
        (lambda: (X.view(48), X.t(), X[1:], X.expand(3, 6, 8), X.detach(), torch.empty(9), X.new_empty(9)), 0),
        (lambda: torch.zeros_like(X), 192),
        (lambda: X.new_zeros(3), 12),
        (lambda: X.clone().add_(X), 2 * 192 + 3 * 192),
        (lambda: torch.empty(6, 8).copy_(X), 2 * 192),
        (lambda: torch.empty(6, 8).zero_(), 192),
        (lambda: torch.add(X, 1.0, out=torch.empty(6, 8)), 2 * 192),
        (lambda: torch.cat([X, X[:2]]), 192 + 64 + 256),
        (lambda: X.sum(), 192 + 4),
        (lambda: X.to(torch.float64), 192 + 384),
        (lambda: F.embedding(IDS, TABLE), 24 + 2 * 96),
        (lambda: TABLE[IDS], 24 + 2 * 96),
        (lambda: TABLE.index_select(0, IDS), 24 + 2 * 96),
        (lambda: X.gather(1, IDS[:, None]), 24 + 2 * 12),
        (lambda: X[MASK], 6 + 2 * 96),
        (lambda: TABLE.index_add_(0, IDS, X[:3]), 24 + 3 * 96),
        (lambda: TABLE.index_copy_(0, IDS, X[:3]), 24 + 2 * 96),
        (lambda: TABLE.index_fill_(0, IDS, 0.0), 24 + 96),
        (lambda: TABLE.index_put_((IDS,), X[:3]), 24 + 2 * 96),
        (lambda: TABLE.index_put_((IDS,), X[:3], accumulate=True), 24 + 3 * 96),
        (lambda: X.index_put_((MASK,), torch.zeros(())), 4 + 6 + 4 + 96),
        (lambda: X.scatter_(1, IDS[:, None], 1.0), 24 + 12),
        (lambda: X.scatter_add_(1, IDS[:, None], TABLE[:3]), 24 + 3 * 12),
        (lambda: X.index_add(0, IDS // 2, X[:3]), 48 + 192 + 24 + 96 + 192),
        (lambda: X @ X.t(), 192 + 192 + 4 * 36),
        (lambda: F.linear(X, X, X[:, 0]), 3 * 192 - 192 + 24 + 4 * 36),
        (lambda: F.embedding_bag(IDS[None], TABLE, mode="sum"), None),
    ],
)
def test_bytes_by_hand(run: Callable[[], object], expected: int | None) -> None:
    with OpAccounting() as ours:
        run()
    if expected is None:
        assert ours.by_op["aten._embedding_bag_forward_only"].bytes < 1000
    else:
        assert ours.total.bytes == expected
    assert not ours.total.bound


def test_bytes_of_a_sparse_tensor_and_of_unknown_masks() -> None:
    at = torch.tensor([[0, 2, 5], [1, 1, 7]])
    x = torch.sparse_coo_tensor(at, torch.ones(3), (6, 8), is_coalesced=True, check_invariants=True)
    with OpAccounting() as ours:
        x * 2.0
    assert ours.by_op["aten.mul"].bytes == 2 * (6 * 8 + 3 * 4)
    with FakeTensorMode(), OpAccounting() as fake:
        target, mask = torch.empty(6, 8), torch.empty(6, dtype=torch.bool)
        target.index_put_((mask,), torch.zeros(()))
    assert fake.total.bound
    assert fake.by_op["aten.index_put_"].bytes == 6 + 4 + 192
