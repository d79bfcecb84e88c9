"""SmolLM2-135M-Instruct, a real model, against what transformers and a plain numpy forward compute."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import FIXTURES
from tests.e2e.oracle import LlamaOracle
from tinyllm import LLM, InvalidRequestError, SamplingParams

GOLDEN = FIXTURES / "smollm2"
TOLERANCE = 1e-3  # of the logits' range


@lru_cache
def load(path: Path) -> LLM:
    return LLM(path, num_blocks=512, debug_checks=True)


@pytest.fixture(scope="module")
def llm(smollm2_path: Path) -> LLM:
    return load(smollm2_path)


@lru_cache
def golden() -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    prompts = json.loads((GOLDEN / "golden.json").read_text())["prompts"]
    with np.load(GOLDEN / "golden.npz") as arrays:
        return prompts, dict(arrays)


def test_prompts_have_llama_cpps_token_ids(llm: LLM) -> None:
    for prompt in golden()[0]:
        assert llm.encode(prompt["text"]) == prompt["token_ids"]


def test_logits_agree_with_transformers_at_every_position(llm: LLM) -> None:
    prompts, arrays = golden()
    ends = np.cumsum(arrays["lengths"])
    for n, (prompt, end) in enumerate(zip(prompts, ends, strict=True)):
        rows = slice(end - arrays["lengths"][n], end)
        expected = arrays["low"][n] + arrays["step"][n] * arrays["codes"][rows]
        found = llm.logits(prompt["token_ids"] + prompt["greedy_token_ids"])
        error = np.abs(found[:, arrays["columns"]] - expected).max(axis=1)
        assert (error < TOLERANCE * arrays["ranges"][rows]).all(), prompt["text"][:40]


def test_greedy_tokens_agree_wherever_the_top_two_are_apart(llm: LLM) -> None:
    """All 20 prompts in one batch; where a tie within the tolerance goes the other way, the texts may part."""
    prompts, arrays = golden()
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    outputs = llm.generate([p["token_ids"] for p in prompts], params)
    ends = np.cumsum(arrays["lengths"])
    compared = 0
    for n, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        limits = TOLERANCE * arrays["ranges"][ends[n] - 65 : ends[n] - 1]
        pairs = zip(prompt["greedy_token_ids"], output.outputs[0].token_ids, strict=True)
        for step, (expected, found) in enumerate(pairs):
            if arrays["margins"][n, step] > limits[step]:
                assert found == expected, f"{prompt['text'][:40]!r}, step {step}"
                compared += 1
            elif found != expected:
                break
    assert compared > 1000


def test_all_logits_agree_with_a_numpy_forward(llm: LLM, smollm2_path: Path) -> None:
    oracle = LlamaOracle(smollm2_path)
    for prompt in golden()[0][::5]:
        ids = prompt["token_ids"] + prompt["greedy_token_ids"]
        expected, found = oracle.logits(ids), llm.logits(ids)
        limit = TOLERANCE * np.ptp(expected, axis=1, keepdims=True)
        assert (np.abs(found - expected) < limit).all()


def test_decoding_equals_recomputing_bit_for_bit(llm: LLM, smollm2_path: Path) -> None:
    rows: list[np.ndarray] = []

    def spy(token_ids: list[int], logits: np.ndarray) -> np.ndarray:
        rows.append(logits.copy())
        return logits

    ids = golden()[0][-1]["token_ids"]
    params = SamplingParams(max_tokens=24, ignore_eos=True, logits_processors=[spy])
    tokens = llm.generate(ids, params)[0].outputs[0].token_ids
    assert np.stack(rows).tobytes() == llm.logits(ids + tokens)[len(ids) - 1 : -1].tobytes()
    chunked = LLM(smollm2_path, num_blocks=64, max_batch_tokens=17, num_threads=1, block_size=32)
    assert chunked.logits(ids).tobytes() == llm.logits(ids).tobytes()


def test_a_request_among_many_gives_the_bits_it_gives_alone(llm: LLM) -> None:
    prompts = [p["token_ids"] for p in golden()[0]]
    params = [SamplingParams(max_tokens=8 + 3 * i, seed=i, temperature=0.9, top_p=0.9, n=1 + i % 2) for i in range(20)]
    together = llm.generate(prompts, params)
    for i in (0, 7, 13):
        assert llm.generate(prompts[i], params[i])[0].outputs == together[i].outputs


def test_streamed_text_is_the_generated_text(llm: LLM) -> None:
    params = SamplingParams(max_tokens=40, temperature=1.2, seed=4, n=2, stop=[" the"])
    outputs = llm.generate("水は🙂", params)[0].outputs
    texts, ids, reasons = ["", ""], [[], []], [None, None]  # type: ignore[var-annotated]
    for chunk in llm.stream("水は🙂", params):
        assert "\N{REPLACEMENT CHARACTER}" not in chunk.text or "\N{REPLACEMENT CHARACTER}" in outputs[chunk.index].text
        texts[chunk.index] += chunk.text
        ids[chunk.index] += chunk.token_ids
        reasons[chunk.index] = chunk.finish_reason
    assert texts == [o.text for o in outputs]
    assert ids == [o.token_ids for o in outputs]
    assert reasons == [o.finish_reason for o in outputs]


def test_stop_strings_cut_the_text_and_name_themselves(llm: LLM) -> None:
    free = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=30))[0].outputs[0].text
    stop = free[12:17]
    output = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=30, stop=stop))[
        0
    ].outputs[0]
    assert output.text == free[: free.index(stop)]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    kept = SamplingParams(temperature=0, max_tokens=30, stop=stop, include_stop_str_in_output=True)
    assert llm.generate("The capital of France is", kept)[0].outputs[0].text == free[: free.index(stop) + len(stop)]


def test_chat_uses_the_models_template_and_ends_by_itself(llm: LLM) -> None:
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    output = llm.chat(messages, SamplingParams(temperature=0, max_tokens=60))
    assert "Paris" in output.outputs[0].text
    assert "<|im_" not in output.outputs[0].text
    assert output.outputs[0].finish_reason == "stop"
    text = "".join(chunk.text for chunk in llm.stream_chat(messages, SamplingParams(temperature=0, max_tokens=60)))
    assert text == output.outputs[0].text


def test_score_likes_english_better_than_noise(llm: LLM) -> None:
    english = llm.score("The sun rises in the east and sets in the west.")
    noise = llm.score("west the in rises and The. sets east sun the in")
    assert english.perplexity < 20 < 200 < noise.perplexity
    assert english.token_texts is not None
    assert "".join(english.token_texts) == "The sun rises in the east and sets in the west."


def test_logprobs_name_their_tokens(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=3)
    output = llm.generate("The capital of France is", params)[0].outputs[0]
    assert output.logprobs is not None
    for token, entries in zip(output.token_ids, output.logprobs, strict=True):
        assert entries[token].rank == 1
        assert len(entries) == 3
        assert entries[token].decoded_token
    assert output.text == "".join(
        e[t].decoded_token or "" for t, e in zip(output.token_ids, output.logprobs, strict=True)
    )


def test_embeddings_put_like_with_like(llm: LLM) -> None:
    cats, kittens, budget = llm.embed(
        ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "Parliament passed the budget."]
    )
    assert cats @ kittens > cats @ budget


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ("a\ud800b", "surrogate"),
        ("word " * 9000, "the prompt has 90|holds 8192"),
        ("x" * 10_000_000, "cannot fit into 8192 tokens"),
        ([49152], "from 0 to 49151"),
    ],
)
def test_bad_prompts_are_one_line(llm: LLM, prompt: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        llm.generate(prompt)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_memory_is_the_plan_and_the_plan_is_small(llm: LLM, smollm2_path: Path) -> None:
    runner = llm.engine.runner
    assert llm.memory.weights_nbytes == runner.model.nbytes
    assert llm.memory.kv_cache_nbytes == runner.cache.nbytes
    assert llm.memory.workspace_nbytes == runner.workspace.nbytes
    assert llm.memory.weights_nbytes < 1.03 * smollm2_path.stat().st_size
