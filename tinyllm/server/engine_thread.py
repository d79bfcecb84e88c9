"""The one thread that runs the engine: requests enter and leave between steps, results go back to event loops."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Protocol, TypeVar

from tinyllm.engine.llm_engine import LLMEngine
from tinyllm.engine.sequence import Task
from tinyllm.errors import InvalidRequestError
from tinyllm.llm import LLM
from tinyllm.outputs import RequestOutput, StreamChunk
from tinyllm.server.errors import ApiError, invalid, unavailable
from tinyllm.server.submission import Delivery, Job, Submission

__all__ = ["EngineThread", "RequestObserver"]

T = TypeVar("T")
_log = logging.getLogger("tinyllm.server")


class RequestObserver(Protocol):
    """Told on the engine's thread what becomes of requests; times are of time.monotonic()."""

    def request_started(self, arrival_time: float, now: float) -> None: ...

    def tokens_streamed(
        self, num_tokens: int, previous_time: float | None, arrival_time: float, now: float
    ) -> None: ...

    def request_ended(self, output: RequestOutput, arrival_time: float, now: float) -> None: ...

    def request_refused(self) -> None: ...


@dataclass(eq=False)
class _Tracked:
    """A job in the engine."""

    submission: Submission
    index: int
    started: bool = False
    last_token_times: dict[int, float] = field(default_factory=dict)  # of each continuation


class EngineThread:
    """Runs an LLM's engine. From `start` on the engine is this thread's: nobody else may step it.

    Args:
        max_waiting: jobs that may wait to be started; see `submit`.
        observer: told of requests, for metrics.

    Attributes:
        llm: its encode and encode_chat may be used from any thread, its engine only through `call`.
        draining: whether new jobs are refused, since the server is about to stop.
        failure: what ended the thread, where something did that should not.
    """

    def __init__(self, llm: LLM, *, max_waiting: int, observer: RequestObserver | None = None) -> None:
        self.llm = llm
        self.draining = False
        self.failure: BaseException | None = None
        self._engine = llm.engine
        self._max_waiting = max_waiting
        self._observer = observer
        self._wake = Condition()
        self._actions: deque[Callable[[], None]] = deque()
        self._tracked: dict[str, _Tracked] = {}
        self._num_requests = 0
        self._num_waiting = 0  # jobs submitted that no step has admitted yet
        self._recent_ends: deque[float] = deque(maxlen=32)
        self._paused = False
        self._steps_due = 0
        self._stopping = False
        self._thread = Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the step that is running. Jobs that are left get an error."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()

    # ---- for event loops

    @property
    def num_waiting(self) -> int:
        """Jobs that no step has admitted yet."""
        return self._num_waiting

    @property
    def num_running(self) -> int:
        """Jobs that were admitted and have not ended."""
        return max(0, len(self._tracked) - self._num_waiting)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self.failure is None

    def submit(self, jobs: list[Job]) -> Submission:
        """Puts jobs in the queue, all or none. To be called on an event loop, where their results will arrive.

        Raises:
            ApiError: 429 when the queue is full, 503 when the server stops or its engine has failed.
        """
        if self.failure is not None:
            raise unavailable("the engine has failed; the server must be started again")
        if self.draining:
            raise unavailable("the server is about to stop")
        if len(jobs) > self._max_waiting:
            raise invalid(f"{len(jobs)} prompts in one request; the queue holds {self._max_waiting}")
        submission = Submission(jobs, self._abort)
        with self._wake:
            if self._stopping:  # from here on nobody looks at the queue
                raise unavailable("the server has stopped")
            if self._num_waiting + len(jobs) > self._max_waiting:
                if self._observer is not None:
                    self._observer.request_refused()
                raise self._queue_full()
            self._num_waiting += len(jobs)
            self._actions.append(lambda: self._add(submission))
            self._wake.notify()
        return submission

    def call(self, action: Callable[[LLMEngine], T]) -> Future[T]:
        """Runs an action on the engine's thread, between two steps; also while paused."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(action(self._engine))
            except BaseException as error:
                future.set_exception(error)

        with self._wake:
            if self._stopping or self.failure is not None:
                future.set_exception(unavailable("the server is about to stop"))
                return future
            self._actions.append(run)
            self._wake.notify()
        return future

    async def drain(self, seconds: float) -> None:
        """Refuses new jobs and waits for the others; those still running after `seconds` are ended."""
        self.draining = True
        self.resume()
        deadline = time.monotonic() + seconds
        while self._busy and self.alive and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if self._busy and self.alive:
            with suppress(ApiError):
                await asyncio.wrap_future(self.call(lambda engine: self._abort_all()))

    @property
    def _busy(self) -> bool:
        return bool(self._tracked) or self._num_waiting > 0

    # ---- pause, step, resume

    @property
    def paused(self) -> bool:
        return self._paused

    def pause(self) -> None:
        """No step begins any more; requests may still come and go."""
        with self._wake:
            self._paused = not self.draining
            self._steps_due = 0

    def resume(self) -> None:
        with self._wake:
            self._paused = False
            self._wake.notify()

    def single_step(self) -> None:
        """While paused: one step, as soon as there is something to run."""
        with self._wake:
            if self._paused:
                self._steps_due += 1
                self._wake.notify()

    # ---- the thread

    def _run(self) -> None:
        actions: deque[Callable[[], None]] = deque()
        try:
            while True:
                with self._wake:
                    while not (self._actions or self._stopping or self._may_step()):
                        self._wake.wait()
                    actions, self._actions = self._actions, deque()
                    stopping = self._stopping
                while actions:
                    actions.popleft()()
                if stopping:
                    break
                if self._may_step():
                    self._step()
        except BaseException as error:
            _log.exception("the engine has failed")
            self.failure = error
        finally:
            self._give_up(actions)

    def _may_step(self) -> bool:
        return self._engine.has_unfinished_requests() and (not self._paused or self._steps_due > 0)

    def _step(self) -> None:
        self._steps_due = max(0, self._steps_due - 1)
        try:
            result = self._engine.step()
        except Exception:  # whatever it was, the next step might fail of it again
            _log.exception("a step of the engine failed; its requests are ended")
            self._end_all(_failed())
            return
        now = time.monotonic()
        self._note_started(now)
        parcels: dict[Submission, list[Delivery]] = {}
        for request_id, chunk in result.chunks:
            tracked = self._tracked.get(request_id)
            if tracked is not None:
                self._note_tokens(tracked, chunk, now)
                parcels.setdefault(tracked.submission, []).append(Delivery(tracked.index, chunk))
        for output in result.finished:
            tracked = self._tracked.pop(output.request_id, None)
            if tracked is not None:
                self._note_ended(tracked, output, now)
                parcels.setdefault(tracked.submission, []).append(Delivery(tracked.index, _last(output)))
        _send(parcels)

    def _add(self, submission: Submission) -> None:
        """Starts the jobs of a submission."""
        parcels: list[Delivery] = []
        for index, job in enumerate(submission.jobs):
            self._num_requests += 1
            request_id = str(self._num_requests)
            try:
                self._engine.add_request(request_id, job.token_ids, job.params, prompt=job.prompt, task=job.task)
            except InvalidRequestError as error:
                self._num_waiting_down()
                parcels.append(Delivery(index, invalid(str(error))))
            except Exception:
                _log.exception("a request could not be started")
                self._engine.abort(request_id)  # it may be in the engine already
                self._num_waiting_down()
                parcels.append(Delivery(index, _failed()))
            else:
                self._tracked[request_id] = _Tracked(submission, index)
        if parcels:
            _send({submission: parcels})

    def _abort(self, submission: Submission) -> None:
        """Called on the event loop."""
        with self._wake:
            self._actions.append(lambda: self._end_tracked(lambda tracked: tracked.submission is submission))
            self._wake.notify()

    def _abort_all(self) -> None:
        self._end_tracked(lambda tracked: True)

    def _end_tracked(self, chosen: Callable[[_Tracked], bool]) -> None:
        """Ends jobs that were given up; what they have so far is their output."""
        now = time.monotonic()
        parcels: dict[Submission, list[Delivery]] = {}
        for request_id, tracked in [pair for pair in self._tracked.items() if chosen(pair[1])]:
            del self._tracked[request_id]
            output = self._engine.abort(request_id)
            assert output is not None
            self._note_ended(tracked, output, now)
            whole = tracked.submission.jobs[tracked.index].task is not Task.GENERATE  # a part of it would be wrong
            item = unavailable("the server stopped before this was computed") if whole else output
            parcels.setdefault(tracked.submission, []).append(Delivery(tracked.index, item))
        _send(parcels)

    def _end_all(self, error: ApiError) -> None:
        """Ends all jobs, for a fault of ours."""
        for request_id, tracked in self._tracked.items():
            self._engine.abort(request_id)
            if not tracked.started:
                self._num_waiting_down()
        self._refuse_tracked(error)

    def _refuse_tracked(self, error: ApiError) -> None:
        """Forgets all jobs, and tells those who wait for them why."""
        parcels: dict[Submission, list[Delivery]] = {}
        for tracked in self._tracked.values():
            parcels.setdefault(tracked.submission, []).append(Delivery(tracked.index, error))
        self._tracked = {}
        _send(parcels)

    def _give_up(self, actions: deque[Callable[[], None]]) -> None:
        """The thread ends, with some actions left to do: nobody waits for it in vain."""
        with self._wake:
            self._stopping = True
            actions += self._actions
            self._actions = deque()
        for action in actions:
            with suppress(Exception):  # an engine that has failed may fail again
                action()
        self._num_waiting = 0
        self._refuse_tracked(unavailable("the server has stopped"))

    # ---- what is counted

    def _note_started(self, now: float) -> None:
        if self._num_waiting == 0:
            return
        for request_id, tracked in self._tracked.items():
            if tracked.started:
                continue
            request = self._engine.requests.get(request_id)
            if request is None or request.num_cached_tokens is not None:
                tracked.started = True
                self._num_waiting_down()
                if self._observer is not None:
                    self._observer.request_started(tracked.submission.arrival_time, now)

    def _note_tokens(self, tracked: _Tracked, chunk: StreamChunk, now: float) -> None:
        if self._observer is not None and chunk.token_ids:
            previous = tracked.last_token_times.get(chunk.index)
            self._observer.tokens_streamed(len(chunk.token_ids), previous, tracked.submission.arrival_time, now)
            tracked.last_token_times[chunk.index] = now

    def _note_ended(self, tracked: _Tracked, output: RequestOutput, now: float) -> None:
        if not tracked.started:
            self._num_waiting_down()
        self._recent_ends.append(now)
        if self._observer is not None:
            self._observer.request_ended(output, tracked.submission.arrival_time, now)

    def _num_waiting_down(self) -> None:
        with self._wake:
            self._num_waiting -= 1

    def _queue_full(self) -> ApiError:
        """Says when to come again: when, at the present rate, a tenth of the queue will have been served."""
        ends = list(self._recent_ends)
        seconds = 1.0
        if len(ends) > 1:
            seconds = (ends[-1] - ends[0]) / (len(ends) - 1) * max(1, self._max_waiting // 10)
        return ApiError(
            429,
            f"the queue is full: {self._num_waiting} requests wait",
            type="rate_limit_error",
            code="queue_full",
            headers={"Retry-After": str(min(60, max(1, round(seconds))))},
        )


def _failed() -> ApiError:
    return ApiError(500, "the engine failed while it computed this", type="server_error")


def _last(output: RequestOutput) -> RequestOutput | ApiError:
    return output if output.error is None else invalid(output.error)


def _send(parcels: dict[Submission, list[Delivery]]) -> None:
    """Hands parcels to the event loops that wait for them, one wake-up for each loop."""
    loops: dict[asyncio.AbstractEventLoop, list[tuple[Submission, list[Delivery]]]] = {}
    for submission, items in parcels.items():
        loops.setdefault(submission.loop, []).append((submission, items))
    for loop, mail in loops.items():
        with suppress(RuntimeError):  # the loop was closed: nobody waits there
            loop.call_soon_threadsafe(_deliver, mail)


def _deliver(mail: Iterable[tuple[Submission, list[Delivery]]]) -> None:
    for submission, items in mail:
        submission.deliver(items)
