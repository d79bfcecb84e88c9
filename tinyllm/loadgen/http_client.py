"""A lean HTTP/1.1 client: connections that are kept, and bodies handed on in the moment they arrive.

A load generator often shares its cores with the server, so that what it spends on a token is taken from what it
measures: no queue, task or future stands between a packet and its reader, one call of `on_body` for each piece.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from typing import Protocol, cast

import httptools

from tinyllm.errors import reason
from tinyllm.loadgen.errors import HTTPError
from tinyllm.loadgen.url import ServerURL

__all__ = ["HTTPClient", "ResponseReader"]

_MAX_HEAD_NBYTES = 64 << 10
_CONNECT_SECONDS = 30.0


class ResponseReader(Protocol):
    """What a response goes to, as it arrives; what it raises ends the exchange and reaches whoever began it."""

    def on_head(self, status: int, headers: dict[str, str]) -> None:
        """headers: by their names in lower case; the last of those that came twice."""

    def on_body(self, data: bytes, now: float) -> None:
        """now: the clock when the packet came that these bytes were in, in seconds."""


class _Connection(asyncio.Protocol):
    """One connection, one exchange at a time. httptools calls the methods whose names begin with `on_`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._transport: asyncio.Transport | None = None
        self._reader: ResponseReader | None = None
        self._done: asyncio.Future[None] | None = None
        self.closed = False

    async def exchange(self, request: bytes, reader: ResponseReader) -> None:
        """Returns when the response has ended. Raises HTTPError, and what the reader raised."""
        assert self._done is None
        if self.closed or self._transport is None:
            raise HTTPError("disconnected", "the server closed the connection")
        self._parser = httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        self._reader, self._headers = reader, dict[str, str]()
        self._nbytes, self._now = 0, 0.0
        self._in_body = self._failed = False
        self._transport.write(request)
        try:
            await self._done
        finally:
            self._done = self._reader = None

    @property
    def answered(self) -> bool:
        """Whether a byte of the last exchange's response came."""
        return self._nbytes > 0

    def close(self) -> None:
        self.closed = True
        if self._transport is not None:
            self._transport.abort()  # whatever is still under way is not wanted

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # whose class is not known: loops have their own

    def data_received(self, data: bytes) -> None:
        if self._reader is None:
            self.close()  # nobody asked
            return
        self._now = self._clock()
        self._nbytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(HTTPError("protocol", f"malformed HTTP response: {error}"))
        if not self._in_body and self._nbytes > _MAX_HEAD_NBYTES:
            self._fail(HTTPError("protocol", f"a response's head is larger than {_MAX_HEAD_NBYTES} bytes"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self._in_body and self._ends_with_the_connection and exc is None:
            self._finish()
        reason = "before it answered" if not self._in_body else "in the middle of its answer"
        self._fail(HTTPError("disconnected", f"the server closed the connection {reason}"))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:  # such as 100 Continue: another head follows
            self._headers = {}
            return
        self._in_body = True
        self._ends_with_the_connection = not {"content-length", "transfer-encoding"} & self._headers.keys()
        if self._reader is not None:
            try:
                self._reader.on_head(status, self._headers)
            except Exception as error:  # httptools would hide it
                self._fail(error)

    def on_body(self, data: bytes) -> None:
        if self._reader is not None and not self._failed:
            try:
                self._reader.on_body(data, self._now)
            except Exception as error:
                self._fail(error)

    def on_message_complete(self) -> None:
        if self._in_body:
            if not self._parser.should_keep_alive():
                self.close()
            self._finish()

    def _finish(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _fail(self, error: Exception) -> None:
        self._failed = True
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)
        self.close()


class HTTPClient:
    """Exchanges with one server, over connections that are kept and used again.

    Args:
        url: where the server is.
        api_key: sent as a bearer token; None for none.
        clock: seconds, for `on_body`.
    """

    def __init__(
        self, url: ServerURL, *, api_key: str | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.url = url
        self.clock = clock
        self._idle: list[_Connection] = []
        self._ssl = ssl.create_default_context() if url.scheme == "https" else None
        authorization = "" if api_key is None else f"Authorization: Bearer {api_key}\r\n"
        self._headers = (
            f"Host: {url.netloc}\r\nUser-Agent: tinyllm-bench\r\nAccept: text/event-stream, application/json\r\n"
            f"{authorization}"
        )

    async def exchange(self, method: str, path: str, body: bytes | None, reader: ResponseReader) -> None:
        """One request, its response to the reader. Raises HTTPError, and what the reader raised.

        A kept connection may have been closed by the server at any time: a request to which no byte came back on such
        a one is sent again on a new one.
        """
        request = self._head(method, path, body) + (body or b"")
        while self._idle:
            connection = self._idle.pop()
            if connection.closed:
                continue
            try:
                await self._on(connection, request, reader)
                return
            except HTTPError as error:
                if error.kind != "disconnected" or connection.answered:
                    raise
        await self._on(await self._connect(), request, reader)

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _on(self, connection: _Connection, request: bytes, reader: ResponseReader) -> None:
        try:
            await connection.exchange(request, reader)
        except BaseException:  # when cancelled, too, closing is what tells the server
            connection.close()
            raise
        if not connection.closed:
            self._idle.append(connection)

    async def _connect(self) -> _Connection:
        url = self.url
        opening = asyncio.get_running_loop().create_connection(
            lambda: _Connection(self.clock), url.host, url.port, ssl=self._ssl
        )
        try:
            return (await asyncio.wait_for(opening, _CONNECT_SECONDS))[1]
        except asyncio.TimeoutError:
            raise HTTPError("connect", f"no connection to {url} within {_CONNECT_SECONDS:.0f} s") from None
        except (OSError, UnicodeError) as error:  # ssl.SSLError is an OSError; a bad host name a UnicodeError
            raise HTTPError("connect", f"no connection to {url}: {_reason(error)}") from None

    def _head(self, method: str, path: str, body: bytes | None) -> bytes:
        length = "" if body is None else f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return f"{method} {self.url.path}{path} HTTP/1.1\r\n{self._headers}{length}\r\n".encode("latin-1")


def _reason(error: Exception) -> str:
    """Without the addresses that asyncio puts before what the system says."""
    return "connection refused" if isinstance(error, ConnectionRefusedError) else reason(error)
