"""The expert MLP: every token through its k experts only, and their outputs summed by gate weight.

    h = x U_e + b_e        U_e: (D, F), or (D, 2F) for gated activations
    a = act(h)             gated: act(gate, up) of the two halves of h (interleaved: of even and odd columns)
    y = Σ_j w_j (a V_e + c_e),  e = ids_j

E experts, model width D, expert width F. Only the k chosen experts of a token are computed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moesaic.kernels.activations import ACTIVATIONS as ACTIVATIONS
from moesaic.kernels.activations import GATED as GATED
from moesaic.kernels.activations import activate as activate
from moesaic.kernels.activations import check_activation, check_interleaved, is_gated
from moesaic.kernels.activations import clamped_swiglu as clamped_swiglu
from moesaic.kernels.dispatch import combine, group_by_expert
from moesaic.kernels.expert_mlp_op import expert_mlp_op
from moesaic.kernels.grouped_matmul import autocast, check_devices, check_precision, check_product, grouped_matmul

Activation = Callable[[Tensor], Tensor]


def _check(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    ids: Tensor,
    activation: str | Activation,
    interleaved: bool,
    precision: str,
) -> None:
    check_precision(precision)
    if gate_up.ndim != 3:
        raise ValueError(f"gate_up must have shape (E, D, 2F) or (E, D, F), got {tuple(gate_up.shape)}")
    n_experts, d_model, width = gate_up.shape
    if x.ndim < 1 or x.shape[-1] != d_model:
        raise ValueError(f"x must have shape (..., {d_model}) to match gate_up, got {tuple(x.shape)}")
    gated = False
    if isinstance(activation, str):
        check_activation(activation, "a function or ")
        gated = is_gated(activation)
        if gated and width % 2:
            raise ValueError(f"gate_up must have an even last dimension for {activation!r}, got {width}")
    check_interleaved(interleaved, gated, activation)
    d_ff = width // 2 if gated else width
    fits = down.ndim == 3 and down.shape[0] == n_experts and (not isinstance(activation, str) or down.shape[1] == d_ff)
    if not fits:
        raise ValueError(f"down must have shape ({n_experts}, {d_ff}, N), got {tuple(down.shape)}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"ids must be integers, got {ids.dtype}")
    if not weights.is_floating_point():
        raise ValueError(f"weights must be floating point, got {weights.dtype}")
    if ids.shape != weights.shape or ids.ndim < 1 or ids.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"weights and ids must have shape ({', '.join(map(str, (*x.shape[:-1], 'k')))}), "
            f"got {tuple(weights.shape)} and {tuple(ids.shape)}"
        )


def expert_mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    ids: Tensor,
    *,
    activation: str | Activation = "swiglu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    interleaved: bool = False,
    post_norm: Activation | None = None,
    precision: str = "ieee",
    sparse_grad: bool = False,
) -> Tensor:
    """Send every token through its k experts: `y = Σ_j w_j (act(x U_e + b_e) V_e + c_e)` with `e = ids_j`.

    Only the k chosen experts are computed; ids outside 0…E−1 are skipped, whatever their weight. The sum over j is
    float32 (float64 for float64). Differentiable in everything but ids, twice too; same inputs give the same bits,
    forward and backward. On a GPU nothing is read back to the host, but by `sparse_grad` and for float64, which
    PyTorch's products compute.

    With a named activation and no `post_norm` it is one op, which keeps for its gradient, beside its inputs, the
    pre-activation and the order of the choices: `T·k·(width·b + 16) + 8·(E + 1)` bytes, width 2F or F, b bytes per
    number. While it runs forward `T·k·(F + N)·b + 8·T·k` more, beside its result; backward `T·k·(width + F + D)·b +
    21·T·k` and 4 bytes per choice and block of columns, beside the gradients, and float32 copies of the upstream
    gradient and of down_bias where there is one. Otherwise it is one op per step, which keep what each needs.

    Args:
        x: (..., D).
        gate_up: (E, D, 2F) for gated activations (gate, then up; alternating columns if `interleaved`), else (E, D, F).
            Any strides: pass `w.transpose(1, 2)` for weights stored as (E, 2F, D).
        down: (E, F, N).
        weights: (..., k) gate weights.
        ids: (..., k) expert ids.
        activation: `swiglu`, `geglu` (exact GELU), `geglu_tanh`, `reglu`, `gpt_oss`; `silu`, `gelu`, `gelu_tanh`,
            `relu`, `relu2`; a name that `clamped_swiglu` returns; or a function of the whole pre-activation, row by
            row.
        gate_up_bias: (E, 2F) or (E, F).
        down_bias: (E, N).
        interleaved: gate and up columns alternate.
        post_norm: a function of every expert's output rows (R, N), before the gate weights.
        precision: of float32 products on a GPU: `"ieee"`, `"tf32x3"` (three TF32 products, error as of float32) or
            `"tf32"` (10 bits of fraction). A CPU computes float32 whatever is asked.
        sparse_grad: gradients of gate_up and down are sparse tensors of the experts that have tokens, for E far above
            T·k. `torch.optim.SGD`, `Adagrad` and `SparseAdam` take them. One number is read back to the host, and
            the op can be differentiated once.

    Returns:
        (..., N) in the dtype of the matrix products.

    Raises:
        ValueError: naming the argument, its value and what it takes.
    """
    _check(x, gate_up, down, weights, ids, activation, interleaved, precision)
    if not isinstance(activation, str) or post_norm is not None:
        if sparse_grad:
            raise ValueError("sparse_grad takes an activation by name and no post_norm")
        return composed(
            x, gate_up, down, weights, ids, activation=activation, gate_up_bias=gate_up_bias, down_bias=down_bias,
            interleaved=interleaved, post_norm=post_norm, precision=precision,
        )  # fmt: skip
    if sparse_grad and torch.compiler.is_compiling():
        raise ValueError("sparse_grad asks the device how many experts were touched, which torch.compile cannot trace")
    x, gate_up, down, gate_up_bias, down_bias = autocast(x, gate_up, down, gate_up_bias, down_bias)
    check_product(x, gate_up, gate_up_bias, "gate_up")
    check_product(x, down, down_bias, "down")
    check_devices(
        x, gate_up=gate_up, down=down, weights=weights, ids=ids, gate_up_bias=gate_up_bias, down_bias=down_bias
    )
    n_tokens = x.shape[:-1].numel()
    shape = (n_tokens, ids.shape[-1])
    y = expert_mlp_op(
        x.reshape(n_tokens, x.shape[-1]), gate_up, down, weights.reshape(shape), ids.reshape(shape), gate_up_bias,
        down_bias, activation, interleaved, precision, sparse_grad,
    )  # fmt: skip
    return y.view(*x.shape[:-1], y.shape[1])


def composed(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    ids: Tensor,
    *,
    activation: str | Activation,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    interleaved: bool = False,
    post_norm: Activation | None = None,
    precision: str = "ieee",
) -> Tensor:
    """`expert_mlp` of one op per step, each differentiable twice, which keeps every intermediate."""
    grouping = group_by_expert(ids, gate_up.shape[0])
    gather = grouping.permutation // ids.shape[-1] if ids.shape[-1] else grouping.permutation
    tokens = x.reshape(-1, x.shape[-1])
    offsets = grouping.offsets
    h = grouped_matmul(tokens, gate_up, offsets, bias=gate_up_bias, gather=gather, precision=precision)
    a = activate(h, activation, interleaved) if isinstance(activation, str) else activation(h)
    rows = grouped_matmul(a, down, offsets, bias=down_bias, precision=precision)
    if post_norm is not None:
        # A norm of a skipped choice's zeros may be NaN, which times a weight of 0 is NaN still.
        skipped = torch.arange(rows.shape[0], device=rows.device) >= offsets[-1]
        rows = post_norm(rows).masked_fill(skipped.unsqueeze(1), 0.0)
    return combine(rows, weights, grouping)
