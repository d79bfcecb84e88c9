"""Opens a recording for replay: loads the model that it names, with the options that it was run with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tinyllm.engine.llm_engine import LLMEngine
from tinyllm.llm import LLM
from tinyllm.recording.events import Header
from tinyllm.recording.replay import Replay

__all__ = ["open_replay"]


def open_replay(
    path: str | Path,
    model: str | Path | None = None,
    *,
    num_threads: int | None = None,
    on_event: Callable[[str], None] | None = None,
) -> Replay:
    """A Replay whose first step is still to run.

    Args:
        path: the recording.
        model: the model to run it with; by default the one that it names.
        num_threads: may differ from the recording's: the bits do not.
        on_event: as of LLM.

    Raises:
        RecordingError: see Replay.
        TinyLLMError: the model cannot be loaded; see LLM.
    """

    def make_engine(header: Header) -> LLMEngine:
        options = header.replay_options() | {"num_threads": num_threads}
        return LLM(header.model if model is None else model, on_event=on_event, **options).engine

    return Replay(path, make_engine)
