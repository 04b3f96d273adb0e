"""One rank of a test with several processes: `run_rank.py FILE NAMES RANK SIZE FOLDER` calls functions of a test file.

Each function gets a fresh gloo group of all ranks and the folder that they share; what it returns or raises goes to
`FOLDER/rank.jsonl`, one line per function.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def main(file: str, names: str, rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("checks", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    store, patience = dist.FileStore(str(folder / "store"), size), timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=patience)
    with (folder / f"{rank}.jsonl").open("w") as outcomes:
        for name in names.split(","):
            group = dist.new_group(timeout=patience)
            value, error = None, None
            try:
                value = getattr(module, name)(group, folder)
            except Exception:
                error = traceback.format_exc()
            outcomes.write(json.dumps({"name": name, "value": value, "error": error}) + "\n")
            outcomes.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
