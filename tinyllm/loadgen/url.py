"""Where a server is."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from tinyllm.loadgen.errors import LoadError

__all__ = ["ServerURL"]


@dataclass(frozen=True)
class ServerURL:
    """The parts of an http or https URL. `path` is what stands before /v1: "" or such as "/proxy"."""

    scheme: str
    host: str
    port: int
    path: str

    @classmethod
    def parse(cls, text: str) -> ServerURL:
        """With or without /v1 at its end. Raises LoadError."""
        try:
            parts = urlsplit(text)
            port, host = parts.port, parts.hostname
        except ValueError as error:
            raise LoadError(f"{text!r} is no URL: {error}") from None
        if parts.scheme not in ("http", "https") or not host:
            raise LoadError(f"a server's URL is such as http://127.0.0.1:8000, not {text!r}")
        if parts.username is not None or parts.query or parts.fragment:
            raise LoadError("a server's URL has no user name, query or fragment; a key goes to --api-key")
        if not all(33 <= ord(char) < 127 for char in host + parts.path):
            raise LoadError(f"{text!r} has characters that must be written in ASCII")
        path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
        return cls(parts.scheme, host, (443 if parts.scheme == "https" else 80) if port is None else port, path)

    @property
    def netloc(self) -> str:
        """What the Host header says."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.scheme == "https" else 80) else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.netloc}{self.path}"
