"""tinyllm itself, through its engine."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from peers.interface import Room, UnavailableError

__all__ = ["TinyLLMPeer", "first_token", "load"]

_BLOCK = 16


class TinyLLMPeer:
    def __init__(self, model: str, threads: int, room: Room, options: dict[str, Any]) -> None:
        from tinyllm import __version__

        self.versions = {"tinyllm": __version__}
        self.llm = open_llm(
            model,
            threads,
            num_blocks=-(-room.tokens // _BLOCK) + room.sequences,
            block_size=_BLOCK,
            max_model_len=room.tokens,
            **options,
        )

    def prefill(self, token_ids: list[int]) -> float:
        times = self._run([token_ids], 1)
        return times[-1] - times[0]

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        assert sum(map(len, prompts)) <= self.llm.engine_config.max_batch_tokens or len(prompts) == 1
        times = self._run(prompts, steps + 1)  # the prompts end in the same step, and so do all tokens after them
        return times[-1] - times[-1 - steps]

    def best_tokens(self, token_ids: list[int]) -> list[int]:
        best: list[int] = np.argmax(self.llm.logits(token_ids), axis=1).tolist()
        return best

    def _run(self, prompts: list[list[int]], num_tokens: int) -> list[float]:
        """Continues the prompts greedily; the time at the beginning, and after each step."""
        from tinyllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        times = [time.perf_counter()]
        for index, prompt in enumerate(prompts):
            self.llm.engine.add_request(str(index), prompt, params)
        while self.llm.engine.has_unfinished_requests():
            self.llm.engine.step()
            times.append(time.perf_counter())
        return times


def load(model: str, threads: int, room: Room, **options: Any) -> TinyLLMPeer:
    return TinyLLMPeer(model, threads, room, options)


def first_token(model: str, threads: int, text: str, **options: Any) -> str:
    from tinyllm import SamplingParams

    llm = open_llm(model, threads, **options)
    return str(next(iter(llm.stream(text, SamplingParams(temperature=0, max_tokens=1)))).text)


def open_llm(model: str, threads: int, **options: Any) -> Any:
    from tinyllm import LLM
    from tinyllm.errors import ConfigError

    try:
        return LLM(model, device="cpu", num_threads=threads, prefix_caching=False, **options)
    except ConfigError as error:
        if str(error).startswith("unknown engine option"):
            raise UnavailableError(str(error).partition(";")[0]) from None
        raise
