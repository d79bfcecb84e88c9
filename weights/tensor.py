"""One named tensor of a checkpoint: shape, storage format, and the bytes where they lie (usually a mmap)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from weights.quants import FORMATS, dequantize

__all__ = ["Tensor"]


@dataclass(frozen=True)
class Tensor:
    """A tensor as its file stores it. Rows (the last axis) are contiguous runs of whole quantisation blocks.

    Attributes:
        name: the tensor's name in the file, or its canonical name once renamed.
        shape: numpy order, e.g. (out, in) for a linear layer's matrix.
        dtype: a key of `weights.quants.FORMATS` ("F32", "BF16", "Q4_1", ...).
        data: (nbytes,) uint8, read-only; a view of the mapped file where possible.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    data: NDArray[np.uint8]

    @property
    def nbytes(self) -> int:
        return int(self.data.nbytes)

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row along the last axis."""
        return FORMATS[self.dtype].nbytes(self.shape[-1])

    def rows(self) -> NDArray[np.uint8]:
        """The raw bytes as (rows, row_nbytes) uint8, rows being the product of all axes but the last."""
        return self.data.reshape(-1, self.row_nbytes)

    def dequantize(self) -> NDArray[np.float32]:
        """The values as float32 in `shape`; a copy."""
        return dequantize(self.data, self.dtype, self.shape)

    def renamed(self, name: str) -> Tensor:
        return replace(self, name=name)

    def take_rows(self, order: NDArray[np.intp] | slice) -> Tensor:
        """Rows of a 2-D tensor picked or reordered by `order`; a slice gives a view, an index array a copy."""
        assert len(self.shape) == 2
        rows = self.rows()[order]
        return replace(self, shape=(rows.shape[0], self.shape[1]), data=rows.reshape(-1))

    def transposed(self) -> Tensor:
        """A 2-D tensor of an unquantised format with its axes swapped; a copy."""
        assert len(self.shape) == 2
        assert FORMATS[self.dtype].block_size == 1
        item = FORMATS[self.dtype].block_nbytes
        values = self.data.reshape(self.shape[0], self.shape[1], item)
        data = np.ascontiguousarray(values.transpose(1, 0, 2)).reshape(-1)
        return replace(self, shape=(self.shape[1], self.shape[0]), data=data)

    @staticmethod
    def from_float32(name: str, values: NDArray[np.float32]) -> Tensor:
        """Wraps a float32 array, e.g. one that a loader computed."""
        values = np.ascontiguousarray(values, dtype=np.float32)
        return Tensor(name, values.shape, "F32", values.reshape(-1).view(np.uint8))

    @staticmethod
    def total_nbytes(tensors: Sequence[Tensor]) -> int:
        return sum(t.nbytes for t in tensors)
