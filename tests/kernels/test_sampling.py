"""The CPU kernel's draws against tinyllm.sampling, token for token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray

from tinyllm.backends.cpu import CpuBackend
from tinyllm.backends.cpu_kernels.sampling import scratch_nbytes
from tinyllm.backends.cpu_kernels.sampling_noise import LEAST_NOISE, MOST_NOISE
from tinyllm.engine.device_sampling import FORBIDDEN, MAX_TEMPERATURE, NOT_A_NUMBER, Draw
from tinyllm.errors import InvalidRequestError
from tinyllm.sampling import SamplingParams, TokenHistory, noise_key, sample

INF, NAN = np.inf, np.nan
POSITION = 5
Row = NDArray[np.float32]


def draw_of(row: int, seed: int, options: dict[str, Any]) -> Draw:
    params = SamplingParams(seed=seed, **options)
    key = noise_key(seed, (0,), POSITION)
    return Draw(row, key, params.temperature, max(params.top_k, 0), params.top_p, params.min_p)


def host_choice(logits: Row, seed: int, options: dict[str, Any]) -> int:
    params, ids = SamplingParams(seed=seed, **options), [0] * POSITION
    try:
        return sample(logits, params, token_ids=ids, history=TokenHistory.of(ids), fork_path=(0,)).token_id
    except InvalidRequestError as error:
        return NOT_A_NUMBER if "NaN" in str(error) else FORBIDDEN


def check(backend: CpuBackend, logits: Row, draws: list[tuple[int, int, dict[str, Any]]]) -> None:
    """draws: (row of logits (R, V), seed, options)"""
    tokens = backend.sample(logits, [draw_of(*draw) for draw in draws])
    for token, (row, seed, options) in zip(tokens, draws, strict=True):
        expected = host_choice(np.ascontiguousarray(logits[row]), seed, options)
        assert token == expected, f"row {row} of {logits.shape}, seed {seed}, {options}"


# ---- rows of every shape of distribution

Make = Callable[[np.random.Generator, int], NDArray[np.floating]]

ROWS: dict[str, Make] = {
    "normal": lambda rng, n: rng.normal(0, 2.5, n),
    "flat": lambda rng, n: rng.normal(0, 0.01, n),
    "peaked": lambda rng, n: rng.normal(-9, 2.0, n) + 14.0 * (rng.permutation(n) < 6),
    "steep": lambda rng, n: rng.normal(0, 400.0, n),
    "equal": lambda rng, n: np.full(n, -0.75),
    "two values": lambda rng, n: rng.integers(0, 2, n) * 2.0,
    "many ties": lambda rng, n: rng.normal(0, 1.5, n).round(1),
    "ties at the top": lambda rng, n: np.minimum(rng.normal(0, 3, n), 2.5),
    "both zeros": lambda rng, n: np.where(rng.random(n) < 0.5, -0.0, 0.0) - 3.0 * (rng.random(n) < 0.3),
    "mostly -inf": lambda rng, n: np.where(rng.permutation(n) < max(1, n // 50), rng.normal(0, 2, n), -INF),
    "one finite": lambda rng, n: np.where(rng.permutation(n) == 0, -3e38, -INF),
    "the last alone": lambda rng, n: np.where(np.arange(n) == n - 1, 9.0, -9.0),
    "huge": lambda rng, n: rng.uniform(-3e38, 3e38, n),
    "huge and equal": lambda rng, n: np.where(rng.random(n) < 0.5, 1e30, -1e30),
    "tiny": lambda rng, n: rng.normal(0, 1e-41, n),
    "+inf": lambda rng, n: np.where(rng.permutation(n) < 3, INF, rng.normal(0, 2, n)),
    "all -inf": lambda rng, n: np.full(n, -INF),
    "NaN": lambda rng, n: np.where(rng.permutation(n) == 0, NAN, rng.normal(0, 2, n)),
    "NaN and +inf": lambda rng, n: np.where(rng.permutation(n) == 0, -NAN, INF),
}

FILTERS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 9e-6, "top_k": 2},
    {},
    {"temperature": 0.7},
    {"temperature": 2e-5},
    {"temperature": MAX_TEMPERATURE},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 900, "temperature": 3.0},
    {"top_k": 3500, "min_p": 0.01},
    {"top_k": 40, "top_p": 0.9},
    {"top_k": 3000, "top_p": 0.55, "temperature": 1.7},
    {"top_p": 1e-9},
    {"top_p": 0.3},
    {"top_p": 0.9, "temperature": 0.8},
    {"top_p": 0.999, "temperature": 1.5},
    {"top_p": 1 - 2**-50},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"min_p": 1e-300},
    {"top_k": 60, "top_p": 0.95, "min_p": 0.02, "temperature": 1.5},
    {"top_p": 0.97, "min_p": 0.001, "temperature": 0.5},
]


@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 255, 256, 257, 4096, 49152 + 7])
@pytest.mark.parametrize("kind", ROWS)
def test_draws_are_the_hosts(cpu: CpuBackend, rng: np.random.Generator, kind: str, vocab: int) -> None:
    rows = 1 if vocab > 4096 else 3
    logits = np.stack([ROWS[kind](rng, vocab) for _ in range(rows)]).astype(np.float32)
    check(cpu, logits, [(i % rows, i, options) for i, options in enumerate(FILTERS)])


@pytest.mark.parametrize("kind", ["normal", "peaked", "many ties"])
def test_many_draws_are_the_hosts(cpu: CpuBackend, rng: np.random.Generator, kind: str) -> None:
    logits = ROWS[kind](rng, 3001).astype(np.float32)[None]
    check(cpu, logits, [(0, seed, options) for seed in range(60) for options in FILTERS[2:]])


@pytest.mark.parametrize("vocab", [4, 64, 4096])  # powers of two: n / vocab is exact
def test_cuts_among_ties_keep_the_lowest_ids(cpu: CpuBackend, vocab: int) -> None:
    logits = np.full((1, vocab), -0.5, np.float32)
    for n in {1, 3, vocab // 2 + 1, vocab - 1}:
        options: list[dict[str, Any]] = [{"top_k": n}, {"top_p": n / vocab}, {"top_k": n, "top_p": 0.5}]
        draws = [(0, seed, o) for seed in range(40) for o in options]
        check(cpu, logits, draws)
        assert max(cpu.sample(logits, [draw_of(*draw) for draw in draws])) < n


@pytest.mark.parametrize("position", range(37))
def test_a_nan_is_found_wherever_it_is(cpu: CpuBackend, position: int) -> None:
    for vocab, at in ((37, position), (256 + 64, 7 * position), (1037, 1000 + position)):
        logits = np.zeros((1, vocab), np.float32)
        logits[0, at] = -NAN
        assert cpu.sample(logits, [draw_of(0, 1, {}), draw_of(0, 1, {"temperature": 0})]) == [NOT_A_NUMBER] * 2


def test_the_greedy_choice_is_the_first_of_the_largest(cpu: CpuBackend, rng: np.random.Generator) -> None:
    for vocab in (1, 31, 1000, 5000):
        logits = np.minimum(rng.normal(0, 3, (4, vocab)), 2).astype(np.float32)
        assert cpu.sample(logits, [draw_of(i, i, {"temperature": 0}) for i in range(4)]) == logits.argmax(1).tolist()


values = st.sampled_from([-INF, -3.0, -2.0, -1.5, -0.0, 0.0, 0.25, 1.0, 1.0 + 2**-23, 2.0, 2.0, 1e-40, -7e4])


@st.composite
def cases(draw: st.DrawFn) -> tuple[Row, list[tuple[int, int, dict[str, Any]]]]:
    vocab, rows = draw(st.integers(1, 40)), draw(st.integers(1, 3))
    logits = np.array([draw(st.lists(values, min_size=vocab, max_size=vocab)) for _ in range(rows)], np.float32)
    probabilities = st.sampled_from([1.0, 0.999, 0.9, 0.75, 0.5, 0.3, 1e-3])
    options = st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([1.0, 0.3, 20.0, 2e-5, 2.0**90]),
            "top_k": st.integers(-1, vocab + 1),
            "top_p": probabilities,
            "min_p": st.one_of(st.just(0.0), probabilities),
        }
    )
    draws = st.tuples(st.integers(0, rows - 1), st.integers(0, 1000), options)
    return logits, draw(st.lists(draws, min_size=1, max_size=8))


@given(cases())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_filters_among_ties_and_infinities(cpu: CpuBackend, case: tuple[Row, Any]) -> None:
    check(cpu, *case)


# ---- the distribution, and the noise's bounds


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "top_k": 5}, {"top_p": 0.9}, {"min_p": 0.2}])
def test_draws_are_distributed_as_the_softmax(cpu: CpuBackend, options: dict[str, Any]) -> None:
    logits = np.array([[1.0, -2.0, 0.5, 2.0, 0.5, -0.25, 1.5]], np.float32)
    count = 4000
    tokens = cpu.sample(logits, [draw_of(0, seed, options) for seed in range(count)])
    observed = np.bincount(tokens, minlength=7)
    weights = np.exp(logits[0].astype(np.float64) / options.get("temperature", 1.0))
    order = np.argsort(-weights, kind="stable")
    kept = order[: options.get("top_k", 7)]
    kept = kept[: np.searchsorted(np.cumsum(weights[kept]), options.get("top_p", 1.0) * weights[kept].sum()) + 1]
    kept = kept[weights[kept] >= options.get("min_p", 0.0) * weights.max()]
    expected = count * weights[kept] / weights[kept].sum()
    assert observed[kept].sum() == count
    chi_square = ((observed[kept] - expected) ** 2 / expected).sum()
    assert chi_square < {6: 38.3, 5: 35.9, 4: 33.4, 3: 30.7}[kept.size - 1], "the probability of more is 1e-6"


def test_no_noise_is_beyond_its_bounds() -> None:
    """From the first and the last of the 2 ** 52 numbers that it is a function of."""
    assert LEAST_NOISE < -np.log(-np.log(2.0**-53))
    assert MOST_NOISE > -np.log(-np.log1p(-(2.0**-53)))


GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
RAREST = (1 << 64) - 1  # what gives the most noise


def key_of(bits: int, token: int) -> int:
    """The key from which `token` gets these 64 bits: the mixing function, backwards."""

    def unshift(x: int, shift: int) -> int:
        y = x
        for _ in range(64 // shift + 1):
            y = x ^ (y >> shift)
        return y

    x = unshift(bits, 31) * pow(SECOND, -1, 1 << 64) % (1 << 64)
    x = unshift(x, 27) * pow(FIRST, -1, 1 << 64) % (1 << 64)
    return (unshift(x, 30) - (token + 1) * GOLDEN) % (1 << 64)


def noise_of(key: int, token: int) -> float:
    x = (key + (token + 1) * GOLDEN) % (1 << 64)
    x = (x ^ (x >> 30)) * FIRST % (1 << 64)
    x = (x ^ (x >> 27)) * SECOND % (1 << 64)
    return -float(np.log(-np.log((((x ^ (x >> 31)) >> 12) + 0.5) * 2.0**-52)))


@pytest.mark.parametrize("likely", [7, 4990])
@pytest.mark.parametrize("depth", [0.0, 10.0, 20.0, 28.0, 35.0])
def test_a_token_of_great_luck_wins(cpu: CpuBackend, depth: float, likely: int) -> None:
    """It is as far below another as only the rarest noise makes up for."""
    lucky = 4321
    logits = np.full((1, 5000), -INF, np.float32)
    logits[0, [likely, lucky]] = 0.0, -depth
    wins = set()
    for low in range(16):
        for bits in (RAREST - (low << 12), 1 << 62 | low << 50):
            key = key_of(bits, lucky)
            margin = noise_of(key, lucky) - depth - noise_of(key, likely)
            assert abs(margin) > 1e-9
            wins.add(margin > 0)
            assert cpu.sample(logits, [Draw(0, key, 1.0, 0, 1.0, 0.0)]) == [lucky if margin > 0 else likely]
    assert True in wins


def test_the_least_noise_is_a_number(cpu: CpuBackend) -> None:
    logits = np.full((1, 50), -INF, np.float32)
    logits[0, 43] = 2.0
    assert cpu.sample(logits, [Draw(0, key_of(0, 43), 1.0, 0, 1.0, 0.0)]) == [43]


def test_great_luck_does_not_bring_a_token_past_a_filter(cpu: CpuBackend) -> None:
    """Each is the first that a filter leaves out, and has the noise to win wherever it is kept."""
    vocab, best = 49152, 30000
    deep = np.full(vocab, -20.0, np.float32)  # together 1e-4 of the probability
    deep[best] = 0.0
    ties = np.full(vocab, -1.0, np.float32)
    close = np.full(vocab, -INF, np.float32)
    close[best], close[5] = 3.0, np.float32(3.0 + np.log(0.25))
    close[6] = np.nextafter(close[5], np.float32(-INF))
    bound = float(np.exp(np.float64(close[5]) - 3.0)) * (1 - 1e-9)  # between the two
    for row, lucky, options, kept in (
        (deep, 0, {"top_p": 0.999}, False),
        (deep, 0, {"top_p": 0.99995}, True),
        (deep, 0, {"top_k": 1}, False),
        (deep, 0, {"top_k": 2}, True),
        (ties, 40, {"top_k": 40}, False),
        (ties, 39, {"top_k": 40}, True),
        (ties, vocab * 3 // 4, {"top_p": 0.75}, False),
        (ties, vocab * 3 // 4 - 1, {"top_p": 0.75}, True),
        (close, 5, {"min_p": bound}, True),
        (close, 6, {"min_p": bound}, False),
    ):
        told = draw_of(0, 0, options)._replace(key=key_of(RAREST, lucky))
        assert (cpu.sample(row[None], [told]) == [lucky]) == kept, options


# ---- what a draw depends on


def test_a_draw_depends_on_its_row_and_what_it_is_told_alone(rng: np.random.Generator) -> None:
    """Alone or in a batch, on one thread or three, from a row anywhere, twice from one, among rows of NaN."""
    vocab = 5003
    row = ROWS["many ties"](rng, vocab).astype(np.float32)
    wide = np.full((9, vocab + 13), NAN, np.float32)
    wide[[0, 1, 3, 6], 5 : 5 + vocab] = row
    spread = wide[:, 5 : 5 + vocab]
    alone = [CpuBackend(1).sample(row[None], [draw_of(0, i, o)])[0] for i, o in enumerate(FILTERS)]
    assert len(set(alone)) > 5
    together = [draw_of(at, i, o) for i, o in enumerate(FILTERS) for at in (6, 1, 0, 3)]
    for threads in (1, 3):
        backend = CpuBackend(threads)
        for _ in range(3):
            assert backend.sample(spread, together) == [token for token in alone for _ in range(4)]
    assert np.isnan(np.delete(wide, slice(5, 5 + vocab), 1)).all()


def test_a_row_is_not_changed_and_scratch_is_known_before(rng: np.random.Generator) -> None:
    backend, vocab = CpuBackend(2), 4099
    logits = np.full((2, vocab), 0.25, np.float32)
    before = logits.copy()
    check(backend, logits, [(i % 2, i, options) for i, options in enumerate(FILTERS)])
    np.testing.assert_array_equal(logits, before)
    assert backend._scratch.nbytes == 2 * scratch_nbytes(vocab) <= backend.workspace_nbytes(1, 32, 1, 1, 32, 16, vocab)


@pytest.mark.parametrize("row", [-1, 2])
def test_a_row_that_is_not_there(cpu: CpuBackend, row: int) -> None:
    with pytest.raises(AssertionError):
        cpu.sample(np.zeros((2, 8), np.float32), [draw_of(row, 0, {})])
