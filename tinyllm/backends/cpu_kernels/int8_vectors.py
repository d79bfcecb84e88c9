"""How write_kv rounds a vector to int8: the definition in `tinyllm.backends.int8_vectors`, as instructions."""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from tinyllm.backends.cpu_kernels.deferred import types
from tinyllm.backends.cpu_kernels.simd import (
    F32,
    I8,
    I32,
    Builder,
    Value,
    const,
    emit_load,
    emit_loop,
    instruction,
    pointer,
)
from tinyllm.backends.int8_vectors import LARGEST_SCALE, SCALE_DROPPED, SMALLEST_AMAX

__all__ = ["inverse_of", "scale_of", "store_int8"]

_INFINITY = 0x7F800000
_ROUND = 1.5 * 2**23  # added to |x| < 2**22, leaves round(x) in two's complement in the low bits


def _f32(value: float) -> Value:
    return ir.Constant(F32, value)


def _i32(value: int) -> Value:
    return ir.Constant(I32, value)


@instruction(types.float32, types.int64, types.int64)
def _scale_of(b: Builder, address: Value, n: Value) -> Value:
    def larger(at: Value, state: list[Value]) -> list[Value]:
        bits = b.and_(emit_load(b, address, I32, at, align=4), _i32(0x7FFFFFFF))
        return [b.select(b.icmp_signed(">", bits, state[0]), bits, state[0])]

    (bits,) = emit_loop(b, const(0), b.mul(n, const(4)), 4, [_i32(0)], larger)
    amax = b.bitcast(bits, F32)
    quotient = b.bitcast(b.fdiv(amax, _f32(127.0)), I32)
    rounded = b.bitcast(b.and_(b.add(quotient, _i32(SCALE_DROPPED)), _i32(~SCALE_DROPPED)), F32)
    scale = b.select(b.fcmp_ordered("<", rounded, _f32(LARGEST_SCALE)), rounded, _f32(LARGEST_SCALE))
    scale = b.select(b.fcmp_ordered("<", amax, _f32(SMALLEST_AMAX)), _f32(0.0), scale)
    return b.select(b.icmp_signed("<", bits, _i32(_INFINITY)), scale, _f32(float("nan")))


@instruction(types.float32, types.float32)
def _inverse_of(b: Builder, scale: Value) -> Value:
    return b.select(b.fcmp_ordered(">", scale, _f32(0.0)), b.fdiv(_f32(1.0), scale), _f32(0.0))


@instruction(types.void, types.int64, types.float32, types.float32, types.int64)
def _store_int8(b: Builder, address: Value, value: Value, inverse: Value, offset: Value) -> None:
    code = b.trunc(b.bitcast(b.fadd(b.fmul(value, inverse), _f32(_ROUND)), I32), I8)
    usable = b.fcmp_ordered("!=", inverse, _f32(0.0))  # else the product may be NaN, whose low bits are anything
    code = b.select(usable, code, ir.Constant(I8, 0))
    b.store(b.add(code, b.trunc(offset, I8)), pointer(b, address, I8), align=1)


scale_of: Callable[[int, int], float] = _scale_of  # of n float32 from an address on
inverse_of: Callable[[float], float] = _inverse_of  # 1 / scale; 0 where zeros are to be stored
store_int8: Callable[[int, float, float, int], None] = _store_int8  # address, value, 1 / scale, what is added
