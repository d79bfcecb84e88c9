"""Tells viewers what the engine does; while there are none, it is not there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from tinyllm.engine.llm_engine import LLMEngine
from tinyllm.engine.sequence import Request, Sequence
from tinyllm.recording.events import Abort, Event, Interruption, RequestAdded, Step
from tinyllm.recording.watcher import Watcher
from tinyllm.server.live.facts import ModelFacts
from tinyllm.server.live.guard import Guard
from tinyllm.server.live.messages import block_states, message, step_fields
from tinyllm.server.live.viewer import Viewer

__all__ = ["LiveFeed"]


class LiveFeed:
    """The engine's events for any number of viewers. It watches the engine only while someone watches it.

    All of it but num_viewers and close belongs to the engine's thread, between two steps.

    Args:
        is_paused: whether the engine takes no steps by itself at present.
    """

    def __init__(self, engine: LLMEngine, facts: ModelFacts, *, is_paused: Callable[[], bool] = lambda: False) -> None:
        self._is_paused = is_paused
        self._engine = engine
        self._facts = facts
        self._viewers: dict[Viewer, None] = {}
        self._watcher: Watcher | None = None
        self._guard: Guard | None = None
        self._numbers: dict[str, int] = {}  # of the requests that the watcher may name
        self._step_begin = 0.0

    @property
    def num_viewers(self) -> int:
        return len(self._viewers)

    def attach(self, viewer: Viewer) -> None:
        """Gives a viewer the state, and from now on every event."""
        if self._watcher is None:
            self._watcher = self._watch()
            self._guard = Guard(self._watcher, self._give_up)
            self._engine.observers = [*self._engine.observers, self._guard]
            self._step_begin = 0.0
        self._viewers[viewer] = None
        viewer.begin(message("state", self._state(self._watcher)))

    def resync(self, viewer: Viewer) -> None:
        """Gives a viewer that lost events the state."""
        if viewer in self._viewers and self._watcher is not None:
            viewer.begin(message("state", self._state(self._watcher)))

    def detach(self, viewer: Viewer) -> None:
        self._viewers.pop(viewer, None)
        if not self._viewers and self._watcher is not None:
            self._leave()

    def _leave(self) -> None:
        # a list of its own: the engine may be going through the other one
        self._engine.observers = [other for other in self._engine.observers if other is not self._guard]
        self._watcher = self._guard = None
        self._numbers = {}

    def _give_up(self) -> None:
        """The watcher has failed, which is a bug: whoever watches comes again, and gets another."""
        self.close()
        self._viewers = {}
        self._leave()

    def close(self) -> None:
        """Ends all viewers' streams, so that a server can stop; from any thread."""
        for viewer in list(self._viewers):
            viewer.close()

    def state(self) -> dict[str, Any]:
        """The fields of a state message, as of now."""
        if self._watcher is not None:
            return self._state(self._watcher)
        state = self._state(self._watch())
        self._numbers = {}
        return state

    def pause_changed(self) -> None:
        """To be called when the engine's thread was paused or goes on."""
        self.step_requested()
        self._send("paused", {"paused": self._is_paused()})

    def step_requested(self) -> None:
        """The next step's duration counts from here, not from the end of the step before."""
        if self._watcher is not None:
            self._step_begin = time.monotonic() - self._watcher.begin

    # ---- events

    def _watch(self) -> Watcher:
        watcher = Watcher(self._engine, self._tell, digest=False)
        self._numbers = {name: sequence.request.arrival for name, _, sequence in watcher.sequences}
        return watcher

    def _tell(self, event: Event) -> None:
        assert self._watcher is not None
        if isinstance(event, Step):
            self._number_parked()
            self._send("step", step_fields(event, self._numbers, event.at - self._step_begin))
            self._step_begin = event.at
            self._forget_numbers()
        elif isinstance(event, RequestAdded):
            request = self._engine.requests[event.request_id]
            self._numbers[event.request_id] = request.arrival
            if len(self._engine.requests) == 1:  # the engine had nothing to do until now
                self._step_begin = event.at
            sequences = request.params.num_sequences
            self._send("request", _request(request) | {"at": event.at, "sequences": sequences})
        elif isinstance(event, Abort):
            self._number_parked()
            number = self._numbers[event.request_id]
            blocks = block_states(self._watcher.take_block_changes(), self._numbers)
            self._send("abort", {"abort": number, "at": event.at, "blocks": blocks} | self._counts())
        elif isinstance(event, Interruption):
            self._number_parked()
            self._watcher.take_block_changes()
            state = message("state", self._state(self._watcher))
            for viewer in self._viewers:
                viewer.begin(state)

    def _send(self, event: str, fields: dict[str, Any]) -> None:
        if self._viewers:
            text = message(event, fields)
            for viewer in self._viewers:
                viewer.push(text)

    # ---- parts

    def _state(self, watcher: Watcher) -> dict[str, Any]:
        self._number_parked()
        manager = self._engine.block_manager
        requests: dict[Request, list[list[Any]]] = {request: [] for request in self._engine.requests.values()}
        for _, index, sequence in watcher.sequences:
            if sequence.request in requests:
                requests[sequence.request].append(_sequence(index, sequence))
        return {
            **asdict(self._facts),
            "num_blocks": manager.num_blocks,
            "block_size": manager.block_size,
            "steps": self._engine.num_steps,
            "at": round(time.monotonic() - watcher.begin, 6),
            "paused": self._is_paused(),
            "requests": [
                {
                    **_request(request),
                    "at": round(request.arrival_time - watcher.begin, 6),
                    "first": _since(request.first_token_time, watcher.begin),
                    "sequences": sequences,
                }
                for request, sequences in requests.items()
            ],
            "blocks": block_states(watcher.blocks(), self._numbers),
            **self._counts(),
        }

    def _counts(self) -> dict[str, int]:
        scheduler = self._engine.scheduler
        return {
            "free": self._engine.block_manager.num_free_blocks,
            "waiting": len(scheduler.waiting),
            "running": len(scheduler.running),
        }

    def _number_parked(self) -> None:
        """Sequences at rest come without an event: restored from files, for one."""
        for sequence in self._engine.scheduler.parked:
            self._numbers.setdefault(sequence.request.request_id, sequence.request.arrival)

    def _forget_numbers(self) -> None:
        requests, parked = self._engine.requests, self._engine.scheduler.parked
        if len(self._numbers) > 2 * (len(requests) + len(parked)) + 16:
            kept = {*requests, *(sequence.request.request_id for sequence in parked)}
            self._numbers = {name: number for name, number in self._numbers.items() if name in kept}


def _request(request: Request) -> dict[str, Any]:
    """What anyone may know of a request."""
    prompt = len(request.prompt_token_ids)
    return {
        "request": request.arrival,
        "prompt": prompt,
        "max_tokens": min(request.params.max_tokens, request.max_len - prompt),
        "task": request.task.value,
    }


def _sequence(index: int, sequence: Sequence) -> list[Any]:
    return [index, sequence.status.value, sequence.num_computed_tokens, sequence.num_tokens]


def _since(moment: float | None, begin: float) -> float | None:
    return None if moment is None else round(moment - begin, 6)
