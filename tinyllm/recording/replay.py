"""Runs a recording again, and compares every step with what it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from tinyllm.backends.base import F32Array
from tinyllm.engine.llm_engine import LLMEngine
from tinyllm.engine.sequence import Sequence, Task
from tinyllm.errors import InvalidRequestError, RecordingError
from tinyllm.recording.events import Abort, Event, Header, Interruption, RequestAdded, Step
from tinyllm.recording.reader import Recording, sampling_params
from tinyllm.recording.watcher import Watcher

__all__ = ["Replay", "ReplayDifferenceError"]

_COMPARED = {  # field of Step -> its name for people, causes before effects
    "ran": "the schedule",
    "admitted": "what began to run",
    "preempted": "what was preempted",
    "evicted": "the cached blocks given up",
    "copies": "the blocks copied",
    "rows": "the rows of logits used",
    "digest": "the logits",
    "tokens": "the tokens",
    "forks": "the forks",
    "finished": "what finished",
    "blocks": "who holds which block",
    "free": "the number of free blocks",
    "waiting": "the length of the queue",
    "running": "the number of running sequences",
}
_MAY_DIFFER = {"num_blocks", "num_threads", "device", "debug_checks"}  # num_blocks and device are compared otherwise


class ReplayDifferenceError(RecordingError):
    """The first thing in which a replay differs from its recording.

    Attributes:
        step: the number of the step.
        what: what differs, in words.
        recorded, replayed: its two values, as JSON has them; None where one of them has nothing there.
    """

    def __init__(self, step: int, what: str, recorded: Any, replayed: Any) -> None:
        self.step, self.what, self.recorded, self.replayed = step, what, recorded, replayed
        super().__init__(f"step {step}: {what}: recorded {_short(recorded)}, replayed {_short(replayed)}")


class Replay:
    """A recording that is run again, step by step. Iterating runs the steps that are left.

    >>> replay = Replay("run.jsonl", lambda header: LLM(header.model, **header.replay_options()).engine)
    >>> for step in replay:
    ...     print(step.number, replay.logits.keys(), replay.engine.block_manager.num_free_blocks)

    Between steps the engine may be looked at, but not changed: replay.engine.runner.cache.layers are numpy arrays.

    Args:
        make_engine: makes the engine to run on, once the recording is known to be one that can be replayed.

    Attributes:
        recording: what is replayed.
        engine: what it runs on.
        num_steps, num_requests, num_tokens: of what can be replayed: all, or what comes before `interrupted`.
        interrupted: whether a step failed or was interrupted; what was recorded after that cannot be replayed.
        next_step: the recorded step that `step` will run and compare with, or None after the last. The requests
            that came before it are in the queue already.
        logits: (request id, index, position) -> (V,) float32, of the step that ran last.

    Raises:
        RecordingError: the recording is damaged, made by another model, or cannot be replayed: it has a request with
            logits processors, or one that belongs to a session.
    """

    def __init__(self, recording: Recording | str | Path, make_engine: Callable[[Header], LLMEngine]) -> None:
        self.recording = recording if isinstance(recording, Recording) else Recording(recording)
        self.num_steps = self.num_requests = self.num_tokens = 0
        self.interrupted = False
        for event in self.recording:
            self._count(event)
        self.engine = make_engine(self.recording.header)
        self._check_engine()
        self.logits: dict[tuple[str, int, int], F32Array] = {}
        self._replayed: list[Event] = []
        self.engine.observers.append(_LogitsKeeper(self.engine, self._replayed.append, self.logits))
        self._events = iter(self.recording)
        self.next_step = self._feed()

    def step(self) -> Step | None:
        """Runs the next step and compares it; None, and nothing happens, after the last one.

        Raises:
            ReplayDifferenceError: it differs from the recording.
        """
        recorded = self.next_step
        if recorded is None:
            return None
        self.logits.clear()
        self._replayed.clear()
        self.engine.step()
        if not self._replayed:
            raise ReplayDifferenceError(recorded.number, "the schedule", recorded.ran, None)
        replayed = self._replayed[0]
        assert isinstance(replayed, Step)
        _compare(recorded, replayed)
        self.next_step = self._feed()
        return replayed

    def __iter__(self) -> Iterator[Step]:
        while (step := self.step()) is not None:
            yield step

    def _count(self, event: Event) -> None:
        if self.interrupted:
            return
        self.interrupted = isinstance(event, Interruption)
        if isinstance(event, Step):
            self.num_steps += 1
            self.num_tokens += event.num_new_tokens
        elif isinstance(event, RequestAdded):
            self.num_requests += 1
            for condition, why in (
                (event.processors > 0, "has logits processors: they are code, and no recording holds them"),
                (event.session, "belongs to a session: what it resumes is not in the recording"),
            ):
                if condition:
                    name = event.request_id[:60]
                    raise RecordingError(f"{self.recording.path} cannot be replayed: request {name!r} {why}")

    def _check_engine(self) -> None:
        header, engine = self.recording.header, self.engine
        if engine.num_steps or engine.requests:
            raise RecordingError("a replay begins with a new engine: this one has run already")
        if engine.fingerprint != header.fingerprint:
            raise RecordingError(
                f"{self.recording.path} was recorded with another model, device or version of tinyllm: "
                f"its fingerprint is {header.fingerprint}, here it is {engine.fingerprint}"
            )
        pairs = {field.name: getattr(engine.config, field.name) for field in fields(engine.config)}
        pairs = {name: value for name, value in pairs.items() if name not in _MAY_DIFFER}
        pairs["num_blocks"], pairs["kv_dtype"] = engine.block_manager.num_blocks, engine.runner.cache.spec.dtype
        for name, value in pairs.items():
            if name in header.engine and value != header.engine[name]:
                raise RecordingError(
                    f"{self.recording.path} was recorded with {name} {header.engine[name]!r}, but this is {value!r}"
                )

    def _feed(self) -> Step | None:
        """Carries out what happened before the next step, and returns that."""
        for event in self._events:
            if isinstance(event, Step):
                return event
            if isinstance(event, Interruption):
                return None
            if isinstance(event, Abort):
                self.engine.abort(event.request_id)
                continue
            try:
                params, task = sampling_params(event), Task(event.task)
                self.engine.add_request(event.request_id, list(event.prompt), params, task=task)
            except InvalidRequestError as error:
                raise RecordingError(
                    f"{self.recording.path} cannot be replayed: request {event.request_id[:60]!r}: {error}"
                ) from error
        return None


class _LogitsKeeper(Watcher):
    """Keeps a copy of each row of logits besides."""

    def __init__(
        self, engine: LLMEngine, emit: Callable[[Event], None], logits: dict[tuple[str, int, int], F32Array]
    ) -> None:
        super().__init__(engine, emit)
        self._logits = logits

    def logits_used(self, sequence: Sequence, position: int, logits: F32Array) -> None:
        super().logits_used(sequence, position, logits)
        self._logits[sequence.request.request_id, sequence.index, position] = np.array(logits)


def _compare(recorded: Step, replayed: Step) -> None:
    if recorded == replayed:
        return
    for name, what in _COMPARED.items():
        a, b = getattr(recorded, name), getattr(replayed, name)
        if a != b:
            if isinstance(a, tuple):
                at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
                a, b = (items[at] if at < len(items) else None for items in (a, b))
            raise ReplayDifferenceError(recorded.number, what, a, b)
    raise AssertionError("steps that differ in nothing")


def _short(value: Any) -> str:
    if value is None:
        return "nothing"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
