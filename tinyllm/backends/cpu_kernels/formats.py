"""How each weight format is packed, and the instructions that unpack it.

Sixteen output rows form a group, and each row is one lane. A packed block holds the bytes of the sixteen rows' blocks,
interleaved unit by unit, so that one load brings the same unit of all rows. Nothing is added or lost:

    file, row r:    | d | m | word 0 | word 1 | word 2 | word 3 |             (Q4_1: 2 + 2 + 4 x 4 bytes)
    packed group:   | d of rows 0 .. 15 | m of rows 0 .. 15 | word 0 of rows 0 .. 15 | word 1 of rows 0 .. 15 | ...
    groups:         [group][block][unit][16 rows]

Integers travel in words of 32 bits: a shift and a mask unpack four values of all rows, one in each byte, with no
shuffling. The last group is padded with rows of zeros. F32, F16 and BF16 have one unit per value: [group][k][16 rows].

A kernel walks k in steps of `step` values that share a scale: value = d * q, or d * q + m, with q = code - offset and
code an unsigned byte. `unpack` yields four codes at a time with k ascending.
Format reference: the GGUF specification and ggml's block definitions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from llvmlite import ir

from tinyllm.backends.cpu_kernels.half import emit_float_of_half
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
    emit_prefetch,
    emit_splat,
)
from weights.quants import FORMATS

__all__ = ["PACKED", "PackedFormat", "Step"]

_AHEAD_NBYTES = 4096

Quant = tuple[int, Value]  # offset of k within the step, q of the sixteen rows as float32
Word = tuple[int, Value]  # the same of the first of four codes, one in each byte of sixteen int32


@dataclass(frozen=True)
class Step:
    """One step of one group; the iterators emit instructions as they are consumed, so that each value is used at once.

    Attributes:
        scale: d of the sixteen rows; None means 1.
        minimum: m of the sixteen rows; None means 0.
        words: the codes; none of a dense format.
        offset: what a code exceeds its integer by.
        dense: the values of a dense format.
    """

    scale: Value | None
    minimum: Value | None
    words: Iterator[Word]
    offset: int = 0
    dense: Iterator[Quant] | None = None

    def quants(self, b: Builder) -> Iterator[Quant]:
        """q of every k, ascending, as float32, which holds it exactly."""
        if self.dense is not None:
            yield from self.dense
            return
        for k, word in self.words:
            for i in range(4):
                code = _bits(b, word, 8 * i, 255)
                q = b.sub(code, const_vec(V32, self.offset)) if self.offset else code
                yield k + i, b.sitofp(q, VF)


@dataclass(frozen=True)
class PackedFormat:
    """How one format is packed.

    Attributes:
        fields: (unit bytes, units) in file order.
        step: values that share a scale.
        has_minimum: value = d q + m.
        offset: what a code exceeds its integer by; bits: of a code.
    """

    name: str
    fields: tuple[tuple[int, int], ...]
    step: int
    has_minimum: bool = False
    offset: int = 0
    bits: int = 4

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

    def prefetch(self, b: Builder, group: Value, step: Value) -> None:
        """Asks for the weights that follow _AHEAD_NBYTES after step number `step`.

        Left to itself the CPU looks ahead no further than a page, and waits for memory a third of the time.
        """
        nbytes = self.group_block_nbytes // self.steps_per_block
        at = b.add(group, b.add(b.mul(step, const(nbytes)), const(_AHEAD_NBYTES)))
        for line in range(0, nbytes, 64):
            emit_prefetch(b, b.add(at, const(line)))

    def unpack(self, b: Builder, group: Value, step: Value) -> Step:
        """Emits the unpacking of step number `step` of the group at address `group`."""
        if self.dense:
            return _dense(b, b.add(group, b.mul(step, const(self.step * self.group_block_nbytes))), self)
        per_block = self.steps_per_block
        shift = const(per_block.bit_length() - 1)
        block = b.add(group, b.mul(b.lshr(step, shift), const(self.group_block_nbytes)))
        unpacked = _UNPACK[self.name](b, block, b.and_(step, const(per_block - 1)))
        return replace(unpacked, offset=self.offset)


def _half(b: Builder, block: Value, offset: int) -> Value:
    """Sixteen float16 at `offset` bytes of a row's block."""
    return emit_float_of_half(b, emit_load(b, block, VH, LANES * offset))


def _bytes(b: Builder, block: Value, offset: int) -> Value:
    return emit_load(b, block, V8, LANES * offset)


def _words(b: Builder, block: Value, offset: int) -> Value:
    return emit_load(b, block, V32, LANES * offset)


def _signed(b: Builder, x: Value) -> Value:
    return b.sitofp(b.sext(x, V32), VF)


def _unsigned(b: Builder, x: Value) -> Value:
    return b.sitofp(b.zext(x, V32), VF)


def _bits(b: Builder, words: Value, shift: int, mask: int) -> Value:
    """(words >> shift) & mask"""
    if shift > 0:
        words = b.lshr(words, const_vec(V32, shift))
    return b.and_(words, const_vec(V32, mask))


def _shifted(b: Builder, words: Value, shift: Value) -> Value:
    """words >> shift, an i64 known at run time"""
    return b.lshr(words, emit_splat(b, b.trunc(shift, ir.IntType(32)), V32))


def _nibbles(b: Builder, block: Value, offset: int) -> Iterator[Word]:
    """The low nibbles of sixteen bytes, then the high ones."""
    for k in range(0, 32, 4):
        yield k, _bits(b, _words(b, block, offset + k % 16), k // 16 * 4, 0x0F0F0F0F)


def _dense(b: Builder, address: Value, form: PackedFormat) -> Step:
    dtype = form.name.lower()
    stride = form.group_block_nbytes
    values = ((k, emit_load_values(b, address, dtype, stride * k)) for k in range(form.step))
    return Step(None, None, iter(()), dense=values)


def _q8_0(b: Builder, block: Value, step: Value) -> Step:
    """| d | 32 int8 |, here as code - 128"""
    sign = const_vec(V32, 0x80808080)
    return Step(_half(b, block, 0), None, ((k, b.xor(_words(b, block, 2 + k), sign)) for k in range(0, 32, 4)))


def _q4_0(b: Builder, block: Value, step: Value) -> Step:
    """| d | 16 bytes: k low, k + 16 high |, q - 8"""
    return Step(_half(b, block, 0), None, _nibbles(b, block, 2))


def _q4_1(b: Builder, block: Value, step: Value) -> Step:
    """| d | m | 16 bytes: k low, k + 16 high |"""
    return Step(_half(b, block, 0), _half(b, block, 2), _nibbles(b, block, 4))


def _q5(b: Builder, block: Value, offset: int) -> Iterator[Word]:
    """| uint32: bit k is bit 4 of value k | 16 bytes: k low, k + 16 high |

    A product spreads four bits over four bytes: bit i, times 2**(4 + 7 i), is bit 4 of byte i.
    """
    bits = _words(b, block, offset)
    spread = const_vec(V32, 1 << 4 | 1 << 11 | 1 << 18 | 1 << 25)
    for k, codes in _nibbles(b, block, offset + 4):
        upper = b.and_(b.mul(_bits(b, bits, k, 15), spread), const_vec(V32, 0x10101010))
        yield k, b.or_(codes, upper)


def _q5_0(b: Builder, block: Value, step: Value) -> Step:
    """| d | bits and bytes of _q5 |, q - 16"""
    return Step(_half(b, block, 0), None, _q5(b, block, 2))


def _q5_1(b: Builder, block: Value, step: Value) -> Step:
    """| d | m | bits and bytes of _q5 |"""
    return Step(_half(b, block, 0), _half(b, block, 2), _q5(b, block, 4))


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


def _k_nibbles(b: Builder, block: Value, offset: int, step: Value) -> Iterator[Word]:
    """Sub-block `step`: the low nibbles of 32 bytes are one sub-block, the high nibbles the next."""
    at = b.add(block, b.mul(b.lshr(step, const(1)), const(32 * LANES)))
    shift = b.mul(b.and_(step, const(1)), const(4))
    for k in range(0, 32, 4):
        yield k, _bits(b, _shifted(b, _words(b, at, offset + k), shift), 0, 0x0F0F0F0F)


def _q4_k(b: Builder, block: Value, step: Value) -> Step:
    """| d | dmin | 12 bytes of scales and mins | 4 x 32 bytes: two sub-blocks of nibbles each |"""
    d, m = _k_scales(b, block, step)
    return Step(d, m, _k_nibbles(b, block, 16, step))


def _q5_k(b: Builder, block: Value, step: Value) -> Step:
    """| d | dmin | 12 bytes of scales and mins | 32 bytes: bit j of byte k is bit 4 of sub-block j | as Q4_K's |"""
    d, m = _k_scales(b, block, step)

    def words() -> Iterator[Word]:
        for k, codes in _k_nibbles(b, block, 48, step):
            bits = _bits(b, _shifted(b, _words(b, block, 16 + k), step), 0, 0x01010101)
            yield k, b.or_(codes, b.shl(bits, const_vec(V32, 4)))

    return Step(d, m, words())


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

    def words() -> Iterator[Word]:
        for k in range(0, 16, 4):
            nibbles = _bits(b, _shifted(b, _words(b, low, k), low_shift), 0, 0x0F0F0F0F)
            pairs = _bits(b, _shifted(b, _words(b, high, 128 + k), high_shift), 0, 0x03030303)
            yield k, b.or_(nibbles, b.shl(pairs, const_vec(V32, 4)))

    scale = _signed(b, _bytes(b, b.add(block, b.mul(step, const(LANES))), 192))
    return Step(b.fmul(_half(b, block, 208), scale), None, words())


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
        PackedFormat("Q8_0", ((2, 1), (4, 8)), 32, offset=128, bits=8),
        PackedFormat("Q4_0", ((2, 1), (4, 4)), 32, offset=8),
        PackedFormat("Q4_1", ((2, 2), (4, 4)), 32, has_minimum=True),
        PackedFormat("Q5_0", ((2, 1), (4, 5)), 32, offset=16, bits=5),
        PackedFormat("Q5_1", ((2, 2), (4, 5)), 32, has_minimum=True, bits=5),
        PackedFormat("Q4_K", ((2, 2), (1, 12), (4, 32)), 32, has_minimum=True),
        PackedFormat("Q5_K", ((2, 2), (1, 12), (4, 40)), 32, has_minimum=True, bits=5),
        PackedFormat("Q6_K", ((4, 48), (1, 16), (2, 1)), 16, offset=32, bits=6),
    )
}
