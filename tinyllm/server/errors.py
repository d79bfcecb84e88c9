"""What a client is told when a request cannot be served, in the shape that OpenAI's clients read."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["ApiError", "invalid", "unavailable"]

_MAX_MESSAGE = 600  # characters; a message may quote what a client sent


class ApiError(Exception):
    """A refusal: an HTTP status, one line that says why, and OpenAI's `type`, `param` and `code`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = " ".join(message.split())[:_MAX_MESSAGE]
        self.type = type
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def to_json(self) -> bytes:
        """ASCII, so that whatever a client sent can be quoted."""
        return json.dumps(self.body()).encode("ascii")


def invalid(message: str, param: str | None = None) -> ApiError:
    """400: the request cannot be served, by anyone."""
    return ApiError(400, message, param=param)


def unavailable(message: str) -> ApiError:
    """503: not by this server, now."""
    return ApiError(503, message, type="server_error", code="unavailable", headers={"Retry-After": "5"})
