"""Device functions of the tensor-core products: from packed weights to A operands, and the sums that use them.

A step is 32 columns: two k-tiles, half a tile of 64 columns, one block of the 32-column formats. `unpack` makes the
step's eight A registers from packed words. Integers become float16 by putting their bits under the exponent of 1024,
whose last place is 1 (or 16, for bits four places up), and taking 1024 off in the same fused operation:

    low nibble  | 0x6400 = 1024 + q                    high nibble in place | 0x6400 = 1024 + 16 q

What the tensor core multiplies with, all exact in float16 but for one case:

    f16, bf16        the weight
    Q8_0 to Q5_1     q - zero. Each block is a chain of its own from 0, and slice = fma(d, block, slice); m is added as
                     one more product, of m (float16) and the block's sum of x (a float16, and the float16 of the rest)
    Q4_K, Q5_K       scale * q <= 63 * 31, all of the slice one chain; slice = d * chain - dmin * (the product of minima
                     and sums)
    Q6_K             scale * (q - 32), rounded to float16 where it is above 2048; slice = d * chain

so each weight enters with its exact value, except for Q6_K's largest, which are off by at most 2 ** -11 of themselves.
Magic numbers: Kim et al., "Who Says Elephants Can't Run: Bringing Large Scale MoE Models into Cloud Scale Production",
2022.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba.cuda import types

from cuda_kernels.linear_forms import Form
from cuda_kernels.primitives import (
    Value,
    and_or,
    byte_permute,
    device_function,
    fma,
    fma_f16x2,
    mma_bf16,
    mma_f16,
    unpack_f16,
)

__all__ = ["Fragments", "fragments", "magic_exponent", "minima_selector"]

i32, u32 = types.int32, types.uint32
ZERO = np.float32(0)


def _pair(value: float) -> np.uint32:
    """A pair of equal float16."""
    half = np.float16(value)
    assert float(half) == value
    return np.uint32(int(half.view(np.uint16)) * 0x10001)


ONE, SIXTEENTH, NOTHING = _pair(1), _pair(1 / 16), np.uint32(0)
EXPONENT = _pair(1024)  # 0x6400
LOW, NEXT, LOW_BYTES = np.uint32(0x000F000F), np.uint32(0x00F000F0), np.uint32(0x00FF00FF)
FIFTH, NEXT_FIFTH = np.uint32(0x00100010), np.uint32(0x01000100)
UPPER, NEXT_UPPER = np.uint32(0x00300030), np.uint32(0x03000300)
EVEN_BYTES, ODD_BYTES = (
    np.uint32(0x5250),
    np.uint32(0x5351),
)  # for byte_permute(word, EXPONENT, ...): two bytes as a pair
BOTH = 0x5050  # plus 0x0101 k: byte k twice
MINUS_64, MINUS_1024, MINUS_1152 = _pair(-64), _pair(-1024), _pair(-1152)
SIX_BITS, FOUR_BITS, TOP_BITS = np.uint32(0x3F3F3F3F), np.uint32(0x0F0F0F0F), np.uint32(0x30303030)


class Fragments(NamedTuple):
    """The device functions of one form. Arrays are the caller's local arrays; indices into them fold away.

    unpack(raw, at, high, half, s0, s1, magic, a): the step's words raw[at:], upper bits `high` (a word), scales s0 and
    s1 of the rows
        g and g + 8 in this tile (a word each) -> a[0:4], a[4:8]. magic: of `magic_exponent`.
    multiply(a, b0, b1, b2, b3, half, s0, s1, acc, at): adds the step's products to acc[at:at + 4].
    finish(acc, at, d, m, sum0, sum1): makes the slice's sum of acc[at:at + 4], given d and m as `header` left them.
    tile_scales(w0, w1, w2, w3, tile): the word of `scales` for a tile, of the four of a row.
    header(r0, r8, extra0, extra1, selector, d, m): from the scale words of rows g and g + 8 and the extra words: d[0:2]
        float32, m[0:2] pairs of float16.
    """

    unpack: Any
    multiply: Any
    finish: Any
    tile_scales: Any
    header: Any


@device_function
def magic_exponent(count: Value) -> Value:
    """EXPONENT, given any number from 0 up: as a value that the assembler cannot fold, it stays in a register. As a
    constant it
    would go into the and-or's one immediate operand, and the mask be moved to a register again for each."""
    return u32(EXPONENT | u32(count) >> u32(31))


@device_function
def minima_selector(t: Value) -> Value:
    """For byte_permute over minima 0 to 7: number 2t into byte 0, 2t + 1 into byte 2."""
    return u32(2 * t | (2 * t + 1) << 8)


# ---- upper bits: or-ed into the nibbles' pairs, four places above the lowest bit of each


@device_function
def _nibble_pairs(word: Value, magic: Value) -> Any:
    """(1024 + q0, 1024 + 16 q1, 1024 + q2, 1024 + 16 q3), each a pair."""
    above = u32(word >> u32(8))
    return (
        and_or(word, LOW, magic),
        and_or(word, NEXT, magic),
        and_or(above, LOW, magic),
        and_or(above, NEXT, magic),
    )


@device_function
def _fifth_bits(high: Value, half: Value, kt: Value, p: Any) -> Any:
    """Bits 8 half + 4 (i % 2) + 2 kt + i // 2 of both halves of the word."""
    if half == 0:
        first, second = u32(high << u32(4 - 2 * kt)), u32(high << u32(3 - 2 * kt))
    else:
        first, second = u32(high >> u32(4 + 2 * kt)), u32(high >> u32(5 + 2 * kt))
    return (
        and_or(first, FIFTH, p[0]),
        and_or(first, NEXT_FIFTH, p[1]),
        and_or(second, FIFTH, p[2]),
        and_or(second, NEXT_FIFTH, p[3]),
    )


@device_function
def _upper_pairs(high: Value, half: Value, kt: Value, p: Any) -> Any:
    """Bits 8 kt + 4 (i % 2) + 2 (i // 2) and the next of both halves of the word."""
    if kt == 0:
        first, second = u32(high << u32(4)), u32(high << u32(2))
    else:
        first, second = u32(high >> u32(4)), u32(high >> u32(6))
    return (
        and_or(first, UPPER, p[0]),
        and_or(first, NEXT_UPPER, p[1]),
        and_or(second, UPPER, p[2]),
        and_or(second, NEXT_UPPER, p[3]),
    )


@device_function
def _no_bits(high: Value, half: Value, kt: Value, p: Any) -> Any:
    return p


# ---- A operands


def _unpack_dense() -> Any:
    @device_function
    def unpack(raw: Any, at: Value, high: Value, half: Value, s0: Value, s1: Value, magic: Value, a: Any) -> None:
        for i in range(8):
            a[i] = raw[at + i]

    return unpack


def _unpack_bytes() -> Any:
    @device_function
    def unpack(raw: Any, at: Value, high: Value, half: Value, s0: Value, s1: Value, magic: Value, a: Any) -> None:
        for i in range(4):
            word = raw[at + i]
            a[2 * i] = fma_f16x2(byte_permute(word, magic, EVEN_BYTES), ONE, MINUS_1152)
            a[2 * i + 1] = fma_f16x2(byte_permute(word, magic, ODD_BYTES), ONE, MINUS_1152)

    return unpack


def _unpack_blocks(form: Form) -> Any:
    upper = _fifth_bits if form.bits == 5 else _no_bits
    zero, zero_next = _pair(-1024 - form.zero), _pair(-64 - form.zero)

    @device_function
    def unpack(raw: Any, at: Value, high: Value, half: Value, s0: Value, s1: Value, magic: Value, a: Any) -> None:
        for kt in range(2):
            p = upper(high, half, kt, _nibble_pairs(raw[at + kt], magic))
            a[4 * kt] = fma_f16x2(p[0], ONE, zero)
            a[4 * kt + 1] = fma_f16x2(p[1], SIXTEENTH, zero_next)
            a[4 * kt + 2] = fma_f16x2(p[2], ONE, zero)
            a[4 * kt + 3] = fma_f16x2(p[3], SIXTEENTH, zero_next)

    return unpack


def _unpack_super(form: Form) -> Any:
    upper = _fifth_bits if form.bits == 5 else _no_bits

    @device_function
    def unpack(raw: Any, at: Value, high: Value, half: Value, s0: Value, s1: Value, magic: Value, a: Any) -> None:
        selector = u32(BOTH + 0x0101 * half)
        scale = fma_f16x2(byte_permute(s0, magic, selector), ONE, MINUS_1024)
        next_scale = fma_f16x2(byte_permute(s1, magic, selector), SIXTEENTH, MINUS_64)  # scale / 16
        offset = fma_f16x2(scale, MINUS_1024, NOTHING)
        next_offset = fma_f16x2(next_scale, MINUS_1024, NOTHING)
        for kt in range(2):
            p = upper(high, half, kt, _nibble_pairs(raw[at + kt], magic))
            a[4 * kt] = fma_f16x2(p[0], scale, offset)
            a[4 * kt + 1] = fma_f16x2(p[1], next_scale, next_offset)
            a[4 * kt + 2] = fma_f16x2(p[2], scale, offset)
            a[4 * kt + 3] = fma_f16x2(p[3], next_scale, next_offset)

    return unpack


def _unpack_q6_k(form: Form) -> Any:
    zero, zero_next = _pair(-1024 - form.zero), _pair(-64 - form.zero)

    @device_function
    def unpack(raw: Any, at: Value, high: Value, half: Value, s0: Value, s1: Value, magic: Value, a: Any) -> None:
        for kt in range(2):
            selector = u32(BOTH + 0x0101 * (2 * half + kt))
            scale = fma_f16x2(byte_permute(s0, magic, selector), ONE, MINUS_1152)
            next_scale = fma_f16x2(byte_permute(s1, magic, selector), ONE, MINUS_1152)
            p = _upper_pairs(high, half, kt, _nibble_pairs(raw[at + kt], magic))
            a[4 * kt] = fma_f16x2(fma_f16x2(p[0], ONE, zero), scale, NOTHING)
            a[4 * kt + 1] = fma_f16x2(fma_f16x2(p[1], SIXTEENTH, zero_next), next_scale, NOTHING)
            a[4 * kt + 2] = fma_f16x2(fma_f16x2(p[2], ONE, zero), scale, NOTHING)
            a[4 * kt + 3] = fma_f16x2(fma_f16x2(p[3], SIXTEENTH, zero_next), next_scale, NOTHING)

    return unpack


# ---- sums


def _multiply_chain(mma: Any) -> Any:
    @device_function
    def multiply(
        a: Any, b0: Value, b1: Value, b2: Value, b3: Value, half: Value, s0: Value, s1: Value, acc: Any, at: Value
    ) -> None:
        c = mma(a[0], a[1], a[2], a[3], b0, b1, acc[at], acc[at + 1], acc[at + 2], acc[at + 3])
        c = mma(a[4], a[5], a[6], a[7], b2, b3, c[0], c[1], c[2], c[3])
        acc[at], acc[at + 1], acc[at + 2], acc[at + 3] = c

    return multiply


def _multiply_block() -> Any:
    @device_function
    def multiply(
        a: Any, b0: Value, b1: Value, b2: Value, b3: Value, half: Value, s0: Value, s1: Value, acc: Any, at: Value
    ) -> None:
        c = mma_f16(a[0], a[1], a[2], a[3], b0, b1, ZERO, ZERO, ZERO, ZERO)
        c = mma_f16(a[4], a[5], a[6], a[7], b2, b3, c[0], c[1], c[2], c[3])
        low, high = unpack_f16(s0)
        d0 = low if half == 0 else high
        low, high = unpack_f16(s1)
        d8 = low if half == 0 else high
        acc[at] = fma(d0, c[0], acc[at])
        acc[at + 1] = fma(d0, c[1], acc[at + 1])
        acc[at + 2] = fma(d8, c[2], acc[at + 2])
        acc[at + 3] = fma(d8, c[3], acc[at + 3])

    return multiply


@device_function
def _finish_plain(acc: Any, at: Value, d: Any, m: Any, sum0: Value, sum1: Value) -> None:
    pass


@device_function
def _finish_minima(acc: Any, at: Value, d: Any, m: Any, sum0: Value, sum1: Value) -> None:
    c = mma_f16(m[0], m[1], m[0], m[1], sum0, sum1, acc[at], acc[at + 1], acc[at + 2], acc[at + 3])
    acc[at], acc[at + 1], acc[at + 2], acc[at + 3] = c


@device_function
def _finish_super(acc: Any, at: Value, d: Any, m: Any, sum0: Value, sum1: Value) -> None:
    c = mma_f16(m[0], m[1], m[0], m[1], sum0, sum1, ZERO, ZERO, ZERO, ZERO)
    acc[at] = fma(-d[2], c[0], d[0] * acc[at])
    acc[at + 1] = fma(-d[2], c[1], d[0] * acc[at + 1])
    acc[at + 2] = fma(-d[3], c[2], d[1] * acc[at + 2])
    acc[at + 3] = fma(-d[3], c[3], d[1] * acc[at + 3])


@device_function
def _finish_q6_k(acc: Any, at: Value, d: Any, m: Any, sum0: Value, sum1: Value) -> None:
    acc[at] = d[0] * acc[at]
    acc[at + 1] = d[0] * acc[at + 1]
    acc[at + 2] = d[1] * acc[at + 2]
    acc[at + 3] = d[1] * acc[at + 3]


# ---- headers


@device_function
def _tile_word(w0: Value, w1: Value, w2: Value, w3: Value, tile: Value) -> Any:
    low = w0 if tile == 0 else w1
    high = w2 if tile == 2 else w3
    return low if tile < 2 else high


@device_function
def _super_scales(w1: Value, w2: Value, w3: Value) -> Any:
    """Scales 0-3 and 4-7 of a Q4_K or Q5_K header, a byte each: six bits, of which the last four have two in bytes
    0-3."""
    return u32(w1 & SIX_BITS), u32(w3 & FOUR_BITS | w1 >> u32(2) & TOP_BITS)


@device_function
def _super_minima(w1: Value, w2: Value, w3: Value) -> Any:
    return u32(w2 & SIX_BITS), u32(w3 >> u32(4) & FOUR_BITS | w2 >> u32(2) & TOP_BITS)


@device_function
def _tile_super(w0: Value, w1: Value, w2: Value, w3: Value, tile: Value) -> Any:
    """The two scales of a tile in the low bytes."""
    first, last = _super_scales(w1, w2, w3)
    both = first if tile < 2 else last
    return u32(both >> u32(16 * (tile & 1)))


@device_function
def _header_none(r0: Any, r8: Any, extra0: Value, extra1: Value, selector: Value, d: Any, m: Any) -> None:
    pass


@device_function
def _header_minima(r0: Any, r8: Any, extra0: Value, extra1: Value, selector: Value, d: Any, m: Any) -> None:
    m[0], m[1] = extra0, extra1


@device_function
def _header_super(r0: Any, r8: Any, extra0: Value, extra1: Value, selector: Value, d: Any, m: Any) -> None:
    d[0], d[2] = unpack_f16(r0[0])
    d[1], d[3] = unpack_f16(r8[0])
    low, high = _super_minima(r0[1], r0[2], r0[3])
    m[0] = fma_f16x2(u32(byte_permute(low, high, selector) & LOW_BYTES | EXPONENT), ONE, MINUS_1024)
    low, high = _super_minima(r8[1], r8[2], r8[3])
    m[1] = fma_f16x2(u32(byte_permute(low, high, selector) & LOW_BYTES | EXPONENT), ONE, MINUS_1024)


@device_function
def _header_q6_k(r0: Any, r8: Any, extra0: Value, extra1: Value, selector: Value, d: Any, m: Any) -> None:
    d[0], d[1] = unpack_f16(extra0)


def fragments(form: Form) -> Fragments:
    """The device functions of a tensor-core form."""
    if form.bits == 16:
        mma = mma_bf16 if form.name == "bf16" else mma_f16
        return Fragments(_unpack_dense(), _multiply_chain(mma), _finish_plain, _tile_word, _header_none)
    if form.scaling == "block":
        unpack = _unpack_bytes() if form.bits == 8 else _unpack_blocks(form)
        finish, header = (_finish_minima, _header_minima) if form.minima else (_finish_plain, _header_none)
        return Fragments(unpack, _multiply_block(), finish, _tile_word, header)
    if form.bits == 6:
        return Fragments(_unpack_q6_k(form), _multiply_chain(mma_f16), _finish_q6_k, _tile_word, _header_q6_k)
    return Fragments(_unpack_super(form), _multiply_chain(mma_f16), _finish_super, _tile_super, _header_super)
