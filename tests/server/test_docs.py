"""The API's description, and the page that shows it: from files of the server's own."""

from __future__ import annotations

import json
import re
import urllib.request

from tests.server.serving import serving


def test_the_description_lists_every_path_and_the_page_loads_nothing_from_elsewhere() -> None:
    with serving() as server:

        def get(path: str) -> tuple[str, bytes]:
            with urllib.request.urlopen(server.base_url + path) as answer:
                assert "default-src 'self'" in answer.headers["content-security-policy"]
                return answer.headers["content-type"], answer.read()

        described = json.loads(get("/openapi.json")[1])
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize", "/detokenize"):
            assert "post" in described["paths"][path]
        for path in ("/v1/models", "/health", "/metrics"):
            assert "get" in described["paths"][path]
        fields = described["components"]["schemas"]["ChatRequest"]["properties"]
        assert {"messages", "top_k", "beams", "window", "sinks", "cache_salt", "priority", "regex"} <= fields.keys()
        page = get("/docs")[1].decode()
        assert not re.search(r"(src|href)=\"https?:", page)
        for name, kind in (("swagger-ui-bundle.js", "javascript"), ("swagger-ui.css", "css")):
            assert f"/docs/files/{name}" in page
            content_type, body = get(f"/docs/files/{name}")
            assert kind in content_type and len(body) > 100_000
