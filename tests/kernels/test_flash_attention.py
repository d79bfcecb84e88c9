"""Dense attention and its gradients: exactness, finite differences, the same bits, traps beside the arrays, memory."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from tests.kernels.dense_attention import Dense, assert_exact, exact, exact_out
from tinyllm.backends.cpu import CpuBackend
from tinyllm.backends.cpu_kernels import flash_attention as kernels
from tinyllm.backends.cpu_kernels.memory import aligned_zeros

CAUSAL = [  # N, Q, K, H, KH, D
    (1, 1, 1, 1, 1, 16),
    (2, 63, 63, 2, 1, 32),
    (1, 64, 64, 2, 2, 64),
    (1, 65, 65, 3, 1, 48),
    (2, 130, 130, 6, 2, 80),
    (1, 200, 200, 4, 2, 16),
    (1, 1, 200, 3, 3, 128),
    (1, 1, 64, 2, 1, 256),
    (2, 5, 68, 4, 2, 32),
    (1, 64, 65, 2, 2, 16),
    (1, 63, 130, 3, 1, 64),
    (1, 130, 200, 2, 1, 256),
    (1, 64, 63, 2, 1, 48),
    (1, 65, 64, 1, 1, 128),
    (2, 65, 1, 3, 1, 16),
    (1, 200, 65, 4, 2, 80),
    (1, 200, 7, 6, 2, 64),
]
WHOLE = [
    (1, 1, 1, 1, 1, 64),
    (1, 63, 64, 2, 1, 128),
    (1, 65, 130, 3, 1, 16),
    (2, 130, 65, 4, 2, 32),
    (1, 64, 200, 2, 2, 48),
    (1, 200, 1, 3, 3, 16),
    (1, 5, 63, 2, 1, 256),
    (1, 64, 64, 6, 2, 80),
]
CASES = [(*shape, True) for shape in CAUSAL] + [(*shape, False) for shape in WHOLE]


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    return request.getfixturevalue(request.param)


def random_case(rng, *shape) -> Dense:
    """shape: N, Q, K, H, KH, D, causal"""
    return Dense.random(rng, *shape[:-1], causal=shape[-1])


def assert_same_bits(results, expected):
    for ours, theirs in zip(results, expected, strict=True):
        assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("shape", CASES, ids=str)
def test_exact_to_a_few_roundings(shape, backend, rng):
    case = random_case(rng, *shape)
    assert_exact(case, case.run(backend), roundings=4)  # float32 in numpy shows 1.2, others up to 2.5


def test_rows_that_see_nothing(backend, rng):
    """Zeros, -inf, no gradient: whatever their queries are."""
    case = random_case(rng, 2, 100, 30, 4, 2, 16, True)
    clean = case.run(backend)
    q, dout = case.q.copy(), case.dout.copy()
    q[:, :70], dout[:, :70] = 1e30, -1e30
    loud = case.copied(q=q, dout=dout).run(backend)
    for out, lse, dq, *_ in (clean, loud):
        assert not np.signbit(out[:, :70]).any() and not out[:, :70].any()
        assert np.isneginf(lse[..., :70]).all()
        assert np.isfinite(lse[..., 70:]).all()
        assert not dq[:, :70].any()
    assert_same_bits(loud, clean)


def test_large_scores(backend, rng):
    """One key takes all of a row; the others underflow to nothing. Scores of thousands do not overflow."""
    case = random_case(rng, 1, 130, 130, 2, 1, 32, True)
    case = case.copied(q=case.q * 300)
    out, _, *gradients = results = case.run(backend)
    expected = exact(case)
    assert all(np.isfinite(x).all() for x in results)
    for result, right in zip((out, *gradients), (expected[0], *expected[2:]), strict=True):
        np.testing.assert_allclose(result, right, rtol=2e-3, atol=2e-3 * np.abs(right).max())


# ---- gradients by finite differences


def derivative(case, name, direction, step=1e-3):
    """d/dt sum(dout * out) along a direction of q, k or v: central differences of fourth order, in float64."""

    def loss(t):
        moved = replace(case, **{name: getattr(case, name).astype(np.float64) + t * direction})
        return (exact_out(moved) * case.dout.astype(np.float64)).sum()

    return (8 * (loss(step) - loss(-step)) - (loss(2 * step) - loss(-2 * step))) / (12 * step)


@pytest.mark.parametrize(
    "shape",
    [
        (2, 70, 70, 3, 1, 16, True),
        (1, 7, 70, 4, 2, 32, True),
        (1, 70, 66, 2, 2, 48, True),
        (1, 30, 65, 6, 2, 16, False),
        (2, 3, 3, 2, 1, 64, True),
    ],
    ids=str,
)
def test_finite_differences(shape, backend, rng):
    """In random directions, and in single coordinates: the largest of all, and some others."""
    case = random_case(rng, *shape)
    _, _, *gradients = case.run(backend)
    for name, gradient in zip("qkv", gradients, strict=True):
        norm = np.linalg.norm(gradient.astype(np.float64))  # about what a random direction gives
        mean = norm / np.sqrt(gradient.size)
        for _ in range(2):
            direction = rng.standard_normal(gradient.shape)
            found = derivative(case, name, direction)
            assert (gradient * direction).sum() == pytest.approx(found, rel=1e-5, abs=1e-6 * norm)
        for index in (int(np.abs(gradient).argmax()), *rng.integers(gradient.size, size=5)):
            direction = np.zeros(gradient.shape)
            direction.flat[index] = 1
            assert gradient.flat[index] == pytest.approx(derivative(case, name, direction), rel=1e-5, abs=1e-5 * mean)


# ---- the same bits

THREADED = [(3, 200, 200, 6, 2, 64, True), (2, 130, 65, 4, 4, 48, False), (1, 70, 260, 3, 1, 128, True)]


@pytest.mark.parametrize("shape", THREADED, ids=str)
def test_same_bits_in_every_run_and_for_every_number_of_threads(shape, rng):
    case = random_case(rng, *shape)
    expected = case.run(CpuBackend(1))
    for num_threads in (1, 2, 3, 5):
        backend = CpuBackend(num_threads)
        for _ in range(3):
            assert_same_bits(case.run(backend), expected)


@pytest.mark.parametrize("shape", [(3, 70, 70, 4, 2, 32, True), (4, 5, 67, 3, 1, 16, False)], ids=str)
def test_a_sequence_has_the_same_bits_alone_and_among_others(shape, backend, rng):
    case = random_case(rng, *shape)
    together = case.run(backend)
    for n in range(shape[0]):
        alone = case[n : n + 1].run(backend)
        assert_same_bits(alone, [x[n : n + 1] for x in together])


@pytest.mark.parametrize(("first", "end"), [(0, 1), (3, 70), (64, 130), (129, 130)])
def test_queries_cut_out_of_a_sequence_have_the_bits_that_they_have_in_it(first, end, backend, rng):
    """Wherever in its tile a query is. dk and dv are sums over the queries."""
    case = random_case(rng, 1, 130, 130, 2, 1, 32, True)
    out, lse, dq, *_ = case.run(backend)
    part = case.copied(q=case.q[:, first:end], dout=case.dout[:, first:end], k=case.k[:, :end], v=case.v[:, :end])
    assert_same_bits(part.run(backend)[:3], (out[:, first:end], lse[..., first:end], dq[:, first:end]))


@pytest.mark.parametrize("loud", [1.0, -1e4, 1e30])
@pytest.mark.parametrize("kept", [1, 20, 64, 100])
def test_what_a_row_does_not_see_leaves_its_bits(kept, loud, backend, rng):
    """Later keys and values for a query; earlier queries for a key. Anything finite may stand there."""
    case = random_case(rng, 1, 130, 130, 4, 2, 16, True)
    clean = case.run(backend)
    later = {name: np.where(np.arange(130)[:, None, None] < kept, getattr(case, name), loud) for name in "kv"}
    later["k"][:, kept:] /= 1e26 if loud == 1e30 else 1  # so that scores stay finite
    found = case.copied(**later).run(backend)
    for ours, theirs in (
        (found[0], clean[0]),
        (found[1].swapaxes(1, 2), clean[1].swapaxes(1, 2)),
        (found[2], clean[2]),
    ):
        assert ours[:, :kept].tobytes() == theirs[:, :kept].tobytes()
        assert ours[:, kept:].tobytes() != theirs[:, kept:].tobytes()
    before = np.arange(130)[:, None, None] < kept
    *_, dk, dv = case.copied(q=np.where(before, np.float32(3), case.q), dout=np.where(before, -2, case.dout)).run(
        backend
    )
    assert_same_bits((dk[:, kept:], dv[:, kept:]), (clean[3][:, kept:], clean[4][:, kept:]))
    assert dv[:, :kept].tobytes() != clean[4][:, :kept].tobytes()


# ---- views, and what lies beside them


def guarded(x, rng):
    """x inside a larger buffer, NaN before, after and between its batches and rows; its last two axes contiguous."""
    N, length, heads, D = x.shape
    buffer = np.full((N + 1, length + 70, heads + 2, D), np.nan, np.float32)
    view = buffer[:N, 2 : 2 + length, 1 : 1 + heads]
    view[...] = x
    return buffer, view


@pytest.mark.parametrize("shape", [(2, 65, 65, 4, 2, 32, True), (1, 5, 67, 3, 1, 16, True), (2, 66, 3, 2, 2, 48, True),
                                   (1, 63, 130, 2, 1, 64, False)], ids=str)  # fmt: skip
def test_nothing_beside_the_arrays_is_read_or_written(shape, backend, rng):
    """NaN all around the inputs, and in the backend's scratch; results are written into views amid NaN."""
    case = random_case(rng, *shape)
    expected = case.run(backend)
    if isinstance(backend, CpuBackend):
        backend._scratch.view(np.float32)[:] = np.nan
    q, k, v, dout = (guarded(x, rng)[1] for x in (case.q, case.k, case.v, case.dout))
    places = [guarded(np.full(x.shape, np.nan), rng) for x in (case.q, case.q, case.k, case.v)]
    lse_buffer = np.full(expected[1].size + 64, np.nan, np.float32)
    lse = lse_buffer[: expected[1].size].reshape(expected[1].shape)
    options = {"scale": case.scale, "causal": case.causal}
    found = backend.flash_attention(q, k, v, out=places[0][1], lse=lse, **options)
    dq, dk, dv = (view for _, view in places[1:])
    gradients = backend.flash_attention_backward(dout, q, k, v, places[0][1], lse, dq=dq, dk=dk, dv=dv, **options)
    for given, returned in zip((places[0][1], lse, dq, dk, dv), (*found, *gradients), strict=True):
        assert returned is given
    assert_same_bits((*found, *gradients), expected)
    for (buffer, view), result in zip(places, (expected[0], *expected[2:]), strict=True):
        view[...] = np.nan
        assert np.isnan(buffer).all()
        assert np.isfinite(result).all()
    assert np.isnan(lse_buffer[expected[1].size :]).all()


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 32), (3, 1, 16), (2, 2, 80)])
def test_views_of_one_buffer_of_queries_keys_and_values(heads, kv_heads, head_dim, backend, rng):
    """q, k, v as they come out of one product, and their gradients where its backward wants them."""
    case = random_case(rng, 2, 70, 70, heads, kv_heads, head_dim, True)
    expected = case.run(backend)
    qkv, dqkv = np.full((2, 2, 70, (heads + 2 * kv_heads) * head_dim), np.nan, np.float32)

    def parts(x):
        x = x.reshape(2, 70, heads + 2 * kv_heads, head_dim)
        return x[:, :, :heads], x[:, :, heads : heads + kv_heads], x[:, :, heads + kv_heads :]

    for part, array in zip(parts(qkv), (case.q, case.k, case.v), strict=True):
        part[...] = array
    dq, dk, dv = parts(dqkv)
    out, lse = backend.flash_attention(*parts(qkv), scale=case.scale)
    backend.flash_attention_backward(case.dout, *parts(qkv), out, lse, scale=case.scale, dq=dq, dk=dk, dv=dv)
    assert_same_bits((out, lse, dq, dk, dv), expected)
    assert np.isfinite(dqkv).all()


def test_rows_past_the_last_key_of_a_tile_are_zero(single, rng):
    """Whatever the scratch memory held."""
    x = rng.standard_normal((2, 70, 3, 16)).astype(np.float32)
    pitch = kernels.transposed_nbytes(16) // 64  # float32 of a row
    memory = aligned_zeros(2 * 3 * 2 * kernels.transposed_nbytes(16)).view(np.float32)
    memory[:] = np.nan
    single._transpose(x, int(memory.ctypes.data))
    tiles = memory.reshape(2, 3, 2, 16, pitch)[..., : kernels.TILE]  # (N, KH, tiles, D, 64)
    assert np.array_equal(tiles.transpose(0, 2, 4, 1, 3).reshape(2, 128, 3, 16)[:, :70], x)
    assert not tiles[:, :, 1, :, 6:].any()


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 3, 3, 3, 2, 16), "3 query heads over 2"), ((1, 3, 3, 2, 1, 24), "24 is no multiple of 16"),
     ((1, 0, 3, 1, 1, 16), "query heads")],
)  # fmt: skip
def test_limits_of_the_cpu_backend(shape, message, cpu, rng):
    case = random_case(rng, *shape, True)
    with pytest.raises(AssertionError, match=message):
        cpu.flash_attention(case.q, case.k, case.v, scale=1.0)


# ---- memory


def test_memory_grows_with_the_length_not_with_its_square(rng):
    """Scratch, and the peak of all that numpy allocates, results included, from 1,024 to 4,096 tokens."""
    scratch, peaks = [], []
    for length in (1024, 2048, 4096):
        case = random_case(rng, 1, length, length, 2, 1, 16, True)
        backend = CpuBackend(2)
        tracemalloc.start()
        results = case.run(backend)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        scratch.append(backend._scratch.nbytes)
        assert peaks[-1] < sum(x.nbytes for x in results) + scratch[-1] + 100_000
        assert peaks[-1] < 4 * length * length  # less than the scores of one head
    for nbytes in (scratch, peaks):
        assert nbytes[1] < 2.01 * nbytes[0]
        assert nbytes[2] < 2.01 * nbytes[1]
        assert nbytes[2] - nbytes[1] == pytest.approx(2 * (nbytes[1] - nbytes[0]), rel=0.02)
