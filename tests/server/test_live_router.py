"""The live routes over HTTP: the page's files, the stream, the switches, and who may use them."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.live_picture import Picture, parse
from tests.server.live_serving import Served, serving_page
from tests.tiny import random_prompt
from tinyllm import LLM
from tinyllm.sampling import SamplingParams
from tinyllm.server.live import router
from tinyllm.server.live.page import page_files

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def small_server() -> Iterator[Served]:
    with serving_page(LLM("tales-4m", device="cpu", num_blocks=64, debug_checks=True)) as served:
        yield served


@pytest.fixture
def server(small_server: Served) -> Iterator[Served]:
    """Without requests, and not paused, before and after."""
    yield small_server
    small_server.clear()
    wait_for(lambda: small_server.feed.num_viewers == 0)


def wait_for(condition: Any) -> None:
    """Deadline only for a run that is broken."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


def messages(response: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    rest = ""
    for text in response.iter_text():
        *whole, rest = (rest + text).split("\n\n")
        yield from parse("".join(f"{part}\n\n" for part in whole))


def add(served: Served, name: str = "a", **params: Any) -> None:
    params = {"max_tokens": 8, "ignore_eos": True, **params}
    served.on_engine(lambda engine: engine.add_request(name, random_prompt(20), SamplingParams(**params)))


# ---- the page


def test_the_page_and_all_that_it_names_is_served_under_a_strict_policy(server: Served) -> None:
    seen, queue = set(), ["/"]
    while queue:
        path = queue.pop()
        if path in seen:
            continue
        seen.add(path)
        response = httpx.get(server.url + path)
        assert response.status_code == 200, path
        policy = response.headers["content-security-policy"]
        assert "default-src 'self'" in policy and "unsafe" not in policy and "*" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        queue += re.findall(r'"(/page/[\w.]+)"', response.text)
    assert seen == {"/", *(f"/page/{name}" for name in page_files() if name != "index.html")}
    assert all(kind in " ".join(seen) for kind in (".css", ".js", ".svg"))


def test_the_page_loads_nothing_from_elsewhere_and_runs_no_inline_code() -> None:
    for name, file in page_files().items():
        text = file.data.decode("ascii")
        addresses = [found for found in re.findall(r"\bhttps?://[^\s\"')]+", text) if "www.w3.org" not in found]
        assert not addresses, name
        assert "innerHTML" not in text and "eval(" not in text and "document.write" not in text, name
        if name.endswith(".html"):
            assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?![^>]*\ssrc=)", text)


def test_files_are_asked_for_again_but_not_sent_again(server: Served) -> None:
    first = httpx.get(f"{server.url}/page/app.js")
    assert first.headers["content-type"] == "text/javascript; charset=utf-8"
    again = httpx.get(f"{server.url}/page/app.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("name", ["nothing.js", "..%2Ferrors.py", "%2e%2e/errors.py", "index.html%00"])
def test_nothing_else_can_be_had(server: Served, name: str) -> None:
    assert httpx.get(f"{server.url}/page/{name}").status_code == 404


def test_the_openapi_document_leaves_the_page_out(server: Served) -> None:
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    assert not [path for path in paths if path == "/" or path.startswith(("/page", "/live"))]


# ---- the stream


def test_a_stream_tells_a_whole_run(server: Served) -> None:
    picture = Picture()
    with httpx.stream("GET", f"{server.url}/live/events", timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        stream = messages(response)
        event, state = next(stream)
        assert event == "state"
        picture.see(event, state)
        add(server, n=2)
        for event, data in stream:
            picture.see(event, data)
            if event == "step" and not data["running"]:
                break
    server.on_engine(picture.compare)
    assert picture.steps == state["steps"] + 8
    wait_for(lambda: not server.engine.observers)
    assert server.feed.num_viewers == 0


def test_the_state_can_be_had_by_itself(server: Served) -> None:
    server.thread.pause()
    add(server)
    state = httpx.get(f"{server.url}/live/state").json()
    (request,) = state["requests"]
    assert state["model"] == "tales-4m" and not state["chat_template"]
    assert (request["prompt"], state["waiting"], state["num_blocks"]) == (20, 1, 64)
    assert not server.engine.observers


def test_a_viewer_that_does_not_read_is_not_waited_for(server: Served) -> None:
    """Its messages do not pile up; when it reads on it finds, after what was on its way, the state."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as viewer:
        viewer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        viewer.settimeout(60)
        viewer.connect((host, int(port)))
        viewer.sendall(b"GET /live/events HTTP/1.1\r\nHost: here\r\n\r\n")
        wait_for(lambda: server.feed.num_viewers == 1)
        (kept,) = server.feed._viewers
        padding = {"padding": "x" * 10_000}
        for _ in range(4000):
            server.on_engine(lambda engine: server.feed._send("paused", padding))
            assert kept._nbytes <= 1 << 20
            if kept.lost:
                break
        assert kept.lost and kept._messages == []
        add(server)
        wait_for(lambda: not server.engine.requests)
        data = b""
        while data.count(b"event: state") < 2:
            part = viewer.recv(1 << 16)
            assert part
            data += part
        assert not kept.lost
    wait_for(lambda: server.feed.num_viewers == 0)


def test_there_are_only_so_many_viewers(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "MAX_VIEWERS", 1)
    with httpx.stream("GET", f"{server.url}/live/events", timeout=60) as response:
        stream = messages(response)  # kept: it would close the connection with itself
        next(stream)
        refused = httpx.get(f"{server.url}/live/events")
        assert refused.status_code == 503
        assert "1 viewers watch already" in refused.json()["error"]["message"]


def test_streams_end_when_the_feed_closes(server: Served) -> None:
    with httpx.stream("GET", f"{server.url}/live/events", timeout=60) as response:
        stream = messages(response)
        next(stream)
        server.feed.close()
        assert list(stream) == []


# ---- the switches


def test_pause_step_and_resume(server: Served) -> None:
    def post(name: str) -> httpx.Response:
        return httpx.post(f"{server.url}/live/{name}", headers=JSON, content=b"{}")

    engine = server.engine
    with httpx.stream("GET", f"{server.url}/live/events", timeout=60) as response:
        stream = messages(response)
        assert next(stream)[1]["paused"] is False
        assert post("pause").json() == {"paused": True}
        assert next(stream) == ("paused", {"paused": True})
        add(server)
        assert next(stream)[0] == "request"
        before = engine.num_steps
        for number in range(before + 1, before + 4):
            assert post("step").json() == {"paused": True}
            event, data = next(stream)
            assert (event, data["step"]) == ("step", number)
            assert server.on_engine(lambda engine: engine.num_steps) == number
        assert post("resume").json() == {"paused": False}
        assert next(stream) == ("paused", {"paused": False})
        wait_for(lambda: not engine.requests)
    assert engine.num_steps == before + 8
    refused = post("step")
    assert refused.status_code == 409
    assert "not paused" in refused.json()["error"]["message"]


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
@pytest.mark.parametrize("name", ["pause", "step", "resume"])
def test_what_a_foreign_page_can_send_is_refused(server: Served, name: str, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    refused = httpx.post(f"{server.url}/live/{name}", headers=headers, content=b"{}")
    assert refused.status_code == 415
    assert not server.thread.paused
    assert httpx.get(f"{server.url}/live/{name}").status_code == 405


def test_a_key_is_demanded_for_all_but_the_page_itself() -> None:
    with serving_page(LLM("tales-4m", device="cpu", num_blocks=64), api_keys=["open-sesame"]) as served:
        for path in ("/live/events", "/live/state"):
            assert httpx.get(served.url + path).status_code == 401
        for name in ("pause", "step", "resume"):
            assert httpx.post(f"{served.url}/live/{name}", headers=JSON).status_code == 401
        assert not served.thread.paused
        for path in ("/", "/page/app.js"):
            assert httpx.get(served.url + path).status_code == 200
        allowed = {"Authorization": "Bearer open-sesame"}
        assert httpx.get(f"{served.url}/live/state", headers=allowed).status_code == 200
