"""What a request gives back, in the shape that vLLM's users know."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["CompletionOutput", "Logprob", "RequestMetrics", "RequestOutput", "ScoreOutput", "StreamChunk"]


@dataclass(frozen=True)
class Logprob:
    """log p of a token under the model, its rank (1 = most likely) and its text (None without a tokenizer)."""

    logprob: float
    rank: int
    decoded_token: str | None


@dataclass(frozen=True)
class CompletionOutput:
    """One of a request's n continuations.

    Attributes:
        index: which of the n, best first where they were chosen among more.
        text: the generated text, "" without a tokenizer.
        token_ids: the generated ids, an ending token included.
        cumulative_logprob: the sum of the chosen tokens' log-probabilities; None unless logprobs were asked for.
        logprobs: for each token, token id -> Logprob: the chosen token and the most likely ones.
        finish_reason: "stop" (an end token or stop string), "length", "abort" or "error"; None while running.
        stop_reason: the stop string or stop token id that ended it, if one did.
        score: what it was chosen by: with best_of the log-probability per token, in a beam search the sum of
            log-probabilities / (tokens generated) ** length_penalty; None otherwise.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    score: float | None = None


@dataclass(frozen=True)
class RequestMetrics:
    """Times in seconds, of time.monotonic()."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A finished request.

    Attributes:
        prompt_logprobs: one entry a prompt token, where asked for; the first is None: nothing precedes it.
        error: why the request failed, where some finish_reason is "error".
        num_cached_tokens: how many of the prompt's tokens were not computed, since the cache had them.
        rows: (T, V) logits or (T, M) hidden states, for requests that asked for those instead of text.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    finished: bool = True
    error: str | None = None
    rows: NDArray[np.float32] | None = None
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(0.0))
    num_cached_tokens: int = 0


@dataclass(frozen=True)
class StreamChunk:
    """What one step added to continuation `index`: text that will not change any more, and the new ids.

    logprobs has an entry for each new id, as in CompletionOutput, where they were asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    logprobs: list[dict[int, Logprob]] | None = None


@dataclass(frozen=True)
class ScoreOutput:
    """How likely a text is: logprobs[i] is log p(token_ids[i + 1] | the tokens before it), (T - 1,) float32."""

    token_ids: list[int]
    token_texts: list[str] | None
    logprobs: NDArray[np.float32]
    perplexity: float
