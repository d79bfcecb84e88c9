"""LLM over a small checkpoint without a tokenizer: ids in, ids and numpy out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyllm import (
    LLM,
    ConfigError,
    DeviceError,
    InvalidRequestError,
    ModelFileError,
    ModelNotFoundError,
    SamplingParams,
)

FOLDER = Path(__file__).parents[1] / "fixtures" / "models" / "llama"
GREEDY = SamplingParams(temperature=0, max_tokens=9)


@pytest.fixture(scope="module", params=["reference", "cpu"])
def llm(request: pytest.FixtureRequest) -> LLM:
    return LLM(FOLDER, device=request.param, num_blocks=64, max_batch_tokens=32, debug_checks=True)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(llm: LLM) -> Iterator[None]:
    yield
    assert not llm.engine.has_unfinished_requests()
    assert llm.engine.block_manager.num_free_blocks == 64


def test_a_prompt_in_every_form_gives_the_same(llm: LLM) -> None:
    forms: list[Any] = [[1, 2, 3], (1, 2, 3), np.array([1, 2, 3]), [[1, 2, 3]], [np.array([1, 2, 3], np.uint8)]]
    results = [llm.generate(form, GREEDY) for form in forms]
    assert {len(result) for result in results} == {1}
    assert len({tuple(result[0].outputs[0].token_ids) for result in results}) == 1
    assert results[0][0].prompt_token_ids == [1, 2, 3]
    assert results[0][0].outputs[0].text == ""
    assert results[0][0].outputs[0].finish_reason == "length"


def test_outputs_come_in_the_order_of_the_prompts_whatever_ends_first(llm: LLM) -> None:
    prompts = [[5] * 40, [6], [7] * 11]
    params = [SamplingParams(temperature=0, max_tokens=m, ignore_eos=True) for m in (20, 2, 8)]
    ended: list[int] = []
    outputs = llm.generate(prompts, params, on_finish=lambda index, output: ended.append(len(prompts[index])))
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == [20, 2, 8]
    assert ended == [1, 11, 40]
    for prompt, param, output in zip(prompts, params, outputs, strict=True):
        assert llm.generate(prompt, param)[0].outputs == output.outputs
    assert llm.generate([]) == []


def test_a_bad_prompt_among_good_ones_is_named_and_nothing_starts(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="prompt 1: a prompt token id must be an integer"):
        llm.generate([[1], [2, -1], [3]])
    with pytest.raises(InvalidRequestError, match="2 sampling parameters for 1 prompts"):
        llm.generate([[1]], [GREEDY, GREEDY])
    for bad in ("text", ["text"]):
        with pytest.raises(InvalidRequestError, match="no tokenizer: pass token ids"):
            llm.generate(bad)
    for bad in (b"abc", 7, None, {1: 2}, np.zeros((2, 2)), np.array([1.5])):
        with pytest.raises(InvalidRequestError):
            llm.generate(bad)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="cannot chat"):
        llm.chat([{"role": "user", "content": "hello"}])


def test_streams_run_beside_each_other_and_beside_generate(llm: LLM) -> None:
    expected = {i: llm.generate([i, i + 1], GREEDY)[0].outputs[0].token_ids for i in (1, 2, 3)}
    streams = {i: llm.stream([i, i + 1], GREEDY) for i in (1, 2)}
    got: dict[int, list[int]] = {1: [], 2: []}
    for _ in range(4):
        for i, stream in streams.items():
            got[i] += next(stream).token_ids
    assert llm.generate([3, 4], GREEDY)[0].outputs[0].token_ids == expected[3]
    for i, stream in streams.items():
        for chunk in stream:
            got[i] += chunk.token_ids
        assert got[i] == expected[i]


def test_leaving_a_stream_early_frees_its_blocks(llm: LLM) -> None:
    for chunk in llm.stream([1] * 20, SamplingParams(n=3, max_tokens=30)):
        assert chunk.index in (0, 1, 2)
        break
    unstarted = llm.stream([1], GREEDY)
    del unstarted
    with pytest.raises(InvalidRequestError, match="the prompt is empty"):
        llm.stream([], GREEDY)


def test_an_interrupted_generate_leaves_nothing_behind(llm: LLM) -> None:
    def interrupt(token_ids: list[int], logits: np.ndarray) -> np.ndarray:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1, 2], [3]], [GREEDY, SamplingParams(logits_processors=[interrupt])])


def test_a_failing_processor_is_reported_by_generate_and_raised_by_stream(llm: LLM) -> None:
    def fail(token_ids: list[int], logits: np.ndarray) -> np.ndarray:
        raise ValueError("no")

    params = SamplingParams(logits_processors=[fail])
    good, bad = llm.generate([[1], [2]], [GREEDY, params])
    assert good.error is None
    assert bad.error == "a logits processor failed: ValueError: no"
    with pytest.raises(InvalidRequestError, match="ValueError: no"):
        list(llm.stream([1], params))


def test_score_logits_and_embed_agree(llm: LLM) -> None:
    ids = [3, 1, 4, 1, 5, 9, 2, 6] * 6
    logits = llm.logits(ids)
    assert logits.shape == (48, llm.config.vocab_size)
    assert logits.dtype == np.float32
    log_probs = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    expected = log_probs[np.arange(47), ids[1:]]
    score = llm.score(ids)
    np.testing.assert_allclose(score.logprobs, expected, atol=1e-5)
    assert score.perplexity == pytest.approx(np.exp(-expected.mean()), rel=1e-5)
    assert score.token_texts is None
    assert score.token_ids == ids
    with pytest.raises(InvalidRequestError, match="at least two tokens"):
        llm.score([1])
    vectors = llm.embed([ids, [1, 2]])
    assert vectors.shape == (2, llm.config.hidden_size)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert llm.embed([1, 2]).tobytes() == vectors[1:].tobytes()


def test_the_plan_is_exact(llm: LLM) -> None:
    runner = llm.engine.runner
    assert llm.memory.weights_nbytes == runner.model.nbytes
    assert llm.memory.kv_cache_nbytes == runner.cache.nbytes
    assert llm.memory.workspace_nbytes == runner.workspace.nbytes
    assert llm.memory.num_tokens == 64 * 16


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (FOLDER, {"blocks": 3}, ConfigError, "unknown engine option 'blocks'"),
        (FOLDER, {"device": "abacus"}, DeviceError, "unknown device 'abacus'"),
        (FOLDER, {"max_model_len": 10**6}, ConfigError, "max_model_len 1000000 exceeds"),
        (FOLDER, {"num_blocks": 10**8}, ConfigError, "KV blocks take|slots"),
        ("no-such-model", {}, ModelNotFoundError, "no-such-model"),
        (Path(__file__), {}, ModelFileError, "test_llm.py"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(model: Any, options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        LLM(model, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"window": 10**6}, "sinks and window span 1000004 tokens; the model's context holds 64"),
        ({"beams": 300}, "beams is 300, but at most 256 sequences may run"),
        ({"best_of": 300}, "best_of is 300, but at most 256"),
    ],
)
def test_what_no_cache_could_serve_is_named(llm: LLM, params: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        llm.generate([1, 2, 3], SamplingParams(**params))


def test_a_window_must_fit_in_the_cache_with_room_around_it() -> None:
    small = LLM(FOLDER, device="reference", num_blocks=4)
    with pytest.raises(InvalidRequestError, match=r"span 44 tokens; .* more than the whole KV cache of 64"):
        small.generate([1, 2, 3], SamplingParams(window=40))
    small.generate([1, 2, 3], SamplingParams(window=15, sinks=1))


def test_a_window_needs_rotary_positions() -> None:
    gpt2 = LLM(FOLDER.parent / "gpt2", device="reference", num_blocks=64)
    with pytest.raises(InvalidRequestError, match="a window needs rotary positions"):
        gpt2.generate([1, 2, 3], SamplingParams(window=8))


def test_with_a_window_a_prompt_may_be_longer_than_the_context_and_the_cache(llm: LLM) -> None:
    prompt = np.random.default_rng(0).integers(0, llm.config.vocab_size, 3000).tolist()
    assert len(prompt) > llm.memory.max_sequence_len
    params = SamplingParams(window=30, temperature=0, max_tokens=5, prompt_logprobs=0)
    first, second = (llm.generate(prompt, params)[0] for _ in range(2))
    assert first.outputs == second.outputs
    assert first.prompt_logprobs == second.prompt_logprobs
    with pytest.raises(InvalidRequestError, match="the prompt has 3000 tokens"):
        llm.generate(prompt, GREEDY)
