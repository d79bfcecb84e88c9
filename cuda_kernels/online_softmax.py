"""Partial softmax results and their merge, as every form of paged attention does it: same bits by construction.

A row's partial result over some keys is (m, l, O), with base-2 scores s = log2(e) * score:

    m = max s,   l = sum 2^(s - m),   O = sum 2^(s - m) v        (-inf, 0, 0) where the row sees none of the keys

Two of them merge into one (arXiv:1805.02867, section 3.1). An empty one changes no bit of the other, which is why a
row's result does not depend on how many partials were computed for its neighbours.
"""

from __future__ import annotations

import math

import numpy as np
from numba.cuda import types

from cuda_kernels.primitives import Value, device_function, exp2, fma, fmax, log2, rcp

__all__ = ["LOG2_E", "NEG_INF", "final_lse", "final_scale", "lowest_key", "merge", "merge_weights", "window_and_sinks"]

LOG2_E = math.log2(math.e)
NEG_INF = np.float32(-np.inf)
_LN_2 = np.float32(math.log(2.0))
_ZERO = np.float32(0.0)
_i32 = types.int32


@device_function
def merge_weights(m: Value, other_m: Value) -> Value:
    """(the maximum of both, the weight of the first partial, that of the other).

    Call it only for another partial with l != 0: an empty one is left out. (NaN is not left out.)
    """
    top = fmax(m, other_m)
    return top, exp2(m - top), exp2(other_m - top)


@device_function
def merge(x: Value, weight: Value, other: Value, other_weight: Value) -> Value:
    """An element of l or O after the merge."""
    return fma(other, other_weight, x * weight)


@device_function
def final_scale(l: Value) -> Value:  # noqa: E741 - the papers' name
    """What O is multiplied by in the end: 1 / l, and 0 for a row that saw no key."""
    return rcp(l) if l != _ZERO else _ZERO


@device_function
def final_lse(m: Value, l: Value) -> Value:  # noqa: E741
    """The natural logarithm of the sum of exp(scores); -inf for a row that saw no key."""
    return (m + log2(l)) * _LN_2


@device_function
def window_and_sinks(windows: Value, num_sinks: Value, s: Value, window: Value) -> Value:
    """(window, sinks) of sequence s: its own where it streams, else the layer's and none."""
    own = windows[s]
    if own < window:
        return own, num_sinks[s]
    return window, _i32(0)


@device_function
def lowest_key(position: Value, window: Value, sinks: Value) -> Value:
    """The first key of the window of a query; the sinks lie before it and are apart. It grows with the position.

    0 for the negative positions of padding.
    """
    position = max(position, _i32(0))
    if _i32(position - window) < sinks:
        return _i32(0)
    return _i32(position - window + 1)
