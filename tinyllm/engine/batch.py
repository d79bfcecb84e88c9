"""From a schedule to the arrays that the model runs on."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

from tinyllm.backends.base import Batch
from tinyllm.engine.scheduler import ScheduledSequence

__all__ = ["build_batch"]


def build_batch(scheduled: Seq[ScheduledSequence], block_size: int) -> Batch:
    """Lays the scheduled tokens of each sequence end to end; see Batch for the arrays."""
    counts = [item.num_tokens for item in scheduled]
    tables = [item.sequence.block_table for item in scheduled]
    block_tables = np.zeros((len(scheduled), max(map(len, tables))), np.int32)
    for row, table in zip(block_tables, tables, strict=True):
        row[: len(table)] = table
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
    )
