"""Beam search's bookkeeping: against transformers, against exhaustive search, and case by case."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tests.beam_model import beam_arrays, beam_cases, last_logits
from tinyllm.engine.beam_search import BeamSearch, Candidates, Continuation, Hypothesis, candidates, log_softmax
from tinyllm.errors import InvalidRequestError

Rows = Callable[[list[tuple[int, ...]]], Iterable[np.ndarray]]  # outputs so far -> log-probabilities (V,) of each


def drive(search: BeamSearch, rows: Rows) -> list[Hypothesis]:
    """Runs a search to its end, keeping the beams' tokens as its driver would."""
    beams: list[tuple[int, ...]] = [()]
    for _ in range(search.max_new_tokens):
        found = [candidates(row, search.num_candidates) for row in rows(beams)]
        beams = [(*beams[parent], token) for parent, token in search.advance(found)]
        assert len(beams) == search.num_live
        assert len(set(beams)) == len(beams), "two live beams are the same"
        if search.done:
            break
    assert search.done
    assert not beams
    return search.best(search.num_beams)


def search_of(case: dict[str, Any]) -> BeamSearch:
    return BeamSearch(
        case["beams"],
        max_new_tokens=case["max_tokens"],
        eos_token_ids=case["eos"],
        length_penalty=case["length_penalty"],
        early_stopping=case["early_stopping"],
    )


def rows_of(case: dict[str, Any], cache: dict[tuple[int, ...], np.ndarray]) -> Rows:
    """The tiny model's log-probabilities, with the case's penalty and bans."""
    arrays = beam_arrays()

    def rows(beams: list[tuple[int, ...]]) -> Iterable[np.ndarray]:
        sequences = [(*case["prompt"], *beam) for beam in beams]
        missing = [sequence for sequence in sequences if sequence not in cache]
        if missing:
            cache.update(zip(missing, last_logits(arrays, np.array(missing)), strict=True))
        for sequence, beam in zip(sequences, beams, strict=True):
            row = log_softmax(cache[sequence])
            row[list(set(sequence))] *= np.float32(case["repetition_penalty"])
            if len(beam) < case["min_tokens"]:
                row[case["eos"]] = -np.inf
            yield row

    return rows


def test_it_equals_transformers_token_for_token_and_score_for_score() -> None:
    cache: dict[tuple[int, ...], np.ndarray] = {}
    for case in beam_cases():
        found = drive(search_of(case), rows_of(case, cache))
        assert [hypothesis.token_ids for hypothesis in found] == case["token_ids"], case
        # relative too: a negative length penalty multiplies the rounding of transformers' float32 sums
        np.testing.assert_allclose([hypothesis.score for hypothesis in found], case["scores"], rtol=1e-6, atol=1e-4)
        for hypothesis in found:
            assert hypothesis.finish_reason == ("stop" if hypothesis.token_ids[-1] in case["eos"] else "length")
            assert hypothesis.stop_reason is None


def test_the_cases_cover_what_they_should() -> None:
    cases = beam_cases()
    assert {case["beams"] for case in cases} == {1, 2, 3, 4, 5, 8, 16}
    assert {len(case["eos"]) for case in cases} >= {0, 1, 2}
    early = [case for case in cases if case["eos"] and any(len(t) < case["max_tokens"] for t in case["token_ids"])]
    assert len(early) > len(cases) / 3
    outcomes: dict[str, set[str]] = {}
    for case in cases:
        results = ("early_stopping", "token_ids", "scores")
        outcomes.setdefault(str([case[k] for k in case if k not in results]), set()).add(str(case["token_ids"]))
    assert max(map(len, outcomes.values())) == 3, "no case in which the forms of early_stopping differ"


def markov(seed: int, vocab: int) -> Rows:
    """Log-probabilities that depend on the last token and the position."""
    table = np.random.default_rng(seed).standard_normal((8, vocab + 1, vocab)).astype(np.float32) * 2

    def rows(beams: list[tuple[int, ...]]) -> Iterable[np.ndarray]:
        return [log_softmax(table[len(beam), beam[-1] if beam else vocab]) for beam in beams]

    return rows


def all_hypotheses(rows: Rows, vocab: int, steps: int, eos: set[int]) -> list[tuple[tuple[int, ...], float]]:
    """Every output that ends at an end token or at `steps` tokens, and the sum of its log-probabilities."""
    live: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    finished = []
    for step in range(1, steps + 1):
        logprobs = [next(iter(rows([beam]))) for beam, _ in live]
        longer = [
            ((*beam, token), total + float(row[token]))
            for (beam, total), row in zip(live, logprobs, strict=True)
            for token in range(vocab)
        ]
        finished += [item for item in longer if item[0][-1] in eos or step == steps]
        live = [item for item in longer if item[0][-1] not in eos]
    return finished


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("eos", [set(), {1}, {0, 3}])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0])
def test_with_enough_beams_it_is_exhaustive_search(seed: int, eos: set[int], length_penalty: float) -> None:
    vocab, steps = 4, 4
    rows = markov(seed, vocab)
    scored = [
        (list(tokens), total / len(tokens) ** length_penalty)
        for tokens, total in all_hypotheses(rows, vocab, steps, eos)
    ]
    scored.sort(key=lambda item: -item[1])
    search = BeamSearch(
        vocab**steps, max_new_tokens=steps, eos_token_ids=eos, length_penalty=length_penalty, early_stopping="never"
    )
    found = drive(search, rows)
    assert [(hypothesis.token_ids, hypothesis.score) for hypothesis in found] == scored


@settings(deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    beams=st.integers(1, 6),
    eos=st.sets(st.integers(0, 6), max_size=4),
    stop=st.sets(st.integers(0, 6), max_size=3),
    steps=st.integers(1, 7),
    length_penalty=st.sampled_from([-2.0, 0.0, 0.5, 1.0, 3.0]),
    early_stopping=st.sampled_from([True, False, "never"]),
)
def test_whatever_the_logits_the_answer_is_sorted_distinct_and_repeatable(
    seed: int,
    beams: int,
    eos: set[int],
    stop: set[int],
    steps: int,
    length_penalty: float,
    early_stopping: bool | str,
) -> None:
    vocab = 7

    def run() -> tuple[BeamSearch, list[Hypothesis]]:
        search = BeamSearch(
            beams,
            max_new_tokens=steps,
            eos_token_ids=eos,
            stop_token_ids=stop,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
        )
        return search, drive(search, markov(seed, vocab))

    search, found = run()
    assert found == run()[1]
    assert 1 <= len(found) <= beams
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
    assert len({tuple(h.token_ids) for h in found}) == len(found)
    sums = dict(all_hypotheses(markov(seed, vocab), vocab, steps, eos | stop)) if steps <= 3 else None
    for h in found:
        last = h.token_ids[-1]
        assert (h.finish_reason == "stop") == (last in eos | stop)
        assert h.finish_reason == "stop" or len(h.token_ids) == steps
        assert h.stop_reason == (last if last in stop - eos else None)
        assert not (eos | stop) & set(h.token_ids[:-1])
        if sums is not None:
            assert h.score == pytest.approx(sums[tuple(h.token_ids)] / len(h.token_ids) ** length_penalty, rel=1e-12)
    assert [h.token_ids for h in search.best(1)] == [found[0].token_ids]


def row_of(**logprobs: float) -> Candidates:
    """Candidates by name: t3=-0.5 is token 3."""
    row = np.full(10, -np.inf, np.float32)
    for name, value in logprobs.items():
        row[int(name[1:])] = value
    return candidates(row, 10)


def test_an_end_token_counts_only_among_the_first_beams() -> None:
    search = BeamSearch(2, max_new_tokens=5, eos_token_ids={9}, early_stopping="never")
    assert search.advance([row_of(t1=-1, t2=-2, t9=-3, t3=-4)]) == [Continuation(0, 1), Continuation(0, 2)]
    assert [h.token_ids for h in search.best(9)] == [[1], [2]], "nothing has finished: the live beams"
    # the first beam's end comes second of all and is finished; the other's comes fourth and is dropped
    live = search.advance([row_of(t9=-2, t4=-1.5, t5=-6), row_of(t3=-1.25, t9=-2)])
    assert live == [Continuation(0, 4), Continuation(1, 3)]
    assert [(h.token_ids, h.score, h.finish_reason) for h in search.best(9)] == [
        ([1, 9], -1.5, "stop"),
        ([1, 4], -1.25, None),
        ([2, 3], -1.625, None),
    ]


@pytest.mark.parametrize(
    ("early_stopping", "length_penalty", "stops"),
    [
        (True, 1.0, True),
        (False, 1.0, True),  # -3.5 / 1 is worse than -3
        ("never", 1.0, False),  # -3.5 / 4 would be better
        (False, 0.0, True),
        ("never", 0.0, True),
        (False, -1.0, True),
        ("never", -1.0, True),
    ],
)
def test_when_the_live_beams_are_given_up(early_stopping: bool | str, length_penalty: float, stops: bool) -> None:
    search = BeamSearch(
        2, max_new_tokens=4, eos_token_ids={8, 9}, length_penalty=length_penalty, early_stopping=early_stopping
    )
    live = search.advance([row_of(t8=-1, t9=-3, t1=-3.5)])
    assert search.done == stops
    assert live == ([] if stops else [Continuation(0, 1)])


@pytest.mark.parametrize("length_penalty", [0.0, -1.0])
@pytest.mark.parametrize(("early_stopping", "stops"), [(True, True), (False, False), ("never", False)])
def test_a_live_beam_better_than_the_worst_finished_goes_on_unless_told(
    early_stopping: bool | str, stops: bool, length_penalty: float
) -> None:
    search = BeamSearch(
        2, max_new_tokens=4, eos_token_ids={9}, length_penalty=length_penalty, early_stopping=early_stopping
    )
    search.advance([row_of(t1=-1, t9=-5)])  # two candidates: both are among the first two
    assert search.num_live == 1
    search.advance([row_of(t2=-1, t9=-1.5)])
    assert search.done == stops


def test_a_live_beam_as_good_as_the_worst_finished_is_given_up() -> None:
    search = BeamSearch(2, max_new_tokens=9, eos_token_ids={9}, length_penalty=0.0)
    search.advance([row_of(t9=-1, t1=-1.5)])
    assert search.advance([row_of(t2=-1.5, t9=-1.5)]) == []
    assert [h.token_ids for h in search.best(2)] == [[9], [1, 9]]


def test_end_tokens_ahead_of_all_others_leave_enough_that_go_on() -> None:
    search = BeamSearch(2, max_new_tokens=9, eos_token_ids={7, 8}, stop_token_ids={9}, early_stopping="never")
    row = row_of(t7=-1, t8=-1, t9=-1, t1=-2, t2=-3, t3=-4)
    assert search.advance([row]) == [(0, 1), (0, 2)]
    assert search.advance([row, row]) == [(0, 1), (0, 2)]


def test_equal_scores_go_to_the_earlier_beam_then_the_lowest_token() -> None:
    search = BeamSearch(3, max_new_tokens=3)
    assert search.advance([row_of(t7=-1, t2=-1, t5=-1, t8=-1)]) == [(0, 2), (0, 5), (0, 7)]
    rows = [row_of(t4=-1), row_of(t9=-1, t0=-1), row_of(t1=-1)]
    assert search.advance(rows) == [(0, 4), (1, 0), (1, 9)]


def test_one_beam_is_greedy_and_ends_at_its_first_end_token() -> None:
    search = BeamSearch(1, max_new_tokens=9, eos_token_ids={9}, early_stopping="never", length_penalty=2.0)
    assert search.advance([row_of(t3=-0.25, t9=-0.5)]) == [(0, 3)]
    assert search.advance([row_of(t9=-0.25, t1=-0.5)]) == []
    assert search.best(1) == [Hypothesis([3, 9], -0.125, "stop", None)]


def test_forbidden_tokens_leave_fewer_beams() -> None:
    search = BeamSearch(4, max_new_tokens=3, stop_token_ids={9})
    assert search.advance([row_of(t1=-1, t2=-2)]) == [(0, 1), (0, 2)]
    assert search.advance([row_of(), row_of(t9=-1, t3=-2)]) == [(1, 3)]
    assert search.advance([row_of()]) == []
    assert search.done
    assert search.best(4) == [Hypothesis([2, 9], -1.5, "stop", 9)]


def test_a_search_without_any_token_is_an_error() -> None:
    with pytest.raises(InvalidRequestError, match="every token is forbidden"):
        BeamSearch(2, max_new_tokens=3).advance([row_of()])


def test_nan_is_an_error() -> None:
    for bad in (np.nan, np.inf):
        with pytest.raises(InvalidRequestError, match="NaN"):
            candidates(log_softmax(np.array([0, bad, 1], np.float32)), 2)


def test_a_penalty_beyond_float64_is_an_error() -> None:
    for penalty in (100.0, -100.0):
        with pytest.raises(InvalidRequestError, match="length_penalty"):
            BeamSearch(2, max_new_tokens=100_000, length_penalty=penalty)
        BeamSearch(2, max_new_tokens=128, length_penalty=penalty)


def test_log_softmax_sums_to_one_whatever_the_scale() -> None:
    rng = np.random.default_rng(0)
    for scale, shift in itertools.product((1, 30), (-1e4, 0, 1e4)):
        row = log_softmax((rng.standard_normal(1000) * scale + shift).astype(np.float32))
        assert row.dtype == np.float32
        assert np.exp(row.astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)


def test_candidates_are_the_most_likely_ties_by_the_lowest_id() -> None:
    found = candidates(np.array([-3, -1, -np.inf, -1, -2], np.float32), 3)
    assert found.token_ids.tolist() == [1, 3, 4]
    assert found.logprobs.tolist() == [-1, -1, -2]
    assert candidates(np.array([-3, -1, -np.inf], np.float32), 3).token_ids.tolist() == [1, 0]
