"""HTTP/1.1 as bytes on asyncio's streams: cheap for the one who asks, and free to break every rule."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["Answer", "connection", "post", "read_answer", "request"]

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
_LIMIT = 1 << 22  # bytes; the longest chunk or head


@dataclass(frozen=True)
class Answer:
    """One whole answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[str]:
        """The data of its server-sent events."""
        return [line[6:].decode() for line in self.body.split(b"\n") if line.startswith(b"data: ")]


@asynccontextmanager
async def connection(host: str, port: int, *, receive_buffer: int | None = None) -> AsyncIterator[Streams]:
    """A connection, which is cut off at the end, whatever was left unread."""
    sock = socket.socket()
    sock.setblocking(False)
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    limit = _LIMIT if receive_buffer is None else 1 << 10  # asyncio reads ahead by twice as much
    try:
        await asyncio.get_running_loop().sock_connect(sock, (host, port))
    except BaseException:
        sock.close()
        raise
    reader, writer = await asyncio.open_connection(sock=sock, limit=limit)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def request(method: str, path: str, body: bytes = b"", *, close: bool = False) -> bytes:
    """The bytes of a request. close: asks the server to end the connection after its answer."""
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    return head.encode() + (b"\r\nConnection: close" if close else b"") + b"\r\n\r\n" + body


def post(path: str, body: Any, *, close: bool = False) -> bytes:
    return request("POST", path, json.dumps(body).encode(), close=close)


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    """Raises IncompleteReadError or ConnectionError where the answer is cut off."""
    head = await _read_line_block(reader)
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    if "content-length" in headers:
        body = await reader.readexactly(int(headers["content-length"]))
    else:
        parts = []
        while size := int(await reader.readline() or b"-", 16):
            parts.append((await reader.readexactly(size + 2))[:-2])
        await reader.readexactly(2)
        body = b"".join(parts)
    return Answer(int(first.split()[1]), headers, body)


async def _read_line_block(reader: asyncio.StreamReader) -> bytes:
    block = b""
    while not block.endswith(b"\r\n\r\n"):
        line = await reader.readline()
        if not line:
            raise asyncio.IncompleteReadError(block, None)
        block += line
    return block[:-4]
