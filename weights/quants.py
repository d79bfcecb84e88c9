"""Storage formats of tensors and their exact dequantisation.

The block layouts are ggml's (github.com/ggml-org/ggml, ggml-common.h). Results equal those of the `gguf`
package bit for bit, because every value takes the same float32 operations in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["FORMATS", "BlockFormat", "dequantize"]

U8Array = NDArray[np.uint8]
F32Array = NDArray[np.float32]

CHUNK_VALUES = 1 << 18  # values decoded at a time: temporaries stay near 1 MiB however large the tensor is


@dataclass(frozen=True)
class BlockFormat:
    """`block_size` consecutive values of a row are stored in `block_nbytes` bytes."""

    name: str
    block_size: int
    block_nbytes: int

    def nbytes(self, values: int) -> int:
        """Bytes that `values` values take; `values` must be a multiple of the block size."""
        assert values % self.block_size == 0
        return values // self.block_size * self.block_nbytes


FORMATS: dict[str, BlockFormat] = {
    f.name: f
    for f in (
        BlockFormat("F32", 1, 4),
        BlockFormat("F16", 1, 2),
        BlockFormat("BF16", 1, 2),
        BlockFormat("Q8_0", 32, 34),
        BlockFormat("Q4_0", 32, 18),
        BlockFormat("Q4_1", 32, 20),
        BlockFormat("Q5_0", 32, 22),
        BlockFormat("Q5_1", 32, 24),
        BlockFormat("Q4_K", 256, 144),
        BlockFormat("Q5_K", 256, 176),
        BlockFormat("Q6_K", 256, 210),
    )
}


def dequantize(data: NDArray[np.uint8], dtype: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Decodes stored bytes into a fresh float32 array.

    Args:
        data: (nbytes,) uint8, as the file stores the tensor.
        dtype: a key of FORMATS.
        shape: numpy order; its last axis is a multiple of the format's block size.
    """
    form, decode = FORMATS[dtype], _DECODERS[dtype]
    blocks = data.reshape(-1, form.block_nbytes)
    out = np.empty((blocks.shape[0], form.block_size), np.float32)
    step = CHUNK_VALUES // form.block_size
    for start in range(0, blocks.shape[0], step):
        out[start : start + step] = decode(blocks[start : start + step])
    return out.reshape(shape)


# ---- fields of a block. Each helper takes the bytes of one field of n blocks.


def _half(field: U8Array) -> F32Array:
    """(n, 2) -> (n, 1): a float16"""
    return field.view("<f2").astype(np.float32)


def _signed(q: U8Array, zero: int) -> F32Array:
    """Values below 128, less `zero`"""
    values: F32Array = q.astype(np.float32) - np.float32(zero)
    return values


def _nibbles(field: U8Array) -> U8Array:
    """(n, B) -> (n, 2B): all low nibbles, then all high ones"""
    return np.concatenate([field & 0x0F, field >> 4], axis=1)


def _nibbles_k(field: U8Array) -> U8Array:
    """(n, 128) -> (n, 8, 32): each run of 32 bytes holds two sub-blocks, the first in its low nibbles"""
    runs = field.reshape(-1, 4, 32)
    return np.stack([runs & 0x0F, runs >> 4], axis=2).reshape(-1, 8, 32)


def _bits(field: U8Array) -> U8Array:
    """(n, 4) -> (n, 32): bit j of the little-endian word, as 0 or 16 (the fifth bit of value j)"""
    bits: U8Array = np.unpackbits(field, axis=1, bitorder="little") << np.uint8(4)
    return bits


def _scales_k(field: U8Array) -> tuple[U8Array, U8Array]:
    """(n, 12) -> scales (n, 8), minima (n, 8), six bits each.

    Bytes 0-3 hold scales 0-3 and bytes 4-7 minima 0-3 in their low six bits, and in their top two bits the
    top two bits of scales and minima 4-7, whose low four bits are the low and high nibbles of bytes 8-11.
    """
    first, second, low = field[:, :4], field[:, 4:8], field[:, 8:]
    scales = np.concatenate([first & 0x3F, (low & 0x0F) | (first >> 6 << 4)], axis=1)
    minima = np.concatenate([second & 0x3F, (low >> 4) | (second >> 6 << 4)], axis=1)
    return scales, minima


# ---- decoders: (n, block_nbytes) uint8 -> (n, block_size) float32


def _f32(b: U8Array) -> F32Array:
    return b.view("<f4").astype(np.float32, copy=False)


def _f16(b: U8Array) -> F32Array:
    return _half(b)


def _bf16(b: U8Array) -> F32Array:
    return (b.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q8_0(b: U8Array) -> F32Array:
    """d f16, 32 x int8"""
    return b[:, 2:].view(np.int8).astype(np.float32) * _half(b[:, :2])


def _q4_0(b: U8Array) -> F32Array:
    """d f16, 16 bytes of nibbles"""
    return _half(b[:, :2]) * _signed(_nibbles(b[:, 2:]), 8)


def _q4_1(b: U8Array) -> F32Array:
    """d f16, m f16, 16 bytes of nibbles"""
    return _half(b[:, :2]) * _nibbles(b[:, 4:]).astype(np.float32) + _half(b[:, 2:4])


def _q5_0(b: U8Array) -> F32Array:
    """d f16, 32 fifth bits, 16 bytes of nibbles"""
    return _half(b[:, :2]) * _signed(_nibbles(b[:, 6:]) | _bits(b[:, 2:6]), 16)


def _q5_1(b: U8Array) -> F32Array:
    """d f16, m f16, 32 fifth bits, 16 bytes of nibbles"""
    q = _nibbles(b[:, 8:]) | _bits(b[:, 4:8])
    return _half(b[:, :2]) * q.astype(np.float32) + _half(b[:, 2:4])


def _k_affine(b: U8Array, q: U8Array) -> F32Array:
    """d f16, dmin f16, 12 bytes of scales and minima; q (n, 8, 32) -> d * scale * q - dmin * minimum"""
    scales, minima = _scales_k(b[:, 4:16])
    d = _half(b[:, :2]) * scales.astype(np.float32)
    m = _half(b[:, 2:4]) * minima.astype(np.float32)
    return (d[..., None] * q.astype(np.float32) - m[..., None]).reshape(-1, 256)


def _q4_k(b: U8Array) -> F32Array:
    """the header of _k_affine, 128 bytes of nibbles"""
    return _k_affine(b, _nibbles_k(b[:, 16:]))


def _q5_k(b: U8Array) -> F32Array:
    """the header of _k_affine, 32 bytes of fifth bits (bit s of byte j: sub-block s, value j), 128 nibble bytes"""
    high = (b[:, 16:48, None] >> np.arange(8, dtype=np.uint8)) & 1  # (n, 32, 8)
    return _k_affine(b, _nibbles_k(b[:, 48:]) | (high << 4).transpose(0, 2, 1))


def _q6_k(b: U8Array) -> F32Array:
    """128 bytes of nibbles, 64 of upper bit pairs, 16 x int8 scales, d f16.

    Each half of a block has 64 bytes of nibbles: the low ones are its values 0-63, the high ones 64-127. Its
    32 bytes of pairs hold, from the lowest pair up, those of values 0-31, 32-63, 64-95 and 96-127.
    """
    low = b[:, :128].reshape(-1, 2, 1, 64)
    low = np.concatenate([low & 0x0F, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = (b[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & np.uint8(3)
    d = _half(b[:, 208:]) * b[:, 192:208].view(np.int8).astype(np.float32)
    return (d[..., None] * _signed(low | (high << np.uint8(4)), 32).reshape(-1, 16, 16)).reshape(-1, 256)


_DECODERS: dict[str, Callable[[U8Array], F32Array]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
