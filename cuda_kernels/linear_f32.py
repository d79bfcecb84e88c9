"""Linear layer in plain float32 arithmetic, for matrices of the f32 form.

A lane is a row of the matrix: groups of 32 rows lie in memory as [group][column / 4][row][4 columns], so that a warp's
16-byte loads are whole, and x is read by all lanes at the same address. Each slice of 256 columns is one chain of fused
multiply-adds from 0, columns ascending; slices are added in ascending order, total = ((0 + s0) + s1) + ... Both kernels
do the same operations:

- decode, up to 8 tokens: a block owns 32 rows, its eight warps share the slices, and slices are added through shared
  memory;
- prefill: a block of four warps makes 64 rows x 64 tokens, a lane 2 rows x 16 tokens; weights and x come through shared
  memory in a ring of three stages of 32 columns.

Columns and the rows of x must be multiples of 16 bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numba import cuda
from numba.cuda import types

from cuda_kernels.kernel import Kernel
from cuda_kernels.launch import Array, Runtime
from cuda_kernels.linear_forms import F32_ROWS, SLICE
from cuda_kernels.matrix import Matrix
from cuda_kernels.primitives import (
    Pointer,
    Value,
    cp_async16,
    cp_async_commit,
    cp_async_wait,
    device_function,
    fma,
    load4,
    load4_streamed,
)
from cuda_kernels.views import ceil_div

__all__ = ["MAX_TOKENS", "f32_kernels", "f32_shared_nbytes", "linear_f32"]

DECODE_WARPS = 8
DECODE_THREADS = 32 * DECODE_WARPS
MAX_TOKENS = 8  # of the decode kernel
ROUND = 4 * DECODE_WARPS  # slices between two summations
QUADS = SLICE // 4  # of a slice
BATCH = 8  # 16-byte loads of weights a lane has on their way

WARPS = 4
THREADS = 32 * WARPS
GROUPS = 2  # of 32 rows
TOKENS_EACH = 16  # of a lane
TOKENS = WARPS * TOKENS_EACH
STAGES = 3
STAGE_QUADS = 8
X_AT = GROUPS * STAGE_QUADS * 128
STAGE_FLOATS = X_AT + TOKENS * STAGE_QUADS * 4
STAGES_PER_SLICE = QUADS // STAGE_QUADS

i32, i64, u32 = types.int32, types.int64, types.uint32
ZERO = np.float32(0)


@device_function
def _chain4(w0: Value, w1: Value, w2: Value, w3: Value, x: tuple, total: Value) -> Value:  # type: ignore[type-arg]
    return fma(w3, x[3], fma(w2, x[2], fma(w1, x[1], fma(w0, x[0], total))))


def _build_decode(*, tokens_at_most: int) -> Callable[..., None]:
    outputs = F32_ROWS * tokens_at_most
    raw_floats = 4 * BATCH

    def decode(
        weights: Pointer, quads: Value, slices: Value, rows: Value, x: Pointer, x_row: Value, tokens: Value,
        bias: Pointer, has_bias: Value, out: Pointer, out_row: Value,
    ) -> None:  # fmt: skip
        partial = cuda.shared.array(0, types.float32)  # [slice of the round][token][row]
        thread = i32(cuda.threadIdx.x)
        lane, warp = i32(thread & 31), i32(thread >> 5)
        weights_at = i64(cuda.blockIdx.x) * quads * 128 + 4 * lane
        raw = cuda.local.array(raw_floats, types.float32)
        acc = cuda.local.array(tokens_at_most, types.float32)
        x_at = cuda.local.array(tokens_at_most, types.int64)
        for n in range(tokens_at_most):
            x_at[n] = i64(min(i32(n), i32(tokens - 1))) * x_row
        total = ZERO
        first = i32(0)
        while first < slices:
            end = min(i32(first + ROUND), slices)
            for s in range(i32(first + warp), end, DECODE_WARPS):
                for n in range(tokens_at_most):
                    acc[n] = ZERO
                last = i32(min(i32(QUADS * (s + 1)), quads) - 1)
                for start in range(i32(QUADS * s), last + 1, BATCH):
                    for j in range(BATCH):
                        at = weights_at + i32(min(i32(start + j), last) * 128)
                        i = 4 * j
                        raw[i], raw[i + 1], raw[i + 2], raw[i + 3] = load4_streamed(weights, at)
                    for j in range(BATCH):
                        if start + j <= last:
                            for n in range(tokens_at_most):
                                four = load4(x, x_at[n] + i32(4 * (start + j)))
                                i = 4 * j
                                acc[n] = _chain4(raw[i], raw[i + 1], raw[i + 2], raw[i + 3], four, acc[n])
                for n in range(tokens_at_most):
                    partial[u32((s - first) * outputs + n * F32_ROWS + lane)] = acc[n]
            cuda.syncthreads()
            if thread < outputs:
                for s in range(end - first):
                    total += partial[u32(s * outputs + thread)]
            cuda.syncthreads()
            first = end
        row, token = i32(cuda.blockIdx.x * F32_ROWS + lane), warp
        if thread < outputs and token < tokens and row < rows:
            offset = bias[u32(row)] if has_bias else ZERO
            out[i64(token) * out_row + row] = total + offset if has_bias else total

    return decode


def _build_prefill() -> Callable[..., None]:
    sums, pending = GROUPS * TOKENS_EACH, STAGES - 2

    @device_function
    def copy_stage(
        shared: Pointer, weights: Pointer, quads: Value, x: Pointer, x_row: Value, step: Value,
        group: Value, groups_left: Value, token: Value, tokens_left: Value, thread: Value,
    ) -> None:  # fmt: skip
        """Begins the copies of 32 columns; what lies outside the matrix or the batch is filled with zeros, and not
        read."""
        stage = i32(u32(step) % u32(STAGES) * STAGE_FLOATS)
        quad = i32(step * STAGE_QUADS)
        lane, warp = i32(thread & 31), i32(thread >> 5)
        for j in range(GROUPS * STAGE_QUADS // WARPS):
            mine = i32(warp + j * WARPS)  # quad of the stage, groups after one another
            at = i32(quad + mine % STAGE_QUADS)
            inside = at < quads and mine // STAGE_QUADS < groups_left
            source = (i64(group + mine // STAGE_QUADS) * quads + at) * 128 + 4 * lane
            to = i32(stage + mine * 128 + 4 * lane)
            cp_async16(shared, to, weights, source, i32(16) if inside else i32(0))
        for j in range(TOKENS * STAGE_QUADS // THREADS):
            chunk = i32(thread + j * THREADS)
            n, at = i32(chunk // STAGE_QUADS), i32(quad + chunk % STAGE_QUADS)
            inside = at < quads and n < tokens_left
            source = i64(token + n) * x_row + 4 * at
            cp_async16(shared, i32(stage + X_AT + 4 * chunk), x, source, i32(16) if inside else i32(0))

    def prefill(
        weights: Pointer, quads: Value, slices: Value, rows: Value, x: Pointer, x_row: Value, tokens: Value,
        bias: Pointer, has_bias: Value, out: Pointer, out_row: Value,
    ) -> None:  # fmt: skip
        shared = cuda.shared.array(0, types.float32)
        thread = i32(cuda.threadIdx.x)
        lane, warp = i32(thread & 31), i32(thread >> 5)
        first_token, group = i32(cuda.blockIdx.x * TOKENS), i32(cuda.blockIdx.y * GROUPS)
        tokens_left, groups_left = i32(tokens - first_token), i32(((rows + 31) >> 5) - group)
        acc = cuda.local.array(sums, types.float32)
        total = cuda.local.array(sums, types.float32)
        for i in range(sums):
            acc[i] = ZERO
            total[i] = ZERO
        steps = i32((quads + (STAGE_QUADS - 1)) // STAGE_QUADS)
        for counter in range(1 - STAGES, steps):
            step = i32(counter)
            if step >= 0:
                cp_async_wait(pending)
                cuda.syncthreads()  # this stage is there for all, and the one before is free
            ahead = i32(step + (STAGES - 1))
            if ahead < steps:
                copy_stage(
                    shared, weights, quads, x, x_row, ahead, group, groups_left, first_token, tokens_left, thread
                )  # fmt: skip
            cp_async_commit()
            if step < 0:
                continue
            stage = i32(u32(step) % u32(STAGES) * STAGE_FLOATS)
            mine = i32(stage + X_AT + warp * (TOKENS_EACH * STAGE_QUADS * 4))
            for j in range(min(i32(quads - step * STAGE_QUADS), i32(STAGE_QUADS))):
                at = i32(stage + j * 128 + 4 * lane)
                a0, a1, a2, a3 = load4(shared, at)
                b0, b1, b2, b3 = load4(shared, at + STAGE_QUADS * 128)
                for n in range(TOKENS_EACH):
                    four = load4(shared, i32(mine + 4 * j) + n * (STAGE_QUADS * 4))
                    acc[n] = _chain4(a0, a1, a2, a3, four, acc[n])
                    acc[TOKENS_EACH + n] = _chain4(b0, b1, b2, b3, four, acc[TOKENS_EACH + n])
            if step % STAGES_PER_SLICE == STAGES_PER_SLICE - 1 or step == steps - 1:
                for i in range(sums):
                    total[i] += acc[i]
                    acc[i] = ZERO
        for h in range(GROUPS):
            row = i32((group + h) * F32_ROWS + lane)
            if row < rows:
                offset = bias[u32(row)] if has_bias else ZERO
                for n in range(TOKENS_EACH):
                    token = i32(warp * TOKENS_EACH + n)
                    if token < tokens_left:
                        value = total[h * TOKENS_EACH + n]
                        out[i64(first_token + token) * out_row + row] = value + offset if has_bias else value

    return prefill


SIGNATURE = ("f32*", "i32", "i32", "i32", "f32*", "i64", "i32", "f32*", "i32", "f32*", "i64")


@functools.cache
def _decode_kernel(tokens_at_most: int) -> Kernel:
    constants = (("tokens_at_most", tokens_at_most),)
    return Kernel(
        f"linear_decode_f32_t{tokens_at_most}", _build_decode, constants, SIGNATURE, DECODE_THREADS, min_blocks=2
    )


@functools.cache
def _prefill_kernel() -> Kernel:
    return Kernel("linear_prefill_f32", _build_prefill, (), SIGNATURE, THREADS, min_blocks=3)


def f32_shared_nbytes(tokens_at_most: int | None, slices: int = ROUND) -> int:
    """Dynamic shared memory of a block: of the decode kernel for that many tokens, or of the prefill kernel."""
    if tokens_at_most is None:
        return 4 * STAGES * STAGE_FLOATS
    return 4 * F32_ROWS * tokens_at_most * min(slices, ROUND)


def linear_f32(
    rt: Runtime, x: Array, x_row: int, tokens: int, matrix: Matrix, bias: Array | None, out: Array, out_row: int
) -> None:
    """Products of any number of tokens; `linear` checks the arguments. x_row, out_row: elements between rows."""
    groups, quads = matrix.weights.shape[:2]
    slices = ceil_div(quads, QUADS)
    arguments = (
        matrix.weights, quads, slices, matrix.rows, x, x_row, tokens,
        out if bias is None else bias, int(bias is not None), out, out_row,
    )  # fmt: skip
    if tokens <= MAX_TOKENS:
        variant = 1 if tokens == 1 else MAX_TOKENS
        rt.launch(
            _decode_kernel(variant), (groups, 1, 1), arguments, shared_nbytes=f32_shared_nbytes(variant, slices)
        )  # fmt: skip
    else:
        grid = (ceil_div(tokens, TOKENS), ceil_div(groups, GROUPS), 1)
        rt.launch(_prefill_kernel(), grid, arguments, shared_nbytes=f32_shared_nbytes(None))


def f32_kernels() -> list[Kernel]:
    """Every variant."""
    return [*(_decode_kernel(n) for n in (1, MAX_TOKENS)), _prefill_kernel()]
