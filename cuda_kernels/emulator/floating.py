"""Floating-point arithmetic as PTX defines it, on numpy vectors: one rounding, where numpy would give two.

Every function takes arrays or numpy scalars of a common shape and gives an array. NaN payloads are not modelled.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cuda_kernels.emulator.ptx import Array

_F32_TINY = np.float32(np.finfo(np.float32).tiny)
_MINUS_ZERO = np.float64(-0.0)


def _exact_error(total: Array, a: Array, b: Array) -> Array:
    """What `total = a + b` lost by rounding (Knuth's TwoSum), 0 where it is not finite."""
    part = total - a
    error = (a - (total - part)) + (b - part)
    return np.where(np.isfinite(error), error, 0.0)


def _round_to_odd(total: Array, error: Array) -> Array:
    """float64 `total + error` rounded to odd: a second rounding to fewer bits is then a correct one.

    S. Boldo and G. Melquiond, "Emulation of FMA and correctly rounded sums", IEEE Trans. Computers 57(4), 2008.
    """
    bits = np.atleast_1d(total).view(np.int64).copy()
    inexact = (error != 0) & ((bits & 1) == 0)
    bits += np.where(inexact, np.where((error > 0) == (total > 0), 1, -1), 0)
    return bits.view(np.float64)


def fused(a: Any, b: Any, c: Any) -> Array:
    """a * b + c of values with at most 26 significant bits, as float64 rounded to odd."""
    product = np.multiply(a, b, dtype=np.float64)
    addend = np.asarray(c).astype(np.float64)
    total = np.atleast_1d(product + addend)
    return _round_to_odd(total, _exact_error(total, product, addend))


def fma_f32(a: Any, b: Any, c: Any, rounding: str = "rn") -> Array:
    """fma.{rn,rz,rm,rp}.f32: one rounding of a * b + c."""
    product = np.multiply(a, b, dtype=np.float64)  # exact: 24 + 24 bits
    total = np.add(product, c, dtype=np.float64)
    if rounding != "rn":
        addend = np.asarray(c).astype(np.float64)
        return directed_f32(total, _exact_error(total, product, addend), rounding)
    # Two roundings differ from one only where the first ends on a tie of the second, or where float32 is subnormal.
    result = np.atleast_1d(total.astype(np.float32))
    total = np.atleast_1d(total)
    doubtful = (total.view(np.int64) & 0x1FFFFFFF) == 0x10000000
    small = np.abs(result) <= _F32_TINY
    if small.any():
        doubtful |= small & (total != 0)
    if doubtful.any():
        lanes = np.flatnonzero(doubtful)
        p, addend = (np.broadcast_to(x, total.shape)[lanes].astype(np.float64) for x in (product, c))
        result[lanes] = _round_to_odd(total[lanes], _exact_error(total[lanes], p, addend)).astype(np.float32)
    return result


def directed_f32(total: Array, error: Any, rounding: str) -> Array:
    """float64 `total + error` to float32, toward zero (rz), down (rm) or up (rp)."""
    nearest = np.asarray(total).astype(np.float32)
    wide = nearest.astype(np.float64)
    over = (wide > total) | ((wide == total) & (np.asarray(error) < 0))
    under = (wide < total) | ((wide == total) & (np.asarray(error) > 0))
    below = np.nextafter(nearest, np.float32(-np.inf))
    above = np.nextafter(nearest, np.float32(np.inf))
    if rounding == "rz":
        down = np.asarray(total) > 0
        return np.where(down & over, below, np.where(~down & under, above, nearest))
    return np.where(over, below, nearest) if rounding == "rm" else np.where(under, above, nearest)


def add_f32(a: Any, b: Any, rounding: str) -> Array:
    """add.{rz,rm,rp}.f32."""
    return fma_f32(a, np.float32(1), b, rounding)


def mul_f32(a: Any, b: Any, rounding: str) -> Array:
    """mul.{rz,rm,rp}.f32."""
    return fma_f32(a, b, _MINUS_ZERO, rounding)


def fma_f64(a: Any, b: Any, c: Any) -> Array:
    """fma.rn.f64 with error-free transformations; the last bit can be off by one where the errors themselves round."""
    product = np.asarray(a * b)
    split_a, split_b = a * 134217729.0, b * 134217729.0
    high_a, high_b = split_a - (split_a - a), split_b - (split_b - b)
    low_a, low_b = a - high_a, b - high_b
    product_error = ((high_a * high_b - product) + high_a * low_b + low_a * high_b) + low_a * low_b
    total = product + c
    result = total + (product_error + _exact_error(total, product, np.asarray(c)))
    return np.where(np.isfinite(result) | ~np.isfinite(total), result, total)


def flush(x: Any) -> Array:
    """.ftz: subnormal float32 values become zero and keep their sign."""
    return np.where(np.abs(x) < _F32_TINY, np.copysign(np.float32(0), x), x)


def saturate(x: Any) -> Array:
    """.sat: clamp to [0, 1]; NaN becomes 0."""
    return np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0)).astype(x.dtype)


def minimum(a: Any, b: Any) -> Array:
    """min: the other operand where one is NaN, and -0 below +0."""
    return np.where((a == b) & np.signbit(a), a, np.fmin(a, b))


def maximum(a: Any, b: Any) -> Array:
    """max: the other operand where one is NaN, and -0 below +0."""
    return np.where((a == b) & np.signbit(a), b, np.fmax(a, b))


def to_integer(x: Any, dtype: str, rounding: str) -> Array:
    """cvt to an integer: rni, rzi, rmi or rpi, clamped to the type's range; NaN becomes 0."""
    wide = np.asarray(x).astype(np.float64)
    whole = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[rounding](wide)
    limits = np.iinfo(dtype)
    inside = (whole > float(limits.min)) & (whole < float(limits.max))
    clamped = np.where(whole >= float(limits.max), limits.max, limits.min).astype(dtype)
    result = np.where(inside, np.where(inside, whole, 0.0).astype(dtype), clamped)
    return np.where(np.isnan(whole), np.dtype(dtype).type(0), result)


def exp2(x: Any) -> Array:
    return np.exp2(np.asarray(x).astype(np.float64)).astype(x.dtype)


def log2(x: Any) -> Array:
    return np.log2(np.asarray(x).astype(np.float64)).astype(x.dtype)


def sine(x: Any) -> Array:
    return np.sin(np.asarray(x).astype(np.float64)).astype(x.dtype)


def cosine(x: Any) -> Array:
    return np.cos(np.asarray(x).astype(np.float64)).astype(x.dtype)


def hyperbolic_tangent(x: Any) -> Array:
    return np.tanh(np.asarray(x).astype(np.float64)).astype(x.dtype)


def reciprocal_root(x: Any) -> Array:
    return (1.0 / np.sqrt(np.asarray(x).astype(np.float64))).astype(x.dtype)
