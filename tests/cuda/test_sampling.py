"""Draws on the device against tinyllm.sampling in float64: the same noise, the same filters, the same winners."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from cuda_kernels.emulated import EmulatedRuntime
from cuda_kernels.errors import KernelArgumentError
from cuda_kernels.kernel import Kernel
from cuda_kernels.sampling import MAX_VOCABULARY, sample_kernel, sample_tokens
from cuda_kernels.sampling_noise import log2_exponential
from cuda_kernels.sampling_rows import FORBIDDEN, NOT_A_NUMBER, ROW_WORDS, SamplingRow, pack_rows
from tinyllm.sampling import SamplingParams, _filter, gumbel_noise, noise_key

INF, NAN = np.inf, np.nan
LOG2_E = np.log2(np.e)
POSITION = 12


def request(seed: int, **options: Any) -> SamplingRow:
    """The draw of a request with this seed, from row 0."""
    return SamplingRow(0, noise_key(seed, (0,), POSITION), **options)


def draw(rt: EmulatedRuntime, logits: np.ndarray, rows: list[SamplingRow], *, threads: int | None = None) -> list[int]:
    """The tokens of draws from logits (R, V); with `threads`, from blocks of that size."""
    device_logits, draws = rt.from_host(logits.astype(np.float32)), rt.from_host(pack_rows(rows))
    out = rt.empty(len(rows), np.int32)
    if threads is None:
        sample_tokens(rt, device_logits, draws, out)
    else:
        arguments = (device_logits, logits.shape[1], logits.shape[1], draws, out)
        rt.launch(sample_kernel(threads), (len(rows), 1, 1), arguments)
    return rt.download(out).tolist()


# ---- the oracle


@dataclass(frozen=True)
class Expected:
    """The host's choice; `decided` if float32 cannot see it otherwise.

    Attributes:
        kept: ids that may be drawn at all: the filters', with room for rounding.
    """

    token: int
    kept: frozenset[int]
    decided: bool


def host_choice(logits: np.ndarray, seed: int, slack: float = 2.0**-18, **options: Any) -> Expected:
    """What sampling.sample draws from one row (V,), and whether rounding on the device could change it.

    A cut can move where top_p or min_p lies within the error of the sums and ratios, `slack` (2 ** -22 for exp2, and
    as much again for each power of two below the largest); the winner where two scores are closer than their errors.
    A winner among the most that may be kept, which is among the least too, wins whatever is kept.
    """
    params = SamplingParams(seed=seed, **options)
    (ids, scaled), (least, _) = (
        _filter(
            logits,
            replace(
                params,
                top_p=params.top_p if params.top_p == 1 else float(np.clip(params.top_p * (1 + e), 1e-12, 1)),
                min_p=params.min_p * (1 - e) if params.min_p < 1 else 1.0,
            ),
        )
        for e in (slack, -slack)
    )
    ratios = (scaled - scaled.max()) * LOG2_E
    with np.errstate(over="ignore"):
        noise = -gumbel_noise(seed, (0,), POSITION, ids) * LOG2_E  # log2(E)
    scores = ratios - noise
    error = 3 * 2.0**-24 * -ratios + 2.0**-20 + 2.0**-22 * np.abs(noise) + 2.0**-24 * np.abs(scores)
    winner = int(scores.argmax())
    rivals = scores + error >= scores[winner] - error[winner]
    return Expected(int(ids[winner]), frozenset(ids.tolist()), rivals.sum() == 1 and bool(np.isin(ids[winner], least)))


def check(rt: EmulatedRuntime, logits: np.ndarray, rows: list[dict[str, Any]], slack: float = 2.0**-18) -> int:
    """Draws from logits (R, V), one draw a row, and compares. How many were decided."""
    draws = [
        replace(request(seed, **{**options, "top_k": max(options.get("top_k", 0), 0)}), logits_row=seed)
        for seed, options in enumerate(rows)
    ]
    decided = 0
    for seed, (token, options) in enumerate(zip(draw(rt, logits, draws), rows, strict=True)):
        expected = host_choice(logits[seed], seed, slack, **options)
        assert token in expected.kept, f"row {seed}: {token} is filtered out by {options}"
        if expected.decided:
            assert token == expected.token, f"row {seed}: {options}"
            decided += 1
    return decided


# ---- greedy


@pytest.mark.parametrize("vocab", [1, 2, 31, 33, 1000, 4096, 49152])
def test_greedy_is_the_largest_and_the_lowest_id_of_a_tie(
    runtime: EmulatedRuntime, rng: np.random.Generator, vocab: int
) -> None:
    logits = np.minimum(rng.normal(0, 3, (4, vocab)), 2).astype(np.float32)  # a quarter are the largest
    rows = [SamplingRow(row, temperature=temperature) for row, temperature in enumerate([0.0, 9e-6, 0.0, 1e-300])]
    assert draw(runtime, logits, rows) == logits.argmax(axis=1).tolist()


def test_both_zeros_are_one_logit(runtime: EmulatedRuntime) -> None:
    logits = np.array([[-1.0, -0.0, 0.0], [-1.0, 0.0, -0.0]], np.float32)
    assert draw(runtime, logits, [SamplingRow(row, temperature=0.0) for row in range(2)]) == [1, 1]
    kept = {draw(runtime, logits, [request(seed, top_k=1)])[0] for seed in range(8)}
    assert kept == {1}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_have_no_choice(runtime: EmulatedRuntime, temperature: float) -> None:
    rows = {
        NOT_A_NUMBER: [[1, NAN, 2, 0, 0], [INF, 1, 2, 3, -NAN], [-INF, -INF, -INF, -INF, NAN]],
        FORBIDDEN: [[-INF] * 5],
        1: [[0, INF, 3, INF, 9], [-INF, -3e38, -INF, -INF, -INF]],
    }
    logits = np.array([row for group in rows.values() for row in group], np.float32)
    expected = [token for token, group in rows.items() for _ in group]
    for filters in ({}, {"top_k": 2, "top_p": 0.5, "min_p": 0.5}):
        draws = [SamplingRow(row, key=row, temperature=temperature, **filters) for row in range(len(logits))]
        assert draw(runtime, logits, draws) == expected


def test_a_nan_is_found_wherever_it_is(runtime: EmulatedRuntime) -> None:
    vocab = 37
    logits = np.zeros((vocab, vocab), np.float32)
    np.fill_diagonal(logits, -NAN)
    assert draw(runtime, logits, [SamplingRow(row) for row in range(vocab)]) == [NOT_A_NUMBER] * vocab


# ---- the noise


def _build_noise() -> Callable[..., None]:
    from numba import cuda

    def noise(bits: Any, result: Any) -> None:
        i = cuda.grid(1)
        result[i] = log2_exponential(bits[i])

    return noise


def test_the_exponential_variate_is_accurate_down_to_the_smallest(
    runtime: EmulatedRuntime, rng: np.random.Generator
) -> None:
    edges = [0, 1, 2**11 - 1, 2**11, 2**12, 2**40, 2**63 - 1, 2**63, 2**63 + 2**12, 2**64 - 2**12, 2**64 - 1]
    random = rng.integers(0, 2**64, 2048 - 9 * 64 - len(edges), np.uint64)
    near_ends = [end ^ np.uint64(int(x) >> s) for s in range(9, 64 - 1, 6) for x in random[:32] for end in ENDS]
    bits = np.array([*edges, *near_ends, *random], np.uint64)[:2048]
    result = runtime.empty(bits.size, np.float32)
    runtime.launch(
        Kernel("noise", _build_noise, (), ("u64*", "f32*"), 256),
        (bits.size // 256, 1, 1),
        (runtime.from_host(bits), result),
    )
    uniform = ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    expected = np.log2(-np.log(uniform))
    error = np.abs(runtime.download(result) - expected)
    assert (error <= 2.0**-20 + 2.0**-22 * np.abs(expected)).all()
    assert expected.min() < -50, "variates as small as 2 ** -53 were tried"


ENDS = (np.uint64(0), np.uint64(2**64 - 1))


# ---- draws

FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_p": 0.1},
    {"top_p": 0.9, "temperature": 0.7},
    {"top_p": 0.999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 50, "top_p": 0.95, "min_p": 0.02, "temperature": 1.5},
]


@pytest.mark.parametrize("vocab", [1, 2, 31, 33, 1000, 4099])
def test_draws_are_the_hosts(runtime: EmulatedRuntime, rng: np.random.Generator, vocab: int) -> None:
    logits = rng.normal(0, 2.5, (2 * len(FILTERS), vocab)).astype(np.float32)
    assert check(runtime, logits, FILTERS * 2) >= 2 * len(FILTERS) - 2


def test_draws_are_the_hosts_over_a_large_vocabulary(runtime: EmulatedRuntime, rng: np.random.Generator) -> None:
    logits = rng.normal(0, 2.5, (len(FILTERS), 49152)).astype(np.float32)
    assert check(runtime, logits, FILTERS) >= len(FILTERS) - 2


def test_the_largest_vocabulary_with_all_logits_equal(runtime: EmulatedRuntime) -> None:
    """Every cut falls among ties, at ids beyond 16 bits; the sums are exact, so nothing is left undecided."""
    logits = np.full((3, MAX_VOCABULARY), 1.25, np.float32)
    options = [{"top_k": 200_001}, {"top_p": 0.8125}, {"top_k": 100_000, "top_p": 0.75}]
    assert check(runtime, logits, options, slack=0.0) == 3


@pytest.mark.parametrize("vocab", [4, 64, 512])  # powers of two: n / vocab is exact
def test_cuts_among_ties_keep_the_lowest_ids(runtime: EmulatedRuntime, vocab: int) -> None:
    """top_k and top_p alone, and top_p over what top_k left of the ties: half of it, or all."""
    logits = np.full((1, vocab), -0.5, np.float32)
    draws, winners = [], []
    for n in sorted({1, 3, vocab // 2 + 1, vocab - 1}):
        for seed in range(5):
            draws += [request(seed, top_k=n), request(seed, top_p=n / vocab)]
            draws += [request(seed, top_k=n, top_p=0.5), request(seed, top_k=n, top_p=0.9999)]
            noise = gumbel_noise(seed, (0,), POSITION, np.arange(n))
            winners += [int(noise[:kept].argmax()) for kept in (n, n, (n + 1) // 2, n)]
    assert draw(runtime, logits, draws, threads=256) == winners


def test_many_small_probabilities_add_up(runtime: EmulatedRuntime) -> None:
    """Three quarters of the sum come from tokens below 2 ** -12 each: their masses carry into the high half."""
    logits = np.full((12, 3 * 4096 + 1), -12.0001 * np.log(2), np.float32)
    logits[:, 5000] = 0
    assert check(runtime, logits, [{"top_p": 0.5}] * 12) == 12
    assert len({host_choice(logits[seed], seed, top_p=0.5).token for seed in range(12)}) > 4


values = st.sampled_from([-INF, -3.0, -2.0, -1.5, -0.0, 0.0, 0.25, 1.0, 1.0 + 2**-23, 2.0, 2.0, 1e-40, -7e4])


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[float]], list[dict[str, Any]]]:
    vocab = draw(st.integers(1, 40))
    rows = draw(st.integers(1, 3))
    logits = [draw(st.lists(values, min_size=vocab, max_size=vocab)) for _ in range(rows)]
    for row in logits:
        row[draw(st.integers(0, vocab - 1))] = draw(st.sampled_from([0.5, 2.0, -4.0]))
    probabilities = st.sampled_from([1.0, 0.999, 0.9, 0.75, 0.5, 0.3, 1e-3])
    options = [
        {
            "temperature": draw(st.sampled_from([1.0, 0.3, 20.0, 2e-5, 2.0**90])),
            "top_k": draw(st.integers(-1, vocab + 1)),
            "top_p": draw(probabilities),
            "min_p": draw(st.one_of(st.just(0.0), probabilities)),
        }
        for _ in range(rows)
    ]
    return logits, options


@given(cases())
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_filters_among_ties_and_infinities(
    runtime: EmulatedRuntime, case: tuple[list[list[float]], list[dict[str, Any]]]
) -> None:
    logits, options = case
    check(runtime, np.array(logits, np.float32), options)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 3, "temperature": 5.0}, {1, 3, 2}),
        ({"top_k": 1}, {1}),
        ({"top_k": 6, "temperature": 5.0}, {0, 1, 2, 3, 5}),
        ({"top_p": 0.01}, {1}),
        ({"top_p": 0.5}, {1, 3}),
        ({"min_p": 0.3}, {1, 2, 3}),
        ({"min_p": 1.0}, {1, 3}),
        ({"top_k": 3, "top_p": 0.999, "min_p": 0.5}, {1, 3}),
    ],
)
def test_filters_keep_exactly_their_set(runtime: EmulatedRuntime, options: dict[str, Any], kept: set[int]) -> None:
    logits = np.array([[1.0, 3.0, 2.0, 3.0, -INF, 0.5]], np.float32)
    draws = [request(seed, **options) for seed in range(48)]
    assert set(draw(runtime, logits, draws, threads=256)) == kept


@pytest.mark.parametrize(("count", "options"), [(2000, {}), (300, {"temperature": 2.0, "top_k": 5, "top_p": 0.95})])
def test_draws_are_distributed_as_the_softmax(runtime: EmulatedRuntime, count: int, options: dict[str, Any]) -> None:
    logits = np.array([[1.0, -2.0, 0.5, 2.0, 0.5, -0.25, 1.5]], np.float32)
    tokens = draw(runtime, logits, [request(seed, **options) for seed in range(count)], threads=256)
    ids, scaled = _filter(logits[0], SamplingParams(**options))
    weights = np.exp(scaled - scaled.max())
    expected = np.zeros(logits.shape[1])
    expected[ids] = count * weights / weights.sum()
    observed = np.bincount(tokens, minlength=expected.size)
    assert (observed[expected == 0] == 0).all()
    chi_square = (((observed - expected) ** 2)[ids] / expected[ids]).sum()
    assert chi_square < {6: 38.3, 4: 33.4}[ids.size - 1], "the probability of more is 1e-6"


# ---- what a draw depends on


def test_a_draw_depends_on_its_row_and_its_words_alone(runtime: EmulatedRuntime, rng: np.random.Generator) -> None:
    """Rows begin at any address; a row may be drawn from twice, and others may be poisoned."""
    vocab = 301
    logits = np.full((9, vocab), NAN, np.float32)
    row = rng.normal(0, 2, vocab).round(2).astype(np.float32)
    logits[[0, 1, 3, 6]] = row
    options = {"top_k": 60, "top_p": 0.9, "min_p": 0.01}
    alone = [draw(runtime, row[None], [request(seed, **options)])[0] for seed in range(4)]
    together = [replace(request(seed, **options), logits_row=at) for seed in range(4) for at in (6, 1, 0, 3)]
    assert draw(runtime, logits, together) == [token for token in alone for _ in range(4)]
    assert len(set(alone)) > 1


def test_the_number_of_threads_changes_nothing(runtime: EmulatedRuntime, rng: np.random.Generator) -> None:
    logits = rng.normal(0, 2, (4, 1501)).round(1).astype(np.float32)
    draws = [replace(request(seed, **options), logits_row=seed) for seed, options in enumerate(FILTERS[-4:])]
    results = [draw(runtime, logits, draws, threads=threads) for threads in (256, 480, 1024)]
    assert results[0] == results[1] == results[2]


def test_rows_may_lie_apart_and_begin_anywhere(runtime: EmulatedRuntime, rng: np.random.Generator) -> None:
    """What lies between the rows was never written: reading it is reported."""
    vocab, rows = 70, 5
    logits = rng.normal(0, 2, (rows, vocab)).astype(np.float32)
    expected = draw(runtime, logits, [replace(request(row, top_p=0.9), logits_row=row) for row in range(rows)])
    for stride, offset in ((vocab, 0), (vocab + 1, 1), (vocab + 2, 3), (128, 2)):
        memory = runtime.empty(offset + rows * stride, np.float32)
        view = memory[offset:].reshape(rows, stride)[:, :vocab]
        for row in range(rows):
            runtime.upload(view[row], logits[row])
        draws = runtime.from_host(pack_rows([replace(request(row, top_p=0.9), logits_row=row) for row in range(rows)]))
        out = runtime.empty(rows, np.int32)
        sample_tokens(runtime, view, draws, out)
        assert runtime.download(out).tolist() == expected


def test_padding_reads_no_logits(runtime: EmulatedRuntime) -> None:
    logits, out = runtime.empty((2, 8), np.float32), runtime.empty(5, np.int32)
    runtime.upload(logits[1], np.arange(8, dtype=np.float32))
    sample_tokens(runtime, logits, runtime.from_host(pack_rows([SamplingRow(1, temperature=0.0)], 5)), out)
    assert runtime.download(out).tolist() == [7, 0, 0, 0, 0]


# ---- arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits_row": -1}, "logits_row cannot be -1"),
        ({"key": 1 << 64}, "key"),
        ({"temperature": NAN}, "temperature cannot be nan"),
        ({"temperature": 1e31}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
    ],
)
def test_a_draw_outside_its_range_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        SamplingRow(**{"logits_row": 0, **change})


def test_filters_that_keep_all_are_told_as_none() -> None:
    words = pack_rows([SamplingRow(3, (1 << 63) + 2), SamplingRow(0, top_p=1e-300), SamplingRow(0, top_p=1 - 2**-50)])
    assert words.shape == (3, ROW_WORDS)
    assert words[0].tolist() == [2, 1 << 31, int(np.float32(LOG2_E).view(np.uint32)), 0, 0, 0xFF800000, 1, 3]
    assert words[1:, 4].tolist() == [1, 2**32 - 1], "a filter never turns into none by rounding"
    with pytest.raises(KernelArgumentError, match="2 rows do not fit into 1"):
        pack_rows([SamplingRow(0)] * 2, 1)


def test_arrays_of_the_wrong_kind_are_refused(runtime: EmulatedRuntime) -> None:
    logits, draws, out = (
        runtime.empty((2, 8), np.float32),
        runtime.empty((3, ROW_WORDS), np.uint32),
        runtime.empty(3, np.int32),
    )
    for arguments in (
        (logits[0], draws, out),
        (logits[:, ::2], draws, out),
        (logits.view(np.int32), draws, out),
        (logits, draws[:, :4], out),
        (logits, draws, out[:2]),
        (logits, draws, out[::-1]),
    ):
        with pytest.raises(KernelArgumentError):
            sample_tokens(runtime, *arguments)
