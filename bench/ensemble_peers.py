"""What ``moesaic bench ensemble`` trains, and who trains it: the cases, `train_ensemble`, and its peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moesaic.bench import environment
from moesaic.bench.interleave import Contender, NotRunError, clock
from moesaic.bench.reproduce import phase_plan
from moesaic.bench.vmap_baseline import VmapTrainer
from moesaic.kernels import EnsembleSettings, route_topk, sample_features, train_ensemble
from moesaic.kernels.ensemble import GATES, executed_samples
from moesaic.moe import FeatureConfig, Run, ToyConfig, ToyModel, TrainConfig, train_runs
from moesaic.moe.data import feature_table, importance
from moesaic.moe.toy import ensemble_shape

LARGER = ((100, 20, 1), (100, 5, 4), (100, 2, 10), (128, 8, 16))
"""(n, m, E) beside the eight panels of the phase diagrams."""
LARGER_BATCH = 1024
LARGER_MODELS = {"cpu": 16, "cuda": 128}
"""Models of each: enough for all cores or multiprocessors, with at most about 1 and 8 GB of the baseline's tensors."""
QUICK_STRIDE, QUICK_LARGER_MODELS = 10, 4

CHECK_MODELS, CHECK_STEPS = 4, 3


@dataclass(frozen=True)
class Case:
    """Models of one shape, k = 1 and the ``paper`` gate, to be trained on ``cpu`` or ``cuda``."""

    runs: tuple[Run, ...]
    device: str

    @property
    def toy(self) -> ToyConfig:
        """The architecture that all runs share."""
        return self.runs[0].toy

    @property
    def training(self) -> TrainConfig:
        """The optimisation that all runs share; its number of steps means nothing here."""
        return self.runs[0].training

    @property
    def shape(self) -> str:
        """``(n,m,E)``."""
        return phase_plan.panel_name((self.toy.n_features, self.toy.n_hidden, self.toy.n_experts))

    def importance(self) -> Tensor:
        """I, (S, n)."""
        return torch.stack([importance(run.features, self.toy.n_features) for run in self.runs])


def cases(device: str, quick: bool) -> list[Case]:
    """A phase panel's 2,262 cells for each of its eight shapes, then the larger shapes; a seed of its own per model.

    Features of the larger shapes are present with p from 1 to 0.1, in equal ratios. ``quick`` takes every tenth cell
    and four models of a larger shape.
    """
    panels: dict[ToyConfig, list[Run]] = {}
    for run in phase_plan.plan(False, 1):
        panels.setdefault(run.toy, []).append(run)
    groups = [runs[:: QUICK_STRIDE if quick else 1] for runs in panels.values()]
    training, models = TrainConfig(batch_size=LARGER_BATCH, load_balance=0.01), LARGER_MODELS[device]
    models = QUICK_LARGER_MODELS if quick else models
    data = [FeatureConfig(feature_probability=0.1 ** (i / (models - 1))) for i in range(models)]
    groups += [[Run(ToyConfig(n, m, e), features, training) for features in data] for n, m, e in LARGER]
    return [Case(tuple(replace(run, seed=seed) for seed, run in enumerate(runs)), device) for runs in groups]


class Ensemble:
    """`train_ensemble` on a case; every call continues where the last one ended."""

    def __init__(self, case: Case) -> None:
        training, size = case.training, (len(case.runs),)
        self.shape = ensemble_shape(case.toy, training.batch_size)
        self.settings = EnsembleSettings(
            features=feature_table(case.runs),
            importance=case.importance(),
            gate=torch.full(size, GATES.index(case.toy.gate)),
            seeds=torch.tensor([run.seed for run in case.runs]),
            weight_decay=torch.full(size, training.weight_decay, dtype=torch.float64),
            beta1=torch.full(size, training.beta1, dtype=torch.float64),
            beta2=torch.full(size, training.beta2, dtype=torch.float64),
            eps=torch.full(size, training.eps, dtype=torch.float64),
            load_balance=torch.full(size, training.load_balance, dtype=torch.float64),
            scale=torch.full(size, 1 / (training.batch_size * case.toy.n_features)),
        )
        model = ToyModel.from_runs(case.runs)
        flat = [getattr(model, name).detach().flatten(1) for name in self.shape.sections()]
        self.state = torch.cat(flat, dim=1).to(case.device)
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.state), torch.zeros_like(self.state)
        self.rate, self.step = training.lr, 0

    def train(self, steps: int) -> tuple[Tensor, Tensor]:
        """Take ``steps`` steps and return the reconstruction and load-balance losses, (S, steps) each."""
        lr = torch.full((len(self.state), steps), self.rate, dtype=torch.float64)
        losses = train_ensemble(
            self.shape, self.settings, self.state, self.exp_avg, self.exp_avg_sq, lr, first_step=self.step
        )
        self.step += steps
        return losses

    def executed_rows(self) -> int:
        """(sample, expert) pairs that all models compute in one step, masked and padding ones included.

        Those of a batch as the routers now send it: the kernels count nothing themselves.
        """
        settings, trained_by = self.settings, "numba" if self.state.device.type == "cpu" else "triton"
        x = sample_features(settings.features, self.shape.batch_size, seeds=settings.seeds, step=self.step)
        routers = self.shape.split(self.state)["router"].cpu()
        ids = route_topk(x @ routers.mT, self.shape.top_k, scoring="softmax_topk").ids.flatten(1)
        counts = [torch.bincount(one, minlength=self.shape.n_experts).tolist() for one in ids]
        return round(sum(executed_samples(self.shape, count, trained_by) for count in counts))


def vmap_trainer(case: Case) -> VmapTrainer:
    """The baseline with the weights, data and optimiser of a case."""
    model = ToyModel.from_runs(case.runs)
    return VmapTrainer(
        {name: getattr(model, name).detach().to(case.device) for name in ("weight", "bias", "router")},
        top_k=case.toy.top_k,
        batch_size=case.training.batch_size,
        feature_probability=feature_table(case.runs).probability.to(case.device),
        importance=case.importance().to(case.device),
        lr=case.training.lr,
        weight_decay=case.training.weight_decay,
        load_balance=case.training.load_balance,
    )


def vmap_bytes(case: Case) -> int:
    """About what the baseline's intermediate tensors take: half a dozen (S, B, E, n), and smaller ones."""
    n, m, e = case.toy.n_features, case.toy.n_hidden, case.toy.n_experts
    return 4 * len(case.runs) * case.training.batch_size * (6 * e * n + 4 * e * m + 6 * n + 6 * e)


def vmap_contender(case: Case) -> Contender:
    """The baseline's steps on samples of ``torch.rand``.

    Raises:
        NotRunError: the memory would not do.
    """
    needed, available = vmap_bytes(case), environment.device_memory_bytes(case.device)
    if available is not None and needed > 0.8 * available:
        raise NotRunError(f"needs about {needed / 2**30:.1f} GiB of memory, of {available / 2**30:.1f} GiB in all")
    return clock(vmap_trainer(case).train, case.device)


def stacked_contender(case: Case) -> Contender:
    """``train_runs(…, impl="torch")``: its own count of seconds, which leaves out the building of the stack."""

    def timed(steps: int) -> float:
        return train_runs(_with_steps(case, steps), device=case.device, impl="torch").wall_s

    return timed


def _with_steps(case: Case, steps: int) -> list[Run]:
    training = replace(case.training, steps=steps)
    return [replace(run, training=training) for run in case.runs]


def check_case(case: Case) -> Case:
    """A few models of a case on dense data: all-zero inputs tie the scores, and PyTorch leaves open who wins a tie."""
    chosen = case.runs[:: -(-len(case.runs) // CHECK_MODELS)]
    return replace(
        case,
        runs=tuple(replace(run, features=replace(run.features, feature_probability=1.0)) for run in chosen),
    )


def vmap_error(case: Case) -> float:
    """Largest difference between `train_ensemble` and the baseline over a few steps on equal samples.

    Of losses, relative; of Adam's first moments, so of the gradients, relative to the RMS of the model's.
    """
    ours, theirs = Ensemble(case), vmap_trainer(case)
    found = []
    for step in range(CHECK_STEPS):
        seeds = ours.settings.seeds.to(case.device)
        x = sample_features(ours.settings.features, case.training.batch_size, seeds=seeds, step=step)
        losses = theirs.train_step(x)
        found += [relative(mine, other[:, None]) for mine, other in zip(ours.train(1), losses, strict=True)]
        moments = [theirs.exp_avg[name].flatten(1) for name in ours.shape.sections()]
        found.append(relative(ours.exp_avg, torch.cat(moments, dim=1)))
    # Not Python's max, which may drop a NaN.
    return float(torch.stack(found).max())


def stacked_error(case: Case) -> float:
    """Largest relative difference of the losses between `train_ensemble` and the stacked PyTorch trainer."""
    theirs = train_runs(_with_steps(case, CHECK_STEPS), device=case.device, impl="torch")
    pairs = zip(Ensemble(case).train(CHECK_STEPS), (theirs.losses, theirs.load_balance_losses), strict=True)
    return float(torch.stack([relative(mine, other) for mine, other in pairs]).max())


def relative(mine: Tensor, other: Tensor) -> Tensor:
    """max_i |mine_i − other_i| / RMS(other), rows (S, i) on their own, and then the largest; NaN stays.

    Equal numbers do not differ, also where all are 0: a model whose every ReLU is dead has no gradient.
    """
    mine, other = mine.double().cpu(), other.double().cpu()
    apart = (mine - other).abs()
    return torch.where(apart == 0, 0.0, apart / other.square().mean(1, keepdim=True).sqrt()).max()


@dataclass(frozen=True)
class Peer:
    """How a peer is timed, how far its training is from ours on equal samples, and whether it computes every expert."""

    contender: Callable[[Case], Contender]
    error: Callable[[Case], float]
    dense: bool


PEERS = {
    "vmap": Peer(vmap_contender, vmap_error, dense=True),
    "torch-stacked": Peer(stacked_contender, stacked_error, dense=False),
}
