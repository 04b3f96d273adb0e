"""Compute accounting: FLOPs and bytes of toy models from their shapes, and of any PyTorch callable by counting.

Convention, that of ``torch.utils.flop_counter``: a product (a, b) x (b, c) is 2·a·b·c FLOPs and nothing else is one.
ReLU, softmax, top-k, biases, the weighted sum Σ w_e y_e, its gate gradients ⟨dx', y_e⟩ and the optimiser count 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from moesaic.metrics.op_accounting import OpAccounting, Totals

FROZEN_GATES = frozenset({"random", "oracle"})


class _ToyShape(Protocol):
    """What is read of a toy model's configuration: n, m, E, k, gate, m0 and whether the decoder is tied."""

    @property
    def n_features(self) -> int: ...
    @property
    def n_hidden(self) -> int: ...
    @property
    def n_experts(self) -> int: ...
    @property
    def top_k(self) -> int: ...
    @property
    def gate(self) -> str: ...
    @property
    def shared_hidden(self) -> int: ...
    @property
    def tied(self) -> bool: ...


@dataclass(frozen=True)
class Parts:
    """FLOPs split by place, None where unknown; ``sparse_*`` multiply active features only (decode never can)."""

    total: int | None = None
    encode: int | None = None
    router: int | None = None
    decode: int | None = None
    sparse_total: float | None = None
    sparse_encode: float | None = None
    sparse_router: float | None = None


@dataclass(frozen=True)
class Traffic:
    """Bytes to and from memory, split by what moves; ``total`` is their sum.

    Of a callable all are ``unsplit``: an op knows its operands, not what they are to the model.
    """

    weights: float = 0.0
    activations: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    unsplit: float = 0.0

    @property
    def total(self) -> float:
        """Sum of all."""
        return self.weights + self.activations + self.gradients + self.optimizer + self.unsplit


@dataclass(frozen=True)
class Pass:
    """Work of a pass: useful (active), really multiplied (executed), and that of the model with every expert on."""

    active: Parts = Parts()
    executed: Parts = Parts()
    dense_equivalent: Parts = Parts()
    bytes: Traffic | None = None


@dataclass(frozen=True)
class Flops:
    """FLOPs and bytes of ``samples`` samples; None (or an empty `Parts`) where they cannot be known, never a guess.

    ``training`` is forward + backward (and of a configuration the optimiser, in bytes); total width E·m + m0, active
    width k·m + m0. bound: executed FLOPs and bytes are the most that any routing takes, because no tensor says which.
    """

    forward: Pass = Pass()
    training: Pass = Pass()
    samples: int | None = None
    parameters: int | None = None
    active_parameters: int | None = None
    total_width: int | None = None
    active_width: int | None = None
    bound: bool = False


def count_flops(
    target: _ToyShape | Callable[..., object],
    /,
    *args: object,
    feature_probability: float | None = None,
    active_features: float | None = None,
    samples: int = 1,
    batch_size: int | None = None,
    executed_rows: int | None = None,
    itemsize: int = 4,
) -> Flops:
    """Count the FLOPs and bytes of a toy model from its configuration, or of a callable or module by running it.

    **Configuration.** With R = samples·k expert rows and A = R·m + samples·m0 (m0: the shared expert, in every count)::

        forward   encode X W  2nA      router X Sᵀ  2nE·samples (S: router weights)      decode H Dᵀ            2nA
        backward  dW = Xᵀ dH  2nA      dS = dsᵀ X   2nE·samples                          dH = G D, dD = Gᵀ H    4nA

    A tied decoder costs the same (dW and dD are two products, then added). Data need no gradient: there is no dX. dS is
    counted for all E experts, also where it happens to be zero (``paper`` at k = 1), but not for the frozen gates
    ``random`` and ``oracle``. E = 1 has no router (w = 1): none is counted, in FLOPs or parameters, except for
    ``sigmoid``, whose one gate does work. ``executed`` takes ``executed_rows`` for R, ``dense_equivalent`` samples·E.
    The sparse counts take the mean number of active features for n in encode, router and their gradients.

    **Bytes** of a batch of B = ``batch_size``, times samples/B (amortised). Every product reads its operands and writes
    its result once, elementwise work is fused into a product, x is stored dense. In words of ``itemsize``:
    a = B·k + B·[m0>0] expert rows, h = B·k·m + B·m0, T = min(E, B·k) experts touched (at most), w = n(T·m + m0),
    b = n(T + [m0>0]), P trained parameters, {..} only with a router, <..> only with a trained one::

        forward   weights      2w + b + {nE}                 encoder, decoder, biases, router
                  activations  2na + 2h + {Bn + BE}          read x, write and read h, write y; read x, write s
        training  weights      as forward + w                dH = G D
                  activations  as forward + na + h + <Bn>    x and h again for dW, dD, dS
                  gradients    3na + 2h + <BE> + P + 2w·[tied]   write G, read it twice; dH; ds; all dW, and their sum
                  optimizer    7P                            AdamW: read w, g, m, v; write w, m, v; for all E experts

    It is the traffic of plain ops, not a bound: a kernel that keeps x' or G on chip moves less.

    **Callable** (function or module): runs ``target(*args)`` and, where an output has a gradient, its backward to all
    leaves (no ``.grad`` is written), and adds up every op that PyTorch dispatches. Fills each pass's three ``total``
    and ``bytes.unsplit``, a module's ``parameters``, and ``active_parameters`` where the module has that attribute, as
    `moesaic.moe.MoE` does. Works on fake tensors, without memory or a GPU::

        with FakeTensorMode():
            layer = MoE(4096, 14336, n_experts=64, top_k=2)
            flops = count_flops(layer, torch.empty(8192, 4096))
        flops.forward.active.total, flops.forward.executed.total, flops.training.bytes.total, flops.bound

    - ``active`` is what the formulas of ``torch.utils.flop_counter`` give, to the integer, and also products that it
      has none for: attention on a CPU, ``torch.nn.functional.grouped_mm`` and transformers' grouped product. An op
      without a formula counts 0, as do ``mv`` and ``dot``; skipped choices count, as formulas see shapes only.
    - ``executed`` adds the padding of moesaic's ops by what multiplies on their device: whole tiles on a GPU (an H100's
      where there is none), columns to 64 bytes in the CPU twin. Skipped choices are left out but in tiles that they
      share. Ops of PyTorch count as they are. None with steps of `moesaic.kernels.feature_step`.
    - ``dense_equivalent`` sends every token through every expert of moesaic's ops: T·E rows for T·k. Ops without
      experts count as they are, so do experts written as plain products. None with a grouped product of nobody knows
      how many tokens: PyTorch's, or `grouped_matmul` with offsets that no earlier one gathered by.
    - ``bytes``: every op reads its operands once and writes its results once (in place: both), views, ``empty`` and
      dimensions of stride 0 are free, and what gathers, scatters or indexes moves the rows it selects and the index.
      moesaic's ops move the weights of experts that have rows, gathered rows, and what their kernels hand each other.
      Whole trainings (`train_ensemble`) move state and moments once, or once per step where a GPU has no room on chip.
      No cache is assumed between ops, and no optimiser's step is in it.
    - Where ids are fake, or nobody has them (`train_ensemble`), padding and touched experts are the most that they can
      be, with one row in each of min(E, rows) experts but one, and ``bound`` is True. Fake tensors on "cuda" count as a
      GPU's; a PyTorch without CUDA can count them under ``torch.no_grad()`` only, and has few ops for them. All others
      count as a CPU's, or, with ``MOESAIC_BACKEND=triton`` and ``TRITON_INTERPRET=1``, as a GPU's, gradients too.
    - Not seen: Triton kernels that are launched by hand, code inside other custom ops, ops inside ``torch.compile``.

    Args:
        target: a configuration (any object with the attributes of `moesaic.moe.ToyConfig` used here), or a callable.
        args: what the callable is given. All keywords belong to configurations.
        feature_probability: mean p in (0, 1]: p·n features are active. No sparse counts without it or the next.
        active_features: mean number of active features per sample, in [0, n].
        samples: samples counted.
        batch_size: samples per step (default: ``samples``), because weights move once per batch.
        executed_rows: expert rows multiplied for all samples, with padding and masked ones (default samples·k: none).
        itemsize: bytes per number.

    Raises:
        ValueError: an argument outside its range, or tensors on "cuda" that PyTorch cannot differentiate here.
    """
    if callable(target):
        return _count_callable(target, args)
    if args:
        raise ValueError(f"args={args!r}: a configuration takes keyword arguments only")
    n, m, n_experts, k, m0 = _shape(target)
    batch_size = samples if batch_size is None else batch_size
    for name, value in (("samples", samples), ("batch_size", batch_size), ("itemsize", itemsize)):
        if value < 1:
            raise ValueError(f"{name}={value!r}: must be at least 1")
    rows = samples * k if executed_rows is None else executed_rows
    if rows < samples * k:
        raise ValueError(f"executed_rows={rows!r}: must be at least samples·top_k = {samples * k}")
    active = _active_features(n, feature_probability, active_features)

    def work(training: bool, rows: int) -> Parts:
        width = rows * m + samples * m0
        return _parts(n, active, (width, samples * n_experts, width), _products(target, training))

    def one(training: bool) -> Pass:
        return Pass(
            active=work(training, samples * k),
            executed=work(training, rows),
            dense_equivalent=work(training, samples * n_experts),
            bytes=_traffic(target, batch_size, samples / batch_size * itemsize, training),
        )

    return Flops(
        forward=one(training=False),
        training=one(training=True),
        samples=samples,
        parameters=_parameters(target, n_experts),
        active_parameters=_parameters(target, k),
        total_width=n_experts * m + m0,
        active_width=k * m + m0,
    )


def dense_width_at_equal_flops(
    config: _ToyShape,
    *,
    training: bool = True,
    feature_probability: float | None = None,
    active_features: float | None = None,
) -> int:
    """Width m of the dense model (E = 1, no router) whose FLOPs are nearest to the active FLOPs of ``config``.

    Solves encode(m) + decode(m) = encode + router + decode of `count_flops`: m = k·m + m0 + E/2 for a forward pass and
    k·m + m0 + 2E/5 for training with a trained router (dense encoding); to the nearest m ≥ 1, a tie to the smaller.
    With ``feature_probability`` or ``active_features`` both sides encode active features only. Raises ValueError for an
    argument outside its range.
    """
    n, m, n_experts, k, m0 = _shape(config)
    given = _active_features(n, feature_probability, active_features)
    read = n if given is None else given
    encode, router, decode = _products(config, training)
    exact = k * m + m0 + router * read * n_experts / (encode * read + decode * n)
    return max(1, math.ceil(exact - 0.5))


def _products(config: _ToyShape, training: bool) -> tuple[int, int, int]:
    """How many products of its forward size each of encode, router and decode does."""
    routed, trained = _router(config)
    return (2, routed + trained, 3) if training else (1, routed, 1)


def _parts(n: int, active: float | None, widths: tuple[int, int, int], products: tuple[int, int, int]) -> Parts:
    encode, router, decode = (2 * n * w * c for w, c in zip(widths, products, strict=True))
    total = encode + router + decode
    if active is None:
        return Parts(total, encode, router, decode)
    sparse_encode, sparse_router = (2 * active * w * c for w, c in zip(widths[:2], products[:2], strict=True))
    return Parts(total, encode, router, decode, sparse_encode + sparse_router + decode, sparse_encode, sparse_router)


def _traffic(config: _ToyShape, batch: int, unit: float, training: bool) -> Traffic:
    n, m, n_experts, k, m0 = _shape(config)
    routed, trained = _router(config)
    shared = int(m0 > 0)
    touched = min(n_experts, batch * k)
    outer, inner = n * batch * (k + shared), batch * (k * m + m0)
    weight = n * (touched * m + m0)
    weights = 2 * weight + n * (touched + shared) + routed * n * n_experts
    activations = 2 * outer + 2 * inner + routed * batch * (n + n_experts)
    if not training:
        return Traffic(unit * weights, unit * activations)
    parameters = _parameters(config, n_experts) - (routed - trained) * n * n_experts
    activations += outer + inner + trained * batch * n
    gradients = 3 * outer + 2 * inner + trained * batch * n_experts + parameters + 2 * weight * config.tied
    return Traffic(unit * (weights + weight), unit * activations, unit * gradients, unit * 7 * parameters)


def _parameters(config: _ToyShape, experts: int) -> int:
    n, m, n_experts, _, m0 = _shape(config)
    matrices = 1 if config.tied else 2
    return n * (matrices * (experts * m + m0) + experts + int(m0 > 0) + _router(config)[0] * n_experts)


def _router(config: _ToyShape) -> tuple[int, int]:
    """Whether there is a router and whether it is trained, as 0 or 1 so that they multiply counts."""
    routed = config.n_experts > 1 or config.gate == "sigmoid"
    return int(routed), int(routed and config.gate not in FROZEN_GATES)


def _shape(config: _ToyShape) -> tuple[int, int, int, int, int]:
    for name, least in (("n_features", 1), ("n_hidden", 1), ("n_experts", 1), ("shared_hidden", 0)):
        if getattr(config, name) < least:
            raise ValueError(f"{name}={getattr(config, name)!r}: must be at least {least}")
    n, m, n_experts, k, m0 = config.n_features, config.n_hidden, config.n_experts, config.top_k, config.shared_hidden
    if not 1 <= k <= n_experts:
        raise ValueError(f"top_k={k!r}: must be between 1 and n_experts = {n_experts}")
    return n, m, n_experts, k, m0


def _active_features(n: int, probability: float | None, active: float | None) -> float | None:
    if probability is not None and active is not None:
        raise ValueError(f"active_features={active!r}: give either this or feature_probability (got {probability!r})")
    if probability is not None and not 0 < probability <= 1:
        raise ValueError(f"feature_probability={probability!r}: must be in (0, 1]")
    if active is not None and not 0 <= active <= n:
        raise ValueError(f"active_features={active!r}: must be between 0 and n_features = {n}")
    return active if probability is None else probability * n


def _count_callable(target: Callable[..., object], args: Sequence[object]) -> Flops:
    module = target if isinstance(target, torch.nn.Module) else None
    _check_differentiable(args, module)
    with OpAccounting() as forward:
        tensors = [leaf for leaf in tree_leaves(target(*args)) if isinstance(leaf, Tensor)]
    outputs = [tensor for tensor in tensors if tensor.grad_fn is not None]
    training = None
    if outputs:
        ones, leaves = [torch.ones_like(output) for output in outputs], _graph_leaves(outputs)
        with OpAccounting(forward.tokens) as backward:
            torch.autograd.grad(outputs, leaves, ones, allow_unused=True)
        training = forward.total + backward.total
    active = None if module is None else getattr(module, "active_parameters", None)
    return Flops(
        forward=_pass(forward.total),
        training=Pass() if training is None else _pass(training),
        parameters=None if module is None else sum(p.numel() for p in module.parameters()),
        active_parameters=active if isinstance(active, int) else None,
        bound=(training or forward.total).bound,
    )


def _pass(total: Totals) -> Pass:
    moved = Traffic(unsplit=total.bytes)
    return Pass(Parts(total.useful), Parts(total.executed), Parts(total.dense_equivalent), moved)


def _check_differentiable(args: Sequence[object], module: torch.nn.Module | None) -> None:
    if torch.backends.cuda.is_built() or not torch.is_grad_enabled():
        return
    leaves = [*tree_leaves(list(args)), *(module.parameters() if module is not None else ())]
    if any(isinstance(leaf, Tensor) and leaf.is_cuda and leaf.requires_grad for leaf in leaves):
        # Its autograd would end the process.
        raise ValueError("args: takes tensors on cuda under torch.no_grad() only, in a PyTorch without CUDA")


def _graph_leaves(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Every leaf tensor the outputs depend on, found in the graph so that closures count too."""
    stack = [output.grad_fn for output in outputs]
    seen = set(stack)
    leaves: list[Tensor] = []
    while stack:
        node = stack.pop()
        if isinstance(variable := getattr(node, "variable", None), Tensor):
            leaves.append(variable)
        for parent, _ in node.next_functions if node is not None else ():
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return leaves
