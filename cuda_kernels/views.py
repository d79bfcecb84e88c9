"""What launchers ask about arrays: addresses, strides in elements, rows."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from cuda_kernels.launch import Array, require

__all__ = ["Rows", "address_of", "aligned16", "ceil_div", "check_array", "rows_of", "strides_of"]


class Rows(NamedTuple):
    """A view as rows along its last axis, `stride` elements from one to the next."""

    length: int
    columns: int
    stride: int


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def address_of(array: Array) -> int:
    """The address of an array's first element, on its device."""
    data: Any = array.data
    return int(data.ptr) if hasattr(data, "ptr") else int(array.ctypes.data)


def check_array(array: Array, name: str, dtype: DTypeLike, shape: tuple[int | None, ...]) -> None:
    """Holds dtype and shape (None: any length) against what they must be. Raises KernelArgumentError."""
    found = array.shape
    fits = len(found) == len(shape) and all(
        want is None or want == have for have, want in zip(found, shape, strict=True)
    )
    if array.dtype == dtype and fits:  # messages are made where they are needed: this runs at every launch
        return
    require(array.dtype == dtype, f"{name} is {array.dtype}, not {np.dtype(dtype)}")
    expected = ", ".join("any" if want is None else str(want) for want in shape)
    require(fits, f"{name} has shape {tuple(found)}, not ({expected})")


def strides_of(array: Array, name: str) -> tuple[int, ...]:
    """Strides in elements; the last axis must be contiguous. Raises KernelArgumentError.

    The stride of an axis of length 1, which means nothing, counts as that of a contiguous array.
    """
    itemsize = array.dtype.itemsize
    if array.flags.c_contiguous and 0 not in array.shape:
        inner, shape = 1, array.shape
        result = [1] * len(shape)
        for axis in range(len(shape) - 1, 0, -1):
            inner *= shape[axis]
            result[axis - 1] = inner
        return tuple(result)
    require(all(stride >= 0 and stride % itemsize == 0 for stride in array.strides), f"{name} has odd strides")
    strides = [stride // itemsize for stride in array.strides]
    inner = 1
    for axis in reversed(range(len(strides))):
        if array.shape[axis] <= 1:
            strides[axis] = inner
        inner = strides[axis] * max(1, array.shape[axis])
    require(not strides or strides[-1] == 1, f"the last axis of {name} must be contiguous")
    return tuple(strides)


def rows_of(array: Array, name: str) -> Rows:
    """An array (..., M) whose outer axes have one stride between them, as rows. Raises KernelArgumentError."""
    strides, shape = strides_of(array, name), array.shape
    require(len(shape) >= 2, f"{name} must have rows: its shape is {tuple(shape)}")
    for axis in range(len(shape) - 2):
        require(strides[axis] == strides[axis + 1] * shape[axis + 1], f"the rows of {name} must be evenly spaced")
    return Rows(math.prod(shape[:-1]), shape[-1], strides[-2])


def aligned16(*arrays: Array) -> bool:
    """Whether each row of float32 arrays, along the last axis, starts at and fills a multiple of 16 bytes."""
    for array in arrays:
        outer = [stride for size, stride in zip(array.shape[:-1], array.strides[:-1], strict=True) if size > 1]
        if array.shape[-1] % 4 or address_of(array) % 16 or any(stride % 16 for stride in outer):
            return False
    return True
