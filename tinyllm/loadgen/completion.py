"""One streamed completion as its chunks arrive: when they came, and how many tokens they brought."""

from __future__ import annotations

import json
from array import array
from typing import Any

from tinyllm.loadgen.errors import HTTPError
from tinyllm.loadgen.sse import ServerSentEvent, SSEError, SSEParser

__all__ = ["BodyReader", "CompletionReader", "error_message"]

_MAX_BODY_NBYTES = 8 << 20
_OUTPUT_KEYS = ("content", "reasoning_content", "reasoning", "tool_calls")  # of a delta


class BodyReader:
    """A whole response: `status`, `headers` and `body`. A body larger than 8 MiB is an HTTPError."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""

    def on_head(self, status: int, headers: dict[str, str]) -> None:
        self.status, self.headers = status, headers

    def on_body(self, data: bytes, now: float) -> None:
        self.body += data
        if len(self.body) > _MAX_BODY_NBYTES:
            raise HTTPError("protocol", f"the server's answer is larger than {_MAX_BODY_NBYTES} bytes")


class CompletionReader(BodyReader):
    """The stream of one request. It keeps the times of chunks, not their texts.

    Attributes:
        times: of each chunk that brought output, in seconds of the client's clock.
        end: of the last event so far; None before the first.
        complete: whether the server said that the stream is at its end.
        prompt_tokens, cached_tokens, output_tokens: as the server counts them; None where it does not say.
    """

    def __init__(self) -> None:
        super().__init__()
        self.times = array("d")
        self.end: float | None = None
        self.complete = False
        self.prompt_tokens: int | None = None
        self.cached_tokens: int | None = None
        self.output_tokens: int | None = None
        self._events = SSEParser()
        self._done = False

    def on_head(self, status: int, headers: dict[str, str]) -> None:
        super().on_head(status, headers)
        kind = headers.get("content-type", "")
        if status == 200 and not kind.lower().startswith("text/event-stream"):
            raise HTTPError("protocol", f"the answer is no event stream but {kind or 'of no type'}")

    def on_body(self, data: bytes, now: float) -> None:
        """Raises HTTPError of kinds "protocol" and "error event"."""
        if self.status != 200:
            super().on_body(data, now)
            return
        try:
            for event in self._events.feed(data):
                if not self._done:
                    self._on_event(event, now)
        except SSEError as error:
            raise HTTPError("protocol", str(error)) from None

    def _on_event(self, event: ServerSentEvent, now: float) -> None:
        self.end = now
        if event.data == b"[DONE]":
            self._done = self.complete = True
            return
        try:
            chunk = json.loads(event.data.decode())
        except (ValueError, RecursionError):
            raise HTTPError("protocol", "an event of the stream is not valid JSON") from None
        if not isinstance(chunk, dict):
            raise HTTPError("protocol", "an event of the stream is no JSON object")
        if "error" in chunk or event.type == b"error":
            raise HTTPError("error event", _message_of(chunk) or "the stream ended with an error")
        usage = chunk.get("usage")
        if usage:
            self._on_usage(usage)
        choices = chunk.get("choices")
        if choices:
            self._on_choices(choices, now)

    def _on_choices(self, choices: Any, now: float) -> None:
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise HTTPError("protocol", "the choices of a chunk are no list of objects")
        if any(map(_brings_output, choices)):
            self.times.append(now)
        if any(choice.get("finish_reason") is not None for choice in choices):
            self.complete = True

    def _on_usage(self, usage: Any) -> None:
        if not isinstance(usage, dict):
            raise HTTPError("protocol", "the usage of a chunk is no object")
        self.prompt_tokens = _count(usage, "prompt_tokens", self.prompt_tokens)
        self.output_tokens = _count(usage, "completion_tokens", self.output_tokens)
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict):
            self.cached_tokens = _count(details, "cached_tokens", self.cached_tokens)


def _brings_output(choice: dict[str, Any]) -> bool:
    """A token may have no text: a special one, or the first bytes of a character. Its chunk is output too.

    But the chunk that only names the role, and the one that only says why the text ended, are not.
    """
    unfinished = choice.get("finish_reason") is None
    delta = choice.get("delta")
    if isinstance(delta, dict):
        if any(delta.get(key) for key in _OUTPUT_KEYS):
            return True
        return unfinished and delta.get("content") == "" and "role" not in delta
    text = choice.get("text")
    return bool(text) or (unfinished and text == "")


def _count(values: dict[str, Any], key: str, otherwise: int | None) -> int | None:
    value = values.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else otherwise


def error_message(body: bytes) -> str:
    """What an error's body says: of OpenAI's form, or FastAPI's, or the beginning of any other text; "" for none."""
    try:
        message = _message_of(json.loads(body))
    except (ValueError, RecursionError):
        message = ""
    return message or body[:200].decode("utf-8", "replace").strip()


def _message_of(value: Any) -> str:
    if not isinstance(value, dict):
        return ""
    error = value.get("error", value)
    message = error.get("message", error.get("detail")) if isinstance(error, dict) else error
    return message if isinstance(message, str) else ""
