from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moesaic.kernels import EnsembleSettings, EnsembleShape, FeatureTable, toy_unrolled, train_ensemble
from moesaic.kernels.ensemble import GATES
from moesaic.kernels.features import INDEPENDENT

BATCH = 50
# Every gate with its router's gradient; random and oracle share the code of "frozen". Each case is seconds of
# compilation; those of 3, 2, 2, 1 are trained by other tests too.
CASES = [
    # n, m, E, k, gate, load_balance
    *((n, m, e, 1, "paper", 0.1) for n, m, e in ((3, 2, 2), (3, 2, 3))),
    (3, 2, 3, 2, "switch", 0.1),
    (3, 2, 2, 1, "switch", 0.0),
    (2, 1, 1, 1, "sigmoid", 0.1),
    (3, 2, 2, 1, "straight_through", 0.1),
    (5, 1, 2, 2, "oracle", 0.0),
]


def trained(case: tuple[int, int, int, int, str, float], **changed: float) -> tuple[Tensor, Tensor, Tensor]:
    """Train 6 models for 100 steps and return losses, load-balance losses and weights."""
    n, m, n_experts, k, gate, load_balance = case
    shape = EnsembleShape(n, m, n_experts, k, 0, True, BATCH)
    generator, models, steps = torch.Generator().manual_seed(7), 6, 100

    def full(name: str, value: float) -> Tensor:
        return torch.full((models,), changed.get(name, value), dtype=torch.float64)

    settings = EnsembleSettings(
        features=FeatureTable(
            torch.full((models,), INDEPENDENT),
            torch.rand(models, n, generator=generator) * 0.7 + 0.2,
            torch.ones(models).long(),
        ),
        importance=torch.rand(models, n, generator=generator) + 0.5,
        gate=torch.full((models,), GATES.index(gate)),
        seeds=torch.arange(models) + 2**40,
        scale=torch.full((models,), 1 / BATCH),
        weight_decay=full("weight_decay", 0.01), beta1=full("beta1", 0.9), beta2=full("beta2", 0.999),
        eps=full("eps", 1e-8), load_balance=full("load_balance", load_balance),
    )  # fmt: skip
    state = torch.randn(models, shape.n_parameters, generator=generator) * 0.5
    moments = torch.zeros_like(state), torch.zeros_like(state)
    lr = torch.full((models, steps), 3e-3, dtype=torch.float64)
    losses, load_losses = train_ensemble(shape, settings, state, *moments, lr)
    return losses, load_losses, state


def apart(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> float:
    """The largest difference of typical entries (nine in ten; a ReLU's kink can throw a single one far off)."""
    return max(float((a - b).abs().quantile(0.9)) for a, b in zip(ours, theirs, strict=True))


ALLOWED = 5e-7  # the worst case gives 6e-8, an ulp or less of weights and losses around 1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_unrolled_step_is_the_grouped_one(
    case: tuple[int, int, int, int, str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = trained(case)
    made: list[object] = []
    monkeypatch.setattr(toy_unrolled, "unrolled_trainer", made.append)
    monkeypatch.setattr(toy_unrolled, "fits", lambda *sizes: False)
    theirs = trained(case)
    assert not made
    assert apart(ours, theirs) < ALLOWED
    assert float(ours[0][:, -20:].mean()) < 0.9 * float(ours[0][:, :20].mean())


@pytest.mark.parametrize("changed", [{"weight_decay": 0.0}, {"load_balance": 0.09}, {"eps": 1e-5}], ids=str)
def test_the_agreement_can_fail(changed: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    case = (3, 2, 3, 2, "switch", 0.1)
    ours = trained(case)
    monkeypatch.setattr(toy_unrolled, "fits", lambda *sizes: False)
    theirs = trained(case, **changed)
    assert apart(ours, theirs) > 5 * ALLOWED


def test_takes_the_models_it_is_made_for() -> None:
    assert toy_unrolled.fits(3, 2, 3, 0, True)
    assert not toy_unrolled.fits(3, 2, 4, 0, True)
    assert not toy_unrolled.fits(3, 2, 3, 1, True)
    assert not toy_unrolled.fits(3, 2, 3, 0, False)
    assert toy_unrolled.fits(16, 2, 1, 0, True)
    assert not toy_unrolled.fits(17, 2, 1, 0, True)


def test_a_stack_of_many_kinds_is_trained_like_its_parts() -> None:
    n, m, n_experts, k, models, steps = 3, 2, 2, 1, 7, 5
    shape = EnsembleShape(n, m, n_experts, k, 0, True, BATCH)
    gates = [GATES.index(name) for name in ("paper", "paper", "random", "oracle", "paper", "switch", "switch")]
    kinds = torch.tensor([0, 0, 0, 0, 1, 0, 0])  # one of correlated features
    generator = torch.Generator().manual_seed(1)
    settings = EnsembleSettings(
        features=FeatureTable(kinds, torch.full((models, n), 0.5), torch.full((models,), 3)),
        importance=torch.ones(models, n), gate=torch.tensor(gates), seeds=torch.arange(models),
        scale=torch.full((models,), 1 / BATCH), beta1=torch.full((models,), 0.9).double(),
        weight_decay=torch.full((models,), 0.01).double(), beta2=torch.full((models,), 0.999).double(),
        eps=torch.full((models,), 1e-8).double(),
        load_balance=torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.0]).double(),
    )  # fmt: skip
    start = torch.randn(models, shape.n_parameters, generator=generator)
    lr = torch.full((models, steps), 1e-2, dtype=torch.float64)

    def train(chosen: slice) -> tuple[Tensor, Tensor, Tensor]:
        state = start[chosen].clone()
        table = FeatureTable(*(value[chosen] for value in vars(settings.features).values()))
        part = EnsembleSettings(
            table, **{f.name: getattr(settings, f.name)[chosen] for f in dataclasses.fields(settings)[1:]}
        )
        moments = torch.zeros_like(state), torch.zeros_like(state)
        return (*train_ensemble(shape, part, state, *moments, lr[chosen]), state)

    whole = train(slice(None))
    for i in range(models):
        assert all(torch.equal(a[0], b[i]) for a, b in zip(train(slice(i, i + 1)), whole, strict=True)), i


def test_the_module_is_named_by_its_content_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    toy_unrolled._folder.cache_clear()
    try:
        trainer = toy_unrolled.unrolled_trainer.__wrapped__(2, 1, 1, 1, "paper", False)
        again = toy_unrolled.unrolled_trainer.__wrapped__(2, 1, 1, 1, "paper", False)
        other = toy_unrolled.unrolled_trainer.__wrapped__(2, 1, 2, 1, "paper", True)
        assert trainer.__module__ == again.__module__ != other.__module__
        assert sorted(path.stem for path in (tmp_path / "moesaic").glob("*.py")) == sorted(
            [trainer.__module__, other.__module__]
        )
    finally:
        toy_unrolled._folder.cache_clear()


def test_without_a_place_to_write_a_temporary_folder_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    folder = toy_unrolled._folder.__wrapped__()
    assert folder.is_dir()
    assert not folder.is_relative_to(tmp_path)
    folder.rmdir()
