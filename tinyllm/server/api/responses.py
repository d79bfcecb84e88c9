"""The bodies of answers: their shapes for the OpenAPI document. Handlers write them as plain dicts."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

__all__ = [
    "STREAMED",
    "ChatCompletion",
    "Completion",
    "Detokenized",
    "EmbeddingList",
    "ErrorBody",
    "Health",
    "ModelList",
    "Tokenized",
]

_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}

STREAMED: dict[int | str, dict[str, Any]] = {  # what the document says of answers that may be streams
    200: {
        "description": "The answer; with `stream`, server-sent events whose data are its chunks, and at last [DONE].",
        "content": {"text/event-stream": {"itemSchema": _EVENT}},
    }
}


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ErrorDetail(_Shape):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(_Shape):
    error: ErrorDetail


class PromptTokensDetails(_Shape):
    cached_tokens: int


class Usage(_Shape):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


FinishReason = Literal["stop", "length", "abort"]


class CompletionLogprobs(_Shape):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(_Shape):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None


class Completion(_Shape):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(_Shape):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobs(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Shape):
    content: list[TokenLogprobs]
    refusal: None


class AssistantMessage(_Shape):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Shape):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None


class ChatCompletion(_Shape):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class EmbeddingUsage(_Shape):
    prompt_tokens: int
    total_tokens: int


class Embedding(_Shape):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(_Shape):
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


class Model(_Shape):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(_Shape):
    object: Literal["list"]
    data: list[Model]


class Tokenized(_Shape):
    tokens: list[int]
    count: int
    max_model_len: int


class Detokenized(_Shape):
    prompt: str


class Health(_Shape):
    status: Literal["ok", "draining", "failed"]
