"""The Gumbel noise of a draw's tokens, and a cheap bound on it; see tinyllm.sampling.gumbel_noise."""

from __future__ import annotations

import math
from collections.abc import Callable

from llvmlite import ir

from tinyllm.backends.cpu_kernels.deferred import types
from tinyllm.backends.cpu_kernels.jit import device
from tinyllm.backends.cpu_kernels.simd import (
    F64,
    I64,
    LANES,
    V32,
    VF,
    Builder,
    Value,
    Vec,
    const,
    const_vec,
    emit_splat,
    i64,
    instruction,
    vec,
)

__all__ = ["LEAST_NOISE", "MOST_NOISE", "gumbel", "rarity"]

LEAST_NOISE, MOST_NOISE = -3.62, 36.75  # -log(-log(u)) of the u nearest to 0 and to 1, rounded away from each other

_GOLDEN = 0x9E3779B97F4A7C15


def _mix(b: Builder, x: Value) -> Value:
    """SplitMix64's finaliser of int64, or of lanes of them."""

    def constant(value: int) -> Value:
        return ir.Constant(x.type, value if x.type == I64 else [value] * LANES)

    x = b.mul(b.xor(x, b.lshr(x, constant(30))), constant(0xBF58476D1CE4E5B9))
    x = b.mul(b.xor(x, b.lshr(x, constant(27))), constant(0x94D049BB133111EB))
    return b.xor(x, b.lshr(x, constant(31)))


@instruction(types.float64, i64, i64)
def _uniform(b: Builder, key: Value, token: Value) -> Value:
    """The token's number u in (0, 1)."""
    counter = b.mul(b.add(token, const(1)), const(_GOLDEN))
    bits = b.lshr(_mix(b, b.add(key, counter)), const(12))
    return b.fmul(b.fadd(b.uitofp(bits, F64), ir.Constant(F64, 0.5)), ir.Constant(F64, 2.0**-52))


@device
def gumbel(key: int, token: int) -> float:
    return -math.log(-math.log(_uniform(key, token)))


def _rarity(b: Builder, key: Value, token: Value) -> Value:
    kind = ir.VectorType(I64, LANES)
    counters = ir.Constant(kind, [_GOLDEN * (lane + 1) % 2**64 for lane in range(LANES)])
    x = _mix(b, b.add(emit_splat(b, b.add(key, b.mul(token, const(_GOLDEN))), kind), counters))
    high = b.trunc(b.lshr(b.not_(x), ir.Constant(kind, [32] * LANES)), V32)
    return b.fmul(b.uitofp(high, VF), const_vec(VF, 2.0**-32))


# 1 - u of the tokens `token` to `token` + 15, too large by 2**-24 of it at most. Noise is at most -log(1 - u): a token
# that would need noise x to win has lost where its rarity is above exp(-x).
rarity: Callable[[int, int], Vec] = instruction(vec, i64, i64)(_rarity)
