"""Where results come from: machine, versions, commit and command, and which of the extras are installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from moesaic._version import __version__
from moesaic.bench.plan import InputError

EXTRAS = {
    "bench": ("numba", "tyro", "tqdm", "duckdb", "matplotlib", "safetensors", "pynvml"),
}
"""Importable modules of each optional extra."""
ON_REQUEST = {"ray": ("ray",)}
"""Those of extras that only an option asks for, so that nobody misses them before."""
VERSIONED = ("torch", "triton", "numpy", "numba", "duckdb", "matplotlib", "safetensors", "tyro", "tqdm")
DEVICES = ("auto", "cpu", "cuda")


class MissingExtraError(InputError):
    """A package of an optional extra is not installed; the message has the command that brings it."""


def missing_extras(extras: Mapping[str, Sequence[str]] = EXTRAS) -> dict[str, list[str]]:
    """The modules that cannot be imported, by extra; an extra with nothing missing is left out."""
    found = {extra: [m for m in modules if not _importable(m)] for extra, modules in extras.items()}
    return {extra: modules for extra, modules in found.items() if modules}


def require(*modules: str) -> None:
    """Raises `MissingExtraError` unless every module can be imported."""
    for extra, missing in missing_extras({**EXTRAS, **ON_REQUEST}).items():
        needed = [m for m in missing if m in modules]
        if needed:
            raise MissingExtraError(f"{' and '.join(needed)} not installed: {install_command(extra)}")


def install_command(extra: str) -> str:
    """The pip command that installs an extra."""
    return f'pip install "moesaic[{extra}]"'


def resolve_device(name: str) -> str:
    """``cpu`` or ``cuda`` for a ``--device`` value; ``auto`` takes CUDA where there is one.

    Raises:
        InputError: an unknown name, or ``cuda`` on a machine without CUDA.
    """
    if name not in DEVICES:
        raise InputError(f"--device {name!r}: must be one of {', '.join(DEVICES)}")
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device cuda: torch {torch.__version__} finds no CUDA device here; use cpu or auto")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def versions() -> dict[str, str | None]:
    """Versions of Python, moesaic and what it computes with; None where not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "moesaic": __version__}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def machine() -> dict[str, object]:
    """CPU model, usable cores, memory in bytes, torch threads and the GPUs torch sees."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "memory_bytes": memory_bytes(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(count)],
    }


def environment(argv: Sequence[str]) -> dict[str, object]:
    """What ``environment.json`` says about this moment: machine, versions, commit, exact command, start time (UTC)."""
    return {
        **machine(),
        "versions": versions(),
        "git_commit": git_commit(),
        "argv": list(argv),
        "command": shlex.join(["moesaic", *argv]) if argv else None,
        "started": now(),
        "ended": None,
    }


def now() -> str:
    """The time as ISO 8601 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """How many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Physical memory, None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def device_memory_bytes(device: str) -> int | None:
    """The memory that bounds a run on ``device``: with CUDA the smaller of the host's and the GPU's; None if unknown.

    A run on a GPU keeps its loss curves and learning rates on the host.
    """
    known = [memory_bytes()]
    if device == "cuda":
        import torch

        known.append(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return min((size for size in known if size), default=None)


def git_commit() -> str | None:
    """The commit of the checkout this code runs from, ``+`` appended where files differ; None for an installed copy."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie inside someone else's repository: only one that tracks this file is ours.
    if shutil.which("git") is None or git("ls-files", "--error-unmatch", here.name) is None:
        return None
    commit = git("rev-parse", "HEAD")
    return commit and commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def _importable(module: str) -> bool:
    if module in sys.modules:
        return sys.modules[module] is not None
    return importlib.util.find_spec(module) is not None
