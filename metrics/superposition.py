"""Superposition metrics of expert weights, through the m×m Gram matrix and never an n×n one.

A weight has shape (..., n, m): n features, m hidden dimensions, one expert; leading dimensions run over experts and
models. With C = WᵀW and Ŵ_i = W_i/‖W_i‖, Σ_j (Ŵ_i·W_j)² = Ŵ_iᵀ C Ŵ_i costs O(n·m²) instead of O(n²·m). All arithmetic
is float64, in blocks of features, whatever the dtype of the weight; results are float64, without gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

POLYSEMANTICITY_EPS = 1e-5
MONOSEMANTIC_BELOW = 0.2
DIMENSIONALITY_BINS = 49
DIMENSIONALITY_LINES = {"digon": 1 / 2, "triangle": 2 / 3, "pentagon": 2 / 5}
"""D_i of features that share dimensions as antipodal pairs (2 in 1), triangles (3 in 2) and pentagons (5 in 2)."""

_BLOCK_ELEMENTS = 2**21  # 16 MiB of float64: the few temporaries of one block stay far below a gigabyte
_NEARLY_ALONE = 0.9  # above this D_i, subtracting ‖W_i‖² from Σ_j (Ŵ_i·W_j)² would cancel more than one digit


@dataclass(frozen=True)
class FeatureGeometry:
    """How each feature sits among the others of its expert; every field is float64 of shape (..., n).

    Attributes:
        norm: ‖W_i‖.
        superposition: Σ_{j≠i} (Ŵ_i·W_j)².
        polysemanticity: ‖(Ŵ_i·W_j)_{j≠i}‖ with Ŵ_i = W_i/(1e-5 + ‖W_i‖).
        dimensionality: D_i = ‖W_i‖²/Σ_j (Ŵ_i·W_j)², NaN where ‖W_i‖ = 0.
    """

    norm: Tensor
    superposition: Tensor
    polysemanticity: Tensor
    dimensionality: Tensor

    def monosemantic(self, *, min_norm: float = POLYSEMANTICITY_EPS) -> Tensor:
        """Return polysemanticity < 0.2 and ‖W_i‖ ≥ min_norm, (..., n) bool; see `monosemantic`."""
        return (self.polysemanticity < MONOSEMANTIC_BELOW) & (self.norm >= min_norm)


@torch.no_grad()
def feature_geometry(weight: Tensor) -> FeatureGeometry:
    """Compute every per-feature metric of this module at once: three passes over the weight, 4·n·m² FLOP and a little.

    Σ_{j≠i} (Ŵ_i·W_j)² = Ŵ_iᵀ C Ŵ_i − ‖W_i‖². Where D_i > 0.9 the two terms nearly cancel, and the sum is taken over j
    directly; because Σ_i D_i ≤ m there are at most m/0.9 such features, so this costs O(n·m²) too. (One host sync, to
    count them.)

    Args:
        weight: (..., n, m), floating point.

    Raises:
        ValueError: if ``weight`` is not a floating-point tensor of at least two non-empty dimensions.
    """
    flat = _as_stack(weight)
    n_stack, n_features, n_hidden = flat.shape
    square = flat.new_empty(n_stack, n_features, dtype=torch.float64)
    gram = flat.new_zeros(n_stack, n_hidden, n_hidden, dtype=torch.float64)
    for rows, block in _blocks(flat):
        square[:, rows] = block.square().sum(-1)
        gram.baddbmm_(block.mT, block)
    norm = square.sqrt()
    divisor = torch.where(norm > 0, norm, 1.0)
    total = torch.empty_like(square)
    for rows, block in _blocks(flat):
        unit = block.div_(divisor[:, rows, None])
        total[:, rows] = torch.bmm(unit, gram).mul_(unit).sum(-1)
    others = (total - square).clamp_(min=0.0)
    most = int((square > _NEARLY_ALONE * total).sum(-1).max())
    if most:
        ids = (square / total).nan_to_num_(nan=-1.0).topk(most, dim=-1).indices
        others.scatter_(-1, ids, _sum_over_others(flat, ids, divisor))
    shape = weight.shape[:-1]
    return FeatureGeometry(
        norm=norm.reshape(shape),
        superposition=others.reshape(shape),
        polysemanticity=(others.sqrt() * norm / (POLYSEMANTICITY_EPS + norm)).reshape(shape),
        dimensionality=(square / (square + others)).reshape(shape),
    )


def feature_norms(weight: Tensor) -> Tensor:
    """Return the feature strengths ‖W_i‖₂, (..., n), of a weight (..., n, m); errors as for `feature_geometry`."""
    flat = _as_stack(weight)
    squares = [block.square().sum(-1) for _, block in _blocks(flat)]
    return torch.cat(squares, dim=-1).sqrt().reshape(weight.shape[:-1])


def superposition_score(weight: Tensor) -> Tensor:
    """Return Σ_{j≠i} (Ŵ_i·W_j)², (..., n): how much the other features write onto the direction of feature i.

    Zero for a feature without a direction (W_i = 0). The sum leaves j = i out (one published script keeps it, another
    subtracts 1 instead of ‖W_i‖²). Source: arXiv 2510.23671, after Elhage et al. 2022.

    Args:
        weight: (..., n, m).

    Raises:
        ValueError: as `feature_geometry`.
    """
    return feature_geometry(weight).superposition


def polysemanticity(weight: Tensor) -> Tensor:
    """Return ‖(Ŵ_i·W_j)_{j≠i}‖₂ with Ŵ_i = W_i/(1e-5 + ‖W_i‖), (..., n). Source: arXiv 2510.23671.

    Args:
        weight: (..., n, m).

    Raises:
        ValueError: as `feature_geometry`.
    """
    return feature_geometry(weight).polysemanticity


def monosemantic(weight: Tensor, *, min_norm: float = POLYSEMANTICITY_EPS) -> Tensor:
    """Return whether a feature is monosemantic: polysemanticity < 0.2 and ‖W_i‖ ≥ min_norm, (..., n) bool.

    The definition of arXiv 2510.23671 has no condition on the norm (``min_norm=0``), so it counts features that are
    not there. By default those of zero norm are left out, zero being anything below the 1e-5 that the definition adds
    to norms.

    Args:
        weight: (..., n, m).
        min_norm: smallest ‖W_i‖ that counts.

    Raises:
        ValueError: as `feature_geometry`.
    """
    return feature_geometry(weight).monosemantic(min_norm=min_norm)


def feature_dimensionality(weight: Tensor) -> Tensor:
    """Return D_i = ‖W_i‖²/Σ_j (Ŵ_i·W_j)², (..., n): the share of a hidden dimension that feature i has to itself.

    0 < D_i ≤ 1 and Σ_i D_i ≤ m in each expert; NaN where ‖W_i‖ = 0. Source: Elhage et al. 2022.

    Args:
        weight: (..., n, m).

    Raises:
        ValueError: as `feature_geometry`.
    """
    return feature_geometry(weight).dimensionality


def global_dimensionality(weight: Tensor, presence: Tensor) -> Tensor:
    """Return D_i = Σ_e α_i^(e) D_i^(e), (..., n): the dimensions that a mixture's active experts give to feature i.

    α_i^(e) = #(e active and i present)/#(i present), as `expert_presence` counts it. An expert in which the feature
    has zero norm gives it no dimension; where that holds of every expert that ever sees it, or nothing does, D_i is
    NaN. Source: arXiv 2510.23671.

    Args:
        weight: (..., E, n, m).
        presence: α, (..., E, n), in [0, 1].

    Raises:
        ValueError: if the shapes disagree or ``weight`` is not as `feature_geometry` takes it.
    """
    if weight.ndim < 3 or presence.shape != weight.shape[:-1]:
        raise ValueError(
            f"presence has shape {tuple(presence.shape)}: "
            f"takes (..., E, n) for weight (..., E, n, m) = {tuple(weight.shape)}"
        )
    share = presence.double()
    dimensionality = feature_geometry(weight).dimensionality
    defined = dimensionality.isfinite() & (share > 0)
    summed = torch.where(defined, share * dimensionality, 0.0).sum(-2)
    return torch.where(defined.any(-2), summed, torch.nan)


def features_per_dimension(weight: Tensor, usage: Tensor | None = None) -> Tensor:
    """Return ‖W^e‖_F²/m of each expert, or Σ_e u_e ‖W^e‖_F²/m of the mixture when the experts' usage u is given.

    A feature that is fully represented has norm 1, so ‖W‖_F² counts features. Three choices of u answer three
    questions, and all are reported because no two agree across gates and widths:
      count   u_e = share of the B·k assignments that e gets (`expert_usage`): features per active dimension.
      gate    u_e = (mean gate weight of e over all inputs)/k (`gate_usage`): the p_e of arXiv 2510.23671. For
              normalised gates they sum to 1/k, not 1.
      folded  u_e = w̄_e/E with w̄_e the mean gate weight of e when active (`mean_active_gate`): features per dimension of
              the whole model. As ReLU is homogeneous, w·ReLU(W Wᵀx + b) = ReLU(√w W (√w W)ᵀx + w b): a gate weight w is
              the same as W scaled by √w, its squared norm by w. Models that compute equal functions with different
              gates agree in this one only after folding.
    Counting folded norms by assignments would be ``gate`` again, (count_e/(B k)) w̄_e = (Σ_b w_be)/(B k); so the folded
    variant counts each dimension of the model once.

    Args:
        weight: (..., n, m) without usage, (..., E, n, m) with it.
        usage: u, (..., E), not negative; or None.

    Returns:
        (...): float64.

    Raises:
        ValueError: if the shapes disagree, a usage is negative, or ``weight`` is not as `feature_geometry` takes it.
    """
    if usage is not None:
        if weight.ndim < 3 or usage.shape != weight.shape[:-2]:
            raise ValueError(
                f"usage has shape {tuple(usage.shape)}: "
                f"takes (..., E) for weight (..., E, n, m) = {tuple(weight.shape)}"
            )
        if bool((usage < 0).any()):
            raise ValueError(f"usage has the negative entry {float(usage.min())}: takes numbers >= 0")
    per_expert = feature_norms(weight).square().sum(-1) / weight.shape[-1]
    return per_expert if usage is None else (usage.double() * per_expert).sum(-1)


def dimensionality_histogram(dimensionality: Tensor, mass: Tensor | None = None) -> Tensor:
    """Count features by D_i in 49 equal bins over [0, 1]; `DIMENSIONALITY_LINES` has the values of known geometries.

    With 49 bins, none of 1/2, 2/3, 2/5 and 3/8 is an edge that would split its peak. D = 1 belongs to the last bin, NaN
    to none.

    Args:
        dimensionality: D, (..., n).
        mass: what each feature counts for, (..., n); 1 when None.

    Returns:
        (..., 49) float64.

    Raises:
        ValueError: if the shapes disagree.
    """
    if mass is not None and mass.shape != dimensionality.shape:
        raise ValueError(
            f"mass has shape {tuple(mass.shape)}: takes that of dimensionality, {tuple(dimensionality.shape)}"
        )
    value = dimensionality.double()
    defined = value.isfinite()
    ids = (value.nan_to_num(nan=0.0) * DIMENSIONALITY_BINS).floor().clamp(0, DIMENSIONALITY_BINS - 1).long()
    bins = torch.arange(DIMENSIONALITY_BINS, device=value.device)
    counted = torch.where(defined, torch.ones_like(value) if mass is None else mass.double(), 0.0)
    return torch.stack([torch.where(ids == b, counted, 0.0).sum(-1) for b in bins], dim=-1)


@torch.no_grad()
def balanced_weight(weight: Tensor, decoder: Tensor) -> Tensor:
    """Return the weight that an untied expert is measured by: W̃ = U√Σ, where W Dᵀ = U Σ Vᵀ (singular values).

    An untied expert computes ReLU(x W Dᵀ + b), which leaves W free up to (W G, D G⁻ᵀ): norms and angles of its rows
    mean nothing by themselves. Of all such pairs this one is balanced, W̃ᵀW̃ = D̃ᵀD̃ = Σ; if D = W then W̃W̃ᵀ = WWᵀ,
    and every metric is that of W.

    Args:
        weight: W, (..., n, m).
        decoder: D, (..., n, m).

    Returns:
        (..., n, m) float64.

    Raises:
        ValueError: if the shapes disagree or are not as `feature_geometry` takes them.
    """
    if decoder.shape != weight.shape:
        raise ValueError(f"decoder has shape {tuple(decoder.shape)}: takes that of weight, {tuple(weight.shape)}")
    flat = _as_stack(weight)
    basis, triangle = torch.linalg.qr(flat.double())
    _, other = torch.linalg.qr(_as_stack(decoder).double())
    left, sigma, _ = torch.linalg.svd(triangle @ other.mT)
    balanced = basis @ (left * sigma.sqrt()[:, None, :])
    missing = weight.shape[-1] - balanced.shape[-1]
    return torch.nn.functional.pad(balanced, (0, missing)).reshape(weight.shape)


def _as_stack(weight: Tensor) -> Tensor:
    if weight.ndim < 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise ValueError(
            f"weight has shape {tuple(weight.shape)} and dtype {weight.dtype}: "
            "takes a non-empty floating-point tensor (..., n, m)"
        )
    return weight.detach().reshape(-1, *weight.shape[-2:])


def _blocks(flat: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the features with a float64 copy of their rows."""
    n_stack, n_features, n_hidden = flat.shape
    size = max(1, _BLOCK_ELEMENTS // (n_stack * n_hidden))
    for start in range(0, n_features, size):
        rows = slice(start, min(start + size, n_features))
        yield rows, flat[:, rows].to(torch.float64, copy=True)


def _sum_over_others(flat: Tensor, ids: Tensor, divisor: Tensor) -> Tensor:
    """Return Σ_{j≠i} (Ŵ_i·W_j)² for the few features i in ids (stack, few), term by term."""
    chosen = flat.gather(1, ids[..., None].expand(-1, -1, flat.shape[-1])).double()
    unit = chosen / divisor.gather(-1, ids)[..., None]
    summed = torch.zeros_like(unit[..., 0])
    for rows, block in _blocks(flat):
        products = torch.bmm(unit, block.mT)
        itself = ids[..., None] == torch.arange(rows.start, rows.stop, device=ids.device)
        summed += products.masked_fill_(itself, 0.0).square_().sum(-1)
    return summed
