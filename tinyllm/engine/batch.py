"""From a schedule to the arrays that the model runs on."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import numpy as np

from tinyllm.backends.base import NO_WINDOW, Batch, I32Array
from tinyllm.engine.scheduler import ScheduledSequence
from tinyllm.engine.sequence import Sequence

__all__ = ["build_batch"]


def build_batch(scheduled: Seq[ScheduledSequence], block_size: int) -> Batch:
    """Lays the scheduled tokens of each sequence end to end; see Batch for the arrays."""
    counts = [item.num_tokens for item in scheduled]
    if max(counts) == 1 and all(item.sequence.request.params.window is None for item in scheduled):
        return _decode_batch([item.sequence for item in scheduled], block_size)
    block_tables = _block_tables([item.sequence for item in scheduled], block_size)
    starts = np.array([item.sequence.num_computed_tokens for item in scheduled], np.int32)
    cu_seqlens_q = np.zeros(len(scheduled) + 1, np.int32)
    np.cumsum(counts, out=cu_seqlens_q[1:])
    row_of_token = np.repeat(np.arange(len(scheduled)), counts)
    positions = np.arange(cu_seqlens_q[-1], dtype=np.int32) - np.repeat(cu_seqlens_q[:-1] - starts, counts)
    blocks = block_tables[row_of_token, positions // block_size]
    token_ids: list[int] = []
    for item in scheduled:
        start = item.sequence.num_computed_tokens
        token_ids += item.sequence.token_ids[start : start + item.num_tokens]
    return Batch(
        token_ids=np.array(token_ids, np.int32),
        positions=positions,
        slot_mapping=blocks * np.int32(block_size) + positions % block_size,
        cu_seqlens_q=cu_seqlens_q,
        seq_lens=starts + np.array(counts, np.int32),
        block_tables=block_tables,
        **_windows(scheduled, counts, positions),
    )


def _decode_batch(sequences: Seq[Sequence], block_size: int) -> Batch:
    """One token of each sequence: without numpy's calls over arrays that are hardly longer than one number."""
    starts = [sequence.num_computed_tokens for sequence in sequences]
    each = list(zip(sequences, starts, strict=True))
    slots = [sequence.block_table[at // block_size] * block_size + at % block_size for sequence, at in each]
    positions = np.array(starts, np.int32)
    return Batch(
        token_ids=np.array([sequence.token_ids[at] for sequence, at in each], np.int32),
        positions=positions,
        slot_mapping=np.array(slots, np.int32),
        cu_seqlens_q=np.arange(len(sequences) + 1, dtype=np.int32),
        seq_lens=positions + np.int32(1),
        block_tables=_block_tables(sequences, block_size),
    )


def _block_tables(sequences: Seq[Sequence], block_size: int) -> I32Array:
    """(S, MB); 0 stands for blocks that were given back: they are never read."""
    tables = [sequence.block_table for sequence in sequences]
    result = np.zeros((len(tables), max(map(len, tables))), np.int32)
    for row, table, sequence in zip(result, tables, sequences, strict=True):
        live = sequence.num_released_blocks
        if live:
            sinks = min(-(-sequence.request.sinks // block_size), len(table))
            row[:sinks] = table[:sinks]
        row[live : len(table)] = table[live:]
    return result


def _windows(scheduled: Seq[ScheduledSequence], counts: Seq[int], positions: I32Array) -> dict[str, Any]:
    """What streaming sequences see; nothing if there are none."""
    all_params = [item.sequence.request.params for item in scheduled]
    if all(params.window is None for params in all_params):
        return {}
    windows = np.array([NO_WINDOW if p.window is None else p.window for p in all_params], np.int32)
    num_sinks = np.array([0 if p.window is None else p.sinks for p in all_params], np.int32)
    in_cache = np.minimum(windows.astype(np.int64) + num_sinks - 1, NO_WINDOW).astype(np.int32)
    return {
        "windows": windows,
        "num_sinks": num_sinks,
        "sink_positions": np.minimum(positions, np.repeat(in_cache, counts)),
    }
