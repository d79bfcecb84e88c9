"""The tokenizer: byte-level BPE trained on the corpus with `tokenizers`, and the corpus as tokens.

A file holds documents, divided by lines that say <|endoftext|>. Each becomes <|endoftext|> and its tokens, so that the
token starts a document and ends the one before.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from training.config import ConfigError

__all__ = ["END_OF_TEXT", "documents", "encode_file", "train_tokenizer"]

END_OF_TEXT = "<|endoftext|>"


def documents(path: Path) -> Iterator[str]:
    """The documents of a corpus file, without the blank space around them."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: byte {error.start}") from error
    for document in text.split(END_OF_TEXT):
        if stripped := document.strip():
            yield stripped


def train_tokenizer(files: list[Path], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: any text can be encoded, and decoded again as it was. <|endoftext|> is token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d for path in files for d in documents(path)), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ConfigError(f"the corpus gives {tokenizer.get_vocab_size()} tokens, not {vocab_size}")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", pair=f"{END_OF_TEXT} $A $B", special_tokens=[(END_OF_TEXT, 0)]
    )
    return tokenizer


def encode_file(tokenizer: Tokenizer, path: Path, out: Path) -> int:
    """Writes the tokens of a corpus file as uint16; returns how many."""
    encodings = tokenizer.encode_batch_fast(list(documents(path)))
    if not encodings:
        raise ConfigError(f"{path} holds no text")
    tokens = np.concatenate([np.array(e.ids, np.uint16) for e in encodings])
    partial = out.with_name(out.name + ".partial")
    with partial.open("wb") as file:
        np.save(file, tokens)
    os.replace(partial, out)
    return len(tokens)
