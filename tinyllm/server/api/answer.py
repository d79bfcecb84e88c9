"""What the answers of chats and of completions have in common, whole or as a stream of events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from typing import Any

from tinyllm.outputs import RequestOutput
from tinyllm.server.api.requests import GenerationFields
from tinyllm.server.api.usage import usage_of
from tinyllm.server.http import event
from tinyllm.server.service import Service

__all__ = ["ChunkEvents", "answer_head"]


def answer_head(service: Service, prefix: str, kind: str) -> dict[str, Any]:
    """The fields that an answer begins with. prefix: of its id; kind: its `object`."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": service.config.model_name,
        "system_fingerprint": service.fingerprint,
    }


class ChunkEvents:
    """Makes the events of one answer: each is its head, written once, and what is new."""

    def __init__(self, head: Mapping[str, Any], body: GenerationFields) -> None:
        self._head = json.dumps(head)[:-1]  # the rest of the object follows
        self._include_usage = body.stream_options is not None and body.stream_options.include_usage
        self._usage = ',"usage":null' if self._include_usage else ""

    def choice(self, index: int, delta: str, logprobs: str = "null", finish_reason: str | None = None) -> bytes:
        """An event with something of choice number `index`. delta: a field, as JSON; logprobs: as JSON."""
        reason = "null" if finish_reason is None else json.dumps(finish_reason)
        choice = f'{{"index":{index},{delta},"logprobs":{logprobs},"finish_reason":{reason}}}'
        return event(f'{self._head},"choices":[{choice}]{self._usage}}}')

    def end(self, outputs: Mapping[int, RequestOutput]) -> bytes:
        """The usage, where it was asked for."""
        if not self._include_usage:
            return b""
        return event(f'{self._head},"choices":[],"usage":{json.dumps(usage_of(outputs.values()))}}}')
