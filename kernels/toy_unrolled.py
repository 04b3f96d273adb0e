"""CPU twin for the smallest models: the training step of one shape written out, a register for every weight.

A model of two or three features has fewer weights than a CPU has vector lanes. Where n, m, E and k are known to the
compiler, a step is a straight run of multiply-adds per expert, 16 samples at a time, and the gradients stay in
registers until the batch is done. The source of each shape goes into a file of its own, because Numba caches compiled
code by source file; the file's name is a digest of everything that went into it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

MAX_EXPERTS = 3
MAX_EXPERT_PARAMETERS = 48
"""Weights and biases of one expert. With one expert, the unrolled step was found to take three quarters of the grouped
one's time at 40, nine tenths at 60, and more than it at 120; compilation grows with it."""


def fits(n_features: int, n_hidden: int, n_experts: int, shared_hidden: int, tied: bool) -> bool:
    """Whether the unrolled step takes this shape: small tied experts, few enough to be masked rather than grouped."""
    small = n_features * (n_hidden + 1) <= MAX_EXPERT_PARAMETERS
    return small and n_experts <= MAX_EXPERTS and tied and not shared_hidden


@cache
def unrolled_trainer(n: int, m: int, n_experts: int, k: int, gate: str, balanced: bool) -> Callable[..., None]:
    """Return ``train_models`` compiled for one shape and gate; ``balanced``: with the load-balance term.

    It takes the arguments of `toy_grouped.train_models` after the sizes, for models with independent features.
    """
    from moesaic.kernels import toy_cpu

    text = source(n, m, n_experts, k, gate, balanced)
    digest = hashlib.sha256((inspect.getsource(toy_cpu) + text).encode()).hexdigest()[:16]
    name = f"toy_{n}_{m}_{n_experts}_{k}_{digest}"
    path = _folder() / f"{name}.py"
    if not path.exists():
        temporary = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path}: cannot be imported")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    trainer: Callable[..., None] = module.train_models
    return trainer


@cache
def _folder() -> Path:
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "moesaic"
    try:
        user.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=user):
            return user
    except OSError:
        return Path(tempfile.mkdtemp(prefix="moesaic-"))


def source(n: int, m: int, n_experts: int, k: int, gate: str, balanced: bool) -> str:
    """Return the module's text; ``gate`` is a gate's name or ``frozen`` for the two that keep their router."""
    through_softmax = gate in ("switch", "straight_through")
    routed = n_experts > 1 or gate == "sigmoid"
    learned = routed and (gate in ("switch", "sigmoid", "straight_through") or (gate == "paper" and k > 1))
    balanced = balanced and n_experts > 1
    pulled = balanced and gate != "frozen"
    softmax = balanced or gate in ("switch", "straight_through") or k > 1
    values = {
        "n": n, "m": m, "n_experts": n_experts, "k": k, "frozen": gate == "frozen", "routed": routed,
        "learned": learned, "balanced": balanced, "pulled": pulled,
        "separate": gate in ("sigmoid", "switch") or k > 1,
    }  # fmt: skip
    parts = [_HEADER.format(**{name: repr(value) for name, value in values.items()}), _draw(n)]
    if routed:
        parts.append(_route(n, n_experts, k, gate, softmax))
    if k > 1:
        parts.append(_error(n, m, n_experts))
    parts.append(_expert(n, m, single=k == 1))
    if learned or pulled:
        parts.append(_router(n, m, n_experts, k, "through_softmax" if through_softmax else gate, learned, pulled))
    return "\n\n".join([*parts, _TRAIN])


def _sum(terms: Iterable[str]) -> str:
    return " + ".join(terms)


def _block(lines: Iterable[str], indent: int) -> str:
    return "".join(f"{' ' * indent}{line}\n" for line in lines)


def _loads(n: int, m: int, e: int | str, at: str) -> list[str]:
    """One expert's parameters into scalars; ``e`` tells them apart where several experts are in one loop."""
    weights = [f"w{e}_{i}_{j} = theta[{at} * {n * m} + {i * m + j}]" for i in range(n) for j in range(m)]
    return weights + [f"b{e}_{i} = theta[AT_BIAS + {at} * {n} + {i}]" for i in range(n)]


def _output(n: int, m: int, e: int | str) -> list[str]:
    """Write h = x W and y = ReLU(h Wᵀ + b) of one sample; a comparison, not max(), so that NaN stays."""
    lines = [f"h{e}_{j} = " + _sum(f"x{i} * w{e}_{i}_{j}" for i in range(n)) for j in range(m)]
    for i in range(n):
        lines.append(f"z{e}_{i} = " + _sum(f"h{e}_{j} * w{e}_{i}_{j}" for j in range(m)) + f" + b{e}_{i}")
        lines.append(f"y{e}_{i} = zero if z{e}_{i} <= zero else z{e}_{i}")
    return lines


def _draw(n: int) -> str:
    """Write the samples, features-major; words that no feature takes are never made."""
    text = (
        "@njit(nogil=True, error_model='numpy')\n"
        "def draw(key, step, p, batch, words, x):\n    low, high = key & LOW, key >> SHIFT\n"
    )
    for first in range(0, n, 4):
        taken = range(min(4, n - first))
        words = [f"words[{j}, b] = c{j}" for j in taken]
        text += "    for b in range(batch):\n"
        text += _block([f"c0, c1, c2, c3 = philox(low, high, b, {first // 4}, step, 0)", *words], 8)
        for j in taken:
            i = first + j
            text += f"    q = p[{i}]\n    for b in range(batch):\n"
            text += _block([f"u = unit(words[{j}, b])", "v = u / q", f"x[{i}, b] = v if u < q else zero"], 8)
    return text


def _route(n: int, n_experts: int, k: int, gate: str, softmax: bool) -> str:
    experts = range(n_experts)
    loads = [f"r{e}_{i} = theta[AT_ROUTER + {e * n + i}]" for e in experts for i in range(n)]
    lines = [f"x{i} = x[{i}, b]" for i in range(n)]
    lines += [f"s{e} = " + _sum(f"x{i} * r{e}_{i}" for i in range(n)) for e in experts]
    for e in experts:
        # An expert is chosen if fewer than k are ahead of it; of equals the lower id is ahead.
        ahead = [f"(s{j} {'>=' if j < e else '>'} s{e})" for j in experts if j != e]
        lines.append(f"t{e} = one if {_sum(ahead) or '0'} < {k} else zero")
        lines.append(f"chosen[{e}, b] = t{e}")
    if softmax:
        top = "s0"
        for e in experts[1:]:
            top = f"max({top}, s{e})"
        lines += [f"top = {top}", *(f"p{e} = exp32(s{e} - top)" for e in experts)]
        lines += ["total = one / (" + _sum(f"p{e}" for e in experts) + ")"]
        for e in experts:
            lines += [f"p{e} *= total", f"probs[{e}, b] = p{e}"]
    if gate == "sigmoid":
        for e in experts:
            lines += [f"q{e} = exp32(-abs(s{e}))", f"g{e} = (one if s{e} >= zero else q{e}) / (one + q{e}) * t{e}"]
    elif gate == "switch":
        lines += [f"g{e} = p{e} * t{e}" for e in experts]
    elif k > 1:
        lines += ["total = " + _sum(f"p{e} * t{e}" for e in experts), *(f"g{e} = p{e} * t{e} / total" for e in experts)]
    if gate in ("sigmoid", "switch") or k > 1:
        lines += [f"gates[{e}, b] = g{e}" for e in experts]
    return (
        "@njit(nogil=True, error_model='numpy', fastmath={'contract', 'nsz'})\n"
        "def route(theta, x, batch, chosen, probs, gates):\n" + _block(loads, 4) + "    for b in range(batch):\n"
    ) + _block(lines, 8)


def _error(n: int, m: int, n_experts: int) -> str:
    experts = range(n_experts)
    loads = [line for e in experts for line in _loads(n, m, e, str(e))]
    lines = [f"x{i} = x[{i}, b]" for i in range(n)]
    for e in experts:
        lines += _output(n, m, e)
    lines += [f"error[{i}, b] = " + _sum(f"gates[{e}, b] * y{e}_{i}" for e in experts) + f" - x{i}" for i in range(n)]
    return (
        "@njit(nogil=True, error_model='numpy', fastmath={'contract', 'nsz'})\n"
        "def reconstruct(theta, x, gates, batch, error):\n" + _block(loads, 4) + "    for b in range(batch):\n"
    ) + _block(lines, 8)


def _expert(n: int, m: int, *, single: bool) -> str:
    """Gradients of one expert; with one active expert its output is the whole, so the loss is formed here too."""
    loads = _loads(n, m, "", "e") + [f"i{i} = importance[{i}]" for i in range(n)]
    loads += [f"c{i} = two * scale * i{i}" for i in range(n)]
    loads += [f"f{i}_{j} = zero" for i in range(n) for j in range(m)] + [f"f{i} = zero" for i in range(n)]
    lines = [f"x{i} = x[{i}, b]" for i in range(n)] + _output(n, m, "") + ["g = gates[e, b]"]
    if single:
        lines += ["t = chosen[e, b]", *(f"r{i} = t * (g * y_{i} - x{i})" for i in range(n))]
        lines += ["loss += " + _sum(f"i{i} * r{i} * r{i}" for i in range(n))]
    else:
        lines += [f"r{i} = error[{i}, b]" for i in range(n)]
    lines += [f"d{i} = g * c{i} * r{i} if y_{i} > zero else zero" for i in range(n)]
    lines += [f"k{j} = " + _sum(f"d{i} * w_{i}_{j}" for i in range(n)) for j in range(m)]
    lines += [f"f{i} += d{i}" for i in range(n)]
    lines += [f"f{i}_{j} += d{i} * h_{j} + k{j} * x{i}" for i in range(n) for j in range(m)]
    stores = [f"grad[e * {n * m} + {i * m + j}] = f{i}_{j}" for i in range(n) for j in range(m)]
    stores += [f"grad[AT_BIAS + e * {n} + {i}] = f{i}" for i in range(n)]
    return (
        "@njit(nogil=True, error_model='numpy', fastmath=MATH)\n"
        "def expert(theta, e, x, chosen, gates, error, importance, scale, batch, grad):\n"
        + _block([*loads, "loss = zero"], 4) + "    for b in range(batch):\n" + _block(lines, 8)
        + _block([*stores, "return loss"], 4)
    )  # fmt: skip


def _router(n: int, m: int, n_experts: int, k: int, gate: str, learned: bool, pulled: bool) -> str:
    experts = range(n_experts)
    loads = [f"a{e} = load[{e}]" for e in experts] + [f"f{e}_{i} = zero" for e in experts for i in range(n)]
    lines = [f"x{i} = x[{i}, b]" for i in range(n)]
    if pulled or gate == "through_softmax":
        lines += [f"p{e} = probs[{e}, b]" for e in experts]
    if learned:
        loads += [line for e in experts for line in _loads(n, m, e, str(e))]
        loads += [f"c{i} = two * scale * importance[{i}]" for i in range(n)]
        for e in experts:
            lines += [f"t{e} = chosen[{e}, b]", f"g{e} = gates[{e}, b]", *_output(n, m, e)]
            r = [f"t{e} * (g{e} * y{e}_{i} - x{i})" if k == 1 else f"error[{i}, b]" for i in range(n)]
            lines += [f"d{e} = " + _sum(f"c{i} * {r[i]} * y{e}_{i}" for i in range(n))]
        if gate == "sigmoid":
            lines += [f"q{e} = d{e} * g{e} * (one - g{e})" for e in experts]
        elif gate == "through_softmax":
            lines += ["mean = " + _sum(f"t{e} * p{e} * d{e}" for e in experts)]
            lines += [f"q{e} = p{e} * (t{e} * d{e} - mean)" for e in experts]
        else:
            lines += ["mean = " + _sum(f"g{e} * d{e}" for e in experts)]
            lines += [f"q{e} = g{e} * (d{e} - mean)" for e in experts]
    else:
        lines += [f"q{e} = zero" for e in experts]
    if pulled:
        lines += ["mean = " + _sum(f"a{e} * p{e}" for e in experts)]
        lines += [f"q{e} += load_scale * p{e} * (a{e} - mean)" for e in experts]
    lines += [f"f{e}_{i} += q{e} * x{i}" for e in experts for i in range(n)]
    stores = [f"grad[AT_ROUTER + {e * n + i}] = f{e}_{i}" for e in experts for i in range(n)]
    return (
        "@njit(nogil=True, error_model='numpy', fastmath=MATH)\n"
        "def router(theta, x, chosen, probs, gates, error, importance, scale, load, load_scale, batch, grad):\n"
        + _block(loads, 4) + "    for b in range(batch):\n" + _block(lines, 8) + _block(stores, 4)
    )  # fmt: skip


_HEADER = '''"""Written by moesaic.kernels.toy_unrolled, which can write it again."""
import numpy as np
from numba import njit

from moesaic.kernels.toy_cpu import LOW, MATH, SHIFT, adamw, aligned, exp32, philox, unit

N, M, E, K = {n}, {m}, {n_experts}, {k}
ROUTED, LEARNED, BALANCED, PULLED, FROZEN, SEPARATE = {routed}, {learned}, {balanced}, {pulled}, {frozen}, {separate}
AT_BIAS, AT_ROUTER = E * N * M, E * N * (M + 1)
zero, one, two = np.float32(0.0), np.float32(1.0), np.float32(2.0)
'''

_TRAIN = """
@njit(nogil=True, error_model="numpy", fastmath=MATH)
def total(values, batch):
    found = zero
    for b in range(batch):
        found += values[b]
    return found


@njit(nogil=True, error_model="numpy", fastmath=MATH)
def squares(error, importance, batch):
    loss = zero
    for i in range(N):
        found = zero
        for b in range(batch):
            found += error[i, b] * error[i, b]
        loss += importance[i] * found
    return loss


@njit(nogil=True, error_model="numpy", fastmath=MATH, cache=True)
def train_models(
    batch, thetas, exp_avgs, exp_avg_sqs, kinds, keys, ps, sizes, importances, gate_ids, lrs, decays, beta1s, beta2s,
    epss, load_balances, scales, first_step, losses, load_losses,
):
    words, x = np.empty((4, batch), np.uint32), aligned(N, batch)
    chosen, probs, error = aligned(E, batch), aligned(E, batch), aligned(N, batch)
    gates = aligned(E, batch)
    chosen[:], probs[:], gates[:] = one, one, one
    # Where the gate is 1 for the chosen and 0 for the others, one array is both.
    weights = gates if SEPARATE else chosen
    load, grad = np.ones(E, np.float32), np.zeros(thetas.shape[1], np.float32)
    for model in range(thetas.shape[0]):
        theta, scale, importance = thetas[model], scales[model], importances[model]
        exp_avg, exp_avg_sq = exp_avgs[model], exp_avg_sqs[model]
        load_scale = np.float32(load_balances[model] * E / batch)
        for local in range(losses.shape[1]):
            step = first_step + local
            draw(keys[model], step, ps[model], batch, words, x)
            if ROUTED:
                route(theta, x, batch, chosen, probs, gates)
            balance = 0.0
            if BALANCED:
                for e in range(E):
                    load[e] = total(chosen[e], batch) / np.float32(batch * K)
                    balance += load[e] * np.float64(total(probs[e], batch)) / batch
            else:
                balance = 1.0 if E == 1 else 0.0
            load_losses[model, local] = np.float32(load_balances[model] * E * balance)
            loss = zero
            if K > 1:
                reconstruct(theta, x, weights, batch, error)
                loss = squares(error, importance, batch)
            for e in range(E):
                loss += expert(theta, e, x, chosen, weights, error, importance, scale, batch, grad)
            losses[model, local] = loss * scale
            if LEARNED or PULLED:
                router(theta, x, chosen, probs, weights, error, importance, scale, load, load_scale, batch, grad)
            last = AT_ROUTER if FROZEN else thetas.shape[1]
            adamw(theta[:last], grad[:last], exp_avg[:last], exp_avg_sq[:last], lrs[model, local], decays[model],
                  beta1s[model], beta2s[model], epss[model], step)
"""
