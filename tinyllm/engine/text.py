"""The text of one growing sequence: decoding token by token, stop strings, and what may already be shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

__all__ = ["TextDecoder", "TextStream"]


class TextDecoder(Protocol):
    """An incremental decoder; see tinyllm.tokenizer.StreamDecoder."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class TextStream:
    """Collects text, finds the first stop string, and holds back an end that may yet become one.

    Attributes:
        text: all text so far, cut at the stop string once one was found.
        stopped_by: the stop string that was found, if any.
    """

    def __init__(self, decoder: TextDecoder | None, stop: Sequence[str], *, include_stop: bool) -> None:
        self._decoder = decoder
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._include_stop = include_stop
        self._shown = 0
        self.text = ""
        self.stopped_by: str | None = None

    def push(self, token_id: int, *, may_stop: bool = True) -> bool:
        """Adds a token; True if its text completed a stop string, at which the text then ends."""
        if self._decoder is None:
            return False
        return self._append(self._decoder.push(token_id), may_stop)

    def finish(self) -> None:
        """Adds what the decoder still held back; nothing follows."""
        if self._decoder is not None and self.stopped_by is None:
            self._append(self._decoder.flush(), may_stop=False)

    def take(self, *, final: bool = False) -> str:
        """The text not yet taken that can no longer change; all of it when `final`."""
        end = len(self.text) if final or self.stopped_by is not None else len(self.text) - self._held_back()
        piece = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece

    def _append(self, piece: str, may_stop: bool) -> bool:
        searched = max(0, len(self.text) - self._longest + 1)
        self.text += piece
        if not (piece and may_stop and self._stop):
            return False
        matches = [(at, stop) for stop in self._stop if (at := self.text.find(stop, searched)) >= 0]
        if not matches:
            return False
        at, self.stopped_by = min(matches, key=lambda match: (match[0], -len(match[1])))
        self.text = self.text[: at + len(self.stopped_by) if self._include_stop else at]
        return True

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for length in range(min(self._longest - 1, len(self.text)), 0, -1):
            end = self.text[-length:]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0
