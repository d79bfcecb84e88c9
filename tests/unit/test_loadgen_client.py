"""The load generator over HTTP: good servers, bad ones, and none."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from tests.unit.fake_openai import DONE, Connection, FakeServer, Request, chunk, event, stream, usage
from tinyllm.loadgen.driver import run_closed_loop, run_open_loop
from tinyllm.loadgen.errors import LoadError
from tinyllm.loadgen.http_client import HTTPClient
from tinyllm.loadgen.measurements import Measurements
from tinyllm.loadgen.openai_client import OpenAIClient, RequestSettings, _retry_after, list_models
from tinyllm.loadgen.record import INTERRUPTED, RequestRecord
from tinyllm.loadgen.statistics import Goodput
from tinyllm.loadgen.url import ServerURL
from tinyllm.loadgen.workload import PlannedRequest

Action = Callable[[OpenAIClient, HTTPClient], Awaitable[Any]]


def with_client(url: str, action: Action, **settings: Any) -> list[RequestRecord]:
    """Runs it, and gives the records it made."""
    records: list[RequestRecord] = []

    async def run() -> None:
        http = HTTPClient(ServerURL.parse(url), api_key=settings.pop("key", None))
        try:
            await action(OpenAIClient(http, RequestSettings("fake", **settings), records.append), http)
        finally:
            http.close()

    asyncio.run(asyncio.wait_for(run(), 120))
    return records


def planned(count: int, tokens: int = 3) -> list[PlannedRequest]:
    return [PlannedRequest(index, 0.0, [1, 2, 3, index], tokens) for index in range(count)]


def send(url: str, count: int = 1, **settings: Any) -> list[RequestRecord]:
    """One request after another."""

    async def action(client: OpenAIClient, http: HTTPClient) -> None:
        for request in planned(count):
            await client.send(request, client.prepare(request), 0.0)

    return with_client(url, action, **settings)


def test_a_request_and_its_figures() -> None:
    with FakeServer() as server:
        (record,) = send(server.url + "/v1")
    (request,) = server.completions
    assert (request.method, request.path) == ("POST", "/v1/completions")
    assert request.body == {
        "model": "fake",
        "prompt": [1, 2, 3, 0],
        "max_tokens": 3,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    assert request.headers["host"] == server.url.removeprefix("http://")
    assert "authorization" not in request.headers
    assert (record.error, record.prompt_tokens, record.output_tokens, len(record.times)) == (None, 4, 3, 3)
    assert record.sent <= record.times[0] <= record.times[1] <= record.times[2] <= (record.end or 0)


def test_chats_and_further_fields() -> None:
    async def action(client: OpenAIClient, http: HTTPClient) -> None:
        messages = [{"role": "system", "content": "x"}]
        for prompt in ("Hello", messages):
            request = PlannedRequest(0, 0.0, prompt, 2)
            await client.send(request, client.prepare(request), 0.0)

    with FakeServer(key="abc") as server:
        records = with_client(
            server.url, action, chat=True, ignore_eos=False, extra_body={"top_k": 5, "temperature": 1}, key="abc"
        )
    assert [(record.error, len(record.times)) for record in records] == [(None, 2)] * 2
    first, second = (request.body for request in server.completions)
    assert first["messages"] == [{"role": "user", "content": "Hello"}]
    assert second["messages"] == [{"role": "system", "content": "x"}]
    assert (first["top_k"], first["temperature"]) == (5, 1)
    assert "prompt" not in first and "ignore_eos" not in first
    assert {request.path for request in server.completions} == {"/v1/chat/completions"}


def test_connections_are_used_again() -> None:
    with FakeServer() as server:
        assert [record.error for record in send(server.url, 5)] == [None] * 5
        assert server.connections == 1


def test_a_kept_connection_that_the_server_closed_is_made_anew() -> None:
    async def script(request: Request, connection: Connection) -> None:
        if request.number == 1:  # as a server that tires of waiting, in the moment when the request comes
            connection.close()
        else:
            await stream(request, connection)

    with FakeServer(script) as server:
        assert [record.error for record in send(server.url, 2)] == [None, None]
        assert len(server.completions) == 3


def test_answers_in_every_form_of_http() -> None:
    body = chunk("a") + chunk("b", "stop") + usage(4, 2) + DONE
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"

    async def script(request: Request, connection: Connection) -> None:
        if request.number == 0:
            await connection.raw(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        elif request.number == 1:  # up to the end of the connection
            await connection.raw(head + b"Connection: close\r\n\r\n" + body)
            connection.close()
        elif request.number == 2:
            await connection.raw(b"HTTP/1.1 100 Continue\r\n\r\n" + head + b"Transfer-Encoding: chunked\r\n\r\n")
            for byte in body:
                await connection.part(bytes([byte]))
            await connection.end()
        elif request.number == 3:
            await connection.raw(head.replace(b"1.1", b"1.0") + b"\r\n" + body)
            connection.close()
        else:
            await connection.raw(head + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n")
            await connection.part(body)
            await connection.end()

    with FakeServer(script) as server:
        records = send(server.url, 6)
    assert [(r.error, r.message, r.output_tokens, len(r.times)) for r in records] == [(None, "", 2, 2)] * 6


async def _mistake(request: Request, connection: Connection) -> None:
    await connection.json(400, {"error": {"message": "no such field"}})


async def _nonsense(request: Request, connection: Connection) -> None:
    await connection.raw(b"SMTP 220 hello\r\n\r\n")


async def _bad_chunk(request: Request, connection: Connection) -> None:
    await connection.head()
    await connection.part(chunk("a"))
    await connection.raw(b"zz\r\nabc")


async def _endless_head(request: Request, connection: Connection) -> None:
    await connection.raw(b"HTTP/1.1 200 OK\r\n")
    while True:
        await connection.raw(b"X-Y: " + b"z" * 1000 + b"\r\n")


async def _gone_at_once(request: Request, connection: Connection) -> None:
    connection.close()


async def _gone_in_the_middle(request: Request, connection: Connection) -> None:
    await connection.head()
    await connection.part(chunk("a"))
    connection.close()


async def _reset(request: Request, connection: Connection) -> None:
    await connection.head()
    await connection.part(chunk("a"))
    connection.reset()


async def _error_event(request: Request, connection: Connection) -> None:
    await connection.head()
    await connection.part(chunk("a") + event({"error": {"message": "out of blocks"}}))
    await connection.part(chunk("b"))
    await connection.end()


async def _bad_json(request: Request, connection: Connection) -> None:
    await connection.head()
    await connection.part(b"data: {]\n\n")
    await connection.end()


async def _no_end(request: Request, connection: Connection) -> None:
    await connection.head()
    await connection.part(chunk("a") + usage(4, 1))
    await connection.end()


async def _no_stream(request: Request, connection: Connection) -> None:
    await connection.json(200, {"choices": [{"text": "a"}]})


async def _silence(request: Request, connection: Connection) -> None:
    await connection.head()
    await connection.part(chunk("a"))
    await asyncio.sleep(600)


@pytest.mark.parametrize(
    ("script", "kind", "message"),
    [
        (_mistake, "HTTP 400", "no such field"),
        (_nonsense, "protocol", "malformed"),
        (_bad_chunk, "protocol", "malformed"),
        (_endless_head, "protocol", "head is larger"),
        (_gone_at_once, "disconnected", "before it answered"),
        (_gone_in_the_middle, "disconnected", "in the middle"),
        (_reset, "disconnected", "closed the connection"),
        (_error_event, "error event", "out of blocks"),
        (_bad_json, "protocol", "not valid JSON"),
        (_no_end, "incomplete", "[DONE]"),
        (_no_stream, "protocol", "application/json"),
        (_silence, "timeout", "within 0.5 s"),
    ],
)
def test_servers_that_fail(script: Any, kind: str, message: str) -> None:
    async def once(request: Request, connection: Connection) -> None:
        await (script if request.number == 0 else stream)(request, connection)

    with FakeServer(once) as server:
        records = send(server.url, 1, timeout=0.5) if script is _silence else send(server.url, 2)
    assert records[0].error == kind
    assert message in records[0].message
    assert (records[0].e2el, records[0].tpot) == (None, None)
    assert all(record.error is None for record in records[1:])  # the next one is well


def test_refusals_are_counted_and_sent_again() -> None:
    async def script(request: Request, connection: Connection) -> None:
        if request.number % 3 < 2:
            await connection.json(429, {"error": {"message": "full"}}, Retry_After="0")
        else:
            await stream(request, connection)

    with FakeServer(script) as server:
        records = send(server.url, 2, retries=2)
        assert [(record.error, record.refusals) for record in records] == [(None, 2)] * 2
        records = send(server.url, 1, retries=1)
        assert [(r.error, r.refusals, r.message) for r in records] == [("HTTP 429", 2, "full")]
        records = send(server.url, 1)
    assert [(r.error, r.refusals) for r in records] == [(None, 0)]


def test_how_long_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_760_000_000.0)
    assert _retry_after("3") == 3.0
    assert _retry_after("0.5") == 0.5
    assert _retry_after(formatdate(1_760_000_007, usegmt=True)) == 7.0
    assert _retry_after(formatdate(1_750_000_000, usegmt=True)) == 0.0
    assert _retry_after("-5") == 0.0
    assert _retry_after("1e9") == 600.0
    for nonsense in ("", "soon", "nan", "inf"):
        assert _retry_after(nonsense) == 1.0


def test_nobody_is_there() -> None:
    with FakeServer() as server:
        url = server.url
    (record,) = send(url)
    assert (record.error, record.end, len(record.times)) == ("connect", None, 0)
    assert "connection refused" in record.message


def test_models() -> None:
    names: list[list[str]] = []

    async def action(client: OpenAIClient, http: HTTPClient) -> None:
        names.append(await list_models(http))

    with FakeServer(key="abc") as server:
        with_client(server.url, action, key="abc")
        assert names == [["fake", "other"]]
        with pytest.raises(LoadError, match=r"401.*api-key.*no such key"):
            with_client(server.url, action)
        for wrong in ([], {"data": []}, {"data": [{"id": 3}]}, {"data": 3}):
            server.models = wrong
            with pytest.raises(LoadError, match="does not list its models"):
                with_client(server.url, action, key="abc")
    with pytest.raises(LoadError, match="connection refused"):
        with_client(server.url, action)


def test_a_closed_loop_keeps_so_many_under_way() -> None:
    all_here: asyncio.Event | None = None

    async def script(request: Request, connection: Connection) -> None:
        nonlocal all_here
        all_here = all_here or asyncio.Event()
        if server.in_flight == 3:
            all_here.set()
        await all_here.wait()  # the first three come together, or never
        await stream(request, connection)

    measured = Measurements(Goodput.parse(""))

    async def action(client: OpenAIClient, http: HTTPClient) -> None:
        client._on_record = measured.add
        await run_closed_loop(client, planned(20), measured, None, 3)

    with FakeServer(script) as server:
        with_client(server.url, action)
    assert measured.completed == 20
    assert server.most_in_flight == 3
    assert sorted(request.body["prompt"][3] for request in server.completions) == list(range(20))


def test_an_open_loop_does_not_wait_for_answers() -> None:
    all_here: asyncio.Event | None = None

    async def script(request: Request, connection: Connection) -> None:
        nonlocal all_here
        all_here = all_here or asyncio.Event()
        if server.in_flight == 12:
            all_here.set()
        await all_here.wait()
        await stream(request, connection)

    async def action(client: OpenAIClient, http: HTTPClient) -> None:
        requests = [PlannedRequest(index, 0.001 * index, [1], 2) for index in range(12)]
        await run_open_loop(client, requests, Measurements(Goodput.parse("")), None)

    with FakeServer(script) as server:
        records = with_client(server.url, action)
    assert [record.error for record in records] == [None] * 12
    assert server.most_in_flight == 12
    for record in records:
        planned_at = 0.001 * record.index
        assert record.late is None if record.index == 0 else record.late == pytest.approx(record.sent - planned_at)


class _Clock:
    """A client whose requests take no time, and a clock that only `tick` moves."""

    def __init__(self, tick: float) -> None:
        self.now, self.tick = 100.0, tick
        self.sent: list[int] = []

    def clock(self) -> float:
        return self.now

    def prepare(self, request: PlannedRequest) -> bytes:
        return b""

    async def send(self, request: PlannedRequest, body: bytes, begin: float) -> None:
        self.sent.append(request.index)
        self.now += self.tick


def test_nothing_is_sent_after_the_duration() -> None:
    measured = Measurements(Goodput.parse(""))
    client: Any = _Clock(1.0)
    asyncio.run(run_closed_loop(client, planned(50), measured, 4.5, 1))
    assert client.sent == [0, 1, 2, 3, 4]
    assert (measured.begin, measured.end) == (100.0, 105.0)
    client = _Clock(0.0)
    requests = [PlannedRequest(index, 1e-6 * index, "x", 1) for index in range(50)]
    asyncio.run(run_open_loop(client, requests, measured, 7.5e-6))
    assert client.sent == list(range(8))


def test_a_bug_in_a_request_ends_the_run() -> None:
    class Broken(_Clock):
        async def send(self, request: PlannedRequest, body: bytes, begin: float) -> None:
            if request.index == 0:
                raise ZeroDivisionError

    for run in (run_open_loop, lambda *args: run_closed_loop(*args, 2)):
        with pytest.raises(ZeroDivisionError):
            asyncio.run(run(Broken(0.0), planned(5), Measurements(Goodput.parse("")), None))  # type: ignore[arg-type]


def test_what_is_cancelled_is_recorded_and_the_server_told() -> None:
    gone: list[int] = []

    async def script(request: Request, connection: Connection) -> None:
        if request.number:  # one is streaming, of the other there is nothing yet
            await connection.head()
            await connection.part(chunk("a"))
        with suppress(ConnectionError):
            await connection.until_the_client_is_gone()
        gone.append(request.number)

    async def action(client: OpenAIClient, http: HTTPClient) -> None:
        measured = Measurements(Goodput.parse(""))
        task = asyncio.create_task(run_closed_loop(client, planned(9), measured, None, 2))
        while len(server.completions) < 2:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while len(gone) < 2:
            await asyncio.sleep(0.001)

    with FakeServer(script) as server:
        records = with_client(server.url, action)
    assert [record.error for record in records] == [INTERRUPTED] * 2
    assert sorted(gone) == [0, 1]


def test_https_checks_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-keyout", key, "-out", certificate, "-subj", "/CN=127.0.0.1"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    with FakeServer(tls=tls) as server:
        (record,) = send(server.url)
        assert record.error == "connect"
        assert "certificate" in record.message
        monkeypatch.setenv("SSL_CERT_FILE", certificate)
        assert [(r.error, len(r.times)) for r in send(server.url, 2)] == [(None, 3)] * 2
