"""Packs matrices as `formats.py` draws them, reading the rows where they lie (usually a mapped file)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tinyllm.backends.cpu_kernels.formats import PACKED
from tinyllm.backends.cpu_kernels.jit import kernel
from tinyllm.backends.cpu_kernels.memory import aligned_zeros
from tinyllm.backends.cpu_kernels.simd import (
    load_i64,
    load_u8,
    load_u16,
    load_u32,
    store_u8,
    store_u16,
    store_u32,
)
from weights import Tensor
from weights.quants import FORMATS

__all__ = ["PackedWeight", "WeightPart", "pack_matrix", "packed_nbytes"]

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
    groups = -(-rows // 16)
    data = aligned_zeros(PACKED[dtype].packed_nbytes((rows, in_features)))
    address = int(data.ctypes.data)
    sources = [tensor.rows() for tensor in tensors]  # held here while the kernel reads at their addresses
    assert all(source.flags.c_contiguous for source in sources)
    row_addresses = np.zeros(16 * groups, np.int64)
    row_addresses[:rows] = np.concatenate(
        [source.ctypes.data + source.strides[0] * np.arange(source.shape[0]) for source in sources]
    )
    form = FORMATS[dtype]
    offset = 0
    for unit, units in PACKED[dtype].fields:
        run(
            interleave, groups, data.nbytes, row_addresses.ctypes.data, in_features // form.block_size, unit, units,
            offset, form.block_nbytes, address + 16 * offset, 16 * form.block_nbytes, data.nbytes // groups,
        )  # fmt: skip
        offset += unit * units
    return WeightPart(dtype, first_row, rows, data.nbytes // groups, data, address)


@kernel
def interleave(
    worker: int, begin: int, end: int, row_addresses: int, blocks: int, unit: int, units: int, file_offset: int,
    file_stride: int, packed: int, packed_stride: int, group_nbytes: int,
) -> None:  # fmt: skip
    """A task is a group: interleaves one field of its sixteen rows; a row at address 0 is left as it is.

    row_addresses (groups, 16) int64; a field is `units` units of `unit` bytes at file_offset of each file block.
    """
    for group in range(begin, end):
        for lane in range(16):
            row = load_i64(row_addresses + 8 * (16 * group + lane))
            if row == 0:
                continue
            target = packed + group * group_nbytes + lane * unit
            for block in range(blocks):
                source = row + file_offset + block * file_stride
                to = target + block * packed_stride
                if unit == 1:
                    for i in range(units):
                        store_u8(to + 16 * i, load_u8(source + i))
                elif unit == 2:
                    for i in range(units):
                        store_u16(to + 32 * i, load_u16(source + 2 * i))
                else:
                    for i in range(units):
                        store_u32(to + 64 * i, load_u32(source + 4 * i))
