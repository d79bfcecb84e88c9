"""What is sent: random token ids, random words, or the user's own prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllm.errors import reason
from tinyllm.loadgen.errors import LoadError
from tinyllm.loadgen.lengths import MAX_LENGTH

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Prompt", "random_ids", "random_words", "read_prompts"]

Prompt = str | list[int] | list[dict[str, Any]]  # a text, token ids, or the messages of a chat

_MAX_FILE_NBYTES = 1 << 30
_KEYS = ("prompt", "prompt_token_ids", "messages")

# Each is one token, its space included, with nearly every tokenizer of English.
_TEXT = (
    "the of and to in that was he for it with as his on be at by had not are but from or have they which one were all "
    "her she there would their we him been has when who will no more if out so up said what about into than them can "
    "only other time new some could these two may first then do any like my now over such our man me even most made "
    "after also did many before must through back years where much your way down should because long each just state "
    "people those too little good world make very year still see own work men day get here old life both between being "
    "under three never know same last another while us off might great go come since against right came take used "
    "himself few house use place during high without again home around small however found thought went say part once"
)
_WORDS = _TEXT.split()


@dataclass(frozen=True)
class FilePrompt:
    """A line of the user's file: its prompt, and how many tokens it asks for; None where it does not say."""

    prompt: Prompt
    max_tokens: int | None


def random_ids(random: np.random.Generator, length: int, low: int, high: int) -> list[int]:
    """Token ids from `low` to `high`, both included."""
    ids: list[int] = random.integers(low, high + 1, length).tolist()
    return ids


def random_words(random: np.random.Generator, length: int) -> str:
    """A text of about `length` tokens: that many common words."""
    return " ".join([_WORDS[index] for index in random.integers(0, len(_WORDS), length)])


def read_prompts(path: str, *, chat: bool) -> Sequence[FilePrompt]:
    """The lines of a JSONL file, "-" for stdin: objects with "prompt", "prompt_token_ids" or "messages".

    Each may have "max_tokens" as well. Raises LoadError that names the line.
    """
    try:
        if path == "-":
            data = sys.stdin.buffer.read(_MAX_FILE_NBYTES + 1)
        else:
            with Path(path).open("rb") as file:
                data = file.read(_MAX_FILE_NBYTES + 1)
    except (OSError, ValueError) as error:
        raise LoadError(f"cannot read {path}: {reason(error)}") from None
    if len(data) > _MAX_FILE_NBYTES:
        raise LoadError(f"{path} is larger than {_MAX_FILE_NBYTES} bytes")
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    prompts = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                prompts.append(_parse(line, chat))
            except LoadError as error:
                raise LoadError(f"{path}:{number}: {error}") from None
    if not prompts:
        raise LoadError(f"{path}: there is no prompt in it")
    return prompts


def _parse(line: bytes, chat: bool) -> FilePrompt:
    try:
        value = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise LoadError(f"invalid JSON: {error}") from None
    if not isinstance(value, dict):
        raise LoadError('expected an object such as {"prompt": "..."}')
    given = [key for key in _KEYS if key in value]
    if len(given) != 1 or value.keys() - {*_KEYS, "max_tokens"}:
        raise LoadError('expected one of "prompt", "prompt_token_ids" and "messages", and perhaps "max_tokens"')
    kind, prompt, tokens = given[0], value[given[0]], value.get("max_tokens")
    if kind == "prompt" and not isinstance(prompt, str):
        raise LoadError('"prompt" must be a string')
    if kind == "prompt_token_ids" and not (
        isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt)
    ):
        raise LoadError('"prompt_token_ids" must be a list of integers')
    if kind == "messages" and not (
        isinstance(prompt, list) and prompt and all(isinstance(message, dict) for message in prompt)
    ):
        raise LoadError('"messages" must be a list of objects')
    if chat and kind == "prompt_token_ids":
        raise LoadError('a chat has no "prompt_token_ids"')
    if not chat and kind == "messages":
        raise LoadError('"messages" need --chat')
    if tokens is not None and not (type(tokens) is int and 1 <= tokens <= MAX_LENGTH):
        raise LoadError(f'"max_tokens" must be an integer from 1 to {MAX_LENGTH}')
    return FilePrompt(prompt, tokens)
