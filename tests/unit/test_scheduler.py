"""The scheduler: the order and the budget of exact cases, and random use with its promises checked at each step."""

from __future__ import annotations

import random

from hypothesis import given, settings, strategies as st

from tests.unit.sequences import make_sequence
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


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    blocks=st.integers(6, 30),
    block_size=st.sampled_from([1, 4, 16]),
    budget=st.integers(1, 40),
    seqs=st.integers(4, 10),
)
def test_random_use_keeps_every_promise(seed: int, blocks: int, block_size: int, budget: int, seqs: int) -> None:
    """Within budget and places; blocks cover exactly what is computed; all requests end, with no token lost."""
    rng = random.Random(seed)
    scheduler = make_scheduler(blocks=blocks, block_size=block_size, budget=budget, seqs=seqs)
    capacity = blocks * block_size
    live: list[Sequence] = []
    goal: dict[Sequence, int] = {}
    for step in range(10_000):
        if step < 60 and rng.random() < 0.3:
            length = rng.randint(1, max(1, capacity // 2))
            sequence = make_sequence(range(length), n=rng.randint(1, 4))
            goal[sequence] = min(capacity, length + rng.randint(1, 12))
            live.append(sequence)
            scheduler.add(sequence)
        if step < 60 and live and rng.random() < 0.05:  # abort
            victim = live.pop(rng.randrange(len(live)))
            scheduler.finish(victim)
        cached_before = {block for block in range(blocks) if scheduler.block_manager.is_cached(block)}
        output = scheduler.schedule()
        cached_before -= set(output.evicted)
        written_blocks: set[int] = set()
        assert sum(item.num_tokens for item in output.scheduled) <= budget
        assert len(scheduler.running) <= seqs
        assert len({item.sequence for item in output.scheduled}) == len(output.scheduled)
        assert not any(item.sequence in output.preempted for item in output.scheduled)
        if live:
            assert output.scheduled, "something always runs"
        for item in output.scheduled:
            sequence = item.sequence
            assert 1 <= item.num_tokens <= sequence.num_due_tokens
            end = sequence.num_computed_tokens + item.num_tokens
            assert len(sequence.block_table) == -(-end // block_size)
            written = sequence.block_table[sequence.num_computed_tokens // block_size :]
            assert not written_blocks.intersection(written), "two sequences write to one block"
            assert not cached_before.intersection(written), "a block that others may find is written"
            written_blocks.update(written)
        for item in output.scheduled:
            sequence = item.sequence
            sequence.num_computed_tokens += item.num_tokens
            if sequence.num_due_tokens:
                continue
            request = sequence.request
            siblings = [sequence]
            if not request.forked:
                request.forked = True
                for index in range(1, request.params.n):
                    child = make_sequence(sequence.token_ids, index=index, request=request)
                    goal[child] = min(capacity, goal[sequence] + index)
                    scheduler.add_fork(sequence, child)
                    siblings.append(child)
                    live.append(child)
            for sibling in siblings:
                sibling.token_ids.append(sibling.num_tokens)
                if sibling.num_tokens >= goal[sibling]:
                    assert sibling.token_ids == list(range(sibling.num_tokens))
                    scheduler.finish(sibling)
                    live.remove(sibling)
        scheduler.block_manager.check(live)
        if step >= 60 and not live:
            break
    assert not live, "requests starved"
    assert scheduler.block_manager.num_free_blocks == blocks
