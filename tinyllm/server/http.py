"""Answers over HTTP: JSON, streams of server-sent events, and clients that go away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tinyllm.outputs import RequestOutput, StreamChunk
from tinyllm.server.errors import ApiError
from tinyllm.server.submission import Submission

__all__ = ["EventStream", "JsonResponse", "StreamWriter", "event", "outputs_or_gone", "when_gone"]


class JsonResponse(Response):
    """A JSON body in ASCII, so that no text can fail to be encoded."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")

    @classmethod
    def of_error(cls, error: ApiError) -> JsonResponse:
        return cls(error.body(), status_code=error.status, headers=error.headers)


def event(data: str) -> bytes:
    """One server-sent event."""
    return f"data: {data}\n\n".encode()


class StreamWriter(Protocol):
    """Puts what comes of a submission into events."""

    def begin(self) -> bytes: ...

    def chunk(self, job: int, chunk: StreamChunk) -> bytes: ...

    def end(self, outputs: Mapping[int, RequestOutput]) -> bytes: ...


class EventStream(Response):
    """Sends a submission's chunks as they come. When the client goes away, its jobs end before the next step."""

    media_type = "text/event-stream"

    def __init__(self, submission: Submission, writer: StreamWriter) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._submission = submission
        self._writer = writer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = when_gone(receive, self._submission.abort)
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await self._send_events(send)
        finally:
            gone.cancel()
            self._submission.abort()

    async def _send_events(self, send: Send) -> None:
        writer, outputs = self._writer, dict[int, RequestOutput]()
        pending = writer.begin()
        while deliveries := await self._submission.take():
            for delivery in deliveries:
                item = delivery.item
                if isinstance(item, StreamChunk):
                    pending += writer.chunk(delivery.index, item)
                elif isinstance(item, ApiError):
                    await _send_body(send, pending + event(item.to_json().decode()), more=False)
                    return
                else:
                    outputs[delivery.index] = item
            if pending:
                await _send_body(send, pending)
                pending = b""
        await _send_body(send, pending + writer.end(outputs) + event("[DONE]"), more=False)


async def _send_body(send: Send, body: bytes, *, more: bool = True) -> None:
    """Waits while the client has much left to read; see server.connections for one that reads nothing."""
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def outputs_or_gone(request: Request, submission: Submission) -> list[RequestOutput]:
    """The outputs of all jobs; when the client goes away meanwhile, they end. Raises ApiError."""
    gone = when_gone(request.receive, submission.abort)
    try:
        return await submission.outputs()
    finally:
        gone.cancel()
        submission.abort()


def when_gone(receive: Receive, action: Callable[[], None]) -> asyncio.Task[None]:
    """Does something when the client disconnects."""

    async def wait() -> None:
        with suppress(Exception):  # a connection that fails is one that has gone
            while (await receive())["type"] != "http.disconnect":
                pass
        action()

    return asyncio.create_task(wait())
