"""Expected loss of the smallest toy model, exact to rounding, and its optimum.

n = 2 features, m = 1 hidden unit, one tied expert, importance I = (1, r), density s:

    L(W, b; s, r) = E[ Σ_i I_i (x_i − ReLU(W_i h + b_i))² ],   h = W_1 x_1 + W_2 x_2,

where each x_i is 0 with probability 1 − s and uniform on (0, 1) otherwise. The expectation is a sum over the four
on/off patterns; inside each, ReLU cuts the unit square into polygons on which the integrand is a polynomial of degree
two, so Gauss–Legendre nodes placed between the kinks integrate it exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array: TypeAlias = NDArray[np.float64]

# Two points are exact to degree 3: the inner integrand has degree 2, its integral between linear limits degree 3.
_GAUSS_NODES: Array = np.array([0.5 - 0.5 / np.sqrt(3.0), 0.5 + 0.5 / np.sqrt(3.0)])


@dataclass(frozen=True)
class Optimum:
    """Best point found for each (s, r): ``loss`` (...,), ``weight`` (..., 2) and ``bias`` (..., 2)."""

    loss: Array
    weight: Array
    bias: Array


def _kink(slope: Array, offset: Array) -> Array:
    """Where slope·t + offset changes sign, clipped to [0, 1]; 0 where it never does (any cut is then exact)."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        kink = np.where(slope == 0.0, 0.0, -offset / slope)
    clipped: Array = np.clip(np.nan_to_num(kink), 0.0, 1.0)
    return clipped


def _split(cuts: Array) -> tuple[Array, Array]:
    """Nodes and weights (..., 2·(c+1)) on [0, 1] cut at the sorted points ``cuts`` (..., c)."""
    shape = (*cuts.shape[:-1], 1)
    edges = np.concatenate([np.zeros(shape), cuts, np.ones(shape)], axis=-1)
    width = np.diff(edges)
    nodes = edges[..., :-1, None] + width[..., None] * _GAUSS_NODES
    weights = np.broadcast_to(0.5 * width[..., None], nodes.shape)
    flat = (*cuts.shape[:-1], -1)
    return nodes.reshape(flat), weights.reshape(flat)


def _nodes(a1: Array, a2: Array, b: Array, s: Array) -> tuple[Array, Array, Array]:
    """x_1, x_2 and weights (..., 33) that integrate one output, z = a1·x_1 + a2·x_2 + b, over all four patterns."""
    zero, one = np.zeros((*b.shape, 1)), np.ones((*b.shape, 1))
    only1, only1_w = _split(_kink(a1, b)[..., None])
    only2, only2_w = _split(_kink(a2, b)[..., None])
    outer, outer_w = _split(np.sort(np.stack([_kink(a1, b), _kink(a1, b + a2)], axis=-1), axis=-1))
    inner, inner_w = _split(_kink(a2[..., None], a1[..., None] * outer + b[..., None])[..., None])
    flat = (*b.shape, -1)
    both1 = np.broadcast_to(outer[..., None], inner.shape).reshape(flat)
    both2, both_w = inner.reshape(flat), (outer_w[..., None] * inner_w).reshape(flat)
    p = s[..., None]
    x1 = np.concatenate([zero, only1, np.zeros_like(only2), both1], axis=-1)
    x2 = np.concatenate([zero, np.zeros_like(only1), only2, both2], axis=-1)
    weights = np.concatenate([(1 - p) ** 2 * one, p * (1 - p) * only1_w, p * (1 - p) * only2_w, p**2 * both_w], axis=-1)
    return x1, x2, weights


def loss_and_gradient(params: Array, density: ArrayLike, importance: ArrayLike) -> tuple[Array, Array]:
    """L and dL/d(W_1, W_2, b_1, b_2) for ``params`` (..., 4); density and importance broadcast against (...)."""
    shape = params.shape[:-1]
    s = np.broadcast_to(np.asarray(density, dtype=np.float64), shape)
    r = np.broadcast_to(np.asarray(importance, dtype=np.float64), shape)
    weight, bias = params[..., :2], params[..., 2:]
    loss, gradient = np.zeros(shape), np.zeros(params.shape)
    for i, scale in enumerate((np.ones(shape), r)):
        w, b = weight[..., i], bias[..., i]
        x1, x2, probability = _nodes(w * weight[..., 0], w * weight[..., 1], b, s)
        hidden = weight[..., 0, None] * x1 + weight[..., 1, None] * x2
        z = w[..., None] * hidden + b[..., None]
        error = np.maximum(z, 0.0) - (x1, x2)[i]
        weighted = scale[..., None] * probability * error
        loss += np.sum(weighted * error, axis=-1)
        # d z/dW_j = W_i x_j + [i = j] h; the moving kinks contribute nothing because z = 0 on them.
        upstream = 2.0 * weighted * (z > 0.0)
        gradient[..., 0] += w * np.sum(upstream * x1, axis=-1)
        gradient[..., 1] += w * np.sum(upstream * x2, axis=-1)
        gradient[..., i] += np.sum(upstream * hidden, axis=-1)
        gradient[..., 2 + i] += np.sum(upstream, axis=-1)
    return loss, gradient


def expected_loss(weight: ArrayLike, bias: ArrayLike, density: ArrayLike, importance: ArrayLike) -> Array:
    """L(W, b; s, r) for ``weight`` (..., 2) and ``bias`` (..., 2); density s and importance r broadcast to (...).

    Raises:
        ValueError: a density outside (0, 1] or a last dimension other than 2.
    """
    w, b = np.asarray(weight, dtype=np.float64), np.asarray(bias, dtype=np.float64)
    s, r = np.asarray(density, dtype=np.float64), np.asarray(importance, dtype=np.float64)
    if w.shape[-1:] != (2,) or b.shape[-1:] != (2,):
        raise ValueError(f"weight and bias must end in 2 features, got shapes {w.shape} and {b.shape}")
    if not np.all((s > 0) & (s <= 1)):
        raise ValueError(f"density must be in (0, 1], got {density!r}")
    shape = np.broadcast_shapes(w.shape[:-1], b.shape[:-1], s.shape, r.shape)
    params = np.concatenate([np.broadcast_to(w, (*shape, 2)), np.broadcast_to(b, (*shape, 2))], axis=-1)
    return loss_and_gradient(params, s, r)[0]


def _starts(s: Array, n_random: int) -> Array:
    """Starting points (len(s), starts, 4): the analytic solutions, shifted ones, and ``n_random`` fixed random ones."""
    half, zero, one = s / 2, np.zeros_like(s), np.ones_like(s)
    analytic = [
        (one, zero, zero, half),  # drop the second
        (zero, one, half, zero),  # drop the first
        (one, -one, zero, zero),  # antipodal
        (one, -0.5 * one, zero, half),
        (-0.5 * one, one, half, zero),
        (one, one, zero, zero),
    ]
    fixed = np.stack([np.stack(start, axis=-1) for start in analytic], axis=1)
    random = np.random.default_rng(0).normal(0.0, 0.7, size=(n_random, 4))
    return np.concatenate([fixed, np.broadcast_to(random, (len(s), n_random, 4))], axis=1)


def minimise(params: Array, density: Array, importance: Array, *, steps: int = 60) -> tuple[Array, Array]:
    """BFGS with backtracking on every row of ``params`` (N, 4) at once; returns the points (N, 4) and losses (N,)."""
    x = params.copy()
    f, g = loss_and_gradient(x, density, importance)
    identity = np.eye(4)
    inverse = np.tile(identity, (len(x), 1, 1))
    active = np.arange(len(x))
    for _ in range(steps):
        if not len(active):
            break
        s, r = density[active], importance[active]
        fa, ga = f[active], g[active]
        direction = -np.einsum("nij,nj->ni", inverse[active], ga)
        slope = np.einsum("ni,ni->n", direction, ga)
        uphill = slope >= 0
        direction[uphill], slope[uphill] = -ga[uphill], -np.sum(ga[uphill] ** 2, axis=-1)
        inverse[active[uphill]] = identity
        length = np.minimum(1.0, 1.0 / np.maximum(np.linalg.norm(direction, axis=-1), 1e-300))
        new_f, new_g = np.full_like(fa, np.inf), ga.copy()
        todo = np.arange(len(active))
        for _ in range(20):
            trial = x[active[todo]] + length[todo, None] * direction[todo]
            new_f[todo], new_g[todo] = loss_and_gradient(trial, s[todo], r[todo])
            todo = todo[~(new_f[todo] <= fa[todo] + 1e-4 * length[todo] * slope[todo])]
            if not len(todo):
                break
            length[todo] *= 0.5
        stuck = np.zeros(len(active), dtype=bool)
        stuck[todo] = True
        moved = active[~stuck]
        step, change = (length[:, None] * direction)[~stuck], (new_g - ga)[~stuck]
        x[moved] += step
        f[moved], g[moved] = new_f[~stuck], new_g[~stuck]
        curvature = np.einsum("ni,ni->n", step, change)
        good = curvature > 1e-12 * np.linalg.norm(step, axis=-1) * np.linalg.norm(change, axis=-1)
        rho = np.where(good, 1.0 / np.where(good, curvature, 1.0), 0.0)[:, None, None]
        left = identity - rho * step[:, :, None] * change[:, None, :]
        inverse[moved] = left @ inverse[moved] @ left.swapaxes(1, 2) + rho * step[:, :, None] * step[:, None, :]
        # slope is minus twice the decrease that a quadratic model still promises.
        active = moved[slope[~stuck] < -1e-16]
    return x, f


def optimum(density: ArrayLike, importance: ArrayLike, *, n_random: int = 6) -> Optimum:
    """Smallest L over (W, b) at each (s, r) from several starts, the analytic solutions among them.

    ``density`` and ``importance`` broadcast; the result has their shape. Multi-start BFGS finds local optima, so the
    loss is an upper bound of the global one, and never above that of the analytic solutions it starts from.
    """
    s, r = np.broadcast_arrays(np.asarray(density, dtype=np.float64), np.asarray(importance, dtype=np.float64))
    starts = _starts(s.ravel(), n_random)
    count = starts.shape[1]
    points, losses = minimise(starts.reshape(-1, 4), np.repeat(s.ravel(), count), np.repeat(r.ravel(), count))
    points, losses = points.reshape(-1, count, 4), losses.reshape(-1, count)
    best = np.argmin(losses, axis=1)
    rows = np.arange(len(best))
    point = points[rows, best].reshape(*s.shape, 4)
    return Optimum(losses[rows, best].reshape(s.shape), point[..., :2], point[..., 2:])
