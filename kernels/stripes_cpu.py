"""CPU twin of the exact step of a toy model with very many features, in Numba: 16 features at a time.

For a panel of 16 features, whose rows of the table are copied out and back once:

    z_e = h_e D_eᵀ + b_e  (places × 16)      x' = [ReLU(z_0)] + Σ_e w_e ReLU(z_e)      r = 2 scale I (x' − x)
    G_e = r w_e 1[z_e > 0],   dgate += ⟨r, ReLU(z_e)⟩,   dh_e += G_e D_e,   dD_e = G_eᵀ h_e,   then AdamW

Everything but the rows stays in a core's caches, however many features there are. Work is cut into a fixed number of
parts and their sums are joined in order, so that bits depend on neither threads nor addresses.
"""

from __future__ import annotations

import numpy as np
from numba import get_num_threads as get_num_threads
from numba import njit

from moesaic.kernels._extras import LIBRARY
from moesaic.kernels.grouped_cpu import _pack, _strips
from moesaic.kernels.panel_cpu import (
    add_outputs,
    decode1,
    decode2,
    decode4,
    decode8,
    fetch,
    outer1,
    outer2,
    outer4,
    outer8,
    residuals,
    set_outputs,
    slopes,
    spread1,
    spread2,
    spread4,
    spread8,
)  # fmt: skip
from moesaic.kernels.vectors_cpu import LINE, aligned, turn_block

PANEL = 16
"""Features of a panel: a line of float32."""
LINEWISE = {"contract"}


@njit(nogil=True, error_model="numpy", inline="always")
def _address(array):
    """Where an array begins, as a signed number: unsigned and signed ones would add up to a float."""
    return np.int64(array.ctypes.data)


@njit(nogil=True, error_model="numpy", inline="always")
def fmix(word):
    """Murmur3's finaliser of 32 bits."""
    word ^= word >> np.uint32(16)
    word = np.uint32(word * np.uint32(0x85EBCA6B))
    word ^= word >> np.uint32(13)
    word = np.uint32(word * np.uint32(0xC2B2AE35))
    return np.uint32(word ^ (word >> np.uint32(16)))


@njit(nogil=True, error_model="numpy")
def _round_bf16(values):
    """Round a contiguous float32 array to the nearest bfloat16 values, ties to even; NaN stays NaN."""
    bits = values.view(np.uint32)
    for i in range(bits.shape[0]):
        word = bits[i]
        near = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
        quiet = np.uint32(0x7FC00000)
        bits[i] = quiet if (word & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000) else near


@njit(nogil=True, error_model="numpy", fastmath=LINEWISE)
def _adamw(theta, grad, avg, sq, adam):
    """AdamW by the factors of `AdamStep`: β₁, β₂, eps, keep, step size, root."""
    one1, b2, one2 = np.float32(1.0 - adam[0]), np.float32(adam[1]), np.float32(1.0 - adam[1])
    small, keep, size, root = np.float32(adam[2]), np.float32(adam[3]), np.float32(adam[4]), np.float32(adam[5])
    for c in range(grad.shape[0]):
        g = grad[c]
        avg[c] += one1 * (g - avg[c])
        sq[c] = b2 * sq[c] + one2 * g * g
        theta[c] = theta[c] * keep - size * avg[c] / (np.sqrt(sq[c]) * root + small)


@njit(nogil=True, error_model="numpy")
def _widened(bits, out):
    """Read bfloat16 bits as float32."""
    wide = out.view(np.uint32)
    for c in range(out.shape[0]):
        wide[c] = np.uint32(bits[c]) << np.uint32(16)


@njit(nogil=True, error_model="numpy")
def _narrowed(values, bits, first, key, salt):
    """Round to bfloat16 stochastically, by a hash of the element's number in the table: v would stall otherwise."""
    words = values.view(np.uint32)
    for c in range(words.shape[0]):
        at = np.uint64(first + c)
        low, high = np.uint32(at & np.uint64(0xFFFFFFFF)), np.uint32(at >> np.uint64(32))
        noise = fmix(fmix(low ^ fmix(high ^ key)) ^ salt) & np.uint32(0xFFFF)
        word = words[c]
        finite = (word & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
        bits[c] = np.uint16((word + noise if finite else word) >> np.uint32(16))


@njit(nogil=True, error_model="numpy")
def _update(first, rows, table, grad, avg, sq, avg16, sq16, key, scratch, adam):
    """AdamW on consecutive rows; moments are avg and sq, or the bfloat16 bits avg16 and sq16 where those are empty.

    ``grad`` is theirs, flat and, like the padding of the table, zero where there is no parameter.
    """
    theta, size = table[first : first + rows].reshape(-1), rows * table.shape[1]
    if avg.shape[0] > 0:
        _adamw(theta, grad, avg[first : first + rows].reshape(-1), sq[first : first + rows].reshape(-1), adam)
        return
    bits, square_bits = avg16[first : first + rows].reshape(-1), sq16[first : first + rows].reshape(-1)
    _widened(bits, scratch[0, :size])
    _widened(square_bits, scratch[1, :size])
    _adamw(theta, grad, scratch[0, :size], scratch[1, :size], adam)
    _narrowed(scratch[0, :size], bits, first * table.shape[1], key, np.uint32(0))
    _narrowed(scratch[1, :size], square_bits, first * table.shape[1], key, np.uint32(0x9E3779B9))


@njit(nogil=True, error_model="numpy", inline="always")
def _is_narrow(width):
    """Whether lines of dh hold several sums of ``width`` columns."""
    return width == 1 or width == 2 or width == 4 or width == 8


@njit(nogil=True, error_model="numpy")
def _spread(width, count, g, d, step, dh):
    if width == 1:
        spread1(count, g, d, step, dh)
    elif width == 2:
        spread2(count, g, d, step, dh)
    elif width == 4:
        spread4(count, g, d, step, dh)
    else:
        spread8(count, g, d, step, dh)


@njit(nogil=True, error_model="numpy")
def _decode(width, count, h, d, z):
    if width == 1:
        decode1(count, h, d, z)
    elif width == 2:
        decode2(count, h, d, z)
    elif width == 4:
        decode4(count, h, d, z)
    else:
        decode8(count, h, d, z)


@njit(nogil=True, error_model="numpy")
def _outer(width, count, h, g, dd):
    if width == 1:
        outer1(count, h, g, dd)
    elif width == 2:
        outer2(count, h, g, dd)
    elif width == 4:
        outer4(count, h, g, dd)
    else:
        outer8(count, h, g, dd)


@njit(nogil=True, error_model="numpy")
def _outputs(adds, count, z, bias, whose, weigh, out):
    if adds:
        add_outputs(count, z, bias, whose, weigh, out)
    else:
        set_outputs(count, z, bias, whose, weigh, out)


@njit(nogil=True, error_model="numpy")
def _packed(tile, source, step_k, step_n, depth, columns, panels):
    _pack(tile, tile, source, step_k, step_n, depth, columns, panels, np.int64(0))


@njit(nogil=True, error_model="numpy")
def _product(count, columns, fresh, tile, to, to_step, rows, skip, step, panels, depth):
    _strips(count, columns, fresh, tile, to, to_step, rows, skip, step, panels, depth)


@njit(nogil=True, error_model="numpy")
def _turn(tile, turned, first, depth, grad, column):
    """Copy rows first … first + depth − 1 of ``turned`` (…, 16) to columns of ``grad`` (16, …)."""
    target, width = _address(grad) + 4 * column, 4 * grad.shape[1]
    for j in range(0, depth // 8 * 8, 8):
        for i in range(0, PANEL, 8):
            source = _address(turned) + (first + j) * LINE + 4 * i
            turn_block(tile, tile, target + i * width + 4 * j, width, source, LINE, 0)
    for j in range(depth // 8 * 8, depth):
        for i in range(PANEL):
            grad[i, column + j] = turned[first + j, i]


@njit(nogil=True, error_model="numpy")
def _addresses(array, rows, step):
    base = _address(array)
    found = np.empty(rows, np.int64)
    for i in range(rows):
        found[i] = base + i * step
    return found


@njit(nogil=True, error_model="numpy", cache=True)
def sweep(
    begin, end, listed, features, starts, entries, values,
    table, avg, sq, avg16, sq16, key, columns, importance, twice, adam, updates, rounds,
    h, h0, offsets, samples, gates, everyone, ones, dh, dh0, dgates, totals,
    places, final_dh, final_dh0, dlogits, library=LIBRARY,
):  # fmt: skip
    """Panels begin … end − 1 of the features, or, if ``listed``, of those that are present in the batch.

    columns: first columns of encoder, decoder, shared encoder and decoder, bias (the shared expert's behind the
    others') and router in a row, −1 where there are none. A line of dh whose width is 1, 2, 4 or 8 has 16 / width sums.
    Unlisted: adds to dh, dh0, dgates and totals, and updates the rows whose features are absent. Listed: updates the
    present features' rows with their whole gradient, from final_dh, final_dh0 and dlogits.
    """
    n, stride = table.shape
    n_experts, m, m0, batch = offsets.shape[0] - 1, h.shape[1], h0.shape[1], everyone.shape[0]
    n_places, shared = samples.shape[0], m0 > 0
    encoder, decoder, shared_encoder, shared_decoder, bias, router = columns
    # The shared expert is one more group, of all samples.
    n_groups, widest = n_experts + shared, max(m, m0)
    # Spare lines behind each: tiles are whole lines.
    tile = aligned(importance, PANEL * PANEL)
    wide = n_experts * m
    decoders = aligned(importance, (wide + m0) * PANEL)
    panels = aligned(importance, PANEL * (-(-widest // PANEL) + 1) * PANEL)
    z = aligned(importance, (n_places + 1) * PANEL).reshape(-1, PANEL)[:n_places]
    z0 = aligned(importance, (batch + 1) * PANEL).reshape(-1, PANEL)[: batch if shared else 0]
    out = aligned(importance, (batch + 1) * PANEL).reshape(-1, PANEL)[:batch]
    turned = aligned(importance, (wide + m0) * PANEL).reshape(wide + m0, PANEL)
    lanes = aligned(importance, 3 * PANEL).reshape(3, PANEL)
    rows, used = np.zeros((PANEL, stride), np.float32), np.zeros((PANEL, stride), np.float32)
    grad, scratch = np.zeros((PANEL, stride), np.float32), np.empty((2, PANEL * stride), np.float32)
    biases, db = aligned(importance, n_groups * PANEL), np.zeros((n_groups, PANEL), np.float32)
    ids, first_entry, last_entry = np.zeros(PANEL, np.int64), np.zeros(PANEL, np.int64), np.zeros(PANEL, np.int64)
    total = np.zeros(PANEL, np.float64)
    h_rows, h_turned = _addresses(h, n_places, 4 * m), _addresses(h, m, 4)
    h0_rows, h0_turned = _addresses(h0, batch if shared else 0, 4 * m0), _addresses(h0, m0, 4)
    z_rows, z0_rows = _addresses(z, n_places, LINE), _addresses(z0, z0.shape[0], LINE)
    several = n_places != batch or shared
    at = np.searchsorted(features, begin * PANEL) if not listed else 0
    # Constants of one type: Numba would compile what is called with them again for each.
    zero, one, four, lane, line = np.int64(0), np.int64(1), np.int64(4), np.int64(PANEL), np.int64(LINE)
    for panel in range(begin, end):
        first = panel * PANEL
        count = min(PANEL, (features.shape[0] if listed else n) - first)
        present = 0
        for i in range(count):
            ids[i] = features[first + i] if listed else first + i
            found = listed or (at < features.shape[0] and features[at] == ids[i])
            place = first + i if listed else at
            first_entry[i] = starts[place] if found else 0
            last_entry[i] = starts[place + 1] if found else 0
            present += found
            at += found
            rows[i] = table[ids[i]]
        for i in range(count, PANEL):
            rows[i] = 0.0
        if not listed:
            # The moments are needed last, and the next panel's weights soon after.
            for moment in (avg, sq):
                if updates and moment.shape[0] > 0:
                    fetch(_address(moment) + 4 * first * stride, 4 * count * stride)
            if first + 2 * PANEL <= n:
                fetch(_address(table) + 4 * (first + PANEL) * stride, 4 * PANEL * stride)
        for i in range(PANEL):
            lanes[0, i] = importance[ids[i]] if i < count else 0.0
            lanes[1, i] = twice * lanes[0, i]
        _packed(tile, _address(rows) + 4 * bias, one, stride, n_groups, lane, biases)
        if rounds:
            used[:] = rows
            _round_bf16(used.reshape(-1))
        weights = used if rounds else rows

        _packed(tile, _address(weights) + 4 * decoder, one, stride, wide, lane, decoders)
        if shared:
            _packed(tile, _address(weights) + 4 * shared_decoder, one, stride, m0, lane, decoders[wide * PANEL :])
        if several:
            out[:] = 0.0
        for g in range(n_groups):
            routed = g < n_experts
            start, stop = (offsets[g], offsets[g + 1]) if routed else (0, batch)
            if stop > start:
                column, depth = (decoder + g * m, m) if routed else (shared_decoder, m0)
                lines, sources = (z, h_rows) if routed else (z0, h0_rows)
                lines_d = decoders[(column - decoder if routed else wide) * PANEL :]
                if _is_narrow(depth):
                    _decode(depth, stop - start, sources[start], _address(lines_d), _address(lines) + start * LINE)
                else:
                    _product(
                        stop - start, lane, one, tile, _address(lines) + start * LINE, line, sources[start:stop], zero,
                        four, lines_d, depth,
                    )  # fmt: skip
                whose, weigh = (samples, gates) if routed else (everyone, ones)
                _outputs(
                    several, stop - start, _address(lines) + start * LINE, _address(biases) + g * LINE,
                    _address(whose) + 8 * start, _address(weigh) + 4 * start, _address(out),
                )  # fmt: skip
        for i in range(count):
            for j in range(first_entry[i], last_entry[i]):
                out[entries[j], i] -= values[j]
        residuals(batch, _address(out), lanes[1].ctypes.data, lanes[2].ctypes.data)
        for i in range(PANEL):
            total[i] += np.float64(lanes[0, i]) * np.float64(lanes[2, i])

        learns = updates and (listed or present < count)
        if listed:
            grad[:] = 0.0
        for g in range(n_groups):
            routed = g < n_experts
            start, stop = (offsets[g], offsets[g + 1]) if routed else (0, batch)
            if stop == start:
                db[g] = 0.0
                if routed:
                    turned[g * m : (g + 1) * m] = 0.0
                continue
            column, depth = (decoder + g * m, m) if routed else (shared_decoder, m0)
            lines, sources = (z, z_rows) if routed else (z0, z0_rows)
            whose, weigh = (samples, gates) if routed else (everyone, ones)
            first_line = start if routed else n_places
            slopes(
                stop - start, _address(lines) + start * LINE, _address(whose) + 8 * start,
                _address(weigh) + 4 * start, _address(out), _address(dgates) + first_line * LINE,
                _address(db[g]),
            )  # fmt: skip
            if rounds:
                _round_bf16(lines[start:stop].reshape(-1))
            target = dh if routed else dh0
            if not listed and _is_narrow(depth):
                _spread(
                    depth, stop - start, _address(lines) + start * LINE, _address(weights) + 4 * column, 4 * stride,
                    _address(target) + start * LINE,
                )  # fmt: skip
            elif not listed:
                _packed(tile, _address(weights) + 4 * column, stride, one, lane, depth, panels)
                _product(
                    stop - start, target.shape[1], zero, tile, _address(target) + 4 * start * target.shape[1],
                    4 * target.shape[1], sources[start:stop], zero, four, panels, lane,
                )  # fmt: skip
            if learns and _is_narrow(depth):
                first_row = column - decoder if routed else wide
                _outer(
                    depth, stop - start, h_rows[start] if routed else h0_rows[start], _address(lines) + start * LINE,
                    _address(turned) + first_row * LINE,
                )  # fmt: skip
            elif learns:
                _product(
                    depth, lane, one, tile, _address(turned) + (column - decoder if routed else wide) * LINE, line,
                    h_turned if routed else h0_turned, 4 * start * depth, 4 * depth, lines[start:stop].reshape(-1),
                    stop - start,
                )  # fmt: skip
        if not learns:
            continue
        _turn(tile, turned, zero, wide, grad, decoder)
        if shared:
            _turn(tile, turned, wide, m0, grad, shared_decoder)

        for i in range(count):
            for g in range(n_groups):
                grad[i, bias + g] = db[g, i]
        if listed:
            for i in range(count):
                for j in range(first_entry[i], last_entry[i]):
                    b, x = entries[j], values[j]
                    for slot in range(places.shape[1]):
                        place = places[b, slot]
                        e = np.searchsorted(offsets, place, side="right") - 1
                        for c in range(m):
                            grad[i, encoder + e * m + c] += x * final_dh[place, c]
                    for c in range(m0):
                        grad[i, shared_encoder + c] += x * final_dh0[b, c]
                    for c in range(dlogits.shape[1]):
                        grad[i, router + c] += x * dlogits[b, c]
                _update(ids[i], one, table, grad[i], avg, sq, avg16, sq16, key, scratch, adam)
            continue
        # Absent features that are neighbours are updated at once.
        i = 0
        while i < count:
            run = i
            while run < count and last_entry[run] == first_entry[run]:
                run += 1
            if run > i:
                _update(
                    first + i, run - i, table, grad[i:run].reshape(-1), avg, sq, avg16, sq16, key, scratch, adam
                )  # fmt: skip
            i = run + 1
    totals[:] += total
