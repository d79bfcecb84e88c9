"""Dense FlashAttention backward on tensor cores, for f16 and bf16; equations in flash_attention_backward.py.

Four warps; a warp has 16 queries (dq) or 16 keys (dk and dv). The tiles that a block walks over have two places each in
shared memory: the next ones are copied while these are used, with one barrier a tile.

For dk and dv scores are computed transposed, keys by queries, S^T = k q^T and dP^T = v dout^T: as fragments they are
then the left factors of P^T dout and dS^T q, and never leave the registers. With g = lane // 4 and t = lane % 4, a
thread has rows g and g + 8 of its warp's, and of every 8 columns 2 t and 2 t + 1.
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
    divide,
    mma_accumulate,
    mma_scores,
    tile_copier,
    zero_tile,
)
from cuda_kernels.kernel import Kernel
from cuda_kernels.launch import Runtime
from cuda_kernels.primitives import (
    Pointer,
    Value,
    cp_async16,
    cp_async_commit,
    cp_async_wait,
    exp2,
    fma,
    load2,
    store2,
)

__all__ = ["backward_mma", "backward_mma_shared_nbytes", "dkv_mma_kernel", "dq_mma_kernel"]

i32, i64, u32, f32 = types.int32, types.int64, types.uint32, types.float32

ROWS = 64  # queries or keys of a block
THREADS = 128


def _columns(head_dim: int) -> int:
    """Keys or queries of a tile: what registers and 99 KB of shared memory hold."""
    return 64 if head_dim <= 96 else 32


def _build_dq_mma(*, head_dim: int, rows: int, columns: int, dtype: str) -> Any:
    row_words = head_dim // 2
    pitch = row_words + ROW_PADDING
    do_tile = rows * pitch
    kv_tiles = 2 * rows * pitch  # K, V, K, V
    tile_words = columns * pitch
    s_groups, acc_groups = columns // 8, head_dim // 8
    copy_rows = tile_copier(row_words=row_words, rows=rows, threads=THREADS)
    copy_columns = tile_copier(row_words=row_words, rows=columns, threads=THREADS)
    scores = mma_scores(head_dim=head_dim, columns=columns, dtype=dtype)
    accumulate = mma_accumulate(head_dim=head_dim, length=columns, dtype=dtype)
    zero = np.float32(0)

    def flash_attention_dq_mma(
        q: Pointer, k: Pointer, v: Pointer, dout: Pointer, statistics: Pointer, dq: Pointer,
        Q: Value, K: Value, H: Value, group: Value, shift: Value, padded: Value, scale: Value, scale_log2: Value,
    ) -> None:  # fmt: skip
        # late tiles have the most keys under a causal mask: they start first
        q0 = i32((i32(cuda.gridDim.x) - 1 - i32(cuda.blockIdx.x)) * rows)
        h, n = i32(cuda.blockIdx.y), i32(cuda.blockIdx.z)
        q_stride, k_stride = i32(H * row_words), i32(divide(H, group) * row_words)
        q_base = i64(n) * Q * q_stride + h * row_words
        k_base = i64(n) * K * k_stride + divide(h, group) * row_words
        tid = i32(cuda.threadIdx.x)
        warp, g, t = tid >> 5, tid >> 2 & 7, tid & 3
        row = i32(q0 + warp * 16 + g)  # and row + 8
        statistics_at = (i64(n) * H + h) * 2 * padded + row
        minus_lse0, minus_lse1 = statistics[statistics_at], statistics[statistics_at + 8]
        delta0, delta1 = statistics[statistics_at + padded], statistics[statistics_at + padded + 8]
        shared = cuda.shared.array(0, u32)
        s = cuda.local.array((s_groups, 4), f32)
        dp = cuda.local.array((s_groups, 4), f32)
        acc = cuda.local.array((acc_groups, 4), f32)
        zero_tile(acc)
        keys = min(K, i32(min(i32(q0 + rows), Q) + shift))  # that the last query of the tile sees
        num_tiles = i32((keys + columns - 1) // columns) if keys > 0 else i32(0)
        if num_tiles > 0:
            copy_rows(shared, i32(0), q, q_base, q_stride, q0, Q)
            copy_rows(shared, i32(do_tile), dout, q_base, q_stride, q0, Q)
            copy_columns(shared, i32(kv_tiles), k, k_base, k_stride, i32(0), keys)
            copy_columns(shared, i32(kv_tiles + tile_words), v, k_base, k_stride, i32(0), keys)
            cp_async_commit()
        for tile in range(num_tiles):
            k0 = i32(tile * columns)
            k_tile = i32(kv_tiles + (tile & 1) * (2 * tile_words))
            cp_async_wait(0)
            cuda.syncthreads()  # K and V are there, and all have read the last ones
            if tile + 1 < num_tiles:
                other = i32(2 * kv_tiles + 2 * tile_words - k_tile)
                copy_columns(shared, other, k, k_base, k_stride, i32(k0 + columns), keys)
                copy_columns(shared, i32(other + tile_words), v, k_base, k_stride, i32(k0 + columns), keys)
                cp_async_commit()
            scores(shared, i32(warp * 16 * pitch), k_tile, s)
            scores(shared, i32(do_tile + warp * 16 * pitch), i32(k_tile + tile_words), dp)
            for j in range(s_groups):
                for e in range(2):
                    s[j, e] = exp2(fma(s[j, e], scale_log2, minus_lse0)) * (dp[j, e] - delta0)
                    s[j, 2 + e] = exp2(fma(s[j, 2 + e], scale_log2, minus_lse1)) * (dp[j, 2 + e] - delta1)
            if k0 + columns > min(K, i32(q0 + shift + 1)):  # not all rows see all of the tile
                first = i32(k0 + 2 * t)
                end0, end1 = i32(min(K, i32(row + shift + 1)) - first), i32(min(K, i32(row + shift + 9)) - first)
                for j in range(s_groups):
                    for e in range(2):
                        if 8 * j + e >= end0:
                            s[j, e] = zero
                        if 8 * j + e >= end1:
                            s[j, 2 + e] = zero
            accumulate(shared, s, k_tile, acc)
        # + 0 makes a zero +0, whichever tiles the row did not see
        dq_stride = i32(H * head_dim)
        at = (i64(n) * Q + row) * dq_stride + h * head_dim + 2 * t
        if row < Q:
            for j in range(acc_groups):
                store2(dq, at + 8 * j, fma(acc[j, 0], scale, zero), fma(acc[j, 1], scale, zero))
        if row + 8 < Q:
            at += 8 * i64(dq_stride)
            for j in range(acc_groups):
                store2(dq, at + 8 * j, fma(acc[j, 2], scale, zero), fma(acc[j, 3], scale, zero))

    return flash_attention_dq_mma


def _build_dkv_mma(*, head_dim: int, rows: int, columns: int, dtype: str) -> Any:
    row_words = head_dim // 2
    pitch = row_words + ROW_PADDING
    v_tile = rows * pitch
    stages = 2 * rows * pitch  # Q, dO, -lse, delta, and the same again
    tile_words = columns * pitch
    stage_words = 2 * tile_words + 2 * columns
    s_groups, acc_groups, quarter = columns // 8, head_dim // 8, columns // 4
    copy_rows = tile_copier(row_words=row_words, rows=rows, threads=THREADS)
    copy_columns = tile_copier(row_words=row_words, rows=columns, threads=THREADS)
    scores = mma_scores(head_dim=head_dim, columns=columns, dtype=dtype)
    accumulate = mma_accumulate(head_dim=head_dim, length=columns, dtype=dtype)
    zero = np.float32(0)

    def flash_attention_dkv_mma(
        q: Pointer, k: Pointer, v: Pointer, dout: Pointer, statistics: Pointer, dk: Pointer, dv: Pointer,
        Q: Value, K: Value, H: Value, group: Value, shift: Value, padded: Value, scale: Value, scale_log2: Value,
    ) -> None:  # fmt: skip
        k0 = i32(i32(cuda.blockIdx.x) * rows)
        kv_head, n = i32(cuda.blockIdx.y), i32(cuda.blockIdx.z)
        q_stride, k_stride = i32(H * row_words), i32(divide(H, group) * row_words)
        k_base = i64(n) * K * k_stride + kv_head * row_words
        tid = i32(cuda.threadIdx.x)
        warp, g, t = tid >> 5, tid >> 2 & 7, tid & 3
        row = i32(k0 + warp * 16 + g)  # and row + 8
        shared = cuda.shared.array(0, u32)
        shared_f32 = cuda.shared.array(0, f32)  # the same memory
        s = cuda.local.array((s_groups, 4), f32)
        dp = cuda.local.array((s_groups, 4), f32)
        acc_k = cuda.local.array((acc_groups, 4), f32)
        acc_v = cuda.local.array((acc_groups, 4), f32)
        zero_tile(acc_k)
        zero_tile(acc_v)
        first_tile = i32(max(i32(0), i32(k0 - shift)) // columns)  # of the first query that sees the first key
        end_tile = i32((Q + columns - 1) // columns)
        num_tiles = i32(group * i32(end_tile - first_tile))
        copy_rows(shared, i32(0), k, k_base, k_stride, k0, K)
        copy_rows(shared, i32(v_tile), v, k_base, k_stride, k0, K)
        h, tile, q0 = i32(kv_head * group), first_tile, i32(0)
        for step in range(i32(num_tiles + 1)):  # copies tile `step`, computes with the one before
            last_q0 = q0
            if step > 0:
                cp_async_wait(0)
                cuda.syncthreads()  # the last tiles are there, and all have read the ones before
            if step < num_tiles:
                q0 = i32(tile * columns)
                q_base = i64(n) * Q * q_stride + h * row_words
                to = i32(stages + (step & 1) * stage_words)
                copy_columns(shared, to, q, q_base, q_stride, q0, Q)
                copy_columns(shared, i32(to + tile_words), dout, q_base, q_stride, q0, Q)
                if tid < 2 * quarter:
                    part, chunk = tid // quarter, tid % quarter * 4
                    source = ((i64(n) * H + h) * 2 + part) * padded + q0 + chunk
                    slot = i32(to + 2 * tile_words + part * columns + chunk)
                    cp_async16(shared, slot, statistics, source, i32(16))
                cp_async_commit()
                tile = i32(tile + 1)
                if tile == end_tile:
                    h, tile = i32(h + 1), first_tile
            if step > 0:
                q_tile = i32(stages + (step & 1 ^ 1) * stage_words)
                do_tile = i32(q_tile + tile_words)
                scores(shared, i32(warp * 16 * pitch), q_tile, s)
                scores(shared, i32(v_tile + warp * 16 * pitch), do_tile, dp)
                statistics_at = i32(do_tile + tile_words + 2 * t)
                for j in range(s_groups):
                    minus_lse = load2(shared_f32, i32(statistics_at + 8 * j))
                    delta = load2(shared_f32, i32(statistics_at + columns + 8 * j))
                    for e in range(4):
                        s[j, e] = exp2(fma(s[j, e], scale_log2, minus_lse[e & 1]))
                        dp[j, e] = s[j, e] * (dp[j, e] - delta[e & 1])
                if last_q0 + shift < k0 + rows - 1:  # not all rows are seen by all of the tile
                    start0 = i32(row - shift - last_q0 - 2 * t)
                    for j in range(s_groups):
                        for e in range(2):
                            if 8 * j + e < start0:
                                s[j, e] = zero
                                dp[j, e] = zero
                            if 8 * j + e < start0 + 8:
                                s[j, 2 + e] = zero
                                dp[j, 2 + e] = zero
                accumulate(shared, s, do_tile, acc_v)
                accumulate(shared, dp, q_tile, acc_k)
        # + 0 makes a zero +0, whichever tiles the row was not seen by
        dk_stride = i32(divide(H, group) * head_dim)
        at = (i64(n) * K + row) * dk_stride + kv_head * head_dim + 2 * t
        if row < K:
            for j in range(acc_groups):
                store2(dk, at + 8 * j, fma(acc_k[j, 0], scale, zero), fma(acc_k[j, 1], scale, zero))
                store2(dv, at + 8 * j, acc_v[j, 0] + zero, acc_v[j, 1] + zero)
        if row + 8 < K:
            at += 8 * i64(dk_stride)
            for j in range(acc_groups):
                store2(dk, at + 8 * j, fma(acc_k[j, 2], scale, zero), fma(acc_k[j, 3], scale, zero))
                store2(dv, at + 8 * j, acc_v[j, 2] + zero, acc_v[j, 3] + zero)

    return flash_attention_dkv_mma


def _kernel(name: str, build: Any, dtype: str, head_dim: int, results: int) -> Kernel:
    return Kernel(
        name=f"flash_attention_{name}_{dtype}_d{head_dim}",
        build=build,
        constants=(("head_dim", head_dim), ("rows", ROWS), ("columns", _columns(head_dim)), ("dtype", dtype)),
        signature=("u32*",) * 4 + ("f32*",) * (1 + results) + ("i32",) * 6 + ("f32",) * 2,
        threads=THREADS,
        min_blocks=2,  # registers are for two, though shared memory may be for one
    )


@functools.cache
def dq_mma_kernel(dtype: str, head_dim: int) -> Kernel:
    return _kernel("dq", _build_dq_mma, dtype, head_dim, 1)


@functools.cache
def dkv_mma_kernel(dtype: str, head_dim: int) -> Kernel:
    return _kernel("dkv", _build_dkv_mma, dtype, head_dim, 2)


def backward_mma_shared_nbytes(head_dim: int) -> tuple[int, int]:
    """Of dq: Q, dO, and K, V twice; of dk and dv: K, V, and Q, dO twice with their statistics."""
    columns = _columns(head_dim)
    nbytes = 4 * (2 * ROWS + 4 * columns) * (head_dim // 2 + ROW_PADDING)
    return nbytes, nbytes + 4 * 4 * columns


def backward_mma(
    rt: Runtime, shape: AttentionShape, dq_arguments: tuple[Any, ...], dkv_arguments: tuple[Any, ...]
) -> None:
    """Launches both kernels; arguments as in their signatures, checked by flash_attention_backward."""
    dq_nbytes, dkv_nbytes = backward_mma_shared_nbytes(shape.D)
    grid = (-(-shape.Q // ROWS), shape.H, shape.N)
    rt.launch(dq_mma_kernel(shape.dtype, shape.D), grid, dq_arguments, shared_nbytes=dq_nbytes)
    grid = (-(-shape.K // ROWS), shape.KH, shape.N)
    rt.launch(dkv_mma_kernel(shape.dtype, shape.D), grid, dkv_arguments, shared_nbytes=dkv_nbytes)
