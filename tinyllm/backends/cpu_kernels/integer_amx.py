"""The products of `integer_linear.py` on AMX, the matrix unit of some x86 CPUs: the same integers, so the same bits.

For codes of four bits. A tile register holds 16 rows of up to 64 bytes. One instruction adds a step's products to the
sums of sixteen rows and sixteen outputs:

    C (16 rows, 16 outputs) int32  +=  A (16 rows, K digits) int8  x  B (K codes, 16 outputs) uint8

    one digit      K = 32   A  | X |                        B  [k / 4][16 outputs][4 codes]
    three digits   K = 64   A  | H0 | H1 |, then | L0 | L1 |   B  the same twice: codes times 16, then as they are

Three digits come as the four of `digits.quantise_halves`: 16 * code with a half's upper digit and code with its lower
one are code with the half, so that two instructions do what would take three. S = 2**12 C_H + C_L is rounded to float32
once, as `integer_linear` does it for codes of four bits. C goes by way of memory, since scales are float32's business.

Nothing waits for a result: while step i is scaled and added up in vector registers, the sums of step i + 1 are stored
and those of step i + 2 begun.
Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18, and volume 2, TDPBSUD.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from llvmlite import ir

from tinyllm.backends.cpu_kernels.deferred import types
from tinyllm.backends.cpu_kernels.digits import HALVES_NBYTES, TILE_ROWS, record_nbytes, scale_at
from tinyllm.backends.cpu_kernels.formats import PACKED, PackedFormat
from tinyllm.backends.cpu_kernels.host_cpu import host_cpu
from tinyllm.backends.cpu_kernels.jit import Kernel
from tinyllm.backends.cpu_kernels.linear_rows import STAGING_NBYTES, finish_rows, store_results
from tinyllm.backends.cpu_kernels.simd import (
    F32,
    I8,
    I16,
    I32,
    V32,
    VF,
    Builder,
    Value,
    const,
    const_vec,
    emit_call,
    emit_fma,
    emit_load,
    emit_loop,
    emit_order,
    emit_splat,
    instruction,
    pointer,
)

__all__ = ["AMX_NBYTES", "amx_kernel", "has_amx"]

_TILE_NBYTES = 1024
AMX_NBYTES = 64 + 2 * 2 * _TILE_NBYTES  # scratch of a worker: the configuration, two steps' sums
_SUMS, _ROWS, _CODES = (0, 1), (4, 5), 7  # tile registers: C, A, B
_STEP = 32

_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # Linux, x86-64

i64 = types.int64


@dataclass(frozen=True)
class _Operands:
    """Where a step's operands lie, in a tile of records and in an unpacked group.

    Attributes:
        name: of the kernel.
        digits: K.
        places: of each A in a tile's step.
        row_nbytes: from one row of A to the next.
        step_nbytes: of a tile's step.
        facts, facts_nbytes: where the first row has its scale, sum and first sums, and how far it is to the next.
        shifts: of the codes, for each of the parts of B.
    """

    name: str
    digits: int
    places: tuple[int, ...]
    row_nbytes: int
    step_nbytes: int
    facts: int
    facts_nbytes: int
    shifts: tuple[int, ...]

    @property
    def b_nbytes(self) -> int:
        return 16 * self.digits

    @property
    def group_step_nbytes(self) -> int:
        """B, then d and m of the sixteen outputs."""
        return self.b_nbytes + 128


_RECORD = record_nbytes(1, _STEP)
_OPERANDS = {
    1: _Operands("one", 32, (0,), _RECORD, TILE_ROWS * _RECORD, scale_at(1, _STEP), _RECORD, (0,)),
    3: _Operands("halves", 64, (0, 64), 128, HALVES_NBYTES, 128 * TILE_ROWS, 16, (4, 0)),
}


@cache
def has_amx() -> bool:
    """Whether this process may use AMX; asks Linux for the permission, which a process must do once."""
    if not (host_cpu().has("amxint8") and host_cpu().has("avx512vnni") and sys.platform == "linux"):
        return False
    if platform.machine() != "x86_64":
        return False
    system_call = ctypes.CDLL(None, use_errno=True).syscall
    system_call.restype = ctypes.c_long
    return bool(system_call(*map(ctypes.c_long, (_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA))) == 0)


def _emit(b: Builder, name: str, *values: Value) -> None:
    emit_call(b, f"llvm.x86.{name}", ir.VoidType(), *values)


def _tile(number: int) -> Value:
    return ir.Constant(I8, number)


def _configure(operands: _Operands) -> Callable[[int], None]:
    @instruction(types.void, i64)
    def configure(b: Builder, memory: Value) -> None:
        """Palette 1: at byte 16 each tile's bytes in a row (int16), at 48 its rows (int8)."""
        b.store(const_vec(V32, 0), pointer(b, memory, V32), align=64)
        b.store(ir.Constant(I8, 1), pointer(b, memory, I8))
        shapes = dict.fromkeys(_SUMS, (16, 64)) | dict.fromkeys(_ROWS, (16, operands.digits))
        shapes[_CODES] = operands.digits // 4, 64
        for tile, (rows, nbytes) in shapes.items():
            b.store(ir.Constant(I16, nbytes), pointer(b, memory, I16, 16 + 2 * tile))
            b.store(ir.Constant(I8, rows), pointer(b, memory, I8, 48 + tile))
        _emit(b, "ldtilecfg", pointer(b, memory, I8))

    return configure


@instruction(types.void)
def _release(b: Builder) -> None:
    _emit(b, "tilerelease")


def _unpack_group(form: PackedFormat, operands: _Operands) -> Callable[..., None]:
    """(group, steps, out): writes B and the scales of each step."""

    @instruction(types.void, *(i64,) * 3)
    def unpack_group(b: Builder, group: Value, steps: Value, out: Value) -> None:
        def one_step(i: Value, _state: list[Value]) -> list[Value]:
            form.prefetch(b, group, i)
            step = form.unpack(b, group, i)
            at = b.add(out, b.mul(i, const(operands.group_step_nbytes)))
            for k, word in step.words:
                for part, shift in enumerate(operands.shifts):
                    codes = b.shl(word, const_vec(V32, shift)) if shift else word
                    b.store(codes, pointer(b, at, V32, 512 * part + 16 * k), align=64)
            for slot, value in ((0, step.scale), (64, step.minimum)):
                if value is not None:
                    b.store(value, pointer(b, at, VF, operands.b_nbytes + slot), align=64)
            return []

        emit_loop(b, const(0), steps, 1, [], one_step)

    return unpack_group


def _amx_tile(form: PackedFormat, operands: _Operands) -> Callable[..., None]:
    """(group, x, steps, sums, result): result[t] = 16 outputs of row t of a tile of records; group is unpacked."""
    used = list(zip(operands.places, _SUMS, _ROWS, strict=False))
    parts = range(len(used))

    @instruction(types.void, *(i64,) * 5)
    def amx_tile(b: Builder, group: Value, x: Value, steps: Value, sums: Value, result: Value) -> None:
        last = b.sub(steps, const(1))

        def buffer(i: Value) -> Value:
            return b.add(sums, b.mul(b.and_(i, const(1)), const(2 * _TILE_NBYTES)))

        def group_step(i: Value) -> Value:
            return b.add(group, b.mul(i, const(operands.group_step_nbytes)))

        def records(i: Value) -> Value:
            return b.add(x, b.mul(i, const(operands.step_nbytes)))

        def multiply(i: Value) -> None:
            """Begins the sums of step i, or of the last."""
            i = b.select(b.icmp_signed("<", i, last), i, last)
            _emit(b, "tileloadd64", _tile(_CODES), pointer(b, group_step(i), I8), const(64))
            for place, C, A in used:
                digits = pointer(b, records(i), I8, place)
                _emit(b, "tileloadd64", _tile(A), digits, const(operands.row_nbytes))
                _emit(b, "tilezero", _tile(C))
                _emit(b, "tdpbsud", _tile(C), _tile(A), _tile(_CODES))

        def store(i: Value) -> None:
            """Stores the sums, those of step i."""
            for part, (_, C, _) in enumerate(used):
                place = pointer(b, buffer(i), I8, part * _TILE_NBYTES)
                _emit(b, "tilestored64", _tile(C), place, const(64))

        def total(stored: Value, facts: Value, t: int) -> Value:
            """S of row t as float32."""
            values = [emit_load(b, stored, V32, _TILE_NBYTES * part + 64 * t, align=64) for part in parts]
            if form.offset:
                first = [emit_load(b, facts, I32, 8 + 4 * part, align=4) for part in parts]
                values = [b.add(x, emit_splat(b, y, V32)) for x, y in zip(values, first, strict=True)]
            floats = [b.sitofp(value, VF) for value in values]
            return floats[0] if len(floats) == 1 else emit_fma(b, floats[0], const_vec(VF, 4096.0), floats[1])

        def one_step(i: Value, accs: list[Value]) -> list[Value]:
            store(b.add(i, const(1)))
            multiply(b.add(i, const(2)))
            scale = emit_load(b, group_step(i), VF, operands.b_nbytes, align=64)
            minimum = emit_load(b, group_step(i), VF, operands.b_nbytes + 64, align=64) if form.has_minimum else None
            stored, first_facts, closed = buffer(i), b.add(records(i), const(operands.facts)), []
            for t, acc in enumerate(accs):
                if t % 4 == 0:
                    emit_order(b)
                facts = b.add(first_facts, const(operands.facts_nbytes * t))
                scale_of_row, sum_of_row = (emit_splat(b, emit_load(b, facts, F32, place, align=4)) for place in (0, 4))
                if minimum is not None:
                    acc = emit_fma(b, minimum, sum_of_row, acc)
                closed.append(emit_fma(b, b.fmul(scale, scale_of_row), total(stored, facts, t), acc))
            return closed

        multiply(const(0))
        store(const(0))
        multiply(const(1))
        store_results(b, emit_loop(b, const(0), steps, 1, [const_vec(VF, 0.0)] * TILE_ROWS, one_step), result)

    return amx_tile


@cache
def amx_kernel(dtype: str, digits: int) -> Kernel:
    """many_rows for a format of four bits; x is tiles of records, for three digits those of quantise_halves."""
    form, operands = PACKED[dtype], _OPERANDS[digits]
    assert form.bits == 4 and form.step == _STEP
    configure, unpack_group, amx_tile = _configure(operands), _unpack_group(form, operands), _amx_tile(form, operands)

    def amx_rows(
        worker: int, begin: int, end: int, weight: int, group_nbytes: int, x: int, x_stride: int, rows: int,
        in_features: int, out_features: int, bias: int, out: int, out_stride: int, scratch: int, scratch_stride: int,
        block_rows: int,
    ) -> None:  # fmt: skip
        steps = in_features // _STEP
        result = scratch + worker * scratch_stride
        sums = result + STAGING_NBYTES + 64
        codes = result + STAGING_NBYTES + AMX_NBYTES
        groups = (out_features + 15) // 16
        configure(result + STAGING_NBYTES)
        for task in range(begin, end):
            first, group = task // groups * block_rows, task % groups
            unpack_group(weight + group * group_nbytes, steps, codes)
            last = min(rows, first + block_rows)
            for row in range(first, last, TILE_ROWS):
                amx_tile(codes, x + row // TILE_ROWS * x_stride, steps, sums, result)
                n, at = min(TILE_ROWS, last - row), out + row * out_stride
                finish_rows(result, n, group, out_features, bias, at, out_stride)
        _release()

    return Kernel(f"integer_amx.amx_rows-{operands.name}-{form.name}", amx_rows)
