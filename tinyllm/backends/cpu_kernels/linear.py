"""x (T, in) times a packed matrix (out, in), transposed: the same bits for a row whatever T is.

For each output, one lane:

    for each step of k:  part = 0;  for k in the step:  part = fma(q[k], x[k], part)
                         acc = fma(d, part, fma(m, sum of the step's x, acc))

Three forms do exactly that in that order. `one_row` (decode) reads packed weights at the speed of memory, `few_rows`
uses each unpacked vector for several rows in registers, and `many_rows` (prefill) unpacks a group once to float32 in
cache, so that unpacking costs nothing beside the multiplications:

    unpacked group:  [step]  | q of k = 0: 16 floats | ... | q of k = step - 1 | d: 16 floats | m: 16 floats |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from tinyllm.backends.cpu_kernels.deferred import types
from tinyllm.backends.cpu_kernels.formats import PACKED, PackedFormat
from tinyllm.backends.cpu_kernels.host_cpu import host_cpu
from tinyllm.backends.cpu_kernels.jit import Kernel, device, kernel
from tinyllm.backends.cpu_kernels.linear_rows import STAGING_NBYTES, finish_rows, row_offsets, store_results
from tinyllm.backends.cpu_kernels.simd import (
    F32,
    I32,
    VF,
    Builder,
    Value,
    const,
    const_vec,
    emit_fma,
    emit_load,
    emit_load_values,
    emit_loop,
    emit_splat,
    instruction,
    lane_sum,
    load,
    load_i32,
    pointer,
    store_f32,
)

__all__ = ["FEW_ROWS", "LinearKernels", "block_sums", "linear_kernels", "worker_nbytes"]

_WIDE = host_cpu().has("avx512f")  # one register holds 16 lanes, and there are 32
_FEW_TILE = 8 if _WIDE else 4  # rows whose sums stay in registers beside the unpacking
_MANY_TILE = 12 if _WIDE else 6
FEW_ROWS = _FEW_TILE  # beyond this many rows, many_rows is faster

i64 = types.int64


def worker_nbytes(in_features: int) -> int:
    """Bytes of scratch that a worker needs: a tile of results, and an unpacked group of any format or its sums."""
    unpacked = 64 * (in_features + 2 * -(-in_features // 16))
    sums = 4 * FEW_ROWS * (in_features // 32)
    return STAGING_NBYTES + max(unpacked, -(-sums // 64) * 64)


# ---- the inner loops


def _accumulate(b: Builder, q: Value, x: list[Value], offset: Value | int, parts: list[Value]) -> list[Value]:
    """parts[t] + q * x[t][offset bytes], fused."""
    return [
        emit_fma(b, q, emit_splat(b, emit_load(b, at, F32, offset, align=4)), part)
        for at, part in zip(x, parts, strict=True)
    ]


def _close_step(
    b: Builder, scale: Value | None, minimum: Value | None, sums: list[Value], parts: list[Value], accs: list[Value]
) -> list[Value]:
    if minimum is not None:
        accs = [
            emit_fma(b, minimum, emit_splat(b, emit_load(b, at, F32, align=4)), acc)
            for at, acc in zip(sums, accs, strict=True)
        ]
    if scale is None:
        return [b.fadd(part, acc) for part, acc in zip(parts, accs, strict=True)]
    return [emit_fma(b, scale, part, acc) for part, acc in zip(parts, accs, strict=True)]


def _packed_tile(form: PackedFormat, tile: int) -> Callable[..., None]:
    """(group, x, x_stride, rows, sums, sums_stride, steps, tail, result): result[t] = 16 outputs of row t."""

    @instruction(types.void, *(i64,) * 9)
    def packed_tile(
        b: Builder, group: Value, x: Value, x_stride: Value, rows: Value, sums: Value, sums_stride: Value,
        steps: Value, tail: Value, result: Value,
    ) -> None:  # fmt: skip
        zero = const_vec(VF, 0.0)
        x_rows = [b.add(x, offset) for offset in row_offsets(b, tile, x_stride, rows)]
        sum_rows = [b.add(sums, offset) for offset in row_offsets(b, tile, sums_stride, rows)]

        def one_step(i: Value, accs: list[Value]) -> list[Value]:
            step = form.unpack(b, group, i)
            x_step = [b.add(at, b.mul(i, const(4 * form.step))) for at in x_rows]
            parts = [zero] * tile
            for k, q in step.quants(b):
                parts = _accumulate(b, q, x_step, 4 * k, parts)
            step_sums = [b.add(at, b.mul(i, const(4))) for at in sum_rows]
            return _close_step(b, step.scale, step.minimum, step_sums, parts, accs)

        accs = emit_loop(b, const(0), steps, 1, [zero] * tile, one_step)
        if form.dense:  # the values beyond the last whole step
            start = b.mul(steps, const(form.step))
            stride = const(form.group_block_nbytes)

            def one_value(k: Value, parts: list[Value]) -> list[Value]:
                q = emit_load_values(b, b.add(group, b.mul(k, stride)), form.name.lower())
                return _accumulate(b, q, x_rows, b.mul(k, const(4)), parts)

            parts = emit_loop(b, start, b.add(start, tail), 1, [zero] * tile, one_value)
            accs = _close_step(b, None, None, [], parts, accs)
        store_results(b, accs, result)

    return packed_tile


@instruction(types.void, *(i64,) * 11)
def _unpacked_tile(
    b: Builder, group: Value, x: Value, x_stride: Value, rows: Value, sums: Value, sums_stride: Value,
    steps: Value, step: Value, has_minimum: Value, tail: Value, result: Value,
) -> None:  # fmt: skip
    """The same as a packed tile, from an unpacked group."""
    zero = const_vec(VF, 0.0)
    tile = _MANY_TILE
    unroll = 4
    x_rows = [b.add(x, offset) for offset in row_offsets(b, tile, x_stride, rows)]
    sum_rows = [b.add(sums, offset) for offset in row_offsets(b, tile, sums_stride, rows)]
    step_nbytes = b.mul(b.add(step, const(2)), const(64))
    scale_at = b.mul(step, const(64))
    with_minimum = b.icmp_signed("!=", has_minimum, const(0))

    def one_step(i: Value, accs: list[Value]) -> list[Value]:
        q_step = b.add(group, b.mul(i, step_nbytes))
        x_step = [b.add(at, b.mul(b.mul(i, step), const(4))) for at in x_rows]

        def four_values(k: Value, parts: list[Value]) -> list[Value]:
            q_at = b.add(q_step, b.mul(k, const(64)))
            x_at = [b.add(at, b.mul(k, const(4))) for at in x_step]
            for u in range(unroll):
                parts = _accumulate(b, emit_load(b, q_at, VF, 64 * u, align=4), x_at, 4 * u, parts)
            return parts

        parts = emit_loop(b, const(0), step, unroll, [zero] * tile, four_values)
        scale = emit_load(b, q_step, VF, scale_at, align=4)
        minimum = emit_load(b, q_step, VF, b.add(scale_at, const(64)), align=4)
        step_sums = [b.add(at, b.mul(i, const(4))) for at in sum_rows]
        before = b.block
        with b.if_then(with_minimum):
            plus_minimum = [
                emit_fma(b, minimum, emit_splat(b, emit_load(b, at, F32, align=4)), acc)
                for at, acc in zip(step_sums, accs, strict=True)
            ]
            inside = b.block
        merged = []
        for old, new in zip(accs, plus_minimum, strict=True):
            phi = b.phi(VF)
            phi.add_incoming(old, before)
            phi.add_incoming(new, inside)
            merged.append(phi)
        return _close_step(b, scale, None, [], parts, merged)

    accs = emit_loop(b, const(0), steps, 1, [zero] * tile, one_step)
    group = b.add(group, b.mul(steps, step_nbytes))
    x_rows = [b.add(at, b.mul(b.mul(steps, step), const(4))) for at in x_rows]

    def one_value(k: Value, parts: list[Value]) -> list[Value]:
        q = emit_load(b, b.add(group, b.mul(k, const(64))), VF, align=4)
        return _accumulate(b, q, x_rows, b.mul(k, const(4)), parts)

    parts = emit_loop(b, const(0), tail, 1, [zero] * tile, one_value)
    with_tail = b.icmp_signed(">", tail, const(0))
    totals = [b.select(with_tail, b.fadd(part, acc), acc) for acc, part in zip(accs, parts, strict=True)]
    store_results(b, totals, result)


def _unpack_group(form: PackedFormat) -> Callable[..., None]:
    """(group, steps, tail, out): writes the unpacked group."""

    @instruction(types.void, *(i64,) * 4)
    def unpack_group(b: Builder, group: Value, steps: Value, tail: Value, out: Value) -> None:
        step_nbytes = 64 * (form.step + 2)

        def one_step(i: Value, _state: list[Value]) -> list[Value]:
            step = form.unpack(b, group, i)
            at = b.add(out, b.mul(i, const(step_nbytes)))
            for k, q in step.quants(b):
                b.store(q, pointer(b, at, VF, 64 * k), align=4)
            for slot, value, default in ((0, step.scale, 1.0), (1, step.minimum, 0.0)):
                value = const_vec(VF, default) if value is None else value
                b.store(value, pointer(b, at, VF, 64 * (form.step + slot)), align=4)
            return []

        emit_loop(b, const(0), steps, 1, [], one_step)
        if form.dense:
            source = b.add(group, b.mul(steps, const(form.step * form.group_block_nbytes)))
            target = b.add(out, b.mul(steps, const(step_nbytes)))

            def one_value(k: Value, _state: list[Value]) -> list[Value]:
                q = emit_load_values(b, source, form.name.lower(), b.mul(k, const(form.group_block_nbytes)))
                b.store(q, pointer(b, target, VF, b.mul(k, const(64))), align=4)
                return []

            emit_loop(b, const(0), tail, 1, [], one_value)

    return unpack_group


def _row_of_group(form: PackedFormat) -> Callable[..., None]:
    """(group, lane, steps, tail, out): writes the dequantised row of one lane."""

    @instruction(types.void, *(i64,) * 5)
    def row_of_group(b: Builder, group: Value, lane: Value, steps: Value, tail: Value, out: Value) -> None:
        lane32 = b.trunc(lane, I32)

        def one_step(i: Value, _state: list[Value]) -> list[Value]:
            step = form.unpack(b, group, i)
            at = b.add(out, b.mul(i, const(4 * form.step)))
            d, m = (None if v is None else b.extract_element(v, lane32) for v in (step.scale, step.minimum))
            for k, q in step.quants(b):
                value = b.extract_element(q, lane32)
                value = value if d is None else b.fmul(d, value)
                value = value if m is None else b.fadd(value, m)
                b.store(value, pointer(b, at, F32, 4 * k), align=4)
            return []

        emit_loop(b, const(0), steps, 1, [], one_step)
        if form.dense:
            start = b.mul(steps, const(form.step))

            def one_value(k: Value, _state: list[Value]) -> list[Value]:
                values = emit_load_values(b, group, form.name.lower(), b.mul(k, const(form.group_block_nbytes)))
                b.store(b.extract_element(values, lane32), pointer(b, out, F32, b.mul(k, const(4))), align=4)
                return []

            emit_loop(b, start, b.add(start, tail), 1, [], one_value)

    return row_of_group


# ---- kernels


@device
def _sums_of_row(x: int, steps: int, out: int) -> None:
    """out[i] = sum of x[32 i : 32 i + 32]"""
    for i in range(steps):
        at = x + 128 * i
        store_f32(out + 4 * i, lane_sum(load(at) + load(at + 64)))


@kernel
def block_sums(worker: int, begin: int, end: int, x: int, x_stride: int, steps: int, sums: int) -> None:
    """A task is a row of x: the sums of its blocks of 32."""
    for row in range(begin, end):
        _sums_of_row(x + row * x_stride, steps, sums + row * 4 * steps)


@dataclass(frozen=True)
class LinearKernels:
    """The kernels of one format. A task of the first three is a group of sixteen outputs, of `embedding` a token."""

    one_row: Kernel
    few_rows: Kernel
    many_rows: Kernel
    embedding: Kernel


def _packed_kernel(form: PackedFormat, tile: int, name: str) -> Kernel:
    packed_tile = _packed_tile(form, tile)
    has_minimum, step_size = form.has_minimum, form.step

    def packed(
        worker: int, begin: int, end: int, weight: int, group_nbytes: int, x: int, x_stride: int, rows: int,
        in_features: int, out_features: int, bias: int, out: int, out_stride: int, scratch: int, scratch_stride: int,
    ) -> None:  # fmt: skip
        steps = in_features // step_size
        tail = in_features - steps * step_size
        result = scratch + worker * scratch_stride
        sums = result + STAGING_NBYTES
        if has_minimum:
            for row in range(rows):
                _sums_of_row(x + row * x_stride, steps, sums + row * 4 * steps)
        for group in range(begin, end):
            for row in range(0, rows, tile):
                packed_tile(
                    weight + group * group_nbytes, x + row * x_stride, x_stride, rows - row,
                    sums + row * 4 * steps, 4 * steps, steps, tail, result,
                )  # fmt: skip
                n, at = min(tile, rows - row), out + row * out_stride
                finish_rows(result, n, group, out_features, bias, at, out_stride)

    return Kernel(f"linear.{name}-{form.name}", packed)


def _unpacked_kernel(form: PackedFormat) -> Kernel:
    unpack_group = _unpack_group(form)
    has_minimum, step_size = int(form.has_minimum), form.step

    def unpacked(
        worker: int, begin: int, end: int, weight: int, group_nbytes: int, x: int, x_stride: int, rows: int,
        in_features: int, out_features: int, bias: int, out: int, out_stride: int, scratch: int, scratch_stride: int,
        sums: int,
    ) -> None:  # fmt: skip
        steps = in_features // step_size
        tail = in_features - steps * step_size
        result = scratch + worker * scratch_stride
        values = result + STAGING_NBYTES
        for group in range(begin, end):
            unpack_group(weight + group * group_nbytes, steps, tail, values)
            for row in range(0, rows, _MANY_TILE):
                _unpacked_tile(
                    values, x + row * x_stride, x_stride, rows - row, sums + row * 4 * steps, 4 * steps,
                    steps, step_size, has_minimum, tail, result,
                )  # fmt: skip
                at, n = out + row * out_stride, min(_MANY_TILE, rows - row)
                finish_rows(result, n, group, out_features, bias, at, out_stride)

    return Kernel(f"linear.many_rows-{form.name}", unpacked)


def _embedding_kernel(form: PackedFormat) -> Kernel:
    row_of_group = _row_of_group(form)
    step_size = form.step

    def embedding(
        worker: int, begin: int, end: int, tokens: int, weight: int, group_nbytes: int, first_row: int, rows: int,
        in_features: int, out: int, out_stride: int,
    ) -> None:  # fmt: skip
        steps = in_features // step_size
        tail = in_features - steps * step_size
        for t in range(begin, end):
            row = load_i32(tokens + 4 * t) - first_row
            if 0 <= row < rows:
                group = weight + (row // 16) * group_nbytes
                row_of_group(group, row % 16, steps, tail, out + t * out_stride)

    return Kernel(f"linear.embedding-{form.name}", embedding)


@cache
def linear_kernels(dtype: str) -> LinearKernels:
    form = PACKED[dtype]
    return LinearKernels(
        _packed_kernel(form, 1, "one_row"),
        _packed_kernel(form, _FEW_TILE, "few_rows"),
        _unpacked_kernel(form),
        _embedding_kernel(form),
    )
