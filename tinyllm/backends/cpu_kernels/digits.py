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

For a matrix unit, which reads up to 64 bytes of each row, a tile's step (of 32 values) has the digits of all rows, then
what else their records have. Three digits become four of the same integers:

    X = 2**12 H + L,   H = 16 H0 + H1,   L = 16 L0 + L1        -128 <= H0, L0 <= 127,   -8 <= H1, L1 <= 7

    [row of the tile]   | X: 32 bytes |   or   | H0: 32 bytes | H1 | L0 | L1 |,   and after all sixteen
    [row of the tile]   | scale | sum of x | -offset * sums of X, or of H and L |, in 16 bytes
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial, reduce
from typing import NamedTuple

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
    emit_call,
    emit_load,
    emit_reduce,
    emit_splat,
    instruction,
    pointer,
)

__all__ = [
    "FACTS_NBYTES",
    "MATRIX_ROW_NBYTES",
    "TILE_ROWS",
    "matrix_step_nbytes",
    "power_of_two",
    "quantise_for_matrix",
    "quantise_kernel",
    "quantise_step",
    "record_nbytes",
    "row_nbytes",
    "scale_at",
    "split",
    "tile_nbytes",
]

TILE_ROWS = 16
MATRIX_ROW_NBYTES = {1: 32, 3: 128}  # of a row's digits for a matrix unit
FACTS_NBYTES = 16  # of the rest of it

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


def matrix_step_nbytes(digits: int) -> int:
    """Bytes of a tile's step for a matrix unit."""
    return TILE_ROWS * (MATRIX_ROW_NBYTES[digits] + FACTS_NBYTES)


class _Integers(NamedTuple):
    """A block's integers, in vectors, and what they are multiples of."""

    values: list[Value]
    scale: Value


def _i32(value: int) -> Value:
    return ir.Constant(I32, value)


def power_of_two(b: Builder, top: Value) -> tuple[Value, Value]:
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


def _add(b: Builder, x: Value, y: Value) -> Value:
    return b.add(x, y)


def _larger(b: Builder, x: Value, y: Value) -> Value:
    return b.select(b.icmp_signed(">", x, y), x, y)


def _integers(b: Builder, x: Value, step: int, scales: Callable[[Builder, Value], tuple[Value, Value]]) -> _Integers:
    """A block's values over its scale, rounded to nearest even."""
    vectors = [emit_load(b, x, VF, 4 * at, align=4) for at in range(0, step, LANES)]
    magnitudes = [b.and_(b.bitcast(v, V32), const_vec(V32, 0x7FFFFFFF)) for v in vectors]
    top = emit_reduce(b, reduce(partial(_larger, b), magnitudes), _larger)
    finite = b.icmp_signed("<", top, _i32(0x7F800000))
    scale, inverse = scales(b, top)
    inverses = emit_splat(b, b.select(finite, inverse, ir.Constant(F32, 0.0)))
    kept = emit_splat(b, b.select(finite, _i32(-1), _i32(0)), V32)
    # what is not finite must not be converted
    clean = [b.bitcast(b.and_(b.bitcast(v, V32), kept), VF) for v in vectors]
    values = [b.fptosi(emit_call(b, "llvm.rint.v16f32", VF, b.fmul(v, inverses)), V32) for v in clean]
    return _Integers(values, b.select(finite, scale, ir.Constant(F32, float("nan"))))


def split(b: Builder, values: list[Value], bits: int, bias: int = 0) -> tuple[list[Value], list[Value]]:
    """upper, lower with values = 2**bits * upper + lower, lower from -2**(bits - 1) - bias on."""
    half, shift = const_vec(V32, (1 << bits - 1) + bias), const_vec(V32, bits)
    upper = [b.ashr(b.add(X, half), shift) for X in values]
    return upper, [b.sub(X, b.shl(high, shift)) for X, high in zip(values, upper, strict=True)]


def _store_bytes(b: Builder, values: list[Value], address: Value, offset: int) -> None:
    for at, one in enumerate(values):
        b.store(b.trunc(one, V8), pointer(b, address, V8, offset + LANES * at), align=1)


def _sum(b: Builder, values: list[Value]) -> Value:
    return emit_reduce(b, reduce(partial(_add, b), values), _add)


def _store_facts(
    b: Builder, address: Value, at: int, scale: Value, total: Value, offset: Value, sums: list[Value]
) -> None:
    """Scale, sum of x and the first sums."""
    b.store(scale, pointer(b, address, F32, at), align=4)
    b.store(b.fmul(b.sitofp(total, F32), scale), pointer(b, address, F32, at + 4), align=4)
    negative = b.sub(_i32(0), b.trunc(offset, I32))
    for place, digit_sum in enumerate(sums):
        b.store(b.mul(negative, digit_sum), pointer(b, address, I32, at + 8 + 4 * place), align=4)


def quantise_step(digits: int, step: int, has_offset: bool) -> Callable[..., None]:
    """(x, offset, record); the record may lie where x does."""

    @instruction(types.void, i64, i64, i64)
    def quantise(b: Builder, x: Value, offset: Value, record: Value) -> None:
        block = _integers(b, x, step, power_of_two if digits == 3 else _to_127)
        rest = block.values
        places: list[list[Value]] = []
        for _ in range(digits - 1):
            rest, low = split(b, rest, 8)
            places.insert(0, low)
        places.insert(0, rest)
        for place, values in enumerate(places):
            _store_bytes(b, values, record, step * place)
        sums = [_sum(b, values) for values in places] if has_offset else [_i32(0)] * digits
        _store_facts(b, record, scale_at(digits, step), block.scale, _sum(b, block.values), offset, sums)

    return quantise


def _quantise_matrix_step(digits: int, has_offset: bool) -> Callable[..., None]:
    """(x, offset, record, facts)"""

    @instruction(types.void, i64, i64, i64, i64)
    def quantise_step(b: Builder, x: Value, offset: Value, record: Value, facts: Value) -> None:
        block = _integers(b, x, 32, power_of_two if digits == 3 else _to_127)
        summed = [block.values]
        if digits == 1:
            _store_bytes(b, block.values, record, 0)
        else:
            summed = list(split(b, block.values, 12, bias=8))  # else L0 could be 128
            for at, half in enumerate(summed):
                for place, digit in enumerate(split(b, half, 4)):
                    _store_bytes(b, digit, record, 64 * at + 32 * place)
        sums = [_sum(b, values) for values in summed] if has_offset else [_i32(0)] * len(summed)
        _store_facts(b, facts, 0, block.scale, _sum(b, block.values), offset, sums)

    return quantise_step


@cache
def quantise_kernel(digits: int, step: int, has_offset: bool) -> Kernel:
    """A task is a block of a row, blocks of a row first.

    The record of block i of row r goes to out + r // 16 * tile_stride + r % 16 * row_stride + i * step_stride.
    """
    one_step = quantise_step(digits, step, has_offset)

    def quantise(
        worker: int, begin: int, end: int, x: int, x_stride: int, steps: int, offset: int, out: int, tile_stride: int,
        row_stride: int, step_stride: int,
    ) -> None:  # fmt: skip
        for row in range(begin // steps, (end + steps - 1) // steps):
            tile, t = row // TILE_ROWS, row % TILE_ROWS
            record = out + tile * tile_stride + t * row_stride
            for i in range(max(begin - row * steps, 0), min(end - row * steps, steps)):
                one_step(x + row * x_stride + 4 * step * i, offset, record + i * step_stride)

    return Kernel(f"digits.quantise-{digits}-{step}-{'offset' if has_offset else 'plain'}", quantise)


@cache
def quantise_for_matrix(digits: int, has_offset: bool) -> Kernel:
    """The same for a matrix unit, in blocks of 32."""
    quantise_step, row_nbytes, step_nbytes = (
        _quantise_matrix_step(digits, has_offset), MATRIX_ROW_NBYTES[digits], matrix_step_nbytes(digits)
    )  # fmt: skip

    def quantise(worker: int, begin: int, end: int, x: int, x_stride: int, steps: int, offset: int, out: int) -> None:
        for row in range(begin // steps, (end + steps - 1) // steps):
            t = row % TILE_ROWS
            for i in range(max(begin - row * steps, 0), min(end - row * steps, steps)):
                tile = out + (row // TILE_ROWS * steps + i) * step_nbytes
                facts = tile + TILE_ROWS * row_nbytes + FACTS_NBYTES * t
                quantise_step(x + row * x_stride + 128 * i, offset, tile + row_nbytes * t, facts)

    return Kernel(f"digits.matrix-{digits}-{'offset' if has_offset else 'plain'}", quantise)
