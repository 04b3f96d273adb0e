"""Encoding of sparse feature vectors.

h_b = Σ_i x_bi W_i          x (B, n), W (n, m), h (B, m)
"""

from __future__ import annotations

import torch
from torch import Tensor


def encode_features(x: Tensor, weight: Tensor) -> Tensor:
    """Return h = x W (B, m), gathering only the rows of W whose features are present when x is sparse.

    Differentiable in ``weight``, and in a dense ``x``.

    Args:
        x: (B, n), dense, or a ``torch.sparse_csr`` tensor: then the work is O(nnz · m), not O(B · n · m).
        weight: (n, m), of the type of x.

    Raises:
        ValueError: for shapes, layouts or types that do not match.
    """
    check_features(x, weight)
    if x.layout == torch.strided:
        return x @ weight
    return torch.nn.functional.embedding_bag(
        x.col_indices(), weight, x.crow_indices(), mode="sum", per_sample_weights=x.values(), include_last_offset=True
    )


def check_features(x: Tensor, weight: Tensor) -> None:
    """Raise ValueError unless x (B, n) is dense or CSR and fits weight (n, m)."""
    if x.layout not in (torch.strided, torch.sparse_csr):
        raise ValueError(f"x: takes a dense or sparse_csr tensor, got layout {x.layout}")
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[0]:
        raise ValueError(f"x, weight: take (B, n) and (n, m), got {tuple(x.shape)} and {tuple(weight.shape)}")
    if x.dtype != weight.dtype:
        raise ValueError(f"weight: takes the type of x, {x.dtype}, got {weight.dtype}")
