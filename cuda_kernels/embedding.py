"""Token embeddings: rows of a packed matrix, by number, as float32: out[t] = W[token_ids[t]].

A block of 256 threads copies one row, a thread two neighbouring columns at a time (f32: four), each found in the layout
of `linear_forms`. Every value takes the float32 operations, in the order, of the format's reference decoder: results
are exact where that is, and equal bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cuda_kernels.kernel import Kernel
from cuda_kernels.launch import Array, Runtime, require
from cuda_kernels.linear_forms import F32_ROWS, FORMS, SCALE_WORDS, Form
from cuda_kernels.matrix import Matrix
from cuda_kernels.primitives import Pointer, Value, device_function, load4, unpack_bf16, unpack_f16
from cuda_kernels.views import check_array, rows_of, strides_of

__all__ = ["embedding", "kernels_for_report"]

THREADS = 256

i32, i64, u32, f32 = types.int32, types.int64, types.uint32, types.float32


def _quant_pair(form: Form) -> Any:
    """(weights, headers, start of the tile's words, of the header, row of 16, column of 256) -> two stored integers."""
    bits = form.bits

    @device_function
    def pair(weights: Pointer, headers: Pointer, tile: Value, head: Value, row: Value, column: Value) -> Any:
        kt, half, lower = i32(column >> 4 & 3), i32(column >> 3 & 1), i32(row >> 3)
        lane = i32(4 * (row & 7) + (column >> 1 & 3))
        if bits == 8:
            word = weights[tile + (kt >> 1) * 128 + 4 * lane + 2 * (kt & 1) + half] >> u32(8 * lower)
            return i32(word & u32(255)) - 128, i32(word >> u32(16) & u32(255)) - 128
        word = weights[tile + 4 * lane + kt] >> u32(4 * (lower + 2 * half))
        first, second = i32(word & u32(15)), i32(word >> u32(16) & u32(15))
        if bits == 5:
            at = head + SCALE_WORDS + 4 * lane + (column >> 6 & 3)
            high = headers[at] >> u32(8 * (kt >> 1) + 4 * lower + 2 * (kt & 1) + half)
            first |= i32(high & u32(1)) << 4
            second |= i32(high >> u32(16) & u32(1)) << 4
        elif bits == 6:
            at = head + SCALE_WORDS + (column >> 7 & 1) * 128 + 4 * lane + (column >> 6 & 1) * 2 + (kt >> 1)
            high = headers[at] >> u32(8 * (kt & 1) + 4 * lower + 2 * half)
            first |= i32(high & u32(3)) << 4
            second |= i32(high >> u32(16) & u32(3)) << 4
        return first, second

    return pair


@device_function
def _byte(array: Pointer, word: Value, byte: Value) -> Value:
    """One byte of a run of words."""
    return i32(array[word + (byte >> 2)] >> u32(8 * (byte & 3)) & u32(255))


@device_function
def _half_of(array: Pointer, word: Value, half: Value) -> Value:
    """One float16 of a run of words, as float32."""
    low, high = unpack_f16(array[word + (half >> 1)])
    return high if half & 1 else low


def _affine(form: Form) -> Any:
    """(headers, start of the header, row of 16, column of 256) -> (d, m) of value = d * (q - zero) + m, float32."""
    extra, scaling, bits, minima = SCALE_WORDS + form.high_words, form.scaling, form.bits, form.minima

    @device_function
    def affine(headers: Pointer, head: Value, row: Value, column: Value) -> Any:
        at = head + 4 * row
        block = i32(column >> 5)
        if scaling == "block":
            m = f32(0)
            if minima:
                m = _half_of(headers, head + extra + 8 * (row & 7) + 2 * (block >> 1) + (row >> 3), block & 1)
            return _half_of(headers, at, block), m
        if bits == 6:
            scale = f32(_byte(headers, at, i32(column >> 4)) - 128)
            return _half_of(headers, head + extra + (row & 7), row >> 3) * scale, f32(0)
        d, d_min = unpack_f16(headers[at])
        low = i32(block & 3)  # bytes 4 + low, 8 + low, 12 + low of the header, see linear_fragments
        scale, minimum = _byte(headers, at, 4 + low), _byte(headers, at, 8 + low)
        if block < 4:
            scale, minimum = scale & 63, minimum & 63
        else:
            rest = _byte(headers, at, 12 + low)
            scale, minimum = rest & 15 | scale >> 6 << 4, rest >> 4 | minimum >> 6 << 4
        return d * f32(scale), -(d_min * f32(minimum))

    return affine


def _build_quantised(*, form: str) -> Callable[..., None]:
    spec = FORMS[form]
    pair, affine = _quant_pair(spec), _affine(spec)
    words, header_words, zero, minima = spec.words, spec.header_words, spec.zero, spec.minima

    def embed(ids: Pointer, weights: Pointer, headers: Pointer, columns: Value, out: Pointer, out_row: Value) -> None:
        token = ids[cuda.blockIdx.x]
        tiles, slices = i32((columns + 63) >> 6), i32((columns + 255) >> 8)
        row = i32(token & 15)
        for at in range(2 * cuda.threadIdx.x, columns, 2 * THREADS):
            k = i32(at)
            tile = (i64(token >> 4) * tiles + (k >> 6)) * (32 * words)
            head = (i64(token >> 4) * slices + (k >> 8)) * header_words
            first, second = pair(weights, headers, tile, head, row, i32(k & 255))
            d, m = affine(headers, head, row, i32(k & 255))
            a, b = f32(first - zero) * d, f32(second - zero) * d
            if minima:
                a, b = a + m, b + m
            to = i64(cuda.blockIdx.x) * out_row + k
            out[to], out[to + 1] = a, b

    return embed


def _build_dense(*, form: str) -> Callable[..., None]:
    unpack = unpack_f16 if form == "f16" else unpack_bf16

    def embed(ids: Pointer, weights: Pointer, headers: Pointer, columns: Value, out: Pointer, out_row: Value) -> None:
        token = ids[cuda.blockIdx.x]
        tiles = i32((columns + 63) >> 6)
        for at in range(2 * cuda.threadIdx.x, columns, 2 * THREADS):
            k = i32(at)
            lane = i32(4 * (token & 7) + (k >> 1 & 3))
            word = i32((k >> 4 & 3) * 128 + 4 * lane + (token >> 3 & 1) + 2 * (k >> 3 & 1))
            a, b = unpack(weights[(i64(token >> 4) * tiles + (k >> 6)) * 512 + word])
            to = i64(cuda.blockIdx.x) * out_row + k
            out[to] = a
            if k + 1 < columns:
                out[to + 1] = b

    return embed


def _build_f32() -> Callable[..., None]:
    def embed(ids: Pointer, weights: Pointer, headers: Pointer, columns: Value, out: Pointer, out_row: Value) -> None:
        token = ids[cuda.blockIdx.x]
        quads = i32(columns >> 2)
        source = i64(token // F32_ROWS) * quads * (4 * F32_ROWS) + 4 * (token % F32_ROWS)
        to = i64(cuda.blockIdx.x) * out_row
        for quad in range(cuda.threadIdx.x, quads, THREADS):
            a, b, c, d = load4(weights, source + quad * (4 * F32_ROWS))
            at = to + 4 * quad
            out[at], out[at + 1], out[at + 2], out[at + 3] = a, b, c, d

    return embed


@functools.cache
def _kernel(form: str) -> Kernel:
    if form == "f32":
        return Kernel("embedding_f32", _build_f32, (), ("i32*", "f32*", "f32*", "i32", "f32*", "i64"), THREADS)
    build = _build_quantised if FORMS[form].quantised else _build_dense
    signature = ("i32*", "u32*", "u32*", "i32", "f32*", "i64")
    return Kernel(f"embedding_{form}", build, (("form", form),), signature, THREADS)


def embedding(rt: Runtime, token_ids: Array, matrix: Matrix, out: Array) -> None:
    """token_ids (T,) int32, from 0 to V - 1; W (V, M) -> out (T, M) float32, whose rows may be strided.

    Raises KernelArgumentError.
    """
    check_array(token_ids, "token_ids", np.int32, (None,))
    strides_of(token_ids, "token_ids")
    tokens = token_ids.shape[0]
    check_array(out, "out", np.float32, (tokens, matrix.columns))
    out_row = rows_of(out, "out").stride
    require(matrix.rows < 2**31, "too many rows for 32-bit ids")
    if tokens:
        arguments = (token_ids, matrix.weights, matrix.headers, matrix.columns, out, out_row)
        rt.launch(_kernel(matrix.form), (tokens, 1, 1), arguments)


def kernels_for_report() -> list[Kernel]:
    """Every variant."""
    return [_kernel(form) for form in FORMS]
