"""Dense FlashAttention forward: out = softmax(scale * q k^T) v in tiles, with the log-sum-exp of each row.

q (N, Q, H, D), k and v (N, K, KH, D), out like q, lse (N, H, Q) float32, natural logarithm. Query head h reads key head
h // (H / KH). Causal masks are aligned at the end: query i sees the keys j <= i + K - Q.

    Q = 3, K = 5:  x x x . .        Q = 5, K = 3:  . . .   rows that see nothing: out 0, lse -inf
                   x x x x .                       . . .
                   x x x x x                       x . .
                                                   x x .
                                                   x x x

A block takes a tile of queries of one head and walks over the tiles of keys with an online softmax in base 2
(arXiv:2205.14135, algorithm 1; the division comes last, arXiv:2307.08691, section 3.1). Keys of the next tile and
values of this one are copied (cp.async) while the tensor cores or multipliers are busy:

    wait K(t), barrier | copy V(t) | S = Q K^T, softmax | wait V(t), barrier | copy K(t + 1) | O = c O + P V

Tiles of keys start at multiples of the tile's length whatever the mask, N and Q, and masked scores leave a row's
maximum, sum and accumulator as they were: a row's bits depend on its own query, keys and values.

Limits: head sizes 64, 80, 96, 128, 256; C-contiguous arrays; scale > 0. f32 is computed with fused multiply-adds;
f16 and bf16 (stored as uint16) on tensor cores with float32 accumulation, P rounded to the stored type.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cuda_kernels.flash_attention_mma import forward_mma, forward_mma_kernel, forward_mma_shared_nbytes
from cuda_kernels.flash_attention_shape import (
    FORWARD_HEAD_DIMS,
    LN2,
    LOG2_E,
    AttentionShape,
    check_like,
    constant_of,
    words,
)
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
from cuda_kernels.launch import Array, Runtime, require
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
from cuda_kernels.roofline import TileWork

__all__ = ["flash_attention", "kernels_for_report", "shared_nbytes_of", "work_of"]

i32, i64, u32, f32 = types.int32, types.int64, types.uint32, types.float32


def _f32_tile(head_dim: int) -> tuple[int, int]:
    """(queries, keys) of a tile: what fits into 99 KB."""
    return (64, 32) if head_dim <= 128 else (32, 16)


@device_function
def max_of_16(x: Value) -> Value:
    """The largest of the 16 threads of a half-warp."""
    for step in (8, 4, 2, 1):
        x = fmax(x, cuda.shfl_xor_sync(FULL_MASK, x, step))
    return x


@device_function
def sum_of_16(x: Value) -> Value:
    """The sum over the 16 threads of a half-warp, the same tree in each."""
    for step in (8, 4, 2, 1):
        x = x + cuda.shfl_xor_sync(FULL_MASK, x, step)
    return x


def _build_forward_f32(*, head_dim: int, rows: int, columns: int) -> Any:
    pitch, weights_pitch = head_dim + ROW_PADDING, columns + ROW_PADDING
    k_tile = rows * pitch
    v_tile = k_tile + columns * pitch
    p_tile = v_tile + columns * pitch
    per_thread, acc_columns = columns // 16, head_dim // 16
    threads = rows * 4
    width = column_width(head_dim)
    copy_rows = tile_copier(row_words=head_dim, rows=rows, threads=threads)
    copy_columns = tile_copier(row_words=head_dim, rows=columns, threads=threads)
    scores = f32_scores(head_dim=head_dim, columns=columns)
    accumulate = f32_accumulate(head_dim=head_dim, length=columns)
    store = store_columns(head_dim)
    masked, zero = np.float32(-np.inf), np.float32(0)

    def flash_attention_f32(
        q: Pointer, k: Pointer, v: Pointer, out: Pointer, lse: Pointer,
        Q: Value, K: Value, H: Value, group: Value, shift: Value, scale_log2: Value,
    ) -> None:  # fmt: skip
        # late tiles have the most keys under a causal mask: they start first
        q0 = i32((i32(cuda.gridDim.x) - 1 - i32(cuda.blockIdx.x)) * rows)
        h, n = i32(cuda.blockIdx.y), i32(cuda.blockIdx.z)
        q_stride, k_stride = i32(H * head_dim), i32(divide(H, group) * head_dim)
        q_base = i64(n) * Q * q_stride + h * head_dim
        k_base = i64(n) * K * k_stride + divide(h, group) * head_dim
        tid = i32(cuda.threadIdx.x)
        tx, row = tid & 15, i32((tid >> 4) * 4)
        shared = cuda.shared.array(0, f32)
        s = cuda.local.array((4, per_thread), f32)
        acc = cuda.local.array((4, acc_columns), f32)
        maximum = cuda.local.array(4, f32)
        total = cuda.local.array(4, f32)
        zero_tile(acc)
        for i in range(4):
            maximum[i] = masked
            total[i] = zero
        keys = min(K, i32(min(i32(q0 + rows), Q) + shift))  # that the last query of the tile sees
        num_tiles = i32((keys + columns - 1) // columns) if keys > 0 else i32(0)
        if num_tiles > 0:
            copy_rows(shared, i32(0), q, q_base, q_stride, q0, Q)
            copy_columns(shared, i32(k_tile), k, k_base, k_stride, i32(0), keys)
            cp_async_commit()
        for tile in range(num_tiles):
            k0 = i32(tile * columns)
            cp_async_wait(0)
            cuda.syncthreads()  # K is there, and all have read the last V and P
            copy_columns(shared, i32(v_tile), v, k_base, k_stride, k0, keys)
            cp_async_commit()
            scores(shared, i32(row * pitch), i32(k_tile + tx * pitch), s)
            for i in range(4):
                end = min(K, i32(q0 + row + i + shift + 1))
                largest = maximum[i]
                for j in range(per_thread):
                    if k0 + tx + 16 * j >= end:
                        s[i, j] = masked
                    largest = fmax(largest, s[i, j])
                largest = max_of_16(largest)
                base = largest if largest > masked else zero  # nothing seen yet: -inf - -inf is NaN
                correction = exp2((maximum[i] - base) * scale_log2)
                maximum[i] = largest
                total[i] = total[i] * correction
                for j in range(per_thread):
                    p = exp2(fma(s[i, j], scale_log2, -(base * scale_log2)))
                    total[i] = total[i] + p
                    shared[u32(p_tile + (row + i) * weights_pitch + tx + 16 * j)] = p
                for j in range(acc_columns):
                    acc[i, j] = acc[i, j] * correction
            cp_async_wait(0)
            cuda.syncthreads()  # V and P are there, and all have read K
            if tile + 1 < num_tiles:
                copy_columns(shared, i32(k_tile), k, k_base, k_stride, i32(k0 + columns), keys)
                cp_async_commit()
            accumulate(shared, i32(p_tile + row * weights_pitch), i32(v_tile + tx * width), acc)
        for i in range(4):
            at = i32(q0 + row + i)
            whole = sum_of_16(total[i])
            if at < Q:
                inverse = rcp(whole) if whole != zero else zero
                store(out, q_base + at * q_stride + tx * width, acc, i, inverse)
                if tx == 0:
                    lse[(i64(n) * H + h) * Q + at] = fma(maximum[i], scale_log2, log2(whole)) * LN2

    return flash_attention_f32


@functools.cache
def forward_f32_kernel(head_dim: int) -> Kernel:
    rows, columns = _f32_tile(head_dim)
    return Kernel(
        name=f"flash_attention_f32_d{head_dim}",
        build=_build_forward_f32,
        constants=(("head_dim", head_dim), ("rows", rows), ("columns", columns)),
        signature=("f32*",) * 5 + ("i32",) * 5 + ("f32",),
        threads=rows * 4,
    )


def flash_attention(
    rt: Runtime, q: Array, k: Array, v: Array, out: Array, lse: Array, *, dtype: str, scale: float, causal: bool
) -> None:
    """Attention of dense batches; see the module for shapes and limits.

    Args:
        q, k, v: (N, Q, H, D), (N, K, KH, D) x 2: float32, or uint16 that holds float16 or bfloat16.
        out: like q, written.
        lse: (N, H, Q) float32, written: log(sum(exp(scale * q k^T))) of each row, for the backward pass.
        dtype: "f32", "f16" or "bf16".
        scale: of the scores, above 0.

    Raises:
        KernelArgumentError: shapes, dtypes or limits.
    """
    shape = AttentionShape.of(q, k, v, dtype=dtype, causal=causal, head_dims=FORWARD_HEAD_DIMS)
    check_like("out", out, q.shape, shape.stored_dtype)
    check_like("lse", lse, (shape.N, shape.H, shape.Q), np.dtype(np.float32))
    require(math.isfinite(scale) and scale > 0, f"scale must be above 0, not {scale}")
    tail = (shape.Q, shape.K, shape.H, shape.group, shape.shift, float(np.float32(scale) * LOG2_E))
    if dtype != "f32":
        forward_mma(rt, shape, (words(q), words(k), words(v), words(out), lse, *tail))
        return
    kernel = forward_f32_kernel(shape.D)
    grid = (-(-shape.Q // _f32_tile(shape.D)[0]), shape.H, shape.N)
    rt.launch(kernel, grid, (q, k, v, out, lse, *tail), shared_nbytes=shared_nbytes_of(kernel))


def kernels_for_report() -> list[Kernel]:
    """Every forward kernel."""
    return [forward_f32_kernel(d) for d in FORWARD_HEAD_DIMS] + [
        forward_mma_kernel(dtype, d) for dtype in ("f16", "bf16") for d in FORWARD_HEAD_DIMS
    ]


def shared_nbytes_of(kernel: Kernel) -> int:
    """Dynamic shared memory of a block."""
    head_dim = constant_of(kernel, "head_dim")
    if kernel.build is not _build_forward_f32:
        return forward_mma_shared_nbytes(head_dim)
    rows, columns = _f32_tile(head_dim)
    return 4 * ((rows + 2 * columns) * (head_dim + ROW_PADDING) + rows * (columns + ROW_PADDING))


def work_of(kernel: Kernel) -> TileWork:
    """Two products for each tile of keys and values."""
    tensor = kernel.build is not _build_forward_f32
    rows, columns, head_dim = (constant_of(kernel, name) for name in ("rows", "columns", "head_dim"))
    nbytes = 2 * columns * head_dim * (2 if tensor else 4)
    return TileWork(4 * rows * columns * head_dim, nbytes, tensor)
