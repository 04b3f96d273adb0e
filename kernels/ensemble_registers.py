"""Whole training of toy models small enough to live in one warp's registers, in Triton.

One program, of one warp, trains one model: the equations and the state are ``kernels.ensemble``'s, for independent
features. Samples run along the lanes: the parameters are broadcast to all lanes at the start of a step, each lane sums
the gradients of its own samples, and one butterfly per step adds the lanes and leaves parameter i's gradient in lane
i mod 32, which keeps that parameter and its moments and updates them.

The load-balance gradient needs the shares f, known only after the last sample. With Σ_e p_e = 1 it is

    Σ_b x_b p_bj (f_j − Σ_e f_e p_be) = Σ_{e≠j} (f_j − f_e) Σ_b x_b p_bj p_be

so E(E−1)/2 · n sums without f are enough, no more than the router has entries as long as E ≤ 3; a first pass for f
would draw and route every sample twice.
"""

# Triton's front end takes no starred tuples, hence the sums of tuples.
# ruff: noqa: RUF005
# And its tuples grow from one line to the next, which for Python's type checker are different types.
# mypy: disable-error-code="assignment,has-type,misc,var-annotated"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.ensemble import GATES, EnsembleSettings, EnsembleShape
from moesaic.kernels.ensemble_registers_math import (
    add_expert,
    broadcast,
    chosen_part,
    dot,
    draw,
    exponential,
    filled,
    lane_sums,
    part,
    reciprocal,
    run_expert,
    select,
    softmax,
    through_relu,
)
from moesaic.kernels.features import INDEPENDENT

_SWITCH = tl.constexpr(GATES.index("switch"))
_SIGMOID = tl.constexpr(GATES.index("sigmoid"))
_STRAIGHT_THROUGH = tl.constexpr(GATES.index("straight_through"))
MAX_EXPERTS, MAX_PARAMETERS = 3, 100


@triton.jit(do_not_specialize=["first_step", "n_steps", "n_blocks", "batch"])
def _train_kernel(
    State, ExpAvg, ExpAvgSq, Models, Keys, Features, Scalars, Steps, Losses, LoadLosses,
    first_step, n_steps, n_blocks, batch,
    N: tl.constexpr, M: tl.constexpr, E: tl.constexpr, K: tl.constexpr, M0: tl.constexpr, TIED: tl.constexpr,
    GATE: tl.constexpr, BALANCE: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    ROUTER_LEARNS: tl.constexpr = GATE <= _STRAIGHT_THROUGH
    BY_PROBS: tl.constexpr = (GATE == _SWITCH) | (GATE == _STRAIGHT_THROUGH)
    # At k = 1 the paper's gate is 1; with one expert, so are probabilities.
    ROUTER_FROM_LOSS: tl.constexpr = ROUTER_LEARNS and (GATE == _SIGMOID or (E > 1 and (BY_PROBS or K > 1)))
    PAIRS: tl.constexpr = E * (E - 1) // 2 if ROUTER_LEARNS and BALANCE else 0
    ONE_OF_MANY: tl.constexpr = K == 1 and E > 1
    SLOTS: tl.constexpr = 1 if K == 1 else E
    DECODER: tl.constexpr = 0 if TIED else E * N * M
    SHARED_DECODER: tl.constexpr = 0 if TIED else N * M0
    ROUTER: tl.constexpr = E * N * M + DECODER + E * N
    SHARED: tl.constexpr = ROUTER + E * N
    P: tl.constexpr = SHARED + N * M0 + SHARED_DECODER + (N if M0 else 0)

    model = tl.load(Models + tl.program_id(0)).to(tl.int64)
    lane = tl.arange(0, 32)
    k0 = tl.load(Keys + 2 * model).to(tl.uint32, bitcast=True)
    k1 = tl.load(Keys + 2 * model + 1).to(tl.uint32, bitcast=True)
    probability, inverse, coefficient = (), (), ()
    for i in tl.static_range(N):
        probability = probability + (tl.load(Features + (model * 3 + 0) * N + i),)
        inverse = inverse + (tl.load(Features + (model * 3 + 1) * N + i),)
        coefficient = coefficient + (tl.load(Features + (model * 3 + 2) * N + i),)
    one_minus_beta1, beta2 = tl.load(Scalars + model * 5), tl.load(Scalars + model * 5 + 1)
    one_minus_beta2, eps = tl.load(Scalars + model * 5 + 2), tl.load(Scalars + model * 5 + 3)
    balance_scale = tl.load(Scalars + model * 5 + 4)
    theta, exp_avg, exp_avg_sq = (), (), ()
    for g in tl.static_range((P + 31) // 32):
        at, mask = model * P + g * 32 + lane, g * 32 + lane < P
        theta = theta + (tl.load(State + at, mask=mask, other=0.0),)
        exp_avg = exp_avg + (tl.load(ExpAvg + at, mask=mask, other=0.0),)
        exp_avg_sq = exp_avg_sq + (tl.load(ExpAvgSq + at, mask=mask, other=0.0),)

    for t in tl.range(0, n_steps):
        step = (first_step.to(tl.int64) + t).to(tl.uint32)
        weight = broadcast(theta, lane, 0, E * N * M)
        decoder = weight if TIED else broadcast(theta, lane, E * N * M, E * N * M)
        bias = broadcast(theta, lane, E * N * M + DECODER, E * N)
        router = broadcast(theta, lane, ROUTER, E * N)
        if M0:
            shared_weight = broadcast(theta, lane, SHARED, N * M0)
            shared_decoder = shared_weight if TIED else broadcast(theta, lane, SHARED + N * M0, N * M0)
            shared_bias = broadcast(theta, lane, SHARED + N * M0 + SHARED_DECODER, N)

        g_weight, g_decoder, g_bias = filled(0.0, E * N * M), filled(0.0, DECODER), filled(0.0, E * N)
        g_router, pairs = filled(0.0, E * N), filled(0.0, PAIRS * N)
        g_shared_weight, g_shared_decoder = filled(0.0, N * M0), filled(0.0, SHARED_DECODER)
        g_shared_bias = filled(0.0, N if M0 else 0)
        counts, prob_sums, loss = filled(0.0, E - 1), filled(0.0, E - 1), tl.full([32], 0.0, tl.float32)
        for block in tl.range(0, n_blocks):
            row = block * 32 + lane
            x = draw(k0, k1, row.to(tl.uint32), step, probability, inverse, N)
            if RAGGED:
                valid = row < batch
                inside = ()
                for i in tl.static_range(N):
                    inside = inside + (tl.where(valid, x[i], 0.0),)
                x = inside
            else:
                valid = lane >= 0

            scores = ()
            for e in tl.static_range(E):
                scores = scores + (dot(x, router, N, e * N, 1),)
            chosen = select(scores, lane, E, K)
            probs = softmax(scores, select(scores, lane, E, E), E)
            shares = ()
            for e in tl.static_range(E):
                shares = shares + (tl.where(chosen[e] & valid, 1.0, 0.0),)
            if GATE == _SWITCH:
                gates = probs
            elif GATE == _SIGMOID:
                gates = ()
                for e in tl.static_range(E):
                    gates = gates + (reciprocal(1.0 + exponential(-scores[e])),)
            elif K > 1:
                gates = softmax(scores, chosen, E)
            else:
                gates = filled(1.0, E)

            hs, ys, decoders, slot_gates, residual = (), (), (), (), ()
            for i in tl.static_range(N):
                residual = residual + (-x[i],)
            for slot in tl.static_range(SLOTS):
                if ONE_OF_MANY:
                    slot_weight = chosen_part(weight, chosen, E, N * M)
                    slot_decoder = slot_weight if TIED else chosen_part(decoder, chosen, E, N * M)
                    slot_bias = chosen_part(bias, chosen, E, N)
                    slot_gate = chosen_part(gates, chosen, E, 1)[0]
                else:
                    slot_weight = part(weight, slot * N * M, N * M)
                    slot_decoder = part(decoder, slot * N * M, N * M)
                    slot_bias = part(bias, slot * N, N)
                    slot_gate = tl.where(chosen[slot], gates[slot], 0.0)
                h, y = run_expert(x, slot_weight, slot_decoder, slot_bias, N, M)
                hs, ys = hs + (h,), ys + (y,)
                decoders, slot_gates = decoders + (slot_decoder,), slot_gates + (slot_gate,)
                mixed = ()
                for i in tl.static_range(N):
                    mixed = mixed + (residual[i] + slot_gate * y[i],)
                residual = mixed
            if M0:
                shared_h, shared_y = run_expert(x, shared_weight, shared_decoder, shared_bias, N, M0)
                mixed = ()
                for i in tl.static_range(N):
                    mixed = mixed + (residual[i] + shared_y[i],)
                residual = mixed
            scaled = ()
            for i in tl.static_range(N):
                r = coefficient[i] * residual[i]
                if RAGGED:
                    r = tl.where(valid, r, 0.0)
                loss += r * residual[i]
                scaled = scaled + (r,)

            d_gates, new_weight, new_decoder, new_bias = (), (), (), ()
            for e in tl.static_range(E):
                h, y = hs[e if SLOTS == E else 0], ys[e if SLOTS == E else 0]
                dz = through_relu(y, scaled, slot_gates[e if SLOTS == E else 0], N)
                new = add_expert(
                    g_weight, g_decoder, g_bias, x, h, dz, decoders[e if SLOTS == E else 0], shares[e],
                    e, N, M, TIED, ONE_OF_MANY,
                )  # fmt: skip
                new_weight, new_decoder, new_bias = new_weight + new[0], new_decoder + new[1], new_bias + new[2]
                d_gates = d_gates + (tl.where(chosen[e], dot(y, scaled, N, 0, 1), 0.0),)
            g_weight, g_decoder, g_bias = new_weight, new_decoder, new_bias
            if M0:
                dz = through_relu(shared_y, scaled, 1.0, N)
                g_shared_weight, g_shared_decoder, g_shared_bias = add_expert(
                    g_shared_weight, g_shared_decoder, g_shared_bias, x, shared_h, dz, shared_decoder, 1.0,
                    0, N, M0, TIED, False,
                )  # fmt: skip

            if ROUTER_FROM_LOSS:
                values = probs if BY_PROBS else gates
                mean = dot(values, d_gates, E, 0, 1)
                new_router = ()
                for e in tl.static_range(E):
                    if GATE == _SIGMOID:
                        d_score = d_gates[e] * (gates[e] * (1.0 - gates[e]))
                    else:
                        d_score = values[e] * (d_gates[e] - mean)
                    for i in tl.static_range(N):
                        new_router = new_router + (g_router[e * N + i] + d_score * x[i],)
                g_router = new_router
            if BALANCE:
                new_counts, new_sums, new_pairs = (), (), ()
                for e in tl.static_range(1, E):
                    new_counts = new_counts + (counts[e - 1] + shares[e],)
                    prob = tl.where(valid, probs[e], 0.0) if RAGGED else probs[e]
                    new_sums = new_sums + (prob_sums[e - 1] + prob,)
                    for j in tl.static_range(e if PAIRS else 0):
                        both = probs[e] * probs[j]
                        for i in tl.static_range(N):
                            new_pairs = new_pairs + (pairs[(e * (e - 1) // 2 + j) * N + i] + both * x[i],)
                counts, prob_sums, pairs = new_counts, new_sums, new_pairs

        balance = tl.full([32], 0.0, tl.float32)
        if BALANCE:
            # Of the counts and of the mean probabilities, the first follows from the others.
            first, load = (batch * K).to(tl.float32), ()
            for e in tl.static_range(1, E):
                count = tl.sum(counts[e - 1], 0)
                first -= count
                load = load + (balance_scale * count / (batch * K),)
            load = (balance_scale * first / (batch * K),) + load
            balance += load[0] * batch / 32
            for e in tl.static_range(1, E):
                balance += (load[e] - load[0]) * prob_sums[e - 1]
        if PAIRS:
            new_router = ()
            for e in tl.static_range(E):
                for i in tl.static_range(N):
                    total = g_router[e * N + i]
                    for j in tl.static_range(e):
                        total += (load[e] - load[j]) * pairs[(e * (e - 1) // 2 + j) * N + i]
                    for j in tl.static_range(e + 1, E):
                        total += (load[e] - load[j]) * pairs[(j * (j - 1) // 2 + e) * N + i]
                    new_router = new_router + (total,)
            g_router = new_router

        sums = g_weight + g_decoder + g_bias + g_router + g_shared_weight + g_shared_decoder + g_shared_bias
        sums = lane_sums(sums + (loss * 0.5, balance), lane)
        at_step = Steps + (model * n_steps + t) * 3
        step_size, root, keep = tl.load(at_step), tl.load(at_step + 1), tl.load(at_step + 2)
        new_theta, new_avg, new_sq = (), (), ()
        for g in tl.static_range((P + 31) // 32):
            index = g * 32 + lane
            avg = exp_avg[g] + one_minus_beta1 * (sums[g] - exp_avg[g])
            sq = beta2 * exp_avg_sq[g] + one_minus_beta2 * sums[g] * sums[g]
            value = theta[g] * keep - step_size * avg / (tl.sqrt(sq) * root + eps)
            if not ROUTER_LEARNS:
                frozen = (index >= ROUTER) & (index < SHARED)
                avg, sq = tl.where(frozen, exp_avg[g], avg), tl.where(frozen, exp_avg_sq[g], sq)
                value = tl.where(frozen, theta[g], value)
            new_theta, new_avg, new_sq = new_theta + (value,), new_avg + (avg,), new_sq + (sq,)
        theta, exp_avg, exp_avg_sq = new_theta, new_avg, new_sq
        at_loss = model * n_steps + t
        tl.store(Losses + at_loss + lane * 0, sums[P // 32], mask=lane == P % 32)
        tl.store(LoadLosses + at_loss + lane * 0, sums[(P + 1) // 32], mask=lane == (P + 1) % 32)

    for g in tl.static_range((P + 31) // 32):
        at, mask = model * P + g * 32 + lane, g * 32 + lane < P
        tl.store(State + at, theta[g], mask=mask)
        tl.store(ExpAvg + at, exp_avg[g], mask=mask)
        tl.store(ExpAvgSq + at, exp_avg_sq[g], mask=mask)


_POINTERS = {
    **dict.fromkeys(("State", "ExpAvg", "ExpAvgSq"), "*fp32"), "Models": "*i64", "Keys": "*i32",
    **dict.fromkeys(("Features", "Scalars", "Steps", "Losses", "LoadLosses"), "*fp32"),
}  # fmt: skip


def constants(shape: EnsembleShape, gate: int, *, balance: bool) -> dict[str, Any]:
    """Return the kernel's compile-time arguments for models of one gate."""
    return {
        "N": shape.n_features, "M": shape.n_hidden, "E": shape.n_experts, "K": shape.top_k, "M0": shape.shared_hidden,
        "TIED": shape.tied, "GATE": gate, "BALANCE": balance, "RAGGED": shape.batch_size % 32 != 0,
    }  # fmt: skip


def signature_and_constants(
    shape: EnsembleShape, gate: int, *, balance: bool
) -> tuple[dict[str, str], dict[str, Any], int]:
    """Return signature, compile-time arguments and warps, as ``launch`` has the kernel compiled: see ``ASTSource``."""
    values = constants(shape, gate, balance=balance)
    integers = dict.fromkeys(("first_step", "n_steps", "n_blocks", "batch"), "i32")
    return _POINTERS | integers | dict.fromkeys(values, "constexpr"), values, 1


def fits_shape(shape: EnsembleShape) -> bool:
    """Return whether ``launch`` takes models of this shape: E ≤ 3, and at most ``MAX_PARAMETERS`` parameters.

    On sm_90 up to 60 parameters stay in registers. At the limit up to 400 bytes of a lane's values spill to its stack.
    """
    return (
        shape.n_experts <= MAX_EXPERTS
        and shape.n_parameters <= MAX_PARAMETERS
        and shape.batch_size < 2**24  # counts of samples are exact in float32
    )


def fits(shape: EnsembleShape, settings: EnsembleSettings) -> bool:
    """Return whether ``launch`` takes these models: ``fits_shape``, and independent features."""
    return fits_shape(shape) and bool((settings.features.kind == INDEPENDENT).all())


def launch(
    shape: EnsembleShape,
    settings: EnsembleSettings,
    state: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: Tensor,
    first_step: int,
) -> tuple[Tensor, Tensor]:
    """Train as ``kernels.train_ensemble`` does, on the device of ``state``.

    The gates and the load-balance coefficients choose what is compiled and are read on the host: with settings that
    live there, nothing waits for the device.
    """
    device, (s, n_steps), lr = state.device, lr.shape, lr.to(state.device)
    gate, balances = settings.gate.cpu(), settings.load_balance.cpu() != 0
    scale, importance = settings.scale.to(device), settings.importance.to(device)
    p = settings.features.probability.to(device)
    features = torch.stack(
        [p, (1 / p).clamp(max=torch.finfo(torch.float32).max), 2 * scale[:, None] * importance], dim=1
    )
    weight_decay, beta1, beta2, eps, load_balance = (
        getattr(settings, name).to(device) for name in ("weight_decay", "beta1", "beta2", "eps", "load_balance")
    )
    balance_scale = load_balance * shape.n_experts / shape.batch_size
    scalars = torch.stack([1 - beta1, beta2, 1 - beta2, eps, balance_scale], dim=1).float()
    done = torch.arange(first_step + 1, first_step + n_steps + 1, dtype=torch.float64, device=device)
    steps = torch.empty(s, n_steps, 3, device=device)
    steps[..., 0] = lr / (1 - beta1[:, None] ** done)
    steps[..., 1] = (1 - beta2[:, None] ** done).rsqrt()
    steps[..., 2] = 1 - lr * weight_decay[:, None]
    losses, load_losses = (torch.empty(s, n_steps, device=device) for _ in range(2))
    keys = settings.seeds.view(torch.int32).to(device)
    for kind in gate.unique().tolist():
        for balance in (False, True):
            models = ((gate == kind) & (balances == balance)).nonzero()[:, 0]
            if len(models):
                _train_kernel[(len(models),)](
                    state, exp_avg, exp_avg_sq, models.to(device), keys, features, scalars, steps, losses, load_losses,
                    first_step, n_steps, triton.cdiv(shape.batch_size, 32), shape.batch_size,
                    **constants(shape, kind, balance=balance), num_warps=1, num_stages=1,
                )  # fmt: skip
    return losses, load_losses
