"""POST /tokenize and /detokenize."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Depends
from starlette.responses import Response

from tinyllm.server.api.chat import plain_messages
from tinyllm.server.api.requests import DetokenizeRequest, TokenizeRequest
from tinyllm.server.api.responses import Detokenized, Tokenized
from tinyllm.server.auth import Caller
from tinyllm.server.errors import invalid
from tinyllm.server.http import JsonResponse
from tinyllm.server.service import Service

__all__ = ["text_router"]


def text_router(service: Service, caller: Callable[..., Awaitable[Caller]]) -> APIRouter:
    router = APIRouter(tags=["text"], dependencies=[Depends(caller)])

    @router.post("/tokenize", response_model=Tokenized)
    async def tokenize(body: TokenizeRequest) -> Response:
        """The token ids of a prompt or of a conversation."""
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise invalid("tokenize takes one of prompt and messages")
        if body.messages is not None:
            if body.add_special_tokens is not None:
                raise invalid("add_special_tokens is for prompts; a template writes its own", "add_special_tokens")
            tokens = await service.in_background(service.llm.encode_chat, plain_messages(body.messages))
        else:
            special = body.add_special_tokens is None or body.add_special_tokens
            tokens = await service.in_background(
                lambda: service.llm.encode(body.prompt or "", add_special_tokens=special)
            )
        limit = service.llm.memory.max_sequence_len
        return JsonResponse({"tokens": tokens, "count": len(tokens), "max_model_len": limit})

    @router.post("/detokenize", response_model=Detokenized)
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids; special tokens are left out if `skip_special_tokens`."""
        service.check_model(body.model)
        tokenizer = service.llm.tokenizer
        if tokenizer is None:
            raise invalid("this model has no tokenizer")
        skip = bool(body.skip_special_tokens)
        text = await service.in_background(lambda: tokenizer.decode(body.tokens, skip_special_tokens=skip))
        return JsonResponse({"prompt": text})

    return router
