"""Who holds which KV block: a free list, reference counts, and copy-on-write (PagedAttention, arXiv:2309.06180)."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from tinyllm.engine.sequence import Sequence

__all__ = ["BlockManager"]


class BlockManager:
    """Hands out blocks of `block_size` token slots, one at a time, as sequences grow.

    Blocks are taken from the head of the free list and given back at its tail.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.ref_counts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def append_slots(self, sequence: Sequence, num_tokens: int) -> list[tuple[int, int]] | None:
        """Makes room for the next num_tokens tokens to compute, from position num_computed_tokens on.

        Returns:
            Copy-on-write pairs (src, dst) to carry out before the tokens are written: blocks of the sequence that
            others hold too are replaced by copies of their own. None, and nothing has changed, if blocks run short.
        """
        table = sequence.block_table
        start, end = sequence.num_computed_tokens, sequence.num_computed_tokens + num_tokens
        needed = -(-end // self.block_size)
        first_written = start // self.block_size
        shared = [i for i in range(first_written, min(needed, len(table))) if self.ref_counts[table[i]] > 1]
        num_new = max(0, needed - len(table))
        if num_new + len(shared) > len(self._free):
            return None
        copies = []
        for i in shared:
            source, table[i] = table[i], self._allocate()
            self.ref_counts[source] -= 1
            copies.append((source, table[i]))
        table.extend(self._allocate() for _ in range(num_new))
        return copies

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Gives the child the parent's blocks: references, no memory."""
        assert not child.block_table
        child.block_table = parent.block_table.copy()
        for block in child.block_table:
            self.ref_counts[block] += 1

    def free(self, sequence: Sequence) -> None:
        """Drops the sequence's references, its last block first; blocks that nobody holds become free."""
        for block in reversed(sequence.block_table):
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                self._free[block] = None
        sequence.block_table = []

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Asserts the invariants: free + held == total, counts equal the tables that name a block, none is both."""
        named = Counter(block for sequence in sequences for block in sequence.block_table)
        for block, count in enumerate(self.ref_counts):
            assert count == named[block], f"block {block} has {count} references but stands in {named[block]} tables"
            assert (count == 0) == (block in self._free), f"block {block} has {count} references, free list disagrees"
        assert len(self._free) + len(named) == self.num_blocks

    def _allocate(self) -> int:
        block, _ = self._free.popitem(last=False)
        assert self.ref_counts[block] == 0
        self.ref_counts[block] = 1
        return block
