"""CPU twin of the grouped products in Numba, with a matrix kernel in LLVM's own vectors.

A product is cut into tiles of 6 rows by 64 bytes of columns, all of a tile's sums in registers; a weight's panel of
64-byte columns is copied to consecutive lines first, widened to float32 and transposed where its rows are contiguous.
Every sum runs over its terms in order, a fixed number at a time, whatever the threads: bits depend on neither them nor
addresses.
"""

from __future__ import annotations

import numpy as np
from numba import get_num_threads as get_num_threads
from numba import njit

from moesaic.kernels._extras import LIBRARY
from moesaic.kernels.vectors_cpu import (
    LINE,
    add_line,
    aligned,
    micro1,
    micro2,
    micro3,
    micro4,
    micro5,
    micro6,
    move_line,
    read,
    round_line,
    turn_block,
    write,
)  # fmt: skip

HEIGHT = 6  # rows of a tile
DEPTH = 256  # terms summed in registers before they join the total
CHUNK = 288  # rows of a task
FEW = 48  # rows of a task that are too few to make up for packing column by column
PACKED = 32768  # numbers of a weight that are packed at a time
SIDE = 96  # columns of the left matrix in a task of an outer product
TERMS = 384  # rows that such a task sums in registers
# Only what takes LIBRARY is cached on disk: the parts it is made of would not notice a change in the vectors.


@njit(nogil=True, error_model="numpy")
def _tile(height, wide, fresh, to, to_step, rows, skip, a_step, panels, first_line, depth):
    """Add Σ_k a_i[skip + k] · panel[k, :] to ``height`` lines at ``to``.

    Scratch memory comes in arrays, not addresses, to be kept alive until the call is over.
    """
    addresses, panel = rows.ctypes.data, panels.ctypes.data + first_line * LINE
    if height == 6:
        micro6(wide, fresh, to, to_step, addresses, skip, a_step, panel, depth)
    elif height == 5:
        micro5(wide, fresh, to, to_step, addresses, skip, a_step, panel, depth)
    elif height == 4:
        micro4(wide, fresh, to, to_step, addresses, skip, a_step, panel, depth)
    elif height == 3:
        micro3(wide, fresh, to, to_step, addresses, skip, a_step, panel, depth)
    elif height == 2:
        micro2(wide, fresh, to, to_step, addresses, skip, a_step, panel, depth)
    else:
        micro1(wide, fresh, to, to_step, addresses, skip, a_step, panel, depth)


@njit(nogil=True, error_model="numpy")
def _strips(count, columns, fresh, tile, direct, direct_step, rows, skip, a_step, panels, depth):
    """Add the packed product to tiles of ``count`` lines a panel, or write it to ``direct`` unless that is 0."""
    width, i = LINE // tile.itemsize, 0
    for strips in range(-(-count // HEIGHT), 0, -1):
        height = -(-(count - i) // strips)
        for p in range(-(-columns // width)):
            to, to_step = tile.ctypes.data + (p * count + i) * LINE, LINE
            if direct and (p + 1) * width <= columns:
                to, to_step = direct + i * direct_step + p * LINE, direct_step
            _tile(height, tile, fresh, to, to_step, rows[i:], skip, a_step, panels, p * depth, depth)
        i += height


@njit(nogil=True, error_model="numpy")
def _finish(tile, tag, i, count, columns, bias, direct, target):
    """Write line i of the tiles, plus a bias unless that is empty, to ``target``; what is direct is there already."""
    width, source = LINE // tile.itemsize, tile.ctypes.data
    for p in range(-(-columns // width)):
        line, at = (p * count + i) * width, target + p * width * tag.itemsize
        if bias.shape[0] > 0:
            for n in range(min(width, columns - p * width)):
                tile[line + n] += bias[p * width + n]
        if columns - p * width < width:
            for n in range(columns - p * width):
                write(tag, at + n * tag.itemsize, tile[line + n])
        elif not direct:
            round_line(tag, tile, at, source + line * tile.itemsize)


@njit(nogil=True, error_model="numpy")
def _pack(tag, wide, source, step_k, step_n, depth, columns, panels, ahead):
    """Copy (depth, columns), elements step_k and step_n apart, to panels of ``LINE`` bytes by depth, padded with 0.

    What lies ``ahead`` bytes on is fetched meanwhile, if rows are turned.
    """
    size, width, target = wide.itemsize, LINE // wide.itemsize, panels.ctypes.data
    full = columns // width
    from_k, from_n = step_k * tag.itemsize, step_n * tag.itemsize
    done = 0
    if step_n == 1:
        for k in range(depth):
            for p in range(full):
                move_line(tag, wide, target + (p * depth + k) * LINE, source + k * from_k + p * width * from_n)
        done = depth
    elif step_k == 1:
        done = depth // 8 * 8
        for p in range(full):
            for k in range(0, done, 8):
                for n in range(0, width, 8):
                    turn_block(
                        tag, wide, target + (p * depth + k) * LINE + n * size, LINE,
                        source + k * from_k + (p * width + n) * from_n, from_n, ahead,
                    )  # fmt: skip
    for p in range(-(-columns // width)):
        for k in range(done if p < full else 0, depth):
            for n in range(width):
                value = wide.dtype.type(0.0)
                if p * width + n < columns:
                    value = read(tag, wide, source + k * from_k + (p * width + n) * from_n)
                write(wide, target + (p * depth + k) * LINE + n * size, value)


@njit(nogil=True, error_model="numpy", cache=True)
def multiply(
    begin, end, experts, starts, ends, places, x, x_step, gather, gathered, tag, weight, step_e, step_k, step_n, bias,
    depth, out, library=LIBRARY,
):  # fmt: skip
    """Write rows of tasks begin … end − 1: out[r] = x[gather[r]] · W_e + b; x and weight are addresses.

    x is as wide as out, its rows x_step bytes apart; the weight is of the tag's type, its steps counted in numbers. A
    task's bias is bias[places[task]], unless there are none.
    """
    width, columns, size = LINE // out.itemsize, out.shape[1], out.itemsize
    panels, tile, rows = aligned(out, PACKED), aligned(out, CHUNK * 8 * width), np.empty(CHUNK, np.int64)
    for task in range(begin, end):
        e, start, count = experts[task], starts[task], ends[task] - starts[task]
        for i in range(count):
            rows[i] = x + (gather[start + i] if gathered else start + i) * x_step
        # What is packed is read again count / 6 times: from the nearest cache if that is often, else only the weight's
        # way from memory matters, which is shortest in the order in which it lies there.
        ahead = 0
        if count > FEW:
            block, part = 8 * width, DEPTH
        elif step_k == 1 and step_n != 1:
            block, part = width, DEPTH
            ahead = width * step_n * tag.itemsize  # the next panel: the processor does not see it coming
        else:
            block = min(-(-columns // width) * width, 32 * width)
            part = min(DEPTH, max(32, PACKED // block // 8 * 8))
        for first in range(0, columns, block):
            here = min(block, columns - first)
            target = out.ctypes.data + (start * columns + first) * size
            direct = target if depth <= part and bias.shape[0] == 0 else 0
            for k in range(0, depth, part):
                terms = min(part, depth - k)
                at = weight + (e * step_e + k * step_k + first * step_n) * tag.itemsize
                _pack(tag, out, at, step_k, step_n, terms, here, panels, ahead)
                _strips(count, here, k == 0, tile, direct, columns * size, rows, k * size, size, panels, terms)
            row = bias[places[task], first:] if bias.shape[0] > 0 else tile[0:0]
            for i in range(count):
                _finish(tile, out, i, count, here, row, direct, target + i * columns * size)


@njit(nogil=True, error_model="numpy")
def _copy_rows(tag, wide, source, step, gather, gathered, start, count, first, columns, target):
    """Copy columns of rows start … start + count − 1, widened, to panels of ``count`` lines, the last not padded."""
    width = LINE // wide.itemsize
    to = target.ctypes.data
    for r in range(count):
        at = source + ((gather[start + r] if gathered else start + r) * step + first) * tag.itemsize
        for p in range(columns // width):
            move_line(tag, wide, to + (p * count + r) * LINE, at + p * width * tag.itemsize)
        p = columns // width
        for n in range(columns % width):
            target[(p * count + r) * width + n] = read(tag, wide, at + (p * width + n) * tag.itemsize)


@njit(nogil=True, error_model="numpy", cache=True)
def outer(
    begin, end, experts, starts, ends, blocks, wide, left_tag, left, left_step, left_gather, left_gathered, right_tag,
    right, right_step, right_gather, right_gathered, n_left, n_right, out_tag, out, library=LIBRARY,
):  # fmt: skip
    """Write out[e] = Σ_r left_rᵀ right_r of tasks (expert, ``SIDE`` columns of left); matrices are addresses."""
    width, size = LINE // wide.itemsize, wide.itemsize
    panels, tile = aligned(wide, TERMS * 8 * width), aligned(wide, SIDE * 8 * width)
    packed, rows = aligned(wide, TERMS * SIDE), np.empty(SIDE, np.int64)
    panels[:] = 0.0
    for task in range(begin, end):
        e, start, last = experts[task], starts[task], ends[task]
        at = blocks[task] * SIDE
        count, pieces = min(SIDE, n_left - at), -(-(last - start) // TERMS)
        for first in range(0, n_right, 8 * width):
            here = min(8 * width, n_right - first)
            target = out + ((e * n_left + at) * n_right + first) * out_tag.itemsize
            direct = target if pieces == 1 and out_tag.dtype == wide.dtype else 0
            for piece in range(pieces):
                r = start + piece * (last - start) // pieces
                terms = start + (piece + 1) * (last - start) // pieces - r
                if first == 0 or pieces > 1:
                    _copy_rows(left_tag, wide, left, left_step, left_gather, left_gathered, r, terms, at, count, packed)
                    for i in range(count):
                        rows[i] = packed.ctypes.data + (i // width * terms * width + i % width) * size
                _copy_rows(
                    right_tag, wide, right, right_step, right_gather, right_gathered, r, terms, first, here, panels
                )
                _strips(count, here, piece == 0, tile, direct, n_right * size, rows, 0, LINE, panels, terms)
            for i in range(count):
                _finish(tile, out_tag, i, count, here, tile[0:0], direct, target + i * n_right * out_tag.itemsize)


@njit(nogil=True, error_model="numpy", cache=True)
def combine(begin, end, tag, rows, step, weights, inverse, n_kept, k, out, library=LIBRARY):
    """Write Σ_j w_tj rows[inverse_tj] to out[t], wide; an empty ``weights`` stands for ones."""
    width, columns = LINE // out.itemsize, out.shape[1]
    full = columns // width
    for t in range(begin, end):
        target = out.ctypes.data + t * columns * out.itemsize
        out[t, :] = 0.0
        for j in range(t * k, (t + 1) * k):
            if inverse[j] >= n_kept:
                continue
            factor = weights[j] if weights.shape[0] > 0 else out.dtype.type(1.0)
            source = rows + inverse[j] * step * tag.itemsize
            for p in range(full):
                add_line(tag, out, target + p * LINE, source + p * width * tag.itemsize, factor)
            for n in range(full * width, columns):
                out[t, n] += factor * read(tag, out, source + n * tag.itemsize)


@njit(nogil=True, error_model="numpy", cache=True)
def sums(
    begin, end, experts, starts, ends, tag, rows, step, gather, gathered, scale, wide, n, out_tag, out, library=LIBRARY
):
    """Write out[e] = Σ_r s_r rows[gather[r]] of groups begin … end − 1; an empty ``scale`` stands for ones."""
    width, one = LINE // wide.itemsize, wide.dtype.type(1.0)
    full = n // width
    part, total = aligned(wide, n + width), aligned(wide, n + width)
    for group in range(begin, end):
        total[:] = 0.0
        for first in range(starts[group], ends[group], DEPTH):
            part[:] = 0.0
            for r in range(first, min(first + DEPTH, ends[group])):
                factor = scale[r] if scale.shape[0] > 0 else one
                source = rows + (gather[r] if gathered else r) * step * tag.itemsize
                for p in range(full):
                    add_line(tag, wide, part.ctypes.data + p * LINE, source + p * width * tag.itemsize, factor)
                for i in range(full * width, n):
                    part[i] += factor * read(tag, wide, source + i * tag.itemsize)
            for i in range(n):
                total[i] += part[i]
        target = out + experts[group] * n * out_tag.itemsize
        for p in range(full):
            round_line(out_tag, wide, target + p * width * out_tag.itemsize, total.ctypes.data + p * LINE)
        for i in range(full * width, n):
            write(out_tag, target + i * out_tag.itemsize, total[i])
