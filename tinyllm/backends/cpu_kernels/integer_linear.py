"""x (T, in) times a quantised matrix (out, in), transposed, in integers: the same bits for a row whatever T is.

x comes as digits (see `digits.py`). For each output, one lane:

    for each step of k:  S_i = sum of code[k] * X_i[k]              exact, for each digit
                         S = 2**8 (2**8 S_0 + S_1) + S_2            S_0 alone where there is one digit
                         acc = fma(d * scale, S, fma(m, sum of the step's x, acc))

Integers may be added in any order, so only the line with `acc` has one. A few rows read packed weights, by a kernel for
each number of rows; `many_rows` unpacks a group once, so that unpacking costs nothing beside the products:

    unpacked group:  [step]  | codes of k = 0 to 3: 16 x 4 bytes | ... of the last four | d: 16 floats | m: 16 floats |
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from tinyllm.backends.cpu_kernels.deferred import types
from tinyllm.backends.cpu_kernels.digits import TILE_ROWS, record_nbytes, scale_at
from tinyllm.backends.cpu_kernels.formats import PACKED, PackedFormat
from tinyllm.backends.cpu_kernels.host_cpu import host_cpu
from tinyllm.backends.cpu_kernels.integer_dot import emit_dot4
from tinyllm.backends.cpu_kernels.jit import Kernel
from tinyllm.backends.cpu_kernels.linear_rows import STAGING_NBYTES, finish_rows, store_results
from tinyllm.backends.cpu_kernels.simd import (
    F32,
    I32,
    V32,
    VF,
    Builder,
    Value,
    const,
    const_vec,
    emit_fma,
    emit_load,
    emit_loop,
    emit_splat,
    instruction,
    pointer,
)

__all__ = ["FEW_ROWS", "MANY_TILE", "few_rows_kernel", "integer_worker_nbytes", "many_rows_kernel"]

_WIDE = host_cpu().has("avx512f")
FEW_ROWS = 4 if _WIDE else 2  # beyond this many rows, many_rows is faster
MANY_TILE = 8 if _WIDE else 4  # rows that many_rows multiplies at once; divides TILE_ROWS

i64 = types.int64


def integer_worker_nbytes(in_features: int) -> int:
    """Bytes of scratch that a worker needs: a tile of results, and an unpacked group of any format."""
    return STAGING_NBYTES + 32 * in_features + 128 * -(-in_features // 16)


Codes = Callable[[], list[tuple[int, Value]]]  # emits what brings the codes of a step: (offset of k, sixteen words)


def _products(
    b: Builder, form: PackedFormat, codes: Codes, digit: int, records: list[Value], sums: list[Value]
) -> list[Value]:
    """sums[t] + the products of a step's codes with one digit of row t."""
    for k, word in codes():
        offset = digit * form.step + k
        sums = [
            emit_dot4(b, total, word, emit_splat(b, emit_load(b, at, I32, offset, align=4), V32), form.bits)
            for at, total in zip(records, sums, strict=True)
        ]
    return sums


def _first_sums(b: Builder, form: PackedFormat, digits: int, digit: int, record: Value) -> Value:
    """What the sums of a row's step begin with: -offset * sum of the digit."""
    if form.offset == 0:
        return const_vec(V32, 0)
    at = scale_at(digits, form.step) + 8 + 4 * digit
    return emit_splat(b, emit_load(b, record, I32, at, align=4), V32)


def _close_step(
    b: Builder, form: PackedFormat, digits: int, record: Value, upper: Value, lower: Value | None,
    scale: Value, minimum: Value | None, acc: Value,
) -> Value:  # fmt: skip
    """A row's acc after a step; upper, lower: 2**8 S_0 + S_1 and S_2, or S_0 and None."""
    at = scale_at(digits, form.step)
    total = b.sitofp(upper, VF)
    if lower is not None:
        total = emit_fma(b, total, const_vec(VF, 256.0), b.sitofp(lower, VF))
    if minimum is not None:
        acc = emit_fma(b, minimum, emit_splat(b, emit_load(b, record, F32, at + 4, align=4)), acc)
    return emit_fma(b, b.fmul(scale, emit_splat(b, emit_load(b, record, F32, at, align=4))), total, acc)


def _one_step(
    b: Builder, form: PackedFormat, digits: int, codes: Codes, scale: Value, minimum: Value | None,
    records: list[Value], accs: list[Value],
) -> list[Value]:  # fmt: skip
    """The accs after one step."""

    def products(digit: int, before: list[Value] | None = None) -> list[Value]:
        sums = [_first_sums(b, form, digits, digit, record) for record in records]
        if before is not None:
            shifted = [b.shl(total, const_vec(V32, 8)) for total in before]
            sums = [b.add(x, y) for x, y in zip(shifted, sums, strict=True)] if form.offset else shifted
        return _products(b, form, codes, digit, records, sums)

    upper, lower = products(0), None
    if digits == 3 and len(records) <= FEW_ROWS:  # too few to hide how long sixteen products in a chain take
        eight = const_vec(V32, 8)
        upper = [b.add(b.shl(x, eight), y) for x, y in zip(upper, products(1), strict=True)]
        lower = products(2)
    elif digits == 3:
        upper = products(1, upper)
        lower = products(2)
    lowers = lower or [None] * len(upper)
    return [
        _close_step(b, form, digits, record, high, low, scale, minimum, acc)
        for record, high, low, acc in zip(records, upper, lowers, accs, strict=True)
    ]


def _packed_tile(form: PackedFormat, digits: int, rows: int) -> Callable[..., None]:
    """(group, x, x_stride, steps, result): result[t] = 16 outputs of row t."""

    @instruction(types.void, *(i64,) * 5)
    def packed_tile(b: Builder, group: Value, x: Value, x_stride: Value, steps: Value, result: Value) -> None:
        x_rows = [b.add(x, b.mul(const(t), x_stride)) for t in range(rows)]

        def one_step(i: Value, accs: list[Value]) -> list[Value]:
            form.prefetch(b, group, i)
            step = form.unpack(b, group, i)
            assert step.scale is not None
            words = list(step.words)
            records = [b.add(at, b.mul(i, const(record_nbytes(digits, form.step)))) for at in x_rows]
            return _one_step(b, form, digits, lambda: words, step.scale, step.minimum, records, accs)

        store_results(b, emit_loop(b, const(0), steps, 1, [const_vec(VF, 0.0)] * rows, one_step), result)

    return packed_tile


def _unpacked_step_nbytes(form: PackedFormat) -> int:
    return 16 * form.step + 128


def _unpack_group(form: PackedFormat) -> Callable[..., None]:
    """(group, steps, out): writes the unpacked group."""

    @instruction(types.void, *(i64,) * 3)
    def unpack_group(b: Builder, group: Value, steps: Value, out: Value) -> None:
        def one_step(i: Value, _state: list[Value]) -> list[Value]:
            form.prefetch(b, group, i)
            step = form.unpack(b, group, i)
            at = b.add(out, b.mul(i, const(_unpacked_step_nbytes(form))))
            for k, word in step.words:
                b.store(word, pointer(b, at, V32, 16 * k), align=64)
            for slot, value in ((0, step.scale), (64, step.minimum)):
                if value is not None:
                    b.store(value, pointer(b, at, VF, 16 * form.step + slot), align=64)
            return []

        emit_loop(b, const(0), steps, 1, [], one_step)

    return unpack_group


def _unpacked_tile(form: PackedFormat, digits: int) -> Callable[..., None]:
    """(group, x, steps, result): the same for MANY_TILE rows of a tile of records, from an unpacked group."""
    record = record_nbytes(digits, form.step)

    @instruction(types.void, *(i64,) * 4)
    def unpacked_tile(b: Builder, group: Value, x: Value, steps: Value, result: Value) -> None:
        def one_step(i: Value, accs: list[Value]) -> list[Value]:
            at = b.add(group, b.mul(i, const(_unpacked_step_nbytes(form))))

            def codes() -> list[tuple[int, Value]]:
                return [(k, emit_load(b, at, V32, 16 * k, align=64)) for k in range(0, form.step, 4)]

            scale = emit_load(b, at, VF, 16 * form.step, align=64)
            minimum = emit_load(b, at, VF, 16 * form.step + 64, align=64) if form.has_minimum else None
            first = b.add(x, b.mul(i, const(TILE_ROWS * record)))
            records = [b.add(first, const(record * t)) for t in range(MANY_TILE)]
            return _one_step(b, form, digits, codes, scale, minimum, records, accs)

        zero = const_vec(VF, 0.0)
        store_results(b, emit_loop(b, const(0), steps, 1, [zero] * MANY_TILE, one_step), result)

    return unpacked_tile


# ---- kernels


@cache
def few_rows_kernel(dtype: str, digits: int, rows: int) -> Kernel:
    """x times a quantised format's weights, for 1 <= rows <= FEW_ROWS. A task is a group of sixteen outputs.

    digits: 1 or 3, of x, whose records are row by row.
    """
    form = PACKED[dtype]
    packed_tile = _packed_tile(form, digits, rows)
    step_size = form.step

    def few_rows(
        worker: int, begin: int, end: int, weight: int, group_nbytes: int, x: int, x_stride: int, rows: int,
        in_features: int, out_features: int, bias: int, out: int, out_stride: int, scratch: int, scratch_stride: int,
    ) -> None:  # fmt: skip
        result = scratch + worker * scratch_stride
        for group in range(begin, end):
            packed_tile(weight + group * group_nbytes, x, x_stride, in_features // step_size, result)
            finish_rows(result, rows, group, out_features, bias, out, out_stride)

    return Kernel(f"integer_linear.rows_{rows}-{digits}-{dtype}", few_rows)


@cache
def many_rows_kernel(dtype: str, digits: int) -> Kernel:
    """The same for any number of rows. A task is a group, for `block_rows` rows, which stay in cache between tasks.

    Records are in tiles, x_stride bytes from one to the next; block_rows is a multiple of a tile's.
    """
    form = PACKED[dtype]
    unpack_group, unpacked_tile = _unpack_group(form), _unpacked_tile(form, digits)
    step_size, record = form.step, record_nbytes(digits, form.step)

    def unpacked(
        worker: int, begin: int, end: int, weight: int, group_nbytes: int, x: int, x_stride: int, rows: int,
        in_features: int, out_features: int, bias: int, out: int, out_stride: int, scratch: int, scratch_stride: int,
        block_rows: int,
    ) -> None:  # fmt: skip
        steps = in_features // step_size
        result = scratch + worker * scratch_stride
        codes = result + STAGING_NBYTES
        groups = (out_features + 15) // 16
        for task in range(begin, end):
            first, group = task // groups * block_rows, task % groups
            unpack_group(weight + group * group_nbytes, steps, codes)
            last = min(rows, first + block_rows)
            for row in range(first, last, MANY_TILE):
                records = x + row // TILE_ROWS * x_stride + row % TILE_ROWS * record
                unpacked_tile(codes, records, steps, result)
                n, at = min(MANY_TILE, last - row), out + row * out_stride
                finish_rows(result, n, group, out_features, bias, at, out_stride)

    return Kernel(f"integer_linear.many_rows-{digits}-{form.name}", unpacked)
