"""Beam search through the engine: against transformers, and the same bits however it is scheduled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.beam_model import beam_cases, beam_engine
from tests.tiny import random_prompt, run_all
from tinyllm.engine.llm_engine import LLMEngine
from tinyllm.errors import InvalidRequestError
from tinyllm.outputs import RequestOutput
from tinyllm.sampling import SamplingParams

DEVICES = ["reference", "cpu"]


def params_of(case: dict[str, Any], **changes: Any) -> SamplingParams:
    """A fixture's case as a request whose end tokens are its own."""
    options = {
        "beams": case["beams"],
        "n": case["beams"],
        "length_penalty": case["length_penalty"],
        "early_stopping": case["early_stopping"],
        "max_tokens": case["max_tokens"],
        "min_tokens": case["min_tokens"],
        "repetition_penalty": case["repetition_penalty"],
        "stop_token_ids": case["eos"],
    }
    return SamplingParams(**(options | changes))


def answer(output: RequestOutput) -> list[tuple[list[int], float | None, str | None, int | str | None]]:
    assert output.error is None
    assert [o.index for o in output.outputs] == list(range(len(output.outputs)))
    return [(o.token_ids, o.score, o.finish_reason, o.stop_reason) for o in output.outputs]


def assert_equals_transformers(output: RequestOutput, case: dict[str, Any]) -> None:
    assert [o.token_ids for o in output.outputs] == case["token_ids"], case
    scores = [o.score for o in output.outputs]
    np.testing.assert_allclose(scores, case["scores"], rtol=1e-6, atol=1e-4)  # transformers adds up in float32


# Few enough to run one by one; between them all forms, many lengths, forks late and early.
SAMPLE = [case for case in beam_cases() if case["beams"] in (3, 8) and len(case["prompt"]) > 5][::6]


@pytest.mark.parametrize("device", DEVICES)
def test_it_equals_transformers_with_all_cases_beside_each_other(device: str) -> None:
    cases = beam_cases()[:: 1 if device == "cpu" else 5]
    engine = beam_engine(device, num_blocks=512, max_batch_tokens=256)
    for i, case in enumerate(cases):
        engine.add_request(str(i), case["prompt"], params_of(case))
    done = run_all(engine)
    for i, case in enumerate(cases):
        output = done[str(i)]
        assert_equals_transformers(output, case)
        for o in output.outputs:
            last = o.token_ids[-1]
            assert (o.finish_reason, o.stop_reason) == (("stop", last) if last in case["eos"] else ("length", None))


def test_the_models_end_tokens_end_beams_as_stop_tokens_do() -> None:
    cases = [case for case in beam_cases() if case["eos"] == [43, 50]]
    engine = beam_engine("cpu", eos=(43, 50), num_blocks=512)
    for i, case in enumerate(cases):
        engine.add_request(str(i), case["prompt"], params_of(case, stop_token_ids=()))
    engine.add_request("ignored", cases[0]["prompt"], params_of(cases[0], stop_token_ids=(), ignore_eos=True))
    done = run_all(engine)
    for i, case in enumerate(cases):
        assert_equals_transformers(done[str(i)], case)
        assert all(o.stop_reason is None for o in done[str(i)].outputs)
    assert all(o.finish_reason == "length" for o in done["ignored"].outputs)


class Watch:
    """Counts what schedulers do, and the most blocks that were held."""

    def __init__(self, engine: LLMEngine) -> None:
        self.num_preempted = 0
        self.num_cached_tokens = 0
        self.most_blocks = 0
        schedule = engine.scheduler.schedule

        def spy() -> Any:
            output = schedule()
            self.num_preempted += len(output.preempted)
            self.num_cached_tokens += sum(tokens for _, tokens in output.admitted)
            held = engine.block_manager.num_blocks - engine.block_manager.num_free_blocks
            self.most_blocks = max(self.most_blocks, held)
            return output

        engine.scheduler.schedule = spy  # type: ignore[method-assign]


def alone(device: str, case: dict[str, Any], **options: Any) -> Any:
    engine = beam_engine(device, **options)
    engine.add_request("only", case["prompt"], params_of(case))
    return answer(run_all(engine)["only"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [
        {"max_batch_tokens": 1},
        {"max_batch_tokens": 7},
        {"block_size": 32},
        {"prefix_caching": False},
        {"max_num_seqs": 8, "max_batch_tokens": 3},
    ],
    ids=str,
)
def test_no_schedule_changes_a_bit(device: str, options: dict[str, Any]) -> None:
    for case in SAMPLE[:: 1 if device == "cpu" else 4]:
        assert alone(device, case, **options) == alone(device, case)


@pytest.mark.parametrize(("num_blocks", "chunk"), [(3, 2), (3, 64), (4, 64), (6, 7)])
def test_beams_that_do_not_fit_together_take_turns(num_blocks: int, chunk: int) -> None:
    """Down to a cache that holds one beam at a time."""
    num_preempted = 0
    for case in SAMPLE:
        if len(case["prompt"]) + case["max_tokens"] > 16 * num_blocks:
            continue
        engine = beam_engine("cpu", num_blocks=num_blocks, max_batch_tokens=chunk)
        watch = Watch(engine)
        engine.add_request("only", case["prompt"], params_of(case))
        finished: list[RequestOutput] = []
        for _ in range(10_000):  # many times what it takes: beams that rob each other for ever fail, and do not hang
            if not finished:
                finished = engine.step().finished
        assert finished, "the beams make no progress"
        assert answer(finished[0]) == alone("cpu", case)
        num_preempted += watch.num_preempted
    assert num_preempted


@pytest.mark.parametrize("device", DEVICES)
def test_neighbours_and_their_fight_for_blocks_change_no_bit(device: str) -> None:
    cases = SAMPLE if device == "cpu" else SAMPLE[::3]
    expected = [alone(device, case) for case in cases]
    engine = beam_engine(device, num_blocks=14, max_batch_tokens=24)
    watch = Watch(engine)
    for i, case in enumerate(cases):
        engine.add_request(f"n{i}", random_prompt(1 + 9 * i % 60, i), SamplingParams(n=1 + i % 3, max_tokens=20))
        engine.add_request(str(i), case["prompt"], params_of(case, priority=i % 2))
    done = run_all(engine)
    assert [answer(done[str(i)]) for i in range(len(cases))] == expected
    assert watch.num_preempted


def test_a_warm_prefix_and_aborted_neighbours_change_no_bit() -> None:
    case = max(SAMPLE, key=lambda case: case["beams"]) | {"prompt": random_prompt(70)}
    expected = alone("cpu", case)
    engine = beam_engine("cpu", max_batch_tokens=32)
    watch = Watch(engine)
    for turn in range(6):
        engine.add_request("only", case["prompt"], params_of(case))
        for name, length in (("beams", 70), ("sampled", 40)):
            beams = 4 if name == "beams" else None
            engine.add_request(name, random_prompt(length), SamplingParams(beams=beams, max_tokens=30))
        for _ in range(turn):
            engine.step()
        for name in ("beams", "sampled"):
            aborted = engine.abort(name)
            assert aborted is not None
            assert [o.finish_reason for o in aborted.outputs] == ["abort"]
        assert answer(run_all(engine)["only"]) == expected
    assert watch.num_cached_tokens >= 5 * 64


def test_fewer_answers_are_the_first_of_all() -> None:
    case = SAMPLE[0]
    engine = beam_engine("cpu")
    for n in range(1, case["beams"] + 1):
        engine.add_request(str(n), case["prompt"], params_of(case, n=n))
    done = run_all(engine)
    for n in range(1, case["beams"] + 1):
        assert answer(done[str(n)]) == answer(done[str(case["beams"])])[:n]


def test_one_beam_is_greedy_decoding() -> None:
    engine = beam_engine("cpu", eos=(26,))
    for seed in range(8):
        prompt = random_prompt(6, seed)
        engine.add_request(f"b{seed}", prompt, SamplingParams(beams=1, max_tokens=30, early_stopping="never"))
        engine.add_request(f"g{seed}", prompt, SamplingParams(temperature=0, max_tokens=30, logprobs=0))
    done = run_all(engine)
    for seed in range(8):
        (beam,), (greedy,) = done[f"b{seed}"].outputs, done[f"g{seed}"].outputs
        assert (beam.token_ids, beam.finish_reason) == (greedy.token_ids, greedy.finish_reason)
        assert greedy.cumulative_logprob is not None
        assert beam.score == pytest.approx(greedy.cumulative_logprob / len(greedy.token_ids), abs=1e-5)


def test_the_end_of_the_context_ends_a_search() -> None:
    prompt = random_prompt(30)
    longer = beam_engine("cpu")
    longer.add_request("only", prompt, SamplingParams(beams=4, n=4, max_tokens=10))
    expected = answer(run_all(longer)["only"])
    for options in ({"max_model_len": 40}, {"num_blocks": 5, "block_size": 8, "device": "reference"}):
        engine = beam_engine(**({"device": "cpu"} | options))
        engine.add_request("only", prompt, SamplingParams(beams=4, n=4, max_tokens=1000, early_stopping="never"))
        found = answer(run_all(engine)["only"])
        assert [entry[0] for entry in found] == [entry[0] for entry in expected]
        assert all(entry[2] == "length" for entry in found)


def test_beams_share_their_prompts_blocks() -> None:
    """Unshared beams would each hold the prompt's 32 blocks and two of their own."""
    engine = beam_engine("cpu", num_blocks=400, max_batch_tokens=512)
    watch = Watch(engine)
    engine.add_request("only", random_prompt(512), SamplingParams(beams=8, max_tokens=30))
    run_all(engine)
    assert watch.most_blocks <= 32 + 8 * 2
    assert watch.most_blocks * 3 <= 8 * 34


def processor_failing_after(count: int) -> Callable[[list[int], np.ndarray], np.ndarray]:
    def fail(token_ids: list[int], row: np.ndarray) -> np.ndarray:
        if len(token_ids) >= count:
            raise RuntimeError("broken on purpose")
        return row

    return fail


def test_a_failure_ends_its_own_search_alone() -> None:
    case = SAMPLE[0]
    expected = alone("cpu", case)
    engine = beam_engine("cpu")
    engine.add_request("good", case["prompt"], params_of(case))
    processors = [processor_failing_after(9)]
    engine.add_request(
        "bad", random_prompt(5), SamplingParams(beams=4, n=2, max_tokens=30, logits_processors=processors)
    )
    done = run_all(engine)
    assert answer(done["good"]) == expected
    assert "broken on purpose" in str(done["bad"].error)
    assert [o.finish_reason for o in done["bad"].outputs] == ["error", "error"]
    assert [len(o.token_ids) for o in done["bad"].outputs] == [4, 4]


def test_forbidding_every_token_is_reported() -> None:
    engine = beam_engine("cpu")

    def forbid(token_ids: list[int], row: np.ndarray) -> np.ndarray:
        return np.full_like(row, -np.inf)

    engine.add_request("bad", random_prompt(5), SamplingParams(beams=4, n=3, logits_processors=[forbid]))
    done = run_all(engine)["bad"]
    assert "every token is forbidden" in str(done.error)
    assert {o.finish_reason for o in done.outputs} == {"error"}


@pytest.mark.parametrize("options", [{"max_batch_tokens": 5}, {"num_blocks": 7, "max_batch_tokens": 16}], ids=str)
def test_beams_with_a_window(options: dict[str, Any]) -> None:
    params = SamplingParams(beams=3, n=3, window=24, sinks=2, max_tokens=60, early_stopping="never")

    def run(**options: Any) -> Any:
        engine = beam_engine("cpu", **options)
        engine.add_request("only", random_prompt(50), params)
        return answer(run_all(engine)["only"])

    assert run(**options) == run()


def test_what_does_not_go_with_beams_is_refused() -> None:
    engine = beam_engine("cpu", max_num_seqs=8)
    for wrong, message in (
        ({"beams": 9}, "beams is 9, but at most 8"),
        ({"beams": 2, "n": 3}, "beams must be an integer from 3"),
        ({"beams": 2, "logprobs": 1}, "logprobs"),
        ({"beams": 2, "early_stopping": "always"}, "early_stopping"),
        ({"beams": 2, "max_tokens": 900, "length_penalty": 100}, "length_penalty 100 is too far from 0"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            engine.add_request("only", [1, 2], SamplingParams(**wrong))
    assert not engine.has_unfinished_requests()
