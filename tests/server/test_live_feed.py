"""The live feed: a state and the events after it are the engine's own tables, whatever happens, and no more."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import initialize, precondition, rule

from tests.server.live_picture import FACTS, Engine, Picture, parse
from tests.tiny import random_prompt, run_all, tiny_engine
from tests.unit.simulated_engine import Simulation
from tests.unit.test_engine_machine import EngineMachine
from tests.unit.test_scheduler import SIZES, SchedulerMachine
from tinyllm.engine.llm_engine import LLMEngine
from tinyllm.engine.scheduler import SchedulerOutput
from tinyllm.engine.sequence import Request, Task
from tinyllm.sampling import SamplingParams
from tinyllm.server.live.feed import LiveFeed
from tinyllm.server.live.viewer import Viewer


def nothing() -> None: ...


class Watching:
    """A feed with viewers that come and go, each with a picture; one of them reads rarely, and loses events."""

    def __init__(self, engine: Any) -> None:
        self.engine: Engine = engine
        self.feed = LiveFeed(engine, FACTS)
        self.viewers: list[tuple[Viewer, Picture]] = []

    def come(self, max_messages: int) -> None:
        viewer = Viewer(nothing, max_messages=max_messages)
        self.feed.attach(viewer)
        self.viewers.append((viewer, Picture()))

    def go(self, at: int) -> None:
        self.feed.detach(self.viewers.pop(at % len(self.viewers))[0])

    def compare(self) -> None:
        """To be called when nothing has happened since the last event."""
        for viewer, picture in self.viewers:
            if viewer.lost:
                self.feed.resync(viewer)
            picture.look(viewer)
            picture.compare(self.engine)
            picture.compare_sequences(self.engine)
        assert self.feed.num_viewers == len(self.viewers)


class Viewers:
    """Rules of a machine whose engine has viewers.

    Attributes:
        watching: the feed of its engine.
    """

    watching: Watching

    @rule(max_messages=st.sampled_from([1, 2, 3, 100]))
    def come(self, max_messages: int) -> None:
        if len(self.watching.viewers) < 3:
            self.watching.come(max_messages)
            self._catch_up()

    @precondition(lambda self: self.watching.viewers)
    @rule(at=st.integers(0, 9))
    def go(self, at: int) -> None:
        self.watching.go(at)

    def _catch_up(self) -> None:
        raise NotImplementedError


class WatchedEngineMachine(Viewers, EngineMachine):
    """The tiny engine in random use, each result compared with that of its request alone, with viewers besides."""

    preempt = None  # from outside it comes without an event

    @initialize(
        num_blocks=st.sampled_from([12, 16, 30]), budget=st.sampled_from([1, 5, 16, 64]), prefix_caching=st.booleans()
    )
    def begin(self, num_blocks: int, budget: int, prefix_caching: bool) -> None:
        super().begin(num_blocks, budget, prefix_caching)
        self.watching = Watching(self.engine)

    @rule(times=st.integers(1, 5), look=st.booleans())
    def step(self, times: int, look: bool) -> None:
        for _ in range(times):
            self._step()
        if look:
            self._catch_up()

    @precondition(lambda self: self.expected)
    @rule(at=st.integers(0, 99))
    def abort(self, at: int) -> None:
        self._catch_up()
        if self.expected:
            super().abort(at)
            self.watching.compare()

    @precondition(lambda self: self.expected)
    @rule()
    def interrupted_step(self) -> None:
        super().interrupted_step()
        self.watching.compare()

    def _catch_up(self) -> None:
        """Sequences at rest change hands without an event; a step tells of it."""
        before = self.engine.num_steps
        self._step()
        if self.engine.num_steps > before:
            self.watching.compare()


TestWatchedEngineMachine = WatchedEngineMachine.TestCase
TestWatchedEngineMachine.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


class WatchedSimulation(Simulation):
    """The simulated engine, with what a feed asks of an engine."""

    num_steps = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.observers: list[Any] = []
        self.block_manager = self.manager

    @property
    def requests(self) -> dict[str, Request]:
        return {request.request_id: request for request in self.goals}

    def add(self, *args: Any, **options: Any) -> None:
        before = set(self.goals)
        super().add(*args, **options)
        for request in self.goals.keys() - before:
            for observer in self.observers:
                observer.request_added(request)

    def abort(self, request: Request) -> None:
        super().abort(request)
        for observer in self.observers:
            observer.request_aborted(request)

    def step(self, *, interrupted: bool = False) -> SchedulerOutput:
        before = list(self.goals)
        output = super().step(interrupted=interrupted)
        if output.scheduled:
            self.num_steps += not interrupted
            for observer in self.observers:
                if interrupted:
                    observer.step_undone()
                else:
                    observer.step_finished(output, [request for request in before if request not in self.goals])
        return output


class WatchedSchedulerMachine(Viewers, SchedulerMachine):
    """All block sizes, budgets and windows, with forks, copies, preemption, evictions and aborts."""

    preempt = None

    @initialize(
        sizes=SIZES, budget=st.sampled_from([1, 3, 8, 17, 40]), seqs=st.integers(1, 8), prefix_caching=st.booleans()
    )
    def begin(self, sizes: tuple[int, int], budget: int, seqs: int, prefix_caching: bool) -> None:
        self.simulation = WatchedSimulation(*sizes, budget, seqs, prefix_caching)
        self.watching = Watching(self.simulation)

    @rule(times=st.integers(1, 6), look=st.booleans())
    def step(self, times: int, look: bool) -> None:
        for _ in range(times):
            self.simulation.step()
        if look:
            self._catch_up()

    @precondition(lambda self: self.simulation.goals)
    @rule(at=st.integers(0, 100))
    def abort(self, at: int) -> None:
        self._catch_up()
        if self.simulation.goals:
            super().abort(at)
            self.watching.compare()

    @rule()
    def interrupted_step(self) -> None:
        before = self.simulation.num_steps
        self._catch_up()
        super().interrupted_step()
        if self.simulation.goals and self.simulation.num_steps > before:
            self.watching.compare()

    def _catch_up(self) -> None:
        before = self.simulation.num_steps
        self.simulation.step()
        if self.simulation.num_steps > before:
            self.watching.compare()


TestWatchedSchedulerMachine = WatchedSchedulerMachine.TestCase
TestWatchedSchedulerMachine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


# ---- by itself


def watched(engine: LLMEngine, **options: Any) -> tuple[LiveFeed, Viewer]:
    feed, viewer = LiveFeed(engine, FACTS), Viewer(nothing, **options)
    feed.attach(viewer)
    return feed, viewer


def test_what_an_event_holds() -> None:
    engine = tiny_engine(num_blocks=8)
    feed, viewer = watched(engine)
    engine.add_request("a secret name", random_prompt(20), SamplingParams(max_tokens=2, n=2, temperature=0))
    engine.step()
    engine.step()
    (_, state), (_, request), (_, first), (_, second) = parse("".join(viewer.take()))
    assert (state["model"], state["num_blocks"], state["block_size"], state["max_batch_tokens"]) == ("tiny", 8, 16, 64)
    assert (state["weights_nbytes"], state["kv_cache_nbytes"], state["workspace_nbytes"]) == (1000, 2000, 300)
    assert (state["blocks"], state["requests"], state["free"], state["paused"]) == ([], [], 8, False)
    number = request["request"]
    wanted = {"request": number, "prompt": 20, "max_tokens": 2, "task": "generate", "sequences": 2}
    assert {name: value for name, value in request.items() if name != "at"} == wanted
    assert first["ran"] == [[number, 0, 0, 20]]
    assert first["admitted"] == [[number, 0, 0]]
    assert first["forks"] == [[number, 1, 0]]
    assert first["tokens"] == [[number, 0, 20, 1], [number, 1, 20, 1]]
    assert first["blocks"] == [
        [0, True, [[number, 0, 0], [number, 1, 0]]],
        [1, False, [[number, 0, 1], [number, 1, 1]]],
    ]
    assert (first["free"], first["waiting"], first["running"]) == (6, 0, 2)
    assert second["copies"] == [[1, 2]]
    assert second["finished"] == [[number, 0, "length"], [number, 1, "length"]]
    assert second["free"] == 8
    assert 0 <= request["at"] <= first["at"] <= second["at"]
    assert first["seconds"] == pytest.approx(first["at"] - request["at"], abs=1e-5)
    assert second["seconds"] == pytest.approx(second["at"] - first["at"], abs=1e-5)
    feed.detach(viewer)


def test_a_viewer_in_the_middle_of_a_run_learns_when_requests_came() -> None:
    engine = tiny_engine()
    engine.add_request("a", random_prompt(20), SamplingParams(max_tokens=5))
    engine.step()
    engine.step()
    _, viewer = watched(engine)
    (_, state) = parse("".join(viewer.take()))[0]
    (request,) = state["requests"]
    assert request["at"] <= request["first"] <= 0 <= state["at"]
    assert request["sequences"] == [[0, "running", 21, 22]]
    assert state["steps"] == 2


def test_nothing_that_a_request_says_is_told() -> None:
    """No id of a token, no name of a request, no salt: only sizes."""
    engine = tiny_engine(num_blocks=30, max_batch_tokens=16)
    _, viewer = watched(engine, max_messages=10_000, max_nbytes=1 << 30)
    keep = SamplingParams(max_tokens=5, cache_salt="tenant-7f3a", temperature=0)
    engine.add_request("chatcmpl-5e1b", random_prompt(30), keep, prompt="my medical history", task=Task.GENERATE)
    engine.add_request("cmpl-77aa", random_prompt(30), SamplingParams(max_tokens=5, beams=2, n=2))
    engine.step()
    feed = LiveFeed(engine, FACTS)
    second = Viewer(nothing)
    feed.attach(second)
    engine.abort("cmpl-77aa")
    run_all(engine)
    allowed = {
        *("step", "at", "seconds", "ran", "admitted", "preempted", "evicted", "copies", "forks", "tokens", "finished"),
        *("blocks", "free", "waiting", "running", "request", "prompt", "max_tokens", "task", "sequences", "abort"),
    }
    for text in (viewer.take(), second.take()):
        for secret in ("medical", "7f3a", "5e1b", "77aa", "digest", "params", "salt", "token_ids"):
            assert secret not in "".join(text)
        for event, data in parse("".join(text)):
            if event == "state":
                for request in data["requests"]:
                    assert set(request) == {"request", "at", "first", "prompt", "max_tokens", "task", "sequences"}
                    assert isinstance(request["prompt"], int)
                continue
            assert set(data) <= allowed
            for item in data.get("tokens", ()):
                assert len(item) == 4 and all(isinstance(value, int) for value in item)


def test_nobody_watches_then_nothing_is_done() -> None:
    engine = tiny_engine()
    engine.add_request("a", random_prompt(20), SamplingParams(max_tokens=9))
    feed = LiveFeed(engine, FACTS)
    assert engine.observers == []
    one, two = Viewer(nothing), Viewer(nothing)
    feed.attach(one)
    feed.attach(two)
    assert [event for event, _ in parse("".join(one.take()))] == ["state"]
    assert len(engine.observers) == 1
    assert not engine.observers[0].wants_logits
    feed.detach(one)
    engine.step()
    assert len(two.take()) == 2
    feed.detach(two)
    feed.detach(two)
    assert engine.observers == []
    engine.step()
    assert one.take() == []
    assert feed.state()["steps"] == 2
    assert engine.observers == []
    feed.attach(one)
    picture = Picture()
    picture.look(one)
    picture.compare(engine)


def test_no_logits_leave_the_device_for_a_viewer(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine("cpu")
    kept: list[bool] = []
    outcomes = engine.runner.outcomes

    def spy(*args: Any, keep_logits: bool) -> Any:
        kept.append(keep_logits)
        return outcomes(*args, keep_logits=keep_logits)

    monkeypatch.setattr(engine.runner, "outcomes", spy)
    engine.add_request("a", random_prompt(20), SamplingParams(max_tokens=3))
    watched(engine)
    run_all(engine)
    assert kept == [False] * 3


def test_a_slow_viewer_keeps_little_and_gets_the_state_anew() -> None:
    engine = tiny_engine(max_batch_tokens=256)
    for index in range(8):
        engine.add_request(str(index), random_prompt(20, index), SamplingParams(max_tokens=90, ignore_eos=True))
    wakes: list[int] = []
    slow = Viewer(lambda: wakes.append(1), max_messages=10, max_nbytes=20_000)
    feed = LiveFeed(engine, FACTS)
    feed.attach(slow)
    fast = Viewer(nothing)
    feed.attach(fast)
    picture, seen = Picture(), 0
    for _ in range(50):
        engine.step()
        assert len(slow._messages) <= 10 and slow._nbytes <= 20_000
        picture.look(fast)
    assert slow.lost and slow.take() == []
    assert len(wakes) <= 3, "nobody is woken for what is not kept"
    feed.resync(slow)
    late = Picture()
    late.look(slow)
    assert not slow.lost
    engine.step()
    late.look(slow)
    picture.look(fast)
    for one in (late, picture):
        one.compare(engine)
        one.compare_sequences(engine)
        seen += one.steps
    assert seen == 2 * engine.num_steps


def test_a_viewer_is_bounded_in_bytes_too() -> None:
    viewer = Viewer(nothing, max_messages=100, max_nbytes=100)
    viewer.push("x" * 60)
    viewer.push("x" * 40)
    assert not viewer.lost
    assert len(viewer.take()) == 2
    viewer.push("x" * 101)
    assert viewer.lost
    viewer.begin("y" * 500)
    assert viewer.take() == ["y" * 500]


def test_pauses_are_told_and_not_counted_as_a_step_s_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    engine, paused = tiny_engine(), False
    feed, viewer = LiveFeed(engine, FACTS, is_paused=lambda: paused), Viewer(nothing)
    feed.attach(viewer)
    engine.add_request("a", random_prompt(20), SamplingParams(max_tokens=9))
    now = 102.0
    engine.step()
    paused = True
    feed.pause_changed()
    now = 150.0
    feed.step_requested()
    now = 151.0
    engine.step()
    now = 200.0
    paused = False
    feed.pause_changed()
    now = 204.0
    engine.step()
    messages = parse("".join(viewer.take()))
    assert [event for event, _ in messages] == ["state", "request", "step", "paused", "step", "paused", "step"]
    assert [data["seconds"] for event, data in messages if event == "step"] == [2, 1, 4]
    assert [data["paused"] for event, data in messages if event == "paused"] == [True, False]


def test_two_kinds_of_observers_at_once() -> None:
    """One that reads logits, from the beginning; a viewer that comes and goes; the first misses nothing."""
    rows: list[int] = []

    class Reader:
        wants_logits = True

        def __getattr__(self, name: str) -> Any:
            return nothing_of

        def logits_used(self, sequence: Any, position: int, logits: Any) -> None:
            rows.append(position)

    def nothing_of(*args: Any) -> None: ...

    engine = tiny_engine()
    engine.observers.append(Reader())
    engine.add_request("a", random_prompt(20), SamplingParams(max_tokens=6))
    engine.step()
    feed, viewer = watched(engine)
    engine.step()
    feed.detach(viewer)
    run_all(engine)
    assert rows == [19, 20, 21, 22, 23, 24]
    assert len(engine.observers) == 1


def test_a_feed_that_fails_ends_its_viewers_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    finished: list[int] = []

    class Last:
        wants_logits = False

        def __getattr__(self, name: str) -> Any:
            return lambda *args: finished.append(1) if name == "step_finished" else None

    engine = tiny_engine()
    feed, viewer = watched(engine)
    engine.observers.append(Last())  # after the feed: it must not miss the event either
    engine.add_request("a", random_prompt(20), SamplingParams(max_tokens=4))
    engine.step()
    with monkeypatch.context() as broken:
        broken.setattr(feed, "_send", lambda *args: 1 / 0)
        engine.step()
    assert viewer.closed and feed.num_viewers == 0
    assert len(finished) == 2 and len(engine.observers) == 1
    feed.detach(viewer)
    again, picture = Viewer(nothing), Picture()
    feed.attach(again)
    run_all(engine)
    assert len(finished) == 4
    picture.look(again)
    picture.compare(engine)


def test_numbers_of_requests_long_gone_are_forgotten() -> None:
    engine = tiny_engine()
    feed, viewer = watched(engine, max_messages=1)
    for index in range(60):
        engine.add_request(str(index), [1, 2], SamplingParams(max_tokens=1))
        engine.step()
    assert len(feed._numbers) < 20
    assert viewer.lost
