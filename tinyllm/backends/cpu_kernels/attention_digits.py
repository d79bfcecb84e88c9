"""Queries and probabilities as integers of 24 bits, in three digits of a byte: what attention over int8 multiplies.

    query tile    [d / 4][digit][ROW_TILE]: four bytes;  scales [ROW_TILE] float32, -128 * sums [digit][ROW_TILE] int32
    row of probs  | digit 0: 64 bytes | digit 1 | digit 2 | scale: float32 |   where its scores were

A query is cut by the largest of its elements, a row of probabilities, times the values' scales, by the largest of them.
Instructions multiply unsigned bytes by signed ones. Queries have signed digits (`digits.py`), so that keys are stored
as code + 128, which the sums make good; probabilities have unsigned ones, and values are stored as they are.
"""

from __future__ import annotations

from llvmlite import ir

from tinyllm.backends.cpu_kernels.attention_tiles import ROW_TILE
from tinyllm.backends.cpu_kernels.deferred import types
from tinyllm.backends.cpu_kernels.digits import power_of_two, split
from tinyllm.backends.cpu_kernels.jit import device
from tinyllm.backends.cpu_kernels.online_softmax import TILE_KEYS
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
    load_first,
    pointer,
    vec,
    zeros,
)

__all__ = ["DIGITS", "FACTS", "KEY_OFFSET", "WORDS_NBYTES", "larger", "quantise_probs", "quantise_query"]

DIGITS = 3
KEY_OFFSET = 128  # of the keys' bytes in the cache
WORDS_NBYTES = 4 * DIGITS * ROW_TILE  # of a query tile's four elements
FACTS = DIGITS * TILE_KEYS  # where a row of probs has its scale
_INFINITY = 0x7F800000

i64 = types.int64


@instruction(vec, vec, vec)
def larger(b: Builder, x: Value, y: Value) -> Value:
    """The larger magnitudes, by their bits: a NaN is the largest."""
    x, y = (b.and_(b.bitcast(v, V32), const_vec(V32, 0x7FFFFFFF)) for v in (x, y))
    return b.bitcast(b.select(b.icmp_signed(">", x, y), x, y), VF)


def _larger_int(b: Builder, x: Value, y: Value) -> Value:
    return b.select(b.icmp_signed(">", x, y), x, y)


def _i32(value: int) -> Value:
    return ir.Constant(I32, value)


def _scale_and_inverse(b: Builder, magnitudes: Value) -> tuple[Value, Value]:
    top = emit_reduce(b, b.bitcast(magnitudes, V32), _larger_int)
    finite = b.icmp_signed("<", top, _i32(_INFINITY))
    scale, inverse = power_of_two(b, top)
    return (
        b.select(finite, scale, ir.Constant(F32, float("nan"))),
        b.select(finite, inverse, ir.Constant(F32, 0.0)),
    )


@instruction(types.void, i64, vec)
def _start_query(b: Builder, facts: Value, magnitudes: Value) -> None:
    scale, _ = _scale_and_inverse(b, magnitudes)
    b.store(scale, pointer(b, facts, F32), align=4)
    for digit in range(DIGITS):
        b.store(ir.Constant(I32, 0), pointer(b, facts, I32, 4 * ROW_TILE * (1 + digit)), align=4)


@instruction(types.void, vec, vec, i64, i64)
def _store_query(b: Builder, x: Value, magnitudes: Value, words: Value, facts: Value) -> None:
    """Sixteen elements as four words of each digit; adds to the sums."""
    _, inverse = _scale_and_inverse(b, magnitudes)
    usable = b.fcmp_ordered("!=", inverse, ir.Constant(F32, 0.0))
    kept = emit_splat(b, b.sext(usable, I32), V32)
    x = b.bitcast(b.and_(b.bitcast(x, V32), kept), VF)  # what is not finite must not be converted
    rest = [b.fptosi(emit_call(b, "llvm.rint.v16f32", VF, b.fmul(x, emit_splat(b, inverse))), V32)]
    digits: list[Value] = []
    for _ in range(DIGITS - 1):
        rest, low = split(b, rest, 8)
        digits = low + digits
    for digit, values in enumerate(rest + digits):
        four = b.bitcast(b.trunc(values, V8), ir.VectorType(I32, 4))
        for word in range(4):
            place = pointer(b, words, I32, WORDS_NBYTES * word + 4 * ROW_TILE * digit)
            b.store(b.extract_element(four, ir.Constant(I32, word)), place, align=4)
        place = pointer(b, facts, I32, 4 * ROW_TILE * (1 + digit))
        total = emit_reduce(b, values, lambda b, x, y: b.add(x, y))
        b.store(b.sub(b.load(place, align=4), b.mul(total, ir.Constant(I32, KEY_OFFSET))), place, align=4)


@device
def quantise_query(source: int, head_dim: int, tile: int, row: int) -> None:
    padded = (head_dim + 15) // 16 * 16
    words = tile + 4 * row
    facts = words + padded // 4 * WORDS_NBYTES
    magnitudes = zeros()
    for d in range(0, head_dim, 16):
        magnitudes = larger(magnitudes, load_first(source + 4 * d, head_dim - d))
    _start_query(facts, magnitudes)
    for d in range(0, head_dim, 16):
        _store_query(load_first(source + 4 * d, head_dim - d), magnitudes, words + d // 4 * WORDS_NBYTES, facts)


@instruction(types.void, i64, vec)
def quantise_probs(b: Builder, row: Value, magnitudes: Value) -> None:
    """X = rint(x / 2**e) <= 2**22, where 2**21 <= max x / 2**e unless max x is next to nothing (less than 2**-100)."""
    top = emit_reduce(b, b.bitcast(magnitudes, V32), _larger_int)
    least = _i32((127 - 100) << 23)
    exponent = b.lshr(b.select(b.icmp_signed(">", top, least), top, least), _i32(23))
    scale = b.bitcast(b.shl(b.sub(exponent, _i32(21)), _i32(23)), F32)
    inverse = emit_splat(b, b.bitcast(b.shl(b.sub(_i32(254 + 21), exponent), _i32(23)), F32))
    vectors = [emit_load(b, row, VF, 4 * at, align=4) for at in range(0, TILE_KEYS, LANES)]
    # the sum's low bits are X; what is not finite leaves any bits, and NaN for its scale
    bits = [b.bitcast(b.fadd(b.fmul(x, inverse), const_vec(VF, 2.0**23)), V32) for x in vectors]
    bits = [b.and_(x, const_vec(V32, (1 << 23) - 1)) for x in bits]
    for digit in range(DIGITS):
        shift = const_vec(V32, 8 * (DIGITS - 1 - digit))
        for at, x in enumerate(bits):
            b.store(b.trunc(b.lshr(x, shift), V8), pointer(b, row, V8, TILE_KEYS * digit + LANES * at), align=1)
    finite = b.icmp_signed("<", top, _i32(_INFINITY))
    b.store(b.select(finite, scale, ir.Constant(F32, float("nan"))), pointer(b, row, F32, FACTS), align=4)
