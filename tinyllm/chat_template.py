"""Chat templates: the jinja2 program in a model's files that writes a conversation as one text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from tinyllm.errors import InvalidRequestError, TokenizerError
from tinyllm.tokenization.parts import one_line

__all__ = ["MAX_OUTPUT_CHARS", "MAX_SOURCE_CHARS", "ChatTemplate"]

MAX_OUTPUT_CHARS = 1 << 22
MAX_SOURCE_CHARS = 1 << 17
_MAX_DEPTH = 64
_MAX_INT_BITS = 256


class ChatTemplate:
    """A compiled chat template, in the dialect that transformers defines.

    Templates come with models, from anywhere: they run in jinja2's immutable sandbox, with bounds on what they
    output, hold and do (see tokenization/template_sandbox.py).
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        """Args: source, the template; special_tokens, its variables such as bos_token. Raises TokenizerError."""
        from jinja2 import TemplateError, TemplateSyntaxError

        from tinyllm.tokenization.template_sandbox import TemplateEnvironment

        if len(source) > MAX_SOURCE_CHARS:
            raise TokenizerError(f"the chat template has {len(source)} characters; the limit is {MAX_SOURCE_CHARS}")
        self._special_tokens = dict(special_tokens or {})
        functions = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        try:
            self._generate = TemplateEnvironment(functions).template(source)
        except TemplateSyntaxError as error:
            where = f"the chat template is wrong in line {error.lineno}"
            raise TokenizerError(f"{where}: {one_line(error.message)}") from error
        except (RecursionError, MemoryError) as error:
            raise TokenizerError("the chat template is nested too deeply") from error
        except (TemplateError, SyntaxError, ValueError, TypeError, OverflowError) as error:
            raise TokenizerError(f"the chat template cannot be compiled: {one_line(error)}") from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **kwargs: Any
    ) -> str:
        """The text of a conversation.

        Args:
            messages: each has a "role" and the fields that the template knows; plain JSON values only.
            add_generation_prompt: end with the opening of the assistant's turn.
            kwargs: further variables of the template (tools, documents, ...); plain JSON values only.

        Raises InvalidRequestError when the messages are malformed or the template refuses them.
        """
        from jinja2 import TemplateError
        from jinja2.exceptions import SecurityError

        from tinyllm.tokenization.template_sandbox import TemplateLimitError

        variables = {
            **self._special_tokens,
            "tools": None,
            "documents": None,
            **{name: _plain(value, name) for name, value in kwargs.items()},
            "messages": _checked_messages(messages),
            "add_generation_prompt": bool(add_generation_prompt),
        }
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._generate(variables):
                length += len(piece)
                if length > MAX_OUTPUT_CHARS:
                    raise TemplateLimitError(f"it writes more than {MAX_OUTPUT_CHARS} characters")
                pieces.append(piece)
        except TemplateLimitError as error:
            raise InvalidRequestError(f"the chat template was stopped: {error}") from error
        except SecurityError as error:
            raise InvalidRequestError(f"the chat template was stopped: {one_line(error)}") from error
        except InvalidRequestError:
            raise
        except TemplateError as error:
            raise InvalidRequestError(f"the chat template refuses the messages: {one_line(error)}") from error
        except RecursionError as error:
            raise InvalidRequestError("the chat template was stopped: it calls itself too deeply") from error
        except Exception as error:  # a template can raise whatever its expressions can
            raise InvalidRequestError(
                f"the chat template fails on the messages: {type(error).__name__}: {one_line(error)}"
            ) from error
        return "".join(pieces)


def _checked_messages(messages: object) -> list[dict[str, Any]]:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InvalidRequestError('messages must be a list of at least one {"role": ..., "content": ...}')
    checked = []
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise InvalidRequestError(f"{name} must be a mapping, not {type(message).__name__}")
        if not isinstance(message.get("role"), str):
            raise InvalidRequestError(f'{name} must have a "role" that is a string')
        checked.append(_plain(message, name))
    return checked


def _plain(value: object, name: str, depth: int = 0) -> Any:
    """A copy out of plain JSON values, so that the template never holds an object with methods of its own."""
    if depth > _MAX_DEPTH:
        raise InvalidRequestError(f"{name} is nested more than {_MAX_DEPTH} deep")
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        if value.bit_length() > _MAX_INT_BITS:
            raise InvalidRequestError(f"{name} holds an integer of more than {_MAX_INT_BITS} bits")
        return int(value)
    if isinstance(value, Mapping):
        return {_key(key, name): _plain(item, f"{name}[{key!r}]", depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{name}[{index}]", depth + 1) for index, item in enumerate(value)]
    raise InvalidRequestError(f"{name} must be plain JSON, not {type(value).__name__}")


def _key(key: object, name: str) -> str:
    if not isinstance(key, str):
        raise InvalidRequestError(f"{name} has a key that is not a string: {one_line(repr(key), 40)}")
    return str(key)


def _raise_exception(message: object) -> None:
    from jinja2 import TemplateError

    raise TemplateError(str(message))


def _strftime_now(format: str) -> str:
    if not isinstance(format, str) or len(format) > 256:
        raise InvalidRequestError("the chat template asks for the time in a format of more than 256 characters")
    return datetime.now().strftime(format)
