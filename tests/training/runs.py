"""A tiny run: its description, a corpus, and the script run in this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from training.config import TrainingConfig

SCRIPTS = Path(__file__).parents[2] / "scripts"

# two stages of other extents, the second with two files; no product so large that BLAS takes several threads
CONTENT: Mapping[str, Any] = {
    "seed": 1,
    "model": {
        "vocab_size": 270, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16,
        "intermediate_size": 40,
    },
    "stages": [
        {"steps": 14, "sequences": 8, "length": 12, "sources": {"one": 1}},
        {"steps": 16, "sequences": 4, "length": 30, "sources": {"one": 1, "two": 2.5}},
    ],
    "lr": 0.01, "final_lr": 0.1, "warmup_steps": 5, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8,
    "clip": 1.0, "average_rate": 0.1, "shards": 4,
}  # fmt: skip


def content(**changes: Any) -> dict[str, Any]:
    """The tiny run as JSON's types, with changes at the top."""
    return {**deepcopy(dict(CONTENT)), **changes}


def config(**changes: Any) -> TrainingConfig:
    return TrainingConfig.parse(content(**changes))


def random_tokens(vocab_size: int = 270) -> dict[str, NDArray[np.uint16]]:
    rng = np.random.default_rng(0)
    sizes = {"one": 700, "two": 400, "valid": 200}
    return {name: rng.integers(vocab_size, size=size).astype(np.uint16) for name, size in sizes.items()}


# ---- the script


def write_corpus(folder: Path) -> Path:
    """Files of short documents, of few words and so easily learned."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    words = ["the", "a", "small", "old", "red", "fox", "hen", "saw", "met", "and", "then", "ran", "café", "—", "12"]
    for name, count in (("one", 60), ("two", 40), ("valid", 20)):
        documents = [" ".join(rng.choice(words, 25)) + "." for _ in range(count)]
        (folder / f"{name}.txt").write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    return folder


def write_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(content(**changes)))
    return path


def run_script(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    """train_bundled.py in this process."""
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "BLIS_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # the script sets them: they are put back after the test
    monkeypatch.setattr(sys, "argv", ["train_bundled.py", *map(str, arguments)])
    import_module("train_bundled").main()
