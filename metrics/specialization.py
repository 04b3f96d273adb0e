"""Whether the inputs that carry an expert's own features are the inputs that the router sends to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Specialization:
    """Share of inputs routed to each expert, (..., E) float64 in [0, 1].

    Attributes:
        unchanged: on the inputs as they are.
        clamped: with the expert's monosemantic features set to 1 in every input; NaN if it has none.
        only: with those features at 1 and all others at 0 (one input: 0 or 1); NaN if it has none.
    """

    unchanged: Tensor
    clamped: Tensor
    only: Tensor


@torch.no_grad()
def expert_specialization(route: Callable[[Tensor], Tensor], x: Tensor, monosemantic: Tensor) -> Specialization:
    """Measure how strongly an expert's monosemantic features pull inputs to that expert.

    share_e(x) = #(inputs b with e among route(x_b))/B, taken for (a) x, (b) x with x_i = 1 for every feature i
    monosemantic in e, (c) x_i = 1 for those and 0 for all others. A specialised expert has (a) < (b) < (c); with
    balanced load (a) is k/E. 2·E + 1 calls of the router.
    Source: arXiv 2510.23671, Table 1, with 8,192 inputs. It leaves the values of (c) open; 1 continues (b).

    Args:
        route: the router: inputs (..., B, n) to expert ids (..., B, k), such as ``lambda x: model.route(x).ids``.
        x: inputs, (B, n) for all models or (..., B, n).
        monosemantic: (..., E, n) bool, as `monosemantic` gives.

    Raises:
        ValueError: if ``x`` is empty, ``monosemantic`` is not a bool mask that fits it, or the router returns
            something else than ids.
    """
    batch = monosemantic.shape[:-2]
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: takes non-empty inputs (..., B, n)")
    if monosemantic.dtype != torch.bool or monosemantic.ndim < 2 or monosemantic.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"monosemantic has shape {tuple(monosemantic.shape)} and dtype {monosemantic.dtype}: "
            f"takes bool (..., E, n) with n = {x.shape[-1]}"
        )
    if x.shape[:-2] not in (torch.Size(), batch):
        raise ValueError(f"x has shape {tuple(x.shape)}: takes (B, n) or {(*batch, 'B', 'n')}, to fit monosemantic")
    inputs = x.expand(*batch, *x.shape[-2:])
    chosen = _ids(route, inputs)
    unchanged, clamped, only = [], [], []
    for expert in range(monosemantic.shape[-2]):
        own = monosemantic[..., expert, None, :]
        has_any = own.any(-1).squeeze(-1)
        unchanged.append(_share(chosen, expert))
        clamped.append(torch.where(has_any, _share(_ids(route, torch.where(own, 1.0, inputs)), expert), torch.nan))
        only.append(torch.where(has_any, _share(_ids(route, own.to(x.dtype)), expert), torch.nan))
    return Specialization(*(torch.stack(shares, dim=-1) for shares in (unchanged, clamped, only)))


def _ids(route: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    ids = route(x)
    if not isinstance(ids, Tensor) or ids.shape[:-1] != x.shape[:-1] or ids.is_floating_point():
        got = (tuple(ids.shape), ids.dtype) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(
            f"route returned {got} for inputs {tuple(x.shape)}: takes a function to integer ids (..., B, k)"
        )
    return ids


def _share(ids: Tensor, expert: int) -> Tensor:
    return (ids == expert).any(-1).double().mean(-1)
