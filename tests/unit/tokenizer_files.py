"""Small tokenizers for the tests, and what llama.cpp and transformers say about them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "fixtures" / "tokenizers"
PREFIX = "tokenizer.ggml."


@functools.cache
def fixture(name: str) -> Any:
    return json.loads((FOLDER / name).read_text())


def byte_level(pre: str = "gpt-2", **changes: object) -> dict[str, Any]:
    """GGUF metadata of a byte-level BPE; `changes` sets keys of tokenizer.ggml, and None removes one."""
    return changed({**fixture("byte_level.json")["metadata"], PREFIX + "pre": pre}, changes)


def sentencepiece(name: str = "llama", **changes: object) -> dict[str, Any]:
    """GGUF metadata of a SentencePiece BPE: "llama", "gemma" or "tied"."""
    return changed(fixture("sentencepiece.json")[name]["metadata"], changes)


def changed(metadata: dict[str, Any], changes: dict[str, object]) -> dict[str, Any]:
    merged = {**metadata, **{PREFIX + key: value for key, value in changes.items()}}
    return {key: value for key, value in merged.items() if value is not None}
