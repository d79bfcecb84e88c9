"""llguidance behind its bounds: vocabularies, matchers, the compiler's memory, and texts that mean harm."""

from __future__ import annotations

import importlib.util
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tinyllm.errors import InvalidRequestError
from tinyllm.guidance import compiler as compiler_module, grammar
from tinyllm.guidance.compiler import GuidanceCompiler
from tinyllm.guidance.matcher import GuidanceMatcher, _set_bits
from tinyllm.guidance.vocabulary import MAX_FORCED_CHARS, Vocabulary
from tinyllm.llm import load_tokenizer, open_model
from tinyllm.structured_output import StructuredOutput
from tinyllm.tokenizer import Tokenizer

EOS = 0


@pytest.fixture(scope="module")
def tokenizer(bundled_path: Path) -> Tokenizer:
    checkpoint = open_model(bundled_path)
    try:
        found = load_tokenizer(checkpoint)
    finally:
        checkpoint.close()
    assert found is not None
    return found


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GuidanceCompiler:
    return GuidanceCompiler(tokenizer, tokenizer.vocab_size, [EOS])


@pytest.fixture
def no_trial(monkeypatch: pytest.MonkeyPatch) -> list[StructuredOutput]:
    """Compiles without a process of its own; what would have been tried."""
    tried: list[StructuredOutput] = []

    def try_(structured_output: StructuredOutput) -> int:
        tried.append(structured_output)
        return 100

    monkeypatch.setattr(compiler_module, "_try", try_)
    return tried


# ---- the vocabulary


def test_texts_are_spelled_as_the_model_would(tokenizer: Tokenizer) -> None:
    vocabulary = Vocabulary(tokenizer, tokenizer.vocab_size, [EOS])
    for text in ("Once upon a time", '{"name": "', "é中\x02\n"):
        assert vocabulary.tokenize(text) == tokenizer.encode(text, add_special_tokens=False)


def test_a_special_token_in_a_text_is_spelled_out(tokenizer: Tokenizer) -> None:
    vocabulary = Vocabulary(tokenizer, tokenizer.vocab_size, [EOS])
    text = tokenizer.token_text(EOS)
    assert tokenizer.encode(text, add_special_tokens=False) == [EOS]
    ids = vocabulary.tokenize(f"a {text}")
    assert EOS not in ids
    assert b"".join(vocabulary.tokens[i] for i in ids).decode() == f"a {text}"


def test_a_long_certain_text_is_spelled_from_its_beginning_alone(tokenizer: Tokenizer) -> None:
    vocabulary = Vocabulary(tokenizer, tokenizer.vocab_size, [EOS])
    assert len(b"".join(vocabulary.tokens[i] for i in vocabulary.tokenize("x" * 60_000))) == MAX_FORCED_CHARS


@pytest.mark.parametrize("change", [-3000, 40])
def test_a_model_may_have_fewer_ids_than_its_tokenizer_or_more(tokenizer: Tokenizer, change: int) -> None:
    size = tokenizer.vocab_size + change
    matcher = GuidanceCompiler(tokenizer, size, [EOS]).matcher(StructuredOutput.regex("[a-z ]+"))
    allowed = matcher.allowed_ids([EOS])
    assert allowed.max() < min(size, tokenizer.vocab_size)
    expected = [
        i for i in range(min(size, tokenizer.vocab_size)) if re.fullmatch(rb"[a-z ]+", tokenizer.token_bytes(i))
    ]
    assert allowed.tolist() == expected


# ---- matchers


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_set_bits_are_the_numbers_of_the_bits_that_are_set(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 40))
    words = np.array(data.draw(st.lists(st.sampled_from([0, 0, 0, 1, 1 << 31, 0xF0]), min_size=count, max_size=count)))
    words = words.astype(np.uint32)
    expected = [i for i in range(32 * count) if words[i // 32] >> np.uint32(i % 32) & np.uint32(1)]
    assert _set_bits(words).tolist() == expected


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    return b"".join(map(tokenizer.token_bytes, ids)).decode()


def test_any_path_of_allowed_tokens_leads_to_a_matching_text(compiler: GuidanceCompiler, tokenizer: Tokenizer) -> None:
    pattern = r"(yes|no|maybe)( [a-c]{1,3}){0,2}!"
    lengths = set()
    for seed in range(50):
        rng = np.random.default_rng(seed)
        matcher = compiler.matcher(StructuredOutput.regex(pattern))
        ids: list[int] = []
        while not matcher.finished:
            allowed = matcher.allowed_ids([EOS])
            assert EOS not in allowed  # only the ! ends it, and then nothing may follow
            ids.append(int(rng.choice(allowed)))
            matcher.advance(ids[-1])
        assert re.fullmatch(pattern, text_of(tokenizer, ids))
        assert matcher.num_tokens == len(ids)
        lengths.add(len(ids))
    assert len(lengths) > 3


def test_the_end_is_allowed_where_the_text_may_end_and_only_then(
    compiler: GuidanceCompiler, tokenizer: Tokenizer
) -> None:
    matcher = compiler.matcher(StructuredOutput.regex("ab?"))
    (a,) = tokenizer.encode("a", add_special_tokens=False)
    (b,) = tokenizer.encode("b", add_special_tokens=False)
    assert EOS not in matcher.allowed_ids([EOS, 7])
    matcher.advance(a)
    assert not matcher.finished
    assert matcher.allowed_ids([EOS, 7]).tolist() == sorted([EOS, 7, b])
    assert matcher.allowed_ids().tolist() == [b]
    matcher.advance(b)
    assert matcher.finished


def test_an_end_never_stands_in_the_middle_of_a_string(compiler: GuidanceCompiler, tokenizer: Tokenizer) -> None:
    """llguidance's own end token has bytes; they must not pass for text where any text may stand."""
    for wanted, begin in (
        (StructuredOutput.json_object(), '{"a'),
        (StructuredOutput.json_schema({"type": "object", "properties": {"a": {"type": "string"}}}), '{"a": "b'),
        (StructuredOutput.regex('"[^"]*"'), '"a'),
    ):
        matcher = compiler.matcher(wanted)
        for token in tokenizer.encode(begin, add_special_tokens=False):
            matcher.advance(token)
        allowed = matcher.allowed_ids([EOS]).tolist()
        assert len(allowed) > 1000 and EOS not in allowed


def test_copies_go_their_own_ways(compiler: GuidanceCompiler, tokenizer: Tokenizer) -> None:
    first = compiler.matcher(StructuredOutput.regex("[a-z]{2}[0-9]"))
    (a,) = tokenizer.encode("a", add_special_tokens=False)
    first.advance(a)
    second = first.copy()
    first.advance(a)
    assert (first.num_tokens, second.num_tokens) == (2, 1)
    digits = {text_of(tokenizer, [i]) for i in first.allowed_ids().tolist()}
    assert digits == set("0123456789")
    assert {text_of(tokenizer, [i]) for i in second.allowed_ids().tolist()} >= set("abcxyz")


def test_a_token_that_is_not_allowed_is_an_error_that_stays(compiler: GuidanceCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.matcher(StructuredOutput.regex("[a-z]+"))
    (digit,) = tokenizer.encode("7", add_special_tokens=False)
    for action in (lambda: matcher.advance(digit), matcher.allowed_ids):
        with pytest.raises(InvalidRequestError, match="the structured output failed after 1 tokens") as error:
            action()
        assert "\n" not in str(error.value)


def test_special_tokens_are_no_part_of_a_text(compiler: GuidanceCompiler) -> None:
    for wanted in (StructuredOutput.regex(r"(.|\n)*"), StructuredOutput.json_schema({"const": "<|endoftext|>"})):
        assert EOS not in compiler.matcher(wanted).allowed_ids()


# ---- what is kept


def test_the_grammars_used_last_are_kept(tokenizer: Tokenizer, no_trial: list[StructuredOutput]) -> None:
    compiler = GuidanceCompiler(tokenizer, tokenizer.vocab_size, [EOS], max_grammars=2)
    a, b, c = (StructuredOutput.regex(f"{letter}+") for letter in "abc")
    for wanted in (a, b, a, c, a, b):  # c puts b out, not a
        compiler.matcher(wanted)
    assert no_trial == [a, b, c, b]


def test_large_grammars_put_others_out(tokenizer: Tokenizer, no_trial: list[StructuredOutput]) -> None:
    compiler = GuidanceCompiler(tokenizer, tokenizer.vocab_size, [EOS], max_nbytes=250)  # each counts as 100
    a, b, c = (StructuredOutput.regex(f"{letter}+") for letter in "abc")
    for wanted in (a, b, c, c, b, a):
        compiler.matcher(wanted)
    assert no_trial == [a, b, c, a]
    alone = GuidanceCompiler(tokenizer, tokenizer.vocab_size, [EOS], max_nbytes=1)
    no_trial.clear()
    for wanted in (a, a, b, b):
        alone.matcher(wanted)
    assert no_trial == [a, b]


def test_a_kept_grammar_begins_anew_each_time(compiler: GuidanceCompiler, tokenizer: Tokenizer) -> None:
    wanted = StructuredOutput.regex("[a-z]b")
    before = compiler.matcher(wanted).allowed_ids().tolist()
    used = compiler.matcher(wanted)
    used.advance(before[0])
    assert compiler.matcher(wanted).allowed_ids().tolist() == before


def test_threads_may_compile_at_once(tokenizer: Tokenizer) -> None:
    compiler = GuidanceCompiler(tokenizer, tokenizer.vocab_size, [EOS], max_grammars=3)
    found: dict[int, str] = {}

    def work(number: int) -> None:
        for turn in range(3):
            matcher = compiler.matcher(StructuredOutput.regex(f"{(number + turn) % 5}x"))
            while not matcher.finished:
                matcher.advance(int(matcher.allowed_ids()[0]))
            found[number] = found.get(number, "") + str(matcher.num_tokens)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found.keys() == set(range(5))
    assert set(found.values()) == {"222"}


# ---- what cannot be compiled

DEEP_CHAIN = (
    '{"$defs":{'
    + ",".join(f'"d{i}":' + '{"items":' * 50 + f'{{"$ref":"#/$defs/d{i + 1}"}}' + "}" * 50 for i in range(100))
    + ',"d100":{"type":"string"}},"$ref":"#/$defs/d0"}'
)

REFUSED = [
    ("regex", "(a", "unclosed group"),
    ("regex", "(?=a)b", "look-around"),
    ("regex", "a{0}", "nothing but the empty text matches"),
    ("regex", r"[^\x00-\U0010ffff]", "no text can match it"),
    ("regex", "(" * 2000 + "a" + ")*" * 2000, "nested"),
    ("grammar", "start: missing", 'unknown name: "missing"'),
    ("grammar", "start: start", "no text can match it"),
    ("grammar", "start: " + "(" * 20_000 + '"a"' + ")" * 20_000, "too deeply nested"),
    ("grammar", "%import /etc/passwd\nstart: X", "Expected name"),
    ("json_schema", '{"type": "nothing"}', "Invalid type: nothing"),
    ("json_schema", '{"not": {}}', 'Unimplemented keys: ["not"]'),
    ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}', "Unsatisfiable"),
    ("json_schema", '{"$ref": "#"}', "no text can match it"),
    (
        "json_schema",
        '{"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}',
        "no text",
    ),
    ("json_schema", '{"allOf": [{"$ref": "#"}], "type": "object"}', "circular"),
    ("json_schema", '{"$ref": "http://127.0.0.1:9/schema.json"}', "does not fetch"),
    ("json_schema", '{"$ref": "file:///etc/passwd"}', "does not fetch"),
    ("json_schema", '{"const": "\\ud800"}', "hex escape"),
]
DEADLY = [  # in the process that compiles them
    ("json_schema", DEEP_CHAIN, "its parts nest too deeply"),
    ("grammar", "start: R0\n" + "".join(f"R{i}: R{i + 1}\n" for i in range(4000)) + 'R4000: "a"', "nest too deeply"),
    ("json_schema", '{"type": "integer", "multipleOf": 999983}', "it takes more than 3 s of computing"),
    ("regex", "".join(f"[{chr(97 + i % 26)}-z]?" for i in range(9000)), "it takes more than"),
]


@pytest.mark.parametrize(("kind", "text", "message"), REFUSED)
def test_what_is_wrong_with_a_text_is_one_line(compiler: GuidanceCompiler, kind: str, text: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"the {kind} cannot be compiled: ") as error:
        compiler.matcher(StructuredOutput(kind, text))
    assert message in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 320


@pytest.mark.skipif(importlib.util.find_spec("resource") is None, reason="a process cannot be limited here")
@pytest.mark.parametrize(("kind", "text", "message"), DEADLY, ids=["schema chain", "rule chain", "time", "memory"])
def test_a_text_that_would_bring_the_process_down_is_refused(
    compiler: GuidanceCompiler, kind: str, text: str, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=f"the {kind} cannot be compiled: ") as error:
        compiler.matcher(StructuredOutput(kind, text))
    assert message in str(error.value)
    compiler.matcher(StructuredOutput.regex("a+"))  # the compiler lives


def test_a_trial_that_never_ends_is_ended(compiler: GuidanceCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_module, "TRIAL_SECONDS", 0)
    with pytest.raises(InvalidRequestError, match="the regex cannot be compiled: it takes longer than 0 s"):
        compiler.matcher(StructuredOutput.regex("new"))


AMBIGUOUS = [
    ("grammar", 'start: (("a"~1000)~1000)~1000'),
    ("grammar", "start: t0\n" + "".join(f"t{i}: t{i + 1} t{i + 1}\n" for i in range(60)) + 't60: "a"?'),
    ("regex", "((a{1,1000}){1,1000}){1,1000}"),
]


@pytest.mark.parametrize(("kind", "text"), AMBIGUOUS)
def test_a_text_that_gets_too_complex_ends_with_an_error(compiler: GuidanceCompiler, kind: str, text: str) -> None:
    matcher = compiler.matcher(StructuredOutput(kind, text))
    rng = np.random.default_rng(0)

    def go_on() -> None:
        for _ in range(2000):
            matcher.advance(int(rng.choice(matcher.allowed_ids())))

    with pytest.raises(InvalidRequestError, match=r"the structured output failed after \d+ tokens: \S") as error:
        go_on()
    assert "\n" not in str(error.value)


def test_without_llguidance_it_says_what_to_install(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_module, "find_spec", lambda name: None)
    compiler = GuidanceCompiler(tokenizer, tokenizer.vocab_size, [EOS])
    with pytest.raises(
        InvalidRequestError, match=r"structured output needs llguidance: pip install 'tinyllm\[structured\]'"
    ):
        compiler.matcher(StructuredOutput.json_object())


# ---- schemas at random

LEAVES: list[dict[str, Any]] = [
    {"type": "integer", "minimum": -9, "maximum": 120},
    {"type": "boolean"},
    {"type": "null"},
    {"enum": ["red", "green", 7, None]},
    {"type": "string", "maxLength": 4},
    {"const": {"a": [1, "é"]}},
]


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    def grow(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        arrays = st.builds(lambda item: {"type": "array", "items": item, "maxItems": 2}, inner)
        objects = st.dictionaries(st.sampled_from(["a", "b", "long name", 'q"']), inner, min_size=1, max_size=3).map(
            lambda properties: {
                "type": "object",
                "properties": properties,
                "required": sorted(properties)[:2],
                "additionalProperties": False,
            }
        )
        unions = st.lists(inner, min_size=1, max_size=2).map(lambda options: {"anyOf": options})
        return arrays | objects | unions

    return st.recursive(st.sampled_from(LEAVES), grow, max_leaves=5)


def fits(schema: dict[str, Any], value: Any) -> bool:
    """Whether a value is of a schema of the kinds above."""
    if "const" in schema:
        return bool(value == schema["const"])
    if "enum" in schema:
        return any(value == option and type(value) is type(option) for option in schema["enum"])
    if "anyOf" in schema:
        return any(fits(option, value) for option in schema["anyOf"])
    checks: dict[str, Callable[[], bool]] = {
        "integer": lambda: type(value) is int and schema["minimum"] <= value <= schema["maximum"],
        "boolean": lambda: isinstance(value, bool),
        "null": lambda: value is None,
        "string": lambda: isinstance(value, str) and len(value) <= schema["maxLength"],
        "array": lambda: (
            isinstance(value, list) and len(value) <= 2 and all(fits(schema["items"], item) for item in value)
        ),
        "object": lambda: (
            isinstance(value, dict)
            and set(schema["required"]) <= set(value) <= set(schema["properties"])
            and all(fits(schema["properties"][key], item) for key, item in value.items())
        ),
    }
    return checks[schema["type"]]()


@settings(max_examples=40, deadline=None)
@given(schema=schemas(), seed=st.integers(0, 1 << 30))
def test_random_texts_of_random_schemas_are_valid(schema: dict[str, Any], seed: int, tokenizer: Tokenizer) -> None:
    matcher = _matcher_without_trial(tokenizer, StructuredOutput.json_schema(schema))
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    while not matcher.finished:
        allowed = matcher.allowed_ids([EOS])
        token = int(rng.choice(allowed))
        if token == EOS:
            break
        ids.append(token)
        matcher.advance(token)
    text = text_of(tokenizer, ids)
    value = json.loads(text)
    assert fits(schema, value), (schema, text)
    assert "\n" not in text


_environments: dict[Tokenizer, Any] = {}


def _matcher_without_trial(tokenizer: Tokenizer, wanted: StructuredOutput) -> GuidanceMatcher:
    if tokenizer not in _environments:
        vocabulary = Vocabulary(tokenizer, tokenizer.vocab_size, [EOS])
        _environments[tokenizer] = grammar.make_tokenizer(
            vocabulary.tokens, vocabulary.special_ids, vocabulary.tokenize
        )
    compiled = grammar.make_matcher(_environments[tokenizer], wanted.kind, wanted.text)
    assert grammar.problem(compiled) is None
    return GuidanceMatcher(compiled, tokenizer.vocab_size)
