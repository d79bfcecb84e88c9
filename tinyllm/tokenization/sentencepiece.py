"""SentencePiece's BPE (Kudo and Richardson, arXiv:1808.06226): the best-scored pair of neighbours merges first.

There are no merge rules: two neighbouring symbols may merge when their concatenation is in the vocabulary, the one
with the highest score first, the leftmost of equals. This is what llama.cpp does for `tokenizer.ggml.model` = "llama",
and rules derived from the vocabulary do not always agree with it: they rank two ways to build the same token
differently, and cannot join a character that has no token of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from heapq import heapify, heappop, heappush

from tinyllm.errors import InvalidRequestError

__all__ = ["MAX_SEGMENT_CHARS", "SPACE", "SentencePieceBPE"]

SPACE = "\u2581"  # LOWER ONE EIGHTH BLOCK, which stands for a space inside tokens
MAX_SEGMENT_CHARS = 1 << 18  # about a second of work; ordinary text splits into words long before
_LONG_SEGMENT_CHARS = 64
_CACHED_SEGMENTS = 1 << 16


class SentencePieceBPE:
    """Encodes text by merging characters.

    Args:
        tokens: (V,) the text of each token, all different.
        scores: (V,) higher merges earlier; no NaN.
        byte_ids: (256,) the token of each byte, for characters without a token; -1 where there is none.
        unknown_id: the token of bytes without a token; None drops them.
    """

    def __init__(
        self, tokens: Sequence[str], scores: Sequence[float], byte_ids: Sequence[int], unknown_id: int | None
    ) -> None:
        self._tokens = tokens
        self._scores = scores
        self._byte_ids = byte_ids
        self._unknown_id = unknown_id
        self._ids: Mapping[str, int] = {token: index for index, token in enumerate(tokens)}
        before_space = {token[i - 1] for token in tokens for i in _inner_spaces(token)}
        not_before = f"[^{''.join(map(re.escape, sorted(before_space)))}]" if before_space else "."
        self._word_start = re.compile(f"(?<={not_before})(?={SPACE})", re.DOTALL)
        self._cache: dict[str, list[int]] = {}

    @cached_property
    def _pairs(self) -> frozenset[str]:
        """Every two neighbouring characters of a token: no merge ever crosses another pair."""
        return frozenset(token[i : i + 2] for token in self._tokens for i in range(len(token) - 1))

    def encode(self, text: str) -> list[int]:
        """Ids of a text without special tokens. Raises InvalidRequestError for one very long run without a break."""
        ids: list[int] = []
        for word in self._word_start.split(text.replace(" ", SPACE)):
            for segment in (word,) if len(word) <= _LONG_SEGMENT_CHARS else self._split_long(word):
                cached = self._cache.get(segment)
                if cached is None:
                    cached = self._merge(segment)
                    if len(segment) <= _LONG_SEGMENT_CHARS:
                        if len(self._cache) >= _CACHED_SEGMENTS:
                            self._cache.clear()
                        self._cache[segment] = cached
                ids += cached
        return ids

    def _split_long(self, word: str) -> list[str]:
        """Splits where no token spans two neighbouring characters, which changes no merge."""
        pairs = self._pairs
        cuts = [i + 1 for i, pair in enumerate(map(str.__add__, word, word[1:])) if pair not in pairs]
        segments = [word[a:b] for a, b in zip([0, *cuts], [*cuts, len(word)], strict=True)]
        longest = max(map(len, segments))
        if longest > MAX_SEGMENT_CHARS:
            raise InvalidRequestError(
                f"the text has a run of {longest} characters with no break; the limit is {MAX_SEGMENT_CHARS}"
            )
        return segments

    def _merge(self, segment: str) -> list[int]:
        ids, scores = self._ids, self._scores
        n = len(segment)
        # Symbol i starts at character i and ends before character end[i]; one that was merged away has end[i] = 0.
        # The next symbol starts where this one ends.
        end = list(range(1, n + 1))
        previous = list(range(-1, n - 1))
        heap: list[tuple[float, int, int]] = []  # (-score, start of the left symbol, end of the right symbol)
        for left in range(n - 1):
            token = ids.get(segment[left : left + 2])
            if token is not None:
                heap.append((-scores[token], left, left + 2))
        heapify(heap)

        while heap:
            _, left, stop = heappop(heap)
            right = end[left]
            if right == 0 or right == n or end[right] != stop:
                continue  # one of the two has merged with another since
            end[left] = stop
            end[right] = 0
            if stop < n:
                previous[stop] = left
                token = ids.get(segment[left : end[stop]])
                if token is not None:
                    heappush(heap, (-scores[token], left, end[stop]))
            before = previous[left]
            if before >= 0:
                token = ids.get(segment[before:stop])
                if token is not None:
                    heappush(heap, (-scores[token], before, stop))

        output: list[int] = []
        start = 0
        while start < n:
            token = ids.get(segment[start : end[start]])
            if token is not None:
                output.append(token)
            else:
                output += self._fall_back(segment[start])
            start = end[start]
        return output

    def _fall_back(self, char: str) -> list[int]:
        fallback = [self._byte_ids[byte] for byte in char.encode("utf-8")]
        if self._unknown_id is not None:
            return [self._unknown_id if index < 0 else index for index in fallback]
        return [index for index in fallback if index >= 0]


def _inner_spaces(token: str) -> list[int]:
    return [i for i in range(1, len(token)) if token[i] == SPACE] if SPACE in token[1:] else []
