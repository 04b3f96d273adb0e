"""The models that ``moesaic bench million`` steps, and the FLOPs and bytes of a step, by hand.

With B samples, N = entries of the batch, C = features that are present in it, T = rows that a sampled step touches, R
of them drawn, P = columns of the table (`FeatureShape.stride`)::

    active FLOPs     exact    6·B·k·n·m + 4·N·(k·m + E)        decode forward, dh, dD; encode, router, gradients
                     sampled  6·B·k·R·m + 6·N·k·m + 4·N·(k·m + E)
    executed FLOPs   exact    active + 4·B·k·C·m: the present features are decoded again. No padding is counted.
    bytes            exact    24·n·P + 4·C·P + 4·N·(k·m + E): the table and both moments read and written once, the
                              present rows' table once more, the encoder's rows gathered
                     sampled  24·T·P + 4·N·(k·m + E)
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.kernels import sample_features
from moesaic.kernels.feature_state import FeatureShape
from moesaic.kernels.feature_step import feature_step
from moesaic.kernels.feature_training import FeatureState, FeatureTraining
from moesaic.kernels.features import INDEPENDENT, FeatureTable

LR, STEPS = 1e-4, 20_000
"""A small rate: models stay near their initial values however many steps are timed."""
LOAD_BALANCE = 0.01
BATCHES = 4
"""Batches that take turns."""


@dataclass(frozen=True)
class Sizes:
    """What a device is measured with: the largest n, dense m, batch B, p, R, the precision, and E of the steps."""

    n_features: int
    n_hidden: int
    batch: int
    probability: float
    negatives: int
    precision: str
    experts: tuple[int, ...]
    curve: tuple[int, ...]
    sampler_batch: int = 4096
    moe: int = 16
    """E of the mixture that the dense model is compared with, k = 1 and m/E wide."""

    @property
    def dense(self) -> Model:
        """The dense model of n features."""
        return Model(self.n_features, self.n_hidden)

    @property
    def mixture(self) -> Model:
        """The mixture of n features at equal total width."""
        return Model(self.n_features, self.n_hidden // self.moe, self.moe)


@dataclass(frozen=True)
class Model:
    """A tied toy model of n features: E experts of width m, one of them for each sample."""

    n_features: int
    n_hidden: int
    n_experts: int = 1

    @property
    def name(self) -> str:
        """What tables call it."""
        if self.n_experts == 1:
            return f"dense, m = {self.n_hidden}"
        return f"E = {self.n_experts}, k = 1, m = {self.n_hidden}"

    @property
    def shape(self) -> FeatureShape:
        """Its parameters' places."""
        return FeatureShape(self.n_features, self.n_hidden, self.n_experts, routed=self.n_experts > 1)

    def decode_flops(self, rows: int) -> int:
        """Of so many sample-feature pairs, decoded forward and backward."""
        return 6 * rows * self.n_hidden


def sizes_of(device: str, *, quick: bool) -> Sizes:
    """What ``device`` is measured with."""
    if device == "cuda":
        n = 100_000 if quick else 1_000_000
        m, batch, precision = 1024, 4096, "bf16"
    else:
        n, m, batch, precision = (100_000 if quick else 1_000_000), 64, 256, "ieee"
    curve = tuple(size for size in (10_000, 30_000, 100_000, 300_000, 1_000_000) if size <= n)
    experts = (1, 4, 16) if quick else (1, 2, 4, 8, 16, 32)
    return Sizes(n, m, batch, 1e-4, 4096, precision, experts, curve)


def draw_batches(n: int, batch: int, probability: float, device: str, count: int = BATCHES) -> list[Tensor]:
    """Return sparse batches (B, n) of independent features that are equally probable."""
    table = FeatureTable(torch.tensor([INDEPENDENT]), torch.full((1, n), probability), torch.tensor([1]))
    seeds = torch.tensor([0], device=device)
    return [sample_features(table, batch, seeds=seeds, step=s, layout=torch.sparse_csr) for s in range(count)]


@dataclass
class Stepper:
    """A model in training and its batches, which take turns."""

    model: Model
    training: FeatureTraining
    state: FeatureState
    batches: list[Tensor]

    @classmethod
    def of(cls, model: Model, sizes: Sizes, device: str, *, decode: str = "exact") -> Stepper:
        """Make it, with unit-norm rows as the parametrisation ``large_n`` has them, biases 0."""
        state = FeatureState.zeros(model.shape, device=device, decode=decode)
        generator = torch.Generator(device).manual_seed(0)
        for name, value in model.shape.named(state.table).items():
            if name != "bias":
                value.normal_(std=model.n_hidden**-0.5, generator=generator)
        training = FeatureTraining(
            gate="switch" if model.n_experts > 1 else "paper", importance=torch.ones(model.n_features, device=device),
            scale=1 / sizes.batch, lr=torch.full((STEPS,), LR, dtype=torch.float64),
            load_balance=LOAD_BALANCE if model.n_experts > 1 else 0.0, decode=decode,
            n_negatives=min(sizes.negatives, model.n_features) if decode == "sampled" else 0,
            precision=sizes.precision if decode == "exact" else "ieee",
        )  # fmt: skip
        batches = draw_batches(model.n_features, sizes.batch, sizes.probability, device)
        state.schedule(training)
        return cls(model, training, state, batches)

    def repeat(self, count: int) -> None:
        """Train ``count`` steps."""
        for x in itertools.islice(itertools.cycle(self.batches), count):
            feature_step(self.state, x, self.training)

    def first_loss(self) -> Tensor:
        """Train a step on the first batch and return its loss."""
        return feature_step(self.state, self.batches[0], self.training).loss

    def active_flops(self) -> int:
        """Useful FLOPs of a step."""
        model, entries, batch = self.model, self._entries(), self.batches[0].shape[0]
        router = model.n_experts if model.n_experts > 1 else 0
        encode = 4 * entries * (model.n_hidden + router)
        if self.training.decode == "sampled":
            return encode + model.decode_flops(batch * self.training.n_negatives + entries)
        return encode + model.decode_flops(batch * model.n_features)

    def executed_flops(self) -> int:
        """FLOPs of a step with what is computed twice."""
        if self.training.decode == "sampled":
            return self.active_flops()
        return self.active_flops() + 4 * self.batches[0].shape[0] * self._present() * self.model.n_hidden

    def least_bytes(self) -> int:
        """Bytes that a step has to move to and from memory."""
        model, shape = self.model, self.model.shape
        router = model.n_experts if model.n_experts > 1 else 0
        gathered = 4 * self._entries() * (model.n_hidden + router)
        if self.training.decode == "sampled":
            # Drawn features are as good as never present, at the densities of this benchmark.
            return 24 * (self.training.n_negatives + self._present()) * shape.stride + gathered
        return (24 * shape.n_features + 4 * self._present()) * shape.stride + gathered

    def section_bytes(self) -> dict[str, int]:
        """Bytes of weights, biases, router and padding, which an exact step reads and writes three tensors of."""
        shape = self.model.shape
        columns = {name: math.prod(size) for name, (_, size) in shape.sections.items()}
        columns["padding"] = shape.stride - shape.n_columns
        return {name: 24 * shape.n_features * count for name, count in columns.items() if count}

    def _entries(self) -> int:
        return round(sum(len(x.values()) for x in self.batches) / len(self.batches))

    def _present(self) -> int:
        return round(sum(len(x.col_indices().unique()) for x in self.batches) / len(self.batches))
