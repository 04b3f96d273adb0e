"""The sampled step of a toy model with very many features: some thousand rows of its table, and nothing else.

    L̂ = scale · (Σ_{i ∈ N} d_i I_i Σ_b x'_bi² + Σ_{(b, i) active} I_i (x_bi² − 2 x_bi x'_bi)),    E L̂ = L

N are the features drawn, d_i the sizes of their strata; x' = [y_0] + Σ_e w_e ReLU(h_e D_eᵀ + b_e). PyTorch's products
on rows that are gathered first, on any device; every sum runs in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.kernels.encode_features import gather_rows
from moesaic.kernels.feature_route import Route
from moesaic.kernels.feature_state import AdamStep, FeatureShape
from moesaic.kernels.feature_training import FeatureState, FeatureTraining
from moesaic.kernels.grouped_matmul import grouped_matmul


@dataclass(frozen=True)
class _Batch:
    """A sparse batch on the gathered rows: entry a is feature rows[a] of sample owner[a], in order of samples."""

    starts: Tensor
    owner: Tensor
    rows: Tensor
    values: Tensor


@dataclass
class _Decoder:
    """One expert group's part of the decoding: h (A, m), D (E, T, m), b (E, T), and where the samples are.

    experts, places (nnz, k): of each entry's choices; dh (A, m) and dgates (A,) collect gradients.
    """

    h: Tensor
    weight: Tensor
    bias: Tensor
    gates: Tensor
    offsets: Tensor
    samples: Tensor
    ids: Tensor
    places: Tensor
    dh: Tensor
    dgates: Tensor

    @classmethod
    def of(
        cls, h: Tensor, weight: Tensor, bias: Tensor, gates: Tensor, offsets: Tensor, samples: Tensor, ids: Tensor,
        places: Tensor,
    ) -> _Decoder:  # fmt: skip
        """Return it without gradients yet."""
        return cls(h, weight, bias, gates, offsets, samples, ids, places, torch.zeros_like(h), torch.zeros_like(gates))

    def all_of(self, chosen: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Return z (A, R) of the chosen rows, and the leaves h, D (R, E, m), b (E, R) of its graph."""
        h = self.h.detach().requires_grad_()
        weight = self.weight[:, chosen].movedim(0, 1).contiguous().requires_grad_()
        bias = self.bias[:, chosen].contiguous().requires_grad_()
        if self.weight.shape[0] == 1:
            return torch.addmm(bias[0], h, weight[:, 0].T), (h, weight, bias)
        return grouped_matmul(h, weight.permute(1, 2, 0), self.offsets, bias=bias), (h, weight, bias)

    def pairs(self, batch: _Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return experts, places and z of the entries' choices, (nnz, k) each."""
        experts, places = self.ids[batch.owner], self.places[batch.owner]
        rows = batch.rows[:, None]
        z = (self.h[places] * self.weight[experts, rows]).sum(-1) + self.bias[experts, rows]
        return experts, places, z


def sampled_step(
    state: FeatureState, x: Tensor, training: FeatureTraining, negatives: Tensor, sizes: Tensor
) -> tuple[Tensor, Tensor]:
    """Train one step in place on the rows of ``negatives`` (R,), of weights ``sizes``, and of the features in x.

    Returns:
        The unbiased estimate of the batch's loss, and the load-balance term, float64 scalars.
    """
    shape, batch_size = state.shape, x.shape[0]
    starts, entries = x.crow_indices().long(), x.col_indices().long()
    touched = torch.cat([negatives, entries]).unique()
    rows, avg, sq = state.table[touched], state.exp_avg[touched], state.exp_avg_sq[touched]
    state.catch_up(rows, avg, sq, state.seen[touched], training)
    owner = torch.repeat_interleave(torch.arange(batch_size, device=x.device), starts.diff())
    batch = _Batch(starts, owner, torch.searchsorted(touched, entries), x.values())
    views = {name: view.movedim(1, 0) for name, view in shape.rows(rows).items() if not name.startswith("shared")}
    shared = {name: view for name, view in shape.rows(rows).items() if name.startswith("shared")}

    logits = None
    if shape.routed:
        logits = gather_rows(starts, batch.rows, batch.values, views["router"].T.unsqueeze(0), None)[:, 0]
        logits.requires_grad_()
    route = Route.of(logits, batch_size, shape, training)
    ids, places, assigned = route.ids, route.assignment.places, route.assignment
    h = gather_rows(starts, batch.rows, batch.values, views["weight"], ids).reshape(-1, shape.n_hidden)
    order = torch.empty_like(assigned.samples)
    order[places.reshape(-1)] = torch.arange(order.shape[0], device=x.device)
    decode = views.get("decoder", views["weight"])
    gates, offsets, samples = assigned.gates, assigned.offsets, assigned.samples
    decoders = [_Decoder.of(h[order], decode, views["bias"], gates, offsets, samples, ids, places)]
    if shape.shared_hidden:
        line = torch.arange(batch_size, device=x.device)
        encoder = shared["shared_weight"].unsqueeze(0)
        decode = shared["shared_decoder"].unsqueeze(0) if "shared_decoder" in shared else encoder
        h = gather_rows(starts, batch.rows, batch.values, encoder, None)[:, 0]
        ones, ends, first = torch.ones_like(h[:, 0]), torch.tensor([0, batch_size]).to(line), torch.zeros_like(line)
        decoders.append(
            _Decoder.of(h, decode, shared["shared_bias"].T, ones, ends, line, first[:, None], line[:, None])
        )

    grad = torch.zeros_like(rows)
    at = torch.searchsorted(touched, negatives)
    importance = training.importance[touched]
    loss = _dense_part(decoders, shape, grad, at, importance[at] * sizes, training.scale)
    slopes = _active_part(decoders, batch, importance, training.scale)
    loss = loss + slopes.loss
    dlogits = route.backward(decoders[0].dgates)
    _encoder_part(decoders, batch, slopes, shape, grad, dlogits)
    _update(state, training, touched, rows, avg, sq, grad)
    return loss, route.balance.detach().double()


def _dense_part(
    decoders: list[_Decoder], shape: FeatureShape, grad: Tensor, at: Tensor, weights: Tensor, scale: float
) -> Tensor:
    """Σ_i d_i I_i Σ_b x'_bi² over the drawn rows, its gradients of decoders and biases added to ``grad``."""
    decoded = [decoder.all_of(at) for decoder in decoders]
    outputs = [torch.relu(z.detach()) for z, _ in decoded]
    out = torch.zeros(decoders[0].places.shape[0], at.shape[0], device=at.device)
    for decoder, y in zip(decoders, outputs, strict=True):
        weighted = y * decoder.gates[:, None]
        for slot in range(decoder.places.shape[1]):
            out += weighted[decoder.places[:, slot]]
    residual = out * (2 * scale * weights)
    for number, (decoder, y, (z, leaves)) in enumerate(zip(decoders, outputs, decoded, strict=True)):
        mine = residual[decoder.samples]
        decoder.dgates += (mine * y).sum(1)
        slope = mine * decoder.gates[:, None] * (y > 0)
        dh, dweight, dbias = torch.autograd.grad(z, leaves, slope)
        decoder.dh += dh
        section, bias = _sections(shape, grad, number)
        section[at] += dweight
        bias[at] += dbias.T
    return scale * (out.square().sum(0, dtype=torch.float64) * weights).sum()


@dataclass(frozen=True)
class _Slopes:
    """Of the active entries: their part of the loss, and per decoder the slopes (nnz, k), experts and places."""

    loss: Tensor
    by_decoder: list[tuple[Tensor, Tensor, Tensor]]


def _active_part(decoders: list[_Decoder], batch: _Batch, importance: Tensor, scale: float) -> _Slopes:
    """Σ I (x² − 2 x x') over the active entries, and its gradients of h and gates."""
    found = [decoder.pairs(batch) for decoder in decoders]
    out = torch.zeros_like(batch.values)
    for decoder, (_, places, z) in zip(decoders, found, strict=True):
        out += (torch.relu(z) * decoder.gates[places]).sum(1)
    weights = importance[batch.rows]
    error = batch.values * (batch.values - 2 * out)
    loss = scale * (weights.double() * error.double()).sum()
    residual = (-2 * scale * weights * batch.values)[:, None]
    line = torch.arange(batch.rows.shape[0], device=out.device)
    by_decoder = []
    for decoder, (experts, places, z) in zip(decoders, found, strict=True):
        slope = residual * decoder.gates[places] * (z > 0)
        by_decoder.append((slope, experts, places))
        owed = gather_rows(
            batch.starts, line, torch.ones_like(batch.values), (residual * torch.relu(z)).unsqueeze(0), None
        )
        decoder.dgates[decoder.places.reshape(-1)] += owed.reshape(-1)
        for slot in range(z.shape[1]):
            dh = gather_rows(
                batch.starts, batch.rows, slope[:, slot].contiguous(), decoder.weight, decoder.ids[:, slot : slot + 1]
            )
            decoder.dh[decoder.places[:, slot]] += dh[:, 0]
    return _Slopes(loss, by_decoder)


def _encoder_part(
    decoders: list[_Decoder], batch: _Batch, slopes: _Slopes, shape: FeatureShape, grad: Tensor, dlogits: Tensor | None
) -> None:
    """Add to ``grad`` what the active entries owe: decoders and biases by their slopes, encoders by dh, the router."""
    views = shape.rows(grad)
    for number, (decoder, (slope, experts, places)) in enumerate(zip(decoders, slopes.by_decoder, strict=True)):
        k, (decode, bias) = slope.shape[1], _sections(shape, grad, number)
        encode = views["shared_weight"].unsqueeze(1) if number else views["weight"]
        n_experts = encode.shape[1]
        # A segment for each (feature, expert) that meets, of its entries in the order of samples.
        key = (batch.rows[:, None] * n_experts + experts).reshape(-1)
        ordered, order = torch.sort(key, stable=True)
        meets, counts = torch.unique_consecutive(ordered, return_counts=True)
        bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        place, feature, expert = places.reshape(-1)[order], meets // n_experts, meets % n_experts
        g, x = slope.reshape(-1)[order], batch.values.repeat_interleave(k)[order]
        decode[feature, expert] += gather_rows(bounds, place, g, decoder.h.unsqueeze(0), None)[:, 0]
        encode[feature, expert] += gather_rows(bounds, place, x, decoder.dh.unsqueeze(0), None)[:, 0]
        ones = decoder.h.new_ones(1, decoder.h.shape[0], 1)
        bias[feature, expert] += gather_rows(bounds, place, g, ones, None)[:, 0, 0]
    if dlogits is not None:
        ordered, order = torch.sort(batch.rows, stable=True)
        feature, counts = torch.unique_consecutive(ordered, return_counts=True)
        bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        router = gather_rows(bounds, batch.owner[order], batch.values[order], dlogits.unsqueeze(0), None)
        views["router"][feature] = router[:, 0]


def _sections(shape: FeatureShape, grad: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Return the decoder's part (T, E, m) of the gradient and the biases' (T, E): the experts', or the shared one's."""
    views = shape.rows(grad)
    if number == 0:
        return views.get("decoder", views["weight"]), views["bias"]
    return views.get("shared_decoder", views["shared_weight"]).unsqueeze(1), views["shared_bias"]


def _update(
    state: FeatureState, training: FeatureTraining, touched: Tensor, rows: Tensor, avg: Tensor, sq: Tensor, grad: Tensor
) -> None:
    """AdamW on the gathered rows, which then go back."""
    adam = AdamStep.at(
        state.step, lr=float(training.lr[state.step]), beta1=training.beta1, beta2=training.beta2, eps=training.eps,
        weight_decay=training.weight_decay,
    )  # fmt: skip
    router = state.shape.rows(rows)["router"] if state.frozen(training) else None
    kept = None if router is None else router.clone()
    avg.lerp_(grad, 1 - adam.beta1)
    sq.mul_(adam.beta2).addcmul_(grad, grad, value=1 - adam.beta2)
    rows.mul_(adam.keep).addcdiv_(avg, sq.sqrt().mul_(adam.root).add_(adam.eps), value=-adam.step_size)
    if router is not None and kept is not None:
        router.copy_(kept)
    state.table[touched], state.exp_avg[touched], state.exp_avg_sq[touched] = rows, avg, sq
    state.seen[touched] = state.step + 1
