"""Turns what an engine tells its observer into the events of a recording."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from hashlib import blake2b
from itertools import zip_longest
from typing import Any

import numpy as np

from tinyllm.backends.base import F32Array
from tinyllm.engine.block_manager import RELEASED, BlockManager
from tinyllm.engine.llm_engine import LLMEngine
from tinyllm.engine.scheduler import SchedulerOutput
from tinyllm.engine.sequence import Request, Sequence, SequenceStatus
from tinyllm.recording.events import (
    Abort,
    Admitted,
    BlockChange,
    Copy,
    Event,
    Finished,
    Fork,
    Interruption,
    Owner,
    Preempted,
    Ran,
    RequestAdded,
    Step,
    Tokens,
)
from tinyllm.sampling_params import SamplingParams
from tinyllm.structured_output import StructuredOutput

__all__ = ["Watcher"]


class Watcher:
    """An EngineObserver that passes each event on to `emit`. It begins from what the engine holds when it is made.

    Args:
        digest: whether a step's rows of logits are counted and digested; without it none are asked for.

    Attributes:
        begin: of time.monotonic(); the events' times count from here.
    """

    def __init__(self, engine: LLMEngine, emit: Callable[[Event], None], *, digest: bool = True) -> None:
        self.wants_logits = digest
        self.begin = time.monotonic()
        self._engine = engine
        self._emit = emit
        self._num_steps = engine.num_steps
        self._sequences: dict[Sequence, _Known] = {}
        for sequence in (s for request in engine.requests.values() for s in request.sequences):
            self._sequences[sequence] = _Known.as_it_stands(sequence)
        for sequence in engine.scheduler.parked:
            self._sequences[sequence] = _Known.as_it_stands(sequence)
        self._blocks = _Blocks(engine.block_manager)
        self._unsure = True  # which blocks are cached, since nobody said what became of them
        self.take_block_changes()
        self._digest = blake2b(digest_size=8)
        self._rows = 0

    # ---- what is known between steps

    @property
    def sequences(self) -> list[tuple[str, int, Sequence]]:
        """(request id, index, sequence) of those that are in the engine or hold blocks, by the names of the events."""
        return [(*known.name, sequence) for sequence, known in self._sequences.items()]

    def blocks(self) -> tuple[BlockChange, ...]:
        """All blocks that are held or cached, as far as the events so far tell."""
        return self._blocks.all()

    def take_block_changes(self) -> tuple[BlockChange, ...]:
        """The blocks that changed since the last step or call; the next step's event will not tell of them again.

        What happens to them between steps, as by an abort, is otherwise part of that event.
        """
        return self._block_changes(())

    # ---- EngineObserver

    def request_added(self, request: Request) -> None:
        for sequence in request.sequences:
            self._sequences[sequence] = _Known(sequence)
        self._emit(
            RequestAdded(
                request_id=request.request_id,
                after=self._num_steps,
                at=self._now(),
                prompt=tuple(request.prompt_token_ids),
                task=request.task.value,
                params=_params(request.params),
                processors=len(request.params.logits_processors),
                session=request.keep or request.resume_from is not None,
            )
        )

    def request_aborted(self, request: Request) -> None:
        for sequence, known in self._sequences.items():
            if sequence.request is request:
                known.finished = True
        self._emit(Abort(request_id=request.request_id, after=self._num_steps, at=self._now()))

    def logits_used(self, sequence: Sequence, position: int, logits: F32Array) -> None:
        self._digest.update(f"{sequence.request.request_id!a} {sequence.index} {position}\n".encode())
        self._digest.update(np.ascontiguousarray(logits).data)
        self._rows += 1

    def step_finished(self, output: SchedulerOutput, finished: list[Request]) -> None:
        self._num_steps += 1
        known, hits = self._sequences, dict(output.admitted)
        ran = tuple(
            Ran(*known[s].name, hits.get(s, known[s].num_computed_tokens), item.num_tokens)
            for item in output.scheduled
            for s in (item.sequence,)
        )
        forks = self._find_forks(dict.fromkeys(item.sequence.request for item in output.scheduled))
        tokens, ended = self._advance()
        scheduler = self._engine.scheduler
        self._emit(
            Step(
                number=self._num_steps,
                at=self._now(),
                ran=ran,
                admitted=tuple(Admitted(*known[s].name, hit) for s, hit in output.admitted),
                preempted=tuple(Preempted(*self._name(s)) for s in output.preempted),
                evicted=tuple(output.evicted),
                copies=tuple(Copy(*pair) for pair in output.copies),
                rows=self._rows,
                digest=self._digest.hexdigest() if self._rows else "",
                forks=forks,
                tokens=tokens,
                finished=ended,
                blocks=self._block_changes([*output.newly_cached, *output.evicted]),
                free=self._engine.block_manager.num_free_blocks,
                waiting=len(scheduler.waiting),
                running=len(scheduler.running),
            )
        )
        for sequence in [s for s in self._sequences if s.status is SequenceStatus.FINISHED and not s.block_table]:
            del self._sequences[sequence]
        self._forget_rows()

    def step_undone(self) -> None:
        self._find_forks(self._engine.requests.values())
        self._forget_rows()
        self._unsure = True
        self._emit(Interruption(after=self._num_steps, at=self._now()))

    # ---- parts

    def _forget_rows(self) -> None:
        self._digest = blake2b(digest_size=8)
        self._rows = 0

    def _name(self, sequence: Sequence) -> tuple[str, int]:
        known = self._sequences.get(sequence)  # it has none if it came to rest after the step before
        return (sequence.request.request_id, sequence.index) if known is None else known.name

    def _now(self) -> float:
        return round(time.monotonic() - self.begin, 6)

    def _block_changes(self, candidates: Iterable[int]) -> tuple[BlockChange, ...]:
        if self._unsure:
            candidates, self._unsure = range(self._engine.block_manager.num_blocks), False
        return self._blocks.changes(self._sequences, candidates)

    def _find_forks(self, requests: Iterable[Request]) -> tuple[Fork, ...]:
        """Takes in the sequences that are new, and says of those that run from whose state they went on."""
        forks: list[Fork] = []
        for request in requests:
            new = [sequence for sequence in request.sequences if sequence not in self._sequences]
            old = {s: known for s, known in self._sequences.items() if s.request is request} if new else {}
            for sequence in new:
                if sequence.status is SequenceStatus.FINISHED:  # by its first token, or as a beam search's answer
                    self._sequences[sequence] = _Known(sequence)
                    continue
                alike = [other for other, known in old.items() if known.is_prefix_of(sequence)]
                # of several with the same tokens, not one that lost its blocks while the child has some
                first = min(alike, key=lambda other: other.status is not sequence.status, default=None)
                parent = None if first is None else old[first]
                known = self._sequences[sequence] = _Known(sequence, parent)
                if parent is not None:
                    forks.append(Fork(*known.name, parent.name[1]))
        for sequence in self._engine.scheduler.parked:  # forks and restored ones among them
            if sequence not in self._sequences:
                self._sequences[sequence] = _Known(sequence, finished=True)
        return tuple(forks)

    def _advance(self) -> tuple[tuple[Tokens, ...], tuple[Finished, ...]]:
        """What the sequences gained since the step before, and which of them ended."""
        gained: list[Tokens] = []
        ended: list[Finished] = []
        for sequence, known in self._sequences.items():
            if known.finished:
                continue
            known.num_computed_tokens = sequence.num_computed_tokens
            start = known.num_unchanged(sequence)
            if start < sequence.num_tokens or start < known.num_tokens:
                gained.append(Tokens(*known.name, start, tuple(sequence.token_ids[start:])))
                known.learn(sequence)
            if sequence.status in (SequenceStatus.FINISHED, SequenceStatus.PARKED):
                known.finished = True
                ended.append(Finished(*known.name, sequence.finish_reason))
        return tuple(gained), tuple(ended)


class _Known:
    """What was known of a sequence when the step before ended; of a fork, what was known of its parent.

    Its name, (request id, index), is the one it was born with: best_of numbers the sequences anew at its end.
    """

    def __init__(self, sequence: Sequence, parent: _Known | None = None, *, finished: bool = False) -> None:
        self.name = (sequence.request.request_id, sequence.index)
        self.num_computed_tokens = sequence.num_computed_tokens
        self.finished = finished
        if parent is None:
            self.num_tokens = sequence.num_prompt_tokens
            self._token_ids = sequence.token_ids[: self.num_tokens]
        else:
            self.num_tokens = parent.num_tokens
            self._token_ids = parent._token_ids

    @classmethod
    def as_it_stands(cls, sequence: Sequence) -> _Known:
        """With all that the sequence has by now."""
        known = cls(sequence, finished=sequence.status in (SequenceStatus.FINISHED, SequenceStatus.PARKED))
        known.learn(sequence)
        return known

    def learn(self, sequence: Sequence) -> None:
        self.num_tokens = sequence.num_tokens
        if sequence.request.params.num_sequences > 1:  # only then does anyone ask what they were
            self._token_ids = sequence.token_ids.copy()

    def num_unchanged(self, sequence: Sequence) -> int:
        """How many of the known tokens, from the first on, the sequence still has; only beam search replaces any."""
        if sequence.request.params.beams is None or self.is_prefix_of(sequence):
            return self.num_tokens
        pairs = zip(self._token_ids, sequence.token_ids, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(self.num_tokens, sequence.num_tokens))

    def is_prefix_of(self, other: Sequence) -> bool:
        return self._token_ids == other.token_ids[: self.num_tokens]


class _Blocks:
    """Follows who holds which block, from the block tables as they change."""

    def __init__(self, block_manager: BlockManager) -> None:
        self._manager = block_manager
        self._tables: dict[Sequence, list[int]] = {}
        self._owners: dict[int, dict[Sequence, Owner]] = {}  # of each held block
        self._cached: set[int] = set()

    def changes(self, sequences: Mapping[Sequence, _Known], candidates: Iterable[int]) -> tuple[BlockChange, ...]:
        """The blocks that changed since the last call, in order; those in `candidates` may be cached now, or not."""
        changed: set[int] = set()
        for sequence, known in sequences.items():
            before, after = self._tables.get(sequence, []), sequence.block_table
            if before == after:
                continue
            pairs = enumerate(zip_longest(before, after, fillvalue=RELEASED))
            differing = [(place, old, new) for place, (old, new) in pairs if old != new]
            for _, old, _ in differing:  # all of them first: a block may have gone to another place
                if old != RELEASED:
                    del self._owners[old][sequence]
                    changed.add(old)
            for place, _, new in differing:
                if new != RELEASED:
                    self._owners.setdefault(new, {})[sequence] = Owner(*known.name, place)
                    changed.add(new)
            if after:
                self._tables[sequence] = after.copy()
            else:
                del self._tables[sequence]
        for block in changed.union(candidates):
            if self._manager.is_cached(block) != (block in self._cached):
                self._cached ^= {block}
                changed.add(block)
        return tuple(self._state(block) for block in sorted(changed))

    def all(self) -> tuple[BlockChange, ...]:
        held = {block for block, owners in self._owners.items() if owners}
        return tuple(self._state(block) for block in sorted(held | self._cached))

    def _state(self, block: int) -> BlockChange:
        return BlockChange(block, block in self._cached, tuple(sorted(self._owners.get(block, {}).values())))


def _params(params: SamplingParams) -> dict[str, Any]:
    """The fields that differ from their defaults, in types that JSON has; without the processors, which are code."""
    found: dict[str, Any] = {}
    for field in fields(params):
        value = getattr(params, field.name)
        if field.name == "logits_processors" or value == field.default:
            continue
        if isinstance(value, Mapping):
            value = [list(pair) for pair in value.items()]
        elif isinstance(value, StructuredOutput):
            value = value.to_json()
        found[field.name] = value
    return found
