"""StructuredOutput: what is refused before anything is compiled, each in one line."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from tinyllm.errors import InvalidRequestError
from tinyllm.sampling_params import SamplingParams
from tinyllm.structured_output import MAX_NBYTES, MAX_NESTING, StructuredOutput, _nesting


def nested(depth: int) -> str:
    """A schema whose brackets nest so deep."""
    return '{"items":' * (depth - 1) + "{}" + "}" * (depth - 1)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("xml", "<a/>", "the kind of a structured output must be one of json_object, json_schema, regex, grammar"),
        (None, "", "not a NoneType"),
        (["regex"], "a", "not a list"),
        ("regex", b"a", "the regex must be a string, not a bytes"),
        ("regex", "", "the regex is empty"),
        ("grammar", " \n", "the grammar is empty"),
        ("json_schema", "", "the json_schema is empty"),
        ("json_object", "{}", "a json_object takes no text"),
        ("regex", "\ud800", "the regex is not valid Unicode"),
        ("regex", "a\0", "the regex has a NUL character"),
        ("regex", "é" * (MAX_NBYTES // 2 + 1), f"has {MAX_NBYTES + 2} bytes; at most {MAX_NBYTES} are allowed"),
        ("json_schema", "{", "the json_schema is not JSON"),
        ("json_schema", "[]", "the json_schema must be a JSON object, not a list"),
        ("json_schema", "true", "the json_schema must be a JSON object, not a bool"),
        ("json_schema", '{"const": NaN}', "NaN is not a JSON number"),
        ("json_schema", '{"const": ' + "9" * 5000 + "}", "the json_schema is not JSON"),
        ("json_schema", nested(MAX_NESTING + 1), f"nested {MAX_NESTING + 1} deep; at most {MAX_NESTING} is allowed"),
        ("json_schema", "[" * MAX_NBYTES, f"nested {MAX_NBYTES} deep"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(kind: Any, text: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError) as error:
        StructuredOutput(kind, text)
    assert message in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_what_lies_on_the_bounds_is_allowed() -> None:
    StructuredOutput("json_schema", nested(MAX_NESTING))
    StructuredOutput("regex", "a" * MAX_NBYTES)
    StructuredOutput("regex", " ")
    StructuredOutput("json_schema", json.dumps({"const": '"[{' * 100 + "\\"}))  # brackets in strings do not nest


def test_a_text_of_nothing_but_quotes_is_looked_through_once() -> None:
    """A scan that begins again at every quote would take minutes."""
    assert _nesting('"' + '\\"' * (MAX_NBYTES // 2) + "[") == 0
    assert _nesting('"\\\\"[') == 1


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.text(st.sampled_from('"[]{}\\é')),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(st.sampled_from('"[}\\')), inner, max_size=3)
        ),
    )
)
def test_nesting_is_counted_outside_of_strings(value: Any) -> None:
    def depth(value: Any) -> int:
        if isinstance(value, dict):
            value = list(value.values())
        return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0

    assert _nesting(json.dumps(value)) == depth(value)


def test_a_schema_may_be_a_mapping() -> None:
    assert StructuredOutput.json_schema({"type": "object"}) == StructuredOutput("json_schema", '{"type": "object"}')
    for bad in ({"a": {1, 2}}, {"a": float("nan")}, {"a": object()}):
        with pytest.raises(InvalidRequestError, match="the json_schema is not JSON"):
            StructuredOutput.json_schema(bad)
    loop: dict[str, Any] = {}
    loop["a"] = loop
    with pytest.raises(InvalidRequestError, match="the json_schema is not JSON"):
        StructuredOutput.json_schema(loop)


def test_sampling_params_take_it_as_a_mapping_too() -> None:
    wanted = StructuredOutput.regex("a|b")
    assert SamplingParams(structured_output=wanted).structured_output is wanted
    assert SamplingParams(structured_output=wanted.to_json()).structured_output == wanted  # type: ignore[arg-type]
    assert StructuredOutput.of(StructuredOutput.json_object().to_json()) == StructuredOutput.json_object()
    for bad in (
        "a",
        3,
        {"kind": "regex"},
        {"text": "a"},
        {"kind": "regex", "text": "a", "more": 1},
        [("kind", "regex")],
    ):
        with pytest.raises(InvalidRequestError):
            SamplingParams(structured_output=bad)  # type: ignore[arg-type]
