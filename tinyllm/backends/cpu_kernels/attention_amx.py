"""Attention over a cache in bfloat16 on AMX: queries, keys, probabilities and values are multiplied as bfloat16.

Tile registers hold 8 or 16 rows (tokens x heads) of 32 elements, and 32 elements of sixteen keys or values, in pairs
that lie side by side. The cache has them so (D a multiple of 32):

    K  (NB, KH, BS / 16, D / 2, 16, 2)    a tile of keys:  [pair of elements][16 keys][2]
    V  (NB, KH, BS / 2, D, 2)             [pair of keys][D elements][2]; copied, since a step's 32 keys may lie in two
                                          blocks, and what no row sees has to be zero: it may be NaN

One instruction adds a step of 32 products, of elements or of keys:

    C[row][column] += even + odd           even, odd: sums of the 16 products of even, of odd k, ascending, in float32

So a score is summed over steps of elements, an output over steps of keys, ascending; a step without any key of a row
adds 0, which changes nothing, and rows side by side have nothing to do with each other.
Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBF16PS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from llvmlite import ir

from tinyllm.backends.cpu_kernels.amx import (
    configure_tiles,
    emit_tile_load,
    emit_tile_product,
    emit_tile_store,
    emit_tile_zero,
    has_amx_bf16,
    release_tiles,
)
from tinyllm.backends.cpu_kernels.attention_mask import lowest_key, seen
from tinyllm.backends.cpu_kernels.attention_tiles import attention_tiles
from tinyllm.backends.cpu_kernels.deferred import types
from tinyllm.backends.cpu_kernels.jit import called, device
from tinyllm.backends.cpu_kernels.online_softmax import TILE_KEYS, start_row
from tinyllm.backends.cpu_kernels.simd import (
    I32,
    V32,
    Builder,
    Value,
    const,
    const_vec,
    emit_load,
    emit_loop,
    emit_reduce,
    emit_splat,
    instruction,
    load,
    load_i32,
    pointer,
    store,
    zeros,
)
from tinyllm.backends.cpu_kernels.softmax_bf16 import exponentiate_bf16, find_maximum_bf16, round_to_bf16

__all__ = ["AMX_ROWS", "AmxAttention", "amx_attention", "suits_amx"]

AMX_ROWS = 16  # that a tile register holds
_SUMS, _ROWS, _COLUMNS = (0, 1, 2, 3), 4, (5, 6)  # tile registers: C, A, B
_SCORES = 4 * TILE_KEYS  # bytes from one row of scores to the next; its probabilities fill the first half
_EXPONENTS = 0x7F807F80  # of two bfloat16

i64 = types.int64


def suits_amx(head_dim: int) -> bool:
    return head_dim % 32 == 0 and has_amx_bf16()


def _configure(rows: int) -> Callable[[int], None]:
    return configure_tiles(dict.fromkeys((*_SUMS, _ROWS), (rows, 64)) | dict.fromkeys(_COLUMNS, (16, 64)))


@instruction(types.void, *(i64,) * 7)
def _score_tile(
    b: Builder, q: Value, keys0: Value, keys1: Value, keys2: Value, keys3: Value, steps: Value, scores: Value
) -> None:
    """scores[r] = q[r] . 64 keys, in four tiles of the cache; q [steps][AMX_ROWS][32]."""
    for C in _SUMS:
        emit_tile_zero(b, C)

    def one_step(i: Value, _state: list[Value]) -> list[Value]:
        at = b.mul(i, const(64 * AMX_ROWS))
        emit_tile_load(b, _ROWS, b.add(q, at), 64)
        for C, keys in zip(_SUMS, (keys0, keys1, keys2, keys3), strict=True):
            B = _COLUMNS[C % 2]
            emit_tile_load(b, B, b.add(keys, at), 64)
            emit_tile_product(b, "dpbf16ps", C, _ROWS, B)
        return []

    emit_loop(b, const(0), steps, 1, [], one_step)
    for C in _SUMS:
        emit_tile_store(b, C, b.add(scores, const(64 * C)), _SCORES)


def _value_tile(vectors: int) -> Callable[..., None]:
    """(probs, values, first, end, acc, out, stride): out[r] = acc[r] + probs[r] . values of the steps first <= s < end.

    values [steps][16][D][2], from an element on; 16 * vectors elements; stride: of a row of acc and out.
    """

    @instruction(types.void, *(i64,) * 7)
    def value_tile(
        b: Builder, probs: Value, values: Value, first: Value, end: Value, acc: Value, out: Value, stride: Value
    ) -> None:
        sums = _SUMS[:vectors]
        for C in sums:
            emit_tile_load(b, C, b.add(acc, const(64 * C)), stride)

        def one_step(i: Value, _state: list[Value]) -> list[Value]:
            emit_tile_load(b, _ROWS, b.add(probs, b.mul(i, const(64))), _SCORES)
            at = b.add(values, b.mul(i, b.mul(stride, const(16))))
            for C in sums:
                B = _COLUMNS[C % 2]
                emit_tile_load(b, B, b.add(at, const(64 * C)), stride)
                emit_tile_product(b, "dpbf16ps", C, _ROWS, B)
            return []

        emit_loop(b, first, end, 1, [], one_step)
        for C in sums:
            emit_tile_store(b, C, b.add(out, const(64 * C)), stride)

    return value_tile


_wide_values, _narrow_values = _value_tile(4), _value_tile(2)


@instruction(types.void, *(i64,) * 4)
def _copy_pairs(b: Builder, source: Value, target: Value, nbytes: Value, mask: Value) -> None:
    """Pairs of two keys' elements; mask: the bits of the keys that count, the others become 0."""
    kept = emit_splat(b, b.trunc(mask, I32), V32)

    def one(at: Value, _state: list[Value]) -> list[Value]:
        pairs = b.and_(emit_load(b, b.add(source, at), V32), kept)
        b.store(pairs, pointer(b, b.add(target, at), V32), align=4)
        return []

    emit_loop(b, const(0), nbytes, 64, [], one)


@instruction(i64, *(i64,) * 2)
def _all_finite(b: Builder, begin: Value, end: Value) -> Value:
    """Whether the bfloat16 from `begin` to `end` are numbers: 1 or 0."""

    def one(at: Value, state: list[Value]) -> list[Value]:
        bits = b.and_(emit_load(b, at, V32), const_vec(V32, _EXPONENTS))
        upper, lower = b.and_(bits, const_vec(V32, 0x7F800000)), b.and_(bits, const_vec(V32, 0x7F80))
        found = [b.icmp_signed("==", x, const_vec(V32, top)) for x, top in ((upper, 0x7F800000), (lower, 0x7F80))]
        return [b.or_(state[0], b.sext(b.or_(*found), V32))]

    (found,) = emit_loop(b, begin, end, 64, [const_vec(V32, 0)], one)
    any_found = emit_reduce(b, found, lambda b, x, y: b.or_(x, y))
    return b.zext(b.icmp_signed("==", any_found, ir.Constant(I32, 0)), ir.IntType(64))


@device
def _stage(
    tile: int, first: int, end: int, v: int, v_block_stride: int, table: int, block_size: int, head_dim: int,
    staged: int,
) -> None:  # fmt: skip
    """The values of keys first <= j < end to their places in a tile of keys; zeros for the others of their steps."""
    row = 4 * head_dim  # bytes of a pair of keys
    key, stop = first // 32 * 32, (end + 31) // 32 * 32
    while key < stop:
        target = staged + (key - tile) // 2 * row
        source = v + load_i32(table + 4 * (key // block_size)) * v_block_stride if first < key + 16 and key < end else v
        source += key % block_size // 2 * row
        if first <= key and key + 16 <= end:
            _copy_pairs(source, target, 8 * row, -1)
        else:
            for pair in range(8):
                low, high = first <= key + 2 * pair < end, first <= key + 2 * pair + 1 < end
                if low or high:
                    mask = (0xFFFF if low else 0) | (-0x10000 if high else 0)
                    _copy_pairs(source + pair * row, target + pair * row, row, mask)
                else:
                    for at in range(0, row, 64):
                        store(target + pair * row + at, zeros())
        key += 16


@device
def _weigh(probs: int, staged: int, first: int, end: int, acc: int, out: int, head_dim: int) -> None:
    """out = acc + probs . the staged values of the steps first <= s < end, for a tile of rows."""
    d = 0
    while d + 64 <= head_dim:
        _wide_values(probs, staged + 4 * d, first, end, acc + 4 * d, out + 4 * d, 4 * head_dim)
        d += 64
    if d < head_dim:
        _narrow_values(probs, staged + 4 * d, first, end, acc + 4 * d, out + 4 * d, 4 * head_dim)


@dataclass(frozen=True)
class AmxAttention:
    """Functions for kernels.

    begin(rows, memory), end(): around the parts of a task of so many rows; memory: that of `attend_part`.
    quantise_query(source, head_dim, q, row): a query as row `row` of q's tiles.
    attend_part(...): as in `attention.py`; memory: for the values of a tile of keys, and a tile of sums.
    """

    begin: Callable[[int, int], None]
    end: Callable[[], None]
    quantise_query: Callable[[int, int, int, int], None]
    attend_part: Callable[..., None]


@cache
def amx_attention() -> AmxAttention:
    configure_few, configure_most = _configure(AMX_ROWS // 2), _configure(AMX_ROWS)
    fetch = attention_tiles("bf16").fetch  # a cache's rows are as long, if not as ordered

    @device
    def begin(rows: int, memory: int) -> None:
        if rows <= AMX_ROWS // 2:
            configure_few(memory)
        else:
            configure_most(memory)

    @device
    def quantise_query(source: int, head_dim: int, q: int, row: int) -> None:
        target = q + row // AMX_ROWS * AMX_ROWS * 2 * head_dim + row % AMX_ROWS * 64
        for d in range(0, head_dim, 32):
            round_to_bf16(target + AMX_ROWS * 2 * d, load(source + 4 * d))
            round_to_bf16(target + AMX_ROWS * 2 * d + 32, load(source + 4 * d + 64))

    @device
    def keys_at(key: int, k: int, k_block_stride: int, table: int, block_size: int, head_dim: int) -> int:
        return k + load_i32(table + 4 * (key // block_size)) * k_block_stride + key % block_size * 2 * head_dim

    @called
    def attend_part(
        first_key: int, end_key: int, rows: int, heads: int, position: int, window: int, sinks: int, scale: float,
        cap: float, head_dim: int, k: int, v: int, k_block_stride: int, v_block_stride: int, table: int,
        block_size: int, states: int, all_scores: int, accs: int, q: int, memory: int,
    ) -> None:  # fmt: skip
        staged = memory
        factor = scale if cap <= 0.0 else np.float32(1.0)
        apart = staged + 2 * TILE_KEYS * head_dim
        for r in range(rows):
            start_row(states + 128 * r)
            for d in range(0, head_dim, 16):
                store(accs + 4 * (r * head_dim + d), zeros())
        last_position = position + (rows - 1) // heads
        start, stop = max(first_key, lowest_key(position, window, sinks)), min(end_key, last_position + 1)
        for tile in range(start // TILE_KEYS * TILE_KEYS, stop, TILE_KEYS):
            end_of_tile = min(tile + TILE_KEYS, end_key)
            first, end = max(tile, start), min(end_of_tile, stop)
            for ahead in range(tile + TILE_KEYS, min(tile + 2 * TILE_KEYS, stop), 16):
                fetch(ahead, k, v, k_block_stride, v_block_stride, table, block_size, head_dim)
            _stage(tile, first, end, v, v_block_stride, table, block_size, head_dim, staged)
            first_step, end_step = (first - tile) // 32, (end - tile + 31) // 32
            # where some row does not see all that others see, its zeros must not meet what is no number
            together = lowest_key(last_position, window, sinks) <= first and end <= position + 1
            if not together:
                begin_of_steps = staged + first_step * 64 * head_dim
                together = _all_finite(begin_of_steps, staged + end_step * 64 * head_dim) != 0
            at = first // 16 * 16, (end - 1) // 16 * 16  # the tiles of sixteen keys that may be read
            keys0 = keys_at(min(max(tile, at[0]), at[1]), k, k_block_stride, table, block_size, head_dim)
            keys1 = keys_at(min(max(tile + 16, at[0]), at[1]), k, k_block_stride, table, block_size, head_dim)
            keys2 = keys_at(min(max(tile + 32, at[0]), at[1]), k, k_block_stride, table, block_size, head_dim)
            keys3 = keys_at(min(max(tile + 48, at[0]), at[1]), k, k_block_stride, table, block_size, head_dim)
            # all rows see all of the tile: most tiles, and then there is little to ask of each row
            whole = lowest_key(last_position, window, sinks) <= tile and tile + TILE_KEYS <= min(end_key, position + 1)
            steps = head_dim // 32
            _score_tile(q, keys0, keys1, keys2, keys3, steps, all_scores)
            for r0 in range(0, rows, AMX_ROWS):
                end_row = min(r0 + AMX_ROWS, rows)
                for r in range(r0, end_row):
                    row_first, row_end = tile, tile + TILE_KEYS
                    if not whole:
                        row_first, row_end = seen(position + r // heads, tile, end_of_tile, window, sinks)
                    if row_first < row_end:
                        find_maximum_bf16(
                            all_scores + r * _SCORES, tile, row_first, row_end, scale, cap, states + 128 * r,
                            accs + 4 * r * head_dim, head_dim,
                        )  # fmt: skip
                for r in range(r0, end_row):
                    row_first, row_end = tile, tile + TILE_KEYS
                    if not whole:
                        row_first, row_end = seen(position + r // heads, tile, end_of_tile, window, sinks)
                    if row_first < row_end:
                        exponentiate_bf16(all_scores + r * _SCORES, states + 128 * r, factor)
                    else:
                        store(all_scores + r * _SCORES, zeros())
                        store(all_scores + r * _SCORES + 64, zeros())
                if end_row < rows:  # the matrix unit has something to do until the probabilities are there
                    next_scores = all_scores + end_row * _SCORES
                    _score_tile(q + end_row * 2 * head_dim, keys0, keys1, keys2, keys3, steps, next_scores)
                least = lowest_key(position + r0 // heads, window, sinks)
                if min(end_of_tile, position + (end_row - 1) // heads + 1) <= max(tile, least):
                    continue
                probs, acc = all_scores + r0 * _SCORES, accs + 4 * r0 * head_dim
                if together:
                    _weigh(probs, staged, first_step, end_step, acc, acc, head_dim)
                    continue
                for r in range(r0, end_row):
                    row_first, row_end = seen(position + r // heads, tile, end_of_tile, window, sinks)
                    if row_first < row_end:
                        _stage(tile, row_first, row_end, v, v_block_stride, table, block_size, head_dim, staged)
                        row_step, row_end_step = (row_first - tile) // 32, (row_end - tile + 31) // 32
                        _weigh(probs, staged, row_step, row_end_step, acc, apart, head_dim)
                        for d in range(0, head_dim, 16):
                            store(acc + 4 * ((r - r0) * head_dim + d), load(apart + 4 * ((r - r0) * head_dim + d)))
                _stage(tile, first, end, v, v_block_stride, table, block_size, head_dim, staged)

    return AmxAttention(begin, release_tiles, quantise_query, attend_part)
