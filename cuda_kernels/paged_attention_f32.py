"""Attention over a float32 paged cache, on the ordinary float32 units: a prefill and a decode form with the same bits.

A thread block takes one KV head and 16, 32 or 64 rows of a sequence: row r is query r // G under query head r % G of
the G heads that share the KV head, so that a key that is loaded once serves them all. It walks over tiles of 32 keys
(16 for head sizes past 128) at fixed absolute positions:

             0        32       64  ...  224      256
    rows   | tile 0 | tile 1 | tile 2 ... tile 7 | tile 8 ...          S = Q K^T, online softmax, O += P V per tile
           |<-------- one split: (m, l, O) ----->|<---- next split     merged in ascending order

K and V take turns: while scores are computed the tile's values are on their way (cp.async), and while those are added
the next tile's keys are. Every SPLIT_KEYS keys a row's partial result is complete, see online_softmax. The prefill form
merges it into the running result; the decode form gives each split a thread block of its own and leaves the partials to
attention_partials, which merges with the same function in the same order. attention_f32_tiles tells what a row's bits
depend on inside a tile: nothing but the keys that it sees.

Limits: head sizes up to 256, multiples of 4; block sizes are powers of two. Sources: FlashAttention-2
(arXiv:2307.08691), Flash-Decoding's split over keys, PagedAttention (arXiv:2309.06180), attention sinks
(arXiv:2309.17453).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cuda_kernels.attention_f32_tiles import DECODE_ROWS, THREADS, TileShape, tile_functions
from cuda_kernels.attention_inputs import SPLIT_KEYS, AttentionInputs
from cuda_kernels.attention_partials import combine_partials, decode_query_limit, partial_layout
from cuda_kernels.kernel import Kernel
from cuda_kernels.launch import Runtime, require
from cuda_kernels.online_softmax import (
    LOG2_E,
    NEG_INF,
    final_lse,
    final_scale,
    lowest_key,
    merge,
    merge_weights,
    window_and_sinks,
)
from cuda_kernels.primitives import (
    Pointer,
    Value,
    cp_async_commit,
    cp_async_wait,
    device_function,
    store2,
    store4,
)
from cuda_kernels.special_functions import tanh

__all__ = ["attention_f32_kernel", "kernels_for_report", "paged_attention_f32", "shared_nbytes_of"]

_MAX_HEAD_DIM = 256
_SPLIT_SHIFT = SPLIT_KEYS.bit_length() - 1
_ZERO = np.float32(0)
_i32, _u32, _i64 = types.int32, types.uint32, types.int64


@device_function
def _quotient(a: Value, b: Value) -> Value:
    """a // b of integers that are not negative; signed division would be done in 64 bits."""
    return _i32(_u32(a) // _u32(b))


@device_function
def _first_key(position: Value, window: Value, sinks: Value) -> Value:
    """lowest_key also for the negative positions of padding."""
    return lowest_key(max(position, _i32(0)), window, sinks)


def _build_attention(*, head_dim: int, decode: bool, softcap: bool, streams: bool) -> Callable[..., None]:
    tile = TileShape(head_dim, decode)
    functions = tile_functions(tile)
    copy_row, copy_keys, find_blocks = functions.copy_row, functions.copy_keys, functions.find_blocks
    multiply_keys, update_softmax, add_values = (
        functions.multiply_keys,
        functions.update_softmax,
        functions.add_values,
    )
    rows, keys, pitch, k_at, v_at = tile.rows, tile.keys, tile.pitch, tile.k_at, tile.v_at
    own_rows, own_keys, own_loads, own_chunks = tile.own_rows, tile.own_keys, tile.own_loads, tile.own_chunks
    chunks = tile.chunks
    whole_chunks = chunks // 8  # of own_chunks, those that every thread has

    def attention(
        q: Pointer,
        sink_q: Pointer,
        k: Pointer,
        v: Pointer,
        cu_seqlens_q: Pointer,
        seq_lens: Pointer,
        block_tables: Pointer,
        windows: Pointer,
        num_sinks: Pointer,
        out: Pointer,  # the partials' acc in decode form
        lse: Pointer,  # the partials' stats in decode form
        q_stride: Value,
        q_head_stride: Value,
        sink_stride: Value,
        sink_head_stride: Value,
        table_stride: Value,
        block_shift: Value,
        group_size: Value,
        num_kv_heads: Value,
        window: Value,
        query_limit: Value,  # sequences with more queries are the prefill form's, the others the decode form's
        num_slots: Value,
        score_scale: Value,
        cap: Value,
    ) -> None:
        thread = (_i32(cuda.threadIdx.x & 7), _i32(cuda.threadIdx.x >> 3))
        tx, ty = thread
        sequence = _i32(cuda.blockIdx.z)
        if decode:
            row_tile = _quotient(cuda.blockIdx.y, num_kv_heads)
            kv_head = _i32(cuda.blockIdx.y - row_tile * num_kv_heads)
        else:
            row_tile = _i32(cuda.gridDim.x - 1 - cuda.blockIdx.x)  # the longest rows first
            kv_head = _i32(cuda.blockIdx.y)
        heads = (num_kv_heads, kv_head)
        first_row = _i32(row_tile * rows)
        first_token = cu_seqlens_q[sequence]
        count = _i32(cu_seqlens_q[sequence + 1] - first_token)
        num_rows = _i32(count * group_size)
        if first_row >= num_rows or (count > query_limit) == decode:
            return
        context = _i32(seq_lens[sequence] - count)  # negative for padding: its rows see nothing
        first_position = _i32(context + _quotient(first_row, group_size))
        last_position = _i32(context + _quotient(min(_i32(first_row + rows), num_rows) - 1, group_size))
        sinks = _i32(0)
        if streams:
            window, sinks = window_and_sinks(windows, num_sinks, sequence, window)

        # first the sinks where some row sees them apart, then the window; in decode form one or the other
        on_sinks = streams and sinks > 0 and _first_key(last_position, window, sinks) > 0
        split_low, split_high = _i32(0), _i32(0x7FFFFFFF)
        slot = _i32(0)
        if decode:
            slot = _i32(cuda.blockIdx.x)
            split = _i32((_first_key(context, window, sinks) >> _SPLIT_SHIFT) + slot)
            if streams:
                if slot == 0 and not on_sinks:
                    return
                on_sinks = slot == 0
                split = _i32(0) if on_sinks else _i32(split - 1)
            split_low = _i32(split * SPLIT_KEYS)
            split_high = _i32(split_low + (SPLIT_KEYS - 1))
            seen = split_low <= last_position and split_high >= _first_key(first_position, window, sinks)
            if not seen and not on_sinks:
                return

        sh = cuda.shared.array(0, types.float32)
        s = cuda.local.array((own_rows, own_keys), types.float32)
        o = cuda.local.array((own_rows, own_chunks, 4), types.float32)
        m = cuda.local.array(own_rows, types.float32)
        l = cuda.local.array(own_rows, types.float32)  # noqa: E741 - the papers' name
        merged = cuda.local.array((own_rows, own_chunks, 4), types.float32)
        top = cuda.local.array(own_rows, types.float32)
        total = cuda.local.array(own_rows, types.float32)
        low = cuda.local.array(own_rows, types.int32)  # the keys that each row sees
        high = cuda.local.array(own_rows, types.int32)
        blocks = cuda.local.array(own_loads, types.int32)
        for i in range(own_rows):
            m[i], l[i], top[i], total[i] = NEG_INF, _ZERO, NEG_INF, _ZERO
            for j in range(own_chunks):
                for e in range(4):
                    o[i, j, e] = _ZERO
                    merged[i, j, e] = _ZERO

        table_at = _i64(sequence) * table_stride
        more = True
        while more:
            for i in range(own_rows):
                row = _i32(first_row + ty + 16 * i)
                to = _i32((ty + 16 * i) * pitch)
                low[i], high[i] = _i32(0), _i32(-1)
                if row >= num_rows:
                    copy_row(sh, to, tx, q, _i64(0), _i32(0))
                else:
                    query = _quotient(row, group_size)
                    token = _i64(first_token + query)
                    head = _i32(kv_head * group_size + (row - query * group_size))
                    lowest = _first_key(_i32(context + query), window, sinks)
                    if on_sinks:
                        copy_row(sh, to, tx, sink_q, token * sink_stride + head * sink_head_stride, _i32(16))
                        if lowest > 0:
                            high[i] = _i32(sinks - 1)
                    else:
                        copy_row(sh, to, tx, q, token * q_stride + head * q_head_stride, _i32(16))
                        low[i], high[i] = lowest, _i32(context + query)
            at_low, at_high = _first_key(first_position, window, sinks), last_position  # seen by some row
            full_low, full_high = _first_key(last_position, window, sinks), first_position  # seen by every row
            if on_sinks:
                full_high = _i32(sinks - 1) if at_low > 0 else _i32(-1)
                at_low, at_high, full_low = _i32(0), _i32(sinks - 1), _i32(0)
            at_low, at_high = max(at_low, split_low), min(at_high, split_high)

            first_key = _i32(at_low & -keys)
            find_blocks(blocks, block_tables, table_at, _i32(first_key + ty), at_low, at_high, block_shift)
            copy_keys(sh, k_at, pitch, thread, k, blocks, first_key, heads, block_shift)
            cp_async_commit()
            while first_key <= at_high:
                copy_keys(sh, v_at, head_dim, thread, v, blocks, first_key, heads, block_shift)
                cp_async_commit()
                next_key = _i32(first_key + keys)
                find_blocks(blocks, block_tables, table_at, _i32(next_key + ty), at_low, at_high, block_shift)
                cp_async_wait(1)
                cuda.syncthreads()  # K has arrived
                multiply_keys(sh, thread, s)
                cuda.syncthreads()  # and is no longer needed
                if next_key <= at_high:
                    copy_keys(sh, k_at, pitch, thread, k, blocks, next_key, heads, block_shift)
                cp_async_commit()
                full = first_key >= full_low and next_key - 1 <= full_high
                for i in range(own_rows):
                    for j in range(own_keys):
                        s[i, j] = s[i, j] * score_scale
                        if softcap:
                            s[i, j] = cap * tanh(s[i, j])
                        if not full:
                            key = _i32(first_key + tx + 8 * j)
                            if key < low[i] or key > high[i]:
                                s[i, j] = NEG_INF
                update_softmax(sh, thread, s, m, l, o)
                cp_async_wait(1)
                cuda.syncthreads()  # V has arrived, and P is written
                if full:
                    add_values(sh, thread, o, first_key, None, None)
                else:
                    add_values(sh, thread, o, first_key, low, high)
                cuda.syncthreads()  # and is no longer needed
                first_key = next_key
                if not decode and ((first_key & (SPLIT_KEYS - 1)) == 0 or first_key > at_high):
                    for i in range(own_rows):
                        if l[i] != _ZERO:
                            top[i], weight, other_weight = merge_weights(top[i], m[i])
                            total[i] = merge(total[i], weight, l[i], other_weight)
                            for j in range(own_chunks):
                                for e in range(4):
                                    merged[i, j, e] = merge(merged[i, j, e], weight, o[i, j, e], other_weight)
                        m[i], l[i] = NEG_INF, _ZERO
                        for j in range(own_chunks):
                            for e in range(4):
                                o[i, j, e] = _ZERO
            cp_async_wait(0)
            more = on_sinks and not decode
            on_sinks = False

        for i in range(own_rows):
            row = _i32(first_row + ty + 16 * i)
            if row < num_rows:
                query = _quotient(row, group_size)
                head = _i32(kv_head * group_size + (row - query * group_size))
                num_heads = _i32(num_kv_heads * group_size)
                if decode:
                    to_row = _i64(_i32(sequence * query_limit + query) * num_heads + head) * num_slots + slot
                    if tx == 0:
                        store2(lse, to_row * 2, m[i], l[i])
                else:
                    to_row = _i64(first_token + query) * num_heads + head
                    if tx == 0:
                        lse[to_row] = final_lse(top[i], total[i])
                scale = final_scale(total[i])
                for j in range(own_chunks):
                    if j < whole_chunks or tx < chunks - 8 * j:
                        at = to_row * head_dim + _i32(4 * tx + 32 * j)
                        if decode:
                            store4(out, at, o[i, j, 0], o[i, j, 1], o[i, j, 2], o[i, j, 3])
                        else:
                            a, b = merged[i, j, 0] * scale, merged[i, j, 1] * scale
                            store4(out, at, a, b, merged[i, j, 2] * scale, merged[i, j, 3] * scale)

    return attention


@cache
def attention_f32_kernel(head_dim: int, *, decode: bool, softcap: bool, streams: bool) -> Kernel:
    """The prefill or decode form for a head size. softcap: scores are capped. streams: sequences may have sinks."""
    form = "decode" if decode else "prefill"
    return Kernel(
        name=f"attention_{form}_f32_d{head_dim}{'_softcap' * softcap}{'_sinks' * streams}",
        build=_build_attention,
        constants=(("head_dim", head_dim), ("decode", decode), ("softcap", softcap), ("streams", streams)),
        signature=(*["f32*"] * 4, *["i32*"] * 5, *["f32*"] * 2, *["i64"] * 5, *["i32"] * 6, *["f32"] * 2),
        threads=THREADS,
        min_blocks=5 if decode and streams else 0,  # left to itself ptxas spills 8 bytes to fit a sixth
    )


def paged_attention_f32(rt: Runtime, inputs: AttentionInputs, *, query_limit: int | None = None) -> None:
    """Attention over a float32 cache; see AttentionInputs.

    Args:
        query_limit: sequences with more queries take the prefill form, the others the decode form. None:
            decode_query_limit. It does not change a bit of the results.

    Raises:
        KernelArgumentError: a cache of another dtype, a head size above 256, too little scratch memory.
    """
    layer, head_dim, group_size = inputs.layer, inputs.layer.head_dim, inputs.group_size
    require(layer.dtype == "f32", f"the float32 form of attention cannot read a {layer.dtype} cache")
    require(head_dim <= _MAX_HEAD_DIM, f"attention head size {head_dim}: {_MAX_HEAD_DIM} at most")
    if query_limit is None:
        query_limit = decode_query_limit(inputs, DECODE_ROWS)
        if inputs.num_seqs == 1 and inputs.max_query_len > query_limit:
            query_limit = 0  # one sequence, and too long: no second form is needed
    layout = partial_layout(
        num_seqs=inputs.num_seqs,
        num_queries=query_limit,
        num_heads=inputs.num_heads,
        head_dim=head_dim,
        max_seq_len=inputs.max_seq_len,
        window=inputs.window,
        streams=inputs.streams,
    )
    sink_q = inputs.q if inputs.sink_q is None else inputs.sink_q
    windows, num_sinks = (inputs.seq_lens if x is None else x for x in (inputs.windows, inputs.num_sinks))
    score_scale, cap = inputs.scale * LOG2_E, 0.0
    if inputs.softcap:
        score_scale, cap = inputs.scale / inputs.softcap, inputs.softcap * LOG2_E

    def launch(decode: bool, out: Any, lse: Any, grid: tuple[int, int, int]) -> None:
        arguments = (
            *(inputs.q, sink_q, layer.k, layer.v),
            *(inputs.cu_seqlens_q, inputs.seq_lens, inputs.block_tables, windows, num_sinks, out, lse),
            *(stride // 4 for x in (inputs.q, sink_q) for stride in x.strides[:2]),
            *(inputs.block_tables.strides[0] // 4, layer.block_size.bit_length() - 1, group_size, layer.num_kv_heads),
            *(inputs.window, query_limit, layout.num_slots, score_scale, cap),
        )
        kernel = attention_f32_kernel(head_dim, decode=decode, softcap=inputs.softcap > 0, streams=inputs.streams)
        rt.launch(kernel, grid, arguments, shared_nbytes=TileShape(head_dim, decode).shared_nbytes)

    if inputs.max_query_len > query_limit:
        row_tiles = -(-inputs.max_query_len * group_size // TileShape(head_dim, False).rows)
        launch(False, inputs.out, inputs.lse, (row_tiles, layer.num_kv_heads, inputs.num_seqs))
    if query_limit > 0:
        row_tiles = -(-query_limit * group_size // DECODE_ROWS)
        acc, stats = layout.views(inputs.scratch)
        launch(True, acc, stats, (layout.num_slots, row_tiles * layer.num_kv_heads, inputs.num_seqs))
        combine_partials(rt, inputs, layout)


def shared_nbytes_of(kernel: Kernel) -> int:
    """Dynamic shared memory of one of the kernels here."""
    constants = dict(kernel.constants)
    return TileShape(constants["head_dim"], constants["decode"]).shared_nbytes  # type: ignore[arg-type]


def kernels_for_report() -> list[Kernel]:
    """Both forms for the usual head sizes, and each variant once."""
    plain = [
        attention_f32_kernel(head_dim, decode=decode, softcap=False, streams=False)
        for head_dim in (64, 80, 96, 128, 256)
        for decode in (False, True)
    ]
    variants = ((True, False), (False, True), (True, True))
    return plain + [
        attention_f32_kernel(128, decode=decode, softcap=softcap, streams=streams)
        for softcap, streams in variants
        for decode in (False, True)
    ]
