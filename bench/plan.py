"""The words a sweep is planned in: runs with labels, stages of runs, presets of stages; how runs group for training."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moesaic.moe.config import Run

Row = dict[str, object]
"""One trained model as written to ``runs.jsonl``: JSON values only."""

FLOAT32_BYTES = 4
STEP_BYTES = 2 * FLOAT32_BYTES + 8 + 32
"""Per training step: two losses, the learning rate as float64 and, while that table is built, as a Python float."""
GEOMETRY_BYTES = 8 * 8
"""Per feature and expert, of a large run that is measured."""
HELD_OUT_SAMPLES = 8192
"""Samples of `moesaic.moe.held_out`."""


class InputError(ValueError):
    """What the user asked for cannot be done; raised before any training, shown without a traceback (exit code 2)."""


def closest(name: str, allowed: Iterable[str]) -> str:
    """The question whether the nearest of ``allowed`` was meant, to end a message with; empty where none is near."""
    near = difflib.get_close_matches(name, list(allowed), n=1)
    return f" - did you mean {near[0]!r}?" if near else ""


@dataclass(frozen=True)
class PlannedRun:
    """One model to train.

    Args:
        run: its configuration and seed.
        labels: extra columns of its row: stage, dataset, comparison, ….
        keep: whether its weights and loss curve are kept (see `moesaic.bench.models`); nothing else depends on it.
    """

    run: Run
    labels: Mapping[str, str | int] = field(default_factory=dict)
    keep: bool = False


Stage = Callable[[list[Row]], list[PlannedRun]]
"""Plans one stage of a sweep from the rows of the earlier stages, in plan order (the first stage gets none).

A stage must be a pure function of the configuration and result columns: on ``--resume`` it is asked again."""


@dataclass(frozen=True)
class Preset:
    """A named sweep.

    Args:
        name: what ``moesaic sweep`` calls it.
        description: one line for listings.
        stages: ``stages(quick, seeds)`` gives the stages in order; ``seeds`` is how many, or None for the preset's own.
        spec: the parsed TOML of a sweep read from a file, which says what differs when another spec resumes its folder.
    """

    name: str
    description: str
    stages: Callable[[bool, int | None], list[Stage]]
    spec: Mapping[str, object] | None = None


LARGE = 20_000
"""Features from which on a run is trained by `moesaic.moe.train_large`: batch × n tensors would take gigabytes."""


def is_large(run: Run) -> bool:
    """Whether a run is trained and measured on sparse batches: of very many features, or with an option of that."""
    training = run.training
    sparse_only = (training.decode, training.precision, training.moments) != ("exact", "ieee", "fp32")
    return run.toy.n_features >= LARGE or sparse_only


def unique(planned: Sequence[PlannedRun]) -> list[PlannedRun]:
    """``planned`` without repeats of one run, in first-seen order.

    Raises:
        ValueError: one run is planned under two sets of labels, so its single row could not carry both.
    """
    seen: dict[str, PlannedRun] = {}
    for item in planned:
        first = seen.setdefault(item.run.key, item)
        if first.labels is not item.labels and dict(first.labels) != dict(item.labels):
            raise ValueError(f"one run is planned with labels {dict(first.labels)} and {dict(item.labels)}: {item.run}")
    return list(seen.values())


def plan_digest(planned: Sequence[PlannedRun]) -> str:
    """Sha256 over the run keys and labels of ``planned``, in order."""
    digest = hashlib.sha256()
    for item in planned:
        digest.update(json.dumps([item.run.key, dict(item.labels)], sort_keys=True).encode())
    return digest.hexdigest()


def training_bytes(run: Run) -> int:
    """About what one model of a group holds while training, in bytes.

    Weights, their gradient and two Adam moments; a batch at the input, the k decoded outputs, their gradients and the
    router's scores; two loss curves and the learning rates. An estimate that only has to keep a group within bounds.
    """
    return sum(size for name, size in _memory(run).items() if name != "held_out")


def needed_bytes(run: Run, part: str | None = None) -> int:
    """About what a run needs, held-out batch included, in bytes; or one part of it, 0 where the run has none such."""
    parts = _memory(run)
    return sum(parts.values()) if part is None else parts.get(part, 0)


def check_memory(planned: Sequence[PlannedRun], available: int | None) -> None:
    """Refuses runs that cannot fit into ``available`` bytes, by arithmetic alone; None means unknown, so all pass.

    Raises:
        InputError: naming the first such run, the bytes it needs and has, and the fields to lower.
    """
    for item in planned if available is not None else ():
        parts = _memory(item.run)
        needed = sum(parts.values())
        if available is not None and needed > available:
            values = item.run.flat()
            shown = ", ".join(f"{name} = {values[name]!r}" for name in _MEMORY_FIELDS)
            lower = _TO_LOWER[max(parts, key=lambda part: parts[part])]
            raise InputError(
                f"the run with {shown} needs about {needed} bytes of memory ({needed / 2**30:.1f} GiB), "
                f"available are {available} ({available / 2**30:.1f} GiB); lower {lower}"
            )


_MEMORY_FIELDS = ("n_features", "n_hidden", "n_experts", "top_k", "shared_hidden", "batch_size", "steps")
_TO_LOWER = {
    "parameters": "n_features, n_experts, n_hidden or shared_hidden",
    "batch": "batch_size, n_features, n_experts or top_k",
    "steps": "steps",
    "held_out": "n_features or n_experts",
    "table": "n_features, n_experts, n_hidden or shared_hidden",
    "moments": "n_features, n_experts, n_hidden or shared_hidden",
    "evaluation": "n_features or n_experts",
}


def _memory(run: Run) -> dict[str, int]:
    toy, training = run.toy, run.training
    if is_large(run):
        from moesaic.moe.large import required_bytes

        # Geometry in float64: four results per (expert, feature) and as many intermediate ones.
        evaluation = GEOMETRY_BYTES * toy.n_features * (toy.n_experts + bool(toy.shared_hidden))
        return {**required_bytes(run), "evaluation": evaluation}
    decoders = 1 if toy.tied else 2
    width = toy.n_experts * toy.n_hidden + toy.shared_hidden
    parameters = toy.n_features * (decoders * width + 2 * toy.n_experts + 1)
    outputs = 2 * (toy.top_k + 1) + 2
    activations = training.batch_size * (toy.n_features * outputs + 3 * toy.n_experts)
    return {
        "parameters": FLOAT32_BYTES * 4 * parameters,
        "batch": FLOAT32_BYTES * activations,
        "steps": STEP_BYTES * training.steps,
        "held_out": FLOAT32_BYTES * HELD_OUT_SAMPLES * (toy.n_features + toy.n_experts),
    }


def training_groups(
    planned: Sequence[PlannedRun], *, max_models: int = 64, max_bytes: int = 1 << 30
) -> list[list[PlannedRun]]:
    """Splits ``planned`` into the groups that train stacked together.

    Runs of equal ``Run.group`` go together, in plan order, at most ``max_models`` of them and at most ``max_bytes`` by
    `training_bytes` (a single run may exceed that: it has to be trained anyhow). The groups depend on the plan alone,
    never on what is already done.
    """
    alike: dict[tuple[object, ...], list[PlannedRun]] = {}
    for item in planned:
        # Large runs have nothing to share, and one that fails should not take others along.
        alone = item.run.key if is_large(item.run) else ""
        alike.setdefault((*item.run.group, alone), []).append(item)
    groups = []
    for members in alike.values():
        # Equal groups have equal shapes, so the first member stands for all.
        size = max(1, min(max_models, max_bytes // training_bytes(members[0].run)))
        groups += [members[i : i + size] for i in range(0, len(members), size)]
    return groups
