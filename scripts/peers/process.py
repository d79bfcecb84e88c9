"""The asking side of a worker: one process, that runs while it is asked and is stopped otherwise."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from peers.interface import UnavailableError

__all__ = ["PeerDiedError", "PeerFailedError", "PeerProcess"]

SCRIPTS = Path(__file__).parents[1]


class PeerFailedError(Exception):
    """What went wrong in a peer that can be asked again, in one line."""


class PeerDiedError(PeerFailedError):
    """How a peer's process ended, in one line."""


class PeerProcess:
    """A process that answers one request at a time.

    Thread pools of the programs spin for a while after their work: between requests the whole process is stopped, so
    that nothing of it takes part in another's time.

    Args:
        python: the interpreter that has the program.
        arguments: of worker.py.
        timeout: seconds after which an answer is given up, and the process ended.
    """

    def __init__(self, python: str, arguments: Sequence[str], *, timeout: float) -> None:
        self.timeout = timeout
        self._number = 0
        self._unread = b""
        self._errors = tempfile.TemporaryFile()  # what the program prints  # noqa: SIM115
        path = os.pathsep.join(filter(None, [str(SCRIPTS), os.environ.get("PYTHONPATH", "")]))
        try:
            self._process = subprocess.Popen(
                [python, "-m", "peers.worker", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={**os.environ, "PYTHONPATH": path},
            )
        except OSError as error:
            self._errors.close()
            raise UnavailableError(f"{python} cannot be run: {error.strerror or error}") from None

    def ask(self, do: str, **arguments: Any) -> Any:
        """The answer's value. Raises UnavailableError, PeerFailedError, PeerDiedError."""
        self._number += 1
        request = json.dumps({"id": self._number, "do": do, "with": arguments}) + "\n"
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(request.encode())
            self._process.stdin.flush()
        except OSError:
            raise self._ended() from None
        try:
            return self.answer(self._number)
        finally:
            self._signal(signal.SIGSTOP)

    def answer(self, number: int) -> Any:
        """The value of the answer with that number; lines that are none are passed over."""
        for line in self._lines(time.monotonic() + self.timeout):
            reply = _reply(line)
            if reply is None or reply["id"] != number:
                continue
            if "absent" in reply:
                raise UnavailableError(reply["absent"])
            if "failed" in reply:
                raise PeerFailedError(reply["failed"])
            return reply["value"]
        raise self._ended()

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with suppress(OSError):  # a request that was not read
                stream.close()  # type: ignore[union-attr]

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _signal(self, number: int) -> None:
        """Not to a process that has ended."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def _lines(self, deadline: float) -> Iterator[bytes]:
        """Lines of stdout until it ends. Raises PeerDiedError when they take too long."""
        assert self._process.stdout is not None
        stdout = self._process.stdout.fileno()
        while True:
            while b"\n" in self._unread:
                line, _, self._unread = self._unread.partition(b"\n")
                yield line
            if not select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self._process.kill()
                raise PeerDiedError(f"gave no answer in {self.timeout:g} s")
            chunk = os.read(stdout, 1 << 16)
            if not chunk:
                return
            self._unread += chunk

    def _ended(self) -> PeerDiedError:
        """The exit status, and the last line that the program printed."""
        status = self._process.wait()
        name = str(status)
        if status < 0:
            with suppress(ValueError):
                name = signal.Signals(-status).name
        self._errors.seek(0)
        printed = self._errors.read().decode("utf-8", "replace").strip()
        last = f": {printed.splitlines()[-1].strip()[:200]}" if printed else ""
        return PeerDiedError(f"its process ended with {name}{last}")


def _reply(line: bytes) -> dict[str, Any] | None:
    """A line as a reply, if it is one."""
    with suppress(ValueError):
        reply = json.loads(line)
        if isinstance(reply, dict) and "id" in reply and reply.keys() & {"value", "absent", "failed"}:
            return reply
    return None
