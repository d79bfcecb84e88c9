"""Linear layers on packed matrices of every form: against exact products, and bit for bit across batches."""

from __future__ import annotations

import numpy as np
import pytest

from cuda_kernels.errors import KernelArgumentError
from cuda_kernels.linear import linear, linear_scratch_nbytes
from cuda_kernels.linear_forms import FORMS
from cuda_kernels.matrix import matrix_nbytes, pack_matrix
from tests.cuda.linear_cases import Case

QUICK = ("f32", "f16", "Q5_1", "Q5_K")  # between them, every piece of code but for what some widths of bits need
ALL = [form if form in QUICK else pytest.param(form, marks=pytest.mark.slow) for form in FORMS]
TOKENS = (1, 2, 7, 8, 9, 16, 17, 63, 64, 65, 130)


def columns_of(form: str) -> int:
    """More than two slices, the last not whole where the form allows it."""
    return 768 if FORMS[form].block_size == 256 else 576


@pytest.mark.parametrize("form", FORMS)
def test_few_tokens_agree_with_exact_products(form, runtime, rng):
    case = Case.random(runtime, rng, form, 37, columns_of(form))
    x = rng.standard_normal((3, columns_of(form))).astype(np.float32)
    bias = rng.standard_normal(37).astype(np.float32)
    exact, bound = case.model(x)
    assert (np.abs(case.run(x, bias) - (exact + bias)) <= bound + 2.0**-24 * np.abs(bias)).all()
    assert (np.abs(case.run(x[:1]) - exact[:1]) <= bound[:1]).all()


@pytest.mark.parametrize("form", ALL)
def test_many_tokens_agree_with_exact_products_and_few(form, runtime, rng):
    case = Case.random(runtime, rng, form, 70, columns_of(form))
    x = rng.standard_normal((19, columns_of(form))).astype(np.float32)
    bias = rng.standard_normal(70).astype(np.float32)
    exact, bound = case.model(x)
    many = case.run(x, bias)
    assert (np.abs(many - (exact + bias)) <= bound + 2.0**-24 * np.abs(bias)).all()
    assert np.array_equal(many[5:6], case.run(x[5:6], bias))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_row_has_the_same_bits_in_every_batch(form, runtime, rng):
    """Rows of the matrix enough for the large tiles of prefill to be chosen for 130 tokens."""
    case = Case.random(runtime, rng, form, 130, columns_of(form))
    x = rng.standard_normal((max(TOKENS), columns_of(form))).astype(np.float32)
    x[-1] *= np.float32(1e-30)
    x[-3] *= np.float32(1e30)
    every = case.run(x)
    for tokens in TOKENS:
        start = len(x) - tokens
        assert np.array_equal(case.run(x[start:]), every[start:]), tokens


def test_large_and_small_tiles_give_the_same_bits(runtime, rng):
    case = Case.random(runtime, rng, "Q5_K", 130, 512)
    x = rng.standard_normal((130, 512)).astype(np.float32)
    large = case.run(x)
    names = set(runtime.totals)
    assert "linear_prefill_Q5_K_r128_t64" in names
    assert np.array_equal(case.run(x[100:120]), large[100:120])
    assert "linear_prefill_Q5_K_r64_t32" in runtime.totals


@pytest.mark.parametrize("form", [pytest.param("f32", marks=pytest.mark.slow), "Q5_1"])
def test_rows_longer_than_a_round_of_slices(form, runtime, rng):
    """Few tokens sum slices by rounds of 32, many in one go."""
    columns = 33 * 256 + 64
    case = Case.random(runtime, rng, form, 17, columns)
    x = rng.standard_normal((17, columns)).astype(np.float32)
    exact, bound = case.model(x)
    many = case.run(x)
    assert (np.abs(many - exact) <= bound).all()
    assert np.array_equal(case.run(x[:2]), many[:2])


@pytest.mark.parametrize(("form", "shapes"), [
    ("f32", [(1, 4), (31, 36), (33, 256), (32, 260)]),
    ("f16", [(1, 1), (15, 33), (16, 64), (17, 257)]),
    ("Q5_1", [(1, 32), (16, 64), (17, 96), (33, 288)]),
])  # fmt: skip
def test_odd_shapes(form, shapes, runtime, rng):
    for rows, columns in shapes:
        case = Case.random(runtime, rng, form, rows, columns)
        x = rng.standard_normal((18, columns)).astype(np.float32)
        exact, bound = case.model(x)
        for tokens in (18, 2):
            assert (np.abs(case.run(x[:tokens]) - exact[:tokens]) <= bound[:tokens]).all(), (rows, columns, tokens)


@pytest.mark.parametrize("form", ["f32", "f16"])
def test_strided_rows_change_no_bits(form, runtime, rng):
    case = Case.random(runtime, rng, form, 40, 96)
    wide = rng.standard_normal((18, 200)).astype(np.float32)
    scratch = runtime.empty(linear_scratch_nbytes(18, 96), np.uint8)
    for tokens in (2, 18):
        out = runtime.from_host(np.full((tokens, 60), 9, np.float32))
        linear(runtime, runtime.from_host(wide)[:tokens, 40:136], case.matrix, None, out[:, 3:43], scratch)
        result = runtime.download(out)
        assert np.array_equal(result[:, 3:43], case.run(np.ascontiguousarray(wide[:tokens, 40:136])))
        assert (result[:, :3] == 9).all() and (result[:, 43:] == 9).all()


@pytest.mark.parametrize("form", ["f32", "f16", "Q5_1"])
def test_nan_and_infinity_stay_in_their_token(form, runtime, rng):
    case = Case.random(runtime, rng, form, 20, 64)
    x = rng.standard_normal((18, 64)).astype(np.float32)
    for tokens in (8, 18):
        clean = case.run(x[:tokens])
        spoiled = x[:tokens].copy()
        spoiled[3, 5], spoiled[6, 0] = np.nan, np.inf
        result = case.run(spoiled)
        assert np.isnan(result[3]).all() and not np.isfinite(result[6]).any()
        others = np.delete(np.arange(tokens), [3, 6])
        assert np.array_equal(result[others], clean[others])


def test_rows_of_any_magnitude_fit_float16(runtime, rng):
    """A row is scaled by a power of two: the result is that of the row of ordinary size, scaled."""
    for form in ("f16", "Q5_1"):
        case = Case.random(runtime, rng, form, 16, 64)
        x = np.repeat(rng.standard_normal((1, 64)).astype(np.float32), 8, axis=0)
        powers = np.exp2(np.array([0, 20, 100, -20, -100, 3, -3, 1])).astype(np.float32)
        result = case.run(x * powers[:, None])
        assert np.array_equal(result, result[0] * powers[:, None])
        assert (case.run(np.zeros((2, 64), np.float32)) == 0).all()
        tiny = np.full((1, 64), 2.0**-140, np.float32)  # subnormal
        exact, bound = case.model(tiny)
        assert (np.abs(case.run(tiny) - exact) <= bound + 2.0**-149).all()


def test_no_tokens(runtime, rng):
    case = Case.random(runtime, rng, "f16", 16, 64)
    out, scratch = runtime.empty((0, 16), np.float32), runtime.empty(0, np.uint8)
    linear(runtime, runtime.empty((0, 64), np.float32), case.matrix, None, out, scratch)


@pytest.mark.parametrize("form", FORMS)
def test_sizes_are_exact_and_known_before_packing(form, runtime, rng):
    for rows, columns in ((16, 256), (17, 768), (1, 256)):
        matrix = Case.random(runtime, rng, form, rows, columns).matrix
        arrays = {id(array): array.nbytes for array in (matrix.weights, matrix.headers)}
        assert matrix.nbytes == sum(arrays.values()) == matrix_nbytes(form, rows, columns)
    spec = FORMS[form]
    assert matrix_nbytes(form, 4096, 4096) == 4096 * 4096 // spec.block_size * spec.block_nbytes  # the file's bytes


def test_what_does_not_fit_is_named(runtime, rng):
    case = Case.random(runtime, rng, "f16", 16, 64)
    x, out = runtime.empty((2, 64), np.float32), runtime.empty((2, 16), np.float32)
    scratch = runtime.empty(linear_scratch_nbytes(2, 64), np.uint8)
    with pytest.raises(KernelArgumentError, match=r"x has shape \(2, 32\)"):
        linear(runtime, x[:, :32], case.matrix, None, out, scratch)
    with pytest.raises(KernelArgumentError, match="out has shape"):
        linear(runtime, x, case.matrix, None, out[:, :15], scratch)
    with pytest.raises(KernelArgumentError, match="bias is float64"):
        linear(runtime, x, case.matrix, np.zeros(16), out, scratch)
    with pytest.raises(KernelArgumentError, match="bytes of scratch"):
        linear(runtime, x, case.matrix, None, out, scratch[:100])
    plain = Case.random(runtime, rng, "f32", 16, 60)
    with pytest.raises(KernelArgumentError, match="16 bytes"):
        linear(runtime, x[:, 2:62], plain.matrix, None, out, scratch)
    source = np.zeros((4, 64), np.float32)
    with pytest.raises(KernelArgumentError, match="unknown storage form 'Q2_K'"):
        pack_matrix(runtime, "Q2_K", source, 4, 64)
    with pytest.raises(KernelArgumentError, match="whole blocks"):
        pack_matrix(runtime, "Q4_K", np.zeros((4, 144), np.uint8), 4, 64)
    with pytest.raises(KernelArgumentError, match="packed from uint8"):
        pack_matrix(runtime, "Q8_0", source, 4, 64)
    with pytest.raises(KernelArgumentError, match="multiple of 4"):
        pack_matrix(runtime, "f32", source[:, :30], 4, 30)
