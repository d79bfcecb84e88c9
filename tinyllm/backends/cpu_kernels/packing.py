"""Packs matrices as `formats.py` draws them, reading the rows where they lie (usually a mapped file)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from tinyllm.backends.cpu_kernels.deferred import types
from tinyllm.backends.cpu_kernels.formats import PACKED
from tinyllm.backends.cpu_kernels.jit import device, kernel
from tinyllm.backends.cpu_kernels.memory import aligned_zeros
from tinyllm.backends.cpu_kernels.simd import (
    I32,
    I64,
    LANES,
    Builder,
    Value,
    emit_load,
    instruction,
    load_i64,
    load_u8,
    load_u16,
    load_u32,
    pointer,
    store_u8,
    store_u16,
    store_u32,
)
from weights import Tensor
from weights.quants import FORMATS

__all__ = ["PackedWeight", "WeightPart", "pack_matrix", "packed_nbytes"]

_CHUNK = 16  # bytes of a row that are interleaved at once

Run = Callable[..., None]  # (kernel, tasks, work, *arguments)


@dataclass(frozen=True)
class WeightPart:
    """Rows of one dtype: row `first_row` of the weight is row 0 here. data: the packed bytes; address: of data."""

    dtype: str
    first_row: int
    rows: int
    group_nbytes: int
    data: NDArray[np.uint8]
    address: int


@dataclass(frozen=True)
class PackedWeight:
    """A matrix (out, in) in parts of one dtype each; digits: of the activations that meet its quantised parts."""

    shape: tuple[int, int]
    parts: tuple[WeightPart, ...]
    digits: int

    @property
    def nbytes(self) -> int:
        return sum(part.data.nbytes for part in self.parts)


def _runs(parts: Sequence[tuple[str, tuple[int, int]]]) -> list[tuple[str, int, int, int]]:
    """Adjacent parts of one dtype, as (dtype, rows, first part, end part)."""
    runs: list[tuple[str, int, int, int]] = []
    for i, (dtype, (out_features, _)) in enumerate(parts):
        if runs and runs[-1][0] == dtype:
            _, rows, first, _ = runs[-1]
            runs[-1] = (dtype, rows + out_features, first, i + 1)
        else:
            runs.append((dtype, out_features, i, i + 1))
    return runs


def packed_nbytes(parts: Sequence[tuple[str, tuple[int, int]]]) -> int:
    """Bytes of the matrix that stacks parts given as (dtype, (out_i, in))."""
    in_features = parts[0][1][1]
    return sum(PACKED[dtype].packed_nbytes((rows, in_features)) for dtype, rows, _, _ in _runs(parts))


def pack_matrix(tensors: Sequence[Tensor], run: Run, digits: int) -> PackedWeight:
    """Packs tensors (out_i, in), stacked along their rows; `run` runs a kernel over tasks."""
    in_features = tensors[0].shape[1]
    assert all(len(t.shape) == 2 and t.shape[1] == in_features for t in tensors)
    parts: list[WeightPart] = []
    first_row = 0
    for dtype, rows, first, end in _runs([(t.dtype, (t.shape[0], t.shape[1])) for t in tensors]):
        parts.append(_pack_part(tensors[first:end], dtype, first_row, rows, in_features, run))
        first_row += rows
    return PackedWeight((first_row, in_features), tuple(parts), digits)


def _pack_part(
    tensors: Sequence[Tensor], dtype: str, first_row: int, rows: int, in_features: int, run: Run
) -> WeightPart:
    groups = -(-rows // LANES)
    data = aligned_zeros(PACKED[dtype].packed_nbytes((rows, in_features)))
    address = int(data.ctypes.data)
    sources = [tensor.rows() for tensor in tensors]  # held here while the kernel reads at their addresses
    assert all(source.flags.c_contiguous for source in sources)
    padding = np.zeros(sources[0].shape[1], np.uint8)
    row_addresses = np.full(LANES * groups, padding.ctypes.data, np.int64)
    row_addresses[:rows] = np.concatenate(
        [source.ctypes.data + source.strides[0] * np.arange(source.shape[0]) for source in sources]
    )
    block_nbytes, fields = FORMATS[dtype].block_nbytes, PACKED[dtype].fields
    if PACKED[dtype].dense:  # a row is one block of many units
        block_nbytes, fields = block_nbytes * in_features, ((block_nbytes, in_features),)
    table = np.array(fields, np.int64)
    run(
        interleave, groups, data.nbytes, row_addresses.ctypes.data, sources[0].shape[1] // block_nbytes, block_nbytes,
        table.ctypes.data, len(table), address, data.nbytes // groups,
    )  # fmt: skip
    return WeightPart(dtype, first_row, rows, data.nbytes // groups, data, address)


def _transpose(unit: int) -> Callable[[int, int, int], None]:
    """(rows, offset, target): interleaves 16 bytes of each row, at `offset`, in units of 1, 2 or 4 bytes.

    n = 16 / unit rows at a time are n vectors of n units. Interleaving vector i with vector i + n / 2, log2(n) times,
    transposes them.
    """
    n = _CHUNK // unit
    kind = ir.VectorType(ir.IntType(8 * unit), n)
    masks = [
        ir.Constant(ir.VectorType(I32, n), [start + i // 2 + i % 2 * n for i in range(n)]) for start in (0, n // 2)
    ]

    @instruction(types.void, types.int64, types.int64, types.int64)
    def transpose(b: Builder, rows: Value, offset: Value, target: Value) -> None:
        for first in range(0, LANES, n):
            addresses = [b.add(emit_load(b, rows, I64, 8 * (first + i)), offset) for i in range(n)]
            vectors = [emit_load(b, address, kind) for address in addresses]
            for _ in range(n.bit_length() - 1):
                pairs = zip(vectors[: n // 2], vectors[n // 2 :], strict=True)
                vectors = [b.shuffle_vector(x, y, mask) for x, y in pairs for mask in masks]
            for i, vector in enumerate(vectors):
                b.store(vector, pointer(b, target, kind, LANES * unit * i + unit * first), align=1)

    return transpose


_transpose_bytes, _transpose_halves, _transpose_words = (_transpose(unit) for unit in (1, 2, 4))


@device
def _copy_unit(source: int, target: int, unit: int) -> None:
    if unit == 1:
        store_u8(target, load_u8(source))
    elif unit == 2:
        store_u16(target, load_u16(source))
    else:
        store_u32(target, load_u32(source))


@device
def _interleave_field(rows: int, offset: int, unit: int, units: int, target: int) -> None:
    """One field of one block of sixteen rows: whole chunks of 16 bytes, then the units that are left."""
    whole = units * unit // _CHUNK * _CHUNK
    for at in range(0, whole, _CHUNK):
        if unit == 1:
            _transpose_bytes(rows, offset + at, target + LANES * at)
        elif unit == 2:
            _transpose_halves(rows, offset + at, target + LANES * at)
        else:
            _transpose_words(rows, offset + at, target + LANES * at)
    for at in range(whole, units * unit, unit):
        for lane in range(LANES):
            source = load_i64(rows + 8 * lane) + offset + at
            _copy_unit(source, target + LANES * at + lane * unit, unit)


@kernel
def interleave(
    worker: int, begin: int, end: int, row_addresses: int, blocks: int, block_nbytes: int, fields: int,
    num_fields: int, packed: int, group_nbytes: int,
) -> None:  # fmt: skip
    """A task is a group: interleaves its sixteen rows.

    row_addresses (groups, 16) int64; fields (num_fields, 2) int64: unit bytes, units, in the order of a block's bytes.
    """
    for group in range(begin, end):
        rows = row_addresses + 8 * LANES * group
        for block in range(blocks):
            offset = block * block_nbytes
            for field in range(num_fields):
                unit = load_i64(fields + 16 * field)
                units = load_i64(fields + 16 * field + 8)
                _interleave_field(rows, offset, unit, units, packed + group * group_nbytes + LANES * offset)
                offset += unit * units
