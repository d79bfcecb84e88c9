"""How a request over HTTP can fail; and the error that ends a run."""

from __future__ import annotations

from tinyllm.errors import TinyLLMError

__all__ = ["HTTPError", "LoadError"]


class LoadError(TinyLLMError):
    """A run that cannot be: a server that does not answer or refuses, bad lengths, rates or prompts."""


class HTTPError(Exception):
    """One exchange failed.

    Attributes:
        kind: what reports count it under: "connect", "disconnected", "timeout" or "protocol".
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
