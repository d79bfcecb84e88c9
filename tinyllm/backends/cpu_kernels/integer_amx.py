"""The products of `integer_linear.py` on AMX, the matrix unit of some x86 CPUs: the same integers, so the same bits.

For codes of four bits. A tile register holds 16 rows of up to 64 bytes. One instruction adds a step's products to the
sums of sixteen rows and sixteen outputs:

    C (16 rows, 16 outputs) int32  +=  A (16 rows, K digits) int8  x  B (K codes, 16 outputs) uint8

    one digit      K = 32   A  | X |                        B  [k / 4][16 outputs][4 codes]
    three digits   K = 64   A  | H0 | H1 |, then | L0 | L1 |   B  the same twice: codes times 16, then as they are

Three digits come as four (`digits.py`): 16 * code with a half's upper digit and code with its lower
one are code with the half, so that two instructions do what would take three. S = 2**12 C_H + C_L is rounded to float32
once, as `integer_linear` does it for codes of four bits. C goes by way of memory, since scales are float32's business.

The sums of a few steps are stored, for two tiles of rows that share B, then scaled and added up in vector registers;
so few that a core has the next products under way meanwhile. Several groups of outputs share a chunk of A.
Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBSUD.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from tinyllm.backends.cpu_kernels.amx import (
    CONFIG_NBYTES,
    TILE_NBYTES,
    configure_tiles,
    emit_tile_load,
    emit_tile_product,
    emit_tile_store,
    emit_tile_zero,
    release_tiles,
)
from tinyllm.backends.cpu_kernels.deferred import types
from tinyllm.backends.cpu_kernels.digits import FACTS_NBYTES, MATRIX_ROW_NBYTES, TILE_ROWS, matrix_step_nbytes
from tinyllm.backends.cpu_kernels.formats import PACKED, PackedFormat
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
    emit_order,
    emit_splat,
    instruction,
    pointer,
    prefetch_to_write,
    store,
    zeros,
)

__all__ = ["amx_kernel", "amx_worker_nbytes", "groups_of_task"]

_STEP = 32
_PAIR = 2  # tiles of rows that share B
_CHUNK = {1: 4, 3: 2}  # steps whose sums are stored before they are added up: few, so that both go on at once
_SPAN = 4  # groups that share A
_SUMS_AT = CONFIG_NBYTES
_RESULTS_AT = _SUMS_AT + _PAIR * TILE_NBYTES * max(_CHUNK[1], 2 * _CHUNK[3])
_CODES_AT = _RESULTS_AT + _SPAN * _PAIR * STAGING_NBYTES
_SUMS, _ROWS, _CODES = (0, 1, 2, 3), (4, 5), (6, 7)  # tile registers: C, A, B

i64 = types.int64


@dataclass(frozen=True)
class _Operands:
    """Where a step's operands lie, in a tile of rows and in an unpacked group.

    Attributes:
        name: of the kernel.
        digits: of x: 1 or 3.
        K: bytes of a row that are multiplied at once.
        places: of each A in a row.
        shifts: of the codes, for each of the parts of B.
    """

    name: str
    digits: int
    K: int
    places: tuple[int, ...]
    shifts: tuple[int, ...]

    @property
    def row_nbytes(self) -> int:
        return MATRIX_ROW_NBYTES[self.digits]

    @property
    def step_nbytes(self) -> int:
        return matrix_step_nbytes(self.digits)

    @property
    def sums_nbytes(self) -> int:
        """Of a tile's step."""
        return TILE_NBYTES * len(self.places)

    @property
    def b_nbytes(self) -> int:
        return 16 * self.K

    @property
    def group_step_nbytes(self) -> int:
        """B, then d and m of the sixteen outputs."""
        return self.b_nbytes + 128


_OPERANDS = {1: _Operands("one", 1, 32, (0,), (0,)), 3: _Operands("halves", 3, 64, (0, 64), (4, 0))}


def amx_worker_nbytes(in_features: int) -> int:
    """Bytes of scratch that a worker needs: the configuration, a chunk's sums, results, and unpacked groups."""
    return _CODES_AT + _SPAN * _OPERANDS[3].group_step_nbytes * -(-in_features // _STEP)


def groups_of_task(rows: int, out_features: int, workers: int) -> int:
    """How many groups of sixteen outputs a task takes: one for a pair of tiles, which reads each group's B but once;

    else as many as keep the workers evenly busy.
    """
    if rows <= _PAIR * TILE_ROWS:
        return 1
    groups = -(-out_features // 16)

    def longest(span: int) -> int:
        """Groups of the worker that has most of them."""
        return -(-groups // (span * workers)) * span

    return min(range(_SPAN, 0, -1), key=longest)


def _configure(operands: _Operands) -> Callable[[int], None]:
    shapes = dict.fromkeys(_SUMS, (16, 64)) | dict.fromkeys(_ROWS, (16, operands.K))
    return configure_tiles(shapes | dict.fromkeys(_CODES, (operands.K // 4, 64)))


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


def _multiply(operands: _Operands, tiles: int) -> Callable[..., None]:
    """(group, x, x_stride, steps, sums): the sums of steps of one or two tiles of rows; group is unpacked.

    sums [tile][step of the chunk][part of the digits][row of the tile][16 outputs]
    """
    chunk_nbytes = _CHUNK[operands.digits] * operands.sums_nbytes
    parts = [(tile, part) for tile in range(tiles) for part in range(len(operands.places))]
    together = len(_SUMS) // len(parts)  # so many steps, none of which waits for another's register

    @instruction(types.void, *(i64,) * 5)
    def multiply(b: Builder, group: Value, x: Value, x_stride: Value, steps: Value, sums: Value) -> None:
        rows = [x, b.add(x, x_stride)]

        def one_step(i: Value, u: int) -> None:
            step, at = b.mul(i, const(operands.step_nbytes)), b.mul(i, const(operands.sums_nbytes))
            B = _CODES[u % 2]
            emit_tile_load(b, B, b.add(group, b.mul(i, const(operands.group_step_nbytes))), 64)
            for (tile, part), C in zip(parts, _SUMS[u * len(parts) :], strict=False):
                A, place = _ROWS[C % 2], const(operands.places[part])
                emit_tile_load(b, A, b.add(b.add(rows[tile], step), place), operands.row_nbytes)
                emit_tile_zero(b, C)
                emit_tile_product(b, "dpbsud", C, A, B)
                target = b.add(b.add(sums, at), const(tile * chunk_nbytes + part * TILE_NBYTES))
                emit_tile_store(b, C, target, 64)

        def several(i: Value, _state: list[Value]) -> list[Value]:
            for u in range(together):
                one_step(b.add(i, const(u)), u)
            return []

        def one(i: Value, _state: list[Value]) -> list[Value]:
            one_step(i, 0)
            return []

        whole = b.and_(steps, const(-together))
        emit_loop(b, const(0), whole, together, [], several)
        emit_loop(b, whole, steps, 1, [], one)

    return multiply


def _add_up(form: PackedFormat, operands: _Operands) -> Callable[..., None]:
    """(group, x, steps, sums, result): result[t] += row t's sums of these steps, scaled."""
    parts = range(len(operands.places))

    @instruction(types.void, *(i64,) * 5)
    def add_up(b: Builder, group: Value, x: Value, steps: Value, sums: Value, result: Value) -> None:
        def total(stored: Value, facts: Value, t: int) -> Value:
            """S of row t as float32."""
            values = [emit_load(b, stored, V32, TILE_NBYTES * part + 64 * t, align=64) for part in parts]
            if form.offset:
                first = [emit_load(b, facts, I32, 8 + 4 * part, align=4) for part in parts]
                values = [b.add(x, emit_splat(b, y, V32)) for x, y in zip(values, first, strict=True)]
            floats = [b.sitofp(value, VF) for value in values]
            return floats[0] if len(floats) == 1 else emit_fma(b, floats[0], const_vec(VF, 4096.0), floats[1])

        def one_step(i: Value, accs: list[Value]) -> list[Value]:
            at = b.add(group, b.mul(i, const(operands.group_step_nbytes)))
            scale = emit_load(b, at, VF, operands.b_nbytes, align=64)
            minimum = emit_load(b, at, VF, operands.b_nbytes + 64, align=64) if form.has_minimum else None
            stored = b.add(sums, b.mul(i, const(operands.sums_nbytes)))
            first_facts = b.add(x, b.add(b.mul(i, const(operands.step_nbytes)), const(TILE_ROWS * operands.row_nbytes)))
            closed = []
            for t, acc in enumerate(accs):
                if t % 4 == 0:
                    emit_order(b)
                facts = b.add(first_facts, const(FACTS_NBYTES * t))
                scale_of_row, sum_of_row = (emit_splat(b, emit_load(b, facts, F32, place, align=4)) for place in (0, 4))
                if minimum is not None:
                    acc = emit_fma(b, minimum, sum_of_row, acc)
                closed.append(emit_fma(b, b.fmul(scale, scale_of_row), total(stored, facts, t), acc))
            return closed

        accs = [emit_load(b, result, VF, 64 * t, align=64) for t in range(TILE_ROWS)]
        store_results(b, emit_loop(b, const(0), steps, 1, accs, one_step), result)

    return add_up


@cache
def amx_kernel(dtype: str, digits: int) -> Kernel:
    """many_rows for a format of four bits; x is tiles of rows as `digits.py` has them for a matrix unit."""
    form, operands = PACKED[dtype], _OPERANDS[digits]
    assert form.bits == 4 and form.step == _STEP
    configure, unpack_group, add_up = _configure(operands), _unpack_group(form, operands), _add_up(form, operands)
    multiply_one, multiply_pair = _multiply(operands, 1), _multiply(operands, _PAIR)
    chunk, chunk_nbytes = _CHUNK[digits], _CHUNK[digits] * operands.sums_nbytes
    step_nbytes, group_step_nbytes = operands.step_nbytes, operands.group_step_nbytes

    def amx_rows(
        worker: int, begin: int, end: int, weight: int, group_nbytes: int, x: int, x_stride: int, rows: int,
        in_features: int, out_features: int, bias: int, out: int, out_stride: int, scratch: int, scratch_stride: int,
        block_rows: int, span: int,
    ) -> None:  # fmt: skip
        steps = in_features // _STEP
        memory = scratch + worker * scratch_stride
        sums, results, codes = memory + _SUMS_AT, memory + _RESULTS_AT, memory + _CODES_AT
        codes_nbytes = steps * group_step_nbytes
        groups = (out_features + 15) // 16
        spans = (groups + span - 1) // span
        configure(memory)
        for task in range(begin, end):
            first, first_group = task // spans * block_rows, task % spans * span
            last, n_groups = min(rows, first + block_rows), min(span, groups - first_group)
            for g in range(n_groups):
                unpack_group(weight + (first_group + g) * group_nbytes, steps, codes + g * codes_nbytes)
            for row in range(first, last, _PAIR * TILE_ROWS):
                tiles = 1 if row + TILE_ROWS >= last else _PAIR
                for r in range(row, min(row + _PAIR * TILE_ROWS, last)):
                    for g in range(n_groups):
                        prefetch_to_write(out + r * out_stride + 64 * (first_group + g))
                for t in range(n_groups * _PAIR * TILE_ROWS):
                    store(results + 64 * t, zeros())
                for step in range(0, steps, chunk):
                    n = min(chunk, steps - step)
                    part = x + row // TILE_ROWS * x_stride + step * step_nbytes
                    for g in range(n_groups):
                        part_codes = codes + g * codes_nbytes + step * group_step_nbytes
                        if tiles == 1:
                            multiply_one(part_codes, part, x_stride, n, sums)
                        else:
                            multiply_pair(part_codes, part, x_stride, n, sums)
                        for tile in range(tiles):
                            result = results + (g * _PAIR + tile) * STAGING_NBYTES
                            add_up(part_codes, part + tile * x_stride, n, sums + tile * chunk_nbytes, result)
                for tile in range(tiles):
                    at = row + tile * TILE_ROWS
                    n = min(TILE_ROWS, last - at)
                    for g in range(n_groups):
                        result = results + (g * _PAIR + tile) * STAGING_NBYTES
                        finish_rows(result, n, first_group + g, out_features, bias, out + at * out_stride, out_stride)
        release_tiles()

    return Kernel(f"integer_amx.amx_rows-{operands.name}-{form.name}", amx_rows)
