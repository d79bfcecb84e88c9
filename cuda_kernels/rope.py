"""Rotary position embedding (arXiv:2104.09864) of queries and keys, the halves of the rotated part paired.

    x[i]      <-  x[i] * cos[i] - x[i + R/2] * sin[i]
    x[i+R/2]  <-  x[i+R/2] * cos[i] + x[i] * sin[i]          0 <= i < R/2, R <= D; the rest of a head stays as it is

Products and sums are rounded one by one. A thread takes four neighbouring pairs (i .. i + 3) of one head of one token;
the grid is (tokens, groups of four pairs over all heads / 128). q, k and the copies are float32 (T, H, D) with any
strides but a contiguous last axis, cos and sin (T, R / 2).
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
from cuda_kernels.views import aligned16, ceil_div, check_array, strides_of

__all__ = ["kernels", "rope", "rotate_into"]

THREADS = 128

i32, i64 = types.int32, types.int64


def _rotation(half: int, vector: bool) -> Callable[..., None]:
    """rotate(x, at, out, to, cos, sin, angle, column): the pairs of columns column .. column + 3 of one head."""
    load, store = load_quad(vector), store_quad(vector)

    @device_function
    def rotate(
        x: Pointer, at: Value, out: Pointer, to: Value, cos: Pointer, sin: Pointer, angle: Value, column: Value
    ) -> None:
        a0, a1, a2, a3 = load(x, at, column, i32(half))
        b0, b1, b2, b3 = load(x, at + half, column, i32(half))
        c0, c1, c2, c3 = load(cos, angle, column, i32(half))
        s0, s1, s2, s3 = load(sin, angle, column, i32(half))
        store(out, to, column, i32(half), a0 * c0 - b0 * s0, a1 * c1 - b1 * s1, a2 * c2 - b2 * s2, a3 * c3 - b3 * s3)
        to += half
        store(out, to, column, i32(half), b0 * c0 + a0 * s0, b1 * c1 + a1 * s1, b2 * c2 + a2 * s2, b3 * c3 + a3 * s3)

    return rotate


def _build_rope(*, half: int, vector: bool) -> Callable[..., None]:
    rotate = _rotation(half, vector)
    pieces = ceil_div(half, 4)

    def rope(
        q: Pointer, q_row: Value, q_head: Value, num_q: Value, k: Pointer, k_row: Value, k_head: Value, num_k: Value,
        cos: Pointer, sin: Pointer, angles: Value,
    ) -> None:  # fmt: skip
        token = i64(cuda.blockIdx.x)
        piece = i32(cuda.blockIdx.y * THREADS + cuda.threadIdx.x)
        head = i32(piece // pieces)
        column = i32(4 * (piece - head * pieces))
        if head >= num_q + num_k:
            return
        x, at = q, token * q_row + i64(head) * q_head
        if head >= num_q:
            x, at = k, token * k_row + i64(head - num_q) * k_head
        rotate(x, at, x, at, cos, sin, token * angles, column)

    return rope


def _build_rotate_into(*, half: int, rest: int, vector: bool) -> Callable[..., None]:
    rotate, load, store = _rotation(half, vector), load_quad(vector), store_quad(vector)
    rotated = ceil_div(half, 4)
    pieces = rotated + ceil_div(rest, 4)

    def rotate_into(
        q: Pointer, q_row: Value, q_head: Value, num_q: Value, cos: Pointer, sin: Pointer, angles: Value,
        out: Pointer, out_row: Value, out_head: Value,
    ) -> None:  # fmt: skip
        token = i64(cuda.blockIdx.x)
        piece = i32(cuda.blockIdx.y * THREADS + cuda.threadIdx.x)
        head = i32(piece // pieces)
        piece = i32(piece - head * pieces)
        if head >= num_q:
            return
        at, to = token * q_row + i64(head) * q_head, token * out_row + i64(head) * out_head
        if piece < rotated:
            rotate(q, at, out, to, cos, sin, token * angles, i32(4 * piece))
        else:
            column = i32(4 * (piece - rotated))
            a, b, c, d = load(q, at + 2 * half, column, i32(rest))
            store(out, to + 2 * half, column, i32(rest), a, b, c, d)

    return rotate_into


_ANGLES = ("f32*", "f32*", "i64")
_HEADS = ("f32*", "i64", "i64", "i32")


@functools.cache
def _rope_kernel(half: int, vector: bool) -> Kernel:
    name = f"rope_{half}{'' if vector else '_unaligned'}"
    return Kernel(name, _build_rope, (("half", half), ("vector", vector)), (*_HEADS, *_HEADS, *_ANGLES), THREADS)


@functools.cache
def _rotate_kernel(half: int, rest: int, vector: bool) -> Kernel:
    name = f"rotate_into_{half}_{rest}{'' if vector else '_unaligned'}"
    constants = (("half", half), ("rest", rest), ("vector", vector))
    return Kernel(name, _build_rotate_into, constants, (*_HEADS, *_ANGLES, "f32*", "i64", "i64"), THREADS)


def _check(x: Array, name: str, cos: Array, sin: Array) -> tuple[int, int]:
    """Row and head stride of x, once shapes fit."""
    check_array(x, name, np.float32, (cos.shape[0], None, None))
    half = cos.shape[1]
    require(1 <= half and 2 * half <= x.shape[2], f"{half} angles for {name}'s heads of {x.shape[2]}")
    row, head, _ = strides_of(x, name)
    return row, head


def _check_angles(cos: Array, sin: Array) -> int:
    """Row stride of the angles."""
    check_array(cos, "cos", np.float32, (None, None))
    check_array(sin, "sin", np.float32, tuple(cos.shape))
    stride = strides_of(cos, "cos")[0]
    require(strides_of(sin, "sin")[0] == stride, "the rows of cos and sin must be spaced alike")
    return stride


def rope(rt: Runtime, q: Array, k: Array, cos: Array, sin: Array) -> None:
    """Rotates q (T, H, D) and k (T, KH, D) in place by the angles of cos, sin (T, R / 2); KH may be 0.

    Raises KernelArgumentError.
    """
    angles = _check_angles(cos, sin)
    (q_row, q_head), (k_row, k_head) = _check(q, "q", cos, sin), _check(k, "k", cos, sin)
    (tokens, half), heads = cos.shape, q.shape[1] + k.shape[1]
    if tokens == 0 or heads == 0:
        return
    vector = half % 4 == 0 and all(aligned16(array) for array in (q, k, cos, sin) if array.size)
    grid = (tokens, ceil_div(heads * ceil_div(half, 4), THREADS), 1)
    arguments = (q, q_row, q_head, q.shape[1], k, k_row, k_head, k.shape[1], cos, sin, angles)
    rt.launch(_rope_kernel(half, vector), grid, arguments)


def rotate_into(rt: Runtime, q: Array, cos: Array, sin: Array, out: Array) -> None:
    """out (T, H, D) = q (T, H, D) rotated as `rope` does, apart from q in memory. Raises KernelArgumentError."""
    angles = _check_angles(cos, sin)
    q_row, q_head = _check(q, "q", cos, sin)
    check_array(out, "out", np.float32, tuple(q.shape))
    out_row, out_head, _ = strides_of(out, "out")
    (tokens, half), heads, rest = cos.shape, q.shape[1], q.shape[2] - 2 * cos.shape[1]
    if tokens == 0 or heads == 0:
        return
    vector = half % 4 == 0 and aligned16(q, cos, sin, out)
    grid = (tokens, ceil_div(heads * (ceil_div(half, 4) + ceil_div(rest, 4)), THREADS), 1)
    arguments = (q, q_row, q_head, heads, cos, sin, angles, out, out_row, out_head)
    rt.launch(_rotate_kernel(half, rest, vector), grid, arguments)


def kernels() -> list[Kernel]:
    """The variants of common head sizes, and the unaligned ones."""
    ropes = [_rope_kernel(half, True) for half in (32, 40, 48, 64, 128)]
    return [*ropes, _rope_kernel(9, False), _rotate_kernel(64, 0, True), _rotate_kernel(16, 32, True),
            _rotate_kernel(9, 3, False)]  # fmt: skip
