"""The engine's thread: pausing, draining, aborting, and calls between steps."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest

from tests.server.serving import make_llm
from tinyllm import LLM, RequestOutput, SamplingParams, StreamChunk
from tinyllm.engine.llm_engine import LLMEngine
from tinyllm.server.engine_thread import EngineThread
from tinyllm.server.errors import ApiError
from tinyllm.server.submission import Job

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return make_llm(max_batch_tokens=16, num_blocks=64, debug_checks=True)


@pytest.fixture
def engine(llm: LLM) -> Iterator[EngineThread]:
    thread = EngineThread(llm, max_waiting=4)
    thread.start()
    yield thread
    thread.resume()
    thread.stop()
    for request_id in list(llm.engine.requests):
        llm.engine.abort(request_id)


def job(max_tokens: int = 8, seed: int = 0) -> Job:
    return Job(PROMPT, SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=True))


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


async def settled(engine: EngineThread) -> int:
    """Waits for what was asked of the thread so far; the steps that have run."""
    return await asyncio.wrap_future(engine.call(lambda inner: inner.num_steps))


async def steps_reach(engine: EngineThread, number: int) -> None:
    while await settled(engine) < number:
        await asyncio.sleep(0.001)


def test_chunks_then_the_output_arrive(engine: EngineThread, llm: LLM) -> None:
    async def test() -> None:
        submission = engine.submit([job(), job(5, seed=3)])
        items = []
        while deliveries := await submission.take():
            items += deliveries
        for index, count in ((0, 8), (1, 5)):
            mine = [delivery.item for delivery in items if delivery.index == index]
            assert isinstance(mine[-1], RequestOutput)
            chunks = [item for item in mine[:-1] if isinstance(item, StreamChunk)]
            streamed = [token for chunk in chunks for token in chunk.token_ids]
            assert streamed == mine[-1].outputs[0].token_ids
            assert len(chunks) == count == len(mine) - 1
        assert await submission.take() == []

    run(test)
    assert llm.engine.block_manager.num_free_blocks == 64


def test_a_paused_engine_steps_only_when_told(engine: EngineThread) -> None:
    async def test() -> None:
        engine.pause()
        before = await settled(engine)
        submission = engine.submit([job(3)])
        assert await settled(engine) == before  # the request has entered, and nothing has run
        assert engine.num_waiting == 1
        for number in (1, 2):
            engine.single_step()
            await steps_reach(engine, before + number)
            assert await settled(engine) == before + number
            assert engine.num_waiting == 0
        engine.resume()
        (output,) = await submission.outputs()
        assert len(output.outputs[0].token_ids) == 3
        assert await settled(engine) == before + 3

    run(test)


def test_a_step_that_is_due_waits_for_work_and_pausing_again_forgets_it(engine: EngineThread) -> None:
    async def test() -> None:
        engine.pause()
        before = await settled(engine)
        engine.single_step()
        submission = engine.submit([job()])
        await steps_reach(engine, before + 1)
        engine.single_step()
        await steps_reach(engine, before + 2)
        engine.pause()
        submission.abort()
        await submission.outputs()
        engine.single_step()
        engine.pause()
        other = engine.submit([job()])
        assert await settled(engine) == before + 2
        engine.resume()
        await other.outputs()

    run(test)


def test_single_step_does_nothing_while_running(engine: EngineThread) -> None:
    async def test() -> None:
        engine.single_step()
        engine.pause()
        before = await settled(engine)
        submission = engine.submit([job()])
        assert await settled(engine) == before
        submission.abort()
        await submission.outputs()

    run(test)


def test_an_abort_frees_the_blocks_before_the_next_step(engine: EngineThread, llm: LLM) -> None:
    async def test() -> None:
        engine.pause()
        before = await settled(engine)
        submission, other = engine.submit([job(1000)]), engine.submit([job()])
        engine.single_step()
        await steps_reach(engine, before + 1)
        held = await asyncio.wrap_future(engine.call(lambda inner: inner.block_manager.num_free_blocks))
        assert held < 64
        submission.abort()
        (output,) = await submission.outputs()
        assert output.outputs[0].finish_reason == "abort"
        assert len(output.outputs[0].token_ids) == 1
        assert await asyncio.wrap_future(engine.call(lambda inner: len(inner.requests))) == 1
        assert await settled(engine) == before + 1
        engine.resume()
        (output,) = await other.outputs()
        assert output.outputs[0].finish_reason == "length"

    run(test)
    assert llm.engine.block_manager.num_free_blocks == 64


def test_the_queue_is_bounded_and_takes_all_or_none(engine: EngineThread) -> None:
    async def test() -> None:
        engine.pause()
        first = engine.submit([job(), job(), job()])
        with pytest.raises(ApiError, match="the queue is full: 3 requests wait") as caught:
            engine.submit([job(), job()])
        assert caught.value.status == 429
        assert int(caught.value.headers["Retry-After"]) >= 1
        second = engine.submit([job()])
        assert engine.num_waiting == 4
        with pytest.raises(ApiError, match="5 prompts in one request; the queue holds 4"):
            engine.submit([job()] * 5)
        engine.resume()
        outputs = [*await first.outputs(), *await second.outputs()]
        assert [len(output.outputs[0].token_ids) for output in outputs] == [8] * 4
        assert engine.num_waiting == 0
        await engine.submit([job()] * 4).outputs()

    run(test)


def test_a_request_that_is_aborted_in_the_queue_leaves_it(engine: EngineThread) -> None:
    async def test() -> None:
        engine.pause()
        waiting = [engine.submit([job()]) for _ in range(4)]
        waiting[0].abort()
        (output,) = await waiting[0].outputs()
        assert output.outputs[0].token_ids == []
        assert engine.num_waiting == 3
        last = engine.submit([job()])
        engine.resume()
        for submission in (*waiting[1:], last):
            await submission.outputs()

    run(test)


def test_draining_finishes_what_runs_and_refuses_what_comes(engine: EngineThread) -> None:
    async def test() -> None:
        engine.pause()
        submission = engine.submit([job(30)])
        draining = asyncio.ensure_future(engine.drain(60))
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="about to stop") as caught:
            engine.submit([job()])
        assert caught.value.status == 503
        engine.pause()  # has no effect any more
        (output,) = await submission.outputs()
        assert output.outputs[0].finish_reason == "length"
        await draining

    run(test)


def test_draining_ends_what_takes_too_long(engine: EngineThread, llm: LLM) -> None:
    async def test() -> None:
        submission = engine.submit([job(1000)])
        await engine.drain(0)
        (output,) = await submission.outputs()
        assert output.outputs[0].finish_reason == "abort"

    run(test)
    assert llm.engine.block_manager.num_free_blocks == 64


def test_a_call_that_fails_fails_alone(engine: EngineThread) -> None:
    def fail(_: LLMEngine) -> None:
        raise LookupError("no")

    async def test() -> None:
        with pytest.raises(LookupError):
            await asyncio.wrap_future(engine.call(fail))
        (output,) = await engine.submit([job()]).outputs()
        assert len(output.outputs[0].token_ids) == 8

    run(test)


def test_stopping_tells_those_who_wait(engine: EngineThread) -> None:
    async def test() -> None:
        engine.pause()
        submission = engine.submit([job()])
        await asyncio.get_running_loop().run_in_executor(None, engine.stop)
        with pytest.raises(ApiError, match="the server has stopped"):
            await submission.outputs()
        with pytest.raises(ApiError, match="about to stop"):
            await asyncio.wrap_future(engine.call(lambda inner: None))

    run(test)


def test_a_request_that_fails_in_the_engine_is_refused(llm: LLM) -> None:
    def broken(token_ids: list[int], logits: object) -> object:
        raise ValueError("of no use")

    async def test() -> None:
        engine = EngineThread(llm, max_waiting=4)
        engine.start()
        good = engine.submit([job()])
        bad = engine.submit([Job(PROMPT, SamplingParams(logits_processors=[broken]))])  # type: ignore[list-item]
        with pytest.raises(ApiError, match="a logits processor failed: ValueError: of no use") as caught:
            await bad.outputs()
        assert caught.value.status == 400
        (output,) = await good.outputs()
        assert len(output.outputs[0].token_ids) == 8
        engine.stop()

    run(test)


def test_a_slow_reader_finds_everything_at_once(engine: EngineThread) -> None:
    async def test() -> None:
        submission = engine.submit([job(20)])
        early = await submission.take()
        while await asyncio.wrap_future(engine.call(lambda inner: len(inner.requests))):
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        deliveries = await submission.take()
        chunks = [one.item for one in early + deliveries if isinstance(one.item, StreamChunk)]
        assert sum(len(chunk.token_ids) for chunk in chunks) == 20
        assert isinstance(deliveries[-1].item, RequestOutput)

    run(test)
