"""A stand-in for tinyllm.llm.LLM whose answers are known beforehand, for tests of the command line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from tinyllm.backends.base import KVCacheSpec
from tinyllm.config import EngineConfig
from tinyllm.errors import InvalidRequestError
from tinyllm.outputs import CompletionOutput, RequestMetrics, RequestOutput, ScoreOutput, StreamChunk
from tinyllm.plan import MemoryPlan
from tinyllm.sampling_params import SamplingParams

LIMIT = 100  # characters: a token is a character


class FakeTokenizer:
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(c) for c in text]

    def apply_chat_template(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool) -> str:
        assert add_generation_prompt
        return "".join(f"{m['role'][0]}:{m['content']}|" for m in messages)


class FakeLLM:
    """Answers a prompt with its characters in upper case, one token a character, n times.

    Batches finish in reverse order. A prompt "boom" fails while it runs, and "slow" calls `on_slow` before it answers.
    """

    def __init__(self, on_slow: Callable[[], None] = lambda: None) -> None:
        self.tokenizer = FakeTokenizer()
        self.engine = SimpleNamespace(check_request=self._check)
        self.engine_config = EngineConfig()
        self.config = SimpleNamespace(vocab_size=50)
        self.seen: list[tuple[str, SamplingParams]] = []
        self.aborted = 0
        self.on_slow = on_slow
        spec = KVCacheSpec(num_layers=1, num_blocks=10, block_size=10, num_kv_heads=1, head_dim=1, dtype="f32")
        self.memory = MemoryPlan(
            weights_nbytes=3 << 20,
            kv_cache_nbytes=1 << 20,
            workspace_nbytes=1000,
            scratch_nbytes=0,
            kv_nbytes_per_token=8,
            kv_cache_spec=spec,
            max_sequence_len=LIMIT,
            available_nbytes=1 << 30,
        )

    def encode(self, prompt: str | list[int], *, windowed: bool = False) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return self.tokenizer.encode(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True))

    def _check(self, token_ids: Sequence[Any], params: SamplingParams) -> list[int]:
        if not token_ids:
            raise InvalidRequestError("the prompt is empty")
        for token in token_ids:
            if type(token) is not int or not 0 <= token < 1 << 20:
                raise InvalidRequestError(f"a prompt token id must be an integer from 0 to 9, not {token!r}")
        if len(token_ids) >= LIMIT:
            raise InvalidRequestError(f"the prompt has {len(token_ids)} tokens; the model's context holds {LIMIT}")
        return list(token_ids)

    def _answer(self, token_ids: Sequence[int], params: SamplingParams) -> str:
        prompt = "".join(map(chr, token_ids))
        self.seen.append((prompt, params))
        if "slow" in prompt:
            self.on_slow()
        return prompt.upper()[: params.max_tokens]

    def stream(self, prompt: list[int], params: SamplingParams) -> Iterator[StreamChunk]:
        text = self._answer(prompt, params)
        try:
            for i, char in enumerate(text):
                reason = "length" if i + 1 == len(text) else None
                for index in reversed(range(params.n)):
                    yield StreamChunk(index, char if index == 0 else str(index), [ord(char)], reason)
        except GeneratorExit:
            self.aborted += 1
            raise

    def generate(
        self,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        on_finish: Callable[[int, RequestOutput], None] | None = None,
    ) -> list[RequestOutput]:
        outputs = []
        for number, (prompt, one) in enumerate(zip(prompts, params, strict=True), 1):
            text = self._answer(prompt, one)
            failed = text == "BOOM"
            samples = [
                CompletionOutput(i, text, [ord(c) for c in text], finish_reason="error" if failed else "length")
                for i in range(one.n)
            ]
            now = time.monotonic()
            metrics = RequestMetrics(now, now, now)
            error = "a logits processor failed" if failed else None
            outputs.append(RequestOutput(str(number), None, prompt, samples, error=error, metrics=metrics))
        for index, output in reversed(list(enumerate(outputs))):
            if on_finish is not None:
                on_finish(index, output)
        return outputs

    def score(self, text: str) -> ScoreOutput:
        logprobs = np.full(len(text) - 1, -0.5, np.float32)
        return ScoreOutput(self.encode(text), list(text), logprobs, float(np.exp(0.5)))
