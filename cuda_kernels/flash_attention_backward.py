"""Dense FlashAttention backward: dq, dk, dv from out, its log-sum-exp and dout; shapes as in flash_attention.py.

P is recomputed from the log-sum-exp, tile by tile, so that memory is linear in length (arXiv:2205.14135, algorithm 4;
arXiv:2307.08691, section 3.1.2). With S = scale * q k^T, P = exp(S - lse) and delta = rowsum(dout * out):

    dv = P^T dout        dS = P * (dout v^T - delta)        dq = scale * dS k        dk = scale * dS^T q

Three kernels, none with atomics, so the same call gives the same bits:

    statistics   -lse in base 2, and delta, of each row, padded to whole tiles: rows past Q get P = 0
    dq           a block has a tile of queries of one head, and walks over the keys that they see
    dk and dv    a block has a tile of keys of one key head, and walks over its query heads, then over their queries

Sums run over tiles at fixed positions in ascending order, whatever N and the mask. Rows that see nothing get zeros.

Limits: head sizes 64, 80, 96, 128; C-contiguous arrays; scale > 0. Gradients are float32 for each stored type. On
tensor cores (f16, bf16) P and dS are rounded to the stored type before they are multiplied: float16 gradients want a
loss scale, as dS may be below its smallest number.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cuda_kernels.flash_attention_backward_f32 import (
    backward_f32,
    backward_f32_shared_nbytes,
    dkv_f32_kernel,
    dq_f32_kernel,
)
from cuda_kernels.flash_attention_backward_mma import (
    backward_mma,
    backward_mma_shared_nbytes,
    dkv_mma_kernel,
    dq_mma_kernel,
)
from cuda_kernels.flash_attention_shape import (
    BACKWARD_HEAD_DIMS,
    LOG2_E,
    AttentionShape,
    check_like,
    constant_of,
    words,
)
from cuda_kernels.kernel import Kernel
from cuda_kernels.launch import Array, Runtime, require
from cuda_kernels.primitives import (
    FULL_MASK,
    Pointer,
    Value,
    device_function,
    fma,
    load4,
    unpack_bf16,
    unpack_f16,
)
from cuda_kernels.roofline import TileWork

__all__ = [
    "flash_attention_backward",
    "flash_attention_backward_scratch_nbytes",
    "kernels_for_report",
    "shared_nbytes_of",
    "work_of",
]

i32, i64 = types.int32, types.int64

STATISTICS_THREADS = 128
STATISTICS_LANES = 8  # threads of one row
PADDING = 64  # rows of statistics are padded to a multiple of this: whole tiles of every kernel


def _padded(query_len: int) -> int:
    return -(-query_len // PADDING) * PADDING


# ---- statistics


def _dot_of_chunks(dtype: str) -> Any:
    """A device function (16 bytes, 16 bytes, total) -> total + their products, in ascending order."""
    if dtype == "f32":

        @device_function
        def dot(a: Any, b: Any, total: Value) -> Value:
            for e in range(4):
                total = fma(a[e], b[e], total)
            return total

        return dot

    unpack = {"f16": unpack_f16, "bf16": unpack_bf16}[dtype]

    @device_function
    def dot_of_pairs(a: Any, b: Any, total: Value) -> Value:
        for e in range(4):
            x, y = unpack(a[e]), unpack(b[e])
            total = fma(x[1], y[1], fma(x[0], y[0], total))
        return total

    return dot_of_pairs


def _build_statistics(*, head_dim: int, dtype: str) -> Any:
    row_words = head_dim if dtype == "f32" else head_dim // 2
    chunks = row_words // 4
    steps = -(-chunks // STATISTICS_LANES)
    rows = STATISTICS_THREADS // STATISTICS_LANES
    dot = _dot_of_chunks(dtype)
    padding, zero = np.float32(-np.inf), np.float32(0)

    def flash_attention_statistics(
        out: Pointer, dout: Pointer, lse: Pointer, statistics: Pointer, Q: Value, H: Value, padded: Value
    ) -> None:
        tid = i32(cuda.threadIdx.x)
        row, lane = i32(i32(cuda.blockIdx.x) * rows + tid // STATISTICS_LANES), tid % STATISTICS_LANES
        h, n = i32(cuda.blockIdx.y), i32(cuda.blockIdx.z)
        delta, minus_lse = zero, padding
        if row < Q:
            at = ((i64(n) * Q + row) * H + h) * row_words + lane * 4
            for step in range(steps):
                if step * STATISTICS_LANES + lane < chunks:
                    offset = at + step * STATISTICS_LANES * 4
                    delta = dot(load4(out, offset), load4(dout, offset), delta)
            # infinite for a row that sees nothing, of which all scores are masked
            minus_lse = -(lse[(i64(n) * H + h) * Q + row] * LOG2_E)
        for width in (4, 2, 1):
            delta = delta + cuda.shfl_xor_sync(FULL_MASK, delta, width)
        if lane == 0:
            to = (i64(n) * H + h) * 2 * padded + row
            statistics[to] = minus_lse
            statistics[to + padded] = delta

    return flash_attention_statistics


@functools.cache
def statistics_kernel(dtype: str, head_dim: int) -> Kernel:
    stored = "f32*" if dtype == "f32" else "u32*"
    return Kernel(
        name=f"flash_attention_statistics_{dtype}_d{head_dim}",
        build=_build_statistics,
        constants=(("head_dim", head_dim), ("dtype", dtype)),
        signature=(stored, stored, "f32*", "f32*", "i32", "i32", "i32"),
        threads=STATISTICS_THREADS,
    )


# ---- launcher


def flash_attention_backward_scratch_nbytes(num_batch: int, query_len: int, num_heads: int) -> int:
    """Bytes of scratch of one call: two float32 for each row and head, padded to whole tiles."""
    return 4 * 2 * num_batch * num_heads * _padded(query_len)


def flash_attention_backward(
    rt: Runtime,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    dout: Array,
    dq: Array,
    dk: Array,
    dv: Array,
    *,
    dtype: str,
    scale: float,
    causal: bool,
    scratch: Array,
) -> None:
    """Gradients of flash_attention; see the module for shapes and limits.

    Args:
        q, k, v, out, lse, dtype, scale, causal: as flash_attention took and gave them.
        dout: gradient of out, its shape and dtype.
        dq, dk, dv: float32 of the shapes of q, k and v, written.
        scratch: float32 of at least flash_attention_backward_scratch_nbytes(N, Q, H) bytes, one axis, overwritten.

    Raises:
        KernelArgumentError: shapes, dtypes or limits.
    """
    shape = AttentionShape.of(q, k, v, dtype=dtype, causal=causal, head_dims=BACKWARD_HEAD_DIMS)
    f32_dtype = np.dtype(np.float32)
    for name, array, like, stored in (
        ("out", out, q, shape.stored_dtype),
        ("dout", dout, q, shape.stored_dtype),
        ("dq", dq, q, f32_dtype),
        ("dk", dk, k, f32_dtype),
        ("dv", dv, v, f32_dtype),
    ):
        check_like(name, array, like.shape, stored)
    check_like("lse", lse, (shape.N, shape.H, shape.Q), f32_dtype)
    needed = flash_attention_backward_scratch_nbytes(shape.N, shape.Q, shape.H) // 4
    require(scratch.ndim == 1 and scratch.size >= needed, f"scratch needs {needed} float32, not {scratch.shape}")
    check_like("scratch", scratch, scratch.shape, f32_dtype)
    require(math.isfinite(scale) and scale > 0, f"scale must be above 0, not {scale}")

    padded = _padded(shape.Q)
    rt.launch(
        statistics_kernel(dtype, shape.D),
        (padded * STATISTICS_LANES // STATISTICS_THREADS, shape.H, shape.N),
        (words(out), words(dout), lse, scratch, shape.Q, shape.H, padded),
    )
    inputs = (words(q), words(k), words(v), words(dout), scratch)
    scale_log2 = float(np.float32(scale) * LOG2_E)
    tail = (shape.Q, shape.K, shape.H, shape.group, shape.shift, padded, float(scale), scale_log2)
    launch = backward_f32 if dtype == "f32" else backward_mma
    launch(rt, shape, (*inputs, dq, *tail), (*inputs, dk, dv, *tail))


def kernels_for_report() -> list[Kernel]:
    """Every backward kernel."""
    kernels = []
    for head_dim in BACKWARD_HEAD_DIMS:
        kernels += [dq_f32_kernel(head_dim), dkv_f32_kernel(head_dim)]
        kernels += [statistics_kernel(dtype, head_dim) for dtype in ("f32", "f16", "bf16")]
        for dtype in ("f16", "bf16"):
            kernels += [dq_mma_kernel(dtype, head_dim), dkv_mma_kernel(dtype, head_dim)]
    return kernels


def shared_nbytes_of(kernel: Kernel) -> int:
    """Dynamic shared memory of a block."""
    if kernel.build is _build_statistics:
        return 0
    head_dim = constant_of(kernel, "head_dim")
    tensor = "dtype" in dict(kernel.constants)
    of_dq, of_dkv = backward_mma_shared_nbytes(head_dim) if tensor else backward_f32_shared_nbytes(head_dim)
    return of_dq if "_dq_" in kernel.name else of_dkv


def work_of(kernel: Kernel) -> TileWork:
    """Three products for each tile of keys and values (dq), four for each of queries and dout (dk and dv)."""
    head_dim = constant_of(kernel, "head_dim")
    item_nbytes = 4 if "_f32_" in kernel.name else 2
    if kernel.build is _build_statistics:
        rows = STATISTICS_THREADS // STATISTICS_LANES
        return TileWork(2 * rows * head_dim, rows * (2 * head_dim * item_nbytes + 12), tensor=False)
    rows, columns = constant_of(kernel, "rows"), constant_of(kernel, "columns")
    products = 3 if "_dq_" in kernel.name else 4
    flop = products * 2 * rows * columns * head_dim
    return TileWork(flop, 2 * columns * head_dim * item_nbytes, tensor=item_nbytes == 2)
