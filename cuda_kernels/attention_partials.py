"""Partial results of the decode forms of paged attention in scratch memory, and the kernel that combines them.

Row (s * num_queries + i) * H + h is query i of sequence s under head h; slot k of it holds one partial (see
online_softmax): the sinks' in slot 0 where sequences may stream, then those of the splits of SPLIT_KEYS keys,
counted from the first split that the sequence's first query sees.

    acc (rows, slots, D) float32 | stats (rows, slots, 2) float32: m, l

A warp combines one row: lane c holds 4 columns, or 8 for D > 128. Splits are merged in ascending order, after the
sinks; loads of _AHEAD partials are under way together. Limits: D a multiple of 4, up to 256.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cuda_kernels.attention_inputs import SPLIT_KEYS, AttentionInputs
from cuda_kernels.kernel import Kernel
from cuda_kernels.launch import Array, Runtime, require
from cuda_kernels.online_softmax import (
    NEG_INF,
    final_lse,
    final_scale,
    lowest_key,
    merge,
    merge_weights,
    window_and_sinks,
)
from cuda_kernels.primitives import Pointer, Value, load2, load4, store4

__all__ = ["PartialLayout", "combine_kernel", "combine_partials", "decode_query_limit", "partial_layout"]

_WARPS = 4  # rows of a block
_AHEAD = 4


@dataclass(frozen=True)
class PartialLayout:
    """Sizes of the scratch memory; num_queries is the most queries that a sequence brings in decode form."""

    num_seqs: int
    num_queries: int
    num_heads: int
    head_dim: int
    num_slots: int

    @property
    def num_rows(self) -> int:
        return self.num_seqs * self.num_queries * self.num_heads

    @property
    def nbytes(self) -> int:
        return self.num_rows * self.num_slots * (self.head_dim + 2) * 4

    def views(self, scratch: Array) -> tuple[Array, Array]:
        """(acc, stats) as flat arrays. Raises KernelArgumentError where scratch is too small."""
        require(scratch.nbytes >= self.nbytes, f"attention needs {self.nbytes} bytes of scratch, not {scratch.nbytes}")
        flat = scratch.reshape(-1).view(np.float32)
        split = self.num_rows * self.num_slots * self.head_dim
        return flat[:split], flat[split : split + self.num_rows * self.num_slots * 2]


def partial_layout(
    *,
    num_seqs: int,
    num_queries: int,
    num_heads: int,
    head_dim: int,
    max_seq_len: int,
    window: int,
    streams: bool,
) -> PartialLayout:
    """The layout for sequences of up to num_queries queries and max_seq_len keys."""
    num_splits = -(-max_seq_len // SPLIT_KEYS)
    if streams:
        return PartialLayout(num_seqs, num_queries, num_heads, head_dim, num_splits + 1)
    # that many consecutive keys touch at most this many splits
    num_keys = window + num_queries - 1
    return PartialLayout(
        num_seqs, num_queries, num_heads, head_dim, min(num_splits, (num_keys + 254) // SPLIT_KEYS + 1)
    )


def decode_query_limit(inputs: AttentionInputs, rows: int = 16) -> int:
    """Sequences with up to so many queries take the decode form: what fits `rows` rows, and a single query always.

    Nor are they more than the average, so that the partials of all sequences have at most T * H rows.
    """
    return max(1, min(rows // inputs.group_size, int(inputs.q.shape[0]) // inputs.num_seqs))


def _build_combine(*, head_dim: int, streams: bool) -> Callable[..., None]:
    i32, i64 = types.int32, types.int64
    zero = np.float32(0.0)
    chunks = -(-head_dim // 128)

    def combine(
        acc: Pointer,
        stats: Pointer,
        cu_seqlens_q: Pointer,
        seq_lens: Pointer,
        windows: Pointer,
        num_sinks: Pointer,
        out: Pointer,
        lse: Pointer,
        num_rows: Value,
        num_queries: Value,
        num_heads: Value,
        num_slots: Value,
        window: Value,
    ) -> None:
        row = i32(cuda.blockIdx.x * _WARPS + (cuda.threadIdx.x >> 5))
        lane = i32(cuda.threadIdx.x & 31)
        if row >= num_rows:
            return
        head = i32(row % num_heads)
        query = i32(row // num_heads % num_queries)
        s = i32(row // (num_heads * num_queries))
        first_token = cu_seqlens_q[s]
        count = i32(cu_seqlens_q[i32(s + 1)] - first_token)
        if count > num_queries or query >= count:
            return  # another form's, or nobody's
        first_position = i32(seq_lens[s] - count)
        position = i32(first_position + query)
        sinks = i32(0)
        if streams:
            window, sinks = window_and_sinks(windows, num_sinks, s, window)
        base = i32(lowest_key(first_position, window, sinks) // SPLIT_KEYS)
        lowest = lowest_key(position, window, sinks)
        # slots of this row, in the order of the merge
        slot = i32(lowest // SPLIT_KEYS - base)
        last = i32(position // SPLIT_KEYS - base) if position >= 0 else i32(-1)
        if streams:
            slot = i32(slot + 1)
            last = i32(last + 1)

        m, l = NEG_INF, zero  # noqa: E741
        o = cuda.local.array((chunks, 4), types.float32)
        for c in range(chunks):
            for e in range(4):
                o[c, e] = zero
        ms = cuda.local.array(_AHEAD, types.float32)
        ls = cuda.local.array(_AHEAD, types.float32)
        os = cuda.local.array((_AHEAD, chunks, 4), types.float32)
        first_slot = i64(row) * num_slots
        sinks_due = streams and sinks > 0 and lowest > 0
        if sinks_due:
            slot = i32(slot - 1)  # stands for the sinks' slot 0; the others follow
        first = slot
        while slot <= last:
            for u in range(_AHEAD):
                at = i32(min(i32(slot + u), last))
                if sinks_due and at == first:
                    at = i32(0)
                index = first_slot + at
                ms[u], ls[u] = load2(stats, index * 2)
                for c in range(chunks):
                    column = i32(c * 128 + lane * 4)
                    if column < head_dim:
                        os[u, c, 0], os[u, c, 1], os[u, c, 2], os[u, c, 3] = load4(acc, index * head_dim + column)
            for u in range(_AHEAD):
                if i32(slot + u) <= last and ls[u] != zero:
                    m, weight, other_weight = merge_weights(m, ms[u])
                    l = merge(l, weight, ls[u], other_weight)  # noqa: E741
                    for c in range(chunks):
                        for e in range(4):
                            o[c, e] = merge(o[c, e], weight, os[u, c, e], other_weight)
            slot = i32(slot + _AHEAD)

        scale = final_scale(l)
        out_row = i64(first_token + query) * num_heads + head
        for c in range(chunks):
            column = i32(c * 128 + lane * 4)
            if column < head_dim:
                at = out_row * head_dim + column
                store4(out, at, o[c, 0] * scale, o[c, 1] * scale, o[c, 2] * scale, o[c, 3] * scale)
        if lane == 0:
            lse[out_row] = final_lse(m, l)

    return combine


@cache
def combine_kernel(head_dim: int, streams: bool) -> Kernel:
    """The kernel for a head size; streams: whether sequences may have sinks."""
    return Kernel(
        name=f"attention_combine_d{head_dim}{'_sinks' if streams else ''}",
        build=_build_combine,
        constants=(("head_dim", head_dim), ("streams", streams)),
        signature=(*["f32*"] * 2, *["i32*"] * 4, *["f32*"] * 2, *["i32"] * 5),
        threads=32 * _WARPS,
    )


def combine_partials(rt: Runtime, inputs: AttentionInputs, layout: PartialLayout) -> None:
    """Writes out and lse of the sequences with up to layout.num_queries queries from their partials in scratch."""
    acc, stats = layout.views(inputs.scratch)
    arguments: tuple[Any, ...] = (
        acc,
        stats,
        inputs.cu_seqlens_q,
        inputs.seq_lens,
        inputs.windows if inputs.windows is not None else inputs.seq_lens,
        inputs.num_sinks if inputs.num_sinks is not None else inputs.seq_lens,
        inputs.out,
        inputs.lse,
        layout.num_rows,
        layout.num_queries,
        layout.num_heads,
        layout.num_slots,
        inputs.window,
    )
    grid = (-(-layout.num_rows // _WARPS), 1, 1)
    rt.launch(combine_kernel(layout.head_dim, inputs.streams), grid, arguments)
