"""Encoding of sparse features by routed experts, against products of the dense batch."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moesaic.kernels import encode_features, reference_toy
from moesaic.kernels.encode_features import CROSSOVER, gather_rows

pytestmark = pytest.mark.filterwarnings("ignore:Sparse")
N, M, E, K = 700, 5, 4, 2


def drawn(density: float, n_samples: int = 11, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    present = torch.rand(n_samples, N, generator=generator) < density
    present[n_samples // 2] = False
    x = torch.rand(n_samples, N, generator=generator, dtype=dtype) * present
    ids = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(n_samples)])
    return x, torch.randn(E, N, M, generator=generator, dtype=dtype), ids


def routed(x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    every = torch.stack([reference_toy.encode_features(x, expert) for expert in weight], 1)
    return every.gather(1, ids[..., None].expand(-1, -1, weight.shape[2]))


@pytest.mark.parametrize("density", [0.0, 0.004, 0.05, 1.0])
@pytest.mark.parametrize("laid_out", ["experts first", "features first"])
def test_values_and_gradients_by_expert(density: float, laid_out: str) -> None:
    x, weight, ids = drawn(density)
    if laid_out == "features first":
        weight = weight.movedim(0, 1).contiguous().movedim(1, 0)
    mine, theirs = (weight.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2))
    h, truth = encode_features(x.to_sparse_csr(), mine, ids), routed(x, theirs, ids)
    torch.testing.assert_close(h, truth, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(h.shape, dtype=h.dtype, generator=torch.Generator().manual_seed(6))
    got, expected = torch.autograd.grad(h, mine, upstream), torch.autograd.grad(truth, theirs, upstream)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-12, atol=1e-12)


def test_both_sides_of_the_crossover_are_tried() -> None:
    assert 0.004 < CROSSOVER < 0.05


def test_float32_against_float64_and_a_wrong_expert_shows() -> None:
    x, weight, ids = drawn(0.004, dtype=torch.float32)
    truth = routed(x.double(), weight.double(), ids)
    scale = truth.square().mean().sqrt()
    assert float((encode_features(x.to_sparse_csr(), weight, ids) - truth).abs().max() / scale) < 1e-6
    assert float((encode_features(x.to_sparse_csr(), weight, ids.flip(1)) - truth).abs().max() / scale) > 0.1


def test_a_dense_batch_and_its_gradient() -> None:
    x, weight, ids = drawn(0.05)
    leaf = x[:3].clone().requires_grad_()
    h = encode_features(leaf, weight, ids[:3])
    torch.testing.assert_close(h, routed(x[:3], weight, ids[:3]))
    assert torch.autograd.grad(h.sum(), leaf)[0].shape == leaf.shape


def test_the_op_is_a_good_citizen() -> None:
    x, weight, ids = drawn(0.004, 4)
    sparse = x.to_sparse_csr()
    parts = [part().clone() for part in (sparse.crow_indices, sparse.col_indices, sparse.values)]
    torch.library.opcheck(torch.ops.moesaic.encode_features.default, (*parts, weight.requires_grad_(), ids))


def test_refusals() -> None:
    x, weight, ids = drawn(0.004)
    with pytest.raises(ValueError, match=r"weight, ids: take \(E, n, m\) and \(B, k\)"):
        encode_features(x, weight[0], ids)
    with pytest.raises(ValueError, match=r"weight, ids: take"):
        encode_features(x, weight, ids[1:])


def gathers() -> list[str]:
    """Triton's gather against the dense product: strides, wide and narrow rows, rows without entries."""
    os.environ["MOESAIC_BACKEND"] = "triton"
    wrong = []
    for m, k in ((3, 1), (16, 2), (700, 2)):
        x, _, ids = drawn(0.02, 5, torch.float32)
        weight = torch.randn(N, E, m, generator=torch.Generator().manual_seed(m)).movedim(1, 0)
        sparse = x.to_sparse_csr()
        got = gather_rows(sparse.crow_indices(), sparse.col_indices(), sparse.values(), weight, ids[:, :k])
        truth = routed(x.double(), weight.double(), ids[:, :k])
        error = float((got - truth).abs().max() / truth.square().mean().sqrt())
        if not error < 1e-5:
            wrong.append(f"m = {m}, k = {k}: {error:.2g}")
    return wrong


PROGRAMS = {"gathers": gathers}


def test_triton_in_the_interpreter(interpret: Callable[[str], None]) -> None:
    interpret("gathers")
