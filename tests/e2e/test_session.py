"""Sessions: continued, forked, saved and restored, the same bits as one request over the same tokens."""

from __future__ import annotations

import gc
import hashlib
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.tokenizer_files import FOLDER as TOKENIZERS
from tinyllm import LLM, InvalidRequestError, SamplingParams, Session, Snapshot, SnapshotError
from tinyllm.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "tests" / "fixtures" / "models"
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
GREEDY = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.5, seed=7, max_tokens=9, ignore_eos=True)

_open: list[LLM] = []


def make(model: str = "llama", **options: Any) -> LLM:
    options = {"device": "cpu", "num_blocks": 32, "max_batch_tokens": 32, "debug_checks": True} | options
    llm = LLM(MODELS / model, **options)
    _open.append(llm)
    return llm


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    _open.clear()
    yield
    for llm in _open:
        assert not llm.engine.has_unfinished_requests()
        assert not llm.engine.scheduler.parked
        llm.engine.check_invariants()
        assert llm.engine.block_manager.num_free_blocks == llm.engine.block_manager.num_blocks
    _open.clear()


class Spy:
    """A logits processor that notes all it sees: a digest of the logits after each number of tokens."""

    def __init__(self) -> None:
        self.seen: dict[int, str] = {}

    def __call__(self, token_ids: list[int], logits: np.ndarray) -> np.ndarray:
        self.seen[len(token_ids)] = hashlib.sha256(logits.tobytes()).hexdigest()
        return logits


def under(session: Session, params: SamplingParams) -> SamplingParams:
    return replace(params, window=session.window, sinks=session.sinks, cache_salt=session.cache_salt)


def assert_continues_as_generate(session: Session, llm: LLM, params: SamplingParams = SAMPLED) -> None:
    """session.generate gives what llm.generate does over the same tokens: ids, logits, text and reasons."""
    before, spy, expected_spy = session.token_ids, Spy(), Spy()
    params = under(session, params)
    output = session.generate(replace(params, logits_processors=[spy]))
    expected = llm.generate([before], replace(params, logits_processors=[expected_spy]))[0].outputs[0]
    assert output == expected
    assert spy.seen == expected_spy.seen
    assert len(spy.seen) == len(output.token_ids) > 0
    assert session.token_ids == before + output.token_ids


# ---- the same as one request


@pytest.mark.parametrize("model", ["llama", "gpt2", "mistral", "gemma3"])
@pytest.mark.parametrize(
    ("device", "kv_dtype"), [("reference", "f32"), ("cpu", "f32"), ("cpu", "f16"), ("cpu", "bf16")]
)
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_turns_are_what_generate_gives(model: str, device: str, kv_dtype: str, prefix_caching: bool) -> None:
    options = {"device": device, "kv_dtype": kv_dtype, "prefix_caching": prefix_caching}
    llm, other = make(model, **options), make(model, **options)
    with llm.session(PROMPT[:5]) as session:  # gpt2's context ends after 24
        for turn in ([], [7] * 4, [8], [9] * 3):
            session.append(turn)
            assert_continues_as_generate(session, other, replace(SAMPLED, max_tokens=2))
        assert len(session) == len(session.token_ids) == 5 + 8 + 4 * 2


def test_only_what_is_new_is_computed() -> None:
    llm = make(prefix_caching=False)
    computed: list[int] = []
    forward = llm.engine.runner.forward

    def note(batch: Any, copies: Any) -> Any:
        computed.append(len(batch.token_ids))
        return forward(batch, copies)

    llm.engine.runner.forward = note  # type: ignore[method-assign]
    with llm.session([5] * 30) as session:
        session.generate(replace(GREEDY, max_tokens=3))
        assert computed == [30, 1, 1]
        computed.clear()
        session.append([6, 7])
        session.generate(replace(GREEDY, max_tokens=2))
        assert computed == [3, 1]  # the last token of the first turn was chosen, but never computed
        computed.clear()
        session.snapshot()
        session.snapshot()
        assert computed == [1]
        with session.fork() as fork:
            fork.append([1, 2, 3])
            fork.snapshot()
        assert computed == [1, 3]


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("model", ["llama", "mistral"])
def test_a_window_runs_on_in_constant_memory(model: str, sinks: int, tmp_path: Path) -> None:
    llm, other = make(model, num_blocks=6), make(model, num_blocks=6)
    session = llm.session(PROMPT, window=20, sinks=sinks)
    for turn in range(12):  # past the model's 64 positions
        session.append([turn] * (turn * 5))
        assert_continues_as_generate(session, other, replace(SAMPLED, max_tokens=11, seed=turn))
        if turn % 3 == 2:
            session.save(tmp_path / "s")
            session.close()
            session = llm.restore(tmp_path / "s")
            assert (session.window, session.sinks) == (20, sinks)
    assert len(session) > 6 * 16 * 3
    session.close()


def test_stop_strings_and_ends_stay_in_the_session_as_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make()
    first = llm.generate([PROMPT], GREEDY)[0].outputs[0].token_ids
    stop = first[4]
    with llm.session(PROMPT) as session:
        output = session.generate(replace(GREEDY, stop_token_ids=[stop]))
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
        assert session.token_ids == PROMPT + first[: first.index(stop) + 1]
        assert_continues_as_generate(session, llm)


# ---- forks


@pytest.mark.parametrize("length", [11, 15, 16, 17, 31, 32])
def test_forks_share_every_block_and_go_their_own_ways(length: int) -> None:
    llm, other = make(prefix_caching=False), make()
    manager = llm.engine.block_manager
    with llm.session([5] * length) as session:
        session.generate(replace(SAMPLED, max_tokens=1))
        free = manager.num_free_blocks
        with session.fork() as a, session.fork() as b, a.fork() as c:
            assert manager.num_free_blocks == free
            assert a.token_ids == b.token_ids == c.token_ids == session.token_ids
            for seed, one in enumerate((a, b, c, session)):
                one.append([seed])
                assert_continues_as_generate(one, other, replace(SAMPLED, seed=seed))
            assert len({tuple(one.token_ids) for one in (a, b, c, session)}) == 4
            a.append([1])
            assert len(a) == len(b) + 1
        assert_continues_as_generate(session, other)
    empty = llm.session()
    assert empty.fork().token_ids == []


def test_a_fork_outlives_its_parent() -> None:
    llm = make()
    with llm.session(PROMPT) as session:
        session.generate(GREEDY)
        fork = session.fork()
    assert_continues_as_generate(fork, llm)
    fork.close()


# ---- snapshots


@pytest.mark.parametrize("kv_dtype", ["f32", "f16", "bf16"])
def test_restored_at_every_point_of_a_run_the_logits_are_the_same(tmp_path: Path, kv_dtype: str) -> None:
    """50 tokens, parted at each of them: in the middle of a block, at its end, at its beginning."""
    one, two = (make(kv_dtype=kv_dtype, prefix_caching=False) for _ in range(2))
    params = replace(SAMPLED, max_tokens=50)
    whole = Spy()
    expected = one.generate([PROMPT], replace(params, logits_processors=[whole]))[0].outputs[0].token_ids
    for length in range(1, 50):
        spy = Spy()
        with one.session(PROMPT) as session:
            session.generate(replace(params, max_tokens=length, logits_processors=[spy]))
            session.save(tmp_path / "s")
        with two.restore(tmp_path / "s") as restored:
            assert restored.token_ids == PROMPT + expected[:length]
            restored.generate(replace(params, max_tokens=50 - length, logits_processors=[spy]))
            assert restored.token_ids == PROMPT + expected
        assert spy.seen == whole.seen


def test_another_block_size_and_chunk_resume_the_same(tmp_path: Path) -> None:
    one, two = make(block_size=16), make(block_size=32, max_batch_tokens=3)
    with one.session(PROMPT * 3) as session:
        session.generate(SAMPLED)
        session.save(tmp_path / "s")
        with two.restore(tmp_path / "s") as restored:
            assert restored.snapshot().keys.tobytes() == session.snapshot().keys.tobytes()
            assert_continues_as_generate(restored, one)


def test_snapshots_hold_what_recomputing_gives() -> None:
    """Every key and value of a long history of turns, forks and restores equals those of one prefill."""
    llm, other = make(), make()
    session = llm.session(PROMPT)
    for _ in range(3):
        session.generate(SAMPLED)
        session, old = llm.restore(session.snapshot()).fork(), session
        old.close()
        session.append([7])
    with other.session(session.token_ids) as fresh:
        a, b = session.snapshot(), fresh.snapshot()
    assert a.num_computed_tokens == b.num_computed_tokens == len(session)
    for name in ("token_ids", "positions", "keys", "values"):
        assert getattr(a, name).tobytes() == getattr(b, name).tobytes()
    assert a.fingerprint == b.fingerprint
    session.close()


CHILD = """
import json, sys
from tinyllm import LLM, SamplingParams
from tests.e2e.test_session import GREEDY, SAMPLED, Spy, make, replace
llm = make(sys.argv[1], kv_dtype=sys.argv[2])
results = []
for path in sys.argv[3:]:
    with llm.restore(path) as session:
        for params in (SAMPLED, GREEDY):
            spy = Spy()
            session.generate(replace(params, logits_processors=[spy]))
            results.append([session.token_ids, sorted(spy.seen.items())])
print(json.dumps(results))
"""


@pytest.mark.parametrize(("model", "kv_dtype"), [("llama", "f32"), ("llama", "bf16"), ("mistral", "f16")])
def test_another_process_goes_on_with_the_same_bits(tmp_path: Path, model: str, kv_dtype: str) -> None:
    llm = make(model, kv_dtype=kv_dtype)
    expected = []
    paths = [tmp_path / "plain", tmp_path / "streaming"]
    for path, window in zip(paths, (None, 9), strict=True):
        with llm.session(PROMPT, window=window, sinks=2, cache_salt="salt") as session:
            session.generate(SAMPLED)
            session.append([8, 9])
            session.save(path)
            for params in (SAMPLED, GREEDY):
                spy = Spy()
                session.generate(replace(params, logits_processors=[spy]))
                expected.append([session.token_ids, [list(item) for item in sorted(spy.seen.items())]])
    command = [sys.executable, "-c", CHILD, model, kv_dtype, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


def test_foreign_and_damaged_snapshots_are_refused_and_nothing_changes(tmp_path: Path) -> None:
    llm = make()
    path = tmp_path / "s"
    with llm.session(PROMPT) as session:
        session.save(path)
        snapshot = session.snapshot()
    for other in (make("mistral"), make("qwen2"), make(kv_dtype="f16"), make(device="reference")):
        with pytest.raises(SnapshotError, match=r"s: the snapshot is of another model, device, version or kv"):
            other.restore(path)
    wrong: list[tuple[Any, str]] = [
        (replace(snapshot, fingerprint=""), "of another model"),
        (replace(snapshot, token_ids=snapshot.token_ids + 64), "a prompt token id must be an integer from 0 to 63"),
        (replace(snapshot, keys=snapshot.keys[:2], values=snapshot.values[:2]), "must have the shape"),
        (replace(snapshot, keys=snapshot.keys[..., :4], values=snapshot.values[..., :4]), "must have the shape"),
        (replace(snapshot, values=snapshot.values[:, 1:]), "keys have the shape"),
        (replace(snapshot, num_computed_tokens=99), "99 of them computed"),
        (replace(snapshot, positions=snapshot.positions[::-1].copy()), "positions must ascend"),
        (replace(snapshot, keys=None), "keys must be an array"),
        (replace(snapshot, token_ids=np.zeros(70, np.int32)), "the prompt has 70 tokens"),
        (tmp_path / "none", "no such file"),
        (tmp_path, "not a regular file"),
    ]
    for source, message in wrong:
        with pytest.raises(SnapshotError, match=message) as caught:
            llm.restore(source)
        assert "\n" not in str(caught.value)
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    with pytest.raises(SnapshotError, match="damaged: its contents do not match their sha256"):
        llm.restore(path)
    with pytest.raises(InvalidRequestError, match="restore takes a snapshot or a path, not a int"):
        llm.restore(3)  # type: ignore[arg-type]


def without(snapshot: Snapshot, *positions: int) -> Snapshot:
    kept = ~np.isin(snapshot.positions, positions)
    return replace(
        snapshot,
        positions=snapshot.positions[kept],
        keys=snapshot.keys[:, kept],
        values=snapshot.values[:, kept],
    )


@pytest.mark.parametrize("window", [None, 5])
def test_a_snapshot_that_lacks_what_will_be_read_is_refused(window: int | None) -> None:
    """Else a session would read what others have left in those slots. It may go on with or without more tokens."""
    llm = make()
    with llm.session(PROMPT * 2, window=window, sinks=2) as session:
        snapshot = session.snapshot()
        expected = session.fork().generate(GREEDY).token_ids
    T = len(PROMPT) * 2
    for position in range(T):
        # the last token is computed again, as the logits after it are wanted: it sees one key more than the next would
        seen = window is None or position < 2 or position > T - 1 - window
        if seen:
            with pytest.raises(SnapshotError, match="lacks keys and values"):
                llm.restore(without(snapshot, position))
        else:
            with llm.restore(without(snapshot, *range(2, position + 1))) as session:
                assert session.generate(GREEDY).token_ids == expected
    with llm.restore(without(snapshot, *range(T))) as session:  # nothing is held: all is computed again
        assert session.generate(GREEDY).token_ids == expected


def test_a_forged_snapshot_misleads_nobody_else() -> None:
    """Keys and values of a file, and those computed after them, are never found by requests with the same tokens."""
    other = make()
    with other.session([5] * 33) as session:
        snapshot = session.snapshot()
    llm = make()
    with (
        llm.restore(replace(snapshot, keys=-snapshot.keys, values=snapshot.values * 2)) as forged,
        forged.fork() as fork,
    ):
        assert forged.generate(GREEDY).token_ids != other.generate([[5] * 33], GREEDY)[0].outputs[0].token_ids
        fork.append([1] * 16)
        fork.snapshot()
        for tokens in ([5] * 33, fork.token_ids, [*fork.token_ids, 2], forged.token_ids):
            assert llm.generate([tokens], GREEDY)[0].outputs == other.generate([tokens], GREEDY)[0].outputs
            with llm.session(tokens) as honest:
                assert_continues_as_generate(honest, other)


# ---- memory


def test_sessions_give_way_to_requests_and_come_back_the_same() -> None:
    llm, other = make(num_blocks=4, prefix_caching=False), make()
    sessions = [llm.session([i] * 20) for i in range(4)]  # two blocks each: only two of them fit
    for turn in range(3):
        for session in sessions:
            session.append([turn])
            assert_continues_as_generate(session, other, replace(SAMPLED, max_tokens=4, seed=turn))
    assert llm.generate([[1] * 55], GREEDY)[0].outputs == other.generate([[1] * 55], GREEDY)[0].outputs
    assert llm.engine.block_manager.num_free_blocks == 4
    for session in sessions:
        held = session.snapshot()
        assert held.num_computed_tokens == len(held.positions) == len(session)
        session.close()


def test_a_session_may_fill_the_whole_cache() -> None:
    llm = make(num_blocks=3)
    with llm.session(PROMPT) as session:
        output = session.generate(replace(SAMPLED, max_tokens=99))
        assert output.finish_reason == "length"
        assert len(session) == 48
        session.snapshot()
        before = session.token_ids
        with pytest.raises(InvalidRequestError, match="the prompt has 48 tokens and needs room for one more"):
            session.generate()
        with pytest.raises(InvalidRequestError, match="the prompt has 49 tokens"):
            session.append([1])
        assert session.token_ids == before
        with llm.restore(session.snapshot()) as restored:  # there is no room now: computed again when it is used
            assert restored.token_ids == before
            assert restored.snapshot().values.tobytes() == session.snapshot().values.tobytes()


def test_restoring_beside_streams_that_fill_the_cache() -> None:
    llm, other = make(num_blocks=4, prefix_caching=False), make()
    with llm.session(PROMPT) as session:
        snapshot = session.snapshot()
    stream = llm.stream([1] * 50, replace(SAMPLED, max_tokens=10))
    first = next(stream).token_ids
    with llm.restore(snapshot) as restored:
        assert_continues_as_generate(restored, other)
    rest = [token for chunk in stream for token in chunk.token_ids]
    assert first + rest == other.generate([[1] * 50], replace(SAMPLED, max_tokens=10))[0].outputs[0].token_ids


def test_a_dropped_session_gives_its_blocks_back() -> None:
    llm = make()
    session = llm.session(PROMPT)
    session.generate(GREEDY)
    assert llm.engine.block_manager.num_free_blocks < 32
    cycle = [session]
    cycle.append(cycle)  # type: ignore[arg-type]
    del session, cycle
    gc.collect()
    assert llm.engine.block_manager.num_free_blocks == 32


def test_a_session_dropped_in_the_middle_of_a_step_waits_for_its_end() -> None:
    llm = make()
    sessions = [llm.session(PROMPT)]
    sessions[0].generate(GREEDY)
    streams = [llm.stream([1], GREEDY)]
    next(streams[0])
    free: list[int] = []

    def drop(token_ids: list[int], logits: np.ndarray) -> np.ndarray:
        sessions.clear()
        streams.clear()
        free.append(llm.engine.block_manager.num_free_blocks)
        return logits

    output = llm.generate([[2]], replace(GREEDY, logits_processors=[drop]))[0].outputs[0]
    assert free == [32 - 4, *[32 - 1] * 8]
    assert output == llm.generate([[2]], GREEDY)[0].outputs[0]


def test_sessions_dropped_by_another_thread_wait_for_their_turn() -> None:
    llm, other = make(num_blocks=64), make()
    with llm.session(PROMPT) as session:
        session.generate(GREEDY)
        forks = [session.fork() for _ in range(200)]
        for fork in forks[:20]:
            fork.append([5])
            fork.snapshot()
        thread = threading.Thread(target=lambda: [forks.pop() for _ in range(200)])
        thread.start()
        for seed in range(3):
            assert_continues_as_generate(session, other, replace(SAMPLED, seed=seed))
        thread.join()


def test_an_interrupt_after_the_last_step_loses_no_blocks() -> None:
    llm = make()
    with llm.session(PROMPT) as session:

        def interrupted(request_id: str) -> Any:
            del llm.engine.take_kept
            raise KeyboardInterrupt

        llm.engine.take_kept = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            session.generate(SAMPLED)
        assert session.token_ids == PROMPT
        assert llm.engine.block_manager.num_free_blocks == 32
        assert_continues_as_generate(session, llm)


def test_what_a_session_was_is_forgotten() -> None:
    """However many turns there were, one parked sequence is all that is left of them."""
    llm = make()
    with llm.session(PROMPT) as session:
        session.generate(replace(GREEDY, max_tokens=1))
        first = weakref.ref(session._parked)  # type: ignore[type-var]
        for _ in range(3):
            session.generate(replace(GREEDY, max_tokens=1))
        gc.collect()
        assert first() is None


# ---- streams


def test_a_stream_is_generate_in_pieces() -> None:
    llm = make()
    with llm.session(PROMPT) as a, llm.session(PROMPT) as b:
        pieces = [token for chunk in a.stream(SAMPLED) for token in chunk.token_ids]
        assert pieces == b.generate(SAMPLED).token_ids
        assert a.token_ids == b.token_ids
        assert_continues_as_generate(a, llm)


def test_leaving_a_stream_early_leaves_the_session_as_it_was() -> None:
    llm = make()
    with llm.session(PROMPT) as session:
        session.generate(SAMPLED)
        before, expected = session.token_ids, session.fork().generate(SAMPLED)
        for _ in session.stream(SAMPLED):
            break
        assert session.token_ids == before
        assert session.generate(SAMPLED) == expected


def test_one_thing_at_a_time() -> None:
    llm = make()
    with llm.session(PROMPT) as session:
        unstarted = session.stream(SAMPLED)
        stream = session.stream(SAMPLED)
        chunks = [next(stream)]
        busy = "the session is generating"
        for use in (
            session.generate,
            session.stream,
            session.snapshot,
            lambda: session.append([1]),
            lambda: next(unstarted),
        ):
            with pytest.raises(InvalidRequestError, match=busy):
                use()
        fork = session.fork()
        assert fork.token_ids == session.token_ids == PROMPT
        assert_continues_as_generate(fork, llm)
        fork.close()
        chunks += stream
        assert session.token_ids == PROMPT + [token for chunk in chunks for token in chunk.token_ids]


def test_closing_ends_a_stream() -> None:
    llm = make()
    with llm.session(PROMPT) as session:
        stream = session.stream(SAMPLED)
        next(stream)
    assert llm.engine.block_manager.num_free_blocks == 32
    with pytest.raises(InvalidRequestError, match="ended before it was finished"):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)


def test_sessions_and_requests_run_beside_each_other() -> None:
    llm, other = make(), make()
    with llm.session(PROMPT) as a, llm.session(PROMPT[:4]) as b:
        streams = [a.stream(SAMPLED), b.stream(GREEDY), llm.stream([9], SAMPLED)]
        got: list[list[int]] = [[], [], []]
        for _ in range(9):
            for tokens, stream in zip(got, streams, strict=True):
                tokens += next(stream).token_ids
        assert [list(stream) for stream in streams] == [[], [], []]
        expected = other.generate([PROMPT, PROMPT[:4], [9]], [SAMPLED, GREEDY, SAMPLED])
        assert got == [output.outputs[0].token_ids for output in expected]
        assert a.token_ids == PROMPT + got[0]
        assert b.token_ids == PROMPT[:4] + got[1]


# ---- mistakes


def test_a_failed_or_interrupted_request_leaves_the_session_as_it_was() -> None:
    llm = make()

    def fail(token_ids: list[int], logits: np.ndarray) -> np.ndarray:
        if len(token_ids) > len(PROMPT) + 12:
            raise error
        return logits

    with llm.session(PROMPT) as session:
        session.generate(SAMPLED)
        session.append([1])
        before = session.token_ids
        params = replace(SAMPLED, logits_processors=[fail])
        error: BaseException
        for error in (ValueError("no"), KeyboardInterrupt()):
            seen = InvalidRequestError if isinstance(error, ValueError) else KeyboardInterrupt
            for use in (lambda: session.generate(params), lambda: list(session.stream(params))):
                with pytest.raises(seen):
                    use()
                assert session.token_ids == before
                assert not llm.engine.has_unfinished_requests()
        assert_continues_as_generate(session, llm)


def test_a_processor_cannot_use_the_model_that_calls_it() -> None:
    llm = make()
    with llm.session(PROMPT) as session, llm.session(PROMPT) as other:
        session.generate(GREEDY)
        for use in (
            lambda: llm.generate([1]),
            lambda: other.generate(GREEDY),
            lambda: session.snapshot(),
            lambda: session.fork(),
            lambda: next(llm.stream([1])),
        ):

            def call(token_ids: list[int], logits: np.ndarray, use: Any = use) -> np.ndarray:
                use()
                return logits

            with pytest.raises(InvalidRequestError, match=r"cannot use the model|is generating"):
                session.generate(replace(GREEDY, logits_processors=[call]))
        assert_continues_as_generate(session, llm)


def test_what_is_refused_names_the_mistake() -> None:
    llm = make()
    with llm.session(PROMPT, window=9, sinks=2, cache_salt="mine") as session:
        params: list[tuple[dict[str, Any], str]] = [
            ({"n": 2}, "one continuation"),
            ({"best_of": 2}, "one continuation"),
            ({"beams": 1}, "one continuation"),
            ({"prompt_logprobs": 0}, "use LLM.generate for prompt_logprobs"),
            ({"window": 8, "sinks": 2}, "the session has window 9 and sinks 2, not 8 and 2"),
            ({"window": 9}, "the session has window 9 and sinks 2, not 9 and 4"),
            ({"cache_salt": "yours"}, "another cache_salt"),
            ({"stop": "x"}, "stop strings need a tokenizer"),
            ({"stop_token_ids": [64]}, "a stop token id"),
        ]
        for options, message in params:
            for use in (session.generate, session.stream):
                with pytest.raises(InvalidRequestError, match=message):
                    use(SamplingParams(**options))
        same = SamplingParams(window=9, sinks=2, cache_salt="mine", max_tokens=3)
        assert session.generate(same).finish_reason == "length"
        for bad in ([64], [-1], ["a"], "text", b"ab", None, np.zeros((2, 2)), [1.5], [True]):
            before = session.token_ids
            with pytest.raises(InvalidRequestError):
                session.append(bad)  # type: ignore[arg-type]
            assert session.token_ids == before
        assert session.text == ""
    for options, message in (
        ({"window": 0}, "window must be"),
        ({"window": 9, "sinks": 300}, "sinks must be"),
        ({"window": 100}, "the model's context holds 64"),
        ({"cache_salt": 3}, "cache_salt must be"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            llm.session(PROMPT, **options)
    with pytest.raises(InvalidRequestError, match="a window needs rotary positions"):
        make("gpt2").session(window=9)


def test_empty_and_closed_sessions_say_so(tmp_path: Path) -> None:
    llm = make()
    with llm.session() as session:
        session.append("")
        session.append([])
        for use in (session.generate, session.stream, session.snapshot, lambda: session.save(tmp_path / "s")):
            with pytest.raises(InvalidRequestError, match="the session is empty: append a prompt first"):
                use()
        session.append(np.array(PROMPT))
        session.append(tuple(PROMPT))
        assert session.token_ids == PROMPT * 2
        session.token_ids.append(1)
        assert len(session) == 22
        assert repr(session) == "<Session of 22 tokens>"
    session.close()
    assert repr(session) == "<Session of 22 tokens, closed>"
    for use in (
        session.generate,
        session.stream,
        session.snapshot,
        session.fork,
        lambda: session.append([1]),
        lambda: session.save(tmp_path / "s"),
    ):
        with pytest.raises(InvalidRequestError, match="the session is closed"):
            use()
    assert session.token_ids == PROMPT * 2
    assert not (tmp_path / "s").exists()


def test_texts_are_encoded_with_bos_only_at_the_beginning() -> None:
    llm = make()
    tokenizer = Tokenizer.from_folder(TOKENIZERS / "llama2")
    assert tokenizer is not None
    llm.tokenizer = tokenizer
    checked: list[list[int]] = []
    llm.engine.check_request = lambda ids, params, task=None: checked.append(list(ids)) or list(ids)  # type: ignore
    session = llm.session()
    session.append("one")
    assert session.token_ids == tokenizer.encode("one")
    assert session.token_ids[0] == tokenizer.bos_token_id
    session.append("two")
    assert session.token_ids == tokenizer.encode("one") + tokenizer.encode("two", add_special_tokens=False)
    assert checked[-1] == session.token_ids
    assert session.text == tokenizer.decode(session.token_ids)
    assert "one" in session.text
