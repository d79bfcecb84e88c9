"""Norms, activations and rotary embedding of the cpu backend."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.kernel_cases import worst

COLUMNS = (1, 5, 16, 17, 64, 100, 576, 1000)


def norm(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + np.exp(-x))


OPS = {
    "rms_norm": (lambda b, x, w, c: b.rms_norm(x, w, 1e-5), lambda x, w, c: norm(x, w, 1e-5), 1),
    "layer_norm": (
        lambda b, x, w, c: b.layer_norm(x, w, c, 1e-5),
        lambda x, w, c: norm(x - x.mean(-1, keepdims=True), w, 1e-5) + c,
        1,
    ),
    "silu_mul": (
        lambda b, x, w, c: b.silu_mul(x),
        lambda x, w, c: silu(np.split(x, 2, -1)[0]) * np.split(x, 2, -1)[1],
        2,
    ),
    "gelu_mul": (
        lambda b, x, w, c: b.gelu_mul(x),
        lambda x, w, c: gelu(np.split(x, 2, -1)[0]) * np.split(x, 2, -1)[1],
        2,
    ),
    "gelu": (lambda b, x, w, c: b.gelu(x), lambda x, w, c: gelu(x), 1),
}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_as_exact_as_the_reference(name, columns, cpu, single, reference, rng):
    op, formula, factor = OPS[name]
    x = (rng.standard_normal((150, factor * columns)) * 3).astype(np.float32)
    w, c = rng.standard_normal((2, columns)).astype(np.float32)
    result = op(cpu, x, w, c)
    with np.errstate(over="ignore"):
        exact = formula(*(a.astype(np.float64) for a in (x, w, c)))
    baseline = worst(op(reference, x, w, c), exact)
    assert worst(result, exact) <= 3 * baseline + 2e-7 * np.abs(exact).max()
    # and the same bits row by row, on one thread, and from a wider array
    for t in (0, 1, 77, 149):
        assert np.array_equal(op(single, x[t : t + 1], w, c), result[t : t + 1])
    wide = np.full((150, factor * columns + 9), 5, np.float32)
    wide[:, 4 : 4 + factor * columns] = x
    assert np.array_equal(op(cpu, wide[:, 4 : 4 + factor * columns], w, c), result)


@pytest.mark.parametrize("columns", COLUMNS)
def test_add_rms_norm_is_its_two_steps(columns, cpu, rng):
    x, residual = rng.standard_normal((2, 40, columns)).astype(np.float32)
    weight = rng.standard_normal(columns).astype(np.float32)
    total = residual + x
    result = cpu.add_rms_norm(residual, x, weight, 1e-6)
    assert np.array_equal(residual, total)
    assert np.array_equal(result, cpu.rms_norm(total, weight, 1e-6))


@pytest.mark.parametrize("head_dim", [8, 20, 64])
def test_rms_norm_of_heads_in_a_fused_array(head_dim, cpu, rng):
    fused = rng.standard_normal((7, 5 * head_dim + 3)).astype(np.float32)
    weight = rng.standard_normal(head_dim).astype(np.float32)
    before = fused.copy()
    heads = fused[:, head_dim : 4 * head_dim].reshape(7, 3, head_dim)
    expected = cpu.rms_norm(np.ascontiguousarray(heads).reshape(21, head_dim), weight, 1e-6)
    view = np.lib.stride_tricks.as_strided(
        fused[:, head_dim:], (7, 3, head_dim), (fused.strides[0], 4 * head_dim, 4), writeable=True
    )
    cpu.rms_norm(view, weight, 1e-6, out=view)
    assert np.array_equal(fused[:, head_dim : 4 * head_dim].reshape(21, head_dim), expected)
    assert np.array_equal(fused[:, :head_dim], before[:, :head_dim])
    assert np.array_equal(fused[:, 4 * head_dim :], before[:, 4 * head_dim :])


def test_in_place(cpu, rng):
    x = rng.standard_normal((9, 50)).astype(np.float32)
    weight = np.ones(50, np.float32)
    for op in (lambda x, out: cpu.rms_norm(x, weight, 1e-6, out=out), lambda x, out: cpu.gelu(x, out=out)):
        expected, y = op(x, None), x.copy()
        assert op(y, y) is y
        assert np.array_equal(y, expected)


def ulps(actual, exact):
    """Distance in units of the last place of the exact value."""
    return np.abs(actual.astype(np.float64) - exact) / np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)


def test_tanh_everywhere(cpu):
    """softcap with cap 1 is tanh."""
    magnitudes = np.concatenate([np.geomspace(1e-38, 30, 40001), np.linspace(0.5, 0.75, 20001), [0.0, 1e30, np.inf]])
    x = np.concatenate([magnitudes, -magnitudes]).astype(np.float32)[None]
    y = x.copy()
    cpu.softcap(y, 1.0)
    assert ulps(y, np.tanh(x.astype(np.float64))).max() <= 2
    assert np.array_equal(np.sign(y), np.sign(x))
    nan = np.full((1, 3), np.nan, np.float32)
    cpu.softcap(nan, 1.0)
    assert np.isnan(nan).all()


def test_silu_everywhere(cpu):
    gate = np.concatenate([np.linspace(-110, 110, 60001), np.geomspace(1e-38, 1e38, 999), [0.0, np.inf]])
    gate = gate.astype(np.float32)
    x = np.concatenate([gate, np.ones_like(gate)])[None]
    with np.errstate(over="ignore"):
        exact = silu(gate.astype(np.float64))
    result = cpu.silu_mul(x)[0]
    assert np.isinf(result[-1])
    normal = gate > -87  # below, the result is subnormal or exp(-gate) overflows, whose limit is 0
    normal[-1] = False
    assert ulps(result[normal], exact[normal]).max() <= 4
    assert (np.abs(result[gate < -90]) < 1e-36).all()
    nan = np.array([[np.nan, -np.inf, 1.0, 1.0]], np.float32)
    assert np.isnan(cpu.silu_mul(nan)[0]).all()


def test_softcap(cpu, reference, rng):
    x = (rng.standard_normal((6, 100)) * 50).astype(np.float32)
    ours, theirs = x.copy(), x.copy()
    cpu.softcap(ours, 30.0)
    reference.softcap(theirs, 30.0)
    np.testing.assert_allclose(ours, theirs, rtol=3e-7, atol=1e-6)


@pytest.mark.parametrize(("head_dim", "rotary"), [(8, 8), (64, 64), (80, 32), (40, 12), (256, 256)])
def test_rope(head_dim, rotary, cpu, single, reference, rng):
    q = rng.standard_normal((40, 6, head_dim)).astype(np.float32)
    k = rng.standard_normal((40, 2, head_dim)).astype(np.float32)
    angles = rng.uniform(0, 100, (40, rotary // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    expected_q, expected_k, apart = q.copy(), k.copy(), (q[5:6].copy(), k[5:6].copy())
    reference.rope(expected_q, expected_k, cos, sin)
    single.rope(*apart, cos[5:6], sin[5:6])
    fused = np.concatenate([q.reshape(40, -1), k.reshape(40, -1), np.full((40, 7), 3, np.float32)], axis=1)
    strides = (fused.strides[0], 4 * head_dim, 4)
    fused_q = np.lib.stride_tricks.as_strided(fused, q.shape, strides, writeable=True)
    fused_k = np.lib.stride_tricks.as_strided(fused[:, 6 * head_dim :], k.shape, strides, writeable=True)
    cpu.rope(fused_q, fused_k, cos, sin)
    np.testing.assert_allclose(fused_q, expected_q, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(fused_k, expected_k, rtol=1e-6, atol=1e-6)
    assert np.array_equal(fused_q[5:6], apart[0])
    assert np.array_equal(fused_k[5:6], apart[1])
    assert (fused[:, 8 * head_dim :] == 3).all()
    for backend, expected in ((cpu, fused_q), (reference, expected_q)):  # without key heads
        alone, keys = q.copy(), k.copy()
        backend.rope(alone, keys[:, :0], cos, sin)
        assert np.array_equal(alone, expected)
        assert np.array_equal(keys, k)
