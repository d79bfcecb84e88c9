"""The ASGI application: routes, errors in one shape, and what every request passes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import fastapi_offline
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from tinyllm import __version__
from tinyllm.errors import TinyLLMError
from tinyllm.server.api.chat import chat_router
from tinyllm.server.api.completions import completions_router
from tinyllm.server.api.embeddings import embeddings_router
from tinyllm.server.api.models import models_router
from tinyllm.server.api.responses import ErrorBody
from tinyllm.server.api.text import text_router
from tinyllm.server.auth import caller_of
from tinyllm.server.errors import ApiError, invalid
from tinyllm.server.http import JsonResponse
from tinyllm.server.live import live_router
from tinyllm.server.middleware import BoundedBody, KnownHost, SafeHeaders
from tinyllm.server.service import Service

__all__ = ["make_app"]

_REFUSALS = {
    400: "the request cannot be served",
    401: "no valid API key",
    404: "there is no such model",
    408: "the body came too slowly",
    413: "the body is too large",
    429: "the queue is full",
    503: "the server is about to stop",
}

_MESSAGES = {  # of what the router itself refuses
    400: "the body cannot be read as JSON: it is nested too deeply, or not UTF-8",
    404: "there is nothing at this path; /docs lists what there is",
    405: "this path takes another method; /docs says which",
}


def make_app(service: Service) -> FastAPI:
    """The application; the service starts and stops with it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            service.stop()

    app = FastAPI(
        title="tinyllm",
        description="An OpenAI-compatible server. The same request gives the same bits, whatever runs beside it.",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses={status: {"model": ErrorBody, "description": text} for status, text in _REFUSALS.items()},
    )
    caller = caller_of(service.config.api_keys)
    for router in (chat_router, completions_router, embeddings_router, text_router, models_router):
        app.include_router(router(service, caller))
    app.include_router(live_router(service.engine, service.feed, dependencies=[Depends(caller)]))
    _add_docs(app)
    _add_error_handlers(app)
    app.add_middleware(BoundedBody, max_nbytes=service.config.max_body_nbytes, seconds=service.config.body_seconds)
    if service.config.allowed_hosts is not None:
        app.add_middleware(KnownHost, names=service.config.allowed_hosts)
    app.add_middleware(SafeHeaders)
    return app


def _add_docs(app: FastAPI) -> None:
    """The OpenAPI document as a page, from files of ours: nothing is loaded from elsewhere."""
    app.mount("/docs/files", StaticFiles(directory=Path(fastapi_offline.__file__).parent / "static"))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title="tinyllm: the API",
            swagger_js_url="/docs/files/swagger-ui-bundle.js",
            swagger_css_url="/docs/files/swagger-ui.css",
            swagger_favicon_url="data:,",
        )


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return JsonResponse.of_error(error)

    @app.exception_handler(TinyLLMError)
    async def mistaken(_: Request, error: TinyLLMError) -> Response:
        return JsonResponse.of_error(invalid(str(error)))

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        return JsonResponse.of_error(_first_mistake(error))

    @app.exception_handler(HTTPException)
    async def not_routed(_: Request, error: HTTPException) -> Response:
        message = _MESSAGES.get(error.status_code, str(error.detail))
        return JsonResponse.of_error(ApiError(error.status_code, message, headers=dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return JsonResponse.of_error(ApiError(500, "the server failed on this request", type="server_error"))


def _first_mistake(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body, in one line. Unions report one mistake for each of their members."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return invalid(f"the body is not valid JSON: {first.get('ctx', {}).get('error', '')}")
    where = [str(part) for part in first["loc"] if part != "body"]
    if not where:
        return invalid("the body must be a JSON object, sent with Content-Type: application/json")
    if first["type"] == "extra_forbidden":
        return invalid(f"unknown field {'.'.join(where)[:120]!r}", where[0][:120])
    if first["type"] == "missing":
        return invalid(f"{'.'.join(where)} is missing", where[0])
    others = {one["msg"] for one in error.errors() if one["loc"][1:2] == first["loc"][1:2]}
    return invalid(f"{where[0][:120]}: {'; or '.join(sorted(others))}", where[0][:120])
