"""Values and slopes of the activations, against float64 formulas and autograd."""

from __future__ import annotations

import pytest
import torch

from moesaic.kernels import reference
from moesaic.kernels.activations import ACTIVATIONS, GATED, NO_ACTIVATION, activate, activate_backward

KINDS = [(name, False) for name in ACTIVATIONS] + [(name, True) for name in GATED]


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


def test_no_activation_is_the_identity() -> None:
    h, grad = torch.randn(3, 4), torch.randn(3, 4)
    assert activate(h, NO_ACTIVATION) is h
    assert all(torch.equal(a, b) for a, b in zip(activate_backward(h, grad, NO_ACTIVATION), (h, grad), strict=True))
