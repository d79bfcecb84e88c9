"""Where prompts come from: arguments, stdin, or the lines of a JSONL file. A bad line spoils itself alone."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from tinyllm.cli import console
from tinyllm.cli.console import UsageError
from tinyllm.cli.options import checked_text
from tinyllm.errors import InvalidRequestError, reason

if TYPE_CHECKING:
    from tinyllm.sampling_params import SamplingParams

__all__ = ["PromptItem", "read_items", "read_stdin", "read_text_file", "stdin_is_piped"]

_PROMPT_KEYS = ("prompt", "prompt_token_ids")
_REFUSED_KEYS = ("logits_processors", "logprobs", "prompt_logprobs")  # code, and what the output does not show


@dataclasses.dataclass(frozen=True)
class PromptItem:
    """One prompt: text or token ids, or the message saying why it cannot be served.

    Attributes:
        where: what messages call it, such as "questions.jsonl:3"; "" for the only prompt there is.
        token_ids: the prompt as the model will read it, once that is known.
        error: what is wrong with it; None if nothing is.
    """

    where: str
    prompt: str | list[int]
    params: SamplingParams
    token_ids: list[int] = dataclasses.field(default_factory=list)
    error: str | None = None

    def failed(self, message: str) -> PromptItem:
        return dataclasses.replace(self, error=f"{self.where}: {message}" if self.where else message)


def read_items(args: argparse.Namespace, defaults: SamplingParams) -> list[PromptItem]:
    """The prompts that `args.prompts`, `args.input` or a piped stdin give, in order. Raises UsageError."""
    if args.input is not None:
        if args.prompts:
            raise UsageError("give prompts either as arguments or with --input, not both")
        items = list(_read_jsonl(args.input, defaults))
        if not items:
            raise UsageError(f"{args.input}: there is no prompt in it")
        return items
    prompts = list(args.prompts)
    if not prompts:
        if not stdin_is_piped():
            raise UsageError('no prompt given: try tinyllm generate "Once upon a time"')
        prompts = ["-"]
    if prompts.count("-") > 1:
        raise UsageError('"-" may stand for stdin once only')
    return [_argument_item(text, i, len(prompts), defaults) for i, text in enumerate(prompts, 1)]


def _argument_item(text: str, number: int, total: int, defaults: SamplingParams) -> PromptItem:
    where = f"prompt {number}" if total > 1 else ""
    if text == "-":
        return PromptItem(where, read_stdin(), defaults)
    item = PromptItem(where, text, defaults)
    try:
        checked_text(text, "the prompt")
    except UsageError as error:
        return item.failed(str(error))
    return item


def stdin_is_piped() -> bool:
    return sys.stdin is not None and not console.is_terminal(sys.stdin)


def read_stdin() -> str:
    """All of stdin as UTF-8, less one trailing newline: what `echo text |` means. Raises UsageError."""
    if sys.stdin is None:
        raise UsageError("standard input is closed")
    return _decode(_binary_stdin().read(), "standard input")


def read_text_file(path: str) -> str:
    """A UTF-8 file, less one trailing newline. Raises UsageError."""
    try:
        return _decode(Path(path).read_bytes(), path)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {reason(error)}") from error


def _binary_stdin() -> BinaryIO:
    return sys.stdin.buffer


def _decode(data: bytes, what: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{what} is not valid UTF-8: byte 0x{data[error.start]:02x} at {error.start}") from None
    if text.endswith("\n"):
        text = text[:-2] if text.endswith("\r\n") else text[:-1]
    return text


def _read_jsonl(path: str, defaults: SamplingParams) -> Iterator[PromptItem]:
    """One item for each line that is not blank; "-" is stdin."""
    if path == "-":
        yield from _parse_lines(_binary_stdin(), "<stdin>", defaults)
        return
    try:
        with open(path, "rb") as file:
            yield from _parse_lines(file, path, defaults)
    except (OSError, ValueError) as error:
        if isinstance(error, InvalidRequestError):
            raise
        raise UsageError(f"cannot read {path}: {reason(error)}") from error


def _parse_lines(file: BinaryIO, name: str, defaults: SamplingParams) -> Iterator[PromptItem]:
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
        if line.strip():
            yield _parse_line(line, f"{name}:{number}", defaults)


def _parse_line(line: bytes, where: str, defaults: SamplingParams) -> PromptItem:
    item = PromptItem(where, "", defaults)
    try:
        prompt, overrides = _parse_object(line)
        params = dataclasses.replace(defaults, **overrides)
    except (UsageError, InvalidRequestError) as error:
        return item.failed(str(error))
    return dataclasses.replace(item, prompt=prompt, params=params)


def _parse_object(line: bytes) -> tuple[str | list[int], dict[str, Any]]:
    """A line's prompt, and its sampling parameters. Raises UsageError."""

    def refuse(name: str) -> NoReturn:
        raise UsageError(f"invalid JSON: {name} is not a JSON number")

    try:
        value = json.loads(line.decode("utf-8"), parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise UsageError(f"invalid UTF-8: byte 0x{line[error.start]:02x} at {error.start}") from None
    except RecursionError:
        raise UsageError("invalid JSON: it is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, or an integer of too many digits
        raise UsageError(f"invalid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f'expected an object such as {{"prompt": "..."}}, not {_kind(value)}')
    given = [key for key in _PROMPT_KEYS if key in value]
    if len(given) != 1:
        raise UsageError('expected either "prompt" or "prompt_token_ids"' + (", not both" if given else ""))
    prompt = value.pop(given[0])
    if given[0] == "prompt":
        if not isinstance(prompt, str):
            raise UsageError(f'"prompt" must be a string, not {_kind(prompt)}')
        checked_text(prompt, '"prompt"')
    elif not isinstance(prompt, list):
        raise UsageError(f'"prompt_token_ids" must be a list of integers, not {_kind(prompt)}')
    return prompt, _overrides(value)


def _overrides(value: dict[str, Any]) -> dict[str, Any]:
    from tinyllm.sampling_params import SamplingParams

    known = [f.name for f in dataclasses.fields(SamplingParams) if f.name not in _REFUSED_KEYS]
    for key in value:
        if key not in known:
            raise UsageError(f'unknown key "{console.one_line(key, 60)}"; a line takes prompt, {", ".join(known)}')
    bias = value.get("logit_bias")
    if isinstance(bias, dict):  # JSON has no integer keys
        try:
            value["logit_bias"] = {int(token): number for token, number in bias.items()}
        except ValueError:
            raise UsageError("the keys of logit_bias must be token ids") from None
    return value


def _kind(value: object) -> str:
    if value is None:
        return "null"
    return {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}.get(type(value), "a number")
