"""What crosses between the event loop and the engine's thread: jobs one way, chunks and outputs the other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tinyllm.engine.sequence import Task
from tinyllm.outputs import RequestOutput, StreamChunk
from tinyllm.sampling_params import SamplingParams
from tinyllm.server.errors import ApiError

__all__ = ["Delivery", "Job", "Submission"]


@dataclass(frozen=True)
class Job:
    """One request to the engine, checked already: its token ids, and how they are continued."""

    token_ids: list[int]
    params: SamplingParams
    task: Task = Task.GENERATE
    prompt: str | None = None


@dataclass(frozen=True)
class Delivery:
    """Something that came for job number `index` of a submission; an output or an error is the last of its job."""

    index: int
    item: StreamChunk | RequestOutput | ApiError


@dataclass(eq=False)
class Submission:
    """The jobs of one HTTP request, which start together, and the mailbox for what they bring.

    All methods are for the event loop that it was made on. A slow reader finds more at once; in all no more than its
    requests may generate.
    """

    jobs: list[Job]
    abort_jobs: Callable[[Submission], None]
    arrival_time: float = field(default_factory=time.monotonic)
    num_open: int = field(init=False)
    _items: list[Delivery] = field(default_factory=list)
    _ready: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.num_open = len(self.jobs)

    def deliver(self, items: list[Delivery]) -> None:
        """Adds to the mailbox."""
        self._items += items
        self._ready.set()

    async def take(self) -> list[Delivery]:
        """All that came since the last call, in order; waits for something. Empty when all jobs have ended."""
        while not self._items:
            if self.num_open == 0:
                return []
            self._ready.clear()
            await self._ready.wait()
        items, self._items = self._items, []
        self.num_open -= sum(not isinstance(delivery.item, StreamChunk) for delivery in items)
        return items

    async def outputs(self) -> list[RequestOutput]:
        """Waits for all jobs. Raises the first ApiError that comes, with the others aborted."""
        found: dict[int, RequestOutput] = {}
        while deliveries := await self.take():
            for delivery in deliveries:
                if isinstance(delivery.item, ApiError):
                    self.abort()
                    raise delivery.item
                if isinstance(delivery.item, RequestOutput):
                    found[delivery.index] = delivery.item
        return [found[index] for index in range(len(self.jobs))]

    def abort(self) -> None:
        """Ends what still runs, before the engine's next step; its blocks are free then."""
        if self.num_open:
            self.abort_jobs(self)
