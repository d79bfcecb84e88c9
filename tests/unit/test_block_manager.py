"""The block manager: exact block ids, reference counts and free order, and its invariants under random use."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from tests.unit.sequences import make_sequence
from tinyllm.engine.block_manager import BlockManager


def test_blocks_are_taken_in_order_on_demand_and_given_back_last_first() -> None:
    manager = BlockManager(num_blocks=6, block_size=4)
    a, b = make_sequence(range(9)), make_sequence(range(4))
    assert manager.append_slots(a, 3) == []
    assert a.block_table == [0]
    a.num_computed_tokens = 3
    assert manager.append_slots(a, 1) == []
    assert a.block_table == [0], "the first block still had a slot"
    assert manager.append_slots(b, 4) == []
    a.num_computed_tokens = 4
    assert manager.append_slots(a, 5) == []
    assert (a.block_table, b.block_table) == ([0, 2, 3], [1])
    assert manager.ref_counts == [1, 1, 1, 1, 0, 0]
    manager.free(a)
    assert a.block_table == []
    c = make_sequence(range(20))
    assert manager.append_slots(c, 20) == []
    assert c.block_table == [4, 5, 3, 2, 0], "free blocks come first in, first out; a sequence's tail is freed first"


def test_nothing_changes_when_blocks_run_short() -> None:
    manager = BlockManager(num_blocks=2, block_size=4)
    a, b = make_sequence(range(5)), make_sequence(range(4))
    assert manager.append_slots(a, 5) == []
    assert manager.append_slots(b, 1) is None
    assert (b.block_table, manager.ref_counts, manager.num_free_blocks) == ([], [1, 1], 0)


def test_fork_shares_and_the_first_write_copies_that_block_alone() -> None:
    manager = BlockManager(num_blocks=8, block_size=4)
    parent = make_sequence(range(7))
    manager.append_slots(parent, 6)
    parent.num_computed_tokens = 6
    children = [make_sequence(range(7), index=i) for i in (1, 2)]
    for child in children:
        manager.fork(parent, child)
        child.num_computed_tokens = 6
    assert manager.num_free_blocks == 6, "a fork takes no memory"
    assert manager.ref_counts[:2] == [3, 3]
    assert manager.append_slots(parent, 1) == [(1, 2)]
    assert manager.append_slots(children[0], 1) == [(1, 3)]
    assert manager.append_slots(children[1], 1) == [], "the last holder writes in place"
    assert [s.block_table for s in (parent, *children)] == [[0, 2], [0, 3], [0, 1]]
    assert manager.ref_counts[:4] == [3, 1, 1, 1]
    manager.check([parent, *children])


def test_a_fork_at_a_block_border_copies_nothing() -> None:
    manager = BlockManager(num_blocks=4, block_size=4)
    parent, child = make_sequence(range(5)), make_sequence(range(5), index=1)
    manager.append_slots(parent, 4)
    parent.num_computed_tokens = child.num_computed_tokens = 4
    manager.fork(parent, child)
    assert manager.append_slots(parent, 1) == []
    assert manager.append_slots(child, 1) == []
    assert (parent.block_table, child.block_table) == ([0, 1], [0, 2])


def test_check_notices_a_wrong_count_and_a_lost_block() -> None:
    manager = BlockManager(num_blocks=4, block_size=4)
    sequence = make_sequence(range(4))
    manager.append_slots(sequence, 4)
    manager.check([sequence])
    with pytest.raises(AssertionError, match="stands in 0 tables"):
        manager.check([])
    manager.ref_counts[0] = 0
    sequence.block_table = []
    with pytest.raises(AssertionError, match="free list disagrees"):
        manager.check([])


class BlockManagerMachine(RuleBasedStateMachine):
    """Random use beside a model that holds the content of every block: a write must never show in another sequence."""

    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(num_blocks=12, block_size=4)
        self.slots = np.full((12, 4), -1)  # what the cache would hold: the token written to each slot
        self.live: list = []  # type: ignore[type-arg]
        self.next_token = 0

    @rule(target=sequences)
    def new(self):  # type: ignore[no-untyped-def]
        sequence = make_sequence([])
        self.live.append(sequence)
        return sequence

    @rule(sequence=sequences, count=st.integers(1, 9))
    def append(self, sequence, count) -> None:  # type: ignore[no-untyped-def]
        start = sequence.num_computed_tokens
        before = (sequence.block_table.copy(), self.manager.num_free_blocks)
        copies = self.manager.append_slots(sequence, count)
        if copies is None:
            assert (sequence.block_table, self.manager.num_free_blocks) == before
            return
        for src, dst in copies:
            self.slots[dst] = self.slots[src]
        for position in range(start, start + count):
            self.slots[sequence.block_table[position // 4], position % 4] = self.next_token
            sequence.token_ids.append(self.next_token)
            self.next_token += 1
        sequence.num_computed_tokens += count

    @rule(target=sequences, parent=sequences)
    def fork(self, parent):  # type: ignore[no-untyped-def]
        child = make_sequence(parent.token_ids, index=1)
        free = self.manager.num_free_blocks
        self.manager.fork(parent, child)
        assert self.manager.num_free_blocks == free
        child.num_computed_tokens = parent.num_computed_tokens
        self.live.append(child)
        return child

    @rule(sequence=consumes(sequences))
    def free(self, sequence) -> None:  # type: ignore[no-untyped-def]
        self.manager.free(sequence)
        self.live.remove(sequence)

    @invariant()
    def counts_and_contents_hold(self) -> None:
        self.manager.check(self.live)
        for sequence in self.live:
            assert len(sequence.block_table) == -(-sequence.num_computed_tokens // 4)
            held = self.slots[sequence.block_table].reshape(-1)[: sequence.num_computed_tokens]
            assert held.tolist() == sequence.token_ids


TestBlockManagerMachine = BlockManagerMachine.TestCase
TestBlockManagerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
