"""LLVM's vectors for Numba: lines of 64 bytes loaded, converted, transposed, multiplied and stored.

What Numba's own loops leave to LLVM's judgement is explicit here: which lanes a sum has, and so its bits. Memory is
given by address; an array of the type in memory, the tag, says how to read it, and ``wide`` what is computed with.
bfloat16, which Numba does not know, has uint16 for a tag, float16 int16. Only the natural alignment is assumed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic

# Numba's annotations of what it compiles count the typing context among a call's arguments.
intrinsic: Any = _intrinsic

LINE = 64
"""Bytes of a vector."""

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_F32, _F64 = ir.FloatType(), ir.DoubleType()


def _like(value: Any, kind: Any, number: Any) -> Any:
    """Return a constant of the shape, scalar or vector, of ``value``."""
    if isinstance(value.type, ir.VectorType):
        return ir.Constant(ir.VectorType(kind, value.type.count), [number] * value.type.count)
    return ir.Constant(kind, number)


def _kind(value: Any, kind: Any) -> Any:
    return ir.VectorType(kind, value.type.count) if isinstance(value.type, ir.VectorType) else kind


def _stored(tag: Any) -> Any:
    """Return the LLVM type in memory of a tag array: uint16 stands for bfloat16, int16 for float16."""
    return {types.float32: _F32, types.float64: _F64, types.uint16: _I16, types.int16: _I16}[tag.dtype]


def _widen(builder: Any, value: Any, tag: Any) -> Any:
    """Exact conversion of loaded scalars or vectors to float32, or of float64 to itself."""
    if tag.dtype in (types.float32, types.float64):
        return value
    bits = builder.zext(value, _kind(value, _I32))

    def number(n: Any) -> Any:
        return _like(bits, _I32, n)

    if tag.dtype == types.uint16:
        return builder.bitcast(builder.shl(bits, number(16)), _kind(bits, _F32))
    # The exponent moves from a bias of 15 to 127; infinity and NaN move twice as far; a subnormal is its mantissa below
    # a leading one that is subtracted.
    sign = builder.shl(builder.and_(bits, number(0x8000)), number(16))
    magnitude = builder.shl(builder.and_(bits, number(0x7FFF)), number(13))
    moved = builder.add(magnitude, number(112 << 23))
    large = builder.icmp_unsigned(">=", magnitude, number(0x7C00 << 13))
    moved = builder.select(large, builder.add(moved, number(112 << 23)), moved)
    small = builder.bitcast(builder.add(moved, number(1 << 23)), _kind(bits, _F32))
    small = builder.bitcast(builder.fsub(small, _like(small, _F32, 2.0**-14)), _kind(bits, _I32))
    moved = builder.select(builder.icmp_unsigned("<", magnitude, number(0x400 << 13)), small, moved)
    return builder.bitcast(builder.or_(moved, sign), _kind(bits, _F32))


def _narrow(builder: Any, value: Any, tag: Any) -> Any:
    """Round float32 to the nearest of the tag's type, ties to even."""
    if tag.dtype in (types.float32, types.float64):
        return value
    bits = builder.bitcast(value, _kind(value, _I32))

    def number(n: Any) -> Any:
        return _like(bits, _I32, n)

    magnitude = builder.and_(bits, number(0x7FFFFFFF))
    nan = builder.icmp_unsigned(">", magnitude, number(0x7F800000))
    if tag.dtype == types.uint16:
        odd = builder.and_(builder.lshr(bits, number(16)), number(1))
        near = builder.lshr(builder.add(bits, builder.add(odd, number(0x7FFF))), number(16))
        return builder.trunc(builder.select(nan, number(0x7FC0), near), _kind(bits, _I16))
    sign = builder.lshr(builder.and_(bits, number(0x80000000)), number(16))
    odd = builder.and_(builder.lshr(magnitude, number(13)), number(1))
    near = builder.add(builder.add(magnitude, odd), number((0xFFF - (112 << 23)) & 0xFFFFFFFF))
    near = builder.lshr(near, number(13))
    # Added to ½, a number below 2⁻¹⁴ rounds to a multiple of 2⁻²⁴, the step of float16's subnormals.
    half = builder.fadd(builder.bitcast(magnitude, _kind(bits, _F32)), _like(value, _F32, 0.5))
    small = builder.sub(builder.bitcast(half, _kind(bits, _I32)), number(0x3F000000))
    near = builder.select(builder.icmp_unsigned("<", magnitude, number(0x38800000)), small, near)
    near = builder.select(builder.icmp_unsigned(">=", magnitude, number(0x47800000)), number(0x7C00), near)
    near = builder.select(nan, number(0x7E00), near)
    return builder.trunc(builder.or_(near, sign), _kind(bits, _I16))


def _load(builder: Any, address: Any, kind: Any, align: Any) -> Any:
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = align
    return value


def _store(builder: Any, value: Any, address: Any, align: Any) -> Any:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = align


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(a.type, [a.type] * 3),
        "llvm.fmuladd." + (f"v{a.type.count}" if isinstance(a.type, ir.VectorType) else "")
        + ("f32" if (a.type.element if isinstance(a.type, ir.VectorType) else a.type) == _F32 else "f64"),
    )  # fmt: skip
    return builder.call(function, [a, b, c])


def _prefetch(builder: Any, address: Any) -> Any:
    pointer = ir.IntType(8).as_pointer()
    kinds = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kinds, "llvm.prefetch.p0")
    builder.call(function, [builder.inttoptr(address, pointer), _I32(0), _I32(2), _I32(1)])


def _size(kind: Any) -> Any:
    return {_F32: 4, _F64: 8, _I16: 2}[kind]


def _splat(builder: Any, scalar: Any, count: Any) -> Any:
    vector = ir.VectorType(scalar.type, count)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(_I32, 0))
    zeros = ir.Constant(ir.VectorType(_I32, count), [0] * count)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)


def _micro(height: Any) -> Any:
    """Build tile[i, :] += Σ_k a_i[k] · panel[k, :] for ``height`` rows i."""

    @intrinsic
    def micro(
        typingctx: Any,
        wide: Any,
        fresh: Any,
        tile: Any,
        tile_step: Any,
        addresses: Any,
        skip: Any,
        step: Any,
        panel: Any,
        depth: Any,
    ) -> Any:
        """``addresses`` points at the rows' addresses; a_i[k] is at that + skip + k · step; fresh: = instead of +=."""

        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = _stored(signature.args[0])
            count = LINE // _size(kind)
            vector = ir.VectorType(kind, count)
            fresh, tile, tile_step, rows, skip, step, panel, depth = args[1:]
            base = [builder.add(_load(builder, builder.add(rows, _I64(8 * i)), _I64, 8), skip) for i in range(height)]
            sums = [cgutils.alloca_once_value(builder, ir.Constant(vector, [0.0] * count)) for _ in range(height)]
            for place in sums:
                builder.store(ir.Constant(vector, [0.0] * count), place)
            with cgutils.for_range(builder, depth) as loop:
                line = _load(builder, builder.add(panel, builder.mul(loop.index, _I64(LINE))), vector, _size(kind))
                at = builder.mul(loop.index, step)
                for i in range(height):
                    a = _load(builder, builder.add(base[i], at), kind, _size(kind))
                    total = _multiply_add(builder, _splat(builder, a, count), line, builder.load(sums[i]))
                    builder.store(total, sums[i])
            with builder.if_else(builder.icmp_unsigned("!=", fresh, _I64(0))) as branches:
                for branch, adds in zip(branches, (False, True), strict=True):
                    with branch:
                        for i in range(height):
                            address, total = builder.add(tile, builder.mul(tile_step, _I64(i))), builder.load(sums[i])
                            if adds:
                                total = builder.fadd(_load(builder, address, vector, _size(kind)), total)
                            _store(builder, total, address, _size(kind))
            return context.get_dummy_value()

        return types.void(wide, *[types.int64] * 8), code

    return micro


micro1, micro2, micro3, micro4, micro5, micro6 = (_micro(height) for height in range(1, 7))


@intrinsic
def move_line(typingctx: Any, tag: Any, wide: Any, target: Any, source: Any) -> Any:
    """Copy a line from ``source``, of the tag's type, to ``target``, widened."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = _stored(signature.args[0])
        count = LINE // _size(_stored(signature.args[1]))
        value = _load(builder, args[3], ir.VectorType(kind, count), _size(kind))
        _store(builder, _widen(builder, value, signature.args[0]), args[2], _size(_stored(signature.args[1])))
        return context.get_dummy_value()

    return types.void(tag, wide, types.int64, types.int64), code


@intrinsic
def round_line(typingctx: Any, tag: Any, wide: Any, target: Any, source: Any) -> Any:
    """Copy a panel's row, rounded to the tag's type."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = _stored(signature.args[1])
        value = _load(builder, args[3], ir.VectorType(wide, LINE // _size(wide)), _size(wide))
        value = _narrow(builder, value, signature.args[0])
        _store(builder, value, args[2], _size(_stored(signature.args[0])))
        return context.get_dummy_value()

    return types.void(tag, wide, types.int64, types.int64), code


@intrinsic
def add_line(typingctx: Any, tag: Any, wide: Any, target: Any, source: Any, factor: Any) -> Any:
    """Add ``factor`` times a line of the tag's type to a wide one."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind, wide = _stored(signature.args[0]), _stored(signature.args[1])
        count = LINE // _size(wide)
        value = _load(builder, args[3], ir.VectorType(kind, count), _size(kind))
        total = _load(builder, args[2], ir.VectorType(wide, count), _size(wide))
        value = _widen(builder, value, signature.args[0])
        total = _multiply_add(builder, _splat(builder, args[4], count), value, total)
        _store(builder, total, args[2], _size(wide))
        return context.get_dummy_value()

    return types.void(tag, wide, types.int64, types.int64, wide.dtype), code


@intrinsic
def dot_lines(typingctx: Any, tag: Any, wide: Any, a: Any, b: Any, count: Any) -> Any:
    """Return the dot product of ``count`` lines, a wide and b of the tag's type."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind, wide = _stored(signature.args[0]), _stored(signature.args[1])
        lanes = LINE // _size(wide)
        zero = ir.Constant(ir.VectorType(wide, lanes), [0.0] * lanes)
        total = cgutils.alloca_once(builder, zero.type)
        builder.store(zero, total)
        with cgutils.for_range(builder, args[4]) as loop:
            at = builder.add(args[2], builder.mul(loop.index, _I64(LINE)))
            other = builder.add(args[3], builder.mul(loop.index, _I64(lanes * _size(kind))))
            left = _load(builder, at, zero.type, _size(wide))
            right = _widen(builder, _load(builder, other, ir.VectorType(kind, lanes), _size(kind)), signature.args[0])
            builder.store(_multiply_add(builder, left, right, builder.load(total)), total)
        found = builder.load(total)
        while lanes > 1:
            lanes //= 2
            halves = [
                builder.shuffle_vector(found, found, ir.Constant(ir.VectorType(_I32, lanes), list(range(i, i + lanes))))
                for i in (0, lanes)
            ]
            found = builder.fadd(*halves)
        return builder.extract_element(found, _I32(0))

    return wide.dtype(tag, wide, types.int64, types.int64, types.int64), code


@intrinsic
def turn_block(
    typingctx: Any, tag: Any, wide: Any, target: Any, target_step: Any, source: Any, step: Any, ahead: Any
) -> Any:
    """Transpose 8 × 8: row i from source + i · step, widened, to column i at target, rows target_step apart.

    What lies ``ahead`` of the source is brought into cache, if it is there at all.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = _stored(signature.args[0])
        size = _size(_stored(signature.args[1]))
        target, target_step, source, step, ahead = args[2:]
        rows = []
        for i in range(8):
            address = builder.add(source, builder.mul(step, _I64(i)))
            _prefetch(builder, builder.add(address, ahead))
            value = _load(builder, address, ir.VectorType(kind, 8), _size(kind))
            rows.append(_widen(builder, value, signature.args[0]))
        for s in (4, 2, 1):
            low = ir.Constant(ir.VectorType(_I32, 8), [lane if not lane & s else 8 + lane - s for lane in range(8)])
            high = ir.Constant(ir.VectorType(_I32, 8), [lane + s if not lane & s else 8 + lane for lane in range(8)])
            for i in range(8):
                if not i & s:
                    a, b = rows[i], rows[i + s]
                    rows[i], rows[i + s] = builder.shuffle_vector(a, b, low), builder.shuffle_vector(a, b, high)
        for i in range(8):
            _store(builder, rows[i], builder.add(target, builder.mul(target_step, _I64(i))), size)
        return context.get_dummy_value()

    return types.void(tag, wide, *[types.int64] * 5), code


@intrinsic
def read(typingctx: Any, tag: Any, wide: Any, source: Any) -> Any:
    """Return one number of the tag's type, widened."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = _stored(signature.args[0])
        return _widen(builder, _load(builder, args[2], kind, _size(kind)), signature.args[0])

    return wide.dtype(tag, wide, types.int64), code


@intrinsic
def write(typingctx: Any, tag: Any, target: Any, value: Any) -> Any:
    """Store one wide number, rounded to the tag's type."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = _stored(signature.args[0])
        _store(builder, _narrow(builder, args[2], signature.args[0]), args[1], _size(kind))
        return context.get_dummy_value()

    return types.void(tag, types.int64, value), code


@njit(nogil=True, error_model="numpy")
def aligned(wide, size):
    """Return an uninitialised array that starts on a cache line."""
    raw = np.empty(size + LINE // wide.itemsize, wide.dtype)
    first = (-(raw.ctypes.data // wide.itemsize)) % (LINE // wide.itemsize)
    return raw[first : first + size]
