"""Tokens of the corpus, and the batches that a run draws from them: a pure function of the configuration and the step.

A stage goes through each of its files in windows that do not overlap; a second pass over a file starts at another
offset, so that its windows differ. Windows of all files are shuffled together.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tinyllm.backends.base import I32Array
from training.config import ConfigError, Stage, TrainingConfig

__all__ = ["Batches", "load_tokens", "validation_windows"]

Tokens = NDArray[np.uint16]


def load_tokens(folder: Path) -> dict[str, Tokens]:
    """The token files (name.npy, uint16) of a folder, mapped into memory."""
    return {path.stem: _load_file(path) for path in sorted(folder.glob("*.npy"))}


def _load_file(path: Path) -> Tokens:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{path} holds no tokens: {error}") from error
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype != np.uint16:
        raise ConfigError(f"{path} holds no tokens: it must be one row of uint16")
    return tokens


def _windows_of(length: int, tokens: int, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """The first tokens of `count` windows of length + 1 tokens, pass after pass over a file."""
    passes: list[NDArray[np.int64]] = []
    while sum(map(len, passes)) < count:
        offset = int(rng.integers(min(length, tokens - length)))
        passes.append(rng.permutation(np.arange(offset, tokens - length, length)))
    return np.concatenate([np.empty(0, np.int64), *passes])[:count]


class Batches:
    """The batches of a run."""

    def __init__(self, config: TrainingConfig, tokens: dict[str, Tokens]) -> None:
        for i, stage in enumerate(config.stages):
            for name in stage.sources:
                if name not in tokens:
                    raise ConfigError(f"stage {i}: there are no tokens of {name!r}")
                if len(tokens[name]) <= stage.length:
                    raise ConfigError(f"stage {i}: {name!r} has {len(tokens[name])} tokens, fewer than a window")
        for name, file in tokens.items():
            if (highest := int(file.max(initial=0))) >= config.model.vocab_size:
                raise ConfigError(f"{name!r} has the token {highest}, and the vocabulary {config.model.vocab_size}")
        self._config, self._tokens = config, tokens
        self._planned: tuple[int, list[tuple[str, int]]] = (-1, [])

    def _plan(self, index: int) -> list[tuple[str, int]]:
        """(file, first token) of every window of a stage, in order."""
        if self._planned[0] != index:
            stage = self._config.stages[index]
            rng = np.random.Generator(np.random.Philox(key=[self._config.seed, index]))
            windows: list[tuple[str, int]] = []
            for name, count in self._counts(stage).items():
                starts = _windows_of(stage.length, len(self._tokens[name]), count, rng)
                windows += [(name, int(start)) for start in starts]
            order = rng.permutation(len(windows))
            self._planned = (index, [windows[i] for i in order])
        return self._planned[1]

    def _counts(self, stage: Stage) -> dict[str, int]:
        """How many windows of a stage come from each file."""
        shares = {name: weight * len(self._tokens[name]) for name, weight in sorted(stage.sources.items())}
        windows, whole = stage.steps * stage.sequences, sum(shares.values())
        counts = {name: int(windows * share / whole) for name, share in shares.items()}
        counts[max(shares, key=lambda name: shares[name])] += windows - sum(counts.values())
        return counts

    def at(self, step: int) -> I32Array:
        """The batch of a step, counted from 0: (sequences, length + 1)."""
        index, within = self._config.stage_at(step)
        stage = self._config.stages[index]
        windows = self._plan(index)[within * stage.sequences : (within + 1) * stage.sequences]
        return np.stack([self._tokens[name][start : start + stage.length + 1] for name, start in windows]).astype(
            np.int32
        )


def validation_windows(tokens: Tokens, length: int, most: int | None = None) -> I32Array:
    """(n, length + 1) windows that do not overlap, spread evenly over the file where there are more than `most`."""
    starts = np.arange(0, len(tokens) - length, length)
    if most is not None and len(starts) > most:
        starts = starts[np.linspace(0, len(starts) - 1, most).astype(np.int64)]
    return np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int32)
