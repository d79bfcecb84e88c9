"""Runs a service's real server in a thread of this process, on a port of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from tinyllm.llm import LLM
from tinyllm.server.run import bind, make_server
from tinyllm.server.service import Service

__all__ = ["CHAT_TEMPLATE", "MODEL", "PATIENCE", "give_template", "running"]

MODEL = "tales-4m"
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
PATIENCE = 60.0  # seconds; keeps a broken run from hanging, and is no bound on speed


def give_template(llm: LLM) -> LLM:
    """The bundled model has no chat template of its own."""
    assert llm.tokenizer is not None
    llm.tokenizer.chat_template = CHAT_TEMPLATE
    return llm


@contextmanager
def running(service: Service) -> Iterator[tuple[uvicorn.Server, int]]:
    """The server, and the port where it answers."""
    sock = bind("127.0.0.1", 0)
    server = make_server(service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, name="server")
    thread.start()
    try:
        while not server.started and thread.is_alive():
            thread.join(0.01)
        assert server.started, "the server does not start"
        yield server, sock.getsockname()[1]
    finally:
        service.engine.resume()
        service.feed.close()
        server.should_exit = True
        thread.join(PATIENCE)
        sock.close()
        assert not thread.is_alive(), "the server does not end"
