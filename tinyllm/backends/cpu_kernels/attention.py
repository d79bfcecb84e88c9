"""Causal attention of ragged queries over a paged cache, with an online softmax (FlashAttention, arXiv:2205.14135).

A layer's cache, for NB blocks of BS slots, KH heads and head dimension D (V's rows are padded to D', a multiple of 16):

    K  (NB, KH, BS / 16, D, 16): tiles of sixteen keys, transposed: one load brings element d of sixteen keys
    V  (NB, KH, BS, D'): one load brings sixteen elements of a value

bfloat16 lies in pairs where a matrix unit multiplies it (`attention_amx.py`).

int8 has a float32 scale for each key and value of a head, which lies inside the block. Four bytes
that are multiplied together lie side by side (`attention_int8.py`); D is rounded up to a multiple of 4:

    K  (NB, KH, BS / 16)   a tile | D / 4 x 16 x 4 bytes       | 16 float32 |   one load: four elements of sixteen keys
    V  (NB, KH)           a block | BS / 4 x D' x 4 bytes         | BS float32 |   sixteen elements of four values

The keys of a query at position p, from lowest(p) to p, are cut at absolute positions:

    part:   256 keys (a split), with its own maximum m, sum l and accumulator acc; merged in ascending order at its end
    tile:    64 keys, whose scores are exponentiated together and then multiplied with V key by key

Where a sequence streams (StreamingLLM, arXiv:2309.17453; here 4 sinks, window 8) a part before all others holds the
sinks, which see the query as rotated for them, sink_q:

    key     0 1 2 3 4 5 6 7 8 9 ...
    p = 11  q q q q q q q q q q q q                 lowest(p) = 0 while sinks and window hold all keys: p < 12
    p = 12  s s s s . q q q q q q q q               s: sink_q, part 0
    p = 13  s s s s . . q q q q q q q q             .: never read; its block may be another's by now

Other keys are never multiplied, and tiles without any key of a row leave that row as it is. So the order of a row's
arithmetic depends on p, sinks and window alone; rows are computed side by side only to share loads. A long decode runs
one part per task and merges afterwards, with the same operations in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from tinyllm.backends.base import SPLIT_KEYS
from tinyllm.backends.cpu_kernels.attention_amx import AMX_ROWS, amx_attention
from tinyllm.backends.cpu_kernels.attention_int8 import int8_tiles
from tinyllm.backends.cpu_kernels.attention_mask import lowest_key, seen
from tinyllm.backends.cpu_kernels.attention_tiles import ITEM_NBYTES, ROW_TILE, attention_tiles, staged_tiles
from tinyllm.backends.cpu_kernels.jit import Kernel, device
from tinyllm.backends.cpu_kernels.online_softmax import TILE_KEYS, exponentiate, find_maximum, start_row
from tinyllm.backends.cpu_kernels.simd import (
    copy_floats,
    fma,
    lane_sum,
    load,
    load_f32,
    load_i32,
    load_i64,
    scatter_floats,
    splat,
    store,
    store_f32,
    store_first,
    zeros,
)
from tinyllm.backends.cpu_kernels.vmath import exp_scalar

__all__ = ["NO_WINDOW", "AttentionKernels", "attention_kernels", "partial_nbytes", "query_tile", "scratch_nbytes"]

NO_WINDOW = 1 << 40  # of a layer without a window: more than any sequence's
_KEYS_AHEAD = 32  # so many keys before they are needed, memory is asked for them: blocks lie anywhere
_QUERY_ROWS = 64  # rows (tokens x heads of one KV head) of a task, about


def query_tile(heads_per_kv_head: int) -> int:
    """Tokens that one task covers."""
    return max(1, _QUERY_ROWS // heads_per_kv_head)


def _padded_rows(heads_per_kv_head: int) -> int:
    rows = query_tile(heads_per_kv_head) * heads_per_kv_head
    return -(-rows // AMX_ROWS) * AMX_ROWS


def scratch_nbytes(heads_per_kv_head: int, head_dim: int) -> int:
    """Bytes that a worker needs, as `scratch_parts` divides them."""
    padded = -(-head_dim // 16) * 16
    per_row = 128 + 4 * (TILE_KEYS + 2 * padded) + 4 * padded + 16
    tiles = 4 * TILE_KEYS * (head_dim + padded)
    return -(-(_padded_rows(heads_per_kv_head) * per_row + tiles) // 64) * 64


def partial_nbytes(heads_per_kv_head: int, head_dim: int) -> int:
    """Bytes of one task's partial result: m, l and acc of each head."""
    return heads_per_kv_head * 4 * (2 + -(-head_dim // 16) * 16)


@device
def _scratch_parts(scratch: int, heads: int, head_dim: int) -> tuple[int, int, int, int, int, int]:
    """Addresses in a worker's scratch: states, scores (rows, 64), acc and merged acc (rows, D'), q by tiles of rows,
    (D, ROW_TILE) each, a tile of keys (4, D, 16) and values (64, D').

    A state is 128 bytes: m, 4 bytes unused, the merged m and l, and at byte 64 the sixteen lanes whose sum is l.
    """
    rows = (max(1, _QUERY_ROWS // heads) * heads + AMX_ROWS - 1) // AMX_ROWS * AMX_ROWS
    padded = (head_dim + 15) // 16 * 16
    scores = scratch + 128 * rows
    accs = scores + 4 * TILE_KEYS * rows
    total_accs = accs + 4 * padded * rows
    q = total_accs + 4 * padded * rows
    return scratch, scores, accs, total_accs, q, q + (4 * padded + 16) * rows


@device
def _start_totals(state: int, total_acc: int, padded: int) -> None:
    store_f32(state + 8, -math.inf)
    store_f32(state + 12, 0.0)
    for d in range(0, padded, 16):
        store(total_acc + 4 * d, zeros())


@device
def _merge(m: float, l: float, acc: int, padded: int, totals: int, total_acc: int) -> None:  # noqa: E741
    """Merges a part into totals (m, l) and total_acc (arXiv:1805.02867)."""
    if m == -math.inf:
        return
    old_m = load_f32(totals)
    if old_m == -math.inf:  # as below, with weights 0 and 1
        store_f32(totals, m)
        store_f32(totals + 4, l)
        for d in range(0, padded, 16):
            store(total_acc + 4 * d, load(acc + 4 * d) + zeros())
        return
    new_m = max(old_m, m)
    keep, weight = exp_scalar(old_m - new_m), exp_scalar(m - new_m)
    store_f32(totals, new_m)
    store_f32(totals + 4, load_f32(totals + 4) * keep + l * weight)
    for d in range(0, padded, 16):
        store(total_acc + 4 * d, fma(load(acc + 4 * d), splat(weight), load(total_acc + 4 * d) * splat(keep)))


@device
def _mask_of(s: int, window: int, streams: int) -> tuple[int, int]:
    """The window and the sinks of sequence s in a layer of that window."""
    if streams != 0:
        windows, num_sinks = load_i64(streams), load_i64(streams + 8)
        if load_i32(windows + 4 * s) < window:
            return load_i32(windows + 4 * s), load_i32(num_sinks + 4 * s)
    return window, 0


@device
def _finish(totals: int, total_acc: int, head_dim: int, out: int, lse: int) -> None:
    m, l = load_f32(totals), load_f32(totals + 4)  # noqa: E741
    for d in range(0, head_dim, 16):
        store_first(out + 4 * d, load(total_acc + 4 * d) / splat(l), head_dim - d)
    store_f32(lse, m + math.log(l))


@dataclass(frozen=True)
class AttentionKernels:
    """The kernels of one kind of cache.

    attention: a task is a tile of queries of one KV head, or where `results` is not 0 one of the `parts` of one
    decode query and KV head. combine: a task is one decode query and KV head, whose partial results it merges.
    Part 0 holds the sinks, part 1 + i the query's i-th split. `streams`, where a sequence streams and else 0, is the
    address of five int64: the addresses of windows, num_sinks (int32) and sink_q, and sink_q's strides.
    """

    attention: Kernel
    combine: Kernel


@dataclass(frozen=True)
class _Form:
    """How a cache's kind is attended to.

    begin(rows, heads, head_dim, scratch), end(): around a task's parts.
    put_query(source, head_dim, q, row): a query as row `row` of those in scratch.
    attend_part(first_key, end_key, rows, heads, position, window, sinks, scale, cap, head_dim, k, v, k_block_stride,
        v_block_stride, table, block_size, scratch): one part for rows whose q lies in scratch; row r is at position +
        r // heads. Leaves m, l, acc there.
    """

    begin: Callable[[int, int, int, int], None]
    end: Callable[[], None]
    put_query: Callable[[int, int, int, int], None]
    attend_part: Callable[..., None]


def _form_on_amx() -> _Form:
    amx = amx_attention()
    begin_tiles, attend = amx.begin, amx.attend_part

    @device
    def begin(rows: int, heads: int, head_dim: int, scratch: int) -> None:
        _, _, _, _, _, staged = _scratch_parts(scratch, heads, head_dim)
        begin_tiles(rows, staged)

    @device
    def attend_part(
        first_key: int, end_key: int, rows: int, heads: int, position: int, window: int, sinks: int, scale: float,
        cap: float, head_dim: int, k: int, v: int, k_block_stride: int, v_block_stride: int, table: int,
        block_size: int, scratch: int,
    ) -> None:  # fmt: skip
        states, scores, accs, _, q, staged = _scratch_parts(scratch, heads, head_dim)
        attend(
            first_key, end_key, rows, heads, position, window, sinks, scale, cap, head_dim, k, v, k_block_stride,
            v_block_stride, table, block_size, states, scores, accs, q, staged,
        )  # fmt: skip

    return _Form(begin, amx.end, amx.quantise_query, attend_part)


def _form_of(dtype: str) -> _Form:
    if dtype == "bf16x2":
        return _form_on_amx()
    is_int8 = dtype == "int8"
    int8, tiles = int8_tiles(), attention_tiles("f32" if is_int8 else dtype)
    fetch = int8.fetch if is_int8 else tiles.fetch
    scores_of, accumulate, stage = int8.scores if is_int8 else tiles.scores, tiles.values, tiles.stage
    quantise_query, weigh, int8_values = int8.quantise_query, int8.weigh, int8.values
    staged = staged_tiles()
    staged_scores_of, staged_accumulate = staged.scores, staged.values

    @device
    def add_values(
        is_staged: bool, rows: int, probs: int, first: int, end: int, v: int, v_block_stride: int, table: int,
        block_size: int, tile_values: int, acc: int, padded: int,
    ) -> None:  # fmt: skip
        """acc += probs[j] * V[j] for keys first <= j < end of a tile, ascending, for each of the rows."""
        if is_staged:
            staged_accumulate(rows, probs, first, end, tile_values, acc, padded)
        else:
            accumulate(rows, probs, first, end, v, v_block_stride, table, block_size, acc, padded)

    @device
    def attend_part(
        first_key: int, end_key: int, rows: int, heads: int, position: int, window: int, sinks: int, scale: float,
        cap: float, head_dim: int, k: int, v: int, k_block_stride: int, v_block_stride: int, table: int,
        block_size: int, scratch: int,
    ) -> None:  # fmt: skip
        padded = (head_dim + 15) // 16 * 16
        states, all_scores, accs, _, q, tile_keys = _scratch_parts(scratch, heads, head_dim)
        tile_values = tile_keys + 4 * TILE_KEYS * head_dim
        is_staged = rows > ROW_TILE and not is_int8  # several tiles of rows meet each tile of keys
        query_nbytes = 3 * padded + 16 if is_int8 else 4 * head_dim
        for r in range(rows):
            start_row(states + 128 * r)
            for d in range(0, padded, 16):
                store(accs + 4 * (r * padded + d), zeros())
        start = max(first_key, lowest_key(position, window, sinks))
        stop = min(end_key, position + (rows - 1) // heads + 1)
        for tile in range(start // TILE_KEYS * TILE_KEYS, stop, TILE_KEYS):
            end_of_tile = min(tile + TILE_KEYS, end_key)
            if is_staged:
                stage(
                    max(tile, start), min(end_of_tile, stop), k, v, k_block_stride, v_block_stride, table, block_size,
                    head_dim, tile_keys, tile_values,
                )  # fmt: skip
            first_values = tile_values - 4 * tile * padded
            # all scores before all values: a tile of K, then of V, stays in the first cache
            for r0 in range(0, rows, ROW_TILE):
                n = min(ROW_TILE, rows - r0)
                lowest_position, highest_position = position + r0 // heads, position + (r0 + n - 1) // heads
                first = max(tile, lowest_key(lowest_position, window, sinks))
                end = min(end_of_tile, highest_position + 1)
                row_scores, key = all_scores + 4 * r0 * TILE_KEYS, first // 16 * 16
                q_rows = q + r0 * query_nbytes
                while key < end:
                    place = row_scores + 4 * (key - tile)
                    if is_staged:
                        key = staged_scores_of(n, key, end, q_rows, tile_keys, head_dim, place)
                    else:
                        if r0 == 0:
                            for ahead in range(key + _KEYS_AHEAD, min(key + _KEYS_AHEAD + 32, stop), 16):
                                fetch(ahead, k, v, k_block_stride, v_block_stride, table, block_size, head_dim)
                        key = scores_of(n, key, end, q_rows, k, k_block_stride, table, block_size, head_dim, place)
                for r in range(r0, r0 + n):
                    row_first, row_end = seen(position + r // heads, tile, end_of_tile, window, sinks)
                    if row_first < row_end:
                        find_maximum(
                            all_scores + 4 * r * TILE_KEYS, tile, row_first, row_end, scale, cap, states + 128 * r,
                            accs + 4 * r * padded, padded,
                        )  # fmt: skip
                for r in range(r0, r0 + n):
                    row_first, row_end = seen(position + r // heads, tile, end_of_tile, window, sinks)
                    if row_first < row_end:
                        exponentiate(all_scores + 4 * r * TILE_KEYS, states + 128 * r)
            for r0 in range(0, rows, ROW_TILE):
                n = min(ROW_TILE, rows - r0)
                lowest_position, highest_position = position + r0 // heads, position + (r0 + n - 1) // heads
                first = max(tile, lowest_key(lowest_position, window, sinks))
                end = min(end_of_tile, highest_position + 1)
                acc = accs + 4 * r0 * padded
                if is_int8:
                    int8_probs = all_scores + 4 * r0 * TILE_KEYS
                    for r in range(n):
                        row_first, row_end = seen(position + (r0 + r) // heads, tile, end_of_tile, window, sinks)
                        row = int8_probs + 4 * r * TILE_KEYS
                        weigh(row, tile, row_first, row_end, v, v_block_stride, table, block_size, padded)
                    int8_values(
                        n, int8_probs, tile, first, end, v, v_block_stride, table, block_size, acc, padded
                    )  # fmt: skip
                    continue
                probs = all_scores + 4 * (r0 * TILE_KEYS - tile)
                # keys that all of the rows see: the others' probabilities must not meet V, which may be NaN
                shared_first = max(first, lowest_key(highest_position, window, sinks))
                shared_end = min(end, lowest_position + 1)
                if n == 1 or shared_first >= shared_end:
                    shared_first = shared_end = end
                for r in range(n):
                    row_first, row_end = seen(position + (r0 + r) // heads, tile, end_of_tile, window, sinks)
                    before = min(row_end, shared_first)
                    if row_first < before:
                        add_values(
                            is_staged, 1, probs + 4 * r * TILE_KEYS, row_first, before, v, v_block_stride, table,
                            block_size, first_values, acc + 4 * r * padded, padded,
                        )  # fmt: skip
                if shared_first < shared_end:
                    add_values(
                        is_staged, n, probs, shared_first, shared_end, v, v_block_stride, table, block_size,
                        first_values, acc, padded,
                    )  # fmt: skip
                    for r in range(n):
                        _, row_end = seen(position + (r0 + r) // heads, tile, end_of_tile, window, sinks)
                        if shared_end < row_end:
                            add_values(
                                is_staged, 1, probs + 4 * r * TILE_KEYS, shared_end, row_end, v, v_block_stride, table,
                                block_size, first_values, acc + 4 * r * padded, padded,
                            )  # fmt: skip

    @device
    def put_query(source: int, head_dim: int, q: int, row: int) -> None:
        if is_int8:
            tile_q = q + row // ROW_TILE * ROW_TILE * (3 * ((head_dim + 15) // 16 * 16) + 16)
            quantise_query(source, head_dim, tile_q, row % ROW_TILE)
        else:
            place = q + 4 * (row // ROW_TILE * ROW_TILE * head_dim + row % ROW_TILE)
            scatter_floats(source, place, head_dim, 4 * ROW_TILE)

    @device
    def begin(rows: int, heads: int, head_dim: int, scratch: int) -> None:
        pass

    @device
    def end() -> None:
        pass

    return _Form(begin, end, put_query, attend_part)


@cache
def attention_kernels(storage: str) -> AttentionKernels:
    """storage: a layer's."""
    form, is_int8, item = _form_of(storage), storage == "int8", ITEM_NBYTES.get(storage.removesuffix("x2"), 1)
    begin_parts, end_parts, put_query, attend_part = form.begin, form.end, form.put_query, form.attend_part

    def attention(
        worker: int, begin: int, end: int, q: int, q_stride: int, q_head_stride: int, heads: int, kv_heads: int,
        head_dim: int, k: int, v: int, block_size: int, cu_seqlens_q: int, seq_lens: int, sequences: int, tables: int,
        table_stride: int, streams: int, tile_tokens: int, parts: int, results: int, scale: float, layer_window: int,
        cap: float, out: int, out_stride: int, lse: int, scratch: int, scratch_stride: int,
    ) -> None:  # fmt: skip
        padded = (head_dim + 15) // 16 * 16
        k_head_stride, v_head_stride = block_size * head_dim * item, block_size * padded * item
        if is_int8:
            k_head_stride, v_head_stride = block_size * ((head_dim + 3) // 4 * 4 + 4), block_size * (padded + 4)
        states, _, accs, total_accs, scratch_q, _ = _scratch_parts(scratch + worker * scratch_stride, heads, head_dim)
        tiles = (load_i32(cu_seqlens_q + 4 * sequences) - sequences) // tile_tokens + sequences
        for task in range(begin, end):
            # one head after another: its keys and values stay in a core's own cache from tile to tile
            h, tile, only_part = task // parts // tiles, task // parts % tiles, task % parts
            # sequence s has the tiles from (cu_seqlens_q[s] - s) // tile_tokens + s: enough, sometimes one to spare
            s, above = 0, sequences
            while above - s > 1:
                middle = (s + above) // 2
                if (load_i32(cu_seqlens_q + 4 * middle) - middle) // tile_tokens + middle <= tile:
                    s = middle
                else:
                    above = middle
            first_query, end_query = load_i32(cu_seqlens_q + 4 * s), load_i32(cu_seqlens_q + 4 * (s + 1))
            first = first_query + (tile - ((first_query - s) // tile_tokens + s)) * tile_tokens
            tokens = min(tile_tokens, end_query - first)
            position = load_i32(seq_lens + 4 * s) - (end_query - first)
            window, sinks = _mask_of(s, layer_window, streams)
            first_split = lowest_key(position, window, sinks) // SPLIT_KEYS
            # the tokens of the tile before the first that sees the sinks by themselves
            early = max(0, min(tokens, sinks + window - position)) if sinks > 0 else tokens
            first_part = 0 if early < tokens else 1
            end_part = (position + tokens - 1) // SPLIT_KEYS - first_split + 2
            if results != 0:
                first_part, end_part = max(first_part, only_part), min(end_part, only_part + 1)
            if tokens <= 0 or first_part >= end_part:
                continue
            for r in range(tokens * heads):
                _start_totals(states + 128 * r, total_accs + 4 * r * padded, padded)
            begin_parts(tokens * heads, heads, head_dim, scratch + worker * scratch_stride)
            for part in range(first_part, end_part):
                skipped, source, source_stride, source_head_stride = 0, q, q_stride, q_head_stride
                first_key = (first_split + part - 1) * SPLIT_KEYS
                end_key, part_window, part_sinks = first_key + SPLIT_KEYS, window, sinks
                if part == 0:
                    skipped, source = early, load_i64(streams + 16)
                    source_stride, source_head_stride = load_i64(streams + 24), load_i64(streams + 32)
                    first_key, end_key, part_window, part_sinks = 0, sinks, NO_WINDOW, 0
                rows = (tokens - skipped) * heads
                if part <= 1 or part == first_part:
                    for r in range(rows):
                        t, head = first + skipped + r // heads, h * heads + r % heads
                        row_q = source + t * source_stride + head * source_head_stride
                        put_query(row_q, head_dim, scratch_q, r)
                attend_part(
                    first_key, end_key, rows, heads, position + skipped, part_window, part_sinks, scale, cap, head_dim,
                    k + h * k_head_stride, v + h * v_head_stride, kv_heads * k_head_stride, kv_heads * v_head_stride,
                    tables + s * table_stride, block_size, scratch + worker * scratch_stride,
                )  # fmt: skip
                for r in range(rows):
                    state, acc = states + 128 * r, accs + 4 * r * padded
                    m, l = load_f32(state), lane_sum(load(state + 64))  # noqa: E741
                    if results != 0:
                        slot = (tile * kv_heads + h) * parts + only_part
                        result = results + (slot * heads + r) * 4 * (2 + padded)
                        store_f32(result, m)
                        store_f32(result + 4, l)
                        copy_floats(acc, result + 8, padded)
                    else:
                        r_total = skipped * heads + r
                        _merge(m, l, acc, padded, states + 128 * r_total + 8, total_accs + 4 * r_total * padded)
            end_parts()
            if results == 0:
                for r in range(tokens * heads):
                    t, head = first + r // heads, h * heads + r % heads
                    row_out = out + t * out_stride + 4 * head * head_dim
                    row_lse = lse + 4 * (t * kv_heads * heads + head)
                    _finish(states + 128 * r + 8, total_accs + 4 * r * padded, head_dim, row_out, row_lse)

    def combine(
        worker: int, begin: int, end: int, heads: int, kv_heads: int, head_dim: int, seq_lens: int, streams: int,
        parts: int, layer_window: int, results: int, out: int, out_stride: int, lse: int, scratch: int,
        scratch_stride: int,
    ) -> None:  # fmt: skip
        padded = (head_dim + 15) // 16 * 16
        states, _, _, total_acc, _, _ = _scratch_parts(scratch + worker * scratch_stride, heads, head_dim)
        for task in range(begin, end):
            s, h = task // kv_heads, task % kv_heads
            position = load_i32(seq_lens + 4 * s) - 1
            window, sinks = _mask_of(s, layer_window, streams)
            first_part = 0 if sinks > 0 and position >= sinks + window else 1
            end_part = position // SPLIT_KEYS - lowest_key(position, window, sinks) // SPLIT_KEYS + 2
            for r in range(heads):
                _start_totals(states, total_acc, padded)
                for part in range(first_part, end_part):
                    result = results + ((task * parts + part) * heads + r) * 4 * (2 + padded)
                    _merge(load_f32(result), load_f32(result + 4), result + 8, padded, states + 8, total_acc)
                head = h * heads + r
                row_lse = lse + 4 * (s * kv_heads * heads + head)
                _finish(states + 8, total_acc, head_dim, out + s * out_stride + 4 * head * head_dim, row_lse)

    return AttentionKernels(
        Kernel(f"attention.attention-{storage}", attention),
        Kernel(f"attention.combine-{storage}", combine),
    )
