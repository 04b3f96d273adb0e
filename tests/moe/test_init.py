from __future__ import annotations

import pytest
import torch

from moesaic.moe import ToyConfig
from moesaic.moe.init import initial_parameters, initial_router


def parameters(**kwargs: object) -> dict[str, torch.Tensor]:
    config = ToyConfig(**({"n_features": 200, "n_hidden": 50, "n_experts": 4} | kwargs))  # type: ignore[arg-type]
    return {name: value[0] for name, value in initial_parameters([config], [7], [0]).items()}


@pytest.mark.parametrize(
    ("name", "weight", "bias", "router"),
    [
        ("paper", (2 / (204 * 50)) ** 0.5, (2 / 204) ** 0.5, (2 / 204) ** 0.5),
        ("tms", (2 / 250) ** 0.5, 0.0, (2 / 204) ** 0.5),
        ("large_n", 50**-0.5, 0.0, 50**-0.5),
        ("small", 0.03, 0.0, 0.03),
    ],
)
def test_standard_deviations(name: str, weight: float, bias: float, router: float) -> None:
    values = parameters(parametrization=name)
    # 40,000 weights and 800 biases: 6 standard errors of a standard deviation.
    assert values["weight"].std().item() == pytest.approx(weight, rel=6 / (2 * 40_000) ** 0.5)
    assert values["bias"].square().mean().sqrt().item() == pytest.approx(bias, rel=6 / (2 * 800) ** 0.5)
    assert values["router"].square().mean().sqrt().item() == pytest.approx(router, rel=6 / (2 * 800) ** 0.5)


def test_a_shared_expert_or_an_untied_decoder_changes_nothing_else() -> None:
    plain, more = parameters(), parameters(shared_hidden=3, tied=False)
    assert all(torch.equal(plain[name], more[name]) for name in plain)
    assert torch.equal(more["decoder"], more["weight"])
    assert torch.equal(more["shared_decoder"], more["shared_weight"])


def test_seeds_differ_and_repeat() -> None:
    config = ToyConfig(20, 5, 4)
    stack = initial_parameters([config] * 3, [1, 2, 1], [0] * 3)["weight"]
    assert torch.equal(stack[0], stack[2])
    assert not torch.equal(stack[0], stack[1])


def test_routers() -> None:
    hot = initial_router(ToyConfig(10, 2, 5, router_init="k_hot"), 3)
    assert hot.sum(0).tolist() == [1.0] * 10
    assert hot.sum(1).tolist() == [2.0] * 5
    assert torch.equal(initial_router(ToyConfig(4, 2, 2, router_init="diagonal"), 0), torch.eye(2, 4))
    oracle = initial_router(ToyConfig(12, 2, 2, gate="oracle"), 0, n_clusters=4)
    assert oracle.tolist() == [[1.0] * 6 + [0.0] * 6, [0.0] * 6 + [1.0] * 6]
