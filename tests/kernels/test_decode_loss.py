from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moesaic.kernels import decode_loss, encode_features, reference_toy

# torch says once per process that its CSR tensors are in beta.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

B, N, M = 9, 37, 5


@pytest.fixture(scope="module")
def problem() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(B, N, generator=generator) * (torch.rand(B, N, generator=generator) < 0.3)
    x[4] = 0.0  # a sample without features
    parts = {"weight": torch.randn(N, M, generator=generator), "bias": torch.randn(N, generator=generator)}
    return {"x": x, **parts, "importance": torch.rand(N, generator=generator) + 0.5}


def laid_out(x: Tensor, layout: str) -> Tensor:
    return x.to_sparse_csr() if layout == "csr" else x


def tied(p: dict[str, Tensor], layout: str, stripe: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    weight, bias = (p[name].to(dtype, copy=True).requires_grad_() for name in ("weight", "bias"))
    x = laid_out(p["x"].to(dtype), layout)
    h = encode_features(x, weight)
    loss = decode_loss(h, x, weight, bias, p["importance"].to(dtype), stripe=stripe)
    return loss.detach(), list(torch.autograd.grad(loss * 1.7, (weight, bias)))


def oracle(p: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    weight, bias = (p[name].double().requires_grad_() for name in ("weight", "bias"))
    x = p["x"].double()
    h = reference_toy.encode_features(x, weight)
    loss = reference_toy.decode_loss(h, x, weight, bias, p["importance"].double())
    return loss.detach(), list(torch.autograd.grad(loss * 1.7, (weight, bias)))


def worst(p: dict[str, Tensor], layout: str, stripe: int, dtype: torch.dtype) -> float:
    loss, gradients = tied(p, layout, stripe, dtype)
    expected, theirs = oracle(p)
    errors = [float((loss - expected).abs() / expected)]
    errors += [float((a - b).abs().max() / b.square().mean().sqrt()) for a, b in zip(gradients, theirs, strict=True)]
    return max(errors)


@pytest.mark.parametrize("layout", ["dense", "csr"])
@pytest.mark.parametrize("stripe", [1, 8, 36, 37, 4096])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-13), (torch.float32, 3e-6)])
def test_equals_the_reference(
    problem: dict[str, Tensor], layout: str, stripe: int, dtype: torch.dtype, allowed: float
) -> None:
    assert worst(problem, layout, stripe, dtype) < allowed


@pytest.mark.parametrize("name", ["x", "weight", "bias", "importance"])
def test_the_tolerance_can_fail(problem: dict[str, Tensor], name: str) -> None:
    shifted = problem | {name: problem[name].roll(1, -1 if name == "x" else 0)}
    loss, gradients = tied(shifted, "csr", 8, torch.float32)
    expected, theirs = oracle(problem)
    assert abs(float(loss / expected) - 1) > 1e-3
    assert not torch.allclose(gradients[0].double(), theirs[0], rtol=1e-3)


@pytest.mark.parametrize("wanted", [("h",), ("weight",), ("bias",), ("h", "bias"), ("h", "weight", "bias")])
def test_every_subset_of_gradients(problem: dict[str, Tensor], wanted: tuple[str, ...]) -> None:
    inputs = {"h": problem["x"] @ problem["weight"], "weight": problem["weight"], "bias": problem["bias"]}
    mine = {name: t.double().requires_grad_(name in wanted) for name, t in inputs.items()}
    ours = decode_loss(mine["h"], problem["x"].double(), mine["weight"], mine["bias"], stripe=8)
    theirs = reference_toy.decode_loss(mine["h"], problem["x"].double(), mine["weight"], mine["bias"])
    leaves = [mine[name] for name in wanted]
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def mixture(dtype: torch.dtype) -> dict[str, Tensor]:
    """A mixture's parts: four experts, two of them chosen by each sample, and a shared one."""
    generator = torch.Generator().manual_seed(7)
    sizes = {
        "h": (B, 2, M),
        "gates": (B, 2),
        "weight": (4, N, M),
        "bias": (4, N),
        "h0": (B, 3),
        "w0": (N, 3),
        "b0": (N,),
    }
    return {
        name: torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype) for name, size in sizes.items()
    }


IDS = torch.tensor([[0, 1], [3, 0], [1, 0], [0, 3], [1, 3], [3, 1], [0, 1], [1, 0], [3, 0]])  # the third has none


def mixture_loss(parts: dict[str, Tensor], x: Tensor, importance: Tensor) -> Tensor:
    every = torch.relu(torch.einsum("bjm,enm->bjen", parts["h"], parts["weight"]) + parts["bias"])
    chosen = every[torch.arange(B)[:, None], torch.arange(2), IDS]
    out = (chosen * parts["gates"][..., None]).sum(1) + torch.relu(parts["h0"] @ parts["w0"].T + parts["b0"])
    return ((out - x).square() * importance).sum() / B


@pytest.mark.parametrize("stripe", [8, 37])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_a_mixture_with_a_shared_expert(
    problem: dict[str, Tensor], stripe: int, dtype: torch.dtype, allowed: float
) -> None:
    mine = {name: part.requires_grad_() for name, part in mixture(dtype).items()}
    theirs = {name: part.requires_grad_() for name, part in mixture(torch.float64).items()}
    x, importance = problem["x"], problem["importance"]
    ours = decode_loss(
        mine["h"], laid_out(x.to(dtype), "csr"), mine["weight"], mine["bias"], importance.to(dtype), ids=IDS,
        gates=mine["gates"], shared=(mine["h0"], mine["w0"], mine["b0"]), stripe=stripe,
    )  # fmt: skip
    truth = mixture_loss(theirs, x.double(), importance.double())
    assert abs(float(ours.detach().double() / truth.detach()) - 1) < allowed
    got, expected = (torch.autograd.grad(loss * 1.7, list(p.values())) for loss, p in ((ours, mine), (truth, theirs)))
    for name, a, b in zip(mine, got, expected, strict=True):
        error = float((a - b).abs().max() / b.square().mean().sqrt())
        assert error < 10 * allowed, name
    assert not got[2][2].any()


def test_gradient_of_a_dense_input(problem: dict[str, Tensor]) -> None:
    x = problem["x"].double().requires_grad_()
    assert torch.autograd.gradcheck(encode_features, (x, problem["weight"].double().requires_grad_()))


def test_no_samples_give_no_loss() -> None:
    x, weight, bias = torch.zeros(0, N), torch.ones(N, M), torch.ones(N)
    assert decode_loss(encode_features(x, weight), x, weight, bias).item() == 0.0


def test_memory_is_a_stripe_and_not_the_batch_times_the_features() -> None:
    batch, n = 64, 20_000
    x, weight, bias = torch.zeros(batch, n).to_sparse_csr(), torch.randn(n, 4), torch.randn(n)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.layout == torch.strided:
                largest = max(largest, out.numel())
            return out

    h = torch.randn(batch, 4, requires_grad=True)
    with Watch():  # type: ignore[no-untyped-call]
        decode_loss(h, x, weight, bias, stripe=500).backward()
    assert largest == batch * 500


def test_refusals(problem: dict[str, Tensor]) -> None:
    x, weight, bias = problem["x"], problem["weight"], problem["bias"]
    h = encode_features(x, weight)
    with pytest.raises(ValueError, match="x, weight"):
        encode_features(x[:, 1:], weight)
    with pytest.raises(ValueError, match="layout"):
        encode_features(x.to_sparse_coo(), weight)
    with pytest.raises(ValueError, match="type of x"):
        encode_features(x, weight.double())
    with pytest.raises(ValueError, match="h: takes"):
        decode_loss(h[1:], x, weight, bias)
    with pytest.raises(ValueError, match="bias: takes"):
        decode_loss(h, x, weight, bias[1:])
    with pytest.raises(ValueError, match="gates: takes None without ids"):
        decode_loss(h, x, weight, bias, gates=torch.ones(B, 1))
    with pytest.raises(ValueError, match=r"weight: takes \(E, n, m\)"):
        decode_loss(h, x, weight, bias, ids=IDS)
    with pytest.raises(ValueError, match="stripe=0"):
        decode_loss(h, x, weight, bias, stripe=0)
