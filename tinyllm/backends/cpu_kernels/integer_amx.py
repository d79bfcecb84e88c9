"""The products of `integer_linear.py` on AMX, the matrix unit of some x86 CPUs: the same integers, so the same bits.

For codes of four bits and activations of three digits, here in four (see `digits.py`). A tile register holds 16 rows of
64 bytes. One instruction adds to the sums of sixteen rows and sixteen outputs 64 products each: of 32 codes with a
half of the activations, 16 * code with its upper digit and code with its lower one:

    C (16 rows, 16 outputs) int32  +=  A (16 rows, 64 digits) int8  x  B (64 codes, 16 outputs) uint8

    A   | H0 | H1 | or | L0 | L1 | of a step                                               tmm4, tmm5
    B   [k / 4][16 outputs][4 codes], twice: times 16, then as they are                      tmm7
    C   by way of memory, since scales are float32's business                              tmm0, tmm1

    S = 2**12 C_H + C_L, rounded to float32 once, as `integer_linear` does it for codes of four bits

Nothing waits for a result: while step i is scaled and added up in vector registers, the sums of step i + 1 are stored
and those of step i + 2 begun.
Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18, and volume 2, TDPBSUD.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Callable
from functools import cache

from llvmlite import ir

from tinyllm.backends.cpu_kernels.deferred import types
from tinyllm.backends.cpu_kernels.digits import HALVES_NBYTES, TILE_ROWS
from tinyllm.backends.cpu_kernels.formats import PACKED, PackedFormat
from tinyllm.backends.cpu_kernels.host_cpu import host_cpu
from tinyllm.backends.cpu_kernels.integer_linear import store_results
from tinyllm.backends.cpu_kernels.jit import Kernel
from tinyllm.backends.cpu_kernels.linear_rows import STAGING_NBYTES, finish_rows
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
_SUMS, _ROWS, _CODES = (0, 1), (4, 5), 7  # tile registers
_STEP = 32
_GROUP_STEP_NBYTES = _TILE_NBYTES + 128  # an unpacked step: B, then d and m of the sixteen outputs

_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # Linux, x86-64

i64 = types.int64


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


@instruction(types.void, i64)
def _configure(b: Builder, memory: Value) -> None:
    """Palette 1: at byte 16 each tile's bytes in a row (int16), at 48 its rows (int8). All are full."""
    b.store(const_vec(V32, 0), pointer(b, memory, V32), align=64)
    b.store(ir.Constant(I8, 1), pointer(b, memory, I8))
    for tile in (*_SUMS, *_ROWS, _CODES):
        b.store(ir.Constant(I16, 64), pointer(b, memory, I16, 16 + 2 * tile))
        b.store(ir.Constant(I8, 16), pointer(b, memory, I8, 48 + tile))
    _emit(b, "ldtilecfg", pointer(b, memory, I8))


@instruction(types.void)
def _release(b: Builder) -> None:
    _emit(b, "tilerelease")


def _unpack_group(form: PackedFormat) -> Callable[..., None]:
    """(group, steps, out): writes B and the scales of each step."""

    @instruction(types.void, *(i64,) * 3)
    def unpack_group(b: Builder, group: Value, steps: Value, out: Value) -> None:
        def one_step(i: Value, _state: list[Value]) -> list[Value]:
            step = form.unpack(b, group, i)
            at = b.add(out, b.mul(i, const(_GROUP_STEP_NBYTES)))
            for k, word in step.words:
                b.store(b.shl(word, const_vec(V32, 4)), pointer(b, at, V32, 16 * k), align=64)
                b.store(word, pointer(b, at, V32, 512 + 16 * k), align=64)
            for slot, value in ((0, step.scale), (64, step.minimum)):
                if value is not None:
                    b.store(value, pointer(b, at, VF, _TILE_NBYTES + slot), align=64)
            return []

        emit_loop(b, const(0), steps, 1, [], one_step)

    return unpack_group


def _amx_tile(form: PackedFormat) -> Callable[..., None]:
    """(group, x, steps, sums, result): result[t] = 16 outputs of row t of a tile of records; group is unpacked."""

    @instruction(types.void, *(i64,) * 5)
    def amx_tile(b: Builder, group: Value, x: Value, steps: Value, sums: Value, result: Value) -> None:
        last = b.sub(steps, const(1))

        def buffer(i: Value) -> Value:
            return b.add(sums, b.mul(b.and_(i, const(1)), const(2 * _TILE_NBYTES)))

        def multiply(i: Value) -> None:
            """Begins the sums of step i, or of the last."""
            i = b.select(b.icmp_signed("<", i, last), i, last)
            codes = b.add(group, b.mul(i, const(_GROUP_STEP_NBYTES)))
            digits = b.add(x, b.mul(i, const(HALVES_NBYTES)))
            _emit(b, "tileloadd64", _tile(_CODES), pointer(b, codes, I8), const(64))
            for half, (C, A) in enumerate(zip(_SUMS, _ROWS, strict=True)):
                _emit(b, "tileloadd64", _tile(A), pointer(b, digits, I8, 64 * half), const(128))
                _emit(b, "tilezero", _tile(C))
                _emit(b, "tdpbsud", _tile(C), _tile(A), _tile(_CODES))

        def store(i: Value) -> None:
            """Stores the sums, those of step i."""
            for half, C in enumerate(_SUMS):
                place = pointer(b, buffer(i), I8, half * _TILE_NBYTES)
                _emit(b, "tilestored64", _tile(C), place, const(64))

        def one_step(i: Value, accs: list[Value]) -> list[Value]:
            store(b.add(i, const(1)))
            multiply(b.add(i, const(2)))
            at = b.add(group, b.mul(i, const(_GROUP_STEP_NBYTES)))
            scale = emit_load(b, at, VF, _TILE_NBYTES, align=64)
            minimum = emit_load(b, at, VF, _TILE_NBYTES + 64, align=64) if form.has_minimum else None
            stored, facts = buffer(i), b.add(x, b.mul(i, const(HALVES_NBYTES)))
            closed = []
            for t, acc in enumerate(accs):
                if t % 4 == 0:
                    emit_order(b)
                at_facts = 128 * TILE_ROWS + 16 * t
                halves = [emit_load(b, stored, V32, _TILE_NBYTES * half + 64 * t, align=64) for half in (0, 1)]
                if form.offset:
                    first = [emit_load(b, facts, I32, at_facts + 8 + 4 * half, align=4) for half in (0, 1)]
                    halves = [b.add(x, emit_splat(b, y, V32)) for x, y in zip(halves, first, strict=True)]
                upper, lower = (b.sitofp(half, VF) for half in halves)
                total = emit_fma(b, upper, const_vec(VF, 4096.0), lower)
                scale_of_row, sum_of_row = (
                    emit_splat(b, emit_load(b, facts, F32, at_facts + place, align=4)) for place in (0, 4)
                )
                if minimum is not None:
                    acc = emit_fma(b, minimum, sum_of_row, acc)
                closed.append(emit_fma(b, b.fmul(scale, scale_of_row), total, acc))
            return closed

        multiply(const(0))
        store(const(0))
        multiply(const(1))
        store_results(b, emit_loop(b, const(0), steps, 1, [const_vec(VF, 0.0)] * TILE_ROWS, one_step), result)

    return amx_tile


@cache
def amx_kernel(dtype: str) -> Kernel:
    """many_rows of IntegerKernels for a format of four bits; x is what digits.quantise_halves makes."""
    form = PACKED[dtype]
    assert form.bits == 4 and form.step == _STEP
    unpack_group, amx_tile = _unpack_group(form), _amx_tile(form)

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
        _configure(result + STAGING_NBYTES)
        for task in range(begin, end):
            first, group = task // groups * block_rows, task % groups
            unpack_group(weight + group * group_nbytes, steps, codes)
            last = min(rows, first + block_rows)
            for row in range(first, last, TILE_ROWS):
                amx_tile(codes, x + row // TILE_ROWS * x_stride, steps, sums, result)
                n, at = min(TILE_ROWS, last - row), out + row * out_stride
                finish_rows(result, n, group, out_features, bias, at, out_stride)
        _release()

    return Kernel(f"integer_amx.amx_rows-{form.name}", amx_rows)
