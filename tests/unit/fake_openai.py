"""A small OpenAI-compatible server in a thread, whose every byte a test can script."""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

__all__ = ["Connection", "FakeServer", "Request", "chunk", "event", "stream", "usage"]

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Request:
    number: int  # of completions alone, from 0; -1 for others
    method: str
    path: str
    headers: dict[str, str]
    body: Any


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def chunk(text: str, finish: str | None = None, *, chat: bool = False) -> bytes:
    content: dict[str, Any] = {"delta": {"content": text}} if chat else {"text": text}
    return event({"id": "x", "model": "fake", "choices": [{"index": 0, **content, "finish_reason": finish}]})


def usage(prompt: int, output: int, cached: int = 0) -> bytes:
    details = {"prompt_tokens_details": {"cached_tokens": cached}} if cached else {}
    return event({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": output, **details}})


class Connection:
    """What a script writes to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def raw(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def head(self, status: int = 200, kind: str = "text/event-stream", **headers: str) -> None:
        """Of an answer in chunks, which `part` and `end` go on with."""
        lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items()]
        text = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n{''.join(lines)}\r\n"
        await self.raw(text.encode())

    async def part(self, data: bytes) -> None:
        await self.raw(b"%x\r\n%s\r\n" % (len(data), data))

    async def end(self) -> None:
        await self.raw(b"0\r\n\r\n")

    async def json(self, status: int, value: Any, **headers: str) -> None:
        body = json.dumps(value).encode()
        lines = [f"{name.replace('_', '-')}: {text}\r\n" for name, text in headers.items()]
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        await self.raw((head + "".join(lines) + "\r\n").encode() + body)

    async def until_the_client_is_gone(self) -> None:
        assert await self._reader.read() == b""

    def close(self) -> None:
        self._writer.close()

    def reset(self) -> None:
        self._writer.transport.abort()


Script = Callable[[Request, Connection], Awaitable[None]]


async def stream(request: Request, connection: Connection) -> None:
    """The answer of a server that works: max_tokens tokens, and the usage."""
    chat = "chat" in request.path
    count = request.body["max_tokens"]
    await connection.head()
    if chat:
        await connection.part(
            event({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        )
    for _ in range(count):
        await connection.part(chunk(" a", chat=chat))
    await connection.part(chunk("", "length", chat=chat) + usage(len(request.body.get("prompt", "")), count) + DONE)
    await connection.end()


class FakeServer:
    """Answers completions by `script`, and lists the model "fake".

    Attributes:
        requests: what came, in the order in which it came.
        in_flight, most_in_flight: completions under way, and the most there ever were.
    """

    def __init__(self, script: Script = stream, *, key: str | None = None, tls: ssl.SSLContext | None = None) -> None:
        self.script = script
        self.models: Any = {"data": [{"id": "fake"}, {"id": "other"}]}
        self.requests: list[Request] = []
        self.connections = self.in_flight = self.most_in_flight = 0
        self._key, self._tls = key, tls
        self._number = 0
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    @property
    def url(self) -> str:
        return f"http{'s' if self._tls else ''}://127.0.0.1:{self._port}"

    @property
    def completions(self) -> list[Request]:
        return [request for request in self.requests if request.number >= 0]

    def __enter__(self) -> FakeServer:
        self._thread.start()
        assert self._started.wait(60)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        self._port = server.sockets[0].getsockname()[1]
        self._started.set()
        await self._stop.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        connection = Connection(reader, writer)
        try:
            while not writer.is_closing():
                request = await self._read(reader)
                if self._key is not None and request.headers.get("authorization") != f"Bearer {self._key}":
                    await connection.json(401, {"error": {"message": "no such key"}})
                elif request.number < 0:
                    await connection.json(200, self.models)
                else:
                    await self._complete(request, connection)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _complete(self, request: Request, connection: Connection) -> None:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await self.script(request, connection)
        finally:
            self.in_flight -= 1

    async def _read(self, reader: asyncio.StreamReader) -> Request:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines if line)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        method, path, _ = first.split(" ")
        number = -1
        if path.endswith("/completions"):
            number, self._number = self._number, self._number + 1
        request = Request(number, method, path, headers, json.loads(body) if body else None)
        self.requests.append(request)
        return request
