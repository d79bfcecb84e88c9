"""Which requests a device may sample for, and that it is told the same as the host's sampler."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from cuda_kernels.sampling_rows import FORBIDDEN, MAX_TEMPERATURE, NOT_A_NUMBER, SamplingRow
from tests.unit.sequences import make_sequence
from tinyllm.engine import device_sampling
from tinyllm.engine.device_sampling import Draw, can_sample_on_device, check_token, draws_of
from tinyllm.errors import InvalidRequestError
from tinyllm.sampling import SamplingParams, TokenHistory, gumbel_noise, noise_key, sample

NEUTRAL: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0, "seed": 3},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.1, "n": 3},
    {"stop": "x", "stop_token_ids": [1], "max_tokens": 5, "ignore_eos": True, "prompt_logprobs": 2},
    {"logit_bias": {}, "best_of": 2, "n": 2},
]
ON_THE_HOST: list[dict[str, Any]] = [
    {"repetition_penalty": 1.1},
    {"presence_penalty": -0.5},
    {"frequency_penalty": 0.5},
    {"logit_bias": {3: 1.0}},
    {"logits_processors": [lambda ids, logits: logits]},
    {"logprobs": 0},
    {"best_of": 3},
    {"beams": 2},
    {"temperature": 1e31},
    {"structured_output": {"kind": "json_object"}},
]


@pytest.mark.parametrize("options", NEUTRAL)
def test_a_row_that_is_used_as_it_is_can_stay_on_the_device(options: dict[str, Any]) -> None:
    assert can_sample_on_device(SamplingParams(**options))


@pytest.mark.parametrize("options", ON_THE_HOST, ids=lambda options: next(iter(options)))
def test_whatever_changes_or_reads_a_row_needs_it_on_the_host(options: dict[str, Any]) -> None:
    assert not can_sample_on_device(SamplingParams(**options))


def test_end_tokens_that_come_too_early_are_banned_on_the_host() -> None:
    params = SamplingParams(min_tokens=4)
    assert not can_sample_on_device(params, banned_ids=[2])
    assert can_sample_on_device(params, banned_ids=[])


def noise_of(key: int, ids: np.ndarray) -> np.ndarray:
    """sampling.gumbel_noise, from its key."""
    x = np.uint64(key) + (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return -np.log(-np.log(((x >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**64 - 1])
def test_the_key_is_that_of_the_hosts_noise(seed: int) -> None:
    ids = np.array([0, 1, 49151, 262143])
    with np.errstate(over="ignore"):
        for fork_path, position in (((0,), 0), ((7,), 12345)):
            key = noise_key(seed, fork_path, position)
            np.testing.assert_array_equal(noise_of(key, ids), gumbel_noise(seed, fork_path, position, ids))


def test_a_draw_makes_the_hosts_choice() -> None:
    logits = np.random.default_rng(0).normal(0, 2, 50).astype(np.float32)
    sequence = make_sequence([3, 1, 2], index=4, seed=11, temperature=0.8)
    sequence.request.forked = True
    (draw,) = draws_of(sequence, 9)
    assert draw == Draw(9, noise_key(11, (4,), 3), 0.8, 0, 1.0, 0.0)
    history = TokenHistory.of(sequence.token_ids)
    expected = sample(
        logits, sequence.request.params, token_ids=sequence.token_ids, history=history, fork_path=sequence.fork_path
    )
    with np.errstate(over="ignore"):
        scores = logits.astype(np.float64) / draw.temperature + noise_of(draw.key, np.arange(50))
    assert int(scores.argmax()) == expected.token_id


def test_the_first_token_of_a_request_is_drawn_once_for_each_of_its_sequences() -> None:
    sequence = make_sequence([3, 1, 2], n=3, top_k=-1)
    draws = draws_of(sequence, 5)
    assert [draw.key for draw in draws] == [noise_key(0, (index,), 3) for index in range(3)]
    assert {(draw.logits_row, draw.top_k) for draw in draws} == {(5, 0)}
    sequence.request.forked = True
    assert draws_of(sequence, 5) == draws[:1]


def test_what_is_no_token_is_the_users_error() -> None:
    assert check_token(0) == 0
    with pytest.raises(InvalidRequestError, match="NaN"):
        check_token(-1)
    with pytest.raises(InvalidRequestError, match="every token is forbidden"):
        check_token(-2)


def test_the_kernels_take_the_engines_draws() -> None:
    assert Draw._fields == tuple(field.name for field in fields(SamplingRow))
    assert (NOT_A_NUMBER, FORBIDDEN) == (device_sampling.NOT_A_NUMBER, device_sampling.FORBIDDEN)
    assert MAX_TEMPERATURE == device_sampling.MAX_TEMPERATURE
    SamplingRow(*draws_of(make_sequence([1], seed=-1, top_k=2**31), 0)[0])


def test_a_greedy_draw_needs_no_key() -> None:
    (draw,) = draws_of(make_sequence([3], temperature=9e-6), 0)
    assert (draw.key, draw.temperature) == (0, 9e-6)
