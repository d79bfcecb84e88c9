"""Token ids to text, one token at a time."""

from __future__ import annotations

import codecs

from tinyllm.errors import InvalidRequestError
from tinyllm.tokenization.parts import TokenizerParts

__all__ = ["Detokenizer", "StreamDecoder", "checked_id"]


def checked_id(token_id: object, vocab_size: int) -> int:
    """Returns the id as an int. Raises InvalidRequestError unless it is an integer in [0, vocab_size)."""
    index = getattr(token_id, "__index__", None)
    if index is None or isinstance(token_id, bool):
        raise InvalidRequestError(f"a token id must be an integer, not {token_id!r}")
    value: int = index()
    if not 0 <= value < vocab_size:
        raise InvalidRequestError(f"token id {value} lies outside the vocabulary of {vocab_size}")
    return value


class Detokenizer:
    """Token ids to bytes: which tokens are skipped, and what stands before the first one."""

    def __init__(self, parts: TokenizerParts, *, skip_special_tokens: bool, continuation: bool) -> None:
        self._parts = parts
        self._skipped = parts.special_ids if skip_special_tokens else frozenset[int]()
        self._strip_space = parts.strips_leading_space and not continuation
        self._separate = bool(parts.separator) and continuation

    def feed(self, token_id: int) -> bytes:
        """The bytes that this token adds. Raises InvalidRequestError for an id outside the vocabulary."""
        token_id = checked_id(token_id, self._parts.vocab_size)
        if token_id in self._skipped:
            return b""
        piece = self._parts.token_bytes(token_id)
        if self._separate:
            piece = self._parts.separator + piece
        self._separate = bool(self._parts.separator)
        if self._strip_space and piece:
            self._strip_space = False
            piece = piece.removeprefix(b" ")
        return piece


class StreamDecoder:
    """Decodes a growing sequence of tokens in constant time each.

    `"".join(map(push, ids)) + flush()` equals `Tokenizer.decode(ids)` for any ids. A character whose bytes are spread
    over several tokens comes out with the last of them; bytes that are no UTF-8 come out as U+FFFD.
    """

    def __init__(self, parts: TokenizerParts, *, skip_special_tokens: bool = True, continuation: bool = False) -> None:
        self._detokenizer = Detokenizer(parts, skip_special_tokens=skip_special_tokens, continuation=continuation)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes, which may be empty. Raises InvalidRequestError for a bad id."""
        return self._utf8.decode(self._detokenizer.feed(token_id))

    def flush(self) -> str:
        """What is left at the end: U+FFFD where the last character never got all of its bytes, else nothing."""
        return self._utf8.decode(b"", True)
