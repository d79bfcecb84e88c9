"""What a server allows: frozen, and validated where it enters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tinyllm.errors import ConfigError

__all__ = ["ServerConfig"]

MIN_KEY_LENGTH = 8


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Limits of one server; what a request asks beyond them is refused by name.

    Attributes:
        model_name: what clients call the model.
        api_keys: one of these is demanded in `Authorization: Bearer`; none means that everyone is served.
        allowed_hosts: what clients may call this host; None means anything. A page that lets its own name lead to this
            machine (DNS rebinding) could read answers otherwise.
        max_waiting: requests that may wait for a place; one more is answered with 429 and Retry-After.
        max_body_nbytes: the largest request body.
        body_seconds: how long a client may take to send its body.
        max_prompt_tokens: the longest prompt; None means what the model's context holds.
        max_prompts: the most prompts in one request for completions or embeddings.
        max_n: the most continuations of one prompt, best_of and beams included.
        max_logprobs: the most likely tokens that may be reported at each position.
        drain_seconds: after a signal to stop, how long running requests may take to finish.
        compile_seconds: how long the grammar of a structured output may take to compile.
    """

    model_name: str
    api_keys: Sequence[str] = ()
    allowed_hosts: Sequence[str] | None = None
    max_waiting: int = 256
    max_body_nbytes: int = 2 << 20
    body_seconds: float = 30.0
    max_prompt_tokens: int | None = None
    max_prompts: int = 64
    max_n: int = 16
    max_logprobs: int = 20
    drain_seconds: float = 30.0
    compile_seconds: float = 10.0

    def __post_init__(self) -> None:
        if not self.model_name or not self.model_name.isprintable():
            raise ConfigError(f"the model's name must be printable and not empty, not {self.model_name!r}")
        object.__setattr__(self, "api_keys", tuple(self.api_keys))
        for key in self.api_keys:
            if len(key) < MIN_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError(f"an API key needs {MIN_KEY_LENGTH} or more printable ASCII characters and no space")
        for name in ("max_waiting", "max_body_nbytes", "max_prompt_tokens", "max_prompts", "max_n"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and 1 <= value < 1 << 40):
                raise ConfigError(f"{name} must be a positive integer, not {value!r}")
        if not (isinstance(self.max_logprobs, int) and 0 <= self.max_logprobs < 1 << 20):
            raise ConfigError(f"max_logprobs must be 0 or more, not {self.max_logprobs!r}")
        for name in ("body_seconds", "drain_seconds", "compile_seconds"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} must be a number of seconds, not {value!r}")
