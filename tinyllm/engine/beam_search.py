"""Beam search over one request: which beams go on, which are finished, and when to stop. It computes no logits.

Whoever drives it keeps one sequence a live beam. Once the logits after each of them are known, in whatever order:

    rows = [candidates(log_softmax(logits), search.num_candidates) for each live beam's logits (V,)]
    for parent, token_id in search.advance(rows):
        ...  # the new live beams, best first: a fork of live beam `parent`, plus one token
    if search.done:
        hypotheses = search.best(n)

The definition is the common one, and equals that of transformers 5 (`generate(num_beams=B)`), quirks included:

- A beam's score while it lives is the sum of its tokens' log-probabilities.
- A step ranks the continuations of all beams. Those among the first B that end with an end token are finished; one that
  ends at a lower rank is dropped. The B best of the others live on. A token that completes a structured text, which
  transformers has no word for, ends a beam as an end token does.
- The B best finished hypotheses are kept, by sum / length ** length_penalty, the end token counted, the prompt not.
- At the last token allowed, the first B are finished whatever they end with.
- One beam is greedy search: it ends at its first end token, whatever early_stopping says.

Scores are in float64 and ties go to the earlier beam, then to the lowest token id, so the search is a function of the
logits' bits.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tinyllm.errors import InvalidRequestError
from tinyllm.sampling import log_sum_exp, top_ids

__all__ = ["BeamSearch", "Candidates", "Continuation", "Hypothesis", "candidates", "log_softmax"]

F32Array = NDArray[np.float32]


class Candidates(NamedTuple):
    """What may follow one beam, most likely first."""

    token_ids: NDArray[np.intp]  # (N,)
    logprobs: NDArray[np.float64]  # (N,) above -inf
    completing: frozenset[int] = frozenset()  # of these, the tokens after which the text is complete


class Continuation(NamedTuple):
    """A beam that goes on: the live beam of the step before that it extends, and its new token."""

    parent: int
    token_id: int


@dataclass(frozen=True)
class Hypothesis:
    """One answer.

    Attributes:
        token_ids: what was generated, the end token included.
        score: sum of log-probabilities / len(token_ids) ** length_penalty.
        finish_reason: "stop" after an end token or a complete text, "length", or None for a beam of a search cut short.
        stop_reason: the stop token id that ended it, if one did.
    """

    token_ids: list[int]
    score: float
    finish_reason: str | None
    stop_reason: int | None


def log_softmax(logits: F32Array) -> F32Array:
    """log p of every token, (V,) -> (V,). Penalties and bans of beam search apply to these."""
    with np.errstate(invalid="ignore"):  # an infinite logit gives NaN, which `candidates` reports
        return (logits - log_sum_exp(logits)).astype(np.float32)


def candidates(logprobs: F32Array, count: int) -> Candidates:
    """The `count` most likely tokens of logprobs (V,), fewer where the others are at -inf; ties by the lowest id.

    Raises:
        InvalidRequestError: a value is NaN.
    """
    if np.isnan(logprobs).any():
        raise InvalidRequestError("the logits contain NaN")
    token_ids = top_ids(logprobs, count)
    return Candidates(token_ids, logprobs[token_ids].astype(np.float64))


class _Finished(NamedTuple):
    """A finished hypothesis: its last token extends live beam `parent` of step length - 1."""

    score: float
    length: int
    beam: Continuation
    complete: bool  # by the text's structure, without an end token


class BeamSearch:
    """The state of one search.

    Args:
        num_beams: B, how many beams live and how many hypotheses are kept.
        max_new_tokens: the most tokens that a hypothesis may have; at least 1.
        eos_token_ids: the model's end tokens, as far as they count for this request.
        stop_token_ids: end tokens of the request; they differ in the stop_reason alone.
        length_penalty: above 0 favours long hypotheses, below 0 short ones.
        early_stopping: with B finished hypotheses, stop at once (True); when the best live beam would not be among
            them if it ended at its present length (False) or at the length that suits it best ("never").

    Attributes:
        num_candidates: how many continuations a step considers. That is enough for B that go on, even where each
            beam has all end tokens among its most likely.

    Raises:
        InvalidRequestError: length ** length_penalty leaves the range of float64.
    """

    def __init__(
        self,
        num_beams: int,
        *,
        max_new_tokens: int,
        eos_token_ids: Collection[int] = (),
        stop_token_ids: Collection[int] = (),
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
    ) -> None:
        assert num_beams >= 1
        assert max_new_tokens >= 1
        assert early_stopping in (True, False, "never")
        if abs(length_penalty) * math.log(max_new_tokens) > 600:  # leaves float64 room for the sum as well
            raise InvalidRequestError(
                f"length_penalty {length_penalty:g} is too far from 0 for up to {max_new_tokens} tokens"
            )
        self.num_beams = num_beams
        self.max_new_tokens = max_new_tokens
        self.length_penalty = length_penalty
        self.early_stopping = early_stopping
        self._eos_token_ids = frozenset(eos_token_ids)
        self._end_token_ids = self._eos_token_ids.union(stop_token_ids)
        self.num_candidates = num_beams * (1 + len(self._end_token_ids))
        self.done = False
        self._live_sums = np.zeros(1)  # (live beams,) float64, best first; the prompt is the first beam
        self._steps: list[list[Continuation]] = []  # the live beams after each step
        self._finished: list[_Finished] = []  # best first

    @property
    def num_live(self) -> int:
        """How many beams the next step needs the logits of: 1 at first, then B, or fewer where tokens are banned."""
        return 0 if self.done else self._live_sums.size

    def advance(self, rows: Sequence[Candidates]) -> list[Continuation]:
        """One step: from what may follow each live beam, in order, to the new live beams, best first; none when done.

        Raises:
            InvalidRequestError: nothing may follow any beam, and none has finished.
        """
        assert len(rows) == self.num_live, "one row of candidates for each live beam"
        parents = np.repeat(np.arange(len(rows)), [row.token_ids.size for row in rows])
        token_ids = np.concatenate([row.token_ids for row in rows])
        sums = np.concatenate([total + row.logprobs for total, row in zip(self._live_sums, rows, strict=True)])

        length = len(self._steps) + 1
        live: list[Continuation] = []
        live_sums: list[float] = []
        for rank, i in enumerate(top_ids(sums, self.num_candidates)):
            beam = Continuation(int(parents[i]), int(token_ids[i]))
            complete = beam.token_id in rows[beam.parent].completing
            if complete or beam.token_id in self._end_token_ids or length == self.max_new_tokens:
                if rank < self.num_beams:
                    self._finished.append(_Finished(self._score(sums[i], length), length, beam, complete))
            elif len(live) < self.num_beams:
                live.append(beam)
                live_sums.append(sums[i])
        self._finished.sort(key=lambda hypothesis: -hypothesis.score)  # stable: the earlier one wins a tie
        del self._finished[self.num_beams :]
        if not live and not self._finished:
            raise InvalidRequestError("every token is forbidden: no logit is above -inf")

        self._steps.append(live)
        self._live_sums = np.array(live_sums)
        self.done = not live or self._may_stop(length)
        return [] if self.done else live

    def best(self, n: int) -> list[Hypothesis]:
        """The n best hypotheses, best first; fewer where fewer exist.

        Of a search that is not done: what has finished, then the live beams.
        """
        found = [
            self._hypothesis(score, self._trace(length - 1, beam), finished=True, complete=complete)
            for score, length, beam, complete in self._finished[:n]
        ]
        length = len(self._steps)
        if not self.done and length:
            for total, beam in zip(self._live_sums, self._steps[-1], strict=True):
                score = self._score(total, length)
                found.append(self._hypothesis(score, self._trace(length - 1, beam), finished=False))
        return found[:n]

    def is_end_token(self, token_id: int) -> bool:
        return token_id in self._end_token_ids

    def _score(self, total: float, length: int) -> float:
        return float(total) / length**self.length_penalty

    def _may_stop(self, length: int) -> bool:
        """Whether the live beams, of `length` tokens, are given up."""
        if len(self._finished) < self.num_beams:
            return False
        if self.early_stopping is True or self.num_beams == 1:
            return True
        if self.early_stopping == "never" and self.length_penalty > 0:
            length = self.max_new_tokens
        return self._score(self._live_sums[0], length) <= self._finished[-1].score

    def _trace(self, step: int, beam: Continuation) -> list[int]:
        """The tokens of a continuation of step `step` (from 0), from the first on."""
        token_ids = [beam.token_id]
        while step > 0:
            step -= 1
            beam = self._steps[step][beam.parent]
            token_ids.append(beam.token_id)
        return token_ids[::-1]

    def _hypothesis(self, score: float, token_ids: list[int], *, finished: bool, complete: bool = False) -> Hypothesis:
        last = token_ids[-1]
        if not finished:
            return Hypothesis(token_ids, score, None, None)
        if last not in self._end_token_ids:
            return Hypothesis(token_ids, score, "stop" if complete else "length", None)
        return Hypothesis(token_ids, score, "stop", None if last in self._eos_token_ids else last)
