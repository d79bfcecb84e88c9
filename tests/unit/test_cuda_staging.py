"""Padding decode steps to few sizes, and when a step is one that a CUDA graph can replay."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from tinyllm.backends.base import NO_WINDOW, Batch, BatchExtent
from tinyllm.backends.cuda_staging import graph_key, pad_batch, round_up_sequences


def decode_batch(lengths: list[int], block_size: int = 16, **more: np.ndarray) -> Batch:
    """One token of each sequence, block s * 100 + i being block i of sequence s."""
    S, columns = len(lengths), -(-max(lengths) // block_size)
    tables = np.arange(S, dtype=np.int32)[:, None] * 100 + np.arange(columns, dtype=np.int32)
    positions = np.array(lengths, np.int32) - 1
    return Batch(
        token_ids=np.arange(10, 10 + S, dtype=np.int32),
        positions=positions,
        slot_mapping=tables[np.arange(S), positions // block_size] * block_size + positions % block_size,
        cu_seqlens_q=np.arange(S + 1, dtype=np.int32),
        seq_lens=np.array(lengths, np.int32),
        block_tables=tables,
        **more,
    )


@pytest.mark.parametrize(
    ("count", "rounded"), [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (64, 64), (65, 96), (256, 256)]
)
def test_numbers_of_sequences_are_rounded_up(count: int, rounded: int) -> None:
    assert round_up_sequences(count) == rounded


@given(st.lists(st.integers(1, 700), min_size=1, max_size=40), st.sampled_from([8, 16, 32]), st.integers(1, 64))
def test_padding_changes_no_sequence_and_writes_nowhere(lengths: list[int], block_size: int, max_tokens: int) -> None:
    batch = decode_batch(lengths, block_size)
    padded = pad_batch(batch, block_size, max_tokens)
    S, columns = batch.block_tables.shape
    size = len(padded.seq_lens)
    assert size == max(S, min(round_up_sequences(S), max_tokens))
    for name in ("token_ids", "positions", "slot_mapping", "seq_lens"):
        assert np.array_equal(getattr(padded, name)[:S], getattr(batch, name))
        assert len(getattr(padded, name)) == size
    assert np.array_equal(padded.cu_seqlens_q, np.arange(size + 1))
    assert np.array_equal(padded.block_tables[:S, :columns], batch.block_tables)
    assert (padded.slot_mapping[S:] == -1).all()
    assert (padded.seq_lens[S:] == 0).all()
    assert padded.block_tables.shape[1] * block_size >= max(lengths)


def test_steps_of_one_rounded_size_have_one_graph() -> None:
    keys = {graph_key(pad_batch(decode_batch([n] * s), 16, 64)) for n in (200, 255, 256) for s in (5, 7, 8)}
    assert len({(key[0], key[1]) for key in keys if key is not None}) == 1
    longer = graph_key(pad_batch(decode_batch([257]), 16, 64))
    assert longer is not None
    assert longer[1] == 32


def test_prefill_and_mixed_steps_have_no_graph_and_no_padding() -> None:
    batch = decode_batch([20, 30])
    mixed = Batch(
        np.zeros(3, np.int32),
        np.array([18, 19, 29], np.int32),
        np.zeros(3, np.int32),
        np.array([0, 2, 3], np.int32),
        batch.seq_lens,
        batch.block_tables,
    )
    assert graph_key(mixed) is None
    assert pad_batch(mixed, 16, 64) is mixed


def test_a_step_with_streams_is_padded_by_sequences_that_see_everything() -> None:
    windows = {"windows": np.array([64, NO_WINDOW, 8], np.int32), "num_sinks": np.array([4, 0, 0], np.int32)}
    batch = decode_batch([100, 5, 70], **windows, sink_positions=np.array([67, 4, 7], np.int32))
    padded = pad_batch(batch, 16, 64)
    assert padded.windows is not None
    assert padded.num_sinks is not None
    assert padded.sink_positions is not None
    assert (padded.windows[3], padded.num_sinks[3], padded.sink_positions[3]) == (NO_WINDOW, 0, 0)
    assert batch.extent == padded.extent == BatchExtent(max_query_len=1, max_seq_len=100, sink_window=64)
    plain, streams = graph_key(pad_batch(decode_batch([100, 5, 70]), 16, 64)), graph_key(padded)
    assert plain != streams
