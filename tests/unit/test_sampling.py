"""The sampler against direct definitions in float64, and its randomness: reproducible, independent, unbiased."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tinyllm.errors import InvalidRequestError
from tinyllm.sampling import SamplingParams, TokenHistory, gumbel_noise, sample, token_logprobs, top_ids

LOGITS = np.array([1.0, 3.0, 2.0, 3.0, -1.0, 0.5], np.float32)


def draw(logits: np.ndarray, tokens: tuple[int, ...] = (0,), prompt: int = 1, **options: Any) -> int:
    """One token from `logits` after `tokens`, the first `prompt` of which are the prompt."""
    history = TokenHistory.of(tokens[:prompt])
    for token in tokens[prompt:]:
        history.append(token)
    banned = options.pop("banned_ids", ())
    params = SamplingParams(**options)
    return sample(
        logits.astype(np.float32), params, token_ids=tokens, history=history, fork_path=(0,), banned_ids=banned
    ).token_id


def distribution(logits: np.ndarray, count: int = 4000, **options: Any) -> np.ndarray:
    """How often each token is drawn, over `count` seeds."""
    tokens = [draw(logits, seed=seed, **options) for seed in range(count)]
    return np.bincount(tokens, minlength=len(logits)) / count


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x.astype(np.float64) - x.max())
    return weights / weights.sum()


def test_greedy_takes_the_largest_and_the_lowest_id_of_a_tie() -> None:
    assert draw(LOGITS, temperature=0) == 1
    assert draw(LOGITS, temperature=1e-9) == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_draws_follow_the_softmax(temperature: float) -> None:
    expected = softmax(LOGITS / temperature)
    frequencies = distribution(LOGITS, temperature=temperature)
    assert np.abs(frequencies - expected).max() < 4 * np.sqrt(0.25 / 4000)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {1, 2, 3}),
        ({"top_p": 0.01}, {1}),
        ({"top_p": 0.5}, {1, 3}),
        ({"min_p": 0.3}, {1, 2, 3}),
        ({"min_p": 1.0}, {1, 3}),
        ({"top_k": 3, "min_p": 0.9}, {1, 3}),
        ({"top_k": -1, "logit_bias": {4: 100.0}}, {4}),
        ({"banned_ids": (1, 3)}, {0, 2, 4, 5}),
    ],
)
def test_filters_keep_exactly_their_set_in_its_proportions(options: dict[str, Any], kept: set[int]) -> None:
    frequencies = distribution(LOGITS, **options)
    assert set(np.flatnonzero(frequencies)) == kept
    if "logit_bias" not in options:
        mask = np.isin(np.arange(6), list(kept))
        expected = np.where(mask, softmax(LOGITS), 0)
        assert np.abs(frequencies - expected / expected.sum()).max() < 4 * np.sqrt(0.25 / 4000)


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 1.0), st.integers(1, 3000))
@settings(deadline=None, max_examples=80)
def test_top_p_over_a_large_vocabulary_is_the_smallest_sufficient_set(seed: int, top_p: float, size: int) -> None:
    from tinyllm.sampling import _nucleus

    scaled = np.random.default_rng(seed).normal(0, 3, size).round(1)  # rounded: ties happen
    kept = _nucleus(scaled, np.arange(size), top_p)
    order = np.lexsort((np.arange(size), -scaled))
    cumulative = np.cumsum(softmax(scaled)[order])
    needed = int(np.searchsorted(cumulative, top_p - 1e-12)) + 1
    assert abs(len(kept) - min(needed, size)) <= (1 if np.abs(cumulative - top_p).min() < 1e-9 else 0)
    assert set(kept) == set(order[: len(kept)])


def test_penalties_act_on_what_they_should() -> None:
    logits = np.array([2.0, 1.9, -1.0, 1.8], np.float32)
    assert draw(logits, (0,), temperature=0, repetition_penalty=1.2) == 1, "the prompt counts for repetition"
    assert draw(logits, (0,), temperature=0, presence_penalty=2.0) == 0, "but not for presence"
    assert draw(logits, (3, 0), temperature=0, presence_penalty=0.15) == 1
    assert draw(logits, (3, 0, 1, 1), temperature=0, frequency_penalty=0.15) == 0
    assert draw(logits, (3, 0, 0, 1), temperature=0, frequency_penalty=0.15) == 3
    negative = np.array([-1.0, -1.1], np.float32)
    assert draw(negative, (0,), temperature=0, repetition_penalty=1.5) == 1, "a negative logit is multiplied"


def test_processors_come_last_and_may_replace_everything() -> None:
    seen: list[list[int]] = []

    def only_two(token_ids: list[int], logits: np.ndarray) -> np.ndarray:
        seen.append(token_ids)
        return np.where(np.arange(logits.size) == 2, logits, -np.inf)

    assert draw(LOGITS, (4, 5), logits_processors=[only_two], logit_bias={1: 50.0}) == 2
    assert seen == [[4, 5]]


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (lambda ids, x: x[:-1], "must return 6 numbers, not float32 of shape \\(5,\\)"),
        (lambda ids, x: "text", "must return 6 numbers"),
        (lambda ids, x: x * np.nan, "contain NaN"),
        (lambda ids, x: np.full(6, -np.inf), "every token is forbidden"),
        (lambda ids, x: x[10], "a logits processor failed: IndexError"),
    ],
)
def test_a_failing_processor_is_named(processor: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        draw(LOGITS, logits_processors=[processor])


def test_the_callers_logits_are_never_changed() -> None:
    logits = LOGITS.copy()

    def scribble(ids: list[int], x: np.ndarray) -> np.ndarray:
        x[:] = 0
        return x

    draw(logits, (0, 1), repetition_penalty=2.0, logit_bias={0: 1.0}, logits_processors=[scribble])
    np.testing.assert_array_equal(logits, LOGITS)


def test_logprobs_are_the_models_own() -> None:
    expected = np.log(softmax(LOGITS))
    entries = token_logprobs(LOGITS, 2, 3)
    assert [(e.token_id, e.rank) for e in entries] == [(2, 3), (1, 1), (3, 2), (2, 3)]
    np.testing.assert_allclose([e.logprob for e in entries], expected[[2, 1, 3, 2]], atol=1e-6)
    assert len(token_logprobs(LOGITS, 0, 6)) == 7


def test_noise_is_a_function_of_seed_path_position_and_token_id_alone() -> None:
    ids = np.arange(1000)
    noise = gumbel_noise(7, (0,), 12, ids)
    np.testing.assert_array_equal(gumbel_noise(7, (0,), 12, ids[::-1][:50]), noise[::-1][:50])
    for other in (gumbel_noise(8, (0,), 12, ids), gumbel_noise(7, (1,), 12, ids), gumbel_noise(7, (0,), 13, ids)):
        assert abs(np.corrcoef(noise, other)[0, 1]) < 0.15
        assert not np.any(other == noise)
    np.testing.assert_array_equal(gumbel_noise(-1, (0,), 0, ids), gumbel_noise(2**64 - 1, (0,), 0, ids))


def test_noise_has_the_gumbel_distribution() -> None:
    noise = np.sort(gumbel_noise(0, (0,), 0, np.arange(100_000)))
    cdf = np.exp(-np.exp(-noise))
    assert np.abs(cdf - (np.arange(100_000) + 0.5) / 100_000).max() < 1.63 / np.sqrt(100_000)  # Kolmogorov-Smirnov, 1%


def test_top_ids_takes_the_lowest_ids_of_a_tie_and_skips_minus_infinity() -> None:
    values = np.array([1.0, 2.0, 1.0, 1.0, -np.inf], np.float32)
    assert top_ids(values, 3).tolist() == [1, 0, 2]
    assert top_ids(values, 5).tolist() == [1, 0, 2, 3]
