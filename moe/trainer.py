"""Training of stacked toy models: AdamW on fresh samples, resumable bit for bit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.kernels.ensemble import GATES, EnsembleSettings, EnsembleShape, has_gpu_kernel, train_ensemble
from moesaic.kernels.features import sample_features
from moesaic.moe.checkpoint import load_checkpoint, save_checkpoint
from moesaic.moe.config import FeatureConfig, Run, ToyConfig, TrainConfig
from moesaic.moe.data import feature_table, importance
from moesaic.moe.toy import ToyModel, ensemble_shape

IMPLS = ("auto", "numba", "triton", "torch")
_CHUNK_S = 0.5
_WHOLE: dict[str, Any] = {"decode": "exact", "n_negatives": 0, "precision": "ieee", "moments": "fp32"}


@dataclass(frozen=True)
class TrainStep:
    """What a callback sees after a step: its index, the losses (S,) of its batch, and the models as they are then."""

    step: int
    losses: Tensor
    load_balance_losses: Tensor
    model: ToyModel


@dataclass(frozen=True)
class TrainResult:
    """Trained stacked models.

    Attributes:
        runs: the runs, in the order of the stack.
        model: the trained models, S of them.
        losses: (S, steps) float32, reconstruction loss of each training batch, before its update.
        load_balance_losses: (S, steps) float32, the load-balance term, coefficient included.
        wall_s: seconds of training of the whole stack, compilation excluded.
        impl: ``numba``, ``triton`` or ``torch``, which trained them.
        failed: per run, why it failed (the first step whose loss is not finite), or None.
    """

    runs: list[Run]
    model: ToyModel
    losses: Tensor
    load_balance_losses: Tensor
    wall_s: float
    impl: str
    failed: list[str | None]


def train(
    config: ToyConfig,
    features: FeatureConfig | None = None,
    training: TrainConfig | None = None,
    *,
    seeds: Sequence[int] = (0,),
    device: str = "cpu",
    impl: str = "auto",
    callback: Callable[[TrainStep], None] | None = None,
    checkpoint: str | Path | None = None,
) -> TrainResult:
    """Train one architecture from several seeds, all in one stack.

    Args:
        config: the architecture.
        features: the data; independent features with p = 0.1 by default.
        training: the optimisation; the paper's by default.
        seeds: one model each.
        device: as in ``train_runs``, like what follows.
        impl: ``auto``, ``numba``, ``triton`` or ``torch``.
        callback: called after every step.
        checkpoint: a file to resume from and to write.

    Raises:
        ValueError: as in ``train_runs``.

    Example:
        >>> result = train(ToyConfig(n_features=20, n_hidden=5), training=TrainConfig(steps=500), seeds=range(4))
        >>> result.losses[:, -100:].mean(1)
    """
    if not isinstance(seeds, Sequence | range):
        raise ValueError(f"seeds={seeds!r}: takes a sequence of integers, such as range(5)")
    features, training = features or FeatureConfig(), training or TrainConfig()
    runs = [Run(config, features, training, seed) for seed in seeds]
    return train_runs(runs, device=device, impl=impl, callback=callback, checkpoint=checkpoint)


def train_runs(
    runs: Sequence[Run],
    *,
    device: str = "cpu",
    impl: str = "auto",
    callback: Callable[[TrainStep], None] | None = None,
    progress: Callable[[int, float], None] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 1000,
) -> TrainResult:
    """Train runs of one shape (equal ``Run.group``) together; each ends with the same bits as if trained alone.

    Args:
        runs: at least one; they may differ in data, importance, gate, seed and optimisation, not in tensor shapes,
            steps or batch.
        device: ``cpu`` or a CUDA device.
        impl: ``numba`` (CPU) or ``triton`` (GPU): whole training in compiled code; ``torch``: autograd on the stack, on
            any device; ``auto``: ``numba`` on a CPU, and on a GPU ``triton`` where its kernels take the models. All
            draw the same samples and agree up to rounding.
        callback: called after every step.
        progress: called now and then with the number of steps done since the last call and the stack's mean loss.
        checkpoint: a file; if it exists, training resumes from it, bit for bit; it is rewritten every
            ``checkpoint_every`` steps.
        checkpoint_every: steps between checkpoints.

    Raises:
        ValueError: for no runs, runs of different shapes, an unknown impl or device, or a checkpoint of
            other runs.
    """
    if not runs:
        raise ValueError("runs: takes at least one")
    if len({run.group for run in runs}) != 1:
        raise ValueError(
            f"runs: take one shape, steps and batch size (Run.group), got {sorted({run.group for run in runs})}"
        )
    if any(run.training != replace(run.training, **_WHOLE) for run in runs):
        raise ValueError("decode, precision, moments: take their defaults here; train_large heeds them")
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r}: takes one of {', '.join(IMPLS)}")
    kind = device_kind(device)
    if impl in ("numba", "triton") and (impl == "numba") != (kind == "cpu"):
        raise ValueError(
            f"impl={impl!r}: takes {'a CPU' if impl == 'numba' else 'a CUDA device'}, got device={device!r}"
        )
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every={checkpoint_every}: takes an integer >= 1")
    runs = list(runs)
    trainer = _Trainer(runs, device, impl)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        trainer.restore(path)
    steps = runs[0].training.steps
    chunk = 1
    while trainer.step < steps:
        bound = min(steps - trainer.step, 1 if callback else chunk)
        if path is not None:
            bound = min(bound, checkpoint_every - trainer.step % checkpoint_every)
        seconds = trainer.advance(bound)
        # Chunks of about half a second: long enough to amortise a call, short enough for a progress bar and Ctrl-C.
        chunk = max(1, min(4 * chunk, int(_CHUNK_S * bound / max(seconds, 1e-6))))
        if callback:
            at = trainer.step - 1
            callback(TrainStep(at, trainer.losses[:, at], trainer.load_losses[:, at], trainer.model))
        if progress:
            progress(bound, float(trainer.losses[:, trainer.step - 1].mean()))
        if path is not None and (trainer.step % checkpoint_every == 0 or trainer.step == steps):
            trainer.save(path)
    return TrainResult(
        runs,
        trainer.model,
        trainer.losses,
        trainer.load_losses,
        trainer.wall_s,
        trainer.impl,
        [_failure(row) for row in trainer.losses],
    )


def training_part(runs: Sequence[Run], steps: int, *, device: str = "cpu", impl: str = "auto") -> Callable[[], None]:
    """Return what trains the stack's next ``steps`` steps at every call, for measuring what a step costs.

    Models and set-up are made here, once. After the last whole part the steps begin again, and the weights go on.

    Args:
        runs: as for `train_runs`, like what follows.
        steps: of one call, at most those of the runs.
        device: ``cpu`` or a CUDA device.
        impl: ``auto``, ``numba``, ``triton`` or ``torch``.

    Raises:
        ValueError: no runs, or more steps than theirs.
    """
    if not runs or not 1 <= steps <= runs[0].training.steps:
        most = runs[0].training.steps if runs else "no runs"
        raise ValueError(f"steps={steps}: takes 1 to the steps of the runs ({most})")
    trainer = _Trainer(list(runs), device, impl)

    def part() -> None:
        if trainer.step + steps > runs[0].training.steps:
            trainer.step = 0
        trainer.advance(steps)

    return part


def device_kind(device: str) -> str:
    """Return ``cpu`` or ``cuda``; raise ValueError for a device that is not there."""
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device={device!r}: takes 'cpu', 'cuda' or 'cuda:N'") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: this torch sees no CUDA device")
    return kind


def _failure(losses: Tensor) -> str | None:
    bad = (~losses.isfinite()).nonzero()
    return f"loss is {losses[bad[0, 0]].item()} at step {int(bad[0, 0])}" if len(bad) else None


class _Trainer:
    """Flat state (S, P) of the stack, whose views are the model's parameters."""

    def __init__(self, runs: list[Run], device: str, impl: str) -> None:
        self.runs, self.step, self.wall_s = runs, 0, 0.0
        first = runs[0]
        self.shape: EnsembleShape = ensemble_shape(first.toy, first.training.batch_size)
        self.model = ToyModel.from_runs(runs).to(device)
        self.state = torch.cat([getattr(self.model, name).detach().flatten(1) for name in self.shape.sections()], dim=1)
        for name, view in self.shape.split(self.state).items():
            getattr(self.model, name).data = view
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.state), torch.zeros_like(self.state)
        steps = first.training.steps
        self.losses = torch.full((len(runs), steps), torch.nan)
        self.load_losses = torch.full((len(runs), steps), torch.nan)
        self.lr = _learning_rates(runs)
        self.settings = _settings(runs)
        if impl == "auto":
            on_cpu = self.state.device.type == "cpu"
            impl = "numba" if on_cpu else "triton" if has_gpu_kernel(self.shape, self.settings) else "torch"
        self.impl = impl
        if impl != "torch" and steps:
            self._compile()

    def _compile(self) -> None:
        """Train throw-away copies for no steps, so that compilation is not counted as training."""
        copies = [tensor.clone() for tensor in (self.state, self.exp_avg, self.exp_avg_sq)]
        train_ensemble(self.shape, self.settings, copies[0], copies[1], copies[2], self.lr[:, :0].contiguous())

    def advance(self, n_steps: int) -> float:
        """Train n_steps and return the seconds they took."""
        start = time.perf_counter()
        window = slice(self.step, self.step + n_steps)
        if self.impl != "torch":
            self.losses[:, window], self.load_losses[:, window] = train_ensemble(
                self.shape,
                self.settings,
                self.state,
                self.exp_avg,
                self.exp_avg_sq,
                self.lr[:, window].contiguous(),
                first_step=self.step,
            )
        else:
            for step in range(window.start, window.stop):
                self.losses[:, step], self.load_losses[:, step] = self._torch_step(step)
        self.step = window.stop
        seconds = time.perf_counter() - start
        self.wall_s += seconds
        return seconds

    def _torch_step(self, step: int) -> tuple[Tensor, Tensor]:
        model, settings, device = self.model, self.settings, self.state.device
        batch = self.shape.batch_size
        x = sample_features(settings.features, batch, seeds=settings.seeds.to(device), step=step)
        routing = model.route(x)
        error = (model.reconstruct(x, routing) - x).square() * settings.importance.to(device)[:, None]
        loss = error.sum((1, 2)) * settings.scale.to(device)
        experts = torch.arange(self.shape.n_experts, device=device)
        load = (routing.ids[..., None] == experts).float().mean((1, 2))
        coefficient = settings.load_balance.to(device, torch.float32) * self.shape.n_experts
        load_loss = coefficient * (load * routing.probs.mean(1)).sum(1)
        sections = self.shape.sections()
        gradients = torch.autograd.grad(
            (loss + load_loss).sum(),
            [getattr(model, name) for name in sections],
            allow_unused=True,
            materialize_grads=True,
        )
        with torch.no_grad():
            self._adamw(torch.cat([g.flatten(1) for g in gradients], dim=1), step)
        return loss.detach().cpu(), load_loss.detach().cpu()

    def _adamw(self, gradient: Tensor, step: int) -> None:
        column = {
            name: getattr(self.settings, name).to(gradient.device)[:, None]
            for name in ("weight_decay", "beta1", "beta2", "eps")
        }
        lr, beta1, beta2 = self.lr[:, step : step + 1].to(gradient.device), column["beta1"], column["beta2"]
        self.exp_avg.add_((1 - beta1).float() * (gradient - self.exp_avg))
        self.exp_avg_sq.mul_(beta2.float()).add_((1 - beta2).float() * gradient * gradient)
        denominator = self.exp_avg_sq.sqrt() * (1 - beta2 ** (step + 1)).rsqrt().float() + column["eps"].float()
        update = (lr / (1 - beta1 ** (step + 1))).float() * self.exp_avg / denominator
        new = self.state * (1 - lr * column["weight_decay"]).float() - update
        frozen = self.shape.split(torch.zeros_like(self.state, dtype=torch.bool))
        frozen["router"][torch.tensor([run.toy.router_is_frozen for run in self.runs])] = True
        mask = torch.cat([view.flatten(1) for view in frozen.values()], dim=1)
        self.state.copy_(torch.where(mask, self.state, new))

    def save(self, path: Path) -> None:
        """Write models, optimiser and losses; the random state is (seed, step)."""
        tensors = {"state": self.state, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        tensors |= {"losses": self.losses[:, : self.step], "load_balance_losses": self.load_losses[:, : self.step]}
        save_checkpoint(
            path,
            tensors,
            {"step": str(self.step), "wall_s": repr(self.wall_s), "impl": self.impl, "runs": self._keys()},
        )

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint of the same runs."""
        tensors, metadata = load_checkpoint(path)
        if metadata.get("runs") != self._keys():
            raise ValueError(
                f"checkpoint={os.fspath(path)!r}: holds other runs than those asked for; give another file or remove it"
            )
        if metadata["impl"] != self.impl:
            raise ValueError(
                f"impl={self.impl!r}: the checkpoint was trained by impl={metadata['impl']!r}, and bits would differ"
            )
        self.step, self.wall_s = int(metadata["step"]), float(metadata["wall_s"])
        for name in ("state", "exp_avg", "exp_avg_sq"):
            getattr(self, name).copy_(tensors[name])
        self.losses[:, : self.step] = tensors["losses"]
        self.load_losses[:, : self.step] = tensors["load_balance_losses"]

    def _keys(self) -> str:
        return ",".join(run.key for run in self.runs)


def _learning_rates(runs: list[Run]) -> Tensor:
    schedules: dict[TrainConfig, Tensor] = {}
    for run in runs:
        if run.training not in schedules:
            rates = [run.training.lr_at(step) for step in range(run.training.steps)]
            schedules[run.training] = torch.tensor(rates, dtype=torch.float64)
    return torch.stack([schedules[run.training] for run in runs])


def _settings(runs: list[Run]) -> EnsembleSettings:
    n, batch = runs[0].toy.n_features, runs[0].training.batch_size
    doubles = {
        name: torch.tensor([getattr(run.training, name) for run in runs], dtype=torch.float64)
        for name in ("weight_decay", "beta1", "beta2", "eps", "load_balance")
    }
    return EnsembleSettings(
        features=feature_table(runs),
        importance=torch.stack([importance(run.features, n) for run in runs]),
        gate=torch.tensor([GATES.index(run.toy.gate) for run in runs]),
        seeds=torch.tensor([run.seed for run in runs]),
        scale=torch.tensor(
            [1 / (batch * (n if run.training.reduction == "mean" else 1)) for run in runs], dtype=torch.float32
        ),
        **doubles,
    )
