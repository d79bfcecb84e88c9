"""Sequences without a model, for the tests of the engine's bookkeeping."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from typing import Any

from tinyllm.engine.sequence import Request, Sequence, Task
from tinyllm.engine.text import TextStream
from tinyllm.sampling import SamplingParams, TokenHistory

_arrivals = count()


def make_sequence(tokens: Iterable[int], *, index: int = 0, request: Request | None = None, **params: Any) -> Sequence:
    """A waiting sequence of a new request (or another one of `request`)."""
    token_ids = list(tokens)
    if request is None:
        arrival = next(_arrivals)
        request = Request(
            f"r{arrival}",
            None,
            token_ids.copy(),
            SamplingParams(**params),
            Task.GENERATE,
            arrival,
            0.0,
            max_len=1 << 20,
        )
    sequence = Sequence(request, index, token_ids, TextStream(None, (), include_stop=False), TokenHistory.of(token_ids))
    request.sequences.append(sequence)
    return sequence
