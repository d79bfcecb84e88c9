"""A full queue, keys, a server that is about to stop, and faults of its own: who is refused, and how."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.server.harness import PROBE, Serving, serving, until
from tinyllm.errors import InvalidRequestError
from tinyllm.server.engine_thread import EngineThread

BODY = {"prompt": "One day", "max_tokens": 4, "temperature": 0}
STREAM = {**BODY, "max_tokens": 50, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(max_waiting=4) as running:
        yield running


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(12) as pool:
        yield pool


def error_of(answer: httpx.Response) -> dict[str, Any]:
    assert set(answer.json()) == {"error"}
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def statuses(answers: list[Future[httpx.Response]]) -> list[int]:
    return [answer.result().status_code for answer in answers]


# ---- the queue


def test_a_full_queue_refuses_and_says_when_to_come_again(server: Serving, pool: ThreadPoolExecutor) -> None:
    engine = server.service.engine
    engine.pause()
    try:
        accepted = []
        for count in range(1, 5):
            accepted.append(pool.submit(server.post, "/v1/completions", PROBE))
            until(lambda count=count: engine.num_waiting == count, "a request does not arrive")  # type: ignore[misc]
        for stream in (False, True):
            refused = server.post("/v1/completions", {**BODY, "stream": stream})
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert error_of(refused)["code"] == "queue_full"
        assert server.post("/v1/embeddings", {"input": "One"}).status_code == 429
        assert engine.num_waiting == 4
        assert server.service.metrics.text().count(b"num_requests_waiting") > 0
    finally:
        engine.resume()
    assert statuses(accepted) == [200] * 4
    for answer in accepted:
        logprobs = answer.result().json()["choices"][0]["logprobs"]
        assert (logprobs["tokens"], logprobs["token_logprobs"]) == server.expected
    server.check()


def test_the_prompts_of_one_request_are_taken_all_or_none(server: Serving, pool: ThreadPoolExecutor) -> None:
    engine = server.service.engine
    engine.pause()
    try:
        first = pool.submit(server.post, "/v1/completions", {**BODY, "prompt": ["a", "b", "c"]})
        until(lambda: engine.num_waiting == 3, "a request does not arrive")
        assert server.post("/v1/completions", {**BODY, "prompt": ["a", "b"]}).status_code == 429
        assert engine.num_waiting == 3
        assert server.post("/v1/completions", {**BODY, "prompt": ["a"] * 5}).status_code == 400  # never
        last = pool.submit(server.post, "/v1/completions", BODY)
        until(lambda: engine.num_waiting == 4, "a request does not arrive")
    finally:
        engine.resume()
    assert statuses([first, last]) == [200, 200]
    server.check()


def test_a_burst_is_answered_or_refused_and_the_queue_recovers(server: Serving, pool: ThreadPoolExecutor) -> None:
    found = statuses([pool.submit(server.post, "/v1/completions", BODY) for _ in range(60)])
    assert set(found) <= {200, 429}
    assert 200 in found
    server.check()


# ---- faults


@pytest.mark.parametrize("part", ["step", "forward", "finish"])
def test_a_step_that_fails_ends_its_requests_and_no_others(
    server: Serving, pool: ThreadPoolExecutor, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = server.llm.engine
    owner, name = {
        "step": (engine, "step"),
        "forward": (engine.runner, "forward"),
        "finish": (engine, "_finish_step"),
    }[part]
    right = getattr(owner, name)

    def wrong(*args: Any) -> Any:
        setattr(owner, name, right)
        raise RuntimeError("as a test wants it")

    server.service.engine.pause()
    answers = [pool.submit(server.post, "/v1/completions", BODY), pool.submit(server.post, "/v1/completions", STREAM)]
    until(lambda: server.service.engine.num_waiting == 2, "a request does not arrive")
    monkeypatch.setattr(owner, name, wrong)
    server.service.engine.resume()
    whole, stream = (answer.result() for answer in answers)
    assert whole.status_code == 500
    assert error_of(whole)["type"] == "server_error"
    assert "test" not in whole.text  # what went wrong inside is nobody's business outside
    (event,) = [line[6:] for line in stream.text.split("\n") if line.startswith("data: ")]
    assert json.loads(event)["error"]["type"] == "server_error"
    server.check()


def test_a_request_that_cannot_be_started_is_answered(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any, **rest: Any) -> None:
        raise RuntimeError("as a test wants it")

    with monkeypatch.context() as patch:
        patch.setattr(server.llm.engine, "add_request", wrong)
        assert server.post("/v1/completions", BODY).status_code == 500
    server.check()


@pytest.mark.parametrize("stream", [False, True])
def test_where_one_prompt_fails_the_others_of_its_request_end(
    server: Serving, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They end at once: no step runs here that could finish them."""
    add_request = server.llm.engine.add_request

    def sometimes_wrong(request_id: str, token_ids: list[int], *args: Any, **rest: Any) -> None:
        if rest["prompt"] == "b":
            raise InvalidRequestError("as a test wants it")
        add_request(request_id, token_ids, *args, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(server.llm.engine, "add_request", sometimes_wrong)
        server.service.engine.pause()
        answer = server.post("/v1/completions", {**BODY, "prompt": ["a", "b", "c"], "stream": stream})
        assert "as a test wants it" in answer.text
        assert answer.status_code == (200 if stream else 400)
        until(server.idle, "the other prompts are left")
    server.service.engine.resume()
    server.check()


def test_a_dead_engine_leaves_nobody_waiting(pool: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    with serving() as server:
        server.service.engine.pause()
        answers = [pool.submit(server.post, "/v1/completions", body) for body in (BODY, BODY, STREAM)]
        until(lambda: server.service.engine.num_waiting == 3, "a request does not arrive")

        def end() -> None:
            raise SystemExit("as a test wants it")

        server.llm.engine.step = end  # type: ignore[method-assign, assignment]
        server.service.engine.resume()
        whole, other, stream = (answer.result() for answer in answers)
        assert whole.status_code == other.status_code == 503
        assert error_of(whole)["code"] == "unavailable"
        assert '"unavailable"' in stream.text
        assert "[DONE]" not in stream.text
        refused = server.post("/v1/completions", BODY)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        with server.client() as client:
            assert client.get("/health").status_code == 503
            assert client.get("/health").json() == {"status": "failed"}
            assert client.get("/metrics").status_code == 200
            assert client.get("/v1/models").status_code == 200


def test_a_request_on_its_way_when_the_engine_dies_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It passed the first look, and reaches the queue when nobody serves it any more."""
    with serving() as server:
        server.service.engine.stop()
        answer = server.post("/v1/completions", BODY)
        assert answer.status_code == 503
        assert error_of(answer)["code"] == "unavailable"


# ---- the end


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/embeddings"])
def test_what_is_not_done_when_the_time_is_up_says_so(pool: ThreadPoolExecutor, path: str) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {**STREAM, "stream": False},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
        "/v1/embeddings": {"input": "One day " * 60},
    }
    body = bodies[path]
    with serving(max_batch_tokens=16, num_blocks=64) as server:
        engine = server.service.engine
        engine.pause()
        answer = pool.submit(server.post, path, body)
        until(lambda: engine.num_waiting == 1, "the request does not arrive")
        engine.single_step()
        until(lambda: engine.num_running == 1, "nothing runs")
        server.engine_call(lambda _: drain_now(engine))
        found = answer.result()
        if path == "/v1/embeddings":  # a part of a vector's tokens would give another vector
            assert found.status_code == 503
            assert error_of(found)["code"] == "unavailable"
        else:
            assert found.status_code == 200
            assert found.json()["choices"][0]["finish_reason"] == "abort"
        assert server.post(path, body).status_code == 503
        with server.client() as client:
            assert client.get("/health").json() == {"status": "draining"}


def drain_now(engine: EngineThread) -> None:
    """On the engine's thread: as `drain` does when its time is up."""
    engine.draining = True
    engine._abort_all()


# ---- keys

KEYS = ["first-key-123", "second-key-456"]


@pytest.fixture(scope="module")
def locked() -> Iterator[Serving]:
    with serving(api_keys=KEYS) as running:
        yield running


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "Bearer wrong-key-123", f"Basic {KEYS[0]}", KEYS[0], f"Bearer {KEYS[0]}x", "Bearer \xe9"],
)
def test_who_has_no_key_is_told_nothing(locked: Serving, authorization: str) -> None:
    headers = {"Authorization": authorization.encode("latin-1")} if authorization else {}
    with locked.client(headers=headers) as client:
        for path, body in [
            ("/v1/completions", BODY),
            ("/v1/chat/completions", {"messages": []}),
            ("/v1/embeddings", {"input": "a"}),
            ("/tokenize", {"prompt": "a"}),
            ("/detokenize", {"tokens": [1]}),
        ]:
            answer = client.post(path, json=body)
            assert answer.status_code == 401, path
            assert answer.headers["www-authenticate"] == "Bearer"
            assert error_of(answer)["code"] == "invalid_api_key"
        for path in ("/v1/models", "/metrics"):
            assert client.get(path).status_code == 401, path
        assert client.get("/health").status_code == 200


def test_each_key_is_served(locked: Serving) -> None:
    for key in KEYS:
        assert locked.post("/v1/completions", BODY, Authorization=f"Bearer {key}").status_code == 200


def test_no_two_keys_share_a_prefix_whatever_salt_they_send(locked: Serving) -> None:
    def cached(key: str, **fields: Any) -> int:
        body = {**BODY, "prompt": "Once there was a dog who lived by the sea. " * 8, **fields}
        usage = locked.post("/v1/completions", body, Authorization=f"Bearer {key}").json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    first, second = KEYS
    assert cached(first) == 0
    assert cached(first) > 0
    assert cached(second) == 0
    assert cached(second) > 0
    assert cached(first, cache_salt="a") == 0
    assert cached(first, cache_salt="a") > 0
    tenant = hashlib.sha256(first.encode()).hexdigest()[:32]  # even one who knows it gets no nearer
    for salt in ("a", ":", f"{tenant}:", f"{tenant}:a"):
        assert cached(second, cache_salt=salt) == 0
