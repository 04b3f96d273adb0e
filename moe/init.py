"""Initial values of toy models, by the named parametrisations of ``ToyConfig``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from moesaic.moe.config import ToyConfig

# Standard deviations (weight, bias, router) as functions of n, m, E.
_STD: dict[str, Callable[[int, int, int], tuple[float, float, float]]] = {
    "paper": lambda n, m, e: (math.sqrt(2 / ((n + e) * m)), math.sqrt(2 / (n + e)), math.sqrt(2 / (n + e))),
    "tms": lambda n, m, e: (math.sqrt(2 / (n + m)), 0.0, math.sqrt(2 / (n + e))),
    "large_n": lambda n, m, e: (1 / math.sqrt(m), 0.0, 1 / math.sqrt(m)),
    "small": lambda n, m, e: (0.03, 0.0, 0.03),
}
_BLOCK = 65_536
_SECTIONS = ("weight", "bias", "router", "shared_weight", "shared_bias", "permutation")


def _generator(seed: int, section: str) -> np.random.Generator:
    # One counter range per tensor, so that adding a shared expert does not change the routed ones.
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, 1 + _SECTIONS.index(section)]))


def _normal(seed: int, section: str, std: float, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy((std * _generator(seed, section).standard_normal(shape)).astype(np.float32))


def initial_router(config: ToyConfig, seed: int, n_clusters: int = 0) -> Tensor:
    """Return the router (E, n): the oracle's, a named one, or normal values."""
    n, e = config.n_features, config.n_experts
    if config.gate == "oracle":
        clusters = n_clusters or n
        owner = torch.arange(n) // (n // clusters) * e // clusters
        return (owner == torch.arange(e)[:, None]).to(torch.float32)
    if config.router_init == "k_hot":
        shuffled = torch.from_numpy(_generator(seed, "permutation").permutation(n))
        router = torch.zeros(e, n)
        router[torch.arange(n) * e // n, shuffled] = 1.0
        return router
    if config.router_init == "diagonal":
        return torch.eye(e, n)
    return _normal(seed, "router", _STD[config.parametrization](n, config.n_hidden, e)[2], (e, n))


def fill_initial(views: Mapping[str, Tensor], config: ToyConfig, seed: int, n_clusters: int = 0) -> None:
    """Write the values that `initial_parameters` returns into tensors of one model.

    All but the router's are drawn a block of features at a time.

    ``views`` has some of its names, without the stack's axis; a router may be left out.
    """
    n, m, e, m0 = config.n_features, config.n_hidden, config.n_experts, config.shared_hidden
    weight_std, bias_std, _ = _STD[config.parametrization](n, m, e)
    shared_std, shared_bias_std, _ = _STD[config.parametrization](n, max(1, m0), e)
    stds = {
        "weight": weight_std, "bias": bias_std, "shared_weight": shared_std, "shared_bias": shared_bias_std,
    }  # fmt: skip
    for name, view in views.items():
        if name in stds:
            generator = _generator(seed, name)
            for block in view if name in ("weight", "bias") else [view]:
                for first in range(0, n, _BLOCK):
                    part = block[first : first + _BLOCK]
                    drawn = generator.standard_normal(tuple(part.shape))
                    part.copy_(torch.from_numpy((stds[name] * drawn).astype(np.float32)))
        elif name == "router":
            view.copy_(initial_router(config, seed, n_clusters))
    for copy, original in (("decoder", "weight"), ("shared_decoder", "shared_weight")):
        if copy in views:
            views[copy].copy_(views[original])


def initial_parameters(
    configs: Sequence[ToyConfig], seeds: Sequence[int], n_clusters: Sequence[int]
) -> dict[str, Tensor]:
    """Return the stacked initial values (S, …) of models that share n, m, E, m_0 and tied, by section name."""
    stacks: dict[str, list[Tensor]] = {}
    for config, seed, clusters in zip(configs, seeds, n_clusters, strict=True):
        n, m, e, m0 = config.n_features, config.n_hidden, config.n_experts, config.shared_hidden
        weight_std, bias_std, _ = _STD[config.parametrization](n, m, e)
        values = {"weight": _normal(seed, "weight", weight_std, (e, n, m))}
        if not config.tied:
            values["decoder"] = values["weight"].clone()
        values["bias"] = _normal(seed, "bias", bias_std, (e, n))
        values["router"] = initial_router(config, seed, clusters)
        if m0:
            shared_weight_std, shared_bias_std, _ = _STD[config.parametrization](n, m0, e)
            values["shared_weight"] = _normal(seed, "shared_weight", shared_weight_std, (n, m0))
            if not config.tied:
                values["shared_decoder"] = values["shared_weight"].clone()
            values["shared_bias"] = _normal(seed, "shared_bias", shared_bias_std, (n,))
        for name, value in values.items():
            stacks.setdefault(name, []).append(value)
    return {name: torch.stack(stack) for name, stack in stacks.items()}
