"""LLVM's vectors for panels of 16 features: what happens to a line of float32 between the matrix products of a step.

Lanes are features, a line belongs to one sample or place; arguments are addresses but for counts. No sum is across
lanes, so its bits depend on nothing but the order of lines.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from moesaic.kernels.vectors_cpu import _F32, _I64, LINE, _load, _multiply_add, _prefetch, _splat, _store, intrinsic

_LANES = LINE // 4
_VECTOR = ir.VectorType(_F32, _LANES)
_ZERO = ir.Constant(_VECTOR, [0.0] * _LANES)
_NARROW = (1, 2, 4, 8)


def _line(builder: Any, base: Any, index: Any) -> Any:
    return builder.add(base, builder.mul(index, _I64(LINE)))


def _get(builder: Any, address: Any) -> Any:
    return _load(builder, address, _VECTOR, 4)


def _rectified(builder: Any, value: Any) -> tuple[Any, Any]:
    """Return value > 0 and ReLU(value); a NaN passes both."""
    above = builder.fcmp_unordered(">", value, _ZERO)
    return above, builder.select(above, value, _ZERO)


def _row(builder: Any, whose: Any, weigh: Any, index: Any) -> tuple[Any, Any]:
    """Return the sample of a place and its weight in all lanes."""
    sample = _load(builder, builder.add(whose, builder.mul(index, _I64(8))), _I64, 8)
    weight = _load(builder, builder.add(weigh, builder.mul(index, _I64(4))), _F32, 4)
    return sample, _splat(builder, weight, _LANES)


@intrinsic
def fetch(typingctx: Any, address: Any, size: Any) -> Any:
    """Bring ``size`` bytes into the cache."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        with cgutils.for_range(builder, builder.udiv(builder.add(args[1], _I64(LINE - 1)), _I64(LINE))) as loop:
            _prefetch(builder, _line(builder, args[0], loop.index))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), code


def _outputs(adds: bool) -> Any:
    """Build z_a += bias, then out[whose_a] = w_a ReLU(z_a), or += if it ``adds``."""

    @intrinsic
    def outputs(typingctx: Any, count: Any, z: Any, bias: Any, whose: Any, weigh: Any, out: Any) -> Any:
        """Of ``count`` places a: z (count, 16), bias (16), out (B, 16)."""

        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            count, z, bias, whose, weigh, out = args
            bias = _get(builder, bias)
            with cgutils.for_range(builder, count) as loop:
                sample, weight = _row(builder, whose, weigh, loop.index)
                value = builder.fadd(_get(builder, _line(builder, z, loop.index)), bias)
                _store(builder, value, _line(builder, z, loop.index), 4)
                target = _line(builder, out, sample)
                weighed = builder.fmul(weight, _rectified(builder, value)[1])
                _store(builder, builder.fadd(weighed, _get(builder, target)) if adds else weighed, target, 4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), code

    return outputs


set_outputs, add_outputs = _outputs(adds=False), _outputs(adds=True)


@intrinsic
def residuals(typingctx: Any, count: Any, out: Any, factor: Any, squares: Any) -> Any:
    """For ``count`` samples b: squares = Σ_b out_b², out_b *= factor."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        count, out, factor, squares = args
        factor, total = _get(builder, factor), cgutils.alloca_once_value(builder, _ZERO)
        builder.store(_ZERO, total)
        with cgutils.for_range(builder, count) as loop:
            at = _line(builder, out, loop.index)
            error = _get(builder, at)
            builder.store(_multiply_add(builder, error, error, builder.load(total)), total)
            _store(builder, builder.fmul(error, factor), at, 4)
        _store(builder, builder.load(total), squares, 4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), code


@intrinsic
def slopes(
    typingctx: Any, count: Any, z: Any, whose: Any, weigh: Any, out: Any, dgates: Any, db: Any
) -> Any:  # fmt: skip
    """For ``count`` places a, r = out[whose_a]: dgates_a += r ReLU(z_a), z_a = r w_a 1[z_a > 0]; db = Σ_a z_a."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        count, z, whose, weigh, out, dgates, db = args
        total = cgutils.alloca_once_value(builder, _ZERO)
        builder.store(_ZERO, total)
        with cgutils.for_range(builder, count) as loop:
            sample, weight = _row(builder, whose, weigh, loop.index)
            at, gate = _line(builder, z, loop.index), _line(builder, dgates, loop.index)
            residual = _get(builder, _line(builder, out, sample))
            above, positive = _rectified(builder, _get(builder, at))
            _store(builder, _multiply_add(builder, residual, positive, _get(builder, gate)), gate, 4)
            slope = builder.select(above, builder.fmul(residual, weight), _ZERO)
            _store(builder, slope, at, 4)
            builder.store(builder.fadd(builder.load(total), slope), total)
        _store(builder, builder.load(total), db, 4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), code


def _joined_rows(builder: Any, base: Any, step: Any, first: int, rows: int, width: int) -> Any:
    """Return a line of ``rows`` rows' first ``width`` numbers, one after the other."""
    part = ir.VectorType(_F32, width)
    parts = [_load(builder, builder.add(base, builder.mul(step, _I64(first + i))), part, 4) for i in range(rows)]
    while len(parts) > 1:
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), 2 * width), list(range(2 * width)))
        parts = [builder.shuffle_vector(a, b, lanes) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        width *= 2
    return parts[0]


def _spread(width: int) -> Any:
    """Build dh_a[s, j] += Σ_q g_a[q·S + s] · d[q·S + s, j] for ``width`` columns j and S = 16 / width features s."""
    features = _LANES // width

    @intrinsic
    def spread(typingctx: Any, count: Any, g: Any, d: Any, step: Any, dh: Any) -> Any:
        """For g (count, 16), rows of d ``step`` bytes apart, dh (count, 16): S sums of ``width`` columns in a line."""

        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            count, g, d, step, dh = args
            lines = [_joined_rows(builder, d, step, q * features, features, width) for q in range(width)]
            with cgutils.for_range(builder, count) as loop:
                slope, at = _get(builder, _line(builder, g, loop.index)), _line(builder, dh, loop.index)
                total = _get(builder, at)
                for q, line in enumerate(lines):
                    lanes = [q * features + lane // width for lane in range(_LANES)]
                    mask = ir.Constant(ir.VectorType(ir.IntType(32), _LANES), lanes)
                    total = _multiply_add(builder, builder.shuffle_vector(slope, slope, mask), line, total)
                _store(builder, total, at, 4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), code

    return spread


spread1, spread2, spread4, spread8 = (_spread(width) for width in _NARROW)


def _decode(width: int) -> Any:
    """Build z_a = Σ_j h_aj d_j of ``width`` terms."""

    @intrinsic
    def decode(typingctx: Any, count: Any, h: Any, d: Any, z: Any) -> Any:
        """For h (count, width), d (width, 16), z (count, 16)."""

        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            count, h, d, z = args
            lines = [_get(builder, builder.add(d, _I64(j * LINE))) for j in range(width)]
            with cgutils.for_range(builder, count) as loop:
                row, total = builder.add(h, builder.mul(loop.index, _I64(4 * width))), _ZERO
                for j, line in enumerate(lines):
                    term = _splat(builder, _load(builder, builder.add(row, _I64(4 * j)), _F32, 4), _LANES)
                    total = _multiply_add(builder, term, line, total)
                _store(builder, total, _line(builder, z, loop.index), 4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), code

    return decode


def _outer(width: int) -> Any:
    """Build dd_j = Σ_a h_aj g_a of ``width`` lines."""

    @intrinsic
    def outer(typingctx: Any, count: Any, h: Any, g: Any, dd: Any) -> Any:
        """For h (count, width), g (count, 16), dd (width, 16)."""

        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            count, h, g, dd = args
            totals = [cgutils.alloca_once_value(builder, _ZERO) for _ in range(width)]
            for total in totals:
                builder.store(_ZERO, total)
            with cgutils.for_range(builder, count) as loop:
                row = builder.add(h, builder.mul(loop.index, _I64(4 * width)))
                slope = _get(builder, _line(builder, g, loop.index))
                for j, total in enumerate(totals):
                    term = _splat(builder, _load(builder, builder.add(row, _I64(4 * j)), _F32, 4), _LANES)
                    builder.store(_multiply_add(builder, term, slope, builder.load(total)), total)
            for j, total in enumerate(totals):
                _store(builder, builder.load(total), builder.add(dd, _I64(j * LINE)), 4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), code

    return outer


decode1, decode2, decode4, decode8 = (_decode(width) for width in _NARROW)
outer1, outer2, outer4, outer8 = (_outer(width) for width in _NARROW)
