"""What the tests with several processes share."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

PATIENCE_S = 240


class Ranks(NamedTuple):
    """What became of a group of processes: exit statuses, None where it had to be killed; outcomes by function."""

    statuses: list[int | None]
    outcomes: list[dict[str, dict[str, Any]]]
    said: list[str]
    folder: Path

    def values(self, name: str) -> list[Any]:
        """What a function returned on every rank; fails where one raised, or was never reached."""
        for rank, outcomes in enumerate(self.outcomes):
            outcome = outcomes.get(name, {"error": f"not reached; status {self.statuses[rank]}: {self.said[rank]}"})
            if outcome["error"] is not None:
                pytest.fail(f"rank {rank} of {len(self.statuses)}: {outcome['error']}", pytrace=False)
        return [outcomes[name]["value"] for outcomes in self.outcomes]


@pytest.fixture(scope="module")
def run_ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ranks]:
    """Run functions of the test's own file in as many processes as asked, once per module for the same question."""
    runs: dict[tuple[int, tuple[str, ...]], Ranks] = {}

    def run(size: int, names: Sequence[str]) -> Ranks:
        key = (size, tuple(names))
        if key not in runs:
            folder = tmp_path_factory.mktemp("ranks")
            script = Path(__file__).with_name("run_rank.py")
            commands = [
                [sys.executable, "-W", "error", script, request.path, ",".join(names), str(rank), str(size), folder]
                for rank in range(size)
            ]
            logs = [(folder / f"{rank}.txt").open("w") for rank in range(size)]
            processes = [
                subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
                for command, log in zip(commands, logs, strict=True)
            ]
            end = time.monotonic() + PATIENCE_S
            statuses: list[int | None] = []
            for process in processes:
                try:
                    statuses.append(process.wait(max(end - time.monotonic(), 0.1)))
                except subprocess.TimeoutExpired:
                    statuses.append(None)
                    process.kill()
                    process.wait()
            for log in logs:
                log.close()
            files = [folder / f"{rank}.jsonl" for rank in range(size)]
            lines = [file.read_text().splitlines() if file.exists() else [] for file in files]
            outcomes = [{line["name"]: line for line in map(json.loads, theirs)} for theirs in lines]
            said = [(folder / f"{rank}.txt").read_text()[-4000:] for rank in range(size)]
            runs[key] = Ranks(statuses, outcomes, said, folder)
        return runs[key]

    return run
