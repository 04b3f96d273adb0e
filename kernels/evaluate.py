"""Evaluation of many small, independent toy models of one shape on given samples, in one call.

For each model and sample: route, x' = [y_0] + Σ_e w_e ReLU(x W_e D_eᵀ + b_e), as `train_ensemble` trains it; returned
are sums over the samples, from which losses, usage of the experts and represented features follow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.kernels._accounting import Work, moved, record
from moesaic.kernels._extras import numba_twin
from moesaic.kernels._threads import in_parts
from moesaic.kernels.ensemble import GATES, EnsembleShape

_CHUNK = 256  # samples whose temporaries of a small model fit into the first-level cache
_BLOCKS_PER_THREAD = 8  # enough to even out, few enough that no thread waits for Python


@dataclass(frozen=True)
class EnsembleEvaluation:
    """Sums over B samples, for S models.

    Attributes:
        squared_error: Σ_b (x_bf − x'_bf)², (S, n) float64.
        assignments: #(e among the top k of b), (S, E) int64.
        gate_sums: Σ_b w_be, (S, E) float64, with w_be = 0 where e is not chosen.
        prob_sums: Σ_b softmax(s_b)_e, (S, E) float64.
        represented: #(x_bi ≠ 0 and N_bi > threshold), (S, n) int64, with N_bi = Σ_e w_be q_ei.
        carried: Σ_b [represented] w_be q_ei / N_bi, (S, E', n) float64.
    """

    squared_error: Tensor
    assignments: Tensor
    gate_sums: Tensor
    prob_sums: Tensor
    represented: Tensor
    carried: Tensor


def evaluate_ensemble(
    shape: EnsembleShape,
    gate: Tensor,
    state: Tensor,
    samples: Tensor,
    batch: Tensor,
    square_norms: Tensor,
    *,
    represented_above: float = 0.5,
) -> EnsembleEvaluation:
    """Evaluate S models, each on one of U batches, and return sums over its samples.

    The result of a model depends neither on the other models nor on the thread count. CPU, fp32 with float64 sums; one
    thread per model at a time.

    Args:
        shape: the common sizes (the batch size is that of ``samples``).
        gate: (S,) int64, index into ``kernels.ensemble.GATES``.
        state: (S, P) float32, in the order of ``EnsembleShape.sections``.
        samples: x, (U, B, n) float32.
        batch: (S,) int64, which of the U batches is the model's.
        square_norms: q, (S, E', n) float64: squared strength of each feature in each expert, with E' = E, or E + 1
            if there is a shared expert, the last, of weight 1.
        represented_above: the threshold of the folded strength N.

    Raises:
        ValueError: naming the tensor whose shape, type, device or values do not fit.
        ImportError: without Numba.
    """
    s, n, n_experts = state.shape[0], shape.n_features, shape.n_experts
    n_columns = n_experts + (shape.shared_hidden > 0)
    expected = {
        "gate": (gate, (s,), torch.int64),
        "state": (state, (s, shape.n_parameters), torch.float32),
        "samples": (samples, (*samples.shape[:2], n), torch.float32),
        "batch": (batch, (s,), torch.int64),
        "square_norms": (square_norms, (s, n_columns, n), torch.float64),
    }
    for name, (tensor, size, dtype) in expected.items():
        if tuple(tensor.shape) != size or tensor.dtype != dtype or tensor.device.type != "cpu":
            raise ValueError(
                f"{name}: takes a CPU tensor {size} {dtype}, got {tuple(tensor.shape)} {tensor.dtype} on "
                f"{tensor.device}"
            )
    if bool(((batch < 0) | (batch >= samples.shape[0])).any()):
        raise ValueError(f"batch={batch.tolist()}: takes integers from 0 to {samples.shape[0] - 1}, a batch of samples")
    found = EnsembleEvaluation(
        squared_error=torch.zeros(s, n, dtype=torch.float64),
        assignments=torch.zeros(s, n_experts, dtype=torch.int64),
        gate_sums=torch.zeros(s, n_experts, dtype=torch.float64),
        prob_sums=torch.zeros(s, n_experts, dtype=torch.float64),
        represented=torch.zeros(s, n, dtype=torch.int64),
        carried=torch.zeros(s, n_columns, n, dtype=torch.float64),
    )
    masked, chunk = _plan(shape)
    record("evaluate_ensemble", lambda: _work(shape, gate, state, samples, square_norms, found, masked=masked))
    twin = numba_twin("evaluate_cpu")
    sizes = (n, shape.n_hidden, n_experts, shape.top_k, shape.shared_hidden, shape.tied)
    inputs = [tensor.detach().contiguous().numpy() for tensor in (gate, state, square_norms)]
    x = samples.detach().transpose(1, 2).contiguous().numpy()
    which = batch.contiguous().numpy()
    outputs = [tensor.numpy() for tensor in vars(found).values()]

    def evaluate(start: int, stop: int) -> None:
        twin.evaluate_models(
            start, stop, *sizes, *inputs, represented_above, x, which, min(chunk, max(1, x.shape[2])), masked, *outputs
        )

    threads = max(1, min(s, twin.get_num_threads()))
    block = max(1, -(-s // (threads * _BLOCKS_PER_THREAD)))
    in_parts(lambda i: evaluate(i * block, min((i + 1) * block, s)), -(-s // block), threads)
    return found


def _work(
    shape: EnsembleShape, gate: Tensor, state: Tensor, samples: Tensor, square_norms: Tensor,
    found: EnsembleEvaluation, *, masked: bool,
) -> tuple[int, Work]:  # fmt: skip
    """Encoding, decoding and the router; every expert computes every sample if masked, else SIMD lanes are padded."""
    batch, n = samples.shape[1:]
    routed = int((gate == GATES.index("sigmoid")).sum()) if shape.n_experts == 1 else gate.shape[0]

    def flops(experts: int) -> int:
        width = experts * shape.n_hidden + shape.shared_hidden
        return 2 * batch * n * (2 * gate.shape[0] * width + routed * shape.n_experts)

    every = flops(shape.n_experts)
    moves = moved(gate, state, square_norms, samples, *vars(found).values())
    return flops(shape.top_k), Work(every if masked else None, every, moves)


def _plan(shape: EnsembleShape) -> tuple[bool, int]:
    """Whether every expert is computed for every sample and masked, and the samples per chunk.

    Masking multiplies for nothing, grouping samples by expert gathers and scatters them; grouped, a chunk should hold
    enough samples of each expert to fill SIMD lanes.
    """
    n_experts, k = shape.n_experts, shape.top_k
    masked = n_experts <= 4 or (n_experts - k) * shape.n_hidden <= 32 * k
    return masked, _CHUNK if masked else min(16 * _CHUNK, max(_CHUNK, 64 * n_experts // k))
