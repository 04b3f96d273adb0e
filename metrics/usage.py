"""How much each expert is used, and which features the used experts represent.

Routing is given as expert ids (..., B, k) and gate weights (..., B, k) of B inputs, k distinct experts each; leading
dimensions run over models. Sums are float64 in a fixed order, so equal inputs give equal bits on every device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

REPRESENTED_ABOVE = 0.5

_BLOCK_ELEMENTS = 2**17  # temporaries of 1 MiB stay in cache


def expert_usage(ids: Tensor, n_experts: int) -> Tensor:
    """Return the share of the B·k assignments that each expert gets, (..., E) float64, summing to 1.

    Args:
        ids: (..., B, k) integers from 0 to E − 1.
        n_experts: E.

    Raises:
        ValueError: if ``ids`` is empty, not of that shape and kind, or out of range.
    """
    _check_ids(ids, n_experts)
    return _counts(ids, n_experts).double() / (ids.shape[-1] * ids.shape[-2])


def gate_usage(weights: Tensor, ids: Tensor, n_experts: int) -> Tensor:
    """Return p_e = (mean gate weight of e over all inputs, 0 where inactive)/k, (..., E) float64.

    Sums to 1/k for normalised gates. Source: arXiv 2510.23671.

    Args:
        weights: gate weights, (..., B, k).
        ids: (..., B, k) integers from 0 to E − 1.
        n_experts: E.

    Raises:
        ValueError: as `expert_usage`, or if the two shapes disagree.
    """
    return _gate_sums(weights, ids, n_experts) / (ids.shape[-1] * ids.shape[-2])


def mean_active_gate(weights: Tensor, ids: Tensor, n_experts: int) -> Tensor:
    """Return w̄_e, an expert's mean gate weight over the inputs it is active on, (..., E) float64; 0 for a dead expert.

    w̄_e is what folds a gate into weights: w·ReLU(W h + b) is the same expert with W scaled by √w (see
    `features_per_dimension`).

    Args:
        weights: gate weights, (..., B, k).
        ids: (..., B, k) integers from 0 to E − 1.
        n_experts: E.

    Raises:
        ValueError: as `gate_usage`.
    """
    return _gate_sums(weights, ids, n_experts) / _counts(ids, n_experts).clamp(min=1)


def dense_gates(weights: Tensor, ids: Tensor, n_experts: int) -> Tensor:
    """Return the gate weights as a (..., B, E) float64 matrix, 0 where an expert is inactive.

    Args:
        weights: gate weights, (..., B, k).
        ids: (..., B, k) distinct integers from 0 to E − 1.
        n_experts: E.

    Raises:
        ValueError: as `gate_usage`.
    """
    _check_routing(weights, ids, n_experts)
    return weights.new_zeros(*ids.shape[:-1], n_experts, dtype=torch.float64).scatter(
        -1, ids.long(), weights.detach().double()
    )


def effective_experts(usage: Tensor) -> Tensor:
    """Return exp(H(usage)), (...): the number of equally used experts with the same entropy H = −Σ_e u_e ln u_e.

    Args:
        usage: (..., E) shares or counts, not negative; normalised here.

    Raises:
        ValueError: if ``usage`` is empty, negative, not finite, or sums to zero.
    """
    share = _shares(usage)
    entropy: Tensor = torch.special.entr(share).sum(-1)
    return entropy.exp()


def dead_experts(usage: Tensor) -> Tensor:
    """Return the number of experts with usage 0, (...) int64; arguments and errors as for `effective_experts`."""
    return (_shares(usage) == 0).sum(-1)


def load_imbalance(usage: Tensor) -> Tensor:
    """Return max_e u_e / mean_e u_e, (...): from 1 (balanced) to E; arguments and errors as for `effective_experts`."""
    return _shares(usage).amax(-1) * usage.shape[-1]


def expert_presence(x: Tensor, ids: Tensor, n_experts: int) -> Tensor:
    """Return α_i^(e) = #(e active and i present)/#(i present), (..., E, n) float64; NaN for a feature never present.

    Args:
        x: inputs, (B, n) for all models or (..., B, n); present is x ≠ 0.
        ids: (..., B, k) integers from 0 to E − 1.
        n_experts: E.

    Raises:
        ValueError: as `expert_usage`, or if the inputs do not fit the ids.
    """
    active = dense_gates(torch.ones_like(ids, dtype=torch.float64), ids, n_experts)
    _check_inputs(x, ids.shape[:-1])
    present = (x != 0).double()
    return (active.mT @ present) / present.sum(-2, keepdim=True)


@dataclass(frozen=True)
class Representation:
    """Which present features the active experts represent on a batch of inputs; all float64.

    Attributes:
        present: #(i present), (..., n).
        represented: #(i present and represented), (..., n).
        carried: c_i^(e), (..., E, n): how many of feature i's represented presences expert e carries, shared by
            contribution.
    """

    present: Tensor
    represented: Tensor
    carried: Tensor

    @property
    def share(self) -> Tensor:
        """Represented share of all presences, (...); NaN if nothing is present."""
        return self.represented.sum(-1) / self.present.sum(-1)

    @property
    def dead_features(self) -> Tensor:
        """Number of features that are present in the batch and never represented, (...) int64."""
        return ((self.present > 0) & (self.represented == 0)).sum(-1)

    def mean(self, values: Tensor) -> Tensor:
        """Return Σ c_i^(e) v_i^(e)/Σ c_i^(e), (...), of v (..., E, n): the mean over represented presences, or NaN."""
        return torch.where(self.carried > 0, self.carried * values, 0.0).sum((-2, -1)) / self.carried.sum((-2, -1))


@torch.no_grad()
def represented_features(norms: Tensor, gates: Tensor, x: Tensor) -> Representation:
    """Find the features that are represented where they are present: those with folded squared norm above ½.

    The experts active on input b are, with their gate weights folded in, one matrix [√w_be W^e]_e, whose rows have
    squared norm N_bi = Σ_e w_be ‖W_i^e‖². Feature i is represented on b if x_bi ≠ 0 and N_bi > ½, and expert e
    carries the share w_be ‖W_i^e‖²/N_bi of it: c_i^(e) = Σ_b [represented] w_be ‖W_i^e‖²/N_bi. At k = 1 that is w
    ‖W_i^e‖² > ½ in the active expert. (A threshold on each expert alone would call k experts that represent a feature
    together, each with gate weight 1/k, k failures.)

    Args:
        norms: ‖W_i^e‖, (..., E, n), from `feature_norms`.
        gates: (..., B, E) from `dense_gates`; an always-active shared expert is one more column of ones.
        x: inputs, (B, n) for all models or (..., B, n).

    Raises:
        ValueError: if the shapes disagree.
    """
    if norms.ndim < 2 or gates.ndim < 2 or gates.shape[-1] != norms.shape[-2] or gates.shape[:-2] != norms.shape[:-2]:
        raise ValueError(
            f"gates has shape {tuple(gates.shape)}: takes (..., B, E) for norms (..., E, n) = {tuple(norms.shape)}"
        )
    _check_inputs(x, gates.shape[:-1])
    if x.shape[-1] != norms.shape[-1]:
        raise ValueError(f"x has shape {tuple(x.shape)}: takes n = {norms.shape[-1]} features, as norms has")
    square = norms.double().square()
    present = torch.zeros_like(square[..., 0, :])
    represented = torch.zeros_like(present)
    carried = torch.zeros_like(square)
    size = max(1, _BLOCK_ELEMENTS // max(1, present.numel()))
    for start in range(0, x.shape[-2], size):
        gate = gates[..., start : start + size, :].double()
        here = x[..., start : start + size, :] != 0
        gain = gate @ square
        seen = here & (gain > REPRESENTED_ABOVE)
        present += here.sum(-2)
        represented += seen.sum(-2)
        carried += square * (gate.mT @ torch.where(seen, 1.0 / gain, 0.0))
    return Representation(present=present, represented=represented, carried=carried)


def _check_ids(ids: Tensor, n_experts: int) -> None:
    if ids.ndim < 2 or ids.numel() == 0 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"ids has shape {tuple(ids.shape)} and dtype {ids.dtype}: takes non-empty integers (..., B, k)"
        )
    low, high = (int(v) for v in ids.aminmax())
    if low < 0 or high >= n_experts:
        raise ValueError(f"ids has values from {low} to {high}: takes 0 to n_experts - 1 = {n_experts - 1}")


def _check_routing(weights: Tensor, ids: Tensor, n_experts: int) -> None:
    _check_ids(ids, n_experts)
    if weights.shape != ids.shape:
        raise ValueError(f"weights has shape {tuple(weights.shape)}: takes that of ids, {tuple(ids.shape)}")


def _check_inputs(x: Tensor, batch: torch.Size) -> None:
    if x.ndim < 2 or x.shape[-2] != batch[-1] or x.shape[:-2] not in (torch.Size(), batch[:-1]):
        raise ValueError(f"x has shape {tuple(x.shape)}: takes (B, n) or (..., B, n) with (..., B) = {tuple(batch)}")


def _shares(usage: Tensor) -> Tensor:
    if usage.ndim < 1 or usage.numel() == 0:
        raise ValueError(f"usage has shape {tuple(usage.shape)}: takes a non-empty (..., E)")
    value = usage.detach().double()
    total = value.sum(-1, keepdim=True)
    if not bool(((value >= 0).all(-1, keepdim=True) & (total > 0) & total.isfinite()).all()):
        raise ValueError(
            f"usage={usage.tolist() if usage.numel() <= 16 else '...'}: takes finite numbers >= 0 with a sum > 0"
        )
    return value / total


def _keys(ids: Tensor, n_experts: int) -> Tensor:
    """Number the experts of all models consecutively: (models · B · k) keys from 0 to models · E − 1."""
    flat = ids.reshape(-1, ids.shape[-2] * ids.shape[-1]).long()
    return (flat + n_experts * torch.arange(flat.shape[0], device=ids.device)[:, None]).flatten()


def _counts(ids: Tensor, n_experts: int) -> Tensor:
    batch = ids.shape[:-2]
    return torch.bincount(_keys(ids, n_experts), minlength=batch.numel() * n_experts).reshape(*batch, n_experts)


def _gate_sums(weights: Tensor, ids: Tensor, n_experts: int) -> Tensor:
    """Return Σ_b w_be, (..., E): sorted and summed segment by segment, because atomic adds have no fixed order."""
    _check_routing(weights, ids, n_experts)
    order = torch.argsort(_keys(ids, n_experts), stable=True)
    counts = _counts(ids, n_experts)
    values = weights.detach().double().flatten()[order]
    return torch.segment_reduce(values, "sum", lengths=counts.flatten(), initial=0.0).reshape(counts.shape)
