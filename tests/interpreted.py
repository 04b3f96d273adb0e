"""A test file in Triton's interpreter.

    python tests/interpreted.py FILE

takes names of the file's ``PROGRAMS`` line by line, runs each in a fork of its own, and answers with a line, [exit
code, output] in JSON. A program returns what is wrong.

    python tests/interpreted.py FILE OUT

saves what the file's ``results()`` returns.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def quicken() -> None:
    """Make the interpreter four times as fast, with the same results, and let it see signed integers overflow.

    A kernel of small tiles spends most of its interpretation on what is the same for every operation: replacing
    Triton's functions by NumPy's on each call of a device function, descriptions of types, and a check of integers'
    range in ten operations of its own, whose outcome only ``debug`` would look at. A sort's exclusive or goes element
    by element.
    """
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": core}))
    for_good = SimpleNamespace(restore=lambda: None)
    interpreter._patch_lang = lambda fn: for_good

    exactly = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check_range(self: Any, a: Any, b: Any, operation: Callable[..., Any]) -> None:
        kind, name = a.type.scalar, operation.__name__
        if kind.is_int_signed() and kind.int_bitwidth < 64:
            exact = exactly[name](a.handle.data.astype(np.int64), b.handle.data.astype(np.int64))
            inside = kind.get_int_min_value() <= exact.min() and exact.max() <= kind.get_int_max_value()
            assert inside, f"int{kind.int_bitwidth} overflow detected for operation {name}"

    TritonSemantic.binary_op_sanitize_overflow_impl = check_range

    reduce = interpreter.ReduceOps.apply_impl

    def reduced(self: Any, inputs: Any) -> Any:
        if self.combine_fn != tl.standard._xor_combine:
            return reduce(self, inputs)
        values = np.bitwise_xor.reduce(inputs[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(values, inputs[0].dtype)

    interpreter.ReduceOps.apply_impl = reduced

    find_dtype, dtypes = interpreter._get_np_dtype, dict[str, Any]()

    def dtype_of(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in dtypes:
            dtypes[name] = find_dtype(kind.scalar)
        return dtypes[name]

    interpreter._get_np_dtype = dtype_of

    describe, blocks = core.block_type.__init__, dict[tuple[Any, ...], dict[str, Any]]()

    def describe_block(self: Any, element: Any, shape: Any) -> None:
        key = (element.name, *(size.value if isinstance(size, core.constexpr) else size for size in shape))
        if key not in blocks:
            describe(self, element, shape)
            constants = core.constexpr(self.numel), core.tuple([core.constexpr(size) for size in self.shape])
            blocks[key] = vars(self) | {"_as_constants": constants}
        vars(self).update(blocks[key], element_ty=element)

    core.block_type.__init__ = describe_block
    of_scalar = core.constexpr(1), core.tuple(())

    def describe_tensor(self: Any, handle: Any, kind: Any) -> None:
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        self.numel, self.shape = kind._as_constants if kind.is_block() else of_scalar

    core.tensor.__init__ = describe_tensor


def imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


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
    quicken()
    file = imported(Path(sys.argv[1]))
    if len(sys.argv) > 2:
        torch.save(file.results(), sys.argv[2])
    else:
        for line in sys.stdin:
            print(json.dumps(forked(file.PROGRAMS[line.strip()])), flush=True)
