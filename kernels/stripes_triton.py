"""The exact step of a toy model with very many features in Triton, S features at a time.

    stripe   W_s, b_s, 2 scale I_s                copied, as the products take them
             z_e = h_e W_esᵀ + b_es               one expert per sample: its tiles become G at once
             r = 2 scale I (x' − x),  G_e = r w_e 1[z_e > 0],  dgate_e += ⟨r, ReLU(z_e)⟩
             dh_e += G_e W_es
             dW_es = G_eᵀ h_e                     into S rows of gradients, which AdamW takes from L2

`sweep` goes through the features that are absent from the batch, whose gradient is whole then, and through the present
ones for loss and dh only; `finish` decodes these again and adds the encoder's part. That is 6·B·k·m FLOP for an absent
feature and 8 for a present one. x is 0 at first, and the few entries are corrected behind. Memory besides the table: G
(places × S), and its like in float32 with more experts per sample or a shared one; copies and gradients of S rows; h
and dh. AdamW has a kernel of its own: behind a product, in its registers, the compiler spills.

Moments in bfloat16 are rounded stochastically: the low 16 bits of a hash are added to float32's bits before these are
cut, so that the mean is right and v does not stall at β₂ = .999. For the element ``index`` = i·P + column of the table

    g = fmix32(lo32(index) ^ fmix32(hi32(index) ^ key)),   exp_avg: fmix32(g),   exp_avg_sq: fmix32(g ^ 0x9E3779B9)

with Murmur3's finaliser fmix32; infinities and NaN are cut as they are. In bf16 the biases' gradient is of rounded G.
No atomics, no wait for the device: what depends on the batch beyond the sizes of its tensors stays there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moesaic.kernels import stripes_parts_triton as parts
from moesaic.kernels import stripes_products_triton as products
from moesaic.kernels.feature_state import AdamStep, Assignment, Columns, FeatureShape, Swept
from moesaic.kernels.tiles import Tile, multiprocessors, shared_bytes
from moesaic.kernels.weights_triton import _copies_tiles

STAGE, RESIDUAL, UPDATE = (16, 128), (16, 128), (8, 256)
"""Rows and columns of a program that copies weights, sums experts, updates parameters."""
ENTRIES, ROW_SUMS, BIAS_SUMS = 16, 128, 32
"""Entries that a program corrects or sums at a time, and features whose G it sums."""
ENCODER = (8, 256)
"""Entries and hidden units of a program that sums x dh."""


def sweep(
    shape: FeatureShape, table: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, h: Tensor, shared_h: Tensor | None,
    assignment: Assignment, columns: Columns, importance: Tensor, scale: float, adam: AdamStep | None, *,
    precision: str = "ieee", stripe: int = 4096, key: int = 0,
) -> Swept:  # fmt: skip
    """Decode all features; return loss and gradients of h, and update the rows of features absent from the batch.

    Args:
        shape: of the model.
        table: (n, P) float32.
        exp_avg: (n, P), float32 or bfloat16.
        exp_avg_sq: the same.
        h: (A, m) float32.
        shared_h: (B, m_0) float32, or None.
        assignment: of the A places.
        columns: the batch.
        importance: (n,) float32, I.
        scale: of the loss.
        adam: this step's factors; None updates nothing.
        precision: ``ieee``, ``tf32x3`` or ``bf16``.
        stripe: features at a time, rounded up to a multiple of 128.
        key: of the stochastic rounding.
    """
    step = _Step(
        shape, table, exp_avg, exp_avg_sq, h, shared_h, assignment, columns, importance, scale, precision, stripe, key,
    )  # fmt: skip
    for rows in step.absent():
        step.decode(rows)
        step.backward()
        if adam is not None:
            step.update(rows, adam)
    for number, rows in enumerate(step.present()):
        step.decode(rows)
        step.correct(number)
        step.backward()
    return step.swept()


def finish(
    shape: FeatureShape, table: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, h: Tensor, shared_h: Tensor | None,
    assignment: Assignment, columns: Columns, importance: Tensor, scale: float, adam: AdamStep, dh: Tensor,
    shared_dh: Tensor | None, dlogits: Tensor | None, *, precision: str = "ieee", stripe: int = 4096, key: int = 0,
) -> None:  # fmt: skip
    """Update the rows of the features present in the batch; arguments as `sweep`'s.

    dh (A, m), shared_dh (B, m_0) and dlogits (B, E) are the whole gradients of encodings and scores.
    """
    step = _Step(
        shape, table, exp_avg, exp_avg_sq, h, shared_h, assignment, columns, importance, scale, precision, stripe, key,
        keep=False,
    )  # fmt: skip
    for number, rows in enumerate(step.present()):
        step.decode(rows)
        step.correct(number)
        step.update(rows, adam, _Encoder(number, dh.contiguous(), shared_dh, dlogits))


@dataclass(frozen=True)
class _Encoder:
    """What the encoder's gradient needs of a stripe, by its number among those of the present features."""

    number: int
    dh: Tensor
    shared_dh: Tensor | None
    dlogits: Tensor | None


class _Experts:
    """Experts of one width, their rows in padded tiles, and their buffers for a stripe."""

    def __init__(
        self, h: Tensor, offsets: Tensor, gates: Tensor | None, precision: str, stripe: int, first: int,
        first_bias: int, encoder: int, *, fused: bool, keep: bool,
    ) -> None:  # fmt: skip
        self.first, self.first_bias, self.encoder, self.precision = first, first_bias, encoder, precision
        self.n_experts, (n_places, self.width), device = offsets.shape[0] - 1, h.shape, h.device
        room = (shared_bytes(device),) if device.type == "cuda" else ()
        self.tiles = products.tiles(
            precision, n_places / max(1, min(self.n_experts, n_places)), self.width, stripe, *room
        )
        block, depth = self.tiles.decode.block_m, self.tiles.depth
        ends = ((offsets.diff() + block - 1) // block).cumsum(0)
        # No routing needs more tiles than this, and the device alone knows how many it has.
        self.n_tiles = max(1, (n_places + min(self.n_experts, n_places) * (block - 1)) // block)
        self.tile_experts = torch.searchsorted(ends, torch.arange(self.n_tiles, device=device), right=True).int()
        self.ends = torch.cat([ends.new_zeros(1), ends * block]).int()
        place = torch.arange(n_places, device=device)
        self.expert_of = torch.searchsorted(offsets[1:], place, right=True)
        self.padded = place - offsets[self.expert_of] + self.ends[self.expert_of]
        kind = torch.bfloat16 if precision == "bf16" else torch.float32
        n_rows = self.n_tiles * block
        self.h = torch.zeros(n_rows, depth, dtype=kind, device=device)
        self.h[self.padded, : self.width] = h.to(kind)
        self.gates = torch.zeros(n_rows, device=device)
        self.gates[self.padded] = 1.0 if gates is None else gates
        self.w = torch.empty(stripe, self.n_experts * depth, dtype=kind, device=device)
        # Rows of padding: the product of one expert per sample writes them, the sum over several experts does not.
        self.g = torch.zeros(n_rows, stripe, dtype=kind, device=device)
        self.z = self.g if fused else torch.empty(n_rows, stripe, device=device)
        self.bias, self.factor = torch.empty(self.n_experts, stripe, device=device), torch.empty(stripe, device=device)
        self.dh = torch.zeros(n_rows if keep else 0, depth, device=device)
        self.fused, self.keep, self.stripe = fused, keep, stripe
        self.blocks = stripe // (self.tiles.decode.block_n if fused else RESIDUAL[1])
        self.sums = torch.zeros(self.blocks, n_rows, device=device)
        self.tma = precision != "ieee" and _copies_tiles(device)

    def _described(self, tensor: Tensor, rows: int, columns: int) -> Any:
        if not self.tma:
            return tensor
        return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns])

    def _compiled(self, tile: Tile) -> dict[str, Any]:
        return {
            "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "PART_N": products.PART_N,
            "TMA": self.tma, "PRECISION": self.precision, "num_warps": tile.warps, "num_stages": tile.stages,
        }  # fmt: skip

    @cached_property
    def _decode(self) -> list[Any]:
        tile = self.tiles.decode
        return [
            self._described(self.h, tile.block_m, tile.block_k), self._described(self.w, tile.block_n, tile.block_k)
        ]  # fmt: skip

    @cached_property
    def _backward(self) -> list[Any]:
        tile = self.tiles.backward
        return [
            self._described(self.g, tile.block_m, tile.block_k), self._described(self.w, tile.block_k, tile.block_n)
        ]  # fmt: skip

    @cached_property
    def _outer(self) -> list[Any]:
        tile = self.tiles.outer
        return [
            self._described(self.g, tile.block_k, tile.block_m), self._described(self.h, tile.block_k, tile.block_n)
        ]  # fmt: skip

    def decode(self, table: Tensor, rows: Tensor, importance: Tensor, twice: float) -> None:
        """Copy a stripe's weights; z, or G for x = 0."""
        depth, tile = self.tiles.depth, self.tiles.decode
        parts._stage_kernel[(self.stripe // STAGE[0], triton.cdiv(self.n_experts * depth, STAGE[1]))](
            table, rows, importance, self.w, self.bias, self.factor, table.stride(0) // 8, self.first, self.first_bias,
            self.width, depth, self.n_experts, self.stripe, twice, BLOCK_F=STAGE[0], BLOCK_N=STAGE[1],
        )  # fmt: skip
        products._decode_kernel[(self.n_tiles, self.stripe // tile.block_n)](
            *self._decode, self.bias, self.factor, self.gates, self.tile_experts, self.z, self.sums, depth,
            self.stripe, self.h.shape[0], self.n_experts, FUSED=self.fused, KEEP=self.keep, **self._compiled(tile),
        )  # fmt: skip

    def backward(self) -> None:
        """Add G W to dH."""
        tile = self.tiles.backward
        products._backward_kernel[(self.n_tiles, self.tiles.depth // tile.block_n)](
            *self._backward, self.dh, self.tile_experts, self.tiles.depth, self.stripe, self.n_experts,
            **self._compiled(tile),
        )  # fmt: skip

    def outer(self, grad: Tensor) -> None:
        """Write the decoders' gradient GᵀH and the biases' to a stripe's rows of gradients."""
        tile, depth, bias = self.tiles.outer, self.tiles.depth, grad[:, self.first_bias :]
        products._outer_kernel[(self.stripe // tile.block_m, depth // tile.block_n, self.n_experts)](
            *self._outer, self.ends, grad, grad.stride(0) // 8, self.first, self.width, depth, self.stripe,
            EVEN=self.width % tile.block_n == 0, **self._compiled(tile),
        )  # fmt: skip
        parts._bias_sums_kernel[(self.stripe // BIAS_SUMS, self.n_experts)](
            self.g, self.ends, bias, self.stripe, grad.stride(0), BLOCK_N=BIAS_SUMS, BLOCK_K=tile.block_k
        )

    def places_of(self, sums: Tensor) -> Tensor:
        """Take the rows of places out of the padded ones."""
        return sums[self.padded]


class _Step:
    """A batch and a model, ready for stripes of their features."""

    def __init__(
        self, shape: FeatureShape, table: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, h: Tensor,
        shared_h: Tensor | None, assignment: Assignment, columns: Columns, importance: Tensor, scale: float,
        precision: str, stripe: int, key: int, *, keep: bool = True,
    ) -> None:  # fmt: skip
        first = {name: column for name, (column, _) in shape.sections.items()}
        decoder, shared_decoder = ("weight", "shared_weight") if shape.tied else ("decoder", "shared_decoder")
        stripe = max(1, -(-min(stripe, shape.n_features) // products.FEATURES)) * products.FEATURES
        self.shape, self.assignment, self.columns, self.stripe, self.keep = shape, assignment, columns, stripe, keep
        self.importance, self.twice, self.device = importance.contiguous(), 2 * scale, table.device
        narrow = exp_avg.dtype == torch.bfloat16
        self.state = [table, *(moment.view(torch.int16) if narrow else moment for moment in (exp_avg, exp_avg_sq))]
        # The kernels take it as a signed number, whose type does not depend on its size.
        self.key = (key & 0xFFFFFFFF) - ((key & 0x80000000) << 1)
        self.batch, self.top_k = assignment.places.shape
        self.fused = self.top_k == 1 and shared_h is None
        self.experts = _Experts(
            h, assignment.offsets, assignment.gates, precision, stripe, first[decoder], first["bias"], first["weight"],
            fused=self.fused, keep=keep,
        )  # fmt: skip
        self.shared = None
        if shared_h is not None:
            everyone = torch.arange(2, device=self.device) * self.batch
            self.shared = _Experts(
                shared_h, everyone, None, precision, stripe, first[shared_decoder], first["shared_bias"],
                first["shared_weight"], fused=False, keep=keep,
            )  # fmt: skip
        self.both = [self.experts, *([] if self.shared is None else [self.shared])]
        self.places = self.experts.padded[assignment.places]
        self.first_router = first.get("router", 0)
        # Laid out as the table; columns without a gradient stay 0.
        self.grad = torch.zeros(stripe, table.stride(0), device=self.device)
        self.n_present, self.n_entries = columns.features.shape[0], columns.samples.shape[0]
        kept = self.n_entries if keep else 0
        self.deltas = torch.empty(kept, self.top_k, device=self.device)
        self.losses = torch.empty(kept, device=self.device)
        self.sample_losses = torch.zeros(stripe // RESIDUAL[1], 0 if self.fused else self.batch, device=self.device)

    def _stripes(self, rows: Tensor) -> Iterator[Tensor]:
        size = -(-rows.shape[0] // self.stripe) * self.stripe
        padded = torch.nn.functional.pad(rows, (0, size - rows.shape[0]), value=-1)
        yield from padded.reshape(-1, self.stripe)

    def absent(self) -> Iterator[Tensor]:
        """Yield the rows of absent features, a stripe at a time."""
        present = torch.zeros(self.shape.n_features, dtype=torch.uint8, device=self.device)
        order = torch.sort(present.index_fill_(0, self.columns.features, 1), stable=True).indices
        return self._stripes(order[: self.shape.n_features - self.n_present])

    def present(self) -> Iterator[Tensor]:
        """Yield the rows of present features, a stripe at a time."""
        return self._stripes(self.columns.features)

    @cached_property
    def _entries(self) -> tuple[Tensor, Tensor]:
        """Return each entry's feature, by its number among the present, and where the entries of each stripe begin."""
        numbers = torch.arange(self.n_present, device=self.device)
        edges = torch.arange(0, self.n_present + self.stripe, self.stripe, device=self.device)
        of = torch.repeat_interleave(numbers, self.columns.starts.diff(), output_size=self.n_entries)
        return of, self.columns.starts[edges.clamp(max=self.n_present)]

    def decode(self, rows: Tensor) -> None:
        """G of a stripe, as if the batch were 0."""
        for group in self.both:
            group.decode(self.state[0], rows, self.importance, self.twice)
        if not self.fused and self.batch:
            one, other = self.experts, self.shared or self.experts
            block_b, block_n = RESIDUAL
            parts._residual_kernel[(triton.cdiv(self.batch, block_b), self.stripe // block_n)](
                one.z, one.g, other.z, other.g, self.places, one.gates, one.factor, one.sums, self.sample_losses,
                self.batch, self.top_k, self.stripe, one.h.shape[0], HAS_SHARED=self.shared is not None,
                BLOCK_B=block_b, BLOCK_N=block_n,
            )  # fmt: skip

    def correct(self, number: int) -> None:
        """G at the entries of a stripe of present features."""
        one, other, (of, bounds) = self.experts, self.shared or self.experts, self._entries
        programs = min(8 * multiprocessors(self.device), max(1, triton.cdiv(self.n_entries, ENTRIES)))
        parts._entries_kernel[(programs,)](
            one.h, one.w, one.bias, one.z, other.z, one.g, other.g, self.places, one.gates, one.tile_experts,
            one.factor, of, self.columns.samples, self.columns.values, bounds, self.deltas, self.losses, number,
            number * self.stripe, self.top_k, one.tiles.depth, one.n_experts, self.stripe, FUSED=self.fused,
            HAS_SHARED=self.shared is not None, KEEP=self.keep, BLOCK=ENTRIES, BLOCK_M=one.tiles.decode.block_m,
            BLOCK_K=one.tiles.decode.block_k,
        )  # fmt: skip

    def backward(self) -> None:
        """Add to dh of all experts."""
        for group in self.both:
            group.backward()

    def update(self, rows: Tensor, adam: AdamStep, encoder: _Encoder | None = None) -> None:
        """AdamW on a stripe's rows."""
        if encoder is not None:
            self.grad.zero_()
        for group in self.both:
            group.outer(self.grad)
        if encoder is not None:
            self._encode(encoder.dh, self.experts.encoder, encoder.number, places=True)
            if self.shared is not None and encoder.shared_dh is not None:
                self._encode(encoder.shared_dh, self.shared.encoder, encoder.number)
            if encoder.dlogits is not None:
                self._encode(encoder.dlogits, self.first_router, encoder.number)
        table, *moments = self.state
        stride = table.stride(0)
        block = min(UPDATE[1], triton.next_power_of_2(stride))
        parts._update_kernel[(self.stripe // UPDATE[0], triton.cdiv(stride, block))](
            table, *moments, rows, self.grad, stride // 8, self.shape.n_columns, adam.keep, 1 - adam.beta1, adam.beta2,
            1 - adam.beta2, adam.eps, adam.step_size, adam.root, self.key, NARROW=moments[0].dtype == torch.int16,
            BLOCK_F=UPDATE[0], BLOCK_N=block,
        )  # fmt: skip

    def _encode(self, source: Tensor, column: int, number: int, *, places: bool = False) -> None:
        """Add Σ x dh over the entries of each feature of a stripe, dh a row for each sample or for each place."""
        first, width = number * self.stripe, source.shape[1]
        block = min(ENCODER[1], triton.next_power_of_2(width))
        # A place's expert is needed where it decides on the columns.
        one = not places or self.shape.n_experts == 1
        parts._encoder_kernel[(min(self.stripe, self.n_present - first), triton.cdiv(width, block))](
            source.contiguous(), self.assignment.places, self.experts.expert_of, self.columns.starts,
            self.columns.samples, self.columns.values, self.grad[:, column:], first, width, self.top_k,
            self.grad.stride(0), ONE=one, DIRECT=not places, BLOCK_E=ENCODER[0], BLOCK=block,
            num_warps=4 if block > 32 else 1, num_stages=1,
        )  # fmt: skip

    def swept(self) -> Swept:
        """Join loss and gradients."""
        one = self.experts
        totals = one.sums.sum(0)
        if self.fused:
            loss = 0.5 * (totals.double() * one.gates.double()).sum()
        else:
            loss = self.sample_losses.sum(dtype=torch.float64)
        loss = loss + self.losses.sum(dtype=torch.float64)
        dgates = one.places_of(totals)
        if self.n_entries:
            order = torch.sort(self.columns.samples.int(), stable=True)
            starts = torch.searchsorted(
                order.values, torch.arange(self.batch + 1, dtype=torch.int32, device=self.device)
            )
            change = torch.empty(self.batch, self.top_k, device=self.device)
            parts._row_sums_kernel[(self.batch, self.top_k)](
                self.deltas, order.indices, starts, change, self.top_k, BLOCK=ROW_SUMS
            )
            dgates[self.assignment.places.flatten()] += change.flatten()
        shared = self.shared
        return Swept(
            loss, one.places_of(one.dh)[:, : one.width].contiguous(), dgates,
            None if shared is None else shared.places_of(shared.dh)[:, : shared.width].contiguous(),
        )  # fmt: skip
