"""Activations as integers: blocks of `step` values that share a scale, each value cut into bytes.

    3 digits   X = rint(x / 2**e), less than 127 * 2**16 in magnitude: X = 2**16 X0 + 2**8 X1 + X2, -128 <= Xi <= 127
    1 digit    X = rint(127 x / max |x|)                               (ggml's Q8_1 has the same scale)

Three digits hold a float32 to 2**-23 of the block's largest, about what a float32 sum of the block's products would
lose; dividing by a power of two loses nothing. A block with an infinity or a NaN becomes NaN. A row's record of it:

    | digit 0: step bytes | digit 1 | digit 2 | scale: float32 | sum of x: float32 | -offset * sums of Xi: 3 int32 |

The last are what sums of products with `code` instead of code - offset begin with. Records are padded to 16 bytes.
A few rows have their records row by row; many have them in tiles, so that a kernel finds a step's rows side by side, at
constant distances, and a tile's steps one after another:

    [tile of sixteen rows][step][row of the tile] record
"""

from __future__ import annotations

from functools import cache

from llvmlite import ir

from tinyllm.backends.cpu_kernels.deferred import types
from tinyllm.backends.cpu_kernels.jit import Kernel
from tinyllm.backends.cpu_kernels.simd import (
    F32,
    I32,
    LANES,
    V8,
    V32,
    VF,
    Builder,
    Value,
    const_vec,
    emit_load,
    emit_reduce,
    emit_splat,
    instruction,
    pointer,
)

__all__ = ["TILE_ROWS", "quantise_kernel", "record_nbytes", "row_nbytes", "scale_at", "tile_nbytes"]

TILE_ROWS = 16

i64 = types.int64


def scale_at(digits: int, step: int) -> int:
    """Where a record has its scale; the sum follows, then the first sums."""
    return digits * step


def record_nbytes(digits: int, step: int) -> int:
    return -(-(scale_at(digits, step) + 8 + 4 * digits) // 16) * 16


def row_nbytes(digits: int, step: int, in_features: int) -> int:
    """Bytes from one of few rows to the next: an odd number of cache lines, so that their sets in a cache differ."""
    lines = -(-in_features // step * record_nbytes(digits, step) // 64)
    return 64 * (lines | 1)


def tile_nbytes(digits: int, step: int, in_features: int) -> int:
    """Bytes of a tile of rows."""
    return -(-in_features // step) * TILE_ROWS * record_nbytes(digits, step)


def _i32(value: int) -> Value:
    return ir.Constant(I32, value)


def _call(b: Builder, name: str, x: Value) -> Value:
    function = b.module.globals.get(name)
    if function is None:
        function = ir.Function(b.module, ir.FunctionType(x.type, [x.type]), name)
    return b.call(function, [x])


def _power_of_two(b: Builder, top: Value) -> tuple[Value, Value]:
    """2**e and 2**-e for three digits, from the bits of max |x|: 63.5 * 2**16 <= max |x| / 2**e < 127 * 2**16

    unless max |x| is next to nothing (less than 2**-103).
    """
    exponent = b.lshr(b.add(top, _i32(0x20000)), _i32(23))
    exponent = b.select(b.icmp_signed("<", exponent, _i32(23)), _i32(23), exponent)
    scale = b.shl(b.sub(exponent, _i32(22)), _i32(23))
    inverse = b.shl(b.sub(_i32(276), exponent), _i32(23))
    return b.bitcast(scale, F32), b.bitcast(inverse, F32)


def _to_127(b: Builder, top: Value) -> tuple[Value, Value]:
    """max |x| / 127 and 127 / max |x|; both 0 below 2**-100."""
    high, most = b.bitcast(top, F32), ir.Constant(F32, 127.0)
    zero = ir.Constant(F32, 0.0)
    is_tiny = b.icmp_signed("<", top, _i32((127 - 100) << 23))
    return b.select(is_tiny, zero, b.fdiv(high, most)), b.select(is_tiny, zero, b.fdiv(most, high))


def _quantise_step(digits: int, step: int):  # type: ignore[no-untyped-def]
    @instruction(types.void, i64, i64, i64)
    def quantise_step(b: Builder, x: Value, offset: Value, record: Value) -> None:
        vectors = [emit_load(b, x, VF, 4 * at, align=4) for at in range(0, step, LANES)]
        magnitudes = [b.and_(b.bitcast(v, V32), const_vec(V32, 0x7FFFFFFF)) for v in vectors]

        def larger(b: Builder, x: Value, y: Value) -> Value:
            return b.select(b.icmp_signed(">", x, y), x, y)

        highest = magnitudes[0]
        for magnitude in magnitudes[1:]:
            highest = larger(b, highest, magnitude)
        top = emit_reduce(b, highest, larger)
        finite = b.icmp_signed("<", top, _i32(0x7F800000))
        scale, inverse = (_power_of_two if digits == 3 else _to_127)(b, top)
        inverses = emit_splat(b, b.select(finite, inverse, ir.Constant(F32, 0.0)))
        kept = b.select(finite, _i32(-1), _i32(0))
        integers = []
        for v in vectors:  # what is not finite must not be converted
            v = b.bitcast(b.and_(b.bitcast(v, V32), emit_splat(b, kept, V32)), VF)
            integers.append(b.fptosi(_call(b, "llvm.rint.v16f32", b.fmul(v, inverses)), V32))
        sums = []
        for place in reversed(range(digits)):
            lows = integers
            if place > 0:
                twenty_four = const_vec(V32, 24)
                lows = [b.ashr(b.shl(X, twenty_four), twenty_four) for X in integers]
                eight = const_vec(V32, 8)
                integers = [b.ashr(b.sub(X, low), eight) for X, low in zip(integers, lows, strict=True)]
            for at, low in enumerate(lows):
                b.store(b.trunc(low, V8), pointer(b, record, V8, step * place + LANES * at), align=1)
            total = lows[0]
            for low in lows[1:]:
                total = b.add(total, low)
            sums.append(emit_reduce(b, total, lambda b, x, y: b.add(x, y)))
        sums.reverse()  # of digit 0 first
        total = sums[0]
        for digit_sum in sums[1:]:
            total = b.add(b.shl(total, _i32(8)), digit_sum)
        at = scale_at(digits, step)
        scale = b.select(finite, scale, ir.Constant(F32, float("nan")))
        b.store(scale, pointer(b, record, F32, at), align=4)
        b.store(b.fmul(b.sitofp(total, F32), scale), pointer(b, record, F32, at + 4), align=4)
        negative = b.sub(_i32(0), b.trunc(offset, I32))
        for place, digit_sum in enumerate(sums):
            b.store(b.mul(negative, digit_sum), pointer(b, record, I32, at + 8 + 4 * place), align=4)

    return quantise_step


@cache
def quantise_kernel(digits: int, step: int) -> Kernel:
    """A task is a block of a row, blocks of a row first.

    The record of block i of row r goes to out + r // 16 * tile_stride + r % 16 * row_stride + i * step_stride.
    """
    quantise_step = _quantise_step(digits, step)

    def quantise(
        worker: int, begin: int, end: int, x: int, x_stride: int, steps: int, offset: int, out: int, tile_stride: int,
        row_stride: int, step_stride: int,
    ) -> None:  # fmt: skip
        for task in range(begin, end):
            row, i = task // steps, task % steps
            tile, t = row // TILE_ROWS, row % TILE_ROWS
            record = out + tile * tile_stride + t * row_stride + i * step_stride
            quantise_step(x + row * x_stride + 4 * step * i, offset, record)

    return Kernel(f"digits.quantise-{digits}-{step}", quantise)
