"""Dense FlashAttention backward in float32, with fused multiply-adds; equations in flash_attention_backward.py.

Threads and tiles as in flash_attention_tiles.py. For dq rows are queries and columns keys. For dk and dv rows are keys
and columns queries: S^T = k q^T, dP^T = v dout^T, then dv += P^T dout and dk += dS^T q. P and dS go through shared
memory, where the threads that wrote a row read it.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cuda_kernels.flash_attention_shape import AttentionShape
from cuda_kernels.flash_attention_tiles import (
    ROW_PADDING,
    column_width,
    divide,
    f32_accumulate,
    f32_scores,
    store_columns,
    tile_copier,
    zero_tile,
)
from cuda_kernels.kernel import Kernel
from cuda_kernels.launch import Runtime
from cuda_kernels.primitives import Pointer, Value, cp_async_commit, cp_async_wait, exp2, fma, load4

__all__ = ["backward_f32", "backward_f32_shared_nbytes", "dkv_f32_kernel", "dq_f32_kernel"]

i32, i64, u32, f32 = types.int32, types.int64, types.uint32, types.float32

COLUMNS = 32  # of a tile of scores


def _rows(head_dim: int) -> int:
    """Rows of a tile: what fits into 99 KB."""
    return 64 if head_dim <= 96 else 32


def _build_dq_f32(*, head_dim: int, rows: int, columns: int) -> Any:
    pitch, ds_pitch = head_dim + ROW_PADDING, columns + ROW_PADDING
    do_tile = rows * pitch
    k_tile = 2 * rows * pitch
    v_tile = k_tile + columns * pitch
    ds_tile = v_tile + columns * pitch
    per_thread, acc_columns = columns // 16, head_dim // 16
    width = column_width(head_dim)
    copy_rows = tile_copier(row_words=head_dim, rows=rows, threads=rows * 4)
    copy_columns = tile_copier(row_words=head_dim, rows=columns, threads=rows * 4)
    scores = f32_scores(head_dim=head_dim, columns=columns)
    accumulate = f32_accumulate(head_dim=head_dim, length=columns)
    store = store_columns(head_dim)
    zero = np.float32(0)

    def flash_attention_dq_f32(
        q: Pointer, k: Pointer, v: Pointer, dout: Pointer, statistics: Pointer, dq: Pointer,
        Q: Value, K: Value, H: Value, group: Value, shift: Value, padded: Value, scale: Value, scale_log2: Value,
    ) -> None:  # fmt: skip
        # late tiles have the most keys under a causal mask: they start first
        q0 = i32((i32(cuda.gridDim.x) - 1 - i32(cuda.blockIdx.x)) * rows)
        h, n = i32(cuda.blockIdx.y), i32(cuda.blockIdx.z)
        q_stride, k_stride = i32(H * head_dim), i32(divide(H, group) * head_dim)
        q_base = i64(n) * Q * q_stride + h * head_dim
        k_base = i64(n) * K * k_stride + divide(h, group) * head_dim
        statistics_base = (i64(n) * H + h) * 2 * padded
        tid = i32(cuda.threadIdx.x)
        tx, row = tid & 15, i32((tid >> 4) * 4)
        shared = cuda.shared.array(0, f32)
        s = cuda.local.array((4, per_thread), f32)
        dp = cuda.local.array((4, per_thread), f32)
        acc = cuda.local.array((4, acc_columns), f32)
        zero_tile(acc)
        minus_lse = load4(statistics, statistics_base + q0 + row)
        delta = load4(statistics, statistics_base + padded + q0 + row)
        keys = min(K, i32(min(i32(q0 + rows), Q) + shift))  # that the last query of the tile sees
        num_tiles = i32((keys + columns - 1) // columns) if keys > 0 else i32(0)
        if num_tiles > 0:
            copy_rows(shared, i32(0), q, q_base, q_stride, q0, Q)
            copy_rows(shared, i32(do_tile), dout, q_base, q_stride, q0, Q)
        for tile in range(num_tiles):
            k0 = i32(tile * columns)
            cuda.syncthreads()  # all have read the last K and V
            copy_columns(shared, i32(k_tile), k, k_base, k_stride, k0, keys)
            copy_columns(shared, i32(v_tile), v, k_base, k_stride, k0, keys)
            cp_async_commit()
            cp_async_wait(0)
            cuda.syncthreads()
            scores(shared, i32(row * pitch), i32(k_tile + tx * pitch), s)
            scores(shared, i32(do_tile + row * pitch), i32(v_tile + tx * pitch), dp)
            for i in range(4):
                end = min(K, i32(q0 + row + i + shift + 1))
                for j in range(per_thread):
                    p = exp2(fma(s[i, j], scale_log2, minus_lse[i]))
                    ds = p * (dp[i, j] - delta[i])
                    if k0 + tx + 16 * j >= end:
                        ds = zero
                    shared[u32(ds_tile + (row + i) * ds_pitch + tx + 16 * j)] = ds
            cuda.syncwarp()  # a half-warp reads the rows that it wrote
            accumulate(shared, i32(ds_tile + row * ds_pitch), i32(k_tile + tx * width), acc)
        for i in range(4):
            at = i32(q0 + row + i)
            if at < Q:
                store(dq, q_base + at * q_stride + tx * width, acc, i, scale)

    return flash_attention_dq_f32


def _build_dkv_f32(*, head_dim: int, rows: int, columns: int) -> Any:
    pitch, p_pitch = head_dim + ROW_PADDING, columns + ROW_PADDING
    v_tile = rows * pitch
    q_tile = 2 * rows * pitch
    do_tile = q_tile + columns * pitch
    p_tile = do_tile + columns * pitch
    ds_tile = p_tile + rows * p_pitch
    per_thread, acc_columns = columns // 16, head_dim // 16
    width = column_width(head_dim)
    copy_rows = tile_copier(row_words=head_dim, rows=rows, threads=rows * 4)
    copy_columns = tile_copier(row_words=head_dim, rows=columns, threads=rows * 4)
    scores = f32_scores(head_dim=head_dim, columns=columns)
    accumulate = f32_accumulate(head_dim=head_dim, length=columns)
    store = store_columns(head_dim)
    zero, one = np.float32(0), np.float32(1)

    def flash_attention_dkv_f32(
        q: Pointer, k: Pointer, v: Pointer, dout: Pointer, statistics: Pointer, dk: Pointer, dv: Pointer,
        Q: Value, K: Value, H: Value, group: Value, shift: Value, padded: Value, scale: Value, scale_log2: Value,
    ) -> None:  # fmt: skip
        k0 = i32(i32(cuda.blockIdx.x) * rows)
        kv_head, n = i32(cuda.blockIdx.y), i32(cuda.blockIdx.z)
        q_stride, k_stride = i32(H * head_dim), i32(divide(H, group) * head_dim)
        k_base = i64(n) * K * k_stride + kv_head * head_dim
        tid = i32(cuda.threadIdx.x)
        tx, row = tid & 15, i32((tid >> 4) * 4)
        shared = cuda.shared.array(0, f32)
        s = cuda.local.array((4, per_thread), f32)  # of keys by queries, and so are p, dp and ds
        dp = cuda.local.array((4, per_thread), f32)
        acc_k = cuda.local.array((4, acc_columns), f32)
        acc_v = cuda.local.array((4, acc_columns), f32)
        zero_tile(acc_k)
        zero_tile(acc_v)
        first_tile = i32(max(i32(0), i32(k0 - shift)) // columns)  # of the first query that sees the first key
        end_tile = i32((Q + columns - 1) // columns)
        copy_rows(shared, i32(0), k, k_base, k_stride, k0, K)
        copy_rows(shared, i32(v_tile), v, k_base, k_stride, k0, K)
        for head in range(group):
            h = i32(kv_head * group + head)
            q_base = i64(n) * Q * q_stride + h * head_dim
            statistics_base = (i64(n) * H + h) * 2 * padded + tx
            for tile in range(first_tile, end_tile):
                q0 = i32(tile * columns)
                cuda.syncthreads()  # all have read the last Q and dO
                copy_columns(shared, i32(q_tile), q, q_base, q_stride, q0, Q)
                copy_columns(shared, i32(do_tile), dout, q_base, q_stride, q0, Q)
                cp_async_commit()
                cp_async_wait(0)
                cuda.syncthreads()
                scores(shared, i32(row * pitch), i32(q_tile + tx * pitch), s)
                scores(shared, i32(v_tile + row * pitch), i32(do_tile + tx * pitch), dp)
                for j in range(per_thread):
                    query = i32(q0 + 16 * j)
                    minus_lse = statistics[statistics_base + query]
                    delta = statistics[statistics_base + padded + query]
                    for i in range(4):
                        p = exp2(fma(s[i, j], scale_log2, minus_lse))
                        ds = p * (dp[i, j] - delta)
                        if k0 + row + i > query + tx + shift:
                            p = zero
                            ds = zero
                        shared[u32(p_tile + (row + i) * p_pitch + tx + 16 * j)] = p
                        shared[u32(ds_tile + (row + i) * p_pitch + tx + 16 * j)] = ds
                cuda.syncwarp()  # a half-warp reads the rows that it wrote
                accumulate(shared, i32(p_tile + row * p_pitch), i32(do_tile + tx * width), acc_v)
                accumulate(shared, i32(ds_tile + row * p_pitch), i32(q_tile + tx * width), acc_k)
        for i in range(4):
            at = i32(k0 + row + i)
            if at < K:
                store(dk, k_base + at * k_stride + tx * width, acc_k, i, scale)
                store(dv, k_base + at * k_stride + tx * width, acc_v, i, one)

    return flash_attention_dkv_f32


def _kernel(name: str, build: Any, head_dim: int, results: int) -> Kernel:
    rows = _rows(head_dim)
    return Kernel(
        name=f"flash_attention_{name}_f32_d{head_dim}",
        build=build,
        constants=(("head_dim", head_dim), ("rows", rows), ("columns", COLUMNS)),
        signature=("f32*",) * (5 + results) + ("i32",) * 6 + ("f32",) * 2,
        threads=rows * 4,
    )


@functools.cache
def dq_f32_kernel(head_dim: int) -> Kernel:
    return _kernel("dq", _build_dq_f32, head_dim, 1)


@functools.cache
def dkv_f32_kernel(head_dim: int) -> Kernel:
    return _kernel("dkv", _build_dkv_f32, head_dim, 2)


def backward_f32_shared_nbytes(head_dim: int) -> tuple[int, int]:
    """Of dq: Q, dO, K, V and dS; of dk and dv: P as well."""
    rows = _rows(head_dim)
    scores = rows * (COLUMNS + ROW_PADDING)
    tiles = 2 * (rows + COLUMNS) * (head_dim + ROW_PADDING)
    return 4 * (tiles + scores), 4 * (tiles + 2 * scores)


def backward_f32(
    rt: Runtime, shape: AttentionShape, dq_arguments: tuple[Any, ...], dkv_arguments: tuple[Any, ...]
) -> None:
    """Launches both kernels; arguments as in their signatures, checked by flash_attention_backward."""
    rows = _rows(shape.D)
    dq_nbytes, dkv_nbytes = backward_f32_shared_nbytes(shape.D)
    grid = (-(-shape.Q // rows), shape.H, shape.N)
    rt.launch(dq_f32_kernel(shape.D), grid, dq_arguments, shared_nbytes=dq_nbytes)
    grid = (-(-shape.K // rows), shape.KH, shape.N)
    rt.launch(dkv_f32_kernel(shape.D), grid, dkv_arguments, shared_nbytes=dkv_nbytes)
