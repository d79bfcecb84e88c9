"""Linear layer for many tokens on tensor cores.

A block of four warps makes 64 R rows x 8 N tokens of the result, warp w the rows 16 R w and up, with R tiles of 16 rows
and N tiles of 8 tokens. Operands come through shared memory in a ring of stages of 64 columns, `cp.async` being two or
three stages ahead: both are in operand order already, so that copies are straight and a lane reads 16 bytes at 16 times
its number, without conflicts.

    stage s (columns 64 s ..):   | activations: N x 256 words | weights: 4 R x 32 x words a lane |
    slot s / 4 % 2 (slices):     | headers: 4 R records       | block sums: N x 64 words         |

Each output's sums are those of `linear_decode`, in the same order: the chain of a slice, then slice to total. Bits are
equal.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numba import cuda
from numba.cuda import types

from cuda_kernels.kernel import Kernel
from cuda_kernels.launch import Array, Runtime
from cuda_kernels.linear_activations import TOKENS, Activations
from cuda_kernels.linear_decode import SIGNATURE
from cuda_kernels.linear_forms import FORMS, SCALE_WORDS, TILE_ROWS, Form
from cuda_kernels.linear_fragments import fragments, magic_exponent, minima_selector
from cuda_kernels.matrix import Matrix
from cuda_kernels.primitives import (
    Pointer,
    Value,
    cp_async16,
    cp_async_commit,
    cp_async_wait,
    device_function,
    fma,
    load2,
    load4,
)
from cuda_kernels.views import ceil_div

__all__ = ["linear_prefill", "prefill_kernels", "prefill_shared_nbytes"]

WARPS = 4
THREADS = 32 * WARPS
LARGE, SMALL = (2, 8), (1, 4)  # (R, N)

i32, i64, u32, f32 = types.int32, types.int64, types.uint32, types.float32
ZERO = np.float32(0)


def _stages(spec: Form) -> int:
    """Stages of the ring: at least two blocks should fit on a multiprocessor with 164 KB. A slot's slice is done with
    when its successor's successor is copied, for up to five."""
    return 3 if spec.bits == 16 else 4


def _sizes(spec: Form, row_tiles: int, token_tiles: int) -> tuple[int, int]:
    """Words of a stage and of a slot."""
    stage = 256 * token_tiles + WARPS * row_tiles * 32 * spec.words
    return stage, WARPS * row_tiles * spec.header_words + (64 * token_tiles if spec.block_sums else 0)


def _build_prefill(*, form: str, row_tiles: int, token_tiles: int) -> Callable[..., None]:
    spec = FORMS[form]
    unpack, multiply, finish, tile_scales, header = fragments(spec)
    words, header_words, quantised, bits, minima = (
        spec.words, spec.header_words, spec.quantised, spec.bits, spec.minima
    )  # fmt: skip
    stage_words, slot_words = _sizes(spec, row_tiles, token_tiles)
    stages = _stages(spec)
    copies_ahead, pending = stages - 1, stages - 2  # pending: groups of copies under way when a stage is used
    weights_in_stage, slots = 256 * token_tiles, stages * stage_words
    sums_in_slot = WARPS * row_tiles * header_words
    extra_at = SCALE_WORDS + spec.high_words
    has_extra = spec.extra_words > 0
    operand_copies, weight_copies = token_tiles * 64 // THREADS, words // 4
    header_chunks, sum_chunks = header_words // 4, 16 * token_tiles
    accumulators, raw_words = row_tiles * token_tiles * 4, row_tiles * (words // 2)
    per_step = words // 8  # 16-byte loads of a lane in a step of 32 columns; 4-bit forms share one between two steps
    a_words, half_tiles = 8 * row_tiles, 2 * row_tiles

    @device_function
    def copy_stage(
        shared: Pointer, weights: Pointer, operands: Pointer, column_tile: Value, tiles: Value,
        row_tile: Value, row_tiles_left: Value, token_tile: Value, token_tiles_left: Value, thread: Value,
    ) -> None:  # fmt: skip
        """Begins the copies of 64 columns; tiles outside the matrix or batch are filled with zeros, and not read."""
        stage = i32(u32(column_tile) % u32(stages) * stage_words)
        source = (i64(token_tile + (thread >> 6)) * tiles + column_tile) * 256 + 4 * (thread & 63)
        step = i64(tiles) * (256 * THREADS // 64)
        for i in range(operand_copies):
            nbytes = i32(16) if (thread >> 6) + i * (THREADS // 64) < token_tiles_left else i32(0)
            cp_async16(shared, i32(stage + 4 * (thread + i * THREADS)), operands, source, nbytes)
            source += step
        lane, mine = i32(thread & 31), i32((thread >> 5) * row_tiles)
        source = (i64(row_tile + mine) * tiles + column_tile) * (32 * words) + 4 * lane
        to = i32(stage + weights_in_stage + mine * (32 * words) + 4 * lane)
        for r in range(row_tiles):
            nbytes = i32(16) if mine + r < row_tiles_left else i32(0)
            for q in range(weight_copies):
                cp_async16(shared, i32(to + r * (32 * words) + 128 * q), weights, source + 128 * q, nbytes)
            source += i64(tiles) * (32 * words)

    @device_function
    def copy_slot(
        shared: Pointer, headers: Pointer, sums: Pointer, s: Value, slices: Value,
        row_tile: Value, row_tiles_left: Value, token_tile: Value, token_tiles_left: Value, thread: Value,
    ) -> None:  # fmt: skip
        """Begins the copies of a slice's headers and block sums."""
        slot = i32(slots + (s & 1) * slot_words)
        lane, mine = i32(thread & 31), i32((thread >> 5) * row_tiles)
        for r in range(row_tiles):
            nbytes = i32(16) if mine + r < row_tiles_left else i32(0)
            source = (i64(row_tile + mine + r) * slices + s) * header_words
            for chunk in range(lane, header_chunks, 32):
                to = i32(slot + (mine + r) * header_words + 4 * chunk)
                cp_async16(shared, to, headers, source + 4 * chunk, nbytes)
        if minima:
            for chunk in range(thread, sum_chunks, THREADS):
                nbytes = i32(16) if chunk >> 4 < token_tiles_left else i32(0)
                source = (i64(token_tile + (chunk >> 4)) * slices + s) * 64 + 4 * (chunk & 15)
                cp_async16(shared, i32(slot + sums_in_slot + 4 * chunk), sums, source, nbytes)

    def prefill(
        weights: Pointer, headers: Pointer, tiles: Value, slices: Value, rows: Value,
        operands: Pointer, inverse: Pointer, sums: Pointer, tokens: Value,
        bias: Pointer, has_bias: Value, out: Pointer, out_row: Value,
    ) -> None:  # fmt: skip
        shared = cuda.shared.array(0, types.uint32)
        thread = i32(cuda.threadIdx.x)
        lane, warp = i32(thread & 31), i32(thread >> 5)
        g, t = i32(lane >> 2), i32(lane & 3)
        selector, magic = minima_selector(t), magic_exponent(tiles)
        token_tile, row_tile = i32(cuda.blockIdx.x * token_tiles), i32(cuda.blockIdx.y * (WARPS * row_tiles))
        token_tiles_left, row_tiles_left = i32(((tokens + 7) >> 3) - token_tile), i32(((rows + 15) >> 4) - row_tile)
        raw = cuda.local.array(raw_words, types.uint32)
        scales = cuda.local.array(half_tiles, types.uint32)
        a = cuda.local.array(a_words, types.uint32)
        r0 = cuda.local.array(4, types.uint32)
        r8 = cuda.local.array(4, types.uint32)
        d = cuda.local.array(4, types.float32)
        m = cuda.local.array(2, types.uint32)
        acc = cuda.local.array(accumulators, types.float32)
        total = cuda.local.array(accumulators, types.float32)
        for i in range(accumulators):
            acc[i] = ZERO
            total[i] = ZERO
        for step in range(-copies_ahead, tiles):
            column_tile = i32(step)
            if column_tile >= 0:
                cp_async_wait(pending)
                cuda.syncthreads()  # this stage is there for all, and the one before is free
            ahead = i32(column_tile + copies_ahead)
            if ahead < tiles:
                copy_stage(
                    shared, weights, operands, ahead, tiles,
                    row_tile, row_tiles_left, token_tile, token_tiles_left, thread,
                )  # fmt: skip
                if quantised and ahead & 3 == 0:
                    copy_slot(
                        shared, headers, sums, i32(ahead >> 2), slices,
                        row_tile, row_tiles_left, token_tile, token_tiles_left, thread,
                    )  # fmt: skip
            cp_async_commit()
            if column_tile < 0:
                continue
            stage = i32(u32(column_tile) % u32(stages) * stage_words)
            slot = i32(slots + (column_tile >> 2 & 1) * slot_words)
            tile = i32(column_tile & 3)  # in its slice
            my_weights = i32(stage + weights_in_stage + warp * (row_tiles * 32 * words) + 4 * lane)
            my_headers = i32(slot + warp * (row_tiles * header_words))
            if quantised:
                for r in range(row_tiles):
                    at = i32(my_headers + r * header_words + 4 * g)
                    w0, w1, w2, w3 = load4(shared, at)
                    scales[2 * r] = tile_scales(w0, w1, w2, w3, tile)
                    w0, w1, w2, w3 = load4(shared, at + 32)
                    scales[2 * r + 1] = tile_scales(w0, w1, w2, w3, tile)
            for half in range(2):
                for r in range(row_tiles):
                    at = i32(my_weights + r * (32 * words))
                    if per_step == 0:
                        raw[2 * r], raw[2 * r + 1] = load2(shared, at + 2 * half)
                    for q in range(per_step):
                        i = r * (words // 2) + 4 * q
                        run = i32(at + 128 * (half * per_step + q))
                        raw[i], raw[i + 1], raw[i + 2], raw[i + 3] = load4(shared, run)
                    upper = u32(0)
                    if bits == 5:
                        upper = shared[u32(my_headers + r * header_words + SCALE_WORDS + 4 * lane + tile)]
                    elif bits == 6:
                        at = i32(my_headers + r * header_words + SCALE_WORDS + 4 * lane)
                        upper = shared[u32(at + (tile >> 1) * 128 + 2 * (tile & 1) + half)]
                    unpack(
                        raw, r * (words // 2), upper, half, scales[2 * r], scales[2 * r + 1], magic, a[8 * r : 8 * r +
                        8]
                    )  # fmt: skip
                for n in range(token_tiles):
                    b0, b1, b2, b3 = load4(shared, stage + 256 * n + 128 * half + 4 * lane)
                    for r in range(row_tiles):
                        at = 4 * (r * token_tiles + n)
                        multiply(a[8 * r : 8 * r + 8], b0, b1, b2, b3, half, scales[2 * r], scales[2 * r + 1], acc, at)
            if tile == 3 or column_tile == tiles - 1:
                for r in range(row_tiles):
                    extra0, extra1 = u32(0), u32(0)
                    if quantised:
                        at = i32(my_headers + r * header_words)
                        r0[0], r0[1], r0[2], r0[3] = load4(shared, at + 4 * g)
                        r8[0], r8[1], r8[2], r8[3] = load4(shared, at + 4 * g + 32)
                        if has_extra:
                            if bits == 6:
                                extra0 = shared[u32(at + g + extra_at)]
                            else:
                                extra0, extra1 = load2(shared, at + 2 * lane + extra_at)
                    header(r0, r8, extra0, extra1, selector, d, m)
                    for n in range(token_tiles):
                        sum0, sum1 = u32(0), u32(0)
                        if minima:
                            sum0, sum1 = load2(shared, slot + sums_in_slot + 64 * n + 2 * lane)
                        at = 4 * (r * token_tiles + n)
                        finish(acc, at, d, m, sum0, sum1)
                        for e in range(4):
                            total[at + e] += acc[at + e]
                            acc[at + e] = ZERO
        offsets = cuda.local.array(half_tiles, types.float32)
        row = i32((row_tile + warp * row_tiles) * TILE_ROWS + g)
        for i in range(half_tiles):
            offsets[i] = bias[u32(row + 8 * i)] if has_bias and row + 8 * i < rows else ZERO
        for n in range(token_tiles):
            for e in range(2):
                token = i32((token_tile + n) * TOKENS + 2 * t + e)
                if token < tokens:
                    scale = inverse[u32(token)]
                    at = i64(token) * out_row + row
                    for i in range(half_tiles):
                        if row + 8 * i < rows:
                            sum_at = 4 * (i // 2 * token_tiles + n) + 2 * (i % 2) + e
                            out[at + 8 * i] = fma(total[sum_at], scale, offsets[i])

    return prefill


@functools.cache
def _prefill_kernel(form: str, row_tiles: int, token_tiles: int) -> Kernel:
    name = f"linear_prefill_{form}_r{row_tiles * WARPS * TILE_ROWS}_t{token_tiles * TOKENS}"
    constants = (("form", form), ("row_tiles", row_tiles), ("token_tiles", token_tiles))
    return Kernel(name, _build_prefill, constants, SIGNATURE, THREADS, min_blocks=2)


def prefill_shared_nbytes(form: str, row_tiles: int, token_tiles: int) -> int:
    """Dynamic shared memory of a block."""
    spec = FORMS[form]
    stage, slot = _sizes(spec, row_tiles, token_tiles)
    return 4 * (_stages(spec) * stage + 2 * slot)


def linear_prefill(
    rt: Runtime, x: Activations, tokens: int, matrix: Matrix, bias: Array | None, out: Array, out_row: int
) -> None:
    """Products of any number of tokens; `linear` checks the arguments. out_row: elements between rows of out."""
    row_tiles, tiles = matrix.weights.shape[:2]

    def grid_of(variant: tuple[int, int]) -> tuple[int, int, int]:
        return ceil_div(x.token_tiles, variant[1]), ceil_div(row_tiles, WARPS * variant[0]), 1

    large = grid_of(LARGE)
    fills = large[0] * large[1] >= rt.num_multiprocessors and x.token_tiles > SMALL[1]
    variant, grid = (LARGE, large) if fills else (SMALL, grid_of(SMALL))
    arguments = (
        matrix.weights, matrix.headers, tiles, ceil_div(tiles, 4), matrix.rows, x.operands, x.inverse, x.sums, tokens,
        out if bias is None else bias, int(bias is not None), out, out_row,
    )  # fmt: skip
    shared_nbytes = prefill_shared_nbytes(matrix.form, *variant)
    rt.launch(_prefill_kernel(matrix.form, *variant), grid, arguments, shared_nbytes=shared_nbytes)


def prefill_kernels() -> list[Kernel]:
    """Every variant."""
    return [_prefill_kernel(form, *variant) for form in FORMS if form != "f32" for variant in (LARGE, SMALL)]
