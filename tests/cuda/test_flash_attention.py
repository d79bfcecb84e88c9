"""Dense FlashAttention forward and backward against float64, within the bound of their arithmetic; and their bits."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from cuda_kernels.emulated import EmulatedRuntime
from cuda_kernels.errors import KernelArgumentError
from cuda_kernels.flash_attention import flash_attention
from cuda_kernels.flash_attention_backward import (
    flash_attention_backward,
    flash_attention_backward_scratch_nbytes,
    kernels_for_report,
)
from cuda_kernels.flash_attention_shape import BACKWARD_HEAD_DIMS, FORWARD_HEAD_DIMS

F64 = NDArray[np.float64]

NUMPY = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
EPS = 2.0**-24  # unit roundoff of float32
EXP2 = 2.0**-22  # relative error of ex2.approx, absolute error of lg2.approx
ROUNDOFF = {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8}  # of P and dS before they are multiplied
OUT_ROUNDOFF = {"f32": EPS, "f16": 2.0**-11, "bf16": 2.0**-8}
UNDERFLOW = {"f32": 2.0**-126, "f16": 2.0**-25, "bf16": 2.0**-126}  # absolute error of numbers near zero
TILE = 32  # keys of the smallest tile: how often a row's maximum may change
SECOND_ORDER = 1.05  # products of errors, which the bounds leave out


@dataclass(frozen=True)
class Inputs:
    """q, dout (N, Q, H, D) and k, v (N, K, KH, D) as stored, and what goes with them."""

    q: NDArray[Any]
    k: NDArray[Any]
    v: NDArray[Any]
    dout: NDArray[Any]
    dtype: str
    scale: float
    causal: bool

    @staticmethod
    def random(
        rng: np.random.Generator, shape: tuple[int, int, int, int, int, int], dtype: str, causal: bool, size: float = 1
    ) -> Inputs:
        N, Q, K, H, KH, D = shape

        def normal(*shape: int, size: float = 1) -> NDArray[Any]:
            return stored(size * rng.standard_normal(shape), dtype)

        q, k = normal(N, Q, H, D, size=size), normal(N, K, KH, D, size=size)
        return Inputs(q, k, normal(N, K, KH, D), normal(N, Q, H, D), dtype, 0.8 * D**-0.5, causal)

    def __getitem__(self, batch: slice) -> Inputs:
        arrays = {name: getattr(self, name)[batch] for name in ("q", "k", "v", "dout")}
        return replace(self, **arrays)

    def queries(self, rows: slice) -> Inputs:
        return replace(self, q=self.q[:, rows], dout=self.dout[:, rows])

    def values(self) -> tuple[F64, F64, F64, F64]:
        """q, k, v, dout as numbers, keys and values repeated for each query head."""
        group = self.q.shape[2] // self.k.shape[2]
        q, k, v, dout = (loaded(x, self.dtype) for x in (self.q, self.k, self.v, self.dout))
        return q, k.repeat(group, 2), v.repeat(group, 2), dout


def stored(x: NDArray[Any], dtype: str) -> NDArray[Any]:
    rounded = x.astype(NUMPY[dtype])
    return rounded if dtype == "f32" else rounded.view(np.uint16)


def loaded(x: NDArray[Any], dtype: str) -> F64:
    return x.view(NUMPY[dtype]).astype(np.float64)


# ---- what is exact


def scores_times_rows(a: F64, b: F64) -> F64:
    """(N, Q, H, D), (N, K, H, D) -> (N, H, Q, K)"""
    return a.transpose(0, 2, 1, 3) @ b.transpose(0, 2, 3, 1)


def weighted(weights: F64, x: F64) -> F64:
    """(N, H, Q, K), (N, K, H, D) -> (N, Q, H, D)"""
    return (weights @ x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)


def per_row(x: F64) -> F64:
    """(N, H, Q) -> (N, Q, H, 1)"""
    return x.transpose(0, 2, 1)[..., None]


@dataclass(frozen=True)
class Exact:
    scores: F64  # (N, H, Q, K), -inf where masked
    p: F64  # (N, H, Q, K)
    out: F64  # (N, Q, H, D)
    lse: F64  # (N, H, Q)


def exact_forward(q: F64, k: F64, v: F64, scale: float, causal: bool) -> Exact:
    Q, K = q.shape[1], k.shape[1]
    scores = scale * scores_times_rows(q, k)
    if causal:
        scores = np.where(np.arange(K) <= np.arange(Q)[:, None] + K - Q, scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0)
    p = np.exp(scores - top)
    total = p.sum(-1, keepdims=True)
    p = p / np.where(total > 0, total, 1)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    return Exact(scores, p, weighted(p, v), lse)


def exact_backward(q: F64, k: F64, v: F64, dout: F64, scale: float, causal: bool) -> tuple[F64, F64, F64]:
    """dq (N, Q, H, D), and dk, dv (N, K, H, D), not yet summed over the heads of a group."""
    exact = exact_forward(q, k, v, scale, causal)
    dp = scores_times_rows(dout, v)
    ds = exact.p * (dp - (exact.p * dp).sum(-1, keepdims=True))
    transposed = ds.swapaxes(2, 3)
    return scale * weighted(ds, k), scale * weighted(transposed, q), weighted(exact.p.swapaxes(2, 3), dout)


def summed_over_group(x: F64, kv_heads: int) -> F64:
    N, K, H, D = x.shape
    return x.reshape(N, K, kv_heads, H // kv_heads, D).sum(3)


# ---- how far float32 and 16-bit arithmetic may be from it


@dataclass(frozen=True)
class ForwardBounds:
    p: F64  # relative error of exp(score - maximum)
    out: F64
    lse: F64


def forward_bounds(inputs: Inputs, exact: Exact) -> ForwardBounds:
    q, k, v, _ = inputs.values()
    K, D = k.shape[1], q.shape[-1]
    rounding = ROUNDOFF[inputs.dtype]
    size = np.where(np.isfinite(exact.scores), np.abs(exact.scores), 0)
    largest = size.max(-1, keepdims=True)
    tiles = -(-K // TILE)
    # a dot product in any order; scale, maximum's product and subtraction; exp2 of it, and its corrections
    p = D * EPS * inputs.scale * scores_times_rows(np.abs(q), np.abs(k)) + 4 * EPS * (size + largest)
    p = p + (1 + tiles) * (EXP2 + 2 * EPS)
    total = (exact.p * p).sum(-1) + (K + tiles) * EPS  # relative error of the sum
    terms = weighted(exact.p * (p + rounding + (K + tiles) * EPS), np.abs(v))
    out = terms + np.abs(exact.out) * (per_row(total) + 4 * EPS + OUT_ROUNDOFF[inputs.dtype])
    out = out + UNDERFLOW[inputs.dtype] * (1 + np.abs(v).sum(1, keepdims=True))
    finite_lse = np.where(np.isfinite(exact.lse), exact.lse, 0)
    lse = total + EXP2 + 4 * EPS * (np.abs(finite_lse) + largest[..., 0])
    return ForwardBounds(p, SECOND_ORDER * out, SECOND_ORDER * lse)


def backward_bounds(inputs: Inputs, exact: Exact) -> tuple[F64, F64, F64]:
    q, k, v, dout = inputs.values()
    Q, K, D = q.shape[1], k.shape[1], q.shape[-1]
    kv_heads = inputs.k.shape[2]
    terms = Q * q.shape[2] // kv_heads
    rounding, underflow, scale = ROUNDOFF[inputs.dtype], UNDERFLOW[inputs.dtype], inputs.scale
    forward = forward_bounds(inputs, exact)
    finite_lse = np.where(np.isfinite(exact.lse), exact.lse, 0)
    seen = np.isfinite(exact.scores)
    p = forward.p + (forward.lse + 4 * EPS * np.abs(finite_lse))[..., None]  # relative
    dp = scores_times_rows(dout, v)
    delta = (exact.p * dp).sum(-1, keepdims=True)
    ds = exact.p * (dp - delta)
    dp_error = D * EPS * scores_times_rows(np.abs(dout), np.abs(v))
    delta_error = (np.abs(dout) * (forward.out + (D + 4) * EPS * np.abs(exact.out))).sum(-1).transpose(0, 2, 1)
    ds_error = np.abs(ds) * (p + rounding + 2 * EPS) + exact.p * (dp_error + delta_error[..., None]) * (1 + rounding)
    ds_error = ds_error + seen * (underflow + UNDERFLOW["f32"] * np.abs(dp - delta))
    p_error = exact.p * (p + rounding) + seen * underflow

    def product(error: F64, value: F64, x: F64, count: int) -> F64:
        return weighted(error + (count + 2) * EPS * np.abs(value), np.abs(x)) + underflow

    dq = scale * product(ds_error, ds, k, K)
    dk = scale * product(ds_error.swapaxes(2, 3), ds.swapaxes(2, 3), q, terms)
    dv = product(p_error.swapaxes(2, 3), exact.p.swapaxes(2, 3), dout, terms)
    bounds = dq, summed_over_group(dk, kv_heads), summed_over_group(dv, kv_heads)
    return SECOND_ORDER * bounds[0], SECOND_ORDER * bounds[1], SECOND_ORDER * bounds[2]


# ---- running the kernels


def forward(rt: EmulatedRuntime, inputs: Inputs) -> tuple[NDArray[Any], NDArray[np.float32]]:
    N, Q, H, _ = inputs.q.shape
    q, k, v = (rt.from_host(x) for x in (inputs.q, inputs.k, inputs.v))
    out, lse = rt.empty(q.shape, q.dtype), rt.empty((N, H, Q), np.float32)
    flash_attention(rt, q, k, v, out, lse, dtype=inputs.dtype, scale=inputs.scale, causal=inputs.causal)
    return rt.download(out), rt.download(lse)


def backward(
    rt: EmulatedRuntime, inputs: Inputs, out: NDArray[Any], lse: NDArray[np.float32]
) -> tuple[NDArray[np.float32], ...]:
    N, Q, H, _ = inputs.q.shape
    arrays = [rt.from_host(x) for x in (inputs.q, inputs.k, inputs.v, out, lse, inputs.dout)]
    gradients = [rt.empty(x.shape, np.float32) for x in (inputs.q, inputs.k, inputs.v)]
    scratch = rt.empty(flash_attention_backward_scratch_nbytes(N, Q, H) // 4, np.float32)
    options = {"dtype": inputs.dtype, "scale": inputs.scale, "causal": inputs.causal, "scratch": scratch}
    flash_attention_backward(rt, *arrays, *gradients, **options)
    return tuple(rt.download(x) for x in gradients)


def gradients(rt: EmulatedRuntime, inputs: Inputs) -> tuple[NDArray[np.float32], ...]:
    return backward(rt, inputs, *forward(rt, inputs))


def check_forward(rt: EmulatedRuntime, inputs: Inputs) -> None:
    q, k, v, _ = inputs.values()
    exact = exact_forward(q, k, v, inputs.scale, inputs.causal)
    bounds = forward_bounds(inputs, exact)
    out, lse = forward(rt, inputs)
    assert (np.abs(loaded(out, inputs.dtype) - exact.out) <= bounds.out).all()
    seen = np.isfinite(exact.lse)
    assert (np.abs(lse[seen] - exact.lse[seen]) <= bounds.lse[seen]).all()
    assert (lse[~seen] == -np.inf).all()
    assert not out.transpose(0, 2, 1, 3)[~seen].any()  # +0, bit for bit


def check_backward(rt: EmulatedRuntime, inputs: Inputs) -> None:
    values = inputs.values()
    exact = exact_forward(*values[:3], inputs.scale, inputs.causal)
    expected = exact_backward(*values, inputs.scale, inputs.causal)
    kv_heads = inputs.k.shape[2]
    expected = expected[0], summed_over_group(expected[1], kv_heads), summed_over_group(expected[2], kv_heads)
    found = gradients(rt, inputs)
    for name, actual, right, bound in zip(
        ("dq", "dk", "dv"), found, expected, backward_bounds(inputs, exact), strict=True
    ):
        assert (np.abs(actual - right) <= bound).all(), name
    unseen = ~np.isfinite(exact.lse)
    assert not found[0].transpose(0, 2, 1, 3)[unseen].view(np.uint32).any()


# ---- agreement

SHAPES = [  # N, Q, K, H, KH, causal
    (1, 1, 1, 1, 1, True),
    (2, 1, 65, 2, 1, True),
    (1, 63, 64, 1, 1, False),
    (1, 64, 63, 2, 1, True),
    (1, 65, 64, 1, 1, True),
    (1, 7, 67, 4, 1, False),
    (1, 67, 131, 2, 1, True),
    (1, 129, 33, 1, 1, True),
    (1, 31, 97, 1, 1, True),
    (2, 5, 1, 2, 2, True),
]
FEW_SHAPES = [(1, 1, 1, 1, 1, True), (1, 67, 131, 2, 1, True), (1, 7, 33, 4, 1, False), (2, 65, 33, 1, 1, True)]

FORWARD = [("f32", 64, SHAPES), ("f16", 64, SHAPES), ("bf16", 80, FEW_SHAPES)]
BACKWARD = [("f32", 64, FEW_SHAPES), ("bf16", 80, SHAPES)]


def cases(head_dims: tuple[int, ...], normal: list[tuple[str, int, list[Any]]]) -> list[Any]:
    """The normal ones, and every other pair of dtype and head size, which takes minutes to compile."""
    chosen = [pytest.param(t, d, shape, id=f"{t}-{d}-{shape}") for t, d, shapes in normal for shape in shapes]
    done = [(t, d) for t, d, _ in normal]
    others = [(t, d) for d in head_dims for t in NUMPY if (t, d) not in done]
    slow = [
        pytest.param(t, d, shape, id=f"{t}-{d}-{shape}", marks=pytest.mark.slow) for t, d in others for shape in SHAPES
    ]
    return chosen + slow


def case(rng: np.random.Generator, dtype: str, head_dim: int, shape: Any, size: float = 1) -> Inputs:
    *sizes, causal = shape
    return Inputs.random(rng, (*sizes, head_dim), dtype, causal, size)


@pytest.mark.parametrize("causal", [False, True])
def test_the_gradients_by_hand_are_those_of_central_differences(causal, rng):
    q, dout = rng.standard_normal((2, 2, 5, 2, 4))
    k, v = rng.standard_normal((2, 2, 3, 2, 4))
    inputs = [q, k, v]
    found = exact_backward(q, k, v, dout, 0.7, causal)
    for which in range(3):
        direction = rng.standard_normal(inputs[which].shape)
        losses = []
        for step in (1e-5, -1e-5):
            moved = [x + step * direction if i == which else x for i, x in enumerate(inputs)]
            losses.append((exact_forward(*moved, 0.7, causal).out * dout).sum())
        assert (losses[0] - losses[1]) / 2e-5 == pytest.approx((found[which] * direction).sum(), rel=1e-7)


@pytest.mark.parametrize(("dtype", "head_dim", "shape"), cases(FORWARD_HEAD_DIMS, FORWARD))
def test_forward_is_within_the_bound_of_its_arithmetic(dtype, head_dim, shape, runtime, rng):
    check_forward(runtime, case(rng, dtype, head_dim, shape))


@pytest.mark.parametrize(("dtype", "head_dim", "shape"), cases(BACKWARD_HEAD_DIMS, BACKWARD))
def test_backward_is_within_the_bound_of_its_arithmetic(dtype, head_dim, shape, runtime, rng):
    check_backward(runtime, case(rng, dtype, head_dim, shape))


@pytest.mark.parametrize(("dtype", "head_dim"), [(t, d) for t, d, _ in BACKWARD])
def test_large_scores_neither_overflow_nor_lose_the_rest(dtype, head_dim, runtime, rng):
    """Scores in the hundreds: exp of one of them would be infinite."""
    inputs = case(rng, dtype, head_dim, (1, 20, 70, 1, 1, True), size=15)
    check_forward(runtime, inputs)
    check_backward(runtime, inputs)


# ---- bits


def bits(arrays: tuple[NDArray[Any], ...]) -> list[bytes]:
    return [np.ascontiguousarray(x).tobytes() for x in arrays]


@pytest.mark.parametrize(("dtype", "head_dim"), [(t, d) for t, d, _ in BACKWARD])
class TestSameBits:
    def test_alone_and_in_a_batch(self, dtype, head_dim, runtime, rng):
        both = case(rng, dtype, head_dim, (2, 5, 35, 2, 1, True))
        together = forward(runtime, both)
        together_gradients = backward(runtime, both, *together)
        for n in (slice(0, 1), slice(1, 2)):
            alone = forward(runtime, both[n])
            assert bits(alone) == bits(tuple(x[n] for x in together))
            assert bits(backward(runtime, both[n], *alone)) == bits(tuple(x[n] for x in together_gradients))

    def test_wherever_in_its_tile_a_query_is(self, dtype, head_dim, runtime, rng):
        """The last queries alone see what they saw among all."""
        inputs = case(rng, dtype, head_dim, (1, 70, 70, 1, 1, True))
        out, lse = forward(runtime, inputs)
        dq, _, _ = backward(runtime, inputs, out, lse)
        for first in (1, 69):
            chunk = inputs.queries(slice(first, None))
            expected = out[:, first:], lse[:, :, first:]
            assert bits(forward(runtime, chunk)) == bits(expected)
            assert bits(backward(runtime, chunk, *expected)[:1]) == bits((dq[:, first:],))

    def test_keys_after_the_last_query_do_not_matter(self, dtype, head_dim, runtime, rng):
        """A prefix gives the same rows, though its last tile is cut short."""
        inputs = case(rng, dtype, head_dim, (1, 70, 70, 1, 1, True))
        out, lse = forward(runtime, inputs)
        for length in (1, 31, 64, 69):
            cut = replace(inputs.queries(slice(length)), k=inputs.k[:, :length], v=inputs.v[:, :length])
            assert bits(forward(runtime, cut)) == bits((out[:, :length], lse[:, :, :length]))

    def test_shared_heads_are_repeated_heads(self, dtype, head_dim, runtime, rng):
        shared = case(rng, dtype, head_dim, (1, 5, 35, 4, 2, False))
        repeated = replace(shared, k=shared.k.repeat(2, 2), v=shared.v.repeat(2, 2))
        result = forward(runtime, shared)
        assert bits(result) == bits(forward(runtime, repeated))
        assert bits(backward(runtime, shared, *result)[:1]) == bits(backward(runtime, repeated, *result)[:1])


def test_backward_adds_in_a_fixed_order(compiler):
    """No atomics: what runs first changes no sum."""
    for dtype, head_dim, _ in BACKWARD:
        names = {f"flash_attention_{name}_{dtype}_d{head_dim}" for name in ("dq", "dkv", "statistics")}
        kernels = [kernel for kernel in kernels_for_report() if kernel.name in names]
        assert {kernel.name for kernel in kernels} == names
        for kernel in kernels:
            assert not re.search(r"\b(atom|red)\.", compiler.ptx(kernel))


@pytest.mark.parametrize(("dtype", "head_dim"), [(t, d) for t, d, _ in BACKWARD])
def test_keys_that_no_query_of_a_tile_sees_are_not_read(dtype, head_dim, runtime, rng):
    """NaN in the keys after those of the first 64 queries reaches none of them, forward or backward."""
    inputs = case(rng, dtype, head_dim, (1, 70, 75, 1, 1, True))
    k, v = inputs.k.copy(), inputs.v.copy()
    k[:, 69:] = v[:, 69:] = stored(np.array(np.nan), dtype)
    poisoned = replace(inputs, k=k, v=v)
    out, lse = forward(runtime, inputs)
    poisoned_out, poisoned_lse = forward(runtime, poisoned)
    assert bits((out[:, :64], lse[:, :, :64])) == bits((poisoned_out[:, :64], poisoned_lse[:, :, :64]))
    assert np.isnan(loaded(poisoned_out, dtype)[:, 64:]).all()
    dq, _, _ = backward(runtime, inputs, out, lse)
    poisoned_dq, _, _ = backward(runtime, poisoned, out, lse)
    assert bits((dq[:, :64],)) == bits((poisoned_dq[:, :64],))


# ---- arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "f64"}, "f32, f16 or bf16"),
        ({"dtype": "f16"}, "must be uint16"),
        ({"scale": 0.0}, "scale must be above 0"),
        ({"q": (1, 3, 2, 72), "k": (1, 3, 2, 72), "v": (1, 3, 2, 72)}, "head size 72"),
        ({"k": (1, 3, 2, 80)}, "does not go with"),
        ({"v": (1, 4, 2, 64)}, "v must have the shape"),
        ({"q": (1, 3, 3, 64)}, "cannot share"),
        ({"q": (1, 0, 2, 64)}, "empty"),
        ({"lse": (1, 3, 2)}, "lse must have the shape"),
        ({"out": (1, 3, 2, 80)}, "out must have the shape"),
    ],
)
def test_what_forward_cannot_take_is_refused(change, message, runtime):
    shapes = dict.fromkeys(("q", "k", "v", "out"), (1, 3, 2, 64)) | {"lse": (1, 2, 3)}
    options = {"dtype": "f32", "scale": 1.0, "causal": True}
    for name, value in change.items():
        (shapes if name in shapes else options)[name] = value
    arrays = [runtime.empty(shape, np.float32) for shape in shapes.values()]
    with pytest.raises(KernelArgumentError, match=message):
        flash_attention(runtime, *arrays, **options)


def test_views_that_kernels_cannot_address_are_refused(runtime):
    wide = runtime.empty((1, 3, 2, 128), np.float32)
    flat = runtime.empty(1 + 3 * 2 * 64, np.float32)
    q, out, lse = runtime.empty((1, 3, 2, 64), np.float32), runtime.empty((1, 3, 2, 64), np.float32), None
    for k, message in ((wide[..., :64], "C-contiguous"), (flat[1:].reshape(1, 3, 2, 64), "multiple of 16 bytes")):
        with pytest.raises(KernelArgumentError, match=message):
            flash_attention(runtime, q, k, k, out, lse, dtype="f32", scale=1.0, causal=True)


@pytest.mark.parametrize(
    ("head_dim", "floats", "message"), [(256, 256, "head size 256"), (64, 255, "scratch needs 256")]
)
def test_what_backward_cannot_take_is_refused(head_dim, floats, message, runtime):
    x = runtime.empty((1, 3, 2, head_dim), np.float32)
    lse, scratch = runtime.empty((1, 2, 3), np.float32), runtime.empty(floats, np.float32)
    with pytest.raises(KernelArgumentError, match=message):
        flash_attention_backward(
            runtime, x, x, x, x, lse, x, x, x, x, dtype="f32", scale=1.0, causal=True, scratch=scratch
        )
