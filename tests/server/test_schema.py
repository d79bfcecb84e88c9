"""schemathesis against the OpenAPI document: no fault, and every answer as the document says."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from tests.server.harness import Serving, serving

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its dependencies' own
    import schemathesis
    from schemathesis import GenerationMode

KEY = "key-of-the-tests"
OPERATIONS = {
    "POST /v1/completions": 60,
    "POST /v1/chat/completions": 60,
    "POST /v1/embeddings": 30,
    "POST /tokenize": 30,
    "POST /detokenize": 30,
    "GET /v1/models": 3,
    "GET /v1/models/{name}": 20,
    "GET /health": 3,
    "GET /metrics": 3,
}  # and how many requests each of them gets in the short test
LENGTHS = ("max_tokens", "max_completion_tokens")
CASES = [
    (name, mode)
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    for name in OPERATIONS
    if (name, mode) != ("GET /health", GenerationMode.NEGATIVE)  # nothing there can be wrong
]


@pytest.fixture(scope="module")
def running() -> Iterator[Serving]:
    with serving(max_n=2, max_prompts=4, api_keys=[KEY]) as running:
        yield running


@pytest.fixture(scope="module")
def schema(running: Serving) -> Any:
    return schemathesis.openapi.from_url(f"{running.base_url}/openapi.json")


def bounded(body: Any) -> Any:
    """A body that asks for few tokens: a good one may ask for thousands."""
    if not isinstance(body, dict) or not ("prompt" in body or "messages" in body):
        return body
    for name in LENGTHS:
        value = body.get(name)
        if isinstance(value, int) and 3 < value < 1 << 40:
            body[name] = 3
    if "messages" in body and all(body.get(name) is None for name in LENGTHS):
        body["max_tokens"] = 3
    return body


def check(running: Serving, schema: Any, name: str, mode: GenerationMode, count: int) -> None:
    operation = next(one.ok() for one in schema.get_all_operations() if one.ok().label == name)
    checks = schemathesis.checks
    wanted = [
        *(checks.not_a_server_error, checks.status_code_conformance, checks.content_type_conformance),
        *(checks.response_schema_conformance, checks.response_headers_conformance),
    ]

    @settings(
        max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        case.body = bounded(case.body)
        case.headers["Authorization"] = f"Bearer {KEY}"
        case.call_and_validate(checks=wanted)

    run()
    running.check(Authorization=f"Bearer {KEY}")


def test_every_operation_of_the_document_is_tested(schema: Any) -> None:
    assert {one.ok().label for one in schema.get_all_operations()} == set(OPERATIONS)


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_answers_are_as_the_document_says(running: Serving, schema: Any, name: str, mode: GenerationMode) -> None:
    check(running, schema, name, mode, OPERATIONS[name])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), CASES)
def test_many_answers_are_as_the_document_says(running: Serving, schema: Any, name: str, mode: GenerationMode) -> None:
    check(running, schema, name, mode, 50 * OPERATIONS[name])
