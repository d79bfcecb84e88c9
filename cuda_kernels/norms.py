"""RMSNorm and LayerNorm over the rows of float32 arrays, the first also joined with a residual's addition.

    rms_norm     y = x / sqrt(mean(x^2) + eps) * weight                                    (arXiv:1910.07467, eq. 4)
    layer_norm   y = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias     (arXiv:1607.06450, eq. 4)

A row of M elements belongs to one warp (M <= 256; four rows to a block) or to a block of 128 to 1024 threads, enough
that each has one quad of four neighbouring elements while M <= 4096. The sum's order depends on M alone: thread t of N
takes quads t, t + N, ..., keeps one running sum for each of the four places, and adds (s0 + s1) + (s2 + s3); lanes are
added in a butterfly, then warps in another. Each thread reads its own quads again for what follows, from cache, so x
and out may be the same memory. Bound by memory: a row is read once and written once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cuda_kernels.kernel import Kernel
from cuda_kernels.launch import Array, Runtime, require
from cuda_kernels.primitives import FULL_MASK, Pointer, Value, device_function, fma
from cuda_kernels.quads import load_quad, store_quad
from cuda_kernels.views import aligned16, ceil_div, check_array, strides_of

__all__ = ["add_rms_norm", "kernels", "layer_norm", "rms_norm"]

WARP_MAX = 256  # longest row that one warp takes
WARP_ROWS = 4

i32, i64, f32 = types.int32, types.int64, types.float32
ZERO, ONE = np.float32(0), np.float32(1)


@device_function
def _warp_sum(value: Value) -> Value:
    """The sum over a warp, in each lane: a butterfly, which adds the same pairs in every lane."""
    for step in (16, 8, 4, 2, 1):
        value += cuda.shfl_xor_sync(FULL_MASK, value, step)
    return value


def row_threads(columns: int) -> int:
    """Threads that share a row."""
    return 32 if columns <= WARP_MAX else min(1024, 1 << (ceil_div(columns, 4) - 1).bit_length())


def _row_tools(threads: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(row, thread in it) of the calling thread, and the sum over a row's threads.

    sum(value, parts): parts is float32[32] in shared memory, and serves one sum alone.
    """
    if threads == 32:

        @device_function
        def place_of_warp() -> Any:
            thread = i32(cuda.threadIdx.x)
            return i32(cuda.blockIdx.x * WARP_ROWS + (thread >> 5)), i32(thread & 31)

        @device_function
        def warp_sum(value: Value, parts: Value) -> Value:
            return _warp_sum(value)

        return place_of_warp, warp_sum
    warps = threads // 32

    @device_function
    def place_of_block() -> Any:
        return i32(cuda.blockIdx.x), i32(cuda.threadIdx.x)

    @device_function
    def block_sum(value: Value, parts: Value) -> Value:
        value = _warp_sum(value)
        thread = i32(cuda.threadIdx.x)
        lane = thread & 31
        if lane == 0:
            parts[thread >> 5] = value
        cuda.syncthreads()
        return _warp_sum(parts[lane] if lane < warps else ZERO)

    return place_of_block, block_sum


def _scale_row(threads: int, vector: bool) -> Callable[..., None]:
    """out[to:] = x[at:] * factor * weight over a thread's quads of a row, from `first` on."""
    load, store = load_quad(vector), store_quad(vector)
    step = 4 * threads

    @device_function
    def scale_row(
        x: Pointer, at: Value, weight: Pointer, columns: Value, factor: Value, out: Pointer, to: Value, first: Value
    ) -> None:
        for column in range(first, columns, i32(step)):
            a, b, c, d = load(x, at, column, columns)
            wa, wb, wc, wd = load(weight, i64(0), column, columns)
            store(out, to, column, columns, a * factor * wa, b * factor * wb, c * factor * wc, d * factor * wd)

    return scale_row


def _build_rms_norm(*, threads: int, vector: bool) -> Callable[..., None]:
    place, row_sum = _row_tools(threads)
    load, scale_row = load_quad(vector), _scale_row(threads, vector)
    step = 4 * threads

    def rms_norm(
        x: Pointer, x_outer: Value, x_row: Value, rows: Value, columns: Value, weight: Pointer, eps: Value,
        out: Pointer, out_outer: Value, out_row: Value,
    ) -> None:  # fmt: skip
        parts = cuda.shared.array(32, types.float32)
        row, thread = place()
        if row >= rows:
            return
        at = i64(cuda.blockIdx.y) * x_outer + i64(row) * x_row
        first = i32(4 * thread)
        s0, s1, s2, s3 = ZERO, ZERO, ZERO, ZERO
        for column in range(first, columns, i32(step)):
            a, b, c, d = load(x, at, column, columns)
            s0, s1, s2, s3 = fma(a, a, s0), fma(b, b, s1), fma(c, c, s2), fma(d, d, s3)
        total = row_sum((s0 + s1) + (s2 + s3), parts)
        to = i64(cuda.blockIdx.y) * out_outer + i64(row) * out_row
        scale_row(x, at, weight, columns, ONE / f32(math.sqrt(total / f32(columns) + eps)), out, to, first)

    return rms_norm


def _build_add_rms_norm(*, threads: int, vector: bool) -> Callable[..., None]:
    place, row_sum = _row_tools(threads)
    load, store, scale_row = load_quad(vector), store_quad(vector), _scale_row(threads, vector)
    step = 4 * threads

    def add_rms_norm(
        x: Pointer, x_row: Value, y: Pointer, y_row: Value, rows: Value, columns: Value, weight: Pointer, eps: Value,
        out: Pointer, out_row: Value,
    ) -> None:  # fmt: skip
        parts = cuda.shared.array(32, types.float32)
        row, thread = place()
        if row >= rows:
            return
        at, other, to = i64(row) * x_row, i64(row) * y_row, i64(row) * out_row
        first = i32(4 * thread)
        s0, s1, s2, s3 = ZERO, ZERO, ZERO, ZERO
        for column in range(first, columns, i32(step)):
            a, b, c, d = load(x, at, column, columns)
            ya, yb, yc, yd = load(y, other, column, columns)
            a, b, c, d = a + ya, b + yb, c + yc, d + yd
            store(x, at, column, columns, a, b, c, d)
            s0, s1, s2, s3 = fma(a, a, s0), fma(b, b, s1), fma(c, c, s2), fma(d, d, s3)
        total = row_sum((s0 + s1) + (s2 + s3), parts)
        scale_row(x, at, weight, columns, ONE / f32(math.sqrt(total / f32(columns) + eps)), out, to, first)

    return add_rms_norm


def _build_layer_norm(*, threads: int, vector: bool) -> Callable[..., None]:
    place, row_sum = _row_tools(threads)
    load, store = load_quad(vector), store_quad(vector)
    step = 4 * threads

    def layer_norm(
        x: Pointer, x_row: Value, rows: Value, columns: Value, weight: Pointer, bias: Pointer, eps: Value,
        out: Pointer, out_row: Value,
    ) -> None:  # fmt: skip
        parts = cuda.shared.array(32, types.float32)
        square_parts = cuda.shared.array(32, types.float32)
        row, thread = place()
        if row >= rows:
            return
        at, to = i64(row) * x_row, i64(row) * out_row
        first, count = i32(4 * thread), f32(columns)
        s0, s1, s2, s3 = ZERO, ZERO, ZERO, ZERO
        for column in range(first, columns, i32(step)):
            a, b, c, d = load(x, at, column, columns)
            s0, s1, s2, s3 = s0 + a, s1 + b, s2 + c, s3 + d
        mean = row_sum((s0 + s1) + (s2 + s3), parts) / count
        s0, s1, s2, s3 = ZERO, ZERO, ZERO, ZERO
        for column in range(first, columns, i32(step)):
            a, b, c, d = load(x, at, column, columns)
            a -= mean
            b = b - mean if vector or column + 1 < columns else ZERO
            c = c - mean if vector or column + 2 < columns else ZERO
            d = d - mean if vector or column + 3 < columns else ZERO
            s0, s1, s2, s3 = fma(a, a, s0), fma(b, b, s1), fma(c, c, s2), fma(d, d, s3)
        variance = row_sum((s0 + s1) + (s2 + s3), square_parts) / count
        inverse = ONE / f32(math.sqrt(variance + eps))
        for column in range(first, columns, i32(step)):
            a, b, c, d = load(x, at, column, columns)
            wa, wb, wc, wd = load(weight, i64(0), column, columns)
            ba, bb, bc, bd = load(bias, i64(0), column, columns)
            store(
                out,
                to,
                column,
                columns,
                fma((a - mean) * inverse, wa, ba),
                fma((b - mean) * inverse, wb, bb),
                fma((c - mean) * inverse, wc, bc),
                fma((d - mean) * inverse, wd, bd),
            )

    return layer_norm


_VARIANTS: dict[str, tuple[Callable[..., Callable[..., None]], tuple[str, ...]]] = {
    "rms_norm": (_build_rms_norm, ("f32*", "i64", "i64", "i32", "i32", "f32*", "f32", "f32*", "i64", "i64")),
    "add_rms_norm": (
        _build_add_rms_norm,
        ("f32*", "i64", "f32*", "i64", "i32", "i32", "f32*", "f32", "f32*", "i64"),
    ),
    "layer_norm": (_build_layer_norm, ("f32*", "i64", "i32", "i32", "f32*", "f32*", "f32", "f32*", "i64")),
}


@functools.cache
def _kernel(name: str, threads: int, vector: bool) -> Kernel:
    build, signature = _VARIANTS[name]
    constants = (("threads", threads), ("vector", vector))
    block = WARP_ROWS * 32 if threads == 32 else threads
    return Kernel(f"{name}_{threads}{'' if vector else '_unaligned'}", build, constants, signature, block)


def _launch(
    rt: Runtime, name: str, rows: int, outer: int, columns: int, arrays: tuple[Array, ...], arguments: tuple[Any, ...]
) -> None:
    if rows == 0 or outer == 0:
        return
    require(columns >= 1, "a row to normalise has no elements")
    threads = row_threads(columns)
    grid = (ceil_div(rows, WARP_ROWS) if threads == 32 else rows, outer, 1)
    rt.launch(_kernel(name, threads, aligned16(*arrays)), grid, arguments)


def rms_norm(rt: Runtime, x: Array, weight: Array, eps: float, out: Array) -> None:
    """x (T, M) or (T, H, M), weight (M,) -> out, like x; float32, any outer strides, T <= 65535 where they are uneven.

    out may be x. Raises KernelArgumentError.
    """
    check_array(x, "x", np.float32, (None,) * max(2, min(3, x.ndim)))
    check_array(weight, "weight", np.float32, (x.shape[-1],))
    check_array(out, "out", np.float32, tuple(x.shape))
    strides_of(weight, "weight")
    *outer_shape, rows, columns = x.shape
    (*x_outer, x_row, _), (*out_outer, out_row, _) = strides_of(x, "x"), strides_of(out, "out")
    outer = outer_shape[0] if outer_shape else 1
    if outer_shape and x_outer[0] == rows * x_row and out_outer[0] == rows * out_row:
        rows, outer = rows * outer, 1
    arguments = (
        x, x_outer[0] if x_outer else 0, x_row, rows, columns, weight, float(eps),
        out, out_outer[0] if out_outer else 0, out_row,
    )  # fmt: skip
    _launch(rt, "rms_norm", rows, outer, columns, (x, weight, out), arguments)


def add_rms_norm(rt: Runtime, residual: Array, x: Array, weight: Array, eps: float, out: Array) -> None:
    """residual (T, M) += x (T, M), in place; out = rms_norm(residual), the same bits as the two steps apart.

    float32, rows may be strided; out is neither residual nor x. Raises KernelArgumentError.
    """
    check_array(residual, "residual", np.float32, (None, None))
    rows, columns = residual.shape
    for array, name in ((x, "x"), (out, "out")):
        check_array(array, name, np.float32, (rows, columns))
    check_array(weight, "weight", np.float32, (columns,))
    strides_of(weight, "weight")
    arguments = (
        residual, strides_of(residual, "residual")[0], x, strides_of(x, "x")[0], rows, columns, weight, float(eps),
        out, strides_of(out, "out")[0],
    )  # fmt: skip
    _launch(rt, "add_rms_norm", rows, 1, columns, (residual, x, weight, out), arguments)


def layer_norm(rt: Runtime, x: Array, weight: Array, bias: Array, eps: float, out: Array) -> None:
    """x (T, M), weight (M,), bias (M,) -> out (T, M); float32, rows may be strided, out may be x.

    Raises KernelArgumentError.
    """
    check_array(x, "x", np.float32, (None, None))
    rows, columns = x.shape
    check_array(out, "out", np.float32, (rows, columns))
    for array, name in ((weight, "weight"), (bias, "bias")):
        check_array(array, name, np.float32, (columns,))
        strides_of(array, name)
    arguments = (
        x, strides_of(x, "x")[0], rows, columns, weight, bias, float(eps), out, strides_of(out, "out")[0],
    )  # fmt: skip
    _launch(rt, "layer_norm", rows, 1, columns, (x, weight, bias, out), arguments)


def kernels() -> list[Kernel]:
    """Every aligned variant, and the smallest and largest of the others."""
    aligned = [_kernel(name, threads, True) for name in _VARIANTS for threads in (32, 128, 256, 512, 1024)]
    return aligned + [_kernel(name, threads, False) for name in _VARIANTS for threads in (32, 1024)]
