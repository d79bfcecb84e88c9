"""What holds for any real model: the one that comes with tinyllm, and SmolLM2 where there is a network."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import FIXTURES
from tests.e2e.golden import TOLERANCE, Golden
from tests.e2e.oracle import folder_oracle, gguf_oracle
from tinyllm import LLM, CompletionOutput, SamplingParams


@lru_cache
def load(path: Path) -> LLM:
    return LLM(path, num_blocks=512, debug_checks=True)


@pytest.fixture
def llm(real_model: Path) -> LLM:
    return load(real_model)


@pytest.fixture
def golden(real_model: Path) -> Golden:
    return Golden(FIXTURES / ("bundled" if real_model.is_dir() else "smollm2"))


def test_logits_agree_with_transformers_at_every_position(llm: LLM, golden: Golden) -> None:
    golden.check_logits(llm)


def test_greedy_tokens_agree_wherever_the_top_two_are_apart(llm: LLM, golden: Golden) -> None:
    golden.check_greedy_tokens(llm)


def test_all_logits_agree_with_a_numpy_forward(llm: LLM, golden: Golden, real_model: Path) -> None:
    oracle = folder_oracle(real_model) if real_model.is_dir() else gguf_oracle(real_model)
    for ids in golden.texts[::5]:
        expected, found = oracle.logits(ids), llm.logits(ids)
        limit = TOLERANCE * np.ptp(expected, axis=1, keepdims=True)
        assert (np.abs(found - expected) < limit).all()


def test_decoding_equals_recomputing_bit_for_bit(llm: LLM, golden: Golden, real_model: Path) -> None:
    rows: list[np.ndarray] = []

    def spy(token_ids: list[int], logits: np.ndarray) -> np.ndarray:
        rows.append(logits.copy())
        return logits

    ids = golden.token_ids[-1]
    params = SamplingParams(max_tokens=24, ignore_eos=True, logits_processors=[spy])
    tokens = llm.generate(ids, params)[0].outputs[0].token_ids
    assert np.stack(rows).tobytes() == llm.logits(ids + tokens)[len(ids) - 1 : -1].tobytes()
    chunked = LLM(real_model, num_blocks=64, max_batch_tokens=17, num_threads=1, block_size=32)
    assert chunked.logits(ids).tobytes() == llm.logits(ids).tobytes()


def test_a_request_among_many_gives_the_bits_it_gives_alone(llm: LLM, golden: Golden) -> None:
    prompts = golden.token_ids
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
    def continuation(**options: Any) -> CompletionOutput:
        params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, **options)
        return llm.generate("The capital of France is", params)[0].outputs[0]

    free = continuation().text
    stop = free[12:17]
    output = continuation(stop=stop)
    assert output.text == free[: free.index(stop)]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    kept = continuation(stop=stop, include_stop_str_in_output=True)
    assert kept.text == free[: free.index(stop) + len(stop)]


def test_logprobs_name_their_tokens(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=3, ignore_eos=True)
    output = llm.generate("Once upon a time", params)[0].outputs[0]
    assert output.logprobs is not None
    for token, entries in zip(output.token_ids, output.logprobs, strict=True):
        assert entries[token].rank == 1
        assert len(entries) == 3
        assert entries[token].decoded_token
    assert output.text == "".join(
        e[t].decoded_token or "" for t, e in zip(output.token_ids, output.logprobs, strict=True)
    )


def test_memory_is_the_plan_and_the_plan_is_small(llm: LLM, real_model: Path) -> None:
    runner = llm.engine.runner
    assert llm.memory.weights_nbytes == runner.model.nbytes
    assert llm.memory.kv_cache_nbytes == runner.cache.nbytes
    assert llm.memory.workspace_nbytes == runner.workspace.nbytes
    file = real_model / "model.safetensors" if real_model.is_dir() else real_model
    assert llm.memory.weights_nbytes < 1.03 * file.stat().st_size
