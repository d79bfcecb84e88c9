"""exp, tanh and the activations on 16 lanes: range reduction and a polynomial, every step a fused multiply-add.

These functions run in Python while a kernel is compiled: each operation on `Lanes` emits one LLVM instruction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from tinyllm.backends.cpu_kernels.deferred import types
from tinyllm.backends.cpu_kernels.simd import (
    I32,
    V32,
    VF,
    Builder,
    Value,
    Vec,
    const_vec,
    emit_fma,
    emit_splat,
    instruction,
    vec,
)

__all__ = ["exp", "exp_flushed", "exp_scalar", "gelu", "silu", "tanh"]


@dataclass(frozen=True)
class Lanes:
    """An LLVM value of sixteen float32 lanes, and the builder that emits what is done with it."""

    b: Builder
    value: Value

    def _lift(self, other: Lanes | float) -> Value:
        return other.value if isinstance(other, Lanes) else const_vec(VF, other)

    def __add__(self, other: Lanes | float) -> Lanes:
        return Lanes(self.b, self.b.fadd(self.value, self._lift(other)))

    def __sub__(self, other: Lanes | float) -> Lanes:
        return Lanes(self.b, self.b.fsub(self.value, self._lift(other)))

    def __mul__(self, other: Lanes | float) -> Lanes:
        return Lanes(self.b, self.b.fmul(self.value, self._lift(other)))

    def __truediv__(self, other: Lanes | float) -> Lanes:
        return Lanes(self.b, self.b.fdiv(self.value, self._lift(other)))

    def __neg__(self) -> Lanes:
        return Lanes(self.b, self.b.fneg(self.value))

    def fma(self, factor: Lanes | float, addend: Lanes | float) -> Lanes:
        """self * factor + addend, rounded once"""
        return Lanes(self.b, emit_fma(self.b, self.value, self._lift(factor), self._lift(addend)))

    def where(self, relation: str, bound: float, if_true: Lanes | float, if_false: Lanes | float) -> Lanes:
        """Per lane: if_true where `self relation bound`, else (and where self is NaN) if_false."""
        holds = self.b.fcmp_ordered(relation, self.value, const_vec(VF, bound))
        return Lanes(self.b, self.b.select(holds, self._lift(if_true), self._lift(if_false)))

    def times_normal_power_of_two(self, shifted: Lanes) -> Lanes:
        """self * 2**n, where shifted = 1.5 * 2**23 + n and neither 2**n nor the result is subnormal or overflows."""
        b = self.b
        exponent = b.shl(b.add(b.bitcast(shifted.value, V32), const_vec(V32, 127)), const_vec(V32, 23))
        return Lanes(b, b.fmul(self.value, b.bitcast(exponent, VF)))

    def times_power_of_two(self, shifted: Lanes) -> Lanes:
        """self * 2**n, where shifted = 1.5 * 2**23 + n. By two factors: n may leave the exponent's range."""
        b = self.b
        n = b.sub(b.bitcast(shifted.value, V32), const_vec(V32, 0x4B400000))
        half = b.ashr(n, const_vec(V32, 1))
        result = self.value
        for power in (half, b.sub(n, half)):
            exponent = b.shl(b.add(power, const_vec(V32, 127)), const_vec(V32, 23))
            result = b.fmul(result, b.bitcast(exponent, VF))
        return Lanes(b, result)


def _exp(x: Lanes) -> Lanes:
    """e**x within 2 ulp; exp(0) is exactly 1, exp(-inf) is 0, overflow gives inf, NaN stays NaN.

    x = n ln 2 + r with |r| <= ln 2 / 2; adding 1.5 * 2**23 rounds to the integer n. ln 2 comes in two parts (Cody and
    Waite). The polynomial is that of Cephes' expf.
    """
    x = x.where("<", -110.0, -110.0, x)
    x = x.where(">", 100.0, 100.0, x)
    p, shifted = _reduced_exp(x)
    return p.times_power_of_two(shifted)


def _exp_flushed(x: Lanes) -> Lanes:
    """e**x within 2 ulp for x < 88, and 0 below -87, where results would be subnormal. NaN stays NaN."""
    p, shifted = _reduced_exp(x.where("<", -87.0, -87.0, x))
    return x.where("<", -87.0, 0.0, p.times_normal_power_of_two(shifted))


def _reduced_exp(x: Lanes) -> tuple[Lanes, Lanes]:
    """p and 1.5 * 2**23 + n, where e**x = p * 2**n."""
    shifted = x.fma(1.4426950408889634, 12582912.0)
    n = shifted - 12582912.0
    r = n.fma(-0.693145751953125, x)
    r = n.fma(-1.428606765330187e-6, r)
    p = r.fma(1.9875691500e-4, 1.3981999507e-3)
    for coefficient in (8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5):
        p = p.fma(r, coefficient)
    return (p * r).fma(r, r) + 1.0, shifted


def _tanh(x: Lanes) -> Lanes:
    """tanh within 2 ulp: an odd polynomial (Cephes' tanhf) below 0.625, else 1 - 2 / (exp(2|x|) + 1) with x's sign."""
    magnitude = x.where("<", 0.0, -x, x)
    two = Lanes(x.b, const_vec(VF, 2.0))
    large = -(two / (_exp(magnitude + magnitude) + 1.0)) + 1.0
    large = x.where("<", 0.0, -large, large)
    square = x * x
    p = square.fma(-5.70498872745e-3, 2.06390887954e-2)
    for coefficient in (-5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1):
        p = p.fma(square, coefficient)
    small = (p * square).fma(x, x)
    return magnitude.where(">=", 0.625, large, small)


def _silu(x: Lanes) -> Lanes:
    """x / (1 + exp(-x))"""
    return x / (_exp(-x) + 1.0)


def _gelu(x: Lanes) -> Lanes:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x**3))) (arXiv:1606.08415, the approximation)"""
    inner = (x * x * 0.044715).fma(x, x) * 0.7978845608028654
    return x * 0.5 * (_tanh(inner) + 1.0)


def _unary(function: Callable[[Lanes], Lanes]) -> Callable[[Vec], Vec]:
    made: Callable[[Vec], Vec] = instruction(vec, vec)(lambda b, x: function(Lanes(b, x)).value)
    return made


exp, exp_flushed, tanh, silu, gelu = (_unary(function) for function in (_exp, _exp_flushed, _tanh, _silu, _gelu))


@instruction(types.float32, types.float32)
def exp_scalar(b: Builder, x: Value) -> Value:
    """The same exp of one number."""
    return b.extract_element(_exp(Lanes(b, emit_splat(b, x))).value, ir.Constant(I32, 0))
