"""Activations as B operands: float32 rows are rounded to float16 or bfloat16 and laid out in the tensor core's order.

A tile is 8 tokens x 64 columns, four operands of `mma.m16n8k16`: 2 runs (k-tiles 0 and 1, then 2 and 3) of 32 lanes x 4
words. With g = lane // 4 and t = lane % 4, words 2 kt + h of a run hold token g, columns 16 kt + 8 h + 2 t and the
next. A float16 row is first multiplied by the power of two that brings its largest magnitude into [512, 1024), so that
neither it nor the sum of 32 of it overflows; `inverse` keeps the power's reciprocal. bfloat16 needs none: 1. Where a
product needs it, `sums` has each block of 32 columns summed in float32 (pairs, then a tree) and split into a float16
and the float16 of the remainder, as an operand too: per 8 tokens x 256 columns, 32 lanes x 2 words, word h of a lane
being part h of token g's blocks 2 t and 2 t + 1.

A block of 256 threads casts one token; tokens that fill the last tile up are zeros. The result depends on the row
alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numba import cuda
from numba.cuda import types

from cuda_kernels.kernel import Kernel
from cuda_kernels.launch import Array, Runtime, require
from cuda_kernels.linear_forms import TILE_COLUMNS, Form, tiles_of
from cuda_kernels.primitives import (
    FULL_MASK,
    Pointer,
    Value,
    as_float,
    as_uint,
    device_function,
    pack_bf16,
    pack_f16,
    unpack_f16,
)
from cuda_kernels.views import ceil_div, rows_of

__all__ = ["TOKENS", "Activations", "activation_kernels", "activations_nbytes", "cast_activations"]

TOKENS = 8  # of a tile
THREADS = 256
WARPS = THREADS // 32

i32, i64, u32 = types.int32, types.int64, types.uint32
f32 = types.float32
ZERO = np.float32(0)


@device_function
def _power_of_two(largest: Value) -> Value:
    """The bits of a row's largest magnitude -> the exponent field of the factor that brings it into [512, 1024).

    Infinities and NaN give 1. The factor and its reciprocal are normal numbers.
    """
    exponent = i32(largest >> 23)
    return i32(127) if exponent == 255 or largest == 0 else i32(min(263 - exponent, 253))


def _build_cast(*, element: str, block_sums: bool) -> Callable[..., None]:
    scaled = element == "f16"
    pack = pack_f16 if scaled else pack_bf16
    pairs_per_tile = TILE_COLUMNS // 2

    def cast(
        x: Pointer, x_row: Value, tokens: Value, columns: Value, tiles: Value, slices: Value,
        operands: Pointer, inverse: Pointer, sums: Pointer,
    ) -> None:  # fmt: skip
        token = i32(cuda.blockIdx.x)
        thread = i32(cuda.threadIdx.x)
        live = token < tokens
        row = i64(token) * x_row
        field = i32(127)  # of the factor's exponent: 1
        if scaled:
            partial = cuda.shared.array(WARPS, types.int32)
            largest = i32(0)
            if live:
                for k in range(thread, columns, THREADS):
                    largest = max(largest, i32(as_uint(x[row + k]) & u32(0x7FFFFFFF)))
            for step in (16, 8, 4, 2, 1):
                largest = max(largest, cuda.shfl_xor_sync(FULL_MASK, largest, step))
            if thread & 31 == 0:
                partial[u32(thread >> 5)] = largest
            cuda.syncthreads()
            for w in range(WARPS):
                largest = max(largest, partial[w])
            field = _power_of_two(largest)
        factor = as_float(u32(field << 23))
        if thread == 0:
            inverse[u32(token)] = as_float(u32((254 - field) << 23))
        group, g = i32(token // TOKENS), i32(token % TOKENS)
        for pair in range(thread, slices * (4 * pairs_per_tile), THREADS):
            k = i32(2 * pair)
            low = x[row + k] * factor if live and k < columns else ZERO
            high = x[row + k + 1] * factor if live and k + 1 < columns else ZERO
            word = pack(low, high)
            tile = i32(pair // pairs_per_tile)
            if tile < tiles:
                run = i32((i64(group) * tiles + tile) * 2 + (pair >> 4 & 1))
                lane = i32(4 * g + (pair & 3))
                operands[i64(run) * 128 + (4 * lane + (pair >> 2 & 3))] = word
            if block_sums:
                first, second = unpack_f16(word)
                total = first + second
                for step in (8, 4, 2, 1):
                    total += cuda.shfl_xor_sync(FULL_MASK, total, step)
                if pair & 15 == 0:
                    part = pack_f16(total, ZERO)
                    rest = pack_f16(total - unpack_f16(part)[0], ZERO)
                    block = i32(pair >> 4)  # 8 to a slice
                    at = ((i64(group) * slices + (block >> 3)) * 32 + (4 * g + (block >> 1 & 3))) * 4 + (block & 1)
                    sums[at] = types.uint16(part)
                    sums[at + 2] = types.uint16(rest)

    return cast


@functools.cache
def _cast_kernel(element: str, block_sums: bool) -> Kernel:
    name = f"linear_cast_{element}{'_sums' if block_sums else ''}"
    signature = ("f32*", "i64", "i32", "i32", "i32", "i32", "u32*", "f32*", "u16*")
    return Kernel(name, _build_cast, (("element", element), ("block_sums", block_sums)), signature, THREADS)


@dataclass(frozen=True)
class Activations:
    """T tokens as operands, in scratch memory.

    Attributes:
        token_tiles: tiles of 8 tokens.
        operands: (token tiles, column tiles, 2, 32, 4) uint32.
        inverse: (8 token tiles,) float32.
        sums: (token tiles, slices, 32, 2) uint32.
    """

    token_tiles: int
    operands: Array
    inverse: Array
    sums: Array


def _part_nbytes(tokens: int, columns: int) -> tuple[int, int, int]:
    """Bytes of operands, inverse and sums, each a multiple of 256."""
    token_tiles = ceil_div(tokens, TOKENS)
    _, tiles, slices = tiles_of(1, columns)
    return 1024 * token_tiles * tiles, 256 * ceil_div(token_tiles, TOKENS), 256 * token_tiles * slices


def activations_nbytes(tokens: int, columns: int) -> int:
    """Scratch memory for (tokens, columns)."""
    return sum(_part_nbytes(tokens, columns))


def cast_activations(rt: Runtime, x: Array, form: Form, scratch: Array) -> Activations:
    """x (T, K) float32, rows may be strided -> operands for a matrix of that form, in `scratch` (bytes, contiguous).

    Raises KernelArgumentError if the scratch is too small.
    """
    tokens, columns, stride = rows_of(x, "x")
    token_tiles = ceil_div(tokens, TOKENS)
    _, tiles, slices = tiles_of(1, columns)
    sizes = _part_nbytes(tokens, columns)
    require(scratch.nbytes >= sum(sizes), f"linear needs {sum(sizes)} bytes of scratch, not {scratch.nbytes}")
    ends = sizes[0], sizes[0] + sizes[1], sum(sizes)
    space = scratch.reshape(-1).view(np.uint8)
    operands = space[: ends[0]].view(np.uint32)
    inverse = space[ends[0] : ends[1]].view(np.float32)
    sums = space[ends[1] : ends[2]]
    kernel = _cast_kernel("bf16" if form.name == "bf16" else "f16", form.block_sums)
    arguments = (x, stride, tokens, columns, tiles, slices, operands, inverse, sums.view(np.uint16))
    rt.launch(kernel, (TOKENS * token_tiles, 1, 1), arguments)
    return Activations(token_tiles, operands, inverse, sums.view(np.uint32))


def activation_kernels() -> list[Kernel]:
    """Every variant."""
    return [_cast_kernel("f16", False), _cast_kernel("f16", True), _cast_kernel("bf16", False)]
