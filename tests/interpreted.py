"""Programs of a test file in Triton's interpreter: the file is imported once, each program runs in a fork of its own.

    python tests/interpreted.py FILE

takes names of ``PROGRAMS`` line by line and answers each with a line, [exit code, output] in JSON. A program returns
what is wrong.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path


def programs(path: Path) -> Mapping[str, Callable[[], list[str]]]:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    found: Mapping[str, Callable[[], list[str]]] = module.PROGRAMS
    return found


def forked(program: Callable[[], list[str]]) -> tuple[int, str]:
    with tempfile.TemporaryFile("w+") as out:
        child = os.fork()
        if child == 0:
            code = 1
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            try:
                found = program()
                print("\n".join(found), end="")
                code = int(bool(found))
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        out.seek(0)
        return os.waitstatus_to_exitcode(status), out.read()


if __name__ == "__main__":
    known = programs(Path(sys.argv[1]))
    for line in sys.stdin:
        print(json.dumps(forked(known[line.strip()])), flush=True)
