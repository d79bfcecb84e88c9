"""Sixteen sums of four products each: unsigned bytes times signed bytes, added to int32 lanes, exactly.

    sum[lane] += code[lane][0] x[lane][0] + ... + code[lane][3] x[lane][3]

One instruction where the CPU has VNNI (AVX-512 or AVX form), three with AVX2, and otherwise shifts and products that
any CPU runs. All give the same integers.
"""

from __future__ import annotations

from llvmlite import ir

from tinyllm.backends.cpu_kernels.host_cpu import host_cpu
from tinyllm.backends.cpu_kernels.simd import I8, I16, I32, V32, Builder, Value, const_vec, emit_call

__all__ = ["HAS_VNNI", "emit_dot4"]

_VNNI_512 = host_cpu().has("avx512vnni")
_VNNI_256 = host_cpu().has("avxvnni")
_AVX2 = host_cpu().has("avx2")
HAS_VNNI = _VNNI_512 or _VNNI_256

_LOW, _HIGH = list(range(8)), list(range(8, 16))


def _halves(b: Builder, x: Value) -> tuple[Value, Value]:
    kind = ir.VectorType(I32, 8)
    low, high = (b.shuffle_vector(x, x, ir.Constant(kind, lanes)) for lanes in (_LOW, _HIGH))
    return low, high


def _joined(b: Builder, low: Value, high: Value) -> Value:
    return b.shuffle_vector(low, high, ir.Constant(V32, _LOW + _HIGH))


def _dot4_avx2(b: Builder, total: Value, codes: Value, x: Value, bits: int) -> Value:
    """Pairs as int16, which hold them where codes have at most 7 bits; the eighth bit goes by itself."""
    half_bytes, half_shorts, half = ir.VectorType(I8, 32), ir.VectorType(I16, 16), ir.VectorType(I32, 8)
    if bits == 8:
        upper = b.and_(codes, const_vec(V32, 0x80808080))
        total = _dot4_avx2(b, total, upper, x, 7)
        codes = b.and_(codes, const_vec(V32, 0x7F7F7F7F))
    parts = []
    for t, c, v in zip(_halves(b, total), _halves(b, codes), _halves(b, x), strict=True):
        arguments = b.bitcast(c, half_bytes), b.bitcast(v, half_bytes)
        pairs = emit_call(b, "llvm.x86.avx2.pmadd.ub.sw", half_shorts, *arguments)
        ones = ir.Constant(half_shorts, [1] * 16)
        parts.append(b.add(t, emit_call(b, "llvm.x86.avx2.pmadd.wd", half, pairs, ones)))
    return _joined(b, *parts)


def _dot4_anywhere(b: Builder, total: Value, codes: Value, x: Value) -> Value:
    for i in range(4):
        code = b.and_(b.lshr(codes, const_vec(V32, 8 * i)), const_vec(V32, 255))
        value = b.ashr(b.shl(x, const_vec(V32, 24 - 8 * i)), const_vec(V32, 24))
        total = b.add(total, b.mul(code, value))
    return total


def emit_dot4(b: Builder, total: Value, codes: Value, x: Value, bits: int) -> Value:
    """total + the products' sums; total, codes and x are sixteen int32, codes of at most `bits` bits a byte."""
    if _VNNI_512:
        return emit_call(b, "llvm.x86.avx512.vpdpbusd.512", V32, total, codes, x)
    if _VNNI_256:
        arguments = zip(_halves(b, total), _halves(b, codes), _halves(b, x), strict=True)
        half = ir.VectorType(I32, 8)
        return _joined(b, *(emit_call(b, "llvm.x86.avx512.vpdpbusd.256", half, *one) for one in arguments))
    if _AVX2:
        return _dot4_avx2(b, total, codes, x, bits)
    return _dot4_anywhere(b, total, codes, x)
