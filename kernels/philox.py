"""Counter-based uniform random numbers, the same bits on every device.

    u[s, row, 4·block + w] = unit(word w of Philox4x32-10(key = seeds[s], counter = (row, block, step, stream)))

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC11); unit, the map to
[0, 1), is Triton's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _philox_uniform_kernel(Out, Seeds, step, stream, n_rows, n_cols, n_blocks, BLOCK: tl.constexpr):
    model = tl.program_id(1)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = (index // n_blocks).to(tl.uint32)
    block = (index % n_blocks).to(tl.uint32)
    zero = row * 0
    seed = tl.load(Seeds + model)
    words = tl.philox(seed, row, block, zero + step.to(tl.uint32), zero + stream.to(tl.uint32))
    base = Out + (model.to(tl.int64) * n_rows + row) * n_cols
    for w in tl.static_range(4):
        col = block * 4 + w
        tl.store(
            base + col, tl.random.uint_to_uniform_float(words[w]), mask=(index < n_rows * n_blocks) & (col < n_cols)
        )


def _launch(seeds: Tensor, step: int, stream: int, n_rows: int, n_cols: int) -> Tensor:
    out = torch.empty(seeds.shape[0], n_rows, n_cols, dtype=torch.float32, device=seeds.device)
    blocks = triton.cdiv(n_cols, 4)
    grid = (triton.cdiv(n_rows * blocks, 256), seeds.shape[0])
    _philox_uniform_kernel[grid](out, seeds, step, stream, n_rows, n_cols, blocks, BLOCK=256)
    return out


def philox_uniform(seeds: Tensor, n_rows: int, n_cols: int, *, step: int = 0, stream: int = 0) -> Tensor:
    """Return uniform numbers u (S, n_rows, n_cols) in [0, 1), a pure function of (seed, row, column, step, stream).

    Args:
        seeds: (S,) int64 keys, one per model; its device is the result's.
        n_rows: samples, below 2³².
        n_cols: numbers per sample, below 2³⁴.
        step: third counter word, below 2³².
        stream: fourth counter word; different streams are independent.

    Raises:
        ValueError: for sizes or counters out of range.
    """
    for name, value in (("n_rows", n_rows), ("n_cols", n_cols), ("step", step), ("stream", stream)):
        if not 0 <= value < 2**32:
            raise ValueError(f"{name}={value}: takes an integer from 0 to 2**32 - 1")
    if seeds.dim() != 1 or seeds.dtype != torch.int64:
        raise ValueError(f"seeds: takes a 1-D int64 tensor, got {tuple(seeds.shape)} {seeds.dtype}")
    if seeds.is_cuda and n_rows and n_cols:
        with torch.cuda.device_of(seeds):  # Triton launches on the current device
            return _launch(seeds, step, stream, n_rows, n_cols)
    return philox_uniform_reference(seeds, n_rows, n_cols, step=step, stream=stream)


def philox_uniform_reference(seeds: Tensor, n_rows: int, n_cols: int, *, step: int = 0, stream: int = 0) -> Tensor:
    """Compute ``philox_uniform`` in PyTorch integers; the products wrap, and their low 64 bits are exact."""
    low = 0xFFFFFFFF
    blocks = (n_cols + 3) // 4
    index = torch.arange(n_rows * blocks, device=seeds.device)
    c0, c1 = (index // max(1, blocks)).expand(seeds.shape[0], -1), (index % max(1, blocks)).expand(seeds.shape[0], -1)
    c2, c3 = torch.full_like(c0, step), torch.full_like(c0, stream)
    k0, k1 = (seeds & low)[:, None], ((seeds >> 32) & low)[:, None]
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((p1 >> 32) & low) ^ c1 ^ k0, p1 & low
        c2, c3 = ((p0 >> 32) & low) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    words = torch.stack((c0, c1, c2, c3), dim=-1).view(seeds.shape[0], n_rows, blocks * 4)[..., :n_cols]
    folded = torch.where(words >= 2**31, low - words, words)
    return folded.to(torch.float32) * torch.tensor(4.6566127342e-10, dtype=torch.float32, device=seeds.device)
