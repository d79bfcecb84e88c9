"""Rotary position embedding's angles: cosines and sines by absolute position, without end.

Rotation itself is a backend's op; here are the frequencies (RoFormer, arXiv:2104.09864) with the scalings that
models use, and a table of their cosines and sines.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from tinyllm.backends.base import F32Array, I32Array
from tinyllm.config import RopeConfig

__all__ = ["RotaryTable", "inverse_frequencies"]

CHUNK = 256  # positions computed together
MAX_CHUNKS = 256  # chunks kept: 65,536 positions, 32 MiB for rotary_dim 128


def inverse_frequencies(rope: RopeConfig) -> NDArray[np.float64]:
    """(R / 2,) radians per position."""
    exponents = np.arange(0, rope.rotary_dim, 2, dtype=np.float64) / rope.rotary_dim
    frequencies = rope.theta**-exponents
    if rope.freq_divisors is not None:
        return frequencies / np.array(rope.freq_divisors, np.float64)
    if rope.scaling == "linear":
        return frequencies / rope.factor
    if rope.scaling == "llama3":
        return _llama3_scaling(frequencies, rope)
    return frequencies


def _llama3_scaling(frequencies: NDArray[np.float64], rope: RopeConfig) -> NDArray[np.float64]:
    """Llama 3.1's scaling: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    turns = rope.original_max_position * frequencies / (2 * math.pi)  # rotations within the trained context
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return (1 - kept) * frequencies / rope.factor + kept * frequencies


class RotaryTable:
    """Cosines and sines of position * frequency, computed in float64 and rounded once to float32.

    A position's values have the same bits whatever else is looked up: positions are computed in fixed chunks,
    always whole, because numpy's loops may treat the body and the tail of an array differently.
    """

    def __init__(self, rope: RopeConfig) -> None:
        self._frequencies = inverse_frequencies(rope)
        self._chunks: OrderedDict[int, tuple[F32Array, F32Array]] = OrderedDict()

    @property
    def half_dim(self) -> int:
        return int(self._frequencies.shape[0])

    def lookup(
        self, positions: I32Array | NDArray[np.int64], out: tuple[F32Array, F32Array] | None = None
    ) -> tuple[F32Array, F32Array]:
        """positions (T,) -> cos (T, R / 2), sin (T, R / 2)"""
        if out is None:
            shape = (len(positions), self.half_dim)
            out = np.empty(shape, np.float32), np.empty(shape, np.float32)
        if len(positions) == 0:
            return out
        chunk_ids, rows = np.divmod(positions, CHUNK)
        first = int(chunk_ids[0])
        if (chunk_ids == first).all():
            for table, result in zip(self._chunk(first), out, strict=True):
                np.take(table, rows, axis=0, out=result, mode="clip")
            return out
        for chunk_id in np.unique(chunk_ids):
            where = np.flatnonzero(chunk_ids == chunk_id)
            for table, result in zip(self._chunk(int(chunk_id)), out, strict=True):
                result[where] = table[rows[where]]
        return out

    def _chunk(self, chunk_id: int) -> tuple[F32Array, F32Array]:
        """cos and sin of positions chunk_id * CHUNK onwards, (CHUNK, R / 2) each; least recently used ones go."""
        chunk = self._chunks.get(chunk_id)
        if chunk is None:
            positions = np.arange(chunk_id * CHUNK, (chunk_id + 1) * CHUNK, dtype=np.float64)
            angles = positions[:, None] * self._frequencies
            chunk = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
            self._chunks[chunk_id] = chunk
            if len(self._chunks) > MAX_CHUNKS:
                self._chunks.popitem(last=False)
        else:
            self._chunks.move_to_end(chunk_id)
        return chunk
