"""One viewer's queue, between the engine's thread and whoever writes to the viewer."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

__all__ = ["Viewer"]

MAX_MESSAGES = 256
MAX_NBYTES = 1 << 20


class Viewer:
    """Keeps messages until they are taken, and no more of them than there is room for.

    A viewer that falls behind loses all that it has not seen: `lost` says so, and nothing more is kept for it until it
    is given a whole `state` again.

    Args:
        wake: called, from the engine's thread, when there is something to take or to learn; it must not block.
    """

    def __init__(
        self, wake: Callable[[], None], *, max_messages: int = MAX_MESSAGES, max_nbytes: int = MAX_NBYTES
    ) -> None:
        self.lost = False
        self.closed = False
        self._wake = wake
        self._max_messages = max_messages
        self._max_nbytes = max_nbytes
        self._messages: list[str] = []
        self._nbytes = 0
        self._lock = Lock()

    def begin(self, state: str) -> None:
        """Puts a state in the place of all that was not taken."""
        with self._lock:
            self._messages, self._nbytes, self.lost = [state], 0, False  # the state itself has no bound
        self._wake()

    def push(self, message: str) -> None:
        """Adds a message; ASCII, so that characters are bytes."""
        with self._lock:
            if self.lost:
                return
            was_empty = not self._messages
            self._nbytes += len(message)
            if len(self._messages) >= self._max_messages or self._nbytes > self._max_nbytes:
                self._messages, self._nbytes, self.lost = [], 0, True
            else:
                self._messages.append(message)
        if was_empty or self.lost:
            self._wake()

    def take(self) -> list[str]:
        """All messages that came since the last call."""
        with self._lock:
            messages, self._messages, self._nbytes = self._messages, [], 0
        return messages

    def close(self) -> None:
        """There will be no more."""
        self.closed = True
        self._wake()
