"""A progress bar over prompts, on stderr when it is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

from tinyllm.cli import console

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["PromptProgress"]


class PromptProgress:
    """Counts finished prompts and generated tokens. Draws nothing unless `shown` and stderr is a terminal."""

    def __init__(self, total: int, *, shown: bool) -> None:
        self._progress: Progress | None = None
        self._tokens = 0
        if shown and console.is_terminal(sys.stderr):
            self._progress, self._task = _bar(total)

    def __enter__(self) -> PromptProgress:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress:
            self._progress.stop()

    def advance(self, tokens: int) -> None:
        """One more prompt is finished, with so many tokens generated."""
        self._tokens += tokens
        if self._progress:
            self._progress.update(self._task, advance=1, tokens=self._tokens)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Takes the bar away while results are written to the same terminal."""
        both = self._progress is not None and console.is_terminal(sys.stdout)
        if both and self._progress:
            self._progress.stop()
        try:
            yield
        finally:
            if both and self._progress:
                self._progress.start()


def _bar(total: int) -> tuple[Progress, TaskID]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    progress = Progress(
        TextColumn("prompts"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]} tokens"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    return progress, progress.add_task("prompts", total=total, tokens=0)
