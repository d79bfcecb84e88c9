"""Attention over the paged cache on tensor cores: FlashAttention-2 tiles, split at fixed positions.

A block works on 16, 32 or 64 rows of one KV head: rows are (query, head of the group) pairs, row r being query r // G
under head r % G of the G query heads that share the KV head, so that each key is loaded once for all of them.

              keys: tiles of 64 (32 for head sizes past 128), at fixed absolute positions
             0        64       128      192     256
    rows   | tile 0 | tile 1 | tile 2 | tile 3 | tile 4 ...        S = Q K^T, online softmax, O += P V per tile
           |<------- one split: (m, l, O) ----->|<---- next split  merged in ascending order

Each split of SPLIT_KEYS keys starts from scratch. The prefill form walks through the splits that its rows see and
merges as it goes; the decode form gives each split a block of its own, which leaves its partial in scratch memory for
`attention_partials`, which merges with the same function. Tile and merge are the same code, and a tile or split in
which a row sees nothing leaves its numbers as they were, bit for bit: so a row's result does not depend on the form,
the chunking, its neighbours, or where in a tile it lies.

Keys arrive by cp.async into one of two stages while the other is used, one barrier for each tile (two where warps share
rows). Scores are kept in base 2: q is multiplied by scale * log2(e) before it is rounded to 16 bits. P is rounded to
16 bits, its sum l is not.

Limits: head sizes in multiples of 8 (16 for 8-bit caches) up to 256; scale * log2(e) * q must fit float16, except for
bf16 caches; block sizes are powers of two. A value (not a key) that is infinite or NaN spreads to rows of its own
sequence up to a tile before it: a weight of zero does not silence it.

Sources: FlashAttention-2 (arXiv:2307.08691), Flash-Decoding's split over keys, PagedAttention (arXiv:2309.06180).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numba import cuda
from numba.cuda import types

from cuda_kernels.attention_inputs import SPLIT_KEYS, AttentionInputs
from cuda_kernels.attention_partials import combine_kernel, combine_partials, decode_query_limit, partial_layout
from cuda_kernels.attention_steps import quad_sum, step_functions
from cuda_kernels.attention_tiles import STORAGES, TileShape, tile_functions
from cuda_kernels.kernel import Kernel
from cuda_kernels.launch import Array, Runtime, require
from cuda_kernels.online_softmax import LOG2_E, NEG_INF, final_lse, final_scale, lowest_key, window_and_sinks
from cuda_kernels.primitives import Pointer, Value, cp_async_commit, cp_async_wait, load4, store2, store4
from cuda_kernels.views import ceil_div

__all__ = ["attention_kernel", "kernels_for_report", "paged_attention_mma", "shared_nbytes_of"]


def _build_attention(*, shape: TileShape, partial: bool, softcap: bool, streams: bool) -> Callable[..., None]:
    tiles = tile_functions(shape)
    load_tile, load_query = tiles.load_tile, tiles.load_query
    multiply_keys, multiply_values = tiles.multiply_keys, tiles.multiply_values
    steps = step_functions(shape, tiles.pack_probs, softcap=softcap)
    finish_scores, mask_scores, exchange_scores = steps.finish_scores, steps.mask_scores, steps.exchange_scores
    update_softmax, merge_split, write_rows = steps.update_softmax, steps.merge_split, steps.write_rows

    i32, i64, u32 = types.int32, types.int64, types.uint32
    zero = np.float32(0.0)
    rows, warps, threads, keys = shape.rows, shape.column_warps, shape.threads, shape.keys
    tile_words, stage_words, queries_at, state_at = (
        shape.tile_words,
        shape.stage_words,
        shape.queries_at,
        shape.state_at,
    )
    shift, split_shift, tiles_per_split = keys.bit_length() - 1, SPLIT_KEYS.bit_length() - 1, SPLIT_KEYS // keys
    key_groups, own_keys, k_steps, own_columns = (
        shape.key_groups,
        shape.own_key_groups,
        shape.k_steps,
        shape.own_column_groups,
    )
    register_steps, shared_steps, at_once = shape.register_steps, shape.shared_steps, shape.steps_at_once
    num_scores, num_own, num_probs, num_outputs = key_groups * 8, own_keys * 8, key_groups * 4, own_columns * 8
    num_kept, num_loaded = max(1, register_steps * 4), at_once * 4

    def attention(
        q: Pointer,
        sink_q: Pointer,
        k: Pointer,
        v: Pointer,
        k_scale: Pointer,
        v_scale: Pointer,
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
        query_scale: Value,
        cap: Value,
    ) -> None:
        thread = i32(cuda.threadIdx.x)
        lane = i32(thread & 31)
        row_warp = i32(i32(thread >> 5) // warps)
        column_warp = i32(i32(thread >> 5) % warps)
        t = i32(lane & 3)

        # ---- which rows: first_row ... of sequence s, under one KV head
        s = i32(cuda.blockIdx.z)
        if partial:
            head = i32(cuda.blockIdx.y % num_kv_heads)
            first_row = i32(i32(cuda.blockIdx.y // num_kv_heads) * rows)
        else:
            head = i32(cuda.blockIdx.y)
            first_row = i32(i32(cuda.gridDim.x - 1 - cuda.blockIdx.x) * rows)  # the longest rows first
        first_token = cu_seqlens_q[s]
        count = i32(cu_seqlens_q[i32(s + 1)] - first_token)
        num_rows = i32(count * group_size)
        if first_row >= num_rows or (count > query_limit) == partial:
            return
        context = i32(seq_lens[s] - count)  # negative for padding: its rows see nothing
        first_position = i32(context + first_row // group_size)
        last_position = i32(context + (min(i32(first_row + rows), num_rows) - 1) // group_size)

        # ---- which keys: the window's tiles, and the sinks before them
        sinks = i32(0)
        if streams:
            window, sinks = window_and_sinks(windows, num_sinks, s, window)
        low = lowest_key(first_position, window, sinks)
        low_last = lowest_key(last_position, window, sinks)
        first_tile = i32(low >> shift)
        last_tile = i32(last_position >> shift)
        in_sinks = streams and low_last > 0 and sinks > 0
        slot = i32(0)
        if partial:  # one split, or the sinks
            slot = i32(cuda.blockIdx.x)
            split = i32((lowest_key(context, window, sinks) >> split_shift) + slot)
            if streams:
                if slot == 0 and not in_sinks:
                    return
                in_sinks = slot == 0
                split = i32(split - 1)
            first_tile = max(first_tile, i32(split * tiles_per_split))
            last_tile = min(last_tile, i32(split * tiles_per_split + (tiles_per_split - 1)))
            if first_tile > last_tile and not in_sinks:
                return

        # ---- this thread's rows a and b
        row_a = i32(first_row + row_warp * 16 + (lane >> 2))
        row_b = i32(row_a + 8)
        num_heads = i32(num_kv_heads * group_size)
        last_row = i32(num_rows - 1)
        query_a = i32(min(row_a, last_row) // group_size)
        query_b = i32(min(row_b, last_row) // group_size)
        # (query, head) of all the step's, rows past the last standing for the last
        from_a = i32(i32(first_token + query_a) * num_heads + (head - query_a) * group_size + min(row_a, last_row))
        from_b = i32(i32(first_token + query_b) * num_heads + (head - query_b) * group_size + min(row_b, last_row))
        high_a, to_a = i32(context + query_a), from_a
        high_b, to_b = i32(context + query_b), from_b
        if partial:
            first_slot = i32(s * query_limit - first_token)
            to_a = i32(i32(from_a + first_slot * num_heads) * num_slots + slot)
            to_b = i32(i32(from_b + first_slot * num_heads) * num_slots + slot)
        if row_a > last_row:
            high_a, to_a = i32(-1), i32(-1)
        if row_b > last_row:
            high_b, to_b = i32(-1), i32(-1)
        sh = cuda.shared.array(0, types.uint32)
        shf = cuda.shared.array(0, types.float32)
        state = i32(state_at + thread * 4)
        low_a = lowest_key(high_a, window, sinks)
        low_b = lowest_key(high_b, window, sinks)
        store4(sh, state, u32(low_a), u32(high_a), u32(low_b), u32(high_b))
        store4(sh, i32(state + 4 * threads), u32(to_a), u32(to_b), u32(from_a), u32(from_b))
        store4(shf, i32(state + 8 * threads), NEG_INF, NEG_INF, zero, zero)

        table_row = i64(s) * table_stride
        own = cuda.local.array(num_own, types.float32)
        scores = cuda.local.array(num_scores, types.float32)
        probs = cuda.local.array(num_probs, types.uint32)
        kept = cuda.local.array(num_kept, types.uint32)  # query fragments of the first k_steps
        loaded = cuda.local.array(num_loaded, types.uint32)  # those of others, read anew for each tile
        running = cuda.local.array(4, types.float32)
        o = cuda.local.array(num_outputs, types.float32)
        merged = cuda.local.array(num_outputs, types.float32)
        running[0], running[1], running[2], running[3] = NEG_INF, NEG_INF, zero, zero
        for i in range(num_outputs):
            o[i] = zero
            merged[i] = zero

        unfinished = True
        while unfinished:  # once, or for the sinks and then for the window
            tile, end_tile = first_tile, last_tile
            at_low, at_high, sinks_here = low, last_position, i32(-1)
            if streams and in_sinks:
                tile, end_tile = i32(0), i32((sinks - 1) >> shift)
                at_low, at_high, sinks_here = i32(0), i32(sinks - 1), sinks
            if streams:
                cuda.syncthreads()  # the sinks' last tile may still be in use
            if tile <= end_tile:
                load_tile(
                    *(sh, i32((tile & 1) * stage_words), k, v, k_scale, v_scale, block_tables, table_row, head),
                    *(num_kv_heads, block_shift, i32(tile << shift), at_low, at_high, thread),
                )
            cp_async_commit()
            _, _, from_a, from_b = load4(sh, i32(state + 4 * threads))
            token_a, head_a = i32(from_a) // num_heads, i32(from_a) % num_heads
            token_b, head_b = i32(from_b) // num_heads, i32(from_b) % num_heads
            for step in range(k_steps):
                if warps == 1 or step % warps == column_warp:
                    if streams and in_sinks:
                        at_a = i64(token_a) * sink_stride + i64(head_a) * sink_head_stride
                        at_b = i64(token_b) * sink_stride + i64(head_b) * sink_head_stride
                        f0, f1, f2, f3 = load_query(sink_q, at_a, at_b, step, t, query_scale)
                    else:
                        at_a = i64(token_a) * q_stride + i64(head_a) * q_head_stride
                        at_b = i64(token_b) * q_stride + i64(head_b) * q_head_stride
                        f0, f1, f2, f3 = load_query(q, at_a, at_b, step, t, query_scale)
                    if step < register_steps:
                        i = step * 4
                        kept[i], kept[i + 1], kept[i + 2], kept[i + 3] = f0, f1, f2, f3
                    else:
                        here = row_warp * shared_steps + (step - register_steps)
                        store4(sh, i32(queries_at + here * 128 + lane * 4), f0, f1, f2, f3)

            while tile <= end_tile:
                at = i32((tile & 1) * stage_words)
                first_key = i32(tile << shift)
                cp_async_wait(0)
                cuda.syncthreads()  # this tile has arrived, and nobody uses the other stage any more
                if tile < end_tile:
                    load_tile(
                        *(sh, i32(stage_words - at), k, v, k_scale, v_scale, block_tables, table_row, head),
                        *(num_kv_heads, block_shift, i32(first_key + keys), at_low, at_high, thread),
                    )
                cp_async_commit()

                # S = Q K^T
                for i in range(num_own):
                    own[i] = zero
                for step in range(0, k_steps, at_once):
                    if step >= register_steps:
                        for u in range(at_once):
                            if step + u < k_steps:
                                i = u * 4
                                here = row_warp * shared_steps + (step + u - register_steps)
                                loaded[i], loaded[i + 1], loaded[i + 2], loaded[i + 3] = load4(
                                    sh, i32(queries_at + here * 128 + lane * 4)
                                )
                    for n in range(own_keys):
                        group = i32(column_warp + n * warps)
                        if (n + 1) * warps <= key_groups or group < key_groups:
                            if step < register_steps:
                                multiply_keys(sh, at, group, step, lane, kept, step * 4, own, n * 8)
                            else:
                                multiply_keys(sh, at, group, step, lane, loaded, 0, own, n * 8)
                finish_scores(shf, at, column_warp, t, cap, own)
                full = first_key >= low_last and i32(first_key + (keys - 1)) <= first_position
                if not full or sinks_here >= 0:
                    mask_scores(sh, thread, column_warp, first_key, sinks_here, own)
                exchange_scores(shf, row_warp, column_warp, lane, own, scores)

                # O = O * decay + P V
                update_softmax(shf, at, t, scores, running, probs, o)
                for n in range(own_columns):
                    group = i32(column_warp + n * warps)
                    if (n + 1) * warps <= k_steps or group < k_steps:
                        multiply_values(sh, i32(at + tile_words), group, lane, probs, o, n * 8)
                tile = i32(tile + 1)
                if not partial and ((tile & (tiles_per_split - 1)) == 0 or tile > end_tile):
                    merge_split(shf, thread, running, o, merged)
            unfinished = in_sinks and not partial
            in_sinks = False

        # ---- the results, or the one partial
        to_a, to_b, _, _ = load4(sh, i32(state + 4 * threads))
        to_a, to_b = i32(to_a), i32(to_b)
        writes_stats = t == 0 and column_warp == 0
        if partial:
            sum_a, sum_b = quad_sum(running[2]), quad_sum(running[3])
            if writes_stats and to_a >= 0:
                store2(lse, i64(to_a) * 2, running[0], sum_a)
            if writes_stats and to_b >= 0:
                store2(lse, i64(to_b) * 2, running[1], sum_b)
            write_rows(out, to_a, to_b, column_warp, t, o)
        else:
            top_a, top_b, sum_a, sum_b = load4(shf, i32(state + 8 * threads))
            if writes_stats and to_a >= 0:
                lse[to_a] = final_lse(top_a, sum_a)
            if writes_stats and to_b >= 0:
                lse[to_b] = final_lse(top_b, sum_b)
            scale_a, scale_b = final_scale(sum_a), final_scale(sum_b)
            for n in range(own_columns * 2):
                i = n * 4
                merged[i], merged[i + 1] = merged[i] * scale_a, merged[i + 1] * scale_a
                merged[i + 2], merged[i + 3] = merged[i + 2] * scale_b, merged[i + 3] * scale_b
            write_rows(out, to_a, to_b, column_warp, t, merged)

    return attention


@cache
def attention_kernel(storage: str, head_dim: int, *, partial: bool, softcap: bool, streams: bool) -> Kernel:
    """The prefill form, or (partial) the decode form, for a cache dtype and head size.

    softcap and streams: whether scores are capped, whether sequences may have sinks.
    """
    if partial:
        shape = TileShape(storage, head_dim, row_warps=1, column_warps=4)
    elif head_dim <= 128:
        shape = TileShape(storage, head_dim, row_warps=4, column_warps=1)
    else:  # the running and the split's own O take two warps' registers
        shape = TileShape(storage, head_dim, row_warps=2, column_warps=2)
    form = "decode" if partial else "prefill"
    return Kernel(
        name=f"attention_{form}_{storage}_d{head_dim}{'_softcap' * softcap}{'_sinks' * streams}",
        build=_build_attention,
        constants=(("shape", shape), ("partial", partial), ("softcap", softcap), ("streams", streams)),
        signature=(
            *["f32*"] * 2,
            *["u32*"] * 2,
            *["f32*"] * 2,
            *["i32*"] * 5,
            *["f32*"] * 2,
            *["i32"] * 11,
            *["f32"] * 2,
        ),
        threads=shape.threads,
        min_blocks=4 if partial and head_dim == 80 else 0,  # left to itself ptxas spills 8 bytes to fit a fifth
    )


def paged_attention_mma(rt: Runtime, inputs: AttentionInputs, *, query_limit: int | None = None) -> None:
    """Attention over an f16, bf16, int8 or fp8 cache; see AttentionInputs.

    Args:
        query_limit: sequences with more queries take the prefill form, the others the decode form. None:
            decode_query_limit. It does not change a bit of the results.

    Raises:
        KernelArgumentError: a cache or head size that this form does not serve, too little scratch memory.
    """
    layer, S, G = inputs.layer, inputs.num_seqs, inputs.group_size
    H, D = inputs.num_heads, layer.head_dim
    require(layer.dtype in STORAGES, f"tensor-core attention has no {layer.dtype} caches")
    multiple = 16 if layer.k_scale is not None else 8
    fits = D % multiple == 0 and D <= 256
    require(fits, f"head size {D}: {layer.dtype} caches take multiples of {multiple} up to 256")
    if query_limit is None:
        query_limit = decode_query_limit(inputs)
        if S == 1 and inputs.max_query_len > query_limit:
            query_limit = 0  # one sequence, and too long: no second form is needed
    layout = partial_layout(
        num_seqs=S,
        num_queries=query_limit,
        num_heads=H,
        head_dim=D,
        max_seq_len=inputs.max_seq_len,
        window=inputs.window,
        streams=inputs.streams,
    )
    sink_q = inputs.q if inputs.sink_q is None else inputs.sink_q
    dummy_scale, dummy_window = inputs.lse, inputs.seq_lens
    log2_scale = inputs.scale * LOG2_E
    cap = inputs.softcap * LOG2_E

    def launch(partial: bool, out: Array, lse: Array, grid: Callable[[int], tuple[int, int, int]]) -> None:
        kernel = attention_kernel(layer.dtype, D, partial=partial, softcap=inputs.softcap > 0.0, streams=inputs.streams)
        shape = _shape_of(kernel)
        arguments = (
            *(inputs.q, sink_q, layer.k.view(np.uint32), layer.v.view(np.uint32)),
            *(dummy_scale if scale is None else scale for scale in (layer.k_scale, layer.v_scale)),
            *(inputs.cu_seqlens_q, inputs.seq_lens, inputs.block_tables),
            *(dummy_window if array is None else array for array in (inputs.windows, inputs.num_sinks)),
            *(out, lse),
            *(inputs.q.strides[0] // 4, inputs.q.strides[1] // 4, sink_q.strides[0] // 4, sink_q.strides[1] // 4),
            *(inputs.block_tables.strides[0] // 4, layer.block_size.bit_length() - 1, G, layer.num_kv_heads),
            *(inputs.window, query_limit, layout.num_slots),
            *(2.0 * log2_scale / inputs.softcap if inputs.softcap > 0.0 else log2_scale, cap),
        )
        rt.launch(kernel, grid(shape.rows), arguments, shared_nbytes=shape.shared_nbytes)

    KH = layer.num_kv_heads
    if inputs.max_query_len > query_limit:
        launch(False, inputs.out, inputs.lse, lambda rows: (ceil_div(inputs.max_query_len * G, rows), KH, S))
    if query_limit > 0:
        acc, stats = layout.views(inputs.scratch)
        launch(True, acc, stats, lambda rows: (layout.num_slots, KH * ceil_div(query_limit * G, rows), S))
        combine_partials(rt, inputs, layout)


def _shape_of(kernel: Kernel) -> TileShape:
    shape = dict(kernel.constants)["shape"]
    assert isinstance(shape, TileShape)
    return shape


def shared_nbytes_of(kernel: Kernel) -> int:
    """Dynamic shared memory of a block of one of kernels_for_report."""
    return _shape_of(kernel).shared_nbytes if "shape" in dict(kernel.constants) else 0


def kernels_for_report() -> list[Kernel]:
    """Both forms for each cache dtype and head size of note, softcap and sinks once each, and the combines."""
    sizes = (64, 80, 96, 128, 256)
    plain = [
        attention_kernel(storage, head_dim, partial=partial, softcap=False, streams=False)
        for storage in STORAGES
        for head_dim in sizes
        for partial in (False, True)
    ]
    others = [
        attention_kernel("bf16", head_dim, partial=partial, softcap=softcap, streams=not softcap)
        for head_dim in (64, 128, 256)
        for partial in (False, True)
        for softcap in (False, True)
    ]
    return plain + others + [combine_kernel(head_dim, False) for head_dim in sizes]
