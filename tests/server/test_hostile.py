"""Bytes that no honest client sends: each is refused in the one error shape, and the server goes on as before."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.harness import PATIENCE, Serving, http, post, serving, until
from tinyllm.server import connections

MAX_BODY = 100_000
GENERATE = {"prompt": "One day", "max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def running() -> Iterator[Serving]:
    with serving(max_body_nbytes=MAX_BODY, body_seconds=0.5) as running:
        yield running


@pytest.fixture
def server(running: Serving) -> Iterator[Serving]:
    """A server that is found unharmed after the test."""
    yield running
    running.check()


def answers(received: bytes) -> list[tuple[int, Any]]:
    """Status and JSON of each answer in what a connection brought; answers here have a Content-Length."""
    found = []
    while received:
        head, _, rest = received.partition(b"\r\n\r\n")
        lines = head.decode().lower().split("\r\n")
        size = next(int(line.split(":")[1]) for line in lines if line.startswith("content-length:"))
        found.append((int(lines[0].split()[1]), json.loads(rest[:size])))
        received = rest[size:]
    return found


def refusal(received: bytes) -> int:
    """The status of the one answer, which is a refusal in the error shape."""
    ((status, body),) = answers(received)
    assert_error(status, body)
    return status


def assert_error(status: int, body: Any) -> None:
    assert 400 <= status < 500 or status == 503, (status, body)
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert "\n" not in body["error"]["message"]
    assert len(body["error"]["message"]) <= 600


# ---- framing


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n\x00",
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: a\r\n folded: b\r\n\x00: c\r\n\r\n",
        http("POST", "/v1/completions", b"{}", content_length="-1"),
        http("POST", "/v1/completions", b"{}", content_length="2x"),
        http("POST", "/v1/completions", b"{}", content_length="9" * 40),
        http("POST", "/v1/completions", b"2\r\n{}\r\n0\r\n\r\n", transfer_encoding="chunked"),  # with a Content-Length
        http("POST", "/v1/completions", b"zz\r\n{}\r\n", content_length="", transfer_encoding="chunked"),
        http("POST", "/v1/completions", b"f" * 40 + b"\r\n{}", content_length="", transfer_encoding="chunked"),
    ],
)
def test_what_is_not_http_is_refused_and_closed(server: Serving, data: bytes) -> None:
    received = server.exchange(data)
    if received:  # else it was reset with bytes of ours unread
        assert refusal(received) in (400, 408, 413)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n" + b"a: " + b"b" * (4 << 20),
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * (1 << 19),
        b"GET /" + b"a" * (4 << 20),
        b"GET / HTTP/1.1\r\n" + b"a" * (4 << 20),
        http("POST", "/tokenize", b"{}", x_pad="a" * (4 << 20)),
    ],
)
def test_giant_heads_are_refused_before_they_end(server: Serving, data: bytes) -> None:
    received = server.exchange(data)
    if received:
        assert refusal(received) in (400, 431)


def test_trailers_and_chunk_sizes_are_bounded(server: Serving) -> None:
    begin = http("POST", "/tokenize", content_length="", transfer_encoding="chunked")
    trailers = begin + b"2\r\n{}\r\n0\r\n" + b"a: b\r\n" * (1 << 19) + b"\r\n"
    extensions = begin + b"2;" + b"a" * (4 << 20) + b"\r\n{}\r\n0\r\n\r\n"
    for data in (trailers, extensions):
        assert server.exchange(data) == b""  # cut off: not even its end is waited for, to refuse it


def test_chunked_bodies_are_served_up_to_the_limit(server: Serving) -> None:
    body = json.dumps({"prompt": "a"}).encode()
    begin = http("POST", "/tokenize", content_length="", transfer_encoding="chunked", connection="close")
    chunked = b"".join(b"1\r\n%c\r\n" % one for one in body) + b"0\r\n\r\n"
    ((status, found),) = answers(server.exchange(begin + chunked))
    assert status == 200
    assert found["count"] >= 1
    received = server.exchange(begin + (b"1000\r\n" + b" " * 0x1000 + b"\r\n") * (2 * MAX_BODY // 0x1000))
    if received:
        assert refusal(received) == 413


def test_bodies_that_are_too_large_are_refused_by_their_length(server: Serving) -> None:
    received = server.exchange(http("POST", "/tokenize", content_length=str(MAX_BODY + 1)))
    assert refusal(received) == 413
    fits = b'{"prompt": "a"}'.ljust(MAX_BODY)
    assert server.post("/tokenize", fits).status_code == 200
    assert server.post("/tokenize", fits + b" ").status_code == 413


@pytest.mark.parametrize("sent", [b"", b'{"prompt": '])
def test_bodies_that_do_not_arrive_are_given_up(server: Serving, sent: bytes) -> None:
    data = http("POST", "/v1/completions", sent, content_length="1000")
    assert refusal(server.exchange(data)) == 408


def test_bodies_that_trickle_are_given_up(server: Serving) -> None:
    sock = server.connect()
    sock.sendall(http("POST", "/v1/completions", content_length="1000"))
    sock.settimeout(0.02)
    received = b""
    deadline = time.monotonic() + PATIENCE
    while not received and time.monotonic() < deadline:
        try:
            sock.sendall(b" ")
            received = sock.recv(1 << 16)
        except TimeoutError:
            continue
    assert refusal(received) == 408


def test_a_length_that_is_too_short_ends_the_request_there(server: Serving) -> None:
    """What follows it is read as a next request, and is none."""
    body = json.dumps(GENERATE).encode()
    data = http("POST", "/v1/completions", body, content_length=str(len(body) - 1))
    found = answers(server.exchange(data))
    assert [status for status, _ in found][:1] in ([400], [])


def test_requests_in_one_piece_are_answered_in_order(server: Serving) -> None:
    prompts = ["One", "Two days", "Three days ago"]
    data = b"".join(post("/tokenize", {"prompt": prompt}) for prompt in prompts)
    data += post("/v1/completions", GENERATE) + http("GET", "/health", connection="close")
    found = answers(server.exchange(data))
    assert [status for status, _ in found] == [200] * 5
    expected = [server.post("/tokenize", {"prompt": prompt}).json() for prompt in prompts]
    assert [body for _, body in found[:3]] == expected
    assert found[3][1]["object"] == "text_completion"
    assert found[4][1] == {"status": "ok"}


def test_a_hundred_pipelined_requests_and_a_close(server: Serving) -> None:
    sock = server.connect()
    sock.sendall(post("/v1/completions", GENERATE) * 100)
    sock.close()


def test_odd_paths_and_methods_are_refused(server: Serving) -> None:
    for method, path, expected in [
        ("GET", "/no/such", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/docs/files/%2e%2e/%2e%2e/setup.py", 404),
        ("GET", "/%ff%fe%00", 404),
        ("GET", "/v1/models/%ed%a0%80", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("BREW", "/v1/chat/completions", 400),  # no method of HTTP
        ("CONNECT", "example.com:443", 400),
        ("POST", "*", 404),
    ]:
        received = server.exchange(http(method, path, connection="close"))
        assert refusal(received) == expected, (method, path)


def test_an_upgrade_is_not_followed(server: Serving) -> None:
    data = http("GET", "/health", connection="Upgrade", upgrade="websocket", sec_websocket_key="a", content_length="")
    sock = server.connect()
    sock.sendall(data)
    assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200")
    sock.close()


# ---- JSON


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"3",
        b'"text"',
        b"\xff\xfe{}",
        b'{"prompt": "\xed\xa0\x80"}',
        b"[" * 90_000,
        b'{"prompt":' * 9_000,
        b'{"messages": [{"role": "user", "content": "a", "x": ' + b"[" * 900 + b"]" * 900 + b"}]}",
        b'{"prompt": "a", "x": ' + b"9" * 90_000 + b"}",
        b'{"prompt": [' + b"9" * 4000 + b"]}",
        b'{"prompt": "a", "max_tokens": 1e999}',
        b'{"prompt": "a", "' + b"n" * 90_000 + b'": 1}',
    ],
)
def test_bodies_that_mean_nothing_are_refused(server: Serving, path: str, body: bytes) -> None:
    answer = server.post(path, body)
    assert_error(answer.status_code, answer.json())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", '{"prompt": [' + "null," * 15_000 + "null]}"),
        ("/v1/completions", '{"prompt": [' + "[[]]," * 15_000 + "0]}"),
        ("/v1/completions", '{"prompt": "a", ' + ", ".join(f'"{i}": 1' for i in range(8_000)) + "}"),
        ("/v1/completions", '{"prompt": "a", "stop": [' + "0," * 15_000 + "0]}"),
        ("/v1/completions", '{"prompt": "a", "stop_token_ids": [' + "{}," * 15_000 + "0]}"),
        ("/v1/completions", '{"prompt": "a", "logit_bias": {' + ", ".join(f'"{i}": ""' for i in range(8_000)) + "}}"),
        ("/v1/chat/completions", '{"messages": [' + "0," * 15_000 + "0]}"),
        ("/v1/chat/completions", '{"messages": [{"role": "u", "content": [' + "0," * 15_000 + "0]}]}"),
        ("/v1/embeddings", '{"input": [' + "null," * 15_000 + "null]}"),
        ("/detokenize", '{"tokens": [' + "null," * 15_000 + "null]}"),
    ],
)
def test_a_body_of_many_mistakes_costs_no_more_than_one(
    server: Serving, path: str, body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each mistake would become an object, for every member of a union: gigabytes of them for one large body."""
    from fastapi.exceptions import RequestValidationError

    counts: list[int] = []
    init = RequestValidationError.__init__

    def spy(self: Any, errors: Any, **rest: Any) -> None:
        counts.append(len(list(errors)))
        init(self, errors, **rest)

    monkeypatch.setattr(RequestValidationError, "__init__", spy)
    answer = server.post(path, body.encode())
    assert_error(answer.status_code, answer.json())
    assert counts
    assert max(counts) < 100


def test_lists_that_each_step_would_search_are_short(server: Serving) -> None:
    for name, value in (("stop_token_ids", [1] * 15_000), ("stop", ["a"] * 15_000)):
        answer = server.post("/v1/completions", {**GENERATE, name: value})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == name


def test_of_duplicate_keys_the_last_one_counts(server: Serving) -> None:
    answer = server.post("/tokenize", b'{"prompt": "One", "prompt": 3, "prompt": "Two days"}')
    assert answer.json() == server.post("/tokenize", {"prompt": "Two days"}).json()


def test_another_content_type_is_refused(server: Serving) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a"):
        answer = server.post("/tokenize", b'{"prompt": "a"}', content_type=kind)
        assert_error(answer.status_code, answer.json())


# ---- connections


def test_connections_that_are_opened_and_left_are_in_nobodys_way(server: Serving) -> None:
    for index in range(200):
        sock = server.connect()
        if index % 3:
            sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost"[: index % 30])
    server.check()


def test_half_a_head_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.2)
    with serving() as server:
        silent, partial = server.connect(), server.connect()
        partial.sendall(b"GET /health HTTP/1.1\r\nhost: a\r\n")
        assert silent.recv(100) == partial.recv(100) == b""  # closed from the other side
        until(lambda: not server.server.server_state.connections, "connections are left")
        server.check()
