"""Rows picked by number: out[r] = x[rows[r]], float32. A number below 0 gives a row of zeros.

A thread takes one quad of four neighbouring elements; the grid is (rows, quads of a row / 256).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numba import cuda
from numba.cuda import types

from cuda_kernels.kernel import Kernel
from cuda_kernels.launch import Array, Runtime
from cuda_kernels.primitives import Pointer, Value
from cuda_kernels.quads import load_quad, store_quad
from cuda_kernels.views import aligned16, ceil_div, check_array, rows_of, strides_of

__all__ = ["gather_rows", "kernels"]

THREADS = 256

i32, i64 = types.int32, types.int64
ZERO = np.float32(0)


def _build_gather(*, vector: bool) -> Callable[..., None]:
    load, store = load_quad(vector), store_quad(vector)

    def gather(x: Pointer, x_row: Value, rows: Pointer, out: Pointer, out_row: Value, columns: Value) -> None:
        column = i32(4 * (cuda.blockIdx.y * THREADS + cuda.threadIdx.x))
        if column >= columns:
            return
        a, b, c, d = ZERO, ZERO, ZERO, ZERO
        source = rows[cuda.blockIdx.x]
        if source >= 0:
            a, b, c, d = load(x, i64(source) * x_row, column, columns)
        store(out, i64(cuda.blockIdx.x) * out_row, column, columns, a, b, c, d)

    return gather


@functools.cache
def _gather_kernel(vector: bool) -> Kernel:
    name = f"gather_rows{'' if vector else '_unaligned'}"
    return Kernel(name, _build_gather, (("vector", vector),), ("f32*", "i64", "i32*", "f32*", "i64", "i32"), THREADS)


def gather_rows(rt: Runtime, x: Array, rows: Array, out: Array) -> None:
    """x (N, M) float32, rows (R,) int32 below N -> out (R, M) float32; rows of x and out may be strided.

    Raises KernelArgumentError.
    """
    check_array(x, "x", np.float32, (None, None))
    check_array(rows, "rows", np.int32, (None,))
    check_array(out, "out", np.float32, (rows.shape[0], x.shape[1]))
    strides_of(rows, "rows")
    source, to = rows_of(x, "x"), rows_of(out, "out")
    if to.length and to.columns:
        grid = (to.length, ceil_div(to.columns, 4 * THREADS), 1)
        rt.launch(_gather_kernel(aligned16(x, out)), grid, (x, source.stride, rows, out, to.stride, to.columns))


def kernels() -> list[Kernel]:
    """Every variant."""
    return [_gather_kernel(vector) for vector in (True, False)]
