"""The geometries of *Toy Models of Superposition*: polytopes, how near a set of features is to one, and sticky points.

A set of n unit vectors is known, up to rotation and reflection, by its n×n matrix of cosines. Compared here are the
sorted cosines of all pairs, which do not depend on the order of the features either.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

FRACTIONS = {
    "tetrahedron": 3 / 4, "triangle": 2 / 3, "digon": 1 / 2, "pentagon": 2 / 5, "square antiprism": 3 / 8,
}  # fmt: skip
"""D_i of the features of each geometry: dimensions over vertices."""
VERTICES = {"tetrahedron": 4, "triangle": 3, "digon": 2, "pentagon": 5, "square antiprism": 8}
"""Features of each geometry."""
DIMENSIONS = {"tetrahedron": 3, "triangle": 2, "digon": 1, "pentagon": 2, "square antiprism": 3}
"""Dimensions of each geometry."""
_ANTIPRISM_HEIGHTS = np.linspace(0.3, 0.8, 251)


def _polygon(n: int, turn: float = 0.0) -> Array:
    angle = 2 * np.pi * (np.arange(n) + turn) / n
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def square_antiprism(height: float) -> Array:
    """Unit vertices (8, 3) of two squares at z = ±height, one turned by 45°."""
    across = np.sqrt(1 - height**2)
    squares = [np.column_stack([across * _polygon(4, t), np.full(4, z)]) for t, z in ((0.0, height), (0.5, -height))]
    return np.concatenate(squares)


def _candidates(name: str) -> list[Array]:
    if name == "square antiprism":  # all of its vertices are alike at any height
        return [square_antiprism(height) for height in _ANTIPRISM_HEIGHTS]
    line, plane, space = (np.eye(m) for m in (1, 2, 3))
    shapes = {
        "digon": np.concatenate([line, -line]),
        "two digons": np.concatenate([plane, -plane]),
        "digon and a dimension": np.concatenate([plane, -plane[:1]]),
        "digon and two dimensions": np.concatenate([space, -space[:1]]),
        "triangle": _polygon(3),
        "pentagon": _polygon(5),
        "tetrahedron": np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / np.sqrt(3),
        "octahedron": np.concatenate([space, -space]),
        "cube": np.array(list(itertools.product((-1, 1), repeat=3))) / np.sqrt(3),
    }
    return [shapes[name]]


def shape(name: str) -> Array:
    """Unit vertices (n, m) of a polytope; a square antiprism with equal edges."""
    if name == "square antiprism":
        return square_antiprism(float(np.sqrt(1 / (1 + 2 * np.sqrt(2)))))
    return _candidates(name)[0]


def pair_cosines(points: npt.ArrayLike) -> Array:
    """Sorted cosines of all pairs of rows of (n, m)."""
    w = np.asarray(points, dtype=np.float64)
    unit = w / np.linalg.norm(w, axis=-1, keepdims=True)
    return np.sort((unit @ unit.T)[np.triu_indices(len(unit), 1)])


def shape_distance(points: npt.ArrayLike, name: str) -> float:
    """Largest difference between the sorted pair cosines of ``points`` and those of a polytope.

    A square antiprism may have any height between 0.3 and 0.8 of its vertices' norm.
    """
    ours = pair_cosines(points)
    return min(float(np.abs(ours - pair_cosines(candidate)).max()) for candidate in _candidates(name))


def components(weight: npt.ArrayLike, kept: npt.ArrayLike, *, cosine: float = 0.2) -> list[list[int]]:
    """Sets of kept rows of W (n, m) that are orthogonal to all others: the factors of a tegum product.

    Two kept features are joined where |cos(W_i, W_j)| > ``cosine``; a set is all that is joined, directly or not.
    """
    w, keep = np.asarray(weight, dtype=np.float64), np.flatnonzero(kept)
    unit = w[keep] / np.linalg.norm(w[keep], axis=-1, keepdims=True)
    joined = np.abs(unit @ unit.T) > cosine
    found: list[list[int]] = []
    left = set(range(len(keep)))
    while left:
        component, front = set[int](), {min(left)}
        while front:
            component |= front
            front = {int(j) for i in front for j in np.flatnonzero(joined[i])} - component
        left -= component
        found.append(sorted(int(keep[i]) for i in component))
    return found


def own_coordinates(rows: npt.ArrayLike, dimensions: int) -> Array:
    """Rows (k, m) in the ``dimensions`` directions along which they extend most, (k, dimensions)."""
    left, sigma, _ = np.linalg.svd(np.asarray(rows, dtype=np.float64), full_matrices=False)
    return np.asarray((left * sigma)[:, :dimensions], dtype=np.float64)


def own_dimensionality(points: npt.ArrayLike) -> Array:
    """D_i = ‖w_i‖² / Σ_j (ŵ_i·w_j)² of the rows of (n, m), the sum over these rows alone."""
    w = np.asarray(points, dtype=np.float64)
    square = np.square(w).sum(1)
    return np.asarray(square**2 / np.square(w @ w.T).sum(1), dtype=np.float64)


def hull_edges(points: npt.ArrayLike, *, tolerance: float = 0.05) -> list[tuple[int, int]]:
    """Edges of the convex hull of few points in 3-D; faces flat within ``tolerance`` are not cut into triangles."""
    p = np.asarray(points, dtype=np.float64)
    faces = set[frozenset[int]]()
    for corner in itertools.combinations(range(len(p)), 3):
        normal = np.cross(p[corner[1]] - p[corner[0]], p[corner[2]] - p[corner[0]])
        if (length := np.linalg.norm(normal)) < 1e-9:
            continue
        side = (p - p[corner[0]]) @ normal / length
        for above in (side, -side):
            if above.max() <= tolerance:
                faces.add(frozenset(np.flatnonzero(above >= -tolerance).tolist()))
    # A pair that two faces share is an edge: of a square, its diagonals lie in one face only.
    pairs = itertools.combinations(range(len(p)), 2)
    return [pair for pair in pairs if sum(face.issuperset(pair) for face in faces) >= 2]


def band_width(x: Sequence[float], y: Sequence[float], low: float, high: float) -> float:
    """Length of log x over which y(x), straight between its points in log-log, lies in [low, high]."""
    t = np.linspace(np.log(x[0]), np.log(x[-1]), 20_001)
    curve = np.interp(t, np.log(x), np.log(y))
    inside = (curve >= np.log(low)) & (curve <= np.log(high))
    return float(inside.mean() * (t[-1] - t[0]))


def stickiness(x: Sequence[float], y: Sequence[float], value: float, *, reach: float = 0.1) -> float:
    """Length of log x that y(x) spends within value·(1 ∓ reach), over its mean in the two bands beside it.

    The bands are equally wide in log y, so a power law gives 1. Where all of y is below value·(1 + reach), the band is
    cut off at the largest y and the one below it is as wide. Infinite where y jumps over its neighbours.
    """
    low, high, most = value * (1 - reach), value * (1 + reach), max(y)
    ratio = min(high, most) / low
    bands = [(low / ratio, low)] + ([(high, high * ratio)] if most > high else [])
    beside = sum(band_width(x, y, *band) for band in bands) / len(bands)
    return float(np.divide(band_width(x, y, low, high), beside)) if beside else float("inf")


def enrichment(values: npt.ArrayLike, name: str, *, window: float = 0.01, ring: float = 0.05) -> tuple[float, int]:
    """Density of values within ``window`` of a geometry's fraction over that in the ring around it, and their number.

    The ring reaches to ``ring`` on both sides, without the windows of the other fractions. A background that is uniform
    over the ring gives 1; NaN where it is empty and the window too.
    """
    found = np.asarray(values, dtype=np.float64)
    grid = np.linspace(FRACTIONS[name] - ring, FRACTIONS[name] + ring, 20_001)

    def in_ring(points: Array) -> npt.NDArray[np.bool_]:
        inside = np.abs(points - FRACTIONS[name]) <= ring
        for fraction in FRACTIONS.values():
            inside &= np.abs(points - fraction) > window
        return inside

    near = int((np.abs(found - FRACTIONS[name]) <= window).sum())
    background = float(in_ring(found).sum() / (in_ring(grid).mean() * 2 * ring))
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.divide(near / (2 * window), background)), near
