"""Configurations of toy models: architecture, feature data, optimisation, and the run that joins them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

GATES = ("paper", "switch", "sigmoid", "straight_through", "random", "oracle")
PARAMETRIZATIONS = ("paper", "tms", "large_n", "small")
ROUTER_INITS = ("default", "k_hot", "diagonal")
FEATURES = ("independent", "power_law", "correlated", "anticorrelated", "clustered", "exactly_k")
IMPORTANCES = ("uniform", "geometric", "permuted", "log", "last")
SCHEDULES = ("constant", "cosine", "linear")
REDUCTIONS = ("mean", "sum")
DECODES = ("exact", "sampled")
PRECISIONS = ("ieee", "tf32x3", "bf16")
MOMENTS = ("fp32", "bf16")
_LATER = ("decode", "n_negatives", "precision", "moments")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: takes one of {', '.join(allowed)}")


def _at_least(name: str, value: float, low: float) -> None:
    if not (math.isfinite(value) and value >= low):
        raise ValueError(f"{name}={value!r}: takes a finite number >= {low}")


@dataclass(frozen=True)
class ToyConfig:
    """Architecture of a toy model of superposition, dense (E = 1) or mixture of experts.

    x' = [y_0] + Σ_{e ∈ top-k} w_e y_e,  y_e = ReLU(x W_e D_eᵀ + b_e),  D_e = W_e when tied;  s = x · routerᵀ.

    Gates, with g = softmax(s) over all E experts and S the k largest s (ties: lowest id first):
      ``paper``             w_e = g_e / Σ_{j∈S} g_j. At k = 1 this is 1 and the router gets no reconstruction gradient.
      ``switch``            w_e = g_e.
      ``sigmoid``           w_e = 1 / (1 + exp(−s_e)), not normalised.
      ``straight_through``  value of ``paper``, gradient of ``switch``.
      ``random``            ``paper`` with a frozen random router.
      ``oracle``            ``paper`` with a frozen k-hot router on the data's clusters.

    Parametrisations (standard deviations of the normal initial values of weight; bias; router):
      ``paper``    √(2/((n+E)m)); √(2/(n+E)); √(2/(n+E))   (Xavier on the stacked tensors, arXiv 2510.23671)
      ``tms``      √(2/(n+m)); 0; √(2/(n+E))               (Elhage et al. 2022)
      ``large_n``  1/√m; 0; 1/√m                           (unit-norm rows whatever n is)
      ``small``    0.03; 0; 0.03                           (starts near the zero map)
    An untied decoder starts as a copy of its encoder.

    Args:
        n_features: n, length of the input.
        n_hidden: m, hidden width of one expert.
        n_experts: E.
        top_k: k, experts that compute for one sample.
        gate: one of the six above.
        shared_hidden: m_0, width of an expert that always computes, with weight 1; 0 for none.
        tied: whether the decoder is the encoder's transpose.
        parametrization: named initial values.
        router_init: ``default`` (as the parametrisation says), ``k_hot`` (a random permutation of the features split E
            ways, 1 each; trainable) or ``diagonal`` (router[e, e] = 1).

    Raises:
        ValueError: naming the field, its value and what it takes.
    """

    n_features: int = 5
    n_hidden: int = 2
    n_experts: int = 1
    top_k: int = 1
    gate: str = "paper"
    shared_hidden: int = 0
    tied: bool = True
    parametrization: str = "paper"
    router_init: str = "default"

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("n_features", "n_hidden", "n_experts", "top_k"):
            _at_least(name, getattr(self, name), 1)
        _at_least("shared_hidden", self.shared_hidden, 0)
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k={self.top_k}: takes 1 to n_experts={self.n_experts}")
        if self.n_experts > self.n_features and self.router_init != "default":
            raise ValueError(f"router_init={self.router_init!r}: needs n_experts <= n_features={self.n_features}")
        _one_of("gate", self.gate, GATES)
        _one_of("parametrization", self.parametrization, PARAMETRIZATIONS)
        _one_of("router_init", self.router_init, ROUTER_INITS)

    @property
    def router_is_frozen(self) -> bool:
        """Whether the gate's router takes no gradient and no weight decay."""
        return self.gate in ("random", "oracle")


@dataclass(frozen=True)
class FeatureConfig:
    """Distribution of the feature vectors x ∈ [0, 1)ⁿ and the importance I of each feature.

    Present features have values U(0, 1), absent ones are 0:
      ``independent``     each present with probability p.
      ``power_law``       independent, p_i ∝ (i+1)^(−power_law_exponent), scaled to mean p.
      ``correlated``      groups of ``group_size`` neighbours are present together, with probability p.
      ``anticorrelated``  at most one feature of a group is present; each with probability p (group_size · p ≤ 1).
      ``clustered``       one of ``n_clusters`` equal blocks is drawn per sample; inside it each feature is present with
                          probability p, outside none is.
      ``exactly_k``       exactly ``n_active`` features are present, uniformly chosen.
    Importance: ``uniform`` 1; ``geometric`` base^i; ``permuted`` base^perm(i); ``log`` base^(−i/(n−1)); ``last`` 1, but
    base for the last feature.

    Raises:
        ValueError: naming the field, its value and what it takes.
    """

    features: str = "independent"
    feature_probability: float = 0.1
    group_size: int = 0
    n_clusters: int = 0
    n_active: int = 0
    power_law_exponent: float = 1.0
    importance: str = "uniform"
    importance_base: float = 0.9

    def __post_init__(self) -> None:
        _check_types(self)
        _one_of("features", self.features, FEATURES)
        _one_of("importance", self.importance, IMPORTANCES)
        if not 0.0 < self.feature_probability <= 1.0:
            raise ValueError(f"feature_probability={self.feature_probability!r}: takes a number in (0, 1]")
        if not (math.isfinite(self.importance_base) and self.importance_base > 0):
            raise ValueError(f"importance_base={self.importance_base!r}: takes a finite number > 0")
        _at_least("power_law_exponent", self.power_law_exponent, 0)
        needs = {
            "correlated": "group_size",
            "anticorrelated": "group_size",
            "clustered": "n_clusters",
            "exactly_k": "n_active",
        }
        for name in ("group_size", "n_clusters", "n_active"):
            wanted = needs.get(self.features) == name
            value = getattr(self, name)
            if wanted:
                _at_least(name, value, 1)
            elif value != 0:
                raise ValueError(f"{name}={value!r}: takes 0 when features={self.features!r} (it would be ignored)")
        unused = {
            "feature_probability": self.features == "exactly_k",
            "power_law_exponent": self.features != "power_law",
            "importance_base": self.importance == "uniform",
        }
        for name, ignored in unused.items():
            if ignored and getattr(self, name) != getattr(FeatureConfig, name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: leave it at {getattr(FeatureConfig, name)!r} when "
                    f"features={self.features!r} and importance={self.importance!r} (it would be ignored)"
                )
        if self.features == "anticorrelated" and self.group_size * self.feature_probability > 1:
            raise ValueError(
                f"feature_probability={self.feature_probability!r}: takes at most 1/group_size = "
                f"{1 / self.group_size:g} "
                "when features='anticorrelated'"
            )


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation by AdamW (Loshchilov and Hutter 2019) on fresh samples at every step.

    L = Σ_f I_f mean_b (x_bf − x'_bf)² [/ n when reduction is ``mean``] + load_balance · E Σ_e f_e P_e, where f_e is the
    share of the B·k assignments that go to e (no gradient) and P_e the batch mean of softmax(s)_e. Frozen routers are
    not decayed.

    Schedules of the learning rate over t = 0 … steps−1 after ``warmup_steps`` of linear rise: ``constant``, ``cosine``
    and
    ``linear``; the last two fall to zero.

    The last fields belong to `train_large`: ``decode`` ``exact``, or ``sampled`` with ``n_negatives`` features besides
    the present ones; ``precision`` of products, ``ieee``, ``tf32x3`` or ``bf16``; ``moments``, ``fp32`` or ``bf16``.

    Raises:
        ValueError: naming the field, its value and what it takes.
    """

    steps: int = 10_000
    batch_size: int = 1024
    lr: float = 1e-3
    schedule: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    reduction: str = "mean"
    load_balance: float = 0.0
    decode: str = "exact"
    n_negatives: int = 0
    precision: str = "ieee"
    moments: str = "fp32"

    def __post_init__(self) -> None:
        _check_types(self)
        _at_least("steps", self.steps, 0)
        if self.steps >= 2**32:
            raise ValueError(f"steps={self.steps}: takes an integer below 2**32, the range of the step counter")
        _at_least("batch_size", self.batch_size, 1)
        for name in ("lr", "weight_decay", "load_balance", "warmup_steps"):
            _at_least(name, getattr(self, name), 0)
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)!r}: takes a number in [0, 1)")
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise ValueError(f"eps={self.eps!r}: takes a finite number > 0")
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("reduction", self.reduction, REDUCTIONS)
        _one_of("decode", self.decode, DECODES)
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("moments", self.moments, MOMENTS)
        if self.decode == "sampled":
            _at_least("n_negatives", self.n_negatives, 1)
            for name, only in (("moments", "fp32"), ("precision", "ieee")):
                if getattr(self, name) != only:
                    raise ValueError(f"{name}={getattr(self, name)!r}: takes {only} when decode='sampled'")
        elif self.n_negatives:
            raise ValueError(f"n_negatives={self.n_negatives}: takes 0 when decode='exact' (it would be ignored)")

    def lr_at(self, step: int) -> float:
        """Return the learning rate of step t (0-based)."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.lr * (0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1 - done)


@dataclass(frozen=True)
class Run:
    """One model to train: architecture, data, optimisation and seed.

    The seed keys the initial weights and the stream of training samples; the held-out batch belongs to the data alone,
    so all runs on the same features are judged on the same samples.

    Raises:
        ValueError: naming the field, its value and what it takes.
    """

    toy: ToyConfig = field(default_factory=ToyConfig)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    training: TrainConfig = field(default_factory=TrainConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", _typed("seed", self.seed, int))
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed!r}: takes an integer from 0 to 2**63 - 1")
        n = self.toy.n_features
        for name in ("group_size", "n_clusters"):
            size = getattr(self.features, name)
            if size and n % size:
                raise ValueError(f"{name}={size}: takes a divisor of n_features={n}")
        if self.features.n_active > n:
            raise ValueError(f"n_active={self.features.n_active}: takes 1 to n_features={n}")
        if self.features.features == "power_law":
            mean = _power_law_mean(n, self.features.power_law_exponent)
            if self.features.feature_probability / mean > 1:
                raise ValueError(
                    f"feature_probability={self.features.feature_probability!r}: takes at most {mean:.4g} with "
                    f"features='power_law', "
                    f"n_features={n}, power_law_exponent={self.features.power_law_exponent!r}: the largest p_i passes 1"
                )

    def flat(self) -> dict[str, Any]:
        """Return every field of the three configurations, and the seed, as one flat dict."""
        return {**vars(self.toy), **vars(self.features), **vars(self.training), "seed": self.seed}

    @staticmethod
    def from_flat(values: Mapping[str, Any]) -> Run:
        """Build a run from flat keys; what is missing takes its default.

        Raises:
            ValueError: for an unknown key, a value of the wrong type or out of range, naming key, value and what is
                allowed.
        """
        checked = {}
        for key, value in values.items():
            if key not in _KNOWN:
                raise ValueError(f"unknown key {key!r} (= {value!r}): takes {', '.join(sorted(_KNOWN))}")
            checked[key] = _typed(key, value, _KNOWN[key])
        parts = {
            kind: kind(**{name: checked[name] for name in names if name in checked}) for kind, names in _PARTS.items()
        }
        return Run(parts[ToyConfig], parts[FeatureConfig], parts[TrainConfig], checked.get("seed", 0))

    @cached_property
    def key(self) -> str:
        """SHA-256 of the canonical configuration: the row's ``run_key``.

        Fields that came later are left out where they have their default, so that keys of older rows stay.
        """
        before, after = _around_seed(self.toy, self.features, self.training)
        return hashlib.sha256(f"{{{before}{self.seed}{after}}}".encode()).hexdigest()

    @property
    def group(self) -> tuple[Any, ...]:
        """Runs with equal ``group`` have the same tensor shapes and are trained as one stack."""
        toy = self.toy
        return (
            toy.n_features, toy.n_hidden, toy.n_experts, toy.top_k, toy.shared_hidden, toy.tied,
            self.training.steps, self.training.batch_size,
        )  # fmt: skip


Part = ToyConfig | FeatureConfig | TrainConfig
# A plan's runs share their parts, so what was seen lately is kept: by identity, since 0.0 and −0.0 are equal but have
# keys of their own, and with the parts, whose identities no others can get meanwhile.
_SEEN: dict[int, tuple[Part, list[str]]] = {}
_SEEN_TOGETHER: dict[tuple[int, ...], tuple[tuple[Part, ...], tuple[str, str]]] = {}
_MOST_SEEN = 1 << 12


def _around_seed(*parts: Part) -> tuple[str, str]:
    """Return the text of a configuration as a JSON object with sorted keys, before and after the seed's value."""
    place = tuple(map(id, parts))
    seen = _SEEN_TOGETHER.get(place)
    if seen is None:
        if len(_SEEN_TOGETHER) >= _MOST_SEEN:
            _SEEN_TOGETHER.clear()
        seed = '"seed":'
        texts = sorted([seed, *(text for part in parts for text in _texts(part))])
        at = texts.index(seed) + 1
        seen = _SEEN_TOGETHER[place] = parts, (",".join(texts[:at]), "".join(f",{text}" for text in texts[at:]))
    return seen[1]


def _texts(part: Part) -> list[str]:
    """Return the fields of a part that count for a key, each as in a JSON object."""
    seen = _SEEN.get(id(part))
    if seen is None:
        if len(_SEEN) >= _MOST_SEEN:
            _SEEN.clear()
        kept = {n: v for n, v in vars(part).items() if n not in _LATER or v != getattr(TrainConfig, n)}
        seen = _SEEN[id(part)] = part, [f'"{name}":{json.dumps(value)}' for name, value in kept.items()]
    return seen[1]


@lru_cache(maxsize=1024)
def _power_law_mean(n: int, exponent: float) -> float:
    return float(sum((i + 1) ** -exponent for i in range(n)) / n)


_KINDS = {"int": int, "float": float, "str": str, "bool": bool}
_PARTS: dict[type, dict[str, type]] = {
    kind: {f.name: _KINDS[str(f.type)] for f in dataclasses.fields(kind)}
    for kind in (ToyConfig, FeatureConfig, TrainConfig)
}
_KNOWN: dict[str, type] = {name: kind for part in _PARTS.values() for name, kind in part.items()} | {"seed": int}


def _check_types(config: ToyConfig | FeatureConfig | TrainConfig) -> None:
    """Give every field its declared type, so that 1 and 1.0 are one configuration with one key."""
    for name, kind in _PARTS[type(config)].items():
        object.__setattr__(config, name, _typed(name, getattr(config, name), kind))


def _typed(key: str, value: Any, kind: type) -> Any:
    if type(value) is kind:
        return value
    accepted = {int: numbers.Integral, float: numbers.Real}.get(kind, kind)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{key}={value!r}: takes a value of type {kind.__name__}, got {type(value).__name__}")
    return kind(value)
