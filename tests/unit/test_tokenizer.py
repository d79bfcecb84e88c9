"""What holds for any tokenizer: checks of what goes in, and decoding token by token."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tests.unit.tokenizer_files import FOLDER, byte_level, sentencepiece
from tinyllm.errors import InvalidRequestError, TokenizerError
from tinyllm.tokenizer import Tokenizer

MADE = {
    "byte level": Tokenizer.from_gguf(byte_level()),
    "llama": Tokenizer.from_gguf(sentencepiece("llama")),
    "gemma": Tokenizer.from_gguf(sentencepiece("gemma")),
    "llama 3 folder": Tokenizer.from_folder(FOLDER / "llama3"),
    "llama 2 folder": Tokenizer.from_folder(FOLDER / "llama2", vocab_size=600),
}


@pytest.fixture(params=MADE)
def made(request: pytest.FixtureRequest) -> Tokenizer:
    tokenizer = MADE[request.param]
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize("text", [b"bytes", None, 5, ["list"], ("a",)])
def test_a_text_must_be_a_string(made: Tokenizer, text: Any) -> None:
    with pytest.raises(InvalidRequestError, match="a text must be a string, not "):
        made.encode(text)


def test_a_lone_surrogate_is_named(made: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match=r"lone surrogate, U\+DC80, at character 2"):
        made.encode("ab\udc80c")


@pytest.mark.parametrize("bad", [-1, 10**6, 2**31, 1.0, 1.5, True, np.True_, "5", None, float("nan"), [1]])
def test_a_bad_id_is_named(made: Tokenizer, bad: Any) -> None:
    for attempt in (
        lambda: made.decode([5, bad]),
        lambda: made.token_text(bad),
        lambda: made.stream_decoder().push(bad),
    ):
        with pytest.raises(InvalidRequestError, match="token id") as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_ids_may_be_numpy_integers(made: Tokenizer) -> None:
    ids = made.encode("The quick brown fox")
    assert made.decode(np.array(ids, np.int32)) == made.decode(ids) == "The quick brown fox"  # type: ignore[arg-type]
    assert made.token_text(np.int64(ids[-1])) == made.token_text(ids[-1])  # type: ignore[arg-type]


def test_a_hopelessly_long_text_is_refused_before_it_is_encoded(made: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="a text of 3000000 bytes cannot fit into 64 tokens"):
        made.encode("\u4e16" * 1_000_000, max_tokens=64)
    ids = made.encode("The dog. " * 20)
    assert made.encode("The dog. " * 20, max_tokens=len(ids)) == ids


def test_without_a_template_there_is_no_chat() -> None:
    made = MADE["gemma"]
    assert made is not None and made.chat_template is None
    with pytest.raises(TokenizerError, match="no chat template"):
        made.apply_chat_template([{"role": "user", "content": "Hi"}])


@settings(deadline=None, max_examples=150)
@given(st.data(), st.booleans(), st.booleans())
def test_streaming_any_ids_equals_decoding_them(data: st.DataObject, skip: bool, continuation: bool) -> None:
    for tokenizer in MADE.values():
        assert tokenizer is not None
        special = st.sampled_from(sorted(tokenizer.special_token_ids))
        anything = st.integers(0, tokenizer.vocab_size - 1)
        written = st.text(max_size=4).map(lambda text, t=tokenizer: t.encode(text))  # type: ignore[misc]
        runs = st.one_of(written, st.lists(st.one_of(anything, st.integers(0, 260), special), max_size=6))
        ids = [i for run in data.draw(st.lists(runs, max_size=6)) for i in run]
        stream = tokenizer.stream_decoder(skip_special_tokens=skip, continuation=continuation)
        pieces = [stream.push(i) for i in ids] + [stream.flush()]
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip, continuation=continuation)
        kept = [i for i in ids if not (skip and i in tokenizer.special_token_ids)]
        assert continuation is False or "".join(pieces) == b"".join(map(tokenizer.token_bytes, kept)).decode(
            "utf-8", "replace"
        )


def test_no_piece_ends_inside_a_character(made: Tokenizer) -> None:
    text = "a\u00e9\u4e16\U0001f600b"
    stream = made.stream_decoder()
    pieces = [stream.push(i) for i in made.encode(text)]
    assert "".join(pieces) == text
    assert stream.flush() == ""
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces  # the bytes of one character that came before its last


def test_bytes_that_are_no_utf8(made: Tokenizer) -> None:
    lead = next(i for i in range(made.vocab_size) if made.token_bytes(i) == b"\xe4")
    letter = made.encode("x", add_special_tokens=False)[-1]
    assert made.decode([lead, letter]) == "\ufffdx"
    stream = made.stream_decoder()
    assert [stream.push(lead), stream.push(letter), stream.flush()] == ["", "\ufffdx", ""]
    stream = made.stream_decoder()
    assert [stream.push(lead), stream.flush()] == ["", "\ufffd"]


def test_every_token_has_bytes(made: Tokenizer) -> None:
    whole = b"".join(made.token_bytes(i) for i in range(made.vocab_size))
    assert re.search(rb"The", whole)
    assert {bytes([byte]) for byte in range(0x80, 0x100)} - {bytes([i]) for i in whole} <= {b"\xf1", b"\xf2"}
