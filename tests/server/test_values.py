"""Random JSON values in every field of every body: an answer or a refusal in the error shape, and never a fault."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from pydantic import BaseModel

from tests.server.harness import Serving, serving
from tests.server.test_hostile import assert_error
from tinyllm.server.api.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)

LONE = "\ud800"
MESSAGES = [{"role": "user", "content": "Hi"}]

BASES: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "/v1/completions": (CompletionRequest, {"prompt": "One day", "max_tokens": 2}),
    "/v1/chat/completions": (ChatRequest, {"messages": MESSAGES, "max_tokens": 2}),
    "/v1/embeddings": (EmbeddingRequest, {"input": "One day"}),
    "/tokenize": (TokenizeRequest, {"prompt": "One day"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [1, 2, 3]}),
}

numbers = st.one_of(
    st.integers(-3, 20),
    st.sampled_from([2**31, 2**63, 2**64, 10**30, -(2**63) - 1, 10**400, 0.5, 1.5, -0.0, 1e-320, 1e308]),
    st.floats(),
)
texts = st.one_of(
    st.sampled_from(
        ["", "a", LONE, f"a{LONE}b", "\x00", "\n\r", "auto", "none", "text", "never", "user", "😀", "tales-4m"]
    ),
    st.text(max_size=8),
    st.text(st.characters(categories=["Cs", "Cc", "Co", "Lu"]), max_size=6),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(st.sampled_from(["type", "role", "content", "text", "schema", "json_schema", "5"]), texts),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=8,
)
messages = st.lists(
    st.fixed_dictionaries({"role": texts, "content": st.one_of(texts, st.none(), values)}, optional={"name": values}),
    max_size=3,
)
formats = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "json_object", "json_schema"])},
    optional={"json_schema": st.fixed_dictionaries({"name": texts, "schema": values})},
)
LIKELY: dict[str, st.SearchStrategy[Any]] = {  # values that get past the types
    "messages": messages,
    "response_format": formats,
    "tokens": st.lists(numbers, max_size=8),
    "prompt": st.one_of(texts, st.lists(numbers, max_size=6), st.lists(texts, max_size=3)),
    "input": st.one_of(texts, st.lists(numbers, max_size=6), st.lists(texts, max_size=3)),
    "logit_bias": st.dictionaries(st.one_of(st.integers(-2, 5000).map(str), texts), numbers, max_size=4),
    "stop": st.one_of(texts, st.lists(texts, max_size=3)),
    "stop_token_ids": st.lists(numbers, max_size=4),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
}
LENGTHS = ("max_tokens", "max_completion_tokens")


@pytest.fixture(scope="module")
def running() -> Iterator[Serving]:
    with serving() as running:
        yield running


@st.composite
def bodies(draw: st.DrawFn, path: str) -> dict[str, Any]:
    """A good body with some of its fields replaced, under the bounds on length that keep a test short."""
    shape, base = BASES[path]
    body = dict(base)
    for name in draw(st.lists(st.sampled_from([*shape.model_fields, "no_such_field"]), max_size=4, unique=True)):
        likely = LIKELY.get(name)
        body[name] = draw(
            st.one_of(values, likely, likely) if likely is not None else st.one_of(values, numbers, texts)
        )
    for name in LENGTHS:
        value = body.get(name)
        if value is None and name == "max_tokens" and name in base:
            body[name] = 2
        if isinstance(value, int) and 4 < value <= 1 << 40:
            body[name] = 4
    if body.get("max_completion_tokens", 0) is None:
        del body["max_completion_tokens"]
    return body


@pytest.mark.parametrize("path", BASES)
def test_any_value_in_any_field_is_served_or_refused(running: Serving, path: str) -> None:
    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(bodies(path))
    def check(body: dict[str, Any]) -> None:
        answer = client.post(path, content=json.dumps(body).encode(), headers={"content-type": "application/json"})
        assert_served_or_refused(answer.status_code, answer.headers["content-type"], answer.text)

    with running.client() as client:
        check()
    running.check()


def assert_served_or_refused(status: int, kind: str, text: str) -> None:
    if status == 200 and kind.startswith("text/event-stream"):
        events = [line[6:] for line in text.split("\n") if line.startswith("data: ")]
        assert events[-1] == "[DONE]", events[-1]  # a failure in the stream would be its last event
        assert all(isinstance(json.loads(event), dict) for event in events[:-1])
    elif status == 200:
        assert isinstance(json.loads(text), dict)
    else:
        assert_error(status, json.loads(text))


def text_fields(path: str) -> list[tuple[Any, ...]]:
    """Ways to put a lone surrogate into a body: each is a path of keys to where a text may stand."""
    common: list[tuple[Any, ...]] = [("model",), ("user",), (LONE,)]
    generation: list[tuple[Any, ...]] = [("stop",), ("stop", 0), ("cache_salt",), ("regex",), ("grammar",)]
    generation += [("logit_bias", LONE), ("early_stopping",), ("response_format", "type")]
    own: dict[str, list[tuple[Any, ...]]] = {
        "/v1/completions": [*generation, ("prompt",), ("prompt", 0)],
        "/v1/chat/completions": [
            *generation,
            *[("messages", 0, "role"), ("messages", 0, "content"), ("messages", 0, LONE), ("messages", 0, "name")],
            *[("metadata", "a"), ("metadata", LONE), ("service_tier",), ("tool_choice",)],
        ],
        "/v1/embeddings": [("input",), ("input", 0), ("encoding_format",), ("cache_salt",)],
        "/tokenize": [("prompt",), ("messages", 0, "content"), ("messages", 0, "role")],
        "/detokenize": [("tokens",), ("tokens", 0)],
    }
    return common + own[path]


def put(body: dict[str, Any], where: tuple[Any, ...]) -> dict[str, Any]:
    first, *rest = where
    value: Any = "a" + LONE
    for key in reversed(rest):
        if key == 0:
            value = [value]
        elif first == "messages":
            value = {"role": "user", "content": "Hi", key: value}
        else:
            value = {key: value}
    found = {**body, first: value}
    if first == "messages":
        found.pop("prompt", None)
    return found


@pytest.mark.parametrize(("path", "where"), [(path, where) for path in BASES for where in text_fields(path)])
def test_a_lone_surrogate_anywhere_is_no_fault(running: Serving, path: str, where: tuple[Any, ...]) -> None:
    answer = running.post(path, put(BASES[path][1], where))
    assert_served_or_refused(answer.status_code, answer.headers["content-type"], answer.text)


@pytest.mark.parametrize("path", BASES)
@pytest.mark.parametrize("value", [float("nan"), -float("inf"), 10**400, 10**4000], ids=["nan", "inf", "400", "4000"])
def test_numbers_that_are_none_are_no_fault(running: Serving, path: str, value: Any) -> None:
    with running.client(headers={"content-type": "application/json"}) as client:
        for name in BASES[path][0].model_fields:
            for whole in (value, [value], {"5": value}):
                answer = client.post(path, content=json.dumps({**BASES[path][1], name: whole}).encode())
                assert_served_or_refused(answer.status_code, answer.headers["content-type"], answer.text)
