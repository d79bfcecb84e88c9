"""Norms, rotary embedding, activations, sums and gathers over rows, on the emulated GPU, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cuda_kernels import activations, elementwise, norms, rope
from cuda_kernels.activations import gelu, gelu_mul, silu_mul, softcap
from cuda_kernels.elementwise import add, scale
from cuda_kernels.emulated import EmulatedRuntime
from cuda_kernels.errors import KernelArgumentError
from cuda_kernels.gather import gather_rows
from cuda_kernels.norms import add_rms_norm, layer_norm, rms_norm
from cuda_kernels.rope import rope as apply_rope, rotate_into
from cuda_kernels.views import aligned16, rows_of, strides_of

F32 = NDArray[np.float32]
SIZES = (1, 31, 32, 33, 34, 127, 576, 1000, 1536, 5000)
U = 2.0**-24  # unit roundoff
EPS = 1e-5


def values(rng: np.random.Generator, *shape: int) -> F32:
    return (rng.standard_normal(shape) * 2 + 0.3).astype(np.float32)


def placed(rt: EmulatedRuntime, array: F32, gap: int) -> Any:
    """The array on the device, with `gap` elements of NaN after every row: a multiple of 4 keeps rows aligned."""
    buffer = rt.from_host(np.full((*array.shape[:-1], array.shape[-1] + gap), np.nan, np.float32))
    view = buffer[..., : array.shape[-1]]
    view[...] = array
    return view


def fetched(view: Any, gap: int) -> F32:
    """The contents of a placed array, whose gaps nothing has written."""
    whole = np.lib.stride_tricks.as_strided(view, (*view.shape[:-1], view.shape[-1] + gap), view.strides)
    assert np.isnan(whole[..., view.shape[-1] :]).all()
    return np.array(view)


def gap_of(size: int) -> int:
    """Keeps 16-byte alignment where the size has it."""
    return 4 if size % 4 == 0 else 3


def bits(array: Any) -> NDArray[np.uint32]:
    return np.ascontiguousarray(array).view(np.uint32)


def assert_same_bits(a: Any, b: Any) -> None:
    np.testing.assert_array_equal(bits(a), bits(b))


# ---- norms


def sum_depth(size: int) -> int:
    """Additions on the longest way through the sum of a row."""
    threads = norms.row_threads(size)
    return -(-size // (4 * threads)) + 2 + 5 + (0 if threads == 32 else 5)


def run_rms(rt: EmulatedRuntime, x: F32, weight: F32, gap: int = 0) -> F32:
    out = placed(rt, np.zeros_like(x), gap)
    rms_norm(rt, placed(rt, x, gap), rt.from_host(weight), EPS, out)
    return fetched(out, gap)


def run_layer_norm(rt: EmulatedRuntime, x: F32, weight: F32, gap: int = 0) -> F32:
    out = placed(rt, np.zeros_like(x), gap)
    layer_norm(rt, placed(rt, x, gap), rt.from_host(weight), rt.from_host(weight[::-1].copy()), EPS, out)
    return fetched(out, gap)


def run_add_rms(rt: EmulatedRuntime, x: F32, weight: F32, gap: int = 0) -> F32:
    out = placed(rt, np.zeros_like(x), gap)
    add_rms_norm(rt, placed(rt, x, gap), placed(rt, x[:, ::-1].copy(), gap), rt.from_host(weight), EPS, out)
    return fetched(out, gap)


NORMS = {"rms_norm": run_rms, "layer_norm": run_layer_norm, "add_rms_norm": run_add_rms}


@pytest.mark.parametrize("size", SIZES)
def test_rms_norm_is_within_the_bound_of_its_sum(runtime: EmulatedRuntime, rng: np.random.Generator, size: int) -> None:
    x, weight = values(rng, 5, size), values(rng, size)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPS) * weight
    bound = (sum_depth(size) / 2 + 6) * U * np.abs(expected)
    assert (np.abs(run_rms(runtime, x, weight, gap_of(size)) - expected) <= bound).all()


@pytest.mark.parametrize("size", SIZES)
def test_layer_norm_is_within_the_bound_of_its_sums(
    runtime: EmulatedRuntime, rng: np.random.Generator, size: int
) -> None:
    x, weight = values(rng, 3, size), values(rng, size)
    bias, wide, depth = weight[::-1].astype(np.float64), x.astype(np.float64), sum_depth(size) + 1
    centred = wide - wide.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    inverse = 1 / np.sqrt(variance + EPS)
    expected = centred * inverse * weight + bias
    mean_error = depth * U * np.abs(wide).mean(-1, keepdims=True)
    centred_error = mean_error + U * np.abs(centred)
    variance_error = (
        depth * U * variance + 2 * (np.abs(centred) * centred_error).mean(-1, keepdims=True) + mean_error**2
    )
    inverse_error = variance_error / (variance + EPS) / 2 + 3 * U
    bound = np.abs(weight * inverse) * (centred_error + np.abs(centred) * (inverse_error + 2 * U)) + U * np.abs(
        expected
    )
    assert (np.abs(run_layer_norm(runtime, x, weight, gap_of(size)) - expected) <= bound * (1 + 1e-4)).all()


@pytest.mark.parametrize("size", SIZES)
def test_add_rms_norm_has_the_bits_of_its_two_steps(
    runtime: EmulatedRuntime, rng: np.random.Generator, size: int
) -> None:
    x, y, weight = values(rng, 3, size), values(rng, 3, size), runtime.from_host(values(rng, size))
    residual, apart = placed(runtime, x, gap_of(size)), placed(runtime, x, gap_of(size))
    other, out, out_apart = placed(runtime, y, gap_of(size)), runtime.from_host(x), runtime.from_host(x)
    add_rms_norm(runtime, residual, other, weight, EPS, out)
    add(runtime, apart, other)
    rms_norm(runtime, apart, weight, EPS, out_apart)
    assert_same_bits(residual, x + y)
    assert_same_bits(residual, apart)
    assert_same_bits(out, out_apart)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("size", [33, 64, 576])
def test_a_normalised_row_has_the_same_bits_alone_among_others_and_unaligned(
    runtime: EmulatedRuntime, rng: np.random.Generator, name: str, size: int
) -> None:
    run, x, weight = NORMS[name], values(rng, 7, size), values(rng, size)
    together = run(runtime, x, weight)
    for row in (0, 3, 6):
        assert_same_bits(run(runtime, x[row : row + 1], weight)[0], together[row])
    assert_same_bits(run(runtime, x, weight, gap=1), together)
    x[3, size // 2] = np.nan
    poisoned = run(runtime, x, weight)
    assert np.isnan(poisoned[3]).all()
    others = [0, 1, 2, 4, 5, 6]
    assert_same_bits(poisoned[others], together[others])


@pytest.mark.parametrize("size", [17, 64, 516])
def test_a_head_is_normalised_through_any_strides_and_in_place(
    runtime: EmulatedRuntime, rng: np.random.Generator, size: int
) -> None:
    T, H = 3, 5
    x, weight = values(rng, T, H, size), values(rng, size)
    expected = run_rms(runtime, x.reshape(T * H, size), weight).reshape(T, H, size)
    fused = runtime.from_host(np.full((T, 2 * H + 1, size), np.nan, np.float32))  # queries among keys and values
    view = fused[:, 1 : H + 1]
    view[...] = x
    out = runtime.empty((T, H, size), np.float32)
    rms_norm(runtime, view, runtime.from_host(weight), EPS, out)
    assert_same_bits(out, expected)
    rms_norm(runtime, view, runtime.from_host(weight), EPS, view)
    assert_same_bits(view, expected)
    assert np.isnan(fused[:, 0]).all() and np.isnan(fused[:, H + 1 :]).all()


@pytest.mark.parametrize("size", [40, 516])
def test_layer_norm_in_place(runtime: EmulatedRuntime, rng: np.random.Generator, size: int) -> None:
    x, weight = values(rng, 2, size), values(rng, size)
    expected, x_device = run_layer_norm(runtime, x, weight), runtime.from_host(x)
    layer_norm(runtime, x_device, runtime.from_host(weight), runtime.from_host(weight[::-1].copy()), EPS, x_device)
    assert_same_bits(x_device, expected)


# ---- rotary embedding


def rotated(x: F32, cos: F32, sin: F32) -> F32:
    half, result = cos.shape[1], x.copy()
    first, second = x[..., :half], x[..., half : 2 * half]
    result[..., :half] = first * cos[:, None] - second * sin[:, None]
    result[..., half : 2 * half] = second * cos[:, None] + first * sin[:, None]
    return result


@pytest.mark.parametrize(
    ("H", "KH", "D", "R"), [(4, 2, 64, 64), (3, 1, 80, 32), (5, 0, 8, 8), (2, 2, 21, 18), (9, 3, 40, 40)]
)
def test_rope_rotates_views_in_place_with_the_bits_of_separate_roundings(
    runtime: EmulatedRuntime, rng: np.random.Generator, H: int, KH: int, D: int, R: int
) -> None:
    T = 3
    fused = values(rng, T, H + 2 * KH, D)
    angles = rng.uniform(0, 100, (T, R // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    expected = fused.copy()
    expected[:, : H + KH] = rotated(fused[:, : H + KH], cos, sin)
    device = runtime.from_host(fused)
    apply_rope(runtime, device[:, :H], device[:, H : H + KH], runtime.from_host(cos), runtime.from_host(sin))
    assert_same_bits(device, expected)

    source, out = runtime.from_host(fused)[:, :H], runtime.empty((T, H, D), np.float32)
    rotate_into(runtime, source, runtime.from_host(cos), runtime.from_host(sin), out)
    assert_same_bits(out, expected[:, :H])
    assert_same_bits(source, fused[:, :H])


# ---- activations


def extremes() -> F32:
    ordinary = np.concatenate([np.linspace(-100, 100, 301), np.linspace(-1, 1, 113), np.geomspace(1e-38, 1e38, 77)])
    special = [0.0, -0.0, 88.0, -88.0, -87.5, 89.0, -3e38, 3e38, 0.5625, -0.5625, 1e-44]
    x = np.concatenate([ordinary, special]).astype(np.float32)
    return np.concatenate([x, -x])[None]


def sigmoid64(x: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def gelu_inner(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)


def unit_errors(
    got: Any, expected: NDArray[np.float64], x: NDArray[np.float64], cap: float = 1.0
) -> NDArray[np.float64]:
    """Errors relative to the results, in 2 ** -23, beyond what is lost where subnormal numbers come up on the way."""
    lost = np.abs(x) * 2.0**-125 + cap * 2.0**-149
    return np.maximum(np.abs(np.asarray(got, np.float64) - expected) - lost, 0) / (np.abs(expected) + 1e-300) * 2**23


@pytest.mark.parametrize("gap", [0, 1])
def test_silu_mul_and_gelu_mul_are_within_their_stated_errors(runtime: EmulatedRuntime, gap: int) -> None:
    gate = extremes()
    wide, up = gate.astype(np.float64), np.float32(0.7)
    both = placed(runtime, np.concatenate([gate, np.full_like(gate, up)], axis=1), gap)
    out = placed(runtime, gate, gap)
    silu_mul(runtime, both, out)
    assert unit_errors(out, wide * sigmoid64(wide) * up, wide).max() <= 7
    gelu_mul(runtime, both, out)
    z = gelu_inner(wide)
    assert (unit_errors(out, wide * sigmoid64(2 * z) * up, wide) <= 7 + 4 * np.abs(z)).all()


@pytest.mark.parametrize("size", [1, 31, 576, 1033])
def test_gelu_and_softcap_in_place(runtime: EmulatedRuntime, rng: np.random.Generator, size: int) -> None:
    x = values(rng, 3, size) * 4
    x[:, : extremes().size] = extremes()[:, :size]
    wide = x.astype(np.float64)
    device = placed(runtime, x, gap_of(size))
    gelu(runtime, device, device)
    z = gelu_inner(wide)
    assert (unit_errors(device, wide * sigmoid64(2 * z), wide) <= 6 + 4 * np.abs(z)).all()
    device = placed(runtime, x, gap_of(size))
    softcap(runtime, device, 30.0)
    assert unit_errors(device, 30 * np.tanh(wide / 30), wide, cap=30).max() <= 6


def test_activations_of_what_is_not_finite(runtime: EmulatedRuntime) -> None:
    x = np.array([[np.nan, np.inf, -np.inf, 1.0]], np.float32)
    device = runtime.from_host(x)
    softcap(runtime, device, 5.0)
    np.testing.assert_array_equal(device[0, :3], np.array([np.nan, 5, -5], np.float32))
    assert np.isfinite(device[0, 3])
    device = runtime.from_host(x)
    gelu(runtime, device, device)
    assert np.isnan(device[0, 0]) and device[0, 1] == np.inf and np.isfinite(device[0, 3])


# ---- sums, multiples, gathers


@pytest.mark.parametrize("size", SIZES)
def test_add_and_scale_round_once(runtime: EmulatedRuntime, rng: np.random.Generator, size: int) -> None:
    x, y = values(rng, 3, size), values(rng, 3, size)
    device = placed(runtime, x, gap_of(size))
    add(runtime, device, placed(runtime, y, gap_of(size)))
    assert_same_bits(device, x + y)
    scale(runtime, device, 0.3)
    assert_same_bits(fetched(device, gap_of(size)), (x + y) * np.float32(0.3))


@pytest.mark.parametrize("size", [1, 34, 576, 1536])
def test_gather_rows_takes_rows_in_any_order_and_zeros_for_padding(
    runtime: EmulatedRuntime, rng: np.random.Generator, size: int
) -> None:
    x = values(rng, 5, size)
    x[1] = np.nan
    out = placed(runtime, np.zeros((4, size), np.float32), gap_of(size))
    rows = np.array([4, -1, 0, 4], np.int32)
    gather_rows(runtime, placed(runtime, x, gap_of(size)), runtime.from_host(rows), out)
    expected = x[rows]
    expected[1] = 0
    assert_same_bits(fetched(out, gap_of(size)), expected)


def test_nothing_is_launched_for_no_rows(runtime: EmulatedRuntime) -> None:
    none = runtime.empty((0, 8), np.float32)
    weight = runtime.from_host(np.ones(8, np.float32))
    before = {name: total.launches for name, total in runtime.totals.items()}
    rms_norm(runtime, none, weight, EPS, none)
    layer_norm(runtime, none, weight, weight, EPS, none)
    gelu(runtime, none, none)
    add(runtime, none, none)
    gather_rows(runtime, none, runtime.empty(0, np.int32), none)
    heads, angles = runtime.empty((0, 2, 8), np.float32), runtime.empty((0, 4), np.float32)
    apply_rope(runtime, heads, heads, angles, angles)
    assert {name: total.launches for name, total in runtime.totals.items()} == before


# ---- arguments


def _refused(rt: EmulatedRuntime) -> dict[str, Callable[[], None]]:
    def f32(*shape: int) -> Any:
        return rt.empty(shape, np.float32)

    return {
        "weight has shape": lambda: rms_norm(rt, f32(2, 8), f32(7), EPS, f32(2, 8)),
        "out has shape": lambda: layer_norm(rt, f32(2, 8), f32(8), f32(8), EPS, f32(3, 8)),
        "x is float64": lambda: add(rt, rt.empty((2, 8), np.float64), f32(2, 8)),
        "last axis of x": lambda: scale(rt, f32(8, 2).T, 2.0),
        "evenly spaced": lambda: scale(rt, f32(3, 4, 8)[:, :2], 2.0),
        "has no halves": lambda: silu_mul(rt, f32(2, 7), f32(2, 3)),
        "a cap of": lambda: softcap(rt, f32(2, 8), 0.0),
        "not finite": lambda: scale(rt, f32(2, 8), float("inf")),
        "5 angles for q": lambda: apply_rope(rt, f32(2, 1, 8), f32(2, 1, 8), f32(2, 5), f32(2, 5)),
        "spaced alike": lambda: apply_rope(rt, f32(2, 1, 8), f32(2, 1, 8), f32(2, 4), f32(2, 8)[:, :4]),
        "rows is int64": lambda: gather_rows(rt, f32(2, 8), rt.empty(2, np.int64), f32(2, 8)),
        "no elements": lambda: rms_norm(rt, f32(2, 0), f32(0), EPS, f32(2, 0)),
    }


def test_launchers_refuse_what_does_not_fit(runtime: EmulatedRuntime) -> None:
    for message, call in _refused(runtime).items():
        with pytest.raises(KernelArgumentError, match=message):
            call()


def test_views_know_their_rows() -> None:
    base = np.zeros((3, 4, 16), np.float32)
    assert rows_of(base[..., :8], "x") == (12, 8, 16)
    assert strides_of(base[:1, :, :8], "x") == (64, 16, 1)
    assert not aligned16(base[..., :7])


def test_each_family_lists_its_kernels_once() -> None:
    kernels = [*norms.kernels(), *rope.kernels(), *activations.kernels(), *elementwise.kernels()]
    assert len({kernel.name for kernel in kernels}) == len(kernels)
