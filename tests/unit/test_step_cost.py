"""What a step is estimated to cost, and prompts that leave room for who decodes."""

from __future__ import annotations

from hypothesis import given, strategies as st

from tests.unit.sequences import make_sequence
from tinyllm.engine.block_manager import BlockManager
from tinyllm.engine.scheduler import Scheduler
from tinyllm.engine.sequence import Sequence
from tinyllm.step_cost import StallLimit, StepCost

COST = StepCost(fixed=2.0, per_read=0.01, per_key=0.001)
costs = st.builds(
    StepCost,
    fixed=st.floats(0.1, 500),
    per_read=st.floats(0, 0.1),
    per_key=st.floats(0, 0.1),
)


@given(costs, st.floats(0, 1e6), st.integers(0, 100_000))
def test_the_most_tokens_are_the_most(cost: StepCost, allowed: float, context: int) -> None:
    most = cost.most_tokens(allowed, context)
    slack = 1e-6 * (1 + allowed)
    assert most == 0 or cost.of_tokens(most, context) <= allowed + slack
    assert cost.of_tokens(most + 1, context) >= allowed - slack


@given(costs, st.integers(1, 1000), st.integers(0, 10_000), st.integers(1, 1000))
def test_splitting_a_chunk_costs_what_is_read_twice(cost: StepCost, n: int, context: int, rest: int) -> None:
    whole = cost.of_tokens(n + rest, context)
    parts = cost.of_tokens(n, context) + cost.of_tokens(rest, context + n)
    assert abs(parts - whole - cost.per_read * (context + n)) <= 1e-6 * (1 + whole)


def scheduler(ratio: float | None, *, blocks: int = 4000, budget: int = 64) -> Scheduler:
    limit = None if ratio is None else StallLimit(ratio, COST)
    return Scheduler(BlockManager(blocks, 4), max_batch_tokens=budget, max_num_seqs=16, stall_limit=limit)


def step(scheduled: Scheduler) -> dict[Sequence, int]:
    output = scheduled.schedule()
    for item in output.scheduled:
        item.sequence.num_computed_tokens += item.num_tokens
        if item.sequence.num_due_tokens == 0:
            item.sequence.request.forked = True
            item.sequence.token_ids.append(7)
    return {item.sequence: item.num_tokens for item in output.scheduled}


def decoding(scheduled: Scheduler, count: int) -> list[Sequence]:
    sequences = [make_sequence([100 + i, 1, 2]) for i in range(count)]
    for sequence in sequences:
        scheduled.add(sequence)
    assert step(scheduled) == dict.fromkeys(sequences, 3), "nobody decodes yet: nobody is held up"
    return sequences


def test_a_prompt_takes_no_more_than_its_share_of_every_step() -> None:
    for ratio in (1.5, 3.0, 8.0):
        scheduled = scheduler(ratio)
        running = decoding(scheduled, 4)
        prompt = make_sequence(range(1000, 1400))
        scheduled.add(prompt)
        chunks = []
        while prompt.num_computed_tokens < 400:
            context = [sequence.num_computed_tokens for sequence in running]
            before = prompt.num_computed_tokens
            ran = step(scheduled)
            assert all(ran[sequence] == 1 for sequence in running)
            alone = COST.fixed + sum(COST.of_tokens(1, keys) for keys in context)
            together = alone + COST.of_tokens(ran[prompt], before)
            more = alone + COST.of_tokens(ran[prompt] + 1, before)
            chunks.append(ran[prompt])
            assert ran[prompt] == 1 or together <= ratio * alone + 1e-6
            assert before + ran[prompt] == 400 or more > ratio * alone or ran[prompt] == 60
        assert sum(chunks) == 400
        assert chunks[0] > chunks[-2], "the same time is fewer tokens where there is more to attend to"


def test_with_no_limit_or_nobody_decoding_the_budget_alone_counts() -> None:
    for scheduled in (scheduler(None), scheduler(2.0)):
        running = (
            decoding(scheduled, 2 if scheduled.stall_limit is None else 0) if scheduled.stall_limit is None else []
        )
        first, second = make_sequence(range(1000, 1040)), make_sequence(range(2000, 2040))
        scheduled.add(first)
        scheduled.add(second)
        ran = step(scheduled)
        assert ran[first] == 40 and ran[second] == 64 - 40 - len(running)


def test_a_prompt_always_moves_on() -> None:
    scheduled = scheduler(1.0001)
    decoding(scheduled, 1)
    first, second = make_sequence(range(1000, 1010)), make_sequence(range(2000, 2010))
    scheduled.add(first)
    scheduled.add(second)
    for _ in range(9):
        ran = step(scheduled)
        assert ran[first] == 1 and second not in ran
    assert first.num_due_tokens == 1, "its last prompt token gives a token, as in decoding"
    assert step(scheduled)[second] == 1


def test_prompts_share_what_there_is_in_order() -> None:
    scheduled = scheduler(4.0)
    decoding(scheduled, 2)
    prompts = [make_sequence(range(1000 * i, 1000 * i + 6)) for i in range(1, 5)]
    for prompt in prompts:
        scheduled.add(prompt)
    ran = step(scheduled)
    assert ran[prompts[0]] == 6 and 0 < ran[prompts[1]] <= 6
    spent = sum(COST.of_tokens(n, 0) for sequence, n in ran.items() if sequence in prompts)
    assert spent <= 3.0 * (COST.fixed + 2 * COST.of_tokens(1, 3)) + 1e-6
