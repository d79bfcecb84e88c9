"""What a viewer knows: a state message with the events after it applied, as the page does; compared with the engine."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Protocol

from tinyllm.engine.block_manager import RELEASED, BlockManager
from tinyllm.engine.scheduler import Scheduler
from tinyllm.server.live.facts import ModelFacts
from tinyllm.server.live.viewer import Viewer

FACTS = ModelFacts(
    model="tiny",
    chat_template=False,
    weights_nbytes=1000,
    kv_cache_nbytes=2000,
    workspace_nbytes=300,
    scratch_nbytes=40,
    kv_nbytes_per_token=5,
    max_sequence_len=1024,
    max_batch_tokens=64,
    max_num_seqs=8,
    device="reference",
)


class Engine(Protocol):
    """What of an engine a picture is compared with."""

    block_manager: BlockManager
    scheduler: Scheduler


def parse(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Server-sent events as (event, data)."""
    assert text.isascii()
    found = []
    for chunk in text.split("\n\n")[:-1]:
        if not chunk.startswith(":"):
            event, data = chunk.split("\n")
            found.append((event.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


@dataclass
class Picture:
    """Of one viewer."""

    blocks: dict[int, tuple[bool, list[list[int]]]] = field(default_factory=dict)
    sequences: dict[tuple[int, int], list[Any]] = field(default_factory=dict)  # [status, computed, known]
    requests: dict[int, dict[str, Any]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    paused: bool = False
    steps: int = 0

    def see(self, event: str, data: dict[str, Any]) -> None:
        getattr(self, f"_{event}")(data)
        for block, cached, owners in data.get("blocks", ()):
            self.blocks[block] = cached, owners
        if "free" in data:
            self.counts = {name: data[name] for name in ("free", "waiting", "running")}

    def look(self, viewer: Viewer) -> None:
        for event, data in parse("".join(viewer.take())):
            self.see(event, data)

    def _state(self, data: dict[str, Any]) -> None:
        self.blocks, self.paused, self.steps = {}, data["paused"], data["steps"]
        self.requests = {request["request"]: request for request in data["requests"]}
        self.sequences = {
            (number, index): rest for number, request in self.requests.items() for index, *rest in request["sequences"]
        }

    def _request(self, data: dict[str, Any]) -> None:
        self.requests[data["request"]] = data
        self.sequences[data["request"], 0] = ["waiting", 0, data["prompt"]]

    def _abort(self, data: dict[str, Any]) -> None:
        self._drop(data["abort"])

    def _paused(self, data: dict[str, Any]) -> None:
        self.paused = data["paused"]

    def _step(self, data: dict[str, Any]) -> None:
        assert data["step"] == self.steps + 1
        assert data["seconds"] >= 0
        self.steps = data["step"]
        for number, index in data.get("preempted", ()):
            if self.sequences.get((number, index), ["finished"])[0] not in ("finished", "parked"):  # else at rest
                self._set(number, index, "waiting", computed=0)
        for number, index, hit in data.get("admitted", ()):
            self._set(number, index, "running", computed=hit)
        for number, index, start, count in data.get("ran", ()):
            self._set(number, index, "running", computed=start + count)
        for number, index, parent in data.get("forks", ()):
            self.sequences[number, index] = self.sequences[number, parent].copy()
        for number, index, position, count in data.get("tokens", ()):
            self._set(number, index, known=position + count)
        for number, index, _ in data.get("finished", ()):
            self._set(number, index, "finished")
        for number in {number for number, *_ in data.get("finished", ())}:
            if all(row[0] == "finished" for (other, _), row in self.sequences.items() if other == number):
                self._drop(number)

    def _set(
        self, number: int, index: int, status: str | None = None, computed: int | None = None, known: int | None = None
    ) -> None:
        row = self.sequences.setdefault((number, index), ["waiting", 0, 0])
        for at, value in enumerate((status, computed, known)):
            if value is not None:
                row[at] = value

    def _drop(self, number: int) -> None:
        self.requests.pop(number, None)
        self.sequences = {key: row for key, row in self.sequences.items() if key[0] != number}

    def compare(self, engine: Engine) -> None:
        """Asserts that all of it is as it is in the engine."""
        manager, scheduler = engine.block_manager, engine.scheduler
        live = [*scheduler.running, *scheduler.parked]
        expected: dict[int, list[list[int]]] = {}
        for sequence in live:
            for place, block in enumerate(sequence.block_table):
                if block != RELEASED:
                    expected.setdefault(block, []).append([sequence.request.arrival, sequence.index, place])
        held = {block: sorted(owners) for block, (_, owners) in self.blocks.items() if owners}
        assert held == {block: sorted(owners) for block, owners in expected.items()}
        assert [len(held.get(block, ())) for block in range(manager.num_blocks)] == manager.ref_counts
        cached = {block for block, (cached, _) in self.blocks.items() if cached}
        assert cached == {block for block in range(manager.num_blocks) if manager.is_cached(block)}
        counts = {"free": manager.num_free_blocks, "waiting": len(scheduler.waiting), "running": len(scheduler.running)}
        assert self.counts == counts

    def compare_sequences(self, engine: Engine) -> None:
        """Asserts the same of what the queue and the running sequences have, right after a step."""
        scheduler = engine.scheduler
        for status, sequences in (("waiting", scheduler.waiting), ("running", scheduler.running)):
            expected = {(s.request.arrival, s.index): [status, s.num_computed_tokens, s.num_tokens] for s in sequences}
            assert {key: row for key, row in self.sequences.items() if row[0] == status} == expected
