"""From the engine's sequences to what users see."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence as Seq

from tinyllm.engine.sequence import Request, Sequence
from tinyllm.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, StreamChunk
from tinyllm.sampling import TokenLogprob

__all__ = ["request_output", "stream_chunk"]

TokenText = Callable[[int], str]


def stream_chunk(sequence: Sequence, token_text: TokenText | None) -> StreamChunk:
    """What the sequence gained since the last chunk."""
    first = sequence.num_streamed_tokens
    new = sequence.token_ids[sequence.num_prompt_tokens + first :]
    sequence.num_streamed_tokens = sequence.num_output_tokens
    text = sequence.text.take(final=sequence.finish_reason is not None)
    logprobs = None
    if sequence.request.params.logprobs is not None:
        logprobs = [_logprobs(entries, token_text) for entries in sequence.logprobs[first:]]
    return StreamChunk(sequence.index, text, new, sequence.finish_reason, logprobs)


def request_output(request: Request, token_text: TokenText | None) -> RequestOutput:
    """The finished (or ended) request as a whole."""
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    if request.params.prompt_logprobs is not None:
        prompt_logprobs = [None, *(_logprobs(entries, token_text) for entries in request.prompt_logprobs)]
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_token_ids=request.prompt_token_ids,
        outputs=[_completion(sequence, token_text) for sequence in request.sequences],
        prompt_logprobs=prompt_logprobs,
        error=request.error,
        rows=request.rows,
        metrics=RequestMetrics(request.arrival_time, request.first_token_time, time.monotonic()),
        num_cached_tokens=request.num_cached_tokens or 0,
    )


def _completion(sequence: Sequence, token_text: TokenText | None) -> CompletionOutput:
    wanted = sequence.request.params.logprobs is not None
    return CompletionOutput(
        index=sequence.index,
        text=sequence.text.text,
        token_ids=sequence.output_token_ids,
        cumulative_logprob=sum(entries[0].logprob for entries in sequence.logprobs) if wanted else None,
        logprobs=[_logprobs(entries, token_text) for entries in sequence.logprobs] if wanted else None,
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
        score=sequence.score if sequence.request.params.ranked else None,
    )


def _logprobs(entries: Seq[TokenLogprob], token_text: TokenText | None) -> dict[int, Logprob]:
    return {
        entry.token_id: Logprob(entry.logprob, entry.rank, None if token_text is None else token_text(entry.token_id))
        for entry in entries
    }
