"""exp, sigmoid and tanh in float32 from the hardware's exponential and reciprocal, with known errors.

The errors stated follow from those of ex2.approx (2 units in the last place) and rcp.approx (1), PTX ISA, and count
2 ** -23 relative. Results below 2 ** -126 are 0.
"""

from __future__ import annotations

import numpy as np

from cuda_kernels.primitives import Value, device_function, exp2, fma, fmax, fmin, rcp

__all__ = ["exp", "sigmoid", "tanh"]

ZERO, ONE, TWO = np.float32(0), np.float32(1), np.float32(2)
LOG2E = np.float32(np.log2(np.e))
LOG2E_REST = np.float32(np.log2(np.e) - np.float64(LOG2E))
LN2 = np.float32(np.log(2))
EXP_LEAST, EXP_MOST = np.float32(-104), np.float32(88)  # where exp is 0, or its reciprocal is

# tanh(x) / x = 1 + u P(u), u = x^2, a Chebyshev fit on |x| <= 9 / 16, relative error 2 ** -28
TANH_SMALL = np.float32(0.5625)
P0, P1, P2 = np.float32(-0.33333313821014154), np.float32(0.13332451758077044), np.float32(-0.05383746153461337)
P3, P4 = np.float32(0.021007766902896883), np.float32(-0.006180378380146487)


@device_function
def exp(x: Value) -> Value:
    """e ** x for |x| <= 128, to 3 units in the last place.

    With t = x log2(e) rounded and r what the rounding lost, e ** x = 2 ** t * 2 ** r = 2 ** t * (1 + r ln 2).
    """
    t = x * LOG2E
    lost = fma(x, LOG2E_REST, fma(x, LOG2E, -t))
    power = exp2(t)
    return fma(power, lost * LN2, power)


@device_function
def sigmoid(x: Value) -> Value:
    """1 / (1 + e ** -x), to 5 units in the last place; 0 below -88, and anything for NaN."""
    return rcp(ONE + exp(fmin(fmax(-x, EXP_LEAST), EXP_MOST)))


@device_function
def tanh(x: Value) -> Value:
    """The hyperbolic tangent, to 5 units in the last place; NaN for NaN."""
    if x != x:
        return x
    y = fmax(x, -x)
    if y < TANH_SMALL:
        u = x * x
        return fma(x * u, fma(fma(fma(fma(P4, u, P3), u, P2), u, P1), u, P0), x)
    y = ONE - TWO * rcp(ONE + exp(fmin(TWO * y, EXP_MOST)))
    return y if x > ZERO else -y
