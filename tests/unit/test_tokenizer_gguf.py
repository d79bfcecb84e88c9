"""Tokenizers from GGUF metadata: llama.cpp's ids, and damaged metadata."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tests.unit.tokenizer_files import PREFIX, byte_level, fixture, sentencepiece
from tinyllm.errors import InvalidRequestError, TokenizerError
from tinyllm.tokenization.gguf import SpecialTokens
from tinyllm.tokenization.sentencepiece import MAX_SEGMENT_CHARS, SentencePieceBPE
from tinyllm.tokenizer import Tokenizer
from weights import open_checkpoint

PRE_TOKENIZERS = ["gpt-2", *fixture("byte_level.json")["differing"]]


def tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    made = Tokenizer.from_gguf(metadata)
    assert made is not None
    return made


def assert_same_ids(made: Tokenizer, texts: list[str], expected: list[list[int]]) -> None:
    wrong = {
        text: (made.encode(text), ids) for text, ids in zip(texts, expected, strict=True) if made.encode(text) != ids
    }
    assert not wrong


# -- llama.cpp's ids ---------------------------------------------------------------------------------------------


@pytest.mark.network
def test_smollm2_has_llama_cpps_ids(smollm2_path: Path) -> None:
    with open_checkpoint(smollm2_path) as checkpoint:
        made = tokenizer(dict(checkpoint.metadata))
    expected = fixture("smollm2.json")
    assert_same_ids(made, fixture("texts.json"), expected["ids"])
    assert sorted(made.eos_token_ids) == expected["ends"]
    assert made.eos_token_ids[0] == made.eos_token_id == 2
    assert (made.vocab_size, made.bos_token_id) == (49152, 1)
    chat = made.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert made.encode(chat, add_special_tokens=False).count(1) == 3
    assert made.decode(made.encode("caf\u00e9 \U0001f600 123")) == "caf\u00e9 \U0001f600 123"


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_byte_level_has_llama_cpps_ids(pre: str) -> None:
    expected = fixture("byte_level.json")
    changes = expected["differing"].get(pre, {})
    ids = [changes.get(str(i), row) for i, row in enumerate(expected["ids"])]
    made = tokenizer(byte_level(pre))
    assert_same_ids(made, fixture("texts.json"), ids)
    assert sorted(made.eos_token_ids) == expected["ends"]


def test_every_pre_tokenizer_of_the_fixture_differs() -> None:
    assert all(fixture("byte_level.json")["differing"].values())


@pytest.mark.parametrize(("alias", "pre"), [("llama3", "llama-bpe"), ("starcoder", "smollm"), ("olmo", "gpt-2")])
def test_aliases_of_pre_tokenizers(alias: str, pre: str) -> None:
    one, other = tokenizer(byte_level(alias)), tokenizer(byte_level(pre))
    assert all(one.encode(text) == other.encode(text) for text in fixture("texts.json"))


def test_a_missing_pre_tokenizer_is_the_default_one() -> None:
    text = "a-b 12345"
    assert tokenizer(byte_level(pre=None)).encode(text) == tokenizer(byte_level("default")).encode(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama", "gemma", "tied"])
def test_sentencepiece_has_llama_cpps_ids(name: str) -> None:
    expected = fixture("sentencepiece.json")[name]
    made = tokenizer(sentencepiece(name))
    assert_same_ids(made, expected["texts"] or fixture("texts.json"), expected["ids"])
    assert sorted(made.eos_token_ids) == expected["ends"]


def test_numeric_arrays_may_be_numpy_arrays() -> None:
    lists = sentencepiece("llama")
    arrays = {
        **lists,
        PREFIX + "scores": np.array(lists[PREFIX + "scores"], np.float32),
        PREFIX + "token_type": np.array(lists[PREFIX + "token_type"], np.int32),
        PREFIX + "bos_token_id": np.uint32(1),
        PREFIX + "add_bos_token": np.bool_(True),
    }
    assert tokenizer(arrays).encode("The dog \u4e16") == tokenizer(lists).encode("The dog \u4e16")


# -- SentencePiece's merges --------------------------------------------------------------------------------------


def merged_slowly(text: str, scores: dict[str, float]) -> list[str]:
    """The definition: while some pair of neighbours is a token, the best-scored one merges, the leftmost of equals."""
    symbols = list(text)
    while True:
        pairs = [(-scores[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in scores]
        if not pairs:
            return symbols
        _, i = min(pairs)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


LETTERS = st.text("ab\u2581", min_size=1, max_size=5)


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(LETTERS, st.integers(-3, 3).map(float), max_size=25), st.text("ab ", max_size=120))
def test_sentencepiece_merges_as_defined(scores: dict[str, float], text: str) -> None:
    tokens = [*scores, *(char for char in "ab\u2581" if char not in scores)]
    bpe = SentencePieceBPE(tokens, [scores.get(token, -100.0) for token in tokens], [-1] * 256, None)
    known = {token: score for token, score in scores.items() if len(token) > 1}
    expected = merged_slowly(text.replace(" ", "\u2581"), known)
    assert [tokens[i] for i in bpe.encode(text)] == expected
    assert [tokens[i] for i in bpe.encode(text)] == expected  # the same when words come from the cache


def test_words_split_only_where_no_token_goes_on() -> None:
    tokens = ["\u2581", "a", "b", "ab\u2581", "b\u2581", "\u2581a", "b\u2581a"]
    bpe = SentencePieceBPE(tokens, [-9, -9, -9, -1, -2, -4, -5], [-1] * 256, None)
    assert [tokens[i] for i in bpe.encode("ab a")] == ["ab\u2581", "a"]
    assert [tokens[i] for i in bpe.encode("b a")] == ["b\u2581a"]
    only = SentencePieceBPE(["\u2581", "a", "b", "ab", "ab\u2581"], [-1] * 5, [-1] * 256, None)
    assert only.encode("ab ab") == [4, 3]
    assert [tokens[i] for i in bpe.encode("a a" * 50)] == ["a", *["\u2581a", "a"] * 49, "\u2581a"]


def test_a_character_without_a_token_falls_back_to_bytes_then_to_unknown() -> None:
    bpe = SentencePieceBPE(["<unk>", "a", "<0xC3>"], [0.0] * 3, [-1] * 0xC3 + [2] + [-1] * 60, 0)
    assert bpe.encode("a\u00e9") == [1, 2, 0]
    assert SentencePieceBPE(["a"], [0.0], [-1] * 256, None).encode("\u00e9a") == [0]


def test_a_long_run_without_a_break_is_refused_and_shorter_ones_are_not() -> None:
    made = tokenizer(sentencepiece("tied"))
    with pytest.raises(InvalidRequestError, match=f"a run of {MAX_SEGMENT_CHARS + 1} characters"):
        made.encode("a" * (MAX_SEGMENT_CHARS + 1))
    assert len(made.encode("\u4e16" * 300_000)) == 900_000  # no token has two of these, so it is no run


# -- special tokens in the text ----------------------------------------------------------------------------------


def test_special_tokens_are_found_longest_first() -> None:
    find = SpecialTokens({"<a>": 0, "<a><b>": 1, "><": 2, "b": 3}).partition
    assert find("") == []
    assert find("x<a>y") == ["x", 0, "y"]
    assert find("<a><b><a>") == [1, 0]
    assert find("<a><a>") == [0, 0]  # "<a>" takes its places before "><" is looked for
    assert find("-><bb") == ["-", 2, 3, 3]
    assert find("nothing") == ["nothing"]


def test_space_goes_before_text_that_starts_or_follows_a_special_token() -> None:
    made = tokenizer(sentencepiece("llama"))
    ids = made.encode("a<end_of_turn>a", add_special_tokens=False)
    assert ids[: len(ids) // 2] == ids[-(len(ids) // 2) :]
    assert made.encode("a") == [1, *ids[: len(ids) // 2]]


def test_bos_and_eos_are_added_as_the_model_asks() -> None:
    assert tokenizer(byte_level(add_bos_token=True, add_eos_token=True)).encode("") == [1, 2]
    assert tokenizer(byte_level(add_bos_token=True)).encode("", add_special_tokens=False) == []
    assert tokenizer(byte_level("llama-bpe")).encode("") == [1]  # these pre-tokenizers imply it
    assert tokenizer(byte_level("llama-bpe", add_bos_token=False)).encode("") == []
    assert tokenizer(byte_level()).encode("") == []
    assert tokenizer(sentencepiece()).encode("") == [1]


# -- decoding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metadata", [byte_level(), sentencepiece("llama"), sentencepiece("gemma")])
def test_decoding_gives_the_text_back(metadata: dict[str, Any]) -> None:
    made = tokenizer(metadata)
    special = [
        metadata[PREFIX + "tokens"][i] for i, kind in enumerate(metadata[PREFIX + "token_type"]) if kind in (3, 4)
    ]
    lost = ("\x04", "\x06", "\U00050000")  # bytes that the byte-level vocabulary lacks
    for text in fixture("texts.json"):
        if any(char in text for char in lost) or "\u2581" in text or "<0x" in text:
            continue
        decoded = made.decode(made.encode(text, add_special_tokens=False), skip_special_tokens=False)
        if any(token in text for token in special):  # where the text after it gets a space of its own
            assert decoded.replace(" ", "") == text.replace(" ", "")
        else:
            assert decoded == text


def test_tokens_as_text_and_bytes() -> None:
    made = tokenizer(sentencepiece())
    tokens = sentencepiece()[PREFIX + "tokens"]
    byte, the = tokens.index("<0xE4>"), tokens.index("\u2581the")
    assert made.token_bytes(byte) == b"\xe4"
    assert made.token_text(byte) == "\ufffd"
    assert made.token_text(the) == " the"
    assert made.token_text(1) == "<s>"
    assert made.decode([1, the, the]) == "the the"
    assert made.decode([the, the], continuation=True) == " the the"
    assert made.decode([1, the], skip_special_tokens=False) == "<s> the"
    assert made.special_token_ids == {0, 1, 2, tokens.index("<end_of_turn>")}


# -- damaged metadata --------------------------------------------------------------------------------------------


def test_no_tokenizer() -> None:
    assert Tokenizer.from_gguf({}) is None
    assert Tokenizer.from_gguf({PREFIX + "model": "none"}) is None


TOKENS: list[str] = byte_level()[PREFIX + "tokens"]
LAST = len(TOKENS) - 1
SPM_TOKENS: list[str] = sentencepiece()[PREFIX + "tokens"]
SPM_TYPES: list[int] = sentencepiece()[PREFIX + "token_type"]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (byte_level(model="bert"), "'bert' is not supported"),
        (byte_level(model=7), "'7' is not supported"),
        (byte_level("nonsense"), "unknown pre-tokenizer 'nonsense'"),
        (byte_level(pre=3), "pre must be a str, not int"),  # type: ignore[arg-type]
        (byte_level(tokens=None), "no tokenizer.ggml.tokens"),
        (byte_level(tokens=[]), "tokens is empty"),
        (byte_level(tokens="abc"), "array of strings"),
        (byte_level(tokens=[*TOKENS[:-1], b"x"]), "array of strings"),
        (byte_level(tokens=[*TOKENS[:-1], TOKENS[9]]), "twice"),
        (byte_level(tokens=[*TOKENS[:-1], "\ud800"]), "not valid Unicode"),
        (byte_level(tokens=[*TOKENS[:-1], "\x00"]), r"U\+0000"),
        (byte_level(token_type=[1]), f"1 entries for {len(TOKENS)} tokens"),
        (byte_level(token_type=[1.5] * len(TOKENS)), "no array of numbers"),
        (byte_level(token_type=["a"] * len(TOKENS)), "no array of numbers"),
        (byte_level(token_type=[[1], [1, 2]]), "no array of numbers"),
        (byte_level(token_type=[10**30] * len(TOKENS)), "no array of numbers"),
        (byte_level(merges=None), "no tokenizer.ggml.merges"),
        (byte_level(merges=["ab"]), "'ab', which is not a pair"),
        (byte_level(merges=["x nosuchtoken"]), "nosuchtoken"),
        (byte_level(merges=["q z"]), "qz"),
        (byte_level(merges=["a \ud800"]), "cannot be built"),
        (byte_level(merges=[1, 2]), "array of strings"),
        (byte_level(bos_token_id="1"), "bos_token_id must be an integer, not str"),
        (byte_level(bos_token_id=True), "bos_token_id must be an integer, not bool"),
        (byte_level(add_bos_token=1), "add_bos_token must be a bool, not int"),
        ({**byte_level(), "tokenizer.chat_template": 1}, "chat_template must be a string"),
        (sentencepiece(scores=None), "no tokenizer.ggml.scores"),
        (sentencepiece(scores=[0.0]), "1 entries for 640 tokens"),
        (sentencepiece(scores=[math.nan] * 640), "NaN"),
        (sentencepiece(tokens=[*SPM_TOKENS[:-1], "<0xZZ>"], token_type=[*SPM_TYPES[:-1], 6]), "'<0xZZ>' as a byte"),
        (sentencepiece(tokens=[*SPM_TOKENS[:-1], "byte"], token_type=[*SPM_TYPES[:-1], 6]), "'byte' as a byte"),
        (sentencepiece(add_space_prefix="yes"), "add_space_prefix must be a bool"),
    ],
)
def test_damaged_metadata_is_named_on_one_line(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.from_gguf(metadata)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_ids_out_of_range_count_as_absent() -> None:
    made = tokenizer(byte_level(bos_token_id=len(TOKENS), eos_token_id=2**31, add_bos_token=True))
    assert (made.bos_token_id, made.eos_token_id) == (None, None)
    assert made.encode("") == []


def test_an_empty_token_gets_a_name() -> None:
    assert tokenizer(byte_level(tokens=[*TOKENS[:-1], ""])).token_text(LAST) == f"[EMPTY_{LAST}]"


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=4),
    st.lists(st.text(max_size=3), max_size=8),
    st.lists(st.integers(-5, 9), max_size=8), st.lists(st.floats(), max_size=8), st.just(TOKENS),
)  # fmt: skip
KEYS = ["model", "pre", "tokens", "token_type", "scores", "merges", "bos_token_id", "add_bos_token", "add_space_prefix"]


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4), st.booleans(), st.text(max_size=20))
def test_any_metadata_gives_a_tokenizer_or_a_tokenizer_error(changes: dict[str, object], bpe: bool, text: str) -> None:
    try:
        made = Tokenizer.from_gguf(byte_level(**changes) if bpe else sentencepiece(**changes))  # type: ignore[arg-type]
    except TokenizerError:
        return
    if made is not None:
        ids = made.encode(text)
        assert all(0 <= i < made.vocab_size for i in ids)
        made.decode(ids)
