from __future__ import annotations

import dataclasses
import math
from typing import Any

import numba
import numpy as np
import pytest
import torch
from torch import Tensor

from moesaic.kernels import EnsembleEvaluation, EnsembleShape, evaluate_cpu, evaluate_ensemble
from moesaic.kernels.ensemble import GATES

SHAPES = [
    # n, m, E, k, m0, tied, batch (unused)
    EnsembleShape(2, 1, 1, 1, 0, True, 1),
    EnsembleShape(3, 2, 3, 1, 0, True, 1),
    EnsembleShape(5, 3, 4, 2, 3, False, 1),
    EnsembleShape(6, 7, 5, 5, 2, True, 1),
    EnsembleShape(20, 9, 12, 1, 0, True, 1),
    EnsembleShape(33, 17, 9, 3, 4, False, 1),
    EnsembleShape(24, 4, 70, 8, 0, True, 1),
]
# fp32 forward passes against float64, worst element over the tensor's RMS. The worst seen over all cases is 2e-7.
TOLERANCE = 1e-6


def make(shape: EnsembleShape, models: int = 3, samples: int = 777) -> dict[str, Any]:
    """Return random models of every gate on two batches with all-zero rows, and strengths around the threshold."""
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(2, samples, shape.n_features, generator=generator)
    x *= torch.rand(x.shape, generator=generator) < torch.tensor([0.2, 0.8])[:, None, None]
    experts = shape.n_experts + (shape.shared_hidden > 0)
    return {
        "gate": torch.arange(models) % len(GATES),
        "state": torch.randn(models, shape.n_parameters, generator=generator),
        "samples": x,
        "batch": torch.arange(models) % 2,
        "square_norms": torch.rand(models, experts, shape.n_features, generator=generator, dtype=torch.float64) * 1.5,
    }


def oracle(shape: EnsembleShape, given: dict[str, Any], mutation: str | None = None) -> EnsembleEvaluation:
    """Evaluate in float64, every expert on every sample, then masked."""
    rows = []
    for s, flat in enumerate(given["state"].double()):
        parts = {name: view[0] for name, view in shape.split(flat[None]).items()}
        x, q = given["samples"][given["batch"][s]].double(), given["square_norms"][s]
        if mutation == "rows shifted by one":
            x = x.roll(1, 1)
        scores = x @ parts["router"].T
        order = torch.sort(scores, dim=-1, descending=True, stable=mutation != "last of ties").indices
        if mutation == "last of ties":
            order = torch.sort(scores.flip(1), dim=-1, descending=True, stable=True).indices
            order = shape.n_experts - 1 - order
        chosen = torch.zeros_like(scores).scatter(1, order[:, : shape.top_k], 1.0)
        if mutation == "top-k left out":
            chosen = torch.ones_like(scores)
        probs = torch.softmax(scores, -1)
        gate = "paper" if mutation == "gate ignored" else GATES[int(given["gate"][s])]
        w = {"switch": probs * chosen, "sigmoid": torch.sigmoid(scores) * chosen}.get(
            gate, probs * chosen / (probs * chosen).sum(-1, keepdim=True)
        )
        out = torch.zeros_like(x)
        for e in range(shape.n_experts):
            if mutation == "expert dropped" and e == 0:
                continue
            decoder = parts.get("decoder", parts["weight"])[e]
            out += w[:, e : e + 1] * torch.relu(x @ parts["weight"][e] @ decoder.T + parts["bias"][e])
        shared = shape.shared_hidden and mutation != "shared expert left out"
        if shared:
            decoder = parts.get("shared_decoder", parts["shared_weight"])
            out += torch.relu(x @ parts["shared_weight"] @ decoder.T + parts["shared_bias"])
        columns = w if not shape.shared_hidden else torch.cat([w, torch.full_like(w[:, :1], float(shared))], 1)
        folded = columns @ q
        seen = (x != 0) & (folded > (0.6 if mutation == "threshold moved" else 0.5))
        rows.append(
            EnsembleEvaluation(
                squared_error=(x - out).square().sum(0),
                assignments=chosen.sum(0).long(),
                gate_sums=w.sum(0),
                prob_sums=probs.sum(0),
                represented=seen.sum(0),
                carried=q * (columns.T @ torch.where(seen, 1 / folded, 0.0)),
            )
        )
    return EnsembleEvaluation(
        *(torch.stack(parts) for parts in zip(*(vars(row).values() for row in rows), strict=True))
    )


def errors(found: EnsembleEvaluation, expected: EnsembleEvaluation) -> dict[str, float]:
    """Worst element over the RMS of each model's tensor; counts must be equal."""
    worst = {}
    for name, ours in vars(found).items():
        theirs = getattr(expected, name)
        for s in range(len(ours)):
            scale = theirs[s].double().square().mean().sqrt().clamp(min=1e-12)
            worst[f"{name} {s}"] = float((ours[s] - theirs[s]).abs().max() / scale)
            if not ours.is_floating_point() and not torch.equal(ours[s], theirs[s]):
                worst[f"{name} {s}"] = math.inf
    return worst


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_equal_the_definition(shape: EnsembleShape) -> None:
    given = make(shape, models=len(GATES))
    worst = errors(evaluate_ensemble(shape, **given), oracle(shape, given))
    assert {name: error for name, error in worst.items() if not error < TOLERANCE} == {}


@pytest.mark.parametrize(
    "mutation",
    [
        "rows shifted by one", "expert dropped", "gate ignored", "shared expert left out", "top-k left out",
        "threshold moved", "last of ties",
    ],
)  # fmt: skip
def test_the_tolerance_can_fail(mutation: str) -> None:
    shape = SHAPES[2]
    given = make(shape)
    assert max(errors(evaluate_ensemble(shape, **given), oracle(shape, given, mutation)).values()) > 100 * TOLERANCE


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[5]], ids=str)
def test_bits_do_not_depend_on_neighbours_threads_or_batches(shape: EnsembleShape) -> None:
    given = make(shape, models=37)
    threads = numba.get_num_threads()
    together = evaluate_ensemble(shape, **given)
    numba.set_num_threads(1)
    try:
        one_thread = evaluate_ensemble(shape, **given)
    finally:
        numba.set_num_threads(threads)
    for name, value in vars(together).items():
        assert torch.equal(getattr(one_thread, name), value), name
    for s in range(37):
        one = {name: value[s : s + 1] for name, value in given.items() if name not in ("samples", "batch")}
        samples = given["samples"][int(given["batch"][s])][None].clone()
        alone = evaluate_ensemble(shape, **one, samples=samples, batch=torch.zeros(1, dtype=torch.int64))
        for name, value in vars(together).items():
            assert torch.equal(getattr(alone, name)[0], value[s]), (s, name)


@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[4]], ids=str)
@pytest.mark.parametrize("samples", [0, 1, 15, 16, 257, 1025])
def test_any_number_of_samples(shape: EnsembleShape, samples: int) -> None:
    given = make(shape, samples=samples)
    found = evaluate_ensemble(shape, **given)
    assert found.assignments.sum(1).tolist() == [samples * shape.top_k] * 3
    if samples:
        assert max(errors(found, oracle(shape, given)).values()) < TOLERANCE


def test_a_sample_without_features_goes_to_the_first_experts() -> None:
    shape = SHAPES[2]
    given = make(shape)
    found = evaluate_ensemble(shape, **{**given, "samples": torch.zeros(2, 50, shape.n_features)})
    assert found.assignments.tolist() == [[50, 50, 0, 0]] * 3
    assert not found.represented.any()
    torch.testing.assert_close(found.prob_sums, torch.full((3, 4), 12.5, dtype=torch.float64))


@pytest.mark.parametrize("section", ["weight", "bias", "router"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[4]], ids=str)
def test_a_broken_model_shows_and_leaves_its_neighbours_alone(shape: EnsembleShape, section: str, value: float) -> None:
    given = make(shape)
    clean = evaluate_ensemble(shape, **given)
    given["state"] = given["state"].clone()
    shape.split(given["state"])[section][1] = value
    broken = evaluate_ensemble(shape, **given)
    assert not bool(broken.squared_error[1].isfinite().all())
    for name, before in vars(clean).items():
        assert torch.equal(getattr(broken, name)[[0, 2]], before[[0, 2]])


def test_an_infinite_expert_that_is_never_chosen_does_no_harm() -> None:
    shape = EnsembleShape(3, 2, 2, 1, 0, True, 1)
    given = make(shape, models=1)
    sections = shape.split(given["state"])
    sections["router"][0] = torch.tensor([[1.0], [-1.0]])
    sections["weight"][0, 1] = math.inf
    found = evaluate_ensemble(shape, **given)
    assert found.assignments[0, 1] == 0
    assert bool(found.squared_error.isfinite().all())


def test_exp_is_within_two_ulp_and_keeps_nan() -> None:
    @numba.njit
    def exps(values: Any, out: Any) -> None:
        for i in range(values.shape[0]):
            out[i] = evaluate_cpu._exp(values[i])

    values = np.concatenate([-np.geomspace(1e-8, 87, 20_001), [0.0]]).astype(np.float32)
    out = np.empty_like(values)
    exps(values, out)
    exact = np.exp(values.astype(np.float64))
    assert float(np.max(np.abs(out - exact) / np.spacing(exact.astype(np.float32)))) < 1.5
    special = np.array([math.nan, -math.inf, -200.0], np.float32)
    exps(special, out)
    assert math.isnan(out[0])
    assert out[1] == out[2] < 2e-38


def test_wrong_tensors_are_refused_by_name() -> None:
    shape = SHAPES[2]
    given = make(shape)
    wrong = {
        "gate": given["gate"].int(),
        "state": given["state"][:, :-1],
        "samples": given["samples"].double(),
        "batch": given["batch"][:2],
        "square_norms": given["square_norms"][:, :-1],
    }
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"{name}: takes"):
            evaluate_ensemble(shape, **{**given, name: value})
    for place in (-1, 2):
        with pytest.raises(ValueError, match=rf"batch=\[{place}, .*takes integers from 0 to 1"):
            evaluate_ensemble(shape, **{**given, "batch": torch.tensor([place, 0, 0])})


def test_no_models_give_empty_sums() -> None:
    shape = dataclasses.replace(SHAPES[2], top_k=1)
    given = {name: value if name == "samples" else value[:0] for name, value in make(shape).items()}
    found = evaluate_ensemble(shape, **given)
    assert found.carried.shape == (0, 5, 5)
    assert isinstance(found.squared_error, Tensor)
