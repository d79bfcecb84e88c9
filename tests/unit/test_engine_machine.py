"""The whole engine over a tiny model and a tiny cache, in random use: each request gets what it gets alone."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from itertools import count
from typing import Any

import numpy as np
import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.tiny import random_prompt, tiny_engine
from tinyllm.engine.llm_engine import LLMEngine
from tinyllm.engine.sequence import Sequence, Task
from tinyllm.outputs import RequestOutput
from tinyllm.sampling import SamplingParams

EOS = (5, 17)
PROMPTS = (random_prompt(19), [*random_prompt(19)[:9], 3, 4], random_prompt(13, 1), [7])
STREAMING: tuple[dict[str, Any], ...] = ({}, {}, {"window": 3, "sinks": 2}, {"window": 7, "sinks": 0})
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"seed": 4, "logprobs": 1},
    {"top_k": 7, "repetition_penalty": 1.2, "ignore_eos": True},
    {"n": 3, "seed": 2},
    {"n": 2, "best_of": 3},
    {"beams": 2, "n": 2},
    {"beams": 3, "early_stopping": True, "priority": 1},
    {"priority": 2},
    {"priority": -1, "prompt_logprobs": 1},
    {"cache_salt": "mine", "min_tokens": 6},
    {"prompt_logprobs": 0, "n": 2},
)


def result(output: RequestOutput) -> tuple[Any, ...]:
    """All that a request gives back, but for its timings."""
    outputs = [
        (o.index, o.token_ids, o.finish_reason, o.stop_reason, o.cumulative_logprob, o.logprobs, o.score)
        for o in output.outputs
    ]
    rows = None if output.rows is None else output.rows.tobytes()
    return output.error, output.prompt_logprobs, rows, outputs


def run(engine: LLMEngine) -> RequestOutput:
    """Of one request by itself."""
    while True:
        finished = engine.step().finished
        if finished:
            return finished[0]


@cache
def alone(prompt: tuple[int, ...], params: tuple[tuple[str, Any], ...], task: Task) -> tuple[Any, ...]:
    engine = tiny_engine(eos=EOS, max_batch_tokens=256, prefix_caching=False, max_model_len=48)
    engine.add_request("alone", list(prompt), SamplingParams(**dict(params)), task=task)
    return result(run(engine))


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.sampled_from([12, 16, 30]), budget=st.sampled_from([1, 5, 16, 64]), prefix_caching=st.booleans()
    )
    def begin(self, num_blocks: int, budget: int, prefix_caching: bool) -> None:
        self.engine = tiny_engine(
            eos=EOS,
            num_blocks=num_blocks,
            block_size=4,
            max_batch_tokens=budget,
            max_num_seqs=6,
            max_model_len=48,
            prefix_caching=prefix_caching,
        )
        self.expected: dict[str, tuple[Any, ...]] = {}
        self.kept: set[str] = set()
        self.parked: list[Sequence] = []
        self.streamed: dict[tuple[str, int], list[int]] = {}
        self.num_requests = 0
        forward = self.engine.runner.forward
        self.interrupt = False

        def interrupted(*arguments: Any) -> np.ndarray:
            hidden = forward(*arguments)
            if self.interrupt:
                raise KeyboardInterrupt
            return hidden

        self.engine.runner.forward = interrupted  # type: ignore[method-assign]

    def _add(self, prompt: list[int], params: dict[str, Any], task: Task, keep: bool, **more: Any) -> None:
        params = {"max_tokens": 9, **params}
        self.num_requests += 1
        name = str(self.num_requests)
        self.engine.add_request(name, prompt, SamplingParams(**params), task=task, keep=keep, **more)
        self.expected[name] = alone(tuple(prompt), tuple(params.items()), task)
        if keep:
            self.kept.add(name)

    @rule(prompt=st.sampled_from(PROMPTS), kind=st.sampled_from(KINDS), streaming=st.sampled_from(STREAMING))
    def generate(self, prompt: list[int], kind: dict[str, Any], streaming: dict[str, Any]) -> None:
        self._add(prompt, {**kind, **streaming}, Task.GENERATE, keep=False)

    @rule(
        prompt=st.sampled_from(PROMPTS),
        task=st.sampled_from([Task.SCORE, Task.LOGITS, Task.EMBED]),
        streaming=st.sampled_from(STREAMING),
    )
    def look_at_the_prompt(self, prompt: list[int], task: Task, streaming: dict[str, Any]) -> None:
        self._add(prompt, {**streaming}, task, keep=False)

    @rule(prompt=st.sampled_from(PROMPTS), generate=st.booleans(), streaming=st.sampled_from(STREAMING))
    def park(self, prompt: list[int], generate: bool, streaming: dict[str, Any]) -> None:
        self._add(prompt, {"seed": 1, **streaming}, Task.GENERATE if generate else Task.PREFILL, keep=True)

    @precondition(lambda self: self.parked)
    @rule(at=st.integers(0, 9), more=st.lists(st.integers(0, 60), max_size=4), kind=st.sampled_from(KINDS))
    def resume(self, at: int, more: list[int], kind: dict[str, Any]) -> None:
        parked = self.parked[at % len(self.parked)]
        prompt, old = parked.token_ids + more, parked.request.params
        if len(prompt) < 40:
            streaming = {} if old.window is None else {"window": old.window, "sinks": old.sinks}
            keep = kind.get("n", 1) == 1 and "beams" not in kind
            self._add(prompt, {**kind, **streaming}, Task.GENERATE, keep=keep, resume_from=parked)

    @precondition(lambda self: self.parked)
    @rule(at=st.integers(0, 9), what=st.sampled_from(["fork", "restore", "release", "release"]))
    def at_rest(self, at: int, what: str) -> None:
        parked = self.parked[at % len(self.parked)]
        if what == "release":
            self.parked.remove(parked)
            self.engine.release(parked)
        elif what == "fork":
            self.parked.append(self.engine.fork(parked))
        else:
            self.parked.append(self.engine.restore(self.engine.snapshot(parked)))

    @rule(times=st.integers(1, 5))
    def step(self, times: int) -> None:
        for _ in range(times):
            self._step()

    @precondition(lambda self: self.expected)
    @rule()
    def interrupted_step(self) -> None:
        self.interrupt = True
        try:
            self.engine.step()
        except KeyboardInterrupt:
            pass
        else:
            raise AssertionError("nothing ran")
        finally:
            self.interrupt = False
        self.engine.check_invariants()

    @precondition(lambda self: self.expected)
    @rule(at=st.integers(0, 99))
    def abort(self, at: int) -> None:
        name = list(self.expected)[at % len(self.expected)]
        assert self.engine.abort(name) is not None
        del self.expected[name]
        self.kept.discard(name)
        self.engine.check_invariants()

    @precondition(lambda self: self.engine.scheduler.running)
    @rule(at=st.integers(0, 99))
    def preempt(self, at: int) -> None:
        running = self.engine.scheduler.running
        self.engine.scheduler._preempt(running[at % len(running)])

    def _step(self) -> None:
        stepped = self.engine.step()
        for name, chunk in stepped.chunks:
            self.streamed.setdefault((name, chunk.index), []).extend(chunk.token_ids)
        for output in stepped.finished:
            name = output.request_id
            assert result(output) == self.expected.pop(name)
            for one in output.outputs:
                assert self.streamed.get((name, one.index), []) == one.token_ids, "nothing lost, nothing repeated"
            if name in self.kept:
                self.parked.append(self.engine.take_kept(name))

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(4000):
            if not self.engine.has_unfinished_requests():
                break
            self._step()
        assert not self.expected, "requests starved"
        for parked in self.parked:
            self.engine.release(parked)
        manager = self.engine.block_manager
        assert manager.num_free_blocks == manager.num_blocks
        manager.check([])


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


# ---- what was found once


def interrupted_at(call: int) -> Any:
    """A logits processor that is interrupted, as by Ctrl-C, the `call`-th time it is asked."""
    calls = count(1)

    def processor(token_ids: list[int], row: np.ndarray) -> np.ndarray:
        if next(calls) == call:
            raise KeyboardInterrupt
        return row

    return processor


@pytest.mark.parametrize("call", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", [{"n": 3, "max_tokens": 1}, {"n": 3}, {"best_of": 3}, {"beams": 3}, {"max_tokens": 2}])
def test_an_interrupt_while_tokens_are_chosen_changes_nothing(kind: dict[str, Any], call: int) -> None:
    """Neither for the request itself nor for one that has had its last token in the same step."""

    def outputs(*processors: Any) -> dict[str, Any]:
        engine = tiny_engine(max_batch_tokens=256)
        engine.add_request("one", [1, 2, 3], SamplingParams(max_tokens=1))
        params = {"max_tokens": 4, "seed": 3, **kind}
        engine.add_request("forks", [4, 5], SamplingParams(logits_processors=processors, **params))
        done: dict[str, Any] = {}
        while engine.has_unfinished_requests():
            with suppress(KeyboardInterrupt):
                done |= {output.request_id: result(output) for output in engine.step().finished}
        assert engine.block_manager.num_free_blocks == engine.block_manager.num_blocks
        return done

    assert outputs(interrupted_at(call)) == outputs()


def test_a_kept_sequence_that_ends_before_its_siblings() -> None:
    engine = tiny_engine()
    prompt = random_prompt(30)
    engine.add_request("n", prompt, SamplingParams(n=2, max_tokens=15, temperature=9.0))
    first, second = (one.token_ids for one in run(engine).outputs)
    end = first[0]
    assert end not in second[:3]
    engine.add_request(
        "n", prompt, SamplingParams(n=2, max_tokens=15, temperature=9.0, stop_token_ids=[end]), keep=True
    )
    assert [len(one.token_ids) for one in run(engine).outputs] == [1, min(15, [*second, end].index(end) + 1)]
    engine.release(engine.take_kept("n"))
    assert engine.block_manager.num_free_blocks == engine.block_manager.num_blocks


def test_sinks_that_reach_beyond_the_sequence_beside_a_longer_one() -> None:
    engine = tiny_engine(block_size=4)
    engine.add_request("long", random_prompt(100), SamplingParams(max_tokens=30))
    engine.add_request("sinks", random_prompt(6), SamplingParams(max_tokens=20, window=2, sinks=40))
    while engine.has_unfinished_requests():
        engine.step()
