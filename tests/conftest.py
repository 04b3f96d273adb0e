"""What the tests of Triton kernels share, and of what is built of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest


@pytest.fixture
def interpret(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Run a program of the test's own file in Triton's interpreter; what it prints is what is wrong.

    Triton decides between compiler and interpreter on import, so it is a process of its own.
    """

    def run(name: str) -> None:
        done = subprocess.run(
            [sys.executable, str(request.path), name],
            env=os.environ | {"TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (0, ""), done.stderr

    return run
