"""A real server, and a model of the same kind beside it that says what its answers should be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tests.server.running import MODEL, give_template, running
from tinyllm import LLM
from tinyllm.server.config import ServerConfig
from tinyllm.server.service import Service


@dataclass
class Server:
    base_url: str
    service: Service
    llm: LLM
    reference: LLM


def make_llm(**options: Any) -> LLM:
    return give_template(LLM(MODEL, device=os.environ.get("TINYLLM_TEST_DEVICE", "cpu"), **options))


@contextmanager
def serving(config: ServerConfig | None = None, **options: Any) -> Iterator[Server]:
    llm = make_llm(**options)
    service = Service(llm, config or ServerConfig(model_name=MODEL))
    with running(service) as (_, port):
        yield Server(f"http://127.0.0.1:{port}", service, llm, make_llm())
