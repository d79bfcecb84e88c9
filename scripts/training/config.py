"""What a training run is: frozen, read from JSON, unknown keys rejected."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from training.parameters import ModelShape

__all__ = ["ConfigError", "Stage", "TrainingConfig"]


class ConfigError(Exception):
    """A mistake in the configuration, in one line."""


@dataclass(frozen=True)
class Stage:
    """A part of the run: its batches and what they are drawn from.

    Attributes:
        steps: optimiser steps.
        sequences, length: a batch is `sequences` windows of `length` tokens (and one more, the last one's target).
        sources: how often each file's tokens are seen, relative to the others; by the files' names without suffix.
    """

    steps: int
    sequences: int
    length: int
    sources: dict[str, float]

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.sequences * self.length


@dataclass(frozen=True)
class TrainingConfig:
    """One run, from the first step to the last.

    Attributes:
        shards: parts of a batch whose gradients are summed in order; the run's bits depend on it, and not on the
            number of threads, of which no more than this can work.
        lr: the peak, reached after warmup_steps; then a cosine down to lr * final_lr.
        clip: the gradient's norm is cut to this.
        average_rate: the exported weights move towards the current ones by this share in each step.
    """

    seed: int
    model: ModelShape
    stages: tuple[Stage, ...]
    lr: float
    final_lr: float
    warmup_steps: int
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    clip: float
    average_rate: float
    shards: int

    def __post_init__(self) -> None:
        if not self.stages:
            raise ConfigError("stages must not be empty")
        if self.shards < 1:
            raise ConfigError(f"shards must be positive, not {self.shards}")
        if not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"seed must be between 0 and 2**63 - 1, not {self.seed}")
        if self.model.vocab_size > 1 << 16:
            raise ConfigError(f"vocab_size must be at most 65536, not {self.model.vocab_size}: tokens are uint16")
        for i, stage in enumerate(self.stages):
            if min(stage.steps, stage.sequences, stage.length) < 1:
                raise ConfigError(f"stage {i}: steps, sequences and length must be positive")
            if stage.sequences % self.shards:
                raise ConfigError(f"stage {i}: {stage.sequences} sequences are no multiple of {self.shards} shards")
            if not _is_sources(stage.sources):
                raise ConfigError(f"stage {i}: sources must name files, with weights above 0")
        for name in ("lr", "clip", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")
        for name in ("final_lr", "weight_decay", "average_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be between 0 and 1, not {getattr(self, name)}")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ConfigError(f"warmup_steps must be between 0 and {self.steps}, not {self.warmup_steps}")

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return sum(stage.steps * stage.tokens for stage in self.stages)

    def tokens_after(self, step: int) -> int:
        """Tokens of the first `step` steps."""
        seen = 0
        for stage in self.stages:
            done = min(step, stage.steps)
            seen, step = seen + done * stage.tokens, step - done
        return seen

    def stage_at(self, step: int) -> tuple[int, int]:
        """(index of the stage, step within it) of a step, counted from 0."""
        for i, stage in enumerate(self.stages):
            if step < stage.steps:
                return i, step
            step -= stage.steps
        raise IndexError(f"the run has {self.steps} steps")

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0: linear warm-up, then a cosine (arXiv:1608.03983)."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.lr * (self.final_lr + (1 - self.final_lr) * cosine)

    def digest(self) -> str:
        """Names the run: two configurations with the same digest give the same bits."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def load(cls, path: Path) -> TrainingConfig:
        """Reads a JSON file. Raises ConfigError."""
        try:
            content = json.loads(path.read_text())
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from error
        return cls.parse(content)

    @classmethod
    def parse(cls, content: Any) -> TrainingConfig:
        values = _checked(cls, content, "the configuration")
        try:
            model = ModelShape(**_checked(ModelShape, values.pop("model"), "model"))
        except ValueError as error:
            raise ConfigError(f"model: {error}") from error
        if not isinstance(stages := values.pop("stages"), list):
            raise ConfigError("stages must be a list")
        parsed = tuple(Stage(**_checked(Stage, stage, f"stage {i}")) for i, stage in enumerate(stages))
        return cls(model=model, stages=parsed, **values)


def _is_sources(value: Any) -> bool:
    if not isinstance(value, dict) or not value:
        return False
    return all(type(weight) in (int, float) and 0 < weight < math.inf for weight in value.values())


def _checked(kind: Any, content: Any, where: str) -> dict[str, Any]:
    """content as arguments of a dataclass: its own names, numbers where numbers are due."""
    if not isinstance(content, dict):
        raise ConfigError(f"{where} must be an object")
    known = {field.name: field for field in fields(kind)}
    if unknown := set(content) - set(known):
        raise ConfigError(f"{where} has no {sorted(unknown)[0]!r}")
    for name, field in known.items():
        if name not in content:
            if field.default is MISSING:
                raise ConfigError(f"{where} lacks {name!r}")
        elif field.type in ("int", "float"):
            kinds = (int,) if field.type == "int" else (int, float)
            if isinstance(content[name], bool) or not isinstance(content[name], kinds):
                raise ConfigError(f"{where}: {name} must be a number, not {content[name]!r}")
    return dict(content)
