"""Integer and bit instructions of PTX on numpy vectors (PTX ISA, "Integer Arithmetic", "Logic and Shift")."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cuda_kernels.emulator.ptx import SIZES, Array

_U64_1, _U64_63, _U64_255 = np.uint64(1), np.uint64(63), np.uint64(255)
_U64_ALL = ~np.uint64(0)


def _u64(x: Any) -> Array:
    return np.asarray(x).astype(np.uint64)


def shift_left(a: Any, amount: Any, bits: int) -> Array:
    """shl: 0 where the amount reaches the width."""
    shifted = np.left_shift(a, np.minimum(amount, bits - 1).astype(a.dtype))
    return np.where(amount >= bits, a.dtype.type(0), shifted)


def shift_right(a: Any, amount: Any, bits: int) -> Array:
    """shr: 0, or the sign for signed types, where the amount reaches the width."""
    shifted = np.right_shift(a, np.minimum(amount, bits - 1).astype(a.dtype))
    return shifted if a.dtype.kind == "i" else np.where(amount >= bits, a.dtype.type(0), shifted)


def divide(a: Any, b: Any) -> Array:
    """div toward zero; all ones where the divisor is 0 (PTX leaves it open)."""
    zero = b == 0
    divisor = np.where(zero, b.dtype.type(1), b)
    quotient = a // divisor
    if a.dtype.kind == "i":
        quotient = quotient + ((a - quotient * divisor != 0) & ((a < 0) != (divisor < 0)))
    return np.where(zero, ~a.dtype.type(0), quotient).astype(a.dtype)


def remainder(a: Any, b: Any) -> Array:
    """rem with the sign of the dividend; the dividend where the divisor is 0 (PTX leaves it open)."""
    zero = b == 0
    return np.where(zero, a, np.fmod(a, np.where(zero, b.dtype.type(1), b))).astype(a.dtype)


def multiply_high(a: Any, b: Any, dtype: str) -> Array:
    """mul.hi: the upper half of the product."""
    if SIZES[dtype] <= 4:
        wide = np.dtype(f"{dtype[0]}8").type
        return (np.asarray(a).astype(wide) * np.asarray(b).astype(wide) >> wide(8 * SIZES[dtype])).astype(dtype)
    ua, ub = _u64(a), _u64(b)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a_low, a_high, b_low, b_high = ua & low, ua >> half, ub & low, ub >> half
    middle = a_high * b_low + (a_low * b_low >> half)
    high = a_high * b_high + (middle >> half) + ((a_low * b_high + (middle & low)) >> half)
    if dtype == "i8":
        high = high - np.where(np.asarray(a).astype(np.int64) < 0, ub, np.uint64(0))
        high = high - np.where(np.asarray(b).astype(np.int64) < 0, ua, np.uint64(0))
    return high.astype(dtype)


def multiply_24(a: Any, b: Any, dtype: str, high: bool) -> Array:
    """mul24: the low 24 bits of both operands; the low or high 32 bits of the 48-bit product."""
    unused = np.int64(40)
    wide_a, wide_b = np.asarray(a).astype(np.int64), np.asarray(b).astype(np.int64)
    if dtype == "i4":
        product = (wide_a << unused >> unused) * (wide_b << unused >> unused)
    else:
        product = (wide_a & 0xFFFFFF) * (wide_b & 0xFFFFFF)
    return (product >> np.int64(16) if high else product).astype(dtype)


def add_carry(a: Any, b: Any, carry: Any) -> tuple[Array, Array]:
    """(sum, carry out) of unsigned vectors."""
    partial = a + b
    total = partial + carry
    return total, (partial < a) | (total < partial)


def subtract_borrow(a: Any, b: Any, borrow: Any) -> tuple[Array, Array]:
    """(difference, borrow out) of unsigned vectors."""
    partial = a - b
    return partial - borrow, (a < b) | (partial < borrow)


def add_saturating(a: Any, b: Any, subtract: bool) -> Array:
    """add.sat.s32 and sub.sat.s32."""
    wide = np.asarray(a).astype(np.int64)
    total = wide - b if subtract else wide + b
    return np.clip(total, -(2**31), 2**31 - 1).astype(np.int32)


def absolute_difference(a: Any, b: Any, c: Any) -> Array:
    """sad: c + |a - b|."""
    return (np.where(a > b, a - b, b - a) + c).astype(c.dtype)


def dot_bytes(a: Array, b: Array, c: Any, kind_a: str, kind_b: str) -> Array:
    """dp4a: c + the sum of four products of bytes. a, b: uint32 [n]."""
    wide_a = a.view(kind_a).reshape(-1, 4).astype(np.int64)
    wide_b = b.view(kind_b).reshape(-1, 4).astype(np.int64)
    return ((wide_a * wide_b).sum(axis=1) + c).astype(np.int64)


def count_ones(a: Any) -> Array:
    """popc."""
    a = np.ascontiguousarray(np.atleast_1d(a))
    return np.unpackbits(a.view(np.uint8).reshape(a.size, -1), axis=1).sum(axis=1).astype(np.uint32)


def leading_zeros(a: Any, bits: int) -> Array:
    """clz."""
    wide = _u64(np.atleast_1d(a))
    result = np.zeros(wide.shape, np.uint32)
    step = bits // 2
    width = np.uint64(bits)
    while step:
        empty = wide >> (width - np.uint64(step)) == 0
        result += np.where(empty, np.uint32(step), np.uint32(0))
        wide = np.where(empty, wide << np.uint64(step), wide) & (_U64_ALL >> (np.uint64(64) - width))
        step //= 2
    return result + (wide >> (width - _U64_1) == 0)


def find_leading(a: Any, bits: int, shift_amount: bool) -> Array:
    """bfind: the position of the leading bit that is not a sign, 0xffffffff where there is none."""
    a = np.atleast_1d(a)
    if a.dtype.kind == "i":
        a = np.where(a < 0, ~a, a).view(f"u{a.dtype.itemsize}")
    zeros = leading_zeros(a, bits)
    found = zeros if shift_amount else np.uint32(bits - 1) - zeros
    return np.where(zeros == bits, np.uint32(0xFFFFFFFF), found)


def reverse_bits(a: Any, bits: int) -> Array:
    """brev."""
    one = a.dtype.type(1)
    result = np.zeros_like(a)
    for position in range(bits):
        result |= ((a >> a.dtype.type(position)) & one) << a.dtype.type(bits - 1 - position)
    return result


def permute_bytes(a: Array, b: Array, selector: Any, mode: str) -> Array:
    """prmt.b32: four bytes picked from the eight of b:a. a, b: uint32 [n]."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros(a.shape, np.uint32)
    for byte, (pick, sign) in enumerate(_byte_selectors(selector, mode)):
        value = ((both >> (pick * np.uint64(8))) & _U64_255).astype(np.uint32)
        value = np.where(sign, np.where(value & np.uint32(128), np.uint32(255), np.uint32(0)), value)
        result |= value << np.uint32(8 * byte)
    return result


def _byte_selectors(selector: Any, mode: str) -> list[tuple[Any, Any]]:
    """(which byte, replicate its sign) for each byte of the result."""
    low = _u64(selector) & np.uint64(3)
    none = np.False_
    if mode == "":
        nibbles = [(_u64(selector) >> np.uint64(4 * byte)) & np.uint64(15) for byte in range(4)]
        return [(nibble & np.uint64(7), nibble & np.uint64(8)) for nibble in nibbles]
    picks: Callable[[int], Array] = {
        "f4e": lambda byte: low + np.uint64(byte),
        "b4e": lambda byte: (low - np.uint64(byte)) & np.uint64(7),
        "rc8": lambda byte: low,
        "ecl": lambda byte: np.maximum(low, np.uint64(byte)),
        "ecr": lambda byte: np.minimum(low, np.uint64(byte)),
        "rc16": lambda byte: (low & _U64_1) * np.uint64(2) + np.uint64(byte & 1),
    }[mode]
    return [(picks(byte), none) for byte in range(4)]


def lookup_3(a: Any, b: Any, c: Any, table: int) -> Array:
    """lop3.b32: any Boolean function of three inputs, by its truth table."""
    result = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
    for row in range(8):
        if table >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


def funnel_shift(low: Array, high: Array, amount: Any, left: bool, wrap: bool) -> Array:
    """shf: a 64-bit shift of high:low, of which one half is kept."""
    count = _u64(amount)
    count = count & np.uint64(31) if wrap else np.minimum(count, np.uint64(32))
    both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
    return ((both << count) >> np.uint64(32) if left else both >> count).astype(np.uint32)


def _field_mask(length: Array) -> Array:
    """The lowest `length` bits."""
    return np.where(length >= 64, _U64_ALL, (_U64_1 << np.minimum(length, _U64_63)) - _U64_1)


def extract_field(a: Any, position: Any, length: Any, dtype: str) -> Array:
    """bfe: the field of `length` bits from `position` on, sign-extended for signed types."""
    bits = np.uint64(8 * SIZES[dtype])
    a = np.atleast_1d(a)
    unsigned = a.view(f"u{SIZES[dtype]}").astype(np.uint64)
    position = np.broadcast_to(_u64(position) & _U64_255, a.shape)
    length = np.broadcast_to(_u64(length) & _U64_255, a.shape)
    shifted = np.where(position >= bits, np.uint64(0), unsigned >> np.minimum(position, _U64_63))
    field = shifted & _field_mask(length)
    if dtype[0] == "i":
        top = np.minimum(position + length - _U64_1, bits - _U64_1)
        negative = ((unsigned >> top) & _U64_1).astype(bool) & (length > 0)
        inside = np.where(position >= bits, np.uint64(0), np.minimum(length, bits - np.minimum(position, bits)))
        field = np.where(negative, field | ~_field_mask(inside), field)
    return field.astype(f"u{SIZES[dtype]}").view(dtype)


def insert_field(a: Array, b: Array, position: Any, length: Any) -> Array:
    """bfi: b with the low `length` bits of a at `position`."""
    bits = np.uint64(8 * a.dtype.itemsize)
    position = _u64(position) & _U64_255
    length = np.minimum(_u64(length) & _U64_255, bits)
    shift = np.minimum(position, _U64_63)
    mask = np.where(position >= bits, np.uint64(0), _field_mask(length) << shift)
    return ((_u64(b) & ~mask) | ((_u64(a) << shift) & mask)).astype(a.dtype)
