"""From the fields of a request's body to SamplingParams."""

from __future__ import annotations

from typing import Any

from tinyllm.errors import InvalidRequestError
from tinyllm.sampling_params import SamplingParams
from tinyllm.server.api.requests import GenerationFields
from tinyllm.server.config import ServerConfig
from tinyllm.server.errors import invalid
from tinyllm.structured_output import StructuredOutput

__all__ = ["check_logprobs", "sampling_params"]

_SAME_NAME = (
    *("n", "temperature", "top_p", "seed", "stop", "presence_penalty", "frequency_penalty", "top_k", "min_p"),
    *("repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos", "skip_special_tokens"),
    *("include_stop_str_in_output", "best_of", "beams", "length_penalty", "early_stopping", "window", "sinks"),
    "priority",
)


def sampling_params(
    body: GenerationFields, config: ServerConfig, *, cache_salt: str, max_tokens: int, **fields: Any
) -> SamplingParams:
    """What the body asks for.

    Args:
        cache_salt: the tenant's and the body's own together.
        fields: further fields of SamplingParams.

    Raises:
        ApiError: a value is out of its range, or beyond what this server allows.
    """
    for name in ("n", "best_of", "beams"):
        value = getattr(body, name)
        if value is not None and value > config.max_n:
            raise invalid(f"{name} is {value}; this server allows up to {config.max_n}", name)
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options is only for requests with stream", "stream_options")
    given = {name: value for name in _SAME_NAME if (value := getattr(body, name)) is not None}
    if body.logit_bias is not None:
        given["logit_bias"] = _logit_bias(body.logit_bias)
    try:
        return SamplingParams(
            **given,
            **fields,
            max_tokens=max_tokens,
            cache_salt=cache_salt,
            structured_output=_structured_output(body),
        )
    except InvalidRequestError as error:
        name = str(error).partition(" ")[0]
        raise invalid(str(error), name if name in type(body).model_fields else None) from None


def check_logprobs(name: str, value: int, config: ServerConfig) -> int:
    """Raises ApiError beyond what this server reports."""
    if not 0 <= value <= config.max_logprobs:
        raise invalid(f"{name} is {value}; this server reports from 0 to {config.max_logprobs}", name)
    return value


def _logit_bias(bias: dict[str, float]) -> dict[int, float]:
    if len(bias) > 1024:
        raise invalid(f"logit_bias has {len(bias)} tokens; at most 1024 are allowed", "logit_bias")
    found: dict[int, float] = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise invalid(f"a key of logit_bias must be a token id, not {key[:40]!r}", "logit_bias")
        found[int(key)] = value
    return found


def _structured_output(body: GenerationFields) -> StructuredOutput | None:
    """What the text must look like, where the body says so in one of its ways."""
    found: list[tuple[str, StructuredOutput]] = []
    for name in ("regex", "grammar"):
        text = getattr(body, name)
        if text is not None:
            found.append((name, StructuredOutput(name, text)))
    wanted = body.response_format
    if wanted is not None and wanted.type == "json_object":
        found.append(("response_format", StructuredOutput.json_object()))
    elif wanted is not None and wanted.type == "json_schema":
        if wanted.json_schema is None or wanted.json_schema.json_schema is None:
            raise invalid("response_format of type json_schema needs json_schema.schema", "response_format")
        schema: Any = wanted.json_schema.json_schema
        found.append(("response_format", StructuredOutput.json_schema(schema)))
    if len(found) > 1:
        raise invalid(f"only one of {' and '.join(name for name, _ in found)} may be given", found[1][0])
    return found[0][1] if found else None
