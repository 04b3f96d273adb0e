from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.metrics import superposition as sp


def by_definition(weight: Tensor) -> dict[str, Tensor]:
    """Per-feature metrics of one (n, m) weight, from the n×n matrix and the formulas as the papers print them."""
    w = weight.double()
    norm = w.norm(dim=1)
    unit = torch.where(norm[:, None] > 0, w / norm[:, None], 0.0)
    overlap = (unit @ w.T).square()
    others = overlap.clone().fill_diagonal_(0.0)
    regularised = ((w / (1e-5 + norm)[:, None]) @ w.T).square().fill_diagonal_(0.0)
    return {
        "norm": norm,
        "superposition": others.sum(1),
        "polysemanticity": regularised.sum(1).sqrt(),
        "dimensionality": norm.square() / overlap.sum(1),
    }


def random_weight(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def polygon(n: int) -> Tensor:
    angle = torch.arange(n, dtype=torch.float64) * (2 * math.pi / n)
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def rotated_axes(n: int, m: int) -> Tensor:
    """Return m orthogonal features in a rotated basis, then n − m weak ones: the Gram form cancels worst here."""
    basis = torch.linalg.qr(random_weight(m, m, seed=1))[0]
    return torch.cat([basis, 1e-7 * random_weight(n - m, m, seed=2)])


WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "random": lambda: random_weight(40, 7),
    "wide": lambda: random_weight(5, 12),
    "one dimension": lambda: random_weight(9, 1),
    "one feature": lambda: random_weight(1, 4),
    "rotated axes": lambda: rotated_axes(30, 6),
    "zero rows": lambda: random_weight(12, 3) * (torch.arange(12) % 3 > 0)[:, None],
    "zeros": lambda: torch.zeros(6, 3, dtype=torch.float64),
    "spread norms": lambda: random_weight(30, 5) * torch.logspace(-9, 3, 30).double()[:, None],
}


@pytest.mark.parametrize("case", WEIGHTS)
@pytest.mark.parametrize("metric", ["norm", "superposition", "polysemanticity", "dimensionality"])
def test_gram_metrics_equal_the_definitions(case: str, metric: str) -> None:
    weight = WEIGHTS[case]()
    got = getattr(sp.feature_geometry(weight), metric)
    torch.testing.assert_close(got, by_definition(weight)[metric], rtol=1e-10, atol=1e-13, equal_nan=True)


def test_public_functions_are_the_fields_of_the_geometry() -> None:
    weight = random_weight(3, 20, 4)
    geometry = sp.feature_geometry(weight)
    torch.testing.assert_close(sp.feature_norms(weight), geometry.norm, rtol=0, atol=0)
    torch.testing.assert_close(sp.superposition_score(weight), geometry.superposition, rtol=0, atol=0)
    torch.testing.assert_close(sp.polysemanticity(weight), geometry.polysemanticity, rtol=0, atol=0)
    torch.testing.assert_close(sp.feature_dimensionality(weight), geometry.dimensionality, rtol=0, atol=0)


def test_blocks_of_features_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.stack([rotated_axes(37, 6), random_weight(37, 6)])
    whole = sp.feature_geometry(weight)
    monkeypatch.setattr(sp, "_BLOCK_ELEMENTS", 2 * 6 * 5)
    blocks = sp.feature_geometry(weight)
    for metric in ("norm", "superposition", "polysemanticity", "dimensionality"):
        torch.testing.assert_close(getattr(blocks, metric), getattr(whole, metric), rtol=1e-10, atol=1e-13)


def test_leading_dimensions_are_separate_models() -> None:
    weight = torch.stack([random_weight(9, 3), rotated_axes(9, 3), torch.zeros(9, 3).double(), 1e6 * polygon_in(9, 3)])
    batched = sp.feature_geometry(weight.reshape(2, 2, 9, 3))
    for i in range(4):
        alone = by_definition(weight[i])
        for metric, expected in alone.items():
            got = getattr(batched, metric).reshape(4, 9)[i]
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13, equal_nan=True)


def polygon_in(n: int, m: int) -> Tensor:
    return torch.nn.functional.pad(polygon(n), (0, m - 2))


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (torch.tensor([[1.0], [-1.0]]), 1 / 2),
        (polygon(3), 2 / 3),
        (polygon(5), 2 / 5),
        (torch.eye(4), 1.0),
        (torch.kron(torch.eye(2), polygon(3)), 2 / 3),
    ],
    ids=["digon", "triangle", "pentagon", "orthogonal", "two triangles"],
)
def test_dimensionality_of_known_geometries(weight: Tensor, expected: float) -> None:
    got = sp.feature_dimensionality(weight)
    torch.testing.assert_close(got, torch.full_like(got, expected), rtol=1e-12, atol=0)


def test_superposition_score_of_a_digon_leaves_the_feature_itself_out() -> None:
    weight = torch.tensor([[2.0], [-3.0]])
    torch.testing.assert_close(sp.superposition_score(weight), torch.tensor([9.0, 4.0]).double(), rtol=1e-12, atol=0)


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 24),
    m=st.integers(1, 8),
    seed=st.integers(0, 2**20),
    spread=st.floats(0, 12),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_dimensionalities_of_an_expert_never_sum_above_its_width(
    n: int, m: int, seed: int, spread: float, dtype: torch.dtype
) -> None:
    scale = 10.0 ** (spread * torch.rand(n, 1, generator=torch.Generator().manual_seed(seed)).double() - spread / 2)
    weight = (random_weight(n, m, seed=seed) * scale).to(dtype)
    dimensionality = sp.feature_dimensionality(weight)
    assert float(dimensionality.nansum()) <= m * (1 + 1e-12)
    assert bool(((dimensionality > 0) & (dimensionality <= 1) | (weight.float().norm(dim=1) == 0)).all())


def test_many_features_need_no_matrix_of_features_by_features() -> None:
    weight = random_weight(200_000, 2, dtype=torch.float32)
    weight[123] = torch.tensor([3e3, 0.0])
    geometry = sp.feature_geometry(weight)
    assert float(geometry.dimensionality.sum()) <= 2 * (1 + 1e-12)
    assert float(geometry.dimensionality[123]) > 0.9
    for i in (0, 123, 199_999):
        w = weight.double()
        overlap = (w @ (w[i] / w[i].norm())).square()
        overlap[i] = 0
        assert float(geometry.superposition[i]) == pytest.approx(float(overlap.sum()), rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_weights_accumulate_in_float64(dtype: torch.dtype) -> None:
    weight = rotated_axes(300, 6).to(dtype)
    geometry = sp.feature_geometry(weight)
    expected = by_definition(weight)
    for metric, value in expected.items():
        got = getattr(geometry, metric)
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, value, rtol=1e-10, atol=1e-13, equal_nan=True)


def test_zero_rows_and_zero_weights() -> None:
    weight = torch.eye(3)
    weight[1] = 0
    geometry = sp.feature_geometry(weight)
    assert geometry.dimensionality.isnan().tolist() == [False, True, False]
    assert geometry.superposition[1] == geometry.polysemanticity[1] == geometry.norm[1] == 0
    nothing = sp.feature_geometry(torch.zeros(2, 4, 3))
    assert bool(nothing.dimensionality.isnan().all())
    assert not bool(nothing.superposition.any() | nothing.polysemanticity.any() | nothing.norm.any())


def test_nan_weights_give_nan_and_no_error() -> None:
    weight = torch.stack([torch.eye(3), torch.full((3, 3), math.nan)])
    dimensionality = sp.feature_dimensionality(weight)
    assert dimensionality[0].tolist() == [1.0, 1.0, 1.0]
    assert bool(dimensionality[1].isnan().all())


def test_monosemantic_threshold_and_features_of_no_norm() -> None:
    third = math.sqrt(1 / 3)
    weight = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 0], [0, 0, 5e-6], [0.19, 0, 0], [third, third, third]])
    poly = by_definition(weight)["polysemanticity"]
    assert sp.monosemantic(weight, min_norm=0.0).tolist() == (poly < 0.2).tolist()
    assert sp.monosemantic(weight, min_norm=0.0)[2:4].tolist() == [True, True]
    assert sp.monosemantic(weight)[2:4].tolist() == [False, False]
    assert sp.monosemantic(torch.tensor([[1.0, 0], [0.19, 1.0]])).tolist() == [True, True]
    assert sp.monosemantic(torch.tensor([[1.0, 0], [0.21, 1.0]])).tolist() == [False, False]


def test_global_dimensionality_weighs_experts_by_presence() -> None:
    weight = torch.stack([torch.eye(2), torch.tensor([[1.0, 0], [-1.0, 0]]), torch.tensor([[1.0, 0], [0.0, 0]])])
    presence = torch.tensor([[0.5, 0.0], [0.5, 0.25], [0.0, 0.75]])
    got = sp.global_dimensionality(weight, presence)
    torch.testing.assert_close(got, torch.tensor([0.5 + 0.25, 0.125]).double(), rtol=1e-12, atol=0)
    never = sp.global_dimensionality(weight, torch.tensor([[0.0, math.nan], [0.0, math.nan], [1.0, math.nan]]))
    assert never[0] == 1.0
    assert bool(never[1].isnan())
    stacked = sp.global_dimensionality(torch.stack([weight, weight]), torch.stack([presence, presence]))
    torch.testing.assert_close(stacked, torch.stack([got, got]), rtol=0, atol=0)


def test_features_per_dimension_of_experts_and_mixtures() -> None:
    weight = torch.stack([torch.eye(4)[:, :2], 2 * torch.eye(4)[:, :2], torch.zeros(4, 2)])
    torch.testing.assert_close(
        sp.features_per_dimension(weight), torch.tensor([1.0, 4.0, 0.0]).double(), rtol=0, atol=0
    )
    mixed = sp.features_per_dimension(weight, torch.tensor([0.5, 0.25, 0.25]))
    assert float(mixed) == 1.5
    dense = sp.features_per_dimension(weight[:1], torch.ones(1))
    assert float(dense) == 1.0


def test_a_gate_weight_is_the_weight_scaled_by_its_root() -> None:
    w, b, x, gate = random_weight(6, 2), random_weight(6, seed=3), random_weight(8, 6, seed=4), 0.3
    folded = math.sqrt(gate) * w
    expected = gate * torch.relu(x @ w @ w.T + b)
    torch.testing.assert_close(torch.relu(x @ folded @ folded.T + gate * b), expected, rtol=1e-12, atol=1e-14)
    in_usage = sp.features_per_dimension(w[None], torch.tensor([gate], dtype=torch.float64))
    torch.testing.assert_close(sp.features_per_dimension(folded), in_usage, rtol=1e-12, atol=0)


def test_histogram_counts_every_defined_feature_once() -> None:
    assert sp.DIMENSIONALITY_LINES == {"digon": 0.5, "triangle": 2 / 3, "pentagon": 0.4}
    values = torch.tensor([[0.0, 1.0, 0.5, 0.5 - 1e-13], [2 / 5, 2 / 3, math.nan, 0.999]])
    counts = sp.dimensionality_histogram(values)
    assert counts.shape == (2, 49)
    assert {b: c for b, c in enumerate(counts[0].tolist()) if c} == {0: 1, 48: 1, 24: 2}
    assert {b: c for b, c in enumerate(counts[1].tolist()) if c} == {19: 1, 32: 1, 48: 1}
    half = sp.dimensionality_histogram(values, torch.full_like(values, 0.5))
    torch.testing.assert_close(half, counts / 2, rtol=0, atol=0)


def test_pentagons_fall_into_the_bin_of_two_fifths() -> None:
    counts = sp.dimensionality_histogram(sp.feature_dimensionality(polygon(5)))
    assert counts[19] == 5


def test_balanced_weight_of_a_tied_pair_measures_as_the_weight() -> None:
    weight = random_weight(2, 9, 3)
    balanced = sp.balanced_weight(weight, weight)
    torch.testing.assert_close(balanced @ balanced.mT, weight @ weight.mT, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n", [9, 2])
def test_balanced_weight_does_not_depend_on_the_basis_of_the_hidden_space(n: int) -> None:
    weight, decoder, change = random_weight(n, 3), random_weight(n, 3, seed=1), random_weight(3, 3, seed=2)
    plain = sp.balanced_weight(weight, decoder)
    changed = sp.balanced_weight(weight @ change, decoder @ torch.linalg.inv(change).T)
    assert plain.shape == (n, 3)
    torch.testing.assert_close(plain @ plain.T, changed @ changed.T, rtol=1e-9, atol=1e-10)
    assert not torch.allclose(plain @ plain.T, weight @ weight.T, rtol=1e-2)


def test_metrics_carry_no_gradient_and_leave_the_weight_alone() -> None:
    weight = random_weight(8, 3).requires_grad_()
    before = weight.detach().clone()
    geometry = sp.feature_geometry(weight)
    assert not any(v.requires_grad for v in vars(geometry).values())
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sp.feature_norms(torch.ones(3)), r"weight has shape \(3,\).*\(\.\.\., n, m\)"),
        (lambda: sp.feature_geometry(torch.ones(3, 0)), r"weight has shape \(3, 0\)"),
        (lambda: sp.superposition_score(torch.ones(3, 2, dtype=torch.int64)), r"dtype torch\.int64"),
        (
            lambda: sp.global_dimensionality(torch.ones(2, 3, 1), torch.ones(3)),
            r"presence has shape \(3,\).*\(2, 3, 1\)",
        ),
        (lambda: sp.global_dimensionality(torch.ones(3, 1), torch.ones(3)), r"presence has shape \(3,\)"),
        (lambda: sp.features_per_dimension(torch.ones(2, 3, 1), torch.ones(3)), r"usage has shape \(3,\).*\(2, 3, 1\)"),
        (lambda: sp.features_per_dimension(torch.ones(2, 3, 1), torch.tensor([2.0, -1.0])), r"negative entry -1\.0"),
        (lambda: sp.dimensionality_histogram(torch.ones(3), torch.ones(2)), r"mass has shape \(2,\).*\(3,\)"),
        (lambda: sp.balanced_weight(torch.ones(3, 2), torch.ones(2, 3)), r"decoder has shape \(2, 3\).*\(3, 2\)"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


MILLION = """
import resource, torch
from moesaic.metrics import feature_geometry
weight = torch.randn(1_000_000, 64, generator=torch.Generator().manual_seed(0))
found = feature_geometry(weight)
assert float(found.dimensionality.sum()) <= 64 and bool(found.monosemantic().sum() == 0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_a_million_features_stay_under_two_gigabytes() -> None:
    done = subprocess.run([sys.executable, "-c", MILLION], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2_000_000  # kibibytes, PyTorch and the weights included
