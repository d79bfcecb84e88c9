"""Draws a recording as one self-contained page: timeline.html with its style, its scripts and the data in it.

What a recording says is not trusted: it enters the page as JSON in which no character can end the element it stands
in, the script puts it on the page as text only, and the page's policy allows no other script and no request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from tinyllm.errors import RecordingError
from tinyllm.recording.events import Abort, BlockChange, Header, Interruption, Owner, RequestAdded, Step
from tinyllm.recording.reader import Recording

__all__ = ["Page", "render_timeline"]

MAX_STEPS = 100_000  # what a browser draws without effort
MAX_NBYTES = 256 << 20
MAX_BLOCKS = 1 << 18
_MAX_NAME = 200  # characters of an id that the page shows


@dataclass(frozen=True)
class Page:
    """A page in ASCII, and what it shows. torn: see Recording."""

    html: str
    num_steps: int
    num_requests: int
    torn: bool


def render_timeline(recording: Recording | str | Path, *, first: int = 1, last: int | None = None) -> Page:
    """Draws the steps from `first` to `last`, or to the end.

    Raises:
        RecordingError: the recording is damaged, has none of the steps, or more than a page can show.
    """
    if not isinstance(recording, Recording):
        recording = Recording(recording)
    data = _Data(recording.header, first)
    for event in recording:
        if isinstance(event, Step):
            if last is not None and event.number > last:
                break
            data.add_step(event)
            if len(data.steps) > MAX_STEPS or data.nbytes > MAX_NBYTES:
                raise RecordingError(f"{recording.path} is too long for one page: draw a part of it (--steps 1-10000)")
        elif isinstance(event, RequestAdded):
            data.add_request(event)
        elif isinstance(event, Abort):
            data.aborted.append(data.requests_by_id[event.request_id])
        else:
            assert isinstance(event, Interruption)
            data.interrupted = True
    if data.num_used_blocks > MAX_BLOCKS:
        raise RecordingError(f"{recording.path} uses {data.num_used_blocks} blocks; a page shows {MAX_BLOCKS} at most")
    if data.num_seen < first and first > 1:
        raise RecordingError(f"{recording.path} has only {data.num_seen} steps")
    return Page(_page(data.to_json()), len(data.steps), len(data.requests), recording.torn)


class _Data:
    """What the page is given: short keys and flat lists, for there may be very many of them; see timeline_data.js.

    steps: of each step, those of these that are not empty:
        n number, t seconds since the beginning, s free blocks, w waiting, u running,
        q requests that arrived before it, x requests aborted before it, i 1 if a step before it was interrupted,
        r (sequence, start, count) ran, a (sequence, hit) admitted, p sequences preempted, e blocks evicted,
        c (source, destination) copied, k (sequence, parent) forked, g (sequence, count) tokens gained,
        f (sequence, reason) finished, b (block, cached, number of owners, (sequence, place) of each) changed
    """

    def __init__(self, header: Header, first: int) -> None:
        self.header = header
        self.first = first
        self.num_seen = 0
        self.nbytes = 0
        self.num_used_blocks = 0  # that is, the last one that anyone held, and all before it
        self.steps: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.requests_by_id: dict[str, int] = {}
        self.aborted: list[int] = []
        self.interrupted = False
        self._arrived: list[int] = []
        self._sequences: dict[tuple[int, int], int] = {}
        self._blocks: dict[int, BlockChange] = {}  # before the first step that is drawn
        self._initial: list[int] = []

    def add_request(self, event: RequestAdded) -> None:
        request = {"id": event.request_id[:_MAX_NAME], "prompt": len(event.prompt), "task": event.task, "at": event.at}
        if event.params.get("priority"):
            request["priority"] = event.params["priority"]
        self._arrived.append(self._new_request(event.request_id, request))

    def add_step(self, step: Step) -> None:
        self.num_seen = step.number
        if step.number < self.first:
            self._blocks.update((change.block, change) for change in step.blocks)
        else:
            if step.number == self.first:
                self._initial = self._changes(c for c in self._blocks.values() if c.cached or c.owners)
            line = json.dumps({key: value for key, value in self._step(step).items() if value}, separators=(",", ":"))
            self.steps.append(line)
            self.nbytes += len(line)
        self._arrived, self.aborted, self.interrupted = [], [], False

    def to_json(self) -> str:
        header = self.header
        fields = {
            "model": header.model,
            "fingerprint": header.fingerprint,
            "blockSize": header.block_size,
            "numBlocks": header.num_blocks,
            "budget": header.max_batch_tokens,
            "usedBlocks": self.num_used_blocks,
            "requests": self.requests,
            "sequences": [list(key) for key in self._sequences],
            "initial": self._initial,
        }
        return f'{json.dumps(fields, separators=(",", ":"))[:-1]},"steps":[{",".join(self.steps)}]}}'

    def _step(self, step: Step) -> dict[str, Any]:
        return {
            "n": step.number,
            "t": step.at,
            "s": step.free,
            "w": step.waiting,
            "u": step.running,
            "q": self._arrived,
            "x": self.aborted,
            "i": int(self.interrupted),
            "r": [x for item in step.ran for x in (self._sequence(*item[:2]), item.start, item.num_tokens)],
            "a": [x for item in step.admitted for x in (self._sequence(*item[:2]), item.hit)],
            "p": [self._sequence(*item) for item in step.preempted],
            "e": step.evicted,
            "c": [block for pair in step.copies for block in pair],
            "k": [x for item in step.forks for x in (self._sequence(*item[:2]), self._sequence(item[0], item.parent))],
            "g": [x for item in step.tokens for x in (self._sequence(*item[:2]), len(item.token_ids))],
            "f": [x for item in step.finished for x in (self._sequence(*item[:2]), (item.reason or "")[:_MAX_NAME])],
            "b": self._changes(step.blocks),
        }

    def _changes(self, changes: Iterable[BlockChange]) -> list[int]:
        flat: list[int] = []
        for change in changes:
            self.num_used_blocks = max(self.num_used_blocks, change.block + 1)
            flat += (change.block, int(change.cached), len(change.owners))
            for owner in change.owners:
                flat += (self._owner(owner), owner.place)
        return flat

    def _owner(self, owner: Owner) -> int:
        if owner.request_id not in self.requests_by_id:  # a session restored from a file
            request = {"id": owner.request_id[:_MAX_NAME], "prompt": 0, "task": "session", "at": 0}
            self._new_request(owner.request_id, request)
        return self._sequence(owner.request_id, owner.sequence)

    def _sequence(self, request_id: str, index: int) -> int:
        return self._sequences.setdefault((self.requests_by_id[request_id], index), len(self._sequences))

    def _new_request(self, request_id: str, request: dict[str, Any]) -> int:
        self.requests.append(request)
        self.requests_by_id[request_id] = len(self.requests) - 1
        return len(self.requests) - 1


def _page(data: str) -> str:
    folder = files("tinyllm.recording")
    names = ("timeline.html", "timeline.css", "timeline_data.js", "timeline.js")
    template, style, *scripts = ((folder / name).read_text("utf-8") for name in names)
    script = "\n".join(scripts)
    parts = {
        "POLICY": f"default-src 'none'; script-src {_source(script)}; style-src {_source(style)}",
        "STYLE": style,
        "SCRIPT": script,
        "DATA": _inert(data),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _source(text: str) -> str:
    """The name of an inline script or style in a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _inert(text: str) -> str:
    """JSON without a character that means something to an HTML parser; it has no others than ASCII."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
