"""Dequantisation against the `gguf` package, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from weights import quants
from weights.quants import FORMATS, dequantize
from weights.tensor import Tensor

# where the float16 fields of a block lie; random bytes there would make NaN and inf
HALF_FIELDS = {
    "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip


def random_blocks(dtype: str, count: int, seed: int = 0) -> NDArray[np.uint8]:
    """(count, block_nbytes) random bytes, the float16 fields being finite, subnormals included."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, FORMATS[dtype].block_nbytes), np.uint8)
    for at in HALF_FIELDS.get(dtype, ()):
        bits = rng.integers(0, 0x7C00, count, np.uint16) | (rng.integers(0, 2, count, np.uint16) << 15)
        blocks[:, at : at + 2] = bits.astype("<u2").view(np.uint8).reshape(count, 2)
    return blocks


def oracle(blocks: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    if dtype == "F32":
        return blocks.view("<f4")
    if dtype == "F16":
        return blocks.view("<f2").astype(np.float32)
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[dtype])


@pytest.mark.parametrize("dtype", FORMATS)
def test_equals_the_gguf_package_bit_for_bit(dtype: str) -> None:
    blocks = random_blocks(dtype, 3000)
    if dtype in ("F32", "F16", "BF16"):  # all but inf and NaN, whose payload may change
        values = blocks.view({"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[dtype])
        finite = np.isfinite(oracle(blocks, dtype)).reshape(values.shape)
        blocks = values[finite].view(np.uint8).reshape(-1, FORMATS[dtype].block_nbytes)
    form = FORMATS[dtype]
    with np.errstate(over="ignore", invalid="ignore"):
        ours = dequantize(blocks.reshape(-1), dtype, (blocks.shape[0], form.block_size))
        theirs = oracle(blocks, dtype)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.reshape(ours.shape).view(np.uint32))


@pytest.mark.parametrize("dtype", FORMATS)
def test_block_sizes_are_ggmls(dtype: str) -> None:
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[dtype]] == (
        FORMATS[dtype].block_size,
        FORMATS[dtype].block_nbytes,
    )


@pytest.mark.parametrize("dtype", FORMATS)
def test_chunks_do_not_show(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, shape = random_blocks(dtype, 21, seed=1).reshape(-1), (3, 7 * FORMATS[dtype].block_size)
    with np.errstate(over="ignore", invalid="ignore"):
        whole = dequantize(data, dtype, shape)
        monkeypatch.setattr(quants, "CHUNK_VALUES", 4 * FORMATS[dtype].block_size)
        np.testing.assert_array_equal(dequantize(data, dtype, shape).view(np.uint32), whole.view(np.uint32))


@pytest.mark.parametrize("dtype", FORMATS)
def test_unaligned_read_only_bytes_give_a_fresh_writable_array(dtype: str) -> None:
    blocks = random_blocks(dtype, 5, seed=2)
    unaligned = np.frombuffer(b"\0" + blocks.tobytes(), np.uint8)[1:]
    shape = (5, FORMATS[dtype].block_size)
    with np.errstate(over="ignore", invalid="ignore"):
        values = dequantize(unaligned, dtype, shape)
        expected = dequantize(blocks.reshape(-1), dtype, shape)
    np.testing.assert_array_equal(values.view(np.uint32), expected.view(np.uint32))
    values += 1  # a copy: the file's bytes are read-only


def test_tensor_rows_and_shape() -> None:
    blocks = random_blocks("Q5_K", 6, seed=3)
    tensor = Tensor("w", (3, 512), "Q5_K", blocks.reshape(-1))
    assert tensor.row_nbytes == 2 * 176
    assert tensor.rows().shape == (3, 352)
    picked = tensor.take_rows(np.array([2, 0]))
    np.testing.assert_array_equal(picked.dequantize(), tensor.dequantize()[[2, 0]])
    assert tensor.take_rows(slice(1, 3)).data.base is not None  # a view


def test_transposed_and_from_float32() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = Tensor.from_float32("w", values)
    np.testing.assert_array_equal(tensor.transposed().dequantize(), values.T)
    assert tensor.transposed().shape == (3, 2)
    assert Tensor.total_nbytes([tensor, tensor]) == 48
