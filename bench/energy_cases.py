"""What ``moesaic bench energy`` runs: layers and training steps, sparse ones beside dense ones matched in three ways.

    layer   y_t = Σ_j w_tj swiglu(x_t U_eᵀ) V_eᵀ, e = A_tj, router included   against   y = swiglu(x Uᵀ) Vᵀ of width

        equal total width    E·n
        equal parameters     E·n + E/3      3·d·width = 3·d·n·E + d·E
        equal active FLOPs   k·n + E/3      6·d·width = 6·d·n·k + 2·d·E

    step    of toy models, dense width E·m, or that of equal parameters, or `dense_width_at_equal_flops`

A layer's widths are rounded to multiples of 16, as a dense layer of 2,053 neurons would be slow for that alone; the
counts beside the times are those of the rounded width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.bench import layer_cases
from moesaic.bench.layer_cases import SHORT, n_turns
from moesaic.metrics import count_flops
from moesaic.metrics.flops import dense_width_at_equal_flops
from moesaic.moe import FeatureConfig, MoE, Run, ToyConfig, TrainConfig

if TYPE_CHECKING:
    from moesaic.bench.ensemble_peers import Ensemble

EQUAL_WIDTH, EQUAL_PARAMETERS, EQUAL_FLOPS = "equal total width", "equal parameters", "equal active FLOPs"
MASKED = "dense products on masked data"
MULTIPLE = 16
AGREEMENT = {"float32": 1e-4, "bfloat16": 4e-2}
"""Most that the masked dense layer may differ from the MoE, whose function it computes, over the largest output."""


@dataclass(frozen=True)
class Work:
    """A workload: ``call`` does ``units`` units (tokens, model-steps, trainings) of ``flops`` and ``bytes`` each.

    ``executed_flops`` include padding, ``dense_equivalent_flops`` are with every expert on, None where not known;
    ``least_bytes`` have to move whatever the implementation. Of whole trainings of so many ``steps``,
    ``part`` makes what does fewer at a call.
    """

    subject: str
    case: str
    name: str
    matched_by: str
    unit: str
    units: float
    call: Callable[[], object]
    flops: float | None
    bytes: float | None
    dtype: str = "float32"
    least_bytes: float | None = None
    part: Callable[[int], Callable[[], object]] | None = None
    steps: int = 0
    executed_flops: float | None = None
    dense_equivalent_flops: float | None = None

    @property
    def is_sparse(self) -> bool:
        """Whether it is what the others are matched with."""
        return not self.matched_by


@dataclass(frozen=True)
class LayerCase:
    """T tokens of width d through k of E gated experts of width n."""

    n_tokens: int
    d_model: int
    d_ff: int
    n_experts: int
    top_k: int
    dtype: str

    @property
    def name(self) -> str:
        """T, d, n, E, k and the dtype."""
        sizes = (self.n_tokens, self.d_model, self.d_ff, self.n_experts, self.top_k)
        return f"{', '.join(map(str, sizes))}, {SHORT[self.dtype]}"

    def widths(self) -> dict[str, int]:
        """Width of the dense layer by what is equal."""
        third = self.n_experts / 3
        exact = {
            EQUAL_WIDTH: self.n_experts * self.d_ff,
            EQUAL_PARAMETERS: self.n_experts * self.d_ff + third,
            EQUAL_FLOPS: self.top_k * self.d_ff + third,
        }
        return {kind: max(MULTIPLE, MULTIPLE * round(width / MULTIPLE)) for kind, width in exact.items()}


LAYERS = {
    "cpu": (
        LayerCase(1024, 256, 128, 16, 2, "float32"), LayerCase(2048, 512, 256, 16, 2, "float32"),
        LayerCase(1024, 256, 64, 64, 4, "float32"),
    ),
    "cuda": (
        LayerCase(8192, 1024, 512, 32, 4, "bfloat16"), LayerCase(8192, 2048, 768, 128, 8, "bfloat16"),
        LayerCase(16384, 4096, 1024, 64, 4, "bfloat16"),
    ),
}  # fmt: skip
QUICK_LAYERS = {
    "cpu": (LayerCase(1024, 256, 128, 16, 2, "float32"),), "cuda": (LayerCase(4096, 1024, 512, 32, 4, "bfloat16"),),
}  # fmt: skip


class Dense(nn.Module):
    """`y = swiglu(x Uᵀ) Vᵀ`, U (2·width, d), the gate's rows first, V (d, width)."""

    def __init__(self, d_model: int, width: int, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, 2 * width, bias=False, dtype=dtype, device=device)
        self.down = nn.Linear(width, d_model, bias=False, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (T, d) to the same shape."""
        gate, value = self.up(x).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate) * value)
        return out


class Masked(nn.Module):
    """The function of an MoE by dense products: all experts for all tokens, those not chosen multiplied by 0."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x: Tensor) -> Tensor:
        """Map x (T, d) to the same shape."""
        from moesaic.kernels import route_topk

        moe = self.moe
        weights, ids = route_topk(F.linear(x.float(), moe.router.float()), moe.top_k, renormalize=True)
        mask = torch.zeros(len(x), moe.n_experts, dtype=weights.dtype, device=x.device).scatter(1, ids, weights)
        gate, value = F.linear(x, moe.up.flatten(0, 1)).unflatten(-1, (moe.n_experts, -1)).chunk(2, dim=-1)
        h = F.silu(gate) * value * mask.unsqueeze(-1).to(x.dtype)
        return F.linear(h.flatten(1), moe.down.transpose(0, 1).flatten(1))


def layer_works(case: LayerCase, device: str) -> Iterator[list[Work]]:
    """The forward pass, then both passes, of the MoE and its dense layers on the same random data.

    Tokens and upstream gradients take turns, so that a cache of the usual size does not hold them all.

    Raises:
        RuntimeError: the masked dense layer disagrees with the MoE, so one of them is wrong.
    """
    dtype: torch.dtype = getattr(torch, case.dtype)
    generator = torch.Generator(device=device).manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(case.n_tokens, case.d_model, generator=generator, device=device).to(dtype)

    turns = [(draw().requires_grad_(), draw()) for _ in range(n_turns(2 * case.n_tokens * case.d_model * 4))]
    moe = MoE(case.d_model, case.d_ff, case.n_experts, case.top_k, dtype=dtype, device=device)
    sides: dict[str, tuple[str, nn.Module]] = {f"MoE {case.n_experts}×{case.d_ff} k={case.top_k}": ("", moe)}
    for kind, width in case.widths().items():
        # Two ways of matching that round to one width are one layer.
        name = f"dense {width:,}"
        earlier = sides.get(name)
        sides[name] = (
            f"{earlier[0]}; {kind}" if earlier else kind,
            earlier[1] if earlier else Dense(case.d_model, width, dtype, device),
        )
    sides[f"masked {case.n_experts * case.d_ff:,}"] = (MASKED, Masked(moe))
    _check(moe, Masked(moe), turns[0][0], case)
    for backward in (False, True):
        works: list[Work] = []
        for name, (kind, module) in sides.items():
            flops = count_flops(module, turns[0][0])
            counted = flops.training if backward else flops.forward
            moved = None if counted.bytes is None else counted.bytes.total
            # Useful is what the choice of experts asks for; the masked layer executes more to the same end.
            useful = counted.active.total if kind != MASKED else works[0].flops and works[0].flops * case.n_tokens
            works.append(
                Work(
                    f"layer, {'forward + backward' if backward else 'forward'}",
                    case.name,
                    name,
                    kind,
                    "token",
                    case.n_tokens,
                    _pass(module, turns, backward),
                    _times(useful, 1 / case.n_tokens),
                    _times(moved, 1 / case.n_tokens),
                    case.dtype,
                    _least_bytes(case, kind, name, backward),
                    executed_flops=_times(counted.executed.total, 1 / case.n_tokens),
                    dense_equivalent_flops=_times(counted.dense_equivalent.total, 1 / case.n_tokens),
                )
            )
        yield works


def _least_bytes(case: LayerCase, kind: str, name: str, backward: bool) -> float:
    """Of a dense layer as of one expert that every token takes; per token."""
    if kind in ("", MASKED):
        sizes, router = (case.d_ff, case.n_experts, case.top_k), True
    else:
        sizes, router = (int(name.removeprefix("dense ").replace(",", "")), 1, 1), False
    layer = layer_cases.Case(case.n_tokens, case.d_model, *sizes, case.dtype, router=router)
    return layer.least_bytes(sizes[1], backward=backward) / case.n_tokens


def _check(moe: MoE, masked: Masked, x: Tensor, case: LayerCase) -> None:
    with torch.no_grad():
        one, other = moe(x).float(), masked(x).float()
    error = ((one - other).abs().max() / one.abs().max()).item()
    if not error <= AGREEMENT[case.dtype]:
        raise RuntimeError(f"layer {case.name}: masked dense products differ by {error:.1e}")


def _pass(module: nn.Module, turns: Sequence[tuple[Tensor, Tensor]], backward: bool) -> Callable[[], object]:
    order = itertools.cycle(turns)
    parameters = [p for p in module.parameters() if p.requires_grad]

    def forward() -> Tensor:
        with torch.no_grad():
            y: Tensor = module(next(order)[0])
        return y

    def both() -> object:
        x, grad = next(order)
        return torch.autograd.grad(module(x), [x, *parameters], grad)

    return both if backward else forward


@dataclass(frozen=True)
class ToyCase:
    """A toy MoE, its data and how it is trained; the dense ones share all but the width."""

    toy: ToyConfig
    features: FeatureConfig
    training: TrainConfig

    @property
    def name(self) -> str:
        """N, m, E, k and the gate."""
        toy = self.toy
        return f"{toy.n_features}, {toy.n_hidden}, {toy.n_experts}, {toy.top_k}, {toy.gate}"

    def widths(self) -> dict[str, int]:
        """Width of the dense model by what is equal."""
        return {
            EQUAL_WIDTH: self.toy.n_experts * self.toy.n_hidden,
            EQUAL_PARAMETERS: self._width_of_equal_parameters(),
            EQUAL_FLOPS: dense_width_at_equal_flops(self.toy),
        }

    def _width_of_equal_parameters(self) -> int:
        wanted = count_flops(self.toy).parameters or 0
        nearest = range(1, 2 * self.toy.n_experts * self.toy.n_hidden + 2 * self.toy.n_experts)
        return min(nearest, key=lambda m: abs((count_flops(self.dense(m)).parameters or 0) - wanted))

    def dense(self, width: int) -> ToyConfig:
        """The dense model of a width, tied and initialised as the MoE."""
        return replace(self.toy, n_hidden=width, n_experts=1, top_k=1, shared_hidden=0)


_DATA = FeatureConfig(features="clustered", n_clusters=16, feature_probability=0.5)
_TRAINING = TrainConfig(batch_size=256, schedule="cosine", reduction="sum")
TOYS = tuple(
    ToyCase(ToyConfig(128, m, experts, k, gate, parametrization="small"), _DATA, _TRAINING)
    for m, experts, k, gate in ((16, 4, 1, "paper"), (4, 16, 2, "switch"))
)
"""Few wide experts under the published gate, and many narrow ones under one whose router learns; data of `tradeoff`."""
MODELS = {"cpu": 16, "cuda": 132}
STEPS = {"cpu": 8, "cuda": 512}
"""Of a call: on a GPU a few steps take less time than their launch, and every side would cost the same."""


def step_works(case: ToyCase, device: str, quick: bool) -> list[Work]:
    """Training steps of a stack of models, by `train_ensemble`, of the MoE and of its dense models."""
    from moesaic.bench.ensemble_peers import Case, Ensemble

    models = 4 if quick else MODELS[device]
    sides: dict[ToyConfig, str] = {case.toy: ""}
    for kind, width in case.widths().items():
        dense = case.dense(width)
        sides[dense] = f"{sides[dense]}; {kind}" if dense in sides else kind
    works = []
    for toy, kind in sides.items():
        runs = tuple(Run(toy, case.features, case.training, seed) for seed in range(models))
        counted = count_flops(toy, batch_size=case.training.batch_size).training
        batch = case.training.batch_size
        ensemble = Ensemble(Case(runs, device))
        works.append(
            Work(
                "toy model, training step",
                case.name,
                toy_name(toy),
                kind,
                "step",
                models * STEPS[device],
                partial(ensemble.train, STEPS[device]),
                _times(counted.active.total, batch),
                _times(None if counted.bytes is None else counted.bytes.total, batch),
                executed_flops=_executed(ensemble, toy, batch, models),
                dense_equivalent_flops=_times(counted.dense_equivalent.total, batch),
            )
        )
    return works


def _executed(ensemble: Ensemble, toy: ToyConfig, batch: int, models: int) -> float | None:
    """Of a step of one model, its share of the rows that all compute as their first batch is routed."""
    flops = count_flops(toy, samples=batch * models, executed_rows=ensemble.executed_rows())
    return _times(flops.training.executed.total, 1 / models)


def _times(value: float | None, count: float) -> float | None:
    return None if value is None else value * count


def toy_name(toy: ToyConfig) -> str:
    """How tables call a toy model."""
    return f"MoE {toy.n_experts}×{toy.n_hidden} k={toy.top_k}" if toy.n_experts > 1 else f"dense m={toy.n_hidden}"
