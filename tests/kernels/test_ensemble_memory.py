"""The kernel that keeps its state in memory, in Triton's interpreter and through its compiler.

The interpreter is chosen when Triton is imported, so a process of its own trains every case there (`results`); the
tests compare with the CPU twin.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# Triton compiles a function whose parameters are pointers of any type.

from __future__ import annotations

import dataclasses
import os
from typing import Any
from unittest.mock import patch

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
    ensemble_memory,
    sample_features,
    train_ensemble,
)
from moesaic.kernels.ahead_of_time import compile_ahead
from moesaic.kernels.ensemble import GATES, executed_samples
from moesaic.kernels.ensemble_compile import compile_report
from moesaic.kernels.ensemble_memory_features import draw_features
from moesaic.kernels.features import ANTICORRELATED, CLUSTERED, CORRELATED, EXACTLY_K, INDEPENDENT

ALL = bool(os.environ.get("MOESAIC_ALL_TILES"))
KINDS = (INDEPENDENT, CORRELATED, ANTICORRELATED, CLUSTERED)
STEPS, BIG = 2, 2**31 + 7  # as an int32, BIG is negative
# n, m, E, k, m0, tied, batch; models: one per gate, the twelve with and without load balance; first step
CASES = {
    "one expert": (EnsembleShape(16, 3, 1, 1, 0, True, 50), 12, 0),
    "one of four": (EnsembleShape(18, 5, 4, 1, 0, True, 40), 12, 3),
    "two of four, untied, shared": (EnsembleShape(8, 3, 4, 2, 5, False, 33), 12, 0),
    "all of five": (EnsembleShape(16, 2, 5, 5, 0, True, 24), 6, 1),
    "two of eight, untied": (EnsembleShape(20, 4, 8, 2, 0, False, 61), 4, BIG),
    "one hidden unit": (EnsembleShape(17, 1, 8, 1, 0, False, 50), 4, 0),
    "one expert, shared": (EnsembleShape(20, 6, 1, 1, 1, True, 24), 6, 0),
    "widest": (EnsembleShape(128, 32, 4, 1, 0, True, 40), 2, 0),
}
# Where one model's state is made NaN or infinite: case, models of the stack, the broken one, section, value.
BROKEN = [
    ("one of four", slice(0, 3), 0, "router", torch.nan),
    ("two of four, untied, shared", slice(1, 4), 2, "router", torch.nan),
    ("two of four, untied, shared", slice(0, 2), 1, "weight", torch.inf),
    ("one expert", slice(2, 4), 2, "router", -torch.inf),
]
# Relative errors of losses; worst errors of the moments over the RMS of their section, and of the state over the
# learning rate.
TOLERANCE = {
    "losses": 1e-6,
    "load losses": 1e-6,
    "exp_avg": 2e-5,
    "exp_avg_sq": 2e-5,
    "state": 2e-4,
    "a single weight": 1e-2,
}


def settings_for(shape: EnsembleShape, models: int) -> tuple[EnsembleSettings, Tensor, Tensor]:
    """Models that differ in all settings, their initial states and learning rates."""
    n, number = shape.n_features, torch.arange(models)
    generator = torch.Generator().manual_seed(shape.n_experts)

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * torch.rand(models, *size, generator=generator, dtype=torch.float64)

    # Rare features leave samples that are zero, whose experts all tie; two equal rows of the router tie on any sample.
    p, state = uniform(0.03, 0.25, n).float(), uniform(-0.6, 0.7, shape.n_parameters).float()
    p[:, -1], p[:, -2] = 1.0, 1e-20
    if shape.n_experts > 2:
        router = shape.split(state)["router"]
        router[:, 2] = router[:, 1]
    size = torch.full((models,), 4 if n % 4 == 0 else 2 if n % 2 == 0 else 1)
    settings = EnsembleSettings(
        features=FeatureTable(number % (1 if n % 2 else len(KINDS)), p, size),
        importance=uniform(0.3, 1.5, n).float(),
        gate=number % len(GATES),
        seeds=number * 2**40 - 5,
        weight_decay=uniform(0, 0.5),
        beta1=uniform(0.8, 0.95),
        beta2=uniform(0.9, 0.999),
        eps=uniform(1e-6, 1e-4),
        load_balance=torch.where((number + number // len(GATES)) % 2 == 0, 0.0, uniform(0.05, 0.5)),
        scale=uniform(0.3, 1).float() / shape.batch_size,
    )
    return settings, state, uniform(1e-3, 2e-2, STEPS)


def subset(settings: EnsembleSettings, models: slice) -> EnsembleSettings:
    fields = {field.name: getattr(settings, field.name)[models] for field in dataclasses.fields(settings)[1:]}
    table = settings.features
    return EnsembleSettings(FeatureTable(table.kind[models], table.probability[models], table.size[models]), **fields)


def train(
    shape: EnsembleShape, settings: EnsembleSettings, state: Tensor, lr: Tensor, first: int, in_triton: bool,
    pieces: int = STEPS,
) -> dict[str, Tensor]:  # fmt: skip
    """Train for all of ``lr``'s steps, ``pieces`` of them per call, with the kernel or with its CPU twin."""
    state = state.clone()
    m1, m2 = torch.zeros_like(state), torch.zeros_like(state)
    trainer = ensemble_memory.launch if in_triton else train_ensemble
    parts = []
    for at in range(0, lr.shape[1], pieces):
        args = (shape, settings, state, m1, m2, lr[:, at : at + pieces].contiguous())
        parts.append(trainer(*args, first_step=first + at))
    losses, load_losses = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return {"losses": losses, "load losses": load_losses, "state": state, "exp_avg": m1, "exp_avg_sq": m2}


@triton.jit
def _draw_kernel(Out, Seeds, Steps, Probability, Inverse, size, N: tl.constexpr, KIND: tl.constexpr, B: tl.constexpr):
    rows, n = tl.arange(0, B), tl.arange(0, 16)
    data = (tl.load(Seeds), tl.load(Steps).to(tl.uint32), Probability, Inverse, size)
    for first in range(0, N, 16):
        x = draw_features(data, rows, first, N, 16, KIND)
        tl.store(Out + rows[:, None] * N + first + n[None, :], x, mask=(first + n < N)[None, :])


def draw_table(kind: int) -> FeatureTable:
    p = torch.rand(1, 20, generator=torch.Generator().manual_seed(kind)) * 0.9 + 0.05
    p[0, 5], p[0, 8], p[0, 9] = 1.0, 1e-38, 1e-9
    return FeatureTable(torch.tensor([kind]), p, torch.tensor([5]))


def draws(kind: int, seed: int) -> Tensor:
    out, table = torch.full((64, 20), torch.nan), draw_table(kind)
    inverse = 1 / table.probability.clamp(min=1e-30)
    seeds, steps = torch.tensor([seed]), torch.tensor([BIG])
    _draw_kernel[(1,)](out, seeds, steps, table.probability, inverse, 5, N=20, KIND=kind, B=64)
    return out


class _Guarded:
    """Stands in for ``torch.empty``: gives NaN between margins of NaN, which nobody may write."""

    def __init__(self) -> None:
        self.all: list[Tensor] = []
        self._full = torch.full

    def __call__(self, *size: int, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        length = int(np.prod(size))
        # Lists of rows get a number whose use as an index would be fatal.
        self.all.append(self._full((length + 2048,), torch.nan if dtype.is_floating_point else 2**30, dtype=dtype))
        return self.all[-1][1024:-1024].view(size)

    def intact(self) -> bool:
        margins = torch.cat([part.float() for raw in self.all for part in (raw[:1024], raw[-1024:])])
        return bool((margins.isnan() | (margins == 2**30)).all())


def _philox(seed: Any, *counter: Any) -> tuple[Any, ...]:
    """Philox in a few NumPy calls; of the interpreter's own, some 100 per word, half of this file's time would be."""
    from triton.runtime.interpreter import TensorHandle

    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = (np.asarray(c.handle.data).astype(np.uint64) for c in counter)
    key = np.asarray(seed.handle.data).reshape(-1).view(np.uint64)[0]
    k0, k1 = key & low, key >> shift
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ k0, p1 & low, (p0 >> shift) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    words = zip((c0, c1, c2, c3), counter, strict=True)
    return tuple(tl.tensor(TensorHandle(word.astype(np.uint32), tl.uint32), c.type) for word, c in words)


def results() -> dict[str, Any]:
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def fused(self: Any, x: Any, y: Any, z: Any) -> Any:
        # The interpreter rounds a product before it adds. In float64 the product of two float32 is exact.
        exact = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(exact.astype(np.float32), z.dtype.scalar)

    InterpreterBuilder.create_fma = fused
    torch.set_num_threads(1)
    found: dict[str, Any] = {f"draws {kind} {seed}": draws(kind, seed) for kind in KINDS for seed in (-5, 2**40 + 3)}
    tl.philox = _philox
    with patch.object(torch, "empty", _Guarded()) as guarded:
        for name, (shape, models, first) in CASES.items():
            found[name] = train(shape, *settings_for(shape, models), first, True)
        found["allocated"] = sum(raw.nbytes - 2048 * raw.itemsize for raw in guarded.all)
        for i, (name, some, broken, section, value) in enumerate(BROKEN):
            shape, models, first = CASES[name]
            settings, state, lr = settings_for(shape, models)
            shape.split(state)[section][broken, -1, -1] = value
            found[f"broken {i}"] = train(shape, subset(settings, some), state[some], lr[some], first, True)
        shape, models, first = CASES["one of four"]
        settings, state, lr = settings_for(shape, models)
        for some in (slice(3, 6), slice(7, 8)):
            args = (shape, subset(settings, some), state[some], lr[some], first, True)
            found[f"cut {some.start}"] = train(*args, pieces=1)
        found["intact"] = guarded.intact()
    return found


def errors(shape: EnsembleShape, ours: dict[str, Tensor], theirs: dict[str, Tensor], lr: Tensor) -> dict[str, float]:
    worst = {}
    for name, expected in theirs.items():
        difference = (ours[name] - expected).abs()
        if "losses" in name:
            difference /= expected.abs().clamp(min=1e-6)
        elif name == "state":
            difference /= lr.amax(1)[:, None]
            # Adam's first step has the size of lr: where a gradient is rounding noise, so is its step.
            worst["a single weight"] = float(difference.max())
            difference = difference.flatten().kthvalue(max(1, difference.numel() * 999 // 1000)).values
        else:
            for part, section in zip(shape.split(difference).values(), shape.split(expected).values(), strict=True):
                rms = section.flatten(1).square().mean(1).sqrt().clamp(min=1e-20)
                part /= rms.view(-1, *[1] * (part.dim() - 1))
        worst[name] = float(difference.max())
    return worst


def beyond_tolerance(found: dict[str, float]) -> dict[str, float]:
    return {key: error for key, error in found.items() if not error < TOLERANCE[key]}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_cpu_twin(interpreted: dict[str, Any], name: str) -> None:
    shape, models, first = CASES[name]
    settings, state, lr = settings_for(shape, models)
    expected = train(shape, settings, state, lr, first, False)
    found = errors(shape, interpreted[name], expected, lr)
    assert beyond_tolerance(found) == {}
    assert torch.equal(interpreted[name]["load losses"] != 0, (settings.load_balance != 0)[:, None].expand(-1, STEPS))


@pytest.mark.parametrize("models", [slice(3, 6), slice(7, 8)], ids=["three", "one"])
def test_bits_do_not_depend_on_cuts_or_neighbours(interpreted: dict[str, Any], models: slice) -> None:
    for key, ours in interpreted[f"cut {models.start}"].items():
        assert torch.equal(ours, interpreted["one of four"][key][models]), key


@pytest.mark.parametrize("number", range(len(BROKEN)))
def test_a_diverged_model_shows_nan_and_leaves_its_neighbours_alone(interpreted: dict[str, Any], number: int) -> None:
    name, models, broken, _, _ = BROKEN[number]
    results = interpreted[f"broken {number}"]
    assert bool(results["losses"][broken - models.start].isnan().all())
    others = [model for model in range(models.start, models.stop) if model != broken]
    for key, ours in results.items():
        assert torch.equal(ours[[model - models.start for model in others]], interpreted[name][key][others]), key


def test_nothing_is_written_outside_the_scratch_memory(interpreted: dict[str, Any]) -> None:
    assert interpreted["intact"] is True
    per_model = {name: ensemble_memory.scratch_bytes(shape) + 8 * STEPS for name, (shape, _, _) in CASES.items()}
    assert interpreted["allocated"] == sum(models * per_model[name] for name, (_, models, _) in CASES.items())


@pytest.mark.parametrize("seed", [-5, 2**40 + 3])
@pytest.mark.parametrize("kind", KINDS)
def test_draws_equal_sample_features_bit_for_bit(interpreted: dict[str, Any], kind: int, seed: int) -> None:
    expected = sample_features(draw_table(kind), 64, seeds=torch.tensor([seed]), step=BIG)[0]
    assert torch.equal(interpreted[f"draws {kind} {seed}"], expected)
    assert 0 < int((expected != 0).sum()) < expected.numel()


SIZES = [(100, 20, 1, 1), (100, 5, 4, 1), (100, 2, 10, 2), (128, 8, 16, 2)]
# On other chips than sm_90 the largest alone.
COMPILED = [(sizes, chip) for chip in (80, 90, 100) for sizes in (SIZES if chip == 90 or ALL else SIZES[-1:])]


@pytest.mark.parametrize(("sizes", "chip"), COMPILED, ids=str)
def test_compiles_without_spills(sizes: tuple[int, int, int, int], chip: int) -> None:
    report = compile_report(EnsembleShape(*sizes, shared_hidden=0, tied=True, batch_size=1024), chip)
    assert (report.kernel, report.spills) == ("memory", 0)
    assert report.shared_bytes <= 16 * 1024


@pytest.mark.parametrize("kind", KINDS[1:])
def test_structured_features_untied_weights_and_a_shared_expert_compile(kind: int) -> None:
    full = ALL or kind == CLUSTERED  # k = 1 without a shared expert is compiled in half the time
    shape = EnsembleShape(20, 3, 4, 2, 5, False, 512) if full else EnsembleShape(20, 3, 4, 1, 0, True, 512)
    plan = ensemble_memory.signature_and_constants(shape, kind)
    assert len(compile_ahead(ensemble_memory._train_kernel, *plan, 90).asm["cubin"]) > 0


@pytest.mark.parametrize("share", ["first expert takes half", "uniform"])
@pytest.mark.parametrize("batch_size", [512, 1024])
@pytest.mark.parametrize(("n_experts", "top_k"), [(4, 1), (5, 2), (8, 1), (10, 2), (16, 2), (32, 1), (32, 4)])
def test_executed_samples_stay_within_twice_the_active(n_experts: int, top_k: int, batch_size: int, share: str) -> None:
    shape = EnsembleShape(100, 5, n_experts, top_k, 0, True, batch_size)
    weight = torch.ones(n_experts, dtype=torch.float64)
    if share != "uniform":
        weight[0] = n_experts - 1
    chosen = torch.multinomial(weight, top_k * batch_size, True, generator=torch.Generator().manual_seed(1))
    counts = chosen.bincount(minlength=n_experts).tolist()
    assert top_k * batch_size <= executed_samples(shape, counts, "triton") <= 2 * top_k * batch_size


GOOD = EnsembleShape(100, 5, 4, 1, 0, True, 1024)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"n_features": 129}, "n_features=129: .* 1 to 128"),
        ({"n_hidden": 33}, "n_hidden=33: .* 1 to 32"),
        ({"n_hidden": 0}, "n_hidden=0: .* 1 to 32"),
        ({"n_experts": 33}, "n_experts=33: .* 1 to 32"),
        ({"batch_size": 2**20 + 1}, "batch_size=1048577: .* 1 to 1048576"),
        ({"shared_hidden": 33}, "shared_hidden=33: .* 0 to 32"),
        ({"top_k": 5}, "top_k=5: takes 1 to n_experts=4"),
    ],
)
def test_refuses_before_any_work(bad: dict[str, Any], message: str) -> None:
    settings, _, _ = settings_for(GOOD, 2)
    assert ensemble_memory.fits(GOOD, settings)
    shape = dataclasses.replace(GOOD, **bad)
    assert not ensemble_memory.fits(shape, settings)
    state = torch.zeros(2, 1)
    with pytest.raises(ValueError, match=message):
        ensemble_memory.launch(shape, settings, state, state, state, torch.zeros(2, 1, dtype=torch.float64), 0)


def test_refuses_exactly_k_data() -> None:
    settings, _, _ = settings_for(GOOD, 2)
    table = FeatureTable(torch.tensor([INDEPENDENT, EXACTLY_K]), settings.features.probability, settings.features.size)
    with pytest.raises(ValueError, match=r"features\.kind=4"):
        ensemble_memory.check(GOOD, dataclasses.replace(settings, features=table))


def test_refuses_more_state_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, _, _ = settings_for(GOOD, 2)
    largest = EnsembleShape(128, 32, 32, 4, 32, False, 1024)
    ensemble_memory.check(largest, settings)
    monkeypatch.setattr(ensemble_memory, "LIMIT_BYTES", 12 * largest.n_parameters - 1)
    with pytest.raises(ValueError, match=f"n_parameters={largest.n_parameters}: .* bytes of state per model"):
        ensemble_memory.check(largest, settings)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_cuda_equals_the_cpu_twin(name: str) -> None:
    shape, models, first = CASES[name]
    settings, state, lr = settings_for(shape, models)
    ours = {key: value.cpu() for key, value in train(shape, settings, state.cuda(), lr, first, True).items()}
    expected = train(shape, settings, state, lr, first, False)
    assert beyond_tolerance(errors(shape, ours, expected, lr)) == {}
