"""The statistics that `generate` and `chat` print on stderr: tokens, seconds, memory."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from tinyllm.cli import console

if TYPE_CHECKING:
    from tinyllm.llm import LLM
    from tinyllm.outputs import RequestOutput

__all__ = ["BatchStats", "StreamStats", "peak_resident_nbytes", "rate"]

_IMPORTED_AT = time.monotonic()  # a few milliseconds after the process began


class StreamStats:
    """Of one prompt whose tokens arrive as they are made, or all at the end. Prefill ends with the first token."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._first: float | None = None
        self._last = self._begin
        self._tokens = 0
        self._first_tokens = 0  # those of the step that made the first token: prefill's, not decode's

    def add(self, tokens: int) -> None:
        self._last = time.monotonic()
        self._tokens += tokens
        if self._first is None and tokens:
            self._first, self._first_tokens = self._last, tokens

    def report(self, llm: LLM, prompt_tokens: int, *, since_start: bool = False, at_end: bool = False) -> None:
        """Two lines; `since_start` adds how long after the program's start the first token came, loading included.

        at_end: the text was chosen among others at the end, so there was no first token to see.
        """
        first = self._first if self._first is not None else self._last
        if at_end:
            seconds = self._last - self._begin
            console.notice(f"prompt {prompt_tokens} tokens, generated {self._tokens} tokens in {seconds:.2f} s")
            console.notice(_memory(llm))
            return
        prefill, decode = first - self._begin, self._last - first
        console.notice(
            f"prompt {prompt_tokens} tokens in {prefill:.2f} s ({rate(prompt_tokens, prefill)}), "
            f"generated {self._tokens} tokens in {self._last - self._begin:.2f} s "
            f"(decode {rate(self._tokens - self._first_tokens, decode)}), first token after {prefill:.2f} s"
            + (f", {first - _IMPORTED_AT:.2f} s since the start" if since_start else "")
        )
        console.notice(_memory(llm))


class BatchStats:
    """Of several prompts that ran together: what they took as a whole, and the mean time to a first token."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._prompts = self._prompt_tokens = self._tokens = 0
        self._first_token_seconds: list[float] = []

    def add(self, output: RequestOutput) -> None:
        self._prompts += 1
        self._prompt_tokens += len(output.prompt_token_ids)
        self._tokens += sum(len(o.token_ids) for o in output.outputs)
        metrics = output.metrics
        if metrics.first_token_time is not None:
            self._first_token_seconds.append(metrics.first_token_time - metrics.arrival_time)

    def report(self, llm: LLM) -> None:
        seconds = time.monotonic() - self._begin
        mean = sum(self._first_token_seconds) / max(len(self._first_token_seconds), 1)
        console.notice(
            f"{self._prompts} {'prompt' if self._prompts == 1 else 'prompts'} of {self._prompt_tokens} tokens, "
            f"generated {self._tokens} tokens "
            f"in {seconds:.2f} s ({rate(self._tokens, seconds)}); first token after {mean:.2f} s on average"
        )
        console.notice(_memory(llm))


def rate(tokens: int, seconds: float) -> str:
    """ "12.3 tokens/s", or "-" where nothing was measured."""
    return f"{tokens / seconds:.1f} tokens/s" if tokens > 0 and seconds > 0 else "-"


def _memory(llm: LLM) -> str:
    plan = llm.memory
    text = (
        f"memory: weights {console.format_bytes(plan.weights_nbytes)}, "
        f"KV cache {console.format_bytes(plan.kv_cache_nbytes)} for {plan.num_tokens} tokens, "
        f"workspace {console.format_bytes(plan.workspace_nbytes + plan.scratch_nbytes)}"
    )
    peak = peak_resident_nbytes()
    return f"{text}; peak resident {console.format_bytes(peak)}" if peak else text


def peak_resident_nbytes() -> int | None:
    """The most memory that this process ever held, or None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
