"""Server-sent events: from bytes as they arrive to events.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["MAX_EVENT_NBYTES", "SSEError", "SSEParser", "ServerSentEvent"]

MAX_EVENT_NBYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"


class SSEError(Exception):
    """An event that is larger than MAX_EVENT_NBYTES."""


class ServerSentEvent(NamedTuple):
    """Its type, which is b"message" where the server names none, and its data, whose lines newlines separate."""

    type: bytes
    data: bytes


class SSEParser:
    """The events of one stream. However its bytes are split, the events are the same."""

    def __init__(self) -> None:
        self._type = b""
        self._data: list[bytes] = []
        self._line: list[bytes] = []  # parts of a line whose end is not here yet
        self._nbytes = 0  # of the data and the line held
        self._after_cr = False  # a line feed that comes next belongs to a line that has ended
        self._at_start = True

    def feed(self, data: bytes) -> list[ServerSentEvent]:
        """The events that these bytes complete; none of what is left at the end of a stream. Raises SSEError."""
        if self._after_cr and data:
            self._after_cr = False
            data = data.removeprefix(b"\n")
        if b"\r" in data:
            self._after_cr = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        first, *lines = data.split(b"\n")
        self._hold(len(first))
        self._line.append(first)
        events: list[ServerSentEvent] = []
        for line in lines:
            self._end_line(events)
            self._hold(len(line))
            self._line = [line]
        return events

    def _hold(self, nbytes: int) -> None:
        self._nbytes += nbytes
        if self._nbytes > MAX_EVENT_NBYTES:
            raise SSEError(f"an event is larger than {MAX_EVENT_NBYTES} bytes")

    def _end_line(self, events: list[ServerSentEvent]) -> None:
        line = self._line[0] if len(self._line) == 1 else b"".join(self._line)
        if self._at_start:
            self._at_start = False
            line = line.removeprefix(_BOM)
        if line.startswith(b"data:"):
            self._data.append(line[6:] if line.startswith(b"data: ") else line[5:])
            return  # its bytes stay held
        if not line:
            if self._data:
                events.append(ServerSentEvent(self._type or b"message", b"\n".join(self._data)))
            self._type, self._data, self._nbytes = b"", [], 0
            return
        self._nbytes -= len(line)
        if line == b"data":
            self._data.append(b"")
        elif line.startswith(b"event:"):
            self._type = line[6:].removeprefix(b" ")
        # Comments, which keep a connection alive, ids and retry times mean nothing here.
