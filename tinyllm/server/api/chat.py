"""POST /v1/chat/completions."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from tinyllm.outputs import Logprob, RequestOutput, StreamChunk
from tinyllm.sampling_params import SamplingParams
from tinyllm.server.api.answer import ChunkEvents, answer_head
from tinyllm.server.api.logprobs import chat_logprobs
from tinyllm.server.api.requests import ChatRequest, Message
from tinyllm.server.api.responses import STREAMED, ChatCompletion
from tinyllm.server.api.sampling import check_logprobs, sampling_params
from tinyllm.server.api.usage import usage_of
from tinyllm.server.auth import Caller
from tinyllm.server.errors import invalid
from tinyllm.server.http import EventStream, JsonResponse, outputs_or_gone
from tinyllm.server.service import Service

__all__ = ["chat_router", "plain_messages"]


def chat_router(service: Service, caller: Callable[..., Awaitable[Caller]]) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAMED)
    async def chat_completions(body: ChatRequest, request: Request, who: Caller = Depends(caller)) -> Response:
        """Answers a conversation, as one JSON object or as a stream of events."""
        service.check_model(body.model)
        params = _params(body, service, who)
        token_ids = await service.in_background(service.llm.encode_chat, plain_messages(body.messages))
        submission = service.submit(await service.jobs([token_ids], params, name="messages"))
        answer = _Answer(service, params)
        if body.stream:
            return EventStream(submission, _ChatStream(answer, params.n, body))
        (output,) = await outputs_or_gone(request, submission)
        return JsonResponse(answer.whole(output))

    return router


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as templates expect them: the text parts of a content as one string."""
    found = []
    for message in messages:
        content = message.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        found.append({"role": message.role, "content": content or "", **(message.model_extra or {})})
    return found


def _params(body: ChatRequest, service: Service, who: Caller) -> SamplingParams:
    num_top = None
    if body.logprobs:
        num_top = check_logprobs("top_logprobs", body.top_logprobs or 0, service.config)
    elif body.top_logprobs is not None:
        raise invalid("top_logprobs is only for requests with logprobs", "top_logprobs")
    wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return sampling_params(
        body,
        service.config,
        cache_salt=who.cache_salt(body.cache_salt),
        max_tokens=service.llm.memory.max_sequence_len if wanted is None else wanted,
        logprobs=num_top,
    )


class _Answer:
    """What all parts of one answer have in common."""

    def __init__(self, service: Service, params: SamplingParams) -> None:
        assert service.llm.tokenizer is not None, "a chat was encoded without a tokenizer"
        self._token_bytes = service.llm.tokenizer.token_bytes
        self._num_top = params.logprobs
        self.head = answer_head(service, "chatcmpl", "chat.completion")

    def logprobs(self, entries: Sequence[Mapping[int, Logprob]] | None) -> dict[str, Any] | None:
        if entries is None or self._num_top is None:
            return None
        return chat_logprobs(entries, self._num_top, self._token_bytes)

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": one.text, "refusal": None},
                "logprobs": self.logprobs(one.logprobs),
                "finish_reason": one.finish_reason,
                "stop_reason": one.stop_reason,
            }
            for index, one in enumerate(output.outputs)
        ]
        return {**self.head, "choices": choices, "usage": usage_of([output])}


class _ChatStream:
    """A StreamWriter: `chat.completion.chunk` objects."""

    def __init__(self, answer: _Answer, n: int, body: ChatRequest) -> None:
        self._answer = answer
        self._n = n
        self._events = ChunkEvents({**answer.head, "object": "chat.completion.chunk"}, body)
        self.end = self._events.end

    def begin(self) -> bytes:
        delta = '"delta":{"role":"assistant","content":"","refusal":null}'
        return b"".join(self._events.choice(index, delta) for index in range(self._n))

    def chunk(self, job: int, chunk: StreamChunk) -> bytes:
        if not (chunk.text or chunk.logprobs or chunk.finish_reason):
            return b""  # a token that is only a part of a character
        delta = json.dumps({"content": chunk.text}) if chunk.text else "{}"
        logprobs = "null" if not chunk.logprobs else json.dumps(self._answer.logprobs(chunk.logprobs))
        return self._events.choice(chunk.index, f'"delta":{delta}', logprobs, chunk.finish_reason)
