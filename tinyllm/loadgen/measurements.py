"""Everything that a run has measured so far, in bounded memory: numbers a request, and one for each chunk."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import asdict
from statistics import median
from typing import Any

from tinyllm.loadgen.record import INTERRUPTED, RequestRecord
from tinyllm.loadgen.statistics import Goodput, summarize

__all__ = ["Measurements"]

_MAX_KINDS = 100
_LATENCIES = ("ttft", "itl", "tpot", "e2el", "longest_gap", "late")


class Measurements:
    """Of requests that are over, each added once.

    Latencies are those of requests that completed; of those that the user interrupted, the times to first token and
    between tokens count too.
    """

    def __init__(self, goodput: Goodput) -> None:
        self.goodput = goodput
        self.begin = self.end = 0.0  # of the run, in seconds of the client's clock
        self.errors: Counter[str] = Counter()
        self.messages: dict[str, str] = {}  # of each kind of error, the first
        self.completed = self.interrupted = self.good = self.refusals = 0
        self.chunks = self.output_tokens = self.prompt_tokens = self.cached_tokens = 0
        self._of_known_prompts = self._counted_by_usage = self._counted_by_chunks = 0
        self._values = {name: array("d") for name in (*_LATENCIES, "gap_ratio")}

    def add(self, record: RequestRecord) -> None:
        self.refusals += record.refusals
        self._append("late", record.late)
        if record.error == INTERRUPTED:
            self.interrupted += 1
        elif record.error is not None:
            kind = record.error if record.error in self.errors or len(self.errors) < _MAX_KINDS else "others"
            self.errors[kind] += 1
            self.messages.setdefault(kind, record.message)
            return
        else:
            self.completed += 1
            self.good += self.goodput.is_met(record)
        self._count_tokens(record)
        for name in ("ttft", "tpot", "e2el"):
            self._append(name, getattr(record, name))
        gaps = record.gaps()
        self._values["itl"].extend(gaps)
        if gaps:
            longest, middle = max(gaps), median(gaps)
            self._append("longest_gap", longest)
            self._append("gap_ratio", longest / middle if middle > 0 else None)

    def _count_tokens(self, record: RequestRecord) -> None:
        self.chunks += len(record.times)
        self.output_tokens += record.output_tokens
        if record.reported_tokens is not None:
            self._counted_by_usage += 1
        elif record.times:
            self._counted_by_chunks += 1
        if record.prompt_tokens is not None:
            self.prompt_tokens += record.prompt_tokens
            self.cached_tokens += record.cached_tokens or 0
            self._of_known_prompts += 1

    def _append(self, name: str, value: float | None) -> None:
        if value is not None:
            self._values[name].append(value)

    @property
    def seconds(self) -> float:
        return self.end - self.begin

    @property
    def finished(self) -> int:
        """Requests that completed or failed by themselves."""
        return self.completed + self.errors.total()

    @property
    def counted_by(self) -> str:
        """Where counts of output tokens come from: "usage", the server's own, "chunks", "both" or "nothing"."""
        usage, chunks = bool(self._counted_by_usage), bool(self._counted_by_chunks)
        return "both" if usage and chunks else "usage" if usage else "chunks" if chunks else "nothing"

    def as_json(self) -> dict[str, Any]:
        """Durations in seconds, rates a second; None for what was not measured."""
        summaries = {name: summarize(values) for name, values in self._values.items()}
        shown = {name: None if summary is None else asdict(summary) for name, summary in summaries.items()}
        good = self.good if self.goodput.limits else None
        return {
            "duration_seconds": self.seconds,
            "requests": {
                "completed": self.completed,
                "failed": self.errors.total(),
                "interrupted": self.interrupted,
                "refusals": self.refusals,
            },
            "errors": {kind: {"count": n, "first": self.messages[kind]} for kind, n in self.errors.items()},
            "requests_per_second": self._rate(self.completed),
            "output_tokens_per_second": self._rate(self.output_tokens),
            "prompt_tokens_per_second": self._rate(self.prompt_tokens) if self._of_known_prompts else None,
            "output_tokens": self.output_tokens,
            "output_tokens_counted_by": self.counted_by,
            "chunks": self.chunks,
            "prompt_tokens": self.prompt_tokens if self._of_known_prompts else None,
            "cached_prompt_tokens": self.cached_tokens if self._of_known_prompts else None,
            "goodput": {
                "limits_ms": self.goodput.limits,
                "requests": good,
                "share": None if good is None or not self.finished else good / self.finished,
                "requests_per_second": None if good is None else self._rate(good),
            },
            **{f"{name}_seconds": shown[name] for name in _LATENCIES},
            "longest_to_median_gap": shown["gap_ratio"],
        }

    def _rate(self, count: int) -> float | None:
        return count / self.seconds if self.seconds > 0 else None
