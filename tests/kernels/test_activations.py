"""Values and slopes of the activations, against float64 formulas and autograd."""

from __future__ import annotations

import pytest
import torch

from moesaic.kernels import reference
from moesaic.kernels.activations import (
    ACTIVATIONS,
    GATED,
    NO_ACTIVATION,
    activate,
    activate_backward,
    check_activation,
    clamp_of,
    clamped_swiglu,
    is_gated,
)

CLAMPED = (clamped_swiglu(2.5), clamped_swiglu(7, 1.702, 1), clamped_swiglu(limit=3, alpha=0.5, shift=-0.25))
KINDS = [(name, False) for name in (*ACTIVATIONS, *CLAMPED)] + [(name, True) for name in (*GATED, *CLAMPED)]


@pytest.mark.parametrize(("name", "interleaved"), KINDS)
def test_value_and_slope(name: str, interleaved: bool) -> None:
    h = (torch.randn(50, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4).requires_grad_()
    value = activate(h, name, interleaved)
    torch.testing.assert_close(value, reference.activate(h, name, interleaved), rtol=1e-12, atol=1e-12)
    upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (slope,) = torch.autograd.grad(value, h, upstream)
    again, dh = activate_backward(h.detach(), upstream, name, interleaved)
    torch.testing.assert_close(again, value.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dh, slope, rtol=1e-10, atol=1e-12)
    half, _ = activate_backward(h.detach().bfloat16(), upstream.bfloat16(), name, interleaved)
    assert half.dtype == torch.float32


def test_kinks_and_clamps_as_in_torch() -> None:
    h = torch.tensor([[-8.0, -7.0, 0.0, 7.0, 8.0, 7.0, -7.0, 0.0]], dtype=torch.float64)
    for name, interleaved in KINDS:
        leaf = h.clone().requires_grad_()
        value = activate(leaf, name, interleaved)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
        _, dh = activate_backward(h, torch.ones_like(value), name, interleaved)
        torch.testing.assert_close(dh, slope, rtol=1e-10, atol=1e-12)


def test_a_clamped_swiglu_has_its_constants_in_its_name() -> None:
    for name in CLAMPED:
        constants = clamp_of(name)
        assert constants is not None
        assert clamped_swiglu(*constants) == name
        assert is_gated(name)
    assert clamp_of(clamped_swiglu(1e-3, 1 / 3, 1e30)) == (1e-3, 1 / 3, 1e30)
    h = torch.randn(9, 8)
    assert torch.equal(activate(h, clamped_swiglu(7.0, 1.702, 1.0)), activate(h, "gpt_oss"))
    assert clamp_of("swiglu") is None


def test_kernels_read_the_same_constants_from_a_name() -> None:
    from moesaic.kernels.activations_triton import _constant

    for name in (*CLAMPED, "gpt_oss"):
        assert tuple(_constant(name, place) for place in range(3)) == clamp_of(name)
    assert all(_constant(name, 0) == 0 for name in ACTIVATIONS if name != "gpt_oss")


@pytest.mark.parametrize(
    "name",
    [
        "clamped_swiglu",
        "clamped_swiglu(7)",
        "clamped_swiglu(7.0,1.0,x)",
        "clamped_swiglu(7.0,1.0,0.0,1.0)",
        "tanh",
        "",
        "clamped_swiglu(10.0,1.702,1.05",
        "clamped_swiglu(-7.0,1.0,0.0)",
        "clamped_swiglu(nan,1.0,0.0)",
        "clamped_swiglu(1e400,1.0,0.0)",
        "clamped_swiglu_7.0,1.0,0.0)",
    ],
)
def test_other_names_are_no_activations(name: str) -> None:
    assert not is_gated(name)
    with pytest.raises(ValueError, match=r"activation must be None or one of swiglu.*clamped_swiglu.*, got "):
        check_activation(name, "None or ")


@pytest.mark.parametrize("constants", [(0.0,), (-1.0,), (float("inf"),), (7.0, float("nan"))])
def test_constants_of_a_clamp_are_checked(constants: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="clamped_swiglu takes a positive limit and finite constants"):
        clamped_swiglu(*constants)


def test_no_activation_is_the_identity() -> None:
    h, grad = torch.randn(3, 4), torch.randn(3, 4)
    assert activate(h, NO_ACTIVATION) is h
    assert all(torch.equal(a, b) for a, b in zip(activate_backward(h, grad, NO_ACTIVATION), (h, grad), strict=True))
