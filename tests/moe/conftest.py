"""What the tests with several processes share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch.distributed as dist

PATIENCE_S = 600


class Ranks(NamedTuple):
    """What became of processes: exit statuses, none where they had to be killed; outcomes by function, per rank."""

    statuses: list[int]
    outcomes: list[dict[str, dict[str, Any]]]
    said: str
    folder: Path

    def values(self, name: str) -> list[Any]:
        """What a function returned on every rank; fails where one raised, or was never reached."""
        for rank, outcomes in enumerate(self.outcomes):
            outcome = outcomes.get(name, {"error": f"not reached; statuses {self.statuses}: {self.said}"})
            if outcome["error"] is not None:
                pytest.fail(f"rank {rank} of {len(self.outcomes)}: {outcome['error']}", pytrace=False)
        return [outcomes[name]["value"] for outcomes in self.outcomes]


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    """A gloo group of the tests' own process."""
    dist.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    yield group
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def run_ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ranks]:
    """Run functions of the test's own file in as many processes as asked, once per module for the same question."""
    runs: dict[tuple[int, tuple[str, ...]], Ranks] = {}

    def run(size: int, names: Sequence[str]) -> Ranks:
        key = (size, tuple(names))
        if key not in runs:
            folder = tmp_path_factory.mktemp("ranks")
            script = Path(__file__).with_name("fork_ranks.py")
            arguments = (script, request.path, ",".join(names), str(size), folder)
            command = [sys.executable, "-W", "error", *map(str, arguments)]
            with (folder / "said.txt").open("w") as said:
                process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
                try:
                    process.wait(PATIENCE_S)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            statuses, files = folder / "statuses.json", [folder / f"{rank}.jsonl" for rank in range(size)]
            lines = [file.read_text().splitlines() if file.exists() else [] for file in files]
            runs[key] = Ranks(
                json.loads(statuses.read_text()) if statuses.exists() else [],
                [{line["name"]: line for line in map(json.loads, theirs)} for theirs in lines],
                (folder / "said.txt").read_text()[-4000:],
                folder,
            )
        return runs[key]

    return run
