"""Memory that kernels use: zeroed, aligned to a cache line, its pages untouched until they are written."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["aligned_zeros"]

_LINE = 64


def aligned_zeros(nbytes: int) -> NDArray[np.uint8]:
    """(nbytes,) zeros at a multiple of 64 bytes."""
    buffer = np.zeros(nbytes + _LINE, np.uint8)
    start = -buffer.ctypes.data % _LINE
    return buffer[start : start + nbytes]
