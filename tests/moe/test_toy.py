from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moesaic.kernels.reference_toy import toy_loss
from moesaic.moe import Run, ToyConfig, ToyModel
from moesaic.moe.config import GATES


def sparse(s: int, batch: int, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(s, batch, n, generator=generator) * (torch.rand(s, batch, n, generator=generator) < 0.4)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("k", "shared", "tied"), [(1, 0, True), (3, 2, False), (4, 0, False)])
def test_equals_computing_every_expert_and_masking(gate: str, k: int, shared: int, tied: bool) -> None:
    config = ToyConfig(15, 3, 4, k, gate=gate, shared_hidden=shared, tied=tied)
    model, x = ToyModel(config, seeds=[1, 2]).double(), sparse(2, 33, 15).double()
    error = (model(x) - x).square().sum((1, 2)) / 33
    for s in range(2):
        parts = {name: value[s] for name, value in model.named_parameters()}
        loss, _ = toy_loss(parts, x[s], top_k=k, gate=gate)
        assert error[s].item() == pytest.approx(loss.item(), rel=1e-12)
        ours = torch.autograd.grad(error[s], list(model.parameters()), retain_graph=True, allow_unused=True)
        theirs = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_only_the_routed_experts_are_computed() -> None:
    config, batch = ToyConfig(64, 4, 16, 2), 128
    model, x = ToyModel(config), sparse(1, batch, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    router, experts = 2 * batch * 64 * 16, 2 * batch * 2 * 64 * 4 * 2
    assert counter.get_total_flops() == router + experts


def test_mixed_gates_in_one_stack() -> None:
    configs = [ToyConfig(10, 2, 4, 2, gate=gate) for gate in GATES]
    x = sparse(6, 8, 10)
    stacked = ToyModel(configs, seeds=[3] * 6)
    for s in range(6):
        assert torch.equal(stacked(x)[s], stacked.select(s)(x[s]))


def test_shapes_and_refusals() -> None:
    model = ToyModel(ToyConfig(10, 2, 4, 2), seeds=[0, 1])
    assert model(torch.rand(7, 10)).shape == (2, 7, 10)
    assert model.select(1)(torch.rand(7, 10)).shape == (7, 10)
    assert model(torch.rand(2, 0, 10)).shape == (2, 0, 10)
    with pytest.raises(ValueError, match="x: takes"):
        model(torch.rand(7, 9))
    with pytest.raises(ValueError, match="seeds"):
        ToyModel([ToyConfig()], seeds=[0, 1])
    with pytest.raises(ValueError, match="one shape"):
        ToyModel([ToyConfig(5, 2), ToyConfig(5, 3)], seeds=[0, 1])
    with pytest.raises(IndexError, match="index=2"):
        model.select(2)


def test_ties_go_to_the_lowest_expert() -> None:
    routing = ToyModel(ToyConfig(10, 2, 4, 2)).route(torch.zeros(3, 10))
    assert routing.ids.tolist() == [[[0, 1]] * 3]


def test_from_runs_takes_the_clusters_of_the_data() -> None:
    runs = [
        Run.from_flat({"n_features": 8, "n_experts": 2, "gate": "oracle", "features": "clustered", "n_clusters": 4})
    ]
    assert ToyModel.from_runs(runs).router[0].sum(1).tolist() == [4.0, 4.0]
