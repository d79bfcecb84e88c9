"""Linear layer for few tokens (1 to 16) on tensor cores: bound by the reading of the weights, each once.

A block owns 16 rows of the matrix, the A operands; up to 16 tokens are the B operands. Its eight warps take the slices
of 256 columns in turn, and put each slice's sum into shared memory, where one thread per output adds them in ascending
order:

    warp 0: slice 0, slice 8, ...   -> shared[0], shared[8], ...  \\
    warp 1: slice 1, slice 9, ...   -> shared[1], shared[9], ...   > total = ((0 + s0) + s1) + s2 + ...
    ...                                                           /
    out[token, row] = fma(total, inverse[token], bias[row])

Weights come straight from global memory in operand order (`linear_forms`), all loads of a batch of tiles ahead of their
use. Lanes of columns past the last token read the last token's, and their sums are dropped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cuda_kernels.kernel import Kernel
from cuda_kernels.launch import Array, Runtime
from cuda_kernels.linear_activations import TOKENS, Activations
from cuda_kernels.linear_forms import FORMS, SCALE_WORDS, SLICE, TILE_ROWS
from cuda_kernels.linear_fragments import fragments, magic_exponent, minima_selector
from cuda_kernels.matrix import Matrix
from cuda_kernels.primitives import Pointer, Value, device_function, fma, load2, load4, load4_streamed, store2
from cuda_kernels.views import ceil_div

__all__ = ["MAX_TOKENS", "decode_kernels", "decode_shared_nbytes", "linear_decode"]

WARPS = 8
THREADS = 32 * WARPS
MAX_TOKENS = 2 * TOKENS
ROUND = 4 * WARPS  # slices between two summations
OUTPUTS = TILE_ROWS * TOKENS  # of a tile of 8 tokens
BATCH_WORDS = 32  # of weights a lane has on their way at the most

i32, i64, u32, f32 = types.int32, types.int64, types.uint32, types.float32
ZERO = np.float32(0)


def _build_decode(*, form: str, token_tiles: int) -> Callable[..., None]:
    spec = FORMS[form]
    unpack, multiply, finish, tile_scales, header = fragments(spec)
    words, header_words, high_words = spec.words, spec.header_words, spec.high_words
    quantised, bits, minima = spec.quantised, spec.bits, spec.minima
    extra_at = SCALE_WORDS + high_words
    has_extra = spec.extra_words > 0
    whole_slices = spec.block_size == SLICE
    batch = min(4, BATCH_WORDS // words)  # tiles
    loads = words // 4
    raw_words, sums_each = batch * words, 4 * token_tiles
    outputs = OUTPUTS * token_tiles
    per_thread = ceil_div(outputs, THREADS)

    @device_function
    def load_tile(weights: Pointer, at: Value, raw: Any, base: Value) -> None:
        for q in range(loads):
            i = base + 4 * q
            raw[i], raw[i + 1], raw[i + 2], raw[i + 3] = load4_streamed(weights, at + 128 * q)

    @device_function
    def add_tile(
        raw: Any, base: Value, high0: Value, high1: Value, s0: Value, s1: Value, magic: Value,
        operands: Pointer, operands_at: Any, offset: Value, acc: Any, a: Any,
    ) -> None:  # fmt: skip
        """Adds the products of 64 columns to acc; high0, high1: upper bits of the tile's halves."""
        for half in range(2):
            unpack(raw, base + half * (words // 2), high0 if half == 0 else high1, half, s0, s1, magic, a)
            for n in range(token_tiles):
                b0, b1, b2, b3 = load4(operands, operands_at[n] + (offset + 128 * half))
                multiply(a, b0, b1, b2, b3, half, s0, s1, acc, 4 * n)

    def decode(
        weights: Pointer, headers: Pointer, tiles: Value, slices: Value, rows: Value,
        operands: Pointer, inverse: Pointer, sums: Pointer, tokens: Value,
        bias: Pointer, has_bias: Value, out: Pointer, out_row: Value,
    ) -> None:  # fmt: skip
        partial = cuda.shared.array(0, types.float32)  # [slice of the round][token tile][row][token]
        thread = i32(cuda.threadIdx.x)
        lane, warp = i32(thread & 31), i32(thread >> 5)
        g, t = i32(lane >> 2), i32(lane & 3)
        row_tile = i64(cuda.blockIdx.x)
        selector, magic = minima_selector(t), magic_exponent(tiles)
        weights_at = row_tile * tiles * (32 * words) + 4 * lane
        headers_at = row_tile * slices * header_words
        raw = cuda.local.array(raw_words, types.uint32)
        high = cuda.local.array(8, types.uint32)
        r0 = cuda.local.array(4, types.uint32)
        r8 = cuda.local.array(4, types.uint32)
        a = cuda.local.array(8, types.uint32)
        d = cuda.local.array(4, types.float32)
        m = cuda.local.array(2, types.uint32)
        acc = cuda.local.array(sums_each, types.float32)
        total = cuda.local.array(per_thread, types.float32)
        operands_at = cuda.local.array(token_tiles, types.int64)
        sums_at = cuda.local.array(token_tiles, types.int64)
        for n in range(token_tiles):
            source_lane = i32(4 * min(g, i32(tokens - TOKENS * n - 1)) + t)  # whose column this lane reads
            operands_at[n] = i64(n) * tiles * 256 + 4 * source_lane
            sums_at[n] = i64(n) * slices * 64 + 2 * source_lane
        for i in range(per_thread):
            total[i] = ZERO
        for first in range(0, slices, ROUND):
            end = min(i32(first + ROUND), slices)
            for s in range(first + warp, end, WARPS):
                head = headers_at + i32(s * header_words)
                tile_at = weights_at + i32(s * (4 * 32 * words))
                offset = i32(1024 * s)
                count = i32(tiles - 4 * s)  # of tiles left
                extra0, extra1 = u32(0), u32(0)
                if quantised:
                    r0[0], r0[1], r0[2], r0[3] = load4_streamed(headers, head + 4 * g)
                    r8[0], r8[1], r8[2], r8[3] = load4_streamed(headers, head + (4 * g + 32))
                    if has_extra:
                        if bits == 6:
                            extra0 = headers[head + (g + extra_at)]
                        else:
                            extra0, extra1 = load2(headers, head + (2 * lane + extra_at))
                for i in range(sums_each):
                    acc[i] = ZERO
                if whole_slices or count >= 4:
                    if bits == 5 or bits == 6:
                        high[0], high[1], high[2], high[3] = load4_streamed(headers, head + (4 * lane + SCALE_WORDS))
                    if bits == 6:
                        at = head + (4 * lane + SCALE_WORDS + 128)
                        high[4], high[5], high[6], high[7] = load4_streamed(headers, at)
                    for start in range(0, 4, batch):
                        for j in range(batch):
                            load_tile(weights, tile_at + (start + j) * (32 * words), raw, j * words)
                        for j in range(batch):
                            tile = start + j
                            s0, s1, high0, high1 = u32(0), u32(0), u32(0), u32(0)
                            if quantised:
                                s0 = tile_scales(r0[0], r0[1], r0[2], r0[3], tile)
                                s1 = tile_scales(r8[0], r8[1], r8[2], r8[3], tile)
                            if bits == 5:
                                high0 = high1 = high[tile]
                            elif bits == 6:
                                high0, high1 = high[2 * tile], high[2 * tile + 1]
                            add_tile(
                                raw, j * words, high0, high1, s0, s1, magic, operands, operands_at, offset + 256 * tile,
                                acc, a
                            )  # fmt: skip
                else:  # the last slice, a tile at a time
                    for tile in range(count):
                        load_tile(weights, tile_at + i32(tile * (32 * words)), raw, 0)
                        s0, s1, high0, high1 = u32(0), u32(0), u32(0), u32(0)
                        if quantised:
                            s0 = tile_scales(r0[0], r0[1], r0[2], r0[3], tile)
                            s1 = tile_scales(r8[0], r8[1], r8[2], r8[3], tile)
                        if bits == 5:
                            high0 = high1 = headers[head + (i32(4 * lane + tile) + SCALE_WORDS)]
                        add_tile(
                            raw, 0, high0, high1, s0, s1, magic, operands, operands_at, i32(offset + 256 * tile), acc, a
                        )  # fmt: skip
                header(r0, r8, extra0, extra1, selector, d, m)
                for n in range(token_tiles):
                    sum0, sum1 = u32(0), u32(0)
                    if minima:
                        sum0, sum1 = load2(sums, sums_at[n] + i32(64 * s))
                    finish(acc, 4 * n, d, m, sum0, sum1)
                    at = i32(((s - first) * token_tiles + n) * OUTPUTS + 8 * g + 2 * t)
                    store2(partial, at, acc[4 * n], acc[4 * n + 1])
                    store2(partial, at + 64, acc[4 * n + 2], acc[4 * n + 3])
            cuda.syncthreads()
            for i in range(per_thread):
                output = i32(thread + i * THREADS)
                if output < outputs:
                    for s in range(end - first):
                        total[i] += partial[u32(s * outputs + output)]
            cuda.syncthreads()
        for i in range(per_thread):
            output = i32(thread + i * THREADS)
            token = i32((output // OUTPUTS) * TOKENS + (output & 7))
            row = i32(cuda.blockIdx.x * TILE_ROWS + (output % OUTPUTS >> 3))
            if output < outputs and token < tokens and row < rows:
                offset = bias[u32(row)] if has_bias else ZERO
                out[i64(token) * out_row + row] = fma(total[i], inverse[u32(token)], offset)

    return decode


SIGNATURE = (
    "u32*", "u32*", "i32", "i32", "i32", "u32*", "f32*", "u32*", "i32", "f32*", "i32", "f32*", "i64"
)  # fmt: skip


@functools.cache
def _decode_kernel(form: str, token_tiles: int) -> Kernel:
    constants = (("form", form), ("token_tiles", token_tiles))
    return Kernel(f"linear_decode_{form}_t{TOKENS * token_tiles}", _build_decode, constants, SIGNATURE, THREADS)


def decode_shared_nbytes(token_tiles: int, slices: int = ROUND) -> int:
    """Dynamic shared memory of a block, for rows of that many slices."""
    return 4 * OUTPUTS * token_tiles * min(slices, ROUND)


def linear_decode(
    rt: Runtime, x: Activations, tokens: int, matrix: Matrix, bias: Array | None, out: Array, out_row: int
) -> None:
    """Products of at most 16 tokens; `linear` checks the arguments. out_row: elements between rows of out."""
    row_tiles, tiles = matrix.weights.shape[:2]
    slices = ceil_div(tiles, 4)
    arguments = (
        matrix.weights, matrix.headers, tiles, slices, matrix.rows, x.operands, x.inverse, x.sums, tokens,
        out if bias is None else bias, int(bias is not None), out, out_row,
    )  # fmt: skip
    kernel = _decode_kernel(matrix.form, x.token_tiles)
    shared_nbytes = decode_shared_nbytes(x.token_tiles, slices)
    rt.launch(kernel, (row_tiles, 1, 1), arguments, shared_nbytes=shared_nbytes)


def decode_kernels() -> list[Kernel]:
    """Every variant."""
    return [_decode_kernel(form, n) for form in FORMS if form != "f32" for n in (1, 2)]
