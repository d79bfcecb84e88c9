"""The live feed's messages: server-sent events whose data is one JSON object each.

They are the lines of a recording (see tinyllm.recording.events) without anything that a request says or is answered:
no token ids, no texts, no parameters but their sizes. Requests are numbers, in the order in which they came.

state       the whole picture; a viewer forgets what it knew before
    ...         the fields of ModelFacts
    num_blocks, block_size
    steps       how many steps have run
    at          seconds; all times of a connection count from one moment, and may lie before it
    paused      true while no step begins unless it is asked for
    requests    {"request", "at", "prompt", "max_tokens", "task", "first": when its first token came or null,
                "sequences": [[index, status, tokens computed, tokens known], ...]}; status is "waiting",
                "running", "finished" or "parked"
    blocks      [block, cached, [[request, index, place], ...]] of each block that is held or cached
    free, waiting, running   as in a step
request     one has entered the queue: "request", "at", "prompt": how many tokens, "max_tokens", "task", "sequences":
            how many it will fork into
step        "step", "at", "seconds": how long it took, "ran", "admitted", "preempted", "evicted", "copies", "forks",
            "finished", "blocks", "free", "waiting", "running"; "tokens": [request, index, position, how many]
abort       "abort", "at", and "blocks", "free", "waiting", "running" as they are now
paused      "paused": true or false
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from tinyllm.recording.events import BlockChange, Step

__all__ = ["block_states", "message", "step_fields"]

UNKNOWN = -1  # a request whose sequence at rest came and lost its blocks between two events


def message(event: str, fields: Mapping[str, Any]) -> str:
    """One server-sent event."""
    return f"event: {event}\ndata: {json.dumps(fields, separators=(',', ':'), allow_nan=False)}\n\n"


def step_fields(step: Step, numbers: Mapping[str, int], seconds: float) -> dict[str, Any]:
    """numbers: of the requests that the step names."""
    fields = {
        "step": step.number,
        "at": step.at,
        "seconds": round(seconds, 6),
        "ran": _numbered(step.ran, numbers),
        "admitted": _numbered(step.admitted, numbers),
        "preempted": _numbered(step.preempted, numbers),
        "evicted": step.evicted,
        "copies": step.copies,
        "forks": _numbered(step.forks, numbers),
        "tokens": [[numbers.get(t.request_id, UNKNOWN), t.sequence, t.position, len(t.token_ids)] for t in step.tokens],
        "finished": _numbered(step.finished, numbers),
        "blocks": block_states(step.blocks, numbers),
    }
    counts = {"free": step.free, "waiting": step.waiting, "running": step.running}
    return {name: value for name, value in fields.items() if value or name in ("at", "seconds")} | counts


def block_states(blocks: Iterable[BlockChange], numbers: Mapping[str, int]) -> list[list[Any]]:
    return [[change.block, change.cached, _numbered(change.owners, numbers)] for change in blocks]


def _numbered(items: Iterable[tuple[Any, ...]], numbers: Mapping[str, int]) -> list[list[Any]]:
    return [[numbers.get(request_id, UNKNOWN), *rest] for request_id, *rest in items]
