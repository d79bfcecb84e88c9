"""Attention as three kernels with the scores in global memory: what the tiled kernels are measured against.

    S = Q K^T      a thread block computes a 64 x 64 tile from 64 rows of Q and of K in shared memory
    P = softmax(S) a warp reads a row once, keeps it in shared memory, and writes P in its place
    O = P V        a thread block computes 64 rows of O, from tiles of P (64 x 32) and V (32 x D) in shared memory

Each kernel reads and writes what it must and no more: tiles above the diagonal are neither computed nor stored, a row
of S is read once, and P is read once. What remains is the traffic of S and P, 4 * T^2 / 2 numbers for each head, which
a kernel that keeps the scores on the chip does not have (FlashAttention, arXiv:2205.14135, section 3).

Shapes: q, k, v, out (H, T, D) float32, causal, one KV head for each query head; scores (H, T, pitch), pitch being T
rounded up to 64. Limits: D a multiple of 8 up to 128, T up to 6144 (a row of S in shared memory).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cuda_kernels.kernel import Kernel
from cuda_kernels.launch import Array, Runtime, require
from cuda_kernels.online_softmax import LOG2_E, NEG_INF
from cuda_kernels.primitives import (
    FULL_MASK,
    Pointer,
    Value,
    cp_async16,
    cp_async_commit,
    cp_async_wait,
    device_function,
    exp2,
    fma,
    fmax,
    load4,
    rcp,
    store4,
)

__all__ = ["kernels_for_report", "naive_attention", "naive_attention_nbytes", "scores_shape", "shared_nbytes_of"]

_THREADS = 128
_TILE = 64  # rows and columns of a tile of S
_PV_KEYS = 32
_SOFTMAX_ROWS = _THREADS // 32
_ZERO = np.float32(0)
_i32, _i64 = types.int32, types.int64


@device_function
def _copy_rows(
    sh: Any, to: Value, pitch: Value, source: Pointer, at: Value, stride: Value, count: Value, rows: Any, columns: Any
) -> None:
    """Begins to copy (rows, columns) float32, whose rows from `count` on are zeros, 8 threads to a row."""
    tx, ty = _i32(cuda.threadIdx.x & 7), _i32(cuda.threadIdx.x >> 3)
    for i in range(rows // 16):
        row = _i32(ty + 16 * i)
        nbytes = _i32(16) if row < count else _i32(0)
        row_at = at + (_i64(row) * stride if row < count else _i64(0))
        for j in range(columns // 32):
            column = _i32(4 * tx + 32 * j)
            cp_async16(sh, _i32(to + row * pitch + column), source, row_at + column, nbytes)
        if columns % 32 != 0 and tx < columns % 32 // 4:
            column = _i32(4 * tx + columns // 32 * 32)
            cp_async16(sh, _i32(to + row * pitch + column), source, row_at + column, nbytes)


def _build_scores(*, head_dim: int) -> Callable[..., None]:
    pitch = head_dim + 4
    k_at = _TILE * pitch
    own_rows, own_keys = _TILE // 16, _TILE // 8

    def scores_tile(q: Pointer, k: Pointer, scores: Pointer, num_tokens: Value, s_pitch: Value, scale: Value) -> None:
        tx, ty = _i32(cuda.threadIdx.x & 7), _i32(cuda.threadIdx.x >> 3)
        first_key, first_row = _i32(cuda.blockIdx.x * _TILE), _i32(cuda.blockIdx.y * _TILE)
        if first_key > first_row:
            return
        head = _i64(cuda.blockIdx.z) * num_tokens
        sh = cuda.shared.array(0, types.float32)
        q_at = (head + first_row) * head_dim
        _copy_rows(sh, 0, pitch, q, q_at, head_dim, _i32(num_tokens - first_row), _TILE, head_dim)
        k_from = (head + first_key) * head_dim
        _copy_rows(sh, k_at, pitch, k, k_from, head_dim, _i32(num_tokens - first_key), _TILE, head_dim)
        cp_async_commit()
        cp_async_wait(0)
        cuda.syncthreads()
        s = cuda.local.array((own_rows, own_keys), types.float32)
        for i in range(own_rows):
            for j in range(own_keys):
                s[i, j] = _ZERO
        for d in range(0, head_dim, 4):
            for i in range(own_rows):
                q0, q1, q2, q3 = load4(sh, _i32(ty * pitch + d) + 16 * i * pitch)
                for j in range(own_keys):
                    k0, k1, k2, k3 = load4(sh, _i32(k_at + tx * pitch + d) + 8 * j * pitch)
                    s[i, j] = fma(q3, k3, fma(q2, k2, fma(q1, k1, fma(q0, k0, s[i, j]))))
        for i in range(own_rows):
            row = _i32(first_row + ty + 16 * i)
            if row < num_tokens:
                at = (head + row) * s_pitch + first_key + tx
                for j in range(own_keys):
                    scores[at + 8 * j] = s[i, j] * scale

    return scores_tile


def _build_softmax() -> Callable[..., None]:
    def softmax_rows(scores: Pointer, num_tokens: Value, s_pitch: Value) -> None:
        lane, warp = _i32(cuda.threadIdx.x & 31), _i32(cuda.threadIdx.x >> 5)
        row = _i32(cuda.blockIdx.x * _SOFTMAX_ROWS + warp)
        if row >= num_tokens:
            return
        at = (_i64(cuda.blockIdx.y) * num_tokens + row) * s_pitch
        row_at = _i32(warp * s_pitch)
        end = _i32((row & -_TILE) + _TILE)  # the end of the row's last tile
        sh = cuda.shared.array(0, types.float32)
        top = NEG_INF
        column = _i32(4 * lane)
        while column < end:
            a, b, c, d = load4(scores, at + column)
            b = b if column + 1 <= row else NEG_INF
            c = c if column + 2 <= row else NEG_INF
            d = d if column + 3 <= row else NEG_INF
            a = a if column <= row else NEG_INF
            store4(sh, row_at + column, a, b, c, d)
            top = fmax(fmax(top, fmax(a, b)), fmax(c, d))
            column = _i32(column + 128)
        for lanes in (16, 8, 4, 2, 1):
            top = fmax(top, cuda.shfl_xor_sync(FULL_MASK, top, lanes))
        total = _ZERO
        column = _i32(4 * lane)
        while column < end:
            a, b, c, d = load4(sh, row_at + column)
            a, b, c, d = exp2(a - top), exp2(b - top), exp2(c - top), exp2(d - top)
            store4(sh, row_at + column, a, b, c, d)
            total = total + ((a + b) + (c + d))
            column = _i32(column + 128)
        for lanes in (16, 8, 4, 2, 1):
            total = total + cuda.shfl_xor_sync(FULL_MASK, total, lanes)
        scale = rcp(total)
        column = _i32(4 * lane)
        while column < end:
            a, b, c, d = load4(sh, row_at + column)
            store4(scores, at + column, a * scale, b * scale, c * scale, d * scale)
            column = _i32(column + 128)

    return softmax_rows


def _build_values(*, head_dim: int) -> Callable[..., None]:
    pitch = _PV_KEYS + 8
    v_at = _TILE * pitch
    own_rows, chunks = _TILE // 16, head_dim // 4
    own_chunks = -(-chunks // 8)

    def values_tile(probs: Pointer, v: Pointer, out: Pointer, num_tokens: Value, s_pitch: Value) -> None:
        tx, ty = _i32(cuda.threadIdx.x & 7), _i32(cuda.threadIdx.x >> 3)
        first_row = _i32(cuda.blockIdx.x * _TILE)
        head = _i64(cuda.blockIdx.y) * num_tokens
        sh = cuda.shared.array(0, types.float32)
        o = cuda.local.array((own_rows, own_chunks, 4), types.float32)
        p = cuda.local.array((own_rows, 4), types.float32)
        for i in range(own_rows):
            for j in range(own_chunks):
                for e in range(4):
                    o[i, j, e] = _ZERO
        end = min(_i32(first_row + _TILE), num_tokens)
        first_key = _i32(0)
        while first_key < end:
            p_from = (head + first_row) * s_pitch + first_key
            _copy_rows(sh, 0, pitch, probs, p_from, s_pitch, _i32(num_tokens - first_row), _TILE, _PV_KEYS)
            v_from = (head + first_key) * head_dim
            _copy_rows(sh, v_at, head_dim, v, v_from, head_dim, _i32(num_tokens - first_key), _PV_KEYS, head_dim)
            cp_async_commit()
            cp_async_wait(0)
            cuda.syncthreads()
            for four in range(0, _PV_KEYS, 4):
                for i in range(own_rows):
                    p[i, 0], p[i, 1], p[i, 2], p[i, 3] = load4(sh, _i32(ty * pitch + four) + 16 * i * pitch)
                for e in range(4):
                    for j in range(own_chunks):
                        chunk = min(_i32(tx + 8 * j), _i32(chunks - 1))
                        v0, v1, v2, v3 = load4(sh, _i32(v_at + _i32(four + e) * head_dim + 4 * chunk))
                        for i in range(own_rows):
                            o[i, j, 0] = fma(p[i, e], v0, o[i, j, 0])
                            o[i, j, 1] = fma(p[i, e], v1, o[i, j, 1])
                            o[i, j, 2] = fma(p[i, e], v2, o[i, j, 2])
                            o[i, j, 3] = fma(p[i, e], v3, o[i, j, 3])
            cuda.syncthreads()
            first_key = _i32(first_key + _PV_KEYS)
        for i in range(own_rows):
            row = _i32(first_row + ty + 16 * i)
            if row < num_tokens:
                for j in range(own_chunks):
                    if tx + 8 * j < chunks:
                        at = (head + row) * head_dim + _i32(4 * tx + 32 * j)
                        store4(out, at, o[i, j, 0], o[i, j, 1], o[i, j, 2], o[i, j, 3])

    return values_tile


@cache
def scores_kernel(head_dim: int) -> Kernel:
    """S = Q K^T, times scale."""
    constants = (("head_dim", head_dim),)
    signature = ("f32*", "f32*", "f32*", "i32", "i32", "f32")
    return Kernel(f"naive_scores_d{head_dim}", _build_scores, constants, signature, _THREADS)


@cache
def softmax_kernel() -> Kernel:
    """P = softmax of the rows of S, in place; zeros past the diagonal, up to the end of its tile."""
    return Kernel("naive_softmax", _build_softmax, (), ("f32*", "i32", "i32"), _THREADS)


@cache
def values_kernel(head_dim: int) -> Kernel:
    """O = P V."""
    constants = (("head_dim", head_dim),)
    return Kernel(
        f"naive_values_d{head_dim}", _build_values, constants, ("f32*", "f32*", "f32*", "i32", "i32"), _THREADS
    )


def scores_shape(num_heads: int, num_tokens: int) -> tuple[int, int, int]:
    """The shape of the scores in memory."""
    return num_heads, num_tokens, -(-num_tokens // _TILE) * _TILE


def naive_attention(rt: Runtime, q: Array, k: Array, v: Array, scores: Array, out: Array, *, scale: float) -> None:
    """Causal attention, all of it float32.

    Args:
        q, k, v, out: (H, T, D), C-contiguous.
        scores: of scores_shape(H, T), holds P afterwards; past the tile of the diagonal it is not touched.
        scale: scores are scale * q.k.

    Raises:
        KernelArgumentError: shapes, dtypes or layouts that do not fit.
    """
    require(len(q.shape) == 3, f"q must be (H, T, D), not {q.shape}")
    H, T, D = q.shape
    require(D % 8 == 0 and D <= 128, f"naive attention takes head sizes in multiples of 8 up to 128, not {D}")
    for name, array, shape in (
        *((name, array, q.shape) for name, array in (("q", q), ("k", k), ("v", v), ("out", out))),
        ("scores", scores, scores_shape(H, T)),
    ):
        fits = array.shape == shape and array.dtype == np.float32 and bool(array.flags.c_contiguous)
        require(fits, f"{name} must be {shape} float32, C-contiguous")
    pitch = scores.shape[2]
    tiles = pitch // _TILE
    shared_nbytes = _SOFTMAX_ROWS * pitch * 4
    require(shared_nbytes <= rt.max_shared_nbytes, f"naive attention cannot keep rows of {T} scores in shared memory")
    kernel = scores_kernel(D)
    arguments = (q, k, scores, T, pitch, scale * LOG2_E)
    rt.launch(kernel, (tiles, tiles, H), arguments, shared_nbytes=shared_nbytes_of(kernel))
    rt.launch(softmax_kernel(), (-(-T // _SOFTMAX_ROWS), H, 1), (scores, T, pitch), shared_nbytes=shared_nbytes)
    kernel = values_kernel(D)
    rt.launch(kernel, (tiles, H, 1), (scores, v, out, T, pitch), shared_nbytes=shared_nbytes_of(kernel))


def naive_attention_nbytes(num_heads: int, num_tokens: int, head_dim: int) -> tuple[int, int]:
    """Bytes of global memory that naive_attention reads and writes, exactly: (of S and P, of Q, K, V and O)."""
    scores = operands = 0
    for first_row in range(0, num_tokens, _TILE):
        rows, tiles = min(_TILE, num_tokens - first_row), first_row // _TILE + 1
        keys = min(first_row + _TILE, num_tokens)
        # S written, read, P written in whole tiles; P read in tiles of _PV_KEYS
        scores += rows * (3 * tiles * _TILE + -(-keys // _PV_KEYS) * _PV_KEYS)
        operands += tiles * rows * head_dim + keys * head_dim  # Q again for each tile, K
        operands += keys * head_dim + rows * head_dim  # V, O
    return 4 * num_heads * scores, 4 * num_heads * operands


def shared_nbytes_of(kernel: Kernel) -> int:
    """Dynamic shared memory of the two matrix products; that of the softmax depends on T."""
    constants = dict(kernel.constants)
    if not constants:
        return 0
    head_dim: int = constants["head_dim"]  # type: ignore[assignment]
    if kernel.build is _build_scores:
        return 4 * 2 * _TILE * (head_dim + 4)
    return 4 * (_TILE * (_PV_KEYS + 8) + _PV_KEYS * head_dim)


def kernels_for_report() -> list[Kernel]:
    """The three kernels at a common head size."""
    return [scores_kernel(64), softmax_kernel(), values_kernel(64)]
