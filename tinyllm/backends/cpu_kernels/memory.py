"""Memory that kernels use: zeroed, aligned to a cache line, its pages untouched until they are written."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np
from numpy.typing import NDArray

__all__ = ["aligned_zeros", "sparse_zeros"]

_LINE = 64


def aligned_zeros(nbytes: int) -> NDArray[np.uint8]:
    """(nbytes,) zeros at a multiple of 64 bytes."""
    buffer = np.zeros(nbytes + _LINE, np.uint8)
    start = -buffer.ctypes.data % _LINE
    return buffer[start : start + nbytes]


def sparse_zeros(nbytes: int) -> NDArray[np.uint8]:
    """(nbytes,) zeros at the start of a page, for an array of which few pages may ever be written.

    Numpy asks for huge pages, so that the first byte written to an array costs 2 MiB, for each of a cache's layers.
    """
    size = max(nbytes, 1)  # a mapping cannot be empty
    if not hasattr(mmap, "MAP_PRIVATE"):
        return np.frombuffer(mmap.mmap(-1, size), np.uint8)[:nbytes]
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without huge pages
            mapping.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(mapping, np.uint8)[:nbytes]
