"""GET /v1/models, /health and /metrics."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Depends
from starlette.responses import Response

from tinyllm.server.api.responses import Health, Model, ModelList
from tinyllm.server.auth import Caller
from tinyllm.server.http import JsonResponse
from tinyllm.server.service import Service

__all__ = ["models_router"]


_METRICS: dict[int | str, dict[str, Any]] = {
    200: {"description": "Prometheus' text format.", "content": {"text/plain": {"schema": {"type": "string"}}}}
}


def models_router(service: Service, caller: Callable[..., Awaitable[Caller]]) -> APIRouter:
    router = APIRouter(tags=["server"])

    def model() -> dict[str, Any]:
        return {
            "id": service.config.model_name,
            "object": "model",
            "created": service.created,
            "owned_by": "tinyllm",
            "max_model_len": service.llm.memory.max_sequence_len,
        }

    @router.get("/v1/models", response_model=ModelList, tags=["OpenAI"], dependencies=[Depends(caller)])
    async def models() -> Response:
        """The one model that is served."""
        return JsonResponse({"object": "list", "data": [model()]})

    @router.get("/v1/models/{name:path}", response_model=Model, dependencies=[Depends(caller)])
    async def model_of_name(name: str) -> Response:
        """The model, by its name."""
        service.check_model(name)
        return JsonResponse(model())

    @router.get("/health", response_model=Health)
    async def health() -> Response:
        """Whether requests are served: 200, or 503 while the server stops or when its engine has failed."""
        if not service.engine.alive:
            return JsonResponse({"status": "failed"}, status_code=503)
        if service.engine.draining:
            return JsonResponse({"status": "draining"}, status_code=503)
        return JsonResponse({"status": "ok"})

    @router.get("/metrics", response_class=Response, responses=_METRICS, dependencies=[Depends(caller)])
    async def metrics() -> Response:
        """Counters and histograms for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return router
