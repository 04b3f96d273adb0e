"""Training of one toy model with very many features, up to a million, on sparse batches; resumable bit for bit."""

from __future__ import annotations

import math
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moesaic.kernels.encode_features import CROSSOVER
from moesaic.kernels.feature_state import FeatureShape
from moesaic.kernels.feature_step import feature_step
from moesaic.kernels.feature_training import FeatureState, FeatureTraining
from moesaic.kernels.features import FeatureTable, sample_features
from moesaic.kernels.lazy_adamw import check_lazy
from moesaic.kernels.sparse_features import hear_that_csr_is_in_beta
from moesaic.moe.checkpoint import load_checkpoint, save_checkpoint
from moesaic.moe.config import Run, ToyConfig
from moesaic.moe.data import feature_table, importance
from moesaic.moe.init import fill_initial
from moesaic.moe.trainer import device_kind

DENSE_SAMPLING = 0.1
"""Density from which on features are drawn one by one."""
_HELD_OUT_KEY = 0x686F6C646F7574
_HELD_OUT_STREAM = 2


@dataclass(frozen=True)
class LargeResult:
    """A trained model with very many features.

    Attributes:
        run: what was trained.
        state: table and moments; `named` gives its parameters.
        losses: (steps,) float64, reconstruction loss of each batch before its update (sampled: an unbiased estimate).
        load_balance_losses: (steps,) float64.
        step_s: (steps,) float64, seconds of each step: batch, routing, update; NaN for those of an earlier process.
        wall_s: seconds of training, those before a resumption included; compilation of the first step too.
        failed: the first step whose loss is not finite, or None.
    """

    run: Run
    state: FeatureState
    losses: Tensor
    load_balance_losses: Tensor
    step_s: Tensor
    wall_s: float
    failed: str | None

    def named(self) -> dict[str, Tensor]:
        """Return views of the parameters, shaped as one model's of a `ToyModel`."""
        return self.state.shape.named(self.state.table)

    @property
    def median_step_s(self) -> float:
        """Median seconds of a step."""
        return float(statistics.median([s for s in self.step_s.tolist() if not math.isnan(s)] or [math.nan]))


def large_shape(toy: ToyConfig) -> FeatureShape:
    """Return the shape of an architecture; E = 1 has no router, but for the gate ``sigmoid``."""
    routed = toy.n_experts > 1 or toy.gate == "sigmoid"
    return FeatureShape(toy.n_features, toy.n_hidden, toy.n_experts, toy.top_k, toy.shared_hidden, toy.tied, routed)


def required_bytes(run: Run) -> dict[str, int]:
    """Return about what training a run holds, in bytes: its table, both moments, and the batch with what it needs.

    The table has P numbers per feature (`FeatureShape.stride`). The bound of a step's scratch memory takes the expected
    present features.
    """
    shape, batch = large_shape(run.toy), run.training.batch_size
    cells = shape.n_features * shape.stride
    active = expected_active(run)
    rows = min(shape.n_features, run.training.n_negatives + batch * active)
    places = batch * (shape.top_k + bool(shape.shared_hidden))
    step = 64 * batch * (active + 1) + 4 * 24 * places * (shape.n_hidden + shape.shared_hidden + 48)
    if run.training.decode == "sampled":
        step += 4 * (8 * rows * shape.stride + 6 * run.training.n_negatives * places)
        step += 4 * 4 * batch * active * shape.top_k * (shape.n_hidden + shape.shared_hidden)
    return {
        "table": 4 * cells,
        "moments": 2 * cells * (4 if run.training.moments == "fp32" else 2),
        "batch": round(step) + 8 * shape.n_features,
    }


def expected_active(run: Run) -> float:
    """Return Σ p_i, the expected number of features in a sample."""
    features, n = run.features, run.toy.n_features
    if features.features == "exactly_k":
        return float(features.n_active)
    return features.feature_probability * (n / features.n_clusters if features.n_clusters else n)


def untrained_large(run: Run, device: str = "cpu") -> FeatureState:
    """Return the state before the first step; initial values but the router's are drawn in blocks of features."""
    training = run.training
    shape = large_shape(run.toy)
    moments = torch.float32 if training.moments == "fp32" else torch.bfloat16
    state = FeatureState.zeros(shape, device=device, decode=training.decode, moments=moments)
    fill_initial(shape.named(state.table), run.toy, run.seed, run.features.n_clusters)
    return state


def sparse_batch(run: Run, step: int, batch_size: int | None = None, device: str = "cpu") -> Tensor:
    """Return the run's training batch of a step, sparse CSR (B, n)."""
    return _draw(_table(run), run, batch_size or run.training.batch_size, run.seed, step, 0, device)


def held_out_sparse(run: Run, n_samples: int = 4096, device: str = "cpu") -> Tensor:
    """Return the evaluation batch of the run's data, sparse CSR (n_samples, n), the same for every seed."""
    if n_samples < 1:
        raise ValueError(f"n_samples={n_samples}: takes an integer >= 1")
    return _draw(_table(run), run, n_samples, _HELD_OUT_KEY, 0, _HELD_OUT_STREAM, device)


def _table(run: Run) -> FeatureTable:
    return feature_table([run])


def _draw(table: FeatureTable, run: Run, n_samples: int, seed: int, step: int, stream: int, device: str) -> Tensor:
    seeds = torch.tensor([seed], device=device)
    if expected_active(run) > DENSE_SAMPLING * run.toy.n_features:
        dense = sample_features(table, n_samples, seeds=seeds, step=step, stream=stream)[0]
        hear_that_csr_is_in_beta()
        return dense.to_sparse_csr()
    return sample_features(table, n_samples, seeds=seeds, step=step, stream=stream, layout=torch.sparse_csr)


def train_large(
    run: Run,
    *,
    device: str = "cpu",
    progress: Callable[[int, float], None] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 1000,
) -> LargeResult:
    """Train one toy model with very many features on sparse batches, by `moesaic.kernels.feature_step`.

    Samples are another stream than `train_runs`'s: drawn in O(features present). ``run.training`` chooses between exact
    and sampled decoding, the precision of products and the type of Adam's moments.

    Args:
        run: architecture, data, optimisation, seed.
        device: ``cpu`` or a CUDA device.
        progress: called now and then with the steps done since the last call and the loss.
        checkpoint: a safetensors file; if it exists, training resumes from it, bit for bit; it is replaced whole every
            ``checkpoint_every`` steps and at the end.
        checkpoint_every: steps between checkpoints.

    Raises:
        ValueError: before any work - fewer than one feature present per sample on average, a run that does not fit into
            memory (with the bytes needed and available and what to lower), an unknown device, a checkpoint of
            another run.
    """
    check_large(run, device)
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every={checkpoint_every}: takes an integer >= 1")
    path = None if checkpoint is None else Path(checkpoint)
    training, steps = settings(run, device), run.training.steps
    held = _Progress(run, steps)
    state = held.restore(path, device) if path is not None and path.exists() else untrained_large(run, device)
    table, reported = _table(run), time.perf_counter()
    since = state.step
    while state.step < steps:
        at, start = state.step, time.perf_counter()
        x = _draw(table, run, run.training.batch_size, run.seed, at, 0, device)
        losses = feature_step(state, x, training)
        held.losses[at], held.load_losses[at] = losses.loss, losses.load_balance
        held.step_s[at] = time.perf_counter() - start
        held.wall_s += float(held.step_s[at])
        if progress and (time.perf_counter() - reported > 0.5 or state.step == steps):
            progress(state.step - since, float(held.losses[at]))
            since, reported = state.step, time.perf_counter()
        if path is not None and (state.step % checkpoint_every == 0 or state.step == steps):
            held.save(path, state)
    state.settle(training)
    bad = (~held.losses.isfinite()).nonzero()
    failed = f"loss is {held.losses[bad[0, 0]].item()} at step {int(bad[0, 0])}" if len(bad) else None
    return LargeResult(run, state, held.losses, held.load_losses, held.step_s, held.wall_s, failed)


def settings(run: Run, device: str = "cpu") -> FeatureTraining:
    """Return how the run's model is trained, with its importance and learning rates as tensors."""
    t, n = run.training, run.toy.n_features
    return FeatureTraining(
        gate=run.toy.gate,
        importance=importance(run.features, n).to(device),
        scale=1 / (t.batch_size * (n if t.reduction == "mean" else 1)),
        lr=torch.tensor([t.lr_at(step) for step in range(t.steps)], dtype=torch.float64),
        beta1=t.beta1,
        beta2=t.beta2,
        eps=t.eps,
        weight_decay=t.weight_decay,
        load_balance=t.load_balance,
        decode=t.decode,
        n_negatives=t.n_negatives,
        precision=t.precision,
        seed=run.seed,
    )


def check_large(run: Run, device: str = "cpu") -> None:
    """Raise ValueError for a run that `train_large` cannot train on the device; warn where gathering does not pay."""
    kind = device_kind(device)
    n, active = run.toy.n_features, expected_active(run)
    if active < 1:
        raise ValueError(
            f"feature_probability={run.features.feature_probability!r}: gives {active:.3g} features per sample at "
            f"n_features={n}, takes at least 1"
        )
    if run.training.n_negatives > n:
        raise ValueError(f"n_negatives={run.training.n_negatives}: takes 1 to n_features={n}")
    if run.training.precision == "tf32x3" and kind == "cpu":
        raise ValueError("precision='tf32x3': takes a CUDA device; on a CPU, 'ieee' or 'bf16'")
    if run.training.decode == "sampled":
        t = run.training
        check_lazy(t.lr, t.beta1, t.beta2, t.weight_decay)
    parts = required_bytes(run)
    needed, available = sum(parts.values()), available_bytes(device)
    if available is not None and needed > available:
        lower = {
            "table": "n_features, n_experts or n_hidden", "moments": "n_features, n_experts or n_hidden",
            "batch": "batch_size, top_k or n_negatives",
        }[max(parts, key=lambda part: parts[part])]  # fmt: skip
        raise ValueError(
            f"n_features={n}, n_hidden={run.toy.n_hidden}, n_experts={run.toy.n_experts}: need about {needed} bytes "
            f"({needed / 2**30:.1f} GiB), available are {available} ({available / 2**30:.1f} GiB); lower {lower}"
        )
    if active > CROSSOVER * n:
        warnings.warn(
            f"{active / n:.2g} of the features are present in a sample, more than {CROSSOVER:g}: encoding multiplies "
            "dense stripes instead of gathering rows",
            stacklevel=3,
        )


def available_bytes(device: str = "cpu") -> int | None:
    """Return the free memory of a device in bytes, None where the system does not say."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None


class _Progress:
    """What a training has given so far, and its checkpoint."""

    def __init__(self, run: Run, steps: int) -> None:
        self.run, self.wall_s = run, 0.0
        self.losses, self.load_losses, self.step_s = (torch.full((steps,), torch.nan).double() for _ in range(3))

    def save(self, path: Path, state: FeatureState) -> None:
        """Write the state as it is: rows that have not caught up yet do so later, as in a run without a break."""
        tensors = {"table": state.table, "exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq, "seen": state.seen}
        tensors |= {"losses": self.losses[: state.step], "load_balance_losses": self.load_losses[: state.step]}
        metadata = {"step": str(state.step), "wall_s": repr(self.wall_s), "run": self.run.key, "kind": "large"}
        save_checkpoint(path, tensors, metadata)

    def restore(self, path: Path, device: str) -> FeatureState:
        """Continue from a checkpoint of the same run."""
        tensors, metadata = load_checkpoint(path)
        if metadata.get("run") != self.run.key or metadata.get("kind") != "large":
            raise ValueError(
                f"checkpoint={os.fspath(path)!r}: holds another run than the one asked for; give another file or "
                "remove it"
            )
        step = int(metadata["step"])
        self.wall_s = float(metadata["wall_s"])
        self.losses[:step], self.load_losses[:step] = tensors["losses"], tensors["load_balance_losses"]
        table, exp_avg, exp_avg_sq, seen = (
            tensors[name].to(device) for name in ("table", "exp_avg", "exp_avg_sq", "seen")
        )
        return FeatureState(large_shape(self.run.toy), table, exp_avg, exp_avg_sq, seen, step)
