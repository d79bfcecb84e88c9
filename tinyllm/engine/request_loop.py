"""Several callers on one engine: each adds requests, anyone's step moves all of them, each gets its own results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence as Seq
from contextlib import contextmanager, suppress
from functools import partial
from threading import Lock, get_ident

from tinyllm.engine.llm_engine import LLMEngine
from tinyllm.engine.sequence import Sequence, Task
from tinyllm.errors import InvalidRequestError
from tinyllm.outputs import RequestOutput, StreamChunk
from tinyllm.sampling_params import SamplingParams

__all__ = ["RequestLoop"]

Result = StreamChunk | RequestOutput


class RequestLoop:
    """Shares an engine between callers that take turns. All of its use goes through here, one turn at a time.

    Requests and parked sequences may be given up at any time, by a garbage collection in the middle of a step too: what
    comes at the wrong time is put off to the end of the turn.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self._engine = engine
        self._inbox: dict[str, list[Result]] = {}  # of each request: what it was not asked for yet
        self._num_requests = 0
        self._lock = Lock()
        self._holder: int | None = None  # the thread whose turn it is
        self._put_off: deque[Callable[[], None]] = deque()

    @contextmanager
    def turn(self) -> Iterator[LLMEngine]:
        """The engine, for the length of a `with` block. Raises InvalidRequestError within another turn."""
        if self._holder == get_ident():
            raise InvalidRequestError("a logits processor cannot use the model that is calling it")
        try:
            with self._lock:
                self._holder = get_ident()
                try:
                    yield self._engine
                finally:
                    self._holder = None
        finally:
            self._catch_up()

    # ---- requests

    def add(
        self,
        token_ids: Seq[int],
        params: SamplingParams,
        task: Task,
        *,
        prompt: str | None = None,
        resume_from: Sequence | None = None,
        keep: bool = False,
    ) -> str:
        """Starts a request (see LLMEngine.add_request) and returns its id, which is the caller's to drop."""
        with self.turn() as engine:
            self._num_requests += 1
            request_id = str(self._num_requests)
            engine.add_request(
                request_id, token_ids, params, prompt=prompt, task=task, resume_from=resume_from, keep=keep
            )
            self._inbox[request_id] = []
            return request_id

    def step(self) -> None:
        """One step of the engine for all; what it brings waits for those who asked for it."""
        with self.turn() as engine:
            result = engine.step()
            for request_id, chunk in result.chunks:
                self._inbox[request_id].append(chunk)
            for output in result.finished:
                self._inbox[output.request_id].append(output)

    def take(self, request_id: str) -> list[Result]:
        """What has come for a request since it was last asked for. Raises InvalidRequestError if it was dropped."""
        if request_id not in self._inbox:
            raise InvalidRequestError("the request was ended before it was finished")
        results, self._inbox[request_id] = self._inbox[request_id], []
        return results

    def follow(self, request_id: str) -> Generator[StreamChunk, None, RequestOutput]:
        """Steps until a request has finished: yields its chunks, returns its output.

        Raises InvalidRequestError where the request fails.
        """
        while True:
            results = self.take(request_id)
            for result in results:
                if isinstance(result, StreamChunk):
                    yield result
                elif result.error is not None:
                    raise InvalidRequestError(result.error)
                else:
                    return result
            if not results:
                self.step()

    def drop(self, request_id: str) -> None:
        """Forgets a request, and ends it if it still runs."""
        self._soon(partial(self._drop, request_id))

    def release(self, parked: Sequence) -> None:
        """Gives up a parked sequence."""
        self._soon(partial(self._engine.release, parked))

    def _drop(self, request_id: str) -> None:
        self._engine.abort(request_id)
        with suppress(KeyError):  # kept, but nobody took it
            self._engine.release(self._engine.take_kept(request_id))
        self._inbox.pop(request_id, None)

    def _soon(self, action: Callable[[], None]) -> None:
        self._put_off.append(action)
        self._catch_up()

    def _catch_up(self) -> None:
        """Does what was put off, unless it is someone's turn, who will do it at its end."""
        while self._put_off and self._lock.acquire(blocking=False):
            try:
                while self._put_off:
                    self._put_off.popleft()()
            finally:
                self._lock.release()
