"""Storage formats of tensors and their exact dequantisation.

STUB: FORMATS is the contract; dequantize is to be written.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["FORMATS", "BlockFormat", "dequantize"]


@dataclass(frozen=True)
class BlockFormat:
    """`block_size` consecutive values of a row are stored in `block_nbytes` bytes."""

    name: str
    block_size: int
    block_nbytes: int

    def nbytes(self, values: int) -> int:
        """Bytes that `values` values take; `values` must be a multiple of the block size."""
        assert values % self.block_size == 0
        return values // self.block_size * self.block_nbytes


FORMATS: dict[str, BlockFormat] = {
    f.name: f
    for f in (
        BlockFormat("F32", 1, 4),
        BlockFormat("F16", 1, 2),
        BlockFormat("BF16", 1, 2),
        BlockFormat("Q8_0", 32, 34),
        BlockFormat("Q4_0", 32, 18),
        BlockFormat("Q4_1", 32, 20),
        BlockFormat("Q5_0", 32, 22),
        BlockFormat("Q5_1", 32, 24),
        BlockFormat("Q4_K", 256, 144),
        BlockFormat("Q5_K", 256, 176),
        BlockFormat("Q6_K", 256, 210),
    )
}


def dequantize(data: NDArray[np.uint8], dtype: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """(nbytes,) uint8 -> float32 of `shape`."""
    raise NotImplementedError
