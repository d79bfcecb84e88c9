"""Four neighbouring float32 values at a time, by one 16-byte access or, where rows are not aligned, one by one.

Kernels are written once over quads: both forms put the same elements in the same places, so that the order of a sum
does not depend on alignment. Past the end of a row the one-by-one form reads zeros and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba.cuda import types

from cuda_kernels.primitives import Pointer, Value, device_function, load4, store4

__all__ = ["load_quad", "store_quad"]

i32 = types.int32
ZERO = np.float32(0)


@device_function
def _load_aligned(x: Pointer, row: Value, column: Value, columns: Value) -> Any:
    return load4(x, row + column)


@device_function
def _load_one(x: Pointer, row: Value, column: Value, columns: Value) -> Any:
    return x[row + column] if column < columns else ZERO


@device_function
def _load_by_one(x: Pointer, row: Value, column: Value, columns: Value) -> Any:
    return (
        _load_one(x, row, column, columns),
        _load_one(x, row, i32(column + 1), columns),
        _load_one(x, row, i32(column + 2), columns),
        _load_one(x, row, i32(column + 3), columns),
    )


@device_function
def _store_aligned(
    x: Pointer, row: Value, column: Value, columns: Value, a: Value, b: Value, c: Value, d: Value
) -> None:
    store4(x, row + column, a, b, c, d)


@device_function
def _store_by_one(
    x: Pointer, row: Value, column: Value, columns: Value, a: Value, b: Value, c: Value, d: Value
) -> None:
    x[row + column] = a  # a quad begins inside its row
    if column + 1 < columns:
        x[row + column + 1] = b
    if column + 2 < columns:
        x[row + column + 2] = c
    if column + 3 < columns:
        x[row + column + 3] = d


def load_quad(vector: bool) -> Callable[..., Any]:
    """load(x, row, column, columns) -> (a, b, c, d): elements row + column and on of a row that starts at x[row]."""
    return _load_aligned if vector else _load_by_one


def store_quad(vector: bool) -> Callable[..., Any]:
    """store(x, row, column, columns, a, b, c, d)"""
    return _store_aligned if vector else _store_by_one
