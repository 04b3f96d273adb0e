from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moesaic.kernels import philox
from moesaic.kernels._extras import numba_twin
from moesaic.kernels.philox import philox_uniform, philox_uniform_reference

SEEDS = torch.tensor([0, 1, 2**32 + 5, 2**63 - 1])


def uniform_numba(seeds: torch.Tensor, n_rows: int, n_cols: int, step: int, stream: int) -> torch.Tensor:
    fill = numba_twin("toy_cpu").uniform_row
    out = np.empty((len(seeds), n_rows, n_cols), np.float32)
    words = np.empty((4, (n_cols + 3) // 4), np.uint32)
    for s, seed in enumerate(seeds.tolist()):
        for row in range(n_rows):
            fill(np.uint64(seed), row, step, stream, words, out[s, row], n_cols)
    return torch.from_numpy(out)


def test_known_answer() -> None:
    # Random123's kat_vectors, philox4x32 10 rounds, counter 0, key 0; the sign bit folded as Triton does.
    words = np.array([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8], np.uint64)
    folded = np.where(words >= 2**31, 0xFFFFFFFF - words, words).astype(np.float32)
    expected = torch.from_numpy(folded * np.float32(4.6566127342e-10))
    assert torch.equal(philox_uniform(torch.tensor([0]), 1, 4)[0, 0], expected)


@pytest.mark.parametrize(("n_rows", "n_cols"), [(1, 1), (3, 7), (17, 128)])
@pytest.mark.parametrize(("step", "stream"), [(0, 0), (12345, 2), (2**32 - 1, 2**32 - 2)])
def test_numba_equals_reference_bit_for_bit(n_rows: int, n_cols: int, step: int, stream: int) -> None:
    expected = philox_uniform_reference(SEEDS, n_rows, n_cols, step=step, stream=stream)
    assert torch.equal(uniform_numba(SEEDS, n_rows, n_cols, step, stream), expected)


def test_prefixes_do_not_depend_on_the_sizes() -> None:
    assert torch.equal(philox_uniform(SEEDS, 9, 21)[:, :4, :10], philox_uniform(SEEDS, 4, 10))


INTERPRETED = """
import torch
from moesaic.kernels.philox import _launch, philox_uniform_reference
seeds = torch.tensor([0, 1, 2**32 + 5, 2**63 - 1])
for n_rows, n_cols, step, stream in [(1, 1, 0, 0), (5, 7, 3, 1), (70, 18, 2**32 - 1, 2**32 - 2)]:
    ours = _launch(seeds, step, stream, n_rows, n_cols)
    theirs = philox_uniform_reference(seeds, n_rows, n_cols, step=step, stream=stream)
    assert torch.equal(ours, theirs), (n_rows, n_cols)
print("same bits")
"""


def test_triton_kernel_in_the_interpreter_equals_reference_bit_for_bit() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "same bits", done.stderr


@pytest.mark.parametrize("chip", [80, 90, 100])
def test_triton_kernel_compiles_ahead_of_time(chip: int) -> None:
    sizes = dict.fromkeys(("step", "stream", "n_rows", "n_cols", "n_blocks"), "i64")
    signature = {"Out": "*fp32", "Seeds": "*i64", **sizes, "BLOCK": "constexpr"}
    source = ASTSource(philox._philox_uniform_kernel, signature, constexprs={"BLOCK": 256})
    assert len(triton.compile(source, target=GPUTarget("cuda", chip, 32)).asm["cubin"]) > 0


@pytest.mark.parametrize("bad", [{"n_rows": -1}, {"n_cols": 2**32}, {"step": 2**32}, {"stream": -1}])
def test_refuses_what_does_not_fit(bad: dict[str, int]) -> None:
    sizes = {"n_rows": 1, "n_cols": 1} | bad
    with pytest.raises(ValueError, match=next(iter(bad))):
        philox_uniform(SEEDS, **sizes)
    with pytest.raises(ValueError, match="seeds"):
        philox_uniform(SEEDS.float(), 1, 1)


@pytest.mark.gpu
def test_cuda_equals_reference_bit_for_bit() -> None:
    expected = philox_uniform_reference(SEEDS, 1000, 77, step=5, stream=2)
    assert torch.equal(philox_uniform(SEEDS.cuda(), 1000, 77, step=5, stream=2).cpu(), expected)
