"""How each weight format is packed, and the instructions that unpack it.

Sixteen output rows form a group, and each row is one lane. A packed block holds the bytes of the sixteen rows' blocks,
interleaved unit by unit, so that one load brings the same unit of all rows. Nothing is added or lost:

    file, row r:    | d | m | word 0 | word 1 | word 2 | word 3 |             (Q4_1: 2 + 2 + 4 x 4 bytes)
    packed group:   | d of rows 0 .. 15 | m of rows 0 .. 15 | word 0 of rows 0 .. 15 | word 1 of rows 0 .. 15 | ...
    groups:         [group][block][unit][16 rows]

Nibbles and bits travel in words of 32 bits: a shift and a mask unpack a value of all rows, with no shuffling. The last
group is padded with rows of zeros. F32, F16 and BF16 have one unit per value: [group][k][16 rows].

A kernel walks k in steps of `step` values that share a scale: value = d * q, or d * q + m, with q an integer that
float32 holds exactly. `unpack` yields them with k ascending, the order of every sum over k.
Format reference: the GGUF specification and ggml's block definitions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llvmlite import ir

from tinyllm.backends.cpu_kernels.simd import (
    LANES,
    V8,
    V32,
    VF,
    VH,
    Builder,
    Value,
    const,
    const_vec,
    emit_load,
    emit_load_values,
    emit_splat,
)
from weights.quants import FORMATS

__all__ = ["PACKED", "PackedFormat", "Step"]

Quant = tuple[int, Value]  # offset of k within the step, q of the sixteen rows as float32


@dataclass(frozen=True)
class Step:
    """One step of one group: `quants` emits instructions as it is consumed, so that each q is used at once."""

    scale: Value | None  # d of the sixteen rows; None means 1
    minimum: Value | None  # m of the sixteen rows; None means 0
    quants: Iterator[Quant]


@dataclass(frozen=True)
class PackedFormat:
    """name; fields: (unit bytes, units) in file order; step: values sharing a scale; has_minimum: value = d q + m."""

    name: str
    fields: tuple[tuple[int, int], ...]
    step: int
    has_minimum: bool = False

    @property
    def dense(self) -> bool:
        return FORMATS[self.name].block_size == 1

    @property
    def group_block_nbytes(self) -> int:
        """Bytes of one packed block of sixteen rows."""
        return LANES * FORMATS[self.name].block_nbytes

    @property
    def steps_per_block(self) -> int:
        """Steps in a quantised block (a power of two)."""
        return FORMATS[self.name].block_size // self.step

    def packed_nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of a packed matrix (out, in), out being padded to whole groups."""
        return -(-shape[0] // LANES) * LANES * FORMATS[self.name].nbytes(shape[1])

    def unpack(self, b: Builder, group: Value, step: Value) -> Step:
        """Emits the unpacking of step number `step` of the group at address `group`."""
        if self.dense:
            return _dense(b, b.add(group, b.mul(step, const(self.step * self.group_block_nbytes))), self)
        per_block = self.steps_per_block
        shift = const(per_block.bit_length() - 1)
        block = b.add(group, b.mul(b.lshr(step, shift), const(self.group_block_nbytes)))
        return _UNPACK[self.name](b, block, b.and_(step, const(per_block - 1)))


def _half(b: Builder, block: Value, offset: int) -> Value:
    """Sixteen float16 at `offset` bytes of a row's block."""
    return b.fpext(emit_load(b, block, VH, LANES * offset), VF)


def _bytes(b: Builder, block: Value, offset: int) -> Value:
    return emit_load(b, block, V8, LANES * offset)


def _words(b: Builder, block: Value, offset: int) -> Value:
    return emit_load(b, block, V32, LANES * offset)


def _signed(b: Builder, x: Value) -> Value:
    return b.sitofp(b.sext(x, V32), VF)


def _unsigned(b: Builder, x: Value) -> Value:
    return b.sitofp(b.zext(x, V32), VF)


def _bits(b: Builder, words: Value, shift: int, mask: int) -> Value:
    """(words >> shift) & mask; a negative shift goes left."""
    if shift > 0:
        words = b.lshr(words, const_vec(V32, shift))
    elif shift < 0:
        words = b.shl(words, const_vec(V32, -shift))
    return b.and_(words, const_vec(V32, mask))


def _shifted(b: Builder, words: Value, shift: Value) -> Value:
    """words >> shift, an i64 known at run time"""
    return b.lshr(words, emit_splat(b, b.trunc(shift, ir.IntType(32)), V32))


def _nibbles(b: Builder, block: Value, offset: int) -> Iterator[Quant]:
    """The low nibbles of sixteen bytes, then the high ones, as integers."""
    for k in range(32):
        yield k, _bits(b, _words(b, block, offset + k % 16 // 4 * 4), k % 4 * 8 + k // 16 * 4, 15)


def _dense(b: Builder, address: Value, form: PackedFormat) -> Step:
    dtype = form.name.lower()
    stride = form.group_block_nbytes
    return Step(None, None, ((k, emit_load_values(b, address, dtype, stride * k)) for k in range(form.step)))


def _q8_0(b: Builder, block: Value, step: Value) -> Step:
    """| d | 32 int8 |"""
    return Step(_half(b, block, 0), None, ((k, _signed(b, _bytes(b, block, 2 + k))) for k in range(32)))


def _q4_0(b: Builder, block: Value, step: Value) -> Step:
    """| d | 16 bytes: k low, k + 16 high |, q - 8"""
    eight = const_vec(V32, 8)
    return Step(_half(b, block, 0), None, ((k, b.sitofp(b.sub(q, eight), VF)) for k, q in _nibbles(b, block, 2)))


def _q4_1(b: Builder, block: Value, step: Value) -> Step:
    """| d | m | 16 bytes: k low, k + 16 high |"""
    return Step(_half(b, block, 0), _half(b, block, 2), ((k, b.sitofp(q, VF)) for k, q in _nibbles(b, block, 4)))


def _q5(b: Builder, block: Value, offset: int) -> Iterator[Quant]:
    """| uint32: bit k is bit 4 of value k | 16 bytes: k low, k + 16 high |"""
    bits = _words(b, block, offset)
    for k, q in _nibbles(b, block, offset + 4):
        yield k, b.or_(q, _bits(b, bits, k - 4, 16))


def _q5_0(b: Builder, block: Value, step: Value) -> Step:
    """| d | bits and bytes of _q5 |, q - 16"""
    sixteen = const_vec(V32, 16)
    return Step(_half(b, block, 0), None, ((k, b.sitofp(b.sub(q, sixteen), VF)) for k, q in _q5(b, block, 2)))


def _q5_1(b: Builder, block: Value, step: Value) -> Step:
    """| d | m | bits and bytes of _q5 |"""
    return Step(_half(b, block, 0), _half(b, block, 2), ((k, b.sitofp(q, VF)) for k, q in _q5(b, block, 4)))


def _k_scales(b: Builder, block: Value, step: Value) -> tuple[Value, Value]:
    """d * scale and -dmin * min of sub-block `step` of a Q4_K or Q5_K block, whose 12 bytes hold 8 + 8 six-bit numbers.

    byte i < 4:  scale i, bits 0-5      | scale i + 4, bits 4-5 (in its bits 6-7)
    byte i + 4:  min i, bits 0-5        | min i + 4, bits 4-5 (in its bits 6-7)
    byte i + 8:  scale i + 4, bits 0-3  | min i + 4, bits 0-3 (in its bits 4-7)
    """
    at = b.add(block, b.mul(b.and_(step, const(3)), const(LANES)))  # of byte i = step % 4
    scales, mins, extra = (_bytes(b, at, 4 + 4 * i) for i in range(3))
    four, six = const_vec(V8, 4), const_vec(V8, 6)
    first = b.icmp_unsigned("<", step, const(4))

    def six_bits(x: Value, low_bits: Value) -> Value:
        above = b.or_(low_bits, b.shl(b.lshr(x, six), four))
        return b.select(first, b.and_(x, const_vec(V8, 63)), above)

    scale = six_bits(scales, b.and_(extra, const_vec(V8, 15)))
    minimum = six_bits(mins, b.lshr(extra, four))
    d = b.fmul(_half(b, block, 0), _unsigned(b, scale))
    return d, b.fneg(b.fmul(_half(b, block, 2), _unsigned(b, minimum)))


def _k_nibbles(b: Builder, block: Value, offset: int, step: Value) -> Iterator[Quant]:
    """Sub-block `step`: the low nibbles of 32 bytes are one sub-block, the high nibbles the next."""
    at = b.add(block, b.mul(b.lshr(step, const(1)), const(32 * LANES)))
    shift = b.mul(b.and_(step, const(1)), const(4))
    for k in range(0, 32, 4):
        words = _shifted(b, _words(b, at, offset + k), shift)
        for i in range(4):
            yield k + i, _bits(b, words, 8 * i, 15)


def _q4_k(b: Builder, block: Value, step: Value) -> Step:
    """| d | dmin | 12 bytes of scales and mins | 4 x 32 bytes: two sub-blocks of nibbles each |"""
    d, m = _k_scales(b, block, step)
    return Step(d, m, ((k, b.sitofp(q, VF)) for k, q in _k_nibbles(b, block, 16, step)))


def _q5_k(b: Builder, block: Value, step: Value) -> Step:
    """| d | dmin | 12 bytes of scales and mins | 32 bytes: bit j of byte k is bit 4 of sub-block j | as Q4_K's |"""
    d, m = _k_scales(b, block, step)

    def quants() -> Iterator[Quant]:
        for k, q in _k_nibbles(b, block, 48, step):
            bits = _shifted(b, _words(b, block, 16 + k // 4 * 4), step)
            yield k, b.sitofp(b.or_(q, _bits(b, bits, k % 4 * 8 - 4, 16)), VF)

    return Step(d, m, quants())


def _q6_k(b: Builder, block: Value, step: Value) -> Step:
    """| 2 x 64 bytes: low nibbles | 2 x 32 bytes: high pairs of bits | 16 int8 scales | d |, q - 32

    Each half holds 128 values in four quarters of 32. Quarters 0 and 1 are the low nibbles of the half's 64 bytes,
    2 and 3 the high ones; quarter j's upper bits are bits 2j, 2j + 1 of the half's 32 bytes. A scale covers 16 values.
    """
    half, quarter = b.lshr(step, const(3)), b.and_(b.lshr(step, const(1)), const(3))
    start = b.mul(b.and_(step, const(1)), const(16))  # of the step's 16 values in its quarter
    low_at = b.add(b.add(b.mul(half, const(64)), b.mul(b.and_(quarter, const(1)), const(32))), start)
    high_at = b.add(b.mul(half, const(32)), start)
    low, high = (b.add(block, b.mul(at, const(LANES))) for at in (low_at, high_at))
    low_shift, high_shift = b.mul(b.lshr(quarter, const(1)), const(4)), b.mul(quarter, const(2))

    def quants() -> Iterator[Quant]:
        for k in range(0, 16, 4):
            nibbles = _shifted(b, _words(b, low, k), low_shift)
            pairs = _shifted(b, _words(b, high, 128 + k), high_shift)
            for i in range(4):
                q = b.or_(_bits(b, nibbles, 8 * i, 15), _bits(b, pairs, 8 * i - 4, 48))
                yield k + i, b.sitofp(b.sub(q, const_vec(V32, 32)), VF)

    scale = _signed(b, _bytes(b, b.add(block, b.mul(step, const(LANES))), 192))
    return Step(b.fmul(_half(b, block, 208), scale), None, quants())


_UNPACK = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}

PACKED: dict[str, PackedFormat] = {
    f.name: f
    for f in (
        PackedFormat("F32", ((4, 1),), 32),
        PackedFormat("F16", ((2, 1),), 32),
        PackedFormat("BF16", ((2, 1),), 32),
        PackedFormat("Q8_0", ((2, 1), (1, 32)), 32),
        PackedFormat("Q4_0", ((2, 1), (4, 4)), 32),
        PackedFormat("Q4_1", ((2, 2), (4, 4)), 32, has_minimum=True),
        PackedFormat("Q5_0", ((2, 1), (4, 5)), 32),
        PackedFormat("Q5_1", ((2, 2), (4, 5)), 32, has_minimum=True),
        PackedFormat("Q4_K", ((2, 2), (1, 12), (4, 32)), 32, has_minimum=True),
        PackedFormat("Q5_K", ((2, 2), (1, 12), (4, 40)), 32, has_minimum=True),
        PackedFormat("Q6_K", ((4, 48), (1, 16), (2, 1)), 16),
    )
}
