"""An engine without a model: its cache holds, for each slot, which token of which context was written there.

Whatever a query would read must have been written for its own sequence's tokens: a wrong block, a missed copy, a block
that was given to another too early, or one that is found by a wrong hash all show as a wrong context.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import Any

from tests.unit.sequences import make_sequence
from tinyllm.engine.block_manager import RELEASED, BlockManager
from tinyllm.engine.prefix_hash import root_hash
from tinyllm.engine.scheduler import Scheduler, SchedulerOutput, max_windowed_chunk
from tinyllm.engine.sequence import Request, Sequence, SequenceStatus
from tinyllm.step_cost import StallLimit, StepCost

Context = tuple[Any, ...]  # what a key depends on: the root of its hashes, and all tokens up to its own


class SimulatedCache:
    """What stands in each slot; tokens of one sequence read their own contexts or fail."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.slots: list[list[Context | None]] = [[None] * block_size for _ in range(num_blocks)]

    def copy(self, copies: list[tuple[int, int]]) -> None:
        for src, dst in copies:
            self.slots[dst] = self.slots[src].copy()

    def write(self, sequence: Sequence, start: int, end: int) -> None:
        for p in range(start, end):
            block = sequence.block_table[p // self.block_size]
            assert block != RELEASED
            self.slots[block][p % self.block_size] = context(sequence, p)

    def spoil(self, sequence: Sequence, start: int, end: int) -> None:
        """What an interrupted step may leave."""
        for p in range(start, end):
            self.slots[sequence.block_table[p // self.block_size]][p % self.block_size] = ("spoilt",)

    def read(self, sequence: Sequence, p: int, *, but_not_released: bool = False) -> None:
        """As the query at position p does; or all that is left to be read."""
        window, sinks = sequence.request.window, sequence.request.sinks
        for key in range(p + 1):
            if window is None or key > p - window or key < sinks:
                block = sequence.block_table[key // self.block_size]
                if block == RELEASED and but_not_released:
                    continue
                assert block != RELEASED, f"the query at {p} reads {key}, which was given back"
                found = self.slots[block][key % self.block_size]
                assert found == context(sequence, key), f"the query at {p} reads {found} at {key}"


def context(sequence: Sequence, p: int) -> Context:
    return (sequence.request.prefix_root, *sequence.token_ids[: p + 1])


def new_sequence(
    tokens: list[int], *, window: int | None = None, sinks: int = 0, salt: str = "", max_len: int = 1 << 20, **more: Any
) -> Sequence:
    """A waiting sequence, with the fields that Admission sets."""
    sequence = make_sequence(tokens, cache_salt=salt, **more)
    request = sequence.request
    request.window, request.sinks, request.max_len = window, sinks, max_len
    request.prefix_root = root_hash(salt, window, sinks)
    return sequence


@dataclass(eq=False)
class Goal:
    """What a request is to become: so many tokens in each of its sequences."""

    request: Request
    num_tokens: int
    park: bool = False


@dataclass
class Simulation:
    """The scheduler with what the engine does around it. Tokens are 0 or 1, so that prefixes meet often."""

    num_blocks: int
    block_size: int
    budget: int
    max_seqs: int
    prefix_caching: bool = True
    max_stall: float | None = None
    goals: dict[Request, Goal] = field(default_factory=dict)
    parked: list[Sequence] = field(default_factory=list)
    num_finished: int = 0

    def __post_init__(self) -> None:
        self.manager = BlockManager(self.num_blocks, self.block_size, prefix_caching=self.prefix_caching)
        self.scheduler = Scheduler(
            self.manager,
            max_batch_tokens=self.budget,
            max_num_seqs=self.max_seqs,
            stall_limit=None if self.max_stall is None else StallLimit(self.max_stall, StepCost(2.0, 0.05, 0.05)),
        )
        self.cache = SimulatedCache(self.num_blocks, self.block_size)
        self.capacity = self.num_blocks * self.block_size
        self.restored = count()

    # ---- requests

    def add(
        self,
        tokens: list[int],
        new_tokens: int,
        *,
        window: int | None = None,
        sinks: int = 0,
        resume: Sequence | None = None,
        park: bool = False,
        **params: Any,
    ) -> None:
        """Adds what can be served, as Admission would."""
        if resume is not None:
            window, sinks = resume.request.window, resume.request.sinks
            tokens = resume.token_ids + tokens
        if window is not None and max_windowed_chunk(window, sinks, self.num_blocks, self.block_size) < 1:
            window, sinks, resume = None, 0, None
        max_len = self.capacity if window is None else 1 << 20
        if len(tokens) + 1 > max_len:
            return
        sequence = new_sequence(tokens, window=window, sinks=sinks, max_len=max_len, **params)
        request = sequence.request
        if request.params.num_sequences > self.max_seqs:
            return
        if resume is not None:
            request.resume_from, request.prefix_root = resume, resume.request.prefix_root
        if request.params.beams is not None:
            request.beam_search = object()  # type: ignore[assignment]
        self.goals[request] = Goal(request, min(max_len, len(tokens) + new_tokens), park)
        self.scheduler.add(sequence)

    def abort(self, request: Request) -> None:
        for sequence in request.sequences:
            self.scheduler.finish(sequence)
        del self.goals[request]

    # ---- parked sequences

    def release(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        self.parked.remove(sequence)

    def fork_parked(self, sequence: Sequence) -> None:
        child = make_sequence(sequence.token_ids, request=sequence.request)
        child.status = SequenceStatus.FINISHED
        self.manager.fork(sequence, child)
        self.scheduler.park(child)
        self.parked.append(child)

    def restore(self, sequence: Sequence) -> None:
        """A copy of a parked sequence, in blocks of its own that nobody else can find."""
        child = new_sequence(sequence.token_ids, window=sequence.request.window, sinks=sequence.request.sinks)
        child.status = SequenceStatus.FINISHED
        child.request.prefix_root = root_hash("restored", next(self.restored))
        if sequence.block_table and self.manager.adopt(child, [b != RELEASED for b in sequence.block_table]):
            child.num_computed_tokens = sequence.num_computed_tokens
            child.num_hashed_blocks = len(child.block_table)
            for i, block in enumerate(child.block_table):
                if block != RELEASED:
                    start = i * self.block_size
                    self.cache.write(child, start, min(start + self.block_size, child.num_computed_tokens))
        self.scheduler.park(child)
        self.parked.append(child)

    # ---- the step

    def step(self, *, interrupted: bool = False) -> SchedulerOutput:
        statuses = {s: (s.status, s.candidates is not None) for s in self.scheduler.running}
        output = self.scheduler.schedule()
        self._check_schedule(output, statuses)
        self.cache.copy(output.copies)
        spans = [
            (item.sequence, item.sequence.num_computed_tokens, item.sequence.num_computed_tokens + item.num_tokens)
            for item in output.scheduled
        ]
        if interrupted:
            for span in spans[::2]:
                self.cache.spoil(*span)
            self.scheduler.undo(output)
            self.check()
            return output
        for span in spans:
            self.cache.write(*span)
        for sequence, start, end in spans:
            for p in range(start, end):
                self.cache.read(sequence, p)
        for sequence, start, end in spans:
            sequence.num_computed_tokens = end
            self._report(sequence, start, end)
        for sequence, _, end in spans:
            if end == sequence.num_tokens:
                self._grow(sequence)
        for request in {sequence.request: None for sequence, _, _ in spans}:
            self._finish(request)
        self.check()
        return output

    def run_to_the_end(self) -> None:
        for _ in range(20_000):
            if not self.goals:
                break
            self.step()
        assert not self.goals, "requests starved"
        for sequence in self.parked.copy():
            self.release(sequence)
        assert self.manager.num_free_blocks == self.num_blocks
        assert not self.scheduler.running and not self.scheduler.waiting and not self.scheduler.parked

    def check(self) -> None:
        live = [sequence for request in self.goals for sequence in request.sequences]
        self.manager.check([*live, *self.parked])

    def _check_schedule(self, output: SchedulerOutput, before: dict[Sequence, tuple[SequenceStatus, bool]]) -> None:
        scheduled = [item.sequence for item in output.scheduled]
        assert scheduled or not self.goals, "something always runs"
        assert len(set(scheduled)) == len(scheduled)
        assert sum(item.num_tokens for item in output.scheduled) <= self.budget
        assert len(self.scheduler.running) <= self.max_seqs
        written: set[int] = set()
        for item in output.scheduled:
            sequence = item.sequence
            assert 1 <= item.num_tokens <= sequence.num_due_tokens
            start, end = sequence.num_computed_tokens, sequence.num_computed_tokens + item.num_tokens
            assert len(sequence.block_table) == -(-end // self.block_size)
            own = sequence.block_table[start // self.block_size :]
            assert not written.intersection(own), "two sequences write to one block"
            written.update(own)
        for victim in output.preempted:
            _, at_rest = before.get(victim, (victim.status, True))
            if victim.status is SequenceStatus.WAITING and not at_rest and victim not in scheduled:
                assert all(s.order < victim.order for s in scheduled), "preempted for one that comes after it"

    def _report(self, sequence: Sequence, start: int, end: int) -> None:
        request = sequence.request
        if request.params.prompt_logprobs is not None:
            for p in range(start, min(end, len(request.prompt_token_ids) - 1)):
                if p == len(request.prompt_logprobs):
                    request.prompt_logprobs.append(())

    def _grow(self, sequence: Sequence) -> None:
        """As Decoding does: the next token, forks at the first one, or candidates until all beams have theirs."""
        request = sequence.request
        if request.beam_search is not None:
            sequence.candidates = object()  # type: ignore[assignment]
            if all(beam.candidates is not None for beam in request.sequences):
                self._advance_beams(request)
            return
        siblings = [sequence]
        if not request.forked:
            request.forked = True
            siblings += [self._fork(sequence) for _ in range(1, request.params.num_sequences)]
        for sibling in siblings:
            sibling.token_ids.append((sibling.num_tokens // 3 + sibling.index) % 2)

    def _advance_beams(self, request: Request) -> None:
        request.forked = True
        beams = request.sequences
        for beam in beams:
            beam.candidates = None
        pivot = beams[0].num_tokens % (2 * len(beams))  # now and then one beam dies, and another goes on twice
        doubled = beams[(pivot + 1) % len(beams)]
        live = [beam for i, beam in enumerate(beams) if i != pivot or len(beams) == 1]
        while len(live) < request.params.num_sequences:
            live.append(self._fork(doubled))
        for i, beam in enumerate(live):
            beam.token_ids.append(i % 2)
        for beam in beams:
            if beam not in live:
                self.scheduler.finish(beam)
        request.sequences = live

    def _fork(self, parent: Sequence) -> Sequence:
        request = parent.request
        request.num_forks += 1
        child = make_sequence(parent.token_ids, index=request.num_forks, request=request)
        self.scheduler.add_fork(parent, child)
        return child

    def _finish(self, request: Request) -> None:
        goal = self.goals[request]
        for sequence in request.sequences:
            if sequence.num_tokens >= goal.num_tokens and sequence.status is not SequenceStatus.FINISHED:
                if goal.park and len(request.sequences) == 1:
                    self.scheduler.park(sequence)
                    self.parked.append(sequence)
                    request.sequences = []
                else:
                    self.scheduler.finish(sequence)
        if request.finished:
            assert all(s.num_tokens == goal.num_tokens for s in request.sequences), "no token too many"
            self.num_finished += 1
            del self.goals[request]
