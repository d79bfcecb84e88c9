"""Operations on each element of float32 rows: sums and multiples; and the builder that other such families use.

A thread takes one quad of four neighbouring elements; the grid is (rows, quads of a row / 256). Rows may be strided,
and an output may be an input. Bound by memory: each operand is read once, the result written once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numba import cuda
from numba.cuda import types

from cuda_kernels.kernel import Kernel
from cuda_kernels.launch import Array, Runtime, require
from cuda_kernels.primitives import Pointer, Value, device_function
from cuda_kernels.quads import load_quad, store_quad
from cuda_kernels.views import Rows, aligned16, ceil_div, check_array, rows_of

__all__ = ["BINARY", "THREADS", "UNARY", "add", "build_binary", "build_unary", "elementwise_grid", "kernels", "scale"]

THREADS = 256
UNARY = ("f32*", "i64", "f32*", "i64", "i32", "f32")
BINARY = ("f32*", "i64", "f32*", "i64", "f32*", "i64", "i32")

i32, i64 = types.int32, types.int64


def build_unary(function: Callable[..., Value], vector: bool) -> Callable[..., None]:
    """A kernel of signature UNARY: out = function(x, parameter)."""
    load, store = load_quad(vector), store_quad(vector)

    def unary(x: Pointer, x_row: Value, out: Pointer, out_row: Value, columns: Value, parameter: Value) -> None:
        column = i32(4 * (cuda.blockIdx.y * THREADS + cuda.threadIdx.x))
        if column >= columns:
            return
        row = i64(cuda.blockIdx.x)
        a, b, c, d = load(x, row * x_row, column, columns)
        a, b, c, d = function(a, parameter), function(b, parameter), function(c, parameter), function(d, parameter)
        store(out, row * out_row, column, columns, a, b, c, d)

    return unary


def build_binary(function: Callable[..., Value], vector: bool) -> Callable[..., None]:
    """A kernel of signature BINARY: out = function(x, y)."""
    load, store = load_quad(vector), store_quad(vector)

    def binary(
        x: Pointer, x_row: Value, y: Pointer, y_row: Value, out: Pointer, out_row: Value, columns: Value
    ) -> None:
        column = i32(4 * (cuda.blockIdx.y * THREADS + cuda.threadIdx.x))
        if column >= columns:
            return
        row = i64(cuda.blockIdx.x)
        a, b, c, d = load(x, row * x_row, column, columns)
        ya, yb, yc, yd = load(y, row * y_row, column, columns)
        store(out, row * out_row, column, columns, function(a, ya), function(b, yb), function(c, yc), function(d, yd))

    return binary


def elementwise_grid(rows: Rows) -> tuple[int, int, int]:
    """The grid that UNARY and BINARY kernels are launched with."""
    return rows.length, ceil_div(rows.columns, 4 * THREADS), 1


@device_function
def _add(x: Value, y: Value) -> Value:
    return x + y


@device_function
def _scale(x: Value, factor: Value) -> Value:
    return x * factor


def _build_add(*, vector: bool) -> Callable[..., None]:
    return build_binary(_add, vector)


def _build_scale(*, vector: bool) -> Callable[..., None]:
    return build_unary(_scale, vector)


@functools.cache
def _add_kernel(vector: bool) -> Kernel:
    return Kernel(f"add{'' if vector else '_unaligned'}", _build_add, (("vector", vector),), BINARY, THREADS)


@functools.cache
def _scale_kernel(vector: bool) -> Kernel:
    return Kernel(f"scale{'' if vector else '_unaligned'}", _build_scale, (("vector", vector),), UNARY, THREADS)


def add(rt: Runtime, x: Array, y: Array) -> None:
    """x += y, (..., M) float32 each, evenly spaced rows. Raises KernelArgumentError."""
    check_array(x, "x", np.float32, (None,) * x.ndim)
    check_array(y, "y", np.float32, tuple(x.shape))
    to, other = rows_of(x, "x"), rows_of(y, "y")
    if to.length and to.columns:
        arguments = (x, to.stride, y, other.stride, x, to.stride, to.columns)
        rt.launch(_add_kernel(aligned16(x, y)), elementwise_grid(to), arguments)


def scale(rt: Runtime, x: Array, factor: float) -> None:
    """x *= factor, (..., M) float32, evenly spaced rows. Raises KernelArgumentError."""
    check_array(x, "x", np.float32, (None,) * x.ndim)
    rows = rows_of(x, "x")
    require(np.isfinite(np.float32(factor)), f"factor {factor} is not finite")
    if rows.length and rows.columns:
        arguments = (x, rows.stride, x, rows.stride, rows.columns, float(factor))
        rt.launch(_scale_kernel(aligned16(x)), elementwise_grid(rows), arguments)


def kernels() -> list[Kernel]:
    """Every variant."""
    return [kernel(vector) for kernel in (_add_kernel, _scale_kernel) for vector in (True, False)]
