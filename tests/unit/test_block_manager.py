"""The block manager: exact block ids, reference counts and free order, and its invariants under random use."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from tests.unit.sequences import make_sequence
from tests.unit.simulated_engine import SimulatedCache, new_sequence
from tinyllm.engine import block_manager
from tinyllm.engine.block_manager import RELEASED, BlockManager
from tinyllm.engine.prefix_hash import block_hash, root_hash
from tinyllm.engine.sequence import Sequence


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
    assert c.block_table == [0, 2, 3, 4, 5], "blocks that hold nothing are taken again first, as they lay in a sequence"


def test_a_free_block_that_holds_nothing_is_taken_before_a_cached_one() -> None:
    manager = BlockManager(num_blocks=4, block_size=4)
    a, b = computed(manager, make_sequence(range(8))), computed(manager, make_sequence(range(10, 16)))
    assert (a.block_table, b.block_table) == ([0, 1], [2, 3])
    manager.free(a)
    manager.free(b)
    c = make_sequence(range(20, 36))
    assert manager.append_slots(c, 5) == []
    assert (c.block_table, manager.take_evicted()) == ([3, 1], [1]), "the block half full, then a cached chain's end"


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


def computed(manager: BlockManager, sequence: Sequence) -> Sequence:
    """The sequence with all its tokens in the cache, and findable."""
    assert manager.append_slots(sequence, sequence.num_due_tokens) == []
    manager.cache_full_blocks(sequence, sequence.num_tokens)
    sequence.num_computed_tokens = sequence.num_tokens
    return sequence


def test_a_prefix_is_found_block_by_block_and_the_last_token_always_runs() -> None:
    manager = BlockManager(num_blocks=8, block_size=4)
    computed(manager, make_sequence(range(12)))
    for length, blocks in ((3, []), (4, []), (5, [0]), (8, [0]), (9, [0, 1]), (12, [0, 1]), (13, [0, 1, 2])):
        sequence = make_sequence(range(length))
        assert manager.find_prefix(sequence, sequence.max_prefix_tokens) == blocks
    assert manager.find_prefix(make_sequence([9, *range(1, 12)]), 11) == []
    assert manager.find_prefix(make_sequence([0, 1, 2, 3, 9, 5, 6, 7, 8]), 8) == [0]


def test_what_keys_and_values_depend_on_besides_the_tokens_keeps_prefixes_apart() -> None:
    manager = BlockManager(num_blocks=64, block_size=4)
    kinds: list[dict[str, Any]] = [{}, {"salt": "a"}, {"salt": "b"}, {"window": 9}, {"window": 8}]
    kinds += [{"window": 9, "sinks": 2}, {"window": 9, "salt": "a"}]
    for kind in kinds:
        computed(manager, new_sequence(list(range(8)), **kind))
    tables = [manager.find_prefix(new_sequence(list(range(9)), **kind), 8) for kind in kinds]
    assert [len(table) for table in tables] == [2] * len(kinds)
    assert len({block for table in tables for block in table}) == 2 * len(kinds)


def test_a_block_is_verified_when_hashes_collide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_manager, "block_hash", lambda parent, token_ids: b"the same")
    manager = BlockManager(num_blocks=8, block_size=4)
    computed(manager, make_sequence(range(4)))
    assert manager.find_prefix(make_sequence([*range(4), 9]), 4) == [0]
    assert manager.find_prefix(make_sequence([1, 1, 1, 1, 9]), 4) == []
    assert manager.find_prefix(new_sequence([*range(4), 9], salt="other"), 4) == []


def test_the_second_of_two_equal_blocks_stays_private() -> None:
    manager = BlockManager(num_blocks=8, block_size=4)
    a, b = make_sequence(range(4)), make_sequence(range(4))
    assert manager.append_slots(a, 4) == manager.append_slots(b, 4) == []
    assert manager.cache_full_blocks(a, 4) == [0]
    assert manager.cache_full_blocks(b, 4) == []
    assert manager.num_cached_blocks == 1
    assert manager.find_prefix(make_sequence(range(5)), 4) == [0]


def test_free_cached_blocks_are_evicted_least_recently_freed_first_and_tails_before_heads() -> None:
    manager = BlockManager(num_blocks=6, block_size=4)
    a, b = computed(manager, make_sequence(range(8))), computed(manager, make_sequence(range(10, 18)))
    manager.free(a)
    manager.free(b)
    assert manager.num_free_blocks == 6 and manager.num_cached_blocks == 4
    taker = make_sequence(range(30, 44))
    assert manager.append_slots(taker, 14) == []
    assert taker.block_table == [4, 5, 1, 0], "those that never held anything, then the end of the older chain"
    assert manager.take_evicted() == [1, 0]
    assert manager.take_evicted() == []
    assert manager.find_prefix(make_sequence(range(9)), 8) == []
    assert manager.find_prefix(make_sequence(range(10, 19)), 8) == [2, 3]


def test_a_hit_makes_a_free_block_recent_again() -> None:
    manager = BlockManager(num_blocks=4, block_size=4)
    a, b = computed(manager, make_sequence(range(8))), computed(manager, make_sequence(range(10, 18)))
    manager.free(a)
    manager.free(b)
    again = make_sequence(range(9))
    assert manager.start(again, manager.find_prefix(again, 8), 8, 1) == []
    assert again.block_table == [0, 1, 3], "its own chain is held, so the other one's end is given up"
    assert manager.take_evicted() == [3]
    manager.free(again)
    last = make_sequence(range(20, 36))
    assert manager.append_slots(last, 16) == []
    assert last.block_table == [3, 2, 1, 0], "the block that holds nothing first"


def test_to_write_in_a_cached_block_is_to_copy_it() -> None:
    manager = BlockManager(num_blocks=4, block_size=4)
    parent = computed(manager, make_sequence(range(8)))
    child = make_sequence(range(8))
    assert manager.start(child, parent.block_table, 7, 1) == [(1, 2)]
    assert (child.block_table, manager.ref_counts) == ([0, 2], [2, 1, 1, 0])
    manager.free(child)
    manager.free(parent)
    assert manager.find_prefix(make_sequence(range(9)), 8) == [0, 1]


def test_its_one_holder_does_not_write_in_a_cached_block_either() -> None:
    manager = BlockManager(num_blocks=4, block_size=4)
    parent = computed(manager, make_sequence(range(8)))
    blocks = parent.block_table
    manager.free(parent)
    child = make_sequence(range(8))
    assert manager.start(child, blocks, 7, 1) == [(1, 2)]
    assert (child.block_table, manager.ref_counts) == ([0, 2], [1, 0, 1, 0])


def test_a_hash_is_of_all_tokens_and_of_what_came_before() -> None:
    names = [
        block_hash(root, tokens) for root in (b"a", b"b") for tokens in ([1, 2], [1, 3], [3, 2], [2, 1], [1], [0, 1, 2])
    ]
    assert len(set(names)) == len(names)


def test_uncached_blocks_are_not_found() -> None:
    manager = BlockManager(num_blocks=4, block_size=4)
    sequence = make_sequence(range(8))
    manager.append_slots(sequence, 8)
    new = manager.cache_full_blocks(sequence, 8)
    assert new == [0, 1]
    manager.uncache(new[1:])
    assert manager.find_prefix(make_sequence(range(9)), 8) == [0]


def test_blocks_between_the_sinks_and_the_window_are_given_back() -> None:
    """A window of 6: the query at 21 sees 16 to 21; sinks 0 to 4 lie in blocks 0 and 1."""
    manager = BlockManager(num_blocks=8, block_size=4)
    sequence = computed(manager, new_sequence(list(range(21)), window=6, sinks=5))
    manager.release_unseen(sequence)
    assert sequence.block_table == [0, 1, RELEASED, RELEASED, 4, 5]
    assert manager.num_free_blocks == 4
    sequence.num_computed_tokens = 24  # the query at 24 sees 19 to 24
    manager.release_unseen(sequence)
    assert sequence.block_table == [0, 1, RELEASED, RELEASED, 4, 5]
    sequence.num_computed_tokens = 25
    manager.release_unseen(sequence)
    assert sequence.block_table == [0, 1, RELEASED, RELEASED, RELEASED, 5]
    manager.check([sequence])
    manager.free(sequence)
    manager.check([])


def test_of_a_cached_prefix_a_window_holds_only_what_it_will_see() -> None:
    manager = BlockManager(num_blocks=8, block_size=4)
    kind: dict[str, Any] = {"window": 6, "sinks": 1}
    first = computed(manager, new_sequence(list(range(24)), **kind))
    manager.free(first)
    again = new_sequence(list(range(25)), **kind)
    assert manager.start(again, manager.find_prefix(again, 24), 24, 1) == []
    assert again.block_table == [0, RELEASED, RELEASED, RELEASED, 4, 5, 6]
    manager.check([again])


def test_no_prefixes_without_prefix_caching() -> None:
    manager = BlockManager(num_blocks=8, block_size=4, prefix_caching=False)
    computed(manager, make_sequence(range(12)))
    assert manager.num_cached_blocks == 0
    assert manager.find_prefix(make_sequence(range(12)), 11) == []


class BlockManagerMachine(RuleBasedStateMachine):
    """Random use beside a cache that holds what was written where: each sequence reads back its own tokens alone.

    The order of the free list is predicted for every operation: what is taken from its head, what is put at its end.
    """

    sequences = Bundle("sequences")

    @initialize(num_blocks=st.integers(5, 14), block_size=st.sampled_from([1, 2, 4]), prefix_caching=st.booleans())
    def begin(self, num_blocks: int, block_size: int, prefix_caching: bool) -> None:
        self.manager = BlockManager(num_blocks, block_size, prefix_caching=prefix_caching)
        self.cache = SimulatedCache(num_blocks, block_size)
        self.contents: dict[int, list[Any]] = {}  # of the cached blocks: they never change
        self.live: list[Sequence] = []

    @rule(
        target=sequences,
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        kind=st.sampled_from([{}, {}, {"salt": "other"}, {"window": 3, "sinks": 2}, {"window": 5}]),
        count=st.integers(1, 20),
        whole=st.booleans(),
    )
    def start(self, tokens: list[int], kind: dict[str, Any], count: int, whole: bool) -> Any:
        sequence = new_sequence(tokens, **kind)
        prefix = self.manager.find_prefix(sequence, sequence.max_prefix_tokens)
        reached = len(prefix) * self.manager.block_size
        return self._start(sequence, prefix, reached, count)

    @rule(target=sequences, parent=sequences, more=st.lists(st.integers(0, 1), max_size=4), back=st.integers(0, 6))
    def resume(self, parent: Sequence, more: list[int], back: int) -> Any:
        """From within what another has computed, as far as it has kept what will be read."""
        request = parent.request
        sequence = new_sequence([*parent.token_ids, *more], window=request.window, sinks=request.sinks)
        sequence.request.prefix_root = request.prefix_root
        at = min(parent.num_computed_tokens - back, sequence.num_tokens - 1)
        if at < 1 or not self.manager.sees_all(parent, at):
            return multiple()
        return self._start(sequence, parent.block_table[: -(-at // self.manager.block_size)], at, 1)

    @rule(
        sequence=sequences,
        token=st.integers(0, 1),
        count=st.integers(1, 9),
        interrupted=st.sampled_from([False] * 5 + [True]),
    )
    def append(self, sequence: Sequence, token: int, count: int, interrupted: bool) -> None:
        manager = self.manager
        sequence.token_ids.append(token)
        count = min(count, sequence.num_due_tokens)
        before = (sequence.block_table.copy(), list(manager._free), manager.ref_counts.copy())
        copies = manager.append_slots(sequence, count)
        if copies is None:
            assert (sequence.block_table, list(manager._free), manager.ref_counts) == before, "nothing has changed"
            return
        assert [dst for _, dst in copies] == before[1][: len(copies)], "copies take the head of the free list"
        self._write(sequence, count, copies, interrupted)

    @rule(target=sequences, parent=sequences)
    def fork(self, parent: Sequence) -> Any:
        child = make_sequence(parent.token_ids, request=parent.request)
        free = list(self.manager._free)
        self.manager.fork(parent, child)
        assert list(self.manager._free) == free, "no memory"
        self.live.append(child)
        return child

    @rule(target=sequences, source=sequences)
    def adopt(self, source: Sequence) -> Any:
        """A copy in blocks of its own, as after a snapshot."""
        child = new_sequence(source.token_ids, window=source.request.window, sinks=source.request.sinks)
        child.request.prefix_root = root_hash("adopted", id(child))
        held = [block != RELEASED for block in source.block_table]
        free = list(self.manager._free)
        if not self.manager.adopt(child, held):
            assert sum(held) > len(free) and child.block_table == []
            return multiple()
        assert [b for b in child.block_table if b != RELEASED] == free[: sum(held)]
        child.num_computed_tokens, child.num_hashed_blocks = source.num_computed_tokens, len(held)
        size = self.manager.block_size
        for i, wanted in enumerate(held):
            if wanted:
                self.cache.write(child, i * size, min((i + 1) * size, child.num_computed_tokens))
        self._note_evicted(free[: sum(held)])
        self.live.append(child)
        return child

    @rule(sequence=sequences)
    def release_unseen(self, sequence: Sequence) -> None:
        free, table = list(self.manager._free), sequence.block_table.copy()
        self.manager.release_unseen(sequence)
        gone = [b for b, now in zip(table, sequence.block_table, strict=True) if b != now]
        assert list(self.manager._free) == self._after_freeing(free, gone)

    @rule(sequence=consumes(sequences))
    def free(self, sequence: Sequence) -> None:
        free, table = list(self.manager._free), sequence.block_table
        self.manager.free(sequence)
        assert list(self.manager._free) == self._after_freeing(free, [b for b in reversed(table) if b != RELEASED])
        self.live.remove(sequence)

    def _after_freeing(self, free: list[int], dropped: list[int]) -> list[int]:
        """Cached blocks go to the end of the list, those that hold nothing to its beginning."""
        freed = [b for b in dropped if self.manager.ref_counts[b] == 0]
        cached = [b for b in freed if self.manager.is_cached(b)]
        return [b for b in reversed(freed) if not self.manager.is_cached(b)] + free + cached

    @invariant()
    def everyone_reads_what_it_wrote(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.manager.check(self.live)
        for sequence in self.live:
            assert len(sequence.block_table) == -(-sequence.num_computed_tokens // self.manager.block_size)
            if sequence.num_computed_tokens:
                self.cache.read(sequence, sequence.num_computed_tokens - 1, but_not_released=True)
        for block, contents in self.contents.items():
            assert self.cache.slots[block] == contents, "a cached block was overwritten"

    def _start(self, sequence: Sequence, prefix: list[int], at: int, count: int) -> Any:
        manager = self.manager
        count = min(count, sequence.num_tokens - at)
        before = (list(manager._free), manager.ref_counts.copy())
        copies = manager.start(sequence, prefix, at, count)
        if copies is None:
            assert (list(manager._free), manager.ref_counts, sequence.block_table) == (*before, [])
            return multiple()
        assert sequence.num_computed_tokens == at < sequence.num_tokens
        self.live.append(sequence)
        self._write(sequence, count, copies, interrupted=False)
        return sequence

    def _write(self, sequence: Sequence, count: int, copies: list[tuple[int, int]], interrupted: bool) -> None:
        """What a step does with the slots; one that is interrupted leaves anything there, and is undone."""
        start, end = sequence.num_computed_tokens, sequence.num_computed_tokens + count
        new = self.manager.cache_full_blocks(sequence, end)
        self._note_evicted()
        self.cache.copy(copies)
        if interrupted:
            self.cache.spoil(sequence, start, end)
            self.manager.uncache(new)
            self.manager.free(sequence)
            return
        self.cache.write(sequence, start, end)
        sequence.num_computed_tokens = end
        for block in new:
            self.contents[block] = self.cache.slots[block].copy()

    def _note_evicted(self, taken: list[int] | None = None) -> None:
        """Evicted are those blocks that were found before, in the order in which they were taken."""
        evicted = self.manager.take_evicted()
        if taken is not None:
            assert evicted == [block for block in taken if block in self.contents]
        for block in evicted:
            del self.contents[block]


TestBlockManagerMachine = BlockManagerMachine.TestCase
TestBlockManagerMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
