"""An observer that may fail without harm to what it observes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tinyllm.engine.observer import EngineObserver
from tinyllm.engine.scheduler import SchedulerOutput
from tinyllm.engine.sequence import Request, Sequence

if TYPE_CHECKING:
    from tinyllm.backends.base import F32Array

__all__ = ["Guard"]

_log = logging.getLogger("tinyllm.server")


class Guard:
    """Passes everything on to an observer until it fails; the engine's requests go on all the same.

    Args:
        on_failure: called once, when it has failed.
    """

    def __init__(self, observer: EngineObserver, on_failure: Callable[[], None]) -> None:
        self._observer = observer
        self._on_failure = on_failure
        self._failed = False

    @property
    def wants_logits(self) -> bool:
        return not self._failed and self._observer.wants_logits

    def request_added(self, request: Request) -> None:
        self._pass_on(self._observer.request_added, request)

    def request_aborted(self, request: Request) -> None:
        self._pass_on(self._observer.request_aborted, request)

    def logits_used(self, sequence: Sequence, position: int, logits: F32Array) -> None:
        self._pass_on(self._observer.logits_used, sequence, position, logits)

    def step_finished(self, output: SchedulerOutput, finished: list[Request]) -> None:
        self._pass_on(self._observer.step_finished, output, finished)

    def step_undone(self) -> None:
        self._pass_on(self._observer.step_undone)

    def _pass_on(self, tell: Callable[..., None], *what: Any) -> None:
        if self._failed:
            return
        try:
            tell(*what)
        except Exception:
            _log.exception("the live feed has failed; who watches begins again")
            self._failed = True
            self._on_failure()
