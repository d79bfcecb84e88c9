"""How float32 keys and values are rounded to a cache's dtype and read back, as device functions over four values.

f16, bf16: round to nearest, ties to even; too large becomes infinity; any NaN becomes 0x7E00, 0x7FC0.

int8, fp8 (e4m3): one scale per vector of D values, from its largest magnitude:

    scale   amax / 127 or amax / 448, rounded up to 16 significant bits (down where 127 or 448 times it would overflow)
    stored  x * (1 / scale), rounded to nearest, ties to even

With so few bits in the scale, stored * scale is exact in float32, and the largest value becomes exactly 127 or 448:
storing what was read gives the same bits again. A vector whose largest magnitude is below 2 ** -100 is stored as
zeros of scale 0. One with an infinity or NaN has NaN for its scale, so that all of it reads as NaN: nothing that is
not a number turns into one. fp8's own NaN codes, 0x7F and 0xFF, are never stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba.cuda import types

from cuda_kernels.primitives import (
    Pointer,
    Value,
    as_float,
    as_uint,
    device_function,
    fmin,
    load2,
    load4,
    pack_f16,
    store2,
    store4,
    unpack_bf16,
    unpack_f16,
)

__all__ = ["decode_e4m3", "encode_e4m3", "load_stored", "quad_words", "scale_of", "store_rounded"]

u32, f32 = types.uint32, types.float32

ONE, ZERO = np.float32(1), np.float32(0)
NAN = np.float32(np.nan)
INFINITY_BITS = np.uint32(0x7F800000)
SMALLEST_AMAX_BITS = np.uint32((127 - 100) << 23)  # 2 ** -100
SCALE_DROPPED = np.uint32(0xFF)  # the bits of a float32 that a scale does not use
ROUND_INT8 = np.float32(1.5 * 2**23)  # added to |x| < 2 ** 22, leaves round(x) in two's complement in the low bits
ROUND_SUBNORMAL = np.float32(2**14)  # added to 0 <= x < 2 ** -6, leaves round(x / 2 ** -9) in the low bits
E4M3_LEAST_NORMAL = np.float32(2**-6)
E4M3_REBIAS = np.uint32((127 - 7) << 3)
E4M3_TO_F32 = np.float32(2**120)  # between the exponent biases, 127 - 7
SIGN, SIGN8 = np.uint32(0x80000000), np.uint32(0x80)


@device_function
def _bf16(x: Value) -> Value:
    """The bits of x as bfloat16: half an ulp, less where the kept bits are even, is added before the cut."""
    bits = as_uint(x)
    rounded = u32((bits + u32(0x7FFF) + ((bits >> u32(16)) & u32(1))) >> u32(16))
    return rounded if x == x else u32(0x7FC0)


@device_function
def _f16_pair(a: Value, b: Value) -> Value:
    pair = pack_f16(a, b)
    if a != a:
        pair = u32((pair & u32(0xFFFF0000)) | u32(0x7E00))
    if b != b:
        pair = u32((pair & u32(0xFFFF)) | u32(0x7E000000))
    return pair


@device_function
def encode_e4m3(x: Value) -> Value:
    """The e4m3 code of a float32, as uint32: to nearest, ties to even, at most 448 in magnitude; 0x7F for NaN."""
    sign = u32((as_uint(x) >> u32(24)) & SIGN8)
    magnitude = as_float(u32(as_uint(x) & u32(0x7FFFFFFF)))
    bits = as_uint(magnitude)
    if bits > INFINITY_BITS:
        return u32(0x7F)
    if magnitude < E4M3_LEAST_NORMAL:
        return u32(sign | (as_uint(magnitude + ROUND_SUBNORMAL) & u32(0xF)))
    code = u32((bits + u32(0x7FFFF) + ((bits >> u32(20)) & u32(1))) >> u32(20)) - E4M3_REBIAS
    return u32(sign | min(u32(code), u32(0x7E)))


@device_function
def decode_e4m3(code: Value) -> Value:
    """The float32 of an e4m3 code below 0x100 that is not NaN; exact."""
    magnitude = u32((code & u32(0x7F)) << u32(20))
    return as_float(u32(magnitude | ((code & SIGN8) << u32(24)))) * E4M3_TO_F32


@device_function
def _encode_int8(x: Value) -> Value:
    return u32(as_uint(x + ROUND_INT8) & u32(0xFF))


@device_function
def _decode_int8(code: Value) -> Value:
    return f32(types.int32(types.int8(code)))


def scale_of(dtype: str) -> Callable[..., Any]:
    """scale(amax_bits) -> (scale, 1 / scale), for the largest |x| of a vector as the bits of a float32.

    1 / scale is 0 where nothing but zeros is to be stored.
    """
    largest = np.float32(127 if dtype == "int8" else 448)
    most = np.float32(np.finfo(np.float32).max / largest)
    most = (most.view(np.uint32) & ~SCALE_DROPPED).view(np.float32)  # largest * most is finite

    @device_function
    def scale(amax_bits: Value) -> Any:
        if amax_bits >= INFINITY_BITS:
            return NAN, ZERO
        if amax_bits < SMALLEST_AMAX_BITS:
            return ZERO, ZERO
        result = as_float(u32((as_uint(as_float(amax_bits) / largest) + SCALE_DROPPED) & ~SCALE_DROPPED))
        result = fmin(result, most)
        return result, ONE / result

    return scale


def quad_words(dtype: str) -> int:
    """32-bit words that four stored values take."""
    return {"f32": 4, "f16": 2, "bf16": 2, "int8": 1, "fp8": 1}[dtype]


def store_rounded(dtype: str) -> Callable[..., None]:
    """store(words, at, a, b, c, d, inverse): four values to words[at] and on; inverse: 1 / scale, if there is one."""

    @device_function
    def store_f32(words: Pointer, at: Value, a: Value, b: Value, c: Value, d: Value, inverse: Value) -> None:
        store4(words, at, as_uint(a), as_uint(b), as_uint(c), as_uint(d))

    @device_function
    def store_f16(words: Pointer, at: Value, a: Value, b: Value, c: Value, d: Value, inverse: Value) -> None:
        store2(words, at, _f16_pair(a, b), _f16_pair(c, d))

    @device_function
    def store_bf16(words: Pointer, at: Value, a: Value, b: Value, c: Value, d: Value, inverse: Value) -> None:
        store2(words, at, u32(_bf16(a) | (_bf16(b) << u32(16))), u32(_bf16(c) | (_bf16(d) << u32(16))))

    if dtype in ("f32", "f16", "bf16"):
        return {"f32": store_f32, "f16": store_f16, "bf16": store_bf16}[dtype]
    encode = _encode_int8 if dtype == "int8" else encode_e4m3

    @device_function
    def code(x: Value, inverse: Value) -> Value:
        return encode(x * inverse) if inverse != ZERO else u32(0)

    @device_function
    def store_codes(words: Pointer, at: Value, a: Value, b: Value, c: Value, d: Value, inverse: Value) -> None:
        low = code(a, inverse) | (code(b, inverse) << u32(8))
        words[at] = u32(low | (code(c, inverse) << u32(16)) | (code(d, inverse) << u32(24)))

    return store_codes


def load_stored(dtype: str) -> Callable[..., Any]:
    """load(words, at, scale) -> four float32 stored at words[at] and on; scale: of their vector, if there is one."""

    @device_function
    def load_f32(words: Pointer, at: Value, scale: Value) -> Any:
        a, b, c, d = load4(words, at)
        return as_float(a), as_float(b), as_float(c), as_float(d)

    @device_function
    def load_f16(words: Pointer, at: Value, scale: Value) -> Any:
        low, high = load2(words, at)
        a, b = unpack_f16(low)
        c, d = unpack_f16(high)
        return a, b, c, d

    @device_function
    def load_bf16(words: Pointer, at: Value, scale: Value) -> Any:
        low, high = load2(words, at)
        a, b = unpack_bf16(low)
        c, d = unpack_bf16(high)
        return a, b, c, d

    if dtype in ("f32", "f16", "bf16"):
        return {"f32": load_f32, "f16": load_f16, "bf16": load_bf16}[dtype]
    decode = _decode_int8 if dtype == "int8" else decode_e4m3

    @device_function
    def load_codes(words: Pointer, at: Value, scale: Value) -> Any:
        codes = words[at]
        return (
            decode(u32(codes & u32(0xFF))) * scale,
            decode(u32((codes >> u32(8)) & u32(0xFF))) * scale,
            decode(u32((codes >> u32(16)) & u32(0xFF))) * scale,
            decode(u32(codes >> u32(24))) * scale,
        )

    return load_codes
