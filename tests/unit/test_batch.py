"""The arrays of a step: decoding sequences beside the same ones among others that prefill."""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from tests.unit.sequences import make_sequence
from tinyllm.engine.batch import build_batch
from tinyllm.engine.scheduler import ScheduledSequence
from tinyllm.engine.sequence import Sequence

BLOCK_SIZE = 4


def sequence_at(computed: int, first_block: int) -> Sequence:
    sequence = make_sequence([100 * first_block + i for i in range(computed + 1)])
    sequence.num_computed_tokens = computed
    sequence.block_table = [first_block + 3 * i for i in range(computed // BLOCK_SIZE + 1)]
    return sequence


def test_one_token_each_is_laid_out_as_several_are() -> None:
    decoding = [ScheduledSequence(sequence_at(at, block), 1) for block, at in enumerate((0, 3, 4, 11, 18), 1)]
    prefill = sequence_at(12, 9)
    prefill.num_computed_tokens = 11
    alone = build_batch(decoding, BLOCK_SIZE)
    among = build_batch([*decoding, ScheduledSequence(prefill, 2)], BLOCK_SIZE)
    assert alone.positions.tolist() == [0, 3, 4, 11, 18]
    assert alone.slot_mapping.tolist() == [4, 11, 24, 43, (5 + 3 * 4) * 4 + 2]
    for field in fields(alone):
        one, other = getattr(alone, field.name), getattr(among, field.name)
        if one is None:
            assert other is None
            continue
        assert one.dtype == other.dtype == np.int32
        np.testing.assert_array_equal(one, other[: len(one)], strict=True)
    assert alone.extent.max_query_len == 1
    assert among.extent.max_query_len == 2
