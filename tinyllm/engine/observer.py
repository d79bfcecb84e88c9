"""What someone who watches an engine is told: enough to draw a run, or to repeat it."""

from __future__ import annotations

from typing import Protocol

from tinyllm.backends.base import F32Array
from tinyllm.engine.scheduler import SchedulerOutput
from tinyllm.engine.sequence import Request, Sequence

__all__ = ["EngineObserver"]


class EngineObserver(Protocol):
    """Called by LLMEngine in the order in which things happen. It must not change what it is given."""

    @property
    def wants_logits(self) -> bool:
        """Whether logits_used is to be called; every row of logits is then brought to the host. Asked at each step."""
        ...

    def request_added(self, request: Request) -> None:
        """A request has entered the queue."""
        ...

    def request_aborted(self, request: Request) -> None:
        """A request was ended from outside, between steps; its blocks are free again."""
        ...

    def logits_used(self, sequence: Sequence, position: int, logits: F32Array) -> None:
        """logits (V,), valid during the call: what follows the sequence's token at `position`."""
        ...

    def step_finished(self, output: SchedulerOutput, finished: list[Request]) -> None:
        """A step has run: tokens are appended, and the requests in `finished` have left the engine."""
        ...

    def step_undone(self) -> None:
        """A step failed or was interrupted: what it scheduled will be computed again, and blocks changed hands."""
        ...
