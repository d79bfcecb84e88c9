"""The online softmax of `online_softmax.py` where probabilities are bfloat16, and what rounds to that, on AVX-512.

exp(scale s - m) is 2**x, x = s (scale log2 e) - m log2 e: a polynomial of degree 4 for the fraction of x, at most
2.6e-6 off, a hundredth of a step of bfloat16, and an instruction for the rest. l is the sum of the rounded
probabilities, so that they add up to one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from llvmlite import ir

from tinyllm.backends.cpu_kernels.deferred import types
from tinyllm.backends.cpu_kernels.jit import device
from tinyllm.backends.cpu_kernels.online_softmax import SLACK, TILE_KEYS, move_maximum
from tinyllm.backends.cpu_kernels.simd import (
    I16,
    I32,
    LANES,
    VF,
    Builder,
    Value,
    Vec,
    at_least,
    const_vec,
    emit_call,
    emit_fma,
    fma,
    instruction,
    iota_mask,
    lane_max,
    load,
    load_f32,
    maximum,
    pointer,
    splat,
    store,
    vec,
)
from tinyllm.backends.cpu_kernels.vmath import tanh

__all__ = ["exponentiate_bf16", "find_maximum_bf16", "round_to_bf16"]

_LOG2_E = np.float32(math.log2(math.e))
_POLYNOMIAL = (0.013534137, 0.05201149, 0.24144276, 0.69300383, 1.0000026)  # of 2**f, 0 <= f < 1, from f**4 down


class _BFloat(ir.Type):  # type: ignore[misc]  # llvmlite's types are untyped
    """LLVM's bfloat, which llvmlite has no class for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_VB = ir.VectorType(_BFloat(), LANES)


def _round(b: Builder, address: Value, x: Value) -> Value:
    rounded = b.fptrunc(x, _VB)
    b.store(rounded, pointer(b, address, _VB), align=2)
    return b.fpext(rounded, VF)


# (address, x): stores x as bfloat16, 32 bytes; returns what it made of x
round_to_bf16: Callable[[int, Vec], Vec] = instruction(vec, types.int64, vec)(_round)


@instruction(vec, vec)
def _exp2(b: Builder, x: Value) -> Value:
    """2**x, but 0 below 2**-126: subnormal numbers are slow to make. NaN stays NaN."""
    everywhere, nearest, floor = ir.Constant(I16, -1), ir.Constant(I32, 4), ir.Constant(I32, 1)
    normal = b.bitcast(b.fcmp_unordered(">=", x, const_vec(VF, -126.0)), I16)
    fraction = emit_call(b, "llvm.x86.avx512.mask.reduce.ps.512", VF, x, floor, x, everywhere, nearest)
    p = const_vec(VF, _POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        p = emit_fma(b, p, fraction, const_vec(VF, coefficient))
    return emit_call(b, "llvm.x86.avx512.mask.scalef.ps.512", VF, p, x, const_vec(VF, 0.0), normal, nearest)


@device
def find_maximum_bf16(
    scores: int, tile: int, first: int, end: int, scale: float, cap: float, state: int, acc: int, columns: int
) -> None:
    """find_maximum, but scores that are neither capped nor masked stay unscaled."""
    old_m, factor = load_f32(state), scale if cap <= 0.0 else np.float32(1.0)
    if cap > 0.0 or first > tile or end < tile + TILE_KEYS:
        for at in range(0, TILE_KEYS, 16):
            key = tile + at
            values = splat(-math.inf)
            if key + 16 > first and key < end:
                values = load(scores + 4 * at)
                if cap > 0.0:
                    values = splat(cap) * tanh(values * splat(scale) / splat(cap))
                if key < first or key + 16 > end:
                    values = iota_mask(values, first - key, end - key)
            store(scores + 4 * at, values)
    top = maximum(maximum(load(scores), load(scores + 64)), maximum(load(scores + 128), load(scores + 192)))
    if at_least(top * splat(factor), splat(old_m + np.float32(SLACK))) != 0:
        move_maximum(lane_max(top) * factor, state, acc, columns)


@device
def exponentiate_bf16(scores: int, state: int, factor: float) -> None:
    """exponentiate; the probabilities lie where the first half of the scores was. factor: scale, or 1 after capping."""
    base = splat(-(load_f32(state) * _LOG2_E))
    slope = splat(factor * _LOG2_E)
    total = load(state + 64)
    for at in range(0, TILE_KEYS, 16):
        total = total + round_to_bf16(scores + 2 * at, _exp2(fma(load(scores + 4 * at), slope, base)))
    store(state + 64, total)
