"""Whole training of toy models whose state lies in memory: one program trains one model, all steps in one launch.

    route:    s = x routerᵀ, top-k, gate weights w; the rows of each expert's samples, in order
    experts:  for e: for tiles of e's samples:  h = x W_e,  z = h D_eᵀ + b_e,  x' (+)= w ReLU(z),  r = x' − x
              dz = w 2·scale·I r 1[z > 0],  dh = dz D_e,  dD_e += dzᵀ h,  dW_e += xᵀ dh;  AdamW of expert e
    router:   ds from dL/dw and the load-balance loss,  d_router = dsᵀ x;  AdamW

A sample is drawn again wherever it is needed. For k = 1 without a shared expert x' has one term, and one pass over the
experts does all; else one pass adds the terms, expert by expert, into r, and another goes backward. Moments are read
and written once per step, and parameters written once. fp32 with IEEE products; sums run in a fixed order.

Features are taken 16 at a time: a product of IEEE floats keeps its operands in registers along all of the summed axis,
so a sum over 100 features would spill. A tile's x waits in scratch memory between its three sweeps, and so do sums of
gradients between tiles. A program's scratch memory is ``scratch_bytes``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.ensemble import GATES, EnsembleSettings, EnsembleShape
from moesaic.kernels.ensemble_memory_experts import add_experts, step_experts
from moesaic.kernels.ensemble_memory_math import BLOCK_N, adamw, unknown_zero
from moesaic.kernels.ensemble_memory_router import SIGMOID, STRAIGHT_THROUGH, SWITCH, route, router_gradient
from moesaic.kernels.features import EXACTLY_K

FIRST_FROZEN = tl.constexpr(GATES.index("random"))  # and the oracle gate after it

# State bytes of one model: θ and two moments, fp32. The largest shape within the other bounds takes 3.2 MiB.
LIMIT_BYTES = 4 * 2**20
MAX_FEATURES, MAX_HIDDEN, MAX_EXPERTS, MAX_BATCH = 128, 32, 32, 2**20
SCRATCH_BYTES = 8 * 2**30  # of all models of one launch; more models are trained by several, one after the other

POINTERS = {
    **dict.fromkeys(("State", "ExpAvg", "ExpAvgSq"), "*fp32"), "Models": "*i64", "Seeds": "*i64", "Gate": "*i32",
    "Size": "*i32", **dict.fromkeys(("Probability", "Inverse", "Importance", "Scalars", "Schedule"), "*fp32"),
    "Steps": "*i64", **dict.fromkeys(("Losses", "LoadLosses", "Scratch"), "*fp32"), "Lists": "*i32", "Zero": "*i32",
}  # fmt: skip


@triton.jit(do_not_specialize=["n_steps", "batch"])
def _train_kernel(State, ExpAvg, ExpAvgSq, Models, Seeds, Gate, Size, Probability, Inverse, Importance, Scalars,
                  Schedule, Steps, Losses, LoadLosses, Scratch, Lists, Zero, n_steps, batch,
                  N: tl.constexpr, M: tl.constexpr, E: tl.constexpr, K: tl.constexpr, M0: tl.constexpr,
                  TIED: tl.constexpr, KIND: tl.constexpr, FLOATS: tl.constexpr, BLOCK_M: tl.constexpr,
                  BLOCK_E: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    model = tl.load(Models + program)
    FUSED: tl.constexpr = (K == 1) and (M0 == 0)
    AT_ROUTER: tl.constexpr = E * N * M * (1 if TIED else 2) + E * N
    P: tl.constexpr = AT_ROUTER + E * N + (N * M0 * (1 if TIED else 2) + N if M0 > 0 else 0)
    State += model * P
    ExpAvg += model * P
    ExpAvgSq += model * P
    Probability += model * N
    Inverse += model * N
    Importance += model * N
    Scalars += model * 7
    Tile = Scratch + program * (FLOATS + batch.to(tl.int64) * (3 * E + (0 if FUSED else N)))
    Hidden = Tile + BLOCK_B * N
    DHidden = Hidden + BLOCK_B * BLOCK_M
    SumsB = DHidden + BLOCK_B * BLOCK_M
    SumsW = SumsB + N
    SumsD = SumsW if TIED else SumsW + N * BLOCK_M
    Logits = Tile + FLOATS
    Gates = Logits + batch * E
    DGates = Gates + batch * E
    Residual = DGates + batch * E
    Rows = Lists + program * batch * E

    key, gate, size = tl.load(Seeds + model), tl.load(Gate + model), tl.load(Size + model)
    scale, load_scale, load_factor = tl.load(Scalars + 4), tl.load(Scalars + 5), tl.load(Scalars + 6)
    frozen = gate >= FIRST_FROZEN
    # With one expert the softmax is 1, and only a sigmoid gate depends on the logit.
    routed = (gate == SIGMOID) | (E > 1) | (not FUSED)
    softly = (K > 1) | (gate == SWITCH) | (gate == STRAIGHT_THROUGH)
    by_weight = (not frozen) & ((gate == SIGMOID) | ((E > 1) & softly))
    trains = by_weight | ((load_scale != 0) & (E > 1))

    for t in range(n_steps):
        data = (key, tl.load(Steps + t).to(tl.uint32), Probability, Inverse, size)
        now = Schedule + (model * n_steps + t) * 3
        adam = (tl.load(Scalars), tl.load(Scalars + 1), tl.load(Scalars + 2), tl.load(Scalars + 3),
                tl.load(now), tl.load(now + 1), tl.load(now + 2))  # fmt: skip
        counts, balance = tl.zeros([BLOCK_E], tl.int32) + batch, tl.full([], 1.0, tl.float32)
        if routed:
            counts, mass = route(
                data, Zero, State + AT_ROUTER, Logits, Gates, Rows, Residual, gate, batch, trains, N, E, K, FUSED, KIND,
                BLOCK_E, BLOCK_R,
            )  # fmt: skip
            balance = tl.sum(counts.to(tl.float32) / (batch * K) * mass) / batch
            tl.debug_barrier()
        tl.store(LoadLosses + model * n_steps + t, load_factor * balance)

        routing = (Rows, Gates, counts, routed)
        loss = tl.zeros([BLOCK_B], tl.float32)
        if not FUSED:
            loss = add_experts(
                data, routing, Zero, State, Importance, Tile, Hidden, Residual, batch, N, M, E, M0, TIED, KIND, BLOCK_M,
                BLOCK_E, BLOCK_B,
            )  # fmt: skip
        loss += step_experts(
            data, routing, adam, Zero, State, ExpAvg, ExpAvgSq, Importance, Tile, Hidden, DHidden, SumsB, SumsW, SumsD,
            DGates, Residual, scale, by_weight, batch, N, M, E, M0, FUSED, TIED, KIND, BLOCK_M, BLOCK_E, BLOCK_B,
        )  # fmt: skip
        tl.store(Losses + model * n_steps + t, tl.sum(loss) * scale)

        if not frozen:
            if trains:
                router_gradient(
                    data, Zero, Logits, Gates, DGates, SumsW, counts, gate, batch, load_scale, by_weight, N, E, K, KIND,
                    BLOCK_E, BLOCK_R,
                )  # fmt: skip
            nil = unknown_zero(Zero)
            e = nil + tl.arange(0, BLOCK_E)
            for first in range(0, N, BLOCK_N):
                n = nil + first + tl.arange(0, BLOCK_N)
                there = (n < N)[:, None] & (e < E)[None, :]
                grad = tl.load(SumsW + n[:, None] * E + e[None, :], mask=there & trains, other=0.0)
                adamw(State, ExpAvg, ExpAvgSq, AT_ROUTER + e[None, :] * N + n[:, None], there, grad, adam)
        # The next step reads the parameters and overwrites the scratch memory.
        tl.debug_barrier()


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of one shape: samples per tile of an expert and of the router, hidden units, experts, warps."""

    samples: int
    routed: int
    hidden: int
    experts: int
    warps: int


def tiles(shape: EnsembleShape) -> Tiles:
    """Return the shipped tile sizes.

    An expert's last tile is half empty on average: tiles of at most half of its mean share waste a quarter.
    """
    share = shape.batch_size * shape.top_k // shape.n_experts
    hidden = triton.next_power_of_2(max(shape.n_hidden, shape.shared_hidden))
    # By the compiler's report, half the warps spill; so do 32 samples of many hidden units on two warps, and on sm_80
    # 64 samples for the router.
    wide = shape.n_features > 32
    most = 64 if wide else 32 if hidden <= 8 else 16
    samples = min(most, max(16, 2 ** (max(share, 2).bit_length() - 2)))
    return Tiles(samples, 32, hidden, triton.next_power_of_2(shape.n_experts), 8 if wide else 2)


def check(shape: EnsembleShape, settings: EnsembleSettings) -> None:
    """Refuse what the kernel cannot train.

    Raises:
        ValueError: naming the argument, its value and what is taken.
    """
    limits = {"n_features": MAX_FEATURES, "n_hidden": MAX_HIDDEN, "n_experts": MAX_EXPERTS, "batch_size": MAX_BATCH}
    for name, most in limits.items():
        if not 1 <= getattr(shape, name) <= most:
            raise ValueError(f"{name}={getattr(shape, name)}: the GPU ensemble takes 1 to {most}")
    if not 0 <= shape.shared_hidden <= MAX_HIDDEN:
        raise ValueError(f"shared_hidden={shape.shared_hidden}: the GPU ensemble takes 0 to {MAX_HIDDEN}")
    if not 1 <= shape.top_k <= shape.n_experts:
        raise ValueError(f"top_k={shape.top_k}: takes 1 to n_experts={shape.n_experts}")
    if 12 * shape.n_parameters > LIMIT_BYTES:
        raise ValueError(
            f"n_parameters={shape.n_parameters}: {12 * shape.n_parameters} bytes of state per model, "
            f"the GPU ensemble takes at most {LIMIT_BYTES}"
        )
    if bool((settings.features.kind == EXACTLY_K).any()):
        raise ValueError(f"features.kind={EXACTLY_K} (exactly-k data): the GPU ensemble draws 0 to {EXACTLY_K - 1}")


def fits(shape: EnsembleShape, settings: EnsembleSettings) -> bool:
    """Return whether ``check`` passes."""
    try:
        check(shape, settings)
    except ValueError:
        return False
    return True


def _fixed_floats(shape: EnsembleShape) -> int:
    """Return the scratch floats that do not grow with the batch: x, h and dL/dh of one tile, and sums of gradients."""
    size = tiles(shape)
    sums = 1 + max((1 if shape.tied else 2) * size.hidden, shape.n_experts)
    return size.samples * (shape.n_features + 2 * size.hidden) + shape.n_features * sums


def _scratch_floats(shape: EnsembleShape) -> int:
    fused = shape.top_k == 1 and shape.shared_hidden == 0
    return _fixed_floats(shape) + shape.batch_size * (3 * shape.n_experts + (0 if fused else shape.n_features))


def scratch_bytes(shape: EnsembleShape) -> int:
    """Return the scratch memory of one model.

    4 (tile (n + 2M) + n (1 + max(M [2M if untied], E)) + 4 B·E [+ B·n if k > 1 or a shared expert]), M = m rounded up
    to a power of two: x, h and dL/dh of one tile; sums of gradients; logits, gate weights and their gradients, (B, E)
    each, and the rows of each expert's samples; residuals (B, n).
    """
    return 4 * (_scratch_floats(shape) + shape.batch_size * shape.n_experts)


def constants(shape: EnsembleShape, kind: int = 0) -> dict[str, Any]:
    """Return the kernel's compile-time arguments for a shape and a kind of features."""
    size = tiles(shape)
    return {
        "N": shape.n_features, "M": shape.n_hidden, "E": shape.n_experts, "K": shape.top_k, "M0": shape.shared_hidden,
        "TIED": shape.tied, "KIND": kind, "FLOATS": _fixed_floats(shape), "BLOCK_M": size.hidden,
        "BLOCK_E": size.experts, "BLOCK_B": size.samples, "BLOCK_R": size.routed,
    }  # fmt: skip


def signature_and_constants(shape: EnsembleShape, kind: int = 0) -> tuple[dict[str, str], dict[str, Any], int]:
    """Return signature, compile-time arguments and warps, as ``launch`` has the kernel compiled: see ``ASTSource``."""
    values, numbers = constants(shape, kind), {"n_steps": "i32", "batch": "i32"}
    return POINTERS | numbers | dict.fromkeys(values, "constexpr"), values, tiles(shape).warps


def launch(
    shape: EnsembleShape, settings: EnsembleSettings, state: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, lr: Tensor,
    first_step: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Train as ``train_ensemble`` does, on the device of ``state``; nothing waits for the device.

    Args:
        shape: the common sizes.
        settings: the per-model settings, on any device; the CPU saves ``check`` a wait.
        state: (S, P) float32, contiguous, updated in place.
        exp_avg: (S, P) float32, updated in place.
        exp_avg_sq: (S, P) float32, updated in place.
        lr: (S, steps) float64, on any device.
        first_step: index of the first step.

    Returns:
        (S, steps) float32 reconstruction losses and (S, steps) load-balance losses, on the device of ``state``.

    Raises:
        ValueError: as ``check``.
    """
    check(shape, settings)
    device, (s, n_steps), batch, n_experts = state.device, lr.shape, shape.batch_size, shape.n_experts
    losses, load_losses = (torch.empty(s, n_steps, device=device) for _ in range(2))
    frozen = settings.gate >= FIRST_FROZEN.value
    balance = settings.load_balance * n_experts
    scalars = torch.stack(
        [1 - settings.beta1, settings.beta2, 1 - settings.beta2, settings.eps, settings.scale.double(),
         torch.where(frozen, 0.0, balance / batch), balance], 1,
    ).float()  # fmt: skip
    after = torch.arange(first_step + 1, first_step + n_steps + 1, dtype=torch.float64, device=lr.device)
    beta1, beta2, decay = (
        getattr(settings, name).to(lr.device)[:, None] for name in ("beta1", "beta2", "weight_decay")
    )
    schedule = torch.stack([lr / (1 - beta1**after), 1 - lr * decay, (1 - beta2**after).rsqrt()], 2).float()
    probability = settings.features.probability
    inverse = 1 / probability.clamp(min=1e-30)
    steps = torch.arange(first_step, first_step + n_steps)
    per_model = (
        settings.seeds, settings.gate.int(), settings.features.size.int(), probability, inverse, settings.importance,
        scalars, schedule, steps,
    )  # fmt: skip
    arguments = [value.to(device, non_blocking=True).contiguous() for value in per_model]
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    kinds, most = settings.features.kind.cpu(), max(1, SCRATCH_BYTES // scratch_bytes(shape))
    for kind in kinds.unique().tolist():
        for models in (kinds == kind).nonzero()[:, 0].to(device, non_blocking=True).split(most):
            scratch = torch.empty(len(models), _scratch_floats(shape), device=device)
            lists = torch.empty(len(models), batch * n_experts, dtype=torch.int32, device=device)
            _train_kernel[(len(models),)](
                state, exp_avg, exp_avg_sq, models, *arguments, losses, load_losses, scratch, lists, zero, n_steps,
                batch, **constants(shape, kind), num_warps=tiles(shape).warps, num_stages=1,
            )  # fmt: skip
    return losses, load_losses
