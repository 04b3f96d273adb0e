"""What the tests of Triton kernels share, and of what is built of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def interpret(request: pytest.FixtureRequest) -> Iterator[Callable[[str], None]]:
    """Run a program of the test's own file in Triton's interpreter; what it returns is what is wrong.

    Triton decides between compiler and interpreter on import, so it is a process of its own, one for a file.
    """
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("interpreted.py")), str(request.path)],
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
