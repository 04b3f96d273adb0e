"""The registers kernel, run by Triton's interpreter, against the CPU twin.

Triton decides between compiler and interpreter on import, so a process of its own trains every case (`results`).
"""

# Triton's front end takes no starred tuples.
# ruff: noqa: RUF005

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels import (
    EnsembleSettings,
    EnsembleShape,
    FeatureTable,
    ensemble_registers,
    sample_features,
    toy_unrolled,
)
from moesaic.kernels.ensemble import GATES, train_ensemble
from moesaic.kernels.ensemble_registers_math import draw
from moesaic.kernels.features import CLUSTERED, INDEPENDENT

# Losses, moments and parameters after three steps: worst element over the RMS of its section. The worst seen over the
# cases is 9e-6, of a second moment.
TOLERANCE = 2e-5
Trained = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Twelve models, every gate without and with a load-balance loss, that differ in every setting."""

    shape: EnsembleShape
    first_step: int = 3
    p: tuple[float, float] = (0.3, 1.0)


CASES = {
    # n, m, E, k, m0, tied, batch
    "one expert": Case(EnsembleShape(2, 1, 1, 1, 0, True, 32)),
    "two experts": Case(EnsembleShape(2, 1, 2, 1, 0, True, 64)),
    "three experts, ragged": Case(EnsembleShape(3, 2, 3, 1, 0, True, 40)),
    "two of three, ragged": Case(EnsembleShape(3, 2, 3, 2, 0, True, 33)),
    "three of three, untied, all features present": Case(EnsembleShape(3, 1, 3, 3, 0, False, 32), p=(1.0, 1.0)),
    "shared, untied": Case(EnsembleShape(3, 2, 2, 1, 2, False, 32)),
    "shared, two of two": Case(EnsembleShape(2, 1, 2, 2, 3, True, 32)),
    "one expert and a shared, untied, one sample": Case(EnsembleShape(4, 1, 1, 1, 1, False, 1)),
    "three blocks of random words": Case(EnsembleShape(9, 1, 2, 1, 0, True, 32)),
    "rare features": Case(EnsembleShape(3, 1, 3, 2, 0, True, 32), p=(0.02, 0.1)),
    "steps from 2**31 - 2 on": Case(EnsembleShape(2, 1, 2, 1, 0, True, 32), first_step=2**31 - 2),
    "the last steps": Case(EnsembleShape(2, 1, 2, 1, 0, True, 32), first_step=2**32 - 3),
}
MODELS, STEPS = 2 * len(GATES), 3


def make(case: Case) -> tuple[EnsembleSettings, Tensor, Tensor]:
    """Settings, initial state and learning rates."""
    n, generator = case.shape.n_features, torch.Generator().manual_seed(11)

    def between(low: float, high: float, *size: int) -> Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64) * (high - low) + low

    ones = torch.ones(MODELS, dtype=torch.int64)
    settings = EnsembleSettings(
        features=FeatureTable(ones * INDEPENDENT, between(*case.p, MODELS, n).float(), ones),
        importance=between(0.5, 1.5, MODELS, n).float(),
        gate=torch.arange(len(GATES)).repeat(2),
        seeds=torch.randint(-(2**62), 2**62, (MODELS,), generator=generator),
        weight_decay=between(0.5, 1.5, MODELS),
        beta1=between(0.8, 0.95, MODELS),
        beta2=between(0.98, 0.999, MODELS),
        eps=between(1e-4, 1e-3, MODELS),
        load_balance=torch.cat([torch.zeros(len(GATES), dtype=torch.float64), between(0.1, 0.5, len(GATES))]),
        scale=between(0.5, 1.5, MODELS).float() / case.shape.batch_size,
    )
    state = torch.randn(MODELS, case.shape.n_parameters, generator=generator) * 0.6
    return settings, state, between(1e-3, 1e-2, MODELS, STEPS)


def take(settings: EnsembleSettings, models: slice) -> EnsembleSettings:
    one = {f.name: getattr(settings, f.name)[models] for f in fields(settings) if f.name != "features"}
    table = settings.features
    return EnsembleSettings(FeatureTable(table.kind[models], table.probability[models], table.size[models]), **one)


def train(
    launch: Callable[..., tuple[Tensor, Tensor]], case: Case, *, cuts: tuple[int, ...] = (STEPS,),
    models: slice = slice(None), change: Callable[[Any], None] = lambda run: None,
) -> Trained:  # fmt: skip
    """Train by ``launch`` in calls of ``cuts`` steps, after ``change`` of what it gets."""
    settings, state, lr = make(case)
    run = SimpleNamespace(settings=take(settings, models), state=state[models], lr=lr[models], step=case.first_step)
    change(run)
    flat = run.state.clone()
    exp_avg, exp_avg_sq = torch.zeros_like(flat), torch.zeros_like(flat)
    found, at = [], 0
    for steps in cuts:
        part = run.lr[:, at : at + steps].contiguous()
        found.append(launch(case.shape, run.settings, flat, exp_avg, exp_avg_sq, part, first_step=run.step + at))
        at += steps
    losses, load_losses = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    out = {"losses": losses, "load_losses": load_losses}
    for name, values in {"state": flat, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}.items():
        out |= {f"{name} {section}": view.flatten(1) for section, view in case.shape.split(values).items()}
    return out


def train_cpu(case: Case, **options: Any) -> Trained:
    """Train by the CPU twin for any shape: the smallest shapes' own would be compiled for every gate."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_unrolled, "fits", lambda *sizes: False)
        return train(train_ensemble, case, **options)


def worst(ours: Trained, theirs: Trained) -> dict[str, float]:
    """Largest difference over the tensor's RMS, of all models."""
    found = {}
    for name in theirs:
        a, b = ours[name].double(), theirs[name].double()
        found[name] = float(((a - b).abs().amax(1) / b.square().mean(1).sqrt().clamp(min=1e-12)).max())
    return found


def too_far(ours: Trained, theirs: Trained) -> dict[str, float]:
    return {name: error for name, error in worst(ours, theirs).items() if not error < TOLERANCE}


def spoil(run: Any) -> None:
    run.state[3, -1] = torch.nan  # the router's, behind a switch gate
    run.state[5, 0] = torch.inf  # an expert's


def tie(run: Any) -> None:
    # Without a feature present all logits are equal; positive biases let every expert's output through.
    run.settings.features.probability.fill_(1e-9)
    run.state.abs_()


TIED = Case(EnsembleShape(3, 1, 3, 1, 0, True, 40)), Case(EnsembleShape(3, 1, 3, 2, 0, True, 40))
CUT, CUTS, SOME = CASES["three experts, ragged"], ((1, 1, 1), (1, 2)), slice(4, 10)
DRAWS = [(3, 0), (-5, 2**32 - 1), (2**62 + 9, 2**31)]
PROBABILITIES = torch.tensor([1.0, 1e-3, 0.975, 0.025, 1 / 3, 2**-20, 1e-38, 0.7, 0.1])
ROWS = 512


@triton.jit  # type: ignore[untyped-decorator]
def draw_kernel(Out: Any, Keys: Any, Features: Any, step: Any, n_blocks: Any, N: tl.constexpr) -> None:
    k0, k1 = tl.load(Keys).to(tl.uint32, bitcast=True), tl.load(Keys + 1).to(tl.uint32, bitcast=True)
    probability, inverse = (), ()
    for i in tl.static_range(N):
        probability = probability + (tl.load(Features + i),)  # type: ignore[assignment]
        inverse = inverse + (tl.load(Features + N + i),)  # type: ignore[assignment]
    for block in tl.range(0, n_blocks):
        row = block * 32 + tl.arange(0, 32)
        x = draw(k0, k1, row.to(tl.uint32), step.to(tl.uint32), probability, inverse, N)
        for i in tl.static_range(N):
            tl.store(Out + row * N + i, x[i])


def drawn(seed: int, step: int) -> Tensor:
    n = len(PROBABILITIES)
    out, keys = torch.empty(ROWS, n), torch.tensor([seed]).view(torch.int32)
    features = torch.stack([PROBABILITIES, 1 / PROBABILITIES])
    draw_kernel[(1,)](out, keys, features, step, ROWS // 32, N=n)
    return out


def fused_multiply_add(a: Any, b: Any, c: Any) -> Any:
    """a·b + c of float32 arrays, rounded once: the float64 sum is rounded to odd first."""
    product, c = a.astype(np.float64) * b, c.astype(np.float64)
    total = np.asarray(product + c)
    low = total - product
    error = (product - (total - low)) + (c - low)
    towards = np.where(error > 0, np.inf, -np.inf)
    inexact = np.isfinite(total) & (error != 0) & ((total.view(np.int64) & 1) == 0)
    return np.where(inexact, np.nextafter(total, towards), total).astype(np.float32)


def results() -> dict[str, Any]:
    from triton.runtime import interpreter

    warnings.simplefilter("error")
    # The interpreter's own multiply-add rounds twice, and the division's correction rests on one.
    interpreter.InterpreterBuilder.create_fma = lambda self, x, y, z: interpreter.TensorHandle(
        fused_multiply_add(x.data, y.data, z.data), z.dtype
    )
    torch.set_num_threads(1)
    launch = ensemble_registers.launch
    found: dict[str, Any] = {name: train(launch, case) for name, case in CASES.items()}
    found |= {f"in calls of {cuts}": train(launch, CUT, cuts=cuts, models=SOME) for cuts in CUTS}
    found |= {f"alone {s}": train(launch, CUT, models=slice(s, s + 1)) for s in (0, 7)}
    with np.errstate(all="ignore"):
        found["spoilt"] = train(launch, CUT, change=spoil, models=SOME)
    found |= {f"top {case.shape.top_k} of equals": train(launch, case, change=tie) for case in TIED}
    with np.errstate(over="ignore", invalid="ignore"):  # u/p where u ≥ p, for the smallest p
        found |= {f"drawn {at}": drawn(*key_and_step) for at, key_and_step in enumerate(DRAWS)}
    return found


@pytest.mark.parametrize("name", CASES)
def test_losses_moments_and_weights_equal_the_twin(name: str, interpreted: dict[str, Any]) -> None:
    theirs = train_cpu(CASES[name])
    assert too_far(interpreted[name], theirs) == {}
    assert torch.equal(theirs["load_losses"].any(1), torch.arange(MODELS) >= len(GATES))


@pytest.mark.parametrize("name", ["random", "oracle"])
def test_a_frozen_router_keeps_its_bits_and_reports_its_load(name: str, interpreted: dict[str, Any]) -> None:
    ours = interpreted["three experts, ragged"]
    router = CUT.shape.split(make(CUT)[1])["router"].flatten(1)
    for model in (GATES.index(name), GATES.index(name) + len(GATES)):
        assert torch.equal(ours["state router"][model], router[model])
        assert not any(ours[f"{kind} router"][model].any() for kind in ("exp_avg", "exp_avg_sq"))
    assert bool((ours["load_losses"][model] > 0).all())


def test_bits_do_not_depend_on_cuts_or_neighbours(interpreted: dict[str, Any]) -> None:
    whole = interpreted["three experts, ragged"]
    for cuts in CUTS:
        ours = interpreted[f"in calls of {cuts}"]
        assert all(torch.equal(whole[key][SOME], values) for key, values in ours.items()), cuts
    for model in (0, 7):
        alone = interpreted[f"alone {model}"]
        assert all(torch.equal(whole[key][model], values[0]) for key, values in alone.items()), model


def test_a_diverging_model_shows_nan_and_leaves_its_neighbours_alone(interpreted: dict[str, Any]) -> None:
    ours, theirs = interpreted["spoilt"], train_cpu(CUT, change=spoil, models=SOME)
    clean, broken, sound = interpreted["three experts, ragged"], [3, 5], [0, 1, 2, 4]
    assert all(torch.equal(ours[key][sound], clean[key][SOME][sound]) for key in clean)
    assert bool(ours["losses"][broken, 1:].isnan().all())
    assert torch.equal(ours["losses"].isnan(), theirs["losses"].isnan())


@pytest.mark.parametrize("case", TIED, ids=lambda case: f"top {case.shape.top_k}")
def test_equal_logits_go_to_the_lowest_expert(case: Case, interpreted: dict[str, Any]) -> None:
    k = case.shape.top_k
    ours = interpreted[f"top {k} of equals"]
    assert too_far(ours, train_cpu(case, change=tie)) == {}
    bias = ours["exp_avg bias"].view(MODELS, 3, 3)
    assert bool((bias[:, :k] != 0).all())
    assert not bias[:, k:].any()


@pytest.mark.parametrize("at", range(len(DRAWS)))
def test_samples_equal_the_library_bit_for_bit(at: int, interpreted: dict[str, Any]) -> None:
    seed, step = DRAWS[at]
    one = torch.tensor([1])
    table = FeatureTable(one * INDEPENDENT, PROBABILITIES[None], one)
    expected = sample_features(table, ROWS, seeds=torch.tensor([seed]), step=step)[0]
    assert torch.equal(interpreted[f"drawn {at}"], expected)
    assert int((expected > 0).sum()) > ROWS


def alter(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    def change(run: Any) -> None:
        run.settings = replace(run.settings, **{name: value(getattr(run.settings, name))})

    return change


def later(run: Any) -> None:
    run.step += 1


def dropped(run: Any) -> None:
    run.state[:, CUT.shape.n_features * CUT.shape.n_hidden :][:, : CUT.shape.n_features] = 0


@pytest.mark.parametrize(
    "change",
    [
        alter("weight_decay", torch.zeros_like),
        alter("importance", torch.ones_like),
        alter("load_balance", torch.zeros_like),
        alter("beta1", lambda beta: beta + 1e-3),
        alter("eps", lambda eps: eps * 10),
        alter("seeds", lambda seeds: seeds & 0xFFFFFFFF),
        alter("gate", lambda gate: gate * 0),
        later,
        dropped,
    ],
    ids=["decay", "importance", "balance", "beta1", "eps", "seed's high word", "gate", "step", "expert"],
)
def test_the_tolerance_can_fail(change: Callable[[Any], None], interpreted: dict[str, Any]) -> None:
    assert too_far(interpreted["three experts, ragged"], train_cpu(CUT, change=change)) != {}


def test_launches_each_gate_and_balance_with_tensors_of_the_state_s_device(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []

    class Recorder:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            return lambda *args, **constants: launched.append((grid, args, constants))

    monkeypatch.setattr(ensemble_registers, "_train_kernel", Recorder())
    settings, state, lr = make(CUT)
    # A meta tensor has no data, and PyTorch refuses to mix it with the settings, which are on the CPU.
    meta = state.to("meta")
    losses, load_losses = ensemble_registers.launch(CUT.shape, settings, meta, meta, meta, lr, 5)
    assert losses.shape == load_losses.shape == lr.shape
    assert losses.device == load_losses.device == meta.device
    assert {(constants["GATE"], constants["BALANCE"]) for _, _, constants in launched} == {
        (gate, balance) for gate in range(len(GATES)) for balance in (False, True)
    }
    for grid, args, constants in launched:
        tensors = [value for value in args if isinstance(value, Tensor)]
        signature, compiled, warps = ensemble_registers.signature_and_constants(
            CUT.shape, constants["GATE"], balance=constants["BALANCE"]
        )
        types = {"*fp32": torch.float32, "*i64": torch.int64, "*i32": torch.int32}
        assert [types.get(kind, kind) for kind in signature.values()] == [
            *(value.dtype for value in tensors), *["i32"] * 4, *["constexpr"] * len(compiled)
        ]  # fmt: skip
        assert all(value.device == meta.device and value.is_contiguous() for value in tensors)
        assert (grid, args[len(tensors) :]) == ((1,), (5, STEPS, 2, CUT.shape.batch_size))
        assert constants == compiled | {"num_warps": warps, "num_stages": 1}


def test_fits_small_models_of_up_to_three_experts_and_independent_features() -> None:
    shape = EnsembleShape(3, 2, 3, 1, 0, True, 512)
    assert ensemble_registers.fits_shape(shape)
    too_large: list[dict[str, Any]] = [{"n_experts": 4}, {"n_features": 20}, {"n_hidden": 11}, {"batch_size": 2**24}]
    for change in too_large:
        assert not ensemble_registers.fits_shape(replace(shape, **change)), change
    settings = make(Case(shape))[0]
    assert ensemble_registers.fits(shape, settings)
    kind = settings.features.kind.clone()
    kind[3] = CLUSTERED
    assert not ensemble_registers.fits(shape, replace(settings, features=replace(settings.features, kind=kind)))
