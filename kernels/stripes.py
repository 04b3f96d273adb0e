"""The exact step of a toy model with very many features, in stripes over features: two sweeps and AdamW in them.

    x'_b = [ReLU(h⁰_b D_0ᵀ + b_0)] + Σ_{e ∈ top-k} w_e ReLU(h_be D_eᵀ + b_e),    L = scale · Σ_b Σ_i I_i (x'_bi − x_bi)²

    sweep    loss, dh, dw; a feature that is absent from the batch has its whole gradient then, and is updated
    finish   the features that are present, decoded again: their encoder's gradient needs the finished dh

6·B·k·n·m FLOP and 4 of 6 again for the present features; memory beyond the table and moments is `scratch_bytes`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from moesaic.kernels._accounting import Work, moved, record
from moesaic.kernels._backend import uses_triton
from moesaic.kernels._extras import numba_twin
from moesaic.kernels._threads import in_parts
from moesaic.kernels.feature_state import AdamStep, Assignment, Columns, FeatureShape, Swept

PARTS = 16
"""Sums that the CPU joins in order, whatever its threads."""
PRECISIONS = ("ieee", "tf32x3", "bf16")


def sweep(
    shape: FeatureShape, table: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, h: Tensor, shared_h: Tensor | None,
    assignment: Assignment, columns: Columns, importance: Tensor, scale: float, adam: AdamStep | None,
    *, precision: str = "ieee", stripe: int = 4096, key: int = 0,
) -> Swept:  # fmt: skip
    """Decode all features once; update the rows of those that are absent from the batch, unless ``adam`` is None.

    Args:
        shape: of the model.
        table: (n, P) float32, `FeatureShape.sections`.
        exp_avg: (n, P), Adam's first moment, float32 or bfloat16 (then rounded stochastically).
        exp_avg_sq: (n, P), the second.
        h: (A, m) float32, encodings in the order of ``assignment``.
        shared_h: (B, m_0) float32, or None without a shared expert.
        assignment: which expert decodes which sample, and with what weight.
        columns: the batch.
        importance: (n,) float32, I.
        scale: of the loss, 1/B for a sum over features.
        adam: this step's factors; None computes loss and gradients only.
        precision: of products: ``ieee``, ``tf32x3`` (GPU) or ``bf16`` (operands rounded, float32 sums).
        stripe: features at a time, on a GPU.
        key: of the stochastic rounding, different in each step.
    """
    record("sweep", lambda: _sweep_work(shape, table, exp_avg, h, shared_h, assignment, columns, updates=bool(adam)))
    if uses_triton(table):
        from moesaic.kernels import stripes_triton

        with torch.cuda.device_of(table):
            return stripes_triton.sweep(
                shape, table, exp_avg, exp_avg_sq, h, shared_h, assignment, columns, importance, scale, adam,
                precision=precision, stripe=stripe, key=key,
            )  # fmt: skip
    n, batch, m0 = shape.n_features, assignment.places.shape[0], shape.shared_hidden
    n_places = h.shape[0]
    n_panels = -(-n // numba_twin("stripes_cpu").PANEL)
    bounds = [n_panels * part // PARTS for part in range(PARTS + 1)]
    padded, padded0 = _padded(shape.n_hidden), _padded(m0)
    dh, dh0 = (
        np.zeros((PARTS, n_places, padded), np.float32),
        np.zeros((PARTS, batch if m0 else 0, padded0), np.float32),
    )
    dgates = np.zeros((PARTS, n_places + (batch if m0 else 0), 16), np.float32)
    totals = np.zeros((PARTS, 16), np.float64)
    common = _arguments(
        shape, table, exp_avg, exp_avg_sq, h, shared_h, assignment, columns, importance, scale, adam, precision, key
    )
    empty = np.empty((0, 0), np.float32)
    nowhere = np.empty((0, 0), np.int64)

    def part(number: int) -> None:
        numba_twin("stripes_cpu").sweep(
            bounds[number], bounds[number + 1], False, *common, dh[number], dh0[number], dgates[number], totals[number],
            nowhere, empty, empty, empty,
        )  # fmt: skip

    in_parts(part, PARTS, numba_twin("stripes_cpu").get_num_threads())
    return Swept(
        torch.tensor(scale * totals.sum(), dtype=torch.float64),
        _joined(dh, shape.n_hidden),
        _joined(dgates, 16)[:n_places].sum(1),
        _joined(dh0, m0) if m0 else None,
    )


def finish(
    shape: FeatureShape, table: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, h: Tensor, shared_h: Tensor | None,
    assignment: Assignment, columns: Columns, importance: Tensor, scale: float, adam: AdamStep,
    dh: Tensor, shared_dh: Tensor | None, dlogits: Tensor | None,
    *, precision: str = "ieee", stripe: int = 4096, key: int = 0,
) -> None:  # fmt: skip
    """Update the rows of the features that are present in the batch, with the decoder's and the encoder's gradient.

    Args as `sweep`'s; dh (A, m) and shared_dh (B, m_0) are what it gave, dlogits (B, E) the gradient of the router's
    scores or None.
    """
    record("finish", lambda: _finish_work(shape, table, exp_avg, h, shared_h, assignment, columns, dlogits))
    if uses_triton(table):
        from moesaic.kernels import stripes_triton

        with torch.cuda.device_of(table):
            stripes_triton.finish(
                shape, table, exp_avg, exp_avg_sq, h, shared_h, assignment, columns, importance, scale, adam, dh,
                shared_dh, dlogits, precision=precision, stripe=stripe, key=key,
            )  # fmt: skip
        return
    batch, m0 = assignment.places.shape[0], shape.shared_hidden
    n_panels = -(-columns.features.shape[0] // numba_twin("stripes_cpu").PANEL)
    parts = min(PARTS, n_panels)
    bounds = [n_panels * part // max(1, parts) for part in range(parts + 1)]
    common = _arguments(
        shape, table, exp_avg, exp_avg_sq, h, shared_h, assignment, columns, importance, scale, adam, precision, key
    )
    spread = np.empty((0, _padded(shape.n_hidden)), np.float32), np.empty((0, _padded(m0)), np.float32)
    rest = [
        assignment.places.numpy(), dh.numpy(),
        np.empty((batch, 0), np.float32) if shared_dh is None else shared_dh.numpy(),
        np.empty((batch, 0), np.float32) if dlogits is None else dlogits.numpy(),
    ]  # fmt: skip

    def part(number: int) -> None:
        # Dgates are summed here too, by code that the two sweeps share, and thrown away.
        dgates = np.zeros((h.shape[0] + (batch if m0 else 0), 16), np.float32)
        numba_twin("stripes_cpu").sweep(
            bounds[number], bounds[number + 1], True, *common, *spread, dgates, np.zeros(16), *rest
        )

    in_parts(part, parts, numba_twin("stripes_cpu").get_num_threads())


def _sweep_work(
    shape: FeatureShape, table: Tensor, exp_avg: Tensor, h: Tensor, shared_h: Tensor | None, assignment: Assignment,
    columns: Columns, *, updates: bool,
) -> tuple[int, Work]:  # fmt: skip
    """H Dᵀ, G D and, if it updates, Gᵀ H. The rows are read, and those of absent features written, with their moments.

    What panels and blocks pad, and what `finish` multiplies again, is not known from here.
    """
    n, batch = table.shape[0], assignment.places.shape[0]
    products = 2 * (3 if updates else 2) * n

    def flops(places: int) -> int:
        return products * (places * shape.n_hidden + batch * shape.shared_hidden)

    absent = n - columns.features.shape[0] if updates else 0
    moves = moved(table) + absent * shape.stride * (4 + 4 * exp_avg.element_size()) + 4 * n
    moves += 2 * moved(h, shared_h) + moved(*vars(columns).values()) + moved(*vars(assignment).values()) + 4 * len(h)
    return flops(h.shape[0]), Work(None, flops(batch * shape.n_experts), moves)


def _finish_work(
    shape: FeatureShape, table: Tensor, exp_avg: Tensor, h: Tensor, shared_h: Tensor | None, assignment: Assignment,
    columns: Columns, dlogits: Tensor | None,
) -> tuple[int, Work]:  # fmt: skip
    """Xᵀ dH and Xᵀ dS of the present features, whose rows are read and written with their moments."""
    routed = 0 if dlogits is None else dlogits.shape[1]

    def flops(slots: int) -> int:
        return 2 * columns.values.shape[0] * (slots * shape.n_hidden + shape.shared_hidden + routed)

    moves = columns.features.shape[0] * shape.stride * (8 + 4 * exp_avg.element_size())
    moves += 2 * moved(h, shared_h) + moved(*vars(columns).values()) + moved(*vars(assignment).values(), dlogits)
    return flops(assignment.places.shape[1]), Work(None, flops(shape.n_experts), moves)


def _padded(width: int) -> int:
    return -(-width // 16) * 16


def _joined(parts: Any, width: int) -> Tensor:
    """Add up the parts, and the sums of a line if ``width`` columns go into it several times."""
    joined = parts.sum(0, dtype=np.float64)
    if width in (1, 2, 4, 8):
        joined = joined.reshape(joined.shape[0], 16 // width, width).sum(1)
    return torch.from_numpy(joined[:, :width].astype(np.float32))


def _arguments(
    shape: FeatureShape, table: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, h: Tensor, shared_h: Tensor | None,
    assignment: Assignment, columns: Columns, importance: Tensor, scale: float, adam: AdamStep | None, precision: str,
    key: int,
) -> list[Any]:  # fmt: skip
    batch = assignment.places.shape[0]
    rounds = precision == "bf16"
    wide, shared = h.contiguous(), torch.empty(batch, 0) if shared_h is None else shared_h.contiguous()
    if rounds:
        wide, shared = wide.bfloat16().float(), shared.bfloat16().float()
    return [
        columns.features.numpy(), columns.starts.numpy(), columns.samples.numpy(), columns.values.numpy(),
        table.numpy(), *moments(exp_avg, exp_avg_sq), np.uint32(key), first_columns(shape),
        importance.numpy(), np.float32(2 * scale), factors(adam), adam is not None, rounds,
        wide.numpy(), shared.numpy(), assignment.offsets.numpy(), assignment.samples.numpy(), assignment.gates.numpy(),
        np.arange(batch), np.ones(batch, np.float32),
    ]  # fmt: skip


def moments(exp_avg: Tensor, exp_avg_sq: Tensor) -> list[Any]:
    """Return the moments as float32 arrays and as bfloat16 bits; those that they are not are empty."""
    wide, narrow = np.empty((0, 0), np.float32), np.empty((0, 0), np.uint16)
    if exp_avg.dtype == torch.float32:
        return [exp_avg.numpy(), exp_avg_sq.numpy(), narrow, narrow]
    return [wide, wide, *(tensor.view(torch.uint16).numpy() for tensor in (exp_avg, exp_avg_sq))]


def first_columns(shape: FeatureShape) -> Any:
    """Return the first columns of encoder, decoder, their shared ones, bias and router; −1: there is none."""
    first = {name: column for name, (column, _) in shape.sections.items()}
    names = ("weight", "decoder", "shared_weight", "shared_decoder", "bias", "router")
    if shape.tied:
        first |= {"decoder": first["weight"], "shared_decoder": first.get("shared_weight", -1)}
    return np.array([first.get(name, -1) for name in names], np.int64)


def factors(adam: AdamStep | None) -> Any:
    """Return the numbers of a step of AdamW in float64."""
    if adam is None:
        return np.zeros(6)
    return np.array([adam.beta1, adam.beta2, adam.eps, adam.keep, adam.step_size, adam.root])
