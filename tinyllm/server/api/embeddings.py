"""POST /v1/embeddings."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from tinyllm.embedding import mean_embeddings
from tinyllm.engine.sequence import Task
from tinyllm.sampling_params import SamplingParams
from tinyllm.server.api.requests import EmbeddingRequest
from tinyllm.server.api.responses import EmbeddingList
from tinyllm.server.auth import Caller
from tinyllm.server.errors import invalid
from tinyllm.server.http import JsonResponse, outputs_or_gone
from tinyllm.server.service import Service

__all__ = ["embeddings_router"]


def embeddings_router(service: Service, caller: Callable[..., Awaitable[Caller]]) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/embeddings", response_model=EmbeddingList)
    async def embeddings(body: EmbeddingRequest, request: Request, who: Caller = Depends(caller)) -> Response:
        """One vector for each input: the mean of its final hidden states, of length 1 unless `normalize` is false."""
        service.check_model(body.model)
        size = service.llm.config.hidden_size
        if body.dimensions not in (None, size):
            raise invalid(f"dimensions is {body.dimensions}; this model's vectors have {size}", "dimensions")
        params = SamplingParams(cache_salt=who.cache_salt(body.cache_salt), priority=body.priority or 0)
        jobs = await service.jobs(service.prompts(body.input, "input"), params, Task.EMBED, "input")
        outputs = await outputs_or_gone(request, service.submit(jobs))
        rows = [output.rows for output in outputs if output.rows is not None]
        vectors = await service.in_background(
            lambda: mean_embeddings(rows, normalize=body.normalize is None or body.normalize)
        )
        num_tokens = sum(len(job.token_ids) for job in jobs)

        def shown(vector: Any) -> Any:
            if body.encoding_format == "base64":
                return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
            return vector.tolist()

        data = [{"object": "embedding", "index": i, "embedding": shown(vector)} for i, vector in enumerate(vectors)]
        return JsonResponse(
            {
                "object": "list",
                "model": service.config.model_name,
                "data": data,
                "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
            }
        )

    return router
