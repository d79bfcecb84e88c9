"""Rows of packed matrices, decoded on the device."""

from __future__ import annotations

import numpy as np
import pytest

from cuda_kernels.embedding import embedding
from cuda_kernels.errors import KernelArgumentError
from cuda_kernels.linear_forms import FORMS
from tests.cuda.linear_cases import Case


@pytest.mark.parametrize("form", FORMS)
def test_rows_equal_the_decoded_ones_bit_for_bit(form, runtime, rng):
    columns = 768 if FORMS[form].block_size == 256 else 608
    case = Case.random(runtime, rng, form, 37, columns)
    ids = rng.permutation(37)[:20].astype(np.int32)
    ids[:3] = 0, 36, 36
    out = runtime.from_host(np.full((20, columns + 5), 9, np.float32))
    embedding(runtime, runtime.from_host(ids), case.matrix, out[:, :columns])
    result = runtime.download(out)
    assert np.array_equal(np.ascontiguousarray(result[:, :columns]).view(np.uint32), case.values[ids].view(np.uint32))
    assert (result[:, columns:] == 9).all()


@pytest.mark.parametrize(("form", "columns"), [("f32", 4), ("f16", 1), ("bf16", 33), ("f16", 62)])
def test_odd_numbers_of_columns(form, columns, runtime, rng):
    case = Case.random(runtime, rng, form, 33, columns)
    ids = np.arange(33, dtype=np.int32)[::-1].copy()
    out = runtime.empty((33, columns), np.float32)
    embedding(runtime, runtime.from_host(ids), case.matrix, out)
    assert np.array_equal(runtime.download(out), case.values[ids])


def test_no_tokens_and_wrong_arguments(runtime, rng):
    case = Case.random(runtime, rng, "f16", 16, 64)
    embedding(runtime, runtime.empty(0, np.int32), case.matrix, runtime.empty((0, 64), np.float32))
    ids = runtime.from_host(np.zeros(2, np.int32))
    with pytest.raises(KernelArgumentError, match="out has shape"):
        embedding(runtime, ids, case.matrix, runtime.empty((2, 63), np.float32))
    with pytest.raises(KernelArgumentError, match="token_ids is int64"):
        embedding(runtime, np.zeros(2, np.int64), case.matrix, runtime.empty((2, 64), np.float32))
