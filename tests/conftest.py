"""What the tests of Triton kernels share, and of what is built of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from numba.core.dispatcher import Dispatcher

INTERPRETED = Path(__file__).with_name("interpreted.py")
LONGEST = [
    "grouped_compile", "ensemble_memory", "ensemble_compile", "feature_step", "tiny_triton", "toy_unrolled",
    "expert_mlp", "ensemble", "stripes_compile", "bench_ensemble", "grouped_matmul_triton", "parallel",
    "routing_triton", "bench_million", "ensemble_registers", "sparse_features_triton", "phase", "data_parallel",
    "parallel_training", "dispatch_triton", "trainer", "large", "report",
]  # fmt: skip
"""Files of compilers and processes, the longest first."""


compile_signature = Dispatcher.compile


def compile_untraced(self: Dispatcher, signature: Any) -> Any:
    """Compile without the tracer that counts covered lines, which takes a sixth of the time of a compilation."""
    tracer = sys.gettrace()
    sys.settrace(None)
    try:
        return compile_signature(self, signature)
    finally:
        sys.settrace(tracer)


setattr(Dispatcher, "compile", compile_untraced)  # noqa: B010 (an assignment would be of another type)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first: a file goes to one worker, and the last one should not be waited for."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="module")
def interpret(request: pytest.FixtureRequest) -> Iterator[Callable[[str], None]]:
    """Run a program of the test's own file in Triton's interpreter; what it returns is what is wrong.

    Triton decides between compiler and interpreter on import, so it is a process of its own, one for a file.
    """
    server = subprocess.Popen(
        [sys.executable, str(INTERPRETED), str(request.path)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    asked, answers = server.stdin, server.stdout

    def run(name: str) -> None:
        print(name, file=asked, flush=True)
        code, output = json.loads(answers.readline() or '[1, "the file cannot be imported"]')
        assert code == 0, output

    with server:
        yield run
        asked.close()


@pytest.fixture(scope="module")
def interpreted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the ``results()`` of the test's own file are in Triton's interpreter."""
    out = tmp_path_factory.mktemp("interpreted") / "results.pt"
    command = [sys.executable, str(INTERPRETED), str(request.path), str(out)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = torch.load(out)
    return results
