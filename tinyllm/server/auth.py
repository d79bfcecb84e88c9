"""Who may use a server, and what keeps the cached prefixes of one key from another."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from tinyllm.server.errors import ApiError, invalid

__all__ = ["Caller", "caller_of"]

MAX_SALT_LENGTH = 1024

_bearer = HTTPBearer(auto_error=False, description="one of the server's API keys, where it has any")


@dataclass(frozen=True)
class Caller:
    """Who sent a request; `tenant` is "" on a server without keys."""

    tenant: str = ""

    def cache_salt(self, salt: str | None) -> str:
        """The salt for the prefix cache: no two keys share any, whatever their requests say. Raises ApiError."""
        if salt is not None and len(salt) > MAX_SALT_LENGTH:
            raise invalid(f"cache_salt has {len(salt)} characters; at most {MAX_SALT_LENGTH} are allowed", "cache_salt")
        return f"{self.tenant}:{salt or ''}" if self.tenant else salt or ""


def caller_of(api_keys: Sequence[str]) -> Callable[..., Awaitable[Caller]]:
    """A dependency that lets in whoever has one of the keys; without keys, everyone. Raises ApiError 401."""
    digests = [hashlib.sha256(key.encode()).digest() for key in api_keys]

    async def caller(credentials: HTTPAuthorizationCredentials | None = Depends(_bearer)) -> Caller:
        if not digests:
            return Caller()
        given = b"" if credentials is None else credentials.credentials.encode("utf-8", "surrogateescape")
        digest = hashlib.sha256(given).digest()
        matches = [hmac.compare_digest(digest, known) for known in digests]  # all of them: time tells nothing
        if not any(matches):
            what = "no API key was given" if credentials is None else "the API key is wrong"
            raise ApiError(
                401,
                f"{what}; send it as 'Authorization: Bearer <key>'",
                type="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return Caller(digest.hex()[:32])

    return caller
