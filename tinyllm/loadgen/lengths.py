"""How long prompts and outputs are: mixtures of fixed, uniform and log-normal lengths."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinyllm.loadgen.errors import LoadError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["MAX_LENGTH", "Lengths"]

MAX_LENGTH = 1 << 20  # tokens
_MAX_PARTS = 64
_PART = re.compile(r"(lognormal:)?([0-9]{1,9})(?::([0-9]{1,9}))?(?:@([0-9]{1,9}(?:\.[0-9]{1,9})?))?", re.ASCII)
_Z95 = 1.96  # a normal variable is within so many deviations of its mean 95% of the time


@dataclass(frozen=True)
class _Part:
    """Lengths from `low` to `high`, both included."""

    low: int
    high: int
    weight: float
    log_normal: bool

    def draw(self, random: np.random.Generator) -> int:
        if not self.log_normal:
            return int(random.integers(self.low, self.high + 1))
        middle, width = math.log(self.low * self.high) / 2, math.log(self.high / self.low) / 2
        value = math.exp(random.normal(middle, width / _Z95))
        return min(max(round(value), self.low), self.high)


@dataclass(frozen=True)
class Lengths:
    """A distribution of lengths in tokens, as an option writes it.

    `text` is one or more parts between commas: N, LOW:HIGH (uniform, both included) or lognormal:LOW:HIGH (95% of its
    draws lie between the two, the rest are set to the nearer one), each with @WEIGHT where the parts are not equally
    likely. "32:128@15,8000" is a long prompt among fifteen short ones, on average.
    """

    text: str
    parts: tuple[_Part, ...]

    @classmethod
    def parse(cls, text: str, option: str) -> Lengths:
        """Raises LoadError that names the option."""
        parts = tuple(_parse_part(part, text, option) for part in text.split(",")[: _MAX_PARTS + 1])
        if len(parts) > _MAX_PARTS:
            raise LoadError(f"{option} has more than {_MAX_PARTS} parts")
        if not any(part.weight for part in parts):
            raise LoadError(f"{option}: the weights of {text!r} are all zero")
        return cls(text, parts)

    @property
    def longest(self) -> int:
        return max(part.high for part in self.parts)

    def draw(self, random: np.random.Generator) -> int:
        """One length, from 1 to MAX_LENGTH."""
        if len(self.parts) == 1:
            return self.parts[0].draw(random)
        point = random.random() * sum(part.weight for part in self.parts)
        for part in self.parts:
            point -= part.weight
            if point < 0:
                return part.draw(random)
        return self.parts[-1].draw(random)  # what rounding may leave


def _parse_part(part: str, text: str, option: str) -> _Part:
    match = _PART.fullmatch(part.strip())
    if match is None or (match[1] and not match[3]):
        raise LoadError(f"{option} takes lengths such as 128, 32:512 or lognormal:32:512, not {text!r}")
    low = int(match[2])
    high = int(match[3] or low)
    if not 1 <= low <= high <= MAX_LENGTH:
        raise LoadError(f"{option}: lengths go from 1 to {MAX_LENGTH}, the smaller first, not {part.strip()!r}")
    return _Part(low, high, float(match[4] or 1), bool(match[1]))
