"""Keys and values as int8: one scale for each vector of D values, from its largest magnitude.

    scale   amax / 127, rounded up to 16 significant bits (down where 127 times it would overflow)
    stored  x * (1 / scale), rounded to nearest, ties to even: from -127 to 127

With so few bits in the scale, stored * scale is exact in float32, and the largest value becomes exactly 127: storing
what was read gives the same bits again. A vector whose largest magnitude is below 2 ** -100 is stored as zeros of scale
0; one with an infinity or NaN as zeros of scale NaN, so that all of it reads as NaN.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tinyllm.backends.base import F32Array

__all__ = ["LARGEST_SCALE", "SCALE_DROPPED", "SMALLEST_AMAX", "dequantized", "quantized"]

SMALLEST_AMAX = 2.0**-100
SCALE_DROPPED = 0xFF  # the bits of a float32 that a scale does not use
LARGEST_SCALE = float(
    (np.float32(np.finfo(np.float32).max / np.float32(127)).view(np.uint32) & np.uint32(0xFFFFFF00)).view(np.float32)
)  # 127 times it is finite


def quantized(x: F32Array) -> tuple[NDArray[np.int8], F32Array]:
    """(..., D) -> int8 (..., D), scales (...)."""
    amax = np.abs(x).max(-1)
    bits = (amax / np.float32(127)).view(np.uint32) + np.uint32(SCALE_DROPPED)
    scales = np.minimum((bits & ~np.uint32(SCALE_DROPPED)).view(np.float32), np.float32(LARGEST_SCALE))
    usable = np.isfinite(amax) & (amax >= np.float32(SMALLEST_AMAX))
    scales = np.where(usable, scales, np.where(np.isfinite(amax), np.float32(0), np.float32(np.nan)))
    inverses = np.divide(np.float32(1), scales, where=usable, out=np.zeros_like(scales))
    codes = np.rint(np.where(usable[..., None], x, np.float32(0)) * inverses[..., None]).astype(np.int8)
    return codes, scales


def dequantized(codes: NDArray[np.int8], scales: F32Array) -> F32Array:
    """int8 (..., D), scales (...) -> (..., D)"""
    return codes.astype(np.float32) * scales[..., None]
