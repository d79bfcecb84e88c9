"""What every kind of tokenizer provides, whatever file it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from tinyllm.errors import TokenizerError

__all__ = ["TokenizerParts", "one_line", "tokenizer_errors", "words"]


@dataclass(frozen=True, kw_only=True)
class TokenizerParts:
    """An encoder and a table of token bytes.

    Attributes:
        encode: (text, add_special_tokens) -> token ids; the text is valid Unicode.
        token_bytes: the bytes that token id (below vocab_size) stands for; b"" where the id has no token.
        special_ids: the tokens that decoding skips by default (bos, eos, chat markers).
        eos_ids: the tokens that end a generation; the model's own eos first.
        special_tokens: the names that chat templates know, e.g. {"bos_token": "<s>"}.
        strips_leading_space: encoding put a space before the text, so decoding takes one away.
        separator: stands between any two tokens (vocabularies of whole words).
    """

    encode: Callable[[str, bool], list[int]]
    token_bytes: Callable[[int], bytes]
    vocab_size: int
    special_ids: frozenset[int] = frozenset()
    bos_id: int | None = None
    eos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None
    strips_leading_space: bool = False
    separator: bytes = b""


def words(text: str) -> frozenset[str]:
    """The words of a text, as a set."""
    return frozenset(text.split())


def one_line(error: object, limit: int = 300) -> str:
    """An error's message on one line, cut to `limit` characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


@contextmanager
def tokenizer_errors(what: str) -> Iterator[None]:
    """Turns whatever the tokenizers library raises on a damaged file into a TokenizerError.

    Its panics arrive as `PanicException`, which is a BaseException and cannot be imported.
    """
    try:
        yield
    except TokenizerError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise TokenizerError(f"{what}: {one_line(error)}") from error
        raise
