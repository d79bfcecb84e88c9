"""A matcher without a grammar, for engines whose model has no tokenizer."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from tinyllm.errors import InvalidRequestError

__all__ = ["IdMatcher"]


class IdMatcher:
    """Texts of `length` tokens, each from `ids` and other than the one before it by an odd number.

    They may end after `least` tokens. At token number `fails_at` there is an error.
    """

    def __init__(
        self, ids: Collection[int], length: int, *, least: int | None = None, fails_at: int | None = None
    ) -> None:
        self.ids = sorted(ids)
        self.length = length
        self.least = length if least is None else least
        self.fails_at = fails_at
        self.tokens: list[int] = []

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def finished(self) -> bool:
        return self.num_tokens == self.length

    def allowed_ids(self, end_ids: Sequence[int] = ()) -> NDArray[np.intp]:
        if self.num_tokens == self.fails_at:
            raise InvalidRequestError("the matcher failed")
        text = [i for i in self.ids if self._fits(i)]
        return np.array(sorted({*text, *(end_ids if self.num_tokens >= self.least else ())}), np.intp)

    def advance(self, token_id: int) -> None:
        assert not self.finished
        assert self._fits(token_id), f"{token_id} does not continue {self.tokens}"
        self.tokens.append(token_id)

    def copy(self) -> IdMatcher:
        other = IdMatcher(self.ids, self.length, least=self.least, fails_at=self.fails_at)
        other.tokens = self.tokens.copy()
        return other

    def _fits(self, token_id: int) -> bool:
        return token_id in self.ids and (not self.tokens or (token_id - self.tokens[-1]) % 2 == 1)
