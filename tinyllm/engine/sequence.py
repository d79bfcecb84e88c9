"""A request and the sequences that it owns."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from tinyllm.engine.text import TextStream
from tinyllm.sampling import SamplingParams, TokenHistory, TokenLogprob

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
        arrival: a number that grows with each request; decides who is served first and preempted last.
        max_len: prompt plus output may not grow beyond this many tokens.
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
    sequences: list[Sequence] = field(default_factory=list)
    prompt_logprobs: list[tuple[TokenLogprob, ...]] = field(default_factory=list)
    rows: NDArray[np.float32] | None = None
    num_rows: int = 0
    forked: bool = False
    error: str | None = None
    first_token_time: float | None = None

    @property
    def finished(self) -> bool:
        return all(sequence.status is SequenceStatus.FINISHED for sequence in self.sequences)


@dataclass(eq=False)
class Sequence:
    """One continuation: its tokens, how many of them are in the KV cache, and in which blocks.

    There is no prefill or decode state: a sequence is due for the tokens from num_computed_tokens to num_tokens.
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

    @property
    def order(self) -> tuple[int, int]:
        """Earlier requests first, then earlier forks."""
        return self.request.arrival, self.index

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
        """Tokens that are known but not yet in the KV cache."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def fork_path(self) -> tuple[int, ...]:
        return (self.index,)
