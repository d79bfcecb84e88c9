"""The lines of a recording, as dataclasses and as JSON.

A recording is JSONL: one object a line, each written when it happened, so that a crash leaves a readable beginning.
Fields that are empty are left out. Steps count from 1. Blocks are numbers from 0; a sequence is named by its request's
id and its own index within it. Version 1 has these lines:

Header, the first line:
    format       "tinyllm-recording"
    version      1
    model        the model's name, as the user gave it
    fingerprint  names model, device, version and cache dtype by what they compute (LLMEngine.fingerprint)
    vocab_size   token ids are below this
    engine       the fields of EngineConfig; num_blocks, device and kv_dtype are what was used
    kv           the fields of KVCacheSpec

Request, when one enters the queue:
    request      its id
    after        how many steps had run
    at           seconds since the header
    prompt       token ids
    task         "generate", "score", ... (engine.sequence.Task)
    params       the fields of SamplingParams that differ from their defaults; logit_bias as a list of pairs,
                 structured_output as {"kind": ..., "text": ...}
    processors   how many logits processors it has: code, which no file holds, so that it cannot be replayed
    session      true if it resumes a session or is one: what it begins from is not in the file either

Abort, when a request is ended from outside:
    abort        its id
    after, at    as above

Interruption, when a step failed or was interrupted: what it had begun was taken back, and what follows is drawn by a
timeline but cannot be replayed:
    interrupted  true
    after, at    as above

Step, after each step:
    step         its number
    at           seconds since the header
    ran          [id, index, start, count]: positions start to start + count - 1, in the order of the batch
    admitted     [id, index, hit]: began to run, `hit` tokens of it were computed already (prefix cache)
    preempted    [id, index]: lost its blocks, waits to be computed again
    evicted      blocks whose cached prefix was given up because the block was needed
    copies       [source, destination]: copy-on-write, carried out before the step ran
    rows         how many rows of logits were used
    digest       BLAKE2b of 8 bytes, in hex, over each row in the order of use: a line "id index position", the id as
                 Python's ascii() writes it, then the row's float32 bytes
    forks        [id, index, parent]: a new sequence that went on from the parent's blocks
    tokens       [id, index, position, token ids]: the sequence's tokens from `position` on are now these
    finished     [id, index, reason]; reason is null where nothing was generated, and for a beam that was dropped. At
                 the end of a beam search its answers are named as sequences from 0 on, which never ran themselves
    blocks       [block, cached, [[id, index, place], ...]] for each block that changed since the step before: whether
                 its content can be found by later prompts, and whose block tables name it, at which place; the block
                 is free if none does
    free         blocks that nobody holds, the cached ones included
    waiting      sequences in the queue
    running      sequences that hold blocks and go on
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

__all__ = [
    "FORMAT",
    "MAX_LINE_NBYTES",
    "VERSION",
    "Abort",
    "Admitted",
    "BlockChange",
    "Copy",
    "Event",
    "Finished",
    "Fork",
    "Header",
    "Interruption",
    "Owner",
    "Preempted",
    "Ran",
    "RequestAdded",
    "Step",
    "Tokens",
]

FORMAT = "tinyllm-recording"
VERSION = 1
MAX_LINE_NBYTES = 16 << 20  # two million prompt tokens; what reading one line may take in memory is bounded by this


class Ran(NamedTuple):
    request_id: str
    sequence: int
    start: int
    num_tokens: int


class Admitted(NamedTuple):
    request_id: str
    sequence: int
    hit: int


class Preempted(NamedTuple):
    request_id: str
    sequence: int


class Copy(NamedTuple):
    source: int
    destination: int


class Fork(NamedTuple):
    request_id: str
    sequence: int
    parent: int


class Tokens(NamedTuple):
    request_id: str
    sequence: int
    position: int
    token_ids: tuple[int, ...]


class Finished(NamedTuple):
    request_id: str
    sequence: int
    reason: str | None


class Owner(NamedTuple):
    request_id: str
    sequence: int
    place: int


class BlockChange(NamedTuple):
    block: int
    cached: bool
    owners: tuple[Owner, ...]


@dataclass(frozen=True, kw_only=True)
class Header:
    """What ran, and how. `engine` and `kv` are the fields of EngineConfig and KVCacheSpec."""

    model: str
    fingerprint: str
    vocab_size: int
    engine: Mapping[str, Any]
    kv: Mapping[str, Any]

    @property
    def num_blocks(self) -> int:
        return int(self.kv["num_blocks"])

    @property
    def block_size(self) -> int:
        return int(self.kv["block_size"])

    @property
    def max_batch_tokens(self) -> int:
        return int(self.engine["max_batch_tokens"])

    def replay_options(self) -> dict[str, Any]:
        """The engine's options to run it with again; the number of threads is left to the machine."""
        return {name: value for name, value in self.engine.items() if name != "num_threads"}

    def to_json(self) -> str:
        return _line({"format": FORMAT, "version": VERSION, **vars(self)})


@dataclass(frozen=True, kw_only=True)
class RequestAdded:
    """A request entered the queue after `after` steps, `at` seconds after the header."""

    request_id: str
    after: int
    at: float = field(compare=False)
    prompt: tuple[int, ...]
    task: str
    params: Mapping[str, Any]
    processors: int = 0
    session: bool = False

    def to_json(self) -> str:
        return _line({"request": self.request_id, **_without_empty(self, "request_id")})


@dataclass(frozen=True, kw_only=True)
class Abort:
    """A request was ended from outside, after `after` steps."""

    request_id: str
    after: int
    at: float = field(compare=False)

    def to_json(self) -> str:
        return _line({"abort": self.request_id, **_without_empty(self, "request_id")})


@dataclass(frozen=True, kw_only=True)
class Interruption:
    """The step after `after` steps did not run to its end."""

    after: int
    at: float = field(compare=False)

    def to_json(self) -> str:
        return _line({"interrupted": True, **vars(self)})


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step did. Two steps are equal if they are but for `at`, the time."""

    number: int
    at: float = field(compare=False)
    ran: tuple[Ran, ...] = ()
    admitted: tuple[Admitted, ...] = ()
    preempted: tuple[Preempted, ...] = ()
    evicted: tuple[int, ...] = ()
    copies: tuple[Copy, ...] = ()
    rows: int = 0
    digest: str = ""
    forks: tuple[Fork, ...] = ()
    tokens: tuple[Tokens, ...] = ()
    finished: tuple[Finished, ...] = ()
    blocks: tuple[BlockChange, ...] = ()
    free: int = 0
    waiting: int = 0
    running: int = 0

    def to_json(self) -> str:
        return _line({"step": self.number, **_without_empty(self, "number")})

    @property
    def num_new_tokens(self) -> int:
        return sum(len(tokens.token_ids) for tokens in self.tokens)


Event = RequestAdded | Abort | Interruption | Step


def _without_empty(event: RequestAdded | Abort | Step, name: str) -> dict[str, Any]:
    return {key: value for key, value in vars(event).items() if key != name and (value or key in ("after", "at"))}


def _line(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, separators=(",", ":"), allow_nan=False) + "\n"  # ASCII: whatever strings hold, it fits
