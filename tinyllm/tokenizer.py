"""Text to token ids and back, from a Hugging Face folder or GGUF metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tinyllm.chat_template import ChatTemplate
from tinyllm.errors import InvalidRequestError, TokenizerError
from tinyllm.tokenization.gguf import parts_from_gguf
from tinyllm.tokenization.huggingface import parts_from_folder
from tinyllm.tokenization.parts import TokenizerParts
from tinyllm.tokenization.streaming import Detokenizer, StreamDecoder, checked_id

__all__ = ["StreamDecoder", "Tokenizer"]


class Tokenizer:
    """The tokenizer of one model; immutable, and safe to share between threads.

    Attributes:
        vocab_size: ids are 0..vocab_size-1, added tokens included.
        bos_token_id, eos_token_id: None where the model has none.
        eos_token_ids: the ids that end a generation: eos, and the ends of a turn that the model knows.
        special_token_ids: the ids that decoding skips by default.
        chat_template: the source of the model's jinja2 chat template, or None.
    """

    def __init__(self, parts: TokenizerParts) -> None:
        self._parts = parts
        self.vocab_size = parts.vocab_size
        self.bos_token_id = parts.bos_id
        self.eos_token_id = parts.eos_id
        self.eos_token_ids = parts.eos_ids
        self.special_token_ids = parts.special_ids
        self.chat_template = parts.chat_template

    @classmethod
    def from_folder(cls, folder: Path, *, vocab_size: int | None = None) -> Tokenizer | None:
        """The tokenizer of a Hugging Face folder; None when the folder has no `tokenizer.json`.

        Args:
            folder: holds tokenizer.json, and beside it tokenizer_config.json, special_tokens_map.json,
                generation_config.json and chat_template.jinja where the model has them.
            vocab_size: the model's own, where it is padded past the last token; the ids between decode to nothing.

        Raises TokenizerError when a file is damaged or describes a tokenizer that tinyllm does not know.
        """
        parts = parts_from_folder(folder, vocab_size)
        return None if parts is None else cls(parts)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer | None:
        """The tokenizer that GGUF metadata describes, with llama.cpp's ids; None when it describes none.

        Args:
            metadata: GGUF key -> value; arrays of strings are lists, arrays of numbers are lists or numpy arrays.

        Raises TokenizerError when the metadata is damaged or of a kind that tinyllm does not know.
        """
        parts = parts_from_gguf(metadata)
        return None if parts is None else cls(parts)

    @cached_property
    def _longest_token(self) -> int:
        return max((len(self._parts.token_bytes(index)) for index in range(self.vocab_size)), default=1) or 1

    def encode(self, text: str, *, add_special_tokens: bool = True, max_tokens: int | None = None) -> list[int]:
        """Token ids of a text; special tokens written in it become their ids.

        Args:
            add_special_tokens: put bos (and eos) around the text where the model asks for them.
            max_tokens: refuse at once a text so long that even the longest tokens could not fit it into so many.

        Raises InvalidRequestError when text is not a string of valid Unicode, or too long.
        """
        if not isinstance(text, str):
            raise InvalidRequestError(f"a text must be a string, not {type(text).__name__}")
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"the text has a lone surrogate, U+{ord(text[error.start]):04X}, at character {error.start}"
            ) from None
        if max_tokens is not None and size > max_tokens and size > max_tokens * self._longest_token:
            raise InvalidRequestError(f"a text of {size} bytes cannot fit into {max_tokens} tokens")
        return self._parts.encode(text, add_special_tokens)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True, continuation: bool = False) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD.

        Args:
            skip_special_tokens: leave out bos, eos and the other special tokens.
            continuation: the ids continue a text, so a space before the first word is kept where the tokenizer
                would have put one there by itself (SentencePiece).

        Raises InvalidRequestError for an id outside the vocabulary.
        """
        detokenizer = Detokenizer(self._parts, skip_special_tokens=skip_special_tokens, continuation=continuation)
        return b"".join(map(detokenizer.feed, ids)).decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes that one token stands for. Raises InvalidRequestError for an id outside the vocabulary."""
        return self._parts.token_bytes(checked_id(id, self.vocab_size))

    def continuation_bytes(self, id: int) -> bytes:
        """The bytes that one token adds to a text that goes on, or begins, after a prompt."""
        return self._parts.separator + self.token_bytes(id)

    def token_text(self, id: int) -> str:
        """One token as text; bytes that are no UTF-8 by themselves become U+FFFD."""
        return self.token_bytes(id).decode("utf-8", "replace")

    def stream_decoder(self, *, skip_special_tokens: bool = True, continuation: bool = False) -> StreamDecoder:
        """A decoder for tokens that come one at a time; the options are those of `decode`."""
        return StreamDecoder(self._parts, skip_special_tokens=skip_special_tokens, continuation=continuation)

    @cached_property
    def _template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise TokenizerError("the model has no chat template")
        return ChatTemplate(self.chat_template, self._parts.special_tokens)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **kwargs: Any
    ) -> str:
        """The text of a conversation, to be encoded with add_special_tokens=False.

        Args:
            messages: [{"role": "user", "content": "Hi"}, ...], plus whatever fields the template knows.
            add_generation_prompt: end with the opening of the assistant's turn.
            kwargs: further variables of the template, such as tools.

        Raises TokenizerError when the model has no template or it cannot be compiled, InvalidRequestError when
        it refuses the messages.
        """
        return self._template.render(messages, add_generation_prompt=add_generation_prompt, **kwargs)
