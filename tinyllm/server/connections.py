"""Connections that say nothing, never finish saying it, or read nothing do not stay."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from tinyllm.server.errors import ApiError, invalid

__all__ = ["HEAD_SECONDS", "STALL_SECONDS", "BoundedConnection", "connection_class", "raise_open_files_limit"]

HEAD_SECONDS = 30.0
STALL_SECONDS = 60.0  # a reader that takes nothing for so long, or up to twice as long, is given up
MAX_HEAD_NBYTES = 64 << 10
_WANTED_FILES = 65_536


class BoundedConnection(HttpToolsProtocol):
    """uvicorn's connection, which closes when a request's head does not come in time, or any part of it is too large,
    and when an answer is not read. What cannot be read as HTTP is refused in the shape of every other refusal.

    Attributes:
        max_message_nbytes: the most bytes of a request after its head, chunk sizes and trailers included.
    """

    max_message_nbytes = 16 << 20

    _in_head = True  # or before it
    _num_nbytes = 0  # of the head or, later, of what follows it; what arrives together with its begin is not counted
    _at_boundary = False
    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _unread = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()
        self._await_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._at_boundary = False
        super().data_received(data)
        if self.transport.is_closing():
            return
        self._num_nbytes = 0 if self._at_boundary else self._num_nbytes + len(data)
        if self._in_head and self._num_nbytes > MAX_HEAD_NBYTES:
            self._refuse(ApiError(431, f"the head of the request is larger than {MAX_HEAD_NBYTES} bytes"))
        elif not self._in_head and self._num_nbytes > self.max_message_nbytes:
            self.transport.abort()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = self._at_boundary = True
        if self._head_timer is None:
            self._await_head()

    def on_headers_complete(self) -> None:
        self._in_head, self._at_boundary = False, True
        self._forget_head()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(invalid("this is not a valid HTTP request"))

    def _refuse(self, error: ApiError) -> None:
        if not self._answering:  # else it would land within another answer
            body = error.to_json()
            head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[error.status] + head + body)
        self.transport.close()

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._give_up_head)

    def _forget_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up_head(self) -> None:
        if self._answering:  # an earlier request of the same connection
            self._await_head()
        else:
            self._head_timer = None
            self.transport.abort()

    def _await_reading(self) -> None:
        self._stall_timer = self.loop.call_later(STALL_SECONDS, self._check_reading)

    def _check_reading(self) -> None:
        """Gives up a client that read nothing since the last check, while there was something to read.

        uvicorn's own close would wait for what is left to be read.
        """
        unread = self.transport.get_write_buffer_size()
        if unread and unread == self._unread:
            self.transport.abort()
        else:
            self._unread = unread
            self._await_reading()


def connection_class(*, max_body_nbytes: int) -> type[BoundedConnection]:
    """A class for uvicorn, which makes the connections itself; chunks may take a few times a body's bytes."""
    return type("Connection", (BoundedConnection,), {"max_message_nbytes": 4 * max_body_nbytes + MAX_HEAD_NBYTES})


def raise_open_files_limit() -> None:
    """As many connections as this process may have: each is an open file."""
    try:
        import resource
    except ImportError:  # not on this system
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED_FILES if hard == resource.RLIM_INFINITY else min(hard, _WANTED_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
