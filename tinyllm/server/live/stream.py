"""One viewer's stream of server-sent events."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tinyllm.server.engine_thread import EngineThread
from tinyllm.server.errors import ApiError
from tinyllm.server.http import when_gone
from tinyllm.server.live.feed import LiveFeed
from tinyllm.server.live.viewer import Viewer

__all__ = ["LiveStream"]

HEARTBEAT_SECONDS = 15.0


class LiveStream(Response):
    """The state, then every event, until the viewer goes away or the feed closes.

    A viewer that reads slowly gets what there is room for, then the state again; see server.connections for one that
    reads nothing.
    """

    media_type = "text/event-stream"

    def __init__(self, engine_thread: EngineThread, feed: LiveFeed) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._engine_thread = engine_thread
        self._feed = feed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop was closed: nobody reads any more
                loop.call_soon_threadsafe(ready.set)

        viewer = Viewer(wake)
        gone = when_gone(receive, viewer.close)
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            with suppress(ApiError):  # the engine's thread has ended
                await self._send_messages(viewer, ready, send)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            gone.cancel()
            self._engine_thread.call(lambda engine: self._feed.detach(viewer))

    async def _send_messages(self, viewer: Viewer, ready: asyncio.Event, send: Send) -> None:
        """Raises ApiError where the engine's thread has ended."""

        async def write(text: str) -> None:  # waits while the viewer has much left to read
            await send({"type": "http.response.body", "body": text.encode("ascii"), "more_body": True})

        await asyncio.wrap_future(self._engine_thread.call(lambda engine: self._feed.attach(viewer)))
        while not viewer.closed:
            ready.clear()
            if taken := viewer.take():
                await write("".join(taken))
            elif viewer.lost:
                await asyncio.wrap_future(self._engine_thread.call(lambda engine: self._feed.resync(viewer)))
            else:
                try:
                    await asyncio.wait_for(ready.wait(), HEARTBEAT_SECONDS)
                except asyncio.TimeoutError:
                    if not self._engine_thread.alive:
                        return
                    await write(": nothing new\n\n")  # so that whoever stands between does not give up
