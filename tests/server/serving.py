"""A real server in this process, on a port of its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tinyllm import LLM
from tinyllm.server.config import ServerConfig
from tinyllm.server.run import bind, make_server
from tinyllm.server.service import Service

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@dataclass
class Server:
    base_url: str
    service: Service
    llm: LLM
    reference: LLM


def make_llm(**options: Any) -> LLM:
    llm = LLM("tales-4m", device=os.environ.get("TINYLLM_TEST_DEVICE", "cpu"), **options)
    assert llm.tokenizer is not None
    llm.tokenizer.chat_template = TEMPLATE
    return llm


@contextmanager
def serving(config: ServerConfig | None = None, **options: Any) -> Iterator[Server]:
    llm = make_llm(**options)
    service = Service(llm, config or ServerConfig(model_name="tales-4m"))
    sock = bind("127.0.0.1", 0)
    server = make_server(service)
    thread = threading.Thread(target=lambda: server.run(sockets=[sock]))
    thread.start()
    while not server.started and thread.is_alive():
        thread.join(0.01)
    try:
        yield Server(f"http://127.0.0.1:{sock.getsockname()[1]}", service, llm, make_llm())
    finally:
        server.should_exit = True
        thread.join()
