"""The tokenizer that is trained, and corpus files as tokens."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer

from tests.training import runs
from training.config import ConfigError
from training.text import END_OF_TEXT, documents, encode_file, train_tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_corpus(tmp_path_factory.mktemp("text") / "corpus")


@pytest.fixture(scope="module")
def tokenizer(corpus: Path) -> Tokenizer:
    return train_tokenizer([corpus / "one.txt", corpus / "two.txt"], 300)


def test_the_vocabulary(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 300
    assert tokenizer.token_to_id(END_OF_TEXT) == 0
    assert sorted(tokenizer.get_vocab().values()) == list(range(300))
    assert len(tokenizer.encode("the hen", add_special_tokens=False).ids) < 4  # words of the corpus are merged


@given(st.text())
@settings(deadline=None)
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    if END_OF_TEXT in text:
        return
    ids = tokenizer.encode(text).ids
    assert ids[0] == 0
    assert 0 not in ids[1:]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


@pytest.mark.parametrize(
    "text", ["", " ", "  two  spaces\n\n\ttab ", "naïve 日本 🦊👩‍👩‍👧", "\x00\x7f\u2028", "a" * 999]
)
def test_texts_that_are_easily_lost(text: str, tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("size", [256, 100_000])
def test_a_vocabulary_that_the_corpus_does_not_give(size: int, corpus: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^the corpus gives \d+ tokens, not {size}$"):
        train_tokenizer([corpus / "one.txt"], size)


def test_documents_are_what_stands_between_the_marks(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(f"\n first\n\nstill first\n{END_OF_TEXT}\n\n{END_OF_TEXT}\nsecond{END_OF_TEXT}\n", encoding="utf-8")
    assert list(documents(path)) == ["first\n\nstill first", "second"]


def test_each_document_begins_with_the_mark(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path, out = tmp_path / "a.txt", tmp_path / "a.npy"
    texts = ["the fox met a hen", "and then\n\nran", "café"]
    path.write_text(f"\n{END_OF_TEXT}\n".join(texts), encoding="utf-8")
    count = encode_file(tokenizer, path, out)
    tokens = np.load(out, allow_pickle=False)
    assert tokens.dtype == np.uint16
    assert tokens.shape == (count,)
    starts = np.flatnonzero(tokens == 0)
    assert starts[0] == 0
    assert [tokenizer.decode(part.tolist()) for part in np.split(tokens, starts[1:])] == texts
    assert sorted(tmp_path.iterdir()) == [out, path]


def test_ids_above_two_to_the_fifteenth_are_kept(tmp_path: Path) -> None:
    class Encoding:
        ids = (0, 32768, 65535)

    class Encoder:
        def encode_batch_fast(self, texts: list[str]) -> list[Encoding]:
            return [Encoding()] * len(texts)

    (tmp_path / "a.txt").write_text("x")
    encode_file(cast(Tokenizer, Encoder()), tmp_path / "a.txt", tmp_path / "a.npy")
    assert np.load(tmp_path / "a.npy").tolist() == [0, 32768, 65535]


@pytest.mark.parametrize(
    ("content", "message"), [(None, "No such file"), (b"ab\xff", "is not UTF-8: byte 2"), (b" \n", "holds no text")]
)
def test_files_without_text(content: bytes | None, message: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as mistake:
        encode_file(tokenizer, path, tmp_path / "a.npy")
    assert str(path) in str(mistake.value)
    assert not (tmp_path / "a.npy").exists()
