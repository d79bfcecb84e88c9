"""float16 to float32 and back: the CPU's own instructions, or integers where it has none (x86 without F16C).

LLVM would call a library for these that processes need not have. And float32 to bfloat16, in integers.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir

from tinyllm.backends.cpu_kernels.host_cpu import host_cpu

__all__ = ["emit_bf16_of_float", "emit_float_of_half", "emit_half_of_float"]

Builder = Any  # llvmlite.ir.IRBuilder
Value = Any  # llvmlite.ir.Value
Type = Any  # llvmlite.ir.Type

_IS_X86 = platform.machine() in ("x86_64", "AMD64")
_NATIVE = not _IS_X86 or host_cpu().has("f16c")
_INFINITY = 0x7F800000


def _shaped(like: Type, item: Type) -> Type:
    """The type `item`, or a vector of as many of them as `like` has."""
    return ir.VectorType(item, like.count) if isinstance(like, ir.VectorType) else item


def _constant(kind: Type, value: float) -> Value:
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def emit_float_of_half(b: Builder, x: Value) -> Value:
    """One float16 or a vector of them as float32, exactly."""
    floats = _shaped(x.type, ir.FloatType())
    if _NATIVE:
        return b.fpext(x, floats)
    ints = _shaped(x.type, ir.IntType(32))
    bits = b.zext(b.bitcast(x, _shaped(x.type, ir.IntType(16))), ints)
    magnitude = b.and_(bits, _constant(ints, 0x7FFF))
    # the exponent's bias is 112 less; a product by 2**112 mends that for subnormal numbers too
    scaled = b.fmul(b.bitcast(b.shl(magnitude, _constant(ints, 13)), floats), _constant(floats, 2.0**112))
    finite = b.icmp_unsigned("<", magnitude, _constant(ints, 0x7C00))
    special = b.or_(b.shl(magnitude, _constant(ints, 13)), _constant(ints, _INFINITY))
    sign = b.shl(b.and_(bits, _constant(ints, 0x8000)), _constant(ints, 16))
    return b.bitcast(b.or_(b.select(finite, b.bitcast(scaled, ints), special), sign), floats)


def emit_half_of_float(b: Builder, x: Value) -> Value:
    """One float32 or a vector of them rounded to float16, to nearest even; infinity beyond 65504 and half a step."""
    if _NATIVE:
        return b.fptrunc(x, _shaped(x.type, ir.HalfType()))
    i32, f32 = _shaped(x.type, ir.IntType(32)), _shaped(x.type, ir.FloatType())

    def const(value: int) -> Value:
        return _constant(i32, value)

    bits = b.bitcast(x, i32)
    sign = b.and_(bits, const(0x80000000))
    magnitude = b.xor(bits, sign)
    # adding 0.5 leaves the bits of a subnormal float16 at the end of the sum, rounded
    half = b.fadd(b.bitcast(magnitude, f32), _constant(f32, 0.5))
    subnormal = b.sub(b.bitcast(half, i32), const(0x3F000000))
    odd = b.and_(b.lshr(magnitude, const(13)), const(1))
    normal = b.lshr(b.add(b.add(magnitude, const(0xFFF - (112 << 23))), odd), const(13))
    is_nan = b.icmp_unsigned(">", magnitude, const(_INFINITY))
    special = b.select(is_nan, const(0x7E00), const(0x7C00))
    result = b.select(b.icmp_unsigned("<", magnitude, const(113 << 23)), subnormal, normal)
    result = b.select(b.icmp_unsigned("<", magnitude, const(143 << 23)), result, special)
    bits16 = b.trunc(b.or_(result, b.lshr(sign, const(16))), _shaped(x.type, ir.IntType(16)))
    return b.bitcast(bits16, _shaped(x.type, ir.HalfType()))


def emit_bf16_of_float(b: Builder, x: Value) -> Value:
    """The upper half of a float32 or of each of a vector, rounded to nearest even, as int16; NaN becomes 0x7fc0."""
    ints = _shaped(x.type, ir.IntType(32))
    bits = b.bitcast(x, ints)
    odd = b.and_(b.lshr(bits, _constant(ints, 16)), _constant(ints, 1))
    rounded = b.add(bits, b.add(_constant(ints, 0x7FFF), odd))
    chosen = b.select(b.fcmp_unordered("uno", x, x), _constant(ints, 0x7FC00000), rounded)
    return b.trunc(b.lshr(chosen, _constant(ints, 16)), _shaped(x.type, ir.IntType(16)))
