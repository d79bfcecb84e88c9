"""Device functions: the noise of a Gumbel-max draw, from a counter-based generator, in float32.

The token with the largest log(weight) + G wins, G = -log(-log(u)) with u uniform in (0, 1): its distribution is that
of the weights (Gumbel 1954; Maddison, Tarlow and Minka, arXiv:1411.0030). Here log2(E) is made, E = -log(u), an
exponential variate, so that the winner has the largest log2(weight) - log2(E).

    bits    SplitMix64's finaliser (Steele, Lea and Flood 2014) of key + (token id + 1) * golden ratio
    u       (k + 1/2) * 2 ** -52, k the upper 52 bits, never rounded: whichever of u and 1 - u is smaller, s <= 1/2,
            is taken to float32 from its integer, so that its relative error is 2 ** -24 down to the least, 2 ** -53
    u = s        E = -log2(s) * log(2)
    u = 1 - s    E = -log1p(-s) = 2 artanh(t), t = s / (2 - s) <= 1/3, a polynomial in t * t

Small E decides: it belongs to the tokens that win. Its relative error is below 2 ** -20.9 throughout, and log2(E) is
off by at most 2 ** -20 + 2 ** -22 * |log2(E)|. So the probability p of a token is off by a factor of about
1 + 1e-6 * (1 + |log2(p)| / 4) at most. As in float64, E is at least 2 ** -53: what is less likely than that never wins.
"""

from __future__ import annotations

import numpy as np
from numba.cuda import types

from cuda_kernels.primitives import Value, device_function, fma, log2, rcp

__all__ = ["GOLDEN", "log2_exponential", "mix"]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2 ** 64 / golden ratio, odd: SplitMix64's step

_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_27, _30, _31 = np.uint64(27), np.uint64(30), np.uint64(31)

_U11, _U1, _ALL = np.uint64(11), np.uint64(1), np.uint64(0xFFFFFFFFFFFFFFFF)
_HALF = np.uint64(1 << 63)
_STEP = np.float32(2.0**-53)
_MINUS_LN2 = np.float32(-np.log(2.0))
_TWO = np.float32(2)
# 2 artanh(t) / t = 2 (1 + t ** 2 / 3 + t ** 4 / 5 + ...); the first term left out is below 2e-8 of the sum
_C0, _C1, _C2, _C3, _C4, _C5, _C6 = (np.float32(2 / (2 * k + 1)) for k in range(7))


@device_function
def mix(x: Value) -> Value:
    """uint64 -> uint64: SplitMix64's finaliser."""
    x = (x ^ (x >> _30)) * _MIX1
    x = (x ^ (x >> _27)) * _MIX2
    return x ^ (x >> _31)


@device_function
def log2_exponential(bits: Value) -> Value:
    """uint64 -> float32: log2 of the exponential variate that 64 random bits stand for."""
    upper = bits >= _HALF
    k = (bits if not upper else bits ^ _ALL) >> _U11  # 53 bits: 2 k of the smaller side, and one bit that is replaced
    s = types.float32(k | _U1) * _STEP
    if upper:
        t = s * rcp(_TWO - s)
        t2 = t * t
        p = fma(_C6, t2, _C5)
        p = fma(p, t2, _C4)
        p = fma(p, t2, _C3)
        p = fma(p, t2, _C2)
        p = fma(p, t2, _C1)
        p = fma(p, t2, _C0)
        e = t * p
    else:
        e = log2(s) * _MINUS_LN2
    return log2(e)
