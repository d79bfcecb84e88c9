"""What a text must look like: valid JSON, JSON of a schema, a regular expression, a grammar. Data, checked for size."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from tinyllm.errors import InvalidRequestError

__all__ = ["StructuredOutput"]

KINDS = ("json_object", "json_schema", "regex", "grammar")
MAX_NBYTES = 1 << 16
MAX_NESTING = 64

_MARK = re.compile(r'\\.|["\[\]{}]', re.DOTALL)


@dataclass(frozen=True)
class StructuredOutput:
    """What a generated text must match, from its first character to its last.

    It is enforced as tokens are chosen: those that could not go on to a matching text are left out. Short for it:
    `StructuredOutput.json_schema({...})`, `.regex(...)`, `.grammar(...)` and `.json_object()`.

    Attributes:
        kind: "json_object" (any JSON object), "json_schema", "regex" or "grammar".
        text: the schema as JSON, the regular expression (Rust's syntax, without look-around), or the grammar in
            llguidance's form of Lark, whose first rule is `start`; "" for a json_object.

    JSON is written on one line, as Python's json.dumps does. A schema may say otherwise with llguidance's
    "x-guidance": {"whitespace_flexible": true}.

    Raises:
        InvalidRequestError: the kind is unknown; the text is empty, too large, nested too deeply, or not JSON where it
            should be. Whether it can be compiled shows later; see LLM.compile_structured_output.
    """

    kind: str
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            shown = repr(self.kind)[:60] if isinstance(self.kind, str) else f"a {type(self.kind).__name__}"
            raise InvalidRequestError(f"the kind of a structured output must be one of {', '.join(KINDS)}, not {shown}")
        if not isinstance(self.text, str):
            raise InvalidRequestError(f"the {self.kind} must be a string, not a {type(self.text).__name__}")
        if self.kind == "json_object":
            if self.text:
                raise InvalidRequestError("a json_object takes no text: use json_schema")
            return
        if not self.text.strip() if self.kind != "regex" else not self.text:
            raise InvalidRequestError(f"the {self.kind} is empty")
        try:
            size = len(self.text.encode())
        except UnicodeEncodeError:
            raise InvalidRequestError(f"the {self.kind} is not valid Unicode") from None
        if size > MAX_NBYTES:
            raise InvalidRequestError(f"the {self.kind} has {size} bytes; at most {MAX_NBYTES} are allowed")
        if "\0" in self.text:
            raise InvalidRequestError(f"the {self.kind} has a NUL character")
        if self.kind == "json_schema":
            _check_schema(self.text)

    @classmethod
    def json_object(cls) -> StructuredOutput:
        """Any JSON object."""
        return cls("json_object")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> StructuredOutput:
        """JSON of a schema, given as a mapping or as JSON text. Raises InvalidRequestError."""
        if isinstance(schema, str):
            return cls("json_schema", schema)
        try:
            return cls("json_schema", json.dumps(schema, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            if isinstance(error, InvalidRequestError):
                raise
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
            raise InvalidRequestError(f"the json_schema is not JSON: {reason[:200]}") from None

    @classmethod
    def regex(cls, pattern: str) -> StructuredOutput:
        """A text that a regular expression matches as a whole. Raises InvalidRequestError."""
        return cls("regex", pattern)

    @classmethod
    def grammar(cls, grammar: str) -> StructuredOutput:
        """A text of a context-free grammar. Raises InvalidRequestError."""
        return cls("grammar", grammar)

    @classmethod
    def of(cls, value: object) -> StructuredOutput:
        """The value itself, or what a mapping {"kind": ..., "text": ...} describes. Raises InvalidRequestError."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise InvalidRequestError(
                f'structured_output must be a StructuredOutput or {{"kind": ..., "text": ...}}, '
                f"not a {type(value).__name__}"
            )
        unknown = [key for key in value if key not in ("kind", "text")]
        if unknown or "kind" not in value:
            raise InvalidRequestError('structured_output takes "kind" and "text" alone')
        return cls(value["kind"], value.get("text", ""))

    def to_json(self) -> dict[str, str]:
        """What `of` takes."""
        return {"kind": self.kind, "text": self.text} if self.text else {"kind": self.kind}


def _check_schema(text: str) -> None:
    deepest = _nesting(text)
    if deepest > MAX_NESTING:
        raise InvalidRequestError(f"the json_schema is nested {deepest} deep; at most {MAX_NESTING} is allowed")

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a JSON number")

    try:
        schema = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # JSONDecodeError, or an integer of too many digits
        raise InvalidRequestError(f"the json_schema is not JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(schema, dict):
        raise InvalidRequestError(f"the json_schema must be a JSON object, not a {type(schema).__name__}")


def _nesting(text: str) -> int:
    """How deep the brackets of a JSON text nest, whether or not they are closed."""
    depth = deepest = 0
    in_string = False
    for mark in _MARK.findall(text):
        if mark == '"':
            in_string = not in_string
        elif not in_string and len(mark) == 1:
            depth += 1 if mark in "[{" else -1
            deepest = max(deepest, depth)
    return deepest
