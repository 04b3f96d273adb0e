from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from moesaic.moe import FeatureConfig, Run, ToyConfig, TrainConfig
from moesaic.moe.config import _MOST_SEEN, _SEEN


def test_flat_round_trip_and_key() -> None:
    run = Run(
        ToyConfig(128, 4, 16, 2, gate="switch"),
        FeatureConfig("clustered", 0.5, n_clusters=16),
        TrainConfig(lr=0.01),
        seed=3,
    )
    assert Run.from_flat(run.flat()) == run
    assert Run.from_flat(run.flat()).key == run.key
    assert dataclasses.replace(run, seed=4).key != run.key


def test_key_does_not_depend_on_int_or_float_spelling() -> None:
    assert Run(training=TrainConfig(lr=1)).key == Run(training=TrainConfig(lr=1.0)).key


def test_key_is_stable_across_versions() -> None:
    # Changing this breaks --resume on every folder out there.
    assert Run().key == "1219a2767ee6e82f93d16ac4e846acf061be1d20ba8e216873fe6dee97641bf0"


def test_keys_of_stored_rows_stay() -> None:
    large = TrainConfig(decode="sampled", n_negatives=4096, eps=1e-15)
    clustered = FeatureConfig("clustered", 0.5, n_clusters=16)
    keys = [
        Run(ToyConfig(128, 4, 16, 2, gate="switch"), clustered, TrainConfig(lr=0.01), 3).key,
        Run(ToyConfig(20000, 64, tied=False), FeatureConfig("power_law", 0.0004), large, 2**62).key,
        Run(training=TrainConfig(lr=0.0, weight_decay=0.0, moments="bf16")).key,
        Run(training=TrainConfig(lr=-0.0, weight_decay=0.0, moments="bf16")).key,
    ]
    assert keys == [
        "caed7da3b8f815ead4530b1cdb7ce0421f42f0bae66ba35a00b0dde57ff622c9",
        "075a340735b57542941a919b09f52cf05bd2e943d3d53694c3d1d2d5e4235f71",
        "2c6f2982753886274a609ef49d529219de64f61ed8d6fed764cbfc19b39db67d",
        "77873b3e6ca64640641b94b44160c4f6bf1a70d95e1cf1a82833fc6131b017e2",
    ]


def test_keys_do_not_depend_on_what_was_asked_before() -> None:
    # More parts than are remembered, so that identities of parts are used again.
    for _ in range(2):
        for i in range(5000):
            Run(training=TrainConfig(steps=i)).key  # noqa: B018
    assert len({Run(training=TrainConfig(steps=i)).key for i in range(300)}) == 300
    assert Run(training=TrainConfig(steps=299)).key == Run.from_flat({"steps": 299}).key
    assert len(_SEEN) <= _MOST_SEEN


def test_group_joins_what_can_be_stacked() -> None:
    base = Run(ToyConfig(8, 2, 4))
    assert dataclasses.replace(base, seed=1).group == base.group
    assert (
        Run(ToyConfig(8, 2, 4, gate="switch"), FeatureConfig("exactly_k", n_active=2), TrainConfig(lr=1.0)).group
        == base.group
    )
    assert Run(ToyConfig(8, 2, 2)).group != base.group
    assert Run(ToyConfig(8, 2, 4), training=TrainConfig(steps=5)).group != base.group


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_k": 3, "n_experts": 2}, r"top_k=3: takes 1 to n_experts=2"),
        ({"n_features": 0}, r"n_features=0: takes a finite number >= 1"),
        ({"n_features": 2.5}, r"n_features=2.5: takes a value of type int"),
        ({"feature_probability": 0.0}, r"feature_probability=0.0: takes a number in \(0, 1\]"),
        ({"feature_probability": float("nan")}, "feature_probability=nan"),
        ({"gate": "hard"}, r"gate='hard': takes one of paper, switch"),
        ({"tied": 1}, r"tied=1: takes a value of type bool"),
        ({"n_feature": 4}, r"unknown key 'n_feature' \(= 4\): takes .*n_features"),
        ({"features": "clustered"}, r"n_clusters=0: takes a finite number >= 1"),
        ({"features": "clustered", "n_clusters": 3}, r"n_clusters=3: takes a divisor of n_features=5"),
        ({"n_clusters": 5}, r"n_clusters=5: takes 0 when features='independent'"),
        ({"features": "anticorrelated", "group_size": 5, "feature_probability": 0.3}, r"at most 1/group_size = 0.2"),
        ({"features": "exactly_k", "n_active": 6}, r"n_active=6: takes 1 to n_features=5"),
        ({"features": "power_law", "feature_probability": 0.9}, r"feature_probability=0.9: takes at most"),
        ({"n_experts": 8, "router_init": "k_hot"}, r"router_init='k_hot'"),
        ({"beta1": 1.0}, r"beta1=1.0: takes a number in \[0, 1\)"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"importance": "geometric", "importance_base": -1.0}, "importance_base=-1.0"),
        ({"steps": -1}, "steps=-1"),
        ({"steps": 2**32}, r"steps=4294967296: takes an integer below 2\*\*32"),
        (
            {"features": "exactly_k", "n_active": 2, "feature_probability": 0.2},
            "feature_probability=0.2: leave it at 0.1",
        ),
        ({"power_law_exponent": 2.0}, "power_law_exponent=2.0: leave it at 1.0"),
        ({"importance_base": 0.5}, "importance_base=0.5: leave it at 0.9"),
        ({"lr": float("inf")}, "lr=inf"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_refuses_naming_key_value_and_what_is_allowed(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Run.from_flat(values)


def test_learning_rate_schedules() -> None:
    assert [TrainConfig(steps=4, lr=1.0).lr_at(t) for t in range(4)] == [1.0] * 4
    assert [TrainConfig(steps=4, lr=1.0, schedule="linear").lr_at(t) for t in range(4)] == [1.0, 0.75, 0.5, 0.25]
    cosine = [TrainConfig(steps=4, lr=1.0, schedule="cosine").lr_at(t) for t in range(4)]
    assert cosine == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-6)
    assert [TrainConfig(steps=4, lr=1.0, warmup_steps=2).lr_at(t) for t in range(4)] == [0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "bad", [{"n_hidden": 2.5}, {"n_features": "a"}, {"tied": "no"}, {"n_experts": True}, {"gate": 3}]
)
def test_types_are_checked_from_python_too(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))}=.*takes a value of type"):
        ToyConfig(**bad)


def test_numpy_numbers_are_numbers() -> None:
    assert ToyConfig(np.int64(8), 2) == ToyConfig(8, 2)  # type: ignore[arg-type]
    assert type(TrainConfig(lr=np.float32(0.5)).lr) is float  # type: ignore[arg-type]
