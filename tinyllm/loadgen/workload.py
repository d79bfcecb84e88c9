"""Which requests are sent, and when: drawn from a seed, one after another, so that the same seed gives the same."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

from numpy.random import Generator, SeedSequence, default_rng

from tinyllm.loadgen.errors import LoadError
from tinyllm.loadgen.lengths import MAX_LENGTH, Lengths
from tinyllm.loadgen.prompts import FilePrompt, Prompt, random_ids, random_words

__all__ = ["PlannedRequest", "Workload"]

_MAX_TOKEN_ID = (1 << 31) - 1
_MIN_RATE = 0.001


@dataclass(frozen=True)
class PlannedRequest:
    """A request to be.

    Attributes:
        index: its place among all, from 0.
        arrival: seconds after the beginning at which it is sent; 0 in a closed loop, where a free client sends it.
        prompt: a text, token ids, or messages.
        max_tokens: tokens of output that it asks for.
    """

    index: int
    arrival: float
    prompt: Prompt
    max_tokens: int


@dataclass(frozen=True)
class Workload:
    """An iterable of requests, endless without num_requests.

    Arrivals, lengths and prompts have random numbers of their own: other lengths leave the arrivals as they were.

    Attributes:
        rate: requests a second, a Poisson process: the times between arrivals are exponential. inf: all at once. None:
            a closed loop.
        prompt_lengths: tokens of a prompt, less the shared prefix. Of a text they are words.
        output_lengths: tokens of output.
        shared_prefix: tokens at the beginning that all prompts share.
        token_ids: the smallest and the largest id in prompts.
        text: whether prompts are texts rather than ids.
        prompts: the user's own, taken in turn, instead of random ones.
        seed: of all random numbers.

    Raises LoadError for values out of range.
    """

    num_requests: int | None
    rate: float | None
    prompt_lengths: Lengths
    output_lengths: Lengths
    shared_prefix: int = 0
    token_ids: tuple[int, int] = (256, 4000)
    text: bool = False
    prompts: Sequence[FilePrompt] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_requests is not None and self.num_requests < 1:
            raise LoadError(f"--num-requests must be at least 1, not {self.num_requests}")
        if self.rate is not None and not self.rate >= _MIN_RATE:  # which nan is not, either
            raise LoadError(f"--rate must be at least {_MIN_RATE} requests a second, not {self.rate}")
        if not 0 <= self.shared_prefix <= MAX_LENGTH:
            raise LoadError(f"--shared-prefix must be from 0 to {MAX_LENGTH}, not {self.shared_prefix}")
        low, high = self.token_ids
        if not 0 <= low <= high <= _MAX_TOKEN_ID:
            raise LoadError(f"--token-ids must be two ids, the smaller first, not {low}:{high}")
        if self.seed < 0:
            raise LoadError(f"--seed must be at least 0, not {self.seed}")

    def __iter__(self) -> Iterator[PlannedRequest]:
        return islice(self._all(), self.num_requests)

    def _all(self) -> Iterator[PlannedRequest]:
        seeds = SeedSequence(self.seed).spawn(5)
        arrivals, prompt_lengths, output_lengths, prefixes, contents = map(default_rng, seeds)
        prefix = self._content(prefixes, self.shared_prefix)
        arrival = 0.0
        for index in count():
            if self.rate is not None and math.isfinite(self.rate):
                arrival += arrivals.exponential(1 / self.rate)
            max_tokens = self.output_lengths.draw(output_lengths)
            if self.prompts:
                line = self.prompts[index % len(self.prompts)]
                yield PlannedRequest(index, arrival, line.prompt, line.max_tokens or max_tokens)
                continue
            content = self._content(contents, self.prompt_lengths.draw(prompt_lengths))
            yield PlannedRequest(index, arrival, _joined(prefix, content), max_tokens)

    def _content(self, random: Generator, length: int) -> str | list[int]:
        return random_words(random, length) if self.text else random_ids(random, length, *self.token_ids)


def _joined(prefix: str | list[int], content: str | list[int]) -> str | list[int]:
    if isinstance(prefix, list) and isinstance(content, list):
        return prefix + content
    return f"{prefix} {content}" if prefix else str(content)
