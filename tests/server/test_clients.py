"""Clients that go away, or never read: what they held is free before the next step, and the others notice nothing."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from threading import Thread
from typing import Any

import pytest

from tests.server.harness import Serving, post, reset, serving, until
from tinyllm.server import connections as server_connections

LONG = {"prompt": "Once upon a time", "max_tokens": 250, "temperature": 0, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "Tell me more"}], "max_tokens": 300, "ignore_eos": True}
LARGE = {**LONG, "n": 8, "temperature": 1, "logprobs": 20, "stream": True}  # megabytes: more than any socket holds

Leave = Callable[[socket.socket], None]


@pytest.fixture(scope="module")
def running() -> Iterator[Serving]:
    with serving() as running:
        yield running


@pytest.fixture
def server(running: Serving) -> Iterator[Serving]:
    """A server that is found unharmed after the test."""
    yield running
    running.service.engine.resume()
    running.check()


def close(sock: socket.socket) -> None:
    sock.close()


def half_close(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_WR)


def in_engine(server: Serving) -> int:
    return int(server.engine_call(lambda engine: len(engine.requests)))


def run_some_steps(server: Serving) -> None:
    """Pauses the engine with something computed of what it holds."""
    start = server.llm.engine.num_steps
    until(lambda: server.llm.engine.num_steps >= start + 3, "nothing is computed")
    server.service.engine.pause()
    assert in_engine(server) > 0
    blocks = server.llm.engine.block_manager
    assert blocks.num_free_blocks < blocks.num_blocks


@pytest.mark.parametrize("leave", [close, reset, half_close])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", LONG),
        ("/v1/completions", {**LONG, "stream": True}),
        ("/v1/completions", {**LONG, "prompt": ["One", "Two", "Three"], "n": 2, "stream": True}),
        ("/v1/completions", {**LONG, "beams": 4, "n": 2}),
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", {**CHAT, "stream": True}),
    ],
)
def test_a_client_that_leaves_frees_its_blocks_before_another_step(
    server: Serving, path: str, body: Any, leave: Leave
) -> None:
    sock = server.connect()
    sock.sendall(post(path, body))
    until(lambda: in_engine(server), "the request does not arrive")
    run_some_steps(server)
    num_steps = server.llm.engine.num_steps
    leave(sock)
    until(server.idle, "a client left, and something of its request stayed")
    assert server.llm.engine.num_steps == num_steps


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_queue_is_forgotten(server: Serving, stream: bool) -> None:
    server.service.engine.pause()
    sock = server.connect()
    sock.sendall(post("/v1/completions", {**LONG, "stream": stream}))
    until(lambda: server.service.engine.num_waiting, "the request does not arrive")
    reset(sock)
    until(server.idle, "a client left, and something of its request stayed")


def test_an_embedding_whose_client_leaves_is_given_up(server: Serving) -> None:
    server.service.engine.pause()
    sock = server.connect()
    sock.sendall(post("/v1/embeddings", {"input": ["One day", "Two days"]}))
    until(lambda: in_engine(server) == 2, "the request does not arrive")
    server.service.engine.single_step()
    reset(sock)
    until(server.idle, "a client left, and something of its request stayed")


@pytest.mark.parametrize("sent", [0, 10, 200, -1])
@pytest.mark.parametrize("leave", [close, reset])
def test_clients_that_leave_before_they_have_asked(server: Serving, sent: int, leave: Leave) -> None:
    sock = server.connect()
    sock.sendall(post("/v1/completions", LONG)[:sent])
    leave(sock)


def test_a_client_that_leaves_when_it_has_its_answer(server: Serving) -> None:
    for stream in (False, True):
        sock = server.connect()
        sock.sendall(post("/v1/completions", {**LONG, "max_tokens": 3, "stream": stream}))
        received = b""
        while not received.endswith(b"0\r\n\r\n" if stream else b"}"):
            received += sock.recv(1 << 16)
        reset(sock)


def test_the_others_get_the_same_bits_while_clients_come_and_go(server: Serving) -> None:
    params = {**LONG, "max_tokens": 60, "logprobs": 2}
    alone = server.post("/v1/completions", params).json()["choices"]
    found: list[Any] = []
    askers = [
        Thread(target=lambda: found.append(server.post("/v1/completions", params).json()["choices"])) for _ in range(3)
    ]
    for asker in askers:
        asker.start()
    for index in range(20):
        sock = server.connect()
        sock.sendall(post("/v1/completions", {**LONG, "stream": bool(index % 2)}))
        if index % 3:
            until(lambda: in_engine(server) > 3 or not any(map(Thread.is_alive, askers)), "nothing arrives")
        reset(sock)
    for asker in askers:
        asker.join()
    assert found == [alone] * 3


def test_the_stream_of_a_slow_reader_is_whole(server: Serving) -> None:
    """It takes a byte at a time for a while, and keeps nobody else waiting."""
    body = {**LONG, "max_tokens": 100, "n": 4, "temperature": 1, "logprobs": 20}
    whole = server.post("/v1/completions", body).json()["choices"]
    sock = server.connect(receive_buffer=1024)
    sock.sendall(post("/v1/completions", {**body, "stream": True}, connection="close"))
    received = b"".join(sock.recv(1) for _ in range(2000))
    server.check()
    while piece := sock.recv(1 << 16):
        received += piece
    texts = [""] * 4
    events = [line[6:] for line in unchunked(received).split(b"\n") if line.startswith(b"data: ")]
    assert events.pop() == b"[DONE]"
    for event in events:
        (choice,) = json.loads(event)["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in whole]


def unchunked(received: bytes) -> bytes:
    _, _, rest = received.partition(b"\r\n\r\n")
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return body


@pytest.mark.parametrize("stream", [False, True])
def test_a_reader_that_never_reads_holds_no_blocks_and_is_given_up(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as server:
        sock = server.connect(receive_buffer=1024)
        sock.sendall(post("/v1/completions", {**LARGE, "stream": stream}))
        until(lambda: in_engine(server), "the request does not arrive")
        server.check()  # others are served meanwhile, and the request ends whether it is read or not
        sock.close()
        until(lambda: not connections(server), "a connection stays")
        monkeypatch.setattr(server_connections, "STALL_SECONDS", 0.1)
        num_steps = server.llm.engine.num_steps
        sock = server.connect(receive_buffer=1024)
        sock.sendall(post("/v1/completions", {**LARGE, "stream": stream}))
        until(lambda: server.llm.engine.num_steps > num_steps, "the request does not arrive")
        until(lambda: not connections(server), "the connection of the reader that never reads stays")
        server.check()


def connections(server: Serving) -> list[Any]:
    """Those that are open; one that asks for nothing more is kept for some seconds."""
    return list(server.server.server_state.connections)
