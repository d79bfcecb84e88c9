"""Every bad sampling parameter is one clear line that names it; every good one is kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tinyllm.errors import InvalidRequestError
from tinyllm.sampling_params import SamplingParams

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0), ("n", 10**9), ("n", True), ("n", 1.0), ("n", "2"), ("n", None),
        ("best_of", 0), ("best_of", 2.0), ("beams", 0), ("beams", True), ("beams", 10**9),
        ("length_penalty", NAN), ("length_penalty", INF), ("length_penalty", "1"),
        ("early_stopping", "always"), ("early_stopping", None), ("early_stopping", 1),
        ("window", 0), ("window", 2**40), ("window", 8.0), ("sinks", -1), ("sinks", 257), ("sinks", None),
        ("cache_salt", None), ("cache_salt", b"x"), ("cache_salt", "x" * 10**5), ("cache_salt", "\ud800"),
        ("priority", 0.5), ("priority", 2**40), ("priority", None),
        ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 1.5), ("max_tokens", 10**30), ("max_tokens", None),
        ("min_tokens", -1), ("min_tokens", 10**6),
        ("temperature", NAN), ("temperature", INF), ("temperature", -1), ("temperature", "hot"),
        ("temperature", 10**400), ("temperature", True),
        ("top_p", 0), ("top_p", -1), ("top_p", NAN), ("top_p", 1.5),
        ("top_k", -5), ("top_k", 2.0), ("top_k", NAN),
        ("min_p", -0.1), ("min_p", 2), ("min_p", NAN),
        ("repetition_penalty", 0), ("repetition_penalty", -1), ("repetition_penalty", NAN), ("repetition_penalty", INF),
        ("presence_penalty", 3), ("presence_penalty", NAN), ("frequency_penalty", -3), ("frequency_penalty", INF),
        ("logprobs", -1), ("logprobs", True), ("prompt_logprobs", -1), ("prompt_logprobs", 1.5),
        ("stop", ""), ("stop", ["a", ""]), ("stop", 7), ("stop", ["a"] * 10**5), ("stop", "x" * 10**5),
        ("stop_token_ids", [-1]), ("stop_token_ids", [True]), ("stop_token_ids", "5"), ("stop_token_ids", [2**40]),
        ("stop", [b"x"]),
        ("logit_bias", {-1: 0.0}), ("logit_bias", {1: NAN}), ("logit_bias", {"1": 0.0}), ("logit_bias", [1]),
        ("seed", 2**64), ("seed", "0"), ("seed", 0.5), ("seed", -(2**63) - 1),
        ("ignore_eos", 1), ("skip_special_tokens", "no"),
        ("logits_processors", [3]), ("logits_processors", "abc"),
    ],
)  # fmt: skip
def test_a_bad_value_is_named_in_one_line(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    words = {"stop_token_ids": "stop", "logits_processors": "logits"}
    assert words.get(name, name) in message
    assert "\n" not in message
    assert len(message) < 250


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"n": 3, "beams": 2}, "beams"),
        ({"beams": 2, "best_of": 2}, "best_of"),
        ({"beams": 2, "stop": "."}, "stop"),
        ({"beams": 2, "logprobs": 0}, "logprobs"),
    ],
)
def test_what_does_not_go_together_is_named(params: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named):
        SamplingParams(**params)


def test_how_many_sequences_run_and_whether_they_can_be_streamed() -> None:
    def facts(**params: Any) -> tuple[int, bool]:
        made = SamplingParams(**params)
        return made.num_sequences, made.ranked

    assert facts() == (1, False)
    assert facts(n=3) == (3, False)
    assert facts(n=3, best_of=3) == (3, False)
    assert facts(n=2, best_of=3) == (3, True)
    assert facts(beams=1) == (1, True)
    assert facts(n=2, beams=4) == (4, True)


def test_what_depends_on_the_vocabulary_is_checked_against_it() -> None:
    good = SamplingParams(stop_token_ids=[99], logit_bias={99: 1.0}, logprobs=100, prompt_logprobs=0)
    good.check_vocabulary(100)
    for bad in ({"stop_token_ids": [100]}, {"logit_bias": {100: 1.0}}, {"logprobs": 101}, {"prompt_logprobs": 101}):
        with pytest.raises(InvalidRequestError, match=next(iter(bad)).split("_")[0]):
            SamplingParams(**bad).check_vocabulary(100)  # type: ignore[arg-type]


def test_numpy_numbers_and_single_strings_are_taken() -> None:
    params = SamplingParams(
        n=np.int64(2), temperature=np.float32(0.5), stop="end", stop_token_ids=np.array([1, 2]), seed=-1
    )
    assert (params.n, params.temperature, params.stop, params.stop_token_ids) == (2, 0.5, ("end",), (1, 2))
    assert type(params.n) is int


def test_a_value_whose_repr_fails_is_still_one_line() -> None:
    class Hostile:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    with pytest.raises(InvalidRequestError, match="n must be an integer from 1 to 4096, not a Hostile"):
        SamplingParams(n=Hostile())  # type: ignore[arg-type]
