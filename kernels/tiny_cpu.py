"""CPU twins in Numba of the products with matrices of a side below 32: lines of the long side, no tiles."""

from __future__ import annotations

from numba import njit

from moesaic.kernels._extras import LIBRARY
from moesaic.kernels.grouped_cpu import get_num_threads as get_num_threads
from moesaic.kernels.vectors_cpu import LINE, add_line, aligned, dot_lines, read, round_line, write


@njit(nogil=True, error_model="numpy", cache=True)
def dot(
    begin, end, x, k, ids, n_experts, tag, weight, step_e, step_k, step_n, bias, biased, out, library=LIBRARY
):  # fmt: skip
    """Write out[s] = x[s // k] · W_{ids[s]} + b, in rows begin … end − 1; zeros where there is no such expert."""
    depth, size = x.shape[1], tag.itemsize
    width = LINE // x.itemsize
    lines = depth // width if step_k == 1 else 0
    for s in range(begin, end):
        e = ids[s]
        if e < 0 or e >= n_experts:
            out[s, :] = 0.0
            continue
        row = x.ctypes.data + (s // k) * depth * x.itemsize
        for n in range(out.shape[1]):
            source = weight + (e * step_e + n * step_n) * size
            total = dot_lines(tag, x, row, source, lines)
            for i in range(lines * width, depth):
                total += x[s // k, i] * read(tag, x, source + i * step_k * size)
            out[s, n] = total + read(tag, x, bias + (e * out.shape[1] + n) * size) if biased else total


@njit(nogil=True, error_model="numpy", cache=True)
def spread(
    begin, end, a, k, scale, ids, n_experts, tag, weight, step_e, step_k, step_n, bias, biased, out, library=LIBRARY
):  # fmt: skip
    """Write out[t] = Σ_j s_tj (a_tj · W + b), in rows begin … end − 1; an empty ``scale`` stands for ones."""
    columns, size = out.shape[1], tag.itemsize
    width = LINE // out.itemsize
    lines = columns // width if step_n == 1 else 0
    for t in range(begin, end):
        row = out.ctypes.data + t * columns * out.itemsize
        out[t, :] = 0.0
        for s in range(t * k, (t + 1) * k):
            e = ids[s]
            if e < 0 or e >= n_experts:
                continue
            factor = scale[s] if scale.shape[0] > 0 else out.dtype.type(1.0)
            source = weight + e * step_e * size
            for i in range(a.shape[1]):
                at, term = source + i * step_k * size, factor * a[s, i]
                for p in range(lines):
                    add_line(tag, out, row + p * LINE, at + p * width * size, term)
                for n in range(lines * width, columns):
                    out[t, n] += term * read(tag, out, at + n * step_n * size)
            if biased:
                at = bias + e * columns * size
                for p in range(columns // width):
                    add_line(tag, out, row + p * LINE, at + p * width * size, factor)
                for n in range(columns // width * width, columns):
                    out[t, n] += factor * read(tag, out, at + n * size)


@njit(nogil=True, error_model="numpy", cache=True)
def outer(
    begin, end, experts, starts, ends, wide, tag, left, left_step, left_rows, left_gathered, right, right_step,
    right_rows, right_gathered, n_left, n_right, swapped, out, library=LIBRARY,
):  # fmt: skip
    """Write out[e] = Σ_r left_rᵀ right_r of groups begin … end − 1 by lines of right; swapped: its transpose."""
    size, width = tag.itemsize, LINE // wide.itemsize
    lines = n_right // width
    total = aligned(wide, n_left * n_right + width)
    for group in range(begin, end):
        total[:] = 0.0
        for r in range(starts[group], ends[group]):
            row = left + (left_rows[r] if left_gathered else r) * left_step * size
            at = right + (right_rows[r] if right_gathered else r) * right_step * size
            for i in range(n_left):
                factor, to = read(tag, wide, row + i * size), total.ctypes.data + i * n_right * wide.itemsize
                for p in range(lines):
                    add_line(tag, wide, to + p * LINE, at + p * width * size, factor)
                for n in range(lines * width, n_right):
                    total[i * n_right + n] += factor * read(tag, wide, at + n * size)
        target = out + experts[group] * n_left * n_right * size
        if swapped:
            for i in range(n_left):
                for n in range(n_right):
                    write(tag, target + (n * n_left + i) * size, total[i * n_right + n])
        else:
            full = n_left * n_right // width
            for p in range(full):
                round_line(tag, wide, target + p * width * size, total.ctypes.data + p * LINE)
            for i in range(full * width, n_left * n_right):
                write(tag, target + i * size, total[i])
