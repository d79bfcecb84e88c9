"""The scheduler: the order and the budget of exact cases, and random use with its promises checked at each step."""

from __future__ import annotations

from typing import Any

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.unit.sequences import make_sequence
from tests.unit.simulated_engine import Simulation
from tinyllm.engine.block_manager import BlockManager
from tinyllm.engine.scheduler import Scheduler, SchedulerOutput
from tinyllm.engine.sequence import Sequence, SequenceStatus


def make_scheduler(*, blocks: int = 64, block_size: int = 4, budget: int = 16, seqs: int = 8) -> Scheduler:
    return Scheduler(BlockManager(blocks, block_size), max_batch_tokens=budget, max_num_seqs=seqs)


def run(scheduler: Scheduler) -> list[tuple[Sequence, int]]:
    """One step as the engine does it, where every sequence that catches up gains a token."""
    output = scheduler.schedule()
    advance(output)
    return [(item.sequence, item.num_tokens) for item in output.scheduled]


def advance(output: SchedulerOutput) -> None:
    for item in output.scheduled:
        item.sequence.num_computed_tokens += item.num_tokens
        if item.sequence.num_due_tokens == 0:
            item.sequence.request.forked = True
            item.sequence.token_ids.append(7)


def test_a_long_prompt_is_chunked_and_decoding_goes_on_beside_it() -> None:
    scheduler = make_scheduler(budget=16)
    short, long = make_sequence(range(3)), make_sequence(range(40))
    scheduler.add(short)
    assert run(scheduler) == [(short, 3)]
    scheduler.add(long)
    assert run(scheduler) == [(short, 1), (long, 15)]
    later = make_sequence(range(2))
    scheduler.add(later)
    assert run(scheduler) == [(short, 1), (long, 15)], "the prompt being read takes what the budget leaves"
    assert run(scheduler) == [(short, 1), (long, 10), (later, 2)]
    assert run(scheduler) == [(short, 1), (long, 1), (later, 1)]


def test_a_younger_decoding_sequence_goes_before_an_older_prefilling_one() -> None:
    scheduler = make_scheduler(budget=8, blocks=16)
    old, young = make_sequence(range(20)), make_sequence(range(2))
    scheduler.add(young)
    run(scheduler)
    young.request.arrival, old.request.arrival = 2, 1
    scheduler.add(old)
    assert run(scheduler) == [(young, 1), (old, 7)]


def test_the_latest_is_preempted_first_and_comes_back_in_order() -> None:
    scheduler = make_scheduler(blocks=4, block_size=4, budget=32)
    a, b, c = (make_sequence(range(4)) for _ in range(3))
    for sequence in (a, b, c):
        scheduler.add(sequence)
    assert run(scheduler) == [(a, 4), (b, 4), (c, 4)]
    output = scheduler.schedule()
    assert [item.sequence for item in output.scheduled] == [a, b]
    assert output.preempted == [c]
    assert (c.status, c.num_computed_tokens, c.block_table) == (SequenceStatus.WAITING, 0, [])
    d = make_sequence(range(1))
    scheduler.add(d)
    assert list(scheduler.waiting) == [c, d]
    advance(output)
    scheduler.finish(a)
    assert run(scheduler) == [(b, 1), (c, 1)], "its prompt is found again: a neighbour has the same"
    assert c.token_ids == [0, 1, 2, 3, 7, 7]


def test_a_request_waits_until_all_its_n_sequences_may_run() -> None:
    scheduler = make_scheduler(seqs=4)
    first, group = make_sequence(range(2)), make_sequence(range(2), n=4)
    scheduler.add(first)
    scheduler.add(group)
    assert run(scheduler) == [(first, 2)]
    scheduler.finish(first)
    assert run(scheduler) == [(group, 2)]


def test_finish_takes_out_waiting_and_running_sequences() -> None:
    scheduler = make_scheduler()
    a, b = make_sequence(range(2)), make_sequence(range(2))
    scheduler.add(a)
    run(scheduler)
    scheduler.add(b)
    scheduler.finish(a)
    scheduler.finish(b)
    assert not scheduler.running
    assert not scheduler.waiting
    assert scheduler.block_manager.num_free_blocks == 64


def test_two_identical_requests_in_one_step_share_the_prompts_blocks() -> None:
    scheduler = make_scheduler(budget=64)
    a, b = make_sequence(range(11)), make_sequence(range(11))
    scheduler.add(a)
    scheduler.add(b)
    assert run(scheduler) == [(a, 11), (b, 3)]
    assert (a.block_table, b.block_table) == ([0, 1, 2], [0, 1, 3])
    assert scheduler.block_manager.ref_counts[:4] == [2, 2, 1, 1]


def test_what_a_step_undone_was_to_write_is_not_found() -> None:
    scheduler = make_scheduler(budget=64)
    done, a, b = make_sequence(range(8)), make_sequence(range(11)), make_sequence(range(11))
    scheduler.add(done)
    run(scheduler)
    scheduler.add(a)
    scheduler.add(b)
    output = scheduler.schedule()
    assert [(item.sequence, item.num_tokens) for item in output.scheduled] == [(done, 1), (a, 3), (b, 3)]
    assert output.admitted == [(a, 8), (b, 8)]
    scheduler.undo(output)
    assert scheduler.waiting == [done, a, b]
    assert scheduler.block_manager.num_free_blocks == 64
    assert run(scheduler) == [(done, 1), (a, 3), (b, 3)], "what the step before had written is"


def test_an_undone_step_takes_the_forks_along_that_were_made_in_it() -> None:
    scheduler = make_scheduler(budget=64)
    parent = make_sequence(range(5), n=2)
    scheduler.add(parent)
    output = scheduler.schedule()
    parent.num_computed_tokens, parent.request.forked = 5, True
    child = make_sequence(range(5), index=1, request=parent.request)
    scheduler.add_fork(parent, child)
    scheduler.undo(output)
    assert scheduler.waiting == [parent, child], "the child too has a token due: its last one"


def test_higher_priorities_go_first_and_make_room() -> None:
    scheduler = make_scheduler(budget=16, seqs=2)
    low, high, urgent = (make_sequence(range(9), priority=p) for p in (-1, 0, 3))
    scheduler.add(low)
    assert run(scheduler) == [(low, 9)]
    scheduler.add(high)
    assert run(scheduler) == [(low, 1), (high, 1)], "there is room for both"
    scheduler.add(urgent)
    output = scheduler.schedule()
    assert output.preempted == [low]
    assert [item.sequence for item in output.scheduled] == [high, urgent]
    advance(output)
    assert scheduler.waiting == [low]
    equal = make_sequence(range(9), priority=0)
    scheduler.add(equal)
    assert scheduler.waiting == [equal, low]
    assert run(scheduler) == [(urgent, 1), (high, 1)], "an equal priority waits"


def test_an_urgent_request_takes_blocks_of_the_lowest_priority() -> None:
    scheduler = make_scheduler(blocks=6, budget=32)
    a, b = make_sequence(range(10), priority=1), make_sequence(range(20, 30))
    scheduler.add(b)
    run(scheduler)
    scheduler.add(a)
    run(scheduler)
    urgent = make_sequence(range(40, 51), priority=2)
    scheduler.add(urgent)
    output = scheduler.schedule()
    assert output.preempted == [b]
    assert [item.sequence for item in output.scheduled] == [a, urgent]


def test_parked_sequences_lose_their_blocks_first_least_recently_parked_first() -> None:
    scheduler = make_scheduler(blocks=6, block_size=4, budget=32)
    first, second, low = (
        make_sequence(range(8)),
        make_sequence(range(10, 18)),
        make_sequence(range(20, 24), priority=-1),
    )
    for sequence in (first, second, low):
        scheduler.add(sequence)
    run(scheduler)
    scheduler.park(first)
    scheduler.park(second)
    assert scheduler.block_manager.num_free_blocks == 1
    urgent = make_sequence(range(30, 38))
    scheduler.add(urgent)
    output = scheduler.schedule()
    assert output.preempted == [first]
    assert [item.sequence for item in output.scheduled] == [low, urgent]
    assert (first.status, first.block_table, list(scheduler.parked)) == (SequenceStatus.PARKED, [], [second])


def test_a_parked_sequence_is_resumed_on_its_blocks_and_a_fork_of_it_too() -> None:
    scheduler = make_scheduler()
    parked = make_sequence(range(6))
    scheduler.add(parked)
    run(scheduler)
    scheduler.park(parked)
    resumed = make_sequence([*parked.token_ids, 1])
    resumed.request.resume_from = parked
    scheduler.add(resumed)
    output = scheduler.schedule()
    assert output.admitted == [(resumed, 6)]
    assert output.copies == [(1, 2)], "the block that both end in"
    assert (parked.block_table, resumed.block_table) == ([0, 1], [0, 2])


def test_a_windowed_prefix_that_was_given_back_is_not_resumed() -> None:
    """The parent has only what follows its end; a request that begins before that is computed from its beginning."""
    simulation = Simulation(32, 4, budget=10, max_seqs=4, prefix_caching=False)
    simulation.add([0, 1] * 20, 1, window=5, sinks=2, park=True)
    while simulation.goals:
        simulation.step()
    parent = simulation.parked[0]
    simulation.add([1] * 8, 2, resume=parent, prompt_logprobs=0)
    for _ in range(2):
        simulation.step()
    simulation.step(interrupted=True)
    assert simulation.step().admitted[0][1] == 0
    simulation.run_to_the_end()


def test_a_cached_windowed_prompt_that_fills_the_whole_cache_can_be_continued() -> None:
    simulation = Simulation(8, 4, budget=32, max_seqs=4)
    simulation.add([0, 1, 1, 0] * 8, 1, window=6, sinks=2)
    while simulation.goals:
        simulation.step()
    assert simulation.manager.num_cached_blocks == 8
    simulation.add([0, 1, 1, 0] * 8 + [1] * 9, 30, window=6, sinks=2)
    assert simulation.step().admitted[0][1] == 32
    simulation.run_to_the_end()


def test_beams_at_rest_make_room_for_one_that_fits_only_without_them() -> None:
    """Else the last beam, being last, would give way to them for ever."""
    scheduler = Scheduler(BlockManager(6, 4, prefix_caching=False), max_batch_tokens=1, max_num_seqs=4)
    first = make_sequence(range(18), beams=2)
    beams = [first, make_sequence(range(18), index=1, request=first.request)]
    first.request.beam_search = object()  # type: ignore[assignment]
    for beam in beams:
        scheduler.add(beam)
    for _ in range(2 * 18):
        (item,) = scheduler.schedule().scheduled
        item.sequence.num_computed_tokens += 1
        if item.sequence.num_due_tokens == 0:
            item.sequence.candidates = object()  # type: ignore[assignment]
    assert all(beam.candidates is not None for beam in beams)


SIZES = st.sampled_from([(6, 1), (12, 1), (6, 4), (9, 4), (24, 4), (4, 16), (8, 16)])


class SchedulerMachine(RuleBasedStateMachine):
    """Random requests through a simulated engine, which checks what each query reads and each promise at each step."""

    @initialize(
        sizes=SIZES,
        budget=st.sampled_from([1, 3, 8, 17, 40]),
        seqs=st.integers(1, 8),
        prefix_caching=st.booleans(),
        max_stall=st.sampled_from([None, 1.01, 3.0]),
    )
    def begin(
        self, sizes: tuple[int, int], budget: int, seqs: int, prefix_caching: bool, max_stall: float | None
    ) -> None:
        self.simulation = Simulation(*sizes, budget, seqs, prefix_caching, max_stall)

    @rule(
        length=st.integers(1, 40),
        pattern=st.sampled_from([(0,), (0, 1), (0, 0, 0, 1), (1, 0, 0, 0, 0, 0, 0)]),
        new_tokens=st.integers(1, 24),
        streaming=st.sampled_from([{}, {}, {}, {"window": 1}, {"window": 3, "sinks": 1}, {"window": 9, "sinks": 5}]),
        more=st.sampled_from(
            [
                *({}, {}, {"park": True}, {"park": True}, {"n": 3}, {"best_of": 2}),
                *({"beams": 3}, {"beams": 2, "priority": 1}, {"priority": 2}, {"priority": -1}),
                *({"prompt_logprobs": 0}, {"salt": "other"}),
            ]
        ),
        resume=st.none() | st.integers(0, 3),
    )
    def add(
        self,
        length: int,
        pattern: tuple[int, ...],
        new_tokens: int,
        streaming: dict[str, int],
        more: dict[str, Any],
        resume: int | None,
    ) -> None:
        parked = self.simulation.parked
        self.simulation.add(
            [pattern[i % len(pattern)] for i in range(length)],
            new_tokens,
            resume=parked[resume] if resume is not None and resume < len(parked) else None,
            **streaming,
            **more,
        )

    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.simulation.step()

    @rule()
    def interrupted_step(self) -> None:
        self.simulation.step(interrupted=True)

    @precondition(lambda self: self.simulation.goals)
    @rule(at=st.integers(0, 100))
    def abort(self, at: int) -> None:
        requests = list(self.simulation.goals)
        self.simulation.abort(requests[at % len(requests)])

    @precondition(lambda self: self.simulation.scheduler.running)
    @rule(at=st.integers(0, 100))
    def preempt(self, at: int) -> None:
        running = self.simulation.scheduler.running
        self.simulation.scheduler._preempt(running[at % len(running)])

    @precondition(lambda self: self.simulation.parked)
    @rule(at=st.integers(0, 100), what=st.sampled_from(["release", "fork_parked", "restore"]))
    def at_rest(self, at: int, what: str) -> None:
        parked = self.simulation.parked
        if what == "release" or len(parked) < 5:
            getattr(self.simulation, what)(parked[at % len(parked)])

    def teardown(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.run_to_the_end()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
