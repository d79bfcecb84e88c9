"""Who holds which KV block: a free list, reference counts, copy-on-write (PagedAttention, arXiv:2309.06180), and
prefixes that are found again by the hash of their tokens.

A block is free (nobody holds it) or held (by one sequence or more). A full block may be cached besides: its contents
can be found by a later sequence with the same tokens up to the block's end, until the block is needed for others.

    free list:  head -> others | cached: least recently freed ... most recently freed <- tail
                allocate here             free here, a chain's last block first

so a block that holds nothing is taken before one that does (of those the last freed, whose memory is warm), and of the
cached blocks those unused for longest go first, of one chain its end before its beginning.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence as Seq
from dataclasses import dataclass

from tinyllm.engine.prefix_hash import block_hash
from tinyllm.engine.sequence import Sequence

__all__ = ["RELEASED", "BlockManager"]

RELEASED = -1  # stands in a block table where the block was given back because no token will read it again


@dataclass(frozen=True, slots=True)
class _Cached:
    """What a cached block holds: all that its hash was made from, to verify a hit with."""

    digest: bytes
    parent: bytes
    token_ids: tuple[int, ...]


class BlockManager:
    """Hands out blocks of `block_size` token slots, one at a time, as sequences grow."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.ref_counts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._cached: dict[int, _Cached] = {}
        self._block_of: dict[bytes, int] = {}
        self._evicted: list[int] = []

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks whose contents can be found by their hash, held or free."""
        return len(self._cached)

    def is_cached(self, block: int) -> bool:
        return block in self._cached

    # ---- blocks for the tokens to come

    def append_slots(self, sequence: Sequence, num_tokens: int) -> list[tuple[int, int]] | None:
        """Makes room for the next num_tokens tokens to compute, from position num_computed_tokens on.

        Returns:
            Copy-on-write pairs (src, dst) to carry out before the tokens are written: blocks of the sequence that
            others hold too, or that are cached, are replaced by copies of their own. None, and nothing has changed, if
            blocks run short.
        """
        table = sequence.block_table
        start, end = sequence.num_computed_tokens, sequence.num_computed_tokens + num_tokens
        needed = -(-end // self.block_size)
        first_written = start // self.block_size
        if needed == first_written + 1 == len(table) and self._is_own(table[first_written]):
            return []  # most tokens that are decoded
        shared = [i for i in range(first_written, min(needed, len(table))) if not self._is_own(table[i])]
        num_new = max(0, needed - len(table))
        if num_new + len(shared) > len(self._free):
            return None
        copies = []
        for i in shared:
            source, table[i] = table[i], self._allocate()
            self._drop(source)
            copies.append((source, table[i]))
        table.extend(self._allocate() for _ in range(num_new))
        return copies

    def start(
        self, sequence: Sequence, prefix: Seq[int], num_prefix_tokens: int, num_tokens: int
    ) -> list[tuple[int, int]] | None:
        """Gives a sequence without blocks a prefix that is computed already, and room for the tokens after it.

        Args:
            prefix: blocks that hold its first num_prefix_tokens tokens: of find_prefix, or of another sequence.

        Returns:
            As append_slots; None, and nothing has changed, if blocks run short.
        """
        assert not sequence.block_table and sequence.num_computed_tokens == 0
        unseen = self._unseen(sequence, num_prefix_tokens, len(prefix))
        prefix = [RELEASED if i in unseen else block for i, block in enumerate(prefix)]
        idle = sum(1 for block in prefix if block != RELEASED and self.ref_counts[block] == 0)
        needed = max(0, -(-(num_prefix_tokens + num_tokens) // self.block_size) - len(prefix))
        copied = num_prefix_tokens // self.block_size < len(prefix)  # it begins within a block of the prefix
        if needed + copied + idle > len(self._free):
            return None
        self._hold(prefix)
        sequence.block_table = prefix
        sequence.num_computed_tokens = num_prefix_tokens
        sequence.num_hashed_blocks = num_prefix_tokens // self.block_size
        sequence.num_released_blocks = _end_of_released(prefix)
        copies = self.append_slots(sequence, num_tokens)
        assert copies is not None
        return copies

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Gives the child the parent's blocks and state: references, no memory."""
        assert not child.block_table
        self._hold(parent.block_table)
        child.block_table = parent.block_table.copy()
        child.block_hashes = parent.block_hashes.copy()
        child.num_computed_tokens = parent.num_computed_tokens
        child.num_hashed_blocks = parent.num_hashed_blocks
        child.num_released_blocks = parent.num_released_blocks

    def adopt(self, sequence: Sequence, held: Seq[bool]) -> bool:
        """Gives a sequence without blocks one for each that is `held`, and none for the others.

        Their contents are the caller's to write. False, and nothing has changed, if blocks run short.
        """
        assert not sequence.block_table
        if sum(held) > len(self._free):
            return False
        sequence.block_table = [self._allocate() if wanted else RELEASED for wanted in held]
        sequence.num_released_blocks = _end_of_released(sequence.block_table)
        return True

    def free(self, sequence: Sequence) -> None:
        """Drops the sequence's references, its last block first; blocks that nobody holds become free."""
        for block in reversed(sequence.block_table):
            if block != RELEASED:
                self._drop(block)
        sequence.block_table = []
        sequence.num_computed_tokens = sequence.num_hashed_blocks = sequence.num_released_blocks = 0

    def sees_all(self, sequence: Sequence, position: int) -> bool:
        """Whether tokens from `position` on would find all that they read in the sequence's blocks.

        Under a window that holds only where the sequence stands: what earlier tokens would read may have been given
        back, or lies in slots that were never written when the sequence was restored.
        """
        if sequence.request.window is None:
            return True
        released = sequence.num_released_blocks
        stands = min(sequence.num_computed_tokens, sequence.num_tokens - 1)
        return position >= stands and self._unseen(sequence, position, released).stop >= released

    def release_unseen(self, sequence: Sequence) -> None:
        """Gives back the blocks that no token from num_computed_tokens on will read, by the request's window."""
        if sequence.request.window is None:
            return
        unseen = self._unseen(sequence, sequence.num_computed_tokens, len(sequence.block_table))
        for i in range(max(sequence.num_released_blocks, unseen.start), unseen.stop):
            self._drop(sequence.block_table[i])
            sequence.block_table[i] = RELEASED
        sequence.num_released_blocks = max(sequence.num_released_blocks, unseen.stop)

    # ---- prefixes

    def find_prefix(self, sequence: Sequence, max_tokens: int) -> list[int]:
        """The cached blocks of the sequence's first tokens, at most max_tokens of them; nothing changes.

        A block found by its hash is verified: its tokens, and the hash that its own was chained to, must be the same.
        """
        blocks: list[int] = []
        if not self.prefix_caching:
            return blocks
        for i in range(max_tokens // self.block_size):
            found = self._block_of.get(self._chain(sequence, i + 1)[i])
            if found is None or not self._holds(found, sequence, i):
                break
            blocks.append(found)
        return blocks

    def cache_full_blocks(self, sequence: Sequence, num_tokens: int) -> list[int]:
        """Lets others find the blocks that lie within the sequence's first num_tokens tokens.

        To be called when those tokens are computed, or will be in the step at hand: attention reads a block after the
        step's keys and values are written, so that a neighbour in the same step may share it.

        Returns:
            The blocks that were not cached before.
        """
        new: list[int] = []
        end = num_tokens // self.block_size if self.prefix_caching else 0
        for i in range(sequence.num_hashed_blocks, end):
            block, digest = sequence.block_table[i], self._chain(sequence, i + 1)[i]
            if block != RELEASED and block not in self._cached and digest not in self._block_of:
                self._cached[block] = _Cached(digest, self._parent(sequence, i), self._tokens(sequence, i))
                self._block_of[digest] = block
                new.append(block)
        sequence.num_hashed_blocks = max(sequence.num_hashed_blocks, end)
        return new

    def uncache(self, blocks: Iterable[int]) -> None:
        """Makes blocks unfindable: what was to be written there was not."""
        for block in blocks:
            cached = self._cached.pop(block, None)
            if cached is not None:
                del self._block_of[cached.digest]

    def take_evicted(self) -> list[int]:
        """The blocks whose cached contents were given up since the last call, in order."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Asserts the invariants: free + held == total, counts equal the tables that name a block, none is both."""
        named = Counter(b for sequence in sequences for b in sequence.block_table if b != RELEASED)
        for block, count in enumerate(self.ref_counts):
            assert count == named[block], f"block {block} has {count} references but stands in {named[block]} tables"
            assert (count == 0) == (block in self._free), f"block {block} has {count} references, free list disagrees"
        assert len(self._free) + len(named) == self.num_blocks
        assert len(self._block_of) == len(self._cached)
        for block, cached in self._cached.items():
            assert self._block_of[cached.digest] == block, f"block {block} is cached, but cannot be found"
            assert block_hash(cached.parent, cached.token_ids) == cached.digest
            assert len(cached.token_ids) == self.block_size

    # ---- parts

    def _unseen(self, sequence: Sequence, num_computed_tokens: int, num_blocks: int) -> range:
        """Which of its first blocks no token from num_computed_tokens on will read, by the request's window."""
        window = sequence.request.window
        if window is None:
            return range(0)
        # the next token sees the keys after num_computed_tokens - window, and the sinks
        end = min(max(0, num_computed_tokens + 1 - window) // self.block_size, num_blocks)
        return range(-(-sequence.request.sinks // self.block_size), end)

    def _is_own(self, block: int) -> bool:
        """Whether its one holder may write to it."""
        return self.ref_counts[block] == 1 and block not in self._cached

    def _allocate(self) -> int:
        block, _ = self._free.popitem(last=False)
        assert self.ref_counts[block] == 0
        if block in self._cached:
            self.uncache([block])
            self._evicted.append(block)
        self.ref_counts[block] = 1
        return block

    def _hold(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            if block != RELEASED:
                if self.ref_counts[block] == 0:
                    del self._free[block]
                self.ref_counts[block] += 1

    def _drop(self, block: int) -> None:
        self.ref_counts[block] -= 1
        if self.ref_counts[block] == 0:
            self._free[block] = None
            if block not in self._cached:
                self._free.move_to_end(block, last=False)

    def _tokens(self, sequence: Sequence, i: int) -> tuple[int, ...]:
        return tuple(sequence.token_ids[i * self.block_size : (i + 1) * self.block_size])

    def _chain(self, sequence: Sequence, count: int) -> list[bytes]:
        """The hashes of the sequence's first blocks, at least `count` of them; computed once each."""
        hashes = sequence.block_hashes
        while len(hashes) < count:
            i = len(hashes)
            hashes.append(block_hash(self._parent(sequence, i), self._tokens(sequence, i)))
        return hashes

    def _parent(self, sequence: Sequence, i: int) -> bytes:
        return sequence.block_hashes[i - 1] if i else sequence.request.prefix_root

    def _holds(self, block: int, sequence: Sequence, i: int) -> bool:
        cached = self._cached[block]
        return cached.token_ids == self._tokens(sequence, i) and cached.parent == self._parent(sequence, i)


def _end_of_released(table: Seq[int]) -> int:
    """How many blocks of a table lie before the end of the gap that was given back; 0 without one."""
    return max((i for i, block in enumerate(table, 1) if block == RELEASED), default=0)
