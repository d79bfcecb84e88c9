"""What the measuring scripts count and read off an engine, on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.tiny import logits, random_prompt, tiny_engine
from tinyllm.sampling import log_sum_exp
from tinyllm.sampling_params import SamplingParams

Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    return import_module


def logprob(row: np.ndarray, token: int) -> float:
    return float(row[token] - log_sum_exp(row))


def test_the_meter_counts_tokens_and_blocks_of_each_step(load: Load) -> None:
    measurement = load("measurement")
    engine = tiny_engine(max_batch_tokens=32)
    meter = measurement.MeteredRunner(engine)
    engine.add_request("a", random_prompt(70), SamplingParams(max_tokens=3, ignore_eos=True))
    measurement.run_to_end(engine)
    steps = meter.take()
    assert [step.num_tokens for step in steps] == [32, 32, 6, 1, 1]
    assert [step.num_held_blocks for step in steps] == [2, 4, 5, 5, 5]
    assert meter.take() == []


def test_reading_scores_every_token(load: Load) -> None:
    script = load("streaming_llm")
    engine = tiny_engine(max_batch_tokens=32)
    ids = random_prompt(100)
    reading = script.read(engine, load("measurement").MeteredRunner(engine), ids, None, 0)
    rows = logits(tiny_engine(), ids)
    assert reading.logprobs == pytest.approx([logprob(row, t) for row, t in zip(rows, ids[1:], strict=False)], abs=1e-6)
    assert reading.blocks == [(32, 2), (64, 4), (96, 6), (100, 7)]


def test_a_window_holds_no_more_blocks_as_it_reads_on(load: Load) -> None:
    script = load("streaming_llm")
    engine = tiny_engine(max_batch_tokens=32)
    meter = load("measurement").MeteredRunner(engine)
    reading = script.read(engine, meter, random_prompt(600), 28, 4)
    assert len(reading.logprobs) == 599
    assert script.growth(reading.blocks) == 1
    assert max(held for _, held in reading.blocks) <= (28 + 32) // 16 + 3


def test_recomputing_sees_the_cache_and_nothing_before(load: Load) -> None:
    ids, results = random_prompt(100), {}
    load("streaming_llm").recompute(tiny_engine(), ids, [50, 75], 32, results.__setitem__)
    for position, value in results.items():
        row = logits(tiny_engine(), ids[position - 32 : position])[-1]
        assert value == pytest.approx(logprob(row, ids[position]), abs=1e-6)
    assert sorted(results) == [50, 75]


def test_running_requests_get_tokens_while_a_long_prompt_is_admitted(load: Load) -> None:
    script = load("chunked_prefill")
    engine = tiny_engine(max_batch_tokens=32)
    admission = script.measure(engine, [random_prompt(5), random_prompt(6)], random_prompt(200), before=3, after=2)
    assert not engine.requests
    # the first step and three more, 7 steps of 30 prompt tokens and two others, two after
    assert [len(times) for times in admission.token_times] == [4 + 7 + 2] * 2
    assert len(admission.lengths(-np.inf, 0.0)) == 2 * 3
    assert len(admission.lengths(0.0, admission.first_token_time)) == 2 * 7


@pytest.mark.parametrize("caching", [False, True])
def test_prefill_work_is_counted_token_by_token(caching: bool, load: Load) -> None:
    engine = tiny_engine(max_batch_tokens=512, prefix_caching=caching)
    meter = load("measurement").MeteredRunner(engine)
    engine.add_request("earlier", random_prompt(7, seed=9), SamplingParams(max_tokens=2))  # is not counted
    load("measurement").run_to_end(engine)
    prompts = [random_prompt(40) + random_prompt(4, seed=i) for i in range(1, 5)]
    run = load("prefix_caching").measure(engine, meter, [prompts[:1], prompts[1:]])
    assert run.prefill_tokens == (44 + 3 * 12 if caching else 4 * 44)
    assert len(run.answers) == 4


def test_beams_share_their_prompt(load: Load) -> None:
    engine = tiny_engine(max_batch_tokens=256)
    meter = load("measurement").MeteredRunner(engine)
    run = load("beam_blocks").measure(engine, meter, random_prompt(128), 4, 9)
    assert run.unshared_blocks == 4 * 9
    assert 9 <= run.peak_blocks <= 8 + 4
    assert run.share == run.peak_blocks / 36
