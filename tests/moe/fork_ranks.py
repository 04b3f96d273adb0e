"""The ranks of a test with several processes: `fork_ranks.py FILE NAMES SIZE FOLDER` calls functions of a test file.

Imports take longer than the tests, so one process imports and forks all ranks. Each function gets a fresh gloo group of
all ranks and the folder that they share; what it returns or raises goes to `FOLDER/<rank>.jsonl`, one line each.
Exit statuses go to `FOLDER/statuses.json`, by rank.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist

from moesaic.kernels._extras import numba_twin


def load(file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("checks", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def work(module: ModuleType, names: list[str], rank: int, size: int, folder: Path) -> None:
    store, patience = (folder / "store").as_uri(), timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=2 * patience)
    with (folder / f"{rank}.jsonl").open("w") as outcomes:
        for name in names:
            dist.barrier()  # with more patience than ranks that a failed one left waiting
            group = dist.new_group(timeout=patience)
            value, error = None, None
            try:
                value = getattr(module, name)(group, folder)
            except Exception:
                error = traceback.format_exc()
            outcomes.write(json.dumps({"name": name, "value": value, "error": error}) + "\n")
            outcomes.flush()
    dist.destroy_process_group()


def main(file: str, names: str, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    module = load(file)
    for twin in ("activations_cpu", "grouped_cpu", "routing_cpu"):  # else each rank imports Numba
        numba_twin(twin)
    processes = []
    for rank in range(size):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, which NumPy may have
            process = os.fork()
        if process == 0:
            work(module, names.split(","), rank, size, folder)
            return
        processes.append(process)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    (folder / "statuses.json").write_text(json.dumps(statuses))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
