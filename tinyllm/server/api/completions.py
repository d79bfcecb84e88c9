"""POST /v1/completions."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from tinyllm.engine.sequence import Task
from tinyllm.outputs import CompletionOutput, RequestOutput, StreamChunk
from tinyllm.sampling_params import SamplingParams
from tinyllm.server.api.answer import ChunkEvents, answer_head
from tinyllm.server.api.logprobs import completion_logprobs
from tinyllm.server.api.requests import CompletionRequest
from tinyllm.server.api.responses import STREAMED, Completion
from tinyllm.server.api.sampling import check_logprobs, sampling_params
from tinyllm.server.api.usage import usage_of
from tinyllm.server.auth import Caller
from tinyllm.server.errors import invalid
from tinyllm.server.http import EventStream, JsonResponse, outputs_or_gone
from tinyllm.server.service import Service
from tinyllm.server.submission import Job

__all__ = ["completions_router"]

DEFAULT_MAX_TOKENS = 16  # OpenAI's


def completions_router(service: Service, caller: Callable[..., Awaitable[Caller]]) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/completions", response_model=Completion, responses=STREAMED)
    async def completions(body: CompletionRequest, request: Request, who: Caller = Depends(caller)) -> Response:
        """Continues prompts, which are texts or token ids, as one JSON object or as a stream of events."""
        service.check_model(body.model)
        params, task = _params(body, service, who)
        jobs = await service.jobs(service.prompts(body.prompt, "prompt"), params, task)
        submission = service.submit(jobs)
        answer = _Answer(service, jobs, params, echo=bool(body.echo))
        if body.stream:
            return EventStream(submission, _CompletionStream(answer, body))
        return JsonResponse(answer.whole(await outputs_or_gone(request, submission)))

    return router


def _params(body: CompletionRequest, service: Service, who: Caller) -> tuple[SamplingParams, Task]:
    num_top = None if body.logprobs is None else check_logprobs("logprobs", body.logprobs, service.config)
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    only_prompt = max_tokens == 0 and bool(body.echo)  # asks for the prompt's own log-probabilities
    if body.echo and body.stream:
        raise invalid("echo does not go with stream", "echo")
    params = sampling_params(
        body,
        service.config,
        cache_salt=who.cache_salt(body.cache_salt),
        max_tokens=1 if only_prompt else max_tokens,
        logprobs=num_top,
        prompt_logprobs=num_top if body.echo else None,
    )
    return params, Task.SCORE if only_prompt else Task.GENERATE


class _Answer:
    """What all parts of one answer have in common; choice number job * n + index belongs to a job."""

    def __init__(self, service: Service, jobs: list[Job], params: SamplingParams, *, echo: bool) -> None:
        self._tokenizer = service.llm.tokenizer
        self._jobs = jobs
        self._num_top = params.logprobs
        self._echo = echo
        self.n = params.n
        self.head = answer_head(service, "cmpl", "text_completion")

    def logprobs(self, entries: Any, offset: int, first_token: str = "") -> dict[str, Any] | None:
        if entries is None or self._num_top is None:
            return None
        return completion_logprobs(entries, self._num_top, offset=offset, first_token=first_token)

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        choices = [
            self._choice(job * self.n + index, self._jobs[job], output, one)
            for job, output in enumerate(outputs)
            for index, one in enumerate(output.outputs)
        ]
        return {**self.head, "choices": choices, "usage": usage_of(outputs)}

    def _choice(self, index: int, job: Job, output: RequestOutput, one: CompletionOutput) -> dict[str, Any]:
        text, entries, first_token = one.text, one.logprobs, ""
        if self._echo:
            text = self._prompt_text(job) + text
            if output.prompt_logprobs is not None:
                first_token = "" if self._tokenizer is None else self._tokenizer.token_text(job.token_ids[0])
                entries = [*output.prompt_logprobs, *(entries or [])]  # type: ignore[list-item]
        return {
            "index": index,
            "text": text,
            "logprobs": self.logprobs(entries, 0, first_token),
            "finish_reason": one.finish_reason or "length",
            "stop_reason": one.stop_reason,
        }

    def _prompt_text(self, job: Job) -> str:
        if job.prompt is not None:
            return job.prompt
        return "" if self._tokenizer is None else self._tokenizer.decode(job.token_ids)


class _CompletionStream:
    """A StreamWriter: `text_completion` objects, each with a piece of one choice."""

    def __init__(self, answer: _Answer, body: CompletionRequest) -> None:
        self._answer = answer
        self._events = ChunkEvents(answer.head, body)
        self._offsets: dict[int, int] = {}
        self.end = self._events.end

    def begin(self) -> bytes:
        return b""

    def chunk(self, job: int, chunk: StreamChunk) -> bytes:
        if not (chunk.text or chunk.logprobs or chunk.finish_reason):
            return b""  # a token that is only a part of a character
        index = job * self._answer.n + chunk.index
        logprobs = "null"
        if chunk.logprobs:
            offset = self._offsets.get(index, 0)
            found = self._answer.logprobs(chunk.logprobs, offset)
            assert found is not None
            self._offsets[index] = offset + sum(map(len, found["tokens"]))
            logprobs = json.dumps(found)
        return self._events.choice(index, f'"text":{json.dumps(chunk.text)}', logprobs, chunk.finish_reason)
