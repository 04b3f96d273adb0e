"""What a training loop does differently around layers with a `process_group`.

    loss = Σ_r loss_r  (or its mean):   dR = Σ_r dR_r for what every rank has;   experts' gradients are sums already

Experts are DTensors beside plain parameters, which PyTorch's optimisers and norms do not take in one list.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moesaic.moe.layer import EXPERTS, MoE
from moesaic.moe.parallel import collective


def _split(module: nn.Module) -> tuple[dist.ProcessGroup, list[nn.Parameter], list[nn.Parameter]]:
    """Return the group, replicated parameters and experts of a module."""
    layers = [layer for layer in module.modules() if isinstance(layer, MoE) and layer.process_group is not None]
    groups = {layer.process_group for layer in layers}
    if len(groups) != 1:
        raise ValueError(f"module must have MoE layers with process_group, and all the same, got {len(groups)} groups")
    experts = {id(getattr(layer, name)) for layer in layers for name in EXPERTS}
    replicated = [parameter for parameter in module.parameters() if id(parameter) not in experts]
    for parameter in replicated:
        if type(parameter) is not nn.Parameter:
            raise ValueError(
                "module must have plain parameters on every rank, beside experts; got a "
                f"{type(parameter).__name__} of shape {tuple(parameter.shape)}"
            )
    group: Any = groups.pop()
    return group, replicated, [parameter for parameter in module.parameters() if id(parameter) in experts]


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Return replicated parameters and experts as two groups, as `torch.optim` takes them.

    Example:
        optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-3)

    Raises:
        ValueError: the module has no `MoE` with a process group, or several groups, or other sharded parameters.
    """
    _, replicated, experts = _split(module)
    return [{"params": replicated}, {"params": experts}]


@torch.no_grad()
def reduce_gradients(module: nn.Module, *, mean: bool = True) -> None:
    """Make every gradient that of the mean, or the sum, of the ranks' losses: call it between backward and step.

        replicated g ← [1/W] Σ_r g_r,   expert g ← [1/W] g

    All ranks of the layers' process group call it. A gradient that some ranks lack is 0 there; one that all lack stays
    None. To weigh tokens alike where ranks have different numbers of them, make each loss a sum over tokens divided by
    the number of all ranks' tokens, and pass mean=False.

    Example:
        model(x).square().mean().backward()
        reduce_gradients(model)
        optimizer.step()

    Raises:
        ValueError: the module has no `MoE` with a process group, or several groups, or other sharded parameters.
        RuntimeError: a rank died or did not come in time.
    """
    group, replicated, experts = _split(module)
    replicated = [parameter for parameter in replicated if parameter.requires_grad]
    if replicated:
        have = torch.tensor([p.grad is not None for p in replicated], dtype=torch.int32, device=replicated[0].device)
        with collective("all-reduce of gradients", group):
            dist.all_reduce(have, dist.ReduceOp.MAX, group=group)
            for parameter, somewhere in zip(replicated, have.tolist(), strict=True):
                if somewhere:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                    parameter.grad = parameter.grad.contiguous()
                    dist.all_reduce(parameter.grad, group=group)
    if mean:
        for parameter in replicated + experts:
            if parameter.grad is not None:
                parameter.grad /= group.size()


@torch.no_grad()
def clip_gradients(module: nn.Module, max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Scale gradients to a total norm of at most `max_norm`, over the experts of all ranks; after `reduce_gradients`.

    `torch.nn.utils.clip_grad_norm_` for a module with expert parallelism. All ranks call it and get the same norm.

    Args:
        module: has `MoE` layers with a process group.
        max_norm: largest total norm.
        norm_type: p of the norm.

    Returns:
        The total norm before, a scalar.

    Raises:
        ValueError: the module has no `MoE` with a process group, or several groups, or other sharded parameters.
        RuntimeError: a rank died or did not come in time.
    """
    from torch.distributed.tensor import DTensor

    group, *halves = _split(module)
    norms = []
    with collective("norm of gradients", group):
        for grads in ([p.grad for p in half if p.grad is not None] for half in halves):
            norm = torch.nn.utils.get_total_norm(grads, norm_type)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            norms.append(norm.to(halves[0][0].device))  # that of no gradients is on the CPU
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    for half in halves:
        torch.nn.utils.clip_grads_with_norm_(half, max_norm, total)
    return total
