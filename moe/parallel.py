"""Expert parallelism: every rank of a process group has its own tokens, and E/W of the experts.

    rank r holds experts r·E/W … (r + 1)·E/W − 1
    counts:    choices of this rank's tokens per expert, to the expert's rank                (all-to-all)
    dispatch:  rows of x in order of expert, to the expert's rank                            (all-to-all)
    combine:   their outputs back to the rank of the tokens, then y_t = Σ_j w_tj row_tj      (all-to-all)

The gradient takes the last two backwards. Skipped choices are never sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moesaic.kernels._backend import grouped
from moesaic.kernels.dispatch import Grouping, combine, group_by_expert
from moesaic.kernels.expert_mlp import expert_mlp
from moesaic.kernels.grouped_matmul import autocast

DRAWN = 2**22
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def drawn_at_once(weight: Tensor) -> Iterator[tuple[int, int]]:
    """Yield first and end of the experts (E, …) drawn by one call: a rank draws the others' too, and drops them."""
    count = max(1, DRAWN // math.prod(weight.shape[1:]))
    for first in range(0, weight.shape[0], count):
        yield first, min(first + count, weight.shape[0])


def draw_experts(weight: Tensor, bound: float) -> None:
    """Fill a tensor (E, …) uniformly in ±bound, `DRAWN` numbers or one expert at a time."""
    for first, last in drawn_at_once(weight):
        weight[first:last].uniform_(-bound, bound)


@contextmanager
def collective(what: str, group: dist.ProcessGroup) -> Iterator[None]:
    """Turn an error of torch.distributed into one that says which rank saw it and what to do.

    Raises:
        RuntimeError: naming rank and group size, from the original error.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(
            f"{what} failed on rank {group.rank()} of {group.size()}: another rank has died, or did "
            "not come within the group's timeout (init_process_group(timeout=...)). Look for the first error among the "
            "ranks' own, and start all of them again from a checkpoint"
        ) from error


def check_same(group: dist.ProcessGroup, options: Mapping[str, object]) -> None:
    """Compare options across the ranks of a group, a collective.

    Raises:
        ValueError: naming the first option that differs and its value on every rank; on all ranks.
    """
    everyone: list[Any] = [None] * group.size()
    with collective("comparison of arguments", group):
        dist.all_gather_object(everyone, dict(options), group=group)
    for name in options:
        values = [theirs[name] for theirs in everyone]
        if any(value != values[0] for value in values):
            raise ValueError(f"{name} must be the same on all ranks of process_group, got {values} by rank")


class _Exchange(torch.autograd.Function):
    """Rows to other ranks: `sent[s]` of them to rank s, `received[s]` from it; the gradient comes back the same way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        out, rows = rows.new_empty(sum(received), rows.shape[1]), rows.contiguous()
        with collective("expert-parallel all-to-all", group):
            dist.all_to_all_single(out, rows, received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grads[0], ctx.received, ctx.sent, ctx.group), None, None, None


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    out: Tensor = _Exchange.apply(rows, sent, received, group)  # type: ignore[no-untyped-call]
    return out


class _Gather(torch.autograd.Function):
    """Each kept choice's token, in order of expert: (T, N) to (n_kept, N)."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, grouping: Grouping, n_kept: int, top_k: int) -> Tensor:
        ctx.save_for_backward(*grouping)
        ctx.n_kept, ctx.top_k = n_kept, top_k
        return tokens.index_select(0, grouping.permutation[:n_kept] // top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        # index_select's own gradient adds with atomics on a GPU.
        return _scatter(grads[0], Grouping(*ctx.saved_tensors), ctx.n_kept, ctx.top_k), None, None, None


class _Scatter(torch.autograd.Function):
    """The transpose of `_Gather`: each token's sum over its kept choices, (n_kept, N) to (T, N)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, grouping: Grouping, n_kept: int, top_k: int) -> Tensor:
        ctx.save_for_backward(*grouping)
        ctx.n_kept, ctx.top_k = n_kept, top_k
        with grouped(rows) as kernels:
            out: Tensor = kernels.combine(_padded(rows, grouping), None, grouping.inverse, grouping.offsets[-1], top_k)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _gather(grads[0], Grouping(*ctx.saved_tensors), ctx.n_kept, ctx.top_k), None, None, None


def _gather(tokens: Tensor, grouping: Grouping, n_kept: int, top_k: int) -> Tensor:
    out: Tensor = _Gather.apply(tokens, grouping, n_kept, top_k)  # type: ignore[no-untyped-call]
    return out


def _scatter(rows: Tensor, grouping: Grouping, n_kept: int, top_k: int) -> Tensor:
    out: Tensor = _Scatter.apply(rows, grouping, n_kept, top_k)  # type: ignore[no-untyped-call]
    return out


def _padded(rows: Tensor, grouping: Grouping) -> Tensor:
    """Rows with a zero for every skipped choice at the end."""
    missing = grouping.permutation.shape[0] - rows.shape[0]
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


class _Plan(NamedTuple):
    """Rows to and from every rank, the local expert of every row received, and whether rows need a gradient."""

    sent: list[int]
    received: list[int]
    experts: Tensor
    differentiated: bool


class ExpertRanks:
    """A process group whose rank r holds the experts from `first` = r·E/W on, `n_local` = E/W of them.

    Copies share the group. It cannot be pickled.

    Args:
        group: the process group.
        n_experts: E.
        device: of the parameters; for `meta`, they must come to a GPU with NCCL, to the CPU with gloo.

    Raises:
        ValueError: naming the argument, its value and what it takes.
        TypeError: when pickled.
    """

    def __init__(self, group: dist.ProcessGroup, n_experts: int, device: torch.device) -> None:
        if not isinstance(group, dist.ProcessGroup):
            raise ValueError(
                f"process_group must be a torch.distributed.ProcessGroup that this process is part of, got {group!r}"
            )
        if n_experts % group.size():
            raise ValueError(
                f"n_experts must be divisible by the {group.size()} ranks of process_group, got {n_experts}"
            )
        # As "cpu:gloo,cuda:nccl"; gloo also names cuda.
        backends = dist.get_backend_config(group).split(",")
        devices = [backend.split(":")[0] for backend in backends]
        if device.type == "meta":
            kind = "cuda" if "cuda:nccl" in backends and torch.cuda.is_available() else devices[0]
        elif device.type in devices:
            kind = device.type
        else:
            raise ValueError(f"device must be one that process_group sends from ({', '.join(devices)}), got {device}")
        from torch.distributed.device_mesh import DeviceMesh

        self.group, self.n_experts = group, n_experts
        self.n_local = n_experts // group.size()
        self.first = group.rank() * self.n_local
        self.mesh = DeviceMesh.from_group(group, kind, mesh_dim_names=("experts",))
        # Here, as the decorator would import the compiler together with this file.
        self.expert_mlp: Callable[..., Tensor] = torch.compiler.disable(self._expert_mlp)

    def shard(self, local: Tensor) -> Tensor:
        """Return the DTensor (E, …) of which this rank has `local` (E/W, …); nothing is sent."""
        from torch.distributed.tensor import DTensor, Shard

        return DTensor.from_local(local, self.mesh, [Shard(0)], run_check=False)

    def own(self, full: Tensor) -> Tensor:
        """Return `full` (E, …) as a DTensor, keeping this rank's experts only."""
        return self.shard(full[self.first : self.first + self.n_local].clone())

    def draw(self, weight: Tensor, bound: float) -> None:
        """Fill a DTensor (E, …) with what `draw_experts` draws in one process."""
        mine = _local(weight)
        for first, last in drawn_at_once(weight):
            block = mine.new_empty(last - first, *mine.shape[1:]).uniform_(-bound, bound)
            start, end = max(first, self.first), min(last, self.first + self.n_local)
            if start < end:
                mine[start - self.first : end - self.first] = block[start - first : end - first]

    def copy_from_first(self, tensor: Tensor) -> None:
        """Give every rank the first rank's tensor, in place."""
        if not tensor.is_meta:
            with collective("broadcast of parameters", self.group):
                dist.broadcast(tensor, group=self.group, group_src=0)

    def _expert_mlp(
        self,
        x: Tensor,
        up: Tensor,
        down: Tensor,
        weights: Tensor,
        ids: Tensor,
        *,
        activation: str,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
    ) -> Tensor:
        """`moesaic.kernels.expert_mlp` of this rank's tokens, with experts on all ranks: a collective.

        Args:
            x: (..., D), on every rank of one dtype; other shapes may differ, T = 0 included.
            up: DTensor (E, F, D) or (E, 2F, D), sharded by expert, as `down` and the biases are.
            down: (E, D, F).
            weights: (..., k).
            ids: (..., k), of 0…E−1; others are skipped.
            activation: as `moesaic.kernels.expert_mlp` takes it.
            up_bias: (E, F) or (E, 2F), or None.
            down_bias: (E, D) or None.

        Returns:
            (..., D) in the dtype of the matrix products.

        Raises:
            ValueError: dtypes of x that differ between ranks, or x on a device that the group does not send from.
            RuntimeError: a rank died or did not come in time, here or in the gradient.
        """
        if x.device.type != self.mesh.device_type:
            raise ValueError(f"x must be on {self.mesh.device_type}, where process_group sends from, got {x.device}")
        (tokens,) = autocast(x.reshape(-1, x.shape[-1]))
        if tokens.dtype not in _DTYPES:
            raise ValueError(f"x must be one of {', '.join(map(str, _DTYPES))}, got {tokens.dtype}")
        grouping = group_by_expert(ids, self.n_experts)
        plan = self._plan(grouping, tokens)
        rows = _gather(tokens, grouping, sum(plan.sent), ids.shape[-1])
        if plan.differentiated and not rows.requires_grad and torch.is_grad_enabled():
            # Another rank waits for these rows' gradients, though here nothing does.
            rows.requires_grad_()
        arrived = _exchange(rows, plan.sent, plan.received, self.group)
        results = expert_mlp(
            arrived,
            _local(up).transpose(1, 2),
            _local(down).transpose(1, 2),
            arrived.new_ones(arrived.shape[0], 1),
            plan.experts.unsqueeze(1),
            activation=activation,
            gate_up_bias=None if up_bias is None else _local(up_bias),
            down_bias=None if down_bias is None else _local(down_bias),
        )
        results = _exchange(results, plan.received, plan.sent, self.group)
        return combine(_padded(results, grouping), weights, grouping)

    def _plan(self, grouping: Grouping, tokens: Tensor) -> _Plan:
        """Tell every rank how many rows come; the only place where the host waits for the device."""
        n_ranks, kind = self.group.size(), _DTYPES.index(tokens.dtype)
        differentiated = tokens.requires_grad and torch.is_grad_enabled()
        counts = grouping.counts.view(n_ranks, self.n_local)
        message = torch.cat([counts, counts.new_full((n_ranks, 1), 2 * kind + differentiated)], 1)
        answer = torch.empty_like(message)
        with collective("expert-parallel all-to-all of counts", self.group):
            dist.all_to_all_single(answer, message, group=self.group)
        arriving = answer[:, :-1]
        sent, received, notes = torch.stack([counts.sum(1), arriving.sum(1), answer[:, -1]]).tolist()
        kinds = [_DTYPES[note // 2] for note in notes]
        if any(theirs != tokens.dtype for theirs in kinds):
            raise ValueError(f"x must have the same dtype on all ranks of process_group, got {kinds} by rank")
        experts = torch.arange(self.n_local, device=counts.device).repeat(n_ranks)
        experts = experts.repeat_interleave(arriving.reshape(-1), output_size=sum(received))
        return _Plan(sent, received, experts, any(note % 2 for note in notes))

    def __deepcopy__(self, memo: dict[int, object]) -> ExpertRanks:
        return self

    def __reduce__(self) -> str:
        raise TypeError(
            "a MoE with process_group cannot be pickled: save its state dict, by torch.distributed.checkpoint or as "
            "get_model_state_dict(..., options=StateDictOptions(full_state_dict=True)) gives it"
        )


def _local(tensor: Tensor) -> Tensor:
    local: Tensor = tensor.to_local()  # type: ignore[attr-defined]  # only DTensors are passed
    return local
