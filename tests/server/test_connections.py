"""Connections that never become requests."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.server.serving import Server, serving
from tinyllm.server import connections


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def connect(server: Server) -> socket.socket:
    host, port = server.base_url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def read_to_the_end(connection: socket.socket) -> bytes:
    found = b""
    while data := connection.recv(65536):
        found += data
    return found


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\n"])
def test_one_that_says_nothing_or_half_is_closed(server: Server, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.1)
    with connect(server) as connection:
        connection.sendall(sent)
        assert read_to_the_end(connection) == b""


def test_the_second_request_of_a_connection_has_its_time_too(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)
    request = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with connect(server) as connection:
        connection.sendall(request + request[:20])
        assert read_to_the_end(connection).count(b"200 OK") == 1


def test_a_request_whose_answer_takes_longer_is_not_closed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.05)
    body = b'{"prompt": "Once", "max_tokens": 300, "ignore_eos": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    with connect(server) as connection:
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert b"200 OK" in read_to_the_end(connection)


def test_a_head_without_end_is_refused(server: Server) -> None:
    with connect(server) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        line = b"X-More: " + b"y" * 10_000 + b"\r\n"
        with pytest.raises(ConnectionError):
            connection.sendall(line * 6400)  # 64 MB, more than any socket's buffer
