"""A recorded run is run again: every step the same, bit for bit; and where it is not, the first difference is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny import random_prompt, run_all, tiny_engine
from tinyllm.engine.llm_engine import LLMEngine
from tinyllm.engine.sequence import Sequence, Task
from tinyllm.errors import RecordingError
from tinyllm.recording.events import Event, Header, Step
from tinyllm.recording.reader import Recording
from tinyllm.recording.recorder import Recorder
from tinyllm.recording.replay import Replay, ReplayDifferenceError
from tinyllm.recording.state import engine_state, state_lines
from tinyllm.recording.watcher import Watcher
from tinyllm.sampling_params import SamplingParams

OPTIONS: dict[str, Any] = {"max_batch_tokens": 33, "num_blocks": 14, "max_num_seqs": 8}


def recorded_engine(path: Path, device: str = "cpu", **options: Any) -> tuple[LLMEngine, Recorder]:
    engine = tiny_engine(device, **{**OPTIONS, **options})
    recorder = Recorder(path, on_error=pytest.fail)
    recorder.attach(engine, "tiny")
    return engine, recorder


def add(engine: LLMEngine, name: str, prompt: list[int], task: Task = Task.GENERATE, **params: Any) -> None:
    engine.add_request(name, prompt, SamplingParams(**params), task=task)


def mixed_run(engine: LLMEngine) -> None:
    """Preemptions, forks, prefix hits, evictions, beams, windows, scores and aborts, arriving while others run."""
    shared = random_prompt(40)
    add(engine, "greedy", [*shared, 1], temperature=0, max_tokens=30)
    add(engine, "forks", random_prompt(27), n=3, max_tokens=24, temperature=0.9, top_k=20, seed=7)
    for _ in range(6):
        engine.step()
    add(engine, "hit", [*shared, 2], max_tokens=20, seed=(1 << 64) - 1, cache_salt="")
    add(engine, "salted", [*shared, 3], max_tokens=9, cache_salt="\u2028</script>\u202e")
    add(engine, "beams", random_prompt(21), beams=3, n=2, max_tokens=12, length_penalty=0.7)
    add(engine, "victim", random_prompt(50, 3), max_tokens=40)
    for _ in range(5):
        engine.step()
    assert engine.abort("victim") is not None
    add(engine, "victim", random_prompt(9, 4), max_tokens=3, logit_bias={3: 2.5, 9: -1.0}, stop_token_ids=[5])
    add(engine, "best", random_prompt(18, 5), best_of=3, n=2, max_tokens=8)
    add(engine, "urgent", random_prompt(70, 6), priority=5, max_tokens=6, prompt_logprobs=1, logprobs=2)
    add(engine, "window", random_prompt(60, 7), window=20, sinks=3, max_tokens=40)
    add(engine, "score", random_prompt(33, 8), Task.SCORE, prompt_logprobs=0)
    add(engine, "embed", random_prompt(35, 9), Task.EMBED)
    for i in range(6):
        add(engine, f"late {i}", shared[: 16 + 3 * i], max_tokens=15 + i, min_p=0.05, seed=-i, priority=-i)
    run_all(engine)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recording") / "run.jsonl"
    engine, recorder = recorded_engine(path)
    mixed_run(engine)
    recorder.close()
    return path


def replay(
    path: Path, device: str = "cpu", mutate: Callable[[LLMEngine], None] | None = None, **options: Any
) -> Replay:
    def make_engine(header: Header) -> LLMEngine:
        engine = tiny_engine(device, **{**OPTIONS, **options})
        if mutate is not None:
            mutate(engine)
        return engine

    return Replay(path, make_engine)


def steps_of(path: Path) -> list[Step]:
    return [event for event in Recording(path) if isinstance(event, Step)]


def test_the_mixed_run_holds_what_it_is_meant_to(mixed: Path) -> None:
    steps = steps_of(mixed)
    assert len(steps) > 60
    for name in ("preempted", "copies", "evicted", "forks"):
        assert sum(len(getattr(step, name)) for step in steps) > 2, name
    assert any(item.hit > 0 for step in steps for item in step.admitted)
    kept = [change for step in steps for change in step.blocks if change.cached and not change.owners]
    assert kept
    reasons = {item.reason for step in steps for item in step.finished}
    assert {"length", None} <= reasons


def test_what_ran_goes_on_where_the_step_before_or_the_cached_prefix_ended(mixed: Path) -> None:
    computed: dict[tuple[str, int], int] = {}
    for step in steps_of(mixed):
        for fork in step.forks:
            computed[fork.request_id, fork.sequence] = -1  # where its parent is, at the end of this step
        starts = {(a.request_id, a.sequence): a.hit for a in step.admitted}
        for ran in step.ran:
            name = ran.request_id, ran.sequence
            assert ran.start == starts.get(name, computed.get(name)), step.number
            computed[name] = ran.start + ran.num_tokens
        for fork in step.forks:
            computed[fork.request_id, fork.sequence] = computed[fork.request_id, fork.parent]


def test_the_digest_is_the_documented_one_over_all_rows(mixed: Path) -> None:
    for step in (again := replay(mixed)):
        digest = blake2b(digest_size=8)
        for (request_id, index, position), row in again.logits.items():
            digest.update(f"{request_id!a} {index} {position}\n".encode())
            digest.update(row.tobytes())
        assert step.digest == (digest.hexdigest() if step.rows else "")


@pytest.mark.parametrize("threads", [1, 2])
def test_every_step_is_the_same_on_any_number_of_threads(mixed: Path, threads: int) -> None:
    again = replay(mixed, threads=threads)
    recorded = steps_of(mixed)
    assert list(again) == recorded
    assert again.num_steps == len(recorded)
    assert again.num_tokens == sum(step.num_new_tokens for step in recorded)
    assert again.next_step is None
    assert again.step() is None
    assert not again.interrupted
    assert not again.recording.torn


def test_the_recording_of_a_replay_is_the_same_but_for_the_times(mixed: Path, tmp_path: Path) -> None:
    """What the recorder writes depends on nothing but the run."""
    engine, recorder = recorded_engine(tmp_path / "again.jsonl")
    mixed_run(engine)
    recorder.close()

    def lines(path: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in json.loads(line).items() if k != "at"} for line in path.read_text().splitlines()]

    assert lines(tmp_path / "again.jsonl") == lines(mixed)


def test_the_recorded_tokens_are_those_of_the_requests(tmp_path: Path) -> None:
    engine, recorder = recorded_engine(tmp_path / "r.jsonl")
    add(engine, "a", random_prompt(30), max_tokens=25)
    add(engine, "n", random_prompt(20), n=3, max_tokens=12)
    add(engine, "b", random_prompt(17), beams=3, n=2, max_tokens=9)
    outputs = run_all(engine)
    recorder.close()
    tokens: dict[tuple[str, int], list[int]] = {}
    prompts = {"a": 30, "n": 20, "b": 17}
    for step in steps_of(tmp_path / "r.jsonl"):
        for fork in step.forks:
            parent = tokens.get((fork.request_id, fork.parent), [])
            tokens[fork.request_id, fork.sequence] = parent.copy()
        # a fork's parent is copied before its own tokens of the same step are put down
        for item in step.tokens:
            row = tokens.setdefault((item.request_id, item.sequence), [])
            row[item.position - prompts[item.request_id] :] = item.token_ids
    assert {name: [o.token_ids for o in output.outputs] for name, output in outputs.items()} == {
        name: [tokens[name, i] for i in range(count)] for name, count in (("a", 1), ("n", 3), ("b", 2))
    }


def checking_observer(engine: LLMEngine) -> list[Step]:
    """Lets every step check that the recorded changes, put together, are the block manager's own state."""
    owners: dict[int, int] = {}
    cached: set[int] = set()
    seen: list[Step] = []
    manager = engine.block_manager

    def check(event: Event) -> None:
        if not isinstance(event, Step):
            return
        for change in event.blocks:
            owners[change.block] = len(change.owners)
            (cached.add if change.cached else cached.discard)(change.block)
        assert [owners.get(block, 0) for block in range(manager.num_blocks)] == manager.ref_counts
        assert cached == {block for block in range(manager.num_blocks) if manager.is_cached(block)}
        assert event.free == manager.num_free_blocks
        seen.append(event)

    engine.observers.append(Watcher(engine, check))
    return seen


def test_the_recorded_block_changes_add_up_to_the_block_managers_state() -> None:
    engine = tiny_engine("cpu", **OPTIONS)
    seen = checking_observer(engine)
    mixed_run(engine)
    assert len(seen) == engine.num_steps > 60


def test_blocks_of_sessions_are_followed_too() -> None:
    engine = tiny_engine("cpu", num_blocks=20)
    seen = checking_observer(engine)
    engine.add_request("kept", random_prompt(40), SamplingParams(max_tokens=5), keep=True)
    while engine.has_unfinished_requests():
        engine.step()
    parked = engine.take_kept("kept")
    fork = engine.fork(parked)
    restored = engine.restore(engine.snapshot(parked))
    for name, sequence in (("a", parked), ("b", fork), ("c", restored)):
        engine.add_request(name, [*sequence.token_ids, 7], SamplingParams(max_tokens=4), resume_from=sequence)
        engine.step()
        engine.release(sequence)
    while engine.has_unfinished_requests():
        engine.step()
    assert seen[-1].free == engine.block_manager.num_free_blocks


def test_a_sequence_that_has_its_own_blocks_back_in_another_order_is_followed() -> None:
    """It gives them up for one of higher priority, and gets some of them again in the same step."""
    engine = tiny_engine(num_blocks=9, block_size=4, max_batch_tokens=17, prefix_caching=False)
    seen = checking_observer(engine)
    add(engine, "low", random_prompt(27), max_tokens=4)
    for _ in range(4):
        engine.step()
    add(engine, "high", random_prompt(5), max_tokens=1, priority=1)
    engine.step()
    ((preempted, _),) = seen[-1].preempted
    assert (preempted, seen[-1].admitted[-1].request_id) == ("low", "low")
    run_all(engine)


def test_a_fork_at_rest_that_loses_its_blocks_at_once_is_followed() -> None:
    engine = tiny_engine(num_blocks=6, block_size=4, prefix_caching=False)
    seen = checking_observer(engine)
    engine.add_request("kept", random_prompt(10), SamplingParams(max_tokens=2), keep=True)
    while engine.has_unfinished_requests():
        engine.step()
    fork = engine.fork(engine.take_kept("kept"))
    add(engine, "large", random_prompt(22), max_tokens=1)
    run_all(engine)
    assert [name for name, _ in seen[-1].preempted] == ["kept", "kept"]
    assert not fork.block_table


# ---- what differs is named


def flip_a_bit(engine: LLMEngine, step: int) -> None:
    """One bit of one logit of one row is another, in one step."""
    original = engine.runner.outcomes

    def outcomes(*args: Any, **options: Any) -> Iterator[Any]:
        for i, (row, tokens) in enumerate(original(*args, **options)):
            if i == 0 and engine.num_steps + 1 == step:
                row = row.copy()
                row.view(np.int32)[17] ^= 1
            yield row, tokens

    engine.runner.outcomes = outcomes  # type: ignore[method-assign]


def reverse_blocks(engine: LLMEngine) -> None:
    free = engine.block_manager._free
    for block in reversed(list(free)):
        free.move_to_end(block)


def miss_the_copies(engine: LLMEngine) -> None:
    forward = engine.runner.forward
    engine.runner.forward = lambda batch, copies: forward(batch, [])  # type: ignore[method-assign]


def first_step(path: Path, has: Callable[[Step], object]) -> int:
    return next(step.number for step in steps_of(path) if has(step))


def test_one_flipped_bit_of_one_logit_is_found_at_its_step(mixed: Path) -> None:
    wanted = [step.number for step in steps_of(mixed) if step.rows]
    for number in (wanted[0], wanted[len(wanted) // 2], wanted[-1]):
        with pytest.raises(ReplayDifferenceError, match=rf"^step {number}: the logits: recorded [0-9a-f]{{16}}, ") as e:
            list(replay(mixed, mutate=lambda engine, number=number: flip_a_bit(engine, number)))  # type: ignore[misc]
        assert (e.value.step, e.value.what) == (number, "the logits")


def test_another_order_of_blocks_is_found(mixed: Path) -> None:
    with pytest.raises(ReplayDifferenceError, match=r"^step 1: who holds which block: recorded \[0, .*, replayed \["):
        list(replay(mixed, mutate=reverse_blocks))


def test_a_missed_copy_shows_in_the_logits(mixed: Path) -> None:
    first = first_step(mixed, lambda step: step.copies)
    with pytest.raises(ReplayDifferenceError) as e:
        list(replay(mixed, mutate=miss_the_copies))
    assert e.value.what == "the logits"
    assert e.value.step >= first


@pytest.mark.parametrize(
    ("field", "change", "what"),
    [
        ("ran", lambda v: [[*v[0][:2], v[0][2] + 1, v[0][3]], *v[1:]], "the schedule"),
        ("tokens", lambda v: [[*v[0][:3], [(v[0][3][0] + 1) % 61]], *v[1:]], "the tokens"),
        ("admitted", lambda v: v[:-1], "what began to run"),
        ("preempted", lambda v: v[:-1], "what was preempted"),
        ("evicted", lambda v: [*v, v[0]], "the cached blocks given up"),
        ("copies", lambda v: [[v[0][1], v[0][0]], *v[1:]], "the blocks copied"),
        ("forks", lambda v: v[::-1][1:], "the forks"),
        ("finished", lambda v: [[*v[0][:2], "stop"], *v[1:]], "what finished"),
        ("blocks", lambda v: [[v[0][0], not v[0][1], v[0][2]], *v[1:]], "who holds which block"),
        ("rows", lambda v: v + 1, "the rows of logits used"),
        ("free", lambda v: v - 1, "the number of free blocks"),
        ("waiting", lambda v: v + 1, "the length of the queue"),
        ("running", lambda v: v + 1, "the number of running sequences"),
    ],
)
def test_each_thing_that_differs_is_named(
    mixed: Path, tmp_path: Path, field: str, change: Callable[[Any], Any], what: str
) -> None:
    lines = [json.loads(line) for line in mixed.read_text().splitlines()]
    line = next(line for line in lines if line.get(field) and line.get("step", 0) > 3)
    line[field] = change(line[field])
    changed = tmp_path / "changed.jsonl"
    changed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ReplayDifferenceError) as e:
        list(replay(changed))
    assert (e.value.step, e.value.what) == (line["step"], what)
    assert str(e.value).count("\n") == 0


def test_the_times_are_not_compared(mixed: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in mixed.read_text().splitlines()]
    for line in lines[1:]:
        line["at"] += 5
    changed = tmp_path / "changed.jsonl"
    changed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(list(replay(changed))) == len(steps_of(mixed))


# ---- stopping to look


def ref_counts(engine: LLMEngine, sequence: Sequence) -> list[int]:
    return [engine.block_manager.ref_counts[block] for block in sequence.block_table if block >= 0]


def test_the_replay_stops_where_one_wants_and_shows_arrays(mixed: Path) -> None:
    again = replay(mixed)
    while not any(count == 2 for s in again.engine.scheduler.running for count in ref_counts(again.engine, s)):
        assert again.step() is not None
    assert again.next_step is not None
    number = again.next_step.number
    state = engine_state(again.engine, again.next_step)
    assert state["steps"] == number - 1
    assert state["next"]["step"] == number
    shared = [s for s in state["running"] if max(s["ref_counts"], default=0) > 1]
    assert shared
    assert state["blocks"]["free"] == again.engine.block_manager.num_free_blocks
    assert state["blocks"]["shared"] > 0
    json.dumps(state)
    text = "\n".join(state_lines(state))
    assert f"before step {number}" in text
    words = set(text.split())
    for sequence in state["running"]:
        for block, count in zip(sequence["block_table"], sequence["ref_counts"], strict=True):
            assert ("-" if block < 0 else f"{block}(x{count})" if count > 1 else str(block)) in words
    step = again.step()
    assert step is not None
    assert len(again.logits) == step.rows > 0
    assert all(row.shape == (61,) and row.dtype == np.float32 for row in again.logits.values())
    assert set(again.logits) <= {(r.request_id, r.sequence, r.start + r.num_tokens - 1) for r in step.ran}


def test_the_kept_logits_are_copies(mixed: Path) -> None:
    again = replay(mixed)
    while not again.logits:
        again.step()
    rows = list(again.logits.values())
    before = [row.tobytes() for row in rows]
    for _ in range(5):
        again.step()
    assert [row.tobytes() for row in rows] == before


# ---- what cannot be replayed


def test_another_model_or_other_options_are_refused_before_anything_runs(mixed: Path) -> None:
    with pytest.raises(RecordingError, match="with another model, device or version"):
        replay(mixed, device="reference")
    with pytest.raises(RecordingError, match="with max_batch_tokens 33, but this is 32"):
        replay(mixed, max_batch_tokens=32)
    with pytest.raises(RecordingError, match="with num_blocks 14, but this is 15"):
        replay(mixed, num_blocks=15)
    with pytest.raises(RecordingError, match="with prefix_caching True, but this is False"):
        replay(mixed, prefix_caching=False)
    with pytest.raises(RecordingError, match="begins with a new engine"):
        replay(mixed, mutate=lambda engine: run_one(engine))


def run_one(engine: LLMEngine) -> None:
    add(engine, "x", [1, 2], max_tokens=2)
    run_all(engine)


def test_a_recorder_refuses_an_engine_that_has_run(tmp_path: Path) -> None:
    engine = tiny_engine()
    run_one(engine)
    with pytest.raises(RecordingError, match="begins with a new engine"):
        Recorder(tmp_path / "r.jsonl").attach(engine, "tiny")


def never(header: Header) -> LLMEngine:
    raise AssertionError("no model is loaded for a recording that cannot be replayed")


def test_logits_processors_and_sessions_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    engine, recorder = recorded_engine(path)
    add(engine, "plain", [1, 2, 3], max_tokens=2)
    add(engine, "banner", [1, 2, 3], max_tokens=2, logits_processors=[lambda tokens, row: row])
    run_all(engine)
    recorder.close()
    with pytest.raises(RecordingError, match="request 'banner' has logits processors: they are code"):
        Replay(path, never)

    engine, recorder = recorded_engine(path)
    engine.add_request("kept", [1, 2, 3], SamplingParams(max_tokens=2), keep=True)
    while engine.has_unfinished_requests():
        engine.step()
    recorder.close()
    with pytest.raises(RecordingError, match="request 'kept' belongs to a session"):
        Replay(path, never)


def test_a_run_that_was_interrupted_is_replayed_up_to_there(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    engine, recorder = recorded_engine(path)
    add(engine, "a", random_prompt(40), max_tokens=10)
    add(engine, "b", random_prompt(20), max_tokens=10)
    for _ in range(5):
        engine.step()
    forward = engine.runner.forward

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    engine.runner.forward = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.runner.forward = forward  # type: ignore[method-assign]
    engine.abort("b")
    run_all(engine)
    recorder.close()
    again = replay(path)
    assert again.interrupted
    assert again.num_steps == 5
    assert len(list(again)) == 5
    assert len(steps_of(path)) > 10


def test_a_step_interrupted_between_its_rows_does_not_confuse_the_recorder(tmp_path: Path) -> None:
    """Some sequences had forked and gained tokens when it happened: they are in the recording from the next step on."""
    path = tmp_path / "r.jsonl"
    engine, recorder = recorded_engine(path, max_batch_tokens=64)
    add(engine, "a", random_prompt(10), n=3, max_tokens=6)
    add(engine, "b", random_prompt(12), max_tokens=6)
    outcomes = engine.runner.outcomes

    def interrupted(*args: Any, **options: Any) -> Iterator[Any]:
        yield next(outcomes(*args, **options))
        raise KeyboardInterrupt

    engine.runner.outcomes = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert len(engine.requests["a"].sequences) == 3, "the first row's sequence has forked"
    engine.runner.outcomes = outcomes  # type: ignore[method-assign]
    outputs = run_all(engine)
    recorder.close()
    tokens: dict[tuple[str, int], list[int]] = {}
    for step in steps_of(path):
        for item in step.tokens:
            tokens.setdefault((item.request_id, item.sequence), []).extend(item.token_ids)
    assert {name: [o.token_ids for o in output.outputs] for name, output in outputs.items()} == {
        "a": [tokens["a", i] for i in range(3)],
        "b": [tokens["b", 0]],
    }
    first = steps_of(path)[0]
    assert first.rows == len(first.ran) == 4, "rows of the interrupted step do not count"
    assert replay(path, max_batch_tokens=64).num_steps == 0


def test_a_torn_recording_is_replayed_up_to_there(mixed: Path, tmp_path: Path) -> None:
    path = tmp_path / "torn.jsonl"
    path.write_bytes(mixed.read_bytes()[: mixed.stat().st_size * 2 // 3])
    again = replay(path)
    assert again.recording.torn
    assert 10 < len(list(again)) < len(steps_of(mixed))
