"""The bodies of requests, as OpenAI's API reference defines them, with tinyllm's own fields besides.

Types are checked here, values where they are used (SamplingParams and the limits of ServerConfig). Unknown fields are
refused by name: a misspelt one would otherwise be ignored in silence. A body is refused at its first few mistakes: each
of them becomes an object, and a large body can hold a million.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "EmbeddingRequest",
    "GenerationFields",
    "Message",
    "ResponseFormat",
    "StreamOptions",
    "TokenizeRequest",
]

MAX_FIELDS = 1024

T = TypeVar("T")


def _not_too_many(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_FIELDS:
        raise ValueError(f"an object of {len(value)} fields; at most {MAX_FIELDS} are allowed")
    return value


List = Annotated[list[T], Field(fail_fast=True)]
Few = Annotated[list[T], Field(max_length=MAX_FIELDS, fail_fast=True)]  # of which each step looks at all
Dict = Annotated[dict[str, T], BeforeValidator(_not_too_many)]

TokenIds = List[int]
PromptField = str | TokenIds | List[str] | List[TokenIds]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _not_too_many(cls, value: Any) -> Any:
        return _not_too_many(value)


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False  # OpenAI's padding against eavesdroppers: accepted, never sent


class JsonSchemaFormat(Body):
    name: str = ""
    description: str | None = None
    json_schema: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class _Common(Body):
    model: str | None = None
    user: str | None = None


class GenerationFields(_Common):
    """What completions and chat share. None everywhere means: as if it were not given."""

    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | List[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Dict[float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    # ---- tinyllm's own
    top_k: int | None = Field(None, description="sample among the k most likely tokens")
    min_p: float | None = Field(None, description="leave out tokens less likely than this times the likeliest")
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: Few[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    best_of: int | None = None
    beams: int | None = Field(None, description="beam search with this many beams, instead of sampling")
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    window: int | None = Field(None, description="StreamingLLM: see only so many tokens, and the sinks")
    sinks: int | None = None
    cache_salt: str | None = Field(None, description="only requests with the same salt share cached prefixes")
    priority: int | None = None
    regex: str | None = Field(None, description="the text must match this regular expression")
    grammar: str | None = Field(None, description="the text must match this grammar, in llguidance's Lark syntax")


class CompletionRequest(GenerationFields):
    prompt: PromptField
    echo: bool | None = None
    logprobs: int | None = None
    suffix: None = None


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message; fields besides role and content go to the model's template."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: str | List[TextPart] | None = None


class ChatRequest(GenerationFields):
    messages: List[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    # ---- accepted where they ask for nothing, since clients send them
    store: Literal[False] | None = None
    metadata: Dict[str] | None = None
    service_tier: Literal["auto", "default"] | None = None
    tools: list[Any] | None = Field(None, max_length=0)
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None


class EmbeddingRequest(_Common):
    input: PromptField
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    normalize: bool | None = None
    cache_salt: str | None = None
    priority: int | None = None


class TokenizeRequest(_Common):
    prompt: str | None = None
    messages: List[Message] | None = None
    add_special_tokens: bool | None = None


class DetokenizeRequest(_Common):
    tokens: TokenIds
    skip_special_tokens: bool | None = None
