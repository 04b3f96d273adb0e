"""What this machine can do: hardware, versions, which implementation of each op runs and why, energy meters, disk."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from moesaic.bench import environment
from moesaic.kernels._backend import BACKENDS

ROUTING_OPS = ("route_topk", "group_by_expert")
GROUPED_OPS = ("grouped_matmul", "expert_mlp")
FEATURE_OPS = ("sample_features", "encode_features", "feature_step")
"""Ops that heed ``MOESAIC_BACKEND`` everywhere; those of routing on a CPU, others never."""


@dataclass(frozen=True)
class Backend:
    """What runs an op here, and why that."""

    op: str
    runs: str
    why: str


@dataclass(frozen=True)
class Meter:
    """What fills a joule column of the rows; without a meter the column is null."""

    column: str
    meter: str | None
    why: str


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` finds; by extra, ``missing`` names modules and ``install`` the command that brings them."""

    device: str
    machine: dict[str, object]
    versions: dict[str, str | None]
    git_commit: str | None
    free_disk_bytes: int
    backend_variable: str | None
    triton_interpret: bool
    ops: list[Backend]
    energy: list[Meter]
    missing: dict[str, list[str]]
    install: dict[str, str]

    def __str__(self) -> str:
        gpus, memory = self.machine["gpus"], self.machine["memory_bytes"]
        installed = ", ".join(f"{name} {version or 'missing'}" for name, version in self.versions.items())
        head = {
            "device": self.device + (f" ({', '.join(gpus)})" if isinstance(gpus, list) and gpus else ""),
            "cpu": f"{self.machine['cpu']}, {self.machine['cores']} cores",
            "torch threads": str(self.machine["torch_threads"]),
            "memory": f"{memory / 2**30:.1f} GiB" if isinstance(memory, int) else "unknown",
            "free disk": f"{self.free_disk_bytes / 2**30:.1f} GiB in this folder",
            "versions": installed,
            "commit": self.git_commit or "none: not running from a checkout",
            "MOESAIC_BACKEND": self.backend_variable or "not set",
            "TRITON_INTERPRET": "1: Triton kernels run on CPU tensors" if self.triton_interpret else "not set",
        }
        lines = [f"{name:17}{value}" for name, value in head.items()]
        lines += ["", "op               runs      because"]
        lines += [f"{op.op:17}{op.runs:10}{op.why}" for op in self.ops]
        lines += ["", "joules           meter     because"]
        lines += [f"{meter.column:17}{meter.meter or 'none':10}{meter.why}" for meter in self.energy]
        for extra, modules in self.missing.items():
            lines += ["", f"missing: {', '.join(modules)}; {self.install[extra]} brings them"]
        return "\n".join(lines)


def diagnose(folder: Path = Path()) -> Diagnosis:
    """Looks at this machine; ``folder`` is the one whose free disk space counts."""
    device = environment.resolve_device("auto")
    missing = environment.missing_extras()
    return Diagnosis(
        device=device,
        machine=environment.machine(),
        versions=environment.versions(),
        git_commit=environment.git_commit(),
        free_disk_bytes=shutil.disk_usage(folder).free,
        backend_variable=os.environ.get("MOESAIC_BACKEND"),
        triton_interpret=os.environ.get("TRITON_INTERPRET") == "1",
        ops=op_backends(device),
        energy=energy_meters(),
        missing=missing,
        install={extra: environment.install_command(extra) for extra in missing},
    )


def op_backends(device: str) -> list[Backend]:
    """For each op, what runs it on ``device`` and why."""
    asked = os.environ.get("MOESAIC_BACKEND")
    note = f"; MOESAIC_BACKEND={asked} is for {' and '.join(GROUPED_OPS)}" if asked else ""
    numba_here = "numba" not in environment.missing_extras().get("bench", [])
    if device != "cpu":
        routing = (
            "triton",
            f"the device is {device}; more than 1,024 experts with groups or statistics PyTorch routes",
        )
        limits = "n > 128, m or E > 32, exactly-k data"
        training = ("triton", f"the device is {device}; what its kernels do not take ({limits}) PyTorch trains")
    elif numba_here:
        routing = training = ("numba", "the device is cpu and Numba is installed")
    else:
        routing = ("torch", "Numba is missing; PyTorch does without it, slower")
        training = ("none", "Numba is missing; --impl torch trains without it, slower")
    if asked and device == "cpu":
        found = [Backend(op, *_grouped(device, asked, numba_here)) for op in ROUTING_OPS]
    else:
        found = [Backend(op, routing[0], routing[1] + note) for op in ROUTING_OPS]
    found += [Backend(op, *_grouped(device, asked, numba_here)) for op in GROUPED_OPS]
    for op in FEATURE_OPS:
        runs, why = _grouped(device, asked, numba_here)
        if runs == "torch":
            runs, why = "none", "Numba is missing"
        elif runs == "numba" and device != "cpu":
            runs, why = "none", f"MOESAIC_BACKEND={asked} takes tensors on a CPU"
        found.append(Backend(op, runs, why))
    return [*found, Backend("train_ensemble", training[0], training[1] + note)]


def _grouped(device: str, asked: str | None, numba_here: bool) -> tuple[str, str]:
    """What runs the grouped products, and why."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if asked and asked not in BACKENDS:
        return "none", f"MOESAIC_BACKEND={asked}: takes {' or '.join(BACKENDS)}"
    if asked == "triton" and device == "cpu" and not interpreted:
        return "none", "MOESAIC_BACKEND=triton takes a GPU, or TRITON_INTERPRET=1"
    because = f"MOESAIC_BACKEND={asked}" if asked else f"the device is {device}"
    if (asked or ("cpu" if device == "cpu" else "triton")) == "triton":
        return "triton", f"{because}; float64 takes PyTorch"
    if numba_here:
        return "numba", f"{because} and Numba is installed"
    return "torch", f"{because} and Numba is missing; PyTorch does without it, slower"


def energy_meters() -> list[Meter]:
    """The meters that could fill each joule column, NVML before Zeus, and why one cannot."""
    from moesaic.metrics.meters import EnergyMeter, NvmlMeter, RaplMeter, ZeusMeter

    meters = []
    kinds: tuple[type[EnergyMeter], ...] = (NvmlMeter, ZeusMeter, RaplMeter)
    for kind in kinds:
        try:
            kind()
        except RuntimeError as error:
            meters.append(Meter(f"{kind.scope}_j", None, str(error)))
        else:
            meters.append(
                Meter(f"{kind.scope}_j", kind.__name__, "readable here; sweep --energy and bench energy read it")
            )
    return meters
