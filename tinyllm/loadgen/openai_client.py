"""One request to an OpenAI-compatible server, from what is planned to what came of it."""

from __future__ import annotations

import asyncio
import json
import math
import time
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

from tinyllm.loadgen.completion import BodyReader, CompletionReader, error_message
from tinyllm.loadgen.errors import HTTPError, LoadError
from tinyllm.loadgen.http_client import HTTPClient
from tinyllm.loadgen.prompts import Prompt
from tinyllm.loadgen.record import INTERRUPTED, RequestRecord
from tinyllm.loadgen.workload import PlannedRequest

__all__ = ["OpenAIClient", "RequestSettings", "list_models"]

_TOO_MANY = 429
_DEFAULT_WAIT_SECONDS = 1.0
_MAX_WAIT_SECONDS = 600.0
_LISTING_SECONDS = 60.0


@dataclass(frozen=True)
class RequestSettings:
    """What all requests have in common.

    Attributes:
        chat: /v1/chat/completions instead of /v1/completions.
        ignore_eos: ask for outputs of exactly max_tokens; a field that not every server knows.
        temperature: of sampling.
        extra_body: further fields of the body, above all others.
        retries: how often a request is sent again that was answered 429.
        timeout: seconds for one answer, from sending to its end.
    """

    model: str
    chat: bool = False
    ignore_eos: bool = True
    temperature: float = 0.0
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    retries: int = 0
    timeout: float = 600.0

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def body(self, prompt: Prompt, max_tokens: int) -> bytes:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        fields = {
            "model": self.model,
            **({"messages": messages} if self.chat else {"prompt": prompt}),
            "max_tokens": max_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if self.ignore_eos else {}),
        }
        return json.dumps(fields | dict(self.extra_body), separators=(",", ":")).encode()


async def list_models(http: HTTPClient) -> list[str]:
    """The names that /v1/models gives. Raises LoadError."""
    reader = BodyReader()
    try:
        await asyncio.wait_for(http.exchange("GET", "/v1/models", None, reader), _LISTING_SECONDS)
    except HTTPError as error:
        raise LoadError(str(error)) from None
    except asyncio.TimeoutError:
        raise LoadError(f"{http.url} does not answer within {_LISTING_SECONDS:.0f} s") from None
    if reader.status != 200:
        raise LoadError(_refusal(http, "/v1/models", reader))
    try:
        names = [model["id"] for model in json.loads(reader.body)["data"]]
    except (ValueError, LookupError, TypeError, RecursionError):
        names = []
    if not names or not all(isinstance(name, str) for name in names):
        raise LoadError(f"{http.url} does not list its models as OpenAI-compatible servers do")
    return names


class OpenAIClient:
    """Sends requests and measures them.

    Args:
        http: the connections, and the clock.
        settings: what all requests have in common.
        on_record: gets each request's record when it is over.
    """

    def __init__(self, http: HTTPClient, settings: RequestSettings, on_record: Callable[[RequestRecord], None]) -> None:
        self.clock = http.clock
        self._http = http
        self._settings = settings
        self._on_record = on_record

    def prepare(self, request: PlannedRequest) -> bytes:
        """The body: made before its time has come, so that sending takes no longer than it must."""
        return self._settings.body(request.prompt, request.max_tokens)

    async def warm_up(self, prompt: Prompt, max_tokens: int) -> None:
        """One request that is not recorded. Raises LoadError when it cannot be served."""
        reader = CompletionReader()
        try:
            await self._exchange(self._settings.body(prompt, max_tokens), reader)
        except HTTPError as error:
            raise LoadError(f"the first request failed: {error}") from None
        if reader.status != 200 and reader.status != _TOO_MANY:
            raise LoadError(_refusal(self._http, self._settings.path, reader))

    async def send(self, request: PlannedRequest, body: bytes, begin: float) -> None:
        """Sends it, again after 429 if so set, and hands over its record; also when it fails or is cancelled.

        begin: when the run began.
        """
        sent, refusals = self.clock(), 0
        reader = CompletionReader()
        error: str | None = None
        message = ""
        try:
            while True:
                reader = CompletionReader()
                await self._exchange(body, reader)
                if reader.status != _TOO_MANY:
                    break
                refusals += 1
                if refusals > self._settings.retries:
                    break
                await asyncio.sleep(_retry_after(reader.headers.get("retry-after", "")))
            if reader.status != 200:
                error, message = f"HTTP {reader.status}", error_message(reader.body)
            elif not reader.complete:
                error, message = "incomplete", "the stream ended without [DONE] and without a finish_reason"
        except HTTPError as failure:
            error, message = failure.kind, str(failure)
        except asyncio.CancelledError:
            error = INTERRUPTED
            raise
        finally:
            self._on_record(
                RequestRecord(
                    request.index,
                    sent - begin,
                    max(0.0, sent - begin - request.arrival) if request.arrival else None,
                    None if reader.end is None else reader.end - begin,
                    array("d", [time - begin for time in reader.times]),
                    reader.prompt_tokens,
                    reader.cached_tokens,
                    reader.output_tokens,
                    refusals,
                    error,
                    message,
                )
            )

    async def _exchange(self, body: bytes, reader: CompletionReader) -> None:
        settings = self._settings
        try:
            await asyncio.wait_for(self._http.exchange("POST", settings.path, body, reader), settings.timeout)
        except asyncio.TimeoutError:
            raise HTTPError("timeout", f"no end of the answer within {settings.timeout:g} s") from None


def _retry_after(value: str) -> float:
    """Seconds to wait, from the header's seconds or date (RFC 9110, 10.2.3); 1 where it says neither."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return _DEFAULT_WAIT_SECONDS
    return min(max(seconds, 0.0), _MAX_WAIT_SECONDS) if math.isfinite(seconds) else _DEFAULT_WAIT_SECONDS


def _refusal(http: HTTPClient, path: str, reader: BodyReader) -> str:
    what = {401: ": --api-key is missing or wrong", 403: ": --api-key is missing or wrong"}.get(reader.status, "")
    message = error_message(reader.body)
    return f"{http.url}{path} answers {reader.status}{what}" + (f": {message}" if message else "")
