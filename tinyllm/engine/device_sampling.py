"""Which draws a device can make where the logits are, and what it must be told for each.

A device draws from a row as the model left it: one token comes back instead of a row of logits. Whatever changes the
row first, or reads it afterwards, happens on the host (see sampling.sample). Which of the two it is follows from the
request and the position alone, so that a request's tokens do not depend on what runs beside it.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

from tinyllm.engine.sequence import Sequence
from tinyllm.errors import InvalidRequestError
from tinyllm.sampling import GREEDY_BELOW, noise_key
from tinyllm.sampling_params import SamplingParams

__all__ = ["Draw", "can_sample_on_device", "check_token", "draws_of"]

MAX_TEMPERATURE = 2.0**100  # its reciprocal must be a normal float32
NOT_A_NUMBER, FORBIDDEN = -1, -2  # what a device gives instead of a token


class Draw(NamedTuple):
    """One draw: the row of the step's logits that it is from, the noise's key, the filters; see SamplingParams."""

    logits_row: int
    key: int  # unused where the temperature is below GREEDY_BELOW
    temperature: float
    top_k: int  # 0 keeps all
    top_p: float
    min_p: float


def can_sample_on_device(params: SamplingParams, *, banned_ids: Seq[int] = ()) -> bool:
    """Whether the next token follows from the logits as they are, and nothing else is wanted of them.

    Args:
        banned_ids: end tokens that are not allowed yet (min_tokens).
    """
    unchanged = (
        params.repetition_penalty == 1
        and params.presence_penalty == 0
        and params.frequency_penalty == 0
        and not params.logit_bias
        and not params.logits_processors
        and params.structured_output is None
        and not banned_ids
    )
    return unchanged and params.logprobs is None and not params.ranked and params.temperature <= MAX_TEMPERATURE


def draws_of(sequence: Sequence, logits_row: int) -> list[Draw]:
    """The draws that follow a sequence's last token: one, or at a request's first token one for each that it forks.

    Their order is that of request.sequences after the forks.
    """
    request = sequence.request
    indices = [sequence.index]
    if not request.forked:
        indices += range(request.num_forks + 1, request.num_forks + request.params.num_sequences)
    return [_draw(request.params, (index,), sequence.num_tokens, logits_row) for index in indices]


def _draw(params: SamplingParams, fork_path: tuple[int, ...], position: int, logits_row: int) -> Draw:
    key = 0 if params.temperature < GREEDY_BELOW else noise_key(params.seed, fork_path, position)
    return Draw(logits_row, key, params.temperature, max(params.top_k, 0), params.top_p, params.min_p)


def check_token(token: int) -> int:
    """What a device drew, if it is a token. Raises InvalidRequestError where there was none to draw."""
    if token == NOT_A_NUMBER:
        raise InvalidRequestError("the logits contain NaN")
    if token == FORBIDDEN:
        raise InvalidRequestError("every token is forbidden: no logit is above -inf")
    return token
