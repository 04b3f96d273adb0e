"""The toy model of superposition, dense and mixture of experts, stacked over independent models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moesaic.kernels import combine, group_by_expert, grouped_matmul
from moesaic.kernels.ensemble import EnsembleShape
from moesaic.kernels.toy_gates import toy_gates
from moesaic.moe.config import Run, ToyConfig
from moesaic.moe.init import initial_parameters


class ToyRouting(NamedTuple):
    """Gate weights (S, B, k), expert ids (S, B, k) by falling score, and softmax(s) over all experts (S, B, E)."""

    weights: Tensor
    ids: Tensor
    probs: Tensor


class ToyModel(nn.Module):
    """S independent toy models of one shape: x' = [y_0] + Σ_{e ∈ top-k} w_e ReLU(x W_e D_eᵀ + b_e).

    Only the k routed experts of a sample are computed. Gates and parametrisations are those of ``ToyConfig``. Sources:
    Elhage et al. 2022, *Toy Models of Superposition*; arXiv 2510.23671 for the mixture.

    Parameters: ``weight`` (S, E, n, m), ``decoder`` (S, E, n, m) if untied, ``bias`` (S, E, n), ``router`` (S, E, n);
    ``shared_weight`` (S, n, m_0), ``shared_decoder`` (S, n, m_0) if untied, ``shared_bias`` (S, n) if m_0 > 0.

    Args:
        config: one architecture, or one per stacked model; they may differ in gate and initial values, not in shape.
        seeds: one per model; keys of the initial values.
        n_clusters: clusters of each model's data, which the ``oracle`` gate routes by (0: equal blocks of features).

    Raises:
        ValueError: where configs differ in shape, or in number from the seeds.

    Example:
        >>> model = ToyModel(ToyConfig(n_features=20, n_hidden=5, n_experts=4, top_k=1), seeds=range(3))
        >>> model(torch.rand(3, 64, 20)).shape
        torch.Size([3, 64, 20])
    """

    weight: nn.Parameter
    bias: nn.Parameter
    router: nn.Parameter
    shared_weight: nn.Parameter
    shared_bias: nn.Parameter

    def __init__(
        self,
        config: ToyConfig | Sequence[ToyConfig],
        *,
        seeds: Sequence[int] = (0,),
        n_clusters: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        configs = [config] * len(seeds) if isinstance(config, ToyConfig) else list(config)
        if len(configs) != len(seeds) or not configs:
            raise ValueError(f"seeds: takes one per config, at least one; got {len(seeds)} for {len(configs)} configs")
        self.configs = configs
        self.shapes = {ensemble_shape(one, batch_size=1) for one in configs}
        if len(self.shapes) != 1:
            raise ValueError(f"config: stacked models take one shape, got {sorted(map(str, self.shapes))}")
        for name, value in initial_parameters(configs, seeds, n_clusters or [0] * len(seeds)).items():
            self.register_parameter(name, nn.Parameter(value))

    @classmethod
    def from_runs(cls, runs: Sequence[Run]) -> ToyModel:
        """Return the untrained models of stacked runs."""
        return cls(
            [run.toy for run in runs],
            seeds=[run.seed for run in runs],
            n_clusters=[run.features.n_clusters for run in runs],
        )

    @property
    def n_models(self) -> int:
        """S, the number of stacked models."""
        return len(self.configs)

    def select(self, index: int) -> ToyModel:
        """Return a copy of one model of the stack, with S = 1."""
        if not -self.n_models <= index < self.n_models:
            raise IndexError(f"index={index}: takes {-self.n_models} to {self.n_models - 1}")
        index %= self.n_models
        one = ToyModel([self.configs[index]], seeds=[0])
        one.load_state_dict({name: value[index : index + 1].clone() for name, value in self.state_dict().items()})
        return one.to(self.weight.device)

    def route(self, x: Tensor) -> ToyRouting:
        """Choose and weigh experts for x (S, B, n), or (B, n) shared by all models."""
        x = self._stacked(x)
        logits = x @ self.router.transpose(1, 2)
        ids, probs, by_gate = toy_gates(logits, self.configs[0].top_k)
        gates = [config.gate for config in self.configs]
        if len(set(gates)) == 1:
            return ToyRouting(by_gate[gates[0]], ids, probs)
        return ToyRouting(torch.stack([by_gate[gate][s] for s, gate in enumerate(gates)]), ids, probs)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct x (S, B, n), or (B, n) given to every model; one model and a (B, n) input give (B, n)."""
        stacked = self._stacked(x)
        out = self.reconstruct(stacked, self.route(stacked))
        return out[0] if x.dim() == 2 and self.n_models == 1 else out

    def reconstruct(self, x: Tensor, routing: ToyRouting) -> Tensor:
        """Return x' (S, B, n) under a given routing of x (S, B, n)."""
        s, batch, n = x.shape
        e, m, k = self.configs[0].n_experts, self.configs[0].n_hidden, self.configs[0].top_k
        # Experts of different models are different experts: one grouping serves the whole stack.
        first = (torch.arange(s, device=x.device) * e)[:, None, None]
        grouping = group_by_expert((routing.ids + first).view(s * batch, k), s * e)
        source = grouping.permutation // k
        encoder = self.weight.reshape(s * e, n, m)
        decoder = getattr(self, "decoder", self.weight).reshape(s * e, n, m)
        h = grouped_matmul(x.reshape(s * batch, n), encoder, grouping.offsets, gather=source)
        y = torch.relu(grouped_matmul(h, decoder.transpose(1, 2), grouping.offsets, bias=self.bias.reshape(s * e, n)))
        out = combine(y, routing.weights.reshape(s * batch, k), grouping).view(s, batch, n)
        if self.configs[0].shared_hidden:
            shared = getattr(self, "shared_decoder", self.shared_weight)
            out = out + torch.relu(x @ self.shared_weight @ shared.transpose(1, 2) + self.shared_bias[:, None])
        return out

    def _stacked(self, x: Tensor) -> Tensor:
        n, s = self.configs[0].n_features, self.n_models
        if x.dim() == 2:
            x = x.expand(s, -1, -1)
        if x.dim() != 3 or x.shape[0] != s or x.shape[2] != n:
            raise ValueError(f"x: takes (B, {n}) or ({s}, B, {n}), got {tuple(x.shape)}")
        return x


def ensemble_shape(config: ToyConfig, batch_size: int) -> EnsembleShape:
    """Return the sizes that models of this architecture share in a stack."""
    return EnsembleShape(
        config.n_features,
        config.n_hidden,
        config.n_experts,
        config.top_k,
        config.shared_hidden,
        config.tied,
        batch_size,
    )
