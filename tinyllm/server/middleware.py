"""What every request passes first: its body is read whole, within bounds; every answer gets the same safe headers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinyllm.server.errors import ApiError, invalid
from tinyllm.server.http import JsonResponse

__all__ = ["BoundedBody", "KnownHost", "SafeHeaders"]

_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
)
_POLICY = b"default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
_POLICY_OF_DOCS = _POLICY + b"; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'"


class BoundedBody:
    """Reads a request's body before anyone else does; one that is too large or too slow is refused."""

    def __init__(self, app: ASGIApp, *, max_nbytes: int, seconds: float) -> None:
        self._app = app
        self._max_nbytes = max_nbytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._read(scope, receive), self._seconds)
        except asyncio.TimeoutError:
            error = ApiError(
                408, f"the body did not arrive within {self._seconds:g} s", headers={"Connection": "close"}
            )
            await JsonResponse.of_error(error)(scope, receive, send)
            return
        except ApiError as error:
            await JsonResponse.of_error(error)(scope, receive, send)
            return
        if body is None:
            return
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return first.pop() if first else await receive()

        await self._app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None where the client went away. Raises ApiError."""
        for name, value in scope["headers"]:
            if name == b"content-length" and (not value.isdigit() or len(value) > 18 or int(value) > self._max_nbytes):
                raise self._too_large()
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_nbytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return b"".join(parts)

    def _too_large(self) -> ApiError:
        error = invalid(f"the body is larger than {self._max_nbytes} bytes")
        error.status = 413
        error.headers = {"Connection": "close"}  # the rest of it is not read
        return error


class KnownHost:
    """Refuses requests for a host of another name."""

    def __init__(self, app: ASGIApp, *, names: Sequence[str]) -> None:
        self._app = app
        self._names = frozenset(name.lower() for name in names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
            if len(given) != 1 or _without_port(given[0]) not in self._names:
                error = ApiError(421, "this server is not called that; --allow-host adds a name", code="unknown_host")
                await JsonResponse.of_error(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _without_port(host: str) -> str:
    """ "Example.org:80" -> "example.org"; "[::1]:80" -> "[::1]" """
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() and not name.endswith(":") else host).lower()


class SafeHeaders:
    """Keeps browsers from guessing types, framing pages, and loading anything from elsewhere."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        policy = _POLICY_OF_DOCS if scope["path"] == "/docs" else _POLICY

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS, (b"content-security-policy", policy)]
            await send(message)

        await self._app(scope, receive, send_safely)
