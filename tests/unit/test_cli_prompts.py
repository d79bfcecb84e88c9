"""Prompts from arguments, stdin and JSONL files."""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from tinyllm.cli.console import UsageError
from tinyllm.cli.prompts import PromptItem, read_items, read_text_file
from tinyllm.sampling_params import SamplingParams

DEFAULTS = SamplingParams(max_tokens=7)


def from_jsonl(tmp_path: Path, data: bytes) -> list[PromptItem]:
    path = tmp_path / "p.jsonl"
    path.write_bytes(data)
    return read_items(argparse.Namespace(prompts=[], input=str(path)), DEFAULTS)


def from_arguments(*prompts: str) -> list[PromptItem]:
    return read_items(argparse.Namespace(prompts=list(prompts), input=None), DEFAULTS)


def pipe(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_arguments_keep_their_order() -> None:
    items = from_arguments("b", "a")
    assert [(item.prompt, item.where) for item in items] == [("b", "prompt 1"), ("a", "prompt 2")]
    assert [item.error for item in items] == [None, None]
    assert items[0].params is DEFAULTS


def test_one_bad_argument_leaves_the_others() -> None:
    good, bad = from_arguments("a", "b\udcff")
    assert good.error is None
    assert bad.error == "prompt 2: the prompt is not valid UTF-8: U+DCFF at character 1"


@pytest.mark.parametrize(
    ("data", "text"),
    [(b"a b\n", "a b"), (b"a\r\n", "a"), (b"a\n\n", "a\n"), (b" a ", " a "), (b"\xef\xbb\xbfa", "a"), (b"", "")],
)
def test_stdin_loses_one_newline(data: bytes, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, data)
    assert from_arguments()[0].prompt == text
    pipe(monkeypatch, data)
    assert [item.prompt for item in from_arguments("x", "-")] == ["x", text]


def test_a_text_file_loses_one_newline(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("é\n".encode())
    assert read_text_file(str(path)) == "é"
    with pytest.raises(UsageError, match=r"cannot read .*: Is a directory"):
        read_text_file(str(tmp_path))
    with pytest.raises(UsageError, match="cannot read"):
        read_text_file("a\0b")


def test_jsonl_lines_and_their_parameters(tmp_path: Path) -> None:
    items = from_jsonl(
        tmp_path,
        b'\xef\xbb\xbf{"prompt": "a"}\n\n  \n{"prompt_token_ids": [1, 2], "max_tokens": 3, "stop": "x"}\r\n'
        b'{"prompt": "c", "logit_bias": {"5": -1.5}}',
    )
    assert [item.error for item in items] == [None] * 3
    assert [item.prompt for item in items] == ["a", [1, 2], "c"]
    assert [item.where.rpartition(":")[2] for item in items] == ["1", "4", "5"]
    assert items[0].params == DEFAULTS
    assert (items[1].params.max_tokens, items[1].params.stop) == (3, ("x",))
    assert items[2].params.logit_bias == {5: -1.5}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a"', "invalid JSON"),
        (b'{"prompt": NaN}', "NaN"),
        (b'{"prompt": "a", "temperature": Infinity}', "Infinity"),
        (b"\xff", "UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": ' + b"1" * 10_000 + b"}", "invalid JSON"),
        (b'["a"]', "not a list"),
        (b"null", "not null"),
        (b'"a"', "not a string"),
        (b"{}", 'either "prompt" or "prompt_token_ids"'),
        (b'{"prompt": "a", "prompt_token_ids": [1]}', "not both"),
        (b'{"prompt": ["a"]}', '"prompt" must be a string, not a list'),
        (b'{"prompt": null}', "not null"),
        (b'{"prompt_token_ids": "5"}', "must be a list of integers, not a string"),
        (b'{"prompt": "\\ud800"}', "U+D800"),
        (b'{"prompt": "a", "tempreature": 1}', 'unknown key "tempreature"'),
        (b'{"prompt": "a", "logits_processors": []}', "unknown key"),
        (b'{"prompt": "a", "\\u001b[2J": 1}', "\\x1b[2J"),
        (b'{"prompt": "a", "temperature": -1}', "temperature"),
        (b'{"prompt": "a", "max_tokens": "5"}', "max_tokens"),
        (b'{"prompt": "a", "max_tokens": true}', "max_tokens"),
        (b'{"prompt": "a", "n": 0}', "n must"),
        (b'{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias"),
        (b'{"prompt": "a", "logit_bias": [1]}', "logit_bias"),
        (b'{"prompt": "a", "stop": 5}', "stop"),
        (b'{"prompt": "a", "stop_token_ids": [-1]}', "stop token id"),
    ],
)
def test_a_bad_line_is_named_and_the_others_stay(tmp_path: Path, line: bytes, message: str) -> None:
    before, bad, after = from_jsonl(tmp_path, b'{"prompt": "x"}\n' + line + b'\n{"prompt": "y"}\n')
    assert before.error is None
    assert after.error is None
    assert after.prompt == "y"
    assert bad.error is not None
    assert bad.error.startswith(f"{tmp_path / 'p.jsonl'}:2: ")
    assert message in bad.error


def test_an_empty_file_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no prompt"):
        from_jsonl(tmp_path, b"\n \n")


def test_jsonl_from_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, b'{"prompt": "a"}\n{}\n')
    good, bad = read_items(argparse.Namespace(prompts=[], input="-"), DEFAULTS)
    assert good.prompt == "a"
    assert bad.error is not None
    assert bad.error.startswith("<stdin>:2: ")


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
_keys = st.sampled_from(["prompt", "prompt_token_ids", "stop", "logit_bias", "max_tokens", "n", "seed", "top_p"])


@settings(max_examples=300, deadline=None)
@given(line=st.binary(max_size=60) | st.dictionaries(_keys, _json, max_size=4).map(lambda o: json.dumps(o).encode()))
def test_no_line_raises(line: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    items = from_jsonl(tmp_path_factory.mktemp("jsonl"), b'{"prompt": "x"}\n' + line)
    assert items[0].error is None
    for item in items:
        assert item.error is not None or isinstance(item.prompt, (str, list))
