"""Which tokens run in the next step. There are no phases: every sequence has tokens due, one or many.

Running sequences come first, those with a single token due (decoding) before those with more (prefilling, or
catching up after a preemption), each group in order of arrival; what is left of the budget goes to the waiting ones.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from tinyllm.engine.block_manager import BlockManager
from tinyllm.engine.sequence import Sequence, SequenceStatus

__all__ = ["ScheduledSequence", "Scheduler", "SchedulerOutput"]


@dataclass(frozen=True)
class ScheduledSequence:
    """A sequence and how many of its due tokens run in this step."""

    sequence: Sequence
    num_tokens: int


@dataclass(frozen=True)
class SchedulerOutput:
    """One step's work.

    Attributes:
        scheduled: what runs, in the order of the batch.
        copies: the blocks (src, dst) to copy before it, in order.
        preempted: sequences that lost their blocks to others, and wait to be computed again.
        admitted: sequences that began to run in this step, with the number of tokens found in the prefix cache.
        evicted: blocks whose cached prefix was given up because the block was needed.
    """

    scheduled: list[ScheduledSequence]
    copies: list[tuple[int, int]]
    preempted: list[Sequence]
    admitted: list[tuple[Sequence, int]]
    evicted: list[int]


class Scheduler:
    """Continuous batching under a token budget, with preemption by recomputation when blocks run out."""

    def __init__(self, block_manager: BlockManager, *, max_batch_tokens: int, max_num_seqs: int) -> None:
        self.block_manager = block_manager
        self.max_batch_tokens = max_batch_tokens
        self.max_num_seqs = max_num_seqs
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Puts a new sequence at the end of the queue."""
        self.waiting.append(sequence)

    def add_fork(self, parent: Sequence, child: Sequence) -> None:
        """Lets a child run on from the parent's state, on the parent's blocks."""
        self.block_manager.fork(parent, child)
        child.num_computed_tokens = parent.num_computed_tokens
        child.status = SequenceStatus.RUNNING
        self.running.append(child)

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and frees its blocks."""
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is SequenceStatus.WAITING:
            self.waiting.remove(sequence)
        self.block_manager.free(sequence)
        sequence.status = SequenceStatus.FINISHED

    def schedule(self) -> SchedulerOutput:
        """Chooses the next step's tokens and gives them blocks."""
        budget = self.max_batch_tokens
        chosen: dict[Sequence, int] = {}
        copies: list[tuple[int, int]] = []
        preempted: list[Sequence] = []
        for sequence in sorted(self.running, key=lambda s: (s.num_due_tokens > 1, s.order)):
            if sequence.status is not SequenceStatus.RUNNING:  # preempted for one before it
                continue
            num_tokens = min(sequence.num_due_tokens, budget)
            if num_tokens == 0:
                break
            while (new_copies := self.block_manager.append_slots(sequence, num_tokens)) is None:
                victim = max(self.running, key=lambda s: s.order)
                budget += chosen.pop(victim, 0)
                self._preempt(victim)
                preempted.append(victim)
                if victim is sequence:
                    break
            if new_copies is not None:
                copies += new_copies
                chosen[sequence] = num_tokens
                budget -= num_tokens
        if not preempted:
            budget = self._admit(budget, chosen, copies)
        return SchedulerOutput([ScheduledSequence(s, n) for s, n in chosen.items()], copies, preempted, [], [])

    def _admit(self, budget: int, chosen: dict[Sequence, int], copies: list[tuple[int, int]]) -> int:
        """Starts waiting sequences, in order, while budget, places and blocks last."""
        places = self.max_num_seqs - sum(map(_places, self.running))
        while self.waiting and budget > 0 and (places := places - _places(self.waiting[0])) >= 0:
            sequence = self.waiting[0]
            num_tokens = min(sequence.num_due_tokens, budget)
            new_copies = self.block_manager.append_slots(sequence, num_tokens)
            if new_copies is None:
                break
            self.waiting.popleft()
            sequence.status = SequenceStatus.RUNNING
            self.running.append(sequence)
            copies += new_copies
            chosen[sequence] = num_tokens
            budget -= num_tokens
        return budget

    def _preempt(self, sequence: Sequence) -> None:
        """Takes the blocks from a running sequence; it waits, in order of arrival, to be computed again."""
        self.running.remove(sequence)
        self.block_manager.free(sequence)
        sequence.num_computed_tokens = 0
        sequence.status = SequenceStatus.WAITING
        at = sum(1 for other in self.waiting if other.order < sequence.order)
        self.waiting.insert(at, sequence)


def _places(sequence: Sequence) -> int:
    """How many sequences this one is or will be: n until its request has forked."""
    return 1 if sequence.request.forked else sequence.request.params.n
