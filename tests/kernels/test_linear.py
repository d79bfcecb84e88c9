"""linear and embedding of the cpu backend, for every weight format."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.conftest import linear_backend
from tests.kernels.kernel_cases import oracle_values, random_tensor, worst
from tinyllm.backends.cpu_kernels.formats import PACKED
from weights import Tensor
from weights.quants import FORMATS

DENSE = ("F32", "F16", "BF16")
ROWS = (1, 2, 3, 4, 5, 8, 9, 12, 13, 17, 22, 64, 257)
FORMS = ("float32", "digits", "matrix")


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


@pytest.fixture
def cpu(form):
    return linear_backend(form, 2)


@pytest.fixture
def single(form):
    return linear_backend(form, 1)


def test_every_format_of_the_files_is_packed():
    assert set(PACKED) == set(FORMATS)
    for form in PACKED.values():
        assert sum(unit * units for unit, units in form.fields) == FORMATS[form.name].block_nbytes


@pytest.mark.parametrize("dtype", FORMATS)
def test_linear_is_as_exact_as_the_reference(dtype, cpu, reference, rng):
    tensor = random_tensor(rng, dtype, (50, 512))
    weight, plain = cpu.load_matrix([tensor]), reference.load_matrix([tensor])
    exact_weight = oracle_values(tensor).astype(np.float64)
    bias = rng.standard_normal(50).astype(np.float32)
    for rows in (1, 5, 40):
        x = rng.standard_normal((rows, 512)).astype(np.float32)
        exact = x.astype(np.float64) @ exact_weight.T + bias
        baseline = worst(reference.linear(x, plain, bias), exact)
        assert worst(cpu.linear(x, weight, bias), exact) <= 4 * baseline + 1e-6 * np.abs(exact).max()


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("form", [*FORMS, "int8"], indirect=True)
def test_rows_have_the_same_bits_in_every_batch(dtype, form, cpu, single, rng):
    in_features = 545 if dtype in DENSE else 768
    tensor = random_tensor(rng, dtype, (83, in_features))
    weight = cpu.load_matrix([tensor])
    x = rng.standard_normal((max(ROWS), in_features)).astype(np.float32)
    x[7] *= 1e-30  # tiny and huge rows beside others
    x[8] *= 1e30
    bias = rng.standard_normal(83).astype(np.float32)
    alone = np.concatenate([single.linear(x[t : t + 1], weight, bias) for t in range(len(x))])
    for rows in ROWS:
        for backend in (cpu, single):
            start, out = len(x) - rows, np.full((rows, 83), np.nan, np.float32)  # not what an earlier result left
            assert np.array_equal(backend.linear(x[start:], weight, bias, out=out), alone[start:]), rows
    three = linear_backend(form, 3)
    assert np.array_equal(three.linear(x, weight, bias), alone)


@pytest.mark.parametrize("dtype", DENSE)
@pytest.mark.parametrize("in_features", [1, 3, 31, 32, 33, 65])
@pytest.mark.parametrize("out_features", [1, 15, 16, 17])
def test_dense_shapes_of_any_size(dtype, in_features, out_features, cpu, rng):
    tensor = random_tensor(rng, dtype, (out_features, in_features))
    weight = cpu.load_matrix([tensor])
    for rows in (1, 3, 20):
        x = rng.standard_normal((rows, in_features)).astype(np.float32)
        exact = x.astype(np.float64) @ oracle_values(tensor).astype(np.float64).T
        np.testing.assert_allclose(cpu.linear(x, weight), exact, rtol=1e-5, atol=1e-5)


def test_strided_input_and_output_change_no_bits(cpu, rng):
    weight = cpu.load_matrix([random_tensor(rng, "Q4_1", (40, 64))])
    for rows in (1, 4, 30):
        wide = rng.standard_normal((rows, 100)).astype(np.float32)
        out = np.full((rows, 60), 9.0, np.float32)
        result = cpu.linear(wide[:, 20:84], weight, out=out[:, 3:43])
        assert result.base is out
        assert np.array_equal(out[:, 3:43], cpu.linear(np.ascontiguousarray(wide[:, 20:84]), weight))
        assert (out[:, :3] == 9).all()
        assert (out[:, 43:] == 9).all()  # the padding of the last group is not written


def test_parts_of_several_formats_stack(cpu, rng):
    shapes = [("Q4_1", 20), ("Q4_1", 12), ("Q4_1", 5), ("Q8_0", 7), ("F32", 33), ("Q8_0", 16)]
    tensors = [random_tensor(rng, dtype, (rows, 96)) for dtype, rows in shapes]
    weight = cpu.load_matrix(tensors)
    assert weight.shape == (93, 96)
    assert [(p.dtype, p.first_row, p.rows) for p in weight.parts] == [
        ("Q4_1", 0, 37), ("Q8_0", 37, 7), ("F32", 44, 33), ("Q8_0", 77, 16)
    ]  # fmt: skip
    bias = rng.standard_normal(93).astype(np.float32)
    for rows in (1, 3, 30):
        x = rng.standard_normal((rows, 96)).astype(np.float32)
        apart = np.concatenate([cpu.linear(x, cpu.load_matrix([t])) for t in tensors], axis=1)
        assert np.array_equal(cpu.linear(x, weight, bias), apart + bias)
    ids = np.array([0, 36, 37, 43, 44, 76, 77, 92], np.int32)
    values = np.concatenate([oracle_values(t) for t in tensors])
    assert np.array_equal(cpu.embedding(ids, weight), values[ids])


def test_sizes_are_known_before_loading(cpu, rng):
    for shapes in ([("Q4_1", 20), ("Q4_1", 12)], [("Q6_K", 17), ("F16", 1)], [("BF16", 33)]):
        parts = [(dtype, (rows, 512)) for dtype, rows in shapes]
        weight = cpu.load_matrix([random_tensor(rng, dtype, shape) for dtype, shape in parts])
        assert cpu.matrix_nbytes(parts) == weight.nbytes
    # sixteen rows hold exactly the file's bytes
    assert cpu.matrix_nbytes([("Q4_K", (4096, 4096))]) == FORMATS["Q4_K"].nbytes(4096 * 4096)


@pytest.mark.parametrize("dtype", FORMATS)
def test_embedding_is_exact(dtype, cpu, rng):
    tensor = random_tensor(rng, dtype, (37, 256))
    ids = rng.integers(0, 37, 19).astype(np.int32)
    ids[:2] = 0, 36
    assert np.array_equal(cpu.embedding(ids, cpu.load_matrix([tensor])), oracle_values(tensor)[ids])


def test_nan_stays_in_its_row(cpu, rng):
    weight = cpu.load_matrix([random_tensor(rng, "Q4_1", (32, 64))])
    x = rng.standard_normal((30, 64)).astype(np.float32)
    clean = cpu.linear(x, weight)
    x[11, 5] = np.nan
    x[12, 0] = np.inf
    result = cpu.linear(x, weight)
    assert np.isnan(result[11]).all()
    others = np.delete(np.arange(30), [11, 12])
    assert np.array_equal(result[others], clean[others])


def test_no_rows(cpu, rng):
    weight = cpu.load_matrix([random_tensor(rng, "Q8_0", (32, 64))])
    assert cpu.linear(np.empty((0, 64), np.float32), weight).shape == (0, 32)
    assert cpu.embedding(np.empty(0, np.int32), weight).shape == (0, 64)
    assert cpu.rms_norm(np.empty((0, 64), np.float32), np.ones(64, np.float32), 1e-5).shape == (0, 64)
    cpu.softcap(np.empty((0, 64), np.float32), 30.0)


def test_weights_are_copied(cpu, rng):
    data = random_tensor(rng, "F32", (16, 8)).data.copy()
    weight = cpu.load_matrix([Tensor("w", (16, 8), "F32", data)])
    x = rng.standard_normal((1, 8)).astype(np.float32)
    before = cpu.linear(x, weight)
    data[:] = 0
    assert np.array_equal(cpu.linear(x, weight), before)
