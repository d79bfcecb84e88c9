"""What is known of one request when it is over."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

__all__ = ["INTERRUPTED", "RequestRecord"]

INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class RequestRecord:
    """Times in seconds of one clock; `sent` and `late` count from the beginning of the run and the planned arrival.

    Attributes:
        sent: when the request was sent first; all latencies count from here, waits before retries included.
        late: how much later that was than planned, which is the load generator's own fault; None where nothing was.
        end: when the last event came; None if none did.
        times: when each chunk with output came.
        prompt_tokens, cached_tokens: as the server counts them; None where it does not say.
        reported_tokens: of output, likewise.
        refusals: answers 429 that it had.
        error: the kind of failure, None for none; `message` says more.
    """

    index: int
    sent: float
    late: float | None
    end: float | None = None
    times: array[float] = field(default_factory=lambda: array("d"))
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    reported_tokens: int | None = None
    refusals: int = 0
    error: str | None = None
    message: str = ""

    @property
    def output_tokens(self) -> int:
        """As the server counts them, or as many as chunks came."""
        return len(self.times) if self.reported_tokens is None else self.reported_tokens

    @property
    def ttft(self) -> float | None:
        """Time to first token: the first chunk with output."""
        return self.times[0] - self.sent if self.times else None

    @property
    def e2el(self) -> float | None:
        """End-to-end latency: to the last event; None for a request that failed."""
        return None if self.error is not None or self.end is None else self.end - self.sent

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None for a request that failed or brought fewer than two."""
        if self.e2el is None or self.ttft is None or self.output_tokens < 2:
            return None
        return (self.e2el - self.ttft) / (self.output_tokens - 1)

    def gaps(self) -> list[float]:
        """Times between chunks with output."""
        return [later - earlier for earlier, later in pairwise(self.times)]

    def as_json(self) -> dict[str, Any]:
        """Everything that was measured."""
        gaps = self.gaps()
        return {
            "index": self.index,
            "error": self.error,
            "message": self.message,
            "sent_seconds": self.sent,
            "late_seconds": self.late,
            "ttft_seconds": self.ttft,
            "tpot_seconds": self.tpot,
            "e2el_seconds": self.e2el,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
            "chunks": len(self.times),
            "refusals": self.refusals,
            "longest_gap_seconds": max(gaps, default=None),
            "median_gap_seconds": median(gaps) if gaps else None,
            "gap_seconds": gaps,
        }
