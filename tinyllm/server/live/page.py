"""The page's files, as they are sent: read once, each with a tag. The server's policy lets them load nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from importlib.resources import files

__all__ = ["HEADERS", "PageFile", "page_files"]

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}

HEADERS = {
    "Cache-Control": "no-cache",  # asked for again each time, by its tag
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(frozen=True)
class PageFile:
    data: bytes
    media_type: str
    etag: str


def page_files() -> dict[str, PageFile]:
    """By name; "index.html" among them."""
    found = {}
    for entry in (files("tinyllm.server") / "page").iterdir():
        media_type = _TYPES.get(entry.name.rpartition(".")[2])
        if media_type is not None:
            data = entry.read_bytes()
            found[entry.name] = PageFile(data, media_type, f'"{blake2b(data, digest_size=12).hexdigest()}"')
    return found
