"""The kernels that only training has, each against numpy in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.training import reference
from tests.training.reference import F64Array
from training.backend import TrainingBackend
from training.kernels import BLOCK

F32 = np.float32
EPS = 1e-5


@pytest.fixture(scope="module")
def backend() -> TrainingBackend:
    return TrainingBackend(1)


def normal(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return rng.standard_normal(shape, F32)


# ---- layers


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 16), (3, 17), (5, 48), (7, 100)])
def test_rms_norm_backward(rows: int, columns: int, backend: TrainingBackend) -> None:
    rng = np.random.default_rng(columns)
    x, dy, weight = normal(rng, rows, columns), normal(rng, rows, columns), normal(rng, columns)
    before, weight_before = normal(rng, rows, columns), normal(rng, columns)
    dx, dweight = before.copy(), weight_before.copy()
    backend.rms_norm_backward(x, dy, weight, EPS, dx, dweight)

    def of_x(values: F64Array) -> float:
        return float(np.sum(dy * reference.rms_norm(values, weight.astype(np.float64), EPS)))

    def of_weight(values: F64Array) -> float:
        return float(np.sum(dy * reference.rms_norm(x.astype(np.float64), values, EPS)))

    # what was there is added to: linear terms
    reference.check_gradient(lambda v: of_x(v) + float(np.sum(before * v)), x.astype(np.float64), dx, rng)
    reference.check_gradient(
        lambda v: of_weight(v) + float(np.sum(weight_before * v)), weight.astype(np.float64), dweight, rng
    )


def test_the_gradient_of_a_norm_is_orthogonal_to_its_input(backend: TrainingBackend) -> None:
    """Without eps the norm does not see its input's length."""
    rng = np.random.default_rng(0)
    x, dx, dweight = normal(rng, 4, 48), np.zeros((4, 48), F32), np.zeros(48, F32)
    backend.rms_norm_backward(x, normal(rng, 4, 48), normal(rng, 48), 0.0, dx, dweight)
    assert np.abs(np.sum(x.astype(np.float64) * dx, axis=1)).max() < 1e-5
    assert np.linalg.norm(dx, axis=1).min() > 1


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 16), (3, 40), (5, 49)])
def test_silu_mul_backward(rows: int, columns: int, backend: TrainingBackend) -> None:
    rng = np.random.default_rng(columns)
    x, dout = 2 * normal(rng, rows, 2 * columns), normal(rng, rows, columns)
    dx = np.full_like(x, np.nan)
    backend.silu_mul_backward(x, dout, dx)
    reference.check_gradient(lambda v: float(np.sum(dout * reference.silu_mul(v))), x.astype(np.float64), dx, rng)


def test_silu_mul_backward_of_extremes(backend: TrainingBackend) -> None:
    gates = np.array([-1e4, -200, -88, 0, 88, 200, 1e4], F32)
    x = np.concatenate([gates, np.full(7, 3, F32)])[None]
    dx = np.empty_like(x)
    backend.silu_mul_backward(x, np.ones((1, 7), F32), dx)
    assert dx[0, :7] == pytest.approx([0, 0, 0, 1.5, 3, 3, 3], abs=1e-6)
    assert dx[0, 7:] == pytest.approx([0, 0, 0, 0, 88, 200, 1e4])


@pytest.mark.parametrize(("H", "KH", "D"), [(1, 1, 16), (4, 2, 48)])
def test_rope_backward(H: int, KH: int, D: int, backend: TrainingBackend) -> None:
    """q and k are views of one array, as in the model."""
    rng = np.random.default_rng(D)
    T, half = 37, D // 2
    angles = np.arange(T)[:, None] * 10000.0 ** (-np.arange(half) / half)
    qkv, cotangent = normal(rng, T, H + 2 * KH, D), normal(rng, T, H + 2 * KH, D)
    dqkv = cotangent.copy()
    backend.rope_backward(dqkv[:, :H], dqkv[:, H : H + KH], np.cos(angles).astype(F32), np.sin(angles).astype(F32))

    def f(values: F64Array) -> float:
        rotated = reference.rope(values[None, :, : H + KH], 10000.0)[0]
        return float(np.sum(cotangent[:, : H + KH] * rotated) + np.sum(cotangent[:, H + KH :] * values[:, H + KH :]))

    reference.check_gradient(f, qkv.astype(np.float64), dqkv, rng)
    assert (dqkv[:, H + KH :] == cotangent[:, H + KH :]).all()


@pytest.mark.parametrize(
    ("n", "T", "H", "KH", "D"), [(1, 1, 1, 1, 16), (2, 37, 4, 2, 16), (1, 130, 3, 1, 48), (3, 65, 2, 2, 32)]
)
def test_attention_backward(n: int, T: int, H: int, KH: int, D: int, backend: TrainingBackend) -> None:
    """Queries, keys and values are views of one array, and so are their gradients."""
    rng = np.random.default_rng(T)
    qkv, dout = normal(rng, n, T, H + 2 * KH, D), normal(rng, n, T, H, D)
    q, k, v = np.split(qkv, [H, H + KH], axis=2)
    out, lse = backend.flash_attention(q, k, v, scale=1 / math.sqrt(D))
    dqkv = np.full_like(qkv, np.nan)
    dq, dk, dv = np.split(dqkv, [H, H + KH], axis=2)
    backend.flash_attention_backward(dout, q, k, v, out, lse, scale=1 / math.sqrt(D), dq=dq, dk=dk, dv=dv)

    def f(values: F64Array) -> float:
        return float(np.sum(dout * reference.attention(*np.split(values, [H, H + KH], axis=2))))

    reference.check_gradient(f, qkv.astype(np.float64), dqkv, rng)


# ---- the loss


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 16), (5, 17), (4, 77), (2, 4096)])
def test_cross_entropy(rows: int, columns: int, backend: TrainingBackend) -> None:
    rng = np.random.default_rng(columns)
    original = 3 * normal(rng, rows, columns)
    targets = rng.integers(columns, size=rows).astype(np.int32)
    gradient, losses = original.copy(), np.empty(rows, F32)
    backend.cross_entropy(gradient, targets, 0.25, losses)
    logits = original.astype(np.float64)
    assert losses == pytest.approx(reference.cross_entropy(logits, targets), rel=1e-6, abs=1e-6)
    assert np.abs(gradient.sum(axis=1, dtype=np.float64)).max() < 1e-6
    if columns > 1:
        reference.check_gradient(
            lambda x: 0.25 * float(reference.cross_entropy(x, targets).sum()), logits, gradient, rng
        )


@pytest.mark.parametrize("columns", [3, 40])
def test_cross_entropy_of_a_target_without_probability(columns: int, backend: TrainingBackend) -> None:
    logits = np.full((2, columns), -3e4, F32)
    logits[:, 1] = 3e4
    targets, losses = np.array([2, 1], np.int32), np.empty(2, F32)
    backend.cross_entropy(logits, targets, 1.0, losses)
    assert losses.tolist() == [6e4, 0]
    expected = np.zeros((2, columns), F32)
    expected[0, 1:3] = 1, -1
    assert (logits == expected).all()


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_cross_entropy_does_not_depend_on_a_shift(shift: float, backend: TrainingBackend) -> None:
    rng = np.random.default_rng(0)
    logits = np.round(normal(rng, 3, 50) * 8) / F32(8)  # sums with the shift are exact
    targets, losses, shifted_losses = np.array([0, 7, 49], np.int32), np.empty(3, F32), np.empty(3, F32)
    shifted = logits + F32(shift)
    backend.cross_entropy(logits, targets, 1.0, losses)
    backend.cross_entropy(shifted, targets, 1.0, shifted_losses)
    assert (logits == shifted).all()
    assert (losses == shifted_losses).all()


# ---- sums


@pytest.mark.parametrize("columns", [1, 16, 48, 77])
def test_rows_are_added_in_ascending_order(columns: int, backend: TrainingBackend) -> None:
    rng = np.random.default_rng(columns)
    x, out = normal(rng, 50, columns), normal(rng, 9, columns)
    indices = rng.integers(1, 9, 50).astype(np.int32)  # each many times, and row 0 never
    expected = out.copy()
    np.add.at(expected, indices, x)
    first = out[0].copy()
    backend.add_rows_at(x, indices, out)
    assert (out == expected).all()
    assert (out[0] == first).all()


def test_rows_of_no_entry_are_refused(backend: TrainingBackend) -> None:
    x, out = np.ones((1, 4), F32), np.zeros((3, 4), F32)
    for index in (-1, 3):
        with pytest.raises(AssertionError):
            backend.add_rows_at(x, np.array([index], np.int32), out)


@pytest.mark.parametrize("size", [1, 16, BLOCK, 2 * BLOCK + 21])
@pytest.mark.parametrize("shards", [1, 2, 5])
def test_gradients_are_summed_in_order(size: int, shards: int) -> None:
    rng = np.random.default_rng(size)
    gradients = [normal(rng, size) for _ in range(shards)]
    expected = gradients[0].copy()
    for gradient in gradients[1:]:
        expected += gradient
    norms = set()
    for threads in (1, 2, 3):
        copies = [gradient.copy() for gradient in gradients]
        norms.add(TrainingBackend(threads).sum_gradients(copies, copies[0]))
        assert (copies[0] == expected).all()
        assert all((a == b).all() for a, b in zip(copies[1:], gradients[1:], strict=True))
    assert len(norms) == 1
    assert norms.pop() == pytest.approx(float(np.linalg.norm(expected.astype(np.float64))), rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_norm_shows_numbers_that_are_not_finite(bad: float, backend: TrainingBackend) -> None:
    gradient = np.zeros(BLOCK + 5, F32)
    gradient[-1] = bad
    assert not math.isfinite(backend.sum_gradients([gradient], gradient))


# ---- AdamW


@pytest.mark.parametrize(("size", "decayed"), [(40, 0), (40, 16), (40, 48), (BLOCK + 35, BLOCK + 16)])
def test_adamw(size: int, decayed: int) -> None:
    """Some steps of the formula in float64; eps is large enough to be seen."""
    rng = np.random.default_rng(size + decayed)
    start = normal(rng, size)
    lr, beta1, beta2, eps, decay, rate, clip = 0.02, 0.8, 0.95, 0.05, 0.3, 0.25, 0.5
    results = []
    for threads in (1, 2):
        backend = TrainingBackend(threads)
        rng = np.random.default_rng(size)
        state = [start.copy(), np.zeros(size, F32), np.zeros(size, F32), start.copy()]
        p, m, v, a = (x.astype(np.float64) for x in state)
        for step in range(1, 6):
            gradient = normal(rng, size)
            g = clip * gradient.astype(np.float64)
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g * g
            change = m / (1 - beta1**step) / (np.sqrt(v / (1 - beta2**step)) + eps)
            p = p - lr / step * (change + decay * np.where(np.arange(size) < decayed, p, 0))
            a = a + rate * (p - a)
            backend.adamw(
                state[0], gradient, (state[1], state[2]), state[3], decayed=decayed, clip=clip, lr=lr / step,
                betas=(beta1, beta2), step=step, eps=eps, weight_decay=decay, average_rate=rate,
            )  # fmt: skip
            for actual, expected in zip(state, (p, m, v, a), strict=True):
                np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)
        results.append(np.stack(state))
    assert (results[0] == results[1]).all()


def test_adamw_leaves_padding_at_zero(backend: TrainingBackend) -> None:
    state = [np.zeros(32, F32) for _ in range(4)]
    for step in (1, 2):
        backend.adamw(
            state[0], np.zeros(32, F32), (state[1], state[2]), state[3], decayed=16, clip=1.0, lr=0.1,
            betas=(0.9, 0.95), step=step, eps=1e-8, weight_decay=0.1, average_rate=0.1,
        )  # fmt: skip
    assert not np.any(state)
