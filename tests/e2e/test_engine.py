"""The engine over a tiny random model: what a request gets back, and that nothing else changes it by a bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.tiny import generate, logits, random_prompt, run_all, tiny_engine
from tinyllm.engine.sequence import Task
from tinyllm.errors import InvalidRequestError
from tinyllm.sampling import SamplingParams

DEVICES = ["reference", "cpu"]


@pytest.mark.parametrize("device", DEVICES)
def test_decoding_with_the_cache_equals_recomputing_everything(device: str) -> None:
    """At each length: the logits of one pass over the whole sequence are those that decoding step by step saw."""
    seen: list[np.ndarray] = []

    def spy(token_ids: list[int], row: np.ndarray) -> np.ndarray:
        seen.append(row.copy())
        return row

    prompt = random_prompt(21)
    tokens = generate(tiny_engine(device), prompt, temperature=0, max_tokens=40, logits_processors=[spy])
    whole = logits(tiny_engine(device, max_batch_tokens=128), prompt + tokens)
    assert np.stack(seen).tobytes() == whole[20:-1].tobytes()
    assert tokens == whole[20:-1].argmax(axis=1).tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", [13, 16, 37])
def test_each_fork_saw_the_logits_of_its_own_tokens(device: str, length: int) -> None:
    """Forks write beside each other in shared blocks: what each of them saw is what it sees when it runs alone."""
    seen: dict[tuple[int, ...], bytes] = {}

    def spy(token_ids: list[int], row: np.ndarray) -> np.ndarray:
        assert seen.setdefault(tuple(token_ids), row.tobytes()) == row.tobytes()
        return row

    prompt = random_prompt(length)
    engine = tiny_engine(device)
    engine.add_request("n", prompt, SamplingParams(n=4, max_tokens=20, logits_processors=[spy]))
    for output in run_all(engine)["n"].outputs:
        tokens = prompt + output.token_ids
        whole = logits(tiny_engine(device, max_batch_tokens=128), tokens)
        for end in range(length, len(tokens)):
            assert seen[tuple(tokens[:end])] == whole[end - 1].tobytes()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("chunk", [1, 7, 15, 16, 17, 300])
def test_the_chunk_size_changes_no_bit(device: str, block_size: int, chunk: int) -> None:
    prompt = random_prompt(290)
    expected = logits(tiny_engine(device, max_batch_tokens=512), prompt)
    found = logits(tiny_engine(device, max_batch_tokens=chunk, block_size=block_size), prompt)
    assert found.tobytes() == expected.tobytes()


def collect(engine: Any, requests: dict[str, tuple[list[int], dict[str, Any]]]) -> dict[str, list[list[int]]]:
    for name, (prompt, params) in requests.items():
        engine.add_request(name, prompt, SamplingParams(**params))
    return {name: [o.token_ids for o in output.outputs] for name, output in run_all(engine).items()}


def mixed_requests(count: int) -> dict[str, tuple[list[int], dict[str, Any]]]:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.3, "seed": 5},
        {"temperature": 0.8, "top_k": 9, "n": 3},
        {"top_p": 0.7, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
        {"min_p": 0.1, "logit_bias": {3: 2.0}, "n": 2, "seed": 9},
    ]
    return {
        f"r{i}": (random_prompt(1 + 13 * i % 90, seed=i), {"max_tokens": 1 + 7 * i % 40, **kinds[i % len(kinds)]})
        for i in range(count)
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [
        {"max_batch_tokens": 512, "num_blocks": 400},
        {"max_batch_tokens": 5, "num_blocks": 400},
        {"max_batch_tokens": 33, "num_blocks": 9, "max_num_seqs": 8},  # preempts often
        {"max_batch_tokens": 64, "num_blocks": 40, "block_size": 32, "kv_dtype": "f32", "max_num_seqs": 3},
    ],
)
def test_neighbours_chunks_preemption_and_forks_change_no_token(device: str, options: dict[str, Any]) -> None:
    requests = mixed_requests(12)
    alone = {}
    for name, request in requests.items():
        alone |= collect(tiny_engine(device, max_batch_tokens=512), {name: request})
    engine = tiny_engine(device, **options)
    assert collect(engine, requests) == alone


@pytest.mark.parametrize("device", DEVICES)
def test_a_small_cache_really_preempts_and_copies_on_write(device: str) -> None:
    """The cases that the test above means to cover do happen in it."""
    engine = tiny_engine(device, max_batch_tokens=33, num_blocks=9, max_num_seqs=8)
    preempted, copies = 0, 0
    schedule = engine.scheduler.schedule

    def counted() -> Any:
        nonlocal preempted, copies
        output = schedule()
        preempted += len(output.preempted)
        copies += len(output.copies)
        return output

    engine.scheduler.schedule = counted  # type: ignore[method-assign]
    collect(engine, mixed_requests(12))
    assert preempted > 3
    assert copies > 3


def test_aborting_neighbours_changes_nothing_and_frees_their_blocks() -> None:
    requests = mixed_requests(9)
    alone = collect(tiny_engine(max_batch_tokens=512), {"r3": requests["r3"]})
    engine = tiny_engine(max_batch_tokens=40)
    for name, (prompt, params) in requests.items():
        engine.add_request(name, prompt, SamplingParams(**params))
    done: dict[str, Any] = {}
    for victim in [name for name in requests if name != "r3"]:
        result = engine.step()
        done |= {o.request_id: o for o in result.finished}
        output = engine.abort(victim)
        if victim not in done:
            assert output is not None
            assert {o.finish_reason for o in output.outputs} <= {"abort", "stop", "length"}
    assert engine.abort("nobody") is None
    done |= run_all(engine)
    assert [o.token_ids for o in done["r3"].outputs] == alone["r3"]


def test_best_of_gives_the_likeliest_of_what_n_would_give() -> None:
    prompt = random_prompt(18)
    engine = tiny_engine()
    engine.add_request("all", prompt, SamplingParams(n=6, max_tokens=9, logprobs=0, temperature=1.5))
    samples = run_all(engine)["all"].outputs
    scores = {i: sum(next(iter(e.values())).logprob for e in o.logprobs or ()) / 9 for i, o in enumerate(samples)}
    expected = sorted(scores, key=lambda i: -scores[i])[:2]
    assert expected != [0, 1], "the choice must differ from the first ones to show anything"
    engine.add_request("best", prompt, SamplingParams(n=2, best_of=6, max_tokens=9, temperature=1.5))
    chunks = []
    finished: list[Any] = []
    while engine.has_unfinished_requests():
        result = engine.step()
        chunks += [chunk for _, chunk in result.chunks]
        finished += result.finished
    best = finished[0].outputs
    assert [o.token_ids for o in best] == [samples[i].token_ids for i in expected]
    assert [o.score for o in best] == pytest.approx([scores[i] for i in expected])
    assert [(c.index, c.token_ids) for c in chunks] == [(i, o.token_ids) for i, o in enumerate(best)]


def computed_tokens(engine: Any) -> list[int]:
    """The tokens that go through the model, step by step, from now on."""
    counts: list[int] = []
    forward = engine.runner.forward

    def counted(batch: Any, copies: Any) -> Any:
        counts.append(len(batch.token_ids))
        return forward(batch, copies)

    engine.runner.forward = counted
    return counts


def test_requests_in_one_step_share_what_the_first_of_them_is_computing() -> None:
    engine = tiny_engine(max_batch_tokens=128)
    counts = computed_tokens(engine)
    prompt = random_prompt(50)
    for name in "abc":
        engine.add_request(name, prompt, SamplingParams(max_tokens=5, temperature=0))
    outputs = run_all(engine)
    assert counts[0] == 50 + 2 + 2, "48 of 50 tokens lie in full blocks"
    assert len({tuple(output.outputs[0].token_ids) for output in outputs.values()}) == 1
    assert outputs["a"].outputs[0].token_ids == generate(tiny_engine(), prompt, max_tokens=5, temperature=0)


@pytest.mark.parametrize(
    ("second", "hit"),
    [
        ({}, 48),
        ({"cache_salt": "b"}, 0),
        ({"window": 40}, 0),
        ({"prompt_logprobs": 0}, 0),
    ],
)
def test_what_a_later_request_need_not_compute(second: dict[str, Any], hit: int) -> None:
    """A full match leaves the last token to run; another salt or window shares nothing; log-probabilities need all."""
    engine = tiny_engine(max_batch_tokens=128)
    counts = computed_tokens(engine)
    prompt = random_prompt(49)
    generate(engine, prompt, max_tokens=1)
    generate(engine, prompt, max_tokens=1, **second)
    assert counts == [49, 49 - hit]
    generate(engine, prompt[:48], max_tokens=1)
    assert counts[2] == 48 - 32, "a hit of at most the prompt less one token, in full blocks"


def test_prefix_caching_can_be_switched_off() -> None:
    engine = tiny_engine(max_batch_tokens=128, prefix_caching=False)
    counts = computed_tokens(engine)
    for _ in range(2):
        generate(engine, random_prompt(49), max_tokens=1)
    assert counts == [49, 49]


@pytest.mark.parametrize("device", DEVICES)
def test_streaming_goes_past_the_models_context_in_constant_memory(device: str) -> None:
    """1,500 tokens of a model with 1,024 positions, in a cache of 160, read in chunks of 33 and written one by one."""
    engine = tiny_engine(device, num_blocks=10, max_batch_tokens=33)
    prompt = random_prompt(1300)
    engine.add_request("s", prompt, SamplingParams(window=60, sinks=4, max_tokens=200, temperature=0))
    held = []
    while engine.has_unfinished_requests():
        finished = engine.step().finished
        held.append(engine.block_manager.num_blocks - engine.block_manager.num_free_blocks)
    assert len(finished[0].outputs[0].token_ids) == 200
    assert max(held) <= 8
    assert set(held[-150:-1]) == {5, 6}, "a block of sinks, and a window of 60 that touches four or five"


def test_a_sliding_window_model_frees_the_blocks_that_no_layer_reads() -> None:
    config, engine = sliding_engine()
    prompt = random_prompt(200)
    engine.add_request("s", prompt, SamplingParams(max_tokens=100, temperature=0))
    held = []
    while engine.has_unfinished_requests():
        finished = engine.step().finished
        held.append(engine.block_manager.num_blocks - engine.block_manager.num_free_blocks)
    window = config.sliding_window
    assert window is not None
    assert max(held) <= (window + 64) // 16 + 2
    whole = logits(sliding_engine(num_blocks=64)[1], prompt + finished[0].outputs[0].token_ids)
    assert whole[199:-1].argmax(axis=1).tolist() == finished[0].outputs[0].token_ids


def sliding_engine(**options: Any) -> tuple[Any, Any]:
    """The tiny model with a window of 40 in all its layers."""
    from dataclasses import replace

    from tests.tiny import tiny_checkpoint
    from tinyllm.backends import create_backend
    from tinyllm.config import EngineConfig
    from tinyllm.engine.kv_cache import kv_cache_spec
    from tinyllm.engine.llm_engine import LLMEngine
    from tinyllm.models.registry import load_model, model_config

    checkpoint = tiny_checkpoint()
    config = replace(model_config(checkpoint), sliding_window=40, sliding_layers=(True, True))
    model = load_model(checkpoint, config, create_backend("reference"))
    engine_config = EngineConfig(**{"num_blocks": 20, "max_batch_tokens": 64, "debug_checks": True} | options)
    return config, LLMEngine(model, engine_config, kv_cache_spec(config, engine_config, model.backend))


def test_a_higher_priority_is_served_first_and_takes_the_place_of_a_lower_one() -> None:
    engine = tiny_engine(num_blocks=6, max_num_seqs=1)
    low, high = random_prompt(40, seed=1), random_prompt(40, seed=2)
    alone = {name: generate(tiny_engine(), prompt, max_tokens=20) for name, prompt in (("low", low), ("high", high))}
    engine.add_request("low", low, SamplingParams(max_tokens=20))
    for _ in range(5):
        engine.step()
    engine.add_request("high", high, SamplingParams(max_tokens=20, priority=1))
    order = []
    while engine.has_unfinished_requests():
        for output in engine.step().finished:
            order.append(output.request_id)
            assert output.outputs[0].token_ids == alone[output.request_id]
    assert order == ["high", "low"]


@pytest.mark.parametrize("at", ["forward", "logits"])
def test_an_interrupted_step_spoils_nothing(at: str) -> None:
    """What a step had begun, and had promised to others, is taken back; all tokens are as if it had not happened."""
    requests = mixed_requests(8)
    alone = {}
    for name, request in requests.items():
        alone |= collect(tiny_engine(max_batch_tokens=512), {name: request})
    engine = tiny_engine(num_blocks=24, max_batch_tokens=40)
    for name, (prompt, params) in requests.items():
        engine.add_request(name, prompt, SamplingParams(**params))
    original = getattr(engine.runner, at)
    calls = 0

    def sometimes(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        result = original(*args)
        if calls % 3 == 0:
            raise KeyboardInterrupt
        return result

    setattr(engine.runner, at, sometimes)
    done: dict[str, Any] = {}
    while engine.has_unfinished_requests():
        try:
            done |= {o.request_id: [c.token_ids for c in o.outputs] for o in engine.step().finished}
        except KeyboardInterrupt:
            engine.check_invariants()
    assert calls > 20
    assert done == alone


def test_the_first_of_n_is_what_n_1_gives_and_the_others_differ() -> None:
    prompt = random_prompt(18)
    one = generate(tiny_engine(), prompt, max_tokens=20)
    engine = tiny_engine()
    engine.add_request("n", prompt, SamplingParams(n=4, max_tokens=20))
    outputs = run_all(engine)["n"].outputs
    assert [o.index for o in outputs] == [0, 1, 2, 3]
    assert outputs[0].token_ids == one
    assert len({tuple(o.token_ids) for o in outputs}) == 4


def test_n_sequences_share_the_prompts_blocks() -> None:
    engine = tiny_engine(max_batch_tokens=256)
    engine.add_request("n", random_prompt(160), SamplingParams(n=4, max_tokens=3))
    engine.step()
    engine.step()
    assert engine.block_manager.num_blocks - engine.block_manager.num_free_blocks == 10 + 4


@pytest.mark.parametrize(
    ("eos", "params", "reason", "stop_reason"),
    [
        (True, {}, "stop", None),
        (True, {"ignore_eos": True}, "length", None),
        (False, {"stop_token": True}, "stop", "token"),
        (True, {"min_tokens": 12}, "length", None),
    ],
)
def test_end_tokens(eos: bool, params: dict[str, Any], reason: str, stop_reason: str | None) -> None:
    prompt = random_prompt(9)
    free = generate(tiny_engine(), prompt, temperature=0, max_tokens=12)
    end = next(t for i, t in enumerate(free) if i >= 3 and t not in free[:i])
    at = free.index(end)
    options = {"temperature": 0, "max_tokens": 12} | {k: v for k, v in params.items() if k != "stop_token"}
    if params.get("stop_token"):
        options["stop_token_ids"] = [end]
    engine = tiny_engine(eos=(end,) if eos else ())
    engine.add_request("only", prompt, SamplingParams(**options))
    output = run_all(engine)["only"].outputs[0]
    assert output.finish_reason == reason
    assert output.stop_reason == (end if stop_reason else None)
    if reason == "stop":
        assert output.token_ids == free[: at + 1]
    elif "min_tokens" in params:
        assert len(output.token_ids) == 12
        assert end not in output.token_ids[:-1]
    else:
        assert output.token_ids == free


def test_generation_ends_at_the_models_context_and_at_the_caches_end() -> None:
    engine = tiny_engine(max_model_len=40)
    assert len(generate(engine, random_prompt(30), max_tokens=500)) == 10
    engine = tiny_engine(num_blocks=3)
    assert len(generate(engine, random_prompt(30), max_tokens=500)) == 18


def test_logprobs_and_prompt_logprobs_are_those_of_the_logits() -> None:
    prompt = random_prompt(25)
    engine = tiny_engine(max_batch_tokens=6)
    engine.add_request(
        "only", prompt, SamplingParams(max_tokens=8, logprobs=2, prompt_logprobs=1, temperature=0.7, seed=3)
    )
    output = run_all(engine)["only"]
    completion = output.outputs[0]
    rows = logits(tiny_engine(), prompt + completion.token_ids).astype(np.float64)
    expected = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    for position, entry in enumerate(output.prompt_logprobs[1:]):
        assert entry is not None
        assert prompt[position + 1] in entry
        assert int(rows[position].argmax()) in entry
        for token, found in entry.items():
            assert found.logprob == pytest.approx(expected[position, token], abs=1e-5)
            assert found.rank == 1 + (rows[position] > rows[position, token]).sum()
    assert completion.logprobs is not None
    total = 0.0
    for step, (token, entry) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
        assert set(rows[24 + step].argsort()[-2:]) <= set(entry)
        assert entry[token].logprob == pytest.approx(expected[24 + step, token], abs=1e-5)
        total += entry[token].logprob
    assert completion.cumulative_logprob == pytest.approx(total)


def test_prompt_logprobs_survive_preemption_without_repeats() -> None:
    def outputs(**options: Any) -> Any:
        engine = tiny_engine(**options)
        for i in range(4):
            engine.add_request(str(i), random_prompt(40, i), SamplingParams(prompt_logprobs=0, max_tokens=40, seed=i))
        return {name: output.prompt_logprobs for name, output in run_all(engine).items()}

    assert outputs(num_blocks=6, max_batch_tokens=20) == outputs(num_blocks=64)


def test_embedding_rows_do_not_depend_on_chunks() -> None:
    def rows(**options: Any) -> bytes:
        engine = tiny_engine(**options)
        engine.add_request("e", random_prompt(70), SamplingParams(), task=Task.EMBED)
        found = run_all(engine)["e"].rows
        assert found is not None
        assert found.shape == (70, 32)
        return found.tobytes()

    assert rows(max_batch_tokens=9) == rows(max_batch_tokens=128)


BAD_IDS: list[Any] = [-1, 61, 2**31, 1.5, True, float("nan"), "5", None]


@pytest.mark.parametrize("bad", BAD_IDS)
def test_a_bad_token_id_is_named_and_others_go_on(bad: Any) -> None:
    engine = tiny_engine()
    engine.add_request("good", [1, 2, 3], SamplingParams(max_tokens=5))
    with pytest.raises(InvalidRequestError, match="a prompt token id must be an integer from 0 to 60"):
        engine.add_request("bad", [1, bad, 3], SamplingParams())
    assert list(run_all(engine)) == ["good"]


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1] * 200, {}, "the prompt has 200 tokens and needs room for one more; the model's context holds 128"),
        ([1] * 64, {}, "the whole KV cache holds 64"),
        ([1], {"n": 300}, "n is 300, but at most 256"),
        ([1], {"stop": "x"}, "stop strings need a tokenizer"),
        ([1], {"logprobs": 62}, "logprobs must be an integer from 0 to 61"),
        ([1], {"logit_bias": {61: 1.0}}, "logit_bias"),
        ([1], {"stop_token_ids": [61]}, "a stop token id"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(prompt: list[int], params: dict[str, Any], message: str) -> None:
    engine = tiny_engine(num_blocks=4, max_model_len=128)
    with pytest.raises(InvalidRequestError, match=message):
        engine.add_request("bad", prompt, SamplingParams(**params))
    assert not engine.has_unfinished_requests()


def test_a_request_id_cannot_be_used_twice_at_once() -> None:
    engine = tiny_engine()
    engine.add_request("a", [1], SamplingParams())
    with pytest.raises(InvalidRequestError, match="already running"):
        engine.add_request("a", [1], SamplingParams())


def test_a_failing_processor_ends_its_request_alone() -> None:
    def fails_later(token_ids: list[int], row: np.ndarray) -> np.ndarray:
        if len(token_ids) > 6:
            raise ZeroDivisionError("oh\nno")
        return row

    alone = generate(tiny_engine(), [4, 5], max_tokens=12)
    engine = tiny_engine()
    engine.add_request("good", [4, 5], SamplingParams(max_tokens=12))
    engine.add_request("bad", [1, 2, 3], SamplingParams(n=2, logits_processors=[fails_later], max_tokens=12))
    done = run_all(engine)
    assert done["good"].outputs[0].token_ids == alone
    assert done["bad"].error == "a logits processor failed: ZeroDivisionError: oh no"
    assert {o.finish_reason for o in done["bad"].outputs} == {"error"}


def test_waste_is_under_4_percent_beyond_the_last_partial_blocks() -> None:
    """At every step: slots allocated, less those of each sequence's last block, are all in use."""
    engine = tiny_engine(num_blocks=300, max_batch_tokens=48)
    for name, (prompt, params) in mixed_requests(40).items():
        engine.add_request(name, prompt, SamplingParams(**params))
    worst = 0.0
    while engine.has_unfinished_requests():
        engine.step()
        sequences = engine.scheduler.running
        held = {block for s in sequences for block in s.block_table}
        last = {s.block_table[-1] for s in sequences}
        full = (held - last) if sequences else set()
        used = sum(
            min(16, s.num_computed_tokens - 16 * i) for s in sequences for i, b in enumerate(s.block_table) if b in full
        )
        named = sum(1 for s in sequences for b in s.block_table if b in full)
        if full:
            worst = max(worst, 1 - used / (16 * named))
    assert worst < 0.04


@pytest.mark.parametrize("split", [40, 130, 255])
@pytest.mark.parametrize("window", [None, 1, 37])
def test_a_restored_sequence_is_snapped_as_it_was(window: int | None, split: int) -> None:
    """Through engines of three block sizes: nothing is lost, and nothing that others left in a block gets in."""
    params = SamplingParams(window=window, sinks=3)
    first = tiny_engine("cpu", block_size=48, num_blocks=20)
    first.add_request("p", random_prompt(split), params, task=Task.PREFILL, keep=True)
    run_until_parked(first)
    snapshot = first.snapshot(first.take_kept("p"))
    for block_size in (32, 16, 48):
        engine = tiny_engine("cpu", block_size=block_size, num_blocks=20)
        generate(engine, random_prompt(290), max_tokens=3)  # leaves other keys and values behind
        again = engine.snapshot(engine.restore(snapshot))
        for name in ("token_ids", "positions", "keys", "values"):
            assert getattr(again, name).tobytes() == getattr(snapshot, name).tobytes(), name
        snapshot = again


def run_until_parked(engine: Any) -> None:
    while engine.has_unfinished_requests():
        engine.step()
