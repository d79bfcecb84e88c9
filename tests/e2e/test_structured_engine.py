"""Structured output in the engine, over the tiny model: masks, forks, beams, ends, errors, and the same bits.

The grammar is a plain one over token ids; see tests.id_matcher. Real ones are in test_structured_llm.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from tests.id_matcher import IdMatcher
from tests.tiny import logits, random_prompt, run_all, tiny_engine
from tinyllm.engine.llm_engine import LLMEngine
from tinyllm.engine.sequence import Task
from tinyllm.errors import InvalidRequestError
from tinyllm.outputs import CompletionOutput, RequestOutput
from tinyllm.sampling import SamplingParams, TokenHistory, sample
from tinyllm.structured_output import StructuredOutput

IDS = range(10, 21)
LENGTH = 9
WANTED = StructuredOutput.regex("whatever the engine's matcher is")
PROMPT = random_prompt(37)


def engine_of(device: str = "cpu", eos: tuple[int, ...] = (7,), **options: Any) -> LLMEngine:
    matcher = IdMatcher(
        options.pop("ids", IDS), LENGTH, **{k: options.pop(k) for k in ("least", "fails_at") if k in options}
    )
    return tiny_engine(device, eos=eos, make_matcher=lambda wanted: matcher.copy(), **options)


def run(engine: LLMEngine, prompt: list[int] = PROMPT, **params: Any) -> RequestOutput:
    engine.add_request("probe", prompt, SamplingParams(**{"structured_output": WANTED, "max_tokens": 40, **params}))
    return run_all(engine)["probe"]


def check(output: CompletionOutput, reason: str = "stop", length: int = LENGTH) -> None:
    assert output.finish_reason == reason
    assert output.stop_reason is None
    assert len(output.token_ids) == length
    assert set(output.token_ids) <= set(IDS)
    assert all((a - b) % 2 for a, b in pairwise(output.token_ids))


@pytest.mark.parametrize("device", ["reference", "cpu"])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0},
        {"ignore_eos": True},
        {"n": 3, "top_k": 3},
        {"best_of": 4, "n": 2, "top_p": 0.95, "min_p": 0.01},
        {"beams": 3, "n": 3},
        {"beams": 4, "n": 2, "ignore_eos": True, "early_stopping": "never"},
        {"min_tokens": LENGTH},
        {"repetition_penalty": 1.3, "logit_bias": {40: 1e9}},
        {"logits_processors": [lambda ids, logits: logits + 1000 * (np.arange(61) == 33)]},
        {"window": 16, "sinks": 2},
    ],
    ids=lambda params: " ".join(params) or "defaults",
)
def test_texts_match_and_end_where_they_are_complete(device: str, params: dict[str, Any]) -> None:
    result = run(engine_of(device), **params)
    assert result.error is None
    assert len(result.outputs) == params.get("n", 1)
    for output in result.outputs:
        check(output)
    assert len({tuple(output.token_ids) for output in result.outputs}) == len(result.outputs)


def test_a_token_is_the_one_that_sampling_takes_among_those_allowed() -> None:
    """By hand: the others at -inf."""
    params = SamplingParams(structured_output=WANTED, top_k=4, temperature=0.8, seed=5)
    (output,) = run(engine_of(), top_k=4, temperature=0.8, seed=5).outputs
    matcher, ids = IdMatcher(IDS, LENGTH), PROMPT
    for token in output.token_ids:
        row = logits(tiny_engine("cpu"), ids)[-1]
        masked = np.full_like(row, -np.inf)
        masked[matcher.allowed_ids()] = row[matcher.allowed_ids()]
        expected = sample(masked, params, token_ids=ids, history=TokenHistory.of(ids), fork_path=(0,))
        assert token == expected.token_id
        matcher.advance(token)
        ids = [*ids, token]


def test_log_probabilities_are_the_models_own() -> None:
    (output,) = run(engine_of(), logprobs=2, temperature=0).outputs
    assert output.logprobs is not None
    ids = PROMPT
    for token, entries in zip(output.token_ids, output.logprobs, strict=True):
        row = logits(tiny_engine("cpu"), ids)[-1].astype(np.float64)
        expected = row - np.log(np.exp(row).sum())
        assert set(np.argsort(-row)[:2].tolist()) <= entries.keys()
        np.testing.assert_allclose(entries[token].logprob, expected[token], atol=1e-5)
        ids = [*ids, token]


def test_beams_are_the_best_of_all_texts() -> None:
    """With enough beams for every text, the search is exhaustive."""
    short = IdMatcher([10, 11, 13, 14], 3)
    engine = tiny_engine("cpu", make_matcher=lambda wanted: short.copy())
    texts = [(a, b, c) for a in short.ids for b in short.ids for c in short.ids if (a - b) % 2 and (b - c) % 2]
    scores = {}
    for text in texts:
        rows = logits(tiny_engine("cpu"), [*PROMPT, *text])[len(PROMPT) - 1 :].astype(np.float64)
        logprobs = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
        scores[text] = sum(logprobs[i, token] for i, token in enumerate(text)) / 3
    result = run(engine, beams=16, n=16)
    found = {tuple(output.token_ids): output.score for output in result.outputs}
    assert len(texts) == 16
    assert found.keys() == scores.keys()
    for text, score in found.items():
        np.testing.assert_allclose(score, scores[text], atol=1e-5)
    assert list(found) == sorted(scores, key=lambda text: -scores[text])


# ---- ends


def test_the_end_token_may_come_where_the_text_may_end() -> None:
    engine = engine_of(least=4)
    (output,) = run(engine, logit_bias={7: 1e9}).outputs
    assert output.token_ids[-1] == 7
    assert (len(output.token_ids), output.finish_reason, output.stop_reason) == (5, "stop", None)
    check(run(engine, logit_bias={7: 1e9}, ignore_eos=True).outputs[0])
    (output,) = run(engine, logit_bias={7: 1e9}, min_tokens=7).outputs
    assert len(output.token_ids) == 8


def test_a_stop_token_ends_the_text_where_it_may_end() -> None:
    engine = engine_of(least=4)
    (output,) = run(engine, logit_bias={50: 1e9}, stop_token_ids=[50], ignore_eos=True).outputs
    assert output.token_ids[-1] == 50
    assert (len(output.token_ids), output.finish_reason, output.stop_reason) == (5, "stop", 50)


def test_a_stop_token_that_is_text_ends_it_early() -> None:
    (output,) = run(engine_of(), logit_bias={13: 1e9}, stop_token_ids=[13]).outputs
    assert output.token_ids == [13]
    assert (output.finish_reason, output.stop_reason) == ("stop", 13)


@pytest.mark.parametrize("beams", [None, 2])
def test_max_tokens_may_cut_a_text(beams: int | None) -> None:
    check(run(engine_of(), max_tokens=5, beams=beams).outputs[0], "length", 5)


@pytest.mark.parametrize("beams", [None, 2])
def test_a_text_that_is_complete_at_its_last_token_has_stopped(beams: int | None) -> None:
    check(run(engine_of(), max_tokens=LENGTH, beams=beams).outputs[0], "stop")


# ---- errors end one request alone


@pytest.mark.parametrize(
    ("options", "params", "message"),
    [
        ({"fails_at": 4}, {}, "the matcher failed"),
        ({"fails_at": 4}, {"n": 3}, "the matcher failed"),
        ({"fails_at": 4}, {"beams": 3}, "the matcher failed"),
        ({"fails_at": 0}, {}, "the matcher failed"),
        ({}, {"min_tokens": 12}, "the structured output is complete after 9 tokens, and min_tokens is 12"),
        ({}, {"min_tokens": 12, "beams": 2}, "every token is forbidden"),
        ({}, {"logits_processors": [lambda ids, row: row - np.inf]}, "that the structured output allows is above -inf"),
        (
            {"eos": (12,), "ids": [12]},
            {"min_tokens": 9},
            "that the structured output allows is above -inf",
        ),
    ],
    ids=["mask", "forks", "beams", "first", "min_tokens", "min_tokens beams", "processor", "banned"],
)
def test_an_error_is_one_requests_own(options: dict[str, Any], params: dict[str, Any], message: str) -> None:
    engine = engine_of(**options)
    neighbour = SamplingParams(max_tokens=20, seed=3)
    engine.add_request("neighbour", random_prompt(20, 1), neighbour)
    wanted = SamplingParams(**{"structured_output": WANTED, "max_tokens": 40, **params})
    engine.add_request("probe", PROMPT, wanted)
    done = run_all(engine)
    error = done["probe"].error
    assert error is not None and message in error and "\n" not in error
    assert {output.finish_reason for output in done["probe"].outputs} == {"error"}
    alone = engine_of(eos=options.get("eos", (7,)))
    alone.add_request("neighbour", random_prompt(20, 1), neighbour)
    assert run_all(alone)["neighbour"].outputs == done["neighbour"].outputs


def test_what_cannot_be_compiled_is_refused_before_anything_starts() -> None:
    def refuse(wanted: StructuredOutput) -> IdMatcher:
        raise InvalidRequestError("it cannot be compiled")

    engine = tiny_engine(make_matcher=refuse)
    with pytest.raises(InvalidRequestError, match="it cannot be compiled"):
        run(engine)
    with pytest.raises(InvalidRequestError, match="structured output needs a tokenizer"):
        run(tiny_engine())
    assert not engine.has_unfinished_requests()
    engine.add_request("score", PROMPT, SamplingParams(structured_output=WANTED), task=Task.SCORE)
    assert run_all(engine)["score"].error is None  # nothing is generated


# ---- the same bits

PARAMS: list[dict[str, Any]] = [
    {"seed": 3},
    {"temperature": 0},
    {"n": 3, "seed": 1},
    {"beams": 3, "n": 3},
    {"best_of": 3, "n": 1},
]


def neighbours(engine: LLMEngine, count: int) -> None:
    for i in range(count):
        wanted = WANTED if i % 2 else None
        params = SamplingParams(max_tokens=5 + i, seed=i, n=1 + i % 2, structured_output=wanted)
        engine.add_request(f"neighbour {i}", random_prompt(9 + 5 * i, i), params)


@pytest.mark.parametrize("params", PARAMS, ids=lambda params: " ".join(params))
@pytest.mark.parametrize("device", ["cpu", "cuda-emulated"])
def test_tokens_do_not_depend_on_the_schedule(device: str, params: dict[str, Any]) -> None:
    if device == "cuda-emulated" and params != PARAMS[0]:
        pytest.skip("one is enough: the emulator is slow")
    alone = run(engine_of(device), **params).outputs
    crowded = engine_of(device, max_batch_tokens=16 if device == "cpu" else 64)
    neighbours(crowded, 6 if device == "cpu" else 2)
    assert run(crowded, **params).outputs == alone
    if device == "cpu":
        for chunk in (1, 7, 17):
            assert run(engine_of(device, max_batch_tokens=chunk), **params).outputs == alone
        scarce = engine_of(device, num_blocks=8, max_batch_tokens=16)
        neighbours(scarce, 6)
        assert run(scarce, **params).outputs == alone


@pytest.mark.parametrize("params", PARAMS, ids=lambda params: " ".join(params))
def test_tokens_do_not_depend_on_preemption(params: dict[str, Any]) -> None:
    alone = run(engine_of(), **params).outputs
    engine = engine_of(max_batch_tokens=16)
    engine.add_request("probe", PROMPT, SamplingParams(structured_output=WANTED, max_tokens=40, **params))
    found: list[CompletionOutput] = []
    steps = 0
    while engine.has_unfinished_requests():
        if steps % 5 == 4:
            for sequence in list(engine.scheduler.running):
                engine.scheduler._preempt(sequence)
        found += [output for result in engine.step().finished for output in result.outputs]
        steps += 1
    assert found == alone


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("at", range(5))
def test_an_interrupted_step_is_made_up_for(n: int, at: int) -> None:
    """The token was appended, but the matcher had not seen it yet."""
    expected = run(engine_of(), n=n, seed=4).outputs
    advances = iter(range(100))

    class Interrupted(IdMatcher):
        def advance(self, token_id: int) -> None:
            if next(advances) == at:
                raise KeyboardInterrupt
            super().advance(token_id)

        def copy(self) -> Interrupted:
            other = Interrupted(self.ids, self.length)
            other.tokens = self.tokens.copy()
            return other

    engine = tiny_engine("cpu", eos=(7,), make_matcher=lambda wanted: Interrupted(IDS, LENGTH))
    engine.add_request("probe", PROMPT, SamplingParams(structured_output=WANTED, max_tokens=40, n=n, seed=4))
    with pytest.raises(KeyboardInterrupt):
        run_all(engine)
    assert run_all(engine)["probe"].outputs == expected


def test_a_kept_sequence_begins_a_new_text_at_its_end() -> None:
    engine = engine_of()
    params = SamplingParams(structured_output=WANTED, max_tokens=40, seed=2)
    engine.add_request("first", PROMPT, params, keep=True)
    first = engine_result(engine, "first")
    parked = engine.take_kept("first")
    assert parked.matcher is None
    fork = engine.fork(parked)
    prompt = parked.token_ids
    engine.add_request("second", prompt, params, resume_from=parked, keep=False)
    second = engine_result(engine, "second")
    check(first.outputs[0])
    check(second.outputs[0])
    assert second.outputs == run(engine_of(), prompt, seed=2).outputs
    engine.release(parked)
    engine.release(fork)
    assert engine.block_manager.num_free_blocks == engine.block_manager.num_blocks


def engine_result(engine: LLMEngine, name: str) -> RequestOutput:
    while True:
        for output in engine.step().finished:
            if output.request_id == name:
                return output
