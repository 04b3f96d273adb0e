"""Polytopes: distances of features to them, their sets and edges, and sticky points of curves and of values."""

from __future__ import annotations

import numpy as np
import pytest

from moesaic.bench.reproduce.polytopes import (
    DIMENSIONS,
    FRACTIONS,
    VERTICES,
    band_width,
    components,
    enrichment,
    hull_edges,
    own_coordinates,
    own_dimensionality,
    shape,
    shape_distance,
    square_antiprism,
    stickiness,
)

NAMES = (*FRACTIONS, "two digons", "digon and a dimension", "digon and two dimensions", "octahedron", "cube")


def turned(points: np.ndarray, scale: float = 1.3) -> np.ndarray:
    """Points rotated, scaled and in another order."""
    rng = np.random.default_rng(1)
    rotation, _ = np.linalg.qr(rng.normal(size=(points.shape[1], points.shape[1])))
    return np.asarray(scale * rng.permutation(points @ rotation))


@pytest.mark.parametrize("name", NAMES)
def test_a_polytope_is_at_distance_0_of_itself_and_of_no_other(name: str) -> None:
    points = turned(shape(name))
    # The heights of antiprisms are a grid: a step of it moves a cosine by 0.004.
    assert shape_distance(points, name) < 5e-3
    for other in NAMES:
        if other != name and shape(other).shape == points.shape:
            assert shape_distance(points, other) > 0.2, other


@pytest.mark.parametrize("name", FRACTIONS)
def test_fractions_are_dimensions_over_vertices_and_d_of_the_vertices(name: str) -> None:
    assert (VERTICES[name], DIMENSIONS[name]) == shape(name).shape
    assert FRACTIONS[name] == DIMENSIONS[name] / VERTICES[name]
    # Only at this height is an antiprism as extended along its axis as across it.
    w = square_antiprism(np.sqrt(1 / 3)) if name == "square antiprism" else shape(name)
    np.testing.assert_allclose(own_dimensionality(2 * w), FRACTIONS[name])


def test_components_fall_apart_into_orthogonal_sets() -> None:
    w = np.zeros((9, 5))
    w[[0, 2, 5], :2] = shape("triangle")
    w[[1, 7], 2:3] = shape("digon")
    w[3, 3] = 1.0
    w[4, 4] = 0.2
    kept = np.linalg.norm(w, axis=1) > 0.5
    assert sorted(components(w, kept)) == [[0, 2, 5], [1, 7], [3]]
    leaning = w.copy()
    leaning[3, 2] = 0.3
    assert sorted(components(leaning, kept)) == [[0, 2, 5], [1, 3, 7]]


def test_own_coordinates_keep_the_shape() -> None:
    w = np.zeros((4, 7))
    w[:, 2:5] = shape("tetrahedron")
    found = own_coordinates(w @ np.linalg.qr(np.random.default_rng(0).normal(size=(7, 7)))[0], 3)
    assert found.shape == (4, 3)
    assert shape_distance(found, "tetrahedron") < 1e-12


@pytest.mark.parametrize(("name", "edges"), [("tetrahedron", 6), ("octahedron", 12), ("cube", 12)])
def test_edges_of_the_hull(name: str, edges: int) -> None:
    assert len(hull_edges(turned(shape(name), 1.0))) == edges
    rough = shape(name) + 0.01 * np.random.default_rng(2).normal(size=shape(name).shape)
    assert len(hull_edges(rough)) == edges


def test_edges_of_an_antiprism() -> None:
    assert len(hull_edges(turned(square_antiprism(0.6), 1.0))) == 16


def test_band_width_is_the_length_inside() -> None:
    x, y = [1.0, 10.0], [1.0, 0.1]
    assert band_width(x, y, 0.4, 0.6) == pytest.approx(np.log(0.6 / 0.4), abs=1e-3)
    assert band_width(x, y, 2.0, 3.0) == 0


def test_a_power_law_is_not_sticky_and_a_plateau_is() -> None:
    x = np.geomspace(1, 20, 30)
    assert stickiness(list(x), list(1 / x), 0.5) == pytest.approx(1, abs=0.01)
    plateau = np.where(x < 2, 1 / x, np.where(x < 4, 0.5, 2 / x))
    assert stickiness(list(x), list(plateau), 0.5) > 3
    # At its upper end a curve has one neighbour only, and half the band.
    assert stickiness(list(x), list(1 / x), 1.0) == pytest.approx(1, abs=0.02)
    assert stickiness(list(x), list(np.minimum(1, 1.5 / x)), 1.0) > 3
    assert stickiness([1.0, 2.0, 2.0001, 3.0], [1.0, 1.0, 0.5, 0.5], 0.5) > 100


def test_enrichment_is_one_for_a_uniform_background() -> None:
    values = np.linspace(0.2, 0.9, 70_001)
    for name in FRACTIONS:
        ratio, count = enrichment(values, name)
        assert ratio == pytest.approx(1, abs=0.01)
        assert count == pytest.approx(2_000, abs=2)
    more = np.concatenate([values, np.full(2_000, 0.5)])
    assert enrichment(more, "digon")[0] == pytest.approx(2, abs=0.02)
    # The window of 2/5 is left out of the ring around 3/8.
    pentagons = np.concatenate([values, np.full(20_000, 0.4)])
    assert enrichment(pentagons, "square antiprism")[0] == pytest.approx(1, abs=0.01)
    assert np.isnan(enrichment([0.1], "digon")[0])
