"""Which tokens run in the next step. There are no phases: every sequence has tokens due, one or many.

Running sequences come first, those with a single token due (decoding) before those with more (prefilling, or
catching up after a preemption), each group by priority and arrival; what is left of the budget goes to the waiting
ones. With a StallLimit, a step that decodes takes only so many prefilling tokens as do not hold up the decoding ones.
When blocks run out, those at rest lose theirs first, then the lowest priority and the latest arrival.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

from tinyllm.engine.block_manager import BlockManager
from tinyllm.engine.sequence import Request, Sequence, SequenceStatus
from tinyllm.step_cost import StallLimit

__all__ = ["ScheduledSequence", "Scheduler", "SchedulerOutput", "max_windowed_chunk"]


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
        preempted: sequences that lost their blocks to others, and will be computed again.
        admitted: sequences that began to run in this step, with the number of tokens that were computed already.
        evicted: blocks whose cached prefix was given up because the block was needed.
        newly_cached: blocks that others may find from now on; some are only written in this step.
    """

    scheduled: list[ScheduledSequence]
    copies: list[tuple[int, int]]
    preempted: list[Sequence]
    admitted: list[tuple[Sequence, int]]
    evicted: list[int]
    newly_cached: list[int]


@dataclass
class _Step:
    """A SchedulerOutput in the making.

    Attributes:
        decoding_cost: of the tokens that decode, by the scheduler's StallLimit.
        allowance: what prefilling may still cost; None until some asks for it.
    """

    budget: int
    decoding_cost: float = 0.0
    allowance: float | None = None
    chosen: dict[Sequence, tuple[int, list[tuple[int, int]]]] = field(default_factory=dict)
    preempted: list[Sequence] = field(default_factory=list)
    admitted: list[tuple[Sequence, int]] = field(default_factory=list)
    newly_cached: list[int] = field(default_factory=list)

    def choose(self, sequence: Sequence, num_tokens: int, copies: list[tuple[int, int]]) -> None:
        self.chosen[sequence] = num_tokens, copies
        self.budget -= num_tokens

    def drop(self, sequence: Sequence) -> None:
        self.budget += self.chosen.pop(sequence, (0, []))[0]


class Scheduler:
    """Continuous batching under a token budget, with preemption by recomputation when blocks run out.

    Attributes:
        waiting, running: in order; a running sequence holds blocks and is part of every step that the budget allows.
        parked: finished sequences whose blocks are kept as long as nobody needs them, least recently parked first.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        *,
        max_batch_tokens: int,
        max_num_seqs: int,
        stall_limit: StallLimit | None = None,
    ) -> None:
        self.block_manager = block_manager
        self.stall_limit = stall_limit
        self.max_batch_tokens = max_batch_tokens
        self.max_num_seqs = max_num_seqs
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.parked: dict[Sequence, None] = {}

    # ---- sequences in and out

    def add(self, sequence: Sequence) -> None:
        """Puts a new sequence in the queue, behind those of its priority."""
        insort(self.waiting, sequence, key=lambda other: other.order)

    def add_fork(self, parent: Sequence, child: Sequence) -> None:
        """Lets a child run on from the parent's state, on the parent's blocks, or wait with a parent that lost its."""
        self.block_manager.fork(parent, child)
        child.status = parent.status
        if child.status is SequenceStatus.RUNNING:
            self.running.append(child)
        else:
            self.add(child)

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and frees its blocks."""
        self._take_out(sequence)
        self.block_manager.free(sequence)
        sequence.status = SequenceStatus.FINISHED

    def park(self, sequence: Sequence) -> None:
        """Takes a sequence out, but keeps its blocks until someone needs them."""
        self._take_out(sequence)
        sequence.status = SequenceStatus.PARKED
        self.parked[sequence] = None

    def _take_out(self, sequence: Sequence) -> None:
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is SequenceStatus.WAITING:
            self.waiting.remove(sequence)
        elif sequence.status is SequenceStatus.PARKED:
            self.parked.pop(sequence, None)

    # ---- the step

    def schedule(self) -> SchedulerOutput:
        """Chooses the next step's tokens and gives them blocks."""
        step = _Step(self.max_batch_tokens)
        for sequence in self.running:
            self.block_manager.release_unseen(sequence)
        self._yield_to_urgent(step)
        blocks_ran_out = self._continue_running(step)
        for sequence, (num_tokens, _) in step.chosen.items():
            self._cache_blocks(step, sequence, num_tokens)
        if not blocks_ran_out or not step.chosen:
            self._admit_waiting(step)
        return SchedulerOutput(
            scheduled=[ScheduledSequence(sequence, n) for sequence, (n, _) in step.chosen.items()],
            copies=[pair for _, copies in step.chosen.values() for pair in copies],
            preempted=step.preempted,
            admitted=step.admitted,
            evicted=self.block_manager.take_evicted(),
            newly_cached=step.newly_cached,
        )

    def undo(self, output: SchedulerOutput) -> None:
        """Takes back a step that was scheduled but not run to its end: its sequences will be computed again."""
        self.block_manager.uncache(output.newly_cached)
        requests = {item.sequence.request for item in output.scheduled}
        for sequence in [s for s in self.running if s.request in requests]:  # those forked off meanwhile too
            self._preempt(sequence)

    def _yield_to_urgent(self, step: _Step) -> None:
        """Where the first in the queue has no room, running sequences of lower priority make it."""
        first = next((sequence for sequence in self.waiting if sequence.num_due_tokens > 0), None)
        while first is not None and self.running:
            last = max(self.running, key=lambda s: s.order)
            if last.request.params.priority >= first.request.params.priority:
                return
            num_tokens = min(first.num_due_tokens, self.max_batch_tokens, self._max_chunk(first))
            if self._free_places() < self._places(first):
                victim = last
            elif -(-num_tokens // self.block_manager.block_size) <= self.block_manager.num_free_blocks:
                return
            else:
                victim = self._victim()
            self._preempt(victim)
            step.preempted.append(victim)

    def _continue_running(self, step: _Step) -> bool:
        """Returns whether some running sequence had to be preempted."""
        ran_out = False
        for sequence in sorted(self.running, key=lambda s: (s.num_due_tokens > 1, s.order)):
            if sequence.status is not SequenceStatus.RUNNING:  # preempted for one before it
                continue
            num_tokens = min(sequence.num_due_tokens, step.budget, self._max_chunk(sequence))
            if num_tokens > 1:
                num_tokens = self._within_stall(step, num_tokens, sequence.num_computed_tokens)
            if num_tokens == 0:  # no budget, or a beam that waits for others
                continue
            while (copies := self.block_manager.append_slots(sequence, num_tokens)) is None:
                victim = self._victim()
                ran_out = ran_out or victim.status is SequenceStatus.RUNNING
                step.drop(victim)
                self._preempt(victim)
                step.preempted.append(victim)
                if victim is sequence:
                    break
            if copies is not None:
                self._choose(step, sequence, num_tokens, copies)
        return ran_out

    def _choose(self, step: _Step, sequence: Sequence, num_tokens: int, copies: list[tuple[int, int]]) -> None:
        if self.stall_limit is not None:
            cost = self.stall_limit.cost.of_tokens(num_tokens, sequence.num_computed_tokens)
            if step.allowance is not None:
                step.allowance -= cost
            elif sequence.num_due_tokens == 1:
                step.decoding_cost += cost
        step.choose(sequence, num_tokens, copies)

    def _within_stall(self, step: _Step, num_tokens: int, context: int) -> int:
        """How many of a sequence's tokens, prefilled behind `context` others, do not hold up the decoding ones.

        The first that asks gets one token at least: a prompt always moves on.
        """
        limit = self.stall_limit
        if limit is None or step.decoding_cost == 0:
            return num_tokens
        least = 0
        if step.allowance is None:  # all that decode have been chosen
            step.allowance = limit.allowance(step.decoding_cost)
            least = 1
        return min(num_tokens, max(least, limit.cost.most_tokens(step.allowance, context)))

    def _admit_waiting(self, step: _Step) -> None:
        """Starts waiting sequences, in order, while budget, places and blocks last."""
        if not self.waiting:
            return
        places, at = self._free_places(), 0
        while at < len(self.waiting) and step.budget > 0:
            sequence = self.waiting[at]
            needed = self._places(sequence)
            if sequence.num_due_tokens == 0 or (needed > places and not step.chosen):
                at += 1  # where nothing else runs, beams at rest may be waiting for one further back
            elif needed > places or not self._try_admit(step, sequence):
                return
            else:
                places -= needed

    def _try_admit(self, step: _Step, sequence: Sequence) -> bool:
        while True:
            prefix, num_prefix_tokens = self._find_prefix(sequence)
            num_tokens = min(sequence.num_tokens - num_prefix_tokens, step.budget, self._max_chunk(sequence))
            num_tokens = self._within_stall(step, num_tokens, num_prefix_tokens)
            if num_tokens == 0:
                return False
            copies = self.block_manager.start(sequence, prefix, num_prefix_tokens, num_tokens)
            if copies is not None:
                break
            # parked sequences give way to anyone; beams at rest do when nothing else could run
            if not self.parked and (step.chosen or not self.running):
                return False
            victim = self._victim()
            self._preempt(victim)
            step.preempted.append(victim)
        self.waiting.remove(sequence)
        self.running.append(sequence)
        sequence.status = SequenceStatus.RUNNING
        if sequence.request.num_cached_tokens is None:
            sequence.request.num_cached_tokens = num_prefix_tokens
        step.admitted.append((sequence, num_prefix_tokens))
        self._choose(step, sequence, num_tokens, copies)
        self._cache_blocks(step, sequence, num_tokens)
        return True

    def _find_prefix(self, sequence: Sequence) -> tuple[list[int], int]:
        """What of the sequence is computed already, in blocks and tokens: what it resumes, or what the cache holds."""
        prefix = self.block_manager.find_prefix(sequence, sequence.max_prefix_tokens)
        num_tokens = len(prefix) * self.block_manager.block_size
        parent = sequence.request.resume_from
        if parent is not None:
            resumed = min(parent.num_computed_tokens, sequence.max_prefix_tokens)
            if resumed > num_tokens and self.block_manager.sees_all(parent, resumed):
                return parent.block_table[: -(-resumed // self.block_manager.block_size)], resumed
        return prefix, num_tokens

    def _cache_blocks(self, step: _Step, sequence: Sequence, num_tokens: int) -> None:
        step.newly_cached += self.block_manager.cache_full_blocks(sequence, sequence.num_computed_tokens + num_tokens)

    def _max_chunk(self, sequence: Sequence) -> int:
        """The most tokens that may run at once: with a window, a chunk and all that it sees must fit in the cache."""
        blocks, request = self.block_manager, sequence.request
        if request.window is None or request.max_len <= blocks.num_blocks * blocks.block_size:
            return sequence.num_tokens
        return max_windowed_chunk(request.window, request.sinks, blocks.num_blocks, blocks.block_size)

    def _victim(self) -> Sequence:
        if self.parked:
            return next(iter(self.parked))
        # of the last request, a beam at rest before one that may be waiting for its blocks
        return max(self.running, key=lambda s: (s.order[:2], s.num_due_tokens == 0, s.index))

    def _preempt(self, sequence: Sequence) -> None:
        """Takes the blocks from a sequence; a running one waits, in its order, to be computed again."""
        self.block_manager.free(sequence)
        if sequence.status is SequenceStatus.PARKED:
            del self.parked[sequence]  # it stays parked, with nothing left to take
            return
        self.running.remove(sequence)
        sequence.status = SequenceStatus.WAITING
        self.add(sequence)

    def _free_places(self) -> int:
        requests: dict[Request, int] = {}
        for sequence in self.running:
            requests[sequence.request] = requests.get(sequence.request, 0) + 1
        return self.max_num_seqs - sum(max(n, _reserved(request)) for request, n in requests.items())

    def _places(self, sequence: Sequence) -> int:
        """How many places a waiting sequence takes: all that its request will need, unless that has them."""
        request = sequence.request
        reserved = _reserved(request)
        if reserved > 1 and any(other.request is request for other in self.running):
            return 0
        return max(1, reserved)


def _reserved(request: Request) -> int:
    """Places kept for a request that will fork; a beam search goes on doing so."""
    return request.params.num_sequences if request.beam_search is not None or not request.forked else 1


def max_windowed_chunk(window: int, sinks: int, num_blocks: int, block_size: int) -> int:
    """How many tokens fit in the cache beside the sinks and the window before them; below 1 if the window does not."""
    num_sink_blocks = -(-sinks // block_size)
    return (num_blocks - num_sink_blocks - 2) * block_size - window
