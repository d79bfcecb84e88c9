"""What a thread of the tensor-core attention does with its part of S and O, between the two products of a tile.

A thread holds two rows, a and b (see attention_tiles). Its arrays, all indexed by constants so that they are registers:

    scores[8 i + 4 h + 2 r + e]   row r, key 16 i + 8 h + 2 t + e of the tile; `own` the same for this warp's groups
    o[8 c + 4 h + 2 r + e]        row r of group c of 16 columns of O
    running[r], running[2 + r]    m and l of row r

What is needed now and then waits in shared memory, 16-byte pieces of the thread's own (no barrier guards them):

    piece 0: first and last key that rows a and b see, as int32: low_a, high_a, low_b, high_b
    piece 1: where the results of a and b go, as rows of the output, -1 for rows past the last; and the rows of q that
        they come from
    piece 2: m of a and b, l of a and b, merged over the splits so far
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import cuda
from numba.cuda import types

from cuda_kernels.attention_tiles import TileShape
from cuda_kernels.online_softmax import NEG_INF, merge, merge_weights
from cuda_kernels.primitives import (
    FULL_MASK,
    Pointer,
    Value,
    device_function,
    exp2,
    fma,
    fmax,
    load2,
    load4,
    rcp,
    store2,
    store4,
)

__all__ = ["StepFunctions", "quad_sum", "step_functions"]

_i32, _i64 = types.int32, types.int64
_ZERO, _ONE, _MINUS_TWO = np.float32(0.0), np.float32(1.0), np.float32(-2.0)


class StepFunctions(NamedTuple):
    """Device functions for one TileShape; `sh` and `shf` are dynamic shared memory as uint32 and float32.

    finish_scores(shf, at, column_warp, t, cap, own): applies the keys' scales, and softcap.
    mask_scores(sh, thread, column_warp, first_key, sinks, own): -inf for keys that a row does not see; sinks: how many
        where the tile holds sinks, else -1.
    exchange_scores(shf, row_warp, column_warp, lane, own, scores): makes the scores of all warps of a row known.
    update_softmax(shf, at, t, scores, running, probs, o): one step of the online softmax: m and l, O scaled by what
        the new maximum asks for, and P packed for its product with V.
    merge_split(shf, thread, running, o, merged): merges a split's partial, and starts the next from scratch.
    write_rows(out, to_a, to_b, column_warp, t, x): x (like o) as the rows to_a and to_b of out, unless negative.
    """

    finish_scores: Callable[..., Any]
    mask_scores: Callable[..., Any]
    exchange_scores: Callable[..., Any]
    update_softmax: Callable[..., Any]
    merge_split: Callable[..., Any]
    write_rows: Callable[..., Any]


def step_functions(shape: TileShape, pack_probs: Callable[..., Any], *, softcap: bool) -> StepFunctions:
    """The device functions for a shape; pack_probs is that of its TileFunctions."""
    return StepFunctions(
        _finish_scores(shape, softcap),
        _mask_scores(shape),
        _exchange_scores(shape),
        _update_softmax(shape, pack_probs),
        _merge_split(shape),
        _write_rows(shape),
    )


@device_function
def _quad_max(x: Value) -> Value:
    x = fmax(x, cuda.shfl_xor_sync(FULL_MASK, x, 1))
    return fmax(x, cuda.shfl_xor_sync(FULL_MASK, x, 2))


@device_function
def quad_sum(x: Value) -> Value:
    """The sum over the four threads that hold a row, the same in each."""
    x = x + cuda.shfl_xor_sync(FULL_MASK, x, 1)
    return x + cuda.shfl_xor_sync(FULL_MASK, x, 2)


def _finish_scores(shape: TileShape, softcap: bool) -> Callable[..., Any]:
    scaled, own_groups, warps = shape.scaled, shape.own_key_groups, shape.column_warps
    key_groups, scales_at = shape.key_groups, 2 * shape.tile_words
    # e4m3 keys come as float16 times 2**-8
    stored_scale = np.float32(256.0) if shape.storage == "fp8" else _ONE

    @device_function
    def finish_scores(shf: Any, at: Value, column_warp: Value, t: Value, cap: Value, own: Any) -> None:
        for n in range(own_groups):
            group = _i32(column_warp + n * warps)
            for half in range(2):
                i = n * 8 + half * 4
                if scaled and ((n + 1) * warps <= key_groups or group < key_groups):
                    scale_0, scale_1 = load2(shf, _i32(at + scales_at + group * 16 + half * 8 + t * 2))
                    scale_0 = scale_0 * stored_scale
                    scale_1 = scale_1 * stored_scale
                    own[i] = own[i] * scale_0
                    own[i + 1] = own[i + 1] * scale_1
                    own[i + 2] = own[i + 2] * scale_0
                    own[i + 3] = own[i + 3] * scale_1
                if softcap:
                    for e in range(4):  # cap * tanh(y) = cap * (1 - 2 / (1 + 2**x)), x = 2 log2(e) y
                        own[i + e] = fma(_MINUS_TWO * cap, rcp(_ONE + exp2(own[i + e])), cap)

    return finish_scores


def _mask_scores(shape: TileShape) -> Callable[..., Any]:
    own_groups, warps, state_at = shape.own_key_groups, shape.column_warps, shape.state_at

    @device_function
    def mask_scores(sh: Any, thread: Value, column_warp: Value, first_key: Value, sinks: Value, own: Any) -> None:
        low_a, high_a, low_b, high_b = load4(sh, _i32(state_at + thread * 4))
        low_a, high_a, low_b, high_b = _i32(low_a), _i32(high_a), _i32(low_b), _i32(high_b)
        if sinks >= 0:
            high_a = _i32(sinks - 1) if low_a > 0 else _i32(-1)
            high_b = _i32(sinks - 1) if low_b > 0 else _i32(-1)
            low_a, low_b = _i32(0), _i32(0)
        first = _i32(first_key + column_warp * 16 + (thread & 3) * 2)
        for n in range(own_groups):
            for half in range(2):
                for e in range(2):
                    key = _i32(first + (n * warps * 16 + half * 8 + e))
                    i = n * 8 + half * 4 + e
                    if key < low_a or key > high_a:
                        own[i] = NEG_INF
                    if key < low_b or key > high_b:
                        own[i + 2] = NEG_INF

    return mask_scores


def _exchange_scores(shape: TileShape) -> Callable[..., Any]:
    own_groups, key_groups, warps, scores_at = (
        shape.own_key_groups,
        shape.key_groups,
        shape.column_warps,
        shape.scores_at,
    )

    @device_function
    def exchange_scores(shf: Any, row_warp: Value, column_warp: Value, lane: Value, own: Any, scores: Any) -> None:
        if warps == 1:
            for i in range(key_groups * 8):
                scores[i] = own[i]
        else:
            row_at = _i32(scores_at + row_warp * (key_groups * 256) + lane * 4)
            for n in range(own_groups):
                group = _i32(column_warp + n * warps)
                if (n + 1) * warps <= key_groups or group < key_groups:
                    for half in range(2):
                        i = n * 8 + half * 4
                        here = _i32(row_at + group * 256 + half * 128)
                        store4(shf, here, own[i], own[i + 1], own[i + 2], own[i + 3])
            cuda.syncthreads()
            for n in range(key_groups * 2):
                i = n * 4
                scores[i], scores[i + 1], scores[i + 2], scores[i + 3] = load4(shf, _i32(row_at + n * 128))

    return exchange_scores


def _update_softmax(shape: TileShape, pack_probs: Callable[..., Any]) -> Callable[..., Any]:
    scaled, key_groups, own_columns = shape.scaled, shape.key_groups, shape.own_column_groups
    value_scales_at = 2 * shape.tile_words + shape.keys

    @device_function
    def update_softmax(shf: Any, at: Value, t: Value, scores: Any, running: Any, probs: Any, o: Any) -> None:
        top_a, top_b = running[0], running[1]
        for i in range(0, key_groups * 8, 4):
            top_a = fmax(top_a, fmax(scores[i], scores[i + 1]))
            top_b = fmax(top_b, fmax(scores[i + 2], scores[i + 3]))
        top_a = _quad_max(top_a)
        top_b = _quad_max(top_b)
        # where nothing was seen yet the maximum is -inf: its difference from itself would be NaN
        base_a = _ZERO if top_a == NEG_INF else top_a
        base_b = _ZERO if top_b == NEG_INF else top_b
        decay_a = exp2(running[0] - base_a)
        decay_b = exp2(running[1] - base_b)
        running[0], running[1] = top_a, top_b
        sum_a, sum_b = _ZERO, _ZERO
        for n in range(key_groups * 2):
            i = n * 4
            p0 = exp2(scores[i] - base_a)
            p1 = exp2(scores[i + 1] - base_a)
            p2 = exp2(scores[i + 2] - base_b)
            p3 = exp2(scores[i + 3] - base_b)
            sum_a = sum_a + (p0 + p1)
            sum_b = sum_b + (p2 + p3)
            if scaled:
                scale_0, scale_1 = load2(shf, _i32(at + value_scales_at + n * 8 + t * 2))
                p0, p1, p2, p3 = p0 * scale_0, p1 * scale_1, p2 * scale_0, p3 * scale_1
            probs[n * 2] = pack_probs(p0, p1)
            probs[n * 2 + 1] = pack_probs(p2, p3)
        running[2] = fma(running[2], decay_a, sum_a)
        running[3] = fma(running[3], decay_b, sum_b)
        for n in range(own_columns * 2):
            i = n * 4
            o[i] = o[i] * decay_a
            o[i + 1] = o[i + 1] * decay_a
            o[i + 2] = o[i + 2] * decay_b
            o[i + 3] = o[i + 3] * decay_b

    return update_softmax


def _merge_split(shape: TileShape) -> Callable[..., Any]:
    own_columns, merged_at = shape.own_column_groups, shape.state_at + 8 * shape.threads

    @device_function
    def merge_row(top: Value, total: Value, m: Value, l: Value, r: Value, o: Any, merged: Any) -> Value:  # noqa: E741
        if l != _ZERO:
            top, weight, other_weight = merge_weights(top, m)
            total = merge(total, weight, l, other_weight)
            for n in range(own_columns * 2):
                i = n * 4 + r * 2
                merged[i] = merge(merged[i], weight, o[i], other_weight)
                merged[i + 1] = merge(merged[i + 1], weight, o[i + 1], other_weight)
        return top, total

    @device_function
    def merge_split(shf: Any, thread: Value, running: Any, o: Any, merged: Any) -> None:
        here = _i32(merged_at + thread * 4)
        top_a, top_b, sum_a, sum_b = load4(shf, here)
        top_a, sum_a = merge_row(top_a, sum_a, running[0], quad_sum(running[2]), 0, o, merged)
        top_b, sum_b = merge_row(top_b, sum_b, running[1], quad_sum(running[3]), 1, o, merged)
        store4(shf, here, top_a, top_b, sum_a, sum_b)
        running[0], running[1], running[2], running[3] = NEG_INF, NEG_INF, _ZERO, _ZERO
        for i in range(own_columns * 8):
            o[i] = _ZERO

    return merge_split


def _write_rows(shape: TileShape) -> Callable[..., Any]:
    scaled, head_dim, warps = shape.scaled, shape.head_dim, shape.column_warps
    column_groups, own_columns = shape.k_steps, shape.own_column_groups

    @device_function
    def write_rows(out: Pointer, to_a: Value, to_b: Value, column_warp: Value, t: Value, x: Any) -> None:
        for n in range(own_columns):
            group = _i32(column_warp + n * warps)
            if (n + 1) * warps <= column_groups or group < column_groups:
                if scaled:
                    i = n * 8
                    column = _i32(group * 16 + t * 4)
                    if to_a >= 0:
                        store4(out, _i64(to_a) * head_dim + column, x[i], x[i + 4], x[i + 1], x[i + 5])
                    if to_b >= 0:
                        store4(out, _i64(to_b) * head_dim + column, x[i + 2], x[i + 6], x[i + 3], x[i + 7])
                else:
                    for half in range(2):
                        i = n * 8 + half * 4
                        column = _i32(group * 16 + half * 8 + t * 2)
                        if head_dim % 16 == 0 or column < head_dim:
                            if to_a >= 0:
                                store2(out, _i64(to_a) * head_dim + column, x[i], x[i + 1])
                            if to_b >= 0:
                                store2(out, _i64(to_b) * head_dim + column, x[i + 2], x[i + 3])

    return write_rows
