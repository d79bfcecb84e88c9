"""A request and the sequences that it owns."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tinyllm.engine.text import TextStream
from tinyllm.sampling import SamplingParams, TokenHistory, TokenLogprob

if TYPE_CHECKING:
    from tinyllm.engine.beam_search import BeamSearch, Candidates
    from tinyllm.engine.matcher import Matcher

__all__ = ["Request", "Sequence", "SequenceStatus", "Task"]


class Task(Enum):
    """What a request is computed for."""

    GENERATE = "generate"
    SCORE = "score"  # the log-probability of each prompt token
    LOGITS = "logits"  # the logits at each prompt position
    EMBED = "embed"  # the final hidden state at each prompt position
    PREFILL = "prefill"  # nothing but the keys and values of the prompt


class SequenceStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    PARKED = "parked"  # finished, but its blocks are kept for whoever resumes it


@dataclass(eq=False)
class Request:
    """One user request. Its sequences share the prompt; they fork when the first token is sampled.

    Attributes:
        arrival: a number that grows with each request; among equal priorities it decides who is served first and
            preempted last.
        max_len: prompt plus output may not grow beyond this many tokens.
        window: how many tokens up to itself a token sees in the layer that sees most; None if all.
        sinks: tokens at the beginning that are seen besides.
        prefix_root: where the hashes of its blocks begin; requests share prefixes only if theirs are equal.
        resume_from: a parked sequence whose tokens this prompt begins with.
        keep: whether the blocks of its first sequence are to be kept when it finishes.
        beam_search: what has been found so far, if this is a beam search that has begun.
        num_cached_tokens: how many of the prompt's tokens the cache had when it was first admitted; None before.
        prompt_logprobs: entry i - 1 holds log p of prompt token i and its rivals; grows in order.
        rows: for LOGITS (T, V) and for EMBED (T, M), float32, filled in order up to num_rows.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    task: Task
    arrival: int
    arrival_time: float
    max_len: int
    window: int | None = None
    sinks: int = 0
    prefix_root: bytes = b""
    resume_from: Sequence | None = None
    keep: bool = False
    sequences: list[Sequence] = field(default_factory=list)
    prompt_logprobs: list[tuple[TokenLogprob, ...]] = field(default_factory=list)
    rows: NDArray[np.float32] | None = None
    num_rows: int = 0
    forked: bool = False
    num_forks: int = 0
    error: str | None = None
    first_token_time: float | None = None
    num_cached_tokens: int | None = None
    beam_search: BeamSearch | None = None

    @property
    def num_reported(self) -> int | None:
        """Of a request whose prompt's positions are all reported: how many were. None if none needs to be, any more."""
        if self.task in (Task.LOGITS, Task.EMBED):
            return self.num_rows
        if self.task is Task.SCORE or self.params.prompt_logprobs is not None:
            reported = len(self.prompt_logprobs)
            return None if reported == len(self.prompt_token_ids) - 1 else reported
        return None

    @property
    def finished(self) -> bool:
        return all(s.status in (SequenceStatus.FINISHED, SequenceStatus.PARKED) for s in self.sequences)


@dataclass(eq=False)
class Sequence:
    """One continuation: its tokens, how many of them are in the KV cache, and in which blocks.

    There is no prefill or decode state: a sequence is due for the tokens from num_computed_tokens to num_tokens.

    Attributes:
        block_hashes: of its first full blocks, as far as they were needed.
        num_hashed_blocks: of its blocks in the cache, how many were offered to others.
        num_released_blocks: up to here, blocks between the sinks and the window are given back.
        candidates: in a beam search, what may follow, until all beams have theirs: then tokens are chosen.
        matcher: what keeps its text to a structured output, while it grows.
        score: in a beam search, the sum of log-probabilities; at its end, divided by the length's penalty.
    """

    request: Request
    index: int
    token_ids: list[int]
    text: TextStream
    history: TokenHistory
    status: SequenceStatus = SequenceStatus.WAITING
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    logprobs: list[tuple[TokenLogprob, ...]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_streamed_tokens: int = 0
    block_hashes: list[bytes] = field(default_factory=list)
    num_hashed_blocks: int = 0
    num_released_blocks: int = 0
    candidates: Candidates | None = None
    matcher: Matcher | None = None
    score: float | None = None

    @property
    def order(self) -> tuple[int, int, int]:
        """Higher priorities first, then earlier requests, then earlier forks."""
        return -self.request.params.priority, self.request.arrival, self.index

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_due_tokens(self) -> int:
        """Tokens that are known but not yet in the KV cache; none while a beam waits for the others."""
        return 0 if self.candidates is not None else self.num_tokens - self.num_computed_tokens

    @property
    def max_prefix_tokens(self) -> int:
        """How many tokens need not be computed if they are in the cache: their outputs are not wanted, or were given.

        The last token always runs: what follows it is what the sequence is there for.
        """
        reported = self.request.num_reported
        return self.num_tokens - 1 if reported is None else min(reported, self.num_tokens - 1)

    @property
    def has_news(self) -> bool:
        """Whether there is something to stream: a token, or an end."""
        if self.num_streamed_tokens < self.num_output_tokens:
            return True
        return self.finish_reason == "error" and self.status is not SequenceStatus.FINISHED

    @property
    def fork_path(self) -> tuple[int, ...]:
        return (self.index,)
