"""Connections that say nothing, or never finish saying it, do not stay."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["HEAD_SECONDS", "BoundedHead", "raise_open_files_limit"]

HEAD_SECONDS = 30.0
MAX_HEAD_NBYTES = 64 << 10
_WANTED_FILES = 65_536


class BoundedHead(HttpToolsProtocol):
    """uvicorn's connection, which closes when a request's head does not come in time, or is too large."""

    _timer: asyncio.TimerHandle | None = None
    _in_head = True
    _head_nbytes = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_nbytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_nbytes > MAX_HEAD_NBYTES and not self.transport.is_closing():
            self.send_400_response("The head of the request is too large.")

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._forget_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head, self._head_nbytes = True, 0  # of the next request, which may never come: uvicorn times that

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._timer is None:
            self._await_head()

    def _await_head(self) -> None:
        self._timer = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _forget_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self.transport.close()


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
