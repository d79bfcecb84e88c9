"""From many numbers to a few: means and percentiles; and which requests were good enough."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinyllm.loadgen.errors import LoadError
from tinyllm.loadgen.record import RequestRecord

__all__ = ["PERCENTILES", "Goodput", "Summary", "summarize"]

PERCENTILES = (50, 95, 99)
_LIMIT = re.compile(r"(ttft|tpot|e2el|gap):([0-9]{1,9}(?:\.[0-9]{1,9})?)", re.ASCII)


@dataclass(frozen=True)
class Summary:
    """Of `count` numbers, in their own unit."""

    count: int
    mean: float
    p50: float
    p95: float
    p99: float
    min: float
    max: float


def summarize(values: Sequence[float]) -> Summary | None:
    """None for no values.

    The percentile p of n sorted values lies at position p / 100 x (n - 1), counted from 0, on the straight line between
    the two neighbours: numpy's "linear", Hyndman and Fan's type 7. That of one value is the value.
    """
    if not len(values):
        return None
    numbers = np.asarray(values, np.float64)
    p50, p95, p99 = np.percentile(numbers, PERCENTILES).tolist()
    return Summary(len(numbers), float(numbers.mean()), p50, p95, p99, float(numbers.min()), float(numbers.max()))


@dataclass(frozen=True)
class Goodput:
    """The limits that a good request keeps, in milliseconds by the measure's name: ttft, tpot, e2el, and gap, the
    longest time between two chunks."""

    limits: dict[str, float]

    @classmethod
    def parse(cls, text: str) -> Goodput:
        """From "ttft:500,tpot:50"; "" has no limits. Raises LoadError."""
        limits: dict[str, float] = {}
        for part in text.split(",") if text else ():
            match = _LIMIT.fullmatch(part.strip())
            if match is None or match[1] in limits:
                raise LoadError(
                    f"--goodput takes milliseconds such as ttft:500,tpot:50,e2el:9000,gap:300, not {text!r}"
                )
            limits[match[1]] = float(match[2])
        return cls(limits)

    def is_met(self, record: RequestRecord) -> bool:
        """Whether it completed and kept every limit. A measure that it does not have, as the tpot of one token, keeps
        any, but for the first token, which must have come."""
        if record.error is not None:
            return False
        values = {
            "ttft": math.inf if record.ttft is None else record.ttft,
            "tpot": record.tpot,
            "e2el": record.e2el,
            "gap": max(record.gaps(), default=None) if "gap" in self.limits else None,
        }
        return all(1e3 * (values[name] or 0.0) <= limit for name, limit in self.limits.items())
