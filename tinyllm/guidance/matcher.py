"""Where a growing text stands in its grammar, and which tokens may follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tinyllm.errors import InvalidRequestError
from tinyllm.guidance.grammar import problem

if TYPE_CHECKING:
    from llguidance import LLMatcher

__all__ = ["GuidanceMatcher"]

_WORD_BITS = 32


class GuidanceMatcher:
    """An engine.matcher.Matcher over llguidance's.

    Attributes:
        num_tokens: how many tokens the text has.
        finished: whether it is complete, and nothing can follow but its end.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, num_tokens: int = 0) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._words = np.empty(-(-(vocab_size + 1) // _WORD_BITS), np.uint32)  # one bit an id, the end's the last
        self.num_tokens = num_tokens
        self.finished = matcher.is_stopped()

    def allowed_ids(self, end_ids: Sequence[int] = ()) -> NDArray[np.intp]:
        words = self._words
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self._check()
        end, bit = divmod(self._vocab_size, _WORD_BITS)
        if words[end] >> np.uint32(bit) & np.uint32(1):
            words[end] ^= np.uint32(1 << bit)
            for index in end_ids:
                words[index // _WORD_BITS] |= np.uint32(1 << index % _WORD_BITS)
        return _set_bits(words)

    def advance(self, token_id: int) -> None:
        accepted = self._matcher.consume_token(token_id)
        self.num_tokens += 1
        self._check()
        if not accepted:
            raise InvalidRequestError(f"token {token_id} does not continue the structured output")
        self.finished = self._matcher.is_stopped()

    def copy(self) -> GuidanceMatcher:
        return GuidanceMatcher(self._matcher.deep_copy(), self._vocab_size, self.num_tokens)

    def _check(self) -> None:
        message = problem(self._matcher)
        if message is not None:
            raise InvalidRequestError(f"the structured output failed after {self.num_tokens} tokens: {message}")


def _set_bits(words: NDArray[np.uint32]) -> NDArray[np.intp]:
    """The numbers of the bits that are set in words (N,), ascending; quick where few words have any."""
    used = np.flatnonzero(words)
    if 4 * used.size > words.size:
        return np.flatnonzero(_bits(words))
    rows, columns = np.nonzero(_bits(words[used]).reshape(-1, _WORD_BITS))
    return used[rows] * _WORD_BITS + columns


def _bits(words: NDArray[np.uint32]) -> NDArray[np.bool_]:
    return np.unpackbits(words.astype("<u4", copy=False).view(np.uint8), bitorder="little").view(np.bool_)
