"""Writes a recording (see events) while an engine runs."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from tinyllm.engine.llm_engine import LLMEngine
from tinyllm.errors import RecordingError, reason
from tinyllm.recording.events import FORMAT, MAX_LINE_NBYTES, Event, Header
from tinyllm.recording.watcher import Watcher

__all__ = ["Recorder"]


class Recorder:
    """A recording in the making.

    The file is opened at once, so that a path which cannot be written is named before a model loads, and is written
    from `attach` on: each line when it happened, unbuffered. A disk that fails later does not stop the engine: the
    recording ends there, `error` says why, and `on_error` is told.

    Args:
        path: a new file, or an older recording to write over; any other file is refused.
        on_error: told in one line that the recording broke off; by default a RuntimeWarning is issued.

    Raises:
        RecordingError: the file cannot be written, or holds something else.
    """

    def __init__(self, path: str | Path, *, on_error: Callable[[str], None] | None = None) -> None:
        self.path = path
        self.error: str | None = None
        self._on_error = on_error or _warn
        try:
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
            self._file = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
            self._is_regular = stat.S_ISREG(os.fstat(self._file.fileno()).st_mode)
            head = self._file.read(64) if self._is_regular else b""
        except (OSError, ValueError) as error:  # ValueError: a null character
            raise RecordingError(f"cannot write the recording {path}: {reason(error)}") from error
        if head and FORMAT.encode() not in head:
            self.close()
            raise RecordingError(f"{path} exists and is not a recording: it is not written over")

    def attach(self, engine: LLMEngine, model: str | Path) -> None:
        """Records everything that an engine does from its beginning on.

        Raises:
            RecordingError: the engine has run already: what it computed is not in the recording; or the disk fails.
        """
        if engine.num_steps or engine.requests:
            raise RecordingError("a recording begins with a new engine: this one has run already")
        backend = engine.runner.model.backend
        spec = engine.runner.cache.spec
        header = Header(
            model=str(model),
            fingerprint=engine.fingerprint,
            vocab_size=engine.model_config.vocab_size,
            engine={
                **asdict(engine.config),
                "num_blocks": spec.num_blocks,
                "device": backend.name,
                "kv_dtype": spec.dtype,
            },
            kv=asdict(spec),
        )
        try:
            if self._is_regular:
                self._file.seek(0)
                self._file.truncate()
            self._write_line(header.to_json())
        except OSError as error:
            self.close()
            raise RecordingError(f"cannot write the recording {self.path}: {reason(error)}") from error
        engine.observers.append(Watcher(engine, self._record))

    def close(self) -> None:
        """Ends the recording; what the engine does from now on is not written."""
        with suppress(OSError):
            self._file.close()

    def _record(self, event: Event) -> None:
        if self._file.closed:
            return
        try:
            line = event.to_json()
            if len(line) > MAX_LINE_NBYTES:
                raise ValueError(f"a line of {len(line)} bytes; at most {MAX_LINE_NBYTES} can be read again")
            self._write_line(line)
        except (OSError, ValueError) as error:
            self.error = f"the recording {self.path} is incomplete: {reason(error)}"
            self.close()
            self._on_error(self.error)

    def _write_line(self, line: str) -> None:
        data = line.encode("ascii")
        while data:
            data = data[self._file.write(data) or 0 :]


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
