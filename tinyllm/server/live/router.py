"""The page at `/`, its files, the stream of live events, and the switches that pause the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.params import Depends

from tinyllm.engine.llm_engine import LLMEngine
from tinyllm.server.engine_thread import EngineThread
from tinyllm.server.errors import ApiError, unavailable
from tinyllm.server.http import JsonResponse
from tinyllm.server.live.feed import LiveFeed
from tinyllm.server.live.page import HEADERS, PageFile, page_files
from tinyllm.server.live.stream import LiveStream

__all__ = ["live_router"]

MAX_VIEWERS = 32

T = TypeVar("T")


def live_router(engine_thread: EngineThread, feed: LiveFeed, *, dependencies: Sequence[Depends] = ()) -> APIRouter:
    """Everything of the page.

    Args:
        feed: of the same engine; whoever else pauses it calls `feed.pause_changed`, so that viewers learn of it.
        dependencies: demanded of all that tells of the engine or moves it, such as a key; the page's own files are for
            everyone, since a browser sends no key for them, and say nothing.
    """
    router = APIRouter(include_in_schema=False)
    router.include_router(_page_router(page_files()))
    router.include_router(_live_router(engine_thread, feed), prefix="/live", dependencies=dependencies)
    return router


def _page_router(pages: dict[str, PageFile]) -> APIRouter:
    router = APIRouter(include_in_schema=False)

    def send(request: Request, name: str) -> Response:
        page = pages.get(name)
        if page is None:
            raise ApiError(404, "the page has no such file", code="not_found")
        headers = {**HEADERS, "ETag": page.etag}
        if request.headers.get("if-none-match") == page.etag:
            return Response(status_code=304, headers=headers)
        return Response(page.data, media_type=page.media_type, headers=headers)

    @router.get("/")
    async def index(request: Request) -> Response:
        return send(request, "index.html")

    @router.get("/page/{name}")
    async def file(request: Request, name: str) -> Response:
        return send(request, name)

    return router


def _live_router(engine_thread: EngineThread, feed: LiveFeed) -> APIRouter:
    router = APIRouter(include_in_schema=False)

    async def on_engine(action: Callable[[LLMEngine], T]) -> T:
        return await asyncio.wrap_future(engine_thread.call(action))

    @router.get("/events")
    async def events() -> Response:
        if feed.num_viewers >= MAX_VIEWERS:
            raise unavailable(f"{MAX_VIEWERS} viewers watch already")
        return LiveStream(engine_thread, feed)

    @router.get("/state")
    async def state() -> Response:
        return JsonResponse(await on_engine(lambda engine: feed.state()), headers={"Cache-Control": "no-store"})

    async def switch(request: Request, *, paused: bool | None) -> dict[str, Any]:
        """Pauses or goes on, or takes one step where `paused` is None; a form on a foreign page cannot do so."""
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "send this with Content-Type: application/json")
        if paused is None:
            if not engine_thread.paused:
                raise ApiError(409, "the engine is not paused: it takes steps by itself", code="not_paused")
            await on_engine(lambda engine: feed.step_requested())
            engine_thread.single_step()
        else:
            (engine_thread.pause if paused else engine_thread.resume)()
            await on_engine(lambda engine: feed.pause_changed())
        return {"paused": engine_thread.paused}

    @router.post("/pause")
    async def pause(request: Request) -> dict[str, Any]:
        return await switch(request, paused=True)

    @router.post("/step")
    async def step(request: Request) -> dict[str, Any]:
        return await switch(request, paused=None)

    @router.post("/resume")
    async def resume(request: Request) -> dict[str, Any]:
        return await switch(request, paused=False)

    return router
