"""Narrow floating-point formats as bit patterns: bfloat16, TF32 and the two 8-bit formats (OCP OFP8)."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuda_kernels.emulator.ptx import Array


def bf16_to_f32(bits: Any) -> Array:
    """uint16 -> float32, exact."""
    return np.left_shift(np.atleast_1d(bits), np.uint32(16), dtype=np.uint32).view(np.float32)


def f32_to_bf16(values: Any) -> Array:
    """float32 -> uint16, to nearest even; NaN becomes 0x7fff."""
    f32 = np.atleast_1d(np.asarray(values, dtype=np.float32))
    bits = f32.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(f32), np.uint16(0x7FFF), rounded.astype(np.uint16))


def odd_f64_to_bf16(values: Array) -> Array:
    """float64 rounded to odd -> uint16: by way of float32 rounded to odd, so that only one rounding counts."""
    f32 = np.atleast_1d(values).astype(np.float32)
    wide = f32.astype(np.float64)
    f32 = np.where(np.abs(wide) > np.abs(values), np.nextafter(f32, np.float32(0)), f32).astype(np.float32)
    bits = f32.view(np.uint32) | ((f32.astype(np.float64) != values) & np.isfinite(f32)).astype(np.uint32)
    return f32_to_bf16(bits.view(np.float32))


def f32_to_tf32(values: Any, ties_away: bool) -> Array:
    """float32 -> uint32 with 10 fraction bits (cvt.rna and cvt.rn)."""
    f32 = np.atleast_1d(np.asarray(values, dtype=np.float32))
    bits = f32.view(np.uint32)
    half = np.uint32(0x1000) if ties_away else np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    return np.where(np.isfinite(f32), (bits + half) & np.uint32(0xFFFFE000), bits)


def _positive_values(exponent_bits: int, fraction_bits: int, count: int) -> Array:
    """The values of codes 0 .. count - 1 of a sign-exponent-fraction format."""
    code = np.arange(count)
    exponent, fraction = code >> fraction_bits, code & ((1 << fraction_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    significand = np.where(exponent == 0, fraction, fraction + (1 << fraction_bits))
    return np.ldexp(significand.astype(np.float64), np.maximum(exponent, 1) - bias - fraction_bits)


# Finite positive values; after them, E4M3 has NaN only (0x7f) and E5M2 infinity (0x7c) and NaN (0x7d to 0x7f).
_F8_VALUES = {"e4m3x2": _positive_values(4, 3, 0x7F), "e5m2x2": _positive_values(5, 2, 0x7C)}


def f64_to_f8(values: Any, kind: str) -> Array:
    """float64 [n] -> uint8 [n], to nearest even, clamped to the largest finite value (.satfinite)."""
    wide = np.atleast_1d(np.asarray(values, dtype=np.float64))
    table = _F8_VALUES[kind]
    middles = (table[1:] + table[:-1]) / 2
    size = np.minimum(np.abs(wide), table[-1])
    code = np.searchsorted(middles, size, side="left")
    tie = size == middles[np.minimum(code, len(middles) - 1)]
    code += (tie & (code % 2 == 1) & (code < len(middles))).astype(code.dtype)
    code = np.where(np.isnan(wide), 0x7F, code)
    return (code | (np.signbit(wide) & ~np.isnan(wide)) * 0x80).astype(np.uint8)


def f8_to_f16(codes: Any, kind: str) -> Array:
    """uint8 [n] -> float16 [n], exact."""
    code = np.atleast_1d(codes)
    size = code & np.uint8(0x7F)
    table = _F8_VALUES[kind]
    special = np.full(128 - len(table), np.nan)
    if kind == "e5m2x2":
        special[0] = np.inf
    values = np.concatenate([table, special])[size]
    return np.where(code & np.uint8(0x80), -values, values).astype(np.float16)
