"""A model's vocabulary as bytes that each token adds to a text, and how the model would write a given text."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property

from tinyllm.errors import InvalidRequestError
from tinyllm.tokenizer import Tokenizer

__all__ = ["Vocabulary"]

MAX_FORCED_CHARS = 256


class Vocabulary:
    """The ids of a model as a grammar sees them.

    Args:
        vocab_size: of the model; it may be larger than the tokenizer's, or smaller.
        end_ids: ids that end a text; like the special tokens, they are no part of it.

    Attributes:
        tokens: (vocab_size,) the bytes of each id; b"" for those that stand for nothing.
        special_ids: ids that are never a part of a text.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        known = min(vocab_size, tokenizer.vocab_size)
        self.tokens = [tokenizer.continuation_bytes(index) for index in range(known)] + [b""] * (vocab_size - known)
        self.special_ids = sorted({*end_ids, *(i for i in tokenizer.special_token_ids if i < vocab_size)})

    def tokenize(self, text: str) -> list[int]:
        """The ids that spell the text's beginning: the tokenizer's own if those are ordinary tokens, else the longest.

        Asked for all that is certain to follow, at each token of it: only the beginning, lest that take forever.
        """
        text = text[:MAX_FORCED_CHARS]
        wanted = text.encode()
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=False)
        except InvalidRequestError:
            return self._longest(wanted)
        ordinary = all(i < len(self.tokens) and i not in self._special for i in ids)
        if ordinary and b"".join(self.tokens[i] for i in ids) == wanted:
            return ids
        return self._longest(wanted)

    def _longest(self, text: bytes) -> list[int]:
        """From the left, always the longest token; as far as there is one."""
        ids: list[int] = []
        start = 0
        while start < len(text):
            end = min(len(text), start + self._max_nbytes)
            while end > start and text[start:end] not in self._ids:
                end -= 1
            if end == start:
                break
            ids.append(self._ids[text[start:end]])
            start = end
        return ids

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(self.special_ids)

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        pairs = [(token, i) for i, token in enumerate(self.tokens) if token and i not in self._special]
        return dict(reversed(pairs))  # of equal tokens, the first

    @cached_property
    def _max_nbytes(self) -> int:
        return max(map(len, self._ids), default=1)
