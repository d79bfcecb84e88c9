"""Dense FlashAttention forward on tensor cores, for f16 and bf16; shapes and algorithm as in flash_attention.py.

Four warps of 16 queries each; a warp's scores, probabilities and accumulator stay in registers (fragments as in
flash_attention_tiles.py). With g = lane // 4 and t = lane % 4, a thread has rows g and g + 8 of its warp's, and of
every 8 columns 2 t and 2 t + 1. The row maximum and sum are over the 4 threads of a row.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cuda_kernels.flash_attention_shape import LN2, AttentionShape
from cuda_kernels.flash_attention_tiles import (
    PACK,
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
    FULL_MASK,
    Pointer,
    Value,
    cp_async_commit,
    cp_async_wait,
    device_function,
    exp2,
    fma,
    fmax,
    log2,
    rcp,
)

__all__ = ["forward_mma", "forward_mma_kernel", "forward_mma_shared_nbytes"]

i32, i64, f32, u32 = types.int32, types.int64, types.float32, types.uint32

ROWS = 64  # queries of a block
THREADS = 128


def _columns(head_dim: int) -> int:
    """Keys of a tile: what the registers hold."""
    return 64 if head_dim <= 128 else 32


@device_function
def _max_of_4(x: Value) -> Value:
    x = fmax(x, cuda.shfl_xor_sync(FULL_MASK, x, 2))
    return fmax(x, cuda.shfl_xor_sync(FULL_MASK, x, 1))


@device_function
def _sum_of_4(x: Value) -> Value:
    x = x + cuda.shfl_xor_sync(FULL_MASK, x, 2)
    return x + cuda.shfl_xor_sync(FULL_MASK, x, 1)


def _build_forward_mma(*, head_dim: int, rows: int, columns: int, dtype: str) -> Any:
    row_words = head_dim // 2
    pitch = row_words + ROW_PADDING
    s_groups, acc_groups = columns // 8, head_dim // 8
    k_tile = rows * pitch
    v_tile = k_tile + columns * pitch
    copy_rows = tile_copier(row_words=row_words, rows=rows, threads=THREADS)
    copy_columns = tile_copier(row_words=row_words, rows=columns, threads=THREADS)
    scores = mma_scores(head_dim=head_dim, columns=columns, dtype=dtype)
    accumulate = mma_accumulate(head_dim=head_dim, length=columns, dtype=dtype)
    pack = PACK[dtype]
    masked, zero = np.float32(-np.inf), np.float32(0)

    def flash_attention_mma(
        q: Pointer, k: Pointer, v: Pointer, out: Pointer, lse: Pointer,
        Q: Value, K: Value, H: Value, group: Value, shift: Value, scale_log2: Value,
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
        shared = cuda.shared.array(0, u32)
        s = cuda.local.array((s_groups, 4), f32)
        acc = cuda.local.array((acc_groups, 4), f32)
        zero_tile(acc)
        m0 = m1 = masked
        l0 = l1 = zero
        keys = min(K, i32(min(i32(q0 + rows), Q) + shift))  # that the last query of the tile sees
        num_tiles = i32((keys + columns - 1) // columns) if keys > 0 else i32(0)
        if num_tiles > 0:
            copy_rows(shared, i32(0), q, q_base, q_stride, q0, Q)
            copy_columns(shared, i32(k_tile), k, k_base, k_stride, i32(0), keys)
            cp_async_commit()
        for tile in range(num_tiles):
            k0 = i32(tile * columns)
            cp_async_wait(0)
            cuda.syncthreads()  # K is there, and all have read the last V
            copy_columns(shared, i32(v_tile), v, k_base, k_stride, k0, keys)
            cp_async_commit()
            scores(shared, i32(warp * 16 * pitch), i32(k_tile), s)
            if k0 + columns > min(K, i32(q0 + shift + 1)):  # not all rows see all of the tile
                first = i32(k0 + 2 * t)
                end0, end1 = i32(min(K, i32(row + shift + 1)) - first), i32(min(K, i32(row + shift + 9)) - first)
                for j in range(s_groups):
                    for e in range(2):
                        if 8 * j + e >= end0:
                            s[j, e] = masked
                        if 8 * j + e >= end1:
                            s[j, 2 + e] = masked
            x0, x1 = m0, m1
            for j in range(s_groups):
                x0 = fmax(x0, fmax(s[j, 0], s[j, 1]))
                x1 = fmax(x1, fmax(s[j, 2], s[j, 3]))
            x0, x1 = _max_of_4(x0), _max_of_4(x1)
            base0 = x0 if x0 > masked else zero  # nothing seen yet: -inf - -inf is NaN
            base1 = x1 if x1 > masked else zero
            c0, c1 = exp2((m0 - base0) * scale_log2), exp2((m1 - base1) * scale_log2)
            m0, m1 = x0, x1
            l0, l1 = l0 * c0, l1 * c1
            less0, less1 = -(base0 * scale_log2), -(base1 * scale_log2)
            for j in range(s_groups):
                for e in range(2):
                    s[j, e] = exp2(fma(s[j, e], scale_log2, less0))
                    s[j, 2 + e] = exp2(fma(s[j, 2 + e], scale_log2, less1))
                l0 = l0 + (s[j, 0] + s[j, 1])
                l1 = l1 + (s[j, 2] + s[j, 3])
            for j in range(acc_groups):
                for e in range(2):
                    acc[j, e] = acc[j, e] * c0
                    acc[j, 2 + e] = acc[j, 2 + e] * c1
            cp_async_wait(0)
            cuda.syncthreads()  # V is there, and all have read K
            if tile + 1 < num_tiles:
                copy_columns(shared, i32(k_tile), k, k_base, k_stride, i32(k0 + columns), keys)
                cp_async_commit()
            accumulate(shared, s, i32(v_tile), acc)
        l0, l1 = _sum_of_4(l0), _sum_of_4(l1)
        i0 = rcp(l0) if l0 != zero else zero
        i1 = rcp(l1) if l1 != zero else zero
        lse_base = (i64(n) * H + h) * Q
        # + 0 makes a zero +0, whichever tiles the row did not see
        if row < Q:
            at = q_base + row * q_stride + t
            for j in range(acc_groups):
                out[at + 4 * j] = pack(fma(acc[j, 0], i0, zero), fma(acc[j, 1], i0, zero))
            if t == 0:
                lse[lse_base + row] = fma(m0, scale_log2, log2(l0)) * LN2
        if row + 8 < Q:
            at = q_base + (row + 8) * q_stride + t
            for j in range(acc_groups):
                out[at + 4 * j] = pack(fma(acc[j, 2], i1, zero), fma(acc[j, 3], i1, zero))
            if t == 0:
                lse[lse_base + row + 8] = fma(m1, scale_log2, log2(l1)) * LN2

    return flash_attention_mma


@functools.cache
def forward_mma_kernel(dtype: str, head_dim: int) -> Kernel:
    return Kernel(
        name=f"flash_attention_{dtype}_d{head_dim}",
        build=_build_forward_mma,
        constants=(("head_dim", head_dim), ("rows", ROWS), ("columns", _columns(head_dim)), ("dtype", dtype)),
        signature=("u32*",) * 4 + ("f32*",) + ("i32",) * 5 + ("f32",),
        threads=THREADS,
        min_blocks=3 if head_dim <= 128 else 1,  # left alone, ptxas spills to fit four
    )


def forward_mma_shared_nbytes(head_dim: int) -> int:
    """Q, K and V."""
    return 4 * (ROWS + 2 * _columns(head_dim)) * (head_dim // 2 + ROW_PADDING)


def forward_mma(rt: Runtime, shape: AttentionShape, arguments: tuple[Any, ...]) -> None:
    """Launches the kernel; arguments as in its signature, checked by flash_attention."""
    grid = (-(-shape.Q // ROWS), shape.H, shape.N)
    kernel = forward_mma_kernel(shape.dtype, shape.D)
    rt.launch(kernel, grid, arguments, shared_nbytes=forward_mma_shared_nbytes(shape.D))
