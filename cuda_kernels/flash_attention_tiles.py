"""Tiles of the dense attention kernels: copied into shared memory, multiplied there. Two forms: f32, tensor cores.

A tile is some rows (tokens) of one head. In shared memory a row takes 16 bytes more than its data: an odd number of
16-byte chunks for the halves of the head sizes used here, so that a column of chunks in eight consecutive rows touches
all banks once (ldmatrix), and a number of float32 that is 4 or 20 modulo 32, with the same effect (f32).

The f32 form, 16 threads wide: thread (ty, tx) owns rows 4 ty .. 4 ty + 3, and columns tx, tx + 16, ... of a product of
rows with columns; of the accumulators it owns W neighbouring columns in every 16 W.

            tx = 0   1 ...  15 | 0   1 ...               tx = 0    1  ...   15  |  0    1
    row 0    s   s       s   s   s                  row 0   [W]  [W]       [W]    [W]  [W]
    ...  ty = 0   (scores)                          ...  ty = 0   (accumulators)
    row 3    s   s       s   s   s                  row 3   [W]  [W]       [W]    [W]  [W]

The tensor-core form: a warp owns 16 rows of scores and accumulators, as the C fragments of mma.sync.m16n8k16, which
relabelled are the A fragments of the next product: scores never leave the registers (arXiv:2307.08691, section 3.3).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cuda_kernels.primitives import (
    Value,
    cp_async16,
    device_function,
    fma,
    ldmatrix_x4,
    ldmatrix_x4_trans,
    load2,
    load4,
    mma_bf16,
    mma_f16,
    pack_bf16,
    pack_f16,
    store2,
    store4,
)

__all__ = [
    "PACK",
    "ROW_PADDING",
    "column_width",
    "divide",
    "f32_accumulate",
    "f32_scores",
    "mma_accumulate",
    "mma_scores",
    "store_columns",
    "tile_copier",
    "zero_tile",
]

i32, u32, f32 = types.int32, types.uint32, types.float32

ROW_PADDING = 4  # 32-bit words after each row of a tile

MMA = {"f16": mma_f16, "bf16": mma_bf16}
PACK = {"f16": pack_f16, "bf16": pack_bf16}


def tile_copier(*, row_words: int, rows: int, threads: int) -> Any:
    """A device function that begins to copy `rows` rows of `row_words` 32-bit words; the caller commits the group.

    copy(shared, to, source, at, stride, first, end): rows first, first + 1, ... of source[at:], `stride` words apart;
    rows from `end` on are not read but filled with zeros.
    """
    chunks = row_words // 4
    lanes = next(n for n in (8, 4, 2, 1) if chunks % n == 0)  # threads side by side on a row
    step = threads // lanes
    passes, steps = -(-rows // step), chunks // lanes
    ragged = rows % step != 0
    pitch = row_words + ROW_PADDING

    @device_function
    def copy(shared: Any, to: Value, source: Any, at: Value, stride: Value, first: Value, end: Value) -> None:
        thread = i32(cuda.threadIdx.x)
        row, column = i32(thread // lanes), i32(thread % lanes * 4)
        slot = i32(to + row * pitch + column)
        for i in range(passes):
            if not ragged or row + i * step < rows:
                r = i32(first + row + i * step)
                nbytes = i32(16) if r < end else i32(0)
                chunk = at + i32(min(r, i32(end - 1)) * stride + column)
                for j in range(steps):
                    cp_async16(
                        shared, i32(slot + i * step * pitch + j * lanes * 4), source, chunk + j * lanes * 4, nbytes
                    )

    return copy


@device_function
def divide(a: Value, b: Value) -> Value:
    """a // b of int32 that are not negative, as one 32-bit division."""
    return i32(u32(a) // u32(b))


@device_function
def zero_tile(tile: Any) -> None:
    """Sets a local array (rows, columns) to 0."""
    for i in range(tile.shape[0]):
        for j in range(tile.shape[1]):
            tile[i, j] = np.float32(0)


# ---- f32


def f32_scores(*, head_dim: int, columns: int) -> Any:
    """A device function scores(shared, rows_at, columns_at, s): s (4, columns / 16) = rows . columns.

    rows_at is this thread's first row, columns_at its first column, in tiles of row length head_dim. Each element is
    one chain of fused multiply-adds over the head's elements in ascending order.
    """
    pitch = head_dim + ROW_PADDING
    per_thread = columns // 16

    @device_function
    def scores(shared: Any, rows_at: Value, columns_at: Value, s: Any) -> None:
        a = cuda.local.array((4, 4), f32)
        for i in range(4):
            for j in range(per_thread):
                s[i, j] = np.float32(0)
        for d in range(0, head_dim, 4):
            for i in range(4):
                a[i, 0], a[i, 1], a[i, 2], a[i, 3] = load4(shared, rows_at + d + i * pitch)
            for j in range(per_thread):
                b = load4(shared, columns_at + d + 16 * j * pitch)
                for i in range(4):
                    for e in range(4):
                        s[i, j] = fma(a[i, e], b[e], s[i, j])

    return scores


def column_width(head_dim: int) -> int:
    """How many neighbouring elements of a row one thread of 16 loads at once."""
    return 4 if head_dim % 64 == 0 else 2 if head_dim % 32 == 0 else 1


def f32_accumulate(*, head_dim: int, length: int) -> Any:
    """A device function accumulate(shared, weights_at, values_at, acc): acc (4, head_dim / 16) += weights @ values.

    weights_at is this thread's first row of a tile of row length `length`; values_at the first value tile row's first
    column of this thread: tx * column_width(head_dim). Terms are added in ascending order.
    """
    width = column_width(head_dim)
    groups = head_dim // (16 * width)
    pitch, weights_pitch = head_dim + ROW_PADDING, length + ROW_PADDING
    load = {4: load4, 2: load2, 1: _load1}[width]

    @device_function
    def accumulate(shared: Any, weights_at: Value, values_at: Value, acc: Any) -> None:
        w = cuda.local.array((4, 4), f32)
        for k in range(0, length, 4):
            for i in range(4):
                w[i, 0], w[i, 1], w[i, 2], w[i, 3] = load4(shared, weights_at + k + i * weights_pitch)
            for kk in range(4):
                for j in range(groups):
                    value = load(shared, values_at + k * pitch + kk * pitch + 16 * width * j)
                    for i in range(4):
                        for e in range(width):
                            acc[i, j * width + e] = fma(w[i, kk], value[e], acc[i, j * width + e])

    return accumulate


def store_columns(head_dim: int) -> Any:
    """A device function store(target, at, acc, i, factor): row i of acc (4, head_dim / 16), times factor.

    A zero is stored as +0, whichever tiles the row did not see.
    """
    width = column_width(head_dim)
    groups = head_dim // (16 * width)
    zero = np.float32(0)
    put = {4: _put4, 2: _put2, 1: _put1}[width]

    @device_function
    def store(target: Any, at: Value, acc: Any, i: Value, factor: Value) -> None:
        x = cuda.local.array(4, f32)
        for j in range(groups):
            for e in range(width):
                x[e] = fma(acc[i, j * width + e], factor, zero)
            put(target, at + 16 * width * j, x)

    return store


@device_function
def _load1(array: Any, at: Value) -> Any:
    return (array[u32(at)],)


@device_function
def _put1(target: Any, at: Value, x: Any) -> None:
    target[at] = x[0]


@device_function
def _put2(target: Any, at: Value, x: Any) -> None:
    store2(target, at, x[0], x[1])


@device_function
def _put4(target: Any, at: Value, x: Any) -> None:
    store4(target, at, x[0], x[1], x[2], x[3])


# ---- tensor cores


def mma_scores(*, head_dim: int, columns: int, dtype: str) -> Any:
    """A device function scores(shared, rows_at, columns_at, s): s (columns / 8, 4) = rows . columns, per warp.

    rows_at is the warp's first row, columns_at the first column; s[j] is the C fragment of columns 8 j .. 8 j + 7.
    """
    pitch = head_dim // 2 + ROW_PADDING
    steps, pairs = head_dim // 16, columns // 16
    mma = MMA[dtype]

    @device_function
    def scores(shared: Any, rows_at: Value, columns_at: Value, s: Any) -> None:
        lane = i32(cuda.threadIdx.x & 31)
        a_at = i32(rows_at + (lane & 15) * pitch + (lane >> 4) * 4)
        b_at = i32(columns_at + ((lane & 7) + (lane >> 4) * 8) * pitch + (lane >> 3 & 1) * 4)
        a = cuda.local.array((steps, 4), u32)
        for j in range(2 * pairs):
            for e in range(4):
                s[j, e] = np.float32(0)
        a[0, 0], a[0, 1], a[0, 2], a[0, 3] = ldmatrix_x4(shared, a_at)
        for k in range(steps):  # unrolled, as it indexes a local array
            if k + 1 < steps:
                a[k + 1, 0], a[k + 1, 1], a[k + 1, 2], a[k + 1, 3] = ldmatrix_x4(shared, i32(a_at + (k + 1) * 8))
            for jj in range(pairs):
                b0, b1, b2, b3 = ldmatrix_x4(shared, i32(b_at + jj * 16 * pitch + k * 8))
                j = 2 * jj
                x = mma(a[k, 0], a[k, 1], a[k, 2], a[k, 3], b0, b1, s[j, 0], s[j, 1], s[j, 2], s[j, 3])
                y = mma(a[k, 0], a[k, 1], a[k, 2], a[k, 3], b2, b3, s[j + 1, 0], s[j + 1, 1], s[j + 1, 2], s[j + 1, 3])
                for e in range(4):
                    s[j, e] = x[e]
                    s[j + 1, e] = y[e]

    return scores


def mma_accumulate(*, head_dim: int, length: int, dtype: str) -> Any:
    """A device function accumulate(shared, weights, values_at, acc): acc (head_dim / 8, 4) += weights @ values.

    weights (length / 8, 4) are C fragments of float32, rounded here; values_at is the value tile's first row.
    """
    pitch = head_dim // 2 + ROW_PADDING
    steps, pairs = length // 16, head_dim // 16
    mma, pack = MMA[dtype], PACK[dtype]

    @device_function
    def accumulate(shared: Any, weights: Any, values_at: Value, acc: Any) -> None:
        lane = i32(cuda.threadIdx.x & 31)
        b_at = i32(values_at + (lane & 15) * pitch + (lane >> 4) * 4)
        for k in range(steps):
            a0 = pack(weights[2 * k, 0], weights[2 * k, 1])
            a1 = pack(weights[2 * k, 2], weights[2 * k, 3])
            a2 = pack(weights[2 * k + 1, 0], weights[2 * k + 1, 1])
            a3 = pack(weights[2 * k + 1, 2], weights[2 * k + 1, 3])
            for jj in range(pairs):
                b0, b1, b2, b3 = ldmatrix_x4_trans(shared, i32(b_at + k * 16 * pitch + jj * 8))
                j = 2 * jj
                x = mma(a0, a1, a2, a3, b0, b1, acc[j, 0], acc[j, 1], acc[j, 2], acc[j, 3])
                y = mma(a0, a1, a2, a3, b2, b3, acc[j + 1, 0], acc[j + 1, 1], acc[j + 1, 2], acc[j + 1, 3])
                for e in range(4):
                    acc[j, e] = x[e]
                    acc[j + 1, e] = y[e]

    return accumulate
