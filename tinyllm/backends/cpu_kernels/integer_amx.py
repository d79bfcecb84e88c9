"""The products of `integer_linear.py` on AMX, the matrix unit of some x86 CPUs: the same integers, so the same bits.

A tile register holds 16 rows of 64 bytes. One instruction adds a whole step's products (K = 32) to the sums of sixteen
rows and sixteen outputs:

    C (16 rows, 16 outputs) int32  +=  A (16 rows, 32 digits) int8  x  B (32 codes, 16 outputs) uint8

    A   a digit of a step, read from the rows' records as they are      tmm4, tmm5, tmm6 for digits 0, 1, 2
    B   the step of an unpacked group: [k / 4][16 outputs][4 codes]     tmm7
    C   by way of memory, since scales are float32's business           tmm0, tmm1, tmm2

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
from tinyllm.backends.cpu_kernels.digits import TILE_ROWS, record_nbytes
from tinyllm.backends.cpu_kernels.formats import PACKED, PackedFormat
from tinyllm.backends.cpu_kernels.host_cpu import host_cpu
from tinyllm.backends.cpu_kernels.integer_linear import (
    MANY_TILE,
    close_step,
    first_sums,
    store_results,
    unpack_group_of,
    unpacked_step_nbytes,
    unpacked_tile_of,
)
from tinyllm.backends.cpu_kernels.jit import Kernel
from tinyllm.backends.cpu_kernels.linear_rows import STAGING_NBYTES, finish_rows
from tinyllm.backends.cpu_kernels.simd import (
    I8,
    I16,
    V32,
    VF,
    Builder,
    Value,
    const,
    const_vec,
    emit_load,
    emit_loop,
    emit_order,
    instruction,
    pointer,
)

__all__ = ["AMX_NBYTES", "amx_kernel", "has_amx"]

_TILE_NBYTES = 1024
AMX_NBYTES = 64 + 2 * 3 * _TILE_NBYTES  # scratch of a worker: the configuration, two steps' sums
_SUMS, _ROWS, _CODES = (0, 1, 2), (4, 5, 6), 7  # tile registers

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


def _call(b: Builder, name: str, *values: Value) -> None:
    function = b.module.globals.get(name)
    if function is None:
        function = ir.Function(b.module, ir.FunctionType(ir.VoidType(), [v.type for v in values]), name)
    b.call(function, values)


def _tile(number: int) -> Value:
    return ir.Constant(I8, number)


def _configure(form: PackedFormat) -> Callable[[int], None]:
    @instruction(types.void, i64)
    def configure(b: Builder, memory: Value) -> None:
        """Palette 1: at byte 16 each tile's bytes in a row (int16), at 48 its rows (int8)."""
        b.store(const_vec(V32, 0), pointer(b, memory, V32), align=64)
        b.store(ir.Constant(I8, 1), pointer(b, memory, I8))
        shapes = dict.fromkeys(_SUMS, (TILE_ROWS, 64))
        shapes |= dict.fromkeys(_ROWS, (TILE_ROWS, form.step)) | {_CODES: (form.step // 4, 64)}
        for tile, (rows, nbytes) in shapes.items():
            b.store(ir.Constant(I16, nbytes), pointer(b, memory, I16, 16 + 2 * tile))
            b.store(ir.Constant(I8, rows), pointer(b, memory, I8, 48 + tile))
        _call(b, "llvm.x86.ldtilecfg", pointer(b, memory, I8))

    return configure


@instruction(types.void)
def _release(b: Builder) -> None:
    _call(b, "llvm.x86.tilerelease")


def _amx_tile(form: PackedFormat, digits: int) -> Callable[..., None]:
    """(group, x, steps, sums, result): result[t] = 16 outputs of row t of a tile of records; group is unpacked."""
    used, record_size = range(digits), record_nbytes(digits, form.step)

    @instruction(types.void, *(i64,) * 5)
    def amx_tile(b: Builder, group: Value, x: Value, steps: Value, sums: Value, result: Value) -> None:
        step_nbytes = const(unpacked_step_nbytes(form))
        last = b.sub(steps, const(1))

        def buffer(i: Value) -> Value:
            return b.add(sums, b.mul(b.and_(i, const(1)), const(3 * _TILE_NBYTES)))

        def records(i: Value) -> Value:
            return b.add(x, b.mul(i, const(TILE_ROWS * record_size)))

        def multiply(i: Value) -> None:
            """Begins the sums of step i, or of the last."""
            i = b.select(b.icmp_signed("<", i, last), i, last)
            codes = b.add(group, b.mul(i, step_nbytes))
            _call(b, "llvm.x86.tileloadd64", _tile(_CODES), pointer(b, codes, I8), const(64))
            for digit in used:
                place = pointer(b, records(i), I8, digit * form.step)
                _call(b, "llvm.x86.tileloadd64", _tile(_ROWS[digit]), place, const(record_size))
                _call(b, "llvm.x86.tilezero", _tile(_SUMS[digit]))
                _call(b, "llvm.x86.tdpbsud", _tile(_SUMS[digit]), _tile(_ROWS[digit]), _tile(_CODES))

        def store(i: Value) -> None:
            """Stores the sums, those of step i."""
            for digit in used:
                place = pointer(b, buffer(i), I8, digit * _TILE_NBYTES)
                _call(b, "llvm.x86.tilestored64", _tile(_SUMS[digit]), place, const(64))

        def one_step(i: Value, accs: list[Value]) -> list[Value]:
            store(b.add(i, const(1)))
            multiply(b.add(i, const(2)))
            at = b.add(group, b.mul(i, step_nbytes))
            scale = emit_load(b, at, VF, 16 * form.step, align=64)
            minimum = emit_load(b, at, VF, 16 * form.step + 64, align=64) if form.has_minimum else None
            stored, closed = buffer(i), []
            first = records(i)
            for t, acc in enumerate(accs):
                record = b.add(first, const(record_size * t))
                if t % 4 == 0:
                    emit_order(b)

                def total(digit: int, t: int = t, record: Value = record) -> Value:
                    loaded = emit_load(b, stored, V32, digit * _TILE_NBYTES + 64 * t, align=64)
                    return b.add(loaded, first_sums(b, form, digits, digit, record)) if form.offset else loaded

                upper, lower = total(0), None
                if digits == 3:
                    upper, lower = b.add(b.shl(upper, const_vec(V32, 8)), total(1)), total(2)
                closed.append(close_step(b, form, digits, record, upper, lower, scale, minimum, acc))
            return closed

        multiply(const(0))
        store(const(0))
        multiply(const(1))
        store_results(b, emit_loop(b, const(0), steps, 1, [const_vec(VF, 0.0)] * TILE_ROWS, one_step), result)

    return amx_tile


@cache
def amx_kernel(dtype: str, digits: int) -> Kernel:
    """many_rows of IntegerKernels."""
    form = PACKED[dtype]
    configure, amx_tile = _configure(form), _amx_tile(form, digits)
    unpack_group, unpacked_tile = unpack_group_of(form), unpacked_tile_of(form, digits)
    step_size = form.step

    def amx_rows(
        worker: int, begin: int, end: int, weight: int, group_nbytes: int, x: int, x_stride: int, rows: int,
        in_features: int, out_features: int, bias: int, out: int, out_stride: int, scratch: int, scratch_stride: int,
        block_rows: int,
    ) -> None:  # fmt: skip
        steps = in_features // step_size
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
                n, records = min(TILE_ROWS, last - row), x + row // TILE_ROWS * x_stride
                if n > MANY_TILE:
                    amx_tile(codes, records, steps, sums, result)
                else:  # half a tile: vectors are as fast
                    unpacked_tile(codes, records, steps, result)
                finish_rows(result, n, group, out_features, bias, out + row * out_stride, out_stride)
        _release()

    return Kernel(f"integer_amx.amx_rows-{digits}-{form.name}", amx_rows)
