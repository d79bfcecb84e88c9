"""Activations as digits, and products in integers: against numpy's integers, and against each other."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from tests.kernels.conftest import linear_backend
from tests.kernels.kernel_cases import oracle_values, random_tensor
from tests.models.quantised_files import make
from tinyllm.backends.cpu import CpuBackend
from tinyllm.backends.cpu_kernels import integer_dot
from tinyllm.backends.cpu_kernels.digits import (
    TILE_ROWS,
    matrix_step_nbytes,
    quantise_for_matrix,
    quantise_kernel,
    record_nbytes,
    row_nbytes,
    scale_at,
)
from tinyllm.backends.cpu_kernels.formats import PACKED
from tinyllm.backends.cpu_kernels.jit import Kernel
from tinyllm.backends.cpu_kernels.simd import V32, emit_load, i64, instruction, pointer, types
from tinyllm.models.registry import load_model, model_config
from weights import open_checkpoint
from weights.quants import FORMATS

QUANTISED = tuple(name for name, form in PACKED.items() if not form.dense)


def quantise(x, digits, step, offset=0):
    """What the kernel makes of x (T, K): digits (T, steps, digits, step), scales, sums, first sums."""
    backend = CpuBackend(1)
    T, K = x.shape
    steps, stride = K // step, row_nbytes(digits, step, K)
    out = np.zeros((T, stride), np.uint8)
    size, at = record_nbytes(digits, step), scale_at(digits, step)
    places = TILE_ROWS * stride, stride, size
    arguments = x.ctypes.data, x.strides[0], steps, offset, out.ctypes.data, *places
    backend._run(quantise_kernel(digits, step, offset != 0), T * steps, 0, *arguments)
    records = np.ascontiguousarray(out[:, : steps * size]).reshape(T, steps, size)
    values = np.ascontiguousarray(records[..., :at]).view(np.int8).reshape(T, steps, digits, step)
    floats = np.ascontiguousarray(records[..., at : at + 8]).view(np.float32)
    first = np.ascontiguousarray(records[..., at + 8 : at + 8 + 4 * digits]).view(np.int32)
    return values, floats[..., 0], floats[..., 1], first


def blocks_of_every_kind(rng, step):
    """(T, 6 * step): ordinary, tiny, huge, sparse and awkward blocks."""
    x = rng.standard_normal((40, 6, step)).astype(np.float32)
    x[1] *= np.float32(1e-30)
    x[2] *= np.float32(1e30)
    x[3] = 0
    x[4, :, 1:] = 0
    x[5] = np.float32(2.0**-140)  # subnormal
    x[6] = np.exp2(rng.uniform(-120, 120, (6, step))).astype(np.float32)
    x[7] = np.float32(3.4e38)
    x[8] = -x[7]
    top = np.float32(2.0) - np.float32(2.0**-23)  # the largest mantissa
    x[9:12] = top * np.exp2(np.arange(-1, 2)).astype(np.float32)[:, None, None]
    for i, mantissa in enumerate(np.linspace(1.97, 2.0, 20, endpoint=False)):  # where the exponent is chosen
        x[12 + i, :, 0] = np.float32(mantissa * 4)
    return x.reshape(40, 6 * step)


@pytest.mark.parametrize("step", [16, 32])
def test_three_digits_hold_a_float(step, rng):
    x = blocks_of_every_kind(rng, step)
    digits, scales, sums, first = quantise(x, 3, step, offset=8)
    blocks = x.reshape(len(x), -1, step).astype(np.float64)
    places = np.array([65536.0, 256.0, 1.0])[:, None]
    integers = (digits * places).sum(axis=2)
    top = np.abs(blocks).max(axis=2, keepdims=True)
    error = np.abs(integers * scales[..., None].astype(np.float64) - blocks)
    normal = top >= 2.0**-100
    assert (error <= top * 2.0**-22.98).all(where=normal)
    assert (error <= 2.0**-126).all(where=~normal)
    mantissas, _ = np.frexp(scales)
    assert (mantissas == 0.5).all()  # powers of two: dividing by them loses nothing
    assert np.abs(integers).max() <= 127 * 65536
    assert (first == -8 * digits.astype(np.int64).sum(axis=3)).all()
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(sums, (integers.sum(axis=2).astype(np.float32) * scales))


@pytest.mark.parametrize("step", [16, 32])
def test_one_digit_has_a_step_of_the_largest_over_127(step, rng):
    x = blocks_of_every_kind(rng, step)
    digits, scales, sums, first = quantise(x, 1, step, offset=3)
    blocks = x.reshape(len(x), -1, step).astype(np.float64)
    top = np.abs(blocks).max(axis=2)
    normal = top >= 2.0**-100
    np.testing.assert_allclose(scales[normal], top[normal] / 127, rtol=1e-6)
    assert (scales[~normal] == 0).all()
    error = np.abs(digits[:, :, 0] * scales[..., None].astype(np.float64) - blocks)
    assert (error <= 0.5001 * top[..., None] / 127 + 2.0**-100).all()
    assert np.abs(digits).max() <= 127
    assert (first == -3 * digits.astype(np.int64).sum(axis=3)).all()
    with np.errstate(over="ignore"):
        totals = digits[:, :, 0].sum(axis=2, dtype=np.int32).astype(np.float32)
        np.testing.assert_array_equal(sums, totals * scales)


def matrix_tiles(x, digits, offset):
    """What the kernel makes of x (T, K) for the matrix unit: (tiles, steps, bytes)."""
    T, steps = len(x), x.shape[1] // 32
    out = np.zeros((-(-T // 16), steps, matrix_step_nbytes(digits)), np.uint8)
    arguments = x.ctypes.data, x.strides[0], steps, offset, out.ctypes.data
    CpuBackend(1)._run(quantise_for_matrix(digits, offset != 0), T * steps, 0, *arguments)
    return out


def test_four_digits_are_the_same_integers(rng):
    """The form for the matrix unit: two halves of two digits each, none of which overflows."""
    x = blocks_of_every_kind(rng, 32)
    T, steps = len(x), x.shape[1] // 32
    out = matrix_tiles(x, 3, offset=5)
    digits = np.ascontiguousarray(out[..., : 128 * 16]).view(np.int8).reshape(-1, steps, 16, 2, 2, 32)
    halves = 16 * digits[..., 0, :].astype(np.int64) + digits[..., 1, :]
    integers = (4096 * halves[..., 0, :] + halves[..., 1, :]).transpose(0, 2, 1, 3).reshape(-1, steps, 32)[:T]
    three, scales, sums, _ = quantise(x, 3, 32)
    assert np.array_equal(integers, (three * np.array([65536, 256, 1])[:, None]).sum(axis=2))
    assert np.abs(digits[..., 1, :]).max() <= 8
    facts = np.ascontiguousarray(out[..., 128 * 16 :]).reshape(-1, steps, 16, 16).transpose(0, 2, 1, 3)
    facts = np.ascontiguousarray(facts.reshape(-1, steps, 16)[:T])
    assert facts[..., :4].tobytes() == scales.tobytes()
    assert facts[..., 4:8].tobytes() == sums.tobytes()
    first = np.ascontiguousarray(facts[..., 8:]).view(np.int32)
    assert np.array_equal(first, -5 * halves.sum(axis=-1).transpose(0, 2, 1, 3).reshape(-1, steps, 2)[:T])


def test_one_digit_for_the_matrix_unit_is_the_same(rng):
    x = blocks_of_every_kind(rng, 32)
    T, steps = len(x), x.shape[1] // 32
    out = matrix_tiles(x, 1, offset=3)
    by_rows = [
        np.ascontiguousarray(part).reshape(-1, steps, 16, n).transpose(0, 2, 1, 3).reshape(-1, steps, n)[:T]
        for part, n in ((out[..., : 32 * 16], 32), (out[..., 32 * 16 :], 16))
    ]
    digits, scales, sums, first = quantise(x, 1, 32, offset=3)
    assert np.array_equal(by_rows[0].view(np.int8), digits[:, :, 0])
    for part, expected in zip(np.split(by_rows[1][..., :12], 3, axis=-1), (scales, sums, first), strict=True):
        assert part.tobytes() == np.ascontiguousarray(expected).tobytes()


@pytest.mark.parametrize("digits", [1, 3])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_makes_its_block_nan(digits, bad, rng):
    x = rng.standard_normal((2, 96)).astype(np.float32)
    x[1, 40] = bad
    _, scales, sums, _ = quantise(x, digits, 32)
    assert np.isfinite(scales[0]).all()
    assert np.isnan(scales[1]).tolist() == np.isnan(sums[1]).tolist() == [False, True, False]


# ---- the product of bytes

VARIANTS = {
    "vnni-512": {"_VNNI_512": True},
    "vnni-256": {"_VNNI_512": False, "_VNNI_256": True},
    "avx2": {"_VNNI_512": False, "_VNNI_256": False, "_AVX2": True},
    "anywhere": {"_VNNI_512": False, "_VNNI_256": False, "_AVX2": False},
}
FEATURES = {"vnni-512": "_VNNI_512", "vnni-256": "_VNNI_256", "avx2": "_AVX2"}


def dot4_kernel(variant, bits):
    @instruction(types.void, *(i64,) * 3)
    def dot4(b, total, codes, x):
        sums = emit_load(b, total, V32)
        result = integer_dot.emit_dot4(b, sums, emit_load(b, codes, V32), emit_load(b, x, V32), bits)
        b.store(result, pointer(b, total, V32), align=1)

    def run(worker: int, begin: int, end: int, total: int, codes: int, x: int) -> None:
        for task in range(begin, end):
            dot4(total + 64 * task, codes + 64 * task, x + 64 * task)

    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    return Kernel(f"test_dot4-{variant}-{bits}-{source}", run)


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_way_of_multiplying_bytes_is_exact(variant, bits, monkeypatch, rng):
    if variant in FEATURES and not getattr(integer_dot, FEATURES[variant]):
        pytest.skip(f"this CPU has no {variant}")
    for name, value in VARIANTS[variant].items():
        monkeypatch.setattr(integer_dot, name, value)
    codes = rng.integers(0, 1 << bits, (300, 16, 4)).astype(np.uint8)
    x = rng.integers(-128, 128, (300, 16, 4)).astype(np.int8)
    codes[:4], x[:2], x[2:4] = (1 << bits) - 1, 127, -128  # where sums of pairs would overflow
    total = rng.integers(-(1 << 27), 1 << 27, (300, 16)).astype(np.int32)
    expected = total + (codes.astype(np.int32) * x).sum(axis=2, dtype=np.int32)
    CpuBackend(1)._run(dot4_kernel(variant, bits), 300, 0, total.ctypes.data, codes.ctypes.data, x.ctypes.data)
    assert np.array_equal(total, expected)


# ---- the products


@pytest.mark.parametrize("dtype", QUANTISED)
def test_one_digit_multiplies_the_rounded_activations(dtype, rng):
    """The error is that of rounding x alone: next to none against a product with what the digits stand for."""
    backend = linear_backend("int8", 2)
    step, shape = PACKED[dtype].step, (50, 512)
    tensor = random_tensor(rng, dtype, shape)
    weight = backend.load_matrix([tensor])
    assert weight.digits == 1
    bias = rng.standard_normal(50).astype(np.float32)
    values = oracle_values(tensor).astype(np.float64)
    for rows in (1, 3, 9, 40):
        x = rng.standard_normal((rows, 512)).astype(np.float32)
        digits, scales, _, _ = quantise(x, 1, step)
        rounded = (digits[:, :, 0] * scales[..., None].astype(np.float64)).reshape(x.shape)
        exact = rounded @ values.T + bias
        found = backend.linear(x, weight, bias)
        assert np.abs(found - exact).max() < 1e-5 * np.abs(exact).max()
        assert 1e-4 < np.abs(found - (x @ values.T + bias)).max() / np.abs(exact).max() < 0.05


@pytest.mark.parametrize("shape", [(83, 768), (600, 96)])  # one group of outputs a task, and several; 3 steps
@pytest.mark.parametrize("form", ["digits", "int8"])
@pytest.mark.parametrize("dtype", QUANTISED)
def test_vectors_and_the_matrix_unit_give_the_same_bits(dtype, form, shape, rng):
    vectors, matrix = linear_backend(form, 2), linear_backend("matrix" if form == "digits" else form, 2)
    vectors.matrix_unit = False
    shape = (shape[0], 256) if dtype.endswith("K") and shape[1] == 96 else shape
    tensor = random_tensor(rng, dtype, shape)
    for rows in (9, 33, 70):
        x = rng.standard_normal((rows, shape[1])).astype(np.float32)
        results = [backend.linear(x, backend.load_matrix([tensor])).tobytes() for backend in (vectors, matrix)]
        assert results[0] == results[1]


def test_three_digits_are_as_exact_as_float32(rng):
    """Root mean square errors against float64, over blocks with and without outliers."""
    digits, floats = linear_backend("digits", 2), linear_backend("float32", 2)
    for dtype in QUANTISED:
        tensor = random_tensor(rng, dtype, (64, 1536))
        values = oracle_values(tensor).astype(np.float64)
        weights = digits.load_matrix([tensor]), floats.load_matrix([tensor])
        for outliers in (1, 300):
            x = rng.standard_normal((20, 1536)).astype(np.float32)
            x[:, ::100] *= outliers
            exact = x.astype(np.float64) @ values.T
            errors = [
                np.sqrt(((b.linear(x, w) - exact) ** 2).mean()) for b, w in zip((digits, floats), weights, strict=True)
            ]
            assert errors[0] < 2 * errors[1]
            assert errors[0] < 5e-7 * np.sqrt((exact**2).mean())


def test_what_is_near_the_output_is_not_rounded(rng, tmp_path):
    backend = linear_backend("int8", 1)
    tensor = random_tensor(rng, "Q8_0", (32, 64))
    assert [backend.load_matrix([tensor], near_output=near).digits for near in (True, False)] == [3, 1]
    path, _ = make(tmp_path, ["Q8_0"])
    with open_checkpoint(path) as checkpoint:
        model = load_model(checkpoint, model_config(checkpoint), backend)
    assert model.lm_head.digits == 3
    for layer, digits in zip(model.layers, (1, 3), strict=True):
        matrices = layer.attention.qkv, layer.attention.o, layer.mlp.gate_up, layer.mlp.down
        assert [matrix.digits for matrix in matrices] == [digits] * 4


def test_int8_leaves_dense_weights_alone(rng):
    rounded, plain = linear_backend("int8", 2), linear_backend("float32", 2)
    for dtype in set(FORMATS) - set(QUANTISED):
        tensor = random_tensor(rng, dtype, (40, 100))
        x = rng.standard_normal((20, 100)).astype(np.float32)
        assert np.array_equal(*(b.linear(x, b.load_matrix([tensor])) for b in (rounded, plain)))


def test_large_batches_go_block_by_block(monkeypatch, rng):
    """More rows than stay in a core's cache: tasks are blocks of rows then, the last of them partly filled."""
    from tinyllm.backends import cpu_linear

    monkeypatch.setattr(cpu_linear, "_BLOCK_NBYTES", 1)
    for form in ("digits", "int8"):
        backend, whole = linear_backend(form, 2), linear_backend(form, 1)
        tensor = random_tensor(rng, "Q4_1", (50, 256))
        x = rng.standard_normal((48 * 3 + 7, 256)).astype(np.float32)
        found = backend.linear(x, backend.load_matrix([tensor]))
        alone = [whole.linear(x[t : t + 1], whole.load_matrix([tensor])) for t in range(len(x))]
        assert np.array_equal(found, np.concatenate(alone))
