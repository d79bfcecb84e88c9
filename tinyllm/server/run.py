"""Runs the application under uvicorn: the socket first, and an orderly end on SIGTERM."""

from __future__ import annotations

import asyncio
import errno
import gc
import socket
import sys
from types import FrameType

import uvicorn

from tinyllm.errors import ConfigError, reason
from tinyllm.server.app import make_app
from tinyllm.server.connections import connection_class, raise_open_files_limit
from tinyllm.server.service import Service

__all__ = ["bind", "make_server", "serve"]

_BACKLOG = 2048
_SWITCH_SECONDS = 0.0005  # how long the event loop may keep the engine's thread from its next step, and the reverse
_GRACE_SECONDS = 5  # for answers that are complete to reach their readers
_MAX_CONNECTIONS = 4096


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, before anything is loaded. Raises ConfigError where it cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        sock = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"there is no address {host!r}: {reason(error)}") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(_BACKLOG)  # another server there is found out now
    except (OSError, OverflowError) as error:
        sock.close()
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        why = "another program listens there" if taken else reason(error)
        raise ConfigError(f"cannot listen at {host} port {port}: {why}") from None
    return sock


def serve(service: Service, sock: socket.socket, *, access_log: bool = False) -> None:
    """Serves until SIGTERM or SIGINT; then running requests finish, new ones are refused; a second signal ends it."""
    raise_open_files_limit()
    gc.collect()
    gc.freeze()  # model and kernels stay: collections need not look through them
    switch = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        make_server(service, access_log=access_log).run(sockets=[sock])
    finally:
        sys.setswitchinterval(switch)
        sock.close()


def make_server(service: Service, *, access_log: bool = False) -> uvicorn.Server:
    """What `serve` runs."""
    config = uvicorn.Config(
        make_app(service),
        http=connection_class(max_body_nbytes=service.config.max_body_nbytes),
        ws="none",
        log_level="info" if access_log else "warning",
        access_log=access_log,
        timeout_graceful_shutdown=_GRACE_SECONDS,
        limit_concurrency=_MAX_CONNECTIONS,
        server_header=False,
        date_header=True,
    )
    return _Server(config, service)


class _Server(uvicorn.Server):
    """Lets requests finish before it stops to listen for them."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets=sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """In a signal handler, on the main thread."""
        if self._loop is None or self._service.engine.draining:
            super().handle_exit(sig, frame)
            return
        self._service.engine.draining = True
        self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        async def drain() -> None:
            await self._service.engine.drain(self._service.config.drain_seconds)
            self._service.feed.close()
            await asyncio.sleep(0)  # the last results are on their way
            self.should_exit = True

        self._draining = asyncio.ensure_future(drain())
