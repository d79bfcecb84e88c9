"""A real server whose engine and feed a test can reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tests.server.running import MODEL, running
from tinyllm import LLM
from tinyllm.engine.llm_engine import LLMEngine
from tinyllm.server.config import ServerConfig
from tinyllm.server.engine_thread import EngineThread
from tinyllm.server.live import LiveFeed
from tinyllm.server.service import Service


@dataclass
class Served:
    """A server that runs in a thread of this process."""

    url: str
    llm: LLM
    engine: LLMEngine
    thread: EngineThread
    feed: LiveFeed

    def on_engine(self, action: Callable[[LLMEngine], Any]) -> Any:
        return self.thread.call(action).result(timeout=60)

    def clear(self) -> None:
        """Ends every request, and any pause."""
        self.thread.resume()
        self.on_engine(lambda engine: self.thread._abort_all())
        self.on_engine(lambda engine: [engine.abort(name) for name in list(engine.requests)])


@contextmanager
def serving_page(llm: LLM, **config: Any) -> Iterator[Served]:
    service = Service(llm, ServerConfig(model_name=MODEL, **config))
    with running(service) as (_, port):
        yield Served(f"http://127.0.0.1:{port}", llm, llm.engine, service.engine, service.feed)
