"""A real server in this process, on a free port, over the small model that comes with tinyllm; and raw bytes for it."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import httpx
import uvicorn

from tests.server.running import MODEL, PATIENCE, give_template, running
from tinyllm.engine.llm_engine import LLMEngine
from tinyllm.llm import LLM
from tinyllm.sampling_params import SamplingParams
from tinyllm.server.config import ServerConfig
from tinyllm.server.service import Service

__all__ = ["Serving", "http", "post", "reset", "serving", "until"]

PROBE = {"prompt": "Once upon a time there was a", "max_tokens": 6, "temperature": 0, "logprobs": 3}

_ENGINE = {"num_blocks": 192, "max_num_seqs": 32, "num_threads": 1, "device": "cpu", "debug_checks": True}


@dataclass
class Serving:
    """A server that runs.

    Attributes:
        expected: the probe's tokens and log-probabilities, as `LLM.generate` gave them before the server began.
    """

    service: Service
    server: uvicorn.Server
    port: int
    expected: tuple[list[str], list[float]]
    sockets: list[socket.socket] = field(default_factory=list)

    @property
    def llm(self) -> LLM:
        return self.service.llm

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.base_url, timeout=PATIENCE, verify=False, **options)

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        """A request by itself. A body that is not bytes is sent as JSON, in Python's dialect: NaN, lone surrogates."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        with self.client() as client:
            return client.post(path, content=content, headers=_headers(headers))

    def connect(self, *, receive_buffer: int | None = None) -> socket.socket:
        """A connection without a client; closed at the end of the server, if not before."""
        sock = socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.settimeout(PATIENCE)
        sock.connect(("127.0.0.1", self.port))
        self.sockets.append(sock)
        return sock

    def exchange(self, data: bytes) -> bytes:
        """What comes back for these bytes, up to where the server closes the connection."""
        sock = self.connect()
        received = b""
        try:
            sock.sendall(data)
            while piece := sock.recv(1 << 16):
                received += piece
        except ConnectionError:  # closed with some of what was sent unread
            pass
        finally:
            sock.close()
        return received

    # ---- what the engine holds

    def engine_call(self, action: Callable[[LLMEngine], Any]) -> Any:
        return self.service.engine.call(action).result(PATIENCE)

    def idle(self) -> bool:
        """Whether nothing is left of any request; blocks and tables agree in any case."""

        def look(engine: LLMEngine) -> bool:
            engine.check_invariants()
            blocks = engine.block_manager
            return not engine.requests and blocks.num_free_blocks == blocks.num_blocks

        return self.engine_call(look) and self.service.engine.num_waiting == self.service.engine.num_running == 0

    def check(self, **headers: str) -> None:
        """Asserts that the server comes to rest, and that it serves the probe with the right bits."""
        until(self.idle, "the server does not come to rest")
        answer = self.post("/v1/completions", PROBE, **headers)
        assert answer.status_code == 200, answer.text
        logprobs = answer.json()["choices"][0]["logprobs"]
        assert (logprobs["tokens"], logprobs["token_logprobs"]) == self.expected


@contextmanager
def serving(**options: Any) -> Iterator[Serving]:
    """A server that answers. options: fields of ServerConfig and of EngineConfig."""
    names = {one.name for one in fields(ServerConfig)}
    config = ServerConfig(**{"model_name": MODEL, **{k: v for k, v in options.items() if k in names}})
    llm = give_template(LLM(MODEL, **{**_ENGINE, **{k: v for k, v in options.items() if k not in names}}))
    expected = _expected(llm)
    service = Service(llm, config)
    with running(service) as (server, port):
        served = Serving(service, server, port, expected)
        try:
            yield served
        finally:
            for one in served.sockets:
                one.close()


def _expected(llm: LLM) -> tuple[list[str], list[float]]:
    params = SamplingParams(max_tokens=PROBE["max_tokens"], temperature=0, logprobs=PROBE["logprobs"])  # type: ignore[arg-type]
    one = llm.generate([str(PROBE["prompt"])], params)[0].outputs[0]
    assert one.logprobs is not None
    chosen = [next(iter(entry.values())) for entry in one.logprobs]
    return [entry.decoded_token or "" for entry in chosen], [entry.logprob for entry in chosen]


def until(condition: Callable[[], Any], failure: str) -> None:
    """Waits for a condition."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, failure
        time.sleep(0.002)


def http(method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    """The bytes of a request. headers: names with _ for -; content_length is right unless given; "" leaves one out."""
    found = _headers({"host": "127.0.0.1", "content_length": str(len(body)), **headers})
    lines = [f"{name}: {value}" for name, value in found.items() if value != ""]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode("latin-1") + body


def post(path: str, body: Any, **headers: str) -> bytes:
    return http("POST", path, json.dumps(body).encode(), **headers)


def _headers(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in {"content_type": "application/json", **headers}.items()}


def reset(sock: socket.socket) -> None:
    """Closes a connection as a process does that is killed: with a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
